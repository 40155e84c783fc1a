"""Compare settings of FAR: train every row of a table with several seeds, draw, score.

    python experiments/sweep.py orderings                                 # on digits
    python experiments/sweep.py orderings --ordering mine.py:rings --rows dct,raster --seeds 0,1,2
    python experiments/sweep.py components --max-minutes 2 --width 64     # equal time, and smaller
    python experiments/sweep.py claim --path DIR --score "python score.py {} --real DIR"
    python experiments/sweep.py draws --ckpt out/digits/ckpt.pt           # one model, drawn anew

A run of digits takes a minute or two. Prints mean and range of each row, and writes scores.csv and
plot.png to out/sweep/NAME/. Models lie in out/sweep/models/, where comparisons share them; started
again, it does what is missing. After a change of far.py choose another --out; sweeps that run at
the same time need different rows, and a last one over all of them collects the table.
"""

import contextlib
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import far
import sample

HERE = Path(__file__).resolve().parent
HIGH_TO_LOW = f"{os.path.relpath(HERE / 'orderings.py')}:high_to_low"
METRICS = ("fd", "precision", "recall", "class_acc")


DIGITS = far.FARConfig.preset("digits")


# ==== The comparisons
# Name of a row -> its flags of train_cifar.py, by their names in far.FARConfig. Three are not such
# flags: draw, settings of FAR.sample; curve and value, the place of the row in a plot of curves.
# Rows that differ in these alone share a model.
def evenly(n):
    """n levels 1/n, 2/n, .., 1."""
    return [round((i + 1) / n, 4) for i in range(n)]


def curve(name, setting, values, train=None, **draw):
    """Rows that draw with one setting at several values, the other settings in draw.

    values: a list, or a dict of what the rows are called -> value.
    """
    if not isinstance(values, dict):
        values = dict(zip(values, values, strict=True))
    rows = {}
    for called, value in values.items():
        row = dict(train or {}, curve=name, value=called)
        row["draw"] = {**draw, setting: value}
        rows[f"{name} {called}"] = row
    return rows


def paper_sampler(**changes):
    """The paper's sampler as settings of FAR.sample."""
    recipe = far.paper_recipe(DIGITS.image_size, DIGITS.ordering, DIGITS.levels)
    return {**{name: recipe[name] for name in sample.PAPER_SAMPLER}, **changes}


def steps_by_level(first, last):
    return far.head_step_schedule(len(DIGITS.levels), first, last)


def draw_curves(before="", train=None):
    """What settings of FAR.sample do to precision and recall.

    before: what the names of the curves start with; train: settings of the models.
    """
    ancestral = dict(solver="ddpm", head_steps=25, temperature=1.0)
    temperatures = [0.9, 1.0, 1.05, 1.1, 1.2]
    guidances = [1.0, 1.5, 2.0, 3.0]
    # Most at the first level, none at the last.
    falling = {g: far.rising(g, 1.0, len(DIGITS.levels)) for g in guidances}
    linear = dict(guidance_schedule="linear")
    constant = dict(guidance_schedule="constant")
    return {
        **curve(f"{before}temperature", "temperature", temperatures, train),
        **curve(f"{before}guidance linear", "guidance", guidances, train, **linear),
        **curve(f"{before}guidance constant", "guidance", guidances, train, **constant),
        **curve(f"{before}variance", "variance", [0.0, 0.5, 1.0], train, **ancestral),
        **curve(f"{before}guidance falling", "guidance", falling, train),
    }


def diversity_curves(head, train):
    """The same for one kind of head, and what masks in sampling do."""
    masked = dict(train, mask=True)
    return {
        **draw_curves(f"{head}: ", train),
        **curve(f"{head}: mask in sampling", "mask", [False, True], masked),
    }


