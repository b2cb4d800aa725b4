"""Recorded networks against the networks themselves, bit for bit. On the CPU a closure over the same buffers is replayed."""

import copy
import warnings

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from peft import LoraConfig

from diffusers_dualrate.graphs import Recordings, find_obstacle
from diffusers_dualrate.steps import make_dpm_solver

CALLS = [
    {"class_labels": [0, 1], "num_inference_steps": 4, "num_context_steps": 2},
    {"class_labels": [0, 1], "num_inference_steps": 4, "num_context_steps": 2, "guidance_scale": 3.0},
    {"class_labels": [2, 1], "num_inference_steps": 5, "refresh_steps": [0, 3], "guidance_scale": 2.0},
    {"class_labels": [3], "num_inference_steps": 6, "num_context_steps": 3, "guidance_interval": (-4, 4)},
    {"batch_size": 2, "num_inference_steps": 4, "num_context_steps": 1, "height": 16},
]


def record_eagerly(call, device):
    """What a graph does, without one: compute from the same buffers, and write to the same."""
    outputs = call()

    def replay():
        for output, new in zip(outputs, call(), strict=True):
            output.copy_(new)

    return outputs, replay


def record_on_cpu(pipe):
    pipe._recordings = Recordings(record_eagerly, device_type="cpu")
    return pipe


def sample(pipe, seed=0, class_labels=(0, 1), **options):
    batch_size = options.get("batch_size", len(class_labels))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch_size)]
    class_labels = None if "batch_size" in options else list(class_labels)
    return pipe(class_labels, **{"guidance_scale": 1.0} | options, generator=generators, output_type="latent").images


def solve(pipe):
    pipe.scheduler = make_dpm_solver(pipe.scheduler)
    return pipe


@pytest.mark.parametrize(
    "make",
    [
        lambda make_pipe, make_networks: make_pipe(),
        lambda make_pipe, make_networks: solve(make_pipe(single_rate=True)),
        lambda make_pipe, make_networks: hand_over(make_pipe, make_networks),
    ],
    ids=["a pair", "a single-rate model under another solver", "a pair that hands over"],
)
def test_calls_of_other_shapes_and_plans_in_turns_are_what_each_is_alone(make, make_pipe, make_networks):
    """Kills: outputs that are not copies; a key without strides, shapes or conditions; inputs that are not copied in."""
    pipe = make(make_pipe, make_networks)
    single = pipe.context_encoder is None
    plans = ("num_context_steps", "refresh_steps")
    calls = [{key: call[key] for key in call if not (single and key in plans)} for call in CALLS]
    alone = [sample(pipe, seed=i, **call) for i, call in enumerate(calls)]
    record_on_cpu(pipe)
    for order in ((0, 1, 2, 3, 4), (3, 0, 4, 2, 1, 0)):
        for i in order:
            assert torch.equal(sample(pipe, seed=i, **calls[i]), alone[i]), i
    evaluations = {i: [4 + 2, 4 + 2, 5 + 2, 6 + 3, 4 + 1][i] for i in range(5)}
    if single:
        evaluations = {i: calls[i]["num_inference_steps"] for i in range(5)}
    assert pipe._recordings.num_replays == sum(evaluations.values()) * 2 + evaluations[0]


def hand_over(make_pipe, make_networks):
    pipe = make_pipe(encoder_denoises=False)
    pipe.context_encoder, pipe.denoiser = make_networks(num_classes=4, prediction_hand_over=True)
    return pipe


def test_prompts_in_turns_are_what_each_is_alone(make_text_pipe):
    pipe = make_text_pipe()

    def draw(prompt, scale):
        return sample(pipe, class_labels=prompt, guidance_scale=scale, num_inference_steps=3, num_context_steps=2)

    calls = [(["a red apple"], 2.0), (["two green fish"], 2.0), (["a red apple"], 1.0)]
    alone = [draw(*call) for call in calls]
    record_on_cpu(pipe)
    for i in (0, 1, 2, 1, 0):
        assert torch.equal(draw(*calls[i]), alone[i]), i
    assert pipe.cuda_graphs.num_replays == 5 * (3 + 2)


def test_a_call_in_inference_mode_leaves_the_ordinary_call_after_it_alone(make_pipe):
    pipe = make_pipe()
    alone = sample(pipe, **CALLS[1])
    record_on_cpu(pipe)
    with torch.inference_mode():
        assert torch.equal(sample(pipe, **CALLS[1]), alone)
    assert torch.equal(sample(pipe, **CALLS[1]), alone)


def test_a_callback_keeps_what_it_was_given_and_changes_what_it_likes(make_pipe):
    def run(pipe):
        kept = []

        def callback(pipe, i, t, tensors):
            kept.append((tensors["latents"], *tensors["context"]))
            pipe._guidance_scale = 1.0 if i == 2 else 2.5
            context = tuple(part + 0.1 for part in tensors["context"])
            return {"latents": tensors["latents"] * 0.9, "class_labels": torch.tensor([3, i % 4]), "context": context}

        options = {"callback_on_step_end_tensor_inputs": ["latents", "class_labels", "context"]}
        image = sample(
            pipe,
            num_inference_steps=6,
            num_context_steps=3,
            callback_on_step_end=callback,
            **options,
            guidance_scale=2,
        )
        return [image, *(part for parts in kept for part in parts)]

    pipe = make_pipe()
    for given, expected in zip(run(record_on_cpu(copy.deepcopy(pipe))), run(pipe), strict=True):
        assert torch.equal(given, expected)


