"""What the two networks of a pair share: a residual U-ViT of log-SNR and class or text, as a model of the host."""

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin, TaylorSeerCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import CacheMixin
from diffusers.models.attention import AttentionMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from .caches import enable_cache_that_acts
from .conditions import Condition, ProjectedText, Text, TextProjection
from .origins import KEY, Origin, place_of, prepare_folder, write_into_config
from .ranges import LONGEST_SIDE, MOST_AT_ONCE, check_boolean, check_integer, check_number
from .repositories import RepositoryMixin, refuse_pickles
from .uvit import UViTTrunk, group_norm, start_at_zero

# Log-SNR spans about [-15, 15]: the slowest feature turns once over that range, the fastest tells 0.1 apart.
_LOWEST_FREQUENCY, _HIGHEST_FREQUENCY, _NUM_FREQUENCIES = 0.05, 3.0, 32
# Far more than any network of this kind has in a level.
_MOST_BLOCKS = 1000
_MOST_CHANNELS = 2**16  # of a level, far beyond any network that trains


class NoiseLevelEmbedding(nn.Module):
    """Fourier features of log-SNR followed by an MLP."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(2 * _NUM_FREQUENCIES, embedding_dim)
        self.linear_2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, log_snr: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed log-SNR [B] as [B, embedding_dim] in `dtype`; the features are computed in float32."""
        exponents = torch.linspace(
            math.log(_LOWEST_FREQUENCY), math.log(_HIGHEST_FREQUENCY), _NUM_FREQUENCIES, device=log_snr.device
        )
        angles = log_snr.float()[:, None] * exponents.exp()
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
        return self.linear_2(silu(self.linear_1(features)))


class ImageNetworkMixin:
    """What a pipeline asks of every network that it calls, ours or of diffusers."""

    # Where it was loaded from, if that was the Hub.
    origin: Origin | None = None

    def find_published(self) -> Origin | None:
        """Its origin, if what it learned is what the network there has learned; else `None`."""
        return None

    def save_what_is_new(self, save_directory, origin: Origin, variant: str | None = None) -> None:
        """Save it without what its origin holds.

        Args:
            save_directory: Folder of the network, as `from_pretrained` takes it.
            origin: Of `find_published`.
            variant: As the host's method has it.
        """
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, or latents, that it is made for."""
        size = self.config.sample_size  # type: ignore[attr-defined] # of the host's class
        return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_loaded(place: object, network: nn.Module, missing: Collection[str]) -> None:
    """Refuse a network that was loaded without some of its weights, or with some that are not finite.

    Args:
        place: Where it was loaded from.
        network: The network; weights on the meta device are not looked at.
        missing: Names of the weights that were not there.
    """
    if missing:
        raise ValueError(f"{place} lacks {len(missing)} weights, such as {min(missing)}.")
    for name, weight in network.named_parameters():
        if weight.device.type != "meta" and not weight.float().isfinite().all():
            raise ValueError(f"{place} holds NaN or infinity in {name}.")


def align_weights(network: nn.Module) -> None:
    """Copy weights on the CPU to addresses of their own, so that equal weights give equal images.

    Mapped from a file they may start anywhere, and the rounding of some kernels depends on that.
    """
    for weight in network.parameters():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def refuse_adapters(**networks: nn.Module | None) -> None:
    """Refuse to save networks that have adapters: what is saved so could not be loaded."""
    for name, network in networks.items():
        if network is not None and any(".base_layer." in weight for weight, _ in network.named_parameters()):
            raise ValueError(
                f"The {name} has adapters, which save_lora_weights saves: unload them first, or fuse and then unload them."
            )


def find_foreign(encoder: ImageNetworkMixin, denoiser: ImageNetworkMixin) -> Origin | None:
    """Where an encoder is published, if that is another repository than the denoiser's and it is still as it is there."""
    theirs, ours = encoder.origin, denoiser.origin
    if theirs is None or (ours is not None and ours.repository == theirs.repository):
        return None
    return encoder.find_published()


