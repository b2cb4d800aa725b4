"""Moment Matching Distillation (arXiv 2406.04103): a student that samples in N steps, K of them heavy.

On the grid t_n = 1 − n/N, n = 0 … N − 1, the student predicts x̃ from z_t and steps as the sampler does. The teacher and
an auxiliary, both single-rate, see z_s ~ q(z_s | z_t, x̃) with t_{n+1} < s ≤ t_n. Steps of two kinds alternate, each on
a batch of its own, and with a weight w(s) minimise

    auxiliary   w ( ‖x̃ − x̂_aux(z_s)‖² + ‖x̂_teacher(z_s) − x̂_aux(z_s)‖² )
    student     w x̃ᵀ stopgrad[ x̂_aux(z_s) − x̂_teacher(z_s) ]

At its optimum the auxiliary is the midpoint between E[x̃ | z_s] and the teacher, so the student's gradient vanishes where
those agree. No gradient passes z_s, the states before z_t, or the teacher. z_s must come from the posterior: noise added
afresh to x̃ would teach the student too wide a distribution. A single-rate student has no encoder, and K = N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import diffusion, losses
from .losses import Denoise, Encode, LogSNR, column


@dataclass(frozen=True)
class GridDraws:
    """All randomness of one step of distillation.

    Args:
        uniforms: Numbers in [0, 1) [B, 2] that become the step n and the time s.
        noise: Standard normal noise [B, N + 1, C, H, W]: the first starts a trajectory, number n + 1 enters at step n.
    """

    uniforms: Tensor
    noise: Tensor


def draw_on_grid(
    seed: int,
    step: int,
    rows: Sequence[int],
    shape: Sequence[int],
    num_inference_steps: int,
    device: torch.device | str = "cpu",
) -> GridDraws:
    """Draw the randomness of some rows of a global batch, each a function of (seed, step, row) alone.

    Args:
        seed: Seed of the run.
        step: Training step.
        rows: Row numbers in the global batch.
        shape: Shape [C, H, W] of one image.
        num_inference_steps: N.
        device: Where the result goes; the drawing itself is on the CPU, so that devices agree.
    """
    halves = losses.draw(seed, step, rows, (num_inference_steps // 2 + 1, *shape), device)
    noise = torch.cat([halves.eps, halves.eps_tau], dim=1)[:, : num_inference_steps + 1]
    return GridDraws(halves.uniforms[:, :2], noise)


@dataclass(frozen=True)
class StudentSample:
    """What the student predicts at one of its steps, and the noisy image that teacher and auxiliary judge it by.

    Args:
        x: Predicted clean image x̃ [B, C, H, W], with gradient where that is on.
        z_s: Noisy image drawn from q(z_s | z_t, x̃) [B, C, H, W], without gradient.
        log_snr_s: λ_s [B].
    """

    x: Tensor
    z_s: Tensor
    log_snr_s: Tensor


def grid_log_snr(log_snr: LogSNR, num_inference_steps: int, like: Tensor) -> Tensor:
    """Log-SNR [N + 1] at the grid's times t_n = 1 − n/N, data at the end, where and as `like` is."""
    times = 1 - torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps
    return log_snr(times).to(like)


def clipped_weight(log_snr: Tensor, min_variance: float) -> Tensor:
    """Weight of ‖x − x̂‖² that makes it ‖v − v̂‖² but for the lowest noise: w = 1 / max(σ², `min_variance`)."""
    return 1 / torch.sigmoid(-log_snr).clamp(min=min_variance)


def _predict(denoise: Denoise, z: Tensor, log_snr: Tensor, class_labels, context=None, context_log_snr=None) -> Tensor:
    v = denoise(z, log_snr, class_labels, context, context_log_snr)
    return diffusion.x_from_v(z, v.to(z.dtype), column(log_snr, z))


def _draw_posterior(z: Tensor, x: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, noise: Tensor) -> Tensor:
    factor_z, factor_x, std = diffusion.posterior(column(log_snr_t, z), column(log_snr_s, z))
    return factor_z * z + factor_x * x + std * noise


