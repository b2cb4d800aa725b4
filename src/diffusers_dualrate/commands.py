"""The commands that repeat a run and measure its model, made from what the run was told."""

import dataclasses
import shlex
from pathlib import Path

from .configuration import FILE, Configuration
from .pipeline import DualRatePipeline
from .recipes import DistillationRecipe, SingleRateRecipe
from .records import read_json
from .text_encoding import TEXT_OPTIONS

EVALUATION, GRID = "evaluation.json", "samples.png"
"""What a measurement leaves beside a model."""

EXAMPLE_PROMPT = "a red apple"
"""What a model of text is asked for where nobody has said what it draws well."""

# Options that the repetition of a run does not need: they say where it goes on from, or nothing of the model.
_PASSING = frozenset(
    "resume_from_checkpoint checkpoints_total_limit images_per_process push_to_hub hub_model_id output_dir cache_dir "
    "report_to checkpointing_steps validation_steps".split()
)


def find_changes(told: dict, presets: Path | None) -> dict | None:
    """Values of a run's networks, recipe and sampling that differ from the shipped preset's.

    Args:
        told: Content of the run's configuration.json.
        presets: Folder of the shipped presets; `None` for none.

    Returns:
        What the preset has for each, by names such as `denoiser.level_blocks`; `None` where no preset of that name ships.
    """
    path = None if presets is None else presets / f"{told['preset']}.json"
    trained = Configuration.from_json(told)
    kind = type(trained.recipe)
    sections = read_json(path) if path is not None and path.is_file() else {}
    followed = ["context_encoder", "denoiser", "scheduler", kind.section]
    if not sections.keys() >= set(followed):
        return None
    if kind is not DistillationRecipe:  # a student samples as it was distilled
        followed.append("sampling")
    preset = {name: sections.get(name, {}) for name in followed}
    if kind is SingleRateRecipe:  # a preset's recipe is that of a pair
        known = {field.name for field in dataclasses.fields(kind)}
        preset["training"] = {name: value for name, value in preset["training"].items() if name in known}
        preset["sampling"] = preset["sampling"] | {"num_context_steps": None}
    planned = Configuration.from_json(told | preset)
    light = trained.networks.denoiser
    text = {name: light[name] for name in TEXT_OPTIONS if light.get("cross_attention_dim") and name in light}
    networks = planned.networks.with_conditions(light["num_classes"], text)
    shipped = dataclasses.replace(planned, networks=networks).to_json()
    ours = trained.to_json()
    return {
        f"{section}.{name}": shipped[section][name]
        for section in followed
        for name, value in ours[section].items()
        if name in shipped[section] and value != shipped[section][name]  # a network of diffusers is no preset's
    }


def list_flags(told: dict, *sections: str) -> list[str]:
    """The flags of a run beside preset and recipe. Those with their default values are left out."""
    configuration, flags = Configuration.from_json(told), []
    # A student draws in the space of its teacher, and is told of no autoencoder.
    passing = _PASSING | {"vae"} if configuration.script == "distill" else _PASSING
    for section in sections:
        part = getattr(configuration, section)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name not in passing and value not in (field.default, None, False, "no"):
                flags.append(f"--{field.name}" if value is True else f"--{field.name} {shlex.quote(str(value))}")
    return flags


def training_command(told: dict, changes: dict | None, model: str) -> str:
    """The command that trains a model again."""
    preset = FILE if changes is None or changes else told["preset"]  # the file lies beside the card
    start = f"accelerate launch examples/{told['script']}.py --preset {preset}"
    return " ".join([start, *list_flags(told, "start", "data", "options"), f"--output_dir runs/{model}"])


def takes_text(told: dict) -> bool:
    """Whether a run's model takes prompts, by the content of its configuration.json."""
    return told["denoiser"].get("cross_attention_dim") is not None


def _list_data_flags(told: dict | None) -> list[str]:
    """The images that a model was trained on, as flags of what measures it."""
    if told is None or Configuration.from_json(told).data.name == "none":
        column = "--caption_column text" if told is not None and takes_text(told) else "--label_column label"
        return [f"--train_data_dir images {column}"]  # of the user, whatever it is called
    data = list_flags({**told, "data": {**told["data"], "streaming": False}}, "data")
    return [flag for flag in data if not flag.startswith(("--shuffle_buffer", "--dataloader_num_workers"))]


def evaluation_command(folder: str | Path, told: dict | None, classifier: str | Path | None = None) -> str:
    """The command that measures a model.

    Args:
        folder: Folder of the model.
        told: Content of its configuration.json, which names the data; `None` where there is none.
        classifier: File of the classifier in whose features distances are measured; `None` for no distance.
    """
    folder, files = Path(folder), [] if classifier is None else [("classifier", Path(classifier))]
    files += [("output", folder / EVALUATION), ("grid", folder / GRID)]
    named = [f"--{flag} {shlex.quote(str(path))}" for flag, path in files]
    start = f"accelerate launch examples/evaluate.py --model {shlex.quote(str(folder))}"
    return " ".join([start, *_list_data_flags(told), *named])


def next_commands(folder: str | Path, configuration: Configuration, pipeline: DualRatePipeline) -> list[str]:
    """What to do with a model that was just trained, in lines that begin in words and end in a command.

    They are for this machine, so folders stand in them as they were given.
    """
    told = {**configuration.to_json(), "data": dataclasses.asdict(configuration.data)}
    prompt = f" --prompt {shlex.quote(EXAMPLE_PROMPT)}" if takes_text(told) else ""
    look = f"Look at it: python examples/generate.py --model {shlex.quote(str(folder))}{prompt} --output samples.png"
    if not pipeline.denoiser.config.num_classes:
        return [look, f"Measure it: {evaluation_command(folder, told)}"]
    classifier = Path(folder).parent / "classifier.safetensors"
    preset = Path(folder) / FILE if "training" in told else told["preset"]  # a student's has no part `training`
    learn = f"python examples/train_classifier.py --preset {shlex.quote(str(preset))}"
    learn = " ".join([learn, *_list_data_flags(told), f"--output {shlex.quote(str(classifier))}"])
    return [
        look,
        f"Make what measures distances, once for each data set: {learn}",
        f"Measure it: {evaluation_command(folder, told, classifier)}",
    ]
