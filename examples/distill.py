"""Distil a single-rate teacher into a student of few steps, Dual-Rate or single-rate, by Moment Matching.

    accelerate launch examples/distill.py --preset emoji32 --teacher model_cards/single-rate-emoji32 \\
        --dataset_name examples/data/emoji32 --label_column label --output_dir runs/distilled-emoji32

Without `--student` a Dual-Rate student is made: its encoder starts from the teacher and, frozen, lets a new denoiser learn
by denoising first, for `pretraining_steps`. With it the student starts from a trained model: a pair, or a single-rate model
such as the teacher itself. With `--full_rollout` as well no data is needed. Then steps of an auxiliary and of the student
alternate, `max_train_steps` in all. The result is a folder that `DualRatePipeline.from_pretrained` loads, holding the EMA
weights and the student's N and K.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, training
from diffusers_dualrate.arguments import argument_parser, configure
from diffusers_dualrate.checkpoints import tell_last_good_state
from diffusers_dualrate.configuration import Networks
from diffusers_dualrate.losses import seed_of
from diffusers_dualrate.moment_matching import (
    auxiliary_loss,
    draw_on_grid,
    grid_denoising_loss,
    grid_log_snr,
    roll_out,
    student_loss,
)
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.runs import LOGGING_STEPS, Run

SHARED = {"in_channels", "sample_size", "num_classes"}
SHARED |= {"log_snr_min", "log_snr_max", "image_size", "noise_low", "noise_high"}
PROBES, TEACHER_STEPS = 32, 16
# The student samples as it learns to: along the posterior, its predictions as they are.
OWN_SAMPLING = {"clip_sample": False, "variance_interpolation": 0.0}


def parse_args(argv=None):
    parser = argument_parser(__doc__, presets=Path(__file__).with_name("presets"))
    parser.add_argument("--teacher", required=True, help="Single-rate model, a Hub repository or a folder.")
    parser.add_argument("--student", help="Trained model to start from, a Hub repository or a folder.")
    parser.add_argument(
        "--full_rollout", action="store_true", default=None, help="Start from noise, not from noisy images."
    )
    parser.add_argument(
        "--context_from",
        type=float,
        help="Time of the first context, 1 being the noisy end: at the steps above it the student works without. "
        "Default: the preset's, or that of a pair given as --student.",
    )
    parser.add_argument(
        "--pretraining_steps",
        type=int,
        help="Steps of denoising, without --student; they come before those of --max_train_steps.",
    )
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
        self.class_labels = torch.arange(self.num_classes) if self.num_classes else None
        self.fingerprint = {"classes": list(self.id2label.values()), "images": None, "rows": "none"}

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


def take_over_student(configuration, student, args):
    """The configuration of a distillation that starts from a trained model: its networks, and no denoising first.

    A pair keeps the time of its first context, unless the flag gives another.
    """
    size = {"sample_size": args.resolution} if args.resolution else {}
    own = {"denoiser": {**student.denoiser.config, **size}}
    own["context_encoder"] = {**(student.context_encoder or student.denoiser).config, **size}
    own["scheduler"] = {name: student.scheduler.config[name] for name in configuration.networks.scheduler}
    configuration = dataclasses.replace(configuration, networks=Networks(**own)).with_recipe(pretraining_steps=0)
    if student.context_encoder is None:  # every step of it is heavy
        if args.context_from not in (None, 1):
            raise ValueError(f"--context_from {args.context_from} is for a pair: {args.student} is one network.")
        n = configuration.recipe.num_inference_steps
        return configuration.with_recipe(num_context_steps=n, context_from=1.0)
    if args.context_from is None:
        configuration = configuration.with_recipe(context_from=student.config.context_from or 1.0)
    if configuration.recipe.context_from < 1 and not student.config.context_free:
        raise ValueError(
            f"--context_from {args.context_from} needs a student that learned to go without context, and {args.student} "
            "did not (context_free=False)."
        )
    return configuration


def check_processes(accelerator, recipe):
    """Refuse late contexts where weights are spread: a process with none but early rows leaves the encoder, which waits."""
    if accelerator.distributed_type is DistributedType.FSDP and recipe.plan.num_steps_alone:
        raise ValueError(
            f"Distillation with context_from={recipe.context_from} does not run with FSDP, whose processes must all "
            "evaluate the encoder equally often: choose DDP."
        )


def make_student(configuration, teacher, student):
    """The student, made from the teacher or trained before, and the auxiliary, as one module to train."""
    denoiser, context_encoder = (None, None) if student is None else (student.denoiser, student.context_encoder)
    if student is None:
        denoiser = UViTDenoiser(**configuration.networks.denoiser)
        context_encoder = UViTContextEncoder.from_denoiser(
            teacher.denoiser, denoiser.config.context_channels, denoiser.config.prediction_hand_over
        )
    trained = Distillation(denoiser, context_encoder, copy.deepcopy(teacher.denoiser))
    if configuration.options.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    return trained.train()


def make_lr_scheduler(optimizer, recipe):
    """Warm-up, then linear to 0, anew for each phase."""

    def rate_factor(step):
        first, last, rate = 0, recipe.pretraining_steps, recipe.pretraining_learning_rate
        if step >= last:
            first, last, rate = last, recipe.num_steps, recipe.learning_rate
        warm = min(1, (step - first + 1) / max(1, recipe.lr_warmup_steps))
        return warm * (last - step) / max(1, last - first) * rate / recipe.learning_rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)


def make_teacher(teacher, guidance_scale):
    """The teacher's prediction as losses take it, guided."""

    def predict_teacher(z, log_snr, class_labels, context, context_log_snr):
        v = teacher.denoiser(z, log_snr, class_labels).sample
        if guidance_scale == 1:
            return v
        v_null = teacher.denoiser(z, log_snr).sample
        return v_null + guidance_scale * (v - v_null)

    return predict_teacher


