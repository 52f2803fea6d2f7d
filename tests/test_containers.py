"""The image and the compose file, tried on a real engine: what `docker compose up --build` gives a user.

The engine is `../shared/backends/docker/engine`, started as root in ENGINE_FOLDER, which keeps the base image from run to run. There is no
registry to pull python:3.13-slim from, so that the stand-in that the engine makes is the base here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import EXAMPLE, ROOT, wait_for
from newcomer import PORTS, STARTS, Newcomer, answers, section, shell_blocks

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]  # the first run of all installs the engine and makes the base image

ENGINE = ROOT.parent / "shared" / "backends" / "docker" / "engine"
ENGINE_FOLDER = Path("/var/tmp/joborch-engine")  # short: sockets below it have 108 bytes for their whole path
UID = "10001"
SERVICES = ("server", "client")


def run(*command: str, env: dict[str, str] | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `command` in the repository and return what it said, whatever its exit status."""
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=timeout_s, text=True, errors="replace", stdin=subprocess.DEVNULL, capture_output=True
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return the standard output of a command that must have ended with 0."""
    assert done.returncode == 0, f"{shlex.join(done.args)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def give_up(why: str) -> None:
    """Leave these tests out, saying why; in CI, where they must run, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


class Stack:
    """The compose project under test: its commands, its two addresses, and `curl` to reach them."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self.env = env
        self.folder = folder
        self.server, self.client = (f"http://127.0.0.1:{PORTS[service]}" for service in SERVICES)

    def docker(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return run("docker", *words, env=self.env, timeout_s=timeout_s)

    def compose(self, *words: str, timeout_s: float = 60) -> str:
        return said(self.docker("compose", *words, timeout_s=timeout_s))

    def up(self) -> None:
        """Build and start everything, and return when server and client are healthy."""
        done = self.docker("compose", "up", "-d", "--build", "--wait", "--wait-timeout", "60", timeout_s=300)
        if done.returncode:
            logs = self.docker("compose", "logs", "--no-color", "--tail", "40").stdout
            pytest.fail(f"docker compose up ended with {done.returncode}\n{done.stdout}\n{done.stderr}\n{logs}")

    def shell(self, service: str, script: str) -> subprocess.CompletedProcess[str]:
        """Run a line of sh inside the container of `service`, as its own user."""
        return self.docker("compose", "exec", "-T", service, "sh", "-c", script)

    def inspect(self, service: str) -> dict[str, object]:
        """Return what the engine knows of the container of `service`."""
        name = self.compose("ps", "-aq", service).strip()
        found: list[dict[str, object]] = json.loads(said(self.docker("inspect", name)))
        return found[0]

    def code(self, *arguments: str) -> str:
        """Return the status code that `curl` got."""
        return said(run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20", *arguments))

    def upload(self, *files: Path) -> int:
        """Send `files` to the example service, as the README does, and return the id of the job."""
        parts = [word for file in files for word in ("-F", f"file=@{file}")]
        answer = said(run("curl", "-sS", "--fail-with-body", "-X", "POST", f"{self.server}/upload",
                          *parts, "-F", "user_id=1", "-F", "service=example"))  # fmt: skip
        job_id: int = json.loads(answer)["id"]
        return job_id

    def job(self, job_id: int) -> dict[str, object]:
        job: dict[str, object] = json.loads(said(run("curl", "-sS", f"{self.server}/jobs/{job_id}")))
        return job

    def wait_for_code(self, job_id: int, timeout_s: float = 30) -> str:
        """Ask for the result by HEAD until the answer is not 202, and return its code."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code("--head", f"{self.server}/download/{job_id}")) == "202":
            assert time.monotonic() < deadline, f"still 202 after {timeout_s:g} s: {self.job(job_id)}"
            time.sleep(0.1)
        return code

    def download(self, job_id: int) -> Path:
        """Fetch the result of a job that is Completed, and return the ZIP's path."""
        target = self.folder / f"{job_id}-{time.monotonic_ns()}.zip"
        said(run("curl", "-sS", "--fail", "-o", str(target), f"{self.server}/download/{job_id}"))
        return target

    def script(self, text: str) -> Path:
        """Write `text` as the run.sh of a job."""
        folder = self.folder / f"script-{time.monotonic_ns()}"
        folder.mkdir()
        (folder / "run.sh").write_text(text)
        return folder / "run.sh"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a real engine of our own, yield an environment in which `docker` reaches it, and end it."""
    if os.geteuid() != 0:
        pytest.skip("a container engine can be started by root only: run the tests as root to try the containers")
    if not ENGINE.is_file():
        give_up("../shared/backends/docker/engine is missing: lay the folder `shared` beside the repository to try the containers")
    foreign = ("DOCKER_", "COMPOSE_", "BUILDX_", "BASE_IMAGE", "JOBORCH_", "SERVICE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Starting and ending a second engine would take the first one's bridge away.
    if shutil.which("docker") and run("docker", "version", env=environment).returncode == 0:
        give_up("another Docker engine runs on this machine, and ours would disturb it")
    said(run(str(ROOT / "tests" / "install-container-engine"), timeout_s=600))
    ENGINE_FOLDER.mkdir(mode=0o700, exist_ok=True)
    assert ENGINE_FOLDER.stat().st_uid == 0 and not ENGINE_FOLDER.is_symlink(), f"{ENGINE_FOLDER} belongs to somebody else: remove it"
    with Path(ENGINE_FOLDER, "lock").open("w") as lock:  # one test run at a time has the engine
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(3):  # the first start fetches a hundred packages; one that does not come ends it
            start = run(str(ENGINE), "start", str(ENGINE_FOLDER), timeout_s=600)
            if start.returncode == 0:
                break
        started = said(start)
        name, _, address = shlex.split(started)[1].partition("=")  # export DOCKER_HOST=...
        try:
            yield {**environment, name: address, "DOCKER_CONFIG": str(tmp_path_factory.mktemp("docker-config"))}
        finally:
            said(run(str(ENGINE), "stop", str(ENGINE_FOLDER), timeout_s=120))


@pytest.fixture(scope="module")
def stack(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Build the image, start server and client, and remove all of it at the end, volumes too."""
    taken = [port for port in PORTS.values() if answers(port)]
    if taken:
        give_up(f"the README's lines go to ports {taken}, where something listens on this machine: stop it to try the containers")
    env = {**engine, "BASE_IMAGE": "joborch-base", "COMPOSE_PROJECT_NAME": "joborch-test"}
    stack = Stack(env, tmp_path_factory.mktemp("containers"))
    stack.docker("compose", "down", "-v", "--remove-orphans")  # left by a run that was killed
    try:
        stack.up()
        yield stack
        print(stack.docker("compose", "logs", "--no-color", "--tail", "100").stdout)  # pytest shows it where a test failed
    finally:
        stack.docker("compose", "down", "-v", "--remove-orphans")


