"""Draw images from a trained FAR model.

    python sample.py                                                  # CIFAR-10, weights in assets
    python sample.py --ckpt out/digits/ckpt.pt --labels 3,8 --n 20
    python sample.py --ckpt out/digits/ckpt.pt --n 1797 --real assets/digits.npz      # with scores
    python sample.py --ckpt out/captions/ckpt.pt --prompt "a three above a seven" --n 16

It writes samples.png, at most 400 of the images, and levels.png, a row x_1, x_2, .. for the first
image of each class or prompt, at most ten.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import runpy
import sys
import tempfile
import textwrap
import time
from dataclasses import fields

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn.functional import pad
from tqdm import tqdm

from far import (
    CHOICES,
    FAR,
    ORDERINGS,
    SAMPLING,
    FARConfig,
    check,
    check_ordering,
    paper_recipe,
    sampling_config,
)

ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = os.path.join(ROOT, "assets", "far_cifar10.pt")
PICTURES = torchvision.datasets.folder.IMG_EXTENSIONS  # .jpg, .png, ..


# ==== Errors, files, devices, speed
@contextlib.contextmanager
def explained(message):
    """What goes wrong inside becomes a ValueError of one sentence: the message and the cause.

    For files of others, which can raise anything.
    """
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [""]
        cause = lines[0]
        if type(error) is not ValueError:
            cause = f"{type(error).__name__}: {cause}"
        raise ValueError(f"{message} ({cause})") from None


def write_file(path, save):
    """Writes a file by save(file). It is there whole or not at all, even after a kill -9."""
    part = f"{path}.{os.getpid()}.part"  # of this process: another may write the same file
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def use_device(name):
    """The torch.device of a name, ready for use; "cuda" is the GPU of this process."""
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explained(f"--device {name} is not usable here"):
        device = torch.device(name)
        if device.type == "mps":
            version = tuple(map(int, torch.__version__.split(".")[:2]))
            check(version >= (2, 6), f"mps needs torch 2.6 or newer, this is {torch.__version__}")
        torch.zeros(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seed_of(*numbers):
    """One seed from several whole numbers of at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def calls_per_second(function, device, seconds=0.2):
    """How often a function can be called; the median call counts, so that no disturbance does."""
    function()  # warms up
    wait = torch.get_device_module(device).synchronize
    wait()
    times = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - begin)
    return 1 / float(np.median(times))


def choose_threads(function):
    """Sets and returns the number of threads for calls of a function: all, or on a busy machine
    fewer.

    Half as many are taken where they are faster by a third, which on an idle machine they are not.
    """
    threads = torch.get_num_threads()
    best, best_rate = threads, 0.0
    while threads >= 1:
        torch.set_num_threads(threads)
        rate = calls_per_second(function, "cpu", seconds=0.5)
        if rate > 4 / 3 * best_rate:
            best, best_rate = threads, rate
        threads //= 2
    torch.set_num_threads(best)
    return best


