"""Charts of the study, one a question, for the documentation and the README.

    python -m research.charts

Each line is the lower envelope of one method: its configurations that no cheaper one of its own equals, at equal training
steps. Everything is read from `study.json`.
"""

import json
from pathlib import Path
from statistics import fmean, stdev

from .front import undominated
from .gains import STUDY, collect

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DATA = ("emoji32", "digits", "letters")
ANCESTRAL, DETERMINISTIC, SECOND = ("ancestral",), ("dpmsolver++",), ("sde-dpmsolver++",)
DDIM = ("ddim",)
ALL = (*ANCESTRAL, *DDIM, *DETERMINISTIC, *SECOND)

CHARTS = {  # file: lines as (label, arm, solvers)
    "solvers": [
        ("heavy network, ancestral", "single-rate", ANCESTRAL),
        ("DDIM", "single-rate", DDIM),
        ("DPM-Solver++", "single-rate", DETERMINISTIC),
        ("second-order ancestral", "single-rate", SECOND),
    ],
    "paper-setting": [
        ("heavy network, ancestral", "single-rate", ANCESTRAL),
        ("pair, ancestral", "dual-rate", ANCESTRAL),
        ("light network, ancestral", "single-rate-light", ANCESTRAL),
    ],
    "findings": [
        ("heavy network, ancestral", "single-rate", ANCESTRAL),
        ("heavy network, best solver", "single-rate", ALL),
        ("pair, best solver", "dual-rate", ALL),
        ("T-Stitch, best solver", "stitching", ALL),
        ("plain U-Net, best solver", "deepcache", ALL),
    ],
    "trainings": [
        ("pair (windows)", "dual-rate", ALL),
        ("half of the contexts fresh", "dual-rate-half-fresh", ALL),
        ("half of the rows without context", "dual-rate-context-dropout", ALL),
        ("converted from a trained network", "dual-rate-converted", ALL),
        ("always fresh (DDT)", "encoder-sharing", ALL),
    ],
    "students": [
        ("heavy network, best solver", "single-rate", ALL),
        ("pair, best solver", "dual-rate", ALL),
        ("distilled heavy network", "single-rate-mmd", ALL),
        ("distilled pair", "dual-rate-mmd", ALL),
        ("distilled pair (half fresh)", "dual-rate-half-fresh-mmd", ALL),
        ("distilled pair, 2 steps", "dual-rate-mmd-2-steps", ALL),
    ],
}


def envelope(points: dict, data: str, arm: str, solvers: tuple[str, ...]) -> list[tuple[float, float, float]]:
    """MFLOP, mean distance and its deviation of the configurations that no cheaper one of the arm equals."""
    found = {}
    for key, seeds in points.items():
        if key[:3] == (data, arm, "steps") and key[3] in solvers:
            # DeepCache's package reuses features where K is below N; with K = N it is the plain U-Net.
            if arm == "deepcache" and key[4] != key[5]:
                continue
            fds = [point["fd"] for point in seeds.values()]
            flops = next(iter(seeds.values()))["flops"]
            found[flops, fmean(fds)] = stdev(fds) if len(fds) > 1 else 0
    return [(flops / 1e6, fd, found[flops, fd]) for flops, fd in undominated(list(found))]


def draw(points: dict, name: str, floors: dict) -> None:
    """One chart: a panel for each data set."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    datas = [data for data in DATA if name != "students" or data != "emoji32"]  # no student was run there
    figure, axes = plt.subplots(1, len(datas), figsize=(4 * len(datas), 3.4), layout="constrained", squeeze=False)
    for axis, data in zip(axes.flat, datas, strict=True):
        for i, (label, arm, solvers) in enumerate(CHARTS[name]):
            if line := envelope(points, data, arm, solvers):
                flops, fds, spread = zip(*line, strict=True)
                axis.errorbar(
                    flops, fds, yerr=spread, label=label, color=f"C{i}", marker="osD^v*"[i], markersize=4, capsize=2
                )
        axis.axhline(floors[data]["fd"], color="grey", linestyle=":", label="real images")
        axis.set(title=data, xscale="log", yscale="log", xlabel="MFLOP per image")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(lambda value, _: f"{value:g}")
            side.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("distance (lower is better)")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(IMAGES / f"{name}.png", dpi=80, metadata={"Software": None})
    plt.close(figure)


def main():
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in CHARTS:
        draw(collect(study), name, study["floors"])


if __name__ == "__main__":
    main()
