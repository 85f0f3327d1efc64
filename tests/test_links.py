"""The links file as a source: what is taken of it, links that expire half-way, and commands as sources."""

import hashlib
from pathlib import Path

import pytest

from sa1b_wds import cli
from sa1b_wds.errors import FormatError, NotFound, Sa1bError, UsageError
from sa1b_wds.links import read_links
from sa1b_wds.objects import Bucket
from sa1b_wds.uploads import pending

from . import datasets, making, running, servers
from .fault_proxy import Fault, FaultProxy

SECRET = "oh=HUSHHUSH"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_tars_are_taken_and_the_rest_is_named(tmp_path: Path) -> None:
    url = "https://cdn.example/m1/v/t6/An8_sa.tar?oh=1&oe=2"
    rows = [f"sa_000021.tar\t{url}1", f"sa_000020.tar\t{url}0", f"sa_images_ids.txt\t{url}", f"sa_co_gold.tar\t{url}"]
    file = write(tmp_path / "links.txt", "\n".join(["file_name\tcdn_link", *rows, ""]))
    links = read_links(file)
    assert links.locations == {"sa_000021.tar": f"{url}1", "sa_000020.tar": f"{url}0"}
    assert links.left_out == ["sa_co_gold.tar", "sa_images_ids.txt"]
    assert "oh=" not in repr(links)
    assert list(read_links(file, ["sa_0000{20..20}.tar"]).locations) == ["sa_000020.tar"]
    with pytest.raises(NotFound, match=r"2 of 4 names of --only, the first of them sa_000019\.tar"):
        read_links(file, ["sa_0000{19..22}.tar"])
    without_header = write(tmp_path / "bare.txt", "\r\n".join(rows))
    assert read_links(without_header).locations == links.locations


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("file_name\tcdn_link\n", UsageError, "no link to a tar"),
        ("sa_000001.tar https://h/x\n", FormatError, "line 1: not a line of a links file"),
        ("sa_000001.tar\thttps://h/x\tmore\n", FormatError, "not a line"),
        (
            "sa_000001.tar\thttps://h/x\nsa_000001.tar\thttps://h/y\n",
            FormatError,
            "line 2: a second link for",
        ),
        ("sa_000001.tar\tfile:///etc/passwd\n", UsageError, "links may only be"),
        ("sa_000001.tar\tpipe:cat /etc/passwd\n", UsageError, "links may only be"),
        ("sa_000001.tar\t/etc/passwd\n", UsageError, "links may only be"),
    ],
)
def test_what_is_no_links_file(tmp_path: Path, text: str, error: type[Sa1bError], words: str) -> None:
    file = write(tmp_path / "links.txt", text)
    with pytest.raises(error, match=words):
        read_links(file)
    with pytest.raises(NotFound, match="cannot be read"):
        read_links(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not UTF-8"):
        read_links(tmp_path / "binary")


@pytest.fixture
def tars() -> dict[str, bytes]:
    return {f"sa_{n:06d}.tar": making.tar(making.pairs(range(10 * n + 1, 10 * n + 9))) for n in range(3)}


def links_file(path: Path, proxy: FaultProxy, names: list[str], token: str) -> Path:
    rows = [f"{name}\t{proxy.url}/cdn/{name}?token={token}&{SECRET}" for name in names]
    return write(path, "\n".join(["file_name\tcdn_link", *rows, f"sa_images_ids.txt\t{proxy.url}/x", ""]))


def test_links_that_expire_half_way(
    tars: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
    here = tmp_path / "here"
    running.write(here, tars)
    assert cli.main(["convert", str(here), "--out", str(tmp_path / "local"), "--mix", "1", "--workers", "1"]) == 0
    dest = tmp_path / "dest"
    with FaultProxy({f"/cdn/{name}": data for name, data in tars.items()}) as proxy:
        old = links_file(tmp_path / "old.txt", proxy, list(tars), "old")
        command = ["convert", "--out", str(dest), "--mix", "1", "--workers", "1", "--links"]
        # HEAD is refused throughout, and the old links expire after two tasks have been read.
        proxy.faults.append(Fault(status=403, times=999, when=lambda r: r.method == "HEAD"))
        expired = Fault(status=403, times=999, when=lambda r: "token=old" in r.path and r.is_read, skip=3 + 4)
        proxy.faults.append(expired)
        assert cli.main([*command, str(old)]) == 1
        said = capfd.readouterr()
        assert "fetch a new links file" in said.err
        assert "sa_images_ids.txt" in said.out
        assert "HUSH" not in said.err + said.out
        done = {p: p.stat().st_mtime_ns for p in dest.glob("*.tar")}
        assert len(done) == len(list((dest / "receipts").iterdir())) == 2
        assert cli.main([*command, str(old)]) == 1  # the sizes stand in the plan: it is the next task that says so
        assert "fetch a new links file" in capfd.readouterr().err
        new = links_file(tmp_path / "new.txt", proxy, list(tars), "new")
        assert cli.main([*command, str(new)]) == 0
        assert "2 of 3 tasks are done already" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert running.tree(dest) == running.tree(tmp_path / "local")
    for path in dest.rglob("*"):
        assert not path.is_file() or b"HUSH" not in path.read_bytes()


def test_one_task_takes_its_sources_from_the_links_file(tars: dict[str, bytes], tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    with FaultProxy({f"/cdn/{name}": data for name, data in tars.items()}) as proxy:
        links = str(links_file(tmp_path / "links.txt", proxy, list(tars), "t"))
        only = ["--links", links, "--only", "sa_00000{0..1}.tar"]
        assert cli.main(["plan", "--out", str(dest), "--mix", "1", *only]) == 0
        assert cli.main(["convert", "--out", str(dest), "--task", "1", *only]) == 0
        assert cli.main(["convert", "--out", str(dest), "--task", "0", "--links", links]) == 0
        assert cli.main(["finalize", str(dest)]) == 0
        assert len(datasets.open(dest)) == 16
        assert cli.main(["convert", "--out", str(dest), "--only", "sa_000000.tar", str(tmp_path)]) == 2


def test_commands_as_sources(tars: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here, dest = tmp_path / "here", str(tmp_path / "dest")
    running.write(here, tars)
    url = f"pipe:cat {here}/sa_00000{{0..2}}.tar"
    assert cli.main(["convert", url, "--out", dest, "--workers", "1"]) == 1
    assert "--assume-size" in capfd.readouterr().err
    size = str(max(map(len, tars.values())))
    assert cli.main(["convert", f"{url}; false", "--out", dest, "--assume-size", size, "--workers", "1"]) == 1
    assert "the command failed" in capfd.readouterr().err
    assert not list(Path(dest).glob("*.tar"))
    assert cli.main(["convert", url, "--out", dest, "--assume-size", size, "--workers", "1"]) == 0
    assert sorted(datasets.keys(datasets.open(dest))) == sorted(
        f"sa_{10 * n + i}" for n in range(3) for i in range(1, 9)
    )
    assert cli.main(["verify", dest, "--deep", "--against", url]) == 0


def test_from_links_that_expire_into_a_bucket(
    tars: dict[str, bytes], s3: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tar and no shard ever lies on the disk; the links expire half-way, and both networks break now and then."""
    place = f"s3://{servers.BUCKET}/from-links"
    here = tmp_path / "here"
    running.write(here, tars)
    assert cli.main(["convert", str(here), "--out", str(tmp_path / "local"), "--mix", "1", "--workers", "1"]) == 0
    with FaultProxy({f"/cdn/{name}": data for name, data in tars.items()}) as web, FaultProxy(s3.address) as store:
        for name, value in {**s3.environment(store.url), "SA1B_WDS_FIRST_WAIT": "0.01"}.items():
            monkeypatch.setenv(name, value)
        store.faults.append(Fault(status=503, every=9, times=999))
        web.faults += [
            Fault(status=403, times=999, when=lambda r: "token=old" in r.path and r.is_read, skip=2),
            Fault(cut=20_000, every=2, times=99, when=lambda r: r.is_read),
        ]
        command = ["convert", "--out", place, "--mix", "1", "--workers", "1", "--links"]
        assert cli.main([*command, str(links_file(tmp_path / "old.txt", web, list(tars), "old"))]) == 1
        done = [name for name in Bucket(place).names() if name.startswith("receipts/")]
        assert 0 < len(done) < 3
        assert cli.main([*command, str(links_file(tmp_path / "new.txt", web, list(tars), "new"))]) == 0
        store.faults.clear()
        assert pending(place) == []
        there = {name: hashlib.sha256(Bucket(place).read(name)).hexdigest() for name in Bucket(place).names()}
    assert there == {name: value for name, value in running.tree(tmp_path / "local").items() if value != "folder"}
