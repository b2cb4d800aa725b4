"""Images and labels from folders and data sets, for training.

`load_images` opens a folder or any `datasets` data set; `LabelledImages` turns its rows into tensors. Every draw is a
function of (seed, epoch, index) alone: no order of access, number of workers or point of resumption changes an image.
"""

import functools
import glob
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from . import folders, inventory
from .augmentation import Augmentation
from .decoding import MAX_IMAGE_PIXELS, UndecodableError, decode_image, name_image
from .inventory import (
    check_num_classes,
    draw_caption,
    fingerprint_rows,
    mark_rows,
    read_captions,
    read_labels,
)
from .latents import latent_shape
from .shards import open_shards

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from diffusers import ModelMixin

CACHE_BYTES = 2**30
"""A set whose pixels fit in this much memory is decoded once, before training begins; a larger one at each access."""

_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> "Dataset | IterableDataset":
    """Open a data set of images from exactly one of two sources.

    Args:
        dataset_name: A data set of the Hub, or the path of a local one, also of one that `save_to_disk` wrote, or
            "digits" for those of scikit-learn.
        train_data_dir: A folder of images; sub-folders, where there are any, become the column `label`. The rules are
            those of the module `folders`.
        image_column: The column that must hold the images.
        label_column: The column that must hold the classes, if any.
        caption_column: The column that must hold the captions, if any.
        split: The split to open. The digits have the halves "reference" and "floor"; their "train" is both together.
        config_name: Which configuration of the data set, where it has several.
        streaming: Whether to read rows as they are needed instead of preparing all of them first.
        seed: Seed of the order in which a folder's files are streamed.
        cache_dir: Where `datasets` keeps its copies.

    Returns:
        The opened split.

    Raises:
        ValueError: If there is not one source, no folder, no image or no such column; if the source is broken.
    """
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else f"both, {dataset_name!r} and {str(train_data_dir)!r}"
        raise ValueError(f"Images come from one source, dataset_name or train_data_dir: got {given}.")
    if dataset_name == "digits":
        dataset = _load_digits(split)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif dataset_name is not None and any(Path(dataset_name, name).is_file() for name in _SAVED):
        dataset = _load_saved(dataset_name, split)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif dataset_name is not None and not (config_name is None and folders.is_folder_of_images(dataset_name)):
        dataset = open_shards(
            dataset_name, dataset_name, split=split, streaming=streaming, name=config_name, cache_dir=cache_dir
        )
    else:
        folder = dataset_name if train_data_dir is None else train_data_dir
        assert folder is not None
        if (described := folders.find_described(folder, split)) is None:
            listed = folders.list_folder(folder, split)
            if label_column is not None and listed.labels is None:
                raise ValueError(f"The data set has no column {label_column!r}: {_explain_no_classes(listed)}")
            dataset = listed.open(streaming=streaming, seed=seed)
        else:
            files = {split: glob.escape(described) + "/**"}
            dataset = open_shards(
                folder, "imagefolder", split=split, streaming=streaming, data_files=files, cache_dir=cache_dir
            )
            if not streaming and len(dataset) != (count := folders.count_images(described)):
                raise ValueError(
                    f"The table of {folders.readable(described)!r} describes {len(dataset):,} of its {count:,} images: "
                    "it must name each once."
                )
    check_columns(dataset, image_column, label_column, caption_column)
    return dataset


def _explain_no_classes(listed):
    """Why a folder shows no classes, and what to do where classes are meant."""
    name = repr(folders.readable(listed.root))
    if listed.split is None:
        return (
            f"all images lie in {name} itself. Move each class into a folder of its own, or leave --label_column out."
        )
    return (
        f"all folders in {name} are called like splits ({', '.join(listed.splits)}), so they were taken for splits, which "
        "hold no folders of classes. If they are classes, move them into one new folder called 'train'."
    )


