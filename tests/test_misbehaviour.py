"""The payload misbehaves: whatever a script does to its parents, its folders and the machine, its job ends once, and nothing runs on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair
from harness import (
    ENDED,
    NOBODY_UID,
    SCRIPT_UIDS,
    Archive,
    Pair,
    alive,
    download,
    end_all_below,
    open_program,
    partial,
    replace,
    run_to_end,
    submit,
    wait_for,
    wait_status,
)
from world import AT_HOME, Desk, Yard, ask, event, serving, soon

import joborch
from joborch import Client, DataFolder, Job, Status, clean_tick, fetch_tick, run_tick

pytestmark = pytest.mark.usefixtures("no_long_polls")


MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair for all scripts that harm only themselves."""
    limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    made = Pair(tmp_path_factory.mktemp("misbehaviour"), limits, {"JOBORCH_SLOTS": "4", "JOBORCH_KILL_GRACE": "0.5"})
    try:
        yield made.start()
    finally:
        made.close()
        end_all_marked(made)


def end_all_marked(pair: Pair) -> None:
    """Kill what a fault let run on, wherever it works."""
    marks = [f"JOBORCH_MARK={folder.name}\0".encode() for folder in (pair.client.data / "jobs").iterdir()]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            if any(mark in environment for mark in marks):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A file to which scripts append what they did."""
    path = tmp_path / "marks"
    path.touch()
    return path


# == What is checked of each ==


def processes_of(pair: Pair, job: dict[str, Any]) -> list[str]:
    """All processes of any attempt of a job: by the mark in their environment, or by the folder that they work in."""
    mark, place = f"JOBORCH_MARK={job['uuid']}.".encode(), str(pair.client.data / "jobs" / job["uuid"])
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if entry.name.isdigit() and alive(int(entry.name)):
                marked = b"\0" + mark in b"\0" + (entry / "environ").read_bytes()
                if marked or str((entry / "cwd").readlink()).startswith(place):
                    found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
    return found


def check_end(pair: Pair, job: dict[str, Any], status: str, cause: str | None, attempt: int = 1) -> None:
    """The job ended once, in this way; its moves join up; its attempts count up; and nothing of it runs any more."""
    left = processes_of(pair, job)
    moves = job["history"]
    assert (job["status"], job["cause"], job["attempt"]) == (status, cause, attempt), json.dumps(job, indent=1)
    assert (moves[0]["from"], moves[0]["to"]) == (None, "Queued")
    assert all(before["to"] == after["from"] for before, after in zip(moves, moves[1:])), moves
    assert [move["to"] for move in moves if move["to"] in ENDED] == [status], moves
    accepted = [move["attempt"] for move in moves if (move["from"], move["to"]) == ("Processing", "Submitted")]
    assert accepted == [*range(1, attempt + 1)], f"each attempt is taken once: {moves}"
    assert [move["attempt"] for move in moves] == sorted(move["attempt"] for move in moves)
    assert left == [], f"{job['reason']}: and yet these run on"


def check_others(pair: Pair) -> None:
    """A well-behaved job of somebody else is Completed."""
    job = run_to_end(pair.server, "echo fine > result", user_id=2)
    check_end(pair, job, "Completed", None)
    assert download(pair.server, job["id"])["result"] == b"fine\n"


# == What it leaves running ==

LEAVES = {
    "a child": "sleep 1000 &",
    "a child that ignores its terminal": "nohup sleep 1000 & disown",
    "a deaf child": "(trap '' TERM HUP INT; while :; do sleep 1; done) &",
    "a session of its own": "setsid sleep 1000 &",
    "a session of its own, deaf": "setsid bash -c \"trap '' TERM HUP; while :; do sleep 1; done\" &",
    "a daemon": "(setsid bash -c '(cd /; exec sleep 1000) &' &)",
    "a daemon without streams": "(setsid bash -c 'exec 0<&- 1>&- 2>&-; (cd /; exec sleep 1000) &' &)",
    "many": "for i in 1 2 3 4 5 6 7 8; do (setsid bash -c 'sleep 1000 & cd /; sleep 1000 &' &); done",
}


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@pytest.mark.parametrize("tree", LEAVES)
def test_what_runs_on_after_exit_0_is_ended(tree: str, restart: bool, shared: Pair, marks: Path, tmp_path: Path) -> None:
    """Completed, and the reason says so; also where the client was started again meanwhile, and is no parent of it any more."""
    gate = tmp_path / "gate"
    script = f"{LEAVES[tree]}\nsleep 0.2\necho ran >> {marks}\nuntil [ -e {gate} ]; do sleep 0.02; done\necho done > result\n"
    number = submit(shared.server, script)
    wait_for(marks.read_text, what="the script's start")
    begun = processes_of(shared, shared.server.job(number))
    assert len(begun) >= 3, f"wrapper, script and what it starts: {begun}"
    if restart:
        shared.client.kill()
        shared.client.start()
    gate.touch()
    job = wait_status(shared.server, number, *ENDED)
    check_end(shared, job, "Completed", None)
    assert job["reason"] == "run.sh ended with exit status 0; processes that it left running were killed"
    assert marks.read_text() == "ran\n"
    assert download(shared.server, number)["result"] == b"done\n"


def test_what_runs_on_after_a_failure_is_ended(shared: Pair) -> None:
    job = run_to_end(shared.server, "setsid sleep 1000 &\nsleep 0.2\necho why >&2\nexit 3")
    check_end(shared, job, "Failed", "user")
    assert re.fullmatch(r'run\.sh ended with exit status 3 after 0\.\d s; last line of standard error: "why".*', job["reason"])


# == Whom it kills ==

KILLERS = {
    "its wrapper": "kill -9 $PPID",
    "its wrapper's group": "kill -9 -$PPID",
    "its wrapper by a session of its own": "setsid kill -9 $PPID; sleep 0.2",
    "its wrapper, from a daemon": 'P=$PPID; (setsid bash -c "sleep 0.1; kill -9 $P" &)',
}


@pytest.mark.parametrize("victim", KILLERS)
@pytest.mark.parametrize("then", ["goes on", "ends"])
def test_a_script_that_kills_what_watches_it(victim: str, then: str, shared: Pair, marks: Path) -> None:
    """Failed by its own fault, at the first attempt; it must not run on without limit, quota and end."""
    rest = f"while :; do echo on >> {marks}; sleep 0.1; done" if then == "goes on" else "sleep 0.3; exit 0"
    job = run_to_end(shared.server, f"echo ran >> {marks}; echo kept > kept\n{KILLERS[victim]}\n{rest}\n")
    check_end(shared, job, "Failed", "user")
    assert "wrapper" in job["reason"]
    assert marks.read_text().count("ran") == 1
    assert partial(shared.server, job["id"])["kept"] == b"kept\n"


def test_a_script_that_stops_what_watches_it(shared: Pair, marks: Path) -> None:
    """Nothing says that it has ended: it can be terminated all the same, and its time limit holds."""
    script = f"kill -STOP $PPID\necho ran >> {marks}\n"
    number = submit(shared.server, script)
    wait_for(marks.read_text, what="the script's start")
    wait_status(shared.server, number, "Running")
    assert shared.server.post(f"/terminate/{number}").status_code == 200
    check_end(shared, shared.server.job(number), "Killed", "cancelled")
    limited = run_to_end(shared.server, script, timeout=1)
    check_end(shared, limited, "Failed", "limit")


HOPPER = r"""
use POSIX "setsid";
my ($hops, $session) = @ARGV;
for (1 .. $hops) {                     # each generation makes the next one and ends
    my $child = fork;
    exit if !defined $child or $child;
    setsid if $session;
    select(undef, undef, undef, 0.02);
}
"""
TREES = {
    "sleeps": "for i in $(seq 300); do sleep 1000 & done",
    "deaf": "for i in $(seq 100); do (trap '' TERM; while :; do sleep 1; done) & done",
    "hops": "for i in $(seq 40); do perl hopper.pl 3000 0 & done",
    "hops, in sessions of their own": "for i in $(seq 20); do perl hopper.pl 3000 1 & done",
    "grows": "grow() { [ $1 = 0 ] || { grow $(($1 - 1)) & grow $(($1 - 1)) & }; exec sleep 1000; }; grow 7 &",
    "without its environment": "for i in $(seq 5); do env -i /bin/sleep 1000 & env -i setsid /bin/sleep 1000 & done",
    "stopped": "for i in $(seq 9); do sleep 1000 & kill -STOP $!; done; MARK; kill -STOP $$",
}


def seen_of(tree: str, count: int) -> int:
    """How many of `count` processes of a tree can be seen. A busy machine shows none that hop, only wrapper, script and its sleep."""
    return min(count, 3) if "hops" in tree else count


@pytest.mark.parametrize("tree", TREES)
def test_terminate_answers_200_when_nothing_runs_any_more(tree: str, shared: Pair, marks: Path) -> None:
    """However many there are, and however fast they change. Bounded: at most 300 at once, and what hops ends by itself."""
    script = TREES[tree] if "MARK" in TREES[tree] else f"{TREES[tree]}\nMARK\nsleep 1000"
    number = submit(shared.server, script.replace("MARK", f"echo ran >> {marks}"), {"hopper.pl": HOPPER.encode()})
    wait_for(marks.read_text, what="the script's start")
    wait_status(shared.server, number, "Running")
    wait_for(lambda: len(processes_of(shared, shared.server.job(number))) >= seen_of(tree, 8), what="its processes")
    answer = shared.server.post(f"/terminate/{number}")
    left = processes_of(shared, shared.server.job(number))
    assert (answer.status_code, left) == (200, []), answer.text
    check_end(shared, shared.server.job(number), "Killed", "cancelled")
    assert shared.server.post(f"/terminate/{number}").status_code == 200
    check_others(shared)


# == Limits ==


@pytest.mark.parametrize("where", ["upload", "service"])
def test_a_script_that_ignores_term_at_its_time_limit(where: str, shared: Pair, make_pair: MakePair) -> None:
    """Failed with cause `limit`; what it had written, to files and streams, is there; nothing of it runs on."""
    own, fields = shared, dict[str, Any](timeout=1)
    if where == "service":
        own, fields = make_pair(server={"SERVICE_EXAMPLE_TIMEOUT": "1"}, client={"JOBORCH_KILL_GRACE": "0.5"}).start(), {}
    deaf = "trap '' TERM HUP INT; setsid sleep 1000 & echo said; echo word >&2; echo kept > kept; while :; do sleep 0.1; done"
    job = run_to_end(own.server, deaf, **fields)
    check_end(own, job, "Failed", "limit")
    assert job["reason"] == 'run.sh was stopped at its time limit of 1.0 s; last line of standard error: "word"'
    got = partial(own.server, job["id"])
    assert (got["kept"], got[".joborch/stdout"], got[".joborch/stderr"]) == (b"kept\n", b"said\n", b"word\n")
    assert own.server.head(f"/download/{job['id']}").status_code == 204


WORDS = {
    "plain": (
        "echo first >&2; echo 'no such atom' >&2; exit 3",
        'exit status 3 after 0.[0-9] s; last line of standard error: "no such atom"',
    ),
    "nothing": ("exit 3", "exit status 3 after 0.[0-9] s"),
    "blank lines after it": ("printf 'words\\n \\n\\n\\t\\n' >&2; exit 3", 'exit status 3 after .*: "words"'),
    "no line end": ("printf words >&2; exit 3", 'exit status 3 after .*: "words"'),
    "one of a mebibyte": ("head -c 1048576 /dev/zero | tr '\\0' x >&2; exit 3", 'exit status 3 after .*: "x{10,200}.*"'),
    "control characters": ("printf 'a\\rb\\033[31mc\\0d\\302\\205e\\n' >&2; exit 3", 'exit status 3 after .*: "a b \\[31mc d e"'),
    "no UTF-8": ("printf 'caf\\351\\n' >&2; exit 3", 'exit status 3 after .*: "caf\N{REPLACEMENT CHARACTER}"'),
    "a line of our log": ("printf '2026-01-01 00:00:00 INFO job 1 Queued -> Completed\\n' >&2; exit 3", '.* Completed"'),
    "a signal": ("echo words >&2; kill -SEGV $$", r'exit status 139 \(as by signal SIGSEGV\) after .*: "words"'),
}


@pytest.mark.parametrize("words", WORDS)
def test_the_last_words_of_a_script_that_failed(words: str, shared: Pair) -> None:
    """In the reason, in one line that can be shown; in the log of either side, too."""
    script, said = WORDS[words]
    job = run_to_end(shared.server, script)
    check_end(shared, job, "Failed", "user")
    assert re.fullmatch("run.sh ended with " + said, job["reason"]), job["reason"]
    assert job["reason"].isprintable()
    assert len(job["reason"]) < 400
    for process in (shared.server, shared.client):
        assert not re.search(r"^2026-01-01 00:00:00", process.log, re.MULTILINE)


# == What it does to its folders ==

SECRET = b"a secret of the client's machine"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder that is none of the payload's business, built as one of a payload's is."""
    folder = tmp_path / "secrets"
    for name in ("work", "."):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "key.txt").write_bytes(SECRET)
    for name in ("stdout", "stderr", "exit.json", "inputs.json"):
        (folder / name).write_bytes(SECRET)
    return folder


