"""The Serve config file of a cluster, read strictly, and what the machine that is to serve it says of it."""

from __future__ import annotations

import copy
import os
import re
import socket
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.config import AppArgs, HTTPArgs
from tetriserve.errors import ConfigError
from tetriserve.models.embedded import EMBEDDED
from tetriserve.profile import Profile

INSTALLED = Path(__file__).parent.parent
"""Where this package and its cluster files are."""
IMPORT_PATH = "deployments.app:build"
SHORTEST_KEY = 16
"""Shorter ones can be guessed."""
HUB_ID = r"\w[\w.-]*/[\w.-]+"


def load_config(
    path: str, policy: str | None = None
) -> tuple[ServeDeploySchema, ServeApplicationSchema, AppArgs]:
    """Read a Serve config file as `serve deploy` does, but strictly: unknown keys are refused.

    A relative path that does not exist is looked up beside the installed package, so that
    `cluster_configs/...` works from any folder. `policy` wins over the file's.

    Returns the file, its tetriserve application and that one's arguments. Raises `ConfigError`.
    """
    file = Path(path)
    if not file.exists() and not file.is_absolute():
        file = INSTALLED / path
    try:
        body = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds no mapping")
    try:
        schema = ServeDeploySchema.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {key}: {first['msg']}") from None
    _refuse_unknown(path, "", body, ServeDeploySchema)
    _refuse_unknown(path, "http_options.", body.get("http_options") or {}, HTTPOptionsSchema)
    for index, application in enumerate(body["applications"]):
        _refuse_unknown(path, f"applications.{index}.", application, ServeApplicationSchema)
    ours = [application for application in schema.applications if application.import_path == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(f"{path} must hold exactly one application with import_path {IMPORT_PATH}")
    try:
        args = AppArgs.parse(ours[0].args)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    if policy is not None:
        ours[0].args = {**ours[0].args, "scheduler": {**ours[0].args.get("scheduler", {}), "policy": policy}}
        args = AppArgs.parse(ours[0].args)
    return schema, ours[0], args


def _refuse_unknown(path: str, prefix: str, body: dict[str, Any], schema: Any) -> None:
    for key in body:
        if key not in schema.model_fields:
            allowed = ", ".join(schema.model_fields)
            raise ConfigError(f"{path}: unknown key {prefix}{key}; allowed are {allowed}")


def check_machine(args: AppArgs) -> None:
    """Raise `ConfigError` for what can be known to fail here before anything is started."""
    check_paths(args)
    if args.cell.device == "cuda":
        import torch

        found = torch.cuda.device_count()
        if found < args.cell.gpus:
            raise ConfigError(f"args.cell: {args.cell.gpus} CUDA devices wanted, {found} found")


def check_paths(args: AppArgs) -> None:
    """Raise `ConfigError` for files that are named and not there, or not what they should be."""
    model = args.model.path
    if model not in EMBEDDED:
        is_hub_id = re.fullmatch(HUB_ID, model)
        if Path(model).is_dir():
            if not (Path(model) / "model_index.json").is_file():
                raise ConfigError(f"args.model.path: {model} holds no model_index.json")
        elif not is_hub_id:
            raise ConfigError(f"args.model.path: no such folder: {model}")
    for index, lora in enumerate(args.model.loras):
        if not Path(lora.path).exists() and not re.fullmatch(HUB_ID, lora.path):
            raise ConfigError(f"args.model.loras.{index}.path: no such file or folder: {lora.path}")
    if args.profile.path is not None:
        load_profile(args, args.profile.path)
    if args.http.api_keys_file is not None:
        load_keys(args.http)


def load_profile(args: AppArgs, path: str) -> Profile:
    """The configured one. Raises `ConfigError` when it cannot be read or cannot serve the configured degrees."""
    profile = Profile.load(path)
    missing = set(args.cell.all_degrees) - set(profile.degrees)
    if missing:
        raise ConfigError(f"args.profile.path: {path} has no degrees {sorted(missing)}")
    return profile


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


def with_whole_paths(args: dict[str, Any]) -> dict[str, Any]:
    """The application's arguments with every path that starts in the working directory written out: nothing that is
    started works there."""
    whole = copy.deepcopy(args)
    places = [
        (whole.get("model"), "path"),
        *((lora, "path") for lora in (whole.get("model") or {}).get("loras") or ()),
        (whole.get("profile"), "path"),
        (whole.get("profile"), "cache_dir"),
        (whole.get("http"), "api_keys_file"),
    ]
    for section, name in places:
        if section and section.get(name) and Path(section[name]).exists():
            section[name] = os.path.abspath(section[name])
    return whole


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if nothing can listen there. Ray would share a port in use without a word."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
