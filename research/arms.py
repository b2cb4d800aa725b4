"""What the study compares: arms, each a trained model and a way to sample it.

A new arm is an entry of ARMS, and where no training fits it, one of `networks.TRAININGS`. An arm whose name begins with
"dual-rate" is held against all whose name does not.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from diffusers_dualrate.refreshes import plan_refreshes

from .rivals import FeatureReuseTrunk
from .train_unet import timesteps_of

DDIM_TIMESTEPS = 960


@dataclass(frozen=True)
class Sampler:
    """A model made ready to sample.

    Args:
        draw: (class labels, one generator for each image) → images [B, C, H, W].
        evaluations: Parts of the model, by name, and how often each must run in one call of `draw`: the proof that a
            method did what its name says.
    """

    draw: Callable[[list[int], list[torch.Generator]], Tensor]
    evaluations: dict[str, tuple[nn.Module, int]]


def make_scheduler(solver: str, ours: DualRateScheduler) -> SchedulerMixin:
    """The scheduler of a solver, for the process of our own scheduler."""
    if solver == "ancestral":
        return ours
    if solver == "ddim":
        # Its steps are whole timesteps long, so N must divide their number: else every step ends at another noise level
        # than the next one starts from.
        ours = DualRateScheduler.from_config(ours.config, num_train_timesteps=DDIM_TIMESTEPS)
    process = {"trained_betas": ours.betas.tolist(), "prediction_type": "v_prediction"}
    if solver == "ddim":
        return DDIMScheduler(**process, num_train_timesteps=DDIM_TIMESTEPS, timestep_spacing="trailing")
    return make_dpmsolver(solver, **process)


def make_dpmsolver(solver: str, **process) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M): its deterministic path in steps even in log-SNR, its stochastic one in steps even in time."""
    if solver == "sde-dpmsolver++":
        return DPMSolverMultistepScheduler(**process, algorithm_type=solver, timestep_spacing="trailing")
    assert solver == "dpmsolver++"
    return DPMSolverMultistepScheduler(**process, use_lu_lambdas=True)


def open_pipeline(folder: Path, solver: str, **options) -> DualRatePipeline:
    """A trained model with a solver and options of the pipeline, on the device that trainings use, too."""
    pipe = DualRatePipeline.from_pretrained(folder, **options).to(PartialState().device)
    pipe.scheduler = make_scheduler(solver, pipe.scheduler)
    for network in filter(None, (pipe.denoiser, pipe.context_encoder)):
        network.to(memory_format=torch.channels_last)  # on a CPU 1.5 times as fast
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sampler(pipe: DualRatePipeline, n: int, k: int | None = None, late: bool = False, **evaluations) -> Sampler:
    """Sample a pipeline with N and K, its networks' evaluations counted beside those named.

    Late, the refreshes are the last K steps; else they are spread as the pipeline spreads them.
    """
    refreshes = {"refresh_steps": list(range(n - k, n))} if late else {"num_context_steps": k}

    def draw(labels, generators):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*takes other steps than those the pair")
            options = {"guidance_scale": 1.0, "output_type": "latent"} | refreshes
            return pipe(labels, n, generator=generators, **options).images

    evaluations["denoiser"] = (pipe.denoiser, n - k if pipe.config.encoder_denoises else n)
    if pipe.context_encoder is not None:
        evaluations["context_encoder"] = (pipe.context_encoder, k)
    return Sampler(draw, evaluations)


def sample_as_trained(folder: Path, solver: str, n: int, k: int | None) -> Sampler:
    """A pair or a single-rate network with N and K."""
    return make_sampler(open_pipeline(folder, solver), n, k)


def sample_host(folder: Path, solver: str, n: int, k: None) -> Sampler:
    """A model of diffusers, as it is, in our own process."""
    return make_sampler(open_pipeline(folder, solver, scheduler=DualRateScheduler()), n)


def sample_late(folder: Path, solver: str, n: int, k: int) -> Sampler:
    """A pair whose denoiser goes without context until the last K steps, which have a fresh one each."""
    return make_sampler(open_pipeline(folder, solver), n, k, late=True)


def sample_converted(folder: Path, solver: str, n: int, k: int) -> Sampler:
    """A conversion whose denoiser runs at every step, at refreshes too."""
    return make_sampler(open_pipeline(folder, solver, encoder_denoises=False), n, k)


def sample_spared(folder: Path, solver: str, n: int, k: int) -> Sampler:
    """A conversion whose encoder denoises at refreshes, so that the denoiser is spared there."""
    return make_sampler(open_pipeline(folder, solver, encoder_denoises=True), n, k)


