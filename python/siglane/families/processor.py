"""Everything about a vision-language checkpoint that needs no weights: layouts, patches and prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from siglane.config.images import ImageFacts
from siglane.config.reader import ConfigReader, refuse_pointer
from siglane.config.vlm import VlmConfig
from siglane.errors import ConfigError, UserError
from siglane.families.family import PromptRules
from siglane.families.prompt.builder import PromptBuilder
from siglane.families.prompt.call_format import CallFormat
from siglane.families.prompt.tools import ToolFormat
from siglane.families.registry import vlm_family
from siglane.families.stated import TOKENIZER, TOKENIZER_CONFIG, chat_templates, log_contradictions, tokenizer_classes
from siglane.image.patchify import to_patches
from siglane.tiling.rule import ImageBudget, no_images
from siglane.types import (
    DecodedImage,
    DecodedVideo,
    ImageLayout,
    ImagePatches,
    Medium,
    Message,
    Prompt,
    ReducedImage,
    Tool,
)
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")  # without one transformers makes an empty one


class ImageProcessor:
    """From sizes to layouts and from pixels to patches; all an encoder needs. Safe to share between threads.

    facts: None for a model without eyes, which refuses every image.
    """

    def __init__(self, facts: ImageFacts | None) -> None:
        self._facts = facts

    @property
    def facts(self) -> ImageFacts:
        """UserError `images_unsupported` for a model without eyes."""
        if self._facts is None:
            raise no_images()
        return self._facts

    def layouts(
        self, media: Sequence[Medium], image_limits: Sequence[ImageBudget | None] | None = None
    ) -> tuple[ImageLayout, ...]:
        """The layouts of all images and videos of one request, from their sizes alone (`ImageFacts.layouts`)."""
        return self.facts.layouts(media, image_limits) if media else ()

    def patches(self, image: DecodedImage | ReducedImage | DecodedVideo, layout: ImageLayout) -> ImagePatches:
        """Patches `[layout.patches, patch_dim]`. ValueError when the layout is another size's."""
        return to_patches(image, layout, self.facts.preprocess, self.facts.vision)


