"""The examples that generate, measure and time, run as a user runs them, on tiny models."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import benchmark
import distill
import evaluate
import generate
import train_classifier
import train_dual_rate
import train_single_rate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, image_sets, metrics, plan_refreshes, sources
from diffusers_dualrate.arguments import configure, select
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.configuration import Data
from diffusers_dualrate.data import load_images
from diffusers_dualrate.evaluation import ImageClassifier, file_hash, load_dinov2
from diffusers_dualrate.flops import image_flops, network_flops, plan_flops

NUM_CLASSES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Arguments that name a folder with five emoji of each of a few classes."""
    root = tmp_path_factory.mktemp("data") / "emoji"
    for row in load_images("examples/data/emoji32", label_column="label"):
        folder = root / f"class {row['label']}"
        if row["label"] < NUM_CLASSES and (not folder.exists() or len(list(folder.iterdir())) < 5):
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{row['name']}.png")
    return ["--train_data_dir", str(root), "--label_column", "label"]


@pytest.fixture
def models(make_networks, tmp_path):
    """Folders of a pair, and of single-rate models in the shapes of its encoder and its denoiser, for a few classes."""
    both = {"num_classes": NUM_CLASSES, "sample_size": 16}
    encoder, denoiser = make_networks(**both)
    names = {i: f"class {i}" for i in range(NUM_CLASSES)}
    heavy_shape = {key: encoder.config[key] for key in ("level_channels", "level_blocks", "embedding_dim")}
    heavy = make_networks(**both, denoiser={**heavy_shape, "context_channels": None})[1]
    light = make_networks(**both, denoiser={"context_channels": None})[1]
    options = {"scheduler": DualRateScheduler(), "id2label": names, "num_inference_steps": 4, "guidance_scale": 2.0}
    DualRatePipeline(denoiser, context_encoder=encoder, num_context_steps=2, **options).save_pretrained(
        tmp_path / "pair"
    )
    DualRatePipeline(heavy, **options).save_pretrained(tmp_path / "heavy")
    student = {**options, "num_inference_steps": 2, "num_context_steps": 1, "guidance_scale": 1.0}
    DualRatePipeline(denoiser, context_encoder=encoder, **student).save_pretrained(tmp_path / "student")
    DualRatePipeline(light, **options).save_pretrained(tmp_path / "light")
    return tmp_path


def test_generate_draws_a_picture_and_reports_what_each_row_cost(models, capsys):
    output = models / "picture.png"
    rows = generate.main(
        generate.parse_args(
            ["--model", str(models / "pair"), "--compare", str(models / "heavy"), "--output", str(output)]
            + ["--num_columns", "3", "--solver_steps", "3", "--zoom", "2"]
        )
    )
    assert [(row.heavy, row.light, len(row.images)) for row in rows] == [(2, 4, 6), (4, 0, 6), (3, 0, 6)]
    pair = DualRatePipeline.from_pretrained(models / "pair")
    expected = image_flops(
        pair.denoiser, pair.context_encoder, num_inference_steps=4, num_context_steps=2, guided=True
    )
    assert rows[0].flops == expected and rows[1].flops > rows[2].flops
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row.flops / 1e9:.2f}" in printed and f"{row.flops / rows[0].flops:.2f}" in printed
    picture = Image.open(output)
    assert picture.width == 3 * (32 + 4) + 4 and len(picture.getcolors(1 << 20)) > 100


def test_generate_shows_a_student_at_its_own_steps_and_without_guidance_beside_guided_models(models, capsys):
    rows = generate.main(
        generate.parse_args(
            ["--model", str(models / "pair"), "--compare", str(models / "heavy"), "--solver_steps", "3"]
            + ["--distilled", str(models / "student"), "--output", str(models / "picture.png"), "--num_columns", "2"]
            + ["--num_inference_steps", "6", "--num_context_steps", "3", "--guidance_scale", "5"]
        )
    )
    assert [(row.heavy, row.light, row.guidance_scale) for row in rows] == [(3, 6, 5), (6, 0, 5), (3, 0, 5), (1, 2, 1)]
    # A third of the pair's evaluations, and of each one branch instead of two.
    assert rows[3].flops == rows[0].flops / 6
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("distilled")]
    assert line.split()[1:6] == ["2", "1", "1", "1", "2"]


@pytest.fixture
def spared(make_networks, models):
    """Folder of a pair whose encoder denoises at refreshes."""
    encoder, denoiser = make_networks(num_classes=NUM_CLASSES, sample_size=16, prediction_hand_over=True)
    options = {"num_inference_steps": 5, "num_context_steps": 2, "guidance_scale": 2.0, "encoder_denoises": True}
    DualRatePipeline(denoiser, DualRateScheduler(), encoder, **options).save_pretrained(models / "spared")
    return models / "spared"


def test_generate_counts_what_a_pair_spares_whose_encoder_denoises(spared, tmp_path, capsys):
    arguments = ["--model", str(spared), "--output", str(tmp_path / "picture.png"), "--num_columns", "2"]
    (row,) = generate.main(generate.parse_args(arguments))
    pair = DualRatePipeline.from_pretrained(spared)
    steps = {"num_inference_steps": 5, "num_context_steps": 2, "guided": True, "encoder_denoises": True}
    assert (row.heavy, row.light) == (2, 3) and row.flops == image_flops(pair.denoiser, pair.context_encoder, **steps)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Dual-Rate")]
    assert line.split()[1:6] == ["5", "2", "2", "2", "3"]


