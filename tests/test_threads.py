"""A server has few threads, and clients that do not answer hold up nobody else, in whatever way they do not answer."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakePair
from harness import Pair, run_to_end, wait_for
from proxy import HOST, Fault, Proxy
from world import clients_of

SILENT = 100  # clients that do not answer
MOST_THREADS = 80  # of a server with so many of them
PROMPT_S = 8.0  # a job of the healthy client takes less: a call that hangs takes 10 s
WAYS = {
    "refused": Fault("refuse"),
    "cut": Fault("cut_answer", times=0),
    "reset": Fault("reset", times=0, where="request"),
    "silent": Fault("stall", times=0, seconds=600),
    "unreachable": None,
}


def threads_of(pid: int) -> int:
    """How many threads a process has now."""
    found = re.search(r"^Threads:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


class Highest:
    """Counts the threads of a process until it is left; `threads` is the highest number so far."""

    def __init__(self, pid: int) -> None:
        self.pid, self.threads, self.over = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self.count)

    def count(self) -> None:
        while not self.over.wait(0.05):
            self.threads = max(self.threads, threads_of(self.pid))

    def __enter__(self) -> Highest:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


@contextlib.contextmanager
def port_without_answer() -> Iterator[int]:
    """A port whose queue of connections is full: who connects to it hears nothing, as of a machine that is switched off."""
    with socket.socket() as listener, contextlib.ExitStack() as callers:
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(4):
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def clients_that_do_not_answer(way: str, pair: Pair) -> Iterator[tuple[list[str], Proxy]]:
    """The URLs of many clients that do not answer, and what stands before them."""
    fault = WAYS[way]
    with Proxy(pair.client.port) as proxy, port_without_answer() as closed:
        if fault is not None:
            proxy.plant(fault)
        port = proxy.port if fault is not None else closed
        yield [f"http://{HOST}:{port}/c{number}" for number in range(SILENT)], proxy


def seconds_of_a_job(pair: Pair) -> float:
    """How long a job takes from its upload to its end."""
    begun = time.monotonic()
    job = run_to_end(pair.server, "true")
    assert job["status"] == "Completed", job["reason"]
    assert job["client"] == f"{HOST}:{pair.client.port}"
    return time.monotonic() - begun


def least_tries(proxy: Proxy) -> int:
    """How often the client was called that was called least."""
    tries = dict.fromkeys(range(SILENT), 0)
    for exchange in proxy.find("GET /c"):
        tries[int(exchange.path[2:].partition("/")[0])] += 1
    return min(tries.values())


def has_tried_all(pair: Pair) -> bool:
    """Whether each client that does not answer has been called."""
    return sum(client["trouble"] not in ("", "has not been called yet") for client in clients_of(pair.server).values()) == SILENT


@pytest.mark.parametrize("way", WAYS)
def test_clients_that_do_not_answer_take_few_threads_and_delay_nobody(make_pair: MakePair, way: str) -> None:
    pair = make_pair()
    pair.client.start()
    with clients_that_do_not_answer(way, pair) as (urls, proxy):
        pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = ",".join([*urls, pair.client.url])
        pair.server.spawn()
        with Highest(pair.server.pid) as highest:
            wait_for(pair.server._healthy, what="/health of the server")
            first_s = seconds_of_a_job(pair)
            wait_for(lambda: has_tried_all(pair), 60, "each client to be tried")
            times_s = [seconds_of_a_job(pair) for _ in range(5)]
            if way in ("cut", "reset", "silent"):
                wait_for(lambda: least_tries(proxy) >= 2, 60, "each client to be tried again")
            times_s += [seconds_of_a_job(pair) for _ in range(5)]
        print(f"{way}: {highest.threads} threads; first job {first_s:.2f} s, then at most {max(times_s):.2f} s")
        begun = time.monotonic()
        assert pair.server.stop() == 0
        stop_s = time.monotonic() - begun
    assert highest.threads <= MOST_THREADS
    assert max(times_s) < PROMPT_S
    assert first_s < 2 * PROMPT_S, "its first contact stands in line with the first calls of all others"
    assert stop_s < PROMPT_S
    assert "ERROR" not in pair.server.log and "Traceback" not in pair.server.log
