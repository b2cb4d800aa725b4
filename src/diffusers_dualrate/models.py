"""The two networks of a pair, one residual U-ViT each: what differs, and how context enters.

The context encoder is the single-rate network that also returns the last feature map of each level. The denoiser is the
single-rate network that also takes such maps. Where its own level of the same resolution begins, it adds a linear
projection of the map: [h, e] → h + W e. W e does not change between two refreshes, so `project_context` computes it once.
W starts at zero, the encoder's heads do not: if both were zero, neither would ever learn.

Beyond the paper, with `prediction_hand_over` the encoder also returns its prediction x̂ of the clean image, and a
variance. The denoiser updates this Gaussian by what z_t tells beyond z_τ (`diffusion.gaussian_update`). The updated mean
gives a velocity. The network learns a correction that is added to it.

Both networks condition on log-SNR instead of a step number, so the same weights serve any variance-preserving schedule.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import silu

from . import diffusion
from .conditions import Condition
from .network import NoiseLevelEmbedding, UViTNetwork, per_sample
from .uvit import group_norm, start_at_zero

# Variance of x̂ in units of σ_τ², before anything is learned.
_INITIAL_VARIANCE = 0.2

SINGLE_RATE = {"context_channels": None, "prediction_hand_over": False}
"""Changes that make the configuration of a pair's network that of a single-rate network of the same shape."""


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


