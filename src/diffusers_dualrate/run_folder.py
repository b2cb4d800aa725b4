"""The output folder of a run: it belongs to one run, and only one process group works in it at a time.

The folder's configuration.json says which run it holds. A lock keeps out a second start while that run lives. The system
frees the lock however the run ends.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .checkpoints import find_damage, find_newest, is_checkpoint, keep_newest, list_checkpoints, set_aside, step_of
from .configuration import FILE, identify
from .records import read_json

_LOCK = ".lock"
_PATIENCE = 10.0  # seconds: the data workers of a killed run end within five, and hold its lock until then


class RunFolder:
    """The output folder of one run, locked while the run lives; made by all processes together.

    A folder without checkpoint or model holds nothing that could be lost. So a start that failed does not block it.

    Args:
        accelerator: Its processes agree on the checkpoint.
        output_dir: The run's folder.
        record: The content of its configuration.json: what the run was told, and what it found.
        resume_from_checkpoint: A checkpoint's name in the folder, or its path, or "latest", or `None`.

    Attributes:
        checkpoint: The checkpoint to go on from; `None` for a run from the beginning.

    Raises:
        ValueError: If the folder holds another run, or this one and it is not to be resumed, or it lives; if the
            checkpoint does not exist, is damaged or belongs to another run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, record: dict, resume_from_checkpoint: str | None):
        self.output_dir, self._lock = output_dir, FileLock(output_dir / _LOCK)
        chosen = find_named(output_dir, resume_from_checkpoint)
        check_folder(output_dir, record, resume_from_checkpoint, chosen)
        accelerator.wait_for_everyone()
        outcome: list = [None, None]  # the checkpoint, and what was wrong
        if accelerator.is_main_process:
            try:
                self._take(record, resume_from_checkpoint, chosen)
                outcome[0] = find_newest(output_dir) if resume_from_checkpoint == "latest" else chosen
                keep_newest(output_dir, None)
            except (ValueError, OSError) as error:
                self.release()
                outcome[1] = error
        self.checkpoint, refusal = broadcast_object_list(outcome)
        if refusal is not None:
            raise refusal

    def _take(self, record: dict, resume_from_checkpoint: str | None, chosen: Path | None) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_PATIENCE)
        except Timeout as error:
            raise ValueError(
                f"{self.output_dir} holds a run that is alive: wait for its end, or give another --output_dir."
            ) from error
        # Checked again: another run may have begun, and ended, since.
        check_folder(self.output_dir, record, resume_from_checkpoint, chosen)
        newest = find_newest(self.output_dir) if resume_from_checkpoint == "latest" else chosen
        _check_steps_taken(record, newest)
        # A kill while the record is written again must not take the run with it.
        partial = self.output_dir / f".{FILE}"
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.output_dir / FILE)
        if chosen is not None:
            # Otherwise a newer checkpoint would count as the newest, and outlive those that this run makes.
            for newer in list_checkpoints(self.output_dir):
                if step_of(newer) > step_of(chosen):
                    set_aside(newer, "abandoned")

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Let others have the folder if what is done within fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others have the folder: the run has ended."""
        self._lock.release()


def find_named(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The named checkpoint, if it is sound; `None` where none or the latest is asked for.

    Raises:
        ValueError: If there is none of that name, or it is damaged.
    """
    if resume_from_checkpoint in (None, "latest"):
        return None
    named = [Path(resume_from_checkpoint), output_dir / resume_from_checkpoint]
    found = [path for path in named if is_checkpoint(path)]
    if not found:
        raise ValueError(f"{resume_from_checkpoint} is not a checkpoint of a training run, also not in {output_dir}.")
    if damage := find_damage(found[0]):
        raise ValueError(f"The checkpoint {found[0]} cannot be read: {damage}.")
    return found[0]


def check_folder(output_dir: Path, record: dict, resume_from_checkpoint: str | None, chosen: Path | None) -> None:
    """Refuse a folder that holds another run, or this one without being told to resume it. Changes nothing."""
    checkpoints, holds_model = list_checkpoints(output_dir), (output_dir / "model_index.json").exists()
    holds_run = bool(checkpoints) or holds_model
    if holds_run and not resume_from_checkpoint:
        raise ValueError(
            f"{output_dir} already holds a run: give --resume_from_checkpoint latest, or another --output_dir."
        )
    if holds_model and chosen is None and not checkpoints:
        raise ValueError(
            f"{output_dir} holds a trained model, but no checkpoint to go on from: give another --output_dir."
        )
    folders = {output_dir} if holds_run else set()
    for folder in folders if chosen is None else folders | {chosen.parent}:
        path = folder / FILE
        known = identify(read_json(path)) if path.is_file() else {}
        ours = identify(record)
        differing = [name for name in known.keys() | ours.keys() if known.get(name) != ours.get(name)]
        if differing:
            words = [
                f"{name} is {_shorten(known.get(name))} there and {_shorten(ours.get(name))} here"
                for name in sorted(differing)[:3]
            ]
            more = f", and {len(differing) - 3} more differ" if len(differing) > 3 else ""
            raise ValueError(f"{folder} belongs to a run with another configuration: {'; '.join(words)}{more}.")


def _check_steps_taken(record: dict, checkpoint: Path | None) -> None:
    """Refuse a run that has taken more steps than it is now told to take."""
    recipe = record.get("training") or record.get("distillation") or {}
    steps = recipe.get("max_train_steps", 0) + recipe.get("pretraining_steps", 0)
    if checkpoint is not None and step_of(checkpoint) > steps:
        raise ValueError(
            f"{checkpoint} has {step_of(checkpoint)} steps behind it, more than the {steps} of this run: give a larger "
            "--max_train_steps, or an earlier checkpoint."
        )


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
