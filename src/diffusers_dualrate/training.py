"""Plumbing that the training examples share: configuration, one module for both networks, EMA, checkpoints, samples.

No loop and no mathematics: those are in the examples and in `losses.py`. Distribution is Accelerate's.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .data import Augmentation, LabelledImages, ShuffledIndices, load_images
from .letters import Letters
from .pipeline import DualRatePipeline

_CHECKPOINT = "checkpoint-"


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
    data.add_argument("--label_column", help="Column of classes; none trains an unconditional model.")
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
    run.add_argument("--report_to", help="A tracker of Accelerate's, such as tensorboard.")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    recipe = parser.add_argument_group("recipe", "Overrides of the preset's values.")
    recipe.add_argument("--train_batch_size", type=int, help="Images per process and forward pass.")
    recipe.add_argument("--max_train_steps", type=int)
    recipe.add_argument("--learning_rate", type=float)
    recipe.add_argument("--lr_scheduler")
    recipe.add_argument("--lr_warmup_steps", type=int)
    recipe.add_argument("--max_grad_norm", type=float)
    recipe.add_argument("--ema_decay", type=float)
    return parser


def read_preset(args: argparse.Namespace) -> dict:
    """Read the preset, with the flags that override its recipe and the resolution put in."""
    preset = json.loads(Path(args.preset).read_text())
    missing = {"context_encoder", "denoiser", "scheduler", "training"} - preset.keys()
    if missing:
        raise ValueError(f"The preset {args.preset} lacks {', '.join(sorted(missing))}.")
    preset["training"] |= {
        key: value for key, value in vars(args).items() if key in preset["training"] and value is not None
    }
    if args.resolution is not None:
        for network in ("context_encoder", "denoiser"):
            preset[network]["sample_size"] = args.resolution
    return preset


def open_images(args: argparse.Namespace, preset: dict) -> LabelledImages | Letters:
    """Open the data set that the arguments name, augmented as the preset says; letters are rendered, not read."""
    if args.dataset_name == "letters":
        return Letters(preset["denoiser"]["sample_size"], label_column=args.label_column, seed=args.seed)
    return LabelledImages(
        load_images(
            args.dataset_name,
            args.train_data_dir,
            image_column=args.image_column,
            label_column=args.label_column,
            cache_dir=args.cache_dir,
        ),
        preset["denoiser"]["sample_size"],
        image_column=args.image_column,
        label_column=args.label_column,
        augmentation=Augmentation(**preset["training"]["augmentation"]),
        channels=preset["denoiser"]["in_channels"],
        seed=args.seed,
        on_corrupt=args.on_corrupt,
    )


def images_per_step(accelerator: Accelerator, recipe: dict) -> int:
    """Size of the global batch: all processes, all parts of the accumulation."""
    return recipe["train_batch_size"] * accelerator.num_processes * accelerator.gradient_accumulation_steps


def make_loader(images: LabelledImages, accelerator: Accelerator, args, recipe: dict, first_step: int) -> DataLoader:
    """Batches from `first_step` to the end of training, before `prepare`: an endless shuffle, cut to measure."""
    per_step = images_per_step(accelerator, recipe)
    order = ShuffledIndices(len(images), args.seed, first_step * per_step, recipe["max_train_steps"] * per_step)
    return DataLoader(
        images, recipe["train_batch_size"], sampler=order, num_workers=args.dataloader_num_workers, drop_last=True
    )


def open_run(
    args: argparse.Namespace, preset: dict, pair: TrainablePair, images: LabelledImages, accelerator: Accelerator
) -> Path | None:
    """Claim the output folder for this run and find the checkpoint to resume from, if one is asked for.

    A folder without checkpoint or model holds nothing that could be lost, so a start that failed does not block it.

    Raises:
        ValueError: If the folder holds another run, or this one and it is not to be resumed, or the checkpoint does
            not exist or belongs to another run.
    """
    output_dir = Path(args.output_dir)
    configuration = {
        "networks": {name: dict(network.config) for name, network in pair.named_children()},
        "scheduler": preset["scheduler"],
        # How long a run is may change while it goes on.
        "training": {key: value for key, value in preset["training"].items() if key != "max_train_steps"},
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "data": args.dataset_name or args.train_data_dir,
        "images": len(images),
        "seed": args.seed,
    }
    configuration = json.loads(json.dumps(configuration))
    checkpoint = None
    if args.resume_from_checkpoint == "latest":
        checkpoint = next(iter(list_checkpoints(output_dir)[::-1]), None)
    elif args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (_is_checkpoint(checkpoint) and (checkpoint / "ema.safetensors").is_file()):
            raise ValueError(f"{checkpoint} is not a checkpoint of a training run.")
    holds_run = bool(list_checkpoints(output_dir)) or (output_dir / "model_index.json").exists()
    if holds_run and not args.resume_from_checkpoint:
        raise ValueError(
            f"{output_dir} already holds a run: give --resume_from_checkpoint latest, or another --output_dir."
        )
    for folder in {output_dir if holds_run else None, checkpoint and checkpoint.parent} - {None}:
        record = folder / "run.json"
        known = json.loads(record.read_text()) if record.is_file() else {}
        differing = [key for key in configuration if known.get(key) != configuration[key]]
        if differing:
            raise ValueError(
                f"{folder} belongs to a run with another configuration: {', '.join(differing)} differ, see {record}."
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "run.json").write_text(json.dumps(configuration, indent=2) + "\n")
    return checkpoint


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(filter(_is_checkpoint, output_dir.glob(f"{_CHECKPOINT}*")), key=step_of)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith(_CHECKPOINT) and path.name.removeprefix(_CHECKPOINT).isdigit()


def step_of(checkpoint: Path) -> int:
    """Number of training steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def save_checkpoint(accelerator: Accelerator, ema: EMAModel, args: argparse.Namespace, step: int) -> None:
    """Save everything a run needs to go on. The folder gets its name only when it is complete."""
    output_dir = Path(args.output_dir)
    partial, final = output_dir / f".{_CHECKPOINT}{step}", output_dir / f"{_CHECKPOINT}{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # every process has written its part
    if accelerator.is_main_process:
        shadow = {str(i): parameter.contiguous() for i, parameter in enumerate(ema.shadow_params)}
        save_file(shadow, partial / "ema.safetensors")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if args.checkpoints_total_limit:
            for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, ema: EMAModel, checkpoint: Path) -> None:
    """Restore the prepared networks, optimiser and learning rate, and the EMA weights.

    Raises:
        ValueError: If a file of the checkpoint is damaged.
    """
    try:
        accelerator.load_state(str(checkpoint))
        shadow = load_file(checkpoint / "ema.safetensors", device=str(accelerator.device))
        ema.shadow_params = [shadow[str(i)] for i in range(len(ema.shadow_params))]
    except (SafetensorError, RuntimeError, OSError, EOFError, LookupError, UnpicklingError) as error:
        raise ValueError(f"The checkpoint {checkpoint} cannot be read: {error}") from error
    ema.optimization_step = step_of(checkpoint)