def train_on(pipe):
    """A step of training, in place."""
    with torch.no_grad():
        for weight in pipe.denoiser.parameters():
            weight.mul_(1.1)


def replace(pipe):
    pipe.denoiser = copy.deepcopy(pipe.denoiser)
    train_on(pipe)


CHANGES = {"weights in place": train_on, "other weights": replace, "precision": lambda pipe: pipe.to(torch.bfloat16)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_networks_that_change_between_two_calls_are_those_that_draw(make_pipe, change):
    pipe = record_on_cpu(make_pipe())
    before = sample(pipe, **CALLS[1])
    CHANGES[change](pipe)
    after = sample(pipe, **CALLS[1])
    pipe.disable_cuda_graphs()
    assert torch.equal(after, sample(pipe, **CALLS[1])) and not torch.equal(after, before)


def attach_hook(pipe):
    pipe.denoiser.trunk.middle.register_forward_hook(lambda module, arguments, output: output * 1.5)


def adapt(pipe):
    pipe.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_out"], init_lora_weights=False))


def cache(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=[r".*blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_timestep_skip_range=(0, 1000),
    )
    pipe.denoiser.enable_cache(config)


def fail(call, device):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


OBSTACLES = {
    "a hook": (attach_hook, "has a hook"),
    "adapters": (adapt, "has adapters"),
    "a cache": (cache, "has a hook"),
    "training": (lambda pipe: pipe.denoiser.train(), "in training mode"),
    "another device": (lambda pipe: pipe.enable_cuda_graphs(), "is on cpu, and they need cuda"),
    "no recording": (
        lambda pipe: setattr(pipe, "_recordings", Recordings(fail, "cpu")),
        "operation not permitted when stream is capturing",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_a_graph_cannot_hold_turns_them_off_with_one_warning_and_the_same_images(make_pipe, obstacle):
    change, words = OBSTACLES[obstacle]
    pipe = record_on_cpu(make_pipe())
    sample(pipe, **CALLS[1])
    change(pipe)
    with pytest.warns(UserWarning, match="CUDA graphs are off") as told:
        images = [sample(pipe, **CALLS[1]) for _ in range(2)]
    assert len(told) == 1 and words in str(told[0].message)
    pipe.disable_cuda_graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = sample(pipe, **CALLS[1])
    assert all(torch.equal(image, expected) for image in images)


def test_a_network_that_was_compiled_from_outside_is_named_with_what_to_do_instead(make_pipe):
    wrapped = torch.compile(make_pipe().denoiser)
    expected = "UViTDenoiser is wrapped by torch.compile: call its compile() instead"
    assert find_obstacle([wrapped], "cpu") == expected


def test_a_hook_that_comes_on_the_way_is_called(make_pipe):
    def run(pipe):
        callback = lambda own, i, t, tensors: attach_hook(pipe) if i == 1 else None  # noqa: E731
        return sample(pipe, **CALLS[0], callback_on_step_end=callback)

    pipe = make_pipe()
    recorded = record_on_cpu(copy.deepcopy(pipe))
    with pytest.warns(UserWarning, match="has a hook"):
        assert torch.equal(run(recorded), run(pipe))


def test_a_call_within_a_call_leaves_the_buffers_alone(make_pipe):
    pipe = make_pipe()
    expected, inner = sample(pipe, **CALLS[1]), sample(pipe, seed=7, **CALLS[1])
    record_on_cpu(pipe)
    within = []
    callback = lambda own, i, t, tensors: within.append(sample(pipe, seed=7, **CALLS[1]))  # noqa: E731
    assert torch.equal(sample(pipe, **CALLS[1], callback_on_step_end=lambda *args: callback(*args) or {}), expected)
    assert len(within) == 4 and all(torch.equal(image, inner) for image in within)


def test_only_so_many_shapes_are_kept(make_pipe):
    pipe = record_on_cpu(make_pipe())
    for batch_size in range(1, 12):
        sample(pipe, batch_size=batch_size, num_inference_steps=1, num_context_steps=1)
    assert len(pipe._recordings._kept) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_on_a_gpu_graphs_draw_what_their_kernels_draw_one_by_one(make_pipe):
    pipe = make_pipe().to("cuda")
    alone = [sample(pipe, seed=i, **call) for i, call in enumerate(CALLS)]
    pipe.enable_cuda_graphs()
    for i in (0, 1, 2, 3, 4, 3, 0, 4, 2, 1, 0):
        assert torch.equal(sample(pipe, seed=i, **CALLS[i]), alone[i]), i
    assert pipe.cuda_graphs.num_replays > 0
