"""The command line: all commands with their help texts and examples, and the commands for users.

A command for users runs here, without the rest of joborch, so that it starts quickly. Its output goes to standard output: to a
terminal in colour and fitted to its width, to a pipe as plain lines with tabs, with --json as JSON. Progress and errors go to
standard error. The exit status is 0; 1 if a job failed; 2 for wrong usage; 3 if the server cannot be reached or cannot do it now;
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import functools
import importlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable, NamedTuple, NoReturn

from joborch_plugins.caller import (
    ENDED,
    WAIT_S,
    Damaged,
    Files,
    Job,
    JobFailed,
    Jobs,
    JobsError,
    Refused,
    ServerUnreachable,
    files_of,
    login_file,
    refuse_filled,
    stored_login,
    token_of_environment,
)

DONE, FAILED, USAGE, NO_SERVER, INTERRUPTED = 0, 1, 2, 3, 130
PATIENCE_S = 10.0  # how long a command repeats calls if the user could repeat the command
REFRESH_S = 2.0  # of the line that shows how jobs that are waited for stand
WAITING_PATIENCE_S = 24 * 3600.0  # for a command that waits anyway
LIVE = ("Queued", "Processing", "Submitted", "Running", "Unknown")
STATUSES = (*ENDED, *LIVE)
ASK_ABOVE = 10  # jobs that are stopped or run again without a question
TAIL_LINES = 20  # that `why` shows
RANGE_MOST = 100_000
SAY_AFTER_S = 1.0  # a transfer that takes longer shows how far it is


# == 1. Words ==  Every command, with its help text.


class Word(NamedTuple):
    """One command: its help, its examples, and whether it runs here (else in joborch.py)."""

    help: str
    examples: str
    here: bool = False


WORDS = {
    "submit": Word(
        "send files or a folder as a job, and print its id",
        "  joborch submit run.sh 2oob.pdb --wait --get out\n  joborch submit folder --name dock --timeout 90m\n"
        "  joborch submit data.csv -- python3 -c 'print(open(\"data.csv\").read())'\n  joborch submit folder --array 1-20",
        here=True,
    ),
    "list": Word(
        "list jobs, newest first, with what each waits for or why it failed",
        "  joborch list --today\n  joborch list --status Failed,Killed --since 2d --json",
        here=True,
    ),
    "wait": Word("wait until jobs have ended", "  joborch wait 41 42\n  joborch wait 5-9", here=True),
    "logs": Word("print what a job wrote", "  joborch logs 42 --follow\n  joborch logs 42 --stderr", here=True),
    "get": Word(
        "fetch results, or single files of one; an interrupted fetch resumes",
        "  joborch get 42 -o out\n  joborch get 42 summary.txt\n  joborch get 41 42 --zip",
        here=True,
    ),
    "why": Word("explain what happened to a job, and what to do", "  joborch why 42", here=True),
    "cancel": Word("stop jobs", "  joborch cancel 41 5-9\n  joborch cancel --name dock", here=True),
    "retry": Word(
        "run jobs again, as new jobs with the same files and fields", "  joborch retry 41 5-9\n  joborch retry --failed", here=True
    ),
    "redeliver": Word("send the webhooks of jobs again", "  joborch redeliver 42\n  joborch redeliver 41 50-60", here=True),
    "delete": Word(
        "delete jobs for good: files, names, reasons and texts, also at clients; their figures stay",
        "  joborch delete 42\n  joborch delete 41 5-9 --yes",
        here=True,
    ),
    "delete-user": Word(
        "delete all jobs of a user in the same way; for operators", "  joborch delete-user 7\n  joborch delete-user 7 --yes", here=True
    ),
    "export": Word(
        "print use and waits of jobs for accounting (CSV), for simulations (SWF), or by service and month",
        "  joborch export --csv --since 2026-11-01 --until 2026-12-01 >november.csv\n  joborch export --swf >trace.swf\n"
        "  joborch export --summary",
        here=True,
    ),
    "quota": Word("show your use and your limits, by service", "  joborch quota", here=True),
    "top": Word(
        "watch services, clients and jobs; keys follow a log, cancel and filter", "  joborch top --all\n  joborch top --json", here=True
    ),
    "login": Word(
        "store the server and its token for all further commands and scripts",
        "  joborch login https://jobs.example.org\n  joborch login http://127.0.0.1:5000 --user 7 <token-file",
        here=True,
    ),
    "logout": Word("delete what login stored", "  joborch logout", here=True),
    "token": Word(
        "make, list or revoke the tokens of callers, each with a role: user, portal, reader, operator or client",
        "  joborch token add ward-7 --role user --user 7 --days 30\n  joborch token add portal-1 --role portal --services docking\n"
        "  joborch token list\n  joborch token revoke ward-7",
        here=True,
    ),
    "pause": Word(
        "let the jobs of a service wait; its jobs at clients continue, and uploads are still accepted",
        "  joborch pause docking --reason 'the file server is down'",
        here=True,
    ),
    "resume": Word("send the jobs of a paused service again", "  joborch resume docking", here=True),
    "clouds": Word(
        "list the clouds of the server with their instances and costs, or end all instances",
        "  joborch clouds\n  joborch clouds --plan\n  joborch clouds --end-all",
        here=True,
    ),
    "completion": Word(
        "print a script that completes commands, flags, ids of jobs and services in a shell",
        '  eval "$(joborch completion bash)"\n  eval "$(joborch completion zsh)"\n  joborch completion fish | source',
        here=True,
    ),
    "server": Word(
        "run a server until INT or TERM",
        "  joborch server\n  SERVICE_DOCKING_CLIENTS=http://gpu1:9000 SERVICE_DOCKING_TOKEN=... joborch server --port 5000",
    ),
    "client": Word(
        "run a client until INT or TERM; its payloads keep running, and the next start recovers them",
        "  joborch client --slots 4\n  joborch client --executor slurm\n"
        "  JOBORCH_HOST=0.0.0.0 JOBORCH_TOKEN_FILE=/etc/joborch-token joborch client",
    ),
    "backup": Word(
        "copy the server's database to FILE, also while the server runs",
        "  joborch backup /backups/joborch-monday.db\n  joborch backup --keep 14 /backups",
    ),
    "restore": Word(
        "replace the server's database by a backup; stop the server first; nothing is deleted",
        "  joborch restore /backups/joborch-monday.db",
    ),
    "demo": Word("start both in a temporary folder and run the example", "  joborch demo --keep"),
    "config": Word(
        "print the effective settings and the source of each; secrets are masked",
        "  joborch config server\n  joborch config client --json\n  joborch config --check server.env",
    ),
    "doctor": Word(
        "check these settings and this machine, and print problems with their remedies; nothing is changed",
        "  joborch doctor server\n  joborch doctor client --executor slurm",
    ),
    "version": Word("print the versions of joborch, Python, SQLite and the bundled packages", "  joborch version --json"),
}
ALIASES = {"ls": "list"}
HELP = ("-h", "--help", "help")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the mistake and the remedy; usage is left to --help."""

    def error(self, message: str) -> NoReturn:
        """Print why the command line is refused, and exit with status 2."""
        self.exit(USAGE, f"{self.prog}: {self.plain(message)}; see {self.prog} --help\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help. argparse itself hides from Python 3.11 on that nobody reads it, if it is long."""
        (file or sys.stdout).write(self.format_help())

    def plain(self, message: str) -> str:
        """Return a message of argparse in plain words, with the nearest known word or flag."""
        wrong = re.match(r"argument ([^:]+): invalid choice: \'(.*?)\' \(choose from (.*)\)", message)
        if wrong:
            known = [word.strip(" '") for word in wrong[3].split(",")]
            what = "no command" if wrong[1] == "COMMAND" else "none of " + ", ".join(known)
            return f"{printable(wrong[2])[:80]!r} is {what}{nearest(wrong[2], known)}"
        missing = re.match(r"argument ([^:]+): expected one argument", message)
        if missing:
            flag = missing[1].split("/")[-1]
            example = getattr(self._option_string_actions.get(flag), "example", "")
            return f"{flag} needs a value" + (f", as in {flag} {example}" if example else "")
        message = re.sub(r"invalid int value: (.*)", r"\1 is no whole number", message)
        return re.sub(r"^argument (\S+): ", r"\1: ", message)

    def unknown(self, word: str, known: Iterable[str]) -> NoReturn:
        """Exit with an error for a word or flag that the command does not know."""
        flag = word.partition("=")[0]
        if word.startswith("-"):
            self.error(f"{printable(flag)[:80]} is not a flag{nearest(flag, known)}")
        self.error(f"{printable(word)[:80]!r} is one word too many")


def make_parser(version: str = "") -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the whole command line, and those of its words, which have no flags yet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "joborch",
        description="Turns any machine into a job server or a compute client, and sends jobs to one.",
        formatter_class=raw,
        epilog="first time: joborch demo",
    )
    parser.add_argument("--version", action="version", version=f"joborch {version}")
    group = parser.add_subparsers(dest="command", metavar="COMMAND")
    made = {}
    for name, word in WORDS.items():
        what = word.help[0].upper() + word.help[1:] + "."
        made[name] = group.add_parser(name, help=word.help, description=what, formatter_class=raw, epilog=f"example:\n{word.examples}")
    return parser, made


