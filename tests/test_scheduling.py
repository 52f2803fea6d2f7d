"""Who is next, who may try again, and what somebody is told who waits: pure functions, tried on tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_states import BOUNDED, HandClock, new_job

import joborch
from joborch import Cause, Head, Standing, Store, attempts_left, in_turn, why_waiting

HEADS = st.lists(
    st.builds(Head, st.sampled_from("abc"), st.integers(1, 10**12), st.integers(-3, 3)), max_size=8, unique_by=lambda head: head.job_id
)


@BOUNDED
@given(HEADS)
def test_jobs_run_in_the_order_in_which_they_came(heads: list[Head]) -> None:
    turn = in_turn(iter(heads))
    assert sorted(map(repr, turn)) == sorted(map(repr, heads)), "nobody is left out, nobody comes twice"
    assert [head.job_id for head in turn] == sorted(head.job_id for head in heads)


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_attempts(retries: int) -> None:
    """One more than the retries, and none for what shall end."""
    store = Store(":memory:", "server", HandClock())
    for attempt in (1, 2, 3, 4):
        job = store.add(new_job(retries=retries, attempt=attempt), "")
        assert attempts_left(job) is (attempt <= retries)
        store.wish_end(job.id, Cause.CANCELLED)
        ending = store.get(job.id)
        assert ending is not None and not attempts_left(ending)
    store.close()


FREE, DOWN = {"gpu1:9000": ""}, {"gpu1:9000": "cannot be reached (3 min ago)"}


@pytest.mark.parametrize(
    ("standing", "troubles", "wanted"),
    [
        (Standing(0, 5, 0, 10, 0), FREE, "it is next for a free place at a client for s"),
        (Standing(0, 5, 0, 10, 1), FREE, "it is next for a free place at a client for s and 1 job of yours stands before it"),
        (Standing(5, 5, 5, 10, 3), FREE, "5 of your 5 runs for s are in use and 3 jobs of yours stand before it"),
        (Standing(6, 5, 6, 10, 0), FREE, "6 of your 5 runs for s are in use"),
        (Standing(4, 5, 10, 10, 0), FREE, "all 10 runs of s are in use"),
        (Standing(5, 5, 10, 10, 0), DOWN, "5 of your 5 runs for s are in use"),
        (Standing(0, 5, 0, 10, 0), DOWN, "no client for s answers: gpu1:9000 cannot be reached (3 min ago)"),
        (Standing(0, 5, 0, 10, 0), {**DOWN, "gpu2:9000": ""}, "it is next for a free place at a client for s"),
        (Standing(0, 5, 0, 10, 0), {}, "it is next for a free place at a client for s"),
    ],
)
def test_what_a_job_waits_for(standing: Standing, troubles: dict[str, str], wanted: str) -> None:
    assert why_waiting("s", standing, troubles) == wanted


STANDINGS = st.builds(Standing, *[st.integers(0, 9), st.integers(1, 5)] * 2, st.integers(0, 9))


@BOUNDED
@given(STANDINGS, st.dictionaries(st.sampled_from(["a:1", "b:2"]), st.sampled_from(["", "is away"])))
def test_it_is_called_next_only_where_no_limit_binds(standing: Standing, troubles: dict[str, str]) -> None:
    text = why_waiting("s", standing, troubles)
    bound = standing.runs_of_user >= standing.runs_per_user or standing.runs_of_service >= standing.max_runs
    away = bool(troubles) and all(troubles.values())
    assert text.startswith("it is next") == (not bound and not away)
    assert text.isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.34, "0.3 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (119, "119 s"),
        (180, "3 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (172800, "2 days"),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert joborch.spoken(seconds) == text


@pytest.mark.parametrize(
    ("wall", "text"),
    [(0.0, "1970-01-01T00:00:00.000Z"), (1795510800.1239, "2026-11-24T09:00:00.123Z"), (1e-7, "1970-01-01T00:00:00.000Z"), (None, None)],
)
def test_times_as_rfc_3339_has_them(wall: float | None, text: str | None) -> None:
    assert joborch.rfc3339(wall) == text


@BOUNDED
@given(st.text(), st.integers(4, 50))
def test_one_line_is_safe_in_logs_and_headers(text: str, limit: int) -> None:
    line = joborch.one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert line == text.strip() or not text.isprintable() or len(text) > limit


def test_the_nearest_word() -> None:
    assert joborch.nearest("usr_id", ["user_id", "service"]) == " (did you mean user_id?)"
    assert joborch.nearest("zzz", ["user_id", "service"]) == joborch.nearest("x", []) == ""


def test_a_refusal_is_an_answer_with_a_field_and_headers() -> None:
    answer = joborch.Answer.of(joborch.Refusal(429, "too many", "user_id", Retry_After="5"))
    assert (answer.body, answer.status, answer.headers) == ({"message": "too many", "field": "user_id"}, 429, {"Retry-After": "5"})
    assert joborch.Answer.of(joborch.Refusal(404, "none")).body == {"message": "none"}
