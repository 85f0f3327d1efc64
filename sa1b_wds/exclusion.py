"""Images that are left out of a data set because somebody asked for it (`plan --exclude`): by their ids alone.

A member is one of them if its name is `sa_<id>.jpg` or `.json`, zeros in front of the id or not, in whatever folder; it
is counted, and its bytes are kept nowhere: not in a shard, not in quarantine.
"""

import re
from collections.abc import Container, Sequence
from pathlib import Path

from .errors import FormatError, NotFound

_ID = re.compile(r"(?:sa_)?(0|[1-9][0-9]{0,18})", re.ASCII)
_MEMBER = re.compile(r"(?:.*/)?sa_0*([0-9]{1,19})\.(?:jpg|json)", re.ASCII | re.DOTALL)


def image_ids(words: Sequence[str]) -> list[int]:
    """The ids that words mean, sorted: `sa_123`, `123`, or a file with one a line, `#` before what is a comment.

    Raises:
        NotFound: a word that is no id, and no file.
        FormatError: a line of a file that is no id.
    """
    found = set()
    for word in words:
        if match := _ID.fullmatch(word):
            found.add(int(match[1]))
            continue
        try:
            lines = Path(word).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise NotFound(f"--exclude {word}", f"neither an id (sa_123, 123) nor a file of ids: {error}") from None
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            if not (match := _ID.fullmatch(text)):
                raise FormatError(f"{word}: line {number}", "not an image id", "sa_123 or 123", text[:40])
            found.add(int(match[1]))
    return sorted(found)


def is_excluded(name: str, ids: Container[int]) -> bool:
    """Whether a member of this name belongs to one of these images."""
    match = _MEMBER.fullmatch(name)
    return match is not None and int(match[1]) in ids
