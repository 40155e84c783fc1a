"""Text to image in small: pictures of digits with captions in plain English, and their judge.

    python experiments/scenes.py data/scenes                       # 60,000 pictures of 24 x 24
    python experiments/scenes.py --score out/seen.npz out/heldout.npz out/unseen.npz

The first writes what train_cifar.py --data captions --path data/scenes reads, and prompts to draw
with sample.py --prompts: prompts_seen.txt, captions of the training; prompts_heldout.txt, whose
combinations it never shows (a colour with a digit, a count with a digit, a pair of digits in a
relation); prompts_unseen.txt, known scenes in words that it never uses. data/scenes/one-hot is a
text encoder that gives each word a one-hot vector: --text-encoder data/scenes/one-hot.

The second judges files of sample.py --npz, as GenEval does (Ghosh et al. 2023): the digits of a
picture are found, and all that its prompt says must hold. Real scenes of digits that the training
pictures do not show are judged beside them.

Between them, half an hour on two CPU cores:

    python train_cifar.py --data captions --path data/scenes \\
        --text-encoder data/all-MiniLM-L6-v2 --preset scenes --batch 64 \\
        --lr 1e-3 --warmup 200 --ema 0.999 --max-minutes 30
    python sample.py --ckpt out/captions/ckpt.pt --n 420 --prompts data/scenes/prompts_seen.txt \\
        --npz out/seen.npz
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from far import check

SIDE = 24  # of a picture, in pixels
DIGIT = 10  # of a digit, in the middle of a quarter of the picture

# ==== What a picture shows, and what is said of it
ONE = "zero one two three four five six seven eight nine".split()
MANY = "zeros ones twos threes fours fives sixes sevens eights nines".split()
GROUPS = {2: "pair", 3: "trio", 4: "quartet"}

COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 255, 60),
    "blue": (60, 110, 255),
    "yellow": (255, 225, 40),
    "pink": (255, 90, 220),
    "white": (255, 255, 255),
}

# Of the first digit to the second: steps right and down, and the opposite.
RELATIONS = {
    "left": ((-1, 0), "right"),
    "right": ((1, 0), "left"),
    "above": ((0, -1), "below"),
    "below": ((0, 1), "above"),
}

# In training, and in the prompts of unseen words.
RELATION_WORDS = {
    "left": ["left of", "to the left of"],
    "right": ["right of", "to the right of"],
    "above": ["above", "over"],
    "below": ["below", "under"],
}
UNSEEN_RELATION_WORDS = {
    "left": ["on the left side of"],
    "right": ["on the right side of"],
    "above": ["on top of"],
    "below": ["beneath"],
}
UNSEEN_COLOURS = {
    "red": "scarlet",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "pink": "magenta",
    "white": "snowy",
}

# {a} and {b} are such as "a red three", or where the scene has no colours "a three", as {plain} is.
TWO = ["{a} and {b}", "a picture of {a} and {b}", "{a} with {b}"]
RELATED = ["{a} {relation} {b}"]  # two, by the words for the relation
WORDINGS = {
    "single object": ["{a}", "a picture of {a}", "there is {a}"],
    "two objects": TWO,
    "counting": ["{count} {many}", "a picture of {count} {many}", "there are {count} {many}"],
    "colours": ["{a}", "a picture of {a}", "{plain} in {colour}"],
    "position": RELATED,
    "colour attribution": TWO,
    "colours and position": RELATED,
}
UNSEEN_WORDINGS = {
    "single object": ["the numeral {number}"],
    "two objects": ["the numerals {number} plus {other_number}"],
    "counting": ["a {group} of {many}"],
    "colours": ["{a}"],
    "position": ["{a} {relation} {b}"],
    "colour attribution": ["{a} and {b}"],
    "colours and position": ["{a} {relation} {b}"],
}

# Shares of the training pictures.
SHARES = {
    "single object": 0.1,
    "two objects": 0.1,
    "counting": 0.15,
    "colours": 0.1,
    "position": 0.2,
    "colour attribution": 0.1,
    "colours and position": 0.25,
}


class Scene(NamedTuple):
    """What a caption says: digits, their colours (none: any), the relation of the first to the
    second (none: any)."""

    kind: str
    digits: tuple
    colours: tuple = ()
    relation: str = None


def all_scenes():
    """Every scene that can be said, by kind."""
    scenes = {kind: [] for kind in WORDINGS}

    def add(*scene):
        scenes[scene[0]].append(Scene(*scene))

    for a in range(10):
        add("single object", (a,))
        for count in GROUPS:
            add("counting", (a,) * count)
        for colour in COLOURS:
            add("colours", (a,), (colour,))
    for a in range(10):
        for b in set(range(10)) - {a}:
            add_pairs(add, (a, b))
    return scenes


def add_pairs(add, digits):
    """All scenes of two different digits."""
    add("two objects", digits)
    colours = [(c, d) for c in COLOURS for d in COLOURS if c != d]
    for pair in colours:
        add("colour attribution", digits, pair)
    for relation in RELATIONS:
        add("position", digits, (), relation)
        for pair in colours:
            add("colours and position", digits, pair, relation)


def is_held_out(scene):
    """Is there a combination that the training never shows?"""
    digits, colours = scene.digits, scene.colours
    if scene.kind == "counting":
        return count_held_out(digits[0], len(digits))
    if any(colour_held_out(*pair) for pair in zip(digits, colours, strict=False)):
        return True
    return scene.relation is not None and relation_held_out(*digits, scene.relation)


def count_held_out(digit, count):
    """Two digits of each count: a fifth."""
    return (digit + count) % 5 == 0


def colour_held_out(digit, colour):
    """A digit or two of each colour: a sixth."""
    return (digit + list(COLOURS).index(colour)) % 6 == 0


def relation_held_out(a, b, relation):
    """At most one relation of each pair of digits: a sixth."""
    if a > b:  # 7 left of 3 is 3 right of 7
        a, b, relation = b, a, RELATIONS[relation][1]
    return (a + 2 * b + list(RELATIONS).index(relation)) % 6 == 0


def with_article(word):
    article = "a"
    if word[0] in "aei":  # an eight, an azure six; a one
        article = "an"
    return f"{article} {word}"


def captions_of(scene, seen=True):
    """All captions of a scene: those of the training, or those of unseen words."""
    digits = scene.digits
    wordings, relation_words = WORDINGS, RELATION_WORDS
    colours = list(scene.colours)
    if not seen:
        wordings, relation_words = UNSEEN_WORDINGS, UNSEEN_RELATION_WORDS
        colours = [UNSEEN_COLOURS[colour] for colour in colours]
    nouns = [ONE[digit] for digit in digits]
    if colours:
        nouns = [f"{colour} {noun}" for colour, noun in zip(colours, nouns, strict=True)]
    parts = dict(
        a=with_article(nouns[0]),
        b=with_article(nouns[-1]),
        plain=with_article(ONE[digits[0]]),
        many=MANY[digits[0]],
        number=digits[0],
        other_number=digits[-1],
        count=ONE[len(digits)],
        group=GROUPS.get(len(digits)),
        colour=" ".join(colours),
    )
    captions = []
    for wording in wordings[scene.kind]:
        for words in relation_words.get(scene.relation, [""]):
            captions.append(wording.format(relation=words, **parts))
    return captions


def scenes_by_caption():
    """Every caption -> its scene."""
    found = {}
    for scenes in all_scenes().values():
        for scene in scenes:
            for caption in captions_of(scene) + captions_of(scene, seen=False):
                found[caption] = scene
    return found


# ==== Pictures
def load_digits():
    """Digits float32 [n, DIGIT, DIGIT] in [0, 1] and labels [n]: those to train with, and those to
    judge."""
    file = np.load(os.path.join(sample.ROOT, "assets", "digits.npz"))
    labels = file["labels"]
    enlarged = [Image.fromarray(x).resize((DIGIT, DIGIT)) for x in file["images"][..., 0]]
    images = np.stack(enlarged) / np.float32(255)
    other = np.arange(len(images)) % 4 == 0
    return (images[~other], labels[~other]), (images[other], labels[other])


def holds(relation, a, b):
    """Does the relation hold of places a and b, (row, column)? To the left is more left than up."""
    (right, down), _ = RELATIONS[relation]
    along = right * (a[1] - b[1]) + down * (a[0] - b[0])
    across = down * (a[1] - b[1]) + right * (a[0] - b[0])
    return along > abs(across)


def places(count, relation, rng):
    """Upper left corners of digits, each in a quarter of its own, [count, 2], row and column.

    The first two are in the relation.
    """
    quarter = SIDE // 2
    while True:
        chosen = rng.permutation(4)[:count]
        corner = quarter * np.stack([chosen // 2, chosen % 2], 1)
        if relation is None or holds(relation, *corner):
            return corner + (quarter - DIGIT) // 2


def draw_scene(scene, digits, rng):
    """A picture of a scene, uint8 [SIDE, SIDE, 3]: what it leaves open is random.

    digits: images and labels, as from `load_digits`. Nothing open becomes what is held out.
    """
    images, labels = digits
    colours = scene.colours
    if not colours:
        colours = open_colours(scene.digits, rng)
    relation = scene.relation
    if scene.kind in ("two objects", "colour attribution"):
        allowed = [r for r in RELATIONS if not relation_held_out(*scene.digits, r)]
        relation = str(rng.choice(allowed))
    picture = np.zeros((SIDE, SIDE, 3), np.float32)
    for digit, colour, place in zip(
        scene.digits, colours, places(len(scene.digits), relation, rng), strict=True
    ):
        image = images[rng.choice(np.flatnonzero(labels == digit))]
        row, column = place
        picture[row : row + DIGIT, column : column + DIGIT] += image[..., None] * COLOURS[colour]
    return picture.round().clip(0, 255).astype(np.uint8)


def open_colours(digits, rng):
    """Random colours: of several equal digits one, of others each its own."""
    colours = []
    for digit in digits:
        allowed = [colour for colour in COLOURS if not colour_held_out(digit, colour)]
        colours.append(str(rng.choice(allowed)))
    if len(set(digits)) == 1:
        return colours[:1] * len(digits)
    return colours


# ==== The data set
def write_scenes(folder, n, seed):
    """Writes n training pictures, the prompts and the one-hot encoder; metadata.jsonl is last."""
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    known = {kind: [s for s in scenes[kind] if not is_held_out(s)] for kind in scenes}
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    write_one_hot(Path(folder, "one-hot"))  # first: it needs transformers
    digits, _ = load_digits()
    lines = []
    said = {kind: [] for kind in scenes}
    for i in tqdm(range(n), desc="draw scenes", unit="picture"):
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        scene = known[kind][rng.integers(len(known[kind]))]
        captions = captions_of(scene)
        # Two wordings of each.
        text = [captions[k] for k in rng.permutation(len(captions))[:2]]
        name = f"images/{i:06d}.png"
        Image.fromarray(draw_scene(scene, digits, rng)).save(Path(folder, name))
        lines.append(dict(file_name=name, text=text))
        said[kind] += text
    write_prompts(folder, scenes, said, rng)
    write_lines(Path(folder, "metadata.jsonl"), [json.dumps(line) for line in lines])


def write_prompts(folder, scenes, said, rng, per_kind=30):
    """prompts_seen.txt, prompts_heldout.txt and prompts_unseen.txt: at most so many of each kind.

    said: the captions of the training pictures, by kind.
    """
    files = {"seen": [], "heldout": [], "unseen": []}
    for kind in scenes:
        held_out, unseen = [], []
        for scene in scenes[kind]:
            if is_held_out(scene):
                held_out += captions_of(scene)
            else:
                unseen += captions_of(scene, seen=False)
        for name, found in (("seen", said[kind]), ("heldout", held_out), ("unseen", unseen)):
            found = sorted(set(found))
            files[name] += [found[k] for k in rng.permutation(len(found))[:per_kind]]
    for name, prompts in files.items():
        write_lines(Path(folder, f"prompts_{name}.txt"), prompts)


def write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    sample.write_file(path, lambda file: file.write(text.encode()))


def write_one_hot(folder):
    """A text encoder of transformers: a one-hot vector (times a number) for each word of the
    training, one for all others. It is a language model without layers."""
    with sample.explained("the one-hot encoder needs pip install transformers"):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
    words = set()
    for scenes in all_scenes().values():
        for scene in scenes:
            words.update(*map(str.split, captions_of(scene)))
    words = ["[UNK]", "[PAD]", *sorted(words)]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    n = len(words)
    settings = dict(vocab_size=n, hidden_size=n, intermediate_size=1, num_attention_heads=1)
    model = LlamaModel(LlamaConfig(num_hidden_layers=0, max_position_embeddings=64, **settings))
    torch.nn.init.eye_(model.embed_tokens.weight)
    model.save_pretrained(folder)


# ==== The judge
class Judge:
    """Finds the digits of pictures, and says whether what is said of a scene holds."""

    def __init__(self):
        with sample.explained("the judge needs pip install scipy"):
            import scipy.ndimage
        self.ndimage = scipy.ndimage
        (images, self.labels), _ = load_digits()
        middle = np.stack([self.centred(image) for image in images])
        padded = np.pad(middle, ((0, 0), (1, 1), (1, 1)))
        # Each digit in 9 places, a pixel apart: the nearest counts.
        shifted = [padded[:, r : r + DIGIT, c : c + DIGIT] for r in range(3) for c in range(3)]
        self.known = torch.from_numpy(np.stack(shifted)).flatten(2)  # [9, m, DIGIT^2]

    def centred(self, image):
        """What is not dark of an image [H, W] in [0, 1], in the middle of DIGIT x DIGIT pixels."""
        rows = np.flatnonzero((image > 0.2).any(1))
        columns = np.flatnonzero((image > 0.2).any(0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:DIGIT, :DIGIT]
        height, width = ink.shape
        out = np.zeros((DIGIT, DIGIT), np.float32)
        row, column = (DIGIT - height) // 2, (DIGIT - width) // 2
        out[row : row + height, column : column + width] = ink
        return out

    def read(self, crops):
        """Crops [n, DIGIT, DIGIT] -> digits [n]: the vote of the 5 nearest training digits."""
        x = torch.from_numpy(np.stack(crops)).flatten(1)
        votes = []
        for part in x.split(1000):
            distance = torch.stack([torch.cdist(part, known) for known in self.known])
            nearest = distance.min(0).values.topk(5, largest=False).indices
            votes.append(torch.from_numpy(self.labels)[nearest].mode(1).values)
        return torch.cat(votes).tolist()

    def find(self, pictures):
        """Pictures uint8 [n, H, W, 3] -> for each a list of (digit, colour, (row, column))."""
        names = list(COLOURS)
        pure = np.array(list(COLOURS.values()), np.float32)
        pure /= np.linalg.norm(pure, axis=1, keepdims=True)
        found, crops = [], []
        for number, picture in enumerate(pictures):
            x = picture.astype(np.float32) / 255
            grey = x.max(2)
            areas, _ = self.ndimage.label(grey > 0.2, np.ones((3, 3)))
            for area, where in enumerate(self.ndimage.find_objects(areas), 1):
                inside = areas == area
                if inside.sum() < 6:  # a speck
                    continue
                crops.append(self.centred(grey * inside))
                colour = names[int((pure @ x[inside].mean(0)).argmax())]
                middle = tuple((s.start + s.stop) / 2 for s in where)
                found.append((number, colour, middle))
        scenes = [[] for _ in pictures]
        for (number, colour, middle), digit in zip(found, self.read(crops), strict=True):
            scenes[number].append((digit, colour, middle))
        return scenes

    def holds(self, scene, found):
        """Does all that is said hold of what was found, and is there nothing else?"""
        wanted = sorted(scene.digits)
        if sorted(digit for digit, _, _ in found) != wanted:
            return False
        # Digits of different value stand for themselves.
        place = {digit: middle for digit, _, middle in found}
        shown = {digit: colour for digit, colour, _ in found}
        for digit, colour in zip(scene.digits, scene.colours, strict=False):
            if shown[digit] != colour:
                return False
        if scene.relation is None:
            return True
        return holds(scene.relation, *(place[digit] for digit in scene.digits))


def score(judge, pictures, scenes):
    """The share of pictures that show their scene, by kind."""
    found = judge.find(pictures)
    right = {kind: [] for kind in WORDINGS}
    for scene, digits in zip(scenes, found, strict=True):
        right[scene.kind].append(judge.holds(scene, digits))
    return {kind: float(np.mean(hits)) for kind, hits in right.items() if hits}


def read_samples(file, known):
    """An npz file of sample.py -> (pictures uint8 [n, SIDE, SIDE, 3], their scenes)."""
    with sample.explained(f"{file} is no file of sample.py --npz with prompts of scenes.py"):
        arrays = np.load(file)
        pictures, prompts = arrays["arr_0"], arrays["arr_1"]
        good = pictures.shape == (len(prompts), SIDE, SIDE, 3)
        check(good, f"its pictures have shape {list(pictures.shape)}")
        unknown = sorted({str(prompt) for prompt in prompts} - set(known))
        check(not unknown, f"{unknown[:3]} are no captions of scenes.py")
    return pictures, [known[str(prompt)] for prompt in prompts]


def print_scores(files, seed):
    known = scenes_by_caption()
    samples = {file: read_samples(file, known) for file in files}
    judge = Judge()
    _, digits = load_digits()
    rng = np.random.default_rng(seed)
    print("| | " + " | ".join(WORDINGS) + " | mean |")
    print("|---" * (len(WORDINGS) + 2) + "|")
    for file, (pictures, scenes) in samples.items():
        print_row(file, score(judge, pictures, scenes))
        real = np.stack([draw_scene(scene, digits, rng) for scene in scenes])
        print_row("real scenes for its prompts", score(judge, real, scenes))


def print_row(name, scores):
    cells = []
    for kind in WORDINGS:
        cell = ""
        if kind in scores:
            cell = f"{scores[kind]:.2f}"
        cells.append(cell)
    cells.append(f"{np.mean(list(scores.values())):.2f}")
    print(f"| {name} | " + " | ".join(cells) + " |")


# ==== Command line
def make_parser():
    parser = sample.new_parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", help="folder to write")
    add("--n", type=int, default=60000, help="number of training pictures (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--score", nargs="+", metavar="NPZ", help="files of sample.py --npz to judge")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    check(bool(args.folder) != bool(args.score), "give a folder to write, or --score and files")
    check(args.n >= 1 and args.seed >= 0, "--n must be at least 1, --seed at least 0")
    if args.score:
        return print_scores(args.score, args.seed)
    finished = Path(args.folder, "metadata.jsonl")
    check(not finished.exists(), f"{finished} exists: choose another folder")
    write_scenes(args.folder, args.n, args.seed)
    print(f"wrote {finished} and {args.n} pictures")


if __name__ == "__main__":
    with sample.stopped_in_a_sentence("scenes.py"):
        main()
