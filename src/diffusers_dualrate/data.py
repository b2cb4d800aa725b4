"""Images and labels from folders and data sets, for training.

`load_images` opens a folder or any `datasets` data set; `LabelledImages` turns its rows into tensors.

A picture with alpha a and colour c is kept premultiplied, p = a c, because in this form colours can be averaged and
hence resized. Augmentation warps p and a, then puts a background colour b behind them:

    x = p + (1 - a) b.

A warp continues the edge of the picture, transparent or not, beyond its border. Every draw is a function of
(seed, epoch, index) alone: no order of access, number of workers or point of resumption changes an image.
"""

import io
import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from datasets import Dataset

CACHE_BYTES = 2**30
"""A set whose pixels fit in this much memory is decoded once, before training begins; a larger one at each access."""

DEEP_MODES = ("I", "F")
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


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


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    split: str = "train",
    cache_dir: str | Path | None = None,
) -> "Dataset":
    """Opens a data set of images from exactly one of two sources.

    Args:
        dataset_name: A data set of the Hub, or the path of a local one, or "digits" for those of scikit-learn.
        train_data_dir: A folder of images; sub-folders, where there are any, become the column `label`.
        image_column: The column that must hold the images.
        label_column: The column that must hold the classes, if any.
        split: The split to open. The digits' halves are called "reference" and "floor", "train" being both.
        cache_dir: Where `datasets` keeps its copies.

    Returns:
        The opened split.

    Raises:
        ValueError: If there is not one source, no folder, no image or no such column.
    """
    from datasets import load_dataset

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"One of `dataset_name` {dataset_name!r} and `train_data_dir` {train_data_dir!r} is needed.")
    if dataset_name == "digits":
        dataset = _load_digits(split)
    elif dataset_name is not None:
        dataset = load_dataset(dataset_name, split=split, cache_dir=cache_dir)
    elif not Path(train_data_dir).is_dir():
        raise ValueError(f"The folder {str(train_data_dir)!r} does not exist.")
    else:
        try:
            dataset = load_dataset("imagefolder", data_dir=str(train_data_dir), split=split, cache_dir=cache_dir)
        except FileNotFoundError as error:  # so `datasets` calls a folder without images
            raise ValueError(f"The folder {str(train_data_dir)!r} holds no images.") from error
    _check(dataset, image_column, label_column)
    return dataset