def refresh_interval(num_inference_steps: int, num_context_steps: int) -> int:
    """Steps N/K that share a context; a student's segments are all alike, so K must divide N."""
    if not 1 <= num_context_steps <= num_inference_steps or num_inference_steps % num_context_steps:
        raise ValueError(
            f"num_context_steps must divide num_inference_steps={num_inference_steps}, got {num_context_steps}."
        )
    return num_inference_steps // num_context_steps


@torch.no_grad()
def roll_out(
    denoise: Denoise,
    encode: Encode | None,
    z: Tensor,
    class_labels: Tensor | None,
    noise: Tensor,
    log_snrs: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    num_steps: int,
    refresh_interval: int,
) -> Tensor:
    """Take the student's ancestral steps, from step `first` to step `last` in each row, without gradient.

    Args:
        denoise: (z_t, λ_t, labels, context, λ_τ) → v̂.
        encode: (z_τ, λ_τ, labels) → context; `None` for a single-rate student.
        z: Noisy images at step `first` [B, C, H, W].
        class_labels: [B] integers, or `None`.
        noise: Noise [B, N + 1, C, H, W], number n + 1 for step n.
        log_snrs: Log-SNR of the grid [N + 1].
        first: Steps n that the rows stand at, each a refresh [B].
        last: Steps that they go to [B].
        num_steps: Steps to the row that goes furthest; rows that have arrived wait.
        refresh_interval: N/K, the steps that share a context.
    """
    context = context_log_snr = None
    for i in range(num_steps):
        n = (first + i).clamp(max=len(log_snrs) - 2)
        if encode is not None and i % refresh_interval == 0:
            context, context_log_snr = encode(z, log_snrs[n], class_labels), log_snrs[n]
        x = _predict(denoise, z, log_snrs[n], class_labels, context, context_log_snr)
        moved = _draw_posterior(z, x, log_snrs[n], log_snrs[n + 1], noise[torch.arange(len(z)), n + 1])
        z = torch.where(column(first + i < last, z), moved, z)
    # Before 2.11 torch's autocast kept weights that it cast here, without gradient, for the prediction with gradient.
    torch.clear_autocast_cache()
    return z


def sample_student(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    class_labels: Tensor | None,
    draws: GridDraws,
    *,
    log_snr: LogSNR,
    num_inference_steps: int,
    num_context_steps: int,
) -> StudentSample:
    """Bring the student to a random step of its grid, predict there with gradient, and draw z_s.

    Args:
        denoise: (z_t, λ_t, labels, context, λ_τ) → v̂.
        encode: (z_τ, λ_τ, labels) → context; `None` for a single-rate student.
        x: Clean images that z_τ is a noisy version of (basic), or `None`: z_τ is then what the student itself arrives at
            from pure noise (full rollout).
        class_labels: [B] integers, or `None`.
        draws: Randomness of the step.
        log_snr: t [B] → λ_t.
        num_inference_steps: N.
        num_context_steps: K, a divisor of N; N itself for a single-rate student.
    """
    noise = draws.noise
    interval = refresh_interval(num_inference_steps, num_context_steps)
    log_snrs = grid_log_snr(log_snr, num_inference_steps, noise)
    n = (draws.uniforms[:, 0] * num_inference_steps).long()
    refresh = n - n % interval
    # Rounding may put an s next to t on its other side.
    log_snr_s = log_snr(1 - (n + draws.uniforms[:, 1]) / num_inference_steps).maximum(log_snrs[n])

    # The heavy time's state, which has no gradient, then its context, which has.
    steps = {"class_labels": class_labels, "noise": noise, "log_snrs": log_snrs, "refresh_interval": interval}
    if x is None:
        start = torch.zeros_like(n)
        z_tau = roll_out(
            denoise, encode, noise[:, 0], first=start, last=refresh, num_steps=num_inference_steps - interval, **steps
        )
    else:
        z_tau = diffusion.add_noise(x, noise[:, 0], column(log_snrs[refresh], x))
    context = context_log_snr = None
    if encode is not None:
        context, context_log_snr = encode(z_tau, log_snrs[refresh], class_labels), log_snrs[refresh]

    # From there to t without gradient; the prediction at t has it, for denoiser and encoder.
    z_t = roll_out(
        denoise,
        None if encode is None else lambda *_: context,
        z_tau,
        first=refresh,
        last=n,
        num_steps=interval - 1,
        **steps,
    )
    prediction = _predict(denoise, z_t, log_snrs[n], class_labels, context, context_log_snr)
    z_s = _draw_posterior(z_t, prediction.detach(), log_snrs[n], log_snr_s, noise[torch.arange(len(n)), n + 1])
    return StudentSample(prediction, z_s, log_snr_s)


