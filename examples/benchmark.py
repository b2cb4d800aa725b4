"""Time whole sampling loops, and show what of the fewer FLOPs of a pair is left as time.

    python examples/benchmark.py --preset emoji32 --num_inference_steps 12 --num_context_steps 4
    python examples/benchmark.py --preset imagenet64 --device cuda --dtype bfloat16 --modes eager compiled graphs \
        --batch_size 1 8 64 --num_inference_steps 32 --num_context_steps 4 --solver_steps 8 --student_steps 8 2 --output benchmark.json --chart benchmark.png

Weights do not matter to time, so the networks come from a preset, untrained. Arms are interleaved: the heavy network alone,
the pair, and where they are asked for the heavy network in a few steps of DPM-Solver++, under a cache of diffusers, and the
students of both. On a CPU times are process time on one thread, the lower quartile over repeats, since on a shared machine
wall time would say little. On an accelerator they are wall time, the median, with its queue empty before and after each loop.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.flags import HelpFormatter

MODES = ("eager", "compiled", "graphs")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--preset", required=True, help="Preset, or configuration.json of a run, whose networks are timed."
    )
    parser.add_argument(
        "--batch_size", type=int, nargs="+", default=[16], help="Images of a loop, one size or several."
    )
    parser.add_argument("--num_inference_steps", type=int, default=64, help="N, the number of steps.")
    parser.add_argument("--num_context_steps", type=int, default=8, help="K, how many of them refresh the context.")
    parser.add_argument(
        "--solver_steps", type=int, help="Time the heavy network in so many steps of DPM-Solver++, too."
    )
    parser.add_argument(
        "--student_steps",
        type=int,
        nargs=2,
        metavar=("N", "K"),
        help="Time students, too: the pair in N steps with K refreshes, and the heavy network in N.",
    )
    parser.add_argument(
        "--cache_interval",
        type=int,
        help="Time the heavy network under TaylorSeer and Pyramid Attention Broadcast of diffusers, too, at this interval.",
    )
    parser.add_argument("--repeats", type=int, default=20, help="Loops of each arm.")
    parser.add_argument("--device", default="cpu", help="Where the loops run.")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Precision of the networks."
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["eager"],
        help="How networks run: kernel by kernel, compiled to one graph each, or as CUDA graphs.",
    )
    parser.add_argument("--output", help="JSON file to write: every figure, with its command, commit and hardware.")
    parser.add_argument("--chart", help="Picture to write: times less time beside times fewer FLOPs.")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error("argument --repeats: a spread needs at least 2")
    args.batch_size, args.modes = list(dict.fromkeys(args.batch_size)), list(dict.fromkeys(args.modes))
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import copy
import json
import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from accelerate import Accelerator
from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.arguments import find_preset, read_preset
from diffusers_dualrate.configuration import Networks, is_of_host
from diffusers_dualrate.flops import image_flops
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.provenance import environment
from diffusers_dualrate.ranges import check_integer
from diffusers_dualrate.records import build
from diffusers_dualrate.refreshes import plan_refreshes
from diffusers_dualrate.steps import make_dpm_solver

PRESETS = Path(__file__).with_name("presets")
CACHES = {  # of diffusers, by the interval of what they compute anew
    "taylorseer": lambda interval, pipe: TaylorSeerCacheConfig(cache_interval=interval),
    "pab": lambda interval, pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


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

    def reset(self):
        self.seconds, self.evaluations = 0.0, 0

    def _start(self, *_):
        self._started = time.process_time()

    def _stop(self, *_):
        self.seconds += time.process_time() - self._started

    def _count(self, *_):
        self.evaluations += 1


class Replays:
    """The same of networks in graphs, which call no hooks."""

    seconds = 0.0

    def __init__(self, pipe):
        self._pipe, self._before = pipe, 0

    def reset(self):
        self._before = self._pipe.cuda_graphs.num_replays

    @property
    def evaluations(self):
        return self._pipe.cuda_graphs.num_replays - self._before


@dataclass
class Arm:
    """One way to make an image: K evaluations of the heavy network and N of the light one, or N of one network."""

    name: str
    mode: str
    pipe: DualRatePipeline
    n: int
    k: int  # 0 for a network alone
    watch: Stopwatch | Replays

    def sample(self, batch_size):
        plan = {"num_context_steps": self.k} if self.k else {}
        self.pipe(batch_size=batch_size, num_inference_steps=self.n, output_type="latent", **plan)

    def count_flops(self):
        networks = self.pipe.denoiser, self.pipe.context_encoder
        if self.pipe.denoiser.is_cache_enabled:  # which leaves out what it pleases
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which it counts in full
                self.sample(1)
            return counter.get_total_flops()
        return image_flops(*networks, num_inference_steps=self.n, num_context_steps=self.k)


def read_clock(device):
    """Seconds: of this process on a CPU, else of the wall once all that was queued is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def check(args, device):
    """Refuse what cannot be timed, before any network is made."""
    for batch_size in args.batch_size:
        check_integer("batch_size", batch_size, least=1)
    check_integer("num_inference_steps", args.num_inference_steps, least=1)
    plan_refreshes(args.num_inference_steps, args.num_context_steps)
    if args.student_steps:
        plan_refreshes(*args.student_steps)
    if args.solver_steps is not None:
        check_integer("solver_steps", args.solver_steps, 1, 1000)
    if args.cache_interval is not None:
        check_integer("cache_interval", args.cache_interval, least=2)
    if "graphs" in args.modes and device.type != "cuda":
        raise ValueError(f"--modes graphs needs a CUDA device, got {args.device!r}.")
    for flag, path, ending in (("--output", args.output, ".json"), ("--chart", args.chart, ".png")):
        if path is not None and not (path.endswith(ending) and Path(path).parent.is_dir()):
            raise ValueError(f"{flag} must be a file ending in {ending} in a folder that is there, got {path!r}.")


