"""Measure a trained model on the data it was trained on, and write every metric into evaluation.json.

    python examples/evaluate.py --model runs/dualrate-emoji32 --heavy runs/single-rate-emoji32 --light runs/light-emoji32 --dataset_name examples/data/emoji32 --label_column label --classifier examples/classifiers/emoji32.safetensors --output runs/dualrate-emoji32/evaluation.json --grid runs/dualrate-emoji32/samples.png

`v_loss`: the mean of (v − v̂)² on freshly augmented images with fixed noise. It is that of the model, of the model with
its context dropped, and of the single-rate networks it is compared with. A student has none, as it knows only the times
of its few steps. `samples`: for each way to sample, its counted cost, and the distances, precision, recall and class
accuracy of its images. `floor`: the same metrics for as many real images that the reference does not hold, augmented as
the training was: as good as a perfect model would be. Each name ends in the count of images, and each metric has a value
for every seed. `references` says what each distance is measured from: `fd_local` from images augmented as the training
was, `fid` and `fd_dinov2` from images as they are, as it is published.

Of `--heavy`, `--light` and `--rivals` nothing is sampled: what their own evaluation.json holds is taken up, where data and
classifier are the same, with the seeds it was measured with. `training_flops` is what each training cost by itself.

What the model was trained with, its augmentation first, is read from configuration.json beside it, and nowhere else.
Any number of processes measure the same images: `accelerate launch examples/evaluate.py ...`.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.decoding import MAX_IMAGE_PIXELS
from diffusers_dualrate.flags import HelpFormatter


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="Hub repository or folder of the model to measure.")
    parser.add_argument("--heavy", help="Single-rate model of the encoder's shape, to compare with.")
    parser.add_argument("--light", help="Single-rate model of the denoiser's shape, to compare with.")
    parser.add_argument("--rivals", nargs="*", default=[], help="Folders of more models that were measured so.")
    parser.add_argument("--dataset_name", help="Data set on the Hub or in a local folder; or digits.")
    parser.add_argument("--train_data_dir", help="Folder of images; one sub-folder per class.")
    parser.add_argument("--image_column", default="image", help="Column of the images.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    parser.add_argument("--label_column", help="Column of classes, 'label' for sub-folders.")
    parser.add_argument("--num_classes", type=int, help="Number of classes, if the training was given it.")
    parser.add_argument("--caption_column", help="Column of captions, which are the prompts.")
    parser.add_argument(
        "--text_encoder", help="Contrastive text encoder of --classifier: does a sample show its prompt?"
    )
    parser.add_argument(
        "--prompt_lists",
        nargs="*",
        default=[],
        help="Files of prompts, one a line, that are drawn once for each seed and judged by --text_encoder. Beside --grid lies "
        "a picture of each.",
    )
    parser.add_argument(
        "--on_corrupt", choices=["raise", "skip"], default="raise", help="What an unreadable image does."
    )
    parser.add_argument("--reference_split", default="train", help="Split of the data set that samples are held to.")
    parser.add_argument(
        "--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="A larger image counts as unreadable."
    )
    parser.add_argument("--floor_split", help="Split of the floor; default: the reference's, augmented again.")
    parser.add_argument("--num_reference", type=int, help="Images of the reference; default: as many as the set has.")
    parser.add_argument("--classifier", help="File of train_classifier.py, for fd_local and the class accuracy.")
    parser.add_argument("--dinov2", help="Hub repository or folder of DINOv2, for fd_dinov2.")
    parser.add_argument("--inception", action="store_true", help="Measure fid; needs torch-fidelity.")
    parser.add_argument("--num_samples", type=int, default=500, help="Samples of each seed.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="Each samples a set of its own.")
    parser.add_argument("--num_noises", type=int, default=3000, help="Images with noise that the v-loss is taken on.")
    parser.add_argument("--num_inference_steps", type=int, help="N; default: the model's.")
    parser.add_argument("--num_context_steps", type=int, help="K; default: the model's.")
    parser.add_argument("--solver_steps", type=int, nargs="*", default=[], help="Also sample with DPM-Solver++ so.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's.")
    parser.add_argument("--batch_size", type=int, default=50, help="Images sampled or measured at a time.")
    parser.add_argument(
        "--cache_dir",
        default=Path.home() / ".cache" / "diffusers-dualrate",
        help="Where measured references are kept.",
    )
    parser.add_argument("--output", default="evaluation.json", help="Where every figure is written.")
    parser.add_argument("--grid", help="Where to write a picture of the first samples.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import hashlib
import json
import shlex
import warnings
from functools import partial

from accelerate import Accelerator
from PIL import Image

from diffusers_dualrate import DualRatePipeline, sources
from diffusers_dualrate.arguments import select
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.commands import EVALUATION
from diffusers_dualrate.configuration import FILE, Configuration, Data
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.evaluation import file_hash
from diffusers_dualrate.flops import block_multiply_adds, decode_flops, network_flops, training_flops
from diffusers_dualrate.folders import check_output_dir
from diffusers_dualrate.image_sets import FRESH_SEED, choose, pixel_options, shown_by
from diffusers_dualrate.inputs import check_context_steps
from diffusers_dualrate.latents import compression_of
from diffusers_dualrate.metrics import (
    check_classifier,
    distance_name,
    load_extractors,
    make_nearest_judge,
    measure_floor,
    measure_real_prompts,
    measure_reference,
    measure_v_losses,
)
from diffusers_dualrate.network import UViTNetwork
from diffusers_dualrate.pictures import draw_grid
from diffusers_dualrate.processes import check_launch, choose_threads, run_script
from diffusers_dualrate.prompt_lists import TextJudge, judges_of_captions, read_prompts
from diffusers_dualrate.prompts import check_text_encoder
from diffusers_dualrate.provenance import environment
from diffusers_dualrate.ranges import check_integer, check_output
from diffusers_dualrate.recipes import DistillationRecipe
from diffusers_dualrate.repositories import read_record
from diffusers_dualrate.sampling_settings import Measurement, SamplingSetting, measure_sampling
from diffusers_dualrate.tables import PROMPT_METRICS, prompt_rows, sample_rows, v_loss_rows
from diffusers_dualrate.text_encoding import load_text_encoding

# The nearest image is looked for among all.
_NEAREST_LIMIT = 10_000


def choose_steps(args, pipe):
    """N, K and guidance to sample with: what was asked for, else the model's. A K of `None` is that of its own refreshes."""
    defaults, n = SamplingDefaults.of(pipe.config), args.num_inference_steps
    n = defaults.num_inference_steps if n is None else n
    if n < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {n}.")
    check_context_steps(args.model, pipe, k := args.num_context_steps)
    guidance_scale, _ = defaults.choose_guidance(
        args.guidance_scale, None, bool(pipe.denoiser.config.num_classes or pipe.text_encoder)
    )
    if not guidance_scale >= 1:
        raise ValueError(f"guidance_scale must be at least 1, which is none, got {guidance_scale}.")
    return {"num_inference_steps": n, "num_context_steps": k, "guidance_scale": guidance_scale}


