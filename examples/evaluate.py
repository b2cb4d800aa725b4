"""Measure a trained model on the data it was trained on, and write every figure into evaluation.json.

    python examples/evaluate.py --model model_cards/dualrate-emoji32 --heavy model_cards/single-rate-emoji32 \\
        --light runs/light-emoji32 --preset examples/presets/emoji32.json --dataset_name examples/data/emoji32 \\
        --label_column label --classifier examples/classifiers/emoji32.safetensors \\
        --output model_cards/dualrate-emoji32/evaluation.json --grid model_cards/dualrate-emoji32/samples.png

`v_loss`: the mean of (v − v̂)² on freshly augmented images with fixed noise, of the model, of the model with its context
dropped, and of the single-rate networks it is compared with. `samples`: for each way to sample, what it cost, counted, and
the distances, precision, recall and class accuracy of its images. `floor`: the same figures for real images that the
reference does not hold, of the same count: as good as a perfect model would be. Each name ends in the count of images,
and each figure has a value for every seed.

Any number of processes measure the same images: `accelerate launch examples/evaluate.py ...`.
"""

import argparse
import hashlib
import json
import math
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from safetensors.torch import load_file
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline, __version__
from diffusers_dualrate.data import Augmentation, LabelledImages, load_images
from diffusers_dualrate.evaluation import (
    FeatureStatistics,
    ImageClassifier,
    fd_local,
    file_hash,
    frechet_distance,
    load_dinov2,
    load_inception,
    nearest_training_image,
    precision_recall,
)
from diffusers_dualrate.flops import block_multiply_adds, count_evaluations, image_flops
from diffusers_dualrate.letters import Letters
from diffusers_dualrate.losses import denoising_loss, draw, seed_of
from diffusers_dualrate.training import TrainablePair

