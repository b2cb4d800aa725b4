from diffusers_dualrate import UViTDenoiser  # noqa: F401
