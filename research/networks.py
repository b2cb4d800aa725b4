"""What the study trains: the data sets, how models are made on them, and where each is found again by its configuration."""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distill
import train_dual_rate
import train_single_rate
from diffusers_dualrate import flops

from . import EXAMPLES, train_unet
from .jobs import digest, write_json
from .letters import open_images

RESEARCH = Path(__file__).parent


@dataclass(frozen=True)
class DataSet:
    """A data set of the study; the preset is the one of the same heavy and light networks for every arm.

    Args:
        preset: File of the preset.
        classifier: File of the classifier whose features measure distances.
        dataset_name: What the training scripts call the data set.
        sized: Shape of the single-rate network that costs per step what the pair does on average at N = 64, K = 8.
        unet: Shape of the `UNet2DModel` that costs what the heavy network does.
        num_samples: n, images of a point and of the floor.
        num_references: Images that both are held against; `None` for all there are.
        max_evaluations: Largest N.
        sampling: How models are saved to sample. No point follows it, but names of points are made of it, too.
    """

    preset: Path
    classifier: Path
    dataset_name: str
    sized: dict
    unet: dict
    num_samples: int
    num_references: int | None = None
    max_evaluations: int = 256
    sampling: dict = field(
        default_factory=lambda: {"num_inference_steps": 64, "num_context_steps": 8, "guidance_scale": 1.0}
    )


def _unet(sample_size, channels, *widths):
    """Arguments of a `UNet2DModel` of plain convolutional levels, with attention in the middle."""
    return {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * len(widths),
        "up_block_types": ("UpBlock2D",) * len(widths),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }


DATA = {
    "letters": DataSet(
        RESEARCH / "presets/letters16.json",
        RESEARCH / "classifiers/letters.safetensors",
        "letters",
        {"level_channels": [12, 16, 32], "level_blocks": [1, 1, 1], "embedding_dim": 96},
        _unet(16, 1, 8, 20, 32),
        num_samples=5000,
        num_references=10_000,
    ),
    "digits": DataSet(
        EXAMPLES / "presets/digits8.json",
        EXAMPLES / "classifiers/digits.safetensors",
        "digits",
        {"level_channels": [16, 32], "level_blocks": [1, 1], "embedding_dim": 64},
        _unet(8, 1, 8, 32),
        num_samples=898,
    ),
    "emoji32": DataSet(
        EXAMPLES / "presets/emoji32.json",
        EXAMPLES / "classifiers/emoji32.safetensors",
        str(EXAMPLES / "data/emoji32"),
        {"level_channels": [27, 64, 128], "level_blocks": [1, 1, 2], "attention_head_dim": 32},
        _unet(32, 3, 16, 24, 48, 64),
        num_samples=500,
        sampling={"num_inference_steps": 64, "num_context_steps": 16, "guidance_scale": 4.0},
    ),
}


@dataclass(frozen=True)
class Training:
    """How a model is made.

    Args:
        script: The training script.
        flags: Its flags.
        changes: What is laid over sections of the data's preset.
        shape: Field of `DataSet` that is laid over the preset too, and the section that it is laid over.
        starts: For each flag of the script that names a model, the training whose model it is given: so a conversion, or a
            distillation, which follows the preset's other recipe.
    """

    script: ModuleType
    flags: tuple[str, ...] = ()
    changes: dict[str, dict] = field(default_factory=dict)
    shape: tuple[str, str] | None = None
    starts: dict[str, str] = field(default_factory=dict)


# Largest ages of a context, in shares of the chain: those that K = 4, 8, 16 and 32 bring.
_WINDOWS = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def _train_pair(context_ages, context_dropout=0.0, **recipe):
    """Both networks of a pair, jointly, with these largest ages of a context."""
    return Training(
        train_dual_rate,
        changes={"training": {"context_ages": context_ages, "context_dropout": context_dropout} | recipe},
    )


def _convert(heavy="heavy", **recipe):
    """A trained network becomes the encoder, frozen, and hands over its prediction: only the light one learns.

    It learns to predict what the heavy one would.
    """
    recipe |= {"max_train_steps": 1500, "context_dropout": 0.0, "context_ages": [1 / 2, 1 / 4, 1 / 8, 1 / 16]}
    hands_over = {"prediction_hand_over": True}
    return Training(
        train_dual_rate,
        ("--follow_encoder",),
        changes={"context_encoder": hands_over, "denoiser": hands_over, "training": recipe},
        starts={"--pretrained_model_name_or_path": heavy},
    )


def _distil(student="converted", teacher="heavy", **recipe):
    """A student, a pair or the teacher itself, distilled from a trained network."""
    return Training(distill, changes={"distillation": recipe}, starts={"--teacher": teacher, "--student": student})


