"""Every setting is declared once, with its reader; `load_config` makes a configuration of flags, files and the environment.

1. Values
2. Settings
3. Configuration
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import itertools
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

from joborch_base.vocabulary import (
    DEFAULT_HOSTS,
    GIB,
    KIB,
    MIB,
    ConfigError,
    Network,
    T,
    file_trouble,
    load_plugin,
    nearest,
    one_line,
    read_small_file,
)

# == 1. Values ==  Readers of what people write in settings and requests: each returns the value, or raises ValueError with the remedy.


def read_text(text: str) -> str:
    """Accept any text."""
    return text


def read_line(text: str) -> str:
    """Accept any single line of text."""
    if not text.isprintable():
        raise ValueError("give one line of printable characters")
    return text


def fitting(pattern: str, remedy: str) -> Callable[[str], str]:
    """Return a reader that accepts texts that match `pattern` as a whole."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(remedy)
        return text

    return read


read_token = fitting(r"(?=.*[^,])[!-~]{1,4096}", "give printable ASCII without blanks")  # a bearer token, or several separated by commas
read_word = fitting(r"(?!-)[!-~]{1,500}", "give one word, as in short")  # a partition, an account, a constraint
read_provider = fitting(r"[a-z0-9_]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*", "give a name, as in openstack or ec2")
read_mode = fitting(r"0?[0-7]{3}", "give a mode in octal, as in 0600 or 0660")  # the mode of a file


def read_whole(text: str, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return a whole number from `least` to `most`."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise ValueError(f"give a whole number from {least} to {most}")
    return int(text)


def read_port(text: str) -> int:
    """Return a TCP port; 0 means a free one."""
    return read_whole(text, 0, 65535)


def read_positive(text: str) -> int:
    """Return a whole number from 1."""
    return read_whole(text, 1)


def read_seconds(text: str) -> float:
    """Return seconds: a plain number, or one with s, m, h or d."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhd]?)", text)
    if not match:
        raise ValueError("give seconds, or a number with s, m, h or d, as in 90 or 24h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def read_period(text: str) -> float:
    """Return a period or a time limit in seconds."""
    if read_seconds(text) < 0.01:
        raise ValueError("give at least 0.01 seconds")
    return read_seconds(text)


def read_bytes(text: str) -> int:
    """Return bytes: a plain number, or one with K, M or G (powers of 1,024)."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGkmg]?)(?:i?[Bb])?", text)
    if not match:
        raise ValueError("give bytes, or a number with K, M or G, as in 512M")
    return int(match[1]) * {"": 1, "K": KIB, "M": MIB, "G": GIB}[match[2].upper()]


def read_run_time(text: str) -> float:
    """Return a run time limit of a job, in seconds."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?[smhd]?", text) or not 0 < read_seconds(text) < 1e9:
        raise ValueError("give seconds above 0, or a number with s, m, h or d, as in 3600, 90m or 2d")
    return read_seconds(text)


def read_mib(text: str) -> int:
    """Return memory in MiB, rounded up: a plain number (MiB), or one with K, M or G."""
    if not re.fullmatch(r"[0-9]{1,10}([KMGkmg]i?[Bb]?)?", text):
        raise ValueError("give MiB, or a number with M or G, as in 8192 or 8G")
    mib = -(-read_bytes(text + "M" if text.isdecimal() else text) // MIB)
    if not 1 <= mib <= 2**31:
        raise ValueError(f"give at least 1 and at most {2**31} MiB")
    return mib


def read_weight(text: str) -> float:
    """Return a weight: how large a user's share is. The default is 1."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text) or not 0.001 <= float(text) <= 1_000_000:
        raise ValueError("give a number from 0.001 to 1000000, as in 2 or 0.5")
    return float(text)


