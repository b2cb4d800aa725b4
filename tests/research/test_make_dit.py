"""Tests of the small DiT pipeline in latents of emoji64."""

import torch
from diffusers import DiTPipeline

from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from research import make_dit
from research.train_autoencoder import make_autoencoder


def test_a_dit_pipeline_is_made_untrained_and_of_trained_weights_and_is_one_of_ours(tmp_path):
    make_autoencoder(64, (8, 8, 8), 2).save_pretrained(tmp_path / "vae")
    flags = ["--vae", str(tmp_path / "vae"), "--output_dir"]
    make_dit.main(make_dit.parse_args([*flags, str(tmp_path / "new")]))
    theirs, ours = DiTPipeline.from_pretrained(tmp_path / "new"), DualRatePipeline.from_pretrained(tmp_path / "new")
    assert len(ours.id2label) == ours.denoiser.config.num_classes == 97 and theirs.labels["food-fruit"] == 40
    blocks = theirs.transformer.transformer_blocks
    assert len(blocks) == 6 and not any(block.norm1.linear.weight.any() for block in blocks)  # each the identity
    noise = torch.randn(2, 2, 16, 16)
    assert not ours.denoiser(noise, 0.0, torch.tensor([1, 97])).sample.any()  # nothing was learned
    torch.testing.assert_close(
        theirs.scheduler.alphas_cumprod, DualRateScheduler().alphas_cumprod, check_dtype=False, rtol=1e-3, atol=1e-6
    )

    torch.nn.init.ones_(theirs.transformer.proj_out_2.bias)
    theirs.transformer.save_pretrained(tmp_path / "trained")
    make_dit.main(make_dit.parse_args([*flags, str(tmp_path / "done"), "--transformer", str(tmp_path / "trained")]))
    done = DualRatePipeline.from_pretrained(tmp_path / "done")
    torch.testing.assert_close(done.denoiser(noise, 0.0, torch.tensor([1, 97])).sample, torch.ones_like(noise))
