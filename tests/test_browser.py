"""The web page in a real browser: jobs are sent, followed, cancelled and run again as a person does it, by mouse, keyboard and phone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from harness import Pair, Process, run_to_end, submit, wait_for, wait_status

PAGES = ("", "/jobs", "/jobs/1", "/submit", "/users")
PATIENCE_MS = 60_000
LONG = "for i in $(seq 600); do echo step $i; sleep 0.5; done"
Opened = Callable[..., Any]


@pytest.fixture(name="site", scope="module")
def site_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair with one job that has failed, whose texts try to be more than text."""
    made = Pair(tmp_path_factory.mktemp("site"), {"SERVICE_EXAMPLE_RUNS_PER_USER": "9"}, {"JOBORCH_SLOTS": "8"})
    try:
        made.start()
        script = "echo '<script>alert(1)</script>'; printf '\\033[31mred\\033[0m \\342\\200\\256evil'; echo '<b>bold' >&2; exit 3"
        assert run_to_end(made.server, script, name="<img src=x onerror=alert(1)>مرحبا", user_id=7)["id"] == 1
        yield made
    finally:
        made.close()


def is_trouble(message: Any) -> bool:
    """Whether a message on the console is an error, and not one of those that a test provokes."""
    return message.type == "error" and not re.search(r"responded with a status of 40[01] ", message.text)


@pytest.fixture(name="opened")
def opened_fixture(browser: Any, site: Pair) -> Iterator[Opened]:
    """Opens pages; in the end none has asked another host, shown an error or opened a dialog of the browser's own."""
    contexts: list[Any] = []
    asked: list[str] = []
    troubles: list[str] = []

    def open_page(path: str, server: Process = site.server, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        shown = contexts[-1].new_page()
        shown.set_default_timeout(PATIENCE_MS)
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("pageerror", lambda error: troubles.append(str(error)))
        shown.on("console", lambda message: troubles.append(message.text) if is_trouble(message) else None)
        shown.on("dialog", lambda dialog: troubles.append(f"a dialog: {dialog.message}"))
        shown.goto(f"{server.url}/dashboard{path}")
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not re.match(r"http://127\.0\.0\.1:|data:|blob:http://127\.0\.0\.1:", url)]
    assert not troubles


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_and_phones_need_not_scroll_sideways(opened: Opened, site: Pair, colours: str) -> None:
    """Contrast, labels, names, landmarks: on each page, in both colours, as wide as a phone and as a desk."""
    shown = opened("", color_scheme=colours, viewport={"width": 360, "height": 740})
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    for path in PAGES:
        shown.goto(f"{site.server.url}/dashboard{path}")
        for width in (360, 1280):
            shown.set_viewport_size({"width": width, "height": 740})
            assert shown.evaluate("document.documentElement.scrollWidth") <= width, path
            shown.evaluate(f"{axe}; void 0")  # not as an element, which the policy of the page forbids
            found = shown.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
            assert not [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found], (path, width)