def takes(argv: Sequence[str]) -> bool:
    """Tell whether a command line is for this module: one of its words, or the help of the program."""
    first = argv[0] if argv else "--help"
    return first in (*HELP, *ALIASES) or (first in WORDS and WORDS[first].here) or bool(word_after_flag(argv))


def word_after_flag(argv: Sequence[str]) -> str:
    """Return the command of a command line that begins with one of its flags, else an empty text."""
    is_early = argv and argv[0].startswith("-") and argv[0] != "--version"
    return next((word for word in argv[1:] if word in WORDS or word in ALIASES), "") if is_early else ""


def use_utf8() -> None:
    """Restart this program in Python's UTF-8 mode if the locale has another encoding: joborch handles file names as UTF-8."""
    if sys.getfilesystemencoding().lower() == "utf-8" or sys.flags.utf8_mode:
        return
    arguments = getattr(sys, "orig_argv", ["", *sys.argv])[1:]  # Python 3.9 does not keep its own flags
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *arguments])


def start() -> int:
    """Run `joborch` as pip installs it: a command of this module without loading the rest of the program."""
    if not takes(sys.argv[1:]):
        return int(importlib.import_module("joborch").main())
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the environment may hold a token
    return main(sys.argv[1:])


# == 2. Screen ==  What a person sees: colour, columns, one line that changes, and questions.

COLOURS = {"Completed": 32, "Failed": 31, "Invalid": 31, "Killed": 33, "Unknown": 35, "Running": 36, "Cleaned": 2, "Queued": 2}


def printable(text: str) -> str:
    """Return a text without characters that would move the cursor or change the terminal."""
    return "".join(each if each.isprintable() else "�" for each in text.replace("\n", " "))


class Screen:
    """Standard output and standard error, each a terminal or not."""

    def __init__(self) -> None:
        self.is_terminal, self.is_live = sys.stdout.isatty(), sys.stderr.isatty()
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.has_colour = self.is_terminal and wanted
        self.shown, self.began_at = False, time.monotonic()
        self.troubled, self.warned = False, set[str]()
        self.hint = ""  # how to continue after Ctrl-C

    @property
    def width(self) -> int:
        """The columns of the terminal."""
        if os.environ.get("COLUMNS", "").isdecimal():
            return max(20, int(os.environ["COLUMNS"]))
        for stream in (sys.stdout, sys.stderr):
            try:
                return os.get_terminal_size(stream.fileno()).columns or 80
            except (OSError, ValueError):
                continue
        return 80

    def paint(self, text: str, code: int) -> str:
        """Return a text in a colour, if there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.has_colour and code else text

    def say(self, text: str = "") -> None:
        """Print a line of the requested output."""
        self.clear()
        print(text)

    def note(self, text: str) -> None:
        """Print a line to standard error."""
        self.clear()
        print(text, file=sys.stderr)

    def live(self, text: str) -> None:
        """On a terminal, replace the last line."""
        if self.is_live:
            self.shown = True  # before it is: Ctrl-C may come at any moment
            print(f"\r\x1b[K{printable(text)[: self.width - 1]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line that `live` shows."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False

    def warn(self, text: str) -> None:
        """Say once, also for many jobs, what the server ignored or found odd."""
        if text not in self.warned:
            self.warned.add(text)
            self.note(f"joborch: {printable(text)}")

    def trouble(self, text: str) -> None:
        """Say once why a call is repeated."""
        if not self.troubled:
            self.note(f"joborch: {printable(text)}; trying again")
        self.troubled = True

    def progress(self, what: str, done: int, size: int) -> None:
        """Show how far a transfer is, if it takes long."""
        if done == size or time.monotonic() - self.began_at < SAY_AFTER_S:
            return
        self.live(f"{what} {size_text(done)} of {size_text(size)} ({100 * done // max(1, size)}%)")

    def confirm(self, question: str, yes: bool) -> None:
        """Ask, unless --yes was given. Raises JobsError if the answer is no, or without a terminal."""
        if yes:
            return
        if not (sys.stdin.isatty() and self.is_live):
            raise JobsError(f"{question} Say so with --yes")
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise JobsError("nothing was done")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows in columns that fit the terminal, the last one cut; to a pipe with tabs and without the head."""
        rows = [[printable(cell) for cell in row] for row in rows]
        if not self.is_terminal:
            for row in rows:
                self.say("\t".join(row))
            return
        widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head) - 1)]
        room = max(10, self.width - sum(widths) - 2 * len(widths))
        self.say(self.paint(cut("  ".join([*(text.ljust(width) for text, width in zip(head, widths)), head[-1]]), self.width), 1))
        for row in rows:
            cells = [self.paint(text.ljust(width), COLOURS.get(text, 0)) for text, width in zip(row, widths)]
            self.say("  ".join([*cells, cut(row[-1], room)]).rstrip())


def cut(text: str, width: int) -> str:
    """Return a text of at most `width` characters, with an ellipsis if it was cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def seconds_at(text: str | None) -> float | None:
    """Return the wall time of a time as the server writes it."""
    if not text:
        return None
    return calendar.timegm((*(int(part) for part in re.split("[-T:]", text[:19])), 0, 0, 0)) + float(text[19:-1] or 0)


def span_text(seconds: float) -> str:
    """Return a span of time for people, as in 5s, 12m, 3h, 2d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size or (unit == "m" and seconds >= 90):
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def age_text(facts: dict[str, Any]) -> str:
    """Return how long ago a job was submitted."""
    created = seconds_at(facts["created_at"])
    return "" if created is None else span_text(time.time() - created)


