"""Train FAR on digits, CIFAR-10, ImageNet-64, a folder of images or VAE latents; on a CPU, a GPU, or many (`torchrun --nproc_per_node=8 train_cifar.py ..`).

    python train_cifar.py --data digits                                   # two minutes on a laptop, writes out/digits/
    python train_cifar.py --data cifar10 --compile                        # downloads CIFAR-10 (14 minutes on an H100, days on a CPU); or --data folder --path DIR, with DIR/train/<class>/*.jpg
"""
import argparse, contextlib, copy, csv, functools, hashlib, itertools, json, os, pickle, resource, shutil, signal, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample
from far import FAR, FARConfig, ORDERINGS, PRESETS, check, dct
from sample import add_settings, count_flops, list_folder, load_checkpoint, load_ordering, load_vae, matmul_rate, read_image, seed_of, told, use_device, write_file

DATA = {  # data set -> default preset and training settings
    "digits": dict(preset="digits", batch=64, lr=3e-3, ema=0.999, max_minutes=2.0),
    **dict.fromkeys(("cifar10", "folder"), dict(preset="cifar", batch=512, lr=1e-3, warmup=500, ema=0.9995, steps=75500)),
    "imagenet64": dict(preset="imagenet64", batch=256, lr=4e-4, ema=0.9999, max_minutes=2880.0),
    "latents": dict(preset="far_b", batch=2048, lr=8e-4, ema=0.9999, max_minutes=2880.0),
}
SWEEPS = {  # name -> runs, each the flags of one; after a bar those of sample.py: the same model, trained once, drawn otherwise
    "orderings": [*(f"--ordering {name}" for name in ORDERINGS), "--ordering high_to_low", "--levels 1"],
    "targets": ["--target full", "--target next", "--target residual"],
    "levels": ["", " | --stops 0.25,1", "--levels 0.25,1", *(f"--levels {','.join(f'{(i + 1) / F:.3g}' for i in range(F))}{stops}" for F, stops in
               (*((F, "") for F in (1, 2, 4, 6, 8, 10)), *((10, f" | --stops {s}") for s in ("0.2,0.4,0.6,0.8,1", "0.3,0.6,1", "0.5,1", "1"))))],
    "components": ["", "--attention causal --levels-per-image 0", "--no-head-mixing", "--mask text", "--mask reference", "--loss-weighting",
                   " | --head-steps 16,32,48", " | --head-steps 48,32,16", " | --step-rule locked"],
    "diversity": [f"--target {target} --patch-size 2 --head-steps 8{head}{drawn}" for target, coupled in (("full", ("--coupling 0.1", "--coupling 0.3")), ("next", ()))
                  for head in ("", " --no-head-mixing") for drawn in ("", *(f" | {flags}" for flags in (*coupled, "--step-rule locked", "--temperature 1", "--temperature 1.1", "--guidance 2,1,1", "--guidance 1,2,2")))],
    **dict.fromkeys(("spectral_bias", "quantisation"), "tutorial.ipynb"),       # its cells that have the name as tag
}
DIGITS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.npz")
KEPT = "data seed batch steps max_minutes lr lr_schedule warmup weight_decay clip ema flip bf16 grad_accum".split()  # by a resumed run, unless told otherwise

# --- Data: load(path, config, skip_bad) -> images uint8 [n, C, H, H] (or the moments of latents), labels int64 [n], dict(classes=names, ..)
def load_digits(path=None, *_):
    """1,797 real 8 x 8 digits of the UCI optical recognition set, values 0..16 stored as 0..255."""
    check(not path, f"--path {path} is of no use with --data digits: add --data folder, cifar10, imagenet64 or latents")
    d = np.load(DIGITS)
    return torch.from_numpy(d["images"]).permute(0, 3, 1, 2), torch.from_numpy(d["labels"]), dict(classes=list("0123456789"))

def load_cifar10(path, *_):
    """The 50,000 training images through torchvision, downloaded to path (default data) if they are not there."""
    with told(f"CIFAR-10 cannot be loaded from {path or 'data'} or downloaded; offline: --data digits, or --data folder --path DIR"):
        data = torchvision.datasets.CIFAR10(path or "data", download=True)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), dict(classes=data.classes)

