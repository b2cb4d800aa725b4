"""The examples that generate, measure and time, run as a user runs them, on tiny models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import evaluate
import generate
import train_classifier
from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from diffusers_dualrate.data import load_images
from diffusers_dualrate.evaluation import ImageClassifier
from diffusers_dualrate.flops import image_flops

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


def test_generate_takes_named_classes_and_steps(models):
    rows = generate.main(
        generate.parse_args(
            ["--model", str(models / "pair"), "--output", str(models / "picture.png"), "--num_images_per_class", "1"]
            + ["--class_labels", "class 7", "3", "--num_inference_steps", "6", "--num_context_steps", "3"]
        )
    )
    assert [(row.heavy, row.light, len(row.images)) for row in rows] == [(3, 6, 2)]


@pytest.fixture
def report(models, data):
    arguments = ["--model", models / "pair", "--heavy", models / "heavy", "--light", models / "light"]
    arguments += ["--preset", "examples/presets/tiny.json", *data, "--num_samples", 20, "--num_noises", 1]
    arguments += ["--output", models / "evaluation.json", "--grid", models / "grid.png"]
    evaluate.main(evaluate.parse_args([str(argument) for argument in arguments]))
    return json.loads((models / "evaluation.json").read_text())


def test_evaluate_writes_both_facts_with_what_they_were_measured_with(report):
    v_loss = report["v_loss"]
    assert v_loss["images"] == report["data"]["images"] > 30
    gap = v_loss["single_rate_light"] - v_loss["single_rate_heavy"]
    assert v_loss["share_of_gap_recovered"] == pytest.approx((v_loss["single_rate_light"] - v_loss["model"]) / gap)
    assert v_loss["context_dropped"] != v_loss["model"]
    nearest = report["class_of_nearest"]
    assert nearest["samples"] == 20
    assert nearest["model"] < 0.5 < nearest["fresh_augmented_images"]  # the model is untrained
    assert report["num_inference_steps"] == 4 and report["num_context_steps"] == 2
    assert report["flops_with_guidance"] == 2 * report["flops"]
    assert {"command", "commit", "versions", "hardware", "seed"} <= report.keys()


def test_the_v_loss_is_the_same_at_every_measurement_and_has_its_closed_form_where_nothing_is_predicted(models, data):
    args = evaluate.parse_args(["--model", "", "--preset", "", *data, "--num_noises", "16"])
    images = evaluate.open_images(args, 16, evaluate.Augmentation())
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    first, second = (evaluate.measure_v_loss(pipe, images, args, 2) for _ in range(2))
    assert first == second
    for parameter in pipe.denoiser.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    # A network that predicts 0 has the mean square of v = α ε − σ x, which is E[α² + σ² x²].
    x = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    zero = evaluate.measure_v_loss(pipe, images, args, 2)
    assert zero == pytest.approx((1 + x.square().mean().item()) / 2, rel=0.02)


def test_benchmark_counts_evaluations_and_reports_ratios(capsys):
    report = benchmark.main(
        benchmark.parse_args(
            ["--preset", "examples/presets/tiny.json", "--batch_size", "2", "--repeats", "3"]
            + ["--num_inference_steps", "4", "--num_context_steps", "2"]
        )
    )
    assert report["dual-rate"]["flops"] < report["single-rate"]["flops"]
    assert "fewer FLOPs" in capsys.readouterr().out


def test_a_classifier_learns_what_held_out_images_show_and_names_its_recipe(tmp_path):
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 100, (8, 8, 3), dtype=np.uint8)
        pixels[..., i % 3] += 120  # the class is the colour that prevails
        (tmp_path / "images" / f"colour {i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"colour {i % 3}" / f"{i}.png")
    arguments = ["--preset", "examples/presets/tiny.json", "--resolution", "8", "--label_column", "label"]
    arguments += ["--train_data_dir", tmp_path / "images", "--cache_dir", tmp_path / "cache"]
    arguments += ["--output", tmp_path / "colours.safetensors", "--max_train_steps", 30, "--train_batch_size", 16]
    facts = train_classifier.main(train_classifier.parse_args([str(argument) for argument in arguments]))
    assert facts["held_out_images"] == 6 and facts["held_out_accuracy"] == 1
    classifier = ImageClassifier.load(tmp_path / "colours.safetensors")
    assert classifier.facts["max_train_steps"] == 30 and classifier.facts["held_out_accuracy"] == 1
    plain = torch.full((3, 3, 8, 8), -0.5)
    for colour in range(3):
        plain[colour, colour] = 0.5
    assert classifier(plain).argmax(1).tolist() == [0, 1, 2]
