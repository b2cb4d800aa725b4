"""The study on untrained and hardly trained models: counts, engagement, and that it stops and goes on."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, diffusion
from diffusers_dualrate.evaluation import ImageClassifier
from diffusers_dualrate.flops import context_flops, image_flops, network_flops
from diffusers_dualrate.losses import lags
from diffusers_dualrate.recipes import PairRecipe
from diffusers_dualrate.steps import log_snr_of_steps
from research import arms, jobs, networks, study, train_unet

TINY = Path("examples/presets/tiny.json")


@pytest.mark.parametrize("data", networks.DATA)
def test_the_sized_network_costs_what_the_pair_costs_a_step_on_average(data):
    preset = networks.make_preset(data, "sized")
    sized = UViTDenoiser(**preset["denoiser"] | {"context_channels": None, "prediction_hand_over": False})
    preset = networks.make_preset(data, "pair")
    encoder, denoiser = UViTContextEncoder(**preset["context_encoder"]), UViTDenoiser(**preset["denoiser"])
    mean = image_flops(denoiser, encoder, num_inference_steps=64, num_context_steps=8) / 64
    assert network_flops(sized) == pytest.approx(mean, rel=0.04)


@pytest.mark.parametrize("data", networks.DATA)
def test_the_unet_costs_what_the_heavy_network_costs(data):
    preset = networks.make_preset(data, "unet")
    shape = {key: value for key, value in preset["context_encoder"].items() if "context" not in key}
    heavy = network_flops(UViTDenoiser(**{key: value for key, value in shape.items() if "hand_over" not in key}))
    size, channels = preset["unet"]["sample_size"], preset["unet"]["in_channels"]
    assert (size, channels) == (shape["sample_size"], shape["in_channels"])
    with torch.device("meta"), study.FlopCounterMode(display=False) as counter:
        UNet2DModel(**preset["unet"])(torch.empty(1, channels, size, size), torch.empty(1))
    assert counter.get_total_flops() == pytest.approx(heavy, rel=0.02)


def test_the_unet_is_told_the_timestep_that_its_schedulers_name():
    ours = DualRateScheduler()
    timesteps = torch.tensor([0.0, 250.5, 998.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(train_unet.timesteps_of(ours.log_snr(timesteps + 1), ours), timesteps)


@pytest.fixture
def unet(tmp_path):
    preset = networks.make_preset("digits", "unet", 2)
    networks.run_training("digits", "unet", preset, tmp_path / "unet", "--seed", "0")
    return tmp_path / "unet"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_study_trains_and_samples_on_the_gpu(tmp_path, unet):
    preset = networks.make_preset("digits", "pair", 2)
    networks.run_training("digits", "pair", preset, tmp_path / "pair", "--seed", "0")
    args = study.parse_args(["--num_samples", "20", "--work_dir", str(tmp_path)])
    classifier, statistics, *_ = study.open_reference(args, "digits")
    samplers = [arms.sample_as_trained(tmp_path / "pair", "dpmsolver++", 4, 2)]
    if find_spec("DeepCache"):
        samplers.append(arms.sample_with_deepcache(unet, "ddim", 8, 4))
    for sampler in samplers:
        images = study.draw_checked(sampler, [1, 2], [3, 4])
        assert images.is_cuda and study.statistics_of(classifier, [images]).moments.device == statistics.moments.device


@pytest.mark.slow
def test_the_unet_trains_and_samples_with_deepcache_where_that_is_installed(unet):
    pytest.importorskip("DeepCache")
    plain, cached = arms.sample_with_deepcache(unet, "ddim", 8, 8), arms.sample_with_deepcache(unet, "ddim", 8, 4)
    first, again = (study.draw_checked(cached, [1, 2], [3, 4]) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, study.draw_checked(plain, [1, 2], [3, 4]))
    for solver in ("dpmsolver++", "sde-dpmsolver++"):
        study.draw_checked(arms.sample_with_deepcache(unet, solver, 6, 3), [0], [0])


def test_the_unet_refuses_the_flags_that_it_would_ignore(capsys):
    common = ["--preset", "p.json", "--unet", "u.json", "--output_dir", "o"]
    assert train_unet.parse_args(common).preset == "p.json"
    for flags in (["--mixed_precision", "bf16"], ["--train_batch_size", "8"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(SystemExit):
            train_unet.parse_args([*common, *flags])
        assert f"this script has no {flags[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_unet_loads_as_its_pipeline_and_predicts_velocities(unet):
    pipe = DDIMPipeline.from_pretrained(unet)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.unet.config.num_class_embeds == 10
    z = torch.randn(1, 1, 8, 8)
    assert pipe.unet(z, 999, class_labels=torch.tensor([3])).sample.abs().max() > 0


def test_an_arm_whose_package_is_missing_is_left_out_and_named_where_it_must_be_measured(capsys, monkeypatch):
    monkeypatch.setattr(study, "find_spec", lambda name: None if name == "DeepCache" else name)
    args = study.parse_args(["--data", "digits", "letters"])
    series = study.list_series(args)
    missing = [key for key in series if key[0] == "digits"]
    kept = study.leave_out_unavailable(args, missing)
    assert kept == [key for key in missing if key[1] != "deepcache"] and len(kept) < len(missing)
    assert (
        "deepcache is left out on digits, with all that was measured of it: pip install DeepCache"
        in capsys.readouterr().out
    )
    assert {data for data, name, *_ in study.list_series(args) if name == "deepcache"} == {"letters"}
    with pytest.raises(SystemExit):
        study.parse_args(["--leave_out", "digits/deepcach"])


def test_what_would_fail_after_the_work_is_refused_before_it(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        study.main(study.parse_args(["--work_dir", str(tmp_path / "work"), "--readme", str(tmp_path / "page.md")]))
    with pytest.raises(ValueError, match="There is no classifier"):
        study.main(study.parse_args(["--work_dir", str(tmp_path / "work"), "--classifiers", str(tmp_path)]))
    monkeypatch.setattr(study, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        study.main(study.parse_args(["--work_dir", str(tmp_path / "work")]))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("solver", study.report.SOLVERS)
def test_every_solver_takes_n_steps_from_pure_noise_and_dpmsolver_uniformly_in_log_snr(solver, make_pipe):
    scheduler = arms.make_scheduler(solver, make_pipe().scheduler)
    scheduler.set_timesteps(8)
    levels = log_snr_of_steps(scheduler)
    assert len(levels) == 8 and levels[0] == pytest.approx(-10, abs=0.01) and (levels.diff() > 0).all()
    if solver == "dpmsolver++":
        torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(7), rtol=0.02, atol=0)
    if solver == "sde-dpmsolver++":
        expected = DualRateScheduler()
        expected.set_timesteps(8)
        torch.testing.assert_close(levels, log_snr_of_steps(expected), rtol=0, atol=0.02)
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_stochastic_dpmsolver_is_the_ancestral_chain_of_an_extrapolated_prediction(make_pipe):
    """x̂ + (x̂ − x̂_before) h / (2 h_before), h the step in half log-SNR, takes the place of x̂ but in the first and last step."""
    scheduler = arms.make_scheduler("sde-dpmsolver++", make_pipe().scheduler)
    scheduler.set_timesteps(8)
    levels = log_snr_of_steps(scheduler).double()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    before = None
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        v = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        level, following = levels[i], levels[i + 1]
        x = level.sigmoid().sqrt() * z - (-level).sigmoid().sqrt() * v
        guess = x
        if before is not None:
            guess = x + (x - before) * (following - level) / (level - levels[i - 1]) / 2
        noises = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        noise = torch.cat([torch.randn(z[:1].shape, generator=g) for g in noises])
        factor_z, factor_x, std = diffusion.posterior(level, following)
        expected = factor_z * z + factor_x * guess + std * noise
        noises = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        z = scheduler.step(v, timestep, z, generator=noises, return_dict=False)[0]
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
        z, before = expected, x


def ddim_runs():
    single_and_pair = {n for arm in arms.ARMS.values() if arm.requires is None for n, _ in arm.steps.get("ddim", ())}
    unet = {n for n, _ in arms.ARMS["deepcache"].steps["ddim"]}
    trained = {"trained_betas": DualRateScheduler().betas.tolist(), "prediction_type": "v_prediction"}
    yield from ((arms.make_scheduler("ddim", DualRateScheduler()), n) for n in sorted(single_and_pair))
    yield from ((DDIMScheduler(**trained, timestep_spacing="trailing"), n) for n in sorted(unet))


@pytest.mark.parametrize(("scheduler", "n"), list(ddim_runs()))
def test_every_step_of_ddim_ends_at_the_noise_level_that_the_next_one_starts_from(scheduler, n):
    scheduler.set_timesteps(n)
    levels = log_snr_of_steps(scheduler).double()
    x, eps = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([[-0.8]], dtype=torch.float64)
    z = [level.sigmoid().sqrt() * x + (-level).sigmoid().sqrt() * eps for level in levels]
    for i in range(n - 1):
        v = levels[i].sigmoid().sqrt() * eps - (-levels[i]).sigmoid().sqrt() * x
        found = scheduler.step(v, scheduler.timesteps[i], z[i]).prev_sample
        torch.testing.assert_close(found, z[i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", study.report.SOLVERS)
def test_the_counted_flops_of_an_image_are_those_of_its_evaluations(solver, make_pipe, tmp_path):
    make_pipe(single_rate=True).save_pretrained(tmp_path / "single")
    make_pipe().save_pretrained(tmp_path / "pair")
    for folder, k in (("single", None), ("pair", 2)):
        sampler = arms.sample_as_trained(tmp_path / folder, solver, 5, k)
        with study.sdpa_kernel(study.SDPBackend.MATH), study.FlopCounterMode(display=False) as counter:
            study.draw_checked(sampler, [1], [0])
        pipe = arms.open_pipeline(tmp_path / folder, solver)
        expected = image_flops(pipe.denoiser, pipe.context_encoder, num_inference_steps=5, num_context_steps=k or 0)
        assert counter.get_total_flops() == expected


def test_reuse_and_the_control_run_each_part_as_often_as_they_say(make_pipe, tmp_path):
    make_pipe(single_rate=True).save_pretrained(tmp_path / "single")
    make_pipe().save_pretrained(tmp_path / "pair")
    sampler = arms.sample_with_reuse(tmp_path / "single", "ddim", 6, 2)
    assert {name: times for name, (_, times) in sampler.evaluations.items()} == {"deep_levels": 2, "denoiser": 6}
    first, again = (study.draw_checked(sampler, [0, 3], [5, 6]) for _ in range(2))
    plain = study.draw_checked(arms.sample_as_trained(tmp_path / "single", "ddim", 6, None), [0, 3], [5, 6])
    assert torch.equal(first, again) and not torch.allclose(first, plain)
    control = arms.sample_without_context(tmp_path / "pair", "ddim", 6, None)
    assert control.evaluations.keys() == {"denoiser"}
    study.draw_checked(control, [0], [0])


@pytest.mark.parametrize("solver", study.report.SOLVERS)
def test_stitching_begins_with_the_light_network_and_ends_with_the_heavy_one(solver, make_pipe, tmp_path):
    """Held to a run whose network a callback gives the heavy one's weights. Kills: the other order; a step more of either."""
    pipes = [make_pipe(single_rate=True) for _ in range(2)]
    pipes[1].denoiser.proj_out.weight.data *= -2
    folders = [tmp_path / "heavy", tmp_path / "light"]
    for pipe, folder in zip(pipes, folders, strict=True):
        pipe.save_pretrained(folder)
    sampler = arms.sample_stitched(*folders, solver, 6, 2)
    first, again = (study.draw_checked(sampler, [0, 3], [5, 6]) for _ in range(2))
    heavy, light = (arms.open_pipeline(folder, solver) for folder in folders)

    def put_heavy(pipe, step, timestep, tensors):
        if step == 3:
            light.denoiser.load_state_dict(heavy.denoiser.state_dict())
        return {}

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = light(
        [0, 3], 6, generator=generators, guidance_scale=1.0, output_type="latent", callback_on_step_end=put_heavy
    ).images
    assert torch.equal(first, again) and torch.equal(first, expected)
    alone = study.draw_checked(arms.sample_stitched(*folders, solver, 6, 6), [0], [5])
    assert torch.equal(alone, study.draw_checked(arms.sample_as_trained(folders[0], solver, 6, None), [0], [5]))