def digest(files, *more):
    """Changes when the names, sizes or times of the files do, or anything else given."""
    return hashlib.sha256(json.dumps([[(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files], more]).encode()).hexdigest()[:12]

def new_map(file, kind, shape):
    check((need := np.prod(shape, dtype=float) * np.dtype(kind).itemsize) < shutil.disk_usage(os.path.dirname(file) or ".").free, f"{file} needs {need / 1e9:.1f} GB, more than is free on the disk")
    return np.lib.format.open_memmap(file, "w+", kind, shape)

def leave_out(bad, files, skip_bad):                                            # those of the files that cannot be read: not all, and only if skip_bad
    check(not bad or skip_bad and len(bad) < len(files), f"{len(bad)} images cannot be read, first {', '.join(bad[:3])}: repair or remove them" + ", or add --skip-bad" * (not skip_bad))
    print(*(f"skipped {file}, which cannot be read\n" for file in bad), sep="", end="")

def memory_map(path, key, shape, chunks):
    """data/<name>-<size>-<place>/images.npy, uint8 [n, C, H, H], and labels-<key>.npy, int64 [n], of `chunks`: pairs of images [m, C, H, H] and m labels; built anew for another key."""
    folder = Path("data", f"{os.path.basename(os.path.abspath(path))}-{'x'.join(map(str, shape[1:]))}-{digest([], os.path.abspath(path))}")
    finished = folder / f"labels-{key}.npy"
    if not finished.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:            # its own: another run may do the same
            new = Path(part, folder.name)                                       # with the usual permissions, which `part` has not
            new.mkdir()
            array, labels = new_map(new / "images.npy", np.uint8, shape), []
            for images, more in chunks:
                array[len(labels):len(labels) + len(more)] = images
                labels += more
            array.flush(), np.save(new / finished.name, labels)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True), new.rename(folder)
    labels = torch.from_numpy(np.load(finished))
    return torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c")[:len(labels)]), labels

def load_folder(path, config, skip_bad=False):
    """Images path/train/<class>/*, decoded once in parallel."""
    check(config.channels in (1, 3), f"--channels is {config.channels}; images have 1 (grey) or 3 (colour)")
    data = list_folder(path, "--path")
    files, read = [file for file, _ in data.samples], functools.partial(read_image, size=config.image_size, channels=config.channels)
    def chunks():
        bad = []
        with ThreadPoolExecutor() as pool:
            for file, label, image in tqdm(zip(files, data.targets, pool.map(read, files)), total=len(files), desc="read images", unit="image"):
                bad += [file] if image is None else []
                if image is not None:
                    yield image[None], [label]
        leave_out(bad, files, skip_bad)
    return *memory_map(path, digest(files, skip_bad), (len(files), config.channels, config.image_size, config.image_size), chunks()), dict(classes=data.classes)

