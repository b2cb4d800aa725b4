"""What a training cost, against the FLOPs that its losses run when they are called."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import PRESET
from diffusers_dualrate import losses, moment_matching
from diffusers_dualrate.flops import context_flops, distillation_image_flops, network_flops, training_flops
from diffusers_dualrate.pair import TrainablePair
from diffusers_dualrate.recipes import DistillationRecipe, PairRecipe
from distill import Distillation

ROWS, N, K = 2, 6, 2
SCHEDULE = losses.Schedule(lambda t: 1 - 2 * t, lambda t: torch.full_like(t, 2.0))
STEPS = {"num_inference_steps": N, "num_context_steps": K}
LABELS = torch.zeros(ROWS).long()


@pytest.fixture
def networks(make_networks):
    """Encoder, denoiser, and a teacher of the encoder's shape."""
    shape = {key: PRESET["context_encoder"][key] for key in ("level_channels", "level_blocks", "embedding_dim")}
    teacher = make_networks(denoiser={**shape, "context_channels": None}, num_classes=2)[1]
    return *make_networks(num_classes=2), teacher.requires_grad_(False)


def make_recipe(**told):
    return DistillationRecipe(**PRESET["distillation"] | told)


def count(run):
    """FLOPs for each image, forwards and backwards."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run().backward()
    return counter.get_total_flops() / ROWS


@pytest.mark.parametrize(
    ("is_pair", "full_rollout", "scale", "late"),
    [
        (True, False, 2.0, {}),
        (True, True, 1.0, {}),
        (False, True, 2.0, {}),
        (True, False, 1.0, {"num_context_steps": 1, "context_from": 0.5}),
        (True, True, 2.0, {"num_context_steps": 1, "context_from": 0.5}),
        (True, True, 1.0, {"num_context_steps": 3, "context_from": 0.5}),
    ],
)
def test_the_cost_of_each_phase_of_a_distillation_is_what_its_loss_runs(networks, is_pair, full_rollout, scale, late):
    """But for gradients of what the first layers are given. Kills: 1 more or less in every factor, but for that of the projection."""
    encoder, denoiser, teacher = networks
    steps = STEPS | late
    if not is_pair:
        encoder, denoiser, steps = None, copy.deepcopy(teacher), STEPS | {"num_context_steps": N}
    trained = Distillation(denoiser, encoder, copy.deepcopy(teacher)).train().requires_grad_(True)

    def predict_teacher(z, log_snr, class_labels, context, context_log_snr):
        for _ in range(2 if scale > 1 else 1):
            v = teacher(z, log_snr, class_labels).sample
        return v

    x = torch.randn(ROWS, 3, 8, 8)
    draws = moment_matching.draw_on_grid(0, 0, range(ROWS), x.shape[1:], N)
    draws.uniforms[:, 0] = torch.tensor([0.1, 0.9])  # a row before the first late context, and one behind it
    arguments = [None if full_rollout else x, LABELS, draws]
    recipe = make_recipe(**steps, full_rollout=full_rollout, guidance_scale=scale)
    grid = moment_matching.Grid(SCHEDULE.log_snr, recipe.plan)
    told = {"grid": grid, "judges": moment_matching.Judges(trained.predict_midpoint, predict_teacher, 0.02)}
    cost = distillation_image_flops(denoiser, encoder, teacher, recipe)
    counted = {
        "auxiliary": count(lambda: trained(moment_matching.auxiliary_loss, *arguments, **told)),
        "student": count(lambda: trained(moment_matching.student_loss, *arguments, **told)[0]),
    }
    if is_pair:
        encoder.requires_grad_(False)
        told = {"grid": grid, "min_variance": 0.02}
        counted["pretraining"] = count(lambda: trained(moment_matching.grid_denoising_loss, x, LABELS, draws, **told))
    for phase, flops in counted.items():
        assert 0.985 < flops / cost[phase] < 1.001, (phase, flops / cost[phase])


@pytest.mark.parametrize(("scale", "judged"), [(1.0, 1), (2.0, 2)])
def test_the_cost_of_each_phase_has_its_closed_form_in_the_networks(networks, scale, judged):
    """With N = 6 and K = 2, a segment has 3 steps. Kills: the projection or the encoder once more or less in any phase."""
    encoder, denoiser, teacher = networks
    heavy, light, judge = (network_flops(network) for network in networks)
    projection, steps = context_flops(denoiser), {"num_inference_steps": N, "num_context_steps": K}

    def cost(**told):
        return distillation_image_flops(denoiser, encoder, teacher, make_recipe(**steps, guidance_scale=scale, **told))

    segment, predict = 2 * light, light + heavy + projection
    for full_rollout, before in ((False, 0), (True, 3 * light + heavy + projection)):
        assert cost(full_rollout=full_rollout) == {
            "pretraining": 3 * light + 2 * projection + heavy,
            "auxiliary": before + segment + predict + (judged + 3) * judge,
            "student": before + segment + 3 * predict + (judged + 1) * judge,
        }


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_the_cost_of_a_pair_is_what_its_loss_runs(networks, freeze_encoder):
    encoder, denoiser, _ = networks
    pair = TrainablePair(denoiser, encoder.requires_grad_(not freeze_encoder)).train()
    draws = losses.draw(0, 0, range(ROWS), (3, 8, 8))
    more = {"schedule": SCHEDULE, "contexts": losses.ContextTimes(num_without=ROWS // 2)}
    counted = count(lambda: pair(losses.denoising_loss, torch.randn(ROWS, 3, 8, 8), LABELS, draws, **more).loss)
    recipe = PairRecipe(**PRESET["training"] | {"context_dropout": 0.5, "freeze_encoder": freeze_encoder})
    cost = training_flops(SimpleNamespace(denoiser=denoiser, context_encoder=encoder), recipe, 100)
    assert 0.96 < 100 * counted / cost < 1.001


@pytest.mark.parametrize("context_from", [1.0, 0.5])
def test_following_an_encoder_costs_one_more_evaluation_of_it_where_it_is_run(networks, context_from):
    """Mutant: the second evaluation counted for the rows without context, too."""
    encoder, denoiser, _ = networks
    pair = TrainablePair(denoiser, encoder.requires_grad_(False)).train()
    late = round((1 - context_from) * ROWS)
    contexts = losses.FollowingTimes((1 / 4,), context_from, late, late, late, num_deterministic=1)
    denoise, encode = pair.denoise, lambda *args: (pair.encode(*args)[0], torch.zeros(len(args[0]), 3, 8, 8))
    x, draws = torch.randn(ROWS, 3, 8, 8), losses.draw(0, 0, range(ROWS), (3, 8, 8))
    counted = count(
        lambda: losses.following_loss(denoise, encode, x, LABELS, draws, schedule=SCHEDULE, contexts=contexts).loss
    )
    told = {"context_dropout": 0.0, "follow_encoder": True, "context_from": context_from}
    recipe = PairRecipe(**PRESET["training"] | told)
    cost = training_flops(SimpleNamespace(denoiser=denoiser, context_encoder=encoder), recipe, 100)
    assert 0.96 < 100 * counted / cost < 1.001


def test_the_auxiliary_has_the_odd_one_of_the_steps_that_alternate():
    recipe = make_recipe(pretraining_steps=2, max_train_steps=5, train_batch_size=8)
    assert recipe.images_by_phase == {"pretraining": 16, "auxiliary": 24, "student": 16}


def test_a_cost_is_not_guessed_where_the_teacher_is_not_at_hand():
    assert training_flops(None, make_recipe(), 100) is None


def test_a_teacher_of_text_is_guided_like_one_of_classes(make_networks):
    encoder, denoiser = make_networks(num_classes=None, cross_attention_dim=8, text_length=6)
    plain, guided = (
        distillation_image_flops(denoiser, encoder, encoder, make_recipe(guidance_scale=scale)) for scale in (1.0, 2.0)
    )
    for phase in ("auxiliary", "student"):
        assert guided[phase] - plain[phase] == network_flops(encoder)
