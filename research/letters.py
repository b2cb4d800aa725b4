"""Letters without end: the capitals A to Z, rendered from the text faces that matplotlib brings along; and how trainings open them.

Face, size, shift, rotation and contrast of every image are drawn anew and are a function of (seed, epoch, index) alone,
so no image comes twice, and neither a resumed run nor another number of processes changes one. Glyphs are rendered once,
large; an image is one affine view of a glyph at twice its size, averaged down.
"""

import math
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_dualrate import sources
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.configuration import Data

# By name, since the other faces beside them hold symbols, or placeholders in place of letters.
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
LETTERS = string.ascii_uppercase
IMAGES_PER_EPOCH = 1000 * len(LETTERS)

_CANVAS, _CAPITAL = 96, 40  # pixels of a rendered glyph's canvas, and of its letter's height on it
_OVERSAMPLING = 2

# Ranges of what is drawn, lengths as shares of the image's side.
_HEIGHT = (0.55, 0.75)
_SHIFT = (-0.06, 0.06)
_ROTATION = (-math.radians(8), math.radians(8))
_PAPER = (-1.0, -0.8)
_INK = (0.5, 1.0)


class Letters(torch.utils.data.Dataset):
    """Grey images of letters with their classes, as `LabelledImages` has them, but drawn afresh in every epoch.

    Args:
        resolution: Side of the images in pixels.
        label_column: "label" for images with classes, `None` for images without.
        channels: What the networks take; the letters have 1.
        seed: Seed of everything that is drawn.

    Attributes:
        id2label: The letter of each class, or `None` without labels.
        num_classes: How many there are, or `None`.
        has_captions: There are none, and `captions` is `None`.
        corrupt: Empty: no image can be.
        fingerprint: What the letters are, in the form that `LabelledImages` has.
        other_epochs: What images of other epochs are called in an evaluation.

    Raises:
        ValueError: If an argument is not as described.
    """

    other_epochs = "other letters, drawn afresh"

    def __init__(self, resolution: int = 16, *, label_column: str | None = "label", channels: int = 1, seed: int = 0):
        if not isinstance(resolution, int) or resolution < 1:
            raise ValueError(f"`resolution` is {resolution!r}, but must be a positive integer.")
        if label_column not in ("label", None):
            raise ValueError(f"The letters have no column {label_column!r}; they have image, label.")
        if channels != 1:
            raise ValueError(
                f"The letters are grey, and the networks take {channels} channels: take a preset with 1, such as letters16."
            )
        self.height = self.width = resolution
        self.channels, self.seed, self.corrupt, self.vae = 1, seed, [], None
        self.sample_shape = (1, resolution, resolution)
        self.id2label = dict(enumerate(LETTERS)) if label_column else None
        self.has_captions, self.captions = False, None
        self.num_classes = len(LETTERS) if label_column else None
        self.fingerprint = {"classes": [*LETTERS] if label_column else None, "images": len(self), "rows": "letters"}
        self._glyphs = _render_glyphs()

    def __len__(self) -> int:
        return IMAGES_PER_EPOCH

    @property
    def class_labels(self) -> torch.Tensor | None:
        """Class of each image, int64 [N]; `None` without labels."""
        return None if self.id2label is None else torch.arange(len(self)) % len(LETTERS)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values`, float32 [1, H, W] in [-1, 1], and `class_labels`, int64 [], if there are labels.

        Args:
            index: Number of the image, or (epoch, number); alone, epoch 0. The class is the number modulo 26.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"The index {index} is outside of the {len(self)} images.")
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, index)))
        letter = index % len(LETTERS)
        face = generator.integers(len(FACES))
        height, right, down = generator.uniform(*_HEIGHT), generator.uniform(*_SHIFT), generator.uniform(*_SHIFT)
        angle, paper, ink = generator.uniform(*_ROTATION), generator.uniform(*_PAPER), generator.uniform(*_INK)

        # From the view's pixels back to the glyph's: the inverse of scaling, turning and shifting about the centres.
        side = _OVERSAMPLING * self.height
        zoom = _CAPITAL / (height * side)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        x, y = side * (0.5 + right), side * (0.5 + down)
        inverse = (cos, sin, _CANVAS / 2 - cos * x - sin * y, -sin, cos, _CANVAS / 2 + sin * x - cos * y)
        view = self._glyphs[face][letter].transform(
            (side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
        )
        blocks = np.asarray(view, dtype=np.float32).reshape(self.height, _OVERSAMPLING, self.width, _OVERSAMPLING)
        pixels = paper + (ink - paper) / 255 * blocks.mean(axis=(1, 3))
        item = {"pixel_values": torch.from_numpy(pixels[None].astype(np.float32))}
        if self.id2label is not None:
            item["class_labels"] = torch.tensor(letter)
        return item


def open_images(
    data: Data,
    resolution: int | tuple[int, int],
    *,
    channels: int = 3,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    split: str = "train",
    **latents,
):
    """As `sources.open_images`, which scripts call unless they are given this, and for `--dataset_name letters` the letters.

    They have no splits, and change from epoch to epoch without an augmentation.

    Raises:
        ValueError: If flags ask for other letters than there are.
    """
    if data.dataset_name != "letters":
        return sources.open_images(
            data, resolution, channels=channels, augmentation=augmentation, seed=seed, split=split, **latents
        )
    if latents:
        raise ValueError("The letters are learned as pixels: leave --vae out.")
    if data.streaming or data.num_classes not in (None, len(LETTERS)):
        raise ValueError("The letters are rendered, of 26 classes: they take neither --streaming nor --num_classes.")
    return Letters(resolution, label_column=data.label_column, channels=channels, seed=seed)


def _render_glyphs() -> list[list[Image.Image]]:
    """Masks of every letter in every face, centred, capitals of a face equally high."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rendered = []
    for face in FACES:
        trial = ImageFont.truetype(str(folder / f"{face}.ttf"), 100)
        _, top, _, bottom = trial.getbbox("H")
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), round(100 * _CAPITAL / (bottom - top)))
        masks = []
        for letter in LETTERS:
            left, top, right, bottom = font.getbbox(letter)
            mask = Image.new("L", (_CANVAS, _CANVAS))
            corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
            ImageDraw.Draw(mask).text(corner, letter, font=font, fill=255)
            masks.append(mask)
        rendered.append(masks)
    return rendered
