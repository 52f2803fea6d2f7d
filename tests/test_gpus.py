"""GPUs: jobs ask for them, clients offer them, each payload gets its own, and none where it asked for none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakePair
from harness import ENDED, SCRIPT_UIDS, download, run_to_end, submit, wait_for, wait_status
from world import Yard, load_config

import joborch
from joborch import BatchOptions, DataFolder, Job, Status, run_tick
from joborch_base import local
from joborch_base.scheduling import Candidate, ClientCapacity, Load, Reservation, Run, choose, reserve
from joborch_plugins import dirac, sandbox
from joborch_plugins.slurm import sbatch_options

pytestmark = pytest.mark.usefixtures("strangers_are_safe")

LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2d3b2a51-0000-c3f3-1b07-005d5ae1dc3f)
"""
SEEN = 'echo "${CUDA_VISIBLE_DEVICES-unset} ${NVIDIA_VISIBLE_DEVICES-unset} $JOBORCH_GPUS"'


def stand_in(folder: Path, script: str) -> str:
    """A PATH that has an nvidia-smi of this script."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(name="yard")
def yard_fixture(data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    """A client in this process, of a machine with two GPUs."""
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", f"[ \"$1\" = -L ] && cat <<'END'\n{LISTED}END"))
    made = Yard(data, JOBORCH_SLOTS="4")
    yield made
    made.close()


def begun(yard: Yard, gpus: int) -> Job:
    """A payload with so many GPUs that runs until `end`."""
    job = yard.submit(f"{SEEN}\ntouch ready; until [ -e go ]; do sleep 0.02; done", X_Joborch_Gpus=str(gpus))
    run_tick(yard.client)
    wait_for((yard.folder(job) / "work/ready").exists, 60, "the script's start")
    return yard[job]


def end(yard: Yard, job: Job) -> None:
    """Let it end."""
    (yard.folder(job) / "work/go").touch()
    yard.until(job, Status.COMPLETED)


def said(yard: Yard, job: Job) -> str:
    """What a script said of its GPUs."""
    return (yard.folder(job) / "stdout").read_text().strip()


# == The client ==


def test_each_payload_gets_gpus_of_its_own(yard: Yard) -> None:
    """None where it asked for none; one that finds none free waits, and they are free again at its end."""
    assert joborch.room_json(yard.client)["gpus"] == 2
    first, none, second = begun(yard, 1), begun(yard, 0), begun(yard, 1)
    waiting = yard.submit(SEEN, X_Joborch_Gpus="2")
    run_tick(yard.client)
    assert [said(yard, job) for job in (first, none, second)] == ["0 0 1", "0", "1 1 1"]
    assert yard[waiting].status is Status.PREPARED
    end(yard, first)
    run_tick(yard.client)
    assert yard[waiting].status is Status.PREPARED
    end(yard, second)
    yard.until(waiting, Status.COMPLETED)
    assert said(yard, waiting) == "0,1 0,1 2"
    end(yard, none)


FACTS = "Model: \t\t A100\nIRQ:   \t\t 5\nGPU UUID: \t {uuid}\nBus Location: \t 0000:3b:00.0\nDevice Minor: \t {minor}\n"


@pytest.fixture
def device_files(monkeypatch: pytest.MonkeyPatch, root: None) -> Iterator[None]:
    """Stand-ins in /dev for two GPUs, what they share, and one of another maker; under names that no driver uses."""
    made = [f"/dev/jo{os.getpid()}-{name}" for name in ("gpu0", "gpu1", "ctl", "dri")]
    for path in made:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    monkeypatch.setattr(sandbox, "GPU_FILE", made[0][:-1])
    monkeypatch.setattr(sandbox, "GPU_COMMON", (f"{made[2][:-2]}?l", made[3]))
    yield
    for path in made:
        Path(path).unlink()


ALL_SEEN = f"{SEEN}; cd /dev; echo jo{os.getpid()}-*"


def seen(devices: str) -> str:
    """These device files, as a script lists them."""
    return " ".join(f"jo{os.getpid()}-{name}" for name in devices.split()) or f"jo{os.getpid()}-*"


@pytest.mark.parametrize("isolation", ["full", "user"])
def test_an_isolated_payload_has_the_files_of_its_gpus_alone(
    isolation: str, data: DataFolder, device_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where it asked for none; without that, a script could undo what the variables say."""
    monkeypatch.setattr(sandbox, "GPU_FACTS", "/nowhere")
    yard = Yard(data, JOBORCH_ISOLATION=isolation, JOBORCH_GPUS="0,1", JOBORCH_SLOTS="4", JOBORCH_UIDS=SCRIPT_UIDS)
    try:
        held = begun(yard, 1)
        for gpus, wanted in (("1", f"1 1 1\n{seen('ctl dri gpu1')}"), ("0", f"0\n{seen('')}")):
            assert said(yard, yard.run(yard.submit(ALL_SEEN, X_Joborch_Gpus=gpus))) == wanted
        end(yard, held)
        assert said(yard, yard.run(yard.submit(ALL_SEEN, X_Joborch_Gpus="2"))) == f"0,1 0,1 2\n{seen('ctl dri gpu0 gpu1')}"
    finally:
        yard.close()


