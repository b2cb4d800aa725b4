"""Choose for a budget how a model samples: number and order of its steps, which of them refresh, where guidance acts.

Candidates that cost at most the budget are tried on one set of noises. The best by a criterion is kept. By default the
criterion is an energy distance, from the samples of a long chain along the same noise. That chain has a fresh context at
every step that the pair knows one at. A distance image by image would prefer blander images: steps of first order, and less guidance.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .brownian import BrownianNoise
from .chain import make_chain
from .defaults import SamplingDefaults
from .evaluation import energy_distance
from .flops import context_flops, network_flops, plan_cost, text_flops
from .guidance import Guidance
from .pipeline import DualRatePipeline
from .prompts import Conditioning, check_prompts
from .ranges import check_choice, check_integer, check_number
from .refreshes import RefreshPlan, count_even_steps_above, plan_refreshes
from .sampling import sample_at_two_rates
from .scheduler import DualRateScheduler
from .steps import ChainSteps, plan_steps

UNITS = ("gflop", "milliseconds", "share")
"""Of a budget for one image: 10^9 FLOPs, time on this machine, or a share of what the heavy network alone costs."""
PLANNING_SEED = 7_000_003
"""All noise of a choice has seeds that begin with this number: no training, evaluation or report uses those."""

# Steps of the long chain, and the most that a plan has.
_LONG, _MOST_STEPS = 64, 64
# Even plans that cost less than this share of the budget are not tried at first: others use it better.
_LEAST_SHARE = 0.75
# Shares of the steps that a plan may take before its first refresh, and that guidance may leave out at either end.
_OPENINGS, _UNGUIDED = (0.0, 0.25, 1 / 3, 0.5, 2 / 3), ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.25, 0.25))
_TIMED_RUNS = 5


@dataclass(frozen=True)
class Choice:
    """A way to sample, what it costs an image, and how far its samples are from what they should be.

    Args:
        num_inference_steps: N.
        refresh_steps: The steps that refresh; `None` for a single-rate model.
        second_order: Whether the steps are those of the stochastic DPM-Solver++(2M).
        guidance_interval: Lowest and highest log-SNR at which guidance acts; `None` for all.
        cost: In the unit of the budget.
        score: By the criterion: the less the better.
    """

    num_inference_steps: int
    refresh_steps: tuple[int, ...] | None
    second_order: bool
    guidance_interval: tuple[float, float] | None
    cost: float
    score: float = math.inf

    @property
    def key(self) -> tuple:
        """What tells it from others."""
        return self.num_inference_steps, self.refresh_steps, self.second_order, self.guidance_interval

    @property
    def plan(self) -> RefreshPlan:
        """The plan that it follows. Printed, it is a diagram."""
        if self.refresh_steps is None:
            return RefreshPlan((False,) * self.num_inference_steps)
        return plan_refreshes(self.num_inference_steps, refresh_steps=self.refresh_steps)

    def apply_to(self, pipe: DualRatePipeline) -> DualRatePipeline:
        """A pipeline of the same networks that samples so by default; the one that is given stays as it is."""
        scheduler = DualRateScheduler.from_config(pipe.scheduler.config, second_order=self.second_order)
        planned = DualRatePipeline(**pipe.components | {"scheduler": scheduler}, **pipe.parameters)
        steps = self.refresh_steps
        planned.register_to_config(
            num_inference_steps=self.num_inference_steps,
            refresh_steps=None if steps is None else list(steps),
            num_context_steps=None if steps is None else len(steps),
            guidance_interval=None if self.guidance_interval is None else list(self.guidance_interval),
        )
        return planned


@dataclass(frozen=True)
class Planned:
    """What a choice was made from, as plan.json keeps it beside the model.

    Args:
        choice: The best of what was tried.
        tried: All that was tried and had a finite score, in its order.
        budget: What an image may cost.
        unit: One of `UNITS`.
        criterion: In words.
        num_images: Images that every candidate drew.
        seed: Of their noises, which are those of no report.
        machine: What milliseconds were taken on; `None` for FLOPs.
    """

    choice: Choice
    tried: tuple[Choice, ...]
    budget: float
    unit: str
    criterion: str
    num_images: int
    seed: int
    machine: str | None = None

    def to_json(self) -> dict:
        """The same as an object of names and values."""
        seeds = f"seed_of({PLANNING_SEED}, {self.seed}, image 0..{self.num_images - 1}, place)"
        return asdict(self) | {"seeds": seeds}


class _Search:
    """What all candidates share: the model, its images, and the prices of its evaluations."""

    def __init__(
        self, pipe: DualRatePipeline, num_images: int, seed: int, batch_size: int, prompts: Sequence[str] | None = None
    ):
        config = pipe.denoiser.config
        self.pipe, self.batch_size, self.defaults = pipe, batch_size, SamplingDefaults.of(pipe.config)
        known = prompts or range(config.num_classes or 0)
        shown = [known[i * len(known) // num_images] for i in range(num_images)] if known else None
        self.scale, interval = self.defaults.choose_guidance(None, None, shown is not None)
        self.conditioning = Conditioning(class_labels=shown)
        if prompts is not None:  # each is embedded once for all candidates
            text, mask, null, null_mask = pipe.encode_prompt(cast(list[str], shown), self.scale > 1)
            self.conditioning = Conditioning(None, None, None, text, null, mask, null_mask)
        self.interval = None if interval is None else (interval[0], interval[1])
        self.noise = BrownianNoise((num_images, config.in_channels, *pipe.denoiser.image_size), PLANNING_SEED, seed)
        self._steps: dict[int, ChainSteps] = {}
        self.tried: dict[tuple, Choice] = {}

    def _start(self, choice: Choice, rows: slice, guidance_scale: float | None = None):
        pipe, latents, is_pair = self.pipe, self.noise.start[rows], self.pipe.context_encoder is not None
        scheduler = DualRateScheduler.from_config(pipe.scheduler.config, second_order=choice.second_order)
        n, refreshes = choice.num_inference_steps, choice.refresh_steps
        steps = plan_steps(scheduler, self.defaults, n, refresh_steps=refreshes, is_pair=is_pair, device=pipe.device)
        return make_chain(
            pipe.denoiser,
            pipe.context_encoder,
            steps,
            self.defaults,
            pipe.device,
            conditioning=self.conditioning.of_rows(rows),
            guidance_scale=self.scale if guidance_scale is None else guidance_scale,
            guidance_interval=choice.guidance_interval or (-math.inf, math.inf),
            batch_size=len(latents),
            num_images_per_prompt=1,
            height=None,
            width=None,
            pixels_per_side=1,
            generator=None,
            latents=latents,
        )

    @torch.no_grad()
    def sample(self, choice: Choice) -> Tensor:
        """The images [B, C, H, W] that a choice draws."""
        parts = []
        for first in range(0, len(self.noise.start), self.batch_size):
            rows = slice(first, first + self.batch_size)
            chain, z = self._start(choice, rows)
            noise = self.noise.of_steps(chain.levels)

            def step(i, v, z, chain=chain, rows=rows, noise=noise):
                own = noise[i][rows].to(z.device)
                return chain.scheduler.step(v.float(), chain.timesteps[i], z, return_dict=False, variance_noise=own)[0]

            for state in sample_at_two_rates(z, chain.plan, chain.encode, chain.denoise, step):
                last = state.z
            parts.append(last.float().cpu())
        return torch.cat(parts)

    def price(self, unit: str) -> None:
        """Find what the evaluations cost in a unit."""
        pipe = self.pipe
        heavy, light, text = 0.0, float(network_flops(pipe.denoiser)), text_flops(pipe.denoiser)
        opening = light
        if pipe.context_encoder is not None:
            heavy = network_flops(pipe.context_encoder) + context_flops(pipe.denoiser)
            opening = network_flops(pipe.denoiser, with_context=False)
            text += text_flops(pipe.context_encoder)
        if unit == "milliseconds":  # a text takes next to none
            (heavy, light, opening), text = self._time(), 0
        scale = {"gflop": 1e9, "milliseconds": 1}.get(unit)
        if scale is None:  # the heavy network alone, at the model's own N
            alone = light if pipe.context_encoder is None else network_flops(pipe.context_encoder)
            scale = alone * pipe.config.num_inference_steps * (2 if self.scale > 1 else 1)
        self._prices = (heavy / scale, light / scale, opening / scale, text / scale)

    @torch.no_grad()
    def _time(self) -> tuple[float, float, float]:
        """Milliseconds an image of the heavy evaluation, the light one, and that without context: of one branch each."""
        refreshes = None if self.pipe.context_encoder is None else (0,)
        chain, z = self._start(Choice(1, refreshes, False, None, 0.0), slice(0, self.batch_size), guidance_scale=1.0)
        context = None if refreshes is None else chain.encode(0, z)[0]

        def time_of(evaluate: Callable[[], Tensor]) -> float:
            seconds = []
            for _ in range(1 + _TIMED_RUNS):
                start = time.perf_counter()
                evaluate().flatten()[0].item()  # which waits until it is there
                seconds.append(time.perf_counter() - start)
            return 1000 * statistics.median(seconds[1:]) / len(z)

        light, opening = time_of(lambda: chain.denoise(0, z, context)), time_of(lambda: chain.denoise(0, z, None))
        return 0.0 if context is None else time_of(lambda: chain.encode(0, z)[0].maps[0]), light, opening

    def cost(self, choice: Choice) -> float:
        """What an image costs by a choice."""
        n = choice.num_inference_steps
        if n not in self._steps:
            self._steps[n] = plan_steps(self.pipe.scheduler, self.defaults, n, is_pair=False)
        guided = self._steps[n].guided_by(Guidance.of(self.scale, choice.guidance_interval))
        spared = self.pipe.config.encoder_denoises
        return plan_cost(choice.plan, *self._prices, guided=guided, encoder_denoises=spared)

    def intervals(self) -> list[tuple[float, float] | None]:
        """Intervals of guidance to try: the model's own, all log-SNRs, and those that leave out steps at the ends."""
        if self.scale == 1:
            return [self.interval]
        scheduler, found = self.pipe.scheduler, [self.interval, *({None} - {self.interval})]
        for noisy, clean in _UNGUIDED[1:]:
            times = torch.tensor([1 - noisy, clean], dtype=torch.float64) * len(scheduler)
            low, high = scheduler.log_snr(times).tolist()
            found.append((low - 1e-3, high - 1e-3 if clean else high))
        return found

    def fill(self, n: int, alone: int, second_order: bool, interval, budget: float) -> Choice | None:
        """The choice of N steps with an opening and as many refreshes, evenly spread, as the budget allows."""
        for k in (None,) if self.pipe.context_encoder is None else range(n - alone, 0, -1):
            plan = plan_refreshes(n, k, num_steps_alone=alone)
            steps = None if k is None else tuple(i for i in range(n) if plan[i])
            choice = Choice(n, steps, second_order, interval, 0.0)
            choice = replace(choice, cost=self.cost(choice))
            if choice.cost <= budget:
                return choice
        return None

    def starts(self, n: int) -> range:
        """Steps where the first refresh of N may be: a late pair knows no context above its `context_from`."""
        if self.pipe.context_encoder is None or not self.defaults.context_free:
            return range(1)
        return range(count_even_steps_above(n, self.defaults.context_from or 1.0), n)

    def openings(self, n: int) -> list[int]:
        """Numbers of steps to try before the first refresh; none where N steps are too few for a context."""
        starts = self.starts(n)
        return sorted({*starts[:1], *(round(share * n) for share in _OPENINGS)} & {*starts})

    def first_candidates(self, budget: float, interval: tuple[float, float] | None) -> list[Choice]:
        """Even plans that use the budget, from few steps to many."""
        found: list[Choice] = []
        for n in range(1, _MOST_STEPS + 1):
            filled = [self.fill(n, alone, True, interval, budget) for alone in self.openings(n)]
            if filled and not any(filled):
                break
            found += filter(None, filled)
        used = [choice for choice in found if choice.cost >= _LEAST_SHARE * budget]
        return used or found

    def least_cost(self) -> float:
        """What an image costs by the fewest steps that there are, guided at the fewest of them."""
        n = next(n for n in range(1, _MOST_STEPS + 1) if self.openings(n))
        steps = None if self.pipe.context_encoder is None else (n - 1,)
        return min(self.cost(Choice(n, steps, True, interval, 0.0)) for interval in self.intervals())

    def neighbours(self, choice: Choice, budget: float) -> list[Choice]:
        """What differs from a choice in one thing: order, one refresh by a step, guidance, steps."""
        n, steps = choice.num_inference_steps, choice.refresh_steps or ()
        alone = choice.plan.num_steps_alone if steps else 0
        found: list[Choice | None] = [replace(choice, second_order=not choice.second_order)]
        for i in range(len(steps)):
            for moved in (steps[i] - 1, steps[i] + 1):
                others = (*steps[:i], moved, *steps[i + 1 :])
                is_plan = all(a < b for a, b in zip((-1, *others), (*others, n), strict=True))
                if is_plan and others[0] in self.starts(n):
                    found.append(replace(choice, refresh_steps=others))
        intervals = [interval for interval in self.intervals() if interval != choice.guidance_interval]
        found += [self.fill(n, alone, choice.second_order, interval, budget) for interval in intervals]
        for count in (n - 1, n + 1):
            for opening in self.openings(count) if count > 0 else ():
                found.append(self.fill(count, opening, choice.second_order, choice.guidance_interval, budget))
        priced = [replace(each, cost=self.cost(each), score=math.inf) for each in found if each is not None]
        return [each for each in priced if each.cost <= budget]

    def go(
        self,
        criterion: Callable[[Tensor], float],
        waiting: list[Choice],
        budget: float,
        num_trials: int,
        note: Callable[[], object],
    ) -> None:
        """Try the waiting choices, then the neighbours of the best choice whose neighbours were not tried, and so on."""
        first, best, begun = len(waiting), math.inf, set()
        while len(self.tried) < num_trials:
            if not waiting:
                others = [choice for key, choice in self.tried.items() if key not in begun]
                if not others:
                    return
                centre = min(others, key=lambda choice: choice.score)
                begun.add(centre.key)
                waiting = self.neighbours(centre, budget)
                continue
            choice = waiting.pop(0)
            if choice.key in self.tried:
                continue
            score = float(criterion(self.sample(choice)))
            choice = replace(choice, score=math.inf if math.isnan(score) else score)
            self.tried[choice.key] = choice
            note()
            if choice.score < best:
                best = choice.score
                if len(self.tried) > first:
                    waiting = []  # rather what is next to this one


