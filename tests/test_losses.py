"""Draws, the window of τ and the denoising loss, on Gaussian data whose best denoiser is known in closed form."""

import math

import pytest
import torch

from diffusers_dualrate import diffusion
from diffusers_dualrate.losses import (
    ContextTimes,
    Draws,
    FollowingTimes,
    Schedule,
    denoising_loss,
    draw,
    drop_condition,
    following_loss,
    seed_of,
    sigmoid_weight,
    window_times,
)

STDS = (0.25, 1.0, 2.0)
SHAPE = (1, 2, 4)


def schedule(image_size=None, bias=0.0):
    """λ and −dλ/dt, shifted where `image_size` is given."""
    if image_size is None:
        return Schedule(diffusion.cosine_log_snr, diffusion.cosine_log_snr_rate, bias)
    sizes = {"noise_low": 32, "noise_high": image_size}
    return Schedule(
        lambda t: diffusion.cosine_log_snr(t) + diffusion.resolution_shift(t, image_size=image_size, **sizes),
        lambda t: diffusion.cosine_log_snr_rate(t) + diffusion.resolution_shift_rate(**sizes),
        bias,
    )


def balanced_batch(times, std, lag=0.5):
    """Images and draws whose pixels run through all signs of (x, ε, ε_τ): moments up to the second are exact.

    So the mean over pixels of a quadratic form of (x, ε, ε_τ) is its expectation for Var x = std², without sampling.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    x, eps, eps_tau = (part.expand(len(times), -1).reshape(-1, *SHAPE) for part in signs.T)
    uniforms = torch.stack([times, *[torch.full_like(times, value) for value in (0.0, lag, 0.5)]], dim=1)
    return std * x, Draws(uniforms, eps, eps_tau)


def midpoints(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def per_row(value):
    return value.reshape(-1, 1, 1, 1)


def test_the_window_never_puts_tau_before_t_or_after_one():
    """Kills: t − lag; the missing clamp."""
    uniforms = torch.rand(20000, 3)
    uniforms[:200, 0], uniforms[200:400, 2], uniforms[400:600] = 1 - 2**-24, 0.0, 1 - 2**-24
    t, tau = window_times(uniforms, ContextTimes((1, 1 / 4, 1 / 32)))
    assert torch.equal(t, uniforms[:, 0])
    assert (tau >= t).all() and (tau <= 1).all()
    assert (tau[200:400] == t[200:400]).all()
    assert (tau == 1).any()


@pytest.mark.parametrize("steps", [1, 4, 5, 32])
def test_the_lag_is_uniform_up_to_one_refresh_interval(steps):
    """Kills: lag / a; lag of another column; a constant or squared lag."""
    uniforms = torch.rand(40000, 3, dtype=torch.float64)
    uniforms[:, 0] *= 1 - 1 / steps  # where the clamp cannot act
    if steps == 1:
        uniforms[:, 0] = 0
    t, tau = window_times(uniforms, ContextTimes((1 / steps,)))
    ranks = ((tau - t) * steps).sort().values
    assert (ranks - midpoints(len(ranks))).abs().max() < 0.01
    if steps > 1:
        assert torch.corrcoef(torch.stack([t, tau - t]))[0, 1].abs() < 0.02


def test_every_age_of_context_is_drawn_equally_often_whatever_the_time_and_lag():
    """Kills: which of the ages read from another column; the last one never drawn; a constant one."""
    choices = (1, 2, 5, 10, 100)
    uniforms = torch.rand(50000, 3, dtype=torch.float64)
    uniforms[:, 0] = 0
    t, tau = window_times(uniforms, ContextTimes([1 / steps for steps in choices]))
    implied = (uniforms[:, 2] / (tau - t)).round().long()
    for steps in choices:
        chosen = implied == steps
        assert chosen.double().mean().item() == pytest.approx(1 / len(choices), abs=0.01)
        assert uniforms[chosen, 2].mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("start", "without"), [(0.5, 20000), (0.75, 10000), (0.3, 28000)])
def test_times_are_uniform_wherever_contexts_begin_and_no_context_is_older_than_the_first(start, without):
    """Kills: c and 1 − c swapped in either part; τ up to 1; the rows without context last."""
    uniforms = torch.rand(40000, 3, dtype=torch.float64)
    t, tau = window_times(uniforms, ContextTimes((0.25, 0.5), start, without, without))
    assert (t[:without] >= start).all() and (t[without:] <= start).all()
    assert (t.sort().values - midpoints(len(t))).abs().max() < 0.01
    assert (tau >= t).all() and (tau[without:] <= start).all() and (tau[without:] == start).any()
    inside = tau[without:] < start
    lag = (tau - t)[without:][inside]
    assert lag.max() > 0.9 * min(0.5, start)


def test_rows_noisier_than_the_first_context_see_none_and_teach_the_encoder_nothing():
    """Kills: the encoder run on them; their times left uniform in all of [0, 1]; the other rows' times so."""
    recorder, draws, start = Recorder(), draw(0, 0, range(8), SHAPE), 0.75
    x = torch.randn(8, *SHAPE)
    loss_of(recorder, x, draws, context_from=start, num_above=2, num_without=4)
    (z_free, level_free, _, context, _), (_, level, _, _, level_tau) = recorder.denoised
    ((z_tau, encoder_level, _),) = recorder.encoded
    assert context is None and len(z_free) == 4 and len(z_tau) == 4
    first = diffusion.cosine_log_snr(torch.tensor(start))
    u = draws.uniforms[:, 0]
    expected = diffusion.cosine_log_snr(torch.cat([start + (1 - start) * u[:2], start * u[2:]]))
    torch.testing.assert_close(torch.cat([level_free, level]), expected)
    assert (level_free[:2] <= first).all() and (level_free[2:] >= first).all()
    assert torch.equal(encoder_level, level_tau) and (encoder_level >= first - 1e-5).all()
    late = loss_of(Recorder(), x, draws, context_from=start, num_above=8, num_without=8)
    alone = Recorder()
    loss_of(alone, x, draws, context_from=start, num_above=8, num_without=8).loss.backward()
    assert late.loss > 0 and alone.encoder_gain.grad is None and not alone.encoded


