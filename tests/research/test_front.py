"""The front and the comparison with it, on cases small enough to solve by hand."""

import itertools
import math
import random

import pytest

from research.front import compare, distance_at, flops_at, neighbours, pooled_deviation, undominated

FRONT = [(10, 4.0), (100, 2.0), (1000, 1.5)]


def test_the_front_is_what_a_comparison_of_all_pairs_leaves():
    rng = random.Random(0)
    points = [(rng.randrange(1, 9), rng.randrange(1, 9)) for _ in range(40)]
    for size in (1, 2, 5, 40):
        some = points[:size]
        beaten = {p for p, q in itertools.product(some, some) if q != p and q[0] <= p[0] and q[1] <= p[1]}
        assert undominated(some) == sorted(set(some) - beaten)


@pytest.mark.parametrize(
    ("flops", "distance"),
    [
        (9.9, math.inf),
        (10, 4.0),
        (10 * math.sqrt(10), 3.0),
        (100, 2.0),
        (100 * 10**0.25, 1.875),
        (1000, 1.5),
        (1e6, 1.5),
    ],
)
def test_between_its_points_the_front_is_straight_in_the_logarithm_of_flops(flops, distance):
    assert distance_at(FRONT, flops) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("distance", "flops"),
    [
        (9.0, 10),
        (4.0, 10),
        (3.0, 10 * math.sqrt(10)),
        (2.0, 100),
        (1.75, 100 * math.sqrt(10)),
        (1.5, 1000),
        (1.4, math.inf),
    ],
)
def test_the_flops_that_the_front_needs_invert_what_it_reaches(distance, flops):
    assert flops_at(FRONT, distance) == pytest.approx(flops)


def test_the_pooled_deviation_weighs_variances_by_their_degrees_of_freedom():
    # Variances 2 (one degree) and 1 (two degrees): (2 + 2) / 3.
    assert pooled_deviation([[1, 3], [4, 5, 6], [7]]) == pytest.approx(math.sqrt(4 / 3))
    assert pooled_deviation([[1], [2]]) is None


def test_the_neighbours_are_the_points_that_decide():
    assert neighbours(FRONT, 50) == FRONT[:2]
    assert neighbours(FRONT, 100) == FRONT[1:]
    assert neighbours(FRONT, 5000) == FRONT[2:]
    assert neighbours(FRONT, 5) == []


def seeds(mean, spread):
    return [mean - spread, mean, mean + spread]


def test_a_point_counts_where_it_lies_below_the_front_by_more_than_twice_the_pooled_deviation():
    rivals = [(10, seeds(4.0, 0.1)), (100, seeds(2.0, 0.1)), (50, seeds(9.0, 5.0))]  # the last is dominated
    middle = 10 * math.sqrt(10)  # where the front reaches 3.0; every sample's deviation is 0.1, so the margin is 0.2
    for mean, verdict in ((2.79, "below"), (2.81, "matches"), (3.19, "matches"), (3.21, "above")):
        result = compare((middle, seeds(mean, 0.1)), rivals)
        assert result["verdict"] == verdict
        assert result["margin"] == pytest.approx(0.2) and result["front"] == pytest.approx(3.0)
        assert result["distance"] == pytest.approx(mean)
    # Distance 2.5 takes the rivals three quarters of the way from 10 to 100.
    result = compare((middle, seeds(2.5, 0.1)), rivals)
    assert result["needed"] == pytest.approx(10**1.75) and result["ratio"] == pytest.approx(10**0.25)


def test_with_one_seed_there_is_no_margin_and_the_sign_decides():
    result = compare((100, [1.99]), [(10, [4.0]), (100, [2.0])])
    assert result["margin"] is None and result["verdict"] == "below" and result["ratio"] == math.inf


def test_below_the_cheapest_rival_nothing_is_claimed():
    result = compare((5, [1.0]), [(10, [4.0])])
    assert result["verdict"] == "matches" and result["front"] == math.inf
