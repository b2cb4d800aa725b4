"""Where figures come from: the command, the commit, the versions and the hardware that they were measured with."""

import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from . import __version__


def environment(accelerator: Accelerator) -> dict:
    """Command, commit, versions and hardware of this process, as a record keeps them."""
    commit = ""
    if git := shutil.which("git"):  # of the running script, wherever it is called from
        command = [git, "-C", str(Path(sys.argv[0]).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    packages = ("diffusers", "torch", "accelerate", "torchmetrics", "transformers", "numpy")
    versions = {name: version(name) for name in packages if find_spec(name)}
    hardware = accelerator.device.type
    if hardware == "cpu":
        hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    elif hardware == "cuda":
        hardware = torch.cuda.get_device_name(accelerator.device)
    main_module = sys.modules["__main__"].__spec__  # of `python -m`, and none of a script
    program = sys.argv[:1] if main_module is None else ["-m", main_module.name]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "commit": commit or None,
        "versions": {"diffusers-dualrate": __version__} | versions,
        "hardware": hardware,
        "processes": accelerator.num_processes,
    }
