"""Numbers that were right once and must stay: images and losses of models, and the outcome of short trainings.

Each pins a whole chain rather than one formula, so that a redesign which changes what comes out cannot go unseen. Models
of classes have the shapes of the preset `emoji32` and seeded random weights; those of text are the ones that ship. All run
in float32, whose rounding is all that may differ. A number changes only with a change of method, in the same commit, with
the reason.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import distill
import train_dual_rate
import train_single_rate
from conftest import PRESET, fill_with_noise, reset_accelerate
from diffusers_dualrate import (
    DualRatePipeline,
    DualRateScheduler,
    UViTContextEncoder,
    UViTDenoiser,
    losses,
    moment_matching,
)
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.refreshes import plan_segments

EMOJI32 = json.loads(Path("examples/presets/emoji32.json").read_text(encoding="utf-8"))
MODELS = Path(__file__).parents[1] / "model_cards"
PAIR, SINGLE, STUDENT = "pair", "single-rate model", "student"
PROMPTS = ["red apple, flat style", "purple heart", "a green fish"]
CLASSES = ["food-fruit", 33, "keycap"]
PLACES = ((0, 16, 16), (1, 10, 20), (2, 22, 9))  # channel, row and column of three pixels of each image


# Of each of three images, seeds 0, 1 and 2: the mean, then the values at three places.
IMAGES = {
    "the pair with its defaults": [
        [0.167308, -3.975518, -1.460300, 4.017046],
        [0.060070, -3.540286, 0.031275, 4.778232],
        [0.073226, -9.652000, 1.656928, 1.782969],
    ],
    "the single-rate model with its defaults": [
        [0.275290, 0.320725, -2.830834, 2.022230],
        [0.259988, -1.135553, -1.492290, 1.507210],
        [0.140208, -1.406727, 1.468233, -1.699380],
    ],
    "the student with its defaults": [
        [-0.611003, -0.381577, -2.654944, 0.329554],
        [-0.644830, -0.319763, -1.974656, -0.930668],
        [-0.646565, -0.712566, 0.326934, -2.552458],
    ],
    "the pair without guidance": [
        [-0.135584, -5.700222, -0.680944, 1.901456],
        [-0.245839, -3.731074, -0.077994, 2.088105],
        [-0.125135, -11.269708, 0.815637, 3.056630],
    ],
    "the pair with named refreshes and guidance in an interval": [
        [0.185898, -6.572036, -0.178550, 2.486411],
        [0.056269, -2.967170, -0.500455, 3.229892],
        [0.146676, -9.599152, 1.973613, 2.333020],
    ],
    "the pair whose encoder denoises": [
        [-0.022971, -5.195048, -0.602568, 1.743584],
        [-0.177753, -3.014634, -0.896996, 2.632586],
        [-0.022908, -5.358635, 0.477446, 2.997349],
    ],
    "the pair of first order": [
        [0.041609, -5.406134, -0.350755, 1.934794],
        [0.009184, -4.253674, 0.110017, 2.856102],
        [0.034623, -8.254135, 0.299316, 2.252229],
    ],
    "the pair of second order": [
        [0.066801, -6.017325, -0.263681, 2.386254],
        [0.033935, -4.892301, -0.106333, 3.456656],
        [0.045019, -10.389454, 0.464703, 1.874825],
    ],
    "the single-rate model with more variance": [
        [0.129917, -0.186691, -1.627396, 1.192345],
        [0.083707, -0.696444, -0.568241, 0.803897],
        [0.022315, -1.609170, 1.267938, -1.405074],
    ],
    "the single-rate model of a shifted schedule": [
        [0.182046, -0.499659, -1.225276, 1.281935],
        [0.070781, -1.043755, -0.548254, 1.267692],
        [0.035891, -1.345384, 0.607811, -1.305205],
    ],
    "the single-rate model with DPM-Solver++": [
        [0.206548, -1.958957, 1.226662, -0.359406],
        [0.124846, 0.317703, 0.066088, -0.873694],
        [0.037702, -0.153093, -3.822577, 0.078291],
    ],
    "the pair of text": [
        [0.036885, -0.128754, 0.531669, -0.980386],
        [-0.008208, -0.429809, -0.373159, 0.052357],
        [-0.051724, -0.111688, -0.613943, -0.480561],
    ],
    "the pair of text away from a negative prompt": [
        [0.082612, -0.364022, 1.659737, -3.490447],
        [0.024757, -0.471929, 0.033083, -0.383574],
        [-0.186000, 0.053847, -0.452899, 0.213152],
    ],
    "the student of text": [
        [0.053755, 0.054196, 0.638278, -0.869895],
        [-0.040477, -0.364230, -0.412796, -0.004275],
        [-0.046351, -0.161628, -0.576765, -0.567367],
    ],
}

# The loss, then the norm of the gradient of the denoiser and of the encoder.
LEARNED = {
    "a pair and its encoder's own": [24.9305, 8.01287, 27.2213],
    "a single-rate model": [13.1946, 8.106],
    "a pair that follows its encoder": [1.40084, 7.28658, 18.3996],
    "a new denoiser of a student": [2.4663, 5.61881, 23.384],
    "an auxiliary": [1.89968, 13.1776],
    "a student": [0.0258929, 0.250661, 0.805545],
    "a student from noise": [0.0421444, 0.235443, 0.720647],
}

# Of the denoiser and of the encoder: the sum of all weights in the order of their names, number i times cos(i).
TRAINED = {
    "a pair": [7.543905, -11.917784],
    "a pair that follows its encoder": [-9.994761, -6.317719],
    "a single-rate model": [0.1647],
    "a student": [5.889105, 0.937638],
    "a student of a pair from noise": [0.451308, -6.696348],
}


def make_network(kind, shape, seed):
    torch.manual_seed(seed)  # biases keep part of what they are born with
    return fill_with_noise(kind(**shape), seed)


@functools.cache
def load(name, **options):
    """A model of the classes of `emoji32`, with the defaults that its kind has."""
    names = load_images("examples/data/emoji32", label_column="label").features["label"].names
    told = {"id2label": dict(enumerate(names)), "num_inference_steps": 12, "guidance_scale": 4.0}
    heavy, light = (EMOJI32[role] | {"num_classes": len(names)} for role in ("context_encoder", "denoiser"))
    scheduler = DualRateScheduler(**EMOJI32["scheduler"], second_order=name != STUDENT, clip_sample=False)
    if name == SINGLE:
        denoiser, encoder = make_network(UViTDenoiser, heavy | SINGLE_RATE, 1), None
    else:
        seed = 3 if name == STUDENT else 5
        encoder = make_network(UViTContextEncoder, heavy, seed)
        denoiser = make_network(UViTDenoiser, light, seed + 1)
        told |= {"num_inference_steps": 8, "guidance_scale": 1.0} if name == STUDENT else {}
        told |= {"num_context_steps": 2 if name == STUDENT else 4}
    parts = {"denoiser": denoiser, "scheduler": scheduler, "context_encoder": encoder}
    pipe = DualRatePipeline(**parts | told | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe, class_labels=CLASSES, **options):
    """The mean of each of three images, then three of its values, from seeds 0, 1 and 2."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = pipe(class_labels=class_labels, generator=generators, output_type="latent", **options).images
    side = images.shape[-1]
    places = [(channel, row % side, column % side) for channel, row, column in PLACES]
    return [[image.mean().item(), *(image[place].item() for place in places)] for image in images]


