"""The links file (`segment_anything_links.txt`): names of tars and where they can be fetched, for a time.

A line is `name<TAB>URL`, the first one a header; the order means nothing. Besides the tars it lists other things, which
are left out and named. The links are signed and expire, so a plan knows the names alone: with a fresh file the same
conversion goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand

from .errors import FormatError, NotFound, UsageError
from .remote import is_remote

_TAR = re.compile(r"sa_\d{6}\.tar", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What a links file offers."""

    locations: dict[str, str] = field(repr=False)
    """Name of a tar → its URL, a secret."""
    left_out: list[str]
    """Names in it that are no `sa_NNNNNN.tar`, sorted."""


def read_links(path: Path, only: Sequence[str] = ()) -> Links:
    """Read a links file.

    Args:
        path: the file.
        only: names, braces allowed (`sa_0000{00..99}.tar`): these tars and no others.

    Raises:
        NotFound: there is no such file, or it has no link to a tar of `only`.
        FormatError: a line that is none, or two links for one tar.
        UsageError: no tars in it; or a link that would open a file or start a command here.
    """
    where = str(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise NotFound(where, f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise FormatError(where, f"not a links file: not UTF-8 at byte {error.start:,}") from None
    locations: dict[str, str] = {}
    left_out: set[str] = set()
    for number, line in enumerate(lines, 1):
        name, _, url = (part.strip() for part in line.partition("\t"))
        if not line.strip() or (number == 1 and name == "file_name"):
            continue
        place = f"{where}: line {number}"
        if not name or not url or "\t" in url:
            raise FormatError(place, "not a line of a links file", "name, tab, URL", f"{len(line.split())} words")
        if not _TAR.fullmatch(name):
            left_out.add(name)
            continue
        if not is_remote(url):  # whoever wrote the file must not reach into this machine
            raise UsageError(f"{place}: {name}", "links may only be http(s)://, s3://, gs:// or az://")
        if locations.setdefault(name, url) != url:
            raise FormatError(place, f"a second link for {name}")
    if not locations:
        raise UsageError(where, "no link to a tar (sa_NNNNNN.tar) in it")
    if only:
        wanted = list(dict.fromkeys(name for one in only for name in braceexpand.braceexpand(one)))
        if missing := [name for name in wanted if name not in locations]:
            words = f"{len(missing):,} of {len(wanted):,} names of --only, the first of them {missing[0]}"
            raise NotFound(where, "has no link to some of the tars that are asked for", None, words)
        locations = {name: locations[name] for name in wanted}
    return Links(locations=locations, left_out=sorted(left_out))