def read_amount(text: str) -> float:
    """Return an amount of money, in whatever currency the site counts."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError("give a number, as in 0.12")
    return float(text)


def read_weights(text: str) -> dict[int, float]:
    """Return weights by user: pairs separated by commas, as in 7=2,8=0.5."""
    weights = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        user, equals, weight = pair.partition("=")
        if not equals or not re.fullmatch(r"-?[0-9]{1,18}", user.strip()):
            raise ValueError("give USER=WEIGHT, separated by commas, as in 7=2,8=0.5")
        weights[int(user)] = read_weight(weight.strip())
    return weights


def read_url(text: str) -> str:
    """Accept an http or https URL with a host."""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and re.fullmatch(r"[!-~]+", text)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("give a URL, as in https://dirac.example.org")
    return text


def read_urls(text: str) -> str:
    """Accept URLs, separated by commas; blanks around them are dropped."""
    try:
        return ",".join(read_url(each.strip()) for each in text.split(",") if each.strip())
    except ValueError as error:
        raise ValueError("give the URL of each server, separated by commas, as in https://server:5000") from error


def read_networks(text: str) -> tuple[Network, ...]:
    """Return IP addresses and networks, separated by commas; IPv4 addresses in IPv6 form (::ffff:) become IPv4."""
    networks: list[Network] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        try:
            network = ipaddress.ip_network(part)
        except ValueError as error:
            raise ValueError(f"{error}: give addresses and networks separated by commas, as in 192.0.2.7,10.0.0.0/8") from None
        mapped = getattr(network.network_address, "ipv4_mapped", None)
        if mapped is not None and network.prefixlen >= 96:
            network = ipaddress.ip_network((mapped, network.prefixlen - 96))
        networks.append(network)
    if not networks:
        raise ValueError("give at least one address or network")
    return tuple(networks)


MOST_UIDS = 4096  # each is looked up at the start


def read_names(text: str) -> tuple[str, ...]:
    """Return names of variables, separated by commas, as in PGHOST,MYLAB_*; `*` matches any characters."""
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not all(re.fullmatch(r"[!-<>-~]+", name) for name in names):
        raise ValueError("give names of variables separated by commas, as in PGHOST,MYLAB_*")
    return names


def read_paths(text: str) -> tuple[str, ...]:
    """Return absolute paths, separated by commas; a slash at the end is dropped."""
    paths = tuple(part.strip().rstrip("/") or "/" for part in text.split(",") if part.strip())
    if not all(path.startswith("/") and path.isprintable() for path in paths):
        raise ValueError("give absolute paths separated by commas, as in /data/blast,/cvmfs")
    return paths


def read_uids(text: str) -> range:
    """Return a range of user ids, as in 20001-20064."""
    found = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", text)
    uids = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not uids or uids[0] < 1 or uids[-1] >= 2**32 - 1 or len(uids) > MOST_UIDS:
        raise ValueError(f"give the first and the last of at most {MOST_UIDS:,} user ids, as in 20001-20064")
    return uids


def read_gpus(text: str) -> tuple[str, ...]:
    """Return ids of GPUs, as in 0,1; `none` is an empty list."""
    ids = tuple(part.strip() for part in text.split(",")) if text.lower() != "none" else ()
    if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9/_-]{0,99}", each) for each in ids) or len(set(ids)) < len(ids):
        raise ValueError("give different ids of GPUs separated by commas, as in 0,1, or none")
    return ids


def read_switch(text: str) -> bool:
    """Return whether a switch is on: 1 or 0."""
    if text not in ("0", "1"):
        raise ValueError("give 1 or 0")
    return text == "1"


def one_of(*words: str) -> Callable[[str], str]:
    """Return a reader that accepts one of `words`, in any case."""

    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("give one of " + ", ".join(words))
        return text.lower()

    return read


def read_executor(text: str) -> str:
    """Return the name of an executor: a built-in one, in any case, or `package.module:Class` for a third-party one."""
    if text.lower() in ("local", "slurm", "dirac"):
        return text.lower()
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", text):
        raise ValueError("give one of local, slurm, dirac, or package.module:Class")
    return text


def read_by_plugin(reference: str) -> Callable[[str], Any]:
    """Return a reader that a plug-in defines as `package.module:name`; it is imported when there is a value to read."""

    def read(text: str) -> Any:
        return load_plugin(reference)(text)

    return read


# == 2. Settings ==  Each setting is declared once, as a field of one of three classes. Flags, environment, help and messages follow.


@dataclass(frozen=True)
class Setting:
    """One setting: its environment name, the field that it fills, how it is read, and what it means."""

    name: str
    field: str
    read: Callable[[str], Any]
    default: str  # as a person writes it; "" means none
    help: str
    modes: str  # "server", "client" or both
    plugin: str = ""  # the plug-in that uses it; "" means the program itself
    secret: bool = False

    @property
    def flag(self) -> str:
        """The command-line flag: JOBORCH_SEND_INTERVAL is --send-interval, PORT is --port."""
        return "--" + self.name.replace("JOBORCH_", "").lower().replace("_", "-")


BOTH = "server client"


def setting(
    name: str, modes: str, read: Callable[[str], T], default: str, meaning: str, *, plugin: str = "", secret: bool = False, unset: Any = ""
) -> T:
    """Declare a field of a dataclass as a setting; `unset` is its value if it is not given and has no default."""
    row = Setting(name, "", read, default, meaning, modes, plugin, secret)
    return field(default_factory=lambda: read(default) if default else unset, metadata={"setting": row})


def settings_of(owner: type) -> tuple[Setting, ...]:
    """Return the settings that are declared as fields of a dataclass."""
    declared = ((item.name, item.metadata.get("setting")) for item in dataclasses.fields(owner))
    return tuple(dataclasses.replace(row, field=name) for name, row in declared if row)


@dataclass(frozen=True)
class Address:
    """The three URLs of a client, and their common base if they have one; only then can it have /events and /health."""

    upload_url: str
    download_url: str
    terminate_url: str
    base_url: str

    @property
    def name(self) -> str:
        """What people call it: host and port, and the path of its base if there is one."""
        parts = urlsplit(self.base_url or self.upload_url)
        return parts.netloc + (parts.path if parts.path != "/" else "").rstrip("/")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The effective settings of one process, and where each came from. Declared as: name, modes, reader, default, help."""

    mode: str
    port: int = setting("PORT", BOTH, read_port, "", "port to listen on; 0 picks a free one (default: server 5000, client 9000)", unset=-1)
    host: str = setting("JOBORCH_HOST", BOTH, read_text, DEFAULT_HOSTS, "addresses to listen on, separated by commas")
    data_path: str = setting("DATA_PATH", BOTH, read_text, "", "folder for files (default: the user's data folder)")
    db_path: str = setting("DB_PATH", BOTH, read_text, "",
        "database file (default: joborch.db in DATA_PATH); :memory: for a client that forgets")
    max_age_s: float = setting("MAX_AGE", BOTH, read_seconds, "172800",
        "seconds (or 90m, 48h, 2d) that files are kept after a job's end; a client keeps unfetched results four times as long")
    token: str = setting("JOBORCH_TOKEN", BOTH, read_token, "",
        "bearer token(s) that callers must send, separated by commas; visible in ps (client: created at first start)", secret=True)
    token_file: str = setting("JOBORCH_TOKEN_FILE", BOTH, read_text, "", "file with the token; a client creates it if it is missing")
    allow_anonymous: bool = setting("JOBORCH_ALLOW_ANONYMOUS", BOTH, read_switch, "0",
        "1: callers from JOBORCH_ALLOW_FROM need no token; a client that has no token then serves the same user")
    allow_from: tuple[Network, ...] = setting("JOBORCH_ALLOW_FROM", BOTH, read_networks, "",
        "addresses and networks that JOBORCH_ALLOW_ANONYMOUS=1 admits, separated by commas, as in 192.0.2.7,10.0.0.0/8", unset=())
    hosts: str = setting("JOBORCH_HOSTS", BOTH, read_text, "", "further host names of this server, separated by commas")
    socket_file: str = setting("JOBORCH_SOCKET", "server", read_text, "",
        "Unix socket for users of this machine; 0: none (default: joborch-PORT.sock in XDG_RUNTIME_DIR, else in /tmp/joborch-UID)")
    socket_mode: str = setting("JOBORCH_SOCKET_MODE", "server", read_mode, "0600", "mode of the Unix socket: whoever may open it may call")
    slots: int = setting("JOBORCH_SLOTS", "client", read_positive, "",
        "local: cores that payloads may use at once (default: all); batch system: jobs that it gets at once (default: 100)", unset=0)
    memory_bytes: int = setting("JOBORCH_MEMORY", "client", read_bytes, "",
        "memory that payloads may request together (default: the machine's memory)", unset=0)
    gpus: tuple[str, ...] | None = setting("JOBORCH_GPUS", "client", read_gpus, "",
        "local: ids of the GPUs that payloads may request, as in 0,1; none: none (default: those that nvidia-smi -L lists)", unset=None)
    executor: str = setting("JOBORCH_EXECUTOR", "client", read_executor, "local",
        "what runs the payloads: local, slurm, dirac, or package.module:Class for another executor")
    isolation: str = setting("JOBORCH_ISOLATION", "client", one_of("none", "process", "full", "user"), "none",
        "process: all processes of a script end with it, and it sees no others; full: it sees no files of others, either; "
        "user: also, each script runs as a user of its own (needs root)", plugin="sandbox")
    uids: range = setting("JOBORCH_UIDS", "client", read_uids, "",
        "isolation user: user ids for scripts, at least one for each slot, that nobody else has, as in 20001-20064", plugin="sandbox",
        unset=range(0))
    network: str = setting("JOBORCH_NETWORK", "client", one_of("none", "host"), "none",
        "isolation full and user: host gives scripts the network of this machine", plugin="sandbox")
    bind: tuple[str, ...] = setting("JOBORCH_BIND", "client", read_paths, "",
        "isolation full and user: further paths that scripts may read, separated by commas, as in /data/blast,/cvmfs", plugin="sandbox",
        unset=())
    bind_rw: tuple[str, ...] = setting("JOBORCH_BIND_RW", "client", read_paths, "",
        "isolation full and user: paths that scripts may also write to, separated by commas", plugin="sandbox", unset=())
    max_processes: int = setting("JOBORCH_MAX_PROCESSES", "client", read_whole, "0",
        "local: processes and threads that a script may run at once, looked at once a second (0: no limit)")
    max_work_bytes: int = setting("JOBORCH_MAX_WORK", "client", read_bytes, "0",
        "local: how much a script's work folder and TMPDIR together, and each file that it writes, may take, looked at once a second "
        "(0: no limit)")
    max_cpu_time_s: float = setting("JOBORCH_MAX_CPU_TIME", "client", read_seconds, "0",
        "local: CPU time that all processes of a script may use together, looked at once a second (0: no limit)")
    pins_cpus: bool = setting("JOBORCH_PIN_CPUS", "client", read_switch, "0",
        "local: 1: a script runs only on as many cores as its job has `cpus`, and has them to itself if there are enough")
    pass_env: tuple[str, ...] = setting("JOBORCH_PASS_ENV", "client", read_names, "",
        "further variables that scripts get from the client's environment: names separated by commas, * for any characters", unset=())
    batch_interval_s: float = setting("JOBORCH_BATCH_INTERVAL", "client", read_period, "4",
        "seconds between two queries of a batch system (one query for all jobs)")
    vanish_grace_s: float = setting("JOBORCH_VANISH_GRACE", "client", read_seconds, "120",
        "seconds to wait for the exit file of a batch job that ended or is no longer known")
    dirac_url: str = setting("JOBORCH_DIRAC_URL", "client", read_url, "",
        "URL of DiracX, as in https://dirac.example.org", plugin="dirac")
    dirac_credentials: str = setting("JOBORCH_DIRAC_CREDENTIALS", "client", read_text, "~/.cache/diracx/credentials.json",
        "the file that `dirac login` writes", plugin="dirac")
    dirac_quiet_s: float = setting("JOBORCH_DIRAC_QUIET", "client", read_seconds, "45m",
        "how long the pilot of a killed job may be silent before it counts as gone (pilots call every 30 minutes)", plugin="dirac")
    kill_grace_s: float = setting("JOBORCH_KILL_GRACE", "client", read_seconds, "10", "seconds from TERM to KILL")
    log_limit_bytes: int = setting("JOBORCH_LOG_LIMIT", BOTH, read_bytes, "64M",
        "how much of each output stream is kept: half of it from the start, half from the end")
    run_interval_s: float = setting("JOBORCH_RUN_INTERVAL", "client", read_period, "0.5",
        "longest sleep of the runner, in seconds")
    send_interval_s: float = setting("JOBORCH_SEND_INTERVAL", "server", read_period, "0.5",
        "longest sleep of the sender, in seconds")
    get_interval_s: float = setting("JOBORCH_GET_INTERVAL", "server", read_period, "0.5",
        "longest sleep of the getter, in seconds")
    share_half_life_s: float = setting("JOBORCH_SHARE_HALF_LIFE", "server", read_period, "6h",
        "policy share: the time after which a past use counts half")
    ageing_s: float = setting("JOBORCH_AGEING", "server", read_period, "60", "policy priority: seconds of waiting that count as one point")
    weights: Mapping[int, float] = setting("JOBORCH_WEIGHTS", "server", read_weights, "",
        "policy share: USER=WEIGHT, separated by commas, as in 7=2,8=0.5", unset={})
    max_queued_per_user: int = setting("JOBORCH_MAX_QUEUED_PER_USER", "server", read_positive, "10000",
        "jobs of one user that may be queued at once")
    max_stored_bytes: int = setting("JOBORCH_MAX_STORED_PER_USER", "server", read_bytes, "",
        "largest size of the files and results of one user; beyond it uploads are refused with 507 (default: no limit)", unset=0)
    uploads_per_minute: int = setting("JOBORCH_UPLOADS_PER_MINUTE", "server", read_positive, "",
        "uploads of one user in a minute; more are refused with 429 (default: no limit)", unset=0)
    audit_file: str = setting("JOBORCH_AUDIT_LOG", "server", read_text, "",
        "file that gets a JSON line for each call that changes something; 0: none (default: audit.jsonl in DATA_PATH)")
    clean_interval_s: float = setting("JOBORCH_CLEAN_INTERVAL", BOTH, read_period, "60", "seconds between two runs of the cleaner")
    keep_fetched_s: float = setting("JOBORCH_KEEP_FETCHED", "client", read_seconds, "10m",
        "how long a client keeps files after a server has confirmed that it has the result")
    keep_rows_s: float = setting("JOBORCH_KEEP_ROWS", BOTH, read_seconds, "365d", "how long rows and history of cleaned jobs are kept")
    max_upload_bytes: int = setting("JOBORCH_MAX_UPLOAD", BOTH, read_bytes, "10G", "largest request body")
    max_result_bytes: int = setting("JOBORCH_MAX_RESULT", BOTH, read_bytes, "10G",
        "largest result: total size of the files that a script leaves, including holes")
    max_result_files: int = setting("JOBORCH_MAX_RESULT_FILES", BOTH, read_positive, "200000",
        "most files and links in a result, with half as many folders")
    min_free_bytes: int = setting("JOBORCH_MIN_FREE", BOTH, read_bytes, "1G", "free disk space below which uploads are refused with 507")
    ca_file: str = setting("JOBORCH_CA_FILE", BOTH, read_text, "",
        "certificates (PEM) to check https clients, servers and receivers of webhooks with, instead of the system's")
    callback_hosts: str = setting("JOBORCH_CALLBACK_HOSTS", "server", read_by_plugin("joborch_plugins.webhooks:read_host_list"), "",
        "hosts that webhooks may go to, separated by commas: names, *.example.org, addresses, networks, or * for all public ones "
        "(default: none)", plugin="webhooks")
    callback_on: tuple[str, ...] = setting("JOBORCH_CALLBACK_ON", "server", read_by_plugin("joborch_plugins.webhooks:read_events"), "",
        "states that send a webhook, separated by commas (default: Completed,Failed,Invalid,Killed)", plugin="webhooks", unset=())
    callback_secret: str = setting("JOBORCH_CALLBACK_SECRET", "server", read_by_plugin("joborch_plugins.webhooks:read_secret"), "",
        "secret(s) that sign webhooks, separated by commas: whsec_ and base64; visible in ps", plugin="webhooks", secret=True)
    callback_secret_file: str = setting("JOBORCH_CALLBACK_SECRET_FILE", "server", read_text, "",
        "file with the secret(s), created if it is missing (default: callback-secret in DATA_PATH)", plugin="webhooks")
    join: str = setting("JOBORCH_JOIN", "client", read_urls, "",
        "servers to call for jobs, as in https://server:5000, separated by commas; this client then listens nowhere")
    join_services: tuple[str, ...] = setting("JOBORCH_SERVICES", "client", read_names, "",
        "the services to offer to these servers (default: those of the token)", unset=())
    forget_client_s: float = setting("JOBORCH_FORGET_CLIENT", "server", read_period, "7d",
        "how long a client that joined is shown after its last call")
    public_url: str = setting("JOBORCH_PUBLIC_URL", "server", read_url, "",
        "how other machines reach this server, as in https://jobs.example.org")
    scale_interval_s: float = setting("JOBORCH_SCALE_INTERVAL", "server", read_period, "10",
        "seconds between two looks at the instances in clouds", plugin="clouds")
    orphan_grace_s: float = setting("JOBORCH_ORPHAN_GRACE", "server", read_seconds, "10m",
        "how long an instance with this server's tag may be in a cloud without being in the database, before it is ended", plugin="clouds")
    orphan_after_s: float = setting("JOBORCH_ORPHAN_AFTER", "client", read_seconds, "0",
        "a client that joined stops after this long without an answer of any server, if no payload runs (0: never)")
    compat: str = setting("JOBORCH_COMPAT", "server", one_of("1.2", "2.2"), "1.2",
        "2.2: GET /download/ID answers as the reference's 2.2 does", plugin="compat22")
    log_level: str = setting("JOBORCH_LOG", BOTH, one_of("debug", "info", "warning", "error"), "info",
        "log level: debug, info, warning or error")
    access_log: bool = setting("JOBORCH_ACCESS_LOG", BOTH, read_switch, "0", "1: a line in the log for each request")
    log_format: str = setting("JOBORCH_LOG_FORMAT", BOTH, one_of("text", "json"), "text", "json: one JSON object per line")
    services: Mapping[str, Service] = field(default_factory=dict)
    batch: Mapping[str, BatchOptions] = field(default_factory=dict)
    clouds: Mapping[str, Cloud] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    env_file: str = ""
    # The flags and the environment that it was made of, to read --env-file again.
    origin: tuple[Mapping[str, str | None], Mapping[str, str]] = field(default=({}, {}), repr=False, compare=False)

    @property
    def max_zip_members(self) -> int:
        """The most members of a stored result: its files and folders, and what the client adds in .joborch/."""
        return self.max_result_files * 3 // 2 + 32

    def batch_options(self, service: str | None) -> BatchOptions:
        """Return the options for the jobs of a service in a batch system."""
        return self.batch.get((service or "").lower(), BatchOptions())


