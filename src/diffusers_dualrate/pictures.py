"""Pictures of samples that can be looked at: small images enlarged, each under the name of its class."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

_SIDE, _GAP, _LINE = 96, 4, 14
_LETTER = 6  # pixels that a letter of the default font is wide, about


def draw_grid(
    images: Sequence[Image.Image],
    names: Sequence[str] | None = None,
    columns: int = 8,
    side: int = _SIDE,
    lines: int = 1,
) -> Image.Image:
    """Arrange images in rows, the last of which may be shorter.

    Args:
        images: Images of one size; smaller ones are enlarged by a whole number, so that pixels stay squares.
        names: What is written above each; `None` for nothing.
        columns: Images in a row.
        side: Pixels that an enlarged image has at most, where it is smaller.
        lines: Lines that a name may take.
    """
    zoom = max(1, side // max(images[0].size))
    width, height = (side * zoom for side in images[0].size)
    columns, line = min(columns, len(images)), lines * _LINE if names is not None else 0
    rows = -(-len(images) // columns)
    size = columns * (width + _GAP) + _GAP, rows * (line + height + _GAP) + _GAP
    picture = Image.new("RGB", size, "white")
    pen, letters = ImageDraw.Draw(picture), width // _LETTER
    for i, image in enumerate(images):
        left, top = _GAP + i % columns * (width + _GAP), _GAP + i // columns * (line + height + _GAP)
        if names is not None:
            shown = textwrap.wrap(names[i], letters, max_lines=lines, placeholder="…") if lines > 1 else [names[i]]
            shown = [text if len(text) <= letters else f"{text[: letters - 1]}…" for text in shown]
            pen.text((left, top), "\n".join(shown), "black", spacing=2)
        picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + line))
    return picture
