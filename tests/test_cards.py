"""Model cards: each is what its JSON makes of it, and says every figure of it."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import distill
import evaluate
import make_card
import train_dual_rate
from diffusers_dualrate import cards
from diffusers_dualrate.commands import evaluation_command, next_commands
from diffusers_dualrate.configuration import Configuration, Start

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").iterdir())
CLASSES = ROOT / "research" / "emoji32"  # records of models of classes
PAIR = CLASSES / "dualrate-emoji32"


def read(card):
    return [json.loads((card / f"{name}.json").read_text()) for name in ("evaluation", "model_index", "notes")]


def card_of(evaluation, index, notes, **options):
    return cards.make_card(evaluation, index, notes, presets=ROOT / "examples/presets", **options)


@pytest.fixture
def parts():
    """Evaluation, index and notes of the pair, as if a light network had stood beside it, to be changed at will."""
    evaluation, index, notes = read(PAIR)
    heavy = evaluation["rivals"]["single_rate_heavy"]
    light = {"model": "light-emoji32", "training": heavy["training"] | {"network": "light"}, "samples": []}
    light["configuration"] = heavy["configuration"]
    evaluation["rivals"]["single_rate_light"] = light
    evaluation["v_loss"] |= {"single_rate_light": 0.15, "share_of_gap_recovered": 0.5}
    return [evaluation, index, notes]


def row_of(text, start):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in row.strip("| ").split("|")]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_what_its_json_makes_of_it(card):
    drawn = sorted(path.name for path in card.glob("samples-*.png"))
    text = card_of(*read(card), source=f"model_cards/{card.name}", list_pictures=drawn)
    assert (card / "README.md").read_text() == text + "\n", (
        f"run: python examples/make_card.py model_cards/{card.name}"
    )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_evaluation_of_a_card_is_that_of_the_model_beside_it(card):
    evaluation, index, _ = read(card)
    assert evaluation["model"] == card.name
    for name in ("configuration", "training"):
        assert evaluation[name] == json.loads((card / f"{name}.json").read_text())
    samples = evaluation["samples"][0]
    for name in ("num_inference_steps", "num_context_steps", "guidance_scale"):
        assert samples[name] == index[name]
    assert evaluation["data"]["classes"] is index["id2label"] is None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_says_every_figure_of_its_evaluation(card):
    text, (evaluation, _, _) = (card / "README.md").read_text(), read(card)
    written = [f"{count:,}" for count in evaluation["parameters"].values()]
    written += [f"{evaluation['training']['images_seen']:,}"]
    written += [f"{images:,}" for images in evaluation.get("images_by_phase", {}).values() if images]
    trained = [evaluation, *evaluation["rivals"].values()]
    written += [f"{model['training_flops'] / 1e12:,.1f}" for model in trained if model.get("training_flops")]
    v_loss = dict(evaluation.get("v_loss", {}))
    assert bool(v_loss) != evaluation["training"]["network"].startswith("distilled")
    written += [f"{v_loss.pop('images'):,}"] if v_loss else []
    written += [f"{value:.0%}"[:-1] + " %" if "share" in name else f"{value:.4f}" for name, value in v_loss.items()]
    rivals = [way for rival in evaluation["rivals"].values() for way in rival["samples"]]
    for way in [*evaluation["samples"], *rivals, evaluation["floor"]]:
        if "flops" in way:
            written.append(f"| {way['flops_with_guidance'] / 1e9:.2f} |")
        found = [(name, way[name]) for name in evaluation["floor"].keys() & way.keys()]
        found += [pair for listed in way.get("prompts", {}).values() for pair in listed.items() if "_of_" in pair[0]]
        for name, value in found:
            is_share = not name.startswith(("fd", "image_text_score"))
            written.append(f"{100 * value['mean']:.1f} %" if is_share else f"{value['mean']:.3f}")
    assert len(written) > 6 and not [figure for figure in written if figure not in text]


def test_figures_over_seeds_come_with_their_spread_and_rivals_and_floor_stand_beside_them(parts):
    evaluation = parts[0]
    for way, mean in (
        (evaluation["samples"][0], 1.25),
        (evaluation["floor"], 0.5),
        (evaluation["rivals"]["single_rate_heavy"]["samples"][0], 1.0),
    ):
        way["fd_local_5k"] = {"values": [mean, mean], "mean": mean, "std": 0.0625}
        way["class_accuracy_5k"] = {"values": [mean / 2, mean / 2], "mean": mean / 2, "std": 0.0125}
    text = card_of(*parts)
    header = row_of(text, "how")
    for start, distance, accuracy in (
        ("this pair, second-order anc", 1.25, 62.5),
        ("heavy network alone, second-order anc", 1, 50),
        ("floor", 0.5, 25),
    ):
        cells = dict(zip(header, row_of(text, start), strict=True))
        assert cells["fd_local_5k"] == f"{distance:.3f} ± 0.062"
        assert cells["class_accuracy_5k"] == f"{accuracy:.1f} % ± 1.2 %"
    assert row_of(text, "heavy network alone, second-order anc")[1] == "12 + 0" and "*fd_local*: Fréchet" in text
    assert row_of(text, "light network alone")[1] == "0.1500" and "The pair recovers 50 % of the gap" in text


def test_a_model_without_classes_or_comparison_gets_a_card_too(parts):
    evaluation, index, notes = parts
    evaluation["data"] |= {"classes": None}
    evaluation["configuration"]["data"] |= {"dataset_name": None, "label_column": None, "train_data_dir": "my photos"}
    evaluation["rivals"] = {}
    for name in ("single_rate_heavy", "single_rate_light", "share_of_gap_recovered"):
        del evaluation["v_loss"][name]
    evaluation["floor"] = {"fid_50k": {"values": [2.5], "mean": 2.5, "std": None}}
    evaluation["samples"][0]["fid_50k"] = {"values": [3.5], "mean": 3.5, "std": None}
    del notes["example_label"]
    text = card_of(*parts)
    assert "image = pipe().images[0]" in text and "class_labels" not in text and "recovers" not in text
    assert (
        row_of(text, "this pair, second-order anc")[-1] == "3.500"
        and "- fid\n" in text
        and "class-conditional" not in text
    )
    assert "--preset emoji32 --train_data_dir 'my photos' --seed 1 --output_dir" in text
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), "snippet", "exec")


def test_the_command_of_a_card_trains_the_model_with_all_that_it_was_told(parts):
    """What was overridden is in configuration.json beside the card, which is the preset then."""
    evaluation, index, notes = parts
    told = evaluation["configuration"]
    told["data"] |= {"num_classes": 98, "streaming": True}
    text = card_of(*parts)
    start = "accelerate launch examples/train_dual_rate.py --preset emoji32 --dataset_name examples/data/emoji32 "
    assert f"{start}--label_column label --num_classes 98 --streaming --seed 1 --output_dir runs/dualrate-" in text
    assert "with preset `emoji32` and seed 1" in text
    told["training"]["bias"] = 0.5
    told["denoiser"]["level_blocks"] = [1, 1, 2]
    told["sampling"]["num_inference_steps"] = 16
    text = card_of(*parts)
    assert "with preset `emoji32`, changed as below, and seed 1" in text
    assert row_of(text, "`bias`")[1] == "**0.5** (the preset has 0.0)" and row_of(text, "`ema_decay`")[1] == "0.999"
    preset = json.loads((ROOT / "examples/presets/emoji32.json").read_text())["denoiser"]["level_blocks"]
    assert row_of(text, "`denoiser.level_blocks`")[1] == f"**[1, 1, 2]** (the preset has {preset})"
    assert row_of(text, "`sampling.num_inference_steps`")[1] == "**16** (the preset has 12)"
    assert "`context_encoder." not in text and "`scheduler." not in text
    assert "examples/train_dual_rate.py --preset configuration.json --dataset_name" in text
    _, preset, *flags = re.search(r"train_dual_rate.py (.*)", text).group(1).split()
    assert (
        preset == "configuration.json" and train_dual_rate.parse_args(["--preset", preset, *flags]).num_classes == 98
    )


def test_a_card_of_a_preset_of_ones_own_names_what_was_overridden(parts):
    told = parts[0]["configuration"]
    told |= {"preset": "mine", "overrides": ["denoiser.level_blocks=[1,1,2]", "training.bias=0.5"]}
    told["denoiser"]["level_blocks"], told["training"]["bias"] = [1, 1, 2], 0.5
    text = card_of(*parts)
    assert "with the preset `mine`, which lies beside this card as `configuration.json`, and seed 1" in text
    assert row_of(text, "`denoiser.level_blocks`")[1] == "**[1, 1, 2]** (overridden)"
    assert row_of(text, "`bias`")[1] == "**0.5** (overridden)" and row_of(text, "`ema_decay`")[1] == "0.999"
    assert "--preset configuration.json" in text


def test_a_card_that_only_sampling_was_changed_for_repeats_that_too(parts):
    """A flag of sampling is a value of the preset like any other, and a student's is none."""
    parts[0]["configuration"]["sampling"]["guidance_scale"] = 2.0
    text = card_of(*parts)
    assert row_of(text, "`sampling.guidance_scale`")[1] == "**2.0** (the preset has 4.0)"
    assert "--preset configuration.json" in text


