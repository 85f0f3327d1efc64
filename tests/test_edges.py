"""tars → shards → tars over every edge of the form, real documents and real photographs: the bytes of every member."""

import gzip
from pathlib import Path

import pytest

from sa1b_wds import cli
from sa1b_wds.synth import synthesise

from . import edges, making, running


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edges") / "sources"
    synthesise(folder, tars=1, samples=8, short_side=300)
    members = [*edges.members(tfds=False), *edges.photographs()]
    running.write(
        folder,
        {
            "sa_000900.tar": making.gzipped(making.tar(members[: len(members) // 4 * 2], dialect="pax"), members=3),
            "sa_000901.tar": making.tar(members[len(members) // 4 * 2 :][::-1]),
        },
    )
    return folder


def test_every_member_comes_back(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest, tars, again = (str(tmp_path / name) for name in ("dest", "tars", "again"))
    convert = ["--shard-size", "1MiB", "--mix", "2", "--workers", "1"]
    assert cli.main(["convert", str(sources), "--out", dest, *convert]) == 0
    assert cli.main(["restore", dest, "--out", tars]) == 0
    assert cli.main(["verify", dest, "--deep", "--against", str(sources)]) == 0
    assert "no difference" in capsys.readouterr().out
    for path in sorted(sources.iterdir()):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        expected = {name.removeprefix("./"): member for name, member in making.read_tar(data) if member}
        found = making.read_tar((Path(tars) / path.name).read_bytes())
        assert {name.removeprefix("./"): member for name, member in found} == expected
        assert len(found) == len(expected) > 0
        # Pairs stand together.
        names = [name.rpartition("/")[2].partition(".")[0] for name, _ in found]
        assert names[::2] == names[1::2] and len(set(names)) == len(names) // 2
    # And round again: the restored tars are as good a source as the first.
    assert cli.main(["convert", tars, "--out", again, *convert]) == 0
    assert cli.main(["restore", again, "--out", str(tmp_path / "third")]) == 0
    for path in Path(tars).iterdir():
        assert (tmp_path / "third" / path.name).read_bytes() == path.read_bytes()
