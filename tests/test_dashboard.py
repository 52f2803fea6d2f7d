"""The web page without JavaScript: what each page shows, that all of it is text, who may see it, and what it costs."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import requests
from conftest import MakeProcess
from harness import Process, field_part, file_part, form, form_type, run_to_end
from hypothesis import given
from hypothesis import strategies as st
from world import Desk, Said, Yard, ask

import joborch
from joborch import ROUTES, Status
from joborch_plugins import page

PAGES = ("/dashboard", "/dashboard/jobs", "/dashboard/submit", "/dashboard/users")
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</textarea></title></style><svg onload=alert(1)>",
    "${title} &amp; {{7*7}}",
    "\u202egnp.exe",
    "\x1b[31mred\x1b[0m",
    "مرحبا بالعالم",
    "\ud800",
    "x" * 1_000_000,
)


class Elements(HTMLParser):
    """The elements of a page, in order, each with its attributes; and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note it."""
        self.text += data

    def values(self, name: str, tag: str = "") -> list[str]:
        """All values of an attribute."""
        return [attributes[name] or "" for element, attributes in self.found if name in attributes and tag in ("", element)]


def shown(desk: Desk, path: str, status: int = 200) -> Elements:
    """A page as a caller sees it. None may hold what its policy forbids."""
    said = ask(desk.server, "GET", path)
    assert (said.status, said.headers["Content-Type"]) == (status, "text/html; charset=utf-8"), said.body
    elements = Elements(said.body)
    check_policy(said, elements)
    return elements


def check_policy(said: Said, elements: Elements) -> None:
    """Nothing inline, nothing of another host, nobody may frame it."""
    policy = said.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert (said.headers["Cache-Control"], said.headers["Referrer-Policy"]) == ("no-store", "same-origin")
    assert [attributes.get("src") for tag, attributes in elements.found if tag == "script"] == ["/dashboard/files/page.js"]
    assert "style" not in [tag for tag, _ in elements.found]
    assert not [name for _, attributes in elements.found for name in attributes if name == "style" or name.startswith("on")]
    addresses = [*elements.values("href"), *elements.values("src"), *elements.values("action"), *elements.values("data-post")]
    assert not [each for each in addresses if not re.match(r"/(?!/)|#|data:image/svg", each)]


def failed(desk: Desk, reason: str, **changes: Any) -> joborch.Job:
    """A job that ran and failed."""
    job = desk.with_client(**changes)
    assert desk.store.move(job, Status.FAILED, reason, cause="user", exit_code=3, ended_at=desk.clock.wall())
    return desk[job]


# == What the pages show ==


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_whole_with_no_job_at_all(path: str, desk: Desk) -> None:
    elements = shown(desk, path)
    assert [attributes["href"] for tag, attributes in elements.found if attributes.get("aria-current")] == [path]
    for link in set(elements.values("href", "a")) - {"#main"}:
        assert ask(desk.server, "GET", link).status in (200, 302), link


def test_labels_belong_to_fields_and_ids_are_unique(desk: Desk) -> None:
    failed(desk, "why")
    for path in (*PAGES, "/dashboard/jobs/1"):
        elements = shown(desk, path)
        ids = elements.values("id")
        assert len(ids) == len(set(ids)), path
        assert set(elements.values("for")) <= set(ids), path
        fields = {attributes["id"] for tag, attributes in elements.found if tag in ("input", "select", "textarea") and "id" in attributes}
        assert fields - set(elements.values("for")) == set(), path


def test_the_overview_says_what_is_going_on(desk: Desk) -> None:
    failed(desk, "run.sh ended with exit status 3", user_id=7)
    failed(desk, "run.sh ended with exit status 3", user_id=8)
    desk.upload()
    desk.link.slots = 3
    elements = shown(desk, "/dashboard")
    assert "All is well." in elements.text
    assert f"{desk.link.name}" in elements.text
    assert "Submitted 3" in elements.text and "Failed 2" in elements.text
    (row,) = re.findall(r"(\d+)run.sh ended with exit status 3job (\d+)", elements.text)
    assert row == ("2", "2"), "failures with the same reason are one row, with the newest job"
    assert elements.values("aria-label", "svg")[:1] == ["0 of 3 in use"]
    assert [attributes.get("class") for tag, attributes in elements.found if tag == "rect"][:3] == ["free"] * 3
    assert f"/clients/{desk.link.name}/drain" in elements.values("data-post")


def test_the_overview_begins_with_the_problems(desk: Desk) -> None:
    desk.link.failed(joborch.NoAnswer("does not answer"))
    text = shown(desk, "/dashboard").text
    assert "All is well." not in text
    assert text.index("does not answer") < text.index("Services")


def test_the_remedy_for_a_drained_client_is_the_button_on_the_page(desk: Desk) -> None:
    desk.with_client()
    assert ask(desk.server, "POST", f"/clients/{desk.link.name}/drain").status == 200
    text = shown(desk, "/dashboard").text
    assert f"Press Resume at {desk.link.name} under Clients" in text and "POST /" not in text
    assert "draining, 1 job left" in text
    reader = ask(desk.server, "GET", "/dashboard", caller=joborch.Caller("eye", "token", "reader"))
    assert f"An operator can resume {desk.link.name}".encode() in reader.body and b"press Resume" not in reader.body


def test_what_to_do_is_a_sentence_with_its_commands_as_code(desk: Desk) -> None:
    desk.link.failed(joborch.NoAnswer("does not answer"))
    elements = shown(desk, "/dashboard")
    assert "Start it there with joborch client, or check" in elements.text and "`" not in elements.text
    assert "code" in [tag for tag, _ in elements.found] and "Client " in elements.text


def test_the_oldest_wait_is_that_of_the_queue(desk: Desk) -> None:
    """As in the metrics: a job that follows another one does not wait for a client."""
    first = desk.with_client(Status.RUNNING, user_id=7)
    fields = [
        file_part("run.sh", b"true"),
        field_part("user_id", "7"),
        field_part("service", "example"),
        field_part("after", str(first.id)),
    ]
    assert ask(desk.server, "POST", "/upload", form(fields), Content_Type=form_type()["Content-Type"]).status == 201
    desk.clock.pass_s(900)
    assert desk.store.read(joborch.OLDEST_QUEUED) == []
    desk.upload(user_id=2)
    desk.clock.pass_s(60)
    elements = shown(desk, "/dashboard")
    assert "60 s" in elements.text and "16 min" not in elements.text
    assert "/dashboard/jobs/1" in shown(desk, "/dashboard/jobs/2").values("href", "a"), "the job that it follows is a link away"


def test_a_list_is_paged_by_links(desk: Desk) -> None:
    """Each job once, newest first, with the filters kept; the first page alone is live."""
    wanted = [desk.store.add(desk_job(number), "uploaded").id for number in range(2 * page.JOBS_A_PAGE + 3)]
    path, seen = "/dashboard/jobs?user_id=7&status=Queued&service=", list[int]()
    while path:
        elements = shown(desk, path)
        assert bool([each for _, each in elements.found if "data-live" in each]) == (not seen)
        links = elements.values("href", "a")
        seen += [int(link.rpartition("/")[2]) for link in links if re.fullmatch(r"/dashboard/jobs/\d+", link)]
        path = next((link for link in links if "before=" in link), "")
        assert not path or "user_id=7&status=Queued" in path
    assert seen == wanted[::-1]


def desk_job(number: int) -> joborch.NewJob:
    """One of many jobs of user 7."""
    return joborch.NewJob(f"uuid-{number}", user_id=7, service="example")


@pytest.mark.parametrize("query", ["user_id=seven", "status=Nonsense", "service=unknown", "since=yesterday", "before=x"])
def test_a_wrong_filter_is_explained_above_the_filled_form(query: str, desk: Desk) -> None:
    elements = shown(desk, f"/dashboard/jobs?{query}&name=dock", 400)
    assert "give" in elements.text
    assert [each for _, each in elements.found if each.get("role") == "alert" and "hidden" not in each]
    assert "dock" in elements.values("value", "input")
    assert query.startswith(("status", "service", "before")) or query.partition("=")[2] in elements.values("value", "input")


def test_users_in_a_list_lead_to_their_shares(desk: Desk) -> None:
    failed(desk, "why", user_id=8)
    for path in ("/dashboard/jobs", "/dashboard/jobs/1"):
        assert "/dashboard/users?user_id=8" in shown(desk, path).values("href", "a"), path


def test_a_job_shows_its_states_to_scale(desk: Desk) -> None:
    job = desk.upload(name="2oob")
    desk.clock.pass_s(30)
    assert desk.store.claim(job.id, desk.link.name, 100)
    assert desk.store.move(desk[job], Status.SUBMITTED, "", dest_id="7")
    assert desk.store.move(desk[job], Status.RUNNING, "", started_at=desk.clock.wall())
    desk.clock.pass_s(90)
    assert desk.store.move(desk[job], Status.FAILED, "it ran out of memory", cause="limit", ended_at=desk.clock.wall())
    elements = shown(desk, f"/dashboard/jobs/{job.id}")
    widths = {attributes["class"]: float(attributes["width"] or 0) for tag, attributes in elements.found if tag == "rect"}
    assert widths["queued"] == pytest.approx(250, abs=5) and widths["running"] == pytest.approx(750, abs=5)
    assert "Queued for 30 s, then Running for 90 s" in elements.values("aria-label", "svg")
    assert "it ran out of memory" in elements.text and "2oob" in elements.text
    assert f"/jobs/{job.id}/retry" in elements.values("data-post")
    assert elements.values("data-title") == [f"Run job {job.id} again?"]
    assert {each["class"] for tag, each in elements.found if tag == "circle"} == {"queued", "processing", "submitted", "running", "failed"}
    titles = re.findall(r"<(title|h1)>(.*?)</", ask(desk.server, "GET", f"/dashboard/jobs/{job.id}").body.decode())
    assert [re.sub("<.*?>", "", text).partition(" · joborch")[0] for _, text in titles[:2]] == [f"Job {job.id} · 2oob"] * 2


def test_a_job_that_waits_says_for_what_and_can_be_cancelled(desk: Desk) -> None:
    job = desk.upload()
    elements = shown(desk, f"/dashboard/jobs/{job.id}")
    waiting_for = ask(desk.server, "GET", f"/jobs/{job.id}").json["waiting_for"]
    assert waiting_for and waiting_for in elements.text
    assert elements.values("data-title") == [f"Cancel job {job.id}?"] and "not started" in elements.values("data-text")[0]
    assert elements.values("data-post") == [f"/terminate/{job.id}"]
    assert "has not started yet" in elements.text and elements.values("data-log") == []
    assert "1 among the jobs of all users for example" in elements.text
    running = desk.with_client(user_id=8)
    elements = shown(desk, f"/dashboard/jobs/{running.id}")
    assert "files that it has written so far are kept" in elements.values("data-text")[0]
    assert len(elements.values("data-log")) == 2


@pytest.mark.parametrize(("number", "status"), [("99", 404), ("0", 404), ("x", 400), ("1%27", 400)])
def test_there_is_a_page_for_a_job_that_is_not_there(number: str, status: int, desk: Desk) -> None:
    elements = shown(desk, f"/dashboard/jobs/{number}", status)
    assert "Not found" in elements.text if status == 404 else "That does not work" in elements.text


def test_users_with_their_shares(desk: Desk) -> None:
    failed(desk, "", user_id=7)
    desk.upload(user_id=8)
    desk.store.set_weight(7, 2.5)
    text = shown(desk, "/dashboard/users").text
    assert "7example2.5" in text and "8example1" in text
    only = shown(desk, "/dashboard/users?user_id=8")
    assert "/dashboard/jobs?user_id=8" in only.values("href") and "/dashboard/jobs?user_id=7" not in only.values("href")
    wrong = shown(desk, "/dashboard/users?user_id=x", 400)
    assert "whole number" in wrong.text and wrong.values("value", "input") == ["x"]


def test_the_form_has_every_field_of_an_upload(desk: Desk) -> None:
    elements = shown(desk, "/dashboard/submit")
    assert set(joborch.FORM_FIELDS) <= set(elements.values("name"))
    assert "`" not in elements.text and not re.search("inputs_from|callback_url|crlf|user_id", elements.text)
    line_ends = elements.values("value", "option")[-3:]
    assert line_ends == ["", "fix", "keep"]


def test_the_form_says_what_an_empty_field_means(desk: Desk) -> None:
    """For retries and the time limit, if that is the same for all services that the caller may use."""
    desk.restart(SERVICE_EXAMPLE_RETRIES="4", SERVICE_EXAMPLE_TIMEOUT="300")
    text = shown(desk, "/dashboard/submit").text
    assert "infrastructure failure (if empty: 4)" in text and "cores that the script needs (if empty: 1)" in text
    assert "m, h or d (if empty: 5 min)" in text and "M or G (if empty" not in text
    desk.restart(SERVICE_EXAMPLE_RETRIES="4", SERVICE_OTHER_RETRIES="5", SERVICE_OTHER_CLIENTS="http://127.0.0.1:9")
    text = shown(desk, "/dashboard/submit").text
    assert "infrastructure failure (if" not in text and "cores that the script needs (if empty: 1)" in text


def test_filters_are_those_of_the_list(desk: Desk) -> None:
    declared = next(each for each in ROUTES if (each.method, each.path) == ("GET", "/jobs"))
    wanted = {each.name for each in declared.taken("query")} - set(page.NOT_IN_THE_FORM)
    assert {"user_id", "service", "status"} <= wanted <= set(shown(desk, "/dashboard/jobs").values("name"))


# == All of it is text ==


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_names_and_reasons_are_text(text: str, desk: Desk) -> None:
    kept = text.encode("utf-8", "replace").decode()
    job = failed(desk, f"last line of standard error: {kept}", name=kept)
    for path in ("/dashboard", "/dashboard/jobs", f"/dashboard/jobs/{job.id}"):
        elements = shown(desk, path)
        assert page.visible(kept)[:20] in elements.text, path
        assert "\u202e" not in elements.text and "\x1b" not in elements.text


@given(st.text())
def test_whatever_is_written_comes_back_as_text(text: str) -> None:
    """In content and in an attribute, with what cannot be seen made visible."""
    elements = Elements(page.tag("p", text, title=text).encode("utf-8", "replace"))
    wanted = page.visible(text).encode("utf-8", "replace").decode()
    assert [tag for tag, _ in elements.found] == ["p"]
    assert html.unescape(str(elements.found[0][1]["title"])) == html.unescape(wanted) or elements.found[0][1]["title"] == wanted
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", elements.text)


def test_output_is_text_and_only_its_end_is_on_the_page(pair: Any) -> None:
    """Of a script that writes lines of a megabyte, markup, colours and marks of direction."""
    script = (
        r"""head -c 1000000 /dev/zero | tr '\0' x; printf '\n<script>alert(1)</script>\033[31mred\342\200\256evil\n</code></pre><b>bold'"""
    )
    job = run_to_end(pair.server, script)
    answer = pair.server.get(f"/dashboard/jobs/{job['id']}")
    elements = Elements(answer.content)
    assert len(answer.content) < 2 * page.LOG_TAIL_BYTES
    assert "<script>alert(1)</script>␛[31mred⟨U+202E⟩evil\n</code></pre><b>bold" in elements.text
    assert "b" not in [tag for tag, _ in elements.found] and len([1 for tag, _ in elements.found if tag == "script"]) == 1


def test_the_end_of_a_long_output_is_its_end(own_pair: Any) -> None:
    """Whatever its size; all of it is a link away, and what is not there is not searched."""
    pair = own_pair
    job = run_to_end(pair.server, "head -c 34000000 /dev/zero | tr '\\0' x; echo; echo the very end")
    elements = Elements(pair.server.get(f"/dashboard/jobs/{job['id']}").content)
    assert "xxx\nthe very end\n" in elements.text and "its end, 64 KiB" in elements.text
    assert "It wrote nothing to standard error." in elements.text
    (link,) = [each for each in elements.values("href", "a") if "inline=1" in each]
    whole = pair.server.get(link)
    assert (len(whole.content), whole.headers["Content-Type"][:10]) == (34_000_014, "text/plain")
    assert "search-text" in elements.values("id")
    silent = Elements(pair.server.get(f"/dashboard/jobs/{run_to_end(pair.server, 'true')['id']}").content)
    assert "search-text" not in silent.values("id")


def test_many_files_are_paged_by_links(pair: Any) -> None:
    """Each of them once."""
    count = 2 * page.FILES_A_PAGE
    job = run_to_end(pair.server, f"for i in $(seq {count}); do : > f$i; done")
    path, seen = f"/dashboard/jobs/{job['id']}", list[str]()
    while path:
        elements = Elements(pair.server.get(path).content)
        links = elements.values("href", "a")
        seen += [link for link in links if re.search(r"/files/f\d+$", link)]
        path = next((link for link in links if "&after=" in link), "").partition("#")[0]
    assert len(seen) == len(set(seen)) == count


def test_files_are_listed_with_links_that_lead_to_them(pair: Any) -> None:
    job = run_to_end(pair.server, "mkdir -p 'a b'; echo text > 'a b/<i>%.txt'")
    elements = Elements(pair.server.get(f"/dashboard/jobs/{job['id']}").content)
    assert "a b/<i>%.txt" in elements.text and "i" not in [tag for tag, _ in elements.found]
    (link,) = [each for each in elements.values("href", "a") if each.endswith(".txt")]
    assert pair.server.get(link).text == "text\n"


# == Who may see it ==


def test_no_page_shows_anything_to_a_stranger(desk: Desk) -> None:
    """All that is declared is walked, so that a new page cannot forget to ask."""
    failed(desk, "a secret reason", name="a secret name")
    desk.server.tokens = ("right",)
    paths = [declared.path for declared in ROUTES if declared.path.startswith("/dashboard") and declared.path != "/dashboard/files/<name>"]
    assert len(paths) >= 5
    for path in paths:
        said = ask(desk.server, "GET", path.replace("<job_id>", "1"), caller=None)
        elements = Elements(said.body)
        check_policy(said, elements)
        assert said.status == 401 and elements.values("id", "input") == ["token"], path
        assert "secret" not in elements.text and desk.link.name not in elements.text
    desk.server.tokens = ()
    said = ask(desk.server, "GET", "/dashboard", caller=None)
    assert said.status == 403 and b"set JOBORCH_TOKEN" in said.body.replace(b"Set", b"set")


def signed_in(desk: Desk, token: str = "right", **fields: str) -> Said:
    """The answer to the form that asks for a token."""
    body = urlencode({"token": token, **fields}).encode()
    return ask(desk.server, "POST", "/session", body, caller=None, Host="127.0.0.1:5000", Origin="http://127.0.0.1:5000")


def test_a_session_ends_and_cannot_be_made_up(desk: Desk, yard: Yard) -> None:
    desk.server.tokens = ("other", "right")
    said = signed_in(desk)
    cookie, *attributes = said.headers["Set-Cookie"].split("; ")
    assert said.status == 303 and set(attributes) == {"Path=/", "Max-Age=43200", "HttpOnly", "SameSite=Strict"}
    csrf = joborch.csrf_token_of(desk.server, f"theme=dark; {cookie}; x=y")
    assert csrf and "right" not in cookie
    for wrong in (cookie[:-1] + ("0" if cookie[-1] != "0" else "1"), cookie.replace("=1", "=2", 1), cookie.upper(), "x" + cookie, ""):
        assert joborch.csrf_token_of(desk.server, wrong) is None, wrong
    yard.client.tokens = ("right",)
    assert joborch.csrf_token_of(yard.client, cookie) is None, "a client has no page"
    desk.server.tokens = ("other",)
    assert joborch.csrf_token_of(desk.server, cookie) is None, "it is valid as long as its token"
    desk.server.tokens = ("right",)
    desk.clock.pass_s(joborch.SESSION_S - 60)
    assert joborch.csrf_token_of(desk.server, cookie) == csrf
    desk.clock.pass_s(120)
    assert joborch.csrf_token_of(desk.server, cookie) is None


@pytest.mark.parametrize(
    "to",
    ["//evil.example", "https://evil.example", "/dashboard/%0d%0aX:1", "/upload", "/dashboardx@evil", "\\evil", "/dashboard?a\r\nX: 1"],
)
def test_signing_in_leads_to_the_page_alone(to: str, desk: Desk) -> None:
    desk.server.tokens = ("right",)
    for wanted in ("/dashboard/jobs/7", "/dashboard/jobs?user_id=7&status=Failed"):
        asked = ask(desk.server, "GET", wanted, caller=None)
        assert (asked.status, Elements(asked.body).values("value", "input")) == (401, [wanted])
        assert signed_in(desk, to=wanted).headers["Location"] == wanted
    assert re.fullmatch(r"/dashboard[a-z]*", signed_in(desk, to=to).headers["Location"])


def test_a_wrong_token_gets_the_question_again(desk: Desk) -> None:
    desk.server.tokens = ("right",)
    said = signed_in(desk, "wrong", to="/dashboard/jobs")
    assert said.status == 401 and b"The token is wrong." in said.body and "Set-Cookie" not in said.headers
    assert Elements(said.body).values("value", "input") == ["/dashboard/jobs"]
    assert desk.server.refused.count + (desk.server.refused.quiet_until > 0) >= 1


@pytest.fixture(name="guarded", scope="module")
def guarded_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server that wants a token."""
    process = Process("server", tmp_path_factory.mktemp("guarded"), {"JOBORCH_TOKEN": "the-right-token"})
    try:
        yield process.start()
    finally:
        process.close()


