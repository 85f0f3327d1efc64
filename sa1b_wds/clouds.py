"""s3://, gs:// and az:// objects: the one module that knows obstore, and what it says when something is wrong.

Where a store lies and who asks come from each cloud's own environment: AWS_ENDPOINT_URL(_S3), AWS_REGION, AWS_PROFILE,
AWS_ACCESS_KEY_ID, …, AWS_SKIP_SIGNATURE=true for public buckets; GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SKIP_SIGNATURE,
STORAGE_EMULATOR_HOST; AZURE_STORAGE_ACCOUNT_NAME and so on. obstore knows most of these; profiles in ~/.aws (keys or
`credential_process` by themselves, all other kinds through boto3 if that is installed) and the emulator are added here.
"""

import configparser
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .errors import Changed, NoCredentials, NotFound, Sa1bError, StorageError, Unreachable, UsageError
from .limits import Limits
from .traffic import Passing
from .transfer import HOW_TO_SIGN_IN, Stat, refusal

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

SCHEMES = ("s3", "gs", "az")
_PIECE = 1 << 16  # what of a broken answer may have to be asked for again
_STATUS = re.compile(r"status code: (\d{3})")
_METADATA = ("169.254.169.254", "169.254.170.", "metadata.google.internal", "fd00:ec2::")


def split(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, key) of a URL.

    Raises:
        UsageError: it has no bucket.
    """
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if not parts.netloc:
        raise UsageError(url, "names no bucket", f"{parts.scheme}://BUCKET/…")
    return parts.scheme, parts.netloc, unquote(parts.path).strip("/")


def store(scheme: str, bucket: str, limits: Limits, *, writing: bool = False) -> "ObjectStore":
    """A bucket, as this process's environment says; the same one for the same environment."""
    if has_forked():
        raise UsageError(
            f"{scheme}://{bucket}",
            "cannot be reached from a forked process: start processes by forkserver or spawn "
            "(DataLoader(…, multiprocessing_context='forkserver'))",
        )
    about = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES)))
    return _store(scheme, bucket, limits, writing, about, os.getpid())


def has_forked() -> bool:
    """Whether this is the copy of a process that had used obstore, whose threads are not here: it would only wait."""
    return bool(_STARTED) and os.getpid() not in _STARTED


_STARTED: set[int] = set()
"""The process that uses obstore, if one does."""

_VARIABLES = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "AZURE_", "AZURITE_")


@lru_cache(maxsize=32)
def _store(scheme: str, bucket: str, limits: Limits, writing: bool, about: object, process: int) -> "ObjectStore":
    from obstore import store as stores

    _STARTED.add(process)
    stall = timedelta(seconds=limits.stall)
    client: dict[str, Any] = {"connect_timeout": stall, "read_timeout": stall}
    client["timeout"] = 10 * stall if writing else timedelta(days=1)  # a part, or a whole object
    # Reads are tried again by `transfer`, which knows how far it had come; writes by the library, part by part.
    retries = {"max_retries": limits.attempts if writing else 0, "retry_timeout": timedelta(seconds=600)}
    common: dict[str, Any] = {"client_options": client, "retry_config": retries}
    try:
        match scheme:
            case "s3":
                found = amazon()
                client["allow_http"] = found.get("endpoint", "").startswith("http://")
                found |= {"checksum_algorithm": "SHA256"} if writing else {}
                return stores.S3Store(bucket, **found, **common)  # type: ignore[no-any-return, unused-ignore]
            case "gs":
                if host := os.environ.get("STORAGE_EMULATOR_HOST"):
                    url = host if "://" in host else f"http://{host}"
                    client["allow_http"] = True
                    key = {"gcs_base_url": url.rstrip("/"), "disable_oauth": True}
                    key |= {"client_email": "", "private_key": "", "private_key_id": ""}
                    return stores.GCSStore(bucket, service_account_key=json.dumps(key), **common)
                return stores.GCSStore(bucket, **common)
            case _:
                client["allow_http"] = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "") not in ("", "0", "false")
                return stores.AzureStore(bucket, **common)
    except Exception as error:
        raise _meaning(error, f"{scheme}://{bucket}") from None


