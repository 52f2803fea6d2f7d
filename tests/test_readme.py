"""The documents are true: their commands run as they stand, tables are what the code prints, links lead somewhere.

`python tests/test_readme.py --write` writes the generated parts, between markers in docs/, again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import reference
from harness import ROOT, end_all_below, program_text
from newcomer import STARTS, Newcomer, Typed, all_blocks, section, shell_blocks

import joborch
from joborch_base.settings import CLOUD_SETTINGS, SERVICE_SETTINGS
from joborch_base.states import SERVER_MOVES
from joborch_plugins import commands

README = ROOT / "README.md"
README_LINES = 200
REFERENCE, USE, OPERATE = (ROOT / "docs" / name for name in ("reference.md", "use.md", "operate.md"))
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
GENERATED = {ROOT / "docs" / name: parts for name, parts in reference.PARTS.items()}
REMEDY = "run: .venv-test/bin/python tests/test_readme.py --write"

ASKS_FOR_CODES = re.compile(r"curl -I \S+ +# (?P<codes>.*)")
LEFT_OUT_OF_THE_COPY = shutil.ignore_patterns(".*", "__pycache__", "joborch.pyz", "bench.jsonl")


# == What the documents say ==


def quick_start(markdown: str) -> list[list[str]]:
    """Return the blocks that a newcomer types one after another: the first command, then the quick start."""
    return [shell_blocks(section(markdown, "Two commands"))[0], *shell_blocks(section(markdown, "Quick start"))]


def own_service(markdown: str) -> list[list[str]]:
    """Return the blocks that set up a service of one's own; the quick start's processes are stopped before."""
    return shell_blocks(section(markdown, "Your own service"))


def env_file(markdown: str) -> str:
    """Return the text of `server.env`, which the commands of a page read."""
    found = re.search(r"^```ini\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    assert found, "the page shows no server.env"
    return found[1]


def python_line(markdown: str) -> str:
    """The command that runs the README's lines of Python in the repository."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return f"PYTHONPATH=joborch.pyz python3 -c {shlex.quote(code)}"


def sessions() -> Iterator[tuple[str, list[list[str]]]]:
    """Each page with what a reader types there, up to stopping all that it started."""
    markdown = README.read_text()
    yield README.name, [*quick_start(markdown), ["cd ..", python_line(markdown)]]
    yield README.name, own_service(markdown)
    yield USE.name, [["python3 joborch.pyz server"], ["python3 joborch.pyz client"], ["cd example"], *shell_blocks(USE.read_text())]
    yield OPERATE.name, [["python3 joborch.pyz server --env-file server.env"], *shell_blocks(OPERATE.read_text())]


def refreshed(document: Path, markdown: str) -> str:
    """`markdown` with every generated part of `document` as the code prints it now."""
    for name, make in GENERATED[document].items():
        parts = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert len(parts.findall(markdown)) == 1, f"{document.name} needs one pair of markers <!-- {name} --> <!-- /{name} -->"
        text = f"\n{make()}\n\n"
        markdown = parts.sub(lambda found, text=text: found[1] + text + found[2], markdown)
    return markdown


