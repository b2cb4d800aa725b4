"""The front of quality against compute, and where a method lies relative to it.

A point is (FLOPs per image, Fréchet distance); both are better when smaller. The front of some points are those that no
other one equals or beats in both, joined linearly in (log FLOPs, distance); what lies between two of them is a
convention, which nobody measured. Pure functions of numbers.
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance

Point = tuple[float, float]


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that no other one equals or beats in both respects, from cheap to dear and so from bad to good."""
    front = []
    for flops, distance in sorted(points):
        if not front or distance < front[-1][1]:
            front.append((flops, distance))
    return front


def distance_at(front: Sequence[Point], flops: float) -> float:
    """What the front reaches for some FLOPs: infinity below its cheapest point, its best beyond its dearest."""
    if flops < front[0][0]:
        return math.inf
    for (left, high), (right, low) in zip(front, front[1:], strict=False):
        if flops < right:
            return high + (low - high) * math.log(flops / left) / math.log(right / left)
    return front[-1][1]


def flops_at(front: Sequence[Point], distance: float) -> float:
    """What the front needs to reach a distance: its cheapest point's FLOPs at most, infinity where it never does."""
    if distance >= front[0][1]:
        return front[0][0]
    for (left, high), (right, low) in zip(front, front[1:], strict=False):
        if distance >= low:
            return left * (right / left) ** ((high - distance) / (high - low))
    return math.inf


def pooled_deviation(samples: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within samples, pooled over them; `None` where no sample has two values."""
    repeated = [sample for sample in samples if len(sample) > 1]
    if not repeated:
        return None
    degrees = [len(sample) - 1 for sample in repeated]
    return math.sqrt(sum(d * variance(s) for d, s in zip(degrees, repeated, strict=True)) / sum(degrees))


def neighbours(front: Sequence[Point], flops: float) -> list[Point]:
    """The one or two points that decide what the front reaches for some FLOPs."""
    cheaper = [point for point in front if point[0] <= flops]
    dearer = [point for point in front if point[0] > flops]
    return [*cheaper[-1:], *(dearer[:1] if cheaper else [])]


def compare(candidate: tuple[float, Sequence[float]], rivals: Sequence[tuple[float, Sequence[float]]]) -> dict:
    """Hold one point against the front of others.

    Args:
        candidate: FLOPs, and the distance of every seed.
        rivals: The same of every point of every other method.

    Returns:
        `distance`, its mean; `front`, what the rivals reach for its FLOPs, by their means; `needed`, the FLOPs that they
        need for its distance, and `ratio`, those over its own; `margin`, twice the standard deviation over seeds, pooled over the point and those of
        the front that it is held against, `None` with one seed; `verdict`: "below" the front by more than the margin,
        "above" it by more, or "matches"; without a margin the sign alone decides. Below the cheapest rival nothing is compared and the verdict is "matches".
    """
    flops, distances = candidate
    means = {}
    for rival_flops, rival_distances in rivals:
        means.setdefault((rival_flops, fmean(rival_distances)), rival_distances)
    front = undominated(list(means))
    distance, reached, needed = fmean(distances), distance_at(front, flops), flops_at(front, fmean(distances))
    deviation = pooled_deviation([distances, *(means[point] for point in neighbours(front, flops))])
    margin, gap = None if deviation is None else 2 * deviation, distance - reached
    verdict = "matches"
    if math.isfinite(reached) and abs(gap) > (margin or 0):
        verdict = "below" if gap < 0 else "above"
    return {
        "distance": distance,
        "front": reached,
        "needed": needed,
        "ratio": needed / flops,
        "margin": margin,
        "verdict": verdict,
    }
