"""A denoising network of diffusers as one of our networks: (z, log-SNR, class) to velocity, and feature maps beside it.

The network keeps its own format: what a `HostNetwork` saves can be loaded by the network's own class. Its config.json also
says how it was trained, where that class does not look. Feature maps are the outputs of submodules that are named, its taps.
"""

import copy
import inspect
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self, cast

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import CacheMixin
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from . import diffusion
from .caches import enable_cache_that_acts
from .conditions import Condition, ProjectedText, Text, blank_text
from .host_kinds import KINDS
from .network import ImageNetworkMixin, align_weights, check_loaded, per_sample, refuse_adapters
from .noise_process import NoiseProcess
from .origins import KEY, Origin, place_of, prepare_folder, write_into_config
from .ranges import check_boolean, check_integer
from .repositories import RepositoryMixin, refuse_pickles

# Two calls of one network at once must not take each other's feature maps.
_TAPPING = threading.Lock()
# Where config.json says what makes a network one of ours; a name that its own class passes over.
_HOST = "_host_network"
# Of its own configuration, what says how a network goes with others.
_DESCRIBED = ("sample_size", "in_channels", "num_classes", "prediction_hand_over", "text_length")
# Of it, what its constructor was told.
_SAID = ("prediction_hand_over", "text_length")
# The variance of x given z that is handed over, in units of σ². The networks themselves predict none.
_SHARE_OF_NOISE = 0.2


@dataclass
class HostNetworkOutput(BaseOutput):
    """Output of [`HostNetwork`].

    Args:
        sample: Predicted velocity v = α ε − σ x, [B, C, H, W].
        context: The feature maps of the taps [B, channels, H, W], in their order; with `prediction_hand_over` then z, x̂
            [B, C, H, W] and its variance [B, 1, H, W] in float32.
    """

    sample: Tensor
    context: tuple[Tensor, ...]


