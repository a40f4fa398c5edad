"""`/v1/embeddings` and `/v1/classify`: real sockets, tiny SigLIPs with both towers, transformers as the reference."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import secrets
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from openai import BadRequestError, NotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import (
    MODEL,
    RunningServer,
    assert_error,
    config_of,
    data_url,
    image_part,
    listening,
    picture,
    rounded,
    stopped,
)
from two_tower_checkpoint import Kind, write_two_tower_checkpoint
from waiting import PATIENCE, eventually

from siglane.batch.output import Output
from siglane.batch.requests import open_requests
from siglane.batch.run import Plan, run_batch
from siglane.engine.process import embed_worker
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.embed_worker import EmbedWorker
from siglane.engine.process.load import load_tagger
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import EngineError, UserError
from siglane.families.two_tower import load_two_tower, read_two_tower
from siglane.server.embedding import embed as embedding
from siglane.server.embedding.text_cache import TextCache, Vector
from siglane.server.launch import serve, serving
from siglane.server.local import LocalServer
from siglane.server.metrics import Metrics
from siglane.server.served import Deployment, EmbedModel, Served
from siglane.settings.engine import EngineConfig
from siglane.settings.server import ServerConfig
from siglane.text.tokens import TextTokens
from siglane.types import DecodedImage
from siglane.weights.hub import open_checkpoint

TEXTS = ["This is a photo of a cat.", "two green shapes", "hello, WORLD & rivers!"]
PICTURES = [picture(60, 40, seed=1), picture(17, 90, seed=2), picture(1, 1, seed=3)]
PICTURE = data_url(PICTURES[0])
CPU = EngineConfig(device="cpu", threads=1)
LABELS = ["a cat", "a dog", "two green shapes", "the old town hall"]


@contextmanager
def embedding_server(folder: Path, **options: Any) -> Iterator[RunningServer]:
    with serving(config_of(**options), EngineSpec(str(folder), CPU)) as served:
        served.engine.wait_ready()
        with listening(served) as server:
            yield server


@contextmanager
def front(behind: RunningServer, **options: Any) -> Iterator[RunningServer]:
    """Another server of the model that `behind` serves, before the same engine."""
    config, metrics, first = config_of(**options), Metrics(), behind.served.embed
    facts, tokens = read_two_tower(open_checkpoint(first.root))[:2]
    deployed = Deployment(MODEL, first.root, behind.served.engine, config, metrics)
    with listening(Served(config, deployed.engine, metrics, embed=EmbedModel(deployed, facts, tokens))) as server:
        yield server


def forget_texts(server: RunningServer) -> None:
    model = server.served.embed
    model.texts = TextCache(model.texts.capacity)


@pytest.fixture(scope="module", params=["siglip", "siglip2", "naflex"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Path:
    folder = tmp_path_factory.mktemp("two_tower") / kind
    write_two_tower_checkpoint(folder, kind)
    return folder


@pytest.fixture(scope="module")
def siglip(folder: Path) -> Iterator[RunningServer]:
    with embedding_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for what does not depend on the kind of model."""
    folder = tmp_path_factory.mktemp("two_tower") / "siglip2"
    write_two_tower_checkpoint(folder, "siglip2")
    with embedding_server(folder, max_images=4, max_image_bytes=200_000, max_label_texts=2048) as server:
        yield server


