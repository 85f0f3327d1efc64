"""Requests to S3 signed here (AWS Signature 4), for what obstore cannot do: see `uploads`, and reading after a fork.

Format: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

from . import clouds

_NOTHING = hashlib.sha256(b"").hexdigest()
_SAFE = "-_.~"


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


def signed(method: str, bucket: str, key: str, query: Mapping[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """(URL, headers) of a request without a body; the headers sign it where keys are at hand."""
    about, keys, query = clouds.amazon(), clouds.keys(), query or {}
    region = about.get("region", "us-east-1")
    path = "/" + quote(key, safe=_SAFE + "/")
    if endpoint := about.get("endpoint"):
        path = f"/{quote(bucket, safe=_SAFE)}{path}".rstrip("/")
    else:
        endpoint = f"https://{bucket}.s3.{region}.amazonaws.com"
    url = f"{endpoint}{path}" + (f"?{encoded(query)}" if query else "")
    if keys is None:
        return url, {}
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
    return url, headers
