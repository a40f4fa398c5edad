"""The supervised engine in a real process: it streams, it dies and comes back, and it never outlives its parent."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from engine_kit import Asked
from waiting import PATIENCE, eventually

from siglane.engine.process import supervisor
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.load import load_engine
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import EngineError, UserError
from siglane.families.processor import load_processor
from siglane.families.prompt.renderers import Renderers
from siglane.settings.engine import EngineConfig
from siglane.types import DecodedImage, Finished, ImagePart, Message, Prompt, Request, SamplingParams, TokenDelta
from siglane.weights.hub import open_checkpoint

TEXT = Asked(Prompt(tuple(range(40, 60))))
LONG = 4000  # tokens: seconds of work, whatever the machine
HUNG_AFTER = 2.0  # seconds, for an engine that these tests stop


class Reader:
    """The callback of one request: keeps its deltas and tells when it began and when it ended."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.threads: set[int] = set()
        self.began, self.ended = threading.Event(), threading.Event()

    def __call__(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)
        self.threads.add(threading.get_ident())
        self.began.set()
        if delta.finished is not None:
            self.ended.set()

    def wait(self) -> Finished:
        """How it ended; exactly one delta says so, and it is the last."""
        assert self.ended.wait(PATIENCE), "no final delta"
        assert [delta for delta in self.deltas if delta.finished is not None] == [self.deltas[-1]]
        assert self.deltas[-1].finished is not None
        return self.deltas[-1].finished

    @property
    def tokens(self) -> list[int]:
        return [delta.token_id for delta in self.deltas if delta.token_id is not None]


