"""Caches of diffusers on our networks: those that act inside blocks sample with them, the others are refused.

The oracle of a cached run is the plain loop over networks whose attention modules reuse their outputs by hand.
"""

import copy

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import TextKVCacheConfig

from diffusers_dualrate.uvit import UViTParallelSelfAttention

N = 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, labels=(0, 3), steps=2, refresh_steps=None, **options):
    options = {"guidance_scale": 2.0, "generator": generator(), "output_type": "latent"} | options
    refreshes = {"num_context_steps": steps} if refresh_steps is None else {"refresh_steps": refresh_steps}
    return pipe(list(labels), N, **refreshes, **options).images


def broadcast(pipe, interval=2, **options):
    """Pyramid Attention Broadcast over the whole run, as its documentation asks for it."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
        **options,
    )


def taylor(interval=3, **options):
    return TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=1, taylor_factors_dtype=torch.float32, **options
    )


CACHES = {"broadcast": broadcast, "taylor": lambda pipe: taylor(max_order=0)}


def attention_modules(network):
    return [module for module in network.modules() if isinstance(module, UViTParallelSelfAttention)]


def reuse_by_hand(network, reuses):
    """Replace the attention modules' outputs: `reuses(call)` says whether call number `call` repeats the one before."""
    for module in attention_modules(network):
        memory = []

        def forward(*args, original=module.forward, memory=memory, **kwargs):
            memory.append(memory[-1] if reuses(len(memory)) else original(*args, **kwargs))
            return memory[-1]

        module.forward = forward


@pytest.mark.parametrize(("kind", "reuses"), [("broadcast", lambda i: i % 2 == 1), ("taylor", lambda i: i % 3 != 2)])
def test_a_cached_run_is_the_run_whose_attention_outputs_are_reused_by_hand(make_pipe, kind, reuses):
    """TaylorSeer computes call 0, its warm-up, and every third from call 2 on; of order 0, it repeats."""
    pipe = make_pipe()
    by_hand, plain = copy.deepcopy(pipe), sample(pipe)
    pipe.denoiser.enable_cache(CACHES[kind](pipe))
    reuse_by_hand(by_hand.denoiser, lambda i: i > 0 and reuses(i))
    expected = sample(by_hand)
    assert torch.equal(sample(pipe), expected)
    assert (expected - plain).abs().max() > 1e-3  # the cache acts


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_on_the_encoder_counts_its_own_calls(make_pipe, kind):
    """Kills: a cache that counts steps of the loop."""
    pipe = make_pipe()
    by_hand = copy.deepcopy(pipe)
    pipe.context_encoder.enable_cache(CACHES[kind](pipe))
    reuse_by_hand(by_hand.context_encoder, lambda i: i > 0 and (i % 2 == 1 if kind == "broadcast" else i % 3 != 2))
    steps = {"refresh_steps": [0, 3, 4, 7]}
    assert torch.equal(sample(pipe, **steps), sample(by_hand, **steps))


@pytest.mark.parametrize("network", ["denoiser", "context_encoder"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_starts_anew_in_every_call_also_after_a_failed_one_and_ends_with_disable_cache(
    make_pipe, kind, network
):
    pipe = make_pipe()
    plain, cached = sample(pipe, steps=8), getattr(pipe, network)
    cached.enable_cache(CACHES[kind](pipe))
    first = sample(pipe, steps=8)
    assert not torch.equal(first, plain)
    assert torch.equal(sample(pipe, steps=8), first)

    def fail(pipe, step, *_):
        if step == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sample(pipe, labels=[1], callback_on_step_end=fail)
    assert torch.equal(sample(pipe, steps=8), first)
    cached.disable_cache()
    assert not cached.is_cache_enabled and torch.equal(sample(pipe, steps=8), plain)


@pytest.mark.parametrize("network", ["denoiser", "context_encoder"])
def test_a_call_within_a_call_on_a_network_with_a_cache_is_refused_and_the_outer_one_goes_on(make_pipe, network):
    """One cache would mix the two. Mutants: the lock never given back; a check of one of the two networks alone."""
    pipe, refused = make_pipe(), []
    getattr(pipe, network).enable_cache(broadcast(pipe))
    plain = sample(pipe)

    def call_again(*_):
        with pytest.raises(RuntimeError, match="another call is using now, and it holds one call at a time"):
            sample(pipe)
        refused.append(1)

    assert torch.equal(sample(pipe, callback_on_step_end=call_again), plain) and len(refused) == N
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("network", ["denoiser", "context_encoder"])
@pytest.mark.parametrize("kind", CACHES)
def test_rows_that_come_and_go_with_guidance_never_meet_the_cache_of_other_rows(make_pipe, kind, network):
    """Guidance acts in the middle of the run: each image is what it is alone, where 1 row and 2 rows could broadcast.
    Kills: no new start where the rows change."""
    pipe = make_pipe()
    getattr(pipe, network).enable_cache(CACHES[kind](pipe))
    options = {"guidance_interval": (-4.0, 4.0), "steps": 8}
    together = sample(pipe, generator=[generator(1), generator(2)], **options)
    alone = [sample(pipe, [label], generator=[generator(seed)], **options) for label, seed in ((0, 1), (3, 2))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("network", ["denoiser", "context_encoder"])
@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(),
        FasterCacheConfig(current_timestep_callback=lambda: 500),
        MagCacheConfig(calibrate=True),
        TextKVCacheConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_cache_that_skips_stacks_of_blocks_is_refused_and_leaves_no_hook(make_pipe, config, network):
    pipe = make_pipe()
    plain, refused = sample(pipe), getattr(pipe, network)
    with pytest.raises(ValueError, match=f"{type(config).__name__} does not fit a U-ViT"):
        refused.enable_cache(config)
    assert not refused.is_cache_enabled and torch.equal(sample(pipe), plain)


def test_a_cache_that_would_zero_features_or_act_on_nothing_is_refused(make_pipe, make_networks):
    pipe = make_pipe()
    for options in ({"use_lite_mode": True}, {"skip_predict_identifiers": [".*blocks.0"]}):
        with pytest.raises(ValueError, match="use_lite_mode or skip_predict_identifiers"):
            pipe.denoiser.enable_cache(taylor(**options))
    nothing = [
        taylor(cache_identifiers=["transformer_blocks.*"]),
        PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ]
    for config in nothing:
        with pytest.raises(ValueError, match="acts on no module"):
            pipe.denoiser.enable_cache(config)
        assert not pipe.denoiser.is_cache_enabled
    _, convolutional = make_networks(denoiser={"level_types": ("res", "res")})
    with pytest.raises(ValueError, match="acts on no module"):
        convolutional.enable_cache(taylor())


def test_the_timestep_is_known_during_a_call_and_not_between_calls(make_pipe):
    pipe, seen = make_pipe(), []
    sample(pipe, callback_on_step_end=lambda pipe, i, t, tensors: seen.append((pipe.current_timestep, t)) or {})
    assert len(seen) == N and all(now == t for now, t in seen)
    assert pipe.current_timestep is None
