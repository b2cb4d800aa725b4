"""How many threads a script's processes compute with, and how they end."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from diffusers_dualrate import processes
from diffusers_dualrate.processes import FLOPS_PER_THREAD, check_launch, choose_threads

SOURCE = Path(processes.__file__).parents[1]


@pytest.fixture
def threads(monkeypatch):
    """Start with a number of threads, and as many cores, that nobody asked for; the test's own number comes back."""
    before = torch.get_num_threads()

    def start(number):
        torch.set_num_threads(number)
        monkeypatch.setattr(processes, "_THREADS_AT_START", number)
        monkeypatch.setattr(processes, "_chosen", None)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)), raising=False)

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield start
    torch.set_num_threads(before)


@pytest.mark.parametrize(("flops", "expected"), [(0, 1), (FLOPS_PER_THREAD, 1), (2 * FLOPS_PER_THREAD, 2), (1e15, 4)])
def test_a_network_gets_a_thread_for_each_share_of_its_flops_and_no_more_than_there_are_cores(
    threads, flops, expected
):
    threads(4)
    assert choose_threads(flops).startswith(f"threads: {expected} of 4 cores,")
    assert torch.get_num_threads() == expected


def test_two_processes_share_the_cores_of_their_machine(threads, monkeypatch):
    threads(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_threads(1e15).startswith("threads: 2 of 4 cores for each of 2 processes,")
    assert torch.get_num_threads() == 2


def test_a_second_run_in_one_process_chooses_again(threads):
    threads(4)
    choose_threads(0)
    assert choose_threads(2 * FLOPS_PER_THREAD).startswith("threads: 2 ")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_set_in_the_environment_stays(threads, monkeypatch, name):
    threads(4)
    monkeypatch.setenv(name, "4")
    assert choose_threads(0) == f"threads: 4, as {name} says"
    assert torch.get_num_threads() == 4


def test_what_the_user_told_torch_stays(threads):
    threads(4)
    torch.set_num_threads(3)
    assert choose_threads(0) == "threads: 3, as torch.set_num_threads was told"
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("started", "kind", "number", "said"),
    [
        ({"WORLD_SIZE": "2"}, "NO", 1, "2 processes were started, but Accelerate finds no GPU for each"),
        ({"ACCELERATE_USE_FSDP": "true"}, "NO", 1, "FSDP was asked for, but Accelerate runs it on GPUs only"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "MULTI_CPU", 2, "FSDP was asked for"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "FSDP", 2, "FSDP of version 1 is not supported"),
        ({}, "DEEPSPEED", 1, "DEEPSPEED is not supported: choose DDP, or FSDP2"),
        ({}, "MEGATRON_LM", 1, "MEGATRON_LM is not supported: choose DDP, or FSDP2"),
    ],
)
def test_a_launch_that_would_run_something_else_than_it_says_is_refused(monkeypatch, started, kind, number, said):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=number, is_fsdp2=False)
    with pytest.raises(ValueError, match=said):
        check_launch(accelerator)


def end(code):
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\nfrom diffusers_dualrate.processes import run_script\n{code}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_script_alone_ends_with_what_its_main_returned_or_raised():
    assert end("run_script(lambda args: args, 143)").returncode == 143
    assert end("run_script(lambda args: {'a': args}, 1)").returncode == 0
    failed = end("def main(args): raise ValueError(f'{args} is no number')\nrun_script(main, 'x')")
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: x is no number\n")
