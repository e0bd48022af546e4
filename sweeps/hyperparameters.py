"""The paper's hyper-parameter study, Table 5 and Fig. 9, on Ray: the same command line again goes on.

python sweeps/hyperparameters.py --preset shapes --dry-run
python sweeps/hyperparameters.py --preset shapes --tables 5c fig9 --seeds 3
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house
    from sweeps.running.driver import main

    sys.exit(
        main(
            "hyperparameters",
            "Fill the paper's hyper-parameter tables.",
            tables=("5a", "5b", "5c", "5d", "fig9"),
        )
    )