def sample_without_context(folder: Path, solver: str, n: int, k: None) -> Sampler:
    """A pair's denoiser alone: its context-free branch."""
    pipe = open_pipeline(folder, solver)
    without = DualRatePipeline(pipe.denoiser, pipe.scheduler)
    without.set_progress_bar_config(disable=True)
    return make_sampler(without, n)


def sample_with_reuse(folder: Path, solver: str, n: int, k: int) -> Sampler:
    """A single-rate network that computes its deep levels K times."""
    pipe = open_pipeline(folder, solver)
    pipe.denoiser.trunk = FeatureReuseTrunk(pipe.denoiser.trunk, plan_refreshes(n, k))
    return make_sampler(pipe, n, deep_levels=(pipe.denoiser.trunk.trunk.middle, k))


def sample_stitched(folder: Path, light_folder: Path, solver: str, n: int, k: int) -> Sampler:
    """Two single-rate networks in one chain (T-Stitch, arXiv 2402.14167): the light one, then the heavy one for K steps."""
    heavy = open_pipeline(folder, solver).denoiser
    return stitch(light_folder, heavy, {"heavy": heavy}, solver, n, k)


def sample_stitched_to_unet(folder: Path, light_folder: Path, solver: str, n: int, k: int) -> Sampler:
    """The light network, then a `UNet2DModel` for K steps."""
    unet = DDIMPipeline.from_pretrained(folder).unet.to(PartialState().device, memory_format=torch.channels_last)
    ours = DualRatePipeline.from_pretrained(light_folder).scheduler

    def denoise(z, log_snr, class_labels, *_):
        return unet(z, timesteps_of(log_snr, ours), class_labels=class_labels)

    return stitch(light_folder, denoise, {"heavy": unet}, solver, n, k)


def sample_stitched_to_pair(folder: Path, light_folder: Path, solver: str, n: int, k: int) -> Sampler:
    """The light network, then both networks of a pair for K steps: at fresh contexts they are one larger network."""
    pipe = open_pipeline(folder, solver)
    encoder, denoiser = pipe.context_encoder, pipe.denoiser

    def denoise(z, log_snr, class_labels, *_):
        context = denoiser.project_context(encoder(z, log_snr, class_labels).context)
        return denoiser(z, log_snr, class_labels, context, log_snr)

    return stitch(light_folder, denoise, {"context_encoder": encoder, "heavy": denoiser}, solver, n, k)


def stitch(light_folder: Path, denoise: Callable, parts: dict, solver: str, n: int, k: int) -> Sampler:
    """The light network for N - K steps, then `denoise`, each of whose parts runs K times."""
    pipe = open_pipeline(light_folder, solver)
    light, is_heavy = pipe.denoiser.forward, itertools.cycle([False] * (n - k) + [True] * k)
    pipe.denoiser.forward = lambda *inputs: denoise(*inputs) if next(is_heavy) else light(*inputs)
    counted = {name: (part, k) for name, part in parts.items()}
    return make_sampler(pipe, n, light=(pipe.denoiser.trunk, n - k), **counted)


