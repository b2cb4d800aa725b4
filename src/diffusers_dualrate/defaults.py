"""How a model is sampled where a call does not say otherwise: what travels with it in its model_index.json."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Self

from .ranges import check_boolean, check_integer, check_number
from .refreshes import plan_refreshes


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled where a call does not say otherwise, and the names of its classes.

    Args:
        num_inference_steps: Number N of steps.
        num_context_steps: Number K of refreshes; `None` refreshes at every step.
        context_from: Time of the first context, a share of the chain (1 is its noisy end); `None` for the first step.
        refresh_steps: Instead of both, the steps that refresh in a chain of N steps.
        context_free: Whether the pair learned to go without context, so that refreshes may begin late.
        guidance_scale: Scale of guidance where there are classes; 1 is none.
        guidance_interval: Lowest and highest log-SNR at which guidance acts; `None` for all.
        encoder_denoises: Whether a refresh takes the prediction that the encoder hands over.
        is_distilled: Whether the model was distilled into these steps and this guidance, and knows no others.
        id2label: Name of each class; `None` where none are known.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_inference_steps: int = 64
    num_context_steps: int | None = None
    context_from: float | None = None
    refresh_steps: Sequence[int] | None = None
    context_free: bool = False
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    encoder_denoises: bool = False
    is_distilled: bool = False
    id2label: Mapping[Any, str] | None = None

    def __post_init__(self):
        if self.refresh_steps is None:
            plan_refreshes(self.num_inference_steps, self.num_context_steps)
        else:  # then K waits for another N
            plan_refreshes(self.num_inference_steps, refresh_steps=self.refresh_steps)
            if self.num_context_steps is not None:
                check_integer("num_context_steps", self.num_context_steps, least=1)
        if self.context_from is not None:
            check_number("context_from", self.context_from, above=0, most=1)
        check_boolean("context_free", self.context_free)
        check_number("guidance_scale", self.guidance_scale, least=1)
        check_interval(self.guidance_interval)
        check_boolean("encoder_denoises", self.encoder_denoises)
        check_boolean("is_distilled", self.is_distilled)

    @classmethod
    def of(cls, config: Mapping) -> Self:
        """Take them from a configuration, which may hold more; what it lacks, or has as `None`, nobody said."""
        return cls(**{name: config[name] for name in NAMES if config.get(name) is not None})

    def check_context_free(self, what: str) -> None:
        """Refuse steps without context before the first refresh for a pair that never learned to go without."""
        if not self.context_free:
            raise ValueError(
                f"{what} leaves the steps before it without context, which this pair never learned (context_free=False): "
                "refresh at step 0, or train with context_from or context_dropout."
            )

    def check_refreshes(self) -> None:
        """Refuse refreshes that begin late for a pair that never learned to go without context."""
        if self.context_from is not None and self.context_from < 1:
            self.check_context_free(f"context_from={self.context_from}")
        if self.refresh_steps is not None and self.refresh_steps[0] > 0:
            self.check_context_free(f"refresh_steps={self.refresh_steps}")

    def warn_of_other_use(self, what: str) -> None:
        """Warn that a distilled model is sampled in a way that it was not distilled for."""
        k = "" if self.num_context_steps is None else f", K = {self.num_context_steps}"
        warnings.warn(
            f"This model was distilled for N = {self.num_inference_steps}{k}, guidance {self.guidance_scale:g} and "
            f"ancestral steps. It was not trained for {what}: expect worse images.",
            stacklevel=3,
        )

    def choose_guidance(
        self, scale: float | None, interval: tuple[float, float] | None, has_classes: bool
    ) -> tuple[float, tuple[float, float] | None]:
        """Scale and interval of a call: what was asked for, else the model's. Without classes there is none."""
        if scale is None:
            scale = self.guidance_scale if has_classes else 1.0
        elif self.is_distilled and scale != self.guidance_scale:
            self.warn_of_other_use(f"guidance_scale={scale}")
        return scale, self.guidance_interval if interval is None else interval


NAMES = tuple(field.name for field in fields(SamplingDefaults))
# Each of these, newly given, is of another plan than the steps that were named before.
_OF_ANOTHER_PLAN = {"num_inference_steps", "num_context_steps", "context_from"}


def end_named_steps(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is newly given. N, K or `context_from` take the place of `refresh_steps`, unless those are given, too."""
    is_ended = not _OF_ANOTHER_PLAN.isdisjoint(given) and "refresh_steps" not in given
    return {**given, "refresh_steps": None} if is_ended else dict(given)


def check_interval(interval: tuple[float, float] | None) -> None:
    """Check the noise levels at which guidance acts; `None` for all."""
    if interval is None:
        return
    fits = (
        isinstance(interval, (tuple, list)) and len(interval) == 2 and all(isinstance(end, Real) for end in interval)
    )
    if not (fits and interval[0] <= interval[1]):  # nan compares false; infinity leaves an end open
        raise ValueError(f"guidance_interval must be (low, high) in log-SNR, got {interval}.")


def check_id2label(id2label: Mapping[Any, str] | None, num_classes: int | None) -> dict[int, str]:
    """Names of classes by number, in the order of the numbers; JSON, which knows only strings as keys, mixes it up."""
    if not isinstance(id2label or {}, Mapping):
        raise ValueError(f"id2label must map numbers of classes to their names, got {id2label!r}.")
    names: dict[int, str] = {}
    for key, name in (id2label or {}).items():
        number = check_integer("each class of id2label", int(key) if isinstance(key, str) and key.isdecimal() else key)
        if not isinstance(name, str):
            raise ValueError(f"id2label must map numbers of classes to their names, got {name!r} for class {key}.")
        names[number] = name
    if any(not 0 <= number < (num_classes or 0) for number in names):
        raise ValueError(f"id2label names classes outside 0..{(num_classes or 0) - 1}: {sorted(names)}.")
    return dict(sorted(names.items()))
