"""What DualRatePipeline takes and gives: labels, seeds, latents, output types; and what it refuses before any compute."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_dualrate import DualRatePipeline, DualRateScheduler

LABELS = {0: "cat", 1: "dog", 2: "owl", 3: "cow"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(pipe, labels, seeds=(0,), steps=(6, 2), **options):
    """Latents made with one generator for each seed, or with the one of a single seed."""
    source = [generator(seed) for seed in seeds] if len(seeds) > 1 else generator(*seeds)
    return pipe(labels, *steps, generator=source, output_type="latent", **options).images


# Labels in any form


@pytest.mark.parametrize(
    "labels",
    [
        [2, 0],
        (2, 0),
        torch.tensor([2, 0]),
        torch.tensor([2, 0], dtype=torch.uint8),
        ["owl", "cat"],
        ["owl", 0],
        [np.int64(2), torch.tensor(0)],
        np.array([2, 0]),
        range(2, -1, -2),
    ],
    ids=str,
)
def test_labels_are_numbers_names_or_tensors_in_a_list_or_alone(make_pipe, labels):
    pipe = make_pipe(id2label=LABELS)
    ids = pipe.get_label_ids(labels)
    assert ids == [2, 0] and all(type(number) is int for number in ids)


@pytest.mark.parametrize("label", [1, "dog", np.int64(1), torch.tensor(1), torch.tensor([1])], ids=repr)
def test_one_label_alone_is_one_image(make_pipe, watch, label):
    pipe = make_pipe(id2label=LABELS)
    calls = watch(pipe)
    assert drawn(pipe, label, steps=(2, 1)).shape == (1, 3, 8, 8)
    assert all(call.condition.tolist() == [1] for call in calls.denoiser + calls.encoder)


@pytest.mark.parametrize(
    "labels",
    [4, -1, [0, 4], torch.tensor([0, 9]), True, [0, True], torch.tensor([True]), 1.0, [1.0], torch.tensor([1.0])]
    + [
        [torch.tensor(1.5)],
        [torch.tensor(True)],
        [[0, 1]],
        torch.tensor([[0, 1]]),
        [],
        torch.tensor([]).long(),
        [None],
    ],
    ids=repr,
)
def test_labels_out_of_range_or_not_whole_numbers_are_refused(make_pipe, labels):
    """Mutants: `<=` made `<`, `<` made `<=`, either check dropped."""
    pipe = make_pipe(id2label=LABELS)
    with pytest.raises(ValueError, match="class_labels"):
        pipe.get_label_ids(labels)
    assert pipe.get_label_ids([0, 3]) == [0, 3]


def test_an_unknown_name_gets_the_closest_one_or_the_place_where_names_are(make_pipe):
    pipe = make_pipe(id2label=LABELS)
    with pytest.raises(ValueError, match="Unknown class name 'dogg'; did you mean 'dog'"):
        pipe(["cat", "dogg"])
    with pytest.raises(ValueError, match="'zzzz'; pipe.id2label lists the names"):
        pipe("zzzz")
    with pytest.raises(ValueError, match="'cat'"):
        make_pipe()("cat")


def test_names_of_classes_survive_saving_and_loading(make_pipe, tmp_path):
    for number, names in enumerate((LABELS, {3: "cow"}, None)):
        make_pipe(id2label=names).save_pretrained(tmp_path / str(number))
        pipe = DualRatePipeline.from_pretrained(tmp_path / str(number))
        assert pipe.id2label == (names or {})
        pipe.id2label.clear()
        assert pipe.id2label == (names or {})
    with pytest.raises(ValueError, match=r"outside 0..3: \[4\]"):
        make_pipe(id2label={4: "fox"})


def test_a_model_with_classes_and_no_labels_draws_from_its_null_class(make_pipe):
    pipe = make_pipe()
    unlabelled = drawn(pipe, None, batch_size=2)
    assert unlabelled.shape == (2, 3, 8, 8)
    torch.testing.assert_close(drawn(pipe, None), drawn(pipe, None, batch_size=1))
    assert not torch.allclose(unlabelled, drawn(pipe, [0, 0]), atol=1e-3)


def test_an_unconditional_model_takes_a_batch_size_and_no_labels(make_pipe):
    pipe = make_pipe(num_classes=None)
    assert drawn(pipe, None).shape[0] == 1
    assert drawn(pipe, None, batch_size=3).shape == (3, 3, 8, 8)
    assert drawn(pipe, None, batch_size=3, num_images_per_prompt=2).shape[0] == 6
    with pytest.raises(ValueError, match="unconditional"):
        pipe([0])


def test_several_images_for_a_label_stand_side_by_side(make_pipe, watch):
    """Mutants: `repeat_interleave` made `repeat`."""
    pipe = make_pipe()
    calls = watch(pipe)
    together = drawn(pipe, [0, 3], seeds=range(4), num_images_per_prompt=2)
    assert calls.denoiser[0].condition.tolist() == [0, 0, 3, 3]
    torch.testing.assert_close(together, drawn(pipe, [0, 0, 3, 3], seeds=range(4)))


# Seeds


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_depends_on_its_own_seed_alone_whatever_the_batch(make_pipe, scale):
    pipe = make_pipe()
    for base in (0, 1000, 77_000):
        labels, seeds = [i % 4 for i in range(16)], [base + i for i in range(16)]
        together = drawn(pipe, labels, seeds, guidance_scale=scale)
        for i in (0, 5, 15):
            alone = drawn(pipe, labels[i], seeds[i : i + 1], guidance_scale=scale)
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
        assert (together[0] - together[4]).abs().max() > 1e-2


def test_the_same_seed_gives_the_same_image_and_another_seed_another(make_pipe):
    pipe = make_pipe()
    first, again, other = (drawn(pipe, [1], [seed]) for seed in (3, 3, 4))
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-2


# Latents and images


def test_latents_given_are_used_and_left_as_they_are(make_pipe):
    pipe, noise = make_pipe(), torch.randn(2, 3, 8, 8, generator=generator(5))
    kept = noise.clone()
    given = drawn(pipe, [0, 1], latents=noise)
    assert torch.equal(noise, kept)
    assert torch.equal(given, drawn(pipe, [0, 1], latents=noise))
    assert (given - drawn(pipe, [0, 1], latents=noise + 1)).abs().max() > 1e-2
    # What is drawn first is the start: a generator that has already drawn it goes on with the same noise.
    source = generator()
    noise = torch.randn(2, 3, 8, 8, generator=source)
    resumed = pipe([0, 1], 6, 2, latents=noise, generator=source, output_type="latent").images
    assert torch.equal(resumed, drawn(pipe, [0, 1]))
    assert drawn(pipe, [0, 1], latents=noise.half()).dtype == torch.float32


def test_images_come_as_pil_arrays_or_tensors_of_the_same_pixels(make_pipe):
    """Mutants: `output_type` not passed on, an image range of [-1, 1] where [0, 1] is promised."""
    pipe = make_pipe()

    def images(output_type, **options):
        return pipe([0, 3], 4, 2, generator=generator(), width=16, output_type=output_type, **options)

    latent, pt, array, pil = (images(kind).images for kind in ("latent", "pt", "np", "pil"))
    assert latent.shape == pt.shape == (2, 3, 8, 16) and -1 <= latent.min() < 0
    torch.testing.assert_close(pt, latent / 2 + 0.5)
    assert isinstance(array, np.ndarray) and array.shape == (2, 8, 16, 3)
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert all(isinstance(image, Image.Image) and image.size == (16, 8) for image in pil)
    np.testing.assert_allclose(np.stack([np.asarray(image) for image in pil]), 255 * array, atol=0.51)
    default = pipe([0, 3], 4, 2, generator=generator(), width=16).images
    assert [np.asarray(image).tolist() for image in default] == [np.asarray(image).tolist() for image in pil]
    plain = images("latent", return_dict=False)
    assert type(plain) is tuple and len(plain) == 1 and torch.equal(plain[0], latent)


# Refusals


REFUSED = [
    ({"class_labels": [9]}, "got 9"),
    ({"class_labels": "lynx"}, "lynx"),
    ({"class_labels": {"cat", "dog"}}, "a number, a name or a list of them, got a set"),
    ({"class_labels": b"cat"}, "a number, a name or a list of them, got a bytes"),
    ({"class_labels": 1.5}, "1.5"),
    ({"batch_size": 3}, "3"),
    ({"class_labels": None, "batch_size": 0}, "at least 1"),
    ({"num_images_per_prompt": 0}, "at least 1, got 0"),
    ({"num_images_per_prompt": 10**9}, "at most 11184810 images of 8x8, got 2000000000 .*num_images_per_prompt=10+"),
    ({"class_labels": None, "batch_size": 10**12}, "at most 11184810 images of 8x8, got 10+ "),
    ({"class_labels": [0] * 3, "height": 16384, "width": 16384}, "at most 2 images of 16384x16384, got 3 "),
    ({"num_images_per_prompt": 2.0}, "num_images_per_prompt must be an integer.*, got 2.0"),
    ({"num_inference_steps": 8.0}, "num_inference_steps must be an integer.*, got 8.0"),
    ({"num_context_steps": 2.0}, "num_context_steps must be an integer.*, got 2.0"),
    ({"num_inference_steps": 0}, "0"),
    ({"num_inference_steps": -2}, "-2"),
    ({"num_inference_steps": 4, "num_context_steps": 5}, "5"),
    ({"num_context_steps": 0}, "0"),
    ({"num_context_steps": 2, "refresh_steps": [0, 1]}, "either"),
    ({"refresh_steps": [1, 2]}, r"\[1, 2\]"),
    ({"refresh_steps": [0, 3, 2]}, r"\[0, 3, 2\]"),
    ({"refresh_steps": [0, 64]}, r"\[0, 64\]"),
    ({"refresh_steps": [0, 1.5]}, r"\[0, 1.5\]"),
    ({"refresh_steps": []}, r"\[\]"),
    ({"timesteps": [200.0, 900.0]}, "900"),
    ({"timesteps": []}, "timesteps"),
    ({"timesteps": [900.0], "num_inference_steps": 1}, "either"),
    ({"height": 10}, "10"),
    ({"width": 6}, "6"),
    ({"height": 0}, "0"),
    ({"height": -8}, "-8"),
    ({"height": 10**6}, r"height must be an integer in \[1, 16384\], got 1000000"),
    ({"width": 16392}, r"width must be an integer in \[1, 16384\], got 16392"),
    ({"guidance_scale": 0.5}, "0.5"),
    ({"guidance_scale": float("nan")}, "nan"),
    ({"class_labels": None, "guidance_scale": 3.0}, "3.0"),
    ({"guidance_scale": 3.0, "guidance_interval": (2.0, 1.0)}, r"\(2.0, 1.0\)"),
    ({"guidance_scale": 3.0, "guidance_interval": (2.0,)}, r"\(2.0,\)"),
    ({"generator": [torch.Generator()] * 3}, "got 3"),
    ({"generator": []}, "got 0"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\)"),
    ({"latents": torch.zeros(2, 3, 8, 16)}, r"\(2, 3, 8, 16\)"),
    ({"latents": torch.zeros(2, 8, 8)}, r"\(2, 8, 8\)"),
    ({"output_type": "jpeg"}, "jpeg"),
    ({"num_inference_steps": "4"}, "num_inference_steps must be an integer.*, got '4'"),
    ({"num_inference_steps": 10**9}, r"in \[1, 8388608\], got 1000000000"),
    ({"height": 8.0}, "height must be an integer in .*, got 8.0"),
    ({"width": True}, "width must be an integer in .*, got True"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number.*, got inf"),
    ({"guidance_scale": "3"}, "guidance_scale must be a finite number.*, got '3'"),
    ({"guidance_interval": 3.0}, "guidance_interval must be .*, got 3.0"),
    ({"refresh_steps": 3}, "refresh_steps must be a list of steps, got 3"),
    ({"timesteps": ["a"]}, r"timesteps must fall .*, got \['a'\]"),
    ({"generator": [1, 2]}, "generator must be .*, got 1 in the list"),
    ({"latents": [1, 2]}, "latents must be a tensor .*, got list"),
    ({"latents": np.zeros((2, 3, 8, 8))}, "latents must be a tensor .*, got ndarray"),
    ({"latents": torch.zeros(2, 3, 8, 8).long()}, "latents must be a tensor .*, got torch.int64"),
    ({"latents": torch.full((2, 3, 8, 8), float("nan"))}, "latents must be finite"),
    ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "got 'latents'"),
    ({"callback_on_step_end_tensor_inputs": ["latents", "prompt"]}, "prompt"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=[f"{'-'.join(case)} {i}" for i, (case, _) in enumerate(REFUSED)]
)
def test_a_bad_argument_is_refused_by_its_value_before_any_network_runs(make_pipe, watch, arguments, message):
    """Mutants: any check of `_check_inputs` dropped, `<` made `<=`, `or` made `and` between height and width."""
    pipe = make_pipe()
    calls = watch(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0, 1]} | arguments)
    assert not calls.encoder and not calls.denoiser


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (DDPMScheduler(), {}, "DDPMScheduler prediction_type='v_prediction'"),
        (DDIMScheduler(prediction_type="epsilon"), {}, "DDIMScheduler prediction_type='v_prediction'"),
        (FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler"),
        (DDPMScheduler(prediction_type="v_prediction"), {"refresh_steps": [1]}, r"\[1\]"),
        (DDPMScheduler(prediction_type="v_prediction"), {"num_context_steps": 99}, "99"),
        (DDPMScheduler(prediction_type="v_prediction"), {"timesteps": [900, 5], "num_inference_steps": 4}, "either"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
@pytest.mark.filterwarnings("ignore:.*takes other steps")
def test_an_in_tree_scheduler_that_does_not_fit_is_refused_before_any_network_runs(
    make_pipe, watch, scheduler, arguments, message
):
    pipe = make_pipe(scheduler=scheduler)
    calls = watch(pipe)
    with pytest.raises(ValueError, match=message):
        pipe([0], **arguments)
    assert not calls.encoder and not calls.denoiser


MISMATCHED = [
    ({"context_channels": [8, 4]}, {}, r"\(8, 4\).*\(8, 8\)"),
    ({}, {"context_channels": [4, 8]}, r"\(8, 8\).*\(4, 8\)"),
    ({"context_channels": None}, {}, r"\(16, 32\).*\(8, 8\)"),
    ({}, {"context_channels": None}, r"\(8, 8\).*None"),
    ({"num_classes": 5}, {}, "num_classes is 5 .* 4"),
    ({"num_classes": None}, {}, "num_classes is None .* 4"),
    ({"in_channels": 1}, {}, "in_channels is 1 .* 3"),
    ({"patch_size": 1}, {}, "patch_size is 1 .* 2"),
]


@pytest.mark.parametrize(("encoder", "denoiser", "message"), MISMATCHED, ids=str)
def test_a_pair_that_does_not_fit_is_refused_with_both_values(make_networks, encoder, denoiser, message):
    encoder, denoiser = make_networks(encoder, denoiser)
    with pytest.raises(ValueError, match=message):
        DualRatePipeline(denoiser=denoiser, context_encoder=encoder, scheduler=DualRateScheduler())


@pytest.mark.parametrize("defaults", [{"num_inference_steps": 4, "num_context_steps": 5}, {"num_context_steps": 0}])
def test_defaults_that_do_not_fit_are_refused_when_the_pipeline_is_made(make_pipe, defaults):
    with pytest.raises(ValueError, match="num_context_steps must be between 1 and"):
        make_pipe(**defaults)


def test_sizes_are_those_the_levels_can_halve(make_pipe, make_networks):
    """Mutants: `2 **` made `2 *`, `- 1` dropped, the patch size left out."""
    levels = {"level_channels": [8] * 4, "level_types": ["res"] * 4, "level_blocks": [1] * 4, "context_channels": None}
    deep = DualRatePipeline(denoiser=make_networks(denoiser=levels)[1], scheduler=DualRateScheduler())
    deep.set_progress_bar_config(disable=True)
    assert drawn(deep, [0], steps=(1,), height=16, width=32).shape == (
        1,
        3,
        16,
        32,
    )  # patches of 2, halved three times
    with pytest.raises(ValueError, match="divisible by 16, got 24 and 16"):
        deep([0], height=24, width=16)
    pipe = make_pipe()
    assert drawn(pipe, [0], height=4, width=12).shape == (1, 3, 4, 12)  # patches of 2, halved once
    with pytest.raises(ValueError, match="divisible by 4, got 14 and 8"):
        pipe([0], height=14)


@pytest.mark.parametrize(
    ("size", "far"), [((8, 8), 0), ((16, 16), 0), ((4, 4), 0), ((20, 8), 1), ((8, 36), 1)], ids=str
)
def test_a_size_far_from_the_trained_one_is_drawn_and_told_of_once(make_pipe, size, far):
    """At more than twice or less than half the trained side, at the user's own line. Mutants: `>` made `>=`."""
    pipe = make_pipe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert drawn(pipe, [0], steps=(3, 1), height=size[0], width=size[1]).shape[2:] == size
    told = [warning for warning in caught if "trained at 8 and 8" in str(warning.message)]
    assert len(told) == far and all(f"are {size[0]} and {size[1]}," in str(warning.message) for warning in told)


