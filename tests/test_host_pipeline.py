"""What users of diffusers do with a whole pipeline: share and copy components, place, offload, cast, adapt, compile.

The projection of the context is called beside the network's forward, so everything that hooks a forward is tried here.
"""

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.steps import make_dpm_solver

needs_gpu = pytest.mark.skipif(not torch.accelerator.is_available(), reason="moves weights to an accelerator")
N, K = 8, 2


def sample(pipe, labels=(0, 3), n=N, k=K, **options):
    options = {"guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0), "output_type": "latent"} | options
    return pipe(list(labels), n, k, **options).images.float().cpu()


def networks(pipe):
    return [pipe.context_encoder, pipe.denoiser]


def test_pipelines_made_from_components_or_another_pipeline_share_weights_and_defaults(make_pipe):
    pipe = make_pipe(id2label={1: "owl"}, num_inference_steps=6, num_context_steps=3, guidance_scale=1.5)
    expected = sample(pipe)
    from_pipe, from_components = (
        DualRatePipeline.from_pipe(pipe),
        DualRatePipeline(**pipe.components, **pipe.parameters),
    )
    for other in (from_pipe, from_components):
        other.set_progress_bar_config(disable=True)
        assert other.denoiser is pipe.denoiser and other.context_encoder is pipe.context_encoder
        assert torch.equal(sample(other), expected)
        assert other.id2label == {1: "owl"}
        for name in ("num_inference_steps", "num_context_steps", "guidance_scale"):
            assert other.config[name] == pipe.config[name]
    single_rate = DualRatePipeline.from_pipe(pipe, context_encoder=None)
    assert single_rate.context_encoder is None and pipe.context_encoder is not None


def test_a_pipeline_made_from_another_leaves_the_precision_of_what_they_share(make_pipe):
    """The host casts all components to float32. Mutant: they stay so."""
    pipe = make_pipe()
    pipe.context_encoder.to(torch.bfloat16)
    other = DualRatePipeline.from_pipe(pipe)
    assert other.context_encoder.dtype == torch.bfloat16 and other.denoiser.dtype == torch.float32
    cast = DualRatePipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert cast.context_encoder.dtype == cast.denoiser.dtype == torch.bfloat16


def test_the_names_of_classes_are_those_that_were_registered_last(make_pipe):
    pipe = make_pipe(id2label={1: "owl"})
    pipe.register_to_config(id2label={2: "crow"})
    assert pipe.id2label == {2: "crow"} and pipe.get_label_ids("crow") == [2]
    with pytest.raises(ValueError, match="owl"):
        pipe("owl", 1)


def test_a_warning_of_a_call_points_at_the_line_that_called(make_pipe):
    """Mutant: a stacklevel one lower or higher."""
    pipe = make_pipe()
    pipe.scheduler = make_dpm_solver(pipe.scheduler)
    with torch.no_grad():
        next(pipe.denoiser.parameters()).fill_(math.nan)
    with pytest.warns(UserWarning) as seen:
        pipe(0, 1, height=64, width=64)
    for said in ("takes other steps", "was trained at", "hold NaN"):
        assert [each.filename for each in seen if said in str(each.message)] == [__file__], said


def test_networks_put_together_by_hand_say_what_nobody_told_of_their_use(make_pipe, tmp_path):
    """Loaded one by one they know no N, K or guidance, which the folder's model_index.json says."""
    make_pipe(num_inference_steps=6, num_context_steps=3, guidance_scale=1.5).save_pretrained(tmp_path)
    parts = {
        "denoiser": UViTDenoiser.from_pretrained(tmp_path, subfolder="denoiser"),
        "scheduler": DualRateScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        "context_encoder": UViTContextEncoder.from_pretrained(tmp_path, subfolder="context_encoder"),
    }
    with pytest.warns(UserWarning, match="takes num_inference_steps=64, num_context_steps=None, guidance_scale=1.0"):
        DualRatePipeline(**parts)
    with pytest.warns(UserWarning, match="takes num_inference_steps=64, num_context_steps=None. Give"):
        DualRatePipeline(**parts, guidance_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualRatePipeline(**parts, num_inference_steps=6)
        loaded = DualRatePipeline.from_pretrained(tmp_path)
        DualRatePipeline(**loaded.components, **loaded.parameters)
    loaded.to("cpu")
    with pytest.warns(UserWarning, match="takes num_inference_steps=64"):  # nothing of it clings to the networks
        DualRatePipeline(**loaded.components)


def test_a_copy_samples_the_same_and_shares_nothing(make_pipe):
    pipe = make_pipe(id2label={1: "owl"})
    expected, copied = sample(pipe), copy.deepcopy(pipe)
    assert copied.id2label == {1: "owl"} and torch.equal(sample(copied), expected)
    with torch.no_grad():
        for weight in pipe.denoiser.parameters():
            weight.zero_()
    assert torch.equal(sample(copied), expected)


@pytest.mark.parametrize("variant", [None, "ema"])
def test_a_pipeline_saved_in_shards_reloads_bit_equal(make_pipe, tmp_path, variant):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    for name in ("denoiser", "context_encoder"):
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    loaded = DualRatePipeline.from_pretrained(tmp_path, variant=variant)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), sample(pipe))


