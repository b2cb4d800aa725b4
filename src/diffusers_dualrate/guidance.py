"""Classifier-free guidance (arXiv 2207.12598): how strong it is, and at which noise levels it acts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass
class Guidance:
    """Classifier-free guidance v_null + scale (v_given − v_null), at all noise levels or some.

    Args:
        scale: 1 for none.
        interval: Lowest and highest log-SNR at which it acts (arXiv 2404.07724).
    """

    scale: float = 1.0
    interval: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def of(cls, scale: float, interval: Sequence[float] | None) -> Self:
        """Guidance at the log-SNRs of an interval; `None` for all."""
        return cls(scale) if interval is None else cls(scale, (interval[0], interval[1]))

    def acts_at(self, log_snr: float) -> bool:
        """Whether a step at this log-SNR is guided."""
        low, high = self.interval
        return self.scale > 1 and low <= log_snr <= high

    def combine(self, v: Tensor) -> Tensor:
        """Velocities [B, C, H, W] from those of both branches [2 B, C, H, W]."""
        v_null, v_given = v.chunk(2)
        return guide(v_null, v_given, self.scale)


def guide(v_null: Tensor, v_given: Tensor, scale: float) -> Tensor:
    """Guided velocity [B, C, H, W] from those without and with the condition; 1 is the one with it."""
    return v_null + scale * (v_given - v_null)
