"""How a running process takes changed settings: SIGHUP reads --env-file again, and `config --check` says what that would do."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from joborch import (
    BAD,
    EXIT_DONE,
    JSON_TYPE,
    LOOK_AGAIN_S,
    QUEUED_OF_SERVICE,
    QUEUED_SERVICES,
    RECEIVING,
    SETTINGS,
    Answer,
    Cause,
    Client,
    Config,
    ConfigError,
    Gives,
    HttpError,
    Link,
    Loop,
    Node,
    Parameter,
    Reason,
    Request,
    ResultLimits,
    Server,
    Service,
    Sharing,
    Status,
    StorageError,
    change_limits,
    check_certificates,
    check_config,
    discard,
    ensure_client_token,
    format_duration,
    load_config,
    load_plugin,
    log,
    loops_of,
    plural,
    read_env_text,
    route,
    set_up_logging,
    setting_values,
    shown_value,
    weak_setups,
)

# == Changes ==  What differs between the settings in force and those of the file, and what needs a restart.

# Fields of Config that a running process takes over, besides services and the options of batch systems.
TAKEN = {
    "max_age_s", "token", "token_file", "slots", "memory_bytes", "batch_interval_s", "vanish_grace_s", "dirac_quiet_s", "kill_grace_s",
    "log_limit_bytes", "share_half_life_s", "ageing_s", "weights", "max_queued_per_user", "max_stored_bytes", "uploads_per_minute",
    "keep_fetched_s", "keep_rows_s", "max_result_bytes", "max_result_files", "min_free_bytes", "log_level", "log_format",
    "access_log", "callback_hosts", "callback_on", "callback_secret", "callback_secret_file",
}  # fmt: skip


LEVELS = ("debug", "info", "warning", "error")


class Change(NamedTuple):
    """One setting that differs; values of secrets are masked."""

    name: str
    before: str
    after: str
    taken: bool  # by a running process; else it needs a restart

    def text(self) -> str:
        """Return it as a line of the log."""
        text = f"{self.name}: {self.before or '-'} -> {self.after or '-'}"
        return text if self.taken else f"{text} needs a restart"


def changed_url(old: Config, new: Config) -> Iterator[Change]:
    """Yield clients that have the same name by another URL, as when http becomes https."""
    known = {address.name: address for service in old.services.values() for address in service.addresses}
    for service in new.services.values():
        for address in service.addresses:
            before = known.get(address.name, address)
            if before != address:
                urls = (before.base_url or before.upload_url, address.base_url or address.upload_url)
                yield Change(f"client {address.name}", urls[0], urls[1], taken=False)


def changes_between(old: Config, new: Config) -> list[Change]:
    """Return the settings that differ; a service that comes or goes is one change."""
    found = [Change(f"service {name}", "", new.services[name].text, True) for name in new.services.keys() - old.services.keys()]
    found += [Change(f"service {name}", old.services[name].text, "", True) for name in old.services.keys() - new.services.keys()]
    both = new.services.keys() & old.services.keys()
    sides = []
    for config in (old, new):
        kept = dataclasses.replace(config, services={name: config.services[name] for name in sorted(both)})
        sides.append({name: (setting, value) for name, setting, value in setting_values(kept)})
    before, after = sides
    for name in [*before, *(name for name in after if name not in before)]:
        setting = (before.get(name) or after[name])[0]
        values = [side[name][1] if name in side else None for side in sides]
        if values[0] != values[1]:
            shown = [shown_value(value, setting.secret) for value in values]
            if setting.secret and all(shown):
                shown[1] = "*** (another one)"
            is_own = any(setting.name == each.name for each in SETTINGS)
            found.append(Change(name, shown[0], shown[1], taken=setting.field in TAKEN if is_own else True))
    return [*found, *changed_url(old, new)]


def merged(old: Config, new: Config) -> Config:
    """Return the settings in force after a reload: the new ones, apart from those that need a restart."""
    kept = {setting.field: getattr(old, setting.field) for setting in SETTINGS if setting.field not in TAKEN}
    return dataclasses.replace(new, **kept)


def read_again(config: Config, file_text: str | None = None) -> Config:
    """Return the settings with --env-file as it is now, or with `file_text` for it. Raises ConfigError if they cannot be used."""
    arguments, environment = config.origin
    if config.env_file:
        file_text = read_env_text(config.env_file) if file_text is None else file_text
        if not file_text.strip() and "--env-file" in config.sources.values():
            remedy = "write it again; if no setting is wanted, leave a comment in it"
            raise ConfigError(f"--env-file {config.env_file} is empty, so it may be only half written: {remedy}")
    new = load_config(config.mode, arguments, environment, file_text)
    if config.mode == "client" and not new.token and not new.allow_anonymous:
        new = ensure_client_token(new)
    check_certificates(new.ca_file)
    for finding in weak_setups(new):
        if finding.good is False:
            raise ConfigError(finding.text)
    check_together(new, merged(config, new))
    return new


def check_together(new: Config, both: Config) -> None:
    """Raise ConfigError if new settings do not fit those that stay in force until a restart.

    Without its token, a server admits whom the other settings admit, and perhaps the file has changed these, too.
    """
    names = {"host": "JOBORCH_HOST", "allow_anonymous": "JOBORCH_ALLOW_ANONYMOUS", "allow_from": "JOBORCH_ALLOW_FROM"}
    late = [name for field, name in names.items() if getattr(new, field) != getattr(both, field)]
    if late and not both.token:
        raise ConfigError(f"a reload cannot remove JOBORCH_TOKEN and change {', '.join(late)} at once: restart the server instead")
    check_config(both)


# == Reload ==  All or nothing: what can fail comes first, and is one transaction.


class Reload:
    """Takes changed settings. Removed clients stay known until their last job is over."""

    def __init__(self, node: Node) -> None:
        self.node, self.lock = node, threading.Lock()
        self.trouble = ("", "")  # why the settings in force are not those of the file, and the remedy; /health shows it
        self.removed: dict[str, Service] = {}  # services that a reload removed, as they were
        self.missing: dict[str, float] = {}  # services with queued jobs that are not configured: since when (monotonic)

    def start(self) -> None:
        """Add the loop that looks after what was removed."""
        if isinstance(self.node, Server):
            self.node.loops["removed"] = Loop(
                "removed", functools.partial(look_after, self, self.node), lambda: self.node.pool, LOOK_AGAIN_S
            )

    def committed(self, moves: Iterable[Any]) -> None:
        """Moves of jobs change no settings."""

    def signalled(self, number: int) -> None:
        """Act on a signal. The main thread calls it, so the work is done in another one."""
        if number == signal.SIGHUP:
            self.node.pool.add(self.reload)
        else:
            log.info("%s is ignored", signal.Signals(number).name)

    def reload(self) -> bool:
        """Read the settings again. Return whether they could be used; if not, nothing was changed."""
        with self.lock:
            old = self.node.config
            source = f"--env-file {old.env_file}" if old.env_file else "the settings (there is no --env-file, and the environment is fixed)"
            log.info("reload: reading %s again", source)
            try:
                new = read_again(old)
                changes = changes_between(old, new)
                if isinstance(self.node, Server):
                    change_server(self, self.node, merged(old, new))
                else:
                    self.node.config = merged(old, new)
            except (ConfigError, StorageError) as error:
                log.error("reload: nothing was changed: %s", error)
                self.trouble = (f"the last reload changed nothing: {error}", "correct the settings, and reload again")
                return False
            late = ", ".join(change.name for change in changes if not change.taken)
            self.trouble = (f"changed settings wait for a restart: {late}", "restart it: jobs continue") if late else ("", "")
            refresh_copies(self.node, old)
            is_quieter = LEVELS.index(new.log_level) > LEVELS.index(old.log_level)
            if not is_quieter and (new.log_level, new.log_format) != (old.log_level, old.log_format):
                set_up_logging(new)
            for change in changes:
                log.log(logging.INFO if change.taken else logging.WARNING, "reload: %s", change.text())
            for warning in new.warnings:
                if warning not in old.warnings:
                    log.warning("%s", warning)
            log.info("reload: %s", plural(len(changes), "change", "changes") or "no setting has changed")
            if is_quieter:  # the lines above are not lost
                set_up_logging(new)
            return True


def refresh_copies(node: Node, old: Config) -> None:
    """Give the new settings to everything that keeps a copy of one."""
    config = node.config
    node.data.keep_free(config.min_free_bytes, packs_below_minimum=config.mode == "client")
    if config.token != old.token:
        node.tokens = tuple(token.strip() for token in config.token.split(",") if token.strip())
        node.proofs.tokens = node.tokens
    if isinstance(node, Client):
        node.limits = ResultLimits(config.max_result_bytes, config.max_result_files)
        executor: Any = node.executor
        if node.local:
            executor.kill_grace_s, executor.options = config.kill_grace_s, config.batch_options
        elif hasattr(executor, "config"):
            executor.config = config
        node.plugins["health"].seen += 1  # so that servers that wait for news ask for its slots
        node.store.core.wake_all()
        node.wake("run")
    else:
        node.plugins["metrics"].begin(config.services.keys() - old.services.keys())
        try:
            node.plugins["webhooks"].configure()
        except ConfigError as error:
            log.error("reload: webhooks are sent as before: %s", error)


def change_server(plugin: Reload, server: Server, config: Config) -> None:
    """Take services and their clients in one transaction, the rules of turns with them. Raises StorageError; then all is as before.

    Claims are made in transactions, too. So none is made by the old services after this one.
    """
    old, old_links = server.config, server.links
    links = server.links_for(config.services)
    switch = Switch(server, config, links)
    server.store.write(switch.make)
    new_loops = {name: loop for link in links.values() if link.name not in old_links for name, loop in loops_of(server, link).items()}
    server.loops = {**server.loops, **new_loops}
    for loop in new_loops.values():
        loop.start()
    kept = {name: service for name, service in plugin.removed.items() if name not in config.services}
    plugin.removed = {**kept, **{name: service for name, service in old.services.items() if name not in config.services}}
    server.dispatch()


class Switch:
    """Replaces services, links and settings of a server inside a transaction, and puts them back if that is rolled back."""

    def __init__(self, server: Server, config: Config, links: Mapping[str, Link]) -> None:
        gone = {name: link for name, link in server.links.items() if name not in links}
        self.server, self.sharing = server, Sharing(config.share_half_life_s, config.ageing_s, config.weights)
        self.links = {**links, **gone}
        self.new: dict[str, Any] = {"config": config, "services": config.services, "links": self.links}
        self.old = {name: getattr(server, name) for name in self.new}
        self.of_links = {name: (server.services_at(link, config.services), False) for name, link in links.items()}
        self.of_links.update((name, (link.services, True)) for name, link in gone.items())  # its services have its tokens
        self.before = {name: (link.services, link.leaving) for name, link in self.links.items()}

    def make(self, db: sqlite3.Connection) -> None:
        """Switch inside a transaction."""
        self.server.store.core.after(lambda: None, self.undo)
        self.set(self.new, self.of_links)
        change_limits(self.server.store, db, self.server.services, self.sharing)

    def undo(self) -> None:
        """Put everything back."""
        self.set(self.old, self.before)

    def set(self, values: Mapping[str, Any], of_links: Mapping[str, tuple[list[Service], bool]]) -> None:
        """Give the server these values, and each link its services and whether it is leaving."""
        for name, (services, leaving) in of_links.items():
            self.links[name].services, self.links[name].leaving = services, leaving
            self.links[name].wrong_tokens.worked()  # it may have another one now
        vars(self.server).update(values)


# == What was removed ==


def look_after(plugin: Reload, server: Server) -> bool:
    """Forget removed clients that have no more jobs, and fail jobs whose service has been away for long."""
    done = {name: link for name, link in server.links.items() if link.leaving and is_done(server, link)}
    if done:
        with plugin.lock:
            done = {name: link for name, link in done.items() if link.leaving}  # a reload may have brought one back
            server.links = {name: link for name, link in server.links.items() if name not in done}
            over = {name: loop for name, loop in server.loops.items() if name.partition(":")[2] in done}
            for loop in over.values():
                loop.stop()
            server.loops = {name: loop for name, loop in server.loops.items() if name not in over}
        log.info("%s: no jobs are left there, and the server no longer calls it", ", ".join(f"client {name}" for name in sorted(done)))
    fail_without_service(plugin, server)
    return False


def is_done(server: Server, link: Link) -> bool:
    """Tell whether a client that was removed is no longer needed: it has no jobs, and knows which results are fetched."""
    has_work = server.store.load(link.name).jobs or link.outbox or link.sending or link.reports()
    return not has_work and (bool(link.outage.failures) or not (link.confirmed_ids or link.superseded_attempts))


def fail_without_service(plugin: Reload, server: Server) -> None:
    """Fail queued jobs of services that have not been configured for UNREACHABLE_AFTER."""
    now, names = server.clock.monotonic(), [str(row["service"]) for row in server.store.read(QUEUED_SERVICES)]
    plugin.missing = {name: plugin.missing.get(name, now) for name in names if name not in server.services}
    for name, since in plugin.missing.items():
        after_s = plugin.removed.get(name, Service(name, ())).unreachable_after_s
        if now - since <= after_s:
            continue
        for job in server.store.jobs(QUEUED_OF_SERVICE, service=name, before=server.store.steady() - after_s):
            reason = Reason.NO_SERVICE.format(service=name, duration=format_duration(after_s))
            server.store.move(job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)


# == The route ==

FILE_TEXT = Parameter(
    "settings", "form", "string", "the NAME=VALUE lines of an --env-file", "SERVICE_DOCKING_MAX_RUNS=20", required=True, default=""
)
EXAMPLE_CHECK: Mapping[str, Any] = {
    "changes": [{"name": "SERVICE_DOCKING_MAX_RUNS", "before": "10", "after": "20", "taken": True}], "warnings": [],
}  # fmt: skip
CHECKED = Gives("what would change; `taken` is false if it needs a restart", JSON_TYPE, EXAMPLE_CHECK)


@route(
    "POST", "/settings/check", "server client", who="operator", slow=True, takes=(FILE_TEXT,), gives={200: CHECKED, 400: BAD, **RECEIVING}
)
def check_settings(node: Node, request: Request) -> Answer:
    """Say what a reload would change if --env-file had these lines; nothing is changed."""
    folder = Path(tempfile.mkdtemp(prefix="settings-", dir=node.data.tmp))
    try:
        text = request.read_form(folder).fields.get("settings", "")
    finally:
        discard(folder)
    try:
        new = read_again(node.config, text)
    except ConfigError as error:
        raise HttpError(400, str(error), "settings") from error
    changes = [change._asdict() for change in changes_between(node.config, new)]
    return Answer({"changes": changes, "warnings": list(new.warnings)})


# == The command ==


def command_check(config: Config, file: str, as_json: bool) -> int:
    """Print what a file of settings would change in the running process; if none runs, how it differs from the defaults."""
    arguments, environment = config.origin
    checked = load_config(config.mode, {**arguments, "env_file": file}, environment)
    text = read_env_text(file)
    said = load_plugin("admin").own_answer(config, "POST", "/settings/check", {"settings": text})
    if said is None:
        defaults = load_config(config.mode, {}, {})
        said = {"changes": [each._asdict() for each in changes_between(defaults, checked)], "warnings": list(checked.warnings)}
        print(f"no {config.mode} of this user runs on port {config.port}: this is how {file} differs from the defaults", file=sys.stderr)
    elif "changes" not in said:
        raise ConfigError(str(said.get("message", "the running process does not understand the question: is it an older version?")))
    if as_json:
        print(json.dumps(said, indent=2))
    for each in said["changes"] if not as_json else ():
        print(f"{each['name']}: {each['before'] or '-'} -> {each['after'] or '-'}" + ("" if each["taken"] else " needs a restart"))
    if not said["changes"] and not as_json:
        print("nothing would change")
    for warning in said["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_DONE
