"""Compare Dual-Rate Diffusion with its rivals at equal training budgets: quality against compute, by one command.

    python -m research.study --data digits letters --seeds 0 1 2 --jobs 2

An arm is a trained model and a way of sampling it. Every arm is sampled with every solver at many step counts, and each
point, a Fréchet distance in the features of a classifier (`fd_local`) at a counted number of FLOPs, is saved when it is
done: stopped and started again, the study goes on where it was. `--max_train_steps`, `--num_samples` and
`--max_evaluations` shrink it. It ends with one JSON file, and a table, a plot and a list of all points made from that file alone.

What was computed is found again by its configuration, which the code is no part of: after a change of the code, name
another `--work_dir`. With `--measured research/study.json` the published points are found so, too, and only what is new,
such as an arm of your own, is measured, and what it samples trained.
"""

import argparse
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.configuration import Data
from diffusers_dualrate.evaluation import FeatureStatistics, ImageClassifier, fd_local, file_hash
from diffusers_dualrate.flops import count_evaluations
from diffusers_dualrate.image_sets import choose
from diffusers_dualrate.losses import seed_of
from evaluate import environment

from . import report
from .arms import ARMS, Sampler
from .jobs import digest, run_jobs, write_json
from .letters import open_images
from .networks import (
    DATA,
    TRAININGS,
    budgets_of,
    find_model,
    given_count,
    lineage,
    make_preset,
    recipe_of,
    step_flops,
    train_model,
)