class VarianceCheck:
    """A collapsed student samples ever the same: a fixed few of its samples are held against the teacher's.

    Args:
        run: Whose networks are checked; it ends where the student has collapsed.
        teacher: Pipeline of the teacher.
        guidance_scale: Its guidance.
        log_snr: The noise schedule, t [B] → λ_t.
    """

    def __init__(self, run, teacher, guidance_scale, log_snr):
        recipe, seed, device = run.recipe, run.options.seed, run.accelerator.device
        labels = torch.arange(PROBES) % run.images.num_classes if run.images.num_classes else None
        teacher.set_progress_bar_config(disable=True)
        from_teacher = teacher(
            labels,
            num_inference_steps=TEACHER_STEPS,
            guidance_scale=guidance_scale,
            batch_size=PROBES,
            generator=[torch.Generator().manual_seed(seed_of(seed, row)) for row in range(PROBES)],
            output_type="latent",
        ).images
        self.shape, self._teacher_variance = from_teacher.shape[1:], from_teacher.var(0).mean()
        self._run, self._labels = run, None if labels is None else labels.to(device)
        n = recipe.num_inference_steps
        self._noise = draw_on_grid(seed, 0, range(-PROBES, 0), self.shape, n, device).noise
        self._log_snrs = grid_log_snr(log_snr, n, self._noise)
        start = torch.zeros(PROBES, dtype=torch.long, device=device)
        self._ends = {"first": start, "last": start + n, "refreshes": recipe.plan}

    def is_due(self, step):
        """Whether the step just done is looked at: before what it finds is logged, or kept in a checkpoint."""
        every = (LOGGING_STEPS, self._run.options.checkpointing_steps)
        is_last = self._run.is_stopping or step + 1 == self._run.recipe.num_steps
        return step >= self._run.recipe.pretraining_steps and (is_last or any((step + 1) % n == 0 for n in every))

    @torch.no_grad()
    def look(self, networks):
        """Note the share of the teacher's variance that the student's samples have, and end the run if it is too small."""
        run = self._run
        networks.eval()  # without dropout, so that all processes find the same
        samples = networks(roll_out, self._noise[:, 0], self._labels, self._noise, self._log_snrs, **self._ends)
        networks.train()
        share = samples.var(0).mean() / self._teacher_variance
        run.note(variance_share=share)
        if not share >= run.recipe.min_variance_share:
            raise ValueError(
                f"The student collapsed at step {run.step}: its samples have {share:.3g} of the variance of the "
                f"teacher's, less than {run.recipe.min_variance_share}; {tell_last_good_state(run.output_dir)}."
            )


def open_models(args, configuration):
    """Teacher and student, and the configuration with the student's networks where there is one."""
    teacher = DualRatePipeline.from_pretrained(args.teacher)
    student = DualRatePipeline.from_pretrained(args.student) if args.student else None
    if student is not None:
        configuration = take_over_student(configuration, student, args)
        check_fit(teacher, student={**student.denoiser.config, **student.scheduler.config})
    _ = configuration.recipe.plan  # which is refused now, if there is none
    return teacher, student, configuration