@dataclass(frozen=True)
class Service:
    """A service: its clients and limits. Each setting is SERVICE_<NAME>_..., as in SERVICE_EXAMPLE_CLIENTS."""

    name: str
    addresses: tuple[Address, ...]  # its clients, from the first four settings
    upload_url: str = setting("UPLOAD_URL", "server", read_text, "", "where a client accepts payloads, as in http://host:9000/submit")
    download_url: str = setting("DOWNLOAD_URL", "server", read_text, "", "where it serves results, as in http://host:9000/retrieve")
    terminate_url: str = setting("TERMINATE_URL", "server", read_text, "", "where it kills payloads, as in http://host:9000/kill")
    clients: str = setting("CLIENTS", "server", read_text, "",
        "base URLs of clients, separated by commas; short for the three URLs")
    token: str = setting("TOKEN", "server", read_token, "", "token for these clients", secret=True)
    token_file: str = setting("TOKEN_FILE", "server", read_text, "", "file with the token for these clients")
    peer: str = setting("PEER", "server", one_of("joborch", "2.2"), "",
        "2.2: these may be 2.2 clients, which cannot prove their identity (default: joborch; 2.2 for the three URLs without a token)")
    runs_per_user: int = setting("RUNS_PER_USER", "server", read_positive, "5", "jobs of one user that may be at clients at once")
    max_runs: int = setting("MAX_RUNS", "server", read_positive, "10", "jobs of the service that may be at clients at once")
    policy: str = setting("POLICY", "server", one_of("share", "fifo", "priority"), "share",
        "who is next: least use; first come, first served; or highest priority with ageing")
    timeout_s: float | None = setting("TIMEOUT", "server", read_period, "", "run time limit in seconds (default: none)", unset=None)
    retries: int = setting("RETRIES", "server", read_whole, "2",
        "further attempts after an infrastructure failure, never after a failure of the script")
    return_inputs: bool = setting("RETURN_INPUTS", "server", read_switch, "1",
        "0: the result omits inputs that the script left unchanged")
    unreachable_after_s: float = setting("UNREACHABLE_AFTER", "server", read_period, "24h",
        "how long jobs wait if no client of the service answers")
    lost_after_s: float = setting("LOST_AFTER", "server", read_period, "3600",
        "seconds that a client may be silent before its jobs get a new attempt")
    callback_url: str = setting("CALLBACK_URL", "server", read_url, "",
        "where the webhooks of jobs without a callback_url go; its host must be in JOBORCH_CALLBACK_HOSTS", plugin="webhooks")

    @property
    def text(self) -> str:
        """Return its clients and limits in a few words."""
        clients = ", ".join(address.name for address in self.addresses) or "clients that join"
        return f"{clients} (per user {self.runs_per_user}, in all {self.max_runs})"


