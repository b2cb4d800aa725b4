"""Train the small classifier whose features measure `fd_local`, on the data that a model is trained on.

    python examples/train_classifier.py --preset emoji32 --dataset_name examples/data/emoji32 --label_column label --output examples/classifiers/emoji32.safetensors

A share of the images is held out, and the accuracy on them printed and written into the file, beside the recipe. A few
minutes on one CPU core.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers_dualrate.decoding import MAX_IMAGE_PIXELS
from diffusers_dualrate.flags import HelpFormatter


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--preset", required=True, help="Preset, or configuration.json, of the models that will be measured."
    )
    parser.add_argument("--dataset_name", help="Data set on the Hub or in a local folder; or digits.")
    parser.add_argument("--train_data_dir", help="Folder of images; one sub-folder per class.")
    parser.add_argument("--image_column", default="image", help="Column of the images.")
    parser.add_argument("--label_column", required=True, help="Column of classes, 'label' for sub-folders.")
    parser.add_argument("--resolution", type=int, help="Side of the images; default: the preset's.")
    parser.add_argument(
        "--on_corrupt", choices=["raise", "skip"], default="raise", help="What an unreadable image does."
    )
    parser.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    parser.add_argument("--num_classes", type=int, help="Number of classes; default: those that the data set has.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    parser.add_argument(
        "--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="A larger image counts as unreadable."
    )
    parser.add_argument("--output", required=True, help="The .safetensors file to write.")
    parser.add_argument("--held_out", type=float, default=0.1, help="Share of the images that only the accuracy sees.")
    parser.add_argument("--max_train_steps", type=int, default=1500, help="Number of steps.")
    parser.add_argument("--train_batch_size", type=int, default=64, help="Images of a step.")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="Peak learning rate of AdamW.")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="Decoupled weight decay.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, order and augmentation.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import dataclasses
import shlex

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_dualrate.arguments import find_preset, read_preset, select
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.autoencoders import find_vae, open_vae
from diffusers_dualrate.commands import EVALUATION, GRID
from diffusers_dualrate.configuration import FILE, Data
from diffusers_dualrate.data import LabelledImages
from diffusers_dualrate.evaluation import ImageClassifier, file_hash
from diffusers_dualrate.folders import check_output_dir
from diffusers_dualrate.latents import compression_of
from diffusers_dualrate.processes import choose_threads
from diffusers_dualrate.ranges import LONGEST_SIDE, MOST_AT_ONCE, check_integer, check_number, check_output
from diffusers_dualrate.records import build
from diffusers_dualrate.sources import open_images

PRESETS = Path(__file__).with_name("presets")


def fetch(images: LabelledImages, epoch: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images [B, C, H, W] and labels [B] at some indices, as augmented in an epoch."""
    items = [images[epoch, index] for index in indices]
    return torch.stack([item["pixel_values"] for item in items]), torch.stack([item["class_labels"] for item in items])


@torch.no_grad()
def measure_accuracy(
    classifier: ImageClassifier, images: LabelledImages, indices: Sequence[int], batch_size: int, device: str
) -> float:
    """Share of images whose class is recognised, augmented as in epoch 0, which training does not see."""
    right = 0
    for first in range(0, len(indices), batch_size):
        x, labels = fetch(images, 0, indices[first : first + batch_size])
        right += (classifier(x.to(device)).argmax(1).cpu() == labels).sum().item()
    return right / len(indices)


def suggest(args: argparse.Namespace) -> str:
    """The command that measures a model, which the preset names where it is that of a run."""
    preset = Path(args.preset)
    folder = preset.parent if preset.name == FILE else Path("runs/model")
    data = select(args, Data)
    flags = [f"--{field.name} {shlex.quote(str(data[field.name]))}" for field in dataclasses.fields(Data)
             if field.name != "cache_dir" and data.get(field.name) not in (None, field.default)]  # fmt: skip
    files = ("classifier", Path(args.output)), ("output", folder / EVALUATION), ("grid", folder / GRID)
    flags += [f"--{flag} {shlex.quote(str(path))}" for flag, path in files]
    return " ".join([f"accelerate launch examples/evaluate.py --model {shlex.quote(str(folder))}", *flags])


def main(args: argparse.Namespace, open_images: Callable = open_images) -> dict[str, float]:
    if not 0 < args.held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {args.held_out}.")
    check_integer("max_train_steps", args.max_train_steps, least=1)
    check_integer("train_batch_size", args.train_batch_size, 1, MOST_AT_ONCE)
    if args.resolution is not None:
        check_integer("resolution", args.resolution, 1, LONGEST_SIDE)
    check_number("learning_rate", args.learning_rate, above=0, most=1)
    check_number("weight_decay", args.weight_decay, least=0)
    check_integer("seed", args.seed, least=0, most=2**63 - 1)
    if Path(args.output).suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors, got {args.output!r}.")
    check_output("--output", args.output)
    check_output_dir(Path(args.output).parent, args.train_data_dir)
    preset = read_preset(find_preset(args.preset, PRESETS), ("denoiser", "training"))
    size, channels = preset["denoiser"]["sample_size"], preset["denoiser"]["in_channels"]
    if Path(args.preset).name == FILE and find_vae(str(Path(args.preset).parent), in_model=True):
        vae = open_vae(str(Path(args.preset).parent), is_blueprint=True)  # the run learned latents
        sides = (size, size) if isinstance(size, int) else size
        size, channels = tuple(side * compression_of(vae) for side in sides), vae.config.in_channels
    images = open_images(
        Data(**select(args, Data)),
        size if args.resolution is None else args.resolution,
        channels=channels,
        augmentation=build(Augmentation, "augmentation", preset["training"].get("augmentation", {})),
        seed=args.seed,
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed)).tolist()
    num_held_out = round(args.held_out * len(order))
    if not 0 < num_held_out < len(order):
        raise ValueError(f"held_out={args.held_out} leaves nothing on one side of {len(order)} images.")
    held_out, seen = order[:num_held_out], order[num_held_out:]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    stride = max(1, min(images.height, images.width) // 16)
    classifier = ImageClassifier(images.channels, images.num_classes, stride=stride).to(device)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.99)
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_train_steps)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier.eval()(torch.zeros(1, images.channels, images.height, images.width, device=device))
    classifier.train()
    print(choose_threads(args.train_batch_size * counter.get_total_flops()))
    print(f"{sum(p.numel() for p in classifier.parameters()):,} parameters, {len(seen):,} images to learn from")

    progress = tqdm(range(1, args.max_train_steps + 1), unit="step")
    for step in progress:
        rows = torch.randint(len(seen), (args.train_batch_size,)).tolist()
        x, labels = fetch(images, step, [seen[row] for row in rows])
        loss = cross_entropy(classifier(x.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        if not loss.isfinite():
            raise ValueError(f"The training diverged at step {step}, and no file is written: lower --learning_rate.")
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

    classifier.eval()
    accuracy = measure_accuracy(classifier, images, held_out, args.train_batch_size, device)
    recipe = ("held_out", "max_train_steps", "train_batch_size", "learning_rate", "weight_decay", "seed")
    facts = {"held_out_images": num_held_out, "held_out_accuracy": accuracy}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    classifier.cpu().save(args.output, **facts, **{name: getattr(args, name) for name in recipe})
    print(f"accuracy on {num_held_out:,} images held out: {accuracy:.1%}")
    print(f"SHA-256: {file_hash(args.output)}")
    print(f"The classifier is {args.output}.")
    print(f"Measure a model of this data with it: {suggest(args)}")
    return facts


if __name__ == "__main__":
    main(ARGS)