def count_text(count: int, noun: str) -> str:
    """Return a number with its noun, as in `1 job` or `3 jobs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# == 3. Jobs of a command ==  The server, the user, and the jobs that a command line names.


class Given:
    """The options, jobs and screen of a command."""

    def __init__(self, options: argparse.Namespace, screen: Screen) -> None:
        self.options, self.screen = options, screen

    @functools.cached_property
    def jobs(self) -> Jobs:
        """The jobs of the user at the server. A call without an answer is not repeated. Raises JobsError."""
        return self.jobs_at(self.options.server, None)

    def jobs_at(self, url: str | None, token: str | None) -> Jobs:
        """Return the jobs of the user at the server at `url`. Raises JobsError."""
        jobs = Jobs(url, token, user=self.options.user, patience_s=0)
        jobs.server.on_trouble, jobs.server.on_progress = self.screen.trouble, self.screen.progress
        jobs.server.on_warning = self.screen.warn
        return jobs


def patient(given: Given) -> None:
    """Let a command that waits survive restarts of the server, now that the server has answered once."""
    given.jobs.server.patience_s = WAITING_PATIENCE_S


def ids_of(words: Sequence[str]) -> list[int | range]:
    """Return the job ids and ranges in these words. Raises JobsError for anything else."""
    found: list[int | range] = []
    for word in [part for each in words for part in each.split(",")]:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word)
        if not match:
            raise JobsError(f"{printable(word)[:80]!r} is not a job: give its id, as in 42, or several, as in 5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= RANGE_MOST:
            raise JobsError(f"{word} is no range of jobs: give the smaller id first, and {RANGE_MOST:,} at most")
        found.append(first if match[2] is None else range(first, last + 1))
    return found


def own_jobs(given: Given, ids: range) -> list[Job]:
    """Return the user's jobs with ids in a range. Raises JobsError if there are none."""
    found = []
    for job in given.jobs.list(limit=None, before=ids.stop):
        if job.id < ids.start:
            break
        found.append(job)
    if not found:
        raise JobsError(f"no job from {ids.start} to {ids.stop - 1} is yours: see joborch list")
    return found


def named_jobs(given: Given, words: Sequence[str]) -> list[Job]:
    """Return the jobs that these words name: those with these ids, and the user's jobs in ranges."""
    found: dict[int, Job] = {}
    for each in ids_of(words):
        found.update({job.id: job for job in ([given.jobs.job(each)] if isinstance(each, int) else own_jobs(given, each))})
    return sorted(found.values(), key=lambda job: job.id)


def one_job(given: Given) -> Job:
    """Return the only job that a command line names. Raises JobsError if there are several."""
    jobs = named_jobs(given, given.options.jobs)
    if len(jobs) > 1:
        raise JobsError(f"name one job: {given.options.jobs[0]} are {len(jobs)} jobs of yours")
    return jobs[0]


def chosen_jobs(given: Given, status: Sequence[str]) -> list[Job]:
    """Return the jobs that a command names by ids, or the user's jobs by the flags for name and status."""
    options = given.options
    if bool(options.jobs) == bool(options.name or options.by_status):
        raise JobsError("name the jobs: give ids, as in 41 5-9, or --name or a status")
    if options.jobs:
        return named_jobs(given, options.jobs)
    found = list(given.jobs.list(limit=None, status=options.by_status or status, name=options.name))
    if not found and given.screen.is_terminal:
        given.screen.note("no job matches")
    return found


def read_since(text: str) -> float:
    """Return the wall time that a person means by `2d`, `2026-11-28` or `2026-11-28T14:30`."""
    age = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if age:
        return time.time() - int(age[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[age[2]]
    date = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d))?)?", text)
    if not date:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give an age or a date, as in 2d or 2026-11-28")
    return time.mktime((*(int(part or 0) for part in date.groups()), 0, 0, -1))  # type: ignore[arg-type]


