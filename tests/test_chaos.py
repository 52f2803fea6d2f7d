"""Short runs of everything that can go wrong, with either way of the link; seeds that once failed are kept here."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import chaos

RUNS = [(1, "direct", 0.6), (22, "direct", 0.6), (5, "joined", 0.3)]  # seed, way, minutes


@pytest.mark.parametrize(("seed", "way", "minutes"), RUNS)
def test_nothing_is_lost_whatever_goes_wrong(seed: int, way: str, minutes: float, tmp_path: Path, root: None) -> None:
    report = "\n".join(chaos(tmp_path / "chaos", minutes, seed, joined=way == "joined"))
    assert "jobs: 0" not in report
    assert "Completed" in report
    print(report)
