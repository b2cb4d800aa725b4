"""The training plumbing, and the training examples as a user runs them."""

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dual_rate
import train_single_rate
from conftest import draw_classes, reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, data, optimization, pair, run_folder, sources
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.cards import UNMEASURED
from diffusers_dualrate.checkpoints import find_damage, list_checkpoints
from diffusers_dualrate.configuration import Configuration, Data
from diffusers_dualrate.flops import context_flops, network_flops
from diffusers_dualrate.losses import denoising_loss, draw
from diffusers_dualrate.pictures import draw_grid
from diffusers_dualrate.recipes import SingleRateRecipe
from diffusers_dualrate.runs import SAMPLES, Run

SCRIPTS = {"dual": train_dual_rate, "single": train_single_rate}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images with two classes."""
    return draw_classes(tmp_path_factory.mktemp("images"), 6, (20, 18))


def arguments(folder, output_dir, *more):
    return [
        *("--preset", "examples/presets/tiny.json", "--train_data_dir", str(folder), "--label_column", "label"),
        *(
            "--output_dir",
            str(output_dir),
            "--cache_dir",
            str(Path(folder).parent / "cache"),
            "--validation_steps",
            "0",
        ),
        *map(str, more),
    ]


def train(script, folder, output_dir, *more):
    module = SCRIPTS[script]
    try:
        return module.main(module.parse_args(arguments(folder, output_dir, *more)))
    finally:
        reset_accelerate()


@pytest.fixture
def at_loss(monkeypatch):
    """Let something happen as the loss is computed for the n-th time, and to its result."""

    def attach(script, n, happen):
        def loss_function(*args, **kwargs):
            result = denoising_loss(*args, **kwargs)
            calls.append(0)
            if len(calls) == n:
                happen(result)
            return result

        calls = []
        monkeypatch.setattr(SCRIPTS[script], "denoising_loss", loss_function)

    return attach


def everything_in(checkpoint):
    """Digest of each file of a checkpoint: weights, EMA, optimiser, learning rate, random states, position."""
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    assert len(hashes) == 6
    return hashes


def weights(path):
    return {
        f"{file.parent.name}.{key}": value
        for file in sorted(path.glob("*/diffusion_pytorch_model.safetensors"))
        for key, value in load_file(file).items()
    }


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_step_of_the_optimiser_is_that_of_the_recipe_at_the_rate_of_its_course():
    """The first steps of AdamW on a constant gradient have a closed form: rate · (sign + decay · weight), decoupled."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    recipe = SingleRateRecipe(
        **{"learning_rate": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.8, "adam_weight_decay": 0.25, "ema_decay": 0.9},
        **{"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 6, "train_batch_size": 1},
        **{"bias": 0.0, "label_dropout": 0.0},
    )
    optimizer = optimization.make_optimizer([weight], recipe)
    lr_scheduler = optimization.make_lr_scheduler(optimizer, recipe)
    expected = 2.0
    for rate in (0, 0.05, 0.1, 0.075, 0.05, 0.025, 0):
        weight.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
        lr_scheduler.step()
        expected -= rate * (1 + 0.25 * expected)
        assert weight.item() == pytest.approx(expected, abs=1e-7)
    assert optimizer.defaults["betas"] == (0.5, 0.8) and optimizer.defaults["eps"] == 1e-8
    other = dataclasses.replace(recipe, adam_epsilon=1e-4)
    assert optimization.make_optimizer([weight], other).defaults["eps"] == 1e-4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_training_run_leaves_a_model_that_loads_and_samples(script, folder, tmp_path):
    train(script, folder, tmp_path, "--validation_steps", 2)
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    assert pipe.id2label == {0: "cat", 1: "dog"}
    assert (pipe.context_encoder is None) == (script == "single")
    assert pipe.config.num_inference_steps == 4
    raw, averaged = (load_file(tmp_path / f"checkpoint-4/{name}.safetensors") for name in ("model", "ema"))
    keys = [name for name, _ in pipe.denoiser.named_parameters()]
    for i, (name, parameter) in enumerate(pipe.denoiser.named_parameters()):
        assert torch.equal(parameter, averaged[str(i)]), name
    assert any(not torch.equal(raw[f"denoiser.{name}"], pipe.denoiser.get_parameter(name)) for name in keys)
    image = pipe("dog", output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"0000002.png", "0000004.png"}
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["images_seen"] == 4 * 8 and record["seconds"] > 0
    assert record["network"] == {"dual": "pair", "single": "heavy"}[script]
    told = json.loads((tmp_path / "configuration.json").read_text())
    assert told["training"]["learning_rate"] == 0.003 and told["preset"] == "tiny"
    assert ("context_dropout" in told["training"]) == (script == "dual")
    assert told["found"]["images"]["classes"] == ["cat", "dog"] and told["found"]["images"]["images"] == 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_explains_its_numbers_at_the_first_step_and_says_at_its_end_what_to_do_next(
    script, folder, tmp_path, capsys
):
    train(script, folder, tmp_path / "run")
    printed, bar = capsys.readouterr()
    assert re.search(r" 1/4 \[[^\]]*loss=\d\.\d+, v_loss=\d\.\d+", bar)
    assert printed.count("\nloss: what is minimised") == printed.count("\nv_loss: mean squared error") == 1
    assert f"The model is in {tmp_path / 'run'}, and its card is {tmp_path / 'run/README.md'}." in printed
    commands = dict(re.findall(r"^(Look at it|Make .*|Measure it): (.*)$", printed, re.MULTILINE))
    learn = importlib.import_module("train_classifier").parse_args(
        shlex.split(commands.pop("Make what measures distances, once for each data set").partition(".py ")[2])
    )
    assert learn.preset == str(tmp_path / "run/configuration.json") and learn.label_column == "label"
    assert learn.train_data_dir == str(folder)  # as it was given, not its last name
    assert set(commands) == {"Look at it", "Measure it"}
    for command in commands.values():
        script_of, _, flags = command.partition(".py ")
        args = importlib.import_module(script_of.rpartition("/")[2]).parse_args(shlex.split(flags))
        assert args.model == str(tmp_path / "run")
    assert args.label_column == "label" and args.output == str(tmp_path / "run/evaluation.json")
    assert args.classifier == learn.output == str(tmp_path / "classifier.safetensors")


