"""The settings of sampling that a measurement compares: what each evaluates, costs and shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SchedulerMixin
from torch import Tensor

from .defaults import SamplingDefaults
from .flops import count_evaluations, plan_flops
from .guidance import Guidance
from .image_sets import choose, sampled_batches, shown_by
from .inputs import check_noise_levels, check_null_class
from .inventory import ImageSet
from .metrics import Extractors, Measured, measure_images, metrics_of, spread
from .pipeline import DualRatePipeline
from .prompt_lists import Judges, clocked
from .steps import ChainSteps, make_dpm_solver, plan_steps


@dataclass(frozen=True)
class Measurement:
    """What a model is asked for and measured by, alike in every setting of sampling.

    Args:
        images: The data set, whose classes or captions are drawn.
        reference: What the samples are held to.
        extractors: Feature functions.
        judges: Who says whether a sample shows its class or caption.
        lists: Lists of prompts by name, each with its own judges.
        count: Samples of each seed.
        seeds: Each samples a set of its own.
        batch_size: Samples of a batch.
    """

    images: ImageSet
    reference: Measured
    extractors: Extractors
    judges: Judges
    lists: Mapping[str, tuple[list[str], Judges]]
    count: int
    seeds: Sequence[int]
    batch_size: int


@dataclass(frozen=True)
class SamplingSetting:
    """How a model is sampled, planned and so known to be possible.

    Args:
        solver: Its name; under dpmsolver++ the scheduler is that solver.
        scheduler: What the model samples with.
        called: N, K and guidance as a call names them; K is `None` for the model's own refreshes.
        taken: The steps of a chain.
    """

    solver: str
    scheduler: SchedulerMixin
    called: dict[str, Any]
    taken: ChainSteps

    @classmethod
    def plan(cls, pipe: DualRatePipeline, solver: str, called: dict[str, Any]) -> Self:
        """Plan a setting.

        Raises:
            ValueError: If there is no such plan.
        """
        scheduler = make_dpm_solver(pipe.scheduler) if solver == "dpmsolver++" else pipe.scheduler
        n, k, is_pair = called["num_inference_steps"], called["num_context_steps"], pipe.context_encoder is not None
        taken = plan_steps(scheduler, SamplingDefaults.of(pipe.config), n, k, is_pair=is_pair)
        check_null_class(called["guidance_scale"], pipe.denoiser, pipe.context_encoder)
        check_noise_levels(taken, pipe.denoiser, pipe.context_encoder)
        return cls(solver, scheduler, called, taken)


def measure_sampling(
    pipe: DualRatePipeline, setting: SamplingSetting, measurement: Measurement, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str | None, Tensor]]:
    """Sample a set of images for each seed, and each prompt of the lists.

    Args:
        pipe: The model; it stays as it is.
        setting: How it is sampled.
        measurement: What is drawn, and how it is measured.
        accelerator: Knows this process and how many there are.

    Returns:
        The metrics beside what an image costs; and the first images, by name of the list, of the samples under `None`.
    """
    pipe = DualRatePipeline(**pipe.components | {"scheduler": setting.scheduler}, **pipe.parameters)
    pipe.set_progress_bar_config(disable=True)
    called, plan = setting.called, setting.taken.plan
    guidance = Guidance.of(called["guidance_scale"], pipe.config.guidance_interval)
    per_seed, first, calls = [], dict[str | None, Tensor](), 0
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        for seed in measurement.seeds:
            shown = shown_by(measurement.images, choose(measurement.images, measurement.count, seed))
            batches = sampled_batches(
                pipe, shown, measurement.count, seed, called, measurement.batch_size, accelerator
            )
            measured = measure_images(batches, measurement.extractors, measurement.judges, accelerator)
            calls += math.ceil(measurement.count / measurement.batch_size)
            per_seed.append(metrics_of(measured, measurement.reference, measurement.count))
            assert measured.first is not None  # there are samples
            first.setdefault(None, measured.first)
    prompts = {}
    for name, (texts, judges) in measurement.lists.items():
        found, first[name] = measure_prompts(
            pipe, texts, judges, measurement.seeds, called, measurement.batch_size, accelerator
        )
        prompts[name] = found
    # Every setting proves what it evaluated, all processes together.
    heavy, light = plan.evaluations(spared := pipe.config.encoder_denoises)
    counted = [sum(counts) for counts in zip(*gather_object([evaluations]), strict=True)]
    if counted != [heavy * calls, light * calls]:
        raise RuntimeError(
            f"{setting.solver} made {counted} evaluations of {heavy} and {light} in each of {calls} batches."
        )
    path = pipe.denoiser, pipe.context_encoder, plan
    report = {
        "solver": setting.solver,
        **called,
        "num_context_steps": heavy or None,
        "evaluations": {"context_encoder": heavy, "denoiser": light},
        "flops": plan_flops(*path, encoder_denoises=spared),
        "flops_with_guidance": plan_flops(*path, guided=setting.taken.guided_by(guidance), encoder_denoises=spared),
        **spread(per_seed),
    }
    return report | ({"prompts": prompts} if prompts else {}), first


def measure_prompts(
    pipe: DualRatePipeline,
    prompts: Sequence[str],
    judges: Judges,
    seeds: Sequence[int],
    steps: dict,
    batch_size: int,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], Tensor]:
    """Draw each prompt of a list once for each seed: what judges see, the seconds of an image, and the first seed's images."""
    count, per_seed, pictures = len(prompts), [], []
    seconds: list[float] = []
    for seed in seeds:
        batches = sampled_batches(pipe, list(prompts), count, seed, steps, batch_size, accelerator)
        measured = measure_images(clocked(batches, seconds), {}, judges, accelerator, num_first=count)
        per_seed.append(metrics_of(measured, Measured({}, {}), count))
        pictures.append(measured.first)
    total = sum(gather_object([sum(seconds)]))
    found = {"prompts": count, "seconds_per_image": total / (count * len(seeds)), **spread(per_seed)}
    assert pictures[0] is not None  # there are prompts
    return found, pictures[0]