def main(args, open_images=training.open_images):
    configuration = configure(args, "distill")
    has_data = bool(args.dataset_name or args.train_data_dir)
    if not has_data and not (args.student and configuration.recipe.full_rollout):
        raise ValueError("Without data, both --student and --full_rollout are needed.")
    accelerator = training.make_accelerator(
        configuration.options,
        # A step trains some of the networks, and the others have no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    teacher, student, configuration = open_models(args, configuration)
    check_processes(accelerator, configuration.recipe)
    images = open_images(configuration.data, **configuration.image_options) if has_data else ClassesAlone(teacher)
    configuration = configuration.with_classes(images.num_classes)
    preset = {**configuration.networks.denoiser, **configuration.networks.scheduler}
    check_fit(teacher, preset=preset, data={"num_classes": images.num_classes})
    training.check_classes(args.teacher, teacher, images)

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    trained = make_student(configuration, teacher, student)
    averaged, recipe = (
        copy.deepcopy(trained).eval(),
        configuration.recipe,
    )  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        DualRateScheduler(**configuration.networks.scheduler | OWN_SAMPLING),
        averaged.context_encoder,
        id2label=images.id2label,
        num_inference_steps=recipe.num_inference_steps,
        num_context_steps=recipe.num_context_steps if averaged.context_encoder else None,
        context_from=recipe.context_from if recipe.context_from < 1 else None,
        context_free=recipe.context_from < 1,
    )
    run = Run(accelerator, configuration, trained, images, {"teacher": teacher, "student": student})
    return train(run, trained, averaged, pipeline, teacher, is_new=student is None)


def train(run, trained, averaged, pipeline, teacher, is_new):
    """The loop of a run; `is_new` where the student is made from the teacher."""
    accelerator, recipe, seed = run.accelerator, run.recipe, run.options.seed
    optimizer = training.make_optimizer(trained.parameters(), recipe)
    lr_scheduler = make_lr_scheduler(optimizer, recipe)
    networks, optimizer, lr_scheduler, loader = accelerator.prepare(
        trained, optimizer, lr_scheduler, run.make_loader()
    )
    ema = EMAModel(networks.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    run.load(ema)

    n = recipe.num_inference_steps
    log_snr = training.schedule_of(pipeline.scheduler).log_snr
    steps = {name: getattr(recipe, name) for name in ("num_inference_steps", "num_context_steps", "context_from")}
    steps |= {"log_snr": log_snr, "min_variance": recipe.min_variance}
    guidance_scale = recipe.guidance_scale if run.images.num_classes else 1.0
    teacher.denoiser.eval().requires_grad_(False).to(accelerator.device)
    judges = {"auxiliary": trained.predict_midpoint, "teacher": make_teacher(teacher, guidance_scale)}
    variance_check = VarianceCheck(run, teacher, guidance_scale, log_snr)

    # What a new encoder has from the teacher waits until the denoiser, and what is new in the encoder, have learned.
    known = teacher.denoiser.state_dict().keys() if is_new else ()
    encoder = accelerator.unwrap_model(networks).context_encoder
    waiting = [parameter for name, parameter in encoder.named_parameters() if name in known] if known else []

    with run.watch(ema, averaged, pipeline):
        for step, part, batch in run.batches(loader):
            x, class_labels = batch.get("pixel_values"), batch.get("class_labels")
            start = None if recipe.full_rollout else x
            draws = draw_on_grid(seed, step, run.rows(part), variance_check.shape, n, accelerator.device)
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks
            is_pretraining = step < recipe.pretraining_steps
            # The auxiliary comes first: while it equals the teacher it has nothing to tell the student.
            is_auxiliary_step = not is_pretraining and (step - recipe.pretraining_steps) % 2 == 0
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
                    run.agree(accelerator.clip_grad_norm_(networks.parameters(), recipe.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(networks.parameters())
                if variance_check.is_due(step):
                    variance_check.look(networks)
                run.finish_step(lr=lr_scheduler.get_last_lr()[0])
        return run.finish("distilled pair" if averaged.context_encoder else "distilled single-rate")


if __name__ == "__main__":
    run_script(main, parse_args())
