"""One tree of errors; each says where, what, expected and found, and survives pickling.

    Sa1bError
    ├── DataError            exit 1   the data is not what it must be
    │   ├── SourceDamaged             a source tar that cannot be read to its end
    │   ├── SampleRejected            one sample that cannot be converted (goes to quarantine)
    │   ├── TooManyQuarantined        more samples of a task rejected than allowed
    │   ├── TooFewSamples             a task with fewer samples than shards
    │   ├── DuplicateKey              the same image in two sources
    │   ├── Incomplete                tasks without a receipt
    │   ├── FormatError               a member, manifest or plan that breaks the format, or of an unknown version
    │   └── ShardDamaged              a shard that differs from its manifest or its checksums
    ├── StorageError         exit 1   bytes cannot be read or written
    │   ├── NotFound
    │   ├── Denied
    │   │   └── LinkExpired           a signed URL that is no longer valid
    │   ├── NoCredentials             the store wants to know who asks
    │   ├── WrongRegion               the bucket lies elsewhere
    │   ├── Changed                   another object than the one that was begun
    │   ├── Unreachable               no answer, or no bytes, however often it was tried
    │   └── NoSpace
    ├── UsageError           exit 2   the call, not the data, is wrong
    │   ├── ConfigError
    │   ├── PlanMismatch              another plan, or other options, on the same destination
    │   ├── StateMismatch             a loader state that belongs to another data set
    │   ├── WorldError                ranks and world sizes that contradict each other
    │   └── MissingPackage
    └── Different            exit 3   `verify` found a difference

Messages are built once, here: `where: what: expected X, found Y`. Secrets of URLs are masked here too, so that no
message, `repr` or pickle of an error can carry one.
"""

import re
from typing import ClassVar

_USER = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/?#'\"@]*@")
_QUERY = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s?#'\"]*)([?#])[^\s'\"]+")


def masked(text: str) -> str:
    """A text without the secrets of the URLs in it: user and password, and the query of a signed URL."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1\2***", _USER.sub(r"\1***@", text))


class Sa1bError(Exception):
    """The base of all errors of this project.

    Attributes:
        where: the place, outermost first: a path or URL, then a byte, a key, a field.
        what: what is wrong, in a few words, with what to do where that is known.
        expected: what should have been there, or None.
        found: what was there, or None.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, what: str, expected: object = None, found: object = None) -> None:
        where, what = masked(where), masked(what)
        expected = masked(expected) if isinstance(expected, str) else expected
        found = masked(found) if isinstance(found, str) else found
        super().__init__(where, what, expected, found)
        self.where, self.what, self.expected, self.found = where, what, expected, found

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected is not None:
            text += f": expected {_plain(self.expected)}, found {_plain(self.found)}"
        elif self.found is not None:
            text += f": found {_plain(self.found)}"
        return text


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class DataError(Sa1bError):
    """The data is not what it must be."""


class SourceDamaged(DataError):
    """A source tar that cannot be read to its end."""


class SampleRejected(DataError):
    """One sample that cannot be converted; `what` is the reason that quarantine records."""


class TooManyQuarantined(DataError):
    """More samples of a task were rejected than `--max-quarantine` allows."""


class TooFewSamples(DataError):
    """A task that ended with fewer samples than shards."""


class DuplicateKey(DataError):
    """The same image in two sources."""


class Incomplete(DataError):
    """Tasks that have no receipt."""


class FormatError(DataError):
    """A member, manifest or plan that breaks the format, or has a version this release does not know."""


class ShardDamaged(DataError):
    """A shard that differs from its manifest or its checksums."""


class StorageError(Sa1bError):
    """Bytes that cannot be read or written."""


class NotFound(StorageError):
    """No such file or object."""


class Denied(StorageError):
    """No permission."""


class LinkExpired(Denied):
    """A signed URL that is refused: it has expired, or was cut when it was copied."""


class NoCredentials(StorageError):
    """No credentials were found, or the store wants some."""


class WrongRegion(StorageError):
    """The bucket lies in another region than the one that was asked."""


class Changed(StorageError):
    """An object that was replaced while it was read."""


class Unreachable(StorageError):
    """A server that does not answer, or whose bytes do not come, however often it was asked."""


class NoSpace(StorageError):
    """The disk is full."""


class UsageError(Sa1bError):
    """The call is wrong, not the data."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown key or a wrong type in a configuration file."""


class PlanMismatch(UsageError):
    """Another plan, or other options, on the same destination."""


class StateMismatch(UsageError):
    """A loader state that belongs to another data set or another selection of it."""


class WorldError(UsageError):
    """Ranks and world sizes that contradict each other."""


class MissingPackage(UsageError):
    """An optional package that is not installed; the message says how to install it."""


class Different(Sa1bError):
    """`verify` found a difference."""

    exit_code = 3
