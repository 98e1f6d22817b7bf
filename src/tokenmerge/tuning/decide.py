"""Which share of the MACs, and which candidate at it: several targets against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmerge.methods import ToMe
from tokenmerge.tuning.clock import Timed
from tokenmerge.tuning.goals import Goals
from tokenmerge.tuning.losses import least_images
from tokenmerge.tuning.search import Candidate
from tokenmerge.tuning.shapes import CONSTANT
from tokenmerge.tuning.target import Target

__all__ = ["Decision", "decide"]

_FINALISTS = 3  # of the search, beside constant schedules


@dataclass(frozen=True)
class Decision:
    """The chosen candidate at a share of the MACs, its timing, and in words what cannot be had."""

    candidate: Candidate
    share: float
    timed: Timed
    reached: bool
    missed: tuple[str, ...] = ()


def decide(goals: Goals, targets: Sequence[Target]) -> Decision:
    """Choose the candidate that meets the targets: the fastest within a loss, or the least damage at a cost."""
    if any(t.kind not in ("macs", "memory") for t in targets):
        goals.weigh_time()
    start = goals.search.start
    costs, losses = [t for t in targets if t.is_cost], [t for t in targets if not t.is_cost]
    most = {t: goals.most(t, start) for t in costs}
    missed = tuple(f"{t} cannot be reached{goals.nearest(t, start)}" for t, share in most.items() if share is None)
    share = min((goals.lowest if s is None else s for s in most.values()), default=1.0)
    if not losses:
        return _at(goals, costs, share, missed)
    least = {t: goals.least(t, start) for t in losses}
    alone = "is kept by the unmerged model alone"
    missed += tuple(f"{t} {alone}{_too_few(goals, t)}" for t, s in least.items() if s is None)
    floor = max(1.0 if s is None else s for s in least.values())
    chosen = _chosen(goals, floor)
    if chosen != start:  # a better one may lose more tokens
        again = [goals.least(t, chosen) for t in losses]
        floor = min(floor, max(1.0 if s is None else s for s in again))
    if floor <= share:
        found = _timed(goals, costs, chosen, floor, missed, is_met=False)
        is_met = found.reached and not _short(goals, costs, found)
        return found if is_met or not costs else _both(goals, costs, losses, found, share)
    return _both(goals, costs, losses, _timed(goals, [], chosen, floor, missed, is_met=False), share)


def _at(goals: Goals, costs: Sequence[Target], share: float, missed: tuple[str, ...]) -> Decision:
    return _timed(goals, costs, _chosen(goals, share), share, missed, is_met=True)


def _chosen(goals: Goals, share: float) -> Candidate:
    """Return the best finalist of the search on the images to select on."""
    search, subject = goals.search, goals.subject
    constant = [Candidate(m, (1.0,) * subject.depth, CONSTANT) for m in (search.start.method, ToMe())]
    finalists = [*search.best(share)[:_FINALISTS], *(one for one in constant if subject.accepts(one.method))]
    return min(dict.fromkeys(finalists), key=lambda one: search.outcome(one, share, "select").mean)


def _timed(
    goals: Goals, costs: Sequence[Target], chosen: Candidate, share: float, missed: tuple[str, ...], *, is_met: bool
) -> Decision:
    clocked = [t for t in costs if t.kind in ("speed", "ms")] if is_met else []
    others = [goals.most(t, goals.search.start) for t in costs if t not in clocked] if is_met else []
    cap = min((goals.lowest if s is None else s for s in others), default=1.0)  # a speed that is met early ends here
    share, timed = goals.met(clocked, chosen, share, cap)
    found = Decision(chosen, share, timed, not missed, missed)
    short = _short(goals, costs, found) if is_met else ()
    return Decision(chosen, share, timed, not (missed or short), missed + short)


def _short(goals: Goals, costs: Sequence[Target], found: Decision) -> tuple[str, ...]:
    """Return what the timing says against targets of speed."""
    wanted = {t: goals.speed(t, found.candidate) for t in costs if t.kind in ("speed", "ms")}
    return tuple(
        f"{t} cannot be reached: the fastest measured is {found.timed.speed_up:.2f}x "
        f"({1000 * found.timed.seconds:.3g} ms)"
        for t, speed in wanted.items()
        if found.timed.speed_up < speed
    )


def _too_few(goals: Goals, loss: Target) -> str:
    """Say how many images a loss needs, if there are fewer."""
    parts, needed = goals.subject.parts, least_images(loss.points)
    there = sum(len(part) for part in (parts.search, parts.select, parts.report))
    if needed == math.inf:
        return ": no number of images proves that nothing is lost, so ask for a little"
    if there >= needed:
        return ""
    return f": it needs at least {needed} images, and there are {there}, too few even where no answer changes"


def _both(goals: Goals, costs: Sequence[Target], losses: Sequence[Target], safe: Decision, share: float) -> Decision:
    """Return what keeps the losses, with what the costs alone would have lost."""
    other = _at(goals, costs, share, ())
    lost = " and ".join(
        f"{goals.loss(t, other.candidate, other.share).points:.2f} points of "
        f"{'accuracy' if t.kind == 'drop' else 'agreement'}"
        for t in losses
    )
    asked, kept = " ".join(map(str, costs)), " ".join(map(str, losses))
    within = f"{safe.timed.speed_up:.2f}x with {100 * safe.share:.0f} % of the MACs"
    within = within if safe.share < 1 else "the unmerged model"
    text = (
        f"{asked} and {kept} cannot be had together: within {kept} it is {within}; for {asked} "
        f"({other.timed.speed_up:.2f}x, {100 * other.share:.0f} % of the MACs) it loses {lost}"
    )
    return Decision(safe.candidate, safe.share, safe.timed, False, (*safe.missed, *other.missed, text))
