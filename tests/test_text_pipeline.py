"""Prompts: what a pipeline of text makes of them, with tiny real encoders of transformers."""

import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import make_text_encoder, make_tokenizer
from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.conditions import Text
from diffusers_dualrate.modular import DualRateBlocks
from diffusers_dualrate.text_encoding import TextEncoding

PROMPTS = ["a red apple", "two green fish"]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe, prompt=None, numbers=(1, 2), **options):
    return pipe(prompt, generator=seeds(*numbers), output_type="latent", **options).images


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_prompt_reaches_both_networks_and_is_encoded_and_projected_once_per_call(make_text_pipe, watch, kind):
    pipe = make_text_pipe(kind)
    encoded, projected = count_calls(pipe.text_encoder), count_calls(pipe.denoiser.text_projection)
    calls = watch(pipe)
    images = draw(pipe, PROMPTS, guidance_scale=2.0, num_context_steps=2)
    assert len(calls.denoiser) == 4 and len(calls.encoder) == 2 and len(encoded) == len(projected) == 1
    ids = encoded[0][0][0]
    vocabulary = pipe.tokenizer.get_vocab()
    words = [[vocabulary[word] for word in prompt.split()] + [1] for prompt in [*PROMPTS, ""]]
    assert ids.tolist() == [row + [0] * (6 - len(row)) for row in words]  # the empty prompt is encoded once for both
    text = projected[0][0][0]
    assert text.mask.sum(1).tolist() == [1, 1, 4, 4]  # null branch first
    assert not torch.allclose(images[0], draw(pipe, [PROMPTS[1]] * 2)[0], atol=1e-3)


def test_an_image_depends_on_its_own_prompt_and_seed_whatever_the_batch(make_text_pipe):
    pipe = make_text_pipe()
    options = {"guidance_scale": 2.0, "negative_prompt": "blue star"}
    both = draw(pipe, PROMPTS, (1, 2), **options)
    alone = draw(pipe, PROMPTS[1], (2,), **options)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    several = draw(pipe, PROMPTS, (0, 1, 2, 3), num_images_per_prompt=2, **options)
    torch.testing.assert_close(
        several[2:3], alone, atol=1e-5, rtol=1e-5
    )  # two of the first prompt, then of the second
    padded = draw(pipe, PROMPTS[1], (2,), max_sequence_length=4, **options)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_guidance_leads_from_the_negative_prompt_to_the_prompt_by_its_formula(make_text_pipe):
    """One step from noise without an encoder: v = v_null + s (v_prompt − v_null), each with its text alone."""
    pipe = make_text_pipe()
    noise = torch.randn(1, 3, 8, 8)
    text, mask, null, null_mask = pipe.encode_prompt("a red apple", negative_prompt="two fish")
    pipe.scheduler.set_timesteps(1)
    timestep = pipe.scheduler.timesteps[0]
    level = pipe.scheduler.log_snr(timestep)

    def velocity(condition):
        context = pipe.denoiser.project_context(pipe.context_encoder(noise, level, condition).context)
        return pipe.denoiser(noise, level, condition, context, level).sample

    with torch.no_grad():
        v_null, v = velocity(Text(null, null_mask)), velocity(Text(text, mask))
        expected = pipe.scheduler.step(v_null + 3 * (v - v_null), timestep, noise).prev_sample
    options = {"num_inference_steps": 1, "latents": noise, "guidance_scale": 3.0}
    torch.testing.assert_close(
        draw(pipe, "a red apple", (0,), negative_prompt="two fish", **options), expected, atol=1e-4, rtol=1e-4
    )
    swapped = draw(pipe, "two fish", (0,), negative_prompt="a red apple", **options)
    assert not torch.allclose(swapped, expected, atol=1e-2)


