"""The one entrance to what is only there for GPUs, but for attention: a decoder's small operations, a kernel each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from siglane.nn.act import SwiGLU
from siglane.nn.cuda.ops import OPS
from siglane.nn.norm import InputRMSNorm, RMSNorm
from siglane.nn.rope import Rotation, rotary_tables
from siglane.nn.trial import first_right

ROWS, HEADS = 3, 5  # of a trial


class KernelRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.rms_norm(x, self.weight, self.eps, True)


class KernelInputRMSNorm(InputRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.rms_norm(x, self.weight, self.eps, x.dtype == torch.float32)


class KernelRotation(Rotation):
    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return OPS.rotate(x, cos, sin)


class KernelSwiGLU(SwiGLU):
    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return OPS.swiglu(gate_up)


KERNELS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        RMSNorm: KernelRMSNorm,
        InputRMSNorm: KernelInputRMSNorm,
        Rotation: KernelRotation,
        SwiGLU: KernelSwiGLU,
    }
)


def optimise_on_cuda(decoder: nn.Module) -> None:
    """Makes a loaded decoder faster on a GPU, where gradients are not wanted; elsewhere nothing happens. The same
    parameters, another forward, for each kind of module whose kernel passes its trial."""
    norm = next(module for module in decoder.modules() if isinstance(module, RMSNorm))
    if norm.weight.is_cuda:
        use_kernels(decoder, norm.weight.dtype, norm.weight.device)


@torch.no_grad()
def use_kernels(
    decoder: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Mapping[type[nn.Module], type[nn.Module]] = KERNELS,
) -> None:
    """kernels: what may stand for each kind of module. dtype, device: of what runs through the decoder."""
    chosen: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}
    for module in decoder.modules():
        kind = type(module)
        if kind in kernels:
            key = kind, _width(module)
            if key not in chosen:
                chosen[key] = _tried(module, kernels[kind], dtype, device)
            module.__class__ = chosen[key]


def _width(module: nn.Module) -> int:
    """Columns of its result."""
    match module:
        case RMSNorm():
            return module.weight.shape[0]
        case Rotation():
            return module.head_dim
        case _:
            return 1500


def _tried(module: nn.Module, kernel: type[nn.Module], dtype: torch.dtype, device: torch.device) -> type[nn.Module]:
    """kernel, or the module's own type where its numbers are not right. Rows are spread as in a product's result."""
    own, width, generator = type(module), _width(module), torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HEADS + 2, width * 2 if own is SwiGLU else width, generator=generator)
    x = x.to(device, dtype)[:, :HEADS]
    x = x.contiguous() if own is SwiGLU else x
    tables = rotary_tables(torch.arange(ROWS, device=device) * 77, width, 1e4, dtype) if own is Rotation else ()

    def run(kind: type[nn.Module]) -> torch.Tensor:
        stand_in = copy.copy(module)
        stand_in.__class__ = kind
        result: torch.Tensor = stand_in(x.clone() if own is SwiGLU else x, *tables)  # which is written to
        return result

    wide = copy.deepcopy(module).float()
    expected = wide(x.to(torch.float32, copy=True), *(table.float() for table in tables))
    return first_right(f"{own.__name__} of {width}", {"Triton": kernel, "torch": own}, run, expected)[1]
