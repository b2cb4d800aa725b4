"""What a set of images holds: classes or captions, a description in words, and a fingerprint that depends on no path."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from .decoding import local_path, read_file
from .folders import describe_classes, join_names

if TYPE_CHECKING:
    from datasets import Dataset


_SAMPLED = 256  # rows whose content a fingerprint holds
_LONGEST_CAPTION = 8192  # bytes, which is more than text encoders read


class Images(Protocol):
    """Images that a run learns from: a set of them, or a stream."""

    height: int
    width: int
    channels: int
    num_classes: int | None
    id2label: dict[int, str] | None
    has_captions: bool

    @property
    def fingerprint(self) -> dict: ...


class ImageSet(Images, Protocol):
    """Images that can be counted, and had by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]: ...

    captions: list[list[str]] | None

    @property
    def class_labels(self) -> Tensor | None: ...

    @property
    def corrupt(self) -> list[str]: ...


def check_num_classes(num_classes: int | None, label_column: str | None) -> None:
    """Raise a `ValueError` if a number of classes is none, or there is no column of them."""
    if num_classes is None:
        return
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"`num_classes` is {num_classes!r}, but must be a positive integer.")
    if label_column is None:
        raise ValueError(f"`num_classes` is {num_classes}, but no `label_column` says which image is of which class.")


def read_labels(
    dataset: "Dataset", label_column: str | None, num_classes: int | None
) -> tuple[np.ndarray | None, dict[int, str] | None]:
    """The number of each row's class, int64 [N], and the names of the classes; `None` twice without a column.

    Raises:
        ValueError: If a row has no class or one that cannot be; the row is named.
    """
    if label_column is None:
        return None, None
    values = dataset.with_format(None).select_columns(label_column)[:][label_column]
    feature = dataset.features[label_column]
    if num_classes is not None or hasattr(feature, "names"):
        id2label = name_classes(feature, label_column, num_classes)
        for row, value in enumerate(values):
            check_label(value, id2label, label_column, row)
        return np.array(values, dtype=np.int64), id2label
    if {type(value) for value in values} - {type(None)} not in ({int}, {str}):
        raise ValueError(f"The column {label_column!r} of {feature} must hold one integer or one string a row.")
    for row, value in enumerate(values):
        if value in (None, -1, ""):
            raise ValueError(f"The row {row} has no class in the column {label_column!r}: its label is {value!r}.")
        if isinstance(value, int) and value < 0:
            raise ValueError(
                f"The row {row} has the label {value} in the column {label_column!r}, but none is negative."
            )
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[value] for value in values], dtype=np.int64), dict(enumerate(map(str, names)))


def name_classes(feature: object, label_column: str, num_classes: int | None) -> dict[int, str]:
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
    if type(value) is not int or not 0 <= value < len(id2label):
        raise ValueError(
            f"The row {row} has the label {value!r} in the column {label_column!r}, outside of the "
            f"{len(id2label)} classes."
        )


def read_captions(dataset: "Dataset", caption_column: str | None) -> list[list[str]] | None:
    """The captions of each row; `None` without a column.

    Raises:
        ValueError: If a row has none; the row is named.
    """
    if caption_column is None:
        return None
    values = dataset.with_format(None).select_columns(caption_column)[:][caption_column]
    return [check_captions(value, caption_column, row) for row, value in enumerate(values)]


def check_captions(value: object, caption_column: str, row: int) -> list[str]:
    """The captions of a row, which holds a string or a list of them.

    Raises:
        ValueError: If it holds something else, or none.
    """
    captions = [value] if isinstance(value, str) else value
    if not (isinstance(captions, list) and captions and all(isinstance(each, str) for each in captions)):
        raise ValueError(
            f"The row {row} must hold a caption or a list of them in the column {caption_column!r}, got {value!r}."
        )
    if (size := max(len(each.encode()) for each in captions)) > _LONGEST_CAPTION:
        raise ValueError(
            f"The row {row} has a caption of {size} bytes in the column {caption_column!r}; one may have {_LONGEST_CAPTION}."
        )
    return captions


