"""The samples in deploy/, each by the real program: systemd, nginx with TLS, Caddy, and the schemas of Kubernetes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
import yaml
from conftest import MakePair, MakeProcess
from harness import (
    ROOT,
    Archive,
    Pair,
    download,
    field_part,
    file_part,
    form,
    form_type,
    free_port,
    need_backend,
    parse_answer,
    paths_below,
    raw_head,
    read_all,
    run_to_end,
    upload,
    wait_for,
    wait_status,
)
from world import Desk, command

import joborch
from joborch_base.settings import SERVICE_SETTINGS, SETTINGS
from joborch_plugins import admin, joined, joining

DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service")) + sorted(DEPLOY.glob("*.timer"))


# == systemd ==


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    """Nothing is said: no unknown setting, no missing program."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian: systemd)")
    for each in UNITS:
        shutil.copy(each, tmp_path)
    of_user = ["--user"] if "-user" in unit.name else []
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *of_user, str(tmp_path / unit.name)],
        capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_use_settings_and_commands_that_exist(unit: Path) -> None:
    text = unit.read_text()
    names = {setting.name for setting in SETTINGS} | {"XDG_CACHE_HOME"}
    assert set(re.findall(r"^Environment=(\w+)=", text, re.MULTILINE)) <= names
    if "client" in unit.name:
        assert "KillMode=process" in text, "scripts go on when the client is stopped"
    for words in re.findall(r"joborch.pyz (.*)", text):
        assert re.fullmatch(r"(server|client)( --env-file \S+)?|backup --keep 14 --env-file \S+ \S+", words)


def unit_of(name: str, root: Path) -> tuple[list[str], dict[str, str | None]]:
    """The words after joborch.pyz and the environment of a unit, with its folders below `root`."""
    text = re.sub(r"(?<=[= ])/(etc|opt|var|run)/", rf"{root}/\1/", (DEPLOY / name).read_text())
    for folder in re.findall(rf"{root}/(?:etc/joborch|var/\w+/[\w-]+|run/[\w-]+)", text):
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    [command] = re.findall(r"^ExecStart=.*/joborch.pyz (.*)$", text, re.MULTILINE)
    return command.split(), dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))


def test_no_unit_of_a_client_takes_privileges_that_scripts_need() -> None:
    """For a unit with User=, each of these implies NoNewPrivileges=yes (systemd.exec(5)), and setuid programs of scripts would fail."""
    implied = (
        "NoNewPrivileges|SystemCall|RestrictAddressFamilies|RestrictNamespaces|RestrictRealtime|RestrictSUIDSGID|PrivateDevices|"
        "ProtectKernel|ProtectClock|ProtectHostname|MemoryDenyWriteExecute|LockPersonality|DynamicUser"
    )
    for unit in ("joborch-client.service", "joborch-client-user.service"):
        assert not re.findall(rf"^(?:{implied})\w*=", (DEPLOY / unit).read_text(), re.MULTILINE), unit


def test_an_operator_works_with_what_the_units_start(make_process: MakeProcess, tmp_path: Path) -> None:
    """As docs/operate.md says: commands by the socket without a token, the check of settings, and the way back to a backup."""
    (role, *words), settings = unit_of("joborch-server.service", tmp_path)
    server = make_process(role, settings, arguments=words)
    file, token = tmp_path / "etc" / "joborch" / "server.env", tmp_path / "etc" / "joborch" / "callers"

    for path, text in ((token, "callers-have-this-token\n"), (file, f"JOBORCH_TOKEN_FILE={token}\n")):
        path.write_text(text)
        path.chmod(0o600)
    server.start()
    bearer = {"Authorization": "Bearer callers-have-this-token"}
    first = upload(server, {"run.sh": b"true"}, headers=bearer).json()["id"]
    root = make_process("server", {"JOBORCH_SERVER": f"unix:{settings['JOBORCH_SOCKET']}"})
    assert command(root, "token", "add", "ward-7", "--role", "user", "--user", "7").returncode == 0
    assert "ward-7" in command(root, "token", "list").stdout
    assert command(server, "config", "server", "--check", str(file)).stdout == "nothing would change\n"
    done = command(server, *unit_of("joborch-backup.service", tmp_path)[0])
    assert done.returncode == 0, done.stderr
    second = upload(server, {"run.sh": b"true"}, headers=bearer).json()["id"]
    server.stop()
    [copy] = (tmp_path / "var" / "lib" / "joborch-backup").glob("joborch-*.db")
    restored = command(server, "restore", "--env-file", str(file), str(copy))
    assert restored.returncode == 0 and f"job {second} " in restored.stdout, restored.stderr
    server.start()
    answers = [server.get(f"/jobs/{number}", headers=bearer).status_code for number in (first, second)]
    assert answers == [200, 404]


