"""Linear layers cut over tensor-parallel ranks, and how the checkpoint's whole tensors become their shards.

Column parallel cuts the output, row parallel the input; a column layer followed by a row layer needs one all-reduce.
"""

from __future__ import annotations

import torch
from torch import nn

from siglane.nn.act import SwiGLU
from siglane.nn.cpu.product import linear
from siglane.nn.parallel import TensorParallel
from siglane.types import Activation


class ShardedModule(nn.Module):
    """A module whose parameters are filled from named parts of whole checkpoint tensors.

    `parts(name)` lists the parts parameter `name` is made of ("" when it is one tensor) and `load_part` copies this
    rank's share of one part. ValueError when the shape is not the whole tensor's. `stored_parts` is the reverse, for a
    module that is whole on this rank. tp: the ranks over which the parameters are cut.
    """

    tp = TensorParallel.single()

    def parts(self, name: str) -> tuple[str, ...]:
        return ("",)

    def part_size(self, part: str) -> int:
        """Rows of one part in the checkpoint, for files that keep several parts in one tensor."""
        raise NotImplementedError

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def stored_parts(self, name: str) -> dict[str, torch.Tensor]:
        """Part -> what a checkpoint stores of parameter `name`, in its shape."""
        parts, value = self.parts(name), self.get_parameter(name).detach()
        if parts == ("",):
            return {"": value}
        return dict(zip(parts, value.split([self.part_size(part) for part in parts]), strict=True))


def check_shape(tensor: torch.Tensor, *sizes: int) -> None:
    """ValueError unless `tensor` has this shape: the whole parameter's, as checkpoints store it."""
    if tensor.shape != sizes:
        raise ValueError(f"has shape {list(tensor.shape)}, the model needs {list(sizes)}")


def copy_checked(target: torch.Tensor, source: torch.Tensor) -> None:
    """ValueError when the shapes differ."""
    check_shape(source, *target.shape)
    with torch.no_grad():
        target.copy_(source)


class ColumnParallelLinear(ShardedModule):
    """`y = x W^T + b`, the rows of W (outputs) cut over ranks. `sections` names outputs stored as separate tensors.

    x: `[..., input_size]` -> `[..., output_size / tp.size]`, or the whole output on every rank with gather_output.
    """

    def __init__(
        self, input_size: int, sections: dict[str, int], *, bias: bool, tp: TensorParallel, gather_output: bool = False
    ) -> None:
        super().__init__()
        self.tp = tp.divides(*sections.values())
        self.input_size, self.sections, self.gather_output = input_size, sections, gather_output
        local = sum(sections.values()) // self.tp.size
        self.weight = nn.Parameter(torch.empty(local, input_size))
        self.bias = nn.Parameter(torch.empty(local)) if bias else None

    def forward(self, x: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        """activation: of the outputs, applied by the product itself where the kernel can."""
        y = linear(x, self.weight, self.bias, activation)
        return self.tp.all_gather(y) if self.gather_output else y

    def gated(self, x: torch.Tensor, swiglu: SwiGLU) -> torch.Tensor:
        """Of two sections of equal size, the gate first."""
        return swiglu(self(x))

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(self.sections)

    def part_size(self, part: str) -> int:
        return self.sections[part]

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.sections[part], *([self.input_size] if name == "weight" else []))
        names = list(self.sections)
        start = sum(self.sections[before] for before in names[: names.index(part)]) // self.tp.size
        shard = self.tp.shard(tensor, 0)
        with torch.no_grad():
            self.get_parameter(name).narrow(0, start, shard.shape[0]).copy_(shard)


class RowParallelLinear(ShardedModule):
    """`y = x W^T + b`, the columns of W (inputs) cut over ranks, partial sums added by an all-reduce.

    x: `[..., input_size / tp.size]` -> `[..., output_size]`. The bias is added once, after the sum.
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp.divides(input_size)
        self.input_size, self.output_size = input_size, output_size
        self.weight = nn.Parameter(torch.empty(output_size, input_size // self.tp.size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias)
        y = self.tp.all_reduce(linear(x, self.weight))
        return y if self.bias is None else y + self.bias

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        return residual + self(x)

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        if name == "bias":
            copy_checked(self.get_parameter("bias"), tensor)
            return
        check_shape(tensor, self.output_size, self.input_size)
        copy_checked(self.weight, self.tp.shard(tensor, 1))


class QKVParallelLinear(ShardedModule):
    """Query, key and value projections in one matrix, cut by heads.

    With fewer key/value heads than ranks, each is kept on `tp.size / kv_heads` ranks. `heads` and `kv_heads` are this
    rank's counts. x: `[T, hidden]` -> q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]`. The caller passes a
    `tp` its heads divide by (`attention_parallel`).
    """

    def __init__(
        self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp, self.input_size, self.head_dim = tp, hidden_size, head_dim
        self.heads, self.kv_heads = heads // tp.size, max(1, kv_heads // tp.size)
        self.whole = {"q": heads, "k": kv_heads, "v": kv_heads}
        self.copies = max(1, tp.size // kv_heads)
        local = (self.heads + 2 * self.kv_heads) * head_dim
        self.weight = nn.Parameter(torch.empty(local, hidden_size))
        self.bias = nn.Parameter(torch.empty(local)) if bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.together(x).split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return q, k, v

    def together(self, x: torch.Tensor) -> torch.Tensor:
        """The heads of q, of k and of v in one: `[T, heads + 2 * kv_heads, head_dim]`."""
        return linear(x, self.weight, self.bias).unflatten(-1, (-1, self.head_dim))

    def parts(self, name: str) -> tuple[str, ...]:
        return ("q", "k", "v")

    def part_size(self, part: str) -> int:
        return self.whole[part] * self.head_dim

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.part_size(part), *([self.input_size] if name == "weight" else []))
        count = self.heads if part == "q" else self.kv_heads
        first = self.tp.rank * self.heads if part == "q" else self.tp.rank // self.copies * self.kv_heads
        start = {"q": 0, "k": self.heads, "v": self.heads + self.kv_heads}[part]
        with torch.no_grad():
            shard = tensor.narrow(0, first * self.head_dim, count * self.head_dim)
            self.get_parameter(name).narrow(0, start * self.head_dim, count * self.head_dim).copy_(shard)


def attention_parallel(tp: TensorParallel, heads: int, kv_heads: int) -> TensorParallel:
    """The group over which attention with these heads can be cut; a group of one where it cannot (16 heads on 3)."""
    kv_fits = kv_heads % tp.size == 0 or tp.size % kv_heads == 0
    return tp if heads % tp.size == 0 and kv_fits else TensorParallel.single()