# Far from the seeds that trainings use, so that no augmentation and no noise was seen before.
_FRESH_SEED = 1_000_003
# Epochs of augmentation: the v-loss takes those from 0 on, the reference these, and so does the floor of each seed.
_REFERENCE_EPOCH, _FLOOR_EPOCHS = 1_000_000, range(2_000_000, 1_000_000_000, 1_000_000)
# Precision and recall compare every image with every other, the nearest image is looked for among all.
_PRECISION_LIMIT, _NEAREST_LIMIT = 10_000, 5_000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub repository or folder of the model to measure.")
    parser.add_argument("--heavy", help="Single-rate model of the encoder's shape, to compare with.")
    parser.add_argument("--light", help="Single-rate model of the denoiser's shape, to compare with.")
    parser.add_argument("--preset", required=True, help="JSON file the model was trained with.")
    parser.add_argument("--dataset_name", help="Data set on the Hub or in a local folder; or letters, or digits.")
    parser.add_argument("--train_data_dir", help="Folder of images; one sub-folder per class.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    parser.add_argument("--label_column")
    parser.add_argument("--num_classes", type=int, help="Number of classes, if the training was given it.")
    parser.add_argument(
        "--on_corrupt", choices=["raise", "skip"], default="raise", help="What an unreadable image does."
    )
    parser.add_argument("--reference_split", default="train", help="Split of the data set that samples are held to.")
    parser.add_argument("--floor_split", help="Split of the floor; default: the reference's, augmented again.")
    parser.add_argument("--num_reference", type=int, help="Images of the reference; default: as many as the set has.")
    parser.add_argument("--classifier", help="File of train_classifier.py, for fd_local and the class accuracy.")
    parser.add_argument("--dinov2", help="Hub repository or folder of DINOv2, for fd_dinov2.")
    parser.add_argument("--inception", action="store_true", help="Measure fid; needs torch-fidelity.")
    parser.add_argument("--num_samples", type=int, default=500, help="Samples of each seed.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="Each samples a set of its own.")
    parser.add_argument("--num_noises", type=int, default=3000, help="Images with noise that the v-loss is taken on.")
    parser.add_argument("--num_inference_steps", type=int, help="N; default: the model's.")
    parser.add_argument("--num_context_steps", type=int, help="K; default: the model's.")
    parser.add_argument("--solver_steps", type=int, nargs="*", default=[], help="Also sample with DPM-Solver++ so.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's.")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--cache_dir", default=Path.home() / ".cache" / "diffusers-dualrate", help="Of references.")
    parser.add_argument("--output", default="evaluation.json")
    parser.add_argument("--grid", help="Where to write a picture of the first samples.")
    return parser.parse_args(argv)


# Images and classes.


def open_images(args, size, augmentation, split=None, *, channels=3):
    """A split of the data set at a size, augmented as no training saw it; letters are rendered, and have no splits."""
    if args.dataset_name == "letters":
        return Letters(size, label_column=args.label_column, seed=_FRESH_SEED)
    dataset = load_images(
        args.dataset_name,
        args.train_data_dir,
        image_column=args.image_column,
        label_column=args.label_column,
        split=split or args.reference_split,
        config_name=args.dataset_config_name,
    )
    return LabelledImages(
        dataset,
        size,
        image_column=args.image_column,
        label_column=args.label_column,
        num_classes=args.num_classes,
        augmentation=augmentation,
        channels=channels,
        seed=_FRESH_SEED,
        on_corrupt=args.on_corrupt,
    )


def choose(images, count, seed):
    """Images in random order as pairs (repeat, index), the classes in proportion to the data."""
    generator = torch.Generator().manual_seed(seed_of(_FRESH_SEED, seed))
    order = torch.randperm(len(images), generator=generator)
    if images.class_labels is not None:
        order = order[images.class_labels[order].argsort(stable=True)]
    # One of every len / count in the order of classes; where more are asked for than there are, some are repeated.
    position = torch.arange(count)
    rank = position * len(images) // count
    repeat = position - (rank * count + len(images) - 1) // len(images)
    return torch.stack([repeat, order[rank]], dim=1)[torch.randperm(count, generator=generator)].tolist()


def batches_of(count, args, accelerator):
    """This process's share of `range(count)` in batches: the same batches, whatever the number of processes."""
    batches = [range(count)[first : first + args.batch_size] for first in range(0, count, args.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    return tqdm(mine, disable=not accelerator.is_main_process)


def as_bytes(x):
    """Images as a file of 8 bits a channel holds them."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def real_batches(images, epoch, chosen, args, accelerator):
    """Real images of this process, augmented from an epoch on: yields (positions, images, classes)."""
    for positions in batches_of(len(chosen), args, accelerator):
        rows = [chosen[position] for position in positions]
        items = [images[epoch + repeat, index] for repeat, index in rows]
        labels = torch.stack([item["class_labels"] for item in items]) if args.label_column else None
        yield positions, as_bytes(torch.stack([item["pixel_values"] for item in items])), labels


def sampled_batches(pipe, labels, count, seed, steps, args, accelerator):
    """Samples of this process, image i from a seed of its own: yields (positions, images, classes)."""
    pipe.set_progress_bar_config(disable=True)
    for positions in batches_of(count, args, accelerator):
        chunk = None if labels is None else labels[positions.start : positions.stop]
        generator = [torch.Generator().manual_seed(seed_of(_FRESH_SEED, seed, i)) for i in positions]
        size = {"batch_size": len(positions)} if chunk is None else {"class_labels": chunk.tolist()}
        x = pipe(**size, generator=generator, output_type="latent", **steps).images
        yield positions, as_bytes(x.float().cpu()), chunk


# Figures.


@dataclass
class Measured:
    """What a set of images shows, gathered over processes: by extractor, features; and how many have their class."""

    statistics: dict
    features: dict
    right: dict = field(default_factory=dict)
    first: torch.Tensor | None = None


@torch.no_grad()
def measure(batches, extractors, judges, accelerator):
    """Pass batches of images through feature extractors, and through judges: functions (images, classes) → [B] truths."""
    streamed = {name: FeatureStatistics() for name in extractors}
    kept, right, first = [], dict.fromkeys(judges, 0), []
    for positions, x, labels in batches:
        on_device = x.to(accelerator.device)
        features = {name: extract(on_device) for name, extract in extractors.items()}
        for name in extractors:
            streamed[name].update(features[name])
        if positions.start < _PRECISION_LIMIT:
            kept.append((positions.start, {name: value.cpu() for name, value in features.items()}))
        for name, judge in judges.items():
            right[name] += judge(x, labels).sum().item()
        if positions.start < 64:
            first.append((positions.start, x))
    streamed = {name: FeatureStatistics(value.moments.cpu()) for name, value in streamed.items() if value.count}
    parts = [part for part in gather_object([streamed]) if part]
    kept, first = (sorted(gather_object(shares), key=lambda share: share[0]) for shares in (kept, first))
    return Measured(
        {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in extractors},
        {name: torch.cat([features[name] for _, features in kept])[:_PRECISION_LIMIT] for name in extractors},
        {name: sum(share[name] for share in gather_object([right])) for name in judges},
        torch.cat([x for _, x in first])[:64],
    )


def measure_reference(images, extractors, args, accelerator):
    """Measure the reference, or read what an earlier run has measured on the very same images and extractors."""
    chosen = choose(images, args.num_reference or len(images), 0)
    total = 0
    for _, x, _ in real_batches(images, _REFERENCE_EPOCH, chosen, args, accelerator):
        total += sum(int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()) for image in x)
    content = sum(gather_object([total])) % 2**256  # the same in any order
    paths = {}
    for name, extract in extractors.items():
        # What an extractor does to noise says which one it is.
        noise = (
            torch.rand(2, images.channels, images.height, images.width, generator=torch.Generator().manual_seed(0)) * 2
            - 1
        )
        with torch.no_grad():
            response = extract(noise.to(accelerator.device)).cpu().numpy().tobytes()
        key = hashlib.sha256(f"{name} {content:x} {len(chosen)}".encode() + response).hexdigest()
        paths[name] = Path(args.cache_dir) / f"{key}.safetensors"
    # Another device may respond with other last digits: the main process says where everything is.
    missing = [name for name in extractors if not paths[name].is_file()]
    paths, missing = broadcast_object_list([paths, missing])
    if missing:
        batches = real_batches(images, _REFERENCE_EPOCH, chosen, args, accelerator)
        fresh = measure(batches, {name: extractors[name] for name in missing}, {}, accelerator)
        for name in missing if accelerator.is_main_process else ():
            fresh.statistics[name].save(paths[name], features=fresh.features[name])
    accelerator.wait_for_everyone()
    return Measured(
        {name: FeatureStatistics.load(path) for name, path in paths.items()},
        {name: load_file(path)["features"] for name, path in paths.items()},
    )


def count_in_name(count):
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def figures(measured, reference, count):
    """The figures of one set of images, with the count of those that each was taken on in its name."""
    suffix = count_in_name(count)
    found = {}
    for name, found_statistics in measured.statistics.items():
        distance = fd_local if name == "local" else frechet_distance
        title = "fid" if name == "inception" else f"fd_{name}"
        found[f"{title}_{suffix}"] = distance(found_statistics, reference.statistics[name])
        features = measured.features[name]
        precision, recall = precision_recall(features, reference.features[name][: len(features)])
        compared = f"{name}_{count_in_name(len(features))}"
        found |= {f"precision_{compared}": precision, f"recall_{compared}": recall}
    return found | {f"{name}_{suffix}": right / count for name, right in measured.right.items()}


def spread(per_seed):
    """The values of each figure over seeds, with their mean and standard deviation."""
    return {
        name: {
            "values": (values := [found[name] for found in per_seed]),
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name in per_seed[0]
    }


def measure_v_loss(pipe, images, args, context_steps, accelerator, drop_context=False):
    """Mean of (v − v̂)² over fresh augmentations, at stratified times with noise fixed by the position."""
    scheduler = pipe.scheduler
    pair = TrainablePair(pipe.denoiser, pipe.context_encoder).eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_FRESH_SEED)).tolist()
    total = 0.0
    for rows in batches_of(args.num_noises, args, accelerator):
        batch = [images[row // len(order), order[row % len(order)]] for row in rows]
        x = torch.stack([item["pixel_values"] for item in batch]).to(accelerator.device)
        labels = None
        if "class_labels" in batch[0]:
            labels = torch.stack([item["class_labels"] for item in batch]).to(accelerator.device)
        draws = draw(_FRESH_SEED, 0, rows, x.shape[1:], accelerator.device)
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
    return sum(gather_object([total])) / args.num_noises


def make_nearest_judge(images, args, augmentation):
    """Judge of whether the training image nearest to an image, over shifts and backgrounds, carries its class."""
    black, white = (
        open_images(
            args, (images.height, images.width), Augmentation(background=(level, level)), channels=images.channels
        )
        for level in (0, 255)
    )
    black, white = (torch.stack([view[i]["pixel_values"] for i in range(len(view))]) for view in (black, white))
    return lambda x, labels: (
        images.class_labels[nearest_training_image(x, black, white, augmentation.translation)] == labels
    )


def measure_sampling(pipe, solver, images, reference, extractors, judges, steps, args, accelerator):
    """Sample a set of images for each seed; returns their figures beside what they cost, and the first images."""
    own_scheduler = pipe.scheduler
    if solver == "dpmsolver++":
        pipe.scheduler = DPMSolverMultistepScheduler(
            trained_betas=own_scheduler.betas.tolist(), prediction_type="v_prediction", use_lu_lambdas=True
        )
    per_seed, first, calls = [], None, 0
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        for seed in args.seeds:
            labels = None
            if images.num_classes:
                labels = images.class_labels[[index for _, index in choose(images, args.num_samples, seed)]]
            batches = sampled_batches(pipe, labels, args.num_samples, seed, steps, args, accelerator)
            measured = measure(batches, extractors, judges, accelerator)
            calls += math.ceil(args.num_samples / args.batch_size)
            per_seed.append(figures(measured, reference, args.num_samples))
            first = measured.first if first is None else first
    pipe.scheduler = own_scheduler
    # Every way to sample proves what it evaluated, all processes together.
    heavy, light = steps["num_context_steps"] or 0, steps["num_inference_steps"]
    evaluations = [sum(counts) for counts in zip(*gather_object([evaluations]), strict=True)]
    if evaluations != [heavy * calls, light * calls]:
        raise RuntimeError(
            f"{solver} made {evaluations} evaluations of {heavy} and {light} in each of {calls} batches."
        )
    counts = {"num_inference_steps": light, "num_context_steps": heavy}
    report = {
        "solver": solver,
        **steps,
        "evaluations": {"context_encoder": heavy, "denoiser": light},
        "flops": image_flops(pipe.denoiser, pipe.context_encoder, **counts),
        "flops_with_guidance": image_flops(
            pipe.denoiser, pipe.context_encoder, **counts, guided=steps["guidance_scale"] > 1
        ),
        **spread(per_seed),
    }
    return report, first


def environment(accelerator):
    """What the figures were measured with."""
    commit = ""
    if git := shutil.which("git"):  # of these scripts, wherever they are called from
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    packages = ("diffusers", "torch", "accelerate", "torchmetrics", "transformers", "numpy")
    versions = {name: version(name) for name in packages if find_spec(name)}
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or None,
        "versions": {"diffusers-dualrate": __version__} | versions,
        "hardware": on_cpu if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device),
        "processes": accelerator.num_processes,
    }


def check_classes(name, pipe, images):
    """Refuse a model whose classes are not those of the data."""
    ours, theirs = images.num_classes, pipe.denoiser.config.num_classes
    if ours != theirs:
        raise ValueError(
            f"{name} has {theirs or 'no'} classes and the data {ours or 'no'}: see --label_column, --num_classes."
        )
    differing = [i for i in range(ours or 0) if pipe.id2label.get(i, images.id2label[i]) != images.id2label[i]]
    if differing:
        i = differing[0]
        raise ValueError(f"Class {i} is {pipe.id2label[i]!r} in {name} and {images.id2label[i]!r} in the data.")


def read_record(model, name):
    """A JSON file beside the weights, where it is at hand."""
    record = Path(model) / name
    return json.loads(record.read_text()) if record.is_file() else None


def main(args):
    for name in ("num_samples", "num_reference"):
        if getattr(args, name) is not None and getattr(args, name) < 4:  # three neighbours
            raise ValueError(f"{name} must be at least 4, got {getattr(args, name)}.")
    for path in filter(None, (args.output, args.grid)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    augmentation = Augmentation(**json.loads(Path(args.preset).read_text())["training"]["augmentation"])
    pipe = DualRatePipeline.from_pretrained(args.model).to(accelerator.device)
    extractors, judges, classifier = {}, {}, None
    if args.classifier:
        classifier = ImageClassifier.load(args.classifier).to(accelerator.device)
        extractors["local"] = classifier.features
    if args.dinov2:
        extractors["dinov2"] = load_dinov2(args.dinov2, accelerator.device)
    if args.inception:
        extractors["inception"] = load_inception(accelerator.device)

    size, channels = pipe.denoiser.config.sample_size, pipe.denoiser.config.in_channels
    images = floor_images = open_images(args, size, augmentation, channels=channels)
    if args.floor_split:
        floor_images = open_images(args, size, augmentation, args.floor_split, channels=channels)
    check_classes(args.model, pipe, images)
    if classifier is not None and images.num_classes:
        judges["class_accuracy"] = lambda x, labels: (
            classifier(x.to(accelerator.device)).argmax(1) == labels.to(accelerator.device)
        )
    if images.num_classes and len(images) <= _NEAREST_LIMIT:
        judges["class_of_nearest"] = make_nearest_judge(images, args, augmentation)

    n = args.num_inference_steps or pipe.config.num_inference_steps
    k = None if pipe.context_encoder is None else args.num_context_steps or pipe.config.num_context_steps or n
    if k is not None and k > n:
        raise ValueError(f"num_context_steps must not exceed num_inference_steps={n}, got {k}.")
    guidance_scale = args.guidance_scale or (pipe.config.guidance_scale if images.num_classes else 1.0)
    networks = {name: net for name, net in pipe.components.items() if isinstance(net, torch.nn.Module)}
    report = {
        "model": Path(args.model).name,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "block_multiply_adds": {name: block_multiply_adds(network) for name, network in networks.items()},
        "data": {
            "name": Path(args.dataset_name or args.train_data_dir).name,
            "arguments": " ".join(
                f"--{name} {getattr(args, name)}"
                for name in ("dataset_name", "train_data_dir", "dataset_config_name", "label_column", "num_classes")
                if getattr(args, name)
            ),
            "images": len(images),
            "classes": images.num_classes,
            "reference": f"{args.num_reference or len(images)} images of split {args.reference_split}",
            "floor": f"split {args.floor_split}" if args.floor_split else "the same images, augmented again",
        },
        "classifier": None
        if classifier is None
        else {"file": Path(args.classifier).name, "sha256": file_hash(args.classifier), **classifier.facts},
        "training": read_record(args.model, "training.json"),
        "rivals": {},
    }

    v_loss = {"images": args.num_noises, "model": measure_v_loss(pipe, floor_images, args, k or 1, accelerator)}
    if pipe.context_encoder is not None:
        v_loss["context_dropped"] = measure_v_loss(pipe, floor_images, args, k, accelerator, drop_context=True)
    for name in ("heavy", "light"):
        if path := getattr(args, name):
            rival = DualRatePipeline.from_pretrained(path).to(accelerator.device)
            check_classes(path, rival, images)
            v_loss[f"single_rate_{name}"] = measure_v_loss(rival, floor_images, args, 1, accelerator)
            measured = read_record(path, "evaluation.json") or {}
            is_alike = all(measured.get(key) == report.get(key, args.seeds) for key in ("data", "classifier", "seeds"))
            report["rivals"][f"single_rate_{name}"] = {
                "model": Path(path).name,
                "training": read_record(path, "training.json"),
                "samples": measured["samples"] if is_alike else [],
            }
    if args.heavy and args.light:
        gap = v_loss["single_rate_light"] - v_loss["single_rate_heavy"]
        v_loss["share_of_gap_recovered"] = (v_loss["single_rate_light"] - v_loss["model"]) / gap
    report["v_loss"] = v_loss

    reference = measure_reference(images, extractors, args, accelerator)
    floor = []
    for position, seed in enumerate(args.seeds):
        chosen = choose(floor_images, args.num_samples, seed)
        batches = real_batches(floor_images, _FLOOR_EPOCHS[position], chosen, args, accelerator)
        floor.append(figures(measure(batches, extractors, judges, accelerator), reference, args.num_samples))
    report["floor"] = spread(floor)
    ways = [("ancestral", n, k)]
    ways += [("dpmsolver++", steps, k if k is None else min(k, steps)) for steps in args.solver_steps]
    report["samples"] = []
    for solver, n, k in ways:
        steps = {"num_inference_steps": n, "num_context_steps": k, "guidance_scale": guidance_scale}
        found, first = measure_sampling(pipe, solver, images, reference, extractors, judges, steps, args, accelerator)
        report["samples"].append(found)
        if args.grid and len(report["samples"]) == 1 and accelerator.is_main_process:
            columns = min(16, len(first))
            rows = len(first) // columns
            pictures = pipe.image_processor.postprocess(first[: rows * columns], output_type="pil")
            make_image_grid(pictures, rows=rows, cols=columns, resize=64).save(args.grid)

    report |= {"seeds": args.seeds, **environment(accelerator)}
    if accelerator.is_main_process:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main(parse_args())
