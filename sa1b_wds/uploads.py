"""Uploads to S3 that somebody began and nobody ended: found and removed, by signed requests of our own.

They are invisible, but cost money for ever, and the library that writes objects can neither list nor end them. Where no
keys are at hand (roles of machines, other clouds) nothing is done: a lifecycle rule does it, see the README.
"""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from . import clouds, signing
from .remote import insisting
from .traffic import Passing
from .transfer import refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An upload that was begun."""

    key: str
    id: str


def pending(url: str) -> list[Upload] | None:
    """Uploads below a URL, or to that very object; None where they cannot be asked for.

    Raises:
        StorageError: the store refuses to tell.
    """
    scheme, bucket, prefix = clouds.split(url)
    if scheme != "s3" or clouds.keys() is None:
        return None
    found: list[Upload] = []
    query = {"uploads": "", "prefix": prefix}
    while True:
        root = ElementTree.fromstring(_call("GET", url, bucket, "", query))
        name = re.match(r"\{.*\}", root.tag)
        space = name[0] if name else ""
        for node in root.iter(f"{space}Upload"):
            key = node.findtext(f"{space}Key", "").lstrip("/")
            if key == prefix or key.startswith(f"{prefix}/" if prefix else ""):
                found.append(Upload(key=key, id=node.findtext(f"{space}UploadId", "")))
        if root.findtext(f"{space}IsTruncated") != "true":
            return found
        markers = {
            "key-marker": root.findtext(f"{space}NextKeyMarker", ""),
            "upload-id-marker": root.findtext(f"{space}NextUploadIdMarker", ""),
        }
        if query.items() >= markers.items():
            return found
        query |= markers


def abort(url: str, upload: Upload) -> None:
    """End an upload; its parts are gone."""
    _, bucket, _ = clouds.split(url)
    _call("DELETE", url, bucket, upload.key, {"uploadId": upload.id})


def _call(method: str, where: str, bucket: str, key: str, query: Mapping[str, str]) -> bytes:
    return insisting(where, lambda limits: _ask(method, where, bucket, key, query))


def _ask(method: str, where: str, bucket: str, key: str, query: Mapping[str, str]) -> bytes:
    url, headers = signing.signed(method, bucket, key, query)
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            try:
                body = error.read(4096).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                body = ""
            meaning: Exception = refusal(where, error.code, body)
    except (OSError, http.client.HTTPException) as error:
        meaning = Passing(str(error))
    raise meaning
