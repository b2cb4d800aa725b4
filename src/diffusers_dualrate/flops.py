"""Compute of one image as a function of (N, K), counted rather than guessed.

Two units. FLOPs are 2 x multiply-adds of everything an evaluation runs, attention included, counted by running the
network without data on the meta device: the same counter returns 0 for attention on a CPU. The paper's unit, for
comparison with published tables only, is multiply-adds of the main blocks alone, for a square map of side H and c
channels: Res 18 c² H², Transformer 12 c² H² + 2 H⁴ c; for depthwise blocks, which the paper does not have,
(2 c + 9) c H².
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .models import UViTContextEncoder, UViTDenoiser
from .pipeline import DualRatePipeline
from .recipes import DistillationRecipe, Recipe
from .refreshes import RefreshPlan, plan_refreshes
from .uvit import UViTStage


def _size(network: UViTContextEncoder | UViTDenoiser, size: tuple[int, int] | None) -> tuple[int, int]:
    size = network.config.sample_size if size is None else size
    return (size, size) if isinstance(size, int) else tuple(size)


def network_flops(
    network: UViTContextEncoder | UViTDenoiser, size: tuple[int, int] | None = None, *, with_context: bool = True
) -> int:
    """FLOPs of one evaluation for one image.

    Adding a projected context costs additions only, which are not counted.

    Args:
        network: Either network, compiled or not; it is neither run nor changed.
        size: Height and width; default: its `sample_size`.
        with_context: Whether a denoiser that takes context is given one.
    """
    network = cast(
        UViTContextEncoder | UViTDenoiser, getattr(network, "_orig_mod", network)
    )  # what `torch.compile` wrapped
    height, width = _size(network, size)
    with torch.device("meta"):
        copy = type(network).from_config(network.config).eval()
        sample = torch.empty(1, network.config.in_channels, height, width)
        inputs = {"sample": sample, "log_snr": torch.empty(1)}
        if with_context and isinstance(copy, UViTDenoiser) and copy.config.context_channels is not None:
            trunk_input = torch.empty(1, copy.trunk.patch_embed.in_channels, height, width)
            context = copy.trunk(trunk_input, torch.empty(1, copy.config.embedding_dim))
            if copy.config.prediction_hand_over:
                context = (*context, sample, sample, sample[:, :1])
            inputs |= {"context": context, "context_log_snr": torch.empty(1)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy(**inputs)
    return counter.get_total_flops()


@contextlib.contextmanager
def count_evaluations(*networks: nn.Module | None) -> Iterator[list[int]]:
    """Count the forward passes of networks while the block runs, in the list it yields; absent networks stay at 0."""
    counts = [0] * len(networks)

    def counter(position: int):
        def count(*_):
            counts[position] += 1

        return count

    handles = [net.register_forward_hook(counter(i)) for i, net in enumerate(networks) if net is not None]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def context_flops(denoiser: UViTDenoiser, size: tuple[int, int] | None = None) -> int:
    """FLOPs of projecting one context for one image, which the denoiser does once per refresh."""
    height, width = _size(denoiser, size)
    total, side = 0, denoiser.config.patch_size
    for projection in cast(Iterable[nn.Conv2d], denoiser.context_proj):
        total += 2 * projection.in_channels * projection.out_channels * (height // side) * (width // side)
        side *= 2
    return total


def image_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None = None,
    *,
    num_inference_steps: int,
    num_context_steps: int = 0,
    num_steps_alone: int = 0,
    guided: bool = False,
    encoder_denoises: bool = False,
    size: tuple[int, int] | None = None,
) -> int:
    """FLOPs of generating one image: K heavy evaluations with their projections, N or N − K light ones.

    For a plan that is more than these counts, or guidance at some steps only, there is [`plan_flops`].

    Args:
        denoiser: Network that runs at every step, or where the encoder does not.
        context_encoder: Network that runs K times; `None` for a single-rate model.
        num_inference_steps: N.
        num_context_steps: K, from 1 to N with an encoder; without meaning for a single-rate model.
        num_steps_alone: Steps before the first refresh, which a pair takes without context.
        guided: Whether guidance evaluates both branches at every step, which doubles everything.
        encoder_denoises: Whether the light network is spared at refreshes, as the pipeline's option of this name does.
        size: Height and width; default: the denoiser's `sample_size`.
    """
    plan = RefreshPlan((False,) * num_inference_steps)
    if context_encoder is not None:
        plan = plan_refreshes(num_inference_steps, num_context_steps, num_steps_alone=num_steps_alone)
    return plan_flops(
        denoiser, context_encoder, plan, guided=[guided] * len(plan), encoder_denoises=encoder_denoises, size=size
    )


def plan_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None,
    plan: RefreshPlan,
    *,
    guided: Sequence[bool] | None = None,
    encoder_denoises: bool = False,
    size: tuple[int, int] | None = None,
) -> int:
    """FLOPs of generating one image by a plan.

    Args:
        denoiser: Network that runs at every step, or where the encoder does not.
        context_encoder: Network that runs at refreshes; `None` for a single-rate model.
        plan: Which steps refresh.
        guided: Whether each step evaluates both branches; `None` for none. A refresh encodes both if a step that it serves
            does.
        encoder_denoises: As for [`image_flops`].
        size: Height and width; default: the denoiser's `sample_size`.
    """
    size = _size(denoiser, size)
    light = opening = network_flops(denoiser, size)
    heavy = 0
    if context_encoder is not None:
        heavy = network_flops(context_encoder, size) + context_flops(denoiser, size)
        opening = network_flops(denoiser, size, with_context=False)
    return round(plan_cost(plan, heavy, light, opening, guided=guided, encoder_denoises=encoder_denoises))


def plan_cost(
    plan: RefreshPlan,
    heavy: float,
    light: float,
    opening: float,
    *,
    guided: Sequence[bool] | None = None,
    encoder_denoises: bool = False,
) -> float:
    """What an image costs by a plan, in whatever unit the three kinds of evaluation are priced in.

    Args:
        plan: Which steps refresh.
        heavy: Price of the context encoder with the projection.
        light: Price of the denoiser.
        opening: Price of the denoiser before the first refresh, without context.
        guided: As for [`plan_flops`].
        encoder_denoises: As for [`image_flops`].
    """
    branches, alone = [2 if guides else 1 for guides in guided or [False] * len(plan)], plan.num_steps_alone
    total: float = 0
    for i, refreshes in enumerate(plan):
        if refreshes:
            total += max(branches[j] for j in plan.until_next(i)) * heavy
        if not (refreshes and encoder_denoises):
            total += branches[i] * (opening if i < alone else light)
    return total


def target_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None = None,
    *,
    context_dropout: float = 0.0,
    size: tuple[int, int] | None = None,
) -> float:
    """FLOPs of a forward pass in training for each denoising target, a noisy image at one t; a whole step is thrice that.

    Rows that see no context, a share p, spare the encoder and run the context-free branch, whose cost is F, so it is
    p F + (1 − p)(L + H + projection).

    Args:
        denoiser: The network that sees every target.
        context_encoder: The network that makes the contexts; `None` for a single-rate model.
        context_dropout: Share p of the rows of a batch that see no context.
        size: Height and width; default: the denoiser's `sample_size`.
    """
    size = _size(denoiser, size)
    light = network_flops(denoiser, size)
    if context_encoder is None:
        return light
    heavy = network_flops(context_encoder, size) + context_flops(denoiser, size)
    free = network_flops(denoiser, size, with_context=False)
    return context_dropout * free + (1 - context_dropout) * (light + heavy)


def training_image_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None = None,
    *,
    context_dropout: float = 0.0,
    frozen: bool = False,
    followed: bool = False,
) -> float:
    """FLOPs of training for each denoising target, forwards and backwards, a backward pass being two forward ones.

    Args:
        denoiser: The network that sees every target.
        context_encoder: The network that makes the contexts; `None` for a single-rate model.
        context_dropout: Share p of the rows of a batch that see no context.
        frozen: Whether the encoder learns nothing but what it hands over, so that it runs forwards only.
        followed: Whether the denoiser learns what the encoder predicts at t, for which it runs once more.
    """
    total = 3 * target_flops(denoiser, context_encoder, context_dropout=context_dropout)
    if frozen:
        assert context_encoder is not None  # it is the encoder that is frozen
        total -= (1 - context_dropout) * (2 * network_flops(context_encoder) + context_flops(denoiser))
    if followed:
        assert context_encoder is not None  # it is the encoder that is followed
        total += (1 - context_dropout) * (network_flops(context_encoder) + context_flops(denoiser))
    return total


def distillation_image_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None,
    teacher: UViTDenoiser,
    recipe: DistillationRecipe,
) -> dict[str, int]:
    """FLOPs for each image of a batch in every phase of a distillation.

    R: rollout without gradient. P: the student's prediction. T: cost of the teacher, which runs G times, and of the
    auxiliary of its shape. Auxiliary step: R + P + (G + 3) T. Student step: R + 3 P + (G + 1) T.

    Args:
        denoiser: The student's.
        context_encoder: The student's, if it has one.
        teacher: Its network.
        recipe: How it is distilled.
    """
    plan, light, judge = recipe.plan, network_flops(denoiser), network_flops(teacher)
    n, k, alone = len(plan), plan.num_context_steps, plan.num_steps_alone
    encode, project = 0, 0
    if context_encoder is not None:
        encode, project = network_flops(context_encoder), context_flops(denoiser)
    interval = (n - alone) // k
    rollout = (interval - 1) * light
    opening = network_flops(denoiser, with_context=False) if alone else 0
    if recipe.full_rollout:  # from noise to the segment, too
        rollout += alone * opening + (n - alone - interval) * light + (k - 1) * (encode + project)
    predict = light + encode + project

    def mean(behind: int, before: int) -> int:
        """Of a row behind the first refresh and one before it, as often as they are drawn."""
        return ((n - alone) * behind + alone * before) // n

    judged = 2 if recipe.guidance_scale > 1 and teacher.config.num_classes else 1
    return {
        "pretraining": mean(3 * light + 2 * project + encode, 3 * opening),  # with the encoder frozen
        "auxiliary": mean(rollout + predict, alone * opening) + (judged + 3) * judge,
        "student": mean(rollout + 3 * predict, (alone + 2) * opening) + (judged + 1) * judge,
    }


def training_flops(
    pipe: DualRatePipeline, recipe: Recipe, images_seen: int, teacher: DualRatePipeline | None = None
) -> int | None:
    """FLOPs of a model's own training, without those of what it started from; `None` where they are not known.

    They are those of the networks, a backward pass being two forward ones, one for the weights and one for what the network
    was given; at a frozen network it stops. Losses, checks and the optimiser are left out.

    Args:
        pipe: The model.
        recipe: What its configuration says of the training.
        images_seen: Images that it was trained on.
        teacher: Pipeline of the teacher, for a student.
    """
    if not isinstance(recipe, DistillationRecipe):
        return round(training_image_flops(pipe.denoiser, pipe.context_encoder, **recipe.encoder_costs) * images_seen)
    if teacher is None:
        return None
    each = distillation_image_flops(pipe.denoiser, pipe.context_encoder, teacher.denoiser, recipe)
    return sum(each[phase] * count for phase, count in recipe.images_by_phase.items())


def block_multiply_adds(network: UViTContextEncoder | UViTDenoiser, size: tuple[int, int] | None = None) -> int:
    """Multiply-adds of the main blocks in one evaluation for one image: the paper's unit.

    Args:
        network: Either network.
        size: Height and width; default: its `sample_size`.
    """
    config, (height, width) = network.config, _size(network, size)

    def stage_cost(stage: nn.Module, level: int) -> int:
        assert isinstance(stage, UViTStage)
        side, channels = config.patch_size * 2**level, config.level_channels[level]
        pixels = (height // side) * (width // side)
        if stage.attends:
            return len(stage.blocks) * (12 * channels**2 * pixels + 2 * pixels**2 * channels)
        cost = (2 * channels + 9) * channels if config.level_types[level] == "depthwise" else 18 * channels**2
        return len(stage.blocks) * cost * pixels

    trunk, last = network.trunk, len(config.level_channels) - 1
    outer = sum(stage_cost(stage, level) for stages in (trunk.down, trunk.up) for level, stage in enumerate(stages))
    return outer + stage_cost(trunk.middle, last)