def test_evaluate_counts_what_a_pair_spares_whose_encoder_denoises(spared, measure):
    report = measure("--model", spared, "--seeds", 0)["samples"][0]
    assert report["evaluations"] == {"context_encoder": 2, "denoiser": 3} and report["num_inference_steps"] == 5
    pair = DualRatePipeline.from_pretrained(spared)
    steps = {"num_inference_steps": 5, "num_context_steps": 2, "encoder_denoises": True}
    assert report["flops"] == image_flops(pair.denoiser, pair.context_encoder, **steps)


@pytest.mark.parametrize("default", [{"context_from": 0.5}, {"refresh_steps": [1, 3]}])
def test_generate_and_evaluate_follow_the_late_plan_of_a_pair(make_networks, models, measure, default):
    """Mutants: K of the configuration instead of the plan's; every light evaluation priced as one with context."""
    encoder, denoiser = make_networks(num_classes=NUM_CLASSES, sample_size=16)
    options = {"num_inference_steps": 4, "num_context_steps": 4, "guidance_scale": 2.0, "context_free": True}
    pair = DualRatePipeline(denoiser, DualRateScheduler(), encoder, **options, **default)
    pair.save_pretrained(models / "late")
    arguments = ["--model", str(models / "late"), "--output", str(models / "picture.png"), "--num_columns", "2"]
    (row,) = generate.main(generate.parse_args(arguments))
    expected = plan_flops(denoiser, encoder, plan_refreshes(4, refresh_steps=default.get("refresh_steps", [2, 3])))
    assert (row.steps, row.heavy, row.light, row.flops) == ((4, 2), 2, 4, 2 * expected)
    report = measure("--model", models / "late", "--seeds", 0)["samples"][0]
    assert report["evaluations"] == {"context_encoder": 2, "denoiser": 4} and report["flops"] == expected
    assert report["num_context_steps"] == 2


def test_generate_takes_named_classes_and_steps(models):
    rows = generate.main(
        generate.parse_args(
            ["--model", str(models / "pair"), "--output", str(models / "picture.png"), "--num_images_per_class", "1"]
            + ["--class_labels", "class 7", "3", "--num_inference_steps", "6", "--num_context_steps", "3"]
        )
    )
    assert [(row.heavy, row.light, len(row.images)) for row in rows] == [(3, 6, 2)]


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--guidance_scale", "guidance_scale must be at least 1, .* got 0"), ("--num_inference_steps", "got 0")],
)
def test_generate_refuses_a_zero_rather_than_taking_the_default_in_its_place(models, flag, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate.main(generate.parse_args(["--model", str(models / "pair"), flag, "0"]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--output", "picture.txt"], "must end in a kind of picture, such as .png, got 'picture.txt'"),
        (["--output", "picture.psd"], "must end in a kind of picture, such as .png, got 'picture.psd'"),
        (["--solver_steps", "0"], "--solver_steps must be at least 1, got 0"),
        (["--distilled", "other"], "other has 3 classes, not those of the pair"),
        (["--compare", "other"], "other has 3 classes, not those of the pair"),
        (["--compare", "pair"], "--compare must be a single-rate model, but pair is a pair"),
        (["--compare", "small"], "small draws other images than the pair: sample_size is 8, not 16"),
        (["--model", "nowhere"], "nowhere"),
        (["--seed", "-1"], r"--seed must lie between 0 and 2\*\*63 - 1, got -1"),
        (["--zoom", "-2"], "--zoom must be at least 1, got -2"),
        (["--guidance_scale", "nan"], "guidance_scale must be at least 1, .* got nan"),
        (["--guidance_scale", "inf"], "guidance_scale must be at least 1, .* got inf"),
        (["--num_context_steps", "99"], "num_context_steps must be between 1 and num_inference_steps=4, got 99"),
        (["--compare", "light", "--solver_steps", "1001"], "--solver_steps must be at most 1000, got 1001"),
        (["--class_labels", "clas 3"], "Unknown class name 'clas 3'; did you mean 'class 3'"),
        (["--class_labels", "99"], "class_labels must lie in 0..7, got 99"),
        (["--output", "folder.png"], "--output must be a file, but 'folder.png' is a folder"),
        (["--output", "file/picture.png"], "--output is 'file/picture.png', but '.*file' is no folder"),
        (["--output", "/proc/picture.png"], "--output is '/proc/picture.png', which cannot be written"),
        (
            ["--num_columns", "1000000000"],
            r"picture would have 52000000004 x \d+ pixels, more than \d+: lower --num_c",
        ),
        (["--num_images_per_class", "1000000000"], r"would have 628 x 52000000036 pixels, more than"),
        (["--zoom", "1000000000", "--class_labels", "1"], r"would have 16000000008 x 32000000044 pixels, more than"),
        (
            ["--num_inference_steps", "1000000000"],
            r"num_inference_steps must be an integer in \[1, 8388608\], got 10+",
        ),
    ],
)
def test_generate_refuses_what_would_fail_later_before_any_image(
    models, make_pipe, make_networks, flags, sentence, monkeypatch
):
    denoiser = make_networks(num_classes=3, sample_size=16, denoiser={"context_channels": None})[1]
    DualRatePipeline(denoiser, DualRateScheduler()).save_pretrained(models / "other")
    make_pipe(single_rate=True, num_classes=NUM_CLASSES).save_pretrained(models / "small")
    (models / "folder.png").mkdir()
    (models / "file").write_text("")
    monkeypatch.chdir(models)
    monkeypatch.setattr(generate, "sample", lambda *_, **__: pytest.fail("an image was made"))
    with pytest.raises((ValueError, OSError), match=sentence):
        generate.main(generate.parse_args(["--model", "pair", *flags]))


def test_a_single_rate_model_is_drawn_alone_and_guidance_costs_where_it_acts(models, tmp_path, capsys):
    light = DualRatePipeline.from_pretrained(models / "light")
    light.register_to_config(guidance_scale=2.0, guidance_interval=[-2.0, 20.0], num_inference_steps=4)
    light.save_pretrained(tmp_path / "light")
    arguments = [
        "--model",
        str(tmp_path / "light"),
        "--output",
        str(tmp_path / "x.png"),
        "--num_images_per_class",
        "1",
    ]
    (row,) = generate.main(generate.parse_args(arguments))
    guided = sum(
        level >= -2 for level in light.scheduler.log_snr(torch.tensor([1000.0, 750.0, 500.0, 250.0])).tolist()
    )
    assert row.flops == (4 + guided) * network_flops(light.denoiser) and 0 < guided < 4
    assert "single-rate" in capsys.readouterr().out and (tmp_path / "x.png").exists()


def test_a_class_that_is_called_3_is_drawn_when_3_is_asked_for(models, monkeypatch, capsys):
    """Wherever a name stands, it wins over the number; a number that names no class is a number, and said to be one."""
    pair = DualRatePipeline.from_pretrained(models / "pair")
    names = {0: "3", 1: "0", 2: "two"}
    renamed = DualRatePipeline.from_pipe(pair, id2label=names, num_inference_steps=2, num_context_steps=1)
    renamed.save_pretrained(models / "renamed")
    seen, original = [], generate.sample
    monkeypatch.setattr(
        generate, "sample", lambda *args, **options: seen.append(args[3]) or original(*args, **options)
    )
    arguments = ["--model", str(models / "renamed"), "--output", str(models / "new folder" / "picture.png")]
    generate.main(generate.parse_args([*arguments, "--class_labels", "3", "0", "2", "two", "1"]))
    assert seen == [[0, 1, 2, 2, 1]] and (models / "new folder" / "picture.png").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "no class has this name" in line]
    assert said == [
        "--class_labels 2: no class has this name, so it is the number of 'two'.",
        "--class_labels 1: no class has this name, so it is the number of '0'.",
    ]


