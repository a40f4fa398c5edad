"""The page at `/`, as a browser gets it and, where there is a Chromium, as its users do."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from calling import WEATHER
from PIL import Image
from scripted_checkpoint import ANSWER
from serving import (
    RunningServer,
    Told,
    assert_error,
    assert_unharmed,
    config_of,
    data_url,
    listening,
    picture,
    running,
)
from waiting import eventually

from siglane.cli.demo import load_example
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.launch import serving
from siglane.server.playground import assemble
from siglane.settings.engine import EngineConfig
from siglane.weights.demo import FOLDERS, demo_folder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEW = "/v1/images/view"


def test_the_page_lets_a_browser_load_nothing_else(server: RunningServer) -> None:
    with server.http() as client:
        answer = client.get("/")
        assert client.post("/").status_code == 405
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"https?://|src=\"|href=\"(?!data:)| on\w+=", answer.text.partition("<script>")[0])


def test_it_is_open_beside_a_key_and_can_be_switched_off(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, api_key="k", root_path="/below") as server, server.http() as client:
        for path in ("/", "/below", "/below/"):
            assert client.get(path).text == assemble()[0]
        assert_error(client.get("/v1/models"), 401)
        assert_error(client.get(httpx2.URL(server.url).copy_with(raw_path=b"//")), 401)
    with running(processor, engine, api_key="k", playground=False) as server, server.http() as client:
        assert_error(client.get("/"), 401)
        assert_error(client.get("/", headers={"authorization": "Bearer k"}), 404, "not_found")


class TestView:
    def test_is_a_drawing_of_what_the_model_sees(self, server: RunningServer) -> None:
        url = data_url(picture(120, 60, seed=8))
        found = [server.post_to(VIEW, image=image) for image in (url, {"url": url}, {"url": url, "max_tiles": 1})]
        assert [one.headers["content-type"] for one in found] == ["image/png"] * 3
        assert found[0].content == found[1].content != found[2].content
        with Image.open(io.BytesIO(found[0].content)) as drawn:
            assert drawn.width > 500
            assert len(drawn.getcolors(1 << 20) or ()) > 100
        eventually(lambda: server.metric("siglane_inflight_bytes") == 0)

    @pytest.mark.parametrize(
        ("image", "status", "code"),
        [
            ({}, 400, "missing_field"),
            ({"image": {}}, 400, "missing_field"),
            ({"image": 3}, 400, "invalid_value"),
            ({"image": data_url(b"nothing")}, 400, "image_decode_failed"),
            ({"image": data_url(picture()[:90])}, 400, "image_decode_failed"),
            ({"image": "file:///etc/passwd"}, 400, "local_media_forbidden"),
            ({"image": "http://127.0.0.1/x.png"}, 400, "image_url_forbidden"),
            ({"image": {"url": data_url(picture()), "detail": "vast"}}, 400, "invalid_value"),
            ({"image": data_url(picture()), "model": "other"}, 404, "model_not_found"),
        ],
    )
    def test_what_cannot_be_drawn(self, image: dict[str, Any], status: int, code: str, server: RunningServer) -> None:
        assert_error(server.post_to(VIEW, **image), status, code)

    def test_harms_no_neighbour(self, server: RunningServer, alone: Told) -> None:
        def fault() -> None:
            for image in (data_url(picture(400, 300)), data_url(picture(3000, 10)), data_url(b"\x89PNG")):
                assert server.post_to(VIEW, image=image).status_code in (200, 400)

        assert_unharmed(server, alone, fault)


@pytest.fixture(scope="module")
def demo() -> Iterator[RunningServer]:
    """The demo model with its tagger."""
    folder = demo_folder()
    spec = EngineSpec(str(folder / FOLDERS["demo"]), EngineConfig(device="cpu", threads=1), tagger="demo-siglip")
    config = config_of(served_model_name="demo", tagger="demo-siglip")
    with serving(config, spec) as served:
        served.engine.wait_ready()
        with listening(served) as one:
            yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as play:
        # root's Chromium has no sandbox of its own
        one = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield one
        one.close()


class Visit:
    """A tab on the page. asked: every address; wrong: what the page or its policy complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.goto(url)


