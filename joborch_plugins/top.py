"""The command `top`: services, clients and jobs, refreshed in place on a terminal; one look for a pipe or as JSON.

The figures are those of GET /services and GET /jobs. A thread asks the server, so that keys work while it does not answer.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from joborch_plugins.caller import Job, JobsError
from joborch_plugins.commands import COLOURS, DONE, WAITING_PATIENCE_S, Given, age_text, cut, printable, span_text, story

REFRESH_S = 2.0
MOST_JOBS = 200  # that are fetched, and searched by a filter
STATES = (None, "Running", "Queued", "Failed", "Completed")
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, without cursor; what is too wide is cut
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])?|.", re.DOTALL)  # what a key sends (ECMA-48, 5.4)
KEYS = "↑↓ choose  l log  c cancel  s status  a all users  / filter  q quit"
ARROWS = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1, "\x1b[5~": -10, "\x1b[6~": 10}

Rows = Sequence[Sequence[str]]


class Site(NamedTuple):
    """What the server says now: its services with their clients, and jobs, newest first."""

    services: list[dict[str, Any]]
    jobs: list[dict[str, Any]]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients of all services, each once."""
        return list({client["name"]: client for service in self.services for client in service["clients"]}.values())


def look(given: Given, everybody: bool, status: str | None = None) -> Site:
    """Ask the server. Raises JobsError."""
    services = given.jobs.server.ask("GET", "/services")["services"]
    return Site(services, [job.facts for job in given.jobs.list(limit=MOST_JOBS, all_users=everybody, status=status)])


def service_row(service: dict[str, Any]) -> list[str]:
    """Return what is shown of a service."""
    mean = "" if service["mean_run_s"] is None else span_text(service["mean_run_s"])
    running = f"{service['running']} of {service['max_runs']}"
    return [service["name"], running, str(service["queued"]), str(service["users_queued"]), mean]


def client_row(client: dict[str, Any]) -> list[str]:
    """Return what is shown of a client."""
    slots = "" if client["slots"] is None else f"{client['free']} of {client['slots']}"
    load = "" if client["load"] is None else f"{client['load']:.0f}%"
    return [client["name"], slots, str(client["jobs"]), load, client["trouble"] or ("drained" if client["drained"] else "")]


def job_row(facts: dict[str, Any]) -> list[str]:
    """Return what is shown of a job."""
    return [str(facts["id"]), str(facts["user_id"]), facts["service"], facts["name"] or "", facts["status"], age_text(facts), story(facts)]


TABLES: tuple[tuple[str, Sequence[str], Callable[[dict[str, Any]], list[str]]], ...] = (
    ("service", ("SERVICE", "RUNNING", "QUEUED", "USERS", "MEAN RUN"), service_row),
    ("client", ("CLIENT", "FREE SLOTS", "JOBS", "CPU", ""), client_row),
    ("job", ("JOB", "USER", "SERVICE", "NAME", "STATUS", "AGE", ""), job_row),
)


def run_top(given: Given) -> int:
    """Print one look at the site, or on a terminal watch it until the user leaves."""
    site = look(given, given.options.all)
    if given.options.json:
        print(json.dumps({"services": site.services, "clients": site.clients, "jobs": site.jobs}))
    elif given.screen.is_terminal and sys.stdin.isatty() and os.environ.get("TERM") != "dumb":
        Watch(given, site).run()
    else:
        for (kind, _, row), facts in zip(TABLES, (site.services, site.clients, site.jobs)):
            for each in facts:
                given.screen.say("\t".join([kind, *map(printable, row(each))]))
    return DONE