def vectors(response: httpx2.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [row["index"] for row in data] == list(range(len(data)))
    return np.array([row["embedding"] for row in data], dtype=np.float32)


@torch.no_grad()
def reference(folder: Path, kind: Kind) -> tuple[np.ndarray, np.ndarray, Any]:
    """transformers' vectors of `TEXTS` and `PICTURES`, and its model."""
    from transformers import Siglip2Model, SiglipModel

    model = (Siglip2Model if kind == "naflex" else SiglipModel).from_pretrained(folder).eval()
    loaded = load_two_tower(open_checkpoint(folder), device="cpu")
    texts = F.normalize(model.get_text_features(loaded.texts.ids(TEXTS)).pooler_output, dim=-1)
    rows = []
    for data in PICTURES:
        image = DecodedImage.from_rgb(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
        (layout,) = loaded.images.layouts([image.size])
        packed = loaded.model.vision.pack([loaded.images.patches(image, layout)])
        (grid,) = packed.grids
        if kind == "naflex":
            inputs = {
                "pixel_values": packed.pixels[None],
                "pixel_attention_mask": torch.ones(1, grid.area, dtype=torch.int64),
                "spatial_shapes": torch.tensor([[grid.h, grid.w]]),
            }
        else:
            patch = model.config.vision_config.patch_size
            pixels = packed.pixels.reshape(grid.h, grid.w, 3, patch, patch).permute(2, 0, 3, 1, 4)
            inputs = {"pixel_values": pixels.reshape(1, 3, grid.h * patch, grid.w * patch)}
        rows.append(F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1))
    return texts.numpy(), torch.cat(rows).numpy(), model


def test_vectors_are_transformers(siglip: RunningServer, folder: Path, kind: Kind) -> None:
    texts, images, _ = reference(folder, kind)
    mixed = [
        TEXTS[0],
        {"image": PICTURE},
        {"text": TEXTS[1]},
        {"image": {"url": data_url(PICTURES[1])}},
        TEXTS[2],
    ]
    found = vectors(siglip.post_to("/v1/embeddings", model=MODEL, input=mixed))
    expected = np.stack((texts[0], images[0], texts[1], images[1], texts[2]))
    assert np.abs(found - expected).max() < 1e-5
    (alone,) = vectors(siglip.post_to("/v1/embeddings", input={"image": data_url(PICTURES[2])}))
    assert np.abs(alone - images[2]).max() < 1e-5
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_the_openai_client(siglip: RunningServer, folder: Path, kind: Kind) -> None:
    """Without a word about it, the client asks for base64."""
    texts, _, _ = reference(folder, kind)
    client = siglip.openai()
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert np.abs(np.array([row.embedding for row in answer.data]) - texts).max() < 1e-5
    assert [row.index for row in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
    one = client.embeddings.create(model=MODEL, input=TEXTS[1], encoding_format="float", dimensions=32)
    assert np.abs(np.array(one.data[0].embedding) - texts[1]).max() < 1e-5
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(BadRequestError, match="32 dimensions"):
        client.embeddings.create(model=MODEL, input="a", dimensions=16)
    with pytest.raises(NotFoundError, match="not served here"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(NotFoundError, match="embeds and classifies"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])


def test_the_three_shapes_agree(fixed: RunningServer) -> None:
    one = vectors(fixed.post_to("/v1/embeddings", input=[{"text": "", "image": PICTURE}]))
    part = image_part(PICTURES[0])
    two = vectors(fixed.post_to("/v1/embeddings", input=[{"content": [part]}]))
    three = vectors(fixed.post_to("/v1/embeddings", messages=[{"role": "user", "content": [part]}]))
    assert np.array_equal(one, two)
    assert np.array_equal(one, three)
    words = vectors(fixed.post_to("/v1/embeddings", input=[{"content": [{"type": "text", "text": TEXTS[0]}]}]))
    assert np.array_equal(words, vectors(fixed.post_to("/v1/embeddings", input=TEXTS[0])))


def test_a_picture_is_never_taken_for_its_letters(fixed: RunningServer) -> None:
    """A bare string is what `modality` says; what an object calls a text is one."""
    urls = [data_url(data) for data in PICTURES]
    expected = vectors(fixed.post_to("/v1/embeddings", input=[{"image": url} for url in urls]))
    found = vectors(fixed.post_to("/v1/embeddings", input=urls, modality="image"))
    assert np.abs(found - expected).max() < 1e-6
    assert (found @ found.T)[0, 1] < 0.999
    one = vectors(fixed.post_to("/v1/embeddings", input=urls[0], modality="image"))
    assert np.abs(one - expected[:1]).max() < 1e-6
    letters = [vectors(fixed.post_to("/v1/embeddings", input=[urls[2]], modality="text"))]
    letters.append(vectors(fixed.post_to("/v1/embeddings", input=[{"text": urls[2]}])))
    assert np.abs(letters[0] - letters[1]).max() < 1e-6
    assert np.abs(letters[0] - expected[2:]).max() > 0.01
    bare = [base64.b64encode(PICTURES[0]).decode(), base64.urlsafe_b64encode(PICTURES[1]).decode()]
    for words in (*bare, f"\n{bare[0]}\n", data_url(PICTURES[0])):
        assert_error(fixed.post_to("/v1/embeddings", input=["a", words]), 400, "ambiguous_input", "input[1]")
        assert fixed.post_to("/v1/embeddings", input=["a", words], modality="text").is_success
        label = fixed.post_to("/v1/classify", images=[PICTURE], labels=["a", words])
        assert_error(label, 400, "ambiguous_input", "labels[1]")
    ordinary = [
        "data: a word",
        "Qk1 " * 40,
        "Antidisestablishmentarianism" * 3,
        "data:image is what it is called",
        "https://example.org/a.png",
        "data:,x",
    ]
    assert vectors(fixed.post_to("/v1/embeddings", input=ordinary)).shape == (6, 32)
    by_name = fixed.post_to("/v1/classify", input=[PICTURE], labels=LABELS, modality="image")
    assert by_name.json()["data"] == fixed.post_to("/v1/classify", images=[PICTURE], labels=LABELS).json()["data"]


def test_the_product_of_labels_and_templates_is_bounded(fixed: RunningServer) -> None:
    templates = [f"{number} {{label}}" for number in range(16)]
    body = {"images": [PICTURE], "labels": [f"label {n}" for n in range(129)], "templates": templates}
    beyond = fixed.post_to("/v1/classify", **body)
    assert_error(beyond, 400, "too_many_texts", "labels")
    assert "129 labels in 16 templates are 2064 texts; at most 2048" in beyond.json()["error"]["message"]


def test_texts_in_many_pieces_are_the_same_texts(fixed: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [*(f"text {n % 11}" for n in range(30)), {"image": PICTURE}, *(f"text {n}" for n in range(20))]
    whole = fixed.post_to("/v1/embeddings", input=inputs)
    forget_texts(fixed)
    monkeypatch.setattr(embedding, "PIECE_TEXTS", 7)
    cut = fixed.post_to("/v1/embeddings", input=inputs)
    forget_texts(fixed)
    monkeypatch.setattr(embedding, "PIECE_CHARACTERS", 1)
    single = fixed.post_to("/v1/embeddings", input=inputs)
    for other in (cut, single):
        assert np.abs(vectors(other) - vectors(whole)).max() < 1e-6
        assert other.json()["usage"] == whole.json()["usage"]


def test_stages_are_told_to_who_asks(fixed: RunningServer) -> None:
    """By the header that a chat has for it."""
    bodies = {
        "/v1/embeddings": {"input": [{"image": data_url(picture(seed=91))}, "a text of its own"]},
        "/v1/classify": {"images": [data_url(picture(seed=92))], "labels": ["another label"]},
    }
    with fixed.http() as client:
        for path, body in bodies.items():
            told = client.post(path, json=body, headers={"x-siglane-timings": "1"}).json()["siglane"]["timings"]
            assert set(told) == {"fetch", "decode", "prepare", "queue", "encode"}
            assert "timings" not in client.post(path, json=body).json()["siglane"]


def test_usage_and_report(fixed: RunningServer) -> None:
    body = fixed.post_to("/v1/embeddings", input=["two green shapes", {"image": PICTURE}, "a " * 200]).json()
    tokens = fixed.served.embed.tokens
    expected = tokens.count("two green shapes") + 1 + tokens.rule.length
    details = body["usage"]["prompt_tokens_details"]
    assert details == {"image_tokens": 16, "text_tokens": expected}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 16 + expected
    assert body["siglane"]["cut"] == ["input[2]"]
    assert "64 tokens" in body["siglane"]["texts"]
    assert body["siglane"]["images"][0]["width"] == 60
    again = fixed.post_to("/v1/embeddings", input=["two green shapes"]).json()
    assert again["usage"]["total_tokens"] == tokens.count("two green shapes") + 1  # known by now, counted all the same


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_field", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": 3}, "invalid_value", "input"),
        ({"input": [1, 2, 3]}, "invalid_value", "input"),
        ({"input": [[1, 2], [3]]}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input[1]"),
        ({"input": ["a", {}]}, "missing_field", "input[1]"),
        ({"input": ["a", {"text": "b", "image": PICTURE}]}, "invalid_value", "input[1]"),
        ({"input": ["a", {"text": 3}]}, "invalid_value", "input[1].text"),
        ({"input": ["a" * 70000]}, "invalid_value", "input[0]"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "missing_field", "input"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 3}, "unsupported_field", "truncate_prompt_tokens"),
        ({"input": [{"content": [image_part(PICTURES[0])] * 2}]}, "invalid_value", "input[0].content"),
        (
            {"input": [{"image": PICTURE}, {"image": data_url(b"nothing")}]},
            "image_decode_failed",
            "input[1].image",
        ),
        ({"input": [{"image": "file:///etc/passwd"}]}, None, "input[0].image"),
        ({"input": [{"image": "http://127.0.0.1:9/a.png"}]}, None, "input[0].image"),
        ({"input": [{"image": {"url": PICTURE, "max_num_patches": 9}}]}, None, "input[0].image"),
        ({"input": [{"image": PICTURE}] * 5}, "too_many_images", "input"),
        ({"input": PICTURE}, "ambiguous_input", "input[0]"),
        ({"input": ["a", f" {PICTURE}"]}, "ambiguous_input", "input[1]"),
        ({"input": ["DATA:image/svg+xml;utf8,<svg/>"]}, "ambiguous_input", "input[0]"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "ambiguous_input", "messages[0].content"),
        ({"input": [{"content": PICTURE}]}, "ambiguous_input", "input[0].content"),
        ({"input": [PICTURE], "modality": "audio"}, "invalid_value", "modality"),
        ({"input": ["a cat"], "modality": "image"}, "unsupported_url_scheme", "input[0]"),
        ({"input": [data_url(b"x")], "modality": "image"}, "image_decode_failed", "input[0]"),
        ({"input": ["http://127.0.0.1:9/a.png"], "modality": "image"}, "image_url_forbidden", "input[0]"),
        ({"input": ["file:///etc/passwd"], "modality": "image"}, "local_media_forbidden", "input[0]"),
        ({"input": [PICTURE] * 5, "modality": "image"}, "too_many_images", "input"),
        ({"input": [{"text": "a"}], "modality": "image"}, "invalid_value", "input[0].text"),
        ({"input": [{"image": PICTURE}], "modality": "text"}, "invalid_value", "input[0].image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}]},
            "unsupported_content_type",
            "messages[0].content[0]",
        ),
    ],
)
def test_bad_requests_name_the_item(fixed: RunningServer, body: dict[str, Any], code: str | None, param: str) -> None:
    assert_error(fixed.post_to("/v1/embeddings", **body), 400, code, param)


