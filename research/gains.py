"""What Dual-Rate gains, and where that ends: the claims of the README, each recomputed from the study's points.

    python -m research.gains

writes `gains.json`, with one row for each claim, and puts tables made from it between the markers of the README and of
the pages that show them. All rows are at equal training steps.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from .front import flops_at, undominated
from .report import insert_between

ROOT = Path(__file__).resolve().parents[1]
STUDY, TIMING, GAINS = (Path(__file__).with_name(name) for name in ("study.json", "timing.json", "gains.json"))
EMOJI = (  # measurements of a student, of its teacher, its start and a single-rate student of the same teacher
    ROOT / "research" / "emoji32" / "dualrate-emoji32-distilled" / "evaluation.json",
    ROOT / "model_cards" / "dualrate-emoji64-distilled" / "evaluation.json",
)
EARLIER = ROOT / "research" / "emoji64-earlier.json"  # trainings that those of the models of text went on from
SIX_STEPS = ROOT / "research" / "emoji64-six-steps.json"  # of the heavy network of text: about what the pair costs
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("gains", "distillation", "comparison", "models")),
)

PAIRS = [  # data, steps, refreshes
    ("emoji32", 32, 4),
    ("emoji32", 32, 8),
    ("digits", 32, 8),
    ("digits", 32, 16),
    ("letters", 16, 4),
]
STUDENTS = [("digits", "dual-rate-mmd"), ("letters", "dual-rate-half-fresh-mmd")]
UNDISTILLED = [("dual-rate", "steps"), ("dual-rate-late", "flops")]  # arm, budget
RIVALS = {  # the best of each data set: arm, budget
    "emoji32": [("single-rate", "steps"), ("deepcache", "steps"), ("single-rate-sized", "flops")],
    "digits": [("single-rate", "steps"), ("stitching", "steps"), ("single-rate-sized", "flops")],
    "letters": [("single-rate", "steps"), ("deepcache", "steps"), ("stitching", "steps"), ("stitching-unet", "steps")],
}
SOLVERS = {
    "ancestral": "ancestral",
    "ddim": "DDIM",
    "dpmsolver++": "DPM-Solver++",
    "sde-dpmsolver++": "second-order ancestral",
}
FAST = ("dpmsolver++", "sde-dpmsolver++")


def collect(study: dict) -> dict[tuple, dict[int, dict]]:
    """The points of the study by (data, arm, budget, solver, N, K), then by the seed that is repeated there."""
    found = defaultdict(dict)
    for point in study["points"]:
        repeated = "sampling_seed" if point["data"] == "emoji32" else "seed"
        key = tuple(point[name] for name in ("data", "arm", "budget", "solver", "N", "K"))
        found[key][point[repeated]] = point
    return found


def summarise(values: Sequence[float]) -> dict:
    """Mean and standard deviation, which one value does not have."""
    return {"values": list(values), "mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def describe(points: dict[tuple, dict[int, dict]], key: tuple) -> dict:
    """One configuration: what it costs and how far its images are from real ones."""
    seeds = points[key]
    first = next(iter(seeds.values()))
    names = dict(zip(("data", "arm", "budget", "solver", "N", "K"), key, strict=True))
    cost = {"flops": first["flops"], "training_flops": first["training_flops"], "seeds": sorted(seeds)}
    return {**names, **cost, "fd": summarise([seeds[seed]["fd"] for seed in sorted(seeds)])}


def divide(points: dict, ours: tuple, theirs: tuple) -> dict:
    """Our distance over theirs, seed by seed."""
    shared = sorted(points[ours].keys() & points[theirs].keys())
    return summarise([points[ours][seed]["fd"] / points[theirs][seed]["fd"] for seed in shared])


def best_of(points: dict, data: str, arm: str, budget: str, solvers: Sequence[str]) -> dict:
    """An arm's configuration of the lowest mean distance."""
    keys = [key for key in points if key[:3] == (data, arm, budget) and key[3] in solvers]
    return min((describe(points, key) for key in keys), key=lambda row: row["fd"]["mean"])


