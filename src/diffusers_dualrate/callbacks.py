"""What a call shows of itself while it runs, and what a callback may change in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

from .chain import Chain
from .guidance import Guidance
from .inputs import check_returned
from .sampling import SamplingState


@dataclass(eq=False)  # two calls that happen to be alike are still two
class Call:
    """What a call shows of itself, and what a callback or a stop button changes in it."""

    guidance: Guidance = field(default_factory=Guidance)
    num_timesteps: int | None = None
    timestep: Tensor | None = None
    interrupt: bool = False


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
    tensors = {"latents": state.z, "class_labels": chain.class_labels, "context": context}
    returned = callback(pipeline, i, timestep, {name: tensors[name] for name in tensor_inputs})
    if not (returned is None or isinstance(returned, dict)):
        raise ValueError(f"callback_on_step_end must return a dict or None, got {type(returned).__name__}.")
    returned = returned or {}
    check_returned(returned, tensors)
    state.z = returned.pop("latents", state.z)
    chain.class_labels = returned.pop("class_labels", chain.class_labels)
    maps = returned.pop("context", context)
    if maps is not context:
        if state.context is None:
            raise ValueError("callback_on_step_end returned a context, but there is none to replace.")
        state.context = state.context._replace(maps=maps)
