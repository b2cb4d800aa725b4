"""Images encoded once, for trainings in a latent space: a folder of safetensors files beside the data sets' own copies.

Autoencoder and images name the folder, so another of either has another. A file holds some images in their order: mean and
deviation of the latents, of the mirrored image beside those of the image, and the classes. A file is written under a hidden
name and renamed when it is complete, so encoding that was interrupted goes on where it was.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .augmentation import Augmentation
from .autoencoders import EncodedImages, fingerprint_of_vae
from .data import LabelledImages
from .inventory import draw_caption, spread_captions
from .latents import latent_shape, moments_of
from .origins import digest

# Images that are encoded at a time, and bytes of a file.
_BATCH, _FILE_BYTES = 16, 2**28
# Seconds after which nobody still writes a file.
_STALE = 3600


class LatentImages(EncodedImages, torch.utils.data.Dataset):
    """The images of a data set as mean and deviation of their latents, with their class labels, from a cache.

    What is in the cache can be had after `encode_all`.

    Args:
        images: The images in pixels, not augmented.
        vae: The autoencoder.
        folder: Where caches are kept.
        augmentation: What may happen to the images; of latents only mirroring can be had.
        seed: Seed of the augmentation.

    Attributes:
        vae: The autoencoder.
        height: Of the latents, like `width` and `channels`.

    Raises:
        ValueError: If the augmentation needs pixels, or images that may be left out have captions.
    """

    def __init__(
        self, images: LabelledImages, vae: ModelMixin, folder: Path, *, augmentation: Augmentation, seed: int
    ):
        augmentation.check_of_latents()
        if (
            images.has_captions and images.on_corrupt == "skip"
        ):  # the next image may take the place of one, with its caption
            raise ValueError("Latents of images with captions leave none out: give --on_corrupt raise.")
        self.vae, self.seed, self.augmentation = vae, seed, augmentation
        self.channels, self.height, self.width = latent_shape(vae, images.height, images.width)
        self.num_classes, self.id2label, self.class_labels = images.num_classes, images.id2label, images.class_labels
        self.captions, self.has_captions = images.captions, images.has_captions
        self.fingerprint, self.description = images.fingerprint, images.description
        self._count, self._views = len(images), 2 if augmentation.flip else 1
        made = {"vae": fingerprint_of_vae(vae), "images": self.fingerprint, "size": [images.height, images.width]}
        told = made | {"count": self._count, "views": self._views, "on_corrupt": images.on_corrupt}
        told["max_image_pixels"] = images.max_image_pixels  # another image stands in for one of more
        # The fingerprint has looked into some rows only.
        told |= {name: marks for name, marks in images.marks.items() if any(marks)}
        self.name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(folder, self.name)
        latent_bytes = 4 * 2 * self.channels * self.height * self.width * self._views
        self._per_file = max(1, min(self._count, _FILE_BYTES // latent_bytes))
        self._images: LabelledImages | None = images  # until they are encoded
        self.corrupt = images.corrupt
        self._open: dict[int, Any] = {}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def encode_all(self) -> None:
        """Make what files are missing, each process some of them, and check all. It may take minutes.

        Raises:
            ValueError: If the cache is damaged or another's, an image is corrupt, or the latents are not finite.
        """
        state, files = PartialState(), range(-(-self._count // self._per_file))
        missing = [number for number in files if not self._path(number).is_file()]
        state.wait_for_everyone()  # so all processes find the same ones missing
        mine = missing[state.process_index :: state.num_processes]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            device, before = state.device, self.vae.device
            self.vae.to(device)
            total = sum(len(self._rows(number)) for number in mine)
            with tqdm(total=total, desc="encoding", unit="image", disable=not state.is_main_process) as bar:
                for number in mine:
                    self._encode(number, device, bar)
            self.vae.to(before)
        state.wait_for_everyone()
        if state.is_main_process:
            for number in tqdm(files, desc="checking the latents", unit="file", delay=5, leave=False):
                self._check(number)
        state.wait_for_everyone()
        self._images = None

    def _rows(self, number: int) -> range:
        return range(number * self._per_file, min(self._count, (number + 1) * self._per_file))

    def _encode(self, number: int, device: torch.device, bar: tqdm) -> None:
        """Make one file."""
        assert self._images is not None  # else nothing is missing
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        rows = self._rows(number)
        for first in range(0, len(rows), _BATCH):
            items = [self._images[row] for row in rows[first : first + _BATCH]]
            pixels = torch.stack([item["pixel_values"] for item in items]).to(device)
            sides = [moments_of(self.vae, side) for side in (pixels, pixels.flip(-1))[: self._views]]
            parts.append(torch.stack(sides, dim=1).cpu())
            labels += [item["class_labels"] for item in items if "class_labels" in item]
            bar.update(len(items))
        self.corrupt = self._images.corrupt
        tensors = {"moments": torch.cat(parts)} | ({"class_labels": torch.stack(labels)} if labels else {})
        if not tensors["moments"].isfinite().all():
            raise ValueError(
                f"The vae makes latents of the images {rows.start} to {rows.stop - 1} that are not finite."
            )
        partial = self.folder / f".{number:05}-{os.getpid()}"
        save_file(tensors, partial, metadata={"cache": self.name, "digest": digest(tensors)})
        partial.replace(self._path(number))
        for left in self.folder.glob(
            f".{number:05}-*"
        ):  # by a run that was killed; a younger one may still be written
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink(missing_ok=True)

    def _check(self, number: int) -> None:
        """Refuse a file that is not as it was written, or was written for others."""
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
            is_whole = said.get("digest") == digest(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The latent cache {self.folder} is damaged, in {path.name}: {error}; {_REMEDY}"
            ) from error
        if said.get("cache") != self.name:
            raise ValueError(f"{path} holds latents of other images or of another vae; {_REMEDY}")
        if not is_whole:
            raise ValueError(f"The latent cache {self.folder} is damaged, in {path.name}; {_REMEDY}")

    def __getstate__(self) -> dict:
        # Each data worker opens the files for itself, and needs no pixels.
        return self.__dict__ | {"_open": {}, "vae": None, "_images": None}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what networks learn from."""
        return self.channels, self.height, self.width

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """Returns `pixel_values`, float32 [2 C, H, W] or [C, H, W], and `class_labels`, int64 [], or `caption`, bytes [8192].

        Args:
            index: Number of the image, or (epoch, number): each epoch mirrors others; alone, epoch 0.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < self._count:
            raise IndexError(f"The index {index} is outside of the {self._count} images.")
        number, row = divmod(index, self._per_file)
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), "pt")
        file = self._open[number]
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, index)))
        side = int(self.augmentation.mirrors(generator))
        item = {"pixel_values": file.get_slice("moments")[row, side]}
        if self.num_classes is not None:
            item["class_labels"] = file.get_slice("class_labels")[row : row + 1][0]
        if self.captions is not None:
            item["caption"] = draw_caption(self.captions[index], self.seed, epoch, index)
        return item

    def list_captions(self, count: int) -> list[str]:
        """First captions of some images, evenly spread."""
        return spread_captions(self.captions, count)


_REMEDY = "delete it, and it is made again."


def cache_folder(cache_dir: str | None) -> Path:
    """Where latents are kept: beside the copies that `datasets` keeps."""
    from datasets import config

    return Path(cache_dir or config.HF_DATASETS_CACHE) / "latents"
