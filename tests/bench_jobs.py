"""Benchmarks of `tests/bench.py` that run many small jobs: latency, throughput, uploads, what a job costs, and other programs beside us."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_base import (
    BARE_SCRIPT,
    NOOP,
    REPOSITORY,
    START_LIMIT_S,
    BenchError,
    Caller,
    Measure,
    Place,
    Usage,
    bare_run,
    environment,
    first_line,
    fsync_ms,
    percentile,
    plain_xargs_rate,
    say,
    temporary_folder,
    upload_request,
    usage,
    wait_until,
    xargs_rate,
)
from bench_site import USERS, Site, job_rate, new_site, running_site, upload_all, wait_until_completed, warm_up
from harness import SCRIPT_UIDS
from proxy import Proxy

# == How long one takes, and how many get through ==


def job_times_ms(site: Site, count: int) -> tuple[list[float], list[float]]:
    """How long each no-op job takes, one after another, and each bare run between them."""
    jobs, bare, wanted = [], [], upload_request(NOOP)
    (site.folder / "bare").mkdir()
    with Caller(site.port) as caller:
        for number in range(count):
            begin = time.perf_counter()
            wait_until_completed(caller, caller.ask(wanted).json())
            jobs.append((time.perf_counter() - begin) * 1000)
            bare.append(bare_run(site.folder / "bare" / str(number)) * 1000)
    return jobs, bare


def latency(place: Place, size: int) -> Iterator[Measure]:
    """One no-op job at a time, each followed by a bare run."""
    with running_site(place) as site:
        warm_up(site)
        jobs, bare = job_times_ms(site, size)
        yield Measure("median", statistics.median(jobs), "ms", statistics.median(bare))
        yield Measure("p99", percentile(jobs, 99), "ms", percentile(bare, 99))
        yield Measure("fsync of the device", fsync_ms(site.folder), "ms")


ISOLATIONS = ("none", "process", "full", *(["user"] if os.geteuid() == 0 else []))  # user needs root


def isolation(place: Place, size: int) -> Iterator[Measure]:
    """No-op jobs one at a time under each value of JOBORCH_ISOLATION, each in its turn, and what a value costs a job over `none`."""
    wanted, times = upload_request(NOOP), {value: list[float]() for value in ISOLATIONS}
    if place.folder.is_relative_to("/tmp"):  # scripts have a /tmp of their own, so data below /tmp cost more, and are not usual
        place = place._replace(folder=Path("/var/tmp"))
    with contextlib.ExitStack() as stack:
        callers = {}
        for value in ISOLATIONS:
            uids = {"JOBORCH_UIDS": SCRIPT_UIDS} if value == "user" else {}
            site = stack.enter_context(running_site(place, {"JOBORCH_ISOLATION": value, **uids}))
            warm_up(site)
            callers[value] = stack.enter_context(Caller(site.port))
        for _ in range(size):
            for value, caller in callers.items():
                begin = time.perf_counter()
                wait_until_completed(caller, caller.ask(wanted).json())
                times[value].append((time.perf_counter() - begin) * 1000)
    for value in ISOLATIONS:
        yield Measure(value, statistics.median(times[value]), "ms")
    for value in ISOLATIONS[1:]:
        yield Measure(f"{value}, over none", statistics.median(times[value]) - statistics.median(times["none"]), "ms")


def bare_rates(place: Place, count: int) -> tuple[float, float]:
    """Scripts a second of plain `xargs -P2`, and of `xargs -P2` with a new folder and two files for each."""
    with temporary_folder(place) as folder:
        (folder / "one.sh").write_text(BARE_SCRIPT)
        plain = plain_xargs_rate(folder / "template", count)
        return plain, xargs_rate(folder, count, ["sh", "one.sh"])


def throughput(place: Place, size: int) -> Iterator[Measure]:
    """Many no-op jobs of 20 users, from several uploaders, until all results can be downloaded; with one client, and with two."""
    plain, with_folders = bare_rates(place, size)
    with running_site(place) as site:
        uploads, jobs = job_rate(site.port, size)
    with running_site(place, clients=2) as site:
        _, jobs_of_two = job_rate(site.port, size)
    with running_site(place) as site:
        by_library = library_rate(place, site.port, size)
    yield Measure("jobs", jobs, "jobs/s", with_folders)
    yield Measure("jobs, to xargs without folders", jobs, "jobs/s", plain)
    yield Measure("jobs, two clients", jobs_of_two, "jobs/s", with_folders)
    yield Measure("jobs, by the library", by_library, "jobs/s", jobs)
    yield Measure("uploads, while jobs run", uploads, "jobs/s")


def library_rate(place: Place, port: int, count: int) -> float:
    """No-op jobs a second that a script submits, waits for and fetches with `Jobs.map`, from the first upload to the last result."""
    sys.path.insert(0, str(REPOSITORY))  # as a command, only tests/ is searched
    from joborch import Jobs

    jobs, inputs = Jobs(f"http://127.0.0.1:{port}", user=1), [{"number": str(number).encode()} for number in range(count)]
    script = NOOP["run.sh"].decode()
    with temporary_folder(place) as folder:
        begin = time.perf_counter()
        done = [job.result(folder / str(job.id)) for job in jobs.map(script, inputs) if job.status == "Completed"]
        taken_s = time.perf_counter() - begin
    if len(done) != count:
        raise BenchError(f"{len(done)} of {count} jobs are Completed")
    return count / taken_s


def uploads(place: Place, size: int) -> Iterator[Measure]:
    """Small uploads while no job starts or ends: all slots are taken by jobs that wait."""
    wanted = [upload_request(NOOP, user=number % USERS + 1) for number in range(size)]
    with running_site(place) as site:
        site.hold(USERS)
        begin = time.perf_counter()
        upload_all(site.port, wanted)
        yield Measure("uploads", size / (time.perf_counter() - begin), "1/s")


# == What one costs ==

SYNCS = ("fsync", "fdatasync", "msync", "sync_file_range", "syncfs", "sync")


def counted_calls(summary: str, names: Sequence[str]) -> int:
    """How many calls the table of `strace -c` counts of these system calls."""
    rows = [line.split() for line in summary.splitlines()]
    return sum(int(row[3]) for row in rows if len(row) >= 5 and row[-1] in names and row[3].isdigit())


@contextlib.contextmanager
def traced(pids: Sequence[int], names: Sequence[str], counts: list[int]) -> Iterator[None]:
    """Count these system calls of processes, their threads and children by `strace -c`; afterwards their number is in `counts`.

    It needs the right to trace (root, as the client cannot be traced by its own user). strace stops a process at every system
    call, so that nothing else may be measured meanwhile.
    """
    words = ["strace", "-f", "-qq", "-c", "-e", f"trace={','.join(names)}", *(f"--attach={pid}" for pid in pids)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            wait_until(
                lambda: tracer.poll() is not None or all(first_line(f"/proc/{pid}/status", "TracerPid") != "0" for pid in pids),
                START_LIMIT_S,
                "strace is attached",
            )
            yield
        finally:
            tracer.send_signal(signal.SIGINT)  # it lets the processes go and prints its table
            _, summary = tracer.communicate(timeout=START_LIMIT_S)
    if "calls" not in summary:
        raise BenchError(f"strace counted nothing: {summary.strip() or 'it printed no table'}")
    counts.append(counted_calls(summary, names))


def syncs_a_job(site: Site, count: int) -> float:
    """fsyncs of server and client for each of `count` no-op jobs; raises BenchError if they cannot be counted."""
    if not shutil.which("strace"):
        raise BenchError("strace is not installed")
    counts: list[int] = []
    with traced([process.pid for process in site.processes.values()], SYNCS, counts), Caller(site.port) as caller:
        for _ in range(count):
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
    return counts[0] / count


COUNTED_JOBS = 10  # at most: the counts hardly differ from job to job, and strace is slow


def counted(place: Place, count: int) -> Iterator[Measure]:
    """HTTP exchanges and fsyncs of a no-op job. A proxy stands between server and client and counts; no time is taken."""
    with new_site(place) as site, Proxy(site.ports["client"]) as proxy:
        site.doors["client"] = proxy.port
        site.start("client")
        site.start("server")
        warm_up(site)
        with Caller(site.port) as caller:
            before = len(proxy.seen)
            for _ in range(count):
                wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
            behind, front = (len(proxy.seen) - before) / count, caller.asked / count
        yield Measure("HTTP exchanges", behind + front, "")
        yield Measure("HTTP exchanges, server with client", behind, "")
        try:
            yield Measure("fsyncs", syncs_a_job(site, count), "")
        except BenchError as error:
            yield Measure("fsyncs", missing=f"they could not be counted: {error}")


def cpu(place: Place, size: int) -> Iterator[Measure]:
    """What a no-op job costs: CPU, context switches, HTTP exchanges and fsyncs. One job at a time, with nothing between two."""
    with running_site(place) as site:
        warm_up(site)
        before = {name: usage(process.pid) for name, process in site.processes.items()}
        taken, wanted = [], upload_request(NOOP)
        with Caller(site.port) as caller:
            for _ in range(size):
                begin = time.perf_counter()
                wait_until_completed(caller, caller.ask(wanted).json())
                taken.append((time.perf_counter() - begin) * 1000)
        used = {name: usage(process.pid).since(before[name]) for name, process in site.processes.items()}
    yield Measure("server + client", sum(one.cpu_s for one in used.values()) * 1000 / size, "ms")
    for name in ("server", "client"):
        yield Measure(name, used[name].cpu_s * 1000 / size, "ms")
    yield Measure("children: wrapper, bash, script", sum(one.children_cpu_s for one in used.values()) * 1000 / size, "ms")
    for name in ("server", "client"):
        yield from switches(name, used[name], size)
    yield Measure("wall, median", statistics.median(taken), "ms")
    yield from counted(place, min(size, COUNTED_JOBS))


def switches(name: str, used: Usage, count: int) -> Iterator[Measure]:
    """The context switches of a process for each of `count` jobs."""
    yield Measure(f"context switches, voluntary, {name}", used.voluntary / count, "")
    yield Measure(f"context switches, involuntary, {name}", used.involuntary / count, "")


# == Other programs beside us ==  tests/bench_peer.py runs each, in an environment of its own.

PEERS = {  # by the names of bench_peer.py: what pip installs, in the versions of requirements-peers.txt
    "huey": "huey",
    "dask": "distributed",
    "HyperQueue": "hyperqueue",
    "Pulsar": "pulsar-app[web]",
}
PEER_VERSIONS = REPOSITORY / "tests" / "requirements-peers.txt"
PEER_FOLDER = REPOSITORY / ".venv-peers"
PEER_PYTHON = PEER_FOLDER / "bin" / "python"
PEER_LIMIT_S = 900
AT_ONCE = 5  # so many times as many jobs at once as one after another


def output_of_group(*words: str, env: dict[str, str] | None = None) -> str:
    """What a command prints; raises BenchError with a line of its errors if it fails. What it started ends with it."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=PEER_LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
        raise BenchError(next((line for line in lines if line.startswith("ERROR:")), lines[-1]).strip())
    return output


