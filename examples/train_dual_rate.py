"""Train a Dual-Rate pair: a heavy context encoder and a light denoiser, jointly, on your own images.

    accelerate launch examples/train_dual_rate.py --preset emoji32 --dataset_name examples/data/emoji32 --label_column label --output_dir runs/dualrate-emoji32

A trained single-rate model becomes a pair by `--pretrained_model_name_or_path model` and `--freeze_encoder`, or
`--follow_encoder` where its own predictions are learned from. The result is a folder that
`DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers_dualrate.flags import VAE, add_light_flag, add_text_flag, argument_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, presets=Path(__file__).with_name("presets"))
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="Trained model to start from: a pair, or a single-rate model or one of diffusers that becomes the encoder.",
    )
    parser.add_argument("--vae", help=VAE)
    add_light_flag(parser)
    parser.add_argument(
        "--freeze_encoder",
        action="store_true",
        default=None,
        help="Train what the encoder hands over, but not what it has learned.",
    )
    parser.add_argument(
        "--follow_encoder",
        action="store_true",
        default=None,
        help="Freeze it, and learn what it would predict (the reported v_loss is the distance from that), along the "
        "steps of the ancestral chain and of deterministic solvers.",
    )
    parser.add_argument(
        "--context_from",
        type=float,
        help="Time of the first context, 1 being the noisy end: before it the denoiser works alone, and trains cheaply.",
    )
    parser.add_argument("--context_dropout", type=float, help="Share of each batch that sees no context.")
    add_text_flag(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy
from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.configuration import Configuration
from diffusers_dualrate.conversion import follow_host, host_of, learning_parameters, make_encoder
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.losses import (
    ContextTimes,
    Draws,
    FollowingTimes,
    denoising_loss,
    draw,
    drop_condition,
    following_loss,
    seed_of,
)
from diffusers_dualrate.optimization import make_accelerator, make_lr_scheduler, make_optimizer
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run
from diffusers_dualrate.sources import check_start, components_of, open_captions, open_images, open_start, take_over
from diffusers_dualrate.steps import plan_steps

# Of the rows that follow the encoder: the share whose z_t is a DDIM step from z_τ, and the share even in log-SNR.
FOLLOWING_SHARES = {"num_deterministic": 0.5, "num_even_in_log_snr": 0.25}


def check(configuration: Configuration) -> None:
    """Refuse what only a pair can be wrong in."""
    recipe, shapes = configuration.recipe, configuration.networks
    shapes.check_pair()
    if recipe.is_frozen and configuration.start.pretrained_model_name_or_path is None:
        flag = "--follow_encoder" if recipe.follow_encoder else "--freeze_encoder"
        raise ValueError(f"{flag} needs a trained model: give --pretrained_model_name_or_path.")
    if recipe.follow_encoder and not shapes.denoiser["prediction_hand_over"]:
        raise ValueError("--follow_encoder needs networks with prediction_hand_over=true, and the pair's have false.")
    plan_steps(configuration.make_scheduler(), SamplingDefaults(**plan_of(configuration)))  # there is such a plan


def plan_of(configuration: Configuration) -> dict:
    """The plan that the model samples by where a call names none."""
    recipe, sampling = configuration.recipe, configuration.sampling
    return {
        "num_inference_steps": sampling.num_inference_steps,
        "num_context_steps": sampling.num_context_steps,
        "context_from": recipe.first_context,
        "context_free": recipe.share_without_context > 0,
    }


def keep_first_context(configuration: Configuration, start: DualRatePipeline | None, tell: Callable) -> Configuration:
    """A pair that is trained further keeps the time of its first context, unless a flag gives another."""
    known = None if start is None or start.context_encoder is None else start.config.context_from
    if known is None:
        return configuration
    tell(f"context_from: {known}, as the pair has it that is trained further; --context_from 1 ends it")
    return configuration.with_recipe(context_from=known)


def make_networks(configuration: Configuration, start: DualRatePipeline | None) -> TrainablePair:
    """Both networks, new or those of a trained model, as one module to train."""
    shapes, recipe = configuration.networks, configuration.recipe
    is_of_host = host_of(start) is not None
    context_encoder = None if is_of_host else UViTContextEncoder(**shapes.context_encoder)
    denoiser = UViTDenoiser(**shapes.denoiser)
    if start is not None:
        trained, name = start.context_encoder, configuration.start.pretrained_model_name_or_path
        if trained is None:
            trained = make_encoder(start.denoiser, shapes.context_encoder)
        else:
            take_over(name, denoiser, start.denoiser)
        if is_of_host:
            context_encoder = trained
        else:
            take_over(name, context_encoder, trained)
        if recipe.is_frozen:  # so the model that is saved may name it
            context_encoder.origin = trained.origin
    learning = learning_parameters(context_encoder, is_frozen=recipe.is_frozen)
    for name, parameter in context_encoder.named_parameters():
        parameter.requires_grad_(name in learning)
    networks = TrainablePair(denoiser, context_encoder)
    if configuration.options.gradient_checkpointing:
        networks.enable_gradient_checkpointing()
    networks.train()
    if recipe.is_frozen:
        context_encoder.eval()  # it stays as it is, without dropout
    return networks


def context_times(run: Run, part: int) -> ContextTimes:
    """Which rows of a part of a batch see a context, and how old it is."""
    recipe, above = run.recipe, run.recipe.share_above
    shares = {"num_above": above, "num_without": recipe.share_without_context}
    if recipe.follow_encoder:
        shares |= {name: above + (1 - above) * share for name, share in FOLLOWING_SHARES.items()}
    counts = {name: run.count_of_first(part, share) for name, share in shares.items()}
    times = FollowingTimes if recipe.follow_encoder else ContextTimes
    return times(recipe.context_ages, 1 - above, **counts)


def main(args: argparse.Namespace, open_images: Callable = open_images) -> int:
    configuration = configure(args, "train_dual_rate")
    accelerator = make_accelerator(configuration.options)
    name = configuration.start.pretrained_model_name_or_path
    start = open_start(name)
    configuration = follow_host(configuration, start, args, accelerator.print, as_pair=True)
    if args.context_from is None:
        configuration = keep_first_context(configuration, start, accelerator.print)
    check(configuration)
    images = open_images(configuration.data, **configuration.image_options)
    check_start(name, start, images)
    captions = open_captions(configuration, images, start)
    configuration = configuration.with_conditions(images.num_classes, captions)
    recipe, sampling = configuration.recipe, configuration.sampling

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    networks = make_networks(configuration, start)
    averaged = copy.deepcopy(networks).eval()  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        configuration.make_scheduler(),
        averaged.context_encoder,
        vae=images.vae,
        id2label=images.id2label or (start.id2label if start else None),
        **plan_of(configuration),
        guidance_scale=sampling.guidance_scale if images.num_classes or captions else 1.0,
        **components_of(captions),
        # Where the context is fresh, a denoiser that follows the encoder would at best repeat it.
        encoder_denoises=recipe.follow_encoder,
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
    loss_function = following_loss if recipe.follow_encoder else denoising_loss
    contexts = [context_times(run, part) for part in range(accelerator.gradient_accumulation_steps)]

    def draw_rows(step: int, rows: Sequence[int]) -> Draws:
        return draw(seed, step, rows, run.images.sample_shape, accelerator.device)

    with run.watch(ema, averaged, pipeline):
        for step, part, batch, draws in run.batches(loader, draw_rows):
            x, condition = batch["pixel_values"], run.conditions.of(batch)
            condition = drop_condition(condition, draws, recipe.label_dropout, run.conditions.null)
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(networks):
                result = networks(loss_function, x, condition, draws, schedule=schedule, contexts=contexts[part])
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
        return run.finish("pair")


if __name__ == "__main__":
    run_script(main, ARGS)
