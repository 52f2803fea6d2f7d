"""DIRAC: JDL, archives and logins by themselves, and the executor with a real DiracX whose pilot the tests play."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import gzip
import io
import json
import os
import re
import stat
import subprocess
import tarfile
import threading
import time
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from grid import PARSE, DiracX, Pilot
from harness import NOBODY_UID, JoinedPair, Pair, download, free_port, open_program, submit, wait_for, wait_status
from hypothesis import given
from hypothesis import strategies as st
from world import BOUNDED, USES_MEMORY, HandClock, changed, files_with, new_job, tried

import joborch
from joborch import BackendUnavailable, BatchOptions, CannotRun, Cause, ConfigError, DataFolder, Job, Outcome, StillRunning
from joborch_plugins import dirac
from joborch_plugins.dirac import DiracExecutor, DiracLogin

GRACE_S = 0.2

MOMENT = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d"  # with the day if that is not today


pytestmark = pytest.mark.timeout(400)  # the first test also waits for the service's start


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submissions that a restart cut off are not waited for, but where a test wants it."""
    monkeypatch.setattr(dirac, "RESTART_SETTLE_S", 0.0)


HOSTILE = ["a;b", 'a"; Owner = "root', "a[b", "a]b", "{a}", "a\nb", "%j", "a b", "ä", "\\", "", '"', "a\0b", "\udcff"]


class Crash(BaseException):
    """The process dies here, as far as what it had written goes."""


def crash_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the program end at one of its crash points."""

    def point(passed: str) -> None:
        if passed == name:
            raise Crash

    monkeypatch.setattr(dirac, "crash_point", point)


# == The service ==


@pytest.fixture(scope="session")
def diracx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiracX]:
    """One real service for all tests."""
    service = DiracX(tmp_path_factory.mktemp("diracx"))
    yield service
    service.stop()


def write_login(path: Path, login: dict[str, str], lasts_s: float = 1000.0) -> Path:
    """A credentials file as the official client leaves it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**login, "expires_on": int(time.time() + lasts_s)}))
    path.chmod(0o600)
    return path


class Bench:
    """Payloads in a data folder, the executor, and pilots for its jobs."""

    def __init__(self, data: DataFolder, diracx: DiracX, credentials: Path) -> None:
        self.data, self.diracx = data, diracx
        config = joborch.load_config("client", {}, {"DATA_PATH": str(data.path)})
        self.config = dataclasses.replace(
            config,
            dirac_url=diracx.url,
            dirac_credentials=str(credentials),
            vanish_grace_s=GRACE_S,
            dirac_quiet_s=2 * GRACE_S,
            batch_interval_s=0.0,
        )
        self.store = joborch.Store(":memory:", "client", HandClock())
        self.executor = DiracExecutor(data, self.config)
        self.pilots: list[Pilot] = []

    def payload(self, script: str, **changes: Any) -> Job:
        """A payload whose files are in place."""
        job = self.store.add(new_job(**changes), "submitted")
        work = self.data.job(job.mark) / "work"
        work.mkdir(parents=True)
        (work / "run.sh").write_text(script)
        return job

    def start(self, script: str, **changes: Any) -> tuple[Job, Pilot]:
        """A payload that was submitted, and its pilot."""
        job = self.payload(script, **changes)
        job = changed(job, handle=self.executor.start(job))
        return job, self.pilot(job)

    def pilot(self, job: Job) -> Pilot:
        """A pilot for a job."""
        self.pilots.append(Pilot(self.diracx, int(job.handle or 0), self.data.path / f"node-{job.handle}-{len(self.pilots)}"))
        return self.pilots[-1]

    def outcome(self, job: Job) -> Outcome:
        """What a tick is told."""
        return self.executor.poll([job])[job.id]

    def end(self, job: Job) -> Outcome:
        """The outcome once it is over."""
        return wait_for(lambda: (outcome := self.outcome(job)) and not outcome.alive and outcome, what="the end of a job")

    def work(self, job: Job) -> Path:
        """Where its results are."""
        return self.data.job(job.mark) / "work"


@pytest.fixture
def bench(data: DataFolder, diracx: DiracX, tmp_path: Path) -> Iterator[Bench]:
    """A bench with a login that lasts."""
    made = Bench(data, diracx, write_login(tmp_path / "credentials.json", {"access_token": diracx.alice, "refresh_token": "none"}))
    yield made
    for pilot in made.pilots:
        if pilot.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pilot.process.pid, 9)
            pilot.process.wait(30)
    made.store.close()


# == JDL ==


@pytest.fixture(scope="session")
def parser(diracx: DiracX) -> Iterator[subprocess.Popen[str]]:
    """DIRAC's own reader of JDL."""
    with diracx.python("-c", PARSE, stdin=subprocess.PIPE) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def parsed(parser: subprocess.Popen[str], jdl: str) -> dict[str, list[str]]:
    """What DIRAC makes of a JDL."""
    assert parser.stdin and parser.stdout
    parser.stdin.write(json.dumps(jdl) + "\n")
    parser.stdin.flush()
    return dict(json.loads(parser.stdout.readline()))


@pytest.fixture(scope="module")
def any_job() -> Job:
    """A payload that asks for something of everything."""
    store = joborch.Store(":memory:", "client", HandClock())
    job = store.add(new_job(cpus=4, memory=2000, timeout=90.0), "submitted")
    store.close()
    return job


def test_jdl_says_what_was_asked_for(any_job: Job, parser: subprocess.Popen[str]) -> None:
    named = {"dirac_site": "LCG.A.fr, LCG.B.it", "dirac_tags": "GPU,x", "dirac_platform": "x86_64-el9"}
    options = BatchOptions(**named, dirac_jdl='Priority = 3; BannedSites = {"C"}; ')
    said = parsed(parser, dirac.build_jdl(any_job, options, "SB:SE|/S3/b/vo/g/u/sha256:00.tar.bz2"))
    assert said == {
        "JobName": [any_job.mark],
        "Executable": ["joborch.sh"],
        "StdOutput": ["std.out"],
        "StdError": ["std.err"],
        "InputSandbox": ["SB:SE|/S3/b/vo/g/u/sha256:00.tar.bz2"],
        "OutputSandbox": ["joborch-output.tar.gz", "std.out", "std.err"],
        "NumberOfProcessors": ["4"],
        "MaxNumberOfProcessors": ["4"],
        "MinRAM": ["2000"],
        "CPUTime": ["360"],
        "Site": ["LCG.A.fr", "LCG.B.it"],
        "Tags": ["GPU", "x"],
        "Platform": ["x86_64-el9"],
        "Priority": ["3"],
        "BannedSites": ["C"],
    }


