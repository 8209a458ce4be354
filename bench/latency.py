"""How long requests on time take under `ilp` and under `dp`, like for like.

    python bench/latency.py [--cells l20-uniform-9 ...] [--seeds 0 1 2]

The plain means of `policies.md` are over different requests: who has more of the long ones on time has the longer
mean. Here only requests count that both have on time. `dp` runs at its best round length of that cell. Writes
`latency.md` and `latency.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from policies import HERE, play
from policy_report import markdown_table
from suite import SUITE, VARIANTS, Cell, Variant
from tqdm import tqdm

from tetriserve.simulation.result import write_json

ROWS = (
    "ilp, all its own",
    "dp, all its own",
    "ilp, those both have",
    "dp, those both have",
    "requests both have",
)


def met_s(cell: Cell, variant: Variant, seed: int) -> dict[str, float]:
    """Latency in seconds of the requests on time, by id."""
    outcomes = play(cell, variant, seed).outcomes
    return {o.id: o.latency_s for o in outcomes if o.met and o.latency_s is not None}


def measure(cell: Cell, dp: Variant, seeds: list[int]) -> dict[str, float]:
    """Mean seconds per row of the table, over the requests of all seeds."""
    ilp = next(variant for variant in VARIANTS if variant.name == "ilp")
    mine, theirs = ({(s, id): t for s in seeds for id, t in met_s(cell, v, s).items()} for v in (ilp, dp))
    both = mine.keys() & theirs.keys()
    means = (
        statistics.fmean(mine.values()),
        statistics.fmean(theirs.values()),
        statistics.fmean(mine[key] for key in both),
        statistics.fmean(theirs[key] for key in both),
        len(both) / (len(seeds) * cell.n_requests),
    )
    return dict(zip(ROWS, means, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells = {cell.name: cell for cell in SUITE}
    default = ["h100-uniform-12", "h100-uniform-24", "h100-uniform-36", "l20-uniform-9", "l20-uniform-18"]
    parser.add_argument("--cells", nargs="+", default=default, choices=cells, metavar="CELL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "policies")
    options = parser.parse_args()
    rows = {row["cell"]: row for row in json.loads((options.out / "policies.json").read_text())}
    table: dict[str, dict[str, float]] = {}
    for name in (bar := tqdm(options.cells, unit="cell")):
        bar.set_description(name)
        best = rows[name]["policies"]["dp"]["variant"]
        dp = next(variant for variant in VARIANTS if variant.name == best)
        table[name] = measure(cells[name], dp, options.seeds)
    write_json(options.out / "latency.json", table)
    body = [[row, *(f"{cell[row]:.3f}" for cell in table.values())] for row in ROWS]
    cells_and_seeds = f"--cells {' '.join(options.cells)} --seeds {' '.join(map(str, options.seeds))}"
    text = f"`python bench/latency.py {cells_and_seeds}`: mean latency of requests on time in seconds"
    (options.out / "latency.md").write_text(f"{text}\n\n{markdown_table(['', *table], body)}\n")


if __name__ == "__main__":
    main()
