"""A view: a small folder through which a host, SGLang or vLLM, loads any checkpoint that siglane knows.

A host reads config.json, the tokenizer and the weights from one folder, by the names transformers gives them. VILA
keeps them in three folders, nanoVLM's config.json names no architecture and has no tokenizer beside it, Ovis2.5's needs
remote code. A view has one configuration for all (`config.py`), siglane's tokenizer with a chat template that needs no
help, and links to the checkpoint's own weights: nothing is copied or converted.

A view belongs to one state of a checkpoint's files and one version of siglane. Making one removes the others of its
checkpoint, but for those in use: whoever takes a view holds a shared lock on its file IN_USE until its process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import siglane.families.registry as registry
from siglane import __version__
from siglane.config.vlm import VlmConfig
from siglane.errors import UserError
from siglane.families.model import check_model, model_tensors, stored_dtype
from siglane.families.processor import Processor, load_processor
from siglane.hosts.config import ARCHITECTURE, SiglaneConfig, text_config
from siglane.weights.hub import FILE_PATTERNS, REPOSITORY_ID, Checkpoint, open_checkpoint
from siglane.weights.quantised import refuse_codes

DESCRIPTIONS = ("*.json", "*/*.json", "*.jinja")
IN_USE = ".in_use"
# of the tokenizer's own file: what turns texts into ids and back, nothing that a host acts upon
TOKENIZER_KEYS = (
    "tokenizer_class", "added_tokens_decoder", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
    "cls_token", "mask_token", "model_max_length", "add_prefix_space", "add_bos_token", "add_eos_token",
    "clean_up_tokenization_spaces", "errors", "split_special_tokens",
)  # fmt: skip


class NoPlace(OSError):
    """The folder for views cannot be written."""


@dataclass(frozen=True, slots=True)
class Host:
    """An engine of others. name: its own, which is in the names of siglane's variables and folders too; built_in:
    architectures that it has classes of its own for; override: families to take over nevertheless; views: the folder
    for its views, None for the one below the home directory."""

    name: str
    built_in: Collection[str]
    override: tuple[str, ...]
    views: str | None

    def variable(self, kind: str) -> str:
        return f"SIGLANE_{self.name.upper()}_{kind}"

    def folder(self) -> Path:
        """UserError where there is no home directory."""
        try:
            return Path(self.views or f"~/.cache/siglane/{self.name.lower()}").expanduser().absolute()
        except RuntimeError as error:
            raise self.no_place(str(error)) from error

    def no_place(self, reason: object) -> UserError:
        variable = self.variable("VIEWS")
        message = f"no place for the view of the model: {reason}; set {variable} to a folder that can be written"
        return UserError(message, code="bad_environment", param=variable)


def view_of(model: str, revision: str | None, host: Host) -> Path | None:
    """The view of `model`, a folder or hub id, in use from now on; None when it is the host's own business.

    That is every model of no known family, a view, and one of a built-in architecture whose family is not to be taken
    over. UserError for a broken checkpoint of a known family: nothing falls back in silence.
    """
    found = _described(model, revision)
    if found is None or not (found.has("config.json") and registry.is_vlm(found)):
        return None
    known = [family.name for family in registry.VLM_FAMILIES]
    if unknown := [name for name in host.override if name not in known]:
        variable = host.variable("OVERRIDE")
        raise UserError(
            f"{variable} names {unknown[0]!r}, which is no family of siglane's: {', '.join(known)}",
            code="bad_environment",
            param=variable,
        )
    refuse_codes(found)
    built_in = {*(found.json("config.json").get("architectures") or [])} & {*host.built_in}
    if built_in and registry.vlm_family(found).name not in host.override:
        return None
    checkpoint, views = open_checkpoint(model, revision), host.folder()
    try:
        while not _taken(view := write_view(checkpoint, views)):
            pass  # another process has just removed it
    except NoPlace as error:
        raise host.no_place(error) from error
    return view


def is_view(model: str) -> bool:
    """Whether it is the folder of one."""
    config = Path(model) / "config.json"
    return (
        config.is_file() and Checkpoint(Path(model)).json("config.json").get("model_type") == SiglaneConfig.model_type
    )


def write_view(checkpoint: Checkpoint, views: Path) -> Path:
    """The view of a checkpoint below folder `views`, made once for each state of its files.

    ConfigError or WeightError when the checkpoint cannot be served, NoPlace when `views` cannot be written.
    """
    files = sorted({tensor.file.resolve() for tensor in model_tensors(checkpoint)})
    folder = views / f"{checkpoint.root.resolve().name}-{_state(checkpoint, files)}"
    if folder.is_dir():
        return folder
    processor = load_processor(checkpoint)
    config = check_model(checkpoint, processor.config).config
    try:
        views.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=views, ignore_cleanup_errors=True) as fresh:
            os.chmod(fresh, 0o755)
            _fill(Path(fresh), checkpoint, processor, config, files)
            os.rename(fresh, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise NoPlace(f"{views} cannot be written: {error}") from error
    _prune(views, folder, checkpoint)
    return folder


def _taken(view: Path) -> bool:
    """Takes a view into use until this process ends; whether it is still there."""
    try:
        lock = os.open(view / IN_USE, os.O_RDWR | os.O_CREAT)  # never closed: that would give the lock back
    except FileNotFoundError:
        return False
    except OSError:
        return view.is_dir()  # in a folder of somebody else's, who does not ask us before removing it
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed
        fcntl.flock(lock, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), os.stat(view / IN_USE))
    return False


def _prune(views: Path, current: Path, checkpoint: Checkpoint) -> None:
    """Removes the views of a checkpoint's other states that nobody uses. One without IN_USE is not known to be free."""
    root = checkpoint.root.resolve()
    name = re.compile(re.escape(root.name) + "-[0-9a-f]{16}")
    for view in views.iterdir():
        if view == current or not name.fullmatch(view.name):
            continue
        with contextlib.suppress(OSError, ValueError):  # in use, not ours to remove, or no view
            if json.loads((view / "config.json").read_text(encoding="utf-8"))["checkpoint"] != str(root):
                continue
            with open(view / IN_USE, "r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with tempfile.TemporaryDirectory(prefix=".stale-", dir=views, ignore_cleanup_errors=True) as bin:
                    os.rename(view, Path(bin) / view.name)  # at once: nobody sees a half of it


def _described(model: str, revision: str | None) -> Checkpoint | None:
    """The model's descriptions, without weights; None for anything but a folder or a repository that can be had."""
    if not Path(model).is_dir() and not REPOSITORY_ID.fullmatch(model):
        return None
    try:
        return open_checkpoint(model, revision, patterns=DESCRIPTIONS)
    except UserError:
        return None  # the host says what it makes of the name


def _state(checkpoint: Checkpoint, files: list[Path]) -> str:
    """Changes with any file that a view is made of; an adapter and nanoVLM's tokenizer may lie elsewhere."""
    roots = [checkpoint.root, registry.vlm_family(checkpoint).tokenizer_folder(checkpoint).root]
    roots += [] if checkpoint.adapter is None else [checkpoint.adapter]
    patterns = [place + pattern for place in ("", "*/") for pattern in FILE_PATTERNS]
    described = {file for root in roots for pattern in patterns for file in root.glob(pattern) if file.is_file()}
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted({*described, *files})]
    return hashlib.sha256(repr((__version__, facts)).encode()).hexdigest()[:16]


