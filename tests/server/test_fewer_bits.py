"""`siglane serve demo --quantization 8bit`, from the command line to an answer, and where the processor has no VNNI."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from serving import chat, image_part, listening

from siglane.cli.demo import load_example
from siglane.cli.main import main
from siglane.engine.process.child import EngineSpec
from siglane.server import launch
from siglane.settings.server import ServerConfig

COMMAND = "serve demo --quantization 8bit --device cpu --threads 1 --kv-tokens 2048 --port 0 --log-level error"


def test_the_shipped_model_is_served_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, its engine's process and a real socket; only the wait for a signal is left out."""
    example, answers = load_example(), []

    def serve(config: ServerConfig, spec: EngineSpec, listener: socket.socket, *limits: Any) -> int:
        listener.close()  # `listening` has one of its own
        with launch.serving(config, spec, *limits) as served, listening(served) as server:
            served.engine.wait_ready()
            body = chat(image_part(example.picture.read_bytes()), example.question, model="demo", max_tokens=32)
            answers.append(server.post(body).json())
        return 0

    monkeypatch.setattr(launch, "serve", serve)
    assert main(COMMAND.split()) == 0
    (answer,) = answers
    assert answer["choices"][0]["message"]["content"] == example.answer
    assert answer["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_processor_without_products_gets_one_sentence(
    bits: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("siglane.nn.quantise.has_integer_products", lambda: False)
    assert main(["embed", "demo-siglip", "--text", "a blue circle", "--json", "--quantization", bits]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        f"siglane: error: quantization '{bits}': this processor and system have no exact 8-bit products (VNNI, AMX, or "
        "AVX2 on Linux); use the original model in floats\n"
    )
