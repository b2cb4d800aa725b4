"""What the training examples share before and beside a run: data, networks as one module, optimiser, samples.

No loop and no mathematics: those are in the examples and in `losses.py`. The run itself is in `runs.py`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn

from .augmentation import Augmentation
from .configuration import Configuration, Data, Options
from .data import LabelledImages, load_images
from .losses import Schedule
from .models import UViTContextEncoder, UViTDenoiser
from .pipeline import DualRatePipeline
from .recipes import Recipe, SingleRateRecipe
from .scheduler import DualRateScheduler
from .streams import StreamedImages


class TrainablePair(nn.Module):
    """Both networks of a pair, or a single-rate one alone, as one module with one `forward`.

    One `prepare`, one clip and one EMA call then serve both, and wrappers such as DDP see every call.
    """

    denoiser: UViTDenoiser
    context_encoder: UViTContextEncoder | None

    def __init__(self, denoiser: UViTDenoiser, context_encoder: UViTContextEncoder | None = None):
        super().__init__()
        self.denoiser = denoiser
        self.context_encoder = context_encoder

    def enable_gradient_checkpointing(self) -> None:
        """Compute features twice, in every network, to save memory."""
        for network in self.children():
            cast(ModelMixin, network).enable_gradient_checkpointing()

    def forward(self, loss_function: Callable, *args, **kwargs):
        """Call `loss_function(denoise, encode, ...)` with the networks as the callables that losses take."""
        encode = None if self.context_encoder is None else self.encode
        return loss_function(self.denoise, encode, *args, **kwargs)

    def encode(self, z: Tensor, log_snr: Tensor, class_labels: Tensor | None) -> tuple[Tensor, ...]:
        """Projected context of z_τ."""
        assert self.context_encoder is not None  # else nobody is handed this method
        return self.denoiser.project_context(self.context_encoder(z, log_snr, class_labels).context)

    def denoise(self, z: Tensor, log_snr: Tensor, class_labels: Tensor | None, context, context_log_snr) -> Tensor:
        """Velocity predicted from z_t and, where there is one, the projected context."""
        return self.denoiser(z, log_snr, class_labels, context, context_log_snr).sample


def make_accelerator(options: Options, **kwargs) -> Accelerator:
    """Accelerate's object as a run wants it."""
    return Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=options.report_to,
        project_dir=options.output_dir,
        step_scheduler_with_optimizer=False,  # else the schedule would depend on the number of processes
        **kwargs,
    )


def open_images(
    data: Data,
    resolution: int | tuple[int, int],
    *,
    channels: int = 3,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    split: str = "train",
) -> LabelledImages | StreamedImages:
    """Open the images that flags name.

    Args:
        data: Which images, and how they are read.
        resolution: Side or (height, width) in pixels.
        channels: 3 for colour, 1 for grey.
        augmentation: What may happen to them.
        seed: Seed of the augmentation and of a stream's shuffle.
        split: Which part of the data set.

    Raises:
        ValueError: If there are none, or they are not as the flags say.
    """
    dataset = load_images(
        data.dataset_name,
        data.train_data_dir,
        image_column=data.image_column,
        label_column=data.label_column,
        split=split,
        config_name=data.dataset_config_name,
        streaming=data.streaming,
        seed=seed,
        cache_dir=data.cache_dir,
    )
    options = {"buffer_size": data.shuffle_buffer} if data.streaming else {}
    return (StreamedImages if data.streaming else LabelledImages)(
        dataset,
        resolution,
        image_column=data.image_column,
        label_column=data.label_column,
        num_classes=data.num_classes,
        augmentation=augmentation,
        channels=channels,
        seed=seed,
        on_corrupt=data.on_corrupt,
        max_image_pixels=data.max_image_pixels,
        **options,
    )


