"""The noise process that a network of diffusers was trained in, and the closed forms that lead from it to ours.

Every Gaussian process is variance-preserving up to a scale. So a network that predicts noise, image, velocity or flow at a
timestep gives a velocity v at a log-SNR λ. With z = α x + σ ε, α² + σ² = 1 and λ = log(α²/σ²):

    noise ε:        v = (ε − σ z) / α
    image x:        v = (α z − x) / σ
    flow u = ε − x: v = c u + (α − σ) c z, at s = σ / (α + σ) of x_s = (1 − s) x + s ε = c z, c = 1 / (α + σ)
"""

from collections.abc import Mapping
from typing import Self, cast

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from . import diffusion
from .ranges import check_choice, check_integer

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
"""What a network may predict: noise ε, velocity v, image x, or flow ε − x."""

# Of a scheduler's configuration, what says how the betas of a table were made.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
NOISE_ALONE = -80.0
"""Log-SNR that stands for −∞, where a table ends in noise alone."""
# Difference of log-SNR that rounding makes between two tables; the last entry may stand for noise alone.
_SAME_TABLE = 0.01
# What single precision cannot tell from a whole timestep.
_WHOLE = 1e-3


class NoiseProcess(ConfigMixin):
    """What a network was trained to predict, and at which timestep of which log-SNR.

    Args:
        prediction_type: One of `PREDICTIONS`. With "flow" the timestep is s times `num_train_timesteps`, and there is no
            table.
        num_train_timesteps: Number of timesteps.
        beta_start: First β of the table.
        beta_end: Last β of the table.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: Instead of the last three, the betas themselves.
        rescale_betas_zero_snr: Whether the table is rescaled to end in noise alone.

    Raises:
        ValueError: If there is no such process, or the network predicts noise and the table ends in noise alone.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        *,  # by name, since the host takes a value given by place for a default when it saves
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ):
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        check_integer("num_train_timesteps", num_train_timesteps, 2)
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "A network that predicts noise says nothing of an image in noise alone: rescale_betas_zero_snr=True needs "
                "prediction_type='v_prediction' or 'sample'."
            )
        self.log_snrs: Tensor | None = None
        """Log-SNR of every timestep [num_train_timesteps], falling; `None` for a flow."""
        if prediction_type != "flow":
            scheduler = DDPMScheduler(**{name: self.config[name] for name in ("num_train_timesteps", *_BETAS)})
            self.log_snrs = torch.logit(scheduler.alphas_cumprod.double()).clamp(min=NOISE_ALONE).float()

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> Self:
        """The process of one of diffusers' schedulers.

        Raises:
            ValueError: If its process is not one of these.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if name.startswith("FlowMatch"):
            return cls(prediction_type="flow", num_train_timesteps=config.num_train_timesteps)
        if getattr(scheduler, "alphas_cumprod", None) is None or config.get("use_flow_sigmas"):
            raise ValueError(f"{name} has no table of alphas_cumprod that says which noise level a timestep has.")
        said = {key: config[key] for key in _BETAS if config.get(key) is not None}
        if not said:  # ours has a table, too
            said = {"trained_betas": scheduler.betas.tolist()}
        prediction_type = config.get("prediction_type", "epsilon")
        process = cls(prediction_type=prediction_type, num_train_timesteps=config.num_train_timesteps, **said)
        table = torch.logit(torch.as_tensor(scheduler.alphas_cumprod).double()).clamp(min=NOISE_ALONE).float()
        ours = cast(Tensor, process.log_snrs)
        if ours.shape != table.shape or not torch.allclose(ours[:-1], table[:-1], atol=_SAME_TABLE):
            raise ValueError(f"The betas in the configuration of {name} do not give its table of alphas_cumprod.")
        return process

    @property
    def table(self) -> Mapping:
        """The process as arguments of an in-tree variance-preserving scheduler, whose networks predict v.

        Raises:
            ValueError: If it is a flow, which has no table.
        """
        if self.log_snrs is None:
            raise ValueError("A flow has no table of betas: sample it with DualRateScheduler.")
        names = ("num_train_timesteps", *(name for name in _BETAS if self.config[name] is not None))
        return {name: self.config[name] for name in names} | {"prediction_type": "v_prediction"}

    def timestep(self, log_snr: Tensor) -> Tensor:
        """The timestep [B] of a log-SNR [B], between two of the table where it lies between them.

        A log-SNR beyond the table has the timestep of its end: the network knows nothing beyond.
        """
        if self.log_snrs is None:
            alpha, sigma = diffusion.alpha_sigma(log_snr)
            return sigma / (alpha + sigma) * self.config.num_train_timesteps
        table = self.log_snrs.to(log_snr.device)
        last = len(table) - 1
        later = torch.searchsorted(-table, -log_snr.float()).clamp(1, last)
        high, low = table[later - 1], table[later]
        timestep = later - 1 + ((high - log_snr) / (high - low)).clamp(0, 1)
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < _WHOLE, whole, timestep)

    def scale(self, log_snr: Tensor) -> Tensor:
        """The factor [B] that turns z at a log-SNR [B] into the network's input."""
        if self.log_snrs is not None:
            return torch.ones_like(log_snr)
        alpha, sigma = diffusion.alpha_sigma(log_snr)
        return 1 / (alpha + sigma)

    def velocity(self, output: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
        """Convert a network's output at z to velocity, both [B, C, H, W].

        Args:
            output: What the network predicted.
            z: Noisy image [B, C, H, W], variance-preserving.
            log_snr: Its log-SNR, of a shape that goes with it.
        """
        alpha, sigma = diffusion.alpha_sigma(log_snr)
        if self.config.prediction_type == "epsilon":
            return (output - sigma * z) / alpha
        if self.config.prediction_type == "sample":
            return (alpha * z - output) / sigma
        if self.config.prediction_type == "flow":
            return (output + (alpha - sigma) * z) / (alpha + sigma)
        return output
