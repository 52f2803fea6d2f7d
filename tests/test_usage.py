"""What a script uses: over its memory, its processes or the size of its work folder, its job is Failed, and says how much it was."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ENDED, NOBODY_UID, SCRIPT_UIDS, Pair, open_program, submit, wait_for, wait_status
from world import Yard

import joborch
from joborch import DataFolder, Job, Status, run_tick
from joborch_base.usage import folder_bytes

MakeYard = Callable[..., Yard]
HOG = "/usr/bin/python3 -c 'x = bytearray(200 << 20); import time; time.sleep(1000)'"


def run(yard: Yard, script: str, restarted: bool, **headers: str) -> Job:
    """A payload that is stopped for what it uses, perhaps by a client that did not start it."""
    job = yard.submit(script, **headers)
    run_tick(yard.client)
    if restarted:
        yard.restart()

    def stopped() -> bool:
        joborch.limit_tick(yard.client)
        return yard[job].kill_cause == "limit"

    wait_for(stopped, 90, "the limit")
    joborch.end_tick(yard.client)
    return yard[job]


THREADS = """
import threading
for _ in range(24):
    threading.Thread(target=threading.Event().wait).start()
"""
OVER = {
    "memory": ({}, HOG, r"it used [12]\d\d MiB of the 100 MiB of memory asked for"),
    "memory of a daemon": ({}, f"(setsid {HOG} &) ; sleep 1000", r"it used [12]\d\d MiB of the 100 MiB of memory asked for"),
    "processes": (
        {"JOBORCH_MAX_PROCESSES": "20"},
        "for i in {1..30}; do sleep 1000 & done; wait",
        r"it ran [23]\d processes and threads .* 20 .*",
    ),
    "threads": (
        {"JOBORCH_MAX_PROCESSES": "20"},
        f"/usr/bin/python3 -c '{THREADS}'",
        r"it ran [23]\d processes and threads .* 20 .*",
    ),
    "work": (
        {"JOBORCH_MAX_WORK": "1M"},
        "for i in 1 2 3; do head -c 1M /dev/zero > big.$i; done; sleep 1000",
        r"its work folder had ([1-3]\.\d MiB|\d+ bytes), .*",
    ),
}


@pytest.mark.parametrize(
    ("what", "isolation"), [*((what, "none") for what in OVER if what != "threads"), *((what, "process") for what in OVER)]
)
def test_a_script_over_a_limit(what: str, isolation: str, data: DataFolder) -> None:
    settings, script, said = OVER[what]
    yard = Yard(data, JOBORCH_ISOLATION=isolation, **settings)
    try:
        job = run(yard, script, isolation != "none", X_Joborch_Memory="100")
        assert (job.status, job.cause) == (Status.FAILED, "limit")
        assert re.fullmatch(f"run.sh was stopped: {said}", job.reason), job.reason
    finally:
        yard.close()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("for i in 1 2 3; do head -c 900K /dev/zero > $i; done", r"its work folder had 2\.\d MiB, .* 1\.0 MiB .* exit status 0"),
        ("exec head -c 2M /dev/zero > a", r"its work folder had 10\d+ bytes, more than the 1048576 .*; run.sh ended with exit status 153"),
        ("exec head -c 2M /dev/zero", r"it wrote to a file more than the 1\.0 MiB .*; run.sh ended with exit status 153"),
        ("ulimit -Sf unlimited; head -c 2M /dev/zero > $TMPDIR/a", ""),
    ],
)  # fmt: skip
def test_a_script_that_is_over_its_limit_only_at_its_end(script: str, said: str, data: DataFolder) -> None:
    """Nobody has looked meanwhile; a file that would be too large alone is cut by the kernel."""
    yard = Yard(data, JOBORCH_MAX_WORK="1M")
    try:
        job = yard.run(yard.submit(script))
        assert (job.status, job.cause) == ((Status.FAILED, "limit") if said else (Status.COMPLETED, None)), job.reason
        assert not said or re.fullmatch(said, job.reason), job.reason
    finally:
        yard.close()


# It forks until it has used up all that it may have, again and again. If nothing limits it, it ends at 3,000, for the machine's sake.
BOMB = """/usr/bin/python3 -c '
import os, time
while True:
    try:
        if len(os.listdir("/proc")) < 3000 and not os.fork():
            os.setsid()
    except OSError:
        open("refused", "w").close()
        time.sleep(0.05)
