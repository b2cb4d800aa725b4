"""The two networks of a pair, one residual U-ViT each: what differs, and how context enters.

The context encoder is the single-rate network that hands out the last feature map of each level. The denoiser is the
single-rate network that also takes such maps: it adds a linear projection of each, [h, e] → h + W e, where its own level
of the same resolution begins. W e does not change between two refreshes, so `project_context` computes it once. W
starts at zero, the encoder's side does not: were both zero, neither would ever learn.

Beyond the paper, with `prediction_hand_over` the encoder also hands out what it believes about the clean image, x̂ and a
variance. The denoiser updates that belief by what z_t tells beyond z_τ (`diffusion.gaussian_update`), starts from the
velocity this implies and adds a correction, so it spends nothing on what the encoder knows already.

Both condition on log-SNR rather than on a step number, so the same weights serve any variance-preserving schedule.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import CacheMixin
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import silu

from . import diffusion
from .ranges import check_boolean, check_integer, check_number
from .repositories import RepositoryMixin, refuse_pickles
from .uvit import NoiseLevelEmbedding, UViTTrunk

# What is left to know about x after z_τ, in units of σ_τ², before anything is learned.
_INITIAL_VARIANCE = 0.2
# Far more than any network of this kind has in a level.
_MOST_BLOCKS = 1000

SINGLE_RATE = {"context_channels": None, "prediction_hand_over": False}
"""What of a denoiser's configuration makes it a single-rate network: laid over a pair's, it leaves the shape."""


@dataclass
class UViTContextEncoderOutput(BaseOutput):
    """Output of [`UViTContextEncoder`].

    Args:
        context: One map [B, context_channels, H, W] per level, from the highest resolution to the lowest; with
            `prediction_hand_over` then z_τ, x̂ [B, C, H, W] and its variance [B, 1, H, W] in float32.
    """

    context: tuple[Tensor, ...]


@dataclass
class UViTDenoiserOutput(BaseOutput):
    """Output of [`UViTDenoiser`].

    Args:
        sample: Predicted velocity v = α ε − σ x, [B, C, H, W].
    """

    sample: Tensor


class _UViTModel(RepositoryMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """What encoder and denoiser share: trunk, noise-level and class conditioning, and the host's bookkeeping."""

    # Defaults of the pipeline that hands this network out among its components.
    pipeline_defaults: ClassVar[dict] = {}

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTResBlock", "UViTTransformerBlock", "UViTDepthwiseBlock"]
    _repeated_blocks = ["UViTResBlock", "UViTTransformerBlock", "UViTDepthwiseBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Self:
        """Load weights from safetensors files; pickled weights are refused. Takes what the host's method takes.

        Raises:
            ValueError: If the files lack weights that the network needs.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"{pretrained_model_name_or_path} lacks {len(missing)} weights, such as {missing[0]}.")
        for name, weight in model.named_parameters():
            if weight.device.type != "meta" and not weight.float().isfinite().all():
                raise ValueError(f"{pretrained_model_name_or_path} holds NaN or infinity in {name}.")
        # Weights mapped from a file may start at any address, and the rounding of some kernels depends on it.
        for weight in model.parameters():
            if weight.device.type == "cpu":
                weight.data = weight.data.clone()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the network, weights as safetensors. Takes what the host's method takes."""
        refuse_pickles(kwargs.get("safe_serialization", True))
        super().save_pretrained(save_directory, *args, **kwargs)

    # The host's pipelines read off the signature what a network's method takes.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)

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
        if not isinstance(config, (PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig)):
            raise ValueError(
                f"{name} does not fit a U-ViT, whose blocks form one stack per level with skips between them: use "
                "PyramidAttentionBroadcastConfig or TaylorSeerCacheConfig, which act inside blocks."
            )
        if isinstance(config, TaylorSeerCacheConfig):
            if config.use_lite_mode or config.skip_predict_identifiers:
                raise ValueError(
                    f"{name} with use_lite_mode or skip_predict_identifiers puts zeros where a U-ViT's skips read "
                    "features: leave both out."
                )
            config = dataclasses.replace(config, cache_identifiers=config.cache_identifiers or [r".*\.attn"])
        before = [vars(module).get("forward") for module in self.modules()]
        super().enable_cache(config)
        if before == [vars(module).get("forward") for module in self.modules()]:  # a hook replaces `forward`
            self.disable_cache()
            raise ValueError(f"{name} acts on no module of this network as it is configured.")

    def _make_output(self) -> None:
        config = self.config
        self.norm_out = _norm(config.level_channels[0])
        self.proj_out = nn.ConvTranspose2d(
            config.level_channels[0], config.in_channels, config.patch_size, stride=config.patch_size
        )
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

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

    def _embed(self, sample: Tensor, log_snr: Tensor | float, class_labels: Tensor | None) -> Tensor:
        batch_size = sample.shape[0]
        embedding = self.noise_embedding(_per_sample(log_snr, sample), sample.dtype)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((batch_size,), self.config.num_classes, device=sample.device)
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)
        elif class_labels is not None:
            raise ValueError("This model is unconditional (num_classes=None) and takes no class_labels.")
        return embedding


