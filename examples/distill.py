"""Distil a single-rate teacher into a student of few steps, Dual-Rate or single-rate, by Moment Matching.

    accelerate launch examples/distill.py --preset emoji32 --teacher runs/single-rate-emoji32 --dataset_name examples/data/emoji32 --label_column label --output_dir runs/distilled-emoji32

Without `--student` a new Dual-Rate student is made. Its encoder starts from the teacher. For `pretraining_steps` that
encoder is frozen, and a new denoiser learns by plain denoising. With `--student` the student starts from a trained model:
a pair, or a single-rate model such as the teacher itself. With `--full_rollout` as well no data is needed.

Then steps of an auxiliary and of the student alternate, `max_train_steps` in all. The result is a folder that
`DualRatePipeline.from_pretrained` loads, holding the EMA weights and the student's N and K.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers_dualrate.flags import add_light_flag, argument_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        __doc__,
        presets=Path(__file__).with_name("presets"),
        steps="Number of steps of the auxiliary and of the student, in turns. Those of --pretraining_steps come before "
        "and are not among them.",
    )
    parser.add_argument(
        "--teacher",
        required=True,
        help="Single-rate model, one of diffusers or a pair that follows one, a Hub repository or a folder.",
    )
    parser.add_argument("--student", help="Trained model to start from, a Hub repository or a folder.")
    add_light_flag(parser)
    parser.add_argument(
        "--context_from",
        type=float,
        help="Time of the first context, 1 being the noisy end: at the steps above it the student works without. "
        "Default: the preset's, or that of a pair given as --student.",
    )
    parser.add_argument(
        "--full_rollout", action="store_true", default=None, help="Start from noise, not from noisy images."
    )
    parser.add_argument(
        "--prompt_list",
        help="File of prompts, one a line, that a student of a teacher of text learns from without data.",
    )
    parser.add_argument(
        "--pretraining_steps",
        type=int,
        help="Number of steps in which a new student learns to denoise, before those of --max_train_steps; with "
        "--student there are none. Default: the preset's.",
    )
    args = parser.parse_args(argv)
    if args.lr_scheduler is not None:
        parser.error("argument --lr_scheduler: the learning rate of each phase falls linearly")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.checkpoints import tell_last_good_state
from diffusers_dualrate.conditions import Condition, replace_rows
from diffusers_dualrate.configuration import Configuration, Networks
from diffusers_dualrate.conversion import follow_host, make_encoder
from diffusers_dualrate.guidance import guide
from diffusers_dualrate.inventory import caption_to_bytes, spread_captions
from diffusers_dualrate.losses import Denoise, seed_of
from diffusers_dualrate.moment_matching import (
    Grid,
    GridDraws,
    Judges,
    Rollout,
    auxiliary_loss,
    draw_on_grid,
    grid_denoising_loss,
    roll_out,
    student_loss,
)
from diffusers_dualrate.optimization import make_accelerator, make_optimizer
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.prompt_lists import read_prompts
from diffusers_dualrate.prompts import check_text_encoder
from diffusers_dualrate.recipes import DistillationRecipe
from diffusers_dualrate.runs import LOGGING_STEPS, Run
from diffusers_dualrate.sources import (
    check_fit,
    check_space,
    check_teacher,
    components_of,
    open_captions,
    open_images,
)
from diffusers_dualrate.text_encoding import TEXT_OPTIONS

# Samples that tell whether the student has collapsed, and the steps that the teacher takes for them.
PROBES, TEACHER_STEPS = 32, 16
# The student samples as it learns to: from the posterior, without clipping.
OWN_SAMPLING = {"clip_sample": False, "variance_interpolation": 0.0}


class Distillation(TrainablePair):
    """The student and the auxiliary as one module."""

    def __init__(
        self,
        denoiser: UViTDenoiser | HostNetwork,
        context_encoder: UViTContextEncoder | HostNetwork | None,
        auxiliary: UViTDenoiser | HostNetwork,
    ):
        super().__init__(denoiser, context_encoder)
        self.auxiliary = auxiliary

    def predict_midpoint(
        self, z: Tensor, log_snr: Tensor, condition: Condition, context: None, context_log_snr: None
    ) -> Tensor:
        """The auxiliary's prediction as losses take it."""
        return self.auxiliary(z, log_snr, condition).sample


