"""Rehearse a large run: the real networks of a preset, ten real steps on made-up images, a checkpoint gone on from.

    python -m research.rehearse --preset imagenet64 --output_dir /tmp/rehearsal

It makes shards of made-up images, trains a pair for half of the steps and saves a checkpoint. Another process goes on from
there. It prints the memory and the time that this took, and writes them to `rehearsal.json` beside what a whole run of the
preset needs on GPUs. That second part is arithmetic from counted FLOPs and parameters, and it names its assumptions.
"""

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_dual_rate
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.checkpoints import list_checkpoints
from diffusers_dualrate.configuration import Configuration
from diffusers_dualrate.data import load_images, undecoded
from diffusers_dualrate.flops import training_image_flops
from diffusers_dualrate.losses import denoising_loss, draw
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.processes import run_script
from diffusers_dualrate.streams import StreamedImages

PEAK = 989e12  # FLOP/s of an H100 SXM, dense bfloat16, as its maker states it
SHARE = 0.4  # of that peak which a training reaches: ASSUMED, not measured
MEMORY = 80e9  # bytes of one GPU
DISK = 5  # sizes of a checkpoint that two of them, the model and the images take, and some more
CLASSES = 10  # of made-up images, where a preset names no number
INTERVAL = 5000  # steps between checkpoints, as the commands of examples/README.md have it
# Bytes of a parameter: weight, gradient, DDP's copy of it, two moments of Adam, EMA; and the weight in bfloat16. A checkpoint
# holds the weight, the moments and the EMA.
HELD, SAVED = 4 * 6 + 2, 4 * 4

