"""Whole-state checkpoints: written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cosa.storage import checkpoint
from cosa.storage.files import digest, write_atomically
from tests.cosa.runs import differences, saved_state

STATE: dict[str, Any] = {
    "step": 3,
    "config": "{}",
    "online": {"weight": torch.arange(6.0).view(2, 3), "queue": torch.arange(4)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    "metrics": {"val/seg_miou": float("nan"), "val/cls_map": 0.25},
    "run_id": None,
}


def at(step: int) -> dict[str, Any]:
    return {**STATE, "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_hashes(*checkpoints: str) -> list[str]:
    return sorted(f"{name}{suffix}" for name in checkpoints for suffix in (".pt", ".pt.sha256"))


def sign(path: Path) -> None:
    """Make `path` a whole file, whatever it holds."""
    checkpoint.hash_path(path).write_text(f"{digest(path)}  {path.name}\n")


def tear(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def said() -> list[str]:
    return []


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """The system refuses to let a file grow beyond a few thousand bytes, as a full disk would.

    No fixture: pytest itself writes to a log file between a fixture's parts.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, STATE, keep=1)

    found = checkpoint.load(path)

    assert found.pop("format") == checkpoint.FORMAT
    assert torch.equal(found["online"]["weight"], STATE["online"]["weight"])
    assert torch.equal(found["online"]["queue"], STATE["online"]["queue"])
    assert found["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]
    assert repr(found["metrics"]) == repr(STATE["metrics"])
    assert (found["step"], found["run_id"]) == (3, None)


def test_a_checkpoint_is_called_by_its_step(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, at(1234), keep=1)

    assert path == checkpoint.checkpoint_path(tmp_path, 1234)
    assert path.name == "step_00001234.pt"
    assert checkpoint.step_of(path) == 1234


def test_a_file_called_otherwise_has_no_step() -> None:
    with pytest.raises(ValueError, match=r"checkpoint must be called step_<8 digits>.pt, got 'last.pt'"):
        checkpoint.step_of(Path("last.pt"))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, at(step), keep=2)

    assert names(tmp_path) == with_hashes("step_00000015", "step_00000020")


def test_a_torn_one_is_not_counted_among_the_kept(tmp_path: Path) -> None:
    """With settings that were changed, a resumed run may never write the torn one's step again."""
    for step in (5, 10):
        checkpoint.save(tmp_path, at(step), keep=2)
    tear(checkpoint.checkpoint_path(tmp_path, 10))

    checkpoint.save(tmp_path, at(12), keep=2)

    assert "step_00000005.pt" in names(tmp_path)
    checkpoint.save(tmp_path, at(14), keep=2)
    assert names(tmp_path) == with_hashes("step_00000012", "step_00000014")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_can_check_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, STATE, keep=1)
    check = ["sha256sum", "--strict", "-c", checkpoint.hash_path(path).name]

    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    tear(path)
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_hash_is_there_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, really = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda old, new: (order.append(new.name), really(old, new))[1])

    checkpoint.save(tmp_path, STATE, keep=1)

    assert order == ["step_00000003.pt.sha256", "step_00000003.pt"]


def test_a_new_name_is_on_the_disk_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, really_sync, really_replace = [], os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        really_sync(descriptor)

    def replace(old: Path, new: Path) -> Path:
        calls.append(f"rename to {new.name}")
        return really_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "file", lambda draft: draft.touch())

    assert calls == [f"sync .file.{os.getpid()}.part", "rename to file", f"sync {tmp_path.name}"]


def test_what_is_no_checkpoint_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "step_notes.pt").touch()
    (tmp_path / "readme.txt").touch()

    for step in (1, 2):
        checkpoint.save(tmp_path, at(step), keep=1)

    assert names(tmp_path) == ["readme.txt", *with_hashes("step_00000002"), "step_notes.pt"]


def test_the_newest_is_found(tmp_path: Path, said: list[str]) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, at(step), keep=3)

    found = checkpoint.newest(tmp_path, said.append)

    assert found is not None
    assert found["step"] == 100
    assert said == []


def test_there_is_no_newest_where_there_is_no_folder(tmp_path: Path, said: list[str]) -> None:
    assert checkpoint.newest(tmp_path / "none", said.append) is None


@pytest.mark.parametrize("length", [0, 1, 100, 500, 1000, -1])
def test_a_torn_newest_is_skipped_for_the_one_before_with_a_word(
    tmp_path: Path, said: list[str], length: int
) -> None:
    checkpoint.save(tmp_path, at(1), keep=2)
    torn = checkpoint.save(tmp_path, at(2), keep=2)
    torn.write_bytes(torn.read_bytes()[:length])

    found = checkpoint.newest(tmp_path, said.append)

    assert found is not None
    assert found["step"] == 1
    (line,) = said
    assert line.startswith("skipped a checkpoint: checkpoint must be whole, got ")
    assert str(torn) in line
    assert "\n" not in line


def test_one_changed_byte_is_enough_to_be_torn(tmp_path: Path, said: list[str]) -> None:
    checkpoint.save(tmp_path, at(1), keep=2)
    path = checkpoint.save(tmp_path, at(2), keep=2)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(6.0).numpy().tobytes())] ^= 1  # a weight: torch alone would load it
    path.write_bytes(content)

    found = checkpoint.newest(tmp_path, said.append)

    assert found is not None
    assert found["step"] == 1
    assert [str(path) in line for line in said] == [True]


