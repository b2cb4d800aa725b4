"""The order in which a run sees its images, from a set or from a stream, and how batches are dealt out.

All of it follows from seed and position alone. A position in a stream is (epoch, row): how many rows of the epoch's
shuffle have been read. To go on, a run reads past them. Every item of a stream carries the position behind its global
batch. It also carries how many corrupt images were met so far, since another process may read them.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import ImageReader, check_columns, undecoded
from .folders import description_of
from .inventory import (
    check_captions,
    check_label,
    check_num_classes,
    draw_caption,
    fingerprint_first_rows,
    name_classes,
)

if TYPE_CHECKING:
    from datasets import IterableDataset


_SAMPLED = 16  # rows that a fingerprint holds


class ShuffledIndices(torch.utils.data.Sampler):
    """An endless shuffle of a data set, cut to the stretch from `start` to `stop`; yields (epoch, index).

    Each epoch is a permutation drawn from (seed, epoch) alone. So a run that starts anywhere sees what an uninterrupted
    one sees there. Batches may cross epochs; no image is left out.

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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for epoch in range(self.start // self.size, -(-self.stop // self.size)):
            order = np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.size).tolist()
            first = epoch * self.size
            for position in range(max(self.start, first), min(self.stop, first + self.size)):
                yield epoch, order[position - first]


class DealtBatches(torch.utils.data.Sampler):
    """Deals each global batch of a sequence out into `parts` batches, like cards: batch p holds rows p, p + parts, ...

    So the first rows of all parts are the first rows of the global batch, for any number of parts. What is left over at
    the end is dropped.

    Args:
        order: The sequence of indices.
        batch_size: Size of one part.
        parts: Number of processes times parts of a step.
    """

    def __init__(self, order: Sequence | ShuffledIndices, batch_size: int, parts: int):
        self.order, self.batch_size, self.parts, self.drop_last = order, batch_size, parts, True

    def __len__(self) -> int:
        return len(self.order) // (self.batch_size * self.parts) * self.parts

    def __iter__(self) -> Iterator[list]:
        order = iter(self.order)
        while len(rows := list(itertools.islice(order, self.batch_size * self.parts))) == self.batch_size * self.parts:
            for part in range(self.parts):
                yield rows[part :: self.parts]


