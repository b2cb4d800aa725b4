"""The residual U-ViT against plain implementations of its blocks, its levels and its positions."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from diffusers_dualrate.network import NoiseLevelEmbedding
from diffusers_dualrate.uvit import (
    UViTParallelSelfAttention,
    UViTResBlock,
    UViTStage,
    UViTTransformerBlock,
    UViTTrunk,
    rotary_angles,
    rotate,
)


def randomise(module):
    """Give every parameter a value of its own, so that none can be left out unnoticed."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def cos_sin(angles):
    return angles.cos(), angles.sin()


def rms(x):
    return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def film(block, embedding):
    weights, bias = block.film.linear.weight, block.film.linear.bias
    channels = len(bias) // 2
    scale = embedding @ weights[:channels].T + bias[:channels]
    return 1 + scale, embedding @ weights[channels:].T + bias[channels:]


def tiny_trunk(channels=(8, 16, 8), types=("res", "transformer", "res"), blocks=(1, 1, 1), patch_size=1, dropout=0.0):
    return UViTTrunk(3, patch_size, channels, types, blocks, 8, 12, dropout)


def test_the_residual_block_is_a_modulated_pair_of_convolutions():
    """Kills: FiLM after the first instead of the second norm; scale and shift swapped; scale without the 1; a missing
    SiLU; a missing skip; another number of groups."""
    block = randomise(UViTResBlock(24, 12))
    x, embedding = torch.randn(2, 24, 5, 4).double(), torch.randn(2, 12).double()

    def normalise(h, norm):
        groups = h.reshape(2, 3, -1)  # of 8 channels each
        centred = groups - groups.mean(2, keepdim=True)
        h = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        return h * norm.weight[:, None, None] + norm.bias[:, None, None]

    def swish(h):
        return h / (1 + torch.exp(-h))

    scale, shift = film(block, embedding)
    h = conv2d(swish(normalise(x, block.norm_1)), block.conv_1.weight, block.conv_1.bias, padding=1)
    h = normalise(h, block.norm_2) * scale[:, :, None, None] + shift[:, :, None, None]
    expected = x + conv2d(swish(h), block.conv_2.weight, block.conv_2.bias, padding=1)
    torch.testing.assert_close(block(x, embedding), expected)


