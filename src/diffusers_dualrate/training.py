"""What the training examples share before and beside a run: flags, preset, data, networks as one module, optimiser, samples.

No loop and no mathematics: those are in the examples and in `losses.py`. The run itself is in `runs.py`.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn

from .augmentation import Augmentation
from .data import LabelledImages, load_images
from .letters import LETTERS, Letters
from .pipeline import DualRatePipeline
from .streams import StreamedImages


class TrainablePair(nn.Module):
    """Both networks of a pair, or a single-rate one alone, as one module with one `forward`.

    One `prepare`, one clip and one EMA call then serve both, and wrappers such as DDP see every call.
    """

    def __init__(self, denoiser: nn.Module, context_encoder: nn.Module | None = None):
        super().__init__()
        self.denoiser = denoiser
        self.context_encoder = context_encoder

    def forward(self, loss_function: Callable, *args, **kwargs):
        """Call `loss_function(denoise, encode, ...)` with the networks as the callables that losses take."""
        encode = None if self.context_encoder is None else self.encode
        return loss_function(self.denoise, encode, *args, **kwargs)

    def encode(self, z: Tensor, log_snr: Tensor, class_labels: Tensor | None) -> tuple[Tensor, ...]:
        """Projected context of z_τ."""
        return self.denoiser.project_context(self.context_encoder(z, log_snr, class_labels).context)

    def denoise(self, z: Tensor, log_snr: Tensor, class_labels: Tensor | None, context, context_log_snr) -> Tensor:
        """Velocity predicted from z_t and, where there is one, the projected context."""
        return self.denoiser(z, log_snr, class_labels, context, context_log_snr).sample


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Flags of every training example, with the names that diffusers' own examples use.

    A flag that is also a key of the preset's recipe has no default here: given, it overrides the preset.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", required=True, help="JSON file with networks, scheduler and training recipe.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name", help="Data set on the Hub or in a local folder, read with `datasets`; or letters, or digits."
    )
    data.add_argument("--train_data_dir", help="Folder of images; one sub-folder per class.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    data.add_argument("--label_column", help="Column of classes; none trains an unconditional model.")
    data.add_argument("--num_classes", type=int, help="Number of classes; default: those that the data set has.")
    data.add_argument("--streaming", action="store_true", help="Read rows as they are needed, downloading nothing.")
    data.add_argument("--shuffle_buffer", type=int, default=10_000, help="Rows of a stream shuffled at a time.")
    data.add_argument("--resolution", type=int, help="Side of the training images; default: the preset's.")
    data.add_argument(
        "--on_corrupt", choices=["raise", "skip"], default="raise", help="What an unreadable image does."
    )
    data.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--resume_from_checkpoint", help="A checkpoint's folder, or 'latest'.")
    run.add_argument("--checkpointing_steps", type=int, default=1000)
    run.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest this many.")
    run.add_argument("--validation_steps", type=int, default=1000, help="Steps between sample grids; 0 for none.")
    run.add_argument("--report_to", help="A tracker of Accelerate's, such as tensorboard, or 'all'.")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    run.add_argument("--push_to_hub", action="store_true", help="Publish the trained model.")
    run.add_argument("--hub_model_id", help="Repository to publish in; default: the name of the output folder.")
    recipe = parser.add_argument_group("recipe", "Overrides of the preset's values.")
    recipe.add_argument(
        "--train_batch_size",
        type=int,
        help="Images per process and forward pass; default: the preset's global batch, divided.",
    )
    recipe.add_argument("--max_train_steps", type=int)
    recipe.add_argument("--learning_rate", type=float)
    recipe.add_argument("--lr_scheduler")
    recipe.add_argument("--lr_warmup_steps", type=int)
    recipe.add_argument("--max_grad_norm", type=float)
    recipe.add_argument("--ema_decay", type=float)
    recipe.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Any other value of the preset, as JSON: training.bias=0.5 denoiser.level_blocks=[1,1].",
    )
    return parser


def read_preset(args: argparse.Namespace, recipe_name: str = "training") -> dict:
    """Read the preset, with the flags that override its values put in.

    Args:
        args: Flags of `argument_parser`.
        recipe_name: Which of the preset's recipes is followed; it becomes the result's `training`.

    Raises:
        ValueError: If it lacks a part, or an override names nothing in it or is no JSON.
    """
    preset = json.loads(Path(args.preset).read_text())
    missing = {"context_encoder", "denoiser", "scheduler", recipe_name} - preset.keys()
    if missing:
        raise ValueError(f"The preset {args.preset} lacks {', '.join(sorted(missing))}.")
    recipe = preset["training"] = preset[recipe_name]
    if args.resolution is not None:  # first, since an override names one value
        for network in ("context_encoder", "denoiser"):
            preset[network]["sample_size"] = args.resolution
        size = preset["scheduler"].get(
            "image_size"
        )  # the schedule is shifted for it, at the data's end mostly not at all
        for name in ("image_size", "noise_high"):
            if size is not None and preset["scheduler"].get(name) == size:
                preset["scheduler"][name] = args.resolution
    for override in args.override:
        key, _, value = override.partition("=")
        part, _, name = key.partition(".")
        if name not in preset.get(part, {}):
            raise ValueError(f"The override {override!r} names no value of the preset {args.preset}.")
        try:
            preset[part][name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"The value of the override {override!r} is no JSON: {error}.") from error
    # The batch is the global one in the preset and a part of it in the flag: the run multiplies.
    recipe |= {
        key: value
        for key, value in vars(args).items()
        if key in recipe and value is not None and key != "train_batch_size"
    }
    return preset


def name_data(args: argparse.Namespace) -> str:
    """What records call the data: a folder by its own name, a data set of the Hub in full."""
    name = args.dataset_name or args.train_data_dir or "none"
    return Path(name).name if Path(name).exists() else name


def open_images(args: argparse.Namespace, preset: dict) -> LabelledImages | StreamedImages | Letters:
    """Open the data set that the arguments name, augmented as the preset says; letters are rendered, not read."""
    if args.dataset_name == "letters":
        if args.streaming or args.num_classes not in (None, len(LETTERS)):
            raise ValueError(
                "The letters are rendered, of 26 classes: they take neither --streaming nor --num_classes."
            )
        size, channels = preset["denoiser"]["sample_size"], preset["denoiser"]["in_channels"]
        return Letters(size, label_column=args.label_column, channels=channels, seed=args.seed)
    dataset = load_images(
        args.dataset_name,
        args.train_data_dir,
        image_column=args.image_column,
        label_column=args.label_column,
        config_name=args.dataset_config_name,
        streaming=args.streaming,
        cache_dir=args.cache_dir,
    )
    options = {
        "image_column": args.image_column,
        "label_column": args.label_column,
        "num_classes": args.num_classes,
        "augmentation": Augmentation(**preset["training"]["augmentation"]),
        "channels": preset["denoiser"]["in_channels"],
        "seed": args.seed,
        "on_corrupt": args.on_corrupt,
    }
    if args.streaming:
        options["buffer_size"] = args.shuffle_buffer
    return (StreamedImages if args.streaming else LabelledImages)(
        dataset, preset["denoiser"]["sample_size"], **options
    )


def check_classes(name: str, pipe: DualRatePipeline, images) -> None:
    """Refuse a model whose classes are not those of the images, in number, name and order."""
    ours, theirs = images.num_classes, pipe.denoiser.config.num_classes
    if ours != theirs:
        raise ValueError(
            f"{name} has {theirs or 'no'} classes and the data {ours or 'no'}: see --label_column, --num_classes."
        )
    named = pipe.id2label.keys() & (images.id2label or {}).keys()
    differing = [i for i in sorted(named) if pipe.id2label[i] != images.id2label[i]]
    if differing:
        i = differing[0]
        raise ValueError(f"Class {i} is {pipe.id2label[i]!r} in {name} and {images.id2label[i]!r} in the data.")


def start_from(args: argparse.Namespace, images) -> DualRatePipeline | None:
    """The trained model that `--pretrained_model_name_or_path` names, in float32, or `None`.

    Raises:
        ValueError: If it has other classes or another size than the images.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    pipeline = DualRatePipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    config = pipeline.denoiser.config
    size = config.sample_size if isinstance(config.sample_size, int) else tuple(config.sample_size)
    size = (size, size) if isinstance(size, int) else size
    for name, theirs, ours in (
        ("num_classes", config.num_classes, images.num_classes),
        ("sample_size", size, (images.height, images.width)),
        ("in_channels", config.in_channels, images.channels),
    ):
        if theirs != ours:
            raise ValueError(
                f"{args.pretrained_model_name_or_path} does not fit the images: {name} is {theirs} there and {ours} here."
            )
    check_classes(args.pretrained_model_name_or_path, pipeline, images)
    return pipeline


def take_over(name: str, planned: nn.Module, trained: nn.Module) -> None:
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


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: dict) -> torch.optim.AdamW:
    """AdamW as a recipe has it."""
    return torch.optim.AdamW(
        parameters,
        lr=recipe["learning_rate"],
        betas=(recipe["adam_beta1"], recipe["adam_beta2"]),
        eps=recipe.get("adam_epsilon", 1e-8),
        weight_decay=recipe["adam_weight_decay"],
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, recipe: dict) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over all steps of a recipe."""
    return get_scheduler(
        recipe["lr_scheduler"],
        optimizer,
        num_warmup_steps=recipe["lr_warmup_steps"],
        num_training_steps=recipe["max_train_steps"],
    )


def sample_images(pipeline: DualRatePipeline, *, count: int = 32, seed: int = 0) -> list[Image.Image]:
    """Sample with the pipeline's own N and K; classes and seeds are the same at every call."""
    num_classes = pipeline.denoiser.config.num_classes
    labels = [i * num_classes // count for i in range(count)] if num_classes else None
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipeline(class_labels=labels, batch_size=None if labels else count, generator=generators).images
