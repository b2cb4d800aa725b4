"""What may happen to an image on its way into training.

A picture with alpha a and colour c is kept premultiplied, p = a c, because in this form colours can be averaged and
hence resized. Augmentation warps p and a, then puts a background colour b behind them:

    x = p + (1 - a) b.

A warp continues the edge of the picture, transparent or not, beyond its border.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image


def _is_range(value, least, most, types):
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(type(bound) in types for bound in value)
    return is_pair and least <= value[0] <= value[1] <= most


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image on its way into training; by default nothing.

    Args:
        translation: Largest shift in pixels; each direction draws a whole number uniformly.
        scale: Range of the zoom about the centre, drawn uniformly.
        background: Range in 0..255 of each channel of the colour behind transparent pixels, drawn uniformly; `None`
            is white.
        flip: Whether to mirror left and right, with probability 1/2.

    Raises:
        ValueError: If a range is empty or out of bounds.
    """

    translation: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    background: tuple[int, int] | None = None
    flip: bool = False

    def __post_init__(self):
        # JSON has no tuples.
        for name in ("scale", "background"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if type(self.translation) is not int or self.translation < 0:
            raise ValueError(f"`translation` is {self.translation!r}, but must be a whole number of pixels.")
        if not _is_range(self.scale, 0, math.inf, (int, float)) or self.scale[0] == 0 or self.scale[1] == math.inf:
            raise ValueError(f"`scale` is {self.scale!r}, but must be two finite numbers, 0 < low <= high.")
        if self.background is not None and not _is_range(self.background, 0, 255, (int,)):
            raise ValueError(f"`background` is {self.background!r}, but must be integers, 0 <= low <= high <= 255.")
        if type(self.flip) is not bool:
            raise ValueError(f"`flip` is {self.flip!r}, but must be true or false.")

    def apply(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the image, augmented, as float32 [C, H, W] in [-1, 1].

        Args:
            pixels: Premultiplied colours and alpha, uint8 [H, W, C + 1].
            generator: The same draws are made whatever the options.
        """
        down, right, zoom, is_mirrored, background = self._draw(generator, pixels.shape[-1] - 1)
        if is_mirrored:
            pixels = pixels[:, ::-1]
        planes = _warp(pixels, down, right, zoom).transpose(2, 0, 1).astype(np.float32, order="C")
        # Resizing overshoots, but no premultiplied colour exceeds its alpha.
        color, alpha = np.minimum(planes[:-1], planes[-1]), planes[-1] / 255
        composite = color + (1 - alpha) * background[:, None, None]
        # Rounding may leave the interval by an ulp.
        return (composite / 127.5 - 1).clip(-1, 1)

    def of_latents(self) -> Self:
        """What of it may happen to latents that are encoded once."""
        return type(self)(flip=self.flip)

    def check_of_latents(self) -> None:
        """Refuse what needs pixels: latents that are encoded once can only be mirrored.

        Raises:
            ValueError: If something else may happen to the images.
        """
        for name in ("translation", "scale", "background"):
            value = getattr(self, name)
            if value != getattr(self.of_latents(), name):
                raise ValueError(
                    f"The augmentation {name}={value!r} needs pixels, but latents are encoded once: leave it out of the "
                    "recipe's augmentation, or add --no_latent_cache."
                )

    def mirrors(self, generator: np.random.Generator) -> bool:
        """Whether `apply` with such a generator mirrors an image."""
        return self._draw(generator, 3)[3]

    def _draw(self, generator: np.random.Generator, channels: int) -> tuple[int, int, float, bool, np.ndarray]:
        """Shift down and right, zoom, whether to mirror, and the background's colour, in this order."""
        down, right = generator.integers(-self.translation, self.translation, size=2, endpoint=True).tolist()
        zoom = generator.uniform(*self.scale)
        is_mirrored = generator.random() < 0.5
        low, high = self.background or (255, 255)
        background = generator.integers(low, high, size=channels, endpoint=True).astype(np.float32)
        return down, right, zoom, self.flip and is_mirrored, background


def _warp(pixels: np.ndarray, down: int, right: int, zoom: float) -> np.ndarray:
    """Zooms premultiplied pixels [H, W, C + 1] about their centre, then shifts them; a shift alone is exact."""
    height, width, channels = pixels.shape
    # Box of the picture that will fill the frame, in pixels of the picture.
    top, left = height / 2 - (height / 2 + down) / zoom, width / 2 - (width / 2 + right) / zoom
    bottom, right = top + height / zoom, left + width / zoom
    margin = max(0, math.ceil(max(-top, -left, bottom - height, right - width)))
    rows = np.arange(-margin, height + margin).clip(0, height - 1)
    columns = np.arange(-margin, width + margin).clip(0, width - 1)
    padded = pixels.take(rows, axis=0).take(columns, axis=1)
    mode = "RGBa" if channels == 4 else "La"
    image = Image.frombuffer(mode, (len(columns), len(rows)), padded, "raw", mode, 0, 1)
    box = (left + margin, top + margin, right + margin, bottom + margin)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
