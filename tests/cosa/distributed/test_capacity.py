"""A cluster's capacity: what is there, or what whoever started it says it may grow to."""

from __future__ import annotations

import pytest
import ray

from cosa.distributed.capacity import VARIABLE, capacity


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of four CPUs and one GPU."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", {"CPU": 4.0, "GPU": 1.0}),
        ("CPU=64,GPU=8", {"CPU": 64.0, "GPU": 8.0}),
        ("GPU=8", {"CPU": 4.0, "GPU": 8.0}),
        ("CPU=2", {"CPU": 4.0, "GPU": 1.0}),  # it has more already
    ],
)
def test_the_larger_of_what_is_there_and_what_may_come(
    there: None, monkeypatch: pytest.MonkeyPatch, said: str, expected: dict[str, float]
) -> None:
    monkeypatch.setenv(VARIABLE, said)

    assert capacity() == expected


@pytest.mark.parametrize("said", ["64", "CPU=many", "CPU=1=2"])
def test_what_is_no_list_of_resources_is_refused(
    there: None, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv(VARIABLE, said)

    with pytest.raises(ValueError, match="COSA_GROWS_TO must read like CPU=64,GPU=8, got"):
        capacity()
