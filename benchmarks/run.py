"""Measure the cases of the registry, all variants of a case in one interleaved run, or two commits in turn."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# silences kineto's messages on stderr; torch reads it on import
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import registry
from benchmarks.registry import Case, ModelCase, OpCase
from benchmarks.worker import Worker, alternate, checked_out, describe, install, repeats

import tokenmerge
from tokenmerge import kernels
from tokenmerge.errors import TokenMergeError, UnsupportedError
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave, peak_memory, training_memory
from tokenmerge.report.progress import Progress
from tokenmerge.report.table import save_rows, show
from tokenmerge.tools.bench import bench

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the requested cases; return the exit code, 2 for a user error."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.base and arguments.kernels:
        parser.error("--kernels is for one tree: an older commit may choose in another way. Leave it out with --base.")
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be at least 1.")
    torch.set_num_threads(arguments.threads)
    try:
        cases = registry.choose(arguments.cases, arguments.group)
        if arguments.list:
            print("\n".join(f"{case.name}  {_bars(case)}" for case in cases))
        elif arguments.base:
            compare(cases, arguments.base, rounds=arguments.rounds, threads=arguments.threads, out=arguments.out)
        else:
            # a selection of cases, or a forced kernel, does not replace the rows of a group
            out = arguments.out or (None if arguments.cases or arguments.kernels else RESULTS)
            with kernels.force(arguments.kernels) if arguments.kernels else nullcontext():
                forced = arguments.kernels or os.environ.get("TOKENMERGE_KERNELS") or "chosen"
                measure(cases, rounds=arguments.rounds, out=out, about={"kernels": forced})
    except TokenMergeError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these, by name")
    what.add_argument("--group", help=", ".join(registry.GROUPS))
    parser.add_argument("--list", action="store_true", help="print the names of the cases and their bars")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per case (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (%(default)s)")
    parser.add_argument("--kernels", metavar="NAME", help="force this implementation where `reference` is not named")
    parser.add_argument("--base", metavar="REF", help="time this commit and the working tree in turn")
    parser.add_argument(
        "--out", type=Path, help="folder for GROUP.csv and GROUP.md; benchmarks/results for whole groups, else none"
    )
    return parser


def measure(cases: Sequence[Case], *, rounds: int, out: Path | None, about: dict[str, str] | None = None) -> None:
    """Measure cases; show a table per group and write it to `out` as soon as it is complete."""
    for group in dict.fromkeys(case.group for case in cases):
        rows, notes, seen = [], ["What the columns mean: docs/benchmarks.md."], {"device": "none"}
        for case in (case for case in cases if case.group == group):
            if absent := _absent(case):
                rows.append(_unmeasured(case))
                notes = [f"Not measured: {absent}."]
                continue
            row, seen = measure_case(case, rounds)
            rows.append(row)
        _finish(rows, group, {**seen, "commit": describe(ROOT), **(about or {})}, notes, out)


def measure_case(case: Case, rounds: int, *, others: bool = False) -> tuple[Row, dict[str, str]]:
    """Measure a case with the selected or forced kernels; return its judged row and the environment.

    With `others`, an operation is also timed with every other version that takes its input, in the same rounds.
    """
    with Progress(case.name) as progress:
        if others and _kind(case) == "op":
            row, seen = _operation(case, rounds, progress, others=True)
        else:
            row, seen = _MEASURES[_kind(case)](case, rounds, progress)
    return {"case": case.name, **row, **judge(case, row)}, seen


def judge(case: Case, row: Row) -> Row:
    """Return the limits of a case and whether its row meets them; a miss smaller than the spread is marked so."""
    noise = (row.get("spread %") or 0.0) / 100
    verdicts = []
    for bar in case.bars:
        figure = row[bar.column]
        slack = bar.value * (noise if bar.sign == "<=" else -noise)
        met = "yes" if bar.is_met(figure) else "within spread" if bar.is_met(figure - slack) else "NO"
        verdicts.append(met)
    worst = next((verdict for verdict in ("NO", "within spread", "yes") if verdict in verdicts), "no bar")
    return {"bars": _bars(case), "met": worst}


def compare(cases: Sequence[Case], ref: str, *, rounds: int, threads: int, out: Path | None, root: Path = ROOT) -> None:
    """Time a commit and the working tree in turn and show `base / this`; above 1 the working tree is faster."""
    rows = []
    with checked_out(root, ref) as tree, tempfile.TemporaryDirectory() as folder:
        about = {"base": describe(tree), "this": describe(root), **environment(torch.device(_device(cases)))}
        folders = [install(source, Path(folder, name)) for source, name in ((tree, "base"), (root, "this"))]
        with Worker(folders[0], threads=threads) as base, Worker(folders[1], threads=threads) as this:
            for case in cases:
                print(f"{case.name} ...", file=sys.stderr, flush=True)
                rows.append({"case": case.name, **_ratio(base, this, case, rounds)})
    notes = ["`base / this` is the median over rounds, above 1 where this tree is faster; `spread %` that ratio's."]
    _finish(rows, "against-base", {**about, "threads": str(threads), "rounds": str(rounds)}, notes, out)


def _ratio(base: Worker, this: Worker, case: Case, rounds: int) -> Row:
    figures: Row = dict.fromkeys(("base ms", "this ms", "base / this", "spread %"))
    if _absent(case):
        return {**figures, "not measured": _absent(case)}
    try:
        of_base, of_this = alternate(base, this, case, rounds=rounds)
    except UnsupportedError as error:
        return {**figures, "not measured": str(error)}
    ratios = [b / t for b, t in zip(of_base.seconds, of_this.seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    figures["base ms"], figures["this ms"] = _ms(of_base.median), _ms(of_this.median)
    figures["base / this"] = round(of_base.over(of_this), 3)
    figures["spread %"] = round((high - low) / 2 / statistics.median(ratios) * 100, 1)
    return {**figures, "not measured": ""}


def _model(case: Any, rounds: int, progress: Progress) -> tuple[Row, dict[str, str]]:
    found = bench(
        registry.build_model(case),
        rs=[case.r],
        batches=[case.batch],
        device=case.device,
        dtype=case.dtype,
        compiled=case.compiled,
        rounds=rounds,
        input_size=(3, case.side, case.side),
        compare=True,
        label=case.model,
        progress=progress,
    )
    return found.rows[0], found.environment


def _operation(case: Any, rounds: int, progress: Progress, others: bool = False) -> tuple[Row, dict[str, str]]:
    run, given = registry.operation(case), registry.arguments(case)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels.reference, case.op))
    variants: dict[str, Callable[..., Any]] = {"ours": run, "reference": _reference(run), "compiled": compiled}
    calls: dict[str, Callable[[], Any]] = {name: _bind(variant, given) for name, variant in variants.items()}
    if case.op == "attend":
        calls["no bias"] = lambda: F.scaled_dot_product_attention(*given[:3])
    further = _others(case.op, given) if others else {}
    calls |= {name: call for name, call in further.items() if callable(call)}
    where = given[0].device
    once = interleave({"ours": calls["ours"]}, where, rounds=3)["ours"].median
    timings = interleave(calls, where, rounds=rounds, number=repeats(once), progress=progress)
    ours = timings["ours"]
    row: Row = {"op": case.op, "shape": f"B{case.B} H{case.H} N{case.N} D{case.D} r{case.r}"}
    row |= {"kernel": kernels.select(case.op, given[0]).name, "ms": _ms(ours.median)}
    row["spread %"] = None if ours.spread is None else round(ours.spread * 100, 1)
    for name, column in (("reference", "reference"), ("compiled", "compiled reference"), ("no bias", "no bias")):
        row[f"{column} ms"] = _ms(timings[name].median) if name in timings else None
    row["reference / ours"] = round(timings["reference"].over(ours), 3)
    row["compiled / ours"] = round(timings["compiled"].over(ours), 3)
    row["over no bias"] = round(ours.over(timings["no bias"]), 3) if "no bias" in timings else None
    for name, call in further.items():
        row[f"{name} ms"] = _ms(timings[name].median) if callable(call) else call
    return row, {**environment(where), "dtype": case.dtype, "rounds": str(rounds)}


def _others(op: str, given: tuple[Any, ...]) -> dict[str, Callable[[], Any] | str]:
    """Return the other versions of an operation by name: a call, or the reason why it does not run."""
    found: dict[str, Callable[[], Any] | str] = {}
    for kernel in kernels.TABLE[op][:-1]:
        if kernel.name != kernels.select(op, given[0]).name and kernel.device in ("", given[0].device.type):
            call = _bind(kernel.run, given)
            try:
                if not kernel.supports(given[0]):
                    raise UnsupportedError(f"it needs {kernel.needs}")
                with torch.inference_mode():
                    call()
                found[kernel.name] = call
            except Exception as error:  # for example of a compiler; the other versions are still measured
                found[kernel.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:100]}"
    return found


def _memory(case: Case, rounds: int, progress: Progress) -> tuple[Row, dict[str, str]]:
    if isinstance(case, OpCase):
        metric, *others = registry.arguments(case)
        peak, unmerged, what = peak_memory(lambda x: registry.operation(case)(x, *others), metric), None, case.op
    else:
        x, what = registry.images(case), "training step"
        model = registry.build_model(case).to(x.device, x.dtype)
        merged = shared_copy(model)
        tokenmerge.patch(merged, r=case.r)
        peak, unmerged = training_memory(merged, x), training_memory(model, x)
    row = {"what": what, "peak MB": _mb(peak), "unmerged peak MB": None if unmerged is None else _mb(unmerged)}
    row["merged / unmerged"] = None if unmerged is None else round(peak / unmerged, 3)
    return row, {**environment(torch.device(case.device)), "dtype": case.dtype}


def _kind(case: Case) -> str:
    return "memory" if "memory" in case.group else "model" if isinstance(case, ModelCase) else "op"


_MEASURES = {"memory": _memory, "model": _model, "op": _operation}


def _unmeasured(case: Case) -> Row:
    command = f"python benchmarks/run.py --cases {case.name}"
    return {"case": case.name, "bars": _bars(case), "met": "not measured", "to measure it": command}


def _device(cases: Sequence[Case]) -> str:
    return "cuda" if any(case.device == "cuda" and not _absent(case) for case in cases) else "cpu"


def _absent(case: Case) -> str:
    return "this machine has no CUDA device" if case.device == "cuda" and not torch.cuda.is_available() else ""


def _finish(rows: list[Row], name: str, about: dict[str, str], notes: list[str], out: Path | None) -> None:
    show(rows, name)
    for note in notes:
        print(note)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".md"):
        path = out / f"{name}{suffix}"
        # keep figures from a machine that has the device
        if about.get("device") != "none" or not path.exists() or "not measured" in path.read_text():
            save_rows(path, rows, about, notes)


def _reference(run: Callable[..., Any]) -> Callable[..., Any]:
    def forced(*given: Any) -> Any:
        with kernels.force("reference"):
            return run(*given)

    return forced


def _bind(run: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*given)


def _bars(case: Case) -> str:
    return ", ".join(map(str, case.bars)) or "none"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _mb(size: int) -> float:
    return round(size / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