def amazon() -> dict[str, Any]:
    """What obstore does not find in the environment by itself: endpoint, region and keys of a profile."""
    environment = os.environ
    profile = _profile(environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default")
    found: dict[str, Any] = {}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint := endpoint or environment.get("AWS_ENDPOINT") or profile.get("endpoint_url"):
        found["endpoint"] = endpoint.rstrip("/")
    if region := environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or profile.get("region"):
        found["region"] = region
    if not environment.get("AWS_ACCESS_KEY_ID"):
        if "aws_access_key_id" in profile:
            found["access_key_id"] = profile["aws_access_key_id"]
            found["secret_access_key"] = profile.get("aws_secret_access_key", "")
            if token := profile.get("aws_session_token"):
                found["session_token"] = token
        elif environment.get("AWS_PROFILE") or profile.keys() & {"sso_session", "sso_start_url", "role_arn"}:
            found["credential_provider"] = _boto3(environment.get("AWS_PROFILE") or "default")
    return found


def _profile(name: str) -> dict[str, str]:
    """Keys of a profile in ~/.aws/config and ~/.aws/credentials; the latter wins."""
    found: dict[str, str] = {}
    places = (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    )
    for variable, file, section in places:
        path = Path(os.environ.get(variable) or Path.home() / ".aws" / file)
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except OSError:
            continue
        except (configparser.Error, UnicodeDecodeError) as error:
            raise NoCredentials(str(path), f"cannot be read: {type(error).__name__}") from None
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


def _boto3(profile: str) -> Any:
    try:
        import boto3  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise NoCredentials(
            f"AWS profile {profile}", "has no keys of its own; for roles and single sign-on: pip install boto3"
        ) from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=profile))
    except Exception as error:
        raise NoCredentials(f"AWS profile {profile}", f"boto3 finds no credentials: {error}") from None


def _meaning(error: Exception, where: str) -> Exception:
    """What an error of obstore's means. They carry the answer as text; the HTTP status in it is what counts."""
    if isinstance(error, Sa1bError):
        return error
    text = str(error)
    first = text.partition("\n\nDebug source")[0]
    if any(address in first for address in _METADATA):
        return NoCredentials(where, f"no credentials found: {HOW_TO_SIGN_IN}")
    if found := _STATUS.search(first):
        return refusal(where, int(found[1]), first)
    if isinstance(error, FileNotFoundError):
        return NotFound(where, "no such object")
    if "without LOCATION" in first:
        return refusal(where, 301, first)
    words = " ".join(first.split())[:300]
    if "Account must be specified" in first or "credential" in first.lower():
        return NoCredentials(where, f"no credentials found: {HOW_TO_SIGN_IN}", None, words)
    if "HTTP error" in first or "request or response body" in first or "error sending request" in first:
        return Passing(words, stalled="timed out" in text or "TimedOut" in text)
    return StorageError(where, words)


