"""Train diffusers' `UNet2DModel` as a single-rate model that predicts v: the network that the DeepCache package works on.

    python -m research.train_unet --preset digits8 --unet runs/unet.json --dataset_name digits --label_column label --output_dir runs/unet

`--unet` holds the arguments of `UNet2DModel`. Process, loss and recipe are the preset's, as `train_single_rate.py` has
them, so that the study can compare; without its checkpoints and trackers, on one process. The result is a folder that
`DDIMPipeline.from_pretrained` loads, holding the EMA weights. The scripts of `examples/` take it as any model of diffusers.
"""

import math
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_dualrate.arguments import configure
from diffusers_dualrate.flags import argument_parser
from diffusers_dualrate.losses import denoising_loss, draw, drop_condition
from diffusers_dualrate.optimization import make_lr_scheduler, make_optimizer
from diffusers_dualrate.pair import schedule_of
from diffusers_dualrate.records import read_json
from diffusers_dualrate.streams import ShuffledIndices

from . import EXAMPLES
from .letters import open_images as open_any

_UNSUPPORTED = (
    *("mixed_precision", "gradient_accumulation_steps", "gradient_checkpointing", "train_batch_size"),
    *("streaming", "resolution", "report_to", "push_to_hub", "hub_model_id"),
    *("resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
)


def parse_args(argv=None):
    parser = argument_parser(__doc__, presets=EXAMPLES / "presets")
    parser.add_argument("--unet", type=Path, required=True, help="JSON file of the arguments of UNet2DModel.")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in _UNSUPPORTED if getattr(args, name) != parser.get_default(name)]
    if given:
        parser.error(f"this script has no {', '.join(given)}")
    return args


def timesteps_of(log_snr, scheduler):
    """Timesteps as in-tree schedulers count them, from 0, of log-SNRs on the plain cosine schedule."""
    low, high = (math.atan(math.exp(-scheduler.config[name] / 2)) for name in ("log_snr_max", "log_snr_min"))
    return (torch.atan(torch.exp(-log_snr / 2)) - low) / (high - low) * len(scheduler) - 1


def without_null_label(unet: UNet2DModel) -> UNet2DModel:
    """The same network without its last class, for images whose labels were never dropped: nothing was learned of it."""
    rows = unet.config.num_class_embeds - 1
    fewer = UNet2DModel.from_config(unet.config, num_class_embeds=rows)
    name = "class_embedding.weight"
    weights = unet.state_dict()
    fewer.load_state_dict(weights | {name: weights[name][:rows]})
    return fewer


def main(args, open_images=open_any):
    shape = read_json(args.unet)
    configuration = configure(args, "train_single_rate")
    recipe, seed = configuration.recipe, configuration.options.seed
    images = open_images(configuration.data, **configuration.image_options)

    set_seed(seed)
    device = PartialState().device
    # One more row than classes: the null label.
    unet = UNet2DModel(**shape, num_class_embeds=None if images.num_classes is None else images.num_classes + 1).to(
        device
    )
    scheduler = configuration.make_scheduler()
    schedule = schedule_of(scheduler, recipe.bias)
    optimizer = make_optimizer(unet.parameters(), recipe)
    lr_scheduler = make_lr_scheduler(optimizer, recipe)
    batch_size, steps = recipe.train_batch_size, recipe.max_train_steps
    loader = DataLoader(images, batch_size, sampler=ShuffledIndices(len(images), seed, 0, steps * batch_size))
    ema = EMAModel(unet.parameters(), decay=recipe.ema_decay)

    def denoise(z, log_snr, class_labels, context, context_log_snr):
        return unet(z, timesteps_of(log_snr, scheduler), class_labels=class_labels).sample

    for step, batch in enumerate(tqdm(loader, unit="step")):
        batch = {name: values.to(device) for name, values in batch.items()}
        x, class_labels = batch["pixel_values"], batch.get("class_labels")
        draws = draw(seed, step, range(len(x)), x.shape[1:], device)
        class_labels = drop_condition(class_labels, draws, recipe.label_dropout, images.num_classes)
        result = denoising_loss(denoise, None, x, class_labels, draws, schedule=schedule)
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.max_grad_norm)
        if not norm.isfinite():
            raise ValueError(f"The training diverged at step {step}.")
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(unet.parameters())

    ema.copy_to(unet.parameters())
    if images.num_classes is not None and recipe.label_dropout == 0:
        unet = without_null_label(unet)
    process = DDIMScheduler(
        trained_betas=scheduler.betas.tolist(), prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDIMPipeline(unet.eval(), process).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
