"""Where a published network comes from, so that a repository can name it and need not hold its weights again.

A network that was loaded from the Hub knows its origin. A pair whose encoder still is such a network is saved without it:
the config.json of the folder `context_encoder` then names the origin, and weights lie beside it only where they are new.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from .records import build, read_json

CONFIG, TRAINING = "config.json", "training.json"
KEY = "_origin"
"""Where config.json names the origin; a name that diffusers' own classes pass over."""

# What a pipeline's `from_pretrained` is told of access; the host hands none of it on to the components.
_ACCESS: ContextVar[Mapping[str, Any]] = ContextVar("access", default={})  # noqa: B039 (it is never changed)
_ACCESS_NAMES = ("cache_dir", "local_files_only", "token")


class OriginError(OSError):
    """A network that a repository names and does not hold, and that cannot be had. The message is a whole sentence."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A network on the Hub.

    Args:
        repository: Its repository.
        revision: The commit.
        subfolder: The folder in it; `None` for the repository itself.
        weights: Digest of its weights in single precision; `None` where nobody took it yet.
        license: What the repository's card says.
        cache_dir: Where its files are cached on this machine, if not at the usual place; never written down.
    """

    repository: str
    revision: str
    subfolder: str | None = None
    weights: str | None = None
    license: str | None = None
    cache_dir: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        validate_repo_id(self.repository)
        for name, value in self.to_json().items():
            if not isinstance(value, str) and (value is not None or name == "revision"):
                raise ValueError(f"{name} of an encoder's origin must be a string, got {value!r}.")

    def __str__(self) -> str:
        folder = "" if self.subfolder is None else f"{self.subfolder} of "
        return f"{folder}{self.repository} at revision {self.revision[:12]}"

    @classmethod
    def find(cls, place: str | os.PathLike | None, **options: Any) -> Self | None:
        """The origin of a network that was just loaded; `None` for one that came from no Hub.

        Args:
            place: What it was loaded by: a name on the Hub, or a folder, which may be one of the cache.
            options: Those of `from_pretrained`.
        """
        if place is None:
            return None
        folder = Path(place, options.get("subfolder") or "")
        if not os.path.exists(place):
            name = Path(options.get("subfolder") or "", CONFIG).as_posix()
            cache_dir = {"cache_dir": options["cache_dir"]} if options.get("cache_dir") else {}
            try:
                found = try_to_load_from_cache(str(place), name, revision=options.get("revision"), **cache_dir)
            except HFValidationError:  # a folder that is gone since
                return None
            if not isinstance(found, str):
                return None
            folder = Path(found).parent
        *cache, repository, snapshots, revision = folder.parts[: _end_of_snapshot(folder)] or ("",) * 3
        if snapshots != "snapshots" or not repository.startswith("models--"):
            return None
        return cls(
            repository=repository.removeprefix("models--").replace("--", "/"),
            revision=revision,
            subfolder="/".join(folder.parts[_end_of_snapshot(folder) :]) or None,
            cache_dir=str(Path(*cache)),
        )

    @classmethod
    def behind(cls, place: str | os.PathLike | None, subfolder: str) -> Self | None:
        """Where a component is published that a model holds as it is there, with its licence; `None` where nobody knows.

        Args:
            place: What the component was loaded by: its own name or folder, or those of a model.
            subfolder: Its folder in a model.
        """
        if place is None:
            return None
        for inner in ("", subfolder):
            path = Path(place, inner, CONFIG)
            if path.is_file() or not os.path.exists(place):
                said = cls.in_folder(path.parent)
                if origin := said or cls.find(place, subfolder=inner):
                    return origin if said else dataclasses.replace(origin, license=origin._find_license())
        return None

    @classmethod
    def of_model(cls, name: str | None) -> Self | None:
        """The published model that a model is, or was made of, with its licence; `None` where nobody knows.

        Args:
            name: Its folder, or its name on the Hub; `None` for no model.
        """
        record = None if name is None else Path(name, TRAINING)
        if record is not None and record.is_file():
            base = read_json(record).get("base")
            return None if base is None else cast(Self, build(cls, f"base of {record}", base))
        found = (cls.behind(name, part) for part in ("denoiser", "unet", "transformer"))
        return next((dataclasses.replace(origin, subfolder=None) for origin in found if origin is not None), None)

    @classmethod
    def in_folder(cls, folder: str | os.PathLike) -> Self | None:
        """The origin that the config.json of a component's folder names; `None` where there is none."""
        path = Path(folder, CONFIG)
        return cls.named_in(read_json(path), path) if path.is_file() else None

    @classmethod
    def named_in(cls, config: Mapping[str, Any], place: object) -> Self | None:
        """The origin that a config.json names instead of weights; `None` where it names none."""
        said = config.get(KEY)
        if said is None:
            return None
        if not isinstance(said, dict):
            raise ValueError(f"{place} must name its encoder's origin by names and values, got {said!r}.")
        return cast(Self, build(cls, f"{KEY} of {place}", said))

    def describe(self, name: str) -> str:
        """Where it is, as Markdown, and under which licence.

        Args:
            name: What the component is called.
        """
        place = "" if self.subfolder is None else f"`{self.subfolder}` of "
        text = (
            f"{place}[{self.repository}](https://huggingface.co/{self.repository}) at revision `{self.revision[:12]}`."
        )
        return f"{text} The {name}'s licence is {self.license}." if self.license else text

    def to_json(self) -> dict:
        """What config.json says."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "cache_dir"}

    def fetch(self, holder: object, kinds: Mapping[str, type[ModelMixin]], options: Mapping[str, Any]) -> ModelMixin:
        """Load the network from the cache or the Hub.

        Args:
            holder: Where it is named, to say so.
            kinds: Classes that it may be of, by their names.
            options: Those of `from_pretrained` that the holder is loaded with.

        Raises:
            OriginError: If it cannot be had, or is another than named.
        """
        access = dict(_ACCESS.get()) | {name: options[name] for name in _ACCESS_NAMES if options.get(name) is not None}
        if self.cache_dir is not None:
            access.setdefault("cache_dir", self.cache_dir)
        place = {"subfolder": self.subfolder, "revision": self.revision, **access}
        try:
            file = hf_hub_download(self.repository, CONFIG, **place)
            name = json.loads(Path(file).read_text(encoding="utf-8")).get("_class_name")
            if not isinstance(name, str) or name not in kinds:
                raise self._error(
                    holder, f"is a {name}: only {', '.join(kinds)} can be taken, and no code of a repository is run"
                )
            # A variant is the holder's, and so is the place.
            own = {"variant", "subfolder", "revision", "output_loading_info", *_ACCESS_NAMES}
            passed = {key: value for key, value in options.items() if key not in own}
            network = kinds[name].from_pretrained(self.repository, **passed, **place)
        except (OSError, EntryNotFoundError, HTTPError, ValueError) as error:
            raise error if isinstance(error, OriginError) else self._error(holder, _explain(error)) from error
        # Of weights that were rounded when they were loaded, nobody can tell.
        asked = options.get("torch_dtype") or options.get("dtype") or torch.float32
        if self.weights is not None and asked == torch.float32 and digest(network.state_dict()) != self.weights:
            raise self._error(holder, "has other weights than those that the pair was trained with")
        return network

    def confirm(self, network: ModelMixin, kinds: Mapping[str, type[ModelMixin]]) -> Self | None:
        """This origin with digest and licence, if the network there is the same; `None` if it is another.

        Args:
            network: The network, of which also the configuration counts: one that is fetched has its own.
            kinds: Classes that it may be of, by their names.
        """
        return self.confirm_weights(network.state_dict(), kinds, network.config)

    def confirm_weights(
        self,
        weights: Mapping[str, Tensor],
        kinds: Mapping[str, type[ModelMixin]],
        config: Mapping[str, Any] | None = None,
    ) -> Self | None:
        """The same of weights alone, by the names that they have there, and of a configuration, if one counts."""
        try:
            theirs = self.fetch("The model to save", kinds, {"use_safetensors": True})
        except OriginError as error:
            warnings.warn(f"It is saved as a whole, since its origin cannot be compared: {error}", stacklevel=3)
            return None
        if config is not None and _describe(config) != _describe(theirs.config):
            return None
        others = theirs.state_dict()
        for name, ours in weights.items():
            if name not in others or not torch.equal(ours.cpu(), others[name].to(ours.dtype)):
                return None
        return dataclasses.replace(self, weights=digest(others), license=self._find_license())

    def holds(self, network: ModelMixin, kinds: Mapping[str, type[ModelMixin]]) -> Self | None:
        """The same; where the digest is known, nothing is fetched."""
        if self.weights is None:
            return self.confirm(network, kinds)
        return self if digest(network.state_dict()) == self.weights else None

    def _find_license(self) -> str | None:
        try:
            card = hf_hub_download(self.repository, "README.md", revision=self.revision, cache_dir=self.cache_dir)
        except (OSError, EntryNotFoundError, HTTPError):  # there is none, or none in reach
            return None
        name = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
        return name if isinstance(name, str) else None

    def _error(self, holder: object, said: str) -> OriginError:
        cached = self.find(holder) if isinstance(holder, (str, os.PathLike)) else None
        holder = holder if cached is None else cached.repository
        return OriginError(
            f"{holder} holds no encoder: it names {self}, which {said}; give another by context_encoder=."
        )


def origin_of_vae(vae: ModelMixin) -> Origin | None:
    """Where an autoencoder is published, if it still is as it is there; `None` where nobody knows."""
    vae = getattr(vae, "_orig_mod", vae)  # what `torch.compile` wrapped
    origin = Origin.behind(vae.config.get("_name_or_path"), "vae")
    return None if origin is None else origin.holds(vae, {type(vae).__name__: type(vae)})


@contextlib.contextmanager
def access(options: Mapping[str, Any]) -> Iterator[None]:
    """Let the components that are loaded within use what a pipeline was told of cache and token."""
    before = _ACCESS.set({name: options[name] for name in _ACCESS_NAMES if options.get(name) is not None})
    try:
        yield
    finally:
        _ACCESS.reset(before)


def digest(*weights: Mapping[str, Tensor]) -> str:
    """A digest of names and values in single precision, of one network or of several in their order."""
    made = hashlib.blake2b(digest_size=16)
    for name, weight in itertools.chain.from_iterable(sorted(each.items()) for each in weights):
        weight = weight.detach().float() if weight.is_floating_point() else weight.detach()
        made.update(name.encode())
        made.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that say where files are looked for."""
    return {name: options[name] for name in ("subfolder", "revision", *_ACCESS_NAMES) if name in options}


