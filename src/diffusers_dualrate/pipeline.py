"""`DualRatePipeline`: the two-rate loop.

In N steps the context encoder runs K times, the denoiser at each, or at those alone that do not refresh; between
refreshes it reuses the newest context. Without an encoder the pipeline samples an ordinary single-rate model.
"""

import contextlib
import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import HookRegistry
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .models import UViTContextEncoder, UViTDenoiser
from .scheduler import DualRateScheduler, log_snr_of_steps, plan_refreshes

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DualRatePipeline(DiffusionPipeline):
    """Generate images with a pair of networks at two rates, or with a single-rate network.

    Args:
        denoiser: Network that runs at every step, or with `encoder_denoises` at those that do not refresh.
        scheduler: [`DualRateScheduler`], or an in-tree variance-preserving scheduler that predicts v.
        context_encoder: Network that runs at refreshes only; `None` for a single-rate model.
        id2label: Name of each class.
        num_inference_steps: Default number N of steps.
        num_context_steps: Default number K of encoder evaluations per image; `None` refreshes at every step.
        guidance_scale: Default guidance scale; 1 is none.
        encoder_denoises: Whether a refresh takes the prediction that the encoder hands over, so that the denoiser runs at
            the N − K other steps only: for an encoder that the denoiser was trained to follow (beyond the paper).

    Raises:
        ValueError: If the two networks do not fit each other, or the defaults do not.
    """

    # The encoder comes and goes within a run: in one chain the two networks would evict each other at every refresh.
    model_cpu_offload_seq = "denoiser"
    _optional_components = ["context_encoder"]
    _callback_tensor_inputs = ["latents", "class_labels", "context"]

    def __init__(
        self,
        denoiser: UViTDenoiser,
        scheduler: SchedulerMixin,
        context_encoder: UViTContextEncoder | None = None,
        id2label: dict | None = None,
        num_inference_steps: int = 64,
        num_context_steps: int | None = None,
        guidance_scale: float = 1.0,
        encoder_denoises: bool = False,
    ):
        super().__init__()
        if context_encoder is not None:
            _check_pair(context_encoder, denoiser)
        plan_refreshes(num_inference_steps, num_context_steps)
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1, which is none, got {guidance_scale}.")
        _check_encoder_denoises(encoder_denoises, context_encoder, denoiser)
        # JSON knows only strings as keys.
        self._id2label = {int(key): name for key, name in (id2label or {}).items()}
        num_classes = denoiser.config.num_classes or 0
        if any(not 0 <= key < num_classes for key in self._id2label):
            raise ValueError(f"id2label names classes outside 0..{num_classes - 1}: {sorted(self._id2label)}.")
        self.register_modules(denoiser=denoiser, scheduler=scheduler, context_encoder=context_encoder)
        self.register_to_config(
            id2label={str(key): name for key, name in self._id2label.items()} or None,
            num_inference_steps=num_inference_steps,
            num_context_steps=num_context_steps,
            guidance_scale=guidance_scale,
            encoder_denoises=encoder_denoises,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._step, self._cached_rows = None, {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "DualRatePipeline":
        """Load a model from a Hub repository, a local folder or the cache; weights from safetensors files only.

        Takes what `DiffusionPipeline.from_pretrained` takes. No code of a repository is run unless `custom_pipeline` and
        `trust_remote_code` ask for it.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        except FileNotFoundError as error:
            # Where only the cache may be used, the host's message does not say what is missing from it.
            raise OSError(f"{pretrained_model_name_or_path} cannot be loaded: {error}") from error

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the model as a repository. Takes what the host's method takes.

        Beside each component lies a line of code that names its class, as the host asks of classes it does not know. So
        people who never import this package, but have it installed, load the model by
        `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`. Nobody else runs it.
        """
        package = __name__.partition(".")[0]
        files = {"pipeline.py": self} | {f"{name}/{package}.py": part for name, part in self.components.items()}
        for name, thing in files.items():
            path, cls = Path(save_directory, name), type(thing)
            if cls.__module__.startswith(package) and not path.exists() and not Path(save_directory).is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"from {package} import {cls.__name__}  # noqa: F401\n", encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class, empty where none are known."""
        return dict(self._id2label)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the newest call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the running step, for caches that ask for it; `None` between calls."""
        return None if self._step is None else self.scheduler.timesteps[self._step]

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; callbacks set `_interrupt`."""
        return self._interrupt

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Turn classes in any form into a list of their numbers.

        Args:
            class_labels: A number, a name of `id2label`, a list of either, or an integer tensor [B] or [].
        """
        num_classes = self.denoiser.config.num_classes
        if num_classes is None:
            raise ValueError("This model is unconditional: leave class_labels out and give batch_size.")
        if isinstance(class_labels, Tensor):
            if class_labels.is_floating_point() or class_labels.dtype == torch.bool or class_labels.ndim > 1:
                raise ValueError(
                    "class_labels must be integers in at most one dimension, "
                    f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}."
                )
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        numbers = {name: number for number, name in reversed(self._id2label.items())}
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                if label not in numbers:
                    close = difflib.get_close_matches(label, numbers)
                    hint = f"did you mean {close[0]!r}?" if close else "pipe.id2label lists the names."
                    raise ValueError(f"Unknown class name {label!r}; {hint}")
                label = numbers[label]
            if isinstance(label, Tensor) and label.ndim == 0:
                label = label.item()
            if isinstance(label, bool) or not hasattr(label, "__index__"):
                raise ValueError(f"class_labels must be integers or names, got {label!r}.")
            if not 0 <= label < num_classes:
                raise ValueError(f"class_labels must lie in 0..{num_classes - 1}, got {label}.")
            ids.append(int(label))
        if not ids:
            raise ValueError("class_labels is empty.")
        return ids

    def encode_context(
        self, z: Tensor, log_snr: Tensor, class_labels: Tensor | None, both: bool
    ) -> tuple[Tensor, ...]:
        """Run the heavy network on z and project its context for the denoiser; with `both`, for both branches."""
        z, class_labels = self._with_null_branch(z, class_labels) if both else (z, class_labels)
        with self._cache_context(self.context_encoder, both):
            encoded = self.context_encoder(z.to(self.context_encoder.dtype), log_snr, class_labels)
        dtype, levels = self.denoiser.dtype, len(self.denoiser.config.level_channels)
        # A prediction stays in float32, and serves many steps: a copy, since CUDA graphs write over what they returned.
        maps, handed_over = encoded.context[:levels], [part.clone() for part in encoded.context[levels:]]
        return self.denoiser.project_context((*(part.to(dtype) for part in maps), *handed_over))

    def denoise(
        self,
        z: Tensor,
        log_snr: Tensor,
        class_labels: Tensor | None,
        context: tuple[Tensor, ...] | None,
        context_log_snr: Tensor | None,
        guides: bool,
    ) -> Tensor:
        """Run the light network: the velocity at z, with guidance v_null + scale (v_class − v_null) if it acts here."""
        if context is not None and not guides and len(context[0]) > len(z):
            context = tuple(part[len(z) :] for part in context)  # this step needs only the branch with the class
        z, class_labels = self._with_null_branch(z, class_labels) if guides else (z, class_labels)
        with self._cache_context(self.denoiser, guides):
            v = self.denoiser(z, log_snr, class_labels, context, context_log_snr).sample
        return self._guide(v) if guides else v

    def take_prediction(self, z: Tensor, log_snr: Tensor, context: tuple[Tensor, ...], guides: bool) -> Tensor:
        """Instead of `denoise`, at a refresh: the velocity at z that the encoder predicted."""
        rows = 2 * len(z) if guides else len(z)
        context = tuple(part[-rows:] for part in context)  # the branch with the class comes last
        v = self.denoiser.handed_over_velocity(log_snr, context)
        return self._guide(v) if guides else v

    def _guide(self, v: Tensor) -> Tensor:
        v_null, v_class = v.chunk(2)
        return v_null + self._guidance_scale * (v_class - v_null)

    def _with_null_branch(self, z: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        null = torch.full_like(class_labels, self.denoiser.config.num_classes)
        return torch.cat([z, z]), torch.cat([null, class_labels])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int | None = None,
        num_context_steps: int | None = None,
        *,
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
            class_labels: Classes by number or name, one or several, or an integer tensor; `None` for no class.
            num_inference_steps: Number N of steps; default: the model's.
            num_context_steps: Number K ≤ N of context encoder evaluations; default: the model's, at most N.
            refresh_steps: Instead of K, the steps that refresh the context: 0 first, rising.
            timesteps: Instead of N, the timesteps themselves, falling.
            guidance_scale: Scale of classifier-free guidance, 1 for none; default: the model's where there are classes.
            guidance_interval: Lowest and highest log-SNR at which guidance acts (arXiv 2404.07724); default: always.
            batch_size: Number of images where no `class_labels` are given; default 1.
            num_images_per_prompt: Images for each class label.
            height: Height in pixels; default: the network's `sample_size`.
            width: Width in pixels; default: the network's `sample_size`.
            generator: Source of noise. In a list, one for each image, which then depends on its own seed alone.
            latents: Noise to start from [B, C, height, width] instead of drawing it.
            output_type: "pil", "np" [B, height, width, C] or "pt" [B, C, height, width], both in [0, 1], or "latent"
                for the tensor as the scheduler leaves it, about [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` or a plain tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; the tensors it
                returns replace the loop's. It may set `pipeline._interrupt` or `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: latents, class_labels, context (the
                projected maps in a tuple, `None` for a single-rate model).

        Raises:
            ValueError: If an argument is out of its range, before anything is computed.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ()
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = self.config.num_inference_steps
        if guidance_scale is None:  # without classes there is nothing to guide towards
            guidance_scale = 1.0 if class_labels is None else self.config.guidance_scale
        self._guidance_scale = guidance_scale
        self._guidance_interval = (-math.inf, math.inf) if guidance_interval is None else guidance_interval
        self._interrupt = False
        self._step, self._cached_rows = None, {}  # a cache that a failed call left filled starts anew
        if class_labels is not None:
            class_labels = self.get_label_ids(class_labels)
            if batch_size not in (None, len(class_labels)):
                raise ValueError(f"batch_size is {batch_size}, but there are {len(class_labels)} class_labels.")
            batch_size = len(class_labels)
        for name, count in (("batch_size", batch_size), ("num_images_per_prompt", num_images_per_prompt)):
            if not (count is None or hasattr(count, "__index__")):
                raise ValueError(f"{name} must be an integer, got {count!r}.")
        batch_size = (1 if batch_size is None else batch_size) * num_images_per_prompt
        sides = self.denoiser.config.sample_size
        sides = (sides, sides) if isinstance(sides, int) else sides
        height, width = sides[0] if height is None else height, sides[1] if width is None else width
        shape = (batch_size, self.denoiser.config.in_channels, height, width)
        self._check_inputs(class_labels, shape, generator, latents, output_type, callback_on_step_end_tensor_inputs)

        device = self._execution_device
        refreshes = self._set_timesteps(num_inference_steps, timesteps, num_context_steps, refresh_steps, device)
        levels = log_snr_of_steps(self.scheduler)
        log_snrs, levels = levels.to(device), levels.tolist()
        step_kwargs = {"generator": generator} if "generator" in _parameters(self.scheduler.step) else {}
        if class_labels is not None:
            class_labels = torch.tensor(class_labels, device=device).repeat_interleave(num_images_per_prompt)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        # The chain stays in float32 whatever the networks compute in.
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

        dtype = self.denoiser.dtype  # once: the host finds it by a walk over all parameters
        context = context_log_snr = None
        with self.progress_bar(total=len(levels)) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                self._step = i
                z, log_snr = self.scheduler.scale_model_input(latents, t), log_snrs[i]
                guides = class_labels is not None and self._guides(levels[i])

                # Slow rate: the heavy network, at refreshes, and where a callback has just switched guidance on.
                lacks_null = guides and context is not None and len(context[0]) == len(z)
                refreshed = self.context_encoder is not None and (refreshes[i] or lacks_null)
                if refreshed:
                    segment = levels[i : _next_refresh(refreshes, i)]
                    both = class_labels is not None and any(self._guides(level) for level in segment)
                    context = self.encode_context(z, log_snr, class_labels, both)
                    context_log_snr = log_snr.clone()  # one tensor given twice would be another graph to a compiler

                # Fast rate: the light network, at every step, or between refreshes only.
                if refreshed and self.config.encoder_denoises:
                    v = self.take_prediction(z, log_snr, context, guides)
                else:
                    v = self.denoise(z.to(dtype), log_snr, class_labels, context, context_log_snr, guides)
                latents = self.scheduler.step(v.float(), t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": class_labels, "context": context}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, tensors) or {}
                    latents = returned.pop("latents", latents)
                    class_labels = returned.pop("class_labels", class_labels)
                    context = returned.pop("context", context)
                progress_bar.update()

        self._step, self._cached_rows = None, {}
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _cache_context(
        self, network: UViTContextEncoder | UViTDenoiser, both: bool
    ) -> contextlib.AbstractContextManager:
        """Tell the host's caches, where one is enabled, which rows this is; telling costs a walk over all modules."""
        if not network.is_cache_enabled:
            return contextlib.nullcontext()
        rows = "both" if both else "cond"
        if self._cached_rows.get(network) != rows:  # not every cache keeps apart what belongs to other rows
            HookRegistry.check_if_exists_or_initialize(network).reset_stateful_hooks()
            self._cached_rows[network] = rows
        return network.cache_context(rows)

    def _guides(self, log_snr: float) -> bool:
        low, high = self._guidance_interval
        return self._guidance_scale > 1 and low <= log_snr <= high

    def _set_timesteps(self, num_inference_steps, timesteps, num_context_steps, refresh_steps, device) -> list[bool]:
        """Set the scheduler to the run's steps and plan which of them refresh the context."""
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("Give either num_inference_steps or timesteps.")
        count = num_inference_steps if timesteps is None else len(timesteps)
        if count < 1:
            raise ValueError(f"num_inference_steps or the number of timesteps must be at least 1, got {count}.")
        default = self.config.num_context_steps
        if num_context_steps is None and refresh_steps is None and default is not None:
            num_context_steps = min(default, count)
        plan_refreshes(count, num_context_steps, refresh_steps)  # before an in-tree scheduler sees bad numbers
        if isinstance(self.scheduler, DualRateScheduler):
            self.scheduler.set_timesteps(
                num_inference_steps,
                device,
                timesteps=timesteps,
                num_context_steps=num_context_steps,
                refresh_steps=refresh_steps,
            )
            self._num_timesteps = count
            return self.scheduler.refreshes_context
        name = type(self.scheduler).__name__
        if self.scheduler.config.get("prediction_type") != "v_prediction":
            raise ValueError(f"The networks predict v: give {name} prediction_type='v_prediction'.")
        if self.context_encoder is not None:
            warnings.warn(
                f"{name} samples off the Markov law: pairs that learned to follow their encoder know its steps, others may "
                "do better with DualRateScheduler.",
                stacklevel=3,
            )
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        elif "timesteps" in _parameters(self.scheduler.set_timesteps):
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            raise ValueError(f"{name} does not take timesteps: give num_inference_steps.")
        # Some solvers evaluate the networks more or less often than they were asked to.
        self._num_timesteps = len(self.scheduler.timesteps)
        return plan_refreshes(self._num_timesteps, num_context_steps, refresh_steps)

    def _check_inputs(self, class_labels, shape, generator, latents, output_type, tensor_inputs) -> None:
        batch_size, _, height, width = shape
        stride = self.denoiser.config.patch_size * 2 ** (len(self.denoiser.config.level_channels) - 1)
        if batch_size < 1:
            raise ValueError(f"batch_size and num_images_per_prompt must be at least 1, got {batch_size} images.")
        if height < 1 or width < 1 or height % stride or width % stride:
            raise ValueError(f"height and width must be divisible by {stride}, got {height} and {width}.")
        _check_encoder_denoises(self.config.encoder_denoises, self.context_encoder, self.denoiser)
        if not self._guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1, which is none, got {self._guidance_scale}.")
        if self._guidance_scale > 1 and class_labels is None:
            raise ValueError(f"guidance_scale={self._guidance_scale} needs class_labels.")
        if len(self._guidance_interval) != 2 or not self._guidance_interval[0] <= self._guidance_interval[1]:
            raise ValueError(f"guidance_interval must be (low, high) in log-SNR, got {self._guidance_interval}.")
        if not (generator is None or isinstance(generator, (torch.Generator, list))):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator needs one entry for each of {batch_size} images, got {len(generator)}.")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {_OUTPUT_TYPES}, got {output_type!r}.")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"Callbacks may ask for {self._callback_tensor_inputs}, got {list(tensor_inputs)}.")


def _check_pair(context_encoder: UViTContextEncoder, denoiser: UViTDenoiser) -> None:
    for name in ("in_channels", "patch_size", "num_classes", "prediction_hand_over"):
        theirs, ours = context_encoder.config[name], denoiser.config[name]
        if theirs != ours:
            raise ValueError(f"The pair does not fit: {name} is {theirs} in the encoder and {ours} in the denoiser.")
    expected = denoiser.config.context_channels
    if expected is None or tuple(expected) != context_encoder.context_channels:
        raise ValueError(
            f"The pair does not fit: the encoder hands out context of widths {context_encoder.context_channels}, "
            f"the denoiser takes {expected if expected is None else tuple(expected)}."
        )


def _check_encoder_denoises(
    encoder_denoises: bool, context_encoder: UViTContextEncoder | None, denoiser: UViTDenoiser
) -> None:
    if encoder_denoises and (context_encoder is None or not denoiser.config.prediction_hand_over):
        raise ValueError(
            "encoder_denoises=True needs a context_encoder that hands over its prediction; without one, load the model "
            "with encoder_denoises=False."
        )


def _next_refresh(refreshes: list[bool], step: int) -> int:
    return next((i for i in range(step + 1, len(refreshes)) if refreshes[i]), len(refreshes))


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)
