#!/usr/bin/env python3
"""Count the contacts in many structures: one job each. Started again after a cut, it goes on with the jobs that it had.

    python3 example/map.py FOLDER

Run it where Python finds joborch: with `pip install joborch`, or PYTHONPATH=joborch.pyz.
"""

import sys
from pathlib import Path

from joborch import Jobs

here, structures = Path(__file__).parent, sorted(Path(sys.argv[1]).glob("*.pdb"))
for job in Jobs().map(here / "run.sh", structures, key="contacts"):
    said = job.read("summary.txt").decode().strip() if job.status == "Completed" else job.reason
    print(f"{job.input.name}: {said}", flush=True)
