"""The distillation example as a user runs it, on tiny models."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import distill
from conftest import PRESET, reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.checkpoints import list_checkpoints
from test_training import assert_equal_weights, weights

CLASSES = {0: "cat", 1: "dog"}


def save(folder, encoder=None, scheduler=None, **changes):
    """Save a model that predicts little, but not nothing: single-rate of the encoder's shape, or a pair."""
    torch.manual_seed(3)
    shared = {"num_classes": 2} | changes
    shape = {**PRESET["context_encoder"], "context_channels": None} if encoder is None else PRESET["denoiser"]
    denoiser = UViTDenoiser(**shape | shared)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    encoder = encoder and UViTContextEncoder(**PRESET["context_encoder"] | shared)
    pipe = DualRatePipeline(
        denoiser,
        DualRateScheduler(**PRESET["scheduler"] | (scheduler or {})),
        encoder,
        id2label=CLASSES if shared["num_classes"] == 2 else None,
        num_inference_steps=4,
        num_context_steps=2 if encoder else None,
        guidance_scale=2.0,
    )
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(root):
    """An uninterrupted run of both phases, with a checkpoint at every step."""
    run(root, root / "whole", *data(root), "--checkpointing_steps", 1)
    return root / "whole"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images of two classes, a teacher and a pair that was trained, as far as the script can tell."""
    root = tmp_path_factory.mktemp("distill")
    rng = np.random.default_rng(0)
    for name in CLASSES.values():
        (root / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                root / "images" / name / f"{i}.png"
            )
    save(root / "teacher")
    save(root / "pair", encoder=True)
    return root


def data(root):
    return ["--train_data_dir", root / "images", "--label_column", "label", "--cache_dir", root / "cache"]


def run(root, output_dir, *more, teacher="teacher"):
    arguments = ["--preset", "examples/presets/tiny.json", "--output_dir", output_dir, "--validation_steps", 0]
    arguments += ["--teacher", root / teacher, *more]
    try:
        return distill.main(distill.parse_args([str(argument) for argument in arguments]))
    finally:
        reset_accelerate()


@pytest.mark.parametrize("student", [None, "pair", "teacher"])
def test_a_student_takes_its_few_steps_without_being_told(root, whole, tmp_path, student):
    if student is None:
        tmp_path = whole
    else:
        assert run(root, tmp_path, *data(root), "--student", root / student) == 0
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    assert (pipe.context_encoder is None) == (student == "teacher")
    assert pipe.config.num_inference_steps == 4 and pipe.config.guidance_scale == 1.0
    assert pipe.config.num_context_steps == (None if student == "teacher" else 2)
    assert pipe.id2label == CLASSES and not pipe.scheduler.config.clip_sample
    calls = {"denoiser": 0, "context_encoder": 0}
    for name in calls:
        if pipe.components[name] is not None:
            pipe.components[name].register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    image = pipe(class_labels="dog", output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()
    assert calls == {"denoiser": 4, "context_encoder": 0 if student == "teacher" else 2}
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["images_seen"] == 8 * (6 if student is None else 4)
    assert record["network"] == ("distilled single-rate" if student == "teacher" else "distilled pair")
    told = json.loads((tmp_path / "configuration.json").read_text())
    assert told["start"]["teacher"] == "teacher" and len(told["found"]["models"]["teacher"]) == 32


def test_a_student_learns_from_noise_alone(root, tmp_path):
    run(root, tmp_path, "--student", root / "pair", "--full_rollout", "--ema_decay", 0)
    before, after = weights(root / "pair"), weights(tmp_path)
    for network in ("context_encoder", "denoiser"):
        names = [name for name in before if name.startswith(network)]
        assert sum(not torch.equal(before[name], after[name]) for name in names) > len(names) / 2


def test_dropout_acts_in_what_learns_alone(root, tmp_path, monkeypatch):
    """Not in the encoder while it waits, nor in the samples that all processes hold against the teacher's."""
    found = []

    def watch(name):
        original = getattr(distill, name)

        def watched(denoise, encode, *args, **kwargs):
            networks = denoise.__self__
            found.append((name, networks.context_encoder.training, networks.denoiser.training))
            return original(denoise, encode, *args, **kwargs)

        monkeypatch.setattr(distill, name, watched)

    for name in ("grid_denoising_loss", "auxiliary_loss", "student_loss", "roll_out"):
        watch(name)
    run(root, tmp_path, *data(root), "--checkpointing_steps", 1)
    modes = {"grid_denoising_loss": (False, True), "roll_out": (False, False)}
    assert {name for name, *_ in found} == {"grid_denoising_loss", "auxiliary_loss", "student_loss", "roll_out"}
    assert all((encoder, denoiser) == modes.get(name, (True, True)) for name, encoder, denoiser in found)