def test_the_snippet_of_a_card_names_what_a_reader_can_load_and_no_folder_of_somebody_else(parts):
    parts[0]["model"] = "quick"
    for source, line in (
        (None, 'from_pretrained("quick")  # or this repository on the Hub'),
        ("you/quick", 'from_pretrained("you/quick")\n'),
    ):
        text = card_of(*parts, source=source)
        assert line in text and "model_cards/" not in text.replace("../..", "")


def test_a_card_shows_a_picture_only_where_there_is_one(parts):
    assert "![Samples with the defaults](samples.png)" in card_of(*parts)
    assert "![" not in card_of(*parts, picture=None)


def test_a_card_without_notes_says_what_the_records_know(parts):
    evaluation, index, _ = parts
    text = card_of(evaluation, index, {})
    assert "A Dual-Rate pair for images of 32x32 of 98 classes, trained on `emoji32`." in text
    assert f'class_labels="{next(iter(index["id2label"].values()))}"' in text and "None" not in text


def test_only_a_data_set_of_the_hub_is_linked_as_one(parts):
    assert "datasets:" not in card_of(*parts)
    parts[0]["data"]["hub"] = "owner/set"
    assert "datasets:\n- owner/set\n" in card_of(*parts)


@pytest.mark.parametrize(
    ("place", "name", "recipe", "kept"),
    [("org/unet", "org/unet", {"follow_encoder": True}, " as it is"), ("/home/me/unet", "unet", {}, "")],
)
def test_a_pair_around_a_trained_network_says_so(parts, place, name, recipe, kept):
    """Mutants: a path of somebody's machine shown; a network that was trained further called as it is."""
    evaluation, index, notes = parts
    evaluation["configuration"]["start"]["pretrained_model_name_or_path"] = place
    evaluation["configuration"]["training"] |= recipe
    text = " ".join(card_of(evaluation, index, notes).split())
    assert f"It started from `{name}`, whose heavy network it holds{kept}: what that learned from counts here" in text


