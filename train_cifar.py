"""Train FAR on digits, CIFAR-10 or a folder of images.

    python train_cifar.py --data digits                          # two minutes on a laptop, writes out/digits/
    python train_cifar.py --data cifar10                         # downloads CIFAR-10
    python train_cifar.py --data folder --path DIR --image-size 32   # DIR/train/<class>/*.jpg

Every setting of the model (far.FARConfig) is a flag; --data X --help shows the values that X takes by default.
"""
import argparse
import copy
import csv
import functools
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import torch
import torchvision
from PIL import Image
from tqdm import tqdm

from far import CHOICES, FAR, FARConfig, ORDERINGS, PRESETS, check
from sample import draw_images, head_steps, load_checkpoint, numbers, save_grid

DATA = {  # data set -> default preset and training settings
    "digits": dict(preset="digits", batch=64, lr=3e-3, ema=0.999, max_minutes=2.0),
    "cifar10": dict(preset="cifar", batch=128, lr=1e-3, ema=0.9995, max_minutes=60.0),
    "folder": dict(preset="cifar", batch=128, lr=1e-3, ema=0.9995, max_minutes=60.0),
}

# ---------------------------------------------------------------------------------------------------------------------
# Data: one uint8 tensor [n, C, H, H], labels int64 [n], names of the classes


def load_digits():
    """1,797 real 8 x 8 digits of the UCI optical recognition set, values 0..16 stored as 0..255."""
    d = np.load(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.npz"))
    return torch.from_numpy(d["images"]).permute(0, 3, 1, 2), torch.from_numpy(d["labels"]), [str(k) for k in range(10)]


def load_cifar10(root):
    """The 50,000 training images through torchvision, downloaded to root if they are not there."""
    try:
        data = torchvision.datasets.CIFAR10(root, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"CIFAR-10 cannot be loaded from {root} or downloaded ({error}); offline, use --data digits, or --data folder --path DIR with DIR/train/<class>/*.jpg") from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), data.classes


