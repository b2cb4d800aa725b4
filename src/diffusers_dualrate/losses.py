"""Drawing (t, τ, ε) and the denoising loss, as functions of tensors and callables.

The loss is the weighted bound of SiD2 (arXiv 2410.19324): ½ E_t[ −dλ/dt · e^{λ_t} w(λ_t) ‖x − x̂‖² ]. Its weight on ε is
w(λ) = sigmoid(b − λ). Our networks predict v, and ‖x − x̂‖² = σ² ‖v − v̂‖².

A denoiser with context also sees features of z_τ, τ ≥ t. Both z_t and z_τ lie on one trajectory. Noising x a second time
would tell the denoiser more of x than sampling ever does. Beyond the paper, a pair may also learn from the predictions
of a trained encoder.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import diffusion
from .conditions import AnyCondition, Condition, replace_rows, take_rows

LogSNR = Callable[[Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor, Condition, object, Tensor | None], Tensor]
"""(z_t, λ_t, condition, context, λ_τ) → v̂; context and λ_τ are `None` in the context-free branch."""
Encode = Callable[[Tensor, Tensor, Condition], tuple[object, Tensor | None]]
"""(z_τ, λ_τ, condition) → the context, and the encoder's own prediction x̂, or `None` if it makes none."""


@dataclass(frozen=True)
class Schedule:
    """The noise levels that a loss is taken over, and how much each counts.

    Args:
        log_snr: t [B] → λ_t.
        log_snr_rate: t [B] → −dλ/dt, positive: the density of noise levels.
        bias: b of the sigmoid weight. Noise levels well above b in log-SNR count for less.
    """

    log_snr: LogSNR
    log_snr_rate: LogSNR
    bias: float = 0.0

    def weight(self, log_snr: Tensor, t: Tensor) -> Tensor:
        """Weight of ‖v − v̂‖² at times t [B], whose log-SNR is given."""
        return sigmoid_weight(log_snr, self.log_snr_rate(t), self.bias)


@dataclass(frozen=True)
class ContextTimes:
    """Which rows of a batch see a context, and how old it is.

    Args:
        context_ages: Largest ages of a context, in shares of the chain. Each row draws one of them uniformly, and its
            context is at most that old. 0 is a fresh context. A value that is repeated is drawn more often.
        context_from: Time c of the first context; 1 is the noisy end.
        num_above: Number of leading rows whose times lie above c.
        num_without: Number of leading rows that see no context. It includes the rows above c.
    """

    context_ages: Sequence[float] = (1.0,)
    context_from: float = 1.0
    num_above: int = 0
    num_without: int = 0

    def __post_init__(self):
        assert 0 <= self.num_above <= self.num_without


@dataclass(frozen=True)
class FollowingTimes(ContextTimes):
    """The same for a denoiser that follows its encoder, and how a row's z_t comes from its z_τ.

    Args:
        num_even_in_log_snr: Number of leading rows whose lag is uniform in log-SNR instead of time, like the steps of some
            solvers. It includes the rows without context, which have no lag.
        num_deterministic: Number of leading rows whose z_t is a DDIM step from z_τ. It includes those of both other kinds.
    """

    num_even_in_log_snr: int = 0
    num_deterministic: int = 0

    def __post_init__(self):
        assert 0 <= self.num_above == self.num_without <= self.num_even_in_log_snr <= self.num_deterministic


@dataclass(frozen=True)
class Draws:
    """All randomness of one training step.

    Args:
        uniforms: Numbers in [0, 1) [B, 4] that become t, the largest age, the lag of τ and the dropping of the condition.
        eps: Standard normal noise of z_t [B, C, H, W].
        eps_tau: Standard normal noise of the transition from z_t to z_τ [B, C, H, W].
    """

    uniforms: Tensor
    eps: Tensor
    eps_tau: Tensor