def test_the_numbers_of_gpus_are_those_of_the_driver(device_files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the device files may differ; inside, a GPU has its id, since a number would count from the first one there."""
    for place, minor, uuid in (
        ("0000:3b:00.0", 1, "GPU-aa-11"),
        ("0000:5e:00.0", 0, "GPU-????????-????"),
        ("0000:d8:00.0", 7, "GPU-bb-22"),
    ):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(FACTS.format(minor=minor, uuid=uuid))
    (tmp_path / "0000:ff:00.0").mkdir()
    monkeypatch.setattr(sandbox, "GPU_FACTS", str(tmp_path))

    def shown(*ids: str) -> tuple[str, list[str]]:
        words, names = sandbox.gpu_words(ids)
        return seen(" ".join(word.rpartition("-")[2] for word in words.split(" ")[1::3])), names

    assert shown("0") == (seen("gpu1 ctl dri"), ["GPU-aa-11"])
    assert shown("1") == (seen("gpu0 ctl dri"), ["1"])
    assert shown("1", "GPU-aa") == (seen("gpu0 gpu1 ctl dri"), ["1", "GPU-aa-11"])
    for unknown in ("2", "3", "4", "MIG-cc", "GPU-????????-????"):
        assert shown(unknown) == (seen("gpu0 gpu1 ctl dri"), [unknown]), "they cannot be told apart: the variables do it alone"


def test_without_gpus_of_joborch_all_are_there(data: DataFolder, device_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts share them, as without isolation."""
    monkeypatch.setattr(local, "find_gpus", tuple)
    yard = Yard(data, JOBORCH_ISOLATION="full")
    try:
        assert said(yard, yard.run(yard.submit(ALL_SEEN))).endswith(seen("ctl dri gpu0 gpu1"))
    finally:
        yard.close()


def test_gpus_are_kept_over_a_restart(yard: Yard) -> None:
    first = begun(yard, 1)
    yard.restart()
    second = begun(yard, 1)
    assert [said(yard, job) for job in (first, second)] == ["0 0 1", "1 1 1"]
    end(yard, first)
    third = begun(yard, 1)
    assert said(yard, third) == "0 0 1"
    for job in (second, third):
        end(yard, job)


@pytest.mark.parametrize("note", ["mkfifo ../gpus", "ln -s /dev/zero ../gpus", "echo 1,0 > ../gpus"])
def test_a_script_that_spoils_the_note_of_its_gpus(note: str, yard: Yard) -> None:
    """Without isolation it can; the next start of the client goes on."""
    spoilt = yard.submit(f"rm -f ../gpus; {note}; touch ready; until [ -e go ]; do sleep 0.02; done", X_Joborch_Gpus="1")
    run_tick(yard.client)
    wait_for((yard.folder(spoilt) / "work/ready").exists, 60, "the script's start")
    yard.restart()
    end(yard, spoilt)
    assert yard.run(yard.submit(SEEN, X_Joborch_Gpus="2")).status is Status.COMPLETED


def test_a_payload_that_asks_for_more_than_there_is(yard: Yard) -> None:
    """As sent by a server that has not heard of a change: it is tried elsewhere."""
    job = yard.submit(SEEN, X_Joborch_Gpus="3")
    run_tick(yard.client)
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "infrastructure")
    assert said(yard, yard.run(yard.submit(SEEN, X_Joborch_Gpus="2"))) == "0,1 0,1 2"


