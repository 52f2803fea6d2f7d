"""The tokens of callers: routes for operators to make, list and revoke them. The check of a token is part of the core."""

from __future__ import annotations

import re
import socket
from typing import Any, cast

from joborch import (
    BAD,
    BIGGEST,
    DEFAULT_TOKEN,
    JSON_TYPE,
    NAME_OF_TOKEN,
    ROLES,
    SMALLEST,
    Answer,
    Caller,
    Gives,
    HttpError,
    Parameter,
    Request,
    Server,
    StoredToken,
    beyond_loopback,
    log,
    named_service,
    one_line,
    rfc3339,
    route,
)

RESERVED = (DEFAULT_TOKEN, "server")  # names of callers that have no token here


def read_name(text: str) -> str:
    """Return the name of a token."""
    if not re.fullmatch(NAME_OF_TOKEN, text):
        raise ValueError("give at most 63 of a-z, 0-9, - and _, beginning with a letter")
    if text in RESERVED:
        raise ValueError("this name is taken: give another one")
    return text


NAME = Parameter(
    "name",
    "query",
    "string",
    "how the log and the history of jobs call who has it",
    "portal-1",
    required=True,
    pattern=f"^{NAME_OF_TOKEN}$",
    missing="give the token a name",
    read=read_name,
)
ROLE = Parameter(
    "role", "query", "string", "what it allows", "portal", required=True, choices=ROLES, missing=f"give one of {', '.join(ROLES)}"
)
SERVICES = Parameter("services", "query", "string", "portal, client: only these services, separated by commas", "docking", default="")
USER = Parameter("user_id", "query", "integer", "user: the only user whose jobs it is for", 7, least=SMALLEST, most=BIGGEST)
DAYS = Parameter("days", "query", "integer", "how long it is valid; without it, until it is revoked", 30, least=1, most=36_500)
WITH_SERVICES = ("portal", "client")

EXAMPLE_TOKEN = {
    "name": "portal-1", "role": "portal", "services": ["docking"], "user_id": None, "created_at": "2026-11-28T09:30:00.000Z",
    "expires_at": "2026-12-28T09:30:00.000Z", "expired": False, "instance": None,
}  # fmt: skip
NEW_TOKEN = Gives(
    "the new token; its text `token` is shown only here. `url` is how other machines reach this server, unless `only_here`",
    JSON_TYPE,
    {**EXAMPLE_TOKEN, "url": "https://jobs.example.org", "only_here": False, "token": "joborch_..."},
)
TAKEN = Gives(
    "there is a token of this name", JSON_TYPE, {"message": "there is a token called portal-1: choose another name", "field": "name"}
)
NO_TOKEN = Gives("there is no token of this name", JSON_TYPE, {"message": "no token is called portal-9: `joborch token list` shows all"})


EXAMPLE_CALLER = {"name": "portal-1", "role": "portal", "services": ["docking"], "user_id": None, "proof": "token"}


def token_json(server: Server, token: StoredToken) -> dict[str, Any]:
    """Return what operators may see of a token."""
    said = {name: getattr(token, name) for name in ("name", "role", "user_id", "instance")}
    said.update(services=[*filter(None, token.services.split(","))], expired=server.token_store.has_expired(token))
    said.update({name: rfc3339(getattr(token, name)) for name in ("created_at", "expires_at")})
    return {name: said[name] for name in EXAMPLE_TOKEN}


def check_fit(role: str, services: str, user_id: int | None) -> None:
    """Raise HttpError 400 for a role that lacks a field, or that has one which would mean nothing."""
    if (role == "user") != (user_id is not None):
        remedy = "give the user's number" if role == "user" else f"leave it out, because {role} tokens are for no single user"
        raise HttpError(400, f"user_id is {'missing' if role == 'user' else 'given'}: {remedy}", "user_id")
    if services and role not in WITH_SERVICES:
        raise HttpError(400, f"services is given: leave it out, because {role} tokens are for all services", "services")
    if role == "client" and not services:
        raise HttpError(400, "services is missing: name those that the client serves", "services")


@route(
    "POST",
    "/tokens",
    "server",
    who="operator",
    takes=(NAME, ROLE, SERVICES, USER, DAYS),
    gives={201: NEW_TOKEN, 400: BAD, 409: TAKEN},
)
def add_token(server: Server, request: Request, name: str, role: str, services: str, user_id: int | None, days: int | None) -> Answer:
    """Make a token for a caller with a role. Only this answer contains its text."""
    names = ",".join(dict.fromkeys(named_service(server, each.strip()).name for each in services.split(",") if each.strip()))
    check_fit(role, names, user_id)
    if "services" in request.query and not names:  # such as an empty variable of a shell: it must not mean all services
        raise HttpError(400, "services names none: name some, or leave it out", "services")
    text = server.token_store.add(name, role, names, user_id, None if days is None else days * 86400.0)
    log.info("token %s (%s) was made", name, role)
    said = token_json(server, server.token_store.by_name[name])
    config = server.config
    url = config.public_url.rstrip("/") or f"http://{socket.gethostname()}:{config.port}"
    only_here = not (config.public_url or beyond_loopback(config.host))
    return Answer({**said, "url": url, "only_here": only_here, "token": text}, 201, {"Cache-Control": "no-store"})


@route("GET", "/whoami", "server", who=" ".join(ROLES), gives={200: Gives("who calls", JSON_TYPE, EXAMPLE_CALLER)})
def whoami(server: Server, request: Request) -> Answer:
    """Tell a caller its name, its role, and whose jobs or which services it is for."""
    caller = cast(Caller, request.caller)
    said = {"name": caller.name, "role": caller.role, "services": list(caller.services), "user_id": caller.user, "proof": caller.proof}
    return Answer(said)


@route("GET", "/tokens", "server", who="operator", gives={200: Gives("all tokens", JSON_TYPE, {"tokens": [EXAMPLE_TOKEN]})})
def list_tokens(server: Server, request: Request) -> Answer:
    """List the tokens by name: whom they are for, and until when; never their texts."""
    tokens = sorted(server.token_store.by_name.values())
    return Answer({"tokens": [token_json(server, token) for token in tokens]})


@route(
    "DELETE",
    "/tokens/<name>",
    "server",
    who="operator",
    takes=(NAME._replace(place="path", read=None),),
    gives={200: Gives("it is invalid from now on", JSON_TYPE, {"name": "portal-1"}), 404: NO_TOKEN},
)
def revoke_token(server: Server, request: Request, name: str) -> Answer:
    """Revoke a token: no further request may use it."""
    if not server.token_store.revoke(name):
        where = ": it is in JOBORCH_TOKEN, so change that setting" if name == DEFAULT_TOKEN else ": `joborch token list` shows all"
        raise HttpError(404, f"no token is called {one_line(name, 80)}{where}", "name")
    log.info("token %s was revoked", name)
    return Answer({"name": name})