def rotate_as_complex(features, height, width):
    """RoPE of [B, S, heads, D] by complex multiplication, position by position."""
    quarter = features.shape[-1] // 4
    first, second = features.chunk(2, dim=-1)
    rotated = torch.complex(first, second).clone()
    for row in range(height):
        for column in range(width):
            for i in range(quarter):
                frequency = 100.0 ** (-i / quarter)
                rotated[:, row * width + column, :, i] *= complex(math.cos(row * frequency), math.sin(row * frequency))
                rotated[:, row * width + column, :, quarter + i] *= complex(
                    math.cos(column * frequency), math.sin(column * frequency)
                )
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def test_the_transformer_block_runs_attention_and_mlp_in_parallel_on_one_normalised_input():
    """ViT-22B: h + W_o [attention; gelu(mlp)] of FiLM(RMSNorm h), with RMSNorm then RoPE on q and k, head by head.

    Kills: a missing norm on q or k; norm after rotation with its weight; the scale 1/√D; q and k swapped with v; MLP and
    attention swapped in the output; heads and channels interleaved; scale and shift swapped; scale without the 1.
    """
    channels, head_dim, height, width = 16, 8, 2, 3
    block = randomise(UViTTransformerBlock(channels, 12, head_dim, 0.0))
    x, embedding = torch.randn(2, 6, channels).double(), torch.randn(2, 12).double()
    attn = block.attn
    scale, shift = film(block, embedding)
    h = rms(x) * block.norm.weight * scale[:, None] + shift[:, None]
    projected = h @ attn.to_qkv_mlp_proj.weight.T + attn.to_qkv_mlp_proj.bias
    attended = []
    for head in range(channels // head_dim):
        query, key, value = (
            projected[..., start + head * head_dim : start + (head + 1) * head_dim]
            for start in (0, channels, 2 * channels)
        )
        query = rotate_as_complex((rms(query) * attn.norm_q.weight)[:, :, None], height, width)[:, :, 0]
        key = rotate_as_complex((rms(key) * attn.norm_k.weight)[:, :, None], height, width)[:, :, 0]
        logits = torch.einsum("bqd,bkd->bqk", query, key) / math.sqrt(head_dim)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        attended.append(torch.einsum("bqk,bkd->bqd", weights, value))
    mlp = projected[..., 3 * channels :]
    mlp = 0.5 * mlp * (1 + torch.tanh(math.sqrt(2 / math.pi) * (mlp + 0.044715 * mlp**3)))
    expected = x + torch.cat([*attended, mlp], -1) @ attn.to_out.weight.T + attn.to_out.bias
    rotation = cos_sin(rotary_angles(height, width, head_dim, torch.device("cpu")).double())
    torch.testing.assert_close(block(x, embedding, rotation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [4, 8, 24, 32, 64])
def test_rotary_attention_logits_depend_on_relative_positions_only_and_on_both_axes(head_dim):
    """Kills: rotation by the position's square or with one sign wrong; one axis used twice or left out."""
    height, width = 4, 5
    angles = rotary_angles(height, width, head_dim, torch.device("cpu")).double()
    assert angles.shape == (height * width, 1, head_dim)
    query, key = torch.randn(2, head_dim).double().expand(height * width, 1, 2, head_dim).unbind(2)
    query, key = (rotate(part[None], cos_sin(angles))[0, :, 0] for part in (query, key))
    torch.testing.assert_close(query.norm(dim=1), query[:1].norm(dim=1).expand(height * width))
    logits = (query @ key.T).reshape(height, width, height, width)
    by_distance = {}
    for row, column, other_row, other_column in torch.cartesian_prod(
        *(torch.arange(n) for n in (height, width, height, width))
    ).tolist():
        value = logits[row, column, other_row, other_column].item()
        by_distance.setdefault((row - other_row, column - other_column), []).append(value)
    means = [sum(values) / len(values) for values in by_distance.values()]
    for values, mean in zip(by_distance.values(), means, strict=True):
        assert values == pytest.approx([mean] * len(values), abs=1e-5)
    gaps = torch.tensor(means).sort().values.diff()
    assert gaps.min() > 0  # every displacement has a logit of its own


def test_the_noise_level_embedding_tells_a_tenth_of_log_snr_apart_over_the_whole_range():
    """Sines and cosines at 32 frequencies, log-spaced from 0.05 to 3. Kills: frequencies without exp, a missing
    cosine, 1000-step timesteps."""
    module = NoiseLevelEmbedding(64).double()
    nn.init.eye_(module.linear_1.weight)
    nn.init.zeros_(module.linear_1.bias)
    seen = []
    module.linear_1.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    log_snr = torch.linspace(-15, 15, 301)
    assert module(log_snr, torch.float64).shape == (301, 64)
    frequencies = [0.05 * (3 / 0.05) ** (i / 31) for i in range(32)]
    expected = [[f(lam * w) for f in (math.sin, math.cos) for w in frequencies] for lam in log_snr.tolist()]
    torch.testing.assert_close(seen[0], torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
    distances = torch.cdist(seen[0], seen[0]) + torch.eye(301)
    assert distances.min() > 0.1


def down_by_hand(module, h):
    batch, channels, height, width = h.shape
    h = h.reshape(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))
    conv = module[1]
    return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], h) + conv.bias[:, None, None]


def up_by_hand(module, h):
    h = torch.einsum("oc,bchw->bohw", module[0].weight[:, :, 0, 0], h)
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


def patches_by_hand(trunk, images, patch_size):
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    conv = trunk.patch_embed
    return torch.einsum("ocij,bchiwj->bohw", conv.weight, blocks) + conv.bias[:, None, None]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_level_adds_what_its_lower_levels_changed_to_what_it_was_before(patch_size):
    """h = up(h_mid − h_down) + h_before_down, context joining on entry going down, for levels without blocks.

    Kills: + for − ; h_down taken before the context or h_before after pooling; skips in the wrong order; a context added
    at the wrong level, or again going up; max for average pooling; bilinear upsampling.
    """
    trunk = randomise(tiny_trunk(blocks=(0, 0, 0), patch_size=patch_size))
    images = torch.randn(2, 3, 8 * patch_size, 4 * patch_size).double()
    context = tuple(torch.randn(2, c, 8 >> i, 4 >> i).double() for i, c in enumerate((8, 16, 8)))
    h_0 = patches_by_hand(trunk, images, patch_size) + context[0]
    h_1 = down_by_hand(trunk.downsample[0], h_0)
    h_2 = down_by_hand(trunk.downsample[1], h_1 + context[1])
    middle = h_2 + context[2]
    up_1 = up_by_hand(trunk.upsample[1], middle - h_2) + h_1 + context[1]
    up_0 = up_by_hand(trunk.upsample[0], up_1 - h_1) + h_0
    features = trunk(images, torch.randn(2, 12).double(), context)
    for actual, expected in zip(features, (up_0, up_1, middle), strict=True):
        torch.testing.assert_close(actual, expected)


