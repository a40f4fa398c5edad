"""The one entrance to what is only there for GPUs, but for attention: a decoder's small operations, a kernel each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from siglane.nn.act import SwiGLU
from siglane.nn.cuda.invariant import make_invariant, try_fixed_product
from siglane.nn.cuda.ops import OPS
from siglane.nn.experts import Mixing, Routing
from siglane.nn.norm import InputRMSNorm, RMSNorm
from siglane.nn.rope import NormedRotation, Rotation, rotary_tables
from siglane.nn.trial import first_right

ROWS, HEADS = 3, 5  # of a trial
MIXED_ROWS, FEW_TRIED, MIXED_SIZE, MIXED_WIDTH = 150, 24, 96, 80
FEW_ROWS = 64  # of a sparse MLP whose experts find their tokens by themselves; more are sorted


class KernelRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.rms_norm(x, self.weight, self.eps, True)


class KernelInputRMSNorm(InputRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.rms_norm(x, self.weight, self.eps, x.dtype == torch.float32)


class KernelRotation(Rotation):
    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return OPS.rotate(x, cos, sin)


class KernelNormedRotation(NormedRotation):
    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm
    ) -> torch.Tensor:
        if isinstance(q_norm, InputRMSNorm):  # no model has it
            return super().forward(x, cos, sin, q_norm, k_norm)
        return OPS.rotate_normed(x, cos, sin, q_norm.weight, k_norm.weight, self.heads, q_norm.eps)


class KernelSwiGLU(SwiGLU):
    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return OPS.swiglu(gate_up)


class KernelRouting(Routing):
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = OPS.route(logits, self.per_token, self.normalised)
        return weights, chosen


class KernelMixing(Mixing):
    """Without a look at what was chosen, so that nothing waits and a step can be captured."""

    def forward(
        self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        products = OPS.expert_products if len(x) <= FEW_ROWS else OPS.sorted_products
        hidden = OPS.swiglu(products(x, gate_up, chosen, self.count, None))
        rows = products(hidden, down, chosen, self.count, weights)
        total: torch.Tensor = rows.view(*chosen.shape, -1).sum(1)
        return total


KERNELS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        RMSNorm: KernelRMSNorm,
        InputRMSNorm: KernelInputRMSNorm,
        Rotation: KernelRotation,
        NormedRotation: KernelNormedRotation,
        SwiGLU: KernelSwiGLU,
        Routing: KernelRouting,
        Mixing: KernelMixing,
    }
)


def optimise_on_cuda(decoder: nn.Module, batch_invariant: bool = False) -> None:
    """Makes a loaded decoder faster on a GPU, where gradients are not wanted; elsewhere nothing happens. The same
    parameters, another forward, for each kind of module whose kernel passes its trial.

    batch_invariant: and whose rows then get the same numbers whatever rows are beside them. UserError for a model, and
    EngineError on a device, that cannot have it.
    """
    norm = next(module for module in decoder.modules() if isinstance(module, RMSNorm))
    dtype, device = norm.weight.dtype, norm.weight.device
    if not norm.weight.is_cuda:
        return
    if batch_invariant:
        make_invariant(decoder)
        try_fixed_product(dtype, device)
    use_kernels(decoder, dtype, device, alone=batch_invariant)


@torch.no_grad()
def use_kernels(
    decoder: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Mapping[type[nn.Module], type[nn.Module]] = KERNELS,
    *,
    alone: bool = False,
) -> None:
    """kernels: what may stand for each kind of module. dtype, device: of what runs through the decoder. alone: torch's
    operations, which may go by the number of rows, are not taken; EngineError where they would have to be."""
    chosen: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}
    for module in decoder.modules():
        kind = type(module)
        if kind in kernels:
            key = kind, _width(module)
            if key not in chosen:
                chosen[key] = _tried(module, kernels[kind], dtype, device, alone)
            module.__class__ = chosen[key]


def _width(module: nn.Module) -> int:
    """Columns of its result."""
    match module:
        case RMSNorm():
            return module.weight.shape[0]
        case Rotation() | NormedRotation():
            return module.head_dim
        case Routing():
            return module.per_token
        case Mixing():
            return module.count
        case _:
            return 1500


def _tried(
    module: nn.Module, kernel: type[nn.Module], dtype: torch.dtype, device: torch.device, alone: bool
) -> type[nn.Module]:
    """kernel, or the module's own type where its numbers are not right, unless it is to stand alone."""
    own, trials = type(module), _trials(module, dtype, device)

    def run(kind: type[nn.Module]) -> torch.Tensor:
        stand_in = copy.copy(module)
        stand_in.__class__ = kind
        return torch.cat([_numbers(stand_in, one) for one in trials])

    wide = copy.deepcopy(module).float()
    expected = torch.cat([_numbers(wide, [_widened(value) for value in one]) for one in trials])
    candidates = {"Triton": kernel} if alone else {"Triton": kernel, "torch": own}
    return first_right(f"{own.__name__} of {_width(module)}", candidates, run, expected)[1]


