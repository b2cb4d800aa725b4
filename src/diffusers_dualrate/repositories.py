"""How our classes are saved to a repository and loaded from it: the host's way, with every failure in one sentence."""

import os
import re
import sys
from collections.abc import Iterable
from typing import Self

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

# What the Hub takes for a name: `model` or `owner/model`.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class RepositoryMixin:
    """Named failures of `from_pretrained`; to be put before the host's classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Self:
        """Load from a Hub repository, a local folder or the cache. Takes what the host's method takes.

        Raises:
            OSError: If there is nothing of that name, or files of it are missing or damaged.
            ValueError: If its content cannot be used; the message names the place.
        """
        place = pretrained_model_name_or_path
        if not isinstance(place, (str, os.PathLike)):
            raise ValueError(
                f"A model is loaded by the name of a folder or of a repository on the Hub, got {place!r}."
            )
        if not os.path.exists(place) and (isinstance(place, os.PathLike) or not _HUB_NAME.fullmatch(place)):
            raise OSError(f"{place} cannot be loaded: there is no such folder.")
        try:
            return super().from_pretrained(place, *args, **kwargs)  # type: ignore[misc] # of the host's class
        except ValueError as error:
            raise ValueError(f"{place} cannot be loaded: {error}") from error
        except OSError as error:
            said = " ".join(str(error).split())
            if not os.path.exists(place):  # the host's second sentence is advice that does not fit every reader
                said = said.partition(". ")[0].replace(" (", ": ").replace(")", "").rstrip(".")
                said = f"there is no such folder, and on the Hub or in its cache: {said}."
            raise OSError(f"{place} cannot be loaded: {said}") from error

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        """Where the host reads all configurations, of a folder or of the Hub."""
        try:
            config = super()._dict_from_json_file(json_file)  # type: ignore[misc] # of the host's class
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{json_file} is no valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold names and values in braces, got a {type(config).__name__}.")
        return config


def check_index(json_file: str | os.PathLike, index: dict, components: Iterable[str]) -> dict:
    """Refuse a model_index.json that does not say which classes a pipeline and its components are of.

    Args:
        json_file: Where it was read from.
        index: What it holds.
        components: Names of a pipeline's components; one that the file leaves out is looked for elsewhere.

    Returns:
        `index`.
    """
    if "_class_name" not in index:
        raise ValueError(f"{json_file} lacks _class_name, the class of the pipeline.")
    for name in set(components) & set(index):
        entry = index[name]
        fits = isinstance(entry, list) and len(entry) == 2
        if not (fits and (entry == [None, None] or all(isinstance(part, str) for part in entry))):
            raise ValueError(f"{json_file} must name a library and a class for {name}, got {entry!r}.")
        library, class_name = entry
        if library in sys.modules and not hasattr(sys.modules[library], class_name):
            raise ValueError(f"{json_file} names {class_name} as the class of {name}, which {library} has not.")
    return index


def check_hub(flag: str, name: str) -> None:
    """Refuse to publish where nothing can be: no such name, no Hub within reach, or no valid token. Nothing is made.

    Args:
        flag: What asks for it.
        name: Repository to publish in.
    """
    validate_repo_id(name)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{flag} needs the Hub, but HF_HUB_OFFLINE is set: publish the finished model later.")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{flag} needs the Hub at {constants.ENDPOINT}, which cannot be used: {said}") from error


def refuse_pickles(safe_serialization: bool) -> None:
    """Refuse to save what is never loaded."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False writes pickled weights, which are never loaded: leave it out.")
