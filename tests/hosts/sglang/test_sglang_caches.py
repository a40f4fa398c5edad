"""SGLang's prefix cache, chunked prefill, cache of encoded images and retraction leave siglane's answers as they are.

One engine whose chunks are smaller than any picture, and which takes the place of a running request away every third
step: it is computed again later.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from host_cases import Case, Drawn, Picture, VideoSize, ask_siglane
from PIL import Image
from sglang_cases import Served, ask_sglang, compare, serve
from sglang_host import RunningEngine, sglang_engine

QUESTION = "Describe the picture."
CHUNK = 7
RETRACT_EVERY = 20  # forward passes
TOKENS = 16
CONTEXT = 4096
LONGEST = CONTEXT - 7  # of a prompt: SGLang keeps a few places for itself
IMAGE = "image_data[0]"
RETRACTED = re.compile(r"#retracted_reqs: [1-9]")
ENCODED = re.compile(r"siglane: (\d+) images to encode")


@dataclass(frozen=True)
class Running:
    served: Served
    engine: RunningEngine

    def ask(self, *cases: Case) -> list[dict[str, Any]]:
        """One after the other."""
        return [ask_sglang(self.engine, [self.served.request(case)], TOKENS)[0] for case in cases]

    def check(self, *cases: Case) -> list[dict[str, Any]]:
        """`ask`, the answers compared with those of siglane's own engine."""
        answers = self.ask(*cases)
        expected = ask_siglane(self.served.folder, cases, TOKENS)
        compare(answers, expected, [str(number) for number in range(len(cases))])
        return answers

    @property
    def encoded(self) -> int:
        """Images that the tower has read so far."""
        return sum(map(int, ENCODED.findall(self.engine.log.read_text())))

    @property
    def before_a_picture(self) -> int:
        """Tokens of a prompt that begins with one."""
        text = self.served.rendered((Picture(1, 1), QUESTION)).partition("<image>")[0]
        return len(self.served.tokenizer(text).input_ids)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    served = serve(
        "vila",
        tmp_path_factory.mktemp("caches"),
        SGLANG_TEST_RETRACT="1",
        SGLANG_TEST_RETRACT_INTERVAL=str(RETRACT_EVERY),
    )
    options = {"chunked_prefill_size": CHUNK, "max_total_tokens": 5000, "log_level": "debug"}
    with sglang_engine(served.folder, env=served.env, **options) as engine:
        yield Running(served, engine)


def cached(answer: dict[str, Any]) -> int:
    number: int = answer["meta_info"]["cached_tokens"]
    return number


def test_the_second_time_nearly_all_of_a_prompt_is_cached(running: Running) -> None:
    case: Case = (Picture(200, 130, 1), " or ", Picture(60, 90, 2), QUESTION)
    before = running.encoded
    first, second = running.check(case, case)
    assert running.encoded == before + 2
    assert cached(second) == first["meta_info"]["prompt_tokens"] - 1
    assert second["output_ids"] == first["output_ids"]


@pytest.mark.parametrize("shift", range(CHUNK))
def test_chunks_end_anywhere_in_a_picture(running: Running, shift: int) -> None:
    """Tiles have four rows and text between them: some chunk ends at each of these places."""
    before = running.encoded
    (answer,) = running.check(("?" * shift, Picture(200, 130, 10 + shift), QUESTION))
    assert running.encoded == before + 1
    assert answer["meta_info"]["prompt_tokens"] > 10 * CHUNK


def test_a_picture_is_encoded_once_for_several_questions(running: Running) -> None:
    before = running.encoded
    one = Picture(120, 80, 30)
    answers = running.check((one, QUESTION), (one, "What is it?"), ("The image ", one, one, QUESTION))
    assert running.encoded == before + 2  # two pictures of one prompt are not cut into tiles, and these two are one
    assert cached(answers[1]) < answers[1]["meta_info"]["prompt_tokens"] - 5


def test_pictures_of_the_same_bytes_are_told_apart(running: Running) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, 60 * 40 * 3, dtype=np.uint8)
    other = pixels.reshape(40, 60, 3).copy()
    other[20, 30] = 255 - other[20, 30]
    plain = np.full((40, 60, 3), 90, np.uint8)
    drawn = [pixels.reshape(40, 60, 3), pixels.reshape(60, 40, 3), other, plain, plain.reshape(60, 40, 3)]
    before = running.encoded
    answers = running.check(*((Drawn(Image.fromarray(one)), QUESTION) for one in drawn))
    assert running.encoded == before + len(drawn)
    assert len({tuple(answer["output_ids"]) for answer in answers[:3]}) == 3
    assert [cached(answer) for answer in answers[1:]] == [running.before_a_picture] * (len(drawn) - 1)


