"""The two networks: how context enters, what each output may depend on, and the host's loading, saving and compiling."""

import shutil

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import silu

from diffusers_dualrate import UViTContextEncoder, UViTDenoiser

LEVELS = {
    "level_channels": (8, 16, 24),
    "level_types": ("res", "transformer", "transformer"),
    "level_blocks": (1, 1, 2),
    "attention_head_dim": 8,
    "embedding_dim": 12,
}
CONTEXT_CHANNELS = (4, 6, 8)
TINY = {"sample_size": 8, "in_channels": 3, "num_classes": 5, **LEVELS}


def awaken(network):
    """Replace all zero-initialised tensors by small random ones: what training does first."""
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    return network


def encoder(**options):
    return UViTContextEncoder(**TINY | {"context_channels": CONTEXT_CHANNELS} | options).eval()


def denoiser(**options):
    return UViTDenoiser(**TINY | {"context_channels": CONTEXT_CHANNELS} | options).eval()


def pair(**options):
    return awaken(encoder(**options)), awaken(denoiser(**options))


def images(batch_size=2, height=8, width=8):
    return torch.randn(batch_size, 3, height, width)


def random_context(batch_size=2, height=8, width=8):
    return tuple(torch.randn(batch_size, c, height >> i, width >> i) for i, c in enumerate(CONTEXT_CHANNELS))


def predict(network, *args, **kwargs):
    return network(*args, **kwargs).sample


def test_a_fresh_denoiser_predicts_zero_with_and_without_any_context():
    """Kills: an output convolution that does not start at zero."""
    network = denoiser()
    context = network.project_context(random_context())
    for arguments in ({}, {"context": context, "context_log_snr": -2.0}):
        assert not predict(network, images(), 1.0, **arguments).any()


def test_a_fresh_denoiser_takes_no_notice_of_context_on_any_level():
    """Each projection starts at zero, so each level stays the identity. Kills: a projection drawn at random."""
    network = denoiser()
    context = network.project_context(random_context())
    assert all(not part.any() for part in context)
    sample, embedding = images(), torch.randn(2, 12)
    for with_context, without in zip(
        network.trunk(sample, embedding, context), network.trunk(sample, embedding), strict=True
    ):
        assert torch.equal(with_context, without)


def test_a_fresh_encoder_already_hands_out_its_features_so_that_the_projection_can_learn():
    """Kills: context heads that start at zero, with which neither side would ever get a gradient."""
    heavy, light = encoder(), denoiser()
    nn.init.normal_(light.proj_out.weight)
    parts = heavy(images(), 0.5).context
    assert all(part.std() > 0.05 for part in parts)
    predict(light, images(), 1.0, context=light.project_context(parts), context_log_snr=0.5).square().sum().backward()
    assert all(projection.weight.grad.any() for projection in light.context_proj)


def test_without_context_the_denoiser_ignores_the_noisier_image_and_gives_the_encoder_no_gradient():
    """Kills: λ_τ embedded although there is no context; a bias in the projection."""
    heavy, light = pair()
    sample = images()
    alone = predict(light, sample, 1.0)
    heavy(images(), -1.0)
    assert torch.equal(predict(light, sample, 1.0, context=None, context_log_snr=None), alone)
    alone.square().sum().backward()
    assert all(parameter.grad is None for parameter in heavy.parameters())
    assert all(projection.weight.grad is None for projection in light.context_proj)
    assert all(parameter.grad is None for parameter in light.context_noise_embedding.parameters())
    zero = light.project_context(tuple(torch.zeros_like(part) for part in random_context()))
    assert all(not part.any() for part in zero)


def test_with_context_every_parameter_of_both_networks_gets_a_gradient():
    """Kills: a level whose context is dropped, detached or taken twice from another level."""
    heavy, light = pair()
    labels = torch.tensor([1, 5])
    context = light.project_context(heavy(images(), -1.0, labels).context)
    output = predict(light, images(), 1.0, labels, context=context, context_log_snr=-1.0)
    output.square().sum().backward()
    for network in (heavy, light):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_every_level_of_the_encoder_gets_gradient_through_its_own_part_of_the_context_alone():
    heavy, light = pair()
    for level in range(3):
        heavy.zero_grad()
        parts = [part if i == level else part.detach() for i, part in enumerate(heavy(images(), -1.0).context)]
        context = light.project_context(tuple(parts))
        predict(light, images(), 1.0, context=context, context_log_snr=-1.0).square().sum().backward()
        reached = [head[1].weight.grad is not None for head in heavy.context_heads]
        assert reached == [i == level for i in range(3)]
        assert heavy.trunk.patch_embed.weight.grad.any()


