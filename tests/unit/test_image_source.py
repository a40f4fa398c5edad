"""Where pictures may come from: strict data URLs, a pinned and bounded HTTP client, files below one folder.

"No connection" is asserted, not assumed: the lab records who comes.
"""

from __future__ import annotations

import base64
import builtins
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from checkpoints import write_siglip_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_site import DRIBBLED, PUBLIC, Lab, handler_of, picture, picture_site, wire
from PIL import Image, ImageFile
from waiting import PATIENCE, eventually

from siglane.config.preprocess import DecodeConfig
from siglane.errors import ImageError
from siglane.families.pipeline import MediaPipeline
from siglane.families.registry import image_facts
from siglane.media import remote
from siglane.media.item import MediaItem
from siglane.media.policy import MediaPolicy
from siglane.media.source import fetch, read_local
from siglane.types import DecodedImage, DecodedVideo
from siglane.weights.hub import open_checkpoint

POLICY = MediaPolicy()
SECRET = "s3cr3t"


def refusal(url: str, policy: MediaPolicy = POLICY, tenant: str | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetch(url, policy, tenant)
    message = str(caught.value)
    assert SECRET not in message
    assert not any(leak in message for leak in ("0x", "Traceback", "/etc", "/home", "/tmp", "?"))
    return caught.value


# --- data URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:;base64,", "DATA:text/html;charset=utf-8;BASE64,"])
def test_data_url(head: str) -> None:
    assert fetch(head + base64.b64encode(picture()).decode(), POLICY) == picture()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,QUJ",
        "data:image/png;base64,QUJD=",
        "data:image/png;base64,QUI==",
        "data:image/png;base64,QQ====",
        "data:image/png;base64,QQ==QQ==",
        "data:image/png;base64,QU JD",
        "data:image/png;base64,QUJD\n",
        "data:image/png;base64, QUJD",
        "data:image/png;base64,_-8=",
        "data:image/png;base64,QUJD%3D",
        "data:image/png;base64,ÄÖÜß",
        "data:image/png;base64,\ud800",
        "data:image/png;base64",
        "data:image/png,QUJD",
        "data:,QUJD",
        "data:",
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_bad_base64(url: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        without(monkeypatch, "pybase64")
    assert refusal(url).code == "invalid_base64"


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: Any, **named: Any) -> Any:
        if name == module:
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_data_url_over_the_cap() -> None:
    policy = MediaPolicy(max_bytes=300)
    assert len(fetch("data:;base64," + base64.b64encode(b"x" * 300).decode(), policy)) == 300
    error = refusal("data:;base64," + base64.b64encode(b"x" * 306).decode(), policy)
    assert (error.code, error.status) == ("request_too_large", 413)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_data_url_round_trip(data: bytes) -> None:
    assert fetch("data:application/octet-stream;base64," + base64.b64encode(data).decode(), POLICY) == data


# --- other schemes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cat.png",
        "/etc/passwd",
        "ftp://h/x",
        "gopher://h",
        "blob:x",
        "javascript:1",
        " http://h/",
        "//h/x",
        "x" * 99,
    ],
)
def test_unsupported_schemes(url: str) -> None:
    assert refusal(url).code == "unsupported_url_scheme"


# --- addresses ----------------------------------------------------------------------------------------------------

PRIVATE_ADDRESSES = (
    "0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 172.16.0.1 "
    "172.31.255.255 192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 "
    "224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 "
    "::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 100::1 2001::1 2001:10::1 2001:db8::1 "
    "2001:0:4136:e378:8000:63bf:3fff:fdd2 2002:7f00:1:: 2002:a00:1::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 "
    "fe80::1%eth0 fec0::1 ff02::1 4000::1"
)
PUBLIC_ADDRESSES = (
    "8.8.8.8 93.184.216.34 172.15.0.1 172.32.0.1 192.0.1.1 100.128.0.1 2606:4700::1111 2a00:1450:4001::1 "
    "::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
)


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES.split())
def test_private_addresses(address: str) -> None:
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES.split())
def test_public_addresses(address: str) -> None:
    assert remote.is_public(address)


# --- the lab ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with picture_site(monkeypatch) as made:
        yield made


def test_a_picture_is_fetched_from_the_resolved_address(lab: Lab) -> None:
    assert fetch(lab.url(f"ok?token={SECRET}#fragment"), POLICY) == picture()
    assert lab.connections == [PUBLIC]
    assert lab.requests == [(f"pictures.example:{lab.port}", f"/ok?token={SECRET}")]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.7", "169.254.169.254", "fd00::1", "::ffff:10.0.0.1"])
