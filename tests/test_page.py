"""What describes the program: OpenAPI of both modes, with examples that are like the real answers; the page, its files, the tables."""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
from openapi_spec_validator import OpenAPIV31SpecValidator
from world import Desk, Said, Yard, ask, tried

import joborch
from joborch import JSON_TYPE, ROUTES, Gives, HttpError, Route, Status
from joborch_base.routes import EXAMPLE_ERROR
from joborch_plugins import documents
from joborch_plugins.documents import openapi

MODES = ("server", "client")
TELL_MORE = {("/terminate/<job_id>", 409), ("/jobs/<job_id>/result", 409), ("/health", 503)}  # errors that show a state, too
OF_MODE = [(mode, declared) for mode in MODES for declared in joborch.routes_of(mode)]


def name_of(value: Any) -> str | None:
    """What a route is called in a test's name."""
    return f"{value.method} {value.path}" if isinstance(value, Route) else None


def operations(mode: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and operation of everything described."""
    for path, item in openapi(mode)["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


@pytest.mark.parametrize("mode", MODES)
def test_the_description_is_valid(mode: str) -> None:
    """OpenAPI 3.1 by its own schema, and JSON."""
    document = openapi(mode)
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(json.loads(json.dumps(document))).validate()


@pytest.mark.parametrize("mode", MODES)
def test_every_declared_route_is_described_once_and_nothing_else(mode: str) -> None:
    declared = {(re.sub(r"<(\w+)(:path)?>", r"{\1}", found.path), found.method.lower()) for kind, found in OF_MODE if kind == mode}
    declared |= {(path, "head") for path, method in declared if method == "get"}
    assert {(path, method) for path, method, _ in operations(mode)} == declared
    names = [operation["operationId"] for _, _, operation in operations(mode)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("mode", "declared"), OF_MODE, ids=name_of)
def test_every_json_answer_has_an_example(mode: str, declared: Route) -> None:
    """And every answer a meaning; a status that is an error has an example that is one."""
    assert declared.gives
    assert len(declared.summary) > 5 and declared.summary.endswith(".")
    for code, said in declared.gives.items():
        assert said.meaning, code
        assert (said.example is not None) == (said.content == JSON_TYPE), code
        if said.content == JSON_TYPE and code >= 400 and (declared.path, code) not in TELL_MORE:
            assert set(said.example) <= {"message", "field"} and len(said.example["message"]) > 5
        if code in (204, 302, 304):
            assert said.content == ""
    if "<job_id>" in declared.path:
        assert {400, 404} <= set(declared.gives)


@pytest.mark.parametrize(("mode", "declared"), OF_MODE, ids=name_of)
def test_every_parameter_is_explained_and_has_an_example_within_its_bounds(mode: str, declared: Route) -> None:
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    for parameter in declared.takes:
        assert len(parameter.help) > 3, parameter.name
        if parameter.kind == "file":
            continue
        assert isinstance(parameter.example, kinds[parameter.kind]), parameter.name  # type: ignore[arg-type]
        if parameter.kind == "integer":
            assert (parameter.least is None or parameter.example >= parameter.least) and (parameter.most or 2**63) >= parameter.example
    in_path = {parameter.name for parameter in declared.takes if parameter.place == "path"}
    assert in_path == set(re.findall(r"<(\w+)(?::path)?>", declared.path))


def asks_by_a_page(declared: Route) -> bool:
    """Whether a route of the web page answers everybody, and those who have not proven themselves by a question: see test_dashboard."""
    return declared.path.startswith(("/dashboard", "/session"))


@pytest.mark.parametrize("mode", MODES)
def test_who_may_call_is_described(mode: str) -> None:
    """Routes for callers name the token, and the two codes with which they refuse; the others do neither."""
    for kind, declared in OF_MODE:
        if kind != mode:
            continue
        operation = openapi(mode)["paths"][re.sub(r"<(\w+)(:path)?>", r"{\1}", declared.path)][declared.method.lower()]
        assert ({"token": []} in operation["security"]) == ("operator" in declared.who)
        if not asks_by_a_page(declared):
            assert ({"401", "403"} <= set(operation["responses"])) == ("operator" in declared.who)
    free = {declared.path for kind, declared in OF_MODE if declared.who == "anyone"}
    assert free == {
        "/",
        "/health",
        "/hello",
        "/load",
        "/api-docs/openapi.json",
        *(declared.path for declared in ROUTES if asks_by_a_page(declared)),
        "/swagger",
        "/swagger-ui",
        "/swagger-ui/",
        "/swagger-ui/<name>",
        "/joborch.pyz",
    }


def test_a_head_is_described_without_bodies() -> None:
    for _, method, operation in operations("server"):
        if method == "head":
            assert all(set(answer) == {"description"} for answer in operation["responses"].values())


def test_uploads_are_described_as_a_form() -> None:
    schema = openapi("server")["paths"]["/upload"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(schema["required"]) == {"user_id", "service"}
    assert set(schema["properties"]) == {"file", "archive", *joborch.FORM_FIELDS}
    assert schema["properties"]["file"]["items"] == {"type": "string", "format": "binary"}


# == Examples are like the real answers ==


def shape(value: Any) -> Any:
    """The fields of an answer, without their values."""
    return {name: shape(inner) if isinstance(inner, dict) else None for name, inner in value.items()} if isinstance(value, dict) else None


def example(method: str, path: str, mode: str, code: int = 200) -> Any:
    """The example of an answer."""
    found = next(declared for kind, declared in OF_MODE if (kind, declared.method, declared.path) == (mode, method, path))
    return found.gives[code].example


def test_the_servers_examples_are_like_its_answers(desk: Desk) -> None:
    job = desk.upload()
    assert shape(ask(desk.server, "GET", f"/jobs/{job.id}").json) == shape(example("GET", "/jobs/<job_id>", "server"))
    whole = example("GET", "/jobs/<job_id>", "server")
    assert set(ask(desk.server, "GET", f"/jobs/{job.id}").json["history"][0]) == set(whole["history"][0])
    listed = ask(desk.server, "GET", "/jobs").json
    assert set(listed) == set(example("GET", "/jobs", "server"))
    assert set(listed["jobs"][0]) <= set(example("GET", "/jobs", "server")["jobs"][0])
    services = ask(desk.server, "GET", "/services").json["services"]
    wanted = example("GET", "/services", "server")["services"]
    assert (shape(services[0]), shape(services[0]["clients"][0])) == (shape(wanted[0]), shape(wanted[0]["clients"][0]))
    assert shape(ask(desk.server, "GET", "/health").json) == shape(example("GET", "/health", "server"))
    assert ask(desk.server, "GET", "/").json == example("GET", "/", "server")
    desk.store.move(job, Status.KILLED, "")
    assert shape(ask(desk.server, "POST", f"/terminate/{job.id}").json) == shape(example("POST", "/terminate/<job_id>", "server"))


def test_the_clients_examples_are_like_its_answers(yard: Yard) -> None:
    job = yard.submit("true")
    assert shape(ask(yard.client, "GET", f"/retrieve/{job.id}").json) == shape(example("GET", "/retrieve/<job_id>", "client"))
    yard.run(job)
    events, wanted = yard.events(), example("GET", "/events", "client")
    assert (set(events), set(events["payloads"][0])) == (set(wanted), set(wanted["payloads"][0]))
    assert isinstance(ask(yard.client, "GET", "/load").json, float)
    assert set(ask(yard.client, "GET", "/health").json) >= set(example("GET", "/health", "client"))
    said = ask(yard.client, "POST", f"/kill/{job.id}")
    assert shape(said.json) == shape(example("POST", "/kill/<job_id>", "client"))


def test_errors_are_like_their_examples(desk: Desk) -> None:
    for path, code in (("/jobs/99", 404), ("/jobs/x", 400), ("/jobs?limit=0", 400), ("/download/99", 404)):
        said = ask(desk.server, "GET", path)
        assert said.status == code
        assert set(said.json) <= set(EXAMPLE_ERROR)


# == Assets ==


@pytest.fixture(name="packed")
def packed_fixture(pyz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from beside the module are those of joborch.pyz, which alone has Swagger UI."""
    with zipfile.ZipFile(pyz) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(documents, "own_file", files.__getitem__)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("name", [*documents.SWAGGER_FILES, "start.js"])
def test_swagger_ui_is_served_from_inside(name: str, desk: Desk) -> None:
    said = ask(desk.server, "GET", f"/swagger-ui/{name}")
    kind = {"css": "text/css", "js": "text/javascript", "png": "image/png"}[name.rpartition(".")[2]]
    assert (said.status, said.headers["Content-Type"]) == (200, kind)
    assert int(said.headers["Content-Length"]) == len(said.body) > 50
    if name == "favicon-32x32.png":
        assert said.body.startswith(b"\x89PNG")


@pytest.mark.usefixtures("packed")
def test_the_page_names_only_files_that_are_served_and_no_other_address(desk: Desk) -> None:
    said = ask(desk.server, "GET", "/swagger-ui/")
    page = said.body.decode()
    named = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert named
    for name in named:
        assert ask(desk.server, "GET", f"/swagger-ui/{name}").status == 200, name
    assert "//" not in page.replace("<!doctype", "")
    assert "default-src 'self'" in said.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in said.headers["Content-Security-Policy"]
    start = ask(desk.server, "GET", "/swagger-ui/start.js").body.decode()
    (document,) = re.findall(r'url: "([^"]+)"', start)
    assert ask(desk.server, "GET", document).json == openapi("server", sorted(desk.server.services))


@pytest.mark.parametrize("mode", MODES)
def test_without_swagger_ui_the_page_lists_the_routes(mode: str, desk: Desk, yard: Yard) -> None:
    """As in a checkout, or installed with pip. What it links to is there."""
    node = desk.server if mode == "server" else yard.client
    said = ask(node, "GET", "/swagger-ui/")
    assert (said.status, said.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    page = html.unescape(said.body.decode())
    for kind, declared in OF_MODE:
        if kind == mode:
            assert declared.summary in page
    links = re.findall(r'href="([^"]+)"', page)
    assert "/api-docs/openapi.json" in links
    assert {ask(node, "GET", link).status for link in links if link != "/joborch.pyz"} <= {200, 302, 400}
    assert "<script" not in page and "//" not in page
    assert ask(node, "GET", "/swagger-ui/swagger-ui.css").status == 404


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("name", ["index.html", "swagger-ui.css.map", "..", "%2e%2e", "", "swagger-initializer.js"])
def test_no_other_file_is_served(name: str, desk: Desk) -> None:
    said = tried(lambda: documents.swagger_file(desk.server, joborch.Request({}), name), HttpError)
    assert isinstance(said, HttpError) and said.status == 404


@pytest.mark.parametrize("path", ["/swagger", "/swagger-ui"])
def test_redirections(path: str, desk: Desk) -> None:
    said: Said = ask(desk.server, "GET", path)
    assert (said.status, said.headers["Location"]) == (302, "/swagger-ui/")


def test_the_client_is_described_too(yard: Yard) -> None:
    assert ask(yard.client, "GET", "/api-docs/openapi.json").json == openapi("client")
    assert ask(yard.client, "GET", "/swagger-ui/").status == 200


def test_a_file_from_beside_the_module() -> None:
    assert b"def own_file" in joborch.own_file("joborch.py")
    with pytest.raises(OSError, match="nothing"):
        joborch.own_file("nothing")


# == Tables ==


@pytest.mark.parametrize("mode", MODES)
def test_the_references_table_of_routes(mode: str) -> None:
    rows = reference.routes_table(mode).splitlines()[2:]
    assert len(rows) == len([1 for kind, _ in OF_MODE if kind == mode])
    assert all(row.count("|") == 4 and "<job_id>" not in row for row in rows)


def test_an_example_that_is_no_object_is_a_number() -> None:
    assert documents.openapi_schema_of(12.5) == {"type": "number"}
    assert documents.openapi_response(Gives("a ZIP", joborch.ZIP_TYPE))["content"] == {joborch.ZIP_TYPE: {}}
