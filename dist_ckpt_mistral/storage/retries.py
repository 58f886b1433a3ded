"""How long temporary faults of a server are retried, and how one that stays is worded."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Final

#: Set by ``--retry-time``; the environment variable counts where the library is used without the command line.
VARIABLE: Final = "DIST_CKPT_MISTRAL_RETRY_SECONDS"
_DEFAULT_SECONDS: Final = 180.0
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 5.0
_CODE: Final = re.compile(r"<Code>([^<]+)</Code>")
_STATUS: Final = re.compile(r"(?:non-2xx status code|HTTP status[^:(]*|status:?)[: (]*(\d{3})")
#: Codes of S3, GCS and Azure -> what they mean, and what helps.
_EXPIRED: Final = "the credentials have expired. Renew them (aws sso login, a new token) and run the command again"
_REGION: Final = "the bucket is in another region. Set AWS_REGION to its region"
_DENIED: Final = "permission denied. The credentials must allow to list, read and, for an output, write and delete"
_REFUSED: Final = "the credentials are refused. Check AWS_PROFILE, or the keys in the environment"
_ABSENT: Final = "there is no such bucket or container. Check its name, and the endpoint"
_CODES: Final = {
    **dict.fromkeys(("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "ExpiredTokenException"), _EXPIRED),
    **dict.fromkeys(("PermanentRedirect", "IllegalLocationConstraintException"), _REGION),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "InvalidRegion"), _REGION),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AuthorizationPermissionMismatch"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthenticationFailed"), _REFUSED),
    **dict.fromkeys(("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"), _ABSENT),
    "RequestTimeTooSkewed": "the clock of this machine is wrong. Set it",
}
_UNTOLD: Final = (
    "the server refuses the request without saying why, as for expired credentials or another region. Renew the "
    "credentials, and check AWS_REGION"
)
_STATUSES: Final = {"301": _REGION, "400": _UNTOLD, "401": _REFUSED, "403": _DENIED}
#: What obstore says of an answer with the status 301 that names no place, as S3 answers for a bucket elsewhere.
_REDIRECT: Final = "redirect without LOCATION"
_RIGHT_REGION: Final = re.compile(r"<Region>([a-z0-9-]+)</Region>")
#: Temporary faults, by what is in an error -> what they are.
_TEMPORARY: Final = {
    "SlowDown": "the server asks for fewer requests",
    "error sending request": "the server does not answer",
    "response body error": "the server's answers break off or stop",
    "InternalError": "the server fails",
}
#: What obstore asks if it has no credentials: the metadata services of the clouds' virtual machines.
_METADATA_SERVICES: Final = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata/identity")
_NO_CREDENTIALS: Final = (
    "there are no credentials. Set AWS_PROFILE (with the extra s3 installed), or the keys in the environment; for a "
    "public bucket set AWS_SKIP_SIGNATURE=true"
)


def retry_seconds() -> float:
    """How long temporary faults are retried."""
    text = os.environ.get(VARIABLE, "")
    try:
        return max(0.0, float(text))
    except ValueError:
        return _DEFAULT_SECONDS


def attempts() -> Iterator[bool]:
    """Yield, with growing waits between, whether an attempt is the last one, until the time for retries is over."""
    end, wait_s = time.monotonic() + retry_seconds(), _FIRST_WAIT_S
    while time.monotonic() + wait_s < end:
        yield False
        time.sleep(wait_s)
        wait_s = min(_LONGEST_WAIT_S, wait_s * 2)
    yield True


def may_pass(error: BaseException) -> bool:
    """Whether what failed may go well if it is tried again: not if the server has said why it refuses."""
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    if _REDIRECT in text or any(service in text for service in _METADATA_SERVICES):
        return False
    return not (code and code[1] in _CODES) and not (status and status[1].startswith(("3", "4")))


def reason(error: BaseException) -> str:
    """Say in one line why a request failed, from the error of the client and the server's answer in it."""
    text = str(error)
    if any(service in text for service in _METADATA_SERVICES):
        return _NO_CREDENTIALS
    code, status = _CODE.search(text), _STATUS.search(text)
    if _REDIRECT in text:
        return f"{_REGION} (HTTP 301)"
    if code and code[1] in _CODES:
        why, region = _CODES[code[1]], _RIGHT_REGION.search(text)
        if why is _REGION and region:
            why = f"the bucket is in another region. Set AWS_REGION={region[1]}"
        return f"{why} ({code[1]})"
    if status and status[1] in _STATUSES and not code:
        return f"{_STATUSES[status[1]]} (HTTP {status[1]})"
    for sign, why in _TEMPORARY.items():
        if sign in text:
            said = f" ({code[1]})" if code else ""
            tried = f"although it was tried again for {retry_seconds():g} s"
            return f"{why}{said}, {tried}. Check the network and the address, or wait longer with --retry-time"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return f"{first} ({code[1]})" if code else first