def _fill(folder: Path, checkpoint: Checkpoint, processor: Processor, config: VlmConfig, files: list[Path]) -> None:
    vision = processor.facts.vision
    ends = list(config.eos_token_ids)
    dtype = str(stored_dtype(checkpoint)).removeprefix("torch.")
    root: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": SiglaneConfig.model_type,
        "family": config.family,
        "checkpoint": str(checkpoint.root.resolve()),
        "adapter": "" if checkpoint.adapter is None else str(checkpoint.adapter.resolve()),
        "dtype": dtype,
        "image_token_id": placeholder_id(config),
        "eos_token_id": ends,
        "tie_word_embeddings": config.language.tie_embeddings,
        "text_config": text_config(config.language, dtype) | {"eos_token_id": ends},
        "vision_config": {"hidden_size": vision.hidden_size, "num_hidden_layers": vision.depth},
    }
    _write(folder / "config.json", root)
    _write(folder / "generation_config.json", {"eos_token_id": ends, "do_sample": False})
    processor.tokenizer.chat_template = processor.chat_template()
    processor.tokenizer.save_pretrained(str(folder))
    _keep_only(folder / "tokenizer_config.json", TOKENIZER_KEYS)
    _keep_embedded(folder, config.language.vocab_size)
    (folder / IN_USE).touch()
    for number, file in enumerate(files):
        os.symlink(file, folder / f"part-{number:05d}.safetensors")


def _keep_only(path: Path, keys: Collection[str]) -> None:
    """What a tokenizer was loaded with is saved with it: names of a processor, of code, of templates, of anything."""
    stated = json.loads(path.read_text(encoding="utf-8"))
    _write(path, {key: value for key, value in stated.items() if key in keys})


def _keep_embedded(folder: Path, rows: int) -> None:
    """Of the added tokens only those that the model has an embedding for. Any other one (NVILA's `<image>`) is text to
    a host, whose engine would end with a client that spells it; siglane finds placeholders in texts.

    rows: of the table.
    """
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kept = [token for token in stored["added_tokens"] if token["id"] < rows]
    if len(kept) == len(stored["added_tokens"]):
        return
    beyond = {token["content"] for token in stored["added_tokens"]} - {token["content"] for token in kept}
    _write(folder / "tokenizer.json", stored | {"added_tokens": kept})
    stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = {key: one for key, one in stated.get("added_tokens_decoder", {}).items() if int(key) < rows}
    names = {key: value for key, value in stated.items() if not (key.endswith("_token") and _content(value) in beyond)}
    _write(folder / "tokenizer_config.json", names | ({"added_tokens_decoder": decoder} if decoder else {}))


def _content(token: object) -> object:
    """Of a token as tokenizer_config.json names it: a text, or an object."""
    return token.get("content") if isinstance(token, dict) else token


def placeholder_id(config: VlmConfig) -> int:
    """What stands at the places of images in ids that a host sees: within the vocabulary, which SGLang insists on."""
    return config.image_token_id if 0 <= config.image_token_id < config.language.vocab_size else 0


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