def test_the_readmes_lines_run_word_for_word(stack: Stack, pyz: Path) -> None:
    """What the quick start types after its two processes are up; the first test here, because job 1 is the first of a new server."""
    blocks = [
        [line for line in block if not STARTS.match(line)]
        for block in shell_blocks(section((ROOT / "README.md").read_text(), "Quick start"))
    ]
    folder = stack.folder / "newcomer"
    shutil.copytree(EXAMPLE, folder / "example")
    shutil.copy(pyz, folder)
    typed = list(Newcomer(folder).type_all(blocks))
    assert len([each for each in typed if each.line.startswith(("curl", "echo"))]) >= 8, typed
    for line, status, outputs in typed:
        assert status == 0, f"{line}\n{outputs}"
        codes = re.search("# (.*)", line)
        if line.startswith("curl -I") and codes:
            assert outputs[-1].split()[1] in re.findall(r"\b[0-9]{3}\b", codes[1])[-1:], (line, outputs)
    assert "36 residue pairs" in next(each for each in typed if each.line == "cat result/summary.txt").outputs[0]


def test_both_ports_can_be_moved(stack: Stack) -> None:
    moved = run("docker", "compose", "config", env={**stack.env, "JOBORCH_PORT": "15000", "JOBORCH_CLIENT_PORT": "19000"})
    assert re.findall(r'published: "([0-9]+)"', said(moved)) == ["19000", "15000"]  # in the order of the services' names


def test_structure_sent_by_curl_comes_back_with_its_contacts(stack: Stack) -> None:
    job_id = stack.upload(EXAMPLE / "run.sh", EXAMPLE / "2oob.pdb")
    assert stack.wait_for_code(job_id) == "200"
    with zipfile.ZipFile(stack.download(job_id)) as result:
        assert result.testzip() is None
        assert "2oob.pdb" in result.namelist()
        summary = result.read("summary.txt").decode()
    assert summary.startswith("2oob: 36 residue pairs "), summary


