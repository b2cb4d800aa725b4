"""Networks of diffusers as they are: the same images as their own pipelines, feature maps, saved in their own format."""

import copy
import json
import threading

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    TaylorSeerCacheConfig,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dualrate import (
    DualRatePipeline,
    DualRateScheduler,
    HostNetwork,
    NoiseProcess,
    UViTDenoiser,
    diffusion,
)
from diffusers_dualrate.flops import count_evaluations, network_flops
from diffusers_dualrate.modular import DualRateBlocks

LEVELS = [-9.0, -3.0, 0.0, 2.5, 8.0]


def make_unet(seed=0, **options):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    shape = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return UNet2DModel(**{**shape, **blocks, **options}).eval()


def make_dit(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    dit = DiTTransformer2DModel(
        **{**shape, "in_channels": 4, "num_embeds_ada_norm": 3, "norm_num_groups": 4, **options}
    )
    for weight in dit.parameters():  # the host starts some of them at zero
        nn.init.normal_(weight, std=0.1)
    return dit.eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("log_snr", LEVELS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_what_a_network_predicts_becomes_the_velocity_of_its_image_and_noise(prediction_type, log_snr):
    """v = α ε − σ x. Mutants: a sign, α and σ exchanged, c left out, in `velocity` or `scale`."""
    x, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    level = torch.tensor(log_snr, dtype=torch.float64)
    z, v = diffusion.add_noise(x, eps, level), diffusion.v_from_x_eps(x, eps, level)
    outputs = {"epsilon": eps, "v_prediction": v, "sample": x, "flow": eps - x}
    process = NoiseProcess(prediction_type=prediction_type)
    torch.testing.assert_close(process.velocity(outputs[prediction_type], z, level), v)
    if prediction_type == "flow":
        s = process.timestep(level) / 1000
        torch.testing.assert_close(2 * torch.log((1 - s) / s), level)
        torch.testing.assert_close(process.scale(level) * z, (1 - s) * x + s * eps)
    else:
        assert process.scale(level) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 50}],
)
def test_a_log_snr_has_the_timestep_of_the_table_or_one_between_two(options):
    """Mutants: `later` one less or more, `high` and `low` exchanged, no clamp."""
    scheduler = DDPMScheduler(**options)
    process = NoiseProcess.of(scheduler)
    levels = torch.logit(scheduler.alphas_cumprod.double()).float()
    timesteps = torch.arange(len(levels)).float()
    assert torch.equal(process.timestep(levels), timesteps)
    between = process.timestep((0.25 * levels[1:] + 0.75 * levels[:-1])[:-1])
    torch.testing.assert_close(between, timesteps[:-2] + 0.25, rtol=0, atol=5e-3)
    assert process.timestep(torch.tensor([levels[0] + 5, levels[-1] - 5])).tolist() == [0, len(levels) - 1]


