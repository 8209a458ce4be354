"""Two cells on two nodes (raylets of their own on this machine): losing a node takes its cell away, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from live_server import write_config

PROFILE = {
    "model": "tiny-flux",
    "device": "CPU, one thread",
    "source": "made up",
    "degrees": [1],
    "step_seconds": {"256x256": {1: 0.02}, "512x512": {1: 0.1}},
}

SCRIPT = """
import sys, time
import numpy as np, ray, yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema
from deployments.local import deploy
from tetriserve.request import GenerateRequest

# no CPUs on the head: no cell can move there
head = {"num_cpus": 0, "resources": {"head": 1}, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    deploy(ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1]))))
    while serve.status().applications["tetriserve"].status != "RUNNING":
        assert serve.status().applications["tetriserve"].status != "DEPLOY_FAILED", serve.status()
        time.sleep(0.5)
    handle = serve.get_app_handle("tetriserve")

    def picture(seed):
        return GenerateRequest(f"a red circle, number {seed}", 512, 512, num_inference_steps=20, seed=seed)

    def cells():
        return [cell for cell in handle.statuses.remote().result() if cell.ready]

    def wait_until(condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, cells()
            time.sleep(0.2)

    alone = [handle.generate.remote(picture(seed)).result(timeout_s=120).image for seed in range(6)]
    assert len(cells()) == 2, cells()
    calls = [handle.generate.remote(picture(seed)) for seed in range(6)]
    wait_until(lambda: all(cell.running for cell in cells()))
    cluster.remove_node(nodes[1], allow_graceful=False)
    for seed, call in enumerate(calls):
        image = call.result(timeout_s=180).image
        assert np.abs(image.astype(int) - alone[seed]).max() <= 1, seed
    wait_until(lambda: len(cells()) == 1)
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(cells()) == 2)
    print("a node brings the cell back", flush=True)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_lost_node_takes_only_its_cell(tmp_path: Path) -> None:
    path = write_config(tmp_path, PROFILE, gpus=1, cpus_per_replica=0.75, scheduler_cpus=0.25)
    config = yaml.safe_load(path.read_text())
    config["applications"][0]["deployments"] = [
        {"name": "Cell", "num_replicas": 2},
        # what this test asks must not die with the node
        *(
            {"name": name, "ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.1}}}
            for name in ("Ingress", "Pictures")
        ),
    ]
    path.write_text(yaml.safe_dump(config))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # Ray's sockets want short names
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path)],
            capture_output=True,
            text=True,
            timeout=280,
            # "the cluster of this machine", which other programs may look for, is not this one
            env={**os.environ, "RAY_TMPDIR": folder, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"},
        )
    assert "a node brings the cell back" in done.stdout, done.stdout + done.stderr
