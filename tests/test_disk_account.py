"""One account of a disk: what others were promised is not given again, JOBORCH_MIN_FREE holds, and a broken upload gives its disk back.

The disks are small file systems of their own (tmpfs), below the folder of a real process unless a test says otherwise.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    BOUNDARY,
    Process,
    assert_error,
    assert_error_body,
    field_part,
    file_part,
    form,
    parse_answer,
    post_form,
    raw_head,
    read_all,
    submit,
    upload,
    wait_for,
    wait_status,
)
from world import Desk, Disk, Peer, digest_of, zip_reply

from joborch import DataFolder, DiskFull, Promise, Status, fetch_tick
from joborch_base.data_folder import DiskAccount
from joborch_base.routes import check_size

pytestmark = pytest.mark.usefixtures("no_long_polls")


MIB = 1 << 20
FORM_TYPE = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
FORM_HEAD = b"--" + BOUNDARY.encode() + b'\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'


@pytest.fixture
def small_disk(tmp_path: Path, root: None) -> Iterator[Disk]:
    """64 MiB."""
    disk = Disk(tmp_path / "disk", "size=64m")
    yield disk
    disk.close()


@pytest.fixture
def server(small_disk: Disk, make_process: MakeProcess) -> Process:
    """A server whose data are on the small disk, with 16 MiB that must stay free."""
    return make_process("server", {"JOBORCH_MIN_FREE": "16M", "JOBORCH_MAX_UPLOAD": "1G"}, folder=small_disk.path / "server").start()


def free_mib(disk: Disk) -> float:
    """What is free, in MiB."""
    return disk.pages() / 256


@contextlib.contextmanager
def upload_begun(port: int, length: int | None, sent: int, path: str = "/upload") -> Iterator[socket.socket]:
    """An upload after so many bytes; without a length it is chunked."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as line:
        how = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        line.sendall(raw_head("POST", path, port, FORM_TYPE, how))
        body = FORM_HEAD + bytes(sent)
        for begin in range(0, len(body), MIB):
            piece = body[begin : begin + MIB]
            line.sendall(piece if length is not None else f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        yield line


# == A broken upload ==


def reset(line: socket.socket) -> None:
    """Close so that the other side sees a reset."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


BREAKS: dict[str, Callable[[socket.socket], object]] = {
    "closed": lambda line: line.close(),
    "reset": reset,
    "half closed": lambda line: line.shutdown(socket.SHUT_WR),
    "a chunk that is none": lambda line: line.sendall(b"rubbish\r\n"),
}


@pytest.mark.parametrize(("how", "chunked"), [*((how, True) for how in BREAKS), *((how, False) for how in BREAKS if "chunk" not in how)])
def test_a_broken_upload_gives_its_disk_back_at_once(how: str, chunked: bool, server: Process, small_disk: Disk) -> None:
    """Without another request, on a process that has nothing else to do: the next upload needs the room."""
    before = free_mib(small_disk)
    with upload_begun(server.port, None if chunked else 20 * MIB, 10 * MIB) as line:
        wait_for(lambda: free_mib(small_disk) < before - 9, what="the body on the disk")
        BREAKS[how](line)
        wait_for(lambda: free_mib(small_disk) > before - 1, what="its disk back")
    assert upload(server, {"run.sh": b"true", "big": bytes(20 * MIB)}).status_code == 201, "nor is anything promised any more"


def test_an_upload_that_is_refused_at_its_end_gives_its_disk_back(server: Process, small_disk: Disk) -> None:
    """Of a form that cannot be used, nothing stays, also while its caller keeps the connection."""
    before = free_mib(small_disk)
    for _ in range(5):
        assert_error(post_form(server, [file_part("../x", bytes(10 * MIB))]), 400)
    wait_for(lambda: free_mib(small_disk) > before - 1, what="its disk back")


# == Promises ==


def test_what_one_upload_was_promised_no_other_gets(server: Process, small_disk: Disk) -> None:
    """The first needs 40 of some 47 MiB, and has sent a tenth of it: a second one is refused at its head, a small one is not."""
    before = free_mib(small_disk)
    with upload_begun(server.port, 20 * MIB, 2 * MIB):
        wait_for(lambda: free_mib(small_disk) < before - 1, what="the first one's promise")
        with upload_begun(server.port, 10 * MIB, 0) as second:
            status, headers, body = parse_answer(read_all(second))
            assert status == 507
            assert int(headers["retry-after"]) > 0
            assert_error_body(headers["content-type"], body, "too full")
        assert upload(server, {"run.sh": b"true"}).status_code == 201
    answer = wait_for(lambda: upload(server, {"run.sh": b"true", "big": bytes(10 * MIB)}).status_code == 201)
    assert answer


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_body_without_a_length_is_asked_for_as_it_comes(role: str, small_disk: Disk, make_process: MakeProcess) -> None:
    """It is refused in the middle, before the disk has less than it is to keep; and nothing of it stays."""
    settings: dict[str, str | None] = {"JOBORCH_MIN_FREE": "16M", "JOBORCH_MAX_UPLOAD": "1G", "JOBORCH_ALLOW_ANONYMOUS": "1"}
    process = make_process(role, settings, folder=small_disk.path / role).start()
    before, least = free_mib(small_disk), 1000.0
    with upload_begun(process.port, None, 0, "/upload" if role == "server" else "/submit") as line:
        with contextlib.suppress(OSError):
            for _ in range(100):
                line.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
                least = min(least, free_mib(small_disk))
        status, _, _ = parse_answer(read_all(line))
    assert status == 507
    assert 15.5 < least < before - 10
    wait_for(lambda: free_mib(small_disk) > before - 1, what="its disk back")


def test_thousands_of_small_files_do_not_take_what_is_to_stay_free(server: Process, small_disk: Disk) -> None:
    """A form of 1 MB, whose files take 60 MiB of blocks."""
    before = free_mib(small_disk)
    answer = post_form(server, [file_part(f"f{number}", b"x") for number in range(15_000)])
    assert_error(answer, 507)
    wait_for(lambda: free_mib(small_disk) > before - 1, what="its disk back")
    assert "Traceback" not in server.log


# == Results ==


def test_a_result_leaves_free_what_is_to_stay_free(small_disk: Disk, make_pair: MakePair) -> None:
    """It waits until there is room, says so, and nobody else's upload is refused for it."""
    pair = make_pair(server={"DATA_PATH": str(small_disk.path / "data"), "JOBORCH_MIN_FREE": "16M"})
    small_disk.fill(40 * 256)
    pair.start()
    job = submit(pair.server, "head -c 30M /dev/urandom > big")
    said = wait_status(pair.server, job, "Unknown")
    assert "no space left" in said["reason"].lower()
    assert "JOBORCH_MIN_FREE" in said["reason"]
    least = 1000.0
    for _ in range(30):
        assert upload(pair.server, {"run.sh": b"true", "data": bytes(100_000)}, user_id=2).status_code == 201
        least = min(least, free_mib(small_disk))
    assert least > 20, "it is not even begun"
    assert len([line for line in pair.server.log.splitlines() if f"job {job} " in line]) < 10, "nor is the log filled"
    small_disk.free()
    wait_status(pair.server, job, "Completed", limit_s=60)


def test_a_result_without_room_is_not_asked_for(desk: Desk, peer: Peer) -> None:
    """Its length is known from the first answer: the client is not called again before there is room."""
    content = random.Random(3).randbytes(MIB)
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(content, Repr_Digest=digest_of(content))]
    account = desk.data.account
    everything = Promise(account)
    everything.more(int((account_free(desk.data) - MIB // 2) // 1))
    assert desk.settle(job).status is Status.UNKNOWN
    asked = len(peer.asked)
    for _ in range(600):
        desk.clock.pass_s(6)
        fetch_tick(desk.server, desk.link)
    assert len(peer.asked) == asked
    everything.close()
    desk.clock.pass_s(60)
    assert fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED
    assert account.promised == 0


def account_free(data: DataFolder) -> int:
    """What the account would give away now."""
    with pytest.raises(DiskFull):
        data.account.check(1 << 60)
    return data.account.free - data.account.keep_bytes - data.account.promised


# == The account itself ==


def test_promises_add_up(small_disk: Disk) -> None:
    """Whatever many threads take, write and give back at once, nobody gets more than there is, and nothing stays promised."""
    account = DiskAccount(small_disk.path)
    account.keep_bytes = 16 * MIB
    most, lock = [0], threading.Lock()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(300):
            promise = Promise(account)
            with contextlib.suppress(DiskFull):
                promise.more(dice.randrange(20 * MIB))
                with lock:
                    most[0] = max(most[0], account.promised)
                promise.wrote(0)
            promise.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert account.promised == 0
    assert 0 < most[0] <= 48 * MIB


def test_what_is_written_is_not_counted_twice(small_disk: Disk) -> None:
    """A promise that was kept is on the disk, and no promise any more."""
    account = DiskAccount(small_disk.path)
    promise = Promise(account)
    promise.more(40 * MIB)
    with (small_disk.path / "file").open("wb") as file:
        file.write(bytes(30 * MIB))
        file.flush()
        promise.wrote(30 * MIB)
        account.check(20 * MIB)
        with pytest.raises(DiskFull):
            account.check(30 * MIB)
    promise.close()
    account.check(30 * MIB)


def test_a_form_is_promised_twice_its_length(desk: Desk) -> None:
    """Once as it comes, once as files."""
    from joborch import find_route

    promise = check_size(desk.server, find_route("server", "POST", "/upload"), 1000, False)
    assert desk.data.account.promised == 2000
    body = form([file_part("run.sh", b"x" * 500), field_part("user_id", "1")])
    assert len(body) < 1000
    promise.wrote(len(body))
    assert desk.data.account.promised == 2000 - len(body)
    promise.close()
    assert desk.data.account.promised == 0
