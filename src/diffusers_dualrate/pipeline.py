"""`DualRatePipeline`: what users of diffusers expect around the two-rate loop of `sampling.py`."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .adapters import LoraMixin
from .callbacks import CONDITIONS, Call, CallStateMixin, call_back
from .chain import Chain, make_chain, own_caches
from .class_labels import ClassLabels
from .defaults import NAMES, SamplingDefaults, check_id2label, end_named_steps
from .graphs import GraphsMixin, lend
from .host_pipelines import OfHostError, check_own, open_host_pipeline
from .hosts import HostNetwork
from .inputs import (
    check_components,
    check_delivery,
    check_encoder_denoises,
    check_images,
    describe_unsaid,
    warn_of_lone_denoiser,
)
from .latents import check_vae, compression_of, decode
from .models import UViTContextEncoder, UViTDenoiser
from .network import find_foreign, refuse_adapters, without_origin
from .origins import KEY, access, origin_of_vae, write_into_config
from .prompts import Conditioning, PromptMixin
from .refreshes import RefreshPlan
from .repositories import RepositoryMixin, check_index, name_classes, refuse_pickles
from .sampling import sample_at_two_rates
from .steps import plan_steps
from .text_encoding import TextEncoding

_REQUIRED = ("denoiser", "scheduler")


class DualRatePipeline(RepositoryMixin, PromptMixin, CallStateMixin, GraphsMixin, LoraMixin, DiffusionPipeline):
    """Generate images with a pair of networks at two rates, or with a single-rate network.

    `DualRatePipeline(**pipe.components, **pipe.parameters)` makes another of the same parts and defaults. Several calls may
    run at once: the state of a call is its own.

    Args:
        denoiser: Network that runs at every step, or with `encoder_denoises` at those that do not refresh.
        scheduler: [`DualRateScheduler`], or an in-tree variance-preserving scheduler that predicts v.
        context_encoder: Network that runs at refreshes only; `None` for a single-rate model.
        vae: Autoencoder of diffusers (`AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`) whose latents the networks draw;
            `None` for networks of pixels.
        text_encoder: For networks of text, an encoder of transformers that has a `last_hidden_state` (`CLIPTextModel`,
            `T5EncoderModel`); `None` where calls give embeddings.
        tokenizer: Its tokenizer.
        id2label: Name of each class.
        num_inference_steps: Default number N of steps; 64 if left out.
        num_context_steps: Default number K of encoder evaluations per image; `None` refreshes at every step.
        context_from: Time of the first context, a share of the chain (1 is its noisy end). Noisier steps go without
            context; the K refreshes are spread over the others. `None` refreshes at the first step.
        refresh_steps: Instead of both, the steps that refresh when N is the default. A new N, K or `context_from` ends them.
        context_free: Whether the pair learned to go without context. Only then may refreshes begin late.
        guidance_scale: Default guidance scale; 1 is none.
        guidance_interval: Default lowest and highest log-SNR at which guidance acts; `None` for all.
        encoder_denoises: Whether refreshes take the encoder's own prediction, so that the denoiser runs at the N − K other
            steps only. It is for pairs trained with `--follow_encoder` (beyond the paper).
        is_distilled: Whether the model was distilled into its own steps and guidance; others bring a warning.

    Raises:
        ValueError: If the two networks do not fit each other, or the defaults do not.
    """

    denoiser: UViTDenoiser | HostNetwork
    scheduler: SchedulerMixin
    context_encoder: UViTContextEncoder | HostNetwork | None
    vae: ModelMixin | None
    text_encoder: Any
    tokenizer: Any
    image_processor: VaeImageProcessor

    # The encoder comes and goes within a run: in one chain the two networks would evict each other at every refresh.
    model_cpu_offload_seq = "text_encoder->denoiser->vae"
    _optional_components = ["context_encoder", "vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "context", *CONDITIONS]

    def __init__(
        self,
        denoiser: UViTDenoiser | HostNetwork,
        scheduler: SchedulerMixin,
        context_encoder: UViTContextEncoder | HostNetwork | None = None,
        vae: ModelMixin | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        id2label: dict | None = None,
        num_inference_steps: int | None = None,
        num_context_steps: int | None = None,
        context_from: float | None = None,
        refresh_steps: Sequence[int] | None = None,
        context_free: bool | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        encoder_denoises: bool | None = None,
        is_distilled: bool | None = None,
    ):
        super().__init__()
        check_components(denoiser, scheduler, context_encoder, TextEncoding.of(text_encoder, tokenizer))
        check_vae(vae, denoiser.config.in_channels, scheduler)
        warn_of_lone_denoiser(denoiser, context_encoder)
        given = {
            "id2label": id2label,
            "num_inference_steps": num_inference_steps,
            "num_context_steps": num_context_steps,
            "context_from": context_from,
            "refresh_steps": refresh_steps,
            "context_free": context_free,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "encoder_denoises": encoder_denoises,
            "is_distilled": is_distilled,
        }
        given = {name: value for name, value in given.items() if value is not None}
        defaults = SamplingDefaults.of(given)
        if context_encoder is not None:
            defaults.check_refreshes()
        check_encoder_denoises(defaults.encoder_denoises, context_encoder, denoiser)
        id2label = check_id2label(defaults.id2label, denoiser.config.num_classes)
        names = {str(key): name for key, name in id2label.items()} or None
        if num_inference_steps is None:
            warnings.warn(describe_unsaid(defaults, given, denoiser, context_encoder), stacklevel=2)
        parts = {"context_encoder": context_encoder, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(denoiser=denoiser, scheduler=scheduler, **parts)
        self.register_to_config(**{name: getattr(defaults, name) for name in NAMES} | {"id2label": names})
        self.image_processor = VaeImageProcessor(vae_scale_factor=compression_of(vae))
        # The newest call, and all that are running.
        self._call, self._running = Call(), list[Call]()

    def register_to_config(self, **kwargs) -> None:
        """Change defaults; N, K or `context_from` take the place of `refresh_steps`.

        Raises:
            ValueError: If a default is out of its range.
        """
        given = end_named_steps(kwargs)
        if not given.keys().isdisjoint(NAMES):
            SamplingDefaults.of({**getattr(self, "_internal_dict", {}), **given})
        super().register_to_config(**given)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs) -> "DualRatePipeline":
        """Take over the components and defaults of another pipeline, but for those that are given.

        The components are shared, and keep their precision unless `dtype` is given.
        """
        parts: list[Any] = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        kept = {} if {"dtype", "torch_dtype"} & kwargs.keys() else {part: part.dtype for part in parts}
        kwargs.setdefault("vae", pipeline.components.get("vae"))  # the host takes over exact classes only
        made = super().from_pipe(pipeline, **end_named_steps(kwargs))
        for part, dtype in kept.items():
            if part.dtype != dtype:  # the host casts to float32
                part.to(dtype=dtype)
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "DualRatePipeline":
        """Load a model from a Hub repository, a local folder or the cache; weights from safetensors files only.

        Takes what `DiffusionPipeline.from_pretrained` takes; without a `dtype` all is float32. A repository's code runs only
        if `custom_pipeline` and `trust_remote_code` ask for it. An encoder that it names, and does not hold, comes from there.
        """
        index, kwargs = Path(str(pretrained_model_name_or_path), cls.config_name), end_named_steps(kwargs)
        kwargs = kwargs if {"dtype", "torch_dtype"} & kwargs.keys() else {**kwargs, "dtype": torch.float32}
        try:
            if index.is_file():
                config = cls._dict_from_json_file(index)
                for name in _REQUIRED:
                    if kwargs.get(name) is None and config.get(name) in (None, [None, None]):
                        raise ValueError(f"{index} names no {name}: give one as an argument.")
            with access(kwargs):
                return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        except OfHostError:  # a single-rate model, with its scheduler and its number of steps
            given = {name: kwargs.pop(name) for name in NAMES if name in kwargs}
            return cls(**open_host_pipeline(pretrained_model_name_or_path, **kwargs) | given)

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        index = super()._dict_from_json_file(json_file)
        return check_own(json_file, check_index(json_file, index, ("context_encoder", *_REQUIRED)))

    def save_pretrained(
        self, save_directory, safe_serialization: bool = True, *args, include_encoder: bool = False, **kwargs
    ) -> None:
        """Save the model as a repository. Takes what the host's method takes.

        A context encoder that was loaded from another repository on the Hub, and is as it is there, is named and left out,
        but for `include_encoder`. Beside each component lies a line of code that names its class, as the host asks of
        classes it does not know. So people who never import this package, but have it installed, load the model by
        `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`. Nobody else runs it.
        """
        refuse_pickles(safe_serialization)
        refuse_adapters(denoiser=self.denoiser, context_encoder=(encoder := self.context_encoder))
        if include_encoder and encoder is not None:
            own = self._with(context_encoder=without_origin(encoder))
            return own.save_pretrained(save_directory, True, *args, **kwargs)
        origin = None if kwargs.get("push_to_hub") or encoder is None else find_foreign(encoder, self.denoiser)
        if encoder is None or origin is None:
            super().save_pretrained(save_directory, True, *args, **kwargs)
        else:
            rest = copy.copy(self)
            rest.register_modules(context_encoder=None)
            super(DualRatePipeline, rest).save_pretrained(save_directory, True, *args, **kwargs)
            encoder.save_what_is_new(Path(save_directory, "context_encoder"), origin, kwargs.get("variant"))
            self.save_config(save_directory)
        if self.vae is not None:
            theirs = origin_of_vae(self.vae)
            write_into_config(Path(save_directory, "vae"), **({} if theirs is None else {KEY: theirs.to_json()}))
        name_classes(save_directory, self, self.components)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class, empty where none are known."""
        return check_id2label(self.config.id2label, self.denoiser.config.num_classes)

    def heavy_alone(self) -> "DualRatePipeline":
        """The pair's heavy network as a single-rate model with the pair's defaults; a single-rate model as it is.

        Raises:
            ValueError: If the encoder hands over no prediction, so that it draws nothing alone.
        """
        encoder = getattr(self.context_encoder, "_orig_mod", self.context_encoder)  # what `torch.compile` wrapped
        if encoder is None:
            return self
        kind: Any = HostNetwork if isinstance(encoder, HostNetwork) else UViTDenoiser
        kept = ("num_inference_steps", "guidance_scale", "guidance_interval", "id2label")
        parts = self.components | {"denoiser": kind.from_encoder(encoder), "context_encoder": None}
        return type(self)(**parts, **{name: self.config[name] for name in kept})

    def plan_run(
        self,
        num_inference_steps: int | None = None,
        num_context_steps: int | None = None,
        *,
        refresh_steps: Sequence[int] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> RefreshPlan:
        """The plan that a call with these arguments follows. Printed, it is a diagram. The call documents them."""
        n, k, is_pair = num_inference_steps, num_context_steps, self.context_encoder is not None
        named: dict[str, Any] = {"refresh_steps": refresh_steps, "timesteps": timesteps}
        return plan_steps(self.scheduler, SamplingDefaults.of(self.config), n, k, **named, is_pair=is_pair).plan

    @torch.no_grad()
    def __call__(
        self,
        prompt: ClassLabels | None = None,
        num_inference_steps: int | None = None,
        num_context_steps: int | None = None,
        *,
        class_labels: ClassLabels | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        refresh_steps: Sequence[int] | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: For a model of text, a prompt or a list of them. For a model of classes it is `class_labels`.
            num_inference_steps: Number N of steps; default: the model's.
            num_context_steps: Number K ≤ N of context encoder evaluations, spread evenly over the steps at or below
                `context_from` where the model has one; default: the model's, at most as many as there are such steps.
            class_labels: Classes by number or name, one or several, or an integer tensor; `None` for no class.
            negative_prompt: What guidance leads away from, for all prompts or each; default: the empty prompt.
            prompt_embeds: Instead of `prompt`, embeddings [B, L, D] of `encode_prompt`.
            negative_prompt_embeds: Instead of `negative_prompt`, embeddings of the same shape.
            prompt_attention_mask: Which tokens of `prompt_embeds` count [B, L]; default: all.
            negative_prompt_attention_mask: The same of `negative_prompt_embeds`.
            pooled_prompt_embeds: Beside `prompt_embeds`, embeddings of whole texts [B, P], for networks that take them.
            negative_pooled_prompt_embeds: The same beside `negative_prompt_embeds`.
            max_sequence_length: Number of tokens that a prompt is filled up or cut to; default: the networks' `text_length`.
            refresh_steps: Instead of K, the steps that refresh the context, rising. Those before the first go without,
                which the pair must have learned. Default: the model's, where N is the model's, too.
            timesteps: Instead of N, the timesteps themselves, falling.
            guidance_scale: Scale of classifier-free guidance, 1 for none; default: the model's where there are classes or prompts.
            guidance_interval: Lowest and highest log-SNR at which it acts (arXiv 2404.07724); default: the model's.
            batch_size: Number of images where neither prompt nor `class_labels` is given; default 1.
            num_images_per_prompt: Images for each prompt or class label.
            height: Height in pixels; default: that of the network.
            width: Width in pixels; default: that of the network.
            generator: Source of noise. In a list, one for each image, which then depends on its own seed alone.
            latents: Noise to start from [B, C, height, width] instead of drawing it; its sides are those of the latents.
            output_type: "pil"; "np" [B, height, width, C] or "pt" [B, C, height, width], both in [0, 1]; or "latent", the
                tensor as the scheduler leaves it, about [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` or a plain tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; the tensors it
                returns replace the loop's. The pipeline is a shallow copy that belongs to this call, with the scheduler
                of this call: the callback may set its `_interrupt` or `_guidance_scale`.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: latents, class_labels, prompt_embeds,
                negative_prompt_embeds, context (the projected maps in a tuple, or `None`).

        Raises:
            ValueError: If an argument is out of its range, before anything is computed.
        """
        check_vae(self.vae, self.denoiser.config.in_channels, self.scheduler)  # which may be another than it was
        tensor_inputs = check_delivery(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        texts = prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask
        pooled = pooled_prompt_embeds, negative_pooled_prompt_embeds
        defaults, device = SamplingDefaults.of(self.config), self._execution_device
        steps = plan_steps(
            self.scheduler,
            defaults,
            num_inference_steps,
            num_context_steps,
            refresh_steps=refresh_steps,
            timesteps=timesteps,
            is_pair=self.context_encoder is not None,
            device=device,
        )
        chain, noise = make_chain(
            self.denoiser,
            self.context_encoder,
            steps,
            defaults,
            device,
            self._text_encoding,
            conditioning=Conditioning(prompt, class_labels, negative_prompt, *texts, max_sequence_length, *pooled),
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            batch_size=batch_size,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            pixels_per_side=compression_of(self.vae),
        )
        latents = self._sample(chain, noise, callback_on_step_end, tensor_inputs)
        images = latents if self.vae is None or output_type == "latent" else decode(self.vae, latents)
        check_images(images, output_type)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(self, chain: Chain, noise: Tensor, callback: Callable | None, tensor_inputs: Sequence[str]) -> Tensor:
        """Go through the loop with what the host adds to it: progress, callbacks, interruption."""
        call = Call(chain.guidance, num_timesteps=len(chain.plan))
        own = self._with(_call=call, _running=[], scheduler=chain.scheduler)  # as callbacks see it
        latents, timesteps = noise, chain.timesteps
        try:
            with (
                own_caches(chain.context_encoder, chain.denoiser),
                lend(self._recordings, chain.context_encoder, chain.denoiser, watch=callback is not None) as chain.run,
                self.progress_bar(total=len(chain.plan)) as progress_bar,
            ):
                self._call = call  # from here on: a call that is refused must not hide the one that runs
                self._running.append(call)
                call.timestep = timesteps[0]
                loop = sample_at_two_rates(noise, chain.plan, chain.encode, chain.denoise, chain.step, chain.serves)
                for i, state in enumerate(loop):
                    if callback is not None:
                        call_back(callback, own, i, timesteps[i], chain, state, tensor_inputs)
                    latents = state.z
                    progress_bar.update()
                    if call.interrupt:
                        break
                    call.timestep = timesteps[min(i + 1, len(timesteps) - 1)]
        finally:
            call.timestep = None
            if call in self._running:
                self._running.remove(call)
        return latents

    def _with(self, **attributes: Any) -> "DualRatePipeline":
        """A shallow copy that has other attributes."""
        own = copy.copy(self)
        # Past the host's setter, which would write the configuration anew.
        own.__dict__.update(attributes)
        return own
