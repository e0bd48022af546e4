"""An archive becomes a data set's folder once per machine, whole or not at all, and nothing outside of it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from cosa.config import DataConfig
from cosa.data import archive as staging
from cosa.data import open_dataset
from cosa.data.archive import NOTE, UnreachableArchiveError, stage
from tests.cosa.data.voc_folder import VocFolder


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A data set of three images."""
    VocFolder(tmp_path / "voc").fill({"a": [1], "b": [2], "c": [3]})
    return tmp_path / "voc"


def tar(folder: Path, target: Path, mode: str = "w", name: str = ".") -> Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, name)
    return target


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + str(path.relative_to(folder)))
    return target


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the note on where it came from."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != NOTE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def leftovers(root: Path) -> list[str]:
    """What staging keeps beside the folder."""
    return sorted(path.name for path in root.with_name(f".{root.name}.staging").iterdir())


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack",
    [
        lambda voc, to: tar(voc, to / "a.tar"),
        lambda voc, to: tar(voc, to / "a.tar.gz", "w:gz"),
        lambda voc, to: tar(voc, to / "a.tgz", "w:gz"),
        lambda voc, to: tar(voc, to / "a.tar", name="VOCdevkit/VOC2012"),
        lambda voc, to: zipped(voc, to / "a.zip"),
        lambda voc, to: zipped(voc, to / "a.zip", "VOC2012/"),
    ],
    ids=["tar", "tar.gz", "tgz", "tar in folders", "zip", "zip in a folder"],
)
def test_the_folder_is_the_one_that_was_packed(
    voc: Path, tmp_path: Path, pack: Callable[[Path, Path], Path]
) -> None:
    archive, root = pack(voc, tmp_path), tmp_path / "node" / "images"

    stage(str(archive), sha256(archive), root)

    assert contents(root) == contents(voc)
    assert leftovers(root) == ["lock"]


def test_opening_a_data_set_unpacks_it_first(voc: Path, tmp_path: Path) -> None:
    archive, root = tar(voc, tmp_path / "a.tar"), tmp_path / "node"
    there = open_dataset(DataConfig(root=str(voc)), "train")

    staged = open_dataset(DataConfig(root=str(root), archive=str(archive)), "train")

    assert staged.names == ("a", "b", "c")
    assert staged.fingerprint() == there.fingerprint()


