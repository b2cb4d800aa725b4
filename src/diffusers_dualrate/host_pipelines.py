"""Pipelines of diffusers taken apart: each is a single-rate model that draws the same images."""

import os
import warnings
from typing import Any

import diffusers
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from .hosts import HostNetwork
from .network import align_weights, check_loaded
from .noise_process import NoiseProcess
from .origins import place_of
from .scheduler import DualRateScheduler

# Of a pipeline of diffusers: the component that is its network, its own defaults, and the length of its texts where it differs
# from that of its network's class.
TEXT_LENGTHS = {"PixArtSigmaPipeline": 300}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPMPipeline": ("unet", {"num_inference_steps": 1000}),
    "DDIMPipeline": ("unet", {"num_inference_steps": 50}),
    "DiTPipeline": ("transformer", {"num_inference_steps": 50, "guidance_scale": 4.0}),
    "StableDiffusionPipeline": ("unet", {"num_inference_steps": 50, "guidance_scale": 7.5}),
    "PixArtAlphaPipeline": ("transformer", {"num_inference_steps": 20, "guidance_scale": 4.5}),
    "PixArtSigmaPipeline": ("transformer", {"num_inference_steps": 20, "guidance_scale": 4.5}),
}


class OfHostError(Exception):
    """What is to be loaded is one of `PIPELINES`."""


def check_own(json_file: str | os.PathLike, index: dict) -> dict:
    """Tell a model_index.json of diffusers' own pipelines from one of ours.

    Args:
        json_file: Where it was read from.
        index: What it holds.

    Returns:
        `index`, of ours.

    Raises:
        OfHostError: If it is of one of `PIPELINES`.
        ValueError: If it is of another pipeline of diffusers.
    """
    name = index["_class_name"]
    if isinstance(name, str) and name in PIPELINES:
        raise OfHostError
    if isinstance(name, str) and "denoiser" not in index and hasattr(diffusers, name):
        raise ValueError(
            f"{json_file} is of a {name}; of diffusers' own pipelines these can be loaded: {', '.join(PIPELINES)}."
        )
    return index


def _scheduler_to_sample(name: object, pipeline: DiffusionPipeline, process: NoiseProcess) -> SchedulerMixin:
    """The scheduler of a pipeline of diffusers, or what takes its place here, with a word on it."""
    scheduler = pipeline.scheduler
    if process.log_snrs is None:
        warnings.warn(
            f"{name} was trained as a flow, and is sampled by DualRateScheduler, since {type(scheduler).__name__} leaves the "
            "variance-preserving process: give another by scheduler=.",
            stacklevel=4,
        )
        return DualRateScheduler(clip_sample="vae" not in pipeline.components)
    if isinstance(scheduler, PNDMScheduler):
        warnings.warn(
            f"{name} is sampled by DPMSolverMultistepScheduler: its PNDMScheduler extrapolates predicted noise, and networks "
            "predict velocity here. Give another by scheduler=.",
            stacklevel=4,
        )
        return DPMSolverMultistepScheduler.from_config(scheduler.config)
    if scheduler.config.get("clip_sample") and "vae" in pipeline.components:
        warnings.warn(
            f"clip_sample=True of {name} would clip latents, which have no bounds: it is left out.", stacklevel=4
        )
        return type(scheduler).from_config(scheduler.config, clip_sample=False)
    return scheduler


def _predicting_velocity(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The same scheduler for a network that predicts velocity and no variance."""
    options: dict[str, Any] = {"prediction_type": "v_prediction"}
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        options["variance_type"] = "fixed_small" if isinstance(scheduler, DDPMScheduler) else None
    return type(scheduler).from_config(scheduler.config, **options)


def open_host_pipeline(pretrained_model_name_or_path, **kwargs) -> dict[str, Any]:
    """Take one of the `PIPELINES` apart.

    Args:
        pretrained_model_name_or_path: Its folder, or its name on the Hub.
        kwargs: Of `DiffusionPipeline.from_pretrained`. A `scheduler` samples, and says nothing of how the network was trained.

    Returns:
        The arguments of a [`DualRatePipeline`] that samples the same: its network and, for one that predicts velocity, its
        scheduler, with what else it has of autoencoder, names of classes and defaults.
    """
    for name in ("denoiser", "context_encoder"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a pipeline of diffusers, loaded as it is: give no {name}."
            )
    given = kwargs.pop("scheduler", None)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True}
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        variant = f" of the variant {kwargs['variant']}" if kwargs.get("variant") else ""
        raise OSError(
            f"{pretrained_model_name_or_path} has no safetensors weights{variant}: load it by diffusers, and save it anew by "
            "save_pretrained."
        ) from error
    component, defaults = PIPELINES[type(pipeline).__name__]
    network = getattr(pipeline, component)
    if "device_map" not in kwargs:  # else weights may wait elsewhere
        missing = [name for name, weight in network.named_parameters() if weight.device.type == "meta"]
        check_loaded(f"{component} of {pretrained_model_name_or_path}", network, missing)
        align_weights(network)
    process = NoiseProcess.of(pipeline.scheduler)
    scheduler = given
    if given is None:
        scheduler = _scheduler_to_sample(pretrained_model_name_or_path, pipeline, process)
    parts: dict[str, Any] = {
        "denoiser": HostNetwork(network, process, text_length=TEXT_LENGTHS.get(type(pipeline).__name__)),
        "scheduler": _predicting_velocity(scheduler),
        **{name: pipeline.components.get(name) for name in ("vae", "text_encoder", "tokenizer")},
        "id2label": DiffusionPipeline.load_config(pretrained_model_name_or_path, **place_of(kwargs)).get("id2label"),
    }
    steps = min(defaults["num_inference_steps"], process.config.num_train_timesteps)
    return {**parts, **defaults, "num_inference_steps": steps}
