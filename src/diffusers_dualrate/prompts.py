"""What a call asks the images to show: classes, prompts or the embeddings of prompts, checked before anything is computed."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .class_labels import ClassLabels, find_label_ids
from .conditions import Condition, Text, repeat_rows, take_rows
from .ranges import check_integer
from .text_encoding import TextEncoding


@dataclass(frozen=True)
class Conditioning:
    """What a call says of what the images are to show, as it is given; the pipeline's call documents each."""

    prompt: ClassLabels | None = None
    class_labels: ClassLabels | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    max_sequence_length: int | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    @property
    def has_condition(self) -> bool:
        """Whether there is anything to guide towards."""
        return not (self.prompt is None and self.class_labels is None and self.prompt_embeds is None)

    def of_rows(self, rows: slice) -> "Conditioning":
        """What some of the images are to show, where each has a class or embeddings of its own."""
        return Conditioning(**{name: None if value is None else value[rows] for name, value in vars(self).items()})

    def check(self, config: Any, id2label: Mapping[int, str], encoding: TextEncoding | None) -> "CheckedConditioning":
        """Check it against what a model takes.

        Args:
            config: Configuration of its denoiser.
            id2label: Names of its classes.
            encoding: Its text encoder, if it has one.
        """
        if config.cross_attention_dim is not None:
            return self._check_text(config, encoding)
        takes = "takes class_labels" if config.num_classes is not None else "is unconditional"
        for name, value in vars(self).items():
            if name not in ("prompt", "class_labels") and value is not None:
                raise ValueError(f"This model {takes}, and no text: leave {name} out.")
        if self.prompt is not None and self.class_labels is not None:
            raise ValueError("prompt and class_labels of a model of classes are the same: give one of them.")
        labels = self.class_labels if self.prompt is None else self.prompt
        if labels is None:
            return CheckedConditioning()
        return CheckedConditioning(
            class_labels=find_label_ids(labels, config.num_classes, id2label), null=config.num_classes
        )

    def encode(
        self,
        config: Any,
        encoding: TextEncoding | None,
        device: torch.device | str,
        times: int,
        guides: bool,
    ) -> tuple[Text, Text | None]:
        """Embeddings of the prompts, and of what guidance leads away from; the arguments are those of the steps."""
        if config.cross_attention_dim is None:
            raise ValueError("This model takes no prompts.")
        asked = self.check(config, {}, encoding)
        if guides and not asked.has_null:
            raise ValueError(
                "do_classifier_free_guidance=True needs negative_prompt_embeds, where there is no text_encoder."
            )
        text, null = asked.compute(encoding, device, check_integer("num_images_per_prompt", times, 1), guides)
        return cast(Text, text), cast(Text | None, null)

    def _check_text(self, config: Any, encoding: TextEncoding | None) -> "CheckedConditioning":
        if self.class_labels is not None:
            raise ValueError("This model takes text: give prompt instead of class_labels.")
        if (self.prompt is None) == (self.prompt_embeds is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"This model takes text: give either prompt or prompt_embeds, got {given}.")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds say the same: give one of them.")
        if encoding is None and (self.prompt is not None or self.negative_prompt is not None):
            raise ValueError(
                "This model has no text_encoder and no tokenizer: give prompt_embeds, and no prompt or negative_prompt."
            )
        self._check_company()
        if (pooled_dim := config.get("pooled_projection_dim")) is not None:
            encoding = None  # no text encoder of this pipeline makes pooled embeddings
        self._check_pooled(pooled_dim)
        prompts = text = negatives = null = None
        if self.prompt is not None:
            assert encoding is not None
            length = self.max_sequence_length
            length = encoding.check_length(min(config.text_length, encoding.most_tokens) if length is None else length)
            prompts = check_prompts("prompt", self.prompt)
            shape: tuple[int, ...] = (len(prompts), length, config.cross_attention_dim)
        else:
            shape = (-1, -1, config.cross_attention_dim)
            mask = self.prompt_attention_mask
            text = _check_embeds(
                "prompt_embeds", self.prompt_embeds, mask, shape, self.pooled_prompt_embeds, pooled_dim
            )
            if mask is None and config.text_is_masked:
                warnings.warn(
                    "prompt_embeds came without prompt_attention_mask, so all their tokens count, padding too. "
                    "encode_prompt returns embeddings and mask, then the same of the negative prompt.",
                    stacklevel=2,
                )
            shape = tuple(text.tokens.shape)
        if self.negative_prompt_embeds is not None:
            mask = self.negative_prompt_attention_mask
            pooled = self.negative_pooled_prompt_embeds
            null = _check_embeds(
                "negative_prompt_embeds", self.negative_prompt_embeds, mask, shape, pooled, pooled_dim
            )
        elif encoding is not None:
            negatives = check_prompts("negative_prompt", "" if self.negative_prompt is None else self.negative_prompt)
            if not isinstance(self.negative_prompt, (list, tuple)):
                negatives = negatives * shape[0]
            if len(negatives) != shape[0]:
                raise ValueError(
                    f"negative_prompt needs one entry for each of {shape[0]} prompts, got {len(negatives)}."
                )
        negates = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        return CheckedConditioning(None, prompts, text, negatives, null, length=shape[1], negates=negates)

    def _check_company(self) -> None:
        """Refuse what would have no effect for want of what it belongs to."""
        for name, owner in (
            ("prompt_attention_mask", "prompt_embeds"),
            ("negative_prompt_attention_mask", "negative_prompt_embeds"),
            ("pooled_prompt_embeds", "prompt_embeds"),
            ("negative_pooled_prompt_embeds", "negative_prompt_embeds"),
            ("max_sequence_length", "prompt"),
        ):
            if getattr(self, name) is not None and getattr(self, owner) is None:
                raise ValueError(f"{name} belongs to {owner}, which is not given: leave it out.")

    def _check_pooled(self, width: int | None) -> None:
        """Refuse texts without pooled embeddings for networks that take them, and the other way round."""
        given = {
            "prompt_embeds": self.pooled_prompt_embeds,
            "negative_prompt_embeds": self.negative_pooled_prompt_embeds,
        }
        for owner, pooled in given.items():
            name = owner.replace("prompt", "pooled_prompt")
            if width is None and pooled is not None:
                raise ValueError(f"This model takes no pooled embeddings: leave {name} out.")
            if width is not None and pooled is None and getattr(self, owner) is not None:
                raise ValueError(f"This model takes pooled embeddings, too: give {name} beside {owner}.")
        if width is not None and (self.prompt is not None or self.negative_prompt is not None):
            raise ValueError(
                "This model takes texts with pooled embeddings: give prompt_embeds and pooled_prompt_embeds, as the "
                "encode_prompt of its own pipeline makes them, and no prompt or negative_prompt."
            )


