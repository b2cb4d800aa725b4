"""What both networks of a pair share: which configurations they take, each bad value refused before a weight is made."""

import pytest

from diffusers_dualrate import UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.uvit import group_norm

LEVELS = {
    "sample_size": 8,
    "level_channels": [8, 16],
    "level_types": ["res", "transformer"],
    "level_blocks": [1, 1],
    "attention_head_dim": 8,
    "embedding_dim": 12,
    "context_channels": [4, 4],
}

REFUSED = [
    ({"sample_size": -8}, "sample_size must be an integer in .*, got -8"),
    ({"sample_size": 0}, "sample_size .*, got 0"),
    ({"sample_size": "8"}, "sample_size .*, got '8'"),
    ({"sample_size": 8.0}, "sample_size .*, got 8.0"),
    ({"sample_size": (8, -8)}, "sample_size .*, got -8"),
    ({"sample_size": (8, 8, 8)}, r"sample_size .*, got \(8, 8, 8\)"),
    ({"in_channels": 0}, "in_channels must be an integer in .*, got 0"),
    ({"in_channels": True}, "in_channels .*, got True"),
    ({"patch_size": 0}, "patch_size .*, got 0"),
    ({"num_classes": 2.5}, "num_classes.* must be an integer in .*, got 2.5"),
    ({"level_blocks": [-1, 1]}, r"each of level_blocks must be an integer in \[0, 1000\], got -1"),
    ({"level_blocks": [1, 10**7]}, r"each of level_blocks must be an integer in \[0, 1000\], got 10000000"),
    ({"level_blocks": 3}, "level_blocks must be a list with an entry for each level, got 3"),
    ({"sample_size": 10**6}, r"sample_size must be an integer in \[1, 16384\], got 1000000"),
    ({"num_classes": 10**9}, r"num_classes.* must be an integer in \[1, 1048576\], got 1000000000"),
    ({"level_channels": [10**9, 16]}, r"each of level_channels must be an integer in \[1, 65536\], got 1000000000"),
    ({"context_channels": [8, 10**9]}, r"each of context_channels must be an integer in \[1, 65536\], got 10+"),
    ({"level_channels": [0, 16]}, "each of level_channels must be an integer in .*, got 0"),
    ({"level_channels": [8, "16"]}, "each of level_channels .*, got '16'"),
    ({"level_channels": [25, 16]}, "25 channels cannot be normalised in 3 equal groups: level_channels may"),
    ({"level_channels": [8, 264], "level_types": ["res", "res"]}, "264 channels cannot be normalised in 32 equal"),
    ({"context_channels": [0, 4]}, "each of context_channels must be an integer in .*, got 0"),
    ({"context_channels": 4}, "context_channels must be a list with an entry for each level, got 4"),
    ({"attention_head_dim": 0}, "attention_head_dim .*, got 0"),
    ({"embedding_dim": -12}, "embedding_dim .*, got -12"),
    ({"dropout": 3}, r"dropout must be a finite number in \[0, 1\), got 3"),
    ({"dropout": 1.0}, r"dropout .*, got 1.0"),
    ({"dropout": -0.1}, r"dropout .*, got -0.1"),
    ({"dropout": float("nan")}, "dropout .*, got nan"),
    ({"prediction_hand_over": "yes"}, "prediction_hand_over must be True or False, got 'yes'"),
]


@pytest.mark.parametrize("cls", [UViTContextEncoder, UViTDenoiser])
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[f"{options}" for options, _ in REFUSED])
def test_a_network_of_a_size_that_no_network_has_is_refused_by_name_value_and_range(cls, options, message):
    """Mutants: any row of `_check_config` dropped, a bound moved by one, the groups' check dropped."""
    with pytest.raises(ValueError, match=message) as caught:
        cls(**LEVELS | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [UViTContextEncoder, UViTDenoiser])
@pytest.mark.parametrize(
    "options",
    [{"sample_size": [8, 12]}, {"level_blocks": [0, 0]}, {"num_classes": 1}, {"dropout": 0.99}, {"dropout": 0}],
    ids=str,
)
def test_the_ends_of_every_range_are_taken(cls, options):
    cls(**LEVELS | options)


@pytest.mark.parametrize("channels", [1, 8, 15, 16, 72, 256, 288, 512])
def test_the_widths_that_the_refusal_of_others_names_are_taken(channels):
    assert group_norm(channels).num_groups == {1: 1, 8: 1, 15: 1, 16: 2, 72: 9, 256: 32, 288: 32, 512: 32}[channels]