def test_scores_are_transformers(siglip: RunningServer, folder: Path, kind: Kind) -> None:
    _, images, model = reference(folder, kind)
    texts = [f"This is a photo of {label}." for label in LABELS]
    tokens = read_two_tower(open_checkpoint(folder))[1]
    with torch.no_grad():
        written = F.normalize(model.get_text_features(tokens.ids(texts)).pooler_output, dim=-1)
        logits = torch.from_numpy(images) @ written.T * model.logit_scale.exp() + model.logit_bias
    expected = logits.sigmoid()
    body = {"labels": LABELS, "images": [data_url(data) for data in PICTURES], "threshold": 0}
    answer = siglip.post_to("/v1/classify", model=MODEL, **body).json()
    for row, scores in zip(answer["data"], expected, strict=True):
        assert {tag["label"] for tag in row["tags"]} == set(LABELS)
        confidences = [tag["confidence"] for tag in row["tags"]]
        assert confidences == sorted(confidences, reverse=True)
        for tag in row["tags"]:
            assert abs(tag["confidence"] - float(scores[LABELS.index(tag["label"])])) < 1e-4
    few = siglip.post_to("/v1/classify", **body | {"max_tags": 2}).json()["data"]
    assert [row["tags"] for row in few] == [row["tags"][:2] for row in answer["data"]]
    bar = float(expected.flatten().sort().values[5:7].mean())  # between two scores
    some = siglip.post_to("/v1/classify", **body | {"threshold": bar}).json()["data"]
    assert [len(row["tags"]) for row in some] == (expected >= bar).sum(1).tolist()


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_as_vllm_does(fixed: RunningServer, path: str) -> None:
    image = {"content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}
    texts = vectors(fixed.post_to("/v1/embeddings", input=TEXTS))
    (seen,) = vectors(fixed.post_to("/v1/embeddings", input=[{"image": PICTURE}]))
    tags = fixed.post_to("/v1/classify", images=[PICTURE], labels=TEXTS, template="{label}", threshold=0).json()
    chances = {tag["label"]: tag["confidence"] for tag in tags["data"][0]["tags"]}
    found = fixed.post_to(path, model=MODEL, text_1=image, text_2=TEXTS).json()
    assert found["object"] == "list"
    for number, (one, text) in enumerate(zip(found["data"], TEXTS, strict=True)):
        assert (one["index"], one["object"]) == (number, "score")
        assert one["score"] == pytest.approx(float(seen @ texts[number]), abs=1e-5)
        assert one["probability"] == pytest.approx(chances[text], abs=1e-5)
    assert chances.keys() == {*TEXTS}
    alike = fixed.post_to(path, queries=TEXTS[:2], documents=[TEXTS[0], image]).json()["data"]
    assert alike[0]["score"] == pytest.approx(1.0, abs=1e-5)
    assert "probability" not in alike[0]
    assert alike[1]["score"] == pytest.approx(float(seen @ texts[1]), abs=1e-5)
    assert_error(fixed.post_to(path, text_1="a"), 400, "missing_field", "text_2")
    assert_error(fixed.post_to(path, text_1="a", documents=["b"]), 400, "missing_field", "text_1")
    assert_error(fixed.post_to(path, queries=["a", "b"], documents=["c"]), 400, "invalid_value", "documents")
    assert_error(fixed.post_to(path, data_1="a", data_2=[PICTURE]), 400, "ambiguous_input", "data_2[0]")


def test_templates_and_other_names(fixed: RunningServer) -> None:
    body = {"labels": LABELS, "threshold": 0}
    plain = fixed.post_to("/v1/classify", images=PICTURE, template="{label}", **body).json()
    listed = fixed.post_to("/v1/classify", input=[PICTURE], templates=["{label}"], **body).json()
    assert plain["data"] == listed["data"]
    both = fixed.post_to("/v1/classify", images=PICTURE, templates=["{label}", "a {label}!"], **body).json()
    found = {tag["label"]: tag["confidence"] for tag in both["data"][0]["tags"]}
    texts = vectors(fixed.post_to("/v1/embeddings", input=[*LABELS, *(f"a {label}!" for label in LABELS)]))
    mean = texts[:4] + texts[4:]
    image = vectors(fixed.post_to("/v1/embeddings", input={"image": PICTURE}))[0]
    logits = mean / np.linalg.norm(mean, axis=1, keepdims=True) @ image * np.exp(4.0) - 3.0
    for label, logit in zip(LABELS, logits, strict=True):
        assert abs(found[label] - 1 / (1 + np.exp(-logit))) < 1e-4


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"labels": ["a"]}, "missing_field", "images"),
        ({"images": [PICTURE]}, "missing_field", "labels"),
        ({"images": [PICTURE], "labels": []}, "invalid_value", "labels"),
        ({"images": [PICTURE], "labels": ["a", "a "]}, "bad_labels", "labels"),
        ({"images": [PICTURE], "labels": ["a"], "template": "no place"}, "bad_template", "templates"),
        ({"images": [PICTURE], "labels": ["a"], "threshold": 2}, "invalid_value", "threshold"),
        ({"images": [PICTURE], "labels": ["a"], "max_tags": 0}, "invalid_value", "max_tags"),
        ({"images": [PICTURE, data_url(b"x")], "labels": ["a"]}, "image_decode_failed", "images[1]"),
        ({"input": [{"text": "a"}], "labels": ["a"]}, "invalid_value", "input[0].text"),
        ({"images": [PICTURE] * 5, "labels": ["a"]}, "too_many_images", "images"),
        ({"images": [PICTURE], "labels": ["a", PICTURE]}, "ambiguous_input", "labels[1]"),
        ({"images": [PICTURE], "labels": ["a"], "modality": "text"}, "invalid_value", "modality"),
        (
            {"images": [PICTURE], "labels": [*"abcdefghijklmnopq"], "templates": ["{label}"] * 128},
            "too_many_texts",
            "labels",
        ),
    ],
)
def test_bad_classifications(fixed: RunningServer, body: dict[str, Any], code: str, param: str) -> None:
    assert_error(fixed.post_to("/v1/classify", **body), 400, code, param)


