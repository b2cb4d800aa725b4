"""The figures of an evaluation.json as rows of tables, for cards and for whoever measures."""

from collections.abc import Iterator
from pathlib import Path

LEGEND = {
    "fd_local": "*fd_local*: Fréchet distance in the features of a small classifier of this data, scaled to mean variance 1 on "
    "the reference; it is comparable with itself only, at equal count.",
    "fd_dinov2": "*fd_dinov2*: Fréchet distance in DINOv2's features from the images of the data as they are, not augmented.",
    "fid": "*fid*: Fréchet distance in Inception's features from the images of the data as they are, not augmented.",
    "precision": "*precision*, *recall*: share of samples within the manifold of real images, and the reverse, by three neighbours.",
    "class_accuracy": "*class_accuracy*: how often that classifier sees the class that was asked for.",
    "class_of_nearest": "*class_of_nearest*: how often the nearest training image, over shifts and backgrounds, has the class that "
    "was asked for.",
    "caption_of_nearest_text": "*caption_of_nearest_text*: how often the caption nearest to a sample, of all in the data, is one of "
    "the same image as what was asked for, to a contrastive pair of encoders.",
    "caption_of_nearest": "*caption_of_nearest*: how often the nearest training image, over shifts and backgrounds, has the caption "
    "that was asked for.",
    "image_text_score": "*image_text_score*: mean cosine of a sample and its prompt, to that pair; 1 is the most.",
}
"""What the metrics mean, by the beginnings of their names; the first that fits counts."""

PROMPT_METRICS = {
    "prompt_of_nearest_prompt": "recognised in the list",
    "caption_of_nearest_text": "among all captions",
    "caption_of_nearest": "by the nearest training image",
    "image_text_score": "score",
}
"""Metrics of a list of prompts, and how tables call them."""


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def is_share(name: str) -> bool:
    return not name.startswith(("fd_", "fid_", "image_text_score"))


def show(name: str, metric: dict) -> str:
    """A metric over seeds: its mean, and its standard deviation where there are several."""
    digits = ".1%" if is_share(name) else ".3f"
    text = f"{metric['mean']:{digits}}"
    if metric["std"] is not None:
        text += f" ± {metric['std']:{digits}}"
    return text.replace("%", " %")


def describe_solver(way: dict) -> str:
    solver = {"dpmsolver++": "DPM-Solver++"}.get(way["solver"], way["solver"])
    k = "" if way["num_context_steps"] is None else f", K = {way['num_context_steps']}"
    return f"{solver}, N = {way['num_inference_steps']}{k}"


def name_rival(key: str, rival: dict, start: dict) -> str:
    """What a model that stands beside is called: by its network, or by its name and its part in the training."""
    if key.startswith("single_rate_"):
        return f"{key.removeprefix('single_rate_')} network alone"
    for part, role in (("teacher", "its teacher"), ("student", "its start")):
        if Path(start.get(part) or "").name == rival["model"]:
            return f"{rival['model']}, {role}"
    return rival["model"]


def sample_rows(evaluation: dict, title: str, columns: list[str]) -> Iterator[list[str]]:
    """Rows of the table of samples: this model, those it is compared with, the floor."""
    sources = [(title, evaluation)]
    start = (evaluation["configuration"] or {}).get("start", {})
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


def v_loss_rows(evaluation: dict) -> Iterator[tuple[str, str]]:
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


def prompt_rows(evaluation: dict, title: str) -> Iterator[list[str]]:
    """Rows of the table of prompts: the share that is recognised in each list, of this model, those beside it, real images.

    A row has list, how, share among the list, among all captions, and by the nearest training image; score; seconds of an image.
    """
    start = (evaluation["configuration"] or {}).get("start", {})
    sources = [(title, evaluation)]
    sources += [(name_rival(key, rival, start), rival) for key, rival in evaluation["rivals"].items()]

    def cells(found: dict) -> list[str]:
        kept = {key.rpartition("_")[0]: value for key, value in found.items()}
        known = {
            name: value if isinstance(value, dict) else {"mean": value, "std": None} for name, value in kept.items()
        }
        return [show(name, known[name]) if name in known else "" for name in PROMPT_METRICS]

    for name, real in evaluation.get("prompt_lists", {}).items():
        for source, model in sources:
            for way in model["samples"]:
                if found := way.get("prompts", {}).get(name):
                    seconds = f"{found['seconds_per_image']:.2f}"
                    yield [f"{name}, {found['prompts']}", f"{source}, {describe_solver(way)}", *cells(found), seconds]
        if real is not None:
            yield [f"{name}, {real['images']}", "real images", *cells(real), ""]
