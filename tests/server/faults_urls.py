"""Rows 17 to 27: where pictures may come from. Names resolve through the lab of tests/unit/picture_site.py, which
records who comes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote

from faults import FIRST_IMAGE, SECRET, Refused, Stage, refusals, refuse
from faults_images import BASE64, bad_url, with_image
from picture_site import PUBLIC, picture_site
from picture_site import picture as site_picture
from serving import assert_error, chat, image_part, image_url, picture
from waiting import eventually

from siglane.media.policy import MediaPolicy
from siglane.server.media import MediaLoader

FORBIDDEN, FAILED = "image_url_forbidden", "image_fetch_failed"
REFUSED: dict[str, Refused] = {
    "23 ftp": bad_url("ftp://example.org/a.png", "unsupported_url_scheme"),
    "23 gopher": bad_url("gopher://example.org/", "unsupported_url_scheme"),
    "23 blob": bad_url("blob:https://example.org/1", "unsupported_url_scheme"),
    "23 bare path": bad_url("/etc/passwd", "unsupported_url_scheme"),
    "23 bare base64": bad_url(BASE64, "unsupported_url_scheme"),
    "23 nothing": bad_url("", "unsupported_url_scheme"),
    "24 no folder allowed": bad_url("file:///etc/passwd", "local_media_forbidden"),
}
PRIVATE = "127.0.0.1 [::1] 10.0.0.1 169.254.169.254 [fd00::1] 100.64.1.1"
SPELLINGS = (
    "127.1 2130706433 0x7f000001 0177.0.0.1 0 [::] [::127.0.0.1] [::ffff:127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] "
    "224.0.0.1 192.0.0.8"
)
STATUSES = ("status/404", "status/403", "status/500", "status/304")
AMBIGUOUS = (
    f"http://user:{SECRET}@pictures.example/ok",
    "http://127.0.0.1\\@pictures.example/ok",
    "http://pictures.example:99999/ok",
    "http://%31%32%37.0.0.1/ok",
    "http://pictures.example/\r\nHost: evil",
    "http:///ok",
)

TABLE = refusals(REFUSED)


def never_connected_to(hosts: str, stage: Stage) -> None:
    with picture_site(stage.patch) as site:
        refuse({host: bad_url(site.url(f"ok?{SECRET}", host), FORBIDDEN) for host in hosts.split()}, stage)
        assert site.connections == []


TABLE.row(17, "private addresses")(partial(never_connected_to, PRIVATE))
TABLE.row(18, "their other spellings")(partial(never_connected_to, SPELLINGS))


@TABLE.row(19, "redirects")
def every_hop_is_checked(stage: Stage) -> None:
    with picture_site(stage.patch) as site:
        site.name("inside.example", ["10.0.0.1"])
        refused = {
            place: bad_url(site.url("redirect/" + quote(place, safe="")), code)
            for place, code in (
                (site.url("ok", "127.0.0.1"), FORBIDDEN),
                (site.url("ok", "inside.example"), FORBIDDEN),
                ("file:///etc/passwd", "unsupported_url_scheme"),
            )
        }
        refuse(refused, stage)
        assert site.connections == [PUBLIC] * 3
        assert [path.split("/")[1] for _, path in site.requests] == ["redirect"] * 3
        refuse({"too many": bad_url(site.url("loop"), FAILED)}, stage)
        assert len(site.requests) == 3 + 4


@TABLE.row(20, "a name that changes its address")
def names_are_resolved_once(stage: Stage) -> None:
    with picture_site(stage.patch) as site:
        site.name("rebind.example", [PUBLIC], ["127.0.0.1"])
        assert stage.server.post(with_image(site.url("ok", "rebind.example"))).status_code == 200
        assert (site.lookups, site.connections) == (["rebind.example"], [PUBLIC])
        refuse({"again": bad_url(site.url("ok", "rebind.example"), FORBIDDEN)}, stage)
        assert site.connections == [PUBLIC]


@TABLE.row(21, "URLs of two readings")
def two_readings(stage: Stage) -> None:
    with picture_site(stage.patch) as site:
        refuse({url: bad_url(url, FORBIDDEN) for url in AMBIGUOUS}, stage)
        assert site.connections == []


@TABLE.row(22, "proxies of the environment")
def no_proxy(stage: Stage) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        stage.patch.setenv(name, "http://198.41.0.9:3128")
    with picture_site(stage.patch) as site:
        assert stage.server.post(with_image(site.url("ok"))).status_code == 200
        assert site.connections == [PUBLIC]


@TABLE.row(24, "outside the folder")
def outside_the_folder(stage: Stage) -> None:
    """One answer to all of them, so that nobody learns which files exist."""
    root = stage.folder / "root"
    (root / "sub").mkdir(parents=True)
    (stage.folder / f"{SECRET}.png").write_bytes(picture())
    (root / "link.png").symlink_to(stage.folder / f"{SECRET}.png")
    os.mkfifo(root / "pipe.png")
    urls = [
        f"file://{root}/../{SECRET}.png",
        f"file://{root}/%2e%2e/{SECRET}.png",
        f"file://{stage.folder}/{SECRET}.png",
        f"file://{root}/link.png",
        f"file://{root}/sub",
        f"file://{root}/pipe.png",
        f"file://{root}/missing.png",
        f"file://elsewhere{root}/a.png",
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:relative.png",
    ]
    with stage.another(allowed_local_media_path=str(root)) as server:
        answers = [server.post(with_image(url)) for url in urls]
    for answer in answers:
        assert_error(answer, 400, "local_media_forbidden", FIRST_IMAGE)
    assert len({answer.text for answer in answers}) == 1


def answered(codes: dict[str, str], stage: Stage) -> None:
    """codes: by what the site does."""
    with picture_site(stage.patch) as site:
        site.name("closed.example", ["198.41.0.4"])
        site.name("nobody.example", [])
        hosts = {"closed": "closed.example", "nobody": "nobody.example"}
        refused = {
            path: bad_url(
                site.url(f"{path}?token={SECRET}", hosts.get(path, "pictures.example")),
                code,
                path.removeprefix("status/") if path in STATUSES else "",
            )
            for path, code in codes.items()
        }
        refuse(refused, stage)


SLOW = dict.fromkeys(("slow-body", "slow-head"), "image_fetch_timeout")
TOO_LARGE = {"big/60000": "image_too_large", "promises": "image_too_large", "lies": FAILED}
FAILING = dict.fromkeys((*STATUSES, "nonsense", "gzip", "closed", "nobody"), FAILED)
TABLE.row(25, "slow", image_timeout=0.3)(partial(answered, SLOW))
TABLE.row(25, "too large", max_image_bytes=50_000)(partial(answered, TOO_LARGE))
TABLE.row(26, "failing")(partial(answered, FAILING))


@TABLE.row(27, "one URL many times")
def one_fetch_for_a_burst(stage: Stage) -> None:
    """Requests that want one picture at the same time share one fetch, tenants do not share theirs."""
    fly, wanted = MediaLoader._fly, list[str]()

    async def noted(self: MediaLoader, url: str, policy: MediaPolicy, tenant: str) -> bytes:
        wanted.append(tenant)
        return await fly(self, url, policy, tenant)

    stage.patch.setattr(MediaLoader, "_fly", noted)
    with picture_site(stage.patch) as site:

        def answers(bodies: list[dict[str, Any]]) -> set[tuple[int, str]]:
            """The site answers once all pictures are wanted, two by each request."""
            wanted.clear()
            site.requests.clear()
            site.open.clear()
            with ThreadPoolExecutor(len(bodies)) as clients:
                asked = [clients.submit(stage.server.post, body) for body in bodies]
                eventually(lambda: len(wanted) == 2 * len(bodies))
                site.open.set()
                found = [one.result() for one in asked]
            return {(one.status_code, one.json()["choices"][0]["message"]["content"]) for one in found}

        def body(part: dict[str, Any], **fields: Any) -> dict[str, Any]:
            return chat(part, part, "x", **fields)

        url = image_url(site.url("wait"))
        together = answers([body(url)] * 12)
        assert len(site.requests) == 1
        inline = stage.server.post(body(image_part(site_picture()))).json()
        assert together == {(200, inline["choices"][0]["message"]["content"])}
        answers([body(url, cache_salt=tenant) for tenant in ("one", "two", "three") * 2])
        assert len(site.requests) == 3
