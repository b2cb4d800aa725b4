"""Choose how a model samples within a budget, and keep that as its default.

    python examples/plan.py --model model_cards/dualrate-emoji64 --prompt_list examples/data/emoji64/prompts/seen.txt --budget 1.5 --output runs/planned-emoji64

Tries plans of few and many steps, even and uneven ones, both orders of the steps, and several intervals of guidance. Where
the pair learned to go without context, refreshes may begin late. The best plan is the default of the model that is saved,
with what it was measured on in plan.json. The criterion is the energy distance of the samples from those of a long chain
along the same noise, or with `--classifier` and data `fd_local`. No report uses the seeds of this choice.

A model of text is tried on the prompts of `--prompt_list`, or on captions of the data, as `--caption_column` names them.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.flags import HelpFormatter, add_data_flags


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="Hub repository or folder of a pair or a single-rate model.")
    parser.add_argument("--budget", type=float, required=True, help="What an image may cost, guidance included.")
    parser.add_argument(
        "--unit",
        choices=["gflop", "milliseconds", "share"],
        default="gflop",
        help="Of the budget: 10^9 FLOPs, milliseconds of the networks on this machine, or a share of what the heavy "
        "network alone costs at the model's own N.",
    )
    parser.add_argument("--output", required=True, help="New folder for the model with its plan.")
    parser.add_argument("--prompt_list", help="File of prompts, one a line, that a model of text is tried on.")
    parser.add_argument("--classifier", help="File of train_classifier.py: choose by fd_local, which needs data.")
    add_data_flags(parser)
    parser.add_argument("--num_reference", type=int, help="Images of the reference; default: as many as there are.")
    parser.add_argument("--num_images", type=int, default=64, help="Images that every candidate draws.")
    parser.add_argument("--num_trials", type=int, default=40, help="Candidates to try at most.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images drawn at a time.")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice's own noises.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import json
import shutil
import sys

from accelerate import Accelerator

from diffusers_dualrate import DualRatePipeline, evaluation, sources
from diffusers_dualrate.arguments import select
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.configuration import FILE, Configuration, Data
from diffusers_dualrate.flops import network_flops
from diffusers_dualrate.image_sets import FRESH_SEED, as_bytes, pixel_options
from diffusers_dualrate.latents import decode
from diffusers_dualrate.metrics import check_classifier, load_extractors, measure_reference
from diffusers_dualrate.planning import plan_for
from diffusers_dualrate.processes import check_launch, choose_threads, run_script
from diffusers_dualrate.prompt_lists import read_prompts
from diffusers_dualrate.prompts import check_text_encoder
from diffusers_dualrate.ranges import check_output
from diffusers_dualrate.records import read_json

PLAN, TRAINING = "plan.json", "training.json"


def check(args):
    """Refuse, before anything is computed, what could not be kept or judged."""
    check_output("--output", args.output, is_folder=True)
    if args.cache_dir is not None:
        check_output("--cache_dir", args.cache_dir, is_folder=True)
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output must be a new or an empty folder, and {args.output!r} holds something.")
    has_data = bool(args.dataset_name or args.train_data_dir)
    if args.classifier and not has_data:
        raise ValueError("--classifier needs data beside it: fd_local is taken with both.")
    if has_data and not (args.classifier or args.caption_column):
        raise ValueError("Data needs --classifier beside it, for fd_local, or --caption_column, for prompts.")


def open_data(args, pipe):
    """The images that the flags name, augmented as the training was; `None` where they name none."""
    if not (args.dataset_name or args.train_data_dir):
        return None
    told = Path(args.model, FILE)
    augmentation = Augmentation()
    if told.is_file():
        augmentation = Configuration.from_json(read_json(told)).recipe.augmentation
    options = {**pixel_options(pipe), "augmentation": augmentation, "seed": FRESH_SEED}
    images = sources.open_images(Data(**select(args, Data)), **options)
    sources.check_classes(args.model, pipe, images)
    return images


def choose_prompts(args, pipe, images):
    """The prompts of a model of text, from their file or the captions of the data; `None` for another model."""
    prompts = None if args.prompt_list is None else read_prompts("--prompt_list", args.prompt_list)
    takes_text = pipe.denoiser.config.cross_attention_dim is not None
    if prompts is not None and not takes_text:
        raise ValueError(f"{args.model} takes no text: leave --prompt_list out.")
    if prompts is None and images is not None and images.has_captions:
        prompts = images.list_captions(args.num_images)
    if prompts is None and takes_text:
        raise ValueError(f"{args.model} is a model of text: give --prompt_list, or data with --caption_column.")
    check_text_encoder(args.model, pipe)
    return prompts


def make_criterion(args, pipe, images, accelerator):
    """Images to fd_local from the data."""
    classifier, extractors, _ = load_extractors(args.classifier, None, False, accelerator.device)
    check_classifier(args.classifier, classifier, images.channels, images.num_classes)
    cache = args.cache_dir or Path.home() / ".cache" / "diffusers-dualrate"
    count = len(images) if args.num_reference is None else args.num_reference
    reference = measure_reference(images, extractors, count, cache, args.batch_size, accelerator)

    def fd_local(samples):
        found = evaluation.FeatureStatistics()
        for batch in samples.split(args.batch_size):
            batch = batch if pipe.vae is None else decode(pipe.vae, batch)
            found.update(extractors["local"](as_bytes(batch).to(accelerator.device)))
        return evaluation.fd_local(evaluation.FeatureStatistics(found.moments.cpu()), reference.statistics["local"])

    return fd_local


def check_student(args):
    """Refuse a student, whose plan is what it was distilled into."""
    told = Path(args.model, FILE)
    if told.is_file() and (recipe := read_json(told).get("distillation")):
        n, k = recipe.get("num_inference_steps"), recipe.get("num_context_steps")
        raise ValueError(
            f"{args.model} is distilled into N = {n} and K = {k}, and knows no other plan: plan its teacher."
        )


def save(planned, pipe, prompts, args):
    """Write the model with its plan into a new folder, and what it was trained by, if that lies beside it."""
    planned.choice.apply_to(pipe).save_pretrained(args.output)
    record = planned.to_json() | {"model": Path(args.model).name, "command": ["python", *sys.argv]}
    if prompts is not None:
        record["prompts"] = prompts
    if args.classifier:
        record["classifier"] = {"file": Path(args.classifier).name, "sha256": evaluation.file_hash(args.classifier)}
        record["data"] = Data(**select(args, Data)).name
    Path(args.output, PLAN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in (FILE, TRAINING):
        if Path(args.model, name).is_file():
            shutil.copy(Path(args.model, name), args.output)


def main(args):
    check(args)
    accelerator = check_launch(Accelerator())
    if accelerator.num_processes > 1:
        raise ValueError(f"A plan is chosen by one process, and there are {accelerator.num_processes}.")
    check_student(args)
    pipe = DualRatePipeline.from_pretrained(args.model).to(accelerator.device)
    print(choose_threads(args.batch_size * network_flops(pipe.context_encoder or pipe.denoiser)))
    images = open_data(args, pipe)
    prompts = choose_prompts(args, pipe, images)
    criterion = make_criterion(args, pipe, images, accelerator) if args.classifier else None
    pipe.set_progress_bar_config(desc="plans")
    planned = plan_for(
        pipe,
        args.budget,
        unit=args.unit,
        criterion=criterion,
        prompts=prompts,
        num_images=args.num_images,
        seed=args.seed,
        num_trials=args.num_trials,
        batch_size=args.batch_size,
    )
    save(planned, pipe, prompts, args)
    choice = planned.choice
    order, interval = ("second" if choice.second_order else "first"), choice.guidance_interval
    print(f"\n{choice.plan}\n")
    where = "at all steps" if interval is None else f"at log-SNR {interval}"
    print(f"{order} order, {'no guidance' if pipe.config.guidance_scale == 1 else f'guidance {where}'}")
    unit = f"of {pipe.config.num_inference_steps} steps of the heavy network" if args.unit == "share" else args.unit
    print(f"{choice.cost:.4g} of {args.budget:g} {unit}, {planned.criterion} {choice.score:.4g}")
    print(f"Plans tried: {len(planned.tried)}. The model is in {Path(args.output).resolve()}.")
    return planned


if __name__ == "__main__":
    run_script(main, ARGS)
