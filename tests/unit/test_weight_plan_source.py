"""`WeightPlan.source`, the reverse of `find`, and `checkpoint_tensors`, the reverse of loading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import ERAS, write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from video_llama_3_checkpoint import LAYOUTS, write_video_llama_3_checkpoint

from siglane.config.language import LanguageConfig
from siglane.families.model import VisionLanguageModel, load_model, model_tensors
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Destination, Ignore, Rule, WeightPlan
from siglane.weights.export import checkpoint_tensors
from siglane.weights.hub import Checkpoint
from siglane.weights.load import StrictLoad

WRITERS: dict[str, Callable[[Path], Any]] = {
    **{
        f"nvila {layout}{' qwen3' * qwen3}{' tied' * tied}": partial(
            write_nvila_checkpoint, layout=layout, qwen3=qwen3, tied=tied
        )
        for layout in ("folders", "hf", "vila")
        for qwen3 in (False, True)
        for tied in (False, True)
    },
    **{
        f"llava_onevision {names}{' tied' * tied}": partial(write_llava_onevision_checkpoint, names=names, tied=tied)
        for names in ("hub", "saved", "memory")
        for tied in (False, True)
    },
    "bee": partial(write_relative, name="bee"),
    "llava_qwen": partial(write_llava_qwen_checkpoint, tied=False),
    **{f"ovis2_5{' tied' * tied}": partial(write_ovis2_5_checkpoint, tied=tied) for tied in (False, True)},
    "ovis2_6": write_ovis2_6_checkpoint,
    **{
        f"video_llama_3 {layout}{' tied' * tied}": partial(write_video_llama_3_checkpoint, layout=layout, tied=tied)
        for layout in LAYOUTS
        for tied in (False, True)
    },
    **{
        f"idefics3 {kind}{' in memory' * in_memory}": partial(write_idefics3_checkpoint, kind=kind, in_memory=in_memory)
        for kind in ("smolvlm2", "docling")
        for in_memory in (False, True)
    },
    **{f"nanovlm {era}": partial(write_nanovlm_checkpoint, era=era) for era in ERAS},
    **{
        f"nanovlm, {names}": partial(write_nanovlm_checkpoint, names=names) for names in ("embedding", "both", "untied")
    },
}


def language_names(reference: Any) -> set[str]:
    """Of the language model's tensors in transformers' own class, a tied head left out."""
    if hasattr(reference, "language"):
        names, tied = set(reference.language.state_dict()), reference.language.config.tie_word_embeddings
    else:  # LLaVA-OneVision's and Idefics3's are parts of a whole
        parts = {"model.language_model.": "model.", "model.text_model.": "model.", "lm_head.": "lm_head."}
        names = {
            place + name.removeprefix(prefix)
            for name in reference.model.state_dict()
            for prefix, place in parts.items()
            if name.startswith(prefix)
        }
        config = reference.model.config
        tied = config.tie_word_embeddings or (
            config.model_type == "llava_onevision" and config.text_config.tie_word_embeddings
        )
    return names - {"lm_head.weight"} if tied else names


class Written(NamedTuple):
    """One of `WRITERS`' checkpoints, and transformers' names of its language model's tensors."""

    name: str
    checkpoint: Checkpoint
    language_names: set[str]


