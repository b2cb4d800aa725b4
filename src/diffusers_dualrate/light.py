"""The shape of a light network, from the heavy network whose context it takes.

Its levels are those of the heavy network's feature maps: the same sizes, and widths in one proportion. All levels have as
many blocks. Of the shapes of a quarter to a sixth of the heavy network's FLOPs, it is the one whose widths are nearest to
half of the maps'.
"""

from collections.abc import Iterator

import torch

from .flops import network_flops
from .hosts import HostNetwork
from .models import UViTDenoiser
from .text_encoding import TEXT_OPTIONS

LEAST, MOST = 1 / 6, 1 / 4
"""FLOPs of a light network as a share of the heavy network's."""

# Of the maps' widths, in the order in which they are tried.
_SHARES_OF_WIDTH = sorted((share / 16 for share in range(3, 17)), key=lambda share: abs(share - 1 / 2))
_HEAD_DIMS = (64, 32, 16, 8, 4)
_MOST_BLOCKS = 64


def shape_light(encoder: HostNetwork) -> dict:
    """Arguments of a [`UViTDenoiser`] that takes the context of an encoder.

    Args:
        encoder: The heavy network, with the taps that it hands over.

    Raises:
        ValueError: If its maps are not each half as large as the one before, or no such network is that light.
    """
    heavy = network_flops(encoder)
    for share in _SHARES_OF_WIDTH:
        shape = _shape_of_width(encoder, share)
        one, two = (network_flops(_plan(shape, blocks)) for blocks in (1, 2))
        ratios = [
            (one + more * (two - one)) / heavy for more in range(_MOST_BLOCKS)
        ]  # exact: all blocks cost the same
        nearest = min(ratios, key=lambda ratio: abs(ratio - 1 / 5))
        if LEAST <= nearest <= MOST:
            return shape | {"level_blocks": [ratios.index(nearest) + 1] * len(shape["level_channels"])}
    raise ValueError(
        f"No light network has a quarter to a sixth of the heavy network's {heavy / 1e6:,.1f} MFLOP: give a preset's shape."
    )


def _plan(shape: dict, blocks: int) -> UViTDenoiser:
    with torch.device("meta"):
        return UViTDenoiser(**shape, level_blocks=(blocks,) * len(shape["level_channels"]))


def _shape_of_width(encoder: HostNetwork, share: float) -> dict:
    """The arguments, but for the number of blocks, where levels have a share of the maps' widths."""
    (height, _), shapes = encoder.image_size, encoder.context_shapes
    if not shapes:
        raise ValueError("The heavy network hands out no feature maps: name submodules in its taps.")
    patch_size = height // shapes[0][1]
    sizes = [shape[1:] for shape in shapes]
    if sizes != list(_sizes_of(encoder.image_size, patch_size, len(sizes))):
        raise ValueError(f"The heavy network's maps are of sizes {sizes}, which are no levels of a light network.")
    attends = ["resnets" not in tap for tap in encoder.taps]
    widths = [_round(share * shape[0], tokens) for shape, tokens in zip(shapes, attends, strict=True)]
    attending = [width for width, tokens in zip(widths, attends, strict=True) if tokens]
    return {
        "sample_size": encoder.config.sample_size,
        "in_channels": encoder.config.in_channels,
        "num_classes": encoder.config.num_classes,
        **{option: encoder.config[option] for option in TEXT_OPTIONS},
        "patch_size": patch_size,
        "level_channels": widths,
        "level_types": ["transformer" if tokens else "res" for tokens in attends],
        "attention_head_dim": next(dim for dim in _HEAD_DIMS if all(width % dim == 0 for width in attending)),
        "embedding_dim": 2 * max(widths),
        "context_channels": list(encoder.context_channels),
        "prediction_hand_over": encoder.config.prediction_hand_over,
    }


def _sizes_of(image_size: tuple[int, int], patch_size: int, levels: int) -> Iterator[tuple[int, int]]:
    height, width = image_size
    for level in range(levels):
        yield height // (patch_size * 2**level), width // (patch_size * 2**level)


def _round(width: float, attends: bool) -> int:
    """The nearest width that a level can have: in whole heads, or in equal groups of normalisation."""
    step = 32 if width > 256 else 8 if width > 24 else 4
    return max(step, step * round(width / step))
