"""The sets of images that are measured: real ones and samples, chosen in the proportions of the classes.

Each set is cut into the same batches whatever the number of processes, and dealt out among them. Every image is a
function of its place in the set and the set's seed alone, so any number of processes measure the same images.
"""

import torch
from tqdm.auto import tqdm

from diffusers_dualrate import training
from diffusers_dualrate.arguments import select
from diffusers_dualrate.configuration import Data
from diffusers_dualrate.letters import Letters
from diffusers_dualrate.losses import seed_of

# Far from the seeds that trainings use, so that no augmentation and no noise was seen before.
FRESH_SEED = 1_000_003


def open_images(args, size, augmentation, split=None, *, channels=3):
    """A split of the data set at a size, augmented as no training saw it; letters are rendered, and have no splits."""
    if args.dataset_name == "letters":
        return Letters(size, label_column=args.label_column, channels=channels, seed=FRESH_SEED)
    data, split = Data(**select(args, Data)), split or args.reference_split
    return training.open_images(data, size, channels=channels, augmentation=augmentation, seed=FRESH_SEED, split=split)


def choose(images, count, seed):
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


def batches_of(count, args, accelerator):
    """This process's share of `range(count)` in batches: the same batches, whatever the number of processes."""
    batches = [range(count)[first : first + args.batch_size] for first in range(0, count, args.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    return tqdm(mine, disable=not accelerator.is_main_process)


def as_bytes(x):
    """Images as a file of 8 bits a channel holds them."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def real_batches(images, epoch, chosen, args, accelerator):
    """Real images of this process, augmented from an epoch on: yields (positions, images, classes)."""
    for positions in batches_of(len(chosen), args, accelerator):
        rows = [chosen[position] for position in positions]
        items = [images[epoch + repeat, index] for repeat, index in rows]
        labels = torch.stack([item["class_labels"] for item in items]) if args.label_column else None
        yield positions, as_bytes(torch.stack([item["pixel_values"] for item in items])), labels


def sampled_batches(pipe, labels, count, seed, steps, args, accelerator):
    """Samples of this process, image i from a seed of its own: yields (positions, images, classes)."""
    pipe.set_progress_bar_config(disable=True)
    for positions in batches_of(count, args, accelerator):
        chunk = None if labels is None else labels[positions.start : positions.stop]
        generator = [torch.Generator().manual_seed(seed_of(FRESH_SEED, seed, i)) for i in positions]
        size = {"batch_size": len(positions)} if chunk is None else {"class_labels": chunk.tolist()}
        x = pipe(**size, generator=generator, output_type="latent", **steps).images
        yield positions, as_bytes(x.float().cpu()), chunk
