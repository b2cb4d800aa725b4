"""Callbacks at the end of each step: what they get, what they may change, and what they must not break."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffusers_dualrate import DualRatePipeline, DualRateScheduler

EVERYTHING = ["latents", "class_labels", "context"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, callback=None, inputs=("latents",), labels=(0, 3), n=6, k=2, **options):
    return pipe(
        list(labels), n, k, generator=generator(), output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=inputs, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_callback_gets_the_pipeline_the_step_the_timestep_and_the_tensors_it_asked_for(make_pipe, watch, scale):
    pipe, seen = make_pipe(), []
    calls = watch(pipe)

    def callback(*arguments):
        seen.append(arguments)

    images = run(pipe, callback, EVERYTHING, guidance_scale=scale)
    assert all(each.denoiser is pipe.denoiser and len(each.scheduler.timesteps) == 6 for each, *_ in seen)
    assert [i for _, i, _, _ in seen] == list(range(6))
    assert [float(t) for _, _, t, _ in seen] == pytest.approx([1000 * (6 - i) / 6 for i in range(6)])
    for i, (_, _, _, tensors) in enumerate(seen):
        assert list(tensors) == EVERYTHING
        assert tensors["class_labels"].tolist() == [0, 3]
        assert all(mine is theirs for mine, theirs in zip(tensors["context"], calls.denoiser[i].context, strict=True))
        after = calls.denoiser[i + 1].sample[:2] if i < 5 else images
        assert torch.equal(tensors["latents"], after)
    asked = []
    run(pipe, lambda _, i, t, tensors: asked.append(list(tensors)), ["context"])
    assert asked == [["context"]] * 6
    run(pipe, lambda _, i, t, tensors: asked.append(list(tensors)), None)
    assert asked[6:] == [[]] * 6


def test_a_single_rate_model_has_no_context_to_hand_out(make_pipe):
    seen = []
    run(make_pipe(single_rate=True), lambda _, i, t, tensors: seen.append(tensors["context"]), EVERYTHING, k=None)
    assert seen == [None] * 6


def test_tensors_that_a_callback_returns_replace_the_loops(make_pipe, watch):
    """Mutants: any of the three values not read back, or read back under another name."""
    pipe = make_pipe()
    calls = watch(pipe)
    latents, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    context = tuple(torch.randn(2, width, side, side) for width, side in ((8, 4), (16, 2)))
    plain = run(pipe)

    for name, value in (("latents", latents), ("class_labels", labels), ("context", context)):
        calls.denoiser.clear(), calls.encoder.clear()
        images = run(pipe, lambda _, i, t, tensors, name=name, value=value: {name: value} if i == 0 else None)
        assert not torch.allclose(images, plain, atol=1e-3)
        before, after = calls.denoiser[:2]
        assert torch.equal(after.sample, latents) == (name == "latents")
        assert after.condition.tolist() == ([1, 2] if name == "class_labels" else [0, 3])
        assert (after.context[0] is context[0] and after.context[1] is context[1]) == (name == "context")
        assert calls.encoder[1].condition.tolist() == after.condition.tolist()  # still so at the next refresh
        assert before.condition.tolist() == [0, 3]

    def relabel(_, i, t, tensors):
        tensors["class_labels"].copy_(labels)

    relabelled = run(pipe, lambda _, i, t, tensors: {"class_labels": labels} if i == 0 else None)
    in_place = run(pipe, relabel, ["class_labels"])
    assert torch.equal(in_place, relabelled)
    last = run(pipe, lambda _, i, t, tensors: {"latents": torch.zeros_like(tensors["latents"])} if i == 5 else {})
    assert torch.equal(last, torch.zeros(2, 3, 8, 8))


class Damp(PipelineCallback):
    """Halves the latents at one step."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