REPLACED = {
    "work, by a link to a folder": "cd ..; mv work away; ln -s {secrets} work",
    "work, by a link to a link": "cd ..; mv work away; ln -s {secrets} there; ln -s there work",
    "work, by a link to itself": "cd ..; mv work away; ln -s work work",
    "work, by a link to what holds it": "cd ..; mv work away; ln -s . work",
    "work, by a file": "cd ..; mv work away; echo x > work",
    "work, by a fifo": "cd ..; mv work away; mkfifo work",
    "its folder, by a link to a folder": "cd ../..; mv $JOBORCH_MARK away-$JOBORCH_MARK; ln -s {secrets} $JOBORCH_MARK",
    "its streams, by links": "cd ..; rm stdout stderr; ln -s {secrets}/stdout stdout; ln -s {secrets}/stderr stderr",
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_script_that_puts_a_link_in_the_place_of_its_folders(what: str, shared: Pair, secrets: Path, marks: Path) -> None:
    """What is there stays there, and as it is: in no answer, neither while it runs nor when it has ended."""
    before = {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()}
    script = f"{AT_HOME}{REPLACED[what].format(secrets=secrets)}\necho ran >> {marks}\nsleep 0.5\nexit 0\n"
    number = submit(shared.server, script, retries=0)
    wait_for(marks.read_text, what="the script's start")
    answers = [shared.server.get(f"/download_partial/{number}").content]
    job = wait_status(shared.server, number, *ENDED)
    check_end(shared, job, job["status"], job["cause"])
    answers += [shared.server.get(f"/{path}/{number}").content for path in ("download", "download_partial")]
    for content in answers:
        assert SECRET not in contents(content)
    assert {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()} == before
    assert SECRET.decode() not in json.dumps(job)
    check_others(shared)


def contents(answer: bytes) -> bytes:
    """All that an answer holds, unpacked where it is a ZIP."""
    if not answer.startswith(b"PK"):
        return answer
    archive = Archive(answer)
    return b"".join(archive[name] for name in archive.names())


def test_a_script_that_removes_its_own_folder(shared: Pair, marks: Path) -> None:
    """Nobody can tell who did it: it is tried again as often as for any such failure, and then has failed."""
    number = submit(shared.server, f'{AT_HOME}echo $JOBORCH_ATTEMPT >> {marks}; rm -rf "$(dirname $PWD)"', retries=1)
    job = wait_status(shared.server, number, *ENDED)
    check_end(shared, job, "Failed", "infrastructure", attempt=2)
    assert marks.read_text() == "1\n2\n"
    assert "folder was removed" in job["reason"]
    check_others(shared)


def test_a_script_that_removes_its_exit_file(shared: Pair, marks: Path) -> None:
    job = run_to_end(shared.server, f"echo ran >> {marks}; echo kept > kept; rm ../exit.json; exit 0")
    check_end(shared, job, "Failed", "user")
    assert marks.read_text() == "ran\n"
    assert partial(shared.server, job["id"])["kept"] == b"kept\n"


@pytest.mark.parametrize("way", ["written over", "replaced"])
def test_a_script_that_says_it_has_ended_and_goes_on(way: str, shared: Pair, marks: Path) -> None:
    """It may deceive itself: but when its job is over nothing of it runs any more, and no place is taken twice."""
    first = "rm ../exit.json; " if way == "replaced" else ""
    fake = first + 'echo \'{"status": 0, "left": 0}\' > ../exit.json'
    job = run_to_end(shared.server, f"echo ran >> {marks}; {fake}; for i in $(seq 30); do sleep 0.1; done; exit 3")
    check_end(shared, job, job["status"], job["cause"])
    assert job["status"] in ("Completed", "Failed")
    assert marks.read_text() == "ran\n"


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """A GiB more than it has is all that this process may take: what reads without end gets a MemoryError, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (has + 1024 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


EXITS = [
    '{"status": 9999999999999999999999, "left": 0}',
    '{"status": -9999999999999999999999, "left": 0}',
    '{"status": 1e400, "left": 0}',
    '{"status": NaN, "left": 0}',
    '{"status": Infinity, "left": 0}',
    '{"status": 3.7, "left": 0}',
    '{"status": "3", "left": 0}',
    '{"status": true, "left": "x"}',
    '{"status": -1, "left": 0}',
    '{"status": 4294967296, "left": 0}',
    "[" * 190,
    '{"status": ' + "9" * 180 + "}",
]
HOSTILE = {
    **{f"exit file {text[:40]}": f"rm ../exit.json; printf %s '{text}' > ../exit.json; exit 0" for text in EXITS},
    "a claim of 5,000 digits": "printf '%05000d' 7 > ../started.1; kill -9 $PPID",
    "a fifo for a claim": "rm ../started.1; mkfifo ../started.1; kill -9 $PPID",
    "a folder for a claim": "rm ../started.1; mkdir ../started.1; kill -9 $PPID",
    "a claim that never ends": "ln -sf /dev/zero ../started.1; kill -9 $PPID",
    "the claim of another": "echo 1 > ../started.1; kill -9 $PPID",
    "no claim": "rm ../started.1; kill -9 $PPID",
    "a list of inputs that is a fifo": "rm -f ../inputs.json; mkfifo ../inputs.json",
    "scratch that is a file": "rm -rf $TMPDIR; echo x > $TMPDIR",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
def test_a_payload_that_spoils_its_folder_stops_no_other(script: str, restart: bool, yard: Yard, bounded_memory: None) -> None:
    """It has ended, in whatever way, and the client runs the next one; also a client that finds all this at its start."""
    memory_mib = peak_mib()
    hostile = yard.submit(script, X_Joborch_Return_Inputs="0")
    run_tick(yard.client)
    yard.wait(hostile)
    if restart:
        got = soon(yard.restart, yard.data.jobs)
        assert not isinstance(got, Exception), got
    other = yard.submit("echo fine")
    for _ in range(3):
        got = soon(lambda: run_tick(yard.client), yard.data.jobs)
        assert not isinstance(got, Exception), got
        yard.wait(other)
    assert yard[other].status is Status.COMPLETED
    assert yard[hostile].status in (Status.COMPLETED, Status.FAILED)
    got = soon(lambda: ask(yard.client, "GET", f"/retrieve_partial/{hostile.id}"), yard.data.jobs)
    assert not isinstance(got, Exception) and got.status == 200, got
    assert peak_mib() < memory_mib + 200


def peak_mib() -> int:
    """The most memory that this process has had so far, in MiB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) // 1024


