"""The whole stack as its users meet it: `tetriserve serve` in a process of its own, real replicas, real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from live_server import BIN, Server, body, pixels, wait_until, write_config
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from schedule_checker import Chain, violations

from solver.problem import Entry, Phase, Shared
from tetriserve.scheduler.explain import of_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    logging = {"encoding": "JSON", "log_level": "DEBUG", "logs_dir": str(root / "logs")}
    return write_config(root, logging=logging)


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[Server]:
    server = Server(config)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def at_rest(server: Server) -> Iterator[None]:
    """Behind every test nothing is open, in flight or held, and both replicas are there."""
    yield

    def gauges() -> list[list[int]]:
        names = ("gpus_ready", "open_requests", "running", "held")
        return [[cell[name] for name in names] for cell in server.health()["cells"]]

    wait_until(lambda: gauges() == [[2, 0, 0, 0]], seconds=60)


def test_mixed_load_gives_the_pictures_of_lone_requests(server: Server) -> None:
    """Tens of requests of three sizes at once: all answered, degrees change on the way, pictures do not."""
    load = [body("256x256", seed) for seed in range(14)]
    load += [body("512x512", seed) for seed in range(12)]
    load += [body("1024x1024", seed, num_inference_steps=12) for seed in range(6)]

    async def at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=200) as client:

            async def send(number: int) -> httpx.Response:
                await asyncio.sleep(0.15 * (len(load) - number))  # the large ones first
                return await client.post("/v1/images/generations", json=load[number])

            return await asyncio.gather(*(send(number) for number in range(len(load))))

    responses = asyncio.run(at_once())
    assert [response.status_code for response in responses] == [200] * len(load)
    answers = [response.json() for response in responses]
    paths = [answer["metrics"]["steps"] for answer in answers]
    for request, path in zip(load, paths, strict=True):
        assert sum(part["steps"] for part in path) == request["num_inference_steps"]
        assert all(part["degree"] == len(part["gpus"]) for part in path)
    others = {part["others"] for answer in answers for part in answer["metrics"]["schedule"]}
    assert 5 < max(others) < len(load)
    degrees = [{part["degree"] for part in path} for path in paths]
    large_s = httpx.get(f"{server.url}/v1/profile").json()["step_seconds"]["1024x1024"]
    if large_s["2"] < 0.8 * large_s["1"]:  # on a busy machine it may not
        assert any(len(used) > 1 for used in degrees), f"no request changed its degree: {degrees}"
    with httpx.Client(base_url=server.url, timeout=200) as client:
        for number in (0, 1, 14, 15, *range(26, 32)):
            alone = client.post("/v1/images/generations", json=load[number]).json()
            difference = np.abs(
                pixels(alone["data"][0]).astype(int) - pixels(answers[number]["data"][0]).astype(int)
            )
            assert difference.max() <= 1
            assert (difference.max(axis=-1) == 0).mean() >= 0.999
    assert server.health()["cells"][0]["open_requests"] == 0


def test_metrics_agree_with_what_was_answered(server: Server) -> None:
    def read() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def change(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    before = read()
    sent = [
        body("256x256", 1, slo_ms=60_000),
        body("256x256", 2, slo_ms=1),
        body("512x512", 3, slo_ms=60_000),
    ]
    answers = [
        httpx.post(f"{server.url}/v1/images/generations", json=item, timeout=60).json() for item in sent
    ]
    assert httpx.post(f"{server.url}/v1/images/generations", json={"prompt": ""}).status_code == 400
    after = read()
    assert [answer["metrics"]["slo_met"] for answer in answers] == [True, False, True]
    assert change("tetriserve_requests_total", "0", "met", "256x256") == 1
    assert change("tetriserve_requests_total", "0", "late", "256x256") == 1
    assert change("tetriserve_requests_total", "0", "met", "512x512") == 1
    for phase in ("encode", "denoise", "decode", "total"):
        spent_s = sum(answer["metrics"]["stage_durations"][phase] for answer in answers[:2])
        assert change("tetriserve_phase_seconds_sum", "0", phase, "256x256") == pytest.approx(spent_s)
    profile = httpx.get(f"{server.url}/v1/profile").json()
    for item, answer in zip(sent, answers, strict=True):  # `--verbose` reads these
        metrics = answer["metrics"]
        planned_s = metrics["planned_with"]["step_s"]
        assert planned_s.keys() == {"1", "2"}
        assert planned_s["1"] == pytest.approx(profile["step_seconds"][item["size"]]["1"], rel=0.5)
        begins_s, ends_s = metrics["schedule"][0]["start_s"], metrics["schedule"][-1]["end_s"]
        assert 0 < begins_s - metrics["arrival_s"] < 1
        total_s = metrics["stage_durations"]["total"]
        assert ends_s - metrics["arrival_s"] == pytest.approx(total_s, abs=0.2)
        _, encode, *steps, _decode, _end = of_metrics(metrics)
        assert encode.endswith("encode runs on one GPU") and steps
        late = item["slo_ms"] == 1
        assert all(("no degree is in time" if late else "in time") in row for row in steps), steps
    ran = [part for answer in answers for part in answer["metrics"]["schedule"]]
    for degree in (1, 2):
        busy_s = sum(
            degree * (part["end_s"] - part["start_s"]) for part in ran if len(part["gpus"]) == degree
        )
        if busy_s:
            assert change("tetriserve_gpu_busy_seconds_total", "0", str(degree)) == pytest.approx(busy_s)
    assert after["tetriserve_gpus", "0", "ready"] == 2
    assert change("tetriserve_plan_seconds_count", "0") >= 3


@pytest.mark.slow
def test_a_replayed_trace_has_a_valid_schedule(server: Server, tmp_path: Path) -> None:
    """`tetriserve bench`: what the replicas say they did is a valid schedule by the independent checker."""
    shapes = [(256, 256), (512, 512), (256, 512), (1024, 1024)]
    trace = [
        {
            "id": f"r{i}",
            "arrival_s": 0.2 * i,
            "height": shapes[i % 4][0],
            "width": shapes[i % 4][1],
            "num_inference_steps": 3 + i % 5,
            "slo_s": 1.0 + i % 3,
        }
        for i in range(24)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace))
    command = [
        str(BIN / "tetriserve"),
        "bench",
        "--url",
        server.url,
        "--trace",
        str(tmp_path / "trace.jsonl"),
    ]
    out = tmp_path / "result.json"
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=120)
    result = json.loads(out.read_text())
    assert result["summary"]["policy"] == "ilp"
    assert all(request["finish_s"] is not None for request in result["requests"])
    assert {gpu for entry in result["schedule"] for gpu in entry["gpus"]} == {0, 1}
    anything = dict.fromkeys((1, 2), 0.0)  # how long a step takes here is the machine's business
    nothing = dict.fromkeys((1, 2), Shared(0.0, 0.0, 0.0))  # and so is who shares one
    chains = {
        line["id"]: Chain(
            line["arrival_s"],
            (
                Phase("encode", 1, anything),
                Phase("denoise", line["num_inference_steps"], anything, company="all", shared=nothing),
                Phase("decode", 1, anything),
            ),
        )
        for line in trace
    }
    entries = [
        Entry(tuple(e["request_ids"]), e["kind"], tuple(e["gpus"]), e["steps"], e["start_s"], e["end_s"])
        for e in result["schedule"]
    ]
    assert violations(entries, chains, 2) == []


def test_openai_client_works_unchanged(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny-flux"]
    response = client.images.generate(
        model="tiny-flux",
        prompt="a small red circle",
        size="512x512",
        n=2,
        extra_body={"seed": 7, "num_inference_steps": 3},
    )
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(d.b64_json)))) for d in response.data]
    assert [picture.shape for picture in pictures] == [(512, 512, 3)] * 2
    assert (pictures[0] != pictures[1]).mean() > 0.05
    with pytest.raises(openai.NotFoundError, match="gpt-image"):
        client.images.generate(model="gpt-image-1", prompt="a", size="512x512")
    with pytest.raises(openai.BadRequestError, match="multiple of 16"):
        client.images.generate(prompt="a", size="500x500")


def test_a_repeated_post_gets_the_same_result(server: Server) -> None:
    """While it runs, after it ended, and when the first caller went away in between."""
    headers = {"Idempotency-Key": "order-1"}
    item = body("1024x1024", 1, num_inference_steps=4)
    del item["seed"]

    async def posts() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, headers=headers) as client:
            tasks = [asyncio.create_task(client.post("/v1/images/generations", json=item)) for _ in range(3)]
            await asyncio.sleep(1.0)
            tasks.pop(0).cancel()
            return [*await asyncio.gather(*tasks), await client.post("/v1/images/generations", json=item)]

    answers = [answer.json() for answer in asyncio.run(posts())]
    for answer in answers:  # each left at its own time
        for metrics in (answer["metrics"], *(picture["metrics"] for picture in answer["data"])):
            assert metrics.pop("response_s") > 0
    assert all(answer == answers[0] for answer in answers[1:])  # the very same run, to the microsecond
    other = httpx.post(f"{server.url}/v1/images/generations", json={**item, "seed": 5}, headers=headers)
    assert other.status_code == 400 and other.json()["error"]["param"] == "Idempotency-Key"
    wait_until(lambda: server.health()["cells"][0]["open_requests"] == 0)


def test_a_request_can_be_followed_through_the_logs(server: Server, config: Path) -> None:
    """By its id, over all processes, in lines of JSON; what it asked for is in none of them."""

    def lines() -> list[dict[str, Any]]:
        files = (config.parent / "logs").glob("*.log*")
        rows = [
            json.loads(line) | {"file": re.sub("^replica_tetriserve_", "", file.name).split("_")[0]}
            for file in files
            for line in file.read_text().splitlines()
        ]
        return [row for row in rows if row.get("tetriserve_request_id") == name]

    headers = {"Idempotency-Key": "a key of order 66", "X-Request-Id": "client-66"}
    item = body("512x512", 66, slo_ms=60_000, response_format="url")
    answer = httpx.post(f"{server.url}/v1/images/generations", json=item, headers=headers, timeout=60)
    name = answer.json()["id"]
    wait_until(lambda: {row["file"] for row in lines()} == {"Ingress", "Scheduler", "GPUReplica", "Pictures"})
    infos = [row for row in lines() if row["levelname"] != "DEBUG"]
    assert [(row["file"], row["levelname"]) for row in infos] == [("Scheduler", "INFO")] * 2
    accepted, ended = infos
    assert accepted["message"] == f"request {name} accepted: 512x512, 6 steps, deadline 60.000 s"
    assert ended["message"].startswith(f"request {name} ended: met after ")
    assert ended["tetriserve_outcome"] == "met"
    metrics = answer.json()["metrics"]
    assert ended["tetriserve_total_s"] == pytest.approx(metrics["stage_durations"]["total"], rel=1e-3)
    # the way back comes on top
    assert ended["tetriserve_total_s"] < float(answer.headers["x-finish-s"]) < ended["tetriserve_total_s"] + 5
    # what the client calls it leads to what it is called here
    assert answer.headers["x-generation-id"] == name
    assert answer.headers.get_list("x-request-id") == ["client-66"]
    assert {row["request_id"] for row in lines() if row["file"] == "Ingress"} == {"client-66"}
    ran = [row["message"] for row in lines() if row["file"] == "GPUReplica"]
    assert len(ran) == sum(len(part["gpus"]) for part in answer.json()["metrics"]["schedule"])
    text = "".join(file.read_text() for file in (config.parent / "logs").glob("*.log*"))
    assert item["prompt"] not in text and "order 66" not in text


def test_what_cannot_be_on_time_is_turned_away_when_asked(server: Server) -> None:
    hopeless = body("1024x1024", 1, slo_ms=20)
    answer = httpx.post(
        f"{server.url}/v1/images/generations", json={**hopeless, "reject_infeasible": True}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_infeasible")
    late = httpx.post(f"{server.url}/v1/images/generations", json=hopeless, timeout=60)
    assert late.status_code == 200 and late.json()["metrics"]["slo_met"] is False
    wait_until(lambda: server.health()["cells"][0]["open_requests"] == 0)


HANDLE_CLIENT = """
import asyncio, sys
import ray
from ray import serve
from tetriserve.errors import InvalidRequest
from tetriserve.request import GenerateRequest, GenerateResult, Progress

