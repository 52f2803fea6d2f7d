"""Commands for the operators of a site: backup, restore, config, doctor and demo."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import platform
import resource
import secrets
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from joborch import (
    CLOCK_TOLERANCE_S,
    CONNECT_TIMEOUT_S,
    DEFAULT_HOSTS,
    EXIT_DONE,
    EXIT_FAILED,
    GIB,
    HELLO_TIMEOUT_S,
    KIB,
    LOCK_HELD,
    MIB,
    OVER,
    Address,
    BadAnswer,
    Clock,
    Config,
    ConfigError,
    DataFolder,
    Finding,
    Gone,
    JoborchError,
    Link,
    NoAnswer,
    NothingSent,
    Service,
    Status,
    Store,
    __version__,
    client_token_file,
    config_rows,
    copy_to,
    crash_point,
    decided_restore,
    discard,
    finish_restore,
    first_file_limit,
    folder_of,
    forgotten_executor,
    format_duration,
    free_bytes,
    fsync_path,
    is_own_user,
    left_out,
    load_plugin,
    lock_trouble,
    make_executor,
    on_network,
    one_line,
    open_listeners,
    own_file,
    parse_json,
    peer_uid,
    plural,
    read_answer,
    read_small_file,
    read_some,
    size_text,
    socket_path,
    statements,
    time_stamp,
    token_names,
    token_place,
    token_remedy,
    weak_setups,
)

# == Backups ==  A database can be copied while in use. A copy is checked before it is used, and a restore assigns no id twice.


def copy_database(source: str, target: Path) -> None:
    """Copy a database, which may be in use, as of one moment to a new file; check the copy and make it durable.

    Raises ConfigError if there is no database, JoborchError if it cannot be read or is damaged.
    """
    if not os.path.isfile(source):
        raise ConfigError(f"there is no database {source!r}: give the file, or set DB_PATH")
    try:
        with contextlib.closing(opened_to_read(source)) as old:
            damage = copy_to(old, target)
    except sqlite3.Error as error:
        held = ": a running server has locked it, so stop the server first" if "locked" in str(error) else ""
        raise JoborchError(f"{source!r} cannot be read ({error}){held}") from error
    if damage:
        raise JoborchError(f"{source!r} is damaged: {one_line(damage, 120)}")


def opened_to_read(path: str) -> sqlite3.Connection:
    """Return a connection to a database that changes nothing. Raises sqlite3.Error."""
    return sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True, timeout=10)


def opened_as_it_is(path: str) -> sqlite3.Connection:
    """Return a connection to a database that no process writes to. Raises sqlite3.Error.

    Without a log of writes it is opened as immutable: SQLite would make an empty log, even to read. That would take the place of
    the true one when an interrupted restore is completed.
    """
    if os.path.exists(f"{path}-wal"):
        return opened_to_read(path)
    return sqlite3.connect(f"file:{quote(os.path.abspath(path))}?immutable=1", uri=True)


class Later(NamedTuple):
    """A job that was uploaded or has moved since a backup; `before` is its status in the backup, or None."""

    id: int
    user_id: int
    service: str
    before: str | None
    now: str

    def text(self) -> str:
        """Return it as a line."""
        then = "not in the backup" if self.before is None else f"{self.before} in the backup"
        return f"job {self.id} (service={self.service} user={self.user_id}): {self.now}, {then}"


def later_than(backup: str, db_path: str) -> list[Later]:
    """Return the jobs that a restore would lose or set back. Raises JoborchError if one of the databases cannot be read."""
    found = list[Later]()
    try:
        with contextlib.ExitStack() as stack:
            places = (backup, str(decided_restore(db_path) or db_path))
            then, now = (stack.enter_context(contextlib.closing(opened_as_it_is(each))) for each in places)
            for job_id, uuid, user_id, service, status, moves in now.execute(statements.JOBS_COMPARED):
                row = then.execute(statements.JOB_COMPARED, {"id": job_id}).fetchone()
                if row is None or row[0] != uuid:
                    found.append(Later(job_id, user_id, service, None, status))
                elif row[2] != moves:
                    found.append(Later(job_id, user_id, service, row[1], status))
    except sqlite3.Error as error:
        raise JoborchError(f"{backup} cannot be compared with {db_path} ({error})") from error
    return found


def print_later(later: Sequence[Later]) -> None:
    """Print what came after a backup, a line for each job."""
    lost = [job for job in later if job.before is None]
    moved = [job for job in later if job.before is not None]
    for what, jobs in (
        ("uploaded after the backup, so they must be sent again", lost),
        ("moved since the backup, so they continue from their status there, and may run again", moved),
    ):
        print(f"{what}: {plural(len(jobs), 'job', 'jobs') or 'none'}")
        for job in jobs:
            print(f"  {job.text()}")


def back_up(db_path: str, target: Path) -> None:
    """Copy a server's database to `target`. An older file there is replaced when the copy is complete."""
    if decided_restore(db_path):
        raise JoborchError(f"a restore of {db_path!r} was interrupted: start the server, which completes it, or restore again")
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    copy_database(db_path, fresh)
    os.replace(fresh, target)
    fsync_path(target.parent)


