"""What the running processes answer agrees with the OpenAPI document that they give out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from conftest import MakeProcess
from harness import EXAMPLE, Pair, Process, free_port, run_to_end, tar_of
from hypothesis import HealthCheck, assume, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.transport.serialization import Binary

DOCUMENT = "/api-docs/openapi.json"
METHODS = ("get", "head", "post", "put", "delete", "patch")
SERVER_ROUTES = {
    ("post", "/upload"),
    ("get", "/download/{}"),
    ("head", "/download/{}"),
    ("get", "/download_partial/{}"),
    ("post", "/terminate/{}"),
    ("get", "/jobs"),
    ("get", "/changes"),
    ("get", "/jobs/{}"),
    ("delete", "/jobs/{}"),
    ("delete", "/users/{}"),
    ("get", "/export"),
    ("post", "/jobs/{}/retry"),
    ("post", "/jobs/{}/redeliver"),
    ("get", "/jobs/{}/result"),
    ("head", "/jobs/{}/result"),
    ("get", "/jobs/{}/files"),
    ("get", "/jobs/{}/files/{}"),
    ("head", "/jobs/{}/files/{}"),
    ("get", "/services"),
    ("get", "/metrics"),
    ("get", "/health"),
    ("get", "/"),
}
CLIENT_ROUTES = {
    ("post", "/submit"),
    ("get", "/retrieve/{}"),
    ("get", "/retrieve_partial/{}"),
    ("post", "/kill/{}"),
    ("get", "/files/{}"),
    ("get", "/file/{}"),
    ("delete", "/payloads/{}"),
    ("get", "/load"),
    ("get", "/metrics"),
    ("get", "/health"),
    ("get", "/"),
}


@pytest.fixture(scope="module")
def document(pair: Pair) -> dict[str, Any]:
    """The server's own description."""
    answer = pair.server.get(DOCUMENT)
    assert answer.headers["Content-Type"].startswith("application/json")
    return dict(answer.json())


def bare(path: str) -> str:
    """A path with its parameters' names left out."""
    return re.sub(r"{\w+}", "{}", path)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """All operations of a document, by method and bare path."""
    paths = document["paths"].items()
    return {(method, bare(path)): item[method] for path, item in paths for method in METHODS if method in item}


def test_document_is_valid(document: dict[str, Any]) -> None:
    """OpenAPI 3.1, by its own schema."""
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_every_route_of_the_contract_is_described(document: dict[str, Any]) -> None:
    """With a summary, an example and its codes; names are unique."""
    described = operations(document)
    assert set(described) >= SERVER_ROUTES, SERVER_ROUTES - set(described)
    names = [operation["operationId"] for operation in described.values()]
    assert {tag for operation in described.values() for tag in operation["tags"]} == {tag["name"] for tag in document["tags"]}
    assert len(names) == len(set(names))
    for key, operation in described.items():
        assert operation.get("summary") or operation.get("description"), key
        assert len(operation["tags"]) == 1, key
        assert "example" in json.dumps(operation) or not answers_json(operation), f"{key} has no example"
        assert any(code.startswith(("2", "3")) for code in operation["responses"]), key


def answers_json(operation: dict[str, Any]) -> bool:
    """Whether any answer of the operation is JSON (a page or a ZIP needs no example)."""
    return any("application/json" in answer.get("content", {}) for answer in operation["responses"].values())


def test_upload_is_described_with_its_fields(document: dict[str, Any]) -> None:
    """Fields and codes of the most important route."""
    upload = operations(document)["post", "/upload"]
    text = json.dumps(upload["requestBody"]["content"]["multipart/form-data"]) + json.dumps(document.get("components"))
    for field in ("user_id", "service", "timeout", "retries", "name", "cpus", "memory", "gpus", "archive", "crlf"):
        assert f'"{field}"' in text, field
    assert {"201", "400", "413", "422", "507"} <= set(upload["responses"])


