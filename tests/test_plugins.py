"""What stands in rooms of its own: plug-ins use the names of joborch's __all__ alone, and are imported only when asked for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakePair
from harness import BASE, PLUGINS, ROOT, SOURCE, clean_environment, free_port, from_source, run_to_end, submit, wait_status
from world import Yard

import joborch
import joborch_base
from joborch_base import vocabulary


def imports_of(source: str) -> list[tuple[str, str]]:
    """The modules that a source imports, anywhere in it, each with the name that is taken from it ("" for all)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


MADE_OF = {
    "commands": ("caller",),
    "top": ("caller", "commands"),
    "completion": ("caller", "commands"),
    "operator_commands": ("caller", "commands"),
    "export": ("lists",),
}


def interface_faults(source: str, plugin: str = "") -> list[str]:
    """What a plug-in takes of joborch that its `__all__` does not offer, and what it takes of other plug-ins.

    The commands are made of the library, and those with a file of their own of both.
    """
    faults = []
    for module, name in imports_of(source):
        if module.removeprefix("joborch_plugins.") in MADE_OF.get(plugin, ()):
            continue
        if module.partition(".")[0] == "joborch_plugins":
            faults.append(f"it imports {module}")
        elif module == "joborch" and name not in joborch.__all__:
            faults.append(f"it takes {name or 'the whole module'}, which is not in __all__")
    return faults


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.stem)
def test_a_plugin_uses_the_interface_alone(plugin: Path) -> None:
    assert interface_faults(plugin.read_text(encoding="utf-8"), plugin.stem) == []


def test_the_interface_is_what_plugins_use() -> None:
    """`__all__` names what there is, each once, and nothing that no plug-in takes."""
    taken = {name for path in PLUGINS for module, name in imports_of(path.read_text(encoding="utf-8")) if module == "joborch"}
    assert sorted(joborch.__all__) == sorted(taken)
    assert [name for name in joborch.__all__ if not hasattr(joborch, name)] == []


def test_the_program_names_plugins_by_string() -> None:
    """It imports none: PLUGINS names them, and each name there leads somewhere."""
    assert [module for module, _ in imports_of(SOURCE.read_text(encoding="utf-8")) if module.startswith("joborch_plugins")] == []
    for name, reference in vocabulary.PLUGINS.items():
        assert joborch.load_plugin(name) is not None, reference
    known = {reference.partition(":")[0] for reference in vocabulary.PLUGINS.values()}
    assert known == {f"joborch_plugins.{path.stem}" for path in PLUGINS if path.stem != "__init__"}


def test_what_the_program_is_built_on_imports_only_what_stands_before_it() -> None:
    """The list in `joborch_base/__init__.py` is the order; names that only annotations need may come from anywhere."""
    order = re.findall(r"^    (\w+) {2,}", joborch_base.__doc__ or "", re.MULTILINE)
    assert sorted(order) == sorted(path.stem for path in BASE if path.stem != "__init__")
    for path in BASE:
        for module, name in imports_when_run(path.read_text(encoding="utf-8")):
            package, _, stem = module.partition(".")
            assert package not in ("joborch", "joborch_plugins"), f"{path.name} imports {module}"
            if package == "joborch_base":
                assert order.index(stem or name) < order.index(path.stem), f"{path.name} imports {stem or name}"


def imports_when_run(source: str) -> list[tuple[str, str]]:
    """What a source imports, without the blocks for TYPE_CHECKING."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return imports_of(ast.unparse(tree))


def test_the_rule_of_the_interface_bites() -> None:
    assert interface_faults("from joborch import Job") == []
    assert interface_faults("def f():\n    from joborch import send_tick") == ["it takes send_tick, which is not in __all__"]
    assert interface_faults("import joborch") == ["it takes the whole module, which is not in __all__"]
    assert interface_faults("from joborch_plugins.slurm import SlurmExecutor") == ["it imports joborch_plugins.slurm"]


@pytest.mark.parametrize("command", [["--version"], ["config", "client"], ["--help"]])
def test_what_is_not_asked_for_is_not_imported(command: list[str], tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['joborch', *sys.argv[1:]]; import joborch, atexit; "
    code += "packages = ('joborch_plugins.', 'requests', 'urllib3'); "
    code += "atexit.register(lambda: print('loaded:', *(name for name in sys.modules if name.startswith(packages)))); "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(joborch.main())", *command],
        cwd=ROOT, env={**clean_environment(tmp_path), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    wanted = {"joborch_plugins.commands", "joborch_plugins.caller"} | ({"joborch_plugins.admin"} if command[0] == "config" else set())
    name, *loaded = done.stdout.splitlines()[-1].split()
    assert (done.returncode, name, set(loaded)) == (0, "loaded:", wanted), done.stderr


@pytest.mark.parametrize(
    ("settings", "loaded"),
    [({}, False), ({"JOBORCH_COMPAT": "2.2"}, True), ({"SERVICE_A_CLIENTS": "http://h:1", "SERVICE_A_PEER": "2.2"}, True)],
)
def test_what_a_server_may_need_of_22_is_imported_before_it_listens(settings: dict[str, str], loaded: bool) -> None:
    code = f"import sys, joborch; joborch.import_what_will_be_needed(joborch.load_config('server', {{}}, {settings!r})); "
    code += "print('joborch_plugins.compat22' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{loaded}\n", done.stderr


def test_run_as_a_script_there_is_one_module(tmp_path: Path) -> None:
    """`python joborch.py` is `__main__`; a plug-in that imports joborch gets this very module, not a second one."""
    done = subprocess.run(
        [sys.executable, str(SOURCE), "config", "client", "--port", "x"],
        env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("--port is 'x'")) == (2, 1), done.stderr
    done = subprocess.run(
        [sys.executable, str(SOURCE), "doctor", "server", "--db-path", str(tmp_path / "none" / "x.db")],
        env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, "an error of the plug-in is caught as one of the program"


# A batch system with PBS's commands, as far as docs/hpc.md uses them: jobs are processes, and their states are in files.
QSUB = r"""#!/bin/bash
exec 2>>"$0.log"
mkdir -p "$PBS_FOLDER"
while [ $# -gt 0 ]; do
    case $1 in
        -V) shift;;
        -N) name=$2; shift 2;;
        -l|-o|-e) shift 2;;
        --) shift; break;;
    esac
