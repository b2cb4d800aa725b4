"""The sets of images that are measured: real ones and samples, chosen in the proportions of the classes.

Each set is cut into the same batches whatever the number of processes, and dealt out among them. Every image is a
function of its place in the set and the set's seed alone, so any number of processes measure the same images.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .inventory import ImageSet, captions_from_bytes, choose_caption
from .latents import compression_of, decode
from .losses import seed_of
from .pipeline import DualRatePipeline

Shown = Tensor | list[str] | None
"""What images show: classes [B], a caption of each, or nothing that is known."""

Batch = tuple[range, Tensor, Shown]
"""Positions in the set, images [B, C, H, W], and what they show."""

# Far from the seeds that trainings use, so that no augmentation and no noise was seen before.
FRESH_SEED = 1_000_003


def pixel_options(pipe: DualRatePipeline) -> dict:
    """Size and channels of the images that a model draws, as `sources.open_images` takes them."""
    if pipe.vae is None:
        return {"resolution": pipe.denoiser.config.sample_size, "channels": pipe.denoiser.config.in_channels}
    height, width = (side * compression_of(pipe.vae) for side in pipe.denoiser.image_size)
    return {"resolution": (height, width), "channels": pipe.vae.config.in_channels}


def choose(images: ImageSet, count: int, seed: int) -> list[list[int]]:
    """Images in random order as pairs (repeat, index), the classes in proportion to the data."""
    generator = torch.Generator().manual_seed(seed_of(FRESH_SEED, seed))
    order = torch.randperm(len(images), generator=generator)
    if images.class_labels is not None:
        order = order[images.class_labels[order].argsort(stable=True)]
    # One of every len / count in the order of classes; where more are asked for than there are, some are repeated.
    position = torch.arange(count)
    rank = position * len(images) // count
    repeat = position - (rank * count + len(images) - 1) // len(images)
    return torch.stack([repeat, order[rank]], dim=1)[torch.randperm(count, generator=generator)].tolist()


def shown_by(images: ImageSet, chosen: Sequence[Sequence[int]]) -> Shown:
    """What images show that `choose` chose; of several captions one that is drawn, as in training."""
    if images.captions is not None:
        return [choose_caption(images.captions[index], FRESH_SEED, repeat, index) for repeat, index in chosen]
    return None if images.class_labels is None else images.class_labels[[index for _, index in chosen]]


def batches_of(count: int, batch_size: int, accelerator: Accelerator) -> Iterable[range]:
    """This process's share of `range(count)` in batches: the same batches, whatever the number of processes."""
    batches = [range(count)[first : first + batch_size] for first in range(0, count, batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    return tqdm(mine, disable=not accelerator.is_main_process)


def as_bytes(x: Tensor) -> Tensor:
    """Images as a file of 8 bits a channel holds them."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def real_batches(
    images: ImageSet, epoch: int, chosen: Sequence[Sequence[int]], batch_size: int, accelerator: Accelerator
) -> Iterator[Batch]:
    """Real images of this process, those chosen, augmented from an epoch on."""
    for positions in batches_of(len(chosen), batch_size, accelerator):
        rows = [chosen[position] for position in positions]
        items = [images[epoch + repeat, index] for repeat, index in rows]
        labels: Shown = torch.stack([item["class_labels"] for item in items]) if "class_labels" in items[0] else None
        labels = (
            captions_from_bytes(torch.stack([item["caption"] for item in items])) if images.has_captions else labels
        )
        yield positions, as_bytes(torch.stack([item["pixel_values"] for item in items])), labels


def sampled_batches(
    pipe: DualRatePipeline,
    shown: Shown,
    count: int,
    seed: int,
    steps: dict,
    batch_size: int,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """Samples of this process, image i from a seed of its own.

    Args:
        pipe: The model.
        shown: Class or prompt of each sample, for a model of either.
        count: Number of samples, over all processes.
        seed: Each samples a set of its own.
        steps: How the pipeline samples: `num_inference_steps` and whatever else it is called with.
        batch_size: Samples of a batch.
        accelerator: Knows this process and how many there are.
    """
    pipe.set_progress_bar_config(disable=True)
    for positions in batches_of(count, batch_size, accelerator):
        chunk = None if shown is None else shown[positions.start : positions.stop]
        generator = [torch.Generator().manual_seed(seed_of(FRESH_SEED, seed, i)) for i in positions]
        asked = chunk.tolist() if isinstance(chunk, Tensor) else chunk
        x = pipe(
            asked, batch_size=len(positions), generator=generator, output_type="latent", return_dict=False, **steps
        )[0]
        x = x if pipe.vae is None else decode(pipe.vae, x)
        yield positions, as_bytes(x.float().cpu()), chunk
