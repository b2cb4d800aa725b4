"""The diffusion process against closed forms: rotations, products of Gaussians and covariances, in float64."""

import math

import pytest
import torch
from torch.autograd.functional import jvp

from diffusers_dualrate import diffusion
from diffusers_dualrate.losses import coupled_pair

STDS = (0.25, 1.0, 2.0)
LEVELS = torch.linspace(-12, 12, 49, dtype=torch.float64)
TIMES = torch.linspace(0, 1, 65, dtype=torch.float64)
SHIFTS = [(32, 64, 64), (32, 128, 128), (32, 256, 512), (64, 64, 32)]


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


def ordered_pairs():
    """All pairs (clean, noisy) of log-SNR levels with clean ≥ noisy, [P] each."""
    clean, noisy = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    keep = clean >= noisy
    return clean[keep], noisy[keep]


def amplitudes(log_snr):
    """α and σ from the angle tan φ = σ/α = e^(−λ/2), which shares nothing with the code under test."""
    angle = torch.atan(torch.exp(-log_snr / 2))
    return angle.cos(), angle.sin()


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_alpha_and_sigma_are_positive_lie_on_the_unit_circle_and_have_the_given_log_snr():
    """Kills: α and σ swapped; sigmoid(λ/2) for sigmoid(λ); a missing square root; a sign in either sigmoid."""
    alpha, sigma = diffusion.alpha_sigma(LEVELS)
    assert (alpha > 0).all() and (sigma > 0).all()
    close(alpha**2 + sigma**2, torch.ones_like(LEVELS))
    close(2 * (alpha.log() - sigma.log()), LEVELS)


@pytest.mark.parametrize(("low", "high"), [(-10.0, 10.0), (-15.0, 15.0), (-7.0, 12.0)])
def test_the_cosine_schedule_runs_from_the_highest_log_snr_at_the_data_to_the_lowest_at_the_noise(low, high):
    """Kills: minimum and maximum swapped; a or c without the half; −2 becoming 2 or −1; a t − c."""
    ends = diffusion.cosine_log_snr(float64([0.0, 1.0]), log_snr_min=low, log_snr_max=high)
    close(ends, float64([high, low]))
    between = diffusion.cosine_log_snr(TIMES, log_snr_min=low, log_snr_max=high)
    assert (between.diff() < 0).all()


def test_the_unlimited_cosine_schedule_has_the_signal_amplitude_that_names_it():
    """α_t = cos(π t/2) and σ_t = sin(π t/2) where the limits are far away. Kills: tan becoming sin; a factor on t."""
    inner = TIMES[1:-1]
    alpha, sigma = diffusion.alpha_sigma(diffusion.cosine_log_snr(inner, log_snr_min=-60, log_snr_max=60))
    close(alpha, (math.pi / 2 * inner).cos(), 1e-10)
    close(sigma, (math.pi / 2 * inner).sin(), 1e-10)


def test_schedules_default_to_log_snr_from_minus_ten_to_ten():
    close(diffusion.cosine_log_snr(float64([0.0, 0.5, 1.0])), float64([10.0, 0.0, -10.0]))
    close(diffusion.cosine_log_snr_rate(TIMES), diffusion.cosine_log_snr_rate(TIMES, log_snr_min=-10, log_snr_max=10))


@pytest.mark.parametrize(("low", "high"), [(-10.0, 10.0), (-15.0, 15.0), (-7.0, 12.0)])
def test_the_rate_of_the_cosine_schedule_is_its_negative_derivative(low, high):
    """Kills: 4 a becoming 2 a or −4 a; sin(2 φ) becoming sin(φ) or cos(2 φ); limits swapped in the rate."""
    limits = {"log_snr_min": low, "log_snr_max": high}
    _, slope = jvp(lambda t: diffusion.cosine_log_snr(t, **limits), TIMES, torch.ones_like(TIMES))
    close(diffusion.cosine_log_snr_rate(TIMES, **limits), -slope, 1e-9)


