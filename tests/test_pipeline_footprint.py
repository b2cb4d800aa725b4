"""What a call leaves behind, and what it costs beside its networks: nothing, and a few small operations a step."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_call_leaves_the_components_as_they_were(make_pipe):
    pipe = make_pipe()
    pipe.context_encoder.train()
    networks = (pipe.denoiser, pipe.context_encoder)

    def state():
        return [
            (
                {name: (id(weight), weight.clone()) for name, weight in network.state_dict(keep_vars=True).items()},
                [module.training for module in network.modules()],
                [[len(getattr(module, kind)) for kind in HOOKS] for module in network.modules()],
                [weight.grad for weight in network.parameters()],
                dict(network.config),
            )
            for network in networks
        ]

    before, config = state(), dict(pipe.config)
    pipe([0, 1], 4, 2, guidance_scale=2.0)
    for (weights, *rest), (weights_after, *rest_after) in zip(before, state(), strict=True):
        assert rest == rest_after
        for name, (identity, weight) in weights.items():
            assert weights_after[name][0] == identity and torch.equal(weights_after[name][1], weight)
    assert dict(pipe.config) == config


@pytest.mark.parametrize("single_rate", [False, True])
@pytest.mark.parametrize("ending", ["whole", "interrupted", "failed"])
def test_no_tensor_of_a_call_outlives_it(make_pipe, ending, single_rate):
    pipe, references = make_pipe(single_rate=single_rate), []
    before = dict(vars(pipe.scheduler))

    def callback(pipe, i, t, tensors):
        for value in (tensors["latents"], tensors["class_labels"], *(tensors["context"] or ())):
            references.append(weakref.ref(value))
        pipe._interrupt = ending == "interrupted" and i == 2
        if ending == "failed" and i == 2:
            raise RuntimeError

    options = {"callback_on_step_end_tensor_inputs": ["latents", "class_labels", "context"], "guidance_scale": 2.0}
    try:
        pipe([0, 3], 4, None if single_rate else 2, callback_on_step_end=callback, **options)
    except RuntimeError:
        assert ending == "failed"
    gc.collect()
    assert len(references) == (4 if ending == "whole" else 3) * (2 if single_rate else 4)
    assert all(reference() is None for reference in references)
    for value in vars(pipe).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        assert not any(isinstance(part, torch.Tensor) for part in parts)
    assert all(value is before[name] for name, value in vars(pipe.scheduler).items())


def test_a_hundred_calls_leave_no_more_tensors_than_one(make_pipe):
    pipe = make_pipe()

    def call():
        pipe([0], 1, 1, guidance_scale=2.0, output_type="pt")

    call()
    before = live_tensors()
    for _ in range(100):
        call()
    assert live_tensors() <= before


@pytest.mark.parametrize("single_rate", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (-1, 1)}]
)
def test_a_call_never_waits_for_the_device(make_pipe, options, single_rate):
    """On the meta device, whose tensors have no values, whatever reads one raises."""
    pipe = make_pipe(single_rate=single_rate).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones((), device="meta").item()
    images = pipe([0, 3], 6, None if single_rate else 2, **options, output_type="latent").images
    assert images.device.type == "meta" and images.shape == (2, 3, 8, 8)


class Operators(TorchDispatchMode):
    """Counts tensor operators while `paused` is 0, by name."""

    def __init__(self):
        super().__init__()
        self.paused, self.counts = 0, Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not self.paused:
            self.counts[function.overloadpacket._qualified_op_name] += 1
        return function(*arguments, **(options or {}))


def count_operators(pipe, monkeypatch, steps, **options):
    operators = Operators()

    def pause(module, arguments):
        operators.paused += 1

    def resume(module, arguments, output):
        operators.paused -= 1

    hooks = []
    for network in filter(None, (pipe.denoiser, pipe.context_encoder)):
        hooks += [network.register_forward_pre_hook(pause), network.register_forward_hook(resume)]
    project = pipe.denoiser.project_context

    def project_paused(context):
        operators.paused += 1
        projected = project(context)
        operators.paused -= 1
        return projected

    with monkeypatch.context() as patch, operators:
        patch.setattr(pipe.denoiser, "project_context", project_paused)
        pipe([0, 3], steps, output_type="latent", **options)
    for hook in hooks:
        hook.remove()
    return operators.counts


@pytest.mark.parametrize("k", [1, None])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("one_each", [False, True])
def test_beside_its_networks_a_step_is_at_most_30_operators_and_one_draw_of_noise(
    make_pipe, monkeypatch, k, scale, one_each, record_property
):
    pipe = make_pipe()

    def count(steps):
        source = [generator(i) for i in range(2)] if one_each else generator()
        return count_operators(pipe, monkeypatch, steps, num_context_steps=k, guidance_scale=scale, generator=source)

    short, long = count(4), count(12)
    long.subtract(short)
    draws = {name: number for name, number in long.items() if "rand" in name}
    assert sum(draws.values()) == 8 * (2 if one_each else 1)
    per_step = (sum(long.values()) - sum(draws.values())) / 8
    record_property("operators_per_step", per_step)
    assert per_step <= 30


def test_between_refreshes_the_projected_context_is_neither_computed_nor_copied(make_pipe, watch, monkeypatch):
    pipe, projections = make_pipe(), []
    project = pipe.denoiser.project_context

    def count(context):
        projections.append(project(context))
        return projections[-1]

    monkeypatch.setattr(pipe.denoiser, "project_context", count)
    calls = watch(pipe)
    pipe([0, 3], 8, 2, guidance_scale=2.0, output_type="latent")
    assert len(projections) == 2
    for i, call in enumerate(calls.denoiser):
        newest = projections[i // 4]
        assert [part.data_ptr() for part in call.context] == [part.data_ptr() for part in newest]
    assert projections[0][0].data_ptr() != projections[1][0].data_ptr()

    # Where only some steps of a segment guide, the others see a part of the same storage.
    projections.clear(), calls.denoiser.clear()
    pipe.scheduler.set_timesteps(8)
    levels = pipe.scheduler.step_log_snrs.tolist()
    pipe([0, 3], 8, 1, guidance_scale=2.0, guidance_interval=(levels[2], levels[3]), output_type="latent")
    assert len(projections) == 1
    for call in calls.denoiser:
        for part, whole in zip(call.context, projections[0], strict=True):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