class ConditionsAlone(torch.utils.data.Dataset):
    """The data set of a student that learns without images: the teacher's classes, or prompts, each equally often."""

    corrupt = ()  # nothing is decoded

    def __init__(self, teacher: DualRatePipeline, prompts: list[str] | None):
        if (teacher.denoiser.config.cross_attention_dim is None) != (prompts is None):
            mend = "text: give its prompts by" if prompts is None else "no text: leave out"
            raise ValueError(f"The teacher takes {mend} --prompt_list.")
        self.num_classes, self.id2label = teacher.denoiser.config.num_classes, teacher.id2label
        self.captions, self.has_captions = prompts and [[prompt] for prompt in prompts], prompts is not None
        self.class_labels = torch.arange(self.num_classes) if self.num_classes else None
        self.fingerprint = {"classes": list(self.id2label.values()), "images": None, "rows": "none"}
        if prompts is not None:
            self.fingerprint["rows"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        self.vae = teacher.vae

    def __len__(self) -> int:
        return self.num_classes or len(self.captions or [None])

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Tensor]:
        _, index = position
        if self.captions is not None:
            return {"caption": caption_to_bytes(self.captions[index][0])}
        return {"class_labels": torch.tensor(index)} if self.num_classes else {"index": torch.tensor(index)}

    def list_captions(self, count: int) -> list[str]:
        """Prompts evenly spread over all."""
        return spread_captions(self.captions, count)


def take_over_student(
    configuration: Configuration, student: DualRatePipeline, args: argparse.Namespace
) -> Configuration:
    """The configuration of a distillation that starts from a trained model: its networks, and no denoising first.

    A pair keeps the time of its first context, unless the flag gives another.
    """
    if args.pretraining_steps:
        raise ValueError(f"--pretraining_steps {args.pretraining_steps} is for a new student, without --student.")
    size = {"sample_size": args.resolution} if args.resolution else {}
    networks = {"denoiser": student.denoiser, "context_encoder": student.context_encoder or student.denoiser}
    own = {
        name: network.describe() | ({} if isinstance(network, HostNetwork) else size)
        for name, network in networks.items()
    }
    own["scheduler"] = configuration.networks.scheduler
    if isinstance(student.scheduler, DualRateScheduler):
        own["scheduler"] = {name: student.scheduler.config[name] for name in own["scheduler"]}
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


def check_processes(accelerator: Accelerator, recipe: DistillationRecipe) -> None:
    """Refuse late contexts where weights are spread: a process with none but early rows leaves the encoder, which waits."""
    if accelerator.distributed_type is DistributedType.FSDP and recipe.plan.num_steps_alone:
        raise ValueError(
            f"Distillation with context_from={recipe.context_from} does not run with FSDP, whose processes must all "
            "evaluate the encoder equally often: choose DDP."
        )


def make_networks(
    configuration: Configuration, teacher: DualRatePipeline, student: DualRatePipeline | None
) -> Distillation:
    """The student, made from the teacher or trained before, and the auxiliary, as one module to train."""
    denoiser, context_encoder = (None, None) if student is None else (student.denoiser, student.context_encoder)
    if student is None:
        denoiser = UViTDenoiser(**configuration.networks.denoiser)
        handed_over = {name: denoiser.config[name] for name in ("context_channels", "prediction_hand_over")}
        context_encoder = make_encoder(teacher.denoiser, configuration.networks.context_encoder | handed_over)
    told = configuration.networks
    for network, shape in ((denoiser, told.denoiser), (context_encoder, told.context_encoder)):
        if not isinstance(network, HostNetwork | None):  # it reads texts as the teacher does, from now on
            network.register_to_config(**{name: shape[name] for name in TEXT_OPTIONS})
    networks = Distillation(denoiser, context_encoder, copy.deepcopy(teacher.denoiser))
    if configuration.options.gradient_checkpointing:
        networks.enable_gradient_checkpointing()
    return networks.train()


