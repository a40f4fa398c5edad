"""What one server serves: a model that chats, one that embeds, or both of them, computed by one engine."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from siglane.config.images import ImageFacts
from siglane.config.two_tower import TwoTowerConfig
from siglane.engine.answers.answer import Answer
from siglane.engine.constraints.constraint import check_constraint
from siglane.engine.process.embed_worker import Embedding, Item
from siglane.engine.process.supervisor import EngineProcess
from siglane.engine.sampling.parameters import sampling_defaults
from siglane.errors import EngineError, UserError
from siglane.families.processor import Processor
from siglane.families.prompt.call_format import CallFormat
from siglane.families.prompt.renderers import MOST_PROCESSES
from siglane.families.two_tower import Calibration
from siglane.server.choices import Choices
from siglane.server.clients import Client, Clients
from siglane.server.context import InflightBytes
from siglane.server.embedding.text_cache import TextCache
from siglane.server.errors import aborted, overloaded
from siglane.server.logprobs import TokenTexts
from siglane.server.media import MediaLoader
from siglane.server.metrics import Metrics
from siglane.server.middleware import shutting_down
from siglane.server.replies import ModelCard
from siglane.server.running import Running
from siglane.settings.server import ServerConfig
from siglane.text.tokens import TextTokens
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import Constraint, ImageLayout, Message, Prompt, Request, SamplingParams, Tool, ToolUse

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where one model of a server runs and what its clients may know of it."""

    name: str  # in answers
    root: str  # its folder or hub id
    engine: EngineProcess
    config: ServerConfig
    metrics: Metrics
    image_limits: ImageBudget = CHECKPOINT_LIMITS  # the ceiling of its clients'


class ServedModel:
    """What a model has whatever it is asked for. Lives on one event loop."""

    def __init__(self, deployed: Deployment, images: ImageFacts | None) -> None:
        self.name, self.root = deployed.name, deployed.root
        self.config, self.metrics = deployed.config, deployed.metrics
        self.image_limits, self.images = deployed.image_limits, images
        self.media = MediaLoader(self.config, images, deployed.image_limits)
        self._engine = deployed.engine
        self._ended = False

    @property
    def context_length(self) -> int:
        """Tokens that one input has room for."""
        raise NotImplementedError

    def fail_all(self) -> None:
        """Ends every running request with an error and takes no other."""
        raise NotImplementedError

    def close(self) -> None:
        self.media.close()


class ChatModel(ServedModel):
    """A vision-language model behind an engine."""

    def __init__(self, deployed: Deployment, processor: Processor) -> None:
        super().__init__(deployed, processor.config.images)
        self.processor = processor
        self.sampling_defaults = defaults_of(self.config, processor)
        self.fingerprint = "fp_" + hashlib.sha256(f"{self.root}\0{processor.config}".encode()).hexdigest()[:12]
        self.token_texts = TokenTexts(processor.tokenizer)
        self.longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._commands = ThreadPoolExecutor(1, thread_name_prefix="engine-commands")
        self._prompts = ThreadPoolExecutor(MOST_PROCESSES, thread_name_prefix="prompt")
        self._asked: set[Choices] = set()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the engine has room for; before it is ready, what `kv_tokens`
        leaves of the model's."""
        if self._engine.facts is not None and self._engine.facts.context_length is not None:
            return self._engine.facts.context_length
        settings, positions = self._engine.spec.config, self.processor.context_length
        pages = settings.stated_pages
        return positions if pages is None else min(positions, pages * settings.page_size)

    @property
    def kv_bytes_per_token(self) -> int | None:
        """What the engine keeps of a token; None before it is ready."""
        return None if self._engine.facts is None else self._engine.facts.kv_bytes_per_token

    async def prompt(
        self,
        messages: Sequence[Message],
        layouts: Sequence[ImageLayout],
        arguments: Mapping[str, Any] | None,
        tools: Sequence[Tool] = (),
    ) -> Prompt:
        """`Processor.prompt`, on threads of its own: a chat template may take its time, and pixels do not wait for
        it."""
        return await self.aside(functools.partial(self.processor.prompt, messages, layouts, arguments, tools))

    async def aside(self, function: Callable[[], T]) -> T:
        """`function` on a thread of those that work with texts."""
        return await asyncio.get_running_loop().run_in_executor(self._prompts, function)

    async def call_format(self) -> CallFormat | None:
        """`Processor.call_format`, which tries the chat template at first."""
        return await self.aside(lambda: self.processor.call_format)

    async def check_constraint(self, constraint: Constraint) -> None:
        """UserError where no answer can match it; on the threads of prompts, as compiling takes some milliseconds."""
        await self.aside(functools.partial(check_constraint, constraint))

    async def ask(self, requests: Sequence[Request], use: ToolUse | None = None) -> Choices:
        """Hands one client's requests to the engine: n choices for each prompt, one prompt after the other. use: of the
        tools that their prompt tells of. The caller ends with `release`. EngineError (503) when the engine is not
        ready."""
        processor = self.processor
        answers = [
            Answer.raw(one.request_id, one.prompt, one.sampling, processor)
            if one.raw
            else Answer.of(one.request_id, one.prompt, one.sampling, processor, use)
            for one in requests
        ]
        choices = Choices(answers, self._engine, self._commands, len({id(one.prompt) for one in requests}))
        self._asked.add(choices)
        try:
            if self._ended:
                raise shutting_down()
            # on the one thread for commands: a full pipe would block the event loop, and an abort must not overtake
            submit = functools.partial(self._engine.submit, requests, choices.on_delta)
            await asyncio.get_running_loop().run_in_executor(self._commands, submit)
        except BaseException:
            self.release(choices)
            raise
        return choices

    def release(self, choices: Choices) -> None:
        self._asked.discard(choices)
        choices.close()

    def end(self, answer_id: str, error: Exception) -> bool:
        """Ends the request whose answer has that id with `error`; whether the engine has it."""
        found = [one for one in self._asked if one.answers[0].request_id.startswith(f"{answer_id}-")]
        for choices in found:
            choices.fail(error)
        return bool(found)

    def fail_all(self) -> None:
        self._ended = True
        for choices in self._asked:
            choices.fail(shutting_down())

    def close(self) -> None:
        super().close()
        self._prompts.shutdown(wait=False, cancel_futures=True)
        self._commands.shutdown(wait=False)


