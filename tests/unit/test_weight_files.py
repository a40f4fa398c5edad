"""Weight files that cannot be read or are not what their checksums say: one sentence, exit code 2."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kit import train
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint
from transformers import AutoModelForCausalLM
from two_tower_checkpoint import write_two_tower_checkpoint
from waiting import PATIENCE

from siglane import LLM, Tagger
from siglane.cli.main import main
from siglane.engine.cache.kv import PagedKV
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.processor import load_processor
from siglane.llm import VisionEncoder
from siglane.nn.device import free_memory, short_of_memory
from siglane.server.launch import serve
from siglane.settings.engine import EngineConfig
from siglane.settings.server import ServerConfig
from siglane.types import Prompt, Request, SamplingParams
from siglane.verify import verify
from siglane.weights.checksum import SUMS, stated, stated_by_hub
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint, open_checkpoint
from siglane.weights.load import allocate

NOBODY = 65534
OPTIONS: dict[str, Any] = {"device": "cpu", "kv_tokens": 64}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    write_causal_lm_checkpoint(folder)
    return folder


@pytest.fixture
def model(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def flip(file: Path) -> None:
    """One bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def complaint(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """What a command says on stderr before it ends with `code`: one line."""
    capsys.readouterr()
    assert main(words) == code
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("siglane: error")]
    return line


def ask(model: Path, *words: str) -> list[str]:
    return ["generate", str(model), "-p", "what?", "--max-tokens", "1", "--kv-tokens", "64", "--device", "cpu", *words]


# the file that states a digest, and its text
LISTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "beside the file": ("model.safetensors.sha256", lambda found: f"{found}  model.safetensors\n"),
    "beside the file, without a name": ("model.safetensors.sha256", lambda found: f"{found.upper()}\n"),
    "coreutils": (SUMS, lambda found: f"{'0' * 64}  other.safetensors\n{found} *./model.safetensors\n"),
    "with a comment": ("sha256sums.txt", lambda found: f"# of June\n\n{found}  model.safetensors\n"),
    "BSD": (SUMS, lambda found: f"SHA256 (model.safetensors) = {found}\n"),
}


