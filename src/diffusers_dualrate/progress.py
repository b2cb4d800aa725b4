"""The progress bar of a run, and what the numbers in it mean. Where it cannot be written, the run goes on without it."""

import contextlib
from collections.abc import Mapping

from tqdm.auto import tqdm

_MEANINGS = {
    "loss": "what is minimised, lower is better; in train_* it is v_loss weighed by the noise level",
    "v_loss": "mean squared error of the prediction, all noise levels alike; lower is better",
    "auxiliary": "loss of the auxiliary network, which learns to denoise the student's samples",
    "student": "loss of the student; only its gradient has a meaning, so it need not fall",
    "distance": "how far the student's samples are from the teacher's, in the mean of denoised images; lower is better",
    "variance_share": "variance of the student's samples as a share of the teacher's; near 0 the student has collapsed",
}
"""What the numbers mean that the examples note, said when each first appears."""


class Progress:
    """A bar of steps with the run's numbers; each number is explained where it first appears.

    Args:
        step: Steps done before.
        num_steps: Steps in all.
        is_shown: Whether this process shows one.
    """

    def __init__(self, step: int, num_steps: int, is_shown: bool):
        self._bar = tqdm(initial=step, total=num_steps, disable=not is_shown, unit="step")
        self._explained, self._is_shown = set[str](), is_shown

    def advance(self) -> None:
        """Count a step."""
        with contextlib.suppress(OSError):
            self._bar.update()

    def show(self, numbers: Mapping[str, float], images_per_second: float | None = None) -> None:
        """Put numbers beside the bar."""
        new = [name for name in numbers if name in _MEANINGS.keys() - self._explained]
        self._explained.update(new)
        shown = {name: f"{value:.4f}" for name, value in numbers.items()}
        shown |= {} if images_per_second is None else {"images/s": f"{images_per_second:.0f}"}
        with contextlib.suppress(OSError):
            if new and self._is_shown:
                self._bar.write("\n".join(f"{name}: {_MEANINGS[name]}" for name in new))
            self._bar.set_postfix(shown)

    def close(self) -> None:
        """Leave the bar as it is."""
        with contextlib.suppress(OSError):
            self._bar.close()