def prepare_folder(folder: str | os.PathLike) -> None:
    """Make a folder, without weights of a network that was saved in it before."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stale in Path(folder).glob(f"{SAFETENSORS_WEIGHTS_NAME.partition('.')[0]}*"):
        stale.unlink()


def write_into_config(folder: str | os.PathLike, **entries: Any) -> None:
    """Put entries into the config.json of a network that was just saved."""
    path = Path(folder, CONFIG)
    config = json.loads(path.read_text(encoding="utf-8")) | entries
    config.pop("_name_or_path", None)  # where a machine keeps its files is nobody's business
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _describe(config: Mapping[str, Any]) -> str:
    """What a configuration says of a network, without where it came from."""
    return json.dumps({name: value for name, value in config.items() if not name.startswith("_")}, sort_keys=True)


def _end_of_snapshot(folder: Path) -> int:
    """Number of parts of a path up to the revision in the Hub's cache; 0 for a path that lies elsewhere."""
    return folder.parts.index("snapshots") + 2 if "snapshots" in folder.parts[:-1] else 0


def _explain(error: Exception) -> str:
    """Why a network cannot be had, as the end of a sentence about it."""
    if isinstance(error, GatedRepoError):
        return "is gated, and your token does not open it"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the Hub, or is private and your token does not open it"
    if isinstance(error, RevisionNotFoundError):
        return "is gone from the Hub: the repository has no such revision"
    if isinstance(error, LocalEntryNotFoundError):
        return "is not in the cache, and the Hub is out of reach"
    if isinstance(error, EntryNotFoundError):
        return f"is gone from the Hub: there is no {CONFIG}"
    return f"cannot be loaded: {' '.join(str(error).split()).rstrip('.')}"
