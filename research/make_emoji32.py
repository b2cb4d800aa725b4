"""Render emoji32: colour emoji at 32x32 RGBA, labelled with their Unicode subgroup.

The pictures come from Google's Noto Color Emoji (OFL-1.1), the list and the classes from Unicode's emoji-test.txt.
Kept is every fully-qualified emoji that is one drawing of its own. Left out are skin tones, ZWJ sequences and hair
components, which are recoloured or recombined drawings, and the 258 flags of countries: they would make one class in
six pictures, they are defined by thin stripes and crests that 32 pixels cannot hold, and several of them are the same
flag twice. The eight other flags and the keycaps stay.

Alpha is kept, so that the colour behind an emoji can be an augmentation. One scale serves all emoji, because it is
only their size that tells some of them apart (the black squares); the largest leaves `MARGIN` pixels on each side.

    apt-get install fonts-noto-color-emoji unicode-data
    python -m research.make_emoji32
"""

import argparse
import hashlib
import io
import re
import struct
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, features

from . import EXAMPLES

SIZE = 32
MARGIN = 2
FONT_SIZE = 109  # the only size at which the font holds bitmaps
GLYPH_SIZE = 128  # longest side of the largest bitmap, in pixels
PACKAGES = "apt-get install fonts-noto-color-emoji unicode-data"

LINE = re.compile(r"(?P<codes>[0-9A-F ]+?) *; fully-qualified +# (?P<emoji>\S+) E[0-9.]+ (?P<name>.+)")
ZERO_WIDTH_JOINER = 0x200D
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)

