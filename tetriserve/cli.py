"""The command line: `tetriserve serve`, `generate`, `profile`, `workload`, `simulate`, `bound`."""

from __future__ import annotations

import argparse
import base64
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tetriserve import __version__
from tetriserve.errors import ConfigError, TetriserveError

if TYPE_CHECKING:
    from tetriserve.profile import Profile
    from tetriserve.simulation.trace import TraceRequest

DEFAULT_CONFIG = "cluster_configs/cpu_local.yaml"
PAPER_SHAPES = "256x256,512x512,1024x1024,2048x2048"
PAPER_SLO = "256x256=1.5,512x512=2,1024x1024=3,2048x2048=5"
"""Sizes and deadlines of the TetriServe paper."""


def serve(options: argparse.Namespace) -> int:
    from deployments.local import run

    run(options.config, options.host, options.port, options.policy, options.drain_seconds)


def generate(options: argparse.Namespace) -> int:
    from tetriserve.client import FORMATS, generate

    out: Path = options.out
    preview: Path | None = options.preview
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {out}: the suffix must be one of {', '.join(FORMATS)}")
    if preview is not None and FORMATS.get(preview.suffix.lower()) != FORMATS[out.suffix.lower()]:
        raise ConfigError(f"--preview {preview}: must be of the same format as --out {out}")
    for option, file in (("--out", out), ("--preview", preview)):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{option} {file}: no such folder: {file.parent}")
    body = {
        "prompt": options.prompt,
        "size": options.size or (None if options.image else "1024x1024"),
        "strength": options.strength,
        "n": options.n,
        "num_inference_steps": options.steps,
        "seed": options.seed,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "slo_ms": None if options.slo is None else options.slo * 1000,
    }
    present = {name: value for name, value in body.items() if value is not None}
    if options.image:
        present["image"] = [_data_url(file) for file in options.image]
    explain = None
    if options.verbose:
        from tetriserve.scheduler.explain import of_metrics  # brings numpy along

        explain = of_metrics
    print("\n".join(generate(options.url, present, out, preview, explain=explain)))
    return 0


