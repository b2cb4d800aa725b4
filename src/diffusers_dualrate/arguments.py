"""How preset, overrides and flags of the training examples become one `Configuration`; the flags are in `flags.py`."""

import argparse
import dataclasses
import difflib
import json
import warnings
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .autoencoders import find_vae, open_vae
from .configuration import PARTS_OF_A_RUN, Configuration, Data, Networks, Options, Sampling, Start
from .folders import check_output_dir
from .latents import compression_of
from .ranges import LONGEST_SIDE, check_choice, check_integer, check_output
from .recipes import RECIPES, DistillationRecipe, PairRecipe, SingleRateRecipe
from .records import build, read_json
from .repositories import check_hub

_SECTIONS = ("context_encoder", "denoiser", "scheduler", "training", "sampling", "distillation")


def configure(args: argparse.Namespace, script: str) -> Configuration:
    """All that a run is told, checked as a whole before anything is made.

    Args:
        args: Flags of `argument_parser`, and those that the script has beside them.
        script: Name of the script, a key of `RECIPES`.

    Raises:
        ValueError: If the preset lacks a part, an override names nothing in it, or a value is out of its range.
    """
    kind, path = RECIPES[script], find_preset(args.preset, args.presets)
    shaped = _SECTIONS[:3] if getattr(args, "light", None) is None else _SECTIONS[2:3]
    sections = read_preset(path, (*shaped, kind.section))
    for network in set(_SECTIONS[:2]) - set(shaped):  # it will be shaped from the heavy network
        sections.setdefault(network, {})
    vae = choose_vae(args)
    # First, since an override names one value.
    if args.resolution is not None:
        resize(sections, check_integer("resolution", args.resolution, 1, LONGEST_SIDE))
    if vae is not None:
        learn_latents(sections, vae, args)
    followed = {*_SECTIONS[:3], kind.section} | (set() if kind is DistillationRecipe else {"sampling"})
    settable = _fields(kind) | _fields(Sampling)
    flags = {name: value for name, value in vars(args).items() if name in settable}
    for override in args.override:
        apply_override(sections, override, path, followed, flags)
    recipe, sampling = sections[kind.section], sections.get("sampling", {})
    if kind is SingleRateRecipe:  # a preset's recipe is that of a pair
        recipe = {name: value for name, value in recipe.items() if name not in _fields(PairRecipe) - _fields(kind)}
        sampling = sampling | {"num_context_steps": None}
        if args.num_context_steps is not None:
            raise ValueError(f"--num_context_steps {args.num_context_steps} is for a pair: this is one network.")
    recipe = recipe | given(args, _fields(kind) - {"train_batch_size"})
    if kind is not DistillationRecipe:  # a student samples as it was distilled
        sampling = sampling | given(args, _fields(Sampling))
        if (args.guidance_scale or 1) > 1 and not (args.label_column or args.caption_column):
            raise ValueError(
                f"--guidance_scale {args.guidance_scale} needs classes or text: give --label_column or --caption_column."
            )
    for flag, folder in (("--output_dir", args.output_dir), ("--cache_dir", args.cache_dir)):
        if folder is not None:
            check_output(flag, folder, is_folder=True)
    check_output_dir(args.output_dir, args.train_data_dir or args.dataset_name)
    if args.report_to not in (None, "all"):
        check_tracker(args.report_to)
    configuration = Configuration(
        script=script,
        preset=path.stem,
        overrides=tuple(args.override),
        networks=build(Networks, str(path), {name: sections[name] for name in _SECTIONS[:3]}),
        recipe=build(kind, f"{kind.section} of {path}", recipe),
        sampling=build(Sampling, f"sampling of {path}", sampling),
        start=Start(**select(args, Start) | {"vae": vae}),
        data=Data(**select(args, Data)),
        options=Options(**select(args, Options), images_per_process=args.train_batch_size),
    )
    is_told = any(override.startswith(f"{kind.section}.augmentation=") for override in args.override)
    if getattr(args, "vae", None) is None and not is_told:
        configuration = leave_pixels_alone(configuration)
    check_latents(configuration)
    warmup, steps = configuration.recipe.lr_warmup_steps, configuration.recipe.max_train_steps
    if warmup >= steps:
        warnings.warn(
            f"lr_warmup_steps is {warmup} and max_train_steps {steps}: the learning rate never reaches its peak.",
            stacklevel=2,
        )
    if configuration.options.push_to_hub:  # last, as only this asks another machine
        check_hub("--push_to_hub", configuration.options.repository)
    return configuration