def steps_curves(orders):
    """Models of 16 levels, drawn in 1, 2, 4, 8 and 16 steps: who needs the fewest?

    orders: name -> ordering. In `shuffle` and `raster` what is known stays, as in MAR.
    """
    small = dict(SMALL_IMAGES, levels=evenly(16), attention="markov", levels_per_image=1)
    heads = {"mixing head": {}, "token head": dict(head_mixing=False, head_draws=4)}
    rows = {}
    for head, settings in heads.items():
        for name, ordering in orders.items():
            train = dict(small, **settings, ordering=ordering)
            label = f"{head}: {name}"
            for n in (1, 2, 4, 8, 16):
                draw = dict(levels=evenly(n), head_steps=8)
                if name in ("shuffle", "raster"):
                    draw["step_rule"] = "locked"
                rows[f"{label} {n}"] = dict(train, curve=label, value=n, draw=draw)
    return rows


SMALL_IMAGES = dict(
    data="folder",
    image_size=16,
    patch_size=2,
    width=128,
    depth=4,
    head_width=128,
    batch=32,
    lr=2e-3,
    warmup=100,
    ema=0.999,
)
ORDERS = {
    "dct": "dct",
    "resize": "resize",
    "haar": "haar",
    "shuffle": "shuffle",
    "raster": "raster",
    "high to low": HIGH_TO_LOW,
}
EIGHT = dict(levels=evenly(8), attention="markov", levels_per_image=0)
MASKED = dict(mask=True)

COMPARISONS = {
    "orderings": {
        **{name: dict(ordering=name) for name in far.ORDERINGS},
        "high to low": dict(ordering=HIGH_TO_LOW),
        "high to low at 1/2 3/4 1": dict(ordering=HIGH_TO_LOW, levels=[0.5, 0.75, 1]),
        "one level": dict(levels=[1]),
    },
    "targets": {
        "full": dict(target="full"),
        "next": dict(target="next"),
        "residual": dict(target="residual"),
    },
    "levels": {
        "default": {},
        "1 level": dict(levels=[1]),
        "2 levels: 1/4 1": dict(levels=[0.25, 1]),
        "2 levels: 1/2 1": dict(levels=[0.5, 1]),
        "4 levels": dict(levels=evenly(4)),
        "6 levels": dict(levels=evenly(6)),
        "8 levels": dict(levels=evenly(8)),
        # One model that reads x_i alone, and so can leave levels out.
        "8 levels markov": EIGHT,
        "4 of 8": dict(EIGHT, draw=dict(levels=[0.25, 0.5, 0.75, 1.0])),
        "2 of 8": dict(EIGHT, draw=dict(levels=[0.25, 1.0])),
        "1 of 8": dict(EIGHT, draw=dict(levels=[1.0])),
    },
    "components": {
        "default": {},
        "token head": dict(head_mixing=False),
        "token head with 4 draws": dict(head_mixing=False, head_draws=4),
        "4 draws": dict(head_draws=4),
        "markov": dict(attention="markov", levels_per_image=0),
        "markov with one level an image": dict(attention="markov", levels_per_image=1),
        "masks": MASKED,
        "masks in training alone": dict(MASKED, draw=dict(mask=False)),
        "no loss weights": dict(loss_weighting=False),
        "noise prediction": dict(prediction="eps", schedule="cosine"),
        "no condition token": dict(cond_tokens=0),
        "locked steps": dict(draw=dict(step_rule="locked")),
        "rising head steps": dict(draw=dict(head_steps=steps_by_level(6, 18))),
        "falling head steps": dict(draw=dict(head_steps=steps_by_level(18, 6))),
        "the paper's recipe": dict(paper=True),
    },
    "sampler": {
        "the paper's": dict(draw=paper_sampler()),
        "the paper's at the smaller variance": dict(draw=paper_sampler(variance=0.0)),
        "the paper's at temperature 1": dict(draw=paper_sampler(temperature=1.0)),
        **curve("ddpm", "head_steps", [12, 25, 50, 100], solver="ddpm", temperature=1.0),
        **curve("ddim", "head_steps", [4, 6, 8, 12, 25, 50], solver="ddim"),
        **curve("dpmpp_2m", "head_steps", [4, 6, 8, 12, 25], solver="dpmpp_2m"),
    },
    "draws": draw_curves(),
    "diversity": {
        **diversity_curves("mixing head", dict(patch_size=2)),
        **diversity_curves("token head", dict(patch_size=2, head_mixing=False)),
    },
    # On a folder of pictures, shrunk to 16 x 16 pixels.
    "claim": steps_curves(ORDERS),
}

