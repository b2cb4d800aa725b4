"""Blocks of Modular Diffusers: sampling at two rates and decoding, to be combined with blocks of one's own.

    pipe = DualRateBlocks().init_pipeline("org/name")
    pipe.load_components()
    image = pipe(class_labels=[0], output="images")[0]

The loop is that of `sampling.py`, which the pipeline goes through, too.
"""

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam

from .chain import make_chain, own_caches
from .defaults import NAMES, SamplingDefaults
from .inputs import check_components
from .latents import check_vae, compression_of, decode
from .models import UViTContextEncoder, UViTDenoiser
from .prompts import Conditioning
from .ranges import check_number
from .sampling import sample_at_two_rates
from .steps import plan_steps
from .text_encoding import TextEncoding

_INPUTS = {
    "class_labels": "Classes by number or name, one or several; `None` for no class.",
    "prompt_embeds": "Embeddings of prompts [B, L, D], for a model of text.",
    "negative_prompt_embeds": "Embeddings of what guidance leads away from.",
    "prompt_attention_mask": "Which tokens of the prompts count [B, L].",
    "negative_prompt_attention_mask": "Which tokens of the negative prompts count.",
    "pooled_prompt_embeds": "Embeddings of whole prompts [B, P], for networks that take them beside.",
    "negative_pooled_prompt_embeds": "The same of what guidance leads away from.",
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
# What the block of texts makes, and then what a call may say of the images besides.
_TEXTS = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
_CONDITIONS = ("class_labels", *_TEXTS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_PROMPTS = {
    "prompt": "A prompt or a list of them, for a model of text.",
    "negative_prompt": "What guidance leads away from; default: the empty prompt.",
    "max_sequence_length": "Number of tokens that a prompt is filled up or cut to.",
}
# What travels with a model in its model_index.json.
_CONFIGS = [ConfigSpec(name, None) for name in NAMES]


class DualRateTextBlock(ModularPipelineBlocks):
    """From prompts to their embeddings, for a model of text. A model without a text encoder goes on with those given."""

    model_name = "dual-rate"
    description = "Embeds prompts, and what guidance leads away from."
    expected_components = [
        ComponentSpec("text_encoder"),
        ComponentSpec("tokenizer"),
        ComponentSpec("denoiser", UViTDenoiser),
        ComponentSpec("context_encoder", UViTContextEncoder),
    ]
    expected_configs = _CONFIGS
    inputs = [
        *(InputParam(name, description=text) for name, text in _PROMPTS.items()),
        *(InputParam(name, description=_INPUTS[name]) for name in (*_CONDITIONS, "guidance_scale")),
    ]
    intermediate_outputs = [OutputParam(name, description=_INPUTS[name]) for name in _TEXTS]

    def __call__(self, components, state):
        """Put the embeddings of what the call asks for into the state."""
        block_state = self.get_block_state(state)
        config, device = components.denoiser.config, components._execution_device
        networks = (getattr(components, "context_encoder", None), components.denoiser)
        encoding = TextEncoding.of(components.text_encoder, components.tokenizer, *networks)
        given = {name: getattr(block_state, name) for name in (*_PROMPTS, *_CONDITIONS)}
        needs_encoder = any(given[name] is not None for name in _PROMPTS)
        if needs_encoder or (encoding is not None and config.cross_attention_dim is not None):
            conditioning, defaults = Conditioning(**given), SamplingDefaults.of(components.config)
            scale, _ = defaults.choose_guidance(block_state.guidance_scale, None, conditioning.has_condition)
            guides = check_number("guidance_scale", scale, least=1) > 1
            text, null = conditioning.encode(config, encoding, device, 1, guides)
            negative = (None, None) if null is None else (null.tokens, null.mask)
            embeds = (text.tokens, negative[0], text.mask, negative[1])
            for name, tensor in zip(_TEXTS, embeds, strict=True):
                setattr(block_state, name, tensor)
        self.set_block_state(state, block_state)
        return components, state


class DualRateSampleBlock(ModularPipelineBlocks):
    """From noise to `latents`, images [B, C, height, width] in about [-1, 1], with a pair or a single-rate model."""

    model_name = "dual-rate"
    description = "Samples at two rates: a heavy context encoder at refreshes, a light denoiser at every step."
    expected_components = [
        ComponentSpec("denoiser", UViTDenoiser),
        ComponentSpec("scheduler", SchedulerMixin),
        ComponentSpec("context_encoder", UViTContextEncoder),
        ComponentSpec("vae", ModelMixin),
    ]
    expected_configs = _CONFIGS
    inputs = [InputParam(name, description=text) for name, text in _INPUTS.items()]
    intermediate_outputs = [OutputParam("latents", type_hint=torch.Tensor, description="Images before decoding.")]

    def __call__(self, components, state):
        """Sample with the pipeline's loop and put `latents` into the state."""
        block_state = self.get_block_state(state)
        arguments = {name: getattr(block_state, name) for name in _INPUTS}
        context_encoder = getattr(components, "context_encoder", None)
        check_components(components.denoiser, components.scheduler, context_encoder)
        vae = getattr(components, "vae", None)
        check_vae(vae, components.denoiser.config.in_channels, components.scheduler)
        defaults, device = SamplingDefaults.of(components.config), components._execution_device
        steps = plan_steps(
            components.scheduler,
            defaults,
            **{name: arguments.pop(name) for name in _STEPS},
            is_pair=context_encoder is not None,
            device=device,
        )
        chain, block_state.latents = make_chain(
            components.denoiser,
            context_encoder,
            steps,
            defaults,
            device,
            conditioning=Conditioning(**{name: arguments.pop(name) for name in _CONDITIONS}),
            num_images_per_prompt=1,
            pixels_per_side=compression_of(vae),
            **arguments,
        )
        with torch.no_grad(), own_caches(chain.context_encoder, chain.denoiser):
            loop = sample_at_two_rates(block_state.latents, chain.plan, chain.encode, chain.denoise, chain.step)
            for each in loop:
                block_state.latents = each.z
        self.set_block_state(state, block_state)
        return components, state


class DualRateDecodeBlock(ModularPipelineBlocks):
    """From `latents` to `images`: PIL images, arrays or tensors in [0, 1]."""

    model_name = "dual-rate"
    description = "Turns images in [-1, 1], or the latents of an autoencoder, into what a user looks at."
    expected_components = [ComponentSpec("vae", ModelMixin)]
    inputs = [
        InputParam("latents", required=True, description="Images [B, C, height, width] in [-1, 1]."),
        InputParam("output_type", default="pil", description='"pil", "np" or "pt".'),
    ]
    intermediate_outputs = [OutputParam("images", description="Images in the form asked for.")]

    def __call__(self, components, state):
        """Decode `latents` into `images`."""
        block_state = self.get_block_state(state)
        vae, latents = getattr(components, "vae", None), block_state.latents
        images = latents if vae is None else decode(vae, latents)
        processor = VaeImageProcessor(vae_scale_factor=compression_of(vae))
        block_state.images = processor.postprocess(images, output_type=block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class DualRateBlocks(SequentialPipelineBlocks):
    """Prompts to embeddings, sampling, decoding."""

    model_name = "dual-rate"
    description = "Generates images with a Dual-Rate pair or a single-rate model."
    block_classes = [DualRateTextBlock, DualRateSampleBlock, DualRateDecodeBlock]
    block_names = ["text_encoder", "sample", "decode"]