def defaults_of(config: ServerConfig, processor: Processor) -> SamplingParams:
    """What a request gets where it names nothing: the operator's temperature, the checkpoint's values, OpenAI's."""
    defaults = SamplingParams(temperature=1.0)
    if config.sampling_defaults == "model":
        defaults = sampling_defaults(processor.config, defaults)
    if config.default_temperature is not None:
        defaults = replace(defaults, temperature=config.default_temperature)
    return defaults


class EmbedModel(ServedModel):
    """Both towers of a SigLIP behind an engine."""

    def __init__(self, deployed: Deployment, facts: TwoTowerConfig, tokens: TextTokens) -> None:
        super().__init__(deployed, facts.images)
        self.tokens, self.width, self._length = tokens, facts.text.projection_size, facts.text.length
        self.texts = TextCache(self.config.text_cache_bytes)

    @property
    def context_length(self) -> int:
        return self._length

    @property
    def prepared_as(self) -> str:
        """How texts are prepared, in words."""
        rule = self.tokens.rule
        punctuation = "without punctuation" if rule.delete_punctuation else "with punctuation"
        return f"lower case, {punctuation}, cut and padded to {rule.length} tokens with id {rule.pad_id}"

    @property
    def calibration(self) -> Calibration:
        facts = self._engine.facts
        assert facts is not None, "vectors come from a loaded model"
        assert facts.calibration is not None
        return facts.calibration

    async def embed(self, items: Sequence[Item], batch: bool) -> list[Embedding | BaseException]:
        """For each item its embedding, or why it has none. batch: nobody waits for them."""
        if self._ended:
            raise shutting_down()
        futures = [asyncio.wrap_future(future) for future in self._engine.embed(items, batch)]
        return await asyncio.gather(*futures, return_exceptions=True)

    def fail_all(self) -> None:
        self._ended = True
        self._engine.fail_embeddings(shutting_down())


class Served:
    """The models of one server, at least one, and what they share: names, metrics, bytes in flight, the end.

    Beside a chat model, the one that embeds answers to the chat model's names too.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineProcess,
        metrics: Metrics,
        chat: ChatModel | None = None,
        embed: EmbedModel | None = None,
    ) -> None:
        self.config, self.engine, self.metrics, self.chat, self.embed = config, engine, metrics, chat, embed
        self.models: tuple[ServedModel, ...] = tuple(model for model in (chat, embed) if model is not None)
        self.name = self.models[0].name
        self.inflight_bytes = InflightBytes(config.max_inflight_bytes, metrics.inflight_bytes)
        self.clients, self.running = Clients(config), Running()
        self.draining = False
        self._created = int(time.time())
        if chat is not None:
            metrics.watch_engine(engine.stats)

    def check_name(self, name: str | None, model: ServedModel) -> None:
        """UserError (404) for a name that a client gives a model that has others."""
        if name is not None and name not in self._names(model):
            message = f"the model {name[:80]!r} is not served here; this is {model.name!r}"
            raise UserError(message, code="model_not_found", param="model", status=404)

    def cards(self) -> list[ModelCard]:
        return [self._card(model) for model in self.models]

    def card(self, name: str) -> ModelCard:
        """UserError (404) when no model has this name."""
        model = next((model for model in self.models if name in self._names(model)), self.models[0])
        self.check_name(name, model)
        return self._card(model)

    def refusal(self) -> EngineError | None:
        """Why no new request is taken, if so."""
        if self.draining:
            return shutting_down()
        if self.engine.state == "ready":
            return None
        if self.engine.state in ("starting", "restarting"):
            return overloaded(f"the model is {self.engine.state}; try again", code=f"engine_{self.engine.state}")
        return overloaded("the engine is down", code="engine_down")

    def abort(self, request_id: str, client: Client) -> bool:
        """Ends the client's own requests of that id, which is theirs or their answer's; whether there are any."""
        found = self.running.of(client, request_id)
        for context in found:
            context.aborted = True
            told = self.chat is not None and context.answer_id and self.chat.end(context.answer_id, aborted())
            if not told and context.work is not None:  # it has not reached the engine
                context.work.cancel()
        return bool(found)

    def fail_all(self) -> None:
        """Ends every running request with an error and takes no other, because the time to drain is over."""
        for model in self.models:
            model.fail_all()

    def close(self) -> None:
        for model in self.models:
            model.close()

    def _names(self, model: ServedModel) -> set[str]:
        """The first model has the server's aliases too, and whoever stands beside it has all of its names."""
        first = self.models[0]
        return {model.name, model.root, first.name, first.root, *self.config.model_aliases}

    def _card(self, model: ServedModel) -> ModelCard:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "siglane",
            "root": model.name,
            "parent": None,
            "max_model_len": model.context_length,
        }
