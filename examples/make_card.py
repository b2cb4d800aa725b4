"""Write a model's card from its measurement, and publish the model with it where that is asked for.

    python examples/make_card.py runs/quick
    python examples/make_card.py runs/quick --push_to_hub --hub_model_id you/quick

Every metric of the card comes from evaluation.json and model_index.json beside it, and what the training was told from
the configuration in the former. What a person has to say, such as intended use, weak points and sources, may be given in
notes.json; without it the card says what the records know. Nothing else enters, so a card can be made again at any time.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.flags import HelpFormatter


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="Model folders with evaluation.json, and notes.json if there is one."
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Publish each folder's model with its card.")
    parser.add_argument("--hub_model_id", help="Repository to publish in; default: the name of the folder.")
    args = parser.parse_args(argv)
    if args.hub_model_id and (not args.push_to_hub or len(args.folders) > 1):
        parser.error("argument --hub_model_id: it names the repository of one folder, with --push_to_hub")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

from diffusers_dualrate.cards import make_card
from diffusers_dualrate.commands import EVALUATION, GRID, evaluation_command
from diffusers_dualrate.configuration import FILE
from diffusers_dualrate.records import read_json
from diffusers_dualrate.repositories import CARD, claim_repository, describe_origin, upload_model

PRESETS, SHIPPED = Path(__file__).with_name("presets"), Path(__file__).parents[1] / "model_cards"


def read_measurement(folder):
    """The folder's evaluation.json.

    Raises:
        ValueError: If there is none; the message has the command that makes it. Also if no training left its record.
    """
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} has no {FILE}, which a training of this package leaves: a card is made of it. "
            f"Write {CARD} by hand for a model that was trained elsewhere."
        )
    if (folder / EVALUATION).is_file():
        return read_json(folder / EVALUATION)
    told = read_json(folder / FILE)
    raise ValueError(f"{folder} has no {EVALUATION}: measure it first, by {evaluation_command(folder, told)}")


def write_card(folder, source=None):
    """Makes a folder's card, for a model that is loaded by the name `source`."""
    evaluation, index, notes = read_measurement(folder), read_json(folder / "model_index.json"), folder / "notes.json"
    if source is None and folder.resolve().parent == SHIPPED:
        source = f"{SHIPPED.name}/{folder.resolve().name}"
    card = make_card(
        evaluation,
        index,
        read_json(notes) if notes.is_file() else {},
        presets=PRESETS,
        source=source,
        picture=GRID if (folder / GRID).is_file() else None,
        list_pictures=sorted(path.name for path in folder.glob(f"{Path(GRID).stem}-*.png")),
        origin=describe_origin(folder),
    )
    (folder / CARD).write_text(card + "\n", encoding="utf-8")
    print(f"The card is {folder / CARD}.")


def main(args):
    for folder in args.folders:
        read_measurement(folder)  # before a repository is made
        if not args.push_to_hub:
            write_card(folder)
            print(
                f"Publish it: python examples/make_card.py {folder} --push_to_hub --hub_model_id you/{folder.resolve().name}"
            )
            continue
        repo_id = claim_repository(args.hub_model_id or folder.resolve().name)
        write_card(folder, repo_id)
        print(f"The model is {upload_model(folder, repo_id)}.")
        print(f'Load it: DualRatePipeline.from_pretrained("{repo_id}")')


if __name__ == "__main__":
    main(ARGS)
