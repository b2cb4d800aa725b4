"""Train a single-rate diffusion model: one of a preset's two networks alone, on your own images.

    accelerate launch examples/train_single_rate.py --preset examples/presets/emoji32.json \\
        --dataset_name examples/data/emoji32 --label_column label --output_dir runs/single-rate-emoji32

With the heavy network this is the baseline, and later the teacher, of a Dual-Rate pair of the same preset. The result
is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA weights.
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTDenoiser, training
from diffusers_dualrate.losses import denoising_loss, draw, seed_of
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import Run


def parse_args(argv=None):
    parser = training.argument_parser(__doc__)
    parser.add_argument(
        "--network",
        choices=["heavy", "light"],
        default="heavy",
        help="Shape of the preset's encoder, or its denoiser.",
    )
    parser.add_argument("--pretrained_model_name_or_path", help="Trained single-rate model to start from.")
    return parser.parse_args(argv)


def main(args):
    preset = training.read_preset(args)
    # What concerns the context does not concern this network, nor its record.
    recipe = preset["training"] = {k: v for k, v in preset["training"].items() if "context" not in k}
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,  # else the schedule would depend on the number of processes
    )
    images = training.open_images(args, preset)

    # The network. One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(args.seed)
    shape = preset["context_encoder"] if args.network == "heavy" else preset["denoiser"]
    denoiser = UViTDenoiser(**{**shape, **SINGLE_RATE, "num_classes": images.num_classes})
    start = training.start_from(args, images)
    if start is not None:
        if start.context_encoder is not None:
            raise ValueError(f"{args.pretrained_model_name_or_path} must be a single-rate model, but it is a pair.")
        training.take_over(args.pretrained_model_name_or_path, denoiser, start.denoiser)
        recipe["pretrained"] = args.pretrained_model_name_or_path
    scheduler = DualRateScheduler(**preset["scheduler"])
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    network = training.TrainablePair(denoiser).train()
    averaged = copy.deepcopy(network).eval()  # will hold the EMA weights, to sample from and to save
    run = Run(accelerator, args, preset, network, images)

    optimizer = training.make_optimizer(network.parameters(), recipe)
    lr_scheduler = training.make_lr_scheduler(optimizer, recipe)
    network, optimizer, lr_scheduler, loader = accelerator.prepare(network, optimizer, lr_scheduler, run.make_loader())
    ema = EMAModel(network.parameters(), decay=recipe["ema_decay"])
    ema.to(accelerator.device)
    run.load(ema)

    def log_snr(t):
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    def log_snr_rate(t):
        return scheduler.log_snr_rate(t * scheduler.config.num_train_timesteps)

    pipeline = DualRatePipeline(
        averaged.denoiser,
        scheduler,
        id2label=images.id2label,
        num_inference_steps=recipe["num_inference_steps"],
        guidance_scale=recipe["guidance_scale"] if images.num_classes else 1.0,
    )

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch["pixel_values"], batch.get("class_labels")
            draws = draw(args.seed, step, run.rows(part), x.shape[1:], accelerator.device)
            torch.manual_seed(seed_of(args.seed, step, part, accelerator.process_index))  # for dropout in the networks

            with accelerator.accumulate(network):
                result = network(
                    denoising_loss,
                    x,
                    class_labels,
                    draws,
                    log_snr=log_snr,
                    log_snr_rate=log_snr_rate,
                    bias=recipe["bias"],
                    label_dropout=recipe["label_dropout"],
                    null_label=images.num_classes,
                )
                accelerator.backward(result.loss)
                run.note(loss=result.loss, v_loss=result.v_loss.mean())
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(network.parameters(), recipe["max_grad_norm"]))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(network.parameters())
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish(args.network)


if __name__ == "__main__":
    run_script(main, parse_args())