@BOUNDED
@given(text=st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12), st.text('ab;"[]{},= \n%', max_size=6)))
def test_hostile_words_are_refused_or_arrive_as_they_are(text: str, any_job: Job, parser: subprocess.Popen[str]) -> None:
    jdl = tried(lambda: dirac.build_jdl(any_job, BatchOptions(dirac_platform=text, dirac_site=text), "SB:x"), ConfigError)
    if isinstance(jdl, ConfigError):
        assert "JDL can only have" in str(jdl)
        return
    said = parsed(parser, jdl)
    sites = [site.strip() for site in text.split(",") if site.strip()]
    assert said.get("Platform", [""]) == [text] and said.get("Site", []) == sites
    assert said["JobName"] == [any_job.mark] and "Owner" not in said


@BOUNDED
@given(mark=st.text(max_size=200))
def test_job_names_are_plain(mark: str) -> None:
    name = dirac.job_name(mark)
    assert re.fullmatch(r"[A-Za-z0-9.-]{1,128}", name) and (name == mark or len(name) == 64)


@pytest.mark.parametrize(
    "lines",
    ["JobName = 1", "outputsandbox = {}", "Parameters = 3", "ParameterStart.x = 1", "Owner = 1", "x", "= 1", "X = [1]", 'X = "a', "X = {1"],
)
def test_free_lines_of_jdl_that_are_refused(lines: str) -> None:
    with pytest.raises(ConfigError, match="DIRAC_JDL"):
        dirac.check_dirac_options(BatchOptions(dirac_jdl=f"Priority = 1; {lines};"))


def test_the_launcher_quotes_what_users_say(any_job: Job, tmp_path: Path) -> None:
    job = changed(any_job, service="x'; touch pwned; '$(touch pwned)", remote_id="a\nb @ARGUMENTS@")
    text = dirac.launcher(job, 5.0).decode()
    (tmp_path / "wrapper.sh").write_text('echo "$JOBORCH_SERVICE|$JOBORCH_JOB_ID|$2 $3"; exit 222')
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{job.service}|{job.remote_id}|1 90.000\n"
    assert not (tmp_path / "pwned").exists()
    assert done.returncode == 1, "222 would make DIRAC run the job again"


# == Archives ==


def tar_of(*members: tuple[str, bytes, str], mode: str = "w") -> io.BytesIO:
    """An archive of (name, type, content or target of the link)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content
            archive.addfile(member, io.BytesIO(content.encode()))
    data.seek(0)
    return data


def unpacked(data: io.BytesIO, target: Path) -> list[str]:
    """Unpack below `target`, as a stream."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=data, mode="r|*") as archive:
        return dirac.unpack(archive, target, 0)


F, L, H, D = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize("name", ["../x", "/etc/x", "work/../../x", "work/a/../../../x"])
@pytest.mark.parametrize("kind", [F, L, D, tarfile.FIFOTYPE])
def test_a_path_that_leaves_the_folder_is_refused(name: str, kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(dirac.BadSandbox, match="leads out"):
        unpacked(tar_of((name, kind, "x")), tmp_path / "out")


def test_what_is_kept_and_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    outside = str(tmp_path)
    members = [
        ("./work/a", F, "one"), ("work/sub/b", F, "two"), ("work/empty", D, ""), ("work/a", F, "newer"), ("elsewhere", F, "x"),
        ("work/up", L, "../stdout"), ("work/good", L, "sub/b"), ("work/dangling", L, "nowhere"), ("stdout", F, "out"),
        ("work/abs", L, "/etc/passwd"), ("work/out", L, "../../secret"), ("work/chain", L, "sub/hop/secret"), ("work/sub/hop", L, outside),
        ("work/evil", L, outside), ("work/evil/planted", F, "x"), ("work/hard", H, "work/a"), ("work/hard2", H, "../secret"),
        ("work/hard3", H, "work/nothing"), ("work/way", L, outside), ("work/hard4", H, "work/way/secret"),
        ("work/dev", tarfile.CHRTYPE, ""), ("work/pipe", tarfile.FIFOTYPE, ""),
    ]  # fmt: skip
    left_out = unpacked(tar_of(*members), tmp_path / "out")
    work = tmp_path / "out/work"
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if not path.is_dir()} == {
        "work/a", "work/sub/b", "work/up", "work/good", "work/dangling", "stdout", "work/evil/planted", "work/hard",
    }  # fmt: skip
    assert (work / "a").read_text() == (work / "hard").read_text() == "newer" and (work / "good").read_text() == "two"
    assert sorted(left_out) == [
        "work/abs", "work/chain", "work/dev", "work/evil", "work/hard2", "work/hard3", "work/hard4", "work/out", "work/pipe",
        "work/sub/hop", "work/way",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "secret"]


NAMES = st.sampled_from(["work", "a", "b", "..", ".", "", "stdout", "x/y", "/"])


