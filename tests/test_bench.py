"""tests/bench.py counts, compares and reports rightly. Its figures are no tests: nothing here depends on how fast a machine is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench
import bench_jobs
import pytest
from bench_base import BenchError, Measure, Place, percentile, wait_until
from bench_load import helper

STRACE_TABLE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 75.00    0.000300         100         3         1 fsync
 25.00    0.000100          50         2           fdatasync
  0.00    0.000000           0         7           write
------ ----------- ----------- --------- --------- ----------------
100.00    0.000400                    12         1 total
"""


def figure_of(*values: float, name: str = "median", before: tuple[float, ...] = (), bare: float | None = None) -> bench.Figure:
    """The only figure of a benchmark `latency` with these runs."""
    runs = [[Measure(name, value, "ms", bare)] for value in values]
    (found,) = bench.figures("latency", runs, [[Measure(name, value, "ms")] for value in before])
    return found


def test_a_percentile_is_the_nearest_rank() -> None:
    hundred = list(range(100, 0, -1))
    assert [percentile(hundred, percent) for percent in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7], 99) == 7
    assert percentile(list(range(1, 201)), 99) == 198


def test_a_figure_is_the_median_of_its_runs_and_of_their_ratios() -> None:
    runs = [[Measure("median", 10, "ms", 5)], [Measure("median", 30, "ms", 10)], [Measure("median", 20, "ms", 20)]]
    (figure,) = bench.figures("latency", runs)
    assert (figure.value, figure.ratio, figure.base, figure.met) == (20, 2, 10, False)  # the goal is 12 ms, 4 times the base
    assert bench.spread(figure.runs) == "10.0 to 30.0"


@pytest.mark.parametrize(("value", "bare", "met"), [(12, 3, True), (12.1, 6, False), (12, 2.9, False), (11, None, True)])
def test_a_goal_needs_the_value_and_the_ratio(value: float, bare: float | None, met: bool) -> None:
    figure = figure_of(value, bare=bare)
    assert (figure.met, figure.goal) == (met, "at most 12, 4 x")
    assert figure_of(value, name="of another name").met is None


def test_a_goal_from_below() -> None:
    goal = bench.Goal(least=300, ratio_least=0.5)
    assert goal.text() == "at least 300, 0.5 x"
    assert goal.met(300, 0.5)
    assert not goal.met(299, 0.5)
    assert not goal.met(300, 0.4)


def test_two_programs_stand_side_by_side() -> None:
    titles, row = bench.table([figure_of(10, 12, 11, before=(20, 24, 22))])
    assert dict(zip(titles, row)) == {
        "benchmark": "latency", "figure": "median", "value": "11.0 ms", "spread": "10.0 to 12.0", "before": "22.0 ms",
        "spread before": "20.0 to 24.0", "goal": "at most 12, 4 x", "met": "yes",
    }  # fmt: skip


def test_numbers_have_three_digits() -> None:
    values = (0, 0.284, 9.994, 9.996, 99.94, 99.96, 1234.5)
    assert [bench.number(value) for value in values] == ["0.00", "0.28", "9.99", "10.0", "99.9", "100", "1,234"]


def test_strace_s_table_is_counted() -> None:
    assert bench_jobs.counted_calls(STRACE_TABLE, bench_jobs.SYNCS) == 5


def test_every_peer_is_pinned() -> None:
    assert [bench_jobs.peer_version(name) for name in bench_jobs.PEERS]
    pins = [line for line in bench_jobs.PEER_VERSIONS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all("==" in pin for pin in pins)


def test_a_peer_that_cannot_be_installed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(bench_jobs, "PEER_FOLDER", tmp_path)
    monkeypatch.setattr(bench_jobs, "PEER_PYTHON", pip)
    measures = list(bench_jobs.peer_measures(Place(pip, "", tmp_path), "huey", 1))
    _, row = bench.table(list(bench.figures("peers", [measures])))
    version = bench_jobs.peer_version("huey")
    assert row == ("peers", f"huey {version}, latency, median", "not measured", "ERROR: No matching distribution found")
    assert not list(tmp_path.glob("*.stamp"))  # the next run tries again


def test_a_helper_works_beside_and_ends_at_a_word() -> None:
    with helper(lambda pipe: (os.getpid(), pipe.recv())) as one:
        assert not one.is_done()
        one.tell("enough")
        pid, word = one.result()
    assert (pid, word) == (one.process.pid, "enough")
    assert one.process.exitcode is not None


def test_a_helper_that_fails_is_noticed() -> None:
    with helper(lambda pipe: pipe.no_such_thing) as one:
        with pytest.raises(BenchError, match="a helper failed"):
            one.result()
        wait_until(one.is_done, 10, "it is done")


def test_what_never_becomes_so_is_named() -> None:
    with pytest.raises(BenchError, match=r"not so after 0\.01 s: pigs fly"):
        wait_until(lambda: False, 0.01, "pigs fly")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latencies"], "unknown: latencies; choose from latency, "),
        (["latency", "cpu", "--size", "5"], "--size is of one benchmark: name it"),
        (["latency", "--size", "5X"], "'5X' is no size"),
        (["latency", "--size", "0"], "'0' is no size"),
        (["latency", "--before", "no.pyz"], "no.pyz is not there"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], said: str, pyz: Path) -> None:
    done = subprocess.run([sys.executable, bench.__file__, "--pyz", str(pyz), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.timeout(300)  # strace stops the processes at each system call
def test_two_programs_are_measured_in_turn(pyz: Path, tmp_path: Path) -> None:
    """A real comparison of a program with itself, as small as can be: exchanges, fsyncs and CPU of a job are found."""
    lines = tmp_path / "bench.jsonl"
    words = ["cpu", "--size", "2", "--rounds", "1", "--dir", tmp_path, "--json", lines, "--pyz", pyz, "--before", pyz]
    done = subprocess.run([sys.executable, bench.__file__, *map(str, words)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = {figure["name"]: figure for figure in map(json.loads, lines.read_text().splitlines())}
    assert "spread before" not in done.stdout  # of one round there is none
    for name in ("server + client", "HTTP exchanges", "context switches, voluntary, server", "wall, median"):
        assert found[name]["value"] > 0
        assert len(found[name]["before"]) == 1
    assert found["HTTP exchanges"]["value"] >= found["HTTP exchanges, server with client"]["value"] + 2  # upload, and the wait for the end
    if os.getuid() == 0 and shutil.which("strace"):
        assert found["fsyncs"]["value"] >= 4  # the upload and its row, the claim, the result
    else:
        assert found["fsyncs"]["missing"]
