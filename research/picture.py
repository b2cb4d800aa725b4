"""The pictures of the README: prompts as drawings, by the heavy network, the pair and the student, with what each costs.

    python -m research.picture
    python -m research.picture runs/quick 0000700

draws the same prompts from the same seeds by the released models with their own defaults, and writes
`docs/images/comparison.png` and, beside it, `comparison.json` with every figure in it. Times are process time on one
thread for batches of all prompts, the arms interleaved, the lower quartile over repeats; distances are those that each
model's `evaluation.json` holds. With a run of the preset `quick` and a step, its grid of that step gets
its classes' names and becomes `docs/images/quick.png`.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

import torch
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont

from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.flops import count_evaluations

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "comparison.png"
PAIR, STUDENT = (ROOT / "model_cards" / name for name in ("dualrate-emoji64", "dualrate-emoji64-distilled"))
PROMPTS = [  # the last three hold a style or words together that training never saw so
    *(
        "red apple, flat style",
        "sun with face",
        "fire engine",
        "four-thirty",
        "evergreen tree",
        "butterfly",
        "penguin",
    ),
    *("purple heart", "pig face", "kiwi fruit, blob style"),
]
SEED, REPEATS, ZOOM, GAP, LINE = 0, 12, 2, 6, 26


def sample(pipe: DualRatePipeline) -> tuple[list[Image.Image], float]:
    """One image of each prompt, and the process time in milliseconds per image."""
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]
    began = time.process_time()
    images = pipe(PROMPTS, generator=generators).images
    return images, 1000 * (time.process_time() - began) / len(PROMPTS)


def describe(pipe: DualRatePipeline, measured: dict) -> dict:
    """What a model's defaults evaluate, counted, and what was measured with them."""
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        sample(pipe)
    refreshes, steps = evaluations
    is_pair = pipe.context_encoder is not None
    return {
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
        f"distance {fd['mean']:.1f} ± {fd['std']:.1f}"
    )


def draw(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows of enlarged images, each over its caption, under their prompts."""
    side = rows[0][1][0].width * ZOOM
    font, small = ImageFont.load_default(17), ImageFont.load_default(11)
    height = LINE + len(rows) * (side + GAP + LINE) + GAP
    picture = Image.new("RGB", (len(PROMPTS) * (side + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(picture)
    for j, prompt in enumerate(PROMPTS):
        pen.text((GAP + j * (side + GAP), GAP), prompt, "black", small)
    for i, (caption, images) in enumerate(rows):
        top = LINE + GAP + i * (side + GAP + LINE)
        for j, image in enumerate(images):
            picture.paste(image.resize((side, side), Image.Resampling.LANCZOS), (GAP + j * (side + GAP), top))
        pen.text((GAP, top + side + 2), caption, "black", font)
    return picture


def find_real(prompts: Sequence[str]) -> list[Image.Image]:
    """The first drawing of each prompt, also of those held out, on the white that sampled images have.

    Raises:
        ValueError: If a prompt has no drawing.
    """
    found = {}
    for split in ("train", "test"):
        rows = load_dataset(str(ROOT / "examples" / "data" / "emoji64"), split=split)
        for i, captions in enumerate(rows["captions"]):
            for caption in captions[:2]:  # its name, with and without the style; another's keywords may be the same
                if caption in prompts and caption not in found:
                    found[caption] = rows[i]["image"].convert("RGBA")
    if unknown := [prompt for prompt in prompts if prompt not in found]:
        raise ValueError(f"The data have no drawing of {unknown[0]!r}.")
    white = Image.new("RGBA", found[prompts[0]].size, "white")
    return [Image.alpha_composite(white, found[prompt]).convert("RGB") for prompt in prompts]


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
    pair, student = map(DualRatePipeline.from_pretrained, (PAIR, STUDENT))
    own, of_student = (json.loads((path / "evaluation.json").read_text(encoding="utf-8")) for path in (PAIR, STUDENT))
    arms = {
        "heavy network alone": (pair.heavy_alone(), own["rivals"]["single_rate_heavy"]["samples"][0]),
        "Dual-Rate pair": (pair, own["samples"][0]),
        "its student": (student, of_student["samples"][0]),
    }
    pipes = {title: pipe for title, (pipe, _) in arms.items()}
    found, times, images = {}, {title: [] for title in pipes}, {}
    for title, (pipe, measured) in arms.items():
        pipe.set_progress_bar_config(disable=True)
        found[title] = describe(pipe, measured)
    for _ in range(REPEATS):
        for title, pipe in pipes.items():
            images[title], milliseconds = sample(pipe)
            times[title].append(milliseconds)
    for title, row in found.items():
        row["milliseconds"] = quantiles(times[title], n=4)[0]
    rows = [("drawings", find_real(PROMPTS))]
    rows += [(write_caption(title, row), images[title]) for title, row in found.items()]
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).quantize(256).save(PICTURE, optimize=True)
    record = {
        "command": "python -m research.picture",
        "prompts": PROMPTS,
        "first_seed": SEED,
        "batch": len(PROMPTS),
        "repeats": REPEATS,
        "hardware": f"{platform.machine()}, 1 thread, process time, lower quartile",
        "versions": {"torch": torch.__version__},
        "rows": found,
    }
    PICTURE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
