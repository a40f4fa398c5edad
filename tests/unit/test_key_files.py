"""The file of API keys, and what each key may have."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from siglane.errors import UserError
from siglane.server.clients import Bucket, Client, Clients, owner_of
from siglane.server.errors import RateLimited, error_response
from siglane.settings.keys import ApiKey, KeyLimits, read_keys
from siglane.settings.server import ServerConfig

SECRET = "sk-s3cret"


def write(folder: Path, text: str, name: str = "keys.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_one_key_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, f"\ufeff# ours\n\n  {SECRET}  \r\nsecond key\n", "keys")
    assert read_keys(file) == (ApiKey(key=SECRET), ApiKey(key="second key"))
    assert SECRET not in repr(read_keys(file))


def test_a_table_for_each(tmp_path: Path) -> None:
    text = f"""
    [[keys]]
    key = "{SECRET}"
    name = "search team"
    cache_salt = "shared"
    requests_per_minute = 600
    patches_per_minute = 2_000_000
    concurrency = 8
    max_stored_bytes = "2G"
    max_queued_rows = 1000
    [[keys]]
    key = "b"
    """
    first, second = read_keys(write(tmp_path, text))
    limits = {"requests_per_minute": 600, "patches_per_minute": 2_000_000, "concurrency": 8}
    stored = {"max_stored_bytes": 2 << 30, "max_queued_rows": 1000}
    assert first == ApiKey(key=SECRET, name="search team", cache_salt="shared", **limits, **stored)
    assert second == ApiKey(key="b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must hold [[keys]] tables"),
        ("keys = []", "has no key: the server would be open to all"),
        ("keys = 1", "must hold [[keys]] tables"),
        (f'[[keys]]\nkey = "{SECRET}"\n[[keys]]\nkey = "{SECRET}"', "has a key twice"),
        ('[[keys]]\nkey = "a"\nname = "x"\n[[keys]]\nkey = "b"\nname = "x"', "has a name twice"),
        (f'[[keys]]\nkey = "{SECRET}"\nconcurency = 3', "key 'concurency' is not known"),
        (f'[[keys]]\nkey = "{SECRET}"\nconcurrency = 0', "concurrency must be at least 1, got 0"),
        (f'[[keys]]\nkey = "{SECRET}"\nconcurrency = true', "concurrency must be int, got True"),
        (f'[[keys]]\nkey = "{SECRET}"\nname = ""', "name must be printable and of 1 to 64 characters"),
        ('[[keys]]\nkey = "a"\ncache_salt = "a\\u0000b"', "cache_salt must be printable"),
        (f'[[keys]]\nkey = "{SECRET}\\n"', "a key must be printable ASCII and not empty"),
        ("[[keys]]\nkey = 123456789", "key must be there, a text in quotes"),
        ('[[keys]]\nname = "x"', "key must be there, a text in quotes"),
        ("[[keys]]\nkey = sk-s3cret", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_without_showing_a_key(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_keys(write(tmp_path, text))
    assert complaint in caught.value.message
    assert SECRET not in caught.value.message
    assert "123456789" not in caught.value.message


def test_what_is_no_file_of_keys(tmp_path: Path) -> None:
    for path, complaint in [
        (tmp_path / SECRET, "cannot be read: No such file or directory"),
        (write(tmp_path, f'[[keys]]\nkey = "{SECRET}"', "keys.txt"), "line 1 of api_keys looks like TOML"),
        (write(tmp_path, "# nobody\n", "empty"), "has no key"),
        (write(tmp_path, f"{SECRET}é", "ascii"), "line 1 of api_keys: a key must be printable ASCII"),
    ]:
        with pytest.raises(UserError) as caught:
            read_keys(path)
        assert complaint in caught.value.message
        assert SECRET not in caught.value.message


def test_a_bucket_refills_and_takes_what_is_larger_than_itself() -> None:
    clock = [0.0]
    bucket = Bucket(60, lambda: clock[0])
    for _ in range(60):
        assert bucket.wait() == 0
        bucket.take(1)
    assert bucket.wait() == pytest.approx(1)
    clock[0] += 1
    assert bucket.wait() == 0
    bucket.take(100)
    assert bucket.wait() == pytest.approx(100)
    clock[0] += 1e6  # never fuller than a minute's
    assert bucket.wait() == 0
    bucket.take(30)
    assert bucket.wait(keep=0.5) == pytest.approx(1)
    assert Bucket(1, lambda: clock[0]).wait(keep=0.5) == 0  # a batch gets one in the end
    none = Bucket(None)
    none.take(10**9)
    assert none.wait() == 0


def test_a_client_is_refused_within_its_limits_alone() -> None:
    client, other = Client(limits=KeyLimits(requests_per_minute=2, concurrency=1)), Client()
    with client.entered():
        with pytest.raises(RateLimited, match="1 requests at a time; try again later"):
            client.check()
        with other.entered(), other.entered():
            pass
    with client.entered():
        pass
    with pytest.raises(RateLimited, match="2 requests a minute") as caught:
        client.check()
    response = error_response(caught.value)
    assert (response.status_code, response.headers["retry-after"]) == (429, "30")
    assert b'"type":"rate_limit_error"' in response.body
    with pytest.raises(RateLimited, match="half of the requests a minute"):
        client.take_row()


def test_patches_are_refused_after_those_that_were_too_many() -> None:
    client = Client(limits=KeyLimits(patches_per_minute=100))
    client.take_patches(1000, batch=False)
    client.take_patches(0, batch=False)  # a text goes on
    with pytest.raises(RateLimited, match="100 image patches a minute"):
        client.take_patches(1, batch=False)


def test_salts() -> None:
    """A request's own divides what its key has, and can never be another key's."""
    assert (Client().salt(None), Client().salt("own")) == ("", "own")
    one, two, bare = (Client(owner, salt=salt) for owner, salt in (("1", "one"), ("2", "two"), ("3", "")))
    same = Client("4", salt="one")
    assert same.salt("x") == one.salt("x")
    own = (None, "x", "one", "one\0x", "two")
    assert len({client.salt(text) for client in (one, two, bare) for text in own}) == 3 * len(own)


def test_clients_of_a_server(tmp_path: Path) -> None:
    text = f'[[keys]]\nkey = "{SECRET}"\nname = "team"\ncache_salt = "s"\n[[keys]]\nkey = "b"\nconcurrency = 2\n'
    clients = Clients(ServerConfig(api_key="a", api_keys=write(tmp_path, text)))
    mine, team, other = (clients.by_key[key] for key in ("a", SECRET, "b"))
    assert [one.salt(None) for one in (mine, team, other)] == ["\0", "s\0", owner_of("b") + "\0"]
    assert [mine.name, team.name] == [owner_of("a")[:8], "team"]
    assert clients.of_owner(owner_of("b")) is other
    assert isinstance(other.batch_places, asyncio.Semaphore)
    assert clients.of_owner(owner_of("revoked")) is None
    assert clients.of_owner("") is None
    open_to_all = Clients(ServerConfig())
    assert open_to_all.of_owner("") is open_to_all.everybody
    assert open_to_all.of_owner(owner_of("b")) is None
