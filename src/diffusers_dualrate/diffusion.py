"""The variance-preserving diffusion process, as pure functions of tensors.

    z_t = α_t x + σ_t ε,   α² + σ² = 1,   λ_t = log(α_t²/σ_t²)   ("log_snr", the only primitive)

Time runs from t = 0 (data) to t = 1 (noise). Networks predict v = α ε − σ x. Schedules follow simple diffusion
(arXiv 2301.11093); transitions and the posterior are those of variational diffusion models (arXiv 2107.00630).
Arguments `log_snr*` must broadcast against images [B, C, H, W]: use `[B, 1, 1, 1]` or a scalar.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _cosine_coefficients(log_snr_min: float, log_snr_max: float) -> tuple[float, float]:
    offset = math.atan(math.exp(-log_snr_max / 2))
    slope = math.atan(math.exp(-log_snr_min / 2)) - offset
    return slope, offset


def cosine_log_snr(t: Tensor, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0) -> Tensor:
    """Log-SNR of the cosine schedule, λ_t = −2 log tan(a t + c), which falls from `log_snr_max` to `log_snr_min`."""
    slope, offset = _cosine_coefficients(log_snr_min, log_snr_max)
    return -2 * torch.log(torch.tan(slope * t + offset))


def cosine_log_snr_rate(t: Tensor, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0) -> Tensor:
    """How fast the cosine schedule loses log-SNR, −dλ/dt = 4a / sin(2(a t + c)) > 0."""
    slope, offset = _cosine_coefficients(log_snr_min, log_snr_max)
    return 4 * slope / torch.sin(2 * (slope * t + offset))


def resolution_shift(t: Tensor, *, image_size: int, noise_low: int, noise_high: int) -> Tensor:
    """What a schedule made for one resolution gains in log-SNR when it serves images of another (2301.11093, eq. 3, 4).

    The shift is 2 log(noise/image_size): negative, that is noisier, for images larger than the resolution the noise
    is meant for. With `noise_low < noise_high` it goes from the high resolution's shift at the data end, t = 0, to the
    low one's at t = 1; with both equal it is constant.
    """
    high, low = (2 * math.log(noise / image_size) for noise in (noise_high, noise_low))
    return (1 - t) * high + t * low


def resolution_shift_rate(*, noise_low: int, noise_high: int) -> float:
    """What `resolution_shift` adds to −dλ/dt: 2 log(noise_high/noise_low)."""
    return 2 * math.log(noise_high / noise_low)


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise amplitude: α² = sigmoid(λ), σ² = sigmoid(−λ)."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def add_noise(x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """Noisy image z = α x + σ ε."""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * x + sigma * eps


def v_from_x_eps(x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """Velocity v = α ε − σ x (progressive distillation, arXiv 2202.00512)."""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * eps - sigma * x


def x_from_v(z: Tensor, v: Tensor, log_snr: Tensor) -> Tensor:
    """Clean image x = α z − σ v."""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * z - sigma * v


def eps_from_v(z: Tensor, v: Tensor, log_snr: Tensor) -> Tensor:
    """Noise ε = σ z + α v."""
    alpha, sigma = alpha_sigma(log_snr)
    return sigma * z + alpha * v


def v_from_x(z: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    """Velocity of the clean image x given the noisy one, v = (α z − x)/σ."""
    alpha, sigma = alpha_sigma(log_snr)
    return (alpha * z - x) / sigma


def transition(log_snr_t: Tensor, log_snr_tau: Tensor) -> tuple[Tensor, Tensor]:
    """Forward transition q(z_τ | z_t) for τ ≥ t, that is λ_τ ≤ λ_t.

    Returns:
        Factor r = α_τ/α_t of z_t, and standard deviation σ_τ √(1 − exp(λ_τ − λ_t)).
    """
    # Through logarithms, since α underflows long before the ratio does.
    ratio = torch.exp((logsigmoid(log_snr_tau) - logsigmoid(log_snr_t)) / 2)
    # Where τ = t, rounding may put λ_τ above λ_t by an ulp.
    std = (torch.sigmoid(-log_snr_tau) * -torch.expm1((log_snr_tau - log_snr_t).clamp(max=0))).sqrt()
    return ratio, std


def posterior(
    log_snr_t: Tensor, log_snr_s: Tensor, *, variance_interpolation: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Ancestral posterior q(z_s | z_t, x) for s < t, that is λ_s > λ_t.

    With c = 1 − exp(λ_t − λ_s) it is normal with mean α_s [(1 − c) z_t/α_t + c x] and variance σ_s² c. The variance may
    be interpolated on a log scale towards that of the forward transition, σ_t² c, as a sampler's free choice:
    log var = γ log(σ_t² c) + (1 − γ) log(σ_s² c).

    Args:
        log_snr_t: Log-SNR of the noisier image.
        log_snr_s: Log-SNR of the cleaner image.
        variance_interpolation: γ in [0, 1]; 0 is the posterior itself.

    Returns:
        Factor of z_t, factor of x, and standard deviation.
    """
    c = -torch.expm1(log_snr_t - log_snr_s)
    factor_z = torch.exp((logsigmoid(log_snr_s) - logsigmoid(log_snr_t)) / 2 + log_snr_t - log_snr_s)
    factor_x = torch.sigmoid(log_snr_s).sqrt() * c
    log_variance = torch.lerp(logsigmoid(-log_snr_s), logsigmoid(-log_snr_t), variance_interpolation)
    return factor_z, factor_x, (c * torch.exp(log_variance)).sqrt()


def gaussian_update(
    z_t: Tensor, z_tau: Tensor, x: Tensor, variance: Tensor, log_snr_t: Tensor, log_snr_tau: Tensor
) -> Tensor:
    """Mean of x given z_t and z_τ, both on one Markov trajectory, where x given z_τ alone is normal.

    What z_t tells beyond z_τ is an observation of x with precision m = snr_t − snr_τ, so with mean x̂ and variance P
    the mean becomes x̂ + P r/(1 + m P), r = α_t z_t/σ_t² − α_τ z_τ/σ_τ² − m x̂. Exact for Gaussian data with their own
    posterior; x̂ itself where t = τ. Beyond the paper, and of the ancestral chain only: along a deterministic path z_t
    is no new observation.

    Args:
        z_t: Noisy images [B, C, H, W].
        z_tau: Noisier images of the same trajectories.
        x: Mean x̂ of the clean images given z_τ.
        variance: Variance P of the clean images given z_τ, positive, broadcastable against x.
        log_snr_t: λ_t.
        log_snr_tau: λ_τ ≤ λ_t.
    """
    snr_tau = torch.exp(log_snr_tau)
    # Where τ = t, rounding may put λ_τ above λ_t by an ulp.
    gained = (snr_tau * torch.expm1(log_snr_t - log_snr_tau)).clamp(min=0)

    def information(z: Tensor, log_snr: Tensor) -> Tensor:  # α z/σ²
        return z * torch.exp((logsigmoid(log_snr) - 2 * logsigmoid(-log_snr)) / 2)

    residual = information(z_t, log_snr_t) - information(z_tau, log_snr_tau) - gained * x
    return x + variance * residual / (1 + gained * variance)