@pytest.mark.parametrize(("noise_low", "noise_high", "image_size"), SHIFTS)
def test_the_rate_of_the_interpolated_shift_is_its_negative_derivative(noise_low, noise_high, image_size):
    """Kills: high and low swapped in either function; the factor 2 dropped in either; the rate's sign."""

    def shift(t):
        return diffusion.resolution_shift(t, image_size=image_size, noise_low=noise_low, noise_high=noise_high)

    _, slope = jvp(shift, TIMES, torch.ones_like(TIMES))
    rate = diffusion.resolution_shift_rate(noise_low=noise_low, noise_high=noise_high)
    close(torch.full_like(TIMES, rate), -slope)


@pytest.mark.parametrize("image_size", [64, 128, 256])
def test_shifted_noise_pooled_down_to_its_own_resolution_has_the_log_snr_it_was_made_for(image_size):
    """Averaging (d/32)² pixels leaves a smooth signal and divides the noise variance by (d/32)².

    Kills: the sign of the shift (less noise for larger images), the missing factor 2, noise/image turned over.
    """
    base = diffusion.cosine_log_snr(TIMES)
    shifted = base + diffusion.resolution_shift(TIMES, image_size=image_size, noise_low=32, noise_high=32)
    assert (shifted < base).all()
    alpha, sigma = amplitudes(shifted)
    pooled_noise_variance = sigma**2 / (image_size // 32) ** 2
    close(torch.log(alpha**2 / pooled_noise_variance), base, 1e-9)


@pytest.mark.parametrize(("noise_low", "noise_high", "image_size"), SHIFTS)
def test_the_interpolated_shift_serves_the_high_resolution_at_the_data_and_the_low_one_at_the_noise(
    noise_low, noise_high, image_size
):
    """Kills: t and 1 − t swapped."""
    data, noise = diffusion.resolution_shift(
        float64([0.0, 1.0]), image_size=image_size, noise_low=noise_low, noise_high=noise_high
    )
    assert data.item() == pytest.approx(math.log((noise_high / image_size) ** 2), abs=1e-12)
    assert noise.item() == pytest.approx(math.log((noise_low / image_size) ** 2), abs=1e-12)


@pytest.mark.parametrize("std", STDS)
def test_image_noise_and_velocity_convert_into_one_another(std):
    """Kills: any sign, and any α and σ swapped, in add_noise and the four conversions (some only where std ≠ 1)."""
    x = std * torch.randn(200, 1, dtype=torch.float64)
    eps = torch.randn(200, 1, dtype=torch.float64)
    alpha, sigma = amplitudes(LEVELS)
    z, v = diffusion.add_noise(x, eps, LEVELS), diffusion.v_from_x_eps(x, eps, LEVELS)
    close(z, alpha * x + sigma * eps)
    close(diffusion.x_from_v(z, v, LEVELS), x.expand_as(z))
    close(diffusion.eps_from_v(z, v, LEVELS), eps.expand_as(z))
    close(diffusion.v_from_x(z, x, LEVELS), v, 1e-9)


def test_velocity_is_the_derivative_of_the_noisy_image_along_the_circle():
    """v = dz/dφ with tan φ = σ/α. Kills: the sign of v, α and σ swapped in v."""
    x, eps = float64(0.3), float64(-1.7)
    angle = torch.linspace(0.1, 1.4, 20, dtype=torch.float64)
    _, velocity = jvp(lambda phi: diffusion.add_noise(x, eps, -2 * phi.tan().log()), angle, torch.ones_like(angle))
    close(diffusion.v_from_x_eps(x, eps, -2 * angle.tan().log()), velocity, 1e-9)


@pytest.mark.parametrize("std", STDS)
def test_the_posterior_is_the_product_of_the_prior_and_the_transition(std):
    """Bayes: q(z_s|x) q(z_t|z_s) as a product of Gaussians in z_s, by precisions. Kills: c = 1 − e^(λ_s − λ_t); any
    sign or factor in the logarithms of factor_z; α_s becoming σ_s or α_t in factor_x; σ_s and σ_t swapped."""
    log_snr_s, log_snr_t = (level[ordered_pairs()[0] > ordered_pairs()[1]] for level in ordered_pairs())
    (alpha_s, sigma_s), (alpha_t, sigma_t) = amplitudes(log_snr_s), amplitudes(log_snr_t)
    ratio = alpha_t / alpha_s
    variance_forward = sigma_t**2 - ratio**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + ratio**2 / variance_forward)
    x = std * torch.randn(len(ratio), dtype=torch.float64)
    z_t = alpha_t * x + sigma_t * torch.randn(len(ratio), dtype=torch.float64)
    mean = variance * (alpha_s * x / sigma_s**2 + ratio * z_t / variance_forward)

    factor_z, factor_x, posterior_std = diffusion.posterior(log_snr_t, log_snr_s)
    close(factor_z * z_t + factor_x * x, mean, 1e-7)
    close(posterior_std**2, variance, 1e-7)


