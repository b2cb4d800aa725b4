"""Moment matching on Gaussian data, where every expectation has a closed form, and on a mixture in two dimensions."""

import math

import pytest
import torch

from diffusers_dualrate import DualRateScheduler, moment_matching
from diffusers_dualrate.diffusion import cosine_log_snr
from diffusers_dualrate.moment_matching import (
    Grid,
    GridDraws,
    Judges,
    Rollout,
    auxiliary_loss,
    draw_on_grid,
    grid_denoising_loss,
    roll_out,
    sample_student,
    student_loss,
)
from diffusers_dualrate.refreshes import plan_segments

STDS = (0.25, 1.0, 2.0)
N, FLOOR = 8, 0.02
OFFSETS = ((torch.arange(4, dtype=torch.float64) + 0.5) / 4).tolist()
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
for _ in range(2):
    SIGNS = torch.kron(SIGNS, SIGNS)  # 16 columns, orthogonal: pixels in which moments up to the second are exact


def log_snr_at(t):
    return cosine_log_snr(torch.as_tensor(t, dtype=torch.float64)).item()


def amplitudes(log_snr):
    return 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))


def best_gain(log_snr, variance):
    """x̂ = gain z of Gaussian data."""
    alpha, sigma = amplitudes(log_snr)
    return alpha * variance / (alpha**2 * variance + sigma**2)


