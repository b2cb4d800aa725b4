"""Compute, against the published table, a count by hand and the counter's own view of running kernels."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import PRESET
from diffusers_dualrate import UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.flops import (
    block_multiply_adds,
    context_flops,
    image_flops,
    network_flops,
    plan_cost,
    target_flops,
    training_image_flops,
)
from diffusers_dualrate.losses import ContextTimes, Schedule, denoising_loss, draw
from diffusers_dualrate.pair import TrainablePair
from diffusers_dualrate.recipes import PairRecipe
from diffusers_dualrate.refreshes import RefreshPlan

ROOT = Path(__file__).resolve().parents[1]


def load(preset, device="meta"):
    """A preset's encoder and denoiser, by default without allocating their weights."""
    (path,) = ROOT.glob(f"*/presets/{preset}.json")
    configs = json.loads(path.read_text(encoding="utf-8"))
    with torch.device(device):
        pair = UViTContextEncoder(**configs["context_encoder"]), UViTDenoiser(**configs["denoiser"])
    return tuple(network.eval() for network in pair)


@pytest.mark.parametrize(
    ("preset", "heavy", "light"),
    [("imagenet64", 108.45, 22.28), ("imagenet64-distilled", 108.45, 44.02), ("imagenet128", 137.44, 73.01)],
)
def test_presets_have_the_published_multiply_adds_per_evaluation(preset, heavy, light):
    """In G, of main blocks (SiD2, arXiv 2410.19324, and the Dual-Rate paper's light networks). Kills: 18, 12 or 2 changed; a level's side or width; stages going up
    not counted; the middle counted twice."""
    context_encoder, denoiser = load(preset)
    assert block_multiply_adds(context_encoder) / 1e9 == pytest.approx(heavy, rel=1e-3)
    assert block_multiply_adds(denoiser) / 1e9 == pytest.approx(light, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "denoiser_steps", "context_steps", "tera"),
    [
        ("imagenet64", 0, 512, 55.5),
        ("imagenet64", 512, 16, 13.14),
        ("imagenet64", 256, 16, 7.44),
        ("imagenet64-distilled", 8, 4, 0.79),
        ("imagenet64-distilled", 0, 8, 0.87),
        ("imagenet128", 0, 512, 70.37),
    ],
)
def test_presets_reproduce_the_published_cost_of_an_image(preset, denoiser_steps, context_steps, tera):
    """K H + N L, in T, to the digits published; a single-rate model is the heavy network alone."""
    context_encoder, denoiser = load(preset)
    total = context_steps * block_multiply_adds(context_encoder) + denoiser_steps * block_multiply_adds(denoiser)
    digits = len(str(tera).split(".")[1])
    assert round(total / 1e12, digits) == tera


def test_a_compiled_network_costs_what_it_cost_before():
    encoder, denoiser = load("tiny")
    compiled = [torch.compile(network, backend="eager") for network in (encoder, denoiser)]
    steps = {"num_inference_steps": 6, "num_context_steps": 2}
    assert image_flops(*reversed(compiled), **steps) == image_flops(denoiser, encoder, **steps)


def test_the_heavy_network_of_the_demonstration_costs_about_five_light_ones():
    context_encoder, denoiser = load("emoji32")
    assert 4.5 < network_flops(context_encoder) / network_flops(denoiser) < 6