@pytest.mark.parametrize("order", [1, -1])
def test_one_private_address_among_public_ones_is_enough(lab: Lab, address: str, order: int) -> None:
    lab.name("mixed.example", [PUBLIC, address][::order])
    assert refusal(lab.url("ok", "mixed.example")).code == "image_url_forbidden"
    assert lab.connections == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "0",
        "[::1]",
        "[::]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "100.64.1.1",
        "10.0.0.1",
        "[fd00::1]",
        "224.0.0.1",
        "192.0.0.8",
    ],
)
def test_spellings_of_private_addresses(lab: Lab, host: str) -> None:
    assert refusal(lab.url("ok", host)).code == "image_url_forbidden"
    assert lab.connections == []


def test_rebinding_names_are_resolved_once(lab: Lab) -> None:
    lab.name("rebind.example", [PUBLIC], ["127.0.0.1"])
    assert fetch(lab.url("ok", "rebind.example"), POLICY) == picture()
    assert (lab.lookups, lab.connections) == (["rebind.example"], [PUBLIC])
    assert refusal(lab.url("ok", "rebind.example")).code == "image_url_forbidden"
    assert lab.connections == [PUBLIC]


def test_the_next_address_is_tried(lab: Lab) -> None:
    lab.name("two.example", ["198.41.0.4", PUBLIC])
    assert fetch(lab.url("ok", "two.example"), POLICY) == picture()
    assert lab.connections == ["198.41.0.4", PUBLIC]


def test_private_addresses_can_be_allowed(lab: Lab) -> None:
    assert fetch(lab.url("ok", "127.0.0.1"), MediaPolicy(allow_private_addresses=True)) == picture()


def test_http_can_be_switched_off(lab: Lab) -> None:
    assert refusal(lab.url("ok"), MediaPolicy(allow_http=False)).code == "image_url_forbidden"
    assert (lab.lookups, lab.connections) == ([], [])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"http://user:{SECRET}@pictures.example/ok", "image_url_forbidden"),
        ("http://127.0.0.1\\@pictures.example/ok", "image_url_forbidden"),
        ("http://pictures.example\\ok", "image_url_forbidden"),
        ("http://pictures.example:99999/ok", "image_url_forbidden"),
        ("http://pictures.example:0/ok", "image_url_forbidden"),
        ("http://pictures.example:port/ok", "image_url_forbidden"),
        ("http://%31%32%37.0.0.1/ok", "image_url_forbidden"),
        ("http://pictures .example/", "image_url_forbidden"),
        ("http://pictures.example/\r\nHost: evil", "image_url_forbidden"),
        ("http://[fe80::1%25eth0]/", "image_url_forbidden"),
        ("http://[::1/", "image_url_forbidden"),
        ("http:///ok", "image_url_forbidden"),
        ("http:ok", "image_url_forbidden"),
        ("https://", "image_url_forbidden"),
        ("http://\ud800/", "image_url_forbidden"),
        ("http://１２７.0.0.1/", "image_url_forbidden"),
        ("http://pictures.example/" + "x" * 70_000, "image_url_forbidden"),
        ("http://" + "a" * 64 + ".example/", "image_fetch_failed"),
    ],
)
def test_ambiguous_urls(lab: Lab, url: str, code: str) -> None:
    assert refusal(url).code == code
    assert lab.connections == []


# --- redirects ----------------------------------------------------------------------------------------------------


def test_redirects_are_followed(lab: Lab) -> None:
    lab.name("other.example", ["8.8.4.4"])
    assert fetch(lab.url("redirect/" + quote(lab.url("ok", "other.example"), safe="")), POLICY) == picture()
    assert fetch(lab.url("redirect/%2Fok"), POLICY) == picture()
    assert lab.connections == [PUBLIC, "8.8.4.4", PUBLIC, PUBLIC]


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1/", "image_url_forbidden"),
        ("http://inside.example/", "image_url_forbidden"),
        ("//169.254.169.254/latest/meta-data", "image_url_forbidden"),
        (f"http://user:{SECRET}@pictures.example/", "image_url_forbidden"),
        ("file:///etc/passwd", "unsupported_url_scheme"),
        ("data:;base64,QUJD", "unsupported_url_scheme"),
        ("ftp://pictures.example/", "unsupported_url_scheme"),
        ("http://[::1", "image_url_forbidden"),
        ("http://a b/", "image_url_forbidden"),
    ],
)
def test_every_hop_is_checked(lab: Lab, location: str, code: str) -> None:
    lab.name("inside.example", ["10.0.0.1"])
    assert refusal(lab.url("redirect/" + quote(location, safe=""))).code == code
    assert lab.connections == [PUBLIC]