def test_the_models_guidance_applies_only_where_there_are_classes(make_pipe, watch):
    pipe = make_pipe(guidance_scale=2.0)
    calls = watch(pipe)
    pipe(batch_size=1, num_inference_steps=2, output_type="latent")
    pipe([0], num_inference_steps=2, output_type="latent")
    assert [call.rows for call in calls.denoiser] == [1, 1, 2, 2]


def test_images_that_are_not_finite_are_said_to_be_so(make_pipe):
    pipe = make_pipe()
    next(pipe.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="The images hold NaN or infinity: see weights"):
        pipe(class_labels=[0], num_inference_steps=2, output_type="np")


# A student away from what it was distilled into


def test_a_late_student_warns_of_other_refreshes_and_not_of_its_own(make_pipe):
    """Mutant: only N compared where contexts begin late."""
    told = {"num_inference_steps": 4, "num_context_steps": 2, "context_from": 0.5, "context_free": True}
    pipe = make_pipe(is_distilled=True, **told)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        own = pipe.plan_run()
        assert own.num_steps_alone > 0
        pipe.plan_run(refresh_steps=[i for i, refreshes in enumerate(own) if refreshes])
    with pytest.warns(UserWarning, match="was not trained for this plan of N = 4, K = 1"):
        pipe.plan_run(num_context_steps=1)


