"""Folders of images: which files are in them, of which classes, and which are left out and why.

The rules, a function of the file system alone:

- A file is an image if Pillow reads the format that its ending names. Hidden files are none.
- Folders at the top that hold images are the classes, whatever their names; deeper folders belong to the one at the top.
- Where all of them are called like splits (train, test, validation, ...), they are splits, and hold the classes.
- Images beside such folders are refused, and so is what could be read in two ways.
- Links are followed; within a class each folder is read once, so that links in a circle end.

Classes are numbered in sorted order of their names in Unicode's composed form, and over all splits alike.
"""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

import numpy as np
from PIL import Image, ImageFile

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
"""Names of folders that are splits, whatever their case, and the split that each is."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables beside images that `datasets` knows how to join with them."""

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")
ARCHIVES = (".tar", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")

_NAMED = 10  # files or classes that a description names one by one
_BUILDER = "folder of images"


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds.

    Attributes:
        root: The folder, an absolute path.
        split: The split that was read, or `None` in a folder without splits.
        splits: All splits there are.
        files: The images, absolute paths, in order of their classes and names.
        labels: Number of each image's class, or `None` in a folder without class folders.
        classes: Names of the classes, or `None`.
        left_out: Every other file of the split and every folder without an image, with the reason.
    """

    root: str
    split: str | None
    splits: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    left_out: dict[str, str]

    def describe(self) -> str:
        """In a few lines, what was found, where it is counted and what is left out."""
        where = f", split {self.split} of {', '.join(self.splits)}" if self.split else ""
        found = len(self.files) + sum(not name.endswith(os.sep) for name in self.left_out)
        lines = [f"{readable(self.root)!r}{where}: {len(self.files):,} of {found:,} files are images"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"left out {len(names):,}, {reason}: {join_names(names)}")
        return "\n".join(lines)

    def open(self, *, streaming: bool = False, seed: int = 0) -> "Dataset | IterableDataset":
        """The images as a data set with the columns `image` and, where there are classes, `label`.

        Args:
            streaming: Whether to give a stream. Its files are shuffled, so that its buffer sees all classes.
            seed: Seed of that shuffle.
        """
        import datasets
        import pyarrow

        order = np.arange(len(self.files))
        if streaming:
            np.random.default_rng(seed).shuffle(order)
        paths = pyarrow.array([_to_text(self.files[row]) for row in order], pyarrow.string())
        columns = {
            "image": pyarrow.StructArray.from_arrays(
                [pyarrow.nulls(len(paths), pyarrow.binary()), paths], ["bytes", "path"]
            )
        }
        features: dict[str, object] = {"image": datasets.Image()}
        if self.labels is not None and self.classes is not None:
            columns["label"] = pyarrow.array(np.array(self.labels, dtype=np.int64)[order])
            features["label"] = datasets.ClassLabel(names=list(self.classes))
        description = self.describe()
        if streaming and self.labels is not None and self.classes is not None:
            counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
            description += "\n" + describe_classes(dict(zip(self.classes, counts, strict=True)))
        info = datasets.DatasetInfo(features=datasets.Features(features))
        dataset = datasets.Dataset(pyarrow.table(columns), info=info)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        dataset.info.builder_name, dataset.info.description = _BUILDER, description  # a stream drops what was given
        return dataset


def description_of(dataset: "Dataset | IterableDataset") -> str | None:
    """What `ImageFolder.describe` said of the folder that a data set was opened from; `None` for others."""
    return dataset.info.description if dataset.info.builder_name == _BUILDER else None


def is_folder_of_images(name: str | Path) -> bool:
    """Whether a data set's name is that of a folder for `list_folder`, not of one that `datasets` reads by itself.

    That one holds tables or tar archives, as the Hub has them, or names its files in a README.
    """
    if not os.path.isdir(name):
        return False
    readme = Path(name, "README.md")
    if readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace"):
        return False
    has_images, has_tables, endings = False, False, image_endings()
    for _, _, files in os.walk(name):
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if ending in (".parquet", ".arrow", ".tar") and file not in METADATA:
                return False
            has_images |= ending in endings
            has_tables |= ending in TABLES
    return has_images or not has_tables


def find_described(folder: str | Path, split: str) -> str | None:
    """The folder or its split, an absolute path, if beside the images there is a table that describes them."""
    if not os.path.isdir(folder):
        return None
    named = [entry for entry in sorted(os.listdir(folder)) if SPLITS.get(entry.lower()) == SPLITS.get(split, split)]
    for path in (os.path.abspath(folder), *(os.path.abspath(os.path.join(folder, name)) for name in named)):
        if any(os.path.isfile(os.path.join(path, table)) for table in METADATA):
            return path
    return None


def count_images(folder: str | Path) -> int:
    """Number of images in a folder and all folders below it."""
    top = _read_top(os.path.abspath(folder))
    return len(top.loose) + sum(len(images) for images in top.classes.values())


def describe_classes(counts: dict[str, int]) -> str:
    """In one line, how many images each class has; of many classes the first ones, the smallest and the largest."""
    named = ", ".join(f"{readable(name)!r} {count:,}" for name, count in list(counts.items())[:_NAMED])
    if len(counts) <= _NAMED:
        return f"classes: {named}"
    (least, _), (most, _) = (choose(counts.items(), key=lambda item: item[1]) for choose in (min, max))
    return (
        f"classes: {named} and {len(counts) - _NAMED:,} more; the smallest is {readable(least)!r} with "
        f"{counts[least]:,}, the largest {readable(most)!r} with {counts[most]:,}"
    )


def join_names(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(repr(readable(name)) for name in names[:_NAMED]) + more


def list_folder(folder: str | Path, split: str = "train") -> ImageFolder:
    """List a folder of images.

    Args:
        folder: The folder.
        split: Which split to read where there are any; a folder without splits is its own "train".

    Raises:
        ValueError: If there is no such folder or split, no image, or images beside class folders; if two classes
            cannot be told apart, or one has no image to learn from; if a folder cannot be read.
    """
    root = os.path.abspath(folder)
    name = readable(os.fspath(folder))
    if not os.path.isdir(root):
        what = "is no folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"The folder {name!r} {what}.")
    top = _read_top(root)
    splits = _find_splits(name, top)
    if splits is None:
        if split != "train":
            raise ValueError(f"The folder {name!r} has no split {split!r}: its folders are not called like splits.")
        return _make(root, name, None, (), top, sorted(top.classes))
    if SPLITS.get(split, split) not in splits:
        raise ValueError(f"The folder {name!r} has no split {split!r}; it has {', '.join(splits)}.")
    tops = {known: _read_top(os.path.join(root, folder)) for known, folder in splits.items()}
    classes = set().union(*(read.classes for read in tops.values()))
    if "train" in tops and (missing := sorted(classes - set(tops["train"].classes))):
        raise ValueError(
            f"The class {missing[0]!r} of {name!r} has images in another split, but none in "
            f"{splits['train']!r}, so that it cannot be learnt."
        )
    chosen = SPLITS.get(split, split)
    chosen_top = tops[chosen]
    outside = {
        other: reason for other, reason in top.left_out.items() if other.split(os.sep)[0] not in splits.values()
    }
    chosen_top.left_out = outside | {
        os.path.join(splits[chosen], other): reason for other, reason in chosen_top.left_out.items()
    }
    return _make(root, name, chosen, tuple(splits), chosen_top, sorted(classes))


def check_output_dir(output_dir: str | Path, data_dir: str | Path | None) -> None:
    """Refuse to write into the images that are read, also through links.

    Args:
        output_dir: Where a run writes; it need not exist.
        data_dir: Folder that is read. `None` and what is no folder are passed.

    Raises:
        ValueError: If the output would be the folder, or lie in it or in a folder that it links to.
    """
    if data_dir is None or not os.path.isdir(data_dir):
        return
    output = Path(output_dir).resolve()
    with os.scandir(data_dir) as entries:
        folders = [os.fspath(data_dir), *(entry.path for entry in entries if entry.is_symlink() and entry.is_dir())]
    for folder in folders:
        if any(parent.exists() and os.path.samefile(parent, folder) for parent in (output, *output.parents)):
            raise ValueError(
                f"The output folder {str(output_dir)!r} lies in the images' folder {readable(folder)!r}, "
                "and would add its own files to the data."
            )


def readable(name: str) -> str:
    """A file's name as text that can be written anywhere: in composed form, bytes that are no UTF-8 as escapes."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _to_text(path: str) -> str:
    """The path, or its URI where its bytes are no UTF-8 and no text could hold them; `decoding.read_file` takes both."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(path))
    return path


class _Top:
    """Images of a folder: beside its sub-folders and within each of them, with what is no image."""

    def __init__(self):
        self.loose: list[str] = []
        self.classes: dict[str, list[str]] = {}
        self.folders: dict[str, str] = {}  # of each class its name in the file system
        self.left_out: dict[str, str] = {}

    def find_wrapped(self) -> str | None:
        """The only folder with images, if all of them are in folders within it."""
        if len(self.classes) != 1 or self.loose:
            return None
        (name,) = self.classes
        folder = self.folders[name]
        return name if all(os.path.basename(os.path.dirname(file)) != folder for file in self.classes[name]) else None


def _read_top(root):
    """Reads a folder and the class folders in it; what is left out is named relative to it."""
    top, endings = _Top(), image_endings()
    folders = _sort_files(root, "", top.loose, top.left_out, endings)
    for folder in folders:
        images: list[str] = []
        waiting, seen = [folder], {_identify(root)}
        while waiting:
            inner = waiting.pop(0)
            if (identity := _identify(os.path.join(root, inner))) in seen:
                top.left_out[readable(inner) + os.sep] = "a link to a folder that was read"
                continue
            seen.add(identity)
            waiting += _sort_files(root, inner, images, top.left_out, endings)
        name = readable(folder)
        if not images:
            if name + os.sep not in top.left_out:
                top.left_out[name + os.sep] = "a folder without images, hence no class"
            continue
        if name in top.classes:
            raise ValueError(
                f"Two folders of {readable(root)!r} are called {name!r} and differ in Unicode's form alone."
            )
        top.classes[name], top.folders[name] = sorted(images, key=readable), folder
    top.loose.sort(key=readable)
    return top


def _sort_files(root, folder, images, left_out, endings):
    """Sorts what one folder holds into images and files left out; returns the folders in it, relative to the root."""
    folders = []
    try:
        with os.scandir(os.path.join(root, folder)) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"The folder {readable(os.path.join(root, folder))!r} cannot be read: {error.strerror}."
        ) from error
    for entry in entries:
        path = os.path.join(folder, entry.name)
        # Not the entry's own methods: they raise where links form a circle.
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if is_folder:
            if entry.name.startswith("."):
                left_out[readable(path) + os.sep] = "hidden"
            else:
                folders.append(path)
        elif entry.name.startswith("."):
            left_out[readable(path)] = "hidden"
        elif not (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
            left_out[readable(path)] = "a link to nothing" if entry.is_symlink() else "no regular file"
        elif (ending := os.path.splitext(entry.name)[1].lower()) in endings:
            images.append(os.path.join(root, path))
        else:
            left_out[readable(path)] = "an archive" if ending in ARCHIVES else "no image by its ending"
    return folders


def _identify(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _find_splits(name, top):
    """Folder of each split, or `None` where not every folder with images is called like one."""
    if top.loose or not top.classes or any(folder.lower() not in SPLITS for folder in top.classes):
        return None
    splits: dict[str, str] = {}
    for folder in sorted(top.classes):
        known = SPLITS[folder.lower()]
        if known in splits:
            raise ValueError(f"The folders {splits[known]!r} and {folder!r} of {name!r} are both the split {known!r}.")
        splits[known] = folder
    return splits


def _make(root, name, split, splits, top, classes):
    """Puts the listing together, once it is certain that it can be read in one way only."""
    if top.loose and top.classes:
        stray = readable(os.path.basename(top.loose[0]))
        raise ValueError(
            f"The folder {name!r} holds images such as {stray!r} ({len(top.loose):,} in all) beside class folders such "
            f"as {min(top.classes)!r}: move all images into class folders, or none."
        )
    if wrapped := top.find_wrapped():
        raise ValueError(
            f"All images of {name!r} are in folders within {wrapped!r}: give the path of {wrapped!r} if those are the "
            "classes, or move the images up if it is the only class."
        )
    if not top.loose and not top.classes:
        archives = [file for file, reason in top.left_out.items() if reason == "an archive"]
        tables = [file for file in top.left_out if file.lower().endswith(TABLES)]
        more = f"; it holds archives such as {archives[0]!r}, to be unpacked first" if archives else ""
        more = more or (f"; it holds tables such as {tables[0]!r}: give it as a data set's name" if tables else "")
        raise ValueError(f"The folder {name!r} holds no images{more}.")
    if top.loose:
        return ImageFolder(root, split, splits, tuple(top.loose), None, None, top.left_out)
    files, labels = [], []
    for number, label in enumerate(classes):
        files += top.classes.get(label, [])
        labels += [number] * len(top.classes.get(label, []))
    return ImageFolder(root, split, splits, tuple(files), tuple(labels), tuple(classes), top.left_out)


def image_endings() -> frozenset[str]:
    """Endings, in lower case, of the formats that Pillow decodes without help from elsewhere."""
    unreadable = {"MPEG"}  # known by its header alone, as are formats with a stub
    Image.init()
    for name, (factory, _) in Image.OPEN.items():
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile):
            unreadable.add(name)
    return frozenset(
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in unreadable
    )
