"""A network of diffusers as the heavy network of a training: it says size, classes and noise levels, the preset the rest."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .configuration import Configuration, Networks, is_of_host
from .flops import network_flops
from .hosts import HostNetwork
from .latents import compression_of
from .light import shape_light
from .models import UViTContextEncoder, UViTDenoiser
from .noise_process import NoiseProcess
from .pipeline import DualRatePipeline
from .scheduler import DualRateScheduler

# Log-SNR that a schedule may go beyond what a network was trained at, whose table is rounded.
_TOLERANCE = 0.05
# Below this log-SNR a network that predicts noise tells no image: its error in noise is 1/α as large in the image, 12-fold.
_LEAST_OF_IMAGES = -5.0
# The time that stands for the clean end of a schedule.
_CLEAN_END = 0.001


def host_of(model: DualRatePipeline | None) -> HostNetwork | None:
    """The heavy network of a model, if it is one of diffusers."""
    heavy = None if model is None else model.context_encoder or model.denoiser
    return heavy if isinstance(heavy, HostNetwork) else None


def follow_host(
    configuration: Configuration,
    model: DualRatePipeline | None,
    args: argparse.Namespace,
    tell: Callable[[str], None],
    *,
    as_pair: bool,
) -> Configuration:
    """The configuration of a training whose heavy network is one of diffusers, and goes with it as it is.

    Size, channels and classes are those of the network, and the schedule keeps to the noise levels that it knows.

    Args:
        configuration: What flags and preset say.
        model: The model that the heavy network is taken from; of any other the configuration stays as it is.
        args: The flags, none of which may contradict the network.
        tell: Is told what differs from the preset, in a line each.
        as_pair: Whether there is a light network beside it.

    Raises:
        ValueError: If a flag or an override contradicts the network, or the light network does not fit it.
    """
    host, start = host_of(model), configuration.start
    if model is None or host is None:
        if start.light is not None:
            raise ValueError(f"--light {start.light} needs a heavy network of diffusers: leave it out.")
        if model is None or start.student is None:  # whose networks are its own
            _check_preset(configuration)
        return configuration
    if start.light is not None and (not as_pair or model.context_encoder is not None):
        raise ValueError(f"--light {start.light} shapes the light network of a new pair: leave it out.")
    name = (
        f"the {type(host.network).__name__} of {start.pretrained_model_name_or_path or start.student or start.teacher}"
    )
    if host.config.pooled_projection_dim is not None:
        raise ValueError(
            f"{name[0].upper()}{name[1:]} takes texts with pooled embeddings, which captions here have none of: it can be "
            "sampled, but not trained or learned from."
        )
    sides = tuple(side * compression_of(model.vae) for side in host.image_size)
    if args.resolution is not None and sides != (args.resolution, args.resolution):
        raise ValueError(f"--resolution {args.resolution} contradicts {name}, which is of {sides[0]}x{sides[1]}.")
    is_new = as_pair and model.context_encoder is None
    _check_flags(configuration, host, args, name, as_pair, is_new)
    if host.config.num_classes and not host.config.has_null_class:
        configuration = _without_null_class(configuration, name, tell)
    preset = configuration.networks.scheduler
    is_tuned = not as_pair and start.teacher is None
    scheduler = cut_schedule(preset, host.process, is_tuned=is_tuned)
    before, after = (f"{part['log_snr_min']:g} to {part['log_snr_max']:g}" for part in (preset, scheduler))
    if before != after:
        tell(f"noise levels: log-SNR {after}, those that {name} knows, instead of the preset's {before}")
    networks = {"context_encoder": host.describe(), "denoiser": host.describe()}
    if as_pair:
        host = _as_encoder(configuration, model, host)
        networks = {"context_encoder": host.describe(), "denoiser": _light_of(configuration, host, tell)}
    return dataclasses.replace(configuration, networks=Networks(**networks, scheduler=scheduler))


def _check_preset(configuration: Configuration) -> None:
    """Refuse the shape of a network of diffusers, as a run of it records, where no such network is given."""
    shapes = {"heavy": configuration.networks.context_encoder, "light": configuration.networks.denoiser}
    trained, start = configuration.start.network, configuration.start
    if any(is_of_host(shape) for name, shape in shapes.items() if trained in (None, name)):
        flag = "--pretrained_model_name_or_path" if start.teacher is None else "--teacher"
        raise ValueError(
            f"The network of the preset {configuration.preset} is one of diffusers: give it with {flag}, or another preset."
        )


def _check_flags(
    configuration: Configuration, host: HostNetwork, args: argparse.Namespace, name: str, as_pair: bool, is_new: bool
) -> None:
    """Refuse flags and overrides that say of the heavy network what it says itself."""
    if configuration.start.network == "light":
        raise ValueError(f"--network light is of the preset, and {name} is the network that is trained.")
    no_null_class = host.config.num_classes and not host.config.has_null_class
    if no_null_class and (args.guidance_scale or 1) > 1:
        raise ValueError(
            f"--guidance_scale {args.guidance_scale} needs networks that learned to go without a class, and {name} did not."
        )
    own = ("sample_size", "in_channels", "num_classes", "context_channels", "prediction_hand_over")
    for override in configuration.overrides:
        section, _, value = override.partition("=")[0].partition(".")
        is_own = section == "context_encoder" and not (is_new and value == "prediction_hand_over")
        is_light = section == "denoiser" and (not as_pair or value in own or configuration.start.light is not None)
        if is_own or is_light or (no_null_class and value == "label_dropout"):
            raise ValueError(f"The override {override!r} has no effect beside {name}, which says that itself.")


def _without_null_class(configuration: Configuration, name: str, tell: Callable[[str], None]) -> Configuration:
    """The configuration of networks that have no class which stands for none: nothing drops a label, nothing guides."""
    recipe = configuration.recipe
    none = {"label_dropout": 0.0, "guidance_scale": 1.0}
    changed = {key: value for key, value in none.items() if getattr(recipe, key, value) != value}
    sampling = dataclasses.replace(configuration.sampling, guidance_scale=1.0)
    if changed or sampling != configuration.sampling:
        tell(f"no label dropout and no guidance: {name} knows no class that stands for none")
    return dataclasses.replace(configuration, sampling=sampling).with_recipe(**changed)


def _as_encoder(configuration: Configuration, model: DualRatePipeline, host: HostNetwork) -> HostNetwork:
    """The heavy network, without weights, with the taps that suit the light network."""
    if model.context_encoder is not None:
        return host.blueprint()
    shape, taps = configuration.networks.denoiser, host.taps
    if configuration.start.light is None:
        if is_of_host(shape):
            raise ValueError(
                f"The preset {configuration.preset} has no light network: give --light auto, or another preset."
            )
        (height, width), patch_size = host.image_size, shape["patch_size"]
        sides = [patch_size * 2**level for level in range(len(shape["level_channels"]))]
        sizes = [(height // side, width // side) for side in sides]
        theirs = [part[1:] for part in host.context_shapes]
        taps = tuple(tap for tap, size in zip(taps, theirs, strict=True) if size in sizes)
        if len(taps) != len(sizes):
            raise ValueError(
                f"The levels of the preset's denoiser have maps of sizes {sizes}, and the {type(host.network).__name__} has "
                f"{theirs}: give --light auto, or another preset."
            )
    told = configuration.networks.context_encoder["prediction_hand_over"]
    hands_over = getattr(configuration.recipe, "follow_encoder", False) or told
    with torch.device("meta"):
        blueprint = host.blueprint()
        return HostNetwork.from_denoiser(blueprint, taps, hands_over)


def _light_of(configuration: Configuration, encoder: HostNetwork, tell: Callable[[str], None]) -> dict:
    """Arguments of the light network that takes an encoder's context."""
    if configuration.start.light is None:
        config = encoder.config
        return configuration.networks.denoiser | {
            "sample_size": config.sample_size,
            "in_channels": config.in_channels,
            "num_classes": config.num_classes,
            "context_channels": encoder.context_channels,
            "prediction_hand_over": config.prediction_hand_over,
        }
    shape = shape_light(encoder)
    with torch.device("meta"):
        flops = network_flops(UViTDenoiser(**shape)), network_flops(encoder)
    tell(
        f"light network: {flops[0] / 1e6:,.1f} MFLOP per image and evaluation, {flops[0] / flops[1]:.3f} of the heavy one's "
        f"{flops[1] / 1e6:,.1f}, as level_channels {shape['level_channels']} and level_blocks {shape['level_blocks']}"
    )
    return shape


