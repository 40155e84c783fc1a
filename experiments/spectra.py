"""Is fine detail missing? The energy of samples against that of real images, by band of frequency.

    python experiments/spectra.py full.npz next.npz --real assets/digits.npz --out out/spectra.png

The files of samples are those of sample.py --npz. Prints a table and draws a plot: 1 is the energy
of the real images, less than 1 in the last bands is missing detail, more is noise.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import far
import sample


def energy_by_band(images, bands):
    """Energy of uint8 images [n, H, H, C] in each band of the DCT, [bands], the mean over images.

    Band k of 1, 2, .. holds what the low-pass to k/bands lets through and that to (k-1)/bands does
    not: coefficients whose larger index lies in (k-1) H/bands .. k H/bands. The sum over bands is
    the sum of squares of all pixels, in [-1, 1].
    """
    energy = torch.zeros(bands, dtype=torch.float64)
    for part in images.split(1000):
        x = part.permute(0, 3, 1, 2).double() / 127.5 - 1
        lower = torch.zeros_like(x)
        for k in range(bands):
            low = far.dct(x, (k + 1) / bands)
            energy[k] += (low - lower).square().sum()
            lower = low
    return energy / len(images)


def read_samples(path):
    """Images uint8 [n, H, H, C] of an npz file of sample.py."""
    with sample.explained(f"{path} must be an npz file of sample.py --npz"):
        images = np.load(path)["arr_0"]
        shape = images.shape
        good = images.dtype == np.uint8 and len(shape) == 4 and shape[1] == shape[2]
        far.check(good, f"arr_0 is {images.dtype} {list(shape)}, not uint8 [n, H, H, C]")
    return torch.from_numpy(images)


def plot(path, ratios):
    """ratios: name -> energy of its samples over that of the real images, [bands]."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, ratio in ratios.items():
        axis.plot(range(1, len(ratio) + 1), ratio, "o-", label=name, alpha=0.7, markersize=4)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("band of frequency, from low to high")
    axis.set_ylabel("energy, samples / real images")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv=None):
    parser = sample.new_parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="+", help="npz files of sample.py --npz")
    add("--real", required=True, help="npz file or folder of real images")
    add("--bands", type=int, default=8, help="number of bands (default: %(default)s)")
    add("--out", default="out/spectra.png", help="picture to write (default: %(default)s)")
    args = parser.parse_args(argv)

    samples = {path.removesuffix(".npz"): read_samples(path) for path in args.samples}
    shapes = {tuple(images.shape[1:]) for images in samples.values()}
    far.check(len(shapes) == 1, f"the files have images of different shapes: {sorted(shapes)}")
    size, _, channels = shapes.pop()
    good = 1 <= args.bands <= size
    far.check(good, f"--bands is {args.bands}; images of {size} pixels have 1 .. {size}")
    config = far.FARConfig(image_size=size, channels=channels, patch_size=1)
    real, _ = sample.load_real(args.real, config)
    wanted = energy_by_band(real, args.bands)

    ratios = {}
    numbers = " | ".join(str(k + 1) for k in range(args.bands))
    print(f"| energy, samples / real images | {numbers} |")
    print("|---" * (args.bands + 1) + "|")
    for name, images in samples.items():
        ratios[name] = (energy_by_band(images, args.bands) / wanted).tolist()
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios[name]) + " |")
    plot(args.out, ratios)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with sample.stopped_in_a_sentence("spectra.py"):
        main()
