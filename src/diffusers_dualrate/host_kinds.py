"""Networks of diffusers that can be taken as they are: how each class is called, and what its configuration says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .conditions import Condition, Text

# Pixels on the side of a latent of the autoencoder that PixArt was trained with.
_PIXART_COMPRESSION = 8


@dataclass(frozen=True)
class Kind:
    """How to call the networks of one class of diffusers, and what their configuration says.

    Args:
        stride: What height and width must be divisible by.
        taps: Names of the submodules whose outputs are feature maps.
        call: (network, z, timestep, condition) to the output.
        num_classes: Number of classes.
        has_null_class: Whether the network knows what stands for no class, or takes text.
        text_dim: Width of a text's tokens; `None` for a network without text.
        text_length: Number of tokens of its texts.
        text_is_masked: Whether what fills a text up is left out, in the text encoder and here.
        text_is_lowered: Whether it learned from texts in lower case, without spaces at their ends.
        refused: Options that would ask for more than a text.
        is_square: Whether it draws squares only.
    """

    stride: Callable[[Any], int]
    taps: Callable[[nn.Module], list[str]]
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    num_classes: Callable[[Any], int | None] = lambda config: None
    has_null_class: bool = True
    text_dim: Callable[[Any], int | None] = lambda config: None
    text_length: int = 77
    text_is_masked: bool = True
    text_is_lowered: bool = False
    refused: tuple[str, ...] = ()
    is_square: bool = False


def _unet_taps(network: nn.Module) -> list[str]:
    taps = []
    for i, block in reversed(list(enumerate(cast(nn.ModuleList, network.up_blocks)))):
        last = "attentions" if getattr(block, "attentions", None) else "resnets"
        taps.append(f"up_blocks.{i}.{last}.{len(getattr(block, last)) - 1}")
    return taps


def _last_transformer_block(network: nn.Module) -> list[str]:
    return [f"transformer_blocks.{len(cast(nn.ModuleList, network.transformer_blocks)) - 1}"]


def _call_pixart(network: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    text = cast(Text, condition)
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.use_additional_conditions:
        height, width = (side * _PIXART_COMPRESSION for side in z.shape[2:])
        sizes["resolution"] = torch.tensor([height, width], device=z.device, dtype=z.dtype).repeat(len(z), 1)
        sizes["aspect_ratio"] = torch.tensor([height / width], device=z.device, dtype=z.dtype).repeat(len(z), 1)
    options = {"encoder_attention_mask": text.mask.long(), "timestep": t, "added_cond_kwargs": sizes}
    return network(z, encoder_hidden_states=text.tokens, **options).sample


def _call_sd3(network: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    text = cast(Text, condition)
    if text.pooled is None:
        raise ValueError(
            "A SD3Transformer2DModel takes a text with pooled embeddings: give pooled_prompt_embeds beside prompt_embeds."
        )
    options = {"encoder_hidden_states": text.tokens, "pooled_projections": text.pooled, "timestep": t}
    return network(z, **options).sample


KINDS = {
    "UNet2DModel": Kind(
        num_classes=lambda config: config.num_class_embeds,
        has_null_class=False,
        stride=lambda config: 2 ** (len(config.block_out_channels) - 1),
        taps=_unet_taps,
        call=lambda network, z, t, labels: network(z, t, labels).sample,
    ),
    "DiTTransformer2DModel": Kind(
        is_square=True,
        num_classes=lambda config: config.num_embeds_ada_norm,
        stride=lambda config: config.patch_size,
        taps=_last_transformer_block,
        call=lambda network, z, t, labels: network(z, timestep=t, class_labels=labels).sample,
    ),
    "UNet2DConditionModel": Kind(
        text_dim=lambda config: config.cross_attention_dim,
        text_is_masked=False,
        refused=("num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"),
        stride=lambda config: 2 ** (len(config.block_out_channels) - 1),
        taps=_unet_taps,
        call=lambda network, z, t, text: network(z, t, cast(Text, text).tokens).sample,
    ),
    "PixArtTransformer2DModel": Kind(
        text_dim=lambda config: config.caption_channels,
        text_length=120,
        text_is_lowered=True,
        stride=lambda config: config.patch_size,
        taps=_last_transformer_block,
        call=_call_pixart,
    ),
    "SD3Transformer2DModel": Kind(
        text_dim=lambda config: config.joint_attention_dim,
        text_length=333,
        text_is_masked=False,
        stride=lambda config: config.patch_size,
        taps=lambda network: [],  # the last block hands out two kinds of tokens
        call=_call_sd3,
    ),
}
"""Classes of diffusers that can be taken as they are; one more is one entry more."""
