"""Training that starts from a trained model: a single-rate network becomes the encoder of a pair, frozen or not."""

import pytest
import torch

import train_single_rate
from diffusers_dualrate import DualRatePipeline, diffusion
from diffusers_dualrate.losses import coupled_pair
from test_training import folder, train  # noqa: F401 (fixtures)

# One step that moves no weight: its rate is below what float32 can add.
AT_REST = ("--max_train_steps", 1, "--learning_rate", 1e-30)


@pytest.fixture(scope="module")
def single_rate(folder, tmp_path_factory):  # noqa: F811
    output_dir = tmp_path_factory.mktemp("runs") / "single"
    train("single", folder, output_dir, "--max_train_steps", 2)
    return output_dir


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-20)


def weights(folder_, network):
    return getattr(DualRatePipeline.from_pretrained(folder_), network).state_dict()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_single_rate_model_becomes_the_encoder_of_a_pair(frozen, single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, "--max_train_steps", 8]
    train("dual", folder, tmp_path / "pair", *options, *(["--freeze_encoder"] if frozen else []))
    before, after = weights(single_rate, "denoiser"), weights(tmp_path / "pair", "context_encoder")
    trunk = [name for name in after if name.startswith(("trunk", "noise_embedding", "class_embedding"))]
    assert trunk and all(torch.equal(before[name], after[name]) for name in trunk) == frozen
    train("dual", folder, tmp_path / "start", *options[:2], *AT_REST)
    start = weights(tmp_path / "start", "context_encoder")
    heads = [name for name in after if name.startswith("context_heads")]
    assert heads and not any(torch.equal(start[name], after[name]) for name in heads)
    # What was trained says what it started from, and another start is another run.
    with pytest.raises(ValueError, match="another configuration: .*found.models"):
        train("dual", folder, tmp_path / "pair", "--max_train_steps", 9, "--resume_from_checkpoint", "latest")


def test_training_goes_on_from_a_trained_model(single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, *AT_REST]
    train("single", folder, tmp_path / "again", *options)
    before, after = weights(single_rate, "denoiser"), weights(tmp_path / "again", "denoiser")
    assert all(same(before[name], after[name]) for name in before)
    pair = tmp_path / "pair"
    train("dual", folder, pair, "--max_train_steps", 2)
    train("dual", folder, tmp_path / "more", "--pretrained_model_name_or_path", pair, *options[2:])
    for network in ("context_encoder", "denoiser"):
        before, after = weights(pair, network), weights(tmp_path / "more", network)
        assert all(same(before[name], after[name]) for name in before)


def test_a_model_that_does_not_fit_the_images_is_refused(single_rate, folder, tmp_path):  # noqa: F811
    options = ["--pretrained_model_name_or_path", single_rate, "--max_train_steps", 1]
    with pytest.raises(ValueError, match="sample_size is .* there and \\(24, 24\\) here"):
        train("dual", folder, tmp_path / "pair", *options, "--resolution", 24)
    wider = ["--override", "context_encoder.level_channels=[16,64]"]
    with pytest.raises(ValueError, match=r"level_channels of the UViTContextEncoder is .* there and \[16, 64\] here"):
        train("dual", folder, tmp_path / "pair", *options, *wider)
    with pytest.raises(ValueError, match=r"level_channels of the UViTDenoiser is .* there and \[16, 64\] here"):
        train("single", folder, tmp_path / "pair", *options, *wider)
    train("dual", folder, tmp_path / "pair", *AT_REST)
    options[1] = tmp_path / "pair"
    with pytest.raises(ValueError, match=r"level_blocks of the UViTDenoiser is \[1, 1\] there and \[2, 1\] here"):
        train("dual", folder, tmp_path / "other", *options, "--override", "denoiser.level_blocks=[2,1]")
    # What is no shape is the preset's.
    train("dual", folder, tmp_path / "other", *options[:2], *AT_REST, "--override", "denoiser.dropout=0.1")
    assert DualRatePipeline.from_pretrained(tmp_path / "other").denoiser.config.dropout == 0.1
    with pytest.raises(ValueError, match="must be a single-rate model, but it is a pair"):
        train("single", folder, tmp_path / "single", "--pretrained_model_name_or_path", tmp_path / "pair")
    assert train_single_rate.parse_args(["--preset", "x", "--output_dir", "y"]).pretrained_model_name_or_path is None


