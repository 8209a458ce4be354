"""The page in a browser: the form and the live board, against a server with two replicas."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from live_server import Server, wait_until, write_config
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


def test_a_streamed_answer_shows_progress_previews_and_the_result(page: Page) -> None:
    """Its events as the contract has them, cut anywhere."""
    done = generate(page, Size="256x256", Steps="2")
    expect(done.locator(".path")).to_be_visible(timeout=ANSWER_MS)
    b64 = done.locator("img").get_attribute("src").split(",")[1]
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
    begin = [{"type": "image_generation.progress", **steps}, partial]
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_serious(page: Page, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    expect(generate(page, Size="256x256", Steps="2").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    found = Axe().run(page).response["violations"]
    bad = [(rule["id"], rule["help"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert bad == []
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0


def test_it_is_live_again_after_a_restart_of_the_server(page: Page, server: Server) -> None:
    page.expected = "ERR_|status of (404|5)"  # type: ignore[attr-defined]  # 404: no route yet
    server.stop()
    expect(page.get_by_role("status").first).to_contain_text("Server away", timeout=AWAY_MS)
    server.start()
    expect(page.get_by_role("status").first).to_have_text("Live", timeout=AWAY_MS)
    expect(generate(page, Size="256x256", Steps="2").locator(".path")).to_be_visible(timeout=ANSWER_MS)
    wait_until(lambda: rectangles(page))