def test_a_browser_without_javascript_signs_in_and_out(guarded: Process) -> None:
    """The cookie does for pages, downloads and the API; the token is in none of them."""
    with requests.Session() as browser:
        asked = browser.get(f"{guarded.url}/", headers={"Accept": "text/html"})
        assert asked.status_code == 401 and asked.url.endswith("/dashboard")
        assert browser.get(f"{guarded.url}/jobs").status_code == 401
        page_shown = browser.post(f"{guarded.url}/session", data={"token": "the-right-token", "to": "/dashboard/jobs"})
        assert page_shown.status_code == 200 and page_shown.url.endswith("/dashboard/jobs")
        assert browser.get(f"{guarded.url}/jobs").json()["jobs"] == []
        assert "the-right-token" not in page_shown.text + str(browser.cookies)
        browser.post(f"{guarded.url}/session", data={"token": ""})
        assert browser.get(f"{guarded.url}/jobs").status_code == 401


def test_a_session_changes_nothing_without_its_csrf_token(guarded: Process) -> None:
    with requests.Session() as browser:
        page_shown = browser.post(f"{guarded.url}/session", data={"token": "the-right-token"})
        (csrf,) = re.findall(r'name="csrf" content="([0-9a-f]{64})"', page_shown.text)
        path = f"{guarded.url}/users/7?weight=2"
        for headers, status in (
            ({}, 403),
            ({"X-CSRF-Token": "0" * 64}, 403),
            ({"X-CSRF-Token": csrf, "Origin": "http://evil.example"}, 403),
            ({"X-CSRF-Token": csrf, "Sec-Fetch-Site": "cross-site"}, 403),
            ({"X-CSRF-Token": csrf, "Origin": guarded.url}, 200),
        ):
            assert browser.put(path, headers=headers).status_code == status, headers
        assert browser.get(f"{guarded.url}/jobs", headers={"Origin": "http://evil.example"}).status_code == 403
        assert browser.get(f"{guarded.url}/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401, "a token comes first"
        foreign = browser.post(f"{guarded.url}/session", data={"token": ""}, headers={"Origin": "http://evil.example"})
        assert foreign.status_code == 403, "nobody else signs him out"


def test_over_tls_the_cookie_is_for_tls_alone(desk: Desk) -> None:
    desk.server.tokens = ("right",)
    said = ask(desk.server, "POST", "/session", b"token=right", caller=None, Host="jobs.example", Origin="https://jobs.example")
    assert said.headers["Set-Cookie"].endswith("; Secure")


# == What it costs ==


def test_its_files_are_small_and_kept_by_browsers(desk: Desk) -> None:
    sizes = 0
    for name in page.FILES:
        said = ask(desk.server, "GET", f"/dashboard/files/{name}")
        sizes += len(said.body)
        assert ask(desk.server, "GET", f"/dashboard/files/{name}", If_None_Match=said.headers["Etag"]).status == 304
    assert sizes + len(ask(desk.server, "GET", "/dashboard").body) < 150_000
    assert ask(desk.server, "GET", "/dashboard/files/page.html").status == 404
    assert not re.search(r"https?://(?!www\.w3\.org/)", "".join(path.read_text() for path in Path(page.__file__).with_suffix("").iterdir()))


def test_a_page_costs_the_same_whatever_the_number_of_jobs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in steps of SQLite's virtual machine: with twice the jobs there are not more of them."""

    def steps_of(path: str) -> int:
        counted = [0]

        def count() -> None:
            counted[0] += 1

        real = desk.store.read

        def read(sql: str, **values: Any) -> Any:
            desk.store.db.set_progress_handler(count, 100)  # type: ignore[arg-type]
            try:
                return desk.store.db.execute(sql, values).fetchall()
            finally:
                desk.store.db.set_progress_handler(None, 0)

        monkeypatch.setattr(desk.store, "read", read)
        shown(desk, path)
        monkeypatch.setattr(desk.store, "read", real)
        return counted[0]

    fill(desk, 40_000)
    before = {path: steps_of(path) for path in PAGES}
    fill(desk, 40_000)
    desk.clock.pass_s(page.RECENT_S)
    for path, steps in before.items():
        assert steps_of(path) <= 1.1 * steps + 10, path


def fill(desk: Desk, count: int) -> None:
    """Add many jobs that have completed."""
    sql = """
    WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < :count)
    INSERT INTO jobs (uuid, user_id, service, status, reason, created_at, started_at, ended_at, moved_at, arrived_at)
    SELECT hex(randomblob(8)), n % 100, 'example', 'Completed', 'exit status 0', :now - n % 40000, :now, :now, :now, :now FROM c
    """
    desk.store.write(lambda db: db.execute(sql, {"count": count, "now": desk.clock.wall()}).rowcount)


def test_the_page_is_in_the_archive(pyz: Path, make_process: MakeProcess) -> None:
    """joborch.pyz serves it as a checkout does."""
    process = make_process("server", {"JOBORCH_ALLOW_ANONYMOUS": "1"}, program=[sys.executable, str(pyz)]).start()
    assert "Failures of the last day" in process.get("/dashboard").text
    for name, (_, content) in page.FILES.items():
        assert process.get(f"/dashboard/files/{name}").content == content