def test_a_table_that_ends_in_noise_alone_ends_at_its_last_timestep():
    process = NoiseProcess(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert process.log_snrs.isfinite().all()
    assert process.timestep(torch.tensor([-80.0])) == 999
    assert 998 <= process.timestep(process.log_snrs[998:999] - 0.1) < 999
    with pytest.raises(ValueError, match="predicts noise says nothing of an image in noise alone"):
        NoiseProcess.of(DDPMScheduler(rescale_betas_zero_snr=True))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(prediction_type="flow_prediction"), "prediction_type must be one of 'epsilon'"),
        (DualRateScheduler(), None),
        (FlowMatchEulerDiscreteScheduler(), None),
    ],
    ids=["unknown", "ours", "flow"],
)
def test_a_scheduler_says_the_process_or_is_refused(scheduler, message):
    if message:
        with pytest.raises(ValueError, match=message):
            NoiseProcess.of(scheduler)
    else:
        process = NoiseProcess.of(scheduler)
        assert (process.log_snrs is None) == isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        if process.log_snrs is not None:
            expected = torch.logit(scheduler.alphas_cumprod.double()).float()
            torch.testing.assert_close(process.log_snrs, expected, atol=0.01, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("options", [{}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_a_unet_samples_what_its_own_pipeline_samples(prediction_type, options, tmp_path):
    own = DDIMPipeline(make_unet(), DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **options))
    own.set_progress_bar_config(disable=True)
    own.save_pretrained(tmp_path)
    ours = DualRatePipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    expected = own(2, generator(), num_inference_steps=8, output_type="np").images
    images = ours(batch_size=2, num_inference_steps=8, generator=generator(), output_type="np").images
    assert abs(images - expected).max() < 1e-5 and expected.std() > 0.05


def test_a_ddpm_pipeline_samples_its_own_images_with_its_own_noise(tmp_path):
    """Also clipped, and with the thousand steps that its pipeline takes by default, here fifty."""
    own = DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction"))
    own.set_progress_bar_config(disable=True)
    own.save_pretrained(tmp_path)
    ours = DualRatePipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert ours.config.num_inference_steps == 50
    expected = own(2, generator(), num_inference_steps=50, output_type="np").images
    images = ours(batch_size=2, generator=generator(), output_type="np").images
    assert abs(images - expected).max() < 1e-5


def test_a_scheduler_given_for_a_pipeline_of_diffusers_samples_it_and_does_not_say_how_it_was_trained(tmp_path):
    """Mutants: the process of the given scheduler, whose betas or prediction are others."""
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    expected = NoiseProcess.of(DDPMScheduler()).config
    for scheduler in (
        DualRateScheduler(),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    ):
        ours = DualRatePipeline.from_pretrained(tmp_path, scheduler=scheduler)
        assert dict(ours.denoiser.process.config) == dict(expected)
        assert type(ours.scheduler) is type(scheduler)
        assert ours.scheduler.config.get("beta_schedule") == scheduler.config.get("beta_schedule")


def test_defaults_given_for_a_pipeline_of_diffusers_are_taken(tmp_path):
    DDPMPipeline(make_unet(num_class_embeds=3), DDPMScheduler()).save_pretrained(tmp_path)
    given = {"num_inference_steps": 7, "guidance_scale": 2.0, "id2label": {0: "a", 1: "b"}}
    ours = DualRatePipeline.from_pretrained(tmp_path, **given)
    assert (ours.config.num_inference_steps, ours.config.guidance_scale) == (7, 2.0)
    assert ours.id2label == given["id2label"]
    with pytest.raises(ValueError, match="is a pipeline of diffusers, loaded as it is: give no context_encoder"):
        DualRatePipeline.from_pretrained(tmp_path, context_encoder=make_unet())


def test_a_pipeline_of_diffusers_is_loaded_by_its_name_on_the_hub(tmp_path):
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "models--you--ddim/snapshots" / ("a" * 40))
    (tmp_path / "models--you--ddim/refs").mkdir()
    (tmp_path / "models--you--ddim/refs/main").write_text("a" * 40)
    ours = DualRatePipeline.from_pretrained("you/ddim", cache_dir=tmp_path)
    assert isinstance(ours.denoiser, HostNetwork) and ours.config.num_inference_steps == 50


def test_another_pipeline_of_diffusers_is_named(tmp_path):
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "PNDMPipeline"}))
    with pytest.raises(
        ValueError, match="is of a PNDMPipeline; .* can be loaded: DDPMPipeline, DDIMPipeline, DiTPipeline"
    ):
        DualRatePipeline.from_pretrained(tmp_path)


def test_a_transformer_with_variances_predicts_as_it_does_itself_and_its_tokens_are_a_map():
    dit = make_dit(out_channels=8)
    scheduler = DDIMScheduler()
    host = HostNetwork(dit, NoiseProcess.of(scheduler))
    z, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 3])
    level = torch.logit(scheduler.alphas_cumprod[300].double()).float()
    seen = []
    handle = dit.transformer_blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        output = host(z, level, labels)
        alpha, sigma = diffusion.alpha_sigma(level)
        eps = dit(z, timestep=torch.tensor([300, 300]), class_labels=labels).sample[:, :4]
        none = host(z, level).sample
        assert torch.equal(none, host(z, level, torch.tensor([3, 3])).sample)
    handle.remove()
    torch.testing.assert_close(output.sample, (eps - sigma * z) / alpha)
    (tokens,) = output.context
    assert tokens.shape == (2, 16, 4, 4)
    assert torch.equal(tokens[:, :, 2, 3], seen[0][:, 2 * 4 + 3])
    assert host.context_shapes == [(16, 4, 4)] and host.context_channels == (16,)
    assert not torch.equal(none, output.sample)


