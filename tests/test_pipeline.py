"""DualRatePipeline's loop: how often each network runs, on what, and that its images are those of a plain loop."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import plain_loop
from diffusers_dualrate import DualRatePipeline, DualRateScheduler

CLOSE = {"rtol": 0, "atol": 2e-4}
IN_TREE = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(n):
    return [1 - i / n for i in range(n)]


def plain(pipe, labels, times, refresh_at, scales=1.0, side=(8, 8), **options):
    """What the plain loop makes of the pipeline's networks, drawing as the pipeline draws from seed 0."""
    draws = generator()
    noise = torch.randn((len(labels), 3, *side), generator=draws)
    labels = torch.tensor(labels)
    return plain_loop.sample(
        pipe.denoiser, pipe.context_encoder, times, refresh_at, labels, noise, draws, scales, **options
    )


def in_tree(cls, **options):
    ours = DualRateScheduler()
    return cls.from_config(ours.config, trained_betas=ours.betas.tolist(), **options)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_encoder_runs_k_times_and_the_denoiser_n_times_on_twice_the_rows_under_guidance(
    make_pipe, watch, k, scale
):
    """The counts, tau >= t, and tau == t at a refresh.

    Mutants: `context_log_snr` given the step's own level or not kept, `log_snrs[i]` shifted, refreshes ignored.
    """
    pipe, n = make_pipe(), 8
    calls = watch(pipe)
    pipe([0, 3], n, k, guidance_scale=scale, generator=generator(), output_type="latent")
    rows = 2 if scale == 1 else 4
    refresh_at = [j * n // k for j in range(k)]
    levels = [plain_loop.log_snr_at(t) for t in uniform(n)]
    assert [call.rows for call in calls.encoder] == [rows] * k
    assert [call.rows for call in calls.denoiser] == [rows] * n
    assert [float(call.log_snr) for call in calls.encoder] == pytest.approx([levels[i] for i in refresh_at])
    assert [float(call.log_snr) for call in calls.denoiser] == pytest.approx(levels)
    for i, call in enumerate(calls.denoiser):
        assert call.context_log_snr <= call.log_snr  # tau >= t
        assert (call.context_log_snr == call.log_snr) == (i in refresh_at)
        assert float(call.context_log_snr) == pytest.approx(levels[max(j for j in refresh_at if j <= i)])
    null, classes = [4] * (rows - 2), [0, 3]
    assert all(call.condition.tolist() == null + classes for call in calls.encoder + calls.denoiser)
    assert pipe.num_timesteps == n and pipe.guidance_scale == scale


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (6, 1), (8, 3), (4, 4)])
def test_images_are_those_of_a_plain_loop_over_the_pair(make_pipe, n, k, scale):
    """Mutants: in the guidance formula either sign, `scale` made `scale - 1`, the branches exchanged; a stale or
    missing context, one context for both branches, the step's own level as the context's; see also the step's law.
    """
    pipe, labels = make_pipe(), [1, 2]
    images = pipe(labels, n, k, guidance_scale=scale, generator=generator(), output_type="latent").images
    expected = plain(pipe, labels, uniform(n), {j * n // k for j in range(k)}, scale)
    torch.testing.assert_close(images, expected, **CLOSE)
    assert 0.05 < expected.std() and (expected.abs() < 1).float().mean() > 0.3  # the comparison is not of clipped ones
    if k < n:
        other = plain(pipe, labels, uniform(n), set(range(n)), scale)
        assert (other - images).abs().max() > 1e-2  # it matters which steps refresh


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_images_of_a_single_rate_model_are_those_of_a_plain_loop_without_encoder(make_pipe, watch, scale):
    pipe, labels = make_pipe(single_rate=True), [1, 2]
    expected = plain(pipe, labels, uniform(6), (), scale)
    calls = watch(pipe)
    images = pipe(labels, 6, guidance_scale=scale, generator=generator(), output_type="latent").images
    torch.testing.assert_close(images, expected, **CLOSE)
    assert all(call.context is None and call.context_log_snr is None for call in calls.denoiser)


def test_a_denoiser_that_takes_context_runs_without_an_encoder_in_its_context_free_branch(make_pipe, make_networks):
    denoiser = make_networks()[1]
    pipe = DualRatePipeline(denoiser=denoiser, scheduler=DualRateScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1], 4, generator=generator(), output_type="latent").images
    torch.testing.assert_close(images, plain(pipe, [1], uniform(4), ()), **CLOSE)
    assert (images - plain(make_pipe(), [1], uniform(4), {0, 1, 2, 3})).abs().max() > 1e-2


def test_explicit_refresh_steps_and_timesteps_are_those_of_the_plain_loop(make_pipe, watch):
    pipe = make_pipe()
    times = [1.0, 0.8, 0.55, 0.3, 0.0625]
    expected = plain(pipe, [0, 2], times, {0, 3}, 2.0)
    calls = watch(pipe)
    timesteps = [1000 * t for t in times]
    for given in (timesteps, torch.tensor(timesteps)):
        options = {"timesteps": given, "refresh_steps": [0, 3], "guidance_scale": 2.0}
        images = pipe([0, 2], **options, generator=generator(), output_type="latent").images
        torch.testing.assert_close(images, expected, **CLOSE)
    assert len(calls.encoder) == 4 and len(calls.denoiser) == 10 and pipe.num_timesteps == 5


@pytest.mark.parametrize("side", [(8, 16), (12, 4)])
def test_images_need_not_be_square(make_pipe, side):
    pipe = make_pipe()
    height, width = side
    images = pipe([0], 4, 2, height=height, width=width, generator=generator(), output_type="latent").images
    assert images.shape == (1, 3, *side)
    torch.testing.assert_close(images, plain(pipe, [0], uniform(4), {0, 2}, side=side), **CLOSE)


def test_a_shifted_schedule_reaches_the_networks(make_pipe):
    pipe = make_pipe(scheduler=DualRateScheduler(image_size=64, noise_low=32, noise_high=128))

    def shifted(t):
        return plain_loop.log_snr_at(t) + 2 * (1 - 2 * t) * 0.6931471805599453

    images = pipe([0, 1], 6, 2, generator=generator(), output_type="latent").images
    torch.testing.assert_close(images, plain(pipe, [0, 1], uniform(6), {0, 3}, at=shifted), **CLOSE)


@pytest.mark.parametrize("single_rate", [True, False])
@pytest.mark.parametrize("cls", IN_TREE)
def test_an_in_tree_scheduler_takes_our_place_and_agrees_with_an_independent_loop(make_pipe, watch, cls, single_rate):
    """Mutants: `scale_model_input` or `init_noise_sigma` left out, log-SNR read one timestep off, the generator lost."""
    n, k = 6, 2
    pipe, twin = make_pipe(single_rate=single_rate, scheduler=in_tree(cls)), in_tree(cls)
    calls = watch(pipe)
    draws = generator()
    noise = torch.randn(2, 3, 8, 8, generator=draws)
    twin.set_timesteps(n)
    times = [(float(t) + 1) / 1000 for t in twin.timesteps]
    z, context, context_level = noise * twin.init_noise_sigma, None, None
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        for i, t in enumerate(twin.timesteps):
            scaled, level = twin.scale_model_input(z, t), plain_loop.log_snr_at(times[i])
            if not single_rate and i in (0, 3):
                context = pipe.denoiser.project_context(pipe.context_encoder(scaled, level, labels).context)
                context_level = level
            v = pipe.denoiser(scaled, level, labels, context, context_level).sample
            options = {"generator": draws} if cls is DDPMScheduler else {}
            z = twin.step(v, t, z, **options).prev_sample
    calls.denoiser.clear(), calls.encoder.clear()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = pipe([0, 3], n, None if single_rate else k, generator=generator(), output_type="latent").images
    off_law = [str(warning.message) for warning in caught if "takes other steps" in str(warning.message)]
    assert len(off_law) == (0 if single_rate else 1) and all(cls.__name__ in message for message in off_law)
    torch.testing.assert_close(images, z, rtol=0, atol=5e-3)
    assert images.std() > 0.05
    assert len(calls.denoiser) == n == pipe.num_timesteps and len(calls.encoder) == (0 if single_rate else k)


@pytest.mark.filterwarnings("ignore:.*takes other steps")
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_latents_given_to_an_in_tree_scheduler_stand_for_the_noise_it_would_have_drawn(make_pipe, cls):
    pipe = make_pipe(scheduler=in_tree(cls))
    noise = torch.randn(2, 3, 8, 8, generator=generator())
    drawn = pipe([0, 1], 4, generator=generator(), output_type="latent").images
    given = pipe([0, 1], 4, latents=noise, output_type="latent").images
    torch.testing.assert_close(given, drawn)


@pytest.mark.filterwarnings("ignore:.*takes other steps")
def test_an_in_tree_scheduler_takes_timesteps_where_it_can_and_a_solvers_own_levels_are_passed_on(make_pipe, watch):
    pipe = make_pipe(scheduler=in_tree(DPMSolverMultistepScheduler))
    calls = watch(pipe)
    pipe([0], timesteps=[999, 600, 200], num_context_steps=1, output_type="latent")
    expected = [plain_loop.log_snr_at(t) for t in (1.0, 0.601, 0.201)]
    assert [float(call.log_snr) for call in calls.denoiser] == pytest.approx(expected, abs=2e-3)
    assert len(calls.encoder) == 1

    pipe.scheduler = in_tree(DPMSolverMultistepScheduler, use_lu_lambdas=True)
    calls.denoiser.clear()
    pipe([0], 6, 2, output_type="latent")
    levels = torch.tensor([float(call.log_snr) for call in calls.denoiser])
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(5), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="DDIMScheduler does not take timesteps"):
        make_pipe(scheduler=in_tree(DDIMScheduler))([0], timesteps=[900, 300])