def plan_settings(args, pipe):
    """All settings of sampling, so that one that is not possible is refused before anything is measured."""
    orders = {None: type(pipe.scheduler).__name__, False: "ancestral", True: "second-order ancestral"}
    steps = choose_steps(args, pipe)
    k, settings = steps["num_context_steps"], [(orders[pipe.scheduler.config.get("second_order")], steps)]
    for n in args.solver_steps:
        settings.append(("dpmsolver++", steps | {"num_inference_steps": n, "num_context_steps": k and min(k, n)}))
    return [SamplingSetting.plan(pipe, solver, each) for solver, each in settings]


def describe_floor(args, images):
    """In words, which real images the floor and the v-loss are measured with."""
    if args.floor_split:
        return f"split {args.floor_split}"
    return getattr(images, "other_epochs", "the same images, augmented again")


def read_records(model):
    """What a model's training was told, and what happened in it; `None` for what nobody recorded."""
    return read_record(model, FILE), read_record(model, "training.json")


def draw_first(first, pipe, images, prompts, args):
    """Write a picture of the first samples, each under the name of its class or its prompt, and one of each list of prompts."""
    grid = Path(args.grid)
    grid.parent.mkdir(parents=True, exist_ok=True)
    for name, x in first.items():
        pictures = pipe.image_processor.postprocess(x, output_type="pil")
        shown = shown_by(images, choose(images, args.num_samples, args.seeds[0])[: len(x)])
        if name is None and images.num_classes:
            shown = [pipe.id2label.get(label, str(label)) for label in shown.tolist()]
        if name is None:
            draw_grid(pictures, shown).save(grid)
        else:  # prompts are longer than classes; in 256 colours, as a hundred images are a large file
            picture = draw_grid(pictures, prompts[name], 10, 128, lines=2).quantize(256)
            picture.save(grid.with_stem(f"{grid.stem}-{name}"), optimize=True)


