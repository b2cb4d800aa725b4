"""The noise of an ancestral chain as one Brownian motion, so that chains of different steps go along the same noise.

Given the clean image x, let w = (z − α x) α/σ². From t to s the ancestral posterior adds to w independent noise of variance
e^{λ_s} − e^{λ_t}: w is a Brownian motion in the signal-to-noise ratio e^λ, whatever the steps. So the standard normal noise
of a step is the increment of that motion over the step's ends, divided by the root of their distance.
"""

import bisect
import math
import struct

import torch
from torch import Tensor

from .losses import seed_of


class BrownianNoise:
    """The noise of each image as one Brownian motion in e^λ, and where its chain starts.

    Args:
        shape: [B, C, H, W].
        seeds: Integers that all its draws begin with; each image has draws of its own.
    """

    def __init__(self, shape: tuple[int, ...], *seeds: int):
        self._shape, self._seeds = shape, seeds
        self.start = self._draw(-1.0)
        self._places, self._values = [0.0], [torch.zeros(shape)]

    def _draw(self, place: float) -> Tensor:
        (bits,) = struct.unpack("<q", struct.pack("<d", place))
        seeds = [seed_of(*self._seeds, image, bits) for image in range(self._shape[0])]
        return torch.stack([torch.randn(self._shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _at(self, place: float) -> Tensor:
        i = bisect.bisect_left(self._places, place)
        if i == len(self._places) or self._places[i] != place:
            before, value = self._places[i - 1], self._values[i - 1]
            variance = place - before
            if i < len(self._places):  # between two that are known: a bridge
                share = variance / (self._places[i] - before)
                value, variance = torch.lerp(value, self._values[i], share), variance * (1 - share)
            self._places.insert(i, place)
            self._values.insert(i, value + math.sqrt(variance) * self._draw(place))
        return self._values[i]

    def of_steps(self, log_snrs: list[float]) -> list[Tensor]:
        """Standard normal noise [B, C, H, W] of each step of a chain; the last one draws none."""
        places = [math.exp(level) for level in log_snrs]
        values = [self._at(place) for place in places]
        steps = range(len(places) - 1)
        return [(values[i + 1] - values[i]) / math.sqrt(places[i + 1] - places[i]) for i in steps] + [values[0]]