class Processor(ImageProcessor):
    """One checkpoint's facts, tokenizer and prompt rules. Holds no weights."""

    config: VlmConfig

    def __init__(self, config: VlmConfig, tokenizer: PreTrainedTokenizerFast, rules: PromptRules) -> None:
        super().__init__(config.images)
        self.config = config
        self.tokenizer = tokenizer
        self._prompts = PromptBuilder(
            tokenizer,
            rules,
            image_token=config.image_token,
            image_token_id=config.image_token_id,
            video=None if config.images is None else config.images.video,
        )

    @property
    def context_length(self) -> int:
        """Positions the language model was made for, prompt and answer together."""
        return self.config.language.max_position_embeddings

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.config.eos_token_ids

    @property
    def tools(self) -> ToolFormat | None:
        """How the chat template writes calls of tools and their results; None where it has no place for them."""
        return self._prompts.tools

    @property
    def call_format(self) -> CallFormat | None:
        """How answers call tools; None for a model that is told of none, or calls in a form that is not known."""
        return None if self.tools is None else self.tools.answers

    def prompt(
        self,
        messages: Sequence[Message],
        layouts: Sequence[ImageLayout],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] = (),
    ) -> Prompt:
        """The conversation's prompt up to where the answer begins; `ImagePart(n)` stands for the image of `layouts[n]`.
        tools: that the model is told of.

        The prompt's images are in the order in which the template writes them (`Prompt.in_order`); exactly
        `layout.rows` placeholders stand for each. No text of a message can become a special token or a placeholder.
        UserError when image parts and layouts do not match one to one, and for tools that the template has no place
        for.
        """
        return self._readable(self._prompts.chat(messages, layouts, chat_template_kwargs or {}, tools))

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text behind others, none of which is special."""
        return self._prompts.text_ids(text)

    def chat_template(self) -> str:
        """One Jinja template for engines that render it themselves; `rendered_prompt` takes what it writes."""
        return self._prompts.template()

    def rendered_prompt(self, text: str, layouts: Sequence[ImageLayout]) -> Prompt:
        """The prompt of a conversation rendered by `chat_template`. UserError when it does not have one placeholder
        for each image."""
        return self._readable(self._prompts.rendered(text, layouts))

    def _readable(self, prompt: Prompt) -> Prompt:
        """UserError for a token that the model has no embedding for: its tokenizer is larger than its table."""
        rows = self.config.language.vocab_size
        if max(prompt.token_ids, default=0) < rows:
            return prompt
        images = {place for span in prompt.spans for place in range(span.start, span.stop)}
        for place, token in enumerate(prompt.token_ids):
            if token >= rows and place not in images:
                text = self.tokenizer.convert_ids_to_tokens(token)
                raise UserError(
                    f"the prompt holds token {token} ({text!r}), and the model has embeddings for {rows}; its "
                    "tokenizer is another model's, or its embeddings were not resized",
                    code="token_without_embedding",
                    param="messages",
                )
        return prompt


def load_processor(checkpoint: Checkpoint, config: VlmConfig | None = None) -> Processor:
    """The processor of a vision-language checkpoint. ConfigError when its family or one of its facts is not known, or
    its chat template cannot be used.

    config: facts to use instead of the checkpoint's (VILA1.5 in column order: `Nvila.images(column_major=True)`).
    """
    stated, tokenizer = load_facts(checkpoint)
    return Processor(config or stated, tokenizer, vlm_family(checkpoint).prompt_rules(checkpoint))


def load_facts(checkpoint: Checkpoint) -> tuple[VlmConfig, PreTrainedTokenizerFast]:
    """What a vision-language checkpoint states, and its tokenizer: all that an engine asks for, which writes no prompts
    and so needs no process that renders them. ConfigError when its family or a fact is not known."""
    family = vlm_family(checkpoint)
    processor, folder = family.has_processor(checkpoint), family.tokenizer_folder(checkpoint)
    adapter, added = _with_adapter(checkpoint), family.added_tokens(checkpoint)
    tokenizer = load_tokenizer(adapter or folder, added, processor=processor)
    if adapter is not None and tokenizer.chat_template is None:  # then the base's is what it was trained with
        tokenizer.chat_template = load_tokenizer(folder, added, processor=processor).chat_template
    parts = [source.folder for source in (*family.vision_sources(checkpoint), *family.language_sources(checkpoint))]
    log_contradictions([checkpoint, folder, *parts], processor=processor, tied_at_root=family.tied_at_root)
    return family.config(checkpoint, tokenizer), tokenizer


def _with_adapter(checkpoint: Checkpoint) -> Checkpoint | None:
    """The folder of an adapter where a tokenizer was saved with it: it was trained with that one."""
    if checkpoint.adapter is None:
        return None
    folder = Checkpoint(checkpoint.adapter)
    if not any(folder.has(file) for file in (TOKENIZER, TOKENIZER_CONFIG)):
        return None
    logger.info("the tokenizer is the one of the adapter %s", folder.root)
    return folder


def load_tokenizer(
    folder: Checkpoint, added_tokens: Sequence[str] = (), *, processor: bool = False
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, from local files only, never running the checkpoint's code.

    Qwen's is loaded by Qwen's own class, as `AutoTokenizer` does in every reference: normalisation and splitting are
    then that class's, whatever tokenizer.json says. Any other tokenizer.json is taken as it is.
    added_tokens: those it lacks become special tokens behind its own, in order; processor: whose chat template wins
    (`stated.chat_templates`).
    """
    vocabularies = [path for pattern in VOCABULARIES for path in folder.root.glob(pattern) if path.is_file()]
    if not vocabularies:
        reason = "there is no tokenizer.json; was the model copied completely?"
        raise ConfigError(f"{folder.root}: the tokenizer cannot be loaded: {reason}")
    loader: Any = PreTrainedTokenizerFast
    if _is_qwen(folder):
        from transformers import Qwen2Tokenizer

        loader = Qwen2Tokenizer
    elif not folder.has("tokenizer.json"):
        from transformers import AutoTokenizer

        loader = AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(folder.root), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        for path in vocabularies:
            refuse_pointer(path)
        raise ConfigError(f"{folder.root}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"{folder.root}: siglane needs a fast tokenizer (tokenizer.json)")
    ConfigReader(folder.optional(TOKENIZER_CONFIG), TOKENIZER_CONFIG).value("model_max_length", float, 0.0)
    tokenizer.chat_template = _chat_template(folder, processor=processor)
    known = tokenizer.get_vocab()
    missing = [text for text in added_tokens if text not in known]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
    return tokenizer


def _chat_template(folder: Checkpoint, *, processor: bool) -> str | dict[str, str] | None:
    """The default one of the first place that has one; all by name where there is none."""
    found = [one.value for one in chat_templates(folder, processor=processor)]
    defaults = [templates["default"] for templates in found if "default" in templates]
    return defaults[0] if defaults else {name: text for one in found for name, text in one.items()} or None


def _is_qwen(folder: Checkpoint) -> bool:
    """As `AutoTokenizer` chooses: for Qwen2 whatever class is stated, for Qwen3 where none is."""
    stated = [found.value for found in tokenizer_classes(folder)][:1]
    kind = folder.optional("config.json").get("model_type")
    return kind == "qwen2" or stated == ["Qwen2Tokenizer"] or (kind in ("qwen3", "qwen3_moe") and not stated)
