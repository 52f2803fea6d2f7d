"""Who may call: tokens, the same user on loopback, and what a web page in a browser must not be able to do."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    NOBODY_UID,
    STRANGER_UID,
    Pair,
    Process,
    assert_error,
    download,
    file_part,
    form,
    form_type,
    nothing_left,
    open_program,
    parse_answer,
    raw_exchange,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)

TOKEN = "the-right-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
RUN = {"run.sh": b"true"}


# == Tokens ==

SERVER_ROUTES = [
    ("POST", "/upload"),
    ("GET", "/jobs"),
    ("GET", "/jobs/1"),
    ("GET", "/download/1"),
    ("HEAD", "/download/1"),
    ("GET", "/download_partial/1"),
    ("POST", "/terminate/1"),
    ("POST", "/jobs/1/retry"),
    ("POST", "/jobs/1/redeliver"),
    ("GET", "/jobs/1/result"),
    ("GET", "/jobs/1/files"),
    ("GET", "/jobs/1/files/run.sh"),
    ("GET", "/services"),
]
CLIENT_ROUTES = [
    ("POST", "/submit"),
    ("GET", "/retrieve/1"),
    ("GET", "/retrieve_partial/1"),
    ("GET", "/files/1"),
    ("GET", "/file/1?path=run.sh"),
    ("POST", "/kill/1"),
    ("GET", "/events?since=0"),
]


def assert_unauthorised(process: Process, method: str, path: str, headers: dict[str, str]) -> None:
    """401 with the scheme that is wanted."""
    answer = process.call(method, path, headers=headers, data=b"" if method == "POST" else None)
    assert answer.status_code == 401, (method, path, headers, answer.status_code, answer.text)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    if method != "HEAD":
        assert_error(answer, 401, "token")


WRONG = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": TOKEN},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Authorization": f"Bearer {TOKEN[:-1]}"},
    {"Authorization": "Bearer \u00fc".encode().decode("latin-1")},
]


def test_server_with_a_token(make_process: MakeProcess) -> None:
    """Where it is set it is always enforced, on loopback too; /, /health need none."""
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    for method, path in SERVER_ROUTES:
        for headers in WRONG[:2]:
            assert_unauthorised(server, method, path, headers)
    for headers in WRONG:
        assert_unauthorised(server, "GET", "/jobs", headers)
    assert upload(server, RUN, headers=BEARER).status_code == 201
    assert server.get("/jobs", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert server.get("/").json() == {"message": "pong"}
    assert server.get("/health").status_code == 200
    assert TOKEN not in server.log


def test_a_large_upload_without_a_token_is_refused_before_its_body(make_process: MakeProcess) -> None:
    """401 comes at the end of the headers: a stranger's body is not read."""
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    head = (
        f"POST /upload HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
    )
    code, headers, _ = parse_answer(raw_exchange(server.port, head.encode()))
    assert (code, headers["www-authenticate"].startswith("Bearer")) == (401, True)