@pytest.mark.parametrize("prediction_hand_over", [False, True])
def test_the_encoder_starts_as_the_teacher_and_waits_until_the_denoiser_has_learned(
    root, tmp_path, prediction_hand_over
):
    preset = json.loads(json.dumps(PRESET))
    preset["denoiser"]["prediction_hand_over"] = prediction_hand_over
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    run(root, tmp_path, *data(root), "--preset", tmp_path / "preset.json", "--max_train_steps", 1, "--ema_decay", 0)
    teacher, student = weights(root / "teacher"), weights(tmp_path)
    taken = {name for name in teacher if name.replace("denoiser.", "context_encoder.", 1) in student}
    assert any(".proj_out." in name for name in taken) == prediction_hand_over
    assert sum(".trunk." in name for name in taken) == sum(".trunk." in name for name in teacher) > 10
    for name in taken:
        assert torch.equal(teacher[name], student[name.replace("denoiser.", "context_encoder.", 1)])
    assert student["denoiser.context_proj.0.weight"].abs().max() > 0  # it starts at zero
    assert student["denoiser.proj_out.weight"].abs().max() > 0  # it starts at zero


@pytest.mark.parametrize("stop", [1, 3])  # in either phase
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(root, whole, tmp_path, stop):
    shutil.copy(whole / "configuration.json", tmp_path)
    shutil.copytree(whole / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    run(root, tmp_path, *data(root), "--resume_from_checkpoint", "latest")
    assert_equal_weights(weights(whole), weights(tmp_path))


def test_auxiliary_and_student_take_turns_and_whichever_rests_keeps_its_weights_and_its_moments(whole):
    """Kills: both in one step; a turn missed; weight decay or moments of what rests."""
    states = [torch.load(whole / f"checkpoint-{i}/optimizer.bin", weights_only=True)["state"] for i in range(2, 7)]
    models = [load_file(whole / f"checkpoint-{i}/model.safetensors") for i in range(2, 7)]
    for i in range(4):
        is_auxiliary_step = i % 2 == 0
        before, after = models[i : i + 2]
        moved = {name.startswith("auxiliary.") for name in after if not torch.equal(before[name], after[name])}
        assert moved == {is_auxiliary_step}
        counts = [{key: value["step"].item() for key, value in state.items()} for state in states[i : i + 2]]
        moved = {key for key, count in counts[1].items() if count != counts[0].get(key)}
        assert 0 < len(moved) == sum(name.startswith("auxiliary.") == is_auxiliary_step for name in after)


def test_the_guidance_of_the_teacher_reaches_the_student(root, tmp_path):
    plain = ["--student", root / "teacher", "--ema_decay", 0, "--max_train_steps", 2]
    run(root, tmp_path / "plain", *data(root), *plain)
    run(root, tmp_path / "guided", *data(root), *plain, "--guidance_scale", 3)
    plain, guided = weights(tmp_path / "plain"), weights(tmp_path / "guided")
    assert not all(torch.equal(plain[name], guided[name]) for name in plain)
    assert DualRatePipeline.from_pretrained(tmp_path / "guided").config.guidance_scale == 1.0


def test_a_teacher_without_classes_is_distilled_without_guidance(root, tmp_path):
    """A preset's guidance is for data with classes; without them the teacher's pipeline would refuse it."""
    save(tmp_path / "teacher", num_classes=None)
    images = ["--train_data_dir", root / "images", "--cache_dir", root / "cache"]
    options = ["--student", tmp_path / "teacher", "--guidance_scale", 2, "--max_train_steps", 1]
    assert run(root, tmp_path / "student", *images, *options, teacher=tmp_path / "teacher") == 0


@pytest.mark.parametrize("steps", [(8, 3), (2, 4), (4, 0)])
def test_refreshes_that_do_not_divide_the_steps_are_refused(root, tmp_path, steps):
    options = ["--num_inference_steps", steps[0], "--num_context_steps", steps[1]]
    with pytest.raises(ValueError, match=f"must divide num_inference_steps={steps[0]}, got {steps[1]}"):
        run(root, tmp_path, *data(root), *options)


def test_the_help_says_which_steps_each_flag_counts_and_a_trained_student_has_none_of_the_first_kind(
    root, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        distill.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "auxiliary and of the student, in turns. Those of --pretraining_steps come before" in said
    assert "a new student learns to denoise, before those of --max_train_steps; with --student there are none" in said
    with pytest.raises(ValueError, match="--pretraining_steps 5 is for a new student, without --student"):
        run(root, tmp_path / "run", *data(root), "--student", root / "pair", "--pretraining_steps", 5)
    assert not (tmp_path / "run").exists()


def test_a_number_of_refreshes_that_is_no_number_is_refused_before_any_model_is_loaded(root, tmp_path):
    options = ["--override", 'distillation.num_context_steps="two"']
    with pytest.raises(ValueError, match="num_context_steps must be an integer, got 'two'"):
        run(root, tmp_path, *data(root), *options, teacher="nowhere")


def test_a_single_rate_student_has_no_refreshes_to_divide_its_steps(root, tmp_path):
    options = ["--num_inference_steps", 3, "--max_train_steps", 1, "--student", root / "teacher"]
    assert run(root, tmp_path, *data(root), *options) == 0
    assert json.loads((tmp_path / "configuration.json").read_text())["distillation"]["num_context_steps"] == 3


@pytest.mark.parametrize("rate", [0.0, -1e-3])
def test_a_learning_rate_that_is_not_above_zero_is_refused(root, tmp_path, rate):
    with pytest.raises(ValueError, match=rf"learning_rate must be a finite number in \(0, 1\], got {rate}"):
        run(root, tmp_path, *data(root), "--learning_rate", rate)


@pytest.mark.parametrize("options", [[], ["--student"], ["--full_rollout"]])
def test_missing_data_is_refused_unless_a_trained_student_rolls_out_from_noise(root, tmp_path, options):
    options = [part for option in options for part in ([option, root / "pair"] if "student" in option else [option])]
    with pytest.raises(ValueError, match="Without data, both --student and --full_rollout are needed"):
        run(root, tmp_path, *options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 1}, "in_channels is 1 in the teacher and 3 in the "),
        ({"sample_size": 8}, "sample_size is 8 in the teacher and 16 in the "),
        ({"num_classes": 5}, "num_classes is 5 in the teacher and 2 in the "),
        ({"scheduler": {"log_snr_min": -12.0}}, r"log_snr_min is -12.0 in the teacher and -10.0 in the "),
    ],
)
@pytest.mark.parametrize("with_student", [True, False])
def test_a_teacher_that_does_not_fit_is_refused_with_both_values(root, tmp_path, changes, message, with_student):
    save(tmp_path / "teacher", **changes)
    student = ["--student", root / "pair"] if with_student else []
    message = f"{message}student" if with_student else f"{message}preset|has 5 classes, and the data has 2"
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "run", *data(root), *student, teacher=tmp_path / "teacher")
    assert not (tmp_path / "run").exists()


