"""Every setting is declared once, with its reader; `load_config` makes a configuration of flags, files and the environment.

1. Values
2. Settings
3. Configuration
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

from joborch_base.vocabulary import DEFAULT_HOSTS, GIB, KIB, MIB, ConfigError, Network, T, load_plugin, nearest, one_line

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


def read_names(text: str) -> tuple[str, ...]:
    """Return names of variables, separated by commas, as in PGHOST,MYLAB_*; `*` matches any characters."""
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not all(re.fullmatch(r"[!-<>-~]+", name) for name in names):
        raise ValueError("give names of variables separated by commas, as in PGHOST,MYLAB_*")
    return names


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
    executor: str = setting("JOBORCH_EXECUTOR", "client", read_executor, "local",
        "what runs the payloads: local, slurm, dirac, or package.module:Class for another executor")
    pass_env: tuple[str, ...] = setting("JOBORCH_PASS_ENV", "client", read_names, "",
        "further variables that scripts get from the client's environment: names separated by commas, * for any characters", unset=())
    batch_interval_s: float = setting("JOBORCH_BATCH_INTERVAL", "client", read_period, "10",
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
    ca_file: str = setting("JOBORCH_CA_FILE", "server", read_text, "",
        "certificates (PEM) to check https clients with, instead of the system's")
    compat: str = setting("JOBORCH_COMPAT", "server", one_of("1.2", "2.2"), "1.2",
        "2.2: GET /download/ID answers as the reference's 2.2 does", plugin="compat22")
    log_level: str = setting("JOBORCH_LOG", BOTH, one_of("debug", "info", "warning", "error"), "info",
        "log level: debug, info, warning or error")
    log_format: str = setting("JOBORCH_LOG_FORMAT", BOTH, one_of("text", "json"), "text", "json: one JSON object per line")
    services: Mapping[str, Service] = field(default_factory=dict)
    batch: Mapping[str, BatchOptions] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    env_file: str = ""

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


# fmt: on


SETTINGS = settings_of(Config)
SERVICE_SETTINGS = settings_of(Service) + settings_of(BatchOptions)


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
    """Return the NAME=VALUE lines of `path`, with comments, quotes and `export` as in systemd and shells."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--env-file {path} cannot be read: {error}") from error
    pairs = {}
    for number, line in enumerate(lines, 1):
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


def split_service_name(name: str) -> tuple[str, Setting] | None:
    """Return (service, setting) of `SERVICE_<NAME>_<SUFFIX>`, by the longest known suffix; None for other names."""
    for setting in sorted(SERVICE_SETTINGS, key=lambda setting: -len(setting.name)):
        suffix = "_" + setting.name
        if name.startswith("SERVICE_") and name.endswith(suffix) and len(name) > len("SERVICE_") + len(suffix):
            return name[len("SERVICE_") : -len(suffix)].lower(), setting
    return None


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
        return read_token(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown_name} {path} cannot be read: {error}") from error


EXAMPLE_CLIENT_URL = "http://127.0.0.1:9000"  # the client of `example` if none is set