def test_too_many_redirects(lab: Lab) -> None:
    assert refusal(lab.url("loop")).code == "image_fetch_failed"
    assert len(lab.requests) == 4


def test_redirects_can_be_switched_off(lab: Lab) -> None:
    assert refusal(lab.url("redirect/%2Fok"), MediaPolicy(max_redirects=0)).code == "image_fetch_failed"
    assert len(lab.requests) == 1


# --- servers that misbehave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 206, 304, 400, 403, 404, 500, 503])
def test_failed_answers(lab: Lab, status: int) -> None:
    error = refusal(lab.url(f"status/{status}?token={SECRET}"))
    assert error.code == "image_fetch_failed"
    assert str(status) in error.message


@pytest.mark.parametrize("path", ["lies", "gzip", "nonsense"])
def test_broken_answers(lab: Lab, path: str) -> None:
    assert refusal(lab.url(path)).code == "image_fetch_failed"


@pytest.mark.parametrize("path", ["big", "endless", "promises"])
def test_bodies_over_the_cap(lab: Lab, path: str) -> None:
    started = time.monotonic()
    assert refusal(lab.url(path), MediaPolicy(max_bytes=4000)).code == "image_too_large"
    assert time.monotonic() - started < DRIBBLED


@pytest.mark.parametrize("path", ["slow-body", "slow-head"])
def test_one_deadline_for_servers_that_dribble(lab: Lab, path: str) -> None:
    started = time.monotonic()
    assert refusal(lab.url(path), MediaPolicy(timeout=0.3)).code == "image_fetch_timeout"
    assert time.monotonic() - started < DRIBBLED


def test_the_deadline_covers_name_resolution(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(*_: Any, **__: Any) -> list[Any]:
        release.wait(PATIENCE)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    assert refusal(lab.url("ok"), MediaPolicy(timeout=0.2)).code == "image_fetch_timeout"
    assert not release.is_set()
    release.set()


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "Name or service not known"), OSError("network"), []])
def test_names_that_do_not_resolve(lab: Lab, failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: Any, **__: Any) -> list[Any]:
        if isinstance(failure, Exception):
            raise failure
        return []

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert refusal(lab.url("ok")).code == "image_fetch_failed"
    assert lab.connections == []


def test_refused_connections(lab: Lab) -> None:
    lab.name("closed.example", ["198.41.0.4"])
    assert refusal(lab.url("ok", "closed.example")).code == "image_fetch_failed"


def test_proxies_of_the_environment_are_not_used(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://198.41.0.9:3128")
    assert fetch(lab.url("ok"), POLICY) == picture()
    assert lab.connections == [PUBLIC]


@pytest.fixture
def burst(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any], list[Any]], list[Any]]:
    """What `ask` gives for each of the arguments, asked at once: the site answers when all have come to ask."""
    wanted, get = list[str](), remote.get

    def noted(url: str, policy: MediaPolicy, tenant: str | None) -> bytes:
        wanted.append(url)
        return get(url, policy, tenant)

    def at_once(ask: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(len(arguments)) as pool:
            asked = [pool.submit(ask, one) for one in arguments]
            eventually(lambda: len(wanted) == len(arguments))
            lab.open.set()
            return [one.result() for one in asked]

    monkeypatch.setattr(remote, "get", noted)
    return at_once


Burst = Callable[[Callable[[Any], Any], list[Any]], list[Any]]


def test_a_burst_for_one_url_is_one_download(lab: Lab, burst: Burst) -> None:
    bodies = burst(lambda _: fetch(lab.url("wait"), POLICY, "tenant"), [None] * 16)
    assert set(bodies) == {picture()}
    assert len(lab.requests) == 1
    assert fetch(lab.url("wait"), POLICY, "tenant") == picture()  # nothing is kept
    assert len(lab.requests) == 2


@pytest.mark.parametrize(
    ("tenants", "downloads"),
    [(["a"] * 4 + ["b"] * 4, 2), (["", "a", "", "a"], 2), ([None, None, None, "a"], 4)],
    ids=["two", "one without a name", "not known"],
)
def test_no_tenant_waits_for_the_download_of_another(
    lab: Lab, burst: Burst, tenants: list[str | None], downloads: int
) -> None:
    """The time an answer takes would tell one what the other looks at."""
    bodies = burst(lambda tenant: fetch(lab.url("wait"), POLICY, tenant), tenants)
    assert set(bodies) == {picture()}
    assert len(lab.requests) == downloads


def test_a_local_program_shares_its_downloads(lab: Lab, burst: Burst) -> None:
    bodies = burst(lambda _: read_local(lab.url("wait"), POLICY), [None] * 8)
    assert set(bodies) == {picture()}
    assert len(lab.requests) == 1


def test_a_burst_shares_failures_too(lab: Lab, burst: Burst) -> None:
    codes = burst(lambda _: refusal(lab.url("wait/500"), POLICY, "tenant").code, [None] * 8)
    assert codes == ["image_fetch_failed"] * 8
    assert len(lab.requests) == 1


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=lab"
    options = ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(path), "-out", str(path) + ".crt"]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + Path(str(path) + ".crt").read_bytes())
    return path


