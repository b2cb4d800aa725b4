from diffusers_dualrate import DualRatePipeline  # noqa: F401