@BOUNDED
@given(
    members=st.lists(
        st.tuples(
            st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.sampled_from([F, L, H, D]), st.lists(NAMES, max_size=4).map("/".join)
        ),
        max_size=8,
    )
)
def test_nothing_leaves_the_folder(members: list[tuple[str, bytes, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("place")
    (place / "stdout").write_text("a stranger's")
    tried(lambda: unpacked(tar_of(*[member for member in members if member[0]]), place / "in/out"), (dirac.BadSandbox, OSError))  # type: ignore[arg-type]
    assert sorted(path.name for path in place.iterdir()) == ["in", "stdout"] and (place / "stdout").stat().st_nlink == 1
    assert (place / "stdout").read_text() == "a stranger's" and [path.name for path in (place / "in").iterdir()] == ["out"]
    root = os.path.realpath(place / "in/out")
    for path in (place / "in/out").rglob("*"):
        assert (os.path.realpath(path) + "/").startswith(root + "/")


def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), tarfile.open(fileobj=tar_of(("work/a", F, "x")), mode="r|") as archive:
        dirac.unpack(archive, tmp_path, 2**60)


@pytest.mark.parametrize("damage", ["none inside", "cut", "rubbish", "inner rubbish", "file and folder"])
def test_sandboxes_that_cannot_be_used(damage: str, tmp_path: Path) -> None:
    inner = tar_of(("work/a", F, "x"), ("work/a/b", F, "x")) if damage == "file and folder" else tar_of(("work/a", F, "x" * 5000))
    content = b"rubbish" if damage == "inner rubbish" else gzip.compress(inner.getvalue())
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w:bz2") as archive:
        member = tarfile.TarInfo("other" if damage == "none inside" else "joborch-output.tar.gz")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    data = {"cut": outer.getvalue()[:-60], "rubbish": b"rubbish"}.get(damage, outer.getvalue())
    (tmp_path / "sandbox").write_bytes(data)
    with pytest.raises(dirac.BadSandbox):
        dirac.unpack_outputs(tmp_path, "x.tar.bz2", 0)


# == What DIRAC says ==


def row(status: str, minor: str = "Some Minor", **more: Any) -> dict[str, Any]:
    """A row as a search gives it."""
    return {"JobID": 7, "Status": status, "MinorStatus": minor, "LastUpdateTime": "2026-11-26T14:02:00.1Z", **more}


@pytest.mark.parametrize(
    ("status", "minor", "cause"),
    [
        ("Failed", "Job stalled: pilot not running", Cause.INFRASTRUCTURE),
        ("Failed", "Watchdog identified this job as stalled", Cause.INFRASTRUCTURE),
        ("Failed", "Job has reached the CPU limit of the queue", Cause.LIMIT),
        ("Failed", "Job has exceeded maximum wall clock time", Cause.LIMIT),
        ("Failed", "Maximum of reschedulings reached", Cause.INFRASTRUCTURE),
        ("Done", "Execution Complete", Cause.INFRASTRUCTURE),
        ("Completed", "Pending Requests", Cause.INFRASTRUCTURE),
        ("Killed", "Marked for termination", Cause.CANCELLED),
    ],
)
def test_causes_without_an_exit_file(status: str, minor: str, cause: Cause) -> None:
    outcome = dirac.without_exit(row(status, minor))
    assert (outcome.alive, outcome.exit_status, outcome.cause) == (False, None, cause) and minor in outcome.reason and "7" in outcome.reason


@pytest.mark.parametrize(
    ("status", "minor", "exit_status", "cause"),
    [
        ("Done", "Execution Complete", 0, None),
        ("Failed", "Application Finished With Errors", 3, None),
        ("Failed", "Job stalled: pilot not running", 0, None),
        ("Failed", "Job has reached the CPU limit of the queue", 143, Cause.LIMIT),
        ("Failed", "Watchdog identified this job as stalled", 143, Cause.INFRASTRUCTURE),
        ("Failed", "Application Finished With Errors", 137, None),
        ("Killed", "Received Kill signal", 143, Cause.CANCELLED),
        ("Killed", "Received Kill signal", 0, None),
    ],
)
def test_the_exit_file_outranks_what_dirac_says(status: str, minor: str, exit_status: int, cause: Cause | None) -> None:
    outcome = dirac.weighed(row(status, minor), Outcome(False, exit_status))
    assert (outcome.exit_status, outcome.cause) == (exit_status, cause)


@pytest.mark.parametrize(
    "text", ["2026-11-26T14:02:00Z", "2026-11-26T14:02:00.000000Z", "2026-11-26T14:02:00+00:00", "2026-11-26T14:02:00"]
)
def test_times_of_dirac(text: str) -> None:
    assert dirac.dirac_time(text) == 1_795_701_720.0


@pytest.mark.parametrize("text", [None, "", "None", "yesterday"])
def test_no_time_at_all(text: str | None) -> None:
    assert dirac.dirac_time(text) == 0.0


@BOUNDED
@given(text=st.text())
def test_claims_of_rubbish_are_none(text: str) -> None:
    assert isinstance(dirac.claims(text), dict)
    assert isinstance(dirac.claims("a." + text), dict)


# == The login ==


@dataclasses.dataclass
class Keeper:
    """A login's file, who keeps it, and what was asked of the service for it."""

    path: Path
    diracx: DiracX
    asked: list[str] = dataclasses.field(default_factory=list)
    clock: joborch.Clock = dataclasses.field(default_factory=joborch.Clock)

    def new(self) -> DiracLogin:
        """One more program that uses the file."""
        service = dirac.DiracService(self.diracx.url, str(self.path), self.clock)
        real = service.login.refresh

        def refresh(token: str) -> tuple[int, Any]:
            self.asked.append(token)
            return real(token)

        service.login.refresh = refresh
        return service.login

    def stored(self) -> dict[str, Any]:
        """What the file holds."""
        return dict(json.loads(self.path.read_text()))

    def accepted(self, token: str) -> bool:
        """Whether the service takes an access token."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Connection": "close"}
        return self.diracx.http.request("POST", self.diracx.url + "/api/jobs/search", body=b"{}", headers=headers).status == 200


@pytest.fixture
def keeper(diracx: DiracX, tmp_path: Path) -> Keeper:
    """A new login whose access token has just ended."""
    return Keeper(write_login(tmp_path / "login/credentials.json", diracx.login(), -1.0), diracx)


def test_a_token_is_refreshed_and_written_down(keeper: Keeper) -> None:
    before, login = keeper.stored(), keeper.new()
    until = login.valid_until()
    token = login.token()
    after = keeper.stored()
    assert keeper.accepted(token) and token == after["access_token"] != before["access_token"]
    assert after["refresh_token"] != before["refresh_token"] and keeper.asked == [before["refresh_token"]]
    assert time.time() + 1000 < after["expires_on"] < time.time() + 1200 and stat.S_IMODE(keeper.path.stat().st_mode) == 0o600
    assert [path.name for path in keeper.path.parent.iterdir()] == ["credentials.json"]
    assert login.token() == token and len(keeper.asked) == 1 and login.owner() == "alice" and login.ended() == ""
    assert until and abs((login.valid_until() or 0) - until) < 2, "a rotated token keeps the end of the first one"
    again = login.token(refused=token)
    assert again != token and keeper.accepted(again) and keeper.stored()["access_token"] == again


def test_many_with_one_file_refresh_once(keeper: Keeper) -> None:
    logins, tokens = [keeper.new() for _ in range(6)], []
    threads = [threading.Thread(target=lambda login=login: tokens.append(login.token())) for login in logins]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(tokens) == 6 and len(set(tokens)) == 1 and len(keeper.asked) == 1 and keeper.accepted(tokens[0])


def test_the_official_client_shares_the_file(keeper: Keeper) -> None:
    """It waits for the lock of the very file, and must not show the token that was used up meanwhile."""
    official = (
        "import sys; from pathlib import Path; from diracx.client.patches.client.common import get_token\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(get_token(Path(sys.argv[1]), None, sys.argv[2], 'myDIRACClientID', True).token)"
    )
    login, address = keeper.new(), f"{keeper.diracx.url}/api/auth/token"
    with keeper.diracx.python("-c", official, str(keeper.path), address, stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        real = login.refresh

        def refresh(token: str) -> tuple[int, Any]:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            waiting = f"{process.pid} "
            wait_for(lambda: any(f" {waiting}" in line and "->" in line for line in Path("/proc/locks").read_text().splitlines()))
            return real(token)

        login.refresh = refresh
        ours = login.token()
        theirs = process.stdout.readline().strip()
    assert theirs == ours == keeper.stored()["access_token"] and keeper.accepted(ours)


def test_a_new_login_that_comes_before_the_lock_is_had_is_used(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who replaced the file left the old one behind, whose lock is worth nothing and whose token is used up."""
    new = write_login(keeper.path.with_name("new"), {"access_token": keeper.diracx.alice, "refresh_token": "newest"})
    real = fcntl.flock

    def late(file: Any, how: int) -> None:
        if new.exists():
            new.rename(keeper.path)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert keeper.new().token() == keeper.diracx.alice and keeper.asked == []


def test_a_held_lock_is_said(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirac, "LOGIN_LOCK_S", 0.1)
    with keeper.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BackendUnavailable, match="holds the lock"):
            keeper.new().token()
    assert keeper.accepted(keeper.new().token())


def test_a_token_lost_in_a_crash_ends_the_login(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, "dirac.refreshed")
        with pytest.raises(Crash):
            keeper.new().token()
    login = keeper.new()
    with pytest.raises(BackendUnavailable, match="log in again with `dirac login`") as first:
        login.token()
    assert re.search(rf"the login expired at {MOMENT} \(its refresh token was valid until {MOMENT}\)", str(first.value))
    asked = len(keeper.asked)
    with pytest.raises(BackendUnavailable) as second:
        login.token()
    assert str(second.value) == str(first.value) == login.ended() and len(keeper.asked) == asked, "nobody is asked in vain"
    keeper.diracx.spare.clear()  # an old token that is shown again ends all logins of its user
    write_login(keeper.path, keeper.diracx.login(), -1.0)
    assert keeper.accepted(login.token()) and login.ended() == ""


def test_a_refused_refresh_leaves_the_access_token_to_its_end(keeper: Keeper) -> None:
    token = keeper.diracx.alice
    write_login(keeper.path, {"access_token": token, "refresh_token": "rubbish"}, 30.0)
    login = keeper.new()
    assert login.token() == token and login.token() == token and len(keeper.asked) == 1 and login.ended() == ""
    with pytest.raises(BackendUnavailable, match="refuses both tokens"):
        login.token(refused=token)
    write_login(keeper.path, {"access_token": token, "refresh_token": "rubbish"}, -1.0)
    assert "the login expired at" in login.ended() and (login.valid_until() or 0) < time.time()


def test_a_login_that_ended_by_its_time_is_not_asked_for(keeper: Keeper) -> None:
    keeper.clock = HandClock(time.time() + 7 * 3600)
    with pytest.raises(BackendUnavailable, match="the login expired at"):
        keeper.new().token()
    assert keeper.asked == []


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"access_token": "a", "refresh_token": "b", "expires_on": "soon"}'])
def test_no_login(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    if content is not None:
        path.write_text(content)
    login = DiracLogin(str(path), lambda token: (500, {}), joborch.Clock())
    with pytest.raises(BackendUnavailable, match="log in with `dirac login`"):
        login.token()
    assert "log in with `dirac login`" in login.ended() and login.valid_until() is None


def test_a_full_disk_is_noticed_before_the_token_is_shown(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = keeper.stored()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(BackendUnavailable, match="could not be refreshed"):
            keeper.new().token()
    assert keeper.asked == [] and keeper.stored() == before


# == The executor, with the real service ==


def test_a_job_from_submission_to_its_results(bench: Bench) -> None:
    script = """
        mkdir -p out/deep; head -c 3000000 /dev/urandom >out/deep/data; ln -s out/deep/data link
        printf 'x' >$'odd;"[\\n] na\\xffme'
        rm input; echo "$JOBORCH_MARK $JOBORCH_CPUS $JOBORCH_USER_ID"; echo trouble >&2
        chmod 700 run.sh; echo $TMPDIR >tmpdir; : >$TMPDIR/x
    """
    job = bench.payload(script, cpus=2)
    (bench.work(job) / "input").write_text("in")
    (bench.work(job) / "empty").mkdir()
    job = changed(job, handle=bench.executor.start(job))
    pilot = bench.pilot(job)
    first = bench.outcome(job)
    assert first.alive and re.fullmatch(rf"DIRAC: Received since {MOMENT}, Job accepted \(job {job.handle}\)", first.waits)
    pilot.wait()
    assert "Waiting since" in bench.outcome(job).waits and "Pilot Agent Submission" in bench.outcome(job).waits
    pilot.start()
    assert bench.outcome(job) == Outcome(True)
    assert pilot.finish() == 0
    assert bench.end(job) == Outcome(False, 0)
    bench.executor.collect(job)
    mine, theirs = bench.work(job), pilot.folder / "payload/work"
    assert joborch.files_below(mine) == joborch.files_below(theirs) and not (mine / "input").exists() and (mine / "empty").is_dir()
    for name in joborch.files_below(theirs):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes() and (mine / name).lstat().st_mode == (
            theirs / name
        ).lstat().st_mode
    assert str((mine / "link").readlink()) == "out/deep/data" and (mine / "run.sh").stat().st_mode & 0o777 == 0o700
    folder = bench.data.job(job.mark)
    assert (folder / "stdout").read_text() == f"{job.mark} 2 1\n" and (folder / "stderr").read_text() == "trouble\n"
    assert "ready" in (folder / "started.1").read_text() and not list(bench.data.tmp.iterdir())
    assert bench.executor.problem() == ""


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("exit 222", 222), ("kill -9 $$", 137), ("chmod 000 . ..; exit 7", 7)])
def test_a_script_that_fails(script: str, status: int, bench: Bench) -> None:
    job, pilot = bench.start(script)
    assert pilot.run() == 1
    assert bench.end(job) == Outcome(False, status)


