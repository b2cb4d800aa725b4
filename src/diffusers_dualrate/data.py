"""Images and labels from folders and data sets, for training.

`load_images` opens a folder or any `datasets` data set; `LabelledImages` turns its rows into tensors. Every draw is a
function of (seed, epoch, index) alone: no order of access, number of workers or point of resumption changes an image.
"""

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .augmentation import Augmentation

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

CACHE_BYTES = 2**30
"""A set whose pixels fit in this much memory is decoded once, before training begins; a larger one at each access."""

DEEP_MODES = ("I", "F")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> "Dataset | IterableDataset":
    """Opens a data set of images from exactly one of two sources.

    Args:
        dataset_name: A data set of the Hub, or the path of a local one, also of one that `save_to_disk` wrote, or
            "digits" for those of scikit-learn.
        train_data_dir: A folder of images; sub-folders, where there are any, become the column `label`.
        image_column: The column that must hold the images.
        label_column: The column that must hold the classes, if any.
        split: The split to open. The digits' halves are called "reference" and "floor", "train" being both.
        config_name: Which configuration of the data set, where it has several.
        streaming: Whether to read rows as they are needed instead of preparing all of them first.
        cache_dir: Where `datasets` keeps its copies.

    Returns:
        The opened split.

    Raises:
        ValueError: If there is not one source, no folder, no image or no such column.
    """
    from datasets import load_dataset, load_from_disk

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"One of `dataset_name` {dataset_name!r} and `train_data_dir` {train_data_dir!r} is needed.")
    if dataset_name == "digits":
        dataset = _load_digits(split)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif dataset_name is not None and any(Path(dataset_name, name).is_file() for name in _SAVED):
        dataset = load_from_disk(dataset_name)
        if isinstance(dataset, dict):
            if split not in dataset:
                raise ValueError(f"The data set {dataset_name!r} has no split {split!r}; it has {', '.join(dataset)}.")
            dataset = dataset[split]
        elif split not in ("train", str(dataset.split)):
            kept = "saved without splits" if dataset.split is None else f"the split {str(dataset.split)!r} alone"
            raise ValueError(f"The data set {dataset_name!r} is {kept}, and has no {split!r}.")
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif dataset_name is not None:
        dataset = load_dataset(dataset_name, config_name, split=split, streaming=streaming, cache_dir=cache_dir)
    elif not Path(train_data_dir).is_dir():
        raise ValueError(f"The folder {str(train_data_dir)!r} does not exist.")
    else:
        try:
            dataset = load_dataset(
                "imagefolder", data_dir=str(train_data_dir), split=split, streaming=streaming, cache_dir=cache_dir
            )
        except FileNotFoundError as error:  # so `datasets` calls a folder without images
            raise ValueError(f"The folder {str(train_data_dir)!r} holds no images.") from error
    check_columns(dataset, image_column, label_column)
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