def test_a_folder_that_is_dropped_runs(opened: Opened, tmp_path: Path) -> None:
    """With a file in a folder of its own; the form says what is missing, and the job's page how it went."""
    (tmp_path / "my job" / "data").mkdir(parents=True)
    (tmp_path / "my job" / "run.sh").write_text("cat data/a.txt; sleep 1; echo done")
    (tmp_path / "my job" / "data" / "a.txt").write_text("from a folder\n")
    shown = opened("/submit")
    box = shown.locator("#drop").bounding_box()
    devtools = shown.context.new_cdp_session(shown)
    data = {"items": [], "files": [str(tmp_path / "my job")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": box["x"] + 40, "y": box["y"] + 40, "data": data})
    shown.locator("#chosen li").nth(1).wait_for()
    assert {text.split()[0] for text in shown.locator("#chosen li").all_inner_texts()} == {"run.sh", "data/a.txt"}
    shown.get_by_label("User").fill("7")
    shown.get_by_label("Name").fill("dropped")
    shown.get_by_text("More", exact=True).click()
    shown.get_by_label("Timeout").fill("soon")
    shown.get_by_role("button", name="Send the job").click()
    shown.get_by_role("alert").get_by_text("timeout is 'soon'").wait_for()
    shown.get_by_label("Timeout").fill("5m")
    shown.get_by_role("button", name="Send the job").click()
    shown.wait_for_url("**/dashboard/jobs/*")
    shown.locator("#output").get_by_text("from a folder").wait_for()
    shown.locator("#job .status.completed").wait_for()
    shown.locator("#output").get_by_text("done").wait_for()
    shown.get_by_role("link", name="Download the result").wait_for()


def test_a_running_job_is_followed_searched_and_cancelled_by_keyboard(opened: Opened, site: Pair) -> None:
    """Its page changes by itself; the question can be declined."""
    number = submit(site.server, LONG, user_id=7)
    shown = opened(f"/jobs/{number}")
    shown.locator("#output").get_by_text("step 3").wait_for()
    shown.get_by_label("Find in the output").fill("STEP 2")
    shown.locator("mark.here").wait_for()
    assert shown.locator("#search-count").inner_text().startswith("1 of ")
    for answer in ("Keep it running", "Cancel the job"):
        shown.locator("#job").get_by_role("button", name="Cancel the job").focus()
        shown.keyboard.press("Enter")
        shown.get_by_role("dialog", name=f"Cancel job {number}?").wait_for()
        shown.locator("dialog").get_by_role("button", name=answer).focus()
        shown.keyboard.press("Enter")
        shown.locator("dialog").wait_for(state="hidden")
        if answer == "Keep it running":
            assert site.server.job(number)["status"] == "Running"
    shown.locator("#job .status.killed").wait_for()
    assert shown.locator("#history rect.killed").count() == 1
    shown.get_by_role("button", name="Run it again").click()
    shown.get_by_role("dialog", name=f"Run job {number} again?").get_by_role("button", name="Run it again").click()
    shown.wait_for_url(lambda url: not url.endswith(f"/{number}"))
    again = int(shown.url.rpartition("/")[2])
    wait_status(site.server, again, "Running")
    shown.locator("#job .status.running").wait_for()
    site.server.post(f"/terminate/{again}")
    shown.locator("#job .status.killed").wait_for()


AT_END = "() => { const box = document.querySelector('#stdout pre'); return box.scrollTop + box.clientHeight > box.scrollHeight - 4; }"
PLACE = "() => { const box = document.querySelector('#stdout pre'); return [box.scrollTop, box.clientHeight, box.scrollHeight]; }"


def test_who_reads_the_output_is_not_disturbed_by_its_end(opened: Opened, site: Pair, tmp_path: Path) -> None:
    """Nor by its start: a job that waits has no empty boxes. What is searched for and where one reads stays as it is."""
    gate = tmp_path / "gate"
    number = submit(site.server, f"seq 300; until [ -e {gate} ]; do sleep 0.1; done; echo the end", user_id=7)
    second = opened(f"/jobs/{submit(site.server, 'echo second', user_id=7, after=number)}")
    second.locator("#output").get_by_text("has not started yet").wait_for()
    shown = opened(f"/jobs/{number}")
    shown.locator("#stdout").get_by_text("300").wait_for()
    assert shown.locator("#stderr code").evaluate("code => getComputedStyle(code, '::before').content") == '"nothing yet"'
    count = shown.locator("#search-count")
    shown.get_by_label("Find in the output").fill("15")
    count.get_by_text("1 of 13").wait_for()
    shown.get_by_role("button", name="Previous").click()
    count.get_by_text("13 of 13").wait_for()
    shown.get_by_label("Find in the output").fill("")
    shown.wait_for_function(AT_END)
    shown.get_by_label("Find in the output").fill("150")
    count.get_by_text("1 of 1", exact=True).wait_for()
    top, height, whole = before = shown.evaluate(PLACE)
    middle = shown.evaluate("() => document.querySelector('mark').offsetTop - document.querySelector('#stdout pre').offsetTop") - top
    assert 0 < top < whole - height - 100 and abs(middle - height / 2) < 60
    gate.touch()
    shown.locator("#output").get_by_text("It wrote nothing to standard error.").wait_for()
    shown.locator("#stdout").get_by_text("the end").wait_for()
    assert shown.get_by_label("Find in the output").input_value() == "150" and count.inner_text() == "1 of 1"
    assert shown.evaluate(PLACE)[:2] == before[:2]
    second.locator("#stdout").get_by_text("second").wait_for()


SHOW = """hidden => {
    Object.defineProperty(document, 'hidden', {configurable: true, get: () => hidden});
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_many_tabs_share_the_connections_of_a_browser(opened: Opened, site: Pair, tmp_path: Path) -> None:
    """It makes six to a server: a tab that is not shown keeps none of them, and goes on where it was when it is shown again."""
    step = tmp_path / "step"
    number = submit(site.server, f"echo one; echo one >&2; until [ -e {step} ]; do sleep 0.1; done; echo two; sleep 600", user_id=7)
    first = opened(f"/jobs/{number}")
    tabs = [first, *(first.context.new_page() for _ in range(6))]
    for tab in tabs:
        tab.set_default_timeout(PATIENCE_MS)
        if tab is not first:
            tab.goto(first.url)
        tab.locator("#stdout").get_by_text("one").wait_for()
        tab.locator("#stderr").get_by_text("one").wait_for()
        tab.evaluate(SHOW, True)
    step.touch()
    first.evaluate(SHOW, False)
    first.locator("#stdout").get_by_text("two").wait_for()
    assert first.locator("#stdout code").inner_text() == "one\ntwo\n"
    site.server.post(f"/terminate/{number}")
    first.locator("#job .status.killed").wait_for()
    for tab in tabs[1:]:
        tab.close()


def test_the_form_says_what_is_missing_in_words_of_the_page(opened: Opened) -> None:
    """And shows the field, although it is folded away."""
    shown = opened("/submit")
    send, user, alert = shown.get_by_role("button", name="Send the job"), shown.locator("#field-user_id"), shown.locator("#trouble")
    user.fill("bob")
    send.click()
    assert user.evaluate("field => field.validationMessage") == "Give a whole number, as in 7."
    user.fill("7")
    send.click()
    alert.get_by_text("choose run.sh, or write the script below").wait_for()
    shown.set_input_files("#files", {"name": "2oob.pdb", "mimeType": "text/plain", "buffer": b"ATOM"})
    send.click()
    alert.get_by_text("No file is called run.sh").wait_for()
    shown.set_input_files("#files", {"name": "run.sh", "mimeType": "text/plain", "buffer": b"echo hello\r\n"})
    send.click()
    alert.get_by_text("choose “change them to LF” at Line ends").wait_for()
    assert "-F" not in alert.inner_text()
    shown.locator("#field-crlf:focus").select_option(label="change them to LF")
    send.click()
    shown.wait_for_url("**/dashboard/jobs/*")
    shown.locator("#stdout").get_by_text("hello").wait_for()


def test_back_shows_a_form_that_can_be_sent_again(opened: Opened) -> None:
    """A browser may show the page as it was left, in the middle of sending; it says so with an event."""
    shown = opened("/submit")
    shown.evaluate("showSending(document.getElementById('submit'), true)")
    assert shown.locator("#progress-label").is_visible() and shown.get_by_role("button", name="Send the job").is_disabled()
    shown.evaluate("window.dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    assert not shown.locator("#progress-label").is_visible() and shown.get_by_role("button", name="Send the job").is_enabled()


def test_filters_are_folded_on_a_phone_and_lead_to_the_results(opened: Opened, site: Pair) -> None:
    shown = opened("/jobs", viewport={"width": 360, "height": 740})
    assert not shown.get_by_label("Name").is_visible()
    shown.locator("summary").click()
    shown.get_by_label("User").fill("7")
    shown.keyboard.press("Enter")
    shown.wait_for_url("**user_id=7**")
    shown.locator("#results:focus").get_by_text("Jobs that match").wait_for()
    assert shown.locator("summary").inner_text() == "Filter (1 set)" and not shown.get_by_label("Name").is_visible()
    shown.set_viewport_size({"width": 1280, "height": 740})
    shown.get_by_label("Name").wait_for()
    shown.set_viewport_size({"width": 360, "height": 740})
    shown.goto(f"{site.server.url}/dashboard/jobs?since=yesterday")
    shown.get_by_role("alert").get_by_text("since is 'yesterday'").wait_for()
    assert shown.get_by_label("Since").is_visible() and shown.get_by_label("Since").input_value() == "yesterday"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def test_text_and_a_picture_of_a_result_are_shown(opened: Opened, site: Pair) -> None:
    """A hostile text as text, a picture as a picture; the files of a running job are a link away."""
    script = (
        f"mkdir 'a b'; echo '<b>bold' > 'a b/ü.txt'; echo {PIXEL} | base64 -d > plot.png; echo none > broken.png; : > empty.txt; "
        "touch ready; sleep 600"
    )
    number = submit(site.server, script, user_id=7)
    shown = opened(f"/jobs/{number}")
    shown.locator("#job .status.running").wait_for()
    wait_for(lambda: site.server.get(f"/jobs/{number}/files/ready").status_code == 200, what="the files of the running job")
    shown.get_by_role("link", name="Show its files as they are now").click()
    shown.get_by_role("link", name="a b/ü.txt").click()
    shown.locator("#preview pre").get_by_text("<b>bold").wait_for()
    shown.get_by_role("link", name="plot.png").click()
    picture = shown.locator("#preview img")
    picture.wait_for()
    assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth; }") == 1
    assert picture.get_attribute("alt") == "plot.png"
    shown.get_by_role("link", name="broken.png").click()
    shown.locator("#preview").get_by_text("It is no picture that a browser can show.").wait_for()
    shown.get_by_role("link", name="empty.txt").click()
    shown.locator("#preview").get_by_text("It is empty.").wait_for()
    site.server.post(f"/terminate/{number}")


def test_the_overview_follows_and_drains(opened: Opened, site: Pair) -> None:
    """What runs shows by itself, and a client is drained and resumed with one button."""
    shown = opened("")
    number = submit(site.server, LONG, user_id=7)
    shown.locator("#clients svg[aria-label='1 of 8 in use']").wait_for()
    shown.get_by_role("button", name="Drain").click()
    shown.get_by_role("button", name="Resume").wait_for()
    assert site.server.get("/clients").json()["clients"][0]["drained"]
    shown.get_by_role("button", name="Resume").click()
    shown.get_by_role("button", name="Drain").wait_for()
    site.server.post(f"/terminate/{number}")
    shown.locator("#clients svg[aria-label='0 of 8 in use']").wait_for()


def test_without_javascript_everything_can_be_read(opened: Opened, site: Pair) -> None:
    """From the overview by links to the output of the job that failed; buttons that would do nothing are hidden."""
    shown = opened("", java_script_enabled=False)
    shown.get_by_role("link", name="Jobs").click()
    shown.get_by_label("User").fill("7")
    shown.get_by_role("button", name="Filter").click()
    shown.get_by_role("link", name="1", exact=True).click()
    assert shown.locator("#output").inner_text().count("<script>alert(1)</script>") == 1
    assert "␛[31mred␛[0m ⟨U+202E⟩evil" in shown.locator("#output").inner_text()
    assert "<img src=x onerror=alert(1)>مرحبا" in shown.locator("h1").inner_text()
    assert shown.locator("button[data-post]:visible").count() == 0
    shown.goto(f"{site.server.url}/dashboard/submit")
    assert shown.locator("form:visible").count() == 0 and "needs JavaScript" in shown.locator("main").inner_text()


def test_times_are_in_the_readers_language_and_zone(opened: Opened) -> None:
    shown = opened("/jobs/1", locale="de-DE", timezone_id="Asia/Tokyo")
    stamp = shown.locator("time").first.get_attribute("datetime")
    wanted = shown.evaluate("stamp => new Date(stamp).toLocaleString('de-DE', {dateStyle: 'short', timeStyle: 'medium'})", stamp)
    shown.locator("time").first.get_by_text(wanted).wait_for()
    assert re.match(r"\d\d\.\d\d\.\d\d, ", wanted)
    assert shown.locator("h1 bdi, #job bdi").first.evaluate("element => getComputedStyle(element).unicodeBidi") == "isolate"


def test_a_browser_signs_in_sends_and_cancels(opened: Opened, tmp_path: Path) -> None:
    """At a server that wants a token: every call of the page has its cookie, and each change its CSRF token."""
    guarded = Process("server", tmp_path / "guarded", {"JOBORCH_TOKEN": "the-right-token"})
    with contextlib.closing(guarded.start()):
        shown = opened("/submit", guarded)
        shown.get_by_label("Token").fill("the-right-token")
        shown.get_by_role("button", name="Sign in").click()
        shown.get_by_label("Or write the script here").fill("sleep 600")
        shown.get_by_label("User").fill("7")
        shown.get_by_role("button", name="Send the job").click()
        shown.wait_for_url("**/dashboard/jobs/1")
        shown.locator("#job .status.queued").wait_for()
        shown.get_by_role("button", name="Cancel the job").click()
        shown.locator("dialog").get_by_role("button", name="Cancel the job").click()
        shown.locator("#job .status.killed").wait_for()
        shown.get_by_role("button", name="Sign out").click()
        shown.get_by_label("Token").wait_for()


def test_who_is_signed_out_loses_neither_the_form_nor_the_way(opened: Opened, tmp_path: Path) -> None:
    """What is filled in is sent after signing in again in another tab; a link with filters leads there after signing in."""
    guarded = Process("server", tmp_path / "guarded", {"JOBORCH_TOKEN": "the-right-token"})
    with contextlib.closing(guarded.start()):
        shown = opened("/jobs?user_id=7", guarded)
        shown.get_by_label("Token").fill("the-right-token")
        shown.get_by_role("button", name="Sign in").click()
        shown.wait_for_url("**/dashboard/jobs?user_id=7")
        shown.goto(f"{guarded.url}/dashboard/submit")
        shown.get_by_label("Or write the script here").fill("sleep 600")
        shown.get_by_label("User").fill("7")
        shown.context.clear_cookies()
        shown.get_by_role("button", name="Send the job").click()
        shown.locator("#trouble").get_by_text("sign in again in another tab").wait_for()
        other = shown.context.new_page()
        other.goto(f"{guarded.url}/dashboard")
        other.get_by_label("Token").fill("the-right-token")
        other.get_by_role("button", name="Sign in").click()
        other.get_by_role("button", name="Sign out").wait_for()
        shown.get_by_role("button", name="Send the job").click()
        shown.wait_for_url("**/dashboard/jobs/1")
        shown.close()  # before its server


def test_files_are_dropped_anywhere_on_the_page(opened: Opened, tmp_path: Path) -> None:
    """Beside the frame the browser would open them in place of the form; many are counted, in the order of their names."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        (folder / f"f{number:03}").write_text("x" * 10)
    shown = opened("/submit")
    devtools = shown.context.new_cdp_session(shown)
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 10, "data": data})
    shown.get_by_text("300 files, 2.9 KiB; the first 200 of them:").wait_for()
    assert shown.locator("#chosen li").first.inner_text().startswith("f000 10 bytes") and shown.locator("#chosen li").count() == 200
