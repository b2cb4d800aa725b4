"""How weights are updated: Accelerate, AdamW and the course of the learning rate, as options and recipe have them."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from .configuration import Options
from .processes import check_launch
from .recipes import Recipe, SingleRateRecipe


def make_accelerator(options: Options, **kwargs: Any) -> Accelerator:
    """Accelerate's object as a run wants it; `kwargs` are further arguments of it."""
    return check_launch(
        Accelerator(
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            mixed_precision=options.mixed_precision,
            log_with=options.report_to,
            project_dir=options.output_dir,
            step_scheduler_with_optimizer=False,  # else the schedule would depend on the number of processes
            **kwargs,
        )
    )


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW as a recipe has it."""
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.adam_weight_decay,
    )


def begin_states(optimizer: torch.optim.Optimizer) -> None:
    """Give each trained weight the state that AdamW gives it at its first gradient, now: zeros, and no step done."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.requires_grad and weight not in optimizer.state:
                zeros = torch.zeros_like(weight), torch.zeros_like(weight)
                optimizer.state[weight] = {"step": torch.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, recipe: SingleRateRecipe
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over all steps of a recipe."""
    return get_scheduler(
        recipe.lr_scheduler,
        optimizer,
        num_warmup_steps=recipe.lr_warmup_steps,
        num_training_steps=recipe.max_train_steps,
    )
