"""Train a Dual-Rate pair: a heavy context encoder and a light denoiser, jointly, on your own images.

    accelerate launch examples/train_dual_rate.py --preset emoji32 --dataset_name examples/data/emoji32 --label_column label --output_dir runs/dualrate-emoji32

A trained single-rate model becomes a pair by `--pretrained_model_name_or_path model` and `--freeze_encoder`, or
`--follow_encoder` where its own predictions are learned from. The result is a folder that
`DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

from pathlib import Path

from diffusers_dualrate.flags import argument_parser


def parse_args(argv=None):
    parser = argument_parser(__doc__, presets=Path(__file__).with_name("presets"))
    parser.add_argument("--context_dropout", type=float, help="Share of each batch that sees no context.")
    parser.add_argument(
        "--context_from",
        type=float,
        help="Time of the first context, 1 being the noisy end: before it the denoiser works alone, and trains cheaply.",
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="Trained model to start from: a pair, or a single-rate model that becomes the encoder.",
    )
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
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, UViTContextEncoder, UViTDenoiser, training
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.losses import denoising_loss, draw, drop_labels, following_loss, seed_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run

# Of the rows that follow the encoder: those at the end of a deterministic step, and of those with a lag even in log-SNR.
FOLLOWING_SHARES = {"deterministic": 0.5, "even_in_log_snr": 0.25}


def make_pair(configuration, start):
    """Both networks, new or those of a trained model, as one module to train."""
    networks, recipe = configuration.networks, configuration.recipe
    context_encoder, denoiser = UViTContextEncoder(**networks.context_encoder), UViTDenoiser(**networks.denoiser)
    if start is not None:
        trained, name = start.context_encoder, configuration.start.pretrained_model_name_or_path
        if trained is None:
            handed_over = context_encoder.config.context_channels, context_encoder.config.prediction_hand_over
            trained = UViTContextEncoder.from_denoiser(start.denoiser, *handed_over)
        else:
            training.take_over(name, denoiser, start.denoiser)
        training.take_over(name, context_encoder, trained)
    if recipe.is_frozen:
        for name, parameter in context_encoder.named_parameters():
            parameter.requires_grad_(name.startswith(("context_heads", "variance")))
    pair = training.TrainablePair(denoiser, context_encoder)
    if configuration.options.gradient_checkpointing:
        pair.enable_gradient_checkpointing()
    pair.train()
    if recipe.is_frozen:
        context_encoder.eval()  # it stays as it is, without dropout
    return pair


def check(configuration):
    """Refuse what only a pair can be wrong in."""
    recipe, networks = configuration.recipe, configuration.networks
    networks.check_pair()
    if recipe.is_frozen and configuration.start.pretrained_model_name_or_path is None:
        flag = "--follow_encoder" if recipe.follow_encoder else "--freeze_encoder"
        raise ValueError(f"{flag} needs a trained model: give --pretrained_model_name_or_path.")
    if recipe.follow_encoder and not networks.denoiser["prediction_hand_over"]:
        raise ValueError("--follow_encoder needs networks with prediction_hand_over=true, and the pair's have false.")


def main(args, open_images=training.open_images):
    configuration = configure(args, "train_dual_rate")
    check(configuration)
    accelerator = training.make_accelerator(configuration.options)
    images = open_images(configuration.data, **configuration.image_options)
    start = training.open_start(configuration.start.pretrained_model_name_or_path, images)
    configuration = configuration.with_classes(images.num_classes)
    recipe = configuration.recipe

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    pair = make_pair(configuration, start)
    averaged = copy.deepcopy(pair).eval()  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        training.make_scheduler(configuration),
        averaged.context_encoder,
        id2label=images.id2label,
        num_inference_steps=configuration.sampling.num_inference_steps,
        num_context_steps=configuration.sampling.num_context_steps,
        context_from=recipe.context_from if recipe.context_from < 1 else None,
        context_free=recipe.share_without_context > 0,
        guidance_scale=configuration.sampling.guidance_scale if images.num_classes else 1.0,
        # Where the context is fresh, a denoiser that follows the encoder would at best repeat it.
        encoder_denoises=recipe.follow_encoder,
    )
    run = Run(accelerator, configuration, pair, images, {"pretrained_model_name_or_path": start})
    return train(run, pair, averaged, pipeline)


def train(run, pair, averaged, pipeline):
    """The loop of a run."""
    accelerator, recipe, seed = run.accelerator, run.recipe, run.options.seed
    optimizer = training.make_optimizer(pair.parameters(), recipe)
    lr_scheduler = training.make_lr_scheduler(optimizer, recipe)
    pair, optimizer, lr_scheduler, loader = accelerator.prepare(pair, optimizer, lr_scheduler, run.make_loader())
    ema = EMAModel(pair.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    run.load(ema)

    schedule = training.schedule_of(pipeline.scheduler)
    late = recipe.share_above
    loss_function, shares = denoising_loss, {"context_dropout": recipe.share_without_context}
    if recipe.follow_encoder:
        loss_function = following_loss
        shares = {name: late + (1 - late) * share for name, share in FOLLOWING_SHARES.items()}

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch["pixel_values"], batch.get("class_labels")
            draws = draw(seed, step, run.rows(part), x.shape[1:], accelerator.device)
            class_labels = drop_labels(class_labels, draws, recipe.label_dropout, run.images.num_classes)
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(pair):
                result = pair(
                    loss_function,
                    x,
                    class_labels,
                    draws,
                    schedule=schedule,
                    bias=recipe.bias,
                    context_ages=recipe.context_ages,
                    encoder_prediction=averaged.denoiser.handed_over_prediction,
                    context_from=1 - late,
                    late=run.share_of_first(part, late),
                    **{name: run.share_of_first(part, share) for name, share in shares.items()},
                )
                accelerator.backward(result.loss)
                run.note(loss=result.loss, v_loss=result.v_loss.mean())
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(pair.parameters(), recipe.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(pair.parameters())
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish("pair")


if __name__ == "__main__":
    run_script(main, ARGS)