def load_folder(path, size, channels):
    """Images path/train/<class>/*, centre-cropped to a square and resized to size x size (antialiased)."""
    root = os.path.join(path or "", "train")
    check(path and os.path.isdir(root), f"--path {path}: there is no folder {root}; --data folder needs --path DIR with DIR/train/<class>/*.jpg")
    try:
        data = torchvision.datasets.ImageFolder(root)
    except FileNotFoundError as error:
        raise ValueError(f"{root} holds no classes with images: {error}") from None

    def read(item):
        try:
            with Image.open(item[0]) as image:
                image = image.convert({1: "L", 3: "RGB"}[channels])
        except OSError:
            return item[0]
        if image.size != (size, size):
            image = torchvision.transforms.functional.center_crop(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(size, size, channels)

    with ThreadPoolExecutor() as pool:
        images = list(tqdm(pool.map(read, data.samples), total=len(data.samples), desc="read images", unit="image"))
    bad = [i for i in images if isinstance(i, str)]
    check(not bad, f"{len(bad)} images cannot be read, first {', '.join(bad[:3])}: repair or remove them")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(data.targets), data.classes


def batch_at(step, n, batch, seed):
    """Indices [batch] of step `step`: every epoch is a fresh permutation that depends on seed and epoch alone."""
    epoch, k = divmod(step, n // batch)
    return permutation(n, seed + epoch * 1_000_003)[k * batch:(k + 1) * batch]


@functools.lru_cache(1)
def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(model, lr, weight_decay):
    """AdamW (0.9, 0.95); weight decay on the weights of linear layers only: none on biases, norms and embeddings."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [[p for p in model.parameters() if (id(p) in decayed) == chosen] for chosen in (True, False)]
    return torch.optim.AdamW([dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)],
                             lr=lr, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path, model, ema, optimizer, state):
    """Written under a temporary name, then renamed: a checkpoint is whole or not there."""
    rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    torch.save(dict(config=model.config.to_dict(), model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), rng=rng, **state), path + ".part")
    os.replace(path + ".part", path)


def open_log(path, levels, step):
    """log.csv, opened to go on after `step`: lines that a stopped run wrote after its last checkpoint are dropped."""
    rows = [["step", "seconds", "images_per_second", "loss", *(f"level_{i + 1}" for i in range(levels))]]
    if step and os.path.exists(path):
        with open(path, newline="") as f:
            rows += [row for row in list(csv.reader(f))[1:] if int(row[0]) <= step]
    log = open(path, "w", newline="")
    csv.writer(log).writerows(rows)
    return log


def train(args, config, images, labels):
    """Trains until --steps or --max-minutes, keeps args.out/ckpt.pt and log.csv; returns the EMA model."""
    device, ckpt = torch.device(args.device), os.path.join(args.out, "ckpt.pt")
    torch.manual_seed(args.seed)
    model = FAR(config).to(device)
    if config.target == "residual":
        model.set_residual_scale(images[:2000])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    state = dict(step=0, seconds=0.0, seed=args.seed, batch=args.batch)
    if args.resume:
        ema, state = load_checkpoint(ckpt, device)
        ema.requires_grad_(False)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay if group["weight_decay"] else 0.0
        rng = state.pop("rng")
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"] and device.type == "cuda":
            torch.cuda.set_rng_state_all(rng["cuda"])
        state.pop("config")
    limit, start = 60 * args.max_minutes if args.max_minutes else float("inf"), time.perf_counter() - state["seconds"]
    steps = args.steps or float("inf")
    images, labels = images.to(device), labels.to(device) if config.num_classes else None
    averaged = [(e, p.detach()) for e, p in zip(ema.parameters(), model.parameters())]
    log = open_log(os.path.join(args.out, "log.csv"), len(config.levels), state["step"])
    writer = csv.writer(log)
    bar = tqdm(total=round(limit) if args.steps is None else args.steps, initial=round(state["seconds"]) if args.steps is None else state["step"],
               unit="s" if args.steps is None else "step", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}{postfix}")
    saved, total, marked, mark_step = time.perf_counter(), torch.zeros((), device=device), time.perf_counter(), state["step"]
    interrupted = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(1))    # Ctrl-C: finish the step in hand, save, stop
    model.train()
    try:
        while state["step"] < steps and state["seconds"] < limit and not interrupted:
            index = batch_at(state["step"], len(images), args.batch, args.seed).to(device)
            x, y = images[index], labels[index] if config.num_classes else None
            if args.flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            progress = max(state["step"] / steps, state["seconds"] / limit)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (state["step"] + 1) / args.warmup) * (1 - progress if args.lr_schedule == "linear" else 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = model(x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            state["step"] += 1
            decay = min(args.ema, (1 + state["step"]) / (10 + state["step"]))
            torch._foreach_lerp_([e for e, _ in averaged], [p for _, p in averaged], 1 - decay)
            total += loss.detach()
            now = time.perf_counter()
            state["seconds"] = now - start
            if state["step"] % args.log_every == 0:
                mean, rate = total.item() / (state["step"] - mark_step), (state["step"] - mark_step) * args.batch / (now - marked)
                check(np.isfinite(mean), f"the loss is {mean} at step {state['step']}; {ckpt} holds the last good state: lower --lr and add --resume")
                with torch.no_grad():
                    by_level = model.level_losses(x, y).tolist()
                writer.writerow([state["step"], f"{state['seconds']:.1f}", f"{rate:.0f}", f"{mean:.5f}", *(f"{v:.5f}" for v in by_level)])
                log.flush()
                left = (steps - state["step"]) / rate * args.batch if args.steps else limit - state["seconds"]
                bar.set_postfix_str(f"step {state['step']}, loss {mean:.4f}, {rate:.0f} images/s, {left:.0f} s left")
                bar.n = state["step"] if args.steps else round(state["seconds"])
                bar.refresh()
                total.zero_()
                marked, mark_step = time.perf_counter(), state["step"]
                if now - saved > 60 * args.save_minutes:                        # here the loss is known to be finite
                    save_checkpoint(ckpt, model, ema, optimizer, state)
                    saved = time.perf_counter()
    finally:
        signal.signal(signal.SIGINT, handler)
        bar.close()
        log.close()
    check(torch.isfinite(total), f"the loss is {total} at step {state['step']}; lower --lr")
    save_checkpoint(ckpt, model, ema, optimizer, state)
    if interrupted:
        sys.exit(f"stopped at step {state['step']}, saved in {ckpt}; --resume goes on from there")
    return ema


def pictures(model, out, seed):
    """samples.png: ten images of each of the first ten classes, a row a class; levels.png: one image a class, columns x_1 .. x_F."""
    c = model.config
    classes = min(c.num_classes, 10)
    labels = torch.arange(classes).repeat_interleave(10) if classes else 100
    levels = torch.cat([images for _, images in draw_images(model, labels, seed, return_levels=True)])
    save_grid(levels[:, -1], os.path.join(out, "samples.png"), 10)
    save_grid(levels[::10].flatten(0, 1), os.path.join(out, "levels.png"), len(c.levels))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", choices=DATA, default="digits")
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--paper", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    defaults = DATA[chosen.data]
    config = FARConfig.preset(chosen.preset or defaults["preset"], paper=chosen.paper)

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data", choices=DATA, default="digits", help="default: %(default)s")
    p.add_argument("--path", help="folder of --data folder; where --data cifar10 is or goes (default there: data)")
    p.add_argument("--preset", choices=PRESETS, help=f"default: {defaults['preset']}")
    p.add_argument("--paper", action="store_true", help="the paper's choices in place of the defaults")
    p.add_argument("--steps", type=int, help="stop after so many steps (default: no bound)")
    p.add_argument("--max-minutes", type=float, help=f"stop after so long (default: {defaults['max_minutes']:g}, none with --steps)")
    p.add_argument("--out", help=f"folder to write (default: out/{chosen.data})")
    p.add_argument("--resume", action="store_true", help="continue the run in --out; the model's settings come from there")
    p.add_argument("--overwrite", action="store_true", help="start again although --out holds a run")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    p.add_argument("--batch", type=int, default=defaults["batch"], help="images a step (default: %(default)s)")
    p.add_argument("--lr", type=float, default=defaults["lr"], help="learning rate (default: %(default)s)")
    p.add_argument("--lr-schedule", choices=("linear", "constant"), help="linear falls to 0 at the end of the run (default: linear with --max-minutes; constant with --steps alone, so that a run resumed with more steps equals one that never stopped)")
    p.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate (default: %(default)s)")
    p.add_argument("--weight-decay", type=float, default=0.02, help="default: %(default)s")
    p.add_argument("--clip", type=float, default=1.0, help="bound on the gradient's norm (default: %(default)s)")
    p.add_argument("--ema", type=float, default=defaults["ema"], help="decay of the averaged weights (default: %(default)s)")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=chosen.data != "digits", help="mirror half of the images")
    p.add_argument("--log-every", type=int, default=100, help="steps between lines of log.csv (default: %(default)s)")
    p.add_argument("--save-minutes", type=float, default=5.0, help="minutes between checkpoints (default: %(default)s)")
    group = p.add_argument_group("model settings (far.FARConfig); defaults as --data, --preset and --paper set them")
    for f in fields(FARConfig):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"default: {value}")
        else:
            kind = {"levels": numbers(float), "temperature": numbers(float), "head_steps": head_steps}.get(f.name, f.type)
            group.add_argument(flag, type=kind, choices=CHOICES.get(f.name) or (ORDERINGS if f.name == "ordering" else None), help=f"default: {value}")
    args = p.parse_args(argv)
    args.out = args.out or os.path.join("out", args.data)
    args.bf16 = args.device.startswith("cuda") if args.bf16 is None else args.bf16
    if args.max_minutes is None and args.steps is None:
        args.max_minutes = defaults["max_minutes"]
    args.lr_schedule = args.lr_schedule or ("linear" if args.max_minutes else "constant")
    args.overrides = {f.name: getattr(args, f.name) for f in fields(FARConfig) if getattr(args, f.name) is not None}
    if isinstance(args.overrides.get("levels"), float):
        args.overrides["levels"] = [args.overrides["levels"]]
    args.preset = args.preset or defaults["preset"]
    return args


def main(argv=None):
    args = parse_args(argv)
    ckpt = os.path.join(args.out, "ckpt.pt")
    for name in "steps max_minutes batch lr warmup log_every clip save_minutes".split():
        check(getattr(args, name) is None or getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0")
    check(0 <= args.ema < 1, f"--ema is {args.ema}; it must lie in [0, 1)")
    check(not (args.resume and args.overwrite), "--resume and --overwrite exclude each other")
    check(args.resume or args.overwrite or not os.path.exists(ckpt), f"{ckpt} exists: add --resume to continue it, --overwrite to start again, or choose another --out")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not usable here: {str(error).splitlines()[0]}") from None
    if args.resume:
        model, state = load_checkpoint(ckpt)
        check("optimizer" in state, f"{ckpt} holds weights alone and cannot be resumed")
        config = model.config
        for name, value in args.overrides.items():
            check(getattr(config, name) == (tuple(value) if name == "levels" else value), f"--{name.replace('_', '-')} {value} contradicts the run in {args.out}, which has {getattr(config, name)}")
        check((args.seed, args.batch) == (state["seed"], state["batch"]), f"the run in {args.out} has --seed {state['seed']} --batch {state['batch']}: give the same")
        check((args.steps or float("inf")) > state["step"] and (args.max_minutes or float("inf")) * 60 > state["seconds"],
              f"the run in {args.out} is finished, with {state['step']} steps in {state['seconds'] / 60:.1f} minutes: raise --steps or --max-minutes")
    else:
        config = FARConfig.preset(args.preset, args.paper, **args.overrides)
    if args.data == "digits":
        images, labels, classes = load_digits()
    elif args.data == "cifar10":
        images, labels, classes = load_cifar10(args.path or "data")
    else:
        images, labels, classes = load_folder(args.path, config.image_size, config.channels)
    check(images.shape[1:] == (config.channels, config.image_size, config.image_size),
          f"--data {args.data} has images of {list(images.shape[1:])}, the model takes [{config.channels}, {config.image_size}, {config.image_size}]: choose another --preset or --image-size and --channels")
    if config.num_classes != len(classes) and "num_classes" not in args.overrides and not args.resume:
        config = FARConfig.from_dict({**config.to_dict(), "num_classes": len(classes)})
    check(config.num_classes == 0 or config.num_classes >= len(classes), f"{len(classes)} classes of images, but num_classes is {config.num_classes}")
    check(args.batch <= len(images), f"--batch {args.batch} is more than the {len(images)} images")
    os.makedirs(args.out, exist_ok=True)
    model = train(args, config, images, labels)
    pictures(model, args.out, args.seed)
    print("wrote", *(os.path.join(args.out, name) for name in ("ckpt.pt", "log.csv", "samples.png", "levels.png")))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"train_cifar.py: {error}")
