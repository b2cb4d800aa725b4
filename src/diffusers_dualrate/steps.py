"""The steps of one chain, under our scheduler or one of the host's: planned once, before anything is computed."""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from .defaults import SamplingDefaults
from .guidance import Guidance
from .noise_process import NOISE_ALONE
from .ranges import check_integer
from .refreshes import MOST_STEPS, RefreshPlan, count_steps_above, is_above, plan_refreshes
from .scheduler import DualRateScheduler


class ChainSteps(NamedTuple):
    """The steps of one chain.

    Attributes:
        scheduler: The chain's own scheduler, with its steps set.
        plan: Which steps refresh; none for a single-rate model. Steps before the first refresh see no context.
        log_snrs: Log-SNR [N] of each step, on the CPU.
    """

    scheduler: SchedulerMixin
    plan: RefreshPlan
    log_snrs: Tensor

    def guided_by(self, guidance: Guidance) -> list[bool]:
        """Whether guidance acts at each step."""
        return [guidance.acts_at(log_snr) for log_snr in self.log_snrs.tolist()]

    def refreshes_above(self, context_from: float) -> bool:
        """Whether a context is made of a noisier image than those at a time, a share of the chain."""
        steps = self.log_snrs[[i for i, refreshes in enumerate(self.plan) if refreshes]].tolist()
        return any(is_above(log_snr, float(_log_snr_at(self.scheduler, context_from))) for log_snr in steps)


def plan_steps(
    scheduler: SchedulerMixin,
    defaults: SamplingDefaults,
    num_inference_steps: int | None = None,
    num_context_steps: int | None = None,
    *,
    refresh_steps: Sequence[int] | None = None,
    timesteps: Sequence[float] | None = None,
    is_pair: bool = True,
    device: str | torch.device | None = None,
) -> ChainSteps:
    """Choose the steps of a chain: those that are asked for, or else the model's own.

    Args:
        scheduler: Ours, or any in-tree variance-preserving scheduler that predicts v. It stays as it is: the chain gets a
            copy.
        defaults: The model's own.
        num_inference_steps: Number N of steps.
        num_context_steps: Number K of refreshes.
        refresh_steps: Instead of K, the steps that refresh.
        timesteps: Instead of N, the timesteps themselves, falling.
        is_pair: Whether there is an encoder. A single-rate model has a plan without refreshes, and takes none.
        device: Where the chain's tensors live.

    Raises:
        ValueError: If the scheduler does not fit the networks, or there is no such chain. Also if the chain begins without
            context and the pair never learned to.
    """
    if num_inference_steps is None and timesteps is None:
        num_inference_steps = defaults.num_inference_steps
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError("Give either num_inference_steps or timesteps.")
    for name, value in (("num_context_steps", num_context_steps), ("refresh_steps", refresh_steps)):
        if value is not None and not is_pair:
            raise ValueError(f"{name} has no effect, since there is no context encoder: leave it out.")
    if num_context_steps is None and refresh_steps is None and num_inference_steps == defaults.num_inference_steps:
        refresh_steps = defaults.refresh_steps
    if isinstance(scheduler, DualRateScheduler):
        scheduler = copy.copy(scheduler)  # a chain replaces what it holds and changes nothing in place
        scheduler.set_timesteps(num_inference_steps, device, timesteps=timesteps)
    else:
        scheduler = _copy_in_tree(scheduler, device, num_inference_steps, timesteps)
    # Some solvers evaluate the networks more or less often than they were asked to.
    log_snrs = log_snr_of_steps(scheduler)
    n, alone = len(log_snrs), 0
    if is_pair and refresh_steps is None and defaults.context_from is not None:
        level = float(_log_snr_at(scheduler, defaults.context_from))
        alone = count_steps_above(log_snrs, defaults.context_from, level)
    if num_context_steps is None and refresh_steps is None and defaults.num_context_steps is not None:
        num_context_steps = min(defaults.num_context_steps, n - alone)
    plan = plan_refreshes(n, num_context_steps, refresh_steps, num_steps_alone=alone)
    plan = dataclasses.replace(plan, encoder_denoises=defaults.encoder_denoises)
    if not is_pair:
        plan = RefreshPlan((False,) * n)
    elif plan.num_steps_alone > 0:
        defaults.check_context_free(
            f"context_from={defaults.context_from}" if refresh_steps is None else f"refresh_steps={refresh_steps}"
        )
    if defaults.is_distilled:
        own = plan_steps(scheduler, dataclasses.replace(defaults, is_distilled=False), is_pair=is_pair).plan
        if plan != own or timesteps is not None:
            refreshes = f", K = {plan.num_context_steps}" if is_pair else ""
            defaults.warn_of_other_use(f"this plan of N = {n}{refreshes}")
        if not isinstance(scheduler, DualRateScheduler) or scheduler.config.second_order:
            defaults.warn_of_other_use("the steps of this scheduler")
    if isinstance(scheduler, DualRateScheduler):
        scheduler.refresh_plan = plan
    return ChainSteps(scheduler, plan, log_snrs)


