"""A trainer of a test's own, in the processes that Ray starts for trials."""

from __future__ import annotations

from collections.abc import Callable


def train_with(train: Callable[..., object]) -> None:
    """Have trials call `train` in place of `cosa.training.trainer.train`; before Ray is imported.

    Ray ships what starts a trial with the functions that it names: each process replaces its own trainer.

    Args:
        train: Self-contained: it is shipped, too.
    """
    from sweeps.running import trial

    def run_trial(*given: object, **named: object) -> bool:
        from cosa.training import trainer
        from sweeps.running import trial  # of this process, where nothing else is replaced

        trainer.train = train  # type: ignore[assignment]
        return trial.run_trial(*given, **named)  # type: ignore[arg-type]

    trial.run_trial = run_trial