def test_a_device_map_places_both_networks(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    placed = DualRatePipeline.from_pretrained(tmp_path, device_map="cpu")
    placed.set_progress_bar_config(disable=True)
    assert torch.equal(sample(placed), sample(pipe))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.05)])
def test_a_pair_in_half_precision_samples_nearly_the_same(make_pipe, tmp_path, dtype, tolerance):
    """Eight steps of networks full of noise amplify rounding; an error of type or scale would be of order one."""
    pipe = make_pipe()
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    half = DualRatePipeline.from_pretrained(tmp_path, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert {weight.dtype for network in networks(half) for weight in network.parameters()} == {dtype}
    assert (sample(half) - expected).norm() / expected.norm() < tolerance


def test_weights_may_be_stored_in_eight_bits(make_pipe):
    pipe = make_pipe()
    expected = sample(pipe)
    for network in networks(pipe):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.denoiser.context_proj[0].weight.dtype == torch.float8_e4m3fn
    stored = sample(pipe)
    assert not torch.equal(stored, expected)
    assert (stored - expected).norm() / expected.norm() < 0.5


@pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.accelerator.is_available(), reason="asks this torch for an accelerator"
)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_reaches_the_projection_of_the_context(make_pipe, offload_type):
    pipe = make_pipe()
    expected = sample(pipe)
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=offload_type, **options)
    assert torch.equal(sample(pipe), expected)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (8, 4), (16, 16)])
def test_model_offload_moves_each_network_in_and_out_once_however_many_steps_there_are(make_pipe, monkeypatch, n, k):
    """Here the accelerator is the CPU itself, so the moves are read off the hooks: the projection brings the denoiser
    in as its forward does, and neither network evicts the other. Kills: both in one chain; a projection unhooked."""
    from accelerate.hooks import UserCpuOffloadHook

    pipe, moved = make_pipe(), []
    expected = sample(pipe, n=n, k=k)
    monkeypatch.setattr(UserCpuOffloadHook, "offload", lambda hook: moved.append(hook.model))
    pipe.enable_model_cpu_offload(device="cpu")
    for network in networks(pipe):
        assert network._hf_hook.prev_module_hook is None
        bring_in = network._hf_hook.pre_forward
        network._hf_hook.pre_forward = lambda module, *args, bring_in=bring_in, **kwargs: (
            moved.append((module, "in")) or bring_in(module, *args, **kwargs)
        )
    assert torch.equal(sample(pipe, n=n, k=k), expected)
    assert moved.count((pipe.denoiser, "in")) == n + k and moved.count((pipe.context_encoder, "in")) == k
    assert all(moved.count(network) <= 1 for network in networks(pipe))
    assert all(hasattr(network, "_hf_hook") for network in networks(pipe))  # ready for the next call


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("offload", ["model", "sequential", "group", "none"])
def test_offloaded_weights_compute_on_the_accelerator_and_come_back(make_pipe, offload):
    device = torch.accelerator.current_accelerator()
    pipe = make_pipe()
    expected = sample(pipe)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(device, torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)
    torch.testing.assert_close(sample(pipe), expected, atol=1e-2, rtol=1e-2)
    if offload == "model":
        assert {weight.device.type for network in networks(pipe) for weight in network.parameters()} == {"cpu"}


