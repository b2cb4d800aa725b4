"""The blocks of Modular Diffusers give what the pipeline gives, from a folder and from the Hub."""

import json
import subprocess
import sys

import pytest
import torch

from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from diffusers_dualrate.modular import DualRateBlocks
from loopback_hub import LoopbackHub


def generator():
    return torch.Generator().manual_seed(0)


def load(folder):
    modular = DualRateBlocks().init_pipeline(str(folder))
    modular.load_components()
    return modular


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 6, "num_context_steps": 3, "guidance_scale": 3.0, "guidance_interval": (-4.0, 4.0)},
        {"timesteps": [1000.0, 600.0, 100.0], "refresh_steps": [0, 2], "guidance_scale": 1.0},
    ],
)
def test_the_blocks_give_the_latents_of_the_pipeline(make_pipe, tmp_path, options):
    names = {0: "cat", 1: "dog"}
    pipe = make_pipe(id2label=names, num_inference_steps=4, num_context_steps=2, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    expected = pipe(["dog", 3], generator=generator(), output_type="latent", **options).images
    latents = load(tmp_path)(class_labels=["dog", 3], generator=generator(), output="latents", **options)
    assert torch.equal(latents, expected)


def test_a_pair_whose_encoder_denoises_runs_in_the_same_blocks(make_networks, tmp_path):
    encoder, denoiser = make_networks(num_classes=4, prediction_hand_over=True)
    defaults = {"num_inference_steps": 4, "num_context_steps": 2, "encoder_denoises": True}
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, **defaults)
    pipe.save_pretrained(tmp_path)
    expected = pipe([0], generator=generator(), output_type="latent").images
    assert torch.equal(load(tmp_path)(class_labels=[0], generator=generator(), output="latents"), expected)


def test_a_single_rate_model_runs_in_the_same_blocks(make_pipe, tmp_path):
    pipe = make_pipe(single_rate=True, num_inference_steps=3)
    pipe.save_pretrained(tmp_path)
    expected = pipe([0], generator=generator(), output_type="latent").images
    assert torch.equal(load(tmp_path)(class_labels=[0], generator=generator(), output="latents"), expected)


def test_images_are_decoded_as_asked(make_pipe, tmp_path):
    make_pipe(num_inference_steps=2).save_pretrained(tmp_path)
    modular = load(tmp_path)
    assert modular(class_labels=[0, 1], output="images")[0].size == (8, 8)
    tensor = modular(class_labels=[0, 1], output_type="pt", output="images")
    assert tensor.shape == (2, 3, 8, 8) and 0 <= tensor.min() and tensor.max() <= 1


def test_a_bad_argument_is_refused_as_by_the_pipeline(make_pipe, tmp_path):
    make_pipe(num_inference_steps=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0\.\.3, got 9"):
        load(tmp_path)(class_labels=[9])


FROM_THE_HUB = """
import json, torch
from diffusers_dualrate.modular import DualRateBlocks

modular = DualRateBlocks().init_pipeline("org/tiny")
modular.load_components()
modular.set_progress_bar_config(disable=True)
latents = modular(class_labels=[1], generator=torch.Generator().manual_seed(0), output="latents")
print(json.dumps(latents.flatten().tolist()))
"""


def test_the_blocks_load_from_the_hub(make_pipe, tmp_path):
    pipe = make_pipe(num_inference_steps=2)
    pipe.save_pretrained(tmp_path / "tiny")
    expected = pipe([1], generator=generator(), output_type="latent").images.flatten()
    with LoopbackHub() as hub:
        hub.add_repo("org/tiny", tmp_path / "tiny")
        environment = hub.environment(tmp_path / "cache")
        command = [sys.executable, "-c", FROM_THE_HUB]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)
