"""The study's table, plot and list of points, made from its JSON file alone."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from .front import compare, undominated

SOLVERS = ("ancestral", "ddim", "dpmsolver++", "sde-dpmsolver++")
BUDGETS = ("steps", "flops")
CONTROL = "dual-rate-no-context"
MARKERS = ("<!-- study: begin -->", "<!-- study: end -->")

Configuration = tuple  # (arm, solver, N, K)


def group(study: dict, data: str, budget: str, solvers=SOLVERS) -> dict[Configuration, tuple[float, list[float]]]:
    """FLOPs and the distances over seeds of every configuration.

    The seeds are those of training, sampling seeds averaged; those of sampling where a data set has one training seed.
    At equal training FLOPs the heavy network's own training is the measure, so whatever samples it, or a network whose
    training cost the same within two per cent, belongs there too.
    """
    points = [point for point in study["points"] if point["data"] == data]
    measure = max((point["training_flops"] for point in points if point["arm"] == "single-rate"), default=0)
    repeated = "seed" if len({point["seed"] for point in points}) > 1 else "sampling_seed"
    has_own = {point["arm"] for point in points if point["budget"] == "flops"}
    found = defaultdict(lambda: defaultdict(list))
    flops = {}
    for point in points:
        costs_the_same = math.isclose(point["training_flops"], measure, rel_tol=0.02) and point["arm"] not in has_own
        belongs = point["budget"] == budget or (budget == "flops" and costs_the_same)
        if belongs and point["solver"] in solvers:
            key = (point["arm"], point["solver"], point["N"], point["K"])
            found[key][point[repeated]].append(point["fd"])
            flops[key] = point["flops"]
    return {key: (flops[key], [fmean(values) for values in seeds.values()]) for key, seeds in found.items()}


def budgets_with_pairs(study: dict, data: str) -> list[str]:
    """Budgets at which Dual-Rate was trained on a data set."""
    trained = {p["budget"] for p in study["points"] if p["data"] == data and is_ours(p["arm"])}
    return [budget for budget in BUDGETS if budget in trained]


def is_ours(arm: str) -> bool:
    """Whether an arm is Dual-Rate, which is held against all arms that are not."""
    return arm.startswith("dual-rate") and arm != CONTROL


def is_rival(arm: str) -> bool:
    """Whether an arm belongs to the front; the control does not, since it is made of the pair itself."""
    return not arm.startswith("dual-rate")


def is_single_rate(arm: str) -> bool:
    """Whether an arm is one network as it is trained, in any size and with any solver."""
    return arm.startswith("single-rate") and not is_distilled(arm)


def is_distilled(arm: str) -> bool:
    """Whether an arm was distilled."""
    return "-mmd" in arm


def comparisons(study: dict, data: str, budget: str, solvers=SOLVERS, rival=is_rival) -> dict[Configuration, dict]:
    """Every Dual-Rate point held against the front of all other arms, as `front.compare` does, with its FLOPs."""
    grouped = group(study, data, budget, solvers)
    rivals = [value for key, value in grouped.items() if rival(key[0])]
    ours = {key: value for key, value in grouped.items() if is_ours(key[0])}
    return {key: {"flops": value[0]} | compare(value, rivals) for key, value in ours.items()} if rivals else {}


def front_of(grouped: dict, keep) -> list[tuple[Configuration, float, float]]:
    """The undominated configurations among those whose arm is kept, with FLOPs and mean distance."""
    points = {(flops, fmean(fds)): key for key, (flops, fds) in grouped.items() if keep(key[0])}
    return [(points[point], *point) for point in undominated(list(points))]


def against_sized(study: dict, data: str, budget: str) -> dict[str, Counter]:
    """For each Dual-Rate arm, how its points lie to the front of `single-rate-sized` alone, where that reaches as low."""
    found = defaultdict(Counter)
    for (arm, *_), result in comparisons(study, data, budget, rival=lambda name: name == "single-rate-sized").items():
        if math.isfinite(result["front"]):
            found[arm][result["verdict"]] += 1
    return dict(found)


def training_of(study: dict, data: str, arm: str, budget: str) -> str:
    """How an arm was trained beside the heavy network: for equal steps or FLOPs, or, started from a model, for more."""
    points = [point for point in study["points"] if point["data"] == data]
    own = next(point for point in points if (point["arm"], point["budget"]) == (arm, budget))
    heavy = next((point for point in points if point["arm"] == "single-rate"), own)
    if budget == "flops" or own["training_images"] <= heavy["training_images"]:
        return budget
    return f"more, {own['training_flops'] / heavy['training_flops']:.2f} × FLOPs"


def write_table(study: dict) -> str:
    """Markdown: for every data set the best Dual-Rate points, and what they are held against."""
    return "\n\n".join(_write_section(study, data) for data in dict.fromkeys(p["data"] for p in study["points"]))


def _write_section(study, data):
    lines = [
        _write_title(study, data),
        "",
        "| training | arm, solver, N/K | MFLOP | fd | front of others there | margin | others need, MFLOP | ratio | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    seeds = set()
    for budget in budgets_with_pairs(study, data):
        compared, grouped = comparisons(study, data, budget), group(study, data, budget)
        best = [key for key, *_ in front_of(grouped, lambda arm: is_ours(arm) and not is_distilled(arm))]
        for key in [*best, *(key for key in grouped if is_ours(key[0]) and is_distilled(key[0]))]:
            if key in compared:
                cells = [training_of(study, data, key[0], budget), _name(key)]
                cells += _write_comparison(compared[key], grouped[key][1])
                lines.append("| " + " | ".join(cells) + " |")
                seeds.add(len(grouped[key][1]))
    if len(seeds) > 1 and 1 in seeds:
        lines += ["", "Rows without ± have one seed: their margin comes from the spread of those on the front alone."]
    for budget in budgets_with_pairs(study, data):
        if held := against_sized(study, data, budget):
            listed = [
                f"{arm} {counts['below']} / {counts['matches']} / {counts['above']}" for arm, counts in held.items()
            ]
            lines += [
                "",
                f"Points below / level with / above `single-rate-sized` alone, equal {budget}: {'; '.join(listed)}.",
            ]
    return "\n".join(lines)


def write_points(study: dict) -> str:
    """Markdown: what trainings cost, the fronts, and every Dual-Rate point held against them."""
    lines = [
        "# Every Dual-Rate point of the study",
        "",
        "Made from `study.json` by `study.py`, as is the table in the README, which has the best of these. *needed*: the MFLOP at which",
        "others reach the point's fd: all other arms and solvers, single networks that were not distilled, and, for a point that was",
        "sampled ancestrally, all other arms sampled so. *ratio*: the first of these by the point's own MFLOP.",
    ]
    for data in dict.fromkeys(p["data"] for p in study["points"]):
        lines += ["", f"## {data}", "", _write_title(study, data), "", _describe_trainings(study, data)]
        for budget in budgets_with_pairs(study, data) or BUDGETS[:1]:
            lines += ["", f"### Equal training {budget}", ""]
            for title, solvers in (("All solvers", SOLVERS), ("Ancestral sampling alone", SOLVERS[:1])):
                front = _list_front(study, data, budget, solvers)
                lines.append(f"- {title}: {_count_wins(study, data, budget, solvers)} Front, fd @ MFLOP: {front}.")
            lines += ["", *_write_every_point(study, data, budget)]
    return "\n".join(lines) + "\n"


def _write_every_point(study, data, budget):
    titles = ["arm, solver, N/K", "seeds", "MFLOP", "fd", "front there", "margin", "needed", "ratio", ""]
    titles += ["needed, single-rate", "", "needed, ancestral", ""]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    grouped = group(study, data, budget)
    others = comparisons(study, data, budget, rival=is_single_rate), comparisons(study, data, budget, SOLVERS[:1])
    for key, result in comparisons(study, data, budget).items():
        cells = [_name(key), str(len(grouped[key][1])), *_write_comparison(result, grouped[key][1])]
        for other in others:
            cells += [_write_needed(other[key]), _write_verdict(other[key])] if key in other else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _write_title(study, data):
    floor = study["floors"][data]
    points = [p for p in study["points"] if p["data"] == data]
    training, sampling = (sorted({p[name] for p in points}) for name in ("seed", "sampling_seed"))
    if len(training) > 1:
        end = f"training seeds {_list(training)}."
    elif len(sampling) > 1:
        end = f"training seed {_list(training)}; spread and margin are those of the sampling seeds {_list(sampling)}."
    else:
        end = f"training seed {_list(training)}; without further seeds there is no margin, and the sign alone decides."
    return f"**{data}** – `fd_local` of {floor['n']:,} images, floor {floor['fd']:.3f}, {end}"


def _list(numbers):
    return ", ".join(map(str, numbers))


def _list_front(study, data, budget, solvers=SOLVERS):
    rivals = front_of(group(study, data, budget, solvers), is_rival)
    return "; ".join(f"{_name(key)} {fd:.3f} @ {flops / 1e6:.0f}" for key, flops, fd in rivals)


def _count_wins(study, data, budget, solvers=SOLVERS):
    """At how many of its points each Dual-Rate arm lies below the front."""
    verdicts = defaultdict(list)
    for (arm, *_), result in comparisons(study, data, budget, solvers).items():
        verdicts[arm].append(result["verdict"])
    counts = [
        f"{arm} (training: {training_of(study, data, arm, budget)}) at {own.count('below')} of {len(own)} points"
        for arm, own in verdicts.items()
    ]
    if not counts:
        return "no Dual-Rate arm to hold against others."
    return f"below the front lie {'; '.join(counts)}."


def _describe_trainings(study, data):
    """What the trainings of the arms cost, and which arms have fewer seeds than others."""
    points = [point for point in study["points"] if point["data"] == data]
    unit = {point["training_flops"] for point in points if point["arm"] == "single-rate"}
    costs, seeds = defaultdict(set), defaultdict(set)
    for point in points:
        if point["budget"] == "steps":
            costs[point["arm"]].add(point["training_flops"])
            seeds[point["arm"]].add(point["seed"])
    listed = [f"{arm} {max(costs[arm]) / max(unit):.2f}" for arm in costs] if unit else []
    most = max(map(len, seeds.values()), default=0)
    fewer = [f"{arm} {_list(sorted(own))}" for arm, own in seeds.items() if len(own) < most]
    sentences = [
        "Training FLOPs at equal steps, all that an arm starts from included, against `single-rate`: "
        + "; ".join(listed)
        + "."
    ]
    if fewer:
        sentences.append("Fewer training seeds: " + "; ".join(fewer) + ".")
    entries = [entry.split("/") for entry in study.get("left_out", ())]
    # An arm, an arm at a budget, or, as if its arm had no name, all that a budget has.
    rests = [rest if rest[0] not in BUDGETS else ["all", *rest] for name, *rest in entries if name == data]
    if left_out := [" at equal ".join(rest) for rest in rests]:
        sentences.append(f"Left out here: {'; '.join(left_out)}.")
    return " ".join(sentences if unit else sentences[1:])


def _name(key):
    arm, solver, n, k = key
    return f"{arm} {solver} {n}" + (f"/{k}" if k else "")


def _write_comparison(result, fds):
    """Cells: FLOPs, distance and its deviation over seeds, the front there, the margin, and what the front needs."""
    spread = f" ± {stdev(fds):.3f}" if len(fds) > 1 else ""
    reached = f"{result['front']:.3f}" if math.isfinite(result["front"]) else ""
    margin = "" if result["margin"] is None else f"{result['margin']:.3f}"
    ratio = f"{result['ratio']:.2f}" if math.isfinite(result["needed"]) else ""
    cells = [f"{result['flops'] / 1e6:.0f}", f"{result['distance']:.3f}{spread}", reached, margin]
    return [*cells, _write_needed(result), ratio, _write_verdict(result)]


def _write_needed(result):
    return f"{result['needed'] / 1e6:.0f}" if math.isfinite(result["needed"]) else "never reached"


def _write_verdict(result):
    return result["verdict"] if math.isfinite(result["front"]) else "none so cheap"


def check_markers(path: Path) -> str:
    """The text of a file that holds the study's markers.

    Raises:
        ValueError: If it does not.
    """
    text = path.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise ValueError(f"{path} must hold {MARKERS[0]} and {MARKERS[1]} once each.")
    return text


def insert(table: str, path: Path) -> None:
    """Replace what a file has between the study's markers."""
    path.write_text(insert_between(check_markers(path), *MARKERS, table), encoding="utf-8")