def test_what_the_units_start_works_together(make_process: MakeProcess, tmp_path: Path) -> None:
    """Server, client and backup by their lines of command and their variables, with settings in the files that they name."""
    processes = {}
    (tmp_path / "etc" / "joborch").mkdir(parents=True)
    for name in ("client", "server"):
        (role, *words), settings = unit_of(f"joborch-{name}.service", tmp_path)
        processes[name] = make_process(role, settings, arguments=words)
    server, client = processes["server"], processes["client"]
    token = "JOBORCH_TOKEN=a-token-of-the-client\n"
    (tmp_path / "etc" / "joborch" / "client.env").write_text(token)
    lines = f"SERVICE_EXAMPLE_CLIENTS={client.url}\nSERVICE_EXAMPLE_TOKEN=a-token-of-the-client\n"
    (tmp_path / "etc" / "joborch" / "server.env").write_text(lines)
    for process in (client, server):
        process.start()
        assert process.settings["DATA_PATH"].startswith(str(tmp_path))  # type: ignore[union-attr]
    assert run_to_end(server, "true")["status"] == "Completed"
    words, settings = unit_of("joborch-backup.service", tmp_path)
    server.settings = settings
    done = command(server, *words)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "var" / "lib" / "joborch-backup").glob("joborch-*.db"))) == 1