ray.init(address="auto", namespace="serve", log_to_driver=False)
handle = serve.get_app_handle("tetriserve")

async def main():
    request = GenerateRequest("a star", 256, 512, num_inference_steps=8, seed=3, slo_s=30, previews=2)
    result = await handle.generate.remote(request)
    assert result.image.shape == (256, 512, 3), result.image.shape
    assert result.metrics.slo_met and result.metrics.seed == 3
    items = [item async for item in handle.options(stream=True).stream.remote(request)]
    assert all(isinstance(item, Progress) for item in items[:-1]) and len(items) > 2
    done = [item.steps_done for item in items[:-1]]
    assert done == sorted(done) and done[-1] == 8, done
    previews = [item.preview for item in items[:-1] if item.preview is not None]
    assert 1 <= len(previews) <= 2 and previews[0].shape == (32, 64, 3)
    assert items[0].predicted_finish_s > 0
    assert isinstance(items[-1], GenerateResult) and (items[-1].image == result.image).all()
    try:
        await handle.generate.remote(GenerateRequest(prompt="", height=256, width=256))
    except InvalidRequest as error:
        assert error.field == "prompt", error
    else:
        raise AssertionError("an empty prompt was accepted")
    long = GenerateRequest("a", 1024, 1024, num_inference_steps=50)
    cancelled = handle.generate.remote(long)
    await asyncio.sleep(1)
    cancelled.cancel()
    left = handle.options(stream=True).stream.remote(long)
    async for item in left:
        if item.steps_done:
            break
    left.cancel()