def test_a_transformer_that_is_trained_draws_the_classes_that_it_is_told():
    """Dropping labels is the training's own, and once for the whole network."""
    host = HostNetwork(make_dit(), NoiseProcess())
    z, level, labels = torch.randn(64, 4, 8, 8), torch.zeros(64), torch.arange(64) % 3
    with torch.no_grad():
        assert torch.equal(host.train()(z, level, labels).sample, host.eval()(z, level, labels).sample)


def test_feature_maps_are_the_outputs_of_the_taps_also_of_a_copy_and_of_half_precision():
    unet = make_unet()
    host = HostNetwork(unet, NoiseProcess())
    assert host.taps == ("up_blocks.1.resnets.1", "up_blocks.0.attentions.1")
    assert host.context_shapes == [(8, 8, 8), (16, 4, 4)] and host.stride == 2
    seen = {}
    for tap in host.taps:
        unet.get_submodule(tap).register_forward_hook(
            lambda module, inputs, output, tap=tap: seen.update({tap: output})
        )
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        context = host(z, 0.5).context
        copied = copy.deepcopy(host)(z, 0.5).context
    assert all(torch.equal(part, seen[tap]) for part, tap in zip(context, host.taps, strict=True))
    assert all(torch.equal(part, other) for part, other in zip(context, copied, strict=True))
    half = copy.deepcopy(host).to(torch.bfloat16)
    assert [part.dtype for part in half(z.bfloat16(), 0.5).context] == [torch.bfloat16] * 2
    assert half(z.bfloat16(), 0.5).sample.dtype == torch.bfloat16


def test_a_compiled_network_gives_the_same_maps_in_one_graph():
    host = HostNetwork(make_unet(), NoiseProcess())
    z, level = torch.randn(2, 3, 8, 8), torch.tensor(0.5)
    with torch.no_grad():
        expected = host(z, level)
        host.compile(fullgraph=True, backend="eager")
        found = host(z, level)
    torch.testing.assert_close(found.sample, expected.sample)
    for part, other in zip(found.context, expected.context, strict=True):
        torch.testing.assert_close(part, other)


def test_two_calls_at_once_have_their_own_maps():
    host = HostNetwork(make_unet(), NoiseProcess())
    z = [torch.randn(1, 3, 8, 8, generator=generator(seed)) for seed in range(4)]
    with torch.no_grad():
        expected, found = [host(each, 0.0).context for each in z], [None] * 4

        def call(i):
            with torch.no_grad():
                for _ in range(10):
                    found[i] = host(z[i], 0.0).context

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_saved_network_is_one_of_its_own_class_and_loads_with_its_process_and_taps(tmp_path):
    host = HostNetwork(
        make_unet(), NoiseProcess(prediction_type="sample", beta_schedule="squaredcos_cap_v2"), ["mid_block"], True
    )
    host.save_pretrained(tmp_path)
    loaded, z = HostNetwork.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 8, 8)
    assert loaded.taps == ("mid_block",) and loaded.config.prediction_hand_over
    assert torch.equal(loaded.process.log_snrs, host.process.log_snrs)
    with torch.no_grad():
        torch.testing.assert_close(loaded(z, 1.0).sample, host(z, 1.0).sample)
        own = UNet2DModel.from_pretrained(tmp_path)
        torch.testing.assert_close(own(z, 10).sample, host.network(z, 10).sample)


def make_vae(seed=2, **options):
    torch.manual_seed(seed)
    shape = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.5}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**{**shape, **blocks, **options}).eval()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_transformer_in_latents_draws_the_images_of_its_own_pipeline(tmp_path, guidance_scale):
    """With guidance against its null class, variances left aside, decoding, and the names of its classes.

    The host's null class is number 1000, so its network has a thousand.
    """
    dit, scheduler = make_dit(out_channels=8, num_embeds_ada_norm=1000), DDIMScheduler(clip_sample=False)
    own = DiTPipeline(dit, make_vae(), scheduler, id2label={0: "owl", 7: "cat, kitten"})
    own.set_progress_bar_config(disable=True)
    own.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "owl", "7": "cat, kitten"}}))
    ours = DualRatePipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert ours.config.num_inference_steps == 50 and ours.config.guidance_scale == 4.0
    options = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    expected = own([0, 7], generator=generator(), output_type="np", **options).images
    images = ours(["owl", "cat, kitten"], generator=generator(), output_type="np", **options).images
    assert images.shape == expected.shape == (2, 16, 16, 3)
    assert abs(images - expected).max() < 1e-5 and expected.std() > 0.01


