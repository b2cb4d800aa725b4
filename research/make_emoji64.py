"""Render emoji64: emoji of four vendors at 64x64 RGBA, captioned with name, keywords and style.

The drawings come as SVG from npm's packages of Iconify (`STYLES` names packages and licences), names, keywords and
classes from emojibase. Kept is every emoji that is a thing of its own. Left out are skin tones, hair, men and women
beside the person of a role, families of several people, those who face right, and the flags of countries. Where a
vendor draws two emoji alike, the first one stays. Some captions are never trained on: the module says which, and the
card lists them. Versions and hashes of what was read are in the card, too.

    pip install resvg-py
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/noto-v1@1.2.5 emojibase-data@17.0.0
    python -m research.make_emoji64 --packages .
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from . import EXAMPLES

SIZE = 64
MARGIN = 2
NAMES = "emojibase-data"
# Style, package of npm, its licence, whose drawings they are.
STYLES = {
    "flat": ("fluent-emoji-flat", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "noto": ("noto", "Apache-2.0", "Noto Emoji, Google Inc."),
    "twemoji": ("twemoji", "CC-BY-4.0", "Twemoji, Twitter, Inc. and other contributors"),
    "blob": ("noto-v1", "Apache-2.0", "Noto Emoji before 2017, Google Inc."),
}
# Combinations of words that training sees only apart: in no style are these trained on.
COMBINATIONS = (
    "purple heart", "green heart", "yellow circle", "brown circle", "orange square", "blue square",
    "large blue diamond", "orange book", "green apple", "smiling cat with heart-eyes", "pig face", "four o'clock",
    "nine-thirty", "down-left arrow", "keycap: 7",
)  # fmt: skip
# Of the emoji that every style has, one in so many is left out of one style, of each in its turn.
STYLE_HELD_OUT_EVERY = 30
NUM_SEEN = 100
# Nobody has drawn these; every word of them occurs in training.
NOVEL = (
    "blue apple", "purple apple", "red banana", "green strawberry", "blue pizza", "pink car", "purple bus",
    "yellow house", "green dog face", "blue cat face", "red elephant", "orange fish", "black bear",
    "white rabbit face", "purple frog", "blue tree", "red leaf", "yellow mushroom", "black star", "red moon",
    "green fire", "pink cloud", "purple umbrella", "yellow key", "red clock", "dog face with tears of joy",
    "bear with sunglasses", "apple with heart-eyes", "cat with hat", "star with sunglasses",
)  # fmt: skip

ZERO_WIDTH_JOINER, RIGHTWARDS = "200D", "27A1"
MAN_OR_WOMAN = ("1F468", "1F469")
HAIR = ("1F9B0", "1F9B1", "1F9B2", "1F9B3")
STRAIGHT_QUOTES = str.maketrans("’“”", '\'""')
BITS = 6
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">{body}</svg>'
)

# The card declares no `configs`: with them, `datasets` would not notice that a local copy of the data has changed.
CARD = """---
license: [mit, apache-2.0, cc-by-4.0]
pretty_name: emoji64
language: en
task_categories:
- text-to-image
size_categories:
- 1K<n<10K
---

# emoji64

{images:,} drawings of {concepts:,} emoji by four vendors at {size}x{size} RGBA, each with captions: a data set small
enough to train a text-to-image model on a laptop, and free to share.

```python
from datasets import load_dataset

emoji = load_dataset("examples/data/emoji64", split="train")
```

| column | content |
|---|---|
| `image` | {size}x{size} RGBA, transparent behind the emoji, at least {margin} transparent pixels on each side |
| `captions` | a list of texts for the image: the first two are name with style, and name |
| `name` | the name of the emoji, one for all styles |
| `style` | {styles} |
| `label` | the Unicode subgroup, a `ClassLabel` with {classes} names |
| `emoji` | the emoji itself |

The captions of one image:

{example}

## How it was made

