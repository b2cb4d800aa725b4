"""The files that `datasets` reads a data set from, its shards: what is wrong with one is said by its name.

Before anything is read, all must be there, and those on this machine must be whole. While a stream reads them, none may
change or fail, and one that lets the run wait is named.
"""

import functools
import os
import re
import tarfile
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import local_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

PATIENCE = 30.0
"""Seconds that a shard may give nothing before it is named."""

_NUMBERED = re.compile(r"(.*?)-(\d+)-of-(\d+)(.*)", re.DOTALL)
_TAR_END = bytes(1024)  # two blocks of zeros; without them a tar file that lost its end reads like a shorter one
# What readers of Parquet, Arrow, tar and compressed files raise at damaged ones; arrow's own errors are of these kinds.
_READER_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    NotImplementedError,
    EOFError,
    tarfile.TarError,
    zlib.error,
)


def open_shards(
    source: str | Path, *args: Any, split: str, streaming: bool, **options: Any
) -> "Dataset | IterableDataset":
    """Open a split of a data set with `datasets`.

    Args:
        source: What to call it in messages.
        args: Arguments of `datasets.load_dataset_builder`.
        split: The split.
        streaming: Whether to read rows as they are needed instead of preparing all of them first.
        options: Further arguments of `datasets.load_dataset_builder`.

    Raises:
        ValueError: If it is missing or out of reach, or a shard is missing, cut off or broken.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetGenerationError

    try:
        builder = load_dataset_builder(*args, **options)
        files = [file for name, files in (builder.config.data_files or {}).items() if name == split for file in files]
        if not hasattr(builder, "BASE_FEATURE"):  # a folder's files are images, not shards
            check_numbers(files)
        count = count_rows(files)
        told = getattr((builder.info.splits or {}).get(split), "num_examples", None)
        if count is not None and told and count != told:  # 0 is what nobody told
            raise ValueError(f"The data set {str(source)!r} has {count:,} rows, and its README tells of {told:,}.")
        if streaming:
            return _open_stream(builder, split, files, count)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (OSError, DatasetGenerationError) as error:  # missing, out of reach, or broken
        said = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        missing = "" if Path(source).exists() else "there is no such folder, and on the Hub: "
        raise ValueError(f"The data set {str(source)!r} cannot be opened: {missing}{said}") from error


def _open_stream(builder: "DatasetBuilder", split: str, files: list[str], count: int | None) -> "IterableDataset":
    from datasets import SplitDict, SplitInfo

    sizes = {file: os.path.getsize(local) for file in files if (local := local_path(file)) is not None}
    for name in ("_generate_tables", "_generate_examples"):  # where a builder has it how its shards are read
        # Not the bound method: a worker that unpickles the builder would find this very function under its name.
        if (generate := getattr(type(builder), name, None)) is not None:
            setattr(builder, name, functools.partial(read_shard, functools.partial(generate, builder), sizes))
    if count is not None:
        builder.info.splits = SplitDict({split: SplitInfo(split, num_examples=count)})
    if sizes:
        builder.info.download_size = sum(sizes.values())
    return builder.as_streaming_dataset(split=split)


def check_numbers(files: Iterable[str]) -> None:
    """Refuse files called like `train-00000-of-00004.parquet` if one of that many is missing.

    Raises:
        ValueError: If so; the first one is named.
    """
    numbers: dict[tuple[str, str], dict[int, re.Match[str]]] = defaultdict(dict)
    for file in files:
        folder, _, name = file.rpartition("/")
        if (match := _NUMBERED.fullmatch(name)) is not None:
            numbers[f"{folder}/{match[1]}", match[3]][int(match[2])] = match
    for (start, total), found in numbers.items():
        first = 1 if int(total) in found and 0 not in found else 0
        missing = [number for number in range(first, first + int(total)) if number not in found]
        if missing:
            some = next(iter(found.values()))
            endings = {match[4] for match in found.values()}  # some names end with a hash
            name = f"{start}-{missing[0]:0{len(some[2])}}-of-{total}{endings.pop() if len(endings) == 1 else ''}"
            raise ValueError(
                f"The shard {name!r} is missing: of the {int(total):,} that the names of the others tell of, "
                f"{len(missing):,} are not there."
            )


def count_rows(files: Iterable[str]) -> int | None:
    """Rows of all files together, where all are Parquet files on this machine, and `None` elsewhere.

    Raises:
        ValueError: If one on this machine is cut off.
    """
    from pyarrow import ArrowException, parquet

    counts: list[int | None] = []
    for file in files:
        local, ending = local_path(file), os.path.splitext(file)[1].lower()
        counts.append(None)
        if local is None:
            continue
        if ending == ".parquet":
            try:
                counts[-1] = parquet.read_metadata(local).num_rows
            except (OSError, ArrowException) as error:
                raise ValueError(f"The shard {file!r} is cut off or broken: {error}") from error
        elif ending == ".tar":
            with open(local, "rb") as content:
                content.seek(max(0, os.path.getsize(local) - len(_TAR_END)))
                if content.read() != _TAR_END:
                    raise ValueError(
                        f"The shard {file!r} is cut off: a tar file ends with {len(_TAR_END):,} zeros, and it does not."
                    )
    return sum(count for count in counts if count is not None) if counts and None not in counts else None


def read_shard(generate: Callable[..., Iterator], sizes: dict[str, int], **shards: Any) -> Iterator:
    """What a builder of `datasets` makes of one shard.

    Args:
        generate: The builder's own method, whose arguments are lists with one item for each shard.
        sizes: Size of each file on this machine, in bytes, when it was opened.
        shards: Those arguments; `datasets` passes them on for one shard at a time.

    Raises:
        ValueError: If the shard cannot be read, or its size has changed.
    """
    names = [value[0] for value in shards.values() if isinstance(value, list) and value and isinstance(value[0], str)]
    if not names:  # single images, which are named where they are decoded
        yield from generate(**shards)
        return
    try:
        _check_size(names[0], sizes)
        yield from name_if_slow(generate(**shards), names[0])
        _check_size(names[0], sizes)  # a tar file that loses its end meanwhile reads like a shorter one
    except _READER_ERRORS as error:
        said = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(f"The shard {names[0]!r} cannot be read: {said}") from error


def _check_size(name, sizes):
    if name in sizes and (size := os.path.getsize(local_path(name) or name)) != sizes[name]:
        raise ValueError(f"it had {sizes[name]:,} bytes when the run began, and has {size:,} now.")


def name_if_slow(rows: Iterator, name: str) -> Iterator:
    """Pass what a shard gives on, and warn once, while it lasts, if the next of it takes longer than [`PATIENCE`].

    Args:
        rows: What it gives.
        name: The shard's name.
    """
    asked: list[float | None] = [None]  # since when the next is awaited; nobody waits for it between two
    is_done = threading.Event()

    def look() -> None:
        while not is_done.wait(PATIENCE / 4):
            if (since := asked[0]) is not None and time.monotonic() - since > PATIENCE:
                warnings.warn(
                    f"The shard {name!r} is slow: the run has waited for it for {PATIENCE:g} s.", stacklevel=1
                )
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        while True:
            asked[0] = time.monotonic()
            try:
                row = next(rows)
            except StopIteration:
                return
            asked[0] = None
            yield row
    finally:
        is_done.set()
