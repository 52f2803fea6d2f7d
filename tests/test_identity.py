"""Who a caller is: proven by a held socket, a Unix socket or a token; whoever proves nothing is a stranger."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import MakeProcess
from harness import (
    BOUNDARY,
    NOBODY_UID,
    ROOT,
    STRANGER_UID,
    Process,
    assert_error,
    clean_environment,
    file_part,
    form,
    free_port,
    from_source,
    open_program,
    open_python,
    parse_answer,
    raw_exchange,
    replace,
    wait_for,
)
from world import HandClock, close_connections

import joborch
import joborch_base
from joborch_base.data_folder import user_numbers
from joborch_base.identity import (
    CLOSE_WAIT,
    FIN_WAIT2,
    SeenSocket,
    find_socket,
    listed_socket,
    listed_sockets,
    machine_names,
    open_socket_file,
    sock_diag_works,
    tcp_uid,
)
from joborch_base.routes import Caller, Route, is_allowed
from joborch_base.settings import read_networks

TOKEN = "the-right-token-of-this-test"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LOOPBACKS = ["127.0.0.1", "::1"]
UPLOAD = ["-F", "file=true;filename=run.sh", "-F", "user_id=1", "-F", "service=example"]
T = TypeVar("T")


# == A second user of the machine ==

STRANGER = """
import socket, struct, sys
near = None
for line in sys.stdin:
    word, *rest = line.split()
    if word == "connect":
        near = socket.socket(socket.AF_INET6 if ":" in rest[0] else socket.AF_INET)
        near.connect((rest[0], int(rest[1])))
        rest = [str(near.getsockname()[1])]
    elif word == "send":
        near.sendall(bytes.fromhex(rest[0]))
    elif word == "half":
        near.shutdown(socket.SHUT_WR)
    elif word == "close":
        near.close()
    elif word == "reset":
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()
    elif word == "read":
        near.settimeout(30)
        rest = [b"".join(iter(lambda: near.recv(65536), b"")).hex()]
    print(rest[0] if rest else "", flush=True)
"""


class Stranger:
    """A process of another user with one connection, which obeys commands."""

    def __init__(self, user: int = STRANGER_UID) -> None:
        command = [open_python(), "-c", STRANGER]
        identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": [], "cwd": "/"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **identity)

    def do(self, *words: object) -> str:
        """One step; return what it answers."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def stranger(root: None) -> Iterator[Stranger]:
    """A process of another user."""
    with closing(Stranger()) as made:
        yield made


def curl_as(user: int, url: str, *arguments: str, prefix: tuple[str, ...] = ()) -> int:
    """The status that a user of the machine gets; 0 if there is no answer."""
    command = [*prefix, "curl", "-s", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url]
    done = subprocess.run(command, user=user, group=user, extra_groups=[], cwd="/", env={}, check=False, capture_output=True, text=True)
    return int(done.stdout or 0)


# == Without netlink ==

DENY_NETLINK = """
import ctypes, platform
def deny_netlink():
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]  # socket(2)
    steps = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 16)]
    steps += [(0x06, 0, 0, 0x50000 | 13), (0x06, 0, 0, 0x7FFF0000)]
    class Step(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]
    program = Program(len(steps), (Step * len(steps))(*[Step(*step) for step in steps]))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
"""
DENY_AND_RUN = DENY_NETLINK + "import os, sys\ndeny_netlink()\nos.execv(sys.argv[1], sys.argv[1:])\n"


def without_netlink(look: Callable[[], T]) -> T:
    """Call `look` in a thread to which the kernel denies netlink sockets (seccomp(2) is a thread's own)."""
    names: dict[str, Any] = {}
    exec(DENY_NETLINK, names)
    found: list[T] = []

    def run() -> None:
        names["deny_netlink"]()
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
        sock_diag_works.cache_clear()
        found.append(look())
        sock_diag_works.cache_clear()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return found[0]


def with_netlink(look: Callable[[], T]) -> T:
    """Call `look` as it is."""
    assert sock_diag_works()
    return look()


LOOKS: list[Callable[[Callable[[], Any]], Any]] = [with_netlink, without_netlink]


# == Each state of a stranger's socket ==


