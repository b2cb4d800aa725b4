"""Moment Matching Distillation (arXiv 2406.04103): a student that samples in N steps, K of them heavy.

The student's grid is t_n = 1 − n/N, n = 0 … N − 1. It predicts x̃ from z_t and steps as the sampler does. The teacher and
an auxiliary are single-rate networks. They see z_s ~ q(z_s | z_t, x̃) with t_{n+1} < s ≤ t_n. Steps of two kinds
alternate, each on a batch of its own. With a weight w(s) they minimise

    auxiliary   w ( ‖x̃ − x̂_aux(z_s)‖² + ‖x̂_teacher(z_s) − x̂_aux(z_s)‖² )
    student     w x̃ᵀ stopgrad[ x̂_aux(z_s) − x̂_teacher(z_s) ]

At its optimum the auxiliary is the midpoint between E[x̃ | z_s] and the teacher. So the student's gradient vanishes where
those two agree. No gradient passes z_s, the states before z_t, or the teacher. z_s must come from the posterior. Noise
added afresh to x̃ would teach the student too wide a distribution.

A single-rate student has no encoder, and K = N. Where contexts begin late, rows at a step before the first refresh see
none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from . import diffusion, losses
from .conditions import Condition, take_rows
from .losses import Denoise, Encode, LogSNR, column
from .refreshes import RefreshPlan


@dataclass(frozen=True)
class GridDraws:
    """All randomness of one step of distillation.

    Args:
        uniforms: Numbers in [0, 1) [B, 2] that become the step n and the time s.
        noise: Standard normal noise [B, N + 1, C, H, W]. The first starts a trajectory; number n + 1 enters at step n.
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
    """Draw the randomness of some rows of a global batch. Each row depends on (seed, step, row) alone.

    Args:
        seed: Seed of the run.
        step: Training step.
        rows: Row numbers in the global batch.
        shape: Shape [C, H, W] of one image.
        num_inference_steps: N.
        device: Where the result goes. Drawing itself is on the CPU, so that devices agree.
    """
    halves = losses.draw(seed, step, rows, (num_inference_steps // 2 + 1, *shape), device)
    noise = torch.cat([halves.eps, halves.eps_tau], dim=1)[:, : num_inference_steps + 1]
    return GridDraws(halves.uniforms[:, :2], noise)


@dataclass(frozen=True)
class Grid:
    """The steps of a student, at times t_n = 1 − n/N, and which of them refresh the context.

    Args:
        log_snr: t [B] → λ_t.
        plan: The plan of [`plan_segments`], whose segments are all alike. Steps before its first refresh see no context.
    """

    log_snr: LogSNR
    plan: RefreshPlan

    def log_snrs(self, like: Tensor) -> Tensor:
        """Log-SNR [N + 1] at the times t_n, data at the end, with the device and precision of `like`."""
        times = 1 - torch.arange(len(self.plan) + 1, dtype=torch.float64) / len(self.plan)
        return self.log_snr(times).to(like)


@dataclass(frozen=True)
class Rollout:
    """What a student's ancestral steps need beside the networks, for each row of a batch.

    Args:
        condition: Class labels [B], a text, or `None`.
        noise: Noise [B, N + 1, C, H, W], number n + 1 for step n.
        log_snrs: Log-SNR of the grid [N + 1].
    """

    condition: Condition
    noise: Tensor
    log_snrs: Tensor

    def of_rows(self, rows: Tensor | slice) -> "Rollout":
        """The same of some rows."""
        return Rollout(take_rows(self.condition, rows), self.noise[rows], self.log_snrs)


@dataclass(frozen=True)
class Judges:
    """The two single-rate networks that a student is judged by, and the weight of their judgement.

    Args:
        auxiliary: (z_s, λ_s, condition, None, None) → v̂, the network that learns the midpoint.
        teacher: The same for the frozen teacher, guided or not.
        min_variance: Noise variance below which the weight 1/σ² rises no further.
    """

    auxiliary: Denoise
    teacher: Denoise
    min_variance: float


@dataclass(frozen=True)
class StudentSample:
    """The student's prediction at one of its steps, and the noisy image at which teacher and auxiliary judge it.

    Args:
        x: Predicted clean image x̃ [B, C, H, W]. It has a gradient unless gradients are off.
        z_s: Noisy image drawn from q(z_s | z_t, x̃) [B, C, H, W], without gradient.
        log_snr_s: λ_s [B].
    """

    x: Tensor
    z_s: Tensor
    log_snr_s: Tensor


def clipped_weight(log_snr: Tensor, min_variance: float) -> Tensor:
    """Weight w = 1 / max(σ², `min_variance`) of ‖x − x̂‖², which makes it ‖v − v̂‖² except at the lowest noise."""
    return 1 / torch.sigmoid(-log_snr).clamp(min=min_variance)


def _predict(
    denoise: Denoise,
    z: Tensor,
    log_snr: Tensor,
    condition: Condition,
    context: object = None,
    context_log_snr: Tensor | None = None,
) -> Tensor:
    v = denoise(z, log_snr, condition, context, context_log_snr)
    return diffusion.x_from_v(z, v.to(z.dtype), column(log_snr, z))


def _draw_posterior(z: Tensor, x: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, noise: Tensor) -> Tensor:
    factor_z, factor_x, std = diffusion.posterior(column(log_snr_t, z), column(log_snr_s, z))
    return factor_z * z + factor_x * x + std * noise


@dataclass(frozen=True)
class _Part:
    """The rows of a batch whose step lies before the first refresh, or the rows whose step does not.

    Args:
        rows: Numbers of the rows in the batch.
        begin: First step of the segment that each row is in [rows].
        length: Number of steps in a segment.
        furthest: First step of the last segment.
        has_context: Whether a segment begins with a refresh.
    """

    rows: Tensor | slice
    begin: Tensor
    length: int
    furthest: int
    has_context: bool


def _parts_of(n: Tensor, plan: RefreshPlan) -> list[_Part]:
    """The parts of a batch whose rows are at steps n [B]. A part without rows is left out."""
    alone, length = plan.num_steps_alone, len(plan.until_next(plan.num_steps_alone))
    furthest = len(plan) - length
    if alone == 0:
        return [_Part(slice(None), n - n % length, length, furthest, True)]
    parts = []
    before, behind = (n < alone).nonzero()[:, 0], (n >= alone).nonzero()[:, 0]
    if len(before) > 0:
        parts.append(_Part(before, torch.zeros_like(before), alone, 0, False))
    if len(behind) > 0:
        parts.append(_Part(behind, n[behind] - (n[behind] - alone) % length, length, furthest, True))
    return parts


def _in_order(parts: list[_Part], values: Sequence[Tensor]) -> Tensor:
    """Join the values of the parts into one batch, in the order of its rows."""
    if len(parts) == 1:
        return values[0]
    rows = torch.cat([cast(Tensor, part.rows) for part in parts])  # none of several parts is a slice
    return torch.cat(list(values))[rows.argsort()]


@torch.no_grad()
def roll_out(
    denoise: Denoise,
    encode: Encode | None,
    z: Tensor,
    rollout: Rollout,
    first: Tensor,
    last: Tensor,
    *,
    refreshes: Sequence[bool],
) -> Tensor:
    """Take the student's ancestral steps, from step `first` to step `last` in each row, without gradient.

    Args:
        denoise: (z_t, λ_t, condition, context, λ_τ) → v̂.
        encode: (z_τ, λ_τ, condition) → context and x̂; `None` for a single-rate student.
        z: Noisy images at step `first` [B, C, H, W].
        rollout: Labels, noise and log-SNRs.
        first: Step n that each row starts at [B].
        last: Step that each row ends at [B].
        refreshes: Whether each step, counted from `first`, refreshes the context. The loop takes as many steps as there
            are entries. A row that has reached its last step stays as it is.
    """
    context = context_log_snr = None
    condition, log_snrs = rollout.condition, rollout.log_snrs
    for i, now in enumerate(refreshes):
        n = (first + i).clamp(max=len(log_snrs) - 2)
        if encode is not None and now:
            (context, _), context_log_snr = encode(z, log_snrs[n], condition), log_snrs[n]
        x = _predict(denoise, z, log_snrs[n], condition, context, context_log_snr)
        moved = _draw_posterior(z, x, log_snrs[n], log_snrs[n + 1], rollout.noise[torch.arange(len(z)), n + 1])
        z = torch.where(column(first + i < last, z), moved, z)
    # Before 2.11 torch's autocast kept weights that it cast here, without gradient, for the prediction with gradient.
    torch.clear_autocast_cache()
    return z


def sample_student(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    condition: Condition,
    draws: GridDraws,
    *,
    grid: Grid,
) -> StudentSample:
    """Bring the student to a random step of its grid, predict there with gradient, and draw z_s.

    Args:
        denoise: (z_t, λ_t, condition, context, λ_τ) → v̂.
        encode: (z_τ, λ_τ, condition) → context and x̂; `None` for a single-rate student.
        x: Clean images that z_τ is a noisy version of. With `None` the student starts from pure noise (full rollout), and
            z_τ is what it arrives at.
        condition: Class labels [B], a text, or `None`.
        draws: Randomness of the step.
        grid: The student's steps. Rows before the first refresh give the encoder no gradient.
    """
    rollout = Rollout(condition, draws.noise, grid.log_snrs(draws.noise))
    log_snrs, steps = rollout.log_snrs, len(grid.plan)
    n = (draws.uniforms[:, 0] * steps).long()
    # Rounding may put an s next to t on its other side.
    log_snr_s = grid.log_snr(1 - (n + draws.uniforms[:, 1]) / steps).maximum(log_snrs[n])

    parts = _parts_of(n, grid.plan)
    reached = [_reach(denoise, encode, part, x, rollout, n, grid.plan) for part in parts]
    z_t, prediction = (_in_order(parts, values) for values in zip(*reached, strict=True))
    noise = draws.noise[torch.arange(len(n)), n + 1]
    z_s = _draw_posterior(z_t, prediction.detach(), log_snrs[n], log_snr_s, noise)
    return StudentSample(prediction, z_s, log_snr_s)


def _reach(
    denoise: Denoise,
    encode: Encode | None,
    part: _Part,
    x: Tensor | None,
    rollout: Rollout,
    n: Tensor,
    plan: RefreshPlan,
) -> tuple[Tensor, Tensor]:
    """Bring the rows of a part to their step. Returns z_t, without gradient, and the prediction x̃, with gradient."""
    rollout, n, encode = rollout.of_rows(part.rows), n[part.rows], encode if part.has_context else None
    begin, condition = rollout.log_snrs[part.begin], rollout.condition
    # The state that the segment begins with has no gradient, and its context has.
    if x is None:
        start = torch.zeros_like(n)
        z_tau = roll_out(
            denoise, encode, rollout.noise[:, 0], rollout, start, part.begin, refreshes=plan[: part.furthest]
        )
    else:
        z_tau = diffusion.add_noise(x[part.rows], rollout.noise[:, 0], column(begin, x))
    context = context_log_snr = None
    if encode is not None:
        (context, _), context_log_snr = encode(z_tau, begin, condition), begin

    # From there to t without gradient; the prediction at t has it, for denoiser and encoder.
    refreshes = [i == 0 for i in range(part.length - 1)]
    keep = None if encode is None else lambda *_: (context, None)
    z_t = roll_out(denoise, keep, z_tau, rollout, part.begin, n, refreshes=refreshes)
    return z_t, _predict(denoise, z_t, rollout.log_snrs[n], condition, context, context_log_snr)


def auxiliary_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    condition: Condition,
    draws: GridDraws,
    *,
    grid: Grid,
    judges: Judges,
) -> Tensor:
    """Loss of an auxiliary step, a scalar with gradient for the auxiliary only.

    Args:
        denoise: As for [`sample_student`], and so are `encode`, `x`, `condition`, `draws` and `grid`.
        judges: Teacher and auxiliary.
    """
    with torch.no_grad():
        sample = sample_student(denoise, encode, x, condition, draws, grid=grid)
        target = _predict(judges.teacher, sample.z_s, sample.log_snr_s, condition)
    midpoint = _predict(judges.auxiliary, sample.z_s, sample.log_snr_s, condition)
    weight = column(clipped_weight(sample.log_snr_s, judges.min_variance), target)
    return (weight * ((sample.x - midpoint).square() + (target - midpoint).square())).mean()


def student_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor | None,
    condition: Condition,
    draws: GridDraws,
    *,
    grid: Grid,
    judges: Judges,
) -> tuple[Tensor, Tensor]:
    """Loss of a student step, a scalar with gradient for the student only. It takes what [`auxiliary_loss`] takes.

    Returns:
        The loss, whose value means nothing, and the mean square of x̂_aux(z_s) − x̂_teacher(z_s), which makes its gradient.
    """
    sample = sample_student(denoise, encode, x, condition, draws, grid=grid)
    with torch.no_grad():
        target = _predict(judges.teacher, sample.z_s, sample.log_snr_s, condition)
        direction = _predict(judges.auxiliary, sample.z_s, sample.log_snr_s, condition) - target
    weight = column(clipped_weight(sample.log_snr_s, judges.min_variance), target)
    return (weight * sample.x * direction).mean(), direction.square().mean()