def without_origin(encoder: ImageNetworkMixin) -> ImageNetworkMixin:
    """The same network, its weights shared, as if it came from nowhere."""
    own = copy.copy(getattr(encoder, "_orig_mod", encoder))  # what `torch.compile` wrapped
    own.origin = None
    return own


class UViTNetwork(
    ImageNetworkMixin, RepositoryMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin
):
    """Base of encoder and denoiser: trunk, conditioning on noise level, class or text, and the host's bookkeeping."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTResBlock", "UViTTransformerBlock", "UViTDepthwiseBlock"]
    _repeated_blocks = ["UViTResBlock", "UViTTransformerBlock", "UViTDepthwiseBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]
    # Of a network that may be saved without what its origin holds: the parts that are never the origin's.
    OWN_PARTS: ClassVar[tuple[str, ...]] = ()

    @property
    def stride(self) -> int:
        """What height and width must be divisible by."""
        return self.config.patch_size * 2 ** (len(self.config.level_channels) - 1)

    def blueprint(self) -> Self:
        """The same network without weights, on the meta device, for shapes and FLOPs."""
        with torch.device("meta"):
            return type(self).from_config(self.config).eval()

    def describe(self) -> dict:
        """All of the network but its weights, as JSON holds it: the arguments that it was made with."""
        return json.loads(
            json.dumps({key: self.config[key] for key in self._get_init_keys(type(self)) if key in self.config})
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Self:
        """Load weights from safetensors files; pickled weights are refused. Takes what the host's method takes.

        Raises:
            ValueError: If the files lack weights that the network needs.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        if cls.OWN_PARTS and (config := cls._read_config(pretrained_model_name_or_path, kwargs)).get(KEY) is not None:
            return cls._load_what_is_new(pretrained_model_name_or_path, config, kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        check_loaded(pretrained_model_name_or_path, model, info["missing_keys"])
        align_weights(model)
        model.origin = Origin.find(pretrained_model_name_or_path, **kwargs)
        return (model, info) if wants_info else model  # type: ignore[return-value] # as the host's method does

    @classmethod
    def _read_config(cls, place, options: dict) -> dict:
        try:
            return cast(dict, cls.load_config(place, **place_of(options)))
        except (OSError, ValueError):  # whoever loads the network says so
            return {}

    @classmethod
    def _load_what_is_new(cls, place, config: dict, options: dict) -> Self:
        """A network whose other weights are those of its origin."""
        origin = Origin.named_in(config, place)
        assert origin is not None  # or nobody calls this
        theirs = origin.fetch(place, _published_kinds(), options)
        name, where = _weights_name(options.get("variant")), place_of(options)
        if Path(place).is_dir():
            file = str(Path(place, options.get("subfolder") or "", name))
        else:
            file = hf_hub_download(str(place), name, **where)
        weights = load_file(file)
        weights |= {key: w for key, w in theirs.state_dict().items() if not key.startswith(cls.OWN_PARTS)}
        network = cast(Self, cls.from_config({key: value for key, value in config.items() if key != KEY}))
        if missing := sorted(network.state_dict().keys() - weights.keys()):
            raise ValueError(f"{place} and {origin} lack {len(missing)} weights, such as {missing[0]}.")
        network.to(theirs.device) if theirs.dtype == network.dtype else network.to(theirs.device, theirs.dtype)
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
        network.origin = origin
        return network.eval()

    def find_published(self) -> Origin | None:
        if self.origin is None or not self.OWN_PARTS:
            return None
        shared = {name: w for name, w in self.state_dict().items() if not name.startswith(self.OWN_PARTS)}
        return self.origin.confirm_weights(shared, _published_kinds())

    def save_what_is_new(self, save_directory, origin: Origin, variant: str | None = None) -> None:
        prepare_folder(save_directory)
        self.save_config(save_directory)
        write_into_config(save_directory, **{KEY: origin.to_json()})
        own = {name: w.contiguous() for name, w in self.state_dict().items() if name.startswith(self.OWN_PARTS)}
        save_file(own, Path(save_directory, _weights_name(variant)), metadata={"format": "pt"})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs) -> tuple[dict, dict, dict]:
        """Refuse unknown arguments where the host reads the constructor's from a configuration. It ignores them.

        Raises:
            ValueError: If the configuration holds an argument that this network does not know.
        """
        known = cls._get_init_keys(cls) | {"quantization_config"}
        unknown = sorted(name for name in config_dict if not name.startswith("_") and name not in known)
        if unknown:
            raise ValueError(
                f"The configuration of a {cls.__name__} holds {', '.join(unknown)}, which it does not know."
            )
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the network, weights as safetensors. Takes what the host's method takes."""
        refuse_pickles(kwargs.get("safe_serialization", True))
        refuse_adapters(network=self)
        super().save_pretrained(save_directory, *args, **kwargs)

    # The host's pipelines read off the signature what a network's method takes.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]

    def enable_cache(self, config) -> None:
        """Reuse attention outputs between steps. Takes caches that act inside blocks; call `disable_cache` to end it.

        Args:
            config: `PyramidAttentionBroadcastConfig` or `TaylorSeerCacheConfig`, the latter by default for every
                attention module. Intervals count calls of this network: K per image for a context encoder. What is
                reused is the parallel attention and MLP of a block.

        Raises:
            ValueError: If the cache skips whole stacks of blocks, or would act on nothing.
        """
        name = type(config).__name__
        if isinstance(config, TaylorSeerCacheConfig):
            if config.use_lite_mode or config.skip_predict_identifiers:
                raise ValueError(
                    f"{name} with use_lite_mode or skip_predict_identifiers puts zeros where a U-ViT's skips read "
                    "features: leave both out."
                )
            config = dataclasses.replace(config, cache_identifiers=config.cache_identifiers or [r".*\.attn"])
        enable_cache_that_acts(
            self,
            super().enable_cache,
            config,
            "a U-ViT, whose blocks form one stack per level with skips between them",
        )

    def _make_output(self) -> None:
        config = self.config
        self.norm_out = group_norm(config.level_channels[0])
        self.proj_out = nn.ConvTranspose2d(
            config.level_channels[0], config.in_channels, config.patch_size, stride=config.patch_size
        )
        start_at_zero(self.proj_out)

    def _make_trunk(self, in_channels: int) -> None:
        config = self.config
        _check_config(config)
        self.noise_embedding = NoiseLevelEmbedding(config.embedding_dim)
        # One more row than classes: the null label, for dropped labels and for guidance.
        self.class_embedding = (
            nn.Embedding(config.num_classes + 1, config.embedding_dim) if config.num_classes else None
        )
        self.trunk = UViTTrunk(
            in_channels,
            config.patch_size,
            tuple(config.level_channels),
            tuple(config.level_types),
            tuple(config.level_blocks),
            config.attention_head_dim,
            config.embedding_dim,
            config.dropout,
        )
        self.text_projection = None
        if config.cross_attention_dim is not None:
            widths: list[list[int]] = [
                [stage.channels] * len(stage.blocks) if stage.attends and config.attends_to_text else []
                for stage in self.trunk.stages
            ]
            self.text_projection = TextProjection(
                config.cross_attention_dim, config.embedding_dim, widths, config.attention_head_dim
            )

    @apply_forward_hook
    def project_condition(self, condition: Condition) -> Condition:
        """What `forward` takes of a condition and what stays the same in all its calls: keys and values of a text.

        Args:
            condition: Class labels [B], which stay as they are, or a text.
        """
        if self.text_projection is None or not isinstance(condition, Text):
            return condition
        width = condition.tokens.shape[-1]
        if width != self.config.cross_attention_dim:
            raise ValueError(
                f"This model takes text of {self.config.cross_attention_dim} channels a token, got {width}."
            )
        return self.text_projection(condition)

    def _embed(
        self, sample: Tensor, log_snr: Tensor | float, condition: Condition
    ) -> tuple[Tensor, ProjectedText | None]:
        """The embedding [B, E] of noise level and condition, and the text, if that is what the condition is."""
        embedding = self.noise_embedding(per_sample(log_snr, sample), sample.dtype)
        if self.text_projection is not None:
            if isinstance(condition, Text):
                condition = self.project_condition(Text(condition.tokens.to(sample.dtype), condition.mask))
            if not isinstance(condition, ProjectedText):
                raise ValueError("This model takes text (cross_attention_dim is set): give a Text as the condition.")
            return embedding + condition.embedding, condition
        if isinstance(condition, (Text, ProjectedText)):
            raise ValueError("This model takes no text (cross_attention_dim=None).")
        if self.class_embedding is not None:
            if condition is None:
                condition = torch.full((sample.shape[0],), self.config.num_classes, device=sample.device)
            embedding = embedding + self.class_embedding(condition).to(sample.dtype)
        elif condition is not None:
            raise ValueError("This model is unconditional (num_classes=None) and takes no class_labels.")
        return embedding, None


