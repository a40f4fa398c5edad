"""What all routes of one server share."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from siglane.config.images import ImageFacts
from siglane.engine.answer import Answer
from siglane.engine.process import EngineProcess
from siglane.engine.sampling import sampling_defaults
from siglane.errors import EngineError, UserError
from siglane.families.processor import Processor
from siglane.server.choices import Choices
from siglane.server.context import InflightBytes
from siglane.server.errors import overloaded
from siglane.server.logprobs import TokenTexts
from siglane.server.media import MediaLoader
from siglane.server.metrics import Metrics
from siglane.server.middleware import shutting_down
from siglane.server.replies import ModelCard
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import Request, SamplingParams


class Backend(Protocol):
    """What computes: an `EngineProcess`, or an `Embedder`."""

    @property
    def state(self) -> str: ...

    def wait_ready(self) -> None: ...


class ModelState(ABC):
    """One model behind one server. Lives on one event loop; `model` is its folder or hub id, `facts` what makes its
    answers, `budget` the ceiling of its clients'; beside: another model of the same server, whose figures and limits it
    shares and to whose names it answers too."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens that a request may have."""

    def __init__(
        self,
        config: ServerConfig,
        model: str,
        facts: object,
        images: ImageFacts | None,
        engine: Backend,
        budget: ImageBudget,
        beside: ModelState | None = None,
    ) -> None:
        self.config, self.engine = config, engine
        folder = model.rstrip("/").rpartition("/")[2]
        self.name = folder if beside else config.served_model_name or folder
        others = beside.names if beside else config.model_aliases
        self.names: frozenset[str] = frozenset({self.name, model, *others})
        self.root = model
        self.created = int(time.time())
        self.fingerprint = "fp_" + hashlib.sha256(f"{model}\0{facts}".encode()).hexdigest()[:12]
        self.metrics: Metrics = beside.metrics if beside else Metrics()
        self.budget: InflightBytes = (
            beside.budget if beside else InflightBytes(config.max_inflight_bytes, self.metrics.inflight_bytes)
        )
        self.media = MediaLoader(config, images, budget)
        self.company: tuple[ModelState, ...] = ()  # further models of the same server, which end with this one
        self.draining = False
        self.ended = False

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            shown = repr(name[:80])
            message = f"the model {shown} is not served here; this is {self.name!r}"
            raise UserError(message, code="model_not_found", param="model", status=404)

    @property
    def card(self) -> ModelCard:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "siglane",
            "root": self.root,
            "parent": None,
            "max_model_len": self.context_length,
        }

    def refusal(self) -> EngineError | None:
        """Why no new request is taken, if so."""
        if self.draining:
            return shutting_down()
        if self.engine.state == "ready":
            return None
        if self.engine.state in ("starting", "restarting"):
            return overloaded(f"the model is {self.engine.state}; try again", code=f"engine_{self.engine.state}")
        return overloaded("the engine is down", code="engine_down")

    def fail_all(self) -> None:
        """Ends every running request with an error and takes no other, because the time to drain is over."""
        self.ended = True
        for other in self.company:
            other.fail_all()

    def close(self) -> None:
        self.media.close()
        for other in self.company:
            other.close()


class ServerState(ModelState):
    """A vision-language model, which chats."""

    def __init__(
        self,
        config: ServerConfig,
        model: str,
        processor: Processor,
        engine: EngineProcess,
        budget: ImageBudget = CHECKPOINT_LIMITS,
    ) -> None:
        super().__init__(config, model, processor.config, processor.config.images, engine, budget)
        self.processor = processor
        self.sampling_defaults = defaults_of(config, processor)
        self.metrics.watch_engine(engine.stats)
        self.token_texts = TokenTexts(processor.tokenizer)
        self.longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._process = engine
        self._commands = ThreadPoolExecutor(1, thread_name_prefix="engine-commands")
        self._asked: set[Choices] = set()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the model's, or the fewer that its engine has room for."""
        positions, room = self.processor.context_length, self._process.context_length
        return positions if room is None else min(positions, room)

    async def ask(self, requests: Sequence[Request]) -> Choices:
        """Hands one client's requests (its n choices) to the engine. The caller ends with `release`. EngineError (503)
        when the engine is not ready."""
        answers = [Answer.of(one.request_id, one.prompt, one.sampling.stop, self.processor) for one in requests]
        choices = Choices(answers, self._process, self._commands)
        self._asked.add(choices)
        try:
            if self.ended:
                raise shutting_down()
            # on the one thread for commands: a full pipe would block the event loop, and an abort must not overtake
            submit = functools.partial(self._process.submit, requests, choices.on_delta)
            await asyncio.get_running_loop().run_in_executor(self._commands, submit)
        except BaseException:
            self.release(choices)
            raise
        return choices

    def release(self, choices: Choices) -> None:
        self._asked.discard(choices)
        choices.close()

    def fail_all(self) -> None:
        super().fail_all()
        for choices in self._asked:
            choices.fail(shutting_down())

    def close(self) -> None:
        super().close()
        self._commands.shutdown(wait=False)


def defaults_of(config: ServerConfig, processor: Processor) -> SamplingParams:
    """What a request gets where it names nothing: the operator's temperature, the checkpoint's values, OpenAI's."""
    defaults = SamplingParams(temperature=1.0)
    if config.sampling_defaults == "model":
        defaults = sampling_defaults(processor.config, defaults)
    if config.default_temperature is not None:
        defaults = replace(defaults, temperature=config.default_temperature)
    return defaults
