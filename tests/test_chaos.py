"""A short run of everything that can go wrong; seeds that once failed are kept here."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import chaos

SEEDS = [1, 22]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_whatever_goes_wrong(seed: int, tmp_path: Path, root: None) -> None:
    report = "\n".join(chaos(tmp_path / "chaos", 0.6, seed))
    assert "jobs: 0" not in report
    assert "Completed" in report
    print(report)
