"""Train FAR on digits, CIFAR-10, ImageNet-64 or your images; on a CPU, a GPU, or many.

    python train_cifar.py --data digits                # two minutes on a laptop: out/digits/
    python train_cifar.py --data cifar10 --compile     # downloads CIFAR-10
    python train_cifar.py --data folder --path DIR     # DIR/train/<class>/*.jpg
    python train_cifar.py --data folder --path DIR --vae NAME    # latents of a VAE
    python train_cifar.py --data captions --path DIR --text-encoder NAME    # DIR/metadata.jsonl
    torchrun --nproc_per_node=8 train_cifar.py ..      # on 8 GPUs

The method is in far.py; the loop below is `train`, and one step of it `Run.step`.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from far import FAR, ORDERINGS, PRESETS, FARConfig, check, distinct_levels
from sample import (
    TextEncoder,
    add_settings,
    calls_per_second,
    choose_threads,
    explained,
    flag_of,
    list_folder,
    load_checkpoint,
    load_ordering,
    load_vae,
    new_parser,
    read_image,
    seed_of,
    spread,
    stopped_in_a_sentence,
    use_device,
    write_file,
)

try:  # not there on Windows
    import fcntl
    import resource
except ImportError:
    fcntl = resource = None

# ==== Settings of a run; a resumed one takes them from its checkpoint
DEFAULTS = dict(
    data="digits",
    preset=None,
    paper=False,
    path=None,
    vae=None,
    text_encoder=None,
    seed=0,
    steps=None,
    max_minutes=None,
    lr_schedule="linear",
    warmup=100,
    weight_decay=0.02,
    clip=1.0,
    flip=True,
    bf16=None,
    threads=None,
    grad_accum=1,
)
CIFAR = dict(preset="cifar", batch=512, lr=1e-3, warmup=500, ema=0.9995, steps=75500)
LONG = dict(ema=0.9999, max_minutes=2880.0)
DATA = {  # what differs by data set
    "digits": dict(preset="digits", batch=64, lr=3e-3, ema=0.999, max_minutes=2.0, flip=False),
    "cifar10": CIFAR,
    "folder": CIFAR,
    "captions": dict(CIFAR, flip=False),  # left is not right
    "imagenet64": dict(LONG, preset="imagenet64", batch=256, lr=4e-4),
}
WITH_VAE = dict(LONG, preset="far_b", batch=2048, lr=8e-4)
KEPT = (*DEFAULTS, "batch", "lr", "ema")  # in the checkpoint

DIGITS = os.path.join(sample.ROOT, "assets", "digits.npz")


# ==== Data sets
class Data(NamedTuple):
    """Images, in memory or mapped from disk, their labels, and the names of the classes.

    With captions the labels are their numbers, and their embeddings belong to the data.
    """

    # uint8 [n, C, H, H]. Of latents mean and log variance, for the image and its mirror image:
    # float16 [n, 2, 2 C, H, H].
    images: torch.Tensor
    labels: torch.Tensor  # int64 [n]; of captions [n, M], -1 where an image has fewer than M
    classes: list
    latents: dict = None  # of latents: the name of the VAE, and a scale
    embeddings: torch.Tensor = None  # of captions: float16 [captions, K, cond_dim]
    text: dict = None  # of captions: the name of the encoder, a scale, and a few of them


def load_data(args, config):
    """The data set of --data."""
    listing = list_classes
    if args.data == "captions":
        encoder = TextEncoder(args.text_encoder, args.device)  # an error now, not after the images
        listing = list_captions
    # All processes share the work of the VAE and of the text encoder.
    if args.vae:
        data = load_latents(args.path, args.vae, config, args.device, args.skip_bad, listing)
    else:
        data = load_images(args, config, listing)
    if args.data == "captions":
        return encode_captions(data, encoder, args)
    return data


def load_images(args, config, listing):
    """The images of --data. Several processes: the first builds what the others map."""
    rank, _ = processes()
    if rank > 0:
        wait_for_all()
    if args.data == "digits":
        data = load_digits()
    elif args.data == "cifar10":
        data = load_cifar10(args.path or "data")
    elif args.data == "imagenet64" and not os.path.isdir(os.path.join(args.path, "train")):
        data = load_imagenet64(args.path)
    else:
        data = load_folder(args.path, config, args.skip_bad, listing)
    if rank == 0:
        wait_for_all()
    return data


def load_digits():
    """1,797 real 8 x 8 digits of the UCI optical recognition set; values 0..16 become 0..255."""
    file = np.load(DIGITS)
    images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
    return Data(images, torch.from_numpy(file["labels"]), list("0123456789"))


def load_cifar10(path):
    """The 50,000 training images through torchvision, downloaded to path if they are not there."""
    offline = "offline: --data digits, or --data folder --path DIR"
    with explained(f"CIFAR-10 cannot be loaded from {path} or downloaded; {offline}"):
        data = torchvision.datasets.CIFAR10(path, download=True)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return Data(images, torch.tensor(data.targets), data.classes)


def list_classes(path):
    """Images path/train/<class>/* -> (files, labels, classes)."""
    return list_folder(os.path.join(path, "train"))


def load_folder(path, config, skip_bad=False, listing=list_classes):
    """Images of a folder, decoded once, in parallel, into a map under data/.

    listing(path) -> (files, label of each, names of the labels).
    """
    C, H = config.channels, config.image_size
    check(C in (1, 3), f"--channels is {C}; images have 1 (grey) or 3 (colour)")
    files, labels, classes = listing(path)
    read = functools.partial(read_image, size=H, channels=C)

    def chunks():
        bad = []
        with ThreadPoolExecutor() as pool:
            images = pool.map(read, files)
            bar = tqdm(images, total=len(files), desc="read images", unit="image")
            for number, image in enumerate(bar):
                if image is None:
                    bad.append(files[number])
                else:
                    yield image[None], [number]
        leave_out(bad, files, skip_bad)

    # The map keeps which file an image is from: labels can change, and the images stay.
    folder = map_folder(path, f"images-{C}x{H}")
    key = digest(files, skip_bad)
    images, numbers = build_map(folder, key, (len(files), C, H, H), chunks())
    return Data(images, torch.tensor(labels)[numbers], classes)


# What a pickle of arrays may ask for; the core of numpy has another name since version 2.
IN_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and arrays alone: a pickle can hold any program."""

    def find_class(self, module, name):
        check((module, name) in IN_ARRAYS, f"it asks for {module}.{name}")
        return super().find_class(module, name)


def load_imagenet64(path):
    """The official down-sampled ImageNet: train_data_batch_1 .. 10, in a map under data/.

    They are pickled dicts: data uint8 [n, 12288], labels 1 .. 1000.
    """
    files = [os.path.join(path, f"train_data_batch_{k}") for k in range(1, 11)]
    there = all(os.path.isfile(file) for file in files)
    wanted = "train_data_batch_1 .. train_data_batch_10, or train/<class>/*.png"
    check(there, f"--path {path} must hold {wanted}")

    def chunks():
        for file in tqdm(files, desc="read batches"):
            yield read_batch(file)

    # A little more than there are images.
    most = sum(os.path.getsize(file) for file in files) // 12288
    folder = map_folder(path, "3x64")
    images, labels = build_map(folder, digest(files), (most, 3, 64, 64), chunks())
    return Data(images, labels, [str(k) for k in range(1000)])


def read_batch(file):
    """A batch of down-sampled ImageNet -> (images uint8 [n, 3, 64, 64], list of n labels)."""
    with explained(f"{file} is no batch of down-sampled ImageNet"), open(file, "rb") as f:
        batch = ArrayUnpickler(f).load()
        images = batch["data"]
        labels = [int(label) - 1 for label in batch["labels"]]
        good = images.dtype == np.uint8 and images.shape == (len(labels), 12288)
        check(good, "its data are not uint8 [n, 12288]")
        check(set(labels) <= set(range(1000)), "its labels lie outside 1 .. 1000")
    return images.reshape(-1, 3, 64, 64), labels


# ==== Maps on disk
def digest(files, *more):
    """Changes when the names, sizes or times of the files do, or anything else given."""
    stats = []
    for file in files:
        stat = os.stat(file)
        stats.append((os.path.abspath(file), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps([stats, more]).encode()).hexdigest()[:12]


def map_folder(path, what):
    """The folder under data/ that is for what is made of path."""
    place = os.path.abspath(path)
    return Path("data", f"{os.path.basename(place)}-{what}-{digest([], place)}")


def new_map(file, kind, shape):
    """A new .npy file, mapped for writing, if there is room for it on the disk."""
    need = np.prod(shape, dtype=float) * np.dtype(kind).itemsize
    room = shutil.disk_usage(os.path.dirname(file)).free
    check(need < room, f"{file} needs {need / 1e9:.1f} GB, more than is free on the disk")
    return np.lib.format.open_memmap(file, "w+", kind, shape)


def leave_out(bad, files, skip_bad):
    """Files that cannot be read are an error, or with skip_bad named, unless they are all."""
    advice = "repair or remove them"
    if not skip_bad:
        advice += ", or add --skip-bad"
    first = ", ".join(bad[:3])
    good = not bad or (skip_bad and len(bad) < len(files))
    check(good, f"{len(bad)} images cannot be read, first {first}: {advice}")
    for file in bad:
        print(f"skipped {file}, which cannot be read")


def open_map(file, finished, shape):
    """Maps a .npy file, float16 of that shape, and one that says what of it is done, uint8 [n].

    The processes fill them together, and a restart goes on. Without the second, which has a name of
    its own for each state of the sources, both are made anew.
    """
    rank, _ = processes()
    if rank == 0 and not finished.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("*.npy"):
            old.unlink()
        new_map(file, np.float16, shape)
        new_map(finished, np.uint8, shape[:1])
    wait_for_all()
    return np.load(file, mmap_mode="r+"), np.load(finished, mmap_mode="r+")


def my_share(done):
    """The numbers of what is not done and this process does: of four, the third 2, 6, 10, .."""
    rank, world = processes()
    return np.flatnonzero(done[rank::world] == 0) * world + rank


def build_map(folder, key, shape, chunks):
    """folder/images.npy uint8 [n, C, H, H] and labels-<key>.npy, mapped: (images, labels).

    chunks: pairs of images [m, C, H, H] and m labels, of at most shape[0] images together. They are
    read where the key is another one than before; nothing is there before all is.
    """
    finished = folder / f"labels-{key}.npy"
    if not finished.exists():
        folder.parent.mkdir(exist_ok=True)
        # A place of its own: another run may do the same.
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            new = Path(place, folder.name)  # with the usual permissions, which `place` has not
            new.mkdir()
            array = new_map(new / "images.npy", np.uint8, shape)
            labels = []
            for images, more in chunks:
                array[len(labels) : len(labels) + len(more)] = images
                labels += more
            array.flush()
            np.save(new / finished.name, labels)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    new.rename(folder)
                except OSError:  # right if the other run has just been faster
                    if not finished.exists():
                        raise
    labels = torch.from_numpy(np.load(finished))
    images = np.load(folder / "images.npy", mmap_mode="c")  # never written to
    return torch.from_numpy(images[: len(labels)]), labels


# ==== Latents of a VAE
def load_latents(path, name, config, device, skip_bad=False, listing=list_classes):
    """Latents of the images of a folder and of the mirror images, encoded once, by all processes.

    name: a diffusers AutoencoderKL. The images are cropped and resized so that their latents have
    the side config.image_size. A map under data/ keeps mean and log variance, and which are done: a
    restart does what is missing. listing: as in `load_folder`.
    """
    files, labels, classes = listing(path)
    labels = np.array(labels)
    vae = load_vae(name, device)
    few = encode(vae, torch.zeros(1, 3, 64, 64, device=device))
    size = config.image_size * 64 // few.shape[-1]  # of the images, in pixels
    shape = encode(vae, torch.zeros(1, 3, size, size, device=device)).shape[1:]
    folder = map_folder(path, f"latents-{digest([], name)}-{size}")
    finished = folder / f"finished-{digest(files)}.npy"
    array, done = open_map(folder / "moments.npy", finished, (len(files), 2, *shape))
    encode_missing(vae, files, size, device, array, done)
    wait_for_all()

    good, bad = np.flatnonzero(done), np.flatnonzero(done == 0)
    rank, _ = processes()
    if rank == 0:
        leave_out([files[i] for i in bad], files, skip_bad)
    # The last images move to the places of those that cannot be read.
    holes, last = bad[bad < len(good)], good[good >= len(good)]
    labels[holes] = labels[last]
    if rank == 0 and len(holes):
        array[holes] = array[last]
        array.flush()
    wait_for_all()
    array = array[: len(good)]
    latents = dict(vae=name, scale=latent_scale(array))
    return Data(torch.from_numpy(array), torch.from_numpy(labels[: len(good)]), classes, latents)


@torch.no_grad()
def encode(vae, x):
    """Images [n, 3, H, H] -> mean and log variance of their latents, [n, 2 c, h, h]."""
    return vae.encode(x).latent_dist.parameters


def encode_missing(vae, files, size, device, array, done, batch=32):
    """Encodes this process's share of the files that are not done yet."""
    rank, _ = processes()
    missing = my_share(done)
    black = np.zeros((3, size, size), np.uint8)
    starts = range(0, len(missing), batch)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(starts, desc="encode", unit="batch", disable=rank > 0):
            part = missing[start : start + batch]
            images = list(pool.map(lambda i: read_image(files[i], size), part))
            whole = [black if image is None else image for image in images]
            x = torch.from_numpy(np.stack(whole)).to(device) / 127.5 - 1
            moments = torch.stack([encode(vae, x), encode(vae, x.flip(3))], 1)
            array[part] = moments.half().cpu().numpy()
            array.flush()
            done[part] = [image is not None for image in images]
            done.flush()


def latent_scale(array):
    """The factor that gives latents variance 1, from at most 5,000 images."""
    few = array[:: max(1, len(array) // 5000)].astype(np.float64)
    mean, log_variance = np.split(few, 2, axis=2)
    variance = mean.var() + np.exp(log_variance.clip(-30, 20)).mean()
    return float(variance**-0.5)


# ==== Captions
def find_metadata(path):
    """The file metadata.jsonl in path or in path/train."""
    places = [os.path.join(path, "metadata.jsonl"), os.path.join(path, "train", "metadata.jsonl")]
    there = [place for place in places if os.path.isfile(place)]
    check(there, f"neither {places[0]} nor {places[1]} is a file: lines of file_name and text")
    return there[0]


def list_captions(path):
    """Images and captions of a metadata.jsonl -> (files, labels, captions).

    A line holds file_name, from where it lies, and text, a caption or a list of them: Hugging
    Face's ImageFolder. captions: each once. labels: the numbers of the captions of each image, M of
    them, -1 where it has fewer.
    """
    metadata = find_metadata(path)
    files, labels = [], []
    numbers = {}  # caption -> its number
    with open(metadata, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with explained(f"{metadata}, line {n} cannot be used"):
                file, texts = read_entry(line, os.path.dirname(metadata))
            files.append(file)
            labels.append([numbers.setdefault(text, len(numbers)) for text in texts])
    check(files, f"{metadata} is empty")
    most = max(map(len, labels))
    labels = [label + [-1] * (most - len(label)) for label in labels]
    return files, labels, list(numbers)


def read_entry(line, folder):
    """A line of a metadata.jsonl in a folder -> (file, list of captions)."""
    entry = json.loads(line)
    good = isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    check(good, "it has no file_name")
    file = os.path.join(folder, entry["file_name"])
    check(os.path.isfile(file), f"{file} is not a file")
    texts = entry.get("text")
    if isinstance(texts, str):
        texts = [texts]
    good = isinstance(texts, list) and len(texts) > 0
    check(good, "it has no text, a caption or a list of them")
    good = all(isinstance(text, str) and text.strip() for text in texts)
    check(good, "a caption is empty")
    return file, texts


def encode_captions(data, encoder, args):
    """The data with embeddings of the captions, encoded once, by all processes.

    A map under data/ keeps them, and which are done: a restart does what is missing.
    """
    name, captions = args.text_encoder, data.classes
    K = choose_tokens(encoder, captions, args)
    cond_dim = encoder(captions[:1], K).shape[-1]
    weights = []  # other weights in a folder of the same name are another encoder
    if os.path.isdir(name):
        weights = sorted(str(file) for file in Path(name).iterdir() if file.is_file())
    folder = map_folder(args.path, f"text-{digest([], name)}-{K}")
    finished = folder / f"finished-{digest(weights, captions)}.npy"
    shape = (len(captions), K, cond_dim)
    array, done = open_map(folder / "embeddings.npy", finished, shape)
    encode_missing_captions(encoder, captions, array, done)
    wait_for_all()
    few = [captions[i] for i in spread(len(captions), min(10, len(captions)))]
    text = dict(encoder=name, scale=text_scale(array), captions=few)
    return data._replace(classes=[], embeddings=torch.from_numpy(array), text=text)


# The transformer reads all tokens of a caption: no more than this, unless more are asked for.
MOST_TOKENS = 128


def choose_tokens(encoder, captions, args):
    """K: the longest caption's number of tokens, or what --cond-tokens says."""
    lengths = encoder.lengths(captions)
    # Rounded up to a multiple of 8: a prompt may be a little longer than all captions.
    K = min(math.ceil(max(lengths) / 8) * 8, MOST_TOKENS, encoder.most)
    if args.resume or "cond_tokens" in args.given:
        K = args.config.cond_tokens
    least = 1 + encoder.tokenizer.num_special_tokens_to_add()
    good = least <= K <= encoder.most
    check(good, f"--cond-tokens is {K}; {args.text_encoder} reads {least} to {encoder.most}")
    longer = sum(length > K for length in lengths)
    rank, _ = processes()
    if longer and rank == 0:
        print(f"{longer:,} of {len(lengths):,} captions have more than {K} tokens and are cut")
    return K


def encode_missing_captions(encoder, captions, array, done, batch=256):
    """Encodes this process's share of the captions that are not done yet."""
    rank, _ = processes()
    missing = my_share(done)
    starts = range(0, len(missing), batch)
    for start in tqdm(starts, desc="encode captions", unit="batch", disable=rank > 0):
        part = missing[start : start + batch]
        texts = [captions[i] for i in part]
        array[part] = encoder(texts, array.shape[1]).half().cpu().numpy()
        array.flush()
        done[part] = 1
        done.flush()


def text_scale(array):
    """The factor that gives the tokens of captions deviation 1, from at most 5,000 captions."""
    few = array[:: max(1, len(array) // 5000)]
    tokens = few[few.any(2)].astype(np.float32)  # without what stands behind the last token
    scale = float(1 / tokens.std())
    check(0 < scale < math.inf, "embeddings of captions are not finite in float16, or all alike")
    return scale


def pick_embeddings(data, index, device):
    """Embeddings [B, K, cond_dim] of one caption of each image of index [B], drawn at random."""
    labels = data.labels[index]  # [B, M]
    count = (labels >= 0).sum(1)
    chosen = (torch.rand(len(labels), device=labels.device) * count).long()
    numbers = labels.gather(1, chosen[:, None])[:, 0]
    embeddings = data.embeddings[numbers].to(device, non_blocking=True)
    return data.text["scale"] * embeddings.float()


# ==== Batches
def make_batch(data, index, device, flip):
    """Images of index [B] on the device, half of them mirrored if flip; latents are drawn anew."""
    x = data.images[index]
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    share = 0.5 if flip else 0.0
    mirror = torch.rand(len(x), 1, 1, 1, device=device) < share
    if not data.latents:
        return torch.where(mirror, x.flip(3), x)
    mean, log_variance = torch.where(mirror, x[:, 1], x[:, 0]).float().chunk(2, 1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
    return data.latents["scale"] * (mean + deviation * torch.randn_like(mean))


@functools.lru_cache(1)
def epoch_order(n, epoch, seed, device="cpu"):
    """The order [n] of an epoch: a permutation that depends on epoch and seed alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(n, generator=generator).to(device)


# ==== Processes and speed
def processes():
    """(the rank of this process, the number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def join_processes(device):
    """Meets the other processes of torchrun, if there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":  # clock and losses, which all agree on, lie on the CPU
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=12))


def count_flops(function):
    """Floating-point operations of a call, two for each multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@functools.cache
def matmul_rate(device, dtype):
    """Floating-point operations per second of a large matrix product: the machine's peak."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 * calls_per_second(functools.partial(torch.mm, a, a), device)


def bf16_pays(args):
    """On CUDA, and on a CPU that multiplies twice as fast in bfloat16, but for digits."""
    if args.device.type == "cuda":
        return True
    if args.device.type != "cpu" or args.data == "digits":
        return False
    fast = matmul_rate(args.device, torch.bfloat16)
    return fast > 2 * matmul_rate(args.device, torch.float32)


def peak_memory(device):
    """Bytes, or None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ==== Training
def make_optimizer(model, lr, weight_decay):
    """AdamW; weight decay on the weights of linear layers: none on biases, norms, embeddings."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    spared = [p for p in model.parameters() if id(p) not in linear]
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=spared, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run: the model, its average, the optimizer, and how far they have come."""

    def __init__(self, args, config, data):
        self.args, self.config, self.data = args, config, data
        self.device = args.device
        self.rank, self.world = processes()
        torch.manual_seed(args.seed)  # the same first weights in every process
        self.model = FAR(config).to(self.device)
        self.model.set_units(self.few_images(2000)[0])
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, args.lr, args.weight_decay)
        self.state = dict(step=0, seconds=0.0, log=[], classes=data.classes)
        self.state.update(latents=data.latents, text=data.text)
        if args.resume:
            self.restore()
        self.set_threads()
        self.peak_share = self.share_of_peak()
        self.state["settings"] = {name: getattr(args, name) for name in KEPT}
        self.to_device()
        self.network = self.wrap()

        self.max_steps = args.steps or float("inf")
        self.max_seconds = 60 * (args.max_minutes or float("inf"))
        # Summed and compared on the device: no step waits for it.
        self.total = torch.zeros((), device=self.device)
        self.first_bad = torch.full((), torch.inf, device=self.device)
        self.logged_step = self.state["step"]
        self.logged_seconds = self.saved_seconds = self.state["seconds"]
        self.start = time.perf_counter() - self.state["seconds"]
        self.done = False

    # ---- Before the first step ----

    def restore(self):
        self.ema, state = load_checkpoint(self.args.ckpt, self.device)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        self.optimizer.param_groups[0]["weight_decay"] = self.args.weight_decay
        same = state["classes"] == self.data.classes
        check(same, f"the classes of the data are not those of the run in {self.args.out}")
        self.data = self.data._replace(latents=state["latents"], text=state.get("text"))
        self.state = state

    def few_images(self, most):
        """At most so many images, spread over the data set, and their labels, on the device."""
        n = len(self.data.images)
        index = torch.linspace(0, n - 1, min(most, n)).long()
        return self.batch(index, flip=False)

    def set_threads(self):
        """On a CPU as many as are fastest, unless they are given."""
        if self.device.type != "cpu":
            return
        most = torch.get_num_threads()
        if self.args.threads is None and "OMP_NUM_THREADS" not in os.environ:
            few = self.few_images(min(64, self.args.batch))
            with torch.no_grad():
                self.args.threads = choose_threads(functools.partial(self.model, *few))
            if self.args.threads < most:
                print(f"{self.args.threads} of {most} threads, as more are slower here")
        torch.set_num_threads(min(self.args.threads or most, most))

    def share_of_peak(self):
        """The share of the machine's peak that one image per second is: to judge the speed by."""
        # With markov attention each image trains some of the levels: as many images as levels.
        count = 1 if self.model.transformer.causal else self.model.F
        few = self.few_images(count)
        with torch.no_grad():
            forward = count_flops(functools.partial(self.model, *few)) / len(few[0])
        # The backward pass takes twice the operations.
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return 3 * forward / matmul_rate(self.device, dtype) / self.world

    def to_device(self):
        """Moves the data to a GPU with room for them."""
        if self.device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(self.device)
        tensors = {name: x for name, x in self.data._asdict().items() if torch.is_tensor(x)}
        if sum(x.nbytes for x in tensors.values()) < 0.4 * free:
            moved = {name: x.to(self.device) for name, x in tensors.items()}
            self.data = self.data._replace(**moved)

    def wrap(self):
        """The model as the steps call it: with checkpointing, compiled, in several processes."""
        args, network = self.args, self.model
        if args.checkpoint_activations:
            for block in [*self.model.transformer.blocks, *self.model.head.blocks]:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            # CUDA graphs, unless gradients add up over parts: the next part would overwrite them.
            mode = "reduce-overhead" if args.grad_accum == 1 else None
            network = torch.compile(network, mode=mode)
        if self.world > 1:
            parallel = torch.nn.parallel.DistributedDataParallel
            with warnings.catch_warnings():  # the new name of the option is not in torch 2.4
                warnings.simplefilter("ignore", FutureWarning)
                network = parallel(network, broadcast_buffers=False)
        return network

    # ---- A step ----

    def learning_rate(self):
        """Rises over the first steps and falls to 0 at the end, by steps or by the clock."""
        step, seconds = self.state["step"], self.state["seconds"]
        rate = self.args.lr * min(1.0, (step + 1) / self.args.warmup)
        if self.args.lr_schedule == "linear":
            rate *= 1 - max(step / self.max_steps, seconds / self.max_seconds)
        return rate

    def next_indices(self):
        """The images of this step and process, [parts, B]."""
        args = self.args
        n = len(self.data.images)
        epoch, k = divmod(self.state["step"], n // args.batch)
        order = epoch_order(n, epoch, args.seed, self.data.labels.device)
        index = order[k * args.batch : (k + 1) * args.batch]
        return index.view(args.grad_accum, self.world, -1)[:, self.rank]

    def batch(self, index, flip):
        x = make_batch(self.data, index, self.device, flip)
        if self.data.text:
            return x, pick_embeddings(self.data, index, self.device)
        if self.config.num_classes == 0:
            return x, None
        return x, self.data.labels[index].to(self.device, non_blocking=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def step(self):
        """One step of the optimizer."""
        args = self.args
        # A resumed run draws what it would have drawn without the stop.
        torch.manual_seed(seed_of(args.seed, self.rank, self.state["step"]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.next_indices()
        for n, index in enumerate(parts, 1):
            x, y = self.batch(index, args.flip)
            # Several processes average their gradients once per step.
            self.network.require_backward_grad_sync = n == len(parts)
            with self.autocast():
                loss = self.network(x, y) / len(parts)
            loss.backward()
            self.total += loss.detach()
        self.last_batch = x, y
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)

        self.state["step"] += 1
        step = self.state["step"]
        finite = (norm + self.total).isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))
        # From a loss that is not finite on, the fused step leaves the weights alone.
        self.optimizer.found_inf = self.first_bad.isfinite().float()
        self.optimizer.step()
        self.ema.average(self.model, min(args.ema, (1 + step) / (10 + step)))

    def read_clock(self, interrupted):
        """Is the run done? All processes go by the clock of the first."""
        seconds = time.perf_counter() - self.start
        clock = torch.tensor([seconds, float(bool(interrupted))], dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(clock, 0)
        self.state["seconds"], stop = clock.tolist()
        over = self.state["seconds"] >= self.max_seconds
        self.done = bool(stop) or over or self.state["step"] >= self.max_steps

    def progress(self):
        """Steps, or without --steps seconds."""
        if self.args.steps:
            return self.state["step"]
        return round(self.state["seconds"])

    # ---- Now and then ----

    def measure(self):
        """A row of log.csv: step, seconds, images per second, loss, and the loss of each level.

        ValueError where one is not finite.
        """
        step, seconds = self.state["step"], self.state["seconds"]
        count = step - self.logged_step
        mean = self.total.cpu()
        if self.world > 1:
            dist.all_reduce(mean)
        mean = mean.item() / self.world / count
        rate = count * self.args.batch / (seconds - self.logged_seconds)
        levels = self.level_losses(self.ema)
        self.check_finite([mean, *levels])
        numbers = [round(value, 5) for value in (mean, *levels)]
        row = [step, round(seconds, 1), round(rate, 1), *numbers]
        self.state["log"].append(row)

        self.total.zero_()
        self.logged_step = step
        # The rate leaves out what this takes.
        self.logged_seconds = time.perf_counter() - self.start
        return row

    def news(self):
        """The last row of log.csv in words."""
        step, _, rate, loss = self.state["log"][-1][:4]
        peak = 100 * rate * self.peak_share
        return f"step {step}, loss {loss:.4f}, {rate:.0f} images/s, {peak:.0f} % of peak"

    def level_losses(self, model):
        """The loss of each level on the last batch, list of F."""
        x, y = self.last_batch
        if y is not None:
            y = y[:128]
        with torch.no_grad(), self.autocast():
            return model.level_losses(x[:128], y).tolist()

    def check_finite(self, losses):
        if np.isfinite(losses).all() and self.first_bad == torch.inf:
            return
        losses = self.level_losses(self.model)
        bad = [f"x_{i}" for i, loss in enumerate(losses, 1) if not np.isfinite(loss)]
        what = ", ".join(bad) or "an unknown level"
        since = min(self.first_bad.item(), self.state["step"])
        message = f"the loss is not finite since step {since:.0f}, that of {what}"
        message += ": lower --lr"
        if os.path.exists(self.args.ckpt):
            message += f"; {self.args.ckpt} holds the last good state, for --resume"
        raise ValueError(message)

    def save(self):
        """Writes the checkpoint, whole or not at all."""
        kept = dict(
            self.state,
            config=self.config.to_dict(),
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        write_file(self.args.ckpt, functools.partial(torch.save, kept))
        self.saved_seconds = self.state["seconds"]

    def save_is_due(self):
        return self.state["seconds"] - self.saved_seconds > 60 * self.args.save_minutes


def train(args, config, data):
    """Trains until --steps or --max-minutes; the first process keeps ckpt.pt and log.csv."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_log(args))
        interrupted = stack.enter_context(catch_ctrl_c())
        # On a CPU the backward pass of flash attention is slow in bfloat16.
        flash = args.device.type == "cuda" or not args.bf16
        stack.callback(torch.backends.cuda.enable_flash_sdp, True)
        torch.backends.cuda.enable_flash_sdp(flash)

        run = Run(args, config, data)
        bar = stack.enter_context(progress_bar(args))
        writer = csv.writer(file)
        started = False
        while not run.done:
            run.step()
            if not started:
                start_files(args, file, writer, run)
                started = True
            run.read_clock(interrupted)
            bar.update(run.progress() - bar.n)
            step = run.state["step"]
            if run.done or step % args.log_every == 0:
                writer.writerow(run.measure())
                bar.set_postfix_str(run.news(), refresh=False)
                if run.rank == 0 and (run.done or run.save_is_due()):
                    run.save()
    if interrupted:
        saved = f"stopped at step {step}, saved in {args.ckpt}"
        raise SystemExit(f"{saved}; --resume goes on from there")
    if run.rank == 0:
        print(summary(run))


def open_log(args):
    """log.csv of the first process, locked: a second run into the same folder is refused."""
    rank, _ = processes()
    if rank > 0:
        return open(os.devnull, "w")
    os.makedirs(args.out, exist_ok=True)
    file = open(os.path.join(args.out, "log.csv"), "a", buffering=1, newline="")
    try:
        message = f"another run writes into {args.out} at this moment"
        check(lock(file), f"{message}: wait, or choose another --out")
        check_out(args)  # it may have ended just now
    except ValueError:
        file.close()
        raise
    return file


def lock(file):
    """Locks a file until it is closed or its process ends. False if another has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def check_out(args):
    there = os.path.exists(args.ckpt)
    rule = "add --resume to continue it, --overwrite to start again, or choose another --out"
    check(args.resume or args.overwrite or not there, f"{args.ckpt} exists: {rule}")


def start_files(args, file, writer, run):
    """After the first step, when the run is sure to start: the files of the run before go."""
    if run.rank > 0:
        return
    if not args.resume:
        Path(args.ckpt).unlink(missing_ok=True)
    file.truncate(0)
    steps = [f"x_{i + 1}" for i in range(run.model.F)]  # the loss of the step to x_i
    writer.writerow(["step", "seconds", "images_per_second", "loss", *steps])
    writer.writerows(run.state["log"])


@contextlib.contextmanager
def catch_ctrl_c():
    """A list that Ctrl-C makes longer: the run ends its step and saves. A second one stops it."""
    caught = []
    before = signal.getsignal(signal.SIGINT)

    def handle(*_):
        caught.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(args):
    rank, _ = processes()
    total, unit = args.steps, "step"
    if total is None:
        total, unit = round(60 * args.max_minutes), "s"
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
    return tqdm(total=total, unit=unit, bar_format=form, disable=rank > 0)


def summary(run):
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    rate = run.state["log"][-1][2]
    text = f"{millions:.2f} M parameters, {rate:.3g} images/s"
    memory = peak_memory(run.device)
    if memory is not None:
        text += f", peak memory {memory / 2**30:.2f} GiB"
    log = os.path.join(run.args.out, "log.csv")
    return f"wrote {run.args.ckpt} and {log}: {text}"


# ==== Command line
# Flags of a run's settings, beside those of the model: name, type, help.
RUN_FLAGS = (
    ("path", str, "folder of the data; of cifar10, where it is or goes"),
    ("vae", str, "of folder and captions: train on latents of a diffusers AutoencoderKL"),
    ("text_encoder", str, "of captions: a text encoder of transformers, its name or folder"),
    ("steps", int, "stop after so many steps"),
    ("max_minutes", float, "stop after so long"),
    ("batch", int, "images per step, over all processes"),
    ("grad_accum", int, "parts that a process splits its share of a batch into"),
    ("seed", int, "of weights, order and noise"),
    ("lr", float, "learning rate"),
    ("warmup", int, "steps of rising learning rate"),
    ("weight_decay", float, "of AdamW"),
    ("clip", float, "bound on the norm of the gradient"),
    ("ema", float, "decay of the averaged weights"),
    ("threads", int, "of a CPU (default: what is fastest here, or OMP_NUM_THREADS)"),
)


def defaults_text(name):
    """The default of a setting, where it differs by data set."""
    values = {}
    for data, settings in DATA.items():
        values[data] = {**DEFAULTS, **settings}[name]
    if len({*values.values()}) == 1:
        return f"default: {values['digits']}"
    return "default: " + ", ".join(f"{data} {value}" for data, value in values.items())


def presets_text(name):
    """The default of a setting of the model, and the presets that have another."""
    usual = getattr(FARConfig, name)
    values = [usual]
    for preset, settings in PRESETS.items():
        value = settings.get(name, usual)
        if value != usual:
            values.append(f"{preset} {value}")
    return "default: " + ", ".join(map(str, values))


def make_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, help="default: digits")
    add("--preset", choices=PRESETS, help="default: what fits --data; far_b with --vae")
    text = "the paper's recipe in place of the defaults"
    add("--paper", action="store_true", default=None, help=text)
    add("--out", help="folder to write (default: out/ and the name of the data)")
    text = "continue the run in --out with its settings; --steps or --max-minutes may be raised"
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help="start again although --out holds a run")
    for name, kind, text in RUN_FLAGS:
        if "default" not in text and name not in ("path", "vae", "text_encoder"):
            text = f"{text} ({defaults_text(name)})"
        add(flag_of(name), type=kind, help=text)
    add("--lr-schedule", choices=("linear", "constant"), help="default: linear, to 0 at the end")
    switch = argparse.BooleanOptionalAction
    text = "mirror half of the images (default: not of digits, captions)"
    add("--flip", action=switch, help=text)
    add("--bf16", action=switch, help="bfloat16 arithmetic (default: where it is faster)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    text = "torch.compile the model, on a GPU into CUDA graphs (unless --grad-accum)"
    add("--compile", action="store_true", help=text)
    text = "less memory, a third more arithmetic"
    add("--checkpoint-activations", action="store_true", help=text)
    text = "steps between lines of log.csv (default: %(default)s)"
    add("--log-every", type=int, default=100, help=text)
    text = "minutes between checkpoints, saved at the next line of log.csv (default: %(default)s)"
    add("--save-minutes", type=float, default=5.0, help=text)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="default: %(default)s")
    group = parser.add_argument_group("settings of the model, see far.FARConfig")
    add_settings(group, [f.name for f in fields(FARConfig)], presets_text)
    return parser


def parse_args(argv=None):
    """The flags, with settings that are not given filled in; args.config is the model's."""
    args = make_parser().parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    args.given = {f.name: given[f.name] for f in fields(FARConfig) if f.name in given}
    if args.out is None:
        args.out = os.path.join("out", given.get("data", "digits"))
    args.ckpt = os.path.join(args.out, "ckpt.pt")
    check(not (args.resume and args.overwrite), "--resume and --overwrite exclude each other")
    if args.resume:
        run, args.config = resumed_settings(args, given)
    else:
        run, args.config = new_settings(args, given)
    vars(args).update(run)
    check_args(args)
    return args


def new_settings(args, given):
    """(settings of a new run, FARConfig)."""
    own = DATA[given.get("data", "digits")]
    if args.vae:
        own = dict(WITH_VAE, flip=own.get("flip", True))
    run = {**DEFAULTS, **own}
    config = preset_config(args.preset or run["preset"], args.paper, args.given)
    return with_given(run, given), config


def with_given(run, given):
    """Settings with those given in place of the defaults. One length replaces the other."""
    if "steps" in given or "max_minutes" in given:
        run = dict(run, steps=None, max_minutes=None)
    return {name: given.get(name, value) for name, value in run.items()}


def preset_config(preset, paper, given):
    """The preset with the settings given, a user's ordering among them."""
    images = {**PRESETS[preset], **given}
    size = images.get("image_size", FARConfig.image_size)
    load_ordering(given.get("ordering", ""), size, images.get("channels", FARConfig.channels))
    return FARConfig.preset(preset, paper, **given)


def resumed_settings(args, given):
    """(settings of the run in --out, FARConfig). ValueError where those given contradict them."""
    load_ordering(args.ordering or "")
    model, state = load_checkpoint(args.ckpt)
    whole = {"optimizer", "settings"} <= set(state)
    check(whole, f"{args.ckpt} holds weights alone and cannot be resumed")
    kept = {**DEFAULTS, **state["settings"]}
    for name in ("data", "preset", "vae", "text_encoder", "seed", "batch"):
        same = given.get(name, kept[name]) == kept[name]
        flag = flag_of(name)
        check(same, f"the run of {args.ckpt} has {flag} {kept[name]}")
    check(kept["paper"] or not args.paper, f"the run of {args.ckpt} has no --paper")
    config = replace(model.config, **args.given)
    for name in args.given:
        before = getattr(model.config, name)
        flag = flag_of(name)
        same = getattr(config, name) == before
        check(same, f"{flag} contradicts the run in {args.out}, which has {before}")
    run = with_given(kept, given)
    left = run["steps"] is None or run["steps"] > state["step"]
    left = left and (run["max_minutes"] is None or 60 * run["max_minutes"] > state["seconds"])
    done = f"{state['step']} steps in {state['seconds'] / 60:.1f} minutes"
    finished = f"the run of {args.ckpt} is finished, with {done}"
    check(left, f"{finished}: raise --steps or --max-minutes")
    return run, config


def check_args(args):
    positive = "steps max_minutes batch grad_accum lr warmup clip threads log_every save_minutes"
    for name in positive.split():
        value = getattr(args, name)
        flag = flag_of(name)
        check(value is None or 0 < value < 1e9, f"{flag} must be above 0 and below 1e9")
    check(0 <= args.ema < 1, "--ema must lie in [0, 1)")
    check(0 <= args.seed < 2**63, "--seed must lie in [0, 2^63)")
    check(args.weight_decay >= 0, "--weight-decay must be at least 0")
    world = int(os.environ.get("WORLD_SIZE", 1))
    parts = args.grad_accum * world
    message = f"--batch {args.batch} is not divisible by --grad-accum {args.grad_accum} times"
    check(args.batch % parts == 0, f"{message} {world} processes")
    good = "cond_dim" not in args.given
    check(good, "--cond-dim is what --text-encoder gives; other embeddings are for Python")
    check_out(args)
    check_path(args)
    check_captions(args)


def check_path(args):
    if args.data == "digits":
        others = "add --data folder, cifar10 or imagenet64"
        check(not args.path, f"--path {args.path} is of no use with --data digits: {others}")
    if args.data in ("folder", "imagenet64"):
        check(args.path, "--path is missing: the folder that holds train/<class>/*.jpg")
        there = os.path.isdir(args.path)
        check(there, f"--path {args.path} is no folder; it must hold train/<class>/*.jpg")
    good = not args.vae or args.data in ("folder", "captions")
    check(good, "--vae needs --data folder or captions")


def check_captions(args):
    if args.data != "captions":
        check(not args.text_encoder, "--text-encoder needs --data captions")
        return
    check(args.path, "--path is missing: the folder that holds metadata.jsonl")
    find_metadata(args.path)
    needed = "a text encoder of transformers, by its name or folder"
    check(args.text_encoder, f"--text-encoder is missing: {needed}")
    check("num_classes" not in args.given, "--num-classes is not for --data captions")


def fit_config(args, data):
    """The config with the classes or the captions of the data. ValueError where they do not fit."""
    c = args.config
    shape, size = list(data.images.shape[1:]), "--image-size and --channels"
    if data.latents:
        shape = [shape[1] // 2, *shape[2:]]
    wanted = [c.channels, c.image_size, c.image_size]
    message = f"the data are images of {shape}, the model takes {wanted}"
    check(shape == wanted, f"{message}: choose another --preset, or {size}")
    n, classes = len(data.images), len(data.classes)
    check(args.batch <= n, f"--batch {args.batch} is more than the {n} images")
    few = data.images[:: max(1, n // 2000)]
    check(few.max() > few.min(), "all pixels of all images have one value: were they read right?")
    if data.text:
        return fit_captions(args, data)
    check(c.cond_dim == 0, "this preset is for texts: --data captions")
    if not args.resume and "num_classes" not in args.given:
        c = replace(c, num_classes=classes)
    enough = c.num_classes == 0 or c.num_classes >= classes
    check(enough, f"the data have {classes} classes, but num_classes is {c.num_classes}")
    return c


def fit_captions(args, data):
    """The config with the embeddings of the data; a resumed run must have the same."""
    _, K, cond_dim = data.embeddings.shape
    c = replace(args.config, num_classes=0, cond_tokens=K, cond_dim=cond_dim)
    same = not args.resume or c == args.config
    name = args.text_encoder
    check(same, f"{name} gives {cond_dim} numbers a token, the run has {args.config.cond_dim}")
    return c


def describe(data):
    """12 classes, 1,200 images: 0 cat, 1 dog, .. Of captions: their number, tokens, and a few."""
    if data.text:
        captions, K, _ = data.embeddings.shape
        few = "; ".join(data.text["captions"][:4])
        return f"{captions:,} captions of {K} tokens, {len(data.images):,} images: {few}; .."
    names = [f"{i} {name}" for i, name in enumerate(data.classes)]
    if len(names) > 12:
        names[10:] = [".."]
    return f"{len(data.classes)} classes, {len(data.images):,} images: {', '.join(names)}"


def warn_of_equal_levels(config):
    """Small images have few frequencies: levels can show the same."""
    ordering = ORDERINGS[config.ordering]
    kept = distinct_levels(config.levels, ordering, config.image_size)
    equal = [keep for keep in config.levels if keep not in kept]
    if equal:
        where = f"at {config.image_size} x {config.image_size} pixels"
        print(f"levels {equal} show nothing, or the same as the next one, {where}")


def main(argv=None):
    args = parse_args(argv)
    args.device = use_device(args.device)
    join_processes(args.device)
    data = load_data(args, args.config)
    config = fit_config(args, data)
    if args.bf16 is None:
        args.bf16 = bf16_pays(args)
    rank, _ = processes()
    if rank == 0:
        print(describe(data))
        warn_of_equal_levels(config)
    threads = torch.get_num_threads()
    try:
        train(args, config, data)
        if rank == 0:  # with as many threads as the training has chosen
            model, rest = load_checkpoint(args.ckpt, args.device)
            sample.draw_samples(model, rest, args.out, seed=args.seed)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    with stopped_in_a_sentence("train_cifar.py"):
        try:
            main()
        except torch.cuda.OutOfMemoryError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{first} Lower --batch, or raise --grad-accum") from None
        if dist.is_initialized():
            dist.destroy_process_group()