@pytest.fixture
def tls_lab(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lab, list[str | None]]]:
    requests: list[tuple[str, str]] = []
    server_names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: server_names.append(name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(requests, threading.Event()))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(remote, "_ssl_context", lambda: ssl.create_default_context(cafile=certificate))
    lab = Lab(server.server_port, requests=requests)
    lab.name("pictures.example", [PUBLIC])
    lab.name("impostor.example", [PUBLIC])
    wire(lab, monkeypatch)
    yield lab, server_names
    server.shutdown()
    server.server_close()


def test_tls_asks_for_the_name_not_the_address(tls_lab: tuple[Lab, list[str | None]]) -> None:
    lab, server_names = tls_lab
    assert fetch(lab.url("ok").replace("http:", "https:"), POLICY) == picture()
    assert server_names == ["pictures.example"]
    assert lab.connections == [PUBLIC]
    assert lab.requests == [(f"pictures.example:{lab.port}", "/ok")]


def test_tls_refuses_certificates_of_another_name(tls_lab: tuple[Lab, list[str | None]]) -> None:
    lab, _ = tls_lab
    assert refusal(lab.url("ok", "impostor.example").replace("http:", "https:")).code == "image_fetch_failed"
    assert lab.requests == []


def test_no_redirect_from_https_to_http(tls_lab: tuple[Lab, list[str | None]]) -> None:
    lab, _ = tls_lab
    url = lab.url("redirect/" + quote(lab.url("ok"), safe="")).replace("http:", "https:", 1)
    assert refusal(url).code == "image_url_forbidden"
    assert len(lab.connections) == 1


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a picture.png").write_bytes(picture())
    (tmp_path / "media-private").mkdir()
    (tmp_path / "media-private" / "secret.png").write_bytes(picture("blue"))
    (root / "link.png").symlink_to(root / "sub" / "a picture.png")
    (root / "way-out.png").symlink_to(tmp_path / "media-private" / "secret.png")
    (root / "folder-out").symlink_to(tmp_path / "media-private")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("path", ["sub/a picture.png", "sub/../sub/a picture.png", "link.png"])
@pytest.mark.parametrize("host", ["", "localhost"])
def test_files_below_the_root(folder: Path, path: str, host: str) -> None:
    assert fetch(f"file://{host}{folder}/{quote(path)}", MediaPolicy(allowed_local_root=folder)) == picture()


@pytest.mark.parametrize(
    "path",
    [
        "../media-private/secret.png",
        "%2e%2e/media-private/secret.png",
        "way-out.png",
        "folder-out/secret.png",
        "absent.png",
        "sub",
        "",
        "loop",
        "pipe",
        "%00",
        "sub/a%20picture.png/x",
    ],
)
def test_files_that_are_refused_all_look_alike(folder: Path, path: str) -> None:
    error = refusal(f"file://{folder}/{path}", MediaPolicy(allowed_local_root=folder))
    assert (error.code, error.message) == ("local_media_forbidden", "not a file below the allowed folder")


@pytest.mark.parametrize(
    "url",
    [
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:///etc/passwd",
        "file://elsewhere/x.png",
        "file:x.png",
        "file:",
        "file://[",
        "FILE:///etc/passwd",
    ],
)
def test_files_outside_the_root(folder: Path, url: str) -> None:
    assert refusal(url, MediaPolicy(allowed_local_root=folder)).code == "local_media_forbidden"
    assert refusal(url, POLICY).code == "local_media_forbidden"