def test_posterior_steps_keep_the_marginal_of_a_given_image():
    """Averaged over q(z_t|x), the posterior is q(z_s|x). Kills: as above, without dividing by small numbers."""
    log_snr_s, log_snr_t = ordered_pairs()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = amplitudes(log_snr_s), amplitudes(log_snr_t)
    factor_z, factor_x, std = diffusion.posterior(log_snr_t, log_snr_s)
    close(factor_z * alpha_t + factor_x, alpha_s)
    close(factor_z**2 * sigma_t**2 + std**2, sigma_s**2)


def test_a_step_of_no_length_returns_the_noisy_image_itself():
    """Kills: 1 − c becoming c, λ_s − λ_t inside expm1 with its sign lost."""
    for function in (diffusion.posterior, diffusion.transition):
        factor, *rest = function(LEVELS, LEVELS)
        assert torch.equal(factor, torch.ones_like(LEVELS))
        assert all((part == 0).all() for part in rest)


def test_variance_interpolation_goes_from_the_posterior_to_the_forward_transition():
    """γ = 0 is the posterior's variance, γ = 1 that of q(z_t|z_s), γ = ¼ their weighted geometric mean.

    Kills: γ and 1 − γ swapped; σ_t² without c; interpolation of variances instead of their logarithms.
    """
    log_snr_s, log_snr_t = ordered_pairs()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = amplitudes(log_snr_s), amplitudes(log_snr_t)
    forward_variance = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    posterior_variance = sigma_s**2 * forward_variance / sigma_t**2

    def variance(gamma):
        factor_z, factor_x, std = diffusion.posterior(log_snr_t, log_snr_s, variance_interpolation=gamma)
        assert all(map(torch.equal, (factor_z, factor_x), diffusion.posterior(log_snr_t, log_snr_s)[:2]))
        return std**2

    close(variance(0.0), posterior_variance)
    close(variance(1.0), forward_variance)
    close(variance(0.25), posterior_variance**0.75 * forward_variance**0.25, 1e-7)


def test_transitions_compose_and_end_in_the_marginals():
    """t → τ → 1 equals t → 1, and a transition from q(z_t|x) is q(z_τ|x).

    Kills: r turned over or squared; σ_τ becoming σ_t; λ_τ − λ_t with the other sign or halved.
    """
    log_snr_t, log_snr_tau = ordered_pairs()
    log_snr_1 = log_snr_tau - 1.5
    (alpha_t, sigma_t), (alpha_tau, sigma_tau) = amplitudes(log_snr_t), amplitudes(log_snr_tau)
    ratio, std = diffusion.transition(log_snr_t, log_snr_tau)
    close(ratio * alpha_t, alpha_tau)
    close(ratio**2 * sigma_t**2 + std**2, sigma_tau**2)
    ratio_on, std_on = diffusion.transition(log_snr_tau, log_snr_1)
    ratio_all, std_all = diffusion.transition(log_snr_t, log_snr_1)
    close(ratio_on * ratio, ratio_all)
    close(ratio_on**2 * std**2 + std_on**2, std_all**2)


