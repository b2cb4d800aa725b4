"""Schedulers as exchangeable parts: ours in a file, and the host's own built from ours."""

import logging
import math

import diffusers
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dualrate import DualRateScheduler
from diffusers_dualrate.steps import log_snr_of_steps
from plain_loop import amplitudes, conditioned, log_snr_at

CONFIGS = [{}, {"image_size": 64, "noise_low": 32, "noise_high": 256, "log_snr_max": 8.0}]
SOLVERS = [
    (DDIMScheduler, {}),
    (DDIMScheduler, {"timestep_spacing": "trailing"}),
    (DDPMScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
]


def in_tree(cls, ours, **options):
    return cls.from_config(ours.config, trained_betas=ours.betas.tolist(), **options)


def written_out(config, t):
    """The schedule of `config` at t, by the plain loop's formula."""
    side, low, high = config.get("image_size", 32), config.get("noise_low", 32), config.get("noise_high", 32)
    shift = 2 * ((1 - t) * math.log(high / side) + t * math.log(low / side))
    return log_snr_at(t, config.get("log_snr_min", -10.0), config.get("log_snr_max", 10.0)) + shift


@pytest.mark.parametrize("config", CONFIGS)
def test_betas_and_their_products_tabulate_the_process_at_timesteps_1_to_1000(config):
    """Mutants: timesteps from 0, `1 -` dropped, the ratio inverted, sigmoid of −λ."""
    ours = DualRateScheduler(**config)
    levels = torch.tensor([written_out(config, (i + 1) / 1000) for i in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(ours.alphas_cumprod, 1 / (1 + torch.exp(-levels)))
    assert ours.betas.shape == (1000,) and ((ours.betas > 0) & (ours.betas < 1)).all()
    torch.testing.assert_close(torch.cumprod(1 - ours.betas, 0), ours.alphas_cumprod)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("cls", "options"), SOLVERS)
def test_an_in_tree_solver_built_from_our_betas_has_our_log_snr_at_its_steps_and_predicts_v(cls, options, config):
    """Mutants in log_snr_of_steps: `-2` made `-1` or `2`, `[:-1]` made `[1:]`, logit made log, `+ 1` made `+ 0`."""
    theirs = in_tree(cls, DualRateScheduler(**config), **options)
    assert theirs.config.prediction_type == "v_prediction"
    for steps in (5, 20):
        theirs.set_timesteps(steps)
        levels = log_snr_of_steps(theirs)
        assert levels.shape == theirs.timesteps.shape and levels.dtype == torch.float32
        assert (levels.diff() > 0).all()
        # Their own tables ...
        if hasattr(theirs, "sigmas"):
            own = torch.as_tensor(theirs.sigmas).double()[:steps] ** -2
        else:
            alphas_cumprod = torch.stack([theirs.alphas_cumprod[int(t)] for t in theirs.timesteps]).double()
            own = alphas_cumprod / (1 - alphas_cumprod)
        torch.testing.assert_close(levels.double().exp(), own, rtol=1e-4, atol=1e-8)
        # ... which are our schedule, to the precision of their float32 products.
        if "use_lu_lambdas" in options:
            torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(steps - 1), rtol=1e-3, atol=1e-3)
        else:
            ours = torch.tensor([written_out(config, (float(t) + 1) / 1000) for t in theirs.timesteps])
            torch.testing.assert_close(levels, ours, rtol=0, atol=2e-2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("n", [4, 10, 20])
def test_of_second_order_ours_is_the_hosts_stochastic_dpmsolver_in_steps_even_in_time(config, n):
    """An independent implementation of the same solver. Mutants: 1 and -1 of the carried steps' places moved."""
    ours = DualRateScheduler(**config, clip_sample=False, second_order=True)
    theirs = in_tree(DPMSolverMultistepScheduler, ours, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing")
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    steps = torch.Generator().manual_seed(n)
    z = z_theirs = torch.randn(1, 3, 4, 4, generator=steps)
    for i, (t, t_theirs) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        v = torch.randn(z.shape, generator=steps)
        z = ours.step(v, t, z, torch.Generator().manual_seed(i), return_dict=False)[0]
        noise = torch.Generator().manual_seed(i)
        z_theirs = theirs.step(v, t_theirs, z_theirs, generator=noise, return_dict=False)[0]
        torch.testing.assert_close(z, z_theirs, rtol=1e-3, atol=1e-3)


def test_the_levels_of_our_own_scheduler_are_those_of_its_run():
    ours = DualRateScheduler()
    ours.set_timesteps(timesteps=[900.0, 450.5, 3.0])
    expected = torch.tensor([log_snr_at(t) for t in (0.9, 0.4505, 0.003)])
    torch.testing.assert_close(log_snr_of_steps(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_scheduler_without_alphas_cumprod_is_refused_by_name():
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(4)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        log_snr_of_steps(theirs)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_a_step_of_noise_alone_is_refused_before_any_image(cls, make_pipe):
    pipe = make_pipe(single_rate=True)
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = in_tree(cls, pipe.scheduler, **options)
    with pytest.raises(ValueError, match=f"{cls.__name__} has a step without any signal.*rescale_betas_zero_snr"):
        pipe([0], 4)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_scheduler_with_sigmas_of_a_flow_is_refused_before_any_image(cls, make_pipe, watch):
    """Its images leave the variance-preserving process: the networks would see noise levels that they do not know."""
    pipe = make_pipe(single_rate=True)
    pipe.scheduler = in_tree(cls, pipe.scheduler, use_flow_sigmas=True)
    calls = watch(pipe)
    with pytest.raises(ValueError, match=f"{cls.__name__} with use_flow_sigmas=True leaves the variance-preserving"):
        pipe([0], 4)
    assert not calls.denoiser


@pytest.mark.parametrize("cls", [DDIMInverseScheduler, DPMSolverMultistepInverseScheduler])
def test_a_scheduler_that_runs_from_images_to_noise_is_refused_before_any_image(cls, make_pipe, watch):
    pipe = make_pipe(single_rate=True)
    pipe.scheduler = in_tree(cls, pipe.scheduler)
    calls = watch(pipe)
    with pytest.raises(ValueError, match=f"{cls.__name__} runs from images to noise"):
        pipe([0], 4)
    assert not calls.denoiser


def test_every_scheduler_named_compatible_exists_in_diffusers_and_can_be_made_from_ours():
    ours = DualRateScheduler()
    assert len(ours._compatibles) >= 4 and len(set(ours._compatibles)) == len(ours._compatibles)
    for name in ours._compatibles:
        assert in_tree(getattr(diffusers, name), ours).config.num_train_timesteps == 1000
    assert {cls.__name__ for cls in ours.compatibles} >= set(ours._compatibles)


@pytest.mark.parametrize(
    "config",
    [{}, *CONFIGS[1:], {"variance_interpolation": 0.2, "clip_sample_range": 0.7, "num_train_timesteps": 50}],
)
def test_a_scheduler_survives_saving_and_loading_without_a_warning(config, tmp_path, caplog, monkeypatch):
    ours = DualRateScheduler(**config)
    ours.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        loaded = DualRateScheduler.from_pretrained(tmp_path)
    assert not caplog.records
    kept = {name: value for name, value in loaded.config.items() if not name.startswith("_")}
    assert kept == {name: value for name, value in ours.config.items() if not name.startswith("_")}
    assert config.items() <= kept.items() and kept["prediction_type"] == "v_prediction"
    z = torch.randn(1, 3, 4, 4)
    for each in (ours, loaded):
        each.set_timesteps(4)
    assert torch.equal(ours.step_log_snrs, loaded.step_log_snrs)
    for t in ours.timesteps:
        first, second = (each.step(z, t, z, torch.Generator().manual_seed(0)).prev_sample for each in (ours, loaded))
        assert torch.equal(first, second)


def linear_chain(scheduler, variance, steps):
    """Gain of every step of a scheduler whose model is the best one for Gaussian data, and the log-SNRs it starts at.

    The best denoiser is x = k z with k = α v / (α² v + σ²), so that the model output is v̂ = (α − k) z / σ.
    """
    scheduler.set_timesteps(steps)
    gains, levels = [], log_snr_of_steps(scheduler).double().tolist()
    for timestep, level in zip(scheduler.timesteps, levels, strict=True):
        alpha, sigma = amplitudes(level)
        k = alpha * variance / (alpha**2 * variance + sigma**2)
        z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        gains.append(scheduler.step((alpha - k) * z / sigma, timestep, z).prev_sample.item())
    return gains, levels


@pytest.mark.parametrize("std", [0.25, 1.0, 2.0])
def test_ddim_on_our_schedule_has_the_gain_of_its_closed_form(std):
    """A = α_s k + (σ_s/σ_t)(1 − α_t k). Kills: the wrong schedule, timesteps off by one, ε taken for v."""
    ours = DualRateScheduler()
    ddim = DDIMScheduler(
        trained_betas=ours.betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    gains, levels = linear_chain(ddim, std**2, 20)
    for gain, level, following in zip(gains, levels, levels[1:], strict=False):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(level), amplitudes(following)
        k = alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2)
        assert gain == pytest.approx(alpha_s * k + sigma_s / sigma_t * (1 - alpha_t * k), rel=1e-4)


def test_a_deterministic_solver_leaves_the_law_of_the_markov_chain():
    """Var x = .7 from τ = .6 to t = .4: Cov(z_t, z_τ) is .586 in theory and .587 in ancestral steps.

    Under DDIM it is .849: in the limit of small steps the flow only scales z, so that Cov² = Var z_t Var z_τ.
    """
    ours = DualRateScheduler()
    ddim = DDIMScheduler(
        trained_betas=ours.betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    gains, levels = linear_chain(ddim, 0.7, 1000)
    tau, t = (min(range(1000), key=lambda i: abs(levels[i] - log_snr_at(time))) for time in (0.6, 0.4))
    (alpha_tau, sigma_tau), (alpha_t, sigma_t) = amplitudes(levels[tau]), amplitudes(levels[t])
    start = alpha_tau**2 * 0.7 + sigma_tau**2
    end = alpha_t**2 * 0.7 + sigma_t**2
    assert math.prod(gains[tau:t]) * start == pytest.approx(math.sqrt(start * end), abs=1e-3)
    in_theory = alpha_t * alpha_tau * 0.7 + alpha_tau / alpha_t * sigma_t**2
    assert in_theory == pytest.approx(0.586, abs=2e-3)
    chain = 1.0
    for level, following in zip(levels[tau:t], levels[tau + 1 : t + 1], strict=True):
        slope, factor_x, _ = conditioned(level, following)
        alpha, sigma = amplitudes(level)
        chain *= slope + factor_x * alpha * 0.7 / (alpha**2 * 0.7 + sigma**2)
    assert chain * start == pytest.approx(0.587, abs=2e-3)
