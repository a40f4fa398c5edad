"""Where a server listens, under which path, and what it tells of a request's stages."""

from __future__ import annotations

import itertools
import json
import ssl
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx2
import pytest
from serving import (
    CHAT,
    HOST,
    MODEL,
    RunningServer,
    assert_error,
    chat,
    config_of,
    image_part,
    picture,
    running,
    stream,
)
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.server.launch import check_certificate, listen_at, preflight
from siglane.server.traces import check_traces

CERTIFICATE = Path(__file__).parent / "localhost.pem"  # its key is in it; for 127.0.0.1 until 2126
STAGES = ["fetch", "prepare", "decode", "queue", "encode", "prefill", "generate"]


def test_https(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, ssl_certfile=CERTIFICATE) as server:
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        with httpx2.Client(base_url=f"https://{HOST}:{server.port}", verify=trusted, trust_env=False) as client:
            assert client.post(CHAT, json=chat(image_part(picture()), "x")).status_code == 200
            with client.stream("POST", CHAT, json=chat("x", stream=True)) as response:
                assert list(response.iter_lines())[-2] == "data: [DONE]"
            assert_error(client.post(CHAT, content=b"x" * 10), 415)
        with server.connect() as plain:  # a client that speaks no TLS is dropped, and nobody else
            plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" not in plain.recv(1000)
        with httpx2.Client(base_url=f"https://{HOST}:{server.port}", verify=trusted, trust_env=False) as client:
            assert client.get("/health").status_code == 200


def test_a_unix_socket(processor: Processor, engine: EngineProcess, short_path: Path) -> None:
    path = short_path / "siglane.sock"
    with (
        running(processor, engine, uds=path),
        httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://siglane") as client,
    ):
        assert client.post(CHAT, json=chat("x")).json()["model"] == MODEL
        with pytest.raises(UserError, match="another server listens there"):
            listen_at(path)
    listen_at(path).close()  # what a killed server leaves is no hindrance
    file = short_path / "file"
    file.touch()
    with pytest.raises(UserError, match="there is a file, which is no socket"):
        listen_at(file)
    with pytest.raises(UserError, match="No such file or directory"):
        listen_at(short_path / "none" / "x")
    with pytest.raises(UserError, match="too long"):
        listen_at(short_path / ("x" * 200))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A socket's path has at most 104 characters somewhere."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_under_the_path_of_a_proxy(processor: Processor, engine: EngineProcess) -> None:
    """Whether the proxy takes the path away or not; a key is asked for either way."""
    with running(processor, engine, root_path="/models/one", api_key="k") as server, server.http() as client:
        key = {"authorization": "Bearer k"}
        for path in ("/models/one/v1/models", "/v1/models"):
            assert client.get(path, headers=key).json()["data"][0]["id"] == MODEL
            assert_error(client.get(path), 401)
        assert client.get("/models/one/health").status_code == 200
        assert client.post("/models/one" + CHAT, json=chat("x"), headers=key).status_code == 200
        for path in ("/models/one/models/one/health", "/models/oneself/health", "/models/one//health"):
            assert_error(client.get(path), 401)
            assert_error(client.get(path, headers=key), 404, "not_found")
        document = client.get("/models/one/openapi.json", headers=key).json()
        assert document["servers"] == [{"url": "/models/one"}]


@pytest.mark.parametrize("path", ["one", "/one/", "/", "/a b", "/../x?"])
def test_what_is_no_root_path(path: str) -> None:
    with pytest.raises(UserError, match="root_path must be a path such as /siglane"):
        config_of(root_path=path)


def test_what_cannot_be_listened_with_is_said_at_once(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text(CERTIFICATE.read_text().partition("-----BEGIN CERTIFICATE")[0])
    for certificate, reason in [(tmp_path / "none", "No such file or directory"), (key, "cannot be used")]:
        with pytest.raises(UserError, match=reason):
            check_certificate(certificate, None)
    with pytest.raises(UserError, match="without ssl_certfile"):
        config_of(ssl_keyfile=key)
    with pytest.raises(UserError, match="api_keys cannot be read"):
        preflight(config_of(api_keys=tmp_path / "none"), "owner/name")
    with pytest.raises(UserError, match=r"must be an http\(s\) address"):
        check_traces("collector:4318")


def test_stages_are_told_to_who_asks(server: RunningServer) -> None:
    """By a header, in the answer or the last event; without it nothing is told."""
    body, header = chat(image_part(picture(seed=41)), "x"), {"x-siglane-timings": "1"}
    timings = server.post(body, headers=header).json()["siglane"]["timings"]
    assert set(timings) == set(STAGES)
    assert all(seconds >= 0 for seconds in timings.values())
    with (
        server.http() as client,
        client.stream("POST", CHAT, json={**body, "stream": True}, headers=header) as response,
    ):
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert set(json.loads(events[-2])["siglane"]["timings"]) == set(STAGES)
    assert "timings" not in server.post(body).json()["siglane"]
    assert "timings" not in server.post(body, headers={"x-siglane-timings": "0"}).json()["siglane"]
    assert stream(server, body).done


class Collector(HTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), self._handler())
        self.bodies: list[bytes] = []
        looks_every = 0.01  # seconds, whether it is to end
        threading.Thread(target=self.serve_forever, args=(looks_every,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def test_traces(processor: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is a span below its caller's, its stages are spans below it, in order and inside of it."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'siglane[otel]'")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from siglane.server.traces import Traces

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none")
    collector = Collector()
    traces = Traces(f"http://{HOST}:{collector.server_port}/v1/traces")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running(processor, engine, traces=traces) as server:
        header = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"}
        body = chat(image_part(picture(seed=42)), "x")
        assert server.post(body, headers=header).status_code == 200
        assert server.post(body, headers={"traceparent": f"00-{trace}-{parent}-00"}).status_code == 200  # not sampled
        assert server.post(chat("x", n=0), headers={"traceparent": "no\x7f"}).status_code == 400
        with server.http() as client:
            assert client.get("/health").status_code == 200
        eventually(lambda: server.metric("siglane_requests_total", outcome="client_error") == 1)
    traces.close()
    collector.shutdown()
    found = [
        span
        for sent in map(ExportTraceServiceRequest.FromString, collector.bodies)
        for resource in sent.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    roots = [span for span in found if span.name == f"POST {CHAT}"]
    assert len(roots) == 2
    (root,) = (span for span in roots if span.trace_id.hex() == trace)
    assert root.parent_span_id.hex() == parent
    attributes = {one.key: one.value for one in root.attributes}
    assert attributes["siglane.request_id"].string_value == "mine"
    assert attributes["http.response.status_code"].int_value == 200
    below = [span for span in found if span.parent_span_id == root.span_id]
    names = ["fetch", "preprocess", "decode images", "preprocess", "queue", "encode", "prefill", "decode tokens"]
    assert [span.name for span in below] == names
    edges = [edge for span in below for edge in (span.start_time_unix_nano, span.end_time_unix_nano)]
    slack = 5_000_000  # the engine's own clock
    assert root.start_time_unix_nano <= edges[0]
    assert edges[-1] <= root.end_time_unix_nano + slack
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(edges))