def test_clients_share_a_forward_and_get_what_they_get_alone(fixed: RunningServer) -> None:
    engine = fixed.served.engine
    bodies = [{"input": [{"image": data_url(picture(30 + n, 50, seed=n))}, f"text number {n}"]} for n in range(8)]
    alone = [vectors(fixed.post_to("/v1/embeddings", **body)) for body in bodies]
    forget_texts(fixed)
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: vectors(fixed.post_to("/v1/embeddings", **bodies[n]))}))
        for n in range(8)
    ]
    with stopped(fixed.served.engine):
        for thread in threads:
            thread.start()
        eventually(lambda: len(engine._embeddings) == 16)
    for thread in threads:
        thread.join(PATIENCE)
    for number, expected in enumerate(alone):
        assert np.abs(results[number] - expected).max() < 1e-5


def test_what_waits_shares_a_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tagger(str(folder), CPU)
    groups: list[int] = []
    forward = embed_worker._forward

    def counting(model: Any, items: list[Any]) -> torch.Tensor:
        groups.append(len(items))
        return forward(model, items)

    monkeypatch.setattr(embed_worker, "_forward", counting)
    decoded = [DecodedImage.from_rgb(np.full((30, 50 + n, 3), 9 * n, np.uint8)) for n in range(4)]
    images = [loaded.images.patches(one, *loaded.images.layouts([one.size])) for one in decoded]
    patches = max(image.layout.patches for image in images)
    worker = EmbedWorker(loaded.model, EngineConfig(device="cpu", max_batch_patches=3 * patches))
    for number, item in enumerate([images[0], *loaded.texts.ids(TEXTS).numpy(), *images[1:], images[0]]):
        worker.add([(number, item)])
    worker.forget(5)
    found: dict[int, Any] = {}
    while worker.has_work:
        found.update(worker.step())
    assert groups == [3, 3, 1]  # images first, one has left, the fourth has no room beside the others
    assert sorted(found) == [0, 1, 2, 3, 4, 6, 7]
    assert np.allclose(found[0].vector, found[7].vector, atol=1e-6)
    one_by_one = EmbedWorker(loaded.model, EngineConfig(device="cpu", enable_packing=False))
    one_by_one.add([(0, images[0]), (1, images[1])])
    ((number, embedding),) = one_by_one.step()
    assert number == 0
    assert np.allclose(embedding.vector, found[0].vector, atol=1e-6)