class Cloud:
    """The transport of one object."""

    def __init__(self, url: str, limits: Limits) -> None:
        scheme, bucket, self._key = split(url)
        self.where = url
        self.server = f"{scheme}://{bucket} {amazon().get('endpoint', '') if scheme == 's3' else ''}".rstrip()
        self._store = store(scheme, bucket, limits)

    def stat(self) -> Stat:
        import obstore

        try:
            meta = obstore.head(self._store, self._key)
        except Exception as error:
            if not isinstance(meaning := _meaning(error, self.where), StorageError):
                raise meaning from None
            try:  # not everybody who may read may also ask; and only an answer to GET says why
                meta = obstore.get(self._store, self._key, options={"range": (0, 1)}).meta
            except Exception as again:
                raise _meaning(again, self.where) from None
        return Stat(size=meta["size"], etag=meta["e_tag"])

    def get(self, begin: int, end: int, stat: Stat) -> "Iterator[Buffer]":
        import obstore

        options: Any = {"range": (begin, end)}
        if stat.etag is not None:
            options["if_match"] = stat.etag
        try:
            answer = obstore.get(self._store, self._key, options=options)
            meta = answer.meta
            if (meta["size"], meta["e_tag"]) != (stat.size, stat.etag):
                found = f"{meta['size']:,} bytes, {meta['e_tag']}"
                expected = f"{stat.size:,} bytes, {stat.etag}"
                raise Changed(self.where, "the object was replaced while it was read: run again", expected, found)
            yield from answer.stream(min_chunk_size=min(_PIECE, end - begin))
        except (Changed, GeneratorExit):
            raise
        except Exception as error:
            raise _meaning(error, self.where) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """An object as a listing shows it."""

    name: str
    """Its key, without what the URL already says."""
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970, by the clock of the store."""


def listing(url: str, limits: Limits) -> list[Listed]:
    """All objects below a URL, sorted by name."""
    import obstore

    scheme, bucket, prefix = split(url)
    prefix = f"{prefix}/" if prefix else ""
    try:
        found = [
            Listed(
                name=meta["path"].removeprefix(prefix), size=meta["size"], modified=meta["last_modified"].timestamp()
            )
            for chunk in obstore.list(store(scheme, bucket, limits), prefix)
            for meta in chunk
        ]
    except Exception as error:
        raise _meaning(error, url) from None
    return sorted(found, key=lambda one: one.name)


def put(url: str, data: "Buffer", limits: Limits, *, new: bool = False) -> bool:
    """Write an object whole; with `new` only where there is none, False if there is one."""
    import obstore
    from obstore.exceptions import AlreadyExistsError

    scheme, bucket, key = split(url)
    try:
        there = store(scheme, bucket, limits, writing=True)
        obstore.put(there, key, bytes(data), mode="create" if new else "overwrite", use_multipart=False)
    except AlreadyExistsError:
        return False
    except Exception as error:
        raise _meaning(error, url) from None
    return True


def delete(url: str, limits: Limits) -> None:
    """Remove an object, if it is there."""
    import obstore

    scheme, bucket, key = split(url)
    try:
        obstore.delete(store(scheme, bucket, limits, writing=True), key)
    except FileNotFoundError:
        pass
    except Exception as error:
        raise _meaning(error, url) from None


PART = 8 << 20
"""Bytes of a part of an upload."""


class Upstream:
    """An object being written, in parts, one of them on its way at a time; it is not there before `complete`."""

    def __init__(self, url: str, limits: Limits) -> None:
        import obstore

        scheme, bucket, key = split(url)
        self.where = url
        there = store(scheme, bucket, limits, writing=True)
        self._file: Any = obstore.open_writer(there, key, buffer_size=PART, max_concurrency=1)
        self._part, self._used = memoryview(b""), 0

    def write(self, piece: "Buffer") -> None:
        """Raises: StorageError, by the library's own patience with each part."""
        # Copied, and handed over a part at a time: the library keeps what it is given until it is sent.
        view = memoryview(piece).cast("B")
        while len(view):
            if self._used == len(self._part):
                self._hand_over()
                self._part = memoryview(bytearray(PART))
            n = min(len(view), len(self._part) - self._used)
            self._part[self._used : self._used + n] = view[:n]
            self._used += n
            view = view[n:]

    def _hand_over(self) -> None:
        part, self._part = self._part[: self._used], memoryview(b"")
        self._used = 0
        try:
            if len(part):
                self._file.write(part)
        except Exception as error:
            raise settled(_meaning(error, self.where), self.where) from None

    def complete(self) -> None:
        """All bytes are there, and the object is visible."""
        self._hand_over()
        try:
            self._file.close()
        except Exception as error:
            raise settled(_meaning(error, self.where), self.where) from None


def settled(error: Exception, where: str) -> Exception:
    """An error where nobody is going to try again."""
    return Unreachable(where, f"gave up: {error}") if isinstance(error, Passing) else error


def keys() -> tuple[str, str, str | None] | None:
    """(id, secret, session token) for requests to S3 that are signed here; None where none are at hand."""
    if access := os.environ.get("AWS_ACCESS_KEY_ID"):
        return access, os.environ.get("AWS_SECRET_ACCESS_KEY", ""), os.environ.get("AWS_SESSION_TOKEN")
    found = amazon()
    if "access_key_id" in found:
        return found["access_key_id"], found["secret_access_key"], found.get("session_token")
    if (provider := found.get("credential_provider")) is not None:
        made = provider()
        return made["access_key_id"], made["secret_access_key"], made.get("token")
    return None