def test_a_script_that_reaches_its_limit(bench: Bench) -> None:
    job, pilot = bench.start("echo partial >out; sleep 100", timeout=0.3)
    assert pilot.run() == 1
    assert bench.end(job).cause is Cause.LIMIT and (bench.work(job) / "out").read_text() == "partial\n"


def test_what_the_pilot_loses_is_the_infrastructures(bench: Bench) -> None:
    job, pilot = bench.start("true")
    pilot.wait().say("Matched")
    pilot.say("Running", "Application")
    pilot.say("Failed", "Job stalled: pilot not running")
    outcome = bench.end(job)
    assert (
        outcome.cause is Cause.INFRASTRUCTURE
        and "Job stalled: pilot not running" in outcome.reason
        and (bench.work(job) / "run.sh").exists()
    )


def test_outputs_that_come_after_the_word_failed_are_waited_for(bench: Bench) -> None:
    bench.executor.config = dataclasses.replace(bench.config, vanish_grace_s=100.0)
    job, pilot = bench.start("echo partial >out; sleep 100")
    pilot.wait().start()
    wait_for((pilot.folder / "payload/work/out").exists)
    pilot.kill()
    pilot.say("Failed", "Job has reached the CPU limit of the queue")
    assert bench.outcome(job).alive
    wait_for(lambda: not bench.executor.judging)
    assert bench.outcome(job).alive
    pilot.upload()
    outcome = bench.end(job)
    assert (outcome.exit_status, outcome.cause) == (143, Cause.LIMIT) and (bench.work(job) / "out").read_text() == "partial\n"