def posterior_of(t, s):
    """q(z_s | z_t, x) in its textbook form: factors of z_t and x, standard deviation."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(log_snr_at(t)), amplitudes(log_snr_at(s))
    ratio = alpha_t / alpha_s
    std_ts = math.sqrt(max(sigma_t**2 - ratio**2 * sigma_s**2, 0))
    return ratio * sigma_s**2 / sigma_t**2, alpha_s * std_ts**2 / sigma_t**2, std_ts * sigma_s / sigma_t


def weight_at(s):
    return 1 / max(amplitudes(log_snr_at(s))[1] ** 2, FLOOR)


def exact_draws():
    """One row for every step and offset of s; its pixels make expectations over x and all noises exact."""
    rows = [(n, offset) for n in range(N) for offset in OFFSETS]
    uniforms = torch.tensor([((n + 0.5) / N, offset) for n, offset in rows], dtype=torch.float64)
    noise = SIGNS[:, 1 : N + 2].T.reshape(1, N + 1, 1, 4, 4).expand(len(rows), -1, -1, -1, -1)
    x = SIGNS[:, N + 2].reshape(1, 1, 4, 4).expand(len(rows), -1, -1, -1)
    return rows, x, GridDraws(uniforms, noise)


def velocity(z, x_hat, log_snr):
    log_snr = log_snr.reshape(-1, *[1] * (z.ndim - 1))
    return (log_snr.sigmoid().sqrt() * z - x_hat) / (-log_snr).sigmoid().sqrt()


def linear_network(times, gains, context_gains=None):
    """x̂ = gain z (+ context gain · context), with the gains of the listed time that is nearest in log-SNR."""
    levels = cosine_log_snr(torch.as_tensor(times, dtype=torch.float64))

    def denoise(z, log_snr, class_labels, context, context_log_snr):
        index = (log_snr[:, None] - levels).abs().argmin(1)
        x_hat = gains[index].reshape(-1, 1, 1, 1) * z
        if context is not None:
            x_hat = x_hat + context_gains[index].reshape(-1, 1, 1, 1) * context[0]
        return velocity(z, x_hat, log_snr)

    return denoise


def gaussian_teacher(variance):
    def denoise(z, log_snr, class_labels, context, context_log_snr):
        gain = torch.tensor([best_gain(level, variance) for level in log_snr.tolist()], dtype=z.dtype)
        return velocity(z, gain.reshape(-1, 1, 1, 1) * z, log_snr)

    return denoise


GRID = [1 - n / N for n in range(N)]


def times_s(rows):
    return [1 - (n + offset) / N for n, offset in rows]


def best_gains(variance):
    return torch.tensor([best_gain(log_snr_at(t), variance) for t in GRID], dtype=torch.float64)


def moments(n, s, gain, variance):
    """Closed forms at step n for a single-rate student from data: V_t, V_s, Cov(x̃, z_s), Cov(z_t, z_s)."""
    alpha, sigma = amplitudes(log_snr_at(GRID[n]))
    v_t = alpha**2 * variance + sigma**2
    of_z, of_x, std = posterior_of(GRID[n], s)
    m = of_z + of_x * gain
    return v_t, m**2 * v_t + std**2, gain * m * v_t, m * v_t


def student_slope(n, gain, variance):
    """Expected gradient on the gain of step n, averaged over the offsets of s, once the auxiliary has converged."""
    total = 0.0
    for offset in OFFSETS:
        s = 1 - (n + offset) / N
        _, v_s, with_x, with_z = moments(n, s, gain, variance)
        total += weight_at(s) / 2 * (with_x / v_s - best_gain(log_snr_at(s), variance)) * with_z
    return total / len(OFFSETS)


def root_of(function, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return middle


def sampled_variance(gains, count=2**16):
    """Variance of what the scheduler samples with a linear network, clipping off."""
    scheduler = DualRateScheduler(clip_sample=False)
    scheduler.set_timesteps(N)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, count, 1, generator=generator)
    network = linear_network(GRID, gains.float())
    for t in scheduler.timesteps:
        v = network(z, scheduler.log_snr(t).double().reshape(1), None, None, None)
        z = scheduler.step(v, t, z, generator=generator, return_dict=False)[0]
    return z.var().item()


def grid_of(n, k, context_from=1.0):
    return Grid(cosine_log_snr, plan_segments(n, k, context_from))


SINGLE_RATE = grid_of(N, N)


def converged_auxiliary(student, x, draws, teacher, rows):
    """Auxiliary with one gain for every row, where its own loss, which is quadratic, has its minimum."""
    gains = torch.zeros(len(rows), dtype=torch.float64, requires_grad=True)
    auxiliary, slopes = linear_network(times_s(rows), gains), []
    for value in (0.0, 1.0):
        gains.data.fill_(value)
        judges = Judges(auxiliary, teacher, FLOOR)
        loss = auxiliary_loss(student, None, x, None, draws, grid=SINGLE_RATE, judges=judges)
        slopes.append(torch.autograd.grad(loss, gains)[0])
    gains.data = slopes[0] / (slopes[0] - slopes[1])
    return gains.detach()


def slope_of_student(gains, std):
    """The student's own gradient, the auxiliary being converged, and the auxiliary's gains."""
    rows, x, draws = exact_draws()
    gains = gains.clone().requires_grad_()
    teacher, student = gaussian_teacher(std**2), linear_network(GRID, gains)
    midpoints = converged_auxiliary(student, std * x, draws, teacher, rows)
    judges = Judges(linear_network(times_s(rows), midpoints), teacher, FLOOR)
    loss, _ = student_loss(student, None, std * x, None, draws, grid=SINGLE_RATE, judges=judges)
    return torch.autograd.grad(loss, gains)[0], midpoints


@pytest.mark.parametrize("std", STDS)
def test_the_auxiliary_and_the_expected_student_gradient_are_those_of_the_closed_form(std):
    """Kills: a sign or a factor in either loss; the weight at t; s for t in the posterior; teacher and student swapped;
    noise of another step; a sum for a mean."""
    gains = 1.3 * best_gains(std**2) + 0.05
    slope, midpoints = slope_of_student(gains, std)
    for row, (n, offset) in enumerate(exact_draws()[0]):
        s = 1 - (n + offset) / N
        _, v_s, with_x, _ = moments(n, s, gains[n].item(), std**2)
        expected = (with_x / v_s + best_gain(log_snr_at(s), std**2)) / 2
        assert midpoints[row].item() == pytest.approx(expected, rel=1e-6)
    for n in range(N):
        assert N * slope[n].item() == pytest.approx(student_slope(n, gains[n].item(), std**2), rel=1e-6)


def distilled_gains(std):
    """Gains where the student's own gradient vanishes, and that gradient at the teacher's gains: by bisection."""
    low, high = best_gains(std**2), torch.full((N,), 8 * max(std, 1.0), dtype=torch.float64)
    start, _ = slope_of_student(low, std)
    for _ in range(40):
        middle = (low + high) / 2
        below = slope_of_student(middle, std)[0] < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return start, middle


def add_fresh_noise(z, x, log_snr_t, log_snr_s, noise):
    """What must not take the place of the posterior."""
    level = log_snr_s.reshape(-1, 1, 1, 1)
    return level.sigmoid().sqrt() * x + (-level).sigmoid().sqrt() * SIGNS[:, N + 3].reshape(1, 1, 4, 4)


@pytest.mark.parametrize("std", STDS)
def test_the_student_converges_to_the_closed_form_and_its_samples_have_nearly_the_variance_of_the_data(
    std, monkeypatch
):
    """Undistilled samples at N = 8 are 37 to 58 % too narrow; fresh noise makes the student 60 to 81 % too wide.
    Kills: a student trained towards more distance; z_s with gradient; z_s from fresh noise."""
    start, gains = distilled_gains(std)
    assert (start < 0).all()  # a student equal to its teacher is widened
    for n, gain in enumerate(gains.tolist()):
        low = best_gain(log_snr_at(GRID[n]), std**2)
        closed_form = root_of(lambda k, n=n: student_slope(n, k, std**2), low, 8 * max(std, 1.0))
        assert gain == pytest.approx(closed_form, rel=1e-6)
    undistilled = sampled_variance(best_gains(std**2)) / std**2
    distilled = sampled_variance(gains) / std**2
    assert 0.40 < undistilled < 0.65
    assert 0.875 < distilled < 1.02  # .882, .979 and .955 in closed form
    monkeypatch.setattr(moment_matching, "_draw_posterior", add_fresh_noise)
    _, fresh = distilled_gains(std)
    assert 1.5 < sampled_variance(fresh) / std**2 < 1.9


def rolled_out(n, interval, gains, context_gains, encoder_gain, std, from_noise):
    """Step by step in coefficients of the independent sources: z_t and z_τ as vectors over (noises, x)."""
    source = torch.eye(N + 2, dtype=torch.float64)
    refresh = n - n % interval
    if from_noise:
        z, begin = source[0], 0
    else:
        alpha, sigma = amplitudes(log_snr_at(GRID[refresh]))
        z, begin = alpha * std * source[N + 1] + sigma * source[0], refresh
    for i in range(begin, n + 1):
        if i % interval == 0:
            z_tau = z
        x_hat = gains[i] * z + context_gains[i] * encoder_gain * z_tau
        if i < n:
            of_z, of_x, noise_std = posterior_of(GRID[i], GRID[i + 1])
            z = of_z * z + of_x * x_hat + noise_std * source[i + 1]
    return z, z_tau, x_hat, source[n + 1]


@pytest.mark.parametrize("num_context_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("from_noise", [False, True])
def test_a_pair_is_judged_where_its_own_rollout_arrives_and_the_gradient_starts_there(num_context_steps, from_noise):
    """Kills: a gradient through the rollout or the context of the rollout; a stale or too fresh context; λ_t for λ_τ;
    data where the rollout is full; a gradient that misses denoiser or encoder."""
    std, interval = 0.6, N // num_context_steps
    rows, x, draws = exact_draws()
    gains = (1.2 * best_gains(std**2)).requires_grad_()
    context_gains = torch.linspace(0.1, -0.2, N, dtype=torch.float64).requires_grad_()
    encoder_gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    refreshes = cosine_log_snr(torch.tensor(GRID[::interval], dtype=torch.float64))

    def encode(z, log_snr, class_labels):
        assert torch.isin(log_snr, refreshes).all()
        return (encoder_gain * z,), None

    student = linear_network(GRID, gains, context_gains)
    q = torch.full((len(rows),), 0.4, dtype=torch.float64)
    loss, _ = student_loss(
        student, encode, None if from_noise else std * x, None, draws,
        grid=grid_of(N, num_context_steps),
        judges=Judges(linear_network(times_s(rows), q), gaussian_teacher(std**2), FLOOR),
    )  # fmt: skip
    slopes = torch.autograd.grad(loss, (gains, context_gains, encoder_gain))
    expected = [torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64), 0.0]
    fixed = (gains.detach(), context_gains.detach(), encoder_gain.item())
    for n, offset in rows:
        s = 1 - (n + offset) / N
        z_t, z_tau, x_hat, noise = rolled_out(n, interval, *fixed, std, from_noise)
        of_z, of_x, noise_std = posterior_of(GRID[n], s)
        z_s = of_z * z_t + of_x * x_hat + noise_std * noise
        scale = weight_at(s) * (0.4 - best_gain(log_snr_at(s), std**2)) / len(rows)
        expected[0][n] += scale * (z_s @ z_t)
        expected[1][n] += scale * fixed[2] * (z_s @ z_tau)
        expected[2] += scale * fixed[1][n] * (z_s @ z_tau)
    torch.testing.assert_close(slopes[0], expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slopes[1], expected[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slopes[2], expected[2], rtol=1e-6, atol=1e-9)


class Scale(torch.nn.Module):
    """A network of one weight, which notes whether its calls record a gradient."""

    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(value))
        self.calls = []

    def denoise(self, z, log_snr, class_labels, context, context_log_snr):
        self.calls.append(torch.is_grad_enabled())
        return self.weight * (z if context is None else z + context[0])

    def encode(self, z, log_snr, class_labels):
        self.calls.append(torch.is_grad_enabled())
        return (self.weight * z,), None


@pytest.mark.parametrize("from_noise", [False, True])
def test_a_step_records_gradient_for_one_network_and_none_for_the_teacher_z_s_or_the_rollout(from_noise):
    """Kills: z_s, the teacher, or the network that rests not detached; a rollout with gradient; more or fewer
    evaluations."""
    networks = student, encoder, auxiliary, teacher = [Scale(value) for value in (0.5, 0.3, 0.2, 0.1)]
    shape, grid = (1, 4, 4), grid_of(8, 2)
    inputs = student.denoise, encoder.encode, None if from_noise else torch.randn(16, *shape), None
    inputs += (draw_on_grid(0, 0, range(16), shape, 8),)
    sample = sample_student(*inputs, grid=grid)
    assert sample.x.requires_grad and not sample.z_s.requires_grad and not sample.log_snr_s.requires_grad
    judges = Judges(auxiliary.denoise, teacher.denoise, FLOOR)
    for step, learns in ((auxiliary_loss, [auxiliary]), (student_loss, [student, encoder])):
        for network in networks:
            network.calls, network.weight.grad = [], None
        result = step(*inputs, grid=grid, judges=judges)
        loss, rest = (result, []) if step is auxiliary_loss else (result[0], result[1:])
        loss.backward()
        assert not any(value.requires_grad for value in rest)
        assert [network.weight.grad is not None for network in networks] == [net in learns for net in networks]
        # Rows go at most one refresh and three steps further; the full rollout first goes from noise to the last
        # refresh.
        assert encoder.calls == [False] * from_noise + [encoder in learns]
        assert student.calls == [False] * (4 * from_noise + 3) + [student in learns]
        assert auxiliary.calls == [auxiliary in learns] and teacher.calls == [False]


def test_a_rollout_over_the_whole_grid_is_the_sampler():
    """Kills: a step from the wrong time; noise used twice; another refresh plan than the scheduler's."""
    scheduler = DualRateScheduler(clip_sample=False)
    scheduler.set_timesteps(N, num_context_steps=2)
    noise = torch.randn(3, N + 1, 1, 4, 4, dtype=torch.float64)
    student = linear_network(GRID, best_gains(0.5), torch.linspace(0.1, -0.2, N, dtype=torch.float64))
    levels = cosine_log_snr(torch.tensor([*GRID, 0.0], dtype=torch.float64))
    steps = {"refreshes": scheduler.refreshes_context[:-1]}
    start, last = torch.zeros(3, dtype=torch.long), torch.full((3,), N - 1)
    last[1] = 5
    rollout = Rollout(None, noise, levels)
    found = roll_out(student, lambda z, *_: ((z,), None), noise[:, 0], rollout, start, last, **steps)

    z = noise[:, 0].float()
    for i, t in enumerate(scheduler.timesteps[:-1]):
        if scheduler.refreshes_context[i]:
            context = z
        level = scheduler.log_snr(t).double().reshape(1)
        v = student(z.double(), level.expand(3), None, (context.double(),), None)
        _, x = scheduler.step(v, t, z, return_dict=False)
        of_z, of_x, std = posterior_of(GRID[i], GRID[i + 1])
        z = (of_z * z + of_x * x + std * noise[:, i + 1]).float()
        if i + 1 == 5:
            waiting = z[1]
    expected = torch.stack([z[0], waiting, z[2]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_prediction_has_its_gradient_after_a_rollout_without():
    """Before 2.11, torch's autocast used weights again that it had cast without gradient."""
    layer = torch.nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        sample = sample_student(
            lambda z, *_: layer(z), None, None, None, draw_on_grid(0, 0, range(4), (1, 4, 4), 4), grid=grid_of(4, 4)
        )
    sample.x.sum().backward()
    assert layer.weight.grad.abs() > 0


MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]])
SHARES, SPREAD = torch.tensor([0.6, 0.3, 0.1]), 0.3