def test_a_list_of_inputs_that_would_fill_the_memory(yard: Yard, bounded_memory: None) -> None:
    """It is the script's to spoil: nobody reads more of it than a list can be long."""
    job = yard.run(yard.submit("truncate -s 700M ../inputs.json", X_Joborch_Return_Inputs="0"))
    before = peak_mib()
    assert ask(yard.client, "GET", f"/retrieve/{job.id}").status == 200
    assert peak_mib() < before + 200


# == What it leaves behind ==


def test_a_tree_of_thousands_of_folders(make_pair: MakePair, marks: Path) -> None:
    """It is fetched as far as paths can say it, what is left out is named, and the cleaner gets rid of it and of what came later."""
    brief = {"MAX_AGE": "2", "JOBORCH_CLEAN_INTERVAL": "0.2"}
    own = make_pair(client=brief).start()
    deep = "for i in $(seq 30); do p=$(printf 'd/%.0s' $(seq 100)); mkdir -p $p; cd $p; done; echo leaf > leaf"
    job = wait_status(own.server, submit(own.server, f"echo ran >> {marks}; echo top > top; {deep}"), *ENDED, limit_s=90)
    check_end(own, job, "Completed", None)
    got = download(own.server, job["id"])
    assert got["top"] == b"top\n"
    assert [name for name in got.names() if name.endswith("leaf")] or "d/d/" in got.text(".joborch/left-out.txt")
    check_others(own)
    wait_for(lambda: not list((own.client.data / "jobs").iterdir()), what="both cleaned")
    assert marks.read_text() == "ran\n"


