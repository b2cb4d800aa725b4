"""DualRateScheduler: when it refreshes, its noise levels, and the law of its steps, held to closed forms."""

import math
import weakref

import pytest
import torch

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, RefreshPlan, diffusion, plan_refreshes
from plain_loop import amplitudes, conditioned, log_snr_at

SHIFTED = [
    {"image_size": 64},
    {"image_size": 64, "noise_low": 32, "noise_high": 256},
    {"image_size": 16, "noise_low": 16, "noise_high": 32, "log_snr_min": -12.0, "log_snr_max": 9.0},
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_v(z, level, std):
    """Velocity of the exact denoiser of Gaussian data, x = k z."""
    alpha, sigma = amplitudes(level)
    k = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return (alpha - k) / sigma * z, k


def levels_of(steps):
    """Log-SNR at the start of each uniform step, and at the data end."""
    return [log_snr_at(1 - i / steps) for i in range(steps)] + [log_snr_at(0.0)]


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13, 64])
def test_a_plan_refreshes_exactly_k_times_first_at_step_0_then_at_floor_j_n_over_k(n):
    """Mutants: `//` made a rounding up or to the nearest, `range(K)` from 1, the end `<=` of K made `<`."""
    for k in range(1, n + 1):
        plan = plan_refreshes(n, k)
        assert len(plan) == n and all(type(entry) is bool for entry in plan)
        assert plan[0] and sum(plan) == k
        assert [i for i, entry in enumerate(plan) if entry] == [math.floor(j * n / k + 1e-9) for j in range(k)]


@pytest.mark.parametrize(("n", "k"), [(4, 5), (4, 0), (4, -1), (0, 1), (0, 0)])
def test_a_plan_with_more_refreshes_than_steps_or_none_is_refused_by_value(n, k):
    """Mutants: either `<=` made `<`, 1 made 0."""
    with pytest.raises(ValueError, match=f"got {n if n < 1 else k}"):
        plan_refreshes(n, k)
    assert list(plan_refreshes(4, 4)) == [True] * 4 and list(plan_refreshes(1, 1)) == [True]


def test_named_steps_refresh_and_no_others():
    assert list(plan_refreshes(5, refresh_steps=[0, 1, 4])) == [True, True, False, False, True]
    assert list(plan_refreshes(5, refresh_steps=(0,))) == [True, False, False, False, False]
    assert all(type(entry) is bool for entry in plan_refreshes(5, refresh_steps=[0, 3]))


@pytest.mark.parametrize("steps", [[], [0, 3, 2], [0, 2, 2], [-1, 0], [0, 8], [0, 9], [0, 2.5], {0}, "0"])
def test_named_steps_that_are_none_out_of_order_repeated_outside_the_run_or_broken_are_refused(steps):
    """Mutants: `< 0` made `< -1`, `>=` made `>` (both), the check of order or of the end dropped."""
    with pytest.raises(ValueError, match="refresh_steps"):
        plan_refreshes(8, refresh_steps=steps)


def test_both_a_count_and_named_steps_are_refused_and_neither_refreshes_everywhere():
    with pytest.raises(ValueError, match="either num_context_steps or refresh_steps"):
        plan_refreshes(4, 2, [0, 1])
    assert list(plan_refreshes(3)) == [True] * 3
    assert list(plan_refreshes(4, 2)) == [True, False, True, False]
    assert list(plan_refreshes(4, refresh_steps=[0, 3])) == [True, False, False, True]


@pytest.mark.parametrize("n", [1, 3, 8, 1500])
def test_timesteps_are_uniform_from_pure_noise_and_stop_one_step_before_data(n):
    """Mutants: `1 -` made `0 -`, `/ n` made `/ (n - 1)`, the factor num_train_timesteps dropped."""
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(n)
    assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000 * (n - i) / n for i in range(n)]))
    levels = torch.tensor(levels_of(n)[:-1])
    torch.testing.assert_close(scheduler.step_log_snrs, levels, rtol=1e-5, atol=1e-5)


