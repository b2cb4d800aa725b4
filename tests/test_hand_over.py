"""The encoder's own prediction handed over beside the context, and its update by what z_t tells beyond z_τ."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import plain_loop
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser, diffusion
from diffusers_dualrate.chain import Chain, Context
from diffusers_dualrate.flops import count_evaluations, image_flops, network_flops
from diffusers_dualrate.losses import denoising_loss, draw
from diffusers_dualrate.pair import TrainablePair, schedule_of
from diffusers_dualrate.refreshes import plan_refreshes
from diffusers_dualrate.steps import ChainSteps, log_snr_of_steps


@pytest.fixture
def make_pair(make_networks):
    def make(**both):
        return make_networks(num_classes=4, prediction_hand_over=True, **both)

    return make


def test_at_a_refresh_an_untrained_denoiser_repeats_the_encoders_velocity(make_pair):
    encoder, denoiser = make_pair()
    torch.nn.init.zeros_(denoiser.proj_out.weight)
    torch.nn.init.zeros_(denoiser.proj_out.bias)
    z, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 4])
    log_snr = torch.tensor([-4.0, 0.0, 5.0])
    context = denoiser.project_context(encoder(z, log_snr, labels).context)
    x = denoiser.handed_over_prediction(context)
    velocity = denoiser(z, log_snr, labels, context, log_snr).sample
    torch.testing.assert_close(velocity, diffusion.v_from_x(z, x, log_snr[:, None, None, None]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(denoiser(z, log_snr + 0.5, labels, context, log_snr).sample, velocity, atol=1e-2)


def test_the_encoder_of_a_single_rate_network_predicts_what_that_network_predicts(make_networks):
    single_rate = make_networks(denoiser={"context_channels": None}, num_classes=4)[1]
    encoder = UViTContextEncoder.from_denoiser(single_rate, prediction_hand_over=True)
    z, labels, log_snr = torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), torch.tensor([-1.0, 3.0])
    z_tau, x, variance = encoder(z, log_snr, labels).context[-3:]
    velocity = single_rate(z, log_snr, labels).sample
    torch.testing.assert_close(x, diffusion.x_from_v(z, velocity, log_snr[:, None, None, None]))
    torch.testing.assert_close(z_tau, z)
    torch.testing.assert_close(variance.mean((1, 2, 3)), 0.2 * torch.sigmoid(-log_snr))


def test_the_heavy_network_of_a_pair_is_had_alone_and_draws_as_the_pair_does_where_it_refreshes_always(make_pair):
    """Mutants: a part of the weights left out; the pair's K, refreshes or `encoder_denoises` kept."""
    encoder, denoiser = make_pair()
    names = {i: f"class {i}" for i in range(denoiser.config.num_classes)}
    options = {"num_inference_steps": 6, "num_context_steps": 2, "guidance_scale": 2.0, "id2label": names}
    pair = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=True, **options)
    heavy = pair.heavy_alone()
    for pipe in (pair, heavy):
        pipe.set_progress_bar_config(disable=True)
    assert heavy.context_encoder is None and heavy.id2label == names and heavy.heavy_alone() is heavy
    drawn = [
        pipe([0, 1], generator=torch.Generator().manual_seed(0), output_type="latent", **more).images
        for pipe, more in ((heavy, {}), (pair, {"num_context_steps": 6}), (pair, {}))
    ]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-2)
    compiled = copy.copy(pair)
    compiled.__dict__["context_encoder"] = torch.compile(encoder)
    assert compiled.heavy_alone().denoiser.config == heavy.denoiser.config


def test_an_encoder_that_predicts_nothing_draws_nothing_alone(make_pipe):
    with pytest.raises(ValueError, match="This encoder hands over no prediction, so it draws nothing alone"):
        make_pipe().heavy_alone()