def install_peer(name: str) -> None:
    """Install a peer, in the pinned versions, unless it is there; raises BenchError if it is not to be had here.

    The versions are constraints: each peer is installed by itself, so that one which cannot be had takes no other with it.
    """
    stamp, versions = PEER_FOLDER / f"{name}.stamp", PEER_VERSIONS.read_bytes() + sys.version.encode()
    digest = hashlib.sha256(versions).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    if not PEER_PYTHON.exists():
        output_of_group(sys.executable, "-m", "venv", str(PEER_FOLDER))
    say(f"installing {name}")
    pip = [str(PEER_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    output_of_group(*pip, "--constraint", str(PEER_VERSIONS), PEERS[name])
    stamp.write_text(digest)


def peer_version(name: str) -> str:
    """The pinned version of a peer."""
    package = PEERS[name].partition("[")[0]
    found = re.search(rf"^{re.escape(package)}==(\S+)", PEER_VERSIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{PEER_VERSIONS.name} does not pin {package}"
    return found[1]


def peer_measures(place: Place, name: str, size: int) -> Iterator[Measure]:
    """One peer's latency and throughput, or the reason why there are none."""
    title = f"{name} {peer_version(name)}"
    try:
        install_peer(name)
        with temporary_folder(place) as folder:
            driver = [str(PEER_PYTHON), str(REPOSITORY / "tests" / "bench_peer.py"), name, str(folder), str(size), str(AT_ONCE * size)]
            found = json.loads(output_of_group(*driver, env=environment(folder)))
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        yield Measure(f"{title}, latency, median", missing=str(error))
        return
    jobs, bare = ([one * 1000 for one in found[key]] for key in ("jobs_s", "bare_s"))
    yield from side_by_side(title, jobs, bare, found["jobs_per_s"], found["plain_per_s"])


def side_by_side(title: str, jobs_ms: Sequence[float], bare_ms: Sequence[float], rate: float, plain: float) -> Iterator[Measure]:
    """The three figures that all programs are compared by."""
    yield Measure(f"{title}, latency, median", statistics.median(jobs_ms), "ms", statistics.median(bare_ms))
    yield Measure(f"{title}, latency, p99", percentile(jobs_ms, 99), "ms", percentile(bare_ms, 99))
    yield Measure(f"{title}, throughput", rate, "jobs/s", plain)


def peers(place: Place, size: int) -> Iterator[Measure]:
    """joborch, huey, dask, HyperQueue and Pulsar in turn: jobs one after another, each followed by a bare run, then many at once."""
    with running_site(place) as site:
        warm_up(site)
        jobs, bare = job_times_ms(site, size)
        _, rate = job_rate(site.port, AT_ONCE * size)
        plain = plain_xargs_rate(site.folder / "plain", AT_ONCE * size)
    yield from side_by_side("joborch", jobs, bare, rate, plain)
    for name in PEERS:
        yield from peer_measures(place, name, size)
