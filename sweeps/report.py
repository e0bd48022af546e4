"""The report of a sweep, made again from MLflow alone: the paper's tables, ours beside the published values.

python sweeps/report.py --sweep ablation-shapes
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house

from cosa.cli.common import INTERRUPTED, Parser
from cosa.cli.console import print_error, print_line
from cosa.storage.files import one_line, require_folder
from cosa.tracking import TrackingError, resolve_uri, ui_steps
from sweeps.runs import find_sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report of a sweep again; returns the exit code."""
    parser = Parser(prog="sweeps/report.py", description="Report a sweep from MLflow.")
    flag = parser.flag
    flag("--sweep", "NAME", "name of the sweep or its run's id (default: the newest)", default="")
    flag("--tracking-uri", "URI", "MLflow store (default: MLFLOW_TRACKING_URI or runs/mlflow.db)", default="")
    parser.experiment()
    flag("--out", "FOLDER", "folder to write to (default: runs/SWEEP)", default="")
    flag("--watch", "SECONDS", "make it again so often until the sweep has ended", type=float, default=0.0)
    flag("--classes", "CLASS", "show means over these instead of C-mIoU", nargs="+", default=())
    from sweeps.reporting import render  # pandas and all that comes with it
    from sweeps.reporting.results import read_results

    try:
        found = parser.parse_known(sys.argv[1:] if arguments is None else arguments)
        require_folder("--out", Path(found.out))
        uri = resolve_uri(
            found.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
        )
        run_id = find_sweep(uri, found.experiment, found.sweep)
        while True:
            results = read_results(uri, run_id, classes=found.classes)
            again = found.watch if results.standing else 0.0
            folder = Path(found.out or f"runs/{results.sweep}").absolute()
            files = render.write(results, folder, uri, again=again)
            if again <= 0:
                break
            print_line(f"{results.standing}; report: {files[0]}")
            time.sleep(found.watch)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, TrackingError) as error:
        print_error(f"report: {one_line(error, kind=False)}")
        return 2
    print_line(render.terminal(results))
    print_line(f"report: {files[0]}")
    print_line(f"MLflow: {ui_steps(uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
