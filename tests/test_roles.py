"""Who may do what: every route with every role, as docs/security.md says; whose job is whose; and what the page shows of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from harness import BOUNDARY, ROOT, field_part, file_part, form
from world import Desk, Said, ask, new_job, serving

import joborch
from joborch import Route, Status, routes_of
from joborch_base.identity import new_token
from joborch_base.routes import ROLES, Caller

SECURITY = ROOT / "docs" / "security.md"
OWN, STRANGERS, ELSEWHERE = 7, 8, 9  # users: that of the token, another one, and one with jobs of another service

USER = Caller("ward", "token", "user", (), OWN)
PORTAL = Caller("portal", "token", "portal", ("example",))
CALLERS = {
    "user": USER,
    "portal": PORTAL,
    "reader": Caller("eye", "token", "reader"),
    "operator": Caller("boss", "token", "operator"),
    "client": Caller("node", "token", "client", ("example",)),
}


def table() -> dict[str, list[str]]:
    """The table of docs/security.md: for each route, what each role may, and nobody."""
    rows = re.findall(r"^\| `((?:GET|POST|PUT|DELETE) \S+)` \| (.*) \|$", SECURITY.read_text(), re.MULTILINE)
    return {route: cells.split(" | ") for route, cells in rows}


def name_of(declared: Route) -> str:
    """A route as the table writes it."""
    path = re.sub(r"<(?:job_id|user_id|number)>", "ID", declared.path)
    return f"{declared.method} " + re.sub(r"<name(:path)?>", "NAME", path).replace("<path:path>", "PATH")


GUARDED = [declared for declared in routes_of("server") if declared.who != "anyone"]


def add_jobs(desk: Desk) -> None:
    """Jobs 1 and 2: of the token's user and of a stranger; job 3 is of the token's user and of another service."""
    for user, service in ((OWN, "example"), (STRANGERS, "example"), (OWN, "other")):
        desk.upload(user_id=user, service=service)


@pytest.fixture(name="desk")
def two_services(desk: Desk) -> Iterator[Desk]:
    """A server with two services, and jobs of several users."""
    desk.restart(SERVICE_OTHER_CLIENTS="http://127.0.0.1:1")
    add_jobs(desk)
    return desk


UPLOAD = form([file_part("run.sh", b"true")])
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def upload(desk: Desk, caller: Caller, **fields: str) -> Said:
    """POST /upload with these fields."""
    body = form([file_part("run.sh", b"true"), *(field_part(name, text) for name, text in fields.items())])
    return ask(desk.server, "POST", "/upload", body, caller=caller, Content_Type=TYPE)


def message(said: Said) -> str:
    """The message of an error."""
    return str(said.json["message"])


# == The table ==


def test_the_table_has_every_route() -> None:
    assert sorted(table()) == sorted(map(name_of, GUARDED))
    for declared in GUARDED:
        cells = dict(zip((*ROLES, "nobody"), table()[name_of(declared)], strict=True))
        assert [role for role in ROLES if cells[role] != "-"] == [role for role in ROLES if role in declared.who.split()], declared.path
        assert cells["nobody"] == "-"


def test_every_route_with_every_token(desk: Desk) -> None:
    """Over the wire: each role, a token that was revoked or has expired, one of another server, and none at all."""
    tokens = {
        role: desk.server.token_store.add(
            role, role, "example" if role in ("portal", "client") else "", OWN if role == "user" else None, None
        )
        for role in ROLES
    }
    bad = [
        new_token(),
        desk.server.token_store.add("old", "operator", "", None, 10.0),
        desk.server.token_store.add("gone", "operator", "", None, None),
    ]
    desk.clock.pass_s(11)
    assert desk.server.token_store.revoke("gone")
    desk.server.tokens = ("a-default-token",)
    with serving(desk.server) as url:
        for declared in GUARDED:
            path = re.sub(r"<\w+(:path)?>", "77", declared.path)

            def status(token: str | None, url: str = url + path, method: str = declared.method) -> int:
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                return requests.request(method, url, headers=headers, timeout=60, allow_redirects=False).status_code

            cells = dict(zip(ROLES, table()[name_of(declared)]))
            allowed = {role: status(token) not in (401, 403) for role, token in tokens.items()}
            by_proof = cells["client"] == "by proof"  # what sends the token itself is refused: see test_joined.py
            assert allowed == {role: cells[role] != "-" and not by_proof for role in ROLES}, declared.path
            assert [status(token) for token in (*bad, None)] == [401] * 4, declared.path


@pytest.mark.parametrize("declared", [each for each in GUARDED if "<job_id>" in each.path], ids=name_of)
def test_a_stranger_s_job_is_none(declared: Route, desk: Desk) -> None:
    """With the same answer as for a job that does not exist: for a user, and for a portal of another service."""
    allowed = dict(zip(ROLES, table()[name_of(declared)]))
    for role, caller in CALLERS.items():
        if allowed[role] == "-":
            continue
        for number, visible in ((1, True), (2, role != "user"), (3, role != "portal")):
            path = re.sub(r"<path:path>", "run.sh", declared.path.replace("<job_id>", str(number)))
            said = ask(desk.server, declared.method, path, caller=caller)
            assert (said.status != 404) == visible, (role, path, said)
            assert visible or message(said) == f"no job has the id {number}"


def test_nobody_sees_a_job_by_accident(desk: Desk) -> None:
    """A route for anyone that looked for a job would find none."""
    request = joborch.Request({"joborch.caller": None})
    with pytest.raises(joborch.HttpError, match="no job has the id 1"):
        joborch.known_job(desk.server, request, 1)


# == Lists ==


def ids(said: Said) -> list[int]:
    """The ids of a list of jobs or moves."""
    assert said.status == 200, said
    return [job["id"] for job in said.json.get("jobs", said.json.get("changes"))]


@pytest.mark.parametrize("path", ["/jobs?limit=9", "/jobs?ids=1,2,3", "/jobs?name=", "/changes?after=0", "/changes?after=0&ids=1,2,3"])
def test_lists_show_what_their_caller_may_see(path: str, desk: Desk) -> None:
    desk.restart()
    path = path.replace("&name=", "")
    shown = {
        role: sorted(ids(ask(desk.server, "GET", path.replace("?name=", ""), caller=CALLERS[role])))
        for role in ("user", "portal", "reader")
    }
    assert shown == {"user": [1, 3], "portal": [1, 2], "reader": [1, 2, 3]}


@pytest.mark.parametrize("query", ["status=Queued", "service=example", "service=other", "since=9d", "by=ended", "user_id=7", "format=csv"])
def test_filters_widen_nothing(query: str, desk: Desk) -> None:
    for job_id in (1, 2, 3):
        job = desk.store.get(job_id)
        assert job is not None
        if query == "by=ended":
            assert desk.store.move(job, Status.KILLED, "", cause="cancelled")
    for role, seen in (("user", {1, 3}), ("portal", {1, 2})):
        said = ask(desk.server, "GET", f"/jobs?{query}", caller=CALLERS[role])
        found = {int(line.split(",")[0]) for line in said.body.decode().splitlines()[1:]} if "csv" in query else set(ids(said))
        assert found <= seen, (role, query)
        assert found or (role, query) == ("portal", "service=other")


def test_a_portal_of_all_services_sees_all(desk: Desk) -> None:
    assert sorted(ids(ask(desk.server, "GET", "/jobs", caller=PORTAL._replace(services=())))) == [1, 2, 3]
    assert sorted(ids(ask(desk.server, "GET", "/jobs", caller=PORTAL._replace(services=("example", "other"))))) == [1, 2, 3]


def test_who_asks_for_another_user_is_told(desk: Desk) -> None:
    for path in ("/jobs?user_id=8", "/changes?after=0&user_id=8", "/users/8"):
        said = ask(desk.server, "GET", path, caller=USER)
        assert (said.status, message(said)) == (404, "the token ward is for user 7, and knows no user 8"), path
    assert ask(desk.server, "GET", "/users/7", caller=USER).json["user_id"] == 7
    assert [each["name"] for each in ask(desk.server, "GET", "/users/8", caller=PORTAL).json["services"]] == ["example"]


def test_waiting_for_a_stranger_s_job_tells_nothing(desk: Desk) -> None:
    """It counts as ended at once, as one that does not exist: no wait shows when it ends."""
    said = ask(desk.server, "GET", "/jobs?ids=2&wait=40&wait_for=all", caller=USER)
    assert said.json == {"jobs": [], "next": None}


def test_services_and_health_without_clients(desk: Desk) -> None:
    assert {each["name"]: each["clients"] for each in ask(desk.server, "GET", "/services", caller=USER).json["services"]} == {
        "example": [],
        "other": [],
    }
    assert [each["name"] for each in ask(desk.server, "GET", "/services", caller=PORTAL).json["services"]] == ["example"]
    assert all(each["clients"] for each in ask(desk.server, "GET", "/services", caller=CALLERS["reader"]).json["services"])
    for role, caller in CALLERS.items():
        said = ask(desk.server, "GET", "/health", caller=caller).json
        assert (set(said) == {"status", "database"}) == (role not in ("reader", "operator")), role


# == Uploads ==


def test_the_user_of_an_upload_comes_from_the_token(desk: Desk) -> None:
    assert upload(desk, USER, service="example").json["user_id"] == OWN
    assert upload(desk, USER, service="example", user_id="7").json["user_id"] == OWN
    for other in ("8", "x", "", "9" * 40):
        said = upload(desk, USER, service="example", user_id=other)
        assert (said.status, message(said)) == (403, "the token ward is for user 7: leave user_id out, or give 7")
    assert upload(desk, PORTAL, service="example", user_id="8").json["user_id"] == STRANGERS
    assert message(upload(desk, PORTAL, service="example")).startswith("user_id is missing")
    assert len(list(desk.data.jobs.iterdir())) == 3 + 3, "what was refused left no file"


def test_a_portal_sends_to_its_services_alone(desk: Desk) -> None:
    said = upload(desk, PORTAL, service="Other", user_id="7")
    assert (said.status, message(said)) == (403, "the token portal is not for service 'other': give example")
    body = form([field_part("service", "other")])
    said = ask(desk.server, "POST", "/jobs/1/retry", body, caller=PORTAL, Content_Type=TYPE)
    assert (said.status, said.json["field"]) == (403, "service")


@pytest.mark.parametrize("field", ["after", "inputs_from"])
def test_nothing_follows_a_job_that_its_caller_may_not_see(field: str, desk: Desk) -> None:
    for caller, number in ((USER, 2), (PORTAL, 3)):
        said = upload(desk, caller, service="example", user_id="7", **{field: str(number)})
        assert (said.status, message(said)) == (400, f"{field}: user 7 has no job {number}"), caller
        none = upload(desk, caller, service="example", user_id="7", **{field: "99"})
        assert message(none) == message(said).replace(str(number), "99")
        for odd in ("0{}", " {}", "+{}", "{}_0", "{}.0", "0" * 18 + "{}"):
            there, nowhere = (message(upload(desk, caller, service="example", user_id="7", **{field: odd.format(n)})) for n in (number, 99))
            assert nowhere == there.replace(odd.format(number), odd.format(99)).replace(f"no job {number}", "no job 99"), odd
    assert upload(desk, PORTAL, service="example", user_id="7", **{field: "1"}).status == 201


@pytest.mark.parametrize("field", ["after", "inputs_from"])
def test_no_retry_follows_a_job_that_its_caller_may_not_see(field: str, desk: Desk) -> None:
    """With the same answer as for a job that does not exist, whatever user is named."""

    def answer(caller: Caller, number: int, **more: str) -> tuple[int, str]:
        body = form([field_part(name, text) for name, text in {field: str(number), **more}.items()])
        said = ask(desk.server, "POST", "/jobs/1/retry", body, caller=caller, Content_Type=TYPE)
        return said.status, message(said)

    for caller, number in ((USER, 2), (PORTAL, 3)):
        assert answer(caller, number) == (400, f"{field}: user 7 has no job {number}")
        assert answer(caller, 99) == (400, f"{field}: user 7 has no job 99")
        for user in ("7", " 7", "8", "x", ""):
            there, nowhere = (answer(caller, each, user_id=user) for each in (number, 99))
            assert there[0] == nowhere[0] and there[1].replace(f"job {number}", "job 99") == nowhere[1], user


def test_a_key_of_another_portal_shows_nothing(desk: Desk) -> None:
    """The same user may have sent it to another service: then it is another request."""
    fields = {"user_id": "7", "service": "other"}
    body = form([file_part("run.sh", b"true"), *(field_part(name, text) for name, text in fields.items())])
    assert ask(desk.server, "POST", "/upload", body, Content_Type=TYPE, Idempotency_Key="k").status == 201
    again = form([file_part("run.sh", b"true"), field_part("user_id", "7"), field_part("service", "example")])
    assert ask(desk.server, "POST", "/upload", again, caller=PORTAL, Content_Type=TYPE, Idempotency_Key="k").status == 422


# == Who one is ==


def test_a_caller_learns_its_role(desk: Desk) -> None:
    assert ask(desk.server, "GET", "/whoami", caller=USER).json == {
        "name": "ward", "role": "user", "services": [], "user_id": 7, "proof": "token"
    }  # fmt: skip
    assert ask(desk.server, "GET", "/whoami", caller=PORTAL).json["services"] == ["example"]


def test_a_stream_ends_when_its_token_is_revoked(desk: Desk) -> None:
    """What was opened before does not go on."""
    token = desk.server.token_store.add("short", "reader", "", None, None)
    with serving(desk.server) as url:
        headers = {"Authorization": f"Bearer {token}", "Accept": "text/event-stream"}
        with requests.get(f"{url}/changes", headers=headers, timeout=60, stream=True) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(b": moves")
            assert desk.server.token_store.revoke("short")
            desk.store.add(new_job(), "uploaded")  # wakes who waits
            with pytest.raises(requests.RequestException):
                assert not [line for line in lines if line.startswith(b"data:")]


# == The page ==


def page(desk: Desk, path: str, role: str) -> str:
    """A page as a caller sees it."""
    said = ask(desk.server, "GET", path, caller=CALLERS[role])
    assert said.status == 200, said
    return said.body.decode()


def buttons(text: str) -> set[str]:
    """What a page offers to do: the paths of its buttons, forms and downloads."""
    return set(re.findall(r'(?:data-post|action|href)="(/(?:clients|terminate|jobs|upload|download)[^"]*)"', text))


def test_pages_show_no_button_that_its_caller_may_not_use(desk: Desk) -> None:
    assert [bool(buttons(page(desk, "/dashboard", role))) for role in ("user", "portal", "reader", "operator")] == [
        False,
        False,
        False,
        True,
    ]
    offered = {role: buttons(page(desk, "/dashboard/jobs/1", role)) for role in ("user", "reader", "operator")}
    assert offered["reader"] == set()
    assert offered["user"] == offered["operator"] >= {"/terminate/1", "/download_partial/1"}
    assert '"/dashboard/submit"' not in page(desk, "/dashboard", "reader") and '"/dashboard/submit"' in page(desk, "/dashboard", "user")
    assert ask(desk.server, "GET", "/dashboard/submit", caller=CALLERS["reader"]).status == 403


def test_pages_show_nothing_of_strangers(desk: Desk) -> None:
    link = next(iter(desk.server.links.values()))
    assert link.name in page(desk, "/dashboard", "reader")
    for role in ("user", "portal"):
        assert link.name not in page(desk, "/dashboard", role) and "Failures of the last day" not in page(desk, "/dashboard", role)
    assert "/dashboard/jobs/2" not in page(desk, "/dashboard/jobs", "user")
    assert ask(desk.server, "GET", "/dashboard/jobs/2", caller=USER).status == 404
    assert ask(desk.server, "GET", "/dashboard/users?user_id=8", caller=USER).status == 404
    assert "user_id=8" not in page(desk, "/dashboard/users", "user") and "user_id=7" in page(desk, "/dashboard/users", "user")
    assert 'name="user_id"' not in page(desk, "/dashboard/submit", "user") + page(desk, "/dashboard/jobs", "user")
    assert 'value="other"' not in page(desk, "/dashboard/submit", "portal")
    assert ask(desk.server, "GET", "/dashboard", caller=CALLERS["client"]).status == 403, "this server has no token to sign in with"


def test_the_page_asks_the_same_rules(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls handlers in this process, and a role that may not call one gets nothing of it there either."""
    from joborch_plugins import page as pages

    request: Any = joborch.Request({"joborch.caller": CALLERS["client"]})
    for declared in (each for each in GUARDED if each.method == "GET" and "<" not in each.path):
        if "client" not in declared.who.split():
            with pytest.raises(joborch.HttpError) as refused:
                pages.answer_of(desk.server, request, declared.path)
            assert refused.value.status == 403, json.dumps(declared.path)