def test_embeddings_computed_once_draw_the_same_images_and_need_no_encoder(make_text_pipe):
    pipe = make_text_pipe()
    expected = draw(pipe, PROMPTS, guidance_scale=2.0)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    embeds = dict(zip(names, pipe.encode_prompt(PROMPTS), strict=True))
    bare = DualRatePipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(draw(bare, guidance_scale=2.0, **embeds), expected)
    own = {name: embeds[name] for name in names[:2]}  # the pipeline's encoder embeds the empty prompt
    torch.testing.assert_close(draw(pipe, guidance_scale=2.0, **own), expected, atol=1e-5, rtol=1e-5)
    again = dict(zip(names, pipe.encode_prompt(**embeds), strict=True))
    assert all(torch.equal(again[name], embeds[name]) for name in names)
    text, mask, null, null_mask = pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, num_images_per_prompt=2
    )
    assert torch.equal(text, embeds["prompt_embeds"].repeat_interleave(2, 0)) and null is null_mask is None


def test_embeddings_without_their_mask_warn_that_padding_counts(make_text_pipe):
    pipe = make_text_pipe()
    text, mask, *_ = pipe.encode_prompt(PROMPTS)
    with pytest.warns(UserWarning, match="without prompt_attention_mask, so all their tokens count, padding too"):
        draw(pipe, prompt_embeds=text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(pipe, prompt_embeds=text, prompt_attention_mask=mask)


def test_guidance_in_an_interval_gives_each_step_the_branches_it_needs(make_text_pipe, watch):
    pipe = make_text_pipe()
    calls = watch(pipe)
    draw(pipe, PROMPTS, guidance_scale=2.0, guidance_interval=(-3, 3), num_context_steps=4)
    assert {call.rows for call in calls.denoiser} == {2, 4}
    for call in calls.denoiser + calls.encoder:
        assert len(call.condition.embedding) == call.rows
        assert all(len(part) == call.rows for pairs in call.condition.keys_values for pair in pairs for part in pair)


def test_callbacks_see_and_replace_the_embeddings(make_text_pipe):
    pipe, seen = make_text_pipe(), []
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def exchange(_, i, t, tensors):
        seen.append(tensors)
        return {"prompt_embeds": other, "negative_prompt_embeds": null} if i == 1 else {}

    options = {"guidance_scale": 2.0, "callback_on_step_end_tensor_inputs": names}
    other, _, null, _ = pipe.encode_prompt([PROMPTS[1], PROMPTS[0]], negative_prompt="two fish")
    plain = draw(pipe, PROMPTS, guidance_scale=2.0)
    changed = draw(pipe, PROMPTS, callback_on_step_end=exchange, **options)
    assert torch.equal(seen[0]["prompt_embeds"], pipe.encode_prompt(PROMPTS)[0])
    assert seen[2]["prompt_embeds"] is other and seen[2]["negative_prompt_embeds"] is null
    assert not torch.allclose(changed, plain, atol=1e-3)

    def edit(own, i, t, tensors):
        if i == 1:
            tensors["prompt_embeds"].copy_(other), tensors["negative_prompt_embeds"].copy_(null)

    assert torch.equal(draw(pipe, PROMPTS, callback_on_step_end=edit, **options), changed)
    for name, value in (("negative_prompt_embeds", null), ("class_labels", torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=f"returned {name}, but there is none to replace"):
            draw(
                pipe,
                PROMPTS,
                callback_on_step_end=lambda *_, name=name, value=value: {name: value},
                guidance_scale=1.0,
            )

    def begin(own, i, t, tensors):
        own._guidance_scale = 3.0

    with pytest.raises(ValueError, match="guidance on in a call without a null branch"):
        draw(pipe, PROMPTS, callback_on_step_end=begin, guidance_scale=1.0)


def test_a_long_prompt_is_cut_with_a_warning_that_names_what_is_lost(make_text_pipe, monkeypatch, caplog):
    pipe = make_text_pipe()
    monkeypatch.setattr(logging.getLogger("diffusers_dualrate.text_encoding"), "propagate", True)
    long = draw(pipe, "a red apple with two green fish", (1,))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith("up to 6 tokens: ['green fish']")
    assert torch.equal(long, draw(pipe, "a red apple with two", (1,))) and len(caplog.records) == 1


GOOD = torch.ones(2, 6, 8)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "give either prompt or prompt_embeds, got neither"),
        ({"prompt": "a", "prompt_embeds": GOOD}, "got both"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ["a", 3]}, "got 3 in the list"),
        ({"prompt": 5}, "got a int"),
        ({"prompt": {"a"}}, "got a set"),
        ({"class_labels": 1}, "takes text: give prompt instead of class_labels"),
        ({"prompt": "a", "class_labels": 1}, "instead of class_labels"),
        ({"prompt": PROMPTS, "batch_size": 3}, "batch_size is 3, but there are 2 prompts"),
        ({"prompt": PROMPTS, "negative_prompt": ["a"]}, "one entry for each of 2 prompts, got 1"),
        ({"prompt": "a", "negative_prompt": 1}, "negative_prompt must be a string"),
        ({"prompt": "a", "negative_prompt": "a", "negative_prompt_embeds": GOOD}, "say the same"),
        ({"prompt_embeds": GOOD[0]}, r"shape \[any, any, 8\], got \[6, 8\]"),
        ({"prompt_embeds": GOOD[..., :7]}, r"shape \[any, any, 8\], got \[2, 6, 7\]"),
        ({"prompt_embeds": GOOD.long()}, "floating-point numbers .*got torch.int64"),
        ({"prompt_embeds": GOOD * float("nan")}, "finite"),
        ({"prompt_embeds": GOOD, "negative_prompt_embeds": GOOD[:1]}, r"shape \[2, 6, 8\], got \[1, 6, 8\]"),
        ({"prompt": "a", "negative_prompt_embeds": GOOD}, r"shape \[1, 6, 8\], got \[2, 6, 8\]"),
        (
            {"prompt_embeds": GOOD, "prompt_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"shape \[2, 6\], got \[2, 5\]",
        ),
        ({"prompt_embeds": GOOD, "prompt_attention_mask": torch.zeros(2, 6).long()}, "leaves one of them none"),
        (
            {"prompt_embeds": GOOD, "prompt_attention_mask": torch.zeros(2, 6)},
            "booleans or integers, got torch.float32",
        ),
        ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 6).bool()}, "belongs to prompt_embeds"),
        (
            {"prompt": "a", "negative_prompt_attention_mask": torch.ones(1, 6).bool()},
            "belongs to negative_prompt_embeds",
        ),
        ({"prompt_embeds": GOOD, "max_sequence_length": 6}, "max_sequence_length belongs to prompt,"),
        ({"prompt_embeds": GOOD.repeat(1, 2, 1), "guidance_scale": 2.0}, "have 12 tokens, .* in at most 6"),
        ({"prompt": "a", "max_sequence_length": 7}, "max_sequence_length .*got 7"),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length .*got 0"),
    ],
)
def test_a_bad_prompt_is_refused_in_a_sentence_before_anything_runs(make_text_pipe, watch, arguments, said):
    pipe = make_text_pipe()
    calls, encoded = watch(pipe), count_calls(pipe.text_encoder)
    with pytest.raises(ValueError, match=said):
        pipe(**arguments)
    assert not calls.denoiser and not encoded