def test_a_damaged_sandbox_is_not_used(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    job, pilot = bench.start("true")
    pilot.wait().start()
    pilot.upload_bytes(b"rubbish" + str(pilot.number).encode())
    pilot.say("Done", "Execution Complete")
    assert bench.end(job).cause is Cause.INFRASTRUCTURE and "cannot be fetched: it is damaged" in caplog.text


def test_outputs_that_arrive_damaged_are_fetched_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job, pilot = bench.start("true")
    pilot.run()
    real = bench.executor.service.send

    def changing(method: str, url: str, *arguments: Any, **more: Any) -> Any:
        answer = real(method, url, *arguments, **more)
        if more.get("stream"):
            whole = answer.content
            answer.iter_content = lambda size: iter([whole[:-1] + bytes([whole[-1] ^ 1])])
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(bench.executor.service, "send", changing)
        with pytest.raises(BackendUnavailable, match="arrived damaged"):
            bench.executor.collect(job)
    assert joborch.read_exit(bench.data.job(job.mark)) is None and not list(bench.data.tmp.iterdir())
    bench.executor.collect(job)
    assert bench.end(job) == Outcome(False, 0)


def test_zstd_is_read(bench: Bench) -> None:
    job, pilot = bench.start("echo zstd >out")
    pilot.wait().start()
    assert pilot.process and pilot.process.wait(30) == 0
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as archive:
        archive.add(pilot.folder / "joborch-output.tar.gz", "joborch-output.tar.gz")
    packed = subprocess.run(["zstd", "-cq"], input=outer.getvalue(), capture_output=True, check=True).stdout
    pilot.upload_bytes(packed, "tar.zst")
    pilot.say("Done", "Execution Complete")
    assert bench.end(job) == Outcome(False, 0) and (bench.work(job) / "out").read_text() == "zstd\n"


@pytest.mark.parametrize("point", ["dirac.unpacked", "dirac.exchanged"])
def test_a_crash_while_outputs_come_is_done_again(point: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job, pilot = bench.start("echo mine >out; rm run.sh")
    pilot.run()
    with monkeypatch.context() as patch:
        crash_at(patch, point)
        with pytest.raises(Crash):
            bench.executor.collect(job)
    assert joborch.read_exit(bench.data.job(job.mark)) is None, "the exit file comes last"
    bench.executor = DiracExecutor(bench.data, bench.config)
    assert bench.end(job) == Outcome(False, 0) and joborch.files_below(bench.work(job)) == ["out"]


def test_a_lost_answer_is_found_by_the_mark(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = bench.payload("true"), bench.payload("true")
    real = bench.executor.service.send

    def losing(method: str, url: str, *arguments: Any, **more: Any) -> Any:
        answer = real(method, url, *arguments, **more)
        if url.endswith("/jdl"):
            raise dirac.AnswerLost("DIRAC: no answer")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(bench.executor.service, "send", losing)
        with pytest.raises(BackendUnavailable, match="lost"):
            bench.executor.start(job)
    found = bench.executor.find([job, other])
    assert found == {job.mark: str(bench.diracx.rows(JobName=job.mark)[0]["JobID"])}
    job = changed(job, handle=found[job.mark])
    bench.pilot(job).run()
    assert bench.end(job) == Outcome(False, 0) and len(bench.diracx.rows(JobName=job.mark)) == 1


def test_a_submission_that_may_still_be_worked_on_is_not_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.payload("true")
    real = bench.executor.service.send

    def silent(method: str, url: str, *arguments: Any, **more: Any) -> Any:
        if url.endswith("/jdl"):
            raise dirac.AnswerLost("DIRAC: no answer")
        return real(method, url, *arguments, **more)

    monkeypatch.setattr(bench.executor.service, "send", silent)
    with pytest.raises(BackendUnavailable, match="lost"):
        bench.executor.start(job)
    assert bench.executor.find([job]) == {job.mark: ""}, "nobody can tell yet"
    monkeypatch.setattr(dirac, "SUBMIT_SETTLE_S", 0.0)
    assert bench.executor.find([job]) == {}


def test_a_submission_that_a_crash_cut_off_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirac, "RESTART_SETTLE_S", 60.0)
    job = bench.payload("true")
    assert bench.executor.find([job]) == {job.mark: ""}, "nobody can tell yet"
    handle = bench.executor.start(job)
    assert bench.executor.find([job]) == {job.mark: handle}


def test_a_twin_is_ended_and_one_that_has_ended_is_left_alone(bench: Bench) -> None:
    """Two answers were lost: the attempt is what has not ended."""
    job = bench.payload("true")
    first, second = bench.executor.start(job), bench.executor.start(job)
    bench.pilot(changed(job, handle=first)).run()
    assert bench.executor.find([job]) == {job.mark: second}
    third = bench.executor.start(job)
    assert bench.executor.find([job]) == {job.mark: second}
    assert bench.diracx.rows(JobID=int(third))[0]["Status"] == "Killed"


def test_nothing_is_known_of_jobs_while_somebody_else_is_logged_in(bench: Bench) -> None:
    """They are neither given up nor submitted again; nor where a token does not say whose it is."""
    job, _ = bench.start("true")
    assert bench.outcome(job).waits.startswith("DIRAC: Received")
    write_login(Path(bench.config.dirac_credentials), {"access_token": bench.diracx.bob, "refresh_token": "none"})
    assert bench.outcome(job).alive
    assert "bob is logged in, but this client's jobs belong to alice" in bench.executor.problem()
    for token in (bench.diracx.bob, "opaque"):
        write_login(Path(bench.config.dirac_credentials), {"access_token": token, "refresh_token": "none"})
        with pytest.raises(BackendUnavailable, match=r"logged in|whose it is"):
            bench.executor.find([job])
        with pytest.raises(StillRunning):
            bench.executor.cancel(job)
    write_login(Path(bench.config.dirac_credentials), {"access_token": bench.diracx.alice, "refresh_token": "none"})
    assert bench.outcome(job).waits.startswith("DIRAC: Received")
    assert bench.executor.problem() == ""


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_no_header_of_an_archive_fills_the_memory(kind: bytes, tmp_path: Path) -> None:
    """A few hundred KiB that become many MiB, and would be read at once; the inner archive and the outer one."""
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 64 << 20
    bomb = header.tobuf(tarfile.GNU_FORMAT) + bytes(64 << 20) + tar_of(("work/a", tarfile.REGTYPE, "a")).getvalue()
    packed = gzip.compress(bomb, 1)
    member = tarfile.TarInfo(dirac.OUTPUT_ARCHIVE)
    member.size = len(packed)
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as archive:
        archive.addfile(member, io.BytesIO(packed))
    for data in (bomb, outer.getvalue()):
        folder = tmp_path / str(len(data))
        folder.mkdir()
        (folder / "sandbox").write_bytes(data)
        with pytest.raises(dirac.BadSandbox, match=r"too large|sparse map"):
            dirac.unpack_outputs(folder, "x.tar.bz2", 0)


@pytest.mark.parametrize("point", ["dirac.uploaded", "dirac.submitted"])
def test_a_crash_while_it_is_submitted(point: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.payload("true")
    with monkeypatch.context() as patch:
        crash_at(patch, point)
        with pytest.raises(Crash):
            bench.executor.start(job)
    found = DiracExecutor(bench.data, bench.config).find([job])
    assert set(found) == ({job.mark} if point == "dirac.submitted" else set())


def test_a_job_that_is_there_twice_is_ended_once(bench: Bench) -> None:
    job = bench.payload("true")
    first, second = bench.executor.start(job), bench.executor.start(job)
    assert bench.executor.find([job]) == {job.mark: first}
    assert [each["Status"] for each in bench.diracx.rows(JobName=job.mark)] == ["Received", "Killed"] and first < second


def test_one_question_for_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [changed(job, handle=bench.executor.start(job)) for job in (bench.payload("true") for _ in range(5))]
    real, asked = bench.executor.service.send, []

    def counting(method: str, url: str, *arguments: Any, **more: Any) -> Any:
        asked.append(url)
        return real(method, url, *arguments, **more)

    monkeypatch.setattr(bench.executor.service, "send", counting)
    assert all(outcome.alive and "Received" in outcome.waits for outcome in bench.executor.poll(jobs).values()) and len(asked) == 1
    bench.executor.config = dataclasses.replace(bench.config, batch_interval_s=100.0)
    assert all("Received" in outcome.waits for outcome in bench.executor.poll(jobs).values()) and len(asked) == 1


def test_cancel_while_it_waits(bench: Bench) -> None:
    job, pilot = bench.start("true")
    pilot.wait()
    bench.executor.cancel(job)
    bench.executor.cancel(job)
    assert bench.diracx.rows(JobID=pilot.number)[0]["Status"] == "Killed" and not bench.executor.killing


def test_cancel_while_it_runs_waits_for_the_pilot(bench: Bench) -> None:
    bench.executor.config = dataclasses.replace(bench.config, dirac_quiet_s=100.0)
    job, pilot = bench.start("echo begun >begun; sleep 100")
    pilot.wait().start()
    wait_for((pilot.folder / "payload/work/begun").exists)
    for _ in range(3):
        with pytest.raises(StillRunning):
            bench.executor.cancel(job)
    pilot.say("Running", "Application")  # its next report: the status stays Killed
    with pytest.raises(StillRunning):
        bench.executor.cancel(job)
    pilot.kill()
    pilot.say("Failed", "Received Kill signal")
    bench.executor.cancel(job)


def test_cancel_takes_a_pilot_for_gone_that_keeps_silent(bench: Bench) -> None:
    job, pilot = bench.start("sleep 100")
    pilot.wait().start()
    with pytest.raises(StillRunning):
        bench.executor.cancel(job)
    started = time.monotonic()
    wait_for(lambda: tried(lambda: bench.executor.cancel(job), StillRunning) is None)
    assert time.monotonic() - started < 10


def test_cancel_after_a_pilot_with_a_fast_clock(bench: Bench) -> None:
    job, pilot = bench.start("sleep 100")
    pilot.late = timedelta(hours=2)
    pilot.wait().start()
    with pytest.raises(StillRunning, match="is marked, and its pilot"):
        bench.executor.cancel(job)
    assert bench.diracx.rows(JobID=pilot.number)[0]["Status"] == "Killed"


def test_who_asks_for_one_job_leaves_the_others_watched(bench: Bench) -> None:
    """As when one of them is to end: those that wait are not taken to have begun, in that tick or at a start while DIRAC is away."""
    first, second = bench.start("true")[0], bench.start("true")[0]
    assert bench.executor.poll([first, second])[second.id].waits.startswith("DIRAC: Received")
    bench.executor.poll([first])
    bench.executor.config = dataclasses.replace(bench.config, batch_interval_s=60.0)
    assert bench.executor.poll([first, second])[second.id].waits.startswith("DIRAC: Received")
    again = DiracExecutor(bench.data, dataclasses.replace(bench.config, dirac_url="http://127.0.0.1:1"))
    assert again.poll([first])[first.id].waits


def test_cancel_leaves_the_others_watched(bench: Bench) -> None:
    running, pilot = bench.start("sleep 100")
    pilot.wait().start()
    other, _ = bench.start("sleep 100")
    assert bench.executor.poll([running, other])[running.id] == Outcome(True)
    since = dict(bench.executor.since)
    bench.executor.cancel(other)
    assert set(since) & {key for key in bench.executor.since if key[0] == pilot.number}, "grace times go on"
    bench.executor.config = dataclasses.replace(bench.config, batch_interval_s=100.0)
    assert bench.outcome(running) == Outcome(True)


def test_cancel_of_what_has_ended(bench: Bench) -> None:
    job, pilot = bench.start("true")
    pilot.run()
    bench.executor.cancel(job)
    assert bench.diracx.rows(JobID=pilot.number)[0]["Status"] == "Done"
    assert bench.end(job) == Outcome(False, 0)


def test_killed_by_somebody_else(bench: Bench) -> None:
    job, pilot = bench.start("sleep 100")
    pilot.wait()
    pilot.say("Killed", "Marked for termination", "User")
    outcome = bench.end(job)
    assert outcome.cause is Cause.CANCELLED and "not by joborch" in outcome.reason


def test_run_again_by_dirac_itself(bench: Bench) -> None:
    job, pilot = bench.start("true")
    pilot.wait().start()
    bench.diracx.call("POST", "/api/jobs/reschedule", {"job_ids": [pilot.number]})
    outcome = bench.end(job)
    assert outcome.cause is Cause.INFRASTRUCTURE and "by itself" in outcome.reason
    assert bench.diracx.rows(JobID=pilot.number)[0]["Status"] == "Killed"


def test_a_job_that_was_removed(bench: Bench) -> None:
    job, pilot = bench.start("true")
    pilot.wait().say("Killed", "x", "User")
    pilot.say("Deleted", "x", "User")
    outcome = bench.end(job)
    assert outcome.cause is Cause.INFRASTRUCTURE and "no longer knows" in outcome.reason
    bench.executor.cancel(job)


def test_strangers_jobs_are_left_alone(bench: Bench) -> None:
    mine = bench.payload("true")
    theirs = [bench.diracx.submit(mine.mark, bench.diracx.bob), bench.diracx.submit("another name")]
    assert bench.executor.find([mine]) == {}
    for number in theirs:  # a number that DIRAC gave out again
        job = changed(mine, handle=str(number))
        bench.executor.cancel(job)
        assert "no longer knows" in bench.end(job).reason
        assert bench.diracx.rows(JobID=number)[0]["Status"] == "Received"


def test_an_unknown_state_is_alive_and_said_once(bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _pilot = bench.start("true")
    real = bench.executor.service.search
    monkeypatch.setattr(bench.executor.service, "search", lambda *a: [{**each, "Status": "Pondering"} for each in real(*a)])
    assert bench.outcome(job) == bench.outcome(job) == Outcome(True)
    assert caplog.text.count("Pondering") == 1


def test_inputs_that_are_too_large_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirac, "SANDBOX_LIMIT_BYTES", 1 << 20)
    job = bench.payload("true")
    (bench.work(job) / "data").write_bytes(os.urandom(3 << 20))
    with pytest.raises(CannotRun, match="too large for DIRAC: at most 1 MiB, compressed"):
        bench.executor.start(job)
    assert bench.diracx.rows(JobName=job.mark) == []


def test_what_dirac_refuses_cannot_run(bench: Bench) -> None:
    bench.executor.config = dataclasses.replace(bench.config, batch={"example": BatchOptions(dirac_platform="unheard-of")})
    with pytest.raises(CannotRun, match="JDL syntax error"):
        bench.executor.start(bench.payload("true"))


def test_the_same_inputs_are_sent_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.payload("true")
    bench.executor.start(job)
    real, sent = bench.executor.service.send, []
    monkeypatch.setattr(bench.executor.service, "send", lambda *a, **more: sent.append(a[1]) or real(*a, **more))
    bench.executor.start(job)
    assert all(url.startswith(bench.diracx.url) for url in sent) and len(sent) == 2


def test_dirac_away_ends_nothing_and_problem_says_since_when(bench: Bench) -> None:
    job, _pilot = bench.start("true")
    assert bench.outcome(job).waits
    bench.executor.service.url = f"http://127.0.0.1:{free_port()}"
    assert bench.outcome(job).alive and bench.outcome(job).waits
    first = bench.executor.problem()
    assert re.fullmatch(rf"DIRAC: 127\.0\.0\.1:\d+ does not answer: .*\(since {MOMENT}\)", first)
    with pytest.raises(BackendUnavailable):
        bench.executor.start(bench.payload("true"))
    assert bench.outcome(job).alive and bench.executor.problem() == first
    assert bench.executor.lost == {}, "what was not heard is not waited for"
    bench.executor.service.url = bench.diracx.url
    assert bench.outcome(job).alive and bench.executor.problem() == ""


@pytest.mark.parametrize(
    "answer", ['{"a": 1}', "[1]", "[{}]", "null", '"x"', "", "<html>", "[" * 100_000, '[{"JobID": "x"}]', '{"success": []}']
)
@pytest.mark.parametrize("status", [200, 201, 404, 500])
def test_rubbish_for_an_answer_is_no_answer(answer: str, status: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = changed(bench.payload("true"), handle="7")
    said = types.SimpleNamespace(status_code=status, content=answer.encode(), reason="")
    monkeypatch.setattr(bench.executor.service, "send", lambda *a, **more: said)
    assert bench.outcome(job).alive and bench.executor.problem()
    with pytest.raises(BackendUnavailable):
        bench.executor.find([job])
    with pytest.raises(BackendUnavailable):
        bench.executor.start(job)
    with pytest.raises(StillRunning):
        bench.executor.cancel(job)


def test_an_ended_login_lets_jobs_wait(bench: Bench) -> None:
    job, pilot = bench.start("true")
    path = bench.executor.service.login.path
    write_login(path, {"access_token": bench.diracx.alice, "refresh_token": "rubbish"}, -1.0)
    assert bench.outcome(job).alive and "log in again with `dirac login`" in bench.executor.problem()
    with pytest.raises(StillRunning, match="login expired"):
        bench.executor.cancel(job)
    write_login(path, {"access_token": bench.diracx.alice, "refresh_token": "another"})
    pilot.run()
    assert bench.end(job) == Outcome(False, 0) and bench.executor.problem() == ""


# == The whole way: server, client, DIRAC, pilot ==


@pytest.fixture
def site(diracx: DiracX, make_pair: MakePair, open_folder: Path, pyz: Path, root: None, request: pytest.FixtureRequest) -> Pair:
    """A server, and a client that hands its jobs to DIRAC, both run by a user who is not root. The client may call in (JoinedPair)."""
    credentials = write_login(open_folder / "credentials.json", diracx.login())
    os.chown(credentials, NOBODY_UID, NOBODY_UID)
    open_folder.chmod(0o777)  # a refresh puts a new file in the place of the old one
    client = {
        "JOBORCH_EXECUTOR": "dirac",
        "JOBORCH_DIRAC_URL": diracx.url,
        "JOBORCH_DIRAC_CREDENTIALS": str(credentials),
        "JOBORCH_BATCH_INTERVAL": "0.2",
        "JOBORCH_VANISH_GRACE": "3",
        "SERVICE_EXAMPLE_DIRAC_SITE": "LCG.Somewhere.org",
    }
    kind, program = getattr(request, "param", Pair), open_program(open_folder, pyz)
    made: Pair = make_pair(kind=kind, folder=open_folder / "pair", client=client, user=NOBODY_UID, program=program)
    return made


def pilot_of(site: Pair, diracx: DiracX, number: int, folder: Path) -> Pilot:
    """A pilot for the only job that an attempt has in DIRAC."""
    job = site.server.job(number)
    (row,) = wait_for(lambda: diracx.rows(JobName=f"{job['uuid']}.{job['attempt']}"), what="the job in DIRAC")
    return Pilot(diracx, int(row["JobID"]), folder)


def test_the_whole_way_as_an_ordinary_user(site: Pair, diracx: DiracX, tmp_path: Path) -> None:
    """Upload, submission, pilot, output sandbox, ZIP; and on the way, what DIRAC says of the job."""
    site.start()
    script = f"{USES_MEMORY}cat in/a.txt > out.txt; echo $JOBORCH_ATTEMPT; echo oops >&2"
    number = submit(site.server, script, {"in/a.txt": b"words\n"}, timeout=60)
    failed = submit(site.server, "echo no >&2; exit 7")
    pilot = pilot_of(site, diracx, number, tmp_path / "node").wait()
    said = wait_for(lambda: (text := str(site.server.job(number)["waiting_for"])).startswith("DIRAC: Waiting") and text, what="a reason")
    assert re.fullmatch(rf"DIRAC: Waiting since [\d :-]+, Pilot Agent Submission \(job {pilot.number}\)", said)
    assert '"LCG.Somewhere.org"' in pilot.jdl()
    pilot.start()
    wait_status(site.server, number, "Running")
    assert pilot.finish() == 0
    job = wait_status(site.server, number, "Completed", limit_s=30)
    found = download(site.server, number)
    assert (found["out.txt"], found[".joborch/stdout"], found[".joborch/stderr"]) == (b"words\n", b"1\n", b"oops\n")
    assert (job["attempt"], job["started_at"] > job["created_at"]) == (1, True)
    assert 0 < job["cpu_time"] < 60 and 200 << 20 <= job["peak_memory"] < 400 << 20
    pilot_of(site, diracx, failed, tmp_path / "node2").run()
    bad = wait_status(site.server, failed, "Failed", limit_s=30)
    assert (bad["exit_code"], bad["cause"], '"no"' in bad["reason"]) == (7, "user", True)
    health = site.client.health()
    assert (health["executor"], health["job_slots"], health["problem"]) == ("dirac", True, None)


def test_terminate_waits_for_the_pilot(site: Pair, diracx: DiracX, tmp_path: Path) -> None:
    """DIRAC only notes a kill: the job is Killed when its pilot has ended it, and not before."""
    site.start()
    number = submit(site.server, "echo began; sleep 300")
    pilot = pilot_of(site, diracx, number, tmp_path / "node").wait().start()
    wait_status(site.server, number, "Running")
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(site.server.post(f"/terminate/{number}")))
    caller.start()
    wait_for(lambda: diracx.rows(JobID=pilot.number)[0]["Status"] == "Killed", what="DIRAC's note")
    assert site.server.job(number)["status"] == "Running"
    pilot.kill()
    pilot.say("", "Received Kill signal")
    caller.join(30)
    assert (answers[0].status_code, answers[0].json()["status"]) == (200, "Killed")


def test_nothing_is_left_of_a_job_that_is_deleted(site: Pair, diracx: DiracX, tmp_path: Path) -> None:
    """Of one that has ended and of one that waits in DIRAC: on the disks of server and client; DIRAC's sandboxes are released."""
    site.start()
    secret = "xyzzy-of-a-patient"
    script = f"echo {secret} >out; echo {secret} >&2; exit 3"
    ended, waiting = (submit(site.server, script, {f"{secret}.txt": str(number).encode()}, name=secret) for number in range(2))
    waits = pilot_of(site, diracx, waiting, tmp_path / "none").wait()
    pilot = pilot_of(site, diracx, ended, tmp_path / "node")
    pilot.run()
    wait_status(site.server, ended, "Failed", limit_s=60)
    assert len(diracx.call("GET", f"/api/jobs/{pilot.number}/sandbox")["Output"]) == 1
    for number in (ended, waiting):
        wait_for(lambda number=number: site.server.call("DELETE", f"/jobs/{number}").status_code == 200, 60, "the end")
        assert secret not in str(site.server.job(number))
    assert files_with(site.server.data, secret) == files_with(site.client.data, secret) == []
    for number in (pilot.number, waits.number):
        assert diracx.call("GET", f"/api/jobs/{number}/sandbox") == {"Input": [], "Output": []}
    assert diracx.rows(JobID=waits.number)[0]["Status"] == "Killed"


def test_sandboxes_are_released_when_dirac_is_back(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """What it refuses for good is left to its site."""
    job, pilot = bench.start("exit 0")
    pilot.run()
    bench.end(job)
    url, bench.executor.service.url = bench.executor.service.url, "http://127.0.0.1:9"
    with pytest.raises(joborch.BackendUnavailable, match="does not answer"):
        bench.executor.erase(job)
    bench.executor.service.url = url
    bench.executor.erase(job)
    bench.executor.erase(job)
    assert bench.diracx.call("GET", f"/api/jobs/{job.handle}/sandbox") == {"Input": [], "Output": []}
    foreign = bench.diracx.submit("somebody's", bench.diracx.bob)
    with caplog.at_level("INFO"):
        bench.executor.erase(changed(job, handle=str(foreign)))
    assert f"DIRAC keeps the sandboxes of job {foreign}" in caplog.text and bench.executor.problem() == ""


@pytest.mark.parametrize("site", [Pair, JoinedPair], indirect=True)
def test_the_client_dies_between_the_submission_and_its_note(site: Pair, diracx: DiracX, tmp_path: Path) -> None:
    """By SIGKILL; the job is in DIRAC once, and runs once."""
    site.client.settings["JOBORCH_TEST_CRASH"] = "dirac.submitted"
    site.start()
    assert site.client.process is not None
    number = submit(site.server, "echo done > result")
    site.client.process.wait(30)
    site.client.settings["JOBORCH_TEST_CRASH"] = None
    site.client.start()
    pilot_of(site, diracx, number, tmp_path / "node").run()
    assert wait_status(site.server, number, "Completed", limit_s=30)["attempt"] == 1
    job = site.server.job(number)
    assert len(diracx.rows(JobName=f"{job['uuid']}.1")) == 1


def test_a_login_that_has_ended_keeps_jobs_waiting(site: Pair, diracx: DiracX, tmp_path: Path) -> None:
    """/health, doctor and the jobs' own reasons say until when it was valid, and what to do; a new login is all that is needed."""
    credentials = Path(str(site.client.settings["JOBORCH_DIRAC_CREDENTIALS"]))
    ended = {**diracx.login(), "refresh_token": "e30." + base64.urlsafe_b64encode(b'{"exp": 1000000000}').decode().rstrip("=") + ".x"}
    write_login(credentials, ended, lasts_s=-10)
    site.start()
    number = submit(site.server, "true")
    wait_for(lambda: "log in again with `dirac login`" in str(site.server.job(number)["waiting_for"]), what="the reason")
    assert "its refresh token was valid until 2001-09-09" in site.client.health()["problem"]
    environment = {**site.client.environment(), "PORT": str(free_port())}
    words = [*site.client.program, "doctor", "client"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, user=NOBODY_UID, group=NOBODY_UID, cwd="/")
    assert (done.returncode, "PROBLEM DIRAC: the login expired" in done.stdout) == (1, True), done
    write_login(credentials, diracx.login())
    os.chown(credentials, NOBODY_UID, NOBODY_UID)
    pilot_of(site, diracx, number, tmp_path / "node").run()
    assert wait_status(site.server, number, "Completed", limit_s=30)["attempt"] == 1
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, user=NOBODY_UID, group=NOBODY_UID, cwd="/")
    assert (done.returncode, "you are alice, and your login is valid until" in done.stdout) == (0, True), done


def test_what_cannot_be_in_jdl_is_refused_at_the_start(make_process: MakeProcess) -> None:
    settings = {"JOBORCH_EXECUTOR": "dirac", "JOBORCH_TOKEN": "t"}
    code, said = make_process("client", settings).start_refused()
    assert (code, "JOBORCH_DIRAC_URL is not set" in said) == (2, True)
    settings |= {"JOBORCH_DIRAC_URL": "http://127.0.0.1:1", "SERVICE_DOCK_DIRAC_JDL": "Executable = 1"}
    code, said = make_process("client", settings).start_refused()
    assert (code, "remove it" in said) == (2, True)
    assert "Traceback" not in said
