from diffusers_dualrate import DualRateScheduler  # noqa: F401
