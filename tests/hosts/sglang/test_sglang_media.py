"""siglane's media policy inside SGLang: what a client names is refused or fetched by siglane, never opened by SGLang.

Left alone SGLang opens any path and asks any address (`test_what_sglang_itself_would_open`).
"""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from host_clients import Client, data_url, encoded, image, png, refusal, user, video
from PIL import Image
from sglang_host import ENVIRONMENT, sglang_server
from waiting import PATIENCE, eventually

from siglane.weights.demo import FOLDERS, demo_folder

QUESTION = "What does the sign say?"
PROMPT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CAFE = (demo_folder() / "pictures" / "cafe.png").read_bytes()
LIMITS = {"SIGLANE_MAX_IMAGES": "4", "SIGLANE_MAX_IMAGE_BYTES": "40000", "SIGLANE_MAX_IMAGE_PIXELS": "1000000"}
NO_SCHEME = "the media URL must start with data:, https://, http:// or file://"
NO_FILE = "not a file below the allowed folder"
PRIVATE = "the media URL leads to a private or reserved address"
BASE64 = "the data URL is not valid base64 (standard alphabet, padded, no whitespace)"


@dataclass
class Web:
    """A web server on the loopback interface, and what it was asked for."""

    server: ThreadingHTTPServer
    asked: list[str] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)  # until it is set, nothing below slow/ is answered

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server.server_port}/{path}"


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", base64.urlsafe_b64decode(self.path.removeprefix("/to/")).decode())
                self.end_headers()
                return
            if self.path.startswith("/slow/"):
                found.open.wait(PATIENCE)
            self.send_response(404 if self.path == "/missing.png" else 200)
            self.end_headers()
            self.wfile.write(CAFE)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # connections beyond it would be made seconds later

    found = Web(Server(("127.0.0.1", 0), Handler))
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@dataclass(frozen=True)
class Served:
    """folder: files that requests may name."""

    client: Client
    folder: Path

    def refused(self, url: str) -> str:
        """The same refusal by SGLang's OpenAI route and by its native one, in each form that takes a picture."""
        (message,) = {
            refusal(self.client.chat(image(url), QUESTION)),
            refusal(self.client.generate(PROMPT, image_data=url)),
            refusal(self.client.generate(PROMPT, image_data=[url])),
            refusal(self.client.generate(PROMPT, image_data=[{"url": url}])),
        }
        return message

    def accepts(self, url: str) -> None:
        response = self.client.chat(image(url), QUESTION)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == "CAFE"