def _widened(value: torch.Tensor | nn.Module) -> torch.Tensor | nn.Module:
    """A copy in float32; numbers of rows stay."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).float()
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value


def _numbers(module: nn.Module, inputs: Sequence[torch.Tensor | nn.Module]) -> torch.Tensor:
    """What is compared: of experts their weights and what they were chosen for, because equals have no order."""
    x, *others = inputs
    assert isinstance(x, torch.Tensor)
    result = module(x.clone() if isinstance(module, SwiGLU) else x, *others)  # which is written to
    if isinstance(result, torch.Tensor):
        return result
    weights, chosen = result
    return torch.cat((weights, x.gather(1, chosen)), 1)


def _trials(module: nn.Module, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor | nn.Module, ...]]:
    """Experts have a kernel for many rows and one for few."""
    inputs = _inputs(module, dtype, device)
    if not isinstance(module, Mixing):
        return [inputs]
    x, gate_up, down, weights, chosen = (one for one in inputs if isinstance(one, torch.Tensor))
    return [inputs, (x[:FEW_TRIED], gate_up, down, weights[:FEW_TRIED], chosen[:FEW_TRIED])]


def _inputs(module: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor | nn.Module, ...]:
    """Of a trial. Rows are spread as in a product's result."""
    generator, width = torch.Generator().manual_seed(0), _width(module)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    match module:
        case Rotation():
            positions = torch.arange(ROWS, device=device) * 77
            return rows(ROWS, HEADS + 2, width)[:, :HEADS], *rotary_tables(positions, width, 1e4, dtype)
        case NormedRotation():
            positions = torch.arange(ROWS, device=device) * 77
            heads = module.heads + ROWS
            tables = rotary_tables(positions, width, 1e4, dtype)
            norms = [RMSNorm(width, 1e-6).to(device, dtype) for _ in range(2)]
            for norm in norms:
                norm.weight.copy_(rows(width))
            return rows(ROWS, heads + 2, width)[:, :heads], *tables, *norms
        case SwiGLU():
            return (rows(ROWS, HEADS, 2 * width),)
        case Routing():
            return (rows(ROWS, max(width, 4 * module.per_token)),)
        case Mixing():  # an expert with more rows than a program takes at once, others with few, some with none
            first = torch.zeros(MIXED_ROWS, 1, dtype=torch.int64)
            others = torch.randint(module.count, (MIXED_ROWS, 1), generator=generator)
            gate_up = rows(module.count * 2 * MIXED_WIDTH, MIXED_SIZE) * MIXED_SIZE**-0.5
            down = rows(module.count * MIXED_SIZE, MIXED_WIDTH) * MIXED_WIDTH**-0.5
            chosen = torch.cat((first, others), 1).to(device)
            return rows(MIXED_ROWS, MIXED_SIZE), gate_up, down, rows(MIXED_ROWS, 2), chosen
        case _:
            return (rows(ROWS, HEADS + 2, width)[:, :HEADS],)