def _check_config(config) -> None:
    """Refuse arguments of the wrong type or out of range; what must fit together the trunk checks."""
    sides = config.sample_size
    for side in sides if isinstance(sides, (list, tuple)) and len(sides) == 2 else (sides,):
        check_integer("sample_size", side, 1)
    for name in ("in_channels", "patch_size", "attention_head_dim", "embedding_dim"):
        check_integer(name, config[name], 1)
    if config.num_classes is not None:
        check_integer("num_classes, if it is not None for an unconditional model,", config.num_classes, 1)
    ranges = {"level_channels": (1, None), "level_blocks": (0, _MOST_BLOCKS), "context_channels": (1, None)}
    for name, (least, most) in ranges.items():
        if name == "context_channels" and config[name] is None:
            continue
        if not isinstance(config[name], (list, tuple)):
            raise ValueError(f"{name} must be a list with an entry for each level, got {config[name]!r}.")
        for entry in config[name]:
            check_integer(f"each of {name}", entry, least, most)
    check_number("dropout", config.dropout, least=0, below=1)
    check_boolean("prediction_hand_over", config.prediction_hand_over)


def _per_sample(log_snr: Tensor | float, sample: Tensor) -> Tensor:
    log_snr = torch.as_tensor(log_snr, dtype=torch.float32, device=sample.device)
    return log_snr.reshape(-1).expand(sample.shape[0])


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(32, channels // 8)), channels)


class UViTContextEncoder(_UViTModel):
    """Heavy network of a pair: turns a noisy image into context, one feature map per resolution.

    Args:
        sample_size: Side of the square images it is trained on, or (height, width); others work where divisible by
            patch size times downsampling.
        in_channels: Image channels.
        patch_size: Side of the patches that the highest level works on.
        num_classes: Number of classes, or `None` for an unconditional model.
        level_channels: Width of each level, from the highest resolution to the middle.
        level_types: "res", "transformer" or "depthwise" for each level.
        level_blocks: Blocks of each level, as many going down as going up; for the last, the middle, all its blocks.
        attention_head_dim: Channels of one attention head.
        embedding_dim: Width of the noise-level and class embedding.
        dropout: Dropout rate in transformer blocks.
        context_channels: Width of the map that each level hands out; `None` for the level's own width.
        prediction_hand_over: Whether the context ends with z_τ, the encoder's own prediction x̂ and its variance.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        patch_size: int = 1,
        num_classes: int | None = None,
        level_channels: tuple[int, ...] = (256, 512, 1024),
        level_types: tuple[str, ...] = ("res", "transformer", "transformer"),
        level_blocks: tuple[int, ...] = (3, 3, 16),
        attention_head_dim: int = 64,
        embedding_dim: int = 1024,
        dropout: float = 0.0,
        context_channels: tuple[int, ...] | None = None,
        prediction_hand_over: bool = False,
    ):
        super().__init__()
        self._make_trunk(in_channels)
        widths = context_channels or level_channels
        if len(widths) != len(level_channels):
            raise ValueError(
                f"context_channels needs one width per level, got {len(widths)} for {len(level_channels)} levels."
            )
        self.context_heads = nn.ModuleList(
            nn.Sequential(_norm(width), nn.Conv2d(width, context_width, 1, bias=False))
            for width, context_width in zip(level_channels, widths, strict=True)
        )
        if prediction_hand_over:
            self._make_output()
            self.variance_out = nn.ConvTranspose2d(level_channels[0], 1, patch_size, stride=patch_size)
            nn.init.zeros_(self.variance_out.weight)
            nn.init.constant_(self.variance_out.bias, math.log(_INITIAL_VARIANCE))
            self.variance_embedding = nn.Linear(embedding_dim, 1, bias=False)
            nn.init.zeros_(self.variance_embedding.weight)

    @property
    def context_channels(self) -> tuple[int, ...]:
        """Width of the context at every level."""
        return tuple(self.config.context_channels or self.config.level_channels)

    @classmethod
    def from_denoiser(
        cls,
        denoiser: "UViTDenoiser",
        context_channels: tuple[int, ...] | None = None,
        prediction_hand_over: bool = False,
    ) -> "UViTContextEncoder":
        """Turn a trained single-rate network into an encoder with a copy of all that it has learned.

        Args:
            denoiser: The network to start from; it is left as it is.
            context_channels: Width of the map that each level hands out; `None` for the level's own width.
            prediction_hand_over: Whether it hands over its prediction beside the maps.

        Raises:
            ValueError: If the network is the denoiser of a pair that is handed a prediction beside the noisy image.
        """
        if denoiser.config.prediction_hand_over:
            raise ValueError(
                "An encoder sees a noisy image alone, and this denoiser is handed a prediction beside it."
            )
        config = {key: denoiser.config[key] for key in cls._get_init_keys(cls) if key in denoiser.config}
        encoder = cls(**{**config, "context_channels": context_channels, "prediction_hand_over": prediction_hand_over})
        for name in ("trunk", "noise_embedding", "class_embedding", "norm_out", "proj_out"):
            if getattr(encoder, name, None) is not None:
                getattr(encoder, name).load_state_dict(getattr(denoiser, name).state_dict())
        # Without a dtype where none is needed: the host warns of every cast.
        return (
            encoder.to(denoiser.device)
            if denoiser.dtype == encoder.dtype
            else encoder.to(denoiser.device, denoiser.dtype)
        )

    def forward(
        self,
        sample: Tensor,
        log_snr: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UViTContextEncoderOutput | tuple[tuple[Tensor, ...]]:
        """Compute the context of noisy images.

        Args:
            sample: Noisy images z_τ [B, C, H, W].
            log_snr: Their log-SNR λ_τ, a scalar or [B].
            class_labels: Class of each image [B], `num_classes` being the null label; `None` for all null.
            return_dict: Whether to return an output object or a plain tuple.
        """
        embedding = silu(self._embed(sample, log_snr, class_labels))
        features = self.trunk(sample, embedding)
        context = tuple(head(feature) for head, feature in zip(self.context_heads, features, strict=True))
        if self.config.prediction_hand_over:
            level = _per_sample(log_snr, sample)[:, None, None, None]
            hidden_states = silu(self.norm_out(features[0]))
            x = diffusion.x_from_v(sample.float(), self.proj_out(hidden_states).float(), level)
            log_variance = self.variance_out(hidden_states) + self.variance_embedding(embedding)[:, :, None, None]
            variance = torch.sigmoid(-level) * torch.exp(log_variance.float())
            # A copy: at a refresh the denoiser's own sample, given twice, would be another graph to a compiler.
            context = (*context, sample.to(torch.float32, copy=True), x, variance)
        return UViTContextEncoderOutput(context=context) if return_dict else (context,)


class UViTDenoiser(_UViTModel):
    """Light network of a pair, or with `context_channels=None` the single-rate network: predicts velocity.

    Args:
        sample_size: Side of the square images it is trained on, or (height, width); others work where divisible by
            patch size times downsampling.
        in_channels: Image channels.
        patch_size: Side of the patches that the highest level works on.
        num_classes: Number of classes, or `None` for an unconditional model.
        level_channels: Width of each level, from the highest resolution to the middle.
        level_types: "res", "transformer" or "depthwise" for each level.
        level_blocks: Blocks of each level, as many going down as going up; for the last, the middle, all its blocks.
        attention_head_dim: Channels of one attention head.
        embedding_dim: Width of the noise-level and class embedding.
        dropout: Dropout rate in transformer blocks.
        context_channels: Width of the context at every level; `None` for a network that takes none.
        prediction_hand_over: Whether the context ends with z_τ, the encoder's prediction x̂ and its variance.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        patch_size: int = 1,
        num_classes: int | None = None,
        level_channels: tuple[int, ...] = (128, 256, 512),
        level_types: tuple[str, ...] = ("res", "transformer", "transformer"),
        level_blocks: tuple[int, ...] = (3, 3, 8),
        attention_head_dim: int = 64,
        embedding_dim: int = 1024,
        dropout: float = 0.0,
        context_channels: tuple[int, ...] | None = None,
        prediction_hand_over: bool = False,
    ):
        super().__init__()
        # Beside z_t the trunk sees where the update starts from and what it moved, in v and in x.
        self._make_trunk(4 * in_channels if prediction_hand_over else in_channels)
        self._make_output()
        if context_channels is None:
            if prediction_hand_over:
                raise ValueError("prediction_hand_over=True needs context_channels.")
            return
        if len(context_channels) != len(level_channels):
            raise ValueError(
                "context_channels needs one width per level, "
                f"got {len(context_channels)} for {len(level_channels)} levels."
            )
        self.context_noise_embedding = NoiseLevelEmbedding(embedding_dim)
        self.context_proj = nn.ModuleList(
            nn.Conv2d(context_width, width, 1, bias=False)
            for context_width, width in zip(context_channels, level_channels, strict=True)
        )
        for projection in self.context_proj:
            nn.init.zeros_(projection.weight)

    @apply_forward_hook
    def project_context(self, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn an encoder's context into what `forward` adds to its levels, once per refresh.

        Args:
            context: One map [B, context_channels, H, W] per level, from the highest resolution to the lowest; with
                `prediction_hand_over` then z_τ, x̂ and its variance, which pass through.
        """
        if self.config.context_channels is None:
            raise ValueError("This denoiser takes no context (context_channels=None).")
        levels = len(self.context_proj)
        maps = (projection(part) for projection, part in zip(self.context_proj, context[:levels], strict=True))
        return (*maps, *context[levels:])

    def handed_over_prediction(self, context: tuple[Tensor, ...]) -> Tensor | None:
        """The encoder's own prediction x̂ [B, C, H, W] in a context, projected or not; `None` where there is none."""
        return context[-2] if self.config.prediction_hand_over else None

    def handed_over_velocity(self, context_log_snr: Tensor | float, context: tuple[Tensor, ...]) -> Tensor:
        """The encoder's own velocity [B, C, H, W] at z_τ, in float32.

        Args:
            context_log_snr: Log-SNR λ_τ of the images that the context was computed from, a scalar or [B].
            context: A context that ends with a prediction, projected or not.
        """
        z_tau, x, _ = context[-3:]  # z_τ as the encoder saw it: rounded in half precision, which a small σ would tell
        return diffusion.v_from_x(z_tau, x, _per_sample(context_log_snr, z_tau)[:, None, None, None])

    def forward(
        self,
        sample: Tensor,
        log_snr: Tensor | float,
        class_labels: Tensor | None = None,
        context: tuple[Tensor, ...] | None = None,
        context_log_snr: Tensor | float | None = None,
        return_dict: bool = True,
    ) -> UViTDenoiserOutput | tuple[Tensor]:
        """Predict the velocity of noisy images.

        Args:
            sample: Noisy images z_t [B, C, H, W].
            log_snr: Their log-SNR λ_t, a scalar or [B].
            class_labels: Class of each image [B], `num_classes` being the null label; `None` for all null.
            context: What `project_context` made of the context of z_τ; `None` for the context-free branch.
            context_log_snr: Log-SNR λ_τ ≤ λ_t of the image that the context was computed from, a scalar or [B].
            return_dict: Whether to return an output object or a plain tuple.

        Raises:
            ValueError: If only one of `context` and `context_log_snr` is given, or the network takes none.
        """
        if (context is None) != (context_log_snr is None):
            raise ValueError("context and context_log_snr go together: give both or neither.")
        embedding = self._embed(sample, log_snr, class_labels)
        if context is not None:
            if self.config.context_channels is None:
                raise ValueError("This denoiser takes no context (context_channels=None).")
            embedding = embedding + self.context_noise_embedding(_per_sample(context_log_snr, sample), sample.dtype)
        hidden_states, start = sample, None
        if self.config.prediction_hand_over:
            start, hidden_states = self._update_prediction(sample, log_snr, context, context_log_snr)
            context = None if context is None else context[: len(self.context_proj)]
        features = self.trunk(hidden_states, silu(embedding), context)
        velocity = self.proj_out(silu(self.norm_out(features[0])))
        if start is not None:
            velocity = start + velocity
        return UViTDenoiserOutput(sample=velocity) if return_dict else (velocity,)

    def _update_prediction(self, sample, log_snr, context, context_log_snr):
        """Velocity that the encoder's prediction implies once updated by z_t, and the trunk's input [B, 4 C, H, W]."""
        if context is None:
            return None, torch.cat([sample, torch.zeros_like(sample).repeat(1, 3, 1, 1)], dim=1)
        z_tau, x, variance = context[len(self.context_proj) :]
        z_t, level = sample.float(), _per_sample(log_snr, sample)[:, None, None, None]
        level_tau = _per_sample(context_log_snr, sample)[:, None, None, None]
        updated = diffusion.gaussian_update(z_t, z_tau, x, variance, level, level_tau)
        velocity = diffusion.v_from_x(z_t, updated, level)
        moved = (updated - x) * torch.exp(-torch.nn.functional.logsigmoid(-level) / 2)  # in units of σ_t
        parts = [velocity, updated, moved]
        return velocity.to(sample.dtype), torch.cat([sample, *(part.to(sample.dtype) for part in parts)], dim=1)
