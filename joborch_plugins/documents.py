"""Documents made from the declared routes: OpenAPI and Swagger UI."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from joborch import (
    BAD,
    JSON_TYPE,
    Answer,
    Gives,
    HttpError,
    Node,
    Parameter,
    Request,
    Route,
    Server,
    __version__,
    own_file,
    route,
    routes_of,
)

# == Page and documents ==  They are made from the declared routes, and need no other machine.

SWAGGER_FOLDER = "joborch_plugins/swagger-ui/"  # only in joborch.pyz
SWAGGER_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "favicon-32x32.png": "image/png"}
SWAGGER_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>joborch</title><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="swagger-ui.css"><link rel="icon" href="favicon-32x32.png"></head>
<body><div id="swagger-ui"></div><script src="swagger-ui-bundle.js"></script><script src="start.js"></script></body>
</html>
"""
ROUTES_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>joborch {mode}</title><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font-family: sans-serif; margin: 2em; }} td {{ padding: 0.2em 1.5em 0.2em 0; vertical-align: top; }}</style></head>
<body><h1>joborch {mode}</h1>
<p>These are the routes. <a href="/api-docs/openapi.json">OpenAPI 3.1</a> describes their parameters and answers, for any viewer.
joborch.pyz includes such a viewer, Swagger UI; this copy of joborch does not.</p>
<table>
{rows}
</table></body>
</html>
"""
SWAGGER_START = 'SwaggerUIBundle({url: "/api-docs/openapi.json", dom_id: "#swagger-ui", validatorUrl: null});\n'
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


BEGINNINGS = {
    "server": "Begin with `POST /upload`: send `run.sh` and the files it needs. The answer has the `id` of the job. "
    "`GET /jobs/ID/result?wait=45` waits for the result and returns it.",
    "client": "A server calls these routes; people call the server.",
}
TAGS = (  # the first one whose pattern fits the path
    ("page", "the web page", r"^/(dashboard|session)(/|$)"),
    ("results", "results, output and single files", r"/(download|download_partial|retrieve|retrieve_partial|result|files|file|logs)(/|$)"),
    ("jobs", "from upload to end", r"^/(upload|jobs|terminate|submit|kill|events|changes)(/|$)"),
    ("site", "for operators: services, clients, users, tokens", r"^/(services|clients|users|tokens|whoami)(/|$)"),
    ("process", "the process itself, and this description", ""),
)


def openapi(mode: str, services: Sequence[str] = ()) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of the routes of one mode, with the names of these services as what `service` may be."""
    paths: dict[str, dict[str, Any]] = {}
    for each in routes_of(mode):
        takes = (taken._replace(choices=tuple(services)) if taken.name == "service" else taken for taken in each.takes)
        declared = dataclasses.replace(each, takes=tuple(takes))
        path = re.sub(r"<(\w+)(:path)?>", r"{\1}", declared.path)
        paths.setdefault(path, {})[declared.method.lower()] = openapi_operation(declared)
        if declared.method == "GET":
            head = openapi_operation(declared)
            head["operationId"] += "_head"
            head["responses"] = {code: {"description": said["description"]} for code, said in head["responses"].items()}
            paths[path]["head"] = head
    used = {operation["tags"][0] for operations in paths.values() for operation in operations.values()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"joborch {mode}",
            "version": __version__,
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": BEGINNINGS[mode],
        },
        "tags": [{"name": name, "description": meaning} for name, meaning, _ in TAGS if name in used],
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def openapi_operation(declared: Route) -> dict[str, Any]:
    """Return one operation of the description."""
    operation: dict[str, Any] = {
        "operationId": declared.handler.__name__,
        "summary": declared.summary,
        "tags": [next(name for name, _, paths in TAGS if re.search(paths, declared.path))],
        "responses": {str(code): openapi_response(said) for code, said in sorted(declared.gives.items())},
        "security": [{}, {"token": []}] if "operator" in declared.who else [{}],
    }
    operation["responses"].setdefault("400", openapi_response(BAD))  # for unknown parameters
    if "operator" in declared.who:
        for code, text in ((401, "no token, or a wrong one"), (403, "not from here")):
            operation["responses"].setdefault(
                str(code),
                openapi_response(Gives(text, JSON_TYPE, {"message": "a token is needed: send the header Authorization: Bearer TOKEN"})),
            )
    plain = [parameter for parameter in declared.takes if parameter.place != "form"]
    if plain:
        operation["parameters"] = [openapi_parameter(parameter) for parameter in plain]
    if declared.takes_form:
        operation["requestBody"] = openapi_form([parameter for parameter in declared.takes if parameter.place == "form"])
    return operation


def openapi_response(said: Gives) -> dict[str, Any]:
    """Return one response of an operation, with its example."""
    response: dict[str, Any] = {"description": said.meaning}
    types: dict[str, Any] = {name: {} for name in (said.content, *said.also) if name}
    if said.content == JSON_TYPE:
        types[JSON_TYPE] = {"schema": openapi_schema_of(said.example), "example": said.example}
    if types:
        response["content"] = types
    return response