class UViTContextEncoder(UViTNetwork):
    """Heavy network of a pair: turns a noisy image into context, one feature map per resolution.

    Args:
        sample_size: Side of the square images it is trained on, or (height, width). Other sizes work if they are divisible
            by patch size times downsampling.
        in_channels: Image channels.
        patch_size: Side of the patches that the highest level works on.
        num_classes: Number of classes, or `None` for an unconditional model.
        level_channels: Width of each level, from the highest resolution to the middle.
        level_types: "res", "transformer" or "depthwise" for each level.
        level_blocks: Number of blocks that each level has going down, and again going up. The last entry is the number of
            blocks in the middle.
        attention_head_dim: Channels of one attention head.
        embedding_dim: Width of the embedding of noise level and class or text.
        dropout: Dropout rate in transformer blocks.
        context_channels: Width of the map that each level hands out; `None` for the level's own width.
        prediction_hand_over: Whether the context ends with z_τ, the encoder's own prediction x̂ and its variance.
        cross_attention_dim: Width of the tokens of a text, for a model of text; `None` for one of classes or of nothing.
        text_length: Number of tokens of the texts that it is trained on, filled up or cut to it.
        text_is_masked: Whether the text encoder was told which tokens fill a text up.
        text_is_lowered: Whether it is trained on texts in lower case, without spaces at their ends.
        attends_to_text: Whether transformer levels attend to its tokens. Otherwise the network sees one embedding of the
            whole text.
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
        cross_attention_dim: int | None = None,
        text_length: int = 77,
        text_is_masked: bool = True,
        text_is_lowered: bool = False,
        attends_to_text: bool = True,
    ):
        super().__init__()
        self._make_trunk(in_channels)
        widths = context_channels or level_channels
        if len(widths) != len(level_channels):
            raise ValueError(
                f"context_channels needs one width per level, got {len(widths)} for {len(level_channels)} levels."
            )
        self.context_heads = nn.ModuleList(
            nn.Sequential(group_norm(width), nn.Conv2d(width, context_width, 1, bias=False))
            for width, context_width in zip(level_channels, widths, strict=True)
        )
        if prediction_hand_over:
            self._make_output()
            self.variance_out = nn.ConvTranspose2d(level_channels[0], 1, patch_size, stride=patch_size)
            start_at_zero(self.variance_out)
            nn.init.constant_(self.variance_out.bias, math.log(_INITIAL_VARIANCE))  # type: ignore[arg-type] # it has one
            self.variance_embedding = nn.Linear(embedding_dim, 1, bias=False)
            nn.init.zeros_(self.variance_embedding.weight)

    OWN_PARTS = ("context_heads", "variance")

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
        for name in ("trunk", "noise_embedding", "class_embedding", "text_projection", "norm_out", "proj_out"):
            if getattr(encoder, name, None) is not None:
                getattr(encoder, name).load_state_dict(getattr(denoiser, name).state_dict())
        encoder.origin = denoiser.origin
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
        condition: Condition = None,
        return_dict: bool = True,
    ) -> UViTContextEncoderOutput | tuple[tuple[Tensor, ...]]:
        """Compute the context of noisy images.

        Args:
            sample: Noisy images z_τ [B, C, H, W].
            log_snr: Their log-SNR λ_τ, a scalar or [B].
            condition: Class of each image [B], `num_classes` being the null label; `None` for all null. For a model of text
                a [`Text`], or what `project_condition` made of it.
            return_dict: Whether to return an output object or a plain tuple.
        """
        embedding, text = self._embed(sample, log_snr, condition)
        embedding = silu(embedding)
        features = self.trunk(sample, embedding, text=text)
        context = tuple(head(feature) for head, feature in zip(self.context_heads, features, strict=True))
        if self.config.prediction_hand_over:
            level = per_sample(log_snr, sample)[:, None, None, None]
            hidden_states = silu(self.norm_out(features[0]))
            x = diffusion.x_from_v(sample.float(), self.proj_out(hidden_states).float(), level)
            log_variance = self.variance_out(hidden_states) + self.variance_embedding(embedding)[:, :, None, None]
            variance = torch.sigmoid(-level) * torch.exp(log_variance.float())
            # A copy: at a refresh the denoiser's own sample, given twice, would be another graph to a compiler.
            context = (*context, sample.to(torch.float32, copy=True), x, variance)
        return UViTContextEncoderOutput(context=context) if return_dict else (context,)


class UViTDenoiser(UViTNetwork):
    """Light network of a pair, or with `context_channels=None` the single-rate network: predicts velocity.

    Args:
        sample_size: Side of the square images it is trained on, or (height, width). Other sizes work if they are divisible
            by patch size times downsampling.
        in_channels: Image channels.
        patch_size: Side of the patches that the highest level works on.
        num_classes: Number of classes, or `None` for an unconditional model.
        level_channels: Width of each level, from the highest resolution to the middle.
        level_types: "res", "transformer" or "depthwise" for each level.
        level_blocks: Number of blocks that each level has going down, and again going up. The last entry is the number of
            blocks in the middle.
        attention_head_dim: Channels of one attention head.
        embedding_dim: Width of the embedding of noise level and class or text.
        dropout: Dropout rate in transformer blocks.
        context_channels: Width of the context at every level; `None` for a network that takes none.
        prediction_hand_over: Whether the context ends with z_τ, the encoder's prediction x̂ and its variance.
        cross_attention_dim: Width of the tokens of a text, for a model of text; `None` for one of classes or of nothing.
        text_length: Number of tokens of the texts that it is trained on, filled up or cut to it.
        text_is_masked: Whether the text encoder was told which tokens fill a text up.
        text_is_lowered: Whether it is trained on texts in lower case, without spaces at their ends.
        attends_to_text: Whether transformer levels attend to its tokens. Otherwise the network sees one embedding of the
            whole text.
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
        cross_attention_dim: int | None = None,
        text_length: int = 77,
        text_is_masked: bool = True,
        text_is_lowered: bool = False,
        attends_to_text: bool = True,
    ):
        super().__init__()
        # Beside z_t the trunk sees the updated prediction, as v and as x, and how far the update moved it.
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
            nn.init.zeros_(cast(nn.Conv2d, projection).weight)

    @classmethod
    def from_encoder(cls, encoder: UViTContextEncoder) -> "UViTDenoiser":
        """Turn the encoder of a pair back into a single-rate network that predicts what it hands over.

        Args:
            encoder: An encoder with `prediction_hand_over`; it is left as it is.

        Raises:
            ValueError: If it hands over no prediction.
        """
        if not encoder.config.prediction_hand_over:
            raise ValueError("This encoder hands over no prediction, so it draws nothing alone.")
        config = {key: encoder.config[key] for key in cls._get_init_keys(cls) if key in encoder.config}
        denoiser = cls(**{**config, "context_channels": None, "prediction_hand_over": False})
        learned = encoder.state_dict()
        denoiser.load_state_dict({name: learned[name] for name in denoiser.state_dict()})
        denoiser.origin = encoder.origin
        same = denoiser.dtype == encoder.dtype  # the host warns of every cast
        return denoiser.to(encoder.device).eval() if same else denoiser.to(encoder.device, encoder.dtype).eval()

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
        return diffusion.v_from_x(z_tau, x, per_sample(context_log_snr, z_tau)[:, None, None, None])

    def forward(
        self,
        sample: Tensor,
        log_snr: Tensor | float,
        condition: Condition = None,
        context: tuple[Tensor, ...] | None = None,
        context_log_snr: Tensor | float | None = None,
        return_dict: bool = True,
    ) -> UViTDenoiserOutput | tuple[Tensor]:
        """Predict the velocity of noisy images.

        Args:
            sample: Noisy images z_t [B, C, H, W].
            log_snr: Their log-SNR λ_t, a scalar or [B].
            condition: Class of each image [B], `num_classes` being the null label; `None` for all null. For a model of text
                a [`Text`], or what `project_condition` made of it.
            context: What `project_context` made of the context of z_τ; `None` for the context-free branch.
            context_log_snr: Log-SNR λ_τ ≤ λ_t of the image that the context was computed from, a scalar or [B].
            return_dict: Whether to return an output object or a plain tuple.

        Raises:
            ValueError: If only one of `context` and `context_log_snr` is given, or the network takes none.
        """
        if (context is None) != (context_log_snr is None):
            raise ValueError("context and context_log_snr go together: give both or neither.")
        embedding, text = self._embed(sample, log_snr, condition)
        if context is not None and context_log_snr is not None:
            if self.config.context_channels is None:
                raise ValueError("This denoiser takes no context (context_channels=None).")
            embedding = embedding + self.context_noise_embedding(per_sample(context_log_snr, sample), sample.dtype)
        hidden_states, start = sample, None
        if self.config.prediction_hand_over:
            start, hidden_states = self._update_prediction(sample, log_snr, context, context_log_snr)
            context = None if context is None else context[: len(self.context_proj)]
        features = self.trunk(hidden_states, silu(embedding), context, text)
        velocity = self.proj_out(silu(self.norm_out(features[0])))
        if start is not None:
            velocity = start + velocity
        return UViTDenoiserOutput(sample=velocity) if return_dict else (velocity,)

    def _update_prediction(
        self,
        sample: Tensor,
        log_snr: Tensor | float,
        context: tuple[Tensor, ...] | None,
        context_log_snr: Tensor | float | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Velocity of the encoder's prediction after its update by z_t, and the trunk's input [B, 4 C, H, W]."""
        if context is None or context_log_snr is None:
            return None, torch.cat([sample, torch.zeros_like(sample).repeat(1, 3, 1, 1)], dim=1)
        z_tau, x, variance = context[len(self.context_proj) :]
        z_t, level = sample.float(), per_sample(log_snr, sample)[:, None, None, None]
        level_tau = per_sample(context_log_snr, sample)[:, None, None, None]
        updated = diffusion.gaussian_update(z_t, z_tau, x, variance, level, level_tau)
        velocity = diffusion.v_from_x(z_t, updated, level)
        moved = (updated - x) * torch.exp(-torch.nn.functional.logsigmoid(-level) / 2)  # in units of σ_t
        parts = [velocity, updated, moved]
        return velocity.to(sample.dtype), torch.cat([sample, *(part.to(sample.dtype) for part in parts)], dim=1)