def compare_pair(points: dict, data: str, n: int, k: int) -> dict:
    """The paper's setting: ancestral steps, as many of them for the pair as for its heavy network."""
    ours, theirs = (
        (data, "dual-rate", "steps", "ancestral", n, k),
        (data, "single-rate", "steps", "ancestral", n, None),
    )
    pair, heavy = describe(points, ours), describe(points, theirs)
    chain = [describe(points, key) for key in points if key[:4] == theirs[:4]]
    front = undominated([(row["flops"], row["fd"]["mean"]) for row in chain])
    needed = flops_at(front, pair["fd"]["mean"])
    return {
        "claim": f"{data}: a pair with N = {n} and K = {k} beside N = {n} steps of its heavy network, all ancestral",
        "pair": pair,
        "heavy": heavy,
        "light": best_of(points, data, "single-rate-light", "steps", ("ancestral",)),
        "times_fewer_flops": heavy["flops"] / pair["flops"],
        "distance_ratio": divide(points, ours, theirs),
        # None where none of the heavy network's ancestral steps come as low.
        "flops_of_heavy_at_equal_distance": needed if needed < float("inf") else None,
    }


def compare_student(points: dict, data: str, arm: str) -> dict:
    """A distilled pair beside the distilled heavy network."""
    ours, theirs = (data, arm, "steps", "ancestral", 8, 2), (data, "single-rate-mmd", "steps", "ancestral", 8, None)
    pair, single = describe(points, ours), describe(points, theirs)
    return {
        "claim": f"{data}: a distilled pair with N = 8 and K = 2 beside a distilled single network with N = 8",
        "pair": pair,
        "single": single,
        "times_fewer_flops": single["flops"] / pair["flops"],
        "times_the_training_flops": pair["training_flops"] / single["training_flops"],
        "distance_ratio": divide(points, ours, theirs),
    }


def compare_emoji(evaluation: dict, earlier: dict) -> dict:
    """A student of emoji beside a single-rate student of the same teacher, as its own measurement has them.

    What a training started from counts as its own, and so do the `earlier` trainings that it went on from.
    """
    rivals, data = evaluation["rivals"], evaluation["data"]["name"]
    teacher, start = (
        rivals[name]["training_flops"] + earlier.get(name, {}).get("training_flops", 0)
        for name in (f"single-rate-{data}", f"dualrate-{data}")
    )
    other = rivals[f"single-rate-{data}-distilled"]
    rows = {}
    for name, record, before in (("pair", evaluation, teacher + start), ("single", other, teacher)):
        (sample,) = record["samples"]
        rows[name] = {
            "data": data,
            "N": sample["num_inference_steps"],
            "K": sample["num_context_steps"],
            "flops": sample["flops_with_guidance"],
            "training_flops": record["training_flops"] + before,
            "seeds": record["seeds"],
            "fd": sample["fd_local_500"],
        }
    pairs = zip(rows["pair"]["fd"]["values"], rows["single"]["fd"]["values"], strict=True)
    return {
        "claim": f"{data}: a distilled pair beside a single-rate student of the same guided teacher",
        **rows,
        "times_fewer_flops": rows["single"]["flops"] / rows["pair"]["flops"],
        "times_the_training_flops": rows["pair"]["training_flops"] / rows["single"]["training_flops"],
        "distance_ratio": summarise([ours / theirs for ours, theirs in pairs]),
    }


def describe_prompts(evaluation: dict, six_steps: dict) -> list[dict]:
    """Real images, then the teacher, the pair and both students of a model of text: what each costs and what of it is known.

    `recognised` is of each list of prompts the share whose image has no other prompt of the list nearer to it.
    """
    rivals, data = evaluation["rivals"], evaluation["data"]["name"]

    def recognised(lists: dict) -> dict:
        metric = "prompt_of_nearest_prompt"
        return {
            name: value for name, own in lists.items() for key, value in (own or {}).items() if key.startswith(metric)
        }

    found = recognised(evaluation["prompt_lists"]) | {
        "held_out": evaluation["classifier"]["prompts_held_out"]["first"]
    }
    real = {name: {"mean": share, "std": None} for name, share in found.items()}
    rows = [{"model": "real images", "recognised": real, "fd": evaluation["floor"]["fd_local_500"]}]
    named = [
        ("heavy network alone", rivals[f"single-rate-{data}"]),
        ("heavy network alone", six_steps),
        ("pair", rivals[f"dualrate-{data}"]),
        ("single-rate student", rivals[f"single-rate-{data}-distilled"]),
        ("pair's student", evaluation),
    ]
    for title, record in named:
        sample = record["samples"][0]
        rows.append({
            "model": title,
            "solver": sample["solver"],
            "N": sample["num_inference_steps"],
            "K": sample["num_context_steps"],
            "flops": sample["flops_with_guidance"],
            "seeds": record["seeds"],
            "recognised": recognised(sample["prompts"]),
            "fd": sample["fd_local_500"],
        })  # fmt: skip
    return rows


