"""A real sweep, on a real Ray, of a trainer that only counts: it can be held, killed and made to fail.

    python stub_sweep.py CONTROL ARGUMENTS...

In the folder CONTROL, `hold` names a step: there one arm waits for as long as the file lies there, and adds
the step to its `held.txt`. `break` has two others fail: one raises, the other one's process is killed. Every
start of a trial adds a line to its `starts.txt`: the step it starts from.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CONTROL = os.environ.setdefault("STUB_CONTROL", sys.argv[1])


def train(spec, *, report, should_stop):
    """Count to the last step, a checkpoint a step; go on from the newest one as the real trainer does."""
    import json
    import os
    import signal
    import time
    from pathlib import Path

    from cosa.config import identity, warmup_identity
    from cosa.storage.checkpoint import hash_path
    from cosa.storage.files import digest
    from cosa.training.stop import StoppedError

    config, out, tracker = spec.config, spec.out, spec.tracking.tracker()
    control = Path(os.environ["STUB_CONTROL"])
    assert set(spec.data_tags) == {"cosa.data_fingerprint", "cosa.val_fingerprint"}, "the sweep saw its data"
    hold = control / "hold"
    arms = spec.tracking.tags.get("cosa.arm", "")
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = [int(path.stem.removeprefix("step_")) for path in checkpoints.glob("step_*.pt")]
    if not done and spec.fork_from is not None:
        assert spec.fork_from.is_file(), "an arm must not start before its warm-up is done"
        done = [config.train.warmup]
    step = max(done, default=0)
    with (out / "starts.txt").open("a") as file:
        file.write(f"{step}\n")
    tracker.start(config, out=out, tags={"cosa.data_fingerprint": "f00"}, resume_step=step)
    last = spec.stop_at or config.train.iterations
    while step < last:
        step += 1
        time.sleep(0.02)
        path = checkpoints / f"step_{step:08d}.pt"
        path.touch()
        hash_path(path).write_text(f"{digest(path)}  {path.name}\n")
        tracker.log_metrics({}, step)
        if arms == "no-CSC" and hold.exists() and step == int(hold.read_text()):
            with (out / "held.txt").open("a") as file:
                file.write(f"{step}\n")
            while hold.exists():
                if should_stop():
                    raise StoppedError("told to stop")
                time.sleep(0.1)
        if arms == "no-RAW" and (control / "break").exists():
            tracker.finish("FAILED")
            raise RuntimeError("this arm is broken\nas the test wants it")
        if arms == "no-GC" and (control / "break").exists():
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
    metrics = {"val/assignment/seg_miou": (config.train.seed + len(arms)) / 100}
    tracker.log_metrics(metrics, last)
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's own parent may ignore it
    from sweeps.running.driver import main
    from tests.sweeps.running.stub_trainer import train_with

    train_with(train)
    sys.exit(main("stub", "A sweep of nothing.", tables=("3b",), arguments=sys.argv[2:]))
