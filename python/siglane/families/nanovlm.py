"""nanoVLM, every release: a SigLIP tower, pixel shuffle and one linear layer, and a small Llama (formats.md section 7).

Source: huggingface/nanoVLM (`models/config.py`, `data/processors.py`, `generate.py`, `models/`). Its config.json is a
dataclass as JSON, without `architectures` and `model_type`; what a release did not have yet is absent from it, and its
absence means that release's behaviour, not the newest one's:

| release | `vlm_extra_tokens` | `max_img_size` | a picture | rows | prompt without `lm_chat_template` |
|---|---|---|---|---|---|
| 0.1, 222M | absent | absent | squashed to one tile | in front of all text | `Question: ... Answer:` |
| 0.2, 450M | the image token | absent | squashed to one tile | in front of its question | `Question: ... Answer:` |
| July 2025 | and one for each tile | stated | tiles | in front of its message | ChatML, no system turn |
| now | and one for the whole | stated | the whole, then tiles | in front of its message | ChatML, no system turn |
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import pixel_shuffle_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError, UserError
from siglane.families.family import CHATML, PromptRules, VlmFamily
from siglane.families.files import check_rows
from siglane.nn.plan import Ignore, Rule, WeightPlan, parts
from siglane.nn.rope import rotary_frequencies
from siglane.projector.build import projector_plan
from siglane.tiling.nanovlm import WholeTiles
from siglane.tiling.rule import LayoutRule
from siglane.tiling.squash import Squash
from siglane.types import Grid, Size
from siglane.weights.hub import TOKENIZER_PATTERNS, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<|image|>"
FIRST_TOKENIZER, TOKENIZER = "HuggingFaceTB/cosmo2-tokenizer", "HuggingFaceTB/SmolLM2-360M-Instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BASE_VOCABULARY = 49152
EXTRA_TOKENS = "vlm_extra_tokens"

# The first two releases were trained on one question and its answer; that earlier turns are written one after another,
# a line each, is siglane's choice.
_IMAGES = "{% for part in message['content'] if part is mapping and part['type'] == 'image' %}<|image|>{% endfor %}"
_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
_QUESTION = (
    "{% if message['role'] == 'user' %}{{ 'Question: ' }}" + _TEXT + "{{ ' Answer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' }}" + _TEXT + "{{ '\n' }}"
    "{% else %}" + _TEXT + "{{ '\n' }}{% endif %}"
)
_EACH, _END = "{% for message in messages %}", "{% endfor %}"
QUESTION = _EACH + _IMAGES + _QUESTION + _END
QUESTION_BEHIND_ALL_IMAGES = _EACH + _IMAGES + _END + _EACH + _QUESTION + _END


# nanoVLM's own names, of a block of each half
TOWER_BLOCK = WeightPlan((
    Rule("ln1.{leaf}", "norm1.{leaf}"),
    Rule("attn.qkv_proj.{leaf}", "attention.qkv.{leaf}", "q+k+v"),
    Rule("attn.out_proj.{leaf}", "attention.out_proj.{leaf}"),
    Rule("ln2.{leaf}", "norm2.{leaf}"),
    Rule("mlp.fc1.{leaf}", "mlp.fc1.{leaf}"),
    Rule("mlp.fc2.{leaf}", "mlp.fc2.{leaf}"),
))  # fmt: skip
LANGUAGE_BLOCK = WeightPlan((
    Rule("norm1.weight", "input_norm.weight"),
    *parts("attn.*_proj.weight", "attention.qkv.weight", "q k v"),
    Rule("attn.out_proj.weight", "attention.o_proj.weight"),
    Rule("norm2.weight", "post_attention_norm.weight"),
    *parts("mlp.*_proj.weight", "mlp.gate_up.weight", "gate up"),
    Rule("mlp.down_proj.weight", "mlp.down_proj.weight"),
))  # fmt: skip


class NanoVlm(VlmFamily):
    name = "nanovlm"
    known_as = ("nanoVLM (vit_hidden_dim and lm_hidden_dim, no architectures)",)
    language_prefix = "decoder."
    one_table = eos_ends = True

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        named = root.get("architectures") or root.get("model_type")
        return not named and "vit_hidden_dim" in root and "lm_hidden_dim" in root

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        vision = _vision(root)
        factor = root.size("mp_pixel_shuffle_factor", 4 if "global_image_token" in _extra_tokens(root) else 2)
        check_rows(
            vision.position_grid.h, factor, "config.json: mp_pixel_shuffle_factor", root, "mp_image_token_length"
        )
        return ImageFacts(
            vision=vision,
            projector=pixel_shuffle_projector(
                factor, input_size=vision.hidden_size, output_size=root.size("lm_hidden_dim"), name="proj"
            ),
            # pixels are only brought to 0..1
            preprocess=PreprocessConfig(rule=_rule(root), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale=1 / 255),
            newline=False,
            video=None,
        )

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        root = checkpoint.reader()
        if root.value("lm_use_tokens", bool, False):
            raise ConfigError(
                "config.json: lm_use_tokens true is not supported; the language model must take embeddings"
            )
        if root.value("lm_attn_scaling", float, 1.0) != 1:
            raise ConfigError(f"config.json: lm_attn_scaling {root.raw['lm_attn_scaling']} is not supported, only 1 is")
        hidden_size, heads = root.size("lm_hidden_dim"), root.size("lm_n_heads")
        if hidden_size % heads:
            raise ConfigError(f"config.json: lm_hidden_dim {hidden_size} does not divide by {heads} heads")
        extra = root.value("extra_token_amount", int, len(_extra_tokens(root)))
        return LanguageConfig(
            hidden_size=hidden_size,
            intermediate_size=root.size("lm_inter_dim"),
            num_hidden_layers=root.size("lm_n_blocks"),
            num_attention_heads=heads,
            num_key_value_heads=root.size("lm_n_kv_heads"),
            head_dim=hidden_size // heads,
            vocab_size=root.size("lm_vocab_size", root.size("lm_base_vocab_size", BASE_VOCABULARY) + extra),
            # beyond it the reference stretches all positions, which moves earlier ones too
            max_position_embeddings=root.size("lm_max_position_embeddings", 8192),
            rms_norm_eps=root.value("lm_rms_eps", float, 1e-5),
            rope_theta=root.value("lm_re_base", float, 100000.0),
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            qk_norm=False,
            norm_dtype="input",
            tie_embeddings=root.value("lm_tie_weights", bool, True),
            rope_scaling=None,
            experts=None,
        )

    def image_token(self, checkpoint: Checkpoint) -> str:
        return _extra_tokens(checkpoint.reader()).get("image_token", IMAGE_TOKEN)

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        """Release 0.1 has no such token. ConfigError for tokens beside images that have no embedding."""
        vocabulary, extra = tokenizer.get_vocab(), _extra_tokens(checkpoint.reader())
        for text in extra.values():
            if vocabulary[text] >= language.vocab_size:
                raise ConfigError(
                    f"config.json: {text} is token {vocabulary[text]} of the tokenizer, lm_vocab_size is "
                    f"{language.vocab_size}; is this the tokenizer that lm_tokenizer names?"
                )
        if not extra:
            return super().image_token_id(checkpoint, tokenizer, language)
        return vocabulary[extra["image_token"]]

    def added_tokens(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return tuple(_extra_tokens(checkpoint.reader()).values())

    def tokenizer_folder(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint's own folder when a tokenizer lies in it, else what `lm_tokenizer` names: a folder or a hub
        id."""
        if any(checkpoint.has(file) for file in TOKENIZER_FILES):
            return checkpoint
        root = checkpoint.reader()
        named = root.value("lm_tokenizer", str, TOKENIZER if _extra_tokens(root) else FIRST_TOKENIZER)
        try:
            return open_checkpoint(named, patterns=TOKENIZER_PATTERNS)
        except UserError as error:
            raise ConfigError(
                f"{checkpoint.root} holds no tokenizer and the one that its lm_tokenizer names cannot be had: {error}; "
                f"or put that tokenizer's files beside the weights"
            ) from error

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """The tokenizer's own template, which has a system turn, is never nanoVLM's."""
        root = checkpoint.reader()
        if root.has("lm_chat_template"):
            template = root.value("lm_chat_template", str)
        elif isinstance(_rule(root), WholeTiles):
            template = CHATML
        else:
            template = QUESTION if _extra_tokens(root) else QUESTION_BEHIND_ALL_IMAGES
        template = template.replace(IMAGE_TOKEN, self.image_token(checkpoint))
        return PromptRules(default_template=CHATML, template=template, images_first=True, strip_messages=False)

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        tower = WeightPlan((
            Rule("patch_embedding.conv.{leaf}", "patch_embedding.{leaf}"),
            Rule("patch_embedding.position_embedding", "position_embedding.weight"),
            Rule("layer_norm.{leaf}", "post_norm.{leaf}"),
            *TOWER_BLOCK.under("blocks.{i}.", "blocks.{i}.").entries,
        )).under("vision_encoder.", "encoder.tower.")  # fmt: skip
        return tower + projector_plan(images.projector).under("MP.", "projector.")

    def language_plan(self, language: LanguageConfig) -> WeightPlan:
        tied, frequencies = language.tie_embeddings, partial(rotary_frequencies, theta=language.rope_theta)
        return WeightPlan((
            Ignore("rotary_embd.inv_freq", "computed from lm_re_base", frequencies),
            Rule("token_embedding.weight", "embed_tokens.weight", twin=tied),
            Rule("head.weight", "embed_tokens.weight" if tied else "lm_head.weight", twin=tied),
            Rule("norm.weight", "norm.weight"),
            *LANGUAGE_BLOCK.under("blocks.{i}.", "blocks.{i}.").entries,
        )).under(self.language_prefix, "")  # fmt: skip


