"""Train a single-rate diffusion model: one of a preset's two networks alone, on your own images.

    accelerate launch examples/train_single_rate.py --preset emoji32 --dataset_name examples/data/emoji32 --label_column label --output_dir runs/single-rate-emoji32

With the heavy network this is the baseline, and later the teacher, of a Dual-Rate pair of the same preset. The result
is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers_dualrate.flags import VAE, add_text_flag, argument_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, presets=Path(__file__).with_name("presets"))
    parser.add_argument(
        "--pretrained_model_name_or_path", help="Trained single-rate model to start from, or one of diffusers."
    )
    parser.add_argument("--vae", help=VAE)
    parser.add_argument(
        "--network",
        choices=["heavy", "light"],
        default="heavy",
        help="Shape of the preset's encoder, or its denoiser.",
    )
    add_text_flag(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy
from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, UViTDenoiser
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.configuration import Configuration
from diffusers_dualrate.conversion import follow_host, host_of
from diffusers_dualrate.losses import Draws, denoising_loss, draw, drop_condition, seed_of
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.optimization import make_accelerator, make_lr_scheduler, make_optimizer
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run
from diffusers_dualrate.sources import check_start, components_of, open_captions, open_images, open_start, take_over


def make_networks(configuration: Configuration, start: DualRatePipeline | None) -> TrainablePair:
    """One network, new or that of a trained model, as a module to train."""
    if start is not None and host_of(start) is not None:
        denoiser = start.denoiser
    else:
        shapes, name = configuration.networks, configuration.start.pretrained_model_name_or_path
        shape = shapes.context_encoder if configuration.start.network == "heavy" else shapes.denoiser
        denoiser = UViTDenoiser(**{**shape, **SINGLE_RATE})
        if start is not None:
            take_over(name, denoiser, start.denoiser)
    networks = TrainablePair(denoiser)
    if configuration.options.gradient_checkpointing:
        networks.enable_gradient_checkpointing()
    return networks.train()


def main(args: argparse.Namespace, open_images: Callable = open_images) -> int:
    configuration = configure(args, "train_single_rate")
    accelerator = make_accelerator(configuration.options)
    name = configuration.start.pretrained_model_name_or_path
    start = open_start(name)
    if start is not None and start.context_encoder is not None:
        raise ValueError(f"{name} must be a single-rate model, but it is a pair.")
    configuration = follow_host(configuration, start, args, accelerator.print, as_pair=False)
    images = open_images(configuration.data, **configuration.image_options)
    check_start(name, start, images)
    captions = open_captions(configuration, images, start)
    configuration = configuration.with_conditions(images.num_classes, captions)
    sampling = configuration.sampling

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    networks = make_networks(configuration, start)
    averaged = copy.deepcopy(networks).eval()  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        configuration.make_scheduler(),
        vae=images.vae,
        id2label=images.id2label or (start.id2label if start else None),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale if images.num_classes or captions else 1.0,
        **components_of(captions),
    )
    run = Run(accelerator, configuration, networks, images, {"pretrained_model_name_or_path": start}, captions)
    return train(run, networks, averaged, pipeline)


def train(run: Run, networks: TrainablePair, averaged: TrainablePair, pipeline: DualRatePipeline) -> int:
    """The loop of a run."""
    accelerator, recipe, seed = run.accelerator, run.recipe, run.options.seed
    optimizer = make_optimizer(networks.parameters(), recipe)
    lr_scheduler = make_lr_scheduler(optimizer, recipe)
    networks, optimizer, lr_scheduler, loader = accelerator.prepare(
        networks, optimizer, lr_scheduler, run.make_loader()
    )
    ema = EMAModel(networks.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    run.load(ema, optimizer)

    schedule = schedule_of(pipeline.scheduler, recipe.bias)

    def draw_rows(step: int, rows: Sequence[int]) -> Draws:
        return draw(seed, step, rows, run.images.sample_shape, accelerator.device)

    with run.watch(ema, averaged, pipeline):
        for step, part, batch, draws in run.batches(loader, draw_rows):
            x, condition = batch["pixel_values"], run.conditions.of(batch)
            condition = drop_condition(condition, draws, recipe.label_dropout, run.conditions.null)
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(networks):
                result = networks(denoising_loss, x, condition, draws, schedule=schedule)
                accelerator.backward(result.loss)
                run.note(loss=result.loss, v_loss=result.v_loss.mean())
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(networks.parameters(), recipe.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(networks.parameters())
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish(run.configuration.start.network)


if __name__ == "__main__":
    run_script(main, ARGS)
