"""Other ways to spend fewer heavy evaluations, for the study: what they need beyond the package's own networks.

Reuse of features (DeepCache, arXiv 2312.00858): a trained single-rate network computes its deep levels at refreshes only,
and between them adds to its outer level what the newest refresh added there.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from diffusers_dualrate.uvit import UViTTrunk, lay_out


class FeatureReuseTrunk(nn.Module):
    """Stands in for a single-rate network's trunk, and computes all below its outer level only where a plan says so.

    Args:
        trunk: The trunk, of two levels or more.
        refreshes: For each step of a run whether the deep levels are computed; it starts again after its end.
    """

    def __init__(self, trunk: UViTTrunk, refreshes: Sequence[bool]):
        super().__init__()
        self.trunk = trunk
        self._plan = itertools.cycle(refreshes)
        self._deep = None

    def forward(self, sample: Tensor, embedding: Tensor, context: None = None, text: None = None) -> tuple[Tensor]:
        """The outer level's last feature map, the one that a denoiser reads. There is no context, and no text."""
        before = self.trunk.down[0](self.trunk.patch_embed(lay_out(sample)), embedding)
        if next(self._plan):
            self._deep = self._deep_levels(before, embedding)
        return (self.trunk.up[0](self._deep + before, embedding),)

    def _deep_levels(self, before: Tensor, embedding: Tensor) -> Tensor:
        """What the levels below the outer one add to it."""
        trunk = self.trunk
        first = hidden_states = trunk.downsample[0](before)
        skips = []
        for stage, downsample in zip(trunk.down[1:], trunk.downsample[1:], strict=True):
            before = stage(hidden_states, embedding)
            hidden_states = downsample(before)
            skips.append((before, hidden_states))
        hidden_states = trunk.middle(hidden_states, embedding)
        for stage, upsample in zip(reversed(trunk.up[1:]), reversed(trunk.upsample[1:]), strict=True):
            before, after = skips.pop()
            hidden_states = stage(upsample(hidden_states - after) + before, embedding)
        return trunk.upsample[0](hidden_states - first)