def test_a_late_pair_goes_without_context_until_its_last_steps(make_pipe, tmp_path, watch):
    """Kills: n − k + 1 for n − k; K spread over the run; contexts that are shared."""
    make_pipe(context_free=True).save_pretrained(tmp_path)
    sampler = arms.sample_late(tmp_path, "sde-dpmsolver++", 5, 3)
    assert {name: times for name, (_, times) in sampler.evaluations.items()} == {"denoiser": 5, "context_encoder": 3}
    pipe = arms.open_pipeline(tmp_path, "sde-dpmsolver++")
    calls, options = watch(pipe), {"guidance_scale": 1.0, "output_type": "latent", "refresh_steps": [2, 3, 4]}
    expected = pipe([1], 5, generator=[torch.Generator().manual_seed(0)], **options).images
    assert torch.equal(study.draw_checked(sampler, [1], [0]), expected)
    assert [call.context is None for call in calls.denoiser] == [True, True, False, False, False]
    assert len(calls.encoder) == 3


@pytest.mark.parametrize("solver", study.report.SOLVERS)
def test_stitched_to_all_of_a_pair_the_end_is_the_pair_with_a_refresh_at_every_step(solver, make_pipe, tmp_path):
    """Kills: a stale context; the encoder's evaluations uncounted; the light network's weights in the last steps."""
    make_pipe().save_pretrained(tmp_path / "pair")
    make_pipe(single_rate=True).save_pretrained(tmp_path / "light")
    folders = (tmp_path / "pair", tmp_path / "light")
    alone = study.draw_checked(arms.sample_stitched_to_pair(*folders, solver, 4, 4), [0], [5])
    assert torch.equal(alone, study.draw_checked(arms.sample_as_trained(folders[0], solver, 4, 4), [0], [5]))
    sampler = arms.sample_stitched_to_pair(*folders, solver, 5, 2)
    assert {name: times for name, (_, times) in sampler.evaluations.items()} == {
        **{"denoiser": 5, "light": 3},
        **{"heavy": 2, "context_encoder": 2},
    }
    assert not torch.equal(study.draw_checked(sampler, [0], [5]), alone)


