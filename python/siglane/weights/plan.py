"""Which checkpoint tensor fills which parameter: renames, fusions and what is left out, as data.

Patterns are tensor names in which `{i}` stands for a number, `{leaf}` for `weight` or `bias`, `{rest}` for anything,
and `[...]` encloses text that may be absent. Targets repeat the pattern's `{i}` and `{leaf}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

from siglane.config.language import LanguageConfig
from siglane.config.projector import ActivationLayer, LinearLayer, NormLayer, ProjectorConfig, VocabularyConfig
from siglane.config.vision import VisionConfig

PLACEHOLDERS = {"i": r"\d+", "leaf": "weight|bias", "rest": ".+"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors named `pattern` fill `part` of parameter `target` (parts: `nn.linear.ShardedModule`).

    `q+k+v`: the tensor holds several parts one after another along its first dimension. twin: another tensor may hold
    the same values (tied weights stored under both names); the second one only has to be equal.
    """

    pattern: str
    target: str
    part: str = ""
    twin: bool = False


@dataclass(frozen=True, slots=True)
class Ignore:
    """Tensors named `pattern` are not used, for `reason`."""

    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Tensors whose name starts with `prefix` belong to another owner, who gets them without the prefix."""

    prefix: str


Entry = Rule | Ignore | Elsewhere


@dataclass(frozen=True, slots=True)
class Destination:
    """The part of a parameter that one tensor fills; twin: as in `Rule`."""

    parameter: str
    part: str
    twin: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What becomes of every tensor of a checkpoint. The first entry that matches a name decides."""

    entries: tuple[Entry, ...]

    def find(self, name: str) -> Destination | Ignore | Elsewhere | None:
        """None: the plan does not know `name`."""
        for entry in self.entries:
            if isinstance(entry, Elsewhere):
                if name.startswith(entry.prefix):
                    return entry
            elif found := _compile(entry.pattern).fullmatch(name):
                if isinstance(entry, Ignore):
                    return entry
                return Destination(entry.target.format(**found.groupdict()), entry.part, entry.twin)
        return None

    def source(self, destination: Destination) -> str | None:
        """The tensor that fills `destination`, the reverse of `find`; None when no rule does.

        For plans whose patterns have no optional text.
        """
        rules = (entry for entry in self.entries if isinstance(entry, Rule) and entry.part == destination.part)
        for rule in rules:
            if found := _compile(rule.target).fullmatch(destination.parameter):
                return rule.pattern.format(**found.groupdict())
        return None

    def under(self, source: str, target: str) -> WeightPlan:
        """The same plan for tensors called `source` + name and parameters called `target` + name."""
        return WeightPlan(tuple(_moved(entry, source, target) for entry in self.entries))

    def unused(self, reason: str) -> WeightPlan:
        """The same names, none of them loaded."""
        return WeightPlan(
            tuple(Ignore(entry.pattern, reason) if isinstance(entry, Rule) else entry for entry in self.entries)
        )

    def __add__(self, other: WeightPlan) -> WeightPlan:
        return WeightPlan(self.entries + other.entries)


def _moved(entry: Entry, source: str, target: str) -> Entry:
    match entry:
        case Rule(pattern, parameter):
            return replace(entry, pattern=source + pattern, target=target + parameter)
        case Ignore(pattern, reason):
            return Ignore(source + pattern, reason)
        case Elsewhere(prefix):
            return Elsewhere(source + prefix)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern).replace(r"\[", "(?:").replace(r"\]", ")?")
    for name, matches in PLACEHOLDERS.items():
        expression = expression.replace(re.escape("{" + name + "}"), f"(?P<{name}>{matches})")
    return re.compile(expression)


def tower_plan(config: VisionConfig) -> WeightPlan:
    """transformers' `SiglipVisionModel`, saved with the infix `vision_model.` (hub) or without (transformers 5)."""
    unused_blocks = range(config.depth, config.num_hidden_layers)
    entries: list[Entry] = [
        Ignore("{rest}.position_ids", "a constant buffer of older versions"),
        *(Ignore(f"encoder.layers.{i}.{{rest}}", "the features are taken before this block") for i in unused_blocks),
        Rule("embeddings.patch_embedding.{leaf}", "patch_embedding.{leaf}"),
        Rule("embeddings.position_embedding.weight", "position_embedding.weight"),
    ]
    entries += _encoder_blocks()
    if config.post_norm:
        entries.append(Rule("post_layernorm.{leaf}", "post_norm.{leaf}"))
    else:
        entries.append(Ignore("post_layernorm.{leaf}", "the features are taken before the last norm"))
    entries += _HEAD if config.use_head else [Ignore("head.{rest}", "the pooling head is not used")]
    return WeightPlan(tuple(entries)).under("[vision_model.]", "")


