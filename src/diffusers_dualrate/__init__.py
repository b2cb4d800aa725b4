"""Dual-Rate Diffusion for diffusers: a heavy context encoder a few times per image, a light denoiser at every step."""

__version__ = "0.1.0"

from diffusers import ModelMixin, SchedulerMixin

from .hosts import HostNetwork
from .models import UViTContextEncoder, UViTDenoiser
from .noise_process import NoiseProcess
from .pipeline import DualRatePipeline
from .refreshes import RefreshPlan, plan_refreshes
from .registration import register
from .scheduler import DualRateScheduler

# The host looks up the base classes of our components under the name that model_index.json records for them.
register(__name__)

__all__ = [
    "DualRatePipeline",
    "DualRateScheduler",
    "HostNetwork",
    "ModelMixin",
    "NoiseProcess",
    "RefreshPlan",
    "SchedulerMixin",
    "UViTContextEncoder",
    "UViTDenoiser",
    "plan_refreshes",
]
