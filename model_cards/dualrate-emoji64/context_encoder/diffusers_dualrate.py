from diffusers_dualrate import UViTContextEncoder  # noqa: F401
