"""Launching a server: port and model are checked before anything heavy is loaded, then the engine is started."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from siglane.config.reader import read_json
from siglane.errors import UserError
from siglane.server import logs
from siglane.server.http import BACKLOG, Server, uvicorn_config
from siglane.server.traces import Traces, check_traces
from siglane.settings.keys import read_keys
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.weights.demo import FOLDERS
from siglane.weights.hub import ADAPTER_CONFIG, without_config

if TYPE_CHECKING:
    from siglane.engine.process.child import EngineSpec
    from siglane.server.served import Served

logger = logging.getLogger(__name__)

FILES = 65536  # one per connection; the usual limit of 1024 would refuse clients long before the queue does
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def preflight(config: ServerConfig, model: str) -> socket.socket:
    """The listening socket. UserError in well under a second when the port or the model cannot be had.

    Call it before importing anything that loads torch.
    """
    check_model_exists(model, "model")
    if config.tagger is not None and config.tagger not in FOLDERS:
        check_model_exists(config.tagger, "tagger")
    root = config.allowed_local_media_path
    if root is not None and not Path(root).is_dir():
        raise UserError(f"allowed_local_media_path {root!r} is not a folder", code="bad_option")
    if config.data_dir is not None:
        check_folder(config.data_dir)
    if config.api_keys is not None:
        read_keys(config.api_keys)
    if config.ssl_certfile is not None:
        check_certificate(config.ssl_certfile, config.ssl_keyfile)
    check_traces(config.otlp_traces_endpoint)
    return listen(config.host, config.port) if config.uds is None else listen_at(config.uds)


def check_folder(data_dir: Path) -> None:
    """UserError for one that cannot be made, or written."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data_dir {data_dir} cannot be made: {error.strerror}", code="bad_option") from error
    if not os.access(data_dir, os.W_OK | os.X_OK):
        raise UserError(f"data_dir {data_dir} cannot be written", code="bad_option")


def check_certificate(certificate: Path, key: Path | None) -> None:
    """UserError for files that are no certificate with its key."""
    try:
        # an empty password: OpenSSL would ask the terminal for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else str(error)
        names = f"ssl_certfile {certificate}" + (f" and ssl_keyfile {key}" if key else "")
        raise UserError(f"{names} cannot be used: {reason}", code="bad_option", param="ssl_certfile") from error


def check_model_exists(model: str, param: str) -> None:
    """UserError for a folder that is none, or holds no model; ConfigError for a config.json that cannot be read."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or not REPOSITORY_ID.fullmatch(model)):
        message = f"there is no folder {model!r}; give a model's folder or its hub id (owner/name)"
        raise UserError(message, code="model_not_found", param=param)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(without_config(folder), code="model_not_found", param=param)
    if (folder / "config.json").is_file():
        read_json(folder / "config.json")


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP: without it every answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; choose another one with --port"
            raise UserError(message, code="port_in_use") from error
        message = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise UserError(message, code="cannot_listen") from error
    return listener


def listen_at(path: Path) -> socket.socket:
    """A Unix socket, which takes the place of one that nobody listens at any more. Who may connect is the umask's."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and _is_abandoned(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            what = "another server listens there" if path.is_socket() else "there is a file, which is no socket"
            raise UserError(f"cannot listen at {path}: {what}", code="cannot_listen", param="uds") from error
        message = f"cannot listen at {path}: {error.strerror or error}"
        raise UserError(message, code="cannot_listen", param="uds") from error
    return listener


def _is_abandoned(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def serve(
    config: ServerConfig,
    spec: EngineSpec,
    listener: socket.socket | None = None,
    image_limits: ImageBudget = CHECKPOINT_LIMITS,
) -> int:
    """Serves until a signal, and returns the exit code: 0 after SIGTERM or Ctrl-C.

    listener: from `preflight`, when the caller has checked already; image_limits: the ceiling of the clients'. Raises
    UserError for a port, a model or limits that cannot be used, EngineError when the engine is given up.
    """
    listener = listener or preflight(config, spec.model)
    with contextlib.closing(listener):
        logs.begin(config.log_format, config.log_level)
        _raise_file_limit()

        from siglane.server.app import create_app  # loads torch, after everything that can fail at once

        spec = dataclasses.replace(spec, tagger=config.tagger)
        log = functools.partial(logs.configure, config.log_format, config.log_level)
        with serving(config, spec, image_limits, prepare=log) as served, _traces(config) as traces:
            server = Server(uvicorn_config(create_app(served, traces), config), served)
            server.stop_when_engine_fails()
            logger.info("serving %s on %s", served.name, address_of(listener, config))
            server.run([listener])
    if config.uds is not None:
        config.uds.unlink(missing_ok=True)
    if server.failure is not None:
        raise server.failure
    return 0


@contextlib.contextmanager
def _traces(config: ServerConfig) -> Iterator[Traces | None]:
    if config.otlp_traces_endpoint is None:
        yield None
        return
    with contextlib.closing(Traces(config.otlp_traces_endpoint)) as traces:
        yield traces


def address_of(listener: socket.socket, config: ServerConfig) -> str:
    """For people."""
    scheme, end = "http" if config.ssl_certfile is None else "https", f"{config.root_path}/v1"
    if config.uds is not None:
        return f"{config.uds} ({scheme}, {end})"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{end}"


@contextlib.contextmanager
def serving(
    config: ServerConfig,
    spec: EngineSpec,
    image_limits: ImageBudget = CHECKPOINT_LIMITS,
    restarts_allowed: int | None = None,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Served]:
    """The models of `spec` behind an engine that loads them while the server starts; closed at the end.

    image_limits: of the model itself; a tagger beside it reads images as its checkpoint says. restarts_allowed: of the
    engine in a few minutes, None for a server's few; prepare: what the engine's process calls first.
    """
    from siglane.engine.process.supervisor import EngineProcess
    from siglane.families.processor import load_processor
    from siglane.families.two_tower import has_both_towers, read_two_tower
    from siglane.server.metrics import Metrics
    from siglane.server.served import ChatModel, Deployment, EmbedModel, Served

    # what the engine's process opens is downloaded here, and facts that cannot be used are found
    checkpoint, siglip = spec.open(), spec.open_tagger()
    alone = has_both_towers(checkpoint)
    if alone and spec.tagger is not None:
        raise UserError(f"{spec.model} is a SigLIP itself; leave --tagger out", code="bad_option", param="tagger")
    tagger = spec.model if alone else spec.tagger
    two_tower = read_two_tower(checkpoint) if alone else None if siglip is None else read_two_tower(siglip)

    name, metrics = config.served_model_name or folder_of(spec.model), Metrics()
    engine = EngineProcess(spec, restarts_allowed, prepare=prepare)
    engine.start(wait=False)
    try:
        chat = embed = None
        if not alone:
            deployed = Deployment(name, spec.model, engine, config, metrics, image_limits)
            chat = ChatModel(deployed, load_processor(checkpoint))
        if tagger is not None and two_tower is not None:
            its_name, its_limits = (name, image_limits) if alone else (folder_of(tagger), CHECKPOINT_LIMITS)
            embed = EmbedModel(Deployment(its_name, tagger, engine, config, metrics, its_limits), *two_tower)
        with contextlib.closing(Served(config, engine, metrics, chat, embed)) as served:
            yield served
    finally:
        engine.close()


def folder_of(model: str) -> str:
    """The last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
