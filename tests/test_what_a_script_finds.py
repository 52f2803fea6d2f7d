"""What a script finds when it begins, and what comes back of all that it leaves."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    NOBODY_UID,
    Archive,
    Pair,
    clean_environment,
    download,
    free_port,
    from_source,
    open_program,
    partial,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)

import joborch
from joborch_plugins import dirac

# == What comes back ==


def test_an_absolute_link_to_a_file_inside_arrives_as_a_relative_one(pair: Pair, tmp_path: Path) -> None:
    """As `ln -s "$PWD/..."` makes it; also by way of others, to folders, and by the path without links."""
    script = """
        mkdir -p work/deep results/a
        echo 42 >work/table.csv; echo 43 >work/deep/x
        ln -s "$PWD/work/table.csv" results/table.csv
        ln -s "$(pwd -P)//work/deep" results/a/deep
        ln -s results/a/deep/x by-two
        ln -s "$PWD/results/a/../../work/table.csv" results/a/up
        ln -s "$PWD" results/all
        ln -s "$PWD/../stdout" out; ln -s "$PWD-more/x" beside; ln -s /etc/passwd far
    """
    job = run_to_end(pair.server, script)
    assert job["status"] == "Completed", job
    result = download(pair.server, job["id"])
    (tmp_path / "r.zip").write_bytes(pair.server.get(f"/download/{job['id']}").content)
    assert result[".joborch/stderr"] == b""  # unzip finds fault with an empty file that is said to be deflated
    subprocess.run(["unzip", "-q", "r.zip"], cwd=tmp_path, check=True)
    assert (tmp_path / "results" / "table.csv").read_text() == "42\n"
    assert (tmp_path / "results" / "a" / "deep" / "x").read_text() == "43\n"
    assert (tmp_path / "results" / "a" / "up").read_text() == "42\n"
    assert (tmp_path / "by-two").read_text() == "43\n"
    assert (tmp_path / "results" / "all" / "run.sh").exists()
    assert result.text("results/table.csv") == "../work/table.csv"
    left_out = result.text(".joborch/left-out.txt")
    assert [line.partition(":")[0] for line in left_out.splitlines()] == ["beside", "far", "out"]
    assert job["reason"].endswith("; 3 files were left out: see .joborch/left-out.txt")


def test_an_absolute_link_below_a_data_folder_that_is_a_link(make_pair: MakePair, tmp_path: Path) -> None:
    """bash's $PWD is then another path than the real one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    own = make_pair(client={"DATA_PATH": str(tmp_path / "alias" / "data")}).start()
    job = run_to_end(own.server, 'echo 1 >x; ln -s "$PWD/x" a; ln -s "$(pwd -P)/x" b')
    result = download(own.server, job["id"])
    assert (result.text("a"), result.text("b")) == ("x", "x")
    assert "left out" not in job["reason"]


def test_nothing_left_out_is_not_spoken_of(pair: Pair) -> None:
    """Nor do inputs that stay out of the result by the service's setting count."""
    assert run_to_end(pair.server, "echo 1 >x")["reason"] == "run.sh ended with exit status 0"


def test_a_failed_script_hears_of_what_was_left_out(pair: Pair) -> None:
    """One file: the sentence is about one."""
    job = run_to_end(pair.server, "mkfifo pipe; exit 3")
    assert job["reason"].endswith("; 1 file was left out: see .joborch/left-out.txt"), job["reason"]


