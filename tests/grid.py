"""A real DiracX for tests, and a pilot that plays what DIRAC's worker nodes do; nothing in here imports joborch."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import tarfile
import zlib
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
from harness import ROOT, free_port, need_backend

SERVER = ROOT.parent / "shared/backends/diracx/server"
START_LIMIT_S = 300  # on a busy machine a start has taken two minutes
STORE_ABOVE = 1700  # the sandbox store's port is so much above the service's

# Prints token responses as JSON: by user name, each with a refresh token of its own; `pilot` may play the pilot.
ISSUE = """
import asyncio, json, sys
from diracx.core.config import ConfigSource
from diracx.core.properties import SecurityProperty
from diracx.core.settings import AuthSettings, FactorySettings
from diracx.db.sql import AuthDB
from diracx.logic.auth.token import create_token, exchange_token

async def issue(who):
    settings, config = AuthSettings(), ConfigSource.create().read()
    database = AuthDB(FactorySettings().sql_dbs["AuthDB"])
    async with database.engine_context():
        async with database:
            access, refresh = await exchange_token(
                database, "vo:testvo group:user", {"sub": "alice-sub"}, config, settings, SecurityProperty.available_properties()
            )
    if who == "pilot":
        access.dirac_properties = ["JobAdministrator", "GenericPilot", "NormalUser"]
    elif who != "alice":
        access.preferred_username = who
    access.dirac_policies = refresh.dirac_policies = {}
    return {"access_token": create_token(access, settings), "refresh_token": create_token(refresh, settings)}

print(json.dumps([asyncio.run(issue(who)) for who in sys.argv[1:]]))
"""

# Reads JDL from each line of JSON, and prints what DIRAC's own parser makes of it.
PARSE = """
import json, sys
from DIRACCommon.Core.Utilities.ClassAd.ClassAdLight import ClassAd
for line in sys.stdin:
    jdl = ClassAd(json.loads(line))
    print(json.dumps({name: jdl.getListFromExpression(name) for name in jdl.getAttributes()}), flush=True)
"""


def port_with_store() -> int:
    """A free port, of which that of the sandbox store is free, too."""
    for _ in range(100):
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + STORE_ABOVE)):
            return port
    raise AssertionError("no two free ports found")


class DiracX:
    """A running service in a folder, with tokens for alice, for a pilot, and for bob of the same group."""

    def __init__(self, folder: Path) -> None:
        need_backend(SERVER)
        self.folder, self.port = folder, port_with_store()
        self.venv = Path(os.environ.get("DIRACX_VENV") or ROOT / ".venv-diracx")
        assert self.venv.exists(), f"{self.venv} is missing: tests/run makes it"
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=5, read=30))
        try:
            self.server("start", str(self.port))
        except BaseException:
            self.stop()
            raise
        self.spare: list[dict[str, str]] = []  # new logins: one process makes many as quickly as one
        *self.spare, alice, pilot, bob = self.logins(*["alice"] * 8, "alice", "pilot", "bob")
        self.alice, self.pilot, self.bob = (each["access_token"] for each in (alice, pilot, bob))

    def server(self, verb: str, *more: str) -> None:
        """Run the script that starts and stops it."""
        environment = {**os.environ, "DIRACX_VENV": str(self.venv)}
        with (self.folder / "server.log").open("ab") as log:
            done = subprocess.run([SERVER, verb, self.folder, *more], env=environment, stdout=log, stderr=log, timeout=START_LIMIT_S)
        assert done.returncode == 0, (self.folder / "server.log").read_text()[-2000:]

    def stop(self) -> None:
        """End the service, by the process ids that it left."""
        self.server("stop")

    def python(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A Python of the service's own, with its settings."""
        command = ["bash", "-c", f'. "{self.folder}/env.sh"; exec "$@"', "-", str(self.venv / "bin/python"), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self.folder, **options)

    def logins(self, *users: str) -> list[dict[str, str]]:
        """New logins of these users."""
        with self.python("-c", ISSUE, *users) as process:
            said = process.communicate(timeout=60)[0]
        return list(json.loads(said))

    def login(self) -> dict[str, str]:
        """A new login of alice; who gets her refresh tokens revoked empties `spare`."""
        self.spare = self.spare or self.logins(*["alice"] * 8)
        return self.spare.pop()

    def call(self, method: str, path: str, body: Any = None, token: str = "", expect: int = 200) -> Any:
        """What the API answers."""
        headers = {"Authorization": f"Bearer {token or self.pilot}", "Connection": "close", "Content-Type": "application/json"}
        answer = self.http.request(method, self.url + path, body=None if body is None else json.dumps(body), headers=headers)
        assert answer.status == expect, (answer.status, answer.data)
        return json.loads(answer.data) if answer.data else None

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """The jobs with these values, of all users."""
        search = [{"parameter": name, "operator": "eq", "value": value} for name, value in wanted.items()]
        return list(self.call("POST", "/api/jobs/search", {"search": search}))

    def submit(self, name: str, token: str = "") -> int:
        """A job by somebody else than joborch."""
        jdl = f'[Executable = "/bin/true"; JobName = "{name}";]'
        return int(self.call("POST", "/api/jobs/jdl", [jdl], token or self.alice, 201)[0]["JobID"])


