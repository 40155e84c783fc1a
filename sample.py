"""Draw images from a trained FAR model.

    python sample.py                                                           # CIFAR-10 from assets/far_cifar10.pt
    python sample.py --ckpt out/digits/ckpt.pt --labels 0-9 --n 100            # out/samples/samples.png
"""
import argparse, contextlib, functools, os, runpy, sys, time
from dataclasses import fields, replace

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from far import CHOICES, FAR, FARConfig, ORDERINGS, SAMPLING, check, check_ordering

@contextlib.contextmanager
def told(message):
    """Whatever goes wrong inside becomes a ValueError of one sentence, the message and the cause: files of others can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from None

def load_checkpoint(path, device="cpu"):
    """Reads a checkpoint of train_cifar.py -> (FAR with the EMA weights, in eval mode, on device; dict of the rest).
    Raises ValueError with one sentence if the file is missing, cut off, or no FAR checkpoint."""
    check(os.path.isfile(path), f"{path} is not a file; python train_cifar.py --data digits, for one, trains a model")
    with told(f"{path} cannot be read as a checkpoint: it is cut off or not written by train_cifar.py"):
        rest = torch.load(path, map_location="cpu", weights_only=True)
    check(isinstance(rest, dict) and isinstance(rest.get("config"), dict) and "ema" in rest, f"{path} holds no FAR model: config and ema are missing")
    name = str(rest["config"].get("ordering"))
    check(":" not in name or name in ORDERINGS, f"{path} was trained with an ordering of its own: add --ordering {name}, in Python far.ORDERINGS[{name!r}] = the function")
    with told(f"{path} does not fit this version of far.py"):
        model = FAR(FARConfig.from_dict(rest["config"]))
        model.load_state_dict(rest.pop("ema"))
        check(all(p.isfinite().all() for p in model.parameters()), "its weights are not finite")
    return model.to(device).eval().requires_grad_(False), rest

def load_ordering(name, size=0, channels=3):
    """Puts a user's "file.py:function" into far.ORDERINGS under that name; with a size, says first which laws it breaks there."""
    if ":" in name:
        file, function = name.rsplit(":", 1)
        with told(f"--ordering {name} must name a file and an ordering(x, keep) in it"):
            ORDERINGS[name] = ordering = runpy.run_path(file)[function]
            if size:
                print(f"{name}:", *check_ordering(ordering, size, channels) or ["all laws hold"], sep="\n  ")

def load_vae(name, device="cpu"):
    """The diffusers AutoencoderKL of a name (downloaded) or folder, to encode and decode latents. ValueError if it or diffusers is missing."""
    with told(f"no AutoencoderKL can be loaded from {name}, with pip install diffusers"):
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)

def use_device(name):
    """The torch.device of a name, "cuda" being this process's own GPU, ready for use. ValueError if there is none."""
    with told(f"--device {name} is not usable here"):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

def count_flops(function):
    """Floating-point operations of a call, by module and "Global": 2 for each multiply-add of its matrix products, as torch counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return {part: sum(counts.values()) for part, counts in counter.get_flop_counts().items()}

@functools.cache
def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product: the peak that training is measured against."""
    from torch.utils.benchmark import Timer                                     # slow to import, and not needed to draw
    n = 8192 if device.type == "cuda" else 1024
    return 2 * n ** 3 / Timer("a @ a", globals=dict(a=torch.randn(n, n, device=device, dtype=dtype)), num_threads=torch.get_num_threads()).blocked_autorange().median

