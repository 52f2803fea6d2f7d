"""What a script inherits: the variables that are listed, no open file, a place at the head of the kernel's list, and nothing secret."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import NOBODY_UID, ROOT, Pair, download, from_source, open_program, partial, run_to_end, submit, wait_for, wait_status
from world import doctor

import joborch
from joborch_plugins import slurm

SECRETS = {
    "PGPASS": "1", "DB_PASS": "1", "MYSQL_PWD": "1", "SSH_AUTH_SOCK": "/tmp/agent", "DATABASE_URL": "postgres://u:p@h/d",
    "HTTPS_PROXY": "http://u:p@h:1", "http_proxy": "u:p@h:1", "STRIPE_KEY": "1", "AWS_SECRET_ACCESS_KEY": "1", "VAULT_AUTH": "1",
    "SENTRY_DSN": "1", "LDAP_BIND_PW": "1", "GPG_PASSPHRASE": "1", "SESSION_COOKIE": "1", "X509_USER_PROXY": "/tmp/x509",
    "KRB5CCNAME": "/tmp/krb", "APPTAINER_DOCKER_PASSWORD": "1", "SINGULARITY_DOCKER_USERNAME": "1", "NVIDIA_API_KEY": "1",
    "CONDA_CHANNEL_ALIAS": "https://u:p@conda/", "APPTAINER_ENCRYPTION_PASSPHRASE": "1", "EASYBUILD_GITHUB_TOKEN": "1",
    "CREDENTIALS_DIRECTORY": "/run/credentials/x", "SLURM_JWT": "1", "HF_TOKEN": "1", "DB_DIR": "not a path", "MAIL": "/var/mail/x",
}  # fmt: skip
LISTED = {
    "LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "UTC", "TERM": "vt",
    "MODULEPATH": "/modules", "LMOD_CMD": "/lmod", "__LMOD_REF_COUNT_PATH": "/bin",
    "_ModuleTable001_": "X01v", "LD_LIBRARY_PATH": "/lib/x", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2", "UCX_IB_PKEY": "0x1",
    "SLURM_CONF": "/slurm.conf", "SBATCH_ACCOUNT": "lab", "CONDA_DEFAULT_ENV": "base", "PE_ENV": "GNU", "APPTAINER_BIND": "/a:/b",
    "GCC_ROOT": "/opt/gcc", "EBVERSIONGCC": "12.2", "no_proxy": "localhost", "https_proxy": "http://proxy:3128",
    "XDG_RUNTIME_DIR": "/run/user/1",
}  # fmt: skip
WANTED = {"PGHOST": "db", "MYLAB_TOKEN": "asked for", "MYLAB_X": "1"}
OF_BASH = {"PWD", "OLDPWD", "SHLVL", "_"}


def variables(text: bytes) -> dict[str, str]:
    """What `env -0` printed."""
    return dict(line.split("=", 1) for line in text.decode().split("\0") if line)


def started_by(shell: str, *words: str) -> list[str]:
    """The command of a joborch that is started by a shell, which does something first."""
    return ["bash", "-c", f'{shell}; exec "$@"', *words, *from_source()]


def test_exactly_what_is_listed_arrives(make_pair: MakePair, tmp_path: Path) -> None:
    """Of more than forty variables those that are listed or asked for, of three open files none."""
    (tmp_path / "only-for-us").write_text("a line of a file that was left open\n")
    settings = {**SECRETS, **LISTED, **WANTED, "JOBORCH_PASS_ENV": "PGHOST, MYLAB_*", "MAX_AGE": "1h"}
    pair = make_pair(client=settings)
    pair.client.program = started_by('exec 40<"$0" 41<>"$0" 42>/dev/null', str(tmp_path / "only-for-us"))
    pair.start()
    script = "env -0 > env.bin; ls -l /proc/self/fd > open.txt; for fd in {3..99}; do cat <&$fd; done 2> /dev/null > read.txt; true"
    job = run_to_end(pair.server, script)
    assert job["status"] == "Completed", job
    result = download(pair.server, job["id"])
    seen = variables(result["env.bin"])
    home = {name: value for name, value in pair.client.environment().items() if name in ("PATH", "HOME") or name.startswith("XDG_")}
    ours = {name for name in seen if name.startswith("JOBORCH_")} | {"TMPDIR"}
    assert {name: value for name, value in seen.items() if name not in ours | OF_BASH} == {**home, **LISTED, **WANTED}
    assert ours - {"TMPDIR"} == {
        f"JOBORCH_{word}" for word in ("JOB_ID", "ATTEMPT", "SERVICE", "USER_ID", "CPUS", "MEMORY", "GPUS", "MARK")
    }
    assert result["read.txt"] == b""
    numbers = {line.split()[8] for line in result.text("open.txt").splitlines() if "->" in line}
    assert numbers == {"0", "1", "2", "3"}, "3 is the folder that ls reads"


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_open_files_are_marked_close_on_exec(kernel: str) -> None:
    """By close_range(2), and one by one before Linux 5.11; they stay open for whoever put them there on purpose."""
    code = """