def sample_by_default(name):
    return pixels(load(name))


def sample_prompts(name, **options):
    """The latents of three prompts, by a model that ships."""
    pipe = DualRatePipeline.from_pretrained(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    return pixels(pipe, None, prompt=PROMPTS, **options)


def sample_unguided(name):
    return pixels(load(name), num_inference_steps=5, num_context_steps=2, guidance_scale=1)


def sample_where_named(name):
    """With refreshes that are named and guidance that starts between two of them and ends."""
    options = {"num_inference_steps": 6, "refresh_steps": [0, 1, 4], "guidance_interval": (-4, 4)}
    return pixels(load(name), guidance_scale=2.5, **options)


def sample_without_denoiser_at_refreshes(name):
    return pixels(load(name, encoder_denoises=True), num_inference_steps=6, num_context_steps=2, guidance_scale=3)


def sample_in_order(second_order, name, **options):
    scheduler = DualRateScheduler.from_config(load(name).scheduler.config, second_order=second_order, **options)
    steps = {"num_inference_steps": 6} | ({} if name == SINGLE else {"num_context_steps": 3})
    return pixels(load(name, scheduler=scheduler), **steps, guidance_scale=2)


def sample_with_dpm_solver(name):
    betas = load(name).scheduler.betas.tolist()
    solver = DPMSolverMultistepScheduler(trained_betas=betas, prediction_type="v_prediction", use_lu_lambdas=True)
    return pixels(load(name, scheduler=solver), num_inference_steps=8, guidance_scale=4)


SAMPLES = {
    "the pair with its defaults": lambda: sample_by_default(PAIR),
    "the single-rate model with its defaults": lambda: sample_by_default(SINGLE),
    "the student with its defaults": lambda: sample_by_default(STUDENT),
    "the pair without guidance": lambda: sample_unguided(PAIR),
    "the pair with named refreshes and guidance in an interval": lambda: sample_where_named(PAIR),
    "the pair whose encoder denoises": lambda: sample_without_denoiser_at_refreshes(PAIR),
    "the pair of first order": lambda: sample_in_order(False, PAIR),
    "the pair of second order": lambda: sample_in_order(True, PAIR),
    "the single-rate model with more variance": lambda: sample_in_order(False, SINGLE, variance_interpolation=0.3),
    "the single-rate model of a shifted schedule": lambda: sample_in_order(True, SINGLE, image_size=64),
    "the single-rate model with DPM-Solver++": lambda: sample_with_dpm_solver(SINGLE),
    "the pair of text": lambda: sample_prompts("dualrate-emoji64"),
    "the pair of text away from a negative prompt": lambda: sample_prompts(
        "dualrate-emoji64", negative_prompt="blob style", num_inference_steps=6, num_context_steps=2
    ),
    "the student of text": lambda: sample_prompts("dualrate-emoji64-distilled"),
}


def learn(loss_of, pipe):
    """The loss, and the norm of each network's gradient."""
    networks = [network for network in (pipe.denoiser, pipe.context_encoder) if network is not None]
    pair = TrainablePair(*networks)
    pair.zero_grad()
    loss = loss_of(pair, schedule_of(pipe.scheduler, bias=1.0))
    loss.backward()
    norms = [
        torch.stack([w.grad.square().sum() for w in network.parameters() if w.grad is not None]).sum().sqrt().item()
        for network in networks
    ]
    pair.zero_grad(set_to_none=True)
    return [loss.item(), *norms]


def emoji():
    """Eight images of `emoji32`, augmented as in its recipe, with their classes."""
    dataset = load_images("examples/data/emoji32", label_column="label")
    augmentation = Augmentation(translation=2, scale=(0.9, 1.1), background=(0, 255), flip=True)
    images = LabelledImages(dataset, 32, label_column="label", augmentation=augmentation, seed=5)
    items = [images[(3, index)] for index in range(0, 1392, 174)]
    return torch.stack([item["pixel_values"] for item in items]), torch.stack([item["class_labels"] for item in items])


def denoise_jointly(pair, schedule, **options):
    x, class_labels = emoji()
    draws = losses.draw(11, 7, range(8), x.shape[1:])
    class_labels = losses.drop_condition(class_labels, draws, 0.3, 98)
    result = pair(losses.denoising_loss, x, class_labels, draws, schedule=schedule, **options)
    return result.loss + result.v_loss.sum()


def learn_jointly(name):
    pipe = load(name)
    options = {"contexts": losses.ContextTimes((1 / 2, 1 / 4), num_without=2)} if pipe.context_encoder else {}
    return learn(lambda *args: denoise_jointly(*args, **options), pipe)


def follow(pair, schedule):
    x, class_labels = emoji()
    draws = losses.draw(12, 8, range(8), x.shape[1:])
    return pair(
        losses.following_loss,
        x,
        losses.drop_condition(class_labels, draws, 0.3, 98),
        draws,
        schedule=schedule,
        contexts=losses.FollowingTimes((1 / 4,), num_even_in_log_snr=2, num_deterministic=4),
    ).loss


def distil(function, learner, *, rolls_out=False):
    """A step of the student's; the single-rate model is the auxiliary, and less sure of itself the teacher."""
    student = TrainablePair(load(STUDENT).denoiser, load(STUDENT).context_encoder)
    auxiliary = TrainablePair(load(SINGLE).denoiser).denoise

    def teacher(z, level, class_labels, context, context_log_snr):
        return 0.9 * auxiliary(z, level, None, None, None)

    def loss_of(_, schedule):
        x, class_labels = emoji()
        told = {"grid": moment_matching.Grid(schedule.log_snr, plan_segments(8, 2))}
        if function is moment_matching.grid_denoising_loss:
            told |= {"min_variance": 0.02}
        else:
            told |= {"judges": moment_matching.Judges(auxiliary, teacher, 0.02)}
        draws = moment_matching.draw_on_grid(13, 9, range(8), x.shape[1:], 8)
        loss = student(function, None if rolls_out else x, class_labels, draws, **told)
        return sum(loss) if isinstance(loss, tuple) else loss

    return learn(loss_of, load(learner))


LOSSES = {
    "a pair and its encoder's own": lambda: learn_jointly(PAIR),
    "a single-rate model": lambda: learn_jointly(SINGLE),
    "a pair that follows its encoder": lambda: learn(follow, load(PAIR)),
    "a new denoiser of a student": lambda: distil(moment_matching.grid_denoising_loss, STUDENT),
    "an auxiliary": lambda: distil(moment_matching.auxiliary_loss, SINGLE),
    "a student": lambda: distil(moment_matching.student_loss, STUDENT),
    "a student from noise": lambda: distil(moment_matching.student_loss, STUDENT, rolls_out=True),
}


def train(run, root):
    """Four steps on made-up images; the weights as they are saved."""
    script, flags, overrides = RUNS[run]
    arguments = ["--preset", "examples/presets/tiny.json", "--output_dir", root / "run", "--validation_steps", 0]
    arguments += ["--train_data_dir", root / "images", "--label_column", "label", "--cache_dir", root / "cache"]
    arguments += [root / flag if flag in ("pair", "teacher") else flag for flag in flags]
    try:
        assert script.main(script.parse_args([str(flag) for flag in (*arguments, "--override", *overrides)])) == 0
    finally:
        reset_accelerate()
    return DualRatePipeline.from_pretrained(root / "run", dtype=torch.float32)


def save_models(root, make_networks, hands_over):
    """A single-rate model of the encoder's shape, and a pair, neither of which knows anything."""
    torch.manual_seed(0)  # biases keep part of what they are born with
    both = {"num_classes": 2, "sample_size": 16}
    heavy = {key: PRESET["context_encoder"][key] for key in ("level_channels", "level_blocks", "embedding_dim")}
    teacher = make_networks(**both, denoiser={**heavy, "context_channels": None})[1]
    encoder, denoiser = make_networks(**both, prediction_hand_over=hands_over)
    names = {0: "cat", 1: "dog"}
    DualRatePipeline(teacher, DualRateScheduler(), id2label=names).save_pretrained(root / "teacher")
    DualRatePipeline(denoiser, DualRateScheduler(), encoder, id2label=names).save_pretrained(root / "pair")


@pytest.fixture
def root(tmp_path):
    """A folder with images of two classes, some of them partly transparent."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            values = rng.integers(0, 256, (20, 18, 4), dtype=np.uint8)
            Image.fromarray(values if i % 2 else values[..., :3].copy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path


AUGMENTED = ['training.augmentation={"translation":2,"scale":[0.8,1.2],"background":[0,255],"flip":true}']
AUGMENTED_STUDENT = [AUGMENTED[0].replace("training", "distillation")]
HANDS_OVER = ["context_encoder.prediction_hand_over=true", "denoiser.prediction_hand_over=true"]
FOLLOWS = ["--pretrained_model_name_or_path", "pair", "--follow_encoder", "--context_dropout", 0]
RUNS = {
    "a pair": (train_dual_rate, [], AUGMENTED),
    "a pair that follows its encoder": (train_dual_rate, FOLLOWS, AUGMENTED + HANDS_OVER),
    "a single-rate model": (train_single_rate, ["--network", "heavy"], AUGMENTED),
    "a student": (distill, ["--teacher", "teacher"], AUGMENTED_STUDENT),
    "a student of a pair from noise": (
        distill,
        ["--teacher", "teacher", "--student", "pair", "--full_rollout"],
        AUGMENTED_STUDENT,
    ),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_models_draw_the_images_that_they_drew(case):
    assert SAMPLES[case]() == [pytest.approx(values, rel=0, abs=1e-4) for values in IMAGES[case]]


@pytest.mark.parametrize("case", LOSSES)
def test_models_would_learn_what_they_learned(case):
    assert LOSSES[case]() == pytest.approx(LEARNED[case], rel=1e-4)


@pytest.mark.parametrize("case", RUNS)
def test_a_short_training_ends_where_it_ended(case, root, make_networks):
    save_models(root, make_networks, hands_over=HANDS_OVER[0] in RUNS[case][2])
    pipe = train(case, root)
    sums = []
    for network in filter(None, (pipe.denoiser, pipe.context_encoder)):
        weights = torch.cat([weight.flatten() for _, weight in sorted(network.state_dict().items())]).double()
        sums.append((weights @ torch.cos(torch.arange(len(weights)).double())).item())
    assert sums == pytest.approx(TRAINED[case], rel=0, abs=1e-4)
