"""Runs joborch with a wall clock that somebody sets: other_clock.py FILE server|client...

FILE holds the seconds by which the clock is ahead, and is read at every look at the clock.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
OFF, real_time = Path(sys.argv.pop(1)), time.time
time.time = lambda: real_time() + float(OFF.read_text() or 0)

import joborch  # noqa: E402

if __name__ == "__main__":
    sys.exit(joborch.main())
