"""The autoencoder whose latents a run learns: finding and opening it, telling it from others, and encoding batches."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from torch import Tensor

from .latents import draw_latents, encode
from .losses import seed_of
from .origins import digest
from .records import read_json

# What tells the draws of latents from the others of a row.
_POSTERIOR = -1

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
"""Classes of diffusers that are known."""

_INDEX = "model_index.json"


class Images(Protocol):
    """Images that a run learns from, as far as latents need to know them."""

    vae: ModelMixin | None

    @property
    def fingerprint(self) -> dict: ...


class EncodedImages:
    """Images whose items are what `moments_of` gives, once `encode_all` has made it."""

    def encode_all(self) -> None:
        """Encode what was not encoded yet."""
        raise NotImplementedError


def encode_batch(images: Images, batch: dict[str, Tensor], seed: int, step: int, rows: Sequence[int]) -> None:
    """Put latents in the place of a batch's images, if that is what is learned. Each depends on (seed, step, row) alone.

    Args:
        images: What the batch is of.
        batch: Changed in place.
        seed: Seed of the run.
        step: Training step.
        rows: Row numbers in the global batch.
    """
    if images.vae is None or "pixel_values" not in batch:
        return
    make = draw_latents if isinstance(images, EncodedImages) else encode
    seeds = [seed_of(seed, step, row, _POSTERIOR) for row in rows]
    batch["pixel_values"] = make(images.vae, batch["pixel_values"], seeds)


def find_vae(name: str, *, in_model: bool = False) -> str | None:
    """The folder of an autoencoder in what a name means: "" for an autoencoder itself, "vae" for a part of a model.

    Args:
        name: A folder or a repository on the Hub, of an autoencoder or of a model.
        in_model: Whether it is the name of a model, which may have none.

    Returns:
        `None` for a model that has none.
    """
    folder = Path(name)
    if folder.is_dir():
        index = folder / _INDEX if (folder / _INDEX).is_file() else None
    else:
        try:
            index = Path(hf_hub_download(name, _INDEX))
        except (EntryNotFoundError, OSError, HTTPError, ValueError):  # whoever loads it says what is wrong
            index = None
    if index is None:
        return None if in_model else ""
    return "vae" if (read_json(index).get("vae") or [None])[0] is not None else None


def open_vae(name: str, *, is_blueprint: bool = False) -> ModelMixin:
    """The autoencoder of a name, in single precision.

    Args:
        name: A folder or a repository on the Hub, of an autoencoder or of a model that has one.
        is_blueprint: Whether shapes are enough: no weights are read.

    Raises:
        ValueError: If there is none, or it is of another class.
    """
    subfolder = find_vae(name)
    if subfolder is None:
        raise ValueError(f"--vae {name} is a model without an autoencoder.")
    place = {"subfolder": subfolder} if subfolder else {}
    try:
        config = diffusers.AutoencoderKL.load_config(name, **place)
        kind = config.get("_class_name")
        if kind not in AUTOENCODERS:
            raise ValueError(f"it holds a {kind}, and must hold one of {', '.join(AUTOENCODERS)}")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ValueError(
                "its latents_mean and latents_std are not applied here, only scaling_factor and shift_factor"
            )
        cls = getattr(diffusers, kind)
        if is_blueprint:
            with torch.device("meta"):
                return cls.from_config(config)
        return cast(ModelMixin, cls.from_pretrained(name, **place, use_safetensors=True)).requires_grad_(False)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, OSError):
            said = f"there is no autoencoder of that name, as a folder, on the Hub or in its cache ({said})"
        raise ValueError(f"--vae {name} cannot be loaded: {said}.") from error


def fingerprint_of_images(images: Images) -> dict:
    """What the images are, and what encodes them, if latents are learned."""
    return images.fingerprint | ({} if images.vae is None else {"vae": fingerprint_of_vae(images.vae)})


def fingerprint_of_vae(vae: ModelMixin) -> str:
    """A digest of what makes latents of images: the weights, and what the class was told."""
    told = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    text = json.dumps([type(vae).__name__, told, digest(vae.state_dict())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
