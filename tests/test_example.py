"""The example's script against a computation of its own kind: every pair of atoms, without a short cut."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "example"
LIMIT_ANGSTROM = 5.5
AWKS = [awk for awk in (["mawk"], ["gawk"], ["original-awk"], ["busybox", "awk"]) if shutil.which(awk[0])]
SUMMARY = "2oob: 36 residue pairs of chains A and B lie within 5.5 Angstrom; closest are A ASP 933 and B ALA 46 at 2.76 Angstrom\n"

Residue = tuple[str, str, str]  # chain, name, number with insertion code


def atom(chain: str, number: str, x: float, name: str = "CA", place: str = " ", residue: str = "ALA") -> str:
    """One ATOM record at (x, 0, 0); `number` bears the insertion code, `place` is the alternate location."""
    digits, code = (number[:-1], number[-1]) if number[-1].isalpha() else (number, " ")
    return f"ATOM      1  {name:<3}{place}{residue} {chain}{digits:>4}{code}   {x:8.3f}   0.000   0.000  1.00  0.00\n"


def run(folder: Path, awk: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder`, with this awk as the only one of that name."""
    environment = {"PATH": "/usr/bin:/bin", "LANG": "de_DE.UTF-8"}
    if awk:
        path = shutil.which(awk[0])
        wrapper = folder / "bin" / "awk"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {path} {" ".join(awk[1:])} "$@"\n')
        wrapper.chmod(0o755)
        environment["PATH"] = f"{wrapper.parent}:{environment['PATH']}"
    command = ["bash", EXAMPLE / "run.sh"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def table(folder: Path) -> list[list[str]]:
    """The rows of contacts.tsv, without the header."""
    return [line.split("\t") for line in (folder / "contacts.tsv").read_text().splitlines()[1:]]


def pairs_within(pdb: str) -> dict[tuple[Residue, Residue], float]:
    """The least distance of each pair of residues of chains A and B that lie within the limit."""
    atoms: dict[str, list[tuple[Residue, tuple[float, ...]]]] = {"A": [], "B": []}
    for line in pdb.splitlines():
        if line.startswith("ATOM  ") and line[21] in atoms:
            place = tuple(float(line[start : start + 8]) for start in (30, 38, 46))
            atoms[line[21]].append(((line[21], line[17:20].strip(), line[22:27].strip()), place))
    found: dict[tuple[Residue, Residue], float] = {}
    for (a, at), (b, to) in itertools.product(atoms["A"], atoms["B"]):
        distance = math.dist(at, to)
        if distance <= LIMIT_ANGSTROM:
            found[a, b] = min(distance, found.get((a, b), math.inf))
    return found


@pytest.mark.parametrize("awk", AWKS, ids="-".join)
def test_the_36_known_pairs(awk: list[str], tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "2oob.pdb", tmp_path)
    done = run(tmp_path, awk)
    assert (done.returncode, done.stdout, done.stderr) == (0, SUMMARY, "")
    assert (tmp_path / "summary.txt").read_text() == SUMMARY
    expected = pairs_within((EXAMPLE / "2oob.pdb").read_text())
    assert len(expected) == 36
    rows = table(tmp_path)
    assert {row[0] for row in rows} == {"2oob"}
    assert {(tuple(row[1:4]), tuple(row[4:7])): row[7] for row in rows} == {pair: f"{distance:.2f}" for pair, distance in expected.items()}
    assert len(rows) == 36


@pytest.mark.parametrize("awk", AWKS, ids="-".join)
def test_alternate_locations_insertion_codes_models_and_other_chains(awk: list[str], tmp_path: Path) -> None:
    lines = [
        atom("A", "1", 0.0, place="A"),
        atom("A", "1", 90.0, place="B"),
        atom("A", "52A", 50.0, residue="GLY"),
        atom("B", "7", 5.5),
        atom("B", "8", 94.0),
        atom("B", "9", 55.501),
        atom("B", "52", 53.0),
        atom("C", "1", 0.1),
        atom("B", "10", 1.0).replace("ATOM  ", "HETATM"),
        "ENDMDL\n",
        atom("B", "11", 1.0),
    ]
    (tmp_path / "made up=1.pdb").write_text("".join(lines))
    done = run(tmp_path, awk)
    assert (done.returncode, done.stderr) == (0, "")
    assert table(tmp_path) == [
        ["made up=1", "A", "ALA", "1", "B", "ALA", "7", "5.50"],
        ["made up=1", "A", "GLY", "52A", "B", "ALA", "52", "3.00"],
    ]


def test_every_structure_of_the_folder_is_taken(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "2oob.pdb", tmp_path)
    (tmp_path / "apart.pdb").write_text(atom("A", "1", 0.0) + atom("B", "1", 100.0))
    done = run(tmp_path)
    assert done.stdout == SUMMARY + "apart: 0 residue pairs of chains A and B lie within 5.5 Angstrom\n"
    assert len(table(tmp_path)) == 36


def test_a_folder_without_structures_fails_clearly(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no *.pdb file" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("awk", AWKS, ids="-".join)
def test_a_structure_without_chain_b_fails_clearly(awk: list[str], tmp_path: Path) -> None:
    (tmp_path / "single.pdb").write_text(atom("A", "1", 0.0))
    done = run(tmp_path, awk)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run.sh: single.pdb has no ATOM records of chain B\n"
