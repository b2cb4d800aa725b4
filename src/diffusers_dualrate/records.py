"""JSON files as typed records: what is missing, unknown or no JSON is refused in one sentence that names the place."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import ConfigMixin


def build(cls: type, place: str, values: object):
    """Make a dataclass of what a JSON file holds.

    Raises:
        ValueError: If it is no object, or a value is missing, unknown or out of its range; `place` is named.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be an object of names and values, got {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{place} has no value {unknown[0]!r}; it has {', '.join(sorted(fields))}.")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{place} lacks {', '.join(missing)}.")
    return cls(**values)


def fill_in(cls: "type[ConfigMixin]", place: str, values: object) -> dict:
    """The arguments of a network or scheduler with its defaults filled in, as JSON would hold them.

    Raises:
        ValueError: If there is an unknown one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be an object of names and values, got {values!r}.")
    parameters = inspect.signature(cls.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    values = {name: value for name, value in values.items() if not name.startswith("_")}  # the host's own notes
    if unknown := sorted(values.keys() - defaults.keys()):
        raise ValueError(f"{place} has no value {unknown[0]!r}; it has {', '.join(sorted(defaults))}.")
    return json.loads(json.dumps(defaults | values))


def read_json(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of names and values, and holds {type(content).__name__}.")
    return content
