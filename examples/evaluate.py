"""Measure a trained model on the data it was trained on, and write the figures into evaluation.json.

    python examples/evaluate.py --model model_cards/dualrate-emoji32 --heavy model_cards/single-rate-emoji32 \\
        --light runs/light-emoji32 --preset examples/presets/emoji32.json \\
        --dataset_name examples/data/emoji32 --label_column label --output model_cards/dualrate-emoji32/evaluation.json

Two facts. `v_loss`: the mean of (v − v̂)² on freshly augmented images with fixed noise, of the model, of the model with
its context dropped, and of the single-rate networks it is compared with. `class_of_nearest`: how often the training image
nearest to a sample, over the augmentation's shifts, carries the class that was asked for, beside the same figure for
freshly augmented images, which is as good as a perfect model would be.
"""

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.data import Augmentation, LabelledImages, load_images
from diffusers_dualrate.evaluation import nearest_training_image
from diffusers_dualrate.flops import block_multiply_adds, image_flops
from diffusers_dualrate.losses import denoising_loss, draw
from diffusers_dualrate.training import TrainablePair

# Far from the seeds that trainings use, so that no augmentation and no noise was seen before.
_FRESH_SEED = 1_000_003


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub repository or folder of the model to measure.")
    parser.add_argument("--heavy", help="Single-rate model of the encoder's shape, to compare with.")
    parser.add_argument("--light", help="Single-rate model of the denoiser's shape, to compare with.")
    parser.add_argument("--preset", required=True, help="JSON file the model was trained with.")
    parser.add_argument("--dataset_name")
    parser.add_argument("--train_data_dir")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--num_noises", type=int, default=4, help="Fresh augmentations and noises of each image.")
    parser.add_argument("--num_inference_steps", type=int, help="N; default: the model's.")
    parser.add_argument("--num_context_steps", type=int, help="K; default: the model's.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's.")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="evaluation.json")
    parser.add_argument("--grid", help="Where to write a picture of the first samples.")
    return parser.parse_args(argv)


def measure_v_loss(pipe, images, args, context_steps, drop_context=False):
    """Mean of (v − v̂)² over every image, freshly augmented, at stratified times with noise fixed by the seed."""
    scheduler = pipe.scheduler
    pair = TrainablePair(pipe.denoiser, pipe.context_encoder).eval()
    total, count = 0.0, args.num_noises * len(images)
    positions = [(epoch, index) for epoch in range(args.num_noises) for index in range(len(images))]
    name = "v-loss, context dropped" if drop_context else "v-loss"
    for first in tqdm(range(0, count, args.batch_size), desc=name):
        batch = [images[position] for position in positions[first : first + args.batch_size]]
        x = torch.stack([item["pixel_values"] for item in batch])
        labels = torch.stack([item["class_labels"] for item in batch]) if "class_labels" in batch[0] else None
        rows = range(first, first + len(batch))
        draws = draw(_FRESH_SEED + args.seed, 0, rows, x.shape[1:])
        # Times from a low-discrepancy sequence: far less spread for the same number of evaluations.
        draws.uniforms[:, 0] = torch.tensor([(row * (math.sqrt(5) - 1) / 2) % 1 for row in rows])
        with torch.no_grad():
            result = pair(
                denoising_loss,
                x,
                labels,
                draws,
                log_snr=lambda t: scheduler.log_snr(t * len(scheduler)),
                log_snr_rate=lambda t: scheduler.log_snr_rate(t * len(scheduler)),
                bias=0.0,
                context_steps=[context_steps],
                context_dropout=float(drop_context),
            )
        total += result.v_loss.double().sum().item()
    return total / count


def measure_class_of_nearest(generated, asked, images, args, translation):
    """Share of images whose nearest training image carries the class asked for."""
    black, white = (
        torch.stack([view[i]["pixel_values"] for i in range(len(view))])
        for view in (open_images(args, images, Augmentation(background=(level, level))) for level in (0, 255))
    )
    labels = torch.stack([images[i]["class_labels"] for i in range(len(images))])
    nearest = nearest_training_image(generated, black, white, translation)
    return (labels[nearest] == asked).double().mean().item()


def open_images(args, like, augmentation):
    """The data set at the size of `like`, augmented in its own way."""
    dataset = load_images(
        args.dataset_name, args.train_data_dir, image_column=args.image_column, label_column=args.label_column
    )
    return LabelledImages(
        dataset,
        like if isinstance(like, int) else (like.height, like.width),
        image_column=args.image_column,
        label_column=args.label_column,
        augmentation=augmentation,
        seed=_FRESH_SEED + args.seed,
    )


