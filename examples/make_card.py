"""Write a model's card from its measurement.

    python examples/make_card.py model_cards/dualrate-emoji32

Every metric of the card comes from evaluation.json and model_index.json beside it, and what the training was told from
the configuration in the former. What a person has to say, such as intended use, weak points and sources, may be given in
notes.json; without it the card says what the records know. Nothing else enters, so a card can be made again at any time.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers_dualrate.configuration import FILE, Configuration, told_in
from diffusers_dualrate.records import read_json

TEMPLATE, PRESETS = Path(__file__).with_name("card_template.md"), Path(__file__).with_name("presets")
NOTES = ("license", "summary", "example_label", "intended_use", "training", "limits", "bias", "sources")
# What a run is told and its repetition need not be: where it goes on from, and what says nothing of the model.
_PASSING = ("resume_from_checkpoint", "checkpoints_total_limit", "images_per_process", "push_to_hub", "hub_model_id")
_PASSING += ("output_dir", "cache_dir", "report_to", "checkpointing_steps", "validation_steps", "mixed_precision")
LEGEND = {
    "fd_local": "*fd_local*: Fréchet distance in the features of a small classifier of this data, scaled to mean variance 1 on "
    "the reference; it is comparable with itself only, at equal count.",
    "fd_dinov2": "*fd_dinov2*: Fréchet distance in DINOv2's features from the images of the data as they are, not augmented.",
    "fid": "*fid*: Fréchet distance in Inception's features from the images of the data as they are, not augmented.",
    "precision": "*precision*, *recall*: share of samples within the manifold of real images, and the reverse, by three neighbours.",
    "class_accuracy": "*class_accuracy*: how often that classifier sees the class that was asked for.",
    "class_of_nearest": "*class_of_nearest*: how often the nearest training image, over shifts and backgrounds, has the class that "
    "was asked for.",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="Model folders with evaluation.json, and notes.json if there is one."
    )
    return parser.parse_args(argv)


def percent(share):
    return f"{share:.0%}".replace("%", " %")


def is_share(name):
    return not name.startswith(("fd_", "fid_"))


def show(name, metric):
    """A metric over seeds: its mean, and its standard deviation where there are several."""
    digits = ".1%" if is_share(name) else ".3f"
    text = f"{metric['mean']:{digits}}"
    if metric["std"] is not None:
        text += f" ± {metric['std']:{digits}}"
    return text.replace("%", " %")


def describe_solver(way):
    solver = {"dpmsolver++": "DPM-Solver++"}.get(way["solver"], way["solver"])
    k = "" if way["num_context_steps"] is None else f", K = {way['num_context_steps']}"
    return f"{solver}, N = {way['num_inference_steps']}{k}"


def name_rival(key, rival, start):
    """What a model that stands beside is called: by its network, or by its name and its part in the training."""
    if key.startswith("single_rate_"):
        return f"{key.removeprefix('single_rate_')} network alone"
    for part, role in (("teacher", "its teacher"), ("student", "its start")):
        if Path(start[part] or "").name == rival["model"]:
            return f"{rival['model']}, {role}"
    return rival["model"]


def sample_rows(evaluation, title, columns):
    """Rows of the table of samples: this model, those it is compared with, the floor."""
    sources = [(title, evaluation)]
    start = evaluation["configuration"]["start"]
    sources += [(name_rival(key, rival, start), rival) for key, rival in evaluation["rivals"].items()]
    for source, model in sources:
        is_light = bool(model["training"]) and model["training"]["network"] == "light"
        for way in model["samples"]:
            heavy, light = way["evaluations"]["context_encoder"], way["evaluations"]["denoiser"]
            if heavy == 0 and not is_light:  # the network of a single-rate model is the heavy one
                heavy, light = light, 0
            guidance = f"{way['guidance_scale']:g}" if way["guidance_scale"] > 1 else "none"
            cost = [f"{heavy} + {light}", guidance, f"{way['flops_with_guidance'] / 1e9:.2f}"]
            cells = [show(name, way[name]) if name in way else "" for name in columns]
            yield [f"{source}, {describe_solver(way)}", *cost, *cells]
    yield ["floor", "", "", "", *(show(name, evaluation["floor"][name]) for name in columns)]


def told_to(evaluation):
    """All that the training was told, without what it found by itself."""
    return told_in(evaluation["configuration"])


def describe_images(evaluation):
    """The images that a training took, and for a student in what kind of step."""
    told, data = told_to(evaluation), evaluation["data"]
    images = evaluation["training"]["images_seen"]
    if told.get("distillation", {}).get("full_rollout"):
        text = f"{images:,} samples of its own, from noise alone"
    else:
        text = (
            f"{images:,} images, {images / data['images']:,.0f} passes over the {data['images']:,} of `{data['name']}`"
        )
    if phases := evaluation.get("images_by_phase"):
        text += f", {phases['auxiliary']:,} of them in steps of the auxiliary and {phases['student']:,} in steps of the student"
        if phases["pretraining"]:
            text += f", after {phases['pretraining']:,} of denoising"
    changed = "" if is_preset(told) else ", changed as below,"
    return f"{text}, with preset `{told['preset']}`{changed} and seed {told['options']['seed']}."


def describe_cost(evaluation):
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


def v_loss_rows(evaluation):
    is_pair = "context_encoder" in evaluation["parameters"]
    titles = {
        "model": f"this pair (K = {evaluation['samples'][0]['num_context_steps']})" if is_pair else "this model",
        "context_dropped": "this pair, its context dropped",
        "single_rate_light": "light network alone, of the denoiser's shape",
        "single_rate_heavy": "heavy network alone, of the encoder's shape",
    }
    for name, title in titles.items():
        if name in evaluation["v_loss"]:
            rival = evaluation["rivals"].get(name)
            seen = f", trained on {rival['training']['images_seen']:,} images" if rival and rival["training"] else ""
            yield title + seen, f"{evaluation['v_loss'][name]:.4f}"


def is_preset(told):
    """Whether a run's networks and recipe are those of the shipped preset that it names."""
    path = PRESETS / f"{told['preset']}.json"
    if not path.is_file():
        return False
    sections = read_json(path)
    made = {"context_encoder", "denoiser", "scheduler", *({"training", "distillation"} & told.keys())}
    if not made <= sections.keys():
        return False
    sections["training"] = {
        name: value for name, value in sections["training"].items() if name in told.get("training", {})
    }
    shipped = Configuration.from_json(told | {name: sections[name] for name in made})
    trained = Configuration.from_json(told)
    classes = trained.networks.denoiser["num_classes"]
    return shipped.with_classes(classes).to_json() == trained.to_json()


