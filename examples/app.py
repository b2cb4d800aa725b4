"""Play with a pair on a page in the browser: what it draws, beside the heavy network alone, and what each costs.

    python examples/app.py --model model_cards/dualrate-emoji64 --compare model_cards/dualrate-emoji64 --prompt "red apple" "two fish"

The page shows the chain's images as they are made, then time, evaluations and GFLOP, and the steps at which the heavy
network ran. It needs no network: it is served on this machine, and the models may be folders.
"""

import argparse
import base64
import html
import io
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import torch

from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from diffusers_dualrate.defaults import SamplingDefaults
from diffusers_dualrate.flops import count_evaluations, network_flops, plan_flops
from diffusers_dualrate.guidance import Guidance
from diffusers_dualrate.latents import decode
from diffusers_dualrate.processes import choose_threads
from diffusers_dualrate.steps import make_dpm_solver, plan_steps

OWN, ANCESTRAL, SECOND_ORDER, FAST = SOLVERS = ("the model's own", "ancestral", "second order", "DPM-Solver++")
ALIKE, ITS_OWN = HEAVY_RUNS = ("with N, guidance and solver of the pair", "with its own defaults")
MOST_IMAGES, LARGEST_SEED = 32, 2**53 - 1  # a browser's numbers are whole up to there
EXPLANATION = """# Dual-Rate Diffusion
Noise becomes images in N steps. In a **pair**, a heavy network runs at K steps, and a light one at every step or at the others.
The **heavy network alone** takes every step itself, from the same noise."""
STYLE = """
#result .sides {display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr))}
#result .card {border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 16px;
  background: var(--block-background-fill); color: var(--body-text-color)}
#result h3 {margin: 0; font-size: 1.15em} #result p {margin: 2px 0 8px; color: var(--body-text-color-subdued)}
#result progress {width: 100%; height: 5px; appearance: none; border: 0}
#result progress::-webkit-progress-bar {background: var(--border-color-primary); border-radius: 3px}
#result progress::-webkit-progress-value {background: var(--color-accent); border-radius: 3px}
#result .images {display: grid; gap: 8px; margin: 10px 0 14px}
#result figure {margin: 0; min-width: 0}
#result img {width: 100%; image-rendering: pixelated; border-radius: 6px; background: white}
#result figcaption {font-size: .75em; text-align: center; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
#result .tiles {display: grid; gap: 6px; grid-template-columns: repeat(4, 1fr); text-align: center}
#result .tiles div {border-radius: 8px; padding: 8px 2px; background: var(--background-fill-secondary)}
#result .tiles b {display: block; font-size: 1.3em; line-height: 1.2} #result .tiles span {font-size: .75em}
#result .sum {font-size: 1.1em; text-align: center; margin: 16px 0; min-height: 1.5em; color: var(--body-text-color)}
#result pre {overflow-x: auto; font-size: .8em; line-height: 1.35; margin: 8px 0 0; background: none}
#message div.wrong {border-left: 4px solid #dc2626; background: #dc262618; padding: 10px 14px; border-radius: 6px}
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["model_cards/dualrate-emoji64", "model_cards/dualrate-emoji64-distilled"],
        help="Folders or Hub repositories of pairs to choose from; the page takes others, too. Default: the emoji.",
    )
    parser.add_argument(
        "--compare",
        default="model_cards/dualrate-emoji64",
        help="Folder or Hub repository of a heavy network alone of the same classes, or of a pair around it. Default: the emoji.",
    )
    parser.add_argument(
        "--prompt",
        nargs="*",
        default=["red apple, flat style", "sun with face", "fire engine", "purple heart"],
        help="Prompts that the page opens with, for a model of text. Default: of emoji.",
    )
    parser.add_argument("--port", type=int, help="Where the page is served; default: the first free from 7860.")
    return parser.parse_args(argv)


def open_pair(name):
    """A pair, on the accelerator where there is one."""
    pipe = DualRatePipeline.from_pretrained(name)
    if pipe.context_encoder is None:
        raise ValueError(f"Pair must be a model of two networks, but {name} is a single-rate model.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def open_heavy(name, pair):
    """The single-rate model that draws beside a pair, which must draw the same."""
    pipe = DualRatePipeline.from_pretrained(name)
    if pipe.context_encoder is not None and not pipe.denoiser.config.prediction_hand_over:
        raise ValueError(
            f"Heavy network must be a single-rate model, but {name} is a pair whose encoder predicts nothing."
        )
    pipe = pipe.heavy_alone()
    ours, theirs = pair.denoiser.config, pipe.denoiser.config
    for part in ("sample_size", "in_channels", "num_classes", "cross_attention_dim"):
        if ours.get(part) != theirs.get(part):
            raise ValueError(
                f"{name} draws other images than the pair: {part} is {theirs.get(part)}, not {ours.get(part)}."
            )
    if any(pipe.id2label[i] != pair.id2label[i] for i in pipe.id2label.keys() & pair.id2label.keys()):
        raise ValueError(f"{name} has other classes than the pair, or the same in another order.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(pair.device)


def with_solver(pipe, solver):
    """A model that takes its steps by a solver."""
    if solver == OWN:
        return pipe
    if solver == FAST:
        scheduler = make_dpm_solver(pipe.scheduler)
    elif not isinstance(pipe.scheduler, DualRateScheduler):
        raise ValueError(
            f"Solver must be {OWN!r} or {FAST!r} for a model that is saved with {type(pipe.scheduler).__name__}."
        )
    else:
        scheduler = DualRateScheduler.from_config(pipe.scheduler.config, second_order=solver == SECOND_ORDER)
    solved = DualRatePipeline(**pipe.components | {"scheduler": scheduler}, **pipe.parameters)
    solved.set_progress_bar_config(disable=True)
    return solved


def class_names(pipe):
    """Names of all classes, or their numbers where they have none."""
    return [pipe.id2label.get(i, str(i)) for i in range(pipe.denoiser.config.num_classes or 0)]


def run_chain(pipe, **inputs):
    """Yield, after each step, its images and the seconds that the steps took; the clock stands while they are shown."""
    steps, shown = queue.SimpleQueue(), threading.Semaphore(0)
    seconds, left, since = 0.0, False, time.perf_counter()

    def after_step(own, step, timestep, tensors):
        nonlocal seconds, since
        latents = tensors["latents"]
        latents.cpu()  # waits until the step is done
        seconds += time.perf_counter() - since
        images = latents if own.vae is None else decode(own.vae, latents)
        steps.put((own.image_processor.postprocess(images), seconds))
        shown.acquire()
        own._interrupt = left
        since = time.perf_counter()

    with ThreadPoolExecutor(1) as pool:
        chain = pool.submit(pipe, **inputs, callback_on_step_end=after_step)
        chain.add_done_callback(lambda _: steps.put(None))
        try:
            for step in iter(steps.get, None):
                yield step
                shown.release()
        finally:  # also where somebody left the page
            left = True
            shown.release()
        chain.result()


def show_chain(pipe, title, names, n, k, guidance_scale, **inputs):
    """Yield after each step this side of the page, with GFLOP and seconds per image."""
    spared, is_pair = pipe.config.encoder_denoises, pipe.context_encoder is not None
    taken = plan_steps(pipe.scheduler, SamplingDefaults.of(pipe.config), n, k, is_pair=is_pair)
    plan, guided = taken.plan, taken.guided_by(Guidance.of(guidance_scale, pipe.config.guidance_interval))
    flops = plan_flops(pipe.denoiser, pipe.context_encoder, plan, guided=guided, encoder_denoises=spared) / 1e9
    how = f"N = {len(plan)}, " + (f"K = {plan.num_context_steps}, " if is_pair else "")
    how += f"guidance {guidance_scale:g}" if any(guided) else "no guidance"
    steps = {"num_inference_steps": n, "num_context_steps": k, "guidance_scale": guidance_scale}
    with count_evaluations(pipe.context_encoder, pipe.denoiser) as evaluations:
        for step, (images, seconds) in enumerate(run_chain(pipe, **steps, **inputs), 1):
            heavy, light = evaluations if is_pair else reversed(evaluations)
            each = seconds / len(images)
            tiles = {"heavy evaluations": heavy, "light evaluations": light}
            tiles |= {"GFLOP per image": f"{flops:.2f}", "ms per image": f"{1000 * each:.0f}"}
            yield draw_card(title, how, images, names, tiles, step / len(plan)), flops, each


def draw_card(title, how, images, names, tiles, share):
    """One side of the page, as HTML."""
    figures = ""
    for image, name in zip(images, names, strict=True):
        file = io.BytesIO()
        image.save(file, "PNG")
        source, words = base64.b64encode(file.getvalue()).decode(), html.escape(name)
        figures += f'<figure><img src="data:image/png;base64,{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    columns = f"grid-template-columns: repeat({min(4, len(images))}, 1fr)"
    return (
        f'<section class="card" data-share="{share:g}"><h3>{title}</h3><p>{how}</p><progress value="{share}"></progress>'
        f'<div class="images" style="{columns}">{figures}</div><div class="tiles">{tiles}</div></section>'
    )


def draw_page(cards, sentence, plan):
    """Both sides, what they say together, and the diagram of the pair's steps."""
    sides = "".join(cards)
    diagram = f'<section class="card"><h3>Refresh plan</h3><p>E: the heavy network runs.</p><pre>{html.escape(plan)}</pre></section>'
    return f'<div class="sides">{sides}</div><div class="sum">{sentence}</div>{diagram}'