def make_unet(folder, channels, num_class_embeds):
    """An untrained U-Net of the study, saved as its training saves it."""
    unet = UNet2DModel(**networks._unet(8, channels, 4, 8), num_class_embeds=num_class_embeds).eval()
    process = {"trained_betas": DualRateScheduler().betas.tolist(), "prediction_type": "v_prediction"}
    DDIMPipeline(unet, DDIMScheduler(**process)).save_pretrained(folder)
    return unet, process


def test_a_unet_taken_as_it_is_samples_as_with_its_own_class(tmp_path):
    """Kills: the scheduler of its folder for the ancestral chain; the last of its classes kept, or another one left out."""
    unet, process = make_unet(tmp_path / "whole", 1, 5)
    DDIMPipeline(train_unet.without_null_label(unet), DDIMScheduler(**process)).save_pretrained(tmp_path / "hosted")
    assert DDIMPipeline.from_pretrained(tmp_path / "hosted").unet.config.num_class_embeds == 4
    for solver in ("ancestral", "sde-dpmsolver++"):
        sampler = arms.sample_host(tmp_path / "hosted", solver, 4, None)
        assert sampler.evaluations["denoiser"][1] == 4
        found = study.draw_checked(sampler, [3, 0], [5, 6])
        scheduler, generators = arms.make_scheduler(solver, DualRateScheduler()), [torch.Generator() for _ in range(2)]
        for seed, generator in zip((5, 6), generators, strict=True):
            generator.manual_seed(seed)
        scheduler.set_timesteps(4)
        z = randn_tensor((2, 1, 8, 8), generators)
        with torch.no_grad():
            for t in scheduler.timesteps:
                own = t - 1 if solver == "ancestral" else t  # counted from 1, and from 0
                v = unet(z, own, class_labels=torch.tensor([3, 0])).sample
                z = scheduler.step(v, t, z, generator=generators, return_dict=False)[0]
        torch.testing.assert_close(found, z, atol=1e-3, rtol=1e-3)