class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled dicts, lists, numbers, strings and numpy arrays, and refuses everything else: a pickle can hold any program."""
    def find_class(self, module, name):
        arrays = {(f"numpy.{core}.multiarray", part) for core in ("core", "_core") for part in ("_reconstruct", "scalar")}
        check((module, name) in arrays | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}, f"it asks for {module}.{name}")
        return super().find_class(module, name)

def load_imagenet64(path, config, skip_bad=False):
    """The official down-sampled ImageNet: path/train_data_batch_1 .. 10, pickled dicts with data uint8 [n, 12288] and labels 1..1000; or folders."""
    if os.path.isdir(os.path.join(path or "", "train")):
        return load_folder(path, config, skip_bad)
    files = [os.path.join(path or "", f"train_data_batch_{k}") for k in range(1, 11)]
    check(all(map(os.path.isfile, files)), f"--path {path} must hold train_data_batch_1 .. train_data_batch_10, or train/<class>/*.png")
    def chunks():
        for file in tqdm(files, desc="read batches"):
            with told(f"{file} is no batch of down-sampled ImageNet"), open(file, "rb") as f:
                batch = ArrayUnpickler(f).load()
                labels = [int(label) - 1 for label in batch["labels"]]
                check(batch["data"].dtype == np.uint8 and batch["data"].shape == (len(labels), 12288) and {*labels} <= {*range(1000)}, "data is not uint8 [n, 12288] or labels lie outside 1 .. 1000")
            yield batch["data"].reshape(-1, 3, 64, 64), labels
    most = sum(map(os.path.getsize, files)) // 12288                            # a little more than there are images
    return *memory_map(path, digest(files), (most, 3, 64, 64), chunks()), dict(classes=[str(k) for k in range(1, 1001)])

def cache_latents(root, name, out, size, device, skip_bad=False, batch=32):
    """Runs a diffusers AutoencoderKL once over root/train/<class>/* and the mirror images: out/moments.npy float16 [n, 2, 2c, h, w] (mean and log variance), labels.npy, and
    latents.json, written last. Shared out over the processes of torchrun; a restart does what is missing. Images that cannot be read: others take their places, if skip_bad."""
    data, vae, (rank, world) = list_folder(root, "--cache-latents"), load_vae(name, device), (dist.get_rank(), dist.get_world_size())
    files, labels = [file for file, _ in data.samples], np.array(data.targets)
    encode = torch.no_grad()(lambda x: vae.encode(x).latent_dist.parameters)
    key, shape = digest(files, name, size), (len(files), 2, *encode(torch.zeros(1, 3, size, size, device=device)).shape[1:])
    moments, finished = os.path.join(out, "moments.npy"), os.path.join(out, f"finished-{key}.npy")
    if rank == 0:
        os.makedirs(out, exist_ok=True), Path(out, "latents.json").unlink(missing_ok=True)  # not whole until the end
        if not os.path.exists(finished):
            for old in (*Path(out).glob("moments.npy"), *Path(out).glob("finished-*.npy")):
                old.unlink()
            new_map(moments, np.float16, shape), new_map(finished, np.uint8, shape[:1])
    dist.barrier()
    array, done = np.load(moments, mmap_mode="r+"), np.load(finished, mmap_mode="r+")
    missing = np.flatnonzero(done[rank::world] == 0) * world + rank
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(missing), batch), desc="encode", unit="batch", disable=rank > 0):
            part = missing[start:start + batch]
            images = list(pool.map(lambda i: read_image(files[i], size), part))
            x = torch.from_numpy(np.stack([np.zeros((3, size, size), np.uint8) if image is None else image for image in images])).to(device) / 127.5 - 1
            array[part] = torch.stack([encode(x), encode(x.flip(3))], 1).half().cpu().numpy()
            array.flush()
            done[part] = [image is not None for image in images]
    dist.barrier()
    if rank == 0:
        bad = np.flatnonzero(done == 0)
        leave_out([files[i] for i in bad], files, skip_bad)
        array[bad], labels[bad] = (a[np.resize(np.flatnonzero(done), len(bad))] for a in (array, labels))
        mean, log_variance = np.split(array[::max(1, len(files) // 5000)].astype(np.float64), 2, axis=2)
        scale = float((mean.var() + np.exp(log_variance.clip(-30, 20)).mean()) ** -0.5)  # gives latents variance 1
        np.save(os.path.join(out, "labels.npy"), labels)
        Path(out, "latents.json").write_text(json.dumps(dict(vae=name, scale=scale, classes=data.classes)))
        print(f"wrote {out}: {len(files) - len(bad)} images and their mirror images, moments {list(shape[2:])}, scale {scale:.4f}")

def load_latents(path, *_):
    with told(f"--path {path}: there is no whole latents.json; make it with --cache-latents IMAGES --vae NAME --path {path}"):
        info = json.loads(Path(path or "", "latents.json").read_text())
        check({"scale", "vae", "classes"} <= set(info), "it lacks scale, vae or classes")
    load_vae(info["vae"])                                                       # an error now, not after the training
    return torch.from_numpy(np.load(os.path.join(path, "moments.npy"), mmap_mode="c")), torch.from_numpy(np.load(os.path.join(path, "labels.npy"))), info

def make_batch(images, index, device, flip, scale=None):
    """Images of index [B] on device; `flip` mirrors half of them; latents (scale given) are drawn from their posterior."""
    x = images[index.to(images.device, non_blocking=True)]
    x = (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)
    mirror = torch.rand(len(x), 1, 1, 1, device=device) < (0.5 if flip else 0.0)
    if scale is None:
        return torch.where(mirror, x.flip(3), x)
    mean, log_variance = torch.where(mirror, x[:, 1], x[:, 0]).float().chunk(2, 1)
    return scale * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * torch.randn_like(mean))

@functools.lru_cache(1)
def epoch_order(n, epoch, seed):
    """The order [n] of an epoch: a fresh permutation that depends on epoch and seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))

# --- Training --------------------------------------------------------------------------------------------------------
def make_optimizer(model, lr, weight_decay):
    """AdamW (0.9, 0.95); weight decay on the weights of linear layers only: none on biases, norms and embeddings."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [[p for p in model.parameters() if (id(p) in decayed) == chosen] for chosen in (True, False)]
    return torch.optim.AdamW([dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)], lr=lr, betas=(0.9, 0.95), fused=True)

def train(args, config, images, labels, info):
    """Trains until --steps or --max-minutes; rank 0 keeps args.out/ckpt.pt and log.csv."""
    device, ckpt, rank, world = args.device, os.path.join(args.out, "ckpt.pt"), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)                                                # the same first weights on every rank
    model = FAR(config).to(device)
    model.set_scales(make_batch(images, torch.linspace(0, len(images) - 1, min(2000, len(images))).long(), device, False, info.get("scale")))
    ema, optimizer = copy.deepcopy(model).eval().requires_grad_(False), make_optimizer(model, args.lr, args.weight_decay)
    state = dict(step=0, seconds=0.0, log=[], latents={name: info[name] for name in ("vae", "scale") if name in info})
    if args.resume:
        ema, state = load_checkpoint(ckpt, device)
        model.load_state_dict(state.pop("model")), optimizer.load_state_dict(state.pop("optimizer"))
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
    state["settings"] = {name: getattr(args, name) for name in KEPT}
    few = make_batch(images, torch.zeros(len(config.levels)).long(), device, False, info.get("scale")), labels[:1].expand(len(config.levels)).to(device) if config.num_classes else None
    share = 3 * count_flops(torch.no_grad()(lambda: model(*few)))["Global"] / len(config.levels) / world / matmul_rate(device, torch.bfloat16 if args.bf16 else torch.float32)
    if args.checkpoint_activations:
        for block in itertools.chain(model.transformer.blocks, *model.head.blocks.values()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda" or not args.bf16)  # on a CPU its backward pass in bfloat16 is slow
    network = torch.compile(model, mode=None if args.grad_accum > 1 else "reduce-overhead") if args.compile else model  # CUDA graphs, whose gradients the next part would overwrite
    network = torch.nn.parallel.DistributedDataParallel(network, broadcast_buffers=False) if world > 1 else network
    if device.type == "cuda" and images.nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]:
        images, labels = images.to(device), labels.to(device)
    steps, limit = args.steps or float("inf"), 60 * args.max_minutes if args.max_minutes else float("inf")
    if args.overwrite and rank == 0:
        Path(ckpt).unlink(missing_ok=True)
    writer = csv.writer(log := open(os.path.join(args.out, "log.csv") if rank == 0 else os.devnull, "w", buffering=1, newline=""))
    writer.writerows([["step", "seconds", "images_per_second", "loss", *(f"level_{i + 1}" for i in range(len(config.levels)))], *state["log"]])
    bar = tqdm(total=args.steps or round(limit), unit="step" if args.steps else "s", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}", disable=rank > 0)
    interrupted, done, total, first_bad = [], False, torch.zeros((), device=device), torch.full((), torch.inf, device=device)
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, signal.default_int_handler)))  # Ctrl-C: finish the step, save, stop
    start, logged, saved = time.perf_counter() - state["seconds"], (state["step"], state["seconds"]), state["seconds"]
    while not done:
        torch.manual_seed(seed_of(args.seed, rank, state["step"]))              # a resumed run draws what it would have drawn
        progress = max(state["step"] / steps, state["seconds"] / limit)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (state["step"] + 1) / args.warmup) * (1 - progress if args.lr_schedule == "linear" else 1)
        epoch, k = divmod(state["step"], len(images) // args.batch)
        parts = epoch_order(len(images), epoch, args.seed)[k * args.batch:(k + 1) * args.batch].view(args.grad_accum, world, -1)[:, rank]
        optimizer.zero_grad(set_to_none=True)
        for n, index in enumerate(parts, 1):
            x = make_batch(images, index, device, args.flip, info.get("scale"))
            y = labels[index.to(labels.device, non_blocking=True)].to(device, non_blocking=True) if config.num_classes else None
            network.require_backward_grad_sync = n == len(parts)                # DDP averages gradients once a step
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = network(x, y) / len(parts)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        state["step"] += 1
        first_bad = torch.where((norm + total).isfinite(), first_bad, first_bad.clamp(max=state["step"]))
        optimizer.found_inf = first_bad.isfinite().float()                      # the fused step leaves the weights alone from there on
        optimizer.step()
        ema.average(model, min(args.ema, (1 + state["step"]) / (10 + state["step"])))
        clock = torch.tensor([time.perf_counter() - start, len(interrupted)], dtype=torch.float64)
        dist.broadcast(clock, 0)                                                # all ranks stop at the same step
        state["seconds"], stop = clock.tolist()
        done = state["step"] >= steps or state["seconds"] >= limit or stop > 0
        bar.update((state["step"] if args.steps else round(state["seconds"])) - bar.n)
        if done or state["step"] % args.log_every == 0:
            mean, count = total.cpu(), state["step"] - logged[0]
            dist.all_reduce(mean)
            mean, rate = mean.item() / world / count, count * args.batch / (state["seconds"] - logged[1])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                good = bool(np.isfinite(mean) and first_bad == torch.inf)
                by_level = (ema if good else model).level_losses(x[:128], None if y is None else y[:128]).tolist()
            bad = [i + 1 for i, value in enumerate(by_level) if not np.isfinite(value)]
            check(good and not bad, f"the loss or its gradient is not finite since step {min(first_bad.item(), state['step']):.0f}, levels {bad or 'unknown'}: lower --lr" + f"; {ckpt} holds the last good state, for --resume" * os.path.exists(ckpt))
            state["log"].append([state["step"], round(state["seconds"], 1), round(rate, 1), round(mean, 5), *(round(value, 5) for value in by_level)])
            writer.writerow(state["log"][-1])
            bar.set_postfix_str(f"step {state['step']}, loss {mean:.4f}, {rate:.0f} images/s, {100 * rate * share:.0f} % of peak", refresh=False)
            total.zero_()
            if rank == 0 and (done or state["seconds"] - saved > 60 * args.save_minutes):
                kept = dict(state, config=config.to_dict(), model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
                write_file(ckpt, lambda f: torch.save(kept, f))                 # whole or not there, and its loss finite
                saved = state["seconds"]
            logged = state["step"], time.perf_counter() - start                 # the rate leaves out what logging takes
    bar.close(), log.close()
    if interrupted:
        sys.exit(f"stopped at step {state['step']}, saved in {ckpt}; --resume goes on from there")
    if rank == 0:
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"wrote {ckpt} and {log.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {rate:.3g} images/s, peak memory {memory / 2 ** 30:.2f} GiB")

# --- Command line ----------------------------------------------------------------------------------------------------
def sweep(name, argv, device):
    """Does the runs of SWEEPS[name], each with seeds 0, 1, 2, and compares their samples with the digits: see --sweep."""
    if SWEEPS[name] == "tutorial.ipynb":
        cells = json.loads(Path(__file__).with_name("tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
        return exec("\n".join("".join(cell["source"]) for cell in cells if name in cell["metadata"].get("tags", [])), {})
    ORDERINGS["high_to_low"] = lambda x, keep: x - dct(x, 1 - keep)             # the control that should lose
    rows, logs, key = [], {}, digest([], argv)                                  # other flags, other runs
    for flags, seed in itertools.product(SWEEPS[name], "012"):
        run, _, drawn = flags.partition(" | ")
        out = Path("out", name, run.replace("--", "").replace(" ", "_") + f"_seed_{seed}_{key}")
        file, common = out / f"scores{drawn.replace(' ', '_')}.json", ["--seed", seed, "--out", str(out), "--device", device]
        if not (out / "scores.json").exists():
            main([*argv, *run.split(), "--data", "digits", "--overwrite", *common])
        if not file.exists():
            file.write_text(json.dumps(sample.main(["--ckpt", str(out / "ckpt.pt"), "--n", "1797", "--real", DIGITS, *common, *drawn.split()])))
        logs[run or "default"] = np.loadtxt(out / "log.csv", delimiter=",", skiprows=1, ndmin=2)
        rows.append(dict(run=flags.strip(" |") or "default", seed=seed, **json.loads(file.read_text())))
    with open(f"out/{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, max(rows, key=len))
        writer.writeheader(), writer.writerows(rows)
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(12, 1 + 0.3 * len(SWEEPS[name])), layout="constrained")
    for axis, metric in zip(axes, ("fd", "precision", "recall", "class_acc")):
        axis.plot([row[metric] for row in rows], [row["run"] for row in rows], "o", alpha=0.6), axis.set_title(metric), axis.grid(alpha=0.3)
    axes[0].invert_yaxis(), figure.savefig(f"out/{name}.png")
    figure, axes = plt.subplots(1, len(logs), sharey=True, squeeze=False, figsize=(3 * len(logs), 3), layout="constrained")
    for axis, (run, log) in zip(axes[0], logs.items()):                         # loss of each level over training, seed 2
        axis.plot(log[:, 0], log[:, 4:], label=[f"level {i}" for i in range(1, log.shape[1] - 3)]), axis.set_title(run.replace(" --", "\n--"), fontsize=8), axis.legend(fontsize=6)
    figure.supxlabel("step"), figure.supylabel("loss"), figure.savefig(f"out/{name}_loss.png")
    print(f"wrote out/{name}.csv, out/{name}.png and out/{name}_loss.png")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False)
    p.add_argument("--data", choices=DATA, default="digits", help="default: %(default)s")
    p.add_argument("--preset", choices=PRESETS, help="default: what fits --data")
    p.add_argument("--paper", action="store_true", help="the paper's choices in place of the defaults")
    p.add_argument("--out", help="folder to write (default: out/ and the name of the data)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out; settings come from there (give --path again), whatever --preset and --paper say; --steps or --max-minutes may be raised")
    chosen, _ = p.parse_known_args(argv)                                        # sets the defaults of what follows
    ckpt, defaults = os.path.join(chosen.out or os.path.join("out", chosen.data), "ckpt.pt"), DATA[chosen.data]
    config = FARConfig.preset(chosen.preset or defaults["preset"], chosen.paper)
    p.add_argument("-h", "--help", action="help")
    p.add_argument("--path", help="folder of the data; where --data cifar10 is or goes (default there: data)")
    p.add_argument("--cache-latents", metavar="DIR", help="encode DIR/train/<class>/* with --vae into --path, for --data latents; trains nothing")
    p.add_argument("--vae", help="name or folder of a diffusers AutoencoderKL")
    p.add_argument("--steps", type=int, help=f"stop after so many steps (default: {defaults.get('steps')}, none with --max-minutes)")
    p.add_argument("--max-minutes", type=float, help=f"stop after so long (default: {defaults.get('max_minutes')}, none with --steps)")
    p.add_argument("--sweep", choices=SWEEPS, help="an experiment on digits: several runs, scored, in out/NAME.csv and out/NAME.png; started again, it does what is missing")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    p.add_argument("--lr-schedule", choices=("linear", "constant"), default="linear", help="linear (default) falls to 0 at the end")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA, and on a CPU that multiplies so twice as fast, but for digits)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=chosen.data != "digits", help="mirror half of the images (default: %(default)s)")
    for name, text in (("overwrite", "start again although --out holds a run"), ("skip-bad", "leave out images that cannot be read"),
                       ("compile", "torch.compile the model, on a GPU into CUDA graphs (unless --grad-accum)"), ("checkpoint-activations", "less memory, a third more arithmetic")):
        p.add_argument("--" + name, action="store_true", help=text)
    for name, default, text in (("batch", defaults["batch"], "images a step, over all processes"), ("grad_accum", 1, "parts that a process splits its share of a batch into"),
                                ("seed", 0, "of weights, order and noise"), ("lr", defaults["lr"], "learning rate"), ("warmup", defaults.get("warmup", 100), "steps of rising learning rate"),
                                ("weight_decay", 0.02, "of AdamW"), ("clip", 1.0, "bound on the gradient's norm"), ("ema", defaults["ema"], "decay of the averaged weights"),
                                ("log_every", 100, "steps between lines of log.csv"), ("save_minutes", 5.0, "minutes between checkpoints, saved at the next line of log.csv")):
        p.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=f"{text} (default: %(default)s)")
    add_settings(p.add_argument_group("model settings (far.FARConfig); defaults as --data, --preset and --paper set them"), [f.name for f in fields(FARConfig)], config)
    args, kept, state = p.parse_args(argv), defaults, dict(step=0, seconds=0.0)
    load_ordering(args.ordering or "", 0 if args.resume else args.image_size or config.image_size, args.channels or config.channels)
    if args.resume:
        model, state = load_checkpoint(ckpt)
        check({"optimizer", "settings"} <= set(state), f"{ckpt} holds weights alone and cannot be resumed")
        config, kept = model.config, state["settings"]
        p.set_defaults(**{name: value for name, value in kept.items() if name not in ("steps", "max_minutes")})
        args = p.parse_args(argv)
        for name in ("data", "seed", "batch"):
            check(getattr(args, name) == kept[name], f"the run of {ckpt} has --{name} {kept[name]}")
    if args.steps is None and args.max_minutes is None:
        args.steps, args.max_minutes = kept.get("steps"), kept.get("max_minutes")
    check(not args.resume or (args.steps or float("inf")) > state["step"] and (args.max_minutes or float("inf")) * 60 > state["seconds"],
          f"the run of {ckpt} is finished, with {state['step']} steps in {state['seconds'] / 60:.1f} minutes: raise --steps or --max-minutes")
    args.out, args.given = os.path.dirname(ckpt), {f.name: getattr(args, f.name) for f in fields(FARConfig) if getattr(args, f.name) is not None}
    args.config = replace(config, **args.given)
    for name in args.given if args.resume else ():
        check(getattr(args.config, name) == getattr(config, name), f"--{name.replace('_', '-')} contradicts the run in {args.out}, which has {getattr(config, name)}")
    return args

def main(argv=None):
    args = parse_args(argv)
    if args.sweep:
        return sweep(args.sweep, [flag for flag in (sys.argv[1:] if argv is None else argv) if flag not in ("--sweep", args.sweep, f"--sweep={args.sweep}")], args.device)
    config, ckpt, world = args.config, os.path.join(args.out, "ckpt.pt"), int(os.environ.get("WORLD_SIZE", 1))
    check(not (args.resume and args.overwrite), "--resume and --overwrite exclude each other")
    for name in "steps max_minutes batch grad_accum lr warmup log_every clip save_minutes".split():
        check(getattr(args, name) is None or 0 < getattr(args, name) < 1e9, f"--{name.replace('_', '-')} must be above 0 and below 1e9")
    check(0 <= args.ema < 1 and 0 <= args.seed < 2 ** 63 and args.weight_decay >= 0, "--ema must lie in [0, 1), --seed in [0, 2^63), and --weight-decay be at least 0")
    check(config.cond_dim == 0, "--cond-dim is for models that are trained from Python with embeddings; the data here has classes")
    check(args.cache_latents or args.batch % (args.grad_accum * world) == 0, f"--batch {args.batch} is not divisible by --grad-accum {args.grad_accum} times {world} processes")
    check(args.resume or args.overwrite or args.cache_latents or not os.path.exists(ckpt), f"{ckpt} exists: add --resume to continue it, --overwrite to start again, or choose another --out")
    args.device = use_device(args.device)
    if not dist.is_initialized():                                               # a single process is a group of one
        dist.init_process_group("cpu:gloo,cuda:nccl" if world > 1 and args.device.type == "cuda" else "gloo", timeout=timedelta(hours=12), **({} if world > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)))
    if args.cache_latents:
        check(args.vae and args.path, "--cache-latents needs --vae, a name or folder, and --path, the folder to write")
        return cache_latents(args.cache_latents, args.vae, args.path, args.image_size or 256, args.device, args.skip_bad)
    args.bf16 = args.bf16 if args.bf16 is not None else args.device.type == "cuda" or args.data != "digits" and matmul_rate(args.device, torch.bfloat16) > 2 * matmul_rate(args.device, torch.float32)
    for turn in range(2):                                                       # rank 0 first: it builds what the others map
        if turn == min(dist.get_rank(), 1):
            images, labels, info = globals()["load_" + args.data](args.path, config, args.skip_bad)
        dist.barrier()
    shape, takes = [images.shape[2] // 2, *images.shape[3:]] if "scale" in info else list(images.shape[1:]), [config.channels, config.image_size, config.image_size]
    check(shape == takes, f"--data {args.data} has images of {shape}, the model takes {takes}: choose another --preset or --image-size and --channels")
    classes = len(info["classes"])
    config = config if args.resume or "num_classes" in args.given else replace(config, num_classes=classes)
    check(config.num_classes == 0 or config.num_classes >= classes, f"{classes} classes of images, but num_classes is {config.num_classes}")
    check(args.batch <= len(images), f"--batch {args.batch} is more than the {len(images)} images")
    os.makedirs(args.out, exist_ok=True)
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        afterwards.callback(torch.backends.cuda.enable_flash_sdp, True)
        train(args, config, images, labels, info)
    if dist.get_rank() == 0:
        sample.main(["--ckpt", ckpt, "--out", args.out, "--seed", str(args.seed), "--device", str(args.device)])

if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"train_cifar.py: {str(error) or 'stopped'}")
