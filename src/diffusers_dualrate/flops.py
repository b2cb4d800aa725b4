"""Compute of one image as a function of (N, K), and of a training, counted rather than guessed.

There are two units. FLOPs are 2 x multiply-adds of everything that an evaluation runs, attention included. They are
counted by running the network on the meta device. (On a CPU the same counter returns 0 for attention.)

The paper's unit is multiply-adds of the main blocks alone; it serves to compare with published tables. For a map of
side H with c channels: Res 18 c² H², Transformer 12 c² H² + 2 H⁴ c. Depthwise, which the paper does not have:
(2 c + 9) c H².
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .conditions import blank_text
from .models import UViTContextEncoder, UViTDenoiser
from .pipeline import DualRatePipeline
from .recipes import DistillationRecipe, PairRecipe, Recipe, SingleRateRecipe
from .refreshes import RefreshPlan, plan_refreshes
from .uvit import UViTStage

# FLOPs of the networks that were counted, by their descriptions: counting takes longer than running a small network.
_COUNTED: dict[str, int] = {}


def network_flops(network: UViTContextEncoder | UViTDenoiser, *, with_context: bool = True) -> int:
    """FLOPs of one evaluation for one image.

    Adding a projected context costs additions only, which are not counted. A text is projected once per image, apart from
    the evaluations, and its encoder is not counted.

    Args:
        network: Either network, compiled or not; it is neither run nor changed.
        with_context: Whether a denoiser that takes context is given one.
    """
    network = cast(
        UViTContextEncoder | UViTDenoiser, getattr(network, "_orig_mod", network)
    )  # what `torch.compile` wrapped
    key = json.dumps([type(network).__name__, network.describe(), with_context])
    if key not in _COUNTED:
        _COUNTED[key] = _count(network, with_context)
    return _COUNTED[key]


def forget() -> None:
    """Count every network anew. The counts are remembered, and a counter around them sees only those that are made."""
    _COUNTED.clear()


def _count(network: UViTContextEncoder | UViTDenoiser, with_context: bool) -> int:
    height, width = network.image_size
    copy = network.blueprint()
    with torch.device("meta"):
        sample = torch.empty(1, network.config.in_channels, height, width)
        inputs = {"sample": sample, "log_snr": torch.empty(1)}
        if network.config.num_classes is not None:  # not every network of diffusers goes without
            inputs["condition"] = torch.zeros(1, dtype=torch.long)
        if network.config.cross_attention_dim is not None:
            inputs["condition"] = copy.project_condition(blank_text(network.config))
        if with_context and isinstance(copy, UViTDenoiser) and copy.config.context_channels is not None:
            trunk_input = torch.empty(1, copy.trunk.patch_embed.in_channels, height, width)
            context = copy.trunk(trunk_input, torch.empty(1, copy.config.embedding_dim))
            if copy.config.prediction_hand_over:
                context = (*context, sample, sample, sample[:, :1])
            inputs |= {"context": context, "context_log_snr": torch.empty(1)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy(**inputs)
    return counter.get_total_flops()


def text_flops(network: UViTContextEncoder | UViTDenoiser) -> int:
    """FLOPs of projecting the text of one image, which a network does once per call; 0 where it takes none."""
    if network.config.cross_attention_dim is None:
        return 0
    copy = network.blueprint()
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.project_condition(blank_text(network.config))
    return counter.get_total_flops()


def decode_flops(pipe: DualRatePipeline) -> int:
    """FLOPs of decoding one image, which those of the networks do not hold; 0 where there is no autoencoder."""
    if pipe.vae is None:
        return 0
    vae = getattr(pipe.vae, "_orig_mod", pipe.vae)  # what `torch.compile` wrapped
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        copy = type(vae).from_config(vae.config).eval()
        copy.decode(torch.empty(1, vae.config.latent_channels, *pipe.denoiser.image_size))
    return counter.get_total_flops()


@contextlib.contextmanager
def count_evaluations(*networks: nn.Module | None) -> Iterator[list[int]]:
    """Count the forward passes of networks while the block runs, in the list that it yields. `None` stays at 0."""
    counts = [0] * len(networks)

    def counter(position: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[position] += 1

        return count

    handles = [net.register_forward_hook(counter(i)) for i, net in enumerate(networks) if net is not None]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def context_flops(denoiser: UViTDenoiser) -> int:
    """FLOPs of projecting the context of one image; the denoiser does so once per refresh."""
    height, width = denoiser.image_size
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
) -> int:
    """FLOPs of generating one image: K heavy evaluations with their projections, N or N − K light ones.

    [`plan_flops`] takes other plans, and guidance at some of the steps.

    Args:
        denoiser: Network that runs at every step; with `encoder_denoises` not at refreshes.
        context_encoder: Network that runs K times; `None` for a single-rate model.
        num_inference_steps: N.
        num_context_steps: K, from 1 to N; ignored for a single-rate model.
        num_steps_alone: Steps before the first refresh, which a pair takes without context.
        guided: Whether guidance evaluates both branches at every step, which doubles everything.
        encoder_denoises: Whether the denoiser rests at refreshes, as with the pipeline's option of this name.
    """
    plan = RefreshPlan((False,) * num_inference_steps)
    if context_encoder is not None:
        plan = plan_refreshes(num_inference_steps, num_context_steps, num_steps_alone=num_steps_alone)
    return plan_flops(denoiser, context_encoder, plan, guided=[guided] * len(plan), encoder_denoises=encoder_denoises)


def plan_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None,
    plan: RefreshPlan,
    *,
    guided: Sequence[bool] | None = None,
    encoder_denoises: bool = False,
) -> int:
    """FLOPs of generating one image by a plan.

    Args:
        denoiser: Network that runs at every step; with `encoder_denoises` not at refreshes.
        context_encoder: Network that runs at refreshes; `None` for a single-rate model.
        plan: Which steps refresh.
        guided: Whether each step evaluates both branches; `None` for none. A refresh encodes both branches if one of the
            steps that it serves evaluates both.
        encoder_denoises: As for [`image_flops`].
    """
    light = opening = network_flops(denoiser)
    heavy, text = 0, text_flops(denoiser)
    if context_encoder is not None:
        heavy = network_flops(context_encoder) + context_flops(denoiser)
        opening = network_flops(denoiser, with_context=False)
        text += text_flops(context_encoder)
    return round(plan_cost(plan, heavy, light, opening, text, guided=guided, encoder_denoises=encoder_denoises))


def plan_cost(
    plan: RefreshPlan,
    heavy: float,
    light: float,
    opening: float,
    text: float = 0.0,
    *,
    guided: Sequence[bool] | None = None,
    encoder_denoises: bool = False,
) -> float:
    """Cost of an image by a plan, in the unit of the costs of the three kinds of evaluation.

    Args:
        plan: Which steps refresh.
        heavy: Cost of the context encoder with the projection.
        light: Cost of the denoiser.
        opening: Cost of the denoiser before the first refresh, without context.
        text: Cost of projecting a text for all networks, once.
        guided: As for [`plan_flops`].
        encoder_denoises: As for [`image_flops`].
    """
    branches, alone = [2 if guides else 1 for guides in guided or [False] * len(plan)], plan.num_steps_alone
    total = max(branches) * text
    for i, refreshes in enumerate(plan):
        if refreshes:
            total += max(branches[j] for j in plan.until_next(i)) * heavy
        if not (refreshes and encoder_denoises):
            total += branches[i] * (opening if i < alone else light)
    return total


def target_flops(
    denoiser: UViTDenoiser, context_encoder: UViTContextEncoder | None = None, *, context_dropout: float = 0.0
) -> float:
    """FLOPs of the forward passes in training for each denoising target, a noisy image at one t.

    Rows without context, a share p, spare the encoder and run the context-free branch, which costs F:
    p F + (1 − p)(L + H + projection).

    Args:
        denoiser: The network that sees every target.
        context_encoder: The network that makes the contexts; `None` for a single-rate model.
        context_dropout: Share p of the rows of a batch that see no context.
    """
    light = network_flops(denoiser)
    if context_encoder is None:
        return light
    free = network_flops(denoiser, with_context=False)
    heavy = network_flops(context_encoder) + context_flops(denoiser)
    return context_dropout * free + (1 - context_dropout) * (light + heavy)


def training_image_flops(
    denoiser: UViTDenoiser, context_encoder: UViTContextEncoder | None, recipe: SingleRateRecipe
) -> float:
    """FLOPs of training for each denoising target, forwards and backwards. A backward pass costs two forward ones.

    A frozen encoder learns only what it hands over, so it runs forwards only. One that is followed runs once more, at t.

    Args:
        denoiser: The network that sees every target.
        context_encoder: The network that makes the contexts; `None` for a single-rate model.
        recipe: How they are trained.
    """
    paired = 1 - recipe.share_without_context
    total = 3 * target_flops(denoiser, context_encoder, context_dropout=recipe.share_without_context)
    if isinstance(recipe, PairRecipe):
        assert context_encoder is not None  # it is a pair that has this recipe
        if recipe.is_frozen:
            total -= paired * (2 * network_flops(context_encoder) + context_flops(denoiser))
        if recipe.follow_encoder:
            total += paired * (network_flops(context_encoder) + context_flops(denoiser))
    return total


def distillation_image_flops(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None,
    teacher: UViTDenoiser,
    recipe: DistillationRecipe,
) -> dict[str, int]:
    """FLOPs for each image of a batch in every phase of a distillation.

    R: rollout without gradient. P: the student's prediction. T: one evaluation of the teacher, which runs G times, or of
    the auxiliary, which has its shape. Auxiliary step: R + P + (G + 3) T. Student step: R + 3 P + (G + 1) T.

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
        """Mean of the costs of a row behind the first refresh and of one before it, as often as each is drawn."""
        return ((n - alone) * behind + alone * before) // n

    config = teacher.config
    has_null = config.num_classes is not None or config.cross_attention_dim is not None
    judged = 2 if recipe.guidance_scale > 1 and has_null else 1
    return {
        "pretraining": mean(3 * light + 2 * project + encode, 3 * opening),  # with the encoder frozen
        "auxiliary": mean(rollout + predict, alone * opening) + (judged + 3) * judge,
        "student": mean(rollout + 3 * predict, (alone + 2) * opening) + (judged + 1) * judge,
    }


def training_flops(
    pipe: DualRatePipeline, recipe: Recipe, images_seen: int, teacher: DualRatePipeline | None = None
) -> int | None:
    """FLOPs of a model's own training, without that of the model it started from. `None` for a student without teacher.

    Only the networks count; losses, checks and the optimiser are left out. A backward pass costs two forward ones: one for
    the weights, one for what the network was given. It stops at a frozen network.

    Args:
        pipe: The model.
        recipe: What its configuration says of the training.
        images_seen: Images that it was trained on.
        teacher: Pipeline of the teacher, for a student.
    """
    if isinstance(recipe, SingleRateRecipe):
        return round(training_image_flops(pipe.denoiser, pipe.context_encoder, recipe) * images_seen)
    assert isinstance(recipe, DistillationRecipe)
    if teacher is None:
        return None
    each = distillation_image_flops(pipe.denoiser, pipe.context_encoder, teacher.denoiser, recipe)
    return sum(each[phase] * count for phase, count in recipe.images_by_phase.items())


def block_multiply_adds(network: UViTContextEncoder | UViTDenoiser) -> int:
    """Multiply-adds of the main blocks in one evaluation for one image: the paper's unit.

    Args:
        network: Either network.
    """
    config, (height, width) = network.config, network.image_size

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