def _load_digits(split):
    """The 1,797 digits of scikit-learn, 8x8 and grey, or every other one of each class."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    digits = load_digits()
    by_class = np.argsort(digits.target, kind="stable")
    halves = {"train": np.sort(by_class), "reference": np.sort(by_class[::2]), "floor": np.sort(by_class[1::2])}
    if split not in halves:
        raise ValueError(f"The digits have no split {split!r}; they have {', '.join(halves)}.")
    rows = halves[split]
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0 to 16 in the source
    return Dataset.from_dict(
        {"image": [Image.fromarray(levels[row]) for row in rows], "label": digits.target[rows].tolist()},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=[*"0123456789"])}),
    )


class LabelledImages(torch.utils.data.Dataset):
    """The images of a data set as tensors, augmented, with their class labels.

    Args:
        dataset: A data set with an image column, as of `load_images`.
        resolution: Side or (height, width) in pixels; other images are resized to cover it, then cut at the centre.
        image_column: The column of images.
        label_column: The column of classes: a `ClassLabel`, or integers or strings, numbered in sorted order.
        augmentation: What may happen to the images.
        channels: 3 for colour, 1 for grey.
        seed: Seed of the augmentation.
        on_corrupt: Whether an image that cannot be decoded ends the run or is left out, counted in `corrupt`. In a
            set too large for memory it is found at access, and the next image of the set takes its place.

    Attributes:
        id2label: The name of each class, or `None` without a label column.
        num_classes: How many there are, or `None`.
        corrupt: The files or rows that could not be decoded so far in this process.

    Raises:
        ValueError: If an argument or a column is not as described, or an image is corrupt.
    """

    def __init__(
        self,
        dataset: "Dataset",
        resolution: int | tuple[int, int],
        *,
        image_column: str = "image",
        label_column: str | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (it is frozen)
        channels: int = 3,
        seed: int = 0,
        on_corrupt: Literal["raise", "skip"] = "raise",
    ):
        from datasets import Image as ImageFeature

        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"`resolution` is {resolution!r}, but must be one or two positive integers.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` is {channels!r}, but must be 1 or 3.")
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"`on_corrupt` is {on_corrupt!r}, but must be 'raise' or 'skip'.")
        _check(dataset, image_column, label_column)
        self.height, self.width = size
        self.channels, self.seed, self.augmentation = channels, seed, augmentation
        self.on_corrupt, self.corrupt = on_corrupt, []
        # Undecoded, a broken image can be named.
        files = dataset.with_format(None).select_columns(image_column)
        self._files, self._column = files.cast_column(image_column, ImageFeature(decode=False)), image_column
        self._labels, self.id2label = _read_labels(dataset, label_column)
        self.num_classes = None if self.id2label is None else len(self.id2label)
        self._pixels = None
        if len(dataset) * self.height * self.width * (channels + 1) <= CACHE_BYTES:
            self._decode_all()

    def _decode_all(self):
        pixels = [self._decode(row) for row in range(len(self._files))]
        kept = [row for row, image in enumerate(pixels) if image is not None]
        if not kept:
            raise ValueError(f"None of the {len(pixels)} images can be decoded, the first being {self.corrupt[0]}.")
        self._pixels = np.stack([pixels[row] for row in kept])
        self._labels = None if self._labels is None else self._labels[kept]

    def _decode(self, row):
        """Returns premultiplied colours and alpha, uint8 [H, W, C + 1], or `None` for a corrupt image to skip."""
        file = self._files[row][self._column] or {"bytes": None, "path": None}
        try:
            if file["bytes"] is None and file["path"] is None:
                raise ValueError("the row is empty")
            data = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith(DEEP_MODES):
                    raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
                image = ImageOps.exif_transpose(image).convert("RGBA")
        except DECODING_ERRORS as error:
            name = f"row {row}" if file["path"] is None else f"{file['path']!r} (row {row})"
            reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
            if self.on_corrupt == "raise":
                raise ValueError(f"The image {name} cannot be decoded: {reason}.") from error
            if name not in self.corrupt:
                warnings.warn(f"The image {name} is left out, as it cannot be decoded: {reason}.", stacklevel=2)
                self.corrupt.append(name)
            return None
        image = image.convert("RGBa") if self.channels == 3 else image.convert("LA").convert("La")
        return np.array(ImageOps.fit(image, (self.width, self.height), Image.Resampling.LANCZOS))

    def _decode_from(self, index):
        """Returns the first row at or after `index` that can be decoded, and its pixels."""
        for row in ((index + offset) % len(self) for offset in range(len(self))):
            if (pixels := self._decode(row)) is not None:
                return row, pixels
        raise ValueError(f"None of the {len(self)} images can be decoded, the first being {self.corrupt[0]}.")

    def __len__(self) -> int:
        return len(self._files if self._pixels is None else self._pixels)

    @property
    def class_labels(self) -> torch.Tensor | None:
        """Class of each image, int64 [N], without decoding any; `None` without a label column."""
        return None if self._labels is None else torch.from_numpy(self._labels)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values`, float32 [C, H, W] in [-1, 1], and `class_labels`, int64 [], if there are labels.

        Args:
            index: Number of the image, or (epoch, number): each epoch has augmentations of its own; alone, epoch 0.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"The index {index} is outside of the {len(self)} images.")
        row, pixels = (index, self._pixels[index]) if self._pixels is not None else self._decode_from(index)
        item = {"pixel_values": torch.from_numpy(self._augment(pixels, epoch, index))}
        if self._labels is not None:
            item["class_labels"] = torch.tensor(self._labels[row])
        return item

    def _augment(self, pixels, epoch, index):
        options = self.augmentation
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, index)))
        down, right = generator.integers(-options.translation, options.translation, size=2, endpoint=True).tolist()
        zoom = generator.uniform(*options.scale)
        is_mirrored = generator.random() < 0.5
        low, high = options.background or (255, 255)
        background = generator.integers(low, high, size=self.channels, endpoint=True).astype(np.float32)

        if options.flip and is_mirrored:
            pixels = pixels[:, ::-1]
        planes = _warp(pixels, down, right, zoom).transpose(2, 0, 1).astype(np.float32, order="C")
        # Resizing overshoots, but no premultiplied colour exceeds its alpha.
        color, alpha = np.minimum(planes[:-1], planes[-1]), planes[-1] / 255
        composite = color + (1 - alpha) * background[:, None, None]
        # Rounding may leave the interval by an ulp.
        return (composite / 127.5 - 1).clip(-1, 1)


class ShuffledIndices(torch.utils.data.Sampler):
    """An endless shuffle of a data set, cut to the stretch from `start` to `stop`; yields (epoch, index).

    Each epoch is a permutation drawn from (seed, epoch) alone, so a run that starts anywhere in the stretch sees what
    an uninterrupted one sees there. Batches may cross epochs; no image is left out.

    Args:
        size: Number of images in the data set.
        seed: Seed of the shuffle.
        start: First position in the endless sequence.
        stop: Position after the last.
    """

    def __init__(self, size: int, seed: int, start: int, stop: int):
        self.size, self.seed, self.start, self.stop = size, seed, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self):
        for epoch in range(self.start // self.size, -(-self.stop // self.size)):
            order = np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.size).tolist()
            first = epoch * self.size
            for position in range(max(self.start, first), min(self.stop, first + self.size)):
                yield epoch, order[position - first]


class DealtBatches(torch.utils.data.Sampler):
    """Deals each global batch of a sequence out into `parts` batches, like cards: batch p holds rows p, p + parts, ...

    So the first rows of all parts are the first rows of the global batch, however many parts there are. What is left
    over at the end is dropped.

    Args:
        order: The sequence of indices.
        batch_size: Size of one part.
        parts: Number of processes times parts of a step.
    """

    def __init__(self, order: Iterable, batch_size: int, parts: int):
        self.order, self.batch_size, self.parts, self.drop_last = order, batch_size, parts, True

    def __len__(self) -> int:
        return len(self.order) // (self.batch_size * self.parts) * self.parts

    def __iter__(self):
        order = iter(self.order)
        while len(rows := list(itertools.islice(order, self.batch_size * self.parts))) == self.batch_size * self.parts:
            for part in range(self.parts):
                yield rows[part :: self.parts]


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


def _check(dataset, image_column, label_column):
    from datasets import Image as ImageFeature

    if len(dataset) == 0:
        raise ValueError("The data set is empty.")
    for column in (image_column, label_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"The data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    if not isinstance(dataset.features[image_column], ImageFeature):
        raise ValueError(f"The column {image_column!r} holds {dataset.features[image_column]}, not images.")


def _read_labels(dataset, label_column):
    """Returns the number of each row's class, int64 [N], and the names of the classes; or `None` twice."""
    from datasets import ClassLabel

    if label_column is None:
        return None, None
    values = dataset.with_format(None).select_columns(label_column)[:][label_column]
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        # The Hub marks rows without a label as -1.
        if unlabelled := [row for row, value in enumerate(values) if value is None or value < 0]:
            raise ValueError(f"The row {unlabelled[0]} has no class in the column {label_column!r}.")
        return np.array(values, dtype=np.int64), dict(enumerate(feature.names))
    if not (all(isinstance(value, int) for value in values) or all(isinstance(value, str) for value in values)):
        raise ValueError(f"The column {label_column!r} of {feature} must hold one integer or one string a row.")
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[value] for value in values], dtype=np.int64), dict(enumerate(map(str, names)))
