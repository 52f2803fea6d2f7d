"""The one table of legal moves is the one of the specification: every end can be reached, and none can be left but to Cleaned.

What the in-process tests share (a clock that a test moves, services and jobs to begin with) stands here as well: as in
joborch.py, each file of them uses only what stands in the files of the sections before it.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings

import joborch
from joborch import BUSY, CLIENT_MOVES, ENDED, MOVES, OVER, SERVER_MOVES, Status

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
BOUNDED = settings(deadline=None, max_examples=100)  # machines are slow now and then: no test fails by its time
FIRST = {"server": Status.QUEUED, "client": Status.PREPARED}
TABLES = {"server": SERVER_MOVES, "client": CLIENT_MOVES}


# == What the in-process tests begin with ==


class HandClock(joborch.Clock):
    """Time that stands still until a test moves it; wall and monotonic time go together unless somebody sets the clock."""

    def __init__(self, wall: float = 1_795_510_800.0) -> None:
        self.now, self.beginning, self.off, self.boots = wall, wall, 0.0, 1

    def wall(self) -> float:
        return self.now + self.off

    def monotonic(self) -> float:
        return self.now - self.beginning + 1000.0

    def boot(self) -> tuple[str, float]:
        return f"boot-{self.boots}", self.monotonic()

    def set_s(self, seconds: float) -> None:
        """Set the clock forward, or back: wall time alone."""
        self.off += seconds

    def reboot(self) -> None:
        """Switch the machine off and on: boot time begins anew."""
        self.boots, self.beginning = self.boots + 1, self.now

    def pass_s(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds


def a_service(name: str = "example", *urls: str, **changes: Any) -> joborch.Service:
    """A service with the default limits, at clients with these base URLs."""
    addresses = tuple(joborch.client_address(url) for url in urls or ("http://127.0.0.1:9000",))
    return dataclasses.replace(joborch.Service(name, addresses, token="token"), **changes)


def new_job(**changes: Any) -> joborch.NewJob:
    """A job of user 1 for `example`, with a uuid of its own."""
    return dataclasses.replace(joborch.NewJob(str(uuid.uuid4()), user_id=1, service="example", retries=2), **changes)


def changed(job: joborch.Job, **changes: Any) -> joborch.Job:
    """A job as it would be with other columns."""
    return job._replace(**changes)


def tried(call: Callable[[], T], error: type[E]) -> T | E:
    """What `call` returns, or the error with which it refuses."""
    try:
        return call()
    except error as raised:
        return raised


# == The table ==


def pairs(text: str) -> set[tuple[Status, Status]]:
    """The moves of lines like `Queued: Processing Killed`."""
    lines = [line.split(":") for line in text.strip().splitlines()]
    return {(Status(source.strip()), Status(target)) for source, targets in lines for target in targets.split()}


SPECIFIED = {
    "server": pairs("""
        Queued: Processing Killed Invalid Failed
        Processing: Submitted Queued Unknown Invalid Failed Killed
        Submitted: Running Completed Failed Invalid Unknown Queued Killed
        Running: Completed Failed Invalid Unknown Queued Killed
        Unknown: Submitted Running Completed Failed Invalid Queued Killed
        Completed: Cleaned
        Failed: Cleaned
        Invalid: Cleaned
        Killed: Cleaned
    """),
    "client": pairs("""
        Prepared: Running Invalid Failed Killed
        Running: Completed Failed Killed
        Completed: Cleaned
        Failed: Cleaned
        Invalid: Cleaned
        Killed: Cleaned
    """),
}
LATER = {"server": {(Status.QUEUED, Status.INVALID)}, "client": set()}  # comes with `after`


@pytest.mark.parametrize("mode", TABLES)
def test_the_table_is_the_specified_one(mode: str) -> None:
    assert MOVES[mode] <= SPECIFIED[mode], "a move that is not specified"
    assert SPECIFIED[mode] - LATER[mode] <= MOVES[mode], "a specified move is missing"


@pytest.mark.parametrize("mode", TABLES)
def test_no_move_stands_twice_and_each_says_when(mode: str) -> None:
    moves = [(source, target) for source, target, _ in TABLES[mode]]
    assert len(moves) == len(set(moves)) == len(MOVES[mode])
    assert all(len(why) > 5 and source is not target for source, target, why in TABLES[mode])


def reachable(moves: frozenset[tuple[Status, Status]], begin: Status) -> set[Status]:
    """The states to which moves lead from `begin`, itself included."""
    found, grown = {begin}, 0
    while grown != len(found):
        grown = len(found)
        found |= {target for source, target in moves if source in found}
    return found


@pytest.mark.parametrize("mode", TABLES)
def test_every_state_is_reached_and_leads_to_every_end(mode: str) -> None:
    moves = MOVES[mode]
    states = {state for move in moves for state in move}
    assert reachable(moves, FIRST[mode]) == states
    for state in states - set(OVER):
        ends = set(ENDED) - ({Status.INVALID} if mode == "client" and state is Status.RUNNING else set())
        assert ends <= reachable(moves, state), state
        assert (state, Status.KILLED) in moves, f"{state} has not ended: it can be terminated"


@pytest.mark.parametrize("mode", TABLES)
def test_an_end_is_left_only_to_cleaned_and_cleaned_never(mode: str) -> None:
    for state in ENDED:
        assert {target for source, target in MOVES[mode] if source is state} == {Status.CLEANED}
    assert not [move for move in MOVES[mode] if move[0] is Status.CLEANED]


def test_groups_of_states_part_them_all() -> None:
    server = {state for move in MOVES["server"] for state in move}
    assert server == {Status.QUEUED, *BUSY, *ENDED, Status.CLEANED}
    assert len({Status.QUEUED, *BUSY, *ENDED, Status.CLEANED}) == 1 + len(BUSY) + len(ENDED) + 1
    assert (*ENDED, Status.CLEANED) == OVER
    assert set(Status) == server | {Status.PREPARED}


def test_states_are_called_as_in_the_reference() -> None:
    names = "Queued Processing Submitted Prepared Running Completed Failed Invalid Killed Unknown Cleaned"
    assert {str(state) for state in Status} == {state.value for state in Status} == set(names.split())
    assert {str(cause) for cause in joborch.Cause} == {"user", "limit", "infrastructure", "cancelled"}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_diagram_says_what_the_table_says(table: Sequence[tuple[Status, Status, str]]) -> None:
    first, start, *arrows = joborch.diagram(table).splitlines()
    assert first == "stateDiagram-v2"
    assert start.split() == ["[*]", "-->", str(table[0][0])]
    said = [re.fullmatch(r" +(\w+) --> (\w+)", arrow) for arrow in arrows]
    assert [(match[1], match[2]) for match in said if match] == [(str(source), str(target)) for source, target, _ in table]