@dataclass(frozen=True)
class CheckedConditioning:
    """What the images of a call are to show, checked: classes, or prompts, or texts. Nothing is computed yet.

    Args:
        class_labels: Class of each image.
        prompts: Prompt of each image.
        text: Their embeddings instead.
        negatives: What the branch is given that guidance leads away from.
        null: Their embeddings instead, or the label of no class; `None` for no such branch.
        length: Number of tokens that prompts are filled up or cut to.
        negates: Whether the call itself says what guidance leads away from.
    """

    class_labels: list[int] | None = None
    prompts: list[str] | None = None
    text: Text | None = None
    negatives: list[str] | None = None
    null: Text | int | None = None
    length: int = 0
    negates: bool = False

    def __len__(self) -> int:
        """Number of classes, prompts or texts; 0 where nothing is asked for."""
        return len(self.class_labels or self.prompts or (() if self.text is None else self.text.tokens))

    @property
    def has_null(self) -> bool:
        """Whether guidance has something to lead away from."""
        return self.negatives is not None or self.null is not None

    def compute(
        self, encoding: TextEncoding | None, device: torch.device | str, times: int, guides: bool
    ) -> tuple[Condition, Condition]:
        """The condition of every image and that of its null branch.

        Args:
            encoding: The model's text encoder, if it has one.
            device: Where the networks compute.
            times: Number of images for each prompt or class.
            guides: Whether the call is guided. Without, no text is encoded for the null branch, and there is none. That
                of classes is the chain's to make, which knows whether its networks have one.
        """
        if self.class_labels is not None:
            return repeat_rows(torch.tensor(self.class_labels, device=device), times), None
        if len(self) == 0:
            return None, None
        if self.negates and not guides:
            warnings.warn("negative_prompt has no effect without guidance: see guidance_scale.", stacklevel=5)
        texts = [(self.prompts, self.text), (self.negatives, self.null) if guides else (None, None)]
        asked = [prompt for prompts, _ in texts for prompt in prompts or ()]
        encoded = None
        if asked:
            assert encoding is not None  # prompts are taken only where they can be encoded
            if self.length > encoding.most_tokens:  # of embeddings that came from elsewhere
                raise ValueError(
                    f"prompt_embeds have {self.length} tokens, and the text_encoder embeds a negative prompt in at most "
                    f"{encoding.most_tokens}: give negative_prompt_embeds."
                )
            encoded = encoding.encode(asked, self.length, device)  # all at once, and each only once
        conditions, first = [], 0
        for prompts, text in texts:
            if prompts is not None and encoded is not None:
                text = take_rows(encoded, slice(first, first + len(prompts)))
                first += len(prompts)
            elif isinstance(text, Text):
                text = Text(*(None if part is None else part.to(device) for part in text))  # type: ignore[arg-type]
            conditions.append(repeat_rows(cast(Text | None, text), times))
        return conditions[0], conditions[1]


