"""Distil a single-rate teacher into a student of few steps, Dual-Rate or single-rate, by Moment Matching.

    accelerate launch examples/distill.py --preset examples/presets/emoji32.json --teacher model_cards/single-rate-emoji32 \\
        --dataset_name examples/data/emoji32 --label_column label --output_dir runs/distilled-emoji32

Without `--student` a Dual-Rate student is made: its encoder starts from the teacher and, frozen, lets a new denoiser learn
by denoising first. With it the student starts from a trained model: a pair, or a single-rate model such as the teacher
itself. With `--full_rollout` as well no data is needed. Then steps of an auxiliary and of the student alternate, and
`max_train_steps` counts both. The result is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA
weights and the student's N and K.
"""

import copy

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, training
from diffusers_dualrate.checkpoints import tell_last_good_state
from diffusers_dualrate.losses import seed_of
from diffusers_dualrate.moment_matching import (
    auxiliary_loss,
    draw,
    grid_denoising_loss,
    grid_log_snr,
    refresh_interval,
    roll_out,
    student_loss,
)
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import LOGGING_STEPS, Run

SHARED = {"in_channels", "sample_size", "num_classes"}
SHARED |= {"log_snr_min", "log_snr_max", "image_size", "noise_low", "noise_high"}
PROBES, TEACHER_STEPS = 32, 16


def parse_args(argv=None):
    parser = training.argument_parser(__doc__)
    parser.add_argument("--teacher", required=True, help="Single-rate model, a Hub repository or a folder.")
    parser.add_argument("--student", help="Trained model to start from, a Hub repository or a folder.")
    parser.add_argument("--num_inference_steps", type=int, help="N of the student.")
    parser.add_argument("--num_context_steps", type=int, help="K of a Dual-Rate student, a divisor of N.")
    parser.add_argument("--guidance_scale", type=float, help="Guidance of the teacher, which the student takes over.")
    parser.add_argument("--full_rollout", action="store_true", default=None, help="Start from noise, not from data.")
    parser.add_argument("--pretraining_steps", type=int, help="Steps of denoising, without --student.")
    args = parser.parse_args(argv)
    if args.lr_scheduler is not None:
        parser.error("argument --lr_scheduler: the learning rate of each phase falls linearly")
    return args


class Distillation(training.TrainablePair):
    """The student and the auxiliary as one module."""

    def __init__(self, denoiser, context_encoder, auxiliary):
        super().__init__(denoiser, context_encoder)
        self.auxiliary = auxiliary

    def predict_midpoint(self, z, log_snr, class_labels, context, context_log_snr):
        return self.auxiliary(z, log_snr, class_labels).sample


class ClassesAlone(torch.utils.data.Dataset):
    """What stands for the data set where a student learns without data: the teacher's classes, all alike."""

    corrupt = ()  # nothing is decoded

    def __init__(self, teacher):
        self.num_classes, self.id2label = teacher.denoiser.config.num_classes, teacher.id2label

    def __len__(self):
        return self.num_classes or 1

    def __getitem__(self, position):
        _, index = position
        return {"class_labels": torch.tensor(index)} if self.num_classes else {"index": torch.tensor(index)}


def check_fit(teacher, **others):
    """Refuse a teacher that is none, or that differs from something else in what both must share."""
    if teacher.context_encoder is not None:
        raise ValueError("The teacher must be a single-rate model, but it has a context encoder.")
    known = {**teacher.denoiser.config, **teacher.scheduler.config}
    for place, values in others.items():
        for name in SHARED & values.keys():
            if known.get(name) != values[name]:
                raise ValueError(
                    f"The teacher does not fit: {name} is {known.get(name)} in the teacher and {values[name]} in the "
                    f"{place}."
                )


