"""What an error of an S3 store means: try again, the user's to mend, or neither.

Invariant: only faults that may pass by themselves count as transient (no answer, 5xx, "slow down", a torn body), and
no message holds a key. A HEAD has no body: its code is only a number.
"""

import re

from modeling.errors import UserError
from orchestrator.address import KEYS_REMEDY, S3Address

_SLOW = {
    "SlowDown", "InternalError", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded", "OperationAborted",
    "ConditionalRequestConflict", "IncompleteBody", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_QUERY = re.compile(r"\?[^\s\"']*")  # of the URLs in messages
_RIGHTS = "the keys need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload"


def code_of(error: BaseException) -> tuple[str, int]:
    """The store's error code and HTTP status; ("", 0) for an error that is no answer of the store."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return "", 0
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(error.response.get("Error", {}).get("Code", "")), status


def transient(error: BaseException) -> str:
    """A few words on a fault that may pass by itself; "" for any other error."""
    code, status = code_of(error)
    if code:
        passes = code in _SLOW or status in (408, 429) or (status >= 500 and status != 501 and not _full(code, status))
        return f"{code} ({status})" if passes else ""
    import aiohttp
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    faults = (
        exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, ResponseParserError,
        exceptions.FlexibleChecksumError, aiohttp.ClientError, ConnectionError, TimeoutError,
    )  # fmt: skip
    if not isinstance(error, faults):
        return ""
    return f"{type(error).__name__}: {_QUERY.sub('', str(error))}".removesuffix(": ")


def taken(error: BaseException) -> bool:
    """A create-only put that found its key taken."""
    code, status = code_of(error)
    return code == "PreconditionFailed" or status == 412


def absent(error: BaseException) -> bool:
    """No such object or multipart upload; a missing bucket is the user's mistake."""
    code, status = code_of(error)
    return status == 404 and code != "NoSuchBucket"


def mistake(error: BaseException, verb: str, address: S3Address, endpoint: str) -> UserError | None:
    """What the user can mend, with place and remedy; None where it is something else.

    verb: "read", "list", "write to" or "delete from". endpoint: for messages.
    """
    from botocore import exceptions

    code, status = code_of(error)
    found, remedy = _BY_CODE.get(code, ("", ""))
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        found, remedy = "no keys for the store were found", KEYS_REMEDY + ", or AWS_PROFILE"
    elif isinstance(error, exceptions.BotoCoreError) and not code and not transient(error):
        found, remedy = str(error), "check the AWS_* variables and the profile"
    elif code == "NoSuchBucket":
        found = f"there is no bucket '{address.bucket}' at {endpoint}"
        remedy = "make the bucket first, or correct its name or the endpoint"
    elif _full(code, status):
        found, remedy = f"the store at {endpoint} is full ({code})", "free space there, or raise the quota"
    elif not found and status in (401, 403):
        found, remedy = f"these keys may not {verb} the bucket ({code}, {status})", _RIGHTS
    elif not found and status in (301, 307, 308):
        found, remedy = "the bucket lies in another region", "set AWS_DEFAULT_REGION to the bucket's region"
    elif not found and status == 501:
        found = f"the store at {endpoint} does not know a request that is needed here ({code})"
        remedy = "use a store with conditional writes, such as AWS S3 or Ceph's gateway, or a shared folder"
    return UserError(found, where=f"storage {address.short}", remedy=remedy) if found else None


def _full(code: str, status: int) -> bool:
    return code in ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage") or status == 507


_BY_CODE = {
    "InvalidAccessKeyId": ("the store does not know this access key", "check AWS_ACCESS_KEY_ID and the endpoint"),
    "SignatureDoesNotMatch": (
        "the secret key does not fit the access key", "check AWS_SECRET_ACCESS_KEY (and AWS_DEFAULT_REGION)",
    ),
    "ExpiredToken": ("the session token has expired", "renew AWS_SESSION_TOKEN"),
    "TokenRefreshRequired": ("the session token has expired", "renew AWS_SESSION_TOKEN"),
    "InvalidToken": ("the session token is not valid", "renew AWS_SESSION_TOKEN, or unset it"),
    "RequestTimeTooSkewed": ("this machine's clock and the store's differ by minutes", "set the clock, by NTP"),
    "RequestExpired": ("this machine's clock and the store's differ by minutes", "set the clock, by NTP"),
    "AuthorizationHeaderMalformed": ("the region does not fit the bucket", "set AWS_DEFAULT_REGION to its region"),
    "PermanentRedirect": ("the bucket lies in another region", "set AWS_DEFAULT_REGION to the bucket's region"),
    "IllegalLocationConstraintException": ("the region does not fit the bucket", "set AWS_DEFAULT_REGION"),
    "InvalidBucketName": ("the store takes no bucket of this name", "correct the name of the bucket"),
}  # fmt: skip