@pytest.mark.parametrize("kind", ["a pair", "a single-rate model"])
def test_a_student_warns_when_it_is_sampled_otherwise_and_not_by_its_own_plan(make_pipe, tmp_path, kind):
    """Mutants: the comparison of plans left out; guidance; second-order steps; the flag lost in saving."""
    k = {"num_context_steps": 2} if kind == "a pair" else {}
    made = make_pipe(kind != "a pair", num_inference_steps=4, is_distilled=True, **k)
    made.save_pretrained(tmp_path)
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for own in ({}, {"num_inference_steps": 4, **k}, {"guidance_scale": 1.0}):
            pipe([0], generator=generator(), output_type="latent", **own)
    others = [({"num_inference_steps": 6}, "this plan of N = 6"), ({"guidance_scale": 2.0}, "guidance_scale=2.0")]
    if k:
        others += [
            ({"num_context_steps": 4}, "this plan of N = 4, K = 4"),
            ({"refresh_steps": [0, 1]}, "this plan of N = 4"),
        ]
    for other, said in others:
        with pytest.warns(UserWarning, match=f"was distilled for N = 4.* was not trained for {said}.*worse images"):
            pipe([0], generator=generator(), output_type="latent", **other)
    pipe.scheduler = DualRateScheduler.from_config(pipe.scheduler.config, second_order=True)
    with pytest.warns(UserWarning, match="not trained for the steps of this scheduler"):
        pipe([0], generator=generator(), output_type="latent")