# What forks after this has everything imported, and has computed nothing.
PROCESSES = multiprocessing.get_context("fork")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet64", help="Name or file of a preset.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="A new folder for images, checkpoints and figures."
    )
    parser.add_argument("--train_batch_size", type=int, default=2, help="Images of a step.")
    parser.add_argument("--max_train_steps", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16")
    parser.add_argument("--plan", action="store_true", help="Only what needs no training: the arithmetic.")
    args = parser.parse_args(argv)
    if args.max_train_steps < 2:
        parser.error("argument --max_train_steps: a run that goes on needs at least 2")
    return args


def make_shards(folder: Path, size: int, num_classes: int, count: int = 256, shards: int = 4) -> None:
    """Write made-up images as Parquet shards, which `datasets` reads: smooth ones, whose files are as large as photographs'."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    classes = ClassLabel(names=[str(i) for i in range(num_classes)])
    for shard in range(shards):
        coarse = [rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8) for _ in range(count // shards)]
        images = [Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC) for pixels in coarse]
        rows = {"image": images, "label": rng.integers(0, num_classes, len(images)).tolist()}
        data = Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": classes}))
        data.to_parquet(str(folder / f"train-{shard:05}-of-{shards:05}.parquet"))


def time_stream(folder: Path, configuration: Configuration, count: int = 256) -> dict:
    """Images per second that one process reads, decodes and augments from shards, and microseconds of each part."""
    columns = {"label_column": "label"}
    dataset = load_images(str(folder), streaming=True, **columns)
    size, augmentation = configuration.networks.denoiser["sample_size"], configuration.recipe.augmentation
    images = StreamedImages(dataset, size, augmentation=augmentation, **columns)
    rows = undecoded(dataset, "image", "label").shuffle(seed=0, buffer_size=count)
    times = [time.thread_time()]
    files = [row["image"] for row in rows]
    times.append(time.thread_time())
    pixels = [images.decode(file, row) for row, file in enumerate(files)]
    times.append(time.thread_time())
    for row, image in enumerate(pixels):
        images.augment(image, 0, row)
    times.append(time.thread_time())
    draw(0, 0, range(count), images.sample_shape)
    times.append(time.thread_time())
    parts = ("reading", "decoding", "augmentation", "noise")
    each = {
        part: (after - before) / len(files) * 1e6 for part, before, after in zip(parts, times, times[1:], strict=False)
    }
    speed = 1e6 / sum(each[part] for part in parts[:3])
    return {
        "images_per_second": speed,
        "microseconds": each,
        "bytes": sum(len(file["bytes"]) for file in files) / len(files),
    }


def flags_of(args: argparse.Namespace, steps: int) -> list[str]:
    """What the training script is told, as a user would tell it."""
    flags = ["--preset", args.preset, "--dataset_name", str(args.output_dir / "images"), "--label_column", "label"]
    flags += ["--cache_dir", str(args.output_dir / "cache"), "--output_dir", str(args.output_dir / "run")]
    flags += ["--train_batch_size", str(args.train_batch_size), "--max_train_steps", str(steps)]
    flags += ["--checkpointing_steps", str(steps), "--validation_steps", "0", "--resume_from_checkpoint", "latest"]
    return [*flags, "--mixed_precision", args.mixed_precision]


def train(flags: list[str], log: Path, pipe) -> None:
    """Body of a child: a run, which tells the most memory that it had at a time."""
    sys.stdout = sys.stderr = open(log, "a")

    def work(argv):
        began = time.perf_counter()
        status = train_dual_rate.main(train_dual_rate.parse_args(argv))
        peak = {"seconds": time.perf_counter() - began}
        peak["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak["gpu_bytes"], peak["gpu"] = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        pipe.send(peak)
        return status

    run_script(work, flags)


def rehearse(args: argparse.Namespace) -> dict:
    """Train in two parts, each in a process of its own; returns what both took."""
    measured, done = [], 0
    for steps in (args.max_train_steps // 2, args.max_train_steps):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        log = args.output_dir / "run.log"
        child = PROCESSES.Process(target=train, args=(flags_of(args, steps), log, theirs))
        child.start()
        theirs.close()
        child.join()
        if child.exitcode:
            raise SystemExit(f"The training ended with {child.exitcode}: see {log}.")
        record = json.loads((args.output_dir / "run/training.json").read_text())
        seconds = record["seconds"] / (steps - done)
        measured.append({"steps": [done, steps], "seconds_per_step": seconds, **ours.recv()})
        print(measured[-1], flush=True)
        done = steps
    checkpoint = list_checkpoints(args.output_dir / "run")[-1]
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {"runs": measured, "batch": args.train_batch_size, "checkpoint_bytes": size}


def kept_bytes(networks: TrainablePair, configuration: Configuration, batch_size: int) -> float:
    """Bytes that one forward pass keeps for its backward pass, for each image: measured, in float32."""
    recipe, config = configuration.recipe, networks.denoiser.config
    size = (config.in_channels, *networks.denoiser.image_size)
    known = {parameter.untyped_storage().data_ptr() for parameter in networks.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    draws, x = draw(0, 0, range(batch_size), size), torch.zeros(batch_size, *size)
    labels = torch.zeros(batch_size, dtype=torch.long)
    contexts = train_dual_rate.ContextTimes(
        recipe.context_ages, num_without=round(batch_size * recipe.share_without_context)
    )
    schedule = schedule_of(configuration.make_scheduler(), recipe.bias)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = networks(denoising_loss, x, labels, draws, schedule=schedule, contexts=contexts).loss
        assert loss.requires_grad  # so that nothing is let go before all is counted
    return sum(kept.values()) / batch_size


def plan(configuration: Configuration, batch_size: int) -> dict:
    """What a whole run needs on GPUs: from counted FLOPs and parameters, and one measured forward pass."""
    recipe = configuration.recipe
    networks = train_dual_rate.make_networks(configuration, None)
    parameters = sum(parameter.numel() for parameter in networks.parameters())
    flops = training_image_flops(networks.denoiser, networks.context_encoder, recipe)
    activations = kept_bytes(networks, configuration, batch_size) / 2  # bfloat16 takes half
    image = math.prod(networks.denoiser.image_size) * 3
    total = flops * recipe.train_batch_size * recipe.num_steps
    rows = []
    for gpus in (8, 64):
        speed = gpus * PEAK * SHARE / flops
        images, parts = recipe.train_batch_size // gpus, 1
        while HELD * parameters + activations * images / parts > MEMORY and parts < images:
            parts *= 2
        step = recipe.train_batch_size / speed
        rows.append(
            {
                "gpus": gpus,
                "days": total / (gpus * PEAK * SHARE) / 86400,
                "seconds_per_step": step,
                "gradient_accumulation_steps": parts,
                "gpu_bytes": HELD * parameters + activations * images / parts,
                "gpu_bytes_fsdp2": HELD * parameters / gpus + activations * images / parts,
                "storage_bytes_per_second": SAVED * parameters / (INTERVAL * step),
                "images_per_second": speed,
                "raw_bytes_per_second": speed * image,
            }
        )
    return {
        "parameters": parameters,
        "training_flops_per_image": flops,
        "kept_bytes_per_image": activations,
        "checkpoint_bytes": SAVED * parameters,
        "gpu_days": total / (PEAK * SHARE) / 86400,
        "assumed": {"peak_flops": PEAK, "share": SHARE, "gpu_bytes": MEMORY, "checkpoint_interval": INTERVAL},
        "runs": rows,
    }


def main(args: argparse.Namespace) -> dict:
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} exists: give a new folder.")
    whole = ["--preset", args.preset, "--train_data_dir", "images", "--output_dir", str(args.output_dir / "run")]
    configuration = configure(train_dual_rate.parse_args(whole), "train_dual_rate")
    shapes = configuration.networks.denoiser
    with torch.device("meta"):
        networks = train_dual_rate.make_networks(configuration, None)
    needed = DISK * SAVED * sum(parameter.numel() for parameter in networks.parameters())
    there = next(folder for folder in args.output_dir.resolve().parents if folder.is_dir())
    if not args.plan and (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(
            f"--output_dir {args.output_dir} has {free / 1e9:.0f} GB of free disk, and {needed / 1e9:.0f} are needed."
        )
    args.output_dir.mkdir(parents=True)
    report = {"preset": args.preset}
    if not args.plan:
        make_shards(args.output_dir / "images", shapes["sample_size"], shapes["num_classes"] or CLASSES)
        report["streamed"] = time_stream(args.output_dir / "images", configuration)
        report["measured"] = rehearse(args)
    report["planned"] = plan(configuration, args.train_batch_size)
    (args.output_dir / "rehearsal.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main(parse_args())
