"""Clouds through Apache Libcloud: credentials, what an instance runs at its start, and instances as the cloud lists them."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple
from urllib.parse import urlsplit

from joborch import (
    KIB,
    MIB,
    NAME_OF_TOKEN,
    Cloud,
    Config,
    ConfigError,
    Finding,
    JoborchError,
    __version__,
    file_trouble,
    is_loopback,
    load_plugin,
    one_line,
    read_small_file,
)

CALL_TIMEOUT_S = 20  # for an answer of the cloud's API
CLIENT_TAG, SERVER_TAG = "joborch-client", "joborch-server"  # an instance's uuid; the id of the database that has its row
CA_BYTES = 8 * KIB  # certificates up to this size travel with the user data
LIMITS = {"ec2": 16 * KIB, "openstack": 64 * KIB - 1}  # bytes of user data; OpenStack counts them as base64
CONSOLE_BYTES = 16 * KIB  # of the end of a console log


class CloudError(JoborchError):
    """A call to a cloud failed.

    `kind` is refused (it had no effect), quota, credentials (both likewise), or unknown: it may have had an effect.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Node(NamedTuple):
    """An instance as its cloud lists it."""

    id: str
    name: str
    state: str  # building, running, stopped, error, gone or unknown
    client: str  # the tags; empty if it has none
    server: str
    token: str = ""  # with which it was created, where a cloud tells
    fault: str = ""  # what the cloud says of an error
    raw: Any = None


# == Settings ==  What can be checked before anything is asked of a cloud.