@pytest.fixture(scope="module", params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written")
    return Written(request.param, Checkpoint(folder), language_names(WRITERS[request.param](folder)))


@pytest.mark.few(
    "nvila folders", "nvila hf tied", "nvila vila qwen3 tied", "llava_onevision hub tied", "llava_onevision saved",
    "llava_onevision memory", "bee", "llava_qwen", "ovis2_5 tied", "ovis2_6", "video_llama_3 hf",
    "video_llama_3 authors tied", "idefics3 smolvlm2 in memory", "idefics3 docling", "nanovlm grid",
    "nanovlm current", "nanovlm, untied",
)  # fmt: skip
def test_every_language_tensor_has_transformers_name(written: Written) -> None:
    checkpoint = written.checkpoint
    config = load_processor(checkpoint).config
    ours, theirs = vlm_family(checkpoint).language_plan(config.language), qwen_plan(config.language)
    sources: dict[str, str] = {}
    for tensor in model_tensors(checkpoint):
        destination = ours.find(tensor.name)
        if not isinstance(destination, Destination):
            continue
        source = theirs.source(destination)
        assert source is not None
        assert theirs.find(source) == destination
        assert source not in sources or destination.twin, f"{tensor.name} and {sources[source]} are both {source}"
        sources[source] = tensor.name
    assert set(sources) == written.language_names


def test_every_model_is_written_back_as_it_was_read(written: Written) -> None:
    checkpoint = written.checkpoint
    config, family = load_processor(checkpoint).config, vlm_family(checkpoint)
    plan = family.plan(config)
    model = load_model(checkpoint, config, device="cpu", dtype=torch.float32)
    tensors = checkpoint_tensors(model, plan)
    again = VisionLanguageModel(config)
    with StrictLoad(plan, again) as load:
        for stored, tensor in tensors.items():
            load.take(stored, tensor)
    assert not load.ignored
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    shapes = {plan.find(tensor.name): tensor.shape for tensor in model_tensors(checkpoint)}
    flat = ("vision.encoder.tower.position_embedding.weight",)  # nanoVLM stores it with an axis in front
    for stored, tensor in tensors.items():
        destination = plan.find(stored)
        assert isinstance(destination, Destination)
        nanovlm = written.name.startswith("nanovlm")
        assert shapes[destination] == tensor.shape or (destination.parameter in flat and nanovlm)


def language_config(model_type: str, **facts: Any) -> LanguageConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LanguageConfig.from_hf({**sizes, "model_type": model_type, "head_dim": 8, **facts})


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_reverse_of_find(tied: bool) -> None:
    plan = qwen_plan(language_config("qwen3", tie_word_embeddings=tied))
    names = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * (not tied)
    for layer in (0, 9, 10, 11):
        for module in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"):
            names.append(f"model.layers.{layer}.{module}.weight")
        for module in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            names += [f"model.layers.{layer}.{module}_proj.{leaf}" for leaf in ("weight", "bias")]
    found = [plan.find(name) for name in names]
    assert [plan.source(one) for one in found if isinstance(one, Destination)] == names
    assert len(set(found)) == len(names)


@pytest.mark.parametrize(
    "destination",
    [
        Destination("lm_head.weight", ""),  # tied: nothing fills it
        Destination("blocks.0.attention.qkv.weight", ""),  # which part?
        Destination("blocks.0.attention.qkv.weight", "q+k+v"),
        Destination("blocks.x.attention.qkv.weight", "q"),
        Destination("blocks.0.attention.qkv.scale", "q"),
        Destination("Xblocks.0.input_norm.weight", ""),
        Destination("blocks.0.input_norm.weight.more", ""),
        Destination("blocks_0_input_norm_weight", ""),
        Destination("", ""),
    ],
)
def test_what_no_tensor_fills_has_none(destination: Destination) -> None:
    assert qwen_plan(language_config("qwen2", tie_word_embeddings=True)).source(destination) is None


def test_the_first_rule_decides_and_ignored_tensors_fill_nothing() -> None:
    plan = WeightPlan((Ignore("z.{leaf}", "no use"), Rule("a.{leaf}", "x.{leaf}"), Rule("b.{leaf}", "x.{leaf}")))
    assert plan.source(Destination("x.bias", "")) == "a.bias"
    assert plan.source(Destination("z.bias", "")) is None
    moved = plan.under("from.", "to.")
    assert moved.source(Destination("to.x.bias", "")) == "from.a.bias"
    assert moved.source(Destination("x.bias", "")) is None
