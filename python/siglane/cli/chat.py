"""`siglane chat`: a conversation with pictures in a terminal, with a server or with a model of one's own."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import mimetypes
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.cli.common import Argument, check_base_url
from siglane.cli.output import emit_line, printed
from siglane.cli.own_server import free_port, own_server
from siglane.errors import SiglaneError, UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import CommandOptions, above_zero, at_least, option

if TYPE_CHECKING:
    from siglane.cli.streaming import StreamingClient

LOAD_SECONDS = 1800.0
HELP = "/image PATH ... adds pictures to your next message, /clear forgets everything, /exit (or Ctrl-D) ends"
LINES = "\n\t"
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(CommandOptions):
    COMMAND = "chat"

    base_url: str | None = option(None, "an OpenAI-compatible server, with or without /v1; none: MODEL is served here")
    api_key: str | None = option(None, "its key; other users of this machine can read it from a flag", repr=False)
    image: tuple[str, ...] = option((), "pictures of the first message: paths or URLs", short="-i")
    system: str | None = option(None, "what the model is told before the conversation")
    max_tokens: int | None = option(None, "longest answer; none: the server's")
    temperature: float | None = option(None, "0 takes the likeliest token")
    answer_timeout: float = option(600.0, "seconds of silence after which an answer is lost")

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_base_url(self.base_url)
        above_zero("answer_timeout", self.answer_timeout)
        if self.max_tokens is not None:
            at_least("max_tokens", self.max_tokens, 1)

    @property
    def fields(self) -> dict[str, Any]:
        """Of every request."""
        named = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {name: value for name, value in named.items() if value is not None}


ARGUMENTS = (
    Argument("model", "MODEL", "a checkpoint folder, a hub id or `demo`; with --base-url: its name there", "?"),
)
OPTIONS = (OptionGroup(ChatOptions, "chat"),)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(ChatOptions, arguments)
    with _address(options, arguments.model) as url:
        model = arguments.model if options.base_url is not None else None
        talk = Conversation(options, url, model, out)
        for path in options.image:
            talk.add_image(path)
        return talk.run()


@contextlib.contextmanager
def _address(options: ChatOptions, model: str | None) -> Iterator[str]:
    """Of the server given, or of one that is started for MODEL."""
    if options.base_url is not None:
        yield options.base_url
        return
    if model is None:
        raise UserError("give MODEL, or --base-url of a server", code="bad_option")
    with contextlib.ExitStack() as stack:
        # on a terminal one sees how far the weights are
        log = sys.stderr if sys.stderr.isatty() else stack.enter_context(tempfile.TemporaryFile("w+"))
        yield stack.enter_context(own_server([model, "--log-level", "error"], free_port(), log, LOAD_SECONDS))


class Conversation:
    """What was said so far. Without a terminal every line of stdin is a message."""

    def __init__(self, options: ChatOptions, url: str, model: str | None, out: TextIO) -> None:
        self._options, self._url, self._model, self._out = options, url, model, out
        self._messages: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._person = sys.stdin.isatty()
        self._failed = False

    def run(self) -> int:
        """The exit code: 1 when a message without a person to see it got no answer."""
        if self._person:
            print(HELP, file=sys.stderr)
        for line in self._lines():
            command, _, rest = line.partition(" ")
            try:
                if command == "/exit":
                    break
                if command == "/clear":
                    self._messages, self._images = [], []
                elif command == "/image":
                    for path in _paths(rest):
                        self.add_image(path)
                elif command.startswith("/"):
                    raise UserError(f"{command} is no command; {HELP}", code="bad_command")
                elif line.strip():
                    self._ask(line)
            except SiglaneError as error:
                self._failed = True
                emit_line(f"siglane: error: {error}", sys.stderr)
        return 1 if self._failed and not self._person else 0

    def add_image(self, path: str) -> None:
        """UserError for a file that cannot be read."""
        self._images.append({"type": "image_url", "image_url": {"url": _url_of(path)}})

    def _lines(self) -> Iterator[str]:
        if not self._person:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its history and arrow keys
        while True:
            # `input` edits lines only where stdout is the terminal itself
            with contextlib.redirect_stdout(self._out):
                try:
                    yield input(f"{f'[{len(self._images)} images] ' if self._images else ''}> ")
                except EOFError:
                    print()
                    return

    def _ask(self, text: str) -> None:
        """The turn is kept when it was answered, if only in part."""
        content = [*self._images, {"type": "text", "text": text}]
        turn = {"role": "user", "content": content if self._images else text}
        system = [{"role": "system", "content": self._options.system}] if self._options.system else []
        body = {**self._options.fields, "messages": [*system, *self._messages, turn], "stream": True}
        said: list[str] = []
        try:
            asyncio.run(self._stream(body, said))
        except KeyboardInterrupt:  # stops the answer, not the conversation
            if not self._person:
                raise
            print(file=sys.stderr)
        finally:
            if said:
                self._out.write("\n")
                self._out.flush()
        if said:
            self._messages += [turn, {"role": "assistant", "content": "".join(said)}]
            self._images = []

    async def _stream(self, body: Mapping[str, Any], said: list[str]) -> None:
        from siglane.cli.streaming import StreamingClient

        async with StreamingClient(self._url, self._options.api_key, timeout=self._options.answer_timeout) as client:
            model = self._model or await self._first_model(client)
            async with contextlib.aclosing(client.pieces({"model": model, **body})) as pieces:
                async for piece in pieces:
                    if piece.reasoning and self._person:
                        sys.stderr.write(f"{DIM}{printed(piece.reasoning, keep=LINES)}{PLAIN}")
                        sys.stderr.flush()
                    if piece.text:
                        said.append(piece.text)
                        self._out.write(printed(piece.text, keep=LINES))
                        self._out.flush()

    async def _first_model(self, client: StreamingClient) -> str:
        self._model = await client.first_model()
        return self._model


def _paths(text: str) -> list[str]:
    """Words as a shell would read them; a name with spaces that is a file is one."""
    if Path(text.strip()).expanduser().is_file():
        return [text.strip()]
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}", code="bad_command") from error
    if not found:
        raise UserError("/image needs the path of a picture", code="bad_command")
    return found


def _url_of(path: str) -> str:
    """Of a file its content; an address stays one, and the server fetches it."""
    if path.startswith(("http://", "https://", "data:")):
        return path
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", code="image_not_found") from error
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
