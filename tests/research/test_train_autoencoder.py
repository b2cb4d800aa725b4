"""Tests of the training of an autoencoder for emoji64."""

import pytest
import torch

from research.train_autoencoder import make_autoencoder, reconstruction_loss, signal_to_noise, standardize


def test_an_error_of_a_tenth_of_the_range_is_twenty_decibels():
    x = torch.zeros(2, 3, 4, 4)
    decoded = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 7.0)])
    # What is decoded beyond white counts as white: half of the range is 6 dB.
    assert signal_to_noise(x, decoded).tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)


def test_standardized_latents_have_mean_0_and_variance_1_and_the_loss_falls_with_its_weight():
    autoencoder, x = make_autoencoder(16, [8, 8, 8], 4), torch.rand(3, 3, 16, 16)
    standardize(autoencoder, x, batch_size=2)
    assert autoencoder.encode(x).latent_dist.mean.shape == (3, 4, 4, 4)
    latents = autoencoder.encode(x).latent_dist.mean - autoencoder.config.shift_factor
    latents = latents * autoencoder.config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=1e-5) and latents.std().item() == pytest.approx(1, rel=1e-5)
    plain, weighted = (
        reconstruction_loss(autoencoder, x, weight, torch.Generator().manual_seed(0)) for weight in (0.0, 2.0)
    )
    divergence = autoencoder.encode(x).latent_dist.kl().mean() / (3 * 16 * 16)
    torch.testing.assert_close(weighted - plain, 2 * divergence)
