"""What a team that comes from SGLang, vLLM or llama.cpp's server counts on: a request for each feature, and the tests
of what no request shows."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from calling import BOTH, of, question
from serving import (
    CHAT,
    MODEL,
    RunningServer,
    assert_error,
    chat,
    config_of,
    data_url,
    image_part,
    image_url,
    listening,
    picture,
    run_batch,
    running,
    stream,
)
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.cli.main import COMMANDS
from siglane.engine.process.child import EngineSpec
from siglane.server.launch import serving
from siglane.settings.engine import EngineConfig

TESTS = Path(__file__).parents[1]
SAMPLED: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"60": -5},
    "seed": 3,
}


def message(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The first choice, of a request whose every field has its effect."""
    answer = server.post(body)
    assert answer.status_code == 200, answer.text
    assert "x-siglane-ignored-fields" not in answer.headers
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def get(server: RunningServer, path: str) -> Any:
    with server.http() as client:
        answer = client.get(path)
    assert answer.status_code == 200, path
    return answer


def models(server: RunningServer) -> None:
    (listed,) = get(server, "/v1/models").json()["data"]
    assert {"id", "root", "max_model_len"} <= listed.keys()
    assert get(server, f"/v1/models/{MODEL}").json()["id"] == MODEL
    with server.http() as client:
        assert_error(client.get("/v1/models/other"), 404, "model_not_found")


def another_model(server: RunningServer) -> None:
    assert_error(server.post(chat("x", model="other")), 404, "model_not_found", "model")


def probes(server: RunningServer) -> None:
    for path in ("/health", "/ready"):
        get(server, path)
    assert "siglane_requests_total" in get(server, "/metrics").text


def completions(server: RunningServer) -> None:
    answer = server.post_to("/v1/completions", prompt=["Hello", "there"], max_tokens=3, echo=True, logprobs=1).json()
    assert [choice["text"].startswith(text) for choice, text in zip(answer["choices"], ("Hello", "there"), strict=True)]
    assert all(choice["logprobs"]["token_logprobs"] for choice in answer["choices"])


def tokens(server: RunningServer) -> None:
    told = server.post_to("/tokenize", prompt="Hello").json()
    back = server.post_to("/detokenize", tokens=told["tokens"]).json()
    assert back["text"] == back["prompt"] == "Hello"
    seen = server.post_to("/tokenize", messages=chat(image_part(picture()), "x")["messages"]).json()
    assert seen["count"] > told["count"]


def playground(server: RunningServer) -> None:
    page = get(server, "/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"?https?:", page.text)


def lengths(server: RunningServer) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": chat("x")["messages"], "temperature": 0, "ignore_eos": True, name: 3}
        assert server.post(body).json()["usage"]["completion_tokens"] == 3
    least = chat("x", max_tokens=9, min_tokens=9)
    assert server.post(least).json()["usage"]["completion_tokens"] == 9


def sampling(server: RunningServer) -> None:
    body = chat("x", **SAMPLED, max_tokens=12)
    assert message(server, body) == message(server, body)
    assert message(server, body) != message(server, body | {"seed": 4})


def stops(server: RunningServer) -> None:
    text = message(server, chat("x", max_tokens=12))["message"]["content"]
    cut = message(server, chat("x", max_tokens=12, stop=[text[3:5]]))
    assert (cut["message"]["content"], cut["matched_stop"]) == (text[: text.index(text[3:5])], text[3:5])
    message(server, chat("x", stop_token_ids=[5]))
    assert_error(server.post(chat("x", stop=["a"] * 17)), 400, param="stop")


def choices(server: RunningServer) -> None:
    assert len(server.post(chat("x", n=2, temperature=1)).json()["choices"]) == 2
    assert_error(server.post(chat("x", n=10**9)), 400, param="n")
    for field in ("best_of", "use_beam_search"):
        assert_error(server.post(chat("x", **{field: 2})), 400, "unsupported_field", field)


def logprobs(server: RunningServer) -> None:
    told = message(server, chat("x", logprobs=True, top_logprobs=3))["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in told)


def constraints(server: RunningServer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}, "strict": True}}
    assert message(server, chat("x", response_format=schema))["message"]["content"] == '"yes"'
    some = message(server, chat("x", response_format={"type": "json_object"}, max_tokens=40))
    assert some["message"]["content"].startswith("{")
    assert message(server, chat("x", structured_outputs={"choice": ["yes"]}))["message"]["content"] == "yes"
    assert message(server, chat("x", regex="[0-9]{2}"))["message"]["content"].isdigit()


