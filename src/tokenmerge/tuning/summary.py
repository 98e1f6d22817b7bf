"""What was found, in figures, tables and a sentence, on images that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmerge.methods import ToMe
from tokenmerge.tuning.clock import Clock
from tokenmerge.tuning.decide import Decision
from tokenmerge.tuning.losses import interval, loss_of
from tokenmerge.tuning.result import Front, FrontRow, Tried, TriedRow, Tuning
from tokenmerge.tuning.search import FRONT, Candidate, Search
from tokenmerge.tuning.shapes import CONSTANT, fit
from tokenmerge.tuning.subject import Outcome, Subject
from tokenmerge.tuning.target import Target

__all__ = ["summarise"]

_SLOWER = (
    "The configuration is SLOWER than the unmerged model on this machine: do not use it here. Ask for a speed (1.5x), "
    "or time larger batches (tokenmerge bench)."
)


def summarise(subject: Subject, clock: Clock, search: Search, targets: Sequence[Target], decision: Decision) -> Tuning:
    """Measure the decision on the images for the report, beside the constant schedule of equal MACs; draw the front."""
    chosen, share = decision.candidate, decision.share
    found = search.outcome(chosen, share, "report")
    r, constant = _constant(subject, subject.share(found.config.r))
    none = subject.outcome(subject.config(chosen.method, [0] * subject.depth), "report")
    figures = _figures(subject, clock, decision, found, constant, none)
    # what cannot be reached is said once, with the figure where one was measured
    missed = [one for one in decision.missed if not any(o != one and o.startswith(one) for o in decision.missed)]
    slow = [_SLOWER] if decision.share < 1 and decision.timed.speed_up < 1 - decision.timed.noise else []
    known = [*slow, *_remarks(subject, found, none), *clock.remarks]
    remarks = [*(f"{one}." for one in dict.fromkeys(missed)), *dict.fromkeys(known)]
    rows = _front(subject, clock, search, decision)
    tried = [_tried(subject, key, outcome) for key, outcome in subject.outcomes.items()]
    report = _sentence(figures, decision, r, targets)
    return Tuning(
        found.config,
        Front(rows, clock.environment),
        Tried(tried, clock.environment),
        decision.reached,
        report,
        figures,
        remarks,
    )


def _constant(subject: Subject, share: float) -> tuple[int, Outcome | None]:
    """Return the smallest constant r of ToMe with no more MACs than a share, and its outcome; None if none is."""
    if not subject.accepts(ToMe()):
        return 0, None
    low, high = 0, subject.cost.tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if subject.share([middle] * subject.depth) <= share else (middle + 1, high)
    r = [low] * subject.depth
    return low, subject.outcome(subject.config(ToMe(), r), "report") if subject.share(r) <= share else None


def _figures(
    subject: Subject, clock: Clock, decision: Decision, found: Outcome, constant: Outcome | None, none: Outcome
) -> dict[str, Any]:
    """Return the figures of the configuration by name, as they are saved with it."""
    timed = decision.timed
    figures: dict[str, Any] = {
        "speed-up": round(timed.speed_up, 3),
        "ms": round(1000 * timed.seconds, 4),
        "unmerged ms": round(1000 * timed.unmerged, 4),
        "noise %": round(100 * timed.noise, 2),
        "MACs share": round(subject.share(found.config.r), 4),
        "damage": float(f"{found.mean:.4g}"),
    }
    if constant is not None:
        figures["damage of constant r"] = float(f"{constant.mean:.4g}")
    if found.same:
        low, high = interval(sum(found.same), len(found.same))
        figures["agreement %"] = round(100 * sum(found.same) / len(found.same), 2)
        figures["agreement % from"], figures["agreement % to"] = round(low, 2), round(high, 2)
        if constant is not None:
            figures["agreement % of constant r"] = round(100 * sum(constant.same) / len(constant.same), 2)
    if subject.parts.has_labels:
        loss = loss_of("drop", [none], [found], len(found.hits))
        figures["top-1 %"] = round(100 * sum(found.hits) / len(found.hits), 2)
        figures["unmerged top-1 %"] = round(100 * sum(none.hits) / len(none.hits), 2)
        figures["drop ±"] = round(loss.error, 2)
    about = {"images": len(subject.parts.report), "batch size": clock.batch_size, "compiled": clock.is_compiled}
    return {**figures, **about, "dtype": clock.dtype, "environment": clock.environment}


def _sentence(figures: dict[str, Any], decision: Decision, r: int, targets: Sequence[Target]) -> str:
    speed = figures["speed-up"]
    word = f"{speed:.2f}x faster" if speed >= 1 else f"SLOWER, {speed:.2f}x"
    word = word if decision.share < 1 else "nothing is merged"  # a difference in time is noise
    times = f"{figures['ms']:.4g} ms instead of {figures['unmerged ms']:.4g}, batch {figures['batch size']}"
    parts = [f"{word} ({times})"]
    plain = ""
    if "agreement %" in figures:
        ends = f"{figures['agreement % from']:.1f} to {figures['agreement % to']:.1f}"
        parts.append(f"agreement {figures['agreement %']:.1f} % ({ends})")
        if "agreement % of constant r" in figures:
            plain = f"an agreement of {figures['agreement % of constant r']:.1f} %"
    else:
        parts.append(f"answers differ by {100 * figures['damage']:.3g} % (squared)")
        if "damage of constant r" in figures:
            plain = f"a difference of {100 * figures['damage of constant r']:.3g} %"
    if "top-1 %" in figures:
        parts.append(f"top-1 {figures['top-1 %']:.1f} % (unmerged {figures['unmerged top-1 %']:.1f} %)")
    parts.append(f"{100 * figures['MACs share']:.0f} % of the MACs")
    asked = " ".join(map(str, targets))
    opening = "" if decision.reached else f"NOT REACHED: {asked}. The nearest: "
    return opening + ", ".join(parts) + (f"; constant r = {r} of tome would give {plain}" if plain else "") + "."


def _remarks(subject: Subject, found: Outcome, none: Outcome) -> list[str]:
    """Return what to know of the figures: how sure they are, what was left out."""
    remarks = [subject.parts.note] if subject.parts.note else []
    if subject.parts.corrupt:
        lost = subject.parts.corrupt
        remarks.append(f"{len(lost)} images could not be read and were left out, the first: {lost[0]}.")
    if subject.parts.has_labels and sum(none.hits) * subject.parts.report.outputs <= len(none.hits):
        remarks.append(
            f"The unmerged model is right on {sum(none.hits)} of {len(none.hits)} images, no better than chance: are "
            "its classes numbered as the labels are? Until then accuracies and a drop say nothing."
        )
    if subject.parts.copies:
        remarks.append(
            f"{subject.parts.copies} images are copies of others: the report may count on images that were searched on."
        )
    n = len(found.damage)
    error = found.damage.std().item() / n**0.5
    if error > 0.1 * found.mean:
        remarks.append(f"Few images: on {n}, the damage is known to ± {100 * error / found.mean:.0f} % of itself.")
    if found.same:
        low, high = interval(sum(found.same), n)
        if high - low > 2:
            half = (high - low) / 2
            remarks.append(f"Too few images for tenths: on {n}, the agreement is known to ± {half:.1f} points.")
    return remarks


def _front(subject: Subject, clock: Clock, search: Search, decision: Decision) -> list[FrontRow]:
    """Return the unmerged model, the best of the known candidates at several shares, and constant ToMe beside them."""
    depth, part = subject.depth, "select"
    constant = Candidate(ToMe(), (1.0,) * depth, CONSTANT)
    rows = [_row(clock, subject.outcome(subject.config(decision.candidate.method, [0] * depth), part), "unmerged")]
    found = []
    for share in sorted({*FRONT, decision.share}, reverse=True):
        if subject.share(fit(subject, (1.0,) * depth, share)) > share or share >= 1:
            continue
        # what was only solved for one share stands for others as what is solved for them
        known = [decision.candidate] if search.goes_on or share == decision.share else []
        known += search.solved(share) if share != decision.share else []
        best = min((search.outcome(one, share, part) for one in dict.fromkeys(known)), key=lambda one: one.mean)
        timed = decision.timed.speed_up if share == decision.share else None
        found.append((best, _row(clock, best, "chosen" if share == decision.share else "", timed)))
        if subject.accepts(ToMe()):
            rows.append(_row(clock, search.outcome(constant, share, part), "constant r of tome"))
    for outcome, row in {id(outcome): (outcome, row) for outcome, row in found}.values():
        is_beaten = any(o.mean < outcome.mean and x["MACs share"] <= row["MACs share"] for o, x in found)
        if not is_beaten or row["note"]:
            rows.append(row)
    return sorted(rows, key=lambda row: (-row["MACs share"], row["note"]))


def _row(clock: Clock, outcome: Outcome, note: str, speed: float | None = None) -> FrontRow:
    subject, r = clock.subject, outcome.config.r
    same, hits = outcome.same, outcome.hits
    return FrontRow(
        {
            "method": repr(outcome.config.method),
            "r": str(r),
            "MACs share": round(subject.share(r), 4),
            "damage": float(f"{outcome.mean:.4g}"),
            "agreement %": round(100 * sum(same) / len(same), 2) if same else None,
            "top-1 %": round(100 * sum(hits) / len(hits), 2) if hits and subject.parts.has_labels else None,
            "speed-up": None if speed is None else round(speed, 3),
            "speed-up est.": round(clock.estimated(subject.share(r)), 3),
            "tokens": subject.tokens(r),
            "note": note,
        }
    )


def _tried(subject: Subject, key: str, outcome: Outcome) -> TriedRow:
    r = outcome.config.r
    return TriedRow(
        {
            "split": key.partition(" ")[0],
            "method": repr(outcome.config.method),
            "r": str(r),
            "MACs share": round(subject.share(r), 4),
            "damage": float(f"{outcome.mean:.4g}"),
        }
    )
