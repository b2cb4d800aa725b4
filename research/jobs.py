"""Jobs that run side by side, each leaving what it found in a file: so a study can stop and go on."""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch


def digest(configuration) -> str:
    """A short name of a configuration, the same on every machine."""
    return hashlib.blake2b(json.dumps(configuration, sort_keys=True).encode(), digest_size=6).hexdigest()


def write_json(path: Path, content) -> None:
    """Write a file that has its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{multiprocessing.current_process().pid}.partial")
    partial.write_text(json.dumps(content, indent=0, separators=(",", ":")) + "\n")  # a value a line, no blanks
    partial.replace(path)


def run_job(args, function: Callable, *key) -> float:
    """Run one job with its output in a log file; returns seconds."""
    start, log = time.monotonic(), Path(args.work_dir, "logs", "-".join(map(str, key)) + f"-{function.__name__}.log")
    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        function(args, *key)
    return time.monotonic() - start


def stop_workers(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """End the jobs of a study that is stopped: trainings save a checkpoint first, as they do whenever they are stopped."""
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in multiprocessing.active_children():
        worker.terminate()


def run_jobs(args, function: Callable, keys: list[tuple]) -> None:
    """Run jobs side by side; one that fails does not stop the others, but the study at the end."""
    failures = []
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        if args.jobs > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context))
            stack.push(lambda error, *_: error is not None and stop_workers(pool))
            futures = {pool.submit(run_job, args, function, *key): key for key in keys}
            finished = ((futures[future], future.result) for future in concurrent.futures.as_completed(futures))
        else:
            finished = ((key, lambda key=key: run_job(args, function, *key)) for key in keys)
        for key, result in finished:
            try:
                print(f"{function.__name__} {' '.join(map(str, key))}: {result():.0f} s", flush=True)
            except Exception as error:  # noqa: BLE001 (reported below, after what can still be done is done)
                failures.append(f"{' '.join(map(str, key))}: {error!r}")
                print(f"failed: {failures[-1]}", flush=True)
    if failures:
        raise RuntimeError(f"{len(failures)} jobs of {len(keys)} failed, the first being {failures[0]}")
