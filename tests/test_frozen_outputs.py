"""Numbers that were right once and must stay: the released models' images and losses, and the outcome of short trainings.

Each pins a whole chain rather than one formula, so that a redesign which changes what comes out cannot go unseen. The
models are stored in bfloat16 and run here in float32, whose rounding is all that may differ. Between instruction sets
(`ATEN_CPU_CAPABILITY`), one thread and two, and kernels with oneDNN and without, no number here moved by a tenth of its
tolerance. A number changes only with a change of method, in the same commit, with the reason.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import distill
import train_dual_rate
import train_single_rate
from conftest import PRESET, reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, losses, moment_matching
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.refreshes import plan_segments

MODELS = Path(__file__).parents[1] / "model_cards"
PAIR, SINGLE, STUDENT = "dualrate-emoji32", "single-rate-emoji32", "dualrate-emoji32-distilled"
CLASSES = ["food-fruit", 33, "keycap"]
PLACES = ((0, 16, 16), (1, 10, 20), (2, 22, 9))  # channel, row and column of three pixels of each image


# Of each of three images, seeds 0, 1 and 2: the mean, then the values at three places.
IMAGES = {
    "the pair as released": [
        [0.369534, 0.981443, -1.000000, -1.000000],
        [0.63446, 0.833214, 0.197508, 0.81798],
        [0.391271, 0.56322, 0.726509, 0.442096],
    ],
    "the single-rate model as released": [
        [0.263335, 0.927339, -1.000000, -0.851238],
        [0.601436, 0.528965, 0.507744, 0.868318],
        [0.384813, 0.616248, 0.374677, 0.477196],
    ],
    "the student as released": [
        [0.389539, 1.067751, -0.054451, -0.77893],
        [0.500002, -0.0907199, -0.413148, 0.887603],
        [0.470828, 1.099255, 0.777559, 0.575655],
    ],
    "the pair without guidance": [
        [0.51385, 0.915644, 0.422652, -0.325692],
        [0.592355, 0.749385, 0.272617, 0.635742],
        [0.488593, 0.62917, 0.993486, 0.425789],
    ],
    "the pair with named refreshes and guidance in an interval": [
        [0.482852, 1.000000, 0.15291, -0.648994],
        [0.586043, 0.646881, -0.0566406, 0.767839],
        [0.439415, 1.000000, 1.000000, 0.553156],
    ],
    "the pair whose encoder denoises": [
        [0.420592, 0.926549, -0.258515, -0.859303],
        [0.596548, 0.831407, 0.00137393, 0.765177],
        [0.390588, 0.759559, 1.000000, 0.455932],
    ],
    "the pair of first order": [
        [0.460193, 1.000000, 0.207433, -0.656914],
        [0.631885, 0.639226, 0.178916, 0.716938],
        [0.434393, 0.868702, 1.000000, 0.537106],
    ],
    "the pair of second order": [
        [0.45201, 1.000000, 0.286755, -0.696548],
        [0.615857, 0.682194, 0.0505145, 0.718451],
        [0.431537, 0.952205, 1.000000, 0.532179],
    ],
    "the single-rate model with more variance": [
        [0.491458, 0.996663, 0.458582, -0.634917],
        [0.640335, 0.654984, 0.149556, 0.684177],
        [0.416915, 0.864974, 1.000000, 0.464946],
    ],
    "the single-rate model of a shifted schedule": [
        [0.457179, 1.000000, 0.385285, -0.775706],
        [0.661338, 0.312732, 0.299847, 0.673009],
        [0.407241, 1.000000, 0.642293, 0.459732],
    ],
    "the single-rate model with DPM-Solver++": [
        [0.42518, 1.202885, -0.121298, -0.785919],
        [0.560689, -0.275189, -0.288922, 0.774251],
        [0.407578, 1.183719, 1.014553, 0.327916],
    ],
}

# The loss, then the norm of the gradient of the denoiser and of the encoder.
LEARNED = {
    "a pair and its encoder's own": [2.150163, 0.379221, 0.966436],
    "a single-rate model": [2.399044, 0.99526],
    "a pair that follows its encoder": [0.0421833, 0.149266, 0.186669],
    "a new denoiser of a student": [0.531189, 1.186548, 1.815879],
    "an auxiliary": [0.149074, 0.4535],
    "a student": [0.0291762, 0.0696044, 0.107787],
    "a student from noise": [0.0591033, 0.0670947, 0.0766866],
}

# Of the denoiser and of the encoder: the sum of all weights in the order of their names, number i times cos(i).
TRAINED = {
    "a pair": [7.543905, -11.917784],
    "a pair that follows its encoder": [-9.994761, -6.317719],
    "a single-rate model": [0.1647],
    "a student": [5.889105, 0.937638],
    "a student of a pair from noise": [0.451308, -6.696348],
}


@functools.cache
def load(name, **options):
    pipe = DualRatePipeline.from_pretrained(MODELS / name, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe, class_labels=CLASSES, **options):
    """The mean of each of three images, then three of its values, from seeds 0, 1 and 2."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = pipe(class_labels, generator=generators, output_type="latent", **options).images
    return [[image.mean().item(), *(image[place].item() for place in PLACES)] for image in images]


def sample_as_released(name):
    return pixels(load(name))


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
    "the pair as released": lambda: sample_as_released(PAIR),
    "the single-rate model as released": lambda: sample_as_released(SINGLE),
    "the student as released": lambda: sample_as_released(STUDENT),
    "the pair without guidance": lambda: sample_unguided(PAIR),
    "the pair with named refreshes and guidance in an interval": lambda: sample_where_named(PAIR),
    "the pair whose encoder denoises": lambda: sample_without_denoiser_at_refreshes(PAIR),
    "the pair of first order": lambda: sample_in_order(False, PAIR),
    "the pair of second order": lambda: sample_in_order(True, PAIR),
    "the single-rate model with more variance": lambda: sample_in_order(False, SINGLE, variance_interpolation=0.3),
    "the single-rate model of a shifted schedule": lambda: sample_in_order(True, SINGLE, image_size=64),
    "the single-rate model with DPM-Solver++": lambda: sample_with_dpm_solver(SINGLE),
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
    """Eight images of the released models' data, augmented as in their training, with their classes."""
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
    """A step of the released student's; the single-rate model is the auxiliary, and less sure of itself the teacher."""
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
    """Four steps on made-up images; the weights as they are released."""
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
def test_released_models_draw_the_images_that_they_drew(case):
    assert SAMPLES[case]() == [pytest.approx(values, rel=0, abs=1e-4) for values in IMAGES[case]]


@pytest.mark.parametrize("case", LOSSES)
def test_released_models_would_learn_what_they_learned(case):
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