def test_a_context_from_the_beginning_is_bit_equal_to_one_that_says_nothing_of_it():
    x, draws = torch.randn(6, *SHAPE), draw(0, 0, range(6), SHAPE)
    plain = loss_of(Recorder(), x, draws, num_without=3)
    said = loss_of(Recorder(), x, draws, num_without=3, context_from=1.0, num_above=0)
    assert torch.equal(plain.loss, said.loss) and torch.equal(plain.v_loss, said.v_loss)


def test_a_fresh_context_has_the_age_zero():
    t, tau = window_times(torch.rand(100, 3), ContextTimes((0,)))
    assert torch.equal(t, tau)


def test_a_row_of_draws_depends_on_seed_step_and_row_alone():
    """Kills: a generator seeded once per batch; rows numbered by their place in the batch."""
    together = draw(3, 7, [0, 4, 9], SHAPE)
    for rows in ([9], [4, 9, 0], range(10)):
        other = draw(3, 7, rows, SHAPE)
        for place, row in enumerate(rows):
            if row in (0, 4, 9):
                here = (0, 4, 9).index(row)
                assert torch.equal(together.uniforms[here], other.uniforms[place])
                assert torch.equal(together.eps[here], other.eps[place])
                assert torch.equal(together.eps_tau[here], other.eps_tau[place])


def test_draws_differ_between_seeds_steps_and_rows_even_where_the_numbers_are_the_same():
    """Kills: seeds combined by a sum or left out."""
    keys = [(seed, step, row) for seed in range(3) for step in range(3) for row in range(3)]
    firsts = {draw(seed, step, [row], SHAPE).eps.flatten()[0].item() for seed, step, row in keys}
    assert len(firsts) == len(keys)


