"""A client and a server as job-orchestrator 2.2 has them, for the tests of compatibility.

Written from the contract (what such a peer does and does not); both really run, store and poll.
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import threading
import urllib.parse
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import multipart
import requests

EXIT_FILE = ".orchestrator.exit"
OUTPUT_FILE = "output.zip"
TRAP = "trap 'echo \"$?\" > .orchestrator.exit' EXIT"
POLL_S = 0.5
GOES_ON = {"Submitted", "Prepared", "Running"}


def zip_folder(folder: Path) -> bytes:
    """All files below `folder` as a ZIP, without an earlier one."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != OUTPUT_FILE:
                archive.write(path, path.relative_to(folder))
    return spool.getvalue()


# == The client of 2.2 ==


@dataclass
class Payload22:
    """What a 2.2 client knows of a payload; all of it is in memory, and gone with the process."""

    id: int
    loc: Path
    input: dict[str, bytes]
    status: str = "Prepared"
    pid: int = 0
    killed: bool = False
    process: subprocess.Popen[bytes] | None = None

    def answer(self, with_input: bool) -> dict[str, Any]:
        """The payload in JSON; /submit echoes every byte of the input as a number."""
        echoed = {name: list(content) for name, content in self.input.items()} if with_input else {}
        return {
            "id": self.id,
            "input": echoed,
            "status": self.status,
            "loc": str(self.loc),
            "pid": self.pid,
            "killed": self.killed,
        }

    def start(self) -> None:
        """Run the script, or call the payload invalid where there is none or where it has no trap."""
        script = self.loc / "run.sh"
        if not script.is_file() or "trap" not in script.read_text() or EXIT_FILE not in script.read_text():
            self.status = "Invalid"
            return
        output = (self.loc.parent / f"{self.id}.log").open("wb")
        with output:
            self.process = subprocess.Popen(["bash", "run.sh"], cwd=self.loc, stdout=output, stderr=output)
        self.pid, self.status = self.process.pid, "Running"

    def update(self) -> None:
        """Only the exit file of the trap ends a payload, or a kill; a process that is simply gone stays Running."""
        exit_file = self.loc / EXIT_FILE
        written = exit_file.read_text().strip() if exit_file.exists() else ""
        if self.killed:
            self.status = "Killed"
        elif written:
            self.status = "Completed" if written == "0" else "Failed"

    def kill(self) -> None:
        """Send TERM and return at once: the process may go on for a while."""
        self.killed = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


class Client22:
    """A 2.2 client on loopback: flattens folders, echoes inputs, has no /events, and numbers from 1 at every start."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.payloads: dict[int, Payload22] = {}
        self.asked: list[tuple[str, str]] = []
        self.starts = 0
        self.closes_late_s, self.late = 0.0, threading.Event()  # how long it waits before it closes one, and what ends that
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler22,), {"client": self}))
        self.port = self._http.server_address[1]
        self._threads = [
            threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True),
            threading.Thread(target=self._run_loop, daemon=True),
        ]

    @property
    def url(self) -> str:
        """The base URL on loopback."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Client22:
        """Serve and run from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End the service and the payloads' processes."""
        self._stopping.set()
        self.late.set()
        self._http.shutdown()
        self._http.server_close()
        for payload in self.payloads.values():
            if payload.process is not None and payload.process.poll() is None:
                payload.process.kill()
                payload.process.wait()

    def _run_loop(self) -> None:
        while not self._stopping.wait(0.05):
            with self._lock:
                for payload in self.payloads.values():
                    if payload.status == "Prepared":
                        payload.start()
                        self.starts += 1
                    elif payload.status == "Running":
                        payload.update()

    def add(self, files: dict[str, bytes]) -> Payload22:
        """Store the files under their base names in a new folder; the last of one name wins."""
        with self._lock:
            number = len(self.payloads) + 1
            loc = self.folder / f"{id(self)}-{number}"
            loc.mkdir()
            for name, content in files.items():
                (loc / name).write_bytes(content)
            self.payloads[number] = Payload22(number, loc, files)
            return self.payloads[number]

    def find(self, number: int) -> Payload22 | None:
        """One payload, or None."""
        with self._lock:
            return self.payloads.get(number)