class Relabel(PipelineCallback):
    """Changes the classes at one step; asks for a tensor that is not asked for by default."""

    tensor_inputs = ["class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["class_labels"] = callback_kwargs["class_labels"] * 0 + 1
        return callback_kwargs


def test_callback_objects_bring_their_own_tensor_inputs_one_or_several(make_pipe, watch):
    pipe = make_pipe()
    damp, relabel = (cls(cutoff_step_ratio=None, cutoff_step_index=2) for cls in (Damp, Relabel))
    by_hand = run(pipe, lambda _, i, t, tensors: {"latents": tensors["latents"] / 2} if i == 2 else {})
    assert torch.equal(run(pipe, damp, ()), by_hand)
    calls = watch(pipe)
    run(pipe, MultiPipelineCallbacks([damp, relabel]), ())
    assert [call.condition.tolist() for call in calls.denoiser] == [[0, 3]] * 3 + [[1, 1]] * 3


def test_an_interrupted_call_skips_its_remaining_steps_and_the_next_call_runs_whole(make_pipe, watch):
    pipe, latents = make_pipe(), []
    plain = run(pipe)
    calls = watch(pipe)

    def stop(pipe, i, t, tensors):
        latents.append(tensors["latents"])
        pipe._interrupt = i == 2

    images = run(pipe, stop, guidance_scale=2.0)
    assert len(calls.denoiser) == len(latents) == 3 and len(calls.encoder) == 1 and pipe.interrupt
    assert torch.equal(images, latents[-1])
    assert torch.equal(run(pipe), plain)
    assert not pipe.interrupt


def test_an_error_in_a_callback_comes_through_and_the_next_call_runs_as_before(make_pipe):
    pipe = make_pipe()
    plain = run(pipe)

    def fail(pipe, i, t, tensors):
        pipe._guidance_scale = 5.0
        if i == 3:
            raise RuntimeError("a callback's own fault")

    with pytest.raises(RuntimeError, match="a callback's own fault"):
        run(pipe, fail, guidance_scale=2.0)
    assert torch.equal(run(pipe), plain)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize("second_order", [False, True])
def test_calls_at_once_in_threads_give_the_bits_of_lone_calls(make_pipe, second_order):
    """Kills: any state of a run on the pipeline or on the scheduler that it shares with another one."""
    pipe = make_pipe(scheduler=DualRateScheduler(second_order=second_order))
    other = DualRatePipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    jobs = [(pipe, 6, 2, 1.0), (pipe, 9, 3, 3.0), (other, 4, 4, 2.0)]

    def draw(job):
        each, n, k, scale = job
        return run(each, n=n, k=k, guidance_scale=scale)

    alone = [draw(job) for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(draw, jobs * 4))
    assert all(torch.equal(image, alone[i % 3]) for i, image in enumerate(together))


@pytest.mark.parametrize("scheduler", [None, "in-tree"])
def test_a_call_from_within_a_callback_disturbs_neither(make_pipe, scheduler):
    ours = DualRateScheduler(second_order=True)
    if scheduler:
        ours = DPMSolverMultistepScheduler(trained_betas=ours.betas.tolist(), prediction_type="v_prediction")
    pipe, inner = make_pipe(scheduler=ours), []
    plain, other = run(pipe, guidance_scale=2.0), run(pipe, n=4, k=1)
    images = run(pipe, lambda p, i, t, tensors: inner.append(run(pipe, n=4, k=1)), guidance_scale=2.0)
    assert torch.equal(images, plain) and all(torch.equal(image, other) for image in inner)


def test_a_stop_from_outside_ends_every_running_call_and_one_from_a_callback_its_own(make_pipe, watch):
    pipe = make_pipe()
    calls = watch(pipe)

    def stop_inner(p, i, t, tensors):
        p._interrupt = True

    run(pipe, lambda p, i, t, tensors: None if i or run(pipe, stop_inner) is None else {})
    assert len(calls.denoiser) == 6 + 1
    calls.denoiser.clear()

    def press_stop(p, i, t, tensors):
        pipe._interrupt = True

    run(pipe, lambda p, i, t, tensors: {} if run(pipe, press_stop) is not None else None)
    assert len(calls.denoiser) == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": 3}, r"latents as a tensor of shape \(2, 3, 8, 8\), got int"),
        ({"latents": torch.zeros(2, 3, 8, 4)}, r"latents as a tensor of shape \(2, 3, 8, 8\), got one of shape \(2, 3, 8, 4\)"),
        ({"class_labels": "heart"}, r"class_labels as a tensor of shape \(2,\), got str"),
        ({"context": 3}, "context as 2 tensors, got int"),
    ],
    ids=["number", "shape", "name", "context"],
)  # fmt: skip
def test_what_a_callback_returns_and_no_step_can_take_is_named(make_pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        run(make_pipe(), lambda *_: dict(returned))