def restore(db_path: str, data: DataFolder, backup: str) -> tuple[Path | None, Path | None]:
    """Replace a server's database by a backup. `data` must be open, so that no server runs.

    Nothing is deleted. Return the path of the old database, and of the files whose jobs are not in the backup (or None).
    After a crash, either nothing has changed, or the next start or restore completes the work.
    """
    finish_restore(db_path, data)
    fresh = Path(f"{db_path}.restoring")
    copy_database(backup, fresh)
    store = Store(str(fresh), "server", is_copy=True)
    store.renew(db_path)
    store.close()
    fsync_path(fresh)
    crash_point("restore.copied")
    os.rename(fresh, f"{db_path}.restored-{time_stamp()}-{secrets.token_hex(2)}")  # the point of no return
    fsync_path(folder_of(db_path))
    crash_point("restore.decided")
    return finish_restore(db_path, data)


# == Doctor ==  Finds problems before the first job does: one line each, with the remedy.


def examine(config: Config) -> Iterator[Finding]:
    """Yield findings on this machine and these settings of a server or client; nothing is changed."""
    yield Finding(True, f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, joborch {__version__}")
    yield from (Finding(None, warning) for warning in config.warnings)
    yield from weak_setups(config)
    yield from examine_environment(config)
    if config.mode == "client":
        yield from examine_limits(config)
    yield from examine_folder(config)
    yield examine_port(config)
    if config.mode == "client":
        yield from examine_token(config)
        yield from (Finding(None, text) for text in forgotten_executor(config))
        with tempfile.TemporaryDirectory(prefix="joborch-doctor-") as folder:  # the real one may be in use
            data = DataFolder(folder)
            try:
                data.open()
                yield from make_executor(data, config).examine()
            except ConfigError as error:
                yield Finding(False, str(error))
    met: dict[str, dict[str, str]] = {}
    for service in config.services.values():
        for address in service.addresses:
            yield from examine_client(address, service, config.ca_file, met)
    yield from map(examine_names, filter(lambda starts: len(starts) > 1, met.values()))


def examine_names(starts: Mapping[str, str]) -> Finding:
    """Return the finding about a client that answers at several URLs; `starts` has the start of its process by URL."""
    names = " and ".join([", ".join([*starts][:-1]), [*starts][-1]])
    if len(set(starts.values())) > 1:
        return Finding(False, f"{names} run on copies of one data folder: stop all but one, and start them with an empty DATA_PATH")
    return Finding(None, f"{names} are one client: its slots are counted once; use the same URL in all services")


def examine_environment(config: Config) -> Iterator[Finding]:
    """Yield the risks of the environment, and the variables that scripts do not get."""
    for name in token_names(config):
        if config.sources.get(name) == "environment":
            why = "a script of the same user could read it while joborch starts"
            yield Finding(None, f"{name} is in the environment: {why}; keep it in a file, and set {name}_FILE")
    names = left_out(os.environ, config.pass_env)
    if config.mode == "client" and names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        text = f"scripts do not get {plural(len(names), 'variable', 'variables')} of this environment ({shown})"
        yield Finding(True, f"{text}: JOBORCH_PASS_ENV=NAME,PREFIX_* passes on those that they need")


SHELL_LIMITS = (  # of a login node: ulimit's flag, the meaning, how to print it, and a value that is enough
    (resource.RLIMIT_CPU, "-St", "CPU time", lambda value: format_duration(float(value)), resource.RLIM_INFINITY),
    (resource.RLIMIT_AS, "-Sv", "memory", size_text, resource.RLIM_INFINITY),
    (resource.RLIMIT_DATA, "-Sd", "memory", size_text, resource.RLIM_INFINITY),
    (resource.RLIMIT_FSIZE, "-Sf", "the size of a file", size_text, resource.RLIM_INFINITY),
    (resource.RLIMIT_NOFILE, "-Sn", "open files", str, 1024),
)


def examine_limits(config: Config) -> Iterator[Finding]:
    """Yield the limits of this shell that could kill a client or its scripts."""
    found = False
    for limit, flag, what, text, enough in SHELL_LIMITS:
        soft = first_file_limit()[0] if limit == resource.RLIMIT_NOFILE else resource.getrlimit(limit)[0]
        if soft == resource.RLIM_INFINITY or 0 <= enough <= soft:
            continue
        found = True
        whom = "the client and each script are killed or fail" if config.executor == "local" else "the client is killed or fails"
        if config.executor == "slurm" and any(map(load_plugin("joborch_plugins.slurm:propagates"), config.batch.values())):
            whom += ", and so may jobs that inherit the limit because of SLURM_ARGS"
        most = "unlimited" if enough == resource.RLIM_INFINITY else str(enough)
        remedy = f"run ulimit {flag} {most} before the start, or ask the site where services may run"
        yield Finding(None, f"this shell limits {what} to {text(soft)} (ulimit {flag}): {whom} beyond it; {remedy}")
    if not found:
        yield Finding(True, "this shell does not limit CPU time, memory or files (ulimit -S)")


def examine_folder(config: Config) -> Iterator[Finding]:
    """Yield findings on the data folder: access, locks, free space, clock, and whether it is shared."""
    place = Path(config.data_path)
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as probe:
            ahead_s = os.fstat(probe.fileno()).st_mtime - time.time()
            locks = trouble_with_lock(probe.fileno())
    except OSError as error:
        yield Finding(False, f"{place} is not writable ({os.strerror(error.errno or 0)}): set DATA_PATH to a writable folder")
        return
    if locks:
        yield Finding(False, f"DATA_PATH {str(place)!r}: {locks}")
    free, needed = free_bytes(place), config.min_free_bytes
    remedy = "" if free > needed else f": uploads are refused below JOBORCH_MIN_FREE={needed // MIB}M; free space, or set DATA_PATH"
    yield Finding(free > needed, f"{config.data_path} is writable and has {free / GIB:.1f} GiB of free space{remedy}")
    if abs(ahead_s) > CLOCK_TOLERANCE_S:
        how = f"{format_duration(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'}"
        yield Finding(None, f"the clock of that file system is {how} this machine's: displayed times may be wrong")
    shared = on_network(str(place))
    if config.mode == "client" and config.executor == "slurm" and not shared:
        yield Finding(None, f"{config.data_path} is on a local disk: set DATA_PATH to a folder that the compute nodes see, too")
    elif shared:
        yield Finding(None, f"{config.data_path} is on a network file system: do not run joborch on this folder on another machine")


def trouble_with_lock(descriptor: int) -> str:
    """Return why an unused file cannot be locked, with the remedy; empty if it can."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return lock_trouble(error)
    return ""


def examine_port(config: Config) -> Finding:
    """Return whether the port is free on every address, or which joborch of this user listens there."""
    try:
        for listener in open_listeners(config.host, config.port):
            listener.close()
        return Finding(True, f"port {config.port} is free")
    except ConfigError as error:
        problem = str(error)
    said = own_health(config)
    another = not said or said.get("mode", config.mode) != config.mode  # without a token, /health does not say the mode
    if another or not is_in_use(Path(config.data_path)):
        who = f"a joborch {said['mode']} with another data folder listens there" if said.get("mode") else ""
        return Finding(False, f"port {config.port} cannot be used: {who}; set PORT, or stop it" if who else problem)
    problems = [f"{found['what']}: {found['remedy']}" for found in said.get("problems", [])]
    trouble = "; ".join(problems) or said.get("message")
    return Finding(not trouble, f"a {config.mode} runs on port {config.port}" + (f", and says: {trouble}" if trouble else ""))


def own_connection(config: Config) -> socket.socket | None:
    """Return a connection to the process on our port, if its user is ours or root; else None.

    A server is called over its Unix socket if it has one, else over TCP.
    """
    places: list[tuple[socket.AddressFamily, Any]] = []
    path = socket_path(config.socket_file, config.port) if config.mode == "server" else None
    if path is not None:
        places.append((socket.AF_UNIX, str(path)))
    for host in config.host.split(","):
        address = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host.strip(), host.strip())
        places.append((socket.AF_INET6 if ":" in address else socket.AF_INET, (address, config.port)))
    for family, place in places:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        with contextlib.suppress(OSError):
            connection.connect(place)
            deadline = time.monotonic() + CONNECT_TIMEOUT_S
            while peer_uid(connection) is None and time.monotonic() < deadline:
                time.sleep(0.01)  # the other end has no owner until it is accepted
            if is_own_user(peer_uid(connection)):
                return connection
        connection.close()
    return None


def own_health(config: Config) -> dict[str, Any]:
    """Return the /health of a running server or client of this user; empty if none runs."""
    return own_answer(config, "GET", "/health") or {}


def own_answer(config: Config, method: str, path: str, fields: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any] | None:
    """Call a running server or client of this user, with a form of `fields`. Return its answer, or None if none runs.

    The token is sent to no other user.
    """
    import http.client

    connection = own_connection(config)
    if connection is None:
        return None
    token = config.token.split(",")[0]
    token_file = client_token_file() if config.mode == "client" and not token else None
    caller = http.client.HTTPConnection("127.0.0.1", config.port)
    caller.sock = connection
    with contextlib.closing(caller), contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        if token_file is not None and token_file.exists():
            token = read_small_file(token_file).strip()
        boundary = secrets.token_hex(16)
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()]
        body = "".join([*parts, f"--{boundary}--\r\n"]).encode() if parts else None
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"} if parts else {}
        caller.request(method, path, body, {**headers, **({"Authorization": f"Bearer {token}"} if token else {})})
        said = parse_json(caller.getresponse().read(MIB))
        return said if isinstance(said, dict) else {}
    return {}


def examine_token(config: Config) -> Iterator[Finding]:
    """Yield a finding if a client cannot read its token, or cannot create one at its first start."""
    if config.token or config.allow_anonymous:
        return
    path = token_place(config)
    if path is None:
        yield Finding(False, f"there is no home folder to store a token in: {token_remedy(config)}")
        return
    place = path
    while not place.exists():
        place = place.parent
    if not os.access(place, os.R_OK if place == path else os.W_OK | os.X_OK):
        what = "read" if place == path else f"created ({place} is not writable)"
        yield Finding(False, f"the token file {path} cannot be {what}: {token_remedy(config)}")


def is_in_use(folder: Path) -> bool:
    """Tell whether a joborch is using this data folder."""
    try:
        with open(folder / DataFolder.LOCK, "r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in LOCK_HELD and os.access(folder / DataFolder.LOCK, os.R_OK | os.W_OK)
    return False


def examine_client(address: Address, service: Service, ca_file: str, met: dict[str, dict[str, str]]) -> Iterator[Finding]:
    """Yield findings on a client of a service: its answer, proof, problems and clock. Add its instance to `met`."""
    link = Link(address, DataFolder(tempfile.gettempdir()), Clock(), ca_file)
    link.services.append(service)
    link.data.tmp = Path(tempfile.gettempdir())  # for large answers
    name = f"service {service.name}: {address.name}"
    try:
        if link.protocol.has_events:
            heard = link.events(0, ())
            met.setdefault(heard.instance, {})[address.name] = heard.start
            said = said_of_health(link)
        else:
            link.protocol.probe()
            yield Finding(None, f"{name} answers and is treated as a 2.2 client, which cannot prove its identity")
            return
    except Gone:
        yield Finding(None, f"{name} answers and is a 2.2 client, which cannot prove its identity")
        return
    except (NothingSent, NoAnswer) as error:
        text = str(error).replace("<NAME>", service.name.upper())
        hint = "" if "set SERVICE_" in text or link.outdated else "; is the client running, and the URL correct?"
        yield Finding(False, f"{name} refuses this server: {text}" if link.ours else f"{name}: {text}{hint}")
        return
    trouble = f", and says: {one_line(str(said['problem']))}" if said.get("problem") else ""
    kind = f" ({one_line(str(said['executor']), 40)})" if said.get("executor") else ""
    yield Finding(not trouble, f"{name} answers{kind}{trouble}")
    if abs(said["ahead_s"]) > CLOCK_TOLERANCE_S:
        off = f"differs by {format_duration(abs(said['ahead_s']))} from this machine's"
        yield Finding(None, f"{address.name}: its clock {off}: displayed times may be wrong; use NTP on both")


def said_of_health(link: Link) -> dict[str, Any]:
    """Return the /health of a client, which must prove its identity, and `ahead_s`: by how much its clock is ahead."""
    answer = link.call("GET", f"{link.address.base_url}/health", read_timeout_s=HELLO_TIMEOUT_S)
    text = read_some(answer, 64 * KIB)
    try:
        said = read_answer(text)
        return {**said, "ahead_s": parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()}
    except (ValueError, TypeError, KeyError) as error:
        raise BadAnswer("sends an invalid answer to /health: is it a joborch client?") from error


# == Demo ==  Runs the example from upload to result in seconds, on any machine, with two real processes.


def free_port() -> int:
    """Return a TCP port that is free now on 127.0.0.1 and ::1."""
    listeners = open_listeners(DEFAULT_HOSTS, 0)
    port = int(listeners[0].getsockname()[1])
    for listener in listeners:
        listener.close()
    return port


def example_file(name: str) -> bytes:
    """Return a file of the example, from joborch.pyz or next to the program."""
    try:
        return own_file(f"joborch_example/{name}")  # as pip installs it
    except OSError:
        return own_file(f"example/{name}")


class Demo:
    """A server and a client as two real processes in a temporary folder, which run the example."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_urlsafe(16)
        self.ports = {"server": free_port(), "client": free_port()}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.base = f"http://127.0.0.1:{self.ports['server']}"

    def start(self, mode: str) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JOBORCH_", "SERVICE_", "CLOUD_")) and name not in ("PORT", "DB_PATH", "DATA_PATH", "MAX_AGE")
        }
        ours = {"PORT": str(self.ports[mode]), "DATA_PATH": str(self.folder / mode), "JOBORCH_MIN_FREE": "0", **self.settings(mode)}
        with open(self.folder / f"{mode}.log", "ab") as log_file:
            program = [sys.executable, os.path.abspath(sys.argv[0]), mode]
            self.processes.append(
                subprocess.Popen(
                    program, env={**kept, **ours}, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
                )
            )

    def run(self) -> None:
        """Start both, and run the example. Raises JoborchError if it was not completed."""
        print("joborch demo: a server, a client, and a protein structure to work on")
        for mode in ("client", "server"):
            self.start(mode)
        for mode in ("client", "server"):
            self.wait_ready(mode)
            say(f"{mode} answers at http://127.0.0.1:{self.ports[mode]}")
        job = self.run_example()
        if job["status"] != Status.COMPLETED.value:
            raise JoborchError(f"the demo's job is {job['status']}: {job['message']}")
        print(f"result: {self.summary(job)}")

    def next(self) -> str:
        """Return what to do after the demo."""
        program = shlex.quote(sys.argv[0])
        return f"next: run `python3 {program} client` and `python3 {program} server` in two terminals"

    def settings(self, mode: str) -> dict[str, str]:
        """Return the settings of a process, besides those of every demo."""
        if mode == "client":
            return {"JOBORCH_TOKEN": self.token}
        return {"SERVICE_EXAMPLE_TOKEN": self.token, "SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{self.ports['client']}"}

    def wait_ready(self, mode: str) -> None:
        """Wait until a process answers. Raises JoborchError, with the end of its log, if it does not."""
        import requests

        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{self.ports[mode]}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.05)
        tail = (self.folder / f"{mode}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
        raise JoborchError(f"the demo's {mode} did not start; its log ends with:\n{tail}")

    def run_example(self) -> dict[str, Any]:
        """Send the example, wait for its end, and return the job."""
        import requests

        files = [("file", (name, example_file(name))) for name in ("run.sh", "2oob.pdb")]
        answer = requests.post(f"{self.base}/upload", files=files, data={"user_id": "1", "service": "example"}, timeout=30)
        job: dict[str, Any] = answer.json()
        if answer.status_code != 201:
            raise JoborchError(f"the demo's upload failed with status {answer.status_code}: {job.get('message')}")
        say(f"uploaded run.sh and 2oob.pdb: job {job['id']} is {job['status']}")
        deadline = time.monotonic() + 60
        while job["status"] not in {status.value for status in OVER} and time.monotonic() < deadline:
            query = {"wait": "10", "since": job["status"]}
            job = requests.get(f"{self.base}/jobs/{job['id']}", params=query, timeout=30).json()
            say(f"job {job['id']} is {job['status']}" + (f": {job['message']}" if job["message"] else ""))
        return job

    def summary(self, job: Mapping[str, Any]) -> str:
        """Download the result and return its one-line summary."""
        import requests

        content = requests.get(f"{self.base}/download/{job['id']}", timeout=30).content
        with zipfile.ZipFile(io.BytesIO(content)) as result:
            say(f"downloaded the result: {len(content)} bytes, {len(result.namelist())} files")
            return result.read("summary.txt").decode().strip()

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(10)


CLOUD_SIGNS = {"intended": "..", "booting": "~~", "draining": "--", "ending": "--"}  # of an instance that takes no jobs


class CloudDemo(Demo):
    """A server without clients, and a stand-in for a cloud that starts them as processes on this machine."""

    jobs, job_s, limit_s = 16, 4, 180.0
    cloud: Mapping[str, str] = MappingProxyType({"MAX": "4", "SLOTS": "2", "IDLE": "5", "HOURLY_COST": "0.1", "BOOT_LIMIT": "2m"})

    def run(self) -> None:
        """Start the server, send jobs, and show how the pool grows and shrinks. Raises JoborchError if it does not."""
        print("joborch demo: a server without clients, and a stand-in for a cloud: its instances are processes on this machine")
        self.start("server")
        self.wait_ready("server")
        say(f"the server's page: {self.base}/dashboard")
        self.send_jobs()
        say(f"uploaded {self.jobs} jobs of {self.job_s} s. Instances: [..] asked for, [~~] boots, [##] runs two jobs, [--] ends")
        self.watch()

    def next(self) -> str:
        """Return what to do after the demo."""
        return "next: docs/clouds.md says how to use a real cloud"

    def settings(self, mode: str) -> dict[str, str]:
        """Return the settings of the server or client of the demo."""
        limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "50", "SERVICE_EXAMPLE_CLIENTS": ""}
        own = {
            "JOBORCH_PUBLIC_URL": self.base,
            "JOBORCH_SCALE_INTERVAL": "1",
            "CLOUD_DEMO_PROVIDER": "joborch_plugins.cloud_demo:LocalCloud",
        }
        return {**limits, **own, **{f"CLOUD_DEMO_{name}": value for name, value in self.cloud.items()}}

    def script(self) -> str:
        """Return what each job runs."""
        return f"sleep {self.job_s}\n"

    def send_jobs(self) -> None:
        """Send jobs that only sleep."""
        import requests

        script = self.script().encode()
        for number in range(self.jobs):
            data = {"user_id": str(number % 4), "service": "example"}
            answer = requests.post(f"{self.base}/upload", files=[("file", ("run.sh", script))], data=data, timeout=30)
            if answer.status_code != 201:
                raise JoborchError(f"the demo's upload failed with status {answer.status_code}: {answer.json().get('message')}")

    def look(self) -> tuple[str, bool]:
        """Return what there is in one line, and whether everything is over."""
        import requests

        (service,) = requests.get(f"{self.base}/services", timeout=30).json()["services"]
        (cloud,) = requests.get(f"{self.base}/clouds", timeout=30).json()["clouds"]
        drawn = []
        for each in cloud["instances"]:
            busy = min(each["jobs"], cloud["slots"])
            drawn.append(f"[{CLOUD_SIGNS.get(each['state']) or '#' * busy + ' ' * (cloud['slots'] - busy)}]")
        queued, running = service["queued"], service["running"]
        text = f"{queued:>3} wait  {running:>3} run  {' '.join(drawn) or 'no instance':<23}  cost {cloud['spent']:.4f}"
        return text, not (queued or running or drawn)

    def watch(self) -> None:
        """Print what there is whenever it has changed, until all jobs and instances are gone. Raises JoborchError after `limit_s`."""
        started, shown, over = time.monotonic(), "", False
        while not over:
            text, over = self.look()
            passed_s = time.monotonic() - started
            if text.rpartition("cost")[0] != shown.rpartition("cost")[0]:
                say(f"{passed_s:4.0f} s  {text}")
                shown = text
            if passed_s > self.limit_s:
                log_tail = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")[-1500:]
                raise JoborchError(f"the demo is not over after {format_duration(passed_s)}; the server's log ends with:\n{log_tail}")
            time.sleep(0.2)


