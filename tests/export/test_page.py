"""The page of m3vit serve in a real browser: headless Chromium, driven by playwright."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.export.serving import Server, serving
from tests.export.test_runtime import CHANNELS, make_image, make_package
from tests.export.test_serve_budgets import make_budgets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TASKS = list(CHANNELS)

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    package = make_package(tmp_path_factory.mktemp("package") / "onnx")
    with serving(package, "--max-bytes", 100_000, "--queue", 1) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, connected; at the end it must have had no error and asked no other server."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    asked: set[str] = set()
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.add(request.url.split(":")[0] + ":" + request.url.split(":")[1]))
    opened.goto(f"http://127.0.0.1:{server.port}/")
    expect(opened.locator("#about")).to_contain_text("4 tasks: semseg, depth, normals, edge")
    yield opened
    opened.close()
    # The browser itself notes refused requests.
    assert [text for text in said if "Failed to load resource" not in text] == []
    assert {address for address in asked if not address.startswith(("blob:", "data:"))} == {"http://127.0.0.1"}


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_image(height, width)).save(file, format="PNG")
    return file.getvalue()


def drop(page: Page, name: str, content: bytes, kind: str = "image/png") -> None:
    """Drop a file on the page, as from the desktop."""
    script = """([name, kind, text]) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: kind }));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, [name, kind, base64.b64encode(content).decode()])
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def shown(page: Page, task: str) -> np.ndarray:
    """The picture on a task's card."""
    url = page.locator(f'[data-task="{task}"] img.top').get_attribute("src")
    assert url
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_a_dropped_image_shows_every_task(page: Page, server: Server) -> None:
    data = png(24, 36)
    drop(page, "room.png", data)
    expect(page.locator("#status")).to_have_text("4 predictions are ready.")
    expect(page.locator("#budgets")).to_be_hidden()
    for task in TASKS:
        expected = server.post(f"/predict/{task}?resize=always", data)[2]
        np.testing.assert_array_equal(shown(page, task), np.asarray(Image.open(io.BytesIO(expected))))
        card = page.locator(f'[data-task="{task}"]')
        picture = card.locator("img.top")
        assert picture.evaluate("(image) => image.complete && image.naturalWidth") == 36, "decoded by the browser"
        assert (picture.get_attribute("alt") or "").startswith(f"{task}: ")
        expect(card.locator("a")).to_have_attribute("download", f"room_{task}.png")
        box = picture.bounding_box()
        assert box and box["width"] > 200 and abs(box["width"] / box["height"] - 1.5) < 0.02
    expect(page.locator('[data-task="semseg"] li')).to_have_count(3)
    expect(page.locator('[data-task="depth"] .ends')).to_contain_text("median")
    expect(page.locator('[data-task="normals"] li')).to_have_count(5)
    expect(page.locator('[data-task="edge"] .ends')).to_contain_text("probability")
    assert page.locator('[data-task="image"] img').evaluate("(image) => image.naturalWidth") == 36


def test_a_budget_is_chosen(browser: Browser, tmp_path: Path) -> None:
    """Of a package with several: the first unless told otherwise, and with another one the pictures are its own."""
    with serving(make_budgets(tmp_path / "onnx"), "--fallback", "light", "--concurrency", 4) as running:
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.goto(f"http://127.0.0.1:{running.port}/")
        expect(opened.locator("#budget option")).to_have_text(["full, light under load", "light, 40 % of its compute"])
        data = png(24, 36)
        drop(opened, "room.png", data)
        for name, query in (("full", ""), ("light", "&budget=light")):
            expect(opened.locator("#status")).to_have_text("4 predictions are ready.")
            expect(opened.locator('[data-task="depth"] .head span')).to_contain_text(f"{name}, ")
            expected = running.post(f"/predict/depth?resize=always{query}", data)[2]
            np.testing.assert_array_equal(shown(opened, "depth"), np.asarray(Image.open(io.BytesIO(expected))))
            if name == "full":
                opened.locator("#status").evaluate("(status) => status.textContent = ''")
                opened.get_by_label("Budget").select_option("light")
        if folder := os.environ.get("M3VIT_SCREENSHOTS"):
            opened.screenshot(path=Path(folder) / "budgets.png")
        opened.close()


def test_a_chosen_image_at_its_own_size_and_the_mix(page: Page, server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(32, 48))
    page.set_input_files("#file", tmp_path / "a.png")
    expect(page.locator("#status")).to_have_text("4 predictions are ready.")
    trained = shown(page, "depth")
    page.select_option("#resize", "auto")
    expect(page.locator("#status")).to_have_text("4 predictions are ready.")
    expected = server.post("/predict/depth", png(32, 48))[2]
    np.testing.assert_array_equal(shown(page, "depth"), np.asarray(Image.open(io.BytesIO(expected))))
    assert (shown(page, "depth") != trained).any()
    page.locator("#mix").fill("50")
    assert page.locator('[data-task="depth"] img.top').evaluate("(image) => image.style.opacity") == "0.5"
    assert page.locator('[data-task="edge"] img.top').evaluate("(image) => image.style.opacity") == "1"


def test_bad_files_are_explained_and_good_ones_still_work(page: Page) -> None:
    drop(page, "torn.png", png(24, 36)[:-50])
    expect(page.locator("#status")).to_have_text("4 of 4 tasks failed.")
    for task in TASKS:
        expect(page.locator(f'[data-task="{task}"]')).to_contain_text("the image cannot be read as an image")
    drop(page, "large.png", bytes(100_001))
    expect(page.get_by_role("alert")).to_contain_text("large.png has 0.1 MiB: choose a smaller image.")
    drop(page, "room.png", png(24, 36))
    expect(page.locator("#status")).to_have_text("4 predictions are ready.")
    expect(page.get_by_role("alert")).to_have_text("")


def test_the_page_is_usable_without_a_mouse_or_sight(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "file"
    assert page.locator("#drop").evaluate("(label) => getComputedStyle(label).outlineStyle") == "solid"
    assert page.locator("html").get_attribute("lang") == "en"
    expect(page.get_by_label("Choose an image")).to_be_attached()
    expect(page.get_by_label("Size")).to_be_visible()
    expect(page.get_by_role("slider")).to_be_visible()
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, "no sideways scrolling on a phone"