# Comparisons whose rows differ in settings of FAR.sample alone.
DRAWS = ("sampler", "draws")

# Comparisons whose rows are curves -> what is on the axes.
AXES = {
    "sampler": ("calls", ("fd", "recall")),
    "draws": ("recall", ("precision", "fd")),
    "diversity": ("recall", ("precision", "fd")),
    "claim": ("levels", ("fd", "precision", "recall")),
}


# ==== Runs
def to_flags(settings):
    """dict(head_mixing=False, levels=[0.25, 1]) -> ["--no-head-mixing", "--levels", "0.25,1"]."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True:
            flags.append(f"--{flag}")
        elif value is False:
            flags.append(f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{flag}", ",".join(map(str, value))]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def digest(*things):
    """A short name for whatever json can hold, the same in every process."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:12]


def train(flags, ordering, args):
    """Trains a model with these flags, if that is not done yet -> the folder of its ckpt.pt."""
    code = ""
    if ":" in ordering:  # a changed file is another ordering
        code = Path(ordering.rsplit(":", 1)[0]).read_text()
    folder = Path(args.out, "models", digest(flags, code))
    finished = folder / "finished"
    if finished.exists():
        return folder
    script = HERE.parent / "train_cifar.py"
    command = [sys.executable, str(script), *flags, "--out", str(folder), "--overwrite"]
    if subprocess.run([*command, "--device", args.device]).returncode:
        raise SystemExit(
            "sweep.py: this run failed; the sweep goes on from there when started again"
        )
    finished.touch()
    return folder


def draw_and_score(ckpt, folder, seed, draw, args):
    """Draws from the model in ckpt, if that is not done yet -> its scores, a dict.

    folder: where they are kept.
    """
    file = folder / f"scores_{digest(seed, draw, args.n, args.real, args.score)}.json"
    if file.exists():
        return json.loads(file.read_text())
    model, rest = sample.load_checkpoint(ckpt, args.device)
    c = model.config
    n = args.n or 1000
    if not args.score:
        real, truth = sample.load_real(args.real, c, rest.get("classes") or [])
        n = args.n or len(real)
    labels = sample.parse_labels(None, n, c.num_classes)
    drawing = sample.Drawing(labels, torch.clone, keep_pixels=True)
    batch_sizes = []
    model.head.register_forward_hook(lambda head, inputs, output: batch_sizes.append(len(output)))
    begin = time.perf_counter()
    for start, levels in sample.draw_images(model, labels, seed, return_levels=True, **draw):
        drawing.add(start, levels)
    seconds = time.perf_counter() - begin

    shown = draw.get("levels", c.levels)
    steps = [i for i, keep in enumerate(c.levels, 1) if keep in shown]
    # Evaluations of the head for one image; guidance takes two at a time.
    calls = sum(batch_sizes) / n
    scores = dict(ms=1000 * seconds / n, calls=calls, levels=len(steps))
    if args.score:
        scores.update(score_by_command(args.score, drawing))
    else:
        scores.update(sample.compare(drawing, real, truth, model, steps))

    def save(part):
        part.write(json.dumps(scores).encode())

    sample.write_file(file, save)
    return scores


def score_by_command(command, drawing):
    """What a program of the user's says of the samples: its lines of a name and a number."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "samples.npz")
        drawing.save_npz(file)
        words = [word.replace("{}", file) for word in shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True)
    problem = (done.stderr.strip().splitlines() or ["it prints no reason"])[-1]
    far.check(done.returncode == 0, f"--score {command} failed ({problem})")
    scores = {}
    for line in done.stdout.splitlines():
        name, _, value = line.strip().partition(" ")
        with contextlib.suppress(ValueError):
            scores[name] = float(value)
    missing = [name for name in METRICS if name not in scores]
    far.check(not missing, f"--score {command} must print lines such as 'fd 1.5'; not {missing}")
    return scores


def do_row(name, row, seed, args):
    """One line of scores.csv: the row's name, its seed, the scores."""
    settings = dict(row)
    draw = settings.pop("draw", {})
    settings.pop("curve", None)
    settings.pop("value", None)
    ckpt, folder = args.ckpt, args.scores
    if not ckpt:
        ordering = settings.get("ordering", "")
        sample.load_ordering(ordering)
        flags = [*args.common, *to_flags(settings), "--seed", str(seed)]
        folder = train(flags, ordering, args)
        ckpt = folder / "ckpt.pt"
    return dict(row=name, seed=seed, **draw_and_score(ckpt, folder, seed, draw, args))