@dataclass(frozen=True)
class BatchOptions:
    """A client's options for the jobs of one service in a batch system, and the line that runs before its scripts."""

    prelude: str = setting("PRELUDE", "client", read_line, "",
        "a line of bash that runs before each script, in a login shell, as in module load gcc")
    slurm_partition: str = setting("SLURM_PARTITION", "client", read_word, "", "sbatch --partition", plugin="slurm")
    slurm_account: str = setting("SLURM_ACCOUNT", "client", read_word, "", "sbatch --account", plugin="slurm")
    slurm_qos: str = setting("SLURM_QOS", "client", read_word, "", "sbatch --qos", plugin="slurm")
    slurm_constraint: str = setting("SLURM_CONSTRAINT", "client", read_word, "", "sbatch --constraint, as in gpu", plugin="slurm")
    slurm_gres: str = setting("SLURM_GRES", "client", read_word, "", "sbatch --gres, as in gpu:1", plugin="slurm")
    slurm_time_s: float | None = setting("SLURM_TIME", "client", read_period, "",
        "time limit of jobs without a timeout, as in 90m or 24h", plugin="slurm", unset=None)
    slurm_args: tuple[str, ...] = setting("SLURM_ARGS", "client", read_by_plugin("joborch_plugins.slurm:read_sbatch_words"), "",
        "further options of sbatch, as in --nice=100 --exclusive", plugin="slurm", unset=())
    dirac_site: str = setting("DIRAC_SITE", "client", read_text, "", "sites separated by commas, as in LCG.CERN.ch", plugin="dirac")
    dirac_tags: str = setting("DIRAC_TAGS", "client", read_text, "", "tags separated by commas, as in GPU", plugin="dirac")
    dirac_cpu_time_s: float | None = setting("DIRAC_CPU_TIME", "client", read_period, "",
        "CPU time (default: a job's timeout times its cpus)", plugin="dirac", unset=None)
    dirac_platform: str = setting("DIRAC_PLATFORM", "client", read_text, "", "platform, as DIRAC names it", plugin="dirac")
    dirac_jdl: str = setting("DIRAC_JDL", "client", read_text, "",
        'further lines of JDL, as in Priority = 5; BannedSites = {"LCG.X.org"}', plugin="dirac")


