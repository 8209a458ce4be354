"""Ray and Serve on one machine, from a cluster config: what `tetriserve serve` runs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
import psutil
import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deployments.cluster_file import INSTALLED, check_machine, check_port, load_config, with_whole_paths
from deployments.config import AppArgs
from deployments.guard import start_guard
from deployments.logs import logger
from deployments.progress import notes
from tetriserve.client import follows_environment
from tetriserve.errors import ConfigError, TetriserveError

POLL_S = 0.3
STOP_S = 10.0
"""How long Serve may take to stop what it runs."""
ASK_S = 5.0
"""Until a cell has answered."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
PROXY_CALLBACK = "deployments.http.plain:take_offers_as_requests"
"""Ray Serve's HTTP proxy calls it when it starts."""
LAST_ANSWERS_S = 0.3
"""From the ingress through Serve's proxy to the client."""


class ServeFailed(TetriserveError):
    """The application could not be started; the message is the reason in one line."""


def run(
    config: str, host: str | None, port: int | None, policy: str | None, drain_s: float = 10.0
) -> NoReturn:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; nothing is left running after it.

    What runs then is finished within `drain_s` seconds, and no new request is let in; a second signal stops at once.
    `host`, `port` and `policy` win over the file's. Raises `ConfigError` before anything is started, `ServeFailed`
    after everything is stopped again.
    """
    schema, application, args = load_config(config, policy)
    http = schema.http_options
    http = http.model_copy(update={"host": host or http.host, "port": port or http.port})
    schema = schema.model_copy(update={"http_options": http})
    check_port(http.host, http.port)
    check_machine(args)
    application.args = with_whole_paths(application.args)
    if args.profile.path is not None and not Path(args.profile.path).is_file():
        raise ConfigError(f"args.profile.path: no such file: {args.profile.path}")

    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
    reachable = f"[{reachable}]" if ":" in reachable else reachable
    url = f"http://{reachable}:{http.port}{(application.route_prefix or '').rstrip('/')}"
    out = sys.stdout
    client: Any = None
    is_ready = False
    start_guard()
    adopt_orphans()
    handle_signals()
    try:
        # Ray's helper processes report on stdout what is also in a status or a log
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            print("starting Ray ...", file=out, flush=True)
            start_ray(cpus_needed(application, args))
            handle_signals()  # ray.init has put its own handler of SIGTERM in place
            try:
                client = deploy(schema)
            except Exception as error:
                raise ServeFailed(f"Ray Serve does not start: {one_line(str(error))}") from error
            work = f"load {args.model.path}" + (", compile it" if args.model.compile else "")
            work += "" if args.profile.path else ", measure step times if new"
            print(f"starting {args.cell.gpus} replicas: {work} ...", file=out, flush=True)
            name = wait_until_ready(
                application.name, url, lambda note: print(f"  {note}", file=out, flush=True)
            )
        replicas = f"{args.cell.gpus} replicas on {args.cell.device}"
        print(f"tetriserve is ready at {url} (model {name}, {replicas})", flush=True)
        is_ready = True
        while True:
            signal.pause()
    except (KeyboardInterrupt, SystemExit):  # the latter is Ray's answer to SIGTERM while it starts
        ignore_signals()
        print("stopping ...", file=out, flush=True)
        if is_ready:
            with contextlib.suppress(KeyboardInterrupt):
                handle_signals()
                drain(application.name, drain_s, lambda note: print(f"  {note}", file=out, flush=True))
    finally:
        ignore_signals()
        stop(client)
    # nothing is left to clean up, and where Ray's start was cut short its threads abort a regular exit
    os._exit(0)


def handle_signals() -> None:
    """The next Ctrl-C, SIGTERM or SIGHUP raises KeyboardInterrupt; later ones must not cut the cleaning short."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def drain(name: str, seconds: float, report: Callable[[str], None]) -> None:
    """Let no request in any more, and wait until the open ones are answered or know that they will not be."""
    router = serve.get_app_handle(name)
    end_s = time.monotonic() + seconds
    said = False
    with contextlib.suppress(Exception):  # where no cell answers nothing can be finished either
        while opened := router.drain.remote().result(timeout_s=ASK_S):
            if time.monotonic() > end_s:
                report(f"{opened} requests were not finished within {seconds:g} s")
                router.drain.remote(at_once=True).result(timeout_s=ASK_S)
                break
            if not said:
                report(
                    f"{opened} requests are finished first, for at most {seconds:g} s; Ctrl-C again stops at once"
                )
                said = True
            time.sleep(POLL_S)
        time.sleep(LAST_ANSWERS_S if said else 0)


