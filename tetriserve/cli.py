"""The command line: `tetriserve serve`, `generate`, `profile`."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tetriserve import __version__
from tetriserve.errors import ConfigError, TetriserveError

DEFAULT_CONFIG = "cluster_configs/cpu_local.yaml"


def serve(options: argparse.Namespace) -> int:
    from deployments.local import run

    run(options.config, options.host, options.port, options.policy)


def generate(options: argparse.Namespace) -> int:
    from tetriserve.client import FORMATS, generate

    out: Path = options.out
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {out}: the suffix must be one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: no such folder: {out.parent}")
    body = {
        "prompt": options.prompt,
        "size": options.size,
        "n": options.n,
        "num_inference_steps": options.steps,
        "seed": options.seed,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "slo_ms": None if options.slo is None else options.slo * 1000,
    }
    present = {name: value for name, value in body.items() if value is not None}
    print("\n".join(generate(options.url, present, out)))
    return 0


def profile(options: argparse.Namespace) -> int:
    from deployments.local import check_machine, load_config
    from deployments.profiling import run

    _, _, args = load_config(options.config)
    check_machine(args)
    run(args, options.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns 0, 1 for a failure while it ran, 2 for what was asked wrongly."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except TetriserveError as error:
        print(f"tetriserve: error: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tetriserve", description="Serve diffusion transformers under deadlines."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "serve",
        serve,
        "Start Ray and Serve on this machine with a cluster config; Ctrl-C stops all of it.",
        "tetriserve serve --config cluster_configs/flux_1xh200.yaml --port 8000",
    )
    sub.add_argument("--config", default=DEFAULT_CONFIG, help="Serve config file (default: %(default)s)")
    sub.add_argument("--port", type=_port, help="instead of the file's http_options.port")
    sub.add_argument("--host", help="instead of the file's http_options.host")
    sub.add_argument("--policy", help="instead of the file's scheduler.policy (ilp, dp, edf, sp1, ..., rssp)")

    sub = command(
        "generate",
        generate,
        "Ask a running server for pictures and write them to files.",
        'tetriserve generate "a red circle" --size 512x512 --slo 5 --out circle.png',
    )
    sub.add_argument("prompt")
    sub.add_argument("--size", type=_size, default="1024x1024", help="WIDTHxHEIGHT (default: %(default)s)")
    sub.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    sub.add_argument("--seed", type=int, help="of the first picture; the next ones count up")
    sub.add_argument("--guidance", type=_finite, help="guidance scale (default: the model's)")
    sub.add_argument("--negative-prompt")
    sub.add_argument("--slo", type=_positive, metavar="SECONDS", help="deadline from arrival at the server")
    sub.add_argument("--n", type=int, default=1, help="number of pictures (default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("tetriserve.png"), help="default: %(default)s")
    sub.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")

    sub = command(
        "profile",
        profile,
        "Measure step times by shape and degree on this machine and write them to a profile file.",
        "tetriserve profile --config cluster_configs/cpu_local.yaml --out profile.yaml",
    )
    sub.add_argument("--config", default=DEFAULT_CONFIG, help="Serve config file (default: %(default)s)")
    sub.add_argument("--out", type=Path, required=True, help="profile to write")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port")
    return port


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must look like 512x768 (WIDTHxHEIGHT), got {text!r}")
    return text


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return number


def _positive(text: str) -> float:
    number = _finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