def make_latent_pipe(vae=None, **options):
    denoiser = UViTDenoiser(
        sample_size=8, in_channels=4, level_channels=(16, 32), level_types=("res", "res"), level_blocks=(1, 1),
        embedding_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    scheduler = DualRateScheduler(clip_sample=options.pop("clip_sample", False))
    return DualRatePipeline(denoiser, scheduler, vae=vae or make_vae(), num_inference_steps=2, **options)


@pytest.mark.parametrize("shift_factor", [None, 0.25])
def test_latents_are_decoded_with_the_factors_of_their_autoencoder_and_sizes_are_pixels(tmp_path, shift_factor):
    pipe = make_latent_pipe(make_vae(shift_factor=shift_factor))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(generator=generator(), output_type="latent").images
    images = pipe(generator=generator(), output_type="pt").images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.5 + (shift_factor or 0)).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert latents.shape == (1, 4, 8, 8) and images.shape == (1, 3, 16, 16)
    assert pipe(generator=generator(), height=24, width=16, output_type="pt").images.shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match="divisible by 4, got 18 and 16"):
        pipe(height=18)
    pipe.save_pretrained(tmp_path)
    loaded = DualRatePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(generator=generator(), output_type="pt").images, images)
    again = DualRatePipeline(**pipe.components, **pipe.parameters)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again(generator=generator(), output_type="pt").images, images)
    modular = DualRateBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    torch.testing.assert_close(modular(generator=generator(), output_type="pt", output="images"), images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_latent_pipe(make_vae(latent_channels=3)), "latents of 3 channels, and the networks take 4"),
        (lambda: make_latent_pipe(make_unet()), "vae must be an autoencoder of diffusers.*, got UNet2DModel"),
        (lambda: make_latent_pipe(clip_sample=True), "clip_sample=True would clip latents"),
    ],
    ids=["channels", "class", "clip"],
)
def test_an_autoencoder_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scheduler_that_clips_is_refused_for_latents_also_where_it_is_exchanged_and_decoded_nan_is_told(tmp_path):
    pipe = make_latent_pipe()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    modular = DualRateBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    clipping = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    modular.update_components(scheduler=clipping)
    own, pipe.scheduler = pipe.scheduler, clipping
    for draw in (pipe, modular):
        with pytest.raises(ValueError, match="clip_sample=True would clip latents"):
            draw(num_inference_steps=2)
    pipe.scheduler = own
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="The images hold NaN or infinity"), np.errstate(invalid="ignore"):
        pipe(output_type="np")


@pytest.mark.parametrize("cls", [AutoencoderTiny, AutoencoderDC])
def test_other_autoencoders_decode_to_their_own_size(cls):
    torch.manual_seed(0)
    if cls is AutoencoderTiny:
        vae = cls(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
    else:
        vae = cls(
            latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        )  # fmt: skip
    pipe = make_latent_pipe(vae.eval())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=generator(), output_type="pt").images
    with torch.no_grad():
        latents = pipe(generator=generator(), output_type="latent").images
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert pipe.image_processor.config.vae_scale_factor == images.shape[-1] // 8
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))


def make_pair(**options):
    encoder = HostNetwork(make_unet(), NoiseProcess(prediction_type="v_prediction"), **options)
    torch.manual_seed(1)
    denoiser = UViTDenoiser(
        sample_size=8, level_channels=(16, 32), level_types=("res", "res"), level_blocks=(1, 1), embedding_dim=16,
        attention_head_dim=8, context_channels=encoder.context_channels, **options,
    )  # fmt: skip
    for projection in denoiser.context_proj:
        nn.init.normal_(projection.weight, std=0.2)
    nn.init.normal_(denoiser.proj_out.weight, std=0.2)
    return DualRatePipeline(denoiser.eval(), DualRateScheduler(), encoder, num_inference_steps=6, num_context_steps=2)