def check_clouds(config: Config) -> None:
    """Raise ConfigError for clouds that cannot be used as they are set."""
    if not config.public_url:
        raise ConfigError("JOBORCH_PUBLIC_URL is missing: set it to the URL by which instances reach this server")
    for cloud in config.clouds.values():
        prefix = f"CLOUD_{cloud.name.upper()}_"
        if not re.fullmatch(NAME_OF_TOKEN, cloud.name) or len(cloud.name) > 30:
            raise ConfigError(f"{prefix}PROVIDER: a cloud's name has at most 30 letters, digits and _, and begins with a letter")
        unknown = [name for name in cloud.services if name not in config.services]
        if unknown:
            raise ConfigError(f"{prefix}SERVICES names {unknown[0]!r}: this server has {', '.join(config.services)}")
        if cloud.least > cloud.most:
            raise ConfigError(f"{prefix}MIN is {cloud.least}, which is more than {prefix}MAX, {cloud.most}")
        size = len(user_data(config, cloud, "", "joborch_" + "0" * 48, "0" * 64).encode())
        limit = LIMITS.get(cloud.provider, 1 << 30)
        if (-(-size // 3) * 4 if cloud.provider == "openstack" else size) > limit:
            raise ConfigError(
                f"{prefix}USER_DATA is too long: with what joborch adds it has {size:,} bytes, and {cloud.provider} takes {limit:,}"
            )
        if ":" not in cloud.provider:
            check_provider(cloud, prefix)
            continue
        try:
            load_plugin(cloud.provider)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{prefix}PROVIDER is {cloud.provider!r}, which cannot be imported: {error}") from error


def check_provider(cloud: Cloud, prefix: str) -> None:
    """Raise ConfigError if Libcloud is missing or lacks the provider, or if something that it needs is not set."""
    try:
        from libcloud.compute.types import Provider
    except ImportError as error:
        remedy = "pip install 'joborch[cloud]', or apache-libcloud for the Python that runs joborch.pyz"
        raise ConfigError(f"{prefix}PROVIDER is {cloud.provider!r}, which needs Apache Libcloud: {remedy}") from error
    known = {value for name, value in vars(Provider).items() if name.isupper() and isinstance(value, str)}
    if cloud.provider not in known:
        raise ConfigError(f"{prefix}PROVIDER is {cloud.provider!r}, which Libcloud does not have: openstack and ec2 are tested")
    check_driver(cloud, prefix)
    for name, value in (("CREDENTIALS", cloud.credentials), ("IMAGE", cloud.image), ("SIZE", cloud.size)):
        if not value:
            raise ConfigError(f"{prefix}{name} is missing: set it, see docs/clouds.md")
    groups = words(cloud.security_group)
    if cloud.provider == "ec2" and any(group.startswith("sg-") for group in groups):
        if not all(group.startswith("sg-") for group in groups):
            raise ConfigError(f"{prefix}SECURITY_GROUP has ids and names: give all as ids (sg-...)")
        if not cloud.network:
            raise ConfigError(f"{prefix}NETWORK is missing: ids in {prefix}SECURITY_GROUP need the id of a subnet")
    read_credentials(cloud)


def check_driver(cloud: Cloud, prefix: str) -> None:
    """Raise ConfigError if Libcloud's driver of a provider cannot create instances as they are needed here."""
    if cloud.provider in ("openstack", "ec2"):
        return
    from libcloud.compute.providers import get_driver

    try:
        takes = inspect.signature(get_driver(cloud.provider).create_node).parameters.values()
    except Exception as error:  # drivers import what is not installed, or were given up
        raise ConfigError(f"{prefix}PROVIDER is {cloud.provider!r}, which Libcloud cannot load: {one_line(str(error), 200)}") from error
    if any(each.kind is each.VAR_KEYWORD for each in takes):
        return
    names = {each.name for each in takes}
    lacks = [what for name, what in (("ex_userdata", "user data"), ("ex_metadata", "tags")) if name not in names]
    if lacks:
        said = f"{prefix}PROVIDER is {cloud.provider!r}, whose driver in Libcloud takes no {' and no '.join(lacks)}"
        raise ConfigError(f"{said}: name a class of your own, see docs/clouds.md")


def weak_clouds(config: Config) -> Iterator[Finding]:
    """Yield which credentials others can read on their way to a cloud. EC2 gets signatures, and never the secret."""
    for cloud in config.clouds.values():
        if cloud.provider == "openstack":
            url = urlsplit(read_credentials(cloud)["auth_url"])
            if url.scheme != "https" and not is_loopback(url.hostname or ""):
                what = f"CLOUD_{cloud.name.upper()}_CREDENTIALS {cloud.credentials}"
                yield Finding(None, f"{what} are sent to {url.netloc} without encryption, so others on the way can read them: use https://")


NEEDED = {
    "openstack": (("auth_url", "credential_id", "credential_secret"), ("auth_url", "user", "password", "project", "domain")),
    "ec2": (("key", "secret", "region"),),
}


def read_credentials(cloud: Cloud) -> dict[str, Any]:
    """Return what the file of credentials has. Raises ConfigError, which never shows its content."""
    what = f"CLOUD_{cloud.name.upper()}_CREDENTIALS {cloud.credentials}"
    try:
        path = Path(cloud.credentials).expanduser()
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{what} can be read by others: chmod 600 {shlex.quote(str(path))}")
        said = json.loads(read_small_file(path))
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:
        raise ConfigError(f"{what} is no JSON: give an object with what docs/clouds.md lists") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{what} is no JSON object: give one with what docs/clouds.md lists")
    said.update({"region": cloud.region} if cloud.region else {}, **({"auth_url": cloud.endpoint} if cloud.endpoint else {}))
    ways = NEEDED.get(cloud.provider, ())
    if ways and not any(all(isinstance(said.get(name), str) and said[name] for name in way) for way in ways):
        raise ConfigError(f"{what} lacks something: give {' or '.join(', '.join(way) for way in ways)}")
    return said


# == User data ==  The script that an instance runs at its start. What is secret in it works once, and for BOOT_LIMIT.

FETCH = """
import hashlib, sys, time, urllib.request
url, digest, limit_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
end = time.monotonic() + limit_s
while True:
    try:
        data = urllib.request.urlopen(url, timeout=30).read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("it is not the program that the server runs")
        break
    except Exception as error:
        print("joborch:", url, error, flush=True)
        if time.monotonic() > end:
            sys.exit(1)
        time.sleep(3)
with open("joborch.pyz", "wb") as file:
    file.write(data)
"""

SCRIPT = """#!/bin/sh
# Made by joborch {version}: starts a client that joins a server. The token works once.
umask 077
off() {{ # only a machine that runs this as its user data: one that plays a cloud in a test or demo must stay on
    if grep -qaE 'cloud-init|tiny-cloud' "/proc/$PPID/cmdline"; then
        if [ -d /run/systemd/system ]; then systemctl poweroff; elif [ -d /run/openrc ]; then poweroff; fi
    fi
    exit "$1"
}}
{site}
folder=${{HOME:-/root}}/joborch-{name}
mkdir -p "$folder" && cd "$folder" || off 1
python=
for each in python3 python3.13 python3.12 python3.11 python3.10 python3.9; do
    if [ -z "$python" ] && "$each" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then python=$each; fi
done
if [ -z "$python" ]; then
    echo "joborch: this image has no Python 3.9 or later: take another one, or install it by {prefix}USER_DATA"
    off 1
fi
{certificates}cat >fetch.py <<'END'{fetch}END
{with_ca}"$python" fetch.py {url}/joborch.pyz {digest} {boot_s:.0f} || off 1
[ -s token ] || echo {token} >token
while :; do
    {settings} "$python" joborch.pyz client
    code=$?
    case $code in 0 | 2) off $code ;; esac
    sleep 5
done
"""


def site_lines(cloud: Cloud) -> str:
    """Return what the site adds: the content of the file that USER_DATA names, or its text. Raises ConfigError."""
    text = cloud.user_data
    if text.startswith(("/", "~")) and "\n" not in text:
        try:
            text = read_small_file(Path(text).expanduser(), MIB)
        except (OSError, ValueError) as error:
            raise ConfigError(f"CLOUD_{cloud.name.upper()}_USER_DATA {cloud.user_data} cannot be read: {file_trouble(error)}") from error
    return text


def user_data(config: Config, cloud: Cloud, name: str, token: str, digest: str) -> str:
    """Return the user data of an instance whose client has this name and token, and runs the joborch.pyz with this SHA-256."""
    site, url = site_lines(cloud), config.public_url.rstrip("/")
    is_config = site.startswith("#cloud-config")
    settings = {
        "JOBORCH_JOIN": url,
        "JOBORCH_TOKEN_FILE": "token",
        "DATA_PATH": "data",
        "JOBORCH_ORPHAN_AFTER": f"{cloud.orphan_after_s:.0f}",
    }
    if cloud.slots:
        settings["JOBORCH_SLOTS"] = str(cloud.slots)
    pem = authority(config) if url.startswith("https:") else ""
    if pem:
        settings["JOBORCH_CA_FILE"] = "ca.pem"
    script = SCRIPT.format(
        version=__version__, site="" if is_config else site, name=name, prefix=f"CLOUD_{cloud.name.upper()}_", fetch=FETCH, token=token,
        digest=digest, url=shlex.quote(url), boot_s=cloud.boot_limit_s, with_ca="SSL_CERT_FILE=ca.pem " if pem else "",
        certificates=f"cat >ca.pem <<'END'\n{pem.strip()}\nEND\n" if pem else "",
        settings=" ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
    )  # fmt: skip
    return in_parts(site, script) if is_config else script


def authority(config: Config) -> str:
    """Return the certificates of JOBORCH_CA_FILE if they are few enough for user data."""
    try:
        pem = Path(config.ca_file).read_text(encoding="ascii") if config.ca_file else ""
    except (OSError, UnicodeDecodeError):
        return ""
    return pem if len(pem) <= CA_BYTES else ""


def in_parts(settings: str, script: str) -> str:
    """Return user data in two parts, as cloud-init reads them: a #cloud-config, and a script that runs after it."""
    boundary = "==joborch=="
    said = [f'Content-Type: multipart/mixed; boundary="{boundary}"\nMIME-Version: 1.0\n']
    for kind, text in (("cloud-config", settings), ("x-shellscript", script)):
        said.append(f'--{boundary}\nContent-Type: text/{kind}; charset="utf-8"\n\n{text.strip()}\n')
    return "\n".join(said) + f"\n--{boundary}--\n"


# == Providers ==  One guard around every call: Libcloud raises errors of its own, of requests, and others.

QUOTA = re.compile(r"quota|LimitExceeded|InsufficientInstanceCapacity|too many", re.IGNORECASE)
THROTTLED = re.compile(r"RequestLimitExceeded|Throttling|rate.?limit", re.IGNORECASE)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn whatever Libcloud raises into a CloudError."""
    from libcloud.common.exceptions import BaseHTTPError
    from libcloud.common.types import InvalidCredsError

    try:
        yield
    except (CloudError, ConfigError):
        raise
    except Exception as error:  # odd answers end in any error
        text = one_line(str(getattr(error, "message", "") or error) or type(error).__name__, 300)
        code = getattr(error, "code", 0) if isinstance(error, BaseHTTPError) else 0
        if code == 429 or (code and THROTTLED.search(text)):
            raise CloudError("refused", f"the cloud takes no more calls for a while: {text}") from error
        if QUOTA.search(text) and (code or "LimitExceeded" in text):
            raise CloudError("quota", f"the quota of the cloud is reached: {text}") from error
        if isinstance(error, InvalidCredsError) or code == 401 or (code == 404 and "redential" in text):
            raise CloudError("credentials", f"the cloud refuses the credentials: {text}") from error
        if 400 <= code < 500 and code != 408:  # a gateway that gave up may have passed the request on
            raise CloudError("refused", f"the cloud refuses: {text}") from error
        raise CloudError("unknown", f"the cloud cannot be reached or answers badly: {text}") from error


class LibcloudProvider:
    """A cloud of one of Libcloud's providers."""

    def __init__(self, cloud: Cloud, config: Config) -> None:
        self.cloud, self.config, self.lock = cloud, config, threading.Lock()
        self.made: Any = None  # the driver, logged in
        self.found: dict[str, Any] = {}  # image, size, networks and security groups, which are looked up once
        self.unchecked = ""  # security groups that cannot be looked up

    # -- what differs between providers --

    def arguments(self, said: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return how the driver is made from the credentials."""
        own = {name: value for name, value in said.items() if name not in ("key", "secret", "auth_url")}
        return tuple(said[name] for name in ("key", "secret") if name in said), own

    def special(self, uuid: str) -> dict[str, Any]:
        """Return what else create_node is given."""
        return {"ex_keyname": self.cloud.key} if self.cloud.key else {}

    def node(self, raw: Any) -> Node:
        """Return an instance of Libcloud's as ours."""
        extra = raw.extra or {}
        found = [extra.get(kind) for kind in ("tags", "metadata")]
        tags = {str(name): str(value) for each in found if isinstance(each, Mapping) for name, value in each.items()}
        token = str(extra.get("client_token") or "")
        fault = extra.get("fault") or extra.get("state_reason") or ""
        text = str(fault.get("message") or "") if isinstance(fault, dict) else str(fault)
        state = STATES.get(str(raw.state).lower(), "unknown")
        return Node(str(raw.id), str(raw.name), state, tags.get(CLIENT_TAG, ""), tags.get(SERVER_TAG, ""), token, text, raw)

    # -- calls --

    def call(self, work: Callable[[Any], Any], again: bool = True) -> Any:
        """Return what a call to the driver returns. After refused credentials it logs in once more. Raises CloudError."""
        with self.lock:
            try:
                with guarded():
                    if self.made is None:
                        self.made = self.driver()
                    return work(self.made)
            except CloudError as error:
                if error.kind != "credentials":
                    raise
                self.made, self.found = None, {}
                if not again:
                    raise
        return self.call(work, again=False)

    def driver(self) -> Any:
        """Return a new driver of Libcloud."""
        import libcloud.security
        from libcloud.compute.providers import get_driver

        if self.config.ca_file:
            libcloud.security.CA_CERTS_PATH = self.config.ca_file
        try:
            given, named = self.arguments(read_credentials(self.cloud))
        except ConfigError as error:
            raise CloudError("credentials", str(error)) from error
        return get_driver(self.cloud.provider)(*given, **named, timeout=CALL_TIMEOUT_S)

    def one(self, kind: str, wanted: str, listed: Callable[[], Any]) -> Any:
        """Return the image, size or network with this id or name. Raises CloudError if there is none, or more than one of this name."""
        key = f"{kind} {wanted}"
        if key not in self.found:
            every = list(listed())
            fits = [each for each in every if wanted == str(each.id)] or [each for each in every if wanted == each.name]
            if len(fits) > 1:
                ids = ", ".join(sorted(str(each.id) for each in fits)[:8])
                raise CloudError("refused", f"the cloud has {len(fits)} {kind}s called {wanted!r}: give the id of one: {ids}")
            if not fits:
                some = ", ".join(sorted({str(each.name) for each in every})[:8])
                raise CloudError("refused", f"the cloud has no {kind} {wanted!r}" + (f": it has {some}" if some else ""))
            self.found[key] = fits[0]
        return self.found[key]

    def groups(self, listed: Callable[[], Any]) -> list[str]:
        """Return the security groups. Raises CloudError if the cloud lacks one, which some clouds answer as an error of their own."""
        names = words(self.cloud.security_group)

        def known() -> list[Any]:
            try:
                with guarded():
                    return list(listed())
            except CloudError:  # a credential may lack the right to list them
                self.unchecked = ", ".join(names)
                return [SimpleNamespace(id=name, name=name) for name in names]

        for name in names:
            self.one("security group", name, known)
        return names

    def image(self, driver: Any) -> Any:
        return self.one("image", self.cloud.image, driver.list_images)

    def nodes(self) -> list[Node]:
        """Return all instances of the account. Raises CloudError."""
        return list(self.call(lambda driver: [self.node(raw) for raw in driver.list_nodes()]))

    def size(self) -> tuple[int, int | None]:
        """Return the cores and the memory (bytes) of an instance. Raises CloudError."""
        found = self.call(lambda driver: self.one("size", self.cloud.size, driver.list_sizes))
        extra = getattr(found, "extra", None) or {}
        cores = getattr(found, "vcpus", None) or extra.get("vcpu") or extra.get("vcpus") or extra.get("cpu") or 1
        return int(float(cores)), int(float(found.ram)) << 20 if found.ram else None

    def create(self, name: str, uuid: str, server: str, script: str) -> str:
        """Create an instance, and return its id. Raises CloudError; if that is `unknown`, the instance may exist."""

        def work(driver: Any) -> Any:
            size = self.one("size", self.cloud.size, driver.list_sizes)
            tags = {CLIENT_TAG: uuid, SERVER_TAG: server}
            image = self.image(driver)
            return driver.create_node(name=name, image=image, size=size, ex_userdata=script, ex_metadata=tags, **self.special(uuid))

        try:
            return str(self.call(work).id)
        except CloudError as error:
            if not self.unchecked or getattr(error.__cause__, "code", 0) != 500:
                raise
            hint = f"does the cloud have the security groups {self.unchecked}? This credential cannot list them"
            raise CloudError(error.kind, f"{hint}; {error}") from error

    def destroy(self, node: Node) -> None:
        """Destroy an instance. Raises CloudError."""
        self.call(lambda driver: driver.destroy_node(node.raw))

    def console(self, node: Node) -> str:
        """Return the end of what an instance has printed. Raises CloudError."""
        said = self.call(lambda driver: driver.ex_get_console_output(node.raw))
        text = said.get("output") if isinstance(said, dict) else said
        return str(text or "")[-CONSOLE_BYTES:]


STATES = {
    "running": "running", "pending": "building", "starting": "building", "rebooting": "building", "reconfiguring": "building",
    "migrating": "running", "updating": "running", "stopped": "stopped", "stopping": "stopped", "suspended": "stopped",
    "paused": "stopped", "error": "error", "terminated": "gone",
}  # fmt: skip


class OpenStackProvider(LibcloudProvider):
    """An OpenStack: Keystone 3, and Nova's API."""

    def arguments(self, said: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        url = re.sub("/v3/?$", "", said["auth_url"].rstrip("/"))  # Libcloud appends it
        own = {"ex_force_auth_url": url, "ex_force_service_region": said.get("region"), "api_version": "2.2"}
        if said.get("credential_id"):
            return (said["credential_id"], said["credential_secret"]), {**own, "ex_force_auth_version": "3.x_appcred"}
        names = {"ex_tenant_name": said["project"], "ex_domain_name": said["domain"], "ex_force_auth_version": "3.x_password"}
        return (said["user"], said["password"]), {**own, **names}

    def special(self, uuid: str) -> dict[str, Any]:
        own, driver = super().special(uuid), self.made
        if self.cloud.network:
            own["networks"] = [self.one("network", name, driver.ex_list_networks) for name in words(self.cloud.network)]
        groups = self.groups(driver.ex_list_security_groups)
        if groups:
            own["ex_security_groups"] = [SimpleNamespace(name=name) for name in groups]
        return own


class Ec2Provider(LibcloudProvider):
    """Amazon EC2, or what speaks its protocol. A repeated create with the same token returns the same instance."""

    def arguments(self, said: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = {name: said[name] for name in ("host", "port", "secure") if name in said}
        if self.cloud.endpoint or ("host" in own and "secure" not in own):
            parts = urlsplit(self.cloud.endpoint or f"http://{own['host']}:{own.get('port', 80)}")
            secure = parts.scheme == "https"
            own = {"host": parts.hostname, "port": parts.port or (443 if secure else 80), "secure": secure}
        return (said["key"], said["secret"]), {"region": said["region"], "signature_version": "4", **own}

    def image(self, driver: Any) -> Any:
        from libcloud.compute.base import NodeImage

        return NodeImage(self.cloud.image, self.cloud.image, driver)  # listing all public ones would take minutes

    def special(self, uuid: str) -> dict[str, Any]:
        own = {**super().special(uuid), "ex_clienttoken": uuid, "ex_terminate_on_shutdown": True}
        groups = self.groups(self.made.ex_get_security_groups)
        if groups:
            own["ex_security_group_ids" if groups[0].startswith("sg-") else "ex_security_groups"] = groups
        if self.cloud.network:
            own["ex_subnet"] = SimpleNamespace(id=self.cloud.network)
        return own


def words(text: str) -> list[str]:
    """Return what commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def make_provider(cloud: Cloud, config: Config) -> Any:
    """Return the provider of a cloud: one of Libcloud's, or the class that PROVIDER names, which has the same methods."""
    if ":" in cloud.provider:
        return load_plugin(cloud.provider)(cloud, config)
    return {"openstack": OpenStackProvider, "ec2": Ec2Provider}.get(cloud.provider, LibcloudProvider)(cloud, config)
