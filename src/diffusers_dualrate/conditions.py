"""What images are drawn of, as one value: classes, texts or nothing. And a text as the networks take it.

A condition is a tensor of class labels [B], a [`Text`], a [`ProjectedText`] or `None`. Whatever picks, joins or replaces
rows of a batch does so by the functions here, and needs not know which of them it has.

A network projects a text once per call. Every transformer block gets keys and values of its own, which stand beside those
of the image (as in Imagen, arXiv 2205.11487). One embedding of the whole text joins that of the noise level.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class Text(NamedTuple):
    """Texts as a text encoder hands them out.

    Attributes:
        tokens: Embedding of each token [B, L, D].
        mask: Whether each token is one of the text, or fills it up to L [B, L].
        pooled: An embedding of the whole text [B, P], for networks that ask for one.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class ProjectedText(NamedTuple):
    """Texts as a network made them its own.

    Attributes:
        embedding: What is added to the embedding of the noise level [B, embedding_dim].
        keys_values: For each stage of the trunk, in the order in which they run, the pairs of keys and values
            [B, L, heads, head_dim] of its blocks; none where no block attends to text.
        mask: As of [`Text`].
    """

    embedding: Tensor
    keys_values: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    mask: Tensor


Condition = Tensor | Text | ProjectedText | None
AnyCondition = TypeVar("AnyCondition", bound=Condition)


def _map(function: Callable[..., Tensor], *parts):
    """The function of each tensor of equal structures, in that structure."""
    first = parts[0]
    if first is None or isinstance(first, Tensor):
        return first if first is None else function(*parts)
    mapped = [_map(function, *inner) for inner in zip(*parts, strict=True)]
    return type(first)(*mapped) if hasattr(first, "_fields") else tuple(mapped)


def blank_text(config: Any) -> Text:
    """A text of the width and length that a network's configuration says, for shapes and FLOPs."""
    tokens = torch.empty(1, config.text_length, config.cross_attention_dim)
    pooled = config.get("pooled_projection_dim")
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return Text(tokens, mask, None if pooled is None else torch.empty(1, pooled))


def take_rows(condition: AnyCondition, rows: Tensor | slice) -> AnyCondition:
    """The condition of some rows of a batch."""
    return _map(lambda part: part[rows], condition)


def repeat_rows(condition: AnyCondition, times: int) -> AnyCondition:
    """Each row several times, one behind the other."""
    return _map(lambda part: part.repeat_interleave(times, 0), condition)


def join(first: AnyCondition, second: AnyCondition) -> AnyCondition:
    """The rows of two conditions of the same kind, one behind the other."""
    return _map(lambda *parts: torch.cat(parts), first, second)


def replace_rows(condition: AnyCondition, is_replaced: Tensor, null: AnyCondition | int | None) -> AnyCondition:
    """Replace some rows by what stands for no condition.

    Args:
        condition: Of a batch; `None` stays.
        is_replaced: Which rows [B].
        null: The label of no class, or an empty text of one row; `None` replaces nothing.
    """
    if condition is None or null is None:
        return condition
    if isinstance(condition, Tensor):
        return cast(AnyCondition, torch.where(is_replaced, cast(int, null), condition))
    return _map(
        lambda part, other: torch.where(is_replaced.reshape(-1, *[1] * (part.ndim - 1)), other, part), condition, null
    )


class TextProjection(nn.Module):
    """Keys and values of a text for every block that attends to it, and one embedding of the whole.

    The embedding is a mean over the text's tokens between two layers, so that it learns which tokens count.

    Args:
        text_dim: Width D of the tokens.
        embedding_dim: Width of the embedding.
        stages: For each stage of the trunk the widths of its blocks that attend to text.
        attention_head_dim: Channels of one attention head.
    """

    def __init__(self, text_dim: int, embedding_dim: int, stages: Sequence[Sequence[int]], attention_head_dim: int):
        super().__init__()
        self.attention_head_dim = attention_head_dim
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.embed_1 = nn.Linear(text_dim, embedding_dim)
        self.embed_2 = nn.Linear(embedding_dim, embedding_dim)
        self.to_kv = nn.ModuleList(
            nn.ModuleList(nn.Linear(text_dim, 2 * width, bias=False) for width in widths) for widths in stages
        )
        self.norm_k = nn.ModuleList(
            nn.ModuleList(nn.RMSNorm(attention_head_dim, eps=1e-6) for _ in widths) for widths in stages
        )

    def forward(self, text: Text) -> ProjectedText:
        """Project texts; the tokens have the type that the network computes in."""
        tokens, share = self.norm(text.tokens), text.mask.to(text.tokens.dtype)
        share = share / share.sum(1, keepdim=True).clamp(min=1)  # some tokenizers make no token of an empty text
        whole = (silu(self.embed_1(tokens)) * share[:, :, None]).sum(1)
        keys_values = tuple(
            tuple(self._attend(tokens, to_kv, norm_k) for to_kv, norm_k in zip(projections, norms, strict=True))
            for projections, norms in zip(
                cast(Sequence[nn.ModuleList], self.to_kv), cast(Sequence[nn.ModuleList], self.norm_k), strict=True
            )
        )
        return ProjectedText(self.embed_2(whole), keys_values, text.mask)

    def _attend(self, tokens: Tensor, to_kv: nn.Module, norm_k: nn.Module) -> tuple[Tensor, Tensor]:
        key, value = to_kv(tokens).unflatten(-1, (-1, self.attention_head_dim)).chunk(2, dim=2)
        return norm_k(key), value