import os, sys, joborch
if sys.argv[1] == "old":
    class Old:
        def syscall(self, *words): return -1
    joborch.libc = Old
os.dup2(1, 77)
joborch.close_at_exec()
assert os.get_inheritable(1) and not os.get_inheritable(77) and os.fstat(77)
"""
    subprocess.run([sys.executable, "-c", code, kernel], check=True, cwd=ROOT)


@pytest.mark.parametrize(("own", "expected"), [(0, 500), (300, 800), (800, 1000)])
def test_short_memory_ends_scripts_first(own: int, expected: int, make_pair: MakePair) -> None:
    """By 500 thousandths before the client, whatever that has; not the wrapper, which writes down how the script ended."""
    pair = make_pair()
    pair.client.program = started_by(f"echo {own} >/proc/self/oom_score_adj", "starter")
    pair.start()
    job = run_to_end(pair.server, "cat /proc/self/oom_score_adj /proc/$PPID/oom_score_adj > adj.txt")
    assert download(pair.server, job["id"]).text("adj.txt").split() == [str(expected), str(own)]


def test_scripts_get_the_umask_of_the_start(make_pair: MakePair) -> None:
    """And what is joborch's own is closed to everybody else all the same."""
    pair = make_pair(client={"DB_PATH": None})
    pair.client.program = started_by("umask 0002", "starter")
    pair.start()
    job = run_to_end(pair.server, "umask > umask.txt; touch new; stat -c %a new >> umask.txt")
    assert download(pair.server, job["id"]).text("umask.txt").split() == ["0002", "664"]
    for path in (pair.client.data / "joborch.db", pair.client.data / "jobs", pair.server.data / "joborch.db", pair.server.data / "results"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_programs_that_joborch_starts_show_no_token(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """chmod and rm, for a folder without rights, are not hidden from scripts as joborch is: they have no secret to show."""
    seen = open_folder / "seen"
    seen.mkdir()
    seen.chmod(0o777)
    for name in ("rm", "chmod"):
        (open_folder / name).write_text(f'#!/bin/bash\nenv -0 >{seen}/{name}-$$\nexec /bin/{name} "$@"\n')
        (open_folder / name).chmod(0o755)
    settings = {"PATH": f"{open_folder}:{os.environ['PATH']}", "MAX_AGE": "0", "JOBORCH_CLEAN_INTERVAL": "0.1", **SECRETS}
    pair = make_pair(client=settings, folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    assert run_to_end(pair.server, "mkdir d; touch d/x; /bin/chmod 500 d; exit 1")["status"] == "Failed"
    wait_for(lambda: list(seen.glob("rm-*")), what="a folder that rm removes")
    shown = b"\0".join(path.read_bytes() for path in seen.iterdir())
    assert b"PATH=" in shown
    assert Pair.TOKEN.encode() not in shown
    assert not [name for name in SECRETS if f"\0{name}=".encode() in b"\0" + shown]


def test_server_and_client_are_closed_to_scripts_of_their_user(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """A script reads neither's environment nor memory, while both go on to use their own /proc: large results come through."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    pids = f"{own.client.pid} {own.server.pid}"
    script = f"""
for pid in {pids}; do
    for file in environ mem maps fd/0 cwd/x; do
        head -c 1 /proc/$pid/$file && echo "$pid $file"
    done
done > leaked.txt 2> refused.txt
head -c 3000000 /dev/urandom > large.bin
touch ready
until [ -e ../go ]; do sleep 0.05; done
"""
    number = submit(own.server, script)
    folder = own.client.data / "jobs"
    wait_for(lambda: list(folder.glob("*/work/ready")), what="the script to have looked")
    assert len(partial(own.server, number)["large.bin"]) == 3_000_000
    next(folder.glob("*")).joinpath("go").touch()
    assert wait_status(own.server, number, "Completed")
    result = download(own.server, number)
    assert (result["leaked.txt"], len(result["large.bin"])) == (b"", 3_000_000)
    assert result.text("refused.txt").count("Permission denied") == 10


def test_the_archive_hides_before_it_imports_joborch(pyz: Path, tmp_path: Path) -> None:
    """The import takes a third of a second, in which a script could read the environment."""
    with zipfile.ZipFile(pyz) as archive:
        (tmp_path / "__main__.py").write_bytes(archive.read("__main__.py"))
    stub = "import ctypes\ndumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\nclass Program:\n    pass\n"
    stub += "def main():\n    print(dumpable)\n    return 0\n"
    (tmp_path / "joborch.py").write_text(stub)
    (tmp_path / "joborch_plugins").mkdir()
    (tmp_path / "joborch_plugins" / "commands.py").write_text("def takes(argv):\n    return False\n")
    done = subprocess.run([sys.executable, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_wrapper_that_is_replaced_is_not_run(own_pair: Pair) -> None:
    """The client runs the wrapper's text, whatever lies in its folder."""
    (own_pair.client.data / "wrapper.sh").write_text("touch /tmp/never\nexit 3\n")
    assert run_to_end(own_pair.server, "true")["status"] == "Completed"


def test_slurms_login_stays_with_its_commands(data: joborch.DataFolder, tmp_path: Path) -> None:
    """sbatch exports SLURM_JWT to the job: neither the script's environment nor its wrapper's has it, and the words arrive."""
    folder = data.jobs / "a job.1"
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "run.sh").write_text("env -0 > env.bin; cat /proc/$PPID/environ > wrapper.bin; exit 3\n")
    (tmp_path / "slurm_script").write_bytes(joborch.wrapper_text(data, first=slurm.WITHOUT_JWT))
    environment = {"PATH": os.environ["PATH"], "SLURM_JWT": "secret", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(tmp_path / "slurm_script"), str(folder), "1"], env=environment, check=False)
    assert done.returncode == 3
    for name in ("env.bin", "wrapper.bin"):
        seen = variables((folder / "work" / name).read_bytes())
        assert ("SLURM_JWT" in seen, seen["SLURM_JOB_ID"]) == (False, "7")


# == Module systems ==

LMOD = Path("/usr/share/lmod/lmod/init/bash")
MODULES = Path("/usr/lib/x86_64-linux-gnu/modulecmd.tcl")
LUA_MODULE = 'setenv("MYTOOL_ROOT", "/opt/mytool")\nprepend_path("PATH", "/opt/mytool/bin")\n'
TCL_MODULE = "#%Module\nsetenv MYTOOL_ROOT /opt/mytool\nprepend-path PATH /opt/mytool/bin\n"
# What the package environment-modules 5.2 exports, with a stand-in for its command where it is not installed (it conflicts with lmod).
STAND_IN = """#!/bin/bash
shift
case $1 in
    avail) echo "echo mytool/1.0 >&2;";;
    load) echo "export MYTOOL_ROOT=/opt/mytool; export PATH=/opt/mytool/bin:$PATH; export LOADEDMODULES=mytool/1.0; test 0;";;
    *) echo "test 0;";;
esac
"""
FUNCTIONS = """
_module_raw() { eval "$(MODULECMD bash "$@")"; _mlstatus=$?; return $_mlstatus; }
module() { local _mlredir=0; _module_raw "$@"; }
ml() { module ml "$@"; }
export -f _module_raw module ml
export MODULESHOME=/usr/share/modules MODULES_CMD=MODULECMD LOADEDMODULES= MODULEPATH=
"""


def module_system(kind: str, folder: Path) -> str:
    """What a login shell runs so that `module` is there, with a module mytool/1.0."""
    (folder / "files" / "mytool").mkdir(parents=True)
    if kind == "Lmod":
        assert LMOD.exists(), "the package lmod is missing: tests/run installs it"
        (folder / "files" / "mytool" / "1.0.lua").write_text(LUA_MODULE)
        return f". {LMOD}; module use {folder}/files"
    (folder / "files" / "mytool" / "1.0").write_text(TCL_MODULE)
    (folder / "modulecmd").write_text(STAND_IN)
    (folder / "modulecmd").chmod(0o755)
    start = f'eval "$(tclsh {MODULES} bash autoinit)"' if MODULES.exists() else FUNCTIONS.replace("MODULECMD", f"{folder}/modulecmd")
    return f"{start}\nmodule use {folder}/files"


@pytest.mark.parametrize("kind", ["Lmod", "Environment Modules"])
@pytest.mark.parametrize("loaded", ["before", "in the script"])
def test_module_systems_work_in_scripts(kind: str, loaded: str, make_pair: MakePair, tmp_path: Path) -> None:
    """A client that was started from a shell with `module` passes on its functions, its variables, and what is loaded already."""
    shell = module_system(kind, tmp_path) + ("\nmodule load mytool" if loaded == "before" else "")
    pair = make_pair()
    pair.client.program = started_by(shell, "starter")
    pair.start()
    script = """
type -t module ml > seen.txt
module avail > avail.txt 2>&1
module load mytool/1.0
echo "$MYTOOL_ROOT ${PATH%%:*} $LOADEDMODULES" >> seen.txt
"""
    job = run_to_end(pair.server, script)
    result = download(pair.server, job["id"])
    assert job["status"] == "Completed", result.names()
    assert result.text("seen.txt").splitlines() == ["function", "function", "/opt/mytool /opt/mytool/bin mytool/1.0"]
    assert "mytool/1.0" in result.text("avail.txt")


# == What is said of it ==


@pytest.mark.parametrize("names", ["a b", "A=1", "A\tB"])
def test_names_that_are_none_are_refused(names: str) -> None:
    with pytest.raises(joborch.ConfigError, match=r"JOBORCH_PASS_ENV is .*: give names of variables separated by commas"):
        joborch.load_config("client", {}, {"JOBORCH_PASS_ENV": names})


def test_everything_may_be_passed_on_but_joborchs_own() -> None:
    """By `*`, as until 0.1.0 and beyond it: who asks for secrets gets them."""
    environment = {**SECRETS, **LISTED, "PORT": "1", "JOBORCH_TOKEN": "t", "SERVICE_A_TOKEN": "t", "MAX_AGE": "1"}
    assert joborch.passed_on(environment, ["*"]) == {**SECRETS, **LISTED}
    assert joborch.passed_on(environment, ["SLURM_JWT", "JOBORCH_*", "PORT"]) == {**LISTED, "SLURM_JWT": "1"}


def test_doctor_and_log_name_what_is_left_out(make_process: MakeProcess, tmp_path: Path) -> None:
    """How many, which, and how to pass them on; a token in the environment is noted."""
    code, found = doctor(
        "client", tmp_path, JOBORCH_TOKEN="a-token-for-this-test", MYLAB_X="value", MYLAB_Y="value", PGHOST="h", JOBORCH_PASS_ENV="PGHOST"
    )
    said = [finding["text"] for finding in found]
    assert code == 0
    (line,) = [text for text in said if "scripts do not get 2 variables of this environment (MYLAB_X, MYLAB_Y)" in text]
    assert "JOBORCH_PASS_ENV" in line
    assert any("JOBORCH_TOKEN is in the environment" in text and "JOBORCH_TOKEN_FILE" in text for text in said)
    client = make_process("client", {"JOBORCH_LOG": "debug", "MYLAB_X": "value"}).start()
    assert "variables that scripts do not get: MYLAB_X" in client.log
    assert "=value" not in client.log
