"""What a script uses: over its memory, processes, CPU time or work folder, its job is Failed, and says how much it was. Its cores."""

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
from joborch_base.local import on_cores
from joborch_base.usage import TICKS_PER_S, CpuTime, Entry, folder_bytes

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
# One after the other uses a little, is seen by the client, and goes: its time is in no other process's.
SHORT = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    if not os.fork():
        while time.process_time() < 0.5:
            pass
        time.sleep(3)
        os._exit(0)
    time.sleep(1)
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
    "CPU time": (
        {"JOBORCH_MAX_CPU_TIME": "1.5"},
        "for i in 1 2 3; do (while :; do :; done) & done; wait",
        r"it used \d+\.\d s of CPU time, more than the 1\.5 s that JOBORCH_MAX_CPU_TIME allows",
    ),
    "CPU time of processes that nobody waits for": (
        {"JOBORCH_MAX_CPU_TIME": "2"},
        f"/usr/bin/python3 -c '{SHORT}'",
        r"it used \d+\.\d s of CPU time, .* 2 s .*",
    ),
    "work": (
        {"JOBORCH_MAX_WORK": "1M"},
        "for i in 1 2 3; do head -c 1M /dev/zero > big.$i; done; sleep 1000",
        r"its work folder and TMPDIR had ([1-3]\.\d MiB|\d+ bytes), .*",
    ),
    "TMPDIR": (
        {"JOBORCH_MAX_WORK": "1M"},
        "for i in 1 2 3; do head -c 1M /dev/zero > $TMPDIR/big.$i; done; ln -sfn /usr ../tmp; sleep 1000",
        r"its work folder and TMPDIR had ([1-3]\.\d MiB|\d+ bytes), .*",
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
        ("for i in 1 2 3; do head -c 900K /dev/zero > $i; done", r"its work folder and TMPDIR had 2\.\d MiB, .* 1\.0 MiB .* exit status 0"),
        ("exec head -c 2M /dev/zero > a", r"its work folder and TMPDIR had 10\d+ bytes, .* 1048576 .*; run.sh .* exit status 153"),
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


def test_a_script_that_has_used_too_much_cpu_time_only_at_its_end(data: DataFolder) -> None:
    """Nobody has looked meanwhile, and the client that sees its end has not started it."""
    yard = Yard(data, JOBORCH_MAX_CPU_TIME="0.2")
    try:
        script = "until [ $(cut -d ' ' -f 14 /proc/$$/stat) -gt 60 ]; do for i in {1..2000}; do :; done; done; exit 3"
        for restarted in (False, True):
            job = yard.submit(script)
            run_tick(yard.client)
            if restarted:
                yard.restart()
            yard.until(job, Status.FAILED)
            job = yard[job]
            assert (job.status, job.cause) == (Status.FAILED, "limit"), job.reason
            said = r"it used \d+\.\d s of CPU time, more than the 0\.2 s that JOBORCH_MAX_CPU_TIME allows; run.sh ended with exit status 3"
            assert re.fullmatch(said, job.reason), job.reason
    finally:
        yard.close()


def entry(cpu: int, of_children: int = 0) -> Entry:
    """A process with its CPU time in ticks."""
    return Entry(1, 1, 0, 1, "5", cpu, of_children)


@pytest.mark.parametrize(
    ("looks", "used"),
    [
        ([{1: entry(5)}, {1: entry(9)}], 9),
        ([{1: entry(5), 2: entry(7)}, {1: entry(13, 7)}], 13),
        ([{1: entry(5), 2: entry(7)}, {1: entry(6)}], 13),
        ([{1: entry(5), 2: entry(7)}, {1: entry(6)}, {1: entry(15, 8)}], 15),
        ([{1: entry(5), 2: entry(7), 3: entry(4)}, {1: entry(13, 7)}, {1: entry(20, 7)}], 24),
        ([{1: entry(5), 2: entry(7)}, {}], 12),
    ],
    ids=["one", "a child that was waited for", "one that nobody waits for", "one that is waited for later", "both", "all are gone"],
)
def test_cpu_time_counts_once(looks: list[dict[int, Entry]], used: int) -> None:
    counted = CpuTime()
    assert [counted.add(look) for look in looks][-1] == used / TICKS_PER_S


# -- cores --

COUNTED = "nproc > seen; touch ready; until [ -e go ]; do sleep 0.02; done"


def cores(yard: Yard, job: Job) -> set[int]:
    """The cores of a payload that runs; its script sees as many."""
    run_tick(yard.client)
    work = yard.folder(job) / "work"
    wait_for((work / "ready").exists, 60, "the script's start")
    found = os.sched_getaffinity(int((yard[job].handle or "").split()[0]))
    assert int((work / "seen").read_text()) == len(found)
    return found


@pytest.fixture(name="two_cores")
def two_cores_fixture() -> Iterator[list[int]]:
    """The cores that this process may run on, as with taskset(1)."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two cores")
    os.sched_setaffinity(0, chosen := sorted(before)[-2:])
    yield chosen
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("isolation", ["none", "process", "full"])
def test_each_script_has_cores_of_its_own(isolation: str, data: DataFolder, two_cores: list[int]) -> None:
    """As many as its job asked for, of those that the client may use, also after a restart; if there are too few, all: nothing waits."""
    yard = Yard(data, JOBORCH_ISOLATION=isolation, JOBORCH_PIN_CPUS="1", JOBORCH_SLOTS="8")
    try:
        first, second, third, large = (yard.submit(COUNTED, X_Joborch_Cpus=number) for number in ("1", "1", "1", "3"))
        assert cores(yard, first) == {two_cores[0]}
        yard.restart()
        assert cores(yard, second) == {two_cores[1]}
        assert cores(yard, third) == cores(yard, large) == set(two_cores) == os.sched_getaffinity(0)
        for job in (first, second):
            (yard.folder(job) / "work/go").touch()
            yard.until(job, Status.COMPLETED)
        assert cores(yard, yard.submit(COUNTED, X_Joborch_Cpus="2")) == set(two_cores)
        assert cores(yard, yard.submit(COUNTED)) == set(two_cores)
    finally:
        yard.close()


@pytest.mark.parametrize("note", ["mkfifo ../cores", "ln -s /dev/zero ../cores", "echo x,0,-1,9999999999999999 > ../cores"])
def test_a_script_that_spoils_the_note_of_its_cores(note: str, data: DataFolder, two_cores: list[int]) -> None:
    """Without isolation it can; the next start of the client goes on."""
    yard = Yard(data, JOBORCH_PIN_CPUS="1")
    try:
        spoilt = yard.submit(f"rm -f ../cores; {note}; {COUNTED}")
        cores(yard, spoilt)
        yard.restart()
        assert cores(yard, yard.submit(COUNTED)) <= set(two_cores)
    finally:
        yard.close()


def test_cores_that_are_taken_from_the_client_stop_no_script(two_cores: list[int]) -> None:
    with on_cores(["4095"]):
        assert os.sched_getaffinity(0) == set(two_cores)
    with on_cores([str(two_cores[0])]):
        assert os.sched_getaffinity(0) == {two_cores[0]}
    assert os.sched_getaffinity(0) == set(two_cores)


def test_scripts_are_not_pinned_unless_that_is_asked_for(yard: Yard, two_cores: list[int]) -> None:
    job = yard.submit(COUNTED)
    assert cores(yard, job) == set(two_cores)
    assert not (yard.folder(job) / "cores").exists()


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


IN_SHM = """
import mmap, os, time
file = open("/dev/shm/x", "w+b")
file.truncate(60 << 20)
memory = mmap.mmap(file.fileno(), 60 << 20)
memory.write(bytes(60 << 20))
for _ in range(2):
    os.fork()
open(f"ready.{os.getpid()}", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
"""


@pytest.mark.parametrize("value", ["full", *(["user"] if os.geteuid() == 0 else [])])
def test_files_in_memory_count_as_memory(value: str, data: DataFolder) -> None:
    """They are in no process's memory, and the kernel would rather kill other processes; what is mapped counts once."""
    yard = Yard(data, JOBORCH_ISOLATION=value, **({"JOBORCH_UIDS": SCRIPT_UIDS} if value == "user" else {}))
    try:
        job = run(yard, "head -c 150M /dev/zero >/dev/shm/x; sleep 1000", True, X_Joborch_Memory="100")
        assert (job.status, job.cause) == (Status.FAILED, "limit")
        assert re.fullmatch(r"run.sh was stopped: it used 1\d\d MiB of the 100 MiB of memory asked for", job.reason), job.reason
        shared = yard.submit(f"/usr/bin/python3 -c '{IN_SHM}'", X_Joborch_Memory="150")
        run_tick(yard.client)
        work = yard.folder(shared) / "work"
        wait_for(lambda: len(list(work.glob("ready.*"))) == 4, 60, "all processes")
        assert yard.client.local is not None
        for limit, marks in ((150, []), (50, [shared.mark])):
            yard.client.local.usage.due = 0.0
            assert yard.client.local.over_limits({shared.mark: limit}) == marks
        (work / "go").touch()
        yard.until(shared, Status.COMPLETED)
    finally:
        yard.close()


def test_the_size_of_a_folder_follows_no_link(data: DataFolder) -> None:
    for name in ("a", "b"):
        (data.tmp / name).mkdir()
    (data.tmp / "b/large").write_bytes(bytes(1 << 20))
    (data.tmp / "a/link").symlink_to(data.tmp / "b")
    assert folder_bytes(str(data.tmp / "a")) < 1 << 20 <= folder_bytes(str(data.tmp))
    assert folder_bytes(str(data.tmp / "missing")) == 0
