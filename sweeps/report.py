"""The report of a sweep, made again from MLflow alone: the paper's tables, ours beside the published values.

python sweeps/report.py --sweep ablation-shapes
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house
    from sweeps.reporting.render import main

    sys.exit(main())
