"""Benchmarks of `tests/bench.py` with large files, and with very many."""

from __future__ import annotations

import datetime
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench_base import (
    CHUNK_BYTES,
    MB,
    BenchError,
    Caller,
    Json,
    Measure,
    Place,
    Swarm,
    first_line,
    peak_rss_mb,
    request,
    timed_run,
    upload_request,
    write_files,
)
from bench_load import poller
from bench_site import Site, running_site, wait_until_completed


def write_noise(path: Path, size: int) -> None:
    """A file of `size` bytes that no compressor makes smaller."""
    block = os.urandom(min(size, 64 * CHUNK_BYTES))
    with path.open("wb", buffering=0) as file:
        for number in range(size // len(block)):
            file.write(number.to_bytes(8, "big"))
            file.write(block[8:])


def moments(job: Json) -> dict[str, float]:
    """When a job came into each state, in seconds of the epoch."""
    moves: list[dict[str, str]] = job["history"]
    return {move["to"]: datetime.datetime.fromisoformat(move["at"].replace("Z", "+00:00")).timestamp() for move in moves}


def hop_times(site: Site, source: Path) -> dict[str, float]:
    """Send one large file through all hops; return how many seconds each took."""
    files = {"run.sh": f"mv {source.name} result\n".encode()}  # a result as large as the input, made in no time
    with Caller(site.port) as caller:
        os.sync()
        begin = time.perf_counter()
        job = caller.upload_file(files, source)
        uploaded = time.perf_counter()
        job = wait_until_completed(caller, job)
        came = moments(caller.get(f"/jobs/{job['id']}"))
        os.sync()
        fetch_begin = max(at for status, at in came.items() if status != "Completed")
        download_begin = time.perf_counter()
        caller.download(f"/download/{job['id']}", site.folder / "result.zip")
        downloaded = time.perf_counter()
    return {
        "upload": uploaded - begin,
        "send": came["Submitted"] - came["Processing"],
        "run and fetch": came["Completed"] - fetch_begin,
        "download": downloaded - download_begin,
    }


def big(place: Place, size: int) -> Iterator[Measure]:
    """One job with a large input that it moves to its result; each hop against copy and hash of the same file."""
    if shutil.disk_usage(place.folder).free < 9 * size:
        raise BenchError(f"big needs {9 * size >> 30} GiB of free disk: choose another --dir, or --quick")
    with running_site(place) as site:
        source = site.folder / "source"
        write_noise(source, size)
        os.sync()
        copy_s = timed_run("cp", str(source), str(site.folder / "copy"))
        bare = size / MB / (copy_s + timed_run("sha256sum", str(site.folder / "copy")))
        (site.folder / "copy").unlink()
        for hop, taken_s in hop_times(site, source).items():
            yield Measure(hop, size / MB / max(taken_s, 0.001), "MB/s", bare)
        for mode, process in site.processes.items():
            yield Measure(f"peak RSS, {mode}", peak_rss_mb(process.pid), "MB")


def bare_pack_s(folder: Path) -> float:
    """Seconds of `cp -r` and `zip -r` of the folder `in`."""
    if not shutil.which("zip"):
        raise BenchError("zip, which is the base here, is not installed")
    return timed_run("cp", "-r", "in", "copy", cwd=folder) + timed_run("zip", "-q", "-r", "bare.zip", "copy", cwd=folder)


def many_files(place: Place, size: int) -> Iterator[Measure]:
    """One job with many small inputs that it moves to its results, so that bash's own speed stays out of it."""
    inputs = {f"{number}.txt": f"line {number}\n".encode() * 50 for number in range(size)}
    files = {"run.sh": b"mv in out\n", **{f"in/{name}": content for name, content in inputs.items()}}
    with running_site(place) as site, Caller(site.port) as caller:
        write_files(site.folder / "in", inputs)
        os.sync()
        bare = size / bare_pack_s(site.folder)
        wanted = upload_request(files)
        os.sync()
        begin = time.perf_counter()
        job = wait_until_completed(caller, caller.ask(wanted).json())
        caller.download(f"/download/{job['id']}", site.folder / "result.zip")
        yield Measure("files", size / (time.perf_counter() - begin), "files/s", bare)


def many_results(place: Place, size: int) -> Iterator[Measure]:
    """One job with a result of very many files, whose output is then read by eight callers."""
    files = {"run.sh": f"echo made; mkdir out; cd out; seq {size} | xargs touch\n".encode()}
    with running_site(place) as site, Caller(site.port) as caller:
        begin = time.perf_counter()
        job = wait_until_completed(caller, caller.ask(upload_request(files)).json())
        yield Measure("files", size / (time.perf_counter() - begin), "files/s")
        Swarm(site.port).run([poller([request("GET", f"/jobs/{job['id']}/logs")], time.perf_counter() + 2, []) for _ in range(8)])
        for mode, process in sorted(site.processes.items()):
            yield Measure(f"peak RSS, {mode}", peak_rss_mb(process.pid), "MB")


FILE_BYTES = 5 * 2**30 // 200_000  # of one member of a result, on average
ONE_FILE_SCRIPT = """mkdir out; cd out
seq {count} | xargs touch
head -c 1024 /dev/zero | tr '\\0' x > wanted
head -c 64M /dev/urandom > block
for number in $(seq {blocks}); do cat block; done > noise
rm block
"""


def one_file(place: Place, size: int) -> Iterator[Measure]:
    """One file of 1 KB out of a result of `size` files, with as many bytes as 5 GiB has for 200,000."""
    blocks = max(1, size * FILE_BYTES // 2**26)
    if shutil.disk_usage(place.folder).free < 4 * blocks * 2**26:
        raise BenchError(f"one-file needs {4 * blocks >> 4} GiB of free disk: choose another --dir, or --quick")
    with running_site(place) as site, Caller(site.port) as caller:
        files = {"run.sh": ONE_FILE_SCRIPT.format(count=size - 2, blocks=blocks).encode()}
        job = wait_until_completed(caller, caller.ask(upload_request(files)).json())
        server = site.processes["server"].pid
        caller.ask(request("GET", "/health"))
        before, times = rss_mb(server), list[float]()
        for _ in range(50):
            begin = time.perf_counter()
            answer = caller.ask(request("GET", f"/jobs/{job['id']}/files/out/wanted"))
            times.append(1000 * (time.perf_counter() - begin))
            if answer.body != b"x" * 1024:
                raise BenchError(f"not the file: {answer.body[:100]!r}")
        yield Measure("first", times[0], "ms")
        yield Measure("median", statistics.median(times), "ms")
        yield Measure("growth of RSS, server", max(0.0, rss_mb(server) - before), "MB")
        begin = time.perf_counter()
        caller.ask(request("GET", f"/jobs/{job['id']}/files?limit=1000"))
        yield Measure("page of 1,000", 1000 * (time.perf_counter() - begin), "ms")


def rss_mb(pid: int) -> float:
    """The memory that a process holds now (VmRSS)."""
    return int(first_line(f"/proc/{pid}/status", "VmRSS").split()[0]) * 1024 / MB