def test_the_card_of_a_run_says_that_nobody_measured_it_and_one_that_somebody_wrote_stays(folder, tmp_path):
    train("dual", folder, tmp_path / "run", "--validation_steps", 4, "--override", "training.bias=0.5")
    card = tmp_path / "run/README.md"
    text = card.read_text()
    assert 'from_pretrained("run")' in text and "](samples/0000004.png)" in text and "datasets:" not in text
    assert "32 images, 3 passes over the 12 of `images" in text and "| `bias` | **0.5** (overridden) |" in text
    assert "Its defaults are N = 4, K = 2 and guidance 1.0." in text and str(tmp_path) not in text
    assert UNMEASURED in text and "fd_local" not in text
    train(
        "dual",
        folder,
        tmp_path / "run",
        "--max_train_steps",
        5,
        "--resume_from_checkpoint",
        "latest",
        "--override",
        "training.bias=0.5",
    )
    assert "40 images" in card.read_text()
    card.write_text("mine")
    train(
        "dual",
        folder,
        tmp_path / "run",
        "--max_train_steps",
        6,
        "--resume_from_checkpoint",
        "latest",
        "--override",
        "training.bias=0.5",
    )
    assert card.read_text() == "mine"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_of_a_model_are_the_part_sampling_of_its_preset_with_what_was_given(script, folder, tmp_path):
    """Samples that a run draws, evaluate.py and generate.py name none of them, and so take the model's."""
    preset = json.loads(Path("examples/presets/tiny.json").read_text())
    preset["sampling"] |= {"second_order": True, "guidance_scale": 2.5}
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    changed = [
        "--override",
        "sampling.num_inference_steps=6",
        "--preset",
        tmp_path / "preset.json",
        "--validation_steps",
        1,
    ]
    tmp_path = tmp_path / "run"
    train(script, folder, tmp_path, "--max_train_steps", 1, *changed)
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    assert pipe.config.num_inference_steps == 6 and pipe.config.guidance_scale == 2.5
    assert pipe.config.num_context_steps == (2 if script == "dual" else None)
    assert pipe.scheduler.config.second_order
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.5, "num_inference_steps": 6, "num_context_steps": 2 if script == "dual" else None}
    labels = [i * 2 // SAMPLES for i in range(SAMPLES)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
    told = pipe(labels, generator=generators, **options).images
    grid = draw_grid(told, [pipe.id2label[label] for label in labels])
    assert np.asarray(grid).tobytes() == np.asarray(Image.open(tmp_path / "samples" / "0000001.png")).tobytes()


@pytest.mark.parametrize(
    ("steps", "told", "grids"), [(4, None, [1, 2, 3, 4]), (8, None, [2, 4, 6, 8]), (4, 3, [3, 4]), (4, 0, [])]
)
def test_a_run_however_short_draws_while_it_trains(steps, told, grids, folder, tmp_path):
    flags = [] if told is None else ["--validation_steps", told]
    module = train_single_rate
    argv = [word for word in arguments(folder, tmp_path) if word not in ("--validation_steps", "0")]
    module.main(module.parse_args([*argv, "--max_train_steps", str(steps), *map(str, flags)]))
    assert [int(path.stem) for path in sorted(tmp_path.glob("samples/*.png"))] == grids


@pytest.mark.parametrize(
    ("script", "number", "options"),
    [
        ("dual", signal.SIGTERM, []),
        ("single", signal.SIGINT, ["--gradient_accumulation_steps", 2, "--mixed_precision", "bf16"]),
        ("single", signal.SIGTERM, ["--streaming", "--shuffle_buffer", 5, "--gradient_checkpointing"]),
    ],
)
def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_had_happened(
    script, number, options, folder, tmp_path, at_loss
):
    options = ["--override", "denoiser.dropout=0.1", "context_encoder.dropout=0.1", *options]
    train(script, folder, tmp_path / "whole", *options)
    at_loss(script, 3, lambda result: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(script, folder, tmp_path / "parts", *options) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    # The third loss is of the third step, or of the second where two are accumulated.
    stopped = 2 if "--gradient_accumulation_steps" in options else 3
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == [f"checkpoint-{stopped}"]
    assert not (tmp_path / "parts" / "model_index.json").exists()
    assert train(script, folder, tmp_path / "parts", *options, "--resume_from_checkpoint", "latest") == 0
    whole, parts = (everything_in(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    assert whole == parts
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_longer_run_goes_on_from_a_shorter_one(folder, tmp_path):
    train("dual", folder, tmp_path / "whole")
    train("dual", folder, tmp_path / "parts", "--max_train_steps", 2)
    train("dual", folder, tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_sampling_changes_no_weight_and_its_grids_reach_the_tracker(folder, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("dual", folder, tmp_path / "without")
    train("dual", folder, tmp_path / "with", "--validation_steps", 2, "--report_to", "tensorboard")
    assert everything_in(tmp_path / "with/checkpoint-4") == everything_in(tmp_path / "without/checkpoint-4")
    log = EventAccumulator(str(tmp_path / "with/diffusers-dualrate")).Reload()
    assert [event.step for event in log.Images("samples")] == [2, 4]
    assert log.Scalars("images_seen")[-1].value == 4 * 8 and log.Scalars("images_per_second")[-1].value > 0
    assert {"loss", "v_loss", "lr"} < set(log.Tags()["scalars"])
    printed = capsys.readouterr().out
    assert "denoiser: 10,075 parameters, 0.5 MFLOP per image and evaluation" in printed
    first, second = (Image.open(tmp_path / "with/samples" / f"000000{step}.png") for step in (2, 4))
    # Enlarged six times, each under the name of its class.
    assert first.size == (8 * (96 + 4) + 4, 4 * (14 + 96 + 4) + 4) and first.tobytes() != second.tobytes()
    assert f"a grid of samples every 2 steps: {tmp_path / 'with/samples'}" in printed


@pytest.mark.parametrize("way", [["--dataloader_num_workers", 2], ["--streaming", "--dataloader_num_workers", 1]])
@pytest.mark.filterwarnings("ignore:The image:UserWarning")
def test_the_corrupt_images_that_data_workers_leave_out_are_counted_at_the_end(
    folder, tmp_path, monkeypatch, capsys, way
):
    shutil.copytree(folder, tmp_path / "images")
    for name in ("cat/3.png", "dog/9.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    monkeypatch.setattr(data, "CACHE_BYTES", 0)  # so that the images are read as they are needed
    train("single", tmp_path / "images", tmp_path / "run", "--on_corrupt", "skip", "--max_train_steps", 6, *way)
    assert "Corrupt images that were left out: 2." in capsys.readouterr().out
    assert json.loads((tmp_path / "run/training.json").read_text())["corrupt_images"] == 2


def test_training_changes_both_networks(folder, tmp_path):
    train("dual", folder, tmp_path / "none", "--max_train_steps", 1, "--ema_decay", 0.0)
    train("dual", folder, tmp_path / "some", "--max_train_steps", 4, "--ema_decay", 0.0)
    before, after = weights(tmp_path / "none"), weights(tmp_path / "some")
    for network in ("context_encoder", "denoiser"):
        changed = [key for key in before if key.startswith(network) and not torch.equal(before[key], after[key])]
        assert len(changed) > 10


def test_accumulating_gradients_equals_a_larger_batch(folder, tmp_path):
    """Kills: the share without context rounded in each part by itself, to 2 + 2 rows where the whole batch has 3."""
    plain = ["--learning_rate", 1e-4, "--context_dropout", 0.4, "--override", "training.lr_warmup_steps=0"]
    train("dual", folder, tmp_path / "large", *plain, "--train_batch_size", 8)
    train("dual", folder, tmp_path / "parts", *plain, "--train_batch_size", 4, "--gradient_accumulation_steps", 2)
    large, parts = (load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("large", "parts"))
    assert large.keys() == parts.keys()
    for key in large:
        torch.testing.assert_close(large[key], parts[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("parts", "size"), [(1, 8), (2, 8), (4, 12), (1, 7)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 0.5, 1.0])
def test_a_share_of_a_batch_is_the_same_rows_however_the_batch_is_cut(parts, size, share):
    """Kills: floor for round; rounded in each part by itself; the last rows for the first."""
    run = SimpleNamespace(recipe=SimpleNamespace(train_batch_size=size), rows=lambda part: range(part, size, parts))
    chosen = [row for part in range(parts) for row in run.rows(part)[: Run.count_of_first(run, part, share)]]
    assert sorted(chosen) == list(range(round(share * size)))


def test_the_next_draws_are_made_while_those_of_a_batch_are_in_use_and_are_those_of_its_step_and_rows():
    """Kills: the part of the step before; drawing when they are asked for."""
    asked = collections.defaultdict(threading.Event)

    def draw(step, rows):
        asked[step, rows].set()
        return step, rows

    run = SimpleNamespace(accelerator=SimpleNamespace(gradient_accumulation_steps=2), step=3, is_stopping=False)
    run.images, run.options = SimpleNamespace(vae=None), SimpleNamespace(seed=0)
    run.rows = lambda part: range(part, 4, 2)
    drawn = []
    for step, part, _, draws in Run.batches(run, [{} for _ in range(5)], draw):
        drawn.append((step, part))
        assert draws == (step, run.rows(part))
        following = (step, run.rows(1)) if part == 0 else (step + 1, run.rows(0))
        assert asked[following].wait(10)
    assert drawn == [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]


@pytest.mark.parametrize(("flag", "share"), [("--context_dropout", 0.01), ("--context_dropout", 0.06)])
def test_a_share_that_no_row_of_a_batch_makes_up_is_refused(folder, tmp_path, flag, share):
    with pytest.raises(ValueError, match=f"A share of {share} of 8 images is none: use larger batches, or 0"):
        train("dual", folder, tmp_path, flag, share)


def test_a_run_that_is_told_fewer_steps_than_it_has_taken_is_refused_and_its_record_stays(folder, tmp_path):
    train("single", folder, tmp_path, "--max_train_steps", 3)
    record = (tmp_path / "configuration.json").read_text()
    with pytest.raises(ValueError, match="has 3 steps behind it, more than the 2 of this run"):
        train("single", folder, tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "configuration.json").read_text() == record
    train("single", folder, tmp_path, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")


def test_a_warm_up_as_long_as_the_training_is_told_of(folder, tmp_path):
    script = train_single_rate
    for steps, is_short in ((5, True), (6, False)):
        told = arguments(folder, tmp_path, "--lr_warmup_steps", 5, "--max_train_steps", steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            configure(script.parse_args(told), "train_single_rate")
        said = "lr_warmup_steps is 5 and max_train_steps 5: the learning rate never reaches its peak."
        assert [str(warning.message) for warning in caught] == [said] * is_short


def test_an_empty_output_folder_is_refused_instead_of_the_current_one(folder):
    with pytest.raises(ValueError, match="--output_dir is empty, and must name a folder"):
        train("single", folder, "")


def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    options = ["--checkpointing_steps", 1, "--checkpoints_total_limit"]
    train("single", folder, tmp_path, *options, 3, "--max_train_steps", 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    (tmp_path / ".checkpoint-9").mkdir()  # left by a kill
    resume = ["--resume_from_checkpoint", "latest"]
    train("single", folder, tmp_path, *options, 2, "--max_train_steps", 3, *resume)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    train("single", folder, tmp_path, *options, 2, *resume)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_goes_back_sets_the_checkpoints_after_that_aside(folder, tmp_path):
    every = ["--checkpointing_steps", 1]
    train("single", folder, tmp_path, *every, "--max_train_steps", 3)
    back = ["--resume_from_checkpoint", tmp_path / "checkpoint-1", "--checkpoints_total_limit", 1]
    train("single", folder, tmp_path, *every, *back, "--max_train_steps", 2)
    kept = {path.name for path in tmp_path.glob("*checkpoint*")}
    assert kept == {"checkpoint-2", "abandoned-checkpoint-2", "abandoned-checkpoint-3"}


def test_a_run_that_goes_on_from_another_folder_sets_its_own_newer_checkpoints_aside(folder, tmp_path):
    every = ["--checkpointing_steps", 1]
    train("single", folder, tmp_path / "a", *every, "--max_train_steps", 1)
    train("single", folder, tmp_path / "b", *every, "--max_train_steps", 3)
    back = ["--resume_from_checkpoint", tmp_path / "a/checkpoint-1", "--checkpoints_total_limit", 1]
    train("single", folder, tmp_path / "b", *every, *back, "--max_train_steps", 2)
    kept = {path.name for path in (tmp_path / "b").glob("*checkpoint*")}
    assert kept == {"checkpoint-2", "abandoned-checkpoint-2", "abandoned-checkpoint-3"}


def test_a_kill_while_the_record_of_a_run_is_written_again_does_not_take_the_run(folder, tmp_path, monkeypatch):
    train("single", folder, tmp_path, "--max_train_steps", 1)
    write_text, resume = Path.write_text, ["--resume_from_checkpoint", "latest", "--max_train_steps", 2]

    def tear(path, text, **options):
        write_text(path, text[:40] if path.name.endswith("configuration.json") else text, **options)
        if path.name.endswith("configuration.json"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", tear)
        train("single", folder, tmp_path, *resume)
    train("single", folder, tmp_path, *resume)
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, tmp_path):
    train("single", folder, tmp_path, "--max_train_steps", 1)
    kept = weights(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        train("single", folder, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", "latest", "--learning_rate", 0.1)
    for checkpoint in list_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds a trained model, but no checkpoint"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", "latest")
    assert_equal_weights(kept, weights(tmp_path))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--gradient_accumulation_steps", 2], "options.gradient_accumulation_steps is 1 there and 2 here"),
        (["--network", "light"], 'start.network is "heavy" there and "light" here'),
        (["--seed", 1], "options.seed is 0 there and 1 here"),
        (["--resolution", 8], "denoiser.sample_size is 16 there and 8 here"),
    ],
)
def test_a_run_is_not_resumed_as_another_and_the_difference_is_named(folder, tmp_path, options, difference):
    train("single", folder, tmp_path, "--max_train_steps", 1)
    with pytest.raises(ValueError, match=f"another configuration: .*{difference}"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", "latest", *options)
    with pytest.raises(ValueError, match=f"another configuration: .*{difference}"):
        train("single", folder, tmp_path / "new", "--resume_from_checkpoint", tmp_path / "checkpoint-1", *options)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_may_be_named_as_it_lies_in_the_folder(folder, tmp_path):
    train("single", folder, tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    train("single", folder, tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "checkpoint-1")
    assert {path.name for path in tmp_path.glob("*checkpoint*")} >= {"abandoned-checkpoint-2", "checkpoint-2"}


def test_a_run_is_not_resumed_with_the_labels_of_another_column(folder, tmp_path):
    train("single", folder, tmp_path, "--max_train_steps", 1)
    path = tmp_path / "configuration.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": record["data"] | {"label_column": "colour"}}))
    with pytest.raises(ValueError, match='data.label_column is "colour" there and "label" here'):
        train("single", folder, tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", 2)


@pytest.mark.parametrize("inside", [".", "runs", "cat/run"])
def test_a_run_does_not_write_into_its_own_images(folder, tmp_path, inside):
    shutil.copytree(folder, tmp_path / "images")
    with pytest.raises(ValueError, match="lies in the images' folder .* and would add its own files to the data"):
        train("single", tmp_path / "images", tmp_path / "images" / inside)


def test_a_run_says_what_it_learns_from(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/cat/notes.txt").write_text("no image")
    train("single", tmp_path / "images", tmp_path / "run", "--max_train_steps", 1)
    printed = capsys.readouterr().out
    assert "images: 12, number of classes: 2" in printed and "classes: 'cat' 6, 'dog' 6" in printed
    assert "left out 1" in printed and "notes.txt" in printed
    assert "steps 0 to 1, each of 8 images, on 1 process\n" in printed


def test_the_data_of_a_run_may_move_but_not_change(folder, tmp_path):
    images, resume = tmp_path / "images", ["--resume_from_checkpoint", "latest", "--max_train_steps"]
    shutil.copytree(folder, images)
    train("single", images, tmp_path / "run", "--max_train_steps", 1)
    train("single", f"{images}/", tmp_path / "run", *resume, 2)
    moved = images.rename(tmp_path / "pictures")
    train("single", moved, tmp_path / "run", *resume, 3)
    (moved / "dog").rename(moved / "wolf")
    with pytest.raises(ValueError, match=r'images.classes is \["cat", "dog"\] there and \["cat", "wolf"\] here'):
        train("single", moved, tmp_path / "run", *resume, 4)
    (moved / "wolf").rename(moved / "dog")
    shutil.copy(moved / "dog/1.png", moved / "dog/0.png")
    with pytest.raises(ValueError, match="images.rows is .* there and .* here"):
        train("single", moved, tmp_path / "run", *resume, 4)


def test_a_second_start_into_the_folder_of_a_run_that_is_alive_is_refused(folder, tmp_path, at_loss, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.1)
    caught = []

    def start_again(result):
        module, argv = train_single_rate, arguments(folder, tmp_path, "--resume_from_checkpoint", "latest")
        with pytest.raises(ValueError, match="holds a run that is alive: wait for its end"):
            module.main(module.parse_args(argv))
        caught.append(0)

    at_loss("single", 2, start_again)
    train("single", folder, tmp_path)
    assert caught and find_damage(tmp_path / "checkpoint-4") is None
    train("single", folder, tmp_path, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")  # it has ended


def test_classes_without_names_on_one_side_are_compared_by_their_number(make_pipe):
    pipe = make_pipe(num_classes=3)
    sources.check_classes("teacher", pipe, SimpleNamespace(num_classes=3, has_captions=False, id2label={}))
    sources.check_classes(
        "teacher", pipe, SimpleNamespace(num_classes=3, has_captions=False, id2label={0: "a", 1: "b", 2: "c"})
    )
    with pytest.raises(ValueError, match="teacher takes no text, and the data has captions: see --caption_column"):
        sources.check_classes("teacher", pipe, SimpleNamespace(num_classes=None, has_captions=True, id2label={}))
    with pytest.raises(ValueError, match="3 classes, and the data has 4"):
        sources.check_classes("teacher", pipe, SimpleNamespace(num_classes=4, has_captions=False, id2label={}))


def test_a_start_that_failed_does_not_block_its_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="divisible by 4"):
        train("single", folder, tmp_path, "--resolution", 18)
    assert not list(tmp_path.iterdir())  # it was refused before the folder was made
    train("single", folder, tmp_path, "--max_train_steps", 1)


def damage(path):
    """Change one byte in the middle of a file, which no reader of the format need notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["ema.safetensors", "model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(folder, tmp_path, file):
    train("single", folder, tmp_path / "whole")
    train("single", folder, tmp_path / "run", "--checkpointing_steps", 1, "--checkpoints_total_limit", 3)
    damage(tmp_path / "run/checkpoint-4" / file)
    (tmp_path / "run/checkpoint-3" / file).unlink()
    with pytest.warns(UserWarning) as warned:
        train("single", folder, tmp_path / "run", "--resume_from_checkpoint", "latest")
    messages = [str(warning.message) for warning in warned if "cannot be read" in str(warning.message)]
    assert f"checkpoint-4 cannot be read: {file} is damaged" in messages[0]
    assert f"checkpoint-3 cannot be read: {file} is missing" in messages[1]
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    kept = {path.name for path in (tmp_path / "run").glob("*checkpoint*")}
    assert kept == {"checkpoint-2", "checkpoint-4", "damaged-checkpoint-3", "damaged-checkpoint-4"}


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder, tmp_path):
    train("single", folder, tmp_path, "--max_train_steps", 1)
    damage(tmp_path / "checkpoint-1" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be read: model.safetensors is damaged"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-1")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="None of the 1 checkpoints"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", "latest")


def test_a_checkpoint_that_does_not_exist_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a checkpoint of a training run"):
        train("single", folder, tmp_path, "--resume_from_checkpoint", tmp_path / "nowhere")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder, tmp_path, at_loss, parts):
    # With two parts a step, in the first of the third.
    at_loss("dual", 2 * parts + 1, lambda result: result.loss.mul_(float("inf")))
    with pytest.raises(ValueError, match=r"diverged at step 2; the last good state is .*checkpoint-2"):
        train("dual", folder, tmp_path, "--checkpointing_steps", 1, "--gradient_accumulation_steps", parts)
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_a_run_that_diverges_before_its_first_checkpoint_says_that_there_is_none(folder, tmp_path, at_loss):
    at_loss("dual", 2, lambda result: result.loss.mul_(float("nan")))
    with pytest.raises(ValueError, match="^The training diverged at step 1; no checkpoint had been saved\\.$"):
        train("dual", folder, tmp_path)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(folder, tmp_path, at_loss):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_loss("dual", 3, lambda result: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
    try:
        with pytest.raises(OSError, match=r"step 3 could not be written: .*; the last good state is .*checkpoint-2"):
            train("dual", folder, tmp_path, "--checkpointing_steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_a_disk_that_is_full_when_samples_are_drawn_names_the_step_and_the_last_good_state(
    folder, tmp_path, monkeypatch
):
    def save(grid, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left") as caught:
        train("dual", folder, tmp_path, "--checkpointing_steps", 1, "--validation_steps", 2)
    assert caught.value.__notes__ == [f"The run ended at step 2; the last good state is {tmp_path / 'checkpoint-2'}."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_column", "kind"], "no column 'kind'"),
        (["--num_classes", 1], "has the label 1 in the column 'label', outside of the 1 classes"),
        (["--num_classes", 1, "--streaming"], "column 'label' names 2 classes, more than the 1 given"),
        (
            ["--gradient_accumulation_steps", 3],
            "train_batch_size 8 is not divisible by 3: processes times parts of a step, 1 x 3",
        ),
        (["--override", "training.speed=1"], "'training.speed=1' names no value of the preset"),
        (["--override", "distillation.guidance_scale=3"], "'distillation.guidance_scale=3' has no effect here: this "),
        (["--num_classes", 2, "--label_column", ""], "--num_classes 2 needs --label_column"),
        (["--override", "training.bias=high"], "'training.bias=high' is no JSON"),
        (["--streaming", "--dataloader_num_workers", 2], "read by one worker at most, not by 2"),
        (["--checkpointing_steps", 0], "checkpointing_steps must be an integer of at least 1, got 0"),
        (["--checkpoints_total_limit", 0], "checkpoints_total_limit must be an integer of at least 1, got 0"),
        (["--max_train_steps", 0], "max_train_steps must be an integer of at least 1, got 0"),
        (["--max_train_steps", -1], "max_train_steps must be an integer of at least 1, got -1"),
        (["--learning_rate", 0], r"learning_rate must be a finite number in \(0, 1\], got 0.0"),
        (["--learning_rate", "nan"], r"learning_rate must be a finite number in \(0, 1\], got nan"),
        (["--ema_decay", 1.5], r"ema_decay must be a finite number in \[0, 1\), got 1.5"),
        (["--max_grad_norm", -1], "max_grad_norm must be a finite number above 0, got -1.0"),
        (["--lr_warmup_steps", -3], "lr_warmup_steps must be an integer of at least 0, got -3"),
        (["--lr_scheduler", "piecewise_constant"], "lr_scheduler must be one of 'constant', "),
        (["--validation_steps", -1], "validation_steps must be an integer of at least 0, got -1"),
        (["--train_batch_size", 0], "train_batch_size must be an integer in .*, got 0"),
        (["--seed", -1], "seed must be an integer"),
        (["--shuffle_buffer", 0], "shuffle_buffer must be an integer of at least 1, got 0"),
        (["--train_batch_size", 10**9], r"train_batch_size must be an integer in \[1, 1048576\], got 1000000000"),
        (
            ["--override", "training.train_batch_size=1000000000"],
            r"train_batch_size must be an integer in \[1, 1048576\]",
        ),
        (["--resolution", 100_000], r"resolution must be an integer in \[1, 16384\], got 100000"),
        (["--num_classes", 10**9], r"num_classes must be an integer in \[1, 1048576\], got 1000000000"),
        (
            ["--dataloader_num_workers", 10**6],
            r"dataloader_num_workers must be an integer in \[0, 1024\], got 1000000",
        ),
        (["--num_classes", 0], "num_classes must be an integer in .*, got 0"),
        (["--resolution", 0], "resolution must be an integer in .*, got 0"),
        (["--dataloader_num_workers", -1], "dataloader_num_workers must be an integer in .*, got -1"),
        (["--max_image_pixels", 0], "max_image_pixels must be an integer of at least 1, got 0"),
        (["--report_to", "wandb"], "The tracker 'wandb' is not installed: pip install wandb"),
        (["--report_to", "paper"], "report_to must be one of 'all', 'aim', "),
        (["--num_inference_steps", 0], "num_inference_steps must be an integer of at least 1, got 0"),
        (
            ["--guidance_scale", 3, "--label_column", ""],
            "--guidance_scale 3.0 needs classes or text: give --label_column",
        ),
        (["--guidance_scale", 0.5], "guidance_scale must be a finite number of at least 1, got 0.5"),
        (["--num_context_steps", 2], "--num_context_steps 2 is for a pair: this is one network"),
        (["--override", "training.label_dropout=2"], r"label_dropout must be a finite number in \[0, 1\), got 2"),
        (["--override", "training.bias=NaN"], "bias must be a finite number, got nan"),
        (["--override", "training.adam_beta1=1"], r"adam_beta1 must be a finite number in \[0, 1\), got 1"),
        (["--override", "training.adam_weight_decay=-1"], "adam_weight_decay must be a finite number of at least 0"),
        (["--override", "denoiser.sample_size=8"], "sample_size must be the same in both networks, got 16 and 8"),
        (["--override", 'training.augmentation={"zoom":2}'], "augmentation has no value 'zoom'; it has background"),
        (["--preset", "nowhere"], "--preset 'nowhere' is neither a file nor one of digits8, emoji32, "),
        (["--output_dir", __file__], "--output_dir must be a folder, but '.*test_training.py' is none"),
        (["--output_dir", f"{__file__}/run"], "--output_dir is '.*/run', but '.*test_training.py' is no folder"),
        (["--cache_dir", f"{__file__}/run"], "--cache_dir is '.*/run', but '.*test_training.py' is no folder"),
        (["--output_dir", "/proc/run"], "--output_dir is '/proc/run', which cannot be written"),
        (["--dataset_name", "digits"], "--dataset_name digits and --train_data_dir .* give one of them"),
        (["--hub_model_id", "org/name"], "--hub_model_id org/name has no effect without --push_to_hub"),
        (["--push_to_hub"], "--push_to_hub needs the Hub, but HF_HUB_OFFLINE is set"),
        (["--push_to_hub", "--hub_model_id", "no name"], "Repo id must use alphanumeric"),
        (["--learning_rate", 1e30], r"learning_rate must be a finite number in \(0, 1\], got 1e\+30"),
        (
            ["--override", "training.context_from=0.5"],
            r"'training.context_from=0.5' names no value of the preset .*tiny.json\.$",
        ),
        (
            ["--override", "training.num_inference_steps=2"],
            "did you mean --num_inference_steps or sampling.num_inference_steps",
        ),
        (["--override", "distillation.ema_decay=0.5"], "did you mean --ema_decay or training.ema_decay"),
        (["--override", "training.learnign_rate=0.5"], "did you mean training.learning_rate"),
        (
            ["--override", "training.ema_decay=0.5", "--ema_decay", 0.9],
            "--ema_decay 0.9 and the override 'training.ema_decay=0.5' set one value twice",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_folder_is_made(folder, tmp_path, options, message, at_loss):
    at_loss("single", 1, lambda result: pytest.fail("A step was made."))
    with pytest.raises(ValueError, match=message):
        train("single", folder, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_context_steps", 99], r"num_context_steps must be an integer in \[1, 4\], got 99"),
        (["--override", "training.context_from=0.5"], "names no value of the preset .*; did you mean --context_from"),
        (
            ["--override", "training.num_context_steps=2"],
            "did you mean --num_context_steps or sampling.num_context_steps",
        ),
        (["--override", "sampling.num_context_steps=99"], r"num_context_steps must be an integer in \[1, 4\], got 99"),
        (["--context_dropout", 1], r"context_dropout must be a finite number in \[0, 1\), got 1"),
        (["--override", "training.label_dropout=1"], r"label_dropout must be a finite number in \[0, 1\), got 1"),
        (["--context_dropout", 2], r"context_dropout must be a finite number in \[0, 1\), got 2.0"),
        (["--context_dropout", -0.1], r"context_dropout must be a finite number in \[0, 1\), got -0.1"),
        (["--context_from", 0], r"context_from must be a finite number in \(0, 1\], got 0.0"),
        (["--context_from", 1.5], r"context_from must be a finite number in \(0, 1\], got 1.5"),
        (
            ["--context_from", 0.99],
            "context_from=0.99 gives all of a batch of 8 rows a context.*larger train_batch_size",
        ),
        (["--context_from", 0.01], "context_from=0.01 gives none of a batch of 8 rows a context"),
        (["--context_from", 0.1], "context_from=0.125 leaves none of 4 steps for a context"),
        (["--override", "training.context_ages=[]"], r"context_ages must be a list of shares of the chain, got \[\]"),
        (["--override", "training.context_ages=[-4]"], r"context_ages must be a finite number in \[0, 1\], got -4"),
        (["--override", "training.context_ages=[4]"], r"context_ages must be a finite number in \[0, 1\], got 4"),
        (["--override", "denoiser.context_channels=[8,4]"], "The pair does not fit"),
        (["--push_to_hub", "--override", "sampling.guidance_scale=0"], "guidance_scale must be a finite number"),
    ],
)
def test_what_cannot_work_in_a_pair_is_refused_before_the_folder_is_made(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train("dual", folder, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("training", {"speed": 1}, "training of .*preset.json has no value 'speed'; it has adam_beta1"),
        ("denoiser", {"depth": 1}, "denoiser has no value 'depth'; it has attends_to_text, attention_head_dim"),
        ("scheduler", {"second_order": True}, "second_order of the scheduler belongs to the part sampling"),
        ("sampling", {"steps": 4}, "sampling of .*preset.json has no value 'steps'; it has guidance_scale"),
        ("trainning", {}, "preset.json has an unknown part 'trainning'; it may have context_encoder"),
        ("training", [], r"training of .*preset.json must be an object of names and values, got \[\]"),
    ],
)
def test_a_preset_with_something_unknown_is_refused(folder, tmp_path, part, values, message):
    preset = json.loads(Path("examples/presets/tiny.json").read_text())
    preset[part] = values if isinstance(values, list) else preset.get(part, {}) | values
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    with pytest.raises(ValueError, match=message):
        train("dual", folder, tmp_path / "run", "--preset", tmp_path / "preset.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "preset.json must hold an object of names and values, and holds list"),
        ("{", "preset.json is no JSON: "),
        ('{"denoiser": {}, "scheduler": {}}', "preset.json lacks context_encoder, training"),
    ],
)
def test_a_file_that_is_no_preset_is_refused_by_its_name(folder, tmp_path, text, message):
    (tmp_path / "preset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        train("dual", folder, tmp_path / "run", "--preset", tmp_path / "preset.json")


def test_a_recipe_that_lacks_a_value_is_refused_by_the_name_of_the_value(folder, tmp_path):
    preset = json.loads(Path("examples/presets/tiny.json").read_text())
    del preset["training"]["bias"]
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    with pytest.raises(ValueError, match=r"training of .*preset.json lacks bias\."):
        train("dual", folder, tmp_path / "run", "--preset", tmp_path / "preset.json")


def test_a_shipped_preset_is_known_by_its_name_and_a_run_is_repeated_from_its_own_record(folder, tmp_path):
    train("dual", folder, tmp_path / "first", "--preset", "tiny", "--learning_rate", 0.001, "--context_dropout", 0)
    train("dual", folder, tmp_path / "again", "--preset", tmp_path / "first/configuration.json")
    assert_equal_weights(weights(tmp_path / "first"), weights(tmp_path / "again"))
    told = json.loads((tmp_path / "first/configuration.json").read_text())
    assert told["preset"] == "tiny" and told["training"]["learning_rate"] == 0.001
    assert str(tmp_path) not in json.dumps(told)  # where a machine keeps its files is not published
    told.pop("found")
    assert Configuration.from_json(told).to_json() == told


@pytest.mark.parametrize(("images", "dropout", "is_refused"), [(1, 0.5, True), (2, 0.7, True), (2, 0.5, False)])
def test_a_process_whose_rows_would_all_lack_context_is_refused(folder, tmp_path, images, dropout, is_refused):
    """Its encoder would have no gradient, which DistributedDataParallel waits for."""
    args = train_dual_rate.parse_args(
        arguments(folder, tmp_path, "--train_batch_size", images, "--context_dropout", dropout, "--seed", 1)
    )
    refused = pytest.raises(
        ValueError, match=f"With {images} images per process and forward pass, {dropout} of them without"
    )
    with refused if is_refused else contextlib.nullcontext():
        assert configure(args, "train_dual_rate").divide_batch(2).recipe.train_batch_size == 2 * images


def test_a_run_is_told_by_what_its_networks_were_made_with_and_by_nothing_that_differs_between_processes(
    folder, tmp_path
):
    """The host lists the arguments left to their defaults in the order of a set, which is another in each process."""
    preset = json.loads(Path("examples/presets/tiny.json").read_text())
    for name in ("dropout", "attention_head_dim", "prediction_hand_over"):
        del preset["denoiser"][name]
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    options = ["--preset", tmp_path / "preset.json", "--override", "denoiser.level_channels=[64,64]"]
    train("dual", folder, tmp_path / "run", *options, "--max_train_steps", 1)
    recorded = json.loads((tmp_path / "run/configuration.json").read_text())["denoiser"]
    assert recorded["dropout"] == 0.0 and recorded["level_channels"] == [64, 64]
    assert not [name for name in recorded if name.startswith("_")]
    resume = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    assert train("dual", folder, tmp_path / "run", *options, *resume) == 0


def test_records_call_a_folder_by_its_name_and_a_data_set_of_the_hub_in_full(folder):
    assert Data(dataset_name="owner/set").name == "owner/set"
    assert Data(train_data_dir=f"{folder}/").name == folder.name
    assert Data(dataset_name="examples/data/emoji32/").name == "emoji32"
    assert Data().name == "none"


def test_a_flag_overrides_the_preset_also_with_zero():
    args = train_dual_rate.parse_args(
        ["--preset", "tiny", "--output_dir", "x", "--context_dropout", "0", "--resolution", "8"]
        + ["--override", "training.bias=0.5", "denoiser.level_blocks=[2, 2]", "--num_context_steps", "1"]
    )
    configuration = configure(args, "train_dual_rate")
    networks, recipe = configuration.networks, configuration.recipe
    assert recipe.context_dropout == 0.0 and recipe.learning_rate == 0.003 and recipe.bias == 0.5
    assert networks.denoiser["level_blocks"] == [2, 2]
    assert networks.context_encoder["sample_size"] == networks.denoiser["sample_size"] == 8
    assert networks.scheduler["image_size"] is None
    assert (configuration.sampling.num_inference_steps, configuration.sampling.num_context_steps) == (4, 1)


def test_the_schedule_is_shifted_for_the_resolution_that_is_trained():
    flags = ["--preset", "imagenet64", "--output_dir", "x", "--resolution", "128"]
    networks = configure(train_dual_rate.parse_args(flags), "train_dual_rate").networks
    shifted = {"image_size": 128, "noise_low": 32, "noise_high": 128}
    assert networks.scheduler.items() >= shifted.items()
    assert networks.context_encoder["sample_size"] == networks.denoiser["sample_size"] == 128
    flags += ["--override", "scheduler.image_size=64"]
    assert configure(train_dual_rate.parse_args(flags), "train_dual_rate").networks.scheduler["image_size"] == 64


@pytest.mark.parametrize("name", ["dual", "single"])
@pytest.mark.parametrize("preset", sorted(path.stem for path in Path("examples/presets").glob("*.json")))
def test_every_shipped_preset_is_sound(preset, name):
    module = SCRIPTS[name]
    configuration = configure(module.parse_args(["--preset", preset, "--output_dir", "x"]), module.__name__)
    assert Configuration.from_json(configuration.to_json()).to_json() == configuration.to_json()


def test_contexts_that_begin_late_make_a_step_cheaper_by_whole_rows(folder, tmp_path, capsys):
    train("dual", folder, tmp_path / "all", "--context_dropout", 0, "--max_train_steps", 1)
    train("dual", folder, tmp_path / "late", "--context_dropout", 0, "--context_from", 0.6, "--max_train_steps", 1)
    costs = re.findall(r"training: ([\d.]+) MFLOP", capsys.readouterr().out)
    whole, late = (float(cost) for cost in costs)
    pair = DualRatePipeline.from_pretrained(tmp_path / "all")
    heavy = (network_flops(pair.context_encoder) + context_flops(pair.denoiser)) / 1e6
    assert whole - late == pytest.approx(3 * 3 / 8 * heavy, abs=0.1)  # of 8 rows 3 are noisier
    configuration = configure(
        train_dual_rate.parse_args(["--preset", "tiny", "--output_dir", "x", "--context_from", "0.6"]),
        "train_dual_rate",
    )
    assert configuration.recipe.share_above == 3 / 8
    # Trained further, the pair keeps the time that it was trained with, until a flag gives another.
    for name, flags, told in (("further", [], [5 / 8, True]), ("whole", ["--context_from", 1], [None, False])):
        start = ["--pretrained_model_name_or_path", tmp_path / "late", "--context_dropout", 0, "--max_train_steps", 1]
        train("dual", folder, tmp_path / name, *start, *flags)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert [index["context_from"], index["context_free"]] == told
    assert "context_from: 0.625, as the pair has it that is trained further" in capsys.readouterr().out
    assert configuration.recipe.share_without_context == 3 / 8 + 5 / 8 * 0.5


def test_both_networks_learn_through_one_forward(make_networks):
    encoder, denoiser = make_networks(sample_size=16)
    scheduler = DualRateScheduler()
    networks = pair.TrainablePair(denoiser, encoder)
    x = torch.rand(4, 3, 16, 16)
    result = networks(
        denoising_loss,
        x,
        torch.zeros(4, dtype=torch.long),
        draw(0, 0, range(4), x.shape[1:]),
        schedule=pair.schedule_of(scheduler),
    )
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in networks.parameters())
