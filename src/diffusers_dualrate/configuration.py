"""What a run is told: networks, recipe, sampling, data and options, checked as a whole before anything is touched.

A `Configuration` is made once, of a preset, overrides and flags (`arguments.py`). It is written beside the model as
configuration.json, with what the run found at its start. Resuming, evaluation and card read it there. Its sections are
those of a preset, so `--preset configuration.json` repeats a run. What happened in a run is in training.json.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from .captions import CaptionEmbeddings
from .decoding import MAX_IMAGE_PIXELS
from .hosts import HostNetwork
from .inputs import check_components
from .models import UViTContextEncoder, UViTDenoiser
from .ranges import MOST_AT_ONCE, check_boolean, check_integer, check_number
from .recipes import RECIPES, Recipe
from .records import build, fill_in
from .scheduler import DualRateScheduler

FILE = "configuration.json"
PARTS_OF_A_RUN = ("script", "preset", "overrides", "start", "data", "options", "found")
"""What the file holds beside the sections of a preset: what a run was told, and what it found."""

# The values that make a run this one, in options and data. Of networks and recipe nearly all do: see `identify`.
_IDENTIFYING_OPTIONS = ("seed", "gradient_accumulation_steps", "mixed_precision")
_IDENTIFYING_DATA = ("image_column", "label_column", "caption_column")
_MOST_WORKERS = 1024  # more processes than a machine starts for one that trains
# What the Hub calls a data set.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model samples by default. It is saved with the model.

    Args:
        num_inference_steps: N.
        num_context_steps: K, of a pair.
        guidance_scale: Scale of classifier-free guidance, where there are classes; 1 is none.
        second_order: Whether the steps are those of the stochastic DPM-Solver++(2M).
    """

    num_inference_steps: int = 64
    num_context_steps: int | None = None
    guidance_scale: float = 1.0
    second_order: bool = False

    def __post_init__(self):
        check_integer("num_inference_steps", self.num_inference_steps, least=1)
        if self.num_context_steps is not None:
            check_integer("num_context_steps", self.num_context_steps, least=1, most=self.num_inference_steps)
        check_number("guidance_scale", self.guidance_scale, least=1)
        check_boolean("second_order", self.second_order)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Arguments of both networks and of the scheduler, each with every default filled in.

    Args:
        context_encoder: Arguments of [`UViTContextEncoder`], or the description of a [`HostNetwork`]. A heavy network that
            is trained alone has its shape.
        denoiser: Arguments of [`UViTDenoiser`], or such a description. A light network that is trained alone has its shape.
        scheduler: Arguments of [`DualRateScheduler`].
    """

    context_encoder: dict
    denoiser: dict
    scheduler: dict

    def __post_init__(self):
        for name, cls in (
            ("context_encoder", UViTContextEncoder),
            ("denoiser", UViTDenoiser),
            ("scheduler", DualRateScheduler),
        ):
            if not is_of_host(values := getattr(self, name)):
                object.__setattr__(self, name, fill_in(cls, name, values))
        if self.scheduler.pop("second_order"):
            raise ValueError("second_order of the scheduler belongs to the part sampling: the training is the same.")
        for key in ("sample_size", "in_channels"):
            ours, theirs = self.denoiser[key], self.context_encoder[key]
            if ours != theirs:
                raise ValueError(f"{key} must be the same in both networks, got {theirs!r} and {ours!r}.")
        for network in self._make():
            if any(side % network.stride for side in network.image_size):
                raise ValueError(
                    f"sample_size must be divisible by {network.stride} (patch size times downsampling), "
                    f"got {network.config.sample_size}."
                )
        DualRateScheduler(**self.scheduler)

    def _make(self) -> list[Any]:
        """Both networks without weights: what a network refuses is refused, and nothing is allocated."""
        shapes = {UViTContextEncoder: self.context_encoder, UViTDenoiser: self.denoiser}
        with torch.device("meta"):
            return [
                HostNetwork.from_description(shape) if is_of_host(shape) else cls(**shape)
                for cls, shape in shapes.items()
            ]

    def check_pair(self) -> None:
        """Refuse networks that do not fit each other."""
        encoder, denoiser = self._make()
        check_components(denoiser, DualRateScheduler(**self.scheduler), encoder)

    def with_conditions(self, num_classes: int | None, text: dict) -> Self:
        """The same for other classes, or for text of these options of networks. A network of diffusers keeps its own."""
        told = {"num_classes": num_classes, "cross_attention_dim": None, **text}
        changed = (
            network if is_of_host(network) else {**network, **told}
            for network in (self.context_encoder, self.denoiser)
        )
        return type(self)(**dict(zip(("context_encoder", "denoiser"), changed, strict=True)), scheduler=self.scheduler)


def is_of_host(shape: object) -> bool:
    """Whether the shape of a network is the description of one of diffusers."""
    return isinstance(shape, dict) and "network" in shape


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which network is trained, and the models that a training starts from or learns from.

    Args:
        network: "heavy" or "light", where one network is trained alone.
        pretrained_model_name_or_path: Model that a training starts from.
        teacher: Single-rate model that is distilled.
        student: Model that a distillation starts from.
        vae: Autoencoder whose latents are learned, or the model that it is taken from.
        text_encoder: What embeds captions, where no model that a training starts or learns from does.
        light: "auto" where the light network is shaped from the heavy one instead of the preset.
        prompt_list: File of the prompts that a student learns from without data.
    """

    network: str | None = None
    pretrained_model_name_or_path: str | None = None
    teacher: str | None = None
    student: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    light: str | None = None
    prompt_list: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What images a run learns from, and how they are read. The flags of the same names explain each.

    Raises:
        ValueError: If a value is out of its range, or has no effect beside the others.
    """

    dataset_name: str | None = None
    train_data_dir: str | None = None
    image_column: str = "image"
    dataset_config_name: str | None = None
    label_column: str | None = None
    num_classes: int | None = None
    caption_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000
    on_corrupt: str = "raise"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    cache_dir: str | None = None
    dataloader_num_workers: int = 0

    def __post_init__(self):
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir} are two sources of images: "
                "give one of them."
            )
        if self.caption_column is not None and self.label_column is not None:
            raise ValueError(
                f"--caption_column {self.caption_column} and --label_column {self.label_column}: a model is of text or of "
                "classes, give one of them."
            )
        check_integer("shuffle_buffer", self.shuffle_buffer, least=1)
        check_integer("max_image_pixels", self.max_image_pixels, least=1)
        check_integer("dataloader_num_workers", self.dataloader_num_workers, 0, _MOST_WORKERS)
        if self.num_classes is not None:
            check_integer("num_classes", self.num_classes, 1, MOST_AT_ONCE)
            if not self.label_column:
                raise ValueError(f"--num_classes {self.num_classes} needs --label_column, which names the classes.")
        if self.streaming and self.dataloader_num_workers > 1:
            raise ValueError(f"A stream is read by one worker at most, not by {self.dataloader_num_workers}.")

    @property
    def name(self) -> str:
        """What records call the data: a folder by its own name, a data set of the Hub in full."""
        name = self.dataset_name or self.train_data_dir or "none"
        return Path(name).resolve().name if Path(name).exists() else name

    @property
    def hub_name(self) -> str | None:
        """Name of the data set on the Hub; `None` for what lies on this machine, or is made by a library."""
        name = self.dataset_name
        return None if name is None or Path(name).exists() or not _HUB_NAME.fullmatch(name) else name


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run goes, whatever it learns. The flags of the same names explain each.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: str
    seed: int = 0
    resume_from_checkpoint: str | None = None
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int | None = None
    validation_steps: int | None = None
    report_to: str | None = None
    mixed_precision: str | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    images_per_process: int | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    no_latent_cache: bool = False

    def __post_init__(self):
        if self.images_per_process is not None:
            check_integer("train_batch_size", self.images_per_process, 1, MOST_AT_ONCE)
        check_integer("seed", self.seed, least=0, most=2**32 - 1)
        check_integer("checkpointing_steps", self.checkpointing_steps, least=1)
        if self.checkpoints_total_limit is not None:
            check_integer("checkpoints_total_limit", self.checkpoints_total_limit, least=1)
        if self.validation_steps is not None:
            check_integer("validation_steps", self.validation_steps, least=0)
        check_integer("gradient_accumulation_steps", self.gradient_accumulation_steps, least=1)
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"--hub_model_id {self.hub_model_id} has no effect without --push_to_hub.")

    @property
    def repository(self) -> str:
        """Where the model is published, if it is: the output folder's own name where no other is given."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """All that a run is told.

    Args:
        script: Name of the example that runs it.
        preset: Name of the preset that it was made of.
        overrides: Values of the preset that were given by `--override`, as they were given.
        networks: Arguments of the networks and the scheduler.
        recipe: How they are trained.
        sampling: How the model samples by default; a student samples as it was distilled.
        start: What the training starts from.
        data: What it learns from.
        options: How the run goes.
    """

    script: str
    preset: str
    overrides: tuple[str, ...] = ()
    networks: Networks
    recipe: Recipe
    sampling: Sampling
    start: Start
    data: Data
    options: Options

    @property
    def image_options(self) -> dict:
        """How the images are made: arguments of `sources.open_images` beside the data."""
        network = self.networks.denoiser
        latents = (
            {} if self.start.vae is None else {"vae": self.start.vae, "is_cached": not self.options.no_latent_cache}
        )
        return latents | {
            "resolution": network["sample_size"],
            "channels": network["in_channels"],
            "augmentation": self.recipe.augmentation,
            "seed": self.options.seed,
        }

    @property
    def validation_steps(self) -> int:
        """Steps between grids of samples: as told, else four times in a run, and every 1,000 steps in a long one."""
        told = self.options.validation_steps
        return max(1, min(1000, self.recipe.num_steps // 4)) if told is None else told

    def with_conditions(self, num_classes: int | None, captions: CaptionEmbeddings | None = None) -> Self:
        """The same for the classes that the images have, or for what embeds their captions."""
        text = {} if captions is None else captions.network_options
        return dataclasses.replace(self, networks=self.networks.with_conditions(num_classes, text))

    def with_recipe(self, **changes: Any) -> Self:
        """The same with other values in the recipe."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **changes))

    def make_scheduler(self) -> DualRateScheduler:
        """The scheduler that a trained model is saved with."""
        return DualRateScheduler(**self.networks.scheduler, second_order=self.sampling.second_order)

    def divide_batch(self, num_processes: int) -> Self:
        """The same for a number of processes. Where each process is given its images, the global batch follows.

        Raises:
            ValueError: If the batch cannot be divided, or a process would see no context.
        """
        parts = num_processes * self.options.gradient_accumulation_steps
        divided = self
        if self.options.images_per_process is not None:
            divided = self.with_recipe(train_batch_size=self.options.images_per_process * parts)
        size, dropped = divided.recipe.train_batch_size, divided.recipe.share_without_context
        if size % parts:
            raise ValueError(
                f"The preset's train_batch_size {size} is not divisible by {parts}: processes times parts of a step, "
                f"{num_processes} x {self.options.gradient_accumulation_steps}."
            )
        if num_processes > 1 and size - parts < round(dropped * size) < size:
            raise ValueError(
                f"With {size // parts} images per process and forward pass, {dropped:g} of them without context, some processes "
                "would see none at all: give each process more images."
            )
        return divided

    def to_json(self) -> dict:
        """The sections of a preset with every default filled in, and beside them the flags."""
        content = dataclasses.asdict(self)
        networks, recipe = content.pop("networks"), content.pop("recipe")
        for part in ("start", "data", "options"):  # where a machine keeps its files is nobody's business
            content[part] = {name: _without_folders(value) for name, value in content[part].items()}
        return json.loads(json.dumps(content | networks | {self.recipe.section: recipe}))

    @classmethod
    def from_json(cls, content: dict) -> Self:
        """What `to_json` made; what a run found beside it is passed over.

        Raises:
            ValueError: If a part is missing, unknown or out of its range.
        """
        content = told_in(content)
        kind = next((RECIPES[name] for name in RECIPES if content.get("script") == name), None)
        if kind is None:
            raise ValueError(f"script must be one of {', '.join(RECIPES)}, got {content.get('script')!r}.")
        parts = {"sampling": Sampling, "start": Start, "data": Data, "options": Options}
        made = {name: build(part, name, content.pop(name, {})) for name, part in parts.items()}
        made["recipe"] = build(kind, kind.section, content.pop(kind.section, {}))
        networks = {field.name: content.pop(field.name, {}) for field in dataclasses.fields(Networks)}
        made["networks"] = build(Networks, "networks", networks)
        return build(cls, FILE, content | made | {"overrides": tuple(content.get("overrides", ()))})


