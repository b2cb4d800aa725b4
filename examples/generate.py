"""Generate a labelled picture of samples with a Dual-Rate pair, beside other ways to spend the compute.

    python examples/generate.py --model model_cards/dualrate-emoji64 --prompt pizza penguin

With `--compare`, a single-rate model makes the same images: from the same noise at equal N, and with DPM-Solver++ at few
steps, the fast solver that every diffusers user has. With `--distilled`, so does a student, at the few steps and the
guidance that it was distilled for. What each costs is printed.
"""

import argparse
from pathlib import Path

from diffusers_dualrate.flags import HelpFormatter


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--model", required=True, help="Hub repository or folder of a pair, or of a single-rate model."
    )
    parser.add_argument(
        "--compare",
        help="Hub repository or folder of a single-rate model of the same classes or text, or of a pair around it.",
    )
    parser.add_argument("--distilled", help="Hub repository or folder of a distilled student of the same.")
    parser.add_argument("--class_labels", nargs="+", help="Names or numbers; default: classes spread over all.")
    parser.add_argument("--prompt", nargs="+", help="Prompts, for a model of text.")
    parser.add_argument("--num_columns", type=int, default=12, help="Images per row where no classes are named.")
    parser.add_argument(
        "--num_images_per_class", type=int, default=2, help="Images of each class or prompt, one below the other."
    )
    parser.add_argument("--num_inference_steps", type=int, help="N, not of a student; default: the model's.")
    parser.add_argument("--num_context_steps", type=int, help="K, not of a student; default: the model's.")
    parser.add_argument("--solver_steps", type=int, default=8, help="Steps of DPM-Solver++ in the comparison.")
    parser.add_argument("--guidance_scale", type=float, help="Not of a student; default: the model's.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first image; the others follow.")
    parser.add_argument("--output", default="samples.png", help="The picture to write.")
    parser.add_argument("--zoom", type=int, default=3, help="Pixels in the picture per pixel of an image.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # now, since what follows takes seconds to import

import math
import time
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.decoding import MAX_IMAGE_PIXELS
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.flops import count_evaluations, decode_flops, network_flops, plan_flops
from diffusers_dualrate.guidance import Guidance
from diffusers_dualrate.inputs import check_context_steps
from diffusers_dualrate.latents import compression_of
from diffusers_dualrate.processes import choose_threads
from diffusers_dualrate.prompts import check_text_encoder
from diffusers_dualrate.ranges import check_output
from diffusers_dualrate.steps import make_dpm_solver, plan_steps

GAP, LINE = 4, 16  # pixels between images, and of a line of text


@dataclass
class Row:
    """Images of one way to sample, with what they cost."""

    title: str
    images: list
    steps: tuple[int, int | None]
    heavy: int
    light: int
    flops: int
    guidance_scale: float
    seconds: float


def sample(pipe, name, args, shown, guidance_scale, **steps):
    """Sample the classes or prompts from the seeds of this picture, with proof of what was evaluated."""
    count = args.num_images_per_class * (len(shown) if shown else args.num_columns)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
    pipe.set_progress_bar_config(desc=name)
    is_pair, defaults = pipe.context_encoder is not None, SamplingDefaults.of(pipe.config)
    taken = plan_steps(pipe.scheduler, defaults, **steps, is_pair=is_pair)
    plan, guided = taken.plan, taken.guided_by(Guidance.of(guidance_scale, defaults.guidance_interval))
    start = time.perf_counter()
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        images = pipe(
            shown,
            batch_size=None if shown else count,
            num_images_per_prompt=args.num_images_per_class if shown else 1,
            generator=generators,
            guidance_scale=guidance_scale,
            **steps,
        ).images
    seconds = time.perf_counter() - start
    refreshes, light = evaluations
    spared, n = pipe.config.encoder_denoises, len(plan)
    if (refreshes, light) != plan.evaluations(spared):
        raise RuntimeError(f"{name} made {refreshes} and {light} evaluations instead of {plan.evaluations(spared)}.")
    flops = plan_flops(pipe.denoiser, pipe.context_encoder, plan, guided=guided, encoder_denoises=spared)
    # The network that runs at every step of a single-rate model is the heavy one.
    heavy, light = (refreshes, light) if is_pair else (light, 0)
    title = f"{name}: {heavy} heavy + {light} light evaluations"
    return Row(title, images, (n, refreshes if is_pair else None), heavy, light, flops, guidance_scale, seconds)


def picture_size(num_columns, num_rows, image_size, per_column):
    """Width and height of the picture in pixels."""
    width, height = image_size
    return num_columns * (width + GAP) + GAP, LINE + num_rows * (LINE + per_column * (height + GAP)) + GAP


def draw(rows, column_names, args):
    """Arrange rows of images under their titles, the classes' names on top."""
    per_column, gap, line = args.num_images_per_class, GAP, LINE
    width, height = (side * args.zoom for side in rows[0].images[0].size)
    columns = len(rows[0].images) // per_column
    picture = Image.new("RGB", picture_size(columns, len(rows), (width, height), per_column), "white")
    pen = ImageDraw.Draw(picture)
    for column, name in enumerate(column_names):
        limit = max(1, width // 6)  # the default font is about 6 pixels wide
        pen.text((gap + column * (width + gap), 2), name if len(name) <= limit else name[: limit - 1] + "…", "black")
    top = line
    for row in rows:
        guidance = f"with guidance {row.guidance_scale:g}" if row.guidance_scale > 1 else "without guidance"
        pen.text((gap, top + 1), f"{row.title} {guidance}, {row.flops / 1e9:.2f} GFLOP per image", "black")
        top += line
        for i, image in enumerate(row.images):
            column, below = divmod(i, per_column)
            place = (gap + column * (width + gap), top + below * (height + gap))
            picture.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
        top += per_column * (height + gap)
    return picture


def check(args):
    """Refuse, before any image is made, what would fail after the last."""
    for name in ("num_columns", "num_images_per_class", "solver_steps", "zoom"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie between 0 and 2**63 - 1, got {args.seed}.")
    if args.guidance_scale is not None and not 1 <= args.guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be at least 1, which is none, and finite, got {args.guidance_scale}.")
    if Image.registered_extensions().get(Path(args.output).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output must end in a kind of picture, such as .png, got {args.output!r}.")
    check_output("--output", args.output)


def check_size(pipe, args, num_columns):
    """Refuse a picture that no viewer would open, before its images take memory."""
    num_rows = 1 + 2 * bool(args.compare) + bool(args.distilled)
    height, width = (side * compression_of(pipe.vae) * args.zoom for side in pipe.denoiser.image_size)
    sides = picture_size(num_columns, num_rows, (width, height), args.num_images_per_class)
    if math.prod(sides) > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"The picture would have {sides[0]} x {sides[1]} pixels, more than {MAX_IMAGE_PIXELS}: lower --num_columns, "
            "--num_images_per_class or --zoom."
        )


def read_labels(pipe, names):
    """Numbers of classes given by name or number; a name wins, so a class may be called 3 and have another number."""
    known = set(pipe.id2label.values())
    is_number = [name not in known and name.isdecimal() for name in names]
    labels = pipe.get_label_ids([int(name) if is_one else name for name, is_one in zip(names, is_number, strict=True)])
    for name, is_one, label in zip(names, is_number, labels, strict=True):
        if is_one and label in pipe.id2label:
            print(f"--class_labels {name}: no class has this name, so it is the number of {pipe.id2label[label]!r}.")
    return labels


def check_shown(pipe, args):
    """The prompts of a model of text, which are their own names; `None` for another model."""
    takes_text = pipe.denoiser.config.cross_attention_dim is not None
    if takes_text and (args.class_labels or not args.prompt):
        raise ValueError(f"{args.model} is a model of text: give --prompt and no --class_labels.")
    if not takes_text and args.prompt:
        raise ValueError(f"{args.model} takes no text: leave --prompt out.")
    check_text_encoder(args.model, pipe)
    return args.prompt


def open_beside(flag, args, pipe):
    """The model of a flag, which draws the same classes, or `None` where it was not given."""
    path = getattr(args, flag)
    if path is None:
        return None
    other = DualRatePipeline.from_pretrained(path)
    if flag == "compare":
        if other.context_encoder is not None and not other.denoiser.config.prediction_hand_over:
            raise ValueError(
                f"--compare must be a single-rate model, but {path} is a pair whose encoder predicts nothing."
            )
        other = other.heavy_alone()
    ours, theirs = (p.denoiser.config for p in (pipe, other))
    for name in ("sample_size", "in_channels"):
        if ours[name] != theirs[name]:
            raise ValueError(f"{path} draws other images than the pair: {name} is {theirs[name]}, not {ours[name]}.")
    if theirs["cross_attention_dim"] != ours["cross_attention_dim"]:
        raise ValueError(
            f"{path} is of text and the pair is not, or the other way round, or their texts differ in width."
        )
    check_text_encoder(path, other)
    if other.denoiser.config.num_classes != pipe.denoiser.config.num_classes:
        raise ValueError(f"{path} has {other.denoiser.config.num_classes or 'no'} classes, not those of the pair.")
    if any(other.id2label[i] != pipe.id2label[i] for i in other.id2label.keys() & pipe.id2label.keys()):
        raise ValueError(f"{path} has other classes than the pair, or the same in another order.")
    return other


def main(args):
    check(args)
    pipe = DualRatePipeline.from_pretrained(args.model)
    single, student = (open_beside(flag, args, pipe) for flag in ("compare", "distilled"))
    num_classes = pipe.denoiser.config.num_classes
    shown = args.prompt or args.class_labels
    check_size(pipe, args, len(shown) if shown else args.num_columns)
    names = check_shown(pipe, args)
    if names is None:
        shown = shown and read_labels(pipe, shown)
        if shown is None and num_classes:
            shown = [i * num_classes // args.num_columns for i in range(args.num_columns)]
        names = [pipe.id2label.get(label, str(label)) for label in shown or []]
    defaults, steps = SamplingDefaults.of(pipe.config), args.num_inference_steps
    guidance_scale, _ = defaults.choose_guidance(args.guidance_scale, None, bool(num_classes or args.prompt))
    if steps is None:
        steps = defaults.num_inference_steps
    check_context_steps(args.model, pipe, args.num_context_steps)
    pipe.plan_run(steps, args.num_context_steps)
    if single is not None and args.solver_steps > len(single.scheduler):
        raise ValueError(f"--solver_steps must be at most {len(single.scheduler)}, got {args.solver_steps}.")
    # Now, since it may be refused.
    solver = None if single is None else make_dpm_solver(single.scheduler)
    count = args.num_images_per_class * (len(shown) if shown else args.num_columns)
    print(choose_threads(count * network_flops(pipe.context_encoder or pipe.denoiser)))
    common = (args, shown, guidance_scale)
    rows = [
        sample(
            pipe,
            "single-rate" if pipe.context_encoder is None else "Dual-Rate",
            *common,
            num_inference_steps=steps,
            num_context_steps=args.num_context_steps,
        ),
    ]
    if single is not None:
        rows.append(sample(single, "single-rate", *common, num_inference_steps=steps))
        single.scheduler = solver
        rows.append(
            sample(single, "single-rate, DPM-Solver++", *common, num_inference_steps=args.solver_steps),
        )
    if student is not None:
        # N, K and guidance are those that it was distilled for, and no others.
        rows.append(sample(student, "distilled", args, shown, student.config.guidance_scale))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(rows, names, args).save(args.output)

    print(
        f"\nImages of each way to sample: {len(rows[0].images)}. Per image, where guidance above 1 evaluates both branches:\n"
    )
    print(f"{'':28}{'N':>5}{'K':>5}{'guidance':>10}{'heavy':>7}{'light':>7}{'GFLOP':>8}{'ratio':>8}{'seconds':>9}")
    for row in rows:
        name, count = row.title.partition(":")[0], len(row.images)
        n, k = row.steps
        print(
            f"{name:28}{n:>5}{k or '-':>5}{row.guidance_scale:>10g}{row.heavy:>7}{row.light:>7}{row.flops / 1e9:>8.2f}"
            f"{row.flops / rows[0].flops:>8.2f}{row.seconds / count:>9.3f}"
        )
    if pipe.vae is not None:
        print(f"\nGFLOP are those of the networks. Decoding an image takes {decode_flops(pipe) / 1e9:.3g} more.")
    print(f"\nThe picture is {Path(args.output).resolve()}.")
    other = "prompts" if args.prompt else "classes"
    print(
        f"Next: other {other}, N, K or guidance, by the flags of --help; or examples/evaluate.py, which measures a model."
    )
    return rows


if __name__ == "__main__":
    main(ARGS)
