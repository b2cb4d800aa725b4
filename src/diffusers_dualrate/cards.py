"""Model cards: what a folder's records say of a model, in the words that its readers need.

Every figure of a card comes from evaluation.json or model_index.json. What the training was told comes from
configuration.json. What only a person knows, such as intended use, weak points and sources, may be given in notes.json.
A card depends on nothing else, so it can be made again at any time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .commands import EVALUATION, EXAMPLE_PROMPT, GRID, evaluation_command, find_changes, takes_text, training_command
from .configuration import FILE, Configuration, Start
from .defaults import SamplingDefaults
from .latents import compression_of
from .origins import TRAINING, Origin
from .pipeline import DualRatePipeline
from .records import read_json
from .refreshes import RefreshPlan
from .repositories import CARD, HUB_NAME, describe_origin
from .scheduler import DualRateScheduler
from .steps import plan_steps
from .tables import LEGEND, PROMPT_METRICS, name_rival, percent, prompt_rows, sample_rows, v_loss_rows

TEMPLATE = Path(__file__).with_name("card_template.md")
UNMEASURED = "Nothing yet. This command measures it, and `examples/make_card.py` then puts the figures here:"
"""What a card says in place of figures, where there are none."""

NOTES = ("license", "summary", "example_label", "intended_use", "training", "limits", "bias", "sources")


def describe_training_images(evaluation: dict, changes: dict | None) -> str:
    """The images that a training took, and for a student in what kind of step."""
    told, data = evaluation["configuration"], evaluation["data"]
    images = evaluation["training"]["images_seen"]
    if told.get("distillation", {}).get("full_rollout"):
        text = f"{images:,} samples of its own, from noise alone"
    elif data["images"] is None:
        text = f"{images:,} images of `{data['name']}`"
    else:
        text = (
            f"{images:,} images, {images / data['images']:,.0f} passes over the {data['images']:,} of `{data['name']}`"
        )
    if phases := evaluation.get("images_by_phase"):
        text += f", {phases['auxiliary']:,} of them in steps of the auxiliary and {phases['student']:,} in steps of the student"
        if phases["pretraining"]:
            text += f", after {phases['pretraining']:,} of denoising"
    return f"{text}, {describe_preset(told, changes)} and seed {told['options']['seed']}."


def describe_cost(evaluation: dict) -> str:
    """What the training took in FLOPs, beside the trainings of the models that are compared; empty where it is not known."""
    own, start = evaluation.get("training_flops"), evaluation["configuration"]["start"]
    if own is None:
        return ""
    text = f"The training itself took {own / 1e12:,.1f} TFLOP, forwards and backwards"
    others = [
        f"{name_rival(key, rival, start)}: {rival['training_flops'] / 1e12:,.1f}"
        for key, rival in evaluation["rivals"].items()
        if rival.get("training_flops") is not None
    ]
    return f"{text}; beside it, each without what it started from, {'; '.join(others)}." if others else f"{text}."


def describe_preset(told: dict, changes: dict | None) -> str:
    """Which preset a run followed, and whether in all."""
    if changes is None:
        return f"with the preset `{told['preset']}`, which lies beside this card as `{FILE}`,"
    return f"with preset `{told['preset']}`{', changed as below,' if changes else ''}"


def recipe_rows(told: dict, changes: dict | None) -> list[tuple[str, str]]:
    """The recipe as a table, each value that was changed marked, then what was changed elsewhere in the preset."""
    configuration = Configuration.from_json(told)
    content, own = configuration.to_json(), f"{configuration.recipe.section}."
    given = [override.partition("=")[0] for override in configuration.overrides]

    def row(key: str) -> tuple[str, str]:
        section, name = key.split(".", 1)
        value = json.dumps(content[section][name])
        if changes is not None and key in changes:
            value = f"**{value}** (the preset has {json.dumps(changes[key])})"
        elif changes is None and key in given:
            value = f"**{value}** (overridden)"
        return key.removeprefix(own), value

    recipe = [f"{own}{name}" for name in told[own[:-1]]]
    return [row(key) for key in dict.fromkeys([*recipe, *(given if changes is None else changes)])]


def describe_unmeasured(pipeline: DualRatePipeline, model: str, told: dict, trained: dict, images: int | None) -> dict:
    """What a card says of a model that nobody has measured, in the form of an evaluation.json.

    Args:
        pipeline: The model.
        model: What it is called.
        told: Content of its configuration.json.
        trained: Content of its training.json.
        images: Number of images that it was trained on, where that is known.
    """
    data = Configuration.from_json(told).data
    networks = {"context_encoder": pipeline.context_encoder, "denoiser": pipeline.denoiser}
    return {
        "model": model,
        "parameters": {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in networks.items()
            if network is not None
        },
        "data": {
            "name": data.name,
            "hub": data.hub_name,
            "images": images,
            "classes": pipeline.denoiser.config.num_classes,
        },
        "configuration": told,
        "training": trained,
        "vae": None if pipeline.vae is None else {"compression": compression_of(pipeline.vae)},
        "rivals": {},
    }


def complete_notes(notes: dict, evaluation: dict) -> dict:
    """The notes, with what the records know in place of what nobody has said.

    Raises:
        ValueError: If there is something else in them.
    """
    if unknown := sorted(notes.keys() - set(NOTES)):
        raise ValueError(f"notes.json has no part {unknown[0]!r}; it may have {', '.join(NOTES)}.")
    data, told = evaluation["data"], evaluation["configuration"]
    size, ratio = told["denoiser"]["sample_size"], (evaluation.get("vae") or {}).get("compression", 1)
    height, width = (side * ratio for side in ((size, size) if isinstance(size, int) else size))
    kind = {"pair": "A Dual-Rate pair", "distilled pair": "A Dual-Rate student of few steps"}.get(
        evaluation["training"]["network"], "A single-rate diffusion model"
    )
    classes = f" of {data['classes']} classes" if data["classes"] else " from prompts" if takes_text(told) else ""
    said = {
        "summary": f"{kind} for images of {height}x{width}{classes}, trained on `{data['name']}`.",
        "intended_use": f"Research, and images like those of `{data['name']}`. Nothing else was tried.",
        "training": "",
        "limits": [
            f"It was trained on images of {height}x{width}; at other sizes it was not tried.",
            "Nobody has described its weak points yet.",
        ],
        "bias": f"It repeats what `{data['name']}` holds too much or too little of, and may come close to single images of it.",
        "sources": f"The images are those of `{data['name']}`.",
        "license": None,
        "example_label": None,
    }
    return said | {name: value for name, value in notes.items() if value}


def describe_start(told: dict) -> str:
    """Which trained model a training started from, in words for its card; empty where there is none."""
    place, recipe = told["start"].get("pretrained_model_name_or_path"), told.get("training", {})
    if place is None:
        return ""
    name = place if HUB_NAME.fullmatch(place) else Path(place).name  # where a machine keeps it is nobody's business
    kept = " as it is" if recipe.get("follow_encoder") or recipe.get("freeze_encoder") else ""
    return f" It started from `{name}`, whose heavy network it holds{kept}: what that learned from counts here, too."


def describe_networks(evaluation: dict, index: dict, plan: RefreshPlan | None) -> str:
    """How large the networks are, how often each runs, and whether contexts begin late."""
    parameters = evaluation["parameters"]
    if plan is None:
        return f"One network of {parameters['denoiser']:,} parameters runs at every step."
    heavy, light = plan.evaluations(bool(index.get("encoder_denoises")))
    said = (
        f"A context encoder of {parameters['context_encoder']:,} parameters runs {heavy} times per image, and a "
        f"denoiser of {parameters['denoiser']:,} parameters {light} times."
    )
    if plan.num_steps_alone:
        said += f" The first {plan.num_steps_alone} of {len(plan)} steps go without context."
    return said


def describe_model(evaluation: dict, notes: dict, columns: list[str], base: Origin | None) -> ModelCardData:
    """What the Hub reads of a card; `base` is the published model that this one was made of."""
    data, is_student = evaluation["data"], evaluation["training"]["network"].startswith("distilled")
    metrics = [
        *(["mse"] if evaluation.get("v_loss") else []),
        *(["accuracy"] if columns else []),
        *(["fid"] if any(column.startswith("fid_") for column in columns) else []),
    ]
    is_of_text = takes_text(evaluation["configuration"])
    kind = "text-to-image" if is_of_text else "class-conditional" if data["classes"] else "unconditional"
    tags = ["dual-rate-diffusion", kind]
    tags.append("latent-space" if evaluation.get("vae") else "pixel-space")
    return ModelCardData(
        license=notes["license"] or (None if base is None else base.license),
        base_model=None if base is None else base.repository,
        library_name="diffusers",
        pipeline_tag="text-to-image" if is_of_text else "unconditional-image-generation",
        tags=[*tags, "arxiv:2605.18190", *(["arxiv:2406.04103"] if is_student else [])],
        datasets=[data["hub"]] if data["hub"] else None,
        metrics=metrics or None,
    )


def measured_parts(evaluation: dict, title: str, columns: list[str]) -> dict:
    """What the template takes of a measurement."""
    known = [next((name for name in LEGEND if column.startswith(name)), None) for column in columns]
    used = [text for name, text in LEGEND.items() if name in known]
    if "held_out_accuracy" in (evaluation.get("classifier") or {}):
        used.append(
            f"That classifier knows {percent(evaluation['classifier']['held_out_accuracy'])} of the images held out from its own training."
        )
    v_loss = evaluation.get("v_loss", {})
    share, decoding = v_loss.get("share_of_gap_recovered"), (evaluation.get("vae") or {}).get("decode_flops")
    return {
        "hardware": evaluation["hardware"],
        "v_loss_images": f"{v_loss['images']:,}" if v_loss else "",
        "v_loss": list(v_loss_rows(evaluation)) if v_loss else [],
        "share": None if share is None else percent(share),
        "floor": f"real images ({evaluation['data']['floor']})",
        "columns": columns,
        "rows": list(sample_rows(evaluation, title, columns)),
        "legend": " ".join(used),
        "prompts": list(prompt_rows(evaluation, title)),
        "prompt_columns": list(PROMPT_METRICS.values()),
        "decoding": "" if decoding is None else f"{decoding / 1e9:.3g} GFLOP",
    }


def make_card(
    evaluation: dict,
    index: dict,
    notes: dict,
    *,
    presets: Path | None,
    source: str | None = None,
    picture: str | None = GRID,
    list_pictures: Sequence[str] = (),
    origin: str = "",
) -> str:
    """The card's text.

    Args:
        evaluation: Content of evaluation.json, or what `describe_unmeasured` makes in its place.
        index: Content of model_index.json.
        notes: Content of notes.json, empty where there is none.
        presets: Folder of the shipped presets, which a run's values are held against; `None` for none.
        source: Name that the model is loaded by; default: the name of its folder.
        picture: File of samples beside the card; `None` where there is none.
        list_pictures: Files of drawn lists of prompts beside it, samples-NAME.png.
        origin: Of `describe_origin`.

    Raises:
        ValueError: If the notes have an unknown part, or the model that was evaluated has no record of its training.
    """
    if evaluation["training"] is None or evaluation["configuration"] is None:
        raise ValueError(
            f"{EVALUATION} knows no training: put {FILE} and training.json beside the weights, and evaluate again."
        )
    notes = complete_notes(notes, evaluation)
    record, data, told = evaluation["training"], evaluation["data"], evaluation["configuration"]
    changes = find_changes(told, presets)
    is_pair, is_student = "context_encoder" in evaluation["parameters"], record["network"].startswith("distilled")
    is_measured, columns = "samples" in evaluation, list(evaluation.get("floor", ()))
    plan = plan_steps(DualRateScheduler(), SamplingDefaults.of(index)).plan if is_pair else None
    defaults = f"N = {index['num_inference_steps']}{f', K = {plan.num_context_steps}' if plan else ''}"
    if is_guided := bool(data["classes"]) or takes_text(told):
        defaults += f" and guidance {index['guidance_scale']}"
    label = notes["example_label"] or next(iter((index["id2label"] or {}).values()), 0)
    shown = f"class_labels={json.dumps(label)}" if data["classes"] else ""
    if takes_text(told):
        shown = json.dumps(notes["example_label"] or EXAMPLE_PROMPT)
    base = None if record.get("base") is None else Origin(**record["base"])
    if base is not None and base.repository not in origin:
        origin = f"{origin} It was made of {base.describe('model')}".strip()
    title = "this student" if is_student else "this pair" if is_pair else "this model"
    recipe = told.get("training") or told["distillation"]
    return ModelCard.from_template(
        describe_model(evaluation, notes, columns, base),
        template_path=str(TEMPLATE),
        model=evaluation["model"],
        source=source or evaluation["model"],
        is_on_hub=source is not None and not source.startswith("model_cards/"),
        picture=picture,
        list_pictures={file.partition("-")[2].partition(".")[0]: file for file in list_pictures},
        notes=notes,
        networks=describe_networks(evaluation, index, plan) + (describe_start(told) if is_pair else ""),
        origin=origin,
        defaults=defaults,
        is_pair=is_pair,
        is_student=is_student,
        teacher_guidance=recipe["guidance_scale"] if is_student and is_guided else 1,
        classes=data["classes"],
        label=shown,
        is_measured=is_measured,
        unmeasured=UNMEASURED,
        evaluate=evaluation_command(f"runs/{evaluation['model']}", told),
        **(measured_parts(evaluation, title, columns) if is_measured else {}),
        images=describe_training_images(evaluation, changes),
        cost=describe_cost(evaluation),
        recipe=recipe_rows(told, changes),
        command=training_command(told, changes, evaluation["model"]),
    ).content


def record_training(folder: Path, start: Start, **facts: Any) -> None:
    """Write training.json: what a training did, and the published model that it started from, or else learned from.

    Args:
        folder: Folder of the model.
        start: The models that the training was told of.
        facts: The rest of the record.
    """
    known = map(Origin.of_model, (start.student, start.pretrained_model_name_or_path, start.teacher))
    base = next((origin for origin in known if origin is not None), None)
    record = facts | {"base": base and base.to_json()}
    (folder / TRAINING).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_first_card(folder: Path, pipeline: DualRatePipeline, images: int | None, repo_id: str | None) -> Path:
    """Write the card of a model that was just trained, unless one lies there that has figures or that somebody wrote.

    Args:
        folder: Folder of the model, with its configuration.json and training.json.
        pipeline: The model.
        images: Number of images that it was trained on, where that is known.
        repo_id: Repository on the Hub that it will be loaded from; `None` for none.

    Returns:
        The card's path.
    """
    card = folder / CARD
    if card.is_file() and UNMEASURED not in card.read_text(encoding="utf-8"):
        return card
    told, trained = (read_json(folder / name) for name in (FILE, TRAINING))
    pictures = sorted(folder.glob("samples/*.png"))
    text = make_card(
        describe_unmeasured(pipeline, folder.resolve().name, told, trained, images),
        read_json(folder / "model_index.json"),
        {},
        presets=None,
        source=repo_id,
        picture=pictures[-1].relative_to(folder).as_posix() if pictures else None,
        origin=describe_origin(folder),
    )
    card.write_text(text + "\n", encoding="utf-8")
    return card