@pytest.mark.parametrize("service", SERVICES)
def test_container_has_no_rights_to_speak_of(stack: Stack, service: str) -> None:
    assert said(stack.shell(service, "id -u")).strip() == UID
    refused = stack.shell(service, "touch /probe")
    assert refused.returncode != 0 and "Read-only file system" in refused.stderr, refused
    status = dict(line.split(":", 1) for line in said(stack.shell(service, "cat /proc/self/status")).splitlines())
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert said(stack.shell(service, "stat -c %u:%a /data")).strip() == f"{UID}:700"


@pytest.mark.parametrize("service", SERVICES)
def test_container_is_healthy_by_its_own_check(stack: Stack, service: str) -> None:
    state = stack.inspect(service)["State"]
    assert isinstance(state, dict)
    assert state["Health"]["Status"] == "healthy", state


@pytest.mark.parametrize("service", SERVICES)
def test_port_is_published_on_loopback_only(stack: Stack, service: str) -> None:
    port = int((stack.server if service == "server" else stack.client).rsplit(":", 1)[1])
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    assert listening == {"0100007F"}  # 127.0.0.1, as the kernel writes it


# A script that calls the server by every name and address that it can find or guess. It prints one line of JSON: what answered, and how.
EXPLORER = r"""cat >explore.py <<'END'
import http.client, ipaddress, json, os, re, socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PORTS = (5000, int(os.environ["PUBLISHED"]))
places = {"localhost", "host.docker.internal", "gateway.docker.internal", "172.31.255.1", "172.31.255.2", "172.17.0.1", "::1"}
places |= {"server", "front", "back", "token", "joborch-test-server-1", "joborch_test_server_1", "joborch-test-server"}
for row in Path("/proc/net/fib_trie").read_text().splitlines():
    found = re.search(r"([0-9]+[.][0-9]+[.][0-9]+[.][0-9]+)", row)
    if found and not found[1].startswith(("0.", "127.")):
        network = ipaddress.ip_network(found[1] + "/29", strict=False)
        places |= {str(address) for address in network}
tries = [(place, port, host) for place in places for port in PORTS for host in (f"{place}:{port}", "server:5000", "127.0.0.1", "localhost")]

def call(attempt):
    place, port, host = attempt
    link = http.client.HTTPConnection(place, port, timeout=2)
    try:
        link.request("GET", "/jobs", headers={"Host": host})
        answer = link.getresponse()
        return [place, port, host, answer.status, answer.getheader("X-Joborch") is not None]
    except (OSError, http.client.HTTPException):
        return None
    finally:
        link.close()

with ThreadPoolExecutor(32) as pool:
    print(json.dumps([said for said in pool.map(call, tries) if said]))
END
PUBLISHED=@PORT@ python3 explore.py
"""


def test_a_script_cannot_call_the_server(stack: Stack) -> None:
    """The server answers this machine without a token, and the client's container, where scripts run, not at all."""
    port = stack.server.rsplit(":", 1)[1]
    job_id = stack.upload(stack.script(EXPLORER.replace("@PORT@", port)))
    assert stack.wait_for_code(job_id, timeout_s=60) == "200", stack.job(job_id)
    with zipfile.ZipFile(stack.download(job_id)) as result:
        answers = json.loads(result.read(".joborch/stdout"))
    server = [answer for answer in answers if answer[4]]
    assert server, f"the script did not find the server at all, so that this test shows nothing: {answers}"
    assert {status for _, _, _, status, _ in server} == {403}, server
    assert not [answer for answer in answers if not answer[4]], answers


def test_the_published_port_is_on_the_network_of_its_own(stack: Stack) -> None:
    networks = stack.inspect("server")["NetworkSettings"]["Networks"]  # type: ignore[index]
    assert sorted(networks) == ["joborch-test_front", "joborch-test_hidden"]
    assert list(stack.inspect("client")["NetworkSettings"]["Networks"]) == ["joborch-test_hidden"]  # type: ignore[index]


def test_client_answers_only_who_has_the_token(stack: Stack) -> None:
    assert said(stack.shell("client", "stat -c %u:%a /token/token")).strip() == f"{UID}:400"
    assert said(stack.shell("client", "stat -c %u:%a /token")).strip() == f"{UID}:700"
    assert stack.shell("client", "rm -f /token/token").returncode != 0
    token = said(stack.shell("client", "cat /token/token")).strip()
    assert len(token) >= 32
    unknown = f"{stack.client}/retrieve/999999"
    assert stack.code(f"{stack.client}/health") == "200"
    assert stack.code(unknown) == "401"
    assert stack.code("-H", "Authorization: Bearer " + "x" * len(token), unknown) == "401"
    assert stack.code("-X", "POST", "-F", f"file=@{EXAMPLE / 'run.sh'}", f"{stack.client}/submit") == "401"
    assert stack.code("-H", f"Authorization: Bearer {token}", unknown) == "404"
    for service in SERVICES:  # neither in what `docker inspect` shows nor in the log
        assert token not in json.dumps(stack.inspect(service))
        assert token not in stack.compose("logs", service)