def find_ends(points: dict, data: str) -> dict:
    """The best undistilled pair under any solver, and the best of each rival."""
    ours = [describe(points, key) for key in points for arm in UNDISTILLED if key[:3] == (data, *arm)]
    pair = min(ours, key=lambda row: (row["fd"]["mean"], row["flops"]))
    rivals = []
    for arm, budget in RIVALS[data]:
        own = [describe(points, key) for key in points if key[:3] == (data, arm, budget) and key[3] in FAST]
        rivals.append(min(own, key=lambda row: (row["fd"]["mean"], row["flops"])))
    return {"claim": f"{data}: rivals of the best undistilled pair", "pair": pair, "rivals": rivals}


def compute(study: dict, timing: dict, six_steps: dict, earlier: dict, *evaluations: dict) -> dict:
    """All claims; the last evaluation is of a model of text."""
    points = collect(study)
    return {
        "command": "python -m research.gains",
        "study": {name: study[name] for name in ("command", "commit", "environment")},
        "count": {data: floor["n"] for data, floor in study["floors"].items()},
        "floor": {data: floor["fd"] for data, floor in study["floors"].items()},
        "pairs": [compare_pair(points, *case) for case in PAIRS],
        "students": [
            *(compare_student(points, *case) for case in STUDENTS),
            *(compare_emoji(evaluation, earlier) for evaluation in evaluations),
        ],
        "prompts": describe_prompts(evaluations[-1], six_steps),
        "solvers": [
            {solver: best_of(points, data, "single-rate", "steps", (solver,)) for solver in SOLVERS} for data in RIVALS
        ],
        "ends": [find_ends(points, data) for data in RIVALS],
        "time": [row | {"times_less_time": row["heavy_ms"] / row["pair_ms"]} for row in timing["rows"]],
    }


def write_distance(row: dict) -> str:
    """A mean distance with its spread, to as many places as the data set's figures have."""
    fd, places = row["fd"], 2 if row["data"].startswith("emoji") else 3
    return f"{fd['mean']:.{places}f}" + (f"±{fd['std']:.{places}f}" if fd["std"] is not None else "")


def write_cost(row: dict) -> str:
    """Distance, and MFLOP in parentheses, in one cell."""
    return f"{write_distance(row)} ({row['flops'] / 1e6:,.0f})"


def write_ratio(ratio: dict) -> str:
    """A ratio with its spread over seeds."""
    return f"{ratio['mean']:.2f}±{ratio['std']:.2f}"


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in [titles, *rows])
    return "\n".join([head, "|---" * len(titles) + "|", *body])


def write_gains(gains: dict) -> str:
    """The tables of pairs and of students."""
    pairs = [
        [row["pair"]["data"], f"{row['pair']['N']}/{row['pair']['K']}", write_cost(row["heavy"]), write_cost(row["pair"]),
         f"**{row['times_fewer_flops']:.1f}**", write_ratio(row["distance_ratio"]), write_cost(row["light"])]
        for row in gains["pairs"]
    ]  # fmt: skip
    students = [
        [row["pair"]["data"], f"{row['pair']['N']}/{row['pair']['K']}", write_cost(row["single"]), write_cost(row["pair"]),
         f"**{row['times_fewer_flops']:.1f}**", write_ratio(row["distance_ratio"])]
        for row in gains["students"]
    ]  # fmt: skip
    ratios = ["times fewer FLOPs", "pair ÷ heavy"]
    return "\n\n".join([
        format_table(["undistilled", "N/K", "heavy alone", "pair", *ratios, "light alone, best N"], pairs),
        format_table(["distilled", "N/K", "distilled heavy", "pair", *ratios], students),
    ])  # fmt: skip


def write_time(gains: dict) -> str:
    """The table of time."""
    rows = [
        [row["where"], f"{row['N']}/{row['K']}", f"{row['heavy_ms']:,.1f}", f"{row['pair_ms']:,.1f}",
         f"{row['times_fewer_flops']:.1f}", f"**{row['times_less_time']:.1f}**"]
        for row in gains["time"]
    ]  # fmt: skip
    titles = [
        "milliseconds per image, no guidance",
        "N/K",
        "heavy alone",
        "pair",
        "times fewer FLOPs",
        "times less time",
    ]
    return format_table(titles, rows)


