"""Lists of prompts that a model is asked for: read from a file, and judged by a contrastive pair of encoders.

A text encoder and an image encoder that were trained together (CLIP, arXiv 2103.00020) give an image and its texts about the
same direction. So an image shows its prompt, to them, if no other text is nearer. How hard that is depends on the others: those
of the same list, or all captions of a data set beside them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import normalize

from .image_sets import Batch, as_bytes, batches_of
from .inventory import ImageSet
from .origins import digest
from .text_encoding import TextEncoding

Judges = dict[str, Callable[[Tensor, Any], Tensor]]
"""By name: images and what was asked for to truths or scores [B]."""

_TEXTS_AT_ONCE = 256


def read_prompts(flag: str, path: str | Path) -> list[str]:
    """The prompts of a file, one a line.

    Args:
        flag: What named the file.
        path: The file.

    Raises:
        ValueError: If it cannot be read, or holds none.
    """
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}.") from error
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt.")
    return prompts


class TextJudge:
    """Says which of several texts an image shows.

    Args:
        encoding: A contrastive text encoder, whose pooled output is compared.
        image_encoder: What was trained with it: images to directions of the same width.
        device: Where to compute.

    Raises:
        ValueError: If the text encoder has no pooled output, or one of another width.
    """

    def __init__(self, encoding: TextEncoding, image_encoder: nn.Module, device: torch.device | str):
        self._encoding, self._image_encoder, self._device = encoding, image_encoder, device
        encoding.text_encoder.to(device)
        width, expected = self.embed([""]).shape[1], getattr(image_encoder, "config", {}).get("num_classes")
        if expected not in (None, width):
            raise ValueError(
                f"The text encoder gives directions of {width} values, and the image encoder of {expected}: they were not "
                "trained together."
            )

    @property
    def fingerprint(self) -> str:
        """A digest of the text encoder; the image encoder has its own."""
        return f"{digest(self._encoding.text_encoder.state_dict())} {self._encoding.tokenizer_digest}"

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts [N, D]."""
        parts = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[first : first + _TEXTS_AT_ONCE])
            options = {"padding": True, "truncation": True, "max_length": self._encoding.most_tokens}
            inputs = self._encoding.tokenizer(part, **options, return_tensors="pt").to(self._device)
            found = self._encoding.text_encoder(**inputs)
            pooled = found.get("text_embeds", found.get("pooler_output"))  # the former is projected besides
            if pooled is None:
                raise ValueError(
                    f"A {type(self._encoding.text_encoder).__name__} has no pooled output to compare images with, as a "
                    "CLIPTextModel has: give the text encoder that was trained with the image encoder."
                )
            parts.append(normalize(pooled, dim=1))
        return torch.cat(parts)

    def compare(self, x: Tensor, directions: Tensor) -> Tensor:
        """Cosines [B, N] of images and texts."""
        return normalize(self._image_encoder(x.to(self._device)), dim=1) @ directions.T


def judges_of_captions(judge: TextJudge, captions: Sequence[Sequence[str]], prompts: Sequence[str] = ()) -> Judges:
    """Judges of whether an image shows its text: whether the nearest one is of the same image, and how near its own is.

    Args:
        judge: What compares.
        captions: Those of each image of a data set.
        prompts: More texts, which may be of none of these images. With them another judge says whether the nearest of them
            alone is the one that was asked for.
    """
    owners: dict[str, set[int]] = {}
    for row, own in enumerate(captions):
        for text in own:
            owners.setdefault(text, set()).add(row)
    for number, text in enumerate(prompts):
        owners.setdefault(text, {-1 - number})
    texts, few = list(owners), list(dict.fromkeys(prompts))
    known = {text: place for place, text in enumerate(texts)}
    directions = judge.embed(texts)

    def find(x: Tensor, shown: list[str]) -> Tensor:
        nearest = [texts[place] for place in judge.compare(x, directions).argmax(1).tolist()]
        return torch.tensor([bool(owners[ours] & owners[text]) for ours, text in zip(nearest, shown, strict=True)])

    def score(x: Tensor, shown: list[str]) -> Tensor:
        own = directions[[known[text] for text in shown]]
        return judge.compare(x, own).diagonal()

    judges: Judges = {"caption_of_nearest_text": find, "image_text_score": score}
    if few:
        chosen = directions[[known[text] for text in few]]

        def recognise(x: Tensor, shown: list[str]) -> Tensor:
            nearest = judge.compare(x, chosen).argmax(1).tolist()
            return torch.tensor([few[place] == text for place, text in zip(nearest, shown, strict=True)])

        judges = {"prompt_of_nearest_prompt": recognise, **judges}
    return judges


def real_images_of(prompts: Iterable[str], sets: Sequence[ImageSet], epoch: int) -> list[tuple[str, Tensor]]:
    """For each prompt that is a caption, an image [C, H, W] of it.

    Args:
        prompts: The prompts.
        sets: Images with captions; the first that has one gives it.
        epoch: Of augmentation.
    """
    places: dict[str, tuple[ImageSet, int]] = {}
    for images in sets:
        for row, captions in enumerate(images.captions or ()):
            for text in captions:
                places.setdefault(text, (images, row))
    found = [(text, *places[text]) for text in prompts if text in places]
    return [(text, as_bytes(images[epoch, row]["pixel_values"])) for text, images, row in found]


def in_batches(pictures: Sequence[tuple[str, Tensor]], batch_size: int, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of pictures and what they show, as sets of images that are measured have them."""
    for positions in batches_of(len(pictures), batch_size, accelerator):
        texts, images = zip(*pictures[positions.start : positions.stop], strict=True)
        yield positions, torch.stack(images), list(texts)


def clocked(batches: Iterable[Batch], seconds: list[float]) -> Iterator[Batch]:
    """The same batches; the seconds that each took to make are noted."""
    start = perf_counter()
    for batch in batches:
        seconds.append(perf_counter() - start)
        yield batch
        start = perf_counter()
