"""Pipelines of diffusers whose scheduler, weights or shape need care: each is drawn, or says in a sentence why not."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
)

import evaluate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, NoiseProcess
from diffusers_dualrate.class_labels import find_label_ids
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.noise_process import NOISE_ALONE
from diffusers_dualrate.sampling_settings import SamplingSetting
from diffusers_dualrate.steps import make_dpm_solver, plan_steps
from test_hosts import generator, make_dit, make_unet, make_vae


@pytest.mark.parametrize("kind", ["zero signal", "flow", "learned variance", "clipped latents"])
def test_pipelines_whose_own_scheduler_needs_care_are_drawn(kind, tmp_path):
    process = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = {
        "zero signal": lambda: DDIMPipeline(make_unet(), DDIMScheduler(**process)),
        "flow": lambda: DDPMPipeline(make_unet(), FlowMatchEulerDiscreteScheduler()),
        "learned variance": lambda: DDPMPipeline(
            make_unet(out_channels=6), DDPMScheduler(variance_type="learned_range")
        ),
        "clipped latents": lambda: DiTPipeline(make_dit(out_channels=4), make_vae(), DDIMScheduler()),
    }[kind]()
    theirs.save_pretrained(tmp_path)
    said = {
        "flow": "was trained as a flow, and is sampled by DualRateScheduler",
        "clipped latents": "would clip latents",
    }
    with pytest.warns(UserWarning, match=said[kind]) if kind in said else contextlib.nullcontext() as warned:
        ours = DualRatePipeline.from_pretrained(tmp_path)
    assert all(Path(warning.filename) == Path(__file__) for warning in warned or ())
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    asked = {} if ours.denoiser.config.num_classes is None else {"class_labels": 1, "guidance_scale": 1.0}
    drawn = ours(num_inference_steps=5, generator=generator(), output_type="np", **asked).images
    assert np.isfinite(drawn).all()
    if kind == "zero signal":
        expected = theirs(num_inference_steps=5, generator=generator(), output_type="np").images
        np.testing.assert_allclose(drawn, expected, atol=1e-5)
        steps = plan_steps(ours.scheduler, SamplingDefaults.of(ours.config), 5, is_pair=False)
        assert steps.log_snrs[0] == NOISE_ALONE < steps.log_snrs[1]  # a number, as the network's own process has it
        with pytest.raises(ValueError, match="no steps for a process that ends in noise alone"):
            make_dpm_solver(ours.scheduler)
    if kind == "clipped latents":  # its own pipeline without that draws the same
        theirs.scheduler = DDIMScheduler(clip_sample=False)
        expected = theirs(
            [1], num_inference_steps=5, guidance_scale=1.0, generator=generator(), output_type="np"
        ).images
        np.testing.assert_allclose(drawn, expected, atol=1e-4)
        with pytest.raises(
            ValueError, match="DiTTransformer2DModel of diffusers draws squares only, got height 16 and width"
        ):
            ours(1, height=16, width=32, num_inference_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "time_embedding_type='learned' has no timesteps between"),
        ({"sample_size": None}, "UNet2DModel has no sample_size in its configuration"),
    ],
)  # fmt: skip
def test_u_nets_that_cannot_be_called_as_ours_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HostNetwork(make_unet(**options), NoiseProcess())


def test_pickled_weights_of_a_pipeline_of_diffusers_are_named_with_a_way_out(tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="has no safetensors weights: load it by diffusers, and save it anew"):
        DualRatePipeline.from_pretrained(tmp_path)


def test_what_one_network_cannot_be_asked_is_said_before_anything_is_measured(make_pipe):
    pipe = DualRatePipeline(HostNetwork(make_unet(num_class_embeds=2), NoiseProcess()), DualRateScheduler())
    called = {"num_inference_steps": 4, "num_context_steps": None, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs networks that learned to go without a class"):
        SamplingSetting.plan(pipe, "ancestral", called)
    ours = make_pipe(single_rate=True)
    process = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ours.scheduler = DDIMScheduler(prediction_type="v_prediction", **process)
    with pytest.raises(ValueError, match="DDIMScheduler has a step without any signal"):
        SamplingSetting.plan(ours, "ancestral", called)
    args = SimpleNamespace(num_inference_steps=4, num_context_steps=2, guidance_scale=None, model="X")
    with pytest.raises(ValueError, match="--num_context_steps 2 is for a pair, and X is one network: leave it out"):
        evaluate.choose_steps(args, pipe)


def test_each_word_of_a_class_that_has_several_names_it_and_a_whole_name_comes_first():
    names = {0: "goldfish, Carassius auratus", 1: "tench", 2: "carp, tench"}
    assert find_label_ids(["goldfish", "Carassius auratus", "tench", "carp"], 3, names) == [0, 0, 1, 2]