def read_limit(text: str) -> int:
    """Return the most jobs to list."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no number of jobs: give one, as in 20, or 0 for all")
    return int(text)


def read_status(text: str) -> list[str]:
    """Return the statuses that a person names."""
    found = [word.strip().capitalize() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in STATUSES:
            raise argparse.ArgumentTypeError(
                f"{printable(word)!r} is no status{nearest(word, STATUSES)}: give one of {', '.join(STATUSES)}"
            )
    return found


def story(facts: dict[str, Any]) -> str:
    """Return what a job waits for, where it runs, or why it ended in its state."""
    if facts["status"] in ("Running", "Submitted", "Processing"):
        return f"on {facts['client']}" if facts["client"] else ""
    if facts["status"] == "Queued":
        return str(facts.get("waiting_for") or "")
    if facts["status"] == "Completed":
        return ""
    return str(facts["reason"] or "")


def print_jobs(given: Given, jobs: Sequence[Job]) -> None:
    """Print jobs as JSON, or one per line."""
    if given.options.json:
        print(json.dumps([job.facts for job in jobs]))
        return
    rows = [[str(job.id), job.facts["name"] or "", job.status, age_text(job.facts), story(job.facts)] for job in jobs]
    if rows or not given.screen.is_terminal:
        given.screen.table(("ID", "NAME", "STATUS", "AGE", ""), rows)


def failed(jobs: Iterable[Job]) -> int:
    """Return the exit status for jobs that have ended: 1 if one has no result."""
    return DONE if all((job.facts.get("ended_as") or job.status) == "Completed" for job in jobs) else FAILED


# == 4. Sending and waiting ==  submit, list, wait, logs, cancel.


def files_to_send(paths: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """Return the files of a job by their paths there. run.sh is made from `command`, or is the first path. Raises JobsError."""
    files: dict[str, Any] = files_of(list(paths))
    if command:
        if "run.sh" in files:
            raise JobsError("there are a run.sh and a command after --: send only one of them")
        files["run.sh"] = f"#!/bin/bash\n{shlex.join(command)}\n"
    elif not paths:
        raise JobsError("there is nothing to send: name files or a folder, or a command, as in joborch submit -- echo hello")
    elif "run.sh" not in files:
        first = os.path.basename(paths[0])
        if first not in files or not first.endswith((".sh", ".bash")):
            names = ", ".join(sorted(files)[:5])
            raise JobsError(f"there is no run.sh among {names}: name the script first, as in joborch submit dock.sh 2oob.pdb")
        files["run.sh"] = files.pop(first)
    return files


def with_index(script: Any, index: int) -> str:
    """Return a script that sets its JOBORCH_ARRAY_INDEX. Its line numbers do not change."""
    if not isinstance(script, str):
        with open(script, encoding="utf-8", errors="surrogateescape") as file:
            script = file.read()
    first, newline, rest = script.partition("\n")
    line = f"export JOBORCH_ARRAY_INDEX={index};"
    return f"{first}{newline or chr(10)}{line}{rest}" if first.startswith("#!") else f"{line}{script}"


def read_indexes(text: str) -> list[int]:
    """Return the numbers of an array, as in 1-20, 1-20:5 or 1,3,5-9."""
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18})(?::([0-9]{1,18}))?)?", word.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{printable(text)[:80]!r} is no list of numbers: give one, as in 1-20, 1-20:5 or 1,3,5-9")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or not step:
            raise argparse.ArgumentTypeError(f"{word} has no numbers: give the smaller one first, as in {last}-{first}")
        numbers = range(first, last + 1, step)
        if len(found) + len(numbers) > RANGE_MOST:
            raise argparse.ArgumentTypeError(f"{printable(text)[:80]} has more than {RANGE_MOST:,} numbers: send several smaller arrays")
        found.update(numbers)
    return sorted(found)


def command_submit(given: Given) -> int:
    """Send one job, or one for each number of an array."""
    options, screen = given.options, given.screen
    files = files_to_send(options.paths, options.script)
    if options.get:
        refuse_filled(os.path.abspath(options.get))  # now, and not when the job has run
    options.service = options.service or given.jobs.default_service()
    given.jobs.server.read("GET", "/")  # it answers: from now on, repeat calls without an answer
    given.jobs.server.patience_s = PATIENCE_S
    names = ("name", "priority", "timeout", "retries", "cpus", "memory", "gpus", "after", "inputs_from", "crlf", "callback_url")
    fields = {name: getattr(options, name) for name in names}
    jobs = send_array(given, files, fields) if options.array else [send_one(given, files, fields)]
    ids = ids_text(jobs)
    which, them = (f"job {ids} continues", "it") if len(jobs) == 1 else (f"jobs {ids} continue", "them")
    screen.hint = f"{which}; `joborch wait {ids}` waits for {them}, `joborch cancel {ids}` stops {them}"
    if not options.json and not screen.is_terminal:
        print(*(job.id for job in jobs), sep="\n", flush=True)
    elif not options.json:
        screen.say(f"{count_text(len(jobs), 'job')} queued for service {jobs[0].facts['service']}: {ids}")
    return finish_submit(given, jobs)


def finish_submit(given: Given, jobs: Sequence[Job]) -> int:
    """Wait for submitted jobs and fetch their results, if the options say so; return the exit status."""
    options, screen = given.options, given.screen
    if options.wait or options.get or options.pass_status:
        watch(given, jobs, tell=screen.is_terminal and not options.json)
        for job in [job for job in jobs if failed([job]) and not options.get and not screen.is_terminal]:
            screen.note(f"joborch: {JobFailed(job)}; see joborch why {job.id}")
    if options.json:
        print(json.dumps([job.facts for job in jobs]))
    if options.get:
        screen.hint = f"`joborch get {ids_text(jobs)} -o {shlex.quote(options.get)}` resumes"
        fetch_all(given, jobs, options.get)
    if options.pass_status and jobs[-1].status != "Completed":
        return int(max(job.facts["exit_code"] or 0 for job in jobs)) or FAILED
    return failed(jobs) if jobs[-1].ended else DONE


def send_one(given: Given, files: Files, fields: dict[str, Any]) -> Job:
    """Send one job. If the user interrupts, say what happened to it."""
    server, screen = given.jobs.server, given.screen
    unknown, sent_all = "`joborch list` shows whether the job was queued", False

    def progress(what: str, done: int, size: int) -> None:
        nonlocal sent_all
        sent_all = sent_all or done == size
        screen.hint = unknown if sent_all else "the job was not queued; the same command sends it again"
        screen.progress(what, done, size)

    server.on_progress = progress
    screen.hint = unknown
    try:
        return given.jobs.submit(files, given.options.service, key=given.options.key, **fields)
    except KeyboardInterrupt:
        server.close()
        raise
    finally:
        screen.clear()
        server.on_progress = screen.progress


def send_array(given: Given, files: dict[str, Any], fields: dict[str, Any]) -> list[Job]:
    """Send one job for each number, several at once. If the user interrupts, say which jobs were sent."""
    from concurrent.futures import ThreadPoolExecutor

    options, screen, jobs = given.options, given.screen, []
    name = options.name or os.path.basename(os.path.abspath((options.paths or options.script)[0]))

    def send(index: int) -> Job:
        own = {**files, "run.sh": with_index(files["run.sh"], index)}
        key = f"{options.key}-{index}" if options.key else None
        return given.jobs.submit(own, options.service, key=key, **{**fields, "name": f"{name[:180]}[{index}]"})

    pool, sending = ThreadPoolExecutor(8), list[Any]()
    try:
        sending += (pool.submit(send, index) for index in options.array)
        for number, future in enumerate(sending, 1):
            jobs.append(future.result())
            screen.live(f"sent {number} of {len(sending)} jobs")
    except BaseException as error:
        is_known = finish_calls(given, pool)
        jobs = [future.result() for future in sending if future.done() and not future.cancelled() and future.exception() is None]
        how = f"{len(jobs)} of {len(options.array)} jobs are queued"
        how += f": `joborch cancel {ids_text(jobs)}` stops them" if jobs else ""
        screen.hint = how + ("" if is_known else "; `joborch list` shows whether the last ones are, too")
        if jobs and not isinstance(error, KeyboardInterrupt):
            screen.note(f"joborch: {screen.hint}")
        raise
    finally:
        screen.clear()
        pool.shutdown()
    return jobs


def finish_calls(given: Given, pool: Any) -> bool:
    """Cancel the calls of a pool that have not begun, and wait for the others. Ctrl-C breaks them off; then return False."""
    screen, asked = (
        given.screen,
        threading.Timer(SAY_AFTER_S, lambda: screen.note("joborch: it finishes what has begun; Ctrl-C breaks that off")),
    )
    asked.daemon = True
    asked.start()
    try:
        pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        given.jobs.server.abort()
        pool.shutdown(cancel_futures=True)
        return False
    finally:
        asked.cancel()
    return True


def ids_text(jobs: Sequence[Job]) -> str:
    """Return the ids of jobs as for a command, as in `41 50-60`."""
    runs: list[list[int]] = []
    for number in sorted(job.id for job in jobs):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


def watch(given: Given, jobs: Sequence[Job], tell: bool) -> None:
    """Wait for all of these jobs; print each end if `tell`. On a terminal one line shows the progress."""
    patient(given)
    left, screen, wait_s = {job.id: job for job in jobs}, given.screen, 0.0
    while left:
        for job in given.jobs.take_ended(left, wait_s):
            if tell:
                told(screen, job)
        if left:
            screen.live(standing(jobs, left))
        wait_s = REFRESH_S if screen.is_live else WAIT_S
    screen.clear()


def told(screen: Screen, job: Job) -> None:
    """Print the end of one job."""
    if screen.is_terminal:
        name = f" ({printable(job.facts['name'])})" if job.facts["name"] else ""
        screen.say(f"job {job.id}{name} {screen.paint(job.status, COLOURS[job.status])}" + (f": {job.reason}" if job.reason else ""))
    else:
        screen.say(f"{job.id}\t{job.status}\t{printable(job.reason)}")
        sys.stdout.flush()


def standing(jobs: Sequence[Job], left: dict[int, Job]) -> str:
    """Return the states of jobs in one line."""
    if len(jobs) == 1:
        facts = jobs[0].facts
        started = seconds_at(facts["started_at"])
        since = f" for {span_text(time.time() - started)}" if started is not None and facts["status"] == "Running" else ""
        return f"job {facts['id']} {facts['status']}{since} {story(facts)}"
    counts = Counter(job.status for job in jobs)
    return f"{len(jobs) - len(left)} of {len(jobs)} have ended: " + ", ".join(f"{count} {status}" for status, count in counts.most_common())


def command_wait(given: Given) -> int:
    """Wait for jobs."""
    given.screen.hint = f"the jobs continue; `{given.options.typed}` waits again"
    jobs = named_jobs(given, given.options.jobs)
    watch(given, jobs, tell=not given.options.json)
    if given.options.json:
        print(json.dumps([job.facts for job in jobs]))
    return failed(jobs)


def command_list(given: Given) -> int:
    """List jobs."""
    options = given.options
    since = max([*([options.since] if options.since is not None else []), *([midnight()] if options.today else [])], default=None)
    limit = None if options.limit == 0 else options.limit or (None if since is not None else 50)
    filters = {
        "status": options.by_status,
        "service": options.service,
        "name": options.name,
        "since": None if since is None else utc_text(since),
    }
    found = list(given.jobs.list(limit=limit, all_users=options.all, **filters))
    print_jobs(given, found)
    if not found and given.screen.is_terminal and not options.json:
        given.screen.note(
            "no jobs" + (" that fit" if any(filters.values()) else f" of user {given.jobs.user}; --all shows those of all users")
        )
    return DONE


def midnight() -> float:
    """Return the wall time at which today began."""
    return time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))


def utc_text(wall_s: float) -> str:
    """Return a wall time as GET /jobs takes it, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, wall_s)))


