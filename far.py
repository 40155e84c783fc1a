"""FAR: Frequency Autoregressive Image Generation with Continuous Tokens, in one file.

The method of Yu et al., arXiv 2503.05305 (2025), "the paper" below. An image is generated from low
to high frequencies, one frequency level per step:

    x = zeros                                     # x_0 shows nothing
    for i in range(F):
        z = transformer(tokens of x_0, .., x_i)   # one vector per token of x_i
        image = head(noise, z)                    # a small diffusion network draws the whole image
        x = low_pass(image, keep[i + 1])          # x_{i+1}: a little sharper than x_i

x_F is the image. Nothing of x_i is copied: x_{i+1} comes from the new image, whose low frequencies
the head draws again, knowing x_i. Why draw the whole image when only its lowest frequencies are
kept? Every level then learns the same target: easier for one small head than a thin band of
frequencies, another one at each level (section 4.2; the setting target="residual" learns bands).

The default settings are the method with modern parts: `dct` as low-pass filter, a head whose tokens
see each other, velocity prediction on a linear path, a second-order solver. The paper's own are
FARConfig.preset(name, paper=True). "Beyond the paper" marks what this file adds. In the presets
`digits` and `far_*` the transformer reads x_0 .. x_i ("causal"), in the others x_i alone ("markov",
as in the published code), which trains several times faster.

An example with shapes, the preset "digits": images of 8 x 8 pixels, patches of 4 x 4 pixels and
F = 3 levels that keep the lowest 2 x 2, 4 x 4 and 8 x 8 frequencies of `dct`.

    training, all levels at once (`FAR.losses`)
        images                                    [B, 1, 8, 8]
        visible: x_0, x_1, x_2 as tokens          [B, 3, 4, 16]    4 tokens of 16 numbers per level
        sequence: class, x_0, x_1, x_2            [B, 1 + 3 * 4, W]
        z_0, z_1, z_2                             [B, 3, 4, W]
        target: the image, three times            [B, 3, 4, 16]
        diffusion loss of every level             [B, 3]
    sampling, one level after the other (`FAR.sample`)
        level 0 reads x_0 = 0,        draws an image, keeps its lowest 2 x 2 frequencies: x_1
        level 1 reads x_0, x_1,       draws an image, keeps its lowest 4 x 4 frequencies: x_2
        level 2 reads x_0, x_1, x_2,  draws an image: x_3, the sample
        calls: 3 of the transformer, 3 x 24 (`head_steps`) of the head. With guidance each image is
        in a batch twice, with and without its label; at levels of guidance 1, by default level 0,
        the head is called with the label alone.

Letters, those of the paper where it has one:

    x, x_i      an image [B, C, H, H]; the same, low-passed to keep_i
    i, F        a level, i = 0 .. F-1: the step from x_i to x_{i+1}; their number
    keep_i      the share of its bandwidth that x_i shows: keep_0 = 0, keep_{i+1} = levels[i]
    P_i         the low-pass filter of keep_i, x_i = P_i x
    p, N, D     side of a patch; N = (H/p)^2 tokens per image, of D = C p^2 numbers each
    z_i         the output of the transformer after reading x_0 .. x_i, [B, N, W]
    W, w        width of the transformer; of the head
    K           tokens of the condition (a class or a text), in front of all levels
    L           levels that an image trains in one step: all F, unless attention is "markov"
    S, T        items in a batch, such as the levels of all images; tokens of a sequence
    t           time of the diffusion, from 0 (data) to 1 (noise): x_t = alpha_t x + sigma_t eps

Where to start: `dct` (what does a level show?), `FAR.losses`, `FAR.sample`; then from the top the
parts that they call. The settings, and the checks at the end, can be skipped.
"""

import contextlib
import functools
import math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
from torch.nn.functional import avg_pool2d, interpolate, pad, scaled_dot_product_attention, silu
from torch.optim.swa_utils import get_ema_multi_avg_fn


def check(ok, message):
    if not ok:
        raise ValueError(message)


# ==== Orderings (paper: section 4.1, appendix G): x_i = P_i x
# A generation order is a chain of nested projections from nothing to the whole image: P_i is
# linear, P_i P_j = P_min(i,j), P_0 = 0, P_F = identity. In code it is a function ordering(x, keep),
# x [B, C, H, H] -> [B, C, H, H], keep in [0, 1]. A new one goes into ORDERINGS, and the setting
# `ordering` names it; `check_ordering` says whether it keeps the laws.
def exact_ends(ordering):
    """Makes keep 0 give zeros and keep 1 the image itself, without rounding errors."""

    @functools.wraps(ordering)
    def with_exact_ends(x, keep):
        if keep <= 0:
            return torch.zeros_like(x)
        if keep >= 1:
            return x
        return ordering(x, keep)

    return with_exact_ends


@exact_ends
def fourier(x, keep):
    """The paper's ideal low-pass filter: keeps the frequencies |f_x|, |f_y| <= keep H/2.

    Frequencies are in whole cycles per image.
    """
    H = x.shape[-1]
    f = torch.fft.fftfreq(H, 1 / H, device=x.device).abs()  # 0, 1, .., H/2, .., 1
    low = f <= keep * H / 2 + 1e-6
    return torch.fft.ifft2(torch.fft.fft2(x) * (low[:, None] & low)).real


@exact_ends
def dct(x, keep):
    """Low-pass in the orthonormal 2-D DCT-II: keeps coefficients with both indices < keep H.

    Like fourier, but nothing wraps around at the borders.
    """
    H = x.shape[-1]
    n = torch.arange(H, device=x.device, dtype=x.dtype)
    # Row k: the cosine of frequency k.
    basis = torch.cos(math.pi / H * (n + 0.5) * n[:, None]) * math.sqrt(2 / H)
    basis[0] /= math.sqrt(2)
    low = basis[: math.ceil(keep * H - 1e-6)]
    P = low.T @ low  # [H, H], the projection of one axis
    return P @ x @ P


@exact_ends
def resize(x, keep):
    """Area down-sampling to k x k, k = round(keep H), and bicubic up-sampling (appendix G).

    What the published code runs; nearly a projection.
    """
    k = max(1, round(keep * x.shape[-1]))
    small = interpolate(x, size=(k, k), mode="area")
    return interpolate(small, size=x.shape[-2:], mode="bicubic")