def test_the_prediction_depends_on_the_context_of_every_level_and_on_every_condition():
    """Kills: a condition left out or used under another's name; λ_t and λ_τ through the same embedding."""
    _, light = pair()
    sample, labels, parts = images(), torch.tensor([0, 1]), random_context()

    def output(log_snr=1.0, context_log_snr=-1.0, labels=labels, parts=parts, network=light):
        context = network.project_context(parts)
        return predict(network, sample, log_snr, labels, context=context, context_log_snr=context_log_snr)

    reference = output()
    for level in range(3):
        other = tuple(part + 1 if i == level else part for i, part in enumerate(parts))
        assert (output(parts=other) - reference).abs().max() > 1e-5
    assert (output(log_snr=2.0) - reference).abs().max() > 1e-5
    assert (output(context_log_snr=-2.0) - reference).abs().max() > 1e-5
    assert (output(labels=torch.tensor([0, 2])) - reference)[1].abs().max() > 1e-5
    assert (output(log_snr=-1.0, context_log_snr=1.0) - reference).abs().max() > 1e-5
    assert torch.equal(output(labels=torch.tensor([0, 2]))[0], reference[0])


def test_the_encoder_depends_on_its_noise_level_and_on_the_class():
    heavy, _ = pair()
    sample = images()
    reference = heavy(sample, 1.0, torch.tensor([0, 1])).context
    for other in (heavy(sample, 2.0, torch.tensor([0, 1])), heavy(sample, 1.0, torch.tensor([2, 3]))):
        assert all((a - b).abs().max() > 1e-5 for a, b in zip(other.context, reference, strict=True))