# The card declares no `configs`: with them, `datasets` would not notice that a local copy of the data has changed.
CARD = """---
license: ofl-1.1
pretty_name: emoji32
task_categories:
- unconditional-image-generation
- image-classification
size_categories:
- 1K<n<10K
---

# emoji32

{images:,} colour emoji at {size}x{size} RGBA in {classes} classes: a data set small enough to train an image
diffusion model on a laptop, and free to share.

```python
from datasets import load_dataset

emoji = load_dataset("examples/data/emoji32", split="train")
```

| column | content |
|---|---|
| `image` | {size}x{size} RGBA, transparent behind the emoji, at least {margin} transparent pixels on each side |
| `label` | the Unicode subgroup, a `ClassLabel` in Unicode's order |
| `group` | the Unicode group, of which there are {groups} |
| `name` | the Unicode short name |
| `emoji` | the emoji itself, fully qualified |

## How it was made

`research/make_emoji32.py` draws each emoji with Noto Color Emoji {font_version} at its native {font_size} px, centres
the drawing, and reduces it with a Lanczos filter on premultiplied alpha, at one scale for all emoji. The list and the
classes are those of Unicode's `emoji-test.txt`, version {unicode_version}. Same font, same list, same pixels; the
SHA-256 of the font file is `{font_hash}`.

Kept is every fully-qualified emoji without skin tone, zero-width joiner or hair component. The flags of countries are
left out: they would outnumber every class, 32 pixels do not hold their details, and some countries share a flag.

## Counts

The classes hold between {smallest} and {largest} emoji.

| group | class | emoji |
|---|---|---|
{table}

## Licence

The drawings are from Noto Color Emoji, copyright Google Inc., under the SIL Open Font License 1.1, and so is this
data set; the text is in `LICENSE`. Noto is a trademark of Google Inc., who have no part in this data set. The names
and classes are Unicode data, copyright Unicode, Inc., used under the [terms of
use](https://www.unicode.org/terms_of_use.html).
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--emoji_test", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt"))
    parser.add_argument("--output_dir", type=Path, default=EXAMPLES / "data" / "emoji32")
    return parser.parse_args(argv)


def read_emoji(emoji_test):
    """Reads the emoji to draw, in Unicode's order.

    Args:
        emoji_test: Unicode's emoji-test.txt.

    Returns:
        One dictionary an emoji with `emoji`, `name`, `label` (the subgroup) and `group`.
    """
    if not emoji_test.is_file():
        raise ValueError(f"The list of emoji {str(emoji_test)!r} does not exist; install it with `{PACKAGES}`.")
    rows = []
    group = subgroup = None
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := LINE.match(line):
            codes = [int(code, 16) for code in match["codes"].split()]
            if not any(is_left_out(code) for code in codes):
                rows.append({"emoji": match["emoji"], "name": match["name"], "label": subgroup, "group": group})
    if not rows:
        raise ValueError(f"The file {str(emoji_test)!r} lists no fully-qualified emoji.")
    return rows


def is_left_out(code):
    """Whether an emoji with this code point is a variant of another one, or the flag of a country."""
    return code == ZERO_WIDTH_JOINER or code in SKIN_TONES or code in REGIONAL_INDICATORS


def load_font(path):
    """Opens the font at the size of its bitmaps."""
    if not path.is_file():
        raise ValueError(f"The font {str(path)!r} does not exist; install it with `{PACKAGES}`.")
    if not features.check("raqm"):
        raise ValueError("This Pillow has no Raqm, without which keycaps fall apart; install one of Pillow's wheels.")
    try:
        return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"The font {str(path)!r} holds no {FONT_SIZE} px bitmaps ({error}).") from error


def render(font, emoji):
    """Draws one emoji.

    Args:
        font: Noto Color Emoji at its native size.
        emoji: The emoji as a string.

    Returns:
        An RGBA image of `SIZE` x `SIZE` pixels, the emoji in its centre.

    Raises:
        ValueError: If the font has no drawing for it, or only one for its parts.
    """
    canvas = PILImage.new("RGBA", (3 * GLYPH_SIZE, 3 * GLYPH_SIZE))
    ImageDraw.Draw(canvas).text((GLYPH_SIZE, GLYPH_SIZE), emoji, font=font, embedded_color=True)
    ink = canvas.getchannel("A").getbbox()
    # A missing glyph is empty in this font, and a sequence without a glyph of its own is as wide as its parts.
    if ink is None or font.getlength(emoji) > font.getlength("\N{GRINNING FACE}"):
        raise ValueError(f"The font does not draw {emoji!r} as one picture.")
    left, top, right, bottom = ink
    if max(right - left, bottom - top) > GLYPH_SIZE:
        raise ValueError(f"The font draws {emoji!r} larger than {GLYPH_SIZE} px, at {right - left}x{bottom - top}.")
    x, y = (left + right - GLYPH_SIZE) // 2, (top + bottom - GLYPH_SIZE) // 2
    glyph = canvas.crop((x, y, x + GLYPH_SIZE, y + GLYPH_SIZE))
    # Pillow premultiplies RGBA by alpha to resize it, so that invisible pixels do not bleed into the edges.
    glyph = glyph.resize((SIZE - 2 * MARGIN, SIZE - 2 * MARGIN), PILImage.Resampling.LANCZOS)
    image = PILImage.new("RGBA", (SIZE, SIZE))
    # The mask keeps the ringing of the filter from leaving a colour in invisible pixels.
    image.paste(glyph, (MARGIN, MARGIN), glyph.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    return image


def make_dataset(rows, font):
    """Renders the emoji into a data set.

    Args:
        rows: The emoji as of `read_emoji`.
        font: The font as of `load_font`.

    Returns:
        A data set with the columns `image` (PNG bytes), `label`, `group`, `name` and `emoji`.
    """
    columns = {
        "image": Image(),
        "label": ClassLabel(names=list(dict.fromkeys(row["label"] for row in rows))),
        "group": Value("string"),
        "name": Value("string"),
        "emoji": Value("string"),
    }
    images = [encode(render(font, row["emoji"]), row["emoji"]) for row in rows]
    content = {"image": images} | {key: [row[key] for row in rows] for key in ("label", "group", "name", "emoji")}
    return Dataset.from_dict(content, features=Features(columns))


def encode(image, emoji):
    """Packs an image as PNG bytes under the name of its code points."""
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    return {"bytes": png.getvalue(), "path": "-".join(f"{ord(character):x}" for character in emoji) + ".png"}


def read_font_revision(path):
    """Reads the font's revision, which OpenType keeps in its `head` table as 16.16 fixed point."""
    data = path.read_bytes()
    (tables,) = struct.unpack_from(">H", data, 4)
    offsets = {tag: offset for tag, _, offset, _ in struct.iter_unpack(">4sIII", data[12 : 12 + 16 * tables])}
    (revision,) = struct.unpack_from(">i", data, offsets[b"head"] + 4)
    return f"{revision / 2**16:.3f}"


def write_card(rows, font, emoji_test):
    """Writes the data set card, every number in it counted from the data."""
    counts = Counter((row["group"], row["label"]) for row in rows)
    return CARD.format(
        images=len(rows),
        size=SIZE,
        margin=MARGIN,
        classes=len(counts),
        groups=len({row["group"] for row in rows}),
        font_version=read_font_revision(font),
        font_hash=hashlib.sha256(font.read_bytes()).hexdigest(),
        font_size=FONT_SIZE,
        unicode_version=re.search(r"^# Version: (\S+)", emoji_test.read_text(encoding="utf-8"), re.MULTILINE)[1],
        smallest=min(counts.values()),
        largest=max(counts.values()),
        table="\n".join(f"| {group} | {label} | {count} |" for (group, label), count in counts.items()),
    )


def main(args):
    """Writes the data set and its card below `args.output_dir`."""
    rows = read_emoji(args.emoji_test)
    dataset = make_dataset(rows, load_font(args.font))
    parquet = args.output_dir / "data" / "train-00000-of-00001.parquet"
    parquet.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(parquet)
    (args.output_dir / "README.md").write_text(write_card(rows, args.font, args.emoji_test), encoding="utf-8")
    classes = dataset.features["label"].num_classes
    print(f"{len(rows)} emoji in {classes} classes, {parquet.stat().st_size / 2**20:.1f} MiB: {parquet}")


if __name__ == "__main__":
    main(parse_args())
