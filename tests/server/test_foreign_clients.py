"""Clients and load generators that others wrote, as their users call them: `make test-clients`.

SGLang's and vLLM's run in their own environments, where `make test-sglang` and `make test-vllm` have built them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from calling import BOTH, IN_BERN, WEATHER, bias
from pydantic import BaseModel, ConfigDict
from serving import MODEL, RunningServer, chat, data_url, image_part, picture

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.clients

PICTURE = picture(40, 30, seed=5)
ASKED = chat(image_part(PICTURE), "What is it?", max_tokens=9)
MESSAGES = ASKED["messages"]


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> dict[str, Any]:
    """The answer to the same request without a library."""
    found: dict[str, Any] = server.post(ASKED).json()
    return found


def assert_same(expected: dict[str, Any], text: str | None, prompt_tokens: int, completion_tokens: int) -> None:
    usage = expected["usage"]
    assert text == expected["choices"][0]["message"]["content"]
    assert (prompt_tokens, completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


class TestLiteLLM:
    @pytest.fixture
    def asked(self, server: RunningServer) -> dict[str, Any]:
        pytest.importorskip("litellm", reason="make test-clients")
        where = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none"}
        return where | {"messages": MESSAGES, "max_tokens": 9, "temperature": 0}

    def test_whole(self, asked: dict[str, Any], expected: dict[str, Any]) -> None:
        import litellm

        answer = litellm.completion(**asked)
        usage = answer.usage
        assert_same(expected, answer.choices[0].message.content, usage.prompt_tokens, usage.completion_tokens)

    def test_streamed(self, asked: dict[str, Any], expected: dict[str, Any]) -> None:
        import litellm

        chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
        assert_same(expected, text, usage.prompt_tokens, usage.completion_tokens)

    def test_a_tool(self, caller: RunningServer) -> None:
        litellm = pytest.importorskip("litellm", reason="make test-clients")
        answer = litellm.completion(
            model=f"openai/{MODEL}", api_base=f"{caller.url}/v1", api_key="none", temperature=0, max_tokens=120,
            messages=[{"role": "user", "content": "How warm is it?"}], tools=BOTH,
            logit_bias=bias(caller, "<tool_call>"),
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == IN_BERN

    def test_an_error_keeps_its_words(self, asked: dict[str, Any]) -> None:
        import litellm

        content = [image_part(b"no picture"), {"type": "text", "text": "What is it?"}]
        with pytest.raises(litellm.BadRequestError, match="not an image"):
            litellm.completion(**asked | {"messages": [{"role": "user", "content": content}]}, num_retries=0)


class Seen(BaseModel):
    """What is seen, and nothing else, of which a random model would say more than anybody waits for."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]
    count: Literal[1, 2, 3]


class TestLangChain:
    def model(self, server: RunningServer, **options: Any) -> Any:
        api = pytest.importorskip("langchain_openai", reason="make test-clients")
        asked = {"temperature": 0, "max_retries": 0, "max_tokens": 9, **options}
        return api.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=MODEL, **asked)

    def test_a_picture_whole_and_streamed(self, server: RunningServer, expected: dict[str, Any]) -> None:
        model = self.model(server, stream_usage=True)
        whole = model.invoke(MESSAGES)
        streamed = list(model.stream(MESSAGES))
        joined = streamed[0]
        for piece in streamed[1:]:
            joined += piece
        for answer in (whole, joined):
            usage = answer.usage_metadata
            assert_same(expected, answer.content, usage["input_tokens"], usage["output_tokens"])

    def test_its_own_form_of_a_picture(self, server: RunningServer, expected: dict[str, Any]) -> None:
        content = [
            {"type": "image", "base64": data_url(PICTURE).partition(",")[2], "mime_type": "image/png"},
            {"type": "text", "text": "What is it?"},
        ]
        answer = self.model(server).invoke([{"role": "user", "content": content}])
        assert answer.usage_metadata["input_tokens"] == expected["usage"]["prompt_tokens"]

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, caller: RunningServer, method: str) -> None:
        model = self.model(caller, max_tokens=2000).with_structured_output(Seen, method=method)
        assert isinstance(model.invoke("What is it?"), Seen)

    def test_tools_and_their_results(self, caller: RunningServer) -> None:
        messages = pytest.importorskip("langchain_core.messages", reason="make test-clients")
        model = self.model(caller, max_tokens=120, model_kwargs={"logit_bias": bias(caller, "<tool_call>")})
        asked = [messages.HumanMessage("How warm is it?")]
        answer = model.bind_tools(BOTH).invoke(asked)
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == (IN_BERN[0], json.loads(IN_BERN[1]))
        result = messages.ToolMessage("20", tool_call_id=call["id"])
        again = self.model(caller, max_tokens=120).bind_tools([WEATHER]).invoke([*asked, answer, result])
        assert again.content


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor(server: RunningServer, caller: RunningServer, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="make test-clients")
    asked = caller if mode == "TOOLS" else server
    client = instructor.from_openai(asked.openai(), mode=instructor.Mode[mode])
    content = [{"type": "text", "text": "What is it?"}, image_part(PICTURE)]
    found = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        response_model=Seen,
        max_tokens=2000,
        max_retries=0,
    )
    assert isinstance(found, Seen)