def open_images(args, size, augmentation, **options):
    """The images that flags name, as an evaluation opens them."""
    data = Data(**select(args, Data))
    return sources.open_images(data, size, augmentation=augmentation, seed=image_sets.FRESH_SEED, **options)


@pytest.fixture
def measure(models, data):
    """Runs evaluate.py on the pair, with a classifier that nobody trained; returns what it writes."""
    torch.manual_seed(1)
    ImageClassifier(3, NUM_CLASSES, level_channels=(8, 16), num_features=6).save(models / "some.safetensors", steps=0)

    def run(*more):
        arguments = ["--model", models / "pair", *data, "--num_samples", 20]
        arguments += ["--num_noises", 40, "--batch_size", 8, "--classifier", models / "some.safetensors"]
        arguments += ["--output", models / "evaluation.json", "--cache_dir", models / "cache", *more]
        args = evaluate.parse_args([str(argument) for argument in arguments])
        evaluate.main(args)
        return json.loads(Path(args.output).read_text())

    return run


@pytest.mark.slow
def test_evaluate_counts_guidance_at_the_steps_where_it_acts(measure, models):
    pair = DualRatePipeline.from_pretrained(models / "pair")
    pair.register_to_config(guidance_interval=[100.0, 101.0])  # nowhere
    pair.save_pretrained(models / "unguided")
    (samples,) = measure("--model", models / "unguided")["samples"]
    assert samples["guidance_scale"] == 2 and samples["flops_with_guidance"] == samples["flops"] > 0


@pytest.mark.slow
def test_evaluate_writes_every_metric_and_ends_in_a_table(measure, models, capsys):
    measure("--model", models / "heavy", "--output", models / "heavy" / "evaluation.json", "--solver_steps", 3)
    rivals = ["--heavy", models / "heavy", "--light", models / "light"]
    capsys.readouterr()
    report = measure(*rivals, "--grid", models / "grid.png")

    v_loss = report["v_loss"]
    assert v_loss["images"] == 40 and report["data"]["images"] > 30
    gap = v_loss["single_rate_light"] - v_loss["single_rate_heavy"]
    assert v_loss["share_of_gap_recovered"] == pytest.approx((v_loss["single_rate_light"] - v_loss["model"]) / gap)
    assert v_loss["context_dropped"] != v_loss["model"]
    (samples,), floor = report["samples"], report["floor"]
    measures = {"fd_local", "precision_local", "recall_local", "class_accuracy", "class_of_nearest"}
    assert floor.keys() == {f"{name}_20" for name in measures} and floor.keys() < samples.keys()
    for values in floor.values():
        first, second = values["values"]
        assert values["mean"] == pytest.approx((first + second) / 2)
        assert values["std"] == pytest.approx(abs(first - second) / 2**0.5)
    # The model is untrained.
    assert samples["class_of_nearest_20"]["mean"] < 0.5 < floor["class_of_nearest_20"]["mean"]
    assert samples["fd_local_20"]["mean"] > floor["fd_local_20"]["mean"] > 0
    assert samples["evaluations"] == {"context_encoder": 2, "denoiser": 4}
    assert samples["num_inference_steps"] == 4 and samples["num_context_steps"] == 2
    assert samples["flops_with_guidance"] == 2 * samples["flops"]
    assert {"command", "commit", "versions", "hardware", "seeds", "processes"} <= report.keys()
    assert report["classifier"]["sha256"] == file_hash(models / "some.safetensors")
    assert Image.open(models / "grid.png").size == (8 * (96 + 4) + 4, 3 * (14 + 96 + 4) + 4)  # of 20 samples
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    (head,), (row,) = (
        [line for line in lines if line[:n] == start]
        for n, start in ((2, ["heavy", "+"]), (2, ["pair,", "ancestral,"]))
    )
    assert head[-5:] == list(floor) and "{" not in printed  # no JSON
    assert row[row.index("+") - 1 :][:3] == ["2", "+", "4"] and f"{samples['flops_with_guidance'] / 1e9:.2f}" in row
    assert f"{samples['fd_local_20']['mean']:.3f}" in row and f"{v_loss['model']:.4f}" in printed
    assert f"Every figure is in {models / 'evaluation.json'}." in printed

    ways = [
        (way["solver"], way["evaluations"]["denoiser"]) for way in report["rivals"]["single_rate_heavy"]["samples"]
    ]
    assert ways == [("ancestral", 4), ("dpmsolver++", 3)] and report["rivals"]["single_rate_light"]["samples"] == []


