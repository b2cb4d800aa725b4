"""Drawing (t, τ, ε) and the denoising loss, as functions of tensors and callables.

The loss is the weighted bound of SiD2 (arXiv 2410.19324), ½ E_t[ −dλ/dt · e^{λ_t} w(λ_t) ‖x − x̂‖² ] with the sigmoid
weight w(λ) = sigmoid(b − λ) on ε, written for networks that predict v: ‖x − x̂‖² = σ² ‖v − v̂‖². A denoiser with context
also sees features of z_τ, τ ≥ t, and z_τ must lie on one trajectory with z_t: noising x a second time would leak
information that sampling never has. Beyond the paper, a pair may also learn from a trained encoder's own predictions.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import diffusion

LogSNR = Callable[[Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor, Tensor | None, object, Tensor | None], Tensor]
Encode = Callable[[Tensor, Tensor, Tensor | None], object]


@dataclass(frozen=True)
class Schedule:
    """The noise schedule that a loss is taken over.

    Args:
        log_snr: t [B] → λ_t.
        log_snr_rate: t [B] → −dλ/dt, positive: the density of noise levels.
    """

    log_snr: LogSNR
    log_snr_rate: LogSNR


@dataclass(frozen=True)
class Draws:
    """All randomness of one training step.

    Args:
        uniforms: Numbers in [0, 1) [B, 4] that become t, the window, the lag of τ and the dropping of the label.
        eps: Standard normal noise of z_t [B, C, H, W].
        eps_tau: Standard normal noise of the transition from z_t to z_τ [B, C, H, W].
    """

    uniforms: Tensor
    eps: Tensor
    eps_tau: Tensor


def seed_of(*numbers: int) -> int:
    """Seed for a random generator, an independent one for each tuple of integers (a hash, the same everywhere)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(seed: int, step: int, rows: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Draws:
    """Draw the randomness of some rows of a global batch, each a function of (seed, step, row) alone.

    Args:
        seed: Seed of the run.
        step: Training step.
        rows: Row numbers in the global batch.
        shape: Shape [C, H, W] of one image.
        device: Where the result goes; the drawing itself is on the CPU, so that devices agree.
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
    """Values of the rows [B] in the shape [B, 1, ...] that broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def lags(uniforms: Tensor, context_ages: Sequence[float]) -> Tensor:
    """Lags U(0, a) [B], a being one of `context_ages`, of the numbers in [0, 1) that `window_times` takes."""
    _, which, lag = uniforms.unbind(1)
    return lag * torch.tensor(context_ages, device=lag.device)[(which * len(context_ages)).long()]


def window_times(
    uniforms: Tensor, context_ages: Sequence[float], *, context_from: float = 1.0, without: int = 0
) -> tuple[Tensor, Tensor]:
    """Times (t, τ) of a noisy image and of the older one that its context comes from.

    t is uniform on [0, 1], the largest age a one of `context_ages`, and τ = min(1, t + U(0, a)). With a = 1/K these are
    the times of sampling with K refreshes on a uniform grid whose offset is random. Near t = 1 the two differ: a
    sampler's first segment always sees τ = 1, here the lag is drawn as elsewhere.

    Contexts may begin late, at time c = `context_from`: then t is uniform on [c, 1] in the first rows, which see none, and
    on [0, c] in the others, with τ at most c.

    Args:
        uniforms: Numbers in [0, 1) [B, 3] for t, a and the lag.
        context_ages: The ages that a is drawn from, in shares of the chain; 0 makes τ = t.
        context_from: c, the time of the first context.
        without: Number of rows, the first, whose t lies above c.
    """
    u = uniforms[:, 0]
    is_above = torch.arange(len(u), device=u.device) < without
    t = torch.where(is_above, context_from + (1 - context_from) * u, context_from * u)
    latest = torch.where(is_above, torch.ones_like(u), torch.full_like(u, context_from))
    return t, torch.minimum(t + lags(uniforms, context_ages), latest)


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
        v_loss: Mean of (v − v̂)² of each image [B], detached, v being the image's velocity or the encoder's.
    """

    loss: Tensor
    v_loss: Tensor


def drop_labels(class_labels: Tensor | None, draws: Draws, rate: float, null_label: int | None) -> Tensor | None:
    """Turn each label into `null_label`, which stands for no class, with probability `rate`; without classes, `None`."""
    if class_labels is None or null_label is None:
        return class_labels
    return torch.where(draws.uniforms[:, 3] < rate, null_label, class_labels)


def _v_loss(denoised: Tensor, v: Tensor) -> Tensor:
    return (denoised.float() - v).square().flatten(1).mean(1)


def denoising_loss(
    denoise: Denoise,
    encode: Encode | None,
    x: Tensor,
    class_labels: Tensor | None,
    draws: Draws,
    *,
    schedule: Schedule,
    bias: float,
    context_ages: Sequence[float] = (1.0,),
    context_from: float = 1.0,
    late: float = 0.0,
    context_dropout: float = 0.0,
    encoder_prediction: Callable[[object], Tensor | None] | None = None,
) -> DenoisingLoss:
    """Weighted bound for a denoiser, jointly with its context encoder.

    The batch is split: its first round(p B) rows see no context, and the encoder runs on the others only. Where p B is
    whole, that equals in expectation dropping each row's context with probability p, and the dropped rows cost nothing
    heavy. Contexts that begin late are such a split, too: the first of those rows are the ones noisier than `context_from`.

    Args:
        denoise: (z_t, λ_t, labels, context, λ_τ) → v̂, context and λ_τ being `None` in the context-free part.
        encode: (z_τ, λ_τ, labels) → context; `None` for a single-rate network, all rows then being context-free.
        x: Clean images [B, C, H, W] in [-1, 1].
        class_labels: [B] integers, or `None`.
        draws: Randomness of the step.
        schedule: The noise schedule.
        bias: b of the sigmoid weight.
        context_ages: Largest ages of a context, in shares of the chain. Each row draws one of them, all alike, and its
            context is uniformly up to so old. 0 is a fresh context; a value given twice is drawn twice as often.
        context_from: Time of the first context: above it no row sees one, and the encoder learns nothing.
        late: Share of rows, the first, whose times lie above it; for times that are uniform in all 1 − `context_from`.
        context_dropout: Share p of rows that see no context, those included.
        encoder_prediction: context → x̂, the encoder's own prediction at τ, where it hands one over: it is trained by
            its own denoising loss beside the joint one.
    """
    assert late <= context_dropout or encode is None
    t, tau = window_times(draws.uniforms[:, :3], context_ages, context_from=context_from, without=round(late * len(x)))
    lambda_t, lambda_tau = schedule.log_snr(t), schedule.log_snr(tau)
    z_t, z_tau = coupled_pair(x, draws.eps, draws.eps_tau, column(lambda_t, x), column(lambda_tau, x))
    target = diffusion.v_from_x_eps(x, draws.eps, column(lambda_t, x))

    def judge(denoised: Tensor, v: Tensor, log_snr_t: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        v_loss = _v_loss(denoised, v)
        return v_loss, sigmoid_weight(log_snr_t, schedule.log_snr_rate(times), bias) * v_loss

    free = len(x) if encode is None else round(context_dropout * len(x))
    if encode is not None and free == 0 < context_dropout:
        raise ValueError(f"context_dropout={context_dropout} of {len(x)} images is none: use larger batches, or 0.")
    parts: list[tuple[Tensor, Tensor]] = []
    encoder_loss: Tensor | float = 0.0
    if free > 0:
        labels = None if class_labels is None else class_labels[:free]
        denoised = denoise(z_t[:free], lambda_t[:free], labels, None, None)
        parts.append(judge(denoised, target[:free], lambda_t[:free], t[:free]))
    if encode is not None and free < len(x):
        x, z_tau, lambda_tau, tau = x[free:], z_tau[free:], lambda_tau[free:], tau[free:]
        labels = None if class_labels is None else class_labels[free:]
        context = encode(z_tau, lambda_tau, labels)
        denoised = denoise(z_t[free:], lambda_t[free:], labels, context, lambda_tau)
        parts.append(judge(denoised, target[free:], lambda_t[free:], t[free:]))
        prediction = None if encoder_prediction is None else encoder_prediction(context)
        if prediction is not None:
            v_hat, v = (diffusion.v_from_x(z_tau, image, column(lambda_tau, x)) for image in (prediction, x))
            encoder_loss = judge(v_hat, v, lambda_tau, tau)[1].sum() / len(target)
    v_loss, loss = (torch.cat(values) for values in zip(*parts, strict=True))
    return DenoisingLoss(loss=loss.mean() + encoder_loss, v_loss=v_loss.detach())


def following_loss(
    denoise: Denoise,
    encode: Encode,
    x: Tensor,
    class_labels: Tensor | None,
    draws: Draws,
    *,
    schedule: Schedule,
    bias: float,
    context_ages: Sequence[float],
    deterministic: float,
    even_in_log_snr: float,
    context_from: float = 1.0,
    late: float = 0.0,
    encoder_prediction: Callable[[object], Tensor],
) -> DenoisingLoss:
    """Loss of a denoiser that learns what a trained encoder would predict at z_t, from its context at z_τ.

    Beyond the paper, and for an encoder that stays as it is. What it predicts at z_t has none of the noise that a clean
    image has as a target, so it can be asked for anywhere: in some rows z_t is where one deterministic step leads from
    z_τ, in the others both lie on one trajectory of the ancestral chain, as in [`denoising_loss`]. Such a pair may be
    sampled either way, though a solver takes several steps where the loss takes one, with the pair's own predictions.

    Args:
        denoise: As for [`denoising_loss`], and so are the others that are not named here.
        encode: (z_τ, λ_τ, labels) → context.
        deterministic: Share of rows, the first, whose z_t is a DDIM step from z_τ with the encoder's own prediction; the
            rows of `late`, which come before them, are none of them but count.
        even_in_log_snr: Share of rows, the first of those, counted alike, with a lag that is uniform in log-SNR instead of
            time, as solvers whose steps are even in log-SNR have it.
        encoder_prediction: context → x̂, the encoder's own prediction.

    Returns:
        The loss, and as `v_loss` the distance from the encoder's velocity.
    """
    assert late <= even_in_log_snr <= deterministic
    free = round(late * len(x))
    t, tau = window_times(draws.uniforms[:, :3], context_ages, context_from=context_from, without=free)
    lambda_t, lambda_tau = schedule.log_snr(t), schedule.log_snr(tau)

    def is_in_first(share: float) -> Tensor:
        return torch.arange(len(x), device=x.device) < round(share * len(x))

    # The lag as a share of the times there are becomes the same share of the log-SNRs.
    first = schedule.log_snr(torch.full_like(t, context_from))
    lowest, highest = schedule.log_snr(torch.ones_like(t)), schedule.log_snr(torch.zeros_like(t))
    evenly = (lambda_t - lags(draws.uniforms[:, :3], context_ages) * (highest - lowest)).maximum(first)
    lambda_tau = torch.where(is_in_first(even_in_log_snr) & ~is_in_first(late), evenly, lambda_tau)

    level_t, level_tau = column(lambda_t, x), column(lambda_tau, x)
    z_t, z_tau = coupled_pair(x, draws.eps, draws.eps_tau, level_t, level_tau)
    v, is_deterministic = diffusion.v_from_x_eps(x, draws.eps, level_t), is_in_first(deterministic)[free:]
    labels = class_labels if class_labels is None else class_labels[free:]
    level_t, level_tau, z_tau = level_t[free:], level_tau[free:], z_tau[free:]
    # Before what has no gradient: autocast keeps the weights that it casts, as they were cast first.
    context = encode(z_tau, lambda_tau[free:], labels)
    with torch.no_grad():
        x_tau = encoder_prediction(context)
        eps = diffusion.eps_from_v(z_tau, diffusion.v_from_x(z_tau, x_tau, level_tau), level_tau)
        stepped = diffusion.add_noise(x_tau, eps, level_t)
        z = torch.where(column(is_deterministic, x), stepped, z_t[free:])
        target = diffusion.v_from_x(z, encoder_prediction(encode(z, lambda_t[free:], labels)), level_t)
    v_loss = _v_loss(denoise(z, lambda_t[free:], labels, context, lambda_tau[free:]), target)
    if free > 0:  # what is noisier than the first context learns from the images, which costs nothing heavy
        labels = class_labels if class_labels is None else class_labels[:free]
        alone = denoise(z_t[:free], lambda_t[:free], labels, None, None)
        v_loss = torch.cat([_v_loss(alone, v[:free]), v_loss])
    weight = sigmoid_weight(lambda_t, schedule.log_snr_rate(t), bias)
    return DenoisingLoss(loss=(weight * v_loss).mean(), v_loss=v_loss.detach())
