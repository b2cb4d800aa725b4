"""A long run of a tiny network under faults, held against the same run without any: the final weights must be equal.

    python -m research.long_run --output_dir /tmp/long-run

The second run is killed and its disk fills, in turns, at random moments. What stands for a full disk is a limit of the
system: it refuses what a file of a checkpoint has beyond a random size. The run is started again each time, with
`--resume_from_checkpoint latest`. Its clock jumps, and so do the times of its files. It has ended when it ends by itself.
Then every file of its last checkpoint must be that of the first run, bit for bit. A run without a fault of each kind
proves nothing, and fails.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import train_single_rate
from diffusers_dualrate.checkpoints import list_checkpoints
from diffusers_dualrate.processes import run_script

from . import EXAMPLES

NETWORK = {"level_channels": [8], "level_types": ["res"], "level_blocks": [1], "embedding_dim": 8}
FAULTS = ("kill", "full disk")
SIZES = 500, 30_000  # bytes of the smallest and the largest file of a checkpoint, about
WEEK = 7 * 24 * 3600.0

# What forks after this has everything imported, and has computed nothing.
PROCESSES = multiprocessing.get_context("fork")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where both runs are kept.")
    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--checkpointing_steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=4.0, help="Mean time from a checkpoint to the next fault.")
    parser.add_argument("--seed", type=int, default=0, help="Of the faults.")
    return parser.parse_args(argv)


def make_images(folder: Path) -> None:
    """Twenty made-up images in two classes."""
    rng = np.random.default_rng(0)
    for i in range(20):
        (path := folder / "ab"[i % 2] / f"{i}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def flags_of(args: argparse.Namespace, name: str) -> list[str]:
    """What a run is told; both are told the same, except for their folder."""
    flags = ["--preset", str(EXAMPLES / "presets/tiny.json"), "--train_data_dir", str(args.output_dir / "images")]
    flags += ["--label_column", "label", "--resolution", "8", "--validation_steps", "0"]
    flags += ["--max_train_steps", str(args.max_train_steps), "--output_dir", str(args.output_dir / name)]
    flags += ["--checkpointing_steps", str(args.checkpointing_steps), "--checkpoints_total_limit", "3"]
    overrides = [f"context_encoder.{key}={json.dumps(value)}" for key, value in NETWORK.items()]
    overrides += ["context_encoder.context_channels=[8]", "denoiser.level_channels=[8]"]
    overrides += ['denoiser.level_types=["res"]', "denoiser.level_blocks=[1]", "denoiser.context_channels=[8]"]
    return [*flags, "--resume_from_checkpoint", "latest", "--override", *overrides]


def train(flags: list[str], log: Path, jumps: int | None) -> None:
    """Body of a child: a run, whose clock jumps to and fro by up to a week where a seed of the jumps is given."""
    # Through another process: else a limit on files would hold for the log, and end the run there.
    writer = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    sys.stdout = sys.stderr = writer.stdin
    if jumps is not None:
        tell, chance = time.time, random.Random(jumps)
        time.time = lambda: tell() + chance.uniform(-WEEK, WEEK)
    run_script(lambda argv: train_single_rate.main(train_single_rate.parse_args(argv)), flags)


def let_jump(folder: Path, chance: random.Random) -> None:
    """Give files the times that a jumping clock would have left."""
    for path in folder.glob("checkpoint-*/*"):
        os.utime(path, (chance.uniform(0, 2e9),) * 2)
        os.utime(path.parent, (chance.uniform(0, 2e9),) * 2)


def train_under_faults(args: argparse.Namespace) -> Counter:
    """Run to the end, through kills and a disk that fills; returns how often each happened."""
    chance, happened, folder = random.Random(args.seed), Counter(), args.output_dir / "faulty"
    flags = flags_of(args, "faulty")
    for fault in itertools.cycle(FAULTS):
        log = args.output_dir / "faulty.log"
        told = log.stat().st_size if log.exists() else 0
        child = PROCESSES.Process(target=train, args=(flags, log, chance.randrange(2**32)))
        before = list_checkpoints(folder)[-1:]
        child.start()
        while list_checkpoints(folder)[-1:] == before and child.is_alive():
            time.sleep(0.01)
        child.join(chance.expovariate(1 / args.seconds))
        if child.is_alive():
            if fault == "kill":
                os.kill(child.pid, signal.SIGKILL)
            else:
                limit = int(math.exp(chance.uniform(*map(math.log, SIZES))))
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            child.join()
            if fault == "full disk" and child.exitcode and "could not be written" not in log.read_text()[told:]:
                fault = "full disk, elsewhere"
            happened[fault if child.exitcode else f"{fault}, too late"] += 1
        if child.exitcode == 0:
            return happened
        if child.exitcode not in (1, -signal.SIGKILL):
            raise SystemExit(f"A run ended with {child.exitcode}: see {log}.")
        found = list_checkpoints(folder)
        print(f"{dict(happened)}: goes on from {found[-1].name if found else 'the beginning'}", flush=True)
        let_jump(folder, chance)
    raise AssertionError("the cycle has no end")


def main(args: argparse.Namespace) -> None:
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} exists: give a new folder.")
    make_images(args.output_dir / "images")
    whole = PROCESSES.Process(target=train, args=(flags_of(args, "whole"), args.output_dir / "whole.log", None))
    whole.start()
    whole.join()
    if whole.exitcode:
        raise SystemExit(f"The run without faults ended with {whole.exitcode}: see {args.output_dir / 'whole.log'}.")
    happened = train_under_faults(args)
    one, other = (
        json.loads((args.output_dir / name / f"checkpoint-{args.max_train_steps}/hashes.json").read_text())
        for name in ("whole", "faulty")
    )
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{args.max_train_steps:,} steps, faults: {dict(happened)}; files that differ: {differing or 'none'}")
    if missing := [fault for fault in FAULTS if not happened[fault]]:
        raise SystemExit(f"Nothing is proved, since there was no {' and no '.join(missing)}: lower --seconds.")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parse_args())
