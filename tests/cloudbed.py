"""Real clouds for tests, whose instances are processes of this machine: an OpenStack, and an EC2 endpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from harness import ROOT, free_port, need_backend

from joborch_base.settings import Cloud, Config
from joborch_plugins.cloud_providers import Node, make_provider


def two_ports() -> int:
    """A free port whose follower is free, too."""
    for _ in range(100):
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port
    raise AssertionError("no two free ports found")


class CloudBed:
    """A cloud that runs in a folder, and what a test does to it from outside."""

    KIND, VENV, VARIABLE = "", "", ""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.command = folder, ROOT.parent / "shared/backends" / self.KIND / "cloud"
        need_backend(self.command)
        venv = Path(os.environ.get(self.VARIABLE) or ROOT / self.VENV)
        assert venv.exists(), f"{venv} is missing: tests/run makes it"
        self.environment = {**os.environ, self.VARIABLE: str(venv), **environment}
        folder.mkdir(parents=True, exist_ok=True)
        self.port = two_ports()
        try:
            self.run("start", str(self.port))
        except BaseException:
            self.stop()
            raise
        self.said = json.loads((folder / "cloud.json").read_text())

    def run(self, verb: str, *more: str) -> None:
        """Run the script that starts and stops it."""
        with (self.folder / "script.log").open("ab") as log:
            done = subprocess.run([self.command, verb, self.folder, *more], env=self.environment, stdout=log, stderr=log, timeout=300)
        assert done.returncode == 0, (self.folder / "script.log").read_text()[-2000:]

    def stop(self) -> None:
        """End it with its instances, by the process ids that it left."""
        self.resume()
        self.run("stop")

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in (self.folder / "run").glob("*.pid")]

    def pause(self) -> None:
        """Let it answer no more."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def settings(self, folder: Path, name: str = "lab", **more: str | None) -> dict[str, str | None]:
        """The settings of a server for this cloud, with a file of credentials in a folder."""
        path = folder / f"{name}.json"
        path.write_text(json.dumps(self.credentials()))
        path.chmod(0o600)
        own = {"PROVIDER": self.KIND, "CREDENTIALS": str(path), **self.shape(), **more}
        return {f"CLOUD_{name.upper()}_{suffix}": value for suffix, value in own.items()}

    def credentials(self) -> dict[str, Any]:
        raise NotImplementedError

    def shape(self) -> dict[str, str]:
        raise NotImplementedError

    def provider(self) -> Any:
        """The program's own way to it, as its owner may use it."""
        path = self.folder / "owner.json"
        path.write_text(json.dumps(self.credentials()))
        path.chmod(0o600)
        given = {name.lower(): value for name, value in self.shape().items()}
        cloud = Cloud("lab", provider=self.KIND, credentials=str(path), **given)
        return make_provider(cloud, Config("server"))

    def driver(self) -> Any:
        """Libcloud's driver."""
        raise NotImplementedError

    def instances(self) -> list[dict[str, Any]]:
        """The instances that are not gone, as the cloud itself lists them: id, name, state and tags."""
        raise NotImplementedError