def command_logs(given: Given) -> int:
    """Print what a job wrote; with --follow until it has ended."""
    job, options = one_job(given), given.options
    stream = "stderr" if options.stderr else "stdout"

    def write(text: bytes) -> None:
        if options.json:
            print(json.dumps({"id": job.id, "stream": stream, "text": text.decode("utf-8", "replace")}), flush=True)
        else:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    if not options.follow:
        for part in [b"".join(job.output(stream))] if options.json else job.output(stream):
            write(part)
        return DONE
    patient(given)
    given.screen.hint = f"the job continues; `{options.typed}` follows it again"
    for text in job.follow(stream):
        write(text.encode("utf-8", "replace"))
    if job.status != "Completed":
        given.screen.note(f"joborch: job {job.id} is {job.status}: {printable(job.reason)}")
    return failed([job])


def command_cancel(given: Given) -> int:
    """Stop jobs."""
    jobs = chosen_jobs(given, LIVE)
    live = [job for job in jobs if not job.ended]
    if len(live) > ASK_ABOVE:
        given.screen.confirm(f"Stop {count_text(len(live), 'job')} ({ids_text(live)})?", given.options.yes)
    for_all(given, live, lambda job: job.cancel(), "stopped")
    if not given.options.json:
        for job in jobs:
            said = job.reason if job.ended else str(job.facts.get("message") or "it is stopped as soon as its client answers")
            told_state(given.screen, job, said)
    else:
        print(json.dumps([job.facts for job in jobs]))
    return DONE


def command_retry(given: Given) -> int:
    """Queue jobs again, as new ones; print the new ids."""
    options, screen = given.options, given.screen
    options.by_status = ["Failed", "Invalid"] if options.failed else None
    jobs = chosen_jobs(given, ENDED)
    if len(jobs) > ASK_ABOVE:
        screen.confirm(f"Run {count_text(len(jobs), 'job')} again ({ids_text(jobs)})?", options.yes)
    given.jobs.server.patience_s = PATIENCE_S
    made = for_all(given, jobs, lambda job: job.retry(), "queued again")
    if options.json:
        print(json.dumps([job.facts for job in made]))
    for old, new in [] if options.json else zip(jobs, made):
        screen.say(f"job {old.id} is queued again as job {new.id}" if screen.is_terminal else str(new.id))
    return DONE


def command_redeliver(given: Given) -> int:
    """Let the server send the webhooks of jobs again, and print how they stand."""
    jobs = for_all(given, named_jobs(given, given.options.jobs), lambda job: job.redeliver(), "sent again")
    if given.options.json:
        print(json.dumps([job.facts for job in jobs]))
    for job in [] if given.options.json else jobs:
        for each in job.facts["webhooks"]:
            given.screen.say(f"job {job.id}: the webhook for {each['status']} is {each['state']}")
    return DONE


def told_state(screen: Screen, job: Job, said: str) -> None:
    """Print the present state of a job."""
    if screen.is_terminal:
        screen.say(f"job {job.id} {screen.paint(job.status, COLOURS.get(job.status, 0))}" + (f": {printable(said)}" if said else ""))
    else:
        screen.say(f"{job.id}\t{job.status}\t{printable(said)}")


def for_all(given: Given, jobs: Sequence[Job], work: Callable[[Job], Any], what: str) -> list[Any]:
    """Call `work` for several jobs at once; return the results. After Ctrl-C, finish the calls that have started."""
    from concurrent.futures import ThreadPoolExecutor

    pool, futures, found = ThreadPoolExecutor(8), list[Any](), []
    try:
        futures += (pool.submit(work, job) for job in jobs)
        for number, future in enumerate(futures, 1):
            given.screen.hint = f"{number - 1} of {len(jobs)} were {what}; the same command does the rest"
            found.append(future.result())
            if len(jobs) > 1:
                given.screen.live(f"{what} {number} of {len(jobs)}")
    except BaseException:
        finish_calls(given, pool)
        raise
    finally:
        given.screen.clear()
        pool.shutdown()
    return found


# == 5. Results ==  get and why: a job's result, and what happened to it.


def command_get(given: Given) -> int:
    """Fetch results, or single files of one."""
    options, screen = given.options, given.screen
    count = next((at for at, word in enumerate(options.words) if not re.fullmatch(r"[0-9]+(-[0-9]+)?", word)), len(options.words))
    words, paths = options.words[:count], options.words[count:]
    jobs = named_jobs(given, words)
    if not jobs:
        raise JobsError("name the job first, as in joborch get 42 summary.txt")
    if (paths or options.list) and len(jobs) > 1:
        raise JobsError("give one job with --list or with files of it, as in joborch get 42 summary.txt")
    screen.hint = f"`{options.typed}` resumes"
    if not options.partial:
        watch(given, jobs, tell=False)
    given.jobs.server.patience_s = PATIENCE_S
    if options.list:
        return list_files(given, jobs[0])
    if paths:
        return save_files(given, jobs[0], paths)
    return fetch_all(given, jobs, options.output)


def fetch_all(given: Given, jobs: Sequence[Job], output: str | None) -> int:
    """Fetch the results of jobs: of one to `output`, of several into it. Return 1 if one has none."""
    options, screen, places = given.options, given.screen, []
    as_zip, partial = getattr(options, "zip", False), getattr(options, "partial", False)
    for job in jobs:
        name = f"job-{job.id}.zip" if as_zip else f"job-{job.id}"
        target = (output or name) if len(jobs) == 1 else os.path.join(output or ".", name)
        if len(jobs) == 1 and as_zip and output and os.path.isdir(output):
            target = os.path.join(output, name)
        if job.status != "Completed" and not partial:
            screen.note(f"joborch: {JobFailed(job)}; see joborch why {job.id}")
            continue
        if len(jobs) > 1 and os.path.exists(target):
            places.append({"id": job.id, "path": target})  # it appeared in one step
            if screen.is_terminal and not options.json:
                screen.say(f"job {job.id}: {target} (it is there already)")
            continue
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        screen.began_at = time.monotonic()
        place = job.result(target, partial) if as_zip else job.unpack(target, partial)
        screen.clear()
        places.append({"id": job.id, "path": str(place)})
        if not options.json:
            screen.say(f"job {job.id}: {place}" if screen.is_terminal else str(place))
    if options.json and "script" not in options:
        print(json.dumps(places))
    return DONE if partial else failed(jobs)