def forwards(worker: EmbedWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, set[int]]]:
    """Of one forward after the other: what kind it is of, and which numbers got their embedding."""
    kinds: list[str] = []
    forward = embed_worker._forward

    def noting(model: Any, items: list[Any]) -> torch.Tensor:
        kinds.append("texts" if isinstance(items[0], np.ndarray) else "images")
        return forward(model, items)

    monkeypatch.setattr(embed_worker, "_forward", noting)
    while worker.has_work:
        done = worker.step()
        yield kinds[-1], {number for number, _ in done}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two_tower") / "turns"
    write_two_tower_checkpoint(folder, "siglip2")
    return load_tagger(str(folder), CPU)


@pytest.mark.parametrize(
    ("clients", "each"), [(1, 256), pytest.param(16, 256, marks=pytest.mark.slow), (16, 1), (31, 40)]
)
def test_one_word_waits_for_at_most_two_forwards(
    towers: Any, clients: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else has sent how much, and whatever pictures wait: counted in forwards, not in seconds."""
    ids = towers.texts.ids(TEXTS).numpy()
    decoded = DecodedImage.from_rgb(np.full((30, 50, 3), 9, np.uint8))
    image = towers.images.patches(decoded, *towers.images.layouts([decoded.size]))
    worker = EmbedWorker(towers.model, EngineConfig(device="cpu", max_batch_patches=image.layout.patches))
    numbers = itertools.count()
    for _ in range(clients):
        worker.add([(next(numbers), image), *((next(numbers), ids[0]) for _ in range(each))])
    told = forwards(worker, monkeypatch)
    next(told)  # one is computed when the word comes
    word = next(numbers)
    worker.add([(word, ids[1])])
    waited = next(place for place, (_, done) in enumerate(told) if word in done)
    assert waited <= 2
    rest = list(told)
    assert sum(kind == "texts" for kind, _ in rest) <= clients * each / 32 + 1  # and forwards stay full


def test_images_and_texts_take_turns(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = towers.texts.ids(TEXTS).numpy()
    decoded = DecodedImage.from_rgb(np.full((30, 50, 3), 9, np.uint8))
    image = towers.images.patches(decoded, *towers.images.layouts([decoded.size]))
    worker = EmbedWorker(towers.model, EngineConfig(device="cpu", max_batch_patches=image.layout.patches))
    worker.add([(number, ids[0]) for number in range(100)])
    worker.add([(100 + number, image) for number in range(2)])
    worker.add([(200, image)])
    told = list(forwards(worker, monkeypatch))
    assert [kind for kind, _ in told] == ["images", "texts", "images", "texts", "images", "texts", "texts"]
    assert [done for kind, done in told if kind == "images"] == [{100}, {200}, {101}]  # clients in turn


def test_a_batch_yields(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's items wait for two forwards at most, however many a batch has; while clients keep coming, it gets one
    of four, and while they chat one of four calls."""
    ids = towers.texts.ids(TEXTS).numpy()
    decoded = DecodedImage.from_rgb(np.full((30, 50, 3), 9, np.uint8))
    image = towers.images.patches(decoded, *towers.images.layouts([decoded.size]))
    worker = EmbedWorker(towers.model, EngineConfig(device="cpu", max_batch_patches=image.layout.patches))
    worker.add([(number, image if number % 2 else ids[0]) for number in range(100)], batch=True)
    told = forwards(worker, monkeypatch)
    next(told)
    for number, item in ((200, image), (201, ids[1])):
        worker.add([(number, item)])
        waited = next(place for place, (_, done) in enumerate(told) if number in done)
        assert waited <= 2
    served = []
    for number in range(40):
        worker.add([(300 + number, image)])
        (found,) = {one >= 300 for one in next(told)[1]}
        served.append(found)
    assert 9 <= served.count(False) <= 11
    assert len(list(told)) >= 50  # and it ends
    worker.add([(number, image) for number in range(4)], batch=True)
    assert [bool(worker.step(clients_chat=True)) for _ in range(8)].count(True) == 2
    worker.forget(2)
    assert len(worker.step()) == 1
    assert not worker.has_work


def test_whoever_leaves_gives_their_turn_away(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = towers.texts.ids(TEXTS).numpy()
    worker = EmbedWorker(towers.model, EngineConfig(device="cpu"))
    for client in range(3):
        worker.add([(10 * client + number, ids[0]) for number in range(3)])
    for number in (10, 11, 12, 0, 99):
        worker.forget(number)
    (told,) = forwards(worker, monkeypatch)
    assert told == ("texts", {1, 2, 20, 21, 22})


def test_a_word_is_answered_while_somebody_classifies_at_the_limit(fixed: RunningServer) -> None:
    """The word's answer comes long before theirs, and the server keeps answering."""
    forget_texts(fixed)
    labels = [f"label {number}" for number in range(128)]
    body = {"images": [PICTURE], "labels": labels, "templates": [f"{n} {{label}}" for n in range(16)]}
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(fixed.post_to("/v1/classify", **body)))
    with fixed.http() as http:
        thread.start()
        eventually(lambda: fixed.served.engine._embeddings)
        for word in ("one", "two", "three"):
            assert vectors(http.post("/v1/embeddings", json={"input": word})).shape == (1, 32)
            assert http.get("/health").status_code == 200
        assert not answers
        assert len(fixed.served.engine._embeddings) <= embedding.PIECE_TEXTS + 1
    thread.join(PATIENCE)
    assert answers[0].status_code == 200, answers[0].text


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "each"), [(16, 1), (1, 16)])
def test_probes_and_words_are_answered_beside_clients_at_the_limit(
    fixed: RunningServer, clients: int, each: int
) -> None:
    """`/health` within 100 ms and a word within a few forwards, while whoever classifies sends as much as is allowed.
    Medians, so that a busy machine does not decide."""
    forget_texts(fixed)
    texts = embedding.PIECE_TEXTS * 8  # the limit of `fixed`: labels x templates

    def classify(client: int) -> None:
        for number in range(each):
            labels = [f"{client} {number} {label}" for label in range(texts // 16)]
            body = {"images": [PICTURE], "labels": labels, "templates": [f"{n} {{label}}" for n in range(16)]}
            answers.append(fixed.post_to("/v1/classify", **body).status_code)

    answers: list[int] = []
    threads = [threading.Thread(target=classify, args=(client,)) for client in range(clients)]
    probes, words = [], []
    with fixed.http() as http:
        for thread in threads:
            thread.start()
        eventually(lambda: fixed.served.engine._embeddings)
        while any(thread.is_alive() for thread in threads):
            for seconds, ask in ((probes, lambda: http.get("/health")), (words, word_asker(http))):
                began = time.perf_counter()
                assert ask().status_code == 200
                seconds.append(time.perf_counter() - began)
    assert answers == [200] * clients * each
    assert len(words) >= 5
    assert statistics.median(probes) < 0.1
    assert statistics.median(words) < 0.5


def word_asker(http: httpx2.Client) -> Callable[[], httpx2.Response]:
    """Each call asks for the vector of another word."""
    return lambda: http.post("/v1/embeddings", json={"input": secrets.token_hex(4)})


def test_what_fails_in_company_fails_alone(fixed: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tokens = fixed.served.engine, fixed.served.embed.tokens
    ids = tokens.ids(["rivers at night", "zebra crossing"])
    ids[1] = 1 << 30  # outside the table
    good = vectors(fixed.post_to("/v1/embeddings", input=["rivers at night"]))
    with stopped(fixed.served.engine):
        one, other = engine.embed(list(ids.numpy()))
    assert np.abs(one.result(PATIENCE).vector - good).max() < 1e-6
    with pytest.raises(EngineError, match=r"^it could not be embedded \(IndexError\)$"):
        other.result(PATIENCE)

    forget_texts(fixed)
    real = TextTokens.ids

    def poisoned(self: TextTokens, texts: list[str]) -> torch.Tensor:
        found = real(self, texts)
        found[[text == "zebra crossing" for text in texts]] = 1 << 30
        return found

    monkeypatch.setattr(TextTokens, "ids", poisoned)
    response = fixed.post_to("/v1/embeddings", input=["rivers at night", "zebra crossing"])
    assert_error(response, 500, "internal_error")
    assert response.json()["error"]["message"].startswith("input[1]: it could not be embedded")
    assert np.abs(vectors(fixed.post_to("/v1/embeddings", input=["rivers at night"])) - good).max() < 1e-6
    monkeypatch.undo()
    assert vectors(fixed.post_to("/v1/embeddings", input=["zebra crossing"])).shape == (1, 32)


def test_a_vector_that_is_not_finite_is_an_error_of_its_item(tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path, "siglip2")
    ids = read_two_tower(open_checkpoint(tmp_path))[1].ids(["a yellow star", "two shapes"])
    (odd, *_) = {*ids[0].tolist()} - {*ids[1].tolist()}
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_model.embeddings.token_embedding.weight"][odd] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with embedding_server(tmp_path) as server:
        assert_error(server.post_to("/v1/embeddings", input=["two shapes", "a yellow star"]), 500, "not_finite")
        assert vectors(server.post_to("/v1/embeddings", input=["two shapes"])).shape == (1, 32)


def test_whoever_leaves_is_forgotten(fixed: RunningServer) -> None:
    engine = fixed.served.engine
    with stopped(fixed.served.engine):
        with pytest.raises(httpx2.TimeoutException), fixed.http(timeout=1) as http:
            http.post("/v1/embeddings", json={"input": ["a text of somebody who leaves", "and another one"]})
        eventually(lambda: not engine._embeddings)
    assert vectors(fixed.post_to("/v1/embeddings", input="somebody who stays")).shape == (1, 32)


@pytest.mark.slow
def test_an_engine_that_dies_comes_back(tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path, "siglip2")
    with embedding_server(tmp_path) as server:
        engine = server.served.engine
        before = vectors(server.post_to("/v1/embeddings", input="a cat"))
        forget_texts(server)
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post_to("/v1/embeddings", input="a bird")))
        os.kill(engine.pid, signal.SIGSTOP)
        thread.start()
        eventually(lambda: engine._embeddings)
        os.kill(engine.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        assert_error(answers[0], 503, "engine_restarting")
        eventually(lambda: engine.state == "ready")
        assert np.array_equal(vectors(server.post_to("/v1/embeddings", input="a cat")), before)


class TestTextCache:
    def entry(self, value: float) -> Vector:
        return Vector(np.full(256, value, np.float32), 3)

    def test_it_holds_no_more_than_its_bytes_and_drops_the_oldest_use(self) -> None:
        cache = TextCache(4 * 1800)
        for number in range(4):
            cache.keep(f"text {number}", self.entry(number))
        assert cache.get("text 0") is not None
        cache.keep("text 4", self.entry(4))
        assert [cache.get(f"text {number}") is not None for number in range(5)] == [True, False, True, True, True]
        assert cache.bytes <= cache.capacity
        cache.keep("text 4", self.entry(4))
        cache.keep("long " * 400, self.entry(5))  # texts count as their vectors do
        assert [cache.get(f"text {number}") is not None for number in range(5)] == [False, False, False, True, True]

    def test_what_is_larger_than_all_of_it_is_not_kept(self) -> None:
        cache = TextCache(1000)
        cache.keep("a", self.entry(1))
        assert cache.get("a") is None
        assert cache.bytes == 0

    def test_a_server_keeps_no_more(self, fixed: RunningServer) -> None:
        with front(fixed, text_cache_bytes=5000) as server:
            first = vectors(server.post_to("/v1/embeddings", input=[f"text {number}" for number in range(40)]))
            assert 0 < server.served.embed.texts.bytes <= 5000
            again = vectors(server.post_to("/v1/embeddings", input=[f"text {number}" for number in range(40)]))
            assert np.abs(first - again).max() < 1e-6


def test_key_limits_probes_and_metrics(fixed: RunningServer) -> None:
    with front(fixed, api_key="secret", max_body_bytes=4096) as server:
        assert_error(server.post_to("/v1/embeddings", input="a"), 401, "invalid_api_key")
        assert_error(server.post_to("/v1/classify", images=["a"], labels=["b"]), 401, "invalid_api_key")
        client = server.openai(api_key="secret")
        assert len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2
        with server.http() as http:
            headers = {"authorization": "Bearer secret"}
            large = http.post("/v1/embeddings", json={"input": "a" * 5000}, headers=headers)
            assert_error(large, 413, "request_too_large")
            assert http.get("/ready").status_code == 200
            assert "siglane_requests_total" in http.get("/metrics").text
        assert server.metric("siglane_requests_total", outcome="ok") == 1
        assert server.metric("siglane_tokens_total", kind="prompt") > 2
        assert server.metric("siglane_inflight_bytes") == 0
        server.served.draining = True
        with server.http() as http:
            assert_error(http.post("/v1/embeddings", json={"input": "a"}, headers=headers), 503, "server_shutting_down")


def test_a_chat_server_does_not_embed(server: RunningServer) -> None:
    for path in ("/v1/embeddings", "/v1/classify"):
        response = server.post_to(path, input="a")
        assert_error(response, 404, "not_found")
        assert "chats" in response.json()["error"]["message"]


def test_ending_while_a_client_waits(fixed: RunningServer) -> None:
    with front(fixed) as server, stopped(server.served.engine):
        engine = server.served.engine
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post_to("/v1/embeddings", input="a")))
        thread.start()
        eventually(lambda: engine._embeddings)
        server.server.drain()
        server.server.drain()
        thread.join(PATIENCE)
        assert_error(answers[0], 503, "server_shutting_down")


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path, "siglip2")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        serve(ServerConfig(port=0), EngineSpec(str(tmp_path), CPU))
    engine = EngineProcess(EngineSpec(str(tmp_path), CPU))
    with pytest.raises(EngineError, match="starting"):
        engine.embed([np.zeros(64, np.int64)])[0].result(PATIENCE)


