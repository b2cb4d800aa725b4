"""Scripts of the examples on letters, called as a reader of research/README.md calls them."""

import json
import re
import shlex
from pathlib import Path

import pytest

from conftest import PRESET, reset_accelerate
from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.evaluation import ImageClassifier
from research import study, train

COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", Path("research/README.md").read_text(), re.DOTALL)).splitlines()


def test_every_command_of_the_readme_is_one_that_its_module_takes():
    modules = []
    for command in COMMANDS:
        name, *flags = shlex.split(command.removeprefix("python -m research."))
        modules.append(name)
        if name == "study":
            study.parse_args(flags)
        else:
            train.SCRIPTS[flags[0]].parse_args(flags[1:])
    assert modules == ["train", "study", "study"]


@pytest.mark.slow
def test_letters_are_trained_on_and_measured_by_the_scripts_that_know_none(tmp_path):
    grey = {"in_channels": 1, "sample_size": 8}
    sections = PRESET | {name: PRESET[name] | grey for name in ("context_encoder", "denoiser")}
    (tmp_path / "grey.json").write_text(json.dumps(sections))
    letters = ["--dataset_name", "letters", "--label_column", "label"]
    preset, model = ["--preset", str(tmp_path / "grey.json")], str(tmp_path / "pair")
    steps = ["--max_train_steps", "1", "--train_batch_size", "4"]
    train.main(["train_dual_rate", *preset, *letters, *steps, "--validation_steps", "0", "--output_dir", model])
    assert DualRatePipeline.from_pretrained(model).id2label[25] == "Z"
    assert json.loads(Path(model, "configuration.json").read_text())["data"]["dataset_name"] == "letters"
    reset_accelerate()

    ImageClassifier(1, 26).save(tmp_path / "some.safetensors")
    measured = ["--model", model, "--classifier", str(tmp_path / "some.safetensors"), "--num_samples", "8"]
    measured += ["--num_noises", "8", "--num_reference", "26", "--seeds", "0", "--cache_dir", str(tmp_path / "cache")]
    measured += ["--num_inference_steps", "2", "--num_context_steps", "1", "--output", str(tmp_path / "found.json")]
    report = train.main(["evaluate", *letters, *measured])
    assert report["data"]["floor"] == "other letters, drawn afresh" and report["data"]["classes"] == 26


def test_a_script_that_there_is_none_of_is_refused():
    with pytest.raises(ValueError, match="first argument must be one of train_dual_rate, .*, got generate"):
        train.main(["generate"])
