"""Commands that call the running server, most of them for operators: token, pause, resume, clouds, delete, delete-user, export."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from joborch_plugins.caller import JobsError
from joborch_plugins.commands import DONE, Given, count_text, for_all, ids_text, named_jobs, printable, span_text

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOOPBACK_ONLY = (
    "But this server listens only on its own machine. Before you run that line elsewhere, set JOBORCH_PUBLIC_URL to the address of a "
    "gateway in front of it, or JOBORCH_HOST to an address to listen on, and restart it; or let the client call through an SSH tunnel."
)
TOKEN_FILE = "joborch-token"  # on the other machine
CONSOLE_LINES = 20  # of the last instance that did not join


def command_token(given: Given) -> int:
    """Make, list or revoke tokens of callers."""
    options = given.options
    if options.action == "list":
        return list_tokens(given)
    if not options.name:
        raise JobsError(f"token {options.action} needs a name, as in joborch token {options.action} portal-1")
    return add_token(given) if options.action == "add" else revoke_token(given)


def add_token(given: Given) -> int:
    """Make a token, and print it: alone to a pipe, with what to do next on a terminal."""
    options, screen, server = given.options, given.screen, given.jobs.server
    is_called_here = getattr(server, "host", "localhost") in LOOPBACK  # a Unix socket has no host
    fields = {"name": options.name, "role": options.role, "services": options.services, "user_id": options.user, "days": options.days}
    query = urlencode({name: value for name, value in fields.items() if value is not None})
    said = given.jobs.server.ask("POST", f"/tokens?{query}")
    if options.json:
        print(json.dumps(said))
        return DONE
    screen.say(
        said["token"] if said["role"] != "client" else join_line(said["url"] if is_called_here else server.url.rstrip("/"), said["token"])
    )
    until = f"until {said['expires_at']}" if said["expires_at"] else "until it is revoked"
    screen.note(f"This is shown once. The token {said['name']} is valid {until}, with the role {scope_text(said)}.")
    if said["role"] == "client":
        screen.note("Run that line on the machine of the client, next to joborch.pyz: it writes the token to a file and joins this server.")
        if said["only_here"] and is_called_here:
            screen.note(LOOPBACK_ONLY)
    else:
        screen.note("Callers send it as `Authorization: Bearer TOKEN`; people store it with `joborch login URL`.")
    return DONE


def join_line(url: str, token: str) -> str:
    """Return the line that starts a client with this token on another machine."""
    write = f"(umask 077; echo {token} >{TOKEN_FILE})"
    return f"{write}; python3 joborch.pyz client --join {shlex.quote(url)} --token-file {TOKEN_FILE}"


def list_tokens(given: Given) -> int:
    """Print the tokens, without their texts."""
    tokens = given.jobs.server.ask("GET", "/tokens")["tokens"]
    if given.options.json:
        print(json.dumps(tokens))
        return DONE
    rows = [
        [each["name"], scope_text(each), each["created_at"][:10], "expired" if each["expired"] else (each["expires_at"] or "-")[:10]]
        for each in tokens
    ]
    given.screen.table(("NAME", "ROLE", "MADE", "UNTIL"), rows)
    return DONE


def scope_text(token: dict[str, Any]) -> str:
    """Return a token's role, and whose jobs or which services it is for."""
    services = ", ".join(token["services"])
    whose = f" of user {token['user_id']}" if token["user_id"] is not None else f" of {services}" if services else ""
    return f"{token['role']}{whose}"


def revoke_token(given: Given) -> int:
    """Revoke a token."""
    said = given.jobs.server.ask("DELETE", f"/tokens/{quote(given.options.name, safe='')}")
    if given.options.json:
        print(json.dumps(said))
    else:
        given.screen.say(f"token {printable(said['name'])} is revoked")
    return DONE


def command_pause(given: Given) -> int:
    """Pause or resume a service."""
    options, place = given.options, f"/services/{quote(given.options.service, safe='')}"
    if options.command == "pause":
        said = given.jobs.server.ask("POST", f"{place}/pause?{urlencode({'reason': options.reason})}")
    else:
        said = given.jobs.server.ask("POST", f"{place}/resume")
    if options.json:
        print(json.dumps(said))
    else:
        given.screen.say(printable(said["paused"] or f"service {said['name']} is resumed"))
    return DONE


def command_clouds(given: Given) -> int:
    """List clouds with their instances and costs, say what would be done next, or end all instances."""
    options, server = given.options, given.jobs.server
    if options.end_all:
        said = server.ask("GET", "/clouds")
        count = sum(len(cloud["instances"]) for cloud in said["clouds"])
        given.screen.confirm(f"End all {count} instances, and make none until `joborch clouds --resume`?", options.yes)
    path = "/clouds/end-all" if options.end_all else "/clouds/resume" if options.resume else ""
    query = "" if options.user is None else f"?user_id={options.user}"
    said = server.ask("POST", path) if path else server.ask("GET", f"/clouds{query}")
    if options.json:
        print(json.dumps(said))
    elif options.plan:
        for line in plan_lines(said):
            given.screen.say(printable(line))
    else:
        list_clouds(given, said)
    return DONE