def test_a_picture_under_two_budgets_is_two_pictures(running: Running) -> None:
    before = running.encoded
    full, low, full_again, low_again = running.check(
        *((Picture(200, 130, 40, max_tiles), QUESTION) for max_tiles in (None, 1, None, 1))
    )
    assert running.encoded == before + 2
    assert full["meta_info"]["prompt_tokens"] > low["meta_info"]["prompt_tokens"] + CHUNK
    assert cached(low) == running.before_a_picture
    for again in (full_again, low_again):
        assert cached(again) == again["meta_info"]["prompt_tokens"] - 1


def test_64_requests_at_once(running: Running) -> None:
    """Good ones are answered as alone, broken ones refused, each for its own reason; the engine lives on."""
    good, broken = good_cases(), broken_requests(running.served)
    requests = [running.served.request(case) for case in good] + list(broken.values())
    assert len(requests) == 64
    shuffled = random.Random(0).sample(range(64), 64)
    retracted = len(RETRACTED.findall(running.engine.log.read_text()))
    found = ask_sglang(running.engine, [requests[number] for number in shuffled], TOKENS)
    answers = dict(zip(shuffled, found, strict=True))
    expected = ask_siglane(running.served.folder, good, TOKENS)
    compare([answers[number] for number in range(len(good))], expected, [str(case) for case in good])
    refused = [answers[number].get("error", "not refused") for number in range(len(good), 64)]
    assert [error.partition("Error: ")[2] for error in refused] == list(broken)
    assert len(RETRACTED.findall(running.engine.log.read_text())) > retracted
    running.check(("And now?", Picture(33, 44, 50)))


def good_cases() -> list[Case]:
    chance = random.Random(1)

    def image(number: int) -> Picture:
        return Picture(chance.randint(1, 220), chance.randint(1, 220), 100 + number)

    cases: list[Case] = [(f"What is in image {number}?",) for number in range(8)]
    cases += [(image(number), QUESTION) for number in range(28)]
    cases += [("The image ", image(number), " or ", image(number + 1), image(number + 2), "?") for number in range(10)]
    cases += [(VideoSize(64, 48, 2 + number, 200 + number), QUESTION) for number in range(6)]
    return cases


def broken_requests(served: Served) -> dict[str, dict[str, Any]]:
    """By what is said to them."""
    picture = Picture(60, 40, 60)
    one = served.request((picture, QUESTION))
    head, _, body = picture.url.partition(",")
    plain = len(served.tokenizer(served.rendered(())).input_ids)
    with_picture = ask_siglane(served.folder, [(picture, "1")], 1)[0].usage.prompt_tokens - 1

    def instead(*urls: str) -> dict[str, Any]:
        return one | {"image_data": list(urls)}

    def digits(count: int) -> str:
        """As many tokens."""
        return "1" * count

    return {
        f"{IMAGE}: not an image; accepted formats: JPEG, PNG, WEBP, GIF, BMP": instead(
            f"{head},{base64.b64encode(b'no picture at all').decode()}"
        ),
        f"{IMAGE}: the image cannot be decoded: its data are damaged or incomplete": instead(
            f"{head},{body[: len(body) // 8 * 4]}"
        ),
        f"{IMAGE}: the data URL is not valid base64 (standard alphabet, padded, no whitespace)": instead(f"{head},%%%"),
        f"{IMAGE}: the media URL must start with data:, https://, http:// or file://": instead("ftp://a.b/c.png"),
        f"{IMAGE}: the media URL leads to a private or reserved address": instead("http://127.0.0.1:1/picture.png"),
        "the request has 17 images; at most 16 are accepted": served.request((*[picture] * 17, QUESTION)),
        "the chat template wrote 1 image placeholders for 2 images": instead(picture.url, picture.url),
        "the chat template wrote 2 image placeholders for 1 images": instead(picture.url)
        | {"prompt": served.rendered((picture, picture))},
        "this model does not read audio": one | {"audio_data": [picture.url]},
        "mm_hashes are not accepted: siglane tells images apart by 32 bytes": one | {"mm_hashes": [1]},
        f"the prompt has {LONGEST + 1} tokens, {LONGEST} are accepted; ask for fewer or smaller images": (
            served.request((picture, digits(LONGEST + 1 - with_picture)))
        ),
        f"The input ({plain + CONTEXT} tokens) is longer than the model's context length ({CONTEXT} "
        "tokens).": served.request((digits(CONTEXT),)),
    }
