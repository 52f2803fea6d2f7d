"""A client that is to be taken away: it accepts no more payloads, and ends when every result is fetched."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any

from joborch import COUNT_IN, UNFETCHED, Client, Loop, Node, Status, log

DRAIN_LOOK_S = 0.5


class Drain:
    """Drains a client on SIGUSR1 or `client --drain`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.reason = ""  # why this client accepts no payloads; its servers show it
        self.left = ""  # what the log said last

    def start(self) -> None:
        """Add the loop, and drain at once if the command line says so."""
        self.node.loops["drain"] = Loop("drain", self.tick, lambda: self.node.pool, DRAIN_LOOK_S, wanted=lambda: bool(self.reason))
        if self.node.config.origin[0].get("drain"):
            self.begin()

    def committed(self, moves: Iterable[Any]) -> None:
        """Nothing to do: the tick reads the rows."""

    def signalled(self, number: int) -> None:
        """Drain a client. A server has nothing to drain: its clients do the work."""
        if isinstance(self.node, Client):
            self.begin()
        else:
            log.info("%s is ignored: it drains a client, and this is a server", signal.Signals(number).name)

    def begin(self) -> None:
        """Accept no more payloads, and let servers know at once."""
        self.reason = "is draining: it accepts no more jobs, and stops when it has none"
        self.node.plugins["health"].seen += 1
        self.node.store.core.wake_all()
        self.node.wake("drain")

    def tick(self) -> bool:
        """Stop the client when nothing is left; the main thread does that, as on TERM."""
        if not self.reason or self.node.stopping.is_set():
            return False
        live = sum(self.node.store.number(COUNT_IN, status=status.value) for status in (Status.PREPARED, Status.RUNNING))
        unfetched = self.node.store.number(UNFETCHED)
        left = f"{live} to finish, {unfetched} to be fetched"
        if left != self.left:
            log.info("drain: %s", left if live or unfetched else "all payloads are finished and fetched")
        self.left = left
        if not (live or unfetched):
            os.kill(os.getpid(), signal.SIGTERM)
        return False