def test_the_context_is_a_linear_map_of_each_levels_own_features_added_on_entry():
    """[h, e] → h + W e pixel by pixel, e itself being a projection of the group-normalised features. Kills: a bias in
    the context heads; another number of groups."""
    heavy, light = pair()
    sample = images()
    embedding, _ = heavy._embed(sample, 0.5, None)
    features = heavy.trunk(sample, silu(embedding))
    parts = heavy(sample, 0.5).context
    for head, feature, part in zip(heavy.context_heads, features, parts, strict=True):
        grouped = feature.reshape(2, feature.shape[1] // 8, -1)  # 8 channels a group
        normal = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        normal = normal.reshape(feature.shape) * head[0].weight[:, None, None] + head[0].bias[:, None, None]
        expected = torch.einsum("oc,bchw->bohw", head[1].weight[:, :, 0, 0], normal)
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
    for projection, part, added in zip(light.context_proj, parts, light.project_context(parts), strict=True):
        torch.testing.assert_close(added, torch.einsum("oc,bchw->bohw", projection.weight[:, :, 0, 0], part))


def amplitudes(log_snr):
    """α and σ [B, 1, 1, 1] from the angle tan φ = σ/α."""
    angle = torch.atan(torch.exp(-log_snr / 2))[:, None, None, None]
    return angle.cos(), angle.sin()


def test_a_handed_over_prediction_and_its_variance_have_their_closed_forms():
    """x̂ = α z − σ v of the head that a single-rate network has, and σ² e^(head + noise level and class).

    Kills: the sign of either noise level; σ for σ²; a difference of the variance's two parts; another image's level.
    """
    heavy, _ = pair(prediction_hand_over=True)
    sample, log_snr, found = images(), torch.tensor([-2.0, 3.0]), {}
    for name in ("proj_out", "variance_out", "variance_embedding"):
        getattr(heavy, name).register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
    z, x, variance = heavy(sample, log_snr, torch.tensor([1, 2])).context[-3:]
    alpha, sigma = amplitudes(log_snr)
    assert torch.equal(z, sample)
    torch.testing.assert_close(x, alpha * sample - sigma * found["proj_out"])
    exponent = found["variance_out"] + found["variance_embedding"].reshape(2, 1, 1, 1)
    assert found["variance_out"].std() > 1e-3 and (found["variance_embedding"].abs() > 1e-3).all()
    torch.testing.assert_close(variance, sigma**2 * exponent.exp())


def test_a_denoiser_sees_the_updated_prediction_its_velocity_and_how_many_sigma_it_moved():
    """Data N(0, s²) with their own posterior at τ, whose mean given both images is k_t z_t in closed form.

    Kills: the sign inside the logarithm of σ_t; 2 for its half; σ_τ for σ_t; what moved with the other sign; t and τ
    exchanged; the parts in another order; the start left out of the velocity.
    """
    _, light = pair(prediction_hand_over=True)
    std, log_snr, log_snr_tau = 0.6, torch.tensor([3.0, -0.5]), torch.tensor([-1.0, -2.5])
    (alpha, sigma), (alpha_tau, sigma_tau) = amplitudes(log_snr), amplitudes(log_snr_tau)
    z, z_tau, seen, corrections = images(), images(), [], []
    marginal = (alpha_tau * std) ** 2 + sigma_tau**2
    x, variance = alpha_tau * std**2 / marginal * z_tau, (std * sigma_tau) ** 2 / marginal
    light.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    light.proj_out.register_forward_hook(lambda _, __, out: corrections.append(out))
    context = (*light.project_context(random_context()), z_tau, x, variance)
    velocity = light(z, log_snr, context=context, context_log_snr=log_snr_tau).sample

    updated = alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * z
    start = (alpha * z - updated) / sigma
    parts = seen[0].split(3, dim=1)
    for part, expected in zip(parts, (z, start, updated, (updated - x) / sigma), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity, start + corrections[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(light.handed_over_velocity(log_snr_tau, context), (alpha_tau * z_tau - x) / sigma_tau)
    light(z, log_snr)
    assert torch.equal(seen[1], torch.cat([z, torch.zeros(2, 9, 8, 8)], dim=1))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (16, 8)])
def test_both_networks_take_images_of_other_sizes_and_shapes(height, width):
    heavy, light = pair()
    sample = images(1, height, width)
    parts = heavy(sample, -1.0).context
    assert [part.shape for part in parts] == [part.shape for part in random_context(1, height, width)]
    output = predict(light, sample, 1.0, context=light.project_context(parts), context_log_snr=-1.0)
    assert output.shape == sample.shape


def test_patches_larger_than_a_pixel_shrink_the_context_and_not_the_image():
    heavy, light = pair(patch_size=2, sample_size=16)
    sample = images(1, 16, 16)
    parts = heavy(sample, -1.0).context
    assert [part.shape[-1] for part in parts] == [8, 4, 2]
    output = predict(light, sample, 1.0, context=light.project_context(parts), context_log_snr=-1.0)
    assert output.shape == sample.shape


@pytest.mark.parametrize("make", [encoder, denoiser])
def test_images_that_do_not_divide_into_levels_are_refused_by_their_size(make):
    with pytest.raises(ValueError, match="divisible by 4 .*height 8 and width 10"):
        make()(images(1, 8, 10), 1.0)


def test_outputs_come_as_objects_or_as_plain_tuples():
    heavy, light = pair()
    sample = images()
    (context,) = heavy(sample, 1.0, return_dict=False)
    assert isinstance(context, tuple) and all(map(torch.equal, context, heavy(sample, 1.0).context))
    (velocity,) = light(sample, 1.0, return_dict=False)
    assert torch.equal(velocity, light(sample, 1.0).sample)


def test_log_snr_may_be_a_number_a_scalar_or_one_value_for_each_image():
    heavy, light = pair()
    sample, parts = images(), random_context()
    context = light.project_context(parts)
    forms = (0.75, torch.tensor(0.75), torch.tensor([0.75]), torch.tensor([0.75, 0.75]), torch.tensor(0.75).double())
    encoded = [torch.cat([part.flatten() for part in heavy(sample, form).context]) for form in forms]
    denoised = [predict(light, sample, form, context=context, context_log_snr=form) for form in forms]
    assert all(torch.equal(encoded[0], other) for other in encoded)
    assert all(torch.equal(denoised[0], other) for other in denoised)
    different = predict(light, sample, torch.tensor([0.75, 3.0]))
    torch.testing.assert_close(different[:1], predict(light, sample[:1], 0.75))
    torch.testing.assert_close(different[1:], predict(light, sample[1:], 3.0))


def test_no_class_labels_mean_the_null_label_for_every_image():
    """Kills: class 0, or the last real class, as the default."""
    heavy, light = pair()
    sample, null = images(), torch.tensor([5, 5])
    assert torch.equal(predict(light, sample, 1.0), predict(light, sample, 1.0, null))
    assert all(map(torch.equal, heavy(sample, 1.0).context, heavy(sample, 1.0, null).context))
    assert not torch.equal(predict(light, sample, 1.0), predict(light, sample, 1.0, null - 1))


def test_an_unconditional_pair_works_without_labels_and_refuses_them():
    heavy, light = pair(num_classes=None)
    context = light.project_context(heavy(images(), 1.0).context)
    assert predict(light, images(), 2.0, context=context, context_log_snr=1.0).isfinite().all()
    for network in (heavy, light):
        assert network.class_embedding is None
        with pytest.raises(ValueError, match="unconditional .*takes no class_labels"):
            network(images(), 1.0, torch.tensor([0, 0]))


def test_a_batch_equals_its_images_one_by_one():
    """Kills: statistics or attention over the batch; conditions of one row reaching another."""
    heavy, light = pair()
    sample, noisier, labels = images(3), images(3), torch.tensor([0, 3, 5])
    log_snr, context_log_snr = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([2.0, -1.0, -2.5])

    def run(rows):
        context = light.project_context(heavy(noisier[rows], context_log_snr[rows], labels[rows]).context)
        return predict(
            light, sample[rows], log_snr[rows], labels[rows], context=context, context_log_snr=context_log_snr[rows]
        )

    singles = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(run(slice(None)), singles, rtol=1e-5, atol=1e-5)


def test_context_and_its_log_snr_are_given_together_or_not_at_all():
    light = denoiser()
    context = light.project_context(random_context())
    for half in ({"context": context}, {"context_log_snr": 1.0}):
        with pytest.raises(ValueError, match="give both or neither"):
            light(images(), 1.0, **half)


def test_a_network_that_takes_no_context_says_so():
    single = denoiser(context_channels=None)
    assert not hasattr(single, "context_proj")
    for call in (
        lambda: single.project_context(random_context()),
        lambda: single(images(), 1.0, context=random_context(), context_log_snr=0.0),
    ):
        with pytest.raises(ValueError, match="takes no context"):
            call()


@pytest.mark.parametrize("make", [encoder, denoiser])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_channels": (4, 6)}, "one width per level, got 2 for 3 levels"),
        ({"num_classes": -1}, "got -1"),
        ({"num_classes": 0}, "got 0"),
        ({"level_blocks": (1, 1)}, "same levels, got 3, 3 and 2 entries"),
        ({"level_types": ("res", "res", "unet")}, "got 'unet'"),
        ({"attention_head_dim": 6}, "got width 16 and attention_head_dim 6"),
    ],
)
def test_bad_constructor_arguments_are_refused_with_their_value(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_encoder_hands_out_its_own_widths_unless_told_others():
    assert encoder().context_channels == CONTEXT_CHANNELS
    wide = encoder(context_channels=None)
    assert wide.context_channels == LEVELS["level_channels"]
    assert tuple(part.shape[1] for part in wide(images(), 1.0).context) == LEVELS["level_channels"]


@pytest.mark.parametrize("num_classes", [5, None])
def test_an_encoder_made_from_a_denoiser_has_its_features_and_leaves_it_untouched(num_classes):
    """The trunk's last map of every level, read off the denoiser by hooks. Kills: a copied part left out, shared
    instead of copied, or the denoiser's own context width taken over."""
    source = awaken(denoiser(num_classes=num_classes))
    before = {name: value.clone() for name, value in source.state_dict().items()}
    made = UViTContextEncoder.from_denoiser(source, context_channels=(4, 4, 4)).eval()
    features, sample = [], images()
    labels = None if num_classes is None else torch.tensor([2, 5])
    stages = [source.trunk.up[0], source.trunk.up[1], source.trunk.middle]
    hooks = [stage.register_forward_hook(lambda _, inputs, output: features.append(output)) for stage in stages]
    source(sample, 1.5, labels)
    for hook in hooks:
        hook.remove()
    context = made(sample, 1.5, labels).context
    for head, feature, part in zip(made.context_heads, reversed(features), context, strict=True):
        assert torch.equal(head(feature), part)
    assert made.context_channels == (4, 4, 4)
    assert UViTContextEncoder.from_denoiser(source).context_channels == LEVELS["level_channels"]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    with pytest.raises(ValueError, match="this denoiser is handed a prediction beside it"):
        UViTContextEncoder.from_denoiser(denoiser(num_classes=num_classes, prediction_hand_over=True))


@pytest.mark.parametrize("make", [encoder, denoiser])
def test_a_saved_network_loads_bit_for_bit_with_its_configuration(make, tmp_path):
    network = awaken(make())
    network.save_pretrained(tmp_path)
    loaded, info = type(network).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    ours, theirs = ({k: v for k, v in n.config.items() if not k.startswith("_")} for n in (network, loaded))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()} == ours
    sample = images()
    first, second = (n(sample, 1.0, return_dict=False)[0] for n in (network, loaded))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("make", [encoder, denoiser])