def anchors(markdown: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(markdown: str) -> Iterator[str]:
    """The targets of all links and pictures of a document that stay in the repository."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", prose):
        link = target[0] or target[1]
        if not re.match(r"[a-z]+:", link):
            yield unquote(link)


# == The commands of the pages, typed by a process in a network of its own ==


def set_loopback_up() -> None:
    """Switch on the loopback device of this network namespace (netdevice(7): SIOCSIFFLAGS, IFF_UP)."""
    set_flags, up = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", up))


def private_network() -> list[str]:
    """The command before another that gives it a network of its own, where the default ports are free; else skip."""
    command = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if shutil.which("unshare") is None:
        pytest.skip("the commands of the documents use ports 5000 and 9000, in a network of their own: needs unshare (util-linux)")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        said = tried.stderr.strip()
        pytest.skip(f"the commands of the documents use ports 5000 and 9000, in a network of their own: needs root ({said})")
    return command


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, pyz: Path) -> Iterator[tuple[Path, dict[str, list[Typed]]]]:
    """A copy of the repository in which the commands of the pages were typed, and for each page what came of each line.

    `pyz` is asked for because its build fetches the packages: a network of one's own leads nowhere.
    """
    folder = tmp_path_factory.mktemp("newcomer") / "joborch"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT_OF_THE_COPY, symlinks=True)
    command = [*private_network(), sys.executable, str(Path(__file__).resolve()), "--type-commands", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        pages: dict[str, list[Typed]] = {}
        for page, *rest in map(json.loads, done.stdout.splitlines()):
            pages.setdefault(page, []).append(Typed(*rest))
        yield folder, pages
    finally:
        end_all_below(folder)


def only(typed: dict[str, list[Typed]], start: str) -> Typed:
    """The one line of the README that starts with `start`."""
    found = [each for each in typed[README.name] if each.line.startswith(start)]
    assert len(found) == 1, f"{len(found)} lines of the README begin with {start!r}"
    return found[0]


@pytest.mark.timeout(300)
def test_every_line_runs(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """Each exits with 0; a server or client runs until it is stopped, and then exits with 0, too."""
    assert [len(lines) > 10 for lines in terminal[1].values()] == [True] * 3
    failed = [
        f"{page}: {line}\n{''.join(outputs)}"
        for page, lines in terminal[1].items()
        for line, status, outputs in lines
        if status != (None if STARTS.match(line) else 0)
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.timeout(300)
def test_the_first_command_shows_the_contacts(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """The demo ends with the summary of the structure."""
    demo = only(terminal[1], "python3 build_zipapp.py && python3 joborch.pyz demo").outputs[0]
    assert "result: 2oob: 36 residue pairs of chains A and B" in demo


@pytest.mark.timeout(300)
def test_uploads_of_the_quick_start_are_jobs_2_and_3(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """The ids in the lines after them are right, and no field was unknown."""
    uploads = [each for each in terminal[1][README.name] if each.line.endswith("127.0.0.1:5000/upload")]
    jobs = [json.loads(re.search(r"\{.*\}", each.outputs[0])[0]) for each in uploads]  # type: ignore[index]
    assert [(job["id"], job["warnings"]) for job in jobs] == [(2, []), (3, [])]


@pytest.mark.timeout(300)
def test_codes_are_those_in_the_comments(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """Each `curl -I` shows only codes that its comment names, and the last of them at the end."""
    asked = [(each, found) for each in terminal[1][README.name] if (found := ASKS_FOR_CODES.match(each.line))]
    named = [re.findall(r"\b\d{3}\b", found["codes"]) for _, found in asked]
    shown = [[output.split()[1] for output in each.outputs] for each, _ in asked]
    assert named == [["202", "200"], ["204"], ["404"]]
    for expected, codes in zip(named, shown, strict=True):
        assert set(codes) <= set(expected) and codes[-1] == expected[-1], (expected, codes)


@pytest.mark.timeout(300)
def test_results_of_the_quick_start(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """The summary is in the result; the sleeping job gave what it had, and was ended."""
    folder, typed = terminal
    assert "36 residue pairs" in only(typed, "cat out/summary.txt").outputs[0]
    assert "36 residue pairs" in only(typed, "cat result/summary.txt").outputs[0]
    assert {"run.sh", "2oob.pdb", ".joborch/stdout"} <= set(zipfile.ZipFile(folder / "example/result.zip").namelist())
    assert "run.sh" in zipfile.ZipFile(folder / "example/partial.zip").namelist()
    assert '"status": "Killed"' in only(typed, "curl -X POST 127.0.0.1:5000/terminate/3").outputs[0]


@pytest.mark.timeout(300)
def test_a_service_of_ones_own(terminal: tuple[Path, dict[str, list[Typed]]]) -> None:
    """The settings of `server.env` are in force, and the server knows its client by name."""
    typed = terminal[1]
    assert re.search(r"SERVICE_DOCKING_CLIENTS +http://gpu1:9000", only(typed, "python3 joborch.pyz config server").outputs[0])
    services = only(typed, "curl 127.0.0.1:5000/services").outputs[0]
    assert '"docking"' in services and '"example"' not in services
    assert '"gpu1:9000"' in only(typed, "curl 127.0.0.1:5000/clients").outputs[0]


def test_no_block_of_shell_is_left_out() -> None:
    """Every one of every page is typed above, or is marked with the reason why not; no mark stands elsewhere."""
    typed = [block for _, blocks in sessions() for block in blocks]
    for document in DOCUMENTS:
        markdown = document.read_text()
        assert [block for block in shell_blocks(markdown) if block not in typed] == [], f"{document.name}: mark it <!-- not run: WHY -->"
        marks = re.findall(r"^<!-- not run", markdown, re.MULTILINE)
        assert len(marks) == len([block for block in all_blocks(markdown) if block.not_run]), document.name
        assert len(re.findall(r"^ *(?:```|~~~)(?:sh|bash|console|shell)\b", markdown, re.MULTILINE)) == len(all_blocks(markdown))


def test_the_readme_is_short() -> None:
    """What operators and developers need is in docs/."""
    assert len(README.read_text().splitlines()) <= README_LINES


def test_curl_as_in_the_reference() -> None:
    """The lines that users of job-orchestrator know, word for word; the id is the second one."""
    lines = [line.partition("   ")[0] for block in quick_start(README.read_text()) for line in block]
    known = [
        "curl -F file=@run.sh -F file=@2oob.pdb -F user_id=1 -F service=example 127.0.0.1:5000/upload",
        "curl -I 127.0.0.1:5000/download/2",
        "curl -o result.zip 127.0.0.1:5000/download/2",
    ]
    assert [line for line in lines if line in known] == known


def test_the_second_command_is_there() -> None:
    """`tests/run`: it cannot be run from within itself."""
    assert all_blocks(section(README.read_text(), "Two commands"))[1].lines == ["tests/run"]
    assert os.access(ROOT / "tests" / "run", os.X_OK)


# == Tables, names and links ==


@pytest.mark.parametrize("document", GENERATED, ids=lambda document: document.name)
def test_generated_parts_are_what_the_code_prints(document: Path) -> None:
    """All of docs/reference.md but its introductions, and the fields of an upload."""
    markdown = document.read_text()
    assert markdown == refreshed(document, markdown), REMEDY


def test_every_setting_and_command_is_named() -> None:
    """All are in the reference; commands for operators are in their table, too."""
    text, operate = REFERENCE.read_text(), section(OPERATE.read_text(), "Commands")
    settings = [setting.name for setting in joborch.SETTINGS]
    settings += [f"SERVICE_<NAME>_{setting.name}" for setting in SERVICE_SETTINGS]
    settings += [f"CLOUD_<NAME>_{setting.name}" for setting in CLOUD_SETTINGS]
    assert [name for name in settings if f"`{name}`" not in text] == []
    assert [name for name in commands.WORDS if f"### joborch {name}\n" not in text] == []
    for_operators = [name for name, word in commands.WORDS.items() if not word.here]
    assert [name for name in for_operators if not re.search(rf"`python3 joborch.pyz {name}( [^`]+)?`", operate)] == []


def test_every_name_in_capitals_exists() -> None:
    """What the documents call a setting or a variable is one of the program or of the compose file."""
    known = set(re.findall(r"\w+", program_text() + (ROOT / "docker-compose.yml").read_text()))
    for document in DOCUMENTS:
        names = set(re.findall(r"\bJOBORCH_[A-Z_]+[A-Z]", document.read_text()))
        assert sorted(names - known) == [], document.name


def test_every_state_and_cause_is_explained() -> None:
    """The states in the README, except a payload's own state, Prepared; the causes in docs/use.md."""
    states = section(README.read_text(), "States")
    assert [status for status in SERVER_MOVES if str(status[1]) not in states] == []
    trouble = section(USE.read_text(), "When a job fails")
    assert [cause for cause in joborch.Cause if f"| `{cause}` |" not in trouble] == []


def test_every_name_in_the_architecture_exists() -> None:
    """Files, functions and columns that the page and its picture of a job's way name are in the sources; placeholders are not."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("joborch_*/*.py")]
    known = {word for path in sources for word in re.findall(r"\w+", path.read_text())}
    known |= {path.stem for path in [*sources, *(ROOT / "tests").glob("*.py")]} | {
        "UUID",
        "ATTEMPT",
        "CLIENT",
        "NUMBER",
        "joborch_plugins",
        "jobs",
        "package",
        "pyz",
    }
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = re.findall(r"`([^`]+)`", page)
    names += re.findall(r'class="note code"[^>]*>([^<]+)<', (ROOT / "docs" / "job.svg").read_text())
    assert len(names) > 100
    assert [name for name in names if not set(re.findall(r"[A-Za-z_]\w+", name)) <= known] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Files and headings that the documents point to."""
    for link in links(document.read_text()):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} points to {link}, which is not there"
        assert not anchor or anchor in anchors(target.read_text()), f"{document.name}: {link} is no heading"


