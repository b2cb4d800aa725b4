"""A network of diffusers that takes text as the heavy network of a training: tuned, followed, taught from."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image

import distill
import train_dual_rate
import train_single_rate
from conftest import make_text_encoder, make_tokenizer, reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, NoiseProcess
from test_text_hosts import make_theirs

CAPTIONS = ["a red apple", "two green fish", "a blue bird"]
START, FOLLOW = "--pretrained_model_name_or_path", ("--follow_encoder", "--context_dropout", "0", "--light", "auto")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pipelines of diffusers, and images with captions."""
    root = tmp_path_factory.mktemp("hosts")
    for name in ("stable diffusion", "pixart alpha"):
        make_theirs(name).save_pretrained(root / name.split()[0])
    (root / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % 3]}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(rows))
    return root


def train(module, root, name, *more, captions=True):
    flags = ["--preset", "tiny", "--train_data_dir", str(root / "images"), "--cache_dir", str(root / "cache")]
    flags += ["--output_dir", str(root / name), "--validation_steps", "0", "--max_train_steps", "2"]
    flags += ["--caption_column", "text"] if captions else []
    reset_accelerate()
    assert module.main(module.parse_args([*flags, *map(str, more)])) == 0
    return DualRatePipeline.from_pretrained(root / name)


def draw(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images


def test_stable_diffusion_becomes_a_pair_and_teaches_it_as_it_is(root):
    pair = train(train_dual_rate, root, "pair", START, root / "stable", *FOLLOW, "--guidance_scale", 2)
    before = UNet2DConditionModel.from_pretrained(root / "stable/unet").state_dict()
    own = UNet2DConditionModel.from_pretrained(root / "pair/context_encoder").state_dict()
    assert before.keys() == own.keys() and all(torch.equal(before[name], own[name]) for name in own)
    light, heavy = pair.denoiser.config, pair.context_encoder.config
    assert light.cross_attention_dim == heavy.cross_attention_dim == 8 and light.text_length == 6
    assert not light.text_is_masked and pair.config.encoder_denoises and pair.config.guidance_scale == 2
    assert any(kinds == "transformer" for kinds in light.level_types)  # where the heavy network attends, it does
    assert not torch.equal(draw(pair, CAPTIONS[0]), draw(pair, CAPTIONS[1]))
    told = json.loads((root / "pair/configuration.json").read_text())
    assert told["training"]["label_dropout"] > 0 and told["context_encoder"]["network"]["cross_attention_dim"] == 8

    student = train(distill, root, "student", "--teacher", root / "stable", "--student", root / "pair")
    weights = student.context_encoder.network.state_dict()
    assert any(not torch.equal(before[name], weights[name]) for name in before)
    assert student.config.num_inference_steps == 4 and draw(student, CAPTIONS[0]).isfinite().all()


def test_pixart_is_tuned_and_distilled_alone_by_texts_as_it_learned_them(root):
    tuned = train(train_single_rate, root, "tuned", START, root / "pixart", "--learning_rate", 1e-4)
    assert isinstance(tuned.denoiser, HostNetwork) and tuned.denoiser.config.text_is_lowered
    before = DualRatePipeline.from_pretrained(root / "pixart").denoiser.state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in tuned.denoiser.state_dict().items())
    assert torch.equal(draw(tuned, "A Red Apple "), draw(tuned, "a red apple"))
    student = train(distill, root, "alone", "--teacher", root / "pixart", "--student", root / "pixart")
    assert student.context_encoder is None and draw(student, CAPTIONS[0]).isfinite().all()


def test_a_network_of_text_learns_from_captions_only(root):
    with pytest.raises(ValueError, match="takes text, and the data has no captions: see --caption_column"):
        train(train_single_rate, root, "bare", START, root / "stable", captions=False)
    with pytest.raises(ValueError, match="are two text encoders: give one of them"):
        train(train_single_rate, root, "bare", START, root / "stable", "--text_encoder", root / "stable")
    assert not (root / "bare").exists()


def test_a_network_that_takes_pooled_embeddings_is_sampled_only(root):
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "caption_projection_dim": 8}
    widths = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "out_channels": 4, "pos_embed_max_size": 8}
    network = SD3Transformer2DModel(**shape, **widths, num_attention_heads=2, attention_head_dim=4)
    host = HostNetwork(network, NoiseProcess.of(FlowMatchEulerDiscreteScheduler()))
    parts = {"text_encoder": make_text_encoder(), "tokenizer": make_tokenizer(), "num_inference_steps": 2}
    DualRatePipeline(host, DualRateScheduler(), **parts).save_pretrained(root / "sd3")
    with pytest.raises(ValueError, match="takes texts with pooled embeddings, which captions here have none of"):
        train(train_single_rate, root, "bare", START, root / "sd3")
    assert not (root / "bare").exists()
