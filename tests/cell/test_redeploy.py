"""Deploying again over cells that run: what cannot start touches nothing, knobs are turned without a gap."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from live_server import write_config

PROFILE = {
    "model": "tiny-flux",
    "device": "CPU",
    "source": "made up",
    "degrees": [1, 2],
    "step_seconds": {"256x256": {1: 0.02, 2: 0.02}},
}

SCRIPT = """
import copy, os, sys, threading, time
from pathlib import Path
import ray, yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from deployments.local import deploy
from tetriserve.request import GenerateRequest

ray.init(num_cpus=4, namespace="serve", log_to_driver=False, include_dashboard=False)
body = yaml.safe_load(open(sys.argv[1]))
folder = Path(sys.argv[1]).parent

def application():
    return serve.status().applications["tetriserve"]

steps = []  # what was deployed

def deployed(change=lambda app: None, until="RUNNING"):
    new = copy.deepcopy(body)
    change(new["applications"][0])
    steps.append(new["applications"][0].get("deployments") or new["applications"][0]["args"]["http"])
    deploy(ServeDeploySchema.model_validate(new))
    return wait(lambda: application().status == until, application)

def wait(condition, about):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, about()
        time.sleep(0.1)
    return about()

deployed()
handle = serve.get_app_handle("tetriserve")
served, failed, stop = [], [], threading.Event()

def ask(seed=1):
    request = GenerateRequest("a red circle", 256, 256, num_inference_steps=2, seed=seed, slo_s=30)
    return handle.generate.remote(request).result(timeout_s=60)

def ask_forever():
    while not stop.is_set():
        try:
            served.append(ask())
        except Exception as error:
            failed.append((len(served), steps[-1], repr(error)[:300]))

def status():
    (cell,) = handle.statuses.remote().result(timeout_s=10)
    return cell

def refused(change, *says):
    before = len(served)
    message = deployed(change, "DEPLOY_FAILED").message
    for words in (*says, "left as it is"):
        assert words in message, message
    wait(lambda: len(served) > before + 3, lambda: (len(served), failed))

def args(section, **fields):
    return lambda app: app["args"][section].update(fields)

asking = threading.Thread(target=ask_forever, daemon=True)
asking.start()
refused(args("model", path=str(folder / "gone")), "args.model.path: no such folder")
refused(args("cell", gpus=64), "args.cell.gpus: 64 replicas need", "the largest has")
refused(args("profile", path=str(folder / "gone.yaml")), "gone.yaml")
keys = folder / "keys"
keys.write_text("short")
refused(args("http", api_keys_file=str(folder / "nowhere")), "api_keys_file")
message = deployed(args("http", api_keys_file=str(keys)), "DEPLOY_FAILED").message
assert "shorter than 16" in message, message
deployed()  # what runs goes on, though the file is the old one again
assert not failed, failed
print("refused, and nobody noticed")

# the same configuration with knobs turned: nothing is started anew
deployed()
before = len(served)

def knobs(**of_cell):
    return lambda app: app.update(deployments=[{"name": "Cell", "user_config": of_cell}])

deployed(knobs(policy="edf", reject_infeasible=True))
wait(lambda: status().policy == "edf", status)
wait(lambda: len(served) > before + 3, lambda: (len(served), failed))
try:
    handle.generate.remote(GenerateRequest("a", 256, 256, num_inference_steps=50, slo_s=0.05)).result(timeout_s=60)
    raise AssertionError("the rule for requests that do not say is not the new one")
except Exception as error:
    assert "DeadlineInfeasible" in repr(error) + repr(getattr(error, "cause", "")), error
deployed(knobs(policy="best"))
wait(lambda: "policy" in status().refused, status)
assert status().policy == "edf" and status().ready
deployed(knobs(max_open_requests=10**6))
wait(lambda: "at most 64" in status().refused, status)
deployed(knobs())
wait(lambda: status().policy == "ilp" and not status().refused, status)
assert not failed, failed
print("knobs turned without a gap")

stop.set()
asking.join()
keys.write_text("a-key-that-is-long-enough")
start = time.monotonic()
deployed(args("http", api_keys_file=str(keys)))
wait(lambda: ask(2), lambda: None)
print(f"replaced in {time.monotonic() - start:.1f} s, the keys mended and the same file deployed")
"""


@pytest.mark.slow
def test_deploying_again(tmp_path: Path) -> None:
    config = write_config(tmp_path, PROFILE, step_timeout_floor_s=60)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Ray's sockets have long names
    with tempfile.TemporaryDirectory(prefix="ts", dir="/tmp") as folder:
        env = {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, str(script), str(config)], env=env, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "knobs turned without a gap" in done.stdout
    print(done.stdout)