def test_seeds_are_distinct_fit_a_generator_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    seeds = [seed_of(a, b) for a in range(-20, 20) for b in range(40)] + [seed_of(a) for a in range(40)]
    draw(0, 0, [0], SHAPE)
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_are_uniform_and_standard_normal_and_mutually_independent():
    """Kills: eps_tau equal to eps; one uniform used four times; a variance other than 1."""
    draws = draw(0, 0, range(2000), SHAPE)
    assert draws.uniforms.shape == (2000, 4)
    assert draws.eps.shape == draws.eps_tau.shape == (2000, *SHAPE)
    assert ((draws.uniforms >= 0) & (draws.uniforms < 1)).all()
    torch.testing.assert_close(draws.uniforms.mean(0), torch.full((4,), 0.5), atol=0.025, rtol=0)
    columns = torch.cat([draws.uniforms, draws.eps.flatten(1), draws.eps_tau.flatten(1)], dim=1)
    correlation = torch.corrcoef(columns.T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.1
    for noise in (draws.eps, draws.eps_tau):
        assert noise.mean().item() == pytest.approx(0, abs=0.03)
        assert noise.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("bias", [-1.6, 0.0, 1.0, 2.0])
def test_the_weight_of_the_velocity_loss_makes_it_the_bound_with_the_sigmoid_weight_on_x(bias):
    """½ (−dλ/dt) e^b sigmoid(λ − b) ‖x − x̂‖². Kills: the sign of b or λ in the sigmoid; σ² missing or α²; the half."""
    log_snr = torch.linspace(-12, 12, 33, dtype=torch.float64)
    rate = torch.linspace(1, 40, 33, dtype=torch.float64)
    x, eps, v_hat = torch.randn(3, 5, 33, dtype=torch.float64)
    z = diffusion.add_noise(x, eps, log_snr)
    v_loss = (diffusion.v_from_x_eps(x, eps, log_snr) - v_hat) ** 2
    x_loss = (x - diffusion.x_from_v(z, v_hat, log_snr)) ** 2
    x_weight = 0.5 * rate * math.exp(bias) / (1 + torch.exp(bias - log_snr))
    torch.testing.assert_close(sigmoid_weight(log_snr, rate, bias) * v_loss, x_weight * x_loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("image_size", [None, 64, 256])
def test_the_loss_of_a_linear_pair_is_the_bound_computed_pixel_by_pixel(image_size):
    """Rows with context predict v̂ = k z_t + u z_τ + label, context-free ones k z_t + label; the bound is summed over
    pixels in x-space with −dλ/dt by differences. Kills: eps and eps_tau swapped; target −v; t and τ swapped anywhere;
    the weight at τ; a sum for a mean; the context-free rows last."""
    k, u, bias, steps, label_scale = 0.3, -0.2, 0.7, (2, 8), 0.05
    x, labels = 0.4 * torch.randn(6, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    noise = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    draws = Draws(0.02 + 0.96 * torch.rand(6, 4, dtype=torch.float64), *noise)

    def denoise(z, log_snr, labels, context, context_log_snr):
        return k * z + label_scale * per_row(labels) + (0 if context is None else u * context)

    result = denoising_loss(
        denoise, lambda z, log_snr, labels: (z, None), x, labels, draws,
        contexts=ContextTimes([1 / k for k in steps], num_without=2), schedule=schedule(image_size, bias),
    )  # fmt: skip

    def level(t):
        low, high = math.atan(math.exp(-5)), math.atan(math.exp(5))
        shift = 0.0
        if image_size is not None:
            shift = 2 * ((1 - t) * math.log(image_size / image_size) + t * math.log(32 / image_size))
        return -2 * math.log(math.tan(low + t * (high - low))) + shift

    losses, v_losses = [], []
    for row in range(6):
        t, which, lag, _ = draws.uniforms[row].tolist()
        tau = min(1.0, t + lag / steps[int(which * 2)])
        lam, lam_tau, rate = level(t), level(tau), (level(t - 1e-6) - level(t + 1e-6)) / 2e-6
        (alpha, sigma), (alpha_tau, sigma_tau) = (
            (1 / math.sqrt(1 + math.exp(-a)), 1 / math.sqrt(1 + math.exp(a))) for a in (lam, lam_tau)
        )
        x_errors, v_errors = [], []
        pixels = zip(*(part[row].flatten().tolist() for part in (x, draws.eps, draws.eps_tau)), strict=True)
        for pixel, eps, eps_tau in pixels:
            z = alpha * pixel + sigma * eps
            ratio = alpha_tau / alpha
            z_tau = ratio * z + math.sqrt(sigma_tau**2 - (ratio * sigma) ** 2) * eps_tau
            v_hat = k * z + label_scale * labels[row].item() + (u * z_tau if row >= 2 else 0)
            x_errors.append((pixel - (alpha * z - sigma * v_hat)) ** 2)
            v_errors.append((alpha * eps - sigma * pixel - v_hat) ** 2)
        x_weight = 0.5 * rate * math.exp(bias) / (1 + math.exp(bias - lam))
        losses.append(x_weight * sum(x_errors) / len(x_errors))
        v_losses.append(sum(v_errors) / len(v_errors))
    assert result.loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert result.v_loss.tolist() == pytest.approx(v_losses, rel=1e-5)
    assert not result.v_loss.requires_grad


def gaussian_loss(times, std, gain, context_gain=0.0, bias=1.0):
    """Loss of v̂ = gain(λ) z_t + context_gain z_τ on exactly balanced Gaussian moments."""
    x, draws = balanced_batch(times, std)

    def denoise(z, log_snr, labels, context, context_log_snr):
        return per_row(gain(log_snr)) * z + context_gain * context

    return denoising_loss(
        denoise, lambda z, log_snr, labels: (z, None), x, None, draws,
        contexts=ContextTimes((1 / 4,)), schedule=schedule(bias=bias),
    )  # fmt: skip


def ideal_gain(std):
    """The v-denoiser α σ (1 − s²)/(α² s² + σ²) of Gaussian data with standard deviation s, as a function of λ."""

    def gain(log_snr):
        angle = torch.atan(torch.exp(-log_snr / 2))
        alpha, sigma = angle.cos(), angle.sin()
        return alpha * sigma * (1 - std**2) / (alpha**2 * std**2 + sigma**2)

    return gain


@pytest.mark.parametrize("std", STDS)
def test_the_ideal_gaussian_denoiser_attains_the_smallest_possible_loss(std):
    """Per row Var(v|z) = s²/(α² s² + σ²); in all, since −dλ/dt dt is dλ, ½ ∫ e^b sigmoid(λ − b) Var(x|z) dλ.

    Kills: −v as target; λ_τ for λ_t in target or weight; a weight without the half, the rate or σ².
    """
    times = midpoints(4000)
    result = gaussian_loss(times, std, ideal_gain(std), bias=1.0)
    snr = torch.exp(diffusion.cosine_log_snr(times))
    expected = std**2 * (1 + snr) / (snr * std**2 + 1)
    torch.testing.assert_close(result.v_loss, expected, rtol=1e-5, atol=1e-6)

    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    integrand = math.e * torch.sigmoid(grid - 1.0) * std**2 / (grid.exp() * std**2 + 1)
    assert result.loss.item() == pytest.approx(torch.trapezoid(integrand, grid).item() / 2, rel=1e-3)


@pytest.mark.parametrize("std", STDS)
def test_any_other_linear_denoiser_is_worse_than_the_ideal_one(std):
    """At the optimum the loss is flat in both coefficients and rises either way; z_τ in particular is of no use.

    Kills: independent noise for z_τ (context then helps); a target of another sign or scale.
    """
    times, gain = midpoints(50), ideal_gain(std)
    best = gaussian_loss(times, std, gain).loss
    for change in (-0.3, -0.05, 0.05, 0.3):
        assert gaussian_loss(times, std, lambda log_snr, change=change: gain(log_snr) + change).loss > best + 1e-5
        assert gaussian_loss(times, std, gain, change).loss > best + 1e-5
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = gaussian_loss(times, std, lambda log_snr: gain(log_snr) + coefficients[0], coefficients[1]).loss
    assert (torch.autograd.grad(loss, coefficients)[0].abs() < 1e-4 * max(1, best.item())).all()


class Recorder:
    """A linear pair that notes what its two networks are called with."""

    def __init__(self):
        self.gain = torch.tensor(0.3, requires_grad=True)
        self.encoder_gain = torch.tensor(0.5, requires_grad=True)
        self.denoised, self.encoded = [], []

    def denoise(self, z, log_snr, labels, context, context_log_snr):
        self.denoised.append((z, log_snr, labels, context, context_log_snr))
        return torch.tanh(self.gain * z + (0 if context is None else context))

    def encode(self, z, log_snr, labels):
        self.encoded.append((z, log_snr, labels))
        return self.encoder_gain * z, None


def loss_of(recorder, x, draws, *, encode=True, labels=None, **times):
    encoder, contexts = recorder.encode if encode else None, ContextTimes((1 / 2, 1 / 4), **times)
    return denoising_loss(recorder.denoise, encoder, x, labels, draws, schedule=schedule(bias=1.0), contexts=contexts)


@pytest.mark.parametrize(("rows", "free"), [(8, 0), (8, 2), (7, 4), (4, 2), (8, 8)])
def test_the_first_rows_of_a_batch_see_no_context_and_cost_the_encoder_nothing(rows, free):
    """Kills: the first rows and the others swapped; the encoder run on z_t, at λ_t or on all rows."""
    recorder, draws = Recorder(), draw(0, 0, range(rows), SHAPE)
    x, labels = torch.randn(rows, *SHAPE), torch.arange(rows)
    loss_of(recorder, x, draws, labels=labels, num_without=free)
    t, tau = window_times(draws.uniforms[:, :3], ContextTimes((1 / 2, 1 / 4)))
    log_snr_t, log_snr_tau = diffusion.cosine_log_snr(t), diffusion.cosine_log_snr(tau)
    calls = list(recorder.denoised)
    if free > 0:
        z, log_snr, seen, context, context_log_snr = calls.pop(0)
        assert context is None and context_log_snr is None
        torch.testing.assert_close(log_snr, log_snr_t[:free])
        torch.testing.assert_close(seen, labels[:free])
        torch.testing.assert_close(z, diffusion.add_noise(x, draws.eps, per_row(log_snr_t))[:free])
    if free < rows:
        z, log_snr, seen, context, context_log_snr = calls.pop(0)
        (z_tau, encoder_log_snr, encoder_labels), *others = recorder.encoded
        assert not others
        assert torch.equal(context, recorder.encoder_gain * z_tau)
        torch.testing.assert_close(log_snr, log_snr_t[free:])
        assert torch.equal(context_log_snr, encoder_log_snr)
        torch.testing.assert_close(context_log_snr, log_snr_tau[free:])
        assert torch.equal(seen, labels[free:]) and torch.equal(encoder_labels, seen)
        ratio, std = diffusion.transition(per_row(log_snr_t[free:]), per_row(log_snr_tau[free:]))
        torch.testing.assert_close(z_tau, ratio * z + std * draws.eps_tau[free:])
    else:
        assert not recorder.encoded
    assert not calls


def test_split_batches_train_what_dropping_each_context_with_that_probability_would():
    """Over all rotations of a batch, loss and gradients average to p × context-free + (1 − p) × with context."""
    share, rows = 0.25, 8
    x, whole = torch.randn(rows, *SHAPE), draw(0, 0, range(rows), SHAPE)

    def outcome(order, **options):
        recorder = Recorder()
        draws = Draws(whole.uniforms[order], whole.eps[order], whole.eps_tau[order])
        loss = loss_of(recorder, x[order], draws, **options).loss
        inputs = (recorder.gain, recorder.encoder_gain)
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return torch.stack([loss.detach(), *gradients])

    order = torch.arange(rows)
    split = sum(outcome(order.roll(i), num_without=2) for i in range(rows)) / rows
    dropped = share * outcome(order, encode=False) + (1 - share) * outcome(order)
    torch.testing.assert_close(split, dropped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_an_encoders_own_loss_is_a_mean_over_the_whole_batch_where_some_rows_see_no_context(free):
    """For x̂ = g z_τ and exactly balanced moments, E (v − v̂)² = (1 − g α)² s²/σ² + g² at λ_τ, in the rows with context.

    Kills: the mean over these rows alone; their first for their last; t or λ_t in the weight; x̂ taken for v̂.
    """
    std, gain, bias, rows = 0.5, 0.7, 0.3, 4
    times = torch.tensor([0.15, 0.35, 0.55, 0.7], dtype=torch.float64)
    x, draws = balanced_batch(times, std)

    def loss(predict):
        return denoising_loss(
            lambda z, log_snr, labels, context, context_log_snr: 0 * z, lambda z, log_snr, labels: (z, predict(z)),
            x, None, draws, contexts=ContextTimes((1 / 4,), num_without=free), schedule=schedule(bias=bias),
        )  # fmt: skip

    expected = 0.0
    for tau in (times + 0.5 / 4)[free:]:
        level = diffusion.cosine_log_snr(tau)
        angle = torch.atan(torch.exp(-level / 2))
        alpha, sigma = angle.cos(), angle.sin()
        v_loss = ((1 - gain * alpha) * std / sigma) ** 2 + gain**2
        rate = diffusion.cosine_log_snr_rate(tau)
        expected += (rate / 2 * math.exp(bias) * torch.sigmoid(level - bias) * sigma**2 * v_loss / rows).item()
    without, beside = loss(lambda z: None), loss(lambda z: gain * z)
    assert torch.equal(without.v_loss, beside.v_loss) and len(beside.v_loss) == rows
    assert (beside.loss - without.loss).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_flows_into_denoiser_and_encoder_and_into_neither_through_the_reported_velocity_loss():
    """Kills: a detached context."""
    recorder = Recorder()
    result = loss_of(recorder, torch.randn(8, *SHAPE), draw(0, 0, range(8), SHAPE), num_without=4)
    result.loss.backward()
    assert recorder.gain.grad.abs() > 0 and recorder.encoder_gain.grad.abs() > 0
    assert result.v_loss.shape == (8,) and not result.v_loss.requires_grad


def test_a_single_rate_network_is_the_pair_whose_every_row_sees_no_context():
    x, draws = torch.randn(6, *SHAPE), draw(0, 0, range(6), SHAPE)
    single = loss_of(Recorder(), x, draws, encode=False)
    paired = loss_of(Recorder(), x, draws, num_without=6)
    assert torch.equal(single.loss, paired.loss)
    assert torch.equal(single.v_loss, paired.v_loss)


def test_dropped_labels_become_the_null_label_at_the_given_rate_independently_of_time_and_context():
    """Kills: < becoming >; another column of uniforms; zero or the rate itself as the null label."""
    rows, null = 200, 77
    draws = draw(0, 0, range(rows), SHAPE)
    draws.uniforms[:, :3] = 0.999
    draws.uniforms[:, 3] = midpoints(rows)[torch.randperm(rows)]
    labels = torch.arange(rows) % 5 + 1
    seen = drop_condition(labels, draws, 0.1, null)
    dropped = seen == null
    assert dropped.sum() == round(0.1 * rows)
    assert torch.equal(dropped, draws.uniforms[:, 3] < 0.1)
    assert torch.equal(seen[~dropped], labels[~dropped])


def test_all_parts_of_a_batch_see_the_labels_of_their_rows():
    draws, labels, recorder = draw(0, 0, range(8), SHAPE), torch.arange(8), Recorder()
    loss_of(recorder, torch.randn(8, *SHAPE), draws, labels=labels, num_without=4)
    assert torch.equal(torch.cat([call[2] for call in recorder.denoised]), labels)
    assert torch.equal(recorder.encoded[0][2], labels[4:])


def test_without_labels_or_without_a_null_label_nothing_is_dropped():
    draws, labels = draw(0, 0, range(4), SHAPE), torch.arange(4)
    assert torch.equal(drop_condition(labels, draws, 1.0, None), labels)
    assert drop_condition(None, draws, 1.0, 9) is None
    recorder = Recorder()
    loss_of(recorder, torch.randn(4, *SHAPE), draws)
    assert recorder.denoised[0][2] is None and recorder.encoded[0][2] is None


@pytest.mark.parametrize("time", [0.95, 0.4])
def test_the_following_loss_is_that_of_its_law_pixel_by_pixel(time):
    """The encoder predicts x̂ = sigmoid(λ) (z + label), the denoiser v̂ = k z_t + u z_τ; row 0 is a DDIM step with a lag
    in log-SNR that reaches the end, or starts at λ_t and does not, row 1 one with a lag in time, rows 2 and 3 lie on the ancestral chain. Kills: λ_t and
    λ_τ swapped anywhere; a target from x or from z_τ; the clean image in place of x̂ in the step, or x̂ on the chain; the
    lag of another row; the end left out; labels dropped too often, or not for all three alike; the weight at τ."""
    k, u, bias, steps = 0.3, -0.2, 0.7, (2, 8)
    x, labels = 0.4 * torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    draws = Draws(0.02 + 0.96 * torch.rand(4, 4, dtype=torch.float64), *torch.randn(2, 4, *SHAPE, dtype=torch.float64))
    draws.uniforms[:2, :3] = torch.tensor([[time, 0.1, 0.9], [0.4, 0.7, 0.8]])
    draws.uniforms[:, 3] = torch.tensor([0.1, 0.9, 0.4, 0.6])
    seen, expected_labels = [], torch.tensor([9, 1, 9, 0])

    def encode(z, log_snr, labels):
        assert torch.equal(labels, expected_labels)
        return z, torch.sigmoid(per_row(log_snr)) * (z + per_row(labels))

    def denoise(z, log_snr, labels, context, context_log_snr):
        assert torch.equal(labels, expected_labels)
        seen.append((log_snr, context_log_snr))
        return k * z + u * context

    result = following_loss(
        denoise, encode, x, drop_condition(labels, draws, 0.5, 9), draws, schedule=schedule(bias=bias),
        contexts=FollowingTimes([1 / k for k in steps], num_even_in_log_snr=1, num_deterministic=2),
    )  # fmt: skip

    def level(t):
        low, high = math.atan(math.exp(-5)), math.atan(math.exp(5))
        return -2 * math.log(math.tan(low + t * (high - low)))

    losses, v_losses = [], []
    for row in range(4):
        t, which, lag, _ = draws.uniforms[row].tolist()
        lag /= steps[int(which * 2)]
        lam, rate = level(t), (level(t - 1e-6) - level(t + 1e-6)) / 2e-6
        lam_tau = max(-10.0, lam - 20 * lag) if row == 0 else level(min(1.0, t + lag))
        assert [part[row].item() for part in seen[0]] == pytest.approx([lam, lam_tau], rel=1e-5)
        (alpha, sigma), (alpha_tau, sigma_tau) = (
            (1 / math.sqrt(1 + math.exp(-a)), 1 / math.sqrt(1 + math.exp(a))) for a in (lam, lam_tau)
        )
        label, errors = expected_labels[row].item(), []
        pixels = zip(*(part[row].flatten().tolist() for part in (x, draws.eps, draws.eps_tau)), strict=True)
        for pixel, eps, eps_tau in pixels:
            z, ratio = alpha * pixel + sigma * eps, alpha_tau / alpha
            z_tau = ratio * z + math.sqrt(sigma_tau**2 - (ratio * sigma) ** 2) * eps_tau
            if row < 2:
                x_tau = alpha_tau**2 * (z_tau + label)
                z = alpha * x_tau + sigma * (z_tau - alpha_tau * x_tau) / sigma_tau
            x_hat = alpha**2 * (z + label)
            errors.append(((alpha * z - x_hat) / sigma - (k * z + u * z_tau)) ** 2)
        weight = 0.5 * rate * math.exp(bias) / (1 + math.exp(bias - lam)) * sigma**2
        v_losses.append(sum(errors) / len(errors))
        losses.append(weight * v_losses[-1])
    assert result.v_loss.tolist() == pytest.approx(v_losses, rel=1e-5)
    assert result.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_rows_noisier_than_the_first_context_follow_the_images_and_ask_the_encoder_nothing():
    """Kills: the encoder run on them; its prediction as their target; the other rows' shares counted without them."""
    start, k = 0.75, 0.3
    x, draws, seen = 0.4 * torch.randn(8, *SHAPE), draw(0, 0, range(8), SHAPE), []

    def encode(z, log_snr, labels):
        assert len(z) == 6 and (log_snr >= diffusion.cosine_log_snr(torch.tensor(start)) - 1e-5).all()
        return z, torch.zeros_like(z)

    def denoise(z, log_snr, labels, context, context_log_snr):
        seen.append((z, log_snr, context is None, context_log_snr))
        return k * z

    result = following_loss(
        denoise, encode, x, None, draws, schedule=schedule(),
        contexts=FollowingTimes((0.25,), start, 2, 2, num_even_in_log_snr=4, num_deterministic=6),
    )  # fmt: skip
    (_, _, has_context, level_tau), (z, level, is_free, _) = [(z, a, not free, b) for z, a, free, b in seen]
    assert has_context and not is_free and len(z) == 2
    level = diffusion.cosine_log_snr(start + (1 - start) * draws.uniforms[:2, 0])
    torch.testing.assert_close(z, diffusion.add_noise(x[:2], draws.eps[:2], per_row(level)))
    expected = (diffusion.v_from_x_eps(x[:2], draws.eps[:2], per_row(level)) - k * z).square().flatten(1).mean(1)
    torch.testing.assert_close(result.v_loss[:2], expected)
    t = start * draws.uniforms[2:, 0]
    in_time = diffusion.cosine_log_snr(torch.clamp(t + 0.25 * draws.uniforms[2:, 2], max=start))
    assert (level_tau[2:] == in_time[2:]).all() and not (level_tau[:2] == in_time[:2]).any()


def test_the_following_loss_teaches_the_context_but_not_what_the_encoder_predicts():
    x, draws = balanced_batch(midpoints(4), 1.0)
    features, prediction = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = len(x)
    loss = following_loss(
        lambda z, log_snr, labels, context, context_log_snr: context,
        lambda z, log_snr, labels: (features * z, prediction * z),
        x, None, draws, schedule=schedule(bias=1.0),
        contexts=FollowingTimes((1 / 4,), num_even_in_log_snr=rows // 4, num_deterministic=rows // 2),
    ).loss  # fmt: skip
    loss.backward()
    assert features.grad != 0 and prediction.grad is None
