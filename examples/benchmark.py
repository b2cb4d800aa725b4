"""Time whole sampling loops, and show what the loop costs beside its networks.

    python examples/benchmark.py --preset examples/presets/emoji32.json

Weights do not matter to time, so the networks come from a preset, untrained. Times are process time on one thread, the
lower quartile over repeats, arms interleaved; on a shared machine wall time would say little.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.flops import image_flops
from diffusers_dualrate.models import SINGLE_RATE


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=64)
    parser.add_argument("--num_context_steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(argv)


class Stopwatch:
    """Process time spent inside networks, and how often they were evaluated."""

    def __init__(self, *networks):
        self.seconds, self.evaluations, self._started = 0.0, 0, 0.0
        for network in networks:
            network.register_forward_pre_hook(self._start)
            network.register_forward_hook(self._stop)
            network.register_forward_hook(self._count)
            # The denoiser projects a context in a method of its own, beside its forward pass.
            for projection in getattr(network, "context_proj", ()):
                projection.register_forward_pre_hook(self._start)
                projection.register_forward_hook(self._stop)

    def _start(self, *_):
        self._started = time.process_time()

    def _stop(self, *_):
        self.seconds += time.process_time() - self._started

    def _count(self, *_):
        self.evaluations += 1


def main(args):
    torch.set_num_threads(1)
    preset = json.loads(Path(args.preset).read_text())
    scheduler = DualRateScheduler(**preset["scheduler"])
    heavy = UViTDenoiser(**{**preset["context_encoder"], **SINGLE_RATE}).eval()
    encoder, denoiser = UViTContextEncoder(**preset["context_encoder"]), UViTDenoiser(**preset["denoiser"])
    arms = {
        "dual-rate": DualRatePipeline(denoiser.eval(), scheduler, encoder.eval()),
        "single-rate": DualRatePipeline(heavy, scheduler),
    }
    n, k = args.num_inference_steps, args.num_context_steps
    steps = {"dual-rate": {"num_context_steps": k}, "single-rate": {}}
    expected = {"dual-rate": n + k, "single-rate": n}
    watches = {
        name: Stopwatch(*[net for net in (pipe.context_encoder, pipe.denoiser) if net is not None])
        for name, pipe in arms.items()
    }
    totals, inside = {name: [] for name in arms}, {name: [] for name in arms}
    for repeat in tqdm(range(args.repeats + 1)):  # the first warms up
        for name, pipe in arms.items():
            pipe.set_progress_bar_config(disable=True)
            watch = watches[name]
            watch.seconds, watch.evaluations = 0.0, 0
            started = time.process_time()
            pipe(batch_size=args.batch_size, num_inference_steps=n, output_type="latent", **steps[name])
            total = time.process_time() - started
            if watch.evaluations != expected[name]:
                raise RuntimeError(f"{name} made {watch.evaluations} evaluations instead of {expected[name]}.")
            if repeat:
                totals[name].append(total)
                inside[name].append(watch.seconds)

    report = {}
    print(f"\nbatch {args.batch_size}, N = {n}, K = {k}, process time on one thread\n")
    print(f"{'':14}{'seconds':>9}{'p10':>8}{'p90':>8}{'GFLOP/image':>13}{'outside the networks':>22}")
    for name, pipe in arms.items():
        tenths, quartiles = quantiles(totals[name], n=10), quantiles(totals[name], n=4)
        overhead = median((total - net) / net for total, net in zip(totals[name], inside[name], strict=True))
        flops = image_flops(pipe.denoiser, pipe.context_encoder, num_inference_steps=n, num_context_steps=k)
        report[name] = {"seconds": quartiles[0], "flops": flops, "overhead": overhead}
        print(f"{name:14}{quartiles[0]:>9.3f}{tenths[0]:>8.3f}{tenths[-1]:>8.3f}{flops / 1e9:>13.3f}{overhead:>21.1%}")
    ratio = {key: report["single-rate"][key] / report["dual-rate"][key] for key in ("flops", "seconds")}
    print(f"\nDual-Rate needs {ratio['flops']:.2f}x fewer FLOPs and {ratio['seconds']:.2f}x less time.")
    return report


if __name__ == "__main__":
    main(parse_args())