def sample(pipe, labels, args, steps):
    """Sample one image for each label, image i from seed i."""
    generated = []
    for first in range(0, len(labels), args.batch_size):
        chunk = labels[first : first + args.batch_size]
        generators = [torch.Generator().manual_seed(_FRESH_SEED + args.seed + first + i) for i in range(len(chunk))]
        pipe.set_progress_bar_config(desc=f"samples {first + 1} to {first + len(chunk)} of {len(labels)}")
        generated.append(pipe(chunk, generator=generators, output_type="latent", **steps).images)
    return torch.cat(generated).clamp(-1, 1)


def environment():
    """What the figures were measured with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or None,
        "versions": {name: version(name) for name in ("diffusers-dualrate", "diffusers", "torch", "numpy")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
    }


def main(args):
    recipe = json.loads(Path(args.preset).read_text())["training"]
    pipe = DualRatePipeline.from_pretrained(args.model)
    images = open_images(args, pipe.denoiser.config.sample_size, Augmentation(**recipe["augmentation"]))
    n = args.num_inference_steps or pipe.config.num_inference_steps
    k = None if pipe.context_encoder is None else args.num_context_steps or pipe.config.num_context_steps or n
    guidance_scale = args.guidance_scale or (pipe.config.guidance_scale if images.num_classes else 1.0)
    steps = {"num_inference_steps": n, "num_context_steps": k, "guidance_scale": guidance_scale}
    counts = {"num_inference_steps": n, "num_context_steps": k or 0}
    report = {
        "model": Path(args.model).name,
        **steps,
        "flops": image_flops(pipe.denoiser, pipe.context_encoder, **counts),
        "flops_with_guidance": image_flops(pipe.denoiser, pipe.context_encoder, **counts, guided=guidance_scale > 1),
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in pipe.components.items()
            if isinstance(network, torch.nn.Module)
        },
        "block_multiply_adds": {
            name: block_multiply_adds(network)
            for name, network in pipe.components.items()
            if isinstance(network, torch.nn.Module)
        },
        "data": {"name": Path(args.dataset_name or args.train_data_dir).name, "images": len(images)},
        "training": training_record(args.model),
        "rivals": {},
    }

    v_loss = {"images": args.num_noises * len(images), "model": measure_v_loss(pipe, images, args, k or 1)}
    if pipe.context_encoder is not None:
        v_loss["context_dropped"] = measure_v_loss(pipe, images, args, k, drop_context=True)
    for name in ("heavy", "light"):
        if getattr(args, name):
            rival = DualRatePipeline.from_pretrained(getattr(args, name))
            report["rivals"][f"single_rate_{name}"] = training_record(getattr(args, name))
            v_loss[f"single_rate_{name}"] = measure_v_loss(rival, images, args, 1)
    if args.heavy and args.light:
        gap = v_loss["single_rate_light"] - v_loss["single_rate_heavy"]
        v_loss["share_of_gap_recovered"] = (v_loss["single_rate_light"] - v_loss["model"]) / gap
    report["v_loss"] = v_loss

    if images.num_classes:
        # Classes in proportion to the data, samples and fresh images alike.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_FRESH_SEED + args.seed))
        chosen = order.repeat(-(-args.num_samples // len(images)))[: args.num_samples].tolist()
        fresh = [images[args.num_noises, i] for i in chosen]  # an augmentation that v-loss did not use
        asked = torch.stack([item["class_labels"] for item in fresh])
        generated = sample(pipe, asked.tolist(), args, steps)
        translation = recipe["augmentation"].get("translation", 0)
        fresh = torch.stack([item["pixel_values"] for item in fresh])
        report["class_of_nearest"] = {
            "samples": args.num_samples,
            "model": measure_class_of_nearest(generated, asked, images, args, translation),
            "fresh_augmented_images": measure_class_of_nearest(fresh, asked, images, args, translation),
        }
        if args.grid:
            columns = min(16, len(generated))
            rows = min(4, len(generated) // columns)
            pictures = pipe.image_processor.postprocess(generated[: rows * columns], output_type="pil")
            make_image_grid(pictures, rows=rows, cols=columns, resize=64).save(args.grid)

    report |= {"seed": args.seed, **environment()}
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return report


def training_record(model):
    """What the training wrote about itself beside the weights, where it is at hand."""
    record = Path(model) / "training.json"
    return json.loads(record.read_text()) if record.is_file() else None


if __name__ == "__main__":
    main(parse_args())