def seed_of(*numbers: int) -> int:
    """Seed for a random generator: a hash of the numbers, the same on every machine."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(seed: int, step: int, rows: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Draws:
    """Draw the randomness of some rows of a global batch. Each row depends on (seed, step, row) alone.

    Args:
        seed: Seed of the run.
        step: Training step.
        rows: Row numbers in the global batch.
        shape: Shape [C, H, W] of one image.
        device: Where the result goes. Drawing itself is on the CPU, so that devices agree.
    """
    generator = torch.Generator()
    uniforms, noise = torch.empty(len(rows), 4), torch.empty(len(rows), 2, *shape)
    for i, row in enumerate(rows):
        generator.manual_seed(seed_of(seed, step, row))
        uniforms[i].uniform_(generator=generator)
        noise[i].normal_(generator=generator)
    eps, eps_tau = noise.to(device).unbind(1)
    return Draws(uniforms.to(device), eps, eps_tau)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values [B] of the rows to [B, 1, ...], which broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def lags(uniforms: Tensor, context_ages: Sequence[float]) -> Tensor:
    """Lags U(0, a) [B] of the numbers that [`window_times`] takes; a is one of `context_ages`."""
    _, which, lag = uniforms.unbind(1)
    return lag * torch.tensor(context_ages, device=lag.device)[(which * len(context_ages)).long()]


def window_times(uniforms: Tensor, contexts: ContextTimes) -> tuple[Tensor, Tensor]:
    """Times (t, τ) of a noisy image and of the older one that its context comes from.

    The largest age a is one of `context_ages`, and τ = min(c, t + U(0, a)). A sampler with K refreshes on a uniform grid
    meets these times if a = 1/K, c = 1 and the grid's offset is random. Near t = 1 the two differ: a sampler's first
    segment always sees τ = 1.

    In the first `num_above` rows t is uniform on [c, 1], and τ at most 1. In the others t is uniform on [0, c].

    Args:
        uniforms: Numbers in [0, 1) [B, 3] for t, a and the lag.
        contexts: The ages, c and the number of rows above it.
    """
    u, first = uniforms[:, 0], contexts.context_from
    is_above = torch.arange(len(u), device=u.device) < contexts.num_above
    t = torch.where(is_above, first + (1 - first) * u, first * u)
    latest = torch.where(is_above, torch.ones_like(u), torch.full_like(u, first))
    return t, torch.minimum(t + lags(uniforms, contexts.context_ages), latest)


def coupled_pair(
    x: Tensor, eps: Tensor, eps_tau: Tensor, log_snr_t: Tensor, log_snr_tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy images z_t and z_τ on one trajectory: z_t = α_t x + σ_t ε, then z_τ ~ q(z_τ | z_t).

    Args:
        x: Clean images [B, C, H, W].
        eps: Noise of z_t, of the same shape.
        eps_tau: Noise of the transition, of the same shape.
        log_snr_t: Log-SNR at t, broadcastable against x.
        log_snr_tau: Log-SNR at τ ≥ t, so not above `log_snr_t`.
    """
    z_t = diffusion.add_noise(x, eps, log_snr_t)
    ratio, std = diffusion.transition(log_snr_t, log_snr_tau)
    return z_t, ratio * z_t + std * eps_tau


def sigmoid_weight(log_snr: Tensor, log_snr_rate: Tensor, bias: float) -> Tensor:
    """Weight of ‖v − v̂‖² in the bound at uniformly drawn t: ½ (−dλ/dt) e^b sigmoid(λ − b) σ².

    Args:
        log_snr: λ_t.
        log_snr_rate: −dλ/dt, positive.
        bias: b, in log-SNR: noise levels well above it count for less.
    """
    eps_weight = torch.sigmoid(bias - log_snr)
    return log_snr_rate / 2 * torch.exp(log_snr) * eps_weight * torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class DenoisingLoss:
    """Result of [`denoising_loss`] and [`following_loss`].

    Args:
        loss: Weighted loss to minimise, a scalar.
        v_loss: Mean of (v − v̂)² of each image [B], detached. v is the velocity of the image, or the encoder's.
    """

    loss: Tensor
    v_loss: Tensor


def drop_condition(
    condition: AnyCondition, draws: Draws, rate: float, null: AnyCondition | int | None
) -> AnyCondition:
    """Replace the condition of each row by `null`, the label of no class or an empty text, with probability `rate`."""
    return replace_rows(condition, draws.uniforms[:, 3] < rate, null)


def _v_loss(denoised: Tensor, v: Tensor) -> Tensor:
    return (denoised.float() - v).square().flatten(1).mean(1)