@pytest.mark.parametrize(
    ("setting", "wanted"), [("none", "0"), ("3", "3 3 1"), ("GPU-5c89852c,MIG-c6d4f1ef", "GPU-5c89852c GPU-5c89852c 1")]
)
def test_the_gpus_that_a_client_offers(setting: str, wanted: str, data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named ones, or none, whatever the client's own environment says."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    yard = Yard(data, JOBORCH_GPUS=setting)
    try:
        assert said(yard, yard.run(yard.submit(SEEN, X_Joborch_Gpus="0" if setting == "none" else "1"))) == wanted
    finally:
        yard.close()


def test_without_gpus_the_environment_is_as_it_was(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPUs joborch does not know: its scripts find what its operator has set."""
    monkeypatch.setattr(local, "find_gpus", tuple)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    yard = Yard(data)
    try:
        assert joborch.room_json(yard.client)["gpus"] == 0
        assert said(yard, yard.run(yard.submit(SEEN))) == "7 unset 0"
    finally:
        yard.close()


@pytest.mark.parametrize(("script", "found"), [(f"cat <<'END'\n{LISTED}END", ("0", "1")), ("echo No devices found", ()), ("exit 9", ())])
def test_what_nvidia_smi_lists(script: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", script))
    assert local.find_gpus() == found


@pytest.mark.parametrize("text", ["0,0", "-1", "0,,1", "a b", ","])
def test_ids_that_are_none(text: str) -> None:
    with pytest.raises(joborch.ConfigError, match=r"JOBORCH_GPUS is .*: give different ids of GPUs separated by commas"):
        load_config("client", {}, {"JOBORCH_GPUS": text})


# == The server ==

NOW = 1_000_000.0


def place(name: str, gpus: int | None, free_gpus: int = 0, slots: int = 4) -> ClientCapacity:
    """An idle client with GPUs."""
    return ClientCapacity(name, slots, slots, gpus=gpus, free_gpus=free_gpus)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([place("a", 0), place("b", 2, 2)], "b"),
        ([place("a", 0), place("b", 2, 1)], None),
        ([place("a", 1, 1), place("b", 2, 1)], None),
        ([place("a", 0), place("batch", None)], "batch"),
        ([place("a", 0)._replace(queues=True)], None),
    ],
)
def test_a_job_goes_where_gpus_are_free(places: list[ClientCapacity], wanted: str | None) -> None:
    """A 2.2 client is not known to have any; a batch system knows by itself."""
    queue = joborch.ServiceQueue("s", [each.name for each in places], 0.0, None, [Candidate("s", 1, gpus=2)])
    found = choose([queue], places, lambda _: [], NOW)
    assert (found and found[1].name) == wanted


def test_freed_gpus_are_kept_for_a_job_that_needs_several() -> None:
    """Others pass it only if they need none of them."""
    at, several = place("a", 2, 1), Candidate("s", 1, gpus=2)
    runs = [Run(9, 1, timeout=100.0, since=NOW, client="a", gpus=1)]
    reserved = reserve(several, at, runs, NOW)
    assert reserved == Reservation(NOW + 100, 4, float("inf"), 0)
    assert reserved.lets(Candidate("s", 2), NOW)
    assert not reserved.lets(Candidate("s", 2, gpus=1), NOW)
    endless = reserve(several, at, [runs[0]._replace(timeout=None)], NOW)
    assert endless == Reservation(float("inf"), 3, float("inf"))
    assert endless.lets(Candidate("s", 2, cpus=3), NOW), "one slot is enough for it"
    assert reserved.lets(Candidate("s", 2, gpus=1, timeout=99.0), NOW)


def test_the_load_of_a_client_counts_gpus() -> None:
    run = Run(1, 2, memory=100, gpus=3)
    assert Load().plus(run, 1) == Load(1, 2, 100, 0, 0, 3)
    assert Load().plus(run, 1).plus(run, -1) == Load()


def test_a_job_with_gpus_from_upload_to_result(make_pair: MakePair) -> None:
    """It waits while others have them, says so, and keeps them over restarts of either side; too many are refused."""
    pair = make_pair(client={"JOBORCH_GPUS": "4,5", "JOBORCH_SLOTS": "4"}).start()
    server, gate = pair.server, pair.folder / "gate"
    held = submit(server, f"{SEEN}; until [ -e {gate} ]; do sleep 0.05; done", gpus=2)
    wait_status(server, held, "Running")
    assert server.get("/clients").json()["clients"][0]["gpus"] == 2
    waiting = submit(server, SEEN, gpus=1)
    wait_for(lambda: "it needs 1 GPU: " in str(server.job(waiting)["waiting_for"]), 60, "the reason")
    assert download(server, run_to_end(server, SEEN, user_id=2)["id"]).text(".joborch/stdout") == "  0\n"
    pair.server.kill()
    pair.client.kill()
    pair.client.start()
    pair.server.start()
    assert server.job(waiting)["status"] == "Queued"
    answer = server.post("/upload", files={"file": ("run.sh", "true")}, data={"user_id": 1, "service": "example", "gpus": 3})
    wait_for(lambda: server.get("/clients").json()["clients"][0]["gpus"] == 2, 60, "news of the client")
    answer = server.post("/upload", files={"file": ("run.sh", "true")}, data={"user_id": 1, "service": "example", "gpus": 3})
    assert (answer.status_code, answer.json()["field"]) == (400, "gpus")
    assert answer.json()["message"] == "no client has 3 GPUs: those for example have at most 2"
    gate.touch()
    for number, seen in ((held, "4,5 4,5 2\n"), (waiting, "4 4 1\n")):
        job = wait_status(server, number, *ENDED)
        assert (job["status"], job["gpus"]) == ("Completed", int(seen.split()[2]))
        assert download(server, number).text(".joborch/stdout") == seen


# == Batch systems ==


@pytest.fixture(name="any_job")
def any_job_fixture(data: DataFolder) -> Iterator[Job]:
    """A payload that asks for two GPUs."""
    yard = Yard(data)
    yield yard.submit("true", X_Joborch_Gpus="2")
    yard.close()


def test_slurm_is_asked_for_gpus(any_job: Job) -> None:
    """The job's own number replaces what its service asks for."""
    options = BatchOptions(slurm_gres="gpu:a100:1")
    assert "--gpus=2" in sbatch_options(any_job, options, Path("/x"))
    assert not any("gres" in word for word in sbatch_options(any_job, options, Path("/x")))
    assert "--gres=gpu:a100:1" in sbatch_options(any_job._replace(gpus=0), options, Path("/x"))
    assert "--gres=nvme:1" in sbatch_options(any_job, BatchOptions(slurm_gres="nvme:1"), Path("/x"))
    assert not any("gpus" in word for word in sbatch_options(any_job._replace(gpus=0), BatchOptions(), Path("/x")))


@pytest.mark.parametrize(("tags", "wanted"), [("", '"GPU"'), ("GPU", '"GPU"'), ("Fast", '"Fast", "GPU"')])
def test_dirac_gets_the_tag(tags: str, wanted: str, any_job: Job) -> None:
    def tags_of(job: Job) -> list[str]:
        jdl = dirac.build_jdl(job, BatchOptions(dirac_tags=tags), "SB:SE|/S3/x")
        return [line for line in jdl.splitlines() if line.startswith("Tags")]

    assert [line.partition("{")[2].rstrip("};") for line in tags_of(any_job)] == [wanted]
    assert len(tags_of(any_job._replace(gpus=0))) == bool(tags)