def template(server: RunningServer) -> None:
    message(server, chat("x", chat_template_kwargs={"enable_thinking": False}))
    assert_error(server.post(chat("x", chat_template="{{ 1 }}")), 400, "unsupported_field", "chat_template")


def pictures(server: RunningServer) -> None:
    """data: is read; what a client's request must not reach is refused by a code."""
    for detail in ("auto", "low", "high", "original"):
        message(server, chat(image_part(picture(), detail=detail), "x"))
    refused = {
        "file:///etc/passwd": "local_media_forbidden",
        "/etc/passwd": "unsupported_url_scheme",
        "aGVsbG8=": "unsupported_url_scheme",
        "http://127.0.0.1:1/a.png": "image_url_forbidden",
    }
    for url, code in refused.items():
        assert_error(server.post(chat(image_url(url), "x")), 400, code)
    assert_error(server.post(chat(*[image_part(picture())] * 17, "x")), 400, "too_many_images")


def unknown(server: RunningServer) -> None:
    answer = server.post(chat("x", a_new_field=1, cache_salt="a"))
    assert (answer.status_code, answer.headers["x-siglane-ignored-fields"]) == (200, "a_new_field")


def usage(server: RunningServer) -> None:
    body = chat(image_part(picture()), "x", cache_salt="a contract")
    details = [server.post(body).json()["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert details[0]["image_tokens"] > 0
    assert details[0]["text_tokens"] > 0
    assert details[1]["cached_tokens"] > 0


def streams(server: RunningServer) -> None:
    told = stream(server, chat("x", stream_options={"include_usage": True, "continuous_usage_stats": True}))
    assert told.done
    first, last = told.chunks[0], told.chunks[-1]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["usage"]["completion_tokens"] > 0  # a chunk of the role alone would be taken for the first token
    assert last["choices"] == []


def headers(server: RunningServer) -> None:
    answer = server.post(chat("x"), headers={"x-request-id": "mine", "origin": "http://elsewhere.example"})
    assert answer.headers["x-request-id"] == "mine"
    assert "access-control-allow-origin" not in answer.headers
    assert answer.json()["system_fingerprint"]


def errors(server: RunningServer) -> None:
    assert_error(server.post({"messages": []}), 400, param="messages")  # nested, without a word of ours


def aborts(server: RunningServer) -> None:
    for path, body in (("/abort", {"request_id": "a"}), ("/abort_request", {"rid": "a"})):
        assert server.post_to(path, **body).status_code in (200, 404)


@contextmanager
def with_options(server: RunningServer, **options: Any) -> Iterator[RunningServer]:
    """Another server of the same model, before the same engine."""
    assert server.served.chat is not None
    with running(server.served.chat.processor, server.served.engine, **options) as one:
        yield one


def decisions(server: RunningServer) -> None:
    asked = {"input": "A picture.", "images": [data_url(picture())]}
    questions = [{"id": "a", "type": "yes_no", "question": "Red?"}, {"id": "b", "type": "labels", "labels": ["x", "y"]}]
    questions[1]["question"] = "Which?"
    for answer in server.post_to("/v1/decisions", **asked, questions=questions).json()["answers"].values():
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)


def responses(server: RunningServer) -> None:
    answer = server.post_to("/v1/responses", input="Hello", max_output_tokens=4).json()
    assert answer["output"][0]["content"][0]["text"]


def messages_of_anthropic(server: RunningServer) -> None:
    said = [{"role": "user", "content": "Hello"}]
    counted = server.post_to("/v1/messages/count_tokens", messages=said).json()["input_tokens"]
    answer = server.post_to("/v1/messages", messages=said, max_tokens=4).json()
    assert answer["content"][0]["text"]
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == counted


def other_names(server: RunningServer) -> None:
    with with_options(server, model_aliases=("other",)) as one:
        assert message(one, chat("x", model="other"))


def files_below_a_folder(server: RunningServer) -> None:
    with TemporaryDirectory() as folder, with_options(server, allowed_local_media_path=folder) as one:
        (Path(folder) / "a.png").write_bytes(picture())
        assert message(one, chat(image_url(f"file://{folder}/a.png"), "x"))


def keys(server: RunningServer) -> None:
    with with_options(server, api_key="right") as one, one.http() as client:
        assert_error(client.get("/v1/models"), 401, "invalid_api_key")
        assert client.get("/v1/models", headers={"authorization": "Bearer right"}).status_code == 200
        assert client.get("/health").status_code == 200


def a_full_queue(server: RunningServer) -> None:
    with with_options(server, max_queue=1) as one:
        refused = list[Any]()

        def ask() -> None:
            if not refused:
                refused.append(one.post(chat("x")))

        assert stream(one, chat("x", max_tokens=30, ignore_eos=True), ask).done
    assert_error(refused[0], 503, "server_overloaded")
    assert refused[0].headers["retry-after"] == "1"


def batches(stored: RunningServer) -> None:
    done = run_batch(stored.openai(), CHAT, [chat("x"), chat("x", n=0)])
    assert set(done.answers) == {"0"}
    assert "invalid_value" in done.errors


def tools(caller: RunningServer) -> None:
    answer = caller.post(question(caller, "<tool_call>", tool_choice="required")).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert of(answer["message"])


def embeddings(towers: RunningServer) -> None:
    """Three shapes of a picture, numbers and base64."""
    part = image_part(picture())
    shapes: list[dict[str, Any]] = [
        {"input": [{"text": "", "image": data_url(picture())}]},
        {"input": [{"content": [part]}]},
        {"messages": [{"role": "user", "content": [part]}]},
    ]
    found = [towers.post_to("/v1/embeddings", **shape).json()["data"][0]["embedding"] for shape in shapes]
    assert found[0] == found[1] == found[2]
    (coded,) = towers.openai().embeddings.create(model=MODEL, input="a cat", encoding_format="base64").data
    (plain,) = towers.openai().embeddings.create(model=MODEL, input="a cat", encoding_format="float").data
    assert len(base64.b64decode(str(coded.embedding))) == 4 * len(plain.embedding)


def tags(towers: RunningServer) -> None:
    pictured = {"images": [data_url(picture())], "labels": ["a cat", "a dog"], "threshold": 0}
    assert len(towers.post_to("/v1/classify", **pictured).json()["data"][0]["tags"]) == 2
    pair = {"text_1": {"content": [image_part(picture())]}, "text_2": ["a cat", "a dog"]}
    assert len(towers.post_to("/v1/score", model=MODEL, **pair).json()["data"]) == 2


ASKED: dict[str, Callable[[RunningServer], None]] = {
    "/v1/models and one of them, with its root": models,
    "a model that is not there": another_model,
    "/health, /ready, /metrics": probes,
    "/v1/completions": completions,
    "/tokenize, /detokenize": tokens,
    "/abort": aborts,
    "a page at /": playground,
    "max_tokens, max_completion_tokens, min_tokens, ignore_eos": lengths,
    "temperature and its neighbours, penalties, logit_bias, seed": sampling,
    "stop, stop_token_ids, matched_stop": stops,
    "n, best_of, beams": choices,
    "logprobs, top_logprobs": logprobs,
    "response_format, choice, regex": constraints,
    "chat_template_kwargs, never chat_template": template,
    "image_url, detail, images per request": pictures,
    "cache_salt, an unknown field": unknown,
    "usage in parts": usage,
    "stream_options, [DONE], the role beside the first token": streams,
    "x-request-id, system_fingerprint, closed CORS": headers,
    "errors in OpenAI's shape": errors,
    "/v1/decisions": decisions,
    "/v1/responses": responses,
    "/v1/messages": messages_of_anthropic,
    "aliases": other_names,
    "file: below a folder": files_below_a_folder,
    "keys": keys,
    "a full queue": a_full_queue,
}
ASKED_OF_OTHERS: dict[str, tuple[str, Callable[[RunningServer], None]]] = {
    "/v1/files, /v1/batches": ("stored", batches),
    "tools, tool_choice": ("caller", tools),
    "/v1/embeddings in three shapes, float and base64": ("towers", embeddings),
    "/v1/classify, /v1/score": ("towers", tags),
}
# what takes a process of its own, a fault or figures to compare with
ELSEWHERE: dict[str, tuple[str, str]] = {
    "towers as embedder": ("test_embeddings", "test_vectors_are_transformers"),
    "reasoning_content": ("test_reasoning", "test_an_openai_client_gets_both_apart_streamed_or_not"),
    "a stream that is silent": ("test_lifecycle", "test_a_silent_stream_says_that_it_lives"),
    "an error within a stream": ("test_lifecycle", "test_a_failed_stream_raises_in_openai_s_client"),
    "CORS": ("test_observe", "test_other_origins_are_closed_unless_opened"),
    "SIGTERM": ("test_lifecycle", "test_draining_lets_requests_finish_and_refuses_new_ones"),
    "logs": ("faults_clients", "no_forged_line"),
    "logs as JSON lines": ("test_supervision", "test_every_line_of_a_server_s_log_is_json"),
    "an abort of an answer that runs": ("test_keys", "test_a_stream_is_aborted_by_the_id_of_its_answer"),
    "http: of public addresses": ("faults_urls", "one_fetch_for_a_burst"),
    "reasoning tokens": ("test_reasoning", "test_usage_tells_reasoning_from_answer"),
    "a limit of each key": ("test_keys", "test_requests_and_patches_a_minute"),
    "a bar of what is done": ("test_llm", "test_a_bar_is_shown_where_asked_for_or_on_a_terminal"),
    "commands": ("test_cli", "test_every_command_has_help"),
    "options from flags, variables and their defaults": (
        "test_options",
        "test_flag_wins_over_variable_and_variable_over_default",
    ),
    "options from a file, TOML or YAML": ("test_options", "test_yaml_says_the_same"),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("towers") / "siglip2"
    write_two_tower_checkpoint(folder, "siglip2")
    spec = EngineSpec(str(folder), EngineConfig(device="cpu", threads=1))
    with serving(config_of(), spec) as served, listening(served) as server:
        served.engine.wait_ready()
        yield server


@pytest.mark.parametrize("feature", ASKED)
def test_it_is_served(feature: str, server: RunningServer) -> None:
    ASKED[feature](server)


@pytest.mark.parametrize("feature", ASKED_OF_OTHERS)
def test_another_serves_it(feature: str, request: pytest.FixtureRequest) -> None:
    server, ask = ASKED_OF_OTHERS[feature]
    ask(request.getfixturevalue(server))


@pytest.mark.parametrize("feature", ELSEWHERE)
def test_its_test_is_there(feature: str) -> None:
    stem, name = ELSEWHERE[feature]
    (file,) = TESTS.rglob(f"{stem}.py")
    assert re.search(rf"def {name}\(", file.read_text())


def test_its_commands_are_there() -> None:
    assert {"serve", "generate", "chat", "batch", "tag", "bench", "doctor"} <= COMMANDS.keys()


def test_a_model_without_tools_refuses_them_by_name(server: RunningServer) -> None:
    with server.http() as client:
        assert_error(client.post(CHAT, json=chat("x", tools=BOTH)), 400, "unsupported_field", "tools")
