"""The study's table and plot, of a study small enough to solve by hand."""

import json
import math

import pytest
from PIL import Image

from research import report


def make_study(**fds):
    """Points of two arms, at 10 and 1000 and at 100 MFLOP, over the seeds given as lists."""
    points = []
    for arm, n, k, flops, budget, values in (
        ("single-rate", 4, None, 10e6, "steps", fds.get("cheap", [4.0])),
        ("single-rate", 64, None, 1000e6, "steps", fds.get("dear", [2.0])),
        ("dual-rate", 8, 2, 100e6, "steps", fds.get("pair", [2.5])),
        ("dual-rate", 8, 2, 100e6, "flops", fds.get("pair_flops", [3.5])),
        ("dual-rate-no-context", 8, None, 1e6, "steps", [0.1]),
        ("single-rate-sized", 8, None, 500e6, "steps", fds.get("sized", [9.0])),
        ("single-rate-sized", 8, None, 500e6, "flops", fds.get("sized_flops", [9.0])),
    ):
        for seed, value in enumerate(values):
            points.append(
                {"data": "letters", "arm": arm, "budget": budget, "solver": "ddim", "N": n, "K": k, "flops": flops}
                | {
                    "training_flops": 7 if arm == "single-rate" else 3,
                    "training_images": 64,
                    "fd": value,
                    "n": 5000,
                    "seed": seed,
                    "sampling_seed": 0,
                }
            )
    return {"points": points, "floors": {"letters": {"fd": 0.123, "n": 5000}}}


def test_the_heavy_network_belongs_to_both_budgets_and_other_arms_to_their_own():
    study = make_study()
    for budget, ours in (("steps", 2.5), ("flops", 3.5)):
        grouped = report.group(study, "letters", budget)
        assert grouped["single-rate", "ddim", 4, None] == (10e6, [4.0])
        assert grouped["dual-rate", "ddim", 8, 2] == (100e6, [ours])


def test_an_arm_whose_training_cost_what_the_heavy_networks_did_belongs_to_both_budgets():
    study = make_study()
    heavy = next(point for point in study["points"] if point["arm"] == "single-rate")
    study["points"] += [heavy | {"arm": "deepcache", "training_flops": 7.1}]
    study["points"] += [heavy | {"arm": "encoder-sharing", "training_flops": 7.2}]
    for budget, others in (("steps", {"deepcache", "encoder-sharing"}), ("flops", {"deepcache"})):
        found = {key[0] for key in report.group(study, "letters", budget)}
        assert found & {"deepcache", "encoder-sharing"} == others
    study["points"] += [heavy | {"arm": "deepcache", "training_flops": 7.0, "budget": "flops", "fd": 1.5}]
    assert report.group(study, "letters", "flops")["deepcache", "ddim", 4, None] == (10e6, [1.5])


def test_an_arm_that_was_not_trained_at_equal_flops_is_not_held_against_those_that_were():
    study = make_study()
    study["points"] = [p for p in study["points"] if (p["arm"], p["budget"]) != ("single-rate-sized", "flops")]
    assert {key[0] for key in report.group(study, "letters", "flops")} == {"single-rate", "dual-rate"}
    assert report.budgets_with_pairs(study, "letters") == ["steps", "flops"]
    study["points"] = [p for p in study["points"] if p["budget"] == "steps"]
    assert report.budgets_with_pairs(study, "letters") == ["steps"] and "| flops |" not in report.write_table(study)


def test_sampling_seeds_are_averaged_and_training_seeds_are_not():
    study = make_study(pair=[2.5, 3.0])
    again = [point | {"sampling_seed": 1, "fd": point["fd"] + 1} for point in study["points"]]
    grouped = report.group({**study, "points": study["points"] + again}, "letters", "steps")
    assert grouped["dual-rate", "ddim", 8, 2] == (100e6, [3.0, 3.5])