def list_files(given: Given, job: Job) -> int:
    """List the files of a result with their sizes."""
    found = job.files(given.options.partial)
    if given.options.json:
        print(json.dumps(found))
        return DONE
    for entry in found:
        on_terminal = f"{size_text(entry['size']):>12}  {printable(entry['path'])}"
        given.screen.say(on_terminal if given.screen.is_terminal else f"{entry['size']}\t{printable(entry['path'])}")
    return DONE


def save_files(given: Given, job: Job, paths: Sequence[str]) -> int:
    """Save files of a result, each when it is complete; with `-o -` print them."""
    options, saved = given.options, []
    same = [name for name, count in Counter(map(os.path.basename, dict.fromkeys(paths))).items() if count > 1]
    if same and options.output != "-":
        raise JobsError(f"several of these files would be {printable(same[0])} here: fetch them one by one, each with -o")
    if options.output == "-" and given.screen.is_terminal:
        given.screen.is_live = False  # no progress between the lines of the file
    for path in paths:
        if options.output == "-":
            with missing_named(given, job, path):
                job.copy(path, sys.stdout.buffer, options.partial)
            continue
        base = os.path.basename(path)
        into = options.output is not None and (len(paths) > 1 or options.output.endswith("/") or os.path.isdir(options.output))
        target = os.path.join(options.output, base) if into else options.output or base
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        given.screen.began_at = time.monotonic()
        with missing_named(given, job, path):
            job.save(path, target, options.partial)
        given.screen.clear()
        saved.append({"id": job.id, "path": target})
        if not options.json:
            given.screen.say(target)
    if options.json and options.output != "-":
        print(json.dumps(saved))
    return DONE


@contextlib.contextmanager
def missing_named(given: Given, job: Job, path: str) -> Iterator[None]:
    """If the job has no such file, raise JobsError with the nearest path."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None:
            raise  # a folder of this machine
        close = nearest(path, {entry["path"] for entry in job.files(given.options.partial)})
        raise JobsError(f"job {job.id} has no file {printable(path)!r}{close}: see joborch get {job.id} --list") from None


ADVICE = {
    "user": ("the script or its input", "correct it and submit it again; `joborch get {id} --partial` fetches its files"),
    "limit": ("a limit was reached", "request more (--timeout, --memory, --cpus) or make the job smaller"),
    "infrastructure": (
        "a machine, not your script",
        "`joborch retry {id}` runs it again; if that fails, too, tell the operator of the server",
    ),
    "cancelled": ("it was stopped on request", "nothing, if that was intended"),
}


def command_why(given: Given) -> int:
    """Explain a job to a person."""
    job, screen = one_job(given), given.screen
    facts = job.refresh().facts
    if given.options.json:
        print(json.dumps(facts))
        return DONE
    name = f" ({printable(facts['name'])})" if facts["name"] else ""
    status = facts.get("ended_as") or facts["status"]
    where = f" on {facts['client']}" if facts["client"] else ""
    screen.say(
        f"job {job.id}{name} of service {facts['service']}: {screen.paint(status, COLOURS.get(status, 0))}{where}{times_text(facts)}"
    )
    facts_of = [("why", facts["reason"] if job.ended else ""), ("waits for", facts.get("waiting_for")), ("cause", cause_text(facts))]
    for what, said in facts_of:
        if said:
            screen.say(f"  {what + ':':<11}{printable(str(said))}")
    if len(facts.get("attempts") or []) > 1:
        for attempt in facts["attempts"][:-1]:
            screen.say(f"  attempt {attempt['attempt']}: {printable(attempt['reason'] or 'it was lost')}")
    tail = last_lines(job)
    if tail:
        screen.say("  last lines of its output:")
        for line in tail:
            screen.say(f"    | {printable(line)}")
    for text in advice(facts):
        screen.say(f"  {'to do:':<11}{text}")
    return DONE


def times_text(facts: dict[str, Any]) -> str:
    """Return how long a job ran or runs, and when it ended."""
    started, ended = seconds_at(facts["started_at"]), seconds_at(facts["ended_at"])
    ran = f", ran {span_text((ended or time.time()) - started)}" if started is not None else ""
    return ran + (f", ended {span_text(time.time() - ended)} ago" if ended is not None else "")


def cause_text(facts: dict[str, Any]) -> str:
    """Return a job's cause in words."""
    return f"{facts['cause']} ({ADVICE[facts['cause']][0]})" if facts["cause"] in ADVICE else ""


def advice(facts: dict[str, Any]) -> Iterator[str]:
    """Yield what a person can do now."""
    number, status = facts["id"], facts["status"]
    if status == "Cleaned":
        yield "its files are deleted: submit it again if you need them"
    elif facts["cause"] in ADVICE:
        yield ADVICE[facts["cause"]][1].format(id=number)
    elif status == "Completed":
        yield f"`joborch get {number}` fetches its result"
    elif status == "Running":
        yield f"`joborch logs {number} --follow` shows its output"
    elif status == "Unknown":
        yield "nothing: the server keeps trying"
    else:
        yield f"`joborch wait {number}` waits for it, `joborch quota` shows what you use"


def last_lines(job: Job) -> list[str]:
    """Return the last lines of standard error, or else of standard output; none if the output is not available."""
    if job.status == "Cleaned" or (job.status == "Completed"):
        return []
    for stream in ("stderr", "stdout"):
        tail = b""
        try:
            for part in job.output(stream):
                tail = (tail + part)[-65536:]
        except Refused:
            return []
        if tail.strip():
            return tail.decode("utf-8", "replace").rstrip("\n").split("\n")[-TAIL_LINES:]
    return []


# == 6. Use ==  quota: a user's use and limits.


def command_quota(given: Given) -> int:
    """Show the user's use and limits."""
    server, screen = given.jobs.server, given.screen
    user, services = server.ask("GET", f"/users/{given.jobs.user}"), server.ask("GET", "/services")["services"]
    used = {service["name"]: service for service in user["services"]}
    rows = []
    for service in services:
        own = used.get(service["name"], {"running": 0, "used_slot_s": 0.0, "runs": 0, "turns_before": None})
        rows.append({
            "service": service["name"], "running": own["running"], "runs_per_user": service["runs_per_user"],
            "left": max(0, min(service["runs_per_user"] - own["running"], service["max_runs"] - service["running"])),
            "running_of_all": service["running"], "max_runs": service["max_runs"], "runs": own["runs"],
            "used_slot_s": own["used_slot_s"], "turns_before": own["turns_before"],
        })  # fmt: skip
    if given.options.json:
        print(json.dumps({"user_id": user["user_id"], "weight": user["weight"], "queued": user["queued"], "services": rows}))
        return DONE
    if screen.is_terminal:
        screen.say(f"user {user['user_id']}: {count_text(user['queued'], 'job')} queued")
    screen.table(
        ("SERVICE", "YOU RUN", "ALL RUN", "FREE FOR YOU", "SO FAR", "YOUR TURN"),
        [
            (
                row["service"], f"{row['running']} of {row['runs_per_user']}",
                f"{row['running_of_all']} of {row['max_runs']}", str(row["left"]),
                f"{count_text(row['runs'], 'run')}, {span_text(row['used_slot_s'])}", turn_text(row["turns_before"]),
            )
            for row in rows
        ],
    )  # fmt: skip
    return DONE