def test_transition_and_posterior_stay_finite_where_amplitudes_underflow():
    """At λ ≪ 0 amplitudes go like e^(λ/2), too small for float32. Kills: ratios formed from the amplitudes."""
    log_snr_t, log_snr_tau = torch.tensor(-200.0), torch.tensor(-204.0)
    ratio, std = diffusion.transition(log_snr_t, log_snr_tau)
    close(ratio, torch.tensor(math.exp(-2)), 1e-5)
    close(std, torch.tensor(math.sqrt(1 - math.exp(-4))), 1e-5)
    factor_z, factor_x, std = diffusion.posterior(log_snr_tau, log_snr_t)
    close(factor_z, torch.tensor(math.exp(-2)), 1e-5)
    assert factor_x < 1e-40
    close(std, torch.tensor(math.sqrt(1 - math.exp(-4))), 1e-5)


def test_a_transition_survives_log_snrs_that_rounding_has_swapped():
    """In float32 a shifted schedule is not monotone to the last bit: τ one bit after t may have the larger log-SNR.

    Kills: the missing clamp, without which one such draw in 10⁸ turns a training run into NaN.
    """
    log_snr_t = torch.tensor(6.0)
    ratio, std = diffusion.transition(log_snr_t, torch.nextafter(log_snr_t, torch.tensor(7.0)))
    close(ratio, torch.tensor(1.0), 1e-6)
    assert std == 0


def pair_coefficients(log_snr_t, log_snr_tau):
    """Coefficients of z_t and z_τ on independent unit-variance (x, ε, ε_τ) [2, 3]: the pair of each basis vector."""
    x, eps, eps_tau = torch.eye(3, dtype=torch.float64)
    return torch.stack(coupled_pair(x, eps, eps_tau, log_snr_t, log_snr_tau))


def regression(coefficients, variances):
    """Weights of the best linear prediction of x, the first variable, from the rows of `coefficients`."""
    covariance = coefficients * variances @ coefficients.T
    return torch.linalg.solve(covariance, coefficients[:, 0] * variances[0])


@pytest.mark.parametrize("std", STDS)
def test_a_coupled_pair_has_the_covariance_of_one_trajectory_and_leaves_nothing_to_learn_from_the_older_image(std):
    """Cov(z_t, z_τ) = α_t α_τ Var x + r σ_t², and x regressed on both puts weight 0 on z_τ, for Gaussian data.

    Kills: independent noise for z_τ; eps_tau used for z_t or eps for z_τ; r dropped; t and τ swapped in the transition.
    """
    for t, tau in [(0.4, 0.6), (0.05, 0.06), (0.1, 0.9), (0.9, 1.0)]:
        log_snr_t, log_snr_tau = diffusion.cosine_log_snr(float64([t, tau]))
        coefficients, variances = pair_coefficients(log_snr_t, log_snr_tau), float64([std**2, 1.0, 1.0])
        (alpha_t, sigma_t), (alpha_tau, sigma_tau) = amplitudes(log_snr_t), amplitudes(log_snr_tau)
        covariance = coefficients * variances @ coefficients.T
        close(covariance[0, 0], alpha_t**2 * std**2 + sigma_t**2)
        close(covariance[1, 1], alpha_tau**2 * std**2 + sigma_tau**2)
        close(covariance[0, 1], alpha_t * alpha_tau * std**2 + alpha_tau / alpha_t * sigma_t**2)
        alone = alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2)
        close(regression(coefficients, variances), torch.stack([alone, torch.zeros_like(alone)]), 1e-8)