def _load_saved(name, split):
    """Opens a split of what `save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(name)
    except IndexError as error:  # so `datasets` meets a table of no file
        raise ValueError(f"The data set {name!r} is empty.") from error
    # What damaged files lead to: arrow's errors are of these kinds.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"The data set {name!r}, as saved to disk, is damaged: {error!r}.") from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"The data set {name!r} has no split {split!r}; it has {', '.join(dataset)}.")
        return dataset[split]
    if split not in ("train", str(dataset.split)):
        kept = "saved without splits" if dataset.split is None else f"the split {str(dataset.split)!r} alone"
        raise ValueError(f"The data set {name!r} is {kept}, and has no {split!r}.")
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
        max_image_pixels: A file of more pixels than this counts as corrupt: decoding one takes 8 bytes of memory each.

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
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise ValueError(f"`resolution` is {resolution!r}, but must be one or two positive integers.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` is {channels!r}, but images have 1 or 3; networks of latents need --vae.")
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"`on_corrupt` is {on_corrupt!r}, but must be 'raise' or 'skip'.")
        most = 2 * MAX_IMAGE_PIXELS  # beyond, Pillow refuses by itself
        if type(max_image_pixels) is not int or not 0 < max_image_pixels <= most:
            raise ValueError(f"`max_image_pixels` is {max_image_pixels!r}, but must be an integer from 1 to {most}.")
        self.height, self.width = size
        self.channels, self.seed, self.augmentation = channels, seed, augmentation
        self.on_corrupt, self.max_image_pixels = on_corrupt, max_image_pixels
        # The autoencoder whose latents are learned; whoever trains encodes with it, not a data worker.
        self.vae: ModelMixin | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"vae": None}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what networks learn from: the pixels, or their latents."""
        return (
            (self.channels, self.height, self.width)
            if self.vae is None
            else latent_shape(self.vae, self.height, self.width)
        )

    def decode(self, file: dict | None, row: int) -> np.ndarray | None:
        """Premultiplied colours and alpha, uint8 [H, W, C + 1], or `None` for a corrupt image to skip.

        Args:
            file: Bytes, path or both, as `datasets` has them undecoded.
            row: Number of the row, to name it.
        """
        try:
            image = decode_image(file, self.max_image_pixels)
        except UndecodableError as error:
            name = name_image(file, row)
            if self.on_corrupt == "raise":
                raise ValueError(
                    f"The image {name} cannot be decoded: {error}; --on_corrupt skip leaves such images out."
                ) from error
            if self.note_corrupt(row):
                warnings.warn(f"The image {name} is left out, as it cannot be decoded: {error}.", stacklevel=2)
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
    """The images of a data set as tensors, augmented, with their class labels or captions.

    In a set too large for memory a corrupt image is found at access, and the next one of the set takes its place.

    Args:
        dataset: A data set with an image column, as of `load_images`.
        resolution: As of [`ImageReader`].
        image_column: The column of images.
        label_column: The column of classes: a `ClassLabel`, or integers or strings, numbered in sorted order.
        num_classes: Number of classes; default: those there are. Given, integers are taken as they are.
        caption_column: The column of captions: a string or a list of strings a row.
        options: Further arguments of [`ImageReader`].

    Attributes:
        id2label: The name of each class, or `None` without a label column.
        num_classes: How many there are, or `None`.
        captions: The captions of each image, or `None` without a column of them.
        has_captions: Whether there are any.
        corrupt: The files or rows found corrupt so far, by this process and all its data workers.
        description: What a folder held besides the images, or `None` for other sources.

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
        caption_column: str | None = None,
        **options,
    ):
        super().__init__(resolution, **options)
        check_columns(dataset, image_column, label_column, caption_column)
        check_num_classes(num_classes, label_column)
        self.description = folders.description_of(dataset)
        self._files, self._column = undecoded(dataset, image_column), image_column
        self._labels, self.id2label = read_labels(dataset, label_column, num_classes)
        self.num_classes = None if self.id2label is None else len(self.id2label)
        self.captions, self.has_captions = read_captions(dataset, caption_column), caption_column is not None
        self._all_labels, self._all_captions = self._labels, self.captions
        # In shared memory: data workers mark rows in it.
        self._is_corrupt = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._pixels: np.ndarray | None = None
        if len(dataset) * self.height * self.width * (self.channels + 1) <= CACHE_BYTES:
            self._decode_all()

    def _decode_all(self):
        rows = tqdm(range(len(self._files)), desc="decoding", unit="image", delay=5, leave=False)
        pixels = [self._decode(row) for row in rows]
        kept = [row for row, image in enumerate(pixels) if image is not None]
        if not kept:
            raise ValueError(f"None of the {len(pixels)} images can be decoded, the first being {self.corrupt[0]}.")
        self._pixels = np.stack([pixels[row] for row in kept])
        self._labels = None if self._labels is None else self._labels[kept]
        self.captions = None if self.captions is None else [self.captions[row] for row in kept]

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

    @functools.cached_property
    def fingerprint(self) -> dict:
        """What these images are, whatever their path, as of [`inventory.fingerprint_rows`]."""
        return fingerprint_rows(self._files, self._column, self._all_labels, self.id2label, self._all_captions)

    @property
    def marks(self) -> dict[str, list[int | None]]:
        """What tells a change of any image without a look into it, as of [`inventory.mark_rows`]."""
        return mark_rows(self._files, self._column)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values`, float32 [C, H, W] in [-1, 1], and `class_labels`, int64 [], or `caption`, bytes [8192].

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
        if self.captions is not None:
            item["caption"] = draw_caption(self.captions[row], self.seed, epoch, index)
        return item

    def list_captions(self, count: int) -> list[str]:
        """First captions of some images, evenly spread."""
        return inventory.spread_captions(self.captions, count)


def check_columns(dataset: "Dataset | IterableDataset", image_column: str, *others: str | None) -> None:
    """Raise a `ValueError` if a data set is empty or a column is missing or holds no images."""
    from datasets import Image as ImageFeature
    from datasets import IterableDataset

    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and len(dataset) == 0:
        raise ValueError("The data set is empty.")
    if dataset.features is None:
        raise ValueError("The stream does not tell what its columns hold; read the data set without streaming.")
    for column in (image_column, *others):
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