def check_classes(name: str, pipe: DualRatePipeline, images: LabelledImages | StreamedImages) -> None:
    """Refuse a model whose classes are not those of the images, in number, name and order."""
    ours, theirs = images.num_classes, pipe.denoiser.config.num_classes
    if ours != theirs:
        raise ValueError(
            f"{name} has {theirs or 'no'} classes and the data {ours or 'no'}: see --label_column, --num_classes."
        )
    names = images.id2label or {}
    named = pipe.id2label.keys() & names.keys()
    differing = [i for i in sorted(named) if pipe.id2label[i] != names[i]]
    if differing:
        i = differing[0]
        raise ValueError(f"Class {i} is {pipe.id2label[i]!r} in {name} and {names[i]!r} in the data.")


def open_start(name: str | None, images: LabelledImages | StreamedImages) -> DualRatePipeline | None:
    """The trained model that a training starts from, in float32, or `None` where none is named.

    Raises:
        ValueError: If it has other classes or another size than the images.
    """
    if name is None:
        return None
    pipeline = DualRatePipeline.from_pretrained(name, dtype=torch.float32)
    config = pipeline.denoiser.config
    for key, theirs, ours in (
        ("num_classes", config.num_classes, images.num_classes),
        ("sample_size", pipeline.denoiser.image_size, (images.height, images.width)),
        ("in_channels", config.in_channels, images.channels),
    ):
        if theirs != ours:
            raise ValueError(f"{name} does not fit the images: {key} is {theirs} there and {ours} here.")
    check_classes(name, pipeline, images)
    return pipeline


def take_over(name: str, planned: ModelMixin, trained: ModelMixin) -> None:
    """Load a trained network's weights into the one that the preset plans.

    Raises:
        ValueError: If their shapes differ.
    """
    shape = ("level_channels", "level_types", "level_blocks", "patch_size", "attention_head_dim", "embedding_dim")
    for key in (*shape, "context_channels", "prediction_hand_over"):
        theirs, ours = (network.config[key] for network in (trained, planned))
        if key == "context_channels":  # by default the levels' own
            theirs, ours = theirs or trained.config["level_channels"], ours or planned.config["level_channels"]
        if json.dumps(theirs) != json.dumps(ours):  # lists and tuples alike
            place = f"{key} of the {type(planned).__name__}"
            raise ValueError(f"{name} does not fit the preset: {place} is {theirs} there and {ours} here.")
    planned.load_state_dict(trained.state_dict())


def fingerprint_of(model: DualRatePipeline) -> str:
    """A short digest of a model's weights, the same wherever it lies."""
    digest = hashlib.blake2b(digest_size=16)
    for network in filter(None, (model.context_encoder, model.denoiser)):
        for name, weight in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def make_scheduler(configuration: Configuration) -> DualRateScheduler:
    """The scheduler that a trained model is saved with."""
    return DualRateScheduler(**configuration.networks.scheduler, second_order=configuration.sampling.second_order)


def schedule_of(scheduler: DualRateScheduler) -> Schedule:
    """The noise schedule as a function of time in [0, 1], as losses take it."""

    def log_snr(t: Tensor) -> Tensor:
        return scheduler.log_snr(t * scheduler.config.num_train_timesteps)

    def log_snr_rate(t: Tensor) -> Tensor:
        return scheduler.log_snr_rate(t * scheduler.config.num_train_timesteps)

    return Schedule(log_snr, log_snr_rate)


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW as a recipe has it."""
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.adam_weight_decay,
    )


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


def sample_images(
    pipeline: DualRatePipeline, *, count: int = 32, seed: int = 0
) -> tuple[list[Image.Image], list[str] | None]:
    """Sample as the pipeline does by default; classes and seeds are the same at every call.

    Returns:
        The images, and the name of each one's class where there are classes.
    """
    num_classes = pipeline.denoiser.config.num_classes
    labels = [i * num_classes // count for i in range(count)] if num_classes else None
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    output = pipeline(class_labels=labels, batch_size=None if labels else count, generator=generators)
    names = [pipeline.id2label.get(label, str(label)) for label in labels] if labels else None
    return cast(ImagePipelineOutput, output).images, names
