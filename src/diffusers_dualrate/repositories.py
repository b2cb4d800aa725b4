"""How our classes are saved to a repository and loaded from it: the host's way, with every failure in one sentence."""

import os
from typing import Self


class RepositoryMixin:
    """Named failures of `from_pretrained`; to be put before the host's classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Self:
        """Load from a Hub repository, a local folder or the cache. Takes what the host's method takes.

        Raises:
            OSError: If a local folder does not exist.
            ValueError: If its content cannot be used; the message names the place.
        """
        place = pretrained_model_name_or_path
        # A name on the Hub looks otherwise than these.
        is_path = isinstance(place, os.PathLike) or str(place).startswith((".", "/", "~"))
        if is_path and not os.path.exists(place):
            raise OSError(f"{place} cannot be loaded: there is no such folder.")
        try:
            return super().from_pretrained(place, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{place} cannot be loaded: {error}") from error

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        """Where the host reads all configurations, of a folder or of the Hub."""
        try:
            config = super()._dict_from_json_file(json_file)
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{json_file} is no valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold names and values in braces, got a {type(config).__name__}.")
        return config


def refuse_pickles(safe_serialization: bool) -> None:
    """Refuse to save what is never loaded."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False writes pickled weights, which are never loaded: leave it out.")