def _encoder_blocks() -> list[Entry]:
    """transformers' `SiglipEncoder`, the same in both towers."""
    return [
        Rule(f"encoder.layers.{{i}}.{source}.{{leaf}}", f"blocks.{{i}}.{target}.{{leaf}}", part)
        for source, target, part in (
            ("layer_norm1", "norm1", ""),
            ("self_attn.q_proj", "attention.qkv", "q"),
            ("self_attn.k_proj", "attention.qkv", "k"),
            ("self_attn.v_proj", "attention.qkv", "v"),
            ("self_attn.out_proj", "attention.out_proj", ""),
            ("layer_norm2", "norm2", ""),
            ("mlp.fc1", "mlp.fc1", ""),
            ("mlp.fc2", "mlp.fc2", ""),
        )
    ]


def text_tower_plan() -> WeightPlan:
    """transformers' `SiglipTextModel` and `Siglip2TextModel`."""
    return WeightPlan(
        (
            Ignore("{rest}.position_ids", "a constant buffer of older versions"),
            Rule("embeddings.token_embedding.weight", "token_embedding.weight"),
            Rule("embeddings.position_embedding.weight", "position_embedding.weight"),
            *_encoder_blocks(),
            Rule("final_layer_norm.{leaf}", "final_norm.{leaf}"),
            Rule("head.{leaf}", "head.{leaf}"),
        )
    )


_HEAD: list[Entry] = [
    Rule("head.probe", "head.probe"),
    Rule("head.attention.in_proj_weight", "head.in_proj_weight"),
    Rule("head.attention.in_proj_bias", "head.in_proj_bias"),
    Rule("head.attention.out_proj.{leaf}", "head.out_proj.{leaf}"),
    Rule("head.layernorm.{leaf}", "head.norm.{leaf}"),
    Rule("head.mlp.fc1.{leaf}", "head.fc1.{leaf}"),
    Rule("head.mlp.fc2.{leaf}", "head.fc2.{leaf}"),
]


def projector_plan(config: ProjectorConfig) -> WeightPlan:
    """The layers under the names that the configuration gives them."""
    if config.vocabulary is not None:
        return _vocabulary_plan(config, config.vocabulary)
    rules: list[Entry] = []
    for number, layer in enumerate(config.layers):
        if isinstance(layer, ActivationLayer):
            continue
        leaves = ("weight", "bias") if isinstance(layer, NormLayer) or layer.bias else ("weight",)
        rules += [Rule(f"{layer.name}.{leaf}", f"layers.{number}.{leaf}") for leaf in leaves]
    return WeightPlan(tuple(rules))


def _vocabulary_plan(config: ProjectorConfig, vocabulary: VocabularyConfig) -> WeightPlan:
    head, norm = config.layers
    assert isinstance(head, LinearLayer)
    assert isinstance(norm, NormLayer)
    return WeightPlan((
        Rule(f"{head.name}.weight", "head.weight"),
        Rule(f"{norm.name}.{{leaf}}", "norm.{leaf}"),
        Rule(f"{vocabulary.name}.weight", "table"),
    ))  # fmt: skip


def qwen_plan(config: LanguageConfig) -> WeightPlan:
    """transformers' `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""
    entries: list[Entry] = [
        Ignore("{rest}.rotary_emb.inv_freq", "computed from rope_theta"),
        Rule("model.embed_tokens.weight", "embed_tokens.weight"),
        Rule("model.norm.weight", "norm.weight"),
    ]
    for source, target, part in (
        ("input_layernorm", "input_norm", ""),
        ("self_attn.q_proj", "attention.qkv", "q"),
        ("self_attn.k_proj", "attention.qkv", "k"),
        ("self_attn.v_proj", "attention.qkv", "v"),
        ("self_attn.q_norm", "attention.q_norm", ""),
        ("self_attn.k_norm", "attention.k_norm", ""),
        ("self_attn.o_proj", "attention.o_proj", ""),
        ("post_attention_layernorm", "post_attention_norm", ""),
        ("mlp.gate_proj", "mlp.gate_up", "gate"),
        ("mlp.up_proj", "mlp.gate_up", "up"),
        ("mlp.down_proj", "mlp.down_proj", ""),
    ):
        entries.append(Rule(f"model.layers.{{i}}.{source}.{{leaf}}", f"blocks.{{i}}.{target}.{{leaf}}", part))
    if config.tie_embeddings:
        entries.append(Ignore("lm_head.weight", "tie_word_embeddings: the head is the embedding table"))
    else:
        entries.append(Rule("lm_head.weight", "lm_head.weight"))
    return WeightPlan(tuple(entries))
