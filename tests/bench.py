#!/usr/bin/env python3
"""Measure joborch: `python tests/bench.py [NAME ...]`. Standard library only.

These are measurements, never timed tests: a slow machine fails nothing. Server and clients run as real processes in a fresh
folder, with every guarantee on and no setting but limits that do not bind. Each benchmark runs several times. A figure is the
median of its runs, with the smallest and the largest beside it; so is its ratio to something bare that was measured in the same
run, since machines differ and are noisy. With `--before`, two programs are measured in alternating rounds.

The benchmarks stand in bench_jobs.py, bench_files.py, bench_load.py, bench_at_once.py and bench_queue.py, what they share in
bench_base.py and bench_site.py. Sections here: figures and goals, the table of benchmarks, output, the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

from bench_accounts import WORKS, accounts
from bench_at_once import GIB, all_at_once
from bench_base import REPOSITORY, BenchError, Json, Measure, Place, machine, say
from bench_files import big, many_files, many_results, one_file
from bench_jobs import cpu, isolation, latency, peers, throughput, uploads
from bench_joined import joined
from bench_load import fill, idle, polling, silent, start, waiters
from bench_page import VIEWS, page
from bench_queue import FAIR_OTHERS, FAIR_SLOTS, backlog, fairness, restart, slurm

# == Figures and goals ==  A run gives measures; the medians of all runs are figures, and a goal judges a figure.


class Goal(NamedTuple):
    """The bounds that a figure has to keep; None bounds nothing."""

    most: float | None = None
    ratio_most: float | None = None
    ratio_least: float | None = None
    least: float | None = None

    def text(self) -> str:
        """The goal in words, as in `at most 12, 4 x`."""
        bounds = {"at most": (self.most, self.ratio_most), "at least": (self.least, self.ratio_least)}
        texts = []
        for words, (value, ratio) in bounds.items():
            parts = ([f"{value:g}"] if value is not None else []) + ([f"{ratio:g} x"] if ratio is not None else [])
            texts += [f"{words} {', '.join(parts)}"] if parts else []
        return "; ".join(texts)

    def met(self, value: float, ratio: float | None) -> bool:
        """Whether every bound is kept."""
        bounds = [
            self.most is None or value <= self.most,
            self.least is None or value >= self.least,
            self.ratio_most is None or ratio is None or ratio <= self.ratio_most,
            self.ratio_least is None or ratio is None or ratio >= self.ratio_least,
        ]
        return all(bounds)


class Figure(NamedTuple):
    """The medians of a benchmark's runs, as they are printed and written. `base` is what the ratio is to, in the same unit."""

    benchmark: str
    name: str
    unit: str
    value: float | None = None
    runs: Sequence[float] = ()
    base: float | None = None
    ratio: float | None = None
    before: Sequence[float] = ()  # of the program that --before names
    goal: str = ""
    met: bool | None = None
    missing: str = ""  # why there is no value


def by_name(runs: Sequence[Sequence[Measure]]) -> dict[str, list[Measure]]:
    """The measures of all runs, by their names in the order of the first run."""
    found: dict[str, list[Measure]] = {}
    for run in runs:
        for measure in run:
            found.setdefault(measure.name, []).append(measure)
    return found


def values_of(measures: Sequence[Measure]) -> list[float]:
    """The values that were measured."""
    return [measure.value for measure in measures if measure.value is not None]


def figures(benchmark: str, runs: Sequence[Sequence[Measure]], before: Sequence[Sequence[Measure]] = ()) -> Iterator[Figure]:
    """Yield a figure for each name of a measure; `before` are the runs of the program to compare with."""
    earlier = by_name(before)
    for name, same in by_name(runs).items():
        values = values_of(same)
        if not values:
            yield Figure(benchmark, name, same[0].unit, missing=same[0].missing)
            continue
        bases = [measure.bare for measure in same if measure.bare]
        ratios = [measure.value / measure.bare for measure in same if measure.bare and measure.value is not None]
        value, ratio = statistics.median(values), statistics.median(ratios) if ratios else None
        goal = GOALS.get((benchmark, name))
        yield Figure(
            benchmark, name, same[0].unit, value, values, statistics.median(bases) if bases else None, ratio,
            values_of(earlier.get(name, [])), goal.text() if goal else "", goal.met(value, ratio) if goal else None,
        )  # fmt: skip