# Beyond the paper: other orders, to compare with.
@exact_ends
def haar(x, keep):
    """Haar wavelets, coarse first: means of s x s pixels, s the least power of 2 >= 1/keep.

    On the way to means of s/2 pixels, details across, down and diagonal are added, one at each
    third. ValueError if s does not divide H.
    """
    s = 2 ** math.ceil(-math.log2(keep) - 1e-6)
    H = x.shape[-1]
    check(H % s == 0, f"haar: side {H} is not divisible by {s}, the block side at keep {keep:g}")

    def means(height, width):
        pooled = avg_pool2d(x, (height, width))
        return pooled.repeat_interleave(height, 2).repeat_interleave(width, 3)

    details = int(3 * (keep * s - 1) + 1e-6)  # 0: none, 1: across, 2: across and down
    if details == 0:
        return means(s, s)
    if details == 1:
        return means(s, s // 2)
    return means(s, s // 2) + means(s // 2, s) - means(s, s)


@exact_ends
def raster(x, keep):
    """The first ceil(keep H) rows of pixels: the classic reading order.

    One row per step, for the 8 rows of a digit: FARConfig.preset("digits", ordering="raster",
    levels=[k / 8 for k in range(1, 9)], step_rule="locked"); not locked, rows are drawn again.
    """
    H = x.shape[-1]
    row = torch.arange(H, device=x.device)
    return x * (row < keep * H - 1e-6)[:, None]


@exact_ends
def shuffle(x, keep):
    """The first share keep of an 8 x 8 grid of cells in a random order, here one for all images."""
    H = x.shape[-1]
    rank = torch.tensor(SHUFFLED, device=x.device).view(8, 8)
    cell = torch.arange(H, device=x.device) * 8 // H  # of each row and column
    return x * (rank[cell[:, None], cell] < keep * 64 - 1e-6)


SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()


ORDERINGS = {f.__name__: f for f in (fourier, dct, resize, haar, raster, shuffle)}


# ==== Settings
# The paper's 10 steps: on its 16 x 16 tokens, squares of 2 x 2, 3 x 3, .., 10 x 10, then the whole.
PAPER_LEVELS = tuple(side / 16 for side in (2, 3, 4, 5, 6, 7, 8, 9, 10, 16))

# ImageNet at 256 x 256: latents of a VAE, 16 x 16 with 16 channels, one token each.
LATENTS = dict(
    image_size=16,
    channels=16,
    patch_size=1,
    num_classes=1000,
    levels=PAPER_LEVELS,
    ordering="resize",
    cond_tokens=64,
    attention="causal",
    heads=16,
    dropout=0.1,
    head_mixing=False,
    head_width=1024,
    head_draws=4,
)

PRESETS = {
    "digits": dict(
        image_size=8,
        channels=1,
        levels=(0.25, 0.5, 1.0),
        attention="causal",
        width=128,
        depth=4,
        head_width=128,
        head_steps=24,
    ),
    "cifar": dict(),  # the defaults of FARConfig
    # Trains in an evening on two CPU cores. Head steps and temperature were chosen for the weights
    # in assets, which have a guidance of their own: experiments/results.md.
    "cifar_laptop": dict(
        levels=(0.25, 0.5, 1.0),
        width=192,
        depth=4,
        head_width=192,
        head_depth=3,
        guidance=3.0,
        guidance_schedule="constant",
        head_steps=10,
        temperature=1.05,
    ),
    # Digits with captions, in half an hour on two CPU cores: experiments/scenes.py.
    "scenes": dict(
        image_size=24,
        patch_size=6,
        num_classes=0,
        levels=(0.125, 1.0),  # first where there are digits, then which
        width=192,
        depth=2,
        head_width=192,
        head_depth=6,
        # Where digits are, and which, is decided while nearly all is noise.
        time_shift=6.0,
        loss_weighting=False,
        guidance=2.0,
        guidance_schedule="constant",
        head_steps=24,
    ),
    "imagenet64": dict(
        image_size=64,
        num_classes=1000,
        cond_tokens=4,
        width=768,
        depth=16,
        heads=12,
        head_width=768,
        head_depth=4,
    ),
    # The sizes of the paper's models; with paper=True its recipe too. The paper says 6, 3 and 3
    # blocks in the head; its total for FAR-L fits 8.
    "far_b": dict(LATENTS, width=768, depth=24, heads=12, head_depth=6),
    "far_l": dict(LATENTS, width=1024, depth=32, head_depth=8),
    "far_h": dict(LATENTS, width=1280, depth=40, head_depth=3),
    # The paper's model for texts: 300 tokens of a frozen encoder of width 1536. In the published
    # code the blocks read them by cross-attention; here they stand in front of all levels.
    "far_t2i": dict(
        LATENTS,
        num_classes=0,
        cond_tokens=300,
        cond_dim=1536,
        width=1024,
        depth=32,
        head_depth=3,
        mask=True,
    ),
    # Beyond the paper, with weights in assets: a deep head of its own kind draws first the lowest
    # 8 x 8 frequencies, then what is left. A cascade of two diffusion transformers.
    "cifar_cascade": dict(
        levels=(0.25, 1.0),
        cond_tokens=0,
        depth=1,
        head_depth=8,
        time_shift=[0.35, 2.5],
        target="residual",
        loss_weighting=False,
        head_steps=8,
    ),
}


def paper_recipe(image_size, ordering, levels=None):
    """The paper's recipe as settings, for FARConfig.preset(name, paper=True).

    But for two choices that were measured (experiments/results.md): no masks, which cost precision
    (a preset that has them keeps them), and the larger variance of DDPM, where the published code
    learns one in between.
    """
    # Refuses what is impossible.
    FARConfig(image_size=image_size, patch_size=1, ordering=ordering, levels=levels or (1,))
    if levels is None:
        levels = PAPER_LEVELS
        if image_size < 16:  # it has fewer frequencies than the paper has levels
            levels = (0.25, 0.5, 0.75, 1.0)
        levels = distinct_levels(levels, ORDERINGS[ordering], image_size)
    F = len(levels)
    return dict(
        levels=levels,
        attention="causal",
        head_mixing=False,
        head_draws=4,
        prediction="eps",
        schedule="cosine",
        time_shift=1.0,
        target="full",
        loss_weighting=True,
        guidance_schedule="linear",
        head_steps=head_step_schedule(F),
        solver="ddpm",
        variance=1.0,
        temperature=rising(0.8, 1.0, F),
    )


CHOICES = {
    "ordering": ORDERINGS,
    "attention": ("causal", "markov"),
    "prediction": ("v", "eps"),
    "schedule": ("linear", "cosine"),
    "target": ("full", "next", "residual"),
    "guidance_schedule": ("linear", "constant"),
    "solver": ("ddpm", "ddim", "dpmpp_2m"),
    "step_rule": ("paper", "locked"),
}


@dataclass
class FARConfig:
    """All settings of a model; the defaults are the preset "cifar". ValueError on impossible ones.

    "Per level" means one number, or a list of F; `level_guidance` and so on are the lists.
    """

    # Images and tokens.
    image_size: int = 32  # H
    channels: int = 3  # C
    patch_size: int = 4  # p
    # Levels: keep_1 < .. < keep_F = 1, and how to low-pass, a name in ORDERINGS.
    levels: tuple = (0.125, 0.25, 0.5, 1.0)
    ordering: str = "dct"
    # Condition: a class, or with cond_dim > 0 a text: embeddings [B, K, cond_dim] of its words.
    num_classes: int = 10  # 0: none
    cond_tokens: int = 1  # K
    cond_dim: int = 0
    label_dropout: float = 0.1  # share of labels dropped in training, for guidance
    # Transformer. causal: level i sees x_0 .. x_i. markov: x_i alone, as in the published code.
    # Levels are then separate sequences, so that an image can train one at the price of one. Little
    # is lost: x_i shows what x_0 .. x_{i-1} show; in sampling these are earlier drafts.
    attention: str = "markov"
    levels_per_image: int = 1  # L with markov; 0: all, as always with causal
    width: int = 256  # W
    depth: int = 8
    heads: int = 4  # attention heads, also of a mixing head
    dropout: float = 0.0
    # Diffusion head.
    head_mixing: bool = True  # beyond the paper: the tokens of a level attend to each other
    head_width: int = 256  # w
    head_depth: int = 2
    head_draws: int = 1  # noise draws per token and pass of the transformer in training
    prediction: str = "v"  # v: velocity. eps: noise, as in the paper
    schedule: str = "linear"  # path from data to noise; cosine in the paper
    time_shift: float | list = 1.0  # per level, beyond the paper: factor on t/(1 - t) in training
    # Training. What the head learns: full, p(x | x_i), the paper's. For comparison, next:
    # p(x_{i+1} | x_i); residual: p(x_{i+1} - x_i | x_i).
    target: str = "full"
    loss_weighting: bool = True
    mask: bool = False  # hide a part of the visible tokens, in training and in sampling
    # Sampling.
    guidance: float | list = 1.0  # per level: g in `FAR.guided`; 1 is none
    # Where guidance is one number g. linear: 1 + (g - 1) i/F at level i, none at level 0 and less
    # than g at the last; constant: g at all levels.
    guidance_schedule: str = "linear"
    head_steps: int | list = 12  # per level: steps of the solver
    # ddpm: the paper's, ancestral. Beyond the paper: ddim; dpmpp_2m, of second order.
    solver: str = "dpmpp_2m"
    variance: float = 0.0  # of ddpm: 0 the smaller of the two variances of DDPM, 1 the larger
    temperature: float | list = 1.0  # per level: factor on the noise
    # paper: x_{i+1} = P_{i+1} xhat, so that what x_i shows is drawn again. Beyond the paper,
    # locked: it stays, x_{i+1} = x_i + P_{i+1} xhat - P_i xhat.
    step_rule: str = "paper"

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, plain(getattr(self, f.name)))
        check_config(self)
        self.levels = tuple(map(float, self.levels))
        F = len(self.levels)
        # Not settings, but what follows from them.
        self.grid = self.image_size // self.patch_size  # tokens along a side
        self.num_tokens = self.grid**2  # N
        self.token_dim = self.channels * self.patch_size**2  # D
        self.level_guidance = per_level(self.guidance, F, "guidance")
        if self.guidance_schedule == "linear" and not isinstance(self.guidance, list):
            self.level_guidance = [1 + (self.guidance - 1) * i / F for i in range(F)]
        self.level_head_steps = per_level(self.head_steps, F, "head_steps", least=1, kinds=(int,))
        self.level_temperature = per_level(self.temperature, F, "temperature")
        self.level_time_shift = per_level(self.time_shift, F, "time_shift", least=0.001)

    @classmethod
    def preset(cls, name, paper=False, **overrides):
        """The settings of PRESETS[name], with paper=True `paper_recipe` on top; overrides win."""
        check(name in PRESETS, f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
        settings = dict(PRESETS[name])
        if "levels" in overrides and isinstance(settings.get("time_shift"), list):
            del settings["time_shift"]  # it is for the levels of the preset
        if paper:
            check(name != "cifar_cascade", "cifar_cascade is no FAR; paper=True needs another")
            size = {**settings, **overrides}.get("image_size", cls.image_size)
            ordering = {**settings, **overrides}.get("ordering", cls.ordering)
            settings.update(paper_recipe(size, ordering, overrides.get("levels")))
        return cls.from_dict({**settings, **overrides})

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, settings):
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        check(not unknown, f"unknown settings {unknown}; allowed: {', '.join(known)}")
        return cls(**settings)


# ==== Tokens (paper: section 4.2, continuous tokens): patches of pixels or latents, not quantised
def patchify(x, p):
    """Image [B, C, H, H] -> tokens [B, N, D], row by row; a token is (channel, row, column).

    ValueError if the patch side p does not divide H.
    """
    B, C, height, width = x.shape
    fits = p >= 1 and height % p == 0 and width % p == 0
    check(fits, f"image sides {height} x {width} are not divisible by the patch side {p}")
    x = x.reshape(B, C, height // p, p, width // p, p)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/p, C, p, p]
    return x.reshape(B, -1, C * p * p)


def unpatchify(tokens, p, channels):
    """Tokens [B, N, D] -> square image [B, C, H, H]: the inverse of `patchify`.

    ValueError if N is no square number or D is not channels p^2.
    """
    B, N, D = tokens.shape
    G = math.isqrt(N)  # tokens along a side
    message = f"tokens of shape {[B, N, D]} are no square grid of patches {channels} x {p} x {p}"
    check(N == G * G and D == channels * p * p, message)
    x = tokens.reshape(B, G, G, channels, p, p)
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, C, G, p, G, p]
    return x.reshape(B, channels, G * p, G * p)


# ==== Frequency-aware schedules (paper: section 4.2): what changes from level to level
def block_causal_mask(num_levels, num_tokens, markov=False):
    """Which tokens see which, bool [F N, F N]: True where query (row) may attend to key (column).

    A token sees its own level and all earlier ones, level(q) >= level(k). With markov only its own;
    that is an illustration, `Transformer` makes a sequence of each level and needs no mask.
    """
    level = torch.arange(num_levels).repeat_interleave(num_tokens)
    if markov:
        return level[:, None] == level
    return level[:, None] >= level


def loss_weights(F):
    """Weights of the levels in the loss, [F], more for high frequencies: w_i = 1 + sin(pi/2 i/F).

    Here i = 1 .. F counts what is learned: entry i - 1 is for the step that ends at x_i.
    """
    i = torch.arange(1, F + 1)
    return 1 + torch.sin(math.pi / 2 * i / F)


def mask_bounds(F):
    """Least share of the tokens hidden in training, [F]: 0.7 (1 - i/F) at level i = 0 .. F-1."""
    return 0.7 * (1 - torch.arange(F) / F)


def masked_share(lower):
    """Shares from a Gaussian of mean 1 and deviation 0.25 cut off to [lower, 1], shaped like lower.

    Inverts the distribution function, which there runs from ndtr((lower - 1)/0.25) to 1/2.
    """
    low = torch.special.ndtr((lower - 1) / 0.25)
    return 1 + 0.25 * torch.special.ndtri(low + (0.5 - low) * torch.rand_like(lower))


def training_mask(lower, N):
    """Which of N visible tokens are hidden in training, bool [.., N]; lower [..]: `mask_bounds`."""
    share = masked_share(lower)[..., None]
    rank = torch.rand(*lower.shape, N, device=lower.device).argsort(-1)
    # share N tokens in the mean: one random number in [0, 1) rounds up or down.
    return rank + torch.rand_like(share) < share * N


def sampling_mask(rank, i, F):
    """Which visible tokens are hidden when level i is drawn: those of rank < N cos(pi/2 i/F).

    rank [B, N]: the numbers 0 .. N-1 in a random order per image, the same at all levels. All
    tokens are hidden at level 0, then fewer and fewer. A hidden token is not read, but drawn as all
    others are.
    """
    return rank < rank.shape[1] * math.cos(math.pi / 2 * i / F) - 1e-6


def rising(low, high, F):
    """F numbers that rise linearly from low to high; a single level has high."""
    if F == 1:
        return [high]
    return [low + (high - low) * i / (F - 1) for i in range(F)]


def head_step_schedule(F, low=40, high=100):
    """Steps of the head, list of F whole numbers: fewer for lower frequencies."""
    return [round(steps) for steps in rising(low, high, F)]


# ==== Transformer (paper: section 4.1, causal attention over frequency levels): z_i from x_0 .. x_i
def sincos_2d(G, W):
    """Position embeddings of a G x G grid, [G^2, W]: sines and cosines of row and column.

    W/4 frequencies each, from 1 down to nearly 1/100 radian per token.
    """
    frequencies = 100 ** (-torch.arange(W // 4) / (W // 4))
    angle = torch.arange(G)[:, None] * frequencies  # [G, W/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [G, W/2]
    row = axis.repeat_interleave(G, 0)
    column = axis.repeat(G, 1)
    return torch.cat([row, column], 1)


def label_embedding(c, width):
    """A layer that maps labels to vectors, [B, 1 or K, width].

    Labels are class indices [B, 1], num_classes for "no label", or embeddings [B, K, cond_dim].
    """
    if c.cond_dim:
        return nn.Linear(c.cond_dim, width)
    return nn.Embedding(c.num_classes + 1, width)


def is_word(labels):
    """Which condition tokens say something, bool [B, 1 or K]; rows of zeros are padding."""
    if labels.ndim == 2:  # classes
        return torch.ones_like(labels, dtype=torch.bool)
    return labels.ne(0).any(-1)


def mean_of_words(vectors, word):
    """Mean of vectors [B, 1 or K, width] over those where word [B, 1 or K], [B, 1, width]."""
    word = word[..., None].to(vectors.dtype)
    return (word * vectors).sum(1, keepdim=True) / word.sum(1, keepdim=True).clamp(min=1)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Attention(nn.Module):
    """Multi-head self-attention of S sequences of T tokens, [S, T, W] -> [S, T, W].

    qkv holds q, k and v in this order, W numbers each, of which head h has the h-th W/heads.
    dropout: share of the attention weights, in training alone.
    mask: bool [T, T] or one per sequence, [S, 1, T, T], True where query (row) may attend to key
    (column); None: everywhere. With a cache, its tokens are the first columns.
    cache: a dict that keeps the keys and values of earlier calls, "k" and "v", each [S, heads, T',
    W/heads]; queries see those and their own.
    """

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, cache=None):
        S, T, W = x.shape
        qkv = self.qkv(x).view(S, T, 3, self.heads, W // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [S, heads, T, W/heads]
        if cache is not None:
            if cache:
                k = torch.cat([cache["k"], k], 2)
                v = torch.cat([cache["v"], v], 2)
            cache.update(k=k, v=v)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(S, T, W))


class Block(nn.Module):
    """Pre-norm transformer block, [S, T, W] -> [S, T, W]."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """The autoregressive model over levels.

    Causal attention: one sequence [condition, x_0, x_1, .., x_{F-1}] of K + F N tokens, in which a
    level sees itself and what stands before it. The block of x_0 = 0 holds nothing but positions,
    level and condition. That suffices: x_1 depends on nothing else, but for the head's noise.
    Markov attention: a sequence [condition, x_i] per level. Texts differ in length: padding
    fills them up to K tokens, and no other token attends to it.
    """

    def __init__(self, c):
        super().__init__()
        F, K = len(c.levels), c.cond_tokens
        self.causal = c.attention == "causal"
        self.has_padding = c.cond_dim > 0
        self.label = label_embedding(c, c.width)
        self.condition_position = nn.Parameter(0.02 * torch.randn(K, c.width))
        self.input = nn.Linear(c.token_dim, c.width)
        self.position = nn.Parameter(sincos_2d(c.grid, c.width))  # learned from there
        self.level = nn.Embedding(F, c.width)
        if c.mask:
            self.mask_token = nn.Parameter(0.02 * torch.randn(c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.dropout) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        if self.causal:
            # All see the condition, which sees itself alone.
            mask = pad(block_causal_mask(F, c.num_tokens), (K, 0, K, 0), value=True)
            mask[:K, K:] = False
            self.register_buffer("attention_mask", mask, persistent=False)

    def embed(self, tokens, level, label, hidden=None):
        """Tokens [S, N, D] of x_i, i in level [S], label [S, 1, W] -> [S, N, W].

        hidden: bool [S, N], True where the mask token replaces the token.
        """
        h = self.input(tokens)
        if hidden is not None:
            h = torch.where(hidden[..., None], self.mask_token.to(h.dtype), h)
        # Beyond the paper: the condition is also added to every token, better in small models.
        return h + self.position + self.level(level)[:, None] + label

    def read_labels(self, labels):
        """Labels -> (condition tokens [B, K, W], their mean [B, 1, W], words as in `is_word`)."""
        vectors = self.label(labels)  # [B, 1 or K, W]
        word = is_word(labels)
        # K copies of a class, or the tokens of a text.
        return vectors + self.condition_position, mean_of_words(vectors, word), word

    def without_padding(self, mask, word, Q, T):
        """mask bool [Q, T], or None for True everywhere -> bool [S, 1, Q, T]: padding is not seen.

        word: bool [S, K], which of the first K of T keys are no padding. The Q queries are the last
        keys; each sees itself, so that no row of padding is empty.
        """
        keys = pad(word, (0, T - word.shape[1]), value=True)[:, None, None]  # [S, 1, 1, T]
        itself = torch.eye(T, dtype=torch.bool, device=word.device)[T - Q :]
        if mask is not None:
            keys = keys & mask
        return keys | itself

    def forward(self, tokens, level, labels, hidden=None):
        """Training, all levels at once: arguments as in `embed`, labels of B images -> z [S, N, W].

        The S = B L items are the levels of each image, with causal attention all F in order.
        """
        S, N, _ = tokens.shape
        condition, label, word = self.read_labels(labels)
        B, K, W = condition.shape
        h = self.embed(tokens, level, label.repeat_interleave(S // B, 0), hidden)
        if self.causal:
            h = h.view(B, -1, W)  # [B, F N, W]: all levels of an image are one sequence
            mask = self.attention_mask
        else:
            condition = condition.repeat_interleave(S // B, 0)
            word = word.repeat_interleave(S // B, 0)
            mask = None
        h = torch.cat([condition, h], 1)
        if self.has_padding:
            mask = self.without_padding(mask, word, h.shape[1], h.shape[1])
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h[:, K:]).reshape(S, N, W)

    def next_level(self, tokens, i, labels, cache, hidden=None):
        """Sampling, one level after the other: tokens [B, N, D] of x_i -> z_i [B, N, W].

        cache: a list of one dict per block, all empty before the first level, for the keys and
        values of condition and earlier levels (markov attention leaves it alone). That is exact:
        these never see a later level, so that their keys and values do not change.
        """
        B, N, _ = tokens.shape
        condition, label, word = self.read_labels(labels)
        h = self.embed(tokens, torch.full((B,), i, device=tokens.device), label, hidden)
        if not self.causal:
            cache = [None] * len(self.blocks)
        mask = None  # this level sees all that came before
        earlier = 0  # tokens in the cache
        if cache[0]:
            earlier = cache[0]["k"].shape[2]
        else:  # the first level, with markov attention every level
            h = torch.cat([condition, h], 1)  # [B, K + N, W]
            if self.causal:
                mask = self.attention_mask[: h.shape[1], : h.shape[1]]
        if self.has_padding:
            mask = self.without_padding(mask, word, h.shape[1], earlier + h.shape[1])
        for block, kept in zip(self.blocks, cache, strict=True):
            h = block(h, mask, kept)
        return self.norm(h[:, -N:])


# ==== Gaussian path (paper: section 4.2, diffusion loss): x_t = alpha_t x + sigma_t eps
class Path:
    """Noise schedule, prediction type and samplers.

    schedule "linear": alpha = 1 - t, sigma = t (flow matching). "cosine": Nichol & Dhariwal 2021,
    the limit of many steps: alpha^2 = f(t)/f(0), f(t) = cos^2(pi/2 (t + 0.008)/1.008).

    The network predicts a x + b eps. prediction "eps": the noise, a = 0, b = 1. "v": the velocity,
    the derivative of x_t by t (linear: a = -1, b = 1) or by the angle (cosine: a = -sigma,
    b = alpha).
    """

    def __init__(self, schedule, prediction):
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, t):
        """Times t -> (alpha, sigma, a, b), all like t."""
        one = torch.ones_like(t)
        if self.schedule == "linear":
            alpha, sigma = 1 - t, t
            a, b = -one, one
        else:
            alpha = torch.cos(math.pi / 2 * (t + 0.008) / 1.008)
            alpha = alpha / math.cos(math.pi / 2 * 0.008 / 1.008)
            sigma = (1 - alpha**2).clamp(min=0).sqrt()
            a, b = -sigma, alpha
        if self.prediction == "eps":
            a, b = 0 * one, one
        return alpha, sigma, a, b

    def draw_t(self, *shape, device=None):
        """Training times: linear logit-normal (Esser et al. 2024), cosine uniform."""
        if self.schedule == "linear":
            return torch.randn(shape, device=device).sigmoid()
        return torch.rand(shape, device=device)

    def noise(self, x, eps, t):
        """x, eps of one shape, t that broadcasts -> (x_t, what the network should predict)."""
        alpha, sigma, a, b = self(t)
        return alpha * x + sigma * eps, a * x + b * eps

    def denoise(self, x_t, prediction, t):
        """The data x that a prediction at x_t stands for."""
        alpha, sigma, a, b = self(t)
        return (b * x_t - sigma * prediction) / (alpha * b - sigma * a)

    def times(self, steps, solver):
        """The times of the sampler, [steps + 1], evenly from noise to data (0)."""
        first = 0.999  # not 1: nothing of the data is left there, log(alpha / sigma) is infinite
        if self.prediction == "eps" and solver != "ddpm":
            # xhat = (x_t - sigma eps)/alpha, and a deterministic solver never forgets the error of
            # its first step, which 1/alpha multiplies: start where alpha is at least 0.05.
            first = 0.95
        return torch.linspace(first, 0, steps + 1)  # on the CPU: no step waits for a GPU

    def step(self, x_t, x_hat, t, s, ancestral, variance=0.0):
        """One step x_t -> x_s, s < t, given the predicted data x_hat: (mean of x_s, deviation).

        The mean is alpha_s x_hat + sqrt(sigma_s^2 - smaller) eps_hat. Deterministic (DDIM): smaller
        is 0, and so is the deviation. Ancestral (DDPM): smaller is the variance of x_s given x_t
        and x, the smaller of DDPM's two; `variance` moves the squared deviation from there (0) to
        the larger, the variance of x_t given x_s (1).
        """
        alpha, sigma, _, _ = self(t)
        alpha_s, sigma_s, _, _ = self(s)
        larger = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).clamp(min=0) * ancestral
        smaller = (sigma_s / sigma) ** 2 * larger
        eps_hat = (x_t - alpha * x_hat) / sigma
        mean = alpha_s * x_hat + (sigma_s**2 - smaller).clamp(min=0).sqrt() * eps_hat
        return mean, (smaller + variance * (larger - smaller)).sqrt()

    def sample(self, network, noise, draw, steps, solver="dpmpp_2m", temperature=1.0, variance=0.0):
        """Integrates from noise to data in steps >= 1 calls of network(x_t, t) -> prediction.

        noise: normal, any shape; draw(): more of it, for ddpm. t: a tensor without dimensions, of
        `times`; the last step ends at t = 0, at x_hat itself. solver: ddpm and ddim are `step`;
        dpmpp_2m (Lu et al. 2022, second order) is the ddim step with x_hat extrapolated from the
        last two, but for the first and the last step. temperature >= 0 scales the noise: that of
        the steps (ddpm, as in the published code) or that of the start. Returns data like noise.
        """
        ancestral = solver == "ddpm"
        times = self.times(steps, solver)
        alpha, sigma, _, _ = self(times)
        log_ratio = torch.log(alpha / sigma)  # of signal to noise
        x = noise
        if times[0] < 0.99:  # at 0.999 sigma is nearly 1
            x = sigma[0] * x
        if not ancestral:
            x = temperature * x
        last = None
        for n in range(steps):
            t, s = times[n], times[n + 1]
            x_hat = self.denoise(x, network(x, t), t)
            ahead = x_hat
            if solver == "dpmpp_2m" and 0 < n < steps - 1:
                before = log_ratio[n] - log_ratio[n - 1]
                after = log_ratio[n + 1] - log_ratio[n]
                ahead = x_hat + after / before / 2 * (x_hat - last)
            last = x_hat
            x, deviation = self.step(x, ahead, t, s, ancestral, variance)
            if ancestral and n < steps - 1:  # the last step adds no noise
                x = x + temperature * deviation * draw()
        return x


# ==== Diffusion head (paper: section 4.2): p(tokens | z), one small network for all levels
def zero_init(linear):
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class HeadBlock(nn.Module):
    """AdaLN-Zero residual block of MAR (Li et al. 2024): h [S, N, w], steer [S, N, w] -> [S, N, w].

    steer gives shift, scale and gate, in this order. They start at zero, which makes the block the
    identity.
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = zero_init(nn.Linear(width, 3 * width))

    def forward(self, h, steer):
        shift, scale, gate = self.modulation(silu(steer)).chunk(3, -1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """The paper's head: denoises every token by itself, given its z, the level and the time t."""

    def __init__(self, c):
        super().__init__()
        w = c.head_width
        self.path = Path(c.schedule, c.prediction)
        self.input = nn.Linear(c.token_dim, w)
        self.z = nn.Linear(c.width, w)
        self.level = nn.Embedding(len(c.levels), w)
        self.time = nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        self.blocks = nn.ModuleList(self.block(c) for _ in range(c.head_depth))
        self.norm = nn.LayerNorm(w, elementwise_affine=False)
        self.modulation = zero_init(nn.Linear(w, 2 * w))
        self.output = zero_init(nn.Linear(w, c.token_dim))
        frequencies = 1000 * 10000 ** (-torch.arange(32) / 32)  # as for t in 0 .. 1000
        self.register_buffer("frequencies", frequencies, persistent=False)
        time_shift = torch.tensor(c.level_time_shift, dtype=torch.float32)
        self.register_buffer("time_shift", time_shift, persistent=False)

    def block(self, c):
        return HeadBlock(c.head_width)

    def read(self, z, level, labels):
        """z [S, N, W], level [S], labels as in `label_embedding` -> (added, steer).

        steer [S, N, w] modulates the blocks; added is summed onto the noisy tokens (here it is 0).
        Neither depends on the time: computed once per level, not once per step of the sampler.
        """
        return 0.0, self.z(z) + self.level(level)[:, None]

    def forward(self, x_t, t, added, steer):
        """Noisy tokens x_t [S, N, D], times t [S, 1 or N], from `read` -> prediction [S, N, D]."""
        angle = t[..., None] * self.frequencies
        steer = steer + self.time(torch.cat([angle.cos(), angle.sin()], -1))
        h = self.input(x_t) + added
        for block in self.blocks:
            h = block(h, steer)
        shift, scale = self.modulation(silu(steer)).chunk(2, -1)
        return self.output(self.norm(h) * (1 + scale) + shift).float()

    def loss(self, target, noise, z, level, labels, cut):
        """Diffusion loss [S] of tokens target [S, N, D], given z [S, N, W] of level [S].

        noise: normal, [S, N, D]. cut(prediction) removes what a level does not draw (target full:
        nothing).
        """
        added, steer = self.read(z, level, labels)
        # One for each row of steer: a time per token, or where they are denoised together for all.
        t = self.path.draw_t(*steer.shape[:2], device=z.device)
        # Beyond the paper: time_shift above 1 trains a level on more noise.
        t = t / (t + (1 - t) / self.time_shift[level][:, None])
        x_t, wanted = self.path.noise(target, noise, t[..., None])
        error = cut(self(x_t, t, added, steer)) - wanted
        return error.square().mean((1, 2))


class MixingBlock(nn.Module):
    """A block of DiT (Peebles & Xie 2023): HeadBlock with attention over the N tokens before it.

    steer [S, N or 1, w] gives shift, scale and gate of the attention, then those of the mlp.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = mlp(width)
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, h, steer):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu(steer)).chunk(6, -1)
        h = h + gate1 * self.attention(self.norm(h) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)


class MixingHead(DiffusionHead):
    """Beyond the paper: the tokens of a level are denoised together, at one time t.

    z_i follows from the condition and x_0 .. x_i, so that the paper's head, given z_i, draws tokens
    that know nothing of each other; at level 0 they share no more than the class. Here the tokens
    attend to each other and have positions, and the label and the mean of z steer all of them.
    """

    def __init__(self, c):
        super().__init__(c)
        self.label = label_embedding(c, c.head_width)
        self.position = nn.Parameter(sincos_2d(c.grid, c.head_width))

    def block(self, c):
        return MixingBlock(c.head_width, c.heads)

    def read(self, z, level, labels):
        z = self.z(z)
        label = mean_of_words(self.label(labels), is_word(labels))
        steer = z.mean(1, keepdim=True) + self.level(level)[:, None] + label  # [S, 1, w]
        return z + self.position.to(z.dtype), steer


# ==== FAR (paper: section 4): the loss and the generation loop
class FAR(nn.Module):
    """Frequency autoregressive model.

    Images [B, C, H, H]: float32 in about [-1, 1] (or latents of unit variance), or uint8 [0, 255].
    Labels: int64 [B] in [0, num_classes); or float [B, K, cond_dim], of which rows of zeros are
    padding; or None. ValueError on others.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        self.F = len(c.levels)
        self.transformer = Transformer(c)
        self.head = MixingHead(c) if c.head_mixing else DiffusionHead(c)
        if c.cond_dim:
            self.no_label = nn.Parameter(torch.randn(1, c.cond_tokens, c.cond_dim))
        weights = loss_weights(self.F) if c.loss_weighting else torch.ones(self.F)
        self.register_buffer("loss_weights", weights, persistent=False)
        self.register_buffer("mask_bounds", mask_bounds(self.F), persistent=False)
        # Beyond the paper, per level: scale of what is learned and of its noise, see `set_units`.
        self.register_buffer("unit", torch.ones(self.F))
        self.register_buffer("noise_unit", torch.ones(self.F))

    @property
    def device(self):
        return self.unit.device

    # ---- Training ----

    def forward(self, images, labels=None):
        """Training loss, a scalar: the mean over levels of their weight times diffusion loss."""
        x = read_images(self, images)
        level = self.levels_to_train(len(x))  # [B, L]
        losses = self.losses(x, labels, level)  # [B, L]
        return (self.loss_weights[level] * losses).mean()

    def level_losses(self, images, labels=None):
        """Diffusion loss of each step x_i -> x_{i+1}, [F], the mean over images; unweighted."""
        x = read_images(self, images)
        level = torch.arange(self.F, device=self.device).expand(len(x), -1)
        return self.losses(x, labels, level).mean(0)

    def losses(self, x, labels, level):
        """Diffusion loss of each image x [B, C, H, H], float32, at level [B, L] -> [B, L]."""
        labels = self.drop_labels(read_labels(self, labels, len(x)))
        c = self.config
        B, L = level.shape

        # Teacher forcing: level i reads the true image, low-passed to keep_i, a part of it hidden.
        visible = self.at_levels(self.low_pass, x, level).flatten(0, 1)  # [B L, C, H, H]
        level = level.flatten()
        hidden = None
        if c.mask:
            hidden = training_mask(self.mask_bounds[level], c.num_tokens)
        z = self.transformer(patchify(visible, c.patch_size), level, labels, hidden)

        # Whatever its level sees, the head learns the whole image (target full), unmasked. Every
        # token is drawn head_draws times per pass of the transformer: [B L, ..] becomes [S, ..].
        target = patchify(x, c.patch_size).repeat_interleave(L * c.head_draws, 0)
        labels = labels.repeat_interleave(L * c.head_draws, 0)
        level = level.repeat_interleave(c.head_draws)
        z = z.repeat_interleave(c.head_draws, 0)
        target = self.cut(target, level) / self.unit[level][:, None, None]
        noise = self.noise(torch.randn_like(target), level)
        cut = functools.partial(self.cut, level=level)
        losses = self.head.loss(target, noise, z, level, labels, cut)
        return losses.view(B, L, c.head_draws).mean(2)

    def levels_to_train(self, B):
        """The levels that each of B images trains, [B, L]."""
        L = self.config.levels_per_image
        if self.transformer.causal or L == 0:
            return torch.arange(self.F, device=self.device).expand(B, -1)
        # Image b trains the L levels from first + b L on, cyclically: all levels equally often.
        first = torch.randint(self.F, (1,), device=self.device)
        return (first + torch.arange(B * L, device=self.device).view(B, L)) % self.F

    @torch.no_grad()
    def average(self, model, decay):
        """Moving average of weights: self becomes decay self + (1 - decay) model; units are copied.
        Training keeps one, and samples are drawn from it."""
        update = get_ema_multi_avg_fn(decay)
        update(list(self.parameters()), list(model.parameters()), None)
        self.unit.copy_(model.unit)
        self.noise_unit.copy_(model.noise_unit)

    # ---- Generation ----

    @torch.no_grad()
    def sample(
        self, labels, *, start=None, levels=None, generator=None, return_levels=False, **settings
    ):
        """Draws images from blur to detail.

        labels: a tensor as for the class FAR, or an int n for n images without label or guidance.
        generator: a torch.Generator, or a list of one per image. settings: those of FARConfig named
        in SAMPLING; the default is the config's value. levels: some of the config's, 1 among them:
        draws these alone, each with the settings of the x_i it starts from (the paper's inference
        scaling; for target full and attention markov). Beyond the paper, start: (x, i), what images
        x [B or 1, C, H, H] show at level i < F is given.

        Returns images [B, C, H, H] in about [-1, 1]; with return_levels [B, F, C, H, H], x_1 ..
        x_F (or those of `levels`). ValueError on bad arguments.
        """
        c = sampling_config(self, settings)
        steps = sampling_steps(self, levels)
        B, labels, guided = sampling_labels(self, labels)
        given, first = sampling_start(self, start, B, steps)
        draw = noise_source(generator, B, self.device)
        if guided and any(c.level_guidance[i] != 1 for i, _ in steps):
            labels = torch.cat([labels, self.no_labels(B)])  # B with labels, then B without
        copies = len(labels) // B
        cache = [{} for _ in self.transformer.blocks]
        hidden = None
        if c.mask:
            rank = draw(c.num_tokens).argsort(-1)  # [B, N]

        x = torch.zeros(B, c.channels, c.image_size, c.image_size, device=self.device)  # x_0
        shown = []
        with eval_mode(self):
            for i, j in steps:  # from x_i to x_j; j = i + 1, unless levels are left out
                if c.mask:
                    hidden = sampling_mask(rank, i, self.F).repeat(copies, 1)
                tokens = patchify(x, c.patch_size).repeat(copies, 1, 1)
                z = self.transformer.next_level(tokens, i, labels, cache, hidden)
                if i < first:
                    x = self.low_pass(given, j)  # given: read, not drawn
                else:
                    x_hat = self.draw_image(x, z, i, labels, draw, c)
                    # Lost: what xhat has above keep_j, and what x_i showed where xhat differs.
                    kept = 0
                    if c.step_rule == "locked":
                        kept = x - self.low_pass(x_hat, i)
                    x = self.low_pass(x_hat, j) + kept
                shown.append(x)
        if return_levels:
            return torch.stack(shown, 1)
        return x

    def draw_image(self, x, z, i, labels, draw, c):
        """The head draws xhat [B, C, H, H] at level i, given x_i, z_i and labels.

        z [S, N, W] and labels [S, ..]: B with labels, and for guidance B without after them.
        """
        B = len(x)
        guidance = c.level_guidance[i]
        if guidance == 1:
            z, labels = z[:B], labels[:B]

        def new_noise():
            level = torch.full((B,), i, device=x.device)
            return self.noise(draw(c.num_tokens, c.token_dim), level)

        network = self.guided(z, i, labels, guidance)
        tokens = self.head.path.sample(
            network,
            noise=new_noise(),
            draw=new_noise,
            steps=c.level_head_steps[i],
            solver=c.solver,
            temperature=c.level_temperature[i],
            variance=c.variance,
        )
        drawn = self.unit[i] * unpatchify(tokens, c.patch_size, c.channels)
        if c.target == "residual":
            return x + drawn
        return drawn

    def guided(self, z, i, labels, guidance):
        """What the sampler of level i integrates: network(x_t, t) -> prediction, both [B, N, D].

        t: a tensor without dimensions. Without guidance (1), z [B, N, W] and labels [B, ..] give
        the prediction. Otherwise they are [2 B, ..], the first half with labels, the second
        without, and it is without + guidance (with - without). Both halves see the same x_t.
        """
        S = len(z)
        level = torch.full((S,), i, device=z.device)
        added, steer = self.head.read(z, level, labels)

        def network(x_t, t):
            B = len(x_t)
            times = torch.full((S, 1), float(t), device=z.device)
            prediction = self.head(x_t.repeat(S // B, 1, 1), times, added, steer)
            if S > B:
                with_label, without = prediction.chunk(2)
                prediction = without + guidance * (with_label - without)
            return self.cut(prediction, level[:B])

        return network

    # ---- What a level shows, and what it draws ----

    def low_pass(self, x, i):
        """x_i = P_i x, in float32: what is left of images x [B, C, H, H], i = 0 .. F."""
        keep = (0.0, *self.config.levels)[i]
        ordering = ORDERINGS[self.config.ordering]
        with torch.autocast(x.device.type, enabled=False):
            return ordering(x.to(torch.float32, copy=True), keep).float()  # it may write into x

    def target(self, x, i):
        """What level i draws of images x [B, C, H, H], a linear map of them.

        A new target is a new line here and a name in CHOICES. If what is drawn does not show x_i,
        `draw_image` has to add it, and `set_units` to measure its deviation.
        """
        if self.config.target == "next":
            return self.low_pass(x, i + 1)
        if self.config.target == "residual":
            return self.low_pass(x, i + 1) - self.low_pass(x, i)
        return x

    def at_levels(self, fn, x, level):
        """fn(x, i) of images x [B, C, H, H] for the levels i in level [B, L] -> [B, L, C, H, H]."""
        every = torch.stack([fn(x, i) for i in range(self.F)], 1)
        image = torch.arange(len(x), device=x.device)[:, None]
        return every[image, level]

    def cut(self, tokens, level):
        """`target` of tokens [S, N, D] of level [S]. Noise and predictions are cut too, so that the
        head has nothing to learn outside of what its level draws."""
        c = self.config
        if c.target == "full":
            return tokens
        x = unpatchify(tokens, c.patch_size, c.channels)
        x = self.at_levels(self.target, x, level[:, None])[:, 0]
        return patchify(x, c.patch_size)

    def noise(self, white, level):
        """White noise [S, N, D] as level [S] meets it: cut, and of deviation 1 again."""
        return self.cut(white, level) / self.noise_unit[level][:, None, None]

    @torch.no_grad()
    def set_units(self, images):
        """Beyond the paper: measures on training images the deviation of what each level draws
        (target residual) and of its noise (residual and next), so that the head sees deviation 1.
        To be called before training."""
        c = self.config
        if c.target == "full":
            return
        x = patchify(read_images(self, images), c.patch_size)
        noise = torch.randn_like(x)
        for i in range(self.F):
            level = torch.full((len(x),), i, device=x.device)
            self.noise_unit[i] = self.cut(noise, level).std().clamp(min=1e-6)
            if c.target == "residual":
                self.unit[i] = self.cut(x, level).std().clamp(min=1e-6)

    # ---- Labels ----

    def no_labels(self, B):
        """B times "no label": class indices [B, 1], or embeddings [B, K, cond_dim]."""
        if self.config.cond_dim:
            return self.no_label.expand(B, -1, -1)
        return torch.full((B, 1), self.config.num_classes, device=self.device)

    def drop_labels(self, labels):
        """Replaces a share label_dropout of the labels by "no label", in training alone."""
        share = self.config.label_dropout if self.training else 0.0
        dropped = torch.rand(len(labels), device=labels.device) < share
        dropped = dropped.view(-1, *[1] * (labels.ndim - 1))
        return torch.where(dropped, self.no_labels(len(labels)), labels)


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode (no dropout) inside; afterwards the mode of before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def noise_source(generator, B, device):
    """draw(*shape): normal noise [B, *shape] from a torch.Generator, a list of one per image, or
    (None) from the global one."""
    generators = generator
    if not isinstance(generator, (list, tuple)):
        generators = [generator]
    good = len(generators) in (1, B)
    good = good and all(isinstance(g, torch.Generator | None) for g in generators)
    check(good, f"generator must be a torch.Generator, or a list of one for each of {B} images")

    def draw(*shape):
        shape = (B // len(generators), *shape)
        parts = []
        for g in generators:
            where = device if g is None else g.device
            parts.append(torch.randn(shape, generator=g, device=where))
        return torch.cat(parts).to(device)

    return draw


# ==== Checks of orderings, settings and arguments: nothing of the method
def check_ordering(fn, size, channels=3):
    """Says in words which laws the ordering fn(x, keep) breaks on size x size images.

    Returns list[str], empty when all hold: shape, zero at 0, identity at 1, linear, idempotent,
    nested, and that no image depends on others of its batch. The errors are the largest on normal
    noise of deviation 1.
    """
    x, y = torch.randn(2, 2, channels, size, size, generator=torch.Generator().manual_seed(0))
    keeps = [0.125, 0.25, 0.4, 0.5, 0.75, 1.0]
    worst = {}  # law -> (largest error, where)

    def P(keep, x):
        return fn(x.clone(), keep)  # it may write into its input

    def compare(law, where, got, want):
        error = (got - want).abs().nan_to_num(math.inf).max().item()
        worst[law] = max(worst.get(law, (0.0, "")), (error, where))

    for keep in [0.0, *keeps]:
        shape = list(P(keep, x).shape)
        if shape != list(x.shape):
            return [f"shape: {list(x.shape)} becomes {shape} at keep {keep:g}"]
    compare("zero at 0", "keep 0", P(0.0, x), torch.zeros_like(x))
    compare("identity at 1", "keep 1", P(1.0, x), x)
    for a in keeps:
        low = P(a, x)
        compare("linear", f"keep {a:g}", P(a, 2 * x - 3 * y), 2 * low - 3 * P(a, y))
        compare("idempotent", f"keep {a:g}", P(a, low), low)
        compare("each image by itself", f"keep {a:g}", P(a, x[:1]), low[:1])
        for b in keeps[keeps.index(a) + 1 :]:
            compare("nested", f"keep {a:g} after {b:g}", P(a, P(b, x)), low)
            compare("nested", f"keep {b:g} after {a:g}", P(b, low), low)
    return [
        f"{law}: broken at {where}, largest error {error:.3g}"
        for law, (error, where) in worst.items()
        if error > 1e-4
    ]


def distinct_levels(levels, ordering, size):
    """Those of the levels that show more than the one before, on size x size images."""
    kept = [levels[-1]]
    with torch.device("cpu"):  # values are needed, also where a model is made on "meta"
        x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
        for keep in reversed(levels[:-1]):
            shown = ordering(x.clone(), keep)
            more = ordering(x.clone(), kept[0]) - shown
            if shown.abs().max() > 1e-5 and more.abs().max() > 1e-5:
                kept.insert(0, keep)
    return kept


# Whole numbers that may be 0; the others are at least 1.
MAY_BE_0 = ("num_classes", "cond_tokens", "cond_dim", "levels_per_image")


def check_config(c):
    """Raises ValueError on impossible settings."""
    for f in fields(c):
        name, value = f.name, getattr(c, f.name)
        if name in CHOICES:
            good = value in list(CHOICES[name])
            check(good, f"{name} is {value!r}; it must be one of {', '.join(CHOICES[name])}")
        if f.type is int:
            least = int(name not in MAY_BE_0)
            good = type(value) is int and value >= least
            check(good, f"{name} is {value!r}; it must be a whole number of at least {least}")
        if f.type is float:
            good = type(value) in (int, float) and 0 <= value <= 1
            check(good, f"{name} is {value!r}; it must lie in [0, 1]")
        if f.type is bool:
            check(type(value) is bool, f"{name} is {value!r}; it must be True or False")
    check_levels(c.levels, c.levels_per_image)
    check_divisors(c)
    check(c.cond_tokens or not c.cond_dim, "cond_dim needs cond_tokens of at least 1")


def check_levels(levels, L):
    good = isinstance(levels, list) and len(levels) > 0
    good = good and all(type(keep) in (int, float) for keep in levels)
    good = good and levels == sorted({*levels}) and levels[0] > 0 and levels[-1] == 1
    check(good, f"levels are {levels!r}; they must increase from above 0 to exactly 1")
    check(L <= len(levels), f"levels_per_image is {L}, more than the {len(levels)} levels")


def check_divisors(c):
    divisors = [("image_size", c.patch_size), ("width", c.heads), ("width", 4)]
    if c.head_mixing:
        divisors += [("head_width", c.heads), ("head_width", 4)]
    for name, divisor in divisors:
        value = getattr(c, name)
        check(value % divisor == 0, f"{name} {value} is not divisible by {divisor}")


def plain(value):
    """Numbers and arrays of numpy and torch, also in a list, as Python's own."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def per_level(value, F, name, least=0.0, kinds=(int, float)):
    """One number for all levels, or a list of F numbers -> list of F numbers."""
    values = value
    if not isinstance(value, list):
        values = [value] * F
    good = len(values) == F and all(type(v) in kinds and least <= v < math.inf for v in values)
    noun = "number"
    if kinds == (int,):
        noun = "whole number"
    check(good, f"{name} is {value!r}; it must be a {noun} >= {least}, or {F}, one per level")
    return values


def check_tensor(name, x, dtypes, shape):
    """Raises ValueError unless x is a tensor of one of the dtypes and, but for -1, of the shape."""
    found = f"of type {type(x).__name__}"
    good = torch.is_tensor(x)
    if good:
        found = f"{x.dtype} of shape {list(x.shape)}"
        good = x.dtype in dtypes and x.ndim == len(shape) and len(x) > 0
        good = good and all(n in (-1, m) for n, m in zip(shape, x.shape, strict=True))
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    wanted = str(shape).replace("-1", "B")
    check(good, f"{name} are {found}; allowed: {kinds} of shape {wanted}")


def read_images(model, images):
    """images -> float32 in about [-1, 1], on the device of the model."""
    c = model.config
    shape = [-1, c.channels, c.image_size, c.image_size]
    check_tensor("images", images, (torch.float32, torch.uint8), shape)
    if images.dtype == torch.float32 and images.device.type == "cpu":
        # Images in [-1, 1] and latents are about 1, those in [0, 255] about 100.
        size = images.square().mean().sqrt().item()
        rule = "scale them to about [-1, 1], or give uint8 in [0, 255]"
        check(size < 4, f"float images have a root mean square of {size:.3g}: {rule}")
    images = images.to(model.device)
    if images.dtype == torch.uint8:
        images = images / 127.5 - 1
    return images


def read_labels(model, labels, B):
    """labels of B images -> class indices [B, 1] or embeddings [B, K, cond_dim], on the device."""
    c = model.config
    if labels is None:
        return model.no_labels(B)
    if c.cond_dim:
        floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        check_tensor("labels", labels, floats, [B, c.cond_tokens, c.cond_dim])
        return labels.to(model.device).float()
    check(c.num_classes, "this model has no classes; give no labels")
    check_tensor("labels", labels, (torch.int64,), [B])
    if labels.device.type == "cpu":  # a check on an accelerator would wait for it
        low, high = labels.min().item(), labels.max().item()
        good = low >= 0 and high < c.num_classes
        check(good, f"labels lie in {low} .. {high}; allowed: 0 .. {c.num_classes - 1}")
    return labels.to(model.device)[:, None]


# What FAR.sample may override.
SAMPLING = [
    "guidance",
    "guidance_schedule",
    "head_steps",
    "solver",
    "variance",
    "temperature",
    "mask",
    "step_rule",
]


def sampling_config(model, settings):
    """The config of the model with the settings given to `FAR.sample`."""
    unknown = sorted(set(settings) - set(SAMPLING))
    check(not unknown, f"unknown settings {unknown}; allowed: {', '.join(SAMPLING)}")
    c = replace(model.config, **settings)
    check(model.config.mask or not c.mask, "mask is True, but this model was trained without")
    return c


def sampling_labels(model, labels):
    """labels of `FAR.sample` -> (B, labels as from read_labels, whether there are any)."""
    if type(labels) is int and labels > 0:
        return labels, model.no_labels(labels), False
    good = torch.is_tensor(labels) and labels.ndim > 0 and len(labels) > 0
    check(good, f"labels are {labels!r}; allowed: a tensor for one image or more, or their number")
    if labels.dtype == torch.int64:
        labels = labels.cpu()  # where their range is checked
    return len(labels), read_labels(model, labels, len(labels)), True


def sampling_steps(model, levels):
    """levels of `FAR.sample` -> list of steps (i, j), from x_i to x_j."""
    c = model.config
    states = list(range(model.F + 1))
    if levels is not None:
        able = c.target == "full" and c.attention == "markov"
        good = isinstance(levels, (list, tuple)) and 1 in levels and set(levels) <= set(c.levels)
        rule = f"some of {c.levels}, 1 among them, of a model with target full, attention markov"
        check(able and good, f"levels are {levels!r}; allowed: {rule}")
        states = [0] + [i for i in states[1:] if c.levels[i - 1] in levels]
    return list(zip(states[:-1], states[1:], strict=True))


def sampling_start(model, start, B, steps):
    """start of `FAR.sample` -> (images [B, C, H, H] or None, the first level to draw)."""
    if start is None:
        return None, 0
    allowed = [i for i, _ in steps]
    good = isinstance(start, tuple) and len(start) == 2 and start[1] in allowed
    rule = f"start must be a tuple: 1 or {B} images, and a level of {allowed}"
    check(good, rule)
    images = read_images(model, start[0])
    check(len(images) in (1, B), rule)
    return images.expand(B, -1, -1, -1), start[1]
