"""The residual U-ViT of SiD2 (arXiv 2410.19324): the trunk that all networks here share.

Levels run from the highest resolution to the lowest; the last is the middle stack. Going down, each level ends in
average pooling; going up, in nearest-neighbour upsampling. There is one residual skip per level and no concatenation:

    h = up(h_mid − h_down) + h_before_down

so a middle that is the identity makes the level the identity. Blocks are residual convolutions, parallel
attention-and-MLP transformers (ViT-22B, arXiv 2302.05442), or, for the lightest denoisers and beyond the paper,
depthwise-separable convolutions; all are modulated by the noise-level embedding (FiLM) and start as the identity.
"""

from collections.abc import Callable
from typing import cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu

from .conditions import ProjectedText

# Positions are at most a few dozen apart, so the base is far below that of language models.
_ROPE_BASE = 100.0


def start_at_zero(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Make a layer's output zero until it has learned."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class FiLM(nn.Module):
    """Scale and shift of normalised features, read from the embedding."""

    def __init__(self, embedding_dim: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * channels)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Map the embedding [B, E] to (1 + scale, shift), each [B, C]."""
        scale, shift = self.linear(embedding).chunk(2, dim=1)
        return 1 + scale, shift


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in groups of about 8 channels, at most 32 groups.

    Raises:
        ValueError: If the groups are not equal.
    """
    groups = max(1, min(32, channels // 8))
    if channels % groups:
        raise ValueError(
            f"A level of {channels} channels cannot be normalised in {groups} equal groups: level_channels may hold "
            "multiples of 8 up to 256, and of 32 beyond."
        )
    return nn.GroupNorm(groups, channels)


class UViTResBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation; the second starts at zero."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.norm_1 = group_norm(channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_2 = group_norm(channels)
        self.film = FiLM(embedding_dim, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        start_at_zero(self.conv_2)

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """Map features [B, C, H, W] and embedding [B, E] to features of the same shape."""
        scale, shift = self.film(embedding)
        residual = self.conv_1(silu(self.norm_1(hidden_states)))
        residual = torch.addcmul(shift[:, :, None, None], self.norm_2(residual), scale[:, :, None, None])
        return hidden_states + self.conv_2(silu(residual))


class UViTDepthwiseBlock(nn.Module):
    """A 3x3 convolution within each channel, then two layers across channels, the second starting at zero."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.film = FiLM(embedding_dim, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        start_at_zero(self.proj_out)

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """Map features [B, C, H, W] and embedding [B, E] to features of the same shape."""
        scale, shift = self.film(embedding)
        residual = torch.addcmul(shift[:, :, None, None], self.norm(hidden_states), scale[:, :, None, None])
        return hidden_states + self.proj_out(silu(self.proj_in(self.conv(residual))))


def rotary_angles(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Angles [H·W, 1, head_dim] of two-dimensional rotary positions: a quarter of the channels pairs a row's, as many a
    column's (RoFormer, arXiv 2104.09864, per axis). Those of the first half are negative, as `rotate` takes them."""
    exponents = torch.arange(0, 1, 4 / head_dim, device=device)[: head_dim // 4]
    frequencies = _ROPE_BASE**-exponents
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
    return torch.cat([-angles, angles], dim=2).reshape(height * width, 1, head_dim)


def rotate(features: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of [B, S, heads, D] by angles given as (cos, sin), each [S, 1, D]."""
    cos, sin = rotation
    return torch.addcmul(features * cos, features.roll(features.shape[-1] // 2, dims=-1), sin)


TextKeys = tuple[Tensor, Tensor, Tensor]
"""Of a text, keys and values [B, L, heads, head_dim] beside those of S tokens, and which of all count [B, 1, 1, S + L]."""


class UViTAttnProcessor:
    """Attention and MLP in parallel, through the attention backends of diffusers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "UViTParallelSelfAttention",
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        text: TextKeys | None = None,
    ) -> Tensor:
        channels = hidden_states.shape[-1]
        projected = attn.to_qkv_mlp_proj(hidden_states)
        query, key, value, mlp = projected.split([channels, channels, channels, 4 * channels], dim=-1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in (query, key, value))
        query, key = rotate(attn.norm_q(query), rotation), rotate(attn.norm_k(key), rotation)
        mask = None
        if text is not None:
            text_key, text_value, mask = text
            key, value = torch.cat([key, text_key], dim=1), torch.cat([value, text_value], dim=1)
        attended = dispatch_attention_fn(
            query, key, value, mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(attn.dropout(torch.cat([attended.flatten(2), gelu(mlp, approximate="tanh")], dim=-1)))


class UViTParallelSelfAttention(nn.Module, AttentionModuleMixin):
    """Self-attention and a fourfold MLP with fused input and output projections; the output starts at zero."""

    _default_processor_cls = UViTAttnProcessor
    _available_processors = [UViTAttnProcessor]
    _supports_qkv_fusion = False  # the projections are fused in the checkpoint already
    # Of the host's mixin, whose processors may be others than ours.
    set_processor: Callable[[Callable], None]
    processor: Callable[..., Tensor]

    def __init__(self, channels: int, attention_head_dim: int, dropout: float):
        super().__init__()
        self.heads = channels // attention_head_dim
        self.to_qkv_mlp_proj = nn.Linear(channels, 7 * channels)
        self.norm_q = nn.RMSNorm(attention_head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(attention_head_dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(5 * channels, channels)
        start_at_zero(self.to_out)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor], text: TextKeys | None = None) -> Tensor:
        """Map tokens [B, S, C] to what the block adds to them; `rotation` is (cos, sin), each [S, 1, head_dim]."""
        # Without text the call is the one of processors that know none.
        return self.processor(self, hidden_states, rotation, *(() if text is None else (text,)))


class UViTTransformerBlock(nn.Module):
    """Parallel transformer block with FiLM after its one normalisation."""

    def __init__(self, channels: int, embedding_dim: int, attention_head_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps=1e-6)
        self.film = FiLM(embedding_dim, channels)
        self.attn = UViTParallelSelfAttention(channels, attention_head_dim, dropout)

    def forward(
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        rotation: tuple[Tensor, Tensor],
        text: TextKeys | None = None,
    ) -> Tensor:
        """Map tokens [B, S, C], embedding [B, E] and what the attention takes of a text to tokens of the same shape."""
        scale, shift = self.film(embedding)
        modulated = torch.addcmul(shift[:, None], self.norm(hidden_states), scale[:, None])
        return hidden_states + self.attn(modulated, rotation, text)


class UViTStage(nn.Module):
    """Equal blocks at one resolution, over feature maps [B, C, H, W]."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # the host sets it where it sets `gradient_checkpointing`

    def __init__(
        self,
        channels: int,
        block_type: str,
        num_blocks: int,
        embedding_dim: int,
        attention_head_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.channels, self.attends = channels, block_type == "transformer"
        self.attention_head_dim = attention_head_dim
        self.gradient_checkpointing = False
        convolution = UViTDepthwiseBlock if block_type == "depthwise" else UViTResBlock
        self.blocks = nn.ModuleList(
            UViTTransformerBlock(channels, embedding_dim, attention_head_dim, dropout)
            if self.attends
            else convolution(channels, embedding_dim)
            for _ in range(num_blocks)
        )

    def forward(
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        keys_values: tuple[tuple[Tensor, Tensor], ...] = (),
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks; transformer blocks see the map as a sequence in row-major order, and of a text each its pair of
        keys and values, where they attend to one; `text_mask` [B, L] says which of its tokens count."""
        height, width = hidden_states.shape[-2:]
        rotation: tuple[tuple[Tensor, Tensor], ...] = ()
        if self.attends:
            angles = rotary_angles(height, width, self.attention_head_dim, hidden_states.device)
            rotation = ((angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)),)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        texts: list[tuple] = [() for _ in self.blocks]
        if keys_values and text_mask is not None:
            mask = pad(text_mask, (height * width, 0), value=True)[:, None, None]
            texts = [((*pair, mask),) for pair in keys_values]
        for block, text in zip(self.blocks, texts, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, embedding, *rotation, *text)
            else:
                hidden_states = block(hidden_states, embedding, *rotation, *text)
        if self.attends:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, (height, width))
        return hidden_states


def lay_out(sample: Tensor) -> Tensor:
    """An image [B, C, H, W] as its values lie in memory where sampling is fastest.

    On a CPU convolutions, pooling and upsampling are faster over channels that lie last, and tokens lie as they are taken.
    Not in training: backward passes over such maps have crashed.
    """
    if sample.device.type == "cpu" and not torch.is_grad_enabled():
        return sample.contiguous(memory_format=torch.channels_last)
    return sample


class UViTTrunk(nn.Module):
    """Patch embedding, levels going down, middle, levels going up.

    Args:
        in_channels: Image channels.
        patch_size: Side of the patches that the highest level works on.
        level_channels: Width of each level, from the highest resolution to the middle.
        level_types: "res", "transformer" or "depthwise" for each level.
        level_blocks: Blocks of each level, as many going down as going up; for the last, the middle, all its blocks.
        attention_head_dim: Channels of one attention head, a multiple of 4.
        embedding_dim: Width of the conditioning embedding.
        dropout: Dropout rate before the output of transformer blocks.

    Raises:
        ValueError: If the levels' lists differ in length or a width does not fit its heads.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        level_channels: tuple[int, ...],
        level_types: tuple[str, ...],
        level_blocks: tuple[int, ...],
        attention_head_dim: int,
        embedding_dim: int,
        dropout: float,
    ):
        super().__init__()
        if not len(level_channels) == len(level_types) == len(level_blocks) > 0:
            raise ValueError(
                "level_channels, level_types and level_blocks must name the same levels, got "
                f"{len(level_channels)}, {len(level_types)} and {len(level_blocks)} entries."
            )
        for width, block_type in zip(level_channels, level_types, strict=True):
            if block_type not in ("res", "transformer", "depthwise"):
                raise ValueError(f"level_types must hold 'res', 'transformer' or 'depthwise', got {block_type!r}.")
            if block_type == "transformer" and (width % attention_head_dim or attention_head_dim % 4):
                raise ValueError(
                    "Transformer levels need a width divisible by attention_head_dim and that divisible by 4, "
                    f"got width {width} and attention_head_dim {attention_head_dim}."
                )
        self.stride = patch_size * 2 ** (len(level_channels) - 1)

        def stage(level: int) -> UViTStage:
            width, block_type, num_blocks = level_channels[level], level_types[level], level_blocks[level]
            return UViTStage(width, block_type, num_blocks, embedding_dim, attention_head_dim, dropout)

        outer = range(len(level_channels) - 1)
        self.patch_embed = nn.Conv2d(in_channels, level_channels[0], patch_size, stride=patch_size)
        self.down = nn.ModuleList(stage(level) for level in outer)
        self.downsample = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(level_channels[level], level_channels[level + 1], 1))
            for level in outer
        )
        self.middle = stage(-1)
        # Without bias, so that a level whose middle changes nothing changes nothing itself.
        self.upsample = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(level_channels[level + 1], level_channels[level], 1, bias=False),
                nn.Upsample(scale_factor=2, mode="nearest"),
            )
            for level in outer
        )
        self.up = nn.ModuleList(stage(level) for level in outer)

    @property
    def stages(self) -> list[UViTStage]:
        """All stages in the order in which they run."""
        return cast(list[UViTStage], [*self.down, self.middle, *reversed(self.up)])

    def forward(
        self,
        sample: Tensor,
        embedding: Tensor,
        context: tuple[Tensor, ...] | None = None,
        text: ProjectedText | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the last feature map of every level, from the highest resolution to the middle.

        Args:
            sample: Images [B, C, H, W], H and W divisible by `stride`.
            embedding: Conditioning [B, embedding_dim].
            context: What is added to each level's features on entry, one map per level in the same order.
            text: What blocks that attend to text take of it.
        """
        height, width = sample.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"Image sizes must be divisible by {self.stride} (patch size times downsampling), "
                f"got height {height} and width {width}."
            )
        sample = lay_out(sample)
        num_stages, mask = len(self.down) + 1 + len(self.up), None if text is None else text.mask
        keys_values = ((),) * num_stages if text is None else text.keys_values
        hidden_states = self.patch_embed(sample)
        skips = []
        for level, (stage, downsample) in enumerate(zip(self.down, self.downsample, strict=True)):
            if context is not None:
                hidden_states = hidden_states + context[level]
            before = stage(hidden_states, embedding, keys_values[level], mask)
            hidden_states = downsample(before)
            skips.append((before, hidden_states))
        if context is not None:
            hidden_states = hidden_states + context[-1]
        last = len(self.down)
        hidden_states = self.middle(hidden_states, embedding, keys_values[last], mask)
        features = [hidden_states]
        for i, (stage, upsample) in enumerate(zip(reversed(self.up), reversed(self.upsample), strict=True), last + 1):
            before, after = skips.pop()
            hidden_states = stage(upsample(hidden_states - after) + before, embedding, keys_values[i], mask)
            features.append(hidden_states)
        return tuple(reversed(features))