def test_with_one_training_seed_the_spread_is_that_of_the_sampling_seeds():
    study = make_study()
    again = [point | {"sampling_seed": 1, "fd": point["fd"] + 0.2} for point in study["points"]]
    study["points"] += again
    grouped = report.group(study, "letters", "steps")
    assert grouped["dual-rate", "ddim", 8, 2] == (100e6, [2.5, pytest.approx(2.7)])
    (result,) = report.comparisons(study, "letters", "steps").values()
    assert result["margin"] == pytest.approx(2 * math.sqrt(0.02))
    assert "training seed 0; spread and margin are those of the sampling seeds 0, 1." in report.write_table(study)


def test_a_pair_is_held_against_every_arm_but_the_control():
    """At 100 MFLOP the single-rate front is half-way, in logarithms, from 4 to 2, which the control would undercut."""
    (result,) = report.comparisons(make_study(), "letters", "steps").values()
    assert result["front"] == pytest.approx(3.0) and result["verdict"] == "below"
    assert result["needed"] == pytest.approx(10e6 * 100**0.75)
    (result,) = report.comparisons(make_study(), "letters", "flops").values()
    assert result["verdict"] == "above" and result["ratio"] == pytest.approx(10e6 * 100**0.25 / 100e6)
    assert report.comparisons(make_study(), "letters", "steps", ("ancestral",)) == {}
    study = make_study()
    study["points"] += [p | {"arm": "feature-reuse", "fd": 0.1} for p in study["points"] if p["arm"] == "single-rate"]
    (all_arms,), (single_rate,) = (
        report.comparisons(study, "letters", "steps", rival=rival).values()
        for rival in (report.is_rival, report.is_single_rate)
    )
    assert all_arms["verdict"] == "above" and single_rate["verdict"] == "below"


def test_each_arm_is_held_against_the_sized_network_alone():
    assert report.against_sized(make_study(), "letters", "steps") == {}  # none at the pair's FLOPs or below
    for distance, verdict in ((9.0, "below"), (1.0, "above")):
        study = make_study(sized=[distance])
        study["points"] += [p | {"N": 2, "flops": 50e6} for p in study["points"] if p["arm"] == "single-rate-sized"]
        students = [p | {"arm": "dual-rate-mmd", "fd": 0.5} for p in study["points"] if p["arm"] == "dual-rate"]
        study["points"] += students
        assert report.against_sized(study, "letters", "steps") == {
            "dual-rate": {verdict: 1},
            "dual-rate-mmd": {"below": 1},
        }
        counts = "1 / 0 / 0" if verdict == "below" else "0 / 0 / 1"
        sentence = f"`single-rate-sized` alone, equal steps: dual-rate {counts}; dual-rate-mmd 1 / 0 / 0."
        assert sentence in report.write_table(study)


def test_students_do_not_hide_the_best_undistilled_points():
    study = make_study()
    study["points"] += [p | {"arm": "dual-rate-mmd", "fd": 0.5} for p in study["points"] if p["arm"] == "dual-rate"]
    study["points"] += [
        p | {"arm": "dual-rate-mmd-4-steps", "fd": 0.6} for p in study["points"] if p["arm"] == "dual-rate"
    ]
    for arm in ("dual-rate", "dual-rate-mmd", "dual-rate-mmd-4-steps"):
        assert f"| steps | {arm} ddim 8/2 |" in report.write_table(study)


def test_an_arm_that_was_trained_for_longer_than_the_heavy_network_is_not_called_equal():
    study = make_study()
    assert report.training_of(study, "letters", "dual-rate", "steps") == "steps"
    for point in study["points"]:
        if point["arm"] == "dual-rate":
            point |= {"training_images": 65, "training_flops": 14}
    assert report.training_of(study, "letters", "dual-rate", "steps") == "more, 2.00 × FLOPs"
    table = report.write_table(study)
    assert "| steps | dual-rate " not in table and "| more, 2.00 × FLOPs | dual-rate " in table
    assert "dual-rate (training: more, 2.00 × FLOPs) at 1 of 1 points" in report.write_points(study)


