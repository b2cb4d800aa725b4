"""Dual-Rate Diffusion for diffusers: a heavy context encoder a few times per image, a light denoiser at every step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .hosts import HostNetwork
    from .models import UViTContextEncoder, UViTDenoiser
    from .noise_process import NoiseProcess
    from .pipeline import DualRatePipeline
    from .refreshes import RefreshPlan, plan_refreshes
    from .scheduler import DualRateScheduler

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

_HOMES = {
    "DualRatePipeline": ".pipeline",
    "DualRateScheduler": ".scheduler",
    "HostNetwork": ".hosts",
    # The host looks up the base classes of our components under the name that model_index.json records for them.
    "ModelMixin": "diffusers",
    "NoiseProcess": ".noise_process",
    "RefreshPlan": ".refreshes",
    "SchedulerMixin": "diffusers",
    "UViTContextEncoder": ".models",
    "UViTDenoiser": ".models",
    "plan_refreshes": ".refreshes",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: torch and diffusers take seconds, which no `--help` should wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