asyncio.run(main())
print("handle ok")
"""


def test_a_streamed_picture_is_the_same_and_hanging_up_frees_the_gpus(server: Server) -> None:
    """OpenAI's client: previews on the way, then the picture that one gets without them; then it goes away."""
    item = body("1024x1024", 7, num_inference_steps=12, slo_ms=60_000)
    alone = httpx.post(f"{server.url}/v1/images/generations", json=item, timeout=60)
    assert 0 < float(alone.headers["x-predicted-finish-s"]) < 60 and alone.headers["x-slo-met"] == "true"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

    def stream(**more: Any) -> Any:
        extra = {"seed": 7, "num_inference_steps": 12, **more}
        return client.images.generate(
            prompt=item["prompt"], size="1024x1024", stream=True, partial_images=3, extra_body=extra
        )

    *previews, done = stream()
    assert [event.type for event in previews] == ["image_generation.partial_image"] * len(previews)
    assert 1 <= len(previews) <= 3 and done.type == "image_generation.completed"
    first = pixels(previews[0].to_dict())
    assert first.shape == (1024, 1024, 3) and first.std() > 1
    difference = pixels(done.to_dict()).astype(int) - pixels(alone.json()["data"][0]).astype(int)
    assert np.abs(difference).max() <= 1
    left = stream(n=2, num_inference_steps=50)
    assert next(left).to_dict()["steps_done"] < 50
    left.close()


