"""How much of a pair's gain in FLOPs is left as time: sampling loops of three presets, timed on one CPU core.

    python -m research.timing

writes `timing.json`. Rows that an accelerator gave stay as they are: they come from `examples/benchmark.py` there, and
their command is theirs.
"""

import json
import platform
import subprocess
from pathlib import Path

import torch

from . import EXAMPLES

TIMING = Path(__file__).with_name("timing.json")
CASES = [  # preset, N, K, batch, repeats
    ("imagenet64", 4, 1, 1, 3),
    ("emoji32", 12, 4, 16, 20),
    ("digits8", 8, 4, 16, 20),
]


def time_case(preset: str, n: int, k: int, batch: int, repeats: int) -> dict:
    """One row: milliseconds per image of a pair and of as many steps of its heavy network."""
    import benchmark  # found in examples/, which the package's import puts on the path

    flags = ["--batch_size", batch, "--num_inference_steps", n, "--num_context_steps", k, "--repeats", repeats]
    record = benchmark.main(
        benchmark.parse_args(["--preset", str(EXAMPLES / "presets" / f"{preset}.json"), *map(str, flags)])
    )
    heavy, pair = record["rows"]
    return {
        "where": f"`{preset}`, CPU, batch {batch}",
        "N": n,
        "K": k,
        "pair_ms": pair["ms_per_image"],
        "heavy_ms": heavy["ms_per_image"],
        "times_fewer_flops": pair["times_fewer_flops"],
        "command": f"python examples/benchmark.py --preset examples/presets/{preset}.json {' '.join(map(str, flags))}",
        "hardware": f"{platform.machine()}, 1 thread, float32, process time, lower quartile",
        "versions": {"torch": torch.__version__},
    }


def main():
    kept = [row for row in json.loads(TIMING.read_text(encoding="utf-8"))["rows"] if "CPU" not in row["where"]]
    rows = [time_case(*case) for case in CASES]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    rows = [*(row | {"commit": commit} for row in rows), *kept]
    TIMING.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