def given(args: argparse.Namespace, names: set[str]) -> dict:
    """Flags of these names that were given."""
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def select(args: argparse.Namespace, cls: type) -> dict:
    """Flags that are fields of a dataclass."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if hasattr(args, field.name)}


def find_preset(name: str | Path, presets: Path) -> Path:
    """The file that `--preset` means: a path, or the name of a shipped preset.

    Raises:
        ValueError: If there is neither.
    """
    shipped = presets / f"{name}.json"
    if not Path(name).is_file() and Path(name).name == str(name) and shipped.is_file():
        return shipped
    if not Path(name).is_file():
        names = ", ".join(sorted(path.stem for path in presets.glob("*.json")))
        raise ValueError(f"--preset {str(name)!r} is neither a file nor one of {names}.")
    return Path(name)


def read_preset(path: Path, needed: tuple[str, ...]) -> dict:
    """The sections of a preset, or of a run's configuration.json.

    Raises:
        ValueError: If a needed section is missing, or there is an unknown one.
    """
    sections = read_json(path)
    if missing := sorted(set(needed) - sections.keys()):
        raise ValueError(f"The preset {path} lacks {', '.join(missing)}.")
    if unknown := sorted(sections.keys() - {*_SECTIONS, *PARTS_OF_A_RUN}):
        raise ValueError(f"The preset {path} has an unknown part {unknown[0]!r}; it may have {', '.join(_SECTIONS)}.")
    for name in set(_SECTIONS) & sections.keys():
        if not isinstance(sections[name], dict):
            raise ValueError(f"{name} of {path} must be an object of names and values, got {sections[name]!r}.")
    return {name: sections[name] for name in _SECTIONS if name in sections}


def resize(sections: dict, side: int) -> None:
    """Change a preset to images of another side, with the schedule shifted for it where it was for the preset's own."""
    for network in ("context_encoder", "denoiser"):
        sections[network]["sample_size"] = side
    scheduler, size = sections["scheduler"], sections["scheduler"].get("image_size")
    for name in ("image_size", "noise_high"):
        if size is not None and scheduler.get(name) == size:
            scheduler[name] = side


def choose_vae(args: argparse.Namespace) -> str | None:
    """The autoencoder whose latents are learned: what was asked for, or that of the model that a run starts from."""
    if getattr(args, "vae", None) is not None:
        return args.vae
    models = (getattr(args, name, None) for name in ("pretrained_model_name_or_path", "teacher"))
    return next((name for name in models if name is not None and find_vae(name, in_model=True)), None)


def learn_latents(sections: dict, vae: str, args: argparse.Namespace) -> None:
    """Change a preset to the latents of an autoencoder: their channels, no clipping, `--resolution` still in pixels."""
    blueprint = open_vae(vae, is_blueprint=True)
    ratio = compression_of(blueprint)
    if args.resolution is not None:
        if args.resolution % ratio:
            raise ValueError(f"--resolution must be divisible by {ratio} with --vae {vae}, got {args.resolution}.")
        resize(sections, args.resolution // ratio)
    for network in ("context_encoder", "denoiser"):
        sections[network]["in_channels"] = blueprint.config.latent_channels
    sections["scheduler"].setdefault("clip_sample", False)


def leave_pixels_alone(configuration: Configuration) -> Configuration:
    """The same without the preset's augmentation of pixels, where cached latents are learned since the model draws them."""
    told, vae = configuration.recipe.augmentation, configuration.start.vae
    kept = told.of_latents()
    if vae is None or configuration.options.no_latent_cache or kept == told:
        return configuration
    warnings.warn(
        f"{vae} draws latents, which are encoded once: the preset's augmentation is left out, but for flip={told.flip}.",
        stacklevel=3,
    )
    return configuration.with_recipe(augmentation=kept)


def check_latents(configuration: Configuration) -> None:
    """Refuse, before any image is read, what latents cannot be learned with."""
    is_cached = not configuration.options.no_latent_cache
    if configuration.start.vae is None:
        if not is_cached:
            raise ValueError("--no_latent_cache has no effect where pixels are learned: give --vae, or leave it out.")
        return
    if configuration.networks.scheduler["clip_sample"]:
        raise ValueError("clip_sample=true would clip latents, which have no bounds: leave it out of the scheduler.")
    if is_cached and configuration.data.streaming:
        raise ValueError("--streaming reads images as they come, which no cache can hold: add --no_latent_cache.")
    if is_cached:
        configuration.recipe.augmentation.check_of_latents()


def apply_override(sections: dict, override: str, path: Path, followed: set[str], flags: dict) -> None:
    """Put one `section.name=value` into a preset.

    Args:
        sections: Of the preset; changed in place.
        override: What was given.
        path: Where the preset lies, to name it.
        followed: Parts that the script reads.
        flags: Values of the flags that the script has, `None` for those that were not given.

    Raises:
        ValueError: If the value is no JSON, or the name is no value of the preset. Also if its part is not followed, or a
            flag sets the same value.
    """
    key, _, value = override.partition("=")
    part, _, name = key.partition(".")
    others = [f"{place}.{name}" for place in sorted(followed) if name in sections.get(place, {})]
    others = [f"--{name}", *others] if name in flags else others
    others = others or [f"{part}.{near}" for near in difflib.get_close_matches(name, sections.get(part, {}), 1, 0.8)]
    hint = f"; did you mean {' or '.join(others)}?" if others else "."
    if part in _SECTIONS and part not in followed:
        raise ValueError(
            f"The override {override!r} has no effect here: this script follows {', '.join(sorted(followed))}{hint}"
        )
    if name not in sections.get(part, {}):
        raise ValueError(f"The override {override!r} names no value of the preset {path}{hint}")
    if flags.get(name) is not None:
        raise ValueError(
            f"--{name} {flags[name]} and the override {override!r} set one value twice: give one of them."
        )
    try:
        sections[part][name] = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"The value of the override {override!r} is no JSON: {error}.") from error


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or that is not installed: a run would go on without it."""
    check_choice("report_to", name, ("all", *sorted(LOGGER_TYPE_TO_CLASS)))
    if name not in [kind.value for kind in get_available_trackers()]:
        raise ValueError(f"The tracker {name!r} is not installed: pip install {name}, or leave --report_to out.")