def make_dpm_solver(scheduler: DualRateScheduler) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) for the process of a scheduler, with steps even in log-SNR: the fast solver to compare with.

    Raises:
        ValueError: If the process ends in noise alone.
    """
    if scheduler.betas[-1] >= 1:
        raise ValueError("DPM-Solver++ has no steps for a process that ends in noise alone: leave its steps out.")
    return DPMSolverMultistepScheduler(
        trained_betas=scheduler.betas.tolist(), prediction_type="v_prediction", use_lu_lambdas=True
    )


def _copy_in_tree(
    scheduler: SchedulerMixin,
    device: str | torch.device | None,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
) -> SchedulerMixin:
    """Copy one of the host's schedulers and set its steps."""
    name = type(scheduler).__name__
    if scheduler.config.get("prediction_type") != "v_prediction":
        raise ValueError(f"The networks predict v: give {name} prediction_type='v_prediction'.")
    most = scheduler.config.get("num_train_timesteps", MOST_STEPS)
    if timesteps is None:
        assert num_inference_steps is not None
        check_integer(f"num_inference_steps under {name}", num_inference_steps, 1, most)
    elif "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name} does not take timesteps: give num_inference_steps.")
    else:
        check_integer("the number of timesteps", len(timesteps), 1, most)
    scheduler = copy.deepcopy(scheduler)
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        scheduler.set_timesteps(timesteps=timesteps, device=device)
    return scheduler


def _log_snr_at(scheduler: SchedulerMixin, share: float) -> Tensor:
    """Log-SNR [] of a scheduler's process at a share in (0, 1] of the chain; 1 is its noisy end."""
    if isinstance(scheduler, DualRateScheduler):
        return scheduler.log_snr_at(share)
    # A scheduler made from our betas, as a pair needs one, has the same noise level there.
    table = scheduler.alphas_cumprod.cpu().double()
    return torch.logit(table[min(round(share * len(table)), len(table) - 1)])


def log_snr_of_steps(scheduler: SchedulerMixin) -> Tensor:
    """Log-SNR [N] at every step of a chain, on the CPU, for ours or any in-tree variance-preserving scheduler.

    Raises:
        ValueError: If the scheduler has neither `sigmas` nor `alphas_cumprod` to read it from, leaves the
            variance-preserving process, or runs towards noise.
    """
    if isinstance(scheduler, DualRateScheduler):
        return scheduler.step_log_snrs
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod to read log-SNR from.")
    name = type(scheduler).__name__
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} with use_flow_sigmas=True leaves the variance-preserving process that the networks know: leave it out."
        )
    timesteps = scheduler.timesteps.cpu()
    if (timesteps.diff() > 0).any():
        raise ValueError(f"{name} runs from images to noise: give a scheduler whose timesteps fall.")
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        # Solvers that place their steps in log-SNR round the timesteps but not these: σ/α in our terms.
        return -2 * torch.log(torch.as_tensor(sigmas[:-1]).cpu().float())
    log_snrs = torch.logit(scheduler.alphas_cumprod.cpu().double()[timesteps.long()])
    return log_snrs.clamp(min=NOISE_ALONE).float()
