"""Uploads to S3 that somebody began and nobody ended: found and removed, by requests signed here (AWS Signature 4).

They are invisible, but cost money for ever, and the library that writes objects can neither list nor end them. Where no
keys are at hand (roles of machines, other clouds) nothing is done: a lifecycle rule does it, see the README.

Format: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

import hashlib
import hmac
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from . import clouds
from .errors import StorageError
from .transfer import Passing, refusal

_NOTHING = hashlib.sha256(b"").hexdigest()
_SAFE = "-_.~"


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An upload that was begun."""

    key: str
    id: str


def signature(
    *,
    method: str,
    host: str,
    path: str,
    query: Mapping[str, str],
    region: str,
    access: str,
    secret: str,
    token: str | None,
    when: datetime,
) -> dict[str, str]:
    """The headers that sign a request without a body.

    Args:
        path: percent-encoded.
        query: not encoded.
        when: in UTC.
    """
    stamp = when.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    headers = {"host": host, "x-amz-content-sha256": _NOTHING, "x-amz-date": stamp}
    if token:
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    canonical = "\n".join(
        [
            method,
            path,
            encoded(query),
            *(f"{name}:{headers[name]}" for name in sorted(headers)),
            "",
            names,
            _NOTHING,
        ]
    )
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signed = hmac.digest(key, text.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access}/{scope}, SignedHeaders={names}, Signature={signed}"
    )
    return headers


def encoded(query: Mapping[str, str]) -> str:
    """A query as it is signed and sent."""
    return "&".join(sorted(f"{quote(k, safe=_SAFE)}={quote(v, safe=_SAFE)}" for k, v in query.items()))


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
    about, keys = clouds.amazon(), clouds.keys()
    assert keys is not None
    region = about.get("region", "us-east-1")
    path = "/" + quote(key, safe=_SAFE + "/")
    if endpoint := about.get("endpoint"):
        path = f"/{quote(bucket, safe=_SAFE)}{path}".rstrip("/")
    else:
        endpoint = f"https://{bucket}.s3.{region}.amazonaws.com"
    access, secret, token = keys
    headers = signature(
        method=method,
        host=urlsplit(endpoint).netloc,
        path=path,
        query=query,
        region=region,
        access=access,
        secret=secret,
        token=token,
        when=datetime.now(UTC),
    )
    request = urllib.request.Request(f"{endpoint}{path}?{encoded(query)}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            try:
                body = error.read(4096).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                body = ""
            meaning = refusal(where, error.code, body)
    except (OSError, http.client.HTTPException) as error:
        meaning = Passing(str(error))
    raise StorageError(where, f"unfinished uploads: {meaning}") if isinstance(meaning, Passing) else meaning