def test_what_a_script_made_unreadable_arrives(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """Files and folders of the client's own user; the ZIP has the files' modes."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    script = """
        echo a >shut.txt; chmod 0 shut.txt
        echo b >write-only; chmod 200 write-only
        mkdir -p d/e; echo c >d/e/c; echo d >d/d; chmod 0 d/e/c d/e; chmod 600 d
        ln -s d/e/c link; chmod 0 . ; exit STATUS
    """
    for status in ("0", "3"):
        job = run_to_end(own.server, script.replace("STATUS", status))
        assert "left out" not in job["reason"]
        content = own.server.get(f"/download_partial/{job['id']}").content
        result = download(own.server, job["id"]) if status == "0" else Archive(content)
        assert [result[name] for name in ("shut.txt", "write-only", "d/e/c", "d/d")] == [b"a\n", b"b\n", b"c\n", b"d\n"]
        modes = [stat.S_IMODE(result.zip.getinfo(name).external_attr >> 16) for name in ("shut.txt", "write-only", "d/e/c")]
        assert modes == [0, 0o200, 0]
        assert not any(name.endswith("left-out.txt") for name in result.names())


def test_files_of_another_user_are_left_out_and_said(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """What a container left as root, and nobody else can read."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    number = submit(own.server, "mkdir m; echo 1 >mine; while [ ! -e m/done ]; do sleep 0.1; done")
    folder = Path(wait_for(lambda: list(own.client.data.glob("jobs/*/work/m")), what="the folder m")[0])
    (folder / "shut").mkdir(mode=0o700)
    (folder / "secret").write_text("of root")
    (folder / "secret").chmod(0o600)
    (folder / "open").write_text("of root, too")
    (folder / "open").chmod(0o644)
    (folder / "done").touch()
    job = wait_status(own.server, number, "Completed")
    assert job["reason"].endswith("; 2 files were left out: see .joborch/left-out.txt"), job["reason"]
    result = download(own.server, number)
    assert result["m/open"] == b"of root, too"
    assert {line.partition(":")[0] for line in result.text(".joborch/left-out.txt").splitlines()} == {"m/secret", "m/shut"}


def test_absolute_links_come_back_from_a_grid_as_relative_ones(tmp_path: Path) -> None:
    """There the folder had another path; what leads out is left out as before."""
    there = tmp_path / "there"
    (there / "payload" / "work" / "d").mkdir(parents=True)
    (there / "alias").symlink_to(there)
    (there / "payload" / "work" / "x").write_text("1")
    for name, target in (("a", there / "payload/work/x"), ("d/b", there / "alias/payload/work/x"), ("far", "/etc/passwd")):
        (there / "payload" / "work" / name).symlink_to(target)
    (there / "payload" / "work" / "out").symlink_to(f"{there}/payload/../../secret")
    (there / "wrapper.sh").write_text("exit 0")
    (tmp_path / "secret").write_text("")
    with closing(joborch.Store(":memory:", "client")) as store:
        text = dirac.launcher(store.add(joborch.NewJob(uuid="8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0"), ""), 1.0)
    subprocess.run(["bash", "-c", f"cd {there}/alias; {text.decode()}"], check=True)
    with tarfile.open(there / dirac.OUTPUT_ARCHIVE, mode="r|gz") as archive:
        (tmp_path / "out").mkdir()
        left_out = dirac.unpack(archive, tmp_path / "out", 0)
    work = tmp_path / "out" / "work"
    shutil.rmtree(there)
    assert ((work / "a").read_text(), (work / "d" / "b").read_text()) == ("1", "1")
    assert sorted(name.rpartition("/")[2] for name in left_out) == ["far", "out"]
    assert not (tmp_path / "out" / "place").exists()


# == What cannot be removed ==


def test_files_of_another_user_hold_up_no_cleaning(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """It is said once, /health has the sum, everything else goes; and they go once somebody has helped."""
    brief = {"MAX_AGE": "0.5", "JOBORCH_CLEAN_INTERVAL": "0.1", "JOBORCH_KEEP_FETCHED": "0.5"}
    program = open_program(open_folder, pyz)
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=program, client=brief).start()
    number = submit(own.server, "mkdir m; echo 1 >mine; while [ ! -e m/done ]; do sleep 0.1; done")
    folder = Path(wait_for(lambda: list(own.client.data.glob("jobs/*/work/m")), what="the folder m")[0])
    (folder / "sub").mkdir(mode=0o755)
    (folder / "sub" / "file").write_text("of root")
    (folder / "done").touch()
    wait_status(own.server, number, "Completed")
    said = wait_for(lambda: own.client.health()["unremovable"], what="/health saying so")
    assert (said["count"], said["bytes"]) == (1, len("of root"))
    assert str(folder.parent.parent) in said["message"]
    assert not (folder.parent / "mine").exists()  # what can go has gone
    later = run_to_end(own.server, "true")
    assert later["status"] == "Completed"
    wait_for(lambda: not list(own.client.data.glob(f"jobs/{later['uuid']}.*")), what="a later payload cleaned")
    assert own.client.log.count("cannot be removed") == 1
    subprocess.run(["rm", "-r", str(folder.parent.parent)], check=True)
    own.client.restart()
    wait_for(lambda: own.client.health()["unremovable"] is None, what="/health being well again")


def test_a_start_with_a_new_database_goes_on_around_files_of_another_user(
    make_pair: MakePair, open_folder: Path, pyz: Path, root: None
) -> None:
    """What an earlier database left is removed at the start; what cannot be, is named, and the client works."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    run_to_end(own.server, "true")
    own.client.stop()
    for name in ("aaa.1", "zzz.1"):
        (own.client.data / "jobs" / name).mkdir()
        (own.client.data / "jobs" / name / "sub").mkdir()
    os.chown(own.client.data / "jobs" / "zzz.1", NOBODY_UID, NOBODY_UID)
    os.chown(own.client.data / "jobs" / "zzz.1" / "sub", NOBODY_UID, NOBODY_UID)
    for path in own.client.data.glob("joborch.db*"):
        path.unlink()
    own.client.start()
    assert (own.client.data / "jobs" / "aaa.1").exists()
    assert not (own.client.data / "jobs" / "zzz.1").exists()
    assert "aaa.1 belongs to an earlier database and cannot be removed" in own.client.log


# == TMPDIR ==

MANAGER = """
cat >t.py <<'Y'
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.Manager() as manager:
        print(dict(manager.dict(a=1)))
Y
python3 t.py
"""


def no_scratch(*places: str) -> bool:
    """Whether none of these folders is there any more."""
    return not any(os.path.lexists(place) for place in places)


@pytest.fixture
def far(make_pair: MakePair, tmp_path: Path) -> Pair:
    """A pair whose data folder has a path as long as sockets' are short."""
    return make_pair(client={"DATA_PATH": str(tmp_path / ("long" * 20) / "data")}).start()


def test_sockets_can_be_made_in_tmpdir_however_long_the_home_is(far: Pair) -> None:
    """multiprocessing.Manager makes one there; afterwards the folder is gone, and nothing of it is in the result."""
    job = run_to_end(far.server, MANAGER + 'echo "$TMPDIR" >place; stat -c %a "$TMPDIR" >mode; mkdir "$TMPDIR"/d; echo x >"$TMPDIR"/d/.x')
    assert job["status"] == "Completed", job
    result = download(far.server, job["id"])
    place = result.text("place").strip()
    assert (len(place) < 60, result.text("mode"), result.text(".joborch/stdout")) == (True, "700\n", "{'a': 1}\n")
    wait_for(lambda: no_scratch(place), what="TMPDIR removed")
    assert result.own_files() == {"run.sh", "t.py", "place", "mode"}


def test_a_site_has_its_own_tmpdir(make_pair: MakePair, open_folder: Path) -> None:
    """As a node's fast disk; a path that is too long for sockets, or none that can be written, is passed over."""
    far = open_folder / ("x" * 60)
    far.mkdir()
    for site, good in ((open_folder, True), (far, False), (open_folder / "none", False)):
        own = make_pair(client={"TMPDIR": str(site)}).start()
        job = run_to_end(own.server, 'echo "$TMPDIR"; : >"$TMPDIR"/x')
        place = download(own.server, job["id"]).text(".joborch/stdout").strip()
        assert place.startswith(f"{open_folder if good else '/tmp'}/jo-")
        wait_for(lambda place=place: no_scratch(place), what="TMPDIR removed")  # type: ignore[misc]


def test_a_script_cannot_have_something_else_removed(far: Pair, tmp_path: Path) -> None:
    """Whatever it makes of its TMPDIR, and of what leads to it: no link is followed, and no other folder goes."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "jo-precious").mkdir()
    places = []
    for script in (
        f'rmdir "$TMPDIR"; ln -s {tmp_path}/precious "$TMPDIR"',
        f'rm ../tmp; ln -s {tmp_path}/precious ../tmp; echo x >"$TMPDIR/x"',
        f"rm ../tmp; ln -s {tmp_path}/jo-precious ../tmp; kill -9 $PPID",
        f'ln -s {tmp_path}/precious "$TMPDIR/link"; chmod 0 "$TMPDIR"',
        'rmdir "$TMPDIR"; echo x >"$TMPDIR"',
    ):
        job = run_to_end(far.server, f'echo "$TMPDIR" >place; cp place ../../../place; {script}')
        places.append((tmp_path / ("long" * 20) / "data" / "place").read_text().strip())
        assert job["status"] in ("Completed", "Failed")
    wait_for(lambda: no_scratch(*places), what="every TMPDIR removed")
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert (tmp_path / "jo-precious").is_dir()


def test_a_tmpdir_is_removed_after_a_kill_and_after_a_crash(far: Pair, tmp_path: Path) -> None:
    """Of one that is terminated; of one that ended while the client was down, whose wrapper was killed with it."""
    script = 'mkdir "$TMPDIR/d"; echo x >"$TMPDIR/d/x"; echo "$TMPDIR $PPID" >PLACE; exec sleep 1000'
    said = [tmp_path / name for name in ("one", "two")]
    numbers = [submit(far.server, script.replace("PLACE", str(path))) for path in said]
    (one, _), (two, wrapper) = (
        wait_for(lambda path=path: path.exists() and path.read_text().split(), what="the script")
        for path in said  # type: ignore[misc]
    )
    far.server.post(f"/terminate/{numbers[0]}")
    wait_status(far.server, numbers[0], "Killed")
    wait_for(lambda: no_scratch(one), what="TMPDIR of a killed payload removed")
    assert Path(two, "d", "x").exists()
    far.client.kill()
    os.kill(int(wrapper), 9)
    far.client.start()
    wait_for(lambda: no_scratch(two), what="TMPDIR of what a crash ended removed")


def test_a_new_database_removes_the_tmpdir_of_what_it_ends(far: Pair, tmp_path: Path) -> None:
    """Nothing else knows of it any more."""
    submit(far.server, f'echo x >"$TMPDIR/x"; echo "$TMPDIR" >{tmp_path}/place; exec sleep 1000')
    place = wait_for(lambda: (tmp_path / "place").exists() and (tmp_path / "place").read_text().strip(), what="the script")
    far.client.kill()
    for path in (tmp_path / ("long" * 20) / "data").glob("joborch.db*"):
        path.unlink()
    far.client.start()
    assert no_scratch(place)


# == Programs, and the shell ==


def test_programs_among_the_inputs_can_be_run(pair: Pair, make_process: MakeProcess) -> None:
    """Those that begin with #! or as ELF does, in folders, too; not a text."""
    true = Path("/bin/true").read_bytes()
    files = {"tool": b"#!/bin/sh\necho from the tool\n", "bin/elf": true, "one": b"#!", "text": b"# no program\n"}
    job = run_to_end(pair.server, "./tool; bin/elf && echo elf; ls -l text >&2; test ! -x text", files)
    assert job["status"] == "Completed", job
    assert partial(pair.server, job["id"]).text(".joborch/stdout") == "from the tool\nelf\n"
    client = make_process("client", {"JOBORCH_ALLOW_ANONYMOUS": "1"}).start()  # as a 2.2 server sends: the field's name is the path
    answer = client.post("/submit", files={"run.sh": ("run.sh", b"./tool >said"), "tool": ("tool", files["tool"])})
    folder = Path(answer.json()["loc"])
    wait_for(lambda: (folder / "work" / "said").exists() and (folder / "work" / "said").read_text(), what="the tool's word")


FIRST_LINES = {
    "#!/bin/bash -l": True,
    "#!/bin/bash --login": True,
    "#! /usr/bin/bash  -l ": True,
    "#!/usr/bin/env -S bash -l": True,
    "#!/usr/bin/env -S bash --login": True,
    "#!/bin/bash": False,
    "#!/usr/bin/env bash": False,
    "#!/bin/bash --norc": False,
    "# -l": False,
}


def test_a_first_line_that_asks_for_a_login_shell_is_heeded(make_pair: MakePair) -> None:
    """What the user's ~/.bash_profile defines, as `module` is on many sites, is there then, and else not."""
    own = make_pair().start()
    assert own.client.home is not None
    (own.client.home / ".bash_profile").write_text('greet() { echo "loaded $2"; }\n')
    numbers = {line: submit(own.server, f"{line}\nset -e\ngreet a b\n") for line in FIRST_LINES}
    for line, number in numbers.items():
        job = wait_status(own.server, number, "Completed", "Failed")
        assert (job["status"] == "Completed") is FIRST_LINES[line], (line, job)
        if not FIRST_LINES[line]:
            assert job["exit_code"] == 127


def test_a_missing_command_of_another_name_gets_no_hint(pair: Pair) -> None:
    """module and conda get one, also if much else follows."""
    for script, hint in (
        ("set -e; module load gromacs", True),
        ("gromacs", False),
        ("conda activate x; seq 5000 >&2; exit 1", True),
        ("my-module", False),
    ):
        assert ("PRELUDE" in run_to_end(pair.server, script)["reason"]) is hint, script


def test_a_line_runs_before_each_script_of_a_service(make_pair: MakePair) -> None:
    """In one login shell with the script, which keeps its name, its exit status and its lines; of no other service."""
    prelude = "greet to gcc; said='it is'; f() { echo f; }; export JOINED=1"
    own = make_pair(client={"SERVICE_EXAMPLE_PRELUDE": prelude}).start()
    assert own.client.home is not None
    (own.client.home / ".bash_profile").write_text('greet() { echo "loaded $2"; }\n')
    script = 'echo "$said $(f) $0 $# $JOINED $LINENO"; env | grep -c PRELUDE; [ "$0" = "${BASH_SOURCE[0]}" ]; echo $?; exit 3'
    job = run_to_end(own.server, script)
    assert job["exit_code"] == 3
    assert partial(own.server, job["id"]).text(".joborch/stdout") == "loaded gcc\nit is f ./run.sh 0 1 1\n0\n0\n"
    assert "SERVICE_EXAMPLE_PRELUDE" not in own.client.log  # no word that it had no effect


def test_a_line_before_the_script_that_fails_is_said(make_pair: MakePair) -> None:
    """The script runs all the same, as it would below that line."""
    own = make_pair(client={"SERVICE_EXAMPLE_PRELUDE": "greet nobody"}).start()
    job = run_to_end(own.server, "echo on")
    result = download(own.server, job["id"])
    assert result.text(".joborch/stdout") == "on\n"
    assert "SERVICE_..._PRELUDE) failed: greet nobody" in result.text(".joborch/stderr")


# == What a client keeps ==


def test_a_client_keeps_no_files_that_its_server_holds(make_pair: MakePair) -> None:
    """Ten minutes after that is confirmed, or as set; a 2.2 server cannot confirm: what it has fetched stays as long as before."""
    own = make_pair(client={"JOBORCH_KEEP_FETCHED": "0.5", "JOBORCH_CLEAN_INTERVAL": "0.1"}).start()
    bearer = {"Authorization": f"Bearer {Pair.TOKEN}"}
    old = own.client.post("/submit", files={"run.sh": ("run.sh", b"echo old")}, headers=bearer).json()
    wait_for(lambda: own.client.get(f"/retrieve/{old['id']}", headers=bearer).content[:2] == b"PK", what="the result of the 2.2 server")
    jobs = [run_to_end(own.server, script) for script in ("echo out; echo 1 >x", "echo out; echo 1 >x; exit 3")]
    number = submit(own.server, "echo out; echo 1 >x; exec sleep 1000")
    wait_for(lambda: own.server.get(f"/jobs/{number}/logs").text == "out\n", what="its output")
    own.server.post(f"/terminate/{number}")
    jobs.append(wait_status(own.server, number, "Killed"))
    for job in jobs:
        wait_for(lambda job=job: not list(own.client.data.glob(f"jobs/{job['uuid']}.*")), what="its files gone")  # type: ignore[misc]
    assert Path(old["loc"]).exists()
    own.client.stop()  # all is the server's own now
    for job, status in zip(jobs, ("Completed", "Failed", "Killed")):
        assert partial(own.server, job["id"])["x"] == b"1\n"
        assert own.server.get(f"/jobs/{job['id']}/logs").text == "out\n"
        assert own.server.job(job["id"])["status"] == status


def test_a_client_keeps_what_its_server_does_not_hold_yet(make_pair: MakePair) -> None:
    """The server was away: the result is there when it is back."""
    own = make_pair(client={"JOBORCH_KEEP_FETCHED": "0", "JOBORCH_CLEAN_INTERVAL": "0.1"}).start()
    gate = own.folder / "gate"
    number = submit(own.server, f"while [ ! -e {gate} ]; do sleep 0.05; done; echo 1 >x")
    wait_status(own.server, number, "Running")
    own.server.stop()
    gate.touch()
    wait_for(lambda: own.client.health()["running"] == 0, what="its end")
    own.server.start()
    job = wait_status(own.server, number, "Completed")
    assert (job["attempt"], download(own.server, number)["x"]) == (1, b"1\n")


# == Limits of the login shell, and lines for a batch system ==


def doctor(*limits: str, **settings: str) -> str:
    """What `doctor client` says in a shell with these limits (soft, as ulimit takes them)."""
    command = "; ".join([*(f"ulimit -S{limit}" for limit in limits), f"exec {' '.join(from_source())} doctor client"])
    environment = {**clean_environment(None), "HOME": os.environ["HOME"], "JOBORCH_HOST": "127.0.0.1", "PORT": str(free_port()), **settings}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False).stdout