def test_one_without_its_hash_is_skipped_with_a_word_on_what_to_bring(
    tmp_path: Path, said: list[str]
) -> None:
    checkpoint.save(tmp_path, at(1), keep=2)
    path = checkpoint.save(tmp_path, at(2), keep=2)
    checkpoint.hash_path(path).unlink()

    found = checkpoint.newest(tmp_path, said.append)

    assert found is not None
    assert found["step"] == 1
    (line,) = said
    assert line.startswith("skipped a checkpoint: checkpoint must be whole, got ")
    assert line.endswith("without its hash step_00000002.pt.sha256; bring that too, or take another")


def test_a_hash_that_is_no_text_is_no_hash(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, STATE, keep=1)
    checkpoint.hash_path(path).write_bytes(b"\xff" * 64)

    with pytest.raises(ValueError, match="checkpoint must be whole"):
        checkpoint.load(path)


def test_a_torn_later_one_never_takes_the_place_of_the_one_just_written(
    tmp_path: Path, said: list[str]
) -> None:
    tear(checkpoint.save(tmp_path, at(100), keep=1))

    checkpoint.save(tmp_path, at(5), keep=1)

    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found["step"] == 5


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 0, **STATE}, path)
    sign(path)

    with pytest.raises(ValueError, match=rf"checkpoint must be one of cosa's in format {checkpoint.FORMAT}"):
        checkpoint.load(path)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint must exist, got '.*step_00000001.pt'"):
        checkpoint.load(tmp_path / "step_00000001.pt")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, said: list[str]) -> None:
    checkpoint.save(tmp_path, at(1), keep=1)
    path, mark = tmp_path / "step_00000002.pt", tmp_path / "executed"
    torch.save({"format": checkpoint.FORMAT, "step": Payload(mark)}, path)
    sign(path)  # whoever plants code can write a hash, too

    with pytest.raises(
        ValueError, match="checkpoint must hold nothing but tensors and plain data"
    ) as refusal:
        checkpoint.load(path)
    found = checkpoint.newest(tmp_path, said.append)

    assert "\n" not in str(refusal.value)
    assert found is not None
    assert found["step"] == 1
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert mark.exists()


def full_disk(*, as_torch_says_it: bool) -> Any:
    """A `torch.save` that writes a part and then finds the disk full."""

    def save(state: object, file: Any) -> None:
        file.write(b"PK half a checkpoint")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not as_torch_says_it:
            raise full
        try:
            raise full
        except OSError:
            raise RuntimeError("[enforce fail at ...] . unexpected pos 704 vs 598")  # noqa: B904 (as torch does)

    return save


@pytest.mark.parametrize("as_torch_says_it", [False, True])
def test_a_full_disk_is_told_in_one_line_and_leaves_the_old_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_torch_says_it: bool
) -> None:
    old = checkpoint.save(tmp_path, at(1), keep=1)
    before = checkpoint.load(old)
    monkeypatch.setattr(torch, "save", full_disk(as_torch_says_it=as_torch_says_it))

    with pytest.raises(OSError, match="No space left on device; free some space there, then run") as full:
        checkpoint.save(tmp_path, at(2), keep=1)

    assert full.value.errno == errno.ENOSPC
    assert "step_00000002.pt" in str(full.value)
    assert "\n" not in str(full.value)
    assert names(tmp_path) == with_hashes("step_00000001")
    assert repr(checkpoint.load(old)) == repr(before)


def test_the_reason_torch_hides_is_told(tmp_path: Path) -> None:
    large = {**STATE, "online": {"weight": torch.zeros(100_000)}}

    refusal = pytest.raises(OSError, match=r"cannot write .*step_00000003.pt': File too large")
    with refusal as refused, small_files_only():
        checkpoint.save(tmp_path, large, keep=1)

    assert refused.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_a_mistake_in_what_is_written_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    def out_of_memory(draft: Path) -> None:
        draft.touch()
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        write_atomically(tmp_path / "file", out_of_memory)

    assert names(tmp_path) == []


def test_no_draft_is_left_by_a_write_that_is_interrupted(tmp_path: Path) -> None:
    def interrupted(draft: Path) -> None:
        draft.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)

    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_drafts_of_a_process_that_was_killed_go_with_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step_00000001.pt.4711.part").write_bytes(b"half")

    checkpoint.save(tmp_path, at(2), keep=1)

    assert names(tmp_path) == with_hashes("step_00000002")


def test_a_path_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match=r"cannot write '.*file/inner': File exists; check the path"):
        write_atomically(tmp_path / "file/inner", lambda draft: draft.touch())


def test_folders_are_made_on_the_way(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a/b/file", lambda draft: draft.write_text("x"))

    assert (tmp_path / "a/b/file").read_text() == "x"


def test_two_states_are_compared_bit_for_bit(tmp_path: Path) -> None:
    """The comparison that other tests rely on sees a last bit, a dtype and a missing entry."""
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save(tmp_path / "checkpoints", STATE, keep=1)
    state = saved_state(tmp_path, 3)
    weight = state["/online/weight"]

    assert differences(state, state) == []
    assert differences(state, {**state, "/online/weight": weight + weight * 1e-7}) == ["/online/weight"]
    assert differences(state, {**state, "/online/weight": weight.double()}) == ["/online/weight"]
    assert differences(state, {k: v for k, v in state.items() if k != "/step"}) == ["/step"]
