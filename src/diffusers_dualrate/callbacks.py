"""What a call shows of itself while it runs, and what a callback may change in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

from .chain import Chain
from .conditions import Text
from .guidance import Guidance
from .inputs import check_returned
from .sampling import SamplingState

# What a callback may see and change of the conditions.
CONDITIONS = ("class_labels", "prompt_embeds", "negative_prompt_embeds")


@dataclass(eq=False)  # two calls that happen to be alike are still two
class Call:
    """What a call shows of itself, and what a callback or a stop button changes in it."""

    guidance: Guidance = field(default_factory=Guidance)
    num_timesteps: int | None = None
    timestep: Tensor | None = None
    interrupt: bool = False


class CallStateMixin:
    """What a pipeline shows of its newest call, and what callbacks set in it."""

    _call: Call
    _running: list[Call]

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the newest call."""
        return self._call.guidance.scale

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps of the newest call."""
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the running step, for caches that ask for it; `None` between calls."""
        return self._call.timestep

    @property
    def interrupt(self) -> bool:
        """Whether the newest call skips its remaining steps; callbacks set `_interrupt`."""
        return self._call.interrupt

    # The host's names for what callbacks set. On the pipeline that a callback gets they belong to its own call; on the
    # user's pipeline `_interrupt = True` stops every call of it that is running.

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance.scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._call.guidance.scale = scale

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._call.interrupt = bool(interrupt)
        if interrupt:
            for call in tuple(self._running):
                call.interrupt = True


def call_back(
    callback: Callable,
    pipeline: DiffusionPipeline,
    i: int,
    timestep: Tensor,
    chain: Chain,
    state: SamplingState,
    tensor_inputs: Sequence[str],
) -> None:
    """Hand the tensors asked for to a callback, and take over those that it returns."""
    context = None if state.context is None else state.context.maps
    tensors = {"latents": state.z, "context": context} | _tensors_of(chain)
    returned = callback(pipeline, i, timestep, {name: tensors[name] for name in tensor_inputs})
    if not (returned is None or isinstance(returned, dict)):
        raise ValueError(f"callback_on_step_end must return a dict or None, got {type(returned).__name__}.")
    returned = returned or {}
    check_returned(returned, tensors)
    state.z = returned.pop("latents", state.z)
    if returned.keys() & CONDITIONS or set(tensor_inputs) & set(CONDITIONS):  # it may have changed one in place
        labels, prompt, negative = (returned.pop(name, tensors[name]) for name in CONDITIONS)
        condition, null = chain.condition, chain.null
        chain.change_condition(
            condition._replace(tokens=prompt) if isinstance(condition, Text) else labels,
            null._replace(tokens=negative) if isinstance(null, Text) else null,
        )
    maps = returned.pop("context", context)
    if maps is not context:
        assert state.context is not None
        state.context = state.context._replace(maps=maps)


def _tensors_of(chain: Chain) -> dict[str, Tensor | None]:
    condition, null = chain.condition, chain.null
    values = (
        condition if isinstance(condition, Tensor) else None,
        condition.tokens if isinstance(condition, Text) else None,
        null.tokens if isinstance(null, Text) else None,
    )
    return dict(zip(CONDITIONS, values, strict=True))