def test_an_archive_is_read_from_any_storage_that_fsspec_knows(voc: Path, tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(tar(voc, tmp_path / "a.tar").read_bytes())

    stage("memory://bucket/a.tar", "", tmp_path / "node")

    assert contents(tmp_path / "node") == contents(voc)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:  # type: ignore[override]
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the test's folder."""
    handler = partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_an_archive_is_read_over_http_without_what_signs_its_address(
    voc: Path, tmp_path: Path, server: str
) -> None:
    tar(voc, tmp_path / "a.tar.gz", "w:gz")

    stage(f"{server}/a.tar.gz?signature=secret", "", tmp_path / "node")

    assert contents(tmp_path / "node") == contents(voc)
    assert "secret" not in (tmp_path / "node" / NOTE).read_text()


def test_a_page_that_is_not_there_is_a_missing_archive(tmp_path: Path, server: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.archive must name an archive, got 'http://.*/a.tar'"):
        stage(f"{server}/a.tar?signature=secret", "", tmp_path / "node")


# --- once, and again ----------------------------------------------------------------------------------------


def test_what_is_unpacked_is_not_unpacked_again(voc: Path, tmp_path: Path) -> None:
    archive, root = tar(voc, tmp_path / "a.tar"), tmp_path / "node"
    stage(str(archive), "", root)
    digest = sha256(archive)
    archive.unlink()

    stage(str(archive), "", root)
    stage("s3://elsewhere/the-same.tar", digest.upper(), root)

    assert contents(root) == contents(voc)


def test_a_folder_that_somebody_put_there_is_used_as_it_is(voc: Path, tmp_path: Path) -> None:
    before = contents(voc)

    stage(str(tmp_path / "none.tar"), "", voc)

    assert contents(voc) == before


def test_an_empty_folder_is_filled(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()

    stage(str(tar(voc, tmp_path / "a.tar")), "", tmp_path / "node")

    assert contents(tmp_path / "node") == contents(voc)


@pytest.mark.parametrize("digest", ["", "f" * 64])
def test_a_folder_from_another_archive_is_refused(voc: Path, tmp_path: Path, digest: str) -> None:
    root = tmp_path / "node"
    stage(str(tar(voc, tmp_path / "a.tar")), "", root)
    before = contents(root)

    with pytest.raises(
        ValueError, match=r"data\.root must hold .*b\.tar.*unpacked from .*a\.tar.*set --data"
    ):
        stage(str(tmp_path / "b.tar"), digest, root)

    assert contents(root) == before


def _stage_slowly(archive: str, root: Path, log: Path) -> None:
    """Unpack at a pace that lets others come, and note that it was done."""
    untar = staging._untar

    def slow(copy: Path, target: Path) -> None:
        with log.open("a") as file:
            file.write("unpacked\n")
        time.sleep(0.5)
        untar(copy, target)

    staging._untar = slow
    stage(archive, "", root)


def test_of_many_workers_one_unpacks_and_all_find_it(voc: Path, tmp_path: Path) -> None:
    archive, root, log = tar(voc, tmp_path / "a.tar"), tmp_path / "node", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_stage_slowly, args=(str(archive), root, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "unpacked\n"
    assert contents(root) == contents(voc)


def _stage_half(archive: str, root: Path) -> None:
    """Unpack some members, then wait to be killed."""

    def first(copy: Path, target: Path) -> None:
        with tarfile.open(copy) as opened:
            if hasattr(tarfile, "data_filter"):
                opened.extraction_filter = tarfile.data_filter
            opened.extractall(target, opened.getmembers()[:7])
        time.sleep(60)

    staging._untar = first
    stage(archive, "", root)


def test_a_worker_killed_half_way_leaves_no_data_set_and_the_next_one_makes_it(
    voc: Path, tmp_path: Path
) -> None:
    archive, root = tar(voc, tmp_path / "a.tar"), tmp_path / "node"
    worker = multiprocessing.get_context("fork").Process(target=_stage_half, args=(str(archive), root))
    worker.start()
    draft = tmp_path / ".node.staging" / "parts" / "unpacked"
    while worker.is_alive() and not any(draft.rglob("*.png")):
        time.sleep(0.01)
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert not root.exists()
    assert leftovers(root) == ["lock", "parts"]

    stage(str(archive), "", root)

    assert contents(root) == contents(voc)
    assert leftovers(root) == ["lock"]


def test_unpacking_is_told_once(voc: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = tar(voc, tmp_path / "a.tar")

    with caplog.at_level(logging.INFO, "cosa"):
        for _ in range(2):
            stage(str(archive), "", tmp_path / "node")

    assert [record.getMessage() for record in caplog.records] == [
        f"unpacking {archive}, once on this node, into {tmp_path / 'node'}"
    ]


# --- what is refused ----------------------------------------------------------------------------------------


def assert_nothing_is_left(root: Path) -> None:
    assert not root.exists()
    assert leftovers(root) == ["lock"]


@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_wrong_hash_is_told_with_the_right_one(
    voc: Path, tmp_path: Path, pack: Callable[..., Path]
) -> None:
    archive = pack(voc, tmp_path / ("a.zip" if pack is zipped else "a.tar"))

    with pytest.raises(ValueError, match=f"must have the sha256 {'0' * 64}, got {sha256(archive)} of "):
        stage(str(archive), "0" * 64, tmp_path / "node")

    assert_nothing_is_left(tmp_path / "node")


@pytest.mark.parametrize("name", ["none.tar", "folder.tar"])
def test_a_missing_archive_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.tar").mkdir()

    with pytest.raises(FileNotFoundError, match=rf"data\.archive must name an archive, got '.*{name}'"):
        stage(str(tmp_path / name), "", tmp_path / "node")

    assert_nothing_is_left(tmp_path / "node")


@pytest.mark.parametrize(
    ("archive", "line"),
    [
        ("images.rar", r"must end in one of \.tar, .*\.zip, got 'images\.rar'"),
        ("nowhere://bucket/a.tar", r"must be one that this machine can open, got 'nowhere://bucket/a\.tar'"),
    ],
)
def test_what_cannot_be_an_archive_is_refused_by_name(archive: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=line):
        stage(archive, "", tmp_path / "node")

    assert_nothing_is_left(tmp_path / "node")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_torn_archive_is_refused(voc: Path, tmp_path: Path, name: str, part: float) -> None:
    whole = zipped(voc, tmp_path / name) if name == "a.zip" else tar(voc, tmp_path / name, f"w:{name[6:]}")
    content = whole.read_bytes()
    end = len(content) if name != "a.tar" else len(content.rstrip(b"\0"))  # a tar is padded with zeros
    whole.write_bytes(content[: int(part * end)])

    with pytest.raises(ValueError, match=r"data\.archive must be a whole archive, got .*copy it again"):
        stage(str(whole), "", tmp_path / "node")

    assert_nothing_is_left(tmp_path / "node")


def test_a_tar_torn_between_two_members_is_refused(voc: Path, tmp_path: Path) -> None:
    archive = tar(voc, tmp_path / "a.tar")
    with tarfile.open(archive) as opened:
        ends = [member.offset for member in opened.getmembers()[1:]]
    content = archive.read_bytes()

    for end in ends:
        archive.write_bytes(content[:end])
        with pytest.raises(ValueError, match="must be a whole archive"):
            stage(str(archive), "", tmp_path / "node")


def member(name: str, **fields: object) -> Callable[[Path], Path]:
    """Writes a tar of one image and one member of that kind."""

    def write(folder: Path) -> Path:
        with tarfile.open(folder / "a.tar", "w") as archive:
            for info in (tarfile.TarInfo("image.png"), tarfile.TarInfo(name)):
                info.size = 3 if not fields or info.name != name else 0
                for key, value in fields.items() if info.name == name else ():
                    setattr(info, key, value)
                archive.addfile(info, io.BytesIO(b"abc"))
        return folder / "a.tar"

    return write


def zip_member(name: str, mode: int = 0o100644) -> Callable[[Path], Path]:
    """Writes a zip of one image and one member of that mode."""

    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("image.png", b"abc")
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"../outside")
        return folder / "a.zip"

    return write


@pytest.mark.parametrize(
    "write",
    [
        member("../outside"),
        member("images/../../outside"),
        member("/outside"),
        member("link", type=tarfile.SYMTYPE, linkname="../outside"),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("link", type=tarfile.LNKTYPE, linkname="../outside"),
        member("pipe", type=tarfile.FIFOTYPE),
        member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        zip_member("../outside"),
        zip_member("/outside"),
        zip_member("link", 0o120777),
    ],
)
def test_a_member_outside_of_the_folder_is_refused_by_name(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    archive = write(tmp_path)

    with pytest.raises(
        ValueError, match=r"members of data\.archive must .*, got '.*(outside|link|pipe|device)'"
    ):
        stage(str(archive), "", tmp_path / "deep" / "er" / "node")

    assert_nothing_is_left(tmp_path / "deep" / "er" / "node")
    assert not list(tmp_path.rglob("outside*"))


def test_an_archive_decides_neither_over_rights_nor_owner(tmp_path: Path) -> None:
    archive = member("images/a.png", mode=0o6777, uid=12345, gid=12345)(tmp_path)

    stage(str(archive), "", tmp_path / "node")

    found = (tmp_path / "node" / "images" / "a.png").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o644, os.getuid(), os.getgid())


def test_an_archive_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(ValueError, match=r"data\.archive must hold a data set, got an empty one"):
        stage(str(tar(tmp_path / "empty", tmp_path / "a.tar")), "", tmp_path / "node")


@pytest.mark.parametrize(("owner", "name"), [(tarfile, "copyfileobj"), (LocalFileSystem, "get_file")])
def test_a_disk_that_is_full_for_the_archive_or_the_data_is_told_in_one_line(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "image.png")

    archive = tar(voc, tmp_path / "a.tar")
    monkeypatch.setattr(owner, name, full)

    with pytest.raises(OSError, match=r"data\.root must have room .*'No space left on device' while") as told:
        stage(str(archive), "", tmp_path / "node")

    assert "\n" not in str(told.value)
    assert_nothing_is_left(tmp_path / "node")


def test_a_folder_that_cannot_be_written_is_named(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        OSError, match=r"data\.root must be a folder that can be written, got .*set --data.root"
    ):
        stage(str(tar(voc, tmp_path / "a.tar")), "", tmp_path / "file" / "node")


def test_storage_that_fails_on_the_way_may_be_tried_again(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(_: object, there: str, here: str) -> None:
        Path(here).write_bytes(Path(there).read_bytes()[:1000])
        raise TimeoutError("the server said nothing")

    archive = tar(voc, tmp_path / "a.tar")
    monkeypatch.setattr(LocalFileSystem, "get_file", break_off)

    with pytest.raises(UnreachableArchiveError, match=r"to its end, got .* \(the server said nothing\); try"):
        stage(str(archive), "", tmp_path / "node")

    assert_nothing_is_left(tmp_path / "node")


def test_the_note_says_where_the_folder_came_from(voc: Path, tmp_path: Path) -> None:
    archive = tar(voc, tmp_path / "a.tar")

    stage(str(archive), "", tmp_path / "node")

    told = json.loads((tmp_path / "node" / NOTE).read_text())
    assert told == {"archive": str(archive), "sha256": sha256(archive)}
