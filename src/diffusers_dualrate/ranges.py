"""Types and ranges of values that come from a caller, a file or the command line, each refused in one sentence.

Every function returns the value it was given, numbers of numpy as Python's, which JSON can hold. A boolean is no number.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LONGEST_SIDE = 2**14
"""Longest side of an image in pixels: no model's images are nearly as large, and no memory holds one's features."""
MOST_AT_ONCE = 2**20
"""Most images of a training step, or classes of a model."""


def check_integer(name: str, value: int, least: int | None = None, most: int | None = None) -> int:
    """Refuse what is no integer, or one below `least` or above `most`.

    Args:
        name: What the value is called where it was given.
        value: What was given.
        least: Smallest value allowed.
        most: Largest value allowed.
    """
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not (fits and (least is None or value >= least) and (most is None or value <= most)):
        raise ValueError(f"{name} must be an integer{_between(least, most)}, got {_shown(value)}.")
    return _plain(value)


def check_number(
    name: str,
    value: float,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Refuse what is no finite real number, or one outside its range.

    Args:
        name: What the value is called where it was given.
        value: What was given.
        least: Smallest value allowed.
        most: Largest value allowed.
        above: Bound that the value must exceed.
        below: Bound that the value must stay under.
    """
    fits = isinstance(value, Real) and not isinstance(value, bool)
    fits = fits and (isinstance(value, Integral) or math.isfinite(value))
    fits = fits and (least is None or value >= least) and (most is None or value <= most)
    if not (fits and (above is None or value > above) and (below is None or value < below)):
        raise ValueError(f"{name} must be a finite number{_between(least, most, above, below)}, got {_shown(value)}.")
    return _plain(value)


def check_boolean(name: str, value: bool) -> bool:
    """Refuse what is neither `True` nor `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_shown(value)}.")
    return value


def check_choice(name: str, value: T, choices: Sequence[T]) -> T:
    """Refuse what is none of `choices`."""
    # By type first: an array compares by its elements, and 1 equals True.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}.")
    return value


def check_output(flag: str, path: str, *, is_folder: bool = False) -> None:
    """Refuse a file or a folder that could not be written, before work is done for it. Nothing stays behind.

    Args:
        flag: What the path is called where it was given.
        path: Where something is to be written; the folders above it need not exist.
        is_folder: Whether that is a folder.
    """
    if not path:
        raise ValueError(f"{flag} is empty, and must name a {'folder' if is_folder else 'file'}.")
    target = Path(os.path.abspath(path))
    if os.path.lexists(target) and target.is_dir() != is_folder:
        needed, found = ("folder", "none") if is_folder else ("file", "a folder")
        raise ValueError(f"{flag} must be a {needed}, but {path!r} is {found}.")
    known = (target, *target.parents) if is_folder else target.parents
    above = next(folder for folder in known if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{flag} is {path!r}, but {str(above)!r} is no folder.")
    try:  # only an attempt tells of rights, of names too long and of folders that are the system's own
        with tempfile.TemporaryDirectory(dir=above, prefix=".") as probe:
            Path(probe, target.relative_to(above)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} is {path!r}, which cannot be written: {error.strerror}.") from error


def _between(least: float | None, most: float | None, above: float | None = None, below: float | None = None) -> str:
    if (least, above) != (None, None) and (most, below) != (None, None):
        left = f"[{least}" if above is None else f"({above}"
        right = f"{most}]" if below is None else f"{below})"
        return f" in {left}, {right}"
    words = {"of at least": least, "of at most": most, "above": above, "below": below}
    return "".join(f" {word} {bound}" for word, bound in words.items() if bound is not None)


def _plain(value):
    return value.item() if hasattr(value, "item") else value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
