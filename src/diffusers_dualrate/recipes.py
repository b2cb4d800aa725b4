"""How networks are trained: one typed recipe for each kind of training, every value checked.

A preset holds two: that of a pair in its section `training`, that of a student in `distillation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .augmentation import Augmentation
from .ranges import MOST_AT_ONCE, check_boolean, check_choice, check_integer, check_number
from .records import build
from .refreshes import RefreshPlan, plan_segments

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
"""Courses of the learning rate: those of diffusers that need nothing but the counts of steps."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training shares.

    Args:
        learning_rate: Peak of AdamW's learning rate.
        lr_warmup_steps: Steps in which it rises to that.
        adam_beta1: Decay of the mean of gradients.
        adam_beta2: Decay of the mean of their squares.
        adam_epsilon: What is added to the root of that mean.
        adam_weight_decay: Decoupled weight decay.
        max_grad_norm: Largest norm of a step's gradient. A longer gradient is scaled down to it.
        ema_decay: Decay of the moving average of the weights. The averaged weights are the released ones.
        train_batch_size: Images of a step, over all processes.
        max_train_steps: Number of steps.
        augmentation: What may happen to the images.
    """

    learning_rate: float
    lr_warmup_steps: int
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float
    train_batch_size: int
    max_train_steps: int
    augmentation: Augmentation = Augmentation()

    section: ClassVar[str] = "training"
    """Which part of a preset holds it."""

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate, above=0, most=1)
        check_integer("lr_warmup_steps", self.lr_warmup_steps, least=0)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            check_number(name, getattr(self, name), least=0, below=1)
        check_number("adam_epsilon", self.adam_epsilon, above=0)
        check_number("adam_weight_decay", self.adam_weight_decay, least=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_integer("train_batch_size", self.train_batch_size, 1, MOST_AT_ONCE)
        check_integer("max_train_steps", self.max_train_steps, least=1)
        if isinstance(self.augmentation, Mapping):
            object.__setattr__(self, "augmentation", build(Augmentation, "augmentation", self.augmentation))

    @property
    def num_steps(self) -> int:
        """All steps of the run."""
        return self.max_train_steps

    @property
    def share_without_context(self) -> float:
        """Share of rows that see no context, where there is an encoder."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class SingleRateRecipe(Recipe):
    """How one network is trained.

    Args:
        lr_scheduler: Course of the learning rate, one of `LR_SCHEDULERS`.
        bias: b of the loss weight sigmoid(b − λ). Noise levels well above b in log-SNR count for less.
        label_dropout: Probability that an image is trained without its class.
    """

    lr_scheduler: str
    bias: float
    label_dropout: float

    def __post_init__(self):
        super().__post_init__()
        check_choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        check_number("bias", self.bias)
        check_number("label_dropout", self.label_dropout, least=0, below=1)  # else no class is learned


