"""Draw images from a trained FAR model.

    python sample.py                                                           # CIFAR-10 from assets/far_cifar10.pt
    python sample.py --ckpt out/digits/ckpt.pt --labels 0-9 --n 100            # out/samples/samples.png
    python sample.py --ckpt out/digits/ckpt.pt --n 1797 --npz samples.npz      # arr_0 uint8 [n, H, W, C], arr_1 int64 [n]
"""
import argparse, os, sys, time, zipfile

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.benchmark import Timer
from tqdm import tqdm

from far import CHOICES, FAR, FARConfig, check

def load_checkpoint(path, device="cpu"):
    """Reads a checkpoint of train_cifar.py -> (FAR with the EMA weights, in eval mode, on device; dict of the rest).

    Raises ValueError with one sentence if the file is missing, cut off, or no FAR checkpoint."""
    check(os.path.isfile(path), f"{path} is not a file; train a model, python train_cifar.py --data digits, and name it with --ckpt")
    try:
        rest = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut off or not written by train_cifar.py") from None
    check(isinstance(rest, dict) and {"config", "ema"} <= set(rest), f"{path} holds no FAR model: config and ema are missing")
    try:
        model = FAR(FARConfig.from_dict(rest["config"]))
        model.load_state_dict(rest.pop("ema"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this version of far.py: {str(error).splitlines()[0]}") from None
    return model.to(device).eval().requires_grad_(False), rest

def load_vae(name, device="cpu"):
    """The diffusers AutoencoderKL of a name (downloaded) or folder, to encode and decode latents. ValueError if it or diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("latents need the library of the VAE: pip install diffusers") from None
    try:
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:                                                  # of the hub, the files or the network
        raise ValueError(f"no AutoencoderKL can be loaded from {name}: {str(error).splitlines()[0]}") from None

def use_device(name):
    """The torch.device of a name, "cuda" being this process's own GPU, ready for use. ValueError if there is none."""
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                              # TF32
    return device

def training_flops(c):
    """Floating-point operations of one image's training step: 2 for each multiply-add of a matrix product forward, twice that backward."""
    k = c.attention == "markov" and c.levels_per_image or len(c.levels)
    N, D, W, w, K, mix = c.num_tokens, c.token_dim, c.width, c.head_width, c.cond_tokens, c.head_mixing
    sequences, length = (k, K + N) if c.attention == "markov" else (1, K + k * N)
    transformer = k * N * 2 * D * W + c.depth * sequences * length * (24 * W * W + 4 * length * W)
    steered = 1 if mix else N                                                   # modulations a level and draw
    block = N * (16 * w * w + mix * (8 * w * w + 4 * N * w)) + steered * (12 if mix else 6) * w * w
    drawn = N * 4 * D * w + steered * (6 * w * w + 128 * w) + c.head_depth * block
    return 3 * (transformer + k * (2 * (N + mix) * W * w + c.head_draws * drawn))

def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product: the peak that training is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / Timer("a @ a", globals=dict(a=a), num_threads=torch.get_num_threads()).blocked_autorange().median

def seed_of(*numbers):                                                          # one seed from several whole numbers of at least 0
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def read_image(path, size, channels=3):
    """A picture, centre-cropped to a square and resized (antialiased): uint8 [channels, size, size]; None if it cannot be read."""
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(path) as image:
            image = image.convert(mode)
    except Exception:                                                           # a damaged picture can raise anything
        return None
    if image.size != (size, size):
        image = torchvision.transforms.functional.center_crop(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)

def to_uint8(images):
    """float images in about [-1, 1] -> uint8 [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()

def save_grid(images, path, columns):
    """Writes images [n, C, H, H] in about [-1, 1] as one PNG, row by row, enlarged to at least 48 pixels each, with thin gaps; returns the path."""
    scale = max(1, -(-48 // images.shape[-1]))
    images = torch.nn.functional.interpolate(to_uint8(images[:, :3]).float() / 255, scale_factor=scale)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torchvision.utils.save_image(torchvision.utils.make_grid(images, columns, padding=2, pad_value=0.5), path)
    return path

def draw_images(model, labels, seed=0, batch=250, progress=True, bf16=False, **settings):
    """Yields (first index, images, from FAR.sample(**settings)) a batch at a time. Image i depends on seed, i and its label alone: every
    image has a noise generator of its own. labels: int64 [n], or an int n for images without label."""
    n = labels if isinstance(labels, int) else len(labels)
    with tqdm(total=n, unit="image", desc="sample", disable=not progress) as bar:
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(start, stop)]
            part = stop - start if isinstance(labels, int) else labels[start:stop]
            with torch.autocast(model.residual_scale.device.type, torch.bfloat16, enabled=bf16):
                images = model.sample(part, generator=generators, **settings).cpu()
            yield start, images
            bar.update(stop - start)

def parse_labels(text, n, num_classes):
    """"0-9", "3", "1,5,7-9" or "none" and a number of images -> int64 [n], sorted evenly over the classes, or the int n for "none"."""
    if text == "none" or num_classes == 0:
        return n
    try:
        classes = [k for part in text.split(",") for k in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
    except ValueError:
        raise ValueError(f"--labels {text} is not understood; write classes as 0-9 or 1,5,7, or none") from None
    check(classes and max(classes) < num_classes, f"--labels {text} is out of range: the model knows the classes 0 to {num_classes - 1}")
    return torch.tensor([classes[i * len(classes) // n] for i in range(n)])

def score(images, labels, real, truth, k=5):
    """Compares uint8 images [n, H, W, C] with real ones [m, H, W, C], pixel by pixel in [0, 1], labels int64 [n] and [m] -> dict of
    fd (Frechet distance of the Gaussians fitted to both, lower is better), precision and recall (share of images inside the other set's
    k-nearest-neighbour manifold, Kynkaanniemi et al. 2019) and class_acc (share that the k nearest real images give the asked label)."""
    a, b = (torch.as_tensor(x).flatten(1).double() / 255 for x in (images, real))
    A, B, distance = a.T.cov(), b.T.cov(), torch.cdist(a, b)                    # distance [n, m]
    fd = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    radius_a, radius_b = (torch.cdist(x, x).kthvalue(k + 1, 1)[0] for x in (a, b))
    nearest = truth[distance.topk(k, largest=False)[1]].mode(1)[0]
    shares = (distance <= radius_b).any(1), (distance <= radius_a[:, None]).any(0), nearest == labels
    return dict(fd=fd.item(), **{name: share.double().mean().item() for name, share in zip(("precision", "recall", "class_acc"), shares)})

class NpzWriter:
    """Writes arr_0 uint8 [n, H, W, C] and arr_1 int64 [n] batch by batch, so that memory stays bounded; the file appears when it is whole."""

    def __init__(self, path, labels):
        check(not os.path.isdir(path), f"--npz {path} is a folder; name a file")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.path, self.n, self.file = path, labels if isinstance(labels, int) else len(labels), None
        self.archive = zipfile.ZipFile(path + ".part", "w")
        if not isinstance(labels, int):
            with self.archive.open("arr_1.npy", "w") as f:
                np.lib.format.write_array(f, labels.numpy())

    def add(self, images):                                                      # the next ones, uint8 [B, H, W, C]
        if not self.file:
            self.file = self.archive.open("arr_0.npy", "w", force_zip64=True)
            np.lib.format.write_array_header_1_0(self.file, dict(descr="|u1", fortran_order=False, shape=(self.n, *images.shape[1:])))
        self.file.write(images.numpy().tobytes())

    def close(self):
        self.file.close(), self.archive.close()
        os.replace(self.path + ".part", self.path)

def numbers(kind, alone=True):
    """argparse type: comma-separated numbers -> a list of them, or, if `alone`, the number itself where there is one; also "paper"."""
    def parse(text):
        values = [kind(v) for v in text.split(",")] if text != "paper" else [text]
        return values[0] if alone and len(values) == 1 else values
    parse.__name__ = f"{kind.__name__} or list"
    return parse

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "far_cifar10.pt"), help="checkpoint (default: the CIFAR-10 weights in assets)")
    p.add_argument("--export", help="write the weights alone, in half precision and with --guidance as their default, to this file; draws nothing")
    p.add_argument("--labels", help="classes, such as 0-9 or 1,5,7, or none (default: all)")
    p.add_argument("--n", type=int, default=100, help="number of images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="image i depends on seed, i and its label alone (default: %(default)s)")
    p.add_argument("--batch", type=int, default=250, help="images drawn at a time (default: %(default)s)")
    p.add_argument("--out", default="out/samples", help="folder of the pictures (default: %(default)s)")
    p.add_argument("--levels", action=argparse.BooleanOptionalAction, default=True, help="levels.png: the first image of each class (at most 10), a row each, columns x_1 .. x_F")
    p.add_argument("--npz", help="write all images to this file: arr_0 uint8 [n, H, W, C], arr_1 int64 [n]")
    p.add_argument("--real", help="npz file of real images [m, H, W, C] and labels, such as assets/digits.npz: print fd, precision, recall, class_acc (pixels)")
    p.add_argument("--png", help="write every image as a PNG into this folder")
    p.add_argument("--guidance", type=float, help="1: none; more: clearer and less diverse (default: the checkpoint's, or 1)")
    p.add_argument("--guidance-schedule", choices=("linear", "constant"), help="linear grows from none at the first level (default: the checkpoint's, or linear)")
    p.add_argument("--head-steps", type=numbers(int), help="per level: a number, a list, or paper (default: the model's)")
    p.add_argument("--solver", choices=CHOICES["solver"], help="default: the model's")
    p.add_argument("--temperature", type=numbers(float), help="per level: a number, a list, or paper (default: the model's)")
    p.add_argument("--step-rule", choices=("paper", "locked"), default="paper", help="default: %(default)s")
    p.add_argument("--coupling", type=numbers(float), default=0.0, help="coupled noise, one rho or a list (default: %(default)s)")
    p.add_argument("--paper", action="store_true", help="--solver ddpm --head-steps paper --temperature paper, unless given")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast: faster and a little coarser (default: on CUDA)")
    args = p.parse_args(argv)
    check(args.n >= 1 and args.batch >= 1 and args.seed >= 0, "--n and --batch must be at least 1, --seed at least 0")
    device = use_device(args.device)
    model, rest = load_checkpoint(args.ckpt, device)
    c, latents = model.config, rest.get("latents")
    vae = load_vae(latents["vae"], device) if latents and not args.export else None

    def pictures(x):                                                            # [n, C, H, H] -> images on the CPU
        return torch.cat([vae.decode(z.to(device) / latents["scale"]).sample.cpu() for z in x.split(16)]) if vae else x

    labels = parse_labels(args.labels or f"0-{c.num_classes - 1}", args.n, c.num_classes)
    settings = dict(guidance=1.0, guidance_schedule="linear", step_rule=args.step_rule, coupling=args.coupling) | rest.get("sampling", {})
    settings |= {name: getattr(args, name) for name in ("guidance", "guidance_schedule") if getattr(args, name) is not None}
    if args.export:
        half = {name: value.half() for name, value in model.state_dict().items()}  # load_checkpoint makes them float32 again
        os.makedirs(os.path.dirname(args.export) or ".", exist_ok=True)
        torch.save(dict(config=c.to_dict(), ema=half, sampling={name: settings[name] for name in ("guidance", "guidance_schedule")}, latents=latents), args.export + ".part")
        os.replace(args.export + ".part", args.export)
        return print(f"wrote {args.export}, {os.path.getsize(args.export) / 1e6:.1f} MB")
    for name, paper in dict(solver="ddpm", head_steps="paper", temperature="paper").items():
        settings[name] = paper if args.paper and getattr(args, name) is None else getattr(args, name)
    arrays = np.load(args.real).values() if args.real and zipfile.is_zipfile(args.real) else []
    real, kept = sorted((torch.from_numpy(x) for x in arrays if isinstance(x, np.ndarray)), key=torch.Tensor.dim, reverse=True), []
    check(not args.real or [x.shape[1:] for x in real] == [(c.image_size, c.image_size, c.channels), ()] and len(real[0]) == len(real[1]) > 5
          and args.n > 5 and torch.is_tensor(labels) and not vae, f"--real {args.real} must be an npz file of images [m, H, H, C], of the model's size, and m labels; m and --n above 5")
    npz = NpzWriter(args.npz, labels) if args.npz else None
    os.makedirs(args.out, exist_ok=True), os.makedirs(args.png or args.out, exist_ok=True)  # an error now, not after the sampling
    shown = np.unique(np.linspace(0, args.n - 1, min(args.n, 400)).round().astype(int))  # all, or 400 spread evenly over the classes
    strip = [] if not args.levels else range(min(args.n, 10)) if isinstance(labels, int) else np.unique(labels.numpy(), return_index=True)[1][:10]
    grid, rows, begin = [], [], time.perf_counter()
    for start, levels in draw_images(model, labels, args.seed, args.batch, bf16=device.type == "cuda" if args.bf16 is None else args.bf16, return_levels=True, **settings):
        images = pictures(levels[:, -1])
        pixels = to_uint8(images).permute(0, 2, 3, 1)                           # [B, H, W, C]
        if npz:
            npz.add(pixels)
        if real:
            kept.append(pixels)
        for i, image in enumerate(images, start):
            if args.png:
                Image.fromarray(pixels[i - start].squeeze(-1).numpy()).save(os.path.join(args.png, f"{i:06d}.png"))
            if i in shown:
                grid.append(image)
            if i in strip:
                rows.append(pictures(levels[i - start]))
    seconds = time.perf_counter() - begin
    written = [save_grid(torch.stack(grid), os.path.join(args.out, "samples.png"), min(len(grid), 10 if len(grid) <= 100 else 20))]
    written += [save_grid(torch.cat(rows), os.path.join(args.out, "levels.png"), len(c.levels))] if rows else []
    if npz:
        npz.close()
    print(f"{args.n} images in {seconds:.1f} s; wrote", *written, *filter(None, (args.png, args.npz)))
    if real:
        print(*(f"{name} {value:.3f}" for name, value in score(torch.cat(kept), labels, *real).items()))

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"sample.py: {str(error) or 'stopped'}")