def test_adapters_on_both_networks_act_in_a_pipeline_and_leave_no_trace(make_pipe):
    pipe = make_pipe()
    expected = sample(pipe)
    for network in networks(pipe):
        network.add_adapter(LoraConfig(r=2, target_modules=["to_out", r"context_proj.0"], init_lora_weights=False))
        assert not torch.equal(sample(pipe), expected)
        network.delete_adapters("default")
        torch.testing.assert_close(sample(pipe), expected)


def test_regional_compilation_compiles_nothing_anew_within_or_after_a_run(make_pipe):
    pipe, compiled = make_pipe(), []
    expected = sample(pipe)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    for network in networks(pipe):
        network.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(sample(pipe), expected)
    once = len(compiled)
    sample(pipe, n=16, k=4)
    assert 0 < len(compiled) == once
    torch.compiler.reset()


def test_an_interrupted_or_failed_call_leaves_the_components_usable_elsewhere(make_pipe):
    pipe = make_pipe()
    expected = sample(pipe)

    def stop(pipe, i, t, tensors):
        if i == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, callback_on_step_end=stop)
    other = DualRatePipeline(**pipe.components, **pipe.parameters)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(sample(other), expected)


IN_TREE = """
import diffusers, json, torch
from diffusers import AutoModel, DDPMScheduler, DiTPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

CLASSES = [diffusers.DiffusionPipeline, ModelMixin, diffusers.ConfigMixin, SchedulerMixin, AutoModel, UNet2DModel,
           DiTPipeline, DDPMScheduler]


def state():
    tables = {name: table for name, table in LOADABLE_CLASSES.items() if name != "diffusers_dualrate"}
    attributes = [{name: repr(value) for name, value in vars(cls).items()} for cls in CLASSES]
    torch.manual_seed(0)
    network = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    images = diffusers.DDPMPipeline(network, DDPMScheduler()).to("cpu")(
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    return json.dumps([tables, ALL_IMPORTABLE_CLASSES, attributes, images.tolist(), torch.get_default_dtype().__repr__(),
                       torch.get_num_threads()], sort_keys=True)


before = state()
import diffusers_dualrate
assert state() == before and "diffusers_dualrate" not in LOADABLE_CLASSES
diffusers_dualrate.DualRatePipeline
after = state()
assert before == after
assert LOADABLE_CLASSES["diffusers_dualrate"] and "diffusers_dualrate" not in before
"""


def test_importing_the_package_changes_nothing_in_tree():
    result = subprocess.run([sys.executable, "-c", IN_TREE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_adapter_of_both_networks_is_saved_in_one_file_and_loaded_set_and_unloaded_by_the_pipeline(
    make_pipe, tmp_path
):
    pipe = make_pipe(num_context_steps=K)
    fresh = copy.deepcopy(pipe)
    plain, layers = sample(pipe), {}
    for name in ("denoiser", "context_encoder"):
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_out"], init_lora_weights=False))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        layers[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()  # of strength 8 at rank 2
    adapted = sample(pipe)
    DualRatePipeline.save_lora_weights(tmp_path, **layers)
    fresh.load_lora_weights(tmp_path, adapter_name="style")
    assert torch.equal(sample(fresh), adapted) and not torch.allclose(adapted, plain, atol=1e-3)
    assert fresh.get_list_adapters() == {"denoiser": ["style"], "context_encoder": ["style"]}
    fresh.set_adapters("style", 0.5)
    half = sample(fresh)
    assert not torch.allclose(half, adapted, atol=1e-3) and not torch.allclose(half, plain, atol=1e-3)
    fresh.unload_lora_weights()
    assert torch.equal(sample(fresh), plain)
    one = {f"denoiser.{name}": weight for name, weight in layers["denoiser_lora_layers"].items()}
    fresh.load_lora_weights(one)
    assert list(fresh.get_list_adapters()) == ["denoiser"]
    with pytest.raises(
        ValueError, match="must hold a LoRA adapter under denoiser. or context_encoder., and hold none"
    ):
        make_pipe().load_lora_weights({"unet.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="nothing to save"):
        DualRatePipeline.save_lora_weights(tmp_path)