def record(folder, script, happened, *told):
    """Write beside a model what its training was told, and what happened in it."""
    arguments = ["--preset", "tiny", "--output_dir", folder, *told]
    args = script.parse_args([str(argument) for argument in arguments])
    (folder / "configuration.json").write_text(json.dumps(configure(args, script.__name__).to_json()))
    (folder / "training.json").write_text(json.dumps(happened))


@pytest.mark.slow
def test_what_a_model_was_trained_with_is_read_beside_it(measure, models):
    """Its augmentation above all: a floor of other images would be another floor."""
    options = ["--num_noises", 1, "--seeds", 0]
    with pytest.warns(UserWarning, match="has no configuration.json: its images count as not augmented"):
        plain = measure(*options)
    assert plain["configuration"] is plain["training"] is plain["training_flops"] is None
    told = ["--override", 'training.augmentation={"translation":3,"scale":[0.5,1.5]}', "training.bias=0.25"]
    record(models / "pair", train_dual_rate, {"network": "pair", "images_seen": 80}, *told)
    augmented = measure(*options)
    assert augmented["floor"]["fd_local_20"]["mean"] != plain["floor"]["fd_local_20"]["mean"]
    assert augmented["configuration"]["training"]["bias"] == 0.25 and augmented["training_flops"] > 0
    assert augmented["configuration"]["overrides"] == told[1:]


@pytest.mark.slow
def test_a_student_is_measured_at_its_own_steps_without_v_loss_beside_the_models_that_it_came_from(measure, models):
    record(models / "heavy", train_single_rate, {"network": "heavy", "images_seen": 80})
    measure("--model", models / "heavy", "--output", models / "heavy" / "evaluation.json", "--seeds", 5)
    told = ["--teacher", "elsewhere/heavy", "--guidance_scale", 2, "--num_inference_steps", 2]
    told += ["--num_context_steps", 1, "--pretraining_steps", 0, "--max_train_steps", 5]
    told += ["--override", "distillation.train_batch_size=4"]
    record(models / "student", distill, {"network": "distilled pair", "images_seen": 20}, *told)

    report = measure("--model", models / "student", "--rivals", models / "heavy")
    assert "v_loss" not in report and report["images_by_phase"] == {"pretraining": 0, "auxiliary": 12, "student": 8}
    (samples,), rival = report["samples"], report["rivals"]["heavy"]
    assert samples["evaluations"] == {"context_encoder": 1, "denoiser": 2} and samples["guidance_scale"] == 1
    assert samples["flops_with_guidance"] == samples["flops"] < rival["samples"][0]["flops_with_guidance"]
    assert rival["seeds"] == [5] and report["seeds"] == [0, 1]
    heavy = DualRatePipeline.from_pretrained(models / "heavy").denoiser
    assert rival["training_flops"] == 3 * 80 * network_flops(heavy)
    # A step costs from five to nine forward passes of the teacher, the student's own a part of them.
    assert 5 < report["training_flops"] / (20 * network_flops(heavy)) < 9


def test_a_rival_that_was_not_measured_so_is_refused(measure, models):
    with pytest.raises(ValueError, match="heavy has no evaluation.json of the same data and classifier"):
        measure("--rivals", models / "heavy")


