"""Where storage is, as one string: a folder, or `s3://bucket/prefix?endpoint_url=http://host:port`.

Invariant: an address holds no secret. Keys come from the environment as botocore reads them; an address with a
user name, a password or a key in it is refused, and no message repeats it. So an address may cross processes, lie in
storage and stand in messages.
"""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from modeling.errors import UserError

KEYS_REMEDY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,253}[a-zA-Z0-9]")
SECRET = re.compile(r"key|secret|token|password|credential", re.I)


@dataclass(frozen=True)
class S3Address:
    """prefix: "" or parts joined by '/', none at its ends. endpoint_url: "" for botocore's own choice."""

    bucket: str
    prefix: str = ""
    endpoint_url: str = ""

    def __str__(self) -> str:
        query = f"?endpoint_url={quote(self.endpoint_url, safe=':/')}" if self.endpoint_url else ""
        return self.short + query

    @property
    def short(self) -> str:
        """For messages."""
        return "s3://" + "/".join(part for part in (self.bucket, self.prefix) if part)


def parse_s3(url: str, endpoint_url: str = "") -> S3Address:
    """The address in `url`, which may name its endpoint itself. Raises UserError.

    endpoint_url: the setting beside `url` in an experiment file.
    """
    where = f"storage {redact(url)}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UserError("not an address", where=where, remedy="write s3://bucket/prefix") from None
    settings = parse_qsl(parts.query, keep_blank_values=True)
    if "@" in parts.netloc or any(SECRET.search(name) for name, _ in settings):
        raise UserError("keys do not belong in an address", where=where, remedy=KEYS_REMEDY)
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc):
        raise UserError("no valid name of a bucket in it", where=where, remedy="write s3://bucket/prefix")
    prefix = parts.path.strip("/")
    if parts.fragment or "#" in url or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise UserError("the prefix must be plain names with '/' between them", where=where,
                        remedy="write s3://bucket/prefix")  # fmt: skip
    if unknown := sorted({name for name, _ in settings} - {"endpoint_url"}):
        raise UserError(f"unknown setting '{unknown[0]}' in the address", where=where,
                        remedy="the only one is endpoint_url")  # fmt: skip
    named = [value for _, value in settings] + [endpoint_url] * bool(endpoint_url)
    if len(set(named)) > 1:
        raise UserError("two different values of endpoint_url", where=where, remedy="give it once")
    return S3Address(parts.netloc, prefix, check_endpoint(named[0], where) if named else "")


def redact(url: str) -> str:
    """The address without what could hold a secret: user name, password, and everything behind '?' or '#'."""
    head, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{head}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else url


def check_endpoint(url: str, where: str) -> str:
    """The address of a store. Raises UserError: no address, or keys in it."""
    remedy = "write endpoint_url as http://host:port or https://host"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError("endpoint_url is not an address", where=where, remedy=remedy) from None
    if "@" in parts.netloc:
        raise UserError("keys do not belong in endpoint_url", where=where, remedy=KEYS_REMEDY)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise UserError("endpoint_url is not an address", where=where, remedy=remedy)
    return url.rstrip("/")
