"""A real S3 server in a process of its own, on a free port of this machine; what it holds ends with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest

SECRET = "a-secret-that-nobody-may-see"
BUCKET = "experiments"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class S3Server:
    """The server, which can be killed and started again, empty, at the same address."""

    def __init__(self) -> None:
        pytest.importorskip("moto", reason="needs the packages moto and s3fs")
        pytest.importorskip("s3fs", reason="needs the packages moto and s3fs")
        self.port = free_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run the server, with an empty bucket, and wait until it answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, "the S3 server ended"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.05)
        self.files().mkdir(BUCKET)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def files(self) -> Any:
        """What lies on the server, past the code under test."""
        keys = {"key": "somebody", "secret": SECRET, "endpoint_url": self.environment["AWS_ENDPOINT_URL"]}
        return fsspec.filesystem("s3", **keys, use_listings_cache=False)

    def names(self, run: str) -> list[str]:
        """Names of all that lies below a run's prefix."""
        root = f"{BUCKET}/{run}"
        return sorted(path.removeprefix(f"{root}/") for path in self.files().find(root))


@contextmanager
def serving() -> Iterator[S3Server]:
    """A server, with its address and keys in this process's environment."""
    server = S3Server()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
