"""Contexts that begin late: the light network opens alone, in the branch without context, and the pair finishes."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import plain_loop
from conftest import PRESET
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, RefreshPlan, diffusion, plan_refreshes
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.flops import image_flops, plan_flops
from diffusers_dualrate.modular import DualRateBlocks
from diffusers_dualrate.sampling import sample_at_two_rates
from diffusers_dualrate.steps import plan_steps

CLOSE = {"rtol": 0, "atol": 2e-4}
N = 6
TIMES = [1 - i / N for i in range(N)]
LATE = [[2, 4], [3], [5], [1, 2, 5]]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, labels=(0, 3), *steps, **options):
    return pipe(list(labels), *steps, **{"generator": generator(), "output_type": "latent"} | options).images


def plain(pipe, labels, refresh_at, scales=1.0, times=TIMES):
    """What the plain loop makes of the pipeline's networks, drawing as the pipeline draws from seed 0."""
    draws = generator()
    noise = torch.randn((len(labels), 3, 8, 8), generator=draws)
    return plain_loop.sample(
        pipe.denoiser, pipe.context_encoder, times, refresh_at, torch.tensor(labels), noise, draws, scales
    )


def refresh_steps(plan):
    return [i for i, refreshes in enumerate(plan) if refreshes]


@pytest.mark.parametrize("gain_alone", [1.0, 0.7])
@pytest.mark.parametrize("std", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("context_from", [1.0, 0.7, 0.4])
def test_the_variance_of_gaussian_data_follows_the_recursion_at_every_step_of_a_late_plan(
    context_from, std, gain_alone
):
    """The chain in coefficients of its noises: a vector, whose square is the variance. Without context the denoiser is
    exact, or wrong by a known factor; with context it starts from the encoder's exact belief and is exact.

    Mutants: the context of another step, one before the first refresh, or none after it; either sign of `_ROUNDED`.
    """
    n, variance = 10, std**2
    defaults = SamplingDefaults(n, 2, context_from=context_from, context_free=True)
    scheduler, plan, log_snrs = plan_steps(DualRateScheduler(clip_sample=False), defaults)
    source, levels = torch.eye(n + 1, dtype=torch.float64), log_snrs.double()

    def gain_at(level):
        alpha, sigma = diffusion.alpha_sigma(level)
        return alpha * variance / (alpha**2 * variance + sigma**2)

    def encode(i, z):
        left = variance * torch.sigmoid(-levels[i]) / (torch.sigmoid(levels[i]) * variance + torch.sigmoid(-levels[i]))
        return (z, gain_at(levels[i]) * z, left, levels[i]), None

    def denoise(i, z, context):
        x = gain_alone * gain_at(levels[i]) * z
        if context is not None:
            x = diffusion.gaussian_update(z, *context[:3], levels[i], context[3])
        return diffusion.v_from_x(z, x, levels[i])

    def step(i, v, z):
        x = diffusion.x_from_v(z, v, levels[i])
        if i == n - 1:
            return x
        of_z, of_x, std_s = diffusion.posterior(levels[i], levels[i + 1])
        return of_z * z + of_x * x + std_s * source[i + 1]

    loop = sample_at_two_rates(source[0], plan, encode, denoise, step)
    found = [state.z.square().sum().item() for state in loop]
    times = [1 - i / n for i in range(n)]
    expected = plain_loop.variances(times, refresh_steps(plan), variance, gain_alone)
    assert found == pytest.approx(expected, rel=2e-5)
    first = sum(t > context_from + 1e-9 for t in times)
    assert refresh_steps(plan) == [first, first + (n - first) // 2]
    assert list(scheduler.refresh_plan) == list(plan)


@pytest.mark.parametrize("refresh_at", LATE)
def test_images_of_a_late_plan_are_those_of_the_plain_loop(make_pipe, watch, refresh_at):
    """Mutants: `< 0` made `< 1` in the check of named steps; the first context at step 0."""
    pipe = make_pipe(context_free=True)
    for scale in (1.0, 2.5):
        expected = plain(pipe, [0, 3], refresh_at, scale)
        images = sample(pipe, (0, 3), N, refresh_steps=refresh_at, guidance_scale=scale)
        torch.testing.assert_close(images, expected, **CLOSE)
    assert (images - plain(pipe, [0, 3], [0, *refresh_at], scale)).abs().max() > 1e-2  # the opening matters
    calls = watch(pipe)
    sample(pipe, (0, 3), N, refresh_steps=refresh_at)
    assert len(calls.encoder) == len(refresh_at)
    assert [call.context is None for call in calls.denoiser] == [i < refresh_at[0] for i in range(N)]


@pytest.mark.parametrize("refresh_at", LATE)
@pytest.mark.parametrize("first", [0, 1, 4])
def test_guidance_that_acts_before_the_first_refresh_evaluates_both_branches_without_context(
    make_pipe, watch, refresh_at, first
):
    """Mutants: `serves` without `context is None`; the null branch left out of the first refresh."""
    pipe = make_pipe(context_free=True)
    levels = [plain_loop.log_snr_at(t) for t in TIMES]
    scales = [3.0 if first <= i <= 4 else 1.0 for i in range(N)]
    expected = plain(pipe, [0, 3], refresh_at, scales)
    calls = watch(pipe)
    interval = (levels[first] - 0.01, levels[4] + 0.01)
    options = {"refresh_steps": refresh_at, "guidance_scale": 3.0}
    images = sample(pipe, (0, 3), N, guidance_interval=interval, **options)
    torch.testing.assert_close(images, expected, **CLOSE)
    assert [call.rows for call in calls.denoiser] == [4 if scale > 1 else 2 for scale in scales]
    assert len(calls.encoder) == len(refresh_at)


def test_a_callback_sees_no_context_before_the_first_refresh_and_may_switch_guidance_on_there(make_pipe, watch):
    pipe, seen = make_pipe(context_free=True), []
    expected = plain(pipe, [0, 3], [3, 5], [1.0, 1.0] + [2.0] * 4)

    def callback(own, i, t, tensors):
        seen.append(tensors["context"])
        own._guidance_scale = 2.0 if i >= 1 else 1.0

    calls = watch(pipe)
    images = sample(
        pipe, (0, 3), N, refresh_steps=[3, 5], callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["context"],
    )  # fmt: skip
    torch.testing.assert_close(images, expected, **CLOSE)
    assert [context is None for context in seen] == [True] * 3 + [False] * 3
    assert [call.rows for call in calls.encoder] == [4, 4] and [call.rows for call in calls.denoiser] == [
        2,
        2,
        *[4] * 4,
    ]
    with pytest.raises(ValueError, match="there is none to replace"):
        sample(
            pipe, (0, 3), N, refresh_steps=[3], callback_on_step_end=lambda *_: {"context": seen[-1]},
        )  # fmt: skip


@pytest.mark.parametrize("context_from", [None, 1.0])
def test_a_plan_whose_first_refresh_is_step_0_is_bit_equal_to_that_of_a_pair_without_late_contexts(
    make_pipe, context_from
):
    pipe = make_pipe()
    late = DualRatePipeline.from_pipe(pipe, context_free=True, context_from=context_from)
    late.set_progress_bar_config(disable=True)
    assert torch.equal(sample(late, (0, 3), N, 2), sample(pipe, (0, 3), N, 2))
    assert torch.equal(sample(late, (0, 3), N, refresh_steps=[0, 3]), sample(pipe, (0, 3), N, 2))


@pytest.mark.parametrize(
    ("n", "k", "context_from", "expected"),
    [
        (4, None, 0.5, [2, 3]), (4, 1, 0.5, [2]), (4, 2, 0.51, [2, 3]), (4, 1, 0.49, [3]), (10, 2, 0.7, [3, 6]),
        (10, 3, 0.3, [7, 8, 9]), (10, 3, 0.75, [3, 5, 7]), (5, 2, 1.0, [0, 2]), (2, 1, 0.5, [1]), (1, 1, 1.0, [0]),
    ],
)  # fmt: skip
def test_refreshes_are_spread_over_the_steps_at_or_below_the_time_of_the_first_context(
    make_pipe, n, k, context_from, expected
):
    """Under ours and, numbered from noise, under schedulers of the host that take the same steps."""
    pipe = make_pipe(context_free=True, context_from=context_from)
    assert refresh_steps(pipe.plan_run(n, k)) == expected
    pipe.scheduler.set_timesteps(n, num_context_steps=k, context_from=context_from)
    assert refresh_steps(pipe.scheduler.refresh_plan) == expected
    for cls, options in ((DDIMScheduler, {"timestep_spacing": "trailing"}), (DPMSolverMultistepScheduler, {})):
        ours = DualRateScheduler()
        in_tree = cls(prediction_type="v_prediction", trained_betas=ours.betas.tolist(), **options)
        pipe = make_pipe(context_free=True, context_from=context_from, scheduler=in_tree)
        assert refresh_steps(pipe.plan_run(n, k)) == expected


def test_a_solver_even_in_log_snr_has_its_first_context_at_the_same_noise_level(make_pipe):
    ours = DualRateScheduler()
    solver = DPMSolverMultistepScheduler(
        prediction_type="v_prediction", trained_betas=ours.betas.tolist(), use_lu_lambdas=True
    )
    pipe = make_pipe(context_free=True, context_from=0.5, scheduler=solver)
    solver.set_timesteps(8)
    levels = [-2 * sigma.log().item() for sigma in solver.sigmas[:-1]]
    assert refresh_steps(pipe.plan_run(8)) == [i for i in range(8) if levels[i] >= plain_loop.log_snr_at(0.5) - 1e-3]


def test_a_default_plan_travels_with_the_model_and_what_a_call_asks_for_wins(make_pipe, tmp_path):
    """Mutants: a key of the defaults left out; `refresh_steps` used with another N; K not cut to the steps there are."""
    defaults = {"num_inference_steps": N, "num_context_steps": 3, "context_free": True}
    for name, more, expected in (
        ("from", {"context_from": 0.5}, [3, 4, 5]),
        ("steps", {"refresh_steps": [1, 4]}, [1, 4]),
        ("both", {"context_from": 0.5, "refresh_steps": [1, 4]}, [1, 4]),
    ):
        pipe = make_pipe(**defaults, **more)
        pipe.save_pretrained(tmp_path / name)
        others = [DualRatePipeline.from_pretrained(tmp_path / name), DualRatePipeline.from_pipe(pipe)]
        others += [DualRatePipeline(**pipe.components, **pipe.parameters)]
        images = sample(pipe)
        for other in others:
            other.set_progress_bar_config(disable=True)
            assert refresh_steps(other.plan_run()) == expected
            assert torch.equal(sample(other), images)
        modular = DualRateBlocks().init_pipeline(str(tmp_path / name))
        modular.load_components()
        assert torch.equal(modular(class_labels=[0, 3], generator=generator(), output="latents"), images)
    assert refresh_steps(pipe.plan_run(4)) == [2, 3] and refresh_steps(pipe.plan_run(N, 1)) == [3]
    assert refresh_steps(pipe.plan_run(num_context_steps=1)) == [3]
    assert refresh_steps(pipe.plan_run(N)) == [1, 4]
    assert refresh_steps(pipe.plan_run(timesteps=[900.0, 500.0, 100.0])) == [1, 2]
    assert refresh_steps(pipe.plan_run(refresh_steps=[0, 2])) == [0, 2]
    with pytest.warns(UserWarning, match="samples without context"):
        alone = DualRatePipeline.from_pipe(pipe, context_encoder=None)
    assert refresh_steps(alone.plan_run()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_context_steps": 2}, [3, 4]),
        ({"context_from": 0.25}, [5]),
        ({"num_inference_steps": 8}, [4, 5, 6]),
        ({"num_inference_steps": 8, "num_context_steps": 1}, [4]),
        ({"num_context_steps": 2, "refresh_steps": [2, 5]}, [2, 5]),
        ({"guidance_scale": 1.5}, [1, 4]),
    ],
)
def test_a_newly_given_n_k_or_time_of_the_first_context_takes_the_place_of_named_steps(
    make_pipe, tmp_path, given, expected
):
    """Mutants: a name left out of the three; steps ended that are given beside them, or by another default."""
    defaults = {"num_inference_steps": N, "num_context_steps": 3, "context_free": True, "context_from": 0.5}
    planned = make_pipe(**defaults, refresh_steps=[1, 4])
    planned.save_pretrained(tmp_path)
    registered = DualRatePipeline.from_pipe(planned)
    registered.register_to_config(**given)
    others = [DualRatePipeline.from_pretrained(tmp_path, **given), DualRatePipeline.from_pipe(planned, **given)]
    for other in [*others, registered]:
        assert refresh_steps(other.plan_run()) == expected
        other.save_pretrained(tmp_path / "again")
        assert refresh_steps(DualRatePipeline.from_pretrained(tmp_path / "again").plan_run()) == expected
    assert refresh_steps(planned.plan_run()) == [1, 4]


def test_named_steps_of_a_shorter_chain_are_kept_beside_a_larger_k_and_what_is_out_of_range_is_refused(
    make_pipe, tmp_path
):
    """They are instead of K, which waits for another N. Mutant: both checked."""
    pipe = make_pipe(num_inference_steps=16, num_context_steps=8)
    pipe.register_to_config(num_inference_steps=N, refresh_steps=[0, 4])
    pipe.save_pretrained(tmp_path)
    for loaded in (
        DualRatePipeline.from_pretrained(tmp_path),
        DualRatePipeline.from_pretrained(tmp_path, num_inference_steps=N, refresh_steps=[0, 4]),
    ):
        assert refresh_steps(loaded.plan_run()) == [0, 4] and loaded.plan_run(16).num_context_steps == 8
    for wrong in ({"refresh_steps": [70]}, {"num_context_steps": 7}, {"guidance_scale": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must"):
            pipe.register_to_config(**wrong)
    assert refresh_steps(pipe.plan_run()) == [0, 4]


def test_a_context_above_those_that_the_pair_learned_from_is_warned_of(make_pipe):
    """Mutants: no warning; one for steps at the time itself."""
    pipe = make_pipe(num_inference_steps=N, context_free=True, context_from=0.5)
    with pytest.warns(UserWarning, match=r"above context_from=0\.5, where this pair's encoder never learned") as seen:
        pipe(0, refresh_steps=[2, 4])
    assert [each.filename for each in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(0, refresh_steps=[3, 4])
        pipe(0)


def test_a_pair_that_never_learned_to_go_without_context_refuses_to_begin_late(make_pipe, watch):
    """Mutants: `not context_free` dropped, or `> 0` made `> 1`."""
    pipe = make_pipe()
    calls = watch(pipe)
    with pytest.raises(ValueError, match=r"refresh_steps=\[1, 3\] leaves .* never learned"):
        sample(pipe, (0,), N, refresh_steps=[1, 3])
    for defaults in ({"context_from": 0.5}, {"refresh_steps": [1, 3]}):
        with pytest.raises(ValueError, match=f"{next(iter(defaults))}=.* never learned"):
            make_pipe(**defaults)
    pipe.register_to_config(context_from=0.5)
    with pytest.raises(ValueError, match="context_from=0.5 leaves .* never learned"):
        sample(pipe, (0,), N)
    assert not calls.encoder and not calls.denoiser
    single = make_pipe(single_rate=True, context_from=0.5)  # without meaning
    assert refresh_steps(single.plan_run(N)) == []


@pytest.mark.parametrize("asked", [{"num_context_steps": 1}, {"refresh_steps": [0]}])
def test_refreshes_of_a_model_without_encoder_are_refused(make_pipe, watch, asked):
    pipe = make_pipe(single_rate=True)
    calls = watch(pipe)
    with pytest.raises(ValueError, match=f"{next(iter(asked))} has no effect, since there is no context encoder"):
        pipe(0, N, **asked)
    assert not calls.denoiser


@pytest.mark.parametrize("context_from", [0, -0.5, 1.5, "late", float("nan")])
def test_a_time_of_the_first_context_outside_the_chain_is_refused(make_pipe, context_from):
    with pytest.raises(ValueError, match="context_from must be"):
        make_pipe(context_from=context_from, context_free=True)
    with pytest.raises(ValueError, match="context_from must be"):
        DualRateScheduler().set_timesteps(N, context_from=context_from)


def test_more_refreshes_than_steps_are_left_or_no_step_at_all_are_refused(make_pipe):
    pipe = make_pipe(context_free=True, context_from=0.5)
    with pytest.raises(ValueError, match="between 1 and 3, as 3 of 6 steps come before the first context, got 4"):
        pipe.plan_run(N, 4)
    with pytest.raises(ValueError, match="context_from=0.5 leaves none of 1 steps for a context"):
        pipe.plan_run(1)


PLANS = [[0, 3], [2, 4], [3], [5], [1, 2, 5]]


@pytest.mark.parametrize("encoder_denoises", [False, True])
@pytest.mark.parametrize("refresh_at", PLANS)
def test_the_cost_of_a_plan_is_what_its_run_evaluates(make_networks, watch, refresh_at, encoder_denoises):
    """Mutants: `alone` one more or less; a light evaluation at refreshes; the branch with context priced for the one
    without; a refresh priced by its own step's branches alone."""
    encoder, denoiser = make_networks(num_classes=4, prediction_hand_over=encoder_denoises)
    options = {"context_free": True, "encoder_denoises": encoder_denoises}
    pipe = DualRatePipeline(denoiser, DualRateScheduler(**PRESET["scheduler"]), encoder, **options)
    pipe.set_progress_bar_config(disable=True)
    plan = pipe.plan_run(N, refresh_steps=refresh_at)
    levels = [plain_loop.log_snr_at(t) for t in TIMES]
    costs = {"encoder_denoises": encoder_denoises}
    for first, last in ((0, -1), (0, 5), (1, 2), (4, 4)):
        guided = [first <= i <= last for i in range(N)]
        interval = (levels[first] - 0.01, levels[last] + 0.01) if any(guided) else None
        calls = watch(pipe)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            scale = 3.0 if any(guided) else 1.0
            sample(pipe, (0,), N, refresh_steps=refresh_at, guidance_scale=scale, guidance_interval=interval)
        assert counter.get_total_flops() == plan_flops(denoiser, encoder, plan, guided=guided, **costs)
        if not any(guided):
            assert (len(calls.encoder), len(calls.denoiser)) == plan.evaluations(encoder_denoises)
    steps = {"num_inference_steps": N, "num_context_steps": 2}
    assert image_flops(denoiser, encoder, **steps, num_steps_alone=2, **costs) == plan_flops(
        denoiser, encoder, plan_refreshes(N, refresh_steps=[2, 4]), **costs
    )


def test_a_plan_prints_the_steps_that_go_without_context():
    rows = str(plan_refreshes(5, refresh_steps=[2, 3])).splitlines()
    marks = [row[15:].split("  ")[0] if i else row for i, row in enumerate(rows)]
    assert len(marks) == 5 and rows[3].split() == ["▼", "▼", "▼", "2", "steps", "without", "context"]
    assert rows[1][15:].startswith(" " * 10 + "E ") and rows[3].index("▼") == 25
    assert str(plan_refreshes(64, 2, num_steps_alone=4)).endswith("refreshes at 4, 34; 4 steps without context")
    assert "without" not in str(plan_refreshes(5, 2)) + str(plan_refreshes(64, 2)) + str(RefreshPlan((False,) * 64))