def sample_with_deepcache(folder: Path, solver: str, n: int, k: int) -> Sampler:
    """A `UNet2DModel` whose deep features the DeepCache package computes K times, in every (N / K)-th step."""
    from DeepCache import DeepCacheSDHelper

    device = PartialState().device
    pipe = DDIMPipeline.from_pretrained(folder)
    unet, scheduler = pipe.unet.to(device, memory_format=torch.channels_last), pipe.scheduler
    if solver != "ddim":
        process = {name: scheduler.config[name] for name in ("trained_betas", "prediction_type")}
        scheduler = make_dpmsolver(solver, **process)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=n // k, cache_branch_id=0)

    @torch.no_grad()
    def draw(labels, generators):
        shape = (len(labels), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        z, class_labels = randn_tensor(shape, generators, device), torch.tensor(labels, device=device)
        scheduler.set_timesteps(n, device=device)
        helper.enable()
        for t in scheduler.timesteps:
            v = unet(z, t, class_labels=class_labels).sample
            z = scheduler.step(v, t, z, generator=generators, return_dict=False)[0]
        helper.disable()
        return z

    return Sampler(draw, {"denoiser": (unet.conv_in, n), "deep_levels": (unet.mid_block.resnets[0], k)})


@dataclass(frozen=True)
class Arm:
    """What is compared: how to train (a name in TRAININGS), how to sample, and the (N, K) of every solver.

    An arm that requires a package which is not installed is left out. One with a second network, `beside`, a training's
    name too, gives its sampler both folders.
    """

    training: str
    sample: Callable[..., Sampler]
    steps: dict[str, tuple[tuple[int, int | None], ...]]
    requires: str | None = None
    beside: str | None = None

    @property
    def trainings(self) -> tuple[str, ...]:
        """All that it is made of."""
        return tuple(filter(None, (self.training, self.beside)))


def _single(*counts):
    return tuple((n, None) for n in counts)


_FEW = {
    "ddim": _single(4, 6, 8, 12, 16, 32, 64),
    "dpmsolver++": _single(4, 5, 6, 8, 12, 16, 32),
    "sde-dpmsolver++": _single(4, 5, 6, 8, 10, 12, 16, 24, 32),
}
_SHARED = {
    "ancestral": (
        *((64, 16), (64, 8), (32, 16), (32, 8), (32, 4), (16, 8), (16, 4)),
        *((12, 6), (12, 3), (8, 4), (8, 2), (6, 3), (6, 2), (4, 2)),
    ),
    "ddim": ((16, 8), (16, 4), (12, 6), (12, 4), (10, 5), (8, 4), (8, 2), (6, 3), (6, 2)),
    "dpmsolver++": ((16, 8), (12, 6), (10, 5), (8, 4), (8, 2), (6, 3), (6, 2), (4, 2)),
    "sde-dpmsolver++": (
        *((32, 16), (32, 8), (24, 6), (16, 8), (16, 4), (12, 6), (12, 4), (12, 3)),
        *((10, 5), (8, 4), (8, 2), (6, 3), (6, 2), (4, 2)),
    ),
}
# The light network alone, then K steps that are all heavy: of second order, and of as many first-order ones as pay.
_LATE = {
    "ancestral": ((8, 4), (8, 3), (6, 4), (6, 3)),
    "dpmsolver++": ((8, 4), (6, 3), (5, 3), (4, 2)),
    "sde-dpmsolver++": (
        *((12, 8), (12, 6), (10, 5), (10, 3), (8, 6), (8, 4), (8, 3), (8, 2)),
        *((6, 4), (6, 3), (6, 2), (5, 3), (5, 2), (4, 3), (4, 2), (4, 1)),
    ),
}
# K spread over the steps below the time of the first context, which are half of the N.
_LATE_SHARED = {
    "ancestral": ((64, 8), (32, 8), (32, 4), (16, 4), (8, 2)),
    "dpmsolver++": ((12, 3), (8, 2)),
    "sde-dpmsolver++": ((24, 6), (16, 4), (12, 3), (8, 2), (4, 1)),
}
ARMS = {
    "single-rate": Arm(
        "heavy",
        sample_as_trained,
        {
            "ancestral": _single(3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256),
            "ddim": _single(4, 5, 6, 8, 10, 12, 16, 32, 64),
            "dpmsolver++": _single(3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32),
            "sde-dpmsolver++": _single(3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48),
        },
    ),
    "single-rate-light": Arm("light", sample_as_trained, {"ancestral": _single(8, 16, 64, 256), **_FEW}),
    "single-rate-sized": Arm("sized", sample_as_trained, {"ancestral": _single(6, 8, 12, 16, 32, 64, 128), **_FEW}),
    "dual-rate": Arm("pair", sample_as_trained, {**_SHARED, "ancestral": ((128, 16), *_SHARED["ancestral"])}),
    "dual-rate-context-dropout": Arm("dropout-pair", sample_as_trained, _SHARED),
    "dual-rate-converted": Arm("converted", sample_converted, _SHARED),
    "dual-rate-converted-spared": Arm("converted", sample_spared, _SHARED),
    "dual-rate-half-fresh": Arm("half-fresh-pair", sample_as_trained, _SHARED),
    "dual-rate-no-context": Arm(
        "dropout-pair",
        sample_without_context,
        {"ancestral": _single(64), "ddim": _single(16), "dpmsolver++": _single(8), "sde-dpmsolver++": _single(12)},
    ),
    "feature-reuse": Arm(
        "heavy",
        sample_with_reuse,
        {
            "ancestral": ((64, 16), (64, 8), (32, 16), (32, 8), (16, 8), (16, 4), (8, 4), (8, 2)),
            "ddim": ((32, 16), (16, 8), (8, 4)),
            "dpmsolver++": ((16, 8), (12, 6), (12, 4), (8, 4), (6, 3)),
            "sde-dpmsolver++": ((32, 16), (16, 8), (16, 4), (12, 6), (12, 4), (8, 4)),
        },
    ),
    "stitching": Arm(
        "heavy",
        sample_stitched,
        {
            "ancestral": ((16, 8), (12, 6), (12, 4), (8, 6), (8, 4), (8, 2), (6, 3)),
            "ddim": ((16, 8), (12, 6), (8, 4), (6, 3)),
            "dpmsolver++": (
                *((16, 8), (12, 8), (12, 6), (12, 4), (10, 5), (8, 6), (8, 4), (8, 2)),
                *((6, 4), (6, 3), (6, 2)),
            ),
            "sde-dpmsolver++": (
                *((24, 12), (16, 8), (12, 8), (12, 6), (12, 4), (10, 5), (10, 3), (8, 6), (8, 4), (8, 3), (8, 2)),
                *((6, 4), (6, 3), (6, 2), (5, 3), (4, 2)),
            ),
        },
        beside="light",
    ),
    "encoder-sharing": Arm("fresh-pair", sample_as_trained, _SHARED),
    "deepcache": Arm(
        "unet",
        sample_with_deepcache,
        {
            # Divisors of the 1,000 timesteps that this network knows, see `make_scheduler`.
            "ddim": ((50, 50), (20, 20), (10, 10), (50, 25), (40, 20), (40, 10), (20, 10), (10, 5)),
            "dpmsolver++": ((16, 16), (8, 8), (7, 7), (6, 6), (5, 5), (16, 8), (12, 6), (8, 4)),
            "sde-dpmsolver++": ((16, 16), (12, 12), (8, 8), (6, 6), (5, 5), (4, 4), (16, 8), (12, 6), (8, 4)),
        },
        requires="DeepCache",
    ),
    "stitching-unet": Arm("unet", sample_stitched_to_unet, _LATE, beside="light"),
    # The whole pair at fresh contexts, one network that is larger than the heavy one: is it the context, or the size?
    "stitching-pair": Arm("fresh-pair", sample_stitched_to_pair, _LATE, beside="light"),
    "dual-rate-late": Arm("late-pair", sample_late, _LATE),
    "dual-rate-late-shared": Arm("late-pair", sample_as_trained, _LATE_SHARED),
    "dual-rate-late-converted": Arm("late-converted", sample_spared, _LATE_SHARED),
    # Students have the steps that they were distilled for.
    "single-rate-mmd": Arm("heavy-mmd", sample_as_trained, {"ancestral": _single(8)}),
    "dual-rate-mmd": Arm("pair-mmd", sample_as_trained, {"ancestral": ((8, 2),)}),
    "dual-rate-half-fresh-mmd": Arm("half-fresh-pair-mmd", sample_as_trained, {"ancestral": ((8, 2),)}),
    "dual-rate-mmd-full-rollout": Arm("pair-mmd-full-rollout", sample_as_trained, {"ancestral": ((8, 2),)}),
    "dual-rate-mmd-4-steps": Arm("pair-mmd-4-steps", sample_as_trained, {"ancestral": ((4, 2),)}),
    "dual-rate-mmd-2-steps": Arm("pair-mmd-2-steps", sample_as_trained, {"ancestral": ((2, 1),)}),
    "dual-rate-late-mmd": Arm("late-pair-mmd", sample_as_trained, {"ancestral": ((4, 2),)}),
    "dual-rate-late-mmd-2-steps": Arm("late-pair-mmd-2-steps", sample_as_trained, {"ancestral": ((2, 1),)}),
    # A `UNet2DModel`, taken as it is.
    "single-rate-unet": Arm(
        "unet",
        sample_host,
        {
            "ancestral": _single(2, 3, 4, 5, 6, 8, 12, 16, 32),
            "dpmsolver++": _single(3, 4),
            "sde-dpmsolver++": _single(2, 3, 4),
        },
    ),
    "single-rate-unet-mmd": Arm("unet-mmd", sample_as_trained, {"ancestral": _single(8)}),
    "single-rate-unet-mmd-4-steps": Arm("unet-mmd-4-steps", sample_as_trained, {"ancestral": _single(4)}),
    "single-rate-unet-mmd-2-steps": Arm("unet-mmd-2-steps", sample_as_trained, {"ancestral": _single(2)}),
    "dual-rate-unet-converted-spared": Arm("unet-converted", sample_spared, _SHARED),
    "dual-rate-unet-mmd": Arm("unet-pair-mmd", sample_as_trained, {"ancestral": ((8, 2),)}),
    "dual-rate-unet-mmd-4-steps": Arm("unet-pair-mmd-4-steps", sample_as_trained, {"ancestral": ((4, 2),)}),
    "dual-rate-unet-mmd-4-steps-1-context": Arm(
        "unet-pair-mmd-4-steps-1-context", sample_as_trained, {"ancestral": ((4, 1),)}
    ),
    "dual-rate-unet-mmd-2-steps": Arm("unet-pair-mmd-2-steps", sample_as_trained, {"ancestral": ((2, 1),)}),
}
