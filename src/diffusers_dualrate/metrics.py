"""The metrics of a set of images: what feature extractors and judges see in it, its distances from a reference, and v-losses.

`fd_local` compares samples with a reference that is augmented as the training was, since a model learns that distribution.
FID and FD-DINOv2, as they are published, compare with the images as they are, only resized and cut at the centre.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .captions import CaptionEmbeddings, TrainingConditions
from .conversion import cut_schedule, host_of
from .evaluation import (
    FeatureStatistics,
    ImageClassifier,
    fd_local,
    frechet_distance,
    load_dinov2,
    load_inception,
    nearest_training_image,
    precision_recall,
)
from .image_sets import FRESH_SEED, Batch, batches_of, choose, real_batches
from .inventory import ImageSet
from .latents import encode
from .losses import ContextTimes, denoising_loss, draw, seed_of
from .noise_process import NoiseProcess
from .pair import TrainablePair, schedule_of
from .pipeline import DualRatePipeline
from .prompt_lists import Judges, in_batches, real_images_of
from .refreshes import RefreshPlan
from .scheduler import DualRateScheduler
from .text_encoding import TextEncoding

Extractors = dict[str, Callable[[Tensor], Tensor]]
"""Feature functions by name: images [B, C, H, W] in [-1, 1] to features [B, D]."""

# An epoch of augmentation that nothing else takes.
_REFERENCE_EPOCH = 1_000_000
# Epochs of augmentation: the v-loss takes those from 0 on, the floor of each seed these.
FLOOR_EPOCHS = range(2_000_000, 1_000_000_000, 1_000_000)
# Precision and recall compare every image with every other.
_PRECISION_LIMIT = 10_000
# Images whose nearest one is looked for are halved, if they are twice as large, and so on.
_NEAREST_SIDE = 32


def load_extractors(
    classifier_file: str | None, dinov2: str | None, inception: bool, device: torch.device
) -> tuple[ImageClassifier | None, Extractors, Extractors]:
    """The classifier, if any, and feature functions: of this data, and those that published metrics use."""
    own: Extractors = {}
    published: Extractors = {}
    classifier = None
    if classifier_file:
        classifier = ImageClassifier.load(classifier_file).to(device)
        own["local"] = classifier.features
    if dinov2:
        published["dinov2"] = load_dinov2(dinov2, device)
    if inception:
        published["inception"] = load_inception(device)
    return classifier, own, published


def check_classifier(path: str, classifier: ImageClassifier, channels: int, num_classes: int | None) -> None:
    """Refuse a classifier of other images: its features and classes would still give metrics.

    Raises:
        ValueError: If it has other channels, or other classes where the images have some.
    """
    for name, count in {"in_channels": channels, "num_classes": num_classes}.items():
        if count is not None and classifier.config[name] != count:
            raise ValueError(f"The classifier {path} has {name} {classifier.config[name]}, and the data {count}.")


@dataclass
class Measured:
    """What was measured on a set of images, over all processes.

    Args:
        statistics: Statistics of the features of each extractor.
        features: Features of the first images by each extractor, for precision and recall.
        right: How many images have their class by each judge.
        first: A few images to look at.
    """

    statistics: dict[str, FeatureStatistics]
    features: dict[str, Tensor]
    right: dict[str, int] = field(default_factory=dict)
    first: Tensor | None = None

    def __or__(self, other: "Measured") -> "Measured":
        """Both as one, where each has seen the images with extractors of its own."""
        return Measured(self.statistics | other.statistics, self.features | other.features)


@torch.no_grad()
def measure_images(
    batches: Iterable[Batch], extractors: Extractors, judges: Judges, accelerator: Accelerator, num_first: int = 64
) -> Measured:
    """Pass batches of images through feature extractors and judges; the first images are kept to be looked at."""
    streamed = {name: FeatureStatistics() for name in extractors}
    kept, first = [], []
    right: dict[str, float] = dict.fromkeys(judges, 0)
    for positions, x, labels in batches:
        on_device = x.to(accelerator.device)
        features = {name: extract(on_device) for name, extract in extractors.items()}
        for name in extractors:
            streamed[name].update(features[name])
        if positions.start < _PRECISION_LIMIT:
            kept.append((positions.start, {name: value.cpu() for name, value in features.items()}))
        for name, judge in judges.items():
            assert labels is not None  # where there is a judge, it is known what images show
            right[name] += judge(x, labels).sum().item()
        if positions.start < num_first:
            first.append((positions.start, x))
    streamed = {name: FeatureStatistics(value.sums.cpu()) for name, value in streamed.items() if value.count}
    parts = [part for part in gather_object([streamed]) if part]
    kept, first = (sorted(gather_object(shares), key=lambda share: share[0]) for shares in (kept, first))
    return Measured(
        {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in extractors},
        {name: torch.cat([features[name] for _, features in kept])[:_PRECISION_LIMIT] for name in extractors},
        {name: sum(share[name] for share in gather_object([right])) for name in judges},
        torch.cat([x for _, x in first])[:num_first],
    )


def measure_reference(
    images: ImageSet | None,
    extractors: Extractors,
    count: int,
    cache_dir: str | Path,
    batch_size: int,
    accelerator: Accelerator,
) -> Measured:
    """Measure the reference, or read what an earlier run has measured on the very same images and extractors.

    Args:
        images: The data set; `None` where there is nothing to measure.
        extractors: Feature functions; without any nothing is measured.
        count: Number of images.
        cache_dir: Where references are kept.
        batch_size: Images of a batch.
        accelerator: Knows this process and how many there are.
    """
    if not extractors:
        return Measured({}, {})
    assert images is not None  # where there are extractors
    chosen = choose(images, count, 0)
    total = 0
    for _, x, _ in real_batches(images, _REFERENCE_EPOCH, chosen, batch_size, accelerator):
        total += sum(int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()) for image in x)
    content = sum(gather_object([total])) % 2**256  # the same in any order
    paths = {}
    for name, extract in extractors.items():
        # Its features of fixed noise identify an extractor.
        shape = (2, images.channels, images.height, images.width)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            response = extract(noise.to(accelerator.device)).cpu().numpy().tobytes()
        key = hashlib.sha256(f"{name} {content:x} {len(chosen)}".encode() + response).hexdigest()
        paths[name] = Path(cache_dir) / f"{key}.safetensors"
    # Another device may give other last digits, so all processes take the names that the main process found.
    missing = [name for name in extractors if not paths[name].is_file()]
    paths, missing = broadcast_object_list([paths, missing])
    if missing:
        batches = real_batches(images, _REFERENCE_EPOCH, chosen, batch_size, accelerator)
        fresh = measure_images(batches, {name: extractors[name] for name in missing}, {}, accelerator)
        for name in missing if accelerator.is_main_process else ():
            fresh.statistics[name].save(paths[name], features=fresh.features[name])
    accelerator.wait_for_everyone()
    return Measured(
        {name: FeatureStatistics.load(path) for name, path in paths.items()},
        {name: load_file(path)["features"] for name, path in paths.items()},
    )


def make_nearest_judge(on_black: ImageSet, on_white: ImageSet, translation: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Judge of whether the training image nearest to an image, over shifts and backgrounds, carries its class.

    Large images are compared at about 32 pixels on a side, which is far cheaper.

    Args:
        on_black: The training images on a black background, a data set.
        on_white: The same on white.
        translation: Largest shift in pixels, in each direction.
    """
    ratio = max(1, max(on_black.height, on_black.width) // _NEAREST_SIDE)

    def shrink(images: Tensor) -> Tensor:
        return images if ratio == 1 else avg_pool2d(images, ratio)

    views = ([shrink(view[i]["pixel_values"]) for i in range(len(view))] for view in (on_black, on_white))
    black, white = (torch.stack(view) for view in views)
    classes, captions, shift = on_black.class_labels, on_black.captions, math.ceil(translation / ratio)

    def judge(x: Tensor, shown: Any) -> Tensor:
        nearest = nearest_training_image(shrink(x), black, white, shift)
        if captions is not None:
            return torch.tensor([text in captions[i] for text, i in zip(shown, nearest.tolist(), strict=True)])
        assert classes is not None  # else there is nothing to judge
        return classes[nearest] == shown

    return judge


def count_in_name(count: int) -> str:
    """A count as names of metrics end in it."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def distance_name(extractor: str) -> str:
    """What the distance in an extractor's features is called."""
    return "fid" if extractor == "inception" else f"fd_{extractor}"


def metrics_of(measured: Measured, reference: Measured, count: int) -> dict[str, float]:
    """The metrics of one set of images, with the count of those that each was taken on in its name."""
    suffix = count_in_name(count)
    found = {}
    for name, found_statistics in measured.statistics.items():
        distance = fd_local if name == "local" else frechet_distance
        found[f"{distance_name(name)}_{suffix}"] = distance(found_statistics, reference.statistics[name])
        features = measured.features[name]
        precision, recall = precision_recall(features, reference.features[name][: len(features)])
        compared = f"{name}_{count_in_name(len(features))}"
        found |= {f"precision_{compared}": precision, f"recall_{compared}": recall}
    return found | {f"{name}_{suffix}": right / count for name, right in measured.right.items()}


def spread(per_seed: list[dict[str, float]]) -> dict[str, dict]:
    """The values of each metric over seeds, with their mean and standard deviation."""
    return {
        name: {
            "values": (values := [found[name] for found in per_seed]),
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name in per_seed[0]
    }


def measure_v_loss(
    pipe: DualRatePipeline,
    images: ImageSet,
    count: int,
    plan: RefreshPlan | None,
    batch_size: int,
    accelerator: Accelerator,
    *,
    drop_context: bool = False,
) -> float:
    """Mean of (v − v̂)² over fresh augmentations, at stratified times with noise fixed by the position.

    With M of N steps before the first of K refreshes, the context begins at c = 1 − M/N and is at most c/K old. Above c
    the denoiser sees none.

    Args:
        pipe: The model.
        images: The data set.
        count: Images that noise is added to.
        plan: What the pair follows; `None` for a single-rate model.
        batch_size: Images of a batch.
        accelerator: Knows this process and how many there are.
        drop_context: Whether the denoiser sees no context.
    """
    scheduler, host = pipe.scheduler, host_of(pipe)
    if not isinstance(scheduler, DualRateScheduler):  # at the noise levels that the network knows
        process = NoiseProcess.of(scheduler) if host is None else host.process
        scheduler = DualRateScheduler(**cut_schedule({"log_snr_min": -10.0, "log_snr_max": 10.0}, process))
    schedule, captions = schedule_of(scheduler), None
    if images.has_captions:
        encoding = TextEncoding.of(pipe.text_encoder, pipe.tokenizer, pipe.context_encoder, pipe.denoiser)
        if encoding is None:
            raise ValueError(
                "The model has no text_encoder, which embeds the captions that its v-loss is measured on."
            )
        captions = CaptionEmbeddings(encoding, pipe.denoiser.config.text_length)
    conditions = TrainingConditions(images, captions, accelerator.device)
    pair = TrainablePair(pipe.denoiser, pipe.context_encoder).eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(FRESH_SEED)).tolist()
    first = age = 1.0
    if plan is not None and plan.num_context_steps:
        first = (len(plan) - plan.num_steps_alone) / len(plan)
        age = first / plan.num_context_steps
    total = 0.0
    for taken in batches_of(count, batch_size, accelerator):
        # Times from a low-discrepancy sequence: far less spread for the same number of evaluations.
        times = {row: (row * (math.sqrt(5) - 1) / 2) % 1 for row in taken}
        above, below = ([row for row in taken if (times[row] > first) == is_above] for is_above in (True, False))
        rows = above + below
        batch = [images[row // len(order), order[row % len(order)]] for row in rows]
        x = torch.stack([item["pixel_values"] for item in batch]).to(accelerator.device)
        if pipe.vae is not None:
            x = encode(pipe.vae, x, [seed_of(FRESH_SEED, row) for row in rows])
        names = [name for name in ("class_labels", "caption") if name in batch[0]]
        condition = conditions.of({name: torch.stack([item[name] for item in batch]) for name in names})
        condition = condition.to(accelerator.device) if isinstance(condition, Tensor) else condition
        draws = draw(FRESH_SEED, 0, rows, x.shape[1:], accelerator.device)
        uniforms = [(times[row] - first) / (1 - first) for row in above] + [times[row] / first for row in below]
        draws.uniforms[:, 0] = torch.tensor(uniforms)
        contexts = ContextTimes((age,), first, len(above), len(x) if drop_context else len(above))
        with torch.no_grad():
            result = pair(denoising_loss, x, condition, draws, schedule=schedule, contexts=contexts)
        total += result.v_loss.double().sum().item()
    return sum(gather_object([total])) / count


def measure_v_losses(
    pipe: DualRatePipeline,
    compared: Mapping[str, DualRatePipeline],
    images: ImageSet,
    count: int,
    plan: RefreshPlan,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """The v-loss of a model as it follows a plan, of the model without its context, and of the single-rate models beside it, by name."""

    def v_loss_of(model: DualRatePipeline, plan: RefreshPlan | None, **options: bool) -> float:
        return measure_v_loss(model, images, count, plan, batch_size, accelerator, **options)

    v_loss = {"images": count, "model": v_loss_of(pipe, plan)}
    if pipe.context_encoder is not None:
        v_loss["context_dropped"] = v_loss_of(pipe, plan, drop_context=True)
    v_loss |= {name: v_loss_of(model, None) for name, model in compared.items()}
    if compared.keys() >= {"single_rate_light", "single_rate_heavy"}:
        gap = v_loss["single_rate_light"] - v_loss["single_rate_heavy"]
        v_loss["share_of_gap_recovered"] = (v_loss["single_rate_light"] - v_loss["model"]) / gap
    return v_loss


def measure_floor(
    images: ImageSet,
    reference: Measured,
    extractors: Extractors,
    judges: Judges,
    count: int,
    seeds: Sequence[int],
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, dict]:
    """The metrics of as many real images as are sampled: what a perfect model would have."""
    floor = []
    for epoch, seed in zip(FLOOR_EPOCHS, seeds, strict=False):
        batches = real_batches(images, epoch, choose(images, count, seed), batch_size, accelerator)
        measured = measure_images(batches, extractors, judges, accelerator)
        floor.append(metrics_of(measured, reference, count))
    return spread(floor)


def measure_real_prompts(
    prompts: Sequence[str], judges: Judges, sets: Sequence[ImageSet], batch_size: int, accelerator: Accelerator
) -> dict[str, float] | None:
    """What judges see in real images of those prompts that are captions of some; `None` where none is."""
    pictures = real_images_of(prompts, sets, FLOOR_EPOCHS[0])
    if not pictures:
        return None
    measured = measure_images(in_batches(pictures, batch_size, accelerator), {}, judges, accelerator)
    return {"images": len(pictures), **metrics_of(measured, Measured({}, {}), len(pictures))}
