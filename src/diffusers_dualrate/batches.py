"""The order in which a run sees its images, and how batches are dealt out: functions of seed and position alone."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch


class ShuffledIndices(torch.utils.data.Sampler):
    """An endless shuffle of a data set, cut to the stretch from `start` to `stop`; yields (epoch, index).

    Each epoch is a permutation drawn from (seed, epoch) alone. So a run that starts anywhere in the stretch sees what an
    uninterrupted one sees there. Batches may cross epochs; no image is left out.

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

    def __init__(self, order: Sequence | ShuffledIndices, batch_size: int, parts: int):
        self.order, self.batch_size, self.parts, self.drop_last = order, batch_size, parts, True

    def __len__(self) -> int:
        return len(self.order) // (self.batch_size * self.parts) * self.parts

    def __iter__(self):
        order = iter(self.order)
        while len(rows := list(itertools.islice(order, self.batch_size * self.parts))) == self.batch_size * self.parts:
            for part in range(self.parts):
                yield rows[part :: self.parts]
