"""The commands of the examples' README, run as they stand on eight made-up images with shrunken networks."""

import importlib
import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import train_single_rate
from conftest import reset_accelerate
from diffusers_dualrate import DualRatePipeline, UViTDenoiser, flags

README = Path("examples/README.md").read_text(encoding="utf-8")
COMMANDS = {
    title: "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    for title, text in re.findall(r"^## (ImageNet \d+)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
}
TINY = [
    *("context_encoder.level_channels=[8,8,8]", "context_encoder.level_blocks=[1,1,1]"),
    *("context_encoder.context_channels=[8,8,8]", "context_encoder.level_types=['res','res','transformer']"),
    *("denoiser.level_channels=[8,8,8]", "denoiser.level_blocks=[1,1,1]", "denoiser.context_channels=[8,8,8]"),
    *("denoiser.level_types=['res','res','transformer']", "training.train_batch_size=4", "training.max_train_steps=1"),
    *(f"{network}.{value}" for network in ("context_encoder", "denoiser") for value in ("embedding_dim=8", "attention_head_dim=8")),
]  # fmt: skip


@pytest.fixture
def eight(tmp_path):
    """Folder of a data set of eight images in two classes, which are their own validation split."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(8)]
    dataset = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(8)]})
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    datasets.DatasetDict(train=dataset, validation=dataset).save_to_disk(str(tmp_path / "eight"))
    return str(tmp_path / "eight")


def run(script, argv):
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))
    reset_accelerate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", COMMANDS)
def test_the_commands_run_from_the_data_set_to_the_evaluation(title, eight, tmp_path):
    scripts = []
    for command in COMMANDS[title]:
        script, argv = re.fullmatch(r"(?:accelerate launch|python) examples/(\w+)\.py (.*)", command).groups()
        argv = [re.sub(r"^benjamin-paine/.*", eight, argument) for argument in shlex.split(argv)]
        argv = [re.sub(r"^runs/", f"{tmp_path}/", argument) for argument in argv]
        argv += ["--resolution", "16"] if script.startswith(("train", "distill")) else []
        if script.endswith("rate"):
            # JSON knows no single quotes, and the shell of a reader no matter.
            argv += ["--override", *(value.replace("'", '"') for value in TINY)]
        elif script == "distill":
            more = ["pretraining_steps=1", "max_train_steps=2", "train_batch_size=4", "min_variance_share=0"]
            networks = [value.replace("'", '"') for value in TINY if not value.startswith("training.")]
            argv += ["--override", *networks, *(f"distillation.{value}" for value in more)]
        elif script == "train_classifier":
            argv += ["--max_train_steps", "2", "--held_out", "0.25"]
        else:
            argv += ["--num_samples", "8", "--num_inference_steps", "2"]
            is_pair = "single-rate" not in argv[argv.index("--model") + 1]
            argv += ["--num_context_steps", "1"] if is_pair else []
            argv += ["--num_noises", "8", "--cache_dir", str(tmp_path / "cache")]
        run(script, argv)
        scripts.append(script)
    size = title.removeprefix("ImageNet ")
    assert scripts == [
        *("train_dual_rate", "train_single_rate", "train_classifier", "evaluate", "evaluate"),
        *(["distill"] if size == "64" else []),
    ]
    pipe = DualRatePipeline.from_pretrained(tmp_path / f"dualrate-imagenet{size}")
    assert pipe.id2label == {0: "a", 1: "b"} and pipe.context_encoder is not None
    report = json.loads((tmp_path / f"dualrate-imagenet{size}" / "evaluation.json").read_text())
    if size == "64":
        student = DualRatePipeline.from_pretrained(tmp_path / "distilled-imagenet64")
        assert (student.config.num_inference_steps, student.config.num_context_steps) == (8, 4)
    assert "v_loss" in report and report["rivals"]["single_rate_heavy"]["samples"][0]["num_inference_steps"] == 2


def test_the_flags_of_the_readme_exist():
    known = set(flags.argument_parser("", presets=Path("examples/presets"))._option_string_actions) | {
        "--config_file"
    }  # the last is Accelerate's
    for script in [*Path("examples").glob("*.py"), *Path("research").glob("*.py")]:
        known |= set(re.findall(r'"(--\w+)"', script.read_text(encoding="utf-8")))
    pages = [README, *(page.read_text(encoding="utf-8") for page in [Path("README.md"), *Path("docs").glob("*.md")])]
    named = {flag for page in pages for flag in re.findall(r"`(--\w+)[` ]", page)}
    assert "--on_corrupt" in named and not named - known
    for commands in COMMANDS.values():
        train_single_rate.parse_args(shlex.split(commands[1])[3:])


def test_the_configuration_of_fsdp2_wraps_the_blocks_that_the_networks_name():
    from accelerate.commands.config.config_args import load_config_from_file

    configuration = load_config_from_file("examples/fsdp2.yaml").fsdp_config
    assert configuration["fsdp_version"] == 2
    wrapped = configuration["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(wrapped) <= set(UViTDenoiser._no_split_modules)
    # Accelerate refuses a class that the model lacks.
    for preset in Path("examples/presets").glob("imagenet*.json"):
        networks = json.loads(preset.read_text())
        for network in (networks["context_encoder"], networks["denoiser"]):
            assert {f"UViT{kind.title()}Block" for kind in network["level_types"]} <= set(wrapped), preset