class _Handler22(BaseHTTPRequestHandler):
    """The routes of a 2.2 client."""

    client: Client22
    protocol_version = "HTTP/1.1"

    def finish(self) -> None:
        """Close the connection, late if that is asked for."""
        self.client.late.wait(self.client.closes_late_s)
        super().finish()

    def do_GET(self) -> None:
        """`/`, /health, /load, /retrieve/ID and /retrieve_partial/ID; anything else is 404."""
        self._note()
        place, _, rest = self.path.lstrip("/").partition("/")
        if self.path == "/":
            self._json({"message": "pong"})
        elif self.path == "/health":
            self._json({"status": "ok", "database": "ok"})
        elif self.path == "/load":
            self._json(1.5)
        elif place in ("retrieve", "retrieve_partial") and rest.isdigit():
            self._retrieve(int(rest), whole=place == "retrieve")
        else:
            self._plain(404)

    def do_POST(self) -> None:
        """/submit and /kill/ID; anything else is 404."""
        self._note()
        body = self._body()
        place, _, rest = self.path.lstrip("/").partition("/")
        if self.path == "/submit":
            self._json(self.client.add(self._files(body)).answer(with_input=True))
        elif place == "kill" and rest.isdigit():
            self._kill(int(rest))
        else:
            self._plain(404)

    def _retrieve(self, number: int, whole: bool) -> None:
        payload = self.client.find(number)
        if payload is None:
            self._plain(404)
        elif whole and payload.status != "Completed":
            self._json(payload.answer(with_input=False))
        else:
            self._send(200, "application/zip", zip_folder(payload.loc))

    def _kill(self, number: int) -> None:
        payload = self.client.find(number)
        if payload is None:
            self._plain(404)
            return
        payload.kill()
        self._json({"message": "terminated"})

    def _files(self, body: bytes) -> dict[str, bytes]:
        """The parts that have a filename, under its base name: folders are flattened."""
        _, options = multipart.parse_options_header(self.headers["Content-Type"])
        parser = multipart.MultipartParser(io.BytesIO(body), options["boundary"], disk_limit=2**31)
        return {Path(each.filename).name: each.raw for each in parser if each.filename}

    def _body(self) -> bytes:
        """The request's body, with a length or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _note(self) -> None:
        self.client.asked.append((self.command, self.path))

    def _json(self, value: object) -> None:
        self._send(200, "application/json", json.dumps(value).encode())

    def _plain(self, code: int) -> None:
        self._send(code, "text/plain", b"")

    def _send(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


# == The server of 2.2 ==


@dataclass
class Job22:
    """What a 2.2 server knows of a job that it sent."""

    dest_id: int
    statuses: list[str] = field(default_factory=list)
    result: bytes = b""
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def status(self) -> str:
        """The status that it saw last."""
        return self.statuses[-1] if self.statuses else "Submitted"


class Server22:
    """The half of a 2.2 server that speaks with clients: sends files, polls, fetches, kills; it has no token."""

    def __init__(self, client_url: str) -> None:
        self.client_url = client_url
        self.session = requests.Session()
        self.session.trust_env = False
        self._stopping = threading.Event()

    def upload(self, files: dict[str, bytes]) -> Job22:
        """Send files by their relative paths and poll from then on; fails as a 2.2 server does at an odd answer."""
        boundary = "e5d5a0e1b2c34d5f-6a7b8c9d0e1f2a3b"
        body = b"".join(_part22(boundary, path, content) for path, content in files.items())
        answer = self.session.post(
            f"{self.client_url}/submit",
            data=body + f"--{boundary}--\r\n".encode(),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
            timeout=30,
        )
        assert answer.ok, f"/submit: {answer.status_code} {answer.text}"
        job = Job22(_payload_id(answer.json()))
        threading.Thread(target=self._poll, args=(job,), daemon=True).start()
        return job

    def _poll(self, job: Job22) -> None:
        """Ask every half second; a 5xx or silence is passed over, any other news is final."""
        while not job.ended.is_set() and not self._stopping.wait(POLL_S):
            try:
                answer = self.session.get(f"{self.client_url}/retrieve/{job.dest_id}", timeout=30)
            except requests.RequestException:
                continue
            if not answer.ok:
                continue
            if "application/zip" in answer.headers.get("Content-Type", ""):
                job.result = answer.content
                job.statuses.append("Completed")
            else:
                _payload_id(answer.json())
                job.statuses.append(answer.json()["status"])
            if job.status not in GOES_ON:
                job.ended.set()

    def wait(self, job: Job22, limit_s: float = 30) -> str:
        """The status at which the polling ended."""
        assert job.ended.wait(limit_s), f"payload {job.dest_id} never ended: {job.statuses[-5:]}"
        return job.status

    def terminate(self, job: Job22) -> None:
        """POST /kill/ID, satisfied with any 2xx."""
        answer = self.session.post(f"{self.client_url}/kill/{job.dest_id}", timeout=60)
        assert answer.ok, f"/kill: {answer.status_code} {answer.text}"

    def close(self) -> None:
        """Poll no more."""
        self._stopping.set()
        self.session.close()


def _part22(boundary: str, path: str, content: bytes) -> bytes:
    """A part as 2.2 writes it: the path is the name, percent-encoded in `name*` (and no `name`) where it has to be."""
    encoded = re.sub(r"[^!$&\'()*+,\-.0-9:;=@A-Z\[\\\]^_a-z|~]", lambda match: urllib.parse.quote(match[0], safe=""), path)
    name = f'name="{path}"' if encoded == path else f"name*=utf-8''{encoded}"
    base = path.rpartition("/")[2].replace("\\", "\\\\").replace('"', '\\"')
    head = f'--{boundary}\r\nContent-Disposition: form-data; {name}; filename="{base}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


def _payload_id(payload: dict[str, Any]) -> int:
    """The id of a payload that has all six fields in the types that 2.2 reads; anything else is an error there."""
    kinds = {"id": int, "input": dict, "status": str, "loc": str, "pid": int, "killed": bool}
    for name, kind in kinds.items():
        assert type(payload.get(name)) is kind, f"2.2 cannot read {name}={payload.get(name)!r}"
    return int(payload["id"])