def list_flags(told):
    """What a run was told beside preset and recipe, as flags: all that is not the default."""
    defaults = dataclasses.asdict(Configuration.from_json(told))
    plain = {name: type(getattr(Configuration.from_json(told), name)) for name in ("start", "data", "options")}
    for section, kind in plain.items():
        standard = {field.name: field.default for field in dataclasses.fields(kind)}
        for name, value in defaults[section].items():
            if name in _PASSING or value in (standard[name], None, False):
                continue
            yield f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"


def describe_command(evaluation):
    """The command that trains the model again."""
    told = told_to(evaluation)
    preset = told["preset"] if is_preset(told) else FILE  # which lies beside the card
    parts = [f"accelerate launch examples/{told['script']}.py --preset {preset}", *list_flags(told)]
    return " ".join([*parts, f"--output_dir runs/{evaluation['model']}"])


def complete_notes(notes, evaluation):
    """The notes, with what the records know in place of what nobody has said.

    Raises:
        ValueError: If there is something else in them.
    """
    if unknown := sorted(notes.keys() - set(NOTES)):
        raise ValueError(f"notes.json has no part {unknown[0]!r}; it may have {', '.join(NOTES)}.")
    data, told = evaluation["data"], evaluation["configuration"]
    size = told["denoiser"]["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    kind = {"pair": "A Dual-Rate pair", "distilled pair": "A Dual-Rate student of few steps"}.get(
        evaluation["training"]["network"], "A single-rate diffusion model"
    )
    classes = f" of {data['classes']} classes" if data["classes"] else ""
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


