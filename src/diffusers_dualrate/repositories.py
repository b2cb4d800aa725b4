"""How our classes are saved to a repository and loaded from it: the host's way, with every failure in one sentence.

A model's folder holds more than weights: a card, the pictures that it shows, and the records that it was made of. They are
published with the weights. Whatever else lies in a run's folder, such as checkpoints, is not.
"""

import glob
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from huggingface_hub import HfApi, constants, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .origins import Origin, OriginError
from .registration import register

# Whatever can be saved or loaded comes through here, so the host knows of it before that.
register(__name__.partition(".")[0])

CARD = "README.md"
_RECORDS = ("configuration.json", "training.json", "evaluation.json", "notes.json", "plan.json")
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
# What the Hub takes for a name: `model` or `owner/model`.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class RepositoryMixin:
    """Named failures of `from_pretrained`; to be put before the host's classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Self:
        """Load from a Hub repository, a local folder or the cache. Takes what the host's method takes.

        Raises:
            OSError: If there is nothing of that name, or files of it are missing or damaged.
            ValueError: If its content cannot be used; the message names the place.
            ImportError: If a part of it, such as a text encoder, needs a library that is not installed.
        """
        place = pretrained_model_name_or_path
        if not isinstance(place, (str, os.PathLike)):
            raise ValueError(
                f"A model is loaded by the name of a folder or of a repository on the Hub, got {place!r}."
            )
        if not os.path.exists(place) and (isinstance(place, os.PathLike) or not HUB_NAME.fullmatch(place)):
            raise OSError(f"{place} cannot be loaded: there is no such folder.")
        try:
            return super().from_pretrained(place, *args, **kwargs)  # type: ignore[misc] # of the host's class
        except OriginError:  # which says it all
            raise
        except ModuleNotFoundError as error:
            raise ImportError(f"{place} cannot be loaded: it needs {error.name}, which is not installed.") from error
        except ValueError as error:
            raise ValueError(f"{place} cannot be loaded: {error}") from error
        except OSError as error:
            said = " ".join(str(error).split())
            if not os.path.exists(place):  # the host's second sentence is advice that does not fit every reader
                said = said.partition(". ")[0].replace(" (", ": ").replace(")", "").rstrip(".")
                said = f"there is no such folder, and on the Hub or in its cache: {said}."
            raise OSError(f"{place} cannot be loaded: {said}") from error

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save to a folder. Takes what the host's method takes; with `push_to_hub` a card that lies there is published."""
        if not push_to_hub:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc] # of the host's class
            return
        hub = {
            name: kwargs.pop(name) for name in ("commit_message", "private", "token", "create_pr") if name in kwargs
        }
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        self.save_pretrained(save_directory, *args, **kwargs)
        has_card = Path(save_directory, CARD).is_file()
        self._publish(repo_id, Path(save_directory) if has_card else self._find_card_folder(), kwargs, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Publish on the Hub. Takes what the host's method takes.

        A model that was loaded from a folder with a card is published with that card, its pictures and its records. They
        describe the model as it was loaded. Without one, the repository keeps the card that it has, or gets the host's.
        """
        hub = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        source = None if subfolder else self._find_card_folder()
        refuse_pickles(safe_serialization)
        return self._publish(repo_id, source, {} if variant is None else {"variant": variant}, subfolder, **hub)

    def _find_card_folder(self) -> Path | None:
        """The folder that this was loaded from, if a card lies there."""
        folder = Path(str(self.config.get("_name_or_path") or ""))  # type: ignore[attr-defined]
        is_own = (folder / self.config_name).is_file()  # type: ignore[attr-defined] # not of what it is a part of
        return folder if is_own and (folder / CARD).is_file() else None

    def _publish(self, repo_id, source, saving, subfolder=None, **hub) -> str:
        """Uploads what is saved, with the card and the records of a folder, or else as the host does it."""
        if source is None:
            return super().push_to_hub(repo_id, **saving, subfolder=subfolder, **hub)  # type: ignore[misc]
        repo_id = create_repo(repo_id, private=hub.pop("private", None), token=hub.get("token"), exist_ok=True).repo_id
        hub["commit_message"] = hub.get("commit_message") or f"Upload {type(self).__name__}"
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            for path in Path(folder).rglob("*.json"):  # the host names the folder that this was loaded from
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name in records_of(source):
                Path(folder, name).parent.mkdir(exist_ok=True)
                shutil.copy(source / name, Path(folder, name))
            self._mend_card(source, Path(folder))
            return upload_folder(repo_id=repo_id, folder_path=folder, **hub)

    @staticmethod
    def _mend_card(source: Path, folder: Path) -> None:
        """Let a copied card say where the parts of its new folder come from, which may hold what the old one left out."""
        card, index = folder / CARD, "model_index.json"
        if (source / index).is_file() and (before := describe_origin(source)) != (now := describe_origin(folder)):
            text = card.read_text(encoding="utf-8")
            card.write_text(text.replace(before, now) if before else text, encoding="utf-8")

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


def name_classes(folder: str | os.PathLike, pipeline: object, components: Mapping[str, object]) -> None:
    """Write a line of code beside each of our components, and beside the pipeline, that names its class to strangers."""
    package = __name__.partition(".")[0]
    files = {"pipeline.py": pipeline} | {f"{name}/{package}.py": part for name, part in components.items()}
    for name, thing in files.items():
        path, cls = Path(folder, name), type(thing)
        if cls.__module__.startswith(package) and not path.exists() and not Path(folder).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"from {package} import {cls.__name__}  # noqa: F401\n", encoding="utf-8")


def refuse_pickles(safe_serialization: bool) -> None:
    """Refuse to save what is never loaded."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False writes pickled weights, which are never loaded: leave it out.")