def main(args):
    preset = training.read_preset(args, "distillation")
    recipe = preset["training"]
    for name in ("learning_rate", "pretraining_learning_rate"):
        if not recipe[name] > 0:
            raise ValueError(f"{name} must be above 0, got {recipe[name]}.")
    has_data = bool(args.dataset_name or args.train_data_dir)
    if not has_data and not (args.student and recipe["full_rollout"]):
        raise ValueError("Without data, both --student and --full_rollout are needed.")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,  # else the schedule would depend on the number of processes
        # A step trains some of the networks, and the others have no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    teacher = DualRatePipeline.from_pretrained(args.teacher)
    student = None
    if args.student:
        student = DualRatePipeline.from_pretrained(args.student)
        size = {"sample_size": args.resolution} if args.resolution else {}
        preset["denoiser"], preset["scheduler"] = {**student.denoiser.config, **size}, {**student.scheduler.config}
        recipe["pretraining_steps"] = 0
        if student.context_encoder is None:  # every step of a single-rate student is heavy
            recipe["num_context_steps"] = recipe["num_inference_steps"]
        check_fit(teacher, student={**student.denoiser.config, **student.scheduler.config})
    num_steps, num_context_steps = recipe["num_inference_steps"], recipe["num_context_steps"]
    interval = refresh_interval(num_steps, num_context_steps)
    images = training.open_images(args, preset) if has_data else ClassesAlone(teacher)
    classes = {"num_classes": images.num_classes}
    check_fit(teacher, preset={**preset["denoiser"], **preset["scheduler"], **classes}, data=classes)
    training.check_classes(args.teacher, teacher, images)
    # The student samples as it learns to: along the posterior, its predictions as they are.
    own = {"clip_sample": False, "variance_interpolation": 0.0, "second_order": False}
    scheduler = DualRateScheduler.from_config(preset["scheduler"], **own)

    # Student and auxiliary. One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(args.seed)
    if student is None:
        denoiser = UViTDenoiser(**{**preset["denoiser"], **classes})
        context_encoder = UViTContextEncoder.from_denoiser(
            teacher.denoiser, denoiser.config.context_channels, denoiser.config.prediction_hand_over
        )
    else:
        denoiser, context_encoder = student.denoiser, student.context_encoder
    auxiliary = copy.deepcopy(teacher.denoiser)
    if args.gradient_checkpointing:
        for network in filter(None, (context_encoder, denoiser, auxiliary)):
            network.enable_gradient_checkpointing()
    recipe |= {"teacher": args.teacher, "student": args.student}
    recipe["max_train_steps"] += recipe["pretraining_steps"]
    trained = Distillation(denoiser, context_encoder, auxiliary).train()
    averaged = copy.deepcopy(trained).eval()  # will hold the EMA weights, to sample from and to save
    run = Run(accelerator, args, preset, trained, images)

    optimizer = training.make_optimizer(trained.parameters(), recipe)

    def rate_factor(step):
        """Warm-up, then linear to 0, anew for each phase."""
        first, last, rate = 0, recipe["pretraining_steps"], recipe["pretraining_learning_rate"]
        if step >= last:
            first, last, rate = last, recipe["max_train_steps"], recipe["learning_rate"]
        warm = min(1, (step - first + 1) / max(1, recipe["lr_warmup_steps"]))
        return warm * (last - step) / max(1, last - first) * rate / recipe["learning_rate"]

    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    networks, optimizer, lr_scheduler, loader = accelerator.prepare(
        trained, optimizer, lr_scheduler, run.make_loader()
    )
    ema = EMAModel(networks.parameters(), decay=recipe["ema_decay"])
    ema.to(accelerator.device)
    run.load(ema)

    def log_snr(t):
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    pipeline = DualRatePipeline(
        averaged.denoiser,
        scheduler,
        averaged.context_encoder,
        id2label=images.id2label,
        num_inference_steps=num_steps,
        num_context_steps=num_context_steps if context_encoder else None,
    )
    steps = {"log_snr": log_snr, "num_inference_steps": num_steps, "num_context_steps": num_context_steps}
    steps["min_variance"] = recipe["min_variance"]

    teacher.denoiser.eval().requires_grad_(False).to(accelerator.device)
    guidance_scale = recipe["guidance_scale"] if images.num_classes else 1.0

    def predict_teacher(z, log_snr, class_labels, context, context_log_snr):
        v = teacher.denoiser(z, log_snr, class_labels).sample
        if guidance_scale == 1:
            return v
        v_null = teacher.denoiser(z, log_snr).sample
        return v_null + guidance_scale * (v - v_null)

    judges = {"auxiliary": trained.predict_midpoint, "teacher": predict_teacher}

    # A collapsed student samples ever the same: a fixed few of its samples are held against the teacher's.
    labels = torch.arange(PROBES) % images.num_classes if images.num_classes else None
    teacher.set_progress_bar_config(disable=True)
    from_teacher = teacher(
        labels,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=guidance_scale,
        batch_size=PROBES,
        generator=[torch.Generator().manual_seed(seed_of(args.seed, row)) for row in range(PROBES)],
        output_type="latent",
    ).images
    shape, teacher_variance = from_teacher.shape[1:], from_teacher.var(0).mean()
    probe = draw(args.seed, 0, range(-PROBES, 0), shape, num_steps, accelerator.device)
    labels = None if labels is None else labels.to(accelerator.device)

    check_steps = (LOGGING_STEPS, args.checkpointing_steps)

    @torch.no_grad()
    def check_variance():
        start = torch.zeros(PROBES, dtype=torch.long, device=accelerator.device)
        log_snrs = grid_log_snr(log_snr, num_steps, probe.noise)
        ends = {"first": start, "last": start + num_steps, "num_steps": num_steps, "refresh_interval": interval}
        networks.eval()  # without dropout, so that all processes find the same
        samples = networks(roll_out, probe.noise[:, 0], labels, probe.noise, log_snrs, **ends)
        networks.train()
        share = samples.var(0).mean() / teacher_variance
        run.note(variance_share=share)
        if not share >= recipe["min_variance_share"]:
            raise ValueError(
                f"The student collapsed at step {run.step}: its samples have {share:.3g} of the variance of the "
                f"teacher's, less than {recipe['min_variance_share']}; {tell_last_good_state(run.output_dir)}."
            )

    # What a new encoder has from the teacher waits until the denoiser, and what is new in the encoder, have learned.
    known = teacher.denoiser.state_dict().keys() if student is None else ()
    encoder = accelerator.unwrap_model(networks).context_encoder
    waiting = [parameter for name, parameter in encoder.named_parameters() if name in known] if known else []

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch.get("pixel_values"), batch.get("class_labels")
            start = None if recipe["full_rollout"] else x
            draws = draw(args.seed, step, run.rows(part), shape, num_steps, accelerator.device)
            torch.manual_seed(seed_of(args.seed, step, part, accelerator.process_index))  # for dropout in the networks
            is_pretraining = step < recipe["pretraining_steps"]
            # The auxiliary comes first: while it equals the teacher it has nothing to tell the student.
            is_auxiliary_step = not is_pretraining and (step - recipe["pretraining_steps"]) % 2 == 0
            for parameter in waiting:
                parameter.requires_grad_(not is_pretraining)
            if waiting:
                encoder.train(not is_pretraining)  # it stays as it is, without dropout

            # What has no part in a step's loss has no gradient, so that clip and optimizer pass over it.
            with accelerator.accumulate(networks):
                if is_pretraining:
                    loss = networks(grid_denoising_loss, x, class_labels, draws, **steps)
                    run.note(loss=loss)
                elif is_auxiliary_step:
                    loss = networks(auxiliary_loss, start, class_labels, draws, **judges, **steps)
                    run.note(auxiliary=loss)
                else:
                    loss, distance = networks(student_loss, start, class_labels, draws, **judges, **steps)
                    run.note(student=loss, distance=distance)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    run.agree(accelerator.clip_grad_norm_(networks.parameters(), recipe["max_grad_norm"]))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(networks.parameters())
                is_last = run.is_stopping or step + 1 == recipe["max_train_steps"]
                if not is_pretraining and (is_last or any((step + 1) % every == 0 for every in check_steps)):
                    check_variance()  # before a checkpoint keeps what it finds
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish("distilled pair" if context_encoder else "distilled single-rate")


if __name__ == "__main__":
    run_script(main, parse_args())
