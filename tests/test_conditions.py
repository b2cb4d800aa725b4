"""Conditions as one value, and what the networks make of a text."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from conftest import PRESET, fill_with_noise
from diffusers_dualrate import UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.conditions import Text, join, repeat_rows, replace_rows, take_rows
from diffusers_dualrate.flops import network_flops, text_flops
from diffusers_dualrate.losses import denoising_loss, draw, drop_condition
from diffusers_dualrate.models import SINGLE_RATE
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.scheduler import DualRateScheduler

TEXT = {"cross_attention_dim": 6, "text_length": 5, "num_classes": None}
SHAPES = PRESET["denoiser"]


def draw_text(rows, seed=0, lengths=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths or [5] * rows)
    tokens, pooled = torch.randn(rows, 5, 6, generator=generator), torch.randn(rows, 3, generator=generator)
    return Text(tokens, torch.arange(5)[None] < lengths[:, None], pooled)


@pytest.fixture
def denoiser():
    return fill_with_noise(UViTDenoiser(**{**SHAPES, "sample_size": 8} | SINGLE_RATE | TEXT), seed=3)


def test_rows_of_labels_and_of_texts_are_picked_joined_repeated_and_replaced_alike():
    labels, text = torch.tensor([0, 1, 2]), draw_text(3, lengths=[2, 5, 3])
    for condition, null in ((labels, 9), (text, draw_text(1, seed=1, lengths=[1]))):
        first, last = take_rows(condition, slice(1)), take_rows(condition, torch.tensor([1, 2]))
        replaced = replace_rows(condition, torch.tensor([False, True, False]), null)
        twice = repeat_rows(condition, 2)
        parts = zip(
            *[c if isinstance(c, tuple) else (c,) for c in (condition, join(first, last), replaced, twice)],
            strict=True,
        )
        nulls = null if isinstance(null, tuple) else (torch.tensor([null]),)
        for (whole, joined, changed, doubled), blank in zip(parts, nulls, strict=True):
            assert torch.equal(whole, joined)
            assert torch.equal(changed, torch.stack([whole[0], blank[0], whole[2]]))
            assert torch.equal(doubled, torch.stack([whole[i] for i in (0, 0, 1, 1, 2, 2)]))
    assert take_rows(None, slice(1)) is replace_rows(None, torch.tensor([True]), 3) is None


def test_the_share_of_captions_that_is_dropped_is_the_share_of_labels():
    text, null, draws = draw_text(64), draw_text(1, seed=1), draw(0, 0, range(64), (1, 1, 1))
    dropped = drop_condition(text, draws, 0.3, null)
    labels = drop_condition(torch.arange(64), draws, 0.3, 99)
    is_null = (dropped.tokens == null.tokens).flatten(1).all(1)
    assert torch.equal(is_null, labels == 99) and 0 < is_null.sum() < 64


def test_a_block_attends_to_the_image_and_to_the_tokens_of_the_text_that_count(denoiser):
    """Against plain attention, one head after the other; a lost mask, a swapped key and value or a missing norm differ."""
    text = draw_text(2, lengths=[2, 5])
    block, seen = denoiser.trunk.middle.blocks[0], []
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args))
    block.attn.register_forward_hook(lambda _, args, output: seen.append(output))
    denoiser(torch.randn(2, 3, 8, 8), torch.zeros(2), text)
    (hidden, rotation, _), output = seen
    width, heads = hidden.shape[-1], block.attn.heads
    query, key, value, mlp = block.attn.to_qkv_mlp_proj(hidden).split([width, width, width, 4 * width], -1)
    half = rotation[0].shape[-1] // 2
    cos, sin = rotation[0][..., :half], rotation[1][..., half:]

    def turned(part, norm):
        first, second = norm(part.unflatten(-1, (heads, -1))).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    query, key = turned(query, block.attn.norm_q), turned(key, block.attn.norm_k)
    place = denoiser.trunk.stages.index(denoiser.trunk.middle)
    projection = denoiser.text_projection
    tokens = text.tokens * text.tokens.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * projection.norm.weight
    of_text = projection.to_kv[place][0](tokens).split(width, -1)
    value = value.unflatten(-1, (heads, -1))
    text_key, text_value = (part.unflatten(-1, (heads, -1)) for part in of_text)
    text_key = projection.norm_k[place][0](text_key)
    rows = []
    for row in range(2):
        count = int(text.mask[row].sum())
        keys = torch.cat([key[row], text_key[row, :count]]).transpose(0, 1)
        values = torch.cat([value[row], text_value[row, :count]]).transpose(0, 1)
        attended = scaled_dot_product_attention(query[row].transpose(0, 1), keys, values)
        rows.append(attended.transpose(0, 1).flatten(1))
    expected = block.attn.to_out(torch.cat([torch.stack(rows), torch.nn.functional.gelu(mlp, approximate="tanh")], -1))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_what_fills_a_text_up_does_not_matter_and_every_token_that_counts_does(denoiser):
    z, level, text = torch.randn(2, 3, 8, 8), torch.zeros(2), draw_text(2, lengths=[2, 4])
    plain = denoiser(z, level, text).sample
    for token in range(5):
        tokens = text.tokens.clone()
        tokens[:, token] = 3.0
        v = denoiser(z, level, Text(tokens, text.mask)).sample
        for row in range(2):
            assert torch.equal(v[row], plain[row]) != bool(text.mask[row, token]), (row, token)
    short = take_rows(text, slice(1))  # a shorter filling is the same text
    cut = denoiser(z[:1], level[:1], Text(short.tokens[:, :2], short.mask[:, :2])).sample
    torch.testing.assert_close(cut, plain[:1])


def test_a_projected_text_serves_every_call_of_its_network_bit_for_bit(denoiser):
    z, text = torch.randn(2, 3, 8, 8), draw_text(2, lengths=[2, 5])
    projected = denoiser.project_condition(text)
    for level in (-2.0, 1.0):
        assert torch.equal(denoiser(z, level, projected).sample, denoiser(z, level, text).sample)
    one = denoiser(z[1:], 1.0, take_rows(projected, slice(1, None))).sample
    torch.testing.assert_close(one, denoiser(z, 1.0, text).sample[1:])


def test_a_network_that_does_not_attend_to_text_sees_one_embedding_of_it():
    network = fill_with_noise(
        UViTDenoiser(**{**SHAPES, "sample_size": 8} | SINGLE_RATE | TEXT, attends_to_text=False), 3
    )
    text, z = draw_text(2), torch.randn(2, 3, 8, 8)
    assert not list(network.text_projection.to_kv.parameters())
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = Text(text.tokens[:, order], text.mask)
    v = network(z, 0.0, text).sample
    torch.testing.assert_close(network(z, 0.0, shuffled).sample, v)  # a mean
    assert not torch.allclose(network(z, 0.0, draw_text(2, seed=1)).sample, v)


def test_compute_counts_attention_to_text_in_every_evaluation_and_its_projection_once(denoiser):
    without = UViTDenoiser(**{**SHAPES, "sample_size": 8} | SINGLE_RATE | TEXT, attends_to_text=False)
    attending = [(stage, denoiser.config.level_channels[-1]) for stage in denoiser.trunk.stages if stage.attends]
    blocks = sum(len(stage.blocks) for stage, _ in attending)
    pixels, width = 4, attending[0][1]  # a map of 2x2 where the blocks are
    assert [stage for stage, _ in attending] == [denoiser.trunk.middle]
    # Queries on keys and weights on values, two FLOPs for each multiply-add.
    assert network_flops(denoiser) - network_flops(without) == blocks * 2 * 2 * pixels * 5 * width
    embedding = denoiser.config.embedding_dim
    assert text_flops(denoiser) == 2 * (5 * 6 * embedding + embedding**2 + blocks * 5 * 6 * 2 * width)


def test_a_trained_network_of_text_becomes_an_encoder_that_reads_the_same(denoiser):
    encoder = UViTContextEncoder.from_denoiser(denoiser, prediction_hand_over=True)
    z, text = torch.randn(2, 3, 8, 8), draw_text(2, lengths=[2, 5])
    x = encoder(z, 0.0, text).context[-2]
    v = denoiser(z, 0.0, text).sample
    torch.testing.assert_close(x, (z - v) / 2**0.5, atol=1e-5, rtol=1e-5)  # x = α z − σ v


def test_losses_learn_from_text_as_from_classes_and_reach_every_weight():
    networks = {name: {**PRESET[name], "sample_size": 8} | TEXT for name in ("context_encoder", "denoiser")}
    pair = TrainablePair(
        fill_with_noise(UViTDenoiser(**networks["denoiser"]), 1),
        fill_with_noise(UViTContextEncoder(**networks["context_encoder"]), 2),
    )
    pair.enable_gradient_checkpointing()
    draws, x = draw(0, 0, range(4), (3, 8, 8)), torch.randn(4, 3, 8, 8)
    result = pair(denoising_loss, x, draw_text(4), draws, schedule=schedule_of(DualRateScheduler()))
    result.loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in pair.parameters())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_classes": 4}, "classes or of text, got num_classes=4 and cross_attention_dim=6"),
        ({"cross_attention_dim": 0}, "cross_attention_dim, if it is not None, .*got 0"),
        ({"text_length": 0}, "text_length .*got 0"),
        ({"attends_to_text": 1}, "attends_to_text .*got 1"),
    ],
)
def test_a_network_of_text_refuses_what_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        UViTDenoiser(**{**SHAPES, "sample_size": 8} | SINGLE_RATE | TEXT | changes)


def test_a_network_refuses_a_condition_that_it_does_not_take(denoiser, make_networks):
    z = torch.randn(1, 3, 8, 8)
    for network, condition, said in (
        (denoiser, None, "takes text"),
        (denoiser, torch.tensor([1]), "takes text"),
        (denoiser, Text(torch.ones(1, 2, 7), torch.ones(1, 2).bool()), "6 channels a token, got 7"),
        (make_networks(num_classes=4)[0], draw_text(1), "takes no text"),
    ):
        with pytest.raises(ValueError, match=said):
            network(z, 0.0, condition)


def test_compiled_networks_take_text_without_a_break(denoiser):
    z, projected = torch.randn(2, 3, 8, 8), denoiser.project_condition(draw_text(2, lengths=[2, 5]))
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(z, torch.zeros(2), projected).sample, denoiser(z, torch.zeros(2), projected).sample
        )
