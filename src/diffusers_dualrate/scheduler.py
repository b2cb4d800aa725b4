"""`DualRateScheduler`: the ancestral sampler of a variance-preserving process, and when to refresh the context.

The host's contract over `diffusion.py`. A `timestep` is the time t in [0, 1] times `num_train_timesteps`, a float.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import diffusion


def refresh_plan(num_inference_steps: int, num_context_steps: int) -> list[bool]:
    """Which of N steps recompute the context so that K refreshes are spread evenly: steps floor(j N / K), j < K.

    Args:
        num_inference_steps: N, evaluations of the denoiser.
        num_context_steps: K, evaluations of the context encoder, 1 ≤ K ≤ N.
    """
    if not 1 <= num_context_steps <= num_inference_steps:
        raise ValueError(
            f"num_context_steps must be between 1 and num_inference_steps={num_inference_steps}, "
            f"got {num_context_steps}."
        )
    steps = {j * num_inference_steps // num_context_steps for j in range(num_context_steps)}
    return [step in steps for step in range(num_inference_steps)]


def explicit_refresh_plan(num_inference_steps: int, refresh_steps: Sequence[int]) -> list[bool]:
    """Which of N steps recompute the context when the steps are named: 0 first, then in rising order, below N."""
    steps = list(refresh_steps)
    if any(not hasattr(step, "__index__") for step in steps):
        raise ValueError(f"refresh_steps must be integers, got {steps}.")
    if not steps or steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"refresh_steps must start with 0 and rise, got {steps}.")
    if steps[-1] >= num_inference_steps:
        raise ValueError(f"refresh_steps must lie below num_inference_steps={num_inference_steps}, got {steps}.")
    return [step in set(steps) for step in range(num_inference_steps)]


@dataclass
class DualRateSchedulerOutput(BaseOutput):
    """Output of [`DualRateScheduler.step`].

    Args:
        prev_sample: Image at the next, less noisy timestep [B, C, H, W].
        pred_original_sample: Predicted clean image, clipped where the scheduler clips [B, C, H, W].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class DualRateScheduler(SchedulerMixin, ConfigMixin):
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
        second_order: Whether a step goes by the predicted clean image carried on half a step along its change since the
            step before, as the stochastic DPM-Solver++(2M) does (arXiv 2211.01095), for the same chain in fewer steps.
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
        if not log_snr_min < log_snr_max:
            raise ValueError(f"log_snr_min must lie below log_snr_max, got {log_snr_min} and {log_snr_max}.")
        sizes = {
            "num_train_timesteps": num_train_timesteps,
            "image_size": image_size,
            "clip_sample_range": clip_sample_range,
        }
        sizes |= {"noise_low": noise_low, "noise_high": noise_high}
        for name, size in sizes.items():
            if size is not None and not size > 0:
                raise ValueError(f"{name} must be positive, got {size}.")
        if not 0 <= variance_interpolation <= 1:
            raise ValueError(f"variance_interpolation must lie in [0, 1], got {variance_interpolation}.")
        # Not an argument, since the networks predict nothing else, but in-tree schedulers made from this one's
        # configuration must know it.
        self.register_to_config(prediction_type="v_prediction")
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._set_timesteps(torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64), None)
        self.refreshes_context = [True] * num_train_timesteps

    def __len__(self) -> int:
        return self.config.num_train_timesteps

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
    ) -> None:
        """Choose the steps of a run, and which of them refresh the context.

        Args:
            num_inference_steps: Number N of steps, uniform in time.
            device: Where the run's tensors live.
            timesteps: Instead of N, the timesteps themselves, falling within (0, num_train_timesteps].
            num_context_steps: Number K of refreshes, spread evenly; `None` refreshes at every step.
            refresh_steps: Instead of K, the indices of the steps that refresh.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either num_inference_steps or timesteps.")
        if timesteps is None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
            times = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
            times = times * self.config.num_train_timesteps
        else:
            # In the precision that `step` compares them in.
            times = torch.as_tensor(timesteps, dtype=torch.float32).cpu().double()
            falls = times.ndim == 1 and len(times) > 0 and bool((times.diff() < 0).all())
            if not (falls and len(self) >= times[0] and times[-1] > 0):  # nan compares false
                raise ValueError(f"timesteps must fall and lie within (0, {len(self)}], got {times.tolist()}.")
        self.refreshes_context = plan_refreshes(len(times), num_context_steps, refresh_steps)
        self.num_inference_steps = len(times)
        self._set_timesteps(times, device)

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
        self._last_x = None

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
    ) -> DualRateSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw z_s ~ q(z_s | z_t, x) for the predicted clean image x, s being the timestep after `timestep`.

        Where a step stands follows from `timestep` alone, by comparison on the device: it is that of the nearest of
        `timesteps`, which a loop may have rounded by less than half a step. Only of second order does it keep a state,
        the predicted image, so steps are then taken in turn and `set_timesteps` begins a run.

        Args:
            model_output: Predicted velocity at `timestep` [B, C, H, W].
            timestep: One of `timesteps`, rounded or not.
            sample: Noisy image z_t [B, C, H, W].
            generator: Source of noise; in a list, one for each image.
            return_dict: Whether to return an output object or a plain tuple.
        """
        index = (self.timesteps - timestep).abs().argmin().reshape(1)
        alpha, sigma, factor_z, factor_x, std, carried = self._table.index_select(1, index).unbind()
        z, v = sample.float(), model_output.float()
        x = alpha * z - sigma * v
        if self.config.clip_sample:
            x = x.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        guess = x
        if self.config.second_order:
            guess = x if self._last_x is None else x + carried * (x - self._last_x)
            self._last_x = x
        noise = randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        prev_sample = (factor_z * z + factor_x * guess + std * noise).to(sample.dtype)
        x = x.to(sample.dtype)
        if not return_dict:
            return prev_sample, x
        return DualRateSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x)

    def _log_snr_like(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        log_snr = self.log_snr(timesteps.to(device=sample.device, dtype=torch.float32))
        return log_snr.reshape(-1, *[1] * (sample.ndim - 1))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy images z = α x + σ ε at timesteps [B]."""
        log_snr = self._log_snr_like(timesteps, original_samples)
        return diffusion.add_noise(original_samples, noise, log_snr).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocities v = α ε − σ x of clean images `sample` at timesteps [B]."""
        return diffusion.v_from_x_eps(sample, noise, self._log_snr_like(timesteps, sample)).to(sample.dtype)


def plan_refreshes(
    num_inference_steps: int, num_context_steps: int | None = None, refresh_steps: Sequence[int] | None = None
) -> list[bool]:
    """Which of N steps recompute the context: K spread evenly, or the named ones, or all where neither is given."""
    for name, count in (("num_inference_steps", num_inference_steps), ("num_context_steps", num_context_steps)):
        if not (count is None or hasattr(count, "__index__")):
            raise ValueError(f"{name} must be an integer, got {count!r}.")
    if refresh_steps is None:
        return refresh_plan(
            num_inference_steps, num_inference_steps if num_context_steps is None else num_context_steps
        )
    if num_context_steps is not None:
        raise ValueError("Give either num_context_steps or refresh_steps.")
    return explicit_refresh_plan(num_inference_steps, refresh_steps)


def log_snr_of_steps(scheduler: SchedulerMixin) -> Tensor:
    """Log-SNR [N] at every step of a run, on the CPU, for ours or any in-tree variance-preserving scheduler.

    Raises:
        ValueError: If the scheduler has neither `sigmas` nor `alphas_cumprod` to read it from, or steps of noise alone.
    """
    if isinstance(scheduler, DualRateScheduler):
        return scheduler.step_log_snrs
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod to read log-SNR from.")
    timesteps = scheduler.timesteps.cpu()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        # Solvers that place their steps in log-SNR round the timesteps but not these: σ/α in our terms.
        return -2 * torch.log(torch.as_tensor(sigmas[:-1]).cpu().float())
    log_snrs = torch.logit(scheduler.alphas_cumprod.cpu().double()[timesteps.long()]).float()
    if not log_snrs.isfinite().all():
        raise ValueError(
            f"{type(scheduler).__name__} has a step without any signal, whose log-SNR no network knows: leave out "
            "rescale_betas_zero_snr."
        )
    return log_snrs
