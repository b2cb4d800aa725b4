"""Networks of diffusers that take text: the images of their own pipelines, and their maps as context."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

import distill
from conftest import fill_with_noise, make_text_encoder, make_tokenizer
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.captions import CaptionEmbeddings
from diffusers_dualrate.conditions import Text
from diffusers_dualrate.configuration import Start
from diffusers_dualrate.flops import network_flops
from diffusers_dualrate.hosts import HostNetwork
from diffusers_dualrate.inventory import draw_caption
from diffusers_dualrate.light import shape_light
from diffusers_dualrate.metrics import measure_v_loss
from diffusers_dualrate.noise_process import NoiseProcess
from diffusers_dualrate.sources import open_captions
from diffusers_dualrate.text_encoding import TextEncoding

PROMPTS, NEGATIVE = ["a red apple", "two fish"], "blue bird"
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 4}


def make_unet():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    shape = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return fill_with_noise(UNet2DConditionModel(**blocks, **shape, cross_attention_dim=8, attention_head_dim=4), 0)


def make_pixart():
    shape = {"sample_size": 8, "num_layers": 2, "in_channels": 4, "out_channels": 8, "norm_num_groups": 4}
    network = PixArtTransformer2DModel(**shape, **ATTENTION, cross_attention_dim=8, caption_channels=8)
    return fill_with_noise(network, 0)


def make_vae():
    blocks = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**blocks, **kinds, latent_channels=4, sample_size=64).eval()


class Captioned:
    """Two images with one caption."""

    has_captions, num_classes = True, None

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"pixel_values": torch.ones(4, 8, 8), "caption": draw_caption(["two fish"], 0, *index)}


def make_theirs(name):
    # The last timestep is not noise alone, so that the prediction of noise tells all.
    parts = {"vae": make_vae(), "tokenizer": make_tokenizer(), "scheduler": DDIMScheduler(clip_sample=False)}
    if name != "stable diffusion":
        kind = PixArtSigmaPipeline if name == "pixart sigma" else PixArtAlphaPipeline
        return kind(text_encoder=make_text_encoder("t5"), transformer=make_pixart(), **parts)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(text_encoder=make_text_encoder(), unet=make_unet(), **parts, **options)


@pytest.mark.parametrize(("name", "length"), [("stable diffusion", 77), ("pixart alpha", 120), ("pixart sigma", 300)])
def test_a_pipeline_of_text_draws_the_same_images_here(name, length, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = DualRatePipeline.from_pretrained(tmp_path)
    is_pixart = name.startswith("pixart")
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    noise, options = (
        torch.randn(2, 4, 8, 8),
        {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"},
    )
    sizes = {"height": 64, "width": 64} | ({"use_resolution_binning": False} if is_pixart else {})
    given = {"max_sequence_length": 6} if is_pixart else {}
    negative = NEGATIVE if is_pixart else [NEGATIVE] * 2
    prompts = [PROMPTS[0].title() + " ", PROMPTS[1]]  # which PixArt learned to read in lower case
    expected = theirs(prompts, negative_prompt=negative, latents=noise.clone(), **options, **sizes, **given).images
    drawn = ours(prompts, negative_prompt=NEGATIVE, latents=noise, **options).images
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(ours(prompts[::-1], latents=noise, **options).images, drawn, atol=0.05)
    assert network_flops(ours.denoiser) > 0
    ours.denoiser.save_pretrained(tmp_path / "alone")
    assert HostNetwork.from_pretrained(tmp_path / "alone").config.text_length == length
    assert str(tmp_path) not in (tmp_path / "alone" / "config.json").read_text()


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_it_does_so_under_other_schedulers(kind, tmp_path):
    theirs = make_theirs("stable diffusion")
    theirs.scheduler = kind()
    theirs.save_pretrained(tmp_path)
    ours = DualRatePipeline.from_pretrained(tmp_path)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS[0], generator=torch.Generator().manual_seed(0), height=64, width=64, **options).images
    drawn = ours(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images
    assert (drawn - expected).abs().max() < 1e-3 * expected.std()


def test_a_scheduler_that_extrapolates_noise_is_replaced_with_a_word_on_it(tmp_path):
    """PNDM works on what the network predicts. Of velocities it would be a method of first order."""
    theirs = make_theirs("stable diffusion")
    theirs.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="is sampled by DPMSolverMultistepScheduler: its PNDMScheduler extrapolates"
    ) as warned:
        ours = DualRatePipeline.from_pretrained(tmp_path)
    assert [warning.filename for warning in warned if "PNDM" in str(warning.message)] == [__file__]
    saved = PNDMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(saved.config)
    noise, options = (
        torch.randn(1, 4, 8, 8),
        {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"},
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS[0], latents=noise.clone(), height=64, width=64, **options).images
    torch.testing.assert_close(ours(PROMPTS[0], latents=noise, **options).images, expected, atol=2e-3, rtol=2e-3)


def test_a_heavy_network_of_text_guides_a_light_one(tmp_path):
    encoder = HostNetwork(make_unet(), NoiseProcess(), prediction_hand_over=True)
    shape = {"sample_size": 8, "in_channels": 4, "level_channels": (8, 16), "level_types": ("res", "transformer")}
    text = {"cross_attention_dim": 8, "text_length": 6, "text_is_masked": False, "attends_to_text": False}
    denoiser = UViTDenoiser(
        **shape, **text, level_blocks=(1, 1), attention_head_dim=8, embedding_dim=16,
        context_channels=encoder.context_channels, prediction_hand_over=True,
    )  # fmt: skip
    parts = {"text_encoder": make_text_encoder(), "tokenizer": make_tokenizer(), "num_inference_steps": 4}
    pipe = DualRatePipeline(fill_with_noise(denoiser, 1), DualRateScheduler(), encoder, num_context_steps=2, **parts)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "output_type": "latent"}
    images = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images
    pipe.save_pretrained(tmp_path)
    loaded = DualRatePipeline.from_pretrained(tmp_path)
    again = loaded(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(again, images) and images.isfinite().all()
    ids = loaded.tokenizer(["two fish"], padding="max_length", max_length=6, return_tensors="pt").input_ids
    tokens = loaded.text_encoder(ids).last_hidden_state  # the heavy network learned from texts without a mask
    torch.testing.assert_close(loaded.encode_prompt("two fish")[0], tokens)
    images = SimpleNamespace(has_captions=True)
    captions = open_captions(SimpleNamespace(start=Start()), images, loaded)
    torch.testing.assert_close(captions.embed(["two fish"], "cpu").tokens, tokens)
    masks = []
    told = loaded.text_encoder.register_forward_pre_hook(
        lambda module, inputs, options: masks.append(options.get("attention_mask")), with_kwargs=True
    )
    assert measure_v_loss(loaded, Captioned(), 2, None, 2, Accelerator(cpu=True)) > 0 and masks == [None]
    told.remove()
    loaded.text_encoder = loaded.tokenizer = None
    with pytest.raises(ValueError, match="The model has no text_encoder"):
        measure_v_loss(loaded, Captioned(), 2, None, 2, Accelerator(cpu=True))


def test_a_light_network_is_shaped_with_the_text_that_it_will_attend_to():
    """Mutant: it is shaped without text, whose keys and values cost FLOPs, too."""
    encoder = HostNetwork(make_unet(), NoiseProcess(), prediction_hand_over=True)
    shape = shape_light(encoder)
    assert (shape["cross_attention_dim"], shape["text_length"], shape["text_is_masked"]) == (8, 77, False)
    assert 1 / 6 <= network_flops(UViTDenoiser(**shape)) / network_flops(encoder) <= 1 / 4


def test_captions_are_at_most_as_long_as_their_encoder_takes():
    """As prompts are. Of Stable Diffusion v-loss failed where the tokenizer takes fewer tokens than the network."""
    encoding = TextEncoding(make_text_encoder(), make_tokenizer())
    assert CaptionEmbeddings(encoding, 77).embed(["two fish"], "cpu").tokens.shape[1] == encoding.most_tokens < 77


def test_a_student_reads_prompts_by_the_rules_of_its_teacher(tmp_path):
    """PixArt learned texts in lower case; a student trained before, on texts as they are, is distilled under it."""
    teacher = make_theirs("pixart alpha")
    teacher.save_pretrained(tmp_path / "teacher")
    shape = {"sample_size": 8, "in_channels": 4, "level_channels": (8, 16), "level_types": ("res", "transformer")}
    shape |= {"level_blocks": (1, 1), "attention_head_dim": 8, "embedding_dim": 16, "cross_attention_dim": 8}
    denoiser = fill_with_noise(UViTDenoiser(**shape, context_channels=(8, 16), text_length=6), 1)
    encoder = fill_with_noise(UViTContextEncoder(**shape, text_length=6), 2)
    scheduler = DualRateScheduler(log_snr_min=-4.0, log_snr_max=6.0, clip_sample=False)
    parts = {"vae": teacher.vae, "text_encoder": teacher.text_encoder, "tokenizer": teacher.tokenizer}
    before = DualRatePipeline(denoiser, scheduler, encoder, num_inference_steps=4, **parts)
    before.save_pretrained(tmp_path / "student")
    (tmp_path / "prompts.txt").write_text("A Red Apple \ntwo fish\n")
    flags = ["--teacher", "teacher", "--student", "student", "--prompt_list", "prompts.txt", "--output_dir", "run"]
    flags = [str(tmp_path / word) if not word.startswith("--") else word for word in flags]
    options = [
        "--override",
        "distillation.min_variance_share=0",
        "--preset",
        "tiny",
        "--full_rollout",
        "--max_train_steps",
        "2",
        "--validation_steps",
        "0",
    ]
    assert distill.main(distill.parse_args([*flags, *options])) == 0
    student, taught = (DualRatePipeline.from_pretrained(tmp_path / name) for name in ("run", "teacher"))
    theirs, mask, *_ = taught.encode_prompt("A Red Apple ", max_sequence_length=6)
    for prompt in ("A Red Apple ", "a red apple"):
        ours, own_mask, *_ = student.encode_prompt(prompt, max_sequence_length=6)
        assert torch.equal(ours[own_mask], theirs[mask])
    assert not torch.equal(before.encode_prompt("A Red Apple ")[0], before.encode_prompt("a red apple")[0])
    # At most as many tokens as the tokenizer makes; PixArt itself would take 120.
    assert student.denoiser.config.text_length == 6 and student.context_encoder.config.text_is_lowered
    unmasked = SimpleNamespace(config={"text_is_masked": False, "text_is_lowered": False})
    assert not TextEncoding.of(parts["text_encoder"], parts["tokenizer"], None, unmasked).is_masked


def test_a_flow_of_sd3_gives_the_velocity_of_its_own_prediction():
    """Its flow u = ε − x at (1 − s) x + s ε; from x = z_s − s u and ε = z_s + (1 − s) u follows v = α ε − σ x."""
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "caption_projection_dim": 8}
    widths = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "out_channels": 4, "pos_embed_max_size": 8}
    network = fill_with_noise(SD3Transformer2DModel(**shape, **widths, **ATTENTION), 0)
    host = HostNetwork(network, NoiseProcess.of(FlowMatchEulerDiscreteScheduler()))
    text = Text(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 6))
    s, z_s = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8)
    norm = (s**2 + (1 - s) ** 2).sqrt()[:, None, None, None]
    alpha, sigma = ((1 - s) / norm[:, 0, 0, 0])[:, None, None, None], (s / norm[:, 0, 0, 0])[:, None, None, None]
    with torch.no_grad():
        u = network(z_s, text.tokens, text.pooled, 1000 * s).sample
        v = host(z_s / norm, 2 * torch.log((1 - s) / s), text).sample
    share = s[:, None, None, None]
    x, eps = z_s - share * u, z_s + (1 - share) * u
    torch.testing.assert_close(v, alpha * eps - sigma * x, atol=1e-4, rtol=1e-4)
    described = host.describe()
    other = HostNetwork.from_description(described | {"text_length": 2 * described.pop("text_length")})
    assert HostNetwork.from_description(described).config.text_length  # as it was once described
    assert other.config.text_length == 2 * host.config.text_length and network_flops(other) > network_flops(host) > 0
    with pytest.raises(ValueError, match="pooled"):
        host(z_s, 0.0, text._replace(pooled=None))


def make_sd3_pipe():
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "caption_projection_dim": 8}
    widths = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "out_channels": 4, "pos_embed_max_size": 8}
    network = fill_with_noise(SD3Transformer2DModel(**shape, **widths, **ATTENTION), 0)
    host = HostNetwork(network, NoiseProcess.of(FlowMatchEulerDiscreteScheduler()))
    scheduler = DualRateScheduler(log_snr_min=-6.0, log_snr_max=6.0, clip_sample=False)
    parts = {"text_encoder": make_text_encoder(), "tokenizer": make_tokenizer()}
    return DualRatePipeline(host, scheduler, **parts, num_inference_steps=1, guidance_scale=1.0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_network_that_takes_pooled_embeddings_draws_from_embeddings(scale):
    """One step from noise: x = α z − σ v, with v guided. Kills: the pooled of a branch lost, swapped or not repeated."""
    pipe = make_sd3_pipe()
    pipe.set_progress_bar_config(disable=True)
    z, (tokens, nothing) = torch.randn(4, 4, 8, 8), torch.randn(2, 2, 5, 8)
    pooled, pooled_nothing = torch.randn(2, 2, 6)
    asked = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "guidance_scale": scale}
    if scale > 1:
        asked |= {"negative_prompt_embeds": nothing, "negative_pooled_prompt_embeds": pooled_nothing}
    drawn = pipe(**asked, latents=z, num_images_per_prompt=2, output_type="latent").images
    level, mask = torch.tensor(-6.0), torch.ones(4, 5, dtype=torch.bool)

    def predict(tokens, pooled):
        text = Text(tokens.repeat_interleave(2, 0), mask, pooled.repeat_interleave(2, 0))
        with torch.no_grad():
            return pipe.denoiser(z, level, text).sample

    v = null = predict(nothing, pooled_nothing)
    v = null + scale * (predict(tokens, pooled) - null)
    expected = torch.sigmoid(level).sqrt() * z - torch.sigmoid(-level).sqrt() * v
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": "a red apple"}, "takes texts with pooled embeddings: give prompt_embeds and pooled_prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 5, 8)}, "takes pooled embeddings, too: give pooled_prompt_embeds beside prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 5, 8), "pooled_prompt_embeds": torch.zeros(2, 6)}, r"shape \[1, 6\], got \[2, 6\]"),
        ({"prompt_embeds": torch.zeros(1, 5, 8), "pooled_prompt_embeds": torch.full((1, 6), torch.nan)}, "pooled_prompt_embeds must be finite"),
        ({"prompt_embeds": torch.zeros(1, 5, 8), "pooled_prompt_embeds": torch.zeros(1, 6), "guidance_scale": 2.0}, "negative_prompt_embeds"),
    ],
)  # fmt: skip
def test_what_a_network_that_takes_pooled_embeddings_must_be_given_is_said(asked, message):
    with pytest.raises(ValueError, match=message):
        make_sd3_pipe()(**asked)


def test_a_network_without_pooled_embeddings_takes_none(make_text_pipe):
    with pytest.raises(ValueError, match="takes no pooled embeddings: leave pooled_prompt_embeds out"):
        make_text_pipe()(prompt_embeds=torch.zeros(1, 5, 8), pooled_prompt_embeds=torch.zeros(1, 6))


def test_what_a_network_of_text_cannot_do_is_said():
    with pytest.raises(ValueError, match="takes text: give a Text"):
        HostNetwork(make_unet(), NoiseProcess())(torch.randn(1, 4, 8, 8), 0.0)
    unet = make_unet()
    unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(ValueError, match="addition_embed_type='text_time' takes more than a text"):
        HostNetwork(unet, NoiseProcess())
