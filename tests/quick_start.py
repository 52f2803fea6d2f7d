"""Runs joborch from its byte code, which a start of joborch.py itself never uses: a quarter of a second for each process.

    quick_start.py [NAME=SECONDS ...] server|client|...

Constants of time may be given others, for tests that would else have to wait as long as a user may.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GIVEN = dict[str, float]()
while len(sys.argv) > 1 and (found := re.fullmatch(r"([A-Z_]+)=([0-9.]+)", sys.argv[1])):
    GIVEN[found[1]] = float(found[2])
    del sys.argv[1]


def give(modules: list[Any]) -> set[str]:
    """Set the constants that these modules have; return their names."""
    names = {(name, module) for name in GIVEN for module in modules if hasattr(module, name)}
    for name, module in names:
        assert isinstance(getattr(module, name), float), name
        setattr(module, name, GIVEN[name])
    return {name for name, _ in names}


if __name__ == "__main__":
    give([importlib.import_module("joborch_base.vocabulary")])  # before others use them as defaults of parameters
    import joborch

    if not all(any(hasattr(module, name) for module in list(sys.modules.values())) for name in GIVEN):
        importlib.import_module("joborch_plugins.joined")
    assert give([module for known, module in sys.modules.items() if known.startswith("joborch")]) == set(GIVEN)
    sys.exit(joborch.main())