def test_a_process_tells_systemd_when_it_is_ready(make_pair: MakePair, tmp_path: Path) -> None:
    """Type=notify: not before it listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(str(tmp_path / "notify"))
        notes.settimeout(60)
        pair = make_pair(server={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        pair.server.spawn()
        assert notes.recv(100) == b"READY=1"
        assert pair.server.get("/health").status_code == 200


# == Backups ==


def test_backups_are_kept_in_a_number(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "backups", desk.server.config
    folder.mkdir()
    (folder / "joborch-monday.db").write_bytes(b"of somebody else")
    config = type(config)(**{**vars(config), "db_path": desk.store.path})
    for day in range(5):
        monkeypatch.setattr(time, "gmtime", lambda day=day: (2026, 11, 20 + day, 1, 2, 3, 0, 0, 0))
        assert admin.command_backup(config, str(folder), keep=3) == 0
    kept = [f"joborch-202611{day}T010203Z.db" for day in (22, 23, 24)]
    assert sorted(path.name for path in folder.iterdir()) == [*kept, "joborch-monday.db"]


def test_keep_needs_a_folder_and_a_number(make_pair: MakePair, tmp_path: Path) -> None:
    server = make_pair().server
    for words, said in ((("--keep", "0", str(tmp_path)), "--keep is 0"), (("--keep", "3", str(tmp_path / "none")), "is not a folder")):
        done = command(server, "backup", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr


# == nginx with TLS ==

TOKEN = {"Authorization": "Bearer sesame-sesame-sesame"}


class Site:
    """nginx with deploy/nginx.conf, on other ports and with a certificate of its own."""

    def __init__(self, folder: Path, server_port: int) -> None:
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        need_backend(Path(nginx or "/usr/sbin/nginx"))
        folder.mkdir()
        self.port, self.certificate, key = free_port(), folder / "certificate", folder / "key"
        words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(self.certificate), "-days", "2"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(["openssl", "req", *words, *names], check=True, capture_output=True)
        text = (DEPLOY / "nginx.conf").read_text()
        for sample, ours in (
            ("listen 443 ssl;", f"listen 127.0.0.1:{self.port} ssl;"),
            ("/etc/ssl/jobs.example.org.pem", str(self.certificate)),
            ("/etc/ssl/jobs.example.org.key", str(key)),
            ("http://127.0.0.1:5000", f"http://127.0.0.1:{server_port}"),
        ):
            assert sample in text, sample
            text = text.replace(sample, ours)
        user = "user root;" if os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "conf").write_text(
            f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
            f"http {{ access_log off; {places}\n{text} }}\n"
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([str(nginx), "-p", str(folder), "-c", str(folder / "conf")], stdout=log, stderr=log)
        wait_for(self.answers, 60, "an answer of nginx")

    def answers(self) -> bool:
        try:
            return self.call("GET", "/health").status_code == 200
        except requests.ConnectionError:
            return False

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {**TOKEN, **options.pop("headers", {})}
        url = f"https://localhost:{self.port}{path}"
        return requests.request(method, url, headers=headers, timeout=100, verify=str(self.certificate), **options)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Site]]:
    folder = tmp_path_factory.mktemp("behind")
    pair, site = Pair(folder, {"JOBORCH_TOKEN": TOKEN["Authorization"].split()[1]}), None
    pair.server.api.headers.update(TOKEN)
    try:
        pair.start()
        site = Site(folder / "nginx", pair.server.port)
        yield pair, site
    finally:
        if site is not None:
            site.close()
        pair.close()


def test_a_job_through_nginx(behind: tuple[Pair, Site], tmp_path: Path) -> None:
    """An upload in chunks, a long poll, live output, and the result; only with a token."""
    pair, site = behind
    gate = tmp_path / "gate"
    script = f"echo begun; until [ -e {gate} ]; do sleep 0.05; done; cat large >copy; echo over"
    large = os.urandom(3_000_000)
    files = [("file", ("run.sh", script)), ("file", ("large", large))]
    body = requests.Request("POST", "https://localhost/", files=files, data={"user_id": "1", "service": "example"}).prepare()
    assert isinstance(body.body, bytes)
    pieces = (body.body[at : at + 65536] for at in range(0, len(body.body), 65536))
    answer = site.call("POST", "/upload", data=pieces, headers={"Content-Type": body.headers["Content-Type"]})
    assert answer.status_code == 201, answer.text
    number = answer.json()["id"]
    wait_status(pair.server, number, "Running", limit_s=60)
    with site.call("GET", f"/jobs/{number}/logs?follow=1", stream=True) as live:
        assert next(live.iter_lines()) == b"begun", "it arrives while the script runs"
    gate.touch()
    ended = site.call("GET", f"/jobs/{number}?wait=45&since=Running").json()
    assert ended["status"] == "Completed", ended
    assert site.call("GET", f"/download/{number}").content == pair.server.get(f"/download/{number}").content
    assert download(pair.server, number)["copy"] == large
    assert requests.get(f"https://localhost:{site.port}/jobs", verify=str(site.certificate), timeout=60).status_code == 401


def test_it_speaks_tls_alone(behind: tuple[Pair, Site]) -> None:
    context = ssl.create_default_context(cafile=str(behind[1].certificate))
    line = socket.create_connection(("127.0.0.1", behind[1].port), 60)
    with line, context.wrap_socket(line, server_hostname="localhost") as secure:
        assert secure.version() in ("TLSv1.2", "TLSv1.3")


# -- large --

GIB = 1 << 30
LARGE = 5 * GIB
EDGES = (0, 2 * GIB, 4 * GIB, LARGE)  # where counters of 31 and 32 bits overflow
PIECE = 1 << 20
ZEROS = bytes(PIECE)


def large_pieces() -> Iterator[bytes]:
    """A large file: zeros, and before and after each edge a line that says where it is."""
    places = [place for edge in EDGES for place in (edge - 16, edge) if 0 <= place < LARGE]
    for at in range(0, LARGE, PIECE):
        piece = bytearray(ZEROS) if any(at <= place < at + PIECE for place in places) else ZEROS
        for place in places:
            if isinstance(piece, bytearray) and at <= place < at + PIECE:
                piece[place - at : place - at + 16] = b"%15d\n" % place
        yield piece


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) << 10


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of an nginx."""
    return [process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


@pytest.fixture(name="roomy")
def roomy_fixture(tmp_path: Path) -> Iterator[Path]:
    """A folder for a large file: in memory if there is plenty, since a disk may take minutes; it goes with the test."""
    memory, shared = Path("/proc/meminfo").read_text(), Path("/dev/shm")
    available = int(re.findall(r"MemAvailable:\s+(\d+) kB", memory)[0]) << 10
    in_memory = available > 2 * LARGE and shared.is_dir() and shutil.disk_usage(shared).free > 2 * LARGE
    if not in_memory and shutil.disk_usage(tmp_path).free < LARGE + 3 * GIB:
        pytest.skip("needs 10 GiB of free memory, or 8 GiB of free disk")
    folder = Path(tempfile.mkdtemp(dir=shared if in_memory else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(900)
def test_five_gib_through_nginx(roomy: Path, make_process: MakeProcess, tmp_path: Path) -> None:
    """Neither nginx nor the server keeps it in memory or in a second place of the disk; every byte around 2 and 4 GiB is right."""
    server = make_process(
        "server", {"JOBORCH_TOKEN": TOKEN["Authorization"].split()[1], "SERVICE_LATER_CLIENTS": "", "DATA_PATH": str(roomy)}
    ).start()
    server.api.headers.update(TOKEN)
    site = Site(tmp_path / "nginx", server.port)
    try:
        head = file_part("run.sh", b"true") + field_part("user_id", "1") + field_part("service", "later")
        head += file_part("large", b"").removesuffix(b"\r\n")  # the file is its content
        tail = b"\r\n" + form([])
        lines = [f"Content-Length: {len(head) + LARGE + len(tail)}", f"Authorization: {TOKEN['Authorization']}"]
        lines.append(f"Content-Type: {form_type()['Content-Type']}")
        context = ssl.create_default_context(cafile=str(site.certificate))
        line = socket.create_connection(("127.0.0.1", site.port), 300)
        with line, context.wrap_socket(line, server_hostname="localhost") as secure:
            secure.sendall(raw_head("POST", "/upload", site.port, *lines) + head)
            for piece in large_pieces():
                secure.sendall(piece)
            secure.sendall(tail)
            status, _, body = parse_answer(read_all(secure))
        assert status == 201, body
        path = f"/jobs/{json.loads(body)['id']}/files"
        assert {file["path"]: file["size"] for file in site.call("GET", path).json()["files"]}["large"] == LARGE
        for edge in EDGES:
            first, last = max(0, edge - 16), min(LARGE, edge + 16) - 1
            answer = site.call("GET", f"{path}/large", headers={"Range": f"bytes={first}-{last}"})
            assert answer.status_code == 206 and answer.headers["Content-Range"] == f"bytes {first}-{last}/{LARGE}"
            assert answer.content.split() == [b"%d" % place for place in (edge - 16, edge) if 0 <= place < LARGE]
        assert all(peak_bytes(pid) < 100 << 20 for pid in workers_of(site.process))
        assert peak_bytes(server.pid) < 300 << 20
        assert sum(each.stat().st_size for each in paths_below(tmp_path / "nginx") if each.is_file()) < 10 << 20
    finally:
        site.close()


def test_nginx_waits_longer_than_joborch_is_silent() -> None:
    """Long polls of callers and of clients that call in, comments of followed output: by its own line, not by what nginx has as default."""
    [patience_s] = re.findall(r"proxy_read_timeout (\d+)s;", (DEPLOY / "nginx.conf").read_text())
    assert max(joborch.WAIT_LIMIT_S, 2 * joborch.COMMENT_EVERY_S, joined.POLL_S) <= int(patience_s) - 10
    [patience_min] = re.findall(r"proxy_read_timeout (\d+)m;", (DEPLOY / "nginx.conf").read_text())
    assert 60 * int(patience_min) > joining.LONGEST_POLL_S, "else 500 waiting clients cost more than one percent of a core"


# == Caddy and Kubernetes ==


def test_a_job_through_caddy(make_pair: MakePair, tmp_path: Path) -> None:
    """By the sample, with another name and a certificate of Caddy's own."""
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("needs caddy (Debian: caddy)")
    pair = make_pair(server={"JOBORCH_TOKEN": TOKEN["Authorization"].split()[1]})
    pair.server.api.headers.update(TOKEN)
    pair.start()
    text, port, config = (DEPLOY / "Caddyfile").read_text(), free_port(), tmp_path / "Caddyfile"
    for sample, ours in (
        ("jobs.example.org {\n", f"https://localhost:{port} {{\n\ttls internal\n"),
        ("127.0.0.1:5000", f"127.0.0.1:{pair.server.port}"),
    ):
        assert text.count(sample) == 1, sample
        text = text.replace(sample, ours)
    config.write_text("{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n" + text)
    places = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    words = [caddy, "run", "--config", str(config), "--adapter", "caddyfile"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, env={**os.environ, **places}, stdout=log, stderr=log, cwd=tmp_path)
    root = tmp_path / "data" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    url = f"https://localhost:{port}"

    def answers() -> bool:
        try:
            return root.exists() and requests.get(f"{url}/health", verify=str(root), timeout=60).status_code == 200
        except requests.ConnectionError:
            return False

    try:
        wait_for(answers, 60, f"an answer of Caddy; {(tmp_path / 'log').read_text()}")
        files = [("file", ("run.sh", "echo here; cat large > copy")), ("file", ("large", "x" * 3_000_000))]
        data = {"user_id": "1", "service": "example"}
        sent = requests.post(f"{url}/upload", data=data, files=files, headers=TOKEN, verify=str(root), timeout=60)
        assert sent.status_code == 201, sent.text
        number = sent.json()["id"]
        with requests.get(f"{url}/jobs/{number}/logs?follow=1", headers=TOKEN, verify=str(root), timeout=60, stream=True) as live:
            assert next(live.iter_lines()) == b"here"
        assert wait_status(pair.server, number, "Completed", limit_s=60)
        got = requests.get(f"{url}/download/{number}", headers=TOKEN, verify=str(root), timeout=60)
        assert Archive(got.content)["copy"] == b"x" * 3_000_000
        assert requests.get(f"{url}/jobs", verify=str(root), timeout=60).status_code == 401
    finally:
        process.terminate()
        process.wait(60)


def manifests() -> list[dict[str, Any]]:
    """The documents of deploy/kubernetes.yml."""
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yml").read_text()))


def test_the_manifests_fit_the_schemas_of_kubernetes() -> None:
    for document in manifests():
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_manifests_fit_the_program_and_each_other() -> None:
    """Settings exist, ports and volumes are those that are used, and the server calls the client by its name there."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in manifests()}
    known = {setting.name for setting in SETTINGS} | {f"SERVICE_EXAMPLE_{setting.name}" for setting in SERVICE_SETTINGS}
    for mode, port in (("server", 5000), ("client", 9000)):
        pod = found["StatefulSet", f"joborch-{mode}"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        assert container["args"] == [mode] and [each["containerPort"] for each in container["ports"]] == [port]
        assert {each["name"] for each in container["env"]} <= known
        claims = [each["metadata"]["name"] for each in found["StatefulSet", f"joborch-{mode}"]["spec"].get("volumeClaimTemplates", [])]
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]} | set(claims)
        folders = [each["mountPath"] for each in container["volumeMounts"]]
        for each in container["env"]:
            assert not each["name"].endswith("TOKEN_FILE") or str(Path(each["value"]).parent) in folders
        assert found["Service", f"joborch-{mode}"]["spec"]["ports"][0]["port"] == port
        assert ("NetworkPolicy", f"joborch-{mode}") in found
        user = re.search(r"USER (\d+):(\d+)", (ROOT / "Dockerfile").read_text())
        assert user and pod["securityContext"]["runAsUser"] == int(user[1]) and pod["securityContext"]["fsGroup"] == int(user[2])
