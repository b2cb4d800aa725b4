"""Latent spaces: how a pipeline turns latents into images, with an autoencoder of diffusers."""

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor


def compression_of(vae: ModelMixin | None) -> int:
    """Pixels on the side of a latent; 1 where there is no autoencoder."""
    if vae is None:
        return 1
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return ratio or 2 ** (len(vae.config.block_out_channels) - 1)


def check_vae(vae: ModelMixin | None, in_channels: int, scheduler: SchedulerMixin) -> None:
    """Refuse an autoencoder of other latents than the networks', or a scheduler that would clip them.

    Args:
        vae: The autoencoder; `None` for networks of pixels.
        in_channels: Channels that the networks take.
        scheduler: The pipeline's.
    """
    if vae is None:
        return
    module = getattr(vae, "_orig_mod", vae)  # what `torch.compile` wrapped
    name = type(module).__name__
    if not (hasattr(module, "decode") and getattr(module.config, "latent_channels", None)):
        raise ValueError(f"vae must be an autoencoder of diffusers, such as AutoencoderKL, got {name}.")
    if module.config.latent_channels != in_channels:
        raise ValueError(
            f"The vae does not fit: it has latents of {module.config.latent_channels} channels, and the networks take "
            f"{in_channels}."
        )
    if scheduler.config.get("clip_sample"):
        raise ValueError(
            "clip_sample=True would clip latents, which have no bounds: give a scheduler with clip_sample=False."
        )


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Images [B, C, height, width] in about [-1, 1] of latents [B, C', height / r, width / r] as networks know them."""
    config = vae.config
    own = latents / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)
    with torch.no_grad():
        return vae.decode(own.to(vae.dtype)).sample.float()
