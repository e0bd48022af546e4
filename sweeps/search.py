"""Free search with Optuna on Ray Tune, beyond the paper's grid: the same command line again goes on.

python sweeps/search.py --preset shapes --trials 30
python sweeps/search.py --preset voc --gpu-hours 200 --set data.root=DIR/VOCdevkit/VOC2012
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house
    from sweeps.tuning.driver import main

    sys.exit(main())