@pytest.mark.parametrize("hands_over", [False, True])
def test_a_network_of_diffusers_is_the_encoder_of_a_pair_also_saved(tmp_path, hands_over):
    pipe = make_pair(prediction_hand_over=hands_over)
    pipe.set_progress_bar_config(disable=True)
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        images = pipe(generator=generator(), output_type="latent").images
    assert evaluations == [2, 6] and images.isfinite().all()
    more = pipe(num_context_steps=3, generator=generator(), output_type="latent").images
    assert not torch.equal(images, more), "the context changes nothing"
    pipe.save_pretrained(tmp_path)
    loaded = DualRatePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(generator=generator(), output_type="latent").images, images)
    assert isinstance(UNet2DModel.from_pretrained(tmp_path / "context_encoder"), UNet2DModel)
    assert json.loads((tmp_path / "context_encoder" / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_a_spared_pair_takes_the_networks_own_prediction_at_refreshes():
    pipe = make_pair(prediction_hand_over=True)
    pipe.register_to_config(encoder_denoises=True)
    pipe.set_progress_bar_config(disable=True)
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        every = pipe(num_context_steps=6, generator=generator(), output_type="latent").images
    assert evaluations == [6, 0]
    alone = DualRatePipeline(pipe.context_encoder, DualRateScheduler(), num_inference_steps=6)
    alone.set_progress_bar_config(disable=True)
    torch.testing.assert_close(every, alone(generator=generator(), output_type="latent").images, rtol=0, atol=1e-5)


def test_flops_are_those_of_the_network_itself():
    unet = make_unet()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.randn(1, 3, 8, 8), 3)
    assert network_flops(HostNetwork(unet, NoiseProcess())) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HostNetwork(AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)), NoiseProcess()),
            "must be one of UNet2DModel, .*SD3Transformer2DModel, got AutoencoderKL"),
        (lambda: HostNetwork(make_unet(out_channels=4), NoiseProcess()), "out_channels=4"),
        (lambda: HostNetwork(make_unet(), DDPMScheduler()), "process must be a NoiseProcess, .* got DDPMScheduler"),
        (lambda: HostNetwork(make_unet(), NoiseProcess(), ["up_blocks.7"]), "no submodule 'up_blocks.7'"),
        (lambda: HostNetwork(make_unet(), NoiseProcess(), ["time_embedding"]).context_shapes, "'time_embedding' gives no map"),
        (lambda: HostNetwork(make_unet(), NoiseProcess(), ["up_blocks"]).context_shapes, "The tap 'up_blocks' gives no map"),
        (lambda: HostNetwork(make_unet(class_embed_type="timestep"), NoiseProcess()), "class_embed_type='timestep'"),
        (lambda: HostNetwork(make_unet(), NoiseProcess(prediction_type="score")), "prediction_type must be one of"),
        (lambda: HostNetwork(make_unet(), NoiseProcess())(torch.zeros(1, 3, 8, 8), 0.0, torch.tensor([0])), "takes no class"),
        (lambda: DualRatePipeline(make_pair().denoiser, DualRateScheduler(), HostNetwork(make_unet(), NoiseProcess(), ["mid_block"])), "widths"),
    ],
    ids=["class", "channels", "process", "tap", "vector", "silent", "classes", "prediction", "labels", "pair"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_encoder_of_more_levels_than_are_tapped_says_which_sizes_it_takes():
    levels = {"block_out_channels": (8, 16, 16)} | {
        f"{way}_block_types": (f"{way.capitalize()}Block2D",) * 3 for way in ("down", "up")
    }
    unet = make_unet(**levels)
    process = NoiseProcess(prediction_type="v_prediction")
    encoder = HostNetwork(unet, process, HostNetwork(unet, process).taps[:2])
    denoiser = make_pair().denoiser.from_config(
        {**make_pair().denoiser.config, "context_channels": encoder.context_channels}
    )
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, num_inference_steps=2, num_context_steps=1)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="divisible by 4 for the context_encoder"):
        pipe(height=10, width=10)


def test_a_compiled_network_of_diffusers_is_an_encoder_as_it_was():
    pipe = make_pair()
    compiled = torch.compile(pipe.context_encoder, backend="eager")
    again = DualRatePipeline.from_pipe(pipe, context_encoder=compiled)
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
    images = [each(generator=generator(), output_type="latent").images for each in (pipe, again)]
    torch.testing.assert_close(images[1], images[0])