# ==== Results
def mean_and_range(values):
    """[0.1, 0.2, 0.3] -> "0.200 (0.100–0.300)"; a single value stands alone."""
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({min(values):.3f}–{max(values):.3f})"
    return text


def print_table(rows, lines):
    """Mean and range of each row, as a table of Markdown."""
    metrics = [*METRICS, "ms"]
    print("| | " + " | ".join(metrics) + " |")
    print("|---" * (1 + len(metrics)) + "|")
    for name in rows:
        cells = [mean_and_range(values_of(lines, name, metric)) for metric in metrics]
        print(f"| {name} | " + " | ".join(cells) + " |")


def values_of(lines, name, metric):
    """A metric of a row, one value per seed."""
    return [line[metric] for line in lines if line["row"] == name]


def write_csv(path, lines):
    names = []
    for line in lines:
        names += [name for name in line if name not in names]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def plot_dots(path, rows, lines):
    """Every row a line of dots, one per seed, for each metric."""
    size = (12, 1 + 0.3 * len(rows))
    figure, axes = plt.subplots(1, len(METRICS), sharey=True, figsize=size, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, name in enumerate(rows):
            values = values_of(lines, name, metric)
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            axis.plot(np.mean(values), place, "|", color="black", markersize=12)
        axis.set_title(metric)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.savefig(path)
    plt.close(figure)


def plot_curves(path, rows, lines, axes_of):
    """The mean over seeds of each row as a point; rows of one curve are joined.

    Of curves such as "mixing head: dct" and "token head: dct" the first part gives the line, the
    second the colour.
    """
    x_name, y_names = axes_of
    size = (7 * len(y_names), 5)
    figure, axes = plt.subplots(1, len(y_names), figsize=size, layout="constrained")
    curves = {}
    for name, row in rows.items():
        curves.setdefault(row.get("curve", name), []).append(name)
    # A label of one part has no first part: "".
    parts = {label: label.rpartition(": ") for label in curves}
    firsts = distinct(first for first, _, _ in parts.values())
    lasts = distinct(last for _, _, last in parts.values())
    for axis, y_name in zip(axes, y_names, strict=True):
        for label, names in curves.items():
            x = [np.mean(values_of(lines, name, x_name)) for name in names]
            y = [np.mean(values_of(lines, name, y_name)) for name in names]
            first, _, last = parts[label]
            line = ("-", "--", ":")[firsts.index(first) % 3]
            colour = f"C{lasts.index(last)}"
            style = dict(linestyle=line, color=colour, marker="o", markersize=4, alpha=0.7)
            axis.plot(x, y, label=label, **style)
            if x_name == "levels":
                continue  # the value of a row is where it stands
            for name, *place in zip(names, x, y, strict=True):
                axis.annotate(rows[name].get("value", ""), place, fontsize=7)
        axis.set_xlabel(x_name)
        axis.set_ylabel(y_name)
        axis.grid(alpha=0.3)
        if x_name in ("calls", "levels"):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def distinct(values):
    """Each value once, in the order in which they come."""
    return list(dict.fromkeys(values))


# ==== Command line
def make_parser():
    more = "All other flags are passed on to train_cifar.py, for all rows; a row's own flags win."
    parser = sample.new_parser(__doc__, epilog=more)
    add = parser.add_argument
    add("name", choices=COMPARISONS, help="the comparison")
    add("--rows", help="only these rows or curves, such as dct,raster (default: all)")
    add(
        "--ordering", action="append", default=[], help="file.py:function, one more row; repeatable"
    )
    text = "draw from this checkpoint and train nothing; for sampler, draws"
    add("--ckpt", metavar="FILE", help=text)
    add("--seeds", default="0,1,2", help="default: %(default)s")
    add("--steps", type=int, help="training steps of a run (default: 1000)")
    add("--max-minutes", type=float, help="equal time in place of equal steps")
    text = "samples to score (default: as many as there are real images; with --score 1000)"
    add("--n", type=int, help=text)
    add("--real", help="npz file or folder of real images (default: the digits)")
    text = "a command that scores samples in place of --real; {} is the npz file of the samples"
    add("--score", metavar="COMMAND", help=text)
    add("--out", default="out/sweep", help="folder to write (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: %(default)s")
    return parser


def common_flags(args, others):
    """The flags of train_cifar.py that all rows share."""
    if args.steps is None and args.max_minutes is None:
        args.steps = 1000
    flags = ["--data", "digits"]
    if args.steps is not None:
        flags += ["--steps", str(args.steps)]
    if args.max_minutes is not None:
        flags += ["--max-minutes", str(args.max_minutes)]
    return [*flags, *others]


def chosen_rows(args):
    """The rows of the comparison that --rows names, and those of --ordering."""
    rows = COMPARISONS[args.name]
    if args.rows:
        names = args.rows.split(",")
        chosen = {}
        for name, row in rows.items():
            if name in names or row.get("curve") in names:
                chosen[name] = row
        known = {*rows, *(row.get("curve") for row in rows.values())}
        unknown = [name for name in names if name not in known]
        allowed = ", ".join(rows)
        far.check(not unknown, f"--rows has {unknown}; {args.name} has {allowed}")
        rows = chosen
    own = {name: dict(ordering=name) for name in args.ordering}
    if args.name == "claim":
        own = steps_curves({name: name for name in args.ordering})
    return {**rows, **own}


def check_draws(args, rows, others):
    """With --ckpt the rows may differ in how they draw alone."""
    far.check(args.name in DRAWS, f"--ckpt trains nothing; it is for {' and '.join(DRAWS)}")
    far.check(not others, f"--ckpt trains nothing; it cannot take {' '.join(others)}")
    for name in ("ordering", "steps", "max_minutes"):
        flag = sample.flag_of(name)
        far.check(not getattr(args, name), f"--ckpt trains nothing; it cannot take {flag}")
    model, _ = sample.load_checkpoint(args.ckpt, "cpu")
    for row in rows.values():
        far.sampling_config(model, row["draw"])


def scores_folder(args):
    """Where the scores of --ckpt are kept: a folder for what the file holds, not for its name."""
    weights = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()
    folder = Path(args.out, "models", digest(weights))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv=None):
    args, others = make_parser().parse_known_args(argv)
    for name in args.ordering:
        far.check(":" in name, f"--ordering is {name}; it must be file.py:function")
        sample.load_ordering(name)  # an error now, not after the other rows
    on_digits = args.name != "claim"
    far.check(on_digits or args.score or args.real, "claim needs --score, or --real of its images")
    args.real = args.real or os.path.relpath(HERE.parent / "assets" / "digits.npz")
    rows = chosen_rows(args)
    args.scores = None
    if args.ckpt:
        check_draws(args, rows, others)
        args.scores = scores_folder(args)
    args.common = common_flags(args, others)
    far.check(args.n is None or args.n > 5, "--n must be above 5")
    good = all(seed.isdigit() for seed in args.seeds.split(","))
    far.check(good, f"--seeds is {args.seeds}; it must be whole numbers such as 0,1,2")

    lines = []
    for name, row in rows.items():
        for seed in args.seeds.split(","):
            print(f"{args.name}: {name}, seed {seed}", flush=True)
            lines.append(do_row(name, row, int(seed), args))

    folder = Path(args.out, args.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "scores.csv", lines)
    if args.name in AXES:
        plot_curves(folder / "plot.png", rows, lines, AXES[args.name])
    else:
        plot_dots(folder / "plot.png", rows, lines)
    print_table(rows, lines)
    print(f"wrote {folder / 'scores.csv'} and {folder / 'plot.png'}")


if __name__ == "__main__":
    with sample.stopped_in_a_sentence("sweep.py"):
        main()
