"""One chain, made of what a call asks for: the two networks with guidance, caches, conditions and precision.

With guidance, the branches without and with the condition are evaluated in one batch. The null branch comes first, and
each branch has its own context. A text is projected once for each network. Two chains may use the same networks at once:
they share nothing else.
"""

import contextlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers.hooks import HookRegistry
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .conditions import Condition, Text, join, take_rows
from .defaults import SamplingDefaults, check_id2label
from .graphs import call_directly
from .guidance import Guidance
from .inputs import check_encoder_denoises, check_inputs, check_noise_levels, check_null_class
from .models import UViTContextEncoder, UViTDenoiser
from .prompts import Conditioning
from .scheduler import DualRateScheduler
from .steps import ChainSteps
from .text_encoding import TextEncoding

# Networks whose caches a chain is filling.
_FILLING: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_LOCK = threading.Lock()


class Context(NamedTuple):
    """What the encoder made of z_τ, projected for the denoiser, and the log-SNR λ_τ."""

    maps: tuple[Tensor, ...]
    log_snr: Tensor


class Chain:
    """One chain from noise to images: the callables that `sample_at_two_rates` asks for.

    Args:
        denoiser: The light network.
        context_encoder: The heavy network; `None` for a single-rate model.
        steps: The steps of this chain.
        condition: What each image is to show: classes [B], a text, or `None`.
        guidance: May change on the way.
        generator: Source of the steps' noise.
        encoder_denoises: Whether the encoder's own prediction serves at refreshes.
        device: Where the networks compute.
        null: The condition of the null branch of a text; default: none. That of classes is the null label.
    """

    def __init__(
        self,
        denoiser: UViTDenoiser,
        context_encoder: UViTContextEncoder | None,
        steps: ChainSteps,
        condition: Condition = None,
        guidance: Guidance | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        encoder_denoises: bool = False,
        device: str | torch.device | None = None,
        *,
        null: Condition = None,
    ):
        self.denoiser, self.context_encoder = denoiser, context_encoder
        self.scheduler, self.plan = steps.scheduler, steps.plan
        self.levels, self.log_snrs = steps.log_snrs.tolist(), steps.log_snrs.to(device)
        self.guidance = guidance or Guidance()
        self.encoder_denoises = encoder_denoises
        takes_generator = "generator" in inspect.signature(steps.scheduler.step).parameters
        self._step_options = {"generator": generator} if takes_generator else {}
        self._dtype = denoiser.dtype  # once: the host finds it by a walk over all modules
        self._encoder_dtype = None if context_encoder is None else context_encoder.dtype
        self.run: Callable[..., tuple[Tensor, ...]] = call_directly
        if isinstance(condition, Tensor):
            networks = [network for network in (denoiser, context_encoder) if network is not None]
            learned = all(network.config.get("has_null_class", True) for network in networks)
            null = torch.full_like(condition, denoiser.config.num_classes) if learned else None
        self.change_condition(condition, null)
        self._cached_rows: dict[torch.nn.Module, str] = {}
        self.timesteps = list(steps.scheduler.timesteps)  # taken apart once, not at every look

    def change_condition(self, condition: Condition, null: Condition) -> None:
        """Draw from here on under another condition, with another null branch."""
        self.condition, self.null = condition, null
        # What each network takes of both branches, or of the one that there is, and of the one with the condition.
        self._taken: dict[torch.nn.Module, tuple[Condition, Condition]] = {}

    def guides(self, i: int) -> bool:
        """Whether step i evaluates both branches.

        Raises:
            ValueError: If a callback switched guidance on, and there is no null branch.
        """
        acts = self.condition is not None and self.guidance.acts_at(self.levels[i])
        if acts and self.null is None:
            raise ValueError(
                "A callback switched guidance on in a call without a null branch: begin with a guidance_scale above 1."
            )
        return acts

    def serves(self, i: int, z: Tensor, context: Context | None) -> bool:
        """Whether a context serves step i: a guided step needs one of both branches. Only callbacks make it fail."""
        return context is None or not self.guides(i) or len(context.maps[0]) != len(z)

    def encode(self, i: int, z: Tensor) -> tuple[Context, Tensor | None]:
        """Slow rate: context for the steps from i on, and the velocity at step i where the encoder denoises."""
        z, log_snr = self.scheduler.scale_model_input(z, self.timesteps[i]), self.log_snrs[i]
        both = any(self.guides(later) for later in self.plan.until_next(i))
        # A clone: one tensor given twice, as both log-SNRs, would be another graph to a compiler.
        context = Context(self.compute_context(z, log_snr, both), log_snr.clone())
        return context, self.take_prediction(z, context, self.guides(i)) if self.encoder_denoises else None

    def denoise(self, i: int, z: Tensor, context: Context | None) -> Tensor:
        """Fast rate: the light network's velocity at step i."""
        z = self.scheduler.scale_model_input(z, self.timesteps[i])
        return self.compute_velocity(z.to(self._dtype), self.log_snrs[i], context, self.guides(i))

    def step(self, i: int, v: Tensor, z: Tensor) -> Tensor:
        """From step i to the next by the scheduler, in float32."""
        return self.scheduler.step(v.float(), self.timesteps[i], z, **self._step_options, return_dict=False)[0]

    def compute_context(self, z: Tensor, log_snr: Tensor, both: bool) -> tuple[Tensor, ...]:
        """Run the heavy network on z, and project its features to the denoiser's widths; `both` is of both branches."""
        assert self.context_encoder is not None  # else no plan refreshes
        z, condition = self._branches(self.context_encoder, z, both)
        with self._cache_context(self.context_encoder, both):
            return self.run(self._encode, z.to(self._encoder_dtype), log_snr, condition)

    def _encode(self, z: Tensor, log_snr: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        assert self.context_encoder is not None
        encoded = self.context_encoder(z, log_snr, condition)
        levels = len(self.denoiser.config.level_channels)
        # A prediction stays in float32, and serves many steps: a copy, since CUDA graphs write over what they returned.
        maps, handed_over = encoded.context[:levels], [part.clone() for part in encoded.context[levels:]]
        return self.denoiser.project_context((*(part.to(self._dtype) for part in maps), *handed_over))

    def compute_velocity(self, z: Tensor, log_snr: Tensor, context: Context | None, guides: bool) -> Tensor:
        """Run the light network: the velocity at z, guided or not."""
        maps, context_log_snr = (None, None) if context is None else context
        if maps is not None and not guides and len(maps[0]) > len(z):
            maps = tuple(part[len(z) :] for part in maps)  # this step needs only the branch with the condition
        z, condition = self._branches(self.denoiser, z, guides)
        with self._cache_context(self.denoiser, guides):
            (v,) = self.run(self._predict, z, log_snr, condition, maps, context_log_snr)
        return self.guidance.combine(v) if guides else v

    def _predict(
        self,
        z: Tensor,
        log_snr: Tensor,
        condition: Condition,
        maps: tuple[Tensor, ...] | None,
        context_log_snr: Tensor | None,
    ) -> tuple[Tensor]:
        return (self.denoiser(z, log_snr, condition, maps, context_log_snr).sample,)

    def take_prediction(self, z: Tensor, context: Context, guides: bool) -> Tensor:
        """The velocity at z that the encoder predicted, which serves at a refresh instead of the light network's."""
        rows = 2 * len(z) if guides else len(z)
        maps = tuple(part[-rows:] for part in context.maps)  # the branch with the condition comes last
        v = self.denoiser.handed_over_velocity(context.log_snr, maps)
        return self.guidance.combine(v) if guides else v

    def _branches(self, network: UViTContextEncoder | UViTDenoiser, z: Tensor, both: bool) -> tuple[Tensor, Condition]:
        """What a network is given at z, of both branches or of the one with the condition."""
        if network not in self._taken:
            given = self.condition if self.null is None else join(self.null, self.condition)
            if isinstance(given, Text):
                pooled = None if given.pooled is None else given.pooled.to(network.dtype)
                given = network.project_condition(given._replace(tokens=given.tokens.to(network.dtype), pooled=pooled))
            self._taken[network] = given, take_rows(given, slice(-len(z), None))
        of_both, of_one = self._taken[network]
        return (torch.cat([z, z]), of_both) if both else (z, of_one)

    def _cache_context(
        self, network: UViTContextEncoder | UViTDenoiser, both: bool
    ) -> contextlib.AbstractContextManager:
        """Tell the host's caches, where one is enabled, which branches this is."""
        if not network.is_cache_enabled:
            return contextlib.nullcontext()  # telling costs a walk over all modules
        rows = "both" if both else "cond"
        if self._cached_rows.get(network) != rows:  # not every cache keeps apart what belongs to other rows
            HookRegistry.check_if_exists_or_initialize(network).reset_stateful_hooks()
            self._cached_rows[network] = rows
        return network.cache_context(rows)


@contextlib.contextmanager
def own_caches(*networks: UViTContextEncoder | UViTDenoiser | None) -> Iterator[None]:
    """While the block runs, keep the caches of these networks to one chain.

    Raises:
        RuntimeError: If another chain is filling the cache of one of them.
    """
    cached = [network for network in networks if network is not None and network.is_cache_enabled]
    with _LOCK:
        if any(network in _FILLING for network in cached):
            raise RuntimeError(
                "A cache is enabled on a network that another call is using now, and it holds one call at a time: call "
                "disable_cache, or give each call a copy.deepcopy of the pipeline."
            )
        _FILLING.update(cached)
    try:
        yield
    finally:
        with _LOCK:
            _FILLING.difference_update(cached)


def make_chain(
    denoiser: UViTDenoiser,
    context_encoder: UViTContextEncoder | None,
    steps: ChainSteps,
    defaults: SamplingDefaults,
    device: str | torch.device,
    encoding: TextEncoding | None = None,
    *,
    conditioning: Conditioning,
    guidance_scale: float | None,
    guidance_interval: tuple[float, float] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    **options,
) -> tuple[Chain, Tensor]:
    """Check what a call asks for, and make its chain and the noise that it starts from.

    Args:
        denoiser: The light network.
        context_encoder: The heavy network; `None` for a single-rate model.
        steps: The steps of the chain, from [`plan_steps`].
        defaults: What the model says where the call does not.
        device: Where the networks compute.
        encoding: The model's text encoder, if it has one.
        conditioning: What the call says of what the images show.
        guidance_scale: As the call gives it.
        guidance_interval: As the call gives it.
        generator: As the call gives it.
        options: The other arguments of [`check_inputs`].
    """
    scale, interval = defaults.choose_guidance(guidance_scale, guidance_interval, conditioning.has_condition)
    inputs = check_inputs(
        denoiser,
        check_id2label(defaults.id2label, denoiser.config.num_classes),
        encoding,
        conditioning=conditioning,
        guidance_scale=scale,
        guidance_interval=interval,
        generator=generator,
        **options,
    )
    networks = (denoiser,) if context_encoder is None else (denoiser, context_encoder)
    check_null_class(inputs.guidance.scale, *networks)
    check_noise_levels(steps, *networks)
    for network in networks:
        if any(side % network.stride for side in inputs.shape[2:]):  # of the denoiser's alone they were checked
            stride = network.stride * options["pixels_per_side"]
            raise ValueError(f"height and width must be divisible by {stride} for the context_encoder.")
    check_encoder_denoises(defaults.encoder_denoises, context_encoder, denoiser)
    if context_encoder is not None and not isinstance(steps.scheduler, DualRateScheduler):
        warnings.warn(
            f"{type(steps.scheduler).__name__} takes other steps than those the pair was trained for, unless it learned to "
            "follow its encoder (--follow_encoder): compare the images with those of DualRateScheduler.",
            stacklevel=4,
        )
    first = defaults.context_from
    if context_encoder is not None and first is not None and steps.refreshes_above(first):
        warnings.warn(
            f"refresh_steps ask for a context above context_from={first}, where this pair's encoder never learned.",
            stacklevel=4,
        )
    condition, null = inputs.asked.compute(encoding, device, inputs.times, inputs.guidance.scale > 1)
    noise = inputs.latents
    if noise is None:
        noise = randn_tensor(inputs.shape, generator, torch.device(device), torch.float32)
    # The images stay in float32 whatever the networks compute in.
    noise = noise.to(device, torch.float32) * steps.scheduler.init_noise_sigma
    asked = condition, inputs.guidance, generator, defaults.encoder_denoises, device
    return Chain(denoiser, context_encoder, steps, *asked, null=null), noise