def test_a_deep_tree_stops_no_cleaner(yard: Yard) -> None:
    """On every Python: one that cannot be removed must not keep the others."""
    deep, plain = yard.submit("for i in $(seq 15); do p=$(printf 'd/%.0s' $(seq 100)); mkdir -p $p; cd $p; done"), yard.submit("true")
    for job in (deep, plain):
        yard.run(job)
        yard.until(job, Status.COMPLETED)  # what is large is measured outside the tick
    yard.clock.pass_s(10 * yard.client.config.max_age_s)
    for _ in range(3):
        clean_tick(yard.client)
    assert [yard[job].status for job in (deep, plain)] == [Status.CLEANED] * 2
    assert list(yard.data.jobs.iterdir()) == []


def test_twenty_thousand_files_with_names_of_all_kinds(shared: Pair) -> None:
    """All arrive, under names that stay apart."""
    script = r"""mkdir many; cd many; seq 20000 | xargs touch
cd ..; for i in 1 2 3; do printf $i > "$(printf 'line\nbreak-%d' $i)"; printf $i > "$(printf 'tab\tquote"back\\slash-%d' $i)"; done
printf x > ' '; printf y > -rf; printf z > "$(printf '\001\177')"
"""
    job = run_to_end(shared.server, script)
    check_end(shared, job, "Completed", None)
    got = download(shared.server, job["id"])
    assert sum(name.startswith("many/") for name in got.names()) == 20000
    held = [got[name] for name in got.names() if not name.startswith(("many/", ".joborch/", "run.sh"))]
    assert sorted(held) == sorted([b"1", b"2", b"3"] * 2 + [b"x", b"y", b"z"])