def denoising_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor,
    condition: Condition,
    draws: Draws,
    *,
    schedule: Schedule,
    contexts: ContextTimes = ContextTimes(),  # noqa: B008 (it is frozen)
) -> DenoisingLoss:
    """Weighted bound for a denoiser, jointly with its context encoder.

    The first `num_without` rows see no context, and the encoder runs on the others only. In expectation that equals
    dropping the context of each row with probability `num_without` / B, and it spares the encoder's work.

    An encoder that makes a prediction of its own also learns from its own denoising loss, beside the joint one.

    Args:
        denoise: (z_t, λ_t, condition, context, λ_τ) → v̂; context and λ_τ are `None` in rows without context.
        encode: (z_τ, λ_τ, condition) → context and x̂, or `None` for x̂. `None` for a single-rate network: no row sees a
            context.
        x: Clean images [B, C, H, W] in [-1, 1].
        condition: What the images are of: class labels [B], a text, or `None`.
        draws: Randomness of the step.
        schedule: The noise schedule and the loss weight.
        contexts: Which rows see a context, and how old it is.
    """
    t, tau = window_times(draws.uniforms[:, :3], contexts)
    lambda_t, lambda_tau = schedule.log_snr(t), schedule.log_snr(tau)
    z_t, z_tau = coupled_pair(x, draws.eps, draws.eps_tau, column(lambda_t, x), column(lambda_tau, x))
    target = diffusion.v_from_x_eps(x, draws.eps, column(lambda_t, x))

    def judge(denoised: Tensor, v: Tensor, log_snr: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        v_loss = _v_loss(denoised, v)
        return v_loss, schedule.weight(log_snr, times) * v_loss

    num_without = len(x) if encode is None else contexts.num_without
    parts: list[tuple[Tensor, Tensor]] = []
    encoder_loss: Tensor | float = 0.0
    if num_without > 0:
        alone = slice(num_without)
        denoised = denoise(z_t[alone], lambda_t[alone], take_rows(condition, alone), None, None)
        parts.append(judge(denoised, target[alone], lambda_t[alone], t[alone]))
    if encode is not None and num_without < len(x):
        paired = slice(num_without, None)
        x, z_tau, lambda_tau, tau = x[paired], z_tau[paired], lambda_tau[paired], tau[paired]
        context, prediction = encode(z_tau, lambda_tau, take_rows(condition, paired))
        denoised = denoise(z_t[paired], lambda_t[paired], take_rows(condition, paired), context, lambda_tau)
        parts.append(judge(denoised, target[paired], lambda_t[paired], t[paired]))
        if prediction is not None:
            v_hat, v = (diffusion.v_from_x(z_tau, image, column(lambda_tau, x)) for image in (prediction, x))
            encoder_loss = judge(v_hat, v, lambda_tau, tau)[1].sum() / len(target)
    v_loss, loss = (torch.cat(values) for values in zip(*parts, strict=True))
    return DenoisingLoss(loss=loss.mean() + encoder_loss, v_loss=v_loss.detach())


def following_loss(
    denoise: Denoise,
    encode: Encode,
    x: Tensor,
    condition: Condition,
    draws: Draws,
    *,
    schedule: Schedule,
    contexts: FollowingTimes,
) -> DenoisingLoss:
    """Loss of a denoiser that learns what a trained encoder would predict at z_t, from its context at z_τ.

    This is beyond the paper, and the encoder stays as it is. The target is the encoder's prediction at z_t, so z_t need
    not be a noised x. In the first `num_deterministic` rows z_t is one DDIM step from z_τ. In the others both lie on one
    ancestral trajectory. So the pair may be sampled either way. Rows without context learn from the images.

    Args:
        denoise: As for [`denoising_loss`].
        encode: (z_τ, λ_τ, condition) → context and x̂; both are needed.
        x: Clean images [B, C, H, W] in [-1, 1].
        condition: What the images are of: class labels [B], a text, or `None`.
        draws: Randomness of the step.
        schedule: The noise schedule and the loss weight.
        contexts: Which rows see a context, how old it is, and how z_t comes from z_τ.

    Returns:
        The loss. Its `v_loss` is the distance from the encoder's velocity.
    """
    t, tau = window_times(draws.uniforms[:, :3], contexts)
    lambda_t, lambda_tau = schedule.log_snr(t), schedule.log_snr(tau)
    alone, paired = slice(contexts.num_without), slice(contexts.num_without, None)
    row = torch.arange(len(x), device=x.device)

    # The same lag as a share, of the range of log-SNRs instead of that of times.
    first = schedule.log_snr(torch.full_like(t, contexts.context_from))
    lowest, highest = schedule.log_snr(torch.ones_like(t)), schedule.log_snr(torch.zeros_like(t))
    evenly = (lambda_t - lags(draws.uniforms[:, :3], contexts.context_ages) * (highest - lowest)).maximum(first)
    is_even = (row < contexts.num_even_in_log_snr) & (row >= contexts.num_without)
    lambda_tau = torch.where(is_even, evenly, lambda_tau)

    level_t, level_tau = column(lambda_t, x), column(lambda_tau, x)
    z_t, z_tau = coupled_pair(x, draws.eps, draws.eps_tau, level_t, level_tau)
    v, is_deterministic = diffusion.v_from_x_eps(x, draws.eps, level_t), (row < contexts.num_deterministic)[paired]
    level_t, level_tau, z_tau, given = level_t[paired], level_tau[paired], z_tau[paired], take_rows(condition, paired)
    # Before what has no gradient: autocast keeps the weights that it casts, as they were cast first.
    context, x_tau = encode(z_tau, lambda_tau[paired], given)
    assert x_tau is not None  # an encoder that is followed predicts
    with torch.no_grad():
        eps = diffusion.eps_from_v(z_tau, diffusion.v_from_x(z_tau, x_tau, level_tau), level_tau)
        stepped = diffusion.add_noise(x_tau, eps, level_t)
        z = torch.where(column(is_deterministic, x), stepped, z_t[paired])
        _, x_t = encode(z, lambda_t[paired], given)
        assert x_t is not None
        target = diffusion.v_from_x(z, x_t, level_t)
    v_loss = _v_loss(denoise(z, lambda_t[paired], given, context, lambda_tau[paired]), target)
    if contexts.num_without > 0:  # these learn from the images, which costs nothing heavy
        denoised = denoise(z_t[alone], lambda_t[alone], take_rows(condition, alone), None, None)
        v_loss = torch.cat([_v_loss(denoised, v[alone]), v_loss])
    return DenoisingLoss(loss=(schedule.weight(lambda_t, t) * v_loss).mean(), v_loss=v_loss.detach())