def test_arms_that_were_left_out_and_a_study_at_equal_flops_alone_are_told():
    study = make_study() | {"left_out": ["digits/dual-rate", "letters/deepcache", "letters/dual-rate/flops"]}
    assert "Left out here: deepcache; dual-rate at equal flops." in report.write_points(study)
    assert "Left out here: all at equal flops." in report.write_points(study | {"left_out": ["letters/flops"]})
    study["points"] = [p for p in study["points"] if p["budget"] == "flops"]
    assert "### Equal training flops" in report.write_points(study)


def test_the_table_says_what_the_comparison_found():
    table = report.write_table(make_study())
    ratio = 10e6 * 100**0.75 / 100e6
    cells = f"dual-rate ddim 8/2 | {{}}100 | 2.500 | 3.000 |  | {316.2:.0f} | {ratio:.2f} | below |"
    assert f"| steps | {cells.format('')}" in table.splitlines()
    assert "`fd_local` of 5,000 images, floor 0.123" in table and "sign alone decides" in table
    points = report.write_points(make_study())
    assert f"| {cells.format('1 | ')} 316 | below |  |  |" in points.splitlines()
    assert "Front, fd @ MFLOP: single-rate ddim 4 4.000 @ 10; single-rate ddim 64 2.000 @ 1000." in points
    seeds = report.write_table(make_study(pair=[2.4, 2.6], cheap=[4.0, 4.0], dear=[2.0, 2.0]))
    # Variances .02, 0 and 0 with one degree each; the margin is two deviations.
    margin = 2 * math.sqrt(0.02 / 3)
    assert f"| 2.500 ± {math.sqrt(0.02):.3f} | 3.000 | {margin:.3f} |" in seeds and "training seeds 0, 1" in seeds
    alone = report.write_table(make_study(cheap=[4.0, 4.2], dear=[2.0, 2.0]))
    assert f"| 2.500 | 3.050 | {2 * math.sqrt(0.02 / 2):.3f} |" in alone  # its rivals' spread is not its own


def test_a_point_cheaper_than_all_others_is_said_to_be_so():
    study = make_study()
    study["points"] = [p for p in study["points"] if p["flops"] != 10e6]
    assert "| 100 | 2.500 |  |  |" in report.write_table(study) and "| none so cheap |" in report.write_table(study)


def test_the_table_says_what_the_trainings_cost_and_which_arms_have_fewer_seeds():
    table = report.write_points(make_study(cheap=[4.0, 4.1], dear=[2.0, 2.1]))
    assert "against `single-rate`: single-rate 1.00; dual-rate 0.43;" in table
    assert "Fewer training seeds: dual-rate 0; dual-rate-no-context 0; single-rate-sized 0." in table
    assert "Fewer training seeds" not in report.write_points(make_study())


def test_a_distance_that_no_other_arm_reaches_is_said_to_be_never_reached():
    assert "| never reached |  | below |" in report.write_table(make_study(pair=[1.0]))


def test_the_table_takes_its_place_between_the_markers_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    for _ in range(2):
        report.insert("new", page)
        assert page.read_text() == f"before\n{report.MARKERS[0]}\n\nnew\n\n{report.MARKERS[1]}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        report.insert("new", page)


@pytest.mark.slow
def test_the_plot_is_drawn_from_the_json_alone(tmp_path):
    study = json.loads(json.dumps(make_study(pair=[2.4, 2.6])))
    report.plot(study, tmp_path / "study.png")
    report.plot({**study, "points": study["points"][:1]}, tmp_path / "one.png")  # nothing trained at equal FLOPs
    report.plot({**study, "points": [p for p in study["points"] if p["arm"] == "dual-rate"][:1]}, tmp_path / "one.png")
    assert len(Image.open(tmp_path / "study.png").convert("L").getcolors(1 << 16)) > 10
