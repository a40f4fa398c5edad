"""GET one picture from a web server on behalf of a stranger.

Every address a name resolves to must be public, and the connection goes to exactly those addresses: a name that
resolves differently a moment later, a redirect, or an odd spelling of 127.0.0.1 cannot reach the own network. One
deadline covers name resolution, TLS and a server that sends a byte per second. No proxies, cookies or credentials.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache, partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from ssl import SSLContext
from threading import Lock, Thread
from typing import Any, NoReturn, TypeVar

import httpcore2
import httpx2

from siglane.errors import ImageError
from siglane.media.policy import MediaPolicy

Result = TypeVar("Result")

_HOST = re.compile(rb"[a-z0-9._:-]+", re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_HEADERS = ((b"Accept", b"image/*,*/*;q=0.5"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"siglane"))

# IPv6 networks whose addresses lead to an IPv4 address, and how many bits stand behind it
_EMBEDDED_IPV4 = (
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# special networks that `is_global` takes for public in one Python version or another; 168.63.129.16 answers
# virtual machines in Azure with their secrets
_SPECIAL = tuple(
    ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "3fff::/20")
)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address belongs to the public internet, whatever form it is wrapped in."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        for network, shift in _EMBEDDED_IPV4:
            if ip in network:
                return is_public(str(IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _SPECIAL))


_Flight = tuple[str, MediaPolicy, str]  # URL, what it may be, tenant
_in_flight: dict[_Flight, Future[bytes]] = {}
_in_flight_lock = Lock()


def get(url: str, policy: MediaPolicy, tenant: str | None) -> bytes:
    """The body behind `url`. Callers of one tenant that ask for one URL at the same time share one download. Tenants do
    not, because the time it takes would tell what others look at; nor does anybody whose tenant is not known (None)."""
    if tenant is None:
        return _download(url, policy)
    key = (url, policy, tenant)
    with _in_flight_lock:
        running = _in_flight.get(key)
        mine = Future[bytes]()
        if running is None:
            _in_flight[key] = mine
    if running is not None:
        return running.result()
    try:
        _settle(mine, lambda: _download(url, policy))
    finally:
        with _in_flight_lock:
            del _in_flight[key]
    return mine.result()


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _download(url: str, policy: MediaPolicy) -> bytes:
    deadline = _Deadline(policy.timeout)
    try:
        here = _parse(url)
        for _ in range(policy.max_redirects + 1):
            answer = _request(here, _resolve(here, policy, deadline), policy, deadline)
            if isinstance(answer, bytes):
                return answer
            here = _follow(here, answer)
    except (TimeoutError, httpcore2.TimeoutException):
        message = f"the file was not received within {policy.timeout:g} seconds"
        raise ImageError(message, code="image_fetch_timeout") from None
    except (OSError, UnicodeError, httpcore2.NetworkError, httpcore2.ProtocolError):
        raise _failed("its server cannot be reached or breaks the connection") from None
    raise _failed(f"more than {policy.max_redirects} redirects")


def _failed(reason: str) -> ImageError:
    return ImageError(f"the file cannot be fetched: {reason}", code="image_fetch_failed")


def _parse(text: str) -> httpx2.URL:
    """The one reading of a URL: its parts are checked here, and the same parts are sent."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        _refuse_url()
    if url.scheme not in ("http", "https"):
        raise ImageError("the media URL redirects to something that is not http", code="unsupported_url_scheme")
    if url.userinfo:
        raise ImageError("media URLs with a user name or password are refused", code="image_url_forbidden")
    if "\\" in text or not _HOST.fullmatch(url.raw_host) or not 0 < _port(url) < 2**16:
        _refuse_url()
    return url


def _refuse_url() -> NoReturn:
    raise ImageError("the media URL is malformed", code="image_url_forbidden") from None


def _port(url: httpx2.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def _follow(here: httpx2.URL, location: str) -> httpx2.URL:
    try:
        joined = here.join(location)
    except (httpx2.InvalidURL, ValueError):
        _refuse_url()
    there = _parse(str(joined))
    if here.scheme == "https" and there.scheme == "http":
        raise ImageError("the media URL redirects from https to http", code="image_url_forbidden")
    return there


def _resolve(url: httpx2.URL, policy: MediaPolicy, deadline: _Deadline) -> tuple[str, ...]:
    """Every address of the URL's host, asked for once; all of them must be allowed."""
    resolved = Future[list[Any]]()
    lookup = partial(socket.getaddrinfo, url.raw_host.decode("ascii"), _port(url), type=socket.SOCK_STREAM)
    # a thread of its own, abandoned at the deadline: name resolution cannot be interrupted
    Thread(target=_settle, args=(resolved, lookup), daemon=True).start()
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in resolved.result(deadline.left())))
    if not policy.allow_private_addresses and not all(is_public(address) for address in addresses):
        raise ImageError("the media URL leads to a private or reserved address", code="image_url_forbidden")
    return addresses


def _request(url: httpx2.URL, addresses: tuple[str, ...], policy: MediaPolicy, deadline: _Deadline) -> bytes | str:
    """The body, or the location of a redirect."""
    target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = [(b"Host", url.netloc), *_CONTENT_HEADERS]
    backend = _PinnedBackend(addresses, deadline)
    with (
        httpcore2.ConnectionPool(ssl_context=_ssl_context(), network_backend=backend) as pool,
        pool.stream("GET", target, headers=headers) as response,
    ):
        fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in fields:
            return fields[b"location"]
        if response.status != 200:
            raise _failed(f"its server answered with status {response.status}")
        if fields.get(b"content-encoding", "identity").lower() != "identity":
            raise _failed("its server compressed it although asked not to")
        return _read_body(response.iter_stream(), fields.get(b"content-length", ""), policy.max_bytes)


def _read_body(chunks: Iterable[bytes], declared: str, max_bytes: int) -> bytes:
    too_large = ImageError(f"the file is larger than {max_bytes} bytes", code="image_too_large")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


_ssl_context = cache(httpcore2.default_ssl_context)


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError when it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _PinnedBackend(httpcore2.NetworkBackend):
    """Connects to the given addresses, one after the other; the URL's host is left to TLS and the Host header."""

    def __init__(self, addresses: tuple[str, ...], deadline: _Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception = httpcore2.ConnectError("no address")
        for tried, address in enumerate(self._addresses):
            share = self._deadline.left() / (len(self._addresses) - tried)
            try:
                stream = httpcore2.SyncBackend().connect_tcp(address, port, timeout=share)
                return _DeadlineStream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _DeadlineStream(httpcore2.NetworkStream):
    """A connection on which no wait outlives the deadline; timeouts per read would let a slow server go on for ever."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left())
        return _DeadlineStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