def plan_for(
    pipe: DualRatePipeline,
    budget: float,
    *,
    unit: str = "gflop",
    criterion: Callable[[Tensor], float] | None = None,
    prompts: Sequence[str] | None = None,
    num_images: int = 64,
    seed: int = 0,
    num_trials: int = 40,
    batch_size: int = 16,
) -> Planned:
    """Choose how a model samples within a budget: N, refreshes, order of the steps, and where guidance acts.

    Half of the trials are even plans of all sizes that use the budget. Each of the others differs in one thing from the
    best so far, so refreshes may become uneven. Guidance has the model's own scale.

    Args:
        pipe: The model; it stays as it is.
        budget: What an image may cost, guidance included.
        unit: One of `UNITS`. Milliseconds are those of the networks on this machine; the share is of the heavy network alone
            at the model's own N.
        criterion: Images [B, C, H, W] in about [-1, 1] to a number, the less the better; `None` for the energy distance
            from a long chain along the same noise.
        prompts: For a model of text, what the images show; where there are more images, several show the same.
        num_images: Images that every candidate draws, of classes or prompts evenly spread over all.
        seed: Of their noises.
        num_trials: Candidates to try at most.
        batch_size: Images of a batch.

    Raises:
        ValueError: If an argument is out of its range, no plan costs so little, or none has a finite score.
    """
    check_choice("unit", unit, UNITS)
    check_number("budget", budget, above=0)
    check_integer("num_images", num_images, 2)
    check_integer("num_trials", num_trials, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0, 2**32 - 1)
    if not isinstance(pipe.scheduler, DualRateScheduler):
        raise ValueError(f"A plan is one for DualRateScheduler, and the model has {type(pipe.scheduler).__name__}.")
    if pipe.denoiser.config.cross_attention_dim is not None or prompts is not None:
        prompts = check_prompts("prompts of a model of text", prompts)
    pipe.plan_run(_MOST_STEPS, 1 if pipe.context_encoder else None)  # refuses a first context after all steps
    search = _Search(pipe, num_images, seed, batch_size, prompts)
    search.price(unit)
    waiting = next(filter(None, (search.first_candidates(budget, each) for each in search.intervals())), [])
    if not waiting:
        raise ValueError(f"budget={budget} {unit} is less than the cheapest plan costs, {search.least_cost():.4g}.")
    first = min(len(waiting), (num_trials + 1) // 2)
    waiting = [waiting[i * len(waiting) // first] for i in range(first)]

    with pipe.progress_bar(total=num_trials) as progress_bar:
        if criterion is None:
            criterion = _distance_from_long_chain(search)
        search.go(criterion, waiting, budget, num_trials, progress_bar.update)
    if not (known := tuple(choice for choice in search.tried.values() if math.isfinite(choice.score))):
        raise ValueError(f"The criterion gave no finite number for any of {len(search.tried)} plans: see its images.")
    machine = f"{platform.machine()}, {pipe.device}, {torch.get_num_threads()} threads"
    name = getattr(criterion, "__name__", type(criterion).__name__)
    told = budget, unit, name, num_images, seed, machine if unit == "milliseconds" else None
    return Planned(min(known, key=lambda choice: choice.score), known, *told)


def _distance_from_long_chain(search: _Search) -> Callable[[Tensor], float]:
    refreshes = None if search.pipe.context_encoder is None else tuple(range(search.starts(_LONG)[0], _LONG))
    expected = search.sample(Choice(_LONG, refreshes, True, search.interval, 0.0))

    def energy_distance_from_long_chain(images: Tensor) -> float:
        return energy_distance(images, expected)

    return energy_distance_from_long_chain
