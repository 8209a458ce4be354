"""The front of the application, as a Serve deployment: the router for Python handles, HTTP around it for the rest.

It holds no model and no GPU; everything but parsing and image encoding is the cell's.
"""

from __future__ import annotations

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.config import AppArgs
from deployments.http.keys import load_keys
from deployments.http.routes import build_http
from deployments.router import Router


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
        self._keys = load_keys(args.http)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the app once this object exists."""
        return build_http(self, self._pictures, self._keys)