def test_what_sites_that_move_are_told_exists() -> None:
    """All routes and settings that docs/moving.md names exist here."""
    table = section((ROOT / "docs" / "moving.md").read_text(), "Each setting and route")
    ours = {
        f"{row.method} {re.sub(r'<(job_id|user_id)>', 'ID', row.path)}" for mode in ("server", "client") for row in joborch.routes_of(mode)
    }
    named = re.findall(r"`((?:GET|POST) /\S*)`", table)
    assert len(named) > 10 and [route for route in named if route not in ours] == []
    known = {setting.name for setting in joborch.SETTINGS} | {f"SERVICE_<NAME>_{setting.name}" for setting in SERVICE_SETTINGS}
    settings = re.findall(r"`((?:JOBORCH|SERVICE_<NAME>)_[A-Z_]+|PORT|DB_PATH|DATA_PATH|MAX_AGE)\b", table)
    assert len(settings) > 8 and [name for name in settings if name not in known] == []


# == The checks themselves ==


def test_a_part_that_was_changed_is_found() -> None:
    """A row less, or a marker less, does not go unseen."""
    markdown = REFERENCE.read_text()
    row = reference.routes_table("server").splitlines()[2] + "\n"
    assert refreshed(REFERENCE, markdown.replace(row, "")) == refreshed(REFERENCE, markdown) != markdown.replace(row, "")
    with pytest.raises(AssertionError, match="markers"):
        refreshed(REFERENCE, markdown.replace("<!-- settings -->", ""))