def say(text: str) -> None:
    """Print one step of the demo."""
    print(f"  {text}", flush=True)


# == Commands ==  Each prints what it did and returns the exit status.


def command_config(config: Config, as_json: bool) -> int:
    """Print the effective settings."""
    rows = config_rows(config)
    if as_json:
        print(json.dumps({name: {"value": value, "source": source} for name, value, source in rows}, indent=2))
    else:
        width = max(len(name) for name, _, _ in rows)
        print("\n".join(f"{name:<{width}}  {value or '-'}  ({source})" for name, value, source in rows))
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_DONE


def command_doctor(config: Config, as_json: bool) -> int:
    """Print the findings. The exit status is 1 if something does not work."""
    found = []
    for finding in examine(config):
        found.append(finding)
        if not as_json:
            print(f"{ {True: 'ok', None: 'note', False: 'PROBLEM'}[finding.good]:<8}{one_line(finding.text, 500)}", flush=True)
    good = all(finding.good is not False for finding in found)
    if as_json:
        print(json.dumps({"good": good, "findings": [finding._asdict() for finding in found]}, indent=2))
    return EXIT_DONE if good else EXIT_FAILED


def command_backup(config: Config, file: str, keep: int | None = None) -> int:
    """Copy the database to a file. If `keep` is given, `file` is a folder: it gets a new copy, and keeps the newest `keep`."""
    if keep is not None:
        if keep < 1:
            raise ConfigError(f"--keep is {keep}: give a whole number from 1, as in --keep 14")
        if not os.path.isdir(file):
            raise ConfigError(f"{file} is not a folder: with --keep, give the folder for the backups")
        file = os.path.join(file, time.strftime("joborch-%Y%m%dT%H%M%SZ.db", time.gmtime()))
    try:
        back_up(config.db_path, Path(file))
        for old in sorted(Path(file).parent.glob("joborch-????????T??????Z.db"))[: -keep if keep else 0]:
            discard(old)
    except OSError as error:
        raise JoborchError(f"{file} cannot be written: {os.strerror(error.errno or 0).lower()}") from error
    print(f"copied {config.db_path} to {file} ({os.path.getsize(file)} bytes), without the files of jobs in {config.data_path}")
    return EXIT_DONE