def test_timesteps_given_are_taken_as_they_are_in_a_list_or_a_tensor():
    scheduler = DualRateScheduler(num_train_timesteps=10)
    assert len(scheduler) == 10
    for given in ([10.0, 7.25, 0.5], torch.tensor([10.0, 7.25, 0.5])):
        scheduler.set_timesteps(timesteps=given, num_context_steps=2)
        assert scheduler.timesteps.tolist() == [10.0, 7.25, 0.5]
        assert scheduler.refreshes_context == [True, True, False]
        expected = torch.tensor([log_snr_at(t) for t in (1.0, 0.725, 0.05)])
        torch.testing.assert_close(scheduler.step_log_snrs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "timesteps",
    [
        [],
        [1001.0, 5.0],
        [500.0, 0.0],
        [500.0, -1.0],
        [5.0, 5.0],
        [5.0, 6.0],
        [[5.0, 4.0]],
        [math.nan],
        [9.0, math.nan],
    ],
)
def test_timesteps_that_do_not_fall_within_the_process_are_refused(timesteps):
    """Mutants: `>` made `>=` or `<=` made `<` at the ends, `>= 0` made `> 0` for ties."""
    scheduler = DualRateScheduler()
    with pytest.raises(ValueError, match="timesteps must fall"):
        scheduler.set_timesteps(timesteps=timesteps)
    scheduler.set_timesteps(timesteps=[1000.0, 1e-3])  # the ends themselves are fine


def test_a_run_needs_a_number_of_steps_or_timesteps_and_not_both():
    scheduler = DualRateScheduler()
    for arguments in ({}, {"num_inference_steps": 2, "timesteps": [5.0, 4.0]}):
        with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
            scheduler.set_timesteps(**arguments)
    for n in (0, -3):
        with pytest.raises(ValueError, match=f"got {n}"):
            scheduler.set_timesteps(n)


def test_a_new_run_forgets_the_last_one():
    scheduler, fresh = DualRateScheduler(), DualRateScheduler()
    scheduler.set_timesteps(7, num_context_steps=2)
    z = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps:
        z = scheduler.step(z, t, z, generator()).prev_sample
    for each in (scheduler, fresh):
        each.set_timesteps(4)
    assert scheduler.refreshes_context == [True] * 4
    for t in fresh.timesteps:
        ours, theirs = (each.step(z, t, z, generator()) for each in (scheduler, fresh))
        assert torch.equal(ours.prev_sample, theirs.prev_sample)


def test_a_refused_run_leaves_the_last_one_in_place():
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(4, num_context_steps=2)
    for arguments in ({"num_context_steps": 9}, {"refresh_steps": [8]}):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(8, **arguments)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == len(scheduler.refreshes_context) == 4


