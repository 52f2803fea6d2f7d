"""What a script finds when it begins, and what comes back of all that it leaves."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from conftest import MakePair
from harness import NOBODY_UID, Archive, Pair, download, open_program, run_to_end, submit, wait_for, wait_status

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
    assert "aaa.1 was left by an earlier database, and cannot be removed" in own.client.log