def test_python_handle(server: Server) -> None:
    """Another Ray app on the same cluster: generate, stream, errors, cancel, leaving in mid-stream."""
    done = subprocess.run(
        [sys.executable, "-c", HANDLE_CLIENT], capture_output=True, text=True, timeout=120, check=False
    )
    assert "handle ok" in done.stdout, done.stdout + done.stderr


def test_disconnect_frees_the_gpus(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/images/generations",
            json=body("1024x1024", 1, num_inference_steps=50, n=2),
            timeout=1.5,
        )


def test_delete_ends_a_request_and_all_who_wait_for_it(server: Server) -> None:
    url, headers = f"{server.url}/v1/images/generations", {"Idempotency-Key": "to-be-deleted"}
    long = body("1024x1024", 1, num_inference_steps=50, n=2)
    with ThreadPoolExecutor(2) as pool:
        posts = [pool.submit(httpx.post, url, json=long, headers=headers, timeout=60) for _ in range(2)]
        wait_until(lambda: server.health()["cells"][0]["running"] > 0)
        wait_until(lambda: httpx.delete(url, headers=headers).status_code == 200)
        answers = [post.result(timeout=30) for post in posts]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
        (409, "cancelled")
    ] * 2
    assert httpx.delete(url, headers=headers).status_code == 404
    short = body("256x256", 1, num_inference_steps=2)
    assert (
        httpx.post(url, json=short, headers=headers, timeout=60).status_code == 200
    )  # the key is free again
    assert httpx.delete(url, headers=headers).status_code == 200


