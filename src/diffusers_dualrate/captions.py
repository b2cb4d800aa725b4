"""What a training shows its networks beside the images: classes, or captions as embeddings that are computed once."""

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .conditions import Condition, Text
from .inventory import captions_from_bytes
from .origins import digest
from .text_encoding import TEXT_OPTIONS, TextEncoding, width_of

_MOST_LOOKED_AT = 20_000  # captions whose tokens are counted as a run begins
_MOST_BYTES = 2**31  # of embeddings that are kept
# Captions that are embedded at a time, always as many: the rounding of kernels depends on it, and a run that is resumed
# meets its captions in another order.
_AT_ONCE = 32


class CaptionEmbeddings:
    """Embeddings of captions, each computed once and kept in memory, without what fills it up where networks leave that out.

    Args:
        encoding: Text encoder and tokenizer; the encoder is frozen.
        length: Number of tokens that captions are filled up or cut to, if the encoder takes so many.
    """

    def __init__(self, encoding: TextEncoding, length: int):
        self.encoding, self.length = encoding, min(length, encoding.most_tokens)
        encoding.text_encoder.eval().requires_grad_(False)
        self._kept: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()  # and how many tokens are the caption's own
        self._num_bytes = 0

    @property
    def network_options(self) -> dict[str, int | bool]:
        """What the configuration of a network says of such texts."""
        rules = width_of(self.encoding.text_encoder), self.length, self.encoding.is_masked, self.encoding.is_lowered
        return dict(zip(TEXT_OPTIONS, rules, strict=True))

    def warn_of_cuts(self, captions: Sequence[Sequence[str]]) -> None:
        """Warn where captions are longer than what is kept of them; of very many some are looked at.

        Args:
            captions: Those of each image.
        """
        texts = [text for own in captions for text in own]
        looked_at = texts[:: max(1, len(texts) // _MOST_LOOKED_AT)]
        num_cut = sum(length > self.length for length in self.encoding.count_tokens(looked_at))
        if num_cut:
            warnings.warn(
                f"{num_cut:,} of {len(looked_at):,} captions have more than {self.length} tokens, and what follows is not "
                "learned: see text_length of the preset.",
                stacklevel=2,
            )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Digests of what makes embeddings of captions, by name."""
        text_encoder, tokenizer = self.encoding.text_encoder.state_dict(), self.encoding.tokenizer_digest
        return {"text_encoder": digest(text_encoder), "tokenizer": tokenizer}

    def embed(self, captions: Sequence[str], device: torch.device | str) -> Text:
        """Embeddings of captions, on a device."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        for first in range(0, len(missing), _AT_ONCE):
            self._encode(missing[first : first + _AT_ONCE], device)
        rows = [self._kept[caption] for caption in captions]
        while self._num_bytes > _MOST_BYTES and len(self._kept) > len(rows):
            self._num_bytes -= self._kept.popitem(last=False)[1][0].nbytes
        sample, _ = rows[0]
        tokens = sample.new_zeros(len(rows), self.length, sample.shape[1])
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)] = row
        lengths = torch.tensor([length for _, length in rows])
        return Text(tokens.to(device), (torch.arange(self.length) < lengths[:, None]).to(device))

    def _encode(self, captions: list[str], device: torch.device | str) -> None:
        self.encoding.text_encoder.to(device)
        fillers = [captions[0]] * (_AT_ONCE - len(captions))
        text = self.encoding.embed([*captions, *fillers], self.length, device)
        for caption, tokens, mask in zip([*captions, *fillers], text.tokens, text.mask, strict=True):
            if caption not in self._kept:
                kept = (tokens[mask] if self.encoding.is_masked else tokens.clone()).cpu()  # no view of the batch
                self._kept[caption] = kept, int(mask.sum())
                self._num_bytes += kept.nbytes


class TrainingConditions:
    """What the images of a run show: classes, texts or nothing.

    Args:
        images: What the run learns from.
        captions: What embeds their captions, if they have any.
        device: Where the networks are.
    """

    def __init__(self, images: Any, captions: CaptionEmbeddings | None, device: torch.device | str):
        self._images, self._captions, self._device = images, captions, device

    def __bool__(self) -> bool:
        """Whether there are any, so that there is something to guide towards."""
        return self._captions is not None or self._images.num_classes is not None

    def of(self, batch: Mapping[str, Tensor]) -> Condition:
        """The condition of a batch as it came from the loader."""
        if self._captions is None:
            return batch.get("class_labels")
        return self._captions.embed(captions_from_bytes(batch["caption"]), self._device)

    @cached_property
    def null(self) -> Text | int | None:
        """What stands for no condition: the label of no class, or the empty text."""
        return self._images.num_classes if self._captions is None else self._captions.embed([""], self._device)

    def compute(self, asked: Mapping[str, Any]) -> Condition:
        """The condition that `examples` asks for."""
        if "prompt" in asked and self._captions is not None:
            return self._captions.embed(asked["prompt"], self._device)
        return torch.tensor(asked["class_labels"], device=self._device) if "class_labels" in asked else None

    def examples(self, count: int) -> tuple[dict[str, Any], list[str] | None]:
        """Arguments of a pipeline's call that draws an image of each of some conditions, and their names."""
        if self._captions is not None:
            prompts = self._images.list_captions(count)
            return {"prompt": prompts}, prompts
        if self._images.num_classes is None:
            return {"batch_size": count}, None
        num_classes, names = self._images.num_classes, self._images.id2label or {}
        labels = [i * num_classes // count for i in range(count)]
        return {"class_labels": labels}, [names.get(label, str(label)) for label in labels]