def test_a_batch_gets_the_same_vectors_and_tags(fixed: RunningServer, tmp_path: Path) -> None:
    image = data_url(picture(30, 20))
    bodies = [
        ("/v1/embeddings", {"input": [TEXTS[0], {"image": image}]}),
        ("/v1/embeddings", {"input": TEXTS[1], "encoding_format": "base64"}),
        ("/v1/classify", {"images": [image], "labels": ["cat", "dog"], "threshold": 0}),
        ("/v1/embeddings", {"input": TEXTS, "dimensions": 3}),
        ("/v1/chat/completions", {"messages": []}),
    ]
    lines = [json.dumps({"custom_id": str(n), "url": url, "body": body}) for n, (url, body) in enumerate(bodies)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config, metrics, first = config_of(), Metrics(), fixed.served.embed
    deployed = Deployment(MODEL, first.root, fixed.served.engine, config, metrics)
    model = EmbedModel(deployed, *read_two_tower(open_checkpoint(first.root))[:2])
    served = Served(config, deployed.engine, metrics, embed=model)
    with Output(tmp_path / "out.jsonl", {}) as output:
        rows = open_requests(tmp_path / "in.jsonl", 1 << 20).rows
        asyncio.run(run_batch(rows, LocalServer(served, 4), output, Plan(), stop=asyncio.Event()))
    served.close()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in found] == ["0", "1", "2"]
    for row, (url, body) in zip(found, bodies, strict=False):
        expected = fixed.post_to(url, **body).json()
        assert row["response"]["body"]["usage"] == expected["usage"]
        for one, other in zip(row["response"]["body"]["data"], expected["data"], strict=True):
            assert one.keys() == other.keys()
            if isinstance(other.get("embedding"), list):
                np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-5)
            else:
                assert type(one.get("embedding")) is type(other.get("embedding"))
    assert output.failures == {"invalid_value": 1, "not_found": 1}


