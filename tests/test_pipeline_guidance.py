"""Classifier-free guidance in two rates: a context for each branch, an interval, and callbacks that switch it."""

import math

import pytest
import torch

import plain_loop
from diffusers_dualrate import plan_refreshes
from diffusers_dualrate.chain import Chain, Context
from diffusers_dualrate.guidance import Guidance
from diffusers_dualrate.steps import ChainSteps

CLOSE = {"rtol": 0, "atol": 2e-4}
N = 8
TIMES = [1 - i / N for i in range(N)]
LEVELS = [plain_loop.log_snr_at(t) for t in TIMES]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(pipe, labels, times, refresh_at, scales):
    draws = generator()
    noise = torch.randn((len(labels), 3, 8, 8), generator=draws)
    labels = torch.tensor(labels)
    return plain_loop.sample(pipe.denoiser, pipe.context_encoder, times, refresh_at, labels, noise, draws, scales)


def interval(first, last):
    """Log-SNR bounds that hold steps first to last and no others: half a step beyond them."""
    low = LEVELS[first] - 0.01
    return low, LEVELS[last] + 0.01


def test_scale_1_is_the_conditional_branch_alone_and_evaluates_no_other(make_pipe, watch):
    """Mutants: `> 1` made `>= 1` or `!= 0`."""
    pipe, labels = make_pipe(), [0, 1, 2]
    calls = watch(pipe)
    images = pipe(labels, N, 2, guidance_scale=1.0, generator=generator(), output_type="latent").images
    assert {call.rows for call in calls.encoder + calls.denoiser} == {3}
    assert all(call.condition.tolist() == labels for call in calls.encoder + calls.denoiser)
    default = pipe(labels, N, 2, generator=generator(), output_type="latent").images
    assert torch.equal(images, default)
    torch.testing.assert_close(images, plain(pipe, labels, TIMES, {0, 4}, 1.0), **CLOSE)


def test_a_default_scale_acts_where_there_are_classes(make_pipe, watch):
    """Mutants: the two defaults exchanged, or the model's taken without classes."""
    pipe = make_pipe(guidance_scale=2.0)
    calls = watch(pipe)
    for labels, scale, rows in (([0], None, 2), (None, None, 1), ([0], 1.0, 1)):
        calls.denoiser.clear()
        pipe(labels, 2, 1, guidance_scale=scale, output_type="latent")
        assert [call.rows for call in calls.denoiser] == [rows, rows]