def request(name: str, asked: Asked = TEXT, max_tokens: int = 5, **sampling: object) -> Request:
    params = SamplingParams(**{"ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return asked.request(name, params, max_tokens)


def ask(engine: EngineProcess, one: Request) -> Reader:
    reader = Reader()
    engine.submit([one], reader)
    return reader


@pytest.fixture(scope="module")
def spec(nvila_folder: Path) -> EngineSpec:
    return EngineSpec(str(nvila_folder), EngineConfig(device="cpu", threads=1, kv_tokens=16384))


@pytest.fixture(scope="module")
def picture(spec: EngineSpec) -> Asked:
    processor = load_processor(open_checkpoint(spec.model))
    decoded = DecodedImage.from_rgb(np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    (layout,) = processor.layouts([decoded.size])
    image = processor.patches(decoded, layout)
    return Asked(processor.prompt([Message("user", (ImagePart(0), "What is this?"))], [layout]), (image,))


@pytest.fixture(scope="module")
def answer(spec: EngineSpec) -> Callable[[Asked, int], list[int]]:
    """What the same engine says in this process."""
    engine = load_engine(spec.model, spec.config)

    def ask(asked: Asked, max_tokens: int) -> list[int]:
        engine.add(request("here", asked, max_tokens))
        tokens: list[int] = []
        while engine.has_work:
            tokens += [delta.token_id for delta in engine.step() if delta.token_id is not None]
        return tokens

    return ask


@pytest.fixture(scope="module")
def engine(spec: EngineSpec) -> Iterator[EngineProcess]:
    """One engine for all tests that leave it running."""
    engine = EngineProcess(spec)
    engine.start()
    yield engine
    engine.close()
    assert engine.state == "closed"


Said = Callable[[Asked, int], list[int]]


class TestServing:
    def test_tokens_are_streamed_as_they_are_computed(
        self, engine: EngineProcess, answer: Said, picture: Asked
    ) -> None:
        text, image = ask(engine, request("text")), ask(engine, request("image", picture))
        assert (text.wait().reason, image.wait().reason) == ("length", "length")
        assert text.tokens == answer(TEXT, 5)
        assert image.tokens == answer(picture, 5)
        assert [delta.token_id is not None for delta in text.deltas] == [True] * 5

    def test_threads_may_submit_at_the_same_time(self, engine: EngineProcess, answer: Said, picture: Asked) -> None:
        readers: dict[str, Reader] = {}
        start = threading.Barrier(4)

        def submit(thread: int) -> None:
            start.wait()
            for number in range(5):
                name = f"{thread}.{number}"
                readers[name] = ask(engine, request(name, picture if number % 2 else TEXT))

        threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = {0: answer(TEXT, 5), 1: answer(picture, 5)}
        for name, reader in readers.items():
            assert reader.wait().reason == "length"
            assert reader.tokens == expected[int(name[-1]) % 2]
        assert len(readers) == 20
        assert len({thread for reader in readers.values() for thread in reader.threads}) == 1

    def test_choices_of_one_prompt_take_its_pixels_over_the_pipe_once(
        self, engine: EngineProcess, answer: Said, picture: Asked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        send = engine._send
        monkeypatch.setattr(engine, "_send", lambda message: (sizes.append(sum(map(len, message))), send(message)))
        for count in (1, 8):
            readers = {f"{count}.{number}": Reader() for number in range(count)}

            def deliver(delta: TokenDelta, readers: dict[str, Reader] = readers) -> None:
                readers[delta.request_id](delta)

            engine.submit([request(name, picture) for name in readers], deliver)
            for reader in readers.values():
                assert reader.wait().reason == "length"
                assert reader.tokens == answer(picture, 5)
        pixels = sum(image.pixels.nbytes for image in picture.images)
        assert len(sizes) == 2
        assert sizes[0] > pixels
        assert sizes[1] - sizes[0] < pixels / 10

    def test_requests_are_taken_all_or_none(self, engine: EngineProcess, answer: Said) -> None:
        owner = ask(engine, request("owner", max_tokens=60))
        reader = Reader()
        with pytest.raises(ValueError, match="'owner' is in use"):
            engine.submit([request("new"), request("owner")], reader)
        assert owner.wait().reason == "length"
        assert owner.tokens == answer(TEXT, 60)
        assert reader.deltas == []
        assert ask(engine, request("new")).wait().reason == "length"

    def test_an_aborted_request_ends_and_its_neighbour_does_not(self, engine: EngineProcess, answer: Said) -> None:
        long, neighbour = (
            ask(engine, request("long", max_tokens=LONG)),
            ask(engine, request("neighbour", max_tokens=30)),
        )
        assert long.began.wait(PATIENCE)
        engine.abort("long")
        engine.abort("long")
        assert long.wait().reason == "abort"
        assert neighbour.wait().reason == "length"
        assert neighbour.tokens == answer(TEXT, 30)
        engine.abort("long")  # has ended
        engine.abort("never was")

    def test_the_figures_are_true_again_when_the_last_request_is_aborted(self, engine: EngineProcess) -> None:
        def idle() -> bool:
            stats = engine.stats()
            assert stats is not None
            return stats.running + stats.waiting == 0 and stats.pages_free + stats.pages_cached == stats.pages_total

        long = ask(engine, request("figures", max_tokens=LONG))
        eventually(lambda: not idle())
        engine.abort("figures")
        long.wait()
        eventually(idle)

    @pytest.mark.parametrize(
        ("bad", "code"),
        [
            (request("bad", Asked(Prompt(()))), "empty_prompt"),
            (request("bad", Asked(Prompt((5,) * 5000))), "context_length_exceeded"),
            (request("bad", logit_bias=((10**6, 1.0),)), "invalid_value"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_request_that_can_never_run_gets_its_reason(self, engine: EngineProcess, bad: Request, code: str) -> None:
        last = ask(engine, bad).wait()
        assert last.reason == "error"
        assert isinstance(last.error, UserError)
        assert last.error.code == code

    def test_a_request_that_cannot_even_be_queued_fails_alone(self, engine: EngineProcess) -> None:
        pid = engine.pid
        last = ask(engine, request("bad", seed="seven")).wait()
        assert isinstance(last.error, EngineError)
        assert ask(engine, request("good")).wait().reason == "length"
        assert engine.pid == pid

    def test_an_id_in_use_is_refused_and_its_owner_keeps_its_answer(self, engine: EngineProcess, answer: Said) -> None:
        owner = ask(engine, request("twice", max_tokens=60))
        with pytest.raises(ValueError, match="'twice' is in use"):
            ask(engine, request("twice"))
        assert owner.wait().reason == "length"
        assert owner.tokens == answer(TEXT, 60)
        assert ask(engine, request("twice")).wait().reason == "length"

    def test_a_callback_that_fails_harms_nobody(self, engine: EngineProcess, answer: Said) -> None:
        def fail(delta: TokenDelta) -> None:
            raise RuntimeError("a bug in the caller")

        engine.submit([request("fails")], fail)
        good = ask(engine, request("good"))
        assert good.wait().reason == "length"
        assert good.tokens == answer(TEXT, 5)

    def test_a_killed_engine_ends_its_requests_with_an_error_and_comes_back(
        self, engine: EngineProcess, answer: Said
    ) -> None:
        states: list[str] = []
        long, other, pid = Reader(), Reader(), engine.pid
        assert pid is not None

        def watched(delta: TokenDelta) -> None:
            if delta.finished is not None:
                states.append(engine.state)
                with pytest.raises(EngineError) as refused:
                    engine.submit([request("too early")], Reader())
                states.append(refused.value.code)
            long(delta)

        engine.submit([request("long", max_tokens=LONG)], watched)
        engine.submit([request("other", max_tokens=LONG)], other)
        assert long.began.wait(PATIENCE)
        assert other.began.wait(PATIENCE)
        os.kill(pid, signal.SIGKILL)
        for reader in (long, other):
            error = reader.wait().error
            assert isinstance(error, EngineError)
            assert (error.code, error.status) == ("engine_restarting", 503)
        assert states == ["restarting", "engine_restarting"]
        engine.wait_ready()
        assert engine.state == "ready"
        assert engine.pid != pid
        good = ask(engine, request("after"))
        assert good.wait().reason == "length"
        assert good.tokens == answer(TEXT, 5)


@pytest.fixture
def stuck(tmp_path: Path) -> Path:
    """A model whose loading never ends: its configuration is a pipe into which nobody writes."""
    os.mkfifo(tmp_path / "config.json")
    return tmp_path


def until_it_loads(stuck: Path) -> int:
    """Returns when a child reads the configuration of `stuck`; the descriptor keeps it waiting."""
    found: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # nobody has opened the other end
            found.append(os.open(stuck / "config.json", os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    eventually(is_read)
    return found[0]


class TestStarting:
    def test_a_model_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        spec = EngineSpec(str(tmp_path / "nowhere"), EngineConfig(device="cpu", threads=1))
        with pytest.raises(UserError) as here:
            load_engine(spec.model, spec.config)
        engine = EngineProcess(spec)
        with pytest.raises(UserError) as there:
            engine.start()
        assert (str(there.value), there.value.code) == (str(here.value), here.value.code)
        assert engine.state == "dead"
        with pytest.raises(EngineError) as refused:
            ask(engine, request("a"))
        assert (refused.value.code, refused.value.status) == ("engine_down", 503)
        engine.close()

    def test_no_template_is_rendered(self, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prompts are written elsewhere: an engine starts no process that would write them."""

        def render(self: Renderers, template: str, variables: object) -> NoReturn:
            raise AssertionError(template)

        monkeypatch.setattr(Renderers, "render", render)
        with pytest.raises(AssertionError, match="message"):
            load_processor(open_checkpoint(spec.model))
        load_engine(spec.model, spec.config)

    @pytest.mark.parametrize("kv_tokens", [10**13, 10**17])
    def test_a_cache_that_no_memory_holds_is_one_sentence(self, spec: EngineSpec, kv_tokens: int) -> None:
        engine = EngineProcess(replace(spec, config=replace(spec.config, kv_tokens=kv_tokens)))
        with pytest.raises(UserError, match=r"a KV cache of \d+ tokens takes .* GB, .*lower kv_tokens") as caught:
            engine.start()
        assert (caught.value.code, caught.value.exit_code) == ("kv_cache_too_large", 2)
        assert "\n" not in caught.value.message
        engine.close()

    def test_one_that_dies_too_often_is_given_up(self, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "RESTARTS_ALLOWED", 1)
        engine, killed = EngineProcess(spec), []
        engine.start(wait=False)
        kill_until_dead(engine, killed)
        with pytest.raises(EngineError) as caught:
            engine.wait_ready()
        assert caught.value.code == "engine_dead"
        assert "died 2 times in 300 seconds, the last time killed by SIGKILL" in caught.value.message
        assert len(killed) == 2
        assert engine.wait_end() is caught.value

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
    def test_twenty_deaths_leave_nothing_behind(self, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        """No descriptor, no thread, no dead process that nobody has collected; each is told in one line."""
        monkeypatch.setattr(supervisor, "RESTARTS_ALLOWED", 20)
        engine, killed = EngineProcess(spec), []
        engine.start(wait=False)
        eventually(lambda: engine.pid is not None)
        held = [(descriptors(), threading.active_count())]
        kill_until_dead(engine, killed)
        engine.close()
        assert len(killed) == 21
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in killed))
        eventually(lambda: threading.active_count() <= held[0][1])
        gc.collect()
        assert descriptors() <= held[0][0]

    def test_one_that_cannot_be_started_is_given_up(self, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: object) -> None:
            raise OSError("no more processes")

        engine = EngineProcess(spec)
        monkeypatch.setattr(engine._context, "Process", refuse)
        with pytest.raises(EngineError, match="no more processes") as caught:
            engine.start()
        assert caught.value.code == "engine_start"
        engine.close()


def kill_until_dead(engine: EngineProcess, killed: list[int]) -> None:
    """One child after the other."""

    def killed_until_dead() -> bool:
        pid = engine.pid
        if pid is not None and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return engine.state == "dead"

    eventually(killed_until_dead)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def misbehave(flag: Path, seconds: float) -> None:
    """In the child, before it loads: while `flag` exists, a layer of the language model takes `seconds`."""
    from siglane.lm.qwen import DecoderBlock

    forward = DecoderBlock.forward

    def slowly(self: DecoderBlock, *arguments: object) -> object:
        end = time.monotonic() + seconds
        while flag.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return forward(self, *arguments)

    DecoderBlock.forward = slowly  # type: ignore[assignment, method-assign]


def never_load(signal_number: int | None) -> None:
    """In the child: loading waits for what does not come, or the whole process is stopped meanwhile."""
    from siglane.engine.process import child

    def wait(*_: object) -> NoReturn:
        if signal_number is not None:
            os.kill(os.getpid(), signal_number)
        while True:
            threading.Event().wait()

    child._load = wait


def test_loads_that_stand_still_are_given_up(spec: EngineSpec) -> None:
    """By a deadlock, and because the whole process is stopped; at the same time, for both take as long as the limit.
    One sentence each, and no other try."""
    reasons = {
        None: "the model does not load: nothing was computed or read for 2 seconds; see the log, load_timeout",
        signal.SIGSTOP: (
            "the engine process gave no sign of life for 2 seconds of loading and was ended; see load_timeout"
        ),
    }
    spec = replace(spec, config=replace(spec.config, load_timeout=2.0))
    engines = {stop: EngineProcess(spec, prepare=functools.partial(never_load, stop)) for stop in reasons}
    for engine in engines.values():
        engine.start(wait=False)
    for stop, engine in engines.items():
        with pytest.raises(EngineError) as caught:
            engine.wait_ready()
        assert (caught.value.message, caught.value.code) == (reasons[stop], "engine_start")
        assert engine.pid is not None
        eventually(lambda pid=engine.pid: ended(pid))  # type: ignore[misc]
        engine.close()


@pytest.mark.slow
class TestHanging:
    """One engine: it is stopped, then it hangs in a layer, then its layers are only slow."""

    @pytest.fixture(scope="class")
    def flag(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("flag") / "it"

    @pytest.fixture(scope="class")
    def watched(self, spec: EngineSpec, flag: Path) -> Iterator[EngineProcess]:
        config = replace(spec.config, engine_timeout=HUNG_AFTER)
        engine = EngineProcess(replace(spec, config=config), prepare=functools.partial(misbehave, flag, 1e9))
        engine.start()
        yield engine
        engine.close()

    def assert_replaced(self, engine: EngineProcess, answer: Said, lost: Reader, pid: int | None) -> None:
        error = lost.wait().error
        assert isinstance(error, EngineError)
        assert (error.code, error.status) == ("engine_restarting", 503)
        engine.wait_ready()
        assert engine.pid != pid
        assert ended(pid)
        after = ask(engine, request("after"))
        assert after.wait().reason == "length"
        assert after.tokens == answer(TEXT, 5)

    def test_a_stopped_one_is_replaced(
        self, watched: EngineProcess, answer: Said, caplog: pytest.LogCaptureFixture
    ) -> None:
        pid = watched.pid
        assert pid is not None
        long = ask(watched, request("long", max_tokens=LONG))
        assert long.began.wait(PATIENCE)
        os.kill(pid, signal.SIGSTOP)
        waiting = ask(watched, request("waiting"))
        self.assert_replaced(watched, answer, long, pid)
        assert isinstance(waiting.wait().error, EngineError)
        assert "the engine process died, after a time without a sign of life; it is started again" in caplog.messages

    def test_one_without_work_is_replaced_too(self, watched: EngineProcess, answer: Said) -> None:
        """Its next client does not pay for it."""
        pid = watched.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: watched.pid != pid)
        watched.wait_ready()
        after = ask(watched, request("after"))
        assert after.wait().reason == "length"
        assert after.tokens == answer(TEXT, 5)

    def test_one_whose_forward_hangs_is_replaced(
        self, watched: EngineProcess, answer: Said, flag: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its process lives, answers to signals and beats; only its layers do not move."""
        pid = watched.pid
        flag.touch()
        lost = ask(watched, request("lost"))
        lost.wait()
        flag.unlink()
        self.assert_replaced(watched, answer, lost, pid)
        assert "the engine process died, because it hung; it is started again" in caplog.messages

    def test_an_idle_one_is_left_alone(self, watched: EngineProcess, answer: Said) -> None:
        pid = watched.pid
        time.sleep(HUNG_AFTER * 1.5)
        assert ask(watched, request("late")).wait().reason == "length"
        assert watched.pid == pid

    def test_one_that_is_stopped_can_be_closed(self, watched: EngineProcess) -> None:
        """Also with a full connection, and while a thread waits to write into it. The last test of this engine."""
        pid = watched.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        large = Asked(Prompt(tuple(range(40, 60)) * 100))
        readers: list[Reader] = []

        def fill() -> None:
            with contextlib.suppress(EngineError):
                for number in range(1000):
                    readers.append(ask(watched, request(f"large {number}", large)))

        sender = threading.Thread(target=fill)
        sender.start()
        eventually(lambda: len(readers) > 5)
        begin = time.monotonic()
        watched.close()
        assert time.monotonic() - begin < 3 * supervisor.CLOSE_SECONDS
        sender.join(PATIENCE)
        assert not sender.is_alive()
        for reader in readers:
            assert isinstance(reader.wait().error, EngineError)
        assert ended(pid)


@pytest.mark.slow
def test_a_slow_engine_is_no_hung_one(spec: EngineSpec, answer: Said, tmp_path: Path) -> None:
    """Each layer takes a good part of the limit, a forward more than the whole."""
    (tmp_path / "it").touch()
    config = replace(spec.config, engine_timeout=HUNG_AFTER)
    engine = EngineProcess(replace(spec, config=config), prepare=functools.partial(misbehave, tmp_path / "it", 1.2))
    engine.start()
    try:
        pid, begin = engine.pid, time.monotonic()
        slow = ask(engine, request("slow", max_tokens=2))
        assert slow.wait().reason == "length"
        assert slow.tokens == answer(TEXT, 2)
        assert time.monotonic() - begin > 2 * HUNG_AFTER
        assert engine.pid == pid
    finally:
        engine.close()


class TestClosing:
    def test_it_waits_for_what_ends_in_time_and_ends_the_rest(self, spec: EngineSpec, answer: Said) -> None:
        engine = EngineProcess(spec)
        engine.start()
        short, long = ask(engine, request("short")), ask(engine, request("long", max_tokens=LONG))
        assert long.began.wait(PATIENCE)
        engine.close(drain=1.5)
        assert short.wait().reason == "length"
        assert short.tokens == answer(TEXT, 5)
        assert len(long.tokens) > 5
        error = long.wait().error
        assert isinstance(error, EngineError)
        assert (error.code, error.status) == ("engine_down", 503)
        assert engine.state == "closed"
        with pytest.raises(EngineError):
            ask(engine, request("late"))

    @pytest.mark.slow
    def test_it_does_not_wait_longer_than_it_has_to(self, spec: EngineSpec) -> None:
        engine = EngineProcess(spec)
        engine.start()
        short = ask(engine, request("short", max_tokens=50))
        begin = time.monotonic()
        engine.close(drain=PATIENCE)
        assert time.monotonic() - begin < PATIENCE / 2
        assert short.wait().reason == "length"

    def test_while_the_model_loads_it_ends_at_once(self, stuck: Path) -> None:
        engine = EngineProcess(EngineSpec(str(stuck), EngineConfig(device="cpu", threads=1)))
        engine.start(wait=False)
        descriptor = until_it_loads(stuck)
        begin = time.monotonic()
        engine.close()
        assert time.monotonic() - begin < supervisor.CLOSE_SECONDS
        os.close(descriptor)
        assert ended(engine.pid)
        with pytest.raises(EngineError) as caught:
            engine.wait_ready()
        assert caught.value.code == "engine_closed"

    def test_one_that_was_never_started_can_be_closed(self, spec: EngineSpec) -> None:
        EngineProcess(spec).close()


def ended(pid: int | None) -> bool:
    """Gone, or dead and not yet collected by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between opening and reading
        return True


PARENT = """
import sys
from threading import Event
from siglane.settings.engine import EngineConfig
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess

if __name__ == "__main__":
    engine = EngineProcess(EngineSpec(sys.argv[1], EngineConfig(device="cpu", threads=1, kv_tokens=1024)))
    engine.start(wait=sys.argv[2] == "ready")
    print("started", engine.pid, flush=True)
    Event().wait()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
class TestOrphans:
    """The child inherits the parent's output, which therefore ends when both are gone."""

    def start_parent(self, model: Path | str, phase: str, folder: Path) -> subprocess.Popen[str]:
        script = folder / "parent.py"
        script.write_text(PARENT)
        return subprocess.Popen([sys.executable, script, model, phase], stdout=subprocess.PIPE, text=True)

    @pytest.mark.slow
    def test_an_engine_without_work_ends_with_its_parent(self, spec: EngineSpec, tmp_path: Path) -> None:
        with self.start_parent(spec.model, "ready", tmp_path) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline().split()[1])
            parent.kill()
            parent.communicate(timeout=PATIENCE)
        assert ended(child)

    @pytest.mark.slow
    def test_an_engine_that_is_busy_ends_with_its_parent_too(self, stuck: Path) -> None:
        """It does not look at its pipe while it loads or computes."""
        with self.start_parent(stuck, "loading", stuck) as parent:
            descriptor = until_it_loads(stuck)
            parent.kill()
            try:
                parent.communicate(timeout=PATIENCE)
            finally:
                os.close(descriptor)  # a child that was not told would now read to the end


PARENT_THAT_ASKS = """
import sys
from test_process import Reader, request
from siglane.settings.engine import EngineConfig
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess

if __name__ == "__main__":
    config = EngineConfig(device="cpu", threads=1, kv_tokens=8192, engine_timeout=2.0)
    engine = EngineProcess(EngineSpec(sys.argv[1], config))
    engine.start()
    long = Reader()
    engine.submit([request("long", max_tokens=4000)], long)
    long.began.wait()
    print(engine.pid, flush=True)
    sys.stdin.readline()
    print(long.wait().reason, len(long.tokens), engine.pid, flush=True)
    engine.close()
"""


@pytest.mark.slow
def test_a_parent_that_was_stopped_finds_its_engine_as_it_was(spec: EngineSpec, tmp_path: Path) -> None:
    """For longer than either side waits for the other: the child's connection is full meanwhile, the parent hears
    nothing. Neither takes that for a hang."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT_THAT_ASKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, spec.model]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as parent:  # type: ignore[call-overload]
        try:
            child = int(parent.stdout.readline())
            for pids in ([parent.pid], [parent.pid, child]):
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                time.sleep(3)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                time.sleep(0.1)
            out, _ = parent.communicate("\n", timeout=PATIENCE)
        finally:
            parent.kill()
    assert out.split() == ["length", "4000", str(child)]