def _data_url(file: Path) -> str:
    """Of a picture for `--image`."""
    from tetriserve.client import FORMATS

    kind = FORMATS.get(file.suffix.lower())
    if kind is None:
        raise ConfigError(f"--image {file}: the suffix must be one of {', '.join(FORMATS)}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--image {file}: {error.strerror}") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def profile(options: argparse.Namespace) -> int:
    from deployments.cell.profiling import run
    from deployments.cluster_file import check_machine, load_config

    if options.from_live is not None:
        from tetriserve.client import live_profile

        try:
            options.out.write_text(live_profile(options.from_live).to_yaml(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from None
        print(f"wrote {options.out}")
        return 0
    _, _, args = load_config(options.config)
    check_machine(args)
    run(args, options.out)
    return 0


def workload(options: argparse.Namespace) -> int:
    from tetriserve.profile import Profile
    from tetriserve.simulation.trace import write_trace
    from tetriserve.simulation.workload import SloRule, Workload, parse_shapes

    shapes = options.shapes or ("1024x1024" if options.mix == "homogeneous" else PAPER_SHAPES)
    requests = Workload(
        options.mix,
        options.rate,
        options.requests,
        shapes=parse_shapes(shapes),
        steps=options.steps,
        slo=SloRule.parse(options.slo),
        slo_scale=options.slo_scale,
        seed=options.seed,
        profile=None if options.profile is None else Profile.load(options.profile),
        n_gpus=options.gpus,
    ).generate()
    write_trace(options.out, requests)
    print(f"{len(requests)} requests over {requests[-1].arrival_s:.1f} s: {options.out}")
    return 0


def simulate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tetriserve.request import PlannedWith
    from tetriserve.scheduler.explain import of_result
    from tetriserve.simulation.plot import draw_board
    from tetriserve.simulation.result import result_of, summary_table, write_json
    from tetriserve.simulation.simulate import Disturbance, Reuse, named_policy, simulate
    from tetriserve.simulation.timeline import timeline

    for out in (options.out, options.timeline, options.plot):
        if out is not None and not out.parent.is_dir():
            raise ConfigError(f"{out}: no such folder: {out.parent}")
        if out is not None and out.is_dir():
            raise ConfigError(f"{out}: is a folder")
    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {options.plot}: the suffix must be .png, .svg or .pdf")
    policy = named_policy(options.policy, options.gpus, options.plan_limit_ms / 1000, options.round_steps)
    profile, trace = _profile_and_trace(options)
    explained = next((request for request in trace if request.id == options.verbose), None)
    if options.verbose is not None and explained is None:
        raise ConfigError(f"--verbose {options.verbose}: {options.trace} has no such request")
    disturbance = Disturbance(options.switch_ms / 1000, options.jitter, options.seed)
    with tqdm(total=len(trace), desc=policy.name, unit="request", delay=2) as bar:
        done = simulate(
            trace,
            profile,
            policy,
            options.gpus,
            disturbance=disturbance,
            reuse=Reuse(options.reuse, options.reuse_every),
            max_batch=options.max_batch,
            on_settled=bar.update,
        )
    result = result_of(policy.name, options.gpus, done.outcomes, done.schedule, done.plan_ms)
    write_json(options.out, result)
    if options.timeline is not None:
        write_json(options.timeline, timeline({0: result}))
    if options.plot is not None:
        draw_board(result, options.gpus, options.plot)
    print(summary_table(result["summary"]))
    if explained is not None:
        planned = PlannedWith.of(explained.chain(profile, options.gpus))
        steps, slo_s = explained.num_inference_steps, explained.slo_s
        deadline = "no deadline" if slo_s is None else f"deadline {slo_s:.3g} s"
        print(f"\n{explained.id}  {explained.shape}  {steps} steps  {deadline}")
        print("\n".join(of_result(result, explained.id, planned, steps)))
    return 0


def bench(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tetriserve.simulation.replay import replay
    from tetriserve.simulation.result import result_of, summary_table, write_json
    from tetriserve.simulation.trace import read_trace

    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: no such folder: {options.out.parent}")
    trace = list(read_trace(options.trace))
    with tqdm(total=len(trace), desc="bench", unit="request") as bar:
        done = replay(options.url, trace, bar.update)
    result = result_of(done.policy, done.n_gpus, done.outcomes, done.schedule, done.plan_ms)
    write_json(options.out, result)
    print(summary_table(result["summary"]))
    if done.errors:
        print(f"{len(done.errors)} requests ended with an error; {done.errors[0]}", file=sys.stderr)
    return 1 if done.errors else 0


def bound(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from solver.bound import Known, clairvoyant_bound

    profile, trace = _profile_and_trace(options)
    known = [Known(r.arrival_s, r.deadline_s, r.chain(profile, options.gpus)) for r in trace]
    with tqdm(total=len(known), desc="bound", unit="request", delay=2) as bar:
        best = clairvoyant_bound(known, options.gpus, time_limit_s=options.time_limit, on_solved=bar.update)
    print(
        f"SLO attainment at most {best.slo_attainment:.4f}: {best.on_time} of {best.requests} requests on time; "
        f"{best.found} of them take at least {best.gpu_seconds:.1f} GPU-seconds"
    )
    if not best.is_optimal:
        print(
            f"not solved to the optimum within {options.time_limit:g} s: the bound is valid, but may be loose"
        )
    return 0


def _profile_and_trace(options: argparse.Namespace) -> tuple[Profile, list[TraceRequest]]:
    """What --profile and --trace say, every request with a deadline; what was made up is said on stderr."""
    from tetriserve.profile import Profile
    from tetriserve.simulation.trace import read_trace
    from tetriserve.simulation.workload import SloRule

    profile = Profile.load(options.profile)
    rule = SloRule.parse(options.slo)
    trace, filled = rule.fill(list(read_trace(options.trace)), profile, options.gpus)
    for request in trace:
        request.chain(profile, options.gpus)  # so that nothing is said about what is refused
    if filled:
        print(f"{filled} requests bring no slo_s, --slo {options.slo} gives them one", file=sys.stderr)
    interpolated = sorted({r.shape for r in trace if profile.interpolates(r.shape)})
    if interpolated:
        shapes = ", ".join(str(shape) for shape in interpolated)
        print(f"not in the profile, step times interpolated: {shapes}", file=sys.stderr)
    return profile, trace


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns 0, 1 for a failure while it ran, 2 for what was asked wrongly."""
    options = _parser().parse_args(argv)
    _let_warnings_be_warnings()
    try:
        code: int = options.run(options)
    except TetriserveError as error:
        print(f"tetriserve: error: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return code


def _let_warnings_be_warnings() -> None:
    """Who makes errors of them by the environment (`PYTHONWARNINGS=error`) means their own code, not what we use."""
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.resetwarnings()
    if asked := os.environ.get("PYTHONWARNINGS"):
        kept = [one for one in asked.split(",") if not one.strip().startswith("error")]
        os.environ["PYTHONWARNINGS"] = ",".join(kept)


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
    sub.add_argument(
        "--drain-seconds",
        type=_not_negative,
        default=10.0,
        metavar="SECONDS",
        help="how long running requests may go on after Ctrl-C (default: %(default)g)",
    )

    sub = command(
        "generate",
        generate,
        "Ask a running server for pictures and write them to files.",
        'tetriserve generate "a red circle" --size 512x512 --slo 5 --out circle.png',
    )
    sub.add_argument("prompt")
    sub.add_argument("--size", type=_size, help="WIDTHxHEIGHT (default: 1024x1024, or like --image)")
    sub.add_argument(
        "--image", type=Path, action="append", metavar="FILE", help="a picture to edit; may be repeated"
    )
    sub.add_argument(
        "--strength", type=_finite, help="how much of --image is made anew, up to 1 (default: the model's)"
    )
    sub.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    sub.add_argument("--seed", type=int, help="of the first picture; the next ones count up")
    sub.add_argument("--guidance", type=_finite, help="guidance scale (default: the model's)")
    sub.add_argument("--negative-prompt")
    sub.add_argument("--slo", type=_positive, metavar="SECONDS", help="deadline from arrival at the server")
    sub.add_argument("--n", type=int, default=1, help="number of pictures (default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("tetriserve.png"), help="default: %(default)s")
    sub.add_argument("--preview", type=Path, metavar="FILE", help="write rough pictures there on the way")
    sub.add_argument("--verbose", action="store_true", help="say why each step range ran at its degree")
    sub.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")

    sub = command(
        "profile",
        profile,
        "Measure step times by shape and degree on this machine and write them to a profile file.",
        "tetriserve profile --config cluster_configs/cpu_local.yaml --out profile.yaml",
    )
    sub.add_argument("--config", default=DEFAULT_CONFIG, help="Serve config file (default: %(default)s)")
    sub.add_argument(
        "--from-live", metavar="URL", help="write what the server there has measured; nothing is run"
    )
    sub.add_argument("--out", type=Path, required=True, help="profile to write")

    sub = command(
        "workload",
        workload,
        "Write a synthetic trace of requests with deadlines.",
        "tetriserve workload --mix skewed --rate 12 --requests 300 --seed 1 --out trace.jsonl",
    )
    sub.add_argument("--mix", required=True, help="uniform, skewed, bursty or homogeneous")
    sub.add_argument("--rate", type=_positive, required=True, metavar="PER_MINUTE", help="mean arrivals")
    sub.add_argument("--requests", type=_count, default=300, help="default: %(default)s")
    sub.add_argument(
        "--slo-scale", type=_positive, default=1.0, help="factor on --slo (default: %(default)s)"
    )
    sub.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    sub.add_argument(
        "--shapes",
        help=f"with weights where they differ, 256x256=20,512x512 (default: {PAPER_SHAPES}; homogeneous: 1024x1024)",
    )
    _add_slo(sub, PAPER_SLO)
    sub.add_argument("--steps", type=_count, default=28, help="denoising steps (default: %(default)s)")
    sub.add_argument("--profile", type=Path, help="profile for an --slo like 2.5x")
    sub.add_argument(
        "--gpus", type=_gpus, default=8, help="GPUs for an --slo like 2.5x (default: %(default)s)"
    )
    sub.add_argument("--out", type=Path, required=True, help="trace to write")

    sub = command(
        "simulate",
        simulate,
        "Play a trace on simulated GPUs under the scheduler of the server.",
        "tetriserve simulate --profile bench/profiles/flux_h100_derived.yaml --trace trace.jsonl --out result.json",
    )
    _add_cell(sub)
    sub.add_argument(
        "--policy", default="ilp", help="ilp, dp, edf, rssp, sp1, ..., sp8 (default: %(default)s)"
    )
    sub.add_argument("--round-steps", type=_positive, help="round length in steps of the largest open shape")
    sub.add_argument(
        "--plan-limit-ms", type=_positive, default=1000.0, help="limit of one decision (default: %(default)g)"
    )
    sub.add_argument(
        "--switch-ms",
        type=_not_negative,
        default=0.0,
        help="cost of changing the GPU set (default: %(default)g)",
    )
    sub.add_argument(
        "--jitter", type=_not_negative, default=0.0, metavar="SHARE", help="spread of step times, like 0.03"
    )
    sub.add_argument("--seed", type=_seed, default=0, help="of the jitter (default: %(default)s)")
    sub.add_argument(
        "--reuse",
        choices=("never", "late", "always"),
        default="never",
        help="extrapolate steps of requests that would be late, or of all (default: %(default)s)",
    )
    sub.add_argument(
        "--reuse-every",
        type=_count,
        default=2,
        metavar="N",
        help="then behind the first ones every N-th step is computed (default: %(default)s)",
    )
    sub.add_argument(
        "--max-batch",
        type=_count,
        default=8,
        metavar="N",
        help="so many requests may share a step, where the profile has the batch law (default: %(default)s)",
    )
    sub.add_argument("--out", type=Path, required=True, help="result to write")
    sub.add_argument(
        "--timeline", type=Path, metavar="JSON", help="also write trace events for ui.perfetto.dev"
    )
    sub.add_argument("--plot", type=Path, metavar="PNG", help="also draw the board, GPU x time")
    sub.add_argument(
        "--verbose", metavar="REQUEST_ID", help="say why each step range of that request ran at its degree"
    )

    sub = command(
        "bench",
        bench,
        "Play a trace against a running server; arrivals never wait for answers.",
        "tetriserve bench --url http://127.0.0.1:8000 --trace trace.jsonl --out result.json",
    )
    sub.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    sub.add_argument("--trace", type=Path, required=True, help="JSON lines, or a text trace of Hetu-DiT")
    sub.add_argument("--out", type=Path, required=True, help="result to write")

    sub = command(
        "bound",
        bound,
        "Say how many requests of a trace any scheduler could have on time at most.",
        "tetriserve bound --profile bench/profiles/flux_h100_derived.yaml --trace trace.jsonl --gpus 8",
    )
    _add_cell(sub)
    sub.add_argument(
        "--time-limit", type=_positive, default=60.0, metavar="SECONDS", help="default: %(default)g"
    )
    return parser


def _add_cell(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--profile", type=Path, required=True, help="step times, as `tetriserve profile` writes them"
    )
    sub.add_argument("--trace", type=Path, required=True, help="JSON lines, or a text trace of Hetu-DiT")
    sub.add_argument("--gpus", type=_gpus, default=8, help="default: %(default)s")
    _add_slo(sub, "2.5x", " for requests that bring none")


def _add_slo(sub: argparse.ArgumentParser, default: str, when: str = "") -> None:
    says = f"deadline{when}: seconds by shape, or like 2.5x the best time alone (default: %(default)s)"
    sub.add_argument("--slo", default=default, help=says)


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port")
    return port


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must look like 512x768 (WIDTHxHEIGHT), got {text!r}")
    return text


def _whole(text: str, low: int, high: int) -> int:
    number = int(text)
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text!r}")
    return number


def _count(text: str) -> int:
    return _whole(text, 1, 100_000)


def _gpus(text: str) -> int:
    return _whole(text, 1, 1024)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1)


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


def _not_negative(text: str) -> float:
    number = _finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