def run_in(environment: str, *arguments: str, path: Path | None = None) -> None:
    """A program of another environment of this repository; skips where there is none. path: of further modules."""
    program = ROOT / environment / "bin/python"
    if not program.exists():
        pytest.skip(f"no {environment} here: make test-{environment.removeprefix('.venv-')}")
    quiet = {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    quiet |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **quiet}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_sglangs_load_generator(server: RunningServer, nvila_folder: Path, tmp_path: Path) -> None:
    out, requests, tokens = tmp_path / "out.jsonl", 6, 8
    (tmp_path / "datasets.py").write_text("load_dataset = None")  # which it imports for other prompts than these
    before = server.metric("siglane_tokens_total", kind="completion")
    run_in(
        ".venv-sglang", "-m", "sglang.benchmark.serving", "--backend", "sglang-oai-chat", "--base-url", server.url,
        "--model", str(nvila_folder / "llm"), "--served-model-name", MODEL, "--tokenizer", str(nvila_folder / "llm"),
        "--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", str(tokens),
        "--random-range-ratio", "1.0", "--num-prompts", str(requests), "--max-concurrency", "2",
        "--warmup-requests", "0", "--output-file", str(out), path=tmp_path,
    )  # fmt: skip
    found = json.loads(out.read_text().splitlines()[-1])
    assert found["completed"] == requests
    assert found["total_output_tokens"] == requests * tokens
    assert server.metric("siglane_tokens_total", kind="completion") - before == requests * tokens


# `vllm bench serve` without the servers that its other commands import
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllms_load_generator(server: RunningServer, nvila_folder: Path, tmp_path: Path) -> None:
    """With two pictures in each request."""
    requests, tokens = 4, 8
    before = server.metric("siglane_tokens_total", kind="completion")
    images = server.metric("siglane_images_total")
    run_in(
        ".venv-vllm", "-c", VLLM_BENCH, "--backend", "openai-chat",
        "--base-url", server.url, "--endpoint", "/v1/chat/completions", "--model", MODEL,
        "--tokenizer", str(nvila_folder / "llm"), "--dataset-name", "random-mm", "--random-input-len", "16",
        "--random-output-len", str(tokens), "--random-mm-base-items-per-request", "2",
        "--random-mm-num-mm-items-range-ratio", "0", "--random-mm-limit-mm-per-prompt", '{"image": 2, "video": 0}',
        "--random-mm-bucket-config", "{(56, 56, 1): 1.0}", "--num-prompts", str(requests), "--max-concurrency", "2",
        "--request-rate", "inf", "--ignore-eos", "--temperature", "0", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "v.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "v.json").read_text())
    assert (found["completed"], found["total_output_tokens"]) == (requests, requests * tokens)
    more = server.metric("siglane_tokens_total", kind="completion") - before
    assert more in (requests * tokens, (requests + 1) * tokens)  # it may try one request first
    assert server.metric("siglane_images_total") - images >= 2 * requests