def test_a_checkpoint_that_lacks_weights_is_refused_by_name(make, tmp_path):
    network = make()
    network.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = safetensors.torch.load_file(file)
    del state["trunk.middle.blocks.1.attn.to_out.weight"], state["noise_embedding.linear_1.bias"]
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights, such as noise_embedding.linear_1.bias"):
        type(network).from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [encoder, denoiser])
def test_a_folder_with_pickled_weights_alone_is_refused(make, tmp_path):
    network = make()
    network.save_pretrained(tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "safe" / "config.json", tmp_path / "pickled")
    torch.save(network.state_dict(), tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        type(network).from_pretrained(tmp_path / "pickled")


def gradients(heavy, light, sample):
    heavy.zero_grad()
    light.zero_grad()
    context = light.project_context(heavy(sample, -1.0).context)
    predict(light, sample, 1.0, context=context, context_log_snr=-1.0).square().sum().backward()
    return [parameter.grad for network in (heavy, light) for parameter in network.parameters()]


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    heavy, light = (network.train() for network in pair())
    sample = images()
    expected = gradients(heavy, light, sample)
    recomputed = []
    for network in (heavy, light):
        network.enable_gradient_checkpointing()
        assert network.is_gradient_checkpointing
        network.trunk.middle.blocks[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    actual = gradients(heavy, light, sample)
    assert len(recomputed) == 4  # each block once forward, once more backward
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def test_both_networks_compile_to_one_graph_each_whatever_the_noise_level(fresh_compiler):
    """A run of six steps with two refreshes, without graph breaks and without compiling anything twice."""
    heavy, light = pair()
    fast_heavy, fast_light = (torch.compile(network, fullgraph=True, backend="eager") for network in (heavy, light))
    with torch.no_grad():
        for step, log_snr in enumerate(torch.linspace(-10, 10, 6).unbind()):
            sample = images()
            if step % 3 == 0:
                parts, context_log_snr = fast_heavy(sample, log_snr).context, log_snr.clone()
                assert all(map(torch.equal, parts, heavy(sample, log_snr).context))
                context = light.project_context(parts)
            conditions = {"context": context, "context_log_snr": context_log_snr}
            torch.testing.assert_close(
                predict(fast_light, sample, log_snr, **conditions), predict(light, sample, log_snr, **conditions)
            )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_code_predicts_what_the_network_predicts(fresh_compiler):
    """One transformer block is enough to pass through the attention dispatch, and quick to compile."""
    levels = {"level_channels": (8,), "level_types": ("transformer",), "level_blocks": (1,)}
    light = awaken(denoiser(context_channels=None, num_classes=None, **levels))
    compiled, sample = torch.compile(light, fullgraph=True), images()
    with torch.no_grad():
        for log_snr in torch.tensor([-3.0, 5.0]).unbind():
            torch.testing.assert_close(
                predict(compiled, sample, log_snr), predict(light, sample, log_snr), atol=1e-4, rtol=1e-4
            )
