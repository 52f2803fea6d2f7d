#!/usr/bin/env python3
"""Take the pictures of the web page in docs/: tests/screenshots.py. It needs Chromium and the packages of tests/requirements.txt."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import CHROMIUM, CHROMIUM_ARGS, EXAMPLE, ROOT, Pair, run_to_end, submit, wait_status
from playwright.sync_api import sync_playwright

CLIENTS = {"SERVICE_DOCKING_RUNS_PER_USER": "3", "SERVICE_DOCKING_MAX_RUNS": "8"}
DESK, PHONE = {"viewport": {"width": 1200, "height": 1000}}, {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2}
WORK = 'for i in $(seq 900); do echo "step $i: energy -$((4200 + i * 7 % 90)).$((i * 37 % 10)) kcal/mol"; sleep 0.2; done'
FAILS = "echo 'reading ligand.sdf'; echo 'ligand.sdf: no such file' >&2; exit 2"
AGES_S = (38000, 36500, 31000, 26000, 25500, 21000, 18000, 16500, 12000, 9000, 8000, 5200, 3600, 1900, 600)


def make_jobs(pair: Pair) -> tuple[int, int]:
    """Run jobs of several users; return the ids of one that runs and one that has failed."""
    server = pair.server
    data = {"2oob.pdb": (EXAMPLE / "2oob.pdb").read_bytes()}
    failed = []
    for number in range(12):
        script, name = (EXAMPLE / "run.sh").read_text(), f"2oob pose {number + 1}"
        run_to_end(server, script, data, service="docking", user_id=1 + number % 4, name=name)
        if number % 4 == 2:
            failed.append(run_to_end(server, FAILS, service="docking", user_id=7, name=f"ligand {number}")["id"])
    running = [submit(server, WORK, service="docking", user_id=user, name=f"relax {user}") for user in (1, 1, 2, 3, 3)]
    for user in (1, 1, 1, 2):
        submit(server, WORK, service="docking", user_id=user, name=f"relax {user}")
    wait_status(server, running[-1], "Running")
    return running[0], failed[-1]


def spread_over_hours(pair: Pair) -> None:
    """Move the jobs that have ended into the past, so that the charts show a day's work. The server is stopped meanwhile."""
    import sqlite3

    (path,) = pair.server.data.glob("*.db")
    with sqlite3.connect(path) as db:
        for number, age_s in enumerate(AGES_S, 1):
            wait_s = 20 + number * 37 % 200
            columns = ", ".join(f"{name} = {name} - :age_s" for name in ("started_at", "ended_at", "moved_at"))
            db.execute(
                f"UPDATE jobs SET {columns}, created_at = created_at - :age_s - :wait_s WHERE id = :id",
                {"age_s": age_s, "wait_s": wait_s, "id": number},
            )
            db.execute(
                "UPDATE history SET at = at - :age_s - CASE number WHEN 1 THEN :wait_s ELSE 0 END WHERE job_id = :id",
                {"age_s": age_s, "wait_s": wait_s, "id": number},
            )
    db.close()


def take(browser: Any, url: str, name: str, ready: str, **options: Any) -> None:
    """Take one picture, once an element is there."""
    context = browser.new_context(locale="en-GB", **options)
    page = context.new_page()
    if name == "submit":
        page.set_viewport_size({"width": 1200, "height": 700})
    page.goto(url)
    page.locator(ready).first.wait_for()
    if name == "submit":
        page.set_input_files("#files", [EXAMPLE / "run.sh", EXAMPLE / "2oob.pdb"])
        page.get_by_label("User").fill("7")
        page.get_by_label("Name").fill("2oob contacts")
    page.screenshot(path=ROOT / "docs" / f"page-{name}.png")
    context.close()


def main() -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(Path(folder), CLIENTS, {"JOBORCH_SLOTS": "8"})
        pair.server.settings = {name.replace("EXAMPLE", "DOCKING"): value for name, value in pair.server.settings.items()}
        try:
            pair.start()
            running, failed = make_jobs(pair)
            pair.server.stop()
            spread_over_hours(pair)
            pair.server.start()
            wait_status(pair.server, running, "Running")
            pages = pair.server.url + "/dashboard"
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS)
                take(browser, pages, "overview", "#clients svg", **DESK)
                take(browser, f"{pages}/jobs/{running}", "job", "#output code:has-text('step 9')", **DESK)
                take(browser, f"{pages}/submit", "submit", "#drop", **DESK)
                take(browser, f"{pages}/jobs/{failed}", "phone", "#output code", **PHONE)
                take(browser, f"{pages}/jobs", "dark", "#jobs table", color_scheme="dark", **DESK)
                browser.close()
        finally:
            pair.close()


if __name__ == "__main__":
    sys.exit(main())
