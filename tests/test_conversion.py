"""Training that starts from a trained model: a single-rate network becomes the encoder of a pair, frozen or not."""

import pytest
import torch

import train_single_rate
from diffusers_dualrate import DualRatePipeline
from test_training import folder, fresh_accelerator, train  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def single_rate(folder, tmp_path_factory):  # noqa: F811
    output_dir = tmp_path_factory.mktemp("runs") / "single"
    train("single", folder, output_dir, "--max_train_steps", 2)
    return output_dir


def weights(folder_, network):
    return getattr(DualRatePipeline.from_pretrained(folder_), network).state_dict()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_single_rate_model_becomes_the_encoder_of_a_pair(frozen, single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, "--max_train_steps", 8]
    train("dual", folder, tmp_path / "pair", *options, *(["--freeze_encoder"] if frozen else []))
    before, after = weights(single_rate, "denoiser"), weights(tmp_path / "pair", "context_encoder")
    trunk = [name for name in after if name.startswith(("trunk", "noise_embedding", "class_embedding"))]
    assert trunk and all(torch.equal(before[name], after[name]) for name in trunk) == frozen
    train("dual", folder, tmp_path / "start", *options[:2], "--max_train_steps", 0)
    start = weights(tmp_path / "start", "context_encoder")
    heads = [name for name in after if name.startswith("context_heads")]
    assert heads and not any(torch.equal(start[name], after[name]) for name in heads)
    # What was trained says what it started from, and another start is another run.
    with pytest.raises(ValueError, match="another configuration: .*training"):
        train("dual", folder, tmp_path / "pair", "--max_train_steps", 9, "--resume_from_checkpoint", "latest")


def test_training_goes_on_from_a_trained_model(single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, "--learning_rate", 0.0, "--max_train_steps", 1]
    train("single", folder, tmp_path / "again", *options)
    before, after = weights(single_rate, "denoiser"), weights(tmp_path / "again", "denoiser")
    assert all(torch.equal(before[name], after[name]) for name in before)
    pair = tmp_path / "pair"
    train("dual", folder, pair, "--max_train_steps", 2)
    train("dual", folder, tmp_path / "more", "--pretrained_model_name_or_path", pair, *options[2:])
    for network in ("context_encoder", "denoiser"):
        before, after = weights(pair, network), weights(tmp_path / "more", network)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_does_not_fit_the_images_is_refused(single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, "--max_train_steps", 1]
    with pytest.raises(ValueError, match="sample_size is .* there and \\(24, 24\\) here"):
        train("dual", folder, tmp_path / "pair", *options, "--resolution", 24)
    train("dual", folder, tmp_path / "pair", "--max_train_steps", 0)
    with pytest.raises(ValueError, match="must be a single-rate model, but it is a pair"):
        train("single", folder, tmp_path / "single", "--pretrained_model_name_or_path", tmp_path / "pair")
    assert train_single_rate.parse_args(["--preset", "x", "--output_dir", "y"]).pretrained_model_name_or_path is None


HAND_OVER = ["--override", "context_encoder.prediction_hand_over=true", "denoiser.prediction_hand_over=true"]


def test_a_light_network_learns_to_follow_its_encoder(single_rate, folder, tmp_path):  # noqa: F811
    """What the encoder knew stays, and on images never seen the denoiser comes to predict what the encoder would."""
    options = ["--pretrained_model_name_or_path", single_rate, "--follow_encoder", "--context_dropout", 0, *HAND_OVER]
    train("dual", folder, tmp_path / "pair", *options, "--max_train_steps", 8)
    before, after = weights(single_rate, "denoiser"), weights(tmp_path / "pair", "context_encoder")
    known = [name for name in after if name in before]
    assert any(name.startswith("proj_out") for name in known)
    assert all(torch.equal(before[name], after[name]) for name in known)
    train("dual", folder, tmp_path / "start", *options, "--max_train_steps", 0)
    start = weights(tmp_path / "start", "context_encoder")
    learned = [name for name in after if name not in before]
    assert learned and not any(torch.equal(start[name], after[name]) for name in learned if "embedding" not in name)


def test_following_an_encoder_that_tells_no_prediction_is_refused(single_rate, folder, tmp_path):  # noqa: F811
    start = ["--pretrained_model_name_or_path", single_rate]
    for options in (HAND_OVER, start, [*start, *HAND_OVER, "--context_dropout", 0.5]):
        dropout = [] if "--context_dropout" in options else ["--context_dropout", 0]
        with pytest.raises(ValueError, match="--follow_encoder needs --pretrained_model_name_or_path"):
            train("dual", folder, tmp_path / "pair", "--follow_encoder", *options, *dropout, "--max_train_steps", 1)