@pytest.mark.slow
class TestInABrowser:
    def test_a_picture_is_asked_about_and_seen(self, demo: RunningServer, browser: Any, tmp_path: Path) -> None:
        """By keyboard alone once the picture is there: the right answer, counts, a drawing, tags, and a next turn."""
        example = load_example()
        visit = Visit(browser, demo.url)
        page = visit.page
        page.set_input_files("#files", example.picture)
        page.wait_for_selector("#views img")
        page.wait_for_selector("#counts tbody tr[aria-current]")
        counted = page.inner_text("#counts tbody tr[aria-current]").split()
        with demo.http() as client:
            size = Image.open(example.picture).size
            body = {"images": [{"width": size[0], "height": size[1]}]}
            expected = client.post("/v1/images/tokens", json=body).json()
        assert counted[1] == str(expected["tokens"])
        page.click("summary:has-text('Tags')")
        page.fill("#labels", "star\ncircle")
        page.click("#tag")
        page.wait_for_selector("#tags li")
        assert "hello.png: " in page.inner_text("#tags")
        page.focus("#question")
        page.keyboard.type(example.question)
        page.keyboard.press("Enter")
        page.wait_for_selector(".facts")
        assert page.inner_text(".message.assistant p:last-of-type") == example.answer
        assert f"{expected['tokens']} image + " in page.inner_text(".facts")
        page.keyboard.type("And now?")  # the field has the focus again
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.assistant:nth-of-type(4) .facts")
        assert visit.wrong == []
        assert {url.partition("/v1")[0].rstrip("/") for url in visit.asked if url.startswith("http")} <= {
            demo.url,
            f"{demo.url}/openapi.json",
        }
        page.close()

    def test_a_tagger_alone_tags(self, browser: Any) -> None:
        """Nothing is shown that it has no use for."""
        spec = EngineSpec(str(demo_folder() / FOLDERS["demo-siglip"]), EngineConfig(device="cpu", threads=1))
        with serving(config_of(), spec) as served, listening(served) as server:
            served.engine.wait_ready()
            visit = Visit(browser, server.url)
            page = visit.page
            page.set_input_files("#files", load_example().picture)
            page.click("summary:has-text('Tags')")
            page.fill("#labels", "red square\nfish")
            page.wait_for_selector("#pictures li")
            page.click("#tag")
            page.wait_for_selector("#tags li:nth-child(2)")
            assert page.inner_text("#tags li:first-child").startswith("hello.png: red square 0.")
            shown = [page.is_visible(name) for name in ("#question", "#ask", "#sight", "#tooling", "#add")]
            assert shown == [False, False, False, False, True]
            assert visit.wrong == []
            page.close()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_is_accessible(self, scheme: str, demo: RunningServer, browser: Any) -> None:
        """axe-core finds nothing: labels, names, roles, contrast, in both schemes, every panel open."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
        visit = Visit(browser, demo.url, color_scheme=scheme)
        page = visit.page
        page.set_input_files("#files", load_example().picture)
        page.wait_for_selector("#views img")
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        page.fill("#question", "What is in the picture?")
        page.press("#question", "Enter")
        page.wait_for_selector(".facts")
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.close()

    def test_dropped_and_pasted_pictures_constraints_and_errors(self, demo: RunningServer, browser: Any) -> None:
        visit = Visit(browser, demo.url)
        page = visit.page
        page.evaluate(
            """async (url) => {
                const bytes = Uint8Array.from(atob(url.split(",")[1]), (one) => one.charCodeAt(0));
                const file = new File([bytes], "<b>x</b>.png", { type: "image/png" });
                const carried = new DataTransfer();
                carried.items.add(file);
                for (const type of ["drop", "paste"]) {
                    const init = { dataTransfer: carried, clipboardData: carried, bubbles: true };
                    const kind = type === "drop" ? DragEvent : ClipboardEvent;
                    document.body.dispatchEvent(new kind(type, init));
                }
            }""",
            data_url(picture(64, 48)),
        )
        page.wait_for_selector("#pictures li:nth-child(2)")
        assert page.query_selector("#pictures b") is None  # a file's name is a text
        page.click("#pictures li:nth-child(2) button")
        page.wait_for_selector("#pictures li:nth-child(2)", state="detached")
        page.click("summary:has-text('Constraint')")
        page.select_option("#constraint", "choice")
        page.fill("#rule", "certainly\nnever")
        page.fill("#question", "Is it?")
        page.click("#ask")
        page.wait_for_selector(".facts")
        assert page.inner_text(".message.assistant p:last-of-type") in ("certainly", "never")
        page.select_option("#constraint", "schema")
        page.fill("#rule", "{")
        page.fill("#question", "And?")
        page.click("#ask")
        assert "the schema is no JSON" in page.inner_text("#state")
        page.fill("#rule", '{"type": "nonsense"}')
        page.click("#ask")
        page.wait_for_selector(".message.error")
        assert "nonsense" in page.inner_text(".message.error")
        assert page.input_value("#question") == "And?"  # what was not answered can be asked again
        page.close()

    def test_a_tool_is_called(self, caller: RunningServer, browser: Any) -> None:
        """The panel is there where a model is told of tools; a call is shown, and so is what is wrong with the list."""
        visit = Visit(browser, caller.url)
        page = visit.page
        page.click("summary:has-text('Sampling')")
        page.fill("[data-field=temperature]", "0")
        page.click("summary:has-text('Tools')")
        page.fill("#tools", "[")
        page.fill("#question", "How warm is it?")
        page.click("#ask")
        assert "the list of tools is no JSON" in page.inner_text("#state")
        page.fill("#tools", json.dumps([WEATHER]))
        page.select_option("#choice", "required")
        page.click("#ask")
        page.wait_for_selector(".facts")
        called = re.fullmatch(r"weather\((.+)\)", page.inner_text(".message.assistant p:last-of-type").strip())
        assert called is not None
        assert json.loads(called[1]).keys() == {"city"}
        page.select_option("#choice", "none")
        page.fill("#question", "And now?")
        page.click("#ask")
        page.wait_for_selector(".message.assistant:nth-of-type(4) .facts")
        assert page.inner_text(".message.assistant:nth-of-type(4) p:last-of-type") == ANSWER
        page.fill("#tools", json.dumps([WEATHER, WEATHER]))
        page.select_option("#choice", "")
        page.fill("#question", "Again?")
        page.click("#ask")
        page.wait_for_selector(".message.error")
        assert "another function 'weather'" in page.inner_text(".message.error")
        page.fill("#tools", json.dumps([WEATHER]))
        page.select_option("#choice", "required")
        page.click("summary:has-text('As a program')")
        page.click("#python")
        eventually(lambda: "tools=" in page.input_value("#program"))
        command = [sys.executable, "-c", page.input_value("#program")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "name='weather'" in done.stdout, done.stderr  # what it calls, which is no text
        page.close()

    def test_what_it_shows_as_a_program_runs(self, demo: RunningServer, browser: Any, tmp_path: Path) -> None:
        """Python and curl, each with the picture's file beside it."""
        example = load_example()
        page = Visit(browser, demo.url).page
        page.set_input_files("#files", example.picture)
        page.wait_for_selector("#pictures li")
        page.fill("#question", example.question)
        page.click("summary:has-text('Sampling')")
        page.fill("[data-field=temperature]", "0")
        page.click("summary:has-text('As a program')")
        shutil.copy(example.picture, tmp_path)
        for button, command in (("#python", [sys.executable]), ("#curl", ["bash"])):
            if shutil.which("curl") is None and button == "#curl":
                continue
            page.click(button)
            begin = "import" if button == "#python" else "curl"
            eventually(lambda begin=begin: page.input_value("#program").startswith(begin))  # type: ignore[misc]
            program = page.input_value("#program")
            done = subprocess.run(command, input=program, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            answer = done.stdout if button == "#python" else json.loads(done.stdout)["choices"][0]["message"]["content"]
            assert answer.strip() == example.answer
        page.close()