# == The table of benchmarks ==


class Benchmark(NamedTuple):
    """A row of the table below."""

    name: str
    run: Callable[[Place, int], Iterator[Measure]]
    size: int
    quick_size: int
    runs: int
    what: str
    against: str


BENCHMARKS = [
    # name, one run of it, its size, the size with --quick, runs, what the size counts, what the base of the ratios is
    Benchmark("latency", latency, 200, 50, 5, "no-op jobs", "bash run.sh in a new folder with two files"),
    Benchmark("throughput", throughput, 2000, 200, 5, "no-op jobs", "xargs -P2 with new folders"),
    Benchmark("uploads", uploads, 2000, 300, 5, "uploads", ""),
    Benchmark("cpu", cpu, 200, 50, 5, "no-op jobs", ""),
    Benchmark("isolation", isolation, 200, 30, 3, "no-op jobs under each value", ""),
    Benchmark(
        "peers", peers, 60, 10, 5, "no-op jobs one by one, and five times as many at once", "bash run.sh in a new folder; plain xargs -P2"
    ),
    Benchmark("big", big, 2 * GIB, GIB // 4, 3, "bytes", "cp + sha256sum"),
    Benchmark("many-files", many_files, 10_000, 1000, 3, "files", "cp -r + zip -r"),
    Benchmark("polling", polling, 2, 1, 5, "seconds a slice", "a hello route of the same stack"),
    Benchmark("waiters", waiters, 300, 100, 3, "uploads", "no waiters"),
    Benchmark("silent", silent, 300, 100, 1, "health checks", "the same alone"),
    Benchmark("many-results", many_results, 200_000, 20_000, 1, "files", ""),
    Benchmark("one-file", one_file, 200_000, 20_000, 1, "files of a result, and 26 KB for each", ""),
    Benchmark("all-at-once", all_at_once, 10 * GIB, GIB // 4, 1, "bytes uploaded, and as many files in proportion", "an idle system"),
    Benchmark("fill", fill, 1000, 100, 1, "running payloads", ""),
    Benchmark("start", start, 10, 3, 1, "starts", "python -c with the imports of any such program"),
    Benchmark("restart", restart, 100_000, 2000, 1, "ended jobs; a hundredth as many running payloads", ""),
    Benchmark("backlog", backlog, 1_000_000, 20_000, 1, "queued jobs of 1,000 users", "the same with 1,000 queued"),
    Benchmark("accounts", accounts, 1_000_000, 20_000, 1, "ended jobs, a tenth of them of one user", "the same server with nothing to do"),
    Benchmark("page", page, 1_000_000, 20_000, 1, "jobs, half of them ended", "the same with 1,000"),
    Benchmark("fairness", fairness, 10_000, 2000, 1, "queued jobs of one user; 50 others come", "the script alone"),
    Benchmark("slurm", slurm, 500, 40, 1, "no-op jobs", "a bare loop of sbatch"),
    Benchmark("joined", joined, 2000, 200, 3, "no-op jobs", "a client that the server calls; the server before any client"),
    Benchmark("idle", idle, 60, 10, 1, "seconds", ""),
]
GOALS = {
    ("latency", "median"): Goal(most=12, ratio_most=4),
    ("latency", "p99"): Goal(most=25),
    ("throughput", "jobs"): Goal(ratio_least=0.4),
    ("uploads", "uploads"): Goal(least=300),
    ("cpu", "server + client"): Goal(most=7),
    ("isolation", "process, over none"): Goal(most=6),
    ("isolation", "full, over none"): Goal(most=8),
    ("big", "upload"): Goal(ratio_least=0.5),
    ("big", "send"): Goal(ratio_least=0.5),
    ("big", "run and fetch"): Goal(ratio_least=0.5),
    ("big", "download"): Goal(ratio_least=0.5),
    ("big", "peak RSS, server"): Goal(most=80),
    ("big", "peak RSS, client"): Goal(most=80),
    ("polling", "HEAD and GET"): Goal(ratio_least=0.7),
    ("polling", "HEAD /download/ID"): Goal(ratio_least=0.7),
    ("waiters", "upload, p99"): Goal(most=100),
    ("silent", "/health, p99"): Goal(most=100),
    ("many-results", "peak RSS, server"): Goal(most=150),
    ("many-results", "peak RSS, client"): Goal(most=150),
    ("one-file", "first"): Goal(most=50),
    ("one-file", "median"): Goal(most=50),
    ("one-file", "growth of RSS, server"): Goal(most=10),
    ("all-at-once", "upload, p99"): Goal(most=100),
    ("all-at-once", "/health, p99"): Goal(most=100),
    ("all-at-once", "start of another user's job, p99"): Goal(most=100),
    ("fill", "64 slots run, from the first upload"): Goal(most=2),
    ("fill", "64 slots run again, from a queue"): Goal(most=2),
    ("fill", "CPU, client, payloads running"): Goal(most=2),
    ("start", "--version"): Goal(ratio_most=1),
    ("start", "--help"): Goal(ratio_most=2),
    ("start", "first /health"): Goal(ratio_most=4),
    ("start", "list"): Goal(ratio_most=2),
    ("restart", "server, ended jobs"): Goal(most=2000),
    ("restart", "client, running payloads, all taken up"): Goal(most=2000),
    ("backlog", "restart"): Goal(most=2000),
    ("backlog", "peak RSS, server"): Goal(most=150),
    ("backlog", "choose, p99"): Goal(most=5, ratio_most=2),
    ("backlog", "choose, median"): Goal(ratio_most=2),
    ("backlog", "choose and claim, p99"): Goal(most=2, ratio_most=1.5),
    ("backlog", "GET /jobs"): Goal(ratio_most=2),
    ("backlog", "HEAD /download/ID"): Goal(ratio_most=2),
    **{("accounts", f"{work}, {what}, p99"): Goal(most=100) for work in WORKS for what in ("upload", "/health")},
    **{("accounts", f"{work}, peak RSS, server"): Goal(most=150) for work in WORKS},
    **{("page", f"{view}, first paint"): Goal(most=300) for view in VIEWS},
    **{("page", f"{view}, size"): Goal(most=150) for view in VIEWS},
    ("page", "/metrics, CPU"): Goal(most=10),
    ("fairness", "one after another, p90"): Goal(most=2),
    ("fairness", "at once, the last"): Goal(most=FAIR_OTHERS / FAIR_SLOTS + 2),
    ("slurm", "jobs"): Goal(ratio_least=0.8),
    ("slurm", "squeue and sacct calls an interval"): Goal(most=1.5),
    ("joined", "latency, median"): Goal(ratio_most=1.3),
    ("joined", "throughput"): Goal(ratio_least=0.9),
    ("idle", "PSS, server"): Goal(most=35),
    ("idle", "PSS, client"): Goal(most=35),
    ("idle", "CPU, server"): Goal(most=0.1),
    ("idle", "CPU, client"): Goal(most=0.1),
}


# == Output ==  One table for people, one JSON line a figure for programs.

COLUMNS = ("benchmark", "figure", "value", "spread", "before", "spread before", "base", "ratio", "goal", "met")
NUMBERS = range(2, 8)  # columns that stand to the right


def number(value: float) -> str:
    """A value with three digits, or all that stand before the point; below 10 with two decimals."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest of several values."""
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""


def cells(figure: Figure) -> tuple[str, ...]:
    """A figure as a row of the table."""
    if figure.value is None:
        return figure.benchmark, figure.name, "not measured", "", "", "", "", "", figure.missing, ""
    before = f"{number(statistics.median(figure.before))} {figure.unit}" if figure.before else ""
    base = "" if figure.base is None else number(figure.base)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f} x"
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    value = f"{number(figure.value)} {figure.unit}".rstrip()
    row = (value, spread(figure.runs), before.rstrip(), spread(figure.before), base, ratio)
    return figure.benchmark, figure.name, *row, figure.goal, met


def table(found: Sequence[Figure]) -> list[tuple[str, ...]]:
    """The figures as rows below their titles, without the columns that are empty."""
    rows = [cells(figure) for figure in found]
    used = [at for at in range(len(COLUMNS)) if any(row[at] for row in rows)]
    return [tuple(row[at] for at in used) for row in [COLUMNS, *rows]]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with aligned columns, numbers to the right."""
    right = [title in [COLUMNS[at] for at in NUMBERS] for title in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        parts = [cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, right)]
        yield "  ".join(parts).rstrip()


def markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines of a Markdown table."""
    yield f"| {' | '.join(rows[0])} |"
    yield "|" + "".join("--:|" if title in [COLUMNS[at] for at in NUMBERS] else "---|" for title in rows[0])
    for row in rows[1:]:
        yield f"| {' | '.join(row)} |"


def footnotes(names: Sequence[str], facts: Json) -> Iterator[str]:
    """What the ratios are to, and the machine."""
    rows = [row for row in BENCHMARKS if row.name in names and row.against]
    against = " Bases: " + "; ".join(f"{row.name}: {row.against}" for row in rows) + "." if rows else ""
    yield f"Each figure is the median of its runs.{against}"
    yield (
        "{cpu}, {cores} cores, load {load} before; {memory_gib} GiB; Linux {kernel}, {file_system}; Python {python}, "
        "SQLite {sqlite}; {version}; {date}.".format(**facts)
    )


def write_json(path: Path, found: Sequence[Figure], facts: Json, quick: bool) -> None:
    """Append one line a figure."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**figure._asdict(), "quick": quick, "machine": facts}) + "\n" for figure in found)


# == The command line ==


def measure(benchmark: Benchmark, places: Sequence[Place], given: argparse.Namespace) -> list[Figure]:
    """Run a benchmark as often as its row says, in turn for each of one or two programs: the one under test, and the one before."""
    size = given.size or (benchmark.quick_size if given.quick else benchmark.size)
    rounds = given.rounds or max(benchmark.runs, FEWEST_ROUNDS if len(places) > 1 else 1)
    runs: list[list[list[Measure]]] = [[] for _ in places]
    for turn in range(rounds):
        say(f"{benchmark.name}: run {turn + 1} of {rounds}, {size:,} {benchmark.what}")
        for at in range(len(places))[:: 1 if turn % 2 else -1]:  # neither program is always the first
            os.sync()
            runs[at].append(list(benchmark.run(places[at], size)))
    found = list(figures(benchmark.name, *runs))
    stray = {name for of, name in GOALS if of == benchmark.name} - {figure.name for figure in found}
    if stray:
        raise BenchError(f"goals without a figure: {', '.join(sorted(stray))}")
    return found


FEWEST_ROUNDS = 5  # of a comparison


def amount(text: str) -> int:
    """A whole number, or one with K, M or G of 1,024."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB}
    if not digits.isdigit() or unit not in units or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a whole number, as in 500 or 2G")
    return int(digits) * units[unit]


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description="Measure joborch.", epilog="example: python tests/bench.py latency idle --quick")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure, all by default: {', '.join(names)}")
    parser.add_argument("--pyz", type=Path, default=REPOSITORY / "joborch.pyz", help="the program (joborch.pyz or joborch.py)")
    parser.add_argument("--before", type=Path, help="another program, to be measured in alternating rounds (at least five)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="the folder, and so the file system, to use")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "bench.jsonl", help="where one JSON line a figure is added")
    parser.add_argument("--quick", action="store_true", help="small sizes: a look, not a measurement")
    parser.add_argument(
        "--size", type=amount, help="the size of a run, as in 500 or 2G, instead of the benchmark's own; name one benchmark"
    )
    parser.add_argument("--rounds", type=amount, help="how many runs, instead of the benchmark's own number")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    if given.size and len(given.names) != 1:
        parser.error("--size is of one benchmark: name it")
    for program in filter(None, (given.pyz, given.before)):
        if not program.exists():
            parser.error(f"{program.name} is not there: make it by python3 build_zipapp.py, or name another by --pyz")
    given.names = given.names or names
    return given


def interrupt(*_: object) -> None:
    """INT and TERM end this program by way of every `finally`, which a second signal must not cut short."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measure what was asked for; 1 where something could not be measured."""
    given = arguments()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, interrupt)
    places = [Place(program.resolve(), given.python, given.dir) for program in (given.pyz, given.before) if program]
    facts = machine(places[0])
    found: list[Figure] = []
    status = 0
    for benchmark in BENCHMARKS:
        if benchmark.name not in given.names or status == 130:
            continue
        try:
            found += (new := measure(benchmark, places, given))
            write_json(given.json, new, facts, given.quick or bool(given.size))
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            say(f"{benchmark.name} could not be measured: {error}")
            status = 1
        except KeyboardInterrupt:
            status = 130
    if found:
        rows = table(found)
        print("\n".join(markdown(rows) if given.markdown else aligned(rows)), end="\n\n")
        print("\n".join(footnotes([figure.benchmark for figure in found], facts)))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
