"""Prompts and captions as embeddings: a text encoder of transformers with its tokenizer."""

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging

from .conditions import Text, take_rows
from .ranges import check_integer

logger = logging.get_logger(__name__)

TEXT_OPTIONS = ("cross_attention_dim", "text_length", "text_is_masked", "text_is_lowered")
"""What the configuration of every network of text says of the texts that it learned from."""

# A fast tokenizer keeps on itself how it fills up and cuts, and one may serve several threads.
_TOKENIZING = threading.Lock()
# A tokenizer that knows no limit has a number far beyond this one.
_UNLIMITED = 2**20


def width_of(text_encoder: Any) -> int:
    """Channels of the tokens that a text encoder hands out."""
    return text_encoder.config.hidden_size


def load_text_encoding(name: str) -> "TextEncoding":
    """A text encoder with its tokenizer, in float32: a folder or a name on the Hub, alone or in a pipeline's.

    Args:
        name: What holds both, or the folders text_encoder and tokenizer.

    Raises:
        ValueError: If there is none.
    """
    import transformers

    def read(subfolder: str) -> dict:
        with contextlib.suppress(OSError):  # of a name without such a folder
            return transformers.PretrainedConfig.get_config_dict(name, subfolder=subfolder)[0]
        return {}

    inside = read("text_encoder")
    config = inside or read("")
    try:
        own = (config.get("architectures") or [""])[0]
        if config.get("model_type") == "clip":  # it holds an image encoder, too
            own = "CLIPTextModel"
        is_encoder = own.endswith(("TextModel", "EncoderModel", "TextModelWithProjection"))
        kind = getattr(transformers, own) if is_encoder else transformers.AutoModelForTextEncoding
        folders = ("text_encoder", "tokenizer") if inside else ("", "")
        text_encoder = kind.from_pretrained(name, subfolder=folders[0], use_safetensors=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=folders[1])
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{name} holds no text encoder with its tokenizer: {said}.") from error
    encoding = TextEncoding.of(text_encoder, tokenizer)
    assert encoding is not None  # both are there
    return encoding


@dataclass(frozen=True)
class TextEncoding:
    """A text encoder and its tokenizer.

    Args:
        text_encoder: Any model of transformers that takes `input_ids` and `attention_mask` and has a `last_hidden_state`.
        tokenizer: Its tokenizer.
        is_masked: Whether the encoder is told which tokens fill a text up.
        is_lowered: Whether texts are put in lower case first, without spaces at their ends.
    """

    text_encoder: Any
    tokenizer: Any
    is_masked: bool = True
    is_lowered: bool = False

    @classmethod
    def of(cls, text_encoder: Any, tokenizer: Any, *networks: Any) -> "TextEncoding | None":
        """Both together, as networks take texts; `None` where both are.

        Args:
            text_encoder: The encoder.
            tokenizer: Its tokenizer.
            networks: Those that take the texts, or `None`. The first says how.

        Raises:
            ValueError: If one is without the other, or they are no text encoder and tokenizer.
        """
        if text_encoder is None and tokenizer is None:
            return None
        if text_encoder is None or tokenizer is None:
            missing = "text_encoder" if text_encoder is None else "tokenizer"
            raise ValueError(f"text_encoder and tokenizer go together, and {missing} is None.")
        module = getattr(text_encoder, "_orig_mod", text_encoder)  # what `torch.compile` wrapped
        if getattr(getattr(module, "config", None), "hidden_size", None) is None:
            raise ValueError(
                f"text_encoder must be one of transformers, such as CLIPTextModel, got {type(module).__name__}."
            )
        if not (callable(tokenizer) and hasattr(tokenizer, "model_max_length")):
            raise ValueError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}.")
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad_token, with which prompts are filled up to one length.")
        encoding = cls(text_encoder, tokenizer)
        return next((encoding.under(network.config) for network in networks if network is not None), encoding)

    def under(self, rules: Mapping[str, Any]) -> "TextEncoding":
        """The same under the rules for texts in a network's configuration, as far as it has any."""
        names = {"text_is_masked": "is_masked", "text_is_lowered": "is_lowered"}
        return dataclasses.replace(self, **{ours: rules[name] for name, ours in names.items() if name in rules})

    @property
    def tokenizer_digest(self) -> str:
        """A short digest of how texts become tokens, whatever the tokenizer was last asked for."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules: Any = sorted(self.tokenizer.get_vocab().items())
        if backend is not None:  # which keeps on itself how the last call filled up and cut
            rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        said = (rules, self.tokenizer.pad_token_id, self.tokenizer.padding_side, self.most_tokens)
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()

    @property
    def most_tokens(self) -> int:
        """Number of tokens of the longest prompt."""
        positions = getattr(self.text_encoder.config, "max_position_embeddings", None) or _UNLIMITED
        return min(self.tokenizer.model_max_length, positions, _UNLIMITED)

    def check_length(self, max_sequence_length: int) -> int:
        """Refuse a length that the encoder or its tokenizer cannot have."""
        return check_integer("max_sequence_length", max_sequence_length, 1, self.most_tokens)

    def encode(self, prompts: Sequence[str], length: int, device: torch.device | str) -> Text:
        """Embed prompts, each different one once.

        Args:
            prompts: The prompts.
            length: Number of tokens that each is filled up or cut to.
            device: Where the encoder computes.
        """
        known = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self._warn_of_cuts(list(known), length)
        rows = torch.tensor([known[prompt] for prompt in prompts], device=device)
        return take_rows(self.embed(list(known), length, device), rows)

    @torch.no_grad()
    def embed(self, prompts: list[str], length: int, device: torch.device | str) -> Text:
        """The same of a batch as it is, without a word of what is cut."""
        options = {"return_tensors": "pt", "return_attention_mask": True}
        inputs = self._tokenize(prompts, padding="max_length", max_length=length, truncation=True, **options)
        mask = inputs.attention_mask.to(device)
        options = {"attention_mask": mask} if self.is_masked else {}
        tokens = self.text_encoder(inputs.input_ids.to(device), **options).last_hidden_state
        return Text(tokens, mask.bool())

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has as a whole."""
        return [len(ids) for ids in self._tokenize(prompts, verbose=False).input_ids] if prompts else []

    def _tokenize(self, prompts: list[str], **options: Any) -> Any:
        """Numbers of the tokens of prompts, as the networks learned them."""
        with _TOKENIZING:
            return self.tokenizer([p.lower().strip() for p in prompts] if self.is_lowered else prompts, **options)

    def _warn_of_cuts(self, prompts: list[str], length: int) -> None:
        whole = self._tokenize(prompts, verbose=False).input_ids
        kept = self._tokenize(prompts, verbose=False, truncation=True, max_length=length).input_ids
        removed = [self._decode_lost(*ids) for ids in zip(whole, kept, strict=True) if len(ids[0]) > length]
        if removed:
            logger.warning(
                "The following part of your input was truncated because this model takes sequences up to "
                f"{length} tokens: {removed}"
            )

    def _decode_lost(self, whole: list[int], kept: list[int]) -> str:
        """The words of a text between what is kept of its beginning and the tokens that end any text."""
        first = next((i for i, token in enumerate(kept) if token != whole[i]), len(kept))
        return self.tokenizer.decode(whole[first : len(whole) - (len(kept) - first)])