def test_the_measured_images_do_not_depend_on_how_the_work_is_cut(models, data):
    args = evaluate.parse_args(["--model", "", *data])
    images = open_images(args, 16, Augmentation(translation=2))
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    labels = images.class_labels[[index for _, index in image_sets.choose(images, 10, seed=0)]]
    steps = {"num_inference_steps": 2, "num_context_steps": 1, "guidance_scale": 1.0}

    def collect(num_processes, batches, *arguments):
        found = {}
        for rank in range(num_processes):
            accelerator = SimpleNamespace(process_index=rank, num_processes=num_processes, is_main_process=False)
            for positions, x, classes in batches(*arguments, 3, accelerator):
                found |= {i: (image, label) for i, image, label in zip(positions, x, classes, strict=True)}
        assert sorted(found) == list(range(10))
        return torch.stack([found[i][0] for i in range(10)]), torch.stack([found[i][1] for i in range(10)])

    sampled = [collect(count, image_sets.sampled_batches, pipe, labels, 10, 0, steps) for count in (1, 2, 7)]
    real = [collect(count, image_sets.real_batches, images, 5, [(0, i) for i in range(10)]) for count in (1, 3)]
    for x, classes in sampled[1:]:
        assert torch.equal(x, sampled[0][0]) and torch.equal(classes, labels)
    assert torch.equal(real[0][0], real[1][0]) and torch.equal(real[1][1], images.class_labels[:10])
    others = collect(1, image_sets.sampled_batches, pipe, labels, 10, 1, steps)[0]
    assert len(torch.cat([sampled[0][0], others]).flatten(1).unique(dim=0)) == 20  # no seed repeats another's image


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_noises", 0], "num_noises must be at least 1, got 0"),
        (["--batch_size", 0], "batch_size must be at least 1, got 0"),
        (["--solver_steps", 4, 0], "solver_steps must be at least 1, got 0"),
        (["--seeds", 0, 0], "seeds must differ, since equal ones shrink the spread"),
        (["--seeds", -3], "seeds must be an integer of at least 0, got -3"),
        (["--grid", "/proc/x.png"], "--grid is '/proc/x.png', which cannot be written"),
        (["--classifier", "few.safetensors", "--cache_dir", "/proc/x"], "--cache_dir is '/proc/x', which cannot be"),
        (["--grid", "x.foo"], "--grid must end in a kind of picture"),
        (["--classifier", "grey.safetensors"], "classifier .*grey.safetensors has in_channels 1, and the data 3"),
        (["--classifier", "few.safetensors"], "classifier .*few.safetensors has num_classes 5, and the data 8"),
    ],
)
def test_evaluate_refuses_before_it_measures(measure, models, flags, sentence, monkeypatch):
    ImageClassifier(1, NUM_CLASSES).save(models / "grey.safetensors")
    ImageClassifier(3, 5).save(models / "few.safetensors")
    for name in ("measure_v_losses", "measure_reference", "measure_floor", "measure_sampling"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: pytest.fail("something was measured"))
    flags = [flag if not str(flag).endswith("safetensors") else models / flag for flag in flags]
    images = SimpleNamespace(num_classes=8, channels=3)
    monkeypatch.setattr(evaluate, "main", partial(evaluate.main, open_images=lambda *_, **__: images))
    monkeypatch.setattr(evaluate.sources, "check_classes", lambda *_: None)
    with pytest.raises(ValueError, match=sentence):
        measure(*flags)