def openapi_schema_of(example: Any) -> dict[str, Any]:
    """Return the JSON type of an example. The fields of objects are not declared: they may be null, and there may be more."""
    return {"type": "object"} if isinstance(example, dict) else {"type": "number"}


def openapi_parameter(parameter: Parameter) -> dict[str, Any]:
    """Return one parameter of an operation, with its example."""
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required,
        "description": parameter.help,
        "schema": openapi_schema(parameter),
        "example": parameter.example,
    }


def openapi_schema(parameter: Parameter) -> dict[str, Any]:
    """Return the JSON schema of a parameter."""
    if parameter.kind == "file":
        return {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "description": parameter.help}
    bounds = {name: value for name, value in (("minimum", parameter.least), ("maximum", parameter.most)) if value is not None}
    allowed = {
        **({"enum": list(parameter.choices)} if parameter.choices else {}),
        **({"pattern": parameter.pattern} if parameter.pattern else {}),
        **({"maxLength": parameter.longest} if parameter.longest is not None else {}),
    }
    return {"type": parameter.kind, **bounds, **allowed}


def openapi_form(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Return the request body of a route that takes a form."""
    properties = {parameter.name: {**openapi_schema(parameter), "description": parameter.help} for parameter in parameters}
    for parameter in parameters:
        if parameter.example is not None:
            properties[parameter.name]["examples"] = [parameter.example]
    schema = {"type": "object", "properties": properties, "required": [parameter.name for parameter in parameters if parameter.required]}
    return {"required": bool(schema["required"]), "content": {"multipart/form-data": {"schema": schema}}}


def routes_page(mode: str) -> str:
    """Return the page that lists the routes, for a copy of joborch without Swagger UI."""
    rows = []
    for declared in routes_of(mode):
        path = escape(re.sub(r"<(\w+)(:path)?>", r"{\1}", declared.path))
        shown = f'<a href="{path}">{path}</a>' if declared.method == "GET" and "{" not in path else path
        rows.append(f"<tr><td>{declared.method}</td><td>{shown}</td><td>{escape(declared.summary)}</td></tr>")
    return ROUTES_PAGE.format(mode=mode, rows="\n".join(rows))


@route(
    "GET", "/api-docs/openapi.json", "server client", who="anyone", gives={200: Gives("this description", JSON_TYPE, {"openapi": "3.1.0"})}
)
def show_openapi(node: Node, request: Request) -> Answer:
    """Describe the HTTP interface as OpenAPI 3.1.

    Only a known caller sees which services there are.
    """
    services = sorted(node.services) if isinstance(node, Server) and request.caller is not None else ()
    return Answer(openapi(node.config.mode, services))


@route("GET", "/swagger", "server client", who="anyone", gives={302: Gives("to /swagger-ui/")})
def swagger_redirect(node: Node, request: Request) -> Answer:
    """Send a browser to Swagger UI."""
    return Answer(None, 302, {"Location": "/swagger-ui/"})


@route("GET", "/swagger-ui", "server client", who="anyone", gives={302: Gives("to /swagger-ui/")})
def swagger_slash(node: Node, request: Request) -> Answer:
    """Send a browser to Swagger UI."""
    return Answer(None, 302, {"Location": "/swagger-ui/"})


@route("GET", "/swagger-ui/", "server client", who="anyone", gives={200: Gives("the page", "text/html")})
def swagger_page(node: Node, request: Request) -> Answer:
    """Show Swagger UI, with files from this server."""
    try:
        own_file(SWAGGER_FOLDER + "LICENSE")
        page = SWAGGER_PAGE
    except OSError:
        page = routes_page(node.config.mode)
    return Answer(page.encode(), 200, {"Content-Type": "text/html; charset=utf-8", **PAGE_HEADERS})


SWAGGER_NAME = Parameter("name", "path", "string", "a file of Swagger UI", "swagger-ui.css", required=True)
SWAGGER_GIVES = {200: Gives("the file", "text/css"), 404: Gives("no such file", JSON_TYPE, {"message": "Swagger UI has no such file"})}


@route("GET", "/swagger-ui/<name>", "server client", who="anyone", takes=(SWAGGER_NAME,), gives=SWAGGER_GIVES)
def swagger_file(node: Node, request: Request, name: str) -> Answer:
    """Serve one file of Swagger UI."""
    if name == "start.js":
        return Answer(SWAGGER_START.encode(), 200, {"Content-Type": "text/javascript"})
    try:
        content = own_file(SWAGGER_FOLDER + name) if name in SWAGGER_FILES else None
    except OSError:
        content = None
    if content is None:
        raise HttpError(404, "Swagger UI has no such file, or is missing: joborch.pyz includes it")
    return Answer(content, 200, {"Content-Type": SWAGGER_FILES[name], "Cache-Control": "max-age=86400"})
