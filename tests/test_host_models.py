"""What users of diffusers do with a model, done with both networks: casting, adapters, processors, shards, compiling.

Each result is compared with the network left alone, or with one changed by hand.
"""

import copy
import json

import pytest
import torch
from diffusers import AutoModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from diffusers_dualrate.uvit import UViTAttnProcessor, UViTParallelSelfAttention

needs_host_onload = pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.accelerator.is_available(), reason="asks this torch for an accelerator"
)


@pytest.fixture(params=["context_encoder", "denoiser"])
def network(request, make_networks):
    encoder, denoiser = make_networks(num_classes=4, denoiser={"context_channels": None})
    return encoder if request.param == "context_encoder" else denoiser


def run(network, dtype=torch.float32):
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        (output,) = network(sample, torch.tensor([-1.0, 2.0]), torch.tensor([1, 3]), return_dict=False)
    return torch.cat([part.flatten() for part in output]) if isinstance(output, tuple) else output.flatten()


def attention_modules(network):
    return [module for module in network.modules() if isinstance(module, UViTParallelSelfAttention)]


def test_regional_compilation_compiles_every_block_to_one_graph(network):
    expected, compiled = run(network), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    network.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(run(network), expected)
    once = len(compiled)
    assert once > 0
    run(network)
    assert len(compiled) == once
    torch.compiler.reset()


def test_attention_processors_can_be_listed_and_replaced(network):
    class Louder(UViTAttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    plain, count = run(network), len(attention_modules(network))
    assert len(network.attn_processors) == count > 0
    assert all(name.endswith(".attn.processor") for name in network.attn_processors)
    network.set_attn_processor(Louder())
    assert all(isinstance(processor, Louder) for processor in network.attn_processors.values())
    louder = run(network)
    network.set_attn_processor(UViTAttnProcessor())
    for module in attention_modules(network):
        with torch.no_grad():
            module.to_out.weight.mul_(2)
            module.to_out.bias.mul_(2)
    assert not torch.allclose(louder, plain)
    torch.testing.assert_close(louder, run(network))
    with pytest.raises(ValueError, match="number of processors"):
        network.set_attn_processor({})


def test_projections_that_are_fused_already_stay_as_they_are(network):
    names, plain = list(network.state_dict()), run(network)
    network.fuse_qkv_projections()
    assert list(network.state_dict()) == names and torch.equal(run(network), plain)


def test_the_attention_backend_is_the_dispatchers(network, monkeypatch):
    """Attention goes through the registry, [B, S, heads, head_dim], unmasked. Kills: a call of torch's attention."""
    from diffusers.models import attention_dispatch

    plain, calls = run(network), []
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(network), plain, atol=1e-5, rtol=1e-5)

    dispatch = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape, attn_mask))
        return dispatch(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention_dispatch.torch.nn.functional, "scaled_dot_product_attention", note)
    run(network)
    assert len(calls) == len(attention_modules(network))
    assert all(mask is None and shape[-1] == network.config.attention_head_dim for shape, mask in calls)


def test_a_backend_set_on_one_network_stays_on_it(network, make_networks):
    plain = run(network)
    before = attention_registry_state()
    try:
        network.set_attention_backend("_native_math")
        assert {processor._attention_backend for processor in network.attn_processors.values()} == {"_native_math"}
        torch.testing.assert_close(run(network), plain, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="must be one of"):
            network.set_attention_backend("no such backend")
    finally:
        network.reset_attention_backend()
        restore_attention_registry(before)
    assert {processor._attention_backend for processor in network.attn_processors.values()} == {None}
    assert attention_registry_state() == before
    assert torch.equal(run(network), plain)


def attention_registry_state():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._active_backend


def restore_attention_registry(backend):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    _AttentionBackendRegistry._active_backend = backend


