"""Checkpoints of a training run: finding, checking, saving and loading the folders `checkpoint-<step>`.

A checkpoint holds Accelerate's state, the EMA weights and what the run itself notes. It is written under a hidden name
and renamed when complete. To be removed, it is hidden by renaming first. So no visible checkpoint is ever incomplete. A
list of its files with their hashes tells a damaged one from a sound one before anything is loaded.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

PREFIX = "checkpoint-"
_HASHES, _NOTES, _EMA = "hashes.json", "notes.json", "ema.safetensors"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named like a complete checkpoint."""
    return path.name.startswith(PREFIX) and path.name.removeprefix(PREFIX).isdigit() and path.is_dir()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(filter(is_checkpoint, output_dir.glob(f"{PREFIX}*")), key=step_of)


def tell_last_good_state(output_dir: Path) -> str:
    """What the message of a run that ends by itself says of where to go on from."""
    checkpoints = list_checkpoints(output_dir)
    return f"the last good state is {checkpoints[-1]}" if checkpoints else "no checkpoint had been saved"


def step_of(checkpoint: Path) -> int:
    """Number of training steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix(PREFIX))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; `None` if each is as it was written."""
    try:
        hashes = json.loads((checkpoint / _HASHES).read_text())
    except (OSError, ValueError):
        return f"{_HASHES} is missing or damaged"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _hash(path) != expected:
            return f"{name} is damaged"
    return None


def find_newest(output_dir: Path) -> Path | None:
    """The newest sound checkpoint of a run; `None` if it has none at all.

    Damaged ones that are newer are reported and renamed `damaged-checkpoint-<step>`, and no longer count.

    Raises:
        ValueError: If there are checkpoints, and all are damaged.
    """
    found = list_checkpoints(output_dir)[::-1]
    for i, checkpoint in enumerate(found):
        damage = find_damage(checkpoint)
        if damage is None:
            for bad in found[:i]:
                set_aside(bad, "damaged")
            return checkpoint
        warnings.warn(f"The checkpoint {checkpoint} cannot be read: {damage}.", stacklevel=2)
    if found:
        raise ValueError(f"None of the {len(found)} checkpoints in {output_dir} can be read.")
    return None


def save_checkpoint(accelerator: Accelerator, ema: EMAModel, output_dir: Path, step: int, notes: dict) -> None:
    """Save everything a run needs to go on; called by all processes.

    Args:
        accelerator: Its prepared objects are saved.
        ema: Its weights are saved.
        output_dir: The run's folder, which all processes see.
        step: Number of steps done.
        notes: What else to remember, from the main process; JSON.

    Raises:
        OSError: If something could not be written, on any process; the earlier checkpoints are as they were.
    """
    partial, final = output_dir / f".{PREFIX}{step}", output_dir / f"{PREFIX}{step}"
    shadow = {}
    for i, parameter in enumerate(ema.shadow_params):
        whole = gather(parameter)
        if accelerator.is_main_process:  # the others give their share, and hold no more than one at a time
            shadow[str(i)] = whole.cpu().contiguous()
    error = None
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            save_file(shadow, partial / _EMA)
            (partial / _NOTES).write_text(json.dumps(notes) + "\n")
    # What a full disk looks like to Python, to torch and to safetensors.
    except (OSError, RuntimeError, SafetensorError) as caught:
        error = caught
    # Every process has written its part, or one has not.
    has_failed = agree_on_any(accelerator, error is not None)
    if not has_failed and accelerator.is_main_process:
        try:
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(partial)): _hash(path) for path in files}
            (partial / _HASHES).write_text(json.dumps(hashes, indent=2) + "\n")
            _remove(final)
            partial.rename(final)
        except OSError as caught:
            error = caught
    if agree_on_any(accelerator, has_failed or error is not None):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint of step {step} could not be written: {error or 'see the other processes'}; "
            f"{tell_last_good_state(output_dir)}."
        ) from error


def load_checkpoint(accelerator: Accelerator, ema: EMAModel, checkpoint: Path) -> None:
    """Restore the prepared networks, optimisers and learning rates, and the EMA weights.

    Raises:
        ValueError: If a file of the checkpoint does not fit this run.
    """
    if (is_spread := (checkpoint / f"{FSDP_MODEL_NAME}_0").exists()) != accelerator.is_fsdp2:
        kinds = ("with", "without") if is_spread else ("without", "with")
        raise ValueError(
            f"The checkpoint {checkpoint} was saved {kinds[0]} FSDP2, and this run is {kinds[1]} it: go on as the run began, "
            "on any number of processes."
        )
    try:
        accelerator.load_state(str(checkpoint))
        shadow = load_file(checkpoint / _EMA)
        ema.shadow_params = [
            _spread(shadow[str(i)].to(accelerator.device), like) for i, like in enumerate(ema.shadow_params)
        ]
    except (SafetensorError, RuntimeError, OSError, EOFError, LookupError, ValueError, UnpicklingError) as error:
        raise ValueError(f"The checkpoint {checkpoint} cannot be read: {error}") from error
    ema.optimization_step = step_of(checkpoint)


def read_notes(checkpoint: Path) -> dict:
    """What the run noted in a sound checkpoint."""
    return json.loads((checkpoint / _NOTES).read_text())


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Remove all but the newest `limit` checkpoints, and what an interrupted save or removal left; `None`: no limit."""
    for old in list_checkpoints(output_dir)[:-limit] if limit else []:
        _remove(old)
    for rest in output_dir.glob(f".{PREFIX}*"):
        shutil.rmtree(rest, ignore_errors=True)


def agree_on_any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any process; all processes wait for each other here."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that FSDP may have spread over the processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _spread(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def set_aside(checkpoint: Path, why: str) -> None:
    """Rename a checkpoint, so that it no longer counts."""
    other = checkpoint.with_name(f"{why}-{checkpoint.name}")
    shutil.rmtree(other, ignore_errors=True)
    checkpoint.rename(other)


def _remove(path: Path) -> None:
    """Removes a checkpoint, if it exists, so that a kill leaves all of it visible or nothing."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
