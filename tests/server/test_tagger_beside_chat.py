"""A SigLIP beside a chat model in one engine: an image tower they share exists once, neither changes the other."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from checkpoints import Written, write_nvila_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import (
    MODEL,
    RunningServer,
    ask_good,
    assert_error,
    assert_unharmed,
    chat,
    config_of,
    data_url,
    image_part,
    listening,
    picture,
    stopped,
)
from two_tower_checkpoint import write_two_tower_checkpoint
from waiting import PATIENCE, eventually

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.load import load_engine, load_tagger, load_with_tagger
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import EngineError, UserError
from siglane.families.codes_folder import write_folder
from siglane.families.processor import load_processor
from siglane.families.two_tower import TwoTowerModel, load_two_tower, read_two_tower
from siglane.server.embedding.text_cache import TextCache
from siglane.server.launch import preflight, serve, serving
from siglane.settings.engine import EngineConfig
from siglane.settings.server import ServerConfig
from siglane.types import DecodedImage, ImagePart, Message, Request, SamplingParams
from siglane.weights.hub import open_checkpoint

CPU = EngineConfig(device="cpu", threads=1, kv_tokens=65536)
TEXTS = ["two green shapes", "a cat"]
PICTURES = [picture(60, 40, seed=1), picture(17, 90, seed=2)]


@dataclass(frozen=True)
class Folders:
    """two_tower: a SigLIP with the image tower of `chat`; drifted: one whose image tower differs in a single number."""

    chat: Path
    two_tower: Path
    drifted: Path
    reference: Written


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("beside")
    reference = write_nvila_checkpoint(root / "chat")
    for name in ("two_tower", "drifted"):
        write_two_tower_checkpoint(root / name, "siglip2", image_size=56, patch_size=14, tower=reference.tower)
    weights = load_file(root / "drifted/model.safetensors")
    weights["vision_model.encoder.layers.1.self_attn.k_proj.weight"][3, 5] += 0.25
    save_file(weights, root / "drifted/model.safetensors")
    return Folders(root / "chat", root / "two_tower", root / "drifted", reference)


@contextmanager
def both(folders: Folders, two_tower: Path, **options: Any) -> Iterator[RunningServer]:
    with serving(config_of(**options), EngineSpec(str(folders.chat), CPU, tagger=str(two_tower))) as served:
        served.engine.wait_ready()
        with listening(served) as server:
            yield server


@pytest.fixture(scope="module")
def beside(folders: Folders) -> Iterator[RunningServer]:
    with both(folders, folders.two_tower) as server:
        yield server


def embedded(server: RunningServer, model: str | None = None) -> np.ndarray:
    named = {} if model is None else {"model": model}
    answer = server.post_to("/v1/embeddings", input=[*({"image": data_url(one)} for one in PICTURES), *TEXTS], **named)
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)


@torch.inference_mode()
def expected(two_tower: Path) -> np.ndarray:
    """By the checkpoint alone."""
    model, images, texts = load_two_tower(open_checkpoint(two_tower), device="cpu")[:3]
    decoded = [DecodedImage.from_rgb(np.array(Image.open(io.BytesIO(data)).convert("RGB"))) for data in PICTURES]
    patches = [images.patches(one, *images.layouts([one.size])) for one in decoded]
    return torch.cat([model.embed_images(patches), model.embed_texts(texts.ids(TEXTS))]).numpy()


def answers(engine: Any, folders: Folders) -> list[int]:
    """Greedy tokens about a picture."""
    processor = load_processor(open_checkpoint(folders.chat))
    image = DecodedImage.from_rgb(np.random.default_rng(5).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    patches = processor.patches(image, *processor.layouts([image.size]))
    prompt = processor.prompt([Message("user", ("What is it?", ImagePart(0)))], [patches.layout])
    engine.add(Request("a", prompt, SamplingParams(ignore_eos=True), 12, images=(patches,)))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [delta.token_id for delta in engine.step() if delta.token_id is not None]
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_equal_weights_exist_once(folders: Folders, dtype: str) -> None:
    config = EngineConfig(device="cpu", threads=1, kv_tokens=2048, vision_dtype=dtype)  # type: ignore[arg-type]
    engine, (two_tower, _, _, not_shared_because) = load_with_tagger(str(folders.chat), str(folders.two_tower), config)
    assert not_shared_because is None
    own, tower = two_tower.vision.tower, engine.runner.model.vision.encoder.tower
    assert len(own.blocks) == len(tower.blocks) + 1  # VILA does not run the last one
    assert all(one is other for one, other in zip(own.blocks, tower.blocks, strict=False))
    assert own.patch_embedding is tower.patch_embedding
    assert own.position_embedding is tower.position_embedding
    assert own.head is not None
    assert answers(engine, folders) == answers(load_engine(str(folders.chat), config), folders)


def test_a_tower_that_differs_is_loaded_beside(folders: Folders) -> None:
    config = EngineConfig(device="cpu", threads=1, kv_tokens=2048)
    engine, (two_tower, _, _, not_shared_because) = load_with_tagger(str(folders.chat), str(folders.drifted), config)
    assert not_shared_because is not None
    assert "encoder.layers.1.self_attn.k_proj.weight differs" in not_shared_because
    tower = engine.runner.model.vision.encoder.tower
    assert not any(one is other for one, other in zip(two_tower.vision.tower.blocks, tower.blocks, strict=False))
    assert answers(engine, folders) == answers(load_engine(str(folders.chat), config), folders)


@torch.inference_mode()
def vectors_of(two_tower: TwoTowerModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return two_tower.embed_texts(torch.randint(0, 40, (3, 64), generator=generator))


@pytest.mark.parametrize(
    "few",
    [
        "the chat model's folder",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("both", "the tagger's folder")),
    ],
)
def test_fewer_bits_are_not_shared(folders: Folders, few: str, tmp_path: Path) -> None:
    """Each is what it is alone; of a folder of codes and one of floats, each keeps its bits."""
    config, chat, tagger = (
        EngineConfig(device="cpu", threads=1, kv_tokens=2048),
        str(folders.chat),
        str(folders.two_tower),
    )
    if few == "both":
        config = replace(config, quantization="8bit")
    elif few == "the chat model's folder":
        write_folder(open_checkpoint(folders.chat), tmp_path / "small", "8bit")
        chat = str(tmp_path / "small")
    else:
        write_folder(open_checkpoint(folders.two_tower), tmp_path / "small", "4bit")
        tagger = str(tmp_path / "small")
    engine, (two_tower, _, _, not_shared_because) = load_with_tagger(chat, tagger, config)
    assert not_shared_because == "layers of fewer bits are not shared"
    assert answers(engine, folders) == answers(load_engine(chat, config), folders)
    assert torch.equal(vectors_of(two_tower), vectors_of(load_tagger(tagger, config).model))
    if few != "both":
        other = "4bit" if chat.endswith("small") else "8bit"
        with pytest.raises(UserError, match=f"for {other} give the original model"):
            load_with_tagger(chat, tagger, replace(config, quantization=other))


@pytest.mark.parametrize("facts", [{"layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}])
def test_equal_weights_of_another_kind_of_tower_are_not_shared(
    folders: Folders, tmp_path: Path, facts: dict[str, Any]
) -> None:
    tower = folders.reference.tower
    before = {name: getattr(tower.config, name) for name in facts}
    try:
        tower.config.update(facts)
        write_two_tower_checkpoint(tmp_path, "siglip2", tower=tower)
    finally:
        tower.config.update(before)
    config = EngineConfig(device="cpu", kv_tokens=2048)
    engine, (two_tower, _, _, not_shared_because) = load_with_tagger(str(folders.chat), str(tmp_path), config)
    assert not_shared_because == "the towers' configurations differ"
    assert two_tower.vision.tower.patch_embedding is not engine.runner.model.vision.encoder.tower.patch_embedding


def test_embeddings_are_those_of_the_checkpoint_alone(beside: RunningServer, folders: Folders) -> None:
    assert np.abs(embedded(beside) - expected(folders.two_tower)).max() < 1e-5


@pytest.mark.slow
def test_embeddings_of_a_tower_that_differs_are_its_own(folders: Folders) -> None:
    with both(folders, folders.drifted) as server:
        vectors = embedded(server)
    assert np.abs(vectors - expected(folders.drifted)).max() < 1e-5
    assert np.abs(vectors[: len(PICTURES)] - expected(folders.two_tower)[: len(PICTURES)]).max() > 1e-4


def test_tags_and_chat_side_by_side(beside: RunningServer, folders: Folders) -> None:
    alone, vectors = ask_good(beside), embedded(beside)

    def busy() -> None:
        for _ in range(3):
            beside.served.embed.texts = TextCache(1 << 20)
            np.testing.assert_allclose(embedded(beside), vectors, atol=1e-6)
            body = {"images": [data_url(PICTURES[0])], "labels": ["a cat", "two green shapes"], "threshold": 0}
            assert len(beside.post_to("/v1/classify", **body).json()["data"][0]["tags"]) == 2

    assert_unharmed(beside, alone, busy)


def test_both_models_are_listed_and_named(beside: RunningServer) -> None:
    client = beside.openai()
    assert [one.id for one in client.models.list().data] == [MODEL, "two_tower"]
    assert client.models.retrieve("two_tower").id == "two_tower"
    for name in ("two_tower", MODEL):
        assert client.embeddings.create(model=name, input="a cat").model == "two_tower"
    with beside.http() as http:
        assert_error(http.get("/v1/models/other"), 404, "model_not_found")
        assert_error(http.post("/v1/chat/completions", json=chat("x", model="two_tower")), 404, "model_not_found")
        assert "siglane_engine_steps" in http.get("/metrics").text
        assert http.get("/ready").status_code == 200


def test_an_item_that_is_refused_harms_nobody(beside: RunningServer) -> None:
    vectors = embedded(beside)
    bad = beside.post_to("/v1/embeddings", input=[{"image": data_url(PICTURES[0])}, {"image": data_url(b"no picture")}])
    assert_error(bad, 400, "image_decode_failed", "input[1].image")
    np.testing.assert_allclose(embedded(beside), vectors, atol=1e-6)


def test_whoever_leaves_is_forgotten(folders: Folders) -> None:
    """Their pictures take no room in a later forward, and nothing of them stays."""
    engine = EngineProcess(EngineSpec(str(folders.chat), CPU, tagger=str(folders.two_tower)))
    engine.start()
    try:
        _, tokens = read_two_tower(open_checkpoint(folders.two_tower))
        (ids,) = tokens.ids(["a cat"]).numpy()
        with stopped(engine):
            futures = engine.embed([ids] * 200)
            left = [future for future in futures if future.cancel()]
        assert engine.embed([ids])[0].result(PATIENCE).vector.shape == (32,)
        assert len(left) == 200
        assert all(future.done() for future in futures)
        assert not engine._embeddings
    finally:
        engine.close()
    with pytest.raises(EngineError, match="down"):
        engine.embed([ids])[0].result(PATIENCE)


@pytest.mark.slow
def test_an_engine_that_dies_fails_what_it_embeds_and_comes_back(folders: Folders) -> None:
    with both(folders, folders.two_tower) as server:
        vectors = embedded(server)
        engine = server.served.engine
        os.kill(engine.pid, signal.SIGSTOP)  # what is sent now waits
        responses: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: responses.append(server.post_to("/v1/embeddings", input="a bird")))
        thread.start()
        eventually(lambda: engine._embeddings)
        os.kill(engine.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        assert_error(responses[0], 503, "engine_restarting")
        eventually(lambda: engine.state == "ready")
        np.testing.assert_allclose(embedded(server), vectors, atol=1e-6)


def test_taggers_that_cannot_be_used(folders: Folders, tmp_path: Path) -> None:
    options = {"port": 0, "log_level": "error"}
    with pytest.raises(UserError, match="no folder") as refused:
        preflight(ServerConfig(**options, tagger=str(tmp_path / "nothing")), str(folders.chat))
    assert refused.value.param == "tagger"
    with pytest.raises(UserError, match="has no text tower"):
        serve(ServerConfig(**options, tagger=str(folders.chat)), EngineSpec(str(folders.chat), CPU))
    with pytest.raises(UserError, match="is a SigLIP itself"):
        serve(ServerConfig(**options, tagger=str(folders.two_tower)), EngineSpec(str(folders.two_tower), CPU))


def test_without_a_tagger_the_error_says_how(server: RunningServer) -> None:
    response = server.post_to("/v1/classify", images=[data_url(PICTURES[0])], labels=["a"])
    assert_error(response, 404, "not_found")
    assert "--tagger" in response.json()["error"]["message"]


def test_a_picture_may_be_asked_about_and_tagged(beside: RunningServer) -> None:
    answer = beside.post(chat(image_part(PICTURES[0]), "What is this?"))
    assert answer.status_code == 200
    tags = beside.post_to("/v1/classify", images=[data_url(PICTURES[0])], labels=TEXTS, threshold=0)
    assert {tag["label"] for tag in tags.json()["data"][0]["tags"]} == set(TEXTS)
