"""`DualRateScheduler`: the ancestral sampler of a variance-preserving process, and when to refresh the context.

The host's contract over `diffusion.py` and `refreshes.py`. A `timestep` is the time t in [0, 1] times `num_train_timesteps`, a float.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import diffusion
from .ranges import check_boolean, check_integer, check_number
from .refreshes import MOST_STEPS, count_steps_above, plan_refreshes
from .repositories import RepositoryMixin

# Beyond, what is left of image or noise is no longer a number of single precision.
_LARGEST_LOG_SNR = 80.0


@dataclass
class DualRateSchedulerOutput(BaseOutput):
    """Output of [`DualRateScheduler.step`].

    Args:
        prev_sample: Image at the next, less noisy timestep [B, C, H, W].
        pred_original_sample: Predicted clean image, clipped where the scheduler clips [B, C, H, W].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class DualRateScheduler(RepositoryMixin, SchedulerMixin, ConfigMixin):
    """Ancestral sampling, the Markov chain whose law a pair is trained on, with steps uniform in time.

    Of first order it is the paper's sampler; of second order it needs far fewer steps.

    Args:
        num_train_timesteps: Timestep of pure noise, t = 1.
        log_snr_min: Log-SNR at t = 1, before any shift.
        log_snr_max: Log-SNR at t = 0, before any shift.
        image_size: Side of the images whose resolution the schedule is shifted for; `None` for the plain cosine.
        noise_low: Resolution that the shift refers to at t = 1.
        noise_high: Resolution that the shift refers to at t = 0.
        variance_interpolation: γ in [0, 1] between the posterior's variance (0) and the forward transition's.
        clip_sample: Whether predicted clean images are clipped.
        clip_sample_range: Largest magnitude of a clipped clean image.
        second_order: Whether to extrapolate the predicted image by half a step, from its change since the previous step
            (stochastic DPM-Solver++(2M), arXiv 2211.01095).
    """

    _compatibles = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        log_snr_min: float = -10.0,
        log_snr_max: float = 10.0,
        image_size: int | None = None,
        noise_low: int = 32,
        noise_high: int = 32,
        variance_interpolation: float = 0.0,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        second_order: bool = False,
    ):
        check_integer("num_train_timesteps", num_train_timesteps, 1, MOST_STEPS)
        for name, log_snr in (("log_snr_min", log_snr_min), ("log_snr_max", log_snr_max)):
            check_number(name, log_snr, -_LARGEST_LOG_SNR, _LARGEST_LOG_SNR)
        if not log_snr_min < log_snr_max:
            raise ValueError(f"log_snr_min must lie below log_snr_max, got {log_snr_min} and {log_snr_max}.")
        if image_size is not None:
            check_number("image_size", image_size, above=0)
        check_number("noise_low", noise_low, above=0)
        check_number("noise_high", noise_high, above=0)
        check_number("variance_interpolation", variance_interpolation, 0, 1)
        check_boolean("clip_sample", clip_sample)
        check_number("clip_sample_range", clip_sample_range, above=0)
        check_boolean("second_order", second_order)
        # Not an argument, since the networks predict nothing else, but in-tree schedulers made from this one's
        # configuration must know it.
        self.register_to_config(prediction_type="v_prediction")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._set_timesteps(torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64), None)
        self.refresh_plan = plan_refreshes(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def refreshes_context(self) -> list[bool]:
        """Whether each step of the run refreshes the context."""
        return list(self.refresh_plan)

    def log_snr(self, timestep: Tensor) -> Tensor:
        """Log-SNR λ of timesteps of any shape; the only map from time to noise level."""
        config, t = self.config, timestep / self.config.num_train_timesteps
        log_snr = diffusion.cosine_log_snr(t, log_snr_min=config.log_snr_min, log_snr_max=config.log_snr_max)
        if config.image_size is None:
            return log_snr
        return log_snr + diffusion.resolution_shift(
            t, image_size=config.image_size, noise_low=config.noise_low, noise_high=config.noise_high
        )

    def log_snr_rate(self, timestep: Tensor) -> Tensor:
        """−dλ/dt per unit of time t, not per timestep: the density of noise levels in the loss."""
        config, t = self.config, timestep / self.config.num_train_timesteps
        rate = diffusion.cosine_log_snr_rate(t, log_snr_min=config.log_snr_min, log_snr_max=config.log_snr_max)
        if config.image_size is None:
            return rate
        return rate + diffusion.resolution_shift_rate(noise_low=config.noise_low, noise_high=config.noise_high)

    def log_snr_at(self, share: float) -> Tensor:
        """Log-SNR [] at a share in [0, 1] of the chain; 1 is its noisy end."""
        return self.log_snr(torch.tensor(share * len(self), dtype=torch.float64))

    @property
    def alphas_cumprod(self) -> Tensor:
        """α² at timesteps 1, 2, ... [num_train_timesteps], as in-tree schedulers tabulate it."""
        return torch.sigmoid(self.log_snr(torch.arange(1, len(self) + 1, dtype=torch.float64)))

    @property
    def betas(self) -> Tensor:
        """The process for in-tree schedulers: `trained_betas=scheduler.betas.tolist()` gives them this schedule."""
        alphas_cumprod = self.alphas_cumprod
        return 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        num_context_steps: int | None = None,
        refresh_steps: Sequence[int] | None = None,
        context_from: float | None = None,
    ) -> None:
        """Choose the steps of a run, and which of them refresh the context.

        Args:
            num_inference_steps: Number N of steps, uniform in time.
            device: Where the run's tensors live.
            timesteps: Instead of N, the timesteps themselves, falling within (0, num_train_timesteps].
            num_context_steps: Number K of refreshes, spread evenly; `None` refreshes at every step.
            refresh_steps: Instead of K, the indices of the steps that refresh.
            context_from: Time t in (0, 1] of the first context: the steps above it refresh only where they are named.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either num_inference_steps or timesteps.")
        if timesteps is None:
            assert num_inference_steps is not None
            n = check_integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
            times = 1 - torch.arange(n, dtype=torch.float64) / n
            times = times * self.config.num_train_timesteps
        else:
            times = self._check_timesteps(timesteps)
        alone = 0
        if context_from is not None and refresh_steps is None:
            check_number("context_from", context_from, above=0, most=1)
            alone = count_steps_above(self.log_snr(times), context_from, float(self.log_snr_at(context_from)))
        self.refresh_plan = plan_refreshes(len(times), num_context_steps, refresh_steps, num_steps_alone=alone)
        self.num_inference_steps = len(times)
        self._set_timesteps(times, device)

    def _check_timesteps(self, timesteps: Sequence[float]) -> Tensor:
        given = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
        fits = isinstance(given, Sequence) and len(given) > 0 and all(isinstance(time, Real) for time in given)
        if fits:
            # In the precision that `step` compares them in.
            times = torch.tensor([float(time) for time in given]).double()
            fits = bool((times.diff() < 0).all() and len(self) >= times[0] and times[-1] > 0)  # nan compares false
        if not fits:
            raise ValueError(f"timesteps must fall and lie within (0, {len(self)}], got {given}.")
        return times

    def _set_timesteps(self, times: Tensor, device: str | torch.device | None) -> None:
        """Tabulate, in float64, what `step` needs at every time, so that a step is a look-up on the device."""
        log_snr = self.log_snr(times)
        log_snr_next = self.log_snr(torch.cat([times[1:], times.new_zeros(1)]))
        factor_z, factor_x, std = diffusion.posterior(
            log_snr, log_snr_next, variance_interpolation=self.config.variance_interpolation
        )
        # The last step returns the predicted clean image itself.
        factor_z[-1], factor_x[-1], std[-1] = 0.0, 1.0, 0.0
        # How far the change since the last step is carried on: half of this step by all of that, in log-SNR.
        carried = torch.zeros_like(std)
        if self.config.second_order:
            lengths = log_snr_next - log_snr
            carried[1:-1] = lengths[1:-1] / lengths[:-2] / 2
        table = torch.stack([*diffusion.alpha_sigma(log_snr), factor_z, factor_x, std, carried])
        self._table = table.to(device=device, dtype=torch.float32)
        self.timesteps = times.to(device=device, dtype=torch.float32)
        self.step_log_snrs = log_snr.float()
        self._last_x: Tensor | None = None
        self._steps_left = len(times)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the sample as it is; there for interchangeability with other schedulers."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DualRateSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw z_s ~ q(z_s | z_t, x) for the predicted clean image x, s being the timestep after `timestep`.

        The step is the entry of `timesteps` nearest to `timestep`, which may be rounded by less than half a step.
        First order keeps no state. Second order remembers the last prediction until the run's last step: take steps in
        order and call `set_timesteps` before each run.

        Args:
            model_output: Predicted velocity at `timestep` [B, C, H, W].
            timestep: One of `timesteps`, rounded or not.
            sample: Noisy image z_t [B, C, H, W].
            generator: Source of noise; in a list, one for each image.
            return_dict: Whether to return an output object or a plain tuple.
            variance_noise: Noise to take instead of drawing it [B, C, H, W].
        """
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":  # elsewhere a look would wait for it
            check_number("timestep", float(timestep), 0, len(self))
        index = (self.timesteps - timestep).abs().argmin().reshape(1)
        alpha, sigma, factor_z, factor_x, std, carried = self._table.index_select(1, index).unbind()
        z, v = sample.float(), model_output.float()
        x = alpha * z - sigma * v
        if self.config.clip_sample:
            x = x.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        guess = x
        if self.config.second_order:
            guess = x if self._last_x is None else x + carried * (x - self._last_x)
            self._steps_left -= 1
            self._last_x = x if self._steps_left > 0 else None  # no image outlives its run
        noise = variance_noise
        if noise is None:
            noise = randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        prev_sample = (factor_z * z + factor_x * guess + std * noise).to(sample.dtype)
        x = x.to(sample.dtype)
        if not return_dict:
            return prev_sample, x
        return DualRateSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x)

    def _log_snr_like(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        if timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps <= len(self))).all():  # nor NaN
            raise ValueError(f"timesteps must be finite numbers in [0, {len(self)}], got {timesteps.tolist()}.")
        log_snr = self.log_snr(timesteps.to(device=sample.device, dtype=torch.float32))
        return log_snr.reshape(-1, *[1] * (sample.ndim - 1))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy images z = α x + σ ε at timesteps [B]."""
        log_snr = self._log_snr_like(timesteps, original_samples)
        return diffusion.add_noise(original_samples, noise, log_snr).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocities v = α ε − σ x of clean images `sample` at timesteps [B]."""
        return diffusion.v_from_x_eps(sample, noise, self._log_snr_like(timesteps, sample)).to(sample.dtype)