def records_of(folder: str | os.PathLike) -> list[str]:
    """What lies beside the weights of a model and belongs to it: card, licence, records and pictures."""
    names = (path.relative_to(folder) for part in (".", "samples") for path in Path(folder, part).glob("*"))
    return sorted(
        name.as_posix()
        for name in names
        if not name.name.startswith(".")
        and Path(folder, name).is_file()
        and (
            name.suffix.lower() in _PICTURES
            or (len(name.parts) == 1 and (name.name in (CARD, *_RECORDS) or name.stem == "LICENSE"))
        )
    )


def content_of(folder: str | os.PathLike) -> list[str]:
    """All files of a pipeline's folder that belong to its repository: the model, card, records and pictures."""
    index = Path(folder, "model_index.json")
    if not index.is_file():
        raise ValueError(f"{folder} holds no model: there is no model_index.json.")
    entries = json.loads(index.read_text(encoding="utf-8")).items()
    parts = [name for name, entry in entries if isinstance(entry, list) and isinstance(entry[0], str)]
    files = [
        path
        for part in parts
        for path in Path(folder, part).glob("*")
        if path.suffix in (".json", ".safetensors", ".py")
    ]
    files += [index, *(path for path in [Path(folder, "pipeline.py")] if path.is_file())]
    return sorted({path.relative_to(folder).as_posix() for path in files} | set(records_of(folder)))


def describe_origin(folder: Path) -> str:
    """What a card says of a context encoder that the repository names, and of an autoencoder that is somebody's.

    Empty where it holds all, and nothing is known to be another's.
    """
    said = []
    if encoder := Origin.in_folder(Path(folder, "context_encoder")):
        size = sum(Path(folder, name).stat().st_size for name in content_of(folder) if name.endswith(".safetensors"))
        said.append(
            f"This repository holds {size / 1e6:.1f} MB of weights. Its context encoder comes from elsewhere as the model is "
            f"loaded: {encoder.describe('encoder')}"
        )
    if autoencoder := Origin.in_folder(Path(folder, "vae")):
        said.append(f"Its autoencoder is a copy of another repository's: {autoencoder.describe('autoencoder')}")
    return " ".join(said)


def claim_repository(name: str) -> str:
    """Make a repository on the Hub where there is none of that name, and return its full name."""
    return create_repo(name, exist_ok=True).repo_id


def upload_model(folder: str | os.PathLike, repo_id: str) -> str:
    """Publish a pipeline's folder, without checkpoints and whatever else is no part of the model; returns its address."""
    files = [glob.escape(name) for name in content_of(folder)]
    done = upload_folder(
        repo_id=repo_id, folder_path=Path(folder), allow_patterns=files, commit_message="Upload the model"
    )
    return str(done.repo_url)


def read_record(model: str | os.PathLike, name: str) -> dict | None:
    """A JSON file beside the weights, in a folder or on the Hub; `None` where there is none."""
    record = Path(model) / name
    if not Path(model).is_dir():
        try:
            record = Path(hf_hub_download(str(model), name))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # there may be one, out of reach
                warnings.warn(f"{name} of {model} is not at hand: {error}", stacklevel=2)
            return None
    return json.loads(record.read_text()) if record.is_file() else None