def test_blocks_run_going_down_in_the_middle_and_going_up_at_their_own_level():
    """The same formula around the stages, each already tested. Kills: a stage skipped, repeated or at another level."""
    trunk = randomise(tiny_trunk())
    images, embedding = torch.randn(1, 3, 8, 8).double(), torch.randn(1, 12).double()
    down_0 = trunk.down[0](patches_by_hand(trunk, images, 1), embedding)
    h_1 = down_by_hand(trunk.downsample[0], down_0)
    down_1 = trunk.down[1](h_1, embedding)
    h_2 = down_by_hand(trunk.downsample[1], down_1)
    middle = trunk.middle(h_2, embedding)
    up_1 = trunk.up[1](up_by_hand(trunk.upsample[1], middle - h_2) + down_1, embedding)
    up_0 = trunk.up[0](up_by_hand(trunk.upsample[0], up_1 - h_1) + down_0, embedding)
    for actual, expected in zip(trunk(images, embedding), (up_0, up_1, middle), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_transformer_stage_reads_maps_in_row_major_order_and_applies_every_block_once():
    """On a map that is not square. Kills: height and width swapped in the positions or when the map is rebuilt."""
    stage = randomise(UViTStage(16, "transformer", 2, 12, 8, 0.0))
    x, embedding = torch.randn(1, 16, 2, 3).double(), torch.randn(1, 12).double()
    tokens = torch.stack([x[:, :, row, column] for row in range(2) for column in range(3)], dim=1)
    rotation = cos_sin(rotary_angles(2, 3, 8, torch.device("cpu")))
    for block in stage.blocks:
        tokens = block(tokens, embedding, rotation)
    out = stage(x, embedding)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(out[:, :, row, column], tokens[:, row * 3 + column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_fresh_trunk_is_the_identity_on_every_level_whatever_the_embedding(levels):
    """Kills: a bias in upsampling; an output convolution or projection that does not start at zero."""
    types = ("transformer", "res", "transformer")[:levels]
    trunk = tiny_trunk((16,) * levels, types, (2,) * levels)
    images = torch.randn(2, 3, 8, 8)
    features = trunk(images, torch.randn(2, 12))
    h = trunk.patch_embed(images)
    for level, feature in enumerate(features):
        torch.testing.assert_close(feature, h)
        if level < levels - 1:
            h = trunk.downsample[level](h)


def test_dropout_acts_in_transformer_blocks_while_training_and_nowhere_else():
    block = UViTTransformerBlock(16, 12, 8, dropout=0.5)
    nn.init.normal_(block.attn.to_out.weight)
    rotation = cos_sin(rotary_angles(2, 2, 8, torch.device("cpu")))
    x, embedding = torch.randn(2, 4, 16), torch.randn(2, 12)
    assert not torch.equal(block(x, embedding, rotation), block(x, embedding, rotation))
    block.eval()
    assert torch.equal(block(x, embedding, rotation), block(x, embedding, rotation))
    assert not [module for module in UViTResBlock(16, 12).modules() if isinstance(module, nn.Dropout)]
    assert isinstance(block.attn, UViTParallelSelfAttention)


@pytest.mark.parametrize("size", [(8, 6), (6, 8), (10, 10)])
def test_images_that_do_not_divide_into_levels_are_refused_by_their_size(size):
    with pytest.raises(ValueError, match=rf"divisible by 8 .*height {size[0]} and width {size[1]}"):
        tiny_trunk(patch_size=2)(torch.randn(1, 3, *size), torch.randn(1, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8, 16)}, "same levels, got 2, 3 and 3 entries"),
        ({"types": ("res",)}, "same levels, got 3, 1 and 3 entries"),
        ({"blocks": (1, 1, 1, 1)}, "same levels, got 3, 3 and 4 entries"),
        ({"channels": (), "types": (), "blocks": ()}, "got 0, 0 and 0 entries"),
        ({"types": ("res", "conv", "res")}, "'transformer' or 'depthwise', got 'conv'"),
        ({"channels": (8, 12, 8)}, "got width 12 and attention_head_dim 8"),
    ],
)
def test_levels_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trunk(**options)


def test_heads_that_two_axes_of_positions_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got width 12 and attention_head_dim 6"):
        UViTTrunk(3, 1, (12,), ("transformer",), (1,), 6, 12, 0.0)