`research/make_emoji64.py` renders SVGs of npm's packages with resvg, each vendor's whole canvas in {inner} pixels. Kept
is every emoji that is a thing of its own: no skin tones, no hair, no men and women beside the person of a role, no
families of several people, nobody who faces right, no flags of countries; {duplicates} drawings that repeat another of
the same vendor are left out. Every channel is rounded to {bits} bits, and pictures are lossless WebP.

| style | drawings by | package of npm | licence | train | held out | SHA-256 of the package |
|---|---|---|---|---|---|---|
{table}

Names, keywords and subgroups are those of npm's `emojibase-data` {names_version}, MIT, SHA-256
`{names_hash}`.

## Held out, never trained on

The split `test` has {test:,} images of two kinds, and nothing may be trained on them:

- **Combinations.** Training sees these words only apart, whatever the style: {combinations}.
- **Styles.** These emoji are left out in one style, and trained on in the three others: {style_pairs}.

Lists of prompts, one a line:

| file | prompts |
|---|---|
| `prompts/seen.txt` | {seen} captions of training, evenly spaced over the emoji, each style in its turn: a model is asked for them to see whether it is recognised |
| `prompts/held_out.txt` | the {held_out} captions, name with style, of `test` |
| `prompts/novel.txt` | {novel} combinations that nobody has drawn, of words that training has |

## Licence

Each drawing has the licence of its style, in the table; `LICENSE` has the notices. All of them were rendered at
{size}x{size} pixels, their channels rounded to {bits} bits, and are otherwise unchanged. Noto is a trademark of Google Inc.; the vendors have no part in this
data set.
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="Folder with the .tgz files of `npm pack`.")
    parser.add_argument("--output_dir", type=Path, default=EXAMPLES / "data" / "emoji64")
    return parser.parse_args(argv)


class Package:
    """A package of npm as `npm pack` leaves it: its version, its SHA-256, and its JSON files by name."""

    def __init__(self, folder: Path, name: str):
        found = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
        if len(found) != 1:
            raise ValueError(
                f"The folder {str(folder)!r} must hold one {name}-*.tgz of `npm pack`, found {len(found)}."
            )
        self.file = found[0]
        self.hash = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self.version = self.read("package.json")["version"]

    def read(self, name: str):
        """The content of one of its JSON files."""
        with tarfile.open(self.file) as archive:
            return json.load(archive.extractfile(f"package/{name}"))


def is_variant(codes, gender, subgroup):
    """Whether an emoji is a variant of another one, or the flag of a country.

    Args:
        codes: Its code points, as hexadecimal numbers.
        gender: Whether emojibase gives it a gender.
        subgroup: Its Unicode subgroup.
    """
    if subgroup in ("skin-tone", "hair-style", "country-flag") or RIGHTWARDS in codes[1:]:
        return True
    people = gender or subgroup == "family" or codes[0] in MAN_OR_WOMAN or any(code in HAIR for code in codes)
    return ZERO_WIDTH_JOINER in codes and people


def read_concepts(emoji, subgroups):
    """Selects the emoji to draw, in Unicode's order.

    Args:
        emoji: The entries of emojibase's data.json.
        subgroups: The names of the subgroups, by number as a string.

    Returns:
        One dictionary an emoji with `emoji`, `codes`, `name`, `keywords` and `label` (the subgroup).
    """
    concepts = []
    for entry in sorted((entry for entry in emoji if "group" in entry), key=lambda entry: entry["order"]):
        codes, subgroup = entry["hexcode"].split("-"), subgroups[str(entry["subgroup"])]
        if not is_variant(codes, "gender" in entry, subgroup):
            concepts.append({
                "emoji": entry["emoji"], "codes": codes, "name": entry["label"].translate(STRAIGHT_QUOTES),
                "keywords": [tag.translate(STRAIGHT_QUOTES) for tag in entry.get("tags", [])], "label": subgroup,
            })  # fmt: skip
    return concepts