def _extra_tokens(root: ConfigReader) -> dict[str, str]:
    """Purpose to text, in the order of the ids. Empty in release 0.1, which has no token for images."""
    if not root.raw.get(EXTRA_TOKENS):
        return {}
    section = root.section(EXTRA_TOKENS)
    found = {purpose: section.value(purpose, str) for purpose in section.raw}
    if "image_token" not in found or not all(found.values()):
        raise ConfigError(f"config.json: {EXTRA_TOKENS} must name an image_token and hold no empty text, got {found}")
    return found


def _vision(root: ConfigReader) -> VisionConfig:
    if root.value("vit_cls_flag", bool, False):
        raise ConfigError("config.json: vit_cls_flag true (a class token) is not supported; SigLIP has none")
    hidden_size, layers = root.size("vit_hidden_dim"), root.size("vit_n_blocks")
    patch_size, side = root.size("vit_patch_size"), root.size("vit_img_size")
    if side < patch_size:
        raise ConfigError(f"config.json: vit_img_size {side} is smaller than vit_patch_size {patch_size}")
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=root.size("vit_inter_dim", 4 * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=root.size("vit_n_heads"),
        num_channels=3,
        patch_size=patch_size,
        position_grid=Grid(side // patch_size, side // patch_size),
        hidden_act="gelu_tanh",
        layer_norm_eps=root.value("vit_ln_eps", float, 1e-6),
        patch_layout="channel_first",
        position_resize="never",
        rope_theta=None,
        depth=layers,
        post_norm=True,
        use_head=False,
    )


def _rule(root: ConfigReader) -> LayoutRule:
    extra, side = _extra_tokens(root), root.size("vit_img_size")
    tile_tokens = _tile_tokens(extra)
    if not root.has("max_img_size") and not tile_tokens:
        return Squash(tile=Size(side, side), resample="bilinear")
    longest = root.size("max_img_size", side)
    if longest % side:
        raise ConfigError(f"config.json: max_img_size {longest} is not a multiple of vit_img_size {side}")
    return WholeTiles(
        side=side,
        longest=longest // side,
        enlarge=root.value("resize_to_max_side_len", bool, False),
        global_token=extra.get("global_image_token", ""),
        tile_tokens=tile_tokens,
    )


def _tile_tokens(extra: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """The texts of r1c1, r1c2, ... by row and column, as far as they go on without a gap."""
    rows: list[tuple[str, ...]] = []
    while f"r{len(rows) + 1}c1" in extra:
        row: list[str] = []
        while (name := f"r{len(rows) + 1}c{len(row) + 1}") in extra:
            row.append(extra[name])
        rows.append(tuple(row))
    return tuple(rows)