class Pilot:
    """What a worker node does for one job, as DIRAC's JobWrapper does it; each step is a call."""

    def __init__(self, diracx: DiracX, number: int, folder: Path) -> None:
        self.diracx, self.number, self.folder = diracx, number, folder
        self.late = timedelta()
        self.process: subprocess.Popen[bytes] | None = None

    def say(self, status: str = "", minor: str = "", source: str = "JobWrapper") -> dict[str, Any]:
        """Report a status; the time is this machine's, off by `late`."""
        change = {"Source": source, **({"Status": status} if status else {}), **({"MinorStatus": minor} if minor else {})}
        stamp = (datetime.now(timezone.utc) + self.late).isoformat(timespec="microseconds")
        said = self.diracx.call("PATCH", "/api/jobs/status", {str(self.number): {stamp: change}})
        return dict(said["success"][str(self.number)])

    def wait(self) -> Pilot:
        """Bring the job to where it waits for a pilot."""
        self.say("Checking", "JobSanity", "JobSanity")
        self.say("Waiting", "Pilot Agent Submission", "JobScheduling")
        return self

    def jdl(self) -> str:
        """The job's JDL, which no route gives."""
        with sqlite3.connect(self.diracx.folder / "db/jobdb.db") as database:
            text = database.execute("SELECT OriginalJDL FROM JobJDLs WHERE JobID = ?", (self.number,)).fetchone()[0]
        return zlib.decompress(base64.b64decode(text)).decode()

    def listed(self, name: str) -> list[str]:
        """A list of the JDL."""
        match = re.search(rf"\b{name} = {{(.*?)}}", self.jdl())
        return re.findall(r'"([^"]*)"', match[1]) if match else []

    def start(self) -> Pilot:
        """Match the job, bring its inputs, and start what it names."""
        self.say("Matched", "Assigned", "Matcher")
        self.say("Running", "Downloading InputSandbox")
        self.folder.mkdir()
        for pfn in self.listed("InputSandbox"):
            url = self.diracx.call("GET", f"/api/jobs/sandbox?pfn={quote(pfn, safe='')}")["url"]
            data = self.diracx.http.request("GET", url).data
            assert hashlib.sha256(data).hexdigest() in pfn
            with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
                archive.extractall(self.folder)
        self.say("", "Application")
        match = re.search(r'Executable = "(.*?)"', self.jdl())
        assert match
        with (self.folder / "std.out").open("wb") as out, (self.folder / "std.err").open("wb") as err:
            command = [str(self.folder / match[1])]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=err, start_new_session=True)
        return self

    def kill(self) -> None:
        """End the process, as after a heartbeat whose answer held a kill."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)

    def upload(self, names: list[str] | None = None) -> str:
        """Send the output sandbox; return its pfn."""
        sandbox = io.BytesIO()
        with tarfile.open(fileobj=sandbox, mode="w:bz2") as archive:
            for name in names or self.listed("OutputSandbox"):
                if (self.folder / name).exists():
                    archive.add(self.folder / name, name)
        return self.upload_bytes(sandbox.getvalue())

    def upload_bytes(self, data: bytes, suffix: str = "tar.bz2") -> str:
        """Send bytes as the output sandbox; return its pfn."""
        digest = hashlib.sha256(data).hexdigest()
        request = {"checksum_algorithm": "sha256", "checksum": digest, "size": len(data), "format": suffix}
        said = self.diracx.call("POST", "/api/jobs/sandbox", request)
        if said["url"]:
            answer = self.diracx.http.request("POST", said["url"], fields={**said["fields"], "file": ("sandbox", data)})
            assert answer.status == 204
        self.diracx.call("PATCH", f"/api/jobs/{self.number}/sandbox/output", said["pfn"])
        return str(said["pfn"])

    def finish(self) -> int:
        """Wait for the process, send its outputs, and report the end; return the exit status."""
        assert self.process
        status = self.process.wait(60)
        self.say("Completing", "Uploading Output Sandbox")
        self.upload()
        self.say("Failed" if status else "Done", "Application Finished With Errors" if status else "Execution Complete")
        return status

    def run(self) -> int:
        """All of it."""
        return self.wait().start().finish()