def test_the_encoder_learns_its_prediction_from_a_loss_of_its_own(make_pair):
    encoder, denoiser = make_pair()
    pair = TrainablePair(denoiser, encoder)
    x, labels = torch.randn(8, 3, 8, 8).clamp(-1, 1), torch.zeros(8, dtype=torch.long)
    schedule = schedule_of(DualRateScheduler())

    def loss(encode):
        draws = draw(0, 0, range(8), x.shape[1:])
        return denoising_loss(pair.denoise, encode, x, labels, draws, schedule=schedule)

    without, beside = loss(lambda *args: (pair.encode(*args)[0], None)), loss(pair.encode)
    torch.testing.assert_close(without.v_loss, beside.v_loss)
    # Independently: the encoder as a single-rate network at τ, under the same weight.
    times = draw(0, 0, range(8), x.shape[1:])
    from diffusers_dualrate.losses import ContextTimes, coupled_pair, sigmoid_weight, window_times

    t, tau = window_times(times.uniforms[:, :3], ContextTimes((1,)))
    lambda_t, lambda_tau = (schedule.log_snr(time)[:, None, None, None] for time in (t, tau))
    _, z_tau = coupled_pair(x, times.eps, times.eps_tau, lambda_t, lambda_tau)
    x_hat = encoder(z_tau, lambda_tau.flatten(), labels).context[-2]
    v, v_hat = (diffusion.v_from_x(z_tau, image, lambda_tau) for image in (x, x_hat))
    weight = sigmoid_weight(lambda_tau.flatten(), schedule.log_snr_rate(tau), 0.0)
    expected = (weight * (v - v_hat).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(beside.loss - without.loss, expected, rtol=1e-4, atol=1e-5)
    encoder.proj_out.zero_grad()
    beside.loss.backward()
    assert encoder.proj_out.weight.grad.abs().sum() > 0 and encoder.variance_out.weight.grad.abs().sum() > 0


def test_a_pair_with_hand_over_samples_saves_and_reloads_bit_equal(make_pair, tmp_path):
    encoder, denoiser = make_pair()
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder)
    pipe.set_progress_bar_config(disable=True)

    def sample(pipe):
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 6, "num_context_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
        return pipe([1, 2], generator=[torch.Generator().manual_seed(i) for i in range(2)], **options).images

    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sample(DualRatePipeline.from_pretrained(tmp_path)), expected)
    alone = pipe([2], generator=[torch.Generator().manual_seed(1)], num_inference_steps=6, num_context_steps=2)
    assert len(alone.images) == 1


def sample_three(pipe, *labels, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(3)]
    return pipe(*labels, generator=generator, output_type="latent", **options).images


@pytest.mark.parametrize(
    "guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "guidance_interval": (-2.0, 4.0)}]
)
def test_an_encoder_that_denoises_is_the_single_rate_network_where_every_step_refreshes(
    make_pair, make_networks, guidance
):
    """Kills: a denoiser evaluation at refreshes; the branches swapped; x̂ taken for v."""
    _, heavy = make_networks(num_classes=4, context_channels=None)
    _, denoiser = make_pair()
    encoder = UViTContextEncoder.from_denoiser(heavy, denoiser.config.context_channels, prediction_hand_over=True)
    pair = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=True)
    with count_evaluations(denoiser) as evaluations:
        images = sample_three(pair, [0, 1, 2], num_inference_steps=6, num_context_steps=6, **guidance)
    expected = sample_three(DualRatePipeline(heavy, DualRateScheduler()), [0, 1, 2], num_inference_steps=6, **guidance)
    assert evaluations == [0]
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scales", [[1.0] * 8, [2.5] * 8, [1.0] * 2 + [2.5] * 2 + [1.0] * 4])
def test_where_the_encoder_denoises_the_denoiser_runs_at_the_other_steps_alone(make_pair, scales):
    """Held to the plain loop, whose denoiser is told to repeat the encoder where the context is fresh.

    Kills, where guidance acts from a step between refreshes on: the branch without a class taken at the refresh before.
    """
    encoder, denoiser = make_pair()

    class Spared(torch.nn.Module):
        config, project_context = denoiser.config, staticmethod(denoiser.project_context)

        def forward(self, z, level, labels, context, level_of_context):
            if level == level_of_context:
                return SimpleNamespace(sample=diffusion.v_from_x(z, context[-2], torch.tensor(level)))
            return denoiser(z, level, labels, context, level_of_context)

    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=True)
    noise, labels, steps = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]), {"refresh_steps": [0, 1, 4]}
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    times = [1 - i / 8 for i in range(8)]
    guided = [plain_loop.log_snr_at(t) for t, scale in zip(times, scales, strict=True) if scale > 1] or [100.0]
    guidance = {"guidance_scale": 2.5, "guidance_interval": (guided[0] - 0.01, guided[-1] + 0.01)}
    with count_evaluations(encoder, denoiser) as evaluations:
        images = pipe(labels, 8, **steps, latents=noise, generator=one, **guidance, output_type="latent").images
    assert evaluations == [3, 5]
    expected = plain_loop.sample(Spared(), encoder, times, [0, 1, 4], labels, noise, other, scales)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)


