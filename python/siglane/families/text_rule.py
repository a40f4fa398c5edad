"""How a two-tower SigLIP's texts become ids: SigLIP's rule or SigLIP2's, told from what its tokenizer holds, not from
the name of the class that stored it (formats.md 1.6, 2.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from siglane.config.reader import ConfigReader, refuse_pointer
from siglane.config.two_tower import TextRule, TextTowerConfig
from siglane.errors import ConfigError, UserError
from siglane.families.stated import TOKENIZER, TOKENIZER_CONFIG, special_tokens, tokenizer_classes
from siglane.text.tokens import TextTokens
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

SENTENCEPIECE = "spiece.model"
FIRST_END, SECOND_END, SECOND_PAD = "</s>", "<eos>", "<pad>"
END_ID = 1  # of both vocabularies, SentencePiece's and Gemma's
CLASSES = {"SiglipTokenizer": FIRST_END, "Siglip2Tokenizer": SECOND_END, "GemmaTokenizer": SECOND_END}


class _Vocabulary(NamedTuple):
    """encode: text -> ids, without any special token; number: of a token's text, None for one it lacks; text: of an id,
    None where there is none; pad: what tokenizer.json pads with, None where it does not say."""

    encode: Callable[[str], list[int]]
    size: int
    number: Callable[[str], int | None]
    text: Callable[[int], str | None]
    pad: str | None = None


def read_tokens(checkpoint: Checkpoint, text: TextTowerConfig) -> TextTokens:
    """The tokenizer behind the rule that the text tower was trained with.

    The pad token is what the files state, else what its kind was trained with. ConfigError when there is no tokenizer,
    one with ids outside the tower's table, or one of a kind that cannot be told.
    """
    found = _tokenizer_json(checkpoint) if checkpoint.has(TOKENIZER) else _sentencepiece(checkpoint)
    if found.size > text.vocab_size:
        raise ConfigError(f"{checkpoint.root}: the tokenizer has {found.size} ids, the text tower {text.vocab_size}")
    end = _end(checkpoint, found)
    first = end == FIRST_END
    stated = checkpoint.optional(TOKENIZER_CONFIG)
    longest = ConfigReader(stated, TOKENIZER_CONFIG).value("model_max_length", float, text.length)
    rule = TextRule(
        length=min(text.length, int(longest)) if longest >= 1 else text.length,
        lowercase="characters" if not first else "never" if stated.get("do_lower_case") is False else "text",
        delete_punctuation=first,
        end_id=_number(checkpoint, found, end),
        pad_id=_number(checkpoint, found, _pad(checkpoint, found, FIRST_END if first else SECOND_PAD)),
    )
    return TextTokens(rule, found.encode)


def _end(checkpoint: Checkpoint, found: _Vocabulary) -> str:
    """What stands behind every text. Gemma's vocabulary has a `</s>` too, the end of HTML's struck text: what has the
    end's id counts before any name does."""
    if (text := found.text(END_ID)) in (FIRST_END, SECOND_END):
        return str(text)
    for stated in special_tokens(checkpoint, "eos_token"):
        if found.number(stated.value) is not None:
            return str(stated.value)
    for name in tokenizer_classes(checkpoint):
        if name.value in CLASSES and found.number(CLASSES[name.value]) is not None:
            return CLASSES[name.value]
    raise ConfigError(
        f"{checkpoint.root}: token {END_ID} of the tokenizer is neither {FIRST_END} nor {SECOND_END}; nothing tells "
        f"how texts end; state eos_token and pad_token in {TOKENIZER_CONFIG}"
    )


def _pad(checkpoint: Checkpoint, found: _Vocabulary, trained: str) -> str:
    stated = next((str(place.value) for place in special_tokens(checkpoint, "pad_token")), found.pad or trained)
    if stated != trained:
        logger.warning(
            "%s: texts are padded with %s, as its files say; models of this kind were trained with %s",
            checkpoint.root, stated, trained,
        )  # fmt: skip
    return stated


def _number(checkpoint: Checkpoint, found: _Vocabulary, text: str) -> int:
    number = found.number(text)
    if number is None:
        raise ConfigError(f"{checkpoint.root}: the tokenizer has no token {text}, with which texts end or are padded")
    return number


def _tokenizer_json(checkpoint: Checkpoint) -> _Vocabulary:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.path(TOKENIZER)))
    except Exception as error:  # tokenizers raises a bare Exception
        refuse_pointer(checkpoint.path(TOKENIZER))
        raise ConfigError(f"{checkpoint.root}: tokenizer.json cannot be loaded: {error}") from error
    pad = (tokenizer.padding or {}).get("pad_token")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Vocabulary(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.get_vocab_size(),
        tokenizer.token_to_id,
        tokenizer.id_to_token,
        pad,
    )


def _sentencepiece(checkpoint: Checkpoint) -> _Vocabulary:
    if not checkpoint.has(SENTENCEPIECE):
        raise ConfigError(f"{checkpoint.root} has neither tokenizer.json nor spiece.model")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        message = "this checkpoint's tokenizer is SentencePiece's; pip install 'siglane[tagging]'"
        raise UserError(message, code="missing_extra") from error
    try:
        processor = SentencePieceProcessor(model_file=str(checkpoint.path(SENTENCEPIECE)))
    except (RuntimeError, OSError) as error:
        refuse_pointer(checkpoint.path(SENTENCEPIECE))
        raise ConfigError(f"{checkpoint.root}: spiece.model cannot be loaded: {error}") from error
    size = processor.get_piece_size()
    numbers = {processor.id_to_piece(number): number for number in range(size)}
    return _Vocabulary(
        lambda text: list(processor.encode(text)),
        size,
        numbers.get,
        lambda number: processor.id_to_piece(number) if number < size else None,
    )