# Far from the seeds that trainings use, so that reference and floor are images that no training saw.
_REFERENCE_SEED, _FLOOR_SEED = 2_000_003, 3_000_017


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=["digits", "letters"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--solvers", nargs="+", choices=report.SOLVERS, default=list(report.SOLVERS))
    parser.add_argument("--budgets", nargs="+", choices=report.BUDGETS, default=list(report.BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of training.")
    budgets = [f"{name}/{budget}" for name in ARMS for budget in report.BUDGETS]
    once = [*DATA, *ARMS, *report.BUDGETS, *(f"{data}/{name}" for data in DATA for name in ARMS), *budgets]
    named = "DATA|ARM|BUDGET|DATA/ARM|ARM/BUDGET"
    parser.add_argument(
        "--first_seed_only", nargs="+", choices=once, default=[], metavar=named, help="What has one training seed."
    )
    parser.add_argument(
        "--leave_out",
        nargs="+",
        default=[],
        metavar="DATA/ARM[/BUDGET]|DATA/BUDGET",
        help="What a data set goes without.",
    )
    parser.add_argument(
        "--sampling_seeds",
        nargs="+",
        type=parse_number,
        default=[],
        metavar="[DATA=]SEED",
        help="Seeds of sampling, for all data sets or for one; default: 0.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Processes side by side, of one thread each.")
    parser.add_argument("--work_dir", default="runs/study", help="Where models and points are kept.")
    parser.add_argument(
        "--measured", metavar="FILE", help="JSON of an earlier study, whose points are not trained and measured again."
    )
    parser.add_argument(
        "--output", help="The JSON file, plot and points beside it; default: study.json in the work_dir."
    )
    parser.add_argument("--readme", help="A file whose part between the study's markers becomes the table.")
    parser.add_argument(
        "--report_only", action="store_true", help="Make table, plot and points of the JSON file as it is."
    )
    parser.add_argument("--classifiers", help="Folder of <data>.safetensors; default: those that ship.")
    shrink = parser.add_argument_group("to shrink it")
    counts = {"nargs": "+", "type": parse_count, "default": [], "metavar": "[DATA=]COUNT"}
    shrink.add_argument(
        "--max_train_steps",
        **counts,
        help="Most steps of a training or distillation, at equal steps; default: the presets'.",
    )
    shrink.add_argument("--num_samples", **counts, help="Images of each point; default: the data sets'.")
    shrink.add_argument("--max_evaluations", **counts, help="Largest N; default: the data sets'.")
    shrink.add_argument("--batch_size", type=int, default=100)
    args = parser.parse_args(argv)
    parts = [*report.BUDGETS, *ARMS, *budgets]
    if unknown := set(args.leave_out) - {f"{data}/{part}" for data in DATA for part in parts}:
        parser.error(f"argument --leave_out: there is no {', '.join(sorted(unknown))}")
    args.output = args.output or str(Path(args.work_dir, "study.json"))
    return args


def parse_number(text: str) -> tuple[str, int]:
    """A number for one data set, or under the empty name for all."""
    data, _, number = text.rpartition("=")
    if data and data not in DATA or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a number for one of {', '.join(DATA)}")
    return data, int(number)


def parse_count(text: str) -> tuple[str, int]:
    """A count, which is 1 at least, for one data set, or under the empty name for all."""
    data, count = parse_number(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: it must be at least 1")
    return data, count


def sampling_seeds_of(args, data: str) -> list[int]:
    """A data set's own seeds of sampling, or those for all."""
    given = {name: [seed for other, seed in args.sampling_seeds if other == name] for name in (data, "")}
    return given[data] or given[""] or [0]


def count_of(args, name: str, data: str) -> int:
    """What a data set was shrunk to, or its own count."""
    return given_count(args, name, data) or getattr(DATA[data], name)


# Measuring


def classifier_file(args, data: str) -> Path:
    """The classifier that a data set is measured with."""
    return Path(args.classifiers, f"{data}.safetensors") if args.classifiers else DATA[data].classifier


def open_measured(data: str, role: str):
    """The images that distances are measured from: "reference", or "floor", other ones like them."""
    preset = make_preset(data, "heavy")
    return open_images(
        Data(dataset_name=DATA[data].dataset_name, label_column="label"),
        preset["denoiser"]["sample_size"],
        channels=preset["denoiser"]["in_channels"],
        augmentation=Augmentation(**preset["training"]["augmentation"]),
        seed={"reference": _REFERENCE_SEED, "floor": _FLOOR_SEED}[role],
        split=role if data == "digits" else "train",
    )


@torch.no_grad()
def statistics_of(classifier, batches) -> FeatureStatistics:
    """Statistics of the features of batches of images [B, C, H, W]."""
    statistics = FeatureStatistics()
    device = next(classifier.parameters()).device
    for batch in batches:
        statistics.update(classifier.features(batch.clamp(-1, 1).to(device)).cpu())
    return statistics


def open_reference(args, data: str):
    """Classifier, statistics of the reference, and the floor with what is known of all three."""
    path = classifier_file(args, data)
    classifier = ImageClassifier.load(path).to(PartialState().device)
    reference, floor = open_measured(data, "reference"), open_measured(data, "floor")
    num_references = min(DATA[data].num_references or len(reference), len(reference))
    n = count_of(args, "num_samples", data)
    facts = {"n": n, "references": num_references, "classifier": file_hash(path), "seed": _FLOOR_SEED}
    augmentation = make_preset(data, "heavy")["training"]["augmentation"]
    stem = Path(args.work_dir, data, f"reference-{digest([facts, augmentation])}")

    def batches(images, indices):
        for first in range(0, len(indices), args.batch_size):
            yield torch.stack(
                [images[tuple(index)]["pixel_values"] for index in indices[first : first + args.batch_size]]
            )

    if not stem.with_suffix(".safetensors").exists():
        indices = [(0, row) for row in range(num_references)]
        statistics_of(classifier, batches(reference, indices)).save(stem.with_suffix(".safetensors"))
    statistics = FeatureStatistics.load(stem.with_suffix(".safetensors"))
    if not stem.with_suffix(".json").exists():
        floor_statistics = statistics_of(classifier, batches(floor, choose(floor, n, 0)))
        write_json(stem.with_suffix(".json"), facts | {"fd": fd_local(floor_statistics, statistics)})
    labels = reference.class_labels[[row for _, row in choose(reference, n, 0)]].tolist()
    return classifier, statistics, labels, json.loads(stem.with_suffix(".json").read_text())


def draw_checked(sampler: Sampler, labels: list[int], seeds: list[int]) -> Tensor:
    """Sample, and make sure that every part of the model ran as often as its method says."""
    with count_evaluations(*(module for module, _ in sampler.evaluations.values())) as counts:
        images = sampler.draw(labels, [torch.Generator().manual_seed(seed) for seed in seeds])
    found = dict(zip(sampler.evaluations, counts, strict=True))
    expected = {name: times for name, (_, times) in sampler.evaluations.items()}
    if found != expected:
        raise RuntimeError(f"The method did not engage: evaluations were {found}, but must be {expected}.")
    return images


def measure_point(args, key: dict, folders: list[Path], reference) -> dict:
    """One point: FLOPs and evaluations of an image, counted, and the distance of n images."""
    classifier, statistics, labels, _ = reference
    data, arm = key["data"], ARMS[key["arm"]]
    sampler = arm.sample(*folders, key["solver"], key["N"], key["K"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        draw_checked(sampler, labels[:1], [0])

    def batches():
        for first in range(0, len(labels), args.batch_size):
            chunk = labels[first : first + args.batch_size]
            seeds = [seed_of(key["sampling_seed"], first + i) for i in range(len(chunk))]
            yield draw_checked(sampler, chunk, seeds)

    def spent(unit):
        """In all steps of the training and of those that it started from."""
        total = 0
        for training in set().union(*map(lineage, arm.trainings)):
            budget = key["budget"] if training in arm.trainings else "steps"
            recipe = recipe_of(training, find_model(args, data, training, budget, key["seed"])[1])
            total += recipe["max_train_steps"] * unit(training, recipe)
        return total

    return key | {
        "flops": counter.get_total_flops(),
        "evaluations": {name: times for name, (_, times) in sampler.evaluations.items()},
        "fd": fd_local(statistics_of(classifier, batches()), statistics),
        "n": len(labels),
        "training_flops": spent(lambda training, _: step_flops(args, data, training, key["seed"])),
        "training_images": spent(lambda _, recipe: recipe["train_batch_size"]),
    }


def list_points(
    args, data: str, name: str, budget: str, solver: str, seed: int
) -> list[tuple[dict, list[Path], Path]]:
    """Key, models and file of every point of an arm with a solver."""
    arm = ARMS[name]
    folders = [find_model(args, data, training, budget, seed)[0] for training in arm.trainings]
    limit, size = count_of(args, "max_evaluations", data), count_of(args, "num_samples", data)
    classifier = file_hash(classifier_file(args, data))
    listed = []
    for sampling_seed in sampling_seeds_of(args, data):
        for n, k in arm.steps.get(solver, ()):
            if n <= limit:
                key = {"data": data, "arm": name, "budget": budget, "solver": solver, "N": n, "K": k}
                key |= {"seed": seed, "sampling_seed": sampling_seed}
                name_of_file = digest([key, *(folder.name for folder in folders), size, classifier])
                listed.append((key, folders, Path(args.work_dir, data, "points", f"{name_of_file}.json")))
    return listed


def read_measured(path: Path) -> dict[str, dict]:
    """Points of an earlier study by their names, which hold what decides them: model, steps, seeds, n and classifier."""
    points = json.loads(path.read_text())["points"]
    if not all("name" in point for point in points):
        raise ValueError(f"{path} is of a version whose points had no names: collect it again with this one.")
    return {point["name"]: point for point in points}


def is_measured(args, key: tuple, measured: dict[str, dict]) -> bool:
    """Whether every point of an arm with a solver is there, those that an earlier study measured taken over."""
    files = [file for *_, file in list_points(args, *key)]
    for file in files:
        if file.stem in measured and not file.exists():
            write_json(file, measured[file.stem])
    return all(file.exists() for file in files)


def sample_arm(args, data: str, name: str, budget: str, solver: str, seed: int) -> None:
    """Measure every point of an arm with a solver that is not there yet."""
    reference = None
    for key, folders, file in list_points(args, data, name, budget, solver, seed):
        if not file.exists():
            reference = reference or open_reference(args, data)
            write_json(file, measure_point(args, key, folders, reference))


# The whole


def main(args):
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The study is drawn with matplotlib: pip install matplotlib.")
    if args.readme:
        report.check_markers(Path(args.readme))
    if not args.report_only:
        for data in args.data:
            ImageClassifier.load(classifier_file(args, data))  # missing ones before work, not after
        measured = read_measured(Path(args.measured)) if args.measured else {}
        run_jobs(args, step_flops, list_counted(list_series(args)))
        missing = leave_out_unavailable(
            args, [key for key in list_series(args) if not is_measured(args, key, measured)]
        )
        for models in list_models(missing):
            run_jobs(args, train_model, models)
        run_jobs(args, sample_arm, missing)
        write_json(Path(args.output), collect(args, list_series(args)))
    study = json.loads(Path(args.output).read_text())
    report.plot(study, Path(args.output).with_suffix(".png"))
    Path(args.output).with_suffix(".md").write_text(report.write_points(study), encoding="utf-8")
    table = report.write_table(study)
    if args.readme:
        report.insert(table, Path(args.readme))
    print(table)
    return study


def list_series(args) -> list[tuple]:
    """What is sampled by one job each: data set, arm, budget, solver and training seed."""
    return [
        (data, name, budget, solver, seed)
        for data in args.data
        for seed in args.seeds
        for name in args.arms
        for budget in budgets_of(ARMS[name].training, args.budgets)
        for solver in args.solvers
        if not {f"{data}/{part}" for part in (name, budget, f"{name}/{budget}")} & set(args.leave_out)
        and (
            seed == args.seeds[0]
            or not {data, name, budget, f"{data}/{name}", f"{name}/{budget}"} & set(args.first_seed_only)
        )
    ]


def leave_out_unavailable(args, missing: list[tuple]) -> list[tuple]:
    """Leave out the arms that are yet to be measured and need a package that is not installed; returns the others."""
    for data, name in sorted({(data, name) for data, name, *_ in missing}):
        package = ARMS[name].requires
        if package and find_spec(package) is None:
            args.leave_out.append(f"{data}/{name}")
            print(f"The arm {name} is left out on {data}, with all that was measured of it: pip install {package}.")
    return [key for key in missing if "/".join(key[:2]) not in args.leave_out]


def list_counted(series: list[tuple]) -> list[tuple]:
    """Data set and training of all whose steps equal training FLOPs decide: a step of each is counted before any other work."""
    return sorted(
        {
            (data, training)
            for data, name, budget, *_ in series
            if budget == "flops"
            for training in ("heavy", *ARMS[name].trainings)
        }
    )


def list_models(series: list[tuple]) -> list[list[tuple]]:
    """What is trained for that: groups of data set, training, budget and seed, each after those that it starts from."""
    wanted = [
        (data, training, budget, seed) for data, name, budget, _, seed in series for training in ARMS[name].trainings
    ]
    groups = []
    while wanted:
        groups.insert(0, list(dict.fromkeys(wanted)))
        wanted = [
            (data, start, "steps", seed)
            for data, training, _, seed in wanted
            for start in TRAININGS[training].starts.values()
        ]
    earlier = set()
    for group in groups:
        group[:] = [model for model in group if model not in earlier]
        earlier |= set(group)
    return groups


def collect(args, series: list[tuple]) -> dict:
    """The study as one JSON-able object."""
    facts = environment(Accelerator())
    return {
        "command": facts.pop("command"),
        "commit": facts.pop("commit"),
        "environment": facts,
        "left_out": sorted(set(args.leave_out)),
        "floors": {data: open_reference(args, data)[3] for data in args.data},
        "points": [
            {"name": file.stem} | json.loads(file.read_text())
            for key in series
            for _, _, file in list_points(args, *key)
        ],
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that workers are stopped, too
    main(parse_args())