done
number=$(($(ls "$PBS_FOLDER" | wc -l) + 1)).pbs
mkdir "$PBS_FOLDER/$number"
echo "$name" >"$PBS_FOLDER/$number/name"
setsid "$@" >/dev/null 2>&1 9>&- &
echo $! >"$PBS_FOLDER/$number/pid"
echo "$number"
"""
QSTAT = r"""#!/bin/bash
printf '{"Jobs": {'
comma=
for job in "$PBS_FOLDER"/*/; do
    [ -f "$job/pid" ] || continue
    state=F
    grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$(cat "$job/pid")/status" 2>/dev/null && state=R  # a zombie is over
    printf '%s"%s": {"Job_Name": "%s", "job_state": "%s"}' "$comma" "$(basename "$job")" "$(cat "$job/name")" "$state"
    comma=', '
done
printf '}}'
"""
QDEL = r"""#!/bin/bash
kill -TERM -- -"$(cat "$PBS_FOLDER/$1/pid")"
for child in $(pgrep -s "$(cat "$PBS_FOLDER/$1/pid")"); do kill -TERM "$child"; done
"""


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a client whose site has PBS, and the executor of docs/hpc.md in a package of its own."""
    (code,) = re.findall(r"```python\n(.*?class PbsExecutor.*?)```", (ROOT / "docs" / "hpc.md").read_text(encoding="utf-8"), re.DOTALL)
    assert interface_faults(code) == []
    package, commands = tmp_path / "lib" / "mypackage", tmp_path / "bin"
    package.mkdir(parents=True)
    commands.mkdir()
    (package / "__init__.py").touch()
    (package / "pbs.py").write_text(code, encoding="utf-8")
    for name, text in (("qsub", QSUB), ("qstat", QSTAT), ("qdel", QDEL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        "JOBORCH_EXECUTOR": "mypackage.pbs:PbsExecutor",
        "PYTHONPATH": str(tmp_path / "lib"),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PBS_FOLDER": str(tmp_path / "pbs"),
        "JOBORCH_BATCH_INTERVAL": "0.2",
        "JOBORCH_VANISH_GRACE": "2",
    }


def test_an_executor_of_somebody_else(site: dict[str, str], make_pair: MakePair) -> None:
    """The tutorial's executor runs a job, stops one, and finds its jobs again after the client was killed."""
    pair = make_pair(client=site).start()
    server = pair.server
    assert run_to_end(server, "echo it ran as $JOBORCH_MARK >out.txt")["status"] == "Completed"
    running, stopped = submit(server, "sleep 3; echo whole >out.txt"), submit(server, "sleep 300")
    for number in (running, stopped):
        wait_status(server, number, "Running")
    pair.client.kill()
    pair.client.start()
    server.post(f"/terminate/{stopped}")
    wait_status(server, stopped, "Killed")
    ended = wait_status(server, running, "Completed")
    assert ended["attempt"] == 1, "its job was found again"


def test_a_handle_need_not_be_a_number(yard: Yard) -> None:
    """PBS says 4711.host: `pid` of the 2.2 answer is then 0, like that of every payload without a process here."""
    job = yard.submit()._replace(status=joborch.Status.RUNNING)
    for handle, pid in (("4711.host", 0), ("", 0), (None, 0), ("12 34 boot", 12), ("9" * 30, 0)):
        assert joborch.payload_json(yard.client, job._replace(handle=handle))["pid"] == pid


def test_an_executor_that_is_not_there(tmp_path: Path) -> None:
    for name, why in (("mypackage.pbs:PbsExecutor", "No module named 'mypackage'"), ("json:Missing", "has no attribute 'Missing'")):
        done = subprocess.run(
            [*from_source(), "client", "--executor", name, "--data-path", str(tmp_path), "--port", str(free_port())],
            env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and why in done.stderr and "package.module:Class" in done.stderr.splitlines()[-1]
    with pytest.raises(joborch.ConfigError, match=r"give one of local, slurm, dirac, or package.module:Class"):
        joborch.load_config("client", {"executor": "slrum"}, {})