def rows_of_process(accelerator: Accelerator, part: int, count: int) -> range:
    """Numbers in the global batch of the `count` rows that this process holds in a part of a step's accumulation."""
    first = (part * accelerator.num_processes + accelerator.process_index) * count
    return range(first, first + count)


def announce(
    accelerator: Accelerator,
    args: argparse.Namespace,
    preset: dict,
    pair: nn.Module,
    images: LabelledImages,
    step: int,
) -> None:
    """Print what is about to be trained, and start the trackers."""
    recipe = preset["training"]
    if args.report_to:
        accelerator.init_trackers("diffusers-dualrate", config={k: v for k, v in vars(args).items() if v is not None})
    per_step = images_per_step(accelerator, recipe)
    accelerator.print(json.dumps(recipe, indent=2))
    for name, network in accelerator.unwrap_model(pair).named_children():
        accelerator.print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    accelerator.print(
        f"{len(images):,} images, {images.num_classes or 'no'} classes; steps {step:,} to "
        f"{recipe['max_train_steps']:,} of {per_step:,} images on {accelerator.num_processes} processes"
    )


@contextlib.contextmanager
def ema_weights(ema: EMAModel, pair: nn.Module) -> Iterator[None]:
    """Let the networks hold the EMA weights for a while, without dropout."""
    ema.store(pair.parameters())
    ema.copy_to(pair.parameters())
    was_training = pair.training
    pair.eval()
    try:
        yield
    finally:
        pair.train(was_training)
        ema.restore(pair.parameters())


def save_pipeline(pipeline: DualRatePipeline, network: str, accelerator: Accelerator, args, preset: dict) -> None:
    """Save a trained model where `from_pretrained` finds it, with a record of its training beside the weights."""
    pipeline.save_pretrained(args.output_dir)
    recipe = preset["training"]
    record = {
        "preset": Path(args.preset).stem,
        "network": network,
        "data": Path(args.dataset_name or args.train_data_dir).name,
        "images_seen": recipe["max_train_steps"] * images_per_step(accelerator, recipe),
        "seed": args.seed,
        "recipe": recipe,
    }
    (Path(args.output_dir) / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def sample_grid(pipeline: DualRatePipeline, path: Path, *, columns: int = 8, rows: int = 4, seed: int = 0) -> None:
    """Write a picture of samples with the pipeline's own N and K; classes and seeds are the same at every call."""
    count, num_classes = columns * rows, pipeline.denoiser.config.num_classes
    labels = [i * num_classes // count for i in range(count)] if num_classes else None
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=labels, batch_size=None if labels else count, generator=generators).images
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=rows, cols=columns).save(path)
