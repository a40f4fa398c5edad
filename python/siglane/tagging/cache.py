"""Label matrices that are known: a few in memory, those used last on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from siglane.types import digest_of
from siglane.weights.hub import ADAPTER_CONFIG, Checkpoint

logger = logging.getLogger(__name__)

FORMAT = "siglane.labels.1"
IN_MEMORY = 4  # of 10,000 labels and width 1152 one has 46 MB
ON_DISK_BYTES = 1 << 30
FILE = re.compile(r"[0-9a-f]{64}\.safetensors")  # nothing else in the folder is ever removed
TEXT_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model",
    "*.safetensors", ADAPTER_CONFIG,
)  # fmt: skip


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siglane" / "labels"


def state_of(checkpoint: Checkpoint, *numerics: str) -> bytes:
    """What a label matrix depends on besides templates and labels: the files of text tower, adapter and tokenizer
    (path, size, time of change), and `numerics`, such as dtype and text rule. 32 bytes."""
    roots = [root for root in (checkpoint.root, checkpoint.adapter) if root is not None]
    files = sorted({file.resolve() for root in roots for pattern in TEXT_FILES for file in root.glob(pattern)})
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return digest_of(FORMAT.encode(), json.dumps([stats, numerics]).encode())


class LabelCache:
    """Matrices f32 `[labels, D]` of one model. A file that is damaged or another's is computed again, never used.

    max_bytes: of the files that all models keep in `folder`; beyond it those go whose last use is the longest ago.
    """

    def __init__(self, folder: Path, state: bytes, max_bytes: int = ON_DISK_BYTES) -> None:
        self.folder, self._state, self._max_bytes = folder, state, max_bytes
        self._recent: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, templates: Sequence[str], labels: Sequence[str], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The matrix of `labels` under `templates`, computed when it is not known."""
        key = digest_of(self._state, _framed(templates), _framed(labels)).hex()
        if key not in self._recent:
            path = self.folder / f"{key}.safetensors"
            matrix = _read(path, key, len(labels))
            if matrix is None:
                matrix = compute()
                _write(path, key, matrix)
                _prune(path, self._max_bytes)
            self._recent[key] = matrix
        self._recent.move_to_end(key)
        while len(self._recent) > IN_MEMORY:
            self._recent.popitem(last=False)
        return self._recent[key]


def _framed(texts: Iterable[str]) -> bytes:
    return json.dumps(list(texts)).encode()


def _header(key: str, matrix: torch.Tensor) -> dict[str, str]:
    content = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()
    return {"siglane": json.dumps({"format": FORMAT, "key": key, "sha256": content})}


def _read(path: Path, key: str, labels: int) -> torch.Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            header, matrix = file.metadata(), file.get_tensor("labels")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged and computed again: %s", path, error)
        return None
    if matrix.shape[:1] != (labels,) or matrix.dtype != torch.float32 or header != _header(key, matrix):
        logger.warning("%s is damaged and computed again: its content is not what its header says", path)
        return None
    with contextlib.suppress(OSError):  # a folder that is only read is not pruned either
        os.utime(path)  # its last use
    return matrix


def _write(path: Path, key: str, matrix: torch.Tensor) -> None:
    """Whole or not at all. Nothing is lost but time where it cannot be written."""
    data = save({"labels": matrix.contiguous()}, metadata=_header(key, matrix))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".labels-", delete=False) as file:
            try:
                file.write(data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("the label matrix is not kept: cannot write %s: %s", path, error.strerror)


def _prune(newest: Path, max_bytes: int) -> None:
    """Removes matrices around `newest`, which stays whatever its size; whoever has one of them open keeps it."""
    try:
        files = [file for file in newest.parent.iterdir() if FILE.fullmatch(file.name) and file.is_file()]
        stats = sorted(((file, file.stat()) for file in files), key=lambda pair: pair[1].st_mtime_ns)
        left = sum(stat.st_size for _, stat in stats)
        for file, stat in stats:
            if left > max_bytes and file != newest:
                file.unlink(missing_ok=True)
                left -= stat.st_size
    except OSError as error:
        logger.warning("label matrices are not pruned: %s", error)
