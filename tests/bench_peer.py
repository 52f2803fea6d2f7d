"""Run the no-op jobs of `tests/bench.py peers` in one other program: `python bench_peer.py NAME FOLDER ONE_BY_ONE AT_ONCE`.

It runs in the virtual environment that holds the peers, and prints one JSON object: the seconds of each job that ran alone and of
the bare run after each, the jobs a second of all that were handed in at once, and the scripts a second of plain `xargs -P2` after that.

Each peer runs as its documentation sets it up on one machine: two workers for two cores, every other option at its default. One
thing is changed in the peers' favour: who looks for news looks every POLL_S (by default huey every 0.1 s, HyperQueue every second).
A job is the same for all: its caller makes a new folder with two files, `bash run.sh` runs there, and the caller hears how it ended.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from bench_base import HOST, NOOP, BenchError, bare_run, end, free_port, plain_xargs_rate, wait_until, write_files

WORKERS = 2
CALLERS = 8  # of Pulsar, as of joborch: each caller waits for an answer before it sends the next request
POLL_S = 0.005
START_LIMIT_S = 60


def run_script(folder: str) -> int:
    """The task of the peers that run Python functions: run the script of a job, return its exit status."""
    return subprocess.run(["bash", "run.sh"], cwd=folder, stdin=subprocess.DEVNULL).returncode


class Peer(NamedTuple):
    """A peer that is up. Both functions raise BenchError if a job fails."""

    one: Callable[[Path], None]  # run one job in this new folder
    many: Callable[[Sequence[Path]], None]  # run one job in each of these


def check(codes: Sequence[int]) -> None:
    """Raise BenchError unless all exit statuses are 0."""
    if any(codes):
        raise BenchError(f"{sum(map(bool, codes))} of {len(codes)} jobs failed")


def bin_path(name: str) -> str:
    """A command of this virtual environment."""
    return str(Path(sys.executable).with_name(name))


# == The peers ==

HUEY_APP = """
from bench_peer import run_script
from huey import SqliteHuey
huey = SqliteHuey(filename="huey.db")
run = huey.task()(run_script)
"""


@contextlib.contextmanager
def running_huey(folder: Path) -> Iterator[Peer]:
    """A consumer with worker processes over SQLite; caller and consumer share the database and the folders.

    It promises less: a task leaves the database before it runs, so that a consumer that is killed loses what it ran. No files move.
    """
    (folder / "app.py").write_text(HUEY_APP)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import app

    words = [bin_path("huey_consumer"), "app.huey", "-k", "process", "-w", str(WORKERS), "-d", str(POLL_S), "-m", str(POLL_S), "-b", "1"]
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    with (folder / "huey.log").open("wb") as log:
        consumer = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
    wait_for = {"blocking": True, "backoff": 1, "max_delay": POLL_S, "timeout": START_LIMIT_S}

    def one(job: Path) -> None:
        write_files(job, NOOP)
        check([app.run(str(job)).get(**wait_for)])

    def many(jobs: Sequence[Path]) -> None:
        results = []
        for job in jobs:
            write_files(job, NOOP)
            results.append(app.run(str(job)))
        check([result.get(**wait_for) for result in results])

    try:
        yield Peer(one, many)
    finally:
        end(consumer)


@contextlib.contextmanager
def running_dask(folder: Path) -> Iterator[Peer]:
    """A local cluster: a scheduler in this process, and one worker process for each core.

    It promises less: all jobs are in the scheduler's memory, and gone with it. No files move.
    """
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, local_directory=folder) as cluster,
        Client(cluster) as client,
    ):

        def one(job: Path) -> None:
            write_files(job, NOOP)
            check([client.submit(run_script, str(job), pure=False).result()])

        def many(jobs: Sequence[Path]) -> None:
            futures = []
            for job in jobs:
                write_files(job, NOOP)
                futures.append(client.submit(run_script, str(job), pure=False))
            check(client.gather(futures))

        yield Peer(one, many)


class NotYet(Exception):
    """HyperQueue's jobs are not complete."""


def hyperqueue_jobs_are_complete(client: Any, submitted: Sequence[Any]) -> bool:
    """Whether all jobs are complete; raises BenchError if a task failed.

    The package itself looks once a second. A look can be ended by raising from the function that it calls with what it sees.
    """

    def seen(jobs: dict[Any, Any]) -> None:
        if not all(job["completed"] for job in jobs.values()):
            raise NotYet

    try:
        failed = client.connection.wait_for_jobs([job.id for job in submitted], seen)
    except NotYet:
        return False
    if failed:
        raise BenchError(f"tasks failed: {client.connection.get_failed_tasks(failed)}")
    return True


@contextlib.contextmanager
def running_hyperqueue(folder: Path) -> Iterator[Peer]:
    """A local cluster: server and worker of HyperQueue's Python package, in this process; all at once are tasks of one job.

    It promises less: without a journal, which is its default, all jobs are in the server's memory. No files move.
    """
    import hyperqueue
    from hyperqueue.cluster import WorkerConfig

    with hyperqueue.LocalCluster(str(folder / "hq"), WorkerConfig(cores=WORKERS)) as cluster:
        client = cluster.client()

        def many(jobs: Sequence[Path]) -> None:
            job = hyperqueue.Job()
            for path in jobs:
                write_files(path, NOOP)
                job.program(["bash", "run.sh"], cwd=str(path), stdout=None, stderr=None)
            submitted = [client.submit(job)]
            while not hyperqueue_jobs_are_complete(client, submitted):
                time.sleep(POLL_S)

        yield Peer(lambda path: many([path]), many)