def test_what_the_encoder_spares_is_saved_counted_and_refused_without_a_prediction(make_pair, make_networks, tmp_path):
    encoder, denoiser = make_pair()
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=True)
    steps = {"num_inference_steps": 5, "num_context_steps": 3}
    expected = sample_three(pipe, [0, 1, 2], **steps)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sample_three(DualRatePipeline.from_pretrained(tmp_path), [0, 1, 2], **steps), expected)
    always = DualRatePipeline.from_pretrained(tmp_path, encoder_denoises=False)
    assert not torch.equal(sample_three(always, [0, 1, 2], **steps), expected)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample_three(pipe, [0, 1, 2], **steps, guidance_scale=1.0)
    assert counter.get_total_flops() == 3 * image_flops(denoiser, encoder, **steps, encoder_denoises=True)
    plain_encoder, plain_denoiser = make_networks(num_classes=4)
    for parts in ((plain_denoiser, DualRateScheduler(), plain_encoder), (denoiser, DualRateScheduler())):
        with pytest.raises(ValueError, match="needs a context_encoder that hands over its prediction"):
            DualRatePipeline(*parts, encoder_denoises=True)
    pipe = DualRatePipeline(plain_denoiser, DualRateScheduler(), plain_encoder)
    pipe.register_to_config(encoder_denoises=True)
    with pytest.raises(ValueError, match="encoder_denoises=True needs"):
        sample_three(pipe, [0, 1, 2], **steps)