def write_needs(gains: dict) -> str:
    """What the heavy network alone needs for a pair's distance, and what the trainings cost."""
    rows = []
    for row in gains["pairs"]:
        needed, light, own = row["flops_of_heavy_at_equal_distance"], row["light"], row["pair"]["flops"]
        rows.append([
            row["pair"]["data"], f"{row['pair']['N']}/{row['pair']['K']}", write_cost(row["pair"]),
            f"{needed / 1e6:,.0f}" if needed else "not reached", f"{needed / own:.2f}" if needed else "",
            f"{row['pair']['training_flops'] / row['heavy']['training_flops']:.2f}", f"N = {light['N']}",
        ])  # fmt: skip
    titles = [
        "data",
        "N/K",
        "pair",
        "heavy needs, MFLOP",
        "times the pair's",
        "training FLOPs, pair ÷ heavy",
        "light's best",
    ]
    students = [
        [row["pair"]["data"], write_cost(row["pair"]), f"{row['times_the_training_flops']:.2f}"]
        for row in gains["students"]
    ]
    return "\n\n".join([
        format_table(titles, rows),
        format_table(["data", "distilled pair", "training FLOPs, pair ÷ single network"], students),
    ])  # fmt: skip


def write_solvers(gains: dict) -> str:
    """The heavy network alone under each solver."""
    rows = [
        [row["ancestral"]["data"], *(f"{own['N']}: {write_cost(own)}" for own in row.values())]
        for row in gains["solvers"]
    ]
    return format_table(["data", *SOLVERS.values()], rows)


def write_student(gains: dict) -> str:
    """The students of emoji, a row each."""
    rows = [
        [row["pair"]["data"], write_cost(row["single"]), write_cost(row["pair"]), f"{row['times_fewer_flops']:.1f}",
         write_ratio(row["distance_ratio"]), f"{row['times_the_training_flops']:.1f}"]
        for row in gains["students"] if row["pair"]["data"].startswith("emoji")
    ]  # fmt: skip
    ratios = ["times fewer FLOPs", "pair ÷ single", "training FLOPs, pair ÷ single"]
    return format_table(["8 steps", "single-rate student", "distilled pair, K = 2", *ratios], rows)


def write_share(share: dict | None) -> str:
    """A share of prompts in per cent, with its spread where there are several seeds."""
    if share is None:
        return ""
    return f"{100 * share['mean']:.0f}" + ("" if share["std"] is None else f"±{100 * share['std']:.0f}") + " %"


def write_prompts(gains: dict) -> str:
    """The models of text: what they cost and what of them is recognised."""
    rows = []
    for row in gains["prompts"]:
        steps = ""
        if "N" in row:
            steps = f", {SOLVERS.get(row['solver'], row['solver'])}, N = {row['N']}" + (
                f", K = {row['K']}" if row["K"] else ""
            )
        distance = f"{row['fd']['mean']:.1f}" + ("" if row["fd"]["std"] is None else f"±{row['fd']['std']:.1f}")
        shares = [write_share(row["recognised"].get(name)) for name in ("seen", "held_out", "novel")]
        rows.append([row["model"] + steps, f"{row['flops'] / 1e9:.2f}" if "N" in row else "", *shares, distance])
    titles = ["emoji64, from prompts", "GFLOP", "seen", "held out", "never drawn", "distance"]
    return format_table(titles, rows)


def write_ends(gains: dict) -> str:
    """The table of rivals."""
    rows = []
    for end in gains["ends"]:
        for row in [end["pair"], *end["rivals"]]:
            steps = f"{row['N']}" + (f" / {row['K']}" if row["K"] else "")
            budget = "more steps, heavy's FLOPs" if row["budget"] == "flops" else "equal steps"
            rows.append(
                [
                    row["data"],
                    f"`{row['arm']}`",
                    row["solver"],
                    steps,
                    budget,
                    f"{row['flops'] / 1e6:,.0f}",
                    write_distance(row),
                ]
            )
    return format_table(["data", "arm", "solver", "N / K", "training", "MFLOP", "distance"], rows)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tables(gains: dict) -> dict[str, str]:
    """All tables by the names of their markers."""
    writers = {
        "gains": write_gains,
        "time": write_time,
        "needs": write_needs,
        "ends": write_ends,
        "solvers": write_solvers,
        "student": write_student,
        "prompts": write_prompts,
    }
    return {name: write(gains) for name, write in writers.items()}


def main():
    gains = compute(*map(read, (STUDY, TIMING, SIX_STEPS, EARLIER, *EMOJI)))
    GAINS.write_text(json.dumps(gains, indent=1) + "\n", encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, table in write_tables(gains).items():
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            if begin in text:
                text = insert_between(text, begin, end, table)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