@pytest.mark.parametrize("rights", ["000", "111", "444"])
def test_a_script_that_takes_the_rights_of_everything(rights: str, shared: Pair) -> None:
    script = f"{AT_HOME}mkdir -p a/b; echo x > a/b/c; chmod -R {rights} ../tmp ../stdout ../stderr a; chmod {rights} . ..; exit 3"
    job = run_to_end(shared.server, script)
    check_end(shared, job, "Failed", "user")
    assert job["exit_code"] == 3
    check_others(shared)


@pytest.mark.parametrize("database", ["there", "elsewhere"])
def test_a_script_that_fills_the_disk_of_its_client(database: str, make_pair: MakePair, tmp_path: Path, marks: Path, root: None) -> None:
    """Its job ends by itself, and says why; others wait, say so, and run when there is room. Also with the client's database there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    try:
        own = make_pair(client={"DATA_PATH": str(disk / "data"), "JOBORCH_MIN_FREE": "1M"})
        own.client.settings["DB_PATH"] = str((disk if database == "there" else tmp_path) / "client.db")
        own.client.data = disk / "data"
        own.start()
        script = f"echo ran >> {marks}; echo begun >&2; dd if=/dev/zero of=big bs=1M; dd if=/dev/zero of=rest bs=1; exit 3"
        job = wait_status(own.server, submit(own.server, script), *ENDED)
        check_end(own, job, "Failed", "user")
        assert (job["exit_code"], marks.read_text()) == (3, "ran\n")
        assert len(partial(own.server, job["id"])["big"]) > 10 * MIB
        waiting = submit(own.server, "true")
        # What was held back for the database is room for a small one, where it had to be given free.
        wait_for(
            lambda: "disk" in str(own.server.job(waiting)["waiting_for"]) or own.server.job(waiting)["status"] in ENDED, 20, "a reason"
        )
        (own.client.data / "jobs" / f"{job['uuid']}.1" / "work" / "big").unlink()
        check_end(own, wait_status(own.server, waiting, *ENDED, limit_s=60), "Completed", None)
    finally:
        end_all_below(disk)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_result_that_takes_longer_to_pack_than_a_server_waits(data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of files, or a slow disk: what was packed for the first call is there for a later one, or it never gets through."""
    real, packed = joborch.pack_payload, list[int]()
    real_call = joborch.Link.call

    def slowly(client: Client, job: Job, *how: Any) -> joborch.Archive:
        packed.append(job.id)
        client.stopping.wait(1.5)
        return real(client, job, *how)

    def impatient(link: joborch.Link, method: str, url: str, read_timeout_s: float = 0.5, **options: Any) -> Any:
        return real_call(link, method, url, min(read_timeout_s, 0.5), **options)

    replace(monkeypatch, "pack_payload", slowly)
    monkeypatch.setattr(joborch.Link, "call", impatient)
    other = DataFolder(str(tmp_path / "server"))
    other.open()
    yard = Yard(data, PORT="0")
    try:
        payload = yard.run(yard.submit("echo done > result"))
        with serving(yard.client) as url:
            desk = Desk(other, url, SERVICE_EXAMPLE_TOKEN="t")
            job = desk.with_client(Status.RUNNING)
            with desk.store.core.inside():
                desk.store.db.execute("UPDATE jobs SET dest_id = :id WHERE id = :job", {"id": str(payload.id), "job": job.id})
            replace(monkeypatch, "named", lambda _: {})
            joborch.report(desk.server, desk.link, event(job, id=payload.id))

            def settled() -> bool:
                fetch_tick(desk.server, desk.link)
                desk.clock.pass_s(30)
                return desk[job].status is Status.COMPLETED

            try:
                wait_for(settled, what="the result, which is packed in 1.5 s, fetched by calls of 0.5 s")
            finally:
                print(f"packed {len(packed)} times; {desk.reasons(job)}")
            desk.store.close()
    finally:
        other.lock.close()
        yard.close()