@contextlib.contextmanager
def fastest_threads(model):
    """Inside, on a CPU, as many threads as are fastest for the model, unless OMP_NUM_THREADS says
    how many."""
    before = torch.get_num_threads()
    if model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        c = model.config
        # Few images, so that this takes no time for large models either.
        few = min(16, max(1, 1600 // (c.num_tokens * model.F)))
        images = torch.zeros(few, c.channels, c.image_size, c.image_size)
        with torch.inference_mode():
            choose_threads(functools.partial(model, images))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ==== Checkpoints, orderings, autoencoders, text encoders
def load_checkpoint(path, device="cpu"):
    """Reads a checkpoint of train_cifar.py -> (FAR, dict of the rest).

    The model has the averaged weights, is on the device and in eval mode. ValueError if the file is
    missing, cut off, or holds no such model.
    """
    check(os.path.isfile(path), f"{path} is not a file; python train_cifar.py trains a model")
    with explained(f"{path} cannot be read as a checkpoint: cut off, or not of train_cifar.py"):
        rest = torch.load(path, map_location="cpu", weights_only=True)
    found = f"of type {type(rest).__name__}"
    if isinstance(rest, dict):
        found = "with " + ", ".join(map(str, list(rest)[:8]))
    good = isinstance(rest, dict) and isinstance(rest.get("config"), dict)
    good = good and isinstance(rest.get("ema"), dict)
    check(good, f"{path} holds no FAR model: a dict with config and ema is needed, this is {found}")

    name = str(rest["config"].get("ordering"))
    known = ":" not in name or name in ORDERINGS
    in_python = f"in Python far.ORDERINGS[{name!r}] = the function"
    check(known, f"{path} has an ordering of its own: add --ordering {name}, {in_python}")
    with explained(f"{path} does not fit this version of far.py"):
        model = FAR(FARConfig.from_dict(rest["config"]))
    weights = rest.pop("ema")
    check_weights(path, model.state_dict(), weights)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False), rest


def check_weights(path, wanted, found):
    """Names the tensors of a checkpoint that are not those of the model."""
    wrong = []
    for name, tensor in wanted.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, not {list(tensor.shape)}"
            wrong.append(f"{name} has shape {shapes}")
        elif not found[name].isfinite().all():
            wrong.append(f"{name} is not finite")
    for name in found:
        if name not in wanted:
            wrong.append(f"{name} is not known")
    more = ""
    if len(wrong) > 4:
        more = f", and {len(wrong) - 4} more"
    check(not wrong, f"{path} does not fit its model: {', '.join(wrong[:4])}{more}")


def load_ordering(name, size=0, channels=3):
    """Puts a user's "file.py:function" into far.ORDERINGS under that name.

    With a size it also prints which laws the ordering breaks there. Other names stay as they are.
    """
    if ":" not in name:
        return
    file, function = name.rsplit(":", 1)
    with explained(f"--ordering {name} must name a file and an ordering(x, keep) in it"):
        ORDERINGS[name] = runpy.run_path(file)[function]
        if size:
            laws = check_ordering(ORDERINGS[name], size, channels)
            print(f"{name}:", *laws or ["all laws hold"], sep="\n  ")


def load_vae(name, device="cpu"):
    """The diffusers AutoencoderKL of a name (downloaded) or a folder."""
    with explained(f"no AutoencoderKL can be loaded from {name}; it needs pip install diffusers"):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(name)
    return vae.to(device).eval().requires_grad_(False)


def make_decoder(latents, device):
    """decode(x) -> images [n, C, H, H]; without a VAE (latents empty) x are the images."""
    if not latents:
        return torch.clone
    vae = load_vae(latents["vae"], device)

    def decode(x):
        images = []
        for part in x.split(16):
            decoded = vae.decode(part.to(device) / latents["scale"])
            images.append(decoded.sample.cpu())
        return torch.cat(images)

    return decode


class TextEncoder:
    """A frozen text encoder of transformers, of a name (downloaded) or a folder.

    most: the largest number of tokens that it reads.
    """

    def __init__(self, name, device="cpu"):
        needs = "it needs pip install transformers"
        with explained(f"no text encoder can be loaded from {name}; {needs}"):
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging

            logging.disable_progress_bar()
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModel.from_pretrained(name)
        if hasattr(model, "encoder") and hasattr(model, "decoder"):  # such as T5
            model = model.get_encoder()
        model = getattr(model, "text_model", model)  # one half of CLIP
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        # A language model may have no token for padding; what stands there is masked.
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        positions = getattr(model.config, "max_position_embeddings", math.inf)
        self.most = min(positions, tokenizer.model_max_length)

    def lengths(self, texts):
        """The number of tokens of each text, with those that start and end it: a list."""
        lengths = []
        for start in range(0, len(texts), 10000):  # millions at once need much memory
            tokens = self.tokenizer(texts[start : start + 10000], verbose=False)["input_ids"]
            lengths += map(len, tokens)
        return lengths

    @torch.no_grad()
    def __call__(self, texts, K):
        """List of n texts -> the last hidden states of K tokens of each, float32 [n, K, cond_dim].

        What is longer is cut; the rows behind the last token of a text are zeros.
        """
        settings = dict(padding=True, truncation=True, max_length=K, return_tensors="pt")
        tokens = self.tokenizer(texts, **settings).to(self.device)
        mask = tokens["attention_mask"]
        hidden = self.model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        hidden = hidden.float() * mask[..., None]
        return pad(hidden, (0, 0, 0, K - hidden.shape[1]))


def encode_prompts(prompts, text, c, device="cpu"):
    """P prompts -> embeddings float32 [P, K, cond_dim], scaled as the model of config c knows them.

    text: as a checkpoint keeps it, the encoder's name and a scale. ValueError where a prompt is
    empty or longer than K tokens, or the encoder has another width.
    """
    encoder = TextEncoder(text["encoder"], device)
    K = c.cond_tokens
    for prompt, length in zip(prompts, encoder.lengths(prompts), strict=True):
        check(prompt.strip(), "a prompt is empty")
        good = length <= K or prompt in text["captions"]  # long captions were cut in training
        check(good, f"{prompt!r} has {length} tokens, the model reads {K}: shorten it")
    embeddings = encoder(prompts, K)
    width = embeddings.shape[-1]
    message = f"{text['encoder']} gives {width} numbers a token, the model takes {c.cond_dim}"
    check(width == c.cond_dim, f"{message}: --text-encoder must be the one of the training")
    return text["scale"] * embeddings


# ==== Pictures
def to_8_bits(image):
    """A picture of 16 or 32 bits or of floats, scaled to 8 bits a channel; others as they are."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image).astype(np.float64)
    check(np.isfinite(values).all(), "some values are not finite")
    most = values.max()
    if image.mode == "F":
        # By convention floats run to 1; those of a few programs to 255 or 65535.
        scale = next((top for top in (1, 255, 65535) if most <= top), most)
        values = values / scale * 255
    elif most < 2**16:
        values = values // 2**8
    else:
        values = values // 2**23
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def on_white(image):
    """A picture without transparency: what lies behind it is white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def read_image(path, size, channels=3):
    """A picture, centre-cropped to a square and resized: uint8 [channels, size, size].

    None if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            image = on_white(to_8_bits(image))
            image = image.convert({1: "L", 3: "RGB"}[channels])
    except Exception:  # a damaged picture can raise anything
        return None
    image = torchvision.transforms.functional.center_crop(image, min(image.size))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def natural(name):
    """Sorts names with their numbers as numbers: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def list_folder(root):
    """Pictures root/<class>/** -> (files, labels, classes); hidden folders are left out."""
    check(os.path.isdir(root), f"{root} is not a folder")
    found, hidden = {}, []
    for folder, folders, names in os.walk(root, followlinks=True):
        hidden += [os.path.join(folder, name) for name in folders if name[0] == "."]
        folders[:] = [name for name in folders if name[0] != "."]
        if folder == root:
            found = {name: [] for name in folders}
            continue
        kind = os.path.relpath(folder, root).split(os.sep)[0]
        for name in names:
            if name[0] != "." and name.lower().endswith(PICTURES):
                found[kind].append(os.path.join(folder, name))
    for folder in hidden:
        print(f"left out the hidden folder {folder}")

    check(found, f"{root} holds no folders, one for each class")
    classes = sorted(found, key=natural)
    files, labels = [], []
    for label, name in enumerate(classes):
        check(found[name], f"{os.path.join(root, name)} holds no pictures: remove it, or add some")
        files += sorted(found[name])
        labels += [label] * len(found[name])
    return files, labels, classes


def to_uint8(images):
    """Float images in about [-1, 1] -> uint8 [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def save_grid(images, path, columns):
    """Writes images [n, C, H, H] in about [-1, 1] as one PNG, row by row; returns the path.

    Each is enlarged to at least 48 pixels; gaps are thin.
    """
    if images.shape[1] != 3:
        images = images[:, :1]
    scale = max(1, -(-48 // images.shape[-1]))
    images = to_uint8(images).float() / 255
    images = torch.nn.functional.interpolate(images, scale_factor=scale)
    grid = torchvision.utils.make_grid(images, columns, padding=2, pad_value=0.5)

    def save(file):
        torchvision.utils.save_image(grid, file, format="png")

    write_file(path, save)
    return path


def save_captioned(images, labels, prompts, path):
    """Writes images [n, C, H, H] in about [-1, 1] as one PNG; returns the path.

    Images of a prompt stand side by side, the prompt below them. labels: the number of each image's
    prompt, int64 [n].
    """
    numbers, counts = labels.unique(return_counts=True)
    most = counts.max().item()
    columns = min(10, most)
    # Prompts with few images share a line.
    side = max(0.6, 2 / columns)  # inches
    per_line = max(1, int(8 / (columns * side)))
    lines = -(-len(numbers) // per_line)
    height = -(-most // columns) * side + 0.5
    size = (per_line * columns * side, lines * height)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(lines, per_line, squeeze=False).flatten()
    for axis in axes:
        axis.set_frame_on(False)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, number in zip(axes, numbers, strict=False):
        part = to_uint8(images[labels == number])
        # Fewer than a row of images are not enlarged.
        missing = max(0, columns - len(part))
        part = pad(part, (0, 0, 0, 0, 0, 0, 0, missing), value=255)
        grid = torchvision.utils.make_grid(part, columns, padding=1, pad_value=255)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        wrapped = textwrap.fill(prompts[number], int(columns * side * 14))
        axis.set_xlabel(wrapped, fontsize=8)

    def save(file):
        figure.savefig(file, format="png")

    write_file(path, save)
    return path


# ==== Drawing
def draw_images(
    model, labels, seed=0, batch=None, progress=True, bf16=False, embeddings=None, **settings
):
    """Yields (first index, images of FAR.sample) a batch at a time.

    Image i depends on seed, i and its label alone: each has a generator of its own. labels: int64
    [n], or an int n for images without label. embeddings [P, K, cond_dim] of P prompts: labels are
    then the numbers of prompts. batch: 250, or on a CPU as many as have 1,600 tokens. settings:
    those of FAR.sample.
    """
    n = labels
    if torch.is_tensor(labels):
        n = len(labels)
    device = model.device.type
    if batch is None:
        batch = 250
        if device == "cpu":  # what its caches hold
            batch = max(1, 1600 // model.config.num_tokens)
    for start in tqdm(range(0, n, batch), unit="batch", desc="sample", disable=not progress):
        stop = min(start + batch, n)
        request = stop - start
        if torch.is_tensor(labels):
            request = labels[start:stop]
        if embeddings is not None:
            request = embeddings[request]
        generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(start, stop)]
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            images = model.sample(request, generator=generators, **settings).cpu()
        # Outside of both modes, which would last in the caller: an ordinary tensor.
        yield start, images.clone()


def parse_labels(text, n, num_classes, classes=()):
    """Classes such as "0-9", "3", "1,5,7-9" or "cat,dog" -> labels int64 [n].

    Names are those in `classes`. Sorted evenly over the classes asked for; without text over all.
    "none", or a model without classes: the int n.
    """
    if text == "none" or (not text and not num_classes):
        return n
    check(num_classes, "this model has no classes: leave out --labels")
    chosen = list(range(num_classes))
    if text:
        with explained(f"--labels {text} is not understood; write 0-9, 1,5,7, names or none"):
            chosen = choose_classes(text, list(classes))
    good = chosen and max(chosen) < num_classes
    check(good, f"--labels {text} is out of range: the model has {num_classes} classes, from 0")
    return torch.tensor(chosen)[spread(len(chosen), n)]


def spread(P, n):
    """The numbers 0 .. P-1, each about n/P times, rising: int64 [n]."""
    return torch.arange(n) * P // n


def read_prompts(args, text):
    """The prompts of --prompt and --prompts, or if there are none captions of the checkpoint."""
    prompts = list(args.prompt)
    if args.prompts:
        with explained(f"--prompts {args.prompts} cannot be read"):
            with open(args.prompts, encoding="utf-8") as file:
                prompts += [line.strip() for line in file if line.strip()]
            check(prompts, "it is empty")
    if not prompts:
        prompts = text["captions"][: args.n]
    message = f"--n {args.n} is less than the {len(prompts)} prompts"
    check(args.n >= len(prompts), f"{message}, which get an image each or more")
    return prompts


def choose_classes(text, classes):
    """Text as in `parse_labels` -> list of class numbers."""
    chosen = []
    for part in text.split(","):
        if part in classes:
            chosen.append(classes.index(part))
            continue
        first, _, last = part.partition("-")
        chosen += range(int(first), int(last or first) + 1)
    return chosen


class Drawing:
    """Collects what is drawn: pictures to show, and if asked for all pixels.

    labels: as in `draw_images`. decode: as in `make_decoder`. png: a folder, which gets one file
    for each image. prompts: those that labels are the numbers of, if they are no classes.
    """

    def __init__(self, labels, decode, keep_pixels=False, png=None, prompts=None):
        self.labels = labels
        self.decode = decode
        self.png = png
        self.prompts = prompts
        self.keep_pixels = keep_pixels
        self.n = labels
        first = range(10)
        if torch.is_tensor(labels):
            self.n = len(labels)
            first = np.unique(labels.numpy(), return_index=True)[1][:10]
        shown = np.linspace(0, self.n - 1, min(self.n, 400)).round()
        self.in_grid = {int(i) for i in shown}  # all, or 400 spread evenly over the classes
        self.in_strips = {int(i) for i in first}  # the first of each class
        self.grid, self.strips, self.pixels = [], [], []
        self.total, self.squares = 0.0, 0.0

    def add(self, start, levels):
        """Takes images start, start + 1, ..: levels [B, F, C, H, H], x_1 .. x_F."""
        self.total = self.total + levels.double().sum(0)
        self.squares = self.squares + levels.double().square().sum(0)
        images = self.decode(levels[:, -1])
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
        if self.keep_pixels:
            self.pixels.append(pixels)
        for n, image in enumerate(images):
            i = start + n
            if self.png:
                self.save_png(pixels[n], i)
            if i in self.in_grid:
                self.grid.append(image)
            if i in self.in_strips:
                self.strips.append(self.decode(levels[n]))

    def save_png(self, pixels, i):
        """Writes image i, and of a prompt a line of metadata.jsonl, as --data captions reads it."""
        name = f"{i:06d}.png"
        Image.fromarray(pixels.squeeze()).save(os.path.join(self.png, name))
        if self.prompts:
            entry = dict(file_name=name, text=self.prompts[self.labels[i]])
            with open(os.path.join(self.png, "metadata.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def deviation(self):
        """Standard deviation of each x_i over the images, the mean over pixels, [F]."""
        variance = (self.squares - self.total.square() / self.n) / (self.n - 1)
        return variance.clamp(min=0).sqrt().flatten(1).mean(1)

    def save(self, out):
        """Writes out/samples.png and out/levels.png, a row x_1 .. x_F for each of the strips."""
        path = os.path.join(out, "samples.png")
        if self.prompts:
            labels = self.labels[sorted(self.in_grid)]
            samples = save_captioned(torch.stack(self.grid), labels, self.prompts, path)
        else:
            columns = 10 if self.n <= 100 else 20
            samples = save_grid(torch.stack(self.grid), path, columns)
        columns = len(self.strips[0])
        levels = save_grid(torch.cat(self.strips), os.path.join(out, "levels.png"), columns)
        return [samples, levels]

    def save_npz(self, path):
        """Writes arr_0, images uint8 [n, H, W, C], and arr_1, labels int64 [n] or prompts [n]."""
        arrays = [np.concatenate(self.pixels)]
        if self.prompts:
            arrays.append(np.array(self.prompts)[self.labels])
        elif torch.is_tensor(self.labels):
            arrays.append(self.labels.numpy())

        def save(file):
            np.savez(file, *arrays)

        write_file(path, save)


def draw_samples(model, rest, out, seed=0):
    """Draws 100 images of a checkpoint, over all classes or over captions that it keeps, into
    out/samples.png and out/levels.png."""
    device = model.device
    text = rest.get("text")
    prompts, embeddings = None, None
    if text:
        prompts = text["captions"][:100]
        labels = spread(len(prompts), 100)
        embeddings = encode_prompts(prompts, text, model.config, device)
    else:
        labels = parse_labels(None, 100, model.config.num_classes)
    drawing = Drawing(labels, make_decoder(rest.get("latents"), device), prompts=prompts)
    bf16 = device.type == "cuda"
    drawn = draw_images(model, labels, seed, bf16=bf16, embeddings=embeddings, return_levels=True)
    for start, levels in drawn:
        drawing.add(start, levels)
    os.makedirs(out, exist_ok=True)
    print("wrote", *drawing.save(out))


# ==== Scores
def load_real(path, c, classes=()):
    """Real images uint8 [m, H, W, C] and labels int64 [m] of an npz file or a folder.

    The folder holds <class>/*.png or train/<class>/*.png; its classes are those of the model, by
    name, or without names by number.
    """
    if os.path.isdir(path):
        return load_real_folder(path, c, list(classes))
    with explained(f"--real {path} must be a folder of images, or an npz file of them and labels"):
        arrays = [x for x in np.load(path).values() if x.dtype.kind in "iu"]
        images = [x for x in arrays if x.ndim == 4]
        labels = [x for x in arrays if x.ndim == 1]
        good = len(images) == len(labels) == 1 and len(images[0]) == len(labels[0])
        shapes = [list(x.shape) for x in arrays]
        check(good, f"its arrays of whole numbers have shapes {shapes}")
        images, labels = images[0], labels[0]
        wanted = (c.image_size, c.image_size, c.channels)
        good = images.dtype == np.uint8 and images.shape[1:] == wanted and len(images) > 5
        rule = f"the model needs more than 5, uint8 {list(wanted)}"
        check(good, f"it has {len(images)} images, {images.dtype} {list(images.shape[1:])}; {rule}")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def load_real_folder(path, c, classes):
    train = os.path.join(path, "train")
    if os.path.isdir(train):
        path = train
    files, labels, names = list_folder(path)
    if classes:
        unknown = [name for name in names if name not in classes]
        check(not unknown, f"--real {path} has classes that the model has not: {unknown}")
        labels = [classes.index(names[label]) for label in labels]
    images = []
    for file in tqdm(files, desc="read images", unit="image"):
        image = read_image(file, c.image_size, c.channels)
        check(image is not None, f"{file} cannot be read: repair or remove it")
        images.append(image.transpose(1, 2, 0))
    check(len(images) > 5, f"--real {path} has {len(images)} images; at least 6 are needed")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def score(images, labels, real, truth, k=5):
    """Compares uint8 images [n, H, W, C] with real ones [m, H, W, C], pixel by pixel in [0, 1].

    labels int64 [n] and truth int64 [m]. Returns a dict: fd, the Frechet distance of the Gaussians
    fitted to both, lower is better; precision and recall, the share of images inside the other
    set's k-nearest-neighbour manifold (Kynkaanniemi et al. 2019); class_acc, the share to which the
    k nearest real images give the label that was asked for.
    """
    a = torch.as_tensor(images).flatten(1).double() / 255
    b = torch.as_tensor(real).flatten(1).double() / 255
    radius_a = neighbour_radius(a, k)
    radius_b = neighbour_radius(b, k)
    inside, votes = [], []
    reached = torch.zeros(len(b), dtype=torch.bool)
    for part, radius in zip(a.split(1000), radius_a.split(1000), strict=True):
        distance = torch.cdist(part, b)  # [up to 1000, m]
        inside.append((distance <= radius_b).any(1))
        reached |= (distance <= radius[:, None]).any(0)
        nearest = distance.topk(k, largest=False).indices
        votes.append(truth[nearest].mode(1).values)
    right = torch.cat(votes) == labels
    return dict(
        fd=frechet_distance(a, b),
        precision=torch.cat(inside).double().mean().item(),
        recall=reached.double().mean().item(),
        class_acc=right.double().mean().item(),
    )


def neighbour_radius(x, k):
    """The distance of each row of x [n, D] to its k-th nearest other one, [n]."""
    radius = []
    for part in x.split(1000):
        distance = torch.cdist(part, x)
        # The nearest is the row itself.
        radius.append(distance.kthvalue(k + 1, 1).values)
    return torch.cat(radius)


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to the rows of a [n, D] and b [m, D]."""
    A, B = a.T.cov(), b.T.cov()
    means = (a.mean(0) - b.mean(0)).square().sum()
    # The trace of sqrt(A B) is the sum of the square roots of the eigenvalues.
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()
    return (means + A.trace() + B.trace() - 2 * roots.sum()).item()


def compare(drawing, real, truth, model, steps):
    """`score`, and the deviation of each x_i over the samples, in units of the data's."""
    pixels = torch.from_numpy(np.concatenate(drawing.pixels))
    scores = score(pixels, drawing.labels, real, truth)
    data = real.permute(0, 3, 1, 2).float() / 127.5 - 1
    for i, deviation in zip(steps, drawing.deviation(), strict=True):
        wanted = model.low_pass(data, i).std(0).mean()
        scores[f"deviation_{i}"] = (deviation / wanted).item()
    return scores


# ==== Command line
@contextlib.contextmanager
def stopped_in_a_sentence(script):
    """What a user can mend, or Ctrl-C, ends the script with one sentence and no traceback."""
    try:
        yield
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{script}: {str(error) or 'stopped'}")


def new_parser(description, **settings):
    """A parser that prints its description as it stands and takes no shortened flags."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


def flag_of(name):
    """The flag of a setting: head_steps -> --head-steps."""
    return "--" + name.replace("_", "-")


def one_or_list(kind):
    """For argparse: "3" -> 3, "3,4" -> [3, 4]."""

    def parse(text):
        values = [kind(part) for part in text.split(",")]
        if len(values) == 1:
            return values[0]
        return values

    parse.__name__ = f"{kind.__name__} or list"
    return parse


def float_list(text):
    """For argparse: "0.25,1" -> [0.25, 1.0]."""
    return [float(part) for part in text.split(",")]


# How the flag of a setting is read, by the type that FARConfig gives it.
READERS = {tuple: float_list, float | list: one_or_list(float), int | list: one_or_list(int)}


def add_settings(group, names, text=None):
    """Adds a flag for each of the FARConfig fields `names`, without default.

    text(name): its help.
    """
    for f in fields(FARConfig):
        if f.name not in names:
            continue
        flag = flag_of(f.name)
        if f.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        else:
            options = dict(type=READERS.get(f.type, f.type))
        if f.name in CHOICES and f.name != "ordering":
            options["choices"] = CHOICES[f.name]
        if text:
            options["help"] = text(f.name)
        group.add_argument(flag, **options)


def make_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", default=WEIGHTS, help="checkpoint (default: the CIFAR-10 weights in assets)")
    add(
        "--labels", help="classes by number or name, such as 0-9 or cat,dog, or none (default: all)"
    )
    text = "of models of texts: what to draw (repeatable; default: some captions of the training)"
    add("--prompt", action="append", default=[], help=text)
    add("--prompts", metavar="FILE", help="more prompts, one a line")
    add("--text-encoder", help="where the text encoder lies, if not where it lay in training")
    text = "number of images, over the classes or prompts (default: %(default)s)"
    add("--n", type=int, default=100, help=text)
    add("--seed", type=int, default=0, help="image i depends on seed, i and its label alone")
    add("--batch", type=int, help="images drawn at a time")
    add("--out", default="out/samples", help="folder of the pictures (default: %(default)s)")
    text = "also write all images to this file: arr_0 uint8 [n, H, W, C], labels or prompts arr_1"
    add("--npz", help=text)
    add("--png", help="also write all images as PNG into this folder, which holds no others")
    add(
        "--real", help="npz file or folder of real images: print scores, write scores.json to --out"
    )
    add(
        "--export", help="write the weights in half precision to this file, with the sampling given"
    )
    add("--from", dest="image", metavar="IMAGE", help="draw variations of a picture")
    add("--keep", type=float, help="with --from: the level of the picture that stays, such as 0.25")
    add("--levels", type=float_list, help="draw these levels of the model alone, such as 0.25,1")
    add("--ordering", help="file.py:function, for a model that was trained with it")
    add("--paper", action="store_true", help="the paper's sampler, but for what is given below")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="default: %(default)s")
    action = argparse.BooleanOptionalAction
    add("--bf16", action=action, help="bfloat16: faster, a little coarser (default: on CUDA)")
    title = "sampling, see far.FARConfig; default: as in the checkpoint"
    add_settings(parser.add_argument_group(title), SAMPLING)
    return parser


# What --paper takes from the paper's recipe: how its tokens are drawn.
PAPER_SAMPLER = ("solver", "variance", "head_steps", "temperature")


def sampling_settings(args, c):
    """The settings of FAR.sample that the flags ask for."""
    settings = {}
    if args.paper:
        recipe = paper_recipe(c.image_size, c.ordering, c.levels)
        settings = {name: recipe[name] for name in PAPER_SAMPLER}
    for name in SAMPLING:
        value = getattr(args, name)
        if value is not None:
            settings[name] = value
    return settings


def more_settings(args, c, latents):
    """What else the flags ask of `draw_images`: arithmetic, levels, a picture to start from."""
    settings = dict(bf16=args.bf16)
    if args.bf16 is None:
        settings["bf16"] = args.device.startswith("cuda")
    if args.levels:
        settings["levels"] = args.levels
    if args.image:
        settings.update(variation_settings(args, c, latents))
    return settings


def variation_settings(args, c, latents):
    """The settings of FAR.sample for --from and --keep: the picture, and the level it shows."""
    picture = None
    if c.channels in (1, 3) and not latents:
        picture = read_image(args.image, c.image_size, c.channels)
    check(
        picture is not None,
        f"--from {args.image} cannot be read as a picture, or the model is one of latents",
    )
    keeps = [0.0, *c.levels[:-1]]
    allowed = ", ".join(map(str, keeps))
    check(args.keep in keeps, f"--keep {args.keep} is no level of the model; allowed: {allowed}")
    drawn = args.levels is None or args.keep in (0, *args.levels)
    check(drawn, f"--keep {args.keep} must be 0 or one of --levels")
    start = torch.tensor(picture)[None], keeps.index(args.keep)
    return dict(start=start, step_rule=args.step_rule or "locked")


def export(model, rest, path, settings):
    """Writes the weights alone, in half precision, with the settings as default."""
    kept = dict(
        config=sampling_config(model, settings).to_dict(),
        ema=model.half().state_dict(),
        latents=rest.get("latents"),
        classes=rest.get("classes"),
        text=rest.get("text"),
    )
    write_file(path, lambda file: torch.save(kept, file))
    print(f"wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def check_args(args):
    good = args.n >= 1 and args.seed >= 0 and (args.batch is None or args.batch >= 1)
    check(good, "--n and --batch must be at least 1, --seed at least 0")
    check(args.image or args.keep is None, "--keep needs --from")
    check(not args.image or args.keep is not None, "--from needs --keep")


def check_condition(args, c, text):
    """Classes for models of classes, prompts for models of texts."""
    if text:
        check(not args.labels, "--labels is for models of classes; this one has texts: --prompt")
        if args.text_encoder:
            text["encoder"] = args.text_encoder
        return
    asked = args.prompt or args.prompts or args.text_encoder
    check(not asked, f"--prompt is for models of texts; {args.ckpt} has classes or none: --labels")
    check(not c.cond_dim, f"{args.ckpt} is a model of embeddings, which does not say of what")


def check_outputs(args):
    """Makes the folders: an error now, and not after the drawing."""
    files = [os.path.join(args.out, "samples.png")]
    if args.npz:
        files.append(args.npz)
    if args.png:
        files.append(os.path.join(args.png, "000000.png"))
    if args.export:
        files = [args.export]
    for file in files:
        folder = os.path.dirname(file) or "."
        with explained(f"{folder} is no folder to write to"):
            os.makedirs(folder, exist_ok=True)
        good = os.access(folder, os.W_OK) and not os.path.isdir(file)
        good = good and file not in (args.ckpt, args.real)
        check(good, f"{file} is a folder, is read here, or cannot be written: choose another")
    if args.png:
        others = [name for name in os.listdir(args.png) if name.lower().endswith(PICTURES)]
        rule = "choose an empty one, as what counts pictures there would count those too"
        check(not others, f"--png {args.png} holds {len(others)} pictures already: {rule}")


def main(argv=None):
    args = make_parser().parse_args(argv)
    check_args(args)
    device = use_device(args.device)
    load_ordering(args.ordering or "")
    model, rest = load_checkpoint(args.ckpt, device)
    c = model.config
    own = args.ordering in (None, c.ordering)
    check(own, f"--ordering must be the model's own, {c.ordering}")
    settings = sampling_settings(args, c)
    check_condition(args, c, rest.get("text"))
    check_outputs(args)
    if args.export:
        return export(model, rest, args.export, settings)
    return draw(args, model, rest, settings)


@contextlib.contextmanager
def filled_at_once(folder):
    """A place for files that move into the folder when all are there; None for None."""
    if folder is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as place:
        yield place
        for name in os.listdir(place):
            os.replace(os.path.join(place, name), os.path.join(folder, name))


def draw(args, model, rest, settings):
    """Draws and writes what the flags ask for; with --real returns the scores."""
    c = model.config
    classes = rest.get("classes") or []
    text, prompts = rest.get("text"), None
    settings = {**settings, **more_settings(args, c, rest.get("latents"))}
    if text:
        prompts = read_prompts(args, text)
        labels = spread(len(prompts), args.n)
        settings["embeddings"] = encode_prompts(prompts, text, c, model.device)
    else:
        labels = parse_labels(args.labels, args.n, c.num_classes, classes)
    if args.real:
        good = torch.is_tensor(labels) and args.n > 5 and not rest.get("latents") and not text
        check(good, "--real needs labels, --n above 5, and a model of pixels")
        real, truth = load_real(args.real, c, classes)
    decode = make_decoder(rest.get("latents"), model.device)

    with fastest_threads(model), filled_at_once(args.png) as png:
        begin = time.perf_counter()
        drawing = Drawing(labels, decode, bool(args.npz or args.real), png, prompts)
        drawn = draw_images(model, labels, args.seed, args.batch, return_levels=True, **settings)
        for start, levels in drawn:
            drawing.add(start, levels)
        seconds = time.perf_counter() - begin
    written = drawing.save(args.out)
    if args.npz:
        drawing.save_npz(args.npz)
    written += [file for file in (args.png, args.npz) if file]
    print(f"{args.n} images in {seconds:.1f} s; wrote", *written)
    if args.real:
        levels = args.levels or c.levels
        steps = [i for i, keep in enumerate(c.levels, 1) if keep in levels]
        return report(compare(drawing, real, truth, model, steps), args.out)


def report(scores, out):
    """Prints scores and writes them to out/scores.json."""
    print(*(f"{name} {value:.3f}" for name, value in scores.items()))
    text = json.dumps(scores, indent=1)
    write_file(os.path.join(out, "scores.json"), lambda file: file.write(text.encode()))
    return scores


if __name__ == "__main__":
    with stopped_in_a_sentence("sample.py"):
        main()
