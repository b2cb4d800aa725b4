"""Reuse of features, held against the plain network."""

import torch

from diffusers_dualrate.refreshes import plan_refreshes
from research.rivals import FeatureReuseTrunk

DEEP = {"level_channels": (8, 16, 16), "level_types": ("res", "res", "transformer"), "level_blocks": (1, 1, 1)}


def make_inputs(count):
    return [(torch.randn(2, 3, 16, 16), torch.linspace(-3, 3, 2) + i, torch.tensor([0, 3])) for i in range(count)]


def make_network(make_networks):
    return make_networks(denoiser={**DEEP, "context_channels": None}, sample_size=16)[1]


@torch.no_grad()
def test_with_a_refresh_at_every_step_the_network_is_the_plain_one(make_networks):
    network, inputs = make_network(make_networks), make_inputs(3)
    plain = [network(*given).sample for given in inputs]
    network.trunk = FeatureReuseTrunk(network.trunk, [True] * 3)
    for given, expected in zip(inputs, plain, strict=True):
        assert torch.equal(network(*given).sample, expected)


@torch.no_grad()
def test_between_refreshes_the_outer_level_gets_what_the_deep_levels_added_at_the_newest_one(make_networks):
    network, inputs = make_network(make_networks), make_inputs(5)
    plan, expected = plan_refreshes(5, 2), []
    assert list(plan) == [True, False, True, False, False]
    # The same by a hook on the plain network: what comes up from below is replaced.
    kept = []

    def replace(module, given, output):
        if plan[len(expected)]:
            kept[:] = [output]
        return kept[0]

    hook = network.trunk.upsample[0].register_forward_hook(replace)
    for given in inputs:
        expected.append(network(*given).sample)
    hook.remove()
    fresh = network(*inputs[1]).sample
    network.trunk = FeatureReuseTrunk(network.trunk, plan)
    for _ in range(2):  # the plan starts again with the next batch
        for given, wanted in zip(inputs, expected, strict=True):
            torch.testing.assert_close(network(*given).sample, wanted)
    assert not torch.allclose(expected[1], fresh)