def insert_between(text: str, begin: str, end: str, table: str) -> str:
    """A page with a table in place of what stands between two markers."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def plot(study: dict, path: Path) -> None:
    """Quality against FLOPs: each arm's own front over its solvers, with the spread over seeds, and the front of all rivals."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((p["data"], p["budget"]) for p in study["points"]))
    arms = list(dict.fromkeys(p["arm"] for p in study["points"]))
    pairs_of_colours = plt.colormaps["tab20"].colors  # the ten usual ones, each followed by a pale one
    colours = pairs_of_colours[::2] + pairs_of_colours[1::2]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(8 * columns, 5.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (data, budget) in zip(axes.flat, panels, strict=False):
        grouped = group(study, data, budget)
        for arm in arms:
            own = [grouped[key] for key, *_ in front_of(grouped, lambda name, arm=arm: name == arm)]
            if own:
                spread = [stdev(fds) if len(fds) > 1 else 0 for _, fds in own]
                axis.errorbar(
                    [flops / 1e6 for flops, _ in own],
                    [fmean(fds) for _, fds in own],
                    yerr=spread if any(spread) else None,
                    fmt="-s" if is_ours(arm) else "--o",
                    color=colours[arms.index(arm) % len(colours)],
                    linewidth=2 if is_ours(arm) else 1,
                    markersize=4,
                    capsize=2,
                    label=arm,
                )
        rivals = front_of(grouped, is_rival)
        axis.plot(
            [flops / 1e6 for _, flops, _ in rivals], [fd for *_, fd in rivals], color="grey", linewidth=6, alpha=0.3,
            label="front of all but Dual-Rate",
        )  # fmt: skip
        axis.axhline(study["floors"][data]["fd"], color="grey", linestyle=":", label="floor")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="MFLOP per image",
            ylabel=f"fd_local, n = {study['floors'][data]['n']:,}, best solver",
        )
        axis.set_title(f"{data}, equal training {budget}")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of its size