def test_the_pair_and_students_start_from_the_unet_alone():
    """Kills: the U-ViT as teacher or encoder; steps of another student."""
    expected = {"unet-mmd": 8, "unet-mmd-4-steps": 4, "unet-mmd-2-steps": 2}
    for training, n in expected.items():
        assert networks.make_preset("letters", training)["distillation"]["num_inference_steps"] == n
        assert networks.lineage(training) == {training, "unet"}
    expected = {"": (8, 2), "-4-steps": (4, 2), "-4-steps-1-context": (4, 1), "-2-steps": (2, 1)}
    for name, (n, k) in expected.items():
        recipe = networks.make_preset("letters", f"unet-pair-mmd{name}")["distillation"]
        assert (recipe["num_inference_steps"], recipe["num_context_steps"]) == (n, k)
        assert networks.lineage(f"unet-pair-mmd{name}") == {f"unet-pair-mmd{name}", "unet-converted", "unet"}
        assert arms.ARMS[f"dual-rate-unet-mmd{name}"].steps == {"ancestral": ((n, k),)}


def test_stitched_to_a_unet_the_end_is_the_unet_under_its_own_timesteps(make_pipe, tmp_path):
    """Kills: log-SNRs given as timesteps; timesteps counted from 1; a step more of the light network."""
    make_pipe(single_rate=True).save_pretrained(tmp_path / "light")
    ours = arms.open_pipeline(tmp_path / "light", "ancestral").scheduler
    channels = make_pipe().denoiser.config.in_channels
    unet, process = make_unet(tmp_path / "unet", channels, 5)
    folders = (tmp_path / "unet", tmp_path / "light")
    found = study.draw_checked(arms.sample_stitched_to_unet(*folders, "sde-dpmsolver++", 4, 4), [3], [5])
    scheduler, generator = arms.make_scheduler("sde-dpmsolver++", ours), [torch.Generator().manual_seed(5)]
    scheduler.set_timesteps(4)
    z = randn_tensor((1, channels, 8, 8), generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = unet(z, t, class_labels=torch.tensor([3])).sample
            z = scheduler.step(v, t, z, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(found, z, atol=1e-3, rtol=1e-3)
    sampler = arms.sample_stitched_to_unet(*folders, "dpmsolver++", 6, 2)
    assert {name: times for name, (_, times) in sampler.evaluations.items()} == {"denoiser": 6, "light": 4, "heavy": 2}
    assert not torch.equal(study.draw_checked(sampler, [3], [5]), found)


def test_a_conversion_is_sampled_both_ways_whatever_its_folder_says(make_networks, tmp_path):
    encoder, denoiser = make_networks(num_classes=4, prediction_hand_over=True)
    for saved in (False, True):
        pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=saved)
        pipe.save_pretrained(tmp_path / str(saved))
        for sample, light in ((arms.sample_converted, 6), (arms.sample_spared, 4)):
            sampler = sample(tmp_path / str(saved), "ancestral", 6, 2)
            study.draw_checked(sampler, [0], [0])
            assert sampler.evaluations["denoiser"][1] == light and sampler.evaluations["context_encoder"][1] == 2


def test_a_method_that_does_nothing_is_an_error(make_pipe):
    pipe = make_pipe()
    with pytest.raises(RuntimeError, match="did not engage.*'context_encoder': 2.*'context_encoder': 3"):
        study.draw_checked(
            arms.Sampler(
                arms.make_sampler(pipe, 4, 2).draw,
                {"denoiser": (pipe.denoiser, 4), "context_encoder": (pipe.context_encoder, 3)},
            ),
            [0],
            [0],
        )


@pytest.mark.parametrize("data", ["letters", "digits"])
def test_samples_and_floor_have_the_classes_in_the_shares_of_the_data(data, tmp_path, monkeypatch):
    monkeypatch.setitem(networks.DATA, data, dataclasses.replace(networks.DATA[data], num_references=60))
    measured = []
    images_of = type(study.open_measured(data, "floor"))
    load = images_of.__getitem__
    monkeypatch.setattr(
        images_of, "__getitem__", lambda self, index: measured.append(load(self, index)) or measured[-1]
    )
    args = study.parse_args(["--data", data, "--num_samples", "130", "--work_dir", str(tmp_path)])
    *_, labels, _ = study.open_reference(args, data)
    floor = [item["class_labels"].item() for item in measured[60:]]
    classes = study.open_measured(data, "floor").num_classes
    for found in (labels, floor):
        assert len(found) == 130
        assert all(abs(found.count(label) - 130 / classes) < 2 for label in range(classes))


def test_counts_are_shrunk_for_one_data_set_or_for_all():
    args = study.parse_args(["--num_samples", "letters=1000", "50", "--max_evaluations", "digits=64"])
    assert [study.count_of(args, "num_samples", data) for data in ("letters", "digits")] == [1000, 50]
    assert [study.count_of(args, "max_evaluations", data) for data in ("letters", "digits")] == [256, 64]
    assert study.count_of(study.parse_args([]), "num_samples", "letters") == 5000
    # The steps of a training are shrunk, never stretched: a conversion's are fewer than those of what it starts from.
    args = study.parse_args(["--max_train_steps", "digits=2000"])
    shrunk = {data: networks.given_count(args, "max_train_steps", data) for data in ("letters", "digits")}
    assert shrunk == {"letters": None, "digits": 2000}
    for training, steps in (("heavy", 2000), ("converted", 1500)):
        assert networks.make_preset("digits", training, 2000)["training"]["max_train_steps"] == steps
    for wrong in ("letters", "words=5", "0", "letters=-1"):
        with pytest.raises(SystemExit):
            study.parse_args(["--num_samples", wrong])


def test_a_data_set_has_sampling_seeds_of_its_own_or_those_for_all(tmp_path):
    args = study.parse_args(["--sampling_seeds", "7", "digits=0", "digits=1", "--work_dir", str(tmp_path)])
    assert [study.sampling_seeds_of(args, data) for data in ("letters", "digits")] == [[7], [0, 1]]
    keys = [key for key, *_ in study.list_points(args, "digits", "single-rate", "steps", "ddim", 0)]
    assert sorted({key["sampling_seed"] for key in keys}) == [0, 1] and len(keys) % 2 == 0
    assert study.sampling_seeds_of(study.parse_args(["--sampling_seeds", "digits=3"]), "letters") == [0]
    assert study.sampling_seeds_of(study.parse_args([]), "digits") == [0]
    with pytest.raises(SystemExit):
        study.parse_args(["--sampling_seeds", "words=1"])


@pytest.mark.parametrize("data", networks.DATA)
def test_the_presets_train_what_the_arm_dual_rate_does(data):
    own = json.loads(networks.DATA[data].preset.read_text())
    trained = ("context_encoder", "denoiser", "scheduler", "training")
    made = networks.make_preset(data, "pair")
    assert {name: made[name] for name in trained} == {name: own[name] for name in trained}


def test_half_of_the_contexts_of_half_fresh_pairs_are_fresh():
    uniforms = torch.rand(10_000, 3, generator=torch.Generator().manual_seed(0))
    ages = lags(uniforms, networks.make_preset("digits", "half-fresh-pair")["training"]["context_ages"])
    assert abs((ages < 1e-5).float().mean() - 0.5) < 0.02
    assert (ages[ages >= 1e-5] > 1e-3).float().mean() > 0.95


def test_late_pairs_see_no_context_in_half_of_their_rows_and_their_students_follow_them():
    """Kills: context_from laid over the wrong recipe; students of another pair."""
    for training in ("late-pair", "late-converted"):
        preset = networks.make_preset("digits", training)
        assert PairRecipe(**preset["training"]).share_without_context == 0.5
    assert "context_from" not in networks.make_preset("digits", "converted")["training"]
    for training, (n, k) in {"late-pair-mmd": (4, 2), "late-pair-mmd-2-steps": (2, 1)}.items():
        recipe = networks.make_preset("digits", training)["distillation"]
        assert (recipe["num_inference_steps"], recipe["num_context_steps"]) == (n, k)
        assert networks.lineage(training) == {training, "heavy", "late-pair"}


def test_a_failing_job_does_not_stop_the_others_but_the_study(tmp_path, capsys):
    done = []

    def job(args, name):
        if name == "bad":
            raise ValueError("broken")
        done.append(name)

    with pytest.raises(RuntimeError, match="1 jobs of 3 failed.*bad.*broken"):
        jobs.run_jobs(SimpleNamespace(work_dir=tmp_path, jobs=1), job, [("one",), ("bad",), ("two",)])
    assert done == ["one", "two"] and "failed: bad" in capsys.readouterr().out


NAP = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

def nap(args, name):
    Path(args.work_dir, name).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    import nap
    from research import jobs
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    jobs.run_jobs(SimpleNamespace(work_dir=sys.argv[1], jobs=2), nap.nap, [("first",), ("second",), ("third",)])
"""


@pytest.mark.slow
def test_a_study_that_is_told_to_stop_leaves_no_worker_behind(tmp_path):
    (tmp_path / "nap.py").write_text(NAP)
    path = os.pathsep.join([str(tmp_path), str(Path(jobs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "nap.py", tmp_path], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    files = [tmp_path / "first", tmp_path / "second"]
    until(lambda: all(file.exists() and file.read_text() for file in files), 120)
    process.terminate()
    assert process.wait(60) == 128 + 15 and not (tmp_path / "third").exists()
    until(lambda: not any(is_alive(int(file.read_text())) for file in files), 30)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_small_study_measures_every_arm_at_equal_budgets_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    """The digits as the networks of the preset `tiny` see them, enlarged and in colour."""
    monkeypatch.setitem(
        networks.DATA,
        "digits",
        networks.DataSet(TINY, None, "digits", {"level_channels": [8, 24]}, {}, num_samples=20),
    )
    ImageClassifier(3, 10).save(tmp_path / "classifiers/digits.safetensors")
    args = study.parse_args(
        ["--data", "digits", "--max_train_steps", "4", "--max_evaluations", "8", "--solvers", "ddim", "dpmsolver++"]
        + ["--arms", "single-rate", "dual-rate", "feature-reuse", "stitching"]
        + ["--classifiers", str(tmp_path / "classifiers")]
        + ["--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "study.json")]
    )
    found = study.main(args)
    assert {"command", "commit", "environment", "floors", "points"} <= found.keys()
    assert found["floors"]["digits"]["n"] == 20
    points = {(p["arm"], p["budget"], p["solver"], p["N"], p["K"]): p for p in found["points"]}
    assert points.keys() == {
        (name, budget, solver, n, k)
        for name in args.arms
        for budget in (["steps", "flops"] if name == "dual-rate" else ["steps"])
        for solver in args.solvers
        for n, k in arms.ARMS[name].steps[solver]
        if n <= 8
    }
    for point in points.values():
        assert point["n"] == 20 and point["seed"] == 0 and 0 < point["fd"] < float("inf")
        assert point["evaluations"]["denoiser"] == point["N"]
    heavy, pair, equal = (
        points[key]
        for key in (
            ("single-rate", "steps", "ddim", 8, None),
            ("dual-rate", "steps", "ddim", 8, 4),
            ("dual-rate", "flops", "ddim", 8, 4),
        )
    )
    assert pair["evaluations"] == {"denoiser": 8, "context_encoder": 4}
    assert points["feature-reuse", "steps", "ddim", 8, 4]["evaluations"] == {"denoiser": 8, "deep_levels": 4}
    stitched = points["stitching", "steps", "ddim", 8, 4]
    assert stitched["evaluations"] == {"denoiser": 8, "heavy": 4, "light": 4}
    assert stitched["training_images"] == 2 * heavy["training_images"]
    assert heavy["training_flops"] < stitched["training_flops"] < 2 * heavy["training_flops"]

    preset = networks.make_preset("digits", "pair")
    classes = {"num_classes": 10}
    encoder = UViTContextEncoder(**preset["context_encoder"] | classes)
    denoiser = UViTDenoiser(**preset["denoiser"] | classes)
    forward = network_flops(encoder) + context_flops(denoiser) + network_flops(denoiser)
    # Backwards costs twice as much, less what gradients of the images and the noise features would.
    assert 0.9 < pair["training_flops"] / (3 * 4 * 8 * forward) < 1
    assert pair["training_images"] == heavy["training_images"] == 32
    step = equal["training_flops"] / (equal["training_images"] / 8)
    assert abs(equal["training_flops"] - heavy["training_flops"]) <= step / 2

    files = sorted((tmp_path / "work/digits/points").iterdir())
    before = {file: (file.read_text(), file.stat().st_mtime_ns) for file in files}
    files[0].unlink()  # as if the study had been stopped before this one
    assert study.main(args)["points"] == found["points"]
    assert files[0].read_text() == before[files[0]][0]
    assert all(file.stat().st_mtime_ns == before[file][1] for file in files[1:])
    assert "**digits**" in capsys.readouterr().out
    assert (tmp_path / "study.png").stat().st_size > 10_000

    # Elsewhere, from the file alone, but for one point that it lacks: only that point's model is trained.
    fewer = [point for point in found["points"] if point is not equal]
    (tmp_path / "earlier.json").write_text(json.dumps(found | {"points": fewer}))
    args.measured, args.work_dir = str(tmp_path / "earlier.json"), str(tmp_path / "elsewhere")
    assert study.main(args)["points"] == found["points"]
    trained = [path.parent.name for path in Path(args.work_dir).glob("digits/*/model_index.json")]
    assert [name.split("-")[:2] for name in trained] == [["pair", "flops"]]


def test_what_an_earlier_study_measured_differently_is_not_taken_over(tmp_path):
    flags = ["--data", "digits", "--work_dir", str(tmp_path / "work"), "--max_evaluations", "8"]
    args = study.parse_args([*flags, "--num_samples", "20"])
    key = ("digits", "single-rate", "steps", "ddim", 0)
    measured = {file.stem: {"fd": 1.0} for *_, file in study.list_points(args, *key)}
    for other in (["--num_samples", "21"], ["--num_samples", "20", "--max_train_steps", "5"]):
        assert not study.is_measured(study.parse_args([*flags, *other]), key, measured)
    assert not study.is_measured(args, (*key[:-1], 1), measured) and not (tmp_path / "work").exists()
    partly = dict(list(measured.items())[1:])
    assert not study.is_measured(args, key, partly) and len(list(tmp_path.glob("work/digits/points/*"))) == len(partly)
    assert study.is_measured(args, key, measured)
    (tmp_path / "old.json").write_text('{"points": [{"fd": 1.0}]}')
    with pytest.raises(ValueError, match="old.json is of a version whose points had no names: collect it again"):
        study.read_measured(tmp_path / "old.json")


@pytest.mark.slow
def test_students_are_distilled_from_models_of_the_study_whose_training_counts_as_theirs(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.DATA, "digits", networks.DataSet(TINY, None, "digits", {}, {}, num_samples=20))
    ImageClassifier(3, 10).save(tmp_path / "classifiers/digits.safetensors")
    args = study.parse_args(
        ["--data", "digits", "--max_train_steps", "2", "--solvers", "ancestral", "--budgets", "flops"]
        + ["--arms", "single-rate-mmd", "dual-rate-mmd", "--classifiers", str(tmp_path / "classifiers")]
        + ["--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "study.json")]
    )
    single, dual = study.main(args)["points"]
    assert single["evaluations"] == {"denoiser": 8} and dual["evaluations"] == {"denoiser": 8, "context_encoder": 2}
    flops = {
        name: 2 * networks.step_flops(args, "digits", name) for name in ("heavy", "converted", "heavy-mmd", "pair-mmd")
    }
    assert single["training_flops"] == flops["heavy"] + flops["heavy-mmd"]
    assert dual["training_flops"] == flops["heavy"] + flops["converted"] + flops["pair-mmd"]
    # Three networks forward, one of them backward too: five forwards of the heavy network, nearly.
    assert 1.5 < flops["heavy-mmd"] / flops["heavy"] < 1.8
    assert single["training_images"] == 2 * 2 * 8 and dual["training_images"] == 3 * 2 * 8


def test_models_are_trained_once_and_after_all_that_they_start_from():
    args = study.parse_args(["--data", "digits", "--seeds", "0", "1", "--first_seed_only", "dual-rate-mmd", "flops"])
    series = study.list_series(args)
    assert {seed for _, name, _, _, seed in series if name == "dual-rate-mmd"} == {0}
    assert {budget for _, _, budget, _, seed in series if seed == 1} == {"steps"}
    less = study.parse_args(["--data", "digits", "--leave_out", "digits/dual-rate/flops", "digits/feature-reuse"])
    kept = {(name, budget) for _, name, budget, *_ in study.list_series(less)}
    assert ("dual-rate", "steps") in kept and ("dual-rate", "flops") not in kept
    assert ("encoder-sharing", "flops") in kept and "feature-reuse" not in {name for name, _ in kept}
    less = study.parse_args(["--data", "digits", "letters", "--leave_out", "digits/flops"])
    kept = {(data, budget) for data, _, budget, *_ in study.list_series(less)}
    assert kept == {("digits", "steps"), ("letters", "steps"), ("letters", "flops")}
    one = study.parse_args(["--data", "digits", "letters", "--seeds", "0", "1", "--first_seed_only", "letters"])
    assert {data for data, *_, seed in study.list_series(one) if seed == 1} == {"digits"}
    both = ["--data", "digits", "letters", "--seeds", "0", "1", "--first_seed_only", "letters/deepcache"]
    again = {(data, name) for data, name, *_, seed in study.list_series(study.parse_args(both)) if seed == 1}
    assert ("letters", "deepcache") not in again and {("digits", "deepcache"), ("letters", "single-rate")} <= again
    one = study.list_series(study.parse_args(["--seeds", "0", "1", "--first_seed_only", "dual-rate/flops"]))
    again = {(name, budget) for _, name, budget, _, seed in one if seed == 1}
    assert ("dual-rate", "flops") not in again and {("dual-rate", "steps"), ("dual-rate-late", "flops")} <= again
    groups = study.list_models(series)
    models = [model for group in groups for model in group]
    assert len(models) == len(set(models))
    for i, group in enumerate(groups):
        before = {model for earlier in groups[:i] for model in earlier}
        for data, training, _, seed in group:
            starts = networks.TRAININGS[training].starts.values()
            assert before >= {(data, start, "steps", seed) for start in starts}
    wanted = {
        (data, part, budget, seed) for data, name, budget, _, seed in series for part in arms.ARMS[name].trainings
    }
    assert wanted <= set(models)
    alone = study.list_series(study.parse_args(["--data", "letters", "--arms", "stitching"]))
    assert {training for _, training, *_ in study.list_models(alone)[-1]} == {"heavy", "light"}


def test_a_step_that_starts_from_a_model_is_counted_from_that_of_its_own_seed(tmp_path, monkeypatch):
    """Another seed's may have been measured elsewhere, and so not be there."""
    given = []
    monkeypatch.setattr(networks, "run_training", lambda *arguments: given.append(arguments[4:]))
    args = study.parse_args(["--seeds", "0", "1", "--work_dir", str(tmp_path)])
    networks.train_model(args, "digits", "converted", "steps", 1)
    assert len(given) == 3 and all("/heavy-steps-1-" in " ".join(flags) for flags in given)


def test_what_a_distillation_spent_counts_each_training_that_led_to_it_once(monkeypatch):
    chain = {"a": (), "b": ("a",), "c": ("a", "b")}
    trained = {name: SimpleNamespace(starts=dict(enumerate(starts))) for name, starts in chain.items()}
    monkeypatch.setattr(networks, "TRAININGS", trained)
    assert networks.lineage("c") == {"a", "b", "c"} and networks.lineage("a") == {"a"}
