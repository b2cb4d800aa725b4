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
    solver = {"ancestral": "ancestral", "dpmsolver++": "DPM-Solver++"}[way["solver"]]
    k = "" if way["num_context_steps"] is None else f", K = {way['num_context_steps']}"
    return f"{solver}, N = {way['num_inference_steps']}{k}"


def sample_rows(evaluation, columns):
    """Rows of the table of samples: this model, the networks it is compared with, the floor."""
    sources = [("this pair" if "context_encoder" in evaluation["parameters"] else "this model", evaluation["samples"])]
    for name, rival in evaluation["rivals"].items():
        sources.append((f"{name.removeprefix('single_rate_')} network alone", rival["samples"]))
    for source, ways in sources:
        for way in ways:
            heavy, light = way["evaluations"]["context_encoder"], way["evaluations"]["denoiser"]
            if heavy == 0 and "light" not in source:  # the network of a single-rate model is the heavy one
                heavy, light = light, 0
            cells = [show(name, way[name]) if name in way else "" for name in columns]
            yield [f"{source}, {describe_solver(way)}", f"{heavy} + {light}", f"{way['flops'] / 1e9:.2f}", *cells]
    yield ["floor", "", "", *(show(name, evaluation["floor"][name]) for name in columns)]


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
        ValueError: If the notes lack a part.
    """
    if missing := [name for name in NOTES if not notes.get(name) and name != "example_label"]:
        raise ValueError(f"notes.json lacks {', '.join(missing)}.")
    parameters, record, data = evaluation["parameters"], evaluation["training"], evaluation["data"]
    is_pair = "context_encoder" in parameters
    n, k = index["num_inference_steps"], index["num_context_steps"]
    if is_pair:
        networks = (
            f"A context encoder of {parameters['context_encoder']:,} parameters runs {k} times per image, and a denoiser of "
            f"{parameters['denoiser']:,} parameters {n} times."
        )
    else:
        networks = f"One network of {parameters['denoiser']:,} parameters runs at every step."
    columns = list(evaluation["floor"])
    used = [text for name, text in LEGEND.items() if any(column.startswith(name) for column in columns)]
    images = record["images_seen"]
    training = (
        f"{images:,} images, {images / data['images']:,.0f} passes over the {data['images']:,} of `{data['name']}`, with preset "
        f"`{record['preset']}` and seed {record['seed']}. Recipe:"
    )
    script = {
        "pair": "train_dual_rate.py",
        "heavy": "train_single_rate.py",
        "light": "train_single_rate.py --network light",
    }
    command = [f"accelerate launch examples/{script.get(record['network'], 'distill.py')}"]
    command += [f"--preset examples/presets/{record['preset']}.json", data["arguments"], notes.get("arguments", "")]
    command += [f"--output_dir runs/{evaluation['model']}"]
    metrics = ["mse", "accuracy", *(["fid"] if any(column.startswith("fid_") for column in columns) else [])]
    tags = ["dual-rate-diffusion", "class-conditional" if data["classes"] else "unconditional", "pixel-space"]
    share = evaluation["v_loss"].get("share_of_gap_recovered")
    card_data = ModelCardData(
        license=notes["license"],
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*tags, "arxiv:2605.18190"],
        datasets=[data["name"]],
        metrics=metrics,
    )
    return ModelCard.from_template(
        card_data,
        template_path=TEMPLATE,
        model=evaluation["model"],
        notes=notes,
        index=index,
        networks=networks,
        is_pair=is_pair,
        classes=data["classes"],
        label=f'class_labels="{notes["example_label"]}"' if data["classes"] else "",
        hardware=evaluation["hardware"],
        v_loss_images=f"{evaluation['v_loss']['images']:,}",
        v_loss=list(v_loss_rows(evaluation)),
        share=None if share is None else percent(share),
        floor=f"real images ({data['floor']})",
        columns=columns,
        rows=list(sample_rows(evaluation, columns)),
        legend=" ".join(used),
        training=training,
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