class Accepted:
    """A listener with one accepted connection of a stranger."""

    def __init__(self, stranger: Stranger, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.stranger, self.host = stranger, host
        self.listener = socket.create_server((host, 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.stranger_port = int(stranger.do("connect", host, self.port))
        self.far, self.peer = self.listener.accept()
        stranger.do("send", b"POST / HTTP/1.1\r\n".hex())

    def state(self) -> int:
        """The state of our end."""
        return self.far.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    def wait_state(self, *wanted: int) -> None:
        """Wait until our end is in one of these states."""
        wait_for(lambda: self.state() in wanted, what=f"state {wanted} of our end")

    def close(self) -> None:
        """Close our sockets."""
        self.far.close()
        self.listener.close()


@pytest.fixture(params=LOOPBACKS)
def accepted(request: pytest.FixtureRequest, stranger: Stranger) -> Iterator[Accepted]:
    """A connection of a stranger, over IPv4 and IPv6."""
    with closing(Accepted(stranger, request.param)) as made:
        yield made


@pytest.fixture(params=LOOKS, ids=["sock_diag", "list"])
def look(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """The two ways to look at a socket."""
    return request.param  # type: ignore[no-any-return]


Look = Callable[[Callable[[], Any]], Any]


def test_established(accepted: Accepted, look: Look) -> None:
    assert look(lambda: joborch.peer_uid(accepted.far)) == STRANGER_UID


def test_half_closed(accepted: Accepted, look: Look) -> None:
    """`nc -N` sends, says that no more comes, and waits: its socket is held."""
    accepted.stranger.do("half")
    accepted.wait_state(CLOSE_WAIT)
    assert look(lambda: joborch.peer_uid(accepted.far)) == STRANGER_UID
    accepted.stranger.do("close")
    assert look(lambda: joborch.peer_uid(accepted.far)) is None


def test_half_closed_behind_more_than_we_have_read(accepted: Accepted, look: Look) -> None:
    """The end waits behind what our buffer does not take yet: held all the same."""
    accepted.stranger.do("send", (b"x" * 20_000).hex())
    accepted.stranger.do("half")
    assert look(lambda: joborch.peer_uid(accepted.far)) == STRANGER_UID


def test_closed_before_the_ack(accepted: Accepted, look: Look) -> None:
    """The kernel says 0 of a socket that nobody holds: that is not root's."""
    accepted.stranger.do("close")
    assert look(lambda: joborch.peer_uid(accepted.far)) is None
    assert look(lambda: tcp_uid(accepted.peer[:2], accepted.far.getsockname()[:2])) is None


def test_closed_after_the_ack(accepted: Accepted, look: Look) -> None:
    """What is left of the stranger's socket is a note of the kernel's (FIN_WAIT2), with uid 0."""
    accepted.stranger.do("close")
    ends = accepted.peer[:2], accepted.far.getsockname()[:2]
    wait_for(lambda: getattr(listed_socket(*ends), "state", 0) == FIN_WAIT2, what="the ACK of the end")
    seen = listed_socket(*ends)
    assert seen is not None
    assert (seen.uid, seen.inode) == (0, 0), "the kernel tells root of it"
    assert look(lambda: joborch.peer_uid(accepted.far)) is None
    assert look(lambda: tcp_uid(*ends)) is None


def test_time_wait(accepted: Accepted, look: Look) -> None:
    """Both have closed, and the kernel remembers the stranger's end for a minute."""
    ends = accepted.peer[:2], accepted.far.getsockname()[:2]
    accepted.stranger.do("close")
    accepted.wait_state(CLOSE_WAIT)
    assert accepted.far.recv(100)
    accepted.far.close()
    wait_for(lambda: getattr(listed_socket(*ends), "state", 0) == 6, what="TIME_WAIT")
    assert look(lambda: tcp_uid(*ends)) is None


def test_reset(accepted: Accepted, look: Look) -> None:
    accepted.stranger.do("reset")
    wait_for(lambda: accepted.state() == 7, what="the reset")
    assert look(lambda: joborch.peer_uid(accepted.far)) is None


def bind_again(near: socket.socket, accepted: Accepted) -> None:
    """Take the port that the stranger had, once whoever else may have got it in between lets go of it."""

    def bound() -> bool:
        with contextlib.suppress(OSError):
            near.bind((accepted.host, accepted.stranger_port))
            return True
        return False

    wait_for(bound, what="the stranger's port")


def test_the_port_is_used_again_by_somebody_else(accepted: Accepted, look: Look) -> None:
    """The stranger resets, and a process of root's gets his port: what he sent before is not root's."""
    accepted.stranger.do("reset")
    wait_for(lambda: accepted.state() == 7, what="the reset")
    family = socket.AF_INET6 if ":" in accepted.host else socket.AF_INET
    with closing(socket.socket(family)) as near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind_again(near, accepted)
        near.connect((accepted.host, accepted.port))
        again, peer = accepted.listener.accept()
        with closing(again):
            assert peer[:2] == accepted.peer[:2]
            assert look(lambda: joborch.peer_uid(again)) == os.getuid()
            assert look(lambda: tcp_uid(peer[:2], again.getsockname()[:2])) == os.getuid(), "the port alone says root"
            assert look(lambda: joborch.peer_uid(accepted.far)) is None


def test_the_port_is_used_again_while_we_look(accepted: Accepted, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stranger resets after we have asked for his address, and root has his port before we look at it."""
    real, opened = find_socket, contextlib.ExitStack()

    def late(peer: tuple[str, int], here: tuple[str, int]) -> SeenSocket | None:
        accepted.stranger.do("reset")
        wait_for(lambda: accepted.state() == 7, what="the reset")
        near = opened.enter_context(closing(socket.socket(accepted.far.family)))
        near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        near.bind(peer)
        near.connect((accepted.host, accepted.port))
        opened.enter_context(closing(accepted.listener.accept()[0]))
        seen = real(peer, here)
        assert seen is not None
        assert (seen.uid, seen.proves) == (os.getuid(), True), "what the look finds is root's, and connected"
        return seen

    with opened:
        replace(monkeypatch, "find_socket", late)
        assert look(lambda: joborch.peer_uid(accepted.far)) is None


def test_a_socket_that_only_asks_for_a_connection_proves_nothing(look: Look) -> None:
    """It may have the ends of a connection that its own kernel side has given up."""
    with closing(socket.socket()) as full, closing(socket.socket()) as asking, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # one place, and what the kernel adds to it
            filler = waiting.enter_context(closing(socket.socket()))
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        asking.setblocking(False)
        asking.connect_ex(full.getsockname())
        ends = asking.getsockname(), full.getsockname()
        seen = look(lambda: find_socket(*ends))
        assert (seen.state, seen.inode != 0) == (2, True)
        assert look(lambda: tcp_uid(*ends)) is None


@pytest.mark.parametrize("host", LOOPBACKS)
def test_no_such_socket(host: str, look: Look) -> None:
    assert look(lambda: tcp_uid((host, 1), (host, 2))) is None
    assert look(lambda: tcp_uid(("no address", 1), ("x", 1))) is None


def test_a_socket_of_ipv6_that_speaks_ipv4(look: Look) -> None:
    """::ffff:127.0.0.1 is how many programs call."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, closing(socket.socket(socket.AF_INET6)) as near:
        near.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        far, _ = listener.accept()
        with closing(far):
            assert look(lambda: joborch.peer_uid(far)) == os.getuid()


# == Each state, against a server ==

MAPPED = ("unshare", "--user", "--map-root-user")  # the server's user is root there, and everybody else the overflow user
NETWORK_DENIED = "netlink denied"


@pytest.fixture(params=["plain", NETWORK_DENIED, "user namespace"])
def server_of_nobody(request: pytest.FixtureRequest, make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> Process:
    """A server that another user runs, without tokens: as usual, without sock_diag, in a user namespace."""
    program = open_program(open_folder, pyz)
    if request.param == NETWORK_DENIED:
        program = [program[0], "-c", DENY_AND_RUN, *program]
    elif request.param == "user namespace":
        program = [*MAPPED, *program]
    return make_process("server", folder=open_folder / "server", user=NOBODY_UID, program=program).start()


def request_to(server: Process, method: str = "GET", path: str = "/jobs", body: bytes = b"") -> str:
    """A whole request, in hex."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost:{server.port}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n" if body else ""
    return (f"{head}{kind}\r\n".encode() + body).hex()


def closed_by_others(port: int) -> list[SeenSocket]:
    """Our ends of connections to a port of this machine that the other end has closed."""
    families = (socket.AF_INET, socket.AF_INET6)
    listed = [(near, seen) for family in families for near, _, seen in listed_sockets(family)]
    return [seen for near, seen in listed if near.endswith(f":{port:04X}") and seen.state == CLOSE_WAIT]


BURST = """
import socket, sys, time
host, port, count, message = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
links = [socket.create_connection((host, port)) for _ in range(count)]
for link in links:
    try:
        link.sendall(message * 3)
        link.close()
    except OSError:
        pass
"""


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_stranger_gets_in_by_no_state_of_his_socket(server_of_nobody: Process, host: str) -> None:
    """Established, half closed: 403. Closed before the server looks: nothing is taken. The server's own user is served."""
    server, url = server_of_nobody, f"http://[{host}]" if ":" in host else f"http://{host}"
    assert curl_as(NOBODY_UID, f"{url}:{server.port}/jobs") == 200
    assert curl_as(STRANGER_UID, f"{url}:{server.port}/jobs") == 403
    assert curl_as(STRANGER_UID, f"{url}:{server.port}/upload", *UPLOAD) == 403
    for user, code in ((NOBODY_UID, 200), (STRANGER_UID, 403)):
        with closing(Stranger(user)) as caller:
            caller.do("connect", host, server.port)
            caller.do("send", request_to(server))
            caller.do("half")
            assert parse_answer(bytes.fromhex(caller.do("read")))[0] == code, user
    body = form([file_part("run.sh", b"true")], {"user_id": "1", "service": "example"})
    burst = [open_python(), "-c", BURST, host, str(server.port), "150", request_to(server, "POST", "/upload", body)]
    subprocess.run(burst, user=STRANGER_UID, group=STRANGER_UID, extra_groups=[], cwd="/", check=True, timeout=60)
    wait_for(lambda: not closed_by_others(server.port), what="the end of all connections")
    listed = subprocess.check_output(["curl", "-s", f"{url}:{server.port}/jobs"], user=NOBODY_UID, group=NOBODY_UID, cwd="/", text=True)
    assert '"jobs": []' in listed
    assert curl_as(NOBODY_UID, f"{url}:{server.port}/upload", *UPLOAD) == 201


def test_the_overflow_user_is_nobody_in_a_user_namespace(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> None:
    """A server that is 65534 in a namespace, as every stranger is there: users look alike, so nobody is let in by TCP."""
    program = ["unshare", "--user", "--map-user=65534", *open_program(open_folder, pyz)]
    run = open_folder / "run"
    run.mkdir(mode=0o700)
    os.chown(run, NOBODY_UID, NOBODY_UID)
    server = make_process("server", {"XDG_RUNTIME_DIR": str(run)}, folder=open_folder / "server", user=NOBODY_UID, program=program).start()
    for user in (0, STRANGER_UID, NOBODY_UID):
        assert curl_as(user, f"{server.url}/jobs") == 403, user
    assert "JOBORCH_TOKEN" in assert_error(server.get("/jobs"), 403, "cannot tell which user")["message"]
    path = run / f"joborch-{server.port}.sock"
    assert curl_as(NOBODY_UID, "http://localhost/jobs", "--unix-socket", str(path)) == 200


def test_root_of_a_user_namespace_is_not_the_machines(open_folder: Path, root: None) -> None:
    """What the ids mean is read from uid_map: in the first namespace, in one with a root of its own, and in one without any."""
    assert user_numbers() == (None, True)
    package = Path(shutil.copytree(Path(joborch_base.__file__).parent, open_folder / "joborch_base"))
    for path in (package, *package.rglob("*")):
        path.chmod(0o755)
    code = "from joborch_base.data_folder import user_numbers; from joborch_base.identity import is_own_user; "
    code += "print(tuple(user_numbers()), is_own_user(0), is_own_user(65534))"
    said = {}
    for words in (["--map-root-user"], ["--map-user=65534"], ["--map-user=1234"], []):
        command = ["unshare", "--user", *words, open_python(), "-c", code]
        done = subprocess.run(command, user=NOBODY_UID, group=NOBODY_UID, extra_groups=[], cwd=open_folder, check=True, capture_output=True)
        said[" ".join(words)] = done.stdout.decode().strip()
    assert said == {
        "--map-root-user": "(65534, False) True False",  # its own id is 0
        "--map-user=65534": "(65534, False) False False",
        "--map-user=1234": "(65534, False) False False",
        "": "(65534, False) False False",
    }


# == Requests that came through a proxy ==


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server without tokens, with a Unix socket in a folder of its own."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "run").mkdir(mode=0o700)
    server = Process("server", folder / "server", {"XDG_RUNTIME_DIR": str(folder / "run")})
    try:
        yield server.start()
    finally:
        server.close()


def socket_of(server: Process) -> str:
    """The path of its Unix socket, by its log."""
    wait_for(lambda: "listens on" in server.log, what="the line of its start")
    return re.findall(r" and (/\S+\.sock) \(data in", server.log)[-1]


PROXIED = ["Forwarded: for=192.0.2.1", "X-Forwarded-For: 192.0.2.1", "Via: 1.1 proxy", "X-Real-IP: 192.0.2.1", "x-forwarded-for:"]


@pytest.mark.parametrize("header", PROXIED)
def test_a_request_through_a_proxy_is_nobodys(plain_server: Process, header: str) -> None:
    """A proxy of this user passes on what others send; the refusal says why, and what to do."""
    name, _, value = header.partition(":")
    said = assert_error(plain_server.get("/jobs", headers={name: value.strip()}), 403, "proxy")["message"]
    assert name.lower() in said.lower() and "JOBORCH_TOKEN" in said
    assert (
        curl_as(
            0,
            "http://localhost/jobs",
            "--unix-socket",
            socket_of(plain_server),
            "-H",
            header.replace(":", ";") if header.endswith(":") else header,
        )
        == 403
    )
    assert set(plain_server.get("/health", headers={name: "x"}).json()) == {"status", "database"}


def test_a_proxy_may_show_a_token(make_process: MakeProcess) -> None:
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    assert server.get("/jobs", headers={**BEARER, "X-Forwarded-For": "192.0.2.1"}).status_code == 200


# == Host names ==


def code_of(server: Process, head: str) -> int:
    """The code of a request."""
    return parse_answer(raw_exchange(server.port, head.encode()))[0]


def test_no_host_at_all(plain_server: Process) -> None:
    """HTTP/1.0 knows no Host, and browsers always send one."""
    assert code_of(plain_server, "GET /jobs HTTP/1.0\r\n\r\n") == 200
    assert code_of(plain_server, "GET /jobs HTTP/1.0\r\nHost: evil.example\r\n\r\n") == 403


def test_names_of_this_machine(plain_server: Process) -> None:
    """Its host name, and what /etc/hosts calls it beside that."""
    for name in machine_names():
        assert plain_server.get("/jobs", headers={"Host": f"{name}:{plain_server.port}"}).status_code == 200
    said = assert_error(plain_server.get("/jobs", headers={"Host": "queue.lab"}), 403, "queue.lab")["message"]
    assert "JOBORCH_HOSTS" in said


def test_whoever_shows_a_token_needs_no_host(make_process: MakeProcess) -> None:
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    assert server.get("/jobs", headers={**BEARER, "Host": "queue.lab"}).status_code == 200


def test_the_unix_socket_has_every_name(plain_server: Process) -> None:
    path = socket_of(plain_server)
    for host in ("localhost", "queue.lab", "x"):
        assert curl_as(0, f"http://{host}/jobs", "--unix-socket", path) == 200
    assert curl_as(0, "http://x/jobs", "--unix-socket", path, "-H", "Origin: http://evil.example") == 403


# == Without a token, knowingly ==

ANONYMOUS = {"JOBORCH_ALLOW_ANONYMOUS": "1"}


@pytest.mark.parametrize("role", ["server", "client"])
def test_anonymous_on_loopback_is_the_same_user(make_process: MakeProcess, role: str, root: None) -> None:
    """JOBORCH_ALLOW_ANONYMOUS=1 alone opens nothing to the other users of the machine, and the log says who is let in."""
    process = make_process(role, ANONYMOUS).start()
    path, words = ("/upload", UPLOAD) if role == "server" else ("/submit", ["-F", "run.sh=true;filename=run.sh"])
    assert curl_as(STRANGER_UID, process.url + path, *words) == 403
    assert curl_as(0, process.url + path, *words) in (200, 201)
    warnings = [line for line in process.log.splitlines() if " WARNING " in line and "JOBORCH_ALLOW_ANONYMOUS" in line]
    assert len(warnings) == 1


@pytest.mark.parametrize("role", ["server", "client"])
def test_anonymous_for_all_users_of_the_machine(make_process: MakeProcess, role: str, root: None) -> None:
    process = make_process(role, {**ANONYMOUS, "JOBORCH_ALLOW_FROM": "127.0.0.0/8,::1"}).start()
    path = "/jobs" if role == "server" else "/events?since=0"
    assert curl_as(STRANGER_UID, process.url + path) == 200
    assert curl_as(STRANGER_UID, f"http://[::1]:{process.port}{path}") == 200
    wait_for(lambda: "listens on" in process.log, what="the line of its start")
    assert "all callers at 127.0.0.0/8, ::1/128 are served without a token" in process.log
    assert code_of(process, f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n") == 403


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"JOBORCH_ALLOW_FROM": "10.0.0.0/8"}, "set JOBORCH_ALLOW_ANONYMOUS=1, too"),
        ({**ANONYMOUS, "JOBORCH_ALLOW_FROM": "10.0.0.0/8", "JOBORCH_TOKEN": TOKEN}, "have no effect, because a token is set"),
        ({"JOBORCH_SOCKET_MODE": "0666"}, "set JOBORCH_SOCKET to a path"),
    ],
)
def test_settings_without_effect_are_warned_of(settings: dict[str, str], said: str) -> None:
    assert said in " ".join(joborch.load_config("server", {}, {"DATA_PATH": "/nowhere", **settings}).warnings)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.0/120, 2001:db8::/32", "192.0.2.0/24,2001:db8::/32"),
        ("::/0", "::/0"),
        ("192.0.2.7/24", ""),
        ("host.example", ""),
        (",", ""),
    ],
)
def test_networks_are_read(text: str, wanted: str) -> None:
    if wanted:
        assert ",".join(map(str, read_networks(text))) == wanted
    else:
        with pytest.raises(ValueError, match="give"):
            read_networks(text)


def test_an_ipv4_caller_over_ipv6_is_an_ipv4_caller() -> None:
    networks = read_networks("192.0.2.0/24")
    assert is_allowed(networks, "::ffff:192.0.2.9")
    assert not is_allowed(networks, "::ffff:192.0.3.9")
    assert not is_allowed(networks, "")


class Network:
    """A server's machine and another one, as two network namespaces with a cable between them."""

    HERE, ALLOWED, OTHER = "10.99.0.1", "10.99.0.2", "10.99.0.3"
    HERE6, ALLOWED6, OTHER6 = "fd99::1", "fd99::2", "fd99::3"

    def __init__(self) -> None:
        self.holders = [subprocess.Popen(["unshare", "--net", "sleep", "600"]) for _ in range(2)]
        for holder in self.holders:
            wait_for(lambda: self.namespace(holder.pid) != self.namespace(os.getpid()), what="a namespace")  # noqa: B023
        here, there = (holder.pid for holder in self.holders)
        subprocess.run(
            ["ip", "link", "add", f"jo{here}", "netns", str(here), "type", "veth", "peer", "name", "jo", "netns", str(there)], check=True
        )
        for pid, device, addresses in (
            (here, f"jo{here}", (self.HERE, self.HERE6)),
            (there, "jo", (self.ALLOWED, self.OTHER, self.ALLOWED6, self.OTHER6)),
        ):
            for address in addresses:
                more = ["/64", "nodad"] if ":" in address else ["/24"]
                self.run(pid, "ip", "addr", "add", address + more[0], "dev", device, *more[1:])
            for name in ("lo", device):
                self.run(pid, "ip", "link", "set", name, "up")

    @staticmethod
    def namespace(pid: int) -> str:
        """Which network a process is in."""
        return str(Path(f"/proc/{pid}/ns/net").readlink())

    @staticmethod
    def enter(pid: int) -> tuple[str, ...]:
        """The words that run a command in the network of a process."""
        return ("nsenter", f"--net=/proc/{pid}/ns/net")

    def run(self, pid: int, *words: str) -> None:
        """Run a command in the network of a process."""
        subprocess.run([*self.enter(pid), *words], check=True)

    def curl(self, where: int, user: int, url: str, *words: str) -> int:
        """The status that a user of one of the two machines gets."""
        prefix = (*self.enter(self.holders[where].pid), "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
        return curl_as(0, url, "--connect-timeout", "10", *words, prefix=prefix)

    def close(self) -> None:
        """Take it apart."""
        for holder in self.holders:
            holder.kill()
            holder.wait()


@pytest.fixture
def network(root: None) -> Iterator[Network]:
    """Two machines."""
    with closing(Network()) as made:
        yield made


def test_who_is_let_in_from_other_machines(network: Network, make_process: MakeProcess) -> None:
    """As in a container: those in JOBORCH_ALLOW_FROM, nobody else, and of the same machine the same user, by whatever address."""
    settings = {
        **ANONYMOUS,
        "JOBORCH_HOST": "0.0.0.0,::",
        "JOBORCH_ALLOW_FROM": f"{Network.HERE}/32,10.99.0.0/31,10.99.0.2,fd99::1,fd99::2",
    }
    program = [*network.enter(network.holders[0].pid), *from_source()]
    server = make_process("server", settings, program=program)
    server.spawn()
    wait_for(lambda: "listens on" in server.log or not server.running(), what="the start")
    for here, allowed, other in ((Network.HERE, Network.ALLOWED, Network.OTHER), (f"[{Network.HERE6}]", Network.ALLOWED6, Network.OTHER6)):
        url = f"http://{here}:{server.port}"
        assert network.curl(1, STRANGER_UID, f"{url}/jobs", "--interface", allowed) == 200
        assert network.curl(1, 0, f"{url}/jobs", "--interface", other) == 403
        assert network.curl(1, 0, f"{url}/health", "--interface", other) == 200
        assert network.curl(1, 0, f"{url}/jobs", "--interface", allowed, "-H", "Host: evil.example") == 403
        assert network.curl(0, 0, f"{url}/jobs") == 200, "the same user of the same machine"
        assert network.curl(0, STRANGER_UID, f"{url}/jobs") == 403, "its address is in the list, and the list is not about this machine"
    assert server.stop() == 0


# == Both loopback addresses ==


@contextlib.contextmanager
def squatter(host: str, port: int) -> Iterator[None]:
    """A process of another user that listens on an address."""
    code = (
        "import socket, sys, time\n"
        "taken = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)\n"
        "taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "taken.bind((sys.argv[1], int(sys.argv[2])))\ntaken.listen()\nprint('yes', flush=True)\ntime.sleep(600)\n"
    )
    command = [open_python(), "-c", code, host, str(port)]
    identity: dict[str, Any] = {"user": STRANGER_UID, "group": STRANGER_UID, "extra_groups": [], "cwd": "/"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **identity)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"yes\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_both_loopback_addresses(plain_server: Process) -> None:
    """`localhost` means ::1 on many machines, and a stranger may not have it."""
    for host in ("127.0.0.1", "[::1]"):
        assert curl_as(0, f"http://{host}:{plain_server.port}/jobs") == 200
    assert socket_of(plain_server)
    assert f"listens on http://127.0.0.1:{plain_server.port} and http://[::1]:{plain_server.port} and /" in plain_server.log


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1")])
def test_a_stranger_has_one_of_them(make_process: MakeProcess, role: str, host: str, shown: str, root: None) -> None:
    """It does not start, and names in one line the address and who has it."""
    process = make_process(role)
    with squatter(host, process.port):
        code, said = process.start_refused()
    (line,) = [line for line in said.splitlines() if line.startswith("joborch: ")]
    assert code == 2
    assert f"cannot listen on {shown}:{process.port} (address already in use); a process of user {STRANGER_UID} listens there" in line
    assert "Traceback" not in said


def test_one_address_is_enough_if_it_is_asked_for(make_process: MakeProcess, root: None) -> None:
    server = make_process("server", {"JOBORCH_HOST": "127.0.0.1"})
    with squatter("::1", server.port):
        assert server.start().get("/jobs").status_code == 200


def test_no_address_at_all(make_process: MakeProcess) -> None:
    code, said = make_process("server", {"JOBORCH_HOST": " , "}).start_refused()
    assert (code, "JOBORCH_HOST is ' , ': give an address" in said, "Traceback" in said) == (2, True, False)


def test_port_0_is_one_port_for_both(make_process: MakeProcess) -> None:
    server = make_process("server", {"PORT": "0"})
    server.spawn()
    found = wait_for(lambda: re.search(r"http://127.0.0.1:(\d+) and http://\[::1\]:(\d+)", server.log), what="the start")
    assert found[1] == found[2] != "0"


def test_a_machine_without_ipv6(make_process: MakeProcess, network: Network) -> None:
    """127.0.0.1 alone, without a warning; ::1 that is asked for must be there."""
    pid = network.holders[0].pid
    network.run(pid, "ip", "addr", "del", "::1/128", "dev", "lo")
    server = make_process("server", program=[*network.enter(pid), *from_source()])
    server.spawn()
    wait_for(lambda: "listens on" in server.log or not server.running(), what="the start")
    assert f"listens on http://127.0.0.1:{server.port} and /" in server.log
    assert "::1" not in server.log
    expected = ("runs as root", "client 127.0.0.1:9000: cannot be reached")
    assert not [line for line in server.log.splitlines() if "WARNING" in line and not any(text in line for text in expected)]
    assert server.stop() == 0
    code, said = make_process("server", {"JOBORCH_HOST": "::1"}, program=[*network.enter(pid), *from_source()]).start_refused()
    assert (code, "cannot listen on [::1]:" in said) == (2, True)


# == The Unix socket ==


def users_folder(parent: Path, name: str, user: int, mode: int = 0o700) -> Path:
    """A folder of a user."""
    folder = parent / name
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, user, user)
    return folder


def test_the_unix_socket(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> None:
    """Jobs and uploads by curl, for the same user and root, also where tokens are set; nobody else gets as far."""
    run = users_folder(open_folder, "run", NOBODY_UID)
    settings = {"XDG_RUNTIME_DIR": str(run), "JOBORCH_TOKEN": TOKEN}
    program = open_program(open_folder, pyz)
    server = make_process("server", settings, folder=open_folder / "server", user=NOBODY_UID, program=program).start()
    path = socket_of(server)
    assert path == str(run / f"joborch-{server.port}.sock")
    found = os.lstat(path)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, NOBODY_UID)
    words = ("--unix-socket", path)
    for user in (NOBODY_UID, 0):
        assert curl_as(user, "http://localhost/jobs", *words) == 200
        assert curl_as(user, "http://localhost/upload", *words, *UPLOAD) == 201
    assert curl_as(NOBODY_UID, "http://localhost/jobs", *words, "-H", "Authorization: Bearer wrong") == 401
    assert curl_as(STRANGER_UID, "http://localhost/jobs", *words) == 0
    assert curl_as(NOBODY_UID, f"{server.url}/jobs") == 401
    assert server.stop() == 0
    assert not os.path.lexists(path), "it is removed at the end"


def test_a_large_upload_by_the_unix_socket(plain_server: Process, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(20_000_000))
    words = ["-F", f"file=@{tmp_path / 'large'}", *UPLOAD]
    assert curl_as(0, "http://localhost/upload", "--unix-socket", socket_of(plain_server), *words) == 201


def test_a_socket_that_is_opened_to_others(make_process: MakeProcess, open_folder: Path, root: None) -> None:
    """With a wider mode, whoever can open it may call."""
    path = open_folder / "joborch.sock"
    server = make_process("server", {"JOBORCH_SOCKET": str(path), "JOBORCH_SOCKET_MODE": "0666"}).start()
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o666
    assert curl_as(STRANGER_UID, "http://localhost/jobs", "--unix-socket", str(path)) == 200
    assert curl_as(STRANGER_UID, f"{server.url}/jobs") == 403


@pytest.mark.parametrize("word", ["0", "none"])
def test_no_socket(make_process: MakeProcess, tmp_path: Path, word: str) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    server = make_process("server", {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "JOBORCH_SOCKET": word}).start()
    assert list((tmp_path / "run").iterdir()) == []
    assert ".sock" not in server.log


def test_a_client_has_none(make_process: MakeProcess, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    make_process("client", {"XDG_RUNTIME_DIR": str(tmp_path / "run")}).start()
    assert list((tmp_path / "run").iterdir()) == []


def test_without_a_runtime_folder(make_process: MakeProcess) -> None:
    """/tmp/joborch-UID, closed to others."""
    server = make_process("server").start()
    path = socket_of(server)
    assert path == f"/tmp/joborch-{os.getuid()}/joborch-{server.port}.sock"
    assert stat.S_IMODE(Path(path).parent.lstat().st_mode) == 0o700


LONELY_UID = 61_237


@pytest.fixture
def lonely_folder(root: None) -> Iterator[Path]:
    """The folder in /tmp of a user who has none yet."""
    folder = Path(f"/tmp/joborch-{LONELY_UID}")
    assert not os.path.lexists(folder)
    yield folder
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("kind", ["of a stranger", "a link", "a file", "open to all"])
def test_a_folder_that_somebody_else_made(make_process: MakeProcess, open_folder: Path, pyz: Path, lonely_folder: Path, kind: str) -> None:
    """It is never used: a warning, no socket, and the server runs."""
    inside = users_folder(open_folder, "inside", STRANGER_UID, 0o777)
    if kind == "of a stranger":
        lonely_folder.mkdir()
        lonely_folder.chmod(0o777)
        os.chown(lonely_folder, STRANGER_UID, STRANGER_UID)
    elif kind == "a link":
        lonely_folder.symlink_to(inside)
    elif kind == "a file":
        lonely_folder.touch()
    else:
        lonely_folder.mkdir()
        lonely_folder.chmod(0o777)
        os.chown(lonely_folder, LONELY_UID, LONELY_UID)
    settings = {"XDG_RUNTIME_DIR": str(users_folder(open_folder, "theirs", STRANGER_UID, 0o777))}  # as `sudo -E` leaves it
    program = open_program(open_folder, pyz)
    server = make_process("server", settings, folder=open_folder / "server", user=LONELY_UID, program=program).start()
    assert f"no Unix socket at {lonely_folder}/joborch-{server.port}.sock: " in server.log
    assert ".sock (data in" not in server.log
    assert list(inside.iterdir()) == []
    assert not lonely_folder.is_dir() or list(lonely_folder.iterdir()) == []
    if kind == "a file":
        lonely_folder.unlink()


def test_the_folder_is_made(make_process: MakeProcess, open_folder: Path, pyz: Path, lonely_folder: Path) -> None:
    program = open_program(open_folder, pyz)
    server = make_process("server", folder=open_folder / "server", user=LONELY_UID, program=program).start()
    found = os.lstat(lonely_folder)
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (LONELY_UID, 0o700)
    assert curl_as(LONELY_UID, "http://localhost/jobs", "--unix-socket", socket_of(server)) == 200


def test_a_dead_servers_socket_is_replaced_and_a_live_one_is_not(make_process: MakeProcess, tmp_path: Path) -> None:
    path = tmp_path / "joborch.sock"
    settings = {"JOBORCH_SOCKET": str(path)}
    first = make_process("server", settings).start()
    code, said = make_process("server", settings).start_refused()
    assert (code, "another server listens there" in said, "Traceback" in said) == (2, True, False)
    assert curl_as(0, "http://localhost/jobs", "--unix-socket", str(path)) == 200
    first.process.send_signal(signal.SIGKILL)  # type: ignore[union-attr]
    first.process.wait(20)  # type: ignore[union-attr]
    assert path.exists()
    second = make_process("server", settings).start()
    assert curl_as(0, "http://localhost/jobs", "--unix-socket", str(path)) == 200
    path.unlink()
    path.touch()
    assert second.stop() == 0
    assert path.exists(), "what has taken its place is not its own"
    code, said = make_process("server", settings).start_refused()
    assert (code, "something else is there" in said) == (2, True)


def test_a_path_that_is_too_long(make_process: MakeProcess, tmp_path: Path) -> None:
    """unix(7) has place for 107 bytes: no socket, and a line that says so."""
    long = tmp_path / ("x" * 110)
    long.mkdir(mode=0o700)
    server = make_process("server", {"XDG_RUNTIME_DIR": str(long)}).start()
    assert re.search(r"WARNING .*too long for a Unix socket \(at most 107 bytes\).*JOBORCH_SOCKET", server.log)
    code, said = make_process("server", {"JOBORCH_SOCKET": str(long / "s")}).start_refused()
    assert (code, "too long for a Unix socket" in said) == (2, True)


def test_the_socket_is_never_wider_than_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between bind and chmod, whatever the umask."""
    seen: list[int] = []
    chmod = os.chmod
    monkeypatch.setattr(os, "chmod", lambda path, mode: (seen.append(stat.S_IMODE(os.lstat(path).st_mode)), chmod(path, mode))[1])
    umask = os.umask(0)
    try:
        with closing(open_socket_file(str(tmp_path / "a"), 5000, 0o640)):
            assert seen == [0o700]
            assert stat.S_IMODE(os.lstat(tmp_path / "a").st_mode) == 0o640
            assert os.umask(0) == 0, "the umask is put back"
    finally:
        os.umask(umask)


def test_two_networks_with_one_port_have_two_sockets(network: Network, make_process: MakeProcess, tmp_path: Path) -> None:
    """Two servers of one user with one folder for sockets: the commands find the one of their own network, or none."""
    run, (first, second) = tmp_path / "run", (holder.pid for holder in network.holders)
    run.mkdir(mode=0o700)
    port, find = free_port(), "import sys; from joborch_plugins import caller; print(caller.own_socket(int(sys.argv[1])))"
    found = {}
    for pid in (first, second):
        program = [*network.enter(pid), *from_source()]
        server = make_process("server", {"XDG_RUNTIME_DIR": str(run)}, program=program, port=port)
        server.spawn()
        found[pid] = socket_of(server)
    assert sorted(found.values()) == sorted({*found.values()}) and found[first] == str(run / f"joborch-{port}.sock")
    for pid, path in ((first, found[first]), (second, found[second]), (os.getpid(), "None")):
        command = [*network.enter(pid), sys.executable, "-c", find, str(port)]
        said = subprocess.check_output(command, cwd=ROOT, env={"XDG_RUNTIME_DIR": str(run)}, text=True)
        assert said.strip() == path


def test_doctor_asks_the_running_server_by_its_socket(make_process: MakeProcess, tmp_path: Path) -> None:
    """With a token set, which doctor does not know."""
    (tmp_path / "run").mkdir(mode=0o700)
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path / "run")}
    server = make_process("server", {**runtime, "JOBORCH_TOKEN": TOKEN}).start()
    environment = {**clean_environment(tmp_path), **runtime, "PORT": str(server.port), "DATA_PATH": str(server.data)}
    command = [*from_source(), "doctor", "server"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert f"a server runs on port {server.port}" in done.stdout


# == What a route knows of its caller, and who needs no proof ==

PUBLIC = {"status", "database"}


def test_health_says_little_to_strangers(make_process: MakeProcess, root: None) -> None:
    """ok or error, and no counts, versions or paths; whoever proves himself gets all."""
    server, client = make_process("server").start(), make_process("client", {"JOBORCH_TOKEN": TOKEN}).start()
    said = subprocess.check_output(["curl", "-s", f"{server.url}/health"], user=STRANGER_UID, group=STRANGER_UID, cwd="/", text=True)
    assert "status" in said and "database" in said and "version" not in said and "problems" not in said
    assert {"mode", "version", "uptime_s"} <= set(server.get("/health").json())
    assert set(client.get("/health").json()) == PUBLIC
    assert set(client.get("/health", headers={"Authorization": "Bearer wrong"}).json()) == PUBLIC
    assert {"mode", "executor", "slots", "running", "problem"} <= set(client.get("/health", headers=BEARER).json())


def test_health_that_is_broken_names_no_path(make_process: MakeProcess) -> None:
    client = make_process("client", {"JOBORCH_TOKEN": TOKEN}).start()
    wait_for(lambda: client.get("/health", headers=BEARER).json()["status"] == "ok")
    (client.data / "joborch.db").unlink()
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "error", "database": "error"})
    assert "message" in client.get("/health", headers=BEARER).json()


@contextlib.contextmanager
def waitress_of(config: joborch.Config) -> Iterator[tuple[Any, list[Any]]]:
    """Our HTTP server in this process, with an application that notes who called."""
    callers: list[Any] = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        callers.append(joborch.Request(environ).caller)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    folder = Path(config.data_path)
    folder.mkdir(exist_ok=True)
    data = joborch.DataFolder(str(folder))
    data.open()
    store = joborch.Store(config.db_path, config.mode)
    server = joborch.make_http_server(joborch.Node(config, store, data), application)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, callers
    finally:
        close_connections(server)
        thread.join(20)
        server.task_dispatcher.shutdown(timeout=20)
        store.close()
        joborch.remove_socket_file(server)


@pytest.mark.parametrize(
    ("settings", "words", "path", "wanted"),
    [
        ({}, (), "/jobs", Caller(f"uid {os.getuid()}", "same user")),
        ({}, ("UNIX",), "/jobs", Caller(f"uid {os.getuid()}", "unix socket")),
        ({"JOBORCH_TOKEN": TOKEN}, ("UNIX",), "/jobs", Caller(f"uid {os.getuid()}", "unix socket")),
        ({"JOBORCH_TOKEN": TOKEN}, ("-H", f"Authorization: Bearer {TOKEN}"), "/jobs", Caller("default", "token")),
        ({"JOBORCH_TOKEN": TOKEN}, ("-H", f"Authorization: Bearer {TOKEN}"), "/health", Caller("default", "token")),
        ({"JOBORCH_TOKEN": TOKEN}, (), "/health", None),
        ({}, ("-H", "Via: x"), "/health", None),
        ({**ANONYMOUS, "JOBORCH_ALLOW_FROM": "127.0.0.1"}, ("-H", "Via: x"), "/jobs", Caller("127.0.0.1", "anonymous")),
    ],
)
def test_a_route_knows_its_caller(
    settings: dict[str, str], words: tuple[str, ...], path: str, wanted: Caller | None, tmp_path: Path
) -> None:
    given = {"DATA_PATH": str(tmp_path / "d"), "PORT": "0", "JOBORCH_SOCKET": str(tmp_path / "s"), **settings}
    with waitress_of(joborch.load_config("server", {}, given)) as (server, callers):
        words = ("--unix-socket", str(tmp_path / "s")) if words == ("UNIX",) else words
        assert curl_as(0, f"http://127.0.0.1:{server.effective_port}{path}", *words) == 200
    assert callers == [wanted]


def test_a_header_makes_no_caller(tmp_path: Path) -> None:
    """What a request says of itself is never what we know of it."""
    given = {"DATA_PATH": str(tmp_path / "d"), "PORT": "0", "JOBORCH_SOCKET": "0", "JOBORCH_TOKEN": TOKEN}
    with waitress_of(joborch.load_config("server", {}, given)) as (server, callers):
        assert (
            curl_as(0, f"http://127.0.0.1:{server.effective_port}/health", "-H", "joborch.caller: root", "-H", "Joborch-Caller: root")
            == 200
        )
    assert callers == [None]


def bare_path(declared: joborch.Route) -> str:
    """A path of a route, with something in each of its places."""
    return re.sub(r"<(\w+)(:path)?>", "1", declared.path)


def signs_in(declared: Route) -> bool:
    """Whether the route is a page, which is refused with a page that asks for a token. Anyone may end a session: POST /session."""
    return declared.method == "GET" and 401 in declared.gives and declared.gives[401].content == "text/html"


@pytest.mark.parametrize("role", ["server", "client"])
def test_every_route_says_who_may_call_it_and_holds_to_it(make_process: MakeProcess, role: str, root: None) -> None:
    """Without proof, and as a stranger of the machine: 401 or 403 on all that is not for anyone, whatever the method."""
    with_token = make_process(role, {"JOBORCH_TOKEN": TOKEN}).start()
    without = make_process(role, ANONYMOUS if role == "client" else {}).start()
    routes = joborch.routes_of(role)
    for declared in routes:
        methods = [declared.method, *(["HEAD"] if declared.method == "GET" else [])]
        for method in methods:
            words = ["-X", method] if method != "HEAD" else ["--head"]
            words += UPLOAD if declared.takes_form else []
            for process, user in ((with_token, STRANGER_UID), (with_token, os.getuid()), (without, STRANGER_UID)):
                code = curl_as(user, process.url + bare_path(declared), *words)
                refused = code in (401, 403)
                assert refused == (declared.who != "anyone" or signs_in(declared)), (
                    method,
                    declared.path,
                    process is with_token,
                    user,
                    code,
                )


# == Refused tokens ==


def test_refused_tokens_are_counted_and_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    refused = joborch.RefusedTokens(clock)
    for number in range(100):
        refused.note(f"192.0.2.{number}")
    assert [record.getMessage() for record in caplog.records] == ["refused 1 request with a wrong token; the last came from 192.0.2.0"]
    clock.pass_s(61)
    refused.report()
    refused.report()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.records[1].getMessage() == "refused 99 requests with a wrong token; the last came from 192.0.2.99"
    clock.pass_s(61)
    refused.report()
    assert len(caplog.records) == 2, "nothing new, no line"


def test_a_refused_token_is_in_the_log_but_not_its_text(make_process: MakeProcess) -> None:
    server = make_process("server", {"JOBORCH_TOKEN": TOKEN}).start()
    for _ in range(20):
        assert server.get("/jobs", headers={"Authorization": "Bearer sesame-open"}).status_code == 401
    assert server.get("/jobs").status_code == 401
    lines = [line for line in server.log.splitlines() if "wrong token" in line]
    assert len(lines) == 1 and "refused 1 request" in lines[0] and "127.0.0.1" in lines[0] and "WARNING" in lines[0]
    assert "sesame" not in server.log