def test_a_root_that_is_a_link_or_missing(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    url = f"file://{folder}/link.png"
    assert fetch(url, MediaPolicy(allowed_local_root=folder.parent / "alias")) == picture()
    assert refusal(url, MediaPolicy(allowed_local_root=folder / "absent")).code == "local_media_forbidden"


def test_a_link_put_there_after_the_check_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = Path.resolve

    def then_swap(self: Path, strict: bool = False) -> Path:
        resolved = resolve(self, strict)
        if resolved.name == "a picture.png":
            resolved.unlink()
            resolved.symlink_to(folder.parent / "media-private" / "secret.png")
        return resolved

    monkeypatch.setattr(Path, "resolve", then_swap)
    url = f"file://{folder}/sub/a%20picture.png"
    assert refusal(url, MediaPolicy(allowed_local_root=folder)).code == "local_media_forbidden"


def test_files_over_the_cap(folder: Path) -> None:
    url = f"file://{folder}/link.png"
    size = len(picture())
    assert len(fetch(url, MediaPolicy(allowed_local_root=folder, max_bytes=size))) == size
    assert refusal(url, MediaPolicy(allowed_local_root=folder, max_bytes=size - 1)).code == "image_too_large"


# --- the local caller ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> MediaPipeline:
    folder = tmp_path_factory.mktemp("model")
    write_siglip_checkpoint(folder)
    return MediaPipeline(image_facts(open_checkpoint(folder)), policy=POLICY, decode=DecodeConfig())


def load(pipeline: MediaPipeline, source: object) -> DecodedImage | DecodedVideo:
    item = MediaItem(source, "images[0]")
    pipeline.admit([item])
    pipeline.read(item)
    measured, image = pipeline.measure(item), pipeline.decode(item)
    assert image.size == measured
    return image


def test_every_kind_of_source_gives_the_same_picture(folder: Path, lab: Lab, pipeline: MediaPipeline) -> None:
    path = folder / "sub" / "a picture.png"
    sources: list[Callable[[], Any]] = [
        lambda: path,
        lambda: str(path),
        lambda: path.as_uri(),
        lambda: picture(),
        lambda: Image.open(path),
        lambda: "data:image/jpeg;base64," + base64.b64encode(picture()).decode(),
        lambda: lab.url("ok"),
    ]
    digests = {load(pipeline, source()).digest for source in sources}
    assert len(digests) == 1


@pytest.mark.parametrize("source", ["absent.png", "C:absent.png", "note:absent.png", Path("absent.png"), ".", "\0"])
def test_missing_files_are_named(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: MediaPipeline
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in (pipeline.read, pipeline.measure):
        with pytest.raises(ImageError) as caught:
            stage(MediaItem(source, "images[0]"))
        assert caught.value.code == "image_not_found"
        assert caught.value.message.startswith(f"{source}: cannot be read: ")


def test_a_name_that_is_a_whole_picture_is_cut(pipeline: MediaPipeline) -> None:
    words = base64.b64encode(bytes(range(256)) * 40).decode()
    with pytest.raises(ImageError) as caught:
        pipeline.read(MediaItem(words, "images[0]"))
    assert caught.value.message == f"{words[:60]}…: cannot be read: File name too long"


def test_damaged_files_are_named(tmp_path: Path, pipeline: MediaPipeline) -> None:
    (tmp_path / "half.png").write_bytes(picture()[:40])
    with pytest.raises(ImageError, match=r"half\.png: the image cannot be decoded") as caught:
        load(pipeline, tmp_path / "half.png")
    assert caught.value.code == "image_decode_failed"


def test_a_size_comes_from_a_files_header_alone(
    tmp_path: Path, pipeline: MediaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded pixels"))
    (tmp_path / "whole.png").write_bytes(picture())
    item = MediaItem(str(tmp_path / "whole.png"), "images[0]")
    assert pipeline.measure(item) == (4, 3)
    assert item.file is None
    (tmp_path / "broken.png").write_bytes(b"junk")
    with pytest.raises(ImageError, match=r"broken\.png: not an image") as caught:
        pipeline.measure(MediaItem(tmp_path / "broken.png", "images[0]"))
    assert (caught.value.code, caught.value.param) == ("image_decode_failed", "images[0]")