def command_restore(config: Config, file: str, is_dry_run: bool = False) -> int:
    """Replace the database by a backup, or only say what that would change."""
    if is_dry_run:
        print_later(later_than(file, config.db_path))
        return EXIT_DONE
    data = DataFolder(config.data_path)
    data.open()
    data.lock_database(config.db_path)
    later, unknown = list[Later](), ""
    try:
        later = later_than(file, config.db_path) if os.path.exists(config.db_path) else []
    except JoborchError as error:  # a damaged database is a reason to restore
        unknown = f"what came after the backup is not known: {error}"
    try:
        kept, unclaimed = restore(config.db_path, data, file)
    except OSError as error:
        raise JoborchError(f"{config.db_path} cannot be written: {os.strerror(error.errno or 0).lower()}") from error
    print(f"restored {config.db_path} from {file}")
    if unknown:
        print(unknown)
    else:
        print_later(later)
    if kept:
        print(f"the replaced database is {kept}")
    if unclaimed:
        print(f"files of jobs that are not in the backup are in {unclaimed}: remove them when nobody needs them")
    return EXIT_DONE


def command_demo(keep: bool, cloud: bool = False) -> int:
    """Run the demo, or that of clouds. The exit status is 0 if everything went as it should."""
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="joborch-demo-"))
    demo, finished = (CloudDemo if cloud else Demo)(folder), False
    try:
        demo.run()
        print(f"done in {format_duration(time.monotonic() - started)}")
        finished = True
    finally:
        if not (keep and finished):
            demo.stop()
            shutil.rmtree(folder, ignore_errors=True)
    if keep:
        pids = [str(process.pid) for process in demo.processes]
        who = "both keep" if len(pids) > 1 else "the server keeps"
        print(f"{who} running: {demo.base}/swagger-ui/ (files in {folder}); stop with: kill {' '.join(pids)}")
    else:
        print(demo.next())
    return EXIT_DONE