def read_settings(texts: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """Return the values of one service's settings by field, from texts by suffix. Settings without a text are omitted."""
    given = [setting for setting in SERVICE_SETTINGS if texts.get(setting.name)]
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
    if not first and not bases and name == "example":
        bases = [EXAMPLE_CLIENT_URL]
    if not first and not bases:
        raise ConfigError(f"service {name} has no client: set {prefix}CLIENTS=http://host:9000")
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


def read_services(environment: Mapping[str, str]) -> dict[str, Service]:
    """Return the services in the `SERVICE_*` variables, or else `example` on this machine. Raises ConfigError."""
    texts = texts_of_services(environment, "server") or {"example": {}}
    return {name: make_service(name, suffixes) for name, suffixes in sorted(texts.items())}


def nearest_suffix(name: str) -> str:
    """Return ` (did you mean X?)` for the service setting nearest to the end of a variable's name, or an empty string."""
    suffixes, words = [setting.name for setting in SERVICE_SETTINGS], name.split("_")
    tails = {"_".join(words[-count:]) for count in (1, 2, 3)}
    import difflib

    scores = {suffix: max(difflib.SequenceMatcher(None, tail, suffix).ratio() for tail in tails) for suffix in suffixes}
    best = max(scores, key=lambda suffix: scores[suffix])
    return f" (did you mean {best}?)" if scores[best] > 0.7 else ""


def unknown_names(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that has a prefix of joborch's settings but is not one."""
    known = {setting.name for setting in SETTINGS} | {"JOBORCH_SERVER"}
    for name in sorted(environment):
        if name.startswith("JOBORCH_") and name not in known and not name.startswith("JOBORCH_TEST_"):
            plain = name.replace("JOBORCH_", "", 1)
            yield f"{name} is not a setting" + (f" (did you mean {plain}?)" if plain in known else nearest(name, known))
        elif name.startswith("SERVICE_") and not split_service_name(name.upper()):
            yield f"{name} is not a setting of a service{nearest_suffix(name)}"


LONG_TIME_S = 6 * 3600.0  # a setting with at least this default is rarely meant in seconds


def missing_units(arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a question about each time that is set to a small number without a unit although hours or days are usual."""
    given = [(setting, arguments.get(setting.field) or environment.get(setting.name) or "", setting.name) for setting in SETTINGS]
    for name, text in environment.items():
        found = split_service_name(name.upper())
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


def load_config(mode: str, arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> Config:
    """Return the effective configuration of `mode`. A flag wins over the environment, that over --env-file, that over the default.

    `arguments` maps a setting's field (and `env_file`) to the text given on the command line, or None.
    """
    env_file = arguments.get("env_file") or ""
    from_file = {name: text for name, text in (read_env_file(env_file) if env_file else {}).items() if text}
    given = {name: text for name, text in environment.items() if text}
    merged = {**from_file, **given}
    found_in = {name: "environment" if name in given else "--env-file" for name in merged}
    sources = {name.upper(): source for name, source in found_in.items() if split_service_name(name.upper())}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        flag = arguments.get(setting.field)
        sources[setting.name] = f"flag {setting.flag}" if flag else found_in.get(setting.name, "default")
        if flag or setting.name in merged:
            values[setting.field] = read_setting(setting, flag or merged[setting.name], setting.flag if flag else setting.name)
    config = with_defaults(Config(mode, env_file=env_file, sources=sources, **values))
    services = read_services(merged) if mode == "server" else {}
    batch = read_batch_options(merged) if mode == "client" else {}
    config = dataclasses.replace(config, services=services, batch=batch)
    check_config(config)
    warnings = (*unknown_names(merged), *missing_units(arguments, merged), *batch_warnings(config), *access_warnings(config))
    return dataclasses.replace(config, warnings=warnings)


def check_certificates(path: str) -> None:
    """Raise ConfigError if JOBORCH_CA_FILE is set and has no certificates."""
    import ssl

    try:
        if path:
            ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = one_line(error.strerror or str(error)).lower() if isinstance(error, OSError) else one_line(str(error))
        raise ConfigError(f"JOBORCH_CA_FILE is {path!r}: {why}; give a file of certificates in PEM") from error


def check_config(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    if config.mode == "server" and config.db_path == ":memory:":
        raise ConfigError("DB_PATH is ':memory:': a server must keep its jobs in a file; only a client may forget them")
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


def beyond_loopback(hosts: str) -> list[str]:
    """Return the addresses to listen on that other machines can reach."""
    return [host for host in map(str.strip, hosts.split(",")) if host and not is_loopback(host)]


def url_host(host: str) -> str:
    """Return a host as a URL writes it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is loopback."""
    return host in ("localhost", "::1", "[::1]") or bool(re.fullmatch(r"127\.[0-9]+\.[0-9]+\.[0-9]+", host))


def settings_table() -> str:
    """Return the table of settings of docs/reference.md, in Markdown."""
    rows = ["| name | flag | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{setting.name}` | `{setting.flag}` | {setting.default} | {setting.help} |" for setting in SETTINGS]
    rows += [f"| `SERVICE_<NAME>_{setting.name}` | | {setting.default} | {setting.help} |" for setting in SERVICE_SETTINGS]
    return "\n".join(rows)