TRAININGS = {
    "heavy": Training(train_single_rate, ("--network", "heavy")),
    "pair": _train_pair(_WINDOWS),
    # The paper's p, with the rows that see no context costing nothing heavy.
    "dropout-pair": _train_pair(_WINDOWS, context_dropout=0.5),
    # An encoder that always sees the image that the denoiser sees, as in DDT (arXiv 2504.05741).
    "fresh-pair": _train_pair([0.0]),
    # Half of the rows so, as in a sampler that shares each context between two steps: one of the two has a fresh one.
    "half-fresh-pair": _train_pair([0.0] * 4 + _WINDOWS),
    # Half fresh, too, but without context in the noisier half of the chain, where nothing heavy is trained.
    "late-pair": _train_pair([0.0] * 4 + _WINDOWS, context_from=0.5),
    "converted": _convert(),
    "late-converted": _convert(context_from=0.5),
    "sized": Training(train_single_rate, ("--network", "light"), shape=("sized", "denoiser")),
    "light": Training(train_single_rate, ("--network", "light")),
    "unet": Training(train_unet, shape=("unet", "unet")),
    "heavy-mmd": _distil("heavy"),
    "pair-mmd": _distil(),
    "half-fresh-pair-mmd": _distil("half-fresh-pair"),
    "pair-mmd-full-rollout": _distil(full_rollout=True),
    "pair-mmd-4-steps": _distil(num_inference_steps=4, num_context_steps=2),
    "pair-mmd-2-steps": _distil(num_inference_steps=2, num_context_steps=1),
    # Their pair brings the time of the first context: half of the steps go without.
    "late-pair-mmd": _distil("late-pair", num_inference_steps=4, num_context_steps=2),
    "late-pair-mmd-2-steps": _distil("late-pair", num_inference_steps=2, num_context_steps=1),
    # A network of diffusers as encoder and teacher, as it is.
    "unet-converted": _convert("unet"),
    "unet-mmd": _distil("unet", "unet"),
    "unet-mmd-4-steps": _distil("unet", "unet", num_inference_steps=4),
    "unet-mmd-2-steps": _distil("unet", "unet", num_inference_steps=2),
    "unet-pair-mmd": _distil("unet-converted", "unet"),
    "unet-pair-mmd-4-steps": _distil("unet-converted", "unet", num_inference_steps=4, num_context_steps=2),
    "unet-pair-mmd-4-steps-1-context": _distil("unet-converted", "unet", num_inference_steps=4, num_context_steps=1),
    "unet-pair-mmd-2-steps": _distil("unet-converted", "unet", num_inference_steps=2, num_context_steps=1),
}


def given_count(args, name: str, data: str) -> int | None:
    """What a data set is to be shrunk to, if to anything."""
    given = dict(getattr(args, name))
    return given.get(data, given.get(""))


def make_preset(data: str, training: str, max_train_steps: int | None = None) -> dict:
    """The preset of a data set as one training changes it, its steps shrunk where there are more."""
    preset = json.loads(DATA[data].preset.read_text())
    networks = ("context_encoder", "denoiser", "scheduler")
    followed = "distillation" if TRAININGS[training].script is distill else "training"
    preset = {name: preset[name] for name in (*networks, followed)}
    if followed == "training":
        preset["sampling"] = dict(DATA[data].sampling)
    for section, changes in TRAININGS[training].changes.items():
        preset[section] |= changes
    if shape := TRAININGS[training].shape:
        name, section = shape
        preset[section] = preset.get(section, {}) | getattr(DATA[data], name)
    if max_train_steps is not None:
        recipe_of(training, preset)["max_train_steps"] = min(
            max_train_steps, recipe_of(training, preset)["max_train_steps"]
        )
    return preset


def recipe_of(training: str, preset: dict) -> dict:
    """The recipe that a training follows."""
    return preset["distillation" if TRAININGS[training].script is distill else "training"]


def configuration_of(training: str, preset: dict) -> dict:
    """What of a preset decides the trained model: a single-rate network has no context and no second network.

    Names of points are made of this, so it stays in the words of study.json: the ages of contexts as the K that brings
    them, 10^6 for a fresh one, and how the model samples as a part of the recipe.
    """
    preset = dict(preset)
    recipe = recipe_of(training, preset) | preset.pop("sampling", {})
    preset.pop("distillation", None)
    if "context_ages" in recipe:
        recipe["context_steps"] = [round(1 / age) if age else 10**6 for age in recipe.pop("context_ages")]
    preset["training"] = recipe
    if TRAININGS[training].script not in (train_single_rate, train_unet):
        return preset
    network = "context_encoder" if "heavy" in TRAININGS[training].flags else "denoiser"
    sections = {
        "network": preset.get("unet", preset[network]),
        "scheduler": preset["scheduler"],
        "training": preset["training"],
    }
    alone = ("context", "hand_over")
    return {
        name: {key: value for key, value in section.items() if not any(word in key for word in alone)}
        for name, section in sections.items()
    }


