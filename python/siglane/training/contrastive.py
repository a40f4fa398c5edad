"""One step of contrastive training, of both towers or of the text tower alone (SigLiT, arXiv:2303.15343 section 4.1).

`training/run.py` feeds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglane.errors import UserError
from siglane.families.two_tower import LoadedTwoTower, TwoTowerModel
from siglane.nn.device import DTYPES
from siglane.settings.training import TrainConfig
from siglane.training.pairs import Batch, Pairs, batches_in, fingerprint, where_data_differ
from siglane.training.sigmoid import Group, chunked_sigmoid_loss


def steps_of(config: TrainConfig, pairs: int | None) -> int:
    """Steps of the whole run. pairs: how many there are, None for no end.

    UserError when they do not fill a batch, or neither pairs nor run have an end.
    """
    in_epoch = None if pairs is None else batches_in(pairs, config.batch_size)
    if config.steps is not None:
        return config.steps
    if in_epoch is None:
        raise UserError("pairs without an end need a number of steps", code="bad_option", param="steps")
    return max(1, in_epoch * config.epochs // config.accumulate)


class Trainer:
    """Model, optimiser and step count: everything a checkpoint holds."""

    def __init__(
        self, two_tower: LoadedTwoTower, config: TrainConfig, pairs: Pairs, group: Group | None = None
    ) -> None:
        """two_tower: in float32 on its device."""
        self.two_tower, self.config, self.pairs, self.group, self.step = two_tower, config, pairs, group, 0
        self.steps = steps_of(config, pairs.size)
        self.facts = config.facts() | {"steps": self.steps, "pairs": pairs.size, "data": fingerprint(pairs)}
        model = two_tower.model.train().requires_grad_(True)
        model.vision.requires_grad_(not config.lock_image)
        self.device = model.logit_scale.device
        self.products = precision_of(self.device, config.precision)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in self.trained if parameter.ndim > 1]
        vectors = [parameter for parameter in self.trained if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # the second moment forgets faster than by default, which the paper found to be steadier (its section 4.5)
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))

    @property
    def model(self) -> TwoTowerModel:
        return self.two_tower.model

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def train_on(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step: the mean loss of the batches, and what the step was made with."""
        config, model = self.config, self.model
        rate = config.rate(self.step, self.steps)
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            images, texts = self.embeddings(batch)
            part = chunked_sigmoid_loss(
                images, texts, model.logit_scale, model.logit_bias, chunk=config.chunk, group=self.group
            )
            (part / len(batches)).backward()
            loss += part.detach() / len(batches)
        self._add_over_ranks(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.step += 1
        scale, bias = model.logit_scale.detach().exp(), model.logit_bias.detach()
        facts = {"loss": loss, "gradient": norm, "scale": scale, "bias": bias}
        return {name: float(value) for name, value in facts.items()} | {"learning_rate": rate}

    def embeddings(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit embeddings of the batch's pictures and captions, `[n, D]` each."""
        if not batch.numbers:
            nothing = torch.zeros(0, self.model.config.text.projection_size, device=self.device)
            return nothing, nothing
        with mixed_precision(self.device, self.products):
            texts = self.model.embed_texts(self.two_tower.texts.ids(batch.captions))
            if isinstance(batch.images, torch.Tensor):
                return batch.images.to(self.device), texts
            with torch.set_grad_enabled(not self.config.lock_image):
                return self.model.embed_images(batch.images), texts

    def _add_over_ranks(self, loss: torch.Tensor) -> None:
        """Every rank's share of the loss and of its gradients -> the whole."""
        if self.group is None:
            return
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)
        dist.all_reduce(loss, group=self.group)

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "facts": self.facts,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)  # an interruption leaves the old checkpoint or the new one

    def load(self, path: Path) -> None:
        """UserError names the first setting in which this run is another than the one that wrote the checkpoint, or the
        pairs that are others."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, theirs in state["facts"].items():
            if self.facts[name] == theirs:
                continue
            message = f"{path} was made with {name} {theirs}, not {self.facts[name]}; resume with what it had"
            if name == "data":
                where = where_data_differ(self.pairs, theirs)
                message = f"{path} was made with other data: they differ in {where}; resume with what it had"
            raise UserError(message, code="bad_option", param=name)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


def precision_of(device: torch.device, choice: str) -> torch.dtype:
    """The dtype of products on `device`; auto: bfloat16 where its processor multiplies it."""
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = device.type == "cpu" and torch.backends.mkldnn.is_available()
        has = has and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has else torch.float32


@contextmanager
def mixed_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`; parameters stay float32. On CPU, attention as plain matrix products, whose backward
    is several times faster there."""
    with ExitStack() as stack:
        if device.type == "cpu":
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name it rules the CPU's too
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        yield
