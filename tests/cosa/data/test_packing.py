"""`cosa-data pack` and `cosa-data speed`: an archive that any machine unpacks, and how fast images come."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from pathlib import Path

import pytest

from cosa import cli
from cosa.config import DataConfig
from cosa.data import open_dataset
from cosa.data.archive import pack
from tests.cosa.data.voc_folder import VocFolder


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A data set of three images, with a link and something hidden."""
    folder = VocFolder(tmp_path / "voc").fill({"a": [1], "b": [2], "c": [3]})
    (folder.root / "SegmentationClassAug").rename(tmp_path / "masks")
    (folder.root / "SegmentationClassAug").symlink_to(tmp_path / "masks")
    (folder.root / ".hidden").mkdir()
    (folder.root / ".hidden" / "file").touch()
    return folder.root


def test_a_packed_data_set_is_staged_as_it_was(voc: Path, tmp_path: Path) -> None:
    pack(voc, tmp_path / "voc.tar")

    data = DataConfig(root=str(tmp_path / "node"), archive=str(tmp_path / "voc.tar"))
    staged = open_dataset(data, "train")

    assert staged.fingerprint() == open_dataset(DataConfig(root=str(voc)), "train").fingerprint()
    assert not (tmp_path / "node" / "SegmentationClassAug").is_symlink()


def test_hidden_files_stay_behind(voc: Path, tmp_path: Path) -> None:
    files = pack(voc, tmp_path / "voc.tar")

    with tarfile.open(tmp_path / "voc.tar") as archive:
        assert files == len(archive.getnames()) == 7
        assert not [name for name in archive.getnames() if "hidden" in name]


def test_the_same_files_make_the_same_bytes(voc: Path, tmp_path: Path) -> None:
    pack(voc, tmp_path / "first.tar")
    for path in sorted(voc.rglob("*.png")):
        os.utime(path, (1, 1))
        path.chmod(0o600)

    pack(voc, tmp_path / "second.tar")

    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("voc.tar.gz", r"--out must end in \.tar, got"),
        ("voc/voc.tar", "--out must lie outside of the data set"),
    ],
)
def test_an_archive_that_cannot_be_written_there_is_refused(
    voc: Path, tmp_path: Path, name: str, line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        pack(voc, tmp_path / name)


def test_nothing_is_left_of_an_archive_that_was_not_finished(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)

    with pytest.raises(OSError, match="no space"):
        pack(voc, tmp_path / "voc.tar")

    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*"))


def test_the_command_prints_the_flags_that_use_the_archive(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.data(["pack", str(voc), "--out", str(tmp_path / "voc.tar")]) == 0

    told = capsys.readouterr().out
    digest = hashlib.sha256((tmp_path / "voc.tar").read_bytes()).hexdigest()
    assert "7 files, 3 images of the splits" in told
    assert f"--data.archive {tmp_path}/voc.tar --data.archive_sha256 {digest} --data.root " in told


def test_the_speed_of_disk_and_loader_is_told_with_what_training_needs(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", "16", "--data.loader_workers", "0", "--data.crop_size", "32"]

    assert cli.data(["speed", str(voc), *arguments]) == 0

    told = capsys.readouterr().out
    size = (voc / "JPEGImages" / "a.png").stat().st_size
    assert re.search(r"the disk alone +[\d.]+ MB/s +\d+ images/s +\(3 files\)", told)
    assert re.search(r"the loader +[\d.]+ MB/s +\d+ images/s +\(0 processes, crops of 32\)", told)
    assert f"{1000 * size / 1e6:.2f} MB/s     1000 images/s" in told
