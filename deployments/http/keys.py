"""API keys: who may use the /v1 routes. Keys come from the environment or a file, and are never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from deployments.config import HTTPArgs
from tetriserve.errors import ConfigError, Unauthorized

SHORTEST_KEY = 16
"""Shorter ones can be guessed."""


def load_keys(http: HTTPArgs) -> tuple[bytes, ...]:
    """The allowed keys; none when none are configured. Raises `ConfigError`, which never shows a key."""
    if not http.has_keys:
        return ()
    keys: list[str] = []
    if http.api_keys_env is not None:
        keys += os.environ.get(http.api_keys_env, "").split(",")
    if http.api_keys_file is not None:
        try:
            lines = Path(http.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = type(error).__name__
            raise ConfigError(f"http.api_keys_file: cannot read {http.api_keys_file!r}: {reason}") from None
        keys += [line for line in lines if not line.lstrip().startswith("#")]
    found = [key.strip() for key in keys if key.strip()]
    source = "http.api_keys_file" if http.api_keys_file is not None else "http.api_keys_env"
    if not found:
        raise ConfigError(f"{source}: no key is there; leave the field out to serve without keys")
    if min(map(len, found)) < SHORTEST_KEY:
        raise ConfigError(f"{source}: a key is shorter than {SHORTEST_KEY} characters")
    return tuple(key.encode() for key in found)


def check_key(keys: Sequence[bytes], authorization: str) -> str:
    """A name for the owner of the key in the header, from which the key cannot be found.

    Raises `Unauthorized` unless the header is "Bearer KEY" with one of `keys`, compared in constant time.
    """
    scheme, _, given = authorization.partition(" ")
    matches = [hmac.compare_digest(key, given.strip().encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthorized("send an API key of this server: Authorization: Bearer KEY")
    return hashlib.sha256(given.strip().encode()).hexdigest()[:16]