def turn_text(turns_before: int | None) -> str:
    """Return when a user's turn is."""
    if turns_before is None:
        return "no job of yours waits"
    return "next" if turns_before == 0 else f"after {count_text(turns_before, 'other user')}"


def command_in(module: str, name: str) -> Callable[[Given], int]:
    """Return a command of another plug-in, which is imported when the command runs."""
    return lambda given: int(getattr(importlib.import_module(f"joborch_plugins.{module}"), name)(given))


# == 7. Login ==  The server and token that commands and scripts of this user take from then on.


def command_login(given: Given) -> int:
    """Check that a server answers this user, and store it with its token."""
    options, token, path = given.options, token_of_environment(), login_file()
    try:
        stored_login("")
    except JobsError:
        forget_login()  # it is of no use, and another one takes its place
    jobs = given.jobs_at(options.url, token)
    try:
        jobs.server.ask("GET", "/services")
    except Refused as error:
        if error.status not in (401, 403) or token:
            raise
        token = ask_token(options.url)
        jobs = given.jobs_at(options.url, token)
        jobs.server.ask("GET", "/services")
    url = f"unix:{jobs.server.path}" if not hasattr(jobs.server, "host") else options.url.rstrip("/")
    user = None if jobs.user == os.getuid() else jobs.user
    if not path:
        raise JobsError("there is no home folder to store it in: set JOBORCH_SERVER and JOBORCH_TOKEN_FILE instead")
    write_private(path, json.dumps({"server": url, "token": token, "user": user}) + "\n")
    if token and url.startswith("http:") and jobs.server.host not in ("127.0.0.1", "::1", "localhost"):
        given.screen.note(f"joborch: {url} is not encrypted, so others on the way can read the token: use https:// if the server has it")
    if options.json:
        print(json.dumps({"server": url, "user_id": jobs.user, "path": path}))
    else:
        given.screen.say(f"commands and scripts now call {url} as user {jobs.user} ({path})")
    return DONE


def ask_token(url: str) -> str:
    """Return the token that the user types, or pipes in. Raises JobsError for none."""
    if sys.stdin.isatty():
        import getpass

        token = getpass.getpass(f"token for {printable(url)}: ")
    else:
        token = sys.stdin.readline()
    if not token.strip():
        raise JobsError(f"the server wants a token: pipe it in, as in joborch login {printable(url)} <token-file")
    return token.strip()


def write_private(path: str, text: str) -> None:
    """Replace a file that only this user can read, in one step."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    partial = f"{path}.{os.urandom(8).hex()}"
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def command_logout(given: Given) -> int:
    """Delete what login stored."""
    path, stored = login_file(), forget_login()
    if given.options.json:
        print(json.dumps({"path": path, "deleted": stored}))
    else:
        given.screen.say(f"{path} is deleted" if stored else "no login was stored")
    return DONE


def forget_login() -> bool:
    """Delete the file of login; return whether there was one."""
    try:
        os.unlink(login_file())
    except FileNotFoundError:
        return False
    return True


# == 8. Start ==  Parses and runs a command line. Errors are one line.

COMMANDS: dict[str, Callable[[Given], int]] = {
    "submit": command_submit, "list": command_list, "wait": command_wait, "logs": command_logs, "get": command_get, "why": command_why,
    "cancel": command_cancel, "retry": command_retry, "redeliver": command_redeliver,
    "quota": command_quota, "login": command_login, "logout": command_logout,
    "top": command_in("top", "run_top"), "completion": command_in("completion", "run_completion"),
    **{name: command_in("operator_commands", f"command_{name.replace('-', '_')}")
       for name in ("token", "pause", "clouds", "delete", "delete-user", "export")},
    "resume": command_in("operator_commands", "command_pause"),
}  # fmt: skip


def flag(*names: str, **how: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return a flag or word as argparse declares it."""
    return names, how


