"""Would a person know the drawings? Pages for a viewer, where half of the texts are wrong, and the count of the answers.

    python -m research.viewer pages model_cards/dualrate-emoji64/samples-seen.png --judge 1 --output_dir runs/viewer/pair-1
    python -m research.viewer count runs/viewer/pair-1 --accepted 1 4 9

A viewer is a person or a large vision-language model. It sees the pages, twenty numbered drawings each, and `texts.txt`,
nothing else. It knows that half of the texts belong to other drawings of the list, and answers `QUESTION` for each
number. One viewer sees the pages of one picture: other pictures would tell it which texts are wrong. `count` takes the
numbers of its yeses, and writes them into `emoji64-viewer.json` by the places in the list.

    python -m research.viewer decode --output runs/drawings/samples-seen.png

makes the same picture of the drawings themselves, encoded and decoded: what a perfect network would reach.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from diffusers_dualrate.pictures import draw_grid
from research.picture import find_real

ROOT = Path(__file__).resolve().parents[1]
RECORD, DATA = ROOT / "research" / "emoji64-viewer.json", ROOT / "examples" / "data" / "emoji64"
QUESTION = "Would an ordinary person say that this drawing shows, or could well be, an emoji of that text?"
COLUMNS, GAP, SIDE = 10, 4, 128  # of the pictures that examples/evaluate.py draws of a list of prompts
ACROSS, DOWN, SHOWN, LINE = 5, 4, 210, 26  # of a page: drawings, the pixels of each, and those of its number


def read_prompts(name: str) -> list[str]:
    return (DATA / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def cut(picture: Image.Image, count: int) -> list[Image.Image]:
    """The drawings of a picture, without the names above them."""
    height = (picture.height - GAP) // -(-count // COLUMNS)
    corners = [(GAP + i % COLUMNS * (SIDE + GAP), (i // COLUMNS + 1) * height - SIDE) for i in range(count)]
    return [picture.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]


def mislead(prompts: list[str], seed: str) -> tuple[list[str], list[int], list[int]]:
    """The texts that a judge reads, the places whose text is another's, and the order in which the judge sees the places."""
    rng = random.Random(seed)
    wrong = rng.sample(range(len(prompts)), len(prompts) // 2)
    texts = list(prompts)
    for place, other in zip(wrong, [*wrong[1:], wrong[0]], strict=True):
        texts[place] = prompts[other]
    return texts, sorted(wrong), rng.sample(range(len(prompts)), len(prompts))


def list_of(picture: Path) -> str:
    """The list that a picture's name ends in; its folder is named for the model."""
    name = picture.stem.partition("-")[2]
    lists = sorted(path.stem for path in (DATA / "prompts").glob("*.txt"))
    if name not in lists:
        raise ValueError(f"A picture is named samples-LIST.png, with a list of {', '.join(lists)}, but got {picture}.")
    return name


def key_of(folder: Path) -> Path:
    """Which texts are wrong: beside the folder, so that no judge sees it."""
    return folder.with_name(f"{folder.name}.key.json")


def write_pages(picture: Path, judge: int, folder: Path) -> None:
    """Pages, texts and key of one judge."""
    name = list_of(picture)
    if not picture.is_file():
        raise ValueError(
            f"There is no picture {picture}: examples/evaluate.py draws it with --prompt_lists and --grid."
        )
    if folder.exists() or key_of(folder).exists():
        raise ValueError(f"{folder} has pages already: give --output_dir another name.")
    texts, wrong, order = mislead(read_prompts(name), f"{picture.parent.name} {name} {judge}")
    drawings, font = cut(Image.open(picture).convert("RGB"), len(texts)), ImageFont.load_default(18)
    folder.mkdir(parents=True)
    for first in range(0, len(order), ACROSS * DOWN):
        page = Image.new("RGB", (ACROSS * (SHOWN + LINE), DOWN * (SHOWN + 2 * LINE)), "white")
        for i, place in enumerate(order[first : first + ACROSS * DOWN]):
            left, top = i % ACROSS * (SHOWN + LINE), i // ACROSS * (SHOWN + 2 * LINE)
            ImageDraw.Draw(page).text((left, top), str(first + i + 1), "black", font)
            page.paste(drawings[place].resize((SHOWN, SHOWN), Image.Resampling.LANCZOS), (left, top + LINE))
        page.save(folder / f"{1 + first // (ACROSS * DOWN)}.png")
    lines = [f"{i}. {texts[place]}" for i, place in enumerate(order, 1)]
    (folder / "texts.txt").write_text("\n".join([QUESTION, "", *lines, ""]), encoding="utf-8")
    key = {"model": picture.parent.name, "list": name, "judge": judge, "wrong": wrong, "order": order}
    key_of(folder).write_text(json.dumps(key), encoding="utf-8")


def count(key: dict, accepted: list[int]) -> dict:
    """The record's row for the numbers that a judge accepted."""
    if strange := [number for number in accepted if not 1 <= number <= len(key["order"])]:
        raise ValueError(f"Drawings are numbered from 1 to {len(key['order'])}, but got {strange[0]}.")
    places, wrong = sorted(key["order"][number - 1] for number in set(accepted)), set(key["wrong"])
    return {name: key[name] for name in ("model", "list", "judge")} | {
        "right": len(key["order"]) - len(wrong),
        "right_accepted": [place for place in places if place not in wrong],
        "wrong": len(wrong),
        "wrong_accepted": [place for place in places if place in wrong],
    }


def enter(row: dict) -> None:
    """Put a row into the record, in place of the same judge's former one."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    names = ("model", "list", "judge")
    kept = [other for other in record["rows"] if [other[name] for name in names] != [row[name] for name in names]]
    record["rows"] = sorted([*kept, row], key=lambda row: [row[name] for name in names])
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def decode(model: Path, output: Path) -> None:
    """Draw the data's own emoji of a list, encoded and decoded by a model's autoencoder."""
    prompts = read_prompts(list_of(output))
    images = find_real(prompts)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    processor = VaeImageProcessor(vae_scale_factor=1)
    with torch.no_grad():
        pictures = processor.postprocess(vae(processor.preprocess(images)).sample)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(pictures, prompts, COLUMNS, SIDE, lines=2).save(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pages = commands.add_parser("pages", help="Write pages and texts for one judge.")
    pages.add_argument("picture", type=Path, help="Picture of a list of prompts: MODEL/samples-LIST.png.")
    pages.add_argument("--judge", type=int, default=1, help="It and the picture choose the wrong texts and the order.")
    pages.add_argument("--output_dir", type=Path, required=True)
    counted = commands.add_parser("count", help="Write what a judge accepted into the record.")
    counted.add_argument("folder", type=Path, help="What `pages` wrote.")
    counted.add_argument("--accepted", type=int, nargs="*", required=True, help="Numbers of the yeses.")
    decoded = commands.add_parser("decode", help="Draw the data's own emoji, encoded and decoded.")
    decoded.add_argument("--model", type=Path, default=ROOT / "model_cards" / "dualrate-emoji64")
    decoded.add_argument("--output", type=Path, required=True, help="FOLDER/samples-LIST.png.")
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    if args.command == "pages":
        write_pages(args.picture, args.judge, args.output_dir)
    elif args.command == "count":
        if not key_of(args.folder).is_file():
            raise ValueError(f"There is no {key_of(args.folder)}, which `pages` writes beside its folder.")
        row = count(json.loads(key_of(args.folder).read_text(encoding="utf-8")), args.accepted)
        enter(row)
        print(
            f"{len(row['right_accepted'])} of {row['right']} right and {len(row['wrong_accepted'])} of {row['wrong']} wrong texts accepted"
        )
    else:
        decode(args.model, args.output)


if __name__ == "__main__":
    main()
