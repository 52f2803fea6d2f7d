"""Runs joborch from its byte code, which a start of joborch.py itself never uses: a quarter of a second for each process.

    quick_start.py [NAME=SECONDS ...] server|client|...

Constants of time may be given others, for tests that would else have to wait as long as a user may.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import joborch

if __name__ == "__main__":
    while len(sys.argv) > 1 and (given := re.fullmatch(r"([A-Z_]+)=([0-9.]+)", sys.argv[1])):
        modules = [each for known, each in sys.modules.items() if known.startswith("joborch") and hasattr(each, given[1])]
        assert modules, f"no module of the program has {given[1]}"
        for module in modules:
            assert isinstance(getattr(module, given[1]), float), given[1]
            setattr(module, given[1], float(given[2]))
        del sys.argv[1]
    sys.exit(joborch.main())
