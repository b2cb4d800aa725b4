"""Which steps refresh the context: N steps, K refreshes, planned once for a whole chain from noise to image.

A plan may begin late. Before its first refresh the light network works alone, without context.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .ranges import check_integer

MOST_STEPS = 2**23
"""Most steps of a chain. Single precision, with a relative spacing of 2^-23, still tells the times of so many apart."""
_MOST_DRAWN = 32
# Largest rounding error of a log-SNR in a table of single precision. A step changes log-SNR by far more.
_ROUNDED = 1e-3


@dataclass(frozen=True)
class RefreshPlan:
    """The steps of a chain and whether each one refreshes the context. Printed, it is their diagram.

    Args:
        refreshes: Whether each step refreshes. All are false for a single-rate model.
        encoder_denoises: Whether refreshes take the encoder's own prediction. It changes what is printed, not the plan.
    """

    refreshes: tuple[bool, ...]
    encoder_denoises: bool = field(default=False, compare=False)

    @property
    def num_inference_steps(self) -> int:
        """Number N of steps."""
        return len(self.refreshes)

    @property
    def num_context_steps(self) -> int:
        """Number K of refreshes."""
        return sum(self.refreshes)

    @property
    def num_steps_alone(self) -> int:
        """Number of steps before the first refresh, which the light network takes without context."""
        return self.refreshes.index(True) if any(self.refreshes) else len(self.refreshes)

    def __len__(self) -> int:
        return len(self.refreshes)

    def __iter__(self) -> Iterator[bool]:
        return iter(self.refreshes)

    def __getitem__(self, step):
        return self.refreshes[step]

    def until_next(self, step: int) -> range:
        """The steps from `step` to the one before the next refresh: those that a context made at `step` serves."""
        end = step + 1
        while end < len(self) and not self[end]:
            end += 1
        return range(step, end)

    def evaluations(self, encoder_denoises: bool = False) -> tuple[int, int]:
        """How often the heavy and the light network run for one image. Guidance doubles both.

        Args:
            encoder_denoises: Whether refreshes take the encoder's own prediction, so that the light network rests there.
        """
        n, k = self.num_inference_steps, self.num_context_steps
        return k, n - k if encoder_denoises else n

    def __str__(self) -> str:
        n, k, alone = self.num_inference_steps, self.num_context_steps, self.num_steps_alone
        if n > _MOST_DRAWN:
            late = f"; {alone} steps without context" if 0 < alone < n else ""
            return f"N = {n}, K = {k}, refreshes at {', '.join(str(i) for i in range(n) if self[i])}{late}"
        encoder = "".join("E ───" if now else "─────" if any(self[: i + 1]) else "     " for i, now in enumerate(self))
        # The line of a context ends before the next one begins.
        encoder = "".join(" " if i + 1 == 5 * n or (encoder + " ")[i + 1] == "E" else encoder[i] for i in range(5 * n))
        arrows = "".join("│    " if now else "     " for now in self)
        steps = "".join(f"{i:<5}" for i in range(n))
        spared = [now and self.encoder_denoises for now in self]
        taken = "".join("E →  " if rests else "g →  " for rests in spared)
        light = f"light, N{' − K' if any(spared) else ''} times: v(z_t, t, τ, context)"
        rows = [
            ("step", steps, f"N = {n}, K = {k}"),
            ("encoder", encoder, "heavy, K times: context of z_τ"),
            ("", arrows, ""),
            ("", "     " * alone + "▼    " * (n - alone), f"{alone} steps without context" if alone else ""),
            ("denoiser  z₁ →", taken.rstrip() + " x", light),
        ]
        rows = rows if k else [rows[0], rows[-1]]
        return "\n".join(f"{name:15}{row:{5 * n + 4}}{words}".rstrip() for name, row, words in rows)


def plan_refreshes(
    num_inference_steps: int,
    num_context_steps: int | None = None,
    refresh_steps: Sequence[int] | None = None,
    *,
    num_steps_alone: int = 0,
) -> RefreshPlan:
    """Plan N steps: K refreshes spread evenly, or the steps that are named, or every step where neither is given.

    With M steps before the first refresh, the K refreshes are the steps M + floor(j (N − M) / K), j < K.

    Args:
        num_inference_steps: Number N of steps.
        num_context_steps: Number K of refreshes, from 1 to N − M.
        refresh_steps: Instead of K and M, the steps that refresh: rising, below N.
        num_steps_alone: M, from 0 to N − 1.

    Raises:
        ValueError: If there is no such plan.
    """
    n = check_integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
    if num_context_steps is not None and refresh_steps is not None:
        raise ValueError("Give either num_context_steps or refresh_steps.")
    if refresh_steps is not None:
        steps = _check_steps(n, refresh_steps)
        return RefreshPlan(tuple(step in steps for step in range(n)))
    alone = check_integer("num_steps_alone", num_steps_alone, 0, n - 1)
    left = n - alone
    k = left if num_context_steps is None else check_integer("num_context_steps", num_context_steps)
    if not 1 <= k <= left:
        limit = (
            f"{left}, as {alone} of {n} steps come before the first context" if alone else f"num_inference_steps={n}"
        )
        raise ValueError(f"num_context_steps must be between 1 and {limit}, got {k}.")
    steps = {alone + j * left // k for j in range(k)}
    return RefreshPlan(tuple(step in steps for step in range(n)))


def plan_segments(num_inference_steps: int, num_context_steps: int, context_from: float = 1.0) -> RefreshPlan:
    """The plan of a student. Its segments are equally long: K must divide the steps at or below `context_from`.

    Args:
        num_inference_steps: Number N of steps, at the times t_n = 1 − n/N.
        num_context_steps: Number K of refreshes.
        context_from: Time of the first context; the steps above it go without.

    Raises:
        ValueError: If K does not divide them.
    """
    n, k = num_inference_steps, num_context_steps
    alone = count_even_steps_above(n, context_from)
    left = n - alone
    if not 1 <= k <= left or left % k:
        late = f"the {left} steps at or below context_from={context_from} of " if alone else ""
        raise ValueError(f"num_context_steps must divide {late}num_inference_steps={n}, got {k}.")
    return plan_refreshes(n, k, num_steps_alone=alone)


def count_even_steps_above(num_inference_steps: int, context_from: float) -> int:
    """Number of the steps at the times t_n = 1 − n/N that lie above the time of the first context."""
    n = num_inference_steps
    return sum(1 - step / n > context_from + 1e-9 for step in range(n))


def is_above(log_snr: float, level: float) -> bool:
    """Whether an image is noisier than another by more than rounding."""
    return log_snr < level - _ROUNDED


def count_steps_above(log_snrs: Iterable[float], context_from: float, level: float) -> int:
    """Number of steps that are noisier than the first context, and so go without.

    Args:
        log_snrs: Log-SNR of each step.
        context_from: Time of the first context, a share of the chain in (0, 1].
        level: The log-SNR at that time.

    Raises:
        ValueError: If no step is left for a context.
    """
    steps = [float(log_snr) for log_snr in log_snrs]
    alone = sum(is_above(log_snr, level) for log_snr in steps)
    if alone == len(steps):
        raise ValueError(
            f"context_from={context_from} leaves none of {alone} steps for a context: give a larger num_inference_steps."
        )
    return alone


def _check_steps(num_inference_steps: int, refresh_steps: Sequence[int]) -> set[int]:
    given = refresh_steps.tolist() if hasattr(refresh_steps, "tolist") else refresh_steps
    if not isinstance(given, Sequence) or isinstance(given, str):  # a set has no order
        raise ValueError(f"refresh_steps must be a list of steps, got {refresh_steps!r}.")
    steps = list(given)
    for step in steps:
        check_integer(f"each of refresh_steps {steps}", step)
    if not steps or steps[0] < 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"refresh_steps must name at least one step and rise from 0 or later, got {steps}.")
    if steps[-1] >= num_inference_steps:
        raise ValueError(f"refresh_steps must lie below num_inference_steps={num_inference_steps}, got {steps}.")
    return set(steps)
