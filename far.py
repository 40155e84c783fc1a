"""FAR: frequency autoregressive image generation with continuous tokens (Yu et al., arXiv 2503.05305), in one file.

An image is generated from low to high frequencies. Level i shows x_i, the image low-passed to a share keep_i of its bandwidth (`ORDERINGS`);
x_0 = 0 and x_F is the image. A transformer reads x_0 .. x_i and says z_i, one vector a token (`Transformer`); a small diffusion network
draws the image's tokens given z_i (`DiffusionHead`); low-passed, the draw is x_{i+1}. `FAR.forward` is the training loss, `FAR.sample` the loop.
By default the transformer sees x_i alone (`attention="markov"`: as good in the same time) and the head draws a level's tokens jointly (`head_mixing`: better).

Letters as in the paper: B batch, C channels, H side, p patch side, N = (H/p)^2 tokens of D = C p^2 numbers, F levels, W width (w of the head),
V numbers a label (W, and with `head_mixing` w more), K condition tokens, S sequences of T tokens.
"""
import functools, math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn

# --- Orderings: x_i = P_i x, a chain of nested projections from nothing to the whole image ----------------------------
def exact_ends(ordering):
    """Makes keep 0 give zeros and keep 1 the image itself."""
    @functools.wraps(ordering)
    def with_ends(x, keep, **options):
        return ordering(x, keep, **options) if 0 < keep < 1 else x * (keep >= 1)
    return with_ends

@exact_ends
def fourier(x, keep, disc=False):
    """Ideal low-pass filter of the paper: keeps frequencies |f_x|, |f_y| <= keep H/2 (whole cycles per image).
    x [B, C, H, H] -> [B, C, H, H]; keep in [0, 1], 0 gives zeros and 1 gives x. With `disc` the region is |f| <= keep H/2."""
    H = x.shape[-1]
    f = torch.fft.fftfreq(H, 1 / H, device=x.device).abs()                      # 0, 1, .., H/2, .., 1 cycles per image
    radius = torch.hypot(f[:, None], f) if disc else torch.maximum(f[:, None], f)
    return torch.fft.ifft2(torch.fft.fft2(x) * (radius <= keep * H / 2 + 1e-6)).real

def in_cosines(x, gain):
    """Multiplies the orthonormal 2-D DCT-II coefficients of x by gain(f) along either axis, f = 0, 1/2, 1, .. cycles per image: the frequencies
    of the image beside its mirror images, so that nothing wraps around at the borders. x [B, C, H, H] -> [B, C, H, H]."""
    k = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    basis = torch.cos(math.pi / len(k) * (k + 0.5) * k[:, None])                # [H, H], a row a frequency
    basis[0] /= math.sqrt(2)
    P = 2 / len(k) * basis.T @ (gain(k / 2)[:, None] * basis)
    return P @ x @ P                                                            # P is symmetric

@exact_ends
def dct(x, keep):
    """Low-pass in the orthonormal 2-D DCT-II: keeps the coefficients with both indices < keep H. Shapes and range as in `fourier`."""
    return in_cosines(x, lambda f: f < keep * x.shape[-1] / 2 - 1e-6)

@exact_ends
def blur(x, keep):
    """Gaussian low-pass, amplitude 1/2 at keep H/2 cycles per image; soft, so not idempotent: target full, which filters each x once, does not mind. Shapes and range as in `fourier`."""
    return in_cosines(x, lambda f: torch.exp(-math.log(2) * (2 * f / (keep * x.shape[-1])) ** 2))

@exact_ends
def resize(x, keep):
    """Area down-sampling to k x k, k = max(1, round(keep H)), and bicubic up-sampling, as in the published code: nearly a projection. Shapes and range as in `fourier`."""
    k = max(1, round(keep * x.shape[-1]))
    return nn.functional.interpolate(nn.functional.interpolate(x, size=(k, k), mode="area"), size=x.shape[-2:], mode="bicubic")

