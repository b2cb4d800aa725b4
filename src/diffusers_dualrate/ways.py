"""The ways to sample a model that a measurement compares: what each evaluates, costs and shows."""

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
from .inventory import ImageSet
from .metrics import Extractors, Measured, measure_images, metrics_of, spread
from .pipeline import DualRatePipeline
from .prompt_lists import Judges, clocked
from .steps import ChainSteps, make_dpm_solver, plan_steps


@dataclass(frozen=True)
class Asked:
    """What a model is asked for and measured by, alike in every way to sample it.

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
class Way:
    """A way to sample a model, planned and so known to be possible.

    Args:
        solver: Its name; under dpmsolver++ the scheduler is that solver.
        scheduler: What the model samples with.
        steps: N, K and guidance.
        called: The same as a call names them.
        taken: The steps of a chain.
    """

    solver: str
    scheduler: SchedulerMixin
    steps: dict[str, Any]
    called: dict[str, Any]
    taken: ChainSteps

    @classmethod
    def plan(cls, pipe: DualRatePipeline, solver: str, steps: dict[str, Any], names_refreshes: bool) -> Self:
        """Plan a way.

        Args:
            pipe: The model.
            solver: Its name.
            steps: N, K and guidance.
            names_refreshes: Whether K is one that was asked for. Otherwise it is the model's, or the steps that the model
                names.

        Raises:
            ValueError: If there is no such way.
        """
        scheduler = make_dpm_solver(pipe.scheduler) if solver == "dpmsolver++" else pipe.scheduler
        called = steps if names_refreshes else steps | {"num_context_steps": None}
        n, k, is_pair = called["num_inference_steps"], called["num_context_steps"], pipe.context_encoder is not None
        taken = plan_steps(scheduler, SamplingDefaults.of(pipe.config), n, k, is_pair=is_pair)
        return cls(solver, scheduler, steps, called, taken)


def measure_sampling(
    pipe: DualRatePipeline, way: Way, asked: Asked, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str | None, Tensor]]:
    """Sample a set of images for each seed, and each prompt of the lists.

    Args:
        pipe: The model.
        way: How it is sampled.
        asked: What is drawn and measured.
        accelerator: Knows this process and how many there are.

    Returns:
        The metrics beside what an image costs; and the first images, by name of the list, of the samples under `None`.
    """
    own_scheduler, solver, steps, called, taken = pipe.scheduler, way.solver, way.steps, way.called, way.taken
    pipe.scheduler = way.scheduler
    plan, guidance = taken.plan, Guidance.of(steps["guidance_scale"], pipe.config.guidance_interval)
    per_seed, first, calls = [], dict[str | None, Tensor](), 0
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        for seed in asked.seeds:
            shown = shown_by(asked.images, choose(asked.images, asked.count, seed))
            batches = sampled_batches(pipe, shown, asked.count, seed, called, asked.batch_size, accelerator)
            measured = measure_images(batches, asked.extractors, asked.judges, accelerator)
            calls += math.ceil(asked.count / asked.batch_size)
            per_seed.append(metrics_of(measured, asked.reference, asked.count))
            assert measured.first is not None  # there are samples
            first.setdefault(None, measured.first)
    prompts = {}
    for name, (texts, judges) in asked.lists.items():
        found, first[name] = measure_prompts(pipe, texts, judges, asked.seeds, called, asked.batch_size, accelerator)
        prompts[name] = found
    pipe.scheduler = own_scheduler
    # Every way to sample proves what it evaluated, all processes together.
    heavy, light = plan.evaluations(spared := pipe.config.encoder_denoises)
    counted = [sum(counts) for counts in zip(*gather_object([evaluations]), strict=True)]
    if counted != [heavy * calls, light * calls]:
        raise RuntimeError(f"{solver} made {counted} evaluations of {heavy} and {light} in each of {calls} batches.")
    path = pipe.denoiser, pipe.context_encoder, plan
    report = {
        "solver": solver,
        **steps,
        "num_context_steps": heavy or None,
        "evaluations": {"context_encoder": heavy, "denoiser": light},
        "flops": plan_flops(*path, encoder_denoises=spared),
        "flops_with_guidance": plan_flops(*path, guided=taken.guided_by(guidance), encoder_denoises=spared),
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