# == The same where payloads are isolated: all at once, as a plain user, since each has processes of its own ==


@pytest.fixture(scope="module", params=["process", "full", *(["user"] if os.geteuid() == 0 else [])])
def apart(request: pytest.FixtureRequest, pyz: Path) -> Iterator[tuple[Pair, Path]]:
    """A pair with this isolation, and a folder to which its scripts may write."""
    folder = Path(tempfile.mkdtemp(prefix="joborch-open-"))
    folder.chmod(0o755)
    common = folder / "common"
    common.mkdir()
    common.chmod(0o777)
    client = {"JOBORCH_SLOTS": "40", "JOBORCH_KILL_GRACE": "0.5", "JOBORCH_ISOLATION": request.param}
    client.update({"JOBORCH_BIND_RW": str(common)} if request.param != "process" else {})
    client.update({"JOBORCH_UIDS": SCRIPT_UIDS} if request.param == "user" else {})
    server = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    plain = os.geteuid() == 0 and request.param != "user"
    options = {"user": NOBODY_UID, "program": open_program(folder, pyz)} if plain else {}
    made = Pair(folder / "pair", server, client, **options)
    try:
        yield made.start(), common
    finally:
        made.close()
        end_all_marked(made)
        shutil.rmtree(folder)


def send_all(pair: Pair, common: Path, scripts: dict[str, str], wants: int = 1) -> dict[str, int]:
    """Submit these scripts, and return their ids by name once each has appended to its file and has so many processes."""
    files = {"hopper.pl": HOPPER.encode()}
    numbers = {}
    for name, script in scripts.items():
        numbers[name] = submit(pair.server, script.replace("MARKS", shlex.quote(str(common / name))), files)

    for name in scripts:
        wait_for(lambda: (common / name).exists() or pair.server.job(numbers[name])["status"] in ENDED, 90, name)  # noqa: B023
        assert (common / name).exists(), f"{name}: {pair.server.job(numbers[name])['reason']}"
    for name, number in numbers.items():
        seen = seen_of(name, wants)
        wait_for(lambda: len(processes_of(pair, pair.server.job(number))) >= seen, 90, f"the processes of {name!r}")  # noqa: B023
    return numbers