def test_defaults_travel_with_the_model_and_k_is_at_most_n(make_pipe, watch, tmp_path):
    make_pipe(num_inference_steps=6, num_context_steps=3, guidance_scale=2.0).save_pretrained(tmp_path)
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calls = watch(pipe)
    images = pipe([1], generator=generator(), output_type="latent").images
    assert [call.rows for call in calls.encoder] == [2] * 3 and [call.rows for call in calls.denoiser] == [2] * 6
    torch.testing.assert_close(images, plain(pipe, [1], uniform(6), {0, 2, 4}, 2.0), **CLOSE)
    for options, k, n in (
        ({"num_inference_steps": 2}, 2, 2),
        ({"num_context_steps": 1}, 1, 6),
        ({"timesteps": [900.0, 100.0]}, 2, 2),
        ({"refresh_steps": [0, 1, 2, 3]}, 4, 6),
    ):
        calls.encoder.clear(), calls.denoiser.clear()
        pipe([1], **options, guidance_scale=1.0, output_type="latent")
        assert (len(calls.encoder), len(calls.denoiser)) == (k, n)
        assert calls.denoiser[0].rows == 1


def test_without_a_default_k_the_context_is_fresh_at_every_step(make_pipe, watch):
    pipe = make_pipe(num_inference_steps=5)
    calls = watch(pipe)
    pipe([1], output_type="latent")
    assert len(calls.encoder) == len(calls.denoiser) == 5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_networks_in_bfloat16_leave_the_chain_in_float32(make_pipe, scale):
    pipe = make_pipe()
    options = {"guidance_scale": scale, "output_type": "latent"}
    expected = pipe([0, 1], 6, 2, **options, generator=generator()).images
    pipe.denoiser.to(torch.bfloat16), pipe.context_encoder.to(torch.bfloat16)
    seen = []

    def note(pipe, i, t, tensors):
        seen.append((tensors["latents"].dtype, tensors["context"][0].dtype))

    images = pipe(
        [0, 1], 6, 2, **options, generator=generator(), callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["latents", "context"],
    ).images  # fmt: skip
    assert images.dtype == torch.float32 and set(seen) == {(torch.float32, torch.bfloat16)}
    assert 0 < (images - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_so_they_do_under_in_tree_schedulers_which_answer_in_the_type_that_they_are_given(make_pipe, scheduler):
    pipe = make_pipe(single_rate=True)
    trained = {"trained_betas": pipe.scheduler.betas.tolist(), "prediction_type": "v_prediction"}
    pipe.scheduler = scheduler(**trained, timestep_spacing="trailing")
    pipe.denoiser.to(torch.bfloat16)
    images = pipe([0, 1], 4, output_type="latent", generator=generator()).images
    assert images.dtype == torch.float32
    assert not torch.equal(images, images.bfloat16().float())  # as if it had been rounded on the way


def test_the_progress_bar_counts_the_steps_and_can_be_switched_off(make_pipe, capsys):
    pipe = make_pipe()
    pipe([0], 3, 1, output_type="latent")
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="Drawing")
    pipe([0], 3, 1, output_type="latent")
    shown = capsys.readouterr().err
    assert "Drawing" in shown and "3/3" in shown


def test_compiled_networks_have_one_graph_each_for_a_whole_run(make_pipe):
    """Kills: one tensor passed as both log-SNRs at a refresh; a log-SNR passed as a Python number."""
    pipe = make_pipe()
    expected = pipe([0, 1], 6, 2, generator=generator(0), output_type="latent").images
    torch._dynamo.reset()
    pipe.denoiser.compile(backend="eager", fullgraph=True)
    pipe.context_encoder.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = pipe([0, 1], 6, 2, generator=generator(0), output_type="latent").images
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected)