def test_replicas_have_one_thread_and_low_priority(server: Server) -> None:
    assert len(server.replicas()) == 2
    for replica in server.replicas():
        priorities = {
            os.getpriority(os.PRIO_PROCESS, thread.id)
            for thread in replica.threads()
            if Path(f"/proc/{replica.pid}/task/{thread.id}").exists()
        }
        assert 19 in priorities  # the engine's thread yields ...
        assert min(priorities) < 19  # ... and the actor's own threads do not


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP"])
def test_a_broken_replica_is_replaced_and_its_requests_go_on(server: Server, blow: str) -> None:
    """Dead, or alive and standing still: every request ends with the picture it would have had anyway."""
    load = [body("1024x1024", seed, num_inference_steps=12) for seed in range(2)]
    load += [body("512x512", seed, num_inference_steps=20) for seed in range(3)]

    async def in_flight() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            tasks = [asyncio.create_task(client.post("/v1/images/generations", json=item)) for item in load]
            await asyncio.sleep(1.0)
            server.replicas()[1].send_signal(getattr(signal, blow))
            return await asyncio.gather(*tasks)

    broken = asyncio.run(in_flight())
    assert [response.status_code for response in broken] == [200] * len(load)
    wait_until(lambda: server.health()["cells"][0]["gpus_ready"] == 2, seconds=60)
    for item, response in zip(load, broken, strict=True):
        alone = httpx.post(f"{server.url}/v1/images/generations", json=item, timeout=60).json()
        difference = pixels(alone["data"][0]).astype(int) - pixels(response.json()["data"][0]).astype(int)
        assert np.abs(difference).max() <= 1
    assert {gpu for part in alone["metrics"]["schedule"] for gpu in part["gpus"]} <= {0, 1}


@pytest.mark.slow
def test_a_dead_scheduler_loses_no_request(server: Server) -> None:
    """Ten requests in flight: all of them end with the picture they would have had anyway, timed from arrival."""
    load = [body("512x512", seed) for seed in range(8)] + [body("1024x1024", seed) for seed in range(2)]

    async def in_flight() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=150) as client:
            tasks = [asyncio.create_task(client.post("/v1/images/generations", json=item)) for item in load]
            await asyncio.sleep(1.0)
            server.scheduler().kill()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(in_flight())
    assert [answer.status_code for answer in answers] == [200] * len(load), [a.text[:200] for a in answers]
    for item, answer in list(zip(load, answers, strict=True))[::4]:
        alone = httpx.post(f"{server.url}/v1/images/generations", json=item, timeout=60).json()
        difference = pixels(alone["data"][0]).astype(int) - pixels(answer.json()["data"][0]).astype(int)
        assert np.abs(difference).max() <= 1
    last = answers[-1].json()["metrics"]
    assert last["stage_durations"]["queue"] > 1.0  # the time with the first scheduler counts
    assert len(server.replicas()) == 2