def test_batches_embed_and_classify(fixed: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yields: list[bool] = []  # of each call that embeds
    embed = EngineProcess.embed

    def noting(self: EngineProcess, items: Any, batch: bool) -> Any:
        yields.append(batch)
        return embed(self, items, batch)

    monkeypatch.setattr(EngineProcess, "embed", noting)
    bodies = {
        "/v1/embeddings": {"input": TEXTS},
        "/v1/classify": {"images": [PICTURE], "labels": LABELS},
    }
    with front(fixed, data_dir=tmp_path) as server:
        client = server.openai()
        for url, body in bodies.items():
            rows = [{"custom_id": str(n), "url": url, "body": {**body, "model": MODEL}} for n in range(3)]
            data = "\n".join(map(json.dumps, rows)).encode()
            file = client.files.create(file=("in.jsonl", data), purpose="batch")
            asked: Any = {"endpoint": url, "completion_window": "24h"}
            batch = client.batches.create(input_file_id=file.id, **asked)
            eventually(lambda batch=batch: client.batches.retrieve(batch.id).status == "completed")  # type: ignore[misc]
            written = client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text
            found = [json.loads(row)["response"]["body"]["data"] for row in written.splitlines()]
            asked_for = len(yields)
            expected_data = server.post_to(url, **body).json()["data"]
            assert len(found) == 3
            for data in found:  # rows share forwards as they arrive, and sums of more rows may round otherwise
                assert data == rounded(expected_data, abs=1e-5)
            assert all(yields[:asked_for])
            assert not any(yields[asked_for:])
            usage, expected = client.batches.retrieve(batch.id).usage, server.post_to(url, **body).json()["usage"]
            assert usage is not None
            assert (usage.input_tokens, usage.output_tokens) == (3 * expected["prompt_tokens"], 0)
            yields.clear()
        with pytest.raises(BadRequestError, match="does not answer /v1/chat/completions"):
            client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