def plan_lines(said: dict[str, Any]) -> Iterator[str]:
    """Yield what would be made and ended next, and why."""
    plan = said["plan"]
    for cloud, count in plan["create"].items():
        yield f"make {count} in {cloud}"
    for name in plan["drain"]:
        yield f"drain {name}, and end it when it has no jobs"
    if not plan["create"] and not plan["drain"]:
        yield "make and end nothing"
    for reason in plan["reasons"]:
        yield f"- {reason}"


def list_clouds(given: Given, said: dict[str, Any]) -> None:
    """Print the clouds and their instances."""
    if not said["clouds"]:
        given.screen.say("this server has no clouds: see docs/clouds.md")
        return
    rows, instances = [], []
    for cloud in said["clouds"]:
        budget = "" if cloud["daily_budget"] is None else f" of {cloud['daily_budget']:g}"
        count = f"{len(cloud['instances'])} of {cloud['max']}"
        rows.append([cloud["name"], count, f"{cloud['spent_today']:.2f}{budget}", f"{cloud['spent']:.2f}", printable(cloud["held"] or "")])
        instances += [(cloud["name"], each) for each in cloud["instances"]]
    given.screen.table(("CLOUD", "INSTANCES", "TODAY", "IN ALL", "HELD BACK"), rows)
    if instances:
        given.screen.say()
        made = [[each["name"], each["state"], each["made_at"][:19], str(each["jobs"]), f"{each['cost']:.2f}"] for _, each in instances]
        given.screen.table(("INSTANCE", "STATE", "MADE", "JOBS", "COST"), made)
    list_costs(given, said)
    for each in [each for each in said["ended"] if each["console"]][:1]:
        given.screen.say(printable(f"\n{each['name']} was ended, because {each['reason']}. The end of its console log:"))
        for line in each["console"].splitlines()[-CONSOLE_LINES:]:
            given.screen.say(printable(f"  {line}"))


def list_costs(given: Given, said: dict[str, Any]) -> None:
    """Print what the clouds have cost by service and by user."""
    costs = []
    for cloud in said["clouds"]:
        costs += [(f"{cloud['name']}: {each['service']}", each) for each in cloud["by_service"]]
        idle = {"spent_today": cloud["unassigned_today"], "spent": cloud["unassigned"]}
        costs.append((f"{cloud['name']}: boots and idle slots", idle))
    costs += [(f"user {each['user_id']}", each) for each in said["by_user"]]
    if said["other_users"] is not None:
        costs.append((count_text(said["other_users"]["users"], "other user"), said["other_users"]))
    rows = [[what, f"{each['spent_today']:.2f}", f"{each['spent']:.2f}"] for what, each in costs if each["spent"]]
    if rows:
        given.screen.say()
        given.screen.table(("COST OF", "TODAY", "IN ALL"), rows)


def command_delete(given: Given) -> int:
    """Delete jobs for good, after a question."""
    jobs = named_jobs(given, given.options.jobs)
    given.screen.confirm(f"Delete {count_text(len(jobs), 'job')} ({ids_text(jobs)}) with all files for good?", given.options.yes)
    found = for_all(given, jobs, lambda job: job.delete(), "deleted")
    if given.options.json:
        print(json.dumps(found))
    for said in [] if given.options.json else found:
        given.screen.say(printable(f"job {said['id']}: {said['message']}"))
    return DONE


def command_delete_user(given: Given) -> int:
    """Delete all jobs of a user for good, after a question."""
    user = given.options.number
    given.screen.confirm(f"Stop and delete all jobs of user {user} with all files for good?", given.options.yes)
    said = given.jobs.delete_user(user)
    if given.options.json:
        print(json.dumps(said))
    else:
        given.screen.say(printable(f"user {user}, {count_text(said['jobs'], 'job')}: {said['message']}"))
    return DONE


SUMMARY_HEAD = ("MONTH", "SERVICE", "JOBS", "USERS", "FAILED", "SLOT HOURS", "CPU HOURS", "MEAN WAIT", "LONGEST")


def command_export(given: Given) -> int:
    """Print an export of jobs, or the sums by service and month."""
    options = given.options
    kind = "summary" if options.json else options.kind or "csv"
    parts = given.jobs.export(kind, since=options.since, until=options.until, service=options.service, user_id=options.user)
    if kind != "summary":
        for part in parts:
            sys.stdout.buffer.write(part)
        return DONE
    months = json.loads(b"".join(parts))["months"]
    if options.json:
        print(json.dumps(months))
        return DONE
    rows = [
        [
            *(each["month"], each["service"], f"{each['jobs']:,}", f"{each['users']:,}", f"{each['failed']:,}"),
            *(f"{each['slot_s'] / 3600:,.1f}", f"{each['cpu_s'] / 3600:,.1f}"),
            *("-" if each[name] is None else span_text(each[name]) for name in ("mean_wait_s", "longest_wait_s")),
        ]
        for each in months
    ]
    given.screen.table(SUMMARY_HEAD, rows)
    return DONE