def cut_schedule(scheduler: Mapping[str, Any], process: NoiseProcess, *, is_tuned: bool = False) -> dict[str, Any]:
    """A schedule without the noise levels at which a network of diffusers says nothing of the image.

    It was never trained at them, or it predicts noise, and they are too near to noise alone.

    Args:
        scheduler: Arguments of [`DualRateScheduler`].
        process: How the network was trained.
        is_tuned: Whether the network is only trained further, which leaves it all levels that it was trained at.
    """
    if process.log_snrs is None:  # a flow knows all of them
        return dict(scheduler)
    known, whole = process.log_snrs[[-1, 0]].tolist(), DualRateScheduler(**scheduler)
    if process.config.prediction_type == "epsilon" and not is_tuned:
        known[0] = max(known[0], _LEAST_OF_IMAGES)
    # Time 0 itself is never evaluated. The end is judged near it, at the same time however finely timesteps count.
    ends = [float(whole.log_snr_at(time)) for time in (1.0, _CLEAN_END)]
    cut = dict(scheduler)
    if ends[0] < known[0] - _TOLERANCE:
        cut["log_snr_min"] = round(cut["log_snr_min"] + known[0] - ends[0], 3)
    if ends[1] > known[1] + _TOLERANCE:
        cut["log_snr_max"] = round(cut["log_snr_max"] + known[1] - float(whole.log_snr_at(0.0)), 3)
    return cut


def make_encoder(denoiser: UViTDenoiser | HostNetwork, shape: dict[str, Any]) -> UViTContextEncoder | HostNetwork:
    """An encoder with a copy of all that a single-rate network has learned, handing over what `shape` says."""
    hands_over = shape["prediction_hand_over"]
    if isinstance(denoiser, HostNetwork):
        return HostNetwork.from_denoiser(denoiser, shape["taps"], hands_over)
    return UViTContextEncoder.from_denoiser(denoiser, shape["context_channels"], hands_over)


def learning_parameters(encoder: UViTContextEncoder | HostNetwork, *, is_frozen: bool) -> set[str]:
    """Names of the weights of an encoder that a training changes.

    Args:
        encoder: The heavy network. Of one of diffusers, what is handed over does not depend on what follows the last tap.
        is_frozen: Whether only those learn that make what is handed over of what is known.
    """
    if isinstance(encoder, UViTContextEncoder):
        names = {name for name, _ in encoder.named_parameters()}
        return {name for name in names if name.startswith(encoder.OWN_PARTS)} if is_frozen else names
    if is_frozen:
        return set()
    maps = encoder.maps_of_blueprint(blueprint := encoder.blueprint())
    total = torch.stack([part.sum() for part in maps]).sum()
    known, weights = zip(*blueprint.named_parameters(), strict=True)
    found = torch.autograd.grad(total, weights, allow_unused=True)
    return {name for name, gradient in zip(known, found, strict=True) if gradient is not None}