def mixture_teacher(z, log_snr, class_labels, context, context_log_snr):
    """Exact posterior mean of the mixture: responsibilities times the means within the modes."""
    log_snr = log_snr.reshape(-1, 1)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    points, variance = z.flatten(1), alpha**2 * SPREAD**2 + sigma**2
    away = points[:, None] - alpha[..., None] * MEANS
    shares = (SHARES.log() - away.square().sum(-1) / (2 * variance)).softmax(1)
    x_hat = (shares[..., None] * (MEANS + (alpha * SPREAD**2 / variance)[..., None] * away)).sum(1)
    return velocity(z, x_hat.reshape(z.shape), log_snr)


class Corrected(torch.nn.Module):
    """The teacher plus a small learned correction of its velocity, zero at first."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(11, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48), torch.nn.SiLU(), torch.nn.Linear(48, 2)
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, z, log_snr, class_labels, context, context_log_snr):
        v = mixture_teacher(z, log_snr, class_labels, context, context_log_snr)
        phase = log_snr.reshape(-1, 1) * torch.tensor([0.15, 0.3, 0.6])
        inputs = torch.cat([z.flatten(1), v.flatten(1), phase.sin(), phase.cos(), log_snr.reshape(-1, 1) / 10], dim=1)
        return v + self.layers(inputs).reshape(z.shape)


def errors_of_mixture(student):
    """Largest error of the modes' shares, and relative error of the covariance, of the scheduler's samples at N = 8."""
    scheduler = DualRateScheduler(clip_sample=False)
    scheduler.set_timesteps(N)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = student(z, scheduler.log_snr(t).expand(len(z)), None, None, None)
            z = scheduler.step(v, t, z, generator=generator, return_dict=False)[0]
    points = z.flatten(1)
    shares = torch.bincount(torch.cdist(points, MEANS).argmin(1), minlength=3) / len(points)
    centred = MEANS - SHARES @ MEANS
    covariance = centred.T @ (SHARES[:, None] * centred) + SPREAD**2 * torch.eye(2)
    return (shares - SHARES).abs().max().item(), ((points.T.cov() - covariance).norm() / covariance.norm()).item()


def test_distillation_brings_the_modes_and_the_covariance_of_a_mixture_nearer_to_the_data():
    """Kills: losses that are right for Gaussians only by chance; the student's sign."""
    student, auxiliary = Corrected(), Corrected()
    networks = torch.nn.ModuleList([student, auxiliary])
    before = errors_of_mixture(student)
    steps = 600
    optimizer = torch.optim.Adam(networks.parameters(), lr=3e-3, betas=(0.0, 0.99), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 50, 1 - step / steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        modes = torch.multinomial(SHARES, 384, replacement=True, generator=generator)
        x = (MEANS[modes] + SPREAD * torch.randn(384, 2, generator=generator)).reshape(384, 2, 1, 1)
        draws = GridDraws(
            torch.rand(384, 2, generator=generator), torch.randn(384, N + 1, 2, 1, 1, generator=generator)
        )
        inputs = student, None, x, None, draws
        told = {"grid": SINGLE_RATE, "judges": Judges(auxiliary, mixture_teacher, FLOOR)}
        loss = student_loss(*inputs, **told)[0] if step % 2 else auxiliary_loss(*inputs, **told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after = errors_of_mixture(student)
    assert after[0] < before[0] / 2 and after[1] < before[1] / 2


def test_denoising_on_the_grid_has_its_minimum_at_the_best_gain_and_ignores_the_coupled_context():
    """Kills: noise drawn twice from x; t off the grid; τ of another segment; a weight at τ; a sum for a mean."""
    std = 0.6
    rows, x, draws = exact_draws()
    gains, context_gains = best_gains(std**2).requires_grad_(), torch.zeros(N, dtype=torch.float64, requires_grad=True)
    refreshes = cosine_log_snr(torch.tensor([1.0, 0.5], dtype=torch.float64))

    def encode(z, log_snr, class_labels):
        assert torch.equal(log_snr, refreshes[[0] * 16 + [1] * 16])
        return (z,), None

    loss = grid_denoising_loss(
        linear_network(GRID, gains, context_gains),
        encode,
        std * x,
        None,
        draws,
        grid=grid_of(N, 2),
        min_variance=FLOOR,
    )
    for slope in torch.autograd.grad(loss, (gains, context_gains)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)
    levels = [amplitudes(log_snr_at(t)) for t in GRID]
    least = [std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2) / max(sigma**2, FLOOR) for alpha, sigma in levels]
    assert loss.item() == pytest.approx(sum(least) / N, rel=1e-9)


def test_draws_depend_on_seed_step_and_row_alone_and_hold_independent_noise_for_every_step():
    """Kills: a generator seeded once a batch; noise repeated between the steps of a trajectory."""
    shape = (1, 4, 4)
    together = draw_on_grid(3, 7, [0, 4, 9], shape, N)
    alone = draw_on_grid(3, 7, [9], shape, N)
    assert torch.equal(together.noise[2:], alone.noise) and torch.equal(together.uniforms[2:], alone.uniforms)
    for other in (draw_on_grid(3, 8, [9], shape, N), draw_on_grid(4, 7, [9], shape, N)):
        assert not torch.equal(other.noise, alone.noise)
    for count in (1, 2, 8):
        many = draw_on_grid(0, 0, range(500), shape, count)
        assert many.noise.shape == (500, count + 1, *shape) and many.uniforms.shape == (500, 2)
        columns = torch.cat([many.uniforms, many.noise.movedim(1, -1).flatten(1, -2)[:, :4].flatten(1)], dim=1)
        assert (torch.corrcoef(columns.T) - torch.eye(columns.shape[1])).abs().max() < 0.25
        assert many.noise.std().item() == pytest.approx(1, abs=0.03)


def test_a_time_s_that_rounding_puts_beyond_t_leaves_the_image_as_it_is():
    """Kills: no guard, where the posterior's variance would be negative."""
    count = 500
    uniforms = torch.stack([(torch.arange(count) + 0.5) / count, torch.zeros(count)], dim=1)
    noise, student = torch.randn(count, 1, 1, 1, 1).expand(-1, count + 1, -1, -1, -1), Scale(0.5)
    sample = sample_student(
        student.denoise,
        None,
        torch.zeros(count, 1, 1, 1),
        None,
        GridDraws(uniforms, noise),
        grid=grid_of(count, count),
    )
    sigma = (-sample.log_snr_s).sigmoid().sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(sample.z_s, sigma * noise[:, 0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("num_context_steps", [0, 3, 16])
def test_a_number_of_refreshes_that_does_not_divide_the_steps_is_refused(num_context_steps):
    with pytest.raises(ValueError, match=f"must divide num_inference_steps=8, got {num_context_steps}"):
        grid_of(8, num_context_steps)