def test_services_are_named_to_those_who_may_call(document: dict[str, Any], make_process: MakeProcess) -> None:
    """What `service` may be stands in the description, but not for a stranger."""
    for operation in (operations(document)["get", "/jobs"], operations(document)["get", "/changes"]):
        (schema,) = [each["schema"] for each in operation["parameters"] if each["name"] == "service"]
        assert schema["enum"] == ["example"]
    form = operations(document)["post", "/upload"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["service"]["enum"] == ["example"]
    guarded = make_process("server", {"JOBORCH_TOKEN": "a-token-for-callers-only"}).start()
    stranger, known = guarded.get(DOCUMENT), guarded.get(DOCUMENT, headers={"Authorization": "Bearer a-token-for-callers-only"})
    assert ('enum": ["example"]' in json.dumps(stranger.json()), 'enum": ["example"]' in json.dumps(known.json())) == (False, True)


def test_examples_are_real(document: dict[str, Any]) -> None:
    """Nobody is helped by `string` and 0."""
    assert '"example": "string"' not in json.dumps(document)


# == schemathesis ==


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with some jobs, whose later jobs stay queued (its client is gone): what is found is the HTTP side's."""
    pair = Pair(tmp_path_factory.mktemp("fuzzed"))
    try:
        pair.start()
        for script in ("echo done > out.txt", "exit 3"):
            run_to_end(pair.server, script, {"2oob.pdb": (EXAMPLE / "2oob.pdb").read_bytes()})
        pair.client.close()
        yield pair.server
    finally:
        pair.close()


@pytest.fixture(scope="module")
def api(fuzzed: Process) -> Any:
    """The description of the running server, as schemathesis reads it."""
    return schemathesis.openapi.from_url(fuzzed.url + DOCUMENT)


GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
WITHOUT_PARAMETERS = {"/", "/metrics", "/services"}
REFUSES_SOME_STRINGS = {"/jobs/{}/files/{}"}  # a path like `../a`
# What fits to the jobs and clients there are, which no schema says; nor does it say how long or printable a text is.
FITTING = {"user_id": 1, "after": "1", "inputs_from": "1", "cpus": 1, "memory": "1M", "name": "n", "timeout": "90m"}
FREE = ("service", "priority", "retries", "crlf")


def fit_form(case: Any) -> None:
    """Give a form fields that fit to the jobs there are, and no key or digest of another request; an upload gets a script."""
    case.headers = {}
    if isinstance(case.body, dict):
        case.body = {name: FITTING.get(name, value) for name, value in case.body.items() if name in (*FITTING, *FREE)}
        if case.operation.path == "/upload":  # the files that are made up are all called `file`
            case.body["archive"] = [Binary(tar_of({"run.sh": (b"true\n", 0o755)}))]


def fit_retry(case: Any) -> None:
    """Let a call be a retry of a job that exists."""
    case.path_parameters = {"job_id": 1}
    fit_form(case)


def fit_list(case: Any) -> None:
    """Leave out what no schema says: a name is printable, and a cursor is of a list in the same order."""
    query = case.query or {}
    assume(str(query.get("name", "")).isprintable())
    if query.get("by") == "ended":
        query.pop("before", None)


FIT = {"/upload": fit_form, "/jobs/{}/retry": fit_retry, "/jobs": fit_list, "/changes": fit_list}


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [  # the deletions come last
        *[(method, path, GOOD) for method, path in sorted(SERVER_ROUTES) if method != "delete"],
        *[(method, path, BAD) for method, path in sorted(SERVER_ROUTES) if path not in WITHOUT_PARAMETERS],
        *[(method, path, GOOD) for method, path in sorted(SERVER_ROUTES) if method == "delete"],
    ],
)
def test_answers_agree_with_the_document(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Whatever is sent, good or bad: the answer's code, type, headers and shape are described, and it is no 500."""
    (full,) = [name for name in api if bare(name) == path]
    left_out = [positive_data_acceptance] if path in REFUSES_SOME_STRINGS else []
    if path == "/health":  # `deep=1` says by 503 that the client is gone
        left_out = [not_a_server_error, positive_data_acceptance]
    if path in FIT and mode is GOOD:
        left_out.append(negative_data_rejection)  # it takes what was made to fit for damage
    operation = api[full][method.upper()]
    calls, known = operation.as_strategy(generation_mode=mode), {parameter.name for parameter in operation.query}

    @given(calls)
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def holds(case: Any) -> None:
        assume(set(case.query or {}) <= known)  # one that is not known is left out, and makes no request a bad one
        if case.query and "wait" in case.query:
            case.query["wait"] = "0"
        if path in FIT and mode is GOOD:
            FIT[path](case)
        case.call_and_validate(timeout=20, excluded_checks=left_out)

    holds()


def test_the_server_survived(fuzzed: Process) -> None:
    """After all that it is well, and nothing went wrong inside."""
    assert {problem["kind"] for problem in fuzzed.health()["problems"]} == {"client_gone", "service_stopped"}
    assert "Traceback" not in fuzzed.log


# == The client's side ==


def test_client_is_described_too(tmp_path: Path) -> None:
    """Where a client gives out a document, it names its routes and is valid."""
    client = Process("client", tmp_path, {"JOBORCH_TOKEN": "t", "PORT": str(free_port())})
    client.port = int(client.settings["PORT"] or 0)
    try:
        client.start()
        answer = client.get(DOCUMENT, headers={"Authorization": "Bearer t"})
        assert answer.status_code == 200
        OpenAPIV31SpecValidator(answer.json()).validate()
        described = set(operations(answer.json()))
        assert described >= CLIENT_ROUTES, CLIENT_ROUTES - described
    finally:
        client.close()