def test_maps_of_other_sizes_than_the_denoisers_are_refused():
    encoder = HostNetwork(
        make_unet(), NoiseProcess(prediction_type="v_prediction"), ["up_blocks.1.resnets.1", "conv_in"]
    )
    denoiser = UViTDenoiser(
        sample_size=8, level_channels=(16, 32), level_types=("res", "res"), level_blocks=(1, 1), embedding_dim=16,
        attention_head_dim=8, context_channels=(8, 8),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"sizes \[\(8, 8\), \(8, 8\)\], the denoiser's of \[\(8, 8\), \(4, 4\)\]"):
        DualRatePipeline(denoiser, DualRateScheduler(), encoder)


def test_a_folder_that_holds_no_such_network_or_a_damaged_one_is_refused(tmp_path):
    HostNetwork(make_unet(), NoiseProcess()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for folder, load in ((tmp_path, HostNetwork), (tmp_path / "ddpm/unet", DualRatePipeline)):
        file = folder / "diffusion_pytorch_model.safetensors"
        kept = load_file(file)
        for changed, message in (
            ({"conv_in.bias": kept["conv_in.bias"] * torch.nan}, "holds NaN or infinity in conv_in.bias"),
            ({"conv_in.weight": None, "conv_out.bias": None}, "lacks 2 weights, such as conv_in.weight"),
        ):
            weights = {name: weight for name, weight in (kept | changed).items() if weight is not None}
            save_file(weights, file, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=message):
                load.from_pretrained(tmp_path if load is HostNetwork else tmp_path / "ddpm")
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="holds a AutoencoderKL, which is none of UNet2DModel"):
        HostNetwork.from_pretrained(tmp_path)


def test_a_unet_with_classes_draws_each_of_them_and_knows_none_that_stands_for_no_class(tmp_path):
    own = DDIMPipeline(make_unet(num_class_embeds=3), DDIMScheduler(clip_sample=False))
    own.save_pretrained(tmp_path)
    ours, z = DualRatePipeline.from_pretrained(tmp_path), torch.randn(1, 3, 8, 8)
    ours.set_progress_bar_config(disable=True)
    level = torch.logit(own.scheduler.alphas_cumprod[500].double()).float()
    alpha, sigma = diffusion.alpha_sigma(level)
    with torch.no_grad():
        eps = own.unet(z, 500, torch.tensor([2])).sample
        torch.testing.assert_close(ours.denoiser(z, level, torch.tensor([2])).sample, (eps - sigma * z) / alpha)
    assert len(ours([0, 2], num_inference_steps=2, output_type="pt").images) == 2
    with pytest.raises(ValueError, match="knows no class that stands for none: give class_labels"):
        ours(num_inference_steps=2)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs networks that learned to go without a class"):
        ours([0], guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"class_labels must lie in 0\.\.2, got 3"):
        ours([3])
    with pytest.raises(ValueError, match="taps must be a list of names of submodules, got 'up_blocks.0'"):
        HostNetwork(own.unet, NoiseProcess(), "up_blocks.0")


def test_a_unet_with_classes_has_shapes_and_costs_and_as_an_encoder_refuses_guidance_alike():
    encoder = HostNetwork(make_unet(num_class_embeds=3), NoiseProcess(prediction_type="v_prediction"))
    assert encoder.context_shapes == HostNetwork(make_unet(), NoiseProcess()).context_shapes
    assert network_flops(encoder) == network_flops(HostNetwork(make_unet(), NoiseProcess()))
    denoiser = UViTDenoiser(
        sample_size=8, num_classes=3, level_channels=(16, 32), level_types=("res", "res"), level_blocks=(1, 1),
        embedding_dim=16, attention_head_dim=8, context_channels=encoder.context_channels,
    ).eval()  # fmt: skip
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe([0, 2], output_type="pt").images) == 2
    with pytest.raises(
        ValueError, match="guidance_scale=2.0 needs networks .*, and the UNet2DModel of diffusers did not"
    ):
        pipe([0], guidance_scale=2.0)

    def guide(own, *_):
        own._guidance_scale = 2.0

    with pytest.raises(ValueError, match="A callback switched guidance on in a call without a null branch"):
        pipe([0], callback_on_step_end=guide)


