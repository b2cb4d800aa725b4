"""The processes that a script runs in: how they are started, how many threads each computes with, how each ends.

A script ends through `run_script`:

    if __name__ == "__main__":
        run_script(main, parse_args())

With several processes the group of torch.distributed stays alive until all are done, and none takes it apart. Threads of
a gloo group free the tensors of finished work, for which they need the interpreter's lock. After
`destroy_process_group` DDP's reducer is the group's last owner. Its destructor joins those threads while it holds that
lock, so each waits for the other for ever. Instead, the processes wait for each other. Then the system ends each at once,
which frees whatever the group held.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import distributed

if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_SECONDS = 30.0
"""How long what was registered with `atexit` may take in one of several processes."""

FLOPS_PER_THREAD = 5e9
"""FLOPs of a call for each thread that it is given; it is given at least one.

On two busy cores a second thread made training steps slower: 3 times with the preset `emoji32` (8 GFLOP a call), 6 times
with `letters16`, 7 times with `digits8`, 13 times with `tiny`.
"""

_THREADS_AT_START = torch.get_num_threads()
_chosen = None


def check_launch(accelerator: "Accelerator") -> "Accelerator":
    """Refuse a launch that Accelerate takes for another one, and one that no script was made for; returns its argument.

    Raises:
        ValueError: If several processes were started and each believes that it is alone; if it runs DeepSpeed,
            Megatron-LM or the first FSDP; if it was told to run FSDP and does not, as on a CPU.
    """
    from accelerate.utils import DistributedType

    kind, started = accelerator.distributed_type, int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but Accelerate finds no GPU for each, and each would work alone: set "
            "ACCELERATE_USE_CPU=true for the CPU."
        )
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{kind.value} is not supported: choose DDP, or FSDP2 where the memory of one GPU is not enough."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and kind is not DistributedType.FSDP:
        raise ValueError("FSDP was asked for, but Accelerate runs it on GPUs only, and finds none here: choose DDP.")
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported: choose FSDP2, as examples/fsdp2.yaml does.")
    return accelerator


def choose_threads(flops: float) -> str:
    """Choose how many threads torch computes with on the CPU, by what a network can use, unless the user has chosen.

    Threads wait for each other at every operation, and they spin while they wait. So too many of them are slower than
    one as soon as anything else runs on the machine. The number depends on the network and the machine alone, never on
    what else is running: it may change the last bits of a result.

    Args:
        flops: FLOPs of one call of the largest network, over all rows of this process's batch.

    Returns:
        A sentence that says how many threads there are and why.
    """
    global _chosen
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name):
            return f"threads: {threads}, as {name} says"
    if threads not in (_THREADS_AT_START, _chosen):
        return f"threads: {threads}, as torch.set_num_threads was told"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this run on this machine
    most = max(1, min(_THREADS_AT_START, cores // processes))
    _chosen = max(1, min(most, int(flops / FLOPS_PER_THREAD)))
    torch.set_num_threads(_chosen)
    each = f" for each of {processes} processes" if processes > 1 else ""
    reason = f"since the largest network takes {flops / 1e9:.2g} GFLOP a call"
    return f"threads: {_chosen} of {cores} cores{each}, {reason}; OMP_NUM_THREADS sets another number"


def leave_signals(worker: int) -> None:
    """Lets a data worker survive the first signal, sent to all processes of a job. The second, at the run's end, ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def run_script(main: Callable[[Any], Any], args: Any) -> NoReturn:
    """Run a script's `main(args)` and end this process with its exit status.

    An integer that `main` returns is the status; anything else is success. One of several processes ends within
    `EXIT_SECONDS` of the moment when all are done or its own `main` has failed. One that failed does not wait for the
    others: their next word to it fails, and they end, too.
    """
    try:
        result = main(args)
        status = result if isinstance(result, int) else 0
        if _is_one_of_several():
            distributed.barrier()  # none leaves while another may still wait for its word
    except BaseException as error:
        if not _is_one_of_several():
            raise
        status = _tell(error)
    if _is_one_of_several():
        _end_at_once(status)
    raise SystemExit(status)


def _is_one_of_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _tell(error: BaseException) -> int:
    """Prints an error as the interpreter does; returns the exit status that it would have given."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, distributed.DistError) or "gloo" in str(error):
        error.add_note("Another process of this run failed, was killed or no longer answers: see what it said last.")
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


def _end_at_once(status: int) -> NoReturn:
    """Ends this process without taking torch.distributed apart."""
    timer = threading.Timer(EXIT_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
    atexit._run_exitfuncs()  # loggers, temporary folders, data workers
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
