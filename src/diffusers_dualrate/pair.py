"""Networks and scheduler as losses take them: one module with one forward, and the schedule as functions of time."""

from collections.abc import Callable
from typing import Any, cast

from diffusers import ModelMixin
from torch import Tensor, nn

from .conditions import Condition
from .hosts import HostNetwork
from .losses import Schedule
from .models import UViTContextEncoder, UViTDenoiser
from .scheduler import DualRateScheduler


class TrainablePair(nn.Module):
    """Both networks of a pair, or a single-rate one alone, as one module with one `forward`.

    One `prepare`, one clip and one EMA call then serve both, and wrappers such as DDP see every call.
    """

    denoiser: UViTDenoiser | HostNetwork
    context_encoder: UViTContextEncoder | HostNetwork | None

    def __init__(
        self,
        denoiser: UViTDenoiser | HostNetwork,
        context_encoder: UViTContextEncoder | HostNetwork | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.context_encoder = context_encoder

    def enable_gradient_checkpointing(self) -> None:
        """Compute features twice, in every network, to save memory."""
        for network in self.children():
            cast(ModelMixin, network).enable_gradient_checkpointing()

    def forward(self, loss_function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call `loss_function(denoise, encode, ...)` with the networks as the callables that losses take."""
        encode = None if self.context_encoder is None else self.encode
        return loss_function(self.denoise, encode, *args, **kwargs)

    def encode(self, z: Tensor, log_snr: Tensor, condition: Condition) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Projected context of z_τ, and the encoder's own prediction x̂ where it hands one over."""
        assert self.context_encoder is not None  # else nobody is handed this method
        context = self.denoiser.project_context(self.context_encoder(z, log_snr, condition).context)
        return context, self.denoiser.handed_over_prediction(context)

    def denoise(
        self,
        z: Tensor,
        log_snr: Tensor,
        condition: Condition,
        context: Any,
        context_log_snr: Tensor | None,
    ) -> Tensor:
        """Velocity predicted from z_t and, where there is one, the projected context."""
        return self.denoiser(z, log_snr, condition, context, context_log_snr).sample


def schedule_of(scheduler: DualRateScheduler, bias: float = 0.0) -> Schedule:
    """The noise schedule as a function of time in [0, 1], as losses take it, with the bias of their weight."""

    def log_snr(t: Tensor) -> Tensor:
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    def log_snr_rate(t: Tensor) -> Tensor:
        return scheduler.log_snr_rate(t * scheduler.config.num_train_timesteps)

    return Schedule(log_snr, log_snr_rate, bias)
