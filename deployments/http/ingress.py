"""The front of the application, as a Serve deployment: the router for Python handles, HTTP around it for the rest.

It holds no model and no GPU; everything but parsing and image encoding is the cell's.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.config import AppArgs
from deployments.http.keys import Keys
from deployments.http.routes import build_http
from deployments.logs import logger
from deployments.router import Router
from tetriserve.errors import ConfigError

FIXED = ("replicas", "api_keys_env", "api_keys_file", "cors_allow_origins", "url_ttl_s", "url_max_bytes")
"""Knobs of `args.http` that other processes know too, or that are built in at the start."""


class Ingress(Router):
    """The router, reachable by HTTP.

    Args:
        cell: handle of the Cell deployment.
        pictures: handle of the Pictures deployment.
        args: the application's arguments.
    """

    def __init__(self, cell: DeploymentHandle, pictures: DeploymentHandle, args: AppArgs) -> None:
        super().__init__(cell, args)
        self._pictures = pictures
        self._started_with = args
        self._keys = Keys(args.http)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve hands over the deployment's `user_config`, at the start and when it changed: knobs of `args.http`.
        Wrong ones leave all as it is."""
        try:
            args = self._started_with.turned("http", user_config)
            fixed = [
                name for name in FIXED if getattr(args.http, name) != getattr(self._started_with.http, name)
            ]
            if fixed:
                raise ConfigError(f"args.http.{fixed[0]}: only by args, with new processes")
            self.args = args
        except ConfigError as error:
            logger.error("user_config: %s", error.message)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the app once this object exists."""
        return build_http(self, self._pictures, self._keys)