def test_the_covariance_of_the_published_example_is_found_and_independent_noise_would_leak():
    """t = .4, τ = .6, Var x = .7, cosine [−10, 10]: covariance .586; with independent noise z_τ gets weight .23."""
    log_snr_t, log_snr_tau = diffusion.cosine_log_snr(float64([0.4, 0.6]))
    variances = float64([0.7, 1.0, 1.0])
    coupled = pair_coefficients(log_snr_t, log_snr_tau)
    assert (coupled[0] * variances @ coupled[1]).item() == pytest.approx(0.586, abs=5e-4)

    (alpha_t, sigma_t), (alpha_tau, sigma_tau) = amplitudes(log_snr_t), amplitudes(log_snr_tau)
    independent = torch.zeros(2, 3, dtype=torch.float64)
    independent[0, :2] = torch.stack([alpha_t, sigma_t])
    independent[1, ::2] = torch.stack([alpha_tau, sigma_tau])
    assert regression(independent, variances)[1].item() == pytest.approx(0.23, abs=5e-3)


@pytest.mark.parametrize("std", STDS)
def test_drawn_pairs_have_the_covariance_of_one_trajectory(std):
    """The same in float32 and over random images, with log-SNRs that differ from image to image."""
    rows, size = 3, (1, 200, 500)
    x, eps, eps_tau = std * torch.randn(rows, *size), torch.randn(rows, *size), torch.randn(rows, *size)
    log_snr_t, log_snr_tau = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([2.0, -2.0, -2.5])
    pair = coupled_pair(x, eps, eps_tau, log_snr_t.reshape(-1, 1, 1, 1), log_snr_tau.reshape(-1, 1, 1, 1))
    for i, (z_t, z_tau) in enumerate(zip(*pair, strict=True)):
        alpha_t, sigma_t = amplitudes(log_snr_t[i])
        alpha_tau, _ = amplitudes(log_snr_tau[i])
        expected = alpha_t * alpha_tau * std**2 + alpha_tau / alpha_t * sigma_t**2
        assert (z_t * z_tau).mean().item() == pytest.approx(expected.item(), abs=0.02 * max(1, std**2))


def exact_posterior(z, log_snr, variance):
    """Mean and variance of x given z for x ~ N(0, variance)."""
    alpha, sigma = amplitudes(log_snr)
    marginal = alpha**2 * variance + sigma**2
    return alpha * variance / marginal * z, variance * sigma**2 / marginal


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("log_snrs", [(8.0, -8.0), (2.0, 1.0), (-1.0, -3.0), (9.9, 9.0)])
def test_the_update_is_exact_for_gaussian_data_at_any_lag(std, log_snrs):
    """Given both noisy images the mean is that given z_t alone, k_t z_t, whatever z_τ says: the chain is Markov.

    Kills: m with snr_τ for snr_t; the sign of m x̂ and of z_τ's information; σ for σ² in either; P left out below.
    """
    log_snr_t, log_snr_tau = float64(log_snrs)
    generator = torch.Generator().manual_seed(0)
    z_t, z_tau = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    x_tau, variance = exact_posterior(z_tau, log_snr_tau, std**2)
    updated = diffusion.gaussian_update(z_t, z_tau, x_tau, variance, log_snr_t, log_snr_tau)
    torch.testing.assert_close(updated, exact_posterior(z_t, log_snr_t, std**2)[0], rtol=1e-9, atol=1e-9)


def test_the_update_changes_nothing_where_nothing_was_learned_and_stays_finite():
    z, x = torch.randn(2, 4, 1, 8, 8)
    level = torch.tensor(1.5)
    torch.testing.assert_close(diffusion.gaussian_update(z, z, x, torch.tensor(0.1), level, level), x)
    t = torch.tensor([0.005, 1.0])
    near, far = diffusion.cosine_log_snr(t)
    updated = diffusion.gaussian_update(z, torch.randn_like(z), x, torch.tensor(0.2), near, far)
    # At almost no noise the image itself is the answer.
    assert (updated - z / amplitudes(near)[0]).abs().max() < 0.05
    assert diffusion.v_from_x(z, updated, near).isfinite().all()