class PulsarCaller:
    """A connection to Pulsar's web server, kept alive."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection(HOST, port, timeout=START_LIMIT_S)

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def ask(self, method: str, path: str, body: bytes = b"", **query: str) -> bytes:
        """What Pulsar answers; raises BenchError for an error."""
        self.connection.request(method, f"{path}?{urllib.parse.urlencode(query)}", body)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise BenchError(f"Pulsar answered {answer.status} to {method} {path}: {content[:200]!r}")
        return content

    def submit(self, name: str) -> str:
        """Set up a job, send its two files and start it; return its path."""
        self.ask("POST", "/jobs", job_id=name)
        path = f"/jobs/{name}"
        for file, content in NOOP.items():
            self.ask("POST", f"{path}/files", content, name=file, type="workdir")
        self.ask("POST", f"{path}/submit", command_line="bash run.sh")
        return path

    def wait(self, path: str) -> int:
        """The exit status of a job, as soon as it is complete."""
        while True:
            job = json.loads(self.ask("GET", f"{path}/status"))
            if job["complete"] == "true":
                return int(job["returncode"])
            time.sleep(POLL_S)


PULSAR_SETTINGS = f"""
managers:
  _default_:
    type: queued_python
    num_concurrent_jobs: {WORKERS}
"""


@contextlib.contextmanager
def pulsar_server(folder: Path) -> Iterator[int]:
    """Pulsar's web server, configured by pulsar-config; yields its port."""
    port, home = free_port(), folder / "pulsar"
    configure = [bin_path("pulsar-config"), "--directory", str(home), "--host", HOST, "--port", str(port)]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    with (home / "app.yml").open("a") as settings:
        settings.write(PULSAR_SETTINGS)
    log = folder / "pulsar.log"
    with log.open("wb") as output:
        server = subprocess.Popen([bin_path("pulsar-serve"), str(home / "server.ini")], cwd=home, stdout=output, stderr=output)
    try:
        wait_until(lambda: is_open(port) or server.poll() is not None, START_LIMIT_S, "Pulsar answers")
        if server.poll() is not None:
            raise BenchError(f"Pulsar did not start: {log.read_text(errors='replace')[-300:]}")
        yield port
    finally:
        end(server)


@contextlib.contextmanager
def running_pulsar(folder: Path) -> Iterator[Peer]:
    """Pulsar over HTTP, with the queue of its own; files go to it as to joborch.

    It promises less: nothing is synced to the disk or checked by a digest, a job that runs when Pulsar is killed is given up, and
    the result stays on its side until the caller fetches it, which is not measured.
    """
    with pulsar_server(folder) as port:
        caller = PulsarCaller(port)

        def one(job: Path) -> None:
            check([caller.wait(caller.submit(job.name))])

        def many(jobs: Sequence[Path]) -> None:
            codes: list[int] = []

            def call(some: Sequence[Path]) -> None:
                mine = PulsarCaller(port)
                paths = [mine.submit(job.name) for job in some]
                codes.extend([mine.wait(path) for path in paths])
                mine.close()

            callers = [threading.Thread(target=call, args=(jobs[first::CALLERS],)) for first in range(CALLERS)]
            for thread in callers:
                thread.start()
            for thread in callers:
                thread.join()
            check(codes + [1] * (len(jobs) - len(codes)))

        yield Peer(one, many)
        caller.close()  # a graceful end waits for connections


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


PEERS = {"huey": running_huey, "dask": running_dask, "HyperQueue": running_hyperqueue, "Pulsar": running_pulsar}


# == One run ==


def measure(peer: Peer, folder: Path, one_by_one: int, at_once: int) -> dict[str, Any]:
    """Run jobs one after another, each followed by a bare run, and then many at once."""
    numbers = itertools.count()

    def new() -> Path:
        return folder / f"job-{next(numbers)}"

    peer.one(new())  # the first job finds nothing warm
    jobs_s, bare_s = [], []
    for _ in range(one_by_one):
        begin = time.perf_counter()
        peer.one(new())
        jobs_s.append(time.perf_counter() - begin)
        bare_s.append(bare_run(new()))
    names = [new() for _ in range(at_once)]
    begin = time.perf_counter()
    peer.many(names)
    rate = at_once / (time.perf_counter() - begin)
    return {"jobs_s": jobs_s, "bare_s": bare_s, "jobs_per_s": rate, "plain_per_s": plain_xargs_rate(new(), at_once)}


def main() -> int:
    """Measure the peer that the command line names."""
    name, place, one_by_one, at_once = sys.argv[1:]
    folder = Path(place).resolve()
    out = os.dup(1)
    os.dup2(2, 1)  # what a peer prints must not get between the figures
    with PEERS[name](folder) as peer:
        (folder / "jobs").mkdir()
        found = measure(peer, folder / "jobs", int(one_by_one), int(at_once))
    os.write(out, json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
