"""API keys: who may use the /v1 routes. Keys come from the environment or a file, and are never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import time

from deployments.cluster_file import load_keys
from deployments.config import HTTPArgs
from deployments.logs import logger
from tetriserve.errors import ConfigError, Unauthorized

LOOK_S = 1.0
"""How often a file of keys is looked at."""


class Keys:
    """The keys as they are now: a file that changed is read again, and one that is wrong then leaves the keys as they
    were.

    Raises `ConfigError` as `load_keys`.
    """

    def __init__(self, http: HTTPArgs) -> None:
        self._http = http
        self._looked_s = time.monotonic()
        self._stamp = self._stamped()
        self._keys = load_keys(http)

    def owner(self, authorization: str) -> str:
        """A name for the owner of the key in the header, from which the key cannot be found.

        Raises `Unauthorized` unless the header is "Bearer KEY" with one of the keys, compared in constant time.
        """
        self._look()
        scheme, _, given = authorization.partition(" ")
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("send an API key of this server: Authorization: Bearer KEY")
        return hashlib.sha256(given.strip().encode()).hexdigest()[:16]

    def _look(self) -> None:
        now_s = time.monotonic()
        if self._http.api_keys_file is None or now_s < self._looked_s + LOOK_S:
            return
        self._looked_s = now_s
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = load_keys(self._http)
            logger.info("the API keys were read again: %d", len(self._keys))
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error.message)

    def _stamped(self) -> tuple[int, int] | None:
        """Of the file; changes with it."""
        try:
            found = os.stat(self._http.api_keys_file or "")
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size
