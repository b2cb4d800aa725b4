"""Blocks of Modular Diffusers: sampling at two rates and decoding, to be combined with blocks of one's own.

    pipe = DualRateBlocks().init_pipeline("org/name")
    pipe.load_components()
    image = pipe(class_labels=[0], output="images")[0]

The loop is that of `sampling.py`, which the pipeline goes through, too.
"""

import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam

from .chain import own_caches
from .defaults import NAMES, SamplingDefaults
from .inputs import check_components, make_chain
from .models import UViTContextEncoder, UViTDenoiser
from .sampling import sample_at_two_rates
from .steps import plan_steps

_INPUTS = {
    "class_labels": "Classes by number or name, one or several; `None` for no class.",
    "num_inference_steps": "Number N of steps; default: the model's.",
    "num_context_steps": "Number K of context encoder evaluations; default: the model's.",
    "refresh_steps": "Instead of K, the steps that refresh the context.",
    "timesteps": "Instead of N, the timesteps themselves.",
    "guidance_scale": "Scale of classifier-free guidance; default: the model's where there are classes.",
    "guidance_interval": "Lowest and highest log-SNR at which guidance acts.",
    "batch_size": "Number of images where there are no class labels.",
    "height": "Height in pixels.",
    "width": "Width in pixels.",
    "generator": "Source of noise; in a list, one for each image.",
    "latents": "Noise to start from [B, C, height, width].",
}
_STEPS = ("num_inference_steps", "num_context_steps", "refresh_steps", "timesteps")


class DualRateSampleBlock(ModularPipelineBlocks):
    """From noise to `latents`, images [B, C, height, width] in about [-1, 1], with a pair or a single-rate model."""

    model_name = "dual-rate"
    description = "Samples at two rates: a heavy context encoder at refreshes, a light denoiser at every step."
    expected_components = [
        ComponentSpec("denoiser", UViTDenoiser),
        ComponentSpec("scheduler", SchedulerMixin),
        ComponentSpec("context_encoder", UViTContextEncoder),
    ]
    # What travels with a model in its model_index.json.
    expected_configs = [ConfigSpec(name, None) for name in NAMES]
    inputs = [InputParam(name, description=text) for name, text in _INPUTS.items()]
    intermediate_outputs = [OutputParam("latents", type_hint=torch.Tensor, description="Images before decoding.")]

    def __call__(self, components, state):
        """Sample with the pipeline's loop and put `latents` into the state."""
        block_state = self.get_block_state(state)
        arguments = {name: getattr(block_state, name) for name in _INPUTS}
        context_encoder = getattr(components, "context_encoder", None)
        check_components(components.denoiser, components.scheduler, context_encoder)
        defaults, device = SamplingDefaults.of(components.config), components._execution_device
        steps = plan_steps(
            components.scheduler,
            defaults,
            **{name: arguments.pop(name) for name in _STEPS},
            is_pair=context_encoder is not None,
            device=device,
        )
        chain, block_state.latents = make_chain(
            components.denoiser, context_encoder, steps, defaults, device, num_images_per_prompt=1, **arguments
        )
        with torch.no_grad(), own_caches(chain.context_encoder, chain.denoiser):
            for each in sample_at_two_rates(
                block_state.latents, chain.plan, chain.encode, chain.denoise, chain.step, chain.serves
            ):
                block_state.latents = each.z
        self.set_block_state(state, block_state)
        return components, state


class DualRateDecodeBlock(ModularPipelineBlocks):
    """From `latents` to `images`: PIL images, arrays or tensors in [0, 1]."""

    model_name = "dual-rate"
    description = "Turns images in [-1, 1] into what a user looks at."
    inputs = [
        InputParam("latents", required=True, description="Images [B, C, height, width] in [-1, 1]."),
        InputParam("output_type", default="pil", description='"pil", "np" or "pt".'),
    ]
    intermediate_outputs = [OutputParam("images", description="Images in the form asked for.")]

    def __call__(self, components, state):
        """Decode `latents` into `images`."""
        block_state = self.get_block_state(state)
        processor = VaeImageProcessor(vae_scale_factor=1)
        block_state.images = processor.postprocess(block_state.latents, output_type=block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class DualRateBlocks(SequentialPipelineBlocks):
    """Sampling, then decoding."""

    model_name = "dual-rate"
    description = "Generates images with a Dual-Rate pair or a single-rate model."
    block_classes = [DualRateSampleBlock, DualRateDecodeBlock]
    block_names = ["sample", "decode"]