@pytest.mark.parametrize("way", ["JOBORCH_TOKEN", "JOBORCH_TOKEN_FILE"])
def test_several_tokens(make_process: MakeProcess, tmp_path: Path, way: str) -> None:
    """Tokens separated by commas, in the environment or in a file: each of them is good, and only each by itself."""
    tokens = f"{TOKEN},another-token"
    (tmp_path / "tokens").write_text(f"{tokens}\n")
    server = make_process("server", {way: tokens if way == "JOBORCH_TOKEN" else str(tmp_path / "tokens")}).start()
    for token in (TOKEN, "another-token"):
        assert server.get("/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert_unauthorised(server, "GET", "/jobs", {"Authorization": f"Bearer {tokens}"})


def test_client_always_wants_a_token(make_process: MakeProcess) -> None:
    """It runs what it is sent: the same user on loopback does not suffice. /, /health and /load need none."""
    client = make_process("client", {"JOBORCH_TOKEN": TOKEN}).start()
    for method, path in CLIENT_ROUTES:
        for headers in WRONG[:2]:
            assert_unauthorised(client, method, path, headers)
    for path in ("/", "/health", "/load"):
        assert client.get(path).status_code == 200
    body = form([file_part("run.sh", b"true")])
    assert client.post("/submit", data=body, headers={**form_type(), **BEARER}).json()["id"] == 1
    assert TOKEN not in client.log


def test_clients_own_token(make_process: MakeProcess) -> None:
    """Made at the first start, mode 0600, kept at the next one, not in the log."""
    client = make_process("client").start()
    assert client.home is not None
    (path,) = [path for path in client.home.rglob("*") if path.is_file() and "token" in path.name]
    token = path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 32
    client.restart()
    assert path.read_text().strip() == token
    assert client.get("/retrieve/1", headers={"Authorization": f"Bearer {token}"}).status_code == 404
    assert token not in client.log


def test_wrong_token_between_server_and_client(make_pair: MakePair) -> None:
    """The job waits and says that it is the token; nothing is lost once that is put right."""
    pair = make_pair(server={"SERVICE_EXAMPLE_TOKEN": "another-secret"}).start()
    number = submit(pair.server, "true")
    told = wait_for(lambda: token_told(pair.server, number), what="the reason to wait names the token")
    assert pair.server.job(number)["status"] in ("Queued", "Processing"), told
    assert "another-secret" not in told
    pair.server.settings["SERVICE_EXAMPLE_TOKEN"] = Pair.TOKEN
    pair.server.restart()
    assert wait_status(pair.server, number, "Completed", limit_s=60)["attempt"] == 1


def token_told(server: Process, number: int) -> str:
    """What the job waits for, where that names the token."""
    job = server.job(number)
    said = f"{job['waiting_for']} {job['reason']}"
    return said if "token" in said.lower() or "401" in said else ""


# == The same user, on loopback ==


def curl_as(user: int, url: str, *arguments: str) -> int:
    """The status that another user of the machine gets."""
    command = ["curl", "-s", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url]
    return int(subprocess.check_output(command, user=user, group=user, extra_groups=[], cwd="/", env={}))


@pytest.fixture
def server_of_nobody(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> Process:
    """A server that another user of the machine runs, without tokens."""
    program = open_program(open_folder, pyz)
    return make_process("server", folder=open_folder / "server", user=NOBODY_UID, program=program).start()


def test_only_the_same_user_and_root_on_loopback(server_of_nobody: Process) -> None:
    """On a login node the others are strangers: they get nothing but /health."""
    jobs = f"{server_of_nobody.url}/jobs"
    assert curl_as(NOBODY_UID, jobs) == 200
    assert curl_as(STRANGER_UID, jobs) in (401, 403)
    assert curl_as(STRANGER_UID, f"{server_of_nobody.url}/health") == 200
    send = ["-F", "file=true;filename=run.sh", "-F", "user_id=1", "-F", "service=example"]
    with nothing_left(server_of_nobody):
        assert curl_as(STRANGER_UID, f"{server_of_nobody.url}/upload", *send) in (401, 403)
        assert curl_as(STRANGER_UID, f"{server_of_nobody.url}/terminate/1", "-X", "POST") in (401, 403)
    assert curl_as(NOBODY_UID, f"{server_of_nobody.url}/upload", *send) == 201
    assert server_of_nobody.get("/jobs").status_code == 200, "root may call"


def test_a_stranger_on_the_machine_is_told_what_to_do(server_of_nobody: Process) -> None:
    """The refusal names the way in: a token."""
    command = ["curl", "-s", "--noproxy", "*", f"{server_of_nobody.url}/jobs"]
    said = subprocess.check_output(command, user=STRANGER_UID, group=STRANGER_UID, extra_groups=[], env={}, text=True)
    assert "JOBORCH_TOKEN" in said or "token" in said.lower()


def test_root_lets_no_other_user_in(make_process: MakeProcess, root: None) -> None:
    """A server of root's answers root alone."""
    server = make_process("server").start()
    assert server.get("/jobs").status_code == 200
    assert curl_as(NOBODY_UID, f"{server.url}/jobs") in (401, 403)


def test_with_a_token_any_user_of_the_machine_may_call(make_process: MakeProcess, root: None) -> None:
    """Who shows the token is let in, whoever it is."""
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    assert curl_as(STRANGER_UID, f"{server.url}/jobs", "-H", f"Authorization: Bearer {TOKEN}") == 200
    assert curl_as(STRANGER_UID, f"{server.url}/jobs") == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_elsewhere_than_loopback_it_wants_a_decision(make_process: MakeProcess, host: str) -> None:
    """Neither a token nor ALLOW_ANONYMOUS: it does not start, and names both settings."""
    code, said = make_process("server", {"JOBORCH_HOST": host}).start_refused()
    assert code == 2
    assert "JOBORCH_TOKEN" in said
    assert "JOBORCH_ALLOW_ANONYMOUS" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("decision", [{"JOBORCH_TOKEN": TOKEN}, {"JOBORCH_ALLOW_ANONYMOUS": "1", "JOBORCH_ALLOW_FROM": "192.0.2.0/24"}])
def test_elsewhere_with_a_decision(make_process: MakeProcess, decision: dict[str, str]) -> None:
    """With one of them it starts, and holds to it."""
    server = make_process("server", {"JOBORCH_HOST": "0.0.0.0", **decision}).start()
    assert server.get("/jobs").status_code == (401 if "JOBORCH_TOKEN" in decision else 200)
    assert server.get("/jobs", headers=BEARER).status_code == 200


# == Web pages ==

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://127.0.0.1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"},
]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "localhost.evil.example",
    "0.0.0.0:{port}",
    "",
]
OWN_HOSTS = ["127.0.0.1", "127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "localhost:80"]
OWN_HOSTS += ["192.168.0.7", socket.gethostname()]  # DNS rebinding needs a name, and one that is not the machine's


@pytest.fixture(scope="module")
def open_server(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server that answers the same user without a token, may be called orch.lab, and has Swagger UI."""
    folder, program = tmp_path_factory.mktemp("open"), [sys.executable, str(pyz)]
    server = Process("server", folder, {"JOBORCH_HOSTS": "orch.lab, other.lab"}, program=program)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_foreign_pages(open_server: Process, headers: dict[str, str]) -> None:
    """403 for what a browser sends on behalf of another site, by any method; nothing is stored."""
    with nothing_left(open_server):
        assert_error(upload(open_server, RUN, headers=headers), 403)
        assert_error(open_server.get("/jobs", headers=headers), 403)
        assert_error(open_server.post("/terminate/1", headers=headers), 403)


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_own_page(open_server: Process, site: str) -> None:
    """The server's own page, and an address typed by hand, are let in."""
    headers = {"Origin": open_server.url, "Sec-Fetch-Site": site}
    assert open_server.get("/jobs", headers=headers).status_code == 200
    assert upload(open_server, RUN, headers=headers).status_code == 201


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_foreign_names(open_server: Process, host: str) -> None:
    """A name that was bent to loopback (DNS rebinding) is refused."""
    assert code_for_host(open_server, host) in ((403,) if host else (400, 403))


@pytest.mark.parametrize("host", [*OWN_HOSTS, "orch.lab", "orch.lab:{port}", "Other.Lab"])
def test_own_names(open_server: Process, host: str) -> None:
    """The loopback names and those in JOBORCH_HOSTS; the port does not matter."""
    assert code_for_host(open_server, host) == 200


def code_for_host(server: Process, host: str) -> int:
    """The code of GET /jobs under a name."""
    named = host.format(port=server.port)
    request = f"GET /jobs HTTP/1.1\r\nHost: {named}\r\nConnection: close\r\n\r\n"
    return parse_answer(raw_exchange(server.port, request.encode()))[0]


def test_anonymous_servers_refuse_foreign_pages_too(make_process: MakeProcess) -> None:
    """ALLOW_ANONYMOUS does not open the door to every web page, by whatever name it calls the server."""
    server = make_process("server", {"JOBORCH_ALLOW_ANONYMOUS": "1"}).start()
    for headers in FOREIGN:
        assert_error(upload(server, RUN, headers=headers), 403)
    assert code_for_host(server, "orch.example.org") == 403
    assert server.jobs() == []


def test_anonymous_clients_refuse_foreign_pages_too(make_process: MakeProcess) -> None:
    """A client without tokens runs what it is sent: never what a web page sends."""
    client = make_process("client", {"JOBORCH_ALLOW_ANONYMOUS": "1"}).start()
    body = form([file_part("run.sh", b"true")])
    for headers in FOREIGN:
        assert_error(client.post("/submit", data=body, headers={**form_type(), **headers}), 403)
    assert client.post("/submit", data=body, headers=form_type()).json()["id"] == 1


def test_with_a_token_the_origin_is_free(make_process: MakeProcess) -> None:
    """Who shows a token is no page that happened to be open."""
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    assert upload(server, RUN, headers={**BEARER, **FOREIGN[0]}).status_code == 201


def test_no_answer_invites_other_origins(open_server: Process) -> None:
    """No CORS header is given away, and a preflight does not succeed."""
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (open_server.call("OPTIONS", "/upload", headers=asked), open_server.get("/jobs", headers=asked)):
        assert not [name for name in answer.headers if name.lower().startswith("access-control-allow")]
        assert answer.status_code in (403, 405)


# == A real browser ==

EVIL_PAGE = """<!doctype html><title>A page of somebody else's</title>
<form id="form" method="post" enctype="multipart/form-data" action="{url}/upload">
<input type="file" name="file" id="file"><input name="user_id" value="1"><input name="service" value="example">
<button id="send">Click me</button></form>
<script>
async function quietly() {{
  const data = new FormData();
  data.append("file", new Blob(["touch stolen"]), "run.sh");
  data.append("user_id", "1");
  data.append("service", "example");
  await fetch("{url}/upload", {{method: "POST", body: data, mode: "no-cors", credentials: "include"}});
  try {{ await (await fetch("{url}/jobs")).text(); return "read"; }} catch (error) {{ return "refused"; }}
}}
</script>"""


class _Page(BaseHTTPRequestHandler):
    """Serves one page."""

    def __init__(self, page: str, *arguments: Any) -> None:
        self.page = page.encode()
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """The page, whatever is asked."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.page)))
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def evil_site(open_server: Process) -> Iterator[int]:
    """The port of a site with a page that posts to our server."""
    handler = functools.partial(_Page, EVIL_PAGE.format(url=open_server.url))
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
    yield site.server_address[1]
    site.shutdown()
    site.server_close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of the browser that is patient, because a busy machine starts slowly."""
    shown = browser.new_page()
    shown.set_default_timeout(90_000)
    yield shown
    shown.close()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_of_another_site_posts_in_vain(page: Any, open_server: Process, evil_site: int, tmp_path: Path, name: str) -> None:
    """From another port (same site, other origin) and another name (other site): form and fetch are refused."""
    (tmp_path / "run.sh").write_text("touch stolen")
    with nothing_left(open_server):
        page.goto(f"http://{name}:{evil_site}/")
        assert page.evaluate("quietly()") == "refused"
        page.set_input_files("#file", str(tmp_path / "run.sh"))
        with page.expect_response(lambda answer: answer.url.endswith("/upload")) as caught:
            page.click("#send")
        assert caught.value.status == 403


def test_swagger_ui_in_a_browser(page: Any, open_server: Process) -> None:
    """The page shows every route, asks no other host for anything, and runs without an error."""
    asked: list[str] = []
    troubles: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    answer = page.goto(f"{open_server.url}/swagger-ui/")
    assert answer.status == 200
    page.wait_for_selector(".opblock")
    operations = [
        (method, path)
        for path, item in open_server.get("/api-docs/openapi.json").json()["paths"].items()
        for method in item
        if method in ("get", "post", "head", "put", "delete", "patch")
    ]
    assert page.locator(".opblock").count() == len(operations)
    assert not [url for url in asked if not url.startswith((open_server.url, "data:", "blob:"))], asked
    assert not troubles


def test_swagger_ui_tries_a_route(page: Any, open_server: Process) -> None:
    """`Try it out` works: the page's own requests are let in."""
    page.goto(f"{open_server.url}/swagger-ui/")
    block = page.locator(".opblock").filter(has=page.locator('[data-path="/jobs"]')).first
    block.locator(".opblock-summary").click()
    block.get_by_role("button", name="Try it out").click()
    with page.expect_response(lambda answer: "/jobs" in answer.url) as caught:
        block.get_by_role("button", name="Execute").click()
    assert caught.value.status == 200
    assert set(caught.value.json()) == {"jobs", "next"}


def test_browsers_are_led_to_a_page(open_server: Process) -> None:
    """`/` is {"message": "pong"} for programs; /swagger leads to /swagger-ui/."""
    assert open_server.get("/", headers={"Accept": "application/json"}).json() == {"message": "pong"}
    answer = open_server.get("/swagger")
    assert answer.status_code in (301, 302, 303, 307, 308)
    assert answer.headers["Location"].endswith("/swagger-ui/")


# == Secrets ==


def test_config_masks_secrets(make_process: MakeProcess) -> None:
    """`joborch config` prints the settings with their sources, and no token."""
    wiring = {"SERVICE_EXAMPLE_CLIENTS": "http://127.0.0.1:9", "SERVICE_EXAMPLE_TOKEN": "another-secret"}
    process = make_process("server", {"JOBORCH_TOKEN": TOKEN, **wiring})
    command = [*process.program, "config"]
    done = subprocess.run(command, env=process.environment(), cwd=process.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert TOKEN not in done.stdout + done.stderr
    assert "another-secret" not in done.stdout + done.stderr
    assert "JOBORCH_TOKEN" in done.stdout
    assert str(process.port) in done.stdout


def test_nobody_reads_the_files_of_a_process(pair: Pair) -> None:
    """What users upload is not open to the other users of the machine."""
    run_to_end(pair.server, "true")
    for process in (pair.server, pair.client):
        opened = [path for path in process.data.iterdir() if path.stat().st_mode & 0o077]
        assert opened == [], f"{process.role}: others may read {opened}"


def test_tokens_never_show(pair: Pair) -> None:
    """The token between server and client stands in no result and no log."""
    job = run_to_end(pair.server, "env > env.txt; cat /proc/$$/environ > mine.bin; true")
    result = download(pair.server, job["id"])
    for content in (result["env.txt"], result["mine.bin"], pair.server.log.encode(), pair.client.log.encode()):
        assert Pair.TOKEN.encode() not in content
