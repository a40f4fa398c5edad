"""Rows 50 to 57 and 69: batches, checkpoints and everything else on a disk. Commands run as users run them, beside a
server that answers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import SECRET, Stage, Table, copied, rewritten
from picture_site import picture_site
from serving import CHAT, HOST, MODEL, chat, image_part, image_url, picture, running
from test_batches import files_of_at_most
from waiting import PATIENCE, eventually, lines_of

from siglane.batch import remote
from siglane.cli.main import main
from siglane.families.processor import load_processor
from siglane.weights.checksum import SUMS
from siglane.weights.hub import open_checkpoint

TABLE = Table()

# --- batches, asked of the server


def line(name: str, *content: Any, **fields: Any) -> str:
    return json.dumps({"custom_id": name, "url": CHAT, "body": chat(*content, **fields)})


def asked(stage: Stage, source: str | bytes) -> None:
    (stage.folder / "in.jsonl").write_bytes(source if isinstance(source, bytes) else source.encode())


def batch(stage: Stage, file: str = "out") -> int:
    """The exit code of `siglane batch` for what is asked."""
    stage.patch.setenv("NO_PROXY", "*")
    stage.patch.setattr(remote, "FIRST_PAUSE", 0.01)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(words(stage, file))


def words(stage: Stage, file: str) -> list[str]:
    paths = ["-i", str(stage.folder / "in.jsonl"), "-o", str(stage.folder / f"{file}.jsonl")]
    return ["batch", MODEL, *paths, "--base-url", stage.server.url, "--concurrency", "1"]


def written(stage: Stage, file: str = "out") -> list[dict[str, Any]]:
    return [json.loads(row) for row in (stage.folder / f"{file}.jsonl").read_bytes().splitlines()]


ROWS_OF_A_BATCH = "\n".join(
    line(f"row {number}", image_part(picture(30 + number % 3, 30)), f"{number}?") for number in range(8)
)


@TABLE.row(50, "a full disk")
def a_full_disk(stage: Stage) -> None:
    """What is written ends with a whole row; with room again the same command ends with the bytes of any other run."""
    asked(stage, ROWS_OF_A_BATCH)
    assert batch(stage, "whole") == 0
    whole, out = ((stage.folder / f"{name}.jsonl") for name in ("whole", "out"))
    with files_of_at_most(whole.stat().st_size // 2):
        assert batch(stage) == 3
    found = out.read_bytes()
    assert found.endswith(b"\n")
    assert 0 < len(found) < whole.stat().st_size
    assert batch(stage) == 0
    assert out.read_bytes() == whole.read_bytes()


@TABLE.row(51, "a killed batch", slow=True, allow_private_addresses=True, image_timeout=PATIENCE)
def a_killed_batch(stage: Stage) -> None:
    """kill -9 while a row waits for its picture, and a line that is torn besides."""
    with picture_site(stage.patch) as site:
        waits = line("waits", image_url(site.url("wait", HOST)), "x")
        rows = ROWS_OF_A_BATCH.splitlines()
        asked(stage, "\n".join([*rows[:4], waits, *rows[4:]]))
        site.open.set()
        assert batch(stage, "whole") == 0
        site.open.clear()
        out = stage.folder / "out.jsonl"
        with subprocess.Popen(
            [sys.executable, "-m", "siglane.cli.main", *words(stage, "out")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            eventually(lambda: lines_of(out) >= 3)
            process.send_signal(signal.SIGKILL)
        before = out.read_bytes()
        assert before.count(b"\n") < len(rows)
        out.write_bytes(before + before[:40])
        site.open.set()
        assert batch(stage) == 0
        assert out.read_bytes() == (stage.folder / "whole.jsonl").read_bytes()


@TABLE.row(52, "lines that are no requests")
def lines_that_are_no_requests(stage: Stage) -> None:
    lines: list[tuple[bytes, str | None]] = [
        (b"\xef\xbb\xbf" + line("first", "x").encode(), None),
        (line("second", "x").encode() + b"\r", None),
        (b"{broken", "invalid_json"),
        (b"[" * 5000, "invalid_json"),
        (json.dumps({"url": CHAT, "body": {}}).encode(), "missing_custom_id"),
        (json.dumps({"custom_id": "a", "url": "/v1/images", "body": {}}).encode(), "not_found"),
        (line("first", "x").encode(), "duplicate_custom_id"),
        (b"", None),
        (line("large", "x" * 2_000_000).encode(), "context_length_exceeded"),
        (line("last", "x").encode(), None),
    ]
    asked(stage, b"\n".join(one for one, _ in lines))
    assert batch(stage) == 0
    assert [row["custom_id"] for row in written(stage)] == ["first", "second", "last"]
    told = {row["line"]: row["error"]["code"] for row in written(stage, "out.errors")}
    assert told == {number: code for number, (_, code) in enumerate(lines, 1) if code is not None}


@TABLE.row(53, "URLs of a batch")
def urls_of_a_batch(stage: Stage) -> None:
    with picture_site(stage.patch) as site:
        urls = [site.url(SECRET, HOST), "http://169.254.169.254/", "file:///etc/passwd", "/etc/passwd"]
        rows = [line(str(number), image_url(url), "x") for number, url in enumerate(urls)]
        asked(stage, "\n".join([*rows, line("good", "x")]))
        assert batch(stage) == 0
        assert site.requests == []
    assert [row["custom_id"] for row in written(stage)] == ["good"]
    codes = [row["error"]["code"] for row in written(stage, "out.errors")]
    assert codes == ["image_url_forbidden"] * 2 + ["local_media_forbidden", "unsupported_url_scheme"]


# --- checkpoints and options


def assert_not_started(model: str | Path, says: str, *flags: str) -> None:
    """`siglane serve` ends with one line and exit code 2."""
    options = ("--device", "cpu", "--threads", "1", "--port", "0")
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main(["serve", str(model), *options, *(flags or ("--kv-tokens", "64"))]) == 2
    (last,) = [one for one in told.getvalue().splitlines() if one.startswith("siglane: error: ")]
    assert says in last
    assert "Traceback" not in told.getvalue()


WEIGHTS = "llm/model.safetensors"
DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[: len(data) // 2], "is not a usable safetensors file"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
}


@TABLE.row(54, "damaged weights")
def damaged_weights(stage: Stage) -> None:
    for name, (damage, says) in DAMAGED.items():
        file = copied(stage, name) / WEIGHTS
        rewritten(file, damage(file.read_bytes()))
        assert_not_started(file.parents[1], says)


@TABLE.row(55, "a flipped bit")
def a_flipped_bit(stage: Stage) -> None:
    file = copied(stage) / WEIGHTS
    (file.parents[1] / SUMS).write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {WEIGHTS}\n")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    rewritten(file, bytes(data))
    assert_not_started(file.parents[1], "is damaged: expected SHA-256")


@TABLE.row(56, "code in a checkpoint")
def code_in_a_checkpoint(stage: Stage) -> None:
    """Pickles are refused; code is neither asked for nor run."""
    file = copied(stage, "pickled") / "mm_projector/model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    assert_not_started(file.parents[1], "convert them")
    folder = copied(stage, "coded")
    ran = stage.folder / "ran"
    for part in (folder, folder / "llm"):
        (part / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((part / "config.json").read_text())
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
        config["auto_map"] = dict.fromkeys(names, "evil.Evil")
        rewritten(part / "config.json", json.dumps(config))
    with running(load_processor(open_checkpoint(folder)), stage.engine) as server:
        assert server.post(chat("x")).status_code == 200
    assert not ran.exists()


SIZES: dict[str, Any] = {
    "hidden_size": 10**12,
    "vocab_size": 10**7,
    "num_hidden_layers": -3,
    "rms_norm_eps": float("nan"),
}


@TABLE.row(57, "sizes that cannot be")
def sizes_that_cannot_be(stage: Stage) -> None:
    for name, size in SIZES.items():
        file = copied(stage, name) / "llm/config.json"
        rewritten(file, json.dumps({**json.loads(file.read_text()), name: size}))
        assert_not_started(file.parents[1], "")


@TABLE.row(69, "what cannot start")
def what_cannot_start(stage: Stage) -> None:
    model = stage.spec.model
    broken = stage.folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (stage.folder / "options.toml").write_text("max_queue = many")
    with socket.create_server((HOST, 0)) as taken:
        assert_not_started(model, "in use", "--port", str(taken.getsockname()[1]))
    assert_not_started(model, "cannot listen", "--host", "203.0.113.1")
    assert_not_started(stage.folder / "missing", "no folder")
    assert_not_started("not a/hub/id", "no folder")
    assert_not_started(stage.folder, "no config.json")
    assert_not_started(broken, "config.json is not valid JSON")
    assert_not_started(model, "not a folder", "--allowed-local-media-path", str(stage.folder / "none"))
    assert_not_started(model, "options.toml", "--config", str(stage.folder / "options.toml"))


@TABLE.row(69, "too little memory")
def too_little_memory(stage: Stage) -> None:
    assert_not_started(stage.spec.model, "a KV cache of 1000000000000 tokens takes", "--kv-tokens", str(10**12))
