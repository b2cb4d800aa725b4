"""Train a Dual-Rate pair: a heavy context encoder and a light denoiser, jointly, on your own images.

    accelerate launch examples/train_dual_rate.py --preset examples/presets/emoji32.json \\
        --dataset_name examples/data/emoji32 --label_column label --output_dir runs/dualrate-emoji32

The result is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, training
from diffusers_dualrate.losses import denoising_loss, draw, seed_of


def parse_args(argv=None):
    parser = training.argument_parser(__doc__)
    parser.add_argument("--context_dropout", type=float, help="Share of each batch that sees no context.")
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
    scheduler = DualRateScheduler(**preset["scheduler"])
    if args.gradient_checkpointing:
        context_encoder.enable_gradient_checkpointing()
        denoiser.enable_gradient_checkpointing()
    pair = training.TrainablePair(denoiser, context_encoder).train()
    checkpoint = training.open_run(args, preset, pair, images, accelerator)

    optimizer = torch.optim.AdamW(
        pair.parameters(),
        lr=recipe["learning_rate"],
        betas=(recipe["adam_beta1"], recipe["adam_beta2"]),
        weight_decay=recipe["adam_weight_decay"],
    )
    lr_scheduler = get_scheduler(
        recipe["lr_scheduler"],
        optimizer,
        num_warmup_steps=recipe["lr_warmup_steps"],
        num_training_steps=recipe["max_train_steps"],
    )
    first_step = 0 if checkpoint is None else training.step_of(checkpoint)
    loader = training.make_loader(images, accelerator, args, recipe, first_step)
    pair, optimizer, lr_scheduler, loader = accelerator.prepare(pair, optimizer, lr_scheduler, loader)
    ema = EMAModel(pair.parameters(), decay=recipe["ema_decay"])
    ema.to(accelerator.device)
    if checkpoint is not None:
        training.load_checkpoint(accelerator, ema, checkpoint)

    def log_snr(t):
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    def log_snr_rate(t):
        return scheduler.log_snr_rate(t * scheduler.config.num_train_timesteps)

    def make_pipeline():
        networks = accelerator.unwrap_model(pair)
        return DualRatePipeline(
            networks.denoiser,
            scheduler,
            networks.context_encoder,
            id2label=images.id2label,
            num_inference_steps=recipe["num_inference_steps"],
            num_context_steps=recipe["num_context_steps"],
            guidance_scale=recipe["guidance_scale"] if images.num_classes else 1.0,
        )

    training.announce(accelerator, args, preset, pair, images, first_step)
    progress = tqdm(
        initial=first_step, total=recipe["max_train_steps"], disable=not accelerator.is_local_main_process, unit="step"
    )
    losses = []
    for micro_step, batch in enumerate(loader, start=first_step * args.gradient_accumulation_steps):
        step, part = divmod(micro_step, args.gradient_accumulation_steps)
        x, class_labels = batch["pixel_values"], batch.get("class_labels")
        rows = training.rows_of_process(accelerator, part, len(x))
        draws = draw(args.seed, step, rows, x.shape[1:], accelerator.device)
        torch.manual_seed(seed_of(args.seed, micro_step, accelerator.process_index))  # for dropout in the networks

        with accelerator.accumulate(pair):
            result = pair(
                denoising_loss,
                x,
                class_labels,
                draws,
                log_snr=log_snr,
                log_snr_rate=log_snr_rate,
                bias=recipe["bias"],
                context_steps=recipe["context_steps"],
                context_dropout=recipe["context_dropout"],
                label_dropout=recipe["label_dropout"],
                null_label=images.num_classes,
            )
            accelerator.backward(result.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(pair.parameters(), recipe["max_grad_norm"])
                # Under fp16 the scaler skips steps whose gradient overflows, but a loss must be finite there too.
                if not math.isfinite(norm if accelerator.scaler is None else result.loss):
                    last = training.list_checkpoints(Path(args.output_dir))
                    raise ValueError(
                        f"The training diverged at step {step}; the last good state is {last[-1] if last else 'none'}."
                    )
            optimizer.step()
            optimizer.zero_grad()
        losses.append(result.v_loss.mean())
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(pair.parameters())
        step += 1
        progress.update()
        if step % 50 == 0 or step == recipe["max_train_steps"]:
            v_loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            accelerator.log({"v_loss": v_loss, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
            progress.set_postfix(v_loss=f"{v_loss:.4f}")
            losses.clear()
        if step % args.checkpointing_steps == 0 or step == recipe["max_train_steps"]:
            training.save_checkpoint(accelerator, ema, args, step)
        if args.validation_steps and step % args.validation_steps == 0 and accelerator.is_main_process:
            with training.ema_weights(ema, pair):
                training.sample_grid(make_pipeline(), Path(args.output_dir) / "samples" / f"{step:07}.png")

    if accelerator.is_main_process:
        with training.ema_weights(ema, pair):
            training.save_pipeline(make_pipeline(), "pair", accelerator, args, preset)
    progress.close()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