def auxiliary_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    class_labels: Tensor | None,
    draws: GridDraws,
    *,
    auxiliary: Denoise,
    teacher: Denoise,
    min_variance: float,
    **steps: Any,
) -> Tensor:
    """Loss of an auxiliary step, a scalar with gradient for the auxiliary only.

    Args:
        denoise: As for [`sample_student`], and so are the next four.
        auxiliary: (z_s, λ_s, labels, None, None) → v̂, the network that learns the midpoint.
        teacher: The same for the frozen teacher, guided or not.
        min_variance: Noise variance below which the weight 1/σ² stays what it is there.
        steps: The keyword arguments of [`sample_student`].
    """
    with torch.no_grad():
        sample = sample_student(denoise, encode, x, class_labels, draws, **steps)
        target = _predict(teacher, sample.z_s, sample.log_snr_s, class_labels)
    midpoint = _predict(auxiliary, sample.z_s, sample.log_snr_s, class_labels)
    weight = column(clipped_weight(sample.log_snr_s, min_variance), target)
    return (weight * ((sample.x - midpoint).square() + (target - midpoint).square())).mean()


def student_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    class_labels: Tensor | None,
    draws: GridDraws,
    *,
    auxiliary: Denoise,
    teacher: Denoise,
    min_variance: float,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """Loss of a student step, a scalar with gradient for the student only, from the arguments of [`auxiliary_loss`].

    Its value means nothing. Beside it comes what its gradient is made of, the mean square of x̂_aux(z_s) − x̂_teacher(z_s).
    """
    sample = sample_student(denoise, encode, x, class_labels, draws, **steps)
    with torch.no_grad():
        target = _predict(teacher, sample.z_s, sample.log_snr_s, class_labels)
        direction = _predict(auxiliary, sample.z_s, sample.log_snr_s, class_labels) - target
    weight = column(clipped_weight(sample.log_snr_s, min_variance), target)
    return (weight * sample.x * direction).mean(), direction.square().mean()


def grid_denoising_loss(
    denoise: Denoise,
    encode: Encode,
    x: Tensor,
    class_labels: Tensor | None,
    draws: GridDraws,
    *,
    log_snr: LogSNR,
    num_inference_steps: int,
    num_context_steps: int,
    min_variance: float,
) -> Tensor:
    """Denoising loss w ‖x − x̂‖² at the times that a student meets: what a new denoiser learns before it is distilled.

    Takes arguments of [`auxiliary_loss`]; x cannot be `None`, and the pair (z_t, z_τ) is coupled.
    """
    interval = refresh_interval(num_inference_steps, num_context_steps)
    log_snrs = grid_log_snr(log_snr, num_inference_steps, x)
    n = (draws.uniforms[:, 0] * num_inference_steps).long()
    log_snr_t, log_snr_tau = log_snrs[n], log_snrs[n - n % interval]
    eps, eps_tau = draws.noise[:, 0], draws.noise[:, 1]
    z_t, z_tau = losses.coupled_pair(x, eps, eps_tau, column(log_snr_t, x), column(log_snr_tau, x))
    context = encode(z_tau, log_snr_tau, class_labels)
    prediction = _predict(denoise, z_t, log_snr_t, class_labels, context, log_snr_tau)
    weight = column(clipped_weight(log_snr_t, min_variance), x)
    return (weight * (x - prediction).square()).mean()
