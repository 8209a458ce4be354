"""The page in a browser: the form and the live board, against a server with two replicas."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from live_server import Server, wait_until, write_config
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

PROFILE = {
    "model": "tiny-flux",
    "device": "CPU",
    "source": "made up, so that small pictures take one GPU and large ones two",
    "degrees": [1, 2],
    "step_seconds": {
        "256x256": {1: 0.012, 2: 0.014},
        "1024x1024": {1: 0.4, 2: 0.22},
    },
}
ANSWER_MS = 60_000
AWAY_MS = 15_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_config(tmp_path_factory.mktemp("page"), PROFILE, step_timeout_floor_s=60))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, "--disable-sync"], chromium_sandbox=False
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, live. Nothing may go wrong on it without a test that says so in `expected`."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.expected = ""  # type: ignore[attr-defined]
    page.goto(server.url)
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)
    yield page
    expected = page.expected  # type: ignore[attr-defined]
    page.close()
    assert [error for error in errors if not expected or not re.search(expected, error)] == []


def generate(page: Page, **fields: str) -> Any:
    """Fill the form in, send it, and return the new card."""
    for name in ("Steps", "Deadline, s", "Seed", "Pictures"):
        page.get_by_label(name, exact=True).fill(fields.get(name, "1" if name == "Pictures" else ""))
    page.get_by_label("Size").select_option(fields["Size"])
    page.get_by_label("Prompt").fill(fields.get("Prompt", "a small red circle"))
    page.get_by_role("button", name="Generate").click()
    return page.locator(".card").first


def rectangles(page: Page) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate("window.tetriserve.rectangles()")
    return found


def test_a_picture_comes_with_its_metrics_and_its_ranges_are_on_the_board(page: Page, server: Server) -> None:
    expect(page.locator("#model")).not_to_be_empty()
    card = generate(page, Size="256x256", Steps="4", Seed="7")
    expect(card.locator(".path")).to_contain_text("4 steps on GPU", timeout=ANSWER_MS)
    assert card.locator("img").evaluate("image => image.complete && image.naturalWidth") == 256
    expect(card.locator(".hint")).to_have_text("seed 7")
    for stage in ("queue", "encode", "denoise", "decode"):
        expect(card.locator(".stages")).to_contain_text(stage)
    expect(page.locator("#announcement")).to_contain_text("Picture finished in")

    card = generate(page, Size="1024x1024", Steps="8", **{"Deadline, s": "30"})
    expect(card.locator(".state")).to_contain_text("of 8 steps, about", timeout=ANSWER_MS)
    expect(card.locator(".verdict")).to_contain_text("On time", timeout=ANSWER_MS)
    wait_until(lambda: {one["degree"] for one in rectangles(page) if one["kind"] == "denoise"} == {1, 2})
    assert not any(one["late"] for one in rectangles(page) if one["about"]["shape"] == "1024x1024")
    trace = httpx.get(f"{server.url}/debug/timeline").json()["traceEvents"]
    assert {event["args"]["degree"] for event in trace if event.get("cat") == "denoise"} == {1, 2}
    assert {"plan", "round", "hand-off"} <= {event["name"] for event in trace}
    expect(page.locator("#slo-60-of")).to_have_text(re.compile("[1-9] of"))


def test_a_late_request_is_marked(page: Page) -> None:
    card = generate(page, Size="256x256", Steps="3", **{"Deadline, s": "0.001"})
    expect(card.locator(".verdict .missed")).to_have_text("Late", timeout=ANSWER_MS)
    wait_until(lambda: any(one["late"] and one["about"]["outcome"] == "late" for one in rectangles(page)))


def test_several_pictures_and_a_refusal(page: Page) -> None:
    card = generate(page, Size="256x256", Steps="2", Pictures="3")
    expect(card.locator(".verdict")).to_have_count(3, timeout=ANSWER_MS)
    expect(page.locator("#announcement")).to_contain_text("3 pictures finished")
    page.expected = "status of 400"  # type: ignore[attr-defined]
    card = generate(page, Size="256x256", Prompt="long " * 2000)
    expect(card.locator(".state")).to_contain_text("characters", timeout=ANSWER_MS)


def test_the_board_can_be_read_with_keys(page: Page) -> None:
    expect(generate(page, Size="256x256", Steps="4").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    wait_until(lambda: len(rectangles(page)) >= 3)
    board = page.get_by_role("application")
    board.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#board-focus")).to_contain_text("degree 1 on GPU")
    last = page.locator("#board-focus").inner_text()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#board-focus")).not_to_have_text(last)
    expect(page.locator("#tip")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    expect(page.locator("#board-summary")).to_contain_text("of 2 GPUs are running steps")


def test_every_cell_has_lanes_of_its_own(page: Page) -> None:
    def two(route: Route) -> None:
        response = route.fetch()
        board = response.json()
        (cell,) = board["cells"]
        board["cells"].append(cell | {"cell": "the-other-one"})
        route.fulfill(response=response, json=board)

    page.route("**/v1/board*", two)
    expect(generate(page, Size="256x256", Steps="4").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    wait_until(lambda: len({one["cell"] for one in rectangles(page)}) == 2)
    lanes = {one["cell"]: {lane for lane, _ in one["lanes"]} for one in rectangles(page)}
    assert lanes.pop("the-other-one") <= {2, 3} and all(own <= {0, 1} for own in lanes.values())
    page.reload()
    expect(page.locator("#board-summary")).to_contain_text("of 4 GPUs are running steps", timeout=AWAY_MS)
    page.unroute("**/v1/board*")


def test_it_comes_back_by_itself_when_the_server_was_away(page: Page) -> None:
    page.expected = "ERR_FAILED|ERR_CONNECTION"  # type: ignore[attr-defined]
    page.route("**/v1/board*", lambda route: route.abort())
    expect(page.get_by_role("status").first).to_contain_text("Server away", timeout=AWAY_MS)
    page.unroute("**/v1/board*")
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)


def test_previews_change_until_the_picture_is_there(page: Page) -> None:
    card = generate(page, Size="1024x1024", Steps="8", **{"Deadline, s": "60"})
    previews: set[str] = set()

    def look() -> bool:
        previews.update(card.locator("img.preview").evaluate_all("images => images.map(one => one.src)"))
        return card.locator(".path").count() > 0

    wait_until(look, ANSWER_MS / 1000)
    assert len(previews) >= 2
    picture = card.locator("img").evaluate("image => [image.naturalWidth, image.className, image.src]")
    assert picture[:2] == [1024, ""] and picture[2] not in previews


def test_a_streamed_answer_shows_progress_previews_and_the_result(page: Page, server: Server) -> None:
    """Its events as the contract has them, cut anywhere."""
    asked = {"prompt": "a red circle", "size": "256x256", "num_inference_steps": 2}
    b64 = httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=60).json()["data"][0][
        "b64_json"
    ]
    steps = {"picture": 0, "steps": 8, "steps_done": 4, "predicted_finish_s": 1.5}
    metrics = {
        "stage_durations": {"queue": 0.1, "encode": 0.1, "denoise": 0.2, "decode": 0.1, "total": 0.5},
        "slo_s": 2.0,
        "slo_met": True,
        "steps": [{"steps": 3, "degree": 1, "gpus": [0]}, {"steps": 5, "degree": 2, "gpus": [0, 1]}],
        "lost": [],
        "seed": 9,
    }
    partial = {"type": "image_generation.partial_image", "b64_json": b64, **steps}
    completed = {"type": "image_generation.completed", "b64_json": b64, "metrics": metrics} | steps
    waiting = {"type": "image_generation.progress", "phase": "queue", "ahead": 3, **steps, "steps_done": 0}
    begin = [waiting, {"type": "image_generation.progress", **steps}, partial]
    failed = {"error": {"message": "denoise failed", "type": "server_error", "param": None, "code": "x"}}

    def answer(*events: dict[str, Any]) -> None:
        body = "".join(f"event: {e.get('type', 'error')}\ndata: {json.dumps(e)}\n\n" for e in events)

        def fulfil(route: Route) -> None:
            assert route.request.post_data_json["stream"] and route.request.post_data_json["progress"]
            route.fulfill(content_type="text/event-stream; charset=utf-8", body=": still there\n\n" + body)

        page.unroute("**/v1/images/generations")
        page.route("**/v1/images/generations", fulfil)

    answer(*begin, completed)
    card = generate(page, Size="256x256")
    expect(card.locator(".path")).to_have_text("3 steps on GPU 05 steps on 2 GPUs")
    expect(card.locator(".state")).to_have_text("0.50 s, on time")
    answer(waiting, failed)
    page.evaluate(
        """() => {
            window.told = [];
            new MutationObserver(() => window.told.push(document.querySelector(".state").textContent))
                .observe(document.getElementById("results"), {subtree: true, childList: true});
        }"""
    )
    card = generate(page, Size="256x256")
    expect(card.locator(".state")).to_have_text("Denoise failed.")
    assert "Waiting, 3 ahead, 0 of 8 steps, about 1.50 s to go" in page.evaluate("window.told")
    answer(*begin, failed)
    card = generate(page, Size="256x256")
    expect(card.locator(".state")).to_have_text("Denoise failed.")
    answer(*begin)
    card = generate(page, Size="256x256")
    expect(card.locator(".state")).to_contain_text("ended the answer before")
    assert card.locator("progress").count() == 0 and card.locator("img.preview").count() == 1

    # a server or a gateway that does not stream
    page.unroute("**/v1/images/generations")
    whole = {"data": [{"b64_json": b64, "metrics": metrics}]}
    page.route("**/v1/images/generations", lambda route: route.fulfill(json=whole))
    expect(generate(page, Size="256x256").locator(".state")).to_have_text("0.50 s, on time")


def test_the_key_is_asked_for_and_kept_for_the_tab(page: Page) -> None:
    page.expected = "status of 401"  # type: ignore[attr-defined]
    key = "some-key-0123456789"

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {key}":
            route.continue_()
        else:
            body = {"error": {"message": "send an API key", "code": "invalid_api_key"}}
            route.fulfill(status=401, json=body)

    assert page.get_by_label("API key").is_hidden()
    page.route("**/v1/**", guard)
    page.reload()
    expect(page.get_by_role("status").first).to_have_text("An API key is needed")
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)
    expect(generate(page, Size="256x256", Steps="2").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    page.reload()
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)
    assert page.evaluate("Object.keys(localStorage).length") == 0


def test_pictures_are_kept_in_the_browser_until_they_are_removed(page: Page) -> None:
    card = generate(page, Size="256x256", Steps="2", Seed="5", Prompt="a small blue ring")
    expect(card.get_by_role("link", name="Download")).to_be_visible(timeout=ANSWER_MS)
    with page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "tetriserve-5.png"
    with Image.open(download.value.path()) as first:
        pixels = np.asarray(first)
    assert pixels.shape == (256, 256, 3)
    with page.context.expect_page() as opened:
        card.get_by_role("link", name="Open").click()
    opened.value.close()
    card.get_by_role("button", name="Another seed").click()
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator(".card").first.get_by_role("link", name="Open")).to_be_visible(timeout=ANSWER_MS)
    expect(page.locator(".card").first.locator(".hint")).not_to_have_text("seed 5")

    page.reload()
    expect(page.locator(".card")).to_have_count(2, timeout=AWAY_MS)
    again = page.locator(".card").last  # newest first
    expect(again.locator(".hint")).to_have_text("seed 5")
    assert again.locator("img").evaluate("image => image.complete && image.naturalWidth") == 256
    again.get_by_role("button", name="Remove").click()
    page.reload()
    expect(page.locator(".card")).to_have_count(1, timeout=AWAY_MS)
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator(".card")).to_have_count(0)
    page.reload()
    expect(page.locator("#size option").first).to_be_attached(timeout=AWAY_MS)
    expect(page.locator(".card")).to_have_count(0)


def test_a_request_can_be_copied_as_a_command_and_a_program(
    page: Page, server: Server, tmp_path: Path
) -> None:
    """Both make the same picture, with quotes and dollars in the prompt."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = """it's a "small" $HOME circle \\ red"""
    card = generate(page, Size="256x256", Steps="2", Seed="5", Prompt=prompt)
    expect(card.get_by_role("button", name="Copy curl")).to_be_visible(timeout=ANSWER_MS)

    def copied(name: str) -> str:
        card.get_by_role("button", name=name).click()
        expect(page.locator("#announcement")).to_contain_text("is copied")
        page.evaluate("document.getElementById('announcement').textContent = ''")
        return str(page.evaluate("navigator.clipboard.readText()"))

    asked = {"prompt": prompt, "size": "256x256", "num_inference_steps": 2, "seed": 5}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=60).json()
    picture = answer["data"][0]["b64_json"]
    curl, _, _ = copied("Copy curl").partition(" | jq")
    answered = subprocess.run(["bash", "-c", curl], capture_output=True, check=True)
    assert json.loads(answered.stdout)["data"][0]["b64_json"] == picture
    program = copied("Copy Python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert base64.b64encode((tmp_path / "picture0.png").read_bytes()).decode() == picture


def test_a_picture_is_edited_by_dropping_it(page: Page, server: Server, tmp_path: Path) -> None:
    made = generate(page, Size="256x256", Steps="4", Seed="1")
    expect(made.get_by_role("button", name="Edit")).to_be_visible(timeout=ANSWER_MS)
    assert page.locator("#strength-field").is_hidden()
    made.get_by_role("button", name="Edit").click()
    expect(page.locator("#inputs img")).to_have_count(1)
    page.get_by_role("button", name="Remove tetriserve-1.png").click()
    expect(page.locator("#inputs img")).to_have_count(0)

    Image.fromarray(np.full((300, 200, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    content = base64.b64encode((tmp_path / "grey.png").read_bytes()).decode()
    page.evaluate(
        """content => {
            const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "grey.png", { type: "image/png" }));
            for (const kind of ["dragover", "drop"]) {
                const about = { dataTransfer: data, bubbles: true, cancelable: true };
                document.body.dispatchEvent(new DragEvent(kind, about));
            }
        }""",
        content,
    )
    expect(page.locator("#inputs img")).to_have_count(1)
    page.get_by_label("Made anew").fill("0.5")
    with page.expect_request("**/v1/images/edits") as sent:
        card = generate(page, Size="auto", Steps="4", Seed="1")
    assert sent.value.method == "POST"
    expect(card.locator(".path")).to_contain_text("2 steps on GPU", timeout=ANSWER_MS)
    assert card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [192, 304]
    page.reload()
    expect(page.locator(".card").first.locator(".path")).to_contain_text("2 steps on GPU", timeout=AWAY_MS)
    # and again, with the picture that was kept with it
    page.locator(".card").first.get_by_role("button", name="Another seed").click()
    expect(page.locator(".card").first.locator(".path")).to_contain_text("2 steps", timeout=ANSWER_MS)


def test_only_sizes_that_the_model_allows(page: Page, server: Server) -> None:
    sizes = page.locator("#size option").evaluate_all("options => options.map(one => one.value)")
    assert {"256x256", "512x512", "1024x1024"} <= set(sizes)
    assert not any(int(size.split("x")[0]) > 2048 for size in sizes)
    for size in sizes[:: len(sizes) // 4]:
        asked = {"prompt": "a", "size": size, "num_inference_steps": 1}
        assert httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=60).status_code == 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360, 3840])
def test_axe_finds_nothing_serious(page: Page, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    expect(generate(page, Size="256x256", Steps="2").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    found = Axe().run(page).response["violations"]
    bad = [(rule["id"], rule["help"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert bad == []
    # the results are where the room is
    board, results = (page.locator(name).bounding_box() for name in (".watch", ".pictures"))
    assert board and results
    if width == 3840:
        assert results["x"] > board["x"] + board["width"]
    elif width == 1280:
        assert results["x"] == board["x"] and results["y"] > board["y"]
    else:
        assert results["width"] > 320 and results["y"] < board["y"]
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0


@pytest.mark.slow
def test_it_is_live_again_after_a_restart_of_the_server(page: Page, server: Server) -> None:
    page.expected = "ERR_|status of (404|5)"  # type: ignore[attr-defined]  # 404: no route yet
    server.stop()
    expect(page.get_by_role("status").first).to_contain_text("Server away", timeout=AWAY_MS)
    server.start()
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)
    expect(generate(page, Size="256x256", Steps="2").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    wait_until(lambda: rectangles(page))
