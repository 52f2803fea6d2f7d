"""What in the settings lets other users in, what looks forgotten, and what a server has to know: for the start and for `joborch doctor`.

1. Weak set-ups
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from joborch_base.data_folder import DataFolder, examine_place, examine_secret_file, is_strangers, owner_name
from joborch_base.identity import client_token_file, token_place
from joborch_base.settings import Config, beyond_loopback, is_loopback, url_host
from joborch_base.vocabulary import Finding, host_of, load_plugin, plural

# == 1. Weak set-ups ==  A set-up that lets other users in is refused, or gives a warning at every start.

TOKEN_LEAST = 16  # characters; shorter tokens can be guessed
NEW_TOKEN = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' prints one"


def weak_setups(config: Config) -> Iterator[Finding]:
    """Yield what lets other users in, with the remedy. A start refuses False findings and warns of the others."""
    if os.geteuid() == 0 and config.isolation != "user":  # which needs root, and runs no script as root
        what = "so do its scripts, from which nothing is hidden" if config.mode == "client" else "it does not need that"
        yield Finding(None, f"this {config.mode} runs as root: {what}; run it as a separate user, for example with User= in a systemd unit")
    yield from weak_tokens(config)
    for path, what in secret_files(config):
        remedy = "joborch sets its mode to 0600 at the start; others may know the old token, so remove the file to get a new one"
        made_by_us = config.mode == "client" and what == CLIENT_TOKEN
        yield from examine_secret_file(path, what, remedy if made_by_us else "")
        found = examine_place(os.path.dirname(os.path.abspath(os.path.expanduser(path))), f"{what}'s folder")
        # DIRAC's own program decides where its login is kept: warn only.
        yield from (finding._replace(good=None) if "DIRAC" in what else finding for finding in found)
    if config.clouds:
        yield from load_plugin("joborch_plugins.cloud_providers:weak_clouds")(config)
    yield from DataFolder(config.data_path).weak_spots()
    if config.db_path != ":memory:" and os.path.dirname(os.path.realpath(config.db_path)) != os.path.realpath(config.data_path):
        yield from examine_place(os.path.dirname(os.path.abspath(config.db_path)), "DB_PATH")
        if os.path.exists(config.db_path) and is_strangers(owner := os.stat(config.db_path).st_uid, Path(config.db_path).parent):
            yield Finding(False, f"DB_PATH is {config.db_path!r}, which belongs to {owner_name(owner)}: use your own file")


def weak_tokens(config: Config) -> Iterator[Finding]:
    """Yield tokens that can be guessed, or that other users of this machine can read."""
    shortest = min(map(len, filter(None, config.token.split(","))), default=TOKEN_LEAST)
    if shortest < TOKEN_LEAST:
        where = f", and JOBORCH_HOST={config.host} lets other machines try" if beyond_loopback(config.host) else ""
        how_long = plural(shortest, "character", "characters")
        yield Finding(None, f"JOBORCH_TOKEN has a token of {how_long}{where}: use at least {TOKEN_LEAST}; {NEW_TOKEN}")
    if config.sources.get("JOBORCH_TOKEN", "").startswith("flag"):
        yield Finding(None, "the token was given as --token, which every user of this machine can see with ps: set JOBORCH_TOKEN_FILE")
    for service in config.services.values():
        beyond = not all(is_loopback(host_of(address.upload_url)[1]) for address in service.addresses)
        if beyond and 0 < len(service.token) < TOKEN_LEAST:
            name = f"SERVICE_{service.name.upper()}_TOKEN"
            how_long = plural(len(service.token), "character", "characters")
            yield Finding(None, f"{name} has {how_long}: use at least {TOKEN_LEAST}; {NEW_TOKEN}")


CLIENT_TOKEN = "the client's token file"


def secret_files(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the files with tokens for these settings, each with its name for messages."""
    if config.token_file and config.sources.get("JOBORCH_TOKEN") == "default":
        yield config.token_file, "JOBORCH_TOKEN_FILE"
    if config.callback_secret_file:
        yield config.callback_secret_file, "JOBORCH_CALLBACK_SECRET_FILE"
    for service in config.services.values():
        if service.token_file and f"SERVICE_{service.name.upper()}_TOKEN" not in config.sources:
            yield service.token_file, f"SERVICE_{service.name.upper()}_TOKEN_FILE"
    for cloud in config.clouds.values():
        if cloud.credentials:
            yield cloud.credentials, f"CLOUD_{cloud.name.upper()}_CREDENTIALS"
    if config.env_file and any(config.sources.get(name) == "--env-file" for name in token_names(config)):
        yield config.env_file, "--env-file"
    own = client_token_file()
    by_service = any(not service.token for service in config.services.values())
    if own and (by_service if config.mode == "server" else not config.token and not config.allow_anonymous):
        yield str(own), CLIENT_TOKEN
    if config.mode == "client" and config.executor == "dirac":
        yield config.dirac_credentials, "JOBORCH_DIRAC_CREDENTIALS"


def token_names(config: Config) -> list[str]:
    """Return the names of the settings that are secrets."""
    return [
        "JOBORCH_TOKEN",
        "JOBORCH_CALLBACK_SECRET",
        *(name for name in config.sources if name.startswith("SERVICE_") and name.endswith("_TOKEN")),
    ]


def is_on_login_node(config: Config) -> bool:
    """Tell whether a client would run payloads on this machine, which can submit jobs to Slurm."""
    return config.executor == "local" and shutil.which("sbatch") is not None


def forgotten_executor(config: Config) -> list[str]:
    """Return a question if a client would run payloads on what looks like the login node of a cluster; else nothing."""
    if not is_on_login_node(config) or config.sources.get("JOBORCH_EXECUTOR") != "default":
        return []
    return ["this machine has sbatch: payloads would run on this login node; did you mean JOBORCH_EXECUTOR=slurm? (else set local)"]


def lines_for_server(config: Config) -> list[str]:
    """Return the lines of a server's --env-file for this client, which listens. The operator chooses the name of the service."""
    hosts = [host.strip() for host in config.host.split(",")]
    open_to = next((host for host in hosts if not is_loopback(host)), hosts[0])
    host = socket.gethostname() if open_to in ("0.0.0.0", "::") else open_to
    lines = [f"SERVICE_EXAMPLE_CLIENTS=http://{url_host(host)}:{config.port}"]
    if config.token:
        in_file = config.sources.get("JOBORCH_TOKEN", "default") == "default"
        lines.append(f"SERVICE_EXAMPLE_TOKEN_FILE={token_place(config) if in_file else '(a file with the JOBORCH_TOKEN of this client)'}")
    return lines


def start_command(url: str) -> str:
    """Return how to start a client that answers at a URL; empty for a 2.2 client, which has three."""
    if not url:
        return ""
    (place, host), scheme = host_of(url), url.partition(":")[0]
    port = (re.findall(r":([0-9]+)$", place) or [{"http": "80", "https": "443"}[scheme]])[0]
    flags = ("" if is_loopback(host) else f" --host {host}") + ("" if port == "9000" else f" --port {port}")
    return f"has not been started yet: start it with `joborch client{flags}`" + ("" if is_loopback(host) else f" on {host}")