class HostNetwork(ImageNetworkMixin, RepositoryMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A denoising network of diffusers, which predicts velocity at a log-SNR like ours.

    Args:
        network: The network, of one of the classes in `KINDS`. Its own dropping of labels, in training, is turned off.
        process: How it was trained.
        taps: Names of submodules whose outputs are the feature maps, from the highest resolution to the lowest; `None` for
            those that suit its class. Tokens become maps.
        prediction_hand_over: Whether the context ends with z, the network's own prediction x̂ and its variance. The variance
            is assumed to be a fifth of the noise's.
        text_length: Number of tokens of its texts; `None` for that of its class.

    Raises:
        ValueError: If the class is not known, its channels are neither those of an image nor twice as many, or there is
            no such submodule.
    """

    def __init__(
        self,
        network: ModelMixin,
        process: NoiseProcess,
        taps: Sequence[str] | None = None,
        prediction_hand_over: bool = False,
        text_length: int | None = None,
    ):
        super().__init__()
        name = type(network).__name__
        if name not in KINDS:
            raise ValueError(f"A heavy network of diffusers must be one of {', '.join(KINDS)}, got {name}.")
        if not isinstance(process, NoiseProcess):
            raise ValueError(
                f"process must be a NoiseProcess, as of NoiseProcess.of(scheduler), got {type(process).__name__}."
            )
        self._kind, config = KINDS[name], network.config
        out_channels = config.get("out_channels") or config.in_channels
        if out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"{name} must predict an image of its {config.in_channels} channels, with or without variances, but it has "
                f"out_channels={out_channels}."
            )
        if config.get("class_embed_type") is not None:
            raise ValueError(f"{name} with class_embed_type={config.class_embed_type!r} takes no numbers of classes.")
        if config.get("time_embedding_type") not in (None, "positional"):
            raise ValueError(
                f"{name} with time_embedding_type={config.time_embedding_type!r} has no timesteps between two whole ones: only "
                "'positional' can be taken."
            )
        if config.get("sample_size") is None:
            raise ValueError(
                f"{name} has no sample_size in its configuration, the size of its images: write it there."
            )
        for option in self._kind.refused:
            if config.get(option) is not None:
                raise ValueError(f"{name} with {option}={config[option]!r} takes more than a text.")
        for module in network.modules():
            if isinstance(module, LabelEmbedding):  # whoever trains says which labels are dropped
                module.dropout_prob = 0
        self.network, self.process = network, process
        self.origin = Origin.find(config.get("_name_or_path"))
        if isinstance(taps, str):
            raise ValueError(f"taps must be a list of names of submodules, got {taps!r}.")
        self.taps = tuple(self._kind.taps(network) if taps is None else taps)
        self._taken: dict[str, Tensor] | None = None
        modules = dict(network.named_modules())
        for tap in self.taps:
            if tap not in modules:
                raise ValueError(f"{name} has no submodule {tap!r} to tap.")
        self._hooks = [modules[tap].register_forward_hook(partial(self._take, tap)) for tap in self.taps]
        self.register_to_config(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            num_classes=self._kind.num_classes(config),
            has_null_class=self._kind.has_null_class,
            is_square=self._kind.is_square,
            cross_attention_dim=self._kind.text_dim(config),
            text_length=check_integer(
                "text_length", self._kind.text_length if text_length is None else text_length, 1
            ),
            text_is_masked=self._kind.text_is_masked,
            text_is_lowered=self._kind.text_is_lowered,
            pooled_projection_dim=config.get("pooled_projection_dim"),
            context_channels=None,
            prediction_hand_over=check_boolean("prediction_hand_over", prediction_hand_over),
        )

    @property
    def stride(self) -> int:
        """What height and width must be divisible by."""
        return self._kind.stride(self.network.config)

    @cached_property
    def context_shapes(self) -> list[tuple[int, int, int]]:
        """Channels, height and width of each feature map of an image of `image_size`."""
        with torch.no_grad():
            maps = self.maps_of_blueprint(self.blueprint())[: len(self.taps)]
        return [(part.shape[1], part.shape[2], part.shape[3]) for part in maps]

    def maps_of_blueprint(self, blueprint: Self) -> tuple[Tensor, ...]:
        """What `blueprint` hands over, without values."""
        with torch.device("meta"):
            condition: Condition = None if self.config.num_classes is None else torch.zeros(1, dtype=torch.long)
            if self.config.cross_attention_dim is not None:
                condition = blank_text(self.config)
            sample = torch.empty(1, self.config.in_channels, *self.image_size)
            return blueprint(sample, torch.empty(1), condition).context

    @property
    def context_channels(self) -> tuple[int, ...]:
        """Channels of each feature map."""
        return tuple(channels for channels, _, _ in self.context_shapes)

    def blueprint(self) -> Self:
        """The same network without weights, on the meta device, for shapes and FLOPs."""
        with torch.device("meta"):
            network = type(self.network).from_config(self.network.config).eval()
            return type(self)(network, self.process, self.taps, **{key: self.config[key] for key in _SAID})

    def describe(self) -> dict:
        """All of the network but its weights, as JSON holds it: what `from_description` takes."""
        network, process = (
            {key: value for key, value in part.config.items() if not key.startswith("_")}
            for part in (self.network, self.process)
        )
        own = {key: self.config[key] for key in _DESCRIBED}
        parts = {"network": network | {"_class_name": type(self.network).__name__}, "process": process}
        return json.loads(json.dumps(own | parts | {"taps": self.taps}))

    @classmethod
    def from_description(cls, description: dict) -> Self:
        """A network of random weights, as `describe` described it.

        Raises:
            ValueError: If there is no such network.
        """
        name = description["network"].get("_class_name")
        if name not in KINDS:
            raise ValueError(f"A network of diffusers must be one of {', '.join(KINDS)}, got {name}.")
        with torch.device("cpu"):
            process = NoiseProcess.from_config(description["process"])
        network = getattr(diffusers, name).from_config(description["network"])
        return cls(
            network, process, description["taps"], **{key: description[key] for key in _SAID if key in description}
        )

    @classmethod
    def from_denoiser(cls, denoiser: Self, taps: Sequence[str], prediction_hand_over: bool = False) -> Self:
        """Turn a single-rate network into an encoder with a copy of all that it has learned; it is left as it is."""
        copied = copy.deepcopy(denoiser)
        for hook in copied._hooks:
            hook.remove()
        encoder = cls(copied.network, copied.process, taps, prediction_hand_over, denoiser.config.text_length)
        encoder.origin = denoiser.origin
        return encoder

    @classmethod
    def from_encoder(cls, encoder: Self) -> Self:
        """The same network as a single-rate one, which draws alone; both share it.

        Raises:
            ValueError: If the encoder hands over no prediction.
        """
        if not encoder.config.prediction_hand_over:
            raise ValueError("This encoder hands over no prediction, so it draws nothing alone.")
        denoiser = cls(encoder.network, encoder.process, text_length=encoder.config.text_length)
        denoiser.origin = encoder.origin
        return denoiser

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Self:
        """Load a network that `save_pretrained` saved. Takes what the network's own method takes."""
        place, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if isinstance(place, os.PathLike) and not os.path.exists(place):
            raise OSError(f"{place} cannot be loaded: there is no such folder.")
        config = dict(diffusers.UNet2DModel.load_config(place, **place_of(kwargs)))
        name, said = config.get("_class_name"), config.get(_HOST)
        if name not in KINDS:
            raise ValueError(f"{place} holds a {name}, which is none of {', '.join(KINDS)}.")
        if not isinstance(said, dict):
            raise ValueError(
                f"{place} lacks {_HOST} in its config.json, which says how the network was trained: load it by "
                f"{name}.from_pretrained, and wrap it as HostNetwork(network, NoiseProcess.of(scheduler))."
            )
        own = {key: said[key] for key in ("taps", *_SAID) if key in said}
        rest = {key: value for key, value in said.items() if key not in own}
        if unknown := rest.keys() - inspect.signature(NoiseProcess.__init__).parameters.keys():
            raise ValueError(f"{_HOST} in the config.json of {place} has an unknown entry, {min(unknown)}.")
        process = NoiseProcess(**rest)
        options = {**kwargs, "use_safetensors": True}
        origin = Origin.named_in(config, place)
        if origin is None:
            network, info = _classes()[name].from_pretrained(place, **{**options, "output_loading_info": True})
            check_loaded(place, network, info["missing_keys"])
        else:
            network, info = origin.fetch(place, {name: _classes()[name]}, options), {}
        align_weights(network)
        host = cls(network, process, **own)
        host.origin = origin or Origin.find(place, **kwargs)
        return (host, info) if wants_info else host  # type: ignore[return-value] # as the host's method does

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the network in its own format, and in its config.json the process and the taps."""
        refuse_pickles(kwargs.get("safe_serialization", True))
        refuse_adapters(network=self)
        self.network.save_pretrained(save_directory, *args, **kwargs)
        write_into_config(save_directory, **{_HOST: self._to_json()})

    # The host's pipelines read off the signature what a network's method takes.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]

    def find_published(self) -> Origin | None:
        """Its origin, if the network is as it is there; else `None`."""
        return None if self.origin is None else self.origin.confirm(cast(ModelMixin, self.network), _classes())

    def save_what_is_new(self, save_directory, origin: Origin, variant: str | None = None) -> None:
        """Save the configuration alone, as all weights are the origin's."""
        prepare_folder(save_directory)
        cast(ModelMixin, self.network).save_config(save_directory)
        write_into_config(save_directory, **{_HOST: self._to_json(), KEY: origin.to_json()})

    def _to_json(self) -> dict:
        process = {key: value for key, value in self.process.config.items() if not key.startswith("_")}
        return process | {"taps": list(self.taps)} | {key: self.config[key] for key in _SAID}

    def project_condition(self, condition: Condition) -> Condition:
        """As the networks of this package have it: the condition as it is."""
        return condition

    def enable_gradient_checkpointing(self, *args, **kwargs) -> None:
        """As the network's own method."""
        self.network.enable_gradient_checkpointing(*args, **kwargs)

    def disable_gradient_checkpointing(self) -> None:
        """As the network's own method."""
        self.network.disable_gradient_checkpointing()

    def enable_cache(self, config) -> None:
        """Reuse features between steps, as caches of diffusers do that act inside blocks; `disable_cache` ends it.

        Args:
            config: `PyramidAttentionBroadcastConfig` or `TaylorSeerCacheConfig`. Intervals count calls of this network.

        Raises:
            ValueError: If it is of another cache, or would act on nothing.
        """
        enable_cache_that_acts(self, super().enable_cache, config, f"a {type(self.network).__name__} with taps")

    def forward(
        self,
        sample: Tensor,
        log_snr: Tensor | float,
        condition: Condition = None,
        context: None = None,
        context_log_snr: None = None,
        return_dict: bool = True,
    ) -> HostNetworkOutput | tuple[Tensor, tuple[Tensor, ...]]:
        """Predict the velocity of noisy images, and take the feature maps.

        Args:
            sample: Noisy images z [B, C, H, W], variance-preserving.
            log_snr: Their log-SNR, a scalar or [B].
            condition: Class of each image [B], `num_classes` being the null label; `None` for all null. For networks of text
                a [`Text`].
            context: There for interchangeability with a denoiser: a single-rate network takes none.
            context_log_snr: As `context`.
            return_dict: Whether to return an output object or a plain tuple.
        """
        if context is not None or context_log_snr is not None:
            raise ValueError("A network of diffusers takes no context.")
        levels = per_sample(log_snr, sample)
        num_classes = self.config.num_classes
        is_text, takes_text = isinstance(condition, (Text, ProjectedText)), self.config.cross_attention_dim is not None
        if is_text != takes_text:
            takes = "text: give a Text as the condition" if takes_text else "no text"
            raise ValueError(f"A {type(self.network).__name__} of this shape takes {takes}.")
        if num_classes is None and condition is not None and not is_text:
            raise ValueError("This model is unconditional and takes no class_labels.")
        if num_classes is not None and condition is None:
            if not self.config.has_null_class:
                raise ValueError(
                    f"A {type(self.network).__name__} knows no class that stands for none: give class_labels."
                )
            condition = torch.full((len(sample),), num_classes, device=sample.device)
        if torch.compiler.is_compiling():
            output, maps = self._run(sample, levels, condition)
        else:
            with _TAPPING:
                output, maps = self._run(sample, levels, condition)
        column = levels[:, None, None, None]
        z = sample.float()
        velocity = self.process.velocity(output.float(), z, column)
        if self.config.prediction_hand_over:
            variance = _SHARE_OF_NOISE * torch.sigmoid(-column).expand(-1, 1, *z.shape[2:])
            maps = (*maps, z.clone(), diffusion.x_from_v(z, velocity, column), variance)
        velocity = velocity.to(sample.dtype)
        return HostNetworkOutput(sample=velocity, context=maps) if return_dict else (velocity, maps)

    def _run(self, sample: Tensor, levels: Tensor, condition: Condition) -> tuple[Tensor, tuple[Tensor, ...]]:
        seen = (sample * self.process.scale(levels)[:, None, None, None]).to(sample.dtype)
        taken = self._taken = {}
        try:
            output = self._kind.call(self.network, seen, self.process.timestep(levels), condition)
        finally:
            self._taken = None  # no feature map outlives its call
        maps = tuple(_as_map(tap, taken.get(tap), sample, self.stride) for tap in self.taps)
        return output[:, : self.config.in_channels], maps  # what follows are variances, which are left aside

    def _take(self, tap: str, module: nn.Module, inputs: tuple, output) -> None:
        if self._taken is not None:
            self._taken[tap] = output[0] if isinstance(output, tuple) else output


def _classes() -> Mapping[str, type[ModelMixin]]:
    """The classes of `KINDS` themselves."""
    return {name: getattr(diffusers, name) for name in KINDS}


def _as_map(tap: str, features: Tensor | None, sample: Tensor, stride: int) -> Tensor:
    """Features [B, channels, H, W] as they are, and tokens [B, H W, channels] as such a map."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features
    height, width = (side // stride for side in sample.shape[-2:])
    if not isinstance(features, Tensor) or features.ndim != 3 or features.shape[1] != height * width:
        raise ValueError(f"The tap {tap!r} gives no map: neither [B, channels, H, W] nor {height} x {width} tokens.")
    return features.transpose(1, 2).unflatten(2, (height, width))
