"""Control groups of payloads (cgroup v2), in a group that is delegated to this process: the kernel counts, limits and ends a script."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakePair
from harness import ENDED, NOBODY_UID, SCRIPT_UIDS, open_program, submit, wait_for, wait_status
from world import Yard

import joborch
from joborch import DataFolder, Status, run_tick
from joborch_base.cgroups import Groups, delegated_group

pytestmark = pytest.mark.usefixtures("strangers_are_safe")

VALUES = ["none", "process", "full", *(["user"] if os.geteuid() == 0 else [])]
# It gives up everything by which it could be found: session, parent, environment and folder.
ESCAPED = "(setsid env -i bash -c 'cd /; (exec -a hidden sleep 1000) & exit' </dev/null >/dev/null 2>&1 &)"


def members(group: Path) -> list[int]:
    """The processes in a group."""
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


@pytest.fixture(name="group")
def group_fixture(root: None) -> Iterator[Path]:
    """A group that is delegated, with this process in a group below it."""
    mount = next((line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line), "")
    path = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].split("\n")[0]
    before = Path(mount, path)
    group = Path(mount, f"joborch-test-{os.getpid()}")
    try:
        (group / "client").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"needs a cgroup v2 hierarchy in which root may make groups: {error}")
    try:
        os.setxattr(group, "user.delegate", b"1")
        (group / "client/cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            (group / "cgroup.kill").write_text("1")
        wait_for(lambda: "populated 0" in (group / "cgroup.events").read_text(), 60, "the end of all processes")
        for place, _, _ in os.walk(group, topdown=False):
            Path(place).rmdir()


@pytest.fixture(name="yard", params=VALUES)
def yard_fixture(request: pytest.FixtureRequest, group: Path, data: DataFolder) -> Iterator[Yard]:
    """A client whose payloads have control groups, for each value of JOBORCH_ISOLATION."""
    more = {"JOBORCH_UIDS": SCRIPT_UIDS} if request.param == "user" else {}
    made = Yard(data, JOBORCH_ISOLATION=request.param, JOBORCH_MAX_PROCESSES="30", **more)
    yield made
    made.close()


def test_a_script_and_all_that_it_starts_are_in_its_group(group: Path, yard: Yard) -> None:
    """Its wrapper and client are not. What hides from a search is killed with its script, and its CPU time counts."""
    job = yard.submit(f"{ESCAPED}\nfor i in {{1..20000}}; do :; done\ntouch ready; until [ -e go ]; do sleep 0.02; done")
    run_tick(yard.client)
    wait_for((yard.folder(job) / "work/ready").exists, 60, "the script")
    own = group / f"joborch-{job.mark}"
    wait_for(lambda: any(b"hidden" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(own)), 60, "what it left")
    assert int((yard[job].handle or "").split()[0]) not in members(own)
    (yard.folder(job) / "work/go").touch()
    yard.until(job, Status.COMPLETED)
    assert not own.exists()
    assert (yard[job].cpu_time or 0) > 0


def test_a_client_that_starts_again_ends_what_is_in_a_group(group: Path, yard: Yard) -> None:
    job = yard.submit(f"trap '' TERM\n{ESCAPED}\ntouch ready; while :; do sleep 1000; done")
    run_tick(yard.client)
    wait_for((yard.folder(job) / "work/ready").exists, 60, "the script")
    yard.restart()
    yard.store.request_kill(job.id, joborch.Cause.CANCELLED)
    joborch.end_tick(yard.client)
    assert yard[job].status is Status.KILLED
    assert not (group / f"joborch-{job.mark}").exists()


HELD = {
    "pids": (
        "for i in {1..60}; do sleep 1000 & done 2>/dev/null; wait; exit 0",
        "it ran 31 processes and threads at once, more than the 30 .*",
    ),
    "memory": (
        "/usr/bin/python3 -c 'bytearray(300 << 20)'; exit 0",
        "it used all of the 100 MiB of memory asked for",
    ),
}


@pytest.mark.parametrize("controller", HELD)
def test_a_limit_that_the_kernel_holds(controller: str, group: Path, data: DataFolder) -> None:
    """The script is Failed, whatever it makes of what the kernel said."""
    script, said = HELD[controller]
    yard = Yard(data, JOBORCH_MAX_PROCESSES="30")
    try:
        groups = yard.client.executor.groups  # type: ignore[attr-defined]
        if controller not in groups.controllers:
            pytest.skip(f"needs the controller {controller} in cgroup v2: here it is missing, or a hierarchy of cgroup v1 has it")
        job = yard.submit(script, X_Joborch_Memory="100")
        run_tick(yard.client)

        def ended() -> bool:
            joborch.limit_tick(yard.client)
            joborch.end_tick(yard.client)
            run_tick(yard.client)
            return yard[job].status is Status.FAILED

        wait_for(ended, 90, "the limit")
        assert yard[job].cause == "limit"
        assert re.search(said, yard[job].reason), yard[job].reason
    finally:
        yard.close()


def test_a_script_gets_no_more_cores_than_its_job_asked_for(group: Path, data: DataFolder) -> None:
    yard = Yard(data)
    try:
        if "cpu" not in yard.client.executor.groups.controllers:  # type: ignore[attr-defined]
            pytest.skip("needs the controller cpu in cgroup v2: here it is missing, or a hierarchy of cgroup v1 has it")
        job = yard.submit("for i in 1 2 3; do (until [ -e go ]; do :; done) & done; wait", X_Joborch_Cpus="2")
        run_tick(yard.client)
        own = group / f"joborch-{job.mark}"
        wait_for(lambda: "nr_throttled 0" not in (own / "cpu.stat").read_text(), 60, "the limit")
        assert (own / "cpu.max").read_text() == "200000 100000\n"
        (yard.folder(job) / "work/go").touch()
        yard.until(job, Status.COMPLETED)
    finally:
        yard.close()


def test_a_plain_user_to_whom_a_group_is_delegated(group: Path, make_pair: MakePair, open_folder: Path, pyz: Path) -> None:
    """As by systemd's user manager: its client makes groups, sets limits and kills, with what it owns."""
    for path in (group, *(group / name for name in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "client/cgroup.procs"))):
        os.chown(path, NOBODY_UID, NOBODY_UID)
    # The client is started in the group; a script says in which one it runs, and leaves a process that hides.
    pair = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    job = submit(pair.server, f"{ESCAPED}\ncat /proc/self/cgroup\ntouch ready; until [ -e go ]; do sleep 0.02; done", cpus=2)
    work = pair.client.data / "jobs" / f"{pair.server.job(job)['uuid']}.1/work"
    wait_for((work / "ready").exists, 90, "the script")
    own = group / f"joborch-{work.parent.name}"
    assert own.stat().st_uid == NOBODY_UID
    assert b"hidden" in b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(own))
    has_cpu = (own / "cpu.max").exists()
    assert not has_cpu or (own / "cpu.max").read_text() == "200000 100000\n"
    (work / "go").touch()
    assert wait_status(pair.server, job, *ENDED, limit_s=90)["status"] == "Completed"
    wait_for(lambda: not own.exists(), 90, "the end of the group")
    assert pair.server.job(job)["cpu_time"] > 0
    if not has_cpu:
        pytest.skip("all but cores: the controller cpu is missing in cgroup v2, or a hierarchy of cgroup v1 has it")


def test_a_group_that_is_not_delegated_is_left_alone(group: Path) -> None:
    """Each condition is named; nothing is made."""
    assert delegated_group() == (group, "")
    os.setxattr(group, "user.delegate", b"0")
    groups = Groups()
    assert (groups.parent, groups.entry_text()) == (None, "")
    assert "no control group is delegated to this client (systemd: Delegate=yes and DelegateSubgroup=client)" in groups.summary()
    groups.make("some.1", 0, 1, 1)
    assert sorted(path.name for path in group.iterdir() if path.is_dir()) == ["client"]


def test_a_script_whose_group_cannot_be_made_runs_without(group: Path, data: DataFolder) -> None:
    """What it uses is looked at, as where there are no groups."""
    (group / "cgroup.max.descendants").write_text("1")  # this process has that one
    yard = Yard(data)
    try:
        job = yard.run(yard.submit("echo done > result"))
        assert job.status is Status.COMPLETED, job.reason
        assert not (group / f"joborch-{job.mark}").exists()
    finally:
        yard.close()