@dataclass(frozen=True, kw_only=True)
class PairRecipe(SingleRateRecipe):
    """How a pair is trained.

    Args:
        context_ages: Largest ages of a context, in shares of the chain. Each row draws one of them uniformly, and its
            context is at most that old. 0 is a fresh context. A value that is repeated is drawn more often.
        context_from: Time of the first context, in shares of the chain; 1 is the noisy end. Rows above it see no context,
            and the encoder learns nothing there. Their share is rounded to whole rows of the batch.
        context_dropout: Share of the other rows of a batch that see no context.
        freeze_encoder: Whether the encoder's weights stay as they are, except those of what it hands over.
        follow_encoder: Whether the encoder is frozen so, and the denoiser learns from its predictions instead of images.
    """

    context_ages: tuple[float, ...]
    context_from: float = 1.0
    context_dropout: float
    freeze_encoder: bool = False
    follow_encoder: bool = False

    def __post_init__(self):
        super().__post_init__()
        ages = self.context_ages
        if not isinstance(ages, (list, tuple)) or not ages:
            raise ValueError(f"context_ages must be a list of shares of the chain, got {ages!r}.")
        object.__setattr__(self, "context_ages", tuple(ages))
        for age in ages:
            check_number("context_ages", age, least=0, most=1)
        check_number("context_from", self.context_from, above=0, most=1)
        check_number("context_dropout", self.context_dropout, least=0, below=1)  # else no encoder is
        for name in ("freeze_encoder", "follow_encoder"):
            check_boolean(name, getattr(self, name))
        if self.context_from < 1 and self.share_above in (0, 1):
            kept = "all" if self.share_above == 0 else "none"
            raise ValueError(
                f"context_from={self.context_from} gives {kept} of a batch of {self.train_batch_size} rows a context, since it is "
                "rounded to whole rows: choose another time, or a larger train_batch_size."
            )
        if self.follow_encoder and self.context_dropout:
            raise ValueError(f"--follow_encoder needs --context_dropout 0, got {self.context_dropout}.")

    @property
    def share_above(self) -> float:
        """Share of rows whose times lie above that of the first context."""
        return round((1 - self.context_from) * self.train_batch_size) / self.train_batch_size

    @property
    def first_context(self) -> float | None:
        """Time of the first context as it is trained, in whole rows of the batch; `None` for the noisy end."""
        return 1 - self.share_above if self.share_above else None

    @property
    def share_without_context(self) -> float:
        return self.share_above + (1 - self.share_above) * self.context_dropout

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder's weights stay as they are."""
        return self.freeze_encoder or self.follow_encoder


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(Recipe):
    """How a student is distilled. `max_train_steps` counts the steps of auxiliary and student, which alternate.

    Args:
        pretraining_steps: Steps of plain denoising before those, for a student that is made from the teacher.
        pretraining_learning_rate: Peak of the learning rate in them.
        min_variance: Noise variance below which the weight 1/σ² of the loss rises no further.
        min_variance_share: Least variance of the student's samples, as a share of the teacher's. Below it the student
            has collapsed, and the run ends.
        full_rollout: Whether the student starts from noise instead of noisy images.
        num_inference_steps: N of the student.
        num_context_steps: K of the student.
        context_from: Time of its first context, in shares of the chain. Steps above it see no context.
        guidance_scale: Guidance of the teacher, which the student learns to imitate.
    """

    pretraining_steps: int
    pretraining_learning_rate: float
    min_variance: float
    min_variance_share: float
    full_rollout: bool
    num_inference_steps: int
    num_context_steps: int
    context_from: float = 1.0
    guidance_scale: float

    section: ClassVar[str] = "distillation"

    def __post_init__(self):
        super().__post_init__()
        check_integer("pretraining_steps", self.pretraining_steps, least=0)
        check_number("pretraining_learning_rate", self.pretraining_learning_rate, above=0, most=1)
        check_number("min_variance", self.min_variance, above=0)
        check_number("min_variance_share", self.min_variance_share, least=0)
        check_boolean("full_rollout", self.full_rollout)
        check_integer("num_inference_steps", self.num_inference_steps, least=1)
        check_integer("num_context_steps", self.num_context_steps)
        check_number("context_from", self.context_from, above=0, most=1)
        check_number("guidance_scale", self.guidance_scale, least=1)

    @property
    def num_steps(self) -> int:
        return self.pretraining_steps + self.max_train_steps

    @property
    def plan(self) -> RefreshPlan:
        """Which steps of the student refresh.

        Raises:
            ValueError: If K does not divide the steps that see a context.
        """
        return plan_segments(self.num_inference_steps, self.num_context_steps, self.context_from)

    @property
    def images_by_phase(self) -> dict[str, int]:
        """Number of images of each phase, in order. Every step, of either kind, has a batch of its own."""
        steps = {
            "pretraining": self.pretraining_steps,
            "auxiliary": (self.max_train_steps + 1) // 2,
            "student": self.max_train_steps // 2,
        }
        return {phase: count * self.train_batch_size for phase, count in steps.items()}


RECIPES: dict[str, type[Recipe]] = {
    "train_dual_rate": PairRecipe,
    "train_single_rate": SingleRateRecipe,
    "distill": DistillationRecipe,
}
"""The recipe that each training example follows."""