def cpus_needed(application: ServeApplicationSchema, args: AppArgs) -> int:
    """Ray CPUs that hold all cells of the file."""
    override = next((item for item in application.deployments if item.name == "Cell"), None)
    settings = override.model_dump(exclude_unset=True) if override else {}
    cells = (settings.get("autoscaling_config") or {}).get("max_replicas") or settings.get("num_replicas")
    bundles = settings.get("placement_group_bundles") or args.cell.bundles
    per_cell = sum(bundle.get("CPU", 0.0) for bundle in bundles)
    return math.ceil(per_cell * (cells if isinstance(cells, int) else 1))


def start_ray(cpus: float) -> None:
    """A private Ray on this machine, quiet and without a dashboard; others may run beside it.

    Ray is told of `cpus` at least, however few cores there are: they are its bookkeeping, not a limit. Raises
    `ServeFailed`.
    """
    logger.setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would remember every call for a dashboard that is not there: 60 MiB in an hour (bench/soak.py)
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    # glibc would keep up to eight heaps a core, and what is free in one serves no thread of another (bench/soak.py)
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Serve kills a proxy that takes 5 s to start, as it may on a busy machine or the first time after installing
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", PROXY_CALLBACK)
    give_token()
    # Ray's workers look for modules where this process works, before they look among what is installed
    with working_in(INSTALLED):
        try:
            ray.init(
                address="local",
                namespace="serve",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            names = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
            where = f"in {names[0]}={os.environ[names[0]]}" if names else "in /tmp, or where RAY_TMPDIR says"
            reason = one_line(str(error)) or type(error).__name__
            raise ServeFailed(f"Ray does not start: {reason} (it works {where})") from error


def give_token() -> None:
    """Ray keeps the token by which its processes know each other in the home folder. Where none can be kept it gets
    one for this server alone: then no other program can connect to its Ray, all else works."""
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(exist_ok=True)
        is_kept = os.access(folder / "auth_token", os.R_OK) or os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        is_kept = False
    if not is_kept and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """With another working directory; back in this one, which may be gone meanwhile, afterwards."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def deploy(schema: ServeDeploySchema) -> Any:
    """Start Serve and hand it the file, as `serve run FILE` does. Returns Serve's client."""
    client = serve_start(
        http_options=schema.http_options.model_dump(),
        grpc_options=schema.grpc_options.model_dump(),
        proxy_location=schema.proxy_location,
        global_logging_config=schema.logging_config,
    )
    client.deploy_apps(schema)
    return client


def wait_until_ready(name: str, url: str, report: Callable[[str], None]) -> str:
    """Wait for /health, reporting each new thing waited for. Returns the served model's name.

    Raises `ServeFailed` when Serve gives the application up.
    """
    said: set[str] = set()
    while True:
        application = serve.status().applications[name]
        messages = [status.message for status in application.deployments.values() if status.message]
        note = one_line("\n".join(messages))
        if application.status == "DEPLOY_FAILED":
            raise ServeFailed(note or one_line(application.message))
        if application.status == "RUNNING":
            with contextlib.suppress(httpx.HTTPError, ValueError):
                health = httpx.get(f"{url}/health", timeout=5, trust_env=follows_environment(url))
                if health.status_code == 200:
                    # by the handle, which needs no API key
                    return str(serve.get_app_handle(name).model_info.remote().result().name)
                note = health.json()["reason"]
        for text in (note, *notes()):
            if text and text not in said:
                report(text)
                said.add(text)
        time.sleep(POLL_S)


def one_line(message: str) -> str:
    """The last error named in a traceback, or the first line of any other message."""
    lines = [line for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: \S", line)]
    if "Traceback (most recent call last)" not in message or not errors:
        return lines[0] if lines else ""
    return re.sub(r"^tetriserve\.errors\.\w+: ", "", errors[-1])


def adopt_orphans() -> None:
    """Become the parent of every process whose own parent ends, so that `stop` finds all of them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stop(client: Any) -> None:
    """Stop Serve, then Ray and every process of theirs, also those of a start that was interrupted."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        if client is not None:
            with contextlib.suppress(Exception):  # whatever it is, Ray goes next and takes all with it
                client.shutdown(STOP_S)
        if ray.is_initialized():
            ray.shutdown()
    me = psutil.Process()
    while family := me.children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=1)