def test_what_runs_on_is_ended_where_payloads_are_isolated(apart: tuple[Pair, Path]) -> None:
    """Also if the client was started again meanwhile."""
    pair, common = apart
    gate = common / "gate"
    rest = f"sleep 0.2\necho ran >> MARKS\nuntil [ -e {gate} ]; do sleep 0.05; done\necho done > result\n"
    numbers = send_all(pair, common, {name: f"{tree}\n{rest}" for name, tree in LEAVES.items()}, 3)
    pair.client.kill()
    pair.client.start()
    gate.touch()
    for name, number in numbers.items():
        job = wait_status(pair.server, number, *ENDED, limit_s=90)
        check_end(pair, job, "Completed", None)
        assert job["reason"] == "run.sh ended with exit status 0; processes that it left running were killed", name
        assert download(pair.server, number)["result"] == b"done\n"


def test_terminate_where_payloads_are_isolated(apart: tuple[Pair, Path]) -> None:
    """200 means that nothing of it runs any more."""
    pair, common = apart
    trees = {
        f"{name}, ended": TREES[name].replace("3000", "30000")
        for name in ("deaf", "hops, in sessions of their own", "without its environment", "stopped")
    }
    scripts = {name: tree if "MARK" in tree else f"{tree}\nMARK\nsleep 1000" for name, tree in trees.items()}
    numbers = send_all(pair, common, {name: script.replace("MARK", "echo ran >> MARKS") for name, script in scripts.items()}, 8)
    for number in numbers.values():
        wait_status(pair.server, number, "Running")
        answer = pair.server.post(f"/terminate/{number}")
        assert (answer.status_code, processes_of(pair, pair.server.job(number))) == (200, []), answer.text
        check_end(pair, pair.server.job(number), "Killed", "cancelled")


def test_an_isolated_script_harms_only_itself(apart: tuple[Pair, Path]) -> None:
    """It cannot kill or stop what watches it, and what it writes into its own folders decides nothing about others."""
    pair, common = apart
    harmless = {f"kills {name}": f"{killer}\nsleep 0.3; exit 0" for name, killer in KILLERS.items()}
    harmless["stops its wrapper"] = "kill -STOP $PPID; exit 0"
    # Not the one that empties TMPDIR: under `full` that is /tmp, in which this test's own folders are.
    hostile = {name.replace("/", "_"): script for name, script in HOSTILE.items() if "TMPDIR" not in script}
    numbers = send_all(pair, common, {name: f"echo ran >> MARKS\n{script}" for name, script in {**harmless, **hostile}.items()}, 0)
    for name, number in numbers.items():
        job = wait_status(pair.server, number, *ENDED, limit_s=90)
        assert job["attempt"] == 1, f"{name}: {job['reason']}"
        check_end(pair, job, job["status"] if name in hostile else "Completed", job["cause"] if name in hostile else None)
    check_others(pair)