class StreamedImages(ImageReader):
    """The images of a streamed data set as tensors, augmented, with their class labels or captions.

    Args:
        dataset: A streamed data set with an image column, as of `load_images`.
        resolution: As of [`ImageReader`].
        image_column: The column of images.
        label_column: The column of classes: a `ClassLabel`, or integers together with `num_classes`.
        num_classes: Number of classes; default: those that a `ClassLabel` has.
        caption_column: The column of captions: a string or a list of strings a row.
        buffer_size: Number of rows that are shuffled at a time; the files of a data set are shuffled as well.
        options: Further arguments of [`ImageReader`].

    Attributes:
        id2label: The name of each class, or `None` without a label column.
        num_classes: How many there are, or `None`.
        has_captions: Whether there are captions.
        description: What a folder held, or `None` for other sources.
        count: Number of images, or `None` where it is known of none of the shards.
        num_corrupt: Most corrupt images that this process has met in one epoch. Each epoch meets the same ones, in other
            places.

    Raises:
        ValueError: If an argument or a column is not as described, or there is no row.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        resolution: int | tuple[int, int],
        *,
        image_column: str = "image",
        label_column: str | None = None,
        num_classes: int | None = None,
        caption_column: str | None = None,
        buffer_size: int = 10_000,
        **options: Any,
    ):
        super().__init__(resolution, **options)
        if type(buffer_size) is not int or buffer_size < 1:
            raise ValueError(f"`buffer_size` is {buffer_size!r}, but --shuffle_buffer must be a positive integer.")
        check_columns(dataset, image_column, label_column, caption_column)
        check_num_classes(num_classes, label_column)
        self.description = description_of(dataset)
        self.count = getattr((dataset.info.splits or {}).get(str(dataset.split)), "num_examples", None) or None
        self._size = dataset.info.download_size
        self.id2label = None
        if label_column is not None:
            self.id2label = name_classes(dataset.features[label_column], label_column, num_classes)
            names = getattr(dataset.features[label_column], "names", [])
            if len(names) > len(self.id2label):  # its labels are met only as they come
                raise ValueError(
                    f"The column {label_column!r} names {len(names)} classes, more than the {num_classes} given."
                )
        self.num_classes = None if self.id2label is None else len(self.id2label)
        self._label_column, self._caption_column = label_column, caption_column
        self.has_captions = caption_column is not None
        columns = (image_column, label_column, caption_column)
        self._columns = [column for column in columns if column is not None]
        self._unshuffled = rows = undecoded(dataset, *self._columns)
        self.num_corrupt = self._num_met = 0
        self._rows = rows.shuffle(seed=self.seed, buffer_size=buffer_size) if buffer_size > 1 else rows

    @functools.cached_property
    def fingerprint(self) -> dict:
        """What is known of these images before all are read, as of [`inventory.fingerprint_first_rows`]."""
        rows = self._unshuffled.take(_SAMPLED)
        first = (tuple(row[column] for column in self._columns) for row in rows)
        return fingerprint_first_rows(first, self.id2label, self.count, self._size)

    def list_captions(self, count: int) -> list[str]:
        """First captions of the first images, as they lie, again and again if there are fewer than asked for."""
        column = self._caption_column
        assert column is not None  # nobody else asks
        rows = self._unshuffled.select_columns([column]).take(count)
        captions = [check_captions(values[column], column, row)[0] for row, values in enumerate(rows)]
        return [captions[i % len(captions)] for i in range(count)]

    def note_corrupt(self, row: int) -> bool:
        self._num_met += 1
        is_new = self._num_met > self.num_corrupt
        self.num_corrupt = max(self.num_corrupt, self._num_met)
        return is_new

    def read_from(self, epoch: int, row: int) -> Iterator[tuple[dict[str, torch.Tensor], tuple[int, int]]]:
        """Yield each image from a position on, without end, with the position behind it.

        Raises:
            ValueError: If a label is outside of the classes, an image corrupt, or all images of an epoch are.
        """
        while True:
            first, count, self._num_met = row, 0, 0
            rows = self._rows.skip(first)
            rows.set_epoch(epoch)
            for values in rows:
                label, captions = values.get(self._label_column), None
                if self.id2label is not None and self._label_column is not None:
                    check_label(label, self.id2label, self._label_column, row)
                if self._caption_column is not None:
                    captions = check_captions(values[self._caption_column], self._caption_column, row)
                row += 1
                if (pixels := self.decode(values[self._columns[0]], row - 1)) is not None:
                    count += 1
                    item = {"pixel_values": self.augment(pixels, epoch, row - 1)}
                    if self.id2label is not None:
                        item["class_labels"] = torch.tensor(label)
                    if captions is not None:
                        item["caption"] = draw_caption(captions, self.seed, epoch, row - 1)
                    yield item, (epoch, row)
            if first == 0 == count:
                raise ValueError(f"None of the {row} images can be decoded.")
            epoch, row = epoch + 1, 0


class Stretch(torch.utils.data.IterableDataset):
    """A stretch of a stream, its global batches dealt out like those of [`DealtBatches`].

    Args:
        images: The stream.
        position: Where it begins.
        batches: Number of global batches.
        batch_size: Size of a global batch.
        parts: How many parts each is dealt out into, one behind the other.
    """

    def __init__(self, images: StreamedImages, position: tuple[int, int], batches: int, batch_size: int, parts: int):
        self.images, self.position, self.batches = images, position, batches
        self.batch_size, self.parts = batch_size, parts

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        stream = self.images.read_from(*self.position)
        for _ in range(self.batches):
            items, positions = zip(*itertools.islice(stream, self.batch_size), strict=True)
            behind = {"position": torch.tensor(positions[-1]), "num_corrupt": torch.tensor(self.images.num_corrupt)}
            for part in range(self.parts):
                for item in items[part :: self.parts]:
                    yield item | behind
