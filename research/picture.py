"""The pictures of the README: real images, the heavy network, the pair and the student, with what each costs.

    python -m research.picture
    python -m research.picture runs/quick 0000700

draws the same classes from the same seeds by every released model with its own defaults, and writes
`docs/images/comparison.png` and, beside it, `comparison.json` with every figure in it. Times are process time on one
thread for batches of all classes, the arms interleaved, the lower quartile over repeats; distances are those that each
model's `evaluation.json` holds. With a run of the preset `quick` and a step, its grid of that step gets
its classes' names and becomes `docs/images/quick.png`.
"""

import json
import platform
import sys
import time
from pathlib import Path
from statistics import quantiles

import torch
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont

from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.flops import count_evaluations

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "comparison.png"
MODELS = {
    "heavy network alone": "single-rate-emoji32",
    "Dual-Rate pair": "dualrate-emoji32",
    "Dual-Rate pair, distilled": "dualrate-emoji32-distilled",
}
CLASSES = [
    *("heart", "face-affection", "food-fruit", "flag", "time", "geometric", "sky & weather", "keycap", "animal-bird"),
    "place-building",
]
SEED, REPEATS, ZOOM, GAP, LINE = 0, 12, 3, 6, 26


def sample(pipe: DualRatePipeline) -> tuple[list[Image.Image], float]:
    """One image of each class, and the process time in milliseconds per image."""
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(CLASSES))]
    began = time.process_time()
    images = pipe(class_labels=CLASSES, generator=generators).images
    return images, 1000 * (time.process_time() - began) / len(CLASSES)


def describe(pipe: DualRatePipeline, name: str) -> dict:
    """What a model's defaults evaluate, counted, and what was measured with them."""
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        sample(pipe)
    refreshes, steps = evaluations
    is_pair = pipe.context_encoder is not None
    measured = json.loads((ROOT / "model_cards" / name / "evaluation.json").read_text(encoding="utf-8"))["samples"][0]
    return {
        "model": name,
        "heavy": refreshes if is_pair else steps,
        "light": steps if is_pair else 0,
        "gflop": measured["flops_with_guidance"] / 1e9,
        "fd_local_500": measured["fd_local_500"],
    }


def write_caption(title: str, row: dict) -> str:
    """One line: the way to sample, its time, evaluations and distance."""
    light = f" + {row['light']} light" if row["light"] else ""
    fd = row["fd_local_500"]
    return (
        f"{title}: {row['milliseconds']:.0f} ms per image, {row['heavy']} heavy{light} evaluations, "
        f"distance {fd['mean']:.2f} ± {fd['std']:.2f}"
    )


def draw(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows of enlarged images, each over its caption."""
    side = rows[0][1][0].width * ZOOM
    font = ImageFont.load_default(17)
    height = len(rows) * (side + GAP + LINE) + GAP
    picture = Image.new("RGB", (len(CLASSES) * (side + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(picture)
    for i, (caption, images) in enumerate(rows):
        top = GAP + i * (side + GAP + LINE)
        for j, image in enumerate(images):
            picture.paste(image.resize((side, side), Image.Resampling.LANCZOS), (GAP + j * (side + GAP), top))
        pen.text((GAP, top + side + 2), caption, "black", font)
    return picture


def find_real() -> list[Image.Image]:
    """The first image of each class in the training data, on the white that sampled images have."""
    rows = load_dataset(str(ROOT / "examples" / "data" / "emoji32"), split="train")
    names = rows.features["label"].names
    labels = rows["label"]
    images = [rows[list(labels).index(names.index(name))]["image"].convert("RGBA") for name in CLASSES]
    white = Image.new("RGBA", images[0].size, "white")
    return [Image.alpha_composite(white, image).convert("RGB") for image in images]


def label_grid(run: Path, step: str) -> Image.Image:
    """A run's grid of samples, eight classes of four images each, enlarged and with the classes' names."""
    names = json.loads((run / "model_index.json").read_text(encoding="utf-8"))["id2label"]
    grid = Image.open(run / "samples" / f"{step}.png")
    small, shown, line, each = grid.width // 8, grid.width // 4, 18, 4
    block = each * (shown + GAP)
    picture = Image.new("RGB", (2 * (block + GAP), 4 * (shown + line + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for i in range(8):
        row, column = divmod(i, 2)
        left, top = GAP + column * (block + GAP), row * (shown + line + GAP)
        pen.text((left, top + 1), names[str(i)], "black", ImageFont.load_default(13))
        for j in range(each):
            x, y = (column * each + j) * small, row * small
            image = grid.crop((x, y, x + small, y + small)).resize((shown, shown), Image.Resampling.LANCZOS)
            picture.paste(image, (left + j * (shown + GAP), top + line))
    return picture


def main(run: str | None = None, step: str | None = None):
    if run is not None:
        label_grid(Path(run), step).quantize(256).save(PICTURE.with_name("quick.png"), optimize=True)
        return
    torch.set_num_threads(1)
    pipes = {title: DualRatePipeline.from_pretrained(ROOT / "model_cards" / name) for title, name in MODELS.items()}
    found, times, images = {}, {title: [] for title in pipes}, {}
    for title, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        found[title] = describe(pipe, MODELS[title])
    for _ in range(REPEATS):
        for title, pipe in pipes.items():
            images[title], milliseconds = sample(pipe)
            times[title].append(milliseconds)
    for title, row in found.items():
        row["milliseconds"] = quantiles(times[title], n=4)[0]
    rows = [("real images", find_real())]
    rows += [(write_caption(title, row), images[title]) for title, row in found.items()]
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).quantize(256).save(PICTURE, optimize=True)
    record = {
        "command": "python -m research.picture",
        "classes": CLASSES,
        "first_seed": SEED,
        "batch": len(CLASSES),
        "repeats": REPEATS,
        "hardware": f"{platform.machine()}, 1 thread, process time, lower quartile",
        "versions": {"torch": torch.__version__},
        "rows": found,
    }
    PICTURE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
