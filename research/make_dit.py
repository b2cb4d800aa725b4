"""A small `DiTPipeline` of diffusers in latents of emoji64: untrained, or with the weights of a finished training.

Between the two, `examples/train_single_rate.py` trains it as it trains any model of diffusers. So it was converted and
distilled:

    python -m research.train_autoencoder --output_dir runs/autoencoder-emoji64 --max_train_steps 5000
    python -m research.make_dit --vae runs/autoencoder-emoji64 --output_dir runs/dit-untrained
    DATA="--preset emoji64 --dataset_name examples/data/emoji64 --label_column label --mixed_precision bf16"
    accelerate launch examples/train_single_rate.py $DATA \\
        --pretrained_model_name_or_path runs/dit-untrained --learning_rate 1e-3 --max_train_steps 3500 \\
        --output_dir runs/dit-run
    python -m research.make_dit --vae runs/autoencoder-emoji64 --transformer runs/dit-run/denoiser \\
        --output_dir runs/dit
    accelerate launch examples/train_dual_rate.py $DATA --pretrained_model_name_or_path runs/dit \\
        --follow_encoder --light auto --max_train_steps 3000 --output_dir runs/dit-pair
    accelerate launch examples/distill.py $DATA --teacher runs/dit --student runs/dit-pair \\
        --max_train_steps 1000 --output_dir runs/dit-student
    accelerate launch examples/distill.py $DATA --teacher runs/dit --student runs/dit \\
        --max_train_steps 1000 --output_dir runs/dit-single-student

It predicts v on the cosine schedule of this package. Blocks start as the identity, as in the paper (arXiv 2212.09748).
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from diffusers_dualrate import DualRateScheduler
from diffusers_dualrate.latents import compression_of

from . import EXAMPLES

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "patch_size": 2}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="Folder of the autoencoder.")
    parser.add_argument("--transformer", type=Path, help="Folder of trained weights; default: new ones.")
    parser.add_argument(
        "--dataset_name", default=str(EXAMPLES / "data" / "emoji64"), help="Whose `label` has classes."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def make_transformer(sample_size, channels, num_classes):
    """An untrained transformer whose blocks and output start at zero."""
    transformer = DiTTransformer2DModel(
        **SHAPE, sample_size=sample_size, in_channels=channels, out_channels=channels, num_embeds_ada_norm=num_classes
    )
    for layer in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def main(args):
    """Saves the pipeline into `args.output_dir`."""
    names = load_dataset(args.dataset_name, split="train").features["label"].names
    vae = AutoencoderKL.from_pretrained(args.vae)
    if args.transformer is None:
        sample_size = vae.config.sample_size // compression_of(vae)
        transformer = make_transformer(sample_size, vae.config.latent_channels, len(names))
    else:
        transformer = DiTTransformer2DModel.from_pretrained(args.transformer)
    schedule = DualRateScheduler()
    scheduler = DDIMScheduler(
        trained_betas=schedule.betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.register_to_config(id2label=dict(enumerate(names)))  # as the published DiT has it
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