def make_phased_lr_scheduler(
    optimizer: torch.optim.Optimizer, recipe: DistillationRecipe
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then linear to 0, anew for each phase."""

    def rate_factor(step: int) -> float:
        first, last, rate = 0, recipe.pretraining_steps, recipe.pretraining_learning_rate
        if step >= last:
            first, last, rate = last, recipe.num_steps, recipe.learning_rate
        warm = min(1, (step - first + 1) / max(1, recipe.lr_warmup_steps))
        return warm * (last - step) / max(1, last - first) * rate / recipe.learning_rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)


def guide_teacher(teacher: DualRatePipeline, guidance_scale: float, null: Condition | int) -> Denoise:
    """The teacher's prediction as losses take it, guided; `null` stands for no condition."""

    def predict_teacher(
        z: Tensor, log_snr: Tensor, condition: Condition, context: object, context_log_snr: Tensor | None
    ) -> Tensor:
        v = teacher.denoiser(z, log_snr, condition).sample
        if guidance_scale == 1:
            return v
        nothing = replace_rows(condition, torch.ones(len(z), dtype=torch.bool, device=z.device), null)
        v_null = teacher.denoiser(z, log_snr, nothing).sample
        return guide(v_null, v, guidance_scale)

    return predict_teacher


class VarianceCheck:
    """Compares the variance of a few samples, always from the same noise, with that of the teacher's.

    A student that has collapsed samples nearly the same image each time.

    Args:
        run: The run, which ends where the student has collapsed.
        teacher: Pipeline of the teacher.
        guidance_scale: Its guidance.
        grid: The student's steps.
    """

    def __init__(self, run: Run, teacher: DualRatePipeline, guidance_scale: float, grid: Grid):
        seed, device = run.options.seed, run.accelerator.device
        asked, _ = run.conditions.examples(PROBES)
        if run.images.num_classes:
            asked = {"class_labels": (torch.arange(PROBES) % run.images.num_classes).tolist()}
        teacher.set_progress_bar_config(disable=True)
        from_teacher = teacher(
            **asked,
            num_inference_steps=TEACHER_STEPS,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed_of(seed, row)) for row in range(PROBES)],
            output_type="latent",
        ).images
        self.shape, self._teacher_variance = from_teacher.shape[1:], from_teacher.var(0).mean()
        noise = draw_on_grid(seed, 0, range(-PROBES, 0), self.shape, len(grid.plan), device).noise
        self._run, self._plan = run, grid.plan
        self._rollout = Rollout(run.conditions.compute(asked), noise, grid.log_snrs(noise))

    def is_due(self, step: int) -> bool:
        """Whether the step just done is checked: it is logged, or kept in a checkpoint."""
        every = (LOGGING_STEPS, self._run.options.checkpointing_steps)
        is_last = self._run.is_stopping or step + 1 == self._run.recipe.num_steps
        return step >= self._run.recipe.pretraining_steps and (is_last or any((step + 1) % n == 0 for n in every))

    @torch.no_grad()
    def look(self, networks: torch.nn.Module) -> None:
        """Note the student's variance as a share of the teacher's; refuse to go on where it is too small."""
        run = self._run
        networks.eval()  # without dropout, so that all processes find the same
        noise = self._rollout.noise[:, 0]
        first = torch.zeros(PROBES, dtype=torch.long, device=noise.device)
        last = first + len(self._plan)
        samples = networks(roll_out, noise, self._rollout, first, last, refreshes=self._plan)
        networks.train()
        share = samples.var(0).mean() / self._teacher_variance
        run.note(variance_share=share)
        if not share >= run.recipe.min_variance_share:
            raise ValueError(
                f"The student collapsed at step {run.step}: its samples have {share:.3g} of the variance of the "
                f"teacher's, less than {run.recipe.min_variance_share}; {tell_last_good_state(run.output_dir)}."
            )


def open_models(
    args: argparse.Namespace, configuration: Configuration, tell: Callable[[str], None]
) -> tuple[DualRatePipeline, DualRatePipeline | None, Configuration]:
    """Teacher and student, and the configuration with the student's networks where there is one."""
    teacher = DualRatePipeline.from_pretrained(args.teacher)
    if teacher.context_encoder is not None and teacher.config.encoder_denoises:
        teacher = teacher.heavy_alone()  # a pair that follows its heavy network holds it as it was
    student = DualRatePipeline.from_pretrained(args.student) if args.student else None
    if student is not None:
        configuration = take_over_student(configuration, student, args)
    as_pair = student is None or student.context_encoder is not None
    configuration = follow_host(configuration, student or teacher, args, tell, as_pair=as_pair)
    if student is not None:
        check_teacher(teacher, student={**student.denoiser.config, **configuration.networks.scheduler})
        check_space(args.student, student, teacher)
    _ = configuration.recipe.plan  # which is refused now, if there is none
    return teacher, student, configuration