def test_guidance_switched_on_between_refreshes_refreshes_with_the_encoders_prediction(make_pair):
    encoder, denoiser = make_pair()
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder, encoder_denoises=True)

    def switch_on(pipe, step, timestep, tensors):
        pipe._guidance_scale = 2.0 if step >= 1 else 1.0
        return {}

    with count_evaluations(encoder, denoiser) as evaluations:
        images = sample_three(pipe, [0, 1, 2], 6, 2, guidance_scale=1.0, callback_on_step_end=switch_on)
    assert evaluations == [3, 3]
    # The same plan, told beforehand: guidance from step 2 on, which the refresh at step 2 brings its context for.
    pipe.scheduler.set_timesteps(6)
    levels = log_snr_of_steps(pipe.scheduler)
    options = {"guidance_scale": 2.0, "guidance_interval": ((levels[1] + levels[2]).item() / 2, 100.0)}
    torch.testing.assert_close(images, sample_three(pipe, [0, 1, 2], 6, refresh_steps=[0, 2, 3], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_velocity_that_is_taken_in_half_precision_is_the_encoders_own(make_networks, make_pair, dtype):
    """Kills: the unrounded z in place of the one that the encoder saw, which a small σ multiplies by up to 150."""
    _, heavy = make_networks(num_classes=4, context_channels=None)
    _, denoiser = make_pair()
    encoder = UViTContextEncoder.from_denoiser(heavy, denoiser.config.context_channels, prediction_hand_over=True)
    heavy, encoder, denoiser = (network.to(dtype) for network in (heavy, encoder, denoiser))
    z, level = torch.randn(3, 3, 8, 8), torch.tensor(9.9)
    with torch.no_grad():
        chain = Chain(denoiser, encoder, ChainSteps(DualRateScheduler(), plan_refreshes(1), level[None]))
        taken = chain.take_prediction(z, Context(chain.compute_context(z, level, False), level), False)
        expected = heavy(z.to(dtype), level).sample.float()
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("log_snrs", [(9.9, 9.9), (9.9, 6.0)])
def test_a_prediction_keeps_its_digits_in_half_precision(make_pair, dtype, tolerance, log_snrs):
    """Divided by a small σ, what rounding takes from x̂ or z_τ is an eighth of the velocity."""
    level, level_tau = torch.tensor(log_snrs)
    ratio, std = diffusion.transition(level, level_tau)
    z = diffusion.add_noise(0.4 * torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), level)
    z_tau = ratio * z + std * torch.randn(4, 3, 8, 8)
    z, z_tau = (image.to(dtype).float() for image in (z, z_tau))  # what both networks see in either precision
    encoder, denoiser = make_pair()
    torch.nn.init.zeros_(denoiser.proj_out.weight)
    torch.nn.init.zeros_(denoiser.proj_out.bias)
    velocities = []
    for precision in (torch.float32, dtype):
        networks = denoiser.to(precision), encoder.to(precision)
        chain = Chain(*networks, ChainSteps(DualRateScheduler(), plan_refreshes(1), level[None]))
        with torch.no_grad():
            context = chain.compute_context(z_tau, level_tau, False)
            made = Context(context, level_tau)
            velocities.append(chain.compute_velocity(z.to(precision), level, made, False).float())
        assert context[0].dtype == precision and {part.dtype for part in context[-3:]} == {torch.float32}
    assert (velocities[0] - velocities[1]).norm() < tolerance * velocities[0].norm()


def test_compiled_networks_that_hand_over_have_one_graph_each_for_a_whole_run(make_pair):
    """Kills: z_τ handed over as the very tensor that the denoiser sees at a refresh."""
    encoder, denoiser = make_pair()
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), encoder)
    pipe.set_progress_bar_config(disable=True)

    def sample():
        return pipe([0, 1], 4, 2, generator=torch.Generator().manual_seed(0), output_type="latent").images

    expected = sample()
    torch._dynamo.reset()
    denoiser.compile(backend="eager", fullgraph=True)
    encoder.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = sample()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected)


def test_what_is_handed_over_costs_an_output_in_the_encoder_and_a_wider_input_in_the_denoiser(make_networks):
    plain, handing = (make_networks(prediction_hand_over=both) for both in (False, True))
    encoder, denoiser = (network_flops(b) - network_flops(a) for a, b in zip(plain, handing, strict=True))
    pixels, config = 8 * 8, plain[0].config
    assert encoder == 2 * (pixels * config.level_channels[0] * (3 + 1) + config.embedding_dim)
    assert denoiser == 2 * pixels * plain[1].config.level_channels[0] * 3 * 3


def test_without_context_the_handed_over_parts_are_zero(make_pair):
    _, denoiser = make_pair()
    z, log_snr = torch.randn(2, 3, 8, 8), torch.zeros(2)
    trunk_input = {}
    denoiser.trunk.register_forward_pre_hook(lambda _, args: trunk_input.update(sample=args[0]))
    assert denoiser(z, log_snr).sample.isfinite().all()
    assert trunk_input["sample"].shape == (2, 12, 8, 8)
    assert trunk_input["sample"][:, 3:].abs().max() == 0


def test_networks_of_which_one_hands_over_are_refused(make_networks):
    encoder, denoiser = make_networks(encoder={"prediction_hand_over": True})
    with pytest.raises(ValueError, match="prediction_hand_over is True in the encoder and False in the denoiser"):
        DualRatePipeline(denoiser, DualRateScheduler(), encoder)
    with pytest.raises(ValueError, match="needs context_channels"):
        UViTDenoiser(prediction_hand_over=True)
