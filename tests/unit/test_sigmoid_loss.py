"""The sigmoid loss: the formula, in chunks and over ranks, gradients included."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peak import PEAK
from ranks import start_ranks

from siglane.engine.process.children import child_context
from siglane.settings.training import INITIAL_BIAS
from siglane.training.sigmoid import INITIAL_LOG_SCALE, chunked_sigmoid_loss, sigmoid_loss

WIDTH = 16
CLOSE = {"atol": 1e-6, "rtol": 0.0}


def unit(pairs: int, seed: int) -> torch.Tensor:
    x = torch.randn(pairs, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def inputs(pairs: int) -> tuple[torch.Tensor, ...]:
    """images, texts, t' and b of a model that has begun to learn: neither all yes nor all no."""
    images = unit(pairs, 1)
    texts = torch.nn.functional.normalize(images + 0.5 * unit(pairs, 2), dim=-1)
    scalars = (torch.tensor([1.7], dtype=torch.float64), torch.tensor([-2.3], dtype=torch.float64))
    return tuple(x.requires_grad_() for x in (images, texts, *scalars))


def loss_and_gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_the_formula_pair_by_pair() -> None:
    images, texts, log_scale, bias = inputs(5)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            z = 1.0 if i == j else -1.0
            logit = float((log_scale.exp() * (images[i] @ texts[j]) + bias).detach())
            expected += torch.log1p(torch.exp(torch.tensor(-z * logit, dtype=torch.float64))).item() / 5
    assert sigmoid_loss(images, texts, log_scale, bias).item() == pytest.approx(expected, abs=1e-12)


def test_the_papers_beginning() -> None:
    """With t' = log 10 and b = -10 a fresh model says no to everything, so that the loss is not all negatives."""
    images, texts = unit(64, 3), unit(64, 4)
    log_scale, bias = torch.tensor([INITIAL_LOG_SCALE]).double(), torch.tensor([INITIAL_BIAS]).double()
    assert log_scale.exp().item() == pytest.approx(10)
    assert 5 < sigmoid_loss(images, texts, log_scale, bias).item() < 15


@pytest.mark.parametrize("pairs", [1, 2, 7, 12])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 100])
def test_chunks_give_the_plain_loss_and_gradients(pairs: int, chunk: int) -> None:
    leaves = inputs(pairs)
    plain = loss_and_gradients(sigmoid_loss(*leaves), leaves)
    chunked = loss_and_gradients(chunked_sigmoid_loss(*leaves, chunk=chunk), leaves)
    for ours, theirs in zip(chunked, plain, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_slope_is_that_of_the_loss() -> None:
    leaves = tuple(x.detach().requires_grad_() for x in inputs(4))
    assert torch.autograd.gradcheck(lambda *x: chunked_sigmoid_loss(*x, chunk=3), leaves)


def test_only_what_wants_a_gradient_gets_one() -> None:
    images, texts, log_scale, bias = inputs(6)
    chunked_sigmoid_loss(images.detach(), texts, log_scale, bias, chunk=4).backward()
    assert images.grad is None
    assert texts.grad is not None


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    leaves = inputs(9)
    halves = tuple(x.detach().bfloat16().requires_grad_() for x in leaves[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_sigmoid_loss(*halves, *(x.detach().float() for x in leaves[2:]), chunk=4)
    exact = sigmoid_loss(*(x.detach().double() for x in halves), *leaves[2:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.autograd.grad(loss, halves)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("images", "texts", "chunk"), [(3, 4, 2), (0, 0, 2), (3, 3, 0)])
def test_what_does_not_pair_up_is_refused(images: int, texts: int, chunk: int) -> None:
    scalars = torch.zeros(1), torch.zeros(1)
    with pytest.raises(ValueError, match=r"pair|chunk"):
        chunked_sigmoid_loss(torch.zeros(images, 4), torch.zeros(texts, 4), *scalars, chunk=chunk)


# pairs of each rank: one rank, even, uneven, one without any, one pair in all
SHARES = {1: [(7,)], 2: [(4, 4), (5, 2), (0, 3), (1, 0)], 4: [(2, 2, 2, 2), (3, 1, 0, 4), (0, 0, 1, 0)]}


def share_of(pairs: torch.Tensor, shares: tuple[int, ...], rank: int) -> torch.Tensor:
    return pairs.split(list(shares))[rank].detach().requires_grad_()


def ask_rank(rank: int, ranks: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for number, shares in enumerate(SHARES[ranks]):
        for chunk in (2, 100):
            images, texts, log_scale, bias = inputs(sum(shares))
            leaves = (share_of(images, shares, rank), share_of(texts, shares, rank), log_scale, bias)
            loss = chunked_sigmoid_loss(*leaves, chunk=chunk, group=dist.group.WORLD)
            # ranks may weight their shares differently: gradients are of the weighted sum
            found = loss_and_gradients(loss * (1 + rank), leaves)
            answers.put((number, chunk, rank, [x.numpy() for x in (loss.detach(), *found[1:])]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_plain_loss_and_gradients(ranks: int, tmp_path) -> None:
    answers = child_context().Queue()
    store = f"file://{tmp_path / 'store'}"
    running = start_ranks(ask_rank, (ranks, store, answers), ranks, join=False)
    wanted = ranks * 2 * len(SHARES[ranks])
    found = [answers.get(timeout=120) for _ in range(wanted)]
    while not running.join():
        pass
    for number, shares in enumerate(SHARES[ranks]):
        leaves = inputs(sum(shares))
        images, texts, log_scale, bias = leaves
        owner = torch.tensor([rank for rank, count in enumerate(shares) for _ in range(count)])
        logits = images @ texts.T * log_scale.exp() + bias
        labels = 2 * torch.eye(sum(shares), dtype=torch.float64) - 1
        each = -torch.nn.functional.logsigmoid(labels * logits).sum(1) / sum(shares)
        weighted = torch.autograd.grad((each * (1 + owner)).sum(), leaves)
        for chunk in (2, 100):
            parts = sorted(part[2:] for part in found if part[:2] == (number, chunk))
            values = [[torch.from_numpy(x) for x in tensors] for _, tensors in parts]
            losses, to_images, to_texts, to_scale, to_bias = zip(*values, strict=True)
            torch.testing.assert_close(sum(losses), sigmoid_loss(*leaves).detach(), **CLOSE)
            torch.testing.assert_close(torch.cat(to_images), weighted[0], **CLOSE)
            torch.testing.assert_close(torch.cat(to_texts), weighted[1], **CLOSE)
            torch.testing.assert_close(sum(to_scale), weighted[2], **CLOSE)
            torch.testing.assert_close(sum(to_bias), weighted[3], **CLOSE)


PROGRAM = """
import torch
from siglane.training.sigmoid import chunked_sigmoid_loss
torch.set_num_threads(2)
x, y = (torch.nn.functional.normalize(torch.randn(32768, 64), dim=-1).requires_grad_() for _ in range(2))
t, b = (torch.tensor([value], requires_grad=True) for value in (2.3, -10.0))
chunked_sigmoid_loss(x, y, t, b).backward()
assert x.grad.abs().sum() > 0
print(peak())
"""


@pytest.mark.slow
def test_32768_pairs_fit_in_two_gibibytes() -> None:
    """The whole matrix alone would take four."""
    done = subprocess.run([sys.executable, "-c", PEAK + PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 << 30