def columns(head: Sequence[str], rows: Rows, width: int) -> list[str]:
    """Return lines with the cells in columns; the last column is cut at `width`."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [min(24, max(len(row[at]) for row in [head, *rows])) for at in range(len(head) - 1)]
    widths.append(max(1, width - sum(widths) - 2 * len(widths)))
    return [cut("  ".join(cut(text, wide).ljust(wide) for text, wide in zip(row, widths)).rstrip(), width) for row in [head, *rows]]


class Watch:
    """The site in the whole terminal. The main thread draws it and reads keys; a thread refreshes it."""

    def __init__(self, given: Given, site: Site) -> None:
        self.given, self.site = given, site
        self.everybody, self.text = given.options.all, ""
        self.status: str | None = None
        self.chosen: int | None = None  # the id of a job; None: the newest one
        self.drawn: list[dict[str, Any]] = []  # the jobs on the screen: keys mean these, also if fresher ones have arrived
        self.message, self.trouble = "", ""
        self.answer: Callable[[str], None] | None = None  # takes the next keys, while a question or the filter is on the screen
        self.work: Callable[[], None] | None = None  # what the thread does before its next look
        self.failure: Exception | None = None
        self.left, self.again = False, threading.Event()
        self.saved = termios.tcgetattr(sys.stdin)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    # -- the terminal --

    def run(self) -> None:
        """Watch until the user leaves. However it ends, the terminal is as before."""
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it wakes wait_for_keys
        signal.signal(signal.SIGTSTP, self.pause)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        thread = threading.Thread(target=self.refresh, daemon=True)
        thread.start()
        try:
            self.enter()
            self.draw()
            while not self.left:
                for key in self.wait_for_keys() or [""]:
                    self.press(key)
                    self.draw()  # the next key means what is seen now
                if self.failure:
                    raise self.failure
        finally:
            self.leave()
            self.left = True
            self.again.set()
            self.given.jobs.server.abort()
            thread.join(1.0)  # Python cannot exit while it reads; it may connect

    def enter(self) -> None:
        """Take the terminal."""
        tty.setcbreak(sys.stdin)
        self.write(ENTER)

    def leave(self) -> None:
        """Give the terminal back as it was."""
        try:
            self.write(LEAVE)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.saved)
        except (OSError, termios.error):
            self.left = True  # the terminal is closed

    def pause(self, *_: Any) -> None:
        """Stop on Ctrl-Z, and take the terminal again when the shell continues this process."""
        self.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()

    def write(self, text: str) -> None:
        """Write to the terminal at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def wait_for_keys(self) -> list[str]:
        """Wait for keys, fresh figures or another size of the terminal; return the keys."""
        ready, _, _ = select.select([sys.stdin, self.reader], [], [])
        if self.reader in ready:
            os.read(self.reader, 4096)
        if sys.stdin not in ready:
            return []
        typed = os.read(sys.stdin.fileno(), 1024).decode("utf-8", "replace")
        if not typed:
            self.left = True  # the terminal is closed
        return KEY.findall(typed)

    # -- the thread --

    def refresh(self) -> None:
        """Look at the site again and again."""
        while not (self.left or self.failure):
            try:
                work, self.work = self.work, None
                if work:
                    work()
                self.site, self.trouble = look(self.given, self.everybody, self.status), ""
            except JobsError as error:
                self.trouble = str(error)
            except Exception as error:  # noqa: BLE001 - the main thread raises it
                self.failure = error
            os.write(self.writer, b"\0")
            self.again.wait(REFRESH_S)
            self.again.clear()

    # -- what is seen --

    def place(self) -> int:
        """Return which of the drawn jobs is the chosen one."""
        return next((at for at, facts in enumerate(self.drawn) if facts["id"] == self.chosen), 0)

    def draw(self) -> None:
        """Show all of it."""
        size = os.get_terminal_size(sys.stdout.fileno())
        lines = self.lines(size.columns, size.lines - 1)
        foot = self.foot(size.columns)
        self.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J" + foot)

    def foot(self, width: int) -> str:
        """Return the last line: a question, what was done, why the figures are old, or the keys."""
        paint = self.given.screen.paint
        if self.answer is None and self.trouble and not self.message:
            return paint(cut(printable(self.trouble), width), 31)
        return cut(printable(self.message), width) if self.message else paint(cut(KEYS, width), 2)

    def lines(self, width: int, height: int) -> list[str]:
        """Return at most `height` lines: services and clients in the upper half at most, jobs below."""
        paint = self.given.screen.paint
        whose = "all users" if self.everybody else f"user {self.given.jobs.user}"
        shown = ", ".join(each for each in (whose, self.status, f"with {self.text!r}" if self.text else "") if each)
        found = [cut(f"{time.strftime('%H:%M:%S')}  {self.given.jobs.server.url}  jobs of {shown}", width)]
        for (_, head, row), those in zip(TABLES, (self.site.services, self.site.clients)):
            most = max(1, (height - 6) // 4)
            title, *rest = columns(head, [row(each) for each in those[:most]], width)
            more = [f"... and {len(those) - most} more"] if len(those) > most else []
            found += ["", paint(title, 1), *rest, *more]
        self.drawn = jobs = [facts for facts in self.site.jobs if self.text.lower() in "\t".join(job_row(facts)).lower()]
        chosen, room = self.place(), max(1, height - len(found) - 2)
        first = max(0, chosen - room + 1)
        _, head, row = TABLES[2]
        title, *rest = columns(head, [row(each) for each in jobs[first : first + room]], width - 2)
        found += ["", paint(f"  {title}", 1)]
        for at, (line, facts) in enumerate(zip(rest, jobs[first:]), first):
            code = 7 if at == chosen else COLOURS.get(facts["status"], 0)
            found.append(paint(f"{'>' if at == chosen else ' '} {line}", code))
        return found[:height] if jobs else [*found[: height - 1], "  no jobs"]

    # -- keys --

    def press(self, key: str) -> None:
        """Do what a key means; an empty one means nothing."""
        if not key:
            return
        self.message = self.message if self.answer else ""
        if self.answer:
            self.answer(key)
        elif key in ARROWS and self.drawn:
            at = max(0, min(self.place() + ARROWS[key], len(self.drawn) - 1))
            self.chosen = self.drawn[at]["id"] if at else None
        elif key == "q":
            self.left = True
        elif key == "a":
            self.everybody = not self.everybody
        elif key == "s":
            self.status = STATES[(STATES.index(self.status) + 1) % len(STATES)]
        elif key == "/":
            self.text, self.message, self.answer = "", "filter: ", self.filter
        elif key in ("c", "l", "\n", "\r") and self.drawn:
            job = Job(self.given.jobs.server, self.drawn[self.place()])
            self.ask_cancel(job) if key == "c" else self.follow(job)
        if key in ("a", "s"):
            self.again.set()

    def filter(self, key: str) -> None:
        """Take one more key of the filter; Enter ends it, Escape removes it."""
        if key in ("\n", "\r") or key.startswith("\x1b"):
            self.text = "" if key == "\x1b" else self.text
            self.message, self.answer = "", None
            return
        self.text = self.text[:-1] if key in ("\x7f", "\b") else self.text + key
        self.message = f"filter: {self.text}"

    def ask_cancel(self, job: Job) -> None:
        """Ask, and stop a job if the next key is y."""
        if job.ended:
            self.message = f"job {job.id} is {job.status}"
            return

        def cancel() -> None:
            try:
                self.message = f"job {job.id} is {job.cancel().status}"
            except JobsError as error:
                self.message = str(error)

        def take(key: str) -> None:
            self.answer, self.message = None, ""
            if key in ("y", "Y"):
                self.message, self.work = f"stopping job {job.id}", cancel
                self.again.set()

        name = f" ({job.facts['name']})" if job.facts["name"] else ""
        self.message, self.answer = f"stop job {job.id}{name}? [y/N] ", take

    def follow(self, job: Job) -> None:
        """Print a job's output in the usual screen until it has ended or the user presses Ctrl-C."""
        self.leave()
        jobs = self.given.jobs_at(self.given.options.server, None)
        jobs.server.patience_s = WAITING_PATIENCE_S
        job = Job(jobs.server, job.facts)
        try:
            print(f"output of job {job.id}; Ctrl-C leads back")
            for text in job.follow():
                self.write("".join(each if each in "\n\t" else printable(each) for each in text))
            print(f"job {job.id} is {job.status}; Enter leads back", flush=True)
            sys.stdin.readline()
        except KeyboardInterrupt:
            self.message = f"job {job.id} continues" if not job.ended else ""
        except JobsError as error:
            self.message = str(error)
        finally:
            jobs.server.close()
        self.enter()
