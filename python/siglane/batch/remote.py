"""Any OpenAI-compatible server, as a batch asks it: each request again while the server cannot take it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self

import httpx2
import orjson

from siglane.batch.form import Answer, failed
from siglane.errors import EngineError, UserError

logger = logging.getLogger(__name__)

BUSY = (408, 409, 425, 429)  # and all of 5xx: what the openai client tries again
TURNED_AWAY = (429, 503)  # whatever the row is
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between tries, doubled each time
LONGEST_RETRY_AFTER = 300.0
CONNECT_SECONDS = 10.0
MAX_MESSAGE = 1000


class _Refusal(NamedTuple):
    """A try that may go better the next time. after: seconds that the server wants to be left alone."""

    answer: Answer
    reason: str
    after: float = 0.0


class RemoteServer:
    """A server behind `url`, with or without `/v1` at its end. An asynchronous context manager, which owns the
    connections.

    model: the name of rows that name none; slots: requests at one time; retries: of one row after its first try;
    timeout: seconds for one answer.
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, slots: int, retries: int, timeout: float
    ) -> None:
        self._root, self._model, self.slots, self._retries = url.rstrip("/").removesuffix("/v1"), model, slots, retries
        self._client = httpx2.AsyncClient(
            headers={"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=slots, max_keepalive_connections=slots),
        )
        self._heard = 0  # answers that were no refusals: whether it is the row or the server that fails
        self._said: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        """An error of 4xx is the row's; one that does not go away is the row's too while the server lives: others are
        answered, or it was not turned away and the server lists its models.

        EngineError when the server is gone; UserError for what is wrong with all rows: the key, the model,
        the address.
        """
        if body.get("stream"):
            return failed(400, "unsupported_field", "a batch streams nothing; leave stream out")
        try:
            content = json.dumps({"model": self._model, **body}, allow_nan=False).encode()
        except ValueError as error:
            return failed(400, "invalid_body", f"the body is not JSON: {error}")
        heard, tried = self._heard, 0
        while True:
            found = await self._try(self._root + url, content)
            if isinstance(found, Answer):
                self._heard += 1
                self._check(found, url, named="model" in body)
                return found
            if tried == self._retries:
                break
            self._say(found.reason)
            pause = min(FIRST_PAUSE * 2**tried, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            await asyncio.sleep(max(pause, min(found.after, LONGEST_RETRY_AFTER)))
            tried += 1
        if self._heard == heard and (found.answer.status in TURNED_AWAY or not await self._is_up()):
            raise EngineError(f"{self._root} answers nothing, tried {tried + 1} times: {found.reason}")
        return found.answer

    async def _try(self, url: str, content: bytes) -> Answer | _Refusal:
        try:
            response = await self._client.post(url, content=content)
        except httpx2.RequestError as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            return _Refusal(failed(502, "connection_failed", reason), reason)
        status = response.status_code
        answer = answer_of(status, response.content)
        again = response.headers.get("x-should-retry")  # OpenAI's, siglane sends it too
        if again != "true" and (again == "false" or not (status in BUSY or status >= 500)):
            return answer
        reason = f"{status}: {answer.body['error']['message']}"
        return _Refusal(answer, reason, _seconds(response.headers.get("retry-after", "")))

    async def _is_up(self) -> bool:
        try:
            found = await self._client.get(f"{self._root}/v1/models", timeout=CONNECT_SECONDS)
        except httpx2.RequestError:
            return False
        return found.status_code < 500

    def _check(self, answer: Answer, url: str, *, named: bool) -> None:
        """named: whether the row itself says which model it wants."""
        if answer.status < 300:
            return
        error = answer.body["error"]
        if answer.status < 400:
            message = f"{self._root} redirects {url}; give the address that it leads to as --base-url"
        elif answer.status == 401:
            message = f"{self._root} refuses the key: {error['message']}; set SIGLANE_BATCH_API_KEY"
        elif answer.status == 404 and not named and "model" in (error.get("param"), error["code"].partition("_")[0]):
            message = f"{self._root} has no model {self._model!r}: {error['message']}"
        else:
            return
        raise UserError(message, code="bad_option")

    def _say(self, reason: str) -> None:
        """One line when the kind of trouble changes."""
        if reason != self._said:
            logger.warning("%s: %s; trying again", self._root, reason)
            self._said = reason


def answer_of(status: int, content: bytes) -> Answer:
    """The server's body; of an error one with OpenAI's fields, whatever the server or a proxy before it writes."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        body = None
    if 200 <= status < 300:
        return Answer(status, body) if isinstance(body, dict) else failed(502, "bad_answer", "the answer is no JSON")
    given: Any = body.get("error", body) if isinstance(body, dict) else None
    if not isinstance(given, dict):
        given = {"message": given or content.decode(errors="replace").strip()}
    message = given.get("message") or given.get("detail") or "no reason given"
    code = next((one for one in (given.get("code"), given.get("type")) if one and isinstance(one, str)), None)
    error = {"type": "server_error" if status >= 500 else "invalid_request_error", "param": None, **given}
    error |= {"message": str(message)[:MAX_MESSAGE], "code": code or f"http_{status}"}
    return Answer(status, {"error": error})


def _seconds(text: str) -> float:
    """Of a Retry-After header, in seconds or a date; 0 for what is neither."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