'
"""


@pytest.fixture(name="limited", params=["process", "full", *(["user"] if os.geteuid() == 0 else [])])
def limited_fixture(request: pytest.FixtureRequest, pyz: Path) -> Iterator[Pair]:
    """A pair whose scripts are isolated, and may run 60 processes. The kernel spares root, so it runs as a plain user."""
    folder = Path(tempfile.mkdtemp(prefix="joborch-open-"))
    folder.chmod(0o755)
    client = {"JOBORCH_ISOLATION": request.param, "JOBORCH_MAX_PROCESSES": "60", "JOBORCH_SLOTS": "4", "JOBORCH_KILL_GRACE": "0.3"}
    client.update({"JOBORCH_UIDS": SCRIPT_UIDS} if request.param == "user" else {})
    plain = os.geteuid() == 0 and request.param != "user"
    options = {"user": NOBODY_UID, "program": open_program(folder, pyz)} if plain else {}
    made = Pair(folder / "pair", {"SERVICE_EXAMPLE_RUNS_PER_USER": "4"}, client, **options)
    try:
        yield made.start()
    finally:
        made.close()
        shutil.rmtree(folder)


def test_a_fork_bomb_and_a_memory_hog_leave_others_alone(limited: Pair) -> None:
    """Each is Failed, with the figures; meanwhile server and client are well, and jobs of others run."""
    server = limited.server
    bombs = [submit(server, BOMB, user_id=1) for _ in range(2)]
    hog = submit(server, HOG, user_id=2, memory=100)
    for number in (*bombs, hog):
        wait_status(server, number, "Running", "Failed")
    victim = submit(server, "for i in {1..30}; do (:); done; echo done > result", user_id=3)
    assert wait_status(server, victim, *ENDED, limit_s=90)["status"] == "Completed"
    assert (server.health()["status"], limited.client.health()["status"]) == ("ok", "ok")
    for number in (*bombs, hog):
        job = wait_status(server, number, *ENDED, limit_s=90)
        assert (job["status"], job["cause"]) == ("Failed", "limit"), job["reason"]
        most = 62 if number in bombs else 400
        said = re.search(r"it (?:ran|used) (\d+)", job["reason"])
        assert said and 60 < int(said[1]) <= most, job["reason"]


SHARE = """/usr/bin/python3 -c '
import os, time
x = bytearray(60 << 20)
for _ in range(4):
    if not os.fork():
        break
open(f"ready.{os.getpid()}", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
'
"""


def test_shared_memory_counts_once(yard: Yard) -> None:
    """Five processes with the same 60 MiB are within 150 MiB."""
    job = yard.submit(SHARE, X_Joborch_Memory="150")
    run_tick(yard.client)
    work = yard.folder(job) / "work"
    wait_for(lambda: len(list(work.glob("ready.*"))) == 5, 60, "all processes")
    assert yard.client.local is not None
    assert yard.client.local.over_limits({job.mark: 150}) == []
    yard.client.local.usage.due = 0.0
    assert yard.client.local.over_limits({job.mark: 50}) == [job.mark]
    (work / "go").touch()
    yard.wait(job)


def test_the_size_of_a_folder_follows_no_link(data: DataFolder) -> None:
    for name in ("a", "b"):
        (data.tmp / name).mkdir()
    (data.tmp / "b/large").write_bytes(bytes(1 << 20))
    (data.tmp / "a/link").symlink_to(data.tmp / "b")
    assert folder_bytes(str(data.tmp / "a")) < 1 << 20 <= folder_bytes(str(data.tmp))
    assert folder_bytes(str(data.tmp / "missing")) == 0