def make_arms(args, networks, device):
    """All arms, the networks of each mode their own."""
    scheduler = DualRateScheduler(**networks.scheduler)
    shape, denoiser = networks.context_encoder, UViTDenoiser(**networks.denoiser)
    if is_of_host(shape):  # as the configuration.json of a run has it
        encoder = HostNetwork.from_description(shape)
        heavy = HostNetwork.from_denoiser(encoder, ())
    else:
        heavy, encoder = UViTDenoiser(**{**shape, **SINGLE_RATE}), UViTContextEncoder(**shape)
    parts = [part.eval().to(device) for part in (heavy, encoder, denoiser)]
    if args.dtype != "float32":  # the host warns of every cast
        parts = [part.to(dtype=getattr(torch, args.dtype)) for part in parts]
    defaults = {"num_inference_steps": args.num_inference_steps, "guidance_scale": 1.0}
    arms = []
    for mode in args.modes:
        heavy, encoder, denoiser = (copy.deepcopy(part) for part in parts)
        n, k = args.num_inference_steps, args.num_context_steps
        alone = DualRatePipeline(heavy, scheduler, **defaults)
        pair = DualRatePipeline(denoiser, scheduler, encoder, num_context_steps=k, **defaults)
        pipes = {"single-rate": (alone, n, 0), "dual-rate": (pair, n, k)}
        if args.solver_steps:
            solved = DualRatePipeline(heavy, make_dpm_solver(scheduler), **defaults)
            pipes["single-rate dpmsolver++"] = solved, args.solver_steps, 0
        if args.student_steps:
            pipes["single-rate student"] = alone, args.student_steps[0], 0
            pipes["dual-rate student"] = pair, *args.student_steps
        for name in CACHES if args.cache_interval and mode == "eager" else ():  # caches leave a whole graph
            pipe = DualRatePipeline(copy.deepcopy(heavy), scheduler, **defaults)
            try:
                pipe.denoiser.enable_cache(CACHES[name](args.cache_interval, pipe))
                pipes[f"single-rate {name}"] = pipe, n, 0
            except ValueError as error:  # of a network without attention
                print(f"Left out: single-rate {name}. {error}")
        present = dict.fromkeys(part for pipe, *_ in pipes.values() for part in (pipe.context_encoder, pipe.denoiser))
        present = [network for network in present if network is not None]
        watch = None if mode == "graphs" else Stopwatch(*present, on_cpu=device.type == "cpu")
        for network in present if mode == "compiled" else ():
            # Not `network.compile()`, which would take the hooks in, too.
            network.forward = torch.compile(network.forward, fullgraph=True, dynamic=False)
        for name, (pipe, steps, refreshes) in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            if mode == "graphs" and pipe.cuda_graphs is None:
                pipe.enable_cuda_graphs()
            arms.append(Arm(name, mode, pipe, steps, refreshes, watch or Replays(pipe)))
    return arms