def grid_denoising_loss(
    denoise: Denoise,
    encode: Encode,
    x: Tensor,
    condition: Condition,
    draws: GridDraws,
    *,
    grid: Grid,
    min_variance: float,
) -> Tensor:
    """Denoising loss w ‖x − x̂‖² at the times that a student meets: what a new denoiser learns before it is distilled.

    Args:
        denoise: As for [`sample_student`], and so are `encode`, `condition`, `draws` and `grid`.
        x: Clean images [B, C, H, W]. The pair (z_t, z_τ) is coupled.
        min_variance: As for [`Judges`].
    """
    log_snrs = grid.log_snrs(x)
    n = (draws.uniforms[:, 0] * len(grid.plan)).long()
    parts, predictions = _parts_of(n, grid.plan), []
    log_snr_t, log_snr_tau = log_snrs[n], log_snrs[_in_order(parts, [part.begin for part in parts])]
    eps, eps_tau = draws.noise[:, 0], draws.noise[:, 1]
    z_t, z_tau = losses.coupled_pair(x, eps, eps_tau, column(log_snr_t, x), column(log_snr_tau, x))
    for part in parts:
        rows, given = part.rows, take_rows(condition, part.rows)
        context = level_tau = None
        if part.has_context:
            level_tau = log_snr_tau[rows]
            context, _ = encode(z_tau[rows], level_tau, given)
        predictions.append(_predict(denoise, z_t[rows], log_snr_t[rows], given, context, level_tau))
    prediction = _in_order(parts, predictions)
    weight = column(clipped_weight(log_snr_t, min_variance), x)
    return (weight * (x - prediction).square()).mean()