def test_doctor_names_the_limits_of_the_login_shell(tmp_path: Path) -> None:
    """Each with its remedy; and says so where there is none."""
    said = doctor("t 6000", "f 2048", "n 200", "v 8000000", DATA_PATH=str(tmp_path))
    for text in ("CPU time to 1", "the size of a file to 2.0 MiB", "open files to 200", "memory to 7.6 GiB"):
        assert f"limits {text}" in said, said
    assert "ulimit -St unlimited before the start" in said
    plain = doctor("t unlimited", "f unlimited", "v unlimited", "d unlimited", "n 1024", DATA_PATH=str(tmp_path))
    assert "does not limit CPU time, memory or files" in plain, plain


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/bash\n#SBATCH --mem=8G\n#SBATCH -t 60\ntrue\n", "2 lines with #SBATCH"),
        ("#PBS -l walltime=1:00:00\n#SBATCH -c 4\ntrue\n", "2 lines with #PBS and #SBATCH"),
        ("#$ -cwd\ntrue\n", "1 line with #$"),
        ("#SBATCHes are none\n#$ make\necho '#SBATCH -t 1'\n", ""),
        ("true\n", ""),
    ],
)
def test_lines_for_a_batch_system_are_named_with_the_fields_that_do_it(script: str, said: str, pair: Pair) -> None:
    """At the upload: nobody else would notice before the job runs out of memory or time."""
    warnings = upload(pair.server, {"run.sh": script.encode()}).json()["warnings"]
    assert [said in text and "-F cpus=4 -F memory=2048 -F timeout=3600" in text for text in warnings] == [True] * bool(said)
