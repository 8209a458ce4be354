"""Part of the run: the whole Serve stack, from HTTP to PNG, and the milliseconds that it adds."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from record import Place, Rows

sys.path.append(str(Path(__file__).parent.parent))

NEEDED = ("ray", "fastapi", "httpx", "pulp", "uvicorn")
REQUESTS = 8


def stack(place: Place, rows: Rows) -> None:
    """Requests one after the other through a server of one replica, with the embedded model and the large one."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        rows.add(skipped=f"not installed: {', '.join(missing)}")
        return
    models: dict[str, dict[str, Any]] = {
        "embedded": {"path": "embedded", "dtype": "float32", "max_sequence_length": 64},
        "FLUX.1-dev's dimensions": {"path": str(place.flux), "dtype": "bfloat16", "name": "FLUX.1-dev"},
    }
    for name in list(models)[: 1 if place.small else 2]:
        with rows.or_error(model=name):
            one_model(place, rows, name, models[name])


def one_model(place: Place, rows: Rows, name: str, model: dict[str, Any]) -> None:
    import httpx
    from overhead import over_http
    from server import CONFIG, running_server

    config = yaml.safe_load((Path(__file__).parents[2] / CONFIG).read_text())
    shapes = ["128x128", "256x256"] if place.small else ["512x512", "1024x1024"]
    args = config["applications"][0]["args"]
    args["model"] = model
    args["cell"] |= {"device": place.device, "gpus": 1}
    args["profile"] = {"shapes": shapes, "cache_dir": str(place.scratch / "profiles"), "repeats": 1}
    path = place.scratch / "stack.yaml"
    path.write_text(yaml.safe_dump(config))
    start_s = time.perf_counter()
    with running_server(path, "ilp") as server, httpx.Client(base_url=server.url, timeout=120) as client:
        rows.add(model=name, ready_after_s=time.perf_counter() - start_s)
        for shape in shapes:
            rows.add(model=name, shape=shape, **over_http(client, shape, 4, REQUESTS))