def tell(report, args):
    """What was found, as a table, where all of it is, and what to do next."""
    columns = list(report["floor"])
    head = ["", "heavy + light", "guidance", "GFLOP", *columns]
    rows = [head, *sample_rows(report, report["model"], columns)]
    tables = [rows]
    if report["prompt_lists"]:
        head = ["prompts", "", *PROMPT_METRICS.values(), "seconds per image"]
        tables.append([head, *prompt_rows(report, report["model"])])
    for table in tables:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        print()
        for how, *cells in table:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join([how.ljust(widths[0]), *aligned]))
    if "v_loss" in report:
        print(f"\nv-loss: {', '.join(f'{name} {loss}' for name, loss in v_loss_rows(report))}")
    if not report["references"]:
        print("\nNo distance was measured: --classifier takes what examples/train_classifier.py makes.")
    vae = report["vae"]
    decoding = "" if vae is None else f", without {vae['decode_flops'] / 1e9:.3g} that decoding takes"
    print(f"\nGFLOP are per image{decoding}. Every figure is in {args.output}.")
    if Path(args.output).resolve() == Path(args.model, EVALUATION).resolve() and report["training"] is not None:
        print(f"Make the card: python examples/make_card.py {shlex.quote(args.model)}")


def check(args):
    """Refuse, before anything is read, what could not be measured or written."""
    for name in ("num_samples", "num_reference"):
        if getattr(args, name) is not None and getattr(args, name) < 4:  # three neighbours
            raise ValueError(f"{name} must be at least 4, got {getattr(args, name)}.")
    for name, counts in (
        ("num_noises", [args.num_noises]),
        ("batch_size", [args.batch_size]),
        ("solver_steps", args.solver_steps),
    ):
        if min(counts, default=1) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(counts)}.")
    if args.text_encoder and not (args.classifier and args.caption_column):
        raise ValueError("--text_encoder needs --classifier, which was trained with it, and --caption_column.")
    if args.prompt_lists and not args.text_encoder:
        raise ValueError("--prompt_lists needs --text_encoder, which judges.")
    if len({Path(path).stem for path in args.prompt_lists}) < len(args.prompt_lists):
        raise ValueError(f"--prompt_lists must have different names, got {args.prompt_lists}.")
    for seed in args.seeds:
        check_integer("seeds", seed, least=0)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"seeds must differ, since equal ones shrink the spread, got {args.seeds}.")
    if args.grid and Image.registered_extensions().get(Path(args.grid).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--grid must end in a kind of picture, such as .png, got {args.grid!r}.")
    if args.classifier or args.dinov2 or args.inception:  # what the reference shows them is kept there
        check_output("--cache_dir", str(args.cache_dir), is_folder=True)
    for flag, path in (("--output", args.output), ("--grid", args.grid)):
        if path is not None:
            check_output(flag, path)
            check_output_dir(Path(path).parent, args.train_data_dir)


def take_up_rivals(report, pipe, images, args, accelerator):
    """Put into the report what other models' own measurements hold, and what each training cost.

    Returns the single-rate models to compare the pair's v-loss with, by name.
    """
    compared = {f"single_rate_{name}": path for name in ("heavy", "light") if (path := getattr(args, name))}
    paths = compared | {Path(path).name: path for path in args.rivals}
    rivals = {name: DualRatePipeline.from_pretrained(path).to(accelerator.device) for name, path in paths.items()}
    for name, path in paths.items():
        sources.check_classes(path, rivals[name], images)
        measured = read_record(path, EVALUATION) or {}
        is_alike = all(measured.get(key) == report[key] for key in ("data", "classifier", "captions"))
        same = f"the same {'captions, judge of them, prompt lists, ' if report['captions'] else ''}data and classifier"
        if path in args.rivals and not is_alike:
            raise ValueError(f"{path} has no evaluation.json of {same}: measure it first.")
        if not is_alike and accelerator.is_main_process:
            warnings.warn(f"{path} has no evaluation.json of {same}, so no samples.", stacklevel=2)
        report["rivals"][name] = {
            "model": Path(path).name,
            **dict(zip(("configuration", "training"), read_records(path), strict=True)),
            "samples": measured["samples"] if is_alike else [],
            "seeds": measured["seeds"] if is_alike else [],
        }
    by_name = {Path(path).name: rivals[name] for name, path in paths.items()}
    for found, model in [(report, pipe), *((report["rivals"][name], rival) for name, rival in rivals.items())]:
        found["training_flops"] = None
        if found["configuration"] is not None and found["training"] is not None:
            configuration = Configuration.from_json(found["configuration"])
            teacher = by_name.get(Path(configuration.start.teacher or "").name)
            images_seen = found["training"]["images_seen"]
            found["training_flops"] = training_flops(model, configuration.recipe, images_seen, teacher)
    return {name: rivals[name] for name in compared}


def describe_captions(args, text_judge, prompts):
    """What samples of text are asked for and judged by; `None` for a model of none."""
    if args.caption_column is None:
        return None
    lists = {name: hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] for name, texts in prompts.items()}
    return {
        "column": args.caption_column,
        "judge": None if text_judge is None else text_judge.fingerprint,
        "prompt_lists": lists,
    }


