"""What in the settings lets other users in, and what looks forgotten: for the start and for `joborch doctor`.

1. Weak set-ups
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from joborch_base.data_folder import DataFolder, examine_place, examine_secret_file, is_strangers, owner_name
from joborch_base.identity import client_token_file
from joborch_base.settings import Config, beyond_loopback, is_loopback
from joborch_base.vocabulary import Finding, host_of, plural

# == 1. Weak set-ups ==  A set-up that lets other users in is refused, or gives a warning at every start.

TOKEN_LEAST = 16  # characters; shorter tokens can be guessed
NEW_TOKEN = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' prints one"


def weak_setups(config: Config) -> Iterator[Finding]:
    """Yield what lets other users in, with the remedy. A start refuses False findings and warns of the others."""
    if os.geteuid() == 0:
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
    for service in config.services.values():
        if service.token_file and f"SERVICE_{service.name.upper()}_TOKEN" not in config.sources:
            yield service.token_file, f"SERVICE_{service.name.upper()}_TOKEN_FILE"
    if config.env_file and any(config.sources.get(name) == "--env-file" for name in token_names(config)):
        yield config.env_file, "--env-file"
    own = client_token_file()
    by_service = any(not service.token for service in config.services.values())
    if own and (by_service if config.mode == "server" else not config.token and not config.allow_anonymous):
        yield str(own), CLIENT_TOKEN
    if config.mode == "client" and config.executor == "dirac":
        yield config.dirac_credentials, "JOBORCH_DIRAC_CREDENTIALS"


def token_names(config: Config) -> list[str]:
    """Return the names of the settings that are tokens."""
    return ["JOBORCH_TOKEN", *(name for name in config.sources if name.startswith("SERVICE_") and name.endswith("_TOKEN"))]


def forgotten_executor(config: Config) -> list[str]:
    """Return a question if a client would run payloads on what looks like the login node of a cluster; else nothing."""
    forgotten = config.executor == "local" and config.sources.get("JOBORCH_EXECUTOR") == "default"
    if not forgotten or shutil.which("sbatch") is None:
        return []
    return ["this machine has sbatch, but payloads would run on it directly: did you mean JOBORCH_EXECUTOR=slurm? (else set local)"]