HAND_OVER = ["--override", "context_encoder.prediction_hand_over=true", "denoiser.prediction_hand_over=true"]


FOLLOW = ["--follow_encoder", "--context_dropout", 0, *HAND_OVER]


def distance_from_the_encoder(folder_):
    """Mean square between the denoiser's velocity and the encoder's, on the ancestral chain from images of noise."""
    pair = DualRatePipeline.from_pretrained(folder_)
    generator = torch.Generator().manual_seed(0)
    x, eps, eps_tau = torch.randn(3, 64, 3, 16, 16, generator=generator)
    level, level_tau = torch.tensor(1.0), torch.tensor(-1.0)
    z, z_tau = coupled_pair(x.clamp(-1, 1), eps, eps_tau, level, level_tau)
    with torch.no_grad():
        context = pair.denoiser.project_context(pair.context_encoder(z_tau, level_tau).context)
        target = diffusion.v_from_x(z, pair.context_encoder(z, level).context[-2], level)
        return (pair.denoiser(z, level, None, context, level_tau).sample - target).square().mean().item()


def test_a_light_network_learns_to_follow_its_encoder(single_rate, folder, tmp_path):  # noqa: F811
    start, pair = tmp_path / "start", tmp_path / "pair"
    options = ["--pretrained_model_name_or_path", single_rate, *FOLLOW, "--learning_rate", 0.003]
    train("dual", folder, start, *options, *AT_REST)
    train("dual", folder, pair, *options, "--max_train_steps", 30)
    assert distance_from_the_encoder(pair) < 0.9 * distance_from_the_encoder(start)
    # What the encoder knew stays, what it hands over learns.
    before, first, after = weights(single_rate, "denoiser"), *(weights(f, "context_encoder") for f in (start, pair))
    known = [name for name in after if name in before]
    assert any(name.startswith("proj_out") for name in known)
    assert all(torch.equal(before[name], after[name]) for name in known)
    learned = [name for name in after if name not in before]
    assert learned and not any(torch.equal(first[name], after[name]) for name in learned)
    # Where the context is fresh it can be no better than what it follows.
    assert DualRatePipeline.from_pretrained(pair).config.encoder_denoises
    frozen = ["--freeze_encoder", *HAND_OVER, *AT_REST]
    train("dual", folder, tmp_path / "frozen", "--pretrained_model_name_or_path", single_rate, *frozen)
    assert not DualRatePipeline.from_pretrained(tmp_path / "frozen").config.encoder_denoises
    # Another loss is another run.
    with pytest.raises(ValueError, match="another configuration: training.follow_encoder is true there"):
        options[2] = "--freeze_encoder"
        train("dual", folder, pair, *options, "--max_train_steps", 31, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FOLLOW, "--follow_encoder needs a trained model: give --pretrained"),
        (["--freeze_encoder"], "--freeze_encoder needs a trained model: give --pretrained"),
        ([*FOLLOW, "--context_dropout", 0.5], "needs --context_dropout 0, got 0.5"),
        (FOLLOW[:3], "prediction_hand_over=true, and the pair's have false"),
    ],
)
def test_what_cannot_be_followed_is_refused(options, message, single_rate, folder, tmp_path):  # noqa: F811
    start = [] if "trained" in message else ["--pretrained_model_name_or_path", single_rate]
    with pytest.raises(ValueError, match=message):
        train("dual", folder, tmp_path / "pair", *start, *options, "--max_train_steps", 1)