def test_the_plain_schedule_is_the_cosine_between_its_two_ends():
    """Mutants in cosine_log_snr: `-2` made `-1`, `slope * t` made `slope - t`, the two ends exchanged."""
    scheduler = DualRateScheduler(log_snr_min=-8.0, log_snr_max=12.0)
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = torch.tensor([log_snr_at(t, -8.0, 12.0) for t in times.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scheduler.log_snr(1000 * times), expected)
    assert expected[0] == pytest.approx(12) and expected[-1] == pytest.approx(-8)


@pytest.mark.parametrize("config", SHIFTED)
def test_a_shifted_schedule_is_the_cosine_and_two_logs_of_the_ratio_of_sides(config):
    """Mutants: low and high exchanged, noise / size inverted, the factor 2 dropped, `1 - t` made `t`."""
    scheduler = DualRateScheduler(**config)
    ends = config.get("log_snr_min", -10.0), config.get("log_snr_max", 10.0)
    side, low, high = config["image_size"], config.get("noise_low", 32), config.get("noise_high", 32)
    for t in (0.0, 0.3, 1.0):
        ratio = math.exp((1 - t) * math.log(high / side) + t * math.log(low / side))
        expected = log_snr_at(t, *ends) + math.log(ratio**2)
        assert scheduler.log_snr(torch.tensor(1000 * t, dtype=torch.float64)).item() == pytest.approx(expected)


@pytest.mark.parametrize("config", [{}, *SHIFTED])
def test_the_map_is_that_of_the_process_and_its_rate_is_its_derivative(config):
    """Mutants: `log_snr_rate` per timestep, the sign of the rate, the shift's rate dropped or inverted."""
    scheduler = DualRateScheduler(**config)
    t = torch.linspace(0.02, 0.98, 7, dtype=torch.float64, requires_grad=True)
    level = scheduler.log_snr(t * len(scheduler))
    (slope,) = torch.autograd.grad(level.sum(), t)
    torch.testing.assert_close(scheduler.log_snr_rate(t.detach() * len(scheduler)), -slope)
    ends = {"log_snr_min": scheduler.config.log_snr_min, "log_snr_max": scheduler.config.log_snr_max}
    plain = diffusion.cosine_log_snr(t, **ends)
    if config:
        sides = {name: scheduler.config[name] for name in ("image_size", "noise_low", "noise_high")}
        plain = plain + diffusion.resolution_shift(t, **sides)
    assert torch.equal(level, plain)
    assert level.shape == t.shape and scheduler.log_snr(torch.ones(2, 1, 1, 1)).shape == (2, 1, 1, 1)


def test_a_schedule_whose_ends_are_exchanged_is_refused():
    with pytest.raises(ValueError, match="10.0 and -10.0"):
        DualRateScheduler(log_snr_min=10.0, log_snr_max=-10.0)


def coefficients(scheduler, i, level, std):
    """What the step makes of the exact denoiser, read off it: the factor A of z_t and the standard deviation."""
    t, zero, one = scheduler.timesteps[i], torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    noise = torch.randn(zero.shape, generator=generator(i))
    still = scheduler.step(zero, t, zero, generator(i)).prev_sample
    moved = scheduler.step(linear_v(one, level, std)[0], t, one, generator(i)).prev_sample
    factor, deviation = moved - still, still / noise
    assert factor.std() < 1e-5 and deviation.std() < 1e-5
    return factor.mean().item(), deviation.mean().item()


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("std", [0.25, 1.0, 2.0])
def test_on_gaussian_data_every_step_has_the_variance_and_covariance_of_the_ancestral_chain(std, n):
    """Closed form for Gaussian data: V_s = A² V_t + σ_s² c and Cov(z_s, z_t) = A V_t, V_1 = 1, all the way down.

    Mutants in posterior: `log_snr_t - log_snr_s` reversed (each of two), expm1 made exp, c made 1 - c, the halving of
    the ratio dropped, α_s made α_t, the root of the variance or of α dropped; in the step: `alpha * z - sigma * v`
    with +, α and σ exchanged, z and x exchanged; in the table: the next level made the own one.
    """
    scheduler = DualRateScheduler(clip_sample=False)
    scheduler.set_timesteps(n)
    levels, variance, expected = levels_of(n), 1.0, 1.0
    walkers = torch.randn(20_000, 1, 1, 1, generator=generator(99))
    draws = generator(100)
    for i in range(n - 1):
        _, k = linear_v(1.0, levels[i], std)
        weight_z, weight_x, spread = conditioned(levels[i], levels[i + 1])
        a, deviation = coefficients(scheduler, i, levels[i], std)
        assert a == pytest.approx(weight_z + weight_x * k, rel=2e-4)
        assert deviation**2 == pytest.approx(spread, rel=2e-4)
        before, previous = variance, walkers
        variance, expected = a**2 * variance + deviation**2, (weight_z + weight_x * k) ** 2 * expected + spread
        assert variance == pytest.approx(expected, rel=1e-3)

        v = linear_v(walkers, levels[i], std)[0]
        walkers = scheduler.step(v, scheduler.timesteps[i], walkers, draws).prev_sample
        sampled = (walkers * previous).mean().item()
        error = math.sqrt((before * variance + (a * before) ** 2) / len(walkers))
        assert abs(sampled - a * before) < 5 * error
        assert abs(walkers.square().mean().item() / variance - 1) < 5 * math.sqrt(2 / len(walkers))
    if std == 1:
        # The chain's law is not the marginal's, whose variance is 1: the distance is known, and is of order 1/N.
        assert abs(variance - 1) == pytest.approx({8: 0.35, 64: 0.06}[n], rel=0.35)


@pytest.mark.parametrize("std", [0.25, 2.0])
def test_a_chain_of_second_order_comes_closer_to_gaussian_data(std):
    """Closed form: z and the last prediction are jointly Gaussian, and a step maps them linearly.

    Mutants: half made whole, the ratio of steps inverted, the change's sign, the last prediction kept extrapolated.
    """
    n, levels, ends = 16, levels_of(16), {}
    for second_order in (False, True):
        # Covariance of (z, k_before z_before): a step goes by x = k z, carried on by its change.
        covariance = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        scheduler = DualRateScheduler(clip_sample=False, second_order=second_order)
        scheduler.set_timesteps(n)
        walkers, draws = torch.randn(20_000, 1, 1, 1, generator=generator(99)), generator(100)
        for i in range(n - 1):
            k = linear_v(1.0, levels[i], std)[1]
            weight_z, weight_x, spread = conditioned(levels[i], levels[i + 1])
            carried = (levels[i + 1] - levels[i]) / (levels[i] - levels[i - 1]) / 2 if second_order and i else 0.0
            matrix = torch.tensor(
                [[weight_z + weight_x * k * (1 + carried), -weight_x * carried], [k, 0.0]], dtype=torch.float64
            )
            covariance = matrix @ covariance @ matrix.T
            covariance[0, 0] += spread
            v = linear_v(walkers, levels[i], std)[0]
            walkers = scheduler.step(v, scheduler.timesteps[i], walkers, draws).prev_sample
            variance = covariance[0, 0].item()
            assert abs(walkers.square().mean().item() / variance - 1) < 5 * math.sqrt(2 / len(walkers))
        alpha, sigma = amplitudes(levels[n - 1])
        ends[second_order] = abs(variance / (alpha**2 * std**2 + sigma**2) - 1)
    assert ends[True] < ends[False] / 3


def test_a_run_of_second_order_starts_anew_each_time():
    scheduler = DualRateScheduler(second_order=True)
    z, v = torch.randn(2, 6, 1, 1, 4, 4)
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(6)
        runs.append(
            [scheduler.step(v[i], t, z[i], generator()).prev_sample for i, t in enumerate(scheduler.timesteps)]
        )
    assert all(torch.equal(first, again) for first, again in zip(*runs, strict=True))
    scheduler.set_timesteps(3)
    assert scheduler.step(v[:3, 0], 1000.0, z[:3, 0], generator()).prev_sample.isfinite().all()  # of another shape


def test_after_the_last_step_a_scheduler_of_second_order_holds_no_image():
    """An image lives on as long as anything refers to it. Mutants: `> 0` made `>= 0`; the count of steps dropped."""
    scheduler = DualRateScheduler(second_order=True)
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        z = torch.randn(2, 3, 8, 8)
        x = weakref.ref(scheduler.step(torch.randn_like(z), timestep, z).pred_original_sample)
        held = [value for value in vars(scheduler).values() if isinstance(value, torch.Tensor) and value.ndim == 4]
        assert len(held) == (timestep > scheduler.timesteps[-1])
    del z
    assert x() is None


REFUSED = [
    ({"num_train_timesteps": 0}, r"num_train_timesteps must be an integer in \[1, 8388608\], got 0"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps .*, got 1000000000"),
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps .*, got 1000.0"),
    ({"log_snr_max": float("inf")}, r"log_snr_max must be a finite number in \[-80.0, 80.0\], got inf"),
    ({"log_snr_min": float("-inf")}, "log_snr_min .*, got -inf"),
    ({"log_snr_min": float("nan")}, "log_snr_min .*, got nan"),
    ({"log_snr_max": 81}, "log_snr_max .*, got 81"),
    ({"log_snr_min": 10.0}, "log_snr_min must lie below log_snr_max, got 10.0 and 10.0"),
    ({"image_size": 0}, "image_size must be a finite number above 0, got 0"),
    ({"image_size": "64"}, "image_size .*, got '64'"),
    ({"noise_low": -32}, "noise_low .*, got -32"),
    ({"noise_high": 0}, "noise_high .*, got 0"),
    ({"variance_interpolation": 1.5}, "variance_interpolation .*, got 1.5"),
    ({"clip_sample": 1}, "clip_sample must be True or False, got 1"),
    ({"clip_sample_range": 0.0}, "clip_sample_range .*, got 0.0"),
    ({"second_order": "yes"}, "second_order must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_a_scheduler_of_values_that_make_no_process_is_refused_by_name_value_and_range(options, message):
    """Mutants: any check of the constructor dropped, a bound moved."""
    with pytest.raises(ValueError, match=message):
        DualRateScheduler(**options)


@pytest.mark.parametrize("n", [2.5, 0, -1, "4", True, 10**9], ids=repr)
def test_a_number_of_steps_that_is_none_is_refused_by_its_value(n):
    with pytest.raises(ValueError, match=rf"num_inference_steps must be an integer in \[1, 8388608\], got {n!r}"):
        DualRateScheduler().set_timesteps(n)


@pytest.mark.parametrize("timestep", [float("nan"), torch.tensor(float("nan")), float("inf"), -1.0, 1000.5], ids=repr)
def test_a_step_at_a_timestep_that_is_none_is_refused_by_its_value(timestep):
    """NaN would be taken for the first step, since no comparison with it holds."""
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep must be a finite number in \[0, 1000\], got"):
        scheduler.step(torch.zeros(1, 3, 8, 8), timestep, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("timesteps", [[500.0, float("nan")], [-1.0], [1000.5], [float("inf")]], ids=repr)
@pytest.mark.parametrize("draw", ["add_noise", "get_velocity"])
def test_noise_at_a_timestep_that_is_none_is_refused_by_its_value(draw, timesteps):
    """Mutants: either comparison made strict or dropped, `all` made `any`."""
    x = torch.zeros(len(timesteps), 3, 8, 8)
    with pytest.raises(ValueError, match=rf"timesteps must be finite numbers in \[0, 1000\], got .*{timesteps[-1]}\]"):
        getattr(DualRateScheduler(), draw)(x, x, torch.tensor(timesteps))
    ends = torch.tensor([0, 1000])  # whole numbers, and the ends themselves, are fine
    assert getattr(DualRateScheduler(), draw)(x[:1], x[:1], ends).isfinite().all()


def test_a_plan_printed_is_the_diagram_of_its_run():
    assert [line.rstrip() for line in str(plan_refreshes(6, 2)).splitlines()] == [
        "step           0    1    2    3    4    5        N = 6, K = 2",
        "encoder        E ──────────── E ────────────     heavy, K times: context of z_τ",
        "               │              │",
        "               ▼    ▼    ▼    ▼    ▼    ▼",
        "denoiser  z₁ → g →  g →  g →  g →  g →  g → x    light, N times: v(z_t, t, τ, context)",
    ]


def test_the_diagram_of_a_pair_whose_encoder_denoises_shows_who_takes_each_step(make_networks):
    encoder, denoiser = make_networks(prediction_hand_over=True)
    told = {"num_inference_steps": 6, "num_context_steps": 2, "encoder_denoises": True}
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, **told)
    last = str(pipe.plan_run()).splitlines()[-1]
    assert last == "denoiser  z₁ → E →  g →  g →  E →  g →  g → x    light, N − K times: v(z_t, t, τ, context)"
    assert pipe.plan_run() == plan_refreshes(6, 2)


def test_a_long_plan_printed_names_its_refreshes_and_one_without_any_shows_no_encoder():
    assert str(plan_refreshes(64, 4)) == "N = 64, K = 4, refreshes at 0, 16, 32, 48"
    rows = str(RefreshPlan((False,) * 3)).splitlines()
    assert len(rows) == 2 and "N = 3, K = 0" in rows[0] and rows[1].count("g →") == 3


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_variance_is_interpolated_between_the_posterior_and_the_forward_transition_on_a_log_scale(gamma):
    """Mutants: the ends of the interpolation exchanged, γ dropped, an interpolation that is not of logarithms."""
    scheduler = DualRateScheduler(clip_sample=False, variance_interpolation=gamma)
    scheduler.set_timesteps(8)
    levels = levels_of(8)
    for i in range(7):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(levels[i]), amplitudes(levels[i + 1])
        forward = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        weight_z, weight_x, backward = conditioned(levels[i], levels[i + 1])
        a, deviation = coefficients(scheduler, i, levels[i], 0.5)
        assert deviation**2 == pytest.approx(forward**gamma * backward ** (1 - gamma), rel=2e-4)
        assert a == pytest.approx(weight_z + weight_x * linear_v(1.0, levels[i], 0.5)[1], rel=2e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_last_step_returns_the_predicted_image_exactly(gamma):
    """Mutants: any of the three numbers of the last step, `[-1]` made `[0]`."""
    scheduler = DualRateScheduler(variance_interpolation=gamma)
    for n in (1, 5):
        scheduler.set_timesteps(n)
        z, v = torch.randn(2, 3, 4, 4), 0.3 * torch.randn(2, 3, 4, 4)
        out = scheduler.step(v, scheduler.timesteps[-1], z)
        assert torch.equal(out.prev_sample, out.pred_original_sample)
        alpha, sigma = amplitudes(levels_of(n)[-2])
        torch.testing.assert_close(out.prev_sample, (alpha * z - sigma * v).clamp(-1, 1))
        if n > 1:
            out = scheduler.step(v, scheduler.timesteps[0], z)
            assert not torch.allclose(out.prev_sample, out.pred_original_sample)


def test_predicted_images_are_clipped_to_the_range_before_they_enter_the_step():
    """Mutants: the lower or the upper bound not the range's, clipping where none is asked for; the noise's sign."""
    plain, wide, narrow = (
        DualRateScheduler(**config) for config in ({"clip_sample": False}, {}, {"clip_sample_range": 0.5})
    )
    z, v = torch.zeros(1, 1, 1, 4), torch.tensor([-9.0, -0.7, 0.7, 9.0]).reshape(1, 1, 1, 4)
    for scheduler in (plain, wide, narrow):
        scheduler.set_timesteps(2)
    sigma = amplitudes(log_snr_at(0.5))[1]
    noise = torch.randn(z.shape, generator=generator())
    for scheduler, bound in ((plain, math.inf), (wide, 1.0), (narrow, 0.3 + 0.2)):
        out = scheduler.step(v, 500.0, z)
        torch.testing.assert_close(out.pred_original_sample, (-sigma * v).clamp(-bound, bound))
        # Half way, the image enters the next sample with its weight, already clipped.
        out = scheduler.step(v, 1000.0, z, generator())
        _, weight_x, variance = conditioned(log_snr_at(1.0), log_snr_at(0.5))
        x = (-amplitudes(log_snr_at(1.0))[1] * v).clamp(-bound, bound)
        torch.testing.assert_close(out.prev_sample, weight_x * x + math.sqrt(variance) * noise)


def test_a_step_keeps_no_state_so_the_order_of_calls_does_not_matter():
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(6)
    z, v = torch.randn(2, 1, 3, 4, 4)
    forwards = [scheduler.step(v, t, z, generator()).prev_sample for t in scheduler.timesteps]
    backwards = [scheduler.step(v, t, z, generator()).prev_sample for t in reversed(scheduler.timesteps)]
    for first, second in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(first, second)
    for t in (500.0, scheduler.timesteps[3], scheduler.timesteps[3].item()):  # a number does as well as a tensor
        assert torch.equal(scheduler.step(v, t, z, generator()).prev_sample, forwards[3])
    for rounded in (torch.floor, torch.ceil):  # as loops hold them that count in whole timesteps
        for t, expected in zip(scheduler.timesteps, forwards, strict=True):
            assert torch.equal(scheduler.step(v, int(rounded(t)), z, generator()).prev_sample, expected)


def test_in_a_list_of_generators_each_image_draws_from_its_own():
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(4)
    z, v = torch.randn(2, 3, 3, 4, 4)
    together = scheduler.step(v, 750.0, z, [generator(seed) for seed in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(v[i : i + 1], 750.0, z[i : i + 1], generator(i)).prev_sample
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_returns_samples_in_their_own_type_and_computes_in_float32(dtype):
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(8)
    z, v = (part.to(dtype) for part in torch.randn(2, 1, 3, 4, 4))
    half, full = (scheduler.step(v.to(kind), 500.0, z.to(kind), generator()) for kind in (dtype, torch.float32))
    for name in ("prev_sample", "pred_original_sample"):
        assert half[name].dtype == dtype
        assert torch.equal(half[name], full[name].to(dtype))


def test_a_step_returns_an_output_object_or_a_plain_tuple():
    scheduler = DualRateScheduler()
    scheduler.set_timesteps(2)
    z = torch.randn(1, 3, 4, 4)
    out = scheduler.step(z, 1000.0, z, generator())
    prev_sample, x = scheduler.step(z, 1000.0, z, generator(), return_dict=False)
    assert torch.equal(out.prev_sample, prev_sample) and torch.equal(out.pred_original_sample, x)
    assert scheduler.scale_model_input(z, 1000.0) is z and scheduler.init_noise_sigma == 1 and scheduler.order == 1


def test_noise_and_velocity_are_those_of_each_images_own_timestep():
    """Mutants: in add_noise and v_from_x_eps a sign flipped, α and σ exchanged, the levels not one for each image."""
    scheduler = DualRateScheduler()
    x, eps = torch.randn(2, 3, 2, 4, 4)
    timesteps = torch.tensor([20.0, 500.0, 990.0])
    z, v = scheduler.add_noise(x, eps, timesteps), scheduler.get_velocity(x, eps, timesteps)
    for i, t in enumerate((0.02, 0.5, 0.99)):
        alpha, sigma = amplitudes(log_snr_at(t))
        torch.testing.assert_close(z[i], alpha * x[i] + sigma * eps[i])
        torch.testing.assert_close(alpha * z[i] - sigma * v[i], x[i])
        torch.testing.assert_close(sigma * z[i] + alpha * v[i], eps[i], rtol=1e-4, atol=1e-4)
    half = scheduler.add_noise(x.half(), eps.half(), timesteps.long())
    assert half.dtype == scheduler.get_velocity(x.half(), eps.half(), timesteps).dtype == torch.float16


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_train_timesteps", 0),
        ("image_size", 0),
        ("noise_low", 0),
        ("noise_high", -1),
        ("clip_sample_range", -1.0),
        ("variance_interpolation", 1.5),
        ("variance_interpolation", -0.1),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} must .*, got {value}"):
        DualRateScheduler(**{name: value})


def test_timesteps_that_only_double_precision_tells_apart_are_refused():
    with pytest.raises(ValueError, match="must fall"):
        DualRateScheduler().set_timesteps(timesteps=[500.00000001, 500.0])