class OpenStack(CloudBed):
    """Keystone and Nova, with the quota of ten instances."""

    KIND, VENV, VARIABLE = "openstack", ".venv-openstack", "OPENSTACK_VENV"

    def credentials(self) -> dict[str, Any]:
        return {name: self.said[name] for name in ("auth_url", "region", "credential_id", "credential_secret")}

    def shape(self) -> dict[str, str]:
        return {"IMAGE": "155d900f-4e14-4e4c-a73d-069cbf4541e6", "SIZE": "m1.tiny"}

    def login(self, user: str = "scaler", project: str = "fleet") -> requests.Response:
        """What Keystone answers to a password, with a token."""
        who = {"name": user, "password": "secret", "domain": {"id": "default"}}
        scope = {"project": {"name": project, "domain": {"id": "default"}}}
        auth = {"identity": {"methods": ["password"], "password": {"user": who}}, "scope": scope}
        answer = requests.post(f"{self.said['auth_url']}/auth/tokens", json={"auth": auth}, timeout=60)
        answer.raise_for_status()
        return answer

    def token(self, **who: str) -> str:
        """A token of the cloud's own."""
        return self.login(**who).headers["X-Subject-Token"]

    def of_credentials(self, method: str, path: str = "", body: Any = None) -> Any:
        """What Keystone answers on the application credentials of the user."""
        login = self.login()
        url = f"{self.said['auth_url']}/users/{login.json()['token']['user']['id']}/application_credentials{path}"
        answer = requests.request(method, url, json=body, headers={"X-Auth-Token": login.headers["X-Subject-Token"]}, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def new_credentials(self, name: str) -> dict[str, Any]:
        """Further credentials, which a test may revoke."""
        made = self.of_credentials("POST", body={"application_credential": {"name": name}})["application_credential"]
        return {**self.credentials(), "credential_id": made["id"], "credential_secret": made["secret"]}

    def revoke(self, credentials: dict[str, Any]) -> None:
        self.of_credentials("DELETE", f"/{credentials['credential_id']}")

    def nova(self, method: str, path: str, body: Any = None, **who: str) -> Any:
        """What Nova answers."""
        url = f"http://127.0.0.1:{self.port + 1}/compute/v2.1{path}"
        answer = requests.request(method, url, json=body, headers={"X-Auth-Token": self.token(**who)}, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def instances(self) -> list[dict[str, Any]]:
        servers = self.nova("GET", "/servers/detail")["servers"]
        return [{"id": each["id"], "name": each["name"], "state": each["status"], "tags": each["metadata"]} for each in servers]

    def driver(self) -> Any:
        provider = self.provider()
        provider.size()
        return provider.made

    def quota(self, instances: int) -> None:
        """How many instances the project may have."""
        path = f"/os-quota-sets/{self.said['project_id']}"
        self.nova("PUT", path, {"quota_set": {"instances": instances, "force": True}}, user="admin", project="admin")


class Ec2(CloudBed):
    """moto's EC2."""

    KIND, VENV, VARIABLE = "ec2", ".venv-diracx", "MOTO_VENV"  # DiracX brings moto

    def credentials(self) -> dict[str, Any]:
        return {**{name: self.said[name] for name in ("key", "secret", "region", "host", "port")}, "secure": False}

    def shape(self) -> dict[str, str]:
        return {"IMAGE": self.said["image"], "SIZE": "t3.micro"}

    def driver(self) -> Any:
        """Libcloud's driver, as another program would use it."""
        from libcloud.compute.providers import get_driver

        where = {"region": self.said["region"], "host": self.said["host"], "port": self.said["port"], "secure": False}
        return get_driver("ec2")(self.said["key"], self.said["secret"], signature_version="4", timeout=30, **where)

    def instances(self) -> list[dict[str, Any]]:
        alive = [node for node in self.driver().list_nodes() if str(node.state) not in ("terminated", "unknown")]
        return [{"id": node.id, "name": node.name, "state": str(node.state), "tags": node.extra["tags"]} for node in alive]


def processes_of(bed: CloudBed) -> Iterator[int]:
    """The processes of its instances."""
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                if re.search(re.escape(f"{bed.folder}/instances/"), str((path / "cwd").readlink()) + "/"):
                    yield int(path.name)


class OddCloud:
    """A cloud in memory that behaves as badly as a test likes: it answers late, twice, or with strange states."""

    def __init__(self, cloud: Cloud, config: Config) -> None:
        self.made: list[Node] = []
        self.creates, self.scripts = 0, list[str]()
        self.fails: dict[str, Exception] = {}  # by method; `created` fails after the instance was made
        self.twice = False

    def trouble(self, method: str) -> None:
        if method in self.fails:
            raise self.fails[method]

    def size(self) -> tuple[int, int | None]:
        self.trouble("size")
        return 2, 4 << 30

    def nodes(self) -> list[Node]:
        self.trouble("nodes")
        return list(self.made)

    def create(self, name: str, uuid: str, server: str, script: str) -> str:
        self.creates += 1
        self.scripts.append(script)
        self.trouble("create")
        for _ in range(1 + self.twice):
            self.made.append(Node(f"node-{len(self.made)}-{self.creates}", name, "building", uuid, server))
        self.trouble("created")
        return self.made[-1].id

    def destroy(self, node: Node) -> None:
        self.trouble("destroy")
        self.made = [each for each in self.made if each.id != node.id]

    def console(self, node: Node) -> str:
        return self.scripts[-1] + "\nno Python here\n"

    def set(self, **changes: Any) -> None:
        """Change what it says of all instances."""
        self.made = [node._replace(**changes) for node in self.made]