class ImageReader:
    """Turns files into pixels of one size, and tells which could not be decoded.

    Args:
        resolution: Side or (height, width) in pixels; other images are resized to cover it, then cut at the centre.
        channels: 3 for colour, 1 for grey.
        augmentation: What may happen to the images.
        seed: Seed of the augmentation.
        on_corrupt: Whether an image that cannot be decoded ends the run or is left out, named in a warning and counted.

    Raises:
        ValueError: If an argument is not as described.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        *,
        channels: int = 3,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        on_corrupt: Literal["raise", "skip"] = "raise",
    ):
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"`resolution` is {resolution!r}, but must be one or two positive integers.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` is {channels!r}, but must be 1 or 3.")
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"`on_corrupt` is {on_corrupt!r}, but must be 'raise' or 'skip'.")
        self.height, self.width = size
        self.channels, self.seed, self.augmentation = channels, seed, augmentation
        self.on_corrupt = on_corrupt

    def decode(self, file: dict | None, row: int) -> np.ndarray | None:
        """Premultiplied colours and alpha, uint8 [H, W, C + 1], or `None` for a corrupt image to skip.

        Args:
            file: Bytes, path or both, as `datasets` has them undecoded.
            row: Number of the row, to name it.
        """
        file = file or {"bytes": None, "path": None}
        content = file["bytes"]
        try:
            if content is None and file["path"] is None:
                raise ValueError("the row is empty")
            if content is None:
                content = _read(file["path"])
            with Image.open(io.BytesIO(content)) as image:
                if image.mode.startswith(DEEP_MODES):
                    raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
                image = _turn_upright(image).convert("RGBA")
        except DECODING_ERRORS as error:
            name = name_image(file, row)
            reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
            if self.on_corrupt == "raise":
                raise ValueError(f"The image {name} cannot be decoded: {reason}.") from error
            if self.note_corrupt(row):
                warnings.warn(f"The image {name} is left out, as it cannot be decoded: {reason}.", stacklevel=2)
            return None
        image = image.convert("RGBa") if self.channels == 3 else image.convert("LA").convert("La")
        return np.array(ImageOps.fit(image, (self.width, self.height), Image.Resampling.LANCZOS))

    def note_corrupt(self, row: int) -> bool:
        """Count the corrupt image of a row; returns whether it was not known before."""
        raise NotImplementedError

    def augment(self, pixels: np.ndarray, epoch: int, index: int) -> torch.Tensor:
        """The image as a float32 tensor [C, H, W] in [-1, 1], augmented as (seed, epoch, index) say."""
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, index)))
        return torch.from_numpy(self.augmentation.apply(pixels, generator))


class LabelledImages(ImageReader, torch.utils.data.Dataset):
    """The images of a data set as tensors, augmented, with their class labels.

    In a set too large for memory a corrupt image is found at access, and the next one of the set takes its place.

    Args:
        dataset: A data set with an image column, as of `load_images`.
        resolution: As of [`ImageReader`].
        image_column: The column of images.
        label_column: The column of classes: a `ClassLabel`, or integers or strings, numbered in sorted order.
        num_classes: Number of classes; default: those there are. Given, integers are taken as they are.
        options: Further arguments of [`ImageReader`].

    Attributes:
        id2label: The name of each class, or `None` without a label column.
        num_classes: How many there are, or `None`.
        corrupt: The files or rows found corrupt so far, by this process and all its data workers.

    Raises:
        ValueError: If an argument or a column is not as described, a label is outside of the classes, or an image is
            corrupt.
    """

    def __init__(
        self,
        dataset: "Dataset",
        resolution: int | tuple[int, int],
        *,
        image_column: str = "image",
        label_column: str | None = None,
        num_classes: int | None = None,
        **options,
    ):
        super().__init__(resolution, **options)
        check_columns(dataset, image_column, label_column)
        self._files, self._column = undecoded(dataset, image_column), image_column
        self._labels, self.id2label = _read_labels(dataset, label_column, num_classes)
        self.num_classes = None if self.id2label is None else len(self.id2label)
        # In shared memory: data workers mark rows in it.
        self._is_corrupt = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._pixels = None
        if len(dataset) * self.height * self.width * (self.channels + 1) <= CACHE_BYTES:
            self._decode_all()

    def _decode_all(self):
        pixels = [self._decode(row) for row in range(len(self._files))]
        kept = [row for row, image in enumerate(pixels) if image is not None]
        if not kept:
            raise ValueError(f"None of the {len(pixels)} images can be decoded, the first being {self.corrupt[0]}.")
        self._pixels = np.stack([pixels[row] for row in kept])
        self._labels = None if self._labels is None else self._labels[kept]

    def note_corrupt(self, row: int) -> bool:
        is_new = not self._is_corrupt[row]
        self._is_corrupt[row] = True
        return is_new

    @property
    def corrupt(self) -> list[str]:
        rows = self._is_corrupt.nonzero().flatten().tolist()
        return [name_image(self._files[row][self._column], row) for row in rows]

    def _decode(self, row):
        return self.decode(self._files[row][self._column], row)

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
        item = {"pixel_values": self.augment(pixels, epoch, index)}
        if self._labels is not None:
            item["class_labels"] = torch.tensor(self._labels[row])
        return item


def _read(path: str) -> bytes:
    """Content of a file, which may be remote, or inside an archive.

    Raises:
        RuntimeError: If it is there, but cannot be reached now: that is no corrupt image, which might be left out.
    """
    import fsspec  # `datasets` brings it

    try:
        with fsspec.open(path) as data:
            return data.read()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except OSError as error:
        raise RuntimeError(f"The image {path!r} cannot be read: {error}.") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data say that it was held; damaged ones turn nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except (struct.error, KeyError, TypeError, *DECODING_ERRORS):
        return image


def name_image(file: dict | None, row: int) -> str:
    """What to call an image, as `datasets` has it undecoded, in a message."""
    path = file and file["path"]
    return f"row {row}" if path is None else f"{path!r} (row {row})"


def check_columns(dataset: "Dataset | IterableDataset", image_column: str, label_column: str | None) -> None:
    """Raise a `ValueError` if a data set is empty or a column is missing or holds no images."""
    from datasets import Image as ImageFeature
    from datasets import IterableDataset

    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and len(dataset) == 0:
        raise ValueError("The data set is empty.")
    if dataset.features is None:
        raise ValueError("The stream does not tell what its columns hold; read the data set without streaming.")
    for column in (image_column, label_column):
        if column is not None and column not in dataset.features:
            raise ValueError(f"The data set has no column {column!r}; it has {', '.join(dataset.features)}.")
    if not isinstance(dataset.features[image_column], ImageFeature):
        raise ValueError(f"The column {image_column!r} holds {dataset.features[image_column]}, not images.")
    if is_stream and not list(undecoded(dataset, image_column).take(1)):
        raise ValueError("The data set is empty.")


def undecoded(dataset: "Dataset | IterableDataset", image_column: str, *others: str) -> "Dataset | IterableDataset":
    """The image column, and others, with the images as files: so a broken one can be named."""
    from datasets import Image as ImageFeature

    files = dataset.with_format(None).select_columns([image_column, *others])
    return files.cast_column(image_column, ImageFeature(decode=False))


def _read_labels(dataset, label_column, num_classes):
    """Returns the number of each row's class, int64 [N], and the names of the classes; or `None` twice."""
    if label_column is None:
        return None, None
    values = dataset.with_format(None).select_columns(label_column)[:][label_column]
    feature = dataset.features[label_column]
    if num_classes is not None or hasattr(feature, "names"):
        id2label = name_classes(feature, label_column, num_classes)
        for row, value in enumerate(values):
            check_label(value, id2label, label_column, row)
        return np.array(values, dtype=np.int64), id2label
    if not (all(isinstance(value, int) for value in values) or all(isinstance(value, str) for value in values)):
        raise ValueError(f"The column {label_column!r} of {feature} must hold one integer or one string a row.")
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[value] for value in values], dtype=np.int64), dict(enumerate(map(str, names)))


def name_classes(feature, label_column: str, num_classes: int | None) -> dict[int, str]:
    """Name of each class: those of a `ClassLabel`, else the numbers up to `num_classes`.

    Raises:
        ValueError: If the column alone does not tell the classes and no number is given.
    """
    names = getattr(feature, "names", [])
    if num_classes is None and not names:
        raise ValueError(f"The column {label_column!r} of {feature} names no classes: give their number.")
    return {i: names[i] if i < len(names) else str(i) for i in range(num_classes or len(names))}


def check_label(value: int | None, id2label: dict[int, str], label_column: str, row: int) -> None:
    """Raise a `ValueError` if a row has no class, or one outside of those there are."""
    if value is None or value == -1:  # so the Hub marks rows without a label
        raise ValueError(f"The row {row} has no class in the column {label_column!r}.")
    if not isinstance(value, int) or not 0 <= value < len(id2label):
        raise ValueError(
            f"The row {row} has the label {value!r} in the column {label_column!r}, outside of the "
            f"{len(id2label)} classes."
        )
