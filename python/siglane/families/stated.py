"""Where transformers 4 and 5 may state a fact, and which place wins: transformers' own order (formats.md 9).

Each function lists the places that state one fact, the winner first. Readers take the first; `log_contradictions` names
the others where they say something else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from siglane.config.language import rope_places
from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
PREPROCESSOR, VIDEO_PREPROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"  # transformers 5 keeps all parts of a processor in it
TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
DESCRIBED = (CONFIG, PREPROCESSOR, PROCESSOR)  # what describes a SigLIP beside its tokenizer
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "spiece.model", SPECIAL_TOKENS, "added_tokens.json")

# sections of config.json with a language model's own facts: transformers' `get_text_config`, then Ovis'
LANGUAGE_SECTIONS = ("decoder", "generator", "text_config", "llm_config")
SHARDED = "FSDP"  # torch renames the class, and a trainer saves its name
# names of classes and the like, which change no number
BOOKKEEPING = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class", "video_processor_type"}


class Stated(NamedTuple):
    """One place that states a fact. place: file and keys, for messages."""

    place: str
    value: Any


def stated_classes(root: RawConfig) -> tuple[str, ...]:
    """`architectures` of a config.json, without what FSDP leaves in front of the name of a class that it shards.
    ConfigError for what is no list of names."""
    found = root.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{CONFIG}: architectures must be a list of names of classes, got {found!r}")
    return tuple(name.removeprefix(SHARDED) for name in found)


def image_processors(folder: Checkpoint) -> list[Stated]:
    """What is done to pictures, an object each (transformers `get_image_processor_dict`)."""
    return _sections(folder, "image_processor", PREPROCESSOR)


def video_processors(folder: Checkpoint) -> list[Stated]:
    """The same for frames, where a file says it of videos (transformers `get_video_processor_dict`); without any of
    these transformers takes `PREPROCESSOR`."""
    return _sections(folder, "video_processor", VIDEO_PREPROCESSOR)


def image_processor(folder: Checkpoint) -> ConfigReader | None:
    """The winner of `image_processors`. ConfigError for a section that is no object, naming it."""
    return next((ConfigReader(found.value, found.place) for found in image_processors(folder)), None)


def required_image_processor(folder: Checkpoint) -> ConfigReader:
    """The same for a model whose own defaults nobody knows. ConfigError without any."""
    if (found := image_processor(folder)) is None:
        raise ConfigError(f"{folder.root} has no {PREPROCESSOR}, which says how pictures are normalised")
    return found


def video_processor(folder: Checkpoint) -> ConfigReader | None:
    """The winner of `video_processors`; else what stands in `PREPROCESSOR`, where transformers looks last."""
    for found in video_processors(folder):
        return ConfigReader(found.value, found.place)
    return folder.reader(PREPROCESSOR) if folder.has(PREPROCESSOR) else None


def end_ids(folder: Checkpoint) -> list[Stated]:
    """The ids that end an answer, a tuple each (transformers `GenerationConfig.from_pretrained`, and
    `from_model_config` where there is no `GENERATION`). ConfigError for what is no token id."""
    root = folder.optional(CONFIG)
    sections = [(f"{CONFIG}.{name}", root.get(name)) for name in LANGUAGE_SECTIONS]
    places = [(GENERATION, folder.optional(GENERATION)), (CONFIG, root), *sections]
    return [
        Stated(place, _ids(raw["eos_token_id"], f"{folder.path(place)}"))
        for place, raw in places
        if isinstance(raw, Mapping) and raw.get("eos_token_id") is not None
    ]


def chat_templates(folder: Checkpoint, *, processor: bool) -> list[Stated]:
    """Chat templates by name, a dict each. processor: whether the model's reference takes them from a processor
    (transformers `ProcessorMixin.get_processor_dict`) or from the tokenizer (`PreTrainedTokenizerBase`); each reads
    places that the other does not know, which come last here."""
    own = [
        Stated(f"{PROCESSOR}.chat_template", folder.optional(PROCESSOR).get("chat_template")),
        Stated(OLD_TEMPLATE, folder.optional(OLD_TEMPLATE).get("chat_template")),
    ]
    files = {file.stem: _text(folder, f"{MORE_TEMPLATES}/{file.name}") for file in _templates(folder)}
    if folder.has(TEMPLATE):
        files["default"] = _text(folder, TEMPLATE)
    jinja = Stated(TEMPLATE, files)
    tokenizer = Stated(f"{TOKENIZER_CONFIG}.chat_template", folder.optional(TOKENIZER_CONFIG).get("chat_template"))
    order = [*own, jinja, tokenizer] if processor else [jinja, tokenizer, *own]
    return [Stated(place, _named(found, f"{folder.path(place)}")) for place, found in order if found]


def tokenizer_classes(folder: Checkpoint) -> list[Stated]:
    """Names of classes without `Fast` (transformers `AutoTokenizer`)."""
    found = [(place, folder.optional(place).get("tokenizer_class")) for place in (TOKENIZER_CONFIG, CONFIG)]
    return [Stated(f"{place}.tokenizer_class", str(name).removesuffix("Fast")) for place, name in found if name]


def special_tokens(folder: Checkpoint, name: str) -> list[Stated]:
    """The text of `pad_token` and its like (transformers `PreTrainedTokenizerBase._from_pretrained`, which reads
    `SPECIAL_TOKENS`, the older file, where `TOKENIZER_CONFIG` does not describe the added tokens)."""
    config = folder.optional(TOKENIZER_CONFIG)
    older = [] if "added_tokens_decoder" in config else [Stated(SPECIAL_TOKENS, folder.optional(SPECIAL_TOKENS))]
    found = [(f"{place}.{name}", raw.get(name)) for place, raw in [*older, Stated(TOKENIZER_CONFIG, config)]]
    texts = [(place, value.get("content") if isinstance(value, Mapping) else value) for place, value in found]
    for place, text in texts:
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{folder.path(place)} must be a text, got {text!r}")
    return [Stated(place, text) for place, text in texts if text]


def media_tokens(folder: Checkpoint, name: str) -> list[Stated]:
    """The text of `image_token` or `video_token` (transformers `LlavaOnevisionProcessor`: the tokenizer's own
    attribute, then the processor's)."""
    config = folder.optional(TOKENIZER_CONFIG)
    extra = config.get("extra_special_tokens")
    places = [
        (f"{TOKENIZER_CONFIG}.extra_special_tokens", extra if isinstance(extra, Mapping) else {}),
        (TOKENIZER_CONFIG, config),
        (PROCESSOR, folder.optional(PROCESSOR)),
    ]
    return [Stated(f"{place}.{name}", raw[name]) for place, raw in places if isinstance(raw.get(name), str)]


def media_token(folder: Checkpoint, name: str, default: str) -> str:
    """The winner of `media_tokens`."""
    return next((str(found.value) for found in media_tokens(folder, name)), default)


def log_contradictions(folders: Iterable[Checkpoint], *, processor: bool = False, tied_at_root: bool = False) -> None:
    """Warns of every place that is not used and says something else than the one that is. processor: as of
    `chat_templates`; tied_at_root: as of `VlmFamily`."""
    for folder in dict.fromkeys(folders):
        for sentence in contradictions(folder, processor=processor, tied_at_root=tied_at_root):
            logger.warning("%s: %s", folder.root, sentence)


def contradictions(folder: Checkpoint, *, processor: bool = False, tied_at_root: bool = False) -> list[str]:
    """A sentence for every such place of one folder."""
    root = folder.optional(CONFIG)
    # what a section says was written by a class that has a default (Llama's is 2), which nobody meant
    ends = [found for found in end_ids(folder) if found.place in (GENERATION, CONFIG)]
    facts: list[tuple[str, list[Stated]]] = [
        ("the image processor", image_processors(folder)),
        ("the video processor", video_processors(folder)),
        # more ids elsewhere contradict; fewer do not: generation_config.json often has one more than config.json
        ("eos_token_id", [found for found in ends if found is ends[0] or not {*found.value} <= {*ends[0].value}]),
        ("the chat template", chat_templates(folder, processor=processor)),
        ("tokenizer_class", tokenizer_classes(folder)),
        *((name, special_tokens(folder, name)) for name in ("pad_token", "eos_token", "unk_token", "bos_token")),
        *((name, media_tokens(folder, name)) for name in ("image_token", "video_token")),
        ("the image token's id", _present(root, CONFIG, "image_token_id", "image_token_index")),
        *((name, _aspects(folder, name)) for name in ("vision_aspect_ratio", "vision_feature_select_strategy")),
        *(("rope", places) for places in _rope(root)),
        *(("tie_word_embeddings", places) for places in _tied(root, tied_at_root)),
    ]
    return [
        _sentence(fact, places[0], other) for fact, places in facts for other in places[1:] if _differ(places[0], other)
    ]


def _sections(folder: Checkpoint, section: str, file: str) -> list[Stated]:
    nested = folder.optional(PROCESSOR).get(section)
    found = [] if nested is None else [Stated(f"{PROCESSOR}.{section}", nested)]
    return [*found, *([Stated(file, folder.json(file))] if folder.has(file) else [])]


def _present(raw: Mapping[str, Any], place: str, *names: str) -> list[Stated]:
    return [Stated(f"{place}.{name}", raw[name]) for name in names if raw.get(name) is not None]


def _aspects(folder: Checkpoint, name: str) -> list[Stated]:
    """The model's, which decides how many rows there are, and what its processor counts with."""
    places = ((CONFIG, folder.optional(CONFIG)), (PROCESSOR, folder.optional(PROCESSOR)))
    return [found for place, raw in places for found in _present(raw, place, name)]


def _rope(root: Mapping[str, Any]) -> list[list[Stated]]:
    named = [("", root), *((f".{name}", root.get(name)) for name in LANGUAGE_SECTIONS)]
    return [
        [Stated(f"{CONFIG}{section}.{key}", value) for key, value in rope_places(raw)]
        for section, raw in named
        if isinstance(raw, Mapping)
    ]


def _tied(root: Mapping[str, Any], at_root: bool) -> list[list[Stated]]:
    """Whichever is true wins (transformers `LlavaOnevisionConfig`), or what stands outside of sections does, which is
    false where nothing does (`Idefics3Config`)."""
    key = "tie_word_embeddings"
    sections = [(f"{CONFIG}.{name}", root.get(name)) for name in LANGUAGE_SECTIONS]
    inner = [found for place, raw in sections if isinstance(raw, Mapping) for found in _present(raw, place, key)]
    if at_root:
        return [[Stated(f"{CONFIG}.{key}", root.get(key) or False), *inner]]
    return [sorted([*_present(root, CONFIG, key), *inner], key=lambda found: found.value is not True)]


def _differ(winner: Stated, other: Stated) -> bool:
    if isinstance(winner.value, Mapping) and isinstance(other.value, Mapping):
        return bool(_differences(winner.value, other.value))
    return bool(winner.value != other.value)


def _differences(winner: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys both state, with other values."""
    return sorted(key for key in {*winner} & {*other} - BOOKKEEPING if winner[key] != other[key])


def _sentence(fact: str, winner: Stated, other: Stated) -> str:
    if isinstance(winner.value, Mapping) and isinstance(other.value, Mapping):
        keys = _differences(winner.value, other.value)
        said = ", ".join(f"{key} {_short(other.value[key])} for {_short(winner.value[key])}" for key in keys)
    else:
        said = f"{_short(other.value)} for {_short(winner.value)}"
    return f"{fact} is read from {winner.place}, as transformers does; {other.place} is not used and says {said}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ids(found: Any, place: str) -> tuple[int, ...]:
    ids = found if isinstance(found, list) else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"{place}: eos_token_id must be a token id or a list of them, got {found!r}")
    return tuple(ids)


def _templates(folder: Checkpoint) -> list[Any]:
    return sorted(folder.path(MORE_TEMPLATES).glob("*.jinja"))


def _text(folder: Checkpoint, name: str) -> str:
    try:
        return folder.path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder.path(name)} cannot be read: {error}") from error


def _named(found: Any, place: str) -> dict[str, str]:
    """One text, a dict of texts by name, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(found, list) and all(isinstance(one, Mapping) and {"name", "template"} <= {*one} for one in found):
        found = {one["name"]: one["template"] for one in found}
    templates = {"default": found} if isinstance(found, str) else found
    if not isinstance(templates, Mapping) or not all(isinstance(text, str) for text in templates.values()):
        raise ConfigError(f"{place} must be a chat template, or several by name")
    return dict(templates)
