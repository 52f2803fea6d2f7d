"""A service can be paused: its uploads are accepted and wait, its jobs at clients continue."""

from __future__ import annotations

import sqlite3

from joborch import (
    EXAMPLE_SERVICE,
    JSON_TYPE,
    PAUSED_CLEAR,
    PAUSED_SET,
    Answer,
    Gives,
    HttpError,
    Parameter,
    Pause,
    Request,
    Server,
    log,
    one_line,
    route,
    service_json,
)

SERVICE_NAME = Parameter("name", "path", "string", "the name of a service", "example", required=True)
REASON = Parameter("reason", "query", "string", "why; it is shown to whoever waits", "the file server is down", default="", longest=200)
PAUSED = Gives(
    "the service, paused",
    JSON_TYPE,
    {**EXAMPLE_SERVICE, "paused": "service example is paused since 2026-11-24T09:00:00.000Z by default: the file server is down"},
)
RESUMED = Gives("the service", JSON_TYPE, EXAMPLE_SERVICE)
NO_SERVICE = Gives("no service has this name", JSON_TYPE, {"message": "no service is called dcking: give one of docking, example"})


def store_pause(server: Server, name: str, pause: Pause | None) -> None:
    """Store that something is paused, or is not; both also count after a restart."""
    before = server.paused

    def undo() -> None:
        server.paused = before

    def change(db: sqlite3.Connection) -> None:
        """Claims are made in transactions, too, so none is made after this one."""
        server.store.core.after(lambda: None, undo)
        kept = {service: each for service, each in before.items() if service != name}
        server.paused = {**kept, **({name: pause} if pause is not None else {})}
        if pause is None:
            db.execute(PAUSED_CLEAR, {"service": name})
        else:
            db.execute(PAUSED_SET, pause._asdict())

    server.store.write(change)


def set_pause(server: Server, request: Request, name: str, pause: Pause | None) -> Answer:
    """Pause a service, or resume it. Raises HttpError 404."""
    if name not in server.services and (pause is not None or name not in server.paused):
        raise HttpError(404, f"no service is called {one_line(name, 80)}: give one of {', '.join(sorted(server.services))}")
    store_pause(server, name, pause)
    log.info("%s", pause.text() if pause is not None else f"service {name} is resumed")
    server.dispatch()
    service = server.services.get(name)
    return Answer(service_json(server, service, request.caller) if service else {"name": name, "paused": None})


@route("POST", "/services/<name>/pause", "server", who="operator", takes=(SERVICE_NAME, REASON), gives={200: PAUSED, 404: NO_SERVICE})
def pause_service(server: Server, request: Request, name: str, reason: str) -> Answer:
    """Send no more jobs of a service until it is resumed, also after a restart. Uploads wait; its jobs at clients continue."""
    caller = request.caller.name if request.caller else ""
    return set_pause(server, request, name.lower(), Pause(name.lower(), server.clock.wall(), caller, reason.strip()))


@route("POST", "/services/<name>/resume", "server", who="operator", takes=(SERVICE_NAME,), gives={200: RESUMED, 404: NO_SERVICE})
def resume_service(server: Server, request: Request, name: str) -> Answer:
    """Send the jobs of a paused service again."""
    return set_pause(server, request, name.lower(), None)
