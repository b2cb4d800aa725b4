"""Train a single-rate diffusion model: one of a preset's two networks alone, on your own images.

    accelerate launch examples/train_single_rate.py --preset emoji32 --dataset_name examples/data/emoji32 --label_column label --output_dir runs/single-rate-emoji32

With the heavy network this is the baseline, and later the teacher, of a Dual-Rate pair of the same preset. The result
is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

from pathlib import Path

from diffusers_dualrate.flags import argument_parser


def parse_args(argv=None):
    parser = argument_parser(__doc__, presets=Path(__file__).with_name("presets"))
    parser.add_argument(
        "--network",
        choices=["heavy", "light"],
        default="heavy",
        help="Shape of the preset's encoder, or its denoiser.",
    )
    parser.add_argument("--pretrained_model_name_or_path", help="Trained single-rate model to start from.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, UViTDenoiser, training
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.losses import denoising_loss, draw, drop_labels, seed_of
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run


def make_network(configuration, start):
    """One network, new or that of a trained model, as a module to train."""
    networks, name = configuration.networks, configuration.start.pretrained_model_name_or_path
    shape = networks.context_encoder if configuration.start.network == "heavy" else networks.denoiser
    denoiser = UViTDenoiser(**{**shape, **SINGLE_RATE})
    if start is not None:
        if start.context_encoder is not None:
            raise ValueError(f"{name} must be a single-rate model, but it is a pair.")
        training.take_over(name, denoiser, start.denoiser)
    network = training.TrainablePair(denoiser)
    if configuration.options.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def main(args, open_images=training.open_images):
    configuration = configure(args, "train_single_rate")
    accelerator = training.make_accelerator(configuration.options)
    images = open_images(configuration.data, **configuration.image_options)
    start = training.open_start(configuration.start.pretrained_model_name_or_path, images)
    configuration = configuration.with_classes(images.num_classes)

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    network = make_network(configuration, start)
    averaged = copy.deepcopy(network).eval()  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        training.make_scheduler(configuration),
        id2label=images.id2label,
        num_inference_steps=configuration.sampling.num_inference_steps,
        guidance_scale=configuration.sampling.guidance_scale if images.num_classes else 1.0,
    )
    run = Run(accelerator, configuration, network, images, {"pretrained_model_name_or_path": start})
    return train(run, network, averaged, pipeline)


def train(run, network, averaged, pipeline):
    """The loop of a run."""
    accelerator, recipe, seed = run.accelerator, run.recipe, run.options.seed
    optimizer = training.make_optimizer(network.parameters(), recipe)
    lr_scheduler = training.make_lr_scheduler(optimizer, recipe)
    network, optimizer, lr_scheduler, loader = accelerator.prepare(network, optimizer, lr_scheduler, run.make_loader())
    ema = EMAModel(network.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    run.load(ema)

    schedule = training.schedule_of(pipeline.scheduler)

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch["pixel_values"], batch.get("class_labels")
            draws = draw(seed, step, run.rows(part), x.shape[1:], accelerator.device)
            class_labels = drop_labels(class_labels, draws, recipe.label_dropout, run.images.num_classes)
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(network):
                result = network(
                    denoising_loss,
                    x,
                    class_labels,
                    draws,
                    schedule=schedule,
                    bias=recipe.bias,
                )
                accelerator.backward(result.loss)
                run.note(loss=result.loss, v_loss=result.v_loss.mean())
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(network.parameters(), recipe.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(network.parameters())
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish(run.configuration.start.network)


if __name__ == "__main__":
    run_script(main, ARGS)
