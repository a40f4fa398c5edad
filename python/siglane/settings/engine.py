"""Everything that can be set about the engine; flags and environment variables are generated from these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from siglane.config.language import LanguageConfig
from siglane.errors import ConfigError
from siglane.settings.options import at_least, one_of, option
from siglane.types import BackendChoice

if TYPE_CHECKING:  # flags are read and wrong ones reported before torch's second of import
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
QUANTIZATION_HELP = (
    "bits that the weights of linear layers are kept in; fp8: 8, and on GPUs that have them towers compute in 8-bit "
    "floats; none: as the model's files have them"
)
Quantization = Literal["none", "8bit", "4bit", "fp8"]
DTYPE_HELP = "dtype of the weights and what is computed with them; auto: float32, on CUDA bfloat16"
PAGED_BACKENDS = ("auto", "torch", "eager")
FEATURE_CACHE_BYTES, FEATURE_CACHE_CONTEXTS = 256 << 20, 8
ENGINE_TIMEOUT = {"cpu": 60.0, "cuda": 300.0}  # a first step on CUDA may compile kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: Dtype = option("auto", DTYPE_HELP)
    vision_dtype: Dtype = option("auto", "dtype of the vision tower; auto: as dtype")
    quantization: Quantization = option("none", QUANTIZATION_HELP)
    attention_backend: BackendChoice = option(
        "auto",
        "packed vision attention: auto, sdpa, onednn, torch_varlen, flash_attn, flashinfer; eager: plain "
        "products and a softmax, also in the language model, for who debugs numbers",
    )
    paged_backend: str = option("auto", "paged attention of the language model: auto, torch or eager")
    page_size: int = option(16, "tokens per KV page")
    kv_tokens: int = option(0, "tokens the KV cache holds; 0 sizes it by the free memory")
    max_running: int = option(64, "requests that are computed at the same time")
    max_batch_tokens: int = option(0, "tokens of one step, longer prompts are chunked; 0: 512 on CPU, 4096 on CUDA")
    max_batch_patches: int = option(
        0,
        "patches of one packed forward (a larger image runs alone); 0: 1024 on CPU, 16384 on CUDA",
        alias="max_seq_len",
    )
    enable_packing: bool = option(True, "encode images of all requests together; off: one forward for each image")
    feature_cache_bytes: int | None = option(
        None,
        "bytes of encoded images kept, so that a known image is not encoded again; none: 256M, or what eight "
        "running requests can hold where that is less",
    )
    prefix_cache: bool = option(True, "reuse the KV pages of prompts that begin alike")
    num_speculative_tokens: int = option(
        0,
        "tokens of an answer that one step guesses at most, from what followed its last words where prompt "
        "or answer has them already; checked, so answers stay the same; 0: none",
    )
    batch_invariant: bool = option(
        False,
        "on CUDA: the same request gets the same tokens alone and beside any others, by slower products; refused where "
        "that cannot be promised",
    )
    threads: int = option(0, "CPU threads of the engine; 0 leaves torch's choice")
    engine_timeout: float = option(
        0.0,
        "seconds without progress (each layer is some) after which an engine counts as hung and a server "
        "starts it again, LLM and generate end with an error; 0: 60 on CPU, 300 on CUDA; inf: never",
    )
    load_timeout: float = option(
        300.0,
        "seconds in which a process that loads models neither computes nor reads, after which it counts as "
        "hung and the command ends; inf: never",
    )

    def __post_init__(self) -> None:
        at_least("page_size", self.page_size, 1)
        at_least("max_running", self.max_running, 1)
        for name in ("kv_tokens", "max_batch_tokens", "max_batch_patches", "feature_cache_bytes", "threads"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        at_least("engine_timeout", self.engine_timeout, 0)
        at_least("num_speculative_tokens", self.num_speculative_tokens, 0)
        at_least("load_timeout", self.load_timeout, 1)
        for name in ("dtype", "vision_dtype"):
            one_of(name, getattr(self, name), get_args(Dtype))
        one_of("quantization", self.quantization, get_args(Quantization))
        one_of("paged_backend", self.paged_backend, PAGED_BACKENDS)
        if self.batch_invariant:
            self._check_invariant()

    def _check_invariant(self) -> None:
        """ConfigError for another option that would break its promise."""
        plain = "its kernels go by the number of rows"
        choices = (("quantization", self.quantization, "none"), ("paged_backend", self.paged_backend, "auto"))
        for name, chosen, only in choices:
            if chosen != only:
                raise ConfigError(f"batch_invariant cannot be promised with {name} {chosen!r}: {plain}; use {only!r}")
        if self.attention_backend == "eager":
            raise ConfigError(f"batch_invariant cannot be promised with attention_backend 'eager': {plain}; use 'auto'")

    def resolve_device(self) -> torch.device:
        """ConfigError when the device is not known or not there."""
        from siglane.nn.device import resolve_device

        return resolve_device(self.device)

    def resolve_dtypes(self, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """dtype of the language model and of the vision tower."""
        from siglane.nn.device import resolve_dtype

        language = resolve_dtype(self.dtype, device)
        return language, language if self.vision_dtype == "auto" else resolve_dtype(self.vision_dtype, device)

    @property
    def bits(self) -> Literal["8bit", "4bit", "fp8"] | None:
        """What `quantization` asks for."""
        return None if self.quantization == "none" else self.quantization

    def resolve_paged_backend(self) -> str:
        """Plain attention in the tower means plain attention in the language model, unless that is told apart."""
        return "eager" if (self.attention_backend, self.paged_backend) == ("eager", "auto") else self.paged_backend

    def resolve_timeout(self, device_type: str) -> float:
        """Seconds without progress after which an engine on this kind of device counts as hung."""
        return self.engine_timeout or ENGINE_TIMEOUT[device_type]

    @property
    def silence_limit(self) -> float:
        """Seconds without a sign of life after which an engine's process does: it gives signs while it computes."""
        return self.engine_timeout or ENGINE_TIMEOUT["cpu"]

    @property
    def stated_pages(self) -> int | None:
        """Pages of the KV cache where `kv_tokens` asks for them, None where memory decides."""
        return max(1, self.kv_tokens // self.page_size) if self.kv_tokens else None

    def feature_bytes(self, language: LanguageConfig, dtype: torch.dtype) -> int:
        """Of the feature cache. dtype: of its rows, of which a token of the context is one at most."""
        if self.feature_cache_bytes is not None:
            return self.feature_cache_bytes
        contexts = min(self.max_running, FEATURE_CACHE_CONTEXTS) * language.max_position_embeddings
        return min(FEATURE_CACHE_BYTES, contexts * language.hidden_size * dtype.itemsize)

    def pages_within(self, available: int, language: LanguageConfig, kv_heads: int, dtype: torch.dtype) -> int:
        """Pages of a KV cache of `available` bytes; never more than all running requests can fill."""
        token_bytes = 2 * language.num_hidden_layers * kv_heads * language.head_dim * dtype.itemsize
        most = self.max_running * -(-language.max_position_embeddings // self.page_size)
        return max(1, min(available // (token_bytes * self.page_size), most))
