"""What a run learns from: images and trained models, opened and held against each other."""

import json
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from .augmentation import Augmentation
from .autoencoders import Images, fingerprint_of_vae, open_vae
from .captions import CaptionEmbeddings
from .configuration import Configuration, Data
from .conversion import cut_schedule
from .data import LabelledImages, load_images
from .hosts import HostNetwork
from .latent_cache import LatentImages, cache_folder
from .latents import compression_of
from .origins import digest
from .pipeline import DualRatePipeline
from .streams import StreamedImages
from .text_encoding import TEXT_OPTIONS, TextEncoding, load_text_encoding

# What teacher and student must share.
_SHARED = {"in_channels", "sample_size", "num_classes"}
_SCHEDULE = {"log_snr_min", "log_snr_max", "image_size", "noise_low", "noise_high"}


def open_images(
    data: Data,
    resolution: int | tuple[int, int],
    *,
    channels: int = 3,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    split: str = "train",
    vae: str | None = None,
    is_cached: bool = True,
) -> LabelledImages | StreamedImages | LatentImages:
    """Open the images that flags name.

    Args:
        data: Which images, and how they are read.
        resolution: Side or (height, width) in pixels, or of latents.
        channels: 3 for colour, 1 for grey; with an autoencoder those of its latents.
        augmentation: What may happen to the images.
        seed: Seed of the augmentation and of a stream's shuffle.
        split: Which part of the data set.
        vae: The autoencoder whose latents are learned, or a model that has it; `None` to learn pixels.
        is_cached: Whether latents are encoded once and kept, or anew for each batch.

    Raises:
        ValueError: If there are none, or they are not as the flags say.
    """
    autoencoder = None if vae is None else open_vae(vae)
    kept = autoencoder if is_cached else None
    if autoencoder is not None:
        if autoencoder.config.latent_channels != channels:
            raise ValueError(
                f"--vae {vae} has latents of {autoencoder.config.latent_channels} channels, not {channels}."
            )
        sides = (resolution, resolution) if isinstance(resolution, int) else resolution
        resolution = (sides[0] * compression_of(autoencoder), sides[1] * compression_of(autoencoder))
        channels = autoencoder.config.in_channels
    dataset = load_images(
        data.dataset_name,
        data.train_data_dir,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
        split=split,
        config_name=data.dataset_config_name,
        streaming=data.streaming,
        seed=seed,
        cache_dir=data.cache_dir,
    )
    options = {"buffer_size": data.shuffle_buffer} if data.streaming else {}
    images = (StreamedImages if data.streaming else LabelledImages)(
        dataset,
        resolution,
        image_column=data.image_column,
        label_column=data.label_column,
        num_classes=data.num_classes,
        caption_column=data.caption_column,
        augmentation=augmentation if kept is None else Augmentation(),
        channels=channels,
        seed=seed,
        on_corrupt=data.on_corrupt,
        max_image_pixels=data.max_image_pixels,
        **options,
    )
    if kept is None:
        images.vae = autoencoder
        return images
    assert isinstance(images, LabelledImages)  # a stream is not cached, which the configuration knows
    return LatentImages(images, kept, cache_folder(data.cache_dir), augmentation=augmentation, seed=seed)


def check_space(name: str, pipe: DualRatePipeline, images: Images) -> None:
    """Refuse a model that draws in another space than the images are learned in: pixels, or an autoencoder's latents."""
    theirs, ours = pipe.vae, images.vae
    if theirs is None or ours is None:
        if theirs is not ours:
            words = ["pixels" if vae is None else "latents" for vae in (theirs, ours)]
            raise ValueError(f"{name} draws {words[0]}, and the images are learned as {words[1]}: see --vae.")
    elif fingerprint_of_vae(theirs) != fingerprint_of_vae(ours):
        raise ValueError(f"{name} draws latents of another vae than the one that --vae names: leave it out.")


def open_captions(
    configuration: Configuration, images: Any, trained: DualRatePipeline | None = None
) -> CaptionEmbeddings | None:
    """What embeds the captions that a run learns from; `None` where it learns from none.

    Args:
        configuration: What the run is told.
        images: What it learns from.
        trained: The model that it starts or learns from, whose text encoder it keeps.

    Raises:
        ValueError: If there is no text encoder, or there are two.
    """
    name = configuration.start.text_encoder
    if not images.has_captions:
        if name is not None:
            raise ValueError(f"--text_encoder {name} has no effect without --caption_column.")
        return None
    # A trained model has read texts before, by rules of its own.
    rules = configuration.networks.denoiser if trained is None else dict(trained.denoiser.config)
    if trained is not None and trained.text_encoder is not None:
        if name is not None:
            raise ValueError(f"--text_encoder {name} and the trained model are two text encoders: give one of them.")
        networks = trained.context_encoder, trained.denoiser
        encoding = TextEncoding.of(trained.text_encoder, trained.tokenizer, *networks)
        assert encoding is not None  # there is an encoder
    elif name is not None:
        encoding = load_text_encoding(name).under(rules)
    else:
        raise ValueError("Captions need --text_encoder, which embeds them, or a trained model that has one.")
    captions = CaptionEmbeddings(encoding, rules["text_length"])
    captions.warn_of_cuts(getattr(images, "captions", None) or [])  # those of a stream are not known yet
    return captions