@dataclass(frozen=True)
class Cloud:
    """A cloud in which a server makes and ends clients. Each setting is CLOUD_<NAME>_..., as in CLOUD_LAB_PROVIDER."""

    name: str
    provider: str = setting("PROVIDER", "server", read_provider, "",
        "openstack, ec2, another provider of Apache Libcloud, or package.module:Class", plugin="clouds")
    credentials: str = setting("CREDENTIALS", "server", read_text, "",
        "JSON file (mode 0600) with the credentials: see docs/clouds.md", plugin="clouds")
    endpoint: str = setting("ENDPOINT", "server", read_url, "",
        "URL of the cloud's API, instead of the one in the credentials", plugin="clouds")
    region: str = setting("REGION", "server", read_word, "", "region, instead of the one in the credentials", plugin="clouds")
    image: str = setting("IMAGE", "server", read_line, "", "image of the instances: its id or name", plugin="clouds")
    size: str = setting("SIZE", "server", read_line, "", "size (flavour, type) of the instances: its id or name", plugin="clouds")
    network: str = setting("NETWORK", "server", read_line, "",
        "networks of the instances, separated by commas: ids or names (EC2: the id of a subnet)", plugin="clouds")
    security_group: str = setting("SECURITY_GROUP", "server", read_line, "",
        "security groups, separated by commas; they must let instances call this server, and nobody needs to reach them", plugin="clouds")
    key: str = setting("KEY", "server", read_line, "", "key pair for people who log in there", plugin="clouds")
    services: tuple[str, ...] = setting("SERVICES", "server", read_names, "",
        "services that its instances serve, separated by commas (default: all)", plugin="clouds", unset=())
    least: int = setting("MIN", "server", read_whole, "0", "instances that are kept even if no job waits", plugin="clouds")
    most: int = setting("MAX", "server", read_whole, "4", "most instances at once", plugin="clouds")
    slots: int = setting("SLOTS", "server", read_positive, "",
        "slots of an instance (default: the cores of its size)", plugin="clouds", unset=0)
    idle_s: float = setting("IDLE", "server", read_seconds, "600",
        "how long an instance may be without a job before it is ended", plugin="clouds")
    boot_limit_s: float = setting("BOOT_LIMIT", "server", read_period, "900",
        "an instance that has not joined after this long is ended, and its console log is kept", plugin="clouds")
    hourly_cost: float = setting("HOURLY_COST", "server", read_amount, "0", "what an instance costs an hour", plugin="clouds")
    daily_budget: float | None = setting("DAILY_BUDGET", "server", read_amount, "",
        "what its instances may cost a day (UTC); beyond that no more are made (default: no limit)", plugin="clouds", unset=None)
    paid_by_hour: bool = setting("PAID_BY_HOUR", "server", read_switch, "0",
        "1: begun hours are paid in full, so instances are ended near the end of one", plugin="clouds")
    user_data: str = setting("USER_DATA", "server", read_text, "",
        "file with lines of sh that run before the client starts, or such lines; or a #cloud-config", plugin="clouds")
    orphan_after_s: float = setting("ORPHAN_AFTER", "server", read_period, "2h",
        "an instance ends itself if no server has answered for this long and no payload runs", plugin="clouds")

    def serves(self, service: str) -> bool:
        """Tell whether its instances serve a service."""
        return not self.services or service in self.services


# fmt: on


SETTINGS = settings_of(Config)
SERVICE_SETTINGS = settings_of(Service) + settings_of(BatchOptions)
CLOUD_SETTINGS = settings_of(Cloud)


# == 3. Configuration ==  Reads the settings and services of one process from flags, environment and files, and refuses mistakes.

QUOTED = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|\'([^\']*)\')')  # at the beginning of a value in an environment file


def env_value(text: str) -> str:
    """Return the value after `NAME=`, as systemd and shells read it. Raises ValueError if a quote is not closed.

    Quotes at its beginning are removed, with the backslashes that double quotes need; ` #` begins a comment. Other quotes and
    backslashes are literal.
    """
    pieces, rest = "", text
    while quoted := QUOTED.match(rest):
        pieces += quoted[2] if quoted[1] is None else re.sub(r'\\(["\\$`])', r"\1", quoted[1])
        rest = rest[quoted.end() :]
    bare = re.split(r"\s#", rest, maxsplit=1)[0].strip()
    if bare[:1] in ("'", '"'):
        raise ValueError("a quote is not closed")
    return pieces + bare


def read_env_file(path: str) -> dict[str, str]:
    """Return the NAME=VALUE lines of a file: see `env_pairs`."""
    return env_pairs(read_env_text(path), path)


def read_env_text(path: str) -> str:
    """Return the text of a file of settings. Raises ConfigError if it cannot be read."""
    try:
        return read_small_file(path, MIB).removeprefix("\ufeff")  # Windows editors begin with a byte order mark
    except (OSError, ValueError) as error:
        raise ConfigError(f"--env-file {path} cannot be read: {file_trouble(error)}") from error


