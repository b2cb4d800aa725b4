"""Train a Dual-Rate pair: a heavy context encoder and a light denoiser, jointly, on your own images.

    accelerate launch examples/train_dual_rate.py --preset examples/presets/emoji32.json \\
        --dataset_name examples/data/emoji32 --label_column label --output_dir runs/dualrate-emoji32

A trained single-rate model becomes a pair by `--pretrained_model_name_or_path model` and `--freeze_encoder`, or
`--follow_encoder` where its own predictions are learned from. The result is a folder that
`DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, training
from diffusers_dualrate.losses import denoising_loss, draw, following_loss, seed_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run


def parse_args(argv=None):
    parser = training.argument_parser(__doc__)
    parser.add_argument("--context_dropout", type=float, help="Share of each batch that sees no context.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="Trained model to start from: a pair, or a single-rate model that becomes the encoder.",
    )
    parser.add_argument(
        "--freeze_encoder", action="store_true", help="Train what the encoder hands over, but not what it has learned."
    )
    parser.add_argument(
        "--follow_encoder",
        action="store_true",
        help="Freeze it, and learn what it would predict (the reported v_loss is the distance from that), along the "
        "steps of the ancestral chain and of deterministic solvers.",
    )
    return parser.parse_args(argv)


def main(args):
    preset = training.read_preset(args)
    recipe = preset["training"]
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,  # else the schedule would depend on the number of processes
    )
    images = training.open_images(args, preset)

    # The pair. One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(args.seed)
    classes = {"num_classes": images.num_classes}
    context_encoder = UViTContextEncoder(**{**preset["context_encoder"], **classes})
    denoiser = UViTDenoiser(**{**preset["denoiser"], **classes})
    start = training.start_from(args, images)
    if start is not None:
        name, trained = args.pretrained_model_name_or_path, start.context_encoder
        if trained is None:
            handed_over = context_encoder.config.context_channels, context_encoder.config.prediction_hand_over
            trained = UViTContextEncoder.from_denoiser(start.denoiser, *handed_over)
        else:
            training.take_over(name, denoiser, start.denoiser)
        training.take_over(name, context_encoder, trained)
        recipe["pretrained"] = args.pretrained_model_name_or_path
    elif args.freeze_encoder or args.follow_encoder:
        flag = "--follow_encoder" if args.follow_encoder else "--freeze_encoder"
        raise ValueError(f"{flag} needs a trained model: give --pretrained_model_name_or_path.")
    loss_function, shares = denoising_loss, {"context_dropout": recipe["context_dropout"]}
    if args.follow_encoder:
        if recipe["context_dropout"]:
            raise ValueError(f"--follow_encoder needs --context_dropout 0, got {recipe['context_dropout']}.")
        if not denoiser.config.prediction_hand_over:
            raise ValueError(
                "--follow_encoder needs networks with prediction_hand_over=true, and the pair's have false."
            )
        loss_function, shares = following_loss, {"deterministic": 0.5, "even_in_log_snr": 0.25}
        recipe["follow_encoder"] = shares
    if args.freeze_encoder or args.follow_encoder:
        recipe["freeze_encoder"] = True
        for name, parameter in context_encoder.named_parameters():
            parameter.requires_grad_(name.startswith(("context_heads", "variance")))
    scheduler = DualRateScheduler(**preset["scheduler"])
    if args.gradient_checkpointing:
        context_encoder.enable_gradient_checkpointing()
        denoiser.enable_gradient_checkpointing()
    pair = training.TrainablePair(denoiser, context_encoder).train()
    if "freeze_encoder" in recipe:
        context_encoder.eval()  # it stays as it is, without dropout
    averaged = copy.deepcopy(pair).eval()  # will hold the EMA weights, to sample from and to save
    run = Run(accelerator, args, preset, pair, images)

    optimizer = training.make_optimizer(pair.parameters(), recipe)
    lr_scheduler = training.make_lr_scheduler(optimizer, recipe)
    pair, optimizer, lr_scheduler, loader = accelerator.prepare(pair, optimizer, lr_scheduler, run.make_loader())
    ema = EMAModel(pair.parameters(), decay=recipe["ema_decay"])
    ema.to(accelerator.device)
    run.load(ema)

    def log_snr(t):
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    def log_snr_rate(t):
        return scheduler.log_snr_rate(t * scheduler.config.num_train_timesteps)

    pipeline = DualRatePipeline(
        averaged.denoiser,
        scheduler,
        averaged.context_encoder,
        id2label=images.id2label,
        num_inference_steps=recipe["num_inference_steps"],
        num_context_steps=recipe["num_context_steps"],
        guidance_scale=recipe["guidance_scale"] if images.num_classes else 1.0,
        # Where the context is fresh, a denoiser that follows the encoder would at best repeat it.
        encoder_denoises=args.follow_encoder,
    )

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch["pixel_values"], batch.get("class_labels")
            draws = draw(args.seed, step, run.rows(part), x.shape[1:], accelerator.device)
            torch.manual_seed(seed_of(args.seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(pair):
                result = pair(
                    loss_function,
                    x,
                    class_labels,
                    draws,
                    log_snr=log_snr,
                    log_snr_rate=log_snr_rate,
                    bias=recipe["bias"],
                    context_steps=recipe["context_steps"],
                    label_dropout=recipe["label_dropout"],
                    null_label=images.num_classes,
                    encoder_prediction=averaged.denoiser.handed_over_prediction,
                    **{name: run.share_of_first(part, share) for name, share in shares.items()},
                )
                accelerator.backward(result.loss)
                run.note(loss=result.loss, v_loss=result.v_loss.mean())
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(pair.parameters(), recipe["max_grad_norm"]))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(pair.parameters())
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish("pair")


if __name__ == "__main__":
    run_script(main, parse_args())