def serve(folder: Path, **env: str) -> Any:
    model = demo_folder() / FOLDERS["demo"]
    everything = {"SIGLANE_SGLANG_VIEWS": str(folder / "views"), **env}
    return sglang_server(model, env=everything, form="module", served_model_name="demo", start_seconds=400)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "allowed").mkdir()
    with serve(folder, SIGLANE_ALLOWED_LOCAL_MEDIA_PATH=str(folder / "allowed"), **LIMITS) as server:
        print(f"\npython -m sglang.launch_server: healthy after {server.start_seconds:.0f} s")
        yield Served(Client(server, "demo"), folder / "allowed")
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(autouse=True)
def afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test sent, the next good request is answered."""
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").accepts(data_url(CAFE))


def test_paths(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one of a picture that could be read, even below the allowed folder."""
    (served.folder / "cafe.png").write_bytes(CAFE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative.png").write_bytes(CAFE)
    for path in ("/etc/hostname", str(served.folder / "cafe.png"), "relative.png", "", base64.b64encode(CAFE).decode()):
        assert served.refused(path) == f"image_data[0]: {NO_SCHEME}"
    assert refusal(served.client.chat(video("/etc/hostname"), QUESTION)) == f"video_data[0]: {NO_SCHEME}"


def test_files(served: Served, tmp_path: Path) -> None:
    inside, outside = served.folder / "cafe.png", tmp_path / "cafe.png"
    inside.write_bytes(CAFE)
    outside.write_bytes(CAFE)
    (served.folder / "link.png").symlink_to(outside)
    (served.folder / "folder").symlink_to(tmp_path)
    os.mkfifo(served.folder / "pipe.png")  # whoever opens it waits for ever
    served.accepts(inside.as_uri())
    escapes = ("link.png", "folder/cafe.png", "../cafe.png", "pipe.png", "missing.png", "", "%2e%2e/cafe.png")
    for url in (outside.as_uri(), "file:///etc/hostname", *(f"{served.folder.as_uri()}/{name}" for name in escapes)):
        assert served.refused(url) == f"image_data[0]: {NO_FILE}"


def test_private_addresses(served: Served, web: Web) -> None:
    """No connection is made, whatever the address is spelt like."""
    names = ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.")
    for host in names:
        served.refused(web.url("cafe.png", host))
    assert served.refused(web.url("cafe.png")) == f"image_data[0]: {PRIVATE}"
    for host in ("169.254.169.254", "10.0.0.1", "[fd00::1]", "0.0.0.0"):
        assert served.refused(f"http://{host}/latest/meta-data") == f"image_data[0]: {PRIVATE}"
    assert served.refused("ftp://example.org/cafe.png") == f"image_data[0]: {NO_SCHEME}"
    assert not web.asked


def bomb(width: int, height: int) -> bytes:
    """A PNG file of that size that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN: dict[str, tuple[Callable[[], str], str]] = {
    "too many bytes": (lambda: data_url(bytes(40003)), "the file is larger than 40000 bytes"),
    "too many pixels": (lambda: data_url(bomb(1001, 1000)), "1001 x 1000"),
    "decompression bomb": (lambda: data_url(bomb(60000, 60000)), "60000 x 60000"),
    "extreme aspect": (lambda: data_url(encoded(Image.new("RGB", (1005, 5)))), "sides up to 200:1 are accepted"),
    "short base64": (lambda: "data:image/png;base64,QUJ", BASE64),
    "foreign base64": (lambda: "data:image/png;base64,_-8=", BASE64),
    "no base64": (lambda: "data:image/png,abc", "a data URL must have the form data:image/png;base64,…"),
    "svg": (lambda: data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "SVG or HTML"),
    "pdf": (lambda: data_url(b"%PDF-1.7\n", "application/pdf"), "accepted formats: JPEG, PNG, WEBP, GIF, BMP"),
    "a format that is off": (lambda: data_url(encoded(Image.new("RGB", (9, 9)), "TIFF")), "TIFF"),
    "truncated": (lambda: data_url(png(200, 100)[:3000]), "the image"),
    "nothing": (lambda: "data:image/png;base64,", "not an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pictures_that_cannot_be_used(served: Served, name: str) -> None:
    make, reason = BROKEN[name]
    message = served.refused(make())
    assert message.startswith("image_data[0]: ")
    assert reason in message


def test_the_bad_one_of_several_is_named(served: Served) -> None:
    good, bad = data_url(CAFE), data_url(png()[:100])
    for place in range(3):
        urls = [good] * 3
        urls[place] = bad
        assert refusal(served.client.chat(*map(image, urls), QUESTION)).startswith(f"image_data[{place}]: ")
    assert refusal(served.client.chat(*[image(good)] * 5)) == "the request has 5 images; at most 4 are accepted"
    large = data_url(encoded(Image.new("RGB", (600, 900))))
    message = refusal(served.client.chat(image(large), image(large)))
    assert message == "the images have 1080000 pixels together; at most 1000000 are accepted"


def test_the_native_route(served: Served) -> None:
    """Of a batch one bad picture refuses the request; dictionaries carry siglane's limits under SGLang's names or its
    own; what siglane does not know is refused by name."""
    good, client = data_url(CAFE), served.client
    for images in (good, [good], [{"url": good}], [{"url": good, "max_dynamic_patch": 1, "detail": "high"}]):
        response = client.generate(PROMPT, image_data=images)
        assert response.status_code == 200, response.text
        assert response.json()["text"] == "CAFE"
    batch = client.post("/generate", {"text": [PROMPT, "<image>" + PROMPT], "image_data": [[good], [good, good]]})
    assert [one["meta_info"]["image_tokens"] for one in batch.json()] == [16, 32]
    two = {"text": [PROMPT, PROMPT], "image_data": [good, "/etc/hostname"]}
    assert refusal(client.post("/generate", two)) == f"image_data[0]: {NO_SCHEME}"
    streamed = client.generate(PROMPT, image_data="/etc/hostname", stream=True)  # SGLang has said 200 already
    assert NO_SCHEME in streamed.text
    for images, reason in (
        ([[good]], "image_data[0]: siglane reads a URL, bytes or an open picture, got list"),
        ([{"url": good, "fps": 2}], "image_data[0]: key 'fps' is not known"),
        ([{"url": good, "max_pixels": 9000}], "image_data[0]: max_pixels does not apply to this model"),
        ([{"url": good, "max_dynamic_patch": 0}], "image_data[0]: max_tiles must be at least 1, got 0"),
        ([{"url": good, "detail": "huge"}], "image_data[0]: detail must be one of"),
        ([good, good], "the chat template wrote 1 image placeholders for 2 images"),
    ):
        assert refusal(client.generate(PROMPT, image_data=images)).startswith(reason)
    message = refusal(client.generate(PROMPT, image_data=[good], mm_hashes=["ab"]))
    assert message.startswith("mm_hashes are not accepted")
    assert refusal(client.generate(PROMPT, audio_data=good)) == "this model does not read audio"


def test_ids_outside_the_vocabulary(served: Served) -> None:
    """SGLang's native route takes any; alone they read the last row, as beside an image in stock SGLang."""
    for token_id in (10**6, -5, 2**40):
        ids = {"input_ids": [5, token_id, 7], "sampling_params": {"max_new_tokens": 2}}
        assert served.client.post("/generate", ids).status_code == 200
        message = refusal(served.client.post("/generate", {**ids, "image_data": data_url(CAFE)}))
        assert message.startswith(f"input_ids names token {token_id}; the vocabulary ends at ")


ROUTES: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/responses": lambda url: {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
    },
    "/v1/messages": lambda url: {
        "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}],
        "max_tokens": 4,
    },
    "/v1/embeddings": lambda url: {"input": [{"text": "x", "image": url}]},
    "/encode": lambda url: {"text": PROMPT, "image_data": url},
    "/classify": lambda url: {"text": PROMPT, "image_data": url},
    "/vertex_generate": lambda url: {"instances": [{"text": PROMPT, "image_data": url}]},
    "/v1/decisions": lambda url: {
        "input": [user(image(url), "?")], "questions": {"a": {"type": "yes_no", "text": "is it?"}},
    },
    "/v1/systemone": lambda url: {
        "state": "x", "images": [{"url": url}], "questions": {"a": {"type": "noul", "instructions": "is it?"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_sglangs_other_routes(served: Served, web: Web, route: str) -> None:
    """None of them opens a file or makes a connection."""
    (served.folder / "cafe.png").write_bytes(CAFE)
    for url in (str(served.folder / "cafe.png"), "file:///etc/hostname", web.url("cafe.png")):
        response = served.client.post(route, {"model": "demo", **ROUTES[route](url)})
        assert response.status_code == 400, response.text
        assert "Traceback" not in response.text
    assert not web.asked


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of one's own network."""
    folder = tmp_path_factory.mktemp("trusting")
    env = {"SIGLANE_ALLOW_PRIVATE_ADDRESSES": "1", "SIGLANE_MAX_TILES": "2", "SIGLANE_DETAIL": "low"}
    with serve(folder, SIGLANE_IMAGE_TIMEOUT=str(PATIENCE), **env) as server:
        yield Served(Client(server, "demo"), folder)
        assert "Traceback" not in server.log.read_text()


def test_web_servers(trusting: Served, web: Web) -> None:
    """One request for each picture; redirects are followed under the same rules; files stay closed."""
    web.asked.clear()

    def to(url: str) -> str:
        return web.url("to/" + base64.urlsafe_b64encode(url.encode()).decode())

    trusting.accepts(web.url("cafe.png"))
    assert web.asked == ["/cafe.png"]
    trusting.accepts(to(web.url("cafe.png")))
    for url, reason in (
        (to("file:///etc/hostname"), ""),
        (to(to(to(to(web.url("cafe.png"))))), "redirect"),
        (web.url("missing.png"), "404"),
        ("file:///etc/hostname", "file:// media URLs are switched off here"),
    ):
        message = refusal(trusting.client.chat(image(url), QUESTION))
        assert message.startswith("image_data[0]: ")
        assert reason in message


def test_a_slow_web_server_holds_up_nobody_else(trusting: Served, web: Web) -> None:
    slow = {f"/slow/{number}.png" for number in range(12)}  # requests for one URL would share its download
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(trusting.client.chat, image(web.url(path[1:])), QUESTION) for path in slow]
        try:
            eventually(lambda: slow <= set(web.asked) or any(job.done() for job in waiting))
            trusting.accepts(data_url(CAFE))
            assert not any(job.done() for job in waiting), [job.result().text for job in waiting if job.done()]
        finally:
            web.open.set()
        assert [job.result().status_code for job in waiting] == [200] * 12


def test_the_operators_budget(trusting: Served) -> None:
    """A ceiling for what a request asks for, and the detail of images that name none."""
    wide = data_url(png(500, 60))

    def tokens(**fields: Any) -> int:
        response = trusting.client.chat(image(wide, **fields), QUESTION)
        assert response.status_code == 200, response.text
        found: int = response.json()["usage"]["prompt_tokens_details"]["image_tokens"]
        return found

    assert tokens() == tokens(detail="low") == tokens(detail="high", max_dynamic_patch=1) < tokens(detail="high")
    assert tokens(detail="high") == tokens(detail="high", max_dynamic_patch=9)


def test_what_sglang_itself_would_open(tmp_path: Path) -> None:
    (tmp_path / "cafe.png").write_bytes(CAFE)
    program = "import sys; from sglang.srt.utils import load_image; print(load_image(sys.argv[1], False)[0].size)"
    for url in (str(tmp_path / "cafe.png"), (tmp_path / "cafe.png").as_uri()):
        done = subprocess.run(
            [sys.executable, "-c", program, url], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(Image.open(io.BytesIO(CAFE)).size), done.stderr
