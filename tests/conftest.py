"""Fixtures of the black-box tests: pairs and single processes, ended with all that they started."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import CHROMIUM, CHROMIUM_ARGS, ROOT, Pair, Process, end_all_below, replace
from world import Desk, Peer, Yard

from joborch import DataFolder
from joborch_base.executors import signal_all
from joborch_plugins import sandbox

MakePair = Callable[..., Pair]
MakeProcess = Callable[..., Process]


def pytest_configure() -> None:
    """Take SIGINT as from a terminal: a shell ignores it for what it runs in the background, and so for all that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files whose tests take minutes together, the slowest first: with several processes none of them may be left for the end.
SLOW = (
    "test_clouds", "test_chaos", "test_network", "test_answers", "test_isolation", "test_crashes", "test_slurm", "test_start",
    "test_weak_setups", "test_metrics", "test_deploy", "test_disk", "test_fuzz", "test_dirac", "test_readme", "test_cloud_demo",
    "test_connections", "test_containers", "test_upgrade", "test_joined", "test_contract",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files, and go on with those that have the most tests."""
    counts = Counter(item.path for item in items)
    ranks = {name: rank for rank, name in enumerate(SLOW)}
    items.sort(key=lambda item: (ranks.get(item.path.stem, len(SLOW)), -counts[item.path], str(item.path)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the Unix sockets that killed servers leave in /tmp, once all tests are over; those of servers that run are left alone."""
    if hasattr(session.config, "workerinput"):  # one of several processes: the tests of the others still run
        return
    for path in Path(f"/tmp/joborch-{os.getuid()}").glob("joborch-*.sock"):
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)


@pytest.fixture(scope="session", autouse=True)
def scratch_of_tests() -> Iterator[None]:
    """Gives what tests start in their own process a place for TMPDIR and locks; what is left there goes with the tests."""
    tempfile.tempdir = tempfile.gettempdir()  # files of the tests themselves stay where they were
    before, folder = os.environ.get("TMPDIR"), tempfile.mkdtemp(prefix="jt-", dir="/tmp")
    Path(folder).chmod(0o755)  # other users run programs there
    os.environ["TMPDIR"] = folder
    sandbox.UIDS_FILE = f"{folder}/uids/uids"  # not that of the processes which tests start: this one lives as long as all tests
    yield
    os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """What a data folder that is opened in this process changes for good is as before for the next test."""
    umask = os.umask(0o022)
    os.umask(umask)
    folder = tempfile.tempdir
    yield
    os.umask(umask)
    tempfile.tempdir = folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One server and client for all tests that break nothing; the quota never binds."""
    limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    shared = Pair(tmp_path_factory.mktemp("pair"), limits, {"JOBORCH_SLOTS": "8", "JOBORCH_LOG_LIMIT": "1M"})
    try:
        yield shared.start()
    finally:
        shared.close()


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    """Makes pairs of a test's own (not started), which end with the test."""
    made: list[Pair] = []

    def make(**options: object) -> Pair:
        folder = options.pop("folder", tmp_path / f"pair{len(made)}")
        made.append(options.pop("kind", Pair)(folder, **options))  # type: ignore[operator]
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def own_pair(make_pair: MakePair) -> Pair:
    """A started pair of a test's own, to be killed and restarted at will."""
    return make_pair().start()


@pytest.fixture
def make_process(tmp_path: Path) -> Iterator[MakeProcess]:
    """Makes single processes of a test's own (not started), which end with the test."""
    made: list[Process] = []

    def make(role: str, settings: dict[str, str | None] | None = None, **options: object) -> Process:
        folder = options.pop("folder", tmp_path / f"{role}{len(made)}")
        made.append(Process(role, folder, settings, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users of the machine can reach (pytest's own are closed to them)."""
    folder = Path(tempfile.mkdtemp(prefix="joborch-open-"))
    folder.chmod(0o755)
    yield folder
    end_all_below(folder)
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joborch.pyz of this run, built from the source as it is now."""
    archive = tmp_path_factory.mktemp("pyz") / "joborch.pyz"
    command = [sys.executable, "build_zipapp.py", "--output", str(archive)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return archive


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as Debian packages it."""
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS, timeout=100_000)
        yield chromium
        chromium.close()


@pytest.fixture
def root() -> None:
    """Marks a test that only root can run."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it runs processes as another user of the machine")


# == Servers and clients in this process ==


@pytest.fixture(name="data")
def data_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataFolder]:
    """An opened data folder; what it changes of the process is changed back."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    umask = os.umask(0o022)
    folder = DataFolder(str(tmp_path / "data"))
    folder.open()
    yield folder
    os.umask(umask)
    folder.lock.close()


@pytest.fixture(name="peer")
def peer_fixture() -> Iterator[Peer]:
    """A peer, closed with the test."""
    made = Peer()
    yield made
    made.close()


@pytest.fixture(name="desk")
def desk_fixture(peer: Peer, data: DataFolder) -> Iterator[Desk]:
    """A server with one service at one client, the peer."""
    made = Desk(data, peer.url, JOBORCH_MIN_FREE="0")
    yield made
    made.store.close()


@pytest.fixture
def desk22(peer: Peer, data: DataFolder) -> Iterator[Desk]:
    """The same with a 2.2 client, told by three URLs."""
    urls = {
        f"SERVICE_EXAMPLE_{name}_URL": f"{peer.url}/{path}" for name, path in (("UPLOAD", "in"), ("DOWNLOAD", "out"), ("TERMINATE", "end"))
    }
    made = Desk(data, "", **urls, SERVICE_EXAMPLE_PEER="2.2")
    assert not made.link.protocol.has_events
    yield made
    made.store.close()


@pytest.fixture(name="yard")
def yard_fixture(data: DataFolder) -> Iterator[Yard]:
    """A client with two slots."""
    made = Yard(data)
    yield made
    made.close()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder that is none of the script's."""
    folder = tmp_path / "foreign"
    for name in ("a", "b", "d/e", "stdout", "stderr", "exit.json", "inputs.json", "started.1", "work/run.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"status": 0, "left": 0, "secret": 1}')
    return folder


@pytest.fixture
def no_long_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick that would wait for news comes back at once."""
    replace(monkeypatch, "EVENTS_WAIT_S", 0.0)


@pytest.fixture
def strangers_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may signal a process that is not in a session of a payload's own, whatever fault it finds."""
    real, own = signal_all, os.getsid(0)

    def guarded(processes: Iterable[Process], number: int) -> None:
        chosen = list(processes)
        strangers = [process for process in chosen if process.pid == 1 or process.session in (0, own)]
        assert not strangers, f"signal {number} for processes that are no payload's: {strangers[:5]}"
        real(chosen, number)

    replace(monkeypatch, "signal_all", guarded)
