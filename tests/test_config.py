"""Every file of cluster_configs: valid for Serve, valid for us, and it builds; wrong keys are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.config import ProxyLocation

from deployments.app import build
from deployments.cluster_file import load_config
from deployments.config import AppArgs
from deployments.local import cpus_needed
from tetriserve.errors import ConfigError

FILES = sorted((Path(__file__).parent.parent / "cluster_configs").glob("*.yaml"))
CPU_ARGS = {"cell": {"gpus": 2, "device": "cpu", "cpus_per_replica": 0.75, "scheduler_cpus": 0.25}}


def graph(args: dict[str, Any]) -> dict[str, Any]:
    """The deployments of the built application by name."""
    built = build_app(build(args), name="tetriserve")
    assert built.ingress_deployment_name == "Ingress"
    return {deployment.name: deployment for deployment in built.deployments}


def test_the_promised_files_are_there() -> None:
    names = {file.stem for file in FILES}
    assert names >= {"cpu_local", "flux_1xh200", "flux_8xh100", "sd3_4xa40", "flux_multinode"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file(file: Path) -> None:
    schema, application, args = load_config(str(file))
    assert schema.proxy_location == ProxyLocation.EveryNode
    assert (application.name, application.route_prefix) == ("tetriserve", "/")
    deployments = graph(application.args)
    assert set(deployments) == {"Ingress", "Cell", "Pictures"}
    assert {override.name for override in application.deployments} <= set(deployments)
    if args.cell.device == "cpu":
        assert schema.http_options.host == "127.0.0.1"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_profiled_shape_is_served(file: Path) -> None:
    args = load_config(str(file))[2]
    assert all(shape.pixels <= args.model.max_pixels for shape in args.profile.all_shapes)


def test_local_file_fits_two_cores() -> None:
    _, application, args = load_config("cluster_configs/cpu_local.yaml")
    assert sum(bundle["CPU"] for bundle in args.cell.bundles) <= 2
    assert args.model.path == "embedded"
    assert cpus_needed(application, args) >= 2


def test_local_ray_is_large_enough_for_every_cell(tmp_path: Path) -> None:
    body = yaml.safe_load(FILES[0].read_text())
    body["applications"][0]["args"] = {"cell": {"device": "cpu", "gpus": 8, "cpus_per_replica": 2}}
    body["applications"][0]["deployments"] = [
        {"name": "Cell", "autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}
    ]
    file = tmp_path / "many.yaml"
    file.write_text(yaml.safe_dump(body))
    _, application, args = load_config(str(file))
    assert cpus_needed(application, args) >= 3 * (8 * 2 + 1)


def test_cell_lives_in_one_placement_group_on_one_node() -> None:
    deployments = graph({"cell": {"gpus": 4}})
    config = deployments["Cell"]._replica_config
    assert config.placement_group_strategy == "STRICT_PACK"
    assert config.placement_group_bundles == [{"CPU": 1.0}] + [{"CPU": 1.0, "GPU": 1}] * 4
    assert config.ray_actor_options["num_cpus"] == 0
    assert deployments["Ingress"]._replica_config.ray_actor_options["num_cpus"] == 0
    assert AppArgs.parse(CPU_ARGS).cell.bundles == [{"CPU": 0.25}, {"CPU": 0.75}, {"CPU": 0.75}]


def test_queue_limit_is_the_cells_own() -> None:
    """Serve must not hold back what the cell would answer with 503 or count as open."""
    deployments = graph({**CPU_ARGS, "scheduler": {"max_open_requests": 500}})
    assert deployments["Cell"].max_ongoing_requests > 500
    assert deployments["Ingress"].max_ongoing_requests > 500


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"cell": {"gpuz": 2}}, "args.cell.gpuz"),
        ({"sell": {}}, "args.sell"),
        ({"cell": {"gpus": "many"}}, "args.cell.gpus"),
        ({"cell": {"gpus": 0}}, "args.cell.gpus"),
        ({"cell": {"gpus": 2, "degrees": [1, 4]}}, "degrees"),
        ({"cell": {"device": "tpu"}}, "args.cell.device"),
        ({"scheduler": {"policy": "best"}}, "args.scheduler.policy"),
        ({"scheduler": None}, "args.scheduler"),
        ({"profile": {"shapes": ["64"]}}, "args.profile.shapes"),
        ({"http": {"max_n": 11}}, "args.http.max_n"),
        ({"model": {"dtype": "int4"}}, "args.model.dtype"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(args: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(args)
    assert key in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantization": "int4"}, "args.model.quantization: Input should be 'int8' or 'fp8'"),
        ({"compile": "maybe"}, "args.model.compile: "),
        ({"loras": [{"name": "a b", "path": "x"}]}, "args.model.loras.0.name: "),
        ({"loras": [{"name": "a"}]}, "args.model.loras.0.path: "),
        (
            {"loras": [{"name": "a", "path": "x", "scale": 1}]},
            "args.model.loras.0.scale: .* allowed are name, path$",
        ),
        ({"loras": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "names must differ, got a, a"),
        ({"compile": True, "loras": [{"name": "a", "path": "x"}]}, "args.model: compile: not beside loras"),
    ],
)
def test_knobs_of_a_model_are_checked(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AppArgs.parse({**CPU_ARGS, "model": model})
    assert "\n" not in caught.value.message