class TestOneFlippedBit:
    @pytest.mark.parametrize("form", LISTS)
    def test_is_found_where_the_folder_states_the_digest(
        self, model: Path, form: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name, text = LISTS[form]
        file = model / "model.safetensors"
        before = digest(file)
        (model / name).write_text(text(before))
        assert main(ask(model)) == 0
        assert main(ask(model, "--verify-weights")) == 0
        flip(file)
        for words in ((), ("--verify-weights",)):
            line = complaint(capsys, ask(model, *words))
            assert str(file) in line
            assert f"expected SHA-256 {before} ({model / name}), found {digest(file)}" in line
        assert main(ask(model, "--no-verify-weights")) == 0

    def test_on_every_way_in(self, tmp_path: Path) -> None:
        write_two_tower_checkpoint(tmp_path / "both")
        write_nvila_checkpoint(tmp_path / "chat")
        for folder, file in (("both", "model.safetensors"), ("chat", "vision_tower/model.safetensors")):
            (tmp_path / folder / SUMS).write_text(f"{digest(tmp_path / folder / file)}  {file}\n")
            flip(tmp_path / folder / file)
        loads: list[Callable[[], object]] = [
            lambda: LLM(tmp_path / "chat", **OPTIONS),
            lambda: VisionEncoder(tmp_path / "chat", device="cpu"),
            lambda: VisionEncoder(tmp_path / "both", device="cpu"),
            lambda: Tagger(tmp_path / "both", device="cpu"),
            lambda: verify(tmp_path / "both", random=1),
        ]
        for load in loads:
            with pytest.raises(WeightError, match="is damaged: expected SHA-256"):
                load()

    def test_of_a_part_is_found_by_a_list_at_the_top(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        (tmp_path / SUMS).write_text(f"{digest(tmp_path / 'llm/model.safetensors')}  llm/model.safetensors\n")
        flip(tmp_path / "llm/model.safetensors")
        with pytest.raises(WeightError, match=r"llm/model\.safetensors is damaged"):
            LLM(tmp_path, **OPTIONS)

    def test_a_file_without_a_checksum(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = complaint(capsys, ask(model, "--verify-weights"))
        assert f"has no checksum to be compared with; `siglane doctor {model}` writes SHA256SUMS" in line

    @pytest.mark.parametrize(
        ("name", "text"), [(SUMS, "no digest\n"), (SUMS, "abc  model.safetensors\n"), ("model.safetensors.sha256", "")]
    )
    def test_a_list_that_is_none(self, model: Path, name: str, text: str) -> None:
        (model / name).write_text(text)
        with pytest.raises(WeightError, match=r"is not a line of SHA-256 and file name|states no SHA-256"):
            LLM(model, **OPTIONS)

    def test_in_the_hubs_cache(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A blob that came by LFS is called by its SHA-256. That is compared when it is asked for."""
        blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
        shutil.copytree(model, snapshot)
        blobs.mkdir()
        file = snapshot / "model.safetensors"
        blob = blobs / digest(file)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
        assert stated_by_hub(file) is not None
        assert stated(file, snapshot) is None
        assert main(ask(snapshot, "--verify-weights")) == 0
        flip(blob)
        assert main(ask(snapshot)) == 0
        assert f"expected SHA-256 {blob.name} (the hub)" in complaint(capsys, ask(snapshot, "--verify-weights"))
        assert "is damaged" in complaint(capsys, ["doctor", str(snapshot)])


class TestDoctor:
    def found(self, capsys: pytest.CaptureFixture[str], model: Path, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["doctor", str(model), "--json"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    def test_writes_checks_and_finds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_nvila_checkpoint(tmp_path)
        first = self.found(capsys, tmp_path)
        assert first["ok"]
        assert [one["name"] for one in first["checks"]][-1] == "tensors"
        assert all(one["status"] == "ok" for one in first["checks"])
        listed = (tmp_path / SUMS).read_text()
        assert len(listed.splitlines()) == 3
        subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
        assert "as " in self.found(capsys, tmp_path)["checks"][0]["detail"]
        assert (tmp_path / SUMS).read_text() == listed
        flip(tmp_path / "llm/model.safetensors")
        second = self.found(capsys, tmp_path, 2)
        broken = [one for one in second["checks"] if one["status"] == "broken"]
        assert [one["name"] for one in broken] == ["llm/model.safetensors"]
        assert "expected SHA-256" in broken[0]["detail"]
        assert (tmp_path / SUMS).read_text() == listed

    def test_adds_what_a_list_lacks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_nvila_checkpoint(tmp_path)
        line = f"{digest(tmp_path / 'llm/model.safetensors')}  llm/model.safetensors"
        (tmp_path / SUMS).write_text(line)
        self.found(capsys, tmp_path)
        assert (tmp_path / SUMS).read_text().splitlines()[0] == line
        assert len((tmp_path / SUMS).read_text().splitlines()) == 3

    def test_of_both_towers_and_of_a_tower(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_two_tower_checkpoint(tmp_path)
        assert self.found(capsys, tmp_path)["ok"]

    def test_tensors_that_are_another_models(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        raw = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(raw | {"intermediate_size": 71}))
        found = self.found(capsys, model, 2)
        assert "has shape [48, 72], the model needs [48, 71]" in found["checks"][-1]["detail"]

    def test_of_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is no folder" in complaint(capsys, ["doctor", str(tmp_path / "nowhere")])
        assert "exclude each other" in complaint(capsys, ["doctor", str(tmp_path), "--host", "sglang"])


@contextmanager
def nobody() -> Iterator[None]:
    """As a user whom permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class TestUnreadable:
    @pytest.fixture
    def open_folder(self, model: Path) -> Iterator[Path]:
        """Reachable by everybody: pytest closes its own folders, again whenever another one starts."""
        with tempfile.TemporaryDirectory() as top:
            Path(top).chmod(0o755)
            folder = shutil.copytree(model, Path(top) / "model")
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(0o644)
            yield folder

    @pytest.mark.parametrize(
        "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"]
    )
    def test_a_file_without_permission(self, open_folder: Path, file: str) -> None:
        path = open_folder / file
        if file == "adapter_config.json":
            path.write_text("{}")
            (open_folder / "adapter_model.safetensors").write_bytes(b"")
        path.chmod(0)
        with nobody(), pytest.raises(UserError) as caught:
            LLM(open_folder, **OPTIONS)
        assert file in str(caught.value)
        assert "ermission denied" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_folder_without_permission(self, open_folder: Path) -> None:
        open_folder.chmod(0o600)
        try:
            with nobody(), pytest.raises(UserError, match=r"[Pp]ermission"):
                load_processor(open_checkpoint(open_folder))
        finally:
            open_folder.chmod(0o755)

    def test_its_line_on_the_command_line(self, open_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (open_folder / "model.safetensors").chmod(0)
        with nobody():
            line = complaint(capsys, ask(open_folder))
        assert "model.safetensors cannot be read: Permission denied" in line

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda file: file.mkdir(), r"model\.safetensors is a folder, not a safetensors file"),
            (lambda file: file.symlink_to("nowhere"), r"model\.safetensors is a link to nowhere, which is not there"),
            (lambda file: file.write_bytes(b""), r"it is empty; download it again"),
            (lambda file: file.symlink_to(file.name), r"model\.safetensors"),
        ],
    )
    def test_something_else_in_its_place(
        self, model: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (model / "model.safetensors").unlink()
        damage(model / "model.safetensors")
        with pytest.raises(UserError, match=message):
            LLM(model, **OPTIONS)
        complaint(capsys, ask(model))

    def test_a_tokenizer_that_is_not_there(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """transformers makes one of two tokens of nothing."""
        (model / "tokenizer.json").unlink()
        assert "the tokenizer cannot be loaded: there is no tokenizer.json" in complaint(capsys, ask(model))

    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
    def test_a_folder_in_a_files_place(self, model: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
        (model / file).unlink()
        (model / file).mkdir()
        assert file in complaint(capsys, ask(model))

    def test_a_shard_that_is_a_dangling_link(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, sharded=True)
        shard = tmp_path / "llm/model-00002-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to("gone")
        with pytest.raises(WeightError, match=r"model-00002-of-00002\.safetensors, which is not in the folder"):
            LLM(tmp_path, **OPTIONS)


class TestMemory:
    def test_a_cache_that_does_not_fit(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ask(model)
        words[words.index("64")] = str(10**12)
        assert "a KV cache of 1000000000000 tokens takes 576000.0 GB, more than cpu gives; lower kv_tokens" in (
            complaint(capsys, words)
        )

    def test_a_refusal_of_the_allocator_reads_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nobody tells how much is free, torch's own message comes."""
        monkeypatch.setattr("siglane.nn.device.MEMINFO", Path("/nowhere"))
        config = load_processor(open_model("demo")).config.language
        with pytest.raises(UserError, match=r"^a KV cache of 160+ tokens takes [0-9.]+ GB, more than cpu gives"):
            PagedKV(config, 2, pages=10**13, page_size=16, dtype=torch.float32, device=torch.device("cpu"))

    def test_weights_that_do_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.device("meta"):
            module = torch.nn.Linear(1 << 12, 1 << 12)
        monkeypatch.setattr("siglane.nn.device.free_memory", lambda device: 1 << 20)
        with pytest.raises(
            ConfigError, match=r"the weights take 0\.1 GB as torch\.float32, more than cpu gives; use a"
        ):
            allocate(module, torch.device("cpu"), torch.float32)

    def test_what_fits_is_left_alone(self) -> None:
        device, shortage = torch.device("cpu"), UserError("too much", code="too_much")
        free = free_memory(device)
        assert free is None or free > 1 << 20
        with short_of_memory(16, device, shortage):
            pass
        with pytest.raises(KeyError), short_of_memory(16, device, shortage):
            raise KeyError("another error")


def test_a_checkpoint_opened_before_is_taken_as_it_is(model: Path) -> None:
    (model / SUMS).write_text(f"{'0' * 64}  model.safetensors\n")
    LLM(Checkpoint(model, verify=False), **OPTIONS)
    with pytest.raises(WeightError, match="is damaged"):
        LLM(Checkpoint(model), **OPTIONS)


@pytest.mark.slow  # an engine is started for each
@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        ({"verify_weights": True}, flip, "is damaged: expected SHA-256"),
        ({}, lambda file: file.write_bytes(b""), "it is empty"),
        ({"kv_tokens": 10**12}, lambda file: None, "a KV cache of 1000000000000 tokens takes"),
    ],
)
def test_a_server_ends_with_the_reason(
    model: Path, options: dict[str, Any], damage: Callable[[Path], object], message: str
) -> None:
    file = model / "model.safetensors"
    if "verify_weights" in options:
        (model / SUMS).write_text(f"{digest(file)}  {file.name}\n")
    damage(file)
    config = EngineConfig(device="cpu", threads=1, kv_tokens=options.get("kv_tokens", 64))
    spec = EngineSpec(str(model), config, verify_weights=options.get("verify_weights"))
    with pytest.raises(UserError, match=message) as caught:
        serve(ServerConfig(port=0), spec)
    assert caught.value.exit_code == 2


@pytest.mark.slow  # an engine is started
def test_a_server_merges_an_adapter(model: Path, tmp_path: Path) -> None:
    train(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    spec = EngineSpec(
        str(model), EngineConfig(device="cpu", threads=1, kv_tokens=256), adapter=str(tmp_path / "adapter")
    )
    llm = LLM(model, adapter=tmp_path / "adapter", **OPTIONS)
    expected = llm.generate("what?", SamplingParams(max_tokens=6))[0]
    engine, said = EngineProcess(spec), queue.Queue[Any]()
    engine.start()
    try:
        engine.submit([Request("one", Prompt(expected.prompt_token_ids), SamplingParams(), 6)], said.put)
        deltas = [said.get(timeout=PATIENCE)]
        while deltas[-1].finished is None:
            deltas.append(said.get(timeout=PATIENCE))
    finally:
        engine.close()
    assert [delta.token_id for delta in deltas if delta.token_id is not None] == list(expected.output_token_ids)
