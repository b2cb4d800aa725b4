"""diffusers' own testers on our classes: the mixins that its tests derive the tests of its own classes from.

They are in the tests folder of its repository, which no package holds, so they run where a checkout is given:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers ../diffusers
    DIFFUSERS_CHECKOUT=../diffusers pytest tests/test_host_testers.py

Choose the tag of the installed version, or the nearest: only `tests` is imported, the library stays as installed.
Below are the adapters that the testers ask for and, with the reason for each, what of them does not apply to us.
"""

import functools
import importlib
import os

import pytest
import torch

from conftest import PRESET, fill_with_noise
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser

if not (CHECKOUT := os.environ.get("DIFFUSERS_CHECKOUT")):
    pytest.skip("set DIFFUSERS_CHECKOUT to a checkout of diffusers to run its testers", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:
    # For the imports alone: a regular package goes before our folder of the same name, which is none. The testers
    # carry marks that the checkout's conftest.py registers; it is not loaded, since it puts the checkout's src first.
    patch.syspath_prepend(CHECKOUT)
    patch.setattr(pytest.mark, "_config", None)
    host = importlib.import_module("tests.testing_utils")
    host_models = importlib.import_module("tests.models.testing_utils")
    host_lora = importlib.import_module("tests.models.testing_utils.lora")
    host_pipelines = importlib.import_module("tests.pipelines.testing_utils")
    host_params = importlib.import_module("tests.pipelines.pipeline_params")
    host_schedulers = importlib.import_module("tests.schedulers.test_schedulers")

# Tests that fail on our classes as they should: strictly, so that one which comes to pass must leave this list.
NOT_FOR_US = {
    "test_from_save_pretrained_variant": "expects the error to name a pickle, which our networks never look for",
    "test_correct_lora_configs_with_different_ranks": "sets the rank of a module to_k; our projections are fused",
    "test_disk_offload_without_safetensors": "offloads from a pickle, which our networks do not load",
    "test_trained_betas": "our schedule is a function of log-SNR and takes no betas",
}


@pytest.fixture(autouse=True)
def expect_what_is_listed(request):
    if reason := NOT_FOR_US.get(request.node.originalname):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(autouse=True, scope="class")
def bridges(request):
    """What lets the testers compare, save and adapt."""
    with pytest.MonkeyPatch.context() as patch:
        # Our networks end in zeros, of which any comparison would be vacuous.
        for network in (UViTContextEncoder, UViTDenoiser):
            patch.setattr(network, "__init__", full_of_noise(network.__init__))
        # The testers take an output to be one tensor.
        if request.cls and issubclass(request.cls, ContextEncoderConfig):
            patch.setattr(UViTContextEncoder, "forward", as_one_tensor(UViTContextEncoder.forward))
        # They save pickles, which ours do not load, where they could as well save safetensors.
        patch.setattr(DualRatePipeline, "save_pretrained", as_safetensors(DualRatePipeline.save_pretrained))
        # They adapt attention's projections by name; ours are fused.
        patch.setattr(host_lora, "LoraConfig", on_our_projections(host_lora.LoraConfig))
        yield


def full_of_noise(init):
    @functools.wraps(init)
    def noisy(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.device.type != "meta":
            fill_with_noise(self, seed=1).train()

    return noisy


def as_one_tensor(forward):
    @functools.wraps(forward)
    def joined(*args, **kwargs):
        output = forward(*args, **kwargs)
        context = torch.cat([part.flatten(1) for part in output[0]], dim=1)
        return (context,) if isinstance(output, tuple) else type(output)(context=context)

    return joined


def as_safetensors(save):
    return lambda self, folder, safe_serialization=True, **options: save(self, folder, **options)


def on_our_projections(make_config):
    ours = {"to_q": "to_qkv_mlp_proj", "to_k": "to_out", "to_v": "to_out", "to_out.0": "to_out"}

    def config(target_modules, **kwargs):
        return make_config(target_modules=sorted({ours.get(name, name) for name in target_modules}), **kwargs)

    return config


# Two blocks, as testers give processors to some attention modules and not to others.
TINY = {"sample_size": 8, "level_blocks": [1, 2]}


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(host.torch_device)


class NetworkConfig(host_models.BaseModelTesterConfig):
    main_input_name = cache_input_key = "sample"
    different_shapes_for_compilation = [(8, 8), (16, 16), (8, 12)]

    def get_init_dict(self):
        return PRESET[self.preset] | TINY

    def get_dummy_inputs(self, height=8, width=8):
        log_snr, labels = torch.tensor([-1.0, 2.0]), torch.tensor([1, 3])
        inputs = {"sample": randn(2, 3, height, width), "log_snr": log_snr, "class_labels": labels}
        return {name: value.to(host.torch_device) for name, value in inputs.items()}


class ContextEncoderConfig(NetworkConfig):
    model_class, preset = UViTContextEncoder, "context_encoder"
    output_shape = (8 * 4 * 4 + 8 * 2 * 2,)


class DenoiserConfig(NetworkConfig):
    model_class, preset = UViTDenoiser, "denoiser"
    output_shape = (3, 8, 8)

    def get_dummy_inputs(self, height=8, width=8):
        context = (randn(2, 8, height // 2, width // 2), randn(2, 16, height // 4, width // 4))
        context_log_snr = torch.tensor([-3.0, -2.0], device=host.torch_device)
        return super().get_dummy_inputs(height, width) | {"context": context, "context_log_snr": context_log_snr}


class PipelineConfig(host_pipelines.BasePipelineTesterConfig):
    pipeline_class = DualRatePipeline
    required_input_params_in_call_signature = host_params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = host_params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    output_shape = (3, 8, 8)

    def get_dummy_components(self):
        torch.manual_seed(0)
        return {
            "denoiser": UViTDenoiser(**PRESET["denoiser"] | TINY),
            "scheduler": DualRateScheduler(**PRESET["scheduler"]),
            "context_encoder": UViTContextEncoder(**PRESET["context_encoder"] | TINY),
        }

    def get_dummy_inputs(self):
        options = {"num_inference_steps": 4, "num_context_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
        return {"class_labels": 1, "generator": self.get_generator(0), **options}


NETWORK_TESTERS = "Model Attention AttentionBackend PyramidAttentionBroadcast TaylorSeerCache Lora Memory Training"
TESTERS = [
    (ContextEncoderConfig, host_models, f"{NETWORK_TESTERS} TorchCompile"),
    # The one of hot swapping reads an output called sample, which the encoder's is not.
    (DenoiserConfig, host_models, f"{NETWORK_TESTERS} TorchCompile LoraHotSwappingForModel"),
    (PipelineConfig, host_pipelines, "Pipeline Memory"),
]
for config, package, testers in TESTERS:
    for tester in testers.split():  # a class for each, since testers have helpers of the same name
        name = f"Test{config.__name__.removesuffix('Config')}{tester}"
        globals()[name] = type(name, (config, getattr(package, f"{tester}TesterMixin")), {"__module__": __name__})


class TestScheduler(host_schedulers.SchedulerCommonTest):
    scheduler_classes = (DualRateScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)

    def get_scheduler_config(self, **changes):
        return PRESET["scheduler"] | changes


# Testers that are left out as a whole, by the module that they are in: of the networks, then of the pipeline.
LEFT_OUT = {
    "models.testing_utils.cache": "caches that skip stacks of blocks, which enable_cache refuses for a U-ViT",
    "models.testing_utils.ip_adapter": "image prompts; the networks take class labels",
    "models.testing_utils.parallelism": "several accelerators and a _cp_plan or _tp_plan, which the networks lack",
    "models.testing_utils.quantization": "an accelerator and, for most, a published checkpoint quantized on the fly",
    "models.testing_utils.single_file": "other repositories' checkpoint formats; ours have one format",
    "pipelines.testing_utils.cache": "look for the cached network under `transformer` or `unet`",
    "pipelines.testing_utils.lora": "LoraBaseMixin; adapters are loaded into the networks, not through the pipeline",
}


ALL_TESTERS = [
    getattr(package, name) for package in (host_models, host_pipelines) for name in package.__all__ if "Tester" in name
]


@pytest.mark.parametrize("tester", ALL_TESTERS, ids=lambda tester: f"{tester.__module__}.{tester.__name__}")
def test_every_tester_of_the_host_is_run_or_left_out_for_a_reason(tester):
    if not any(issubclass(value, tester) for name, value in globals().items() if name.startswith("Test")):
        reason = LEFT_OUT.get(tester.__module__.removeprefix("tests."))
        pytest.skip(reason) if reason else pytest.fail(f"{tester.__name__} is new: run it or say why not")
