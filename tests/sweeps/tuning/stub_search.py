"""A real search, on a real Ray, with a trainer that only counts: it can be held and killed.

    python stub_search.py CONTROL ARGUMENTS...

In the folder CONTROL, `hold` names a step: the preset's trial waits there for as long as the file lies there,
and adds the step to its `held.txt`. Every start of a trial adds a line to its `starts.txt`: the step it
starts from. The metric rises with the steps and is the better the nearer csc.weight is to 0.2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CONTROL = os.environ.setdefault("STUB_CONTROL", sys.argv[1])


def train(spec, *, report, should_stop):  # noqa: PLR0915 (Ray ships it alone: it must be one piece)
    """Count to the last step, a checkpoint a step; evaluate, and report it, where the real trainer would."""
    import json
    import math
    import os
    import time
    from pathlib import Path
    from types import SimpleNamespace

    from cosa.config import identity, warmup_identity
    from cosa.storage.checkpoint import hash_path
    from cosa.storage.files import digest
    from cosa.training.stop import StoppedError

    config, out, tracker = spec.config, spec.out, spec.tracking.tracker()
    control = Path(os.environ["STUB_CONTROL"])
    assert set(spec.data_tags) == {"cosa.data_fingerprint", "cosa.val_fingerprint"}, "the sweep saw its data"
    hold = control / "hold"
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = [int(path.stem.removeprefix("step_")) for path in checkpoints.glob("step_*.pt")]
    if not done and spec.fork_from is not None:
        assert spec.fork_from.is_file(), "a trial must not start before its warm-up is done"
        done = [config.train.warmup]
    step = max(done, default=0)
    with (out / "starts.txt").open("a") as file:
        file.write(f"{step}\n")
    tracker.start(config, out=out, tags={"cosa.data_fingerprint": "f00"}, resume_step=step)
    last = spec.stop_at or config.train.iterations
    metrics = {}
    try:
        while step < last:
            step += 1
            time.sleep(0.01)
            distance = abs(math.log(config.csc.weight / 0.2))
            value = (step / config.train.iterations) * (0.5 - 0.05 * distance) + 0.001 * config.train.seed
            evaluated = step % config.evaluation.every == 0 or step == last
            metrics = {"val/assignment/seg_miou": value} if evaluated else {}
            path = checkpoints / f"step_{step:08d}.pt"
            path.touch()
            hash_path(path).write_text(f"{digest(path)}  {path.name}\n")
            tracker.log_metrics(metrics, step)
            if evaluated:
                report(SimpleNamespace(step=step, metrics=metrics))
            if spec.fork_from and config.train.seed == 0 and hold.exists() and step == int(hold.read_text()):
                with (out / "held.txt").open("a") as file:
                    file.write(f"{step}\n")
                while hold.exists():
                    if should_stop():
                        raise StoppedError("told to stop")
                    time.sleep(0.1)
    except SystemExit:
        tracker.finish("KILLED")
        raise
    result = {
        "identity": identity(config),
        "warmup_identity": warmup_identity(config),
        "step": step,
        "metrics": metrics,
        "seconds": 1.0,
    }
    (out / "result.json").write_text(json.dumps(result))
    tracker.finish("FINISHED")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from sweeps.tuning.driver import main
    from tests.sweeps.running.stub_trainer import train_with

    train_with(train)
    sys.exit(main(sys.argv[2:]))
