"""Train a small `AutoencoderKL` of diffusers on images of 64 pixels, a latent for each 4x4 of them.

    python -m research.train_autoencoder --dataset_name examples/data/emoji64 --output_dir runs/autoencoder-emoji64

The loss is the mean absolute error plus a little of the divergence from a standard normal. Averaged weights are saved,
with the scale and shift that give latents of the training images mean 0 and variance 1; images are on white. The
reconstruction error on both splits is printed and written beside them. About half an hour on an idle CPU core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from diffusers_dualrate.augmentation import Augmentation

from . import EXAMPLES

# Zooming and shifting teach it every phase of an edge; what is encoded later is not augmented.
AUGMENTATION = Augmentation(translation=3, scale=(0.9, 1.1), flip=True)
WARMUP_STEPS = 100


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default=str(EXAMPLES / "data" / "emoji64"))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--kl_weight", type=float, default=1e-5)
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16", help="bf16 is 1.7 times faster.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_autoencoder(size, block_out_channels, latent_channels):
    """An untrained autoencoder; without attention, whose cost grows with the square of an image."""
    levels = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def read_pixels(dataset_name, split):
    """Premultiplied colours and alpha of a split's images, uint8 [N, H, W, 4]."""
    images = load_dataset(dataset_name, split=split)["image"]
    return np.stack([np.asarray(image.convert("RGBa")) for image in images])


def augment(pixels, augmentation, generator):
    """Images [B, 3, H, W] in [-1, 1] as augmented."""
    return torch.stack([torch.from_numpy(augmentation.apply(image, generator)) for image in pixels])


def reconstruction_loss(autoencoder, x, kl_weight, generator):
    """Mean absolute error of x [B, C, H, W] decoded from a draw of its latents, plus weighted divergence a pixel."""
    posterior = autoencoder.encode(x).latent_dist
    decoded = autoencoder.decode(posterior.sample(generator)).sample
    return (decoded.float() - x).abs().mean() + kl_weight * posterior.kl().float().mean() / x[0].numel()


def signal_to_noise(x, decoded):
    """Peak signal-to-noise ratio of each image [B] in decibels, for values in [-1, 1]."""
    error = (decoded.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


@torch.no_grad()
def measure(autoencoder, images, batch_size=64):
    """Mean peak signal-to-noise ratio of the images, decoded from the means of their latents."""
    parts = images.split(batch_size)
    ratios = [signal_to_noise(x, autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample) for x in parts]
    return torch.cat(ratios).mean().item()


@torch.no_grad()
def standardize(autoencoder, images, batch_size=64):
    """Writes the scale and shift of its latents into the autoencoder's configuration."""
    latents = torch.cat([autoencoder.encode(x).latent_dist.mode() for x in images.split(batch_size)])
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def main(args):
    """Trains the autoencoder and saves it into `args.output_dir`."""
    pixels = {split: read_pixels(args.dataset_name, split) for split in ("train", "test")}
    torch.manual_seed(args.seed)
    autoencoder = make_autoencoder(pixels["train"].shape[1], args.block_out_channels, args.latent_channels)
    print(f"{sum(parameter.numel() for parameter in autoencoder.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(autoencoder.parameters(), args.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, args.max_train_steps)
    averaged = EMAModel(autoencoder.parameters(), decay=0.998, use_ema_warmup=True)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(1, args.max_train_steps + 1), unit="step", mininterval=10)
    for step in progress:
        x = augment(pixels["train"][rng.integers(len(pixels["train"]), size=args.train_batch_size)], AUGMENTATION, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            loss = reconstruction_loss(autoencoder, x, args.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        averaged.step(autoencoder.parameters())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    averaged.copy_to(autoencoder.parameters())
    autoencoder.eval()
    images = {split: augment(part, Augmentation(), rng) for split, part in pixels.items()}
    standardize(autoencoder, images["train"])
    facts = {split: {"images": len(part), "psnr": measure(autoencoder, part)} for split, part in images.items()}
    print(facts)
    autoencoder.save_pretrained(args.output_dir)
    recipe = {name: value for name, value in vars(args).items() if name not in ("dataset_name", "output_dir")}
    (args.output_dir / "training.json").write_text(json.dumps(facts | {"recipe": recipe}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
