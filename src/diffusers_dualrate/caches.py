"""Caches of diffusers, which reuse features between steps, on networks of a pair."""

from collections.abc import Callable
from typing import Any, cast

from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.models import CacheMixin
from torch import nn


def enable_cache_that_acts(network: CacheMixin, enable: Callable[[Any], None], config: Any, description: str) -> None:
    """Enable one of the host's caches, if it acts inside blocks, and on some of them.

    Args:
        network: The network.
        enable: The host's method.
        config: Which cache.
        description: What the network is, for a refusal.
    """
    name = type(config).__name__
    if not isinstance(config, (PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig)):
        raise ValueError(
            f"{name} does not fit {description}: use PyramidAttentionBroadcastConfig or TaylorSeerCacheConfig, which act "
            "inside blocks."
        )
    modules = list(cast(nn.Module, network).modules())
    before = [vars(module).get("forward") for module in modules]
    enable(config)
    if before == [vars(module).get("forward") for module in modules]:  # a hook replaces `forward`
        network.disable_cache()
        raise ValueError(f"{name} acts on no module of this network as it is configured.")