def components_of(captions: CaptionEmbeddings | None) -> dict[str, Any]:
    """The parts of a pipeline that embed its prompts, where there are captions."""
    if captions is None:
        return {}
    return {"text_encoder": captions.encoding.text_encoder, "tokenizer": captions.encoding.tokenizer}


def check_classes(name: str, pipe: DualRatePipeline, images: LabelledImages | StreamedImages | LatentImages) -> None:
    """Refuse a model whose classes differ from those of the images in number, name or order, or one of text without it."""
    takes_text, has_captions = pipe.denoiser.config.cross_attention_dim is not None, images.has_captions
    if takes_text != has_captions:
        takes, has = "text" if takes_text else "no text", "captions" if has_captions else "no captions"
        raise ValueError(f"{name} takes {takes}, and the data has {has}: see --caption_column.")
    ours, theirs = images.num_classes, pipe.denoiser.config.num_classes
    if ours != theirs:
        raise ValueError(
            f"{name} has {theirs or 'no'} classes, and the data has {ours or 'none'}: see --label_column, --num_classes."
        )
    names = images.id2label or {}
    named = pipe.id2label.keys() & names.keys()
    differing = [i for i in sorted(named) if pipe.id2label[i] != names[i]]
    if differing:
        i = differing[0]
        raise ValueError(f"Class {i} is {pipe.id2label[i]!r} in {name} and {names[i]!r} in the data.")


def check_fit(name: str, pipe: DualRatePipeline, images: LabelledImages | StreamedImages | LatentImages) -> None:
    """Refuse a model whose classes are not those of the images, or that draws in another space than they are learned in."""
    check_classes(name, pipe, images)
    check_space(name, pipe, images)


def open_start(name: str | None) -> DualRatePipeline | None:
    """The trained model that a training starts from, in float32, or `None` where none is named."""
    return None if name is None else DualRatePipeline.from_pretrained(name, dtype=torch.float32)


def check_start(
    name: str | None, start: DualRatePipeline | None, images: LabelledImages | StreamedImages | LatentImages
) -> None:
    """Refuse a model to start from that has other classes or another size than the images."""
    if name is None or start is None:
        return
    check_fit(name, start, images)
    channels, *sides = images.sample_shape
    for key, theirs, ours in (
        ("sample_size", start.denoiser.image_size, tuple(sides)),
        ("in_channels", start.denoiser.config.in_channels, channels),
    ):
        if theirs != ours:
            raise ValueError(f"{name} does not fit the images: {key} is {theirs} there and {ours} here.")


def check_teacher(teacher: DualRatePipeline, **others: dict) -> None:
    """Refuse a teacher that is a pair, or that differs from the student or the preset in what both must share."""
    if teacher.context_encoder is not None:
        raise ValueError("The teacher must be a single-rate model, but it has a context encoder.")
    known, of_host = {**teacher.denoiser.config, **teacher.scheduler.config}, isinstance(teacher.denoiser, HostNetwork)
    for place, values in others.items():
        if of_host:  # it has no schedule of ours, but noise levels that it knows
            schedule = {name: values[name] for name in _SCHEDULE}
            if cut_schedule(schedule, teacher.denoiser.process) != schedule:
                raise ValueError(f"The teacher does not know all noise levels of the {place}: {schedule}.")
        shared = _SHARED | ({"cross_attention_dim"} if of_host else {*TEXT_OPTIONS} | _SCHEDULE)
        for name in shared & values.keys():
            if known.get(name) != values[name]:
                raise ValueError(
                    f"The teacher does not fit: {name} is {known.get(name)} in the teacher and {values[name]} in the "
                    f"{place}."
                )


def take_over(name: str, planned: ModelMixin, trained: ModelMixin) -> None:
    """Load a trained network's weights into the one that the preset plans.

    Raises:
        ValueError: If their shapes differ.
    """
    shape = ("level_channels", "level_types", "level_blocks", "patch_size", "attention_head_dim", "embedding_dim")
    for key in (*shape, "cross_attention_dim", "attends_to_text", "context_channels", "prediction_hand_over"):
        theirs, ours = (network.config[key] for network in (trained, planned))
        if key == "context_channels":  # by default the levels' own
            theirs, ours = theirs or trained.config["level_channels"], ours or planned.config["level_channels"]
        if json.dumps(theirs) != json.dumps(ours):  # lists and tuples alike
            place = f"{key} of the {type(planned).__name__}"
            raise ValueError(f"{name} does not fit the preset: {place} is {theirs} there and {ours} here.")
    planned.load_state_dict(trained.state_dict())


def fingerprint_of(model: DualRatePipeline) -> str:
    """A short digest of a model's weights, which does not depend on its path."""
    return fingerprint_weights(model.context_encoder, model.denoiser, model.text_encoder)


def fingerprint_weights(*networks: nn.Module | None) -> str:
    """The same of networks by themselves; `None` is passed over."""
    return digest(*(network.state_dict() for network in networks if network is not None))