def test_image_holds_the_archive_and_nothing_of_the_build(stack: Stack) -> None:
    listing = "ls -d /joborch.pyz /src /build_zipapp.py /joborch.py 2>/dev/null || true"
    left = said(stack.docker("run", "--rm", "--entrypoint", "sh", "joborch", "-c", listing))
    assert left.split() == ["/joborch.pyz"]
    version = said(stack.docker("run", "--rm", "--read-only", "--cap-drop", "ALL", "--network", "none", "joborch", "--version"))
    assert version.startswith("joborch "), version


RECIPE = ("seccomp=unconfined", "systempaths=unconfined")  # of docker-compose.yml and docs/security.md


def test_doctor_says_how_scripts_can_be_kept_apart_in_a_container(stack: Stack) -> None:
    """Not at all by default; with the recipe by `process`, which then keeps what its scripts start."""
    ask = "JOBORCH_TOKEN=0123456789abcdef python3 /joborch.pyz doctor client 2>&1 || true"
    found = said(stack.shell("client", ask))
    assert re.search(r"this machine can do no better", found), found
    options = [word for value in ("no-new-privileges:true", *RECIPE) for word in ("--security-opt", value)]
    common = [
        "run",
        "--rm",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--tmpfs",
        "/tmp",
        "--network",
        "none",
        *options,
        "--entrypoint",
        "sh",
        "joborch",
    ]
    found = said(stack.docker(*common, "-c", ask))
    assert "JOBORCH_ISOLATION=process works here" in found, found
    text = (ROOT / "docker-compose.yml").read_text()
    assert all(value in text and value in (ROOT / "docs/security.md").read_text() for value in RECIPE)


def test_server_that_nobody_may_call_does_not_start(stack: Stack) -> None:
    done = stack.docker("run", "--rm", "--network", "none", "joborch")
    assert done.returncode == 2, done
    assert "JOBORCH_TOKEN" in done.stderr and "JOBORCH_ALLOW_ANONYMOUS" in done.stderr


def test_orphans_of_a_script_are_reaped(stack: Stack) -> None:
    job_id = stack.upload(stack.script("for n in 1 2 3; do (setsid sleep 0.2 &) ; done\n"))
    assert stack.wait_for_code(job_id) == "200"
    zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null"
    wait_for(lambda: not stack.shell("client", zombies).stdout, what="a client container without zombies")


def test_stopping_is_quick_and_clean(stack: Stack) -> None:
    began = time.monotonic()
    stack.compose("stop")
    took_s = time.monotonic() - began
    try:
        for service in SERVICES:
            state = stack.inspect(service)["State"]
            assert isinstance(state, dict)
            assert state["ExitCode"] == 0, f"{service}: {state}"  # 137 would say that TERM was not enough
        assert took_s < 9, "compose kills after 10 s"
    finally:
        stack.up()


def test_jobs_and_token_survive_down_and_up(stack: Stack) -> None:
    job_id = stack.upload(stack.script("echo kept >kept.txt\n"))
    assert stack.wait_for_code(job_id) == "200"
    token = said(stack.shell("client", "cat /token/token"))
    digest = hashlib.sha256(stack.download(job_id).read_bytes()).hexdigest()
    stack.compose("down")
    stack.up()
    assert hashlib.sha256(stack.download(job_id).read_bytes()).hexdigest() == digest
    assert said(stack.shell("client", "cat /token/token")) == token
    assert stack.wait_for_code(stack.upload(stack.script("true\n"))) == "200"


def test_job_that_ran_in_a_client_that_was_replaced_runs_again(stack: Stack) -> None:
    """A payload dies with its container; that is nobody's fault, and the next attempt completes."""
    job_id = stack.upload(stack.script('echo "$JOBORCH_ATTEMPT" >attempt\n[ "$JOBORCH_ATTEMPT" != 1 ] || sleep 60\n'))
    wait_for(lambda: stack.job(job_id)["status"] == "Running", what="Running")
    stack.compose("restart", "client")
    assert stack.wait_for_code(job_id, timeout_s=60) == "200", stack.job(job_id)
    with zipfile.ZipFile(stack.download(job_id)) as result:
        assert result.read("attempt") == b"2\n"
