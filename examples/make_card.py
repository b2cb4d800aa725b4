"""Write a model's card from its measurement.

    python examples/make_card.py model_cards/dualrate-emoji32

Every figure of the card comes from evaluation.json and model_index.json beside it, and what a person has to say, intended
use, weak points, sources, from notes.json; its `arguments` are what the training was given beyond preset and data. Nothing
else enters, so a card can be made again at any time.
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card_template.md")
NOTES = ("license", "summary", "example_label", "intended_use", "training", "limits", "bias", "sources")
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
    parser.add_argument("folders", nargs="+", type=Path, help="Model folders with evaluation.json and notes.json.")
    return parser.parse_args(argv)


def percent(share):
    return f"{share:.0%}".replace("%", " %")


def is_share(name):
    return not name.startswith(("fd_", "fid_"))


def show(name, figure):
    """A figure over seeds: its mean, and its standard deviation where there are several."""
    digits = ".1%" if is_share(name) else ".3f"
    text = f"{figure['mean']:{digits}}"
    if figure["std"] is not None:
        text += f" ± {figure['std']:{digits}}"
    return text.replace("%", " %")


def describe_solver(way):
    solver = {"dpmsolver++": "DPM-Solver++"}.get(way["solver"], way["solver"])
    k = "" if way["num_context_steps"] is None else f", K = {way['num_context_steps']}"
    return f"{solver}, N = {way['num_inference_steps']}{k}"


def name_rival(key, rival, recipe):
    """What a model that stands beside is called: by its network, or by its name and its part in the training."""
    if key.startswith("single_rate_"):
        return f"{key.removeprefix('single_rate_')} network alone"
    for part, role in (("teacher", "its teacher"), ("student", "its start")):
        if Path(recipe.get(part) or "").name == rival["model"]:
            return f"{rival['model']}, {role}"
    return rival["model"]


def sample_rows(evaluation, title, columns):
    """Rows of the table of samples: this model, those it is compared with, the floor."""
    sources = [(title, evaluation)]
    recipe = evaluation["training"]["recipe"]
    sources += [(name_rival(key, rival, recipe), rival) for key, rival in evaluation["rivals"].items()]
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


def describe_images(evaluation):
    """The images that a training took, and for a student in what kind of step."""
    record, data = evaluation["training"], evaluation["data"]
    images = record["images_seen"]
    if record["recipe"].get("full_rollout"):
        text = f"{images:,} samples of its own, from noise alone"
    else:
        text = (
            f"{images:,} images, {images / data['images']:,.0f} passes over the {data['images']:,} of `{data['name']}`"
        )
    if phases := evaluation.get("images_by_phase"):
        text += f", {phases['auxiliary']:,} of them in steps of the auxiliary and {phases['student']:,} in steps of the student"
        if phases["pretraining"]:
            text += f", after {phases['pretraining']:,} of denoising"
    return f"{text}, with preset `{record['preset']}` and seed {record['seed']}."


def describe_cost(evaluation):
    """What the training took in FLOPs, beside the trainings of the models that are compared; empty where it is not known."""
    own, recipe = evaluation.get("training_flops"), evaluation["training"]["recipe"]
    if own is None:
        return ""
    text = f"The training itself took {own / 1e12:,.1f} TFLOP, forwards and backwards"
    others = [
        f"{name_rival(key, rival, recipe)}: {rival['training_flops'] / 1e12:,.1f}"
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


def make_card(evaluation: dict, index: dict, notes: dict) -> str:
    """The card's text.

    Raises:
        ValueError: If the notes lack a part, or the model that was evaluated had no training.json.
    """
    if missing := [name for name in NOTES if not notes.get(name) and name != "example_label"]:
        raise ValueError(f"notes.json lacks {', '.join(missing)}.")
    if evaluation["training"] is None:
        raise ValueError(
            "evaluation.json knows no training: put training.json beside the weights, and evaluate again."
        )
    parameters, record, data = evaluation["parameters"], evaluation["training"], evaluation["data"]
    is_pair, is_student = "context_encoder" in parameters, record["network"].startswith("distilled")
    n, k = index["num_inference_steps"], index["num_context_steps"]
    if is_pair:
        k = n if k is None else k
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
    script = {
        "pair": "train_dual_rate.py",
        "heavy": "train_single_rate.py",
        "light": "train_single_rate.py --network light",
    }
    command = [f"accelerate launch examples/{script.get(record['network'], 'distill.py')}"]
    command += [f"--preset examples/presets/{record['preset']}.json", data["arguments"], notes.get("arguments", "")]
    command += [f"--output_dir runs/{evaluation['model']}"]
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
    title = "this student" if is_student else "this pair" if is_pair else "this model"
    card_data = ModelCardData(
        license=notes["license"],
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*tags, "arxiv:2605.18190", *(["arxiv:2406.04103"] if is_student else [])],
        datasets=[data["name"]],
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
        teacher_guidance=record["recipe"]["guidance_scale"] if is_student else 1,
        classes=data["classes"],
        label=f'class_labels="{notes["example_label"]}"' if data["classes"] else "",
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
        recipe=[(name, json.dumps(value)) for name, value in record["recipe"].items()],
        command=" ".join(filter(None, command)),
    ).content


def main(args):
    for folder in args.folders:
        parts = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "model_index", "notes"))
        (folder / "README.md").write_text(make_card(*parts) + "\n")
        print(folder / "README.md")


if __name__ == "__main__":
    main(parse_args())
