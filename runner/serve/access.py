"""Who may ask, and how often: API keys, rate limits per key, the check against DNS rebinding."""

import hashlib
import hmac
import ipaddress
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from runner.machine.errors import ConfigError
from runner.machine.text_files import read_text
from runner.serve.errors import ApiError

KEYS_VARIABLE = "ESPALIER_API_KEYS"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_loopback(host: str | None) -> bool:
    """Return whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


def _names_loopback(where: str) -> bool:
    """Return whether a Host header, a name and perhaps a port, is this machine's."""
    found = _HOST.fullmatch(where)
    return found is not None and is_loopback(found[1].lower())


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the sha256 digests of the keys, of a file or of the environment.

    Args:
        file: a digest a line, and what one likes behind it (None: the keys themselves stand in
            ESPALIER_API_KEYS, with commas between them).

    Raises:
        ConfigError: a line does not begin with a digest, or there is none.
    """
    if file is None:
        given = os.environ.get(KEYS_VARIABLE, "").split(",")
        return tuple(hashlib.sha256(key.strip().encode()).hexdigest() for key in given if key)
    words = [line.split()[0].lower() for line in read_text(file).splitlines() if line.strip()]
    wrong = [number for number, word in enumerate(words, 1) if not _DIGEST.fullmatch(word)]
    if wrong or not words:
        where = f"key {wrong[0]} is no digest" if wrong else "there is none"
        raise ConfigError(
            f"{file}: {where}; each line is the sha256 of a key, as printed by: "
            "printf %s KEY | sha256sum"
        )
    return tuple(words)


class Access:
    """Keys and limits.

    Args:
        digests: sha256 of each key in hexadecimal digits (none: no key is asked for).
        requests_per_minute, tokens_per_minute: of each key; tokens are those of the prompts and
            the most that may be generated (None: no limit).
    """

    def __init__(
        self,
        digests: tuple[str, ...] = (),
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self._digests = digests
        given = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        # Counts in windows that slide: a list of moments would hold one for each token.
        self._limits = {
            name: RateLimitItemPerMinute(most, namespace=name)
            for name, most in given.items()
            if most is not None
        }
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    @property
    def several_keys(self) -> bool:
        """Whether different users have different keys."""
        return len(self._digests) > 1

    def authenticate(self, authorization: str) -> str:
        """Return the digest of the key in an Authorization header; "" if none is asked for.

        Raises:
            ApiError: the key is missing or wrong.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # all: same time
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest

    def take(self, kind: str, key: str, amount: int) -> None:
        """Count requests or tokens of a key.

        Raises:
            ApiError: they are more than its limit.
        """
        limit = self._limits.get(kind)
        if limit is None or self._limiter.hit(limit, key, cost=amount):
            return
        raise ApiError(
            429,
            f"{limit.amount} {kind} a minute are allowed, and this request asks for {amount} more "
            "than are left; wait, or ask for less",
            code="rate_limit_exceeded",
            retry_after_s=self._seconds_until_free(limit, key),
            headers=self.headers(key),
        )

    def headers(self, key: str) -> dict[str, str]:
        """Return what is left of each limit, as OpenAI's headers say it."""
        headers: dict[str, str] = {}
        for kind, limit in self._limits.items():
            left = self._limiter.get_window_stats(limit, key)
            headers |= {
                f"x-ratelimit-limit-{kind}": str(limit.amount),
                f"x-ratelimit-remaining-{kind}": str(left.remaining),
                f"x-ratelimit-reset-{kind}": f"{self._seconds_until_free(limit, key)}s",
            }
        return headers

    def _seconds_until_free(self, limit: RateLimitItemPerMinute, key: str) -> int:
        reset = self._limiter.get_window_stats(limit, key).reset_time
        return min(60, max(1, math.ceil(reset - time.time())))


def check_host(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ApiError unless a request to a loopback address was meant for it.

    A page of another site may have its own name point here (DNS rebinding), or send its form here:
    then Host or Origin name that site.
    """
    given = [(name, value.decode("latin-1")) for name, value in headers]
    hosts = [value for name, value in given if name == b"host"]
    origins = [value.partition("://")[2] for name, value in given if name == b"origin"]
    if not (hosts and all(_names_loopback(where) for where in hosts + origins)):
        raise ApiError(
            403,
            "this server answers to this machine alone; ask http://127.0.0.1, or start it with "
            "--host and a key",
            code="forbidden_host",
        )
