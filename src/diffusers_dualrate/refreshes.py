"""Which steps refresh the context: N steps, K refreshes, planned once for a whole run.

A plan may begin late: before its first refresh the light network works alone, in the branch without context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .ranges import check_integer

MOST_STEPS = 2**23
"""Steps that single precision still tells apart, whose relative spacing is 2^-23."""
_MOST_DRAWN = 32


@dataclass(frozen=True)
class RefreshPlan:
    """The steps of a run and whether each one refreshes the context. Printed, it is the diagram of the run.

    Args:
        refreshes: One entry for each step. A single-rate model has none that is true.
    """

    refreshes: tuple[bool, ...]

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
        """How often the heavy and the light network run for one image without guidance, which doubles both.

        Args:
            encoder_denoises: Whether the light network rests at refreshes, where the encoder's prediction serves.
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
        rows = [
            ("step", steps, f"N = {n}, K = {k}"),
            ("encoder", encoder, "heavy, K times: context of z_τ"),
            ("", arrows, ""),
            ("", "     " * alone + "▼    " * (n - alone), f"{alone} steps without context" if alone else ""),
            ("denoiser  z₁ →", ("g →  " * n).rstrip() + " x", "light, N times: v(z_t, t, τ, context)"),
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
    """Plan a run of N steps: K refreshes spread evenly, or the named ones, or every step where neither is given.

    With M steps before the first one, K refreshes lie at the steps M + floor(j (N − M) / K), j < K.

    Args:
        num_inference_steps: Number N of steps.
        num_context_steps: Number K of refreshes, from 1 to N − M.
        refresh_steps: Instead of K, the steps that refresh: rising, below N. M does not move them.
        num_steps_alone: M, from 0 to N − 1.

    Raises:
        ValueError: If no run has such a plan.
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
        limit = f"the {left} of num_inference_steps={n} that may refresh" if alone else f"num_inference_steps={n}"
        raise ValueError(f"num_context_steps must be between 1 and {limit}, got {k}.")
    steps = {alone + j * left // k for j in range(k)}
    return RefreshPlan(tuple(step in steps for step in range(n)))


def _check_steps(num_inference_steps: int, refresh_steps: Sequence[int]) -> set[int]:
    if not hasattr(refresh_steps, "__iter__") or isinstance(refresh_steps, str):
        raise ValueError(f"refresh_steps must be a list of steps, got {refresh_steps!r}.")
    steps = list(refresh_steps)
    for step in steps:
        check_integer(f"each of refresh_steps {steps}", step)
    if not steps or steps[0] < 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"refresh_steps must name at least one step and rise from 0 or later, got {steps}.")
    if steps[-1] >= num_inference_steps:
        raise ValueError(f"refresh_steps must lie below num_inference_steps={num_inference_steps}, got {steps}.")
    return set(steps)
