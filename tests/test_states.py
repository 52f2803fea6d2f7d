"""The one table of legal moves is the one of the specification: every end can be reached, and none can be left but to Cleaned."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import reference
from world import FIRST

import joborch
from joborch import BUSY, ENDED, OVER, Status
from joborch_base.states import CLIENT_MOVES, MOVES, SERVER_MOVES

TABLES = {"server": SERVER_MOVES, "client": CLIENT_MOVES}


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
    first, start, *arrows = reference.diagram(table).splitlines()
    assert first == "stateDiagram-v2"
    assert start.split() == ["[*]", "-->", str(table[0][0])]
    said = [re.fullmatch(r" +(\w+) --> (\w+)", arrow) for arrow in arrows]
    assert [(match[1], match[2]) for match in said if match] == [(str(source), str(target)) for source, target, _ in table]