def run_training(data: str, training: str, preset: dict, folder: Path, *flags: str) -> None:
    """Train with the script that a user calls."""
    script, presets = TRAININGS[training].script, folder.with_name(f"{folder.name}-preset")
    presets.mkdir(parents=True, exist_ok=True)  # the folder itself is the run's alone
    path = presets / DATA[data].preset.name
    path.write_text(json.dumps({name: part for name, part in preset.items() if name != "unet"}, indent=2) + "\n")
    common = ["--preset", str(path), "--output_dir", str(folder)]
    if "unet" in preset:
        write_json(presets / "unet.json", preset["unet"])
        common += ["--unet", str(presets / "unet.json")]
    common += ["--dataset_name", DATA[data].dataset_name, "--label_column", "label", "--validation_steps", "0"]
    if status := script.main(script.parse_args([*common, *TRAININGS[training].flags, *flags]), open_images):
        raise SystemExit(status)  # stopped by a signal, and so is the study


def start_flags(args, data: str, training: str, seed: int | None) -> list[str]:
    """The trained models that a training starts from, as flags."""
    starts = TRAININGS[training].starts.items()
    return [part for flag, start in starts for part in (flag, str(find_model(args, data, start, "steps", seed)[0]))]


def lineage(training: str) -> set[str]:
    """A training and all that it starts from."""
    return {training}.union(*(lineage(start) for start in TRAININGS[training].starts.values()))


def step_flops(args, data: str, training: str, seed: int | None = None) -> int:
    """FLOPs of one training step, forwards and backwards, counted in the script itself.

    Where it starts from a trained model, that is the one of `seed`. They are half of what three steps have more than one:
    in a distillation steps of two kinds alternate.
    """
    preset = make_preset(data, training)
    cached = Path(args.work_dir, data, f"flops-{training}-{digest(configuration_of(training, preset))}.json")
    if not cached.exists():
        totals = []
        for steps in (1, 3):
            recipe_of(training, preset)["max_train_steps"] = steps
            flops.forget()  # what both count of their networks' shapes is then the same, and no part of the difference
            with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
                with FlopCounterMode(display=False) as counter:
                    run_training(data, training, preset, Path(folder, "run"), *start_flags(args, data, training, seed))
            totals.append(counter.get_total_flops())
        write_json(cached, (totals[1] - totals[0]) // 2)
    return json.loads(cached.read_text())


def budgets_of(training: str, budgets: list[str]) -> list[str]:
    """Budgets that a model is trained for.

    The heavy network is the measure of both, so it, and the U-Net that costs the same, is trained once. A conversion or
    distillation comes on top of what it starts from, for which there is no measure: it is run once, too.
    """
    return ["steps"] if training in ("heavy", "unet") or TRAININGS[training].starts else budgets


def find_model(args, data: str, training: str, budget: str, seed: int) -> tuple[Path, dict]:
    """Folder of a model and the preset that it is trained with."""
    preset = make_preset(data, training, given_count(args, "max_train_steps", data))
    if budget == "flops":
        recipe = recipe_of(training, preset)
        ratio = step_flops(args, data, "heavy") / step_flops(args, data, training)
        recipe["max_train_steps"] = max(1, round(recipe["max_train_steps"] * ratio))
    configuration = configuration_of(training, preset)
    if TRAININGS[training].starts:
        # By their names, which hold what they were trained with: the work_dir may be moved.
        configuration = [configuration, *(Path(part).name for part in start_flags(args, data, training, seed))]
    name = f"{training}-{budget}-{seed}-{digest(configuration)}"
    return Path(args.work_dir, data, name), preset


def train_model(args, data: str, training: str, budget: str, seed: int) -> None:
    """Train one model, or finish or keep what is there."""
    folder, preset = find_model(args, data, training, budget, seed)
    step_flops(args, data, training, seed)
    if not (folder / "model_index.json").exists():
        flags = ["--seed", str(seed), *start_flags(args, data, training, seed)]
        if TRAININGS[training].script is not train_unet:  # which has no checkpoints
            flags += ["--resume_from_checkpoint", "latest"]
            flags += ["--checkpointing_steps", "250", "--checkpoints_total_limit", "1"]
        run_training(data, training, preset, folder, *flags)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