def test_a_call_that_fails_keeps_no_feature_maps():
    host = HostNetwork(make_unet(), NoiseProcess())
    with pytest.raises(RuntimeError):
        host(torch.zeros(1, 3, 7, 7), 0.0)  # halves that do not fit each other
    assert host._taken is None


def test_another_pipeline_of_the_same_components_keeps_the_autoencoder():
    pipe = make_latent_pipe(make_vae())
    other = DualRatePipeline.from_pipe(pipe)
    assert other.vae is pipe.vae and DualRatePipeline.from_pipe(pipe, vae=None).vae is None
    assert other(num_inference_steps=1).images[0].size == (16, 16)


def test_a_network_of_diffusers_is_saved_as_variant_and_in_shards_as_any_component(tmp_path):
    pipe = make_pair()
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "context_encoder" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert weights.read_bytes() == before and weights.with_suffix(".fp16.safetensors").is_file()
    make_pair().save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    assert (tmp_path / "shards/context_encoder/diffusion_pytorch_model.safetensors.index.json").is_file()


def test_a_network_of_another_configuration_than_the_published_one_is_saved_as_a_whole(tmp_path):
    """Only what is fetched would count of it. Kills: weights alone compared."""
    published = tmp_path / "models--org--unet/snapshots" / ("a" * 40)
    make_unet().save_pretrained(published)
    for name, changes in (("same", {}), ("changed", {"center_input_sample": True})):
        unet = UNet2DModel.from_pretrained(published)
        changed = UNet2DModel.from_config({**unet.config, **changes}).eval()
        changed.load_state_dict(unet.state_dict())
        changed.register_to_config(_name_or_path=str(published))
        pipe = make_pair()
        pipe.register_modules(context_encoder=HostNetwork(changed, pipe.context_encoder.process))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / name)
        assert bool(list((tmp_path / name / "context_encoder").glob("*.safetensors"))) == bool(changes)
        again = DualRatePipeline.from_pretrained(tmp_path / name, cache_dir=tmp_path)
        again.set_progress_bar_config(disable=True)
        expected = pipe(generator=generator(), output_type="latent").images
        torch.testing.assert_close(again(generator=generator(), output_type="latent").images, expected)


@pytest.mark.parametrize("config", [TaylorSeerCacheConfig(cache_interval=3), FirstBlockCacheConfig(threshold=0.1)])
def test_a_cache_that_would_change_nothing_or_break_is_refused(config):
    host = HostNetwork(make_unet(), NoiseProcess())
    with pytest.raises(ValueError, match="acts on no module of this network|does not fit a UNet2DModel with taps"):
        host.enable_cache(config)


def test_checkpointing_of_a_network_of_diffusers_ends_as_it_begins():
    host = HostNetwork(make_unet(), NoiseProcess())
    host.enable_gradient_checkpointing()
    assert host.network.is_gradient_checkpointing
    host.disable_gradient_checkpointing()
    assert not host.network.is_gradient_checkpointing


def test_a_folder_that_is_no_network_of_ours_is_said_in_one_sentence(tmp_path):
    host = HostNetwork(make_unet(), NoiseProcess())
    host.save_pretrained(tmp_path / "host")
    loaded, info = HostNetwork.from_pretrained(tmp_path / "host", output_loading_info=True)
    assert isinstance(loaded, HostNetwork) and not info["missing_keys"]
    config = json.loads((tmp_path / "host/config.json").read_text())
    config["_host_network"]["beta_ende"] = 0.02
    (tmp_path / "host/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="_host_network in the config.json of .* has an unknown entry, beta_ende"):
        HostNetwork.from_pretrained(tmp_path / "host")
    with pytest.raises(OSError, match="gone cannot be loaded: there is no such folder"):
        HostNetwork.from_pretrained(tmp_path / "gone")


def test_a_scheduler_whose_table_is_not_that_of_its_betas_is_refused():
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.5
    with pytest.raises(ValueError, match="The betas in the configuration of DDIMScheduler do not give its table"):
        NoiseProcess.of(scheduler)
    assert (
        NoiseProcess.of(DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")).log_snrs
        is not None
    )