def test_links_are_found_where_they_stand() -> None:
    """Links and pictures, but neither other addresses nor code."""
    text = "[a](b.md#c-d) ![e](f%20g.svg) [h](https://example.org) `[i](j)`\n```sh\n[k](l)\n```\n# C, `D`!\n"
    assert list(links(text)) == ["b.md#c-d", "f g.svg"]
    assert anchors(text) == {"c-d"}


def main() -> None:
    """Write the generated parts again; or, in a network of its own, type the commands of the pages (for the tests above)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--write", action="store_true", help="write the generated parts of docs/ again")
    ways.add_argument("--type-commands", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        for document in GENERATED:
            document.write_text(refreshed(document, document.read_text()))
        return
    set_loopback_up()
    folder = arguments.type_commands
    (folder / "server.env").write_text(env_file(README.read_text()))
    for page, blocks in sessions():
        place = folder
        if page != README.name:
            place = folder / Path(page).stem
            shutil.copytree(ROOT / "example", place / "example")
            shutil.copy(folder / "joborch.pyz", place)
        if page == OPERATE.name:
            (place / "server.env").write_text(env_file(OPERATE.read_text()))
            shutil.copy(folder / "docking-token", place)
        for typed in Newcomer(place).type_all(blocks):
            print(json.dumps([page, *typed]), flush=True)


if __name__ == "__main__":
    main()