def make_captions(name, keywords, style):
    """Writes the captions of one drawing.

    Args:
        name: The name of the emoji.
        keywords: What else it is found under.
        style: The style it is drawn in.

    Returns:
        Name with style, name, and where there are keywords that the name does not have, name and keywords with style,
        and keywords alone with style.
    """
    words = set(name.lower().replace(":", " ").replace("-", " ").split())
    more = [keyword for keyword in keywords if keyword.lower() not in words]
    # Every other one of them, so that what remains spreads over an alphabetical list.
    more = more[:: max(1, len(more) // 4)][:4]
    captions = [f"{name}, {style} style", name]
    if more:
        captions += [f"{name}, {', '.join(more)}, {style} style", f"{', '.join(more)}, {style} style"]
    return captions


def find_icon(codes, chars, names, icons):
    """Finds the drawing of an emoji among a vendor's.

    Args:
        codes: Its code points.
        chars: The vendor's names by code points; empty where its package has none.
        names: The same of another vendor, to go by its name.
        icons: The vendor's icons.json.

    Returns:
        The icon with its size, or `None` if there is none.
    """
    key = "-".join(code for code in codes if code != "FE0F").lower()
    name = (chars or names).get(key)
    if name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if {"hFlip", "vFlip", "rotate"} & set(alias):
            return None
        name = alias["parent"]
    if name not in icons["icons"]:
        return None
    size = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
    return size | icons["icons"][name]


def render(icon):
    """Draws an icon: an RGBA image of `SIZE` x `SIZE` pixels, the vendor's canvas in its centre."""
    import resvg_py

    svg = SVG.format(size=SIZE - 2 * MARGIN, **icon)
    drawing = PILImage.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    drawing, image = round_colours(drawing), PILImage.new("RGBA", (SIZE, SIZE))
    # The mask keeps invisible pixels from having a colour.
    image.paste(drawing, (MARGIN, MARGIN), drawing.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    return image


def draw_style(concepts, style, chars, names, icons):
    """Draws what a vendor has of the emoji.

    Returns:
        One row a drawing, and how many were left out since they repeat another.
    """
    rows, seen, duplicates = [], set(), 0
    for concept in concepts:
        icon = find_icon(concept["codes"], chars, names, icons)
        if icon is None:
            continue
        image = render(icon)
        pixels = image.tobytes()
        if pixels in seen or not any(image.getchannel("A").tobytes()):
            duplicates += 1
            continue
        seen.add(pixels)
        captions = make_captions(concept["name"], concept["keywords"], style)
        rows.append({
            "image": encode(image, concept["codes"]), "captions": captions, "name": concept["name"],
            "style": style, "label": concept["label"], "emoji": concept["emoji"],
        })  # fmt: skip
    return rows, duplicates


def round_colours(image):
    """Rounds every channel to `BITS` bits, which nobody sees, and which saves a sixth of the data's size."""
    most = 2**BITS - 1
    return image.point([round(round(value * most / 255) * 255 / most) for value in range(256)] * len(image.getbands()))


def encode(image, codes):
    """Packs an image as lossless WebP under the name of its code points."""
    webp = io.BytesIO()
    image.save(webp, format="WEBP", lossless=True, quality=100, method=6)
    return {"bytes": webp.getvalue(), "path": "-".join(codes).lower() + ".webp"}


def hold_out_styles(rows, every=STYLE_HELD_OUT_EVERY):
    """Chooses which emoji are held out in one style: of those that all styles have, one in `every`.

    Returns:
        The set of (name, style).
    """
    styles = list(dict.fromkeys(row["style"] for row in rows))
    counts = Counter(row["name"] for row in rows if row["name"] not in COMBINATIONS)
    everywhere = [name for name, count in counts.items() if count == len(styles)]
    return {(name, styles[turn % len(styles)]) for turn, name in enumerate(everywhere[every // 3 :: every])}


def choose_seen(rows, number=NUM_SEEN):
    """Chooses prompts from training: evenly spaced over its emoji, each style in its turn, or the next that has it."""
    styles = list(dict.fromkeys(row["style"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    drawn = {(row["name"], row["style"]) for row in rows}
    prompts = []
    for turn in range(number):
        name = names[(2 * turn + 1) * len(names) // (2 * number)]
        style = next(style for style in styles[turn % 4 :] + styles if (name, style) in drawn)
        prompts.append(f"{name}, {style} style")
    return prompts


def make_dataset(rows, labels):
    """A data set of rows, its `label` a class of `labels`."""
    features = {
        "image": Image(), "captions": List(Value("string")), "name": Value("string"), "style": Value("string"),
        "label": ClassLabel(names=labels), "emoji": Value("string"),
    }  # fmt: skip
    return Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features=Features(features))


def write_card(train, test, packages, prompts, duplicates):
    """Writes the data set card, every number in it counted from the data."""
    rows = train + test
    counts = {split: Counter(row["style"] for row in part) for split, part in (("train", train), ("test", test))}
    table = [
        f"| {style} | {author} | `@iconify-json/{package}` {packages[package].version} | {licence} "
        f"| {counts['train'][style]:,} | {counts['test'][style]} | `{packages[package].hash}` |"
        for style, (package, licence, author) in STYLES.items()
    ]
    pairs = [f"{row['name']} ({row['style']})" for row in test if row["name"] not in COMBINATIONS]
    example = next((row for row in train if row["name"] == "red apple"), train[0])
    return CARD.format(
        images=len(rows), concepts=len({row["name"] for row in rows}), size=SIZE, bits=BITS, inner=SIZE - 2 * MARGIN,
        margin=MARGIN, styles=", ".join(f"`{style}`" for style in STYLES), classes=len({row["label"] for row in rows}),
        example="\n".join(f"- {caption}" for caption in example["captions"]), duplicates=duplicates,
        table="\n".join(table), names_version=packages[NAMES].version, names_hash=packages[NAMES].hash, test=len(test),
        combinations="; ".join(COMBINATIONS), style_pairs="; ".join(pairs),
        **{name: len(lines) for name, lines in prompts.items()},
    )  # fmt: skip


def main(args):
    """Writes the data set, its card and its lists of prompts below `args.output_dir`."""
    packages = {name: Package(args.packages, f"iconify-json-{name}") for name, _, _ in STYLES.values()}
    packages[NAMES] = Package(args.packages, NAMES)
    emoji, groups = packages[NAMES].read("en/data.json"), packages[NAMES].read("meta/groups.json")
    concepts = read_concepts(emoji, groups["subgroups"])
    names = packages["noto"].read("chars.json")
    rows, duplicates = [], 0
    for style, (name, _, _) in STYLES.items():
        drawn, repeated = draw_style(
            concepts, style, packages[name].read("chars.json"), names, packages[name].read("icons.json")
        )
        print(f"{style}: {len(drawn)} drawings, {repeated} repeated ones left out")
        rows, duplicates = rows + drawn, duplicates + repeated
    held_out = hold_out_styles(rows)
    order = {concept["name"]: place for place, concept in enumerate(concepts)}
    rows.sort(key=lambda row: order[row["name"]])
    test = [row for row in rows if row["name"] in COMBINATIONS or (row["name"], row["style"]) in held_out]
    train = [row for row in rows if row not in test]
    prompts = {
        "seen": choose_seen(train),
        "held_out": [row["captions"][0] for row in test],
        "novel": list(NOVEL),
    }

    labels = list(dict.fromkeys(row["label"] for row in rows))
    for split, part in (("train", train), ("test", test)):
        parquet = args.output_dir / "data" / f"{split}-00000-of-00001.parquet"
        parquet.parent.mkdir(parents=True, exist_ok=True)
        make_dataset(part, labels).to_parquet(parquet)
        print(f"{split}: {len(part)} images, {parquet.stat().st_size / 2**20:.2f} MiB")
    (args.output_dir / "prompts").mkdir(exist_ok=True)
    for name, lines in prompts.items():
        text = "".join(f"{line}\n" for line in lines)
        (args.output_dir / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    card = write_card(train, test, packages, prompts, duplicates)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