def test_a_pair_is_no_teacher_and_unlabelled_images_do_not_fit_one_with_classes(root, tmp_path):
    with pytest.raises(ValueError, match="must be a single-rate model"):
        run(root, tmp_path, *data(root), teacher="pair")
    with pytest.raises(ValueError, match="teacher has 2 classes, and the data has none: see --label_column"):
        run(root, tmp_path, "--train_data_dir", root / "images", "--cache_dir", root / "cache")


def test_a_student_whose_samples_become_alike_is_stopped_with_the_last_good_state_kept(root, tmp_path):
    options = ["--override", "distillation.min_variance_share=1000", "--checkpointing_steps", 1]
    with pytest.raises(ValueError, match=r"collapsed at step 2: .* less than 1000; the last good state is .*-2\."):
        run(root, tmp_path, *data(root), *options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(("part", "step"), [("auxiliary", 2), ("student", 3)])
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path, monkeypatch, part, step):
    function = getattr(distill, f"{part}_loss")

    def diverge(*args, **kwargs):
        result = function(*args, **kwargs)
        return result * float("nan") if part == "auxiliary" else (result[0] * float("nan"), result[1])

    monkeypatch.setattr(distill, f"{part}_loss", diverge)
    with pytest.raises(ValueError, match=rf"diverged at step {step}; the last good state is .*checkpoint-{step}"):
        run(root, tmp_path, *data(root), "--checkpointing_steps", 1)