def make_judges(classifier, text_judge, images, captions, fresh, augmentation, args, accelerator):
    """Who says of an image, given its class or caption, whether it shows that; `captions` are all that there are."""
    judges = {}
    if classifier is not None and images.num_classes:
        judges["class_accuracy"] = lambda x, labels: (
            classifier(x.to(accelerator.device)).argmax(1) == labels.to(accelerator.device)
        )
    if text_judge is not None:
        judges |= judges_of_captions(text_judge, captions)
    if (images.num_classes or images.has_captions) and len(images) <= _NEAREST_LIMIT:
        backgrounds = (Augmentation(background=(level, level)) for level in (0, 255))
        views = (fresh(augmentation=background, split=args.reference_split) for background in backgrounds)
        name = "caption_of_nearest" if images.has_captions else "class_of_nearest"
        judges[name] = make_nearest_judge(*views, augmentation.translation)
    return judges


def main(args, open_images=sources.open_images):
    check(args)
    prompts = {Path(path).stem: read_prompts("--prompt_lists", path) for path in args.prompt_lists}
    accelerator = check_launch(Accelerator())
    pipe = DualRatePipeline.from_pretrained(args.model).to(accelerator.device)
    told, trained = read_records(args.model)
    if told is None and accelerator.is_main_process:
        warnings.warn(
            f"{args.model} has no {FILE}: its images count as not augmented, and no card can be made of this.",
            stacklevel=2,
        )
    augmentation = Augmentation() if told is None else Configuration.from_json(told).recipe.augmentation
    accelerator.print(choose_threads(args.batch_size * network_flops(pipe.context_encoder or pipe.denoiser)))
    classifier, own, published = load_extractors(args.classifier, args.dinov2, args.inception, accelerator.device)

    data = Data(**{**select(args, Data), "cache_dir": None})  # the flag is that of references
    fresh = partial(open_images, data, **pixel_options(pipe), seed=FRESH_SEED)  # as no training saw them
    images = floor_images = fresh(augmentation=augmentation, split=args.reference_split)
    if args.floor_split:
        floor_images = fresh(augmentation=augmentation, split=args.floor_split)
    plain_images = fresh(augmentation=Augmentation(), split=args.reference_split) if published else None
    sources.check_classes(args.model, pipe, images)
    check_text_encoder(args.model, pipe)
    if classifier is not None:
        check_classifier(args.classifier, classifier, images.channels, images.num_classes)
    settings = plan_settings(args, pipe)
    text_judge = None
    if args.text_encoder:
        text_judge = TextJudge(load_text_encoding(args.text_encoder), classifier, accelerator.device)
    real = [images] if floor_images is images else [images, floor_images]
    captions = [own for part in real for own in part.captions] if images.has_captions else None
    judges = make_judges(classifier, text_judge, images, captions, fresh, augmentation, args, accelerator)
    lists = {}
    for name, texts in prompts.items():
        lists[name] = texts, judges_of_captions(text_judge, captions, texts)
        if "caption_of_nearest" in judges and {*texts} <= {text for own in images.captions for text in own}:
            lists[name][1]["caption_of_nearest"] = judges["caption_of_nearest"]
    num_reference = len(images) if args.num_reference is None else args.num_reference
    networks = {name: net for name in ("context_encoder", "denoiser") if (net := pipe.components[name]) is not None}
    report = {
        "model": Path(args.model).name,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "block_multiply_adds": {
            name: block_multiply_adds(network)
            for name, network in networks.items()
            if isinstance(network, UViTNetwork)
        },
        "data": {
            "name": data.name,
            "hub": data.hub_name,
            "images": len(images),
            "classes": images.num_classes,
            "reference": f"{num_reference} images of split {args.reference_split}",
            "floor": describe_floor(args, images),
        },
        "references": {distance_name(name): "images augmented as in training" for name in own}
        | {distance_name(name): "images as they are" for name in published},
        "classifier": None
        if classifier is None
        else {"file": Path(args.classifier).name, "sha256": file_hash(args.classifier), **classifier.facts},
        "captions": describe_captions(args, text_judge, prompts),
        "configuration": told,
        "training": trained,
        "vae": None
        if pipe.vae is None
        else {"compression": compression_of(pipe.vae), "decode_flops": decode_flops(pipe)},
        "rivals": {},
    }
    compared = take_up_rivals(report, pipe, images, args, accelerator)

    if told is not None and isinstance(Configuration.from_json(told).recipe, DistillationRecipe):
        report["images_by_phase"] = Configuration.from_json(told).recipe.images_by_phase
    else:
        noised = floor_images, args.num_noises, settings[0].taken.plan, args.batch_size
        report["v_loss"] = measure_v_losses(pipe, compared, *noised, accelerator)
    extractors = own | published
    how = (num_reference, args.cache_dir, args.batch_size, accelerator)
    reference = measure_reference(images, own, *how) | measure_reference(plain_images, published, *how)
    drawn = args.num_samples, args.seeds, args.batch_size, accelerator
    report["floor"] = measure_floor(floor_images, reference, extractors, judges, *drawn)
    report["prompt_lists"] = {
        name: measure_real_prompts(*judged, real, args.batch_size, accelerator) for name, judged in lists.items()
    }
    measurement = Measurement(
        images, reference, extractors, judges, lists, args.num_samples, args.seeds, args.batch_size
    )
    report["samples"] = []
    for setting in settings:
        found, first = measure_sampling(pipe, setting, measurement, accelerator)
        report["samples"].append(found)
        if args.grid and len(report["samples"]) == 1 and accelerator.is_main_process:
            draw_first(first, pipe, images, prompts, args)

    report |= {"seeds": args.seeds, **environment(accelerator)}
    if accelerator.is_main_process:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
        tell(report, args)
    return report


if __name__ == "__main__":
    run_script(main, ARGS)