class PromptMixin:
    """What a pipeline offers beside its call to those who look up classes or embed prompts."""

    denoiser: Any
    context_encoder: Any
    text_encoder: Any
    tokenizer: Any
    _execution_device: torch.device
    id2label: Any

    @property
    def _text_encoding(self) -> TextEncoding | None:
        """What embeds prompts, as the networks take them."""
        return TextEncoding.of(self.text_encoder, self.tokenizer, self.context_encoder, self.denoiser)

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Turn classes in any form into a list of their numbers.

        Args:
            class_labels: A number, a name of `id2label`, a list of either, or an integer tensor [B] or [].
        """
        return find_label_ids(class_labels, self.denoiser.config.num_classes, self.id2label)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Embed prompts, so that several calls can share the embeddings.

        Args:
            prompt: As of a call, and so is what follows and is not named here.
            do_classifier_free_guidance: Whether to embed the negative or the empty prompt, too.
            negative_prompt: As of a call.
            num_images_per_prompt: How often each prompt is repeated.
            device: Where; default: where the pipeline computes.
            prompt_embeds: As of a call.
            negative_prompt_embeds: As of a call.
            prompt_attention_mask: As of a call.
            negative_prompt_attention_mask: As of a call.
            max_sequence_length: As of a call.

        Returns:
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds and negative_prompt_attention_mask of a call.
        """
        wanted = Conditioning(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        device = self._execution_device if device is None else device
        encoding, guides = self._text_encoding, do_classifier_free_guidance
        text, null = wanted.encode(self.denoiser.config, encoding, device, num_images_per_prompt, guides)
        negative = (None, None) if null is None else (null.tokens, null.mask)
        return text.tokens, text.mask, *negative


def check_text_encoder(name: str, pipe: Any) -> None:
    """Refuse a model of text without a text encoder, where prompts are asked for.

    Raises:
        ValueError: If there is none.
    """
    if pipe.denoiser.config.cross_attention_dim is not None and pipe.text_encoder is None:
        raise ValueError(
            f"{name} has no text_encoder to embed prompts: save it with text_encoder and tokenizer, or call the pipeline "
            "with prompt_embeds."
        )


def check_prompts(name: str, prompts: object) -> list[str]:
    """A prompt, or several in a list, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"{name} must be a string or a list of strings, got a {type(prompts).__name__}.")
    for each in prompts:
        if not isinstance(each, str):
            raise ValueError(f"{name} must be a string or a list of strings, got {each!r} in the list.")
    if not prompts:
        raise ValueError(f"{name} is empty.")
    return list(prompts)


def _check_embeds(
    name: str, tokens: object, mask: object, shape: tuple[int, ...], pooled: Tensor | None, width: int | None
) -> Text:
    """Embeddings of prompts with their mask and, for networks that take them, pooled ones; a shape of −1 is any."""
    if not (isinstance(tokens, Tensor) and tokens.is_floating_point()):
        what = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be a tensor of floating-point numbers [B, tokens, channels], got {what}.")
    fits = tokens.ndim == 3 and all(side in (-1, length) for side, length in zip(shape, tokens.shape, strict=True))
    if not fits or 0 in tokens.shape:
        sides = ["any" if side == -1 else str(side) for side in shape]
        raise ValueError(f"{name} must have shape [{', '.join(sides)}], got {list(tokens.shape)}.")
    if not tokens.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity among them.")
    name = name.replace("embeds", "attention_mask")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a tensor of shape {list(tokens.shape[:2])}, got {got}.")
    if mask.is_floating_point() or mask.is_complex():  # one that is added to attention has 0 where a token counts
        raise ValueError(f"{name} must be of booleans or integers, got {mask.dtype}.")
    mask = mask.to(tokens.device).bool()
    if not (name.startswith("negative") or mask.any(1).all()):  # an empty prompt may have none
        raise ValueError(f"{name} must leave each prompt a token, and leaves one of them none.")
    if width is not None:
        expected, name = [len(tokens), width], name.replace("prompt_attention_mask", "pooled_prompt_embeds")
        if not (isinstance(pooled, Tensor) and pooled.is_floating_point() and list(pooled.shape) == expected):
            got = list(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"{name} must be a floating-point tensor of shape {expected}, got {got}.")
        if not pooled.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity among them.")
    return Text(tokens, mask, pooled)