def env_pairs(file_text: str, path: str) -> dict[str, str]:
    """Return the NAME=VALUE lines of the file `path`, with comments, quotes and `export` as in systemd and shells."""
    pairs = {}
    for number, line in enumerate(file_text.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(("#", ";")):
            continue
        found = re.fullmatch(r"(?:export\s+)?(\w+)\s*=(.*)", text)
        if not found:
            raise ConfigError(f"--env-file {path}, line {number}: write NAME=VALUE")
        try:
            pairs[found[1]] = env_value(found[2])
        except ValueError as error:
            raise ConfigError(f"--env-file {path}, line {number}: {found[1]}: {error}") from error
    return pairs


def read_setting(setting: Setting, text: str, shown_name: str) -> Any:
    """Return the value of one setting. Raises ConfigError with the setting, the value and what is allowed."""
    try:
        return setting.read(text)
    except ValueError as error:
        shown = "(hidden)" if setting.secret else repr(one_line(text, 80))
        raise ConfigError(f"{shown_name} is {shown}: {error}") from error


def split_name(name: str, prefix: str, settings: Collection[Setting]) -> tuple[str, Setting] | None:
    """Return (owner, setting) of `PREFIX_<NAME>_<SUFFIX>`, by the longest known suffix; None for other names."""
    for setting in sorted(settings, key=lambda setting: -len(setting.name)):
        suffix = "_" + setting.name
        if name.startswith(prefix) and name.endswith(suffix) and len(name) > len(prefix) + len(suffix):
            return name[len(prefix) : -len(suffix)].lower(), setting
    return None


def split_service_name(name: str) -> tuple[str, Setting] | None:
    """Return (service, setting) of `SERVICE_<NAME>_<SUFFIX>`; None for other names."""
    return split_name(name, "SERVICE_", SERVICE_SETTINGS)


def split_cloud_name(name: str) -> tuple[str, Setting] | None:
    """Return (cloud, setting) of `CLOUD_<NAME>_<SUFFIX>`; None for other names."""
    return split_name(name, "CLOUD_", CLOUD_SETTINGS)


def is_clients(name: str) -> bool:
    """Tell whether a variable lists a service's clients. An empty list counts: only clients that join serve it then."""
    found = split_service_name(name.upper())
    return found is not None and found[1].name == "CLIENTS"


def client_address(base_url: str) -> Address:
    """Return the address of a client whose routes are below one base URL."""
    base = base_url.rstrip("/")
    return Address(base + "/submit", base + "/retrieve", base + "/kill", base)


def reference_address(service: Service) -> Address | None:
    """Return the address of the client that the three URLs of 2.2 name, or None if none is set."""
    first, *others = [url.rstrip("/") for url in (service.upload_url, service.download_url, service.terminate_url)]
    if not first:
        if any(others):
            raise ConfigError(f"SERVICE_{service.name.upper()}_UPLOAD_URL is missing: set it, as in http://host:9000/submit")
        return None
    base, _, last = first.rpartition("/")
    base = base if last == "submit" else ""
    if not base and not all(others):
        raise ConfigError(
            f"SERVICE_{service.name.upper()}_DOWNLOAD_URL and _TERMINATE_URL are needed if UPLOAD_URL does not end in /submit"
        )
    return Address(first, others[0] or base + "/retrieve", others[1] or base + "/kill", base)


def check_url(url: str, shown_name: str) -> None:
    """Raise ConfigError unless `url` is an http or https URL with a host and no password."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        fits = False
    if fits and "@" in parts.netloc:
        raise ConfigError(f"{shown_name} contains a user or password: remove it, and set SERVICE_<NAME>_TOKEN to the client's token")
    if not fits:
        raise ConfigError(f"{shown_name} is {one_line(url, 80)!r}: give a URL, as in http://host:9000")


def read_token_file(path: str, shown_name: str) -> str:
    """Return the token in a file. Raises ConfigError if it cannot be read."""
    try:
        return read_token(read_small_file(path).strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown_name} {path} cannot be read: {file_trouble(error)}") from error


EXAMPLE_CLIENT_URL = "http://127.0.0.1:9000"  # the client of `example` if none is set


def read_settings(texts: Mapping[str, str], prefix: str, settings: Collection[Setting] = SERVICE_SETTINGS) -> dict[str, Any]:
    """Return the values of one service's settings by field, from texts by suffix. Settings without a text are omitted."""
    given = [setting for setting in settings if texts.get(setting.name)]
    return {setting.field: read_setting(setting, texts[setting.name], prefix + setting.name) for setting in given}


def make_service(name: str, texts: Mapping[str, str]) -> Service:
    """Build one service from its settings, by suffix. Raises ConfigError if they do not fit together."""
    prefix = f"SERVICE_{name.upper()}_"
    service = Service(name, (), **read_settings(texts, prefix))
    bases = [base.strip() for base in service.clients.split(",") if base.strip()]
    first = reference_address(service)
    for base in bases:
        check_url(base, prefix + "CLIENTS")
    for url, setting in zip(dataclasses.astuple(first) if first else (), ("UPLOAD_URL", "DOWNLOAD_URL", "TERMINATE_URL")):
        check_url(url, prefix + setting)
    if not first and not bases and name == "example" and "CLIENTS" not in texts:
        bases = [EXAMPLE_CLIENT_URL]
    token = service.token
    if not token and service.token_file:
        token = read_token_file(service.token_file, prefix + "TOKEN_FILE")
    return dataclasses.replace(
        service,
        addresses=(*([first] if first else []), *map(client_address, bases)),
        token=token,
        peer=service.peer or ("2.2" if first and not bases and not token else "joborch"),
    )


def texts_of_services(environment: Mapping[str, str], mode: str) -> dict[str, dict[str, str]]:
    """Return the `SERVICE_*` variables for one mode: texts by service and suffix."""
    texts: dict[str, dict[str, str]] = {}
    for name, text in environment.items():
        found = split_service_name(name.upper())
        if found and found[1].modes == mode:
            texts.setdefault(found[0], {})[found[1].name] = text
    return texts


def read_batch_options(environment: Mapping[str, str]) -> dict[str, BatchOptions]:
    """Return a client's options for a batch system, by service. Raises ConfigError."""
    found = texts_of_services(environment, "client").items()
    return {name: BatchOptions(**read_settings(texts, f"SERVICE_{name.upper()}_")) for name, texts in found}


def read_services(environment: Mapping[str, str], clouds: Collection[Cloud] = ()) -> dict[str, Service]:
    """Return the services in the `SERVICE_*` variables, or else `example` on this machine or in a cloud. Raises ConfigError."""
    texts = texts_of_services(environment, "server") or {"example": {}}
    if any(cloud.serves("example") for cloud in clouds) and "example" in texts:
        texts["example"].setdefault("CLIENTS", "")
    return {name: make_service(name, suffixes) for name, suffixes in sorted(texts.items())}


def read_clouds(environment: Mapping[str, str]) -> dict[str, Cloud]:
    """Return the clouds in the `CLOUD_*` variables: each that has a PROVIDER. Raises ConfigError."""
    texts: dict[str, dict[str, str]] = {}
    for name, text in environment.items():
        found = split_cloud_name(name.upper())
        if found:
            texts.setdefault(found[0], {})[found[1].name] = text
    clouds = {}
    for name, given in sorted(texts.items()):
        prefix = f"CLOUD_{name.upper()}_"
        if "PROVIDER" in given:
            clouds[name] = Cloud(name, **read_settings(given, prefix, CLOUD_SETTINGS))
        elif {"CREDENTIALS", "SERVICES"} & given.keys():
            raise ConfigError(f"{prefix}PROVIDER is missing: set it, as in openstack or ec2")
    return clouds


def nearest_suffix(name: str, settings: Collection[Setting] = SERVICE_SETTINGS) -> str:
    """Return ` (did you mean X?)` for the setting of a service nearest to the end of a variable's name, or an empty string."""
    suffixes, words = [setting.name for setting in settings], name.split("_")
    tails = {"_".join(words[-count:]) for count in (1, 2, 3)}
    import difflib

    scores = {suffix: max(difflib.SequenceMatcher(None, tail, suffix).ratio() for tail in tails) for suffix in suffixes}
    best = max(scores, key=lambda suffix: scores[suffix])
    return f" (did you mean {best}?)" if scores[best] > 0.7 else ""


def unknown_names(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that has a prefix of joborch's settings but is not one, and looks meant as one."""
    known = {setting.name for setting in SETTINGS} | {"JOBORCH_SERVER"}
    clouds = {found[0] for found in map(split_cloud_name, map(str.upper, environment)) if found}
    for name in sorted(environment):
        if name.startswith("JOBORCH_") and name not in known and not name.startswith("JOBORCH_TEST_"):
            plain = name.replace("JOBORCH_", "", 1)
            yield f"{name} is not a setting" + (f" (did you mean {plain}?)" if plain in known else nearest(name, known))
        elif name.startswith("SERVICE_") and not split_service_name(name.upper()):
            yield f"{name} is not a setting of a service{nearest_suffix(name)}"
        elif name.startswith("CLOUD_") and not split_cloud_name(name.upper()):
            meant = nearest_suffix(name, CLOUD_SETTINGS)
            if meant or any(name.startswith(f"CLOUD_{cloud.upper()}_") for cloud in clouds):  # CLOUD_SDK_VERSION is Google's
                yield f"{name} is not a setting of a cloud{meant}"
        elif name not in known and name.upper() in known:
            yield f"{name} is not a setting (did you mean {name.upper()}?)"


def hidden_settings(arguments: Mapping[str, str | None], environment: Mapping[str, str], in_file: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each setting of --env-file that has another value in a flag or in the environment, which wins."""
    names = {setting.name for setting in SETTINGS}
    flags = {setting.name: setting for setting in SETTINGS if arguments.get(setting.field)}
    for name, text in in_file.items():
        if name in flags and arguments[flags[name].field] != text:
            yield f"{name} in --env-file has no effect: the flag {flags[name].flag} sets it"
        elif name not in flags and environment.get(name, text) != text and (name in names or split_service_name(name.upper())):
            yield f"{name} in --env-file has no effect: the environment sets it"


LONG_TIME_S = 6 * 3600.0  # a setting with at least this default is rarely meant in seconds


def missing_units(arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a question about each time that is set to a small number without a unit although hours or days are usual."""
    given = [(setting, arguments.get(setting.field) or environment.get(setting.name) or "", setting.name) for setting in SETTINGS]
    for name, text in environment.items():
        found = split_service_name(name.upper()) or split_cloud_name(name.upper())
        given += [(found[1], text, name)] if found else []
    for setting, text, name in given:
        usual_s = read_seconds(setting.default) if setting.read in (read_seconds, read_period) and setting.default else 0.0
        if usual_s >= LONG_TIME_S and re.fullmatch(r"[0-9]{1,3}", text) and int(text):
            yield f"{name} is {text}: did you mean {text} seconds? Write {text}s if you did, else {text}h or {text}d"


def machine_memory_bytes() -> int:
    """Return the memory of this machine, or of this process's control group if that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return memory


def default_folder(kind: str) -> str:
    """Return the user's `data` or `config` folder for joborch. Raises ConfigError if the user has no home."""
    import platformdirs

    folder = platformdirs.user_data_dir("joborch") if kind == "data" else platformdirs.user_config_dir("joborch")
    if folder.startswith("~") or not os.path.isabs(folder):
        raise ConfigError("this user has no home folder: set DATA_PATH to a writable folder")
    return folder


def token_of_file(config: Config) -> str:
    """Return the token in JOBORCH_TOKEN_FILE; empty if it is not set, or if a client will create the file at its first start."""
    path = config.token_file
    waits = config.mode == "client" and not os.path.lexists(path)
    return read_token_file(path, "JOBORCH_TOKEN_FILE") if path and not waits else ""


BATCH_SLOTS = 100  # jobs that a batch system gets at once, unless JOBORCH_SLOTS is set


def with_defaults(config: Config) -> Config:
    """Fill in the values that depend on the machine, the mode or each other."""
    data_path = os.path.abspath(config.data_path or os.path.join(default_folder("data"), config.mode))
    db_path = config.db_path or os.path.join(data_path, "joborch.db")
    return dataclasses.replace(
        config,
        port=config.port if config.port >= 0 else {"server": 5000}.get(config.mode, 9000),
        data_path=data_path,
        db_path=db_path if db_path == ":memory:" else os.path.abspath(db_path),
        slots=config.slots or (os.cpu_count() or 1 if config.executor == "local" else BATCH_SLOTS),
        memory_bytes=config.memory_bytes or machine_memory_bytes(),
        token=config.token or token_of_file(config),
    )


def load_config(mode: str, arguments: Mapping[str, str | None], environment: Mapping[str, str], file_text: str | None = None) -> Config:
    """Return the effective configuration of `mode`. A flag wins over the environment, that over --env-file, that over the default.

    `arguments` maps a setting's field (and `env_file`) to the text given on the command line, or None. `file_text` stands for
    the content of --env-file.
    """
    env_file = arguments.get("env_file") or ""
    pairs = env_pairs(file_text, env_file) if file_text is not None else read_env_file(env_file) if env_file else {}
    from_file = {name: text for name, text in pairs.items() if text or is_clients(name)}
    given = {name: text for name, text in environment.items() if text or is_clients(name)}
    merged = {**from_file, **given}
    found_in = {name: "environment" if name in given else "--env-file" for name in merged}
    of_groups = (name for name in found_in if split_service_name(name.upper()) or split_cloud_name(name.upper()))
    sources = {name.upper(): found_in[name] for name in of_groups}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        flag = arguments.get(setting.field)
        sources[setting.name] = f"flag {setting.flag}" if flag else found_in.get(setting.name, "default")
        if flag or setting.name in merged:
            values[setting.field] = read_setting(setting, flag or merged[setting.name], setting.flag if flag else setting.name)
    origin = (dict(arguments), dict(environment))
    config = with_defaults(Config(mode, env_file=env_file, sources=sources, origin=origin, **values))
    clouds = read_clouds(merged) if mode == "server" else {}
    services = read_services(merged, clouds.values()) if mode == "server" else {}
    batch = read_batch_options(merged) if mode == "client" else {}
    config = dataclasses.replace(config, services=services, batch=batch, clouds=clouds)
    check_config(config)
    warnings = (*unknown_names(merged), *hidden_settings(arguments, given, from_file), *missing_units(arguments, merged))
    warnings += (*batch_warnings(config), *access_warnings(config), *isolation_warnings(config))
    return dataclasses.replace(config, warnings=warnings)


def check_certificates(path: str) -> None:
    """Raise ConfigError if JOBORCH_CA_FILE is set and has no certificates."""
    import ssl

    try:
        if path:
            if not stat.S_ISREG(os.stat(path).st_mode):  # OpenSSL would read a device without end
                raise ValueError("it is no regular file")
            ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = one_line(error.strerror or str(error)).lower() if isinstance(error, OSError) else one_line(str(error))
        raise ConfigError(f"JOBORCH_CA_FILE is {path!r}: {why}; give a file of certificates in PEM") from error


def check_join(config: Config) -> None:
    """Raise ConfigError if a client cannot call the servers of JOBORCH_JOIN."""
    for url in filter(None, config.join.split(",")):
        check_url(url, "JOBORCH_JOIN")
    if not config.token:
        remedy = "put what `joborch token add NAME --role client` printed into the file JOBORCH_TOKEN_FILE"
        raise ConfigError(f"JOBORCH_JOIN needs a token: {remedy}")


def check_config(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    if config.mode == "server" and config.db_path == ":memory:":
        raise ConfigError("DB_PATH is ':memory:': a server must keep its jobs in a file; only a client may forget them")
    if config.isolation != "none" and config.executor != "local":
        reason = f"the site's batch system isolates its jobs itself; unset it, as {config.executor} runs them on other machines"
        raise ConfigError(f"JOBORCH_ISOLATION is {config.isolation!r}, but JOBORCH_EXECUTOR is {config.executor!r}: {reason}")
    if any(service.callback_url for service in config.services.values()):
        load_plugin("joborch_plugins.webhooks:check_services")(config)
    if config.clouds:
        load_plugin("joborch_plugins.cloud_providers:check_clouds")(config)
    beyond = beyond_loopback(config.host)
    if (
        beyond
        and not config.token
        and (config.allow_anonymous or config.mode == "server")
        and not (config.allow_anonymous and config.allow_from)
    ):
        raise ConfigError(
            f"JOBORCH_HOST is {config.host!r}, which others can reach: set JOBORCH_TOKEN (callers must send it), "
            "or JOBORCH_ALLOW_ANONYMOUS=1 and JOBORCH_ALLOW_FROM=ADDRESS,NETWORK (callers from there need none)"
        )


def batch_warnings(config: Config) -> Iterator[str]:
    """Yield a warning if services have settings of a plug-in that this client does not use."""
    given = [setting for options in config.batch.values() for setting in settings_of(BatchOptions) if getattr(options, setting.field)]
    if config.executor == "local" and any(setting.plugin for setting in given):
        yield "settings for a batch system (SERVICE_..._SLURM_..., _DIRAC_...) have no effect: JOBORCH_EXECUTOR is local"


def access_warnings(config: Config) -> Iterator[str]:
    """Yield warnings about who is served without a token."""
    if config.token and (config.allow_anonymous or config.allow_from):
        yield "JOBORCH_ALLOW_ANONYMOUS and JOBORCH_ALLOW_FROM have no effect, because a token is set: every caller must send it"
    elif config.allow_anonymous:
        places = ", ".join(map(str, config.allow_from))
        here = "this user's processes on this machine are served without a token"
        yield "JOBORCH_ALLOW_ANONYMOUS is 1: " + (f"all callers at {places} are served without a token, and {here}" if places else here)
    elif config.allow_from:
        yield "JOBORCH_ALLOW_FROM has no effect: set JOBORCH_ALLOW_ANONYMOUS=1, too"
    if int(config.socket_mode, 8) & 0o077 and not config.socket_file and config.mode == "server":
        yield "JOBORCH_SOCKET_MODE has no effect: others cannot enter the socket's folder; set JOBORCH_SOCKET to a path that they can reach"


def isolation_warnings(config: Config) -> Iterator[str]:
    """Yield a warning for settings that need another JOBORCH_ISOLATION."""
    of_mounts = ("JOBORCH_NETWORK", "JOBORCH_BIND", "JOBORCH_BIND_RW")
    for wanted, own in ((("full", "user"), of_mounts), (("user",), ("JOBORCH_UIDS",))):
        names = [name for name in own if config.sources.get(name, "default") != "default"]
        if names and config.mode == "client" and config.isolation not in wanted:
            have = f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect"
            yield f"{have}: JOBORCH_ISOLATION is {config.isolation}, not {' or '.join(wanted)}"


def beyond_loopback(hosts: str) -> list[str]:
    """Return the addresses to listen on that other machines can reach."""
    return [host for host in map(str.strip, hosts.split(",")) if host and not is_loopback(host)]


def url_host(host: str) -> str:
    """Return a host as a URL writes it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is loopback."""
    return host in ("localhost", "::1", "[::1]") or bool(re.fullmatch(r"127\.[0-9]+\.[0-9]+\.[0-9]+", host))


def setting_values(config: Config) -> Iterator[tuple[str, Setting, Any]]:
    """Yield the name, the declaration and the value of each effective setting; of a service also those that were not set."""
    for setting in SETTINGS:
        if config.mode in setting.modes.split():
            yield setting.name, setting, getattr(config, setting.field)
    for service in config.services.values():
        urls = ", ".join(address.base_url or address.upload_url for address in service.addresses)
        for setting in SERVICE_SETTINGS:
            if setting.modes == "server" and not setting.name.endswith("_URL"):  # CLIENTS shows the URLs
                value = urls if setting.name == "CLIENTS" else getattr(service, setting.field)
                yield f"SERVICE_{service.name.upper()}_{setting.name}", setting, value
    of_clouds = itertools.product(config.clouds.values(), CLOUD_SETTINGS)
    yield from ((f"CLOUD_{cloud.name.upper()}_{setting.name}", setting, getattr(cloud, setting.field)) for cloud, setting in of_clouds)
    for owner, options in sorted(config.batch.items()):
        for setting in SERVICE_SETTINGS:
            given = getattr(options, setting.field) if setting.modes == "client" else None
            if given:
                yield f"SERVICE_{owner.upper()}_{setting.name}", setting, shlex.join(given) if isinstance(given, tuple) else given


def shown_value(value: Any, secret: bool = False) -> str:
    """Return a setting's value as a person writes it; a secret is masked."""
    if secret and value:
        return "***"
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, range):
        return f"{value[0]}-{value[-1]}" if value else ""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={shown_value(each)}" for key, each in value.items())
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def config_rows(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, value, source) of each effective setting; secrets are masked."""
    return [
        (name, shown_value(value, setting.secret), config.sources.get(name, "default")) for name, setting, value in setting_values(config)
    ]