def _check_config(config) -> None:
    """Refuse arguments of the wrong type or out of range; what must fit together the trunk checks."""
    sides = config.sample_size
    for side in sides if isinstance(sides, (list, tuple)) and len(sides) == 2 else (sides,):
        check_integer("sample_size", side, 1, LONGEST_SIDE)
    for name in ("in_channels", "patch_size", "attention_head_dim", "embedding_dim"):
        check_integer(name, config[name], 1, _MOST_CHANNELS)
    if config.num_classes is not None:
        check_integer(
            "num_classes, if it is not None for an unconditional model,", config.num_classes, 1, MOST_AT_ONCE
        )
    ranges = {"level_channels": (1, _MOST_CHANNELS), "level_blocks": (0, _MOST_BLOCKS)}
    ranges["context_channels"] = ranges["level_channels"]
    for name, (least, most) in ranges.items():
        if name == "context_channels" and config[name] is None:
            continue
        if not isinstance(config[name], (list, tuple)):
            raise ValueError(f"{name} must be a list with an entry for each level, got {config[name]!r}.")
        for entry in config[name]:
            check_integer(f"each of {name}", entry, least, most)
    check_number("dropout", config.dropout, least=0, below=1)
    check_boolean("prediction_hand_over", config.prediction_hand_over)
    check_integer("text_length", config.text_length, 1, MOST_AT_ONCE)
    for name in ("text_is_masked", "text_is_lowered", "attends_to_text"):
        check_boolean(name, config[name])
    if config.cross_attention_dim is not None:
        check_integer("cross_attention_dim, if it is not None,", config.cross_attention_dim, 1, _MOST_CHANNELS)
        if config.num_classes is not None:
            raise ValueError(
                f"A model is of classes or of text, got num_classes={config.num_classes} and "
                f"cross_attention_dim={config.cross_attention_dim}."
            )


def per_sample(log_snr: Tensor | float, sample: Tensor) -> Tensor:
    """Log-SNR [B] of the images of `sample`, from one value for all or one for each."""
    log_snr = torch.as_tensor(log_snr, dtype=torch.float32, device=sample.device)
    return log_snr.reshape(-1).expand(sample.shape[0])


def _published_kinds() -> Mapping[str, type[ModelMixin]]:
    """Classes that the trunk of an encoder may be published in."""
    return {cls.__name__: cls for cls in UViTNetwork.__subclasses__()}


def _weights_name(variant: str | None) -> str:
    stem, _, ending = SAFETENSORS_WEIGHTS_NAME.partition(".")
    return f"{stem}.{variant}.{ending}" if variant else SAFETENSORS_WEIGHTS_NAME
