"""/tokenize, /detokenize and /v1/images/tokens against the prompts and images of real answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import RunningServer, Told, assert_error, assert_unharmed, chat, data_url, image_part, picture

from siglane.families.processor import Processor
from siglane.server.tokens import MAX_PICTURES

TEXT = "Describe 中文 <|im_end|> 😀"
WIDE, SMALL = picture(200, 60, seed=3), picture(30, 40, seed=4)


def asked(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    answer = server.post_to(path, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
@pytest.mark.parametrize("field", ["prompt", "content"])
def test_a_text_in_any_spelling(path: str, field: str, server: RunningServer, processor: Processor) -> None:
    found = asked(server, path, **{field: TEXT}, return_token_strs=True)
    assert found["tokens"] == processor.tokenizer(TEXT).input_ids
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == server.served.models[0].context_length
    assert "<|im_end|>" in found["token_strs"]


def test_several_texts(server: RunningServer, processor: Processor) -> None:
    found = asked(server, "/tokenize", prompt=["a", TEXT, ""], add_special_tokens=False)
    assert found["tokens"] == [
        processor.tokenizer(text, add_special_tokens=False).input_ids for text in ("a", TEXT, "")
    ]
    assert found["count"] == [len(ids) for ids in found["tokens"]]
    assert found["token_strs"] is None


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_tokens_become_the_text_again(path: str, server: RunningServer, processor: Processor) -> None:
    ids = asked(server, "/tokenize", prompt=TEXT)["tokens"]
    assert asked(server, path, tokens=ids) == {"prompt": TEXT, "text": TEXT, "content": TEXT}
    several = asked(server, path, tokens=[ids, []], skip_special_tokens=True)
    assert several["text"] == [TEXT.replace("<|im_end|>", ""), ""]
    assert asked(server, path, tokens=[])["text"] == ""


def test_a_conversation_is_counted_as_it_would_be_answered(server: RunningServer) -> None:
    """From headers alone: pictures that end behind them are counted too, and no answer is given."""
    body = chat(image_part(WIDE), "What is it?", image_part(SMALL, detail="low"), max_tokens=1)
    answer = server.post(body).json()
    found = asked(server, "/tokenize", messages=body["messages"])
    usage = answer["usage"]
    assert found["count"] == len(found["tokens"]) == usage["prompt_tokens"]
    assert found["image_tokens"] == usage["prompt_tokens_details"]["image_tokens"]
    assert found["images"] == answer["siglane"]["images"]
    assert found["kv_bytes"] % found["count"] == 0
    assert found["kv_bytes"] > 0
    cut = chat(image_part(WIDE[:200]), "What is it?")["messages"]
    assert asked(server, "/tokenize", messages=cut)["images"][0]["width"] == 200


def test_template_arguments_are_read(server: RunningServer) -> None:
    messages = chat("x")["messages"]
    assert_error(
        server.post_to("/tokenize", messages=messages, chat_template_kwargs={"tools": "x"}),
        400,
        "invalid_chat_template_kwargs",
        "chat_template_kwargs",
    )


def test_pictures_by_url_by_header_or_by_size(server: RunningServer) -> None:
    url = data_url(WIDE)
    images = [url, {"url": url, "detail": "low"}, {"width": 200, "height": 60}]
    found = asked(server, "/v1/images/tokens", images=images)
    by_url, low, by_size = found["images"]
    assert by_size == by_url
    assert low["detail"] == {"requested": "low", "applied": "low"}
    assert found["tokens"] == sum(image["tokens"] for image in found["images"])
    assert found["images"][:1] == server.post(chat(image_part(WIDE), max_tokens=1)).json()["siglane"]["images"]
    together = asked(server, "/v1/images/tokens", images=images, together=True)
    assert [image["width"] for image in together["images"]] == [200] * 3


BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a number among texts": ("/tokenize", {"prompt": ["a", 3]}, "invalid_value", "prompt[1]"),
    "a text among ids": ("/detokenize", {"tokens": [[1], ["a"]]}, "invalid_value", "tokens[1][0]"),
    "an id beyond 64 bits": ("/detokenize", {"tokens": [2**70]}, "invalid_value", "tokens"),
    "nothing": ("/tokenize", {}, "missing_field", "prompt"),
    "both": ("/tokenize", {"prompt": "a", "messages": chat("x")["messages"]}, "missing_field", "prompt"),
    "a number": ("/tokenize", {"prompt": 3}, "invalid_value", "prompt"),
    "too many texts": ("/tokenize", {"prompt": ["a"] * 2000}, "invalid_value", "prompt"),
    "another model": ("/tokenize", {"prompt": "a", "model": "none"}, "model_not_found", "model"),
    "no messages": ("/tokenize", {"messages": []}, "invalid_value", "messages"),
    "a damaged picture": (
        "/tokenize",
        {"messages": chat(image_part(b"GIF89a"))["messages"]},
        "image_decode_failed",
        "messages[0].content[0]",
    ),
    "a template": ("/tokenize", {"prompt": "a", "chat_template": "x"}, "unsupported_field", "chat_template"),
    "an unknown id": ("/detokenize", {"tokens": [10**9]}, "invalid_value", "tokens"),
    "a negative id": ("/detokenize", {"tokens": [-1]}, "invalid_value", "tokens[0]"),
    "no ids": ("/detokenize", {"tokens": "a"}, "invalid_value", "tokens"),
    "no size": ("/v1/images/tokens", {"images": [{"width": 3}]}, "missing_field", "images[0].height"),
    "no width": ("/v1/images/tokens", {"images": [{"width": 0, "height": 4}]}, "invalid_value", "images[0].width"),
    "no pictures": ("/v1/images/tokens", {"images": []}, "invalid_value", "images"),
    "a host": ("/v1/images/tokens", {"images": ["http://127.0.0.1:1/a.png"]}, "image_url_forbidden", "images[0]"),
    "a huge picture": (
        "/v1/images/tokens",
        {"images": [{"width": 10**6, "height": 10**6}]},
        "image_too_large",
        "images[0]",
    ),
    "billions of frames": (
        "/v1/images/tokens",
        {"images": [{"width": 64, "height": 48, "num_frames": 2**32 - 1}]},
        "invalid_num_frames",
        "images[0]",
    ),
    "a million": ("/v1/images/tokens", {"images": ["a"] * (MAX_PICTURES + 1)}, "invalid_value", "images"),
}


def test_an_empty_text_beside_another_says_nothing(server: RunningServer) -> None:
    text = asked(server, "/tokenize", prompt="a")
    assert (
        asked(server, "/tokenize", prompt="", content="a") == asked(server, "/tokenize", prompt="a", content="") == text
    )
    talk = chat("x")["messages"]
    assert asked(server, "/tokenize", prompt="", messages=talk) == asked(server, "/tokenize", messages=talk)
    assert asked(server, "/tokenize", prompt="", content="")["count"] == asked(server, "/tokenize", prompt="")["count"]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_counted_is_refused_by_name(name: str, server: RunningServer) -> None:
    path, body, code, param = BAD[name]
    answer = server.post_to(path, **body)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert answer.status_code in (400, 403, 404)


def test_counting_harms_nobody(server: RunningServer, alone: Told) -> None:
    def ask() -> None:
        for path, body, _, _ in BAD.values():
            server.post_to(path, **body)
        asked(server, "/tokenize", prompt="word " * 1000)

    assert_unharmed(server, alone, ask)


def test_files_of_the_operator_are_not_counted(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(WIDE)
    answer = server.post_to("/v1/images/tokens", images=[f"file://{tmp_path}/a.png"])
    assert answer.status_code in (400, 403), answer.text
