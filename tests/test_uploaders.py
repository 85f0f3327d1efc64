"""Commands that write: the same objects, exit status and length checked, nothing of one that failed or was killed."""

import hashlib
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sa1b_wds import cli
from sa1b_wds.errors import StorageError, Unreachable, UsageError
from sa1b_wds.objects import Bucket
from sa1b_wds.storage import Destination
from scripts import environments

from . import making, running, servers

UPLOADER = """
import sys, urllib.parse, urllib.request
host, url = sys.argv[1:3]
bucket, _, name = url.removeprefix("gs://").partition("/")
query = urllib.parse.urlencode({"uploadType": "media", "name": name})
data = sys.stdin.buffer.read()
request = urllib.request.Request(f"http://{host}/upload/storage/v1/b/{bucket}/o?{query}", data=data, method="POST")
urllib.request.urlopen(request, timeout=20).close()
"""
"""Google's JSON interface, in small: an object is there when all of standard input has been sent."""


@pytest.fixture
def uploader(gcs: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that writes its standard input to a URL of GCS."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs.address}")
    monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
    (tmp_path / "upload.py").write_text(UPLOADER)
    return shlex.join([sys.executable, "-S", "-E", str(tmp_path / "upload.py"), gcs.address])


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    return f"gs://{servers.BUCKET}/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"


def tree(url: str) -> dict[str, str]:
    bucket = Bucket(url)
    return {name: hashlib.sha256(bucket.read(name)).hexdigest() for name in bucket.names()}


def test_what_a_command_must_say() -> None:
    made = Destination("pipe:gsutil cp - gs://b/sa1b/{name}")
    assert isinstance(made, Bucket)
    assert made.where == "gs://b/sa1b"
    assert made.place("x") == "gs://b/sa1b/x"
    again = pickle.loads(pickle.dumps(made))
    assert (again.where, again.command) == (made.where, made.command)
    for wrong in ("pipe:cat > /x/{name}", "pipe:gsutil cp - gs://b/x", "pipe:cp gs://b/{name} gs://c/{name}"):
        with pytest.raises(UsageError, match="where it writes"):
            Destination(wrong)


@pytest.mark.slow
def test_killed_and_run_again(uploader: str, place: str, tmp_path: Path) -> None:
    """The process dies while a command runs: what is there is whole; run again, it ends with the same objects."""
    tars = {f"sa_{n:06d}.tar": making.tar(making.pairs(range(9 * n + 1, 9 * n + 9))) for n in range(2)}
    running.write(tmp_path / "in", tars)
    here, out = tmp_path / "here", f"pipe:{uploader} {place}/{{name}}"
    options = ["--mix", "1", "--workers", "1", "--out"]
    assert cli.main(["convert", str(tmp_path / "in"), *options, str(here)]) == 0
    expected = {name: value for name, value in running.tree(here).items() if value != "folder"}
    slow = f"pipe:sleep 0.3; {uploader} {place}/{{name}}"
    code = "from sa1b_wds.cli import run; run()"
    process = subprocess.Popen([sys.executable, "-c", code, "convert", str(tmp_path / "in"), *options, slow])
    until = time.monotonic() + 40
    while not any(name.endswith(".tar.idx") for name in Bucket(place).names()) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(1.5)  # the commands go on to the end of their files
    for name, value in tree(place).items():
        assert name.startswith(".state/") or expected[name] == value, name
    assert cli.main(["convert", str(tmp_path / "in"), *options, out]) == 0
    assert tree(place) == expected
    assert cli.main(["verify", place, "--against", str(tmp_path / "in")]) == 0


def test_a_command_that_fails(uploader: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "3")
    data = bytes(range(256)) * 8192
    # It fails midway, after having stored a part; or says nothing of it at all; or is killed.
    for tail, words in (
        ("; echo no quota >&2; exit 7", r"no quota.*exit status 7"),
        ("", "another length"),
        ("; kill -9 $$", "signal 9"),
    ):
        command = f"pipe:head -c 100000 | {uploader} {place}/{{name}}{tail}"
        with pytest.raises(Unreachable, match=f"gave up after 3 attempts.*{words}"):
            Bucket(command).put("a.tar", data)
        assert Bucket(place).names() == []
    # One that fails only once is run again, from the beginning of the file.
    flag = tmp_path / "flag"
    once = (
        f"pipe:if [ -e {flag} ]; then {uploader} {place}/{{name}}; else touch {flag}; head -c 9 >/dev/null; exit 1; fi"
    )
    Bucket(once).put("a.tar", data)
    assert Bucket(place).read("a.tar") == data


def test_an_attempt_shows_nothing_before_it_is_published(uploader: str, place: str) -> None:
    bucket = Bucket(f"pipe:{uploader} {place}/{{name}}")
    with bucket.attempt("task-000000") as attempt:
        writer = attempt.create("a.tar")
        for _ in range(3):
            writer.write([b"x" * 100_000, b"y"])
        writer.finish()
        assert not bucket.exists("a.tar")
        assert attempt.publish("receipt", b"done")
    assert bucket.names() == ["a.tar", "receipt"]
    assert bucket.read("a.tar") == (b"x" * 100_000 + b"y") * 3
    assert not bucket.put_new("receipt", b"other")
    assert bucket.read("receipt") == b"done"
    with pytest.raises(ZeroDivisionError), bucket.attempt("task-000001") as attempt:
        attempt.create("b.tar").write([b"x"])
        raise ZeroDivisionError
    assert bucket.names() == ["a.tar", "receipt"]


def test_the_aws_cli_writes(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(sys.executable).parent / "aws"
    if not program.exists():
        pytest.skip("##### NO AWS CLI: pip install awscli (part of the `test` extra) #####")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "1")
    url = f"s3://{servers.BUCKET}/uploader"
    data = bytes(range(256)) * 50_000  # in parts
    Bucket(f"pipe:{shlex.quote(str(program))} s3 cp --quiet - {url}/{{name}}").put("a.tar", data)
    assert Bucket(url).read("a.tar") == data
    with pytest.raises(StorageError, match="the command failed"):
        Bucket(f"pipe:{shlex.quote(str(program))} s3 cp --nonsense - {url}/{{name}}").put("a", data)


@pytest.mark.slow
def test_gsutil_writes_a_whole_data_set(
    gcs: servers.Server, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own command, with nothing but its endpoint exchanged."""
    inside = environments.python("gsutil")
    if inside is None:
        servers.missing("GSUTIL, hence no GCS", "READERS=gsutil scripts/test")
    boto = tmp_path / "boto"
    boto.write_text(
        f"[Credentials]\ngs_json_host = 127.0.0.1\ngs_json_port = {gcs.tls_port}\n"
        "[Boto]\nhttps_validate_certificates = False\nnum_retries = 1\n"
        f"[GSUtil]\nprefer_api = json\nsoftware_update_check_period = 0\nstate_dir = {tmp_path}/state\n"
    )
    for name, value in {
        "BOTO_CONFIG": str(boto), "HOME": str(tmp_path), "STORAGE_EMULATOR_HOST": f"http://{gcs.address}",
        "PATH": f"{inside.parent}{os.pathsep}{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    running.write(tmp_path / "in", {"sa_000000.tar": making.tar(making.pairs(range(1, 9)))})
    assert cli.main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "here")]) == 0
    # As in the README: --out 'pipe:gsutil cp - gs://bucket/sa1b/{name}'
    assert cli.main(["convert", str(tmp_path / "in"), "--out", f"pipe:gsutil cp - {place}/{{name}}"]) == 0
    assert tree(place) == {name: value for name, value in running.tree(tmp_path / "here").items() if value != "folder"}
