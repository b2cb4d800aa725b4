"""Several targets for one context: their times have the law of the first, and each lies on a trajectory with z_τ."""

import pytest
import torch

from diffusers_dualrate import diffusion
from diffusers_dualrate.losses import bridge, denoising_loss, draw, further_times, window_times

SCHEDULE = {"log_snr": diffusion.cosine_log_snr, "log_snr_rate": diffusion.cosine_log_snr_rate}


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_further_times_have_the_law_of_the_first_given_tau(steps):
    """Kills: u for √u and 1 − u for it at τ = 1; the missing bound at 0; K of another row."""
    uniforms, more = torch.rand(400_000, 3), torch.rand(400_000, 1)
    t, tau = window_times(uniforms, (steps, 32))
    further = further_times(tau, uniforms, more, (steps, 32))[:, 0]
    assert (further >= 0).all() and (further <= tau).all()
    short = uniforms[:, 1] >= 0.5
    assert (tau - further)[short].max() <= 1 / 32 + 1e-6
    edges = {"τ = 1": tau == 1, "τ near 0": tau < 1 / (2 * steps), "between": (tau > 1 / steps) & (tau < 1)}
    for name, chosen in edges.items():
        for choice in (chosen & short, chosen & ~short):
            if choice.sum() < 3000:  # with K = 1 nothing lies between
                continue
            lag, expected = (tau - further)[choice], (tau - t)[choice]
            spread = 5 * expected.std() / choice.sum() ** 0.5
            assert (lag.mean() - expected.mean()).abs() < 1.5 * spread, name
            for level in (0.1, 0.5, 0.9):
                quantile = expected[:100_000].quantile(level)
                assert ((lag < quantile).double().mean() - level).abs() < 0.03, name


@pytest.mark.parametrize("std", [0.25, 1.0, 2.0])
def test_a_further_image_has_the_covariance_of_the_process_with_z_tau(std):
    """Closed form Cov(z_t, z_τ) = α_t α_τ Var x + r σ_t². Kills: t and τ exchanged; fresh noise around x."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    x, eps_tau, eps = (part[:, None, None, None] for part in signs.T)
    log_snr_t, log_snr_tau = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    z_tau = diffusion.add_noise(std * x, eps_tau, log_snr_tau)
    z_t = bridge(std * x, z_tau, eps, log_snr_t, log_snr_tau)
    (alpha_t, sigma_t), (alpha_tau, sigma_tau) = map(diffusion.alpha_sigma, (log_snr_t, log_snr_tau))
    ratio = alpha_tau / alpha_t
    torch.testing.assert_close((z_t * z_tau).mean(), alpha_t * alpha_tau * std**2 + ratio * sigma_t**2)
    torch.testing.assert_close(z_t.square().mean(), alpha_t**2 * std**2 + sigma_t**2)
    torch.testing.assert_close((z_t * x).mean(), alpha_t * std)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_targets_share_one_evaluation_of_the_encoder_and_weigh_alike(dropout):
    calls = {"encode": [], "denoise": []}

    def encode(z, log_snr, labels):
        calls["encode"].append(len(z))
        return z, log_snr

    def denoise(z, log_snr, labels, context, context_log_snr):
        calls["denoise"].append((len(z), context))
        if context is not None:
            assert (log_snr >= context_log_snr).all() and torch.equal(context_log_snr, context[1])
        return torch.zeros_like(z)

    x = torch.randn(8, 1, 4, 4)
    draws = draw(0, 0, range(8), x.shape[1:], targets_per_context=3)
    options = {"bias": 0.0, "context_steps": (4,), "context_dropout": dropout, **SCHEDULE}
    result = denoising_loss(denoise, encode, x, None, draws, **options)
    free = round(8 * dropout)
    assert calls["encode"] == [8 - free]
    contexts = [context for _, context in calls["denoise"] if context is not None]
    assert len(contexts) == 3 and all(context is contexts[0] for context in contexts)
    # One target each, the others put first in turn: the same times and noises one by one.
    first = denoising_loss(denoise, encode, x, None, draw(0, 0, range(8), x.shape[1:]), **options)
    assert torch.equal(first.v_loss[:free], result.v_loss[:free])
    t, tau = window_times(draws.uniforms[:, :3], (4,))
    further = further_times(tau, draws.uniforms[:, :3], draws.further_uniforms, (4,))
    lambda_t, lambda_tau = (diffusion.cosine_log_snr(time)[:, None, None, None] for time in (t, tau))
    ratio, std = diffusion.transition(lambda_t, lambda_tau)
    z_tau = ratio * diffusion.add_noise(x, draws.eps, lambda_t) + std * draws.eps_tau
    squares = [diffusion.v_from_x_eps(x, draws.eps, lambda_t).square().mean((1, 2, 3))]
    for j in range(2):
        level = diffusion.cosine_log_snr(further[:, j])[:, None, None, None]
        z = bridge(x, z_tau, draws.further_eps[:, j], level, lambda_tau)
        squares.append(diffusion.v_from_x(z, x, level).square().mean((1, 2, 3)))
    torch.testing.assert_close(result.v_loss[free:], torch.stack(squares).mean(0)[free:])


def test_further_targets_change_no_draw_of_the_first():
    one, three = (draw(3, 5, range(4), (1, 2, 2), targets_per_context=count) for count in (1, 3))
    for name in ("uniforms", "eps", "eps_tau"):
        assert torch.equal(getattr(one, name), getattr(three, name))
    assert three.further_eps.shape == (4, 2, 1, 2, 2) and three.further_uniforms.shape == (4, 2)
    with pytest.raises(ValueError, match="targets_per_context must be at least 1, got 0"):
        draw(0, 0, range(2), (1, 2, 2), targets_per_context=0)