def flops_by_hand(config, out_channels=None, context_channels=None, size=None, noise_levels=1):
    """2 × multiply-adds of every matrix product and convolution, with the sizes of one image."""
    height, width = size or (config.sample_size, config.sample_size)
    patch, embedding = config.patch_size, config.embedding_dim
    channels, kinds, blocks = config.level_channels, config.level_types, config.level_blocks
    pixels = [(height // patch // 2**i) * (width // patch // 2**i) for i in range(len(channels))]
    total = noise_levels * (64 * embedding + embedding * embedding)
    total += pixels[0] * config.in_channels * patch**2 * channels[0]  # patches
    for level, (c, kind, count) in enumerate(zip(channels, kinds, blocks, strict=True)):
        s = pixels[level]
        film = embedding * 2 * c
        if kind == "res":
            block = film + 2 * s * 9 * c * c
        else:
            block = film + s * c * 7 * c + s * 5 * c * c + 2 * s * s * c
        last = level == len(channels) - 1
        total += count * block * (1 if last else 2)
        if not last:
            total += 2 * pixels[level + 1] * c * channels[level + 1]  # 1x1 after pooling, and before upsampling
        if context_channels is not None:
            total += s * c * context_channels[level]
    if out_channels is not None:
        total += pixels[0] * channels[0] * out_channels * patch**2
    return 2 * total


@pytest.mark.parametrize("preset", ["tiny", "emoji32"])
@pytest.mark.parametrize("size", [None, (32, 16)])
def test_the_count_of_a_network_equals_a_count_by_hand(preset, size):
    """Kills: attention counted as 0; a batch of two; the size ignored or turned over; training graphs counted."""
    alone = {"prediction_hand_over": False}  # what it adds is counted in the tests of the hand-over
    alone |= {} if size is None else {"sample_size": size}
    context_encoder, denoiser = (type(network)(**{**network.config, **alone}) for network in load(preset))
    heavy = flops_by_hand(context_encoder.config, context_channels=context_encoder.context_channels, size=size)
    assert network_flops(context_encoder) == heavy
    light = flops_by_hand(denoiser.config, out_channels=3, size=size, noise_levels=2)  # of z_t and of z_τ
    assert network_flops(denoiser) == light
    single = UViTDenoiser(**{**denoiser.config, "context_channels": None})
    assert network_flops(single) == flops_by_hand(denoiser.config, out_channels=3, size=size)


def denoiser_context(denoiser):
    """A projected context of zeros for one image of the tiny preset."""
    return tuple(torch.zeros(1, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(denoiser.config.level_channels))


def test_the_counter_misses_attention_on_a_cpu_and_ours_does_not():
    """Exactly the 4 S² C of each transformer block: should a newer torch count them, this test says so."""
    _, denoiser = load("tiny", "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(torch.randn(1, 3, 16, 16), 0.0, None, denoiser_context(denoiser), 0.0)
    tokens, channels, blocks = 16, 16, 1
    assert network_flops(denoiser) - counter.get_total_flops() == 4 * tokens**2 * channels * blocks


@pytest.mark.parametrize("size", [None, (32, 16)])
def test_the_cost_of_projecting_a_context_is_what_projecting_one_runs(size):
    """Kills: the side not doubling; the factor 2; a level left out; width for height."""
    context_encoder, denoiser = load("emoji32")
    height, width = size or (32, 32)
    with torch.device("meta"), torch.no_grad():
        context = context_encoder(torch.empty(1, 3, height, width), 0.0).context
        with FlopCounterMode(display=False) as counter:
            denoiser.project_context(context)
    sized = denoiser if size is None else denoiser.from_config({**denoiser.config, "sample_size": size})
    assert context_flops(sized) == counter.get_total_flops() > 0


def test_an_image_costs_its_light_steps_and_refreshes_twice_under_guidance():
    """N L + K (H + projection). Kills: N and K swapped; the projection at every step or never; guidance not doubling K."""
    context_encoder, denoiser = load("tiny")
    heavy, light = network_flops(context_encoder), network_flops(denoiser)
    projection = context_flops(denoiser)
    cost = image_flops(denoiser, context_encoder, num_inference_steps=10, num_context_steps=3)
    assert cost == 10 * light + 3 * heavy + 3 * projection
    large = [network.from_config({**network.config, "sample_size": 32}) for network in (denoiser, context_encoder)]
    for networks in ((denoiser, context_encoder), large):
        plain, guided = (
            image_flops(*networks, num_inference_steps=10, num_context_steps=3, guided=guided)
            for guided in (False, True)
        )
        assert guided == 2 * plain
    assert plain > 4 * cost
    assert image_flops(denoiser, num_inference_steps=10, num_context_steps=3) == 10 * light


def test_a_plan_costs_its_refreshes_its_steps_and_those_before_the_first_each_once_for_every_branch():
    """In prices of which each kind shows its own digits. Kills: a kind at another's price, a refresh that looks at its own step
    alone or beyond the next one, the light network counted at refreshes where it rests or not counted elsewhere."""
    plan, prices = RefreshPlan((False, True, False, False, True, False)), (1000, 10, 1)
    assert plan_cost(plan, *prices) == 2051
    assert plan_cost(plan, *prices, encoder_denoises=True) == 2031
    for guided, expected in (([2], 3061), ([4], 3061), ([0], 2052), ([3, 5], 4071), (range(6), 4102)):
        assert plan_cost(plan, *prices, guided=[step in guided for step in range(6)]) == expected
    assert plan_cost(plan, *prices, guided=[False] * 4 + [True, False], encoder_denoises=True) == 3031
    assert plan_cost(RefreshPlan((False,) * 3), 1000, 10, 10, guided=[True, False, False]) == 40


def test_steps_before_the_first_context_cost_the_light_network_without_one():
    encoder, denoiser = load("tiny")
    cost = image_flops(denoiser, encoder, num_inference_steps=10, num_context_steps=3, num_steps_alone=4)
    heavy, opening = network_flops(encoder) + context_flops(denoiser), network_flops(denoiser, with_context=False)
    assert cost == 3 * heavy + 6 * network_flops(denoiser) + 4 * opening


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_cost_of_training_has_its_closed_form_in_heavy_light_and_projection(p):
    """Kills: 2 or 3 made another number, a sign, 1 − p dropped from or set at any term."""
    encoder, denoiser = load("emoji32")
    heavy, light, projection = network_flops(encoder), network_flops(denoiser), context_flops(denoiser)

    alone = network_flops(denoiser, with_context=False)

    def cost(**options):
        recipe = PairRecipe(**PRESET["training"] | {"context_dropout": p} | options)
        return training_image_flops(denoiser, encoder, recipe)

    every = 3 * ((1 - p) * light + p * alone)
    assert cost() == pytest.approx(every + (1 - p) * 3 * (heavy + projection), rel=1e-12)
    assert cost(freeze_encoder=True) == pytest.approx(every + (1 - p) * (heavy + 2 * projection), rel=1e-12)
    if p == 0:  # a denoiser that follows sees a context in every row
        assert cost(follow_encoder=True) == pytest.approx(every + 2 * heavy + 3 * projection, rel=1e-12)


def test_blocks_of_each_kind_have_the_multiply_adds_of_their_formula():
    """(2 c + 9) c, 18 c², 12 c² + 2 H² c a pixel, at both sides of a level but the middle. Kills: any of these numbers changed."""
    shape = {"in_channels": 3, "sample_size": (16, 32), "patch_size": 2, "level_blocks": [2, 1, 3]}
    shape |= {"level_channels": [8, 16, 32], "attention_head_dim": 8, "embedding_dim": 12}
    with torch.device("meta"):
        network = UViTDenoiser(**shape, level_types=["depthwise", "res", "transformer"])
    expected = 2 * 2 * (2 * 8 + 9) * 8 * 128 + 2 * 18 * 16**2 * 32 + 3 * (12 * 32**2 * 8 + 2 * 8**2 * 32)
    assert block_multiply_adds(network) == expected


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any operation puts on a real device."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.largest = max(self.largest, result.numel())
        return result


def test_counting_changes_nothing_and_allocates_nothing_of_size():
    """Kills: counting on the network itself, which would set its mode, or on a copy with real weights."""
    _, denoiser = load("tiny", "cpu")
    denoiser.train()
    state = {name: value.clone() for name, value in denoiser.state_dict().items()}
    random_state = torch.get_rng_state()
    with Allocations() as allocations:
        network_flops(denoiser)
        block_multiply_adds(denoiser)
        context_flops(denoiser)
    assert allocations.largest < 1000
    assert torch.equal(random_state, torch.get_rng_state())
    assert denoiser.training and all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(torch.equal(state[name], value) for name, value in denoiser.state_dict().items())
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"cpu"}


@pytest.mark.parametrize("steps", [0, 65, -1])
def test_a_number_of_refreshes_that_no_run_has_is_refused(steps):
    context_encoder, denoiser = load("tiny")
    with pytest.raises(ValueError, match=f"num_inference_steps=64, got {steps}"):
        image_flops(denoiser, context_encoder, num_inference_steps=64, num_context_steps=steps)


@pytest.mark.parametrize("dropout", [0.0, 0.25, 0.5])
def test_the_cost_of_a_target_is_what_the_loss_runs(dropout):
    """Counted in the loss itself, for 8 rows; those without context spare the embedding of τ. Kills: p for 1 − p; the projection left out; that embedding priced for all rows."""
    context_encoder, denoiser = load("tiny", "cpu")
    size = denoiser.config.sample_size
    x, draws = torch.randn(8, 3, size, size), draw(0, 0, range(8), (3, size, size))
    schedule = Schedule(lambda t: 1 - 2 * t, lambda t: torch.full_like(t, 2.0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        TrainablePair(denoiser, context_encoder)(
            denoising_loss, x, torch.zeros(8).long(), draws, schedule=schedule,
            contexts=ContextTimes(num_without=round(8 * dropout)),
        )  # fmt: skip
    cost = target_flops(denoiser, context_encoder, context_dropout=dropout)
    assert counter.get_total_flops() == 8 * cost
    alone = denoiser.from_config({**denoiser.config, "context_channels": None})
    assert target_flops(alone) < cost


def test_the_table_of_training_costs_is_what_the_presets_cost():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (1\.\d\d) \| (\d\.\d\d) \| (\d\.\d\d) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for preset, *costs, following in rows:
        context_encoder, denoiser = load(preset)
        heavy = {**context_encoder.config, "context_channels": None, "prediction_hand_over": False}
        with torch.device("meta"):
            alone = target_flops(UViTDenoiser.from_config(heavy))
        for cost, dropout in zip(costs, (0.0, 0.5), strict=True):
            share = target_flops(denoiser, context_encoder, context_dropout=dropout) / alone
            assert f"{share:.2f}" == cost, preset
        with torch.device("meta"):
            encoder, light = (
                type(network).from_config({**network.config, "prediction_hand_over": True})
                for network in (context_encoder, denoiser)
            )
        recipe = PairRecipe(**PRESET["training"] | {"context_dropout": 0.0, "follow_encoder": True})
        share = training_image_flops(light, encoder, recipe) / (3 * alone)
        assert f"{share:.2f}" == following, preset