def time_arms(args, arms, batch_size, device):
    """A row of figures for each arm, all of them timed in turns."""
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    rows, totals, inside = [], [[] for _ in arms], [[] for _ in arms]
    for arm in arms:  # to warm up
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        arm.sample(batch_size)
        read_clock(device)  # until all is done
        row = {"arm": arm.name, "mode": arm.mode, "batch_size": batch_size, "N": arm.n, "K": arm.k}
        row |= {"first_seconds": time.perf_counter() - began, "flops": arm.count_flops()}
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if on_cuda else None
        rows.append(row)
    for _ in tqdm(range(args.repeats)):
        for i, arm in enumerate(arms):
            arm.watch.reset()
            started = read_clock(device)
            arm.sample(batch_size)
            totals[i].append(read_clock(device) - started)
            if arm.watch.evaluations != arm.n + arm.k:
                raise RuntimeError(f"{arm.name} made {arm.watch.evaluations} evaluations instead of {arm.n + arm.k}.")
            inside[i].append(arm.watch.seconds)
    for row, total, within in zip(rows, totals, inside, strict=True):
        tenths = quantiles(total, n=10)
        row["seconds"] = quantiles(total, n=4)[0] if on_cpu else median(total)
        row |= {"p10": tenths[0], "p90": tenths[-1], "ms_per_image": 1000 * row["seconds"] / batch_size}
        shares = [(whole - net) / net for whole, net in zip(total, within, strict=True) if net > 0]
        row["overhead"] = median(shares) if shares else None
    heavy = {row["mode"]: row for row in rows if row["arm"] == "single-rate"}
    for row in rows:
        row["times_fewer_flops"] = heavy[row["mode"]]["flops"] / row["flops"]
        row["times_less_time"] = heavy[row["mode"]]["seconds"] / row["seconds"]
        row["share"] = row["times_less_time"] / row["times_fewer_flops"]
    return rows


def print_table(rows):
    """One line for each arm, and the best size of a batch for each."""
    print(f"\n{'arm':24}{'mode':>9}{'batch':>6}{'N/K':>7}{'ms/image':>10}{'p10':>8}{'p90':>8}{'GFLOP':>8}", end="")
    print(f"{'fewer FLOPs':>12}{'less time':>10}{'share':>7}{'loop':>7}{'first s':>8}{'MiB':>7}")
    for row in rows:
        scale, steps = 1000 / row["batch_size"], f"{row['N']}/{row['K'] or '-'}"
        print(f"{row['arm']:24}{row['mode']:>9}{row['batch_size']:>6}{steps:>7}{row['ms_per_image']:>10.2f}", end="")
        print(f"{row['p10'] * scale:>8.2f}{row['p90'] * scale:>8.2f}{row['flops'] / 1e9:>8.3f}", end="")
        print(f"{row['times_fewer_flops']:>12.2f}{row['times_less_time']:>10.2f}{row['share']:>7.0%}", end="")
        loop, mebibytes = row["overhead"], row["peak_bytes"]
        print("      -" if loop is None else f"{loop:>7.1%}", f"{row['first_seconds']:>7.1f}", end="")
        print("      -" if mebibytes is None else f"{mebibytes / 2**20:>7.0f}")
    print()
    for arm, mode in dict.fromkeys((row["arm"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["mode"]) == (arm, mode)]
        best = min(own, key=lambda row: row["ms_per_image"])
        print(f"{arm}, {mode}: best at batch {best['batch_size']}, {best['ms_per_image']:.2f} ms an image")


def draw_chart(record, path):
    """Times less time of each arm over the size of a batch, beside its times fewer FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = [row for row in record["rows"] if row["arm"] != "single-rate"]
    for i, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        for mode, style in zip(MODES, ("o-", "s--", "^:"), strict=True):
            own = [row for row in rows if (row["arm"], row["mode"]) == (arm, mode)]
            if own:
                axes.axhline(own[0]["times_fewer_flops"], color=f"C{i}", alpha=0.3)
                sizes, times = [row["batch_size"] for row in own], [row["times_less_time"] for row in own]
                axes.plot(sizes, times, style, color=f"C{i}", label=f"{arm}, {mode}")
    axes.set(xscale="log", xlabel="batch", ylabel="times less time (lines: fewer FLOPs)")
    axes.set_xticks(sorted({row["batch_size"] for row in rows}), labels=sorted({row["batch_size"] for row in rows}))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args):
    device = find_device(args.device)
    check(args, device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    path, parts = find_preset(args.preset, PRESETS), ("context_encoder", "denoiser", "scheduler")
    preset = read_preset(path, parts)
    networks = build(Networks, str(path), {name: preset[name] for name in parts})
    networks.check_pair()
    arms = make_arms(args, networks, device)
    kind = "process time on one thread" if device.type == "cpu" else f"wall time on {device}"
    rows = [row for batch_size in args.batch_size for row in time_arms(args, arms, batch_size, device)]
    print(f"\n{path.stem}, {args.dtype}, {', '.join(args.modes)}, {kind}, {args.repeats} repeats")
    print_table(rows)
    record = {"preset": path.stem, "dtype": args.dtype, "kind": kind, "repeats": args.repeats}
    record |= {"environment": environment(Accelerator(cpu=device.type == "cpu")), "rows": rows}
    if args.output:
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        draw_chart(record, args.chart)
    return record


if __name__ == "__main__":
    main(ARGS)