def test_a_model_whose_classes_are_not_those_of_the_data_is_refused(models):
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    names = {i: f"class {i}" for i in range(NUM_CLASSES)}
    sources.check_classes("pair", pipe, SimpleNamespace(num_classes=NUM_CLASSES, has_captions=False, id2label=names))
    for num_classes, id2label, sentence in (
        (None, None, "pair has 8 classes, and the data has none: see --label_column"),
        (9, names | {8: "class 8"}, "pair has 8 classes, and the data has 9"),
        (8, names | {3: "class 4", 4: "class 3"}, "Class 3 is 'class 3' in pair and 'class 4' in the data"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sources.check_classes(
                "pair", pipe, SimpleNamespace(num_classes=num_classes, has_captions=False, id2label=id2label)
            )


def test_classes_are_chosen_in_proportion_to_the_data():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20).roll(7)
    images = type("Images", (), {"class_labels": labels, "__len__": lambda self: 100})()
    for count, expected in ((10, [5, 3, 2]), (100, [50, 30, 20]), (250, [125, 75, 50])):
        chosen = image_sets.choose(images, count, seed=3)
        assert labels[[index for _, index in chosen]].bincount().tolist() == expected
        assert len({tuple(pair) for pair in chosen}) == count  # no image comes twice in one augmentation
        assert len({index for _, index in chosen}) == min(count, 100)
        assert max(repeat for repeat, _ in chosen) == (count - 1) // 100
    assert image_sets.choose(images, 10, seed=3) != image_sets.choose(images, 10, seed=4)


@pytest.mark.slow
def test_a_reference_is_measured_once_and_again_where_the_images_or_the_classifier_are_others(measure, models):
    first = measure("--num_noises", 1, "--seeds", 0)
    (cached,) = (models / "cache").iterdir()
    changed = cached.stat().st_mtime_ns
    assert measure("--num_noises", 1, "--seeds", 0)["floor"] == first["floor"] and cached.stat().st_mtime_ns == changed
    measure("--num_noises", 1, "--seeds", 0, "--num_reference", 30)
    assert len(list((models / "cache").iterdir())) == 2
    ImageClassifier(3, NUM_CLASSES, level_channels=(8, 16), num_features=6).save(models / "some.safetensors", steps=0)
    measure("--num_noises", 1, "--seeds", 0)
    assert len(list((models / "cache").iterdir())) == 3


def test_published_distances_are_measured_from_the_images_as_they_are_and_those_of_this_data_as_augmented(tmp_path):
    """The extractors are the pixels themselves, so that their statistics have a closed form."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    args = evaluate.parse_args(["--model", "", "--train_data_dir", str(tmp_path / "images")])
    found = {}
    for name, augmentation in (("inception", Augmentation()), ("local", Augmentation(flip=True))):
        images = open_images(args, 4, augmentation)
        extractors = {name: lambda x: x.flatten(1)}
        found[name] = metrics.measure_reference(images, extractors, 10, tmp_path / "cache", 50, Accelerator())
    both = found["inception"] | found["local"]
    plain = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).double() / 127.5 - 1
    torch.testing.assert_close(both.statistics["inception"].mean, plain.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(both.statistics["inception"].covariance, plain.T.cov(), rtol=0, atol=1e-6)
    assert (both.statistics["local"].mean - plain.mean(0)).abs().max() > 0.05
    assert both.features.keys() == {"inception", "local"} and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(measure, models, data):
    alone = measure("--seeds", 0)
    arguments = ["--model", models / "pair", *data, "--num_samples", 20]
    arguments += ["--num_noises", 40, "--batch_size", 8, "--classifier", models / "some.safetensors", "--seeds", 0]
    arguments += ["--output", models / "two.json", "--cache_dir", models / "another cache"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = [str(word) for word in [*launch, "examples/evaluate.py", *arguments]]
    paths = os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    together = json.loads((models / "two.json").read_text())
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert together["v_loss"] == pytest.approx(alone["v_loss"], rel=1e-12)
    for part, other in ((alone["floor"], together["floor"]), (alone["samples"][0], together["samples"][0])):
        for name, values in part.items():
            if name.endswith("_20"):
                assert other[name]["mean"] == pytest.approx(values["mean"], rel=1e-9), name


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--guidance_scale", "guidance_scale must be at least 1, which is none, got 0.0"),
        ("--num_inference_steps", "num_inference_steps must be at least 1, got 0"),
        ("--num_context_steps", "num_context_steps must be between 1 and num_inference_steps=4, got 0"),
        ("--num_reference", "num_reference must be at least 4, got 0"),
    ],
)
def test_evaluate_refuses_a_zero_rather_than_taking_the_default_in_its_place(measure, flag, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(flag, 0)


def test_an_extractor_whose_package_is_missing_says_so_too(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="FD with DINOv2 needs the package transformers: `pip install transformers`"):
        measure("--dinov2", "nobody/nothing")
    with pytest.raises(
        ValueError, match="FID needs Inception, which `pip install torchmetrics torch-fidelity` brings"
    ):
        measure("--inception")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dinov2", "nobody/nothing"], "DINOv2 'nobody/nothing' are not at hand: `hf download"),
        (["--classifier", "nowhere.safetensors"], "no classifier 'nowhere.safetensors': examples/train_classifier.py"),
        pytest.param(
            ["--inception"],
            "FID needs Inception, which `pip install torchmetrics torch-fidelity` brings",
            marks=pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is at hand"),
        ),
    ],
)
def test_an_extractor_that_is_not_at_hand_says_how_to_get_it(measure, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        measure(*arguments)


def test_dinov2_of_a_folder_measures_a_distance_from_the_images_as_they_are(measure, models, data):
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, intermediate_size=8
    )
    Dinov2Model(config).save_pretrained(models / "dinov2")
    report = measure("--dinov2", models / "dinov2", "--num_noises", 1)
    assert report["samples"][0]["fd_dinov2_20"]["mean"] > 0 and "precision_dinov2_20" in report["floor"]
    assert report["references"] == {"fd_local": "images augmented as in training", "fd_dinov2": "images as they are"}

    # A cached reference is named by its content, so only the same images and extractor have the same name.
    args = evaluate.parse_args(["--model", "", *data])
    plain, extract = open_images(args, 16, Augmentation()), load_dinov2(models / "dinov2")
    metrics.measure_reference(plain, {"dinov2": extract}, len(plain), models / "plain", 50, Accelerator())
    (name,) = [path.name for path in (models / "plain").iterdir()]
    assert name in [path.name for path in (models / "cache").iterdir()]


def test_the_v_loss_is_the_same_at_every_measurement_and_has_its_closed_form_where_nothing_is_predicted(models, data):
    args = evaluate.parse_args(["--model", "", *data])
    images = open_images(args, 16, Augmentation())
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    first, second = (
        metrics.measure_v_loss(pipe, images, 640, plan_refreshes(4, 2), 50, Accelerator()) for _ in range(2)
    )
    assert first == second
    own, tables = pipe.scheduler, {"trained_betas": pipe.scheduler.betas.tolist(), "prediction_type": "v_prediction"}
    pipe.scheduler = DPMSolverMultistepScheduler(**tables)  # which a model may be saved with
    assert metrics.measure_v_loss(pipe, images, 640, plan_refreshes(4, 2), 50, Accelerator()) == pytest.approx(
        first, rel=0.02
    )
    pipe.scheduler = own
    for parameter in pipe.denoiser.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    # A network that predicts 0 has the mean square of v = α ε − σ x, which is E[α² + σ² x²].
    x = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    zero = metrics.measure_v_loss(pipe, images, 640, plan_refreshes(4, 2), 50, Accelerator())
    assert zero == pytest.approx((1 + x.square().mean().item()) / 2, rel=0.02)


def test_the_v_loss_of_a_late_pair_has_contexts_where_its_plan_has_them_and_as_old(models, data, watch):
    """Mutants: c or the ages of a plan from step 0; rows above c with a context; their times drawn anew."""
    images = open_images(evaluate.parse_args(["--model", "", *data]), 16, Augmentation())
    pipe = DualRatePipeline.from_pretrained(models / "pair", context_free=True, context_from=0.5)
    calls, plan, count = watch(pipe), pipe.plan_run(8, 2), 48
    metrics.measure_v_loss(pipe, images, count, plan, 16, Accelerator())

    levels = torch.linspace(0, 1, 4001, dtype=torch.float64)
    known = pipe.scheduler.log_snr(levels * len(pipe.scheduler))

    def times_of(log_snr):
        return levels[(known[None] - log_snr.double()[:, None]).abs().argmin(1)]

    alone = torch.cat([times_of(call.log_snr) for call in calls.denoiser if call.context is None])
    paired = [call for call in calls.denoiser if call.context is not None]
    t, tau = (torch.cat([times_of(getattr(call, name)) for call in paired]) for name in ("log_snr", "context_log_snr"))
    expected = torch.tensor([(row * (math.sqrt(5) - 1) / 2) % 1 for row in range(count)], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([alone, t]).sort().values, expected.sort().values, rtol=0, atol=1e-3)
    assert alone.min() > 0.5 - 1e-3 and t.max() < 0.5 + 1e-3 and len(alone) > 10
    assert tau.max() <= 0.5 + 1e-3 and 0.2 < (tau - t).max() < 0.25 + 1e-3
    on_time = metrics.measure_v_loss(pipe, images, count, plan_refreshes(8, 2), 16, Accelerator())
    calls.encoder.clear()
    assert on_time != metrics.measure_v_loss(pipe, images, count, plan, 16, Accelerator(), drop_context=True)
    assert not calls.encoder


def test_evaluate_refuses_a_way_that_is_not_possible_before_anything_is_measured(models, measure, watch):
    pipe = DualRatePipeline.from_pretrained(models / "pair", context_free=True, context_from=0.5)
    pipe.save_pretrained(models / "late")
    flags = ["--num_inference_steps", 8, "--num_context_steps", 4, "--solver_steps", 4]
    with pytest.raises(ValueError, match="num_context_steps must be between 1 and"):
        measure("--model", models / "late", *flags)
    assert not (models / "cache").exists()  # where the reference is kept, which is measured first


def run_benchmark(*flags):
    arguments = ["--preset", "examples/presets/tiny.json", "--batch_size", "2", "--repeats", "3"]
    return benchmark.main(
        benchmark.parse_args([*arguments, "--num_inference_steps", "4", "--num_context_steps", "2", *flags])
    )


def test_benchmark_refuses_a_single_repeat_which_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        run_benchmark("--repeats", "1")
    assert "a spread needs at least 2" in capsys.readouterr().err


def test_benchmark_times_arms_in_turns_and_writes_one_record(tmp_path, capsys):
    record, chart = tmp_path / "benchmark.json", tmp_path / "benchmark.png"
    flags = ["--batch_size", "1", "2", "--solver_steps", "3", "--student_steps", "2", "1", "--cache_interval", "2"]
    written = run_benchmark(*flags, "--output", str(record), "--chart", str(chart))
    rows = written["rows"]
    assert json.loads(record.read_text()) == written and chart.stat().st_size > 0
    names = ["single-rate", "dual-rate", "single-rate dpmsolver++", "single-rate student", "dual-rate student"]
    names += ["single-rate taylorseer", "single-rate pab"]
    assert [(row["arm"], row["batch_size"]) for row in rows] == [(name, size) for size in (1, 2) for name in names]
    assert all(row["seconds"] > 0 < row["overhead"] for row in rows)
    heavy, pair, solver, *_ = rows
    assert all(1 < row["times_fewer_flops"] < 4 for row in rows[5:7])  # what a cache leaves out
    assert heavy["share"] == 1 and solver["times_fewer_flops"] == pytest.approx(4 / 3)
    assert pair["times_less_time"] == pytest.approx(heavy["seconds"] / pair["seconds"])
    assert pair["share"] == pytest.approx(pair["times_less_time"] * pair["flops"] / heavy["flops"])
    assert "tiny, float32, eager, process time on one thread" in capsys.readouterr().out


def test_benchmark_leaves_out_a_cache_that_acts_on_nothing(capsys):
    """Digits have no attention, and the same size twice is timed once."""
    flags = ["--batch_size", "1", "1", "--cache_interval", "2"]
    rows = run_benchmark("--preset", "digits8", *flags)["rows"]
    assert [row["arm"] for row in rows] == ["single-rate", "dual-rate"]
    assert "Left out: single-rate taylorseer." in capsys.readouterr().out


def test_benchmark_counts_evaluations_of_compiled_networks_in_half_precision_too(monkeypatch, capsys):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    run_benchmark("--modes", "compiled", "--dtype", "bfloat16")
    torch.compiler.reset()
    assert len(graphs) == 3  # an encoder, its denoiser, and the single-rate network
    assert "tiny, bfloat16, compiled, process time" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="times an accelerator")
def test_benchmark_times_an_accelerator_by_the_wall(capsys):
    device = torch.accelerator.current_accelerator()
    modes = ("eager", "compiled", "graphs") if device.type == "cuda" else ("eager",)
    rows = run_benchmark("--device", str(device), "--dtype", "bfloat16", "--modes", *modes)["rows"]
    assert [row["mode"] for row in rows[::2]] == list(modes) and all(row["overhead"] is None for row in rows)
    assert f"wall time on {device}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_train_steps", "0"], "max_train_steps must be an integer of at least 1, got 0"),
        (["--train_batch_size", "-4"], "train_batch_size must be an integer in .*, got -4"),
        (["--learning_rate", "nan"], r"learning_rate must be a finite number in \(0, 1\], got nan"),
        (["--learning_rate", "1e30"], r"learning_rate must be a finite number in \(0, 1\], got 1e\+30"),
        (["--output", "new/a.bin"], r"--output must end in \.safetensors, got 'new/a.bin'"),
        (["--output", "/proc/a.safetensors"], "--output is '/proc/a.safetensors', which cannot be written"),
        (["--dataset_name", "digits"], "--dataset_name digits and --train_data_dir nowhere are two sources of images"),
        (["--held_out", "1"], "held_out must lie between 0 and 1, got 1.0"),
    ],
)
def test_a_classifier_that_could_not_be_trained_is_refused_before_images_are_read(flags, sentence, tmp_path):
    arguments = ["--preset", "tiny", "--train_data_dir", "nowhere", "--label_column", "label"]
    args = train_classifier.parse_args([*arguments, "--output", str(tmp_path / "new/a.safetensors"), *flags])
    with pytest.raises(ValueError, match=sentence):
        train_classifier.main(args)
    assert not (tmp_path / "new").exists()


def test_a_classifier_that_diverges_says_so_and_leaves_no_file(data, tmp_path):
    args = ["--preset", "tiny", *data, "--output", str(tmp_path / "new/a.safetensors"), "--max_train_steps", "8"]
    with pytest.raises(
        ValueError, match=r"The training diverged at step \d, and no file is written: lower --learning_rate"
    ):
        train_classifier.main(train_classifier.parse_args([*args, "--weight_decay", "1e30"]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--preset", "nowhere"], "--preset 'nowhere' is neither a file nor one of digits8, emoji32, "),
        (["--preset", "README.md"], "README.md is no JSON"),
        (["--batch_size", "0"], "batch_size must be an integer of at least 1, got 0"),
        (["--num_inference_steps", "-1"], "num_inference_steps must be an integer of at least 1, got -1"),
        (["--num_context_steps", "99"], "num_context_steps must be between 1 and num_inference_steps=4, got 99"),
        (["--student_steps", "2", "3"], "num_context_steps must be between 1 and num_inference_steps=2, got 3"),
        (["--cache_interval", "1"], "cache_interval must be an integer of at least 2, got 1"),
        (["--modes", "graphs"], "--modes graphs needs a CUDA device, got 'cpu'"),
        (
            ["--output", "nowhere/a.json"],
            "--output must be a file ending in .json in a folder that is there, got 'now",
        ),
    ],
)
def test_a_benchmark_of_what_cannot_be_run_is_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_benchmark(*flags)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:cpu"])
def test_a_benchmark_on_a_device_that_is_not_there_is_refused_by_its_name(device):
    with pytest.raises(ValueError, match=f"--device '{device}' is no device of this machine"):
        run_benchmark("--device", device)


def test_a_classifier_learns_what_held_out_images_show_and_says_how_to_measure_with_it(tmp_path, capsys):
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 100, (8, 8, 3), dtype=np.uint8)
        pixels[..., i % 3] += 120  # the class is the colour that prevails
        (tmp_path / "images" / f"colour {i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"colour {i % 3}" / f"{i}.png")
    arguments = ["--preset", "examples/presets/tiny.json", "--resolution", "8", "--label_column", "label"]
    arguments += ["--train_data_dir", tmp_path / "images", "--cache_dir", tmp_path / "cache"]
    arguments += ["--output", tmp_path / "colours.safetensors", "--max_train_steps", 30, "--train_batch_size", 16]
    facts = train_classifier.main(train_classifier.parse_args([str(argument) for argument in arguments]))
    command = capsys.readouterr().out.partition("Measure a model of this data with it: ")[2]
    args = evaluate.parse_args(shlex.split(command.partition("evaluate.py ")[2]))
    assert args.classifier == str(tmp_path / "colours.safetensors")
    assert args.train_data_dir == str(tmp_path / "images") and args.output == "runs/model/evaluation.json"
    assert facts["held_out_images"] == 6 and facts["held_out_accuracy"] == 1
    classifier = ImageClassifier.load(tmp_path / "colours.safetensors")
    assert classifier.facts["max_train_steps"] == 30 and classifier.facts["held_out_accuracy"] == 1
    plain = torch.full((3, 3, 8, 8), -0.5)
    for colour in range(3):
        plain[colour, colour] = 0.5
    assert classifier(plain).argmax(1).tolist() == [0, 1, 2]


CLASSIFIERS = {path.stem: path for path in Path().glob("*/classifiers/*.safetensors")}
JUDGE = Path("examples/text_encoders/emoji64/image_encoder.safetensors")


@pytest.mark.parametrize("name", ["digits", "emoji32", "letters"])
def test_a_classifier_that_ships_is_small_and_knows_unseen_images_of_its_data(name):
    path = CLASSIFIERS[name]
    assert path.stat().st_size < 1.5e6
    facts = ImageClassifier.load(path).facts
    assert facts["held_out_images"] > 100 and facts["held_out_accuracy"] > {"emoji32": 0.3}.get(name, 0.95)


def test_every_figure_that_ships_was_measured_with_the_classifier_that_ships():
    study = json.loads(Path("research/study.json").read_text())
    used = {name: floor["classifier"] for name, floor in study["floors"].items()}
    measured = [path for folder in ("model_cards", "research") for path in Path(folder).rglob("evaluation.json")]
    for path in [*measured, Path("research/emoji64-six-steps.json")]:
        classifier = json.loads(path.read_text())["classifier"]
        name = Path(classifier["file"]).stem
        assert used.setdefault(name, classifier["sha256"]) == classifier["sha256"]
    assert used == {name: file_hash((CLASSIFIERS | {JUDGE.stem: JUDGE})[name]) for name in used}


def test_the_classifier_of_the_digits_reads_them():
    args = evaluate.parse_args(["--model", "", "--dataset_name", "digits", "--label_column", "label"])
    images = open_images(args, 8, Augmentation(), split="floor", channels=1)
    x = torch.stack([images[i]["pixel_values"] for i in range(200)])
    with torch.no_grad():
        found = ImageClassifier.load("examples/classifiers/digits.safetensors")(x).argmax(1)
    assert (found == images.class_labels[:200]).double().mean() > 0.97