def test_what_a_student_started_from_comes_before_what_it_learned_from(tmp_path):
    for name, license in (("teacher", "mit"), ("student", "cc-by-nc-4.0")):
        folder = tmp_path / f"models--org--{name}" / "snapshots" / ("a" * 40)
        (folder / "denoiser").mkdir(parents=True)
        (folder / "denoiser" / "config.json").write_text("{}")
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    places = {
        name: str(tmp_path / f"models--org--{name}" / "snapshots" / ("a" * 40)) for name in ("teacher", "student")
    }
    for start, expected in (
        (Start(**places), "student"),
        (Start(teacher=places["teacher"], student="here"), "teacher"),
    ):
        cards.record_training(tmp_path, start, network="distilled pair")
        base = json.loads((tmp_path / "training.json").read_text())["base"]
        assert base["repository"] == f"org/{expected}"
        assert base["license"] == {"teacher": "mit", "student": "cc-by-nc-4.0"}[expected]


def test_notes_with_an_unknown_part_are_refused_by_its_name(parts):
    parts[2]["limit"] = ["It is small."]
    with pytest.raises(ValueError, match="notes.json has no part 'limit'; it may have license, summary"):
        card_of(*parts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation.json", "[]", "evaluation.json must hold an object of names and values, and holds list"),
        ("model_index.json", "[]", "model_index.json must hold an object of names and values, and holds list"),
        ("notes.json", "{", "notes.json is no JSON"),
    ],
)
def test_a_file_that_no_card_can_be_made_of_is_named(tmp_path, name, text, message):
    shutil.copytree(PAIR, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        make_card.main(make_card.parse_args([str(tmp_path / "model")]))
    assert not (tmp_path / "model/README.md").exists()


def test_a_model_of_another_training_is_told_that_no_card_can_be_made_of_it(tmp_path):
    with pytest.raises(ValueError, match="has no configuration.json, .* Write README.md by hand"):
        make_card.main(make_card.parse_args([str(tmp_path)]))


def test_a_folder_without_a_measurement_is_refused_with_the_command_that_measures_it(tmp_path):
    """The command has the data of the run, and evaluate.py takes it as it stands."""
    shutil.copytree(PAIR, tmp_path / "my model", ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    (tmp_path / "my model" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="has no evaluation.json: measure it first, by accelerate launch") as refusal:
        make_card.main(make_card.parse_args([str(tmp_path / "my model")]))
    _, _, script, *flags = shlex.split(str(refusal.value).partition(", by ")[2])
    args = evaluate.parse_args(flags)
    assert script == "examples/evaluate.py" and args.model == str(tmp_path / "my model")
    assert (args.dataset_name, args.label_column) == ("examples/data/emoji32", "label")
    assert args.output == str(tmp_path / "my model/evaluation.json") and args.grid.endswith("my model/samples.png")
    assert "--train_data_dir images" in evaluation_command("runs/quick", None)


def test_a_repository_is_named_for_one_folder_that_is_published(capsys):
    for arguments in (["a", "--hub_model_id", "you/a"], ["a", "b", "--push_to_hub", "--hub_model_id", "you/a"]):
        with pytest.raises(SystemExit):
            make_card.parse_args(arguments)
        assert "--hub_model_id: it names the repository of one folder, with --push_to_hub" in capsys.readouterr().err


def test_a_card_of_a_model_whose_training_nobody_recorded_is_refused(parts):
    parts[0]["training"] = None
    with pytest.raises(
        ValueError, match="put configuration.json and training.json beside the weights, and evaluate again"
    ):
        card_of(*parts)


@pytest.fixture
def student(parts):
    """The same for a student of that pair, whose teacher is guided."""
    evaluation, index, notes = parts
    evaluation["training"] = {"network": "distilled pair", "images_seen": 13920}
    made = json.loads((CLASSES / "dualrate-emoji32-distilled" / "evaluation.json").read_text())
    evaluation["configuration"] = made["configuration"]
    evaluation["configuration"]["distillation"]["guidance_scale"] = 3.0
    evaluation |= {
        "images_by_phase": {"pretraining": 0, "auxiliary": 8000, "student": 5920},
        "training_flops": 1.25e13,
    }
    heavy = evaluation["rivals"]["single_rate_heavy"]
    start = {
        "model": PAIR.name,
        "configuration": heavy["configuration"],
        "samples": evaluation["samples"],
        "training": None,
        "training_flops": 5e12,
    }
    evaluation["rivals"] = {heavy["model"]: heavy | {"training_flops": 2.5e15}, PAIR.name: start}
    own = {"num_inference_steps": 8, "num_context_steps": 2, "guidance_scale": 1.0, "flops_with_guidance": 5e8}
    evaluation["samples"] = [{**start["samples"][0], **own, "evaluations": {"context_encoder": 2, "denoiser": 8}}]
    index |= {"num_inference_steps": 8, "num_context_steps": 2, "guidance_scale": 1.0}
    del evaluation["v_loss"]
    notes["limits"] = ["It has one number of steps."]
    return parts


def test_the_card_of_a_student_tells_what_it_needs_and_where_it_came_from_and_no_v_loss(student):
    text = card_of(*student)
    assert "v-loss" not in text and "v_hat" not in text and "\n- mse" not in text and "arxiv:2406.04103" in text
    assert "Its defaults are N = 8, K = 2 and guidance 1.0. It was distilled for these" in text
    assert "Its teacher's guidance, 3.0, is distilled in" in text
    rows = {
        start: row_of(text, start)
        for start in ("this student,", "single-rate-emoji32, its teacher, second-order anc", "dualrate-emoji32,")
    }
    assert [cells[1:4] for cells in rows.values()] == [
        ["2 + 8", "none", "0.50"],
        ["12 + 0", "4", "3.12"],
        ["4 + 12", "4", "1.66"],
    ]
    assert rows["dualrate-emoji32,"][0] == "dualrate-emoji32, its start, second-order ancestral, N = 12, K = 4"
    assert (
        "13,920 images, 10 passes over the 1,392 of `emoji32`, 8,000 of them in steps of the auxiliary and 5,920 in"
        in text
    )
    assert "took 12.5 TFLOP" in text and "its teacher: 2,500.0; dualrate-emoji32, its start: 5.0." in text
    assert "of denoising" not in text and "DPMSolverMultistepScheduler(" not in text


def test_the_card_of_a_single_rate_student_from_noise_shows_no_other_solver_and_no_passes_over_data(student):
    evaluation, index, _ = student
    evaluation["configuration"]["distillation"] |= {"full_rollout": True, "guidance_scale": 1.0}
    evaluation["images_by_phase"] = {"pretraining": 320, "auxiliary": 6800, "student": 6800}
    del evaluation["parameters"]["context_encoder"]
    text = card_of(*student)
    assert "13,920 samples of its own, from noise alone, 6,800 of them" in text and "after 320 of denoising" in text
    assert "DPMSolverMultistepScheduler(" not in text and "distilled in" not in text


@pytest.mark.parametrize(
    ("changed", "k", "late"),
    [
        ({"num_context_steps": 3}, 3, None),
        ({"context_free": True, "refresh_steps": [4, 9]}, 2, "The first 4 of 12 steps go without context."),
        (
            {"context_free": True, "context_from": 0.25, "num_context_steps": 8},
            3,
            "The first 9 of 12 steps go without context.",
        ),
        ({"num_context_steps": None}, 12, None),
    ],
)
def test_the_k_of_a_card_is_that_of_the_models_own_plan_whatever_was_measured(parts, changed, k, late):
    """Mutant: the K of the first measurement, which may have been asked for."""
    evaluation, index, notes = parts
    text = card_of(evaluation, index | changed, notes)
    assert f"runs {k} times per image" in text and f"N = {index['num_inference_steps']}, K = {k}" in text
    assert late in text if late else "go without context" not in text


def test_the_card_of_a_pair_whose_encoder_denoises_counts_what_it_spares(parts):
    evaluation, index, notes = parts
    n, k = index["num_inference_steps"], index["num_context_steps"]
    for spares, light in ((False, n), (True, n - k)):
        text = card_of(evaluation, index | {"encoder_denoises": spares}, notes)
        assert f"parameters runs {k} times per image" in text and f"parameters {light} times." in text


def test_the_card_of_a_student_of_text_shows_a_prompt_and_repeats_with_its_prompts(student):
    """Its teacher has an autoencoder, which the command that distils it again is not told of."""
    evaluation, index, notes = student
    evaluation["data"] |= {"classes": None}
    told = evaluation["configuration"]
    told["denoiser"] |= {"num_classes": None, "cross_attention_dim": 8, "text_length": 6}
    told["data"] |= {"dataset_name": None, "label_column": None}
    told["start"] |= {"vae": "teacher", "prompt_list": "my prompts.txt"}
    index["id2label"], notes["example_label"] = None, None
    found = {
        "prompt_of_nearest_prompt_9": 0.5,
        "caption_of_nearest_text_9": 0.25,
        "caption_of_nearest_9": 1.0,
        "image_text_score_9": 0.75,
    }
    spread = {name: {"mean": value, "std": 0.125} for name, value in found.items()}
    assert "recognised" not in card_of(*student)
    evaluation["samples"][0]["prompts"] = {"seen": {"prompts": 9, "seconds_per_image": 0.5, **spread}}
    del found["caption_of_nearest_9"]
    evaluation["prompt_lists"] = {"seen": {"images": 8, **found}, "novel": None}
    text = card_of(*student)
    rows = re.findall(r"^\| seen, (\d) \| [^|]*\| (.*) \|$", text, re.MULTILINE)
    assert rows == [
        ("9", "50.0 % ± 12.5 % | 25.0 % ± 12.5 % | 100.0 % ± 12.5 % | 0.750 ± 0.125 | 0.50"),
        ("8", "50.0 % | 25.0 % |  | 0.750 | "),
    ]
    assert 'image = pipe("a red apple").images[0]' in text and "and guidance 1.0" in text
    assert "samples-" not in text
    assert "\n![Prompts of seen](samples-seen.png)\n" in card_of(*student, list_pictures=["samples-seen.png"])
    assert "pipeline_tag: text-to-image" in text and "unconditional" not in text
    assert "Its teacher's guidance, 3.0, is distilled in" in text
    assert "--prompt_list 'my prompts.txt'" in text and "--vae" not in text
    _, *flags = shlex.split(re.search(r"examples/distill.py.*", text).group())
    assert distill.parse_args(flags).prompt_list == "my prompts.txt"
    pipe = SimpleNamespace(context_encoder=1, denoiser=SimpleNamespace(config=SimpleNamespace(num_classes=None)))
    look, measure = next_commands("runs/text", Configuration.from_json(told), pipe)
    assert "--prompt 'a red apple'" in look and "--train_data_dir images --caption_column text" in measure