def test_guidance_goes_from_the_null_branch_through_the_class_and_beyond(make_pipe):
    """v = v_null + scale (v_class − v_null). Mutants: either sign, the two branches exchanged, the scale less 1."""
    pipe = make_pipe()
    z, labels, level = torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), torch.tensor(0.5)
    null = torch.tensor([4, 4])
    with torch.no_grad():
        branches = {}
        for name, of_branch in (("class", labels), ("null", null)):
            context = pipe.denoiser.project_context(pipe.context_encoder(z, -1.0, of_branch).context)
            branches[name] = pipe.denoiser(z, level, of_branch, context, -1.0).sample
        for scale in (1.5, 4.0):
            steps = ChainSteps(pipe.scheduler, plan_refreshes(1), level[None])
            chain = Chain(pipe.denoiser, pipe.context_encoder, steps, labels, Guidance(scale))
            early = torch.tensor(-1.0)
            context = Context(chain.compute_context(z, early, both=True), early)
            v = chain.compute_velocity(z, level, context, guides=True)
            torch.testing.assert_close(
                v, branches["class"] + (scale - 1) * (branches["class"] - branches["null"]), rtol=1e-4, atol=1e-5
            )
            unguided = chain.compute_velocity(z, level, context, guides=False)
            torch.testing.assert_close(unguided, branches["class"], rtol=1e-4, atol=1e-5)
    assert (branches["class"] - branches["null"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("k", "first", "last"), [(2, 5, 6), (2, 0, 0), (2, 3, 3), (4, 3, 4), (1, 7, 7), (8, 2, 5), (2, 0, 7), (3, 2, 4)]
)
def test_a_refresh_encodes_the_null_branch_exactly_where_a_step_before_the_next_one_guides(
    make_pipe, watch, k, first, last
):
    """Mutants: `any` made `all`, the slice of levels one longer or shorter, `i + 1` made `i` in the next refresh."""
    pipe, labels = make_pipe(), [0, 3]
    guided = [first <= i <= last for i in range(N)]
    refresh_at = [i for i, refreshes in enumerate(plan_refreshes(N, k)) if refreshes]
    expected = plain(pipe, labels, TIMES, refresh_at, [3.0 if guides else 1.0 for guides in guided])
    calls = watch(pipe)
    images = pipe(
        labels, N, k, guidance_scale=3.0, guidance_interval=interval(first, last), generator=generator(),
        output_type="latent",
    ).images  # fmt: skip
    segments = [guided[a:b] for a, b in zip(refresh_at, [*refresh_at[1:], N], strict=True)]
    assert [call.rows for call in calls.encoder] == [4 if any(segment) else 2 for segment in segments]
    assert [call.rows for call in calls.denoiser] == [4 if guides else 2 for guides in guided]
    assert all(len(part) == call.rows for call in calls.denoiser for part in call.context)
    torch.testing.assert_close(images, expected, **CLOSE)


def test_the_ends_of_the_interval_belong_to_it(make_pipe, watch):
    """Mutants: either `<=` made `<`."""
    pipe = make_pipe()
    pipe.scheduler.set_timesteps(N)
    levels = pipe.scheduler.step_log_snrs.tolist()
    calls = watch(pipe)
    pipe([0], N, 2, guidance_scale=3.0, guidance_interval=(levels[2], levels[4]), output_type="latent")
    assert [call.rows for call in calls.denoiser] == [1, 1, 2, 2, 2, 1, 1, 1]
    calls.denoiser.clear()
    pipe([0], N, 2, guidance_scale=3.0, guidance_interval=(-math.inf, levels[0]), output_type="latent")
    assert [call.rows for call in calls.denoiser] == [2] + [1] * 7


def switch(at):
    """Callback that sets the guidance scale at the end of the steps named."""

    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = at.get(i, pipe._guidance_scale)

    return callback


def test_guidance_switched_on_between_refreshes_refreshes_both_branches_at_once(make_pipe, watch):
    """Mutants: `lacks_null` without its count of rows, `==` made `<`, `both` from the scale before the switch."""
    pipe, labels = make_pipe(), [0, 3]
    expected = plain(pipe, labels, TIMES, {0, 2, 4}, [1.0, 1.0] + [3.0] * 6)
    calls = watch(pipe)
    options = {"generator": generator(), "output_type": "latent", "callback_on_step_end": switch({1: 3.0})}
    images = pipe(labels, N, 2, **options).images
    assert [call.rows for call in calls.encoder] == [2, 4, 4]
    assert [call.rows for call in calls.denoiser] == [2, 2] + [4] * 6
    assert [call.context_log_snr == call.log_snr for call in calls.denoiser] == [i in (0, 2, 4) for i in range(N)]
    torch.testing.assert_close(images, expected, **CLOSE)


def test_guidance_switched_off_uses_the_class_branch_of_the_context_at_hand(make_pipe, watch):
    """Mutants: the slice takes the first half, or the step keeps both."""
    pipe, labels = make_pipe(), [0, 3]
    expected = plain(pipe, labels, TIMES, {0, 4}, [3.0, 3.0] + [1.0] * 6)
    calls = watch(pipe)
    options = {"generator": generator(), "output_type": "latent", "callback_on_step_end": switch({1: 1.0})}
    images = pipe(labels, N, 2, guidance_scale=3.0, **options).images
    assert [call.rows for call in calls.encoder] == [4, 2]
    assert [call.rows for call in calls.denoiser] == [4, 4] + [2] * 6
    torch.testing.assert_close(images, expected, **CLOSE)


def test_guidance_switched_off_and_on_again_needs_no_new_context(make_pipe, watch):
    pipe, labels = make_pipe(), [0, 3]
    expected = plain(pipe, labels, TIMES, {0}, [3.0, 1.0, 1.0] + [2.0] * 5)
    calls = watch(pipe)
    options = {"generator": generator(), "output_type": "latent", "callback_on_step_end": switch({0: 0.0, 2: 2.0})}
    images = pipe(labels, N, 1, guidance_scale=3.0, **options).images
    assert [call.rows for call in calls.encoder] == [4]
    torch.testing.assert_close(images, expected, **CLOSE)


def test_guidance_of_a_single_rate_model_is_switched_without_an_encoder(make_pipe, watch):
    pipe, labels = make_pipe(single_rate=True), [0, 3]
    expected = plain(pipe, labels, TIMES, (), [1.0, 1.0, 3.0, 3.0] + [1.0] * 4)
    calls = watch(pipe)
    options = {"generator": generator(), "output_type": "latent", "callback_on_step_end": switch({1: 3.0, 3: 1.0})}
    images = pipe(labels, N, **options).images
    assert [call.rows for call in calls.denoiser] == [2, 2, 4, 4, 2, 2, 2, 2]
    torch.testing.assert_close(images, expected, **CLOSE)


def test_a_callback_cannot_switch_on_guidance_where_there_are_no_classes(make_pipe, watch):
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 3.0

    pipe = make_pipe(num_classes=None)
    calls = watch(pipe)
    pipe(batch_size=2, num_inference_steps=4, num_context_steps=2, callback_on_step_end=callback, output_type="latent")
    assert [call.rows for call in calls.denoiser] == [2] * 4


def test_a_default_guidance_scale_below_one_is_refused(make_pipe):
    with pytest.raises(ValueError, match="guidance_scale must be .* at least 1, got 0.5"):
        make_pipe(guidance_scale=0.5)
