"""The flags of the examples. Nothing here imports torch or diffusers, so that `--help` and a wrong flag are answered at once.

Flags have the names that diffusers' own examples use. One that is also a value of the preset has no default here: given,
it overrides the preset.
"""

import argparse
from pathlib import Path

from .decoding import MAX_IMAGE_PIXELS
from .recipes import LR_SCHEDULERS

VAE = (
    "Autoencoder of diffusers whose latents are learned, or a model that has one; default: that of the model that the "
    "training starts from."
)
"""Help of a flag."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and after each flag its default, where it has one."""

    def _get_help_string(self, action):
        if action.help and (action.default in (None, False, [], argparse.SUPPRESS) or action.required):
            return action.help
        if not action.help and action.default is None:
            return action.help
        return super()._get_help_string(action)


def argument_parser(description: str, *, presets: Path, steps: str = "Number of steps.") -> argparse.ArgumentParser:
    """Flags of every training example.

    Args:
        description: What the example does.
        presets: Folder of the presets that may be named without path and ending.
        steps: What `--max_train_steps` counts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.set_defaults(presets=presets)
    parser.add_argument(
        "--preset",
        required=True,
        help="Networks, scheduler and recipe: a JSON file, also a run's configuration.json, or one of "
        f"{', '.join(sorted(path.stem for path in presets.glob('*.json')))}.",
    )
    add_data_flags(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", required=True, help="Folder of this run alone, and of the model that it leaves.")
    run.add_argument("--seed", type=int, default=0, help="Seed of weights, order, noise and augmentation.")
    run.add_argument(
        "--resume_from_checkpoint", help="'latest', or a checkpoint's name in the output folder, or its path."
    )
    run.add_argument("--checkpointing_steps", type=int, default=1000, help="Steps between checkpoints.")
    run.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest this many.")
    run.add_argument(
        "--validation_steps",
        type=int,
        help="Steps between sample grids, 0 for none; default: a quarter of the run, at most 1000.",
    )
    run.add_argument("--report_to", help="A tracker of Accelerate's, such as tensorboard, or 'all'.")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: Accelerate's setting.")
    run.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Parts that a step's batch is cut into."
    )
    run.add_argument("--gradient_checkpointing", action="store_true", help="Compute features twice, to save memory.")
    run.add_argument(
        "--no_latent_cache",
        action="store_true",
        help="Encode images to latents anew in each step, instead of once into files beside the data sets' copies.",
    )
    run.add_argument("--push_to_hub", action="store_true", help="Publish the trained model.")
    run.add_argument("--hub_model_id", help="Repository to publish in; default: the name of the output folder.")
    recipe = parser.add_argument_group("recipe", "Overrides of the preset's values.")
    recipe.add_argument(
        "--train_batch_size",
        type=int,
        help="Images per process and forward pass; default: the preset's global batch, divided.",
    )
    recipe.add_argument("--max_train_steps", type=int, help=steps)
    recipe.add_argument("--learning_rate", type=float, help="Peak learning rate of AdamW.")
    recipe.add_argument("--lr_scheduler", help=f"Its course: {', '.join(LR_SCHEDULERS)}.")
    recipe.add_argument("--lr_warmup_steps", type=int, help="Steps in which it rises.")
    recipe.add_argument("--max_grad_norm", type=float, help="Longer gradients are shortened to this norm.")
    recipe.add_argument("--ema_decay", type=float, help="Decay of the averaged weights, which are saved.")
    recipe.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Any other value of the preset, as JSON: training.bias=0.5 denoiser.level_blocks=[1,1].",
    )
    sampling = parser.add_argument_group("sampling", "How the model samples by default, saved with it.")
    sampling.add_argument("--num_inference_steps", type=int, help="N, the number of steps.")
    sampling.add_argument("--num_context_steps", type=int, help="K, how many of them refresh the context.")
    sampling.add_argument("--guidance_scale", type=float, help="Scale of classifier-free guidance; 1 is none.")
    return parser


def add_light_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of a light network that no preset shapes."""
    parser.add_argument(
        "--light",
        choices=["auto"],
        help="Shape the light network from a heavy network of diffusers: a quarter to a sixth of its FLOPs, and its levels. "
        "Default: the preset's shape.",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which images are read, and how."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name", help="Data set on the Hub or in a local folder, read with `datasets`; or digits."
    )
    data.add_argument("--train_data_dir", help="Folder of images; one sub-folder per class.")
    data.add_argument("--image_column", default="image", help="Column of the images.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    data.add_argument(
        "--label_column", help="Column of classes, 'label' for sub-folders; without it classes are not learned."
    )
    data.add_argument("--num_classes", type=int, help="Number of classes; default: those that the data set has.")
    data.add_argument(
        "--caption_column", help="Column of captions, a string or a list a row, of which one is drawn each time."
    )
    data.add_argument("--streaming", action="store_true", help="Read rows as they are needed, downloading nothing.")
    data.add_argument("--shuffle_buffer", type=int, default=10_000, help="Rows of a stream shuffled at a time.")
    data.add_argument("--resolution", type=int, help="Side of the training images; default: the preset's.")
    data.add_argument(
        "--on_corrupt", choices=["raise", "skip"], default="raise", help="What an unreadable image does."
    )
    data.add_argument(
        "--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="A larger image counts as unreadable."
    )
    data.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images ahead.")


def add_text_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names what embeds captions."""
    parser.add_argument(
        "--text_encoder",
        help="Text encoder with its tokenizer, a Hub repository or a folder, also of a whole pipeline: it embeds the "
        "captions, stays as it is, and is saved with the model. Default: that of the model that the training starts from.",
    )
