"""A run kept at a URL: what goes up, what comes down, what an absent server costs. On a real S3 server."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cosa import cli
from cosa.cli import common
from cosa.config import Config, flatten, override
from cosa.config.presets import get_preset
from cosa.storage import checkpoint, mirror
from cosa.storage.mirror import Storage, open_storage
from cosa.structures import Ranks
from cosa.training.trainer import Result, TrainProgress
from tests.cosa.runs import differences, read_journal, saved_state, train
from tests.s3 import BUCKET, SECRET, S3Server, serving

STEPS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working folders lie below the folder that one stands in; nobody waits for a server in a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "_PAUSES", (0.0,))


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A place of each test's own."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}/run"


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    changes = {"train.iterations": STEPS, "train.warmup": 2, "evaluation.every": STEPS}
    return override(tiny_config, changes)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing disturbed."""
    return train(config, out=tmp_path_factory.mktemp("whole"))


class StopError(Exception):
    """Ends a run, as the loss of its machine would, but for what a handler of exceptions does."""


def stop_after(step: int) -> Callable[[TrainProgress], None]:
    def report(progress: TrainProgress) -> None:
        if progress.step == step:
            raise StopError

    return report


def prefix(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


def lose_machine(url: str) -> None:
    shutil.rmtree(open_storage(url).folder)


def work(url: str, *steps: int, keep: int = 9, sent: bool = True) -> Storage:
    """Leave what a run leaves at each step, and send it, as training would."""
    place = open_storage(url)
    place.pull()
    for step in steps:
        checkpoint.save(place.folder / "checkpoints", {"step": step}, keep=keep)
        with (place.folder / "journal.jsonl").open("a") as journal:
            journal.write(f"{step}\n")
        if sent:
            place.push(keep=keep)
    return place


def found(url: str) -> tuple[int, list[str]]:
    """The newest step and the journal that a start finds in the working folder."""
    place = open_storage(url)
    place.pull()
    saved = checkpoint.newest(place.folder / "checkpoints", pytest.fail)
    return saved["step"] if saved else 0, (place.folder / "journal.jsonl").read_text().split()


def assert_is(result: Result, whole: Result) -> None:
    """A run ended as the undisturbed one did, bit for bit, and tells of every step once."""
    assert differences(saved_state(result.out, STEPS), saved_state(whole.out, STEPS)) == []
    assert read_journal(result.out) == read_journal(whole.out)


# What goes up


def test_all_that_a_run_leaves_goes_up_and_nothing_else(config: Config, url: str, server: S3Server) -> None:
    result = train(config, out=url)

    (result.out / "ray").mkdir()
    (result.out / "ray" / "notes").touch()
    left = [p.relative_to(result.out).as_posix() for p in result.out.rglob("*") if p.is_file()]
    mirrored = sorted(name for name in left if name not in {"ray/notes", ".storage.lock"})
    assert server.names(prefix(url)) == mirrored
    assert {"result.json", "journal.jsonl", "model/model.safetensors"} <= set(mirrored)
    for name in mirrored:
        there = server.files().cat_file(f"{BUCKET}/{prefix(url)}/{name}")
        assert there == (result.out / name).read_bytes()
        assert SECRET.encode() not in there


def test_a_checkpoint_goes_up_before_its_hash_and_the_result_last(
    config: Config, url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_storage(url)
    sent, really = [], place._files.put_file
    note = lambda here, there: (sent.append(there), really(here, there))  # noqa: E731
    monkeypatch.setattr(place._files, "put_file", note)

    train(config, out=url)

    last = [name for name in sent if "step_00000005.pt" in name]
    assert last == ["checkpoints/step_00000005.pt", "checkpoints/step_00000005.pt.sha256"]
    assert sent.index("checkpoints/step_00000001.pt.sha256") < sent.index("journal.jsonl")
    assert sent[-1] == "result.json"
    assert len([name for name in sent if name.endswith(".pt")]) == STEPS


def test_old_checkpoints_go_there_too(url: str, server: S3Server) -> None:
    work(url, 1, 2, 3, keep=2)

    assert [name for name in server.names(prefix(url)) if name.startswith("checkpoints")] == [
        "checkpoints/step_00000002.pt",
        "checkpoints/step_00000002.pt.sha256",
        "checkpoints/step_00000003.pt",
        "checkpoints/step_00000003.pt.sha256",
    ]


def test_a_checkpoint_that_came_in_half_never_goes_up(url: str, server: S3Server) -> None:
    place = work(url, 1, 2)
    checkpoints = place.folder / "checkpoints"
    (checkpoints / "step_00000002.pt.sha256").unlink()
    (checkpoints / "step_00000002.pt").write_bytes(b"half")

    place.push(keep=2)

    there = server.files().cat_file(f"{BUCKET}/{prefix(url)}/checkpoints/step_00000002.pt")
    assert there != b"half"


def test_a_finished_run_is_sent_once(config: Config, url: str, server: S3Server) -> None:
    train(config, out=url)
    before = server.files().info(f"{BUCKET}/{prefix(url)}/checkpoints/step_00000005.pt")["LastModified"]
    lose_machine(url)

    train(config, out=url)

    after = server.files().info(f"{BUCKET}/{prefix(url)}/checkpoints/step_00000005.pt")["LastModified"]
    assert before == after


def test_of_an_earlier_process_only_the_checkpoint_that_has_changed_is_sent_again(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(url, 1, 2)
    place = open_storage(url)
    place.pull()
    checkpoint.save(place.folder / "checkpoints", {"step": 2, "again": True}, keep=9)
    sent: list[str] = []
    monkeypatch.setattr(place._files, "put_file", lambda _, there: sent.append(there))

    place.push(keep=9)

    assert [name for name in sent if name.endswith(".pt")] == ["checkpoints/step_00000002.pt"]


def test_a_run_that_goes_on_is_not_finished_there_either(url: str, server: S3Server) -> None:
    place = work(url, 1)
    (place.folder / "result.json").touch()
    place.push(keep=1)
    assert "result.json" in server.names(prefix(url))

    (place.folder / "result.json").unlink()
    place.push(keep=1)

    assert "result.json" not in server.names(prefix(url))


# What comes down


def test_a_run_whose_machine_is_gone_goes_on_bit_for_bit(
    config: Config, whole: Result, url: str, server: S3Server
) -> None:
    with pytest.raises(StopError):
        train(config, out=url, report=stop_after(3))
    lose_machine(url)

    steps: list[int] = []
    result = train(config, out=url, report=lambda progress: steps.append(progress.step))

    assert steps == [4, 5]
    assert_is(result, whole)


@pytest.mark.parametrize("harm", ["cut", "no hash"])
def test_a_torn_one_in_the_bucket_is_skipped_for_the_one_before_with_a_word(
    url: str, server: S3Server, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    work(url, 1, 2)
    lose_machine(url)
    torn, files = f"{BUCKET}/{prefix(url)}/checkpoints/step_00000002.pt", server.files()
    if harm == "cut":
        files.pipe_file(torn, files.cat_file(torn)[:-10])
    else:
        files.rm_file(f"{torn}.sha256")

    with caplog.at_level(logging.WARNING, "cosa"):
        step, _ = found(url)

    assert step == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped a checkpoint: {url}/checkpoints/step_00000002.pt is torn, not what its hash says"
    ]


def test_a_torn_one_in_the_bucket_is_not_counted_among_the_kept(url: str, server: S3Server) -> None:
    work(url, 1, 2, keep=2)
    lose_machine(url)
    server.files().pipe_file(f"{BUCKET}/{prefix(url)}/checkpoints/step_00000002.pt", b"torn")

    work(url, 3, keep=2)

    kept = server.names(prefix(url))
    assert "checkpoints/step_00000001.pt" in kept
    assert "checkpoints/step_00000003.pt" in kept


def test_a_stale_folder_gets_everything_of_the_newer_run(url: str, server: S3Server) -> None:
    """A machine that comes back after the run went on elsewhere."""
    folder = work(url, 1, 2).folder
    folder.rename(folder.with_name("stale"))
    work(url, 3, 4)
    lose_machine(url)
    folder.with_name("stale").rename(folder)

    assert found(url) == (4, ["1", "2", "3", "4"])


def test_what_never_went_up_is_not_lost(url: str, server: S3Server) -> None:
    """The newer checkpoint is the one on this machine, and so is the longer journal."""
    work(url, 1, 2)
    work(url, 3, sent=False)

    assert found(url) == (3, ["1", "2", "3"])


def test_a_pull_that_was_cut_short_is_done_again(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = work(url, 1).folder
    folder.rename(folder.with_name("stale"))
    work(url, 2)
    lose_machine(url)
    folder.with_name("stale").rename(folder)

    really = mirror.write_atomically

    def killed(path: Path, content: bytes) -> None:
        if path.name == "journal.jsonl":
            raise KeyboardInterrupt
        really(path, content)

    with monkeypatch.context() as cut:
        cut.setattr(mirror, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            open_storage(url).pull()

    assert found(url) == (2, ["1", "2"])


def test_a_name_that_leads_out_of_the_folder_is_not_brought(
    url: str, server: S3Server, tmp_path: Path
) -> None:
    system = server.files()
    for name in ("../escaped", "sub/../../escaped", ".bashrc"):
        system.pipe_file(f"{BUCKET}/{prefix(url)}/{name}", b"planted")

    place = open_storage(url)
    place.pull()

    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".storage.lock"]


class OtherRank(Ranks):
    """The first of two ranks; the second one's newest checkpoint is of the step `other`."""

    other = 0

    def gather(self, item: Any) -> list[Any]:
        return [item, self.other]


@pytest.mark.parametrize(("other", "agreed"), [(4, 4), (2, 2), (0, None)])
def test_ranks_go_on_from_a_checkpoint_that_all_of_them_have(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch, other: int, agreed: int | None
) -> None:
    work(url, 1, 2)
    place = work(url, 3, 4, keep=2, sent=False)
    here = place.folder / "checkpoints"
    monkeypatch.setattr(OtherRank, "other", other)

    ranks = OtherRank(0, 2, torch.device("cpu"))
    saved = place.agree(checkpoint.newest(here, pytest.fail), ranks)

    assert (saved["step"] if saved else None) == agreed
    assert [checkpoint.step_of(path) for path in checkpoint.existing(here)][-1:] == (
        [agreed] if agreed else []
    )


# A server that is away


def test_a_server_that_goes_away_costs_one_warning_and_gets_everything_later(
    config: Config, whole: Result, url: str, server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes back empty, as if it had lost all: what had been sent before goes up again."""

    def disturb(progress: TrainProgress) -> None:
        if progress.step == 1:
            server.kill()
        if progress.step == 4:
            server.start()

    with caplog.at_level(logging.WARNING, "cosa"):
        result = train(config, out=url, report=disturb)

    assert_is(result, whole)
    away, back = [record.getMessage() for record in caplog.records]
    assert away.startswith(
        f"storage: {url} takes nothing, training goes on and the next checkpoint tries again: "
    )
    assert back == f"storage: {url} answers again and has everything"
    assert "result.json" in server.names(prefix(url))
    lose_machine(url)
    assert train(config, out=url).metrics == result.metrics


@pytest.fixture
def flags(config: Config) -> list[str]:
    preset = flatten(get_preset("shapes"))
    changes = {name: value for name, value in flatten(config).items() if value != preset[name]}
    settings = [f"--{name}={common.as_text(value)}" for name, value in changes.items()]
    return ["shapes", *settings, "--tracking-uri=none"]


def test_what_did_not_go_up_by_the_end_is_told_and_sent_by_the_same_command(
    flags: list[str],
    url: str,
    server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole_save = checkpoint.save

    def save(folder: Path, state: Any, *, keep: int) -> Path:
        if state["step"] == 2:
            server.kill()
        return whole_save(folder, state, keep=keep)

    monkeypatch.setattr(checkpoint, "save", save)
    assert cli.train([*flags, "--out", url]) == cli.FAILED
    out, err = capsys.readouterr()

    last = err.splitlines()[-1]
    folder = open_storage(url).folder
    assert last.startswith("cosa-train: error: storage must take the finished run, got ")
    assert last.endswith(f"files did not go up and lie whole in '{folder}': the same command sends them")
    assert SECRET not in out + err
    assert json.loads((folder / "result.json").read_text())["step"] == STEPS

    server.start()
    assert cli.train([*flags, "--out", url]) == 0
    assert "result.json" in server.names(prefix(url))
    assert url in capsys.readouterr().out


def test_a_server_that_is_away_from_the_start_is_told_in_one_line(
    flags: list[str], server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows whether there is a run to go on with: a second one must not begin."""
    server.kill()

    code = cli.train([*flags, "--out", f"s3://{BUCKET}/none/run"])
    server.start()

    assert code == cli.FAILED

    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("cosa-train: error: storage must answer before training starts, got nothing from")


def test_a_bucket_that_is_not_there_is_told_in_one_line(
    flags: list[str], server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train([*flags, "--out", "s3://no-such-bucket/run"]) == cli.MISTAKE

    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "cosa-train: error: out must lie on storage that exists and is open to you, "
        "got 's3://no-such-bucket/run' (FileNotFoundError: "
    )


# What may stand for a run's folder


@pytest.mark.parametrize("out", ["runs/x", "/runs/x", Path("runs/x")])
def test_a_path_is_a_folder_that_training_writes_itself(out: Path | str) -> None:
    assert open_storage(out) == Storage(Path(out).absolute())


def test_a_file_url_is_one_too() -> None:
    assert open_storage("file:///mnt/nfs/run") == Storage(Path("/mnt/nfs/run"))


def test_a_url_has_a_working_folder_below_runs(tmp_path: Path) -> None:
    place = open_storage("s3://bucket/some/run/")

    assert place == Storage(tmp_path / "runs/s3/bucket/some/run", "s3://bucket/some/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "refusal"),
    [
        (
            "s3://bucket",
            "out must name a folder in a bucket, as s3://bucket/runs/name does, got 's3://bucket'",
        ),
        ("s3://bucket/../other", "out must name a folder in a bucket"),
        ("s3://bucket//run", "out must name a folder in a bucket"),
        (
            "s3://key:hidden@bucket/run",
            r"out must be a URL without keys or options, got 's3://\*\*\*@bucket/run'",
        ),
        ("s3://bucket/run?secret=hidden", r"out must be a URL without keys or options, got .*secret=\*\*\*"),
        (Path("s3://bucket/run"), "out must be text where it is a URL, got a Path, 's3:/bucket/run'"),
    ],
)
def test_what_names_no_folder_or_carries_a_key_is_refused(out: Path | str, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal) as refused:
        open_storage(out)

    assert "hidden" not in str(refused.value)


def test_a_kind_of_storage_that_nobody_knows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a URL that this machine can open, got 'tape://robot/run' \(ValueError"
    ):
        open_storage("tape://robot/run").pull()
