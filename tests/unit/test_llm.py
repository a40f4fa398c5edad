"""`LLM` and `VisionEncoder`: order, isolation of bad rows, bounded read-ahead, several answers."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from parity_kit import noise as picture
from PIL import Image
from two_tower_checkpoint import write_two_tower_checkpoint

import siglane
from siglane.errors import EngineError, UserError
from siglane.llm import LLM, PREPARE_AHEAD, Generation, VisionEncoder
from siglane.tagging.tagger import Tagger
from siglane.types import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
RUNNING = 3


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(nvila_folder: Path) -> Path:
    return nvila_folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", kv_tokens=16384, max_running=RUNNING)


def rows(count: int) -> list[dict[str, Any]]:
    """Prompts with no, one and two pictures in turn."""
    return [
        {"prompt": f"What is in image {n}?", "images": [picture(10 * n + k) for k in range(n % 3)]}
        for n in range(count)
    ]


def tokens(answers: list[Generation]) -> list[tuple[int, ...]]:
    return [answer.output_token_ids for answer in answers]


def test_many_prompts_give_what_each_gives_alone_in_order(llm: LLM) -> None:
    together = llm.generate(rows(7), SHORT)
    alone = [llm.generate(row, SHORT)[0] for row in rows(7)]
    assert tokens(together) == tokens(alone)
    assert len(set(tokens(together))) > 1
    for answer, row in zip(together, rows(7), strict=True):
        assert answer.finish_reason == "length"
        assert answer.error is None
        assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
        assert answer.usage.completion_tokens == len(answer.output_token_ids) == 6
        assert (answer.usage.image_tokens > 0) == bool(row["images"])


def test_a_prompt_is_one_user_message_images_first(llm: LLM) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png(picture(1))).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    (chat,) = llm.chat([{"role": "user", "content": content}], SHORT)
    (generate,) = llm.generate({"prompt": "What?", "images": [picture(1)]}, SHORT)
    assert chat.prompt_token_ids == generate.prompt_token_ids
    assert chat.output_token_ids == generate.output_token_ids


def test_all_kinds_of_image_sources_are_the_same_picture(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture(1)))
    sources = [path, str(path), path.as_uri(), path.read_bytes(), picture(1)]
    answers = llm.generate([{"prompt": "What?", "images": [source]} for source in sources], SHORT)
    assert len(set(tokens(answers))) == 1


def test_several_conversations(llm: LLM) -> None:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "image"}]
    image = {"type": "image", "image": picture(2)}
    second = [{"role": "user", "content": [image, {"type": "text", "text": "this"}]}]
    answers = llm.chat([first, second], SHORT)
    assert [answer.usage.image_tokens > 0 for answer in answers] == [False, True]
    assert llm.chat([], SHORT) == []
    assert llm.generate([], SHORT) == []


@pytest.mark.parametrize("size", [(4000, 17), (17, 4000), (1, 1)])
def test_a_local_caller_may_send_any_shape(llm: LLM, size: tuple[int, int]) -> None:
    answer = llm.generate({"prompt": "What?", "images": [Image.new("RGB", size, "red")]}, SHORT)[0]
    assert answer.error is None
    assert answer.usage.image_tokens > 0


BAD_ROWS: list[tuple[Any, str, str | None]] = [
    ({"prompt": "What?", "images": [b"no picture"]}, "image_decode_failed", "images[0]"),
    ({"prompt": "What?", "images": [picture(0), "/nowhere.png"]}, "image_not_found", "images[1]"),
    ({"prompt": "What?", "images": [None]}, "invalid_prompt", "images[0]"),
    ({"prompt": "What?", "images": "cat.png"}, "invalid_prompt", "images"),
    ({"prompt": 3}, "invalid_prompt", "prompt"),
    ({"prompt": "What?", "image": []}, "invalid_prompt", "a prompt"),
    (7, "invalid_prompt", "a prompt"),
    ({"prompt": "image " * 5000}, "context_length_exceeded", None),
]


@pytest.mark.parametrize(("bad", "code", "param"), BAD_ROWS)
def test_a_bad_row_leaves_its_neighbours_alone(llm: LLM, bad: Any, code: str, param: str | None) -> None:
    good = rows(4)
    answers = llm.generate([*good[:2], bad, *good[2:]], SHORT)
    error = answers[2].error
    assert isinstance(error, UserError)
    assert (error.code, error.param) == (code, param)
    assert answers[2].finish_reason == "error"
    assert answers[2].output_token_ids == ()
    assert tokens([*answers[:2], *answers[3:]]) == tokens(llm.generate(good, SHORT))


def test_one_prompt_raises_its_error_and_several_return_theirs(llm: LLM) -> None:
    bad = BAD_ROWS[0][0]
    with pytest.raises(UserError, match="not an image"):
        llm.generate(bad, SHORT)
    assert llm.generate(bad, SHORT, errors="return")[0].finish_reason == "error"
    with pytest.raises(UserError, match="not an image"):
        llm.generate([*rows(3), bad, *rows(3)], SHORT, errors="raise")
    assert not llm._engine.has_work


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "user"}], "messages[0]: content must be a text"),
        ([{"role": "robot", "content": "x"}], "messages[0]: role 'robot' is not one of"),
        ([{"role": "user", "content": "x", "nmae": "y"}], "messages[0]: key 'nmae' is not known"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0]: a part is of type"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0] must be a path, URL"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0]: text must be"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}], "messages[0].content[0]: url must"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}], "key 'uri' is not known"),
    ],
)
def test_messages_are_read_strictly(llm: LLM, messages: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        llm.chat(messages, SHORT)
    assert complaint in caught.value.message


def test_a_fault_of_ours_is_an_engine_error_of_its_row(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llm.processor.prompt

    def fails_sometimes(messages: Any, *others: Any) -> Any:
        if "image 1?" in messages[0].parts[-1]:
            raise ZeroDivisionError("by nothing")
        return real(messages, *others)

    monkeypatch.setattr(llm.processor, "prompt", fails_sometimes)
    answers = llm.generate(rows(3), SHORT)
    assert isinstance(answers[1].error, EngineError)
    assert isinstance(answers[1].error.__cause__, ZeroDivisionError)
    assert [answer.error is None for answer in answers] == [True, False, True]


def test_any_iterable_is_read_a_bounded_number_ahead(llm: LLM) -> None:
    drawn, begun = 0, set()

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal drawn
        for row in rows(60):
            drawn += 1
            yield row

    ahead = []

    def watch(number: int, _: str) -> None:
        begun.add(number)
        ahead.append(drawn - len(begun))

    answers = llm.generate(endless(), SHORT, on_text=watch)
    assert len(answers) == 60
    assert max(ahead) <= PREPARE_AHEAD + 2 * RUNNING


def test_parameters_for_each_prompt(llm: LLM) -> None:
    lengths = [1, 4, 2]
    answers = llm.generate(rows(3), [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])
    assert [len(answer.output_token_ids) for answer in answers] == lengths
    with pytest.raises(ValueError, match="2 params for 3 prompts"):
        llm.generate(rows(3), [SHORT, SHORT])
    with pytest.raises(ValueError, match="unknown number"):
        llm.generate(iter(rows(3)), [SHORT, SHORT])


@pytest.mark.parametrize(
    "params",
    [{"temperature": 3.0}, {"n": 0}, {"max_tokens": 0}, {"top_p": 1.5}, {"stop": ("",)}, {"min_p": float("nan")}],
)
def test_parameters_no_sampler_can_honour(llm: LLM, params: dict[str, Any]) -> None:
    (name,) = params
    with pytest.raises(UserError, match=name) as caught:
        llm.generate("What?", SamplingParams(**params))
    assert caught.value.param == name


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=7, n=3, ignore_eos=True)
    (first,) = llm.generate(rows(2)[1], params)
    (again,) = llm.generate(rows(2)[1], params)
    answers = list(first.outputs)
    assert len(answers) == 3
    assert len(set(tokens(answers))) == 3
    assert tokens(answers) == tokens(list(again.outputs))
    (alone,) = llm.generate(rows(2)[1], SamplingParams(max_tokens=8, temperature=1.5, seed=8, ignore_eos=True))
    assert alone.output_token_ids == answers[1].output_token_ids
    assert (first.text, first.output_token_ids) == (answers[0].text, answers[0].output_token_ids)
    assert [len(generation.outputs) for generation in (alone, *answers)] == [1, 0, 0, 0]


def test_text_comes_in_pieces_and_stops_at_a_stop_string(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    pieces: list[str] = []
    (whole,) = llm.generate("What?", params, on_text=lambda _, text: pieces.append(text))
    assert "".join(pieces) == whole.text
    stop = whole.text[len(whole.text) // 2 :][:2]
    (cut,) = llm.generate("What?", SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.output_token_ids) <= len(whole.output_token_ids)
    assert not llm._engine.has_work


def test_log_probabilities(llm: LLM) -> None:
    (answer,) = llm.generate("What?", SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True))
    assert [logprob.token_id for logprob in answer.logprobs] == list(answer.output_token_ids)
    assert all(len(logprob.top) == 2 for logprob in answer.logprobs)


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_where_asked_for_or_on_a_terminal(
    llm: LLM, progress: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=2), progress=progress)
    assert ("2/2" in capsys.readouterr().err) == (progress is True)  # tests have no terminal


def test_an_interruption_leaves_the_engine_empty(llm: LLM) -> None:
    def interrupt(number: int, _: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(rows(8), SHORT, on_text=interrupt)
    assert not llm._engine.has_work
    assert llm.generate(rows(1), SHORT)[0].error is None


def test_options_that_do_not_exist_are_named(folder: Path) -> None:
    with pytest.raises(TypeError, match="no option 'kv_token'"):
        LLM(folder, kv_token=3)
    with pytest.raises(UserError, match="flash_attn"):
        LLM(folder, device="cpu", attention_backend="flash_attn")
    with pytest.raises(UserError, match="no folder"):
        LLM(folder / "nowhere")


@pytest.mark.parametrize("lite", [True, False])
def test_encoding_does_not_depend_on_packing(lite: bool, tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path / "model", lite=lite)
    pictures = [picture(n, size) for n, size in enumerate([(60, 60), (200, 90), (30, 100)])]
    encoder = VisionEncoder(tmp_path / "model", device="cpu", max_batch_patches=100_000)
    one_by_one = VisionEncoder(tmp_path / "model", device="cpu", max_batch_patches=1)
    packed, single = list(encoder.run(pictures)), list(one_by_one.run(pictures))
    for together, alone in zip(packed, single, strict=True):
        torch.testing.assert_close(together.projector_input, alone.projector_input, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.rows, alone.rows, rtol=0, atol=1e-5)
    for one, only in zip(packed, encoder.encode(pictures), strict=True):
        torch.testing.assert_close(one.projector_input, only, rtol=0, atol=1e-5)
        assert one.rows is not None
        assert one.rows.shape[1] == 48
    assert [rows.shape for rows in encoder.project(pictures)] == [encoded.rows.shape for encoded in packed]  # type: ignore[union-attr]


def test_a_plain_tower_has_features_but_no_projector(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path / "model")
    encoder = VisionEncoder(tmp_path / "model", device="cpu")
    assert [features.shape for features in encoder.encode([picture(1), picture(2)])] == [(16, 32), (16, 32)]
    with pytest.raises(UserError, match="no projector"):
        encoder.project([picture(1)])
    with pytest.raises(UserError, match=r"nowhere\.png") as caught:
        encoder.encode([picture(1), "/nowhere.png"])
    assert caught.value.param == "images[1]"
    with pytest.raises(UserError, match="without a language model"):
        LLM(tmp_path / "model")


def test_importing_siglane_loads_nothing() -> None:
    program = "import sys, siglane; siglane.UserError; print('torch' in sys.modules, 'siglane.llm' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == ["False", "False"]
    assert siglane.LLM is LLM
    assert set(siglane.__all__) <= set(dir(siglane))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        siglane.Llm  # noqa: B018


def test_one_picture_is_not_a_list_of_letters(tmp_path: Path) -> None:
    """Of a path every letter would be a file that is missing."""
    write_two_tower_checkpoint(tmp_path)
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    tagger, encoder = Tagger(tmp_path, device="cpu"), VisionEncoder(tmp_path, device="cpu")
    for alone in (picture, str(picture), picture.read_bytes(), Image.open(picture), {"image": picture}):
        for call in (lambda one: tagger.tag(one, ["a cat"]), encoder.encode):
            with pytest.raises(
                UserError, match=r"images must be a list of images, got \w+; put a single one in a list"
            ):
                call(alone)
    assert tagger.tag([picture], ["a cat"])[0].error is None
    assert len(encoder.encode(one for one in [picture])) == 1
