"""Benchmark of what people and monitors look at beside a long queue: the web page in Chromium, and /metrics."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from collections.abc import Iterator
from typing import Any

from bench_base import Caller, Measure, Place, end, request, usage
from bench_queue import BACKLOG_SMALL, BACKLOG_USERS, backlogged_site
from bench_site import Site
from harness import CHROMIUM, CHROMIUM_ARGS

VIEWS = {"overview": "", "jobs": "/jobs", "failures of a user": "/jobs?user_id=7&status=Failed&since=1d", "one job": "/jobs/2"}
LOOKS, SCRAPES = 9, 50
# Half of the jobs have ended within the last day, a tenth of these badly.
ENDED = """
UPDATE jobs SET status = iif(id % 20, 'Completed', 'Failed'), cause = iif(id % 20, NULL, 'user'), exit_code = iif(id % 20, 0, 1),
       reason = iif(id % 20, 'exit status 0', 'exit status ' || id % 7), started_at = arrived_at - id % 80000,
       ended_at = arrived_at - id % 80000 + 1
 WHERE id > 1 AND id % 2 = 0
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint').length > 0"
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SENT = """
['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind)).reduce((sum, each) => sum + each.transferSize, 0)
"""


def first_look(browser: Any, url: str) -> tuple[float, float]:
    """The first contentful paint in ms of a page that the browser never saw, and the KB that came for it."""
    context = browser.new_context()
    try:
        shown = context.new_page()
        shown.goto(url, wait_until="load")
        while not shown.evaluate(PAINTED):  # wait_for_function would need eval, which the page forbids
            shown.wait_for_timeout(5)
        return float(shown.evaluate(PAINT)), float(shown.evaluate(SENT)) / 1000
    finally:
        context.close()


def looks_at(site: Site) -> Iterator[tuple[str, float, str]]:
    """Each view's first paint and size, and what a scrape costs."""
    from playwright.sync_api import sync_playwright  # other benchmarks do without

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS)
        for name, path in VIEWS.items():
            url = f"http://127.0.0.1:{site.port}/dashboard{path}"
            paints, sizes = zip(*(first_look(browser, url) for _ in range(LOOKS)))
            yield f"{name}, first paint", statistics.median(paints), "ms"
            yield f"{name}, size", statistics.median(sizes), "KB"
        browser.close()
    with Caller(site.port) as caller:
        begin, before = time.perf_counter(), usage(site.processes["server"].pid).cpu_s
        for _ in range(SCRAPES):
            caller.ask(request("GET", "/metrics"))
        yield "/metrics, wall", (time.perf_counter() - begin) / SCRAPES * 1000, "ms"
        yield "/metrics, CPU", (usage(site.processes["server"].pid).cpu_s - before) / SCRAPES * 1000, "ms"


def page(place: Place, size: int) -> Iterator[Measure]:
    """First paint of the web page in Chromium, and a scrape, with half of the jobs queued and half of them ended."""
    seen: dict[int, dict[str, tuple[float, str]]] = {}
    for count in (BACKLOG_SMALL, size):
        with backlogged_site(place, count, BACKLOG_USERS) as site:
            with contextlib.closing(sqlite3.connect(site.folder / "server" / "joborch.db")) as db, db:
                db.execute(ENDED)
            site.start("server")
            seen[count] = {name: (value, unit) for name, value, unit in looks_at(site)}
            end(site.processes["server"])
    for name, (value, unit) in seen[size].items():
        yield Measure(name, value, unit, seen[BACKLOG_SMALL][name][0])