def main(args: argparse.Namespace, open_images: Callable = open_images) -> int:
    configuration = configure(args, "distill")
    has_data = bool(args.dataset_name or args.train_data_dir)
    prompts = None if args.prompt_list is None else read_prompts("--prompt_list", args.prompt_list)
    if has_data and prompts is not None:
        raise ValueError("--prompt_list is for a student without data, whose captions are its prompts.")
    if not has_data and not (args.student and configuration.recipe.full_rollout):
        raise ValueError("Without data, both --student and --full_rollout are needed.")
    accelerator = make_accelerator(
        configuration.options,
        # A step trains some of the networks, and the others have no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    teacher, student, configuration = open_models(args, configuration, accelerator.print)
    check_processes(accelerator, configuration.recipe)
    images = (
        open_images(configuration.data, **configuration.image_options)
        if has_data
        else ConditionsAlone(teacher, prompts)
    )
    check_fit(args.teacher, teacher, images)
    check_text_encoder(args.teacher, teacher)
    captions = open_captions(configuration, images, teacher)
    configuration = configuration.with_conditions(images.num_classes, captions)
    check_teacher(teacher, preset={**configuration.networks.denoiser, **configuration.networks.scheduler})
    recipe = configuration.recipe

    # One seed for the weights; the randomness of a step comes from (seed, step, row).
    set_seed(configuration.options.seed)
    networks = make_networks(configuration, teacher, student)
    averaged = copy.deepcopy(networks).eval()  # will hold the EMA weights, to sample from and to save
    pipeline = DualRatePipeline(
        averaged.denoiser,
        DualRateScheduler(**configuration.networks.scheduler | OWN_SAMPLING),
        averaged.context_encoder,
        vae=images.vae,
        id2label=images.id2label or teacher.id2label,
        num_inference_steps=recipe.num_inference_steps,
        num_context_steps=recipe.num_context_steps if averaged.context_encoder else None,
        context_from=recipe.context_from if recipe.context_from < 1 else None,
        context_free=recipe.context_from < 1,
        is_distilled=True,
        **components_of(captions),
    )
    run = Run(accelerator, configuration, networks, images, {"teacher": teacher, "student": student}, captions)
    return train(run, networks, averaged, pipeline, teacher, is_new=student is None)


def train(
    run: Run,
    networks: Distillation,
    averaged: Distillation,
    pipeline: DualRatePipeline,
    teacher: DualRatePipeline,
    is_new: bool,
) -> int:
    """The loop of a run; `is_new` where the student is made from the teacher."""
    accelerator, recipe, seed = run.accelerator, run.recipe, run.options.seed
    optimizer = make_optimizer(networks.parameters(), recipe)
    lr_scheduler = make_phased_lr_scheduler(optimizer, recipe)
    predict_midpoint = networks.predict_midpoint  # of the module itself, which `prepare` may wrap
    networks, optimizer, lr_scheduler, loader = accelerator.prepare(
        networks, optimizer, lr_scheduler, run.make_loader()
    )
    ema = EMAModel(networks.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    run.load(ema, optimizer)

    grid = Grid(schedule_of(pipeline.scheduler).log_snr, recipe.plan)
    guidance_scale = recipe.guidance_scale if run.conditions else 1.0
    teacher.denoiser.eval().requires_grad_(False).to(accelerator.device)
    judges = Judges(predict_midpoint, guide_teacher(teacher, guidance_scale, run.conditions.null), recipe.min_variance)
    variance_check = VarianceCheck(run, teacher, guidance_scale, grid)

    # Weights that a new encoder has from the teacher stay fixed in pretraining; what is new in it learns at once.
    known = teacher.denoiser.state_dict().keys() if is_new else ()
    encoder = accelerator.unwrap_model(networks).context_encoder
    waiting = [parameter for name, parameter in encoder.named_parameters() if name in known] if known else []

    def draw_rows(step: int, rows: Sequence[int]) -> GridDraws:
        return draw_on_grid(seed, step, rows, variance_check.shape, len(grid.plan), accelerator.device)

    with run.watch(ema, averaged, pipeline):
        for step, part, batch, draws in run.batches(loader, draw_rows):
            x, condition = batch.get("pixel_values"), run.conditions.of(batch)
            start = None if recipe.full_rollout else x
            torch.manual_seed(seed_of(seed, step, part, accelerator.process_index))  # for dropout in the networks
            is_pretraining = step < recipe.pretraining_steps
            # The auxiliary comes first: while it equals the teacher, the student's gradient is zero.
            is_auxiliary_step = not is_pretraining and (step - recipe.pretraining_steps) % 2 == 0
            for parameter in waiting:
                parameter.requires_grad_(not is_pretraining)
            if waiting:
                encoder.train(not is_pretraining)  # it stays as it is, without dropout

            # A network that has no part in the loss has no gradient, so clip and optimizer pass over it.
            with accelerator.accumulate(networks):
                if is_pretraining:
                    learned = {"grid": grid, "min_variance": recipe.min_variance}
                    loss = networks(grid_denoising_loss, x, condition, draws, **learned)
                    run.note(loss=loss)
                elif is_auxiliary_step:
                    loss = networks(auxiliary_loss, start, condition, draws, grid=grid, judges=judges)
                    run.note(auxiliary=loss)
                else:
                    loss, distance = networks(student_loss, start, condition, draws, grid=grid, judges=judges)
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
    run_script(main, ARGS)
