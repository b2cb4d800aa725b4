"""What a pipeline and its calls are given, checked as a whole before anything is computed."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .defaults import SamplingDefaults, check_interval
from .guidance import Guidance
from .hosts import HostNetwork
from .models import UViTContextEncoder, UViTDenoiser
from .noise_process import NOISE_ALONE
from .prompts import CheckedConditioning, Conditioning
from .ranges import LONGEST_SIDE, check_choice, check_integer, check_number
from .steps import ChainSteps
from .text_encoding import TextEncoding, width_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Beyond this factor of the trained size the networks have seen nothing like the image.
_FAR = 2
_MOST_VALUES = 2**31 - 1  # of the images of a call: a tensor's 32-bit index counts no more


@dataclass(frozen=True)
class Inputs:
    """What one call is asked for.

    Args:
        asked: What they are to show.
        times: Number of images for each class or prompt.
        shape: Shape of the images (B, C, height, width).
        guidance: Scale and interval of guidance.
        latents: Noise to start from; `None` to draw it.
    """

    asked: CheckedConditioning
    times: int
    shape: tuple[int, int, int, int]
    guidance: Guidance
    latents: Tensor | None


def check_inputs(
    denoiser: UViTDenoiser,
    id2label: Mapping[int, str],
    encoding: TextEncoding | None,
    *,
    conditioning: Conditioning,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
    batch_size: int | None,
    num_images_per_prompt: int,
    height: int | None,
    width: int | None,
    pixels_per_side: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> Inputs:
    """Check the arguments of a call that say what is drawn; they are documented there."""
    asked = conditioning.check(denoiser.config, id2label, encoding)
    names = "prompts" if denoiser.config.cross_attention_dim is not None else "class_labels"
    if len(asked) and batch_size not in (None, len(asked)):
        raise ValueError(f"batch_size is {batch_size!r}, but there are {len(asked)} {names}.")
    each = check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    if len(asked):
        batch_size = len(asked)
    batch_size = each * (1 if batch_size is None else check_integer("batch_size", batch_size, 1))
    shape = (batch_size, denoiser.config.in_channels, *_check_size(denoiser, height, width, pixels_per_side))
    most = _MOST_VALUES // math.prod(shape[1:])
    if batch_size > most:
        raise ValueError(
            f"A call draws at most {most} images of {shape[2]}x{shape[3]}, got {batch_size} from batch_size or "
            f"{names} and num_images_per_prompt={each}."
        )
    _check_generator(generator, batch_size)
    _check_latents(latents, shape)
    guidance = _check_guidance(guidance_scale, guidance_interval, asked)
    return Inputs(asked, each, shape, guidance, latents)


def _check_size(denoiser: UViTDenoiser, height: int | None, width: int | None, factor: int) -> tuple[int, int]:
    """Height and width of what the networks draw: pixels, or latents that stand for `factor` pixels on a side."""
    trained, stride = tuple(side * factor for side in denoiser.image_size), denoiser.stride * factor
    height = trained[0] if height is None else check_integer("height", height, 1, LONGEST_SIDE)
    width = trained[1] if width is None else check_integer("width", width, 1, LONGEST_SIDE)
    if denoiser.config.get("is_square") and height != width:
        raise ValueError(
            f"A {type(denoiser.network).__name__} of diffusers draws squares only, got height {height} and width {width}."
        )
    if height % stride or width % stride:
        raise ValueError(f"height and width must be divisible by {stride}, got {height} and {width}.")
    ratios = [side / other for side, other in zip((height, width), trained, strict=True)]
    if max(ratios) > _FAR or min(ratios) < 1 / _FAR:
        warnings.warn(
            f"height and width are {height} and {width}, but the model was trained at {trained[0]} and {trained[1]}: "
            "images this far from it are hardly like those it learned from.",
            stacklevel=6,
        )
    return height // factor, width // factor


def _check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    if not (generator is None or isinstance(generator, (torch.Generator, list))):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}.")
    if isinstance(generator, list):
        if len(generator) != batch_size:
            raise ValueError(f"generator needs one entry for each of {batch_size} images, got {len(generator)}.")
        for each in generator:
            if not isinstance(each, torch.Generator):
                raise ValueError(f"generator must be a torch.Generator or a list of them, got {each!r} in the list.")


def _check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    if not (isinstance(latents, Tensor) and latents.is_floating_point()):
        what = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor of floating-point numbers of shape {shape}, got {what}.")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
    if not latents.isfinite().all():
        raise ValueError("latents must be finite, got NaN or infinity among them.")


def _check_guidance(scale: float, interval: tuple[float, float] | None, asked: CheckedConditioning) -> Guidance:
    scale = check_number("guidance_scale", scale, least=1)
    if scale > 1 and not asked.has_null:
        needed = (
            "negative_prompt_embeds, where no text_encoder embeds an empty prompt" if len(asked) else "class_labels"
        )
        raise ValueError(f"guidance_scale={scale} needs {needed}.")
    check_interval(interval)
    return Guidance.of(scale, interval)


def check_delivery(
    output_type: str, callback: Callable | None, tensor_inputs: Sequence[str] | None, known: Sequence[str]
) -> Sequence[str]:
    """Check the arguments of a call that say how it hands out what it draws; returns what the callback is given."""
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback_on_step_end must be a function, got {callback!r}.")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    names = tensor_inputs or ()
    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not (listed and set(names) <= set(known)):
        raise ValueError(f"Callbacks may ask for a list of {list(known)}, got {tensor_inputs!r}.")
    return names


def check_returned(returned: Mapping, given: Mapping[str, Tensor | Sequence[Tensor] | None]) -> None:
    """Check the tensors that a callback returned, with which a call goes on.

    Args:
        returned: What it returned.
        given: What stood there before.
    """
    for name in given.keys() & returned.keys():
        value, before = returned[name], given[name]
        if before is None and value is not None:
            raise ValueError(f"callback_on_step_end returned {name}, but there is none to replace.")
        if isinstance(before, Tensor):
            if not (isinstance(value, Tensor) and value.shape == before.shape):
                got = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"callback_on_step_end must return {name} as a tensor of shape {tuple(before.shape)}, got {got}."
                )
        elif before is not None:
            listed = isinstance(value, Sequence) and all(isinstance(part, Tensor) for part in value)
            if not listed or len(value) != len(before):
                raise ValueError(
                    f"callback_on_step_end must return {name} as {len(before)} tensors, got {type(value).__name__}."
                )


def warn_of_lone_denoiser(denoiser: Any, context_encoder: Any) -> None:
    """Warn if the denoiser of a pair is to sample without its encoder."""
    if context_encoder is None and denoiser.config.context_channels is not None:
        warnings.warn(
            "The denoiser is one of a pair and there is no context_encoder: it samples without context.", stacklevel=3
        )


def check_components(
    denoiser: UViTDenoiser,
    scheduler: SchedulerMixin,
    context_encoder: UViTContextEncoder | None,
    encoding: TextEncoding | None = None,
) -> None:
    """Check that a pipeline is made of the right parts and that its two networks fit each other."""
    _check_class("denoiser", denoiser, UViTDenoiser, HostNetwork)
    _check_class("scheduler", scheduler, SchedulerMixin)
    taken = denoiser.config.cross_attention_dim
    if encoding is not None and taken != width_of(encoding.text_encoder):
        takes = "no text" if taken is None else f"text of {taken} channels a token"
        raise ValueError(
            f"The text_encoder does not fit: it hands out {width_of(encoding.text_encoder)} channels a token, and the "
            f"networks take {takes}."
        )
    expected = denoiser.config.context_channels
    if context_encoder is None:
        return
    _check_class("context_encoder", context_encoder, UViTContextEncoder, HostNetwork)
    encoder: Any = getattr(context_encoder, "_orig_mod", context_encoder)  # what `torch.compile` wrapped
    shared = ["in_channels", "num_classes", "cross_attention_dim", "prediction_hand_over"]
    if denoiser.config.cross_attention_dim is not None:
        shared += ["text_is_masked", "text_is_lowered"]
    for name in shared if isinstance(encoder, HostNetwork) else [*shared, "patch_size"]:
        theirs, ours = encoder.config[name], denoiser.config[name]
        if theirs != ours:
            raise ValueError(f"The pair does not fit: {name} is {theirs} in the encoder and {ours} in the denoiser.")
    widths = encoder.context_channels
    if expected is None or tuple(expected) != widths:
        raise ValueError(
            f"The pair does not fit: the encoder hands out context of widths {widths}, "
            f"the denoiser takes {expected if expected is None else tuple(expected)}."
        )
    if isinstance(encoder, HostNetwork):
        sides = [denoiser.config.patch_size * 2**level for level in range(len(widths))]
        ours = [tuple(length // side for length in denoiser.image_size) for side in sides]
        theirs = [shape[1:] for shape in encoder.context_shapes]
        if theirs != ours:
            raise ValueError(
                f"The pair does not fit: the encoder's maps are of sizes {theirs}, the denoiser's of {ours}. A pair is trained "
                "further with the preset that its own run recorded, --preset RUN/configuration.json."
            )


def _check_class(name: str, part: object, *classes: type) -> None:
    # `torch.compile` wraps a network.
    if not isinstance(getattr(part, "_orig_mod", part), classes):
        expected = " or a ".join(cls.__name__ for cls in classes)
        raise ValueError(f"{name} must be a {expected}, got {'None' if part is None else type(part).__name__}.")


def check_noise_levels(steps: ChainSteps, *networks: Any) -> None:
    """Refuse a step of noise alone, where one of the networks is ours and never saw it; `None` is no network."""
    if steps.log_snrs.min() > NOISE_ALONE:
        return
    # A network of diffusers knows its own process, in which the step is one of training.
    if any(network is not None and not hasattr(network, "process") for network in networks):
        raise ValueError(
            f"{type(steps.scheduler).__name__} has a step without any signal, whose log-SNR this network does not know: "
            "leave out rescale_betas_zero_snr."
        )


def check_null_class(guidance_scale: float, *networks: Any) -> None:
    """Refuse guidance of networks of which one knows no class that stands for none; `None` is no network."""
    for network in networks:
        if network is not None and guidance_scale > 1 and not network.config.get("has_null_class", True):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs networks that learned to go without a class, and the "
                f"{type(network.network).__name__} of diffusers did not."
            )


def check_context_steps(name: object, pipe: Any, num_context_steps: int | None) -> None:
    """Refuse a number of refreshes of a model that is one network and has none."""
    if pipe.context_encoder is None and num_context_steps is not None:
        raise ValueError(
            f"--num_context_steps {num_context_steps} is for a pair, and {name} is one network: leave it out."
        )


def check_encoder_denoises(
    encoder_denoises: bool, context_encoder: UViTContextEncoder | None, denoiser: UViTDenoiser
) -> None:
    """Check that there is a prediction to take where the encoder is to denoise."""
    if encoder_denoises and (context_encoder is None or not denoiser.config.prediction_hand_over):
        raise ValueError(
            "encoder_denoises=True needs a context_encoder that hands over its prediction; without one, load the model "
            "with encoder_denoises=False."
        )


def describe_unsaid(
    defaults: SamplingDefaults, given: dict, denoiser: UViTDenoiser, context_encoder: UViTContextEncoder | None
) -> str:
    """A warning that names the sampling values which nobody gave, and the defaults that are taken for them."""
    has_condition = denoiser.config.num_classes or denoiser.config.cross_attention_dim
    used = {"num_context_steps": context_encoder is not None, "guidance_scale": has_condition}
    unsaid = ["num_inference_steps", *(name for name, has_use in used.items() if has_use and name not in given)]
    values = ", ".join(f"{name}={getattr(defaults, name)}" for name in unsaid)
    return (
        f"Nothing says how this model is sampled, so it takes {values}. Give them as arguments, or load the whole model by "
        "from_pretrained."
    )


def check_images(images: Tensor, output_type: str) -> None:
    """Warn of images that are not finite. Images that stay on the device are not checked, since a call would wait for it."""
    if output_type in ("pil", "np") and not images.isfinite().all():
        warnings.warn("The images hold NaN or infinity: see weights, guidance_scale and dtype.", stacklevel=4)