def spread_captions(captions: list[list[str]] | None, count: int) -> list[str]:
    """First captions of some images, evenly spread over all."""
    assert captions is not None  # nobody else asks
    return [captions[i * len(captions) // count][0] for i in range(count)]


def choose_caption(captions: list[str], seed: int, epoch: int, index: int) -> str:
    """One of the captions of an image. Like an augmentation it is drawn from (seed, epoch, index) alone."""
    if len(captions) == 1:
        return captions[0]
    draws = np.random.default_rng(np.random.SeedSequence((seed, epoch, index, 1)))
    return captions[int(draws.integers(len(captions)))]


def draw_caption(captions: list[str], seed: int, epoch: int, index: int) -> Tensor:
    """The same as bytes [8192], which batches and processes hand on like any tensor."""
    return caption_to_bytes(choose_caption(captions, seed, epoch, index))


def caption_to_bytes(caption: str) -> Tensor:
    """A caption as bytes [8192], filled up with zeros."""
    content = caption.encode().ljust(_LONGEST_CAPTION, b"\0")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def captions_from_bytes(captions: Tensor) -> list[str]:
    """The captions of a batch [B, 8192]."""
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in captions.cpu().numpy()]


def fingerprint_rows(
    files: "Dataset",
    column: str,
    labels: np.ndarray | None,
    id2label: dict[int, str] | None,
    captions: list[list[str]] | None = None,
) -> dict[str, list[str] | int | str | None]:
    """Names of the `classes`, number of `images`, and a hash of their `rows`. It depends on no path and no time.

    The hash takes all labels, the names and sizes of all files, and the content of 256 rows, evenly spread.

    Args:
        files: The rows, undecoded.
        column: The column of images.
        labels: Class of each row, int64 [N], or `None`.
        id2label: Names of the classes, or `None`.
        captions: Captions of each row, or `None`.
    """
    count = len(files)
    sampled = sorted({row * count // _SAMPLED for row in range(_SAMPLED)}) if count > _SAMPLED else range(count)
    paths = files.flatten().select_columns(f"{column}.path")[:][f"{column}.path"]
    numbers = None if labels is None else labels.tolist()
    digest = hashlib.sha256(json.dumps([numbers, [_describe_file(path) for path in paths]]).encode())
    if captions is not None:
        digest.update(json.dumps(captions).encode())
    for row in sampled:
        digest.update(_hash_content(files[row][column]))
    return {"classes": list_classes(id2label), "images": count, "rows": digest.hexdigest()[:16]}


def fingerprint_first_rows(
    rows: Iterable[tuple], id2label: dict[int, str] | None, count: int | None, size: int | None
) -> dict:
    """The same of a stream: the hash is of its first rows alone, and of the size of all.

    Args:
        rows: For each row the undecoded image and, if there are any, the label.
        id2label: Names of the classes, or `None`.
        count: Number of images, where it is known.
        size: Bytes of all shards, where it is known.
    """
    digest = hashlib.sha256(b"" if size is None else str(size).encode())
    for file, *label in rows:
        digest.update(json.dumps(label).encode() + _hash_content(file))
    return {"classes": list_classes(id2label), "images": count, "rows": digest.hexdigest()[:16]}


def list_classes(id2label: dict[int, str] | None) -> list[str] | None:
    """Names of the classes in their order."""
    return None if id2label is None else [id2label[i] for i in range(len(id2label))]


def _hash_content(file: dict | None) -> bytes:
    """A hash of an undecoded image; of one that cannot be read a hash of nothing."""
    content = file and file["bytes"]
    if content is None and file and file["path"] is not None:
        try:
            content = read_file(file["path"])
        except (OSError, RuntimeError):  # whoever decodes it says so
            content = None
    return hashlib.sha256(content or b"").digest()


def _describe_file(path: str | None) -> list[str | int | None]:
    """Name of a file without its folder, and its size if it is local."""
    local = local_path(path)
    size = os.stat(local).st_size if local is not None and os.path.isfile(local) else None
    return [path and unicodedata.normalize("NFC", path.rpartition("/")[2]), size]


def mark_rows(files: "Dataset", column: str) -> dict[str, list[int | None]]:
    """The `bytes` of each image that its row holds, and when its file was `changed`, in nanoseconds; else `None`.

    A fingerprint looks into some rows only. These tell of all, but depend on the machine.
    """
    import pyarrow.compute  # a second, for latents alone

    flat = files.flatten()
    batches = flat.select_columns(f"{column}.bytes").with_format("arrow").iter(10_000)
    lengths = (pyarrow.compute.binary_length(batch[f"{column}.bytes"]) for batch in batches)
    places = [local_path(path) for path in flat.select_columns(f"{column}.path")[:][f"{column}.path"]]
    return {
        "bytes": [count for part in lengths for count in part.to_pylist()],
        "changed": [os.stat(place).st_mtime_ns if place and os.path.isfile(place) else None for place in places],
    }


def describe_images(images: Images) -> str:
    """Describe a set of images in a few lines: images, classes with their counts, what is left out and why.

    Args:
        images: `LabelledImages`, `StreamedImages`, or a data set with the same attributes.
    """
    description = getattr(images, "description", None)
    lines, names = [] if description is None else [description], list_classes(images.id2label) or []
    if not isinstance(images, Sized):
        count = "" if (number := getattr(images, "count", None)) is None else f"{number:,} "
        lines.insert(0, f"a stream of {count}images, number of classes: {images.num_classes or 'none'}")
        if images.num_classes and len(lines) == 1:
            lines.append(f"classes: {join_names(names)}")
        return "\n".join(lines)
    images = cast(ImageSet, images)
    lines.insert(0, f"images: {len(images):,}, number of classes: {images.num_classes or 'none'}")
    if images.num_classes:
        labels = cast(Tensor, images.class_labels)  # there are classes
        counts = torch.bincount(labels, minlength=images.num_classes).tolist()
        lines.append(describe_classes(dict(zip(names, counts, strict=True))))
    if corrupt := images.corrupt:
        lines.append(f"left out {len(corrupt):,}, corrupt: {join_names(corrupt)}")
    return "\n".join(lines)
