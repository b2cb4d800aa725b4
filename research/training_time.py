"""Where the time of a training goes on one CPU core: images per second, share of the core's matrix peak, share of each part.

    python -m research.training_time --preset emoji32 --output_dir /tmp/training-time

It takes a few real steps with the scripts of examples/, on emoji or on letters: a single-rate network, a pair, a pair
whose contexts begin late, and a student. Time is that of the processor, so other work on the machine counts little. The
peak is what one product of large float32 matrices reaches just before.
"""

import argparse
import contextlib
import cProfile
import json
import pstats
import time
from pathlib import Path

import torch

import distill
import train_dual_rate
import train_single_rate
from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.configuration import FILE, Configuration
from diffusers_dualrate.flops import distillation_image_flops, training_image_flops
from diffusers_dualrate.records import read_json

from . import EXAMPLES
from .letters import open_images

DATA = {"emoji32": str(EXAMPLES / "data/emoji32"), "letters16": "letters"}
LETTERS = Path(__file__).with_name("presets") / "letters16.json"
# Part of a step: functions, by the end of their file's name, whose time with all that they call is its own.
PARTS = {
    "images and augmentation": [("runs.py", "batches")],
    "forward passes and losses": [("torch/nn/modules/module.py", "_wrapped_call_impl")],
    "backward pass": [("accelerate/accelerator.py", "backward")],
    "clipping": [("accelerate/accelerator.py", "clip_grad_norm_")],
    "AdamW": [("accelerate/optimizer.py", "step"), ("accelerate/optimizer.py", "zero_grad")],
    "EMA": [("diffusers/training_utils.py", "step")],
    "checks and logging": [("runs.py", "agree"), ("runs.py", "note"), ("runs.py", "finish_step")],
}
# What a run does before its first step and behind its last.
OUTSIDE = [("runs.py", "_announce"), ("runs.py", "finish"), ("accelerate/accelerator.py", "prepare")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(DATA), default="emoji32")
    parser.add_argument("--output_dir", type=Path, required=True, help="A new folder for the models and the figures.")
    parser.add_argument("--max_train_steps", type=int, default=30, help="Steps of each arm.")
    return parser.parse_args(argv)


def measure_peak(size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a product of two large matrices in float32, the best of some."""
    one, other, times = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(repeats):
        began = time.process_time()
        one @ other
        times.append(time.process_time() - began)
    return 2 * size**3 / min(times)


def count_flops(folder: Path, teacher: DualRatePipeline | None) -> float:
    """FLOPs of the training for each image, of a model just trained; those of a student's steps behind its first phase."""
    pipe, recipe = DualRatePipeline.from_pretrained(folder), Configuration.from_json(read_json(folder / FILE)).recipe
    if teacher is None:
        return training_image_flops(pipe.denoiser, pipe.context_encoder, recipe)
    phases = distillation_image_flops(pipe.denoiser, pipe.context_encoder, teacher.denoiser, recipe)
    return (phases["auxiliary"] + phases["student"]) / 2


def measure(args: argparse.Namespace, name: str, script, *more: object) -> dict:
    """Train an arm under a profile, and read from it where the time of a step goes."""
    folder, preset = args.output_dir / name, LETTERS if args.preset == "letters16" else args.preset
    flags = [
        "--preset",
        preset,
        "--dataset_name",
        DATA[args.preset],
        "--label_column",
        "label",
        "--output_dir",
        folder,
    ]
    flags += ["--max_train_steps", args.max_train_steps, "--validation_steps", 0, *more]
    peak, profile = measure_peak(), cProfile.Profile(time.thread_time, builtins=False)
    with open(args.output_dir / "log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        parsed = script.parse_args(list(map(str, flags)))
        profile.runcall(script.main, parsed, open_images)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined] (it has no stub)
    loop = Path(script.__file__).name

    def seconds_of(functions, by: tuple[str, ...] = ()) -> float:
        """Time of functions and all that they call; with `by` only as those functions of the script call them."""
        total = 0.0
        for (file, _, function), (_, _, _, seconds, callers) in stats.items():
            if any(file.endswith(ending) and function == known for ending, known in functions):
                called = [
                    times[3] for (caller, _, name), times in callers.items() if caller.endswith(loop) and name in by
                ]
                total += sum(called) if by else seconds
        return total

    parts = {part: seconds_of(functions) for part, functions in PARTS.items()}
    parts["forward passes and losses"] = seconds_of(PARTS["forward passes and losses"], ("train", "look"))
    # The first draws are made on this thread. So all others, which another thread makes, are taken to cost as much.
    first = seconds_of([(loop, "draw_rows")])
    parts["images and augmentation"] -= first
    parts["draws"] = args.max_train_steps * first
    saved = seconds_of([("checkpoints.py", "save_checkpoint")])
    parts["checks and logging"] -= saved
    outside = saved + seconds_of(OUTSIDE) + seconds_of([(loop, "__init__")], ("train",))  # of the check of a student
    whole = seconds_of([(loop, "train")]) - outside - first + parts["draws"]
    batch = Configuration.from_json(read_json(folder / FILE)).recipe.train_batch_size
    teacher = DualRatePipeline.from_pretrained(args.output_dir / "single-rate") if script is distill else None
    speed, cost = batch * args.max_train_steps / whole, count_flops(folder, teacher)
    shares = {part: seconds / whole for part, seconds in parts.items()}
    shares["rest"] = 1 - sum(shares.values())
    return {
        "arm": name,
        "batch": batch,
        "images_per_second": speed,
        "flops_per_image": cost,
        "peak_flops": peak,
        "share_of_peak": speed * cost / peak,
        "shares": shares,
    }


def main(args: argparse.Namespace) -> list[dict]:
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} exists: give a new folder.")
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True)
    late = ["--context_from", 0.75, "--context_dropout", 0.1]
    student = ["--teacher", args.output_dir / "single-rate", "--override", "distillation.pretraining_steps=0"]
    rows = []
    for name, script, more in (
        ("single-rate", train_single_rate, []),
        ("pair", train_dual_rate, []),
        ("pair, late contexts", train_dual_rate, late),
        ("student", distill, student),
    ):
        rows.append(measure(args, name, script, *more))
        print(json.dumps(rows[-1]), flush=True)
    (args.output_dir / "training-time.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(parse_args())
