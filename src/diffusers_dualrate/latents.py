"""Latent spaces: how images become latents, and latents images, with an autoencoder of diffusers.

Networks know latents centred and scaled by the autoencoder's own factors: z = (own − shift) · scale. An autoencoder that
gives a Gaussian for each image gives its mean and deviation; training draws from it. Others give the latents themselves.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor


def compression_of(vae: ModelMixin | None) -> int:
    """Pixels on the side of a latent; 1 where there is no autoencoder."""
    if vae is None:
        return 1
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return ratio or 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: ModelMixin, height: int, width: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of images.

    Raises:
        ValueError: If images of this size have none.
    """
    ratio = compression_of(vae)
    if height % ratio or width % ratio:
        raise ValueError(f"The vae takes images whose sides are divisible by {ratio}, got {height} and {width}.")
    return vae.config.latent_channels, height // ratio, width // ratio


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
    scale, shift = _factors(vae)
    with torch.no_grad():
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()


def moments_of(vae: ModelMixin, images: Tensor) -> Tensor:
    """Mean and deviation [B, 2 C', h, w] of the latents of images [B, C, r h, r w], or the latents [B, C', h, w] alone.

    Neither is centred or scaled yet.
    """
    if vae.device != images.device:
        vae.to(images.device)
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.dtype))
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is not None:
        return torch.cat([posterior.mean, posterior.std], dim=1).float()
    return (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()


def draw_latents(vae: ModelMixin, moments: Tensor, seeds: Sequence[int]) -> Tensor:
    """Latents [B, C', h, w] as networks know them, of what `moments_of` gives.

    Args:
        vae: The autoencoder.
        moments: Mean and deviation, or the latents alone.
        seeds: One for each image; drawing itself is on the CPU, so that devices agree.
    """
    scale, shift = _factors(vae)
    channels = vae.config.latent_channels
    own = moments[:, :channels]
    if moments.shape[1] > channels:
        generator, noise = torch.Generator(), torch.empty(own.shape)
        for row, seed in enumerate(seeds):
            noise[row].normal_(generator=generator.manual_seed(seed))
        own = own + moments[:, channels:] * noise.to(own.device)
    return (own - shift) * scale


def _factors(vae: ModelMixin) -> tuple[float, float]:
    return getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0


def encode(vae: ModelMixin, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Latents [B, C', h, w] as networks know them of images [B, C, r h, r w], drawn as `draw_latents` does."""
    return draw_latents(vae, moments_of(vae, images), seeds)