def test_layerwise_casting_rounds_what_is_stored_and_spares_norms_and_embeddings(network):
    rounded, spared = copy.deepcopy(network), ("embed", "norm", "proj_out")  # the last by the host's own choice
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                if not any(word in name for word in spared):
                    for weight in module.parameters():
                        weight.copy_(weight.to(torch.float8_e4m3fn))
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {weight.dtype for weight in network.parameters()}
    assert stored == {torch.float8_e4m3fn, torch.float32}
    assert network.trunk.patch_embed.weight.dtype == torch.float32 == network.class_embedding.weight.dtype
    assert network.trunk.middle.blocks[0].norm.weight.dtype == torch.float32
    assert network.trunk.middle.blocks[0].attn.to_out.weight.dtype == torch.float8_e4m3fn
    assert network.dtype == torch.float32
    torch.testing.assert_close(run(network), run(rounded))


@needs_host_onload
@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload_computes_the_same(network, options):
    expected = run(network)
    apply_group_offloading(network, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options)
    assert torch.equal(run(network), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_single(network, dtype, tolerance):
    expected = run(network)
    output = run(network.to(dtype), dtype)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < tolerance


def test_weights_in_shards_or_a_variant_reload_bit_equal(network, tmp_path):
    expected = run(network)
    network.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = set(
        json.loads((tmp_path / "sharded/diffusion_pytorch_model.safetensors.index.json").read_text())[
            "weight_map"
        ].values()
    )
    assert len(shards) > 1 and shards <= {path.name for path in (tmp_path / "sharded").iterdir()}
    assert torch.equal(run(type(network).from_pretrained(tmp_path / "sharded")), expected)
    network.save_pretrained(tmp_path / "variant", variant="ema")
    assert torch.equal(run(type(network).from_pretrained(tmp_path / "variant", variant="ema")), expected)
    with pytest.raises(OSError):
        type(network).from_pretrained(tmp_path / "variant")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_places_the_whole_network(network, tmp_path, device_map):
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path, device_map=device_map)
    assert {weight.device.type for weight in loaded.parameters()} <= {"cpu", "cuda"}
    if loaded.device.type == "cpu":
        assert torch.equal(run(loaded), run(network))


def test_lora_is_added_trained_saved_loaded_and_deleted(network, tmp_path):
    plain = run(network)
    bare, names = copy.deepcopy(network), list(network.state_dict())
    network.add_adapter(
        LoraConfig(r=2, target_modules=["to_qkv_mlp_proj", "to_out"], init_lora_weights=False), "style"
    )
    adapted = run(network)
    assert not torch.allclose(adapted, plain)
    network.requires_grad_(False)
    network.set_adapters("style")
    network.disable_lora()
    torch.testing.assert_close(run(network), plain)
    network.enable_lora()
    torch.testing.assert_close(run(network), adapted)

    with pytest.raises(ValueError, match="has adapters, which save_lora_weights saves"):
        network.save_pretrained(tmp_path)
    network.save_lora_adapter(tmp_path, adapter_name="style")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    file = {"weight_name": "pytorch_lora_weights.safetensors"}  # without a network, the host does not guess
    bare.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", **file)
    torch.testing.assert_close(run(bare), adapted)
    bare.set_adapters("style", 0.0)
    torch.testing.assert_close(run(bare), plain)
    for changed in (network, bare):
        changed.delete_adapters("style")
        torch.testing.assert_close(run(changed), plain)
    network.unload_lora()
    assert list(network.state_dict()) == names


def test_lora_fused_into_the_weights_computes_what_it_computed_beside_them(network):
    plain = run(network)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_qkv_mlp_proj", "to_out"], init_lora_weights=False))
    adapted = run(network)
    network.fuse_lora()
    torch.testing.assert_close(run(network), adapted, atol=1e-5, rtol=1e-4)
    network.unfuse_lora()
    torch.testing.assert_close(run(network), adapted, atol=1e-5, rtol=1e-4)
    network.disable_lora()
    torch.testing.assert_close(run(network), plain, atol=1e-5, rtol=1e-4)


def test_auto_model_finds_a_network_in_a_repository(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    for name in ("denoiser", "context_encoder"):
        loaded = AutoModel.from_pretrained(str(tmp_path), subfolder=name)
        assert type(loaded) is type(pipe.components[name])
        assert torch.equal(run(loaded), run(pipe.components[name]))