def test_models_without_text_refuse_it_and_pipelines_what_does_not_fit(make_pipe, make_text_pipe, make_networks):
    for pipe, arguments, said in (
        (
            make_pipe(),
            {"class_labels": 1, "negative_prompt": "a"},
            "takes class_labels, and no text: leave negative_prompt",
        ),
        (make_pipe(), {"prompt": "a"}, "Unknown class name 'a'"),
        (make_pipe(num_classes=None), {"prompt": "a"}, "unconditional"),
        (make_text_pipe(text_encoder=None, tokenizer=None), {"prompt": "a"}, "no text_encoder"),
        (
            make_text_pipe(text_encoder=None, tokenizer=None),
            {"prompt_embeds": GOOD, "guidance_scale": 2.0},
            "needs negative",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(**arguments)
    with pytest.raises(ValueError, match="takes no prompts"):
        make_pipe().encode_prompt("a")
    for options, said in (
        ({"tokenizer": None}, "go together, and tokenizer is None"),
        ({"text_encoder": torch.nn.Linear(1, 1)}, "one of transformers, such as CLIPTextModel, got Linear"),
        ({"tokenizer": 3}, "tokenizer must be one of transformers, got int"),
        (
            {"text_encoder": make_text_encoder(width=4)},
            "hands out 4 channels a token, and the networks take text of 8",
        ),
        ({"networks": {"cross_attention_dim": None}}, "hands out 8 channels a token, and the networks take no text"),
    ):
        with pytest.raises(ValueError, match=said):
            make_text_pipe(**options)
    with pytest.raises(ValueError, match="cross_attention_dim is 8 in the encoder and None"):
        make_text_pipe(text_encoder=None, tokenizer=None, networks={"denoiser": {"cross_attention_dim": None}})


def test_a_model_of_text_is_saved_and_loaded_with_its_encoder_and_tokenizer(make_text_pipe, tmp_path):
    pipe = make_text_pipe("t5", guidance_scale=2.0)
    expected = draw(pipe, PROMPTS)
    pipe.save_pretrained(tmp_path)
    loaded = DualRatePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.text_encoder) is type(pipe.text_encoder) and loaded.config.guidance_scale == 2.0
    assert torch.equal(draw(loaded, PROMPTS), expected)
    blocks = DualRateBlocks().init_pipeline(str(tmp_path))
    blocks.load_components()
    text, mask, null, null_mask = pipe.encode_prompt(["a star", "red bird"], negative_prompt="two fish")
    own = {"prompt_embeds": text, "prompt_attention_mask": mask}
    negative = {"negative_prompt_embeds": null, "negative_prompt_attention_mask": null_mask}
    for call in (
        {"prompt": PROMPTS},
        {"prompt": PROMPTS, **negative},
        {"prompt": PROMPTS, "guidance_scale": 1.0},
        {**own, "guidance_scale": 2.0},
        {**own, "negative_prompt": "two fish"},
    ):
        encoded = count_calls(blocks.text_encoder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            state = blocks(**call, generator=seeds(1, 2))
        assert len(encoded) == 1
        if "guidance_scale" in call and "prompt" in call:
            assert len(encoded[0][0][0]) == 2  # not the empty prompt, too
        assert torch.equal(state.get("latents"), draw(pipe, **call))


def test_a_model_stored_in_half_precision_loads_whole_in_single_precision_unless_told(make_text_pipe, tmp_path):
    """Kills: the text encoder left as it is stored, which is what transformers does of itself."""
    make_text_pipe().to(torch.float16).save_pretrained(tmp_path)
    for options, dtype in (({}, torch.float32), ({"dtype": torch.float16}, torch.float16)):
        pipe = DualRatePipeline.from_pretrained(tmp_path, **options)
        assert {pipe.text_encoder.dtype, pipe.denoiser.dtype, pipe.context_encoder.dtype} == {dtype}


def test_prompts_of_several_threads_are_encoded_as_each_is_alone():
    encoding = TextEncoding(make_text_encoder(), make_tokenizer())
    jobs = [(["a red apple with two green fish", "a"], 6), (["two fish"], 3), (["a star"], 5)] * 60
    alone = [encoding.encode(*job, "cpu") for job in jobs[:3]] * 60
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda job: encoding.encode(*job, "cpu"), jobs))
    finally:
        sys.setswitchinterval(interval)
    for text, expected in zip(texts, alone, strict=True):
        assert torch.equal(text.tokens, expected.tokens) and torch.equal(text.mask, expected.mask)


def test_a_text_without_a_token_draws_finite_images(make_text_pipe):
    pipe = make_text_pipe()
    pipe.tokenizer = make_tokenizer(ends=False)
    assert not pipe.tokenizer("").input_ids
    assert draw(pipe, PROMPTS, guidance_scale=2.0).isfinite().all()
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    embeds = dict(zip(names, pipe.encode_prompt(PROMPTS), strict=True))
    assert not embeds["negative_prompt_attention_mask"].any()
    torch.testing.assert_close(
        draw(pipe, None, guidance_scale=2.0, **embeds), draw(pipe, PROMPTS, guidance_scale=2.0), rtol=0, atol=1e-4
    )