def seed_of(*numbers):                                                          # one seed from several whole numbers of at least 0
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def read_image(path, size, channels=3):
    """A picture, centre-cropped to a square and resized (antialiased): uint8 [channels, size, size]; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8)) if image.mode[0] == "I" else ImageOps.exif_transpose(image)  # "I": 16 bits
            image = image.convert({1: "L", 3: "RGB"}[channels])
    except Exception:                                                           # a damaged picture can raise anything
        return None
    image = torchvision.transforms.functional.center_crop(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)

def write_file(path, save):                                                     # by save(file); it is there once it is whole
    with open(path + ".part", "wb") as file:
        save(file)
    os.replace(path + ".part", path)

def list_folder(path, option):
    """path/train/<class>/* -> torchvision's ImageFolder."""
    check(path, f"{option} is missing: the folder that holds train/<class>/*.jpg")
    with told(f"{option} {path} must be a folder that holds train/<class>/*.jpg"):
        return torchvision.datasets.ImageFolder(os.path.join(path, "train"))

def to_uint8(images):
    """float images in about [-1, 1] -> uint8 [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()

def save_grid(images, path, columns):
    """Writes images [n, C, H, H] in about [-1, 1] as one PNG, row by row, enlarged to at least 48 pixels each, with thin gaps; returns the path."""
    images = torch.nn.functional.interpolate(to_uint8(images[:, :3]).float() / 255, scale_factor=max(1, -(-48 // images.shape[-1])))
    torchvision.utils.save_image(torchvision.utils.make_grid(images, columns, padding=2, pad_value=0.5), path)
    return path

def draw_images(model, labels, seed=0, batch=None, progress=True, bf16=False, **settings):
    """Yields (first index, images, from FAR.sample(**settings)) a batch at a time. Image i depends on seed, i and its label alone: every
    image has a noise generator of its own. labels: int64 [n], or an int n for images without label. batch: 250 images, or on a CPU 1,600 tokens."""
    n, device = labels if isinstance(labels, int) else len(labels), model.data_scale.device.type
    batch = batch or (max(1, 1600 // max(model.config.num_tokens)) if device == "cpu" else 250)  # what the caches of a CPU hold
    for start in tqdm(range(0, n, batch), unit="batch", desc="sample", disable=not progress):
        generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(start, min(start + batch, n))]
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            images = model.sample(len(generators) if isinstance(labels, int) else labels[start:start + batch], generator=generators, **settings).cpu()
        yield start, images.clone()                                             # outside of both modes, which would last in the caller; usual tensors

def parse_labels(text, n, num_classes):
    """"0-9", "3", "1,5,7-9" or "none" and a number of images -> int64 [n], sorted evenly over the classes, or the int n for "none"."""
    if text == "none":
        return n
    with told(f"--labels {text} is not understood; write classes as 0-9 or 1,5,7, or none"):
        classes = [k for part in text.split(",") for a, _, b in [part.partition("-")] for k in range(int(a), int(b or a) + 1)]
    check(classes and max(classes) < num_classes, f"--labels {text} is out of range: the model knows {num_classes} classes, from 0")
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

def numbers(kind, alone=True):
    """argparse type: comma-separated numbers -> a list of them, or, if `alone`, the number itself where there is one; also "paper"."""
    def parse(text):
        values = [kind(v) for v in text.split(",")] if text != "paper" else [text]
        return values[0] if alone and len(values) == 1 else values
    parse.__name__ = f"{kind.__name__} or list"
    return parse

def add_settings(group, names, config=None):
    """Adds a flag for each of the FARConfig fields `names`, without a default; its help shows the value in `config`."""
    for f in fields(FARConfig):
        kind = {"levels": numbers(float, alone=False), "head_steps": numbers(int), "patch_size": numbers(int)}.get(f.name, numbers(float) if f.type is object else f.type)
        options = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=CHOICES.get(f.name))
        if f.name in names:
            group.add_argument("--" + f.name.replace("_", "-"), help=f"default: {getattr(config, f.name) if config else 'as in the checkpoint'}", **options)

def main(argv=None, count=False):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "far_cifar10.pt"), help="checkpoint (default: the CIFAR-10 weights in assets)")
    p.add_argument("--export", help="write the weights alone, in half precision and with the sampling settings given here as default, to this file; draws nothing")
    p.add_argument("--labels", help="classes, such as 0-9 or 1,5,7, or none (default: all)")
    p.add_argument("--n", type=int, default=100, help="number of images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="image i depends on seed, i and its label alone (default: %(default)s)")
    p.add_argument("--batch", type=int, help="images drawn at a time (default: 250, on a CPU 1,600 tokens' worth)")
    p.add_argument("--out", default="out/samples", help="folder of samples.png (at most 400 images) and levels.png, a row x_1 .. x_F for the first image of each class, at most ten (default: %(default)s)")
    p.add_argument("--bench", action="store_true", help="draw with the solvers and head steps of a table: seconds, operations and, with --real, scores of each")
    p.add_argument("--npz", help="write all images to this file: arr_0 uint8 [n, H, W, C], arr_1 int64 [n]")
    p.add_argument("--real", help="npz file of real images [m, H, W, C] and labels, such as assets/digits.npz: print fd, precision, recall, class_acc (pixels)")
    p.add_argument("--png", help="write every image as a PNG into this folder")
    p.add_argument("--from", dest="image", metavar="IMAGE", help="draw variations of a picture: what it shows at --keep stays (unless --step-rule paper)")
    p.add_argument("--keep", type=float, help="with --from: the share of the picture's bandwidth that stays, one of the model's levels")
    p.add_argument("--stops", type=numbers(float, alone=False), help="fewer steps: draw these levels of the model alone, such as 0.25,1 (for target full and attention markov)")
    p.add_argument("--ordering", help="file.py:function, for a model that was trained with it")
    add_settings(p.add_argument_group("sampling, see far.FARConfig"), SAMPLING)
    p.add_argument("--paper", action="store_true", help="--solver ddpm --head-steps paper --temperature paper, unless given")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast: a little coarser; faster on CUDA (default there) and on CPUs with bfloat16 arithmetic, slower on others")
    args = p.parse_args(argv)
    check(args.n >= 1 and (args.batch is None or args.batch >= 1) and args.seed >= 0, "--n and --batch must be at least 1, --seed at least 0")
    device = use_device(args.device)
    load_ordering(args.ordering or "")
    model, rest = load_checkpoint(args.ckpt, device)
    c, latents, args.bf16 = model.config, rest.get("latents"), device.type == "cuda" if args.bf16 is None else args.bf16
    if args.bench and not count:
        rising = [str(round(4 + 8 * i / max(len(c.levels) - 1, 1))) for i in range(len(c.levels))]  # as many steps as with 8 a level
        for flags in ("--solver ddpm --head-steps paper --temperature paper", *(f"--solver {s} --head-steps {n}" for s in ("ddim", "dpmpp_2m") for n in (4, 6, 8, 12, 25, ",".join(rising), ",".join(rising[::-1])))):
            print(f"\n{flags}"), main([*(sys.argv[1:] if argv is None else argv), *flags.split()], count=True)
        return
    check(args.ordering in (None, c.ordering) and (args.image or args.keep is None), f"--ordering must be the model's own, {c.ordering}; --keep needs --from")
    vae = load_vae(latents["vae"], device) if latents and not args.export else None
    pictures = lambda x: torch.cat([vae.decode(z.to(device) / latents["scale"]).sample.cpu() for z in x.split(16)]) if vae else x  # [n, C, H, H] -> images
    labels = parse_labels(args.labels or (f"0-{c.num_classes - 1}" if c.num_classes else "none"), args.n, c.num_classes)
    settings = (dict(solver="ddpm", head_steps="paper", temperature="paper") if args.paper else {}) | {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    for file in [args.export] if args.export else [os.path.join(args.out, "samples.png"), os.path.join(args.out, "levels.png"), *filter(None, (args.npz, args.png and os.path.join(args.png, "0.png")))]:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)                # an error now, not after the sampling
        check(os.access(os.path.dirname(file) or ".", os.W_OK) and not os.path.isdir(file) and file not in (args.ckpt, args.real), f"{file} is a folder, is read here, or cannot be written: choose another")
    if args.export:
        write_file(args.export, lambda f: torch.save(dict(config=replace(c, **settings).to_dict(), ema=model.half().state_dict(), latents=latents), f))  # read as float32 again
        return print(f"wrote {args.export}, {os.path.getsize(args.export) / 1e6:.1f} MB")
    if args.image:
        keeps, picture = (0.0, *c.levels[:-1]), read_image(args.image, c.image_size, c.channels) if c.channels in (1, 3) and not vae else None
        check(picture is not None, f"--from {args.image} cannot be read as a picture, or the model is one of latents")
        check(args.keep in keeps, f"--keep {args.keep} is no level of this model; allowed: {', '.join(map(str, keeps))}")
        settings = dict(step_rule="locked") | settings | dict(known=(torch.tensor(picture)[None], keeps.index(args.keep)))
    settings, stops = settings | dict(stops=args.stops), [keep for keep in c.levels if not args.stops or keep in args.stops]
    with told(f"--real {args.real} must be an npz file of more than 5 uint8 images [m, H, H, C] of the model's size and m labels; it needs --labels, --n above 5 and no VAE"):
        arrays = [x for x in np.load(args.real).values() if x.dtype.kind in "iu"] if args.real else []
        real = sorted((torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.int64)) for x in arrays), key=torch.Tensor.dim, reverse=True)
        check(not args.real or [x.shape[1:] for x in real] == [(c.image_size, c.image_size, c.channels), ()] and len(real[0]) == len(real[1]) > 5 and real[0].dtype == torch.uint8
              and args.n > 5 and torch.is_tensor(labels) and not vae, f"it has {[list(x.shape) for x in arrays]}")
    shown = np.unique(np.linspace(0, args.n - 1, min(args.n, 400)).round().astype(int))  # all, or 400 spread evenly over the classes
    strip = range(min(args.n, 10)) if isinstance(labels, int) else np.unique(labels.numpy(), return_index=True)[1][:10]
    grid, rows, pixels, kept, begin = [], [], [], [], time.perf_counter()
    for start, levels in draw_images(model, labels, args.seed, args.batch, bf16=args.bf16, return_levels=True, **settings):
        images = pictures(levels[:, -1])
        shades = to_uint8(images).permute(0, 2, 3, 1).numpy()                   # [B, H, W, C]
        pixels, kept = pixels + [shades] * bool(args.npz or real), kept + [levels] * bool(real)
        for i, image in enumerate(images, start):
            if args.png:
                Image.fromarray(shades[i - start].squeeze()).save(os.path.join(args.png, f"{i:06d}.png"))
            grid += [image] if i in shown else []
            rows += [pictures(levels[i - start])] if i in strip else []
    seconds = time.perf_counter() - begin
    written = [save_grid(torch.stack(grid), os.path.join(args.out, "samples.png"), 10 if args.n <= 100 else 20), save_grid(torch.cat(rows), os.path.join(args.out, "levels.png"), len(stops))]
    if args.npz:                                                                # named arr_0 and arr_1
        write_file(args.npz, lambda f: np.savez(f, np.concatenate(pixels), *([labels] if torch.is_tensor(labels) else [])))
    print(f"{args.n} images in {seconds:.1f} s; wrote", *written, *filter(None, (args.png, args.npz)))
    if count:                                                                   # a second time, one image
        flops = count_flops(lambda: model.sample(labels[:1] if torch.is_tensor(labels) else 1, **settings))
        share = args.n * flops["Global"] / seconds / matmul_rate(device, torch.bfloat16 if args.bf16 else torch.float32)
        print(f"{flops['Global'] / 1e6:.2f} MFLOP an image, {flops['Transformer'] / 1e6:.2f} of them in the transformer; {100 * share:.0f} % of the rate of a large matrix product")
    if real:
        drawn, data = torch.cat(kept), real[0].permute(0, 3, 1, 2).float() / 127.5 - 1
        scores = score(np.concatenate(pixels), labels, *real)
        for n, i in enumerate(map((0, *c.levels).index, stops)):                # deviation of x_i over the samples, in units of the data's
            scores[f"deviation_{i}"] = (drawn[:, n].std(0).mean() / model.project(data, i).std(0).mean()).item()
        print(*(f"{name} {value:.3f}" for name, value in scores.items()))
        return scores

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"sample.py: {str(error) or 'stopped'}")
