"""Time whole sampling loops, and show what the loop costs beside its networks.

    python examples/benchmark.py --preset examples/presets/emoji32.json
    python examples/benchmark.py --preset examples/presets/imagenet64.json --device cuda --dtype bfloat16 --compile

Weights do not matter to time, so the networks come from a preset, untrained. Arms are interleaved. On a CPU times are
process time on one thread, the lower quartile over repeats, since on a shared machine wall time would say little; on an
accelerator they are wall time, the median, with its queue empty before and after each loop.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.flags import HelpFormatter


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", required=True, help="File of a preset, whose networks are timed.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images of a loop.")
    parser.add_argument("--num_inference_steps", type=int, default=64, help="N, the number of steps.")
    parser.add_argument("--num_context_steps", type=int, default=8, help="K, how many of them refresh the context.")
    parser.add_argument("--repeats", type=int, default=20, help="Loops of each arm.")
    parser.add_argument("--device", default="cpu", help="Where the loops run.")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Precision of the networks."
    )
    parser.add_argument("--compile", action="store_true", help="Compile each network to one graph; timed apart.")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error("argument --repeats: a spread needs at least 2")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import time
from statistics import median, quantiles

import torch
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.arguments import find_preset, read_preset
from diffusers_dualrate.configuration import Networks
from diffusers_dualrate.flops import image_flops
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.ranges import check_integer
from diffusers_dualrate.records import build
from diffusers_dualrate.refreshes import plan_refreshes

PRESETS = Path(__file__).with_name("presets")


def find_device(name):
    """A device that is there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} is no device of this machine.") from error
    return device


class Stopwatch:
    """How often networks were evaluated and, on a CPU, the process time spent inside them."""

    def __init__(self, *networks, on_cpu):
        self.seconds, self.evaluations, self._started = 0.0, 0, 0.0
        for network in networks:
            if not on_cpu:  # its work is queued, and waiting for it here would slow the loop
                network.register_forward_hook(self._count)
                continue
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


def read_clock(device):
    """Seconds: of this process on a CPU, else of the wall once all that was queued is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def main(args):
    for name in ("batch_size", "num_inference_steps"):
        check_integer(name, getattr(args, name), least=1)
    plan_refreshes(args.num_inference_steps, args.num_context_steps)
    device = find_device(args.device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    path, parts = find_preset(args.preset, PRESETS), ("context_encoder", "denoiser", "scheduler")
    preset = read_preset(path, parts)
    networks = build(Networks, str(path), {name: preset[name] for name in parts})
    networks.check_pair()
    scheduler = DualRateScheduler(**networks.scheduler)
    heavy = UViTDenoiser(**{**networks.context_encoder, **SINGLE_RATE}).eval()
    encoder, denoiser = UViTContextEncoder(**networks.context_encoder), UViTDenoiser(**networks.denoiser)
    n, k = args.num_inference_steps, args.num_context_steps
    defaults = {"num_inference_steps": n, "guidance_scale": 1.0}
    arms = {
        "dual-rate": DualRatePipeline(denoiser.eval(), scheduler, encoder.eval(), num_context_steps=k, **defaults),
        "single-rate": DualRatePipeline(heavy, scheduler, **defaults),
    }
    steps = {"dual-rate": {"num_context_steps": k}, "single-rate": {}}
    expected = {"dual-rate": n + k, "single-rate": n}
    watches, flops = {}, {}
    for name, pipe in arms.items():
        flops[name] = image_flops(pipe.denoiser, pipe.context_encoder, num_inference_steps=n, num_context_steps=k)
        networks = [network for network in (pipe.context_encoder, pipe.denoiser) if network is not None]
        watches[name] = Stopwatch(*networks, on_cpu=on_cpu)
        pipe.to(device, getattr(torch, args.dtype)).set_progress_bar_config(disable=True)
        for network in networks if args.compile else ():
            # Not `network.compile()`, which would take the hooks in, too.
            network.forward = torch.compile(network.forward, fullgraph=True)

    def sample(name):
        arms[name](batch_size=args.batch_size, num_inference_steps=n, output_type="latent", **steps[name])

    began = time.perf_counter()
    for name in arms:  # to warm up
        sample(name)
    read_clock(device)  # until all is done
    began = time.perf_counter() - began
    totals, inside = {name: [] for name in arms}, {name: [] for name in arms}
    for _ in tqdm(range(args.repeats)):
        for name in arms:
            watch = watches[name]
            watch.seconds, watch.evaluations = 0.0, 0
            started = read_clock(device)
            sample(name)
            totals[name].append(read_clock(device) - started)
            if watch.evaluations != expected[name]:
                raise RuntimeError(f"{name} made {watch.evaluations} evaluations instead of {expected[name]}.")
            inside[name].append(watch.seconds)

    kind = "process time on one thread" if on_cpu else f"wall time on {device}"
    print(f"\nbatch {args.batch_size}, N = {n}, K = {k}, {args.dtype}{', compiled' * args.compile}, {kind}")
    print(f"warming up took {began:.0f} s\n")
    print(f"{'':14}{'seconds':>9}{'p10':>8}{'p90':>8}{'GFLOP/image':>13}{'outside the networks' * on_cpu:>22}")
    report = {}
    for name in arms:
        tenths = quantiles(totals[name], n=10)
        seconds = quantiles(totals[name], n=4)[0] if on_cpu else median(totals[name])
        report[name] = {"seconds": seconds, "flops": flops[name]}
        row = f"{name:14}{seconds:>9.3f}{tenths[0]:>8.3f}{tenths[-1]:>8.3f}{flops[name] / 1e9:>13.3f}"
        if on_cpu:
            shares = [(total - net) / net for total, net in zip(totals[name], inside[name], strict=True)]
            report[name]["overhead"] = median(shares)
            row += f"{report[name]['overhead']:>22.1%}"
        print(row)
    ratio = {key: report["single-rate"][key] / report["dual-rate"][key] for key in ("flops", "seconds")}
    print(f"\nDual-Rate needs {ratio['flops']:.2f}x fewer FLOPs and {ratio['seconds']:.2f}x less time.")
    return report


if __name__ == "__main__":
    main(ARGS)