def compare_costs(pair, heavy):
    """A sentence of (GFLOP, seconds) per image of both."""
    words = []
    for ours, theirs, what in zip(pair, heavy, ("compute", "time"), strict=True):
        times = f"{max(theirs / ours, ours / theirs):.1f} times"
        words.append(f"<b>{times} {'less' if ours <= theirs else 'more'} {what}</b>")
    return f"The pair took {words[0]} and {words[1]} than the heavy network alone."


def own_values(pipe):
    """What the controls show of a model by themselves: classes, prompts, N, K, guidance, solver."""
    names, plan = class_names(pipe), pipe.plan_run()
    chosen = list(dict.fromkeys(names[i * len(names) // 4] for i in range(4))) if names else []
    takes_text = pipe.denoiser.config.cross_attention_dim is not None
    return (
        {"choices": names, "value": chosen, "visible": bool(names)},
        {"visible": takes_text},
        {"value": len(plan)},
        {"value": plan.num_context_steps},
        {"value": pipe.config.guidance_scale, "visible": bool(names) or takes_text},
        {"value": OWN},
    )


def say(error=None):
    """The message of the page, or that there is none."""
    return gr.update(
        value=error and f'<div class="wrong" role="alert">{html.escape(str(error))}</div>', visible=bool(error)
    )


def choose(model, compare):
    """The controls once another model was chosen, with its own values, or why it cannot be had."""
    try:
        pipe = open_pair(model)
        heavy = open_heavy(compare, pipe) if compare else pipe
        values = [gr.update(**each) for each in own_values(pipe)]
    except (ValueError, OSError) as error:
        return *[gr.skip()] * 7, say(error)
    # A student has learned guidance, so a heavy network that has not runs as it does by itself.
    return *values, ALIKE if heavy.config.guidance_scale == pipe.config.guidance_scale else ITS_OWN, say()


def list_rows(names, labels, images_per_class, seed):
    """The class or prompt of each image, after a check of what only the page knows by these names.

    For a model of text `names` is `None`, and `labels` are prompts.
    """
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"Seed must be a whole number between 0 and {LARGEST_SEED}, got {seed}.")
    if images_per_class is None or images_per_class < 1:
        raise ValueError(f"Images of each must be at least 1, got {images_per_class}.")
    if names is None and not labels:
        raise ValueError("Prompts must name at least one, each on a line of its own.")
    if names and not labels:
        raise ValueError("Classes must name at least one.")
    if unknown := [label for label in labels or [] if names and label not in names]:
        raise ValueError(f"Classes must be among those of the model, got {unknown[0]!r}.")
    count = images_per_class * (len(labels) if names or names is None else 1)
    if count > MOST_IMAGES:
        raise ValueError(f"There may be at most {MOST_IMAGES} images, got {count}.")
    return [""] * count if names == [] else [label for label in labels for _ in range(images_per_class)]


def make_runs(model, compare, n, k, guidance_scale, solver, heavy_runs):
    """What runs on each side of the page: {title: (pipe, N, K, guidance)}."""
    pair = open_pair(model)
    own = pair.plan_run()
    if (n, k) == (len(own), own.num_context_steps):  # the model's own plan, which K alone does not tell
        n = k = None
    solved = with_solver(pair, solver)
    runs = {"Pair": (solved, n, k, pair.config.guidance_scale if guidance_scale is None else guidance_scale)}
    if compare:
        heavy = open_heavy(compare, pair)
        own = heavy, None, None, heavy.config.guidance_scale
        n = solved.plan_run(n, k).num_inference_steps
        alike = with_solver(heavy, solver), n, None, runs["Pair"][-1]
        runs["Heavy network alone"] = alike if heavy_runs == ALIKE else own
    return runs


def draw(model, compare, labels, n, k, guidance_scale, solver, heavy_runs, images_per_class, seed, prompts=""):
    """Yield (message, result) of the page after each step: the sides take turns, so that what disturbs one disturbs both."""
    try:
        runs = make_runs(model, compare, n, k, guidance_scale, solver, heavy_runs)
        pair, n, k, _ = runs["Pair"]
        names, plan = class_names(pair), str(pair.plan_run(n, k))
        if pair.denoiser.config.cross_attention_dim is not None:
            names, labels = None, [line.strip() for line in prompts.splitlines() if line.strip()]
        rows = list_rows(names, labels, images_per_class, seed)
        choose_threads(len(rows) * network_flops(pair.context_encoder))
        chains, cards, costs = {}, dict.fromkeys(runs, ""), {}
        for title, (pipe, *steps, scale) in runs.items():
            inputs = {"class_labels": [names.index(row) for row in rows]} if names else {"batch_size": len(rows)}
            inputs = {"prompt": rows} if names is None else inputs
            inputs["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
            chains[title] = show_chain(pipe, title, rows, *steps, 1.0 if names == [] else scale, **inputs)
        while chains:
            for title, chain in list(chains.items()):
                if (step := next(chain, None)) is None:
                    del chains[title]
                else:
                    cards[title], *costs[title] = step
                    yield say(), draw_page(cards.values(), "", plan)
        yield say(), draw_page(cards.values(), compare_costs(*costs.values()) if compare else "", plan)
    except (ValueError, OSError) as error:
        yield say(error), gr.skip()


def make_page(args):
    """The page, which opens with the first model and its own values."""
    first = open_pair(args.model[0])
    open_heavy(args.compare, first)
    labels, words, n, k, guidance, own = own_values(first)
    either = {"allow_custom_value": True, "info": "A folder, or a name on the Hub"}
    with gr.Blocks(title="Dual-Rate Diffusion", analytics_enabled=False) as page:
        gr.Markdown(EXPLANATION)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                model = gr.Dropdown(args.model, label="Pair", value=args.model[0], elem_id="model", **either)
                classes = gr.Dropdown(label="Classes", multiselect=True, elem_id="classes", **labels)
                prompts = gr.Textbox(
                    "\n".join(args.prompt), label="Prompts, one a line", lines=4, elem_id="prompts", **words
                )
                small = {"precision": 0, "min_width": 120}
                with gr.Row():
                    steps = gr.Number(label="N, steps", elem_id="steps", **small, **n)
                    contexts = gr.Number(label="K, heavy steps", minimum=1, elem_id="contexts", **small, **k)
                with gr.Row():
                    scale = gr.Number(label="Guidance", elem_id="scale", min_width=120, **guidance)
                    seed = gr.Number(0, label="Seed", elem_id="seed", **small)
                solver = gr.Dropdown(SOLVERS, label="Solver", elem_id="solver", **own)
                with gr.Accordion("More: images, heavy network", open=False):
                    each = gr.Number(2, label="Images of each", **small)
                    compare = gr.Dropdown([args.compare], label="Heavy network alone", value=args.compare, **either)
                    runs = gr.Radio(HEAVY_RUNS, label="It runs", value=ALIKE)
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=320):
                message = gr.HTML(elem_id="message", visible=False)
                result = gr.HTML(elem_id="result")
        inputs = [model, compare, classes, steps, contexts, scale, solver, runs, each, seed, prompts]
        for chosen in (model, compare):
            chosen.change(choose, [model, compare], [classes, prompts, steps, contexts, scale, solver, runs, message])
        for begins in (page.load, button.click):
            begins(draw, inputs, [message, result], show_progress="hidden", trigger_mode="always_last")
    return page


def main(args):
    page = make_page(args)
    # Fonts of the reader's own machine: the page loads nothing from elsewhere.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_port=args.port, theme=theme, css=STYLE, footer_links=[])


if __name__ == "__main__":
    main(parse_args())
