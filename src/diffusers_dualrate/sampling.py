"""Sampling at two rates (arXiv 2605.18190): the whole method, without any duty towards diffusers.

Two networks share the work of going from noise to an image in N steps. The heavy encoder E runs at K of them, the
refreshes. It hands out features, the context. The light denoiser g runs at every step and reads the newest context:

    v = g(z_t, t, τ, E(z_τ, τ))

Here z_t is the noisy image at time t, and τ ≥ t is the time of the last refresh. The denoiser was trained on contexts of
earlier times, so it is told τ.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .refreshes import RefreshPlan


@dataclass
class SamplingState:
    """What one step hands to the next. A caller of the loop may replace either between two steps.

    Args:
        z: Noisy image, less noisy at every step [B, C, H, W].
        context: What the heavy network made at the last refresh; `None` before the first.
    """

    z: Tensor
    context: Any = None


def sample_at_two_rates(
    noise: Tensor,
    plan: RefreshPlan,
    encode: Callable[[int, Tensor], tuple[Any, Tensor | None]],
    denoise: Callable[[int, Tensor, Any], Tensor],
    step: Callable[[int, Tensor, Tensor], Tensor],
    serves: Callable[[int, Tensor, Any], bool] = lambda i, z, context: True,
) -> Iterator[SamplingState]:
    """Go from noise to an image in N steps, of which K refresh the context.

    Args:
        noise: Image to start from [B, C, H, W].
        plan: Which steps refresh. Before the first one that does, the light network runs without context.
        encode: Slow rate: (i, z) to a context, and the velocity if the heavy network predicts it too, else `None`.
        denoise: Fast rate: (i, z, context) to the velocity.
        step: (i, v, z) to the less noisy image.
        serves: Whether a context (i, z, context) still serves this step; where it does not, the step refreshes it.

    Yields:
        The state after each step, the same object every time.
    """
    state = SamplingState(noise)
    for i, refreshes in enumerate(plan):
        v = None
        if refreshes or not serves(i, state.z, state.context):
            state.context, v = encode(i, state.z)  # the heavy network, at refreshes
        if v is None:
            v = denoise(i, state.z, state.context)  # the light network
        state.z = step(i, v, state.z)
        yield state