@exact_ends
def haar(x, keep):
    """Haar wavelet subbands, coarse first: means of s x s pixels, s the least power of 2 with 1/s <= keep, and a third of the way to the
    next s each the details across, down and diagonal. Shapes and range as in `fourier`; ValueError if s does not divide H."""
    s = 2 ** math.ceil(-math.log2(keep) - 1e-6)
    check(x.shape[-1] % s == 0, f"haar: side {x.shape[-1]} is not divisible by {s}, the block side at keep {keep:g}")
    third = int(3 * (keep * s - 1) + 1e-6)                                      # subbands beyond the means: 0, 1 or 2
    mean = lambda h, w: nn.functional.avg_pool2d(x, (h, w)).repeat_interleave(h, 2).repeat_interleave(w, 3)
    across, both = mean(s, s // 2) if third else 0, mean(s // 2, s) - mean(s, s) if third == 2 else 0
    return across + both if third else mean(s, s)

@exact_ends
def raster(x, keep):
    """The first ceil(keep H) rows of pixels: the classic reading order. Shapes and range as in `fourier`."""
    return x * (torch.arange(x.shape[-1], device=x.device) < keep * x.shape[-1] - 1e-6)[:, None]

@exact_ends
def shuffle(x, keep):
    """The first share keep of an 8 x 8 grid of cells in one fixed random order, as MAR. Shapes and range as in `fourier`."""
    rank = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(8, 8).to(x.device)
    cell = torch.arange(x.shape[-1], device=x.device) * 8 // x.shape[-1]        # of a row or column
    return x * (rank[cell[:, None], cell] < keep * 64 - 1e-6)

ORDERINGS = {f.__name__: f for f in (fourier, dct, resize, haar, blur, raster, shuffle)}  # ordering(x [B, C, H, H], keep) -> [B, C, H, H]

def check_ordering(fn, size, channels=3):
    """Says in words which laws of an ordering `fn(x, keep)` breaks on size x size images, and by how much (largest error
    on Gaussian images of deviation 1). Returns list[str], empty when all hold: shape, zero at 0, identity at 1, linear, idempotent, nested."""
    x, y = torch.randn(2, 2, channels, size, size, generator=torch.Generator().manual_seed(0))
    keeps, fn = [0.125, 0.25, 0.4, 0.5, 0.75, 1.0], lambda x, keep, fn=fn: fn(x.clone(), keep)  # fn may write into x
    if shapes := [f"shape: {list(x.shape)} becomes {list(fn(x, a).shape)} at keep {a:g}" for a in (0.0, *keeps) if fn(x, a).shape != x.shape]:
        return shapes[:1]
    checks = [("zero at 0", "keep 0", fn(x, 0.0), 0 * x), ("identity at 1", "keep 1", fn(x, 1.0), x)]
    for n, a in enumerate(keeps):
        P = fn(x, a)
        checks += [("linear", f"keep {a:g}", fn(2 * x - 3 * y, a), 2 * P - 3 * fn(y, a)), ("idempotent", f"keep {a:g}", fn(P, a), P)]
        for b in keeps[n + 1:]:
            checks += [("nested", f"keep {a:g} after {b:g}", fn(fn(x, b), a), P), ("nested", f"keep {b:g} after {a:g}", fn(P, b), P)]
    worst = {}  # law -> (largest error, where)
    for law, where, got, want in checks:
        worst[law] = max(worst.get(law, (0.0, "")), ((got - want).abs().nan_to_num(math.inf).max().item(), where))
    return [f"{law}: broken at {where}, largest error {error:.3g}" for law, (error, where) in worst.items() if error > 1e-4]

# --- Settings ---------------------------------------------------------------------------------------------------------
PAPER_LEVELS = tuple(side / 16 for side in (2, 3, 4, 5, 6, 7, 8, 9, 10, 16))  # 10 steps on the paper's 16 x 16 token grid
PAPER = dict(levels=PAPER_LEVELS, attention="causal", head_mixing=False, head_draws=4, target="full", prediction="eps", schedule="cosine",
             solver="ddpm", head_steps="paper", temperature="paper", mask="text", loss_weighting=True, time_shift=1.0)
LATENTS = dict(image_size=16, channels=16, patch_size=1, num_classes=1000, levels=PAPER_LEVELS, cond_tokens=64, attention="causal", head_mixing=False,
               head_draws=4, dropout=0.1, ordering="resize")                    # a Fourier square of 16 x 16 tells 6 of the 10 levels apart
PRESETS = {
    "digits": dict(image_size=8, channels=1, ordering="dct", levels_per_image=1, width=128, head_width=128, head_depth=4, head_steps=32, temperature=1.05),
    "cifar": dict(levels=(0.25, 1.0), ordering="dct", levels_per_image=1, target="residual", time_shift=[0.35, 2.5], head_depth=8, head_steps=8),
    "imagenet64": dict(image_size=64, num_classes=1000, levels=(0.125, 0.25, 0.5, 1.0), ordering="dct", levels_per_image=1, width=768, depth=8, heads=12, head_width=768, head_depth=8),
    "far_b": dict(LATENTS, width=768, depth=24, heads=12, head_width=1024, head_depth=3),
    "far_l": dict(LATENTS, width=1024, depth=32, heads=16, head_width=1024, head_depth=4),
    "far_h": dict(LATENTS, width=1280, depth=40, heads=16, head_width=1024, head_depth=6),
}
CHOICES = dict(attention=("causal", "markov"), prediction=("v", "eps"), schedule=("linear", "cosine"), target=("full", "next", "residual"), mask=("none", "text", "reference"),
               solver=("ddpm", "ddim", "dpmpp_2m"), guidance_schedule=("linear", "constant"), step_rule=("paper", "locked"))
SAMPLING = ("guidance", "guidance_schedule", "solver", "head_steps", "temperature", "step_rule", "coupling")  # what FAR.sample may override

def check(ok, message):
    if not ok:
        raise ValueError(message)

def describe(x):
    return f"{x.dtype} of shape {list(x.shape)}" if torch.is_tensor(x) else f"of type {type(x).__name__}"

@dataclass
class FARConfig:
    """All settings of a model; the defaults are the `cifar` preset but for what PRESETS names. Raises ValueError on impossible settings."""
    image_size: int = 32                # H
    channels: int = 3                   # C
    patch_size: object = 4              # p, or one a level
    num_classes: int = 10               # 0: no class labels
    levels: tuple = (0.25, 0.5, 1.0)    # keep_1 < .. < keep_F = 1
    ordering: str = "fourier"           # a name in ORDERINGS
    width: int = 256                    # transformer
    depth: int = 1
    heads: int = 4                      # attention heads of the transformer and of a mixing head
    dropout: float = 0.0
    cond_tokens: int = 0                # K tokens in front of all levels: copies of the class, or embeddings; 0: the class is only added
    cond_dim: int = 0                   # > 0: labels are embeddings [B, K, cond_dim], e.g. of a text
    attention: str = "markov"           # causal: a level sees itself and all earlier ones; markov: itself alone
    levels_per_image: int = 0           # markov: random levels trained per image and step; 0 (and always with causal): all
    head_width: int = 256               # diffusion head
    head_depth: int = 5                 # blocks, for each size of patch
    head_mixing: bool = True            # tokens of a level attend to each other in the head, which then has positions and its own numbers of each label
    head_draws: int = 1                 # noise draws per token and transformer pass in training
    prediction: str = "v"               # v: velocity, eps: noise
    schedule: str = "linear"            # linear or cosine path from data to noise
    time_shift: object = 1.0            # factor on t/(1 - t) of the times t in training (Esser et al. 2024), or one a level: above 1 more noise
    target: str = "full"                # what the head learns: full p(x|x_i), next p(x_{i+1}|x_i), residual p(x_{i+1}-x_i|x_i)
    mask: str = "none"                  # input masks, see mask_bounds
    loss_weighting: bool = False        # w_i of loss_weights
    label_dropout: float = 0.1          # share of labels dropped, for guidance
    # What FAR.sample may override. i = 0 .. F-1: the step from x_i to x_{i+1}.
    guidance: object = 1.0              # g >= 0, or one g_i a level: the head's prediction is u + g_i (p - u), p with and u without label
    guidance_schedule: str = "linear"   # of one g: g_i = 1 + (g - 1) i/F, none at the first level; or constant: g_i = g
    solver: str = "dpmpp_2m"            # ddpm, ddim or dpmpp_2m, see Path.sample
    head_steps: object = 12             # steps of the solver: int, one a level, or "paper" (40 to 100)
    temperature: object = 1.0           # factor on the head's noise: float, one a level, or "paper" (0.8 to 1)
    step_rule: str = "paper"            # x_{i+1} = P_{i+1} xhat; or locked: x_i + P_{i+1} xhat - P_i xhat, which keeps what was known
    coupling: object = 0.0              # rho in [0, 1] of couple_noise, or one a level: in k x k cells, k = round(keep_{i+1} H), where these are larger than a token; for target full alone

    def __post_init__(self):
        numbers = isinstance(self.levels, (tuple, list)) and all(isinstance(keep, (int, float)) for keep in self.levels)
        check(numbers and len(self.levels) and all(a < b for a, b in zip((0, *self.levels), self.levels)) and self.levels[-1] == 1,
              f"levels are {self.levels!r}; they must be numbers that increase from above 0 to exactly 1")
        self.levels = tuple(map(float, self.levels))
        for name, allowed in {**CHOICES, "ordering": ORDERINGS}.items():
            check(getattr(self, name) in tuple(allowed), f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("num_classes", "cond_tokens", "cond_dim", "levels_per_image") else 1
            check(f.type is not int or type(value) is int and value >= least, f"{f.name} is {value!r}; it must be a whole number of at least {least}")
            check(f.type is not float or isinstance(value, (int, float)) and 0 <= value <= 1, f"{f.name} is {value!r}; it must lie in [0, 1]")
            check(f.type is not bool or isinstance(value, bool), f"{f.name} is {value!r}; it must be True or False")
        self.patch_sizes = per_level(self.patch_size, len(self.levels), "patch_size")
        check(not any(self.image_size % p for p in self.patch_sizes), f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        check(self.width % self.heads == 0 and self.width % 4 == 0, f"width {self.width} is not divisible by heads {self.heads} and by 4")
        check(self.head_width % self.heads == 0 and self.head_width % 4 == 0 or not self.head_mixing, f"head_width {self.head_width} is not divisible by heads {self.heads} and by 4")
        check(self.levels_per_image <= len(self.levels), f"levels_per_image is {self.levels_per_image}, more than the {len(self.levels)} levels")
        check(self.cond_dim == 0 or self.cond_tokens > 0, "cond_dim needs cond_tokens, the number of embeddings a sample")
        *_, coupling = [per_level(getattr(self, name), len(self.levels), name) for name in ("time_shift", "guidance", "head_steps", "temperature", "coupling")]
        check(max(coupling) <= 1, f"coupling is {self.coupling}; it must lie in [0, 1]")
        self.num_tokens, self.token_dim = [(self.image_size // p) ** 2 for p in self.patch_sizes], [self.channels * p ** 2 for p in self.patch_sizes]  # N, D
        self.label_dim = self.width + self.head_width * self.head_mixing        # V: the first W for the transformer's tokens, the rest for a mixing head

    @classmethod
    def preset(cls, name, paper=False, **overrides):
        """A configuration of PRESETS; `paper` takes the paper's choices (PAPER) but for the ordering; overrides win."""
        check(name in PRESETS, f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **(PAPER if paper else {}), **overrides})

    to_dict = asdict

    @classmethod
    def from_dict(cls, d):
        unknown = set(d) - {f.name for f in fields(cls)}
        check(not unknown, f"unknown settings {sorted(unknown)}; allowed: {', '.join(f.name for f in fields(cls))}")
        return cls(**d)

# --- Tokens, masks and schedules over levels --------------------------------------------------------------------------
def patchify(x, p):
    """Image x [B, C, H, H] -> tokens [B, N, C p^2], row by row; each token is (channel, row, column). ValueError if p does not divide H."""
    B, C, H, W = x.shape
    check(p >= 1 and H % p == 0 and W % p == 0, f"image sides {H} x {W} are not divisible by the patch side {p}")
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)

def unpatchify(tokens, p, channels):
    """Tokens [B, N, C p^2] -> square image [B, C, H, H]: the inverse of `patchify`. ValueError if N is no square or D another."""
    G = math.isqrt(tokens.shape[1])
    check(tokens.shape[1:] == (G * G, channels * p * p), f"tokens of shape {list(tokens.shape)} are no square grid of patches {channels} x {p} x {p}")
    return tokens.reshape(len(tokens), G, G, channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, G * p, G * p)

def block_causal_mask(num_levels, num_tokens, markov=False):
    """Bool [F N, F N], True = query (row) may attend to key (column): level(q) >= level(k), or level(q) == level(k) with `markov`. num_tokens: N, or one a level."""
    level = torch.tensor([i for i, N in enumerate(per_level(num_tokens, num_levels, "num_tokens")) for _ in range(N)])
    return level[:, None] == level if markov else level[:, None] >= level

def loss_weights(F):
    """Frequency-aware loss weights [F]: entry i-1 is w_i = 1 + sin(pi/2 i/F), more for high frequencies."""
    return 1 + torch.sin(math.pi / 2 * torch.arange(1, F + 1) / F)

def mask_bounds(F, direction):
    """Lower bounds [F] of the masked share at level i = 0 .. F-1: "text" (the paper's) 0.7 (1 - i/F), low levels most; "reference" (its code) 0.7 i/F."""
    check(direction in ("text", "reference"), f"direction is {direction!r}; allowed: text, reference")
    i = torch.arange(F) / F
    return 0.7 * (1 - i if direction == "text" else i)

def masked_share(lower):
    """Draws shares from a Gaussian of mean 1 and deviation 0.25 cut off to [lower, 1], shaped like lower, by inverting its distribution function."""
    low = torch.special.ndtr((lower - 1) / 0.25)
    return 1 + 0.25 * torch.special.ndtri(low + (0.5 - low) * torch.rand_like(lower))

def head_step_schedule(F, low=40, high=100):
    """Frequency-aware head steps: list of F whole numbers rising linearly from low to high (mean 70); F = 1 gives [high]."""
    return [round(low + (high - low) * i / (F - 1)) for i in range(F)] if F > 1 else [high]

def per_level(value, F, name):
    """A setting of every level: one number for all, a sequence of F, or "paper" (head_steps 40 to 100, temperature 0.8 to 1) -> list of F.
    Whole numbers of at least 1 for head_steps, patch_size and num_tokens, finite numbers of at least 0 (time_shift: 0.001) otherwise; ValueError for anything else."""
    kind, least = (int, 1) if name in ("head_steps", "patch_size", "num_tokens") else ((int, float), 0.001 if name == "time_shift" else 0)
    paper = {"head_steps": head_step_schedule(F), "temperature": [1 - 0.2 * (F - i) / max(F - 1, 1) for i in range(1, F + 1)]}.get(name)
    values = value.tolist() if hasattr(value, "tolist") else paper if isinstance(value, str) and value == "paper" else value
    values = list(values) if isinstance(values, (list, tuple)) else [values] * F
    check(len(values) == F and all(isinstance(v, kind) and not isinstance(v, bool) and least <= v < math.inf for v in values),
          f"{name} is {value!r}; it must be a {'whole ' * (kind is int)}number of at least {least}, or one for each of {F} levels{', or paper' * bool(paper)}")
    return values

# --- Transformer: z_i from x_0 .. x_i ---------------------------------------------------------------------------------
def sincos_2d(G, W):
    """Position embeddings [G^2, W] of a G x G grid: sines and cosines of row and column at W/4 frequencies from 1 down to 1/100 a token."""
    angle = torch.arange(G)[:, None] * 100 ** (-torch.arange(W // 4) / (W // 4))  # [G, W / 4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)                             # [G, W / 2]
    return torch.cat([axis.repeat_interleave(G, 0), axis.repeat(G, 1)], 1)

class Attention(nn.Module):
    """Multi-head self-attention, [S, T, W] -> [S, T, W]; qkv(x) is q, k, v in turn; `mask` as in block_causal_mask; `cache`: earlier "k" and "v" [S, heads, T, W / heads]."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None, cache=None):
        S, T, W = x.shape
        q, k, v = self.qkv(x).view(S, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each [S, heads, T, W / heads]
        if cache is not None:
            k, v = (torch.cat([cache[name], new], 2) if cache else new for name, new in (("k", k), ("v", v)))
            cache.update(k=k, v=v)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(S, T, W))

def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

class Block(nn.Module):
    """Pre-norm transformer block, [S, T, W] -> [S, T, W]."""
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2, self.mlp, self.dropout = nn.LayerNorm(width), mlp(width), nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))

def by_size(sizes, layer):                                                      # tokens of one size D share layer(D), whatever their level
    return nn.ModuleDict({str(D): layer(D) for D in sorted(set(sizes))})

class Transformer(nn.Module):
    """Visible tokens of the levels -> conditions z (paper, causal attention over frequency levels).
    The sequence is [condition block of K tokens, level block, level block, ..]; every level's token also gets the mean condition."""
    def __init__(self, c):
        super().__init__()
        self.c, self.input, self.level, self.norm = c, by_size(c.token_dim, lambda D: nn.Linear(D, c.width)), nn.Embedding(len(c.levels), c.width), nn.LayerNorm(c.width)
        self.position = nn.Parameter(sincos_2d(math.isqrt(max(c.num_tokens)), c.width))  # of the finest grid, learned from there
        self.label = nn.Linear(c.cond_dim, c.label_dim) if c.cond_dim else nn.Embedding(c.num_classes, c.label_dim) if c.num_classes else None
        self.no_label = nn.Parameter(torch.randn(c.cond_tokens if c.cond_dim else 1, c.label_dim))  # starts like one more class
        self.cond_position = nn.Parameter(0.02 * torch.randn(c.cond_tokens, c.width)) if c.cond_tokens else None
        if c.mask != "none":
            self.mask_token = nn.Parameter(0.02 * torch.randn(c.width))
            self.register_buffer("mask_bounds", mask_bounds(len(c.levels), c.mask), persistent=False)
        if c.attention == "causal":
            mask = nn.functional.pad(block_causal_mask(len(c.levels), c.num_tokens), (c.cond_tokens, 0, c.cond_tokens, 0), value=True)
            mask[:c.cond_tokens, c.cond_tokens:] = False                        # all see the condition block, which sees itself
            self.register_buffer("attention_mask", mask, persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.dropout) for _ in range(c.depth))

    def embed(self, tokens, i, cond):
        """Tokens of x_i [B, N, D], i a number or [B], cond [B, K or 1, W] -> [B, N, W]."""
        x = self.input[str(tokens.shape[2])](tokens)
        if self.training and self.c.mask != "none":                             # mask mechanism
            share = masked_share(self.mask_bounds[i].expand(len(x)))[:, None]   # [B, 1]
            rank = torch.rand(x.shape[:2], device=x.device).argsort(-1) + torch.rand_like(share)  # share N tokens in the mean, rounded up or down
            x = torch.where((rank < share * x.shape[1])[..., None], self.mask_token.to(x.dtype), x)
        grid = self.position.T.unflatten(1, 2 * [math.isqrt(len(self.position))])  # [W, G, G]
        position = nn.functional.adaptive_avg_pool2d(grid, math.isqrt(x.shape[1])).flatten(1).T  # [N, W], the mean over each coarser token
        return x + position + self.level.weight[i, None] + cond.mean(1, keepdim=True)

    def forward(self, blocks, first, cond, cache=None):
        """blocks: tokens [B, N, D] of x_i, i = first, first + 1, ..; cond [B, 1 or K, V] (FAR.condition) -> z_i [B, N, W], one a block. Training with causal attention:
        all levels at once; with markov: one block, first [B] for images of several levels. Sampling: a level a call; causal keeps keys and values in `cache`, a dict a block."""
        cond, start = cond[..., :self.c.width], not (cache and cache[0])         # the rest is the head's; the condition block comes with the first levels
        x = [self.embed(tokens, first + n, cond) for n, tokens in enumerate(blocks)]
        lengths, cond = [block.shape[1] for block in x], cond + self.cond_position if self.c.cond_tokens else cond[:, :0]  # cond [B, K, W]
        h = torch.cat([cond, *x] if start else x, 1)
        mask = self.attention_mask[:h.shape[1], :h.shape[1]] if start and self.c.attention == "causal" else None
        for n, block in enumerate(self.blocks):
            h = block(h, mask, cache[n] if cache else None)
        return self.norm(h[:, -sum(lengths):]).split(lengths, 1)

# --- Diffusion: a Gaussian path x_t = alpha_t x + sigma_t eps, t in [0, 1], and its samplers --------------------------
class Path:
    """Noise schedule and prediction type. linear: alpha = 1 - t, sigma = t (flow matching); cosine: Nichol & Dhariwal 2021, the limit of
    many steps: alpha^2 = f(t)/f(0), f(t) = cos^2(pi/2 (t + 0.008)/1.008). The network predicts a x + b eps: for prediction "eps" the noise
    (a = 0, b = 1), for "v" the velocity, the derivative of x_t by t (linear: a = -1, b = 1) or by the angle (cosine: a = -sigma, b = alpha)."""
    def __init__(self, schedule, prediction):
        self.schedule, self.prediction = schedule, prediction

    def __call__(self, t):
        """t -> (alpha, sigma, a, b)."""
        if self.schedule == "linear":
            alpha, sigma, a, b = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        else:
            alpha = torch.cos(math.pi / 2 * (t + 0.008) / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008)
            sigma = (1 - alpha ** 2).clamp(min=0).sqrt()
            a, b = -sigma, alpha
        return (alpha, sigma, a, b) if self.prediction == "v" else (alpha, sigma, torch.zeros_like(t), torch.ones_like(t))

    def draw_t(self, *shape, device=None):
        """Training times: logit-normal for the linear path (Esser et al. 2024), uniform for cosine."""
        return torch.randn(shape, device=device).sigmoid() if self.schedule == "linear" else torch.rand(shape, device=device)

    def noise(self, x, eps, t):
        """x, eps of one shape, t that broadcasts against them -> (x_t, what the network should predict), shaped like x."""
        alpha, sigma, a, b = self(t)
        return alpha * x + sigma * eps, a * x + b * eps

    def denoise(self, x_t, prediction, t):
        """The data x that a prediction at x_t stands for."""
        alpha, sigma, a, b = self(t)
        return (b * x_t - sigma * prediction) / (alpha * b - sigma * a)

    def step(self, x_t, xhat, t, s, ancestral):
        """One step x_t -> x_s, s < t, given the data prediction xhat, so that epshat = (x_t - alpha xhat) / sigma. Returns the mean of x_s, alpha_s xhat +
        sqrt(sigma_s^2 - c^2) epshat, and its deviation c: ancestral (DDPM), c^2 is the variance of x_s given x_t and x; deterministic (DDIM), 0."""
        (alpha, sigma, *_), (alpha_s, sigma_s, *_) = self(t), self(s)
        variance = (sigma_s / sigma) ** 2 * (sigma ** 2 - (alpha / alpha_s * sigma_s) ** 2).clamp(min=0) if ancestral else 0 * sigma_s
        return alpha_s * xhat + (sigma_s ** 2 - variance).clamp(min=0).sqrt() * (x_t - alpha * xhat) / sigma, variance.sqrt()

    def sample(self, network, noise, steps, solver="dpmpp_2m", temperature=1.0, draw=torch.randn_like):
        """Integrates from noise (t = 0.999) to data (t = 0) in `steps` >= 1 evaluations of network(x_t, t) -> prediction.
        ddpm and ddim: see `step`; dpmpp_2m: the ddim step with xhat extrapolated from the last two (Lu et al. 2022), second order.
        noise: standard normal, any shape; draw(x): more of it, shaped like x; `temperature` >= 0 scales both. Returns data, shaped like noise."""
        x, times = temperature * noise, torch.linspace(0.999, 0, steps + 1)            # on the CPU: no step waits for an accelerator
        alpha, sigma, *_ = self(times)
        snr = torch.log(alpha / sigma)                                          # half the logarithm of the signal-to-noise ratio
        for n, (t, s) in enumerate(zip(times[:-1], times[1:])):
            xhat = data = self.denoise(x, network(x, t), t)
            if solver == "dpmpp_2m" and 0 < n < steps - 1:
                data = xhat + (xhat - last) * (snr[n + 1] - snr[n]) / (2 * (snr[n] - snr[n - 1]))
            last = xhat
            x, deviation = self.step(x, data, t, s, solver == "ddpm")
            if deviation > 0:
                x = x + temperature * deviation * draw(x)
        return x

# --- Diffusion head: p(tokens | z) ------------------------------------------------------------------------------------
class HeadBlock(nn.Module):
    """AdaLN-Zero residual block (Peebles & Xie 2023), h [S, N, w], c [S, N or 1, w] -> [S, N, w]. modulation(silu(c)) is shift, scale, gate of the MLP, then,
    with `mixing`, of the attention over the N tokens, which comes first. DiffusionHead starts it at zero, which makes the block the identity."""
    def __init__(self, width, heads, mixing):
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(width, elementwise_affine=False), mlp(width)
        if mixing:
            self.norm2, self.attention = nn.LayerNorm(width, elementwise_affine=False), Attention(width, heads)
        self.modulation = nn.Linear(width, 6 * width if mixing else 3 * width)

    def forward(self, h, c):
        shift, scale, gate, *mix = self.modulation(nn.functional.silu(c)).split(h.shape[-1], -1)
        if mix:
            h = h + mix[2] * self.attention(self.norm2(h) * (1 + mix[1]) + mix[0])
        return h + gate * self.mlp(self.norm1(h) * (1 + scale) + shift)

class DiffusionHead(nn.Module):
    """The small network that denoises a level's tokens given z (diffusion loss, Li et al. 2024): an MLP per token with AdaLN-Zero on z, t and level; with `head_mixing`
    the tokens of a level also attend to each other, have positions and share one t and the label. Every size D of tokens has its own input, positions, blocks and output."""
    def __init__(self, c):
        super().__init__()
        w, self.mixing, self.draws, self.path = c.head_width, c.head_mixing, c.head_draws, Path(c.schedule, c.prediction)
        self.input, self.output = by_size(c.token_dim, lambda D: nn.Linear(D, w)), by_size(c.token_dim, lambda D: nn.Linear(w, D))
        self.condition, self.level, self.time = nn.Linear(c.width, w), nn.Embedding(len(c.levels), w), nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        self.blocks = by_size(c.token_dim, lambda D: nn.ModuleList(HeadBlock(w, c.heads, c.head_mixing) for _ in range(c.head_depth)))
        self.position = nn.ParameterDict({str(D): sincos_2d(math.isqrt(N), w) for N, D in zip(c.num_tokens, c.token_dim)} if c.head_mixing else {})
        self.norm, self.modulation = nn.LayerNorm(w, elementwise_affine=False), nn.Linear(w, 2 * w)
        self.register_buffer("frequencies", 1000 * torch.exp(-math.log(10000) * torch.arange(32) / 32), persistent=False)
        self.register_buffer("time_shift", torch.tensor(per_level(c.time_shift, len(c.levels), "time_shift"), dtype=torch.float32), persistent=False)
        for layer in (self.modulation, *self.output.values(), *(block.modulation for blocks in self.blocks.values() for block in blocks)):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def project(self, z, i, cond):
        """z [S, N, W] of level i (or i [S]), label condition [S, 1 or K, V] -> (z [S, N, w], modulation [S, 1 or N, w]): once per level, not
        once per step. The z of a token steers that token; with mixing, the mean z and the label steer all."""
        z, level = self.condition(z), self.level.weight[i, None]
        return z, level + (z.mean(1, keepdim=True) + cond[..., -z.shape[2]:].mean(1, keepdim=True) if self.mixing else z)

    def forward(self, x_t, t, projected):
        """Noisy tokens x_t [S, N, D], times t [S, 1] or [S, N], `project`'s answer -> prediction [S, N, D]."""
        (z, c), D, angle = projected, str(x_t.shape[2]), t[..., None] * self.frequencies
        c = c + self.time(torch.cat([angle.cos(), angle.sin()], -1))            # [S, 1 or N, w]
        h = self.input[D](x_t) + z + (self.position[D].to(z.dtype) if self.mixing else 0)
        for block in self.blocks[D]:
            h = block(h, c)
        shift, scale = self.modulation(nn.functional.silu(c)).chunk(2, -1)
        return self.output[D](self.norm(h) * (1 + scale) + shift).float()

    def loss(self, target, noise, z, i, cond, band=lambda prediction: prediction):
        """target [S, N, D], normal noise of deviation 1 [S draws, N, D], conditions as in `project` -> mean squared error of the prediction, [S], over `head_draws` draws
        of (t, noise), t/(1 - t) of `draw_t` times the level's time_shift. Where targets lie in a part of the space only, `band` projects predictions [S draws, N, D] there."""
        projected = [a.repeat_interleave(self.draws, 0) for a in self.project(z, i, cond)]
        t = self.path.draw_t(len(noise), 1 if self.mixing else noise.shape[1], device=noise.device)
        t = t / (t + (1 - t) / self.time_shift[i].expand(len(z)).repeat_interleave(self.draws)[:, None])  # t/(1 - t) times the shift
        x_t, want = self.path.noise(target.repeat_interleave(self.draws, 0), noise, t[..., None])
        return (band(self(x_t, t, projected)) - want).square().mean((1, 2)).view(-1, self.draws).mean(1)

# --- FAR: the loss and the generation loop ----------------------------------------------------------------------------
def couple_noise(noise, shared, side, rho):
    """sqrt(rho) shared[cell] + sqrt(1 - rho) noise: tokens of one cell correlate by rho, each keeps variance 1. noise [B, N, D] and
    shared [B, side^2, D] are independent standard normal; the G x G token grid falls into side x side cells, side < G."""
    G = math.isqrt(noise.shape[1])
    cell = torch.arange(G, device=noise.device) * side // G
    return math.sqrt(rho) * shared[:, (cell[:, None] * side + cell).flatten()] + math.sqrt(1 - rho) * noise

class FAR(nn.Module):
    """Frequency autoregressive model. Images [B, C, H, H]: float32 of about [-1, 1] (or latents of unit variance) or uint8 [0, 255]. Labels: int64 [B] in
    [0, num_classes), or float [B, K, cond_dim]. Others raise ValueError (but for the range of labels on an accelerator: a check would wait for it)."""
    def __init__(self, config):
        super().__init__()
        self.config, self.transformer, self.head = config, Transformer(config), DiffusionHead(config)
        for name in ("data_scale", "noise_scale"):                              # units of what each level draws and of its noise, see set_scales
            self.register_buffer(name, torch.ones(len(config.levels)))

    def project(self, x, i):
        """x_i = P_i x: x [B, C, H, H] seen at level i = 0 .. F, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return ORDERINGS[self.config.ordering](x.to(torch.float32, copy=True), (0.0, *self.config.levels)[i]).float()  # it may write into x

    def as_images(self, images):
        c, size = self.config, [self.config.channels, self.config.image_size, self.config.image_size]
        check(torch.is_tensor(images) and images.dtype in (torch.float32, torch.uint8) and list(images.shape[1:]) == size and len(images) > 0,
              f"images are {describe(images)}; allowed: float32 of about [-1, 1] or uint8 [0, 255], of shape [B, {c.channels}, {c.image_size}, {c.image_size}]")
        images = images.to(self.data_scale.device)
        return images / 127.5 - 1 if images.dtype == torch.uint8 else images

    def condition(self, labels, B, dropout=0.0):
        """Labels, or None for B images without label -> [B, 1 or K, V] for transformer and head; a share `dropout` loses its label."""
        c, device, no_label = self.config, self.data_scale.device, self.transformer.no_label
        if labels is None:
            return no_label.expand(B, -1, -1)
        check(c.num_classes or c.cond_dim, "this model has no classes; give no labels")
        shape, kind = ([B, c.cond_tokens, c.cond_dim], "float") if c.cond_dim else ([B], "int64")
        check(torch.is_tensor(labels) and list(labels.shape) == shape and (labels.is_floating_point() if c.cond_dim else labels.dtype == torch.int64),
              f"labels are {describe(labels)}; allowed: {kind} {shape}")
        if not c.cond_dim and labels.device.type == "cpu":
            check(0 <= labels.min() and labels.max() < c.num_classes, f"labels lie in {labels.min()} .. {labels.max()}; allowed: 0 .. {c.num_classes - 1}")
        label = self.transformer.label(labels.to(device).float()) if c.cond_dim else self.transformer.label(labels.to(device))[:, None]
        return torch.where((torch.rand if dropout else torch.ones)(B, 1, 1, device=device) < dropout, no_label, label)  # no dropout: no random numbers, but no_label stays in the graph, for DDP

    def band(self, tokens, i):
        """The part of an image that level i draws, tokens [B, N, D] -> [B, N, D]: all of it (target full), P_{i+1} x (next) or P_{i+1} x - P_i x
        (residual). Noise and predictions are cut down to it too, so that the head has nothing to learn outside."""
        c, p = self.config, self.config.patch_sizes[i]
        if c.target == "full":
            return tokens
        x = unpatchify(tokens, p, c.channels)
        return patchify(self.project(x, i + 1) - (self.project(x, i) if c.target == "residual" else 0), p)

    @torch.no_grad()
    def set_scales(self, images):
        """Measures on images the units of each level, [F]: the deviation of its noise, and, for target "residual", of x_{i+1} - x_i."""
        x = self.as_images(images)
        for i, p in enumerate(self.config.patch_sizes):
            self.noise_scale[i] = self.band(patchify(torch.randn_like(x), p), i).std().clamp(min=1e-6)
            if self.config.target == "residual":
                self.data_scale[i] = self.band(patchify(x, p), i).std().clamp(min=1e-6)

    def losses(self, images, labels, k):
        """Diffusion losses of the steps x_i -> x_{i+1}, [F], i = 0 .. F-1, each the mean over its images. Each image trains k levels (more where B < F / k),
        and every level has the same share of the images, to within one and at least one; with causal attention all train all."""
        c, F, images = self.config, len(self.config.levels), self.as_images(images)
        B, causal, cond = len(images), c.attention == "causal", self.condition(labels, len(images), c.label_dropout if self.training else 0.0)
        order = torch.rand(B, device=images.device).argsort().repeat(F if causal else max(k, math.ceil(F / B)))
        rows = order.tensor_split(F)                                            # [b] each: the images that train level i
        levels = [(i, images[r], p) for i, (r, p) in enumerate(zip(rows, c.patch_sizes))]
        visible = [patchify(self.project(x, i), p) for i, x, p in levels]
        target = [self.band(patchify(x, p), i) / self.data_scale[i] for i, x, p in levels]
        noise = [self.band(torch.randn_like(x.repeat_interleave(c.head_draws, 0)), i) / self.noise_scale[i] for i, x in enumerate(target)]
        z, losses = self.transformer(visible, 0, cond[rows[0]]) if causal else None, {}
        kinds = range(F) if causal else c.patch_sizes                           # markov: levels with patches of one size go through the networks as one batch
        for group in ([i for i in range(F) if kinds[i] == kind] for kind in dict.fromkeys(kinds)):
            join = lambda parts: torch.cat([parts[i] for i in group])
            band = lambda x: torch.cat([self.band(part, i) for i, part in zip(group, x.split([len(noise[i]) for i in group]))])
            level, label = torch.cat([torch.full_like(rows[i], i) for i in group]), cond[join(rows)]
            said = join(z) if causal else self.transformer([join(visible)], level, label)[0]
            loss = self.head.loss(join(target), join(noise), said, level, label, band)
            losses.update(zip(group, map(torch.mean, loss.split([len(rows[i]) for i in group]))))
        return torch.stack([losses[i] for i in range(F)])

    def forward(self, images, labels=None):
        """Training loss, a scalar: the mean over levels of w_i times the loss of level i; w_i = 1 without loss_weighting."""
        losses = self.losses(images, labels, self.config.levels_per_image or len(self.config.levels))
        return sum(w * loss for w, loss in zip(loss_weights(len(losses)).tolist(), losses)) / len(losses) if self.config.loss_weighting else losses.mean()

    def level_losses(self, images, labels=None):
        """Unweighted loss of each level, [F], the mean over images: entry i for the step x_i -> x_{i+1}."""
        return self.losses(images, labels, len(self.config.levels))

    @torch.no_grad()
    def average(self, model, decay):
        """Moving average of weights: self becomes decay self + (1 - decay) model. Training keeps one, and samples are drawn from it."""
        torch._foreach_lerp_(list(self.parameters()), list(model.parameters()), 1 - decay)

    def guided(self, z, i, cond, guidance):
        """What the sampler of level i integrates: a function of tokens x_t [B, N, D] and time t, the head's prediction u + g (p - u), g = guidance. z [S, N, W]
        and cond [S, 1 or K, V] hold the labelled half, S = B, and where g is not 1 the unlabelled half after it, S = 2 B; both see the same x_t."""
        projected = self.head.project(z, i, cond)
        def network(x_t, t):
            both = x_t.repeat(len(z) // len(x_t), 1, 1)
            p, *u = self.head(both, torch.full((len(z), 1), float(t), device=z.device), projected).split(len(x_t))
            return self.band(u[0] + guidance * (p - u[0]) if u else p, i)
        return network

    @torch.no_grad()
    def sample(self, labels, *, known=None, stops=None, generator=None, return_levels=False, **settings):
        """Draws images level by level: z_i from the transformer, xhat from the head, x_{i+1} by the step rule.
        labels: int64 [B] or float [B, K, cond_dim]; or an int n for n images without label (and without guidance).
        known: (x, i) starts from what images x [B or 1, C, H, H] show at level i < F (0 or one of the stops). generator: a torch.Generator, or a list of one an image.
        stops: some of the config's levels, 1 among them: the model takes these steps alone, each with the settings of the x_i it leaves (for target full and attention markov).
        settings: those of FARConfig from guidance on, whose values are the default.
        Returns [B, C, H, H] in about [-1, 1], or with return_levels [B, F, C, H, H], x_1 .. x_F (or stops). ValueError on bad arguments."""
        check(set(settings) <= set(SAMPLING), f"settings are {', '.join(settings)}; allowed: {', '.join(SAMPLING)}")
        c, device, levels = replace(self.config, **settings), self.data_scale.device, len(self.config.levels)
        guidance, steps, temperature, coupling = (per_level(getattr(c, name), levels, name) for name in ("guidance", "head_steps", "temperature", "coupling"))
        check(type(labels) is int and labels > 0 or torch.is_tensor(labels) and labels.ndim and len(labels), f"labels are {labels!r}; allowed: a tensor for one image or more, or their number")
        B, given = (labels, None) if type(labels) is int else (len(labels), labels.cpu())
        stops = c.levels if stops is None else stops if isinstance(stops, (list, tuple)) and (c.target, c.attention) == ("full", "markov") else ()
        states = [i for i, keep in enumerate((0, *c.levels)) if keep in (0, *stops)]  # the x_i on the way
        check(len(states) == len(stops) + 1 and 1 in stops, f"stops must be some of the levels {c.levels}, 1 among them, and the model have target full and attention markov")
        image, start = (None, 0) if known is None else known if isinstance(known, tuple) and len(known) == 2 else (None, -1)
        check(known is None or start in states[:-1] and len(self.as_images(image)) in (1, B), f"known must be (1 or {B} images, a level of {states[:-1]})")
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        check(len(generators) in (1, B) and all(isinstance(g, torch.Generator | None) for g in generators), f"generator must be a torch.Generator, or a list of one for each of {B} images")
        def draw(*shape):                                                       # standard normal [B, *shape]
            return torch.cat([torch.randn(B // len(generators), *shape, generator=g, device=g.device if g else device) for g in generators]).to(device)
        linear = c.guidance_schedule == "linear" and torch.as_tensor(c.guidance).ndim == 0
        guide = [1.0 if given is None else 1 + (g - 1) * i / levels if linear else g for i, g in enumerate(guidance)]
        copies = 2 if any(guide[i] != 1 for i in states[:-1]) else 1            # labelled half, then unlabelled half
        cond = torch.cat([self.condition(given, B), self.condition(None, B)][:copies])
        x, outputs = torch.zeros(B, c.channels, c.image_size, c.image_size, device=device), []
        cache, training = [{} for _ in self.transformer.blocks] if c.attention == "causal" else None, self.training
        self.eval()
        try:
            for i, j in zip(states, states[1:]):                                # from x_i to x_j; j = i + 1 without stops
                p = c.patch_sizes[i]
                z = self.transformer([patchify(x, p).repeat(copies, 1, 1)], i, cond, cache)[0]
                if i < start:
                    x = self.project(self.as_images(image), j).expand(B, -1, -1, -1)
                else:
                    white, side = draw(c.num_tokens[i], c.token_dim[i]), max(1, round(c.levels[j - 1] * c.image_size))
                    if coupling[i] and c.target == "full" and side < c.image_size // p:
                        white = couple_noise(white, draw(side ** 2, c.token_dim[i]), side, coupling[i])
                    S = 2 * B if guide[i] != 1 else B                           # no second half in the head where guidance is 1
                    network, noise = self.guided(z[:S], i, cond[:S], guide[i]), lambda white: self.band(white, i) / self.noise_scale[i]
                    tokens = self.head.path.sample(network, noise(white), steps[i], c.solver, temperature[i], lambda x: noise(draw(*x.shape[1:])))
                    xhat = self.data_scale[i] * unpatchify(tokens, p, c.channels) + (x if c.target == "residual" else 0)
                    x = self.project(xhat, j) + (x - self.project(xhat, i) if c.step_rule == "locked" else 0)
                outputs.append(x)
        finally:
            self.train(training)
        return torch.stack(outputs, 1) if return_levels else x
