"""The paper's ablation, Tables 3 and 4, on Ray: the same command line again goes on where it stopped.

python sweeps/ablation.py --preset shapes --tables 3a 3b --seeds 3
ray job submit --working-dir . -- python sweeps/ablation.py --preset shapes --seeds 3
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house
    from sweeps.running.driver import main

    sys.exit(main("ablation", "Fill the paper's ablation tables.", tables=("3a", "3b", "4a", "4b")))