def make_card(evaluation: dict, index: dict, notes: dict) -> str:
    """The card's text.

    Raises:
        ValueError: If the notes have an unknown part, or the model that was evaluated has no record of its training.
    """
    if evaluation["training"] is None or evaluation["configuration"] is None:
        raise ValueError(
            f"evaluation.json knows no training: put {FILE} and training.json beside the weights, and evaluate again."
        )
    notes = complete_notes(notes, evaluation)
    parameters, record, data = evaluation["parameters"], evaluation["training"], evaluation["data"]
    told = evaluation["configuration"]
    recipe = told.get("training") or told["distillation"]
    is_pair, is_student = "context_encoder" in parameters, record["network"].startswith("distilled")
    n, k = index["num_inference_steps"], index["num_context_steps"]
    if is_pair:
        k = evaluation["samples"][0]["num_context_steps"]
        light = n - k if index.get("encoder_denoises") else n
        networks = (
            f"A context encoder of {parameters['context_encoder']:,} parameters runs {k} times per image, and a denoiser of "
            f"{parameters['denoiser']:,} parameters {light} times."
        )
    else:
        networks = f"One network of {parameters['denoiser']:,} parameters runs at every step."
    columns = list(evaluation["floor"])
    used = [text for name, text in LEGEND.items() if any(column.startswith(name) for column in columns)]
    if "held_out_accuracy" in (evaluation.get("classifier") or {}):
        used.append(
            f"That classifier knows {percent(evaluation['classifier']['held_out_accuracy'])} of the images held out from its own training."
        )
    v_loss = evaluation.get("v_loss", {})
    metrics = [
        *(["mse"] if v_loss else []),
        "accuracy",
        *(["fid"] if any(column.startswith("fid_") for column in columns) else []),
    ]
    tags = ["dual-rate-diffusion", "class-conditional" if data["classes"] else "unconditional", "pixel-space"]
    share = v_loss.get("share_of_gap_recovered")
    defaults = f"N = {n}{f', K = {k}' if is_pair else ''}"
    if data["classes"]:
        defaults += f" and guidance {index['guidance_scale']}"
    label = notes["example_label"] or next(iter((index["id2label"] or {}).values()), 0)
    title = "this student" if is_student else "this pair" if is_pair else "this model"
    card_data = ModelCardData(
        license=notes["license"],
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*tags, "arxiv:2605.18190", *(["arxiv:2406.04103"] if is_student else [])],
        datasets=[data["hub"]] if data["hub"] else None,
        metrics=metrics,
    )
    return ModelCard.from_template(
        card_data,
        template_path=TEMPLATE,
        model=evaluation["model"],
        notes=notes,
        networks=networks,
        defaults=defaults,
        is_pair=is_pair,
        is_student=is_student,
        teacher_guidance=recipe["guidance_scale"] if is_student else 1,
        classes=data["classes"],
        label=f"class_labels={json.dumps(label)}" if data["classes"] else "",
        hardware=evaluation["hardware"],
        v_loss_images=f"{v_loss['images']:,}" if v_loss else "",
        v_loss=list(v_loss_rows(evaluation)) if v_loss else [],
        share=None if share is None else percent(share),
        floor=f"real images ({data['floor']})",
        columns=columns,
        rows=list(sample_rows(evaluation, title, columns)),
        legend=" ".join(used),
        images=describe_images(evaluation),
        cost=describe_cost(evaluation),
        recipe=[(name, json.dumps(value)) for name, value in recipe.items()],
        command=describe_command(evaluation),
    ).content


def main(args):
    for folder in args.folders:
        parts = [read_json(folder / f"{name}.json") for name in ("evaluation", "model_index")]
        notes = folder / "notes.json"
        card = make_card(*parts, read_json(notes) if notes.is_file() else {})
        (folder / "README.md").write_text(card + "\n", encoding="utf-8")
        print(folder / "README.md")


if __name__ == "__main__":
    main(parse_args())