def make_record(configuration: Configuration, images: dict, models: dict[str, str]) -> dict:
    """The content of configuration.json: what a run was told, and what it found at its start.

    Args:
        configuration: What it was told.
        images: Fingerprint of the images.
        models: Fingerprints of the trained models that it starts or learns from, by the flags that name them.
    """
    return configuration.to_json() | {"found": {"images": images, "models": models}}


def told_in(record: dict) -> dict:
    """What a run was told, of the content of its configuration.json."""
    return {name: value for name, value in record.items() if name != "found"}


def identify(record: dict) -> dict[str, object]:
    """What makes a run this one, from the content of its configuration.json, by dotted names.

    It holds the content of data and models, not their paths. It leaves out how long the run is.
    """
    networks, data = ("context_encoder", "denoiser", "scheduler", "training", "distillation"), record.get("data", {})
    picked = {name: record.get(name, {}) for name in networks}
    for name, network in (("context_encoder", UViTContextEncoder), ("denoiser", UViTDenoiser)):
        if picked[name] and not is_of_host(picked[name]):  # a run may be older than a value, and then has its default
            picked[name] = fill_in(network, name, picked[name])
    picked["options"] = {name: record.get("options", {}).get(name) for name in _IDENTIFYING_OPTIONS}
    picked["data"] = {name: data.get(name) for name in _IDENTIFYING_DATA}
    picked["data"]["shuffle_buffer"] = data.get("shuffle_buffer") if data.get("streaming") else None
    picked["start"] = {"network": record.get("start", {}).get("network")}
    found = record.get("found", {})
    picked["images"], picked["found"] = found.get("images") or {}, {"models": found.get("models")}
    flat = {"script": record.get("script")}
    for section, values in picked.items():
        flat |= {f"{section}.{name}": value for name, value in values.items() if name != "max_train_steps"}
    return flat


def _without_folders(value: object) -> object:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