SWITCH = {"action": "store_true"}
SOME_JOBS = flag("jobs", nargs="+", metavar="ID", help="ids of jobs, or ranges such as 5-9")
ONE_JOB = flag("jobs", nargs=1, metavar="ID", help="id of a job")
FLAGS = {
    "submit": [
        flag("paths", nargs="*", metavar="PATH", help="files or folders; without a run.sh, the first is the script; after --, a command"),
        flag("--wait", **SWITCH, help="wait for the end; exit status 1 if the job failed"),
        flag("--get", metavar="DIR", help="wait, and unpack the result as DIR"),
        flag("--pass-status", **SWITCH, help="wait, and exit with the script's own status"),
        flag("--name", help="a name of your choice"),
        flag("--timeout", help="run time limit, as in 90m"),
        flag("--cpus", help="cores that the script needs"),
        flag("--memory", help="memory that it needs, as in 8G"),
        flag("--gpus", help="GPUs that it needs"),
        flag("--priority", help="-100 to 100: of your own jobs, the highest priority runs first"),
        flag("--after", metavar="IDS", help="jobs that must be Completed first, as in 41,42"),
        flag("--from", dest="inputs_from", metavar="IDS", help="jobs to wait for, whose results are then in from/ID, as in 41,42"),
        flag("--crlf", choices=("fix", "keep"), help="change or keep Windows line ends in run.sh; otherwise they are refused"),
        flag("--retries", help="further attempts after an infrastructure failure"),
        flag("--callback-url", metavar="URL", help="where the server POSTs the job when it ends"),
        flag(
            "--array",
            type=read_indexes,
            metavar="1-20",
            help="one job for each number, as in 1-20, 1-20:5 or 1,3; it is in JOBORCH_ARRAY_INDEX",
        ),
        flag("--key", help="a text of your choice: the same key always gives the same job"),
        flag("-s", "--service", help="the service that runs it (default: the only one there is)"),
    ],
    "list": [
        flag("-s", "--service", help="jobs of this service"),
        flag("--name", metavar="PREFIX", help="jobs whose name begins with PREFIX"),
        flag("--today", **SWITCH, help="jobs of today"),
        flag("--since", type=read_since, metavar="TIME", help="jobs since then: 2d, or a date such as 2026-11-28"),
        flag("--status", dest="by_status", type=read_status, help="jobs in these states, separated by commas"),
        flag("-n", "--limit", type=read_limit, default=None, help="the most jobs to list; 0: all (default: 50, or all with --since)"),
        flag("--all", **SWITCH, help="jobs of all users"),
    ],
    "wait": [SOME_JOBS],
    "logs": [
        ONE_JOB,
        flag("-f", "--follow", **SWITCH, help="until the job has ended"),
        flag("--stderr", **SWITCH, help="standard error instead of standard output"),
    ],
    "get": [
        flag("words", nargs="+", metavar="ID", help="ids of jobs; or the id of one, and files of its result"),
        flag("-o", "--output", metavar="PLACE", help="folder for the result (default: job-ID); for one file its name, or - to print it"),
        flag("--zip", **SWITCH, help="keep the ZIP"),
        flag("--partial", **SWITCH, help="the files that there are now, also of a job that is running or failed"),
        flag("--list", **SWITCH, help="list the files with their sizes instead"),
    ],
    "why": [ONE_JOB],
    "cancel": [
        flag("jobs", nargs="*", metavar="ID", help="ids of jobs, or ranges such as 5-9"),
        flag("--name", metavar="PREFIX", help="your jobs whose name begins with PREFIX"),
        flag("--status", dest="by_status", type=read_status, help="your jobs in these states, separated by commas"),
        flag("-y", "--yes", **SWITCH, help=f"do not ask before stopping more than {ASK_ABOVE}"),
    ],
    "retry": [
        flag("jobs", nargs="*", metavar="ID", help="ids of jobs, or ranges such as 5-9"),
        flag("--failed", **SWITCH, help="your jobs that are Failed or Invalid"),
        flag("--name", metavar="PREFIX", help="your jobs that have ended and whose name begins with PREFIX"),
        flag("-y", "--yes", **SWITCH, help=f"do not ask before running more than {ASK_ABOVE} again"),
    ],
    "redeliver": [SOME_JOBS],
    "delete": [SOME_JOBS, flag("-y", "--yes", **SWITCH, help="do not ask")],
    "delete-user": [
        flag("number", type=int, metavar="USER", help="the number of the user"),
        flag("-y", "--yes", **SWITCH, help="do not ask"),
    ],
    "export": [
        flag("--csv", dest="kind", action="store_const", const="csv", help="a line for each job (default)"),
        flag("--swf", dest="kind", action="store_const", const="swf", help="jobs that have ended, in the Standard Workload Format 2.2"),
        flag("--summary", dest="kind", action="store_const", const="summary", help="jobs, use and waits by service and month"),
        flag("--since", metavar="DATE", help="jobs uploaded since then: 2d, or a date such as 2026-11-28 (UTC)"),
        flag("--until", metavar="DATE", help="jobs uploaded before then"),
        flag("-s", "--service", help="jobs of this service"),
    ],
    "quota": [],
    "top": [flag("--all", **SWITCH, help="jobs of all users")],
    "login": [flag("url", metavar="URL", help="the server, as in https://jobs.example.org; unix:PATH for a socket")],
    "logout": [],
    "token": [
        flag("action", choices=["add", "list", "revoke"], metavar="ACTION", help="add, list or revoke"),
        flag("name", nargs="?", metavar="NAME", help="the name of the token: a-z, 0-9, - and _"),
        flag("--role", help="add: user, portal, reader, operator or client"),
        flag("--services", "--service", metavar="S,..", help="add, portal or client: only these services, separated by commas"),
        flag("--user", type=int, metavar="N", help="add, role user: the user whose jobs it is for"),
        flag("--days", type=int, metavar="N", help="add: how long it is valid (default: until it is revoked)"),
    ],
    "pause": [
        flag("service", metavar="SERVICE", help="the name of a service"),
        flag("--reason", default="", metavar="TEXT", help="why; it is shown to whoever waits"),
    ],
    "resume": [flag("service", metavar="SERVICE", help="the name of a service")],
    "clouds": [
        flag("--plan", **SWITCH, help="say what would be made and ended next, and why"),
        flag("--end-all", **SWITCH, help="end all instances now, and make none until --resume"),
        flag("--resume", **SWITCH, help="make instances again"),
        flag("--user", type=int, metavar="N", help="show what jobs of this user have cost (default: of those that have cost most)"),
        flag("-y", "--yes", **SWITCH, help="do not ask before --end-all"),
    ],
    "completion": [flag("shell", nargs="?", choices=["bash", "zsh", "fish"], metavar="SHELL", help="bash, zsh or fish")],
}
SERVER_FLAG = flag(
    "--server", metavar="URL", help="the server (default: JOBORCH_SERVER, that of login, else http://127.0.0.1:5000), or unix:PATH"
)
ALL_TAKE = [
    flag("--user", type=int, metavar="N", help="the user of the jobs (default: JOBORCH_USER, that of login, else your user id)"),
    flag("--json", **SWITCH, help="print JSON"),
]


def flags_of(name: str) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Return all flags and words of a command."""
    own, server = FLAGS[name], [] if name in ("login", "logout", "completion") else [SERVER_FLAG]
    return [*own, *server, *(each for each in ALL_TAKE if each[0] not in [names for names, _ in own])]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line of one of COMMANDS. Exits with one line on stderr if it is wrong."""
    name = ALIASES.get(argv[0], argv[0])
    words, script = list(argv[1:]), []
    if name in ("submit", "completion") and "--" in words:
        at = words.index("--")
        words, script = words[:at], words[at + 1 :]
    what = WORDS[name]
    raw = argparse.RawDescriptionHelpFormatter
    text = what.help[0].upper() + what.help[1:] + "."
    parser = Parser(f"joborch {name}", description=text, formatter_class=raw, epilog=f"example:\n{what.examples}", allow_abbrev=False)
    for names, how in flags_of(name):
        parser.add_argument(*names, **how)
    options, rest = parser.parse_known_intermixed_args(words)
    if rest:
        parser.unknown(rest[0], parser._option_string_actions)
    options.command, options.typed = name, printable(shlex.join(["joborch", *argv]))
    if name in ("submit", "completion"):
        options.script = script
    return options


def main(argv: Sequence[str]) -> int:
    """Run a command line that `takes` accepts; return the exit status."""
    screen = Screen()
    try:
        try:
            return run(argv, screen)
        finally:
            sys.stdout.flush()  # here, where an error is still caught
    except BrokenPipeError:  # as in `joborch list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        if screen.is_live and not screen.shown:
            print(file=sys.stderr)  # after the ^C that the terminal shows
        screen.note(f"joborch: interrupted{': ' + screen.hint if screen.hint else ''}")
        return INTERRUPTED
    except (JobsError, OSError) as error:
        screen.note(f"joborch: {printable(error_text(error))}")
        return status_of(error)


def run(argv: Sequence[str], screen: Screen) -> int:
    """Run a command, or print the help; return the exit status."""
    if not argv or argv[0] in HELP:
        make_parser()[0].print_help()
        return DONE if argv else USAGE
    if word_after_flag(argv):
        flag = printable(argv[0].partition("=")[0])[:80]
        raise JobsError(f"{flag} comes after the command, as in joborch {word_after_flag(argv)} {flag}")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parse(argv)
    return COMMANDS[options.command](Given(options, screen))


def error_text(error: Exception) -> str:
    """Return the message of an error."""
    if isinstance(error, Refused) and error.status in (401, 403):
        return f"{error} (`joborch login URL` stores a token; JOBORCH_TOKEN and JOBORCH_TOKEN_FILE override it)"
    if isinstance(error, Refused) and error.field == "crlf":
        return str(error).replace("have it done by the field crlf=fix, as in -F crlf=fix", "add --crlf fix")
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error)


def status_of(error: Exception) -> int:
    """Return the exit status for an error."""
    if isinstance(error, ServerUnreachable) or (isinstance(error, Refused) and error.status >= 500):
        return NO_SERVER
    return FAILED if isinstance(error, (JobFailed, Damaged)) else USAGE
