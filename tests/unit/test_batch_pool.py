"""Several servers as one: rows go where there is room or where their pictures are known, and a death costs its row."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from siglane.batch import pool
from siglane.batch.form import Answer
from siglane.batch.pool import EngineDied, Pool
from siglane.batch.row import CHAT

TICK = 0.001


@dataclass
class Place:
    """Answers after a tick; a deadly text ends all that it has."""

    slots: int = 4
    deadly: Mapping[str, int] = field(default_factory=dict)  # text -> how often
    asked: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    most: int = 0
    _running: int = 0
    _lives: int = 0

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        text, life = body["text"], self._lives
        self.asked.append(text)
        self._running += 1
        self.most = max(self.most, self._running)
        if self._running == 1:
            self.alone.append(text)
        try:
            await asyncio.sleep(TICK)
            if self.deadly.get(text, 0) > self.asked.count(text) - 1:
                self._lives += 1
            await asyncio.sleep(TICK)
            if self._lives != life:
                raise EngineDied
            return Answer(200, {"text": text})
        finally:
            self._running -= 1


def ask(places: list[Place], texts: list[str], images: list[str] | None = None, at_once: int = 8) -> list[Answer]:
    async def go() -> list[Answer]:
        one, turns = Pool(places), asyncio.Semaphore(at_once)

        async def put(number: int, text: str) -> Answer:
            async with turns:
                return await one.ask(CHAT, {"text": text} | ({"image": images[number]} if images else {}))

        return await asyncio.gather(*(put(number, text) for number, text in enumerate(texts)))

    return asyncio.run(go())


def test_rows_go_where_there_is_room() -> None:
    small, large = Place(slots=2), Place(slots=6)
    found = ask([small, large], [str(number) for number in range(80)])
    assert [answer.body["text"] for answer in found] == [str(number) for number in range(80)]
    assert (small.most, large.most) == (2, 6)
    assert 15 <= len(small.asked) <= 25


def test_rows_about_a_picture_stay_together_without_leaving_anybody_idle() -> None:
    texts = [f"{number}" for number in range(320)]
    images = [f"image {number // 4}" for number in range(320)]
    places = [Place(slots=16), Place(slots=16)]
    ask(places, texts, images, at_once=32)
    seen = [{images[int(text)] for text in place.asked} for place in places]
    assert sum(map(len, seen)) <= 110  # 80 pictures; 160 if each place got rows about each
    assert all(place.most <= 20 and len(place.asked) >= 120 for place in places)
    same = [Place(), Place()]
    ask(same, texts[:120], ["one"] * 120)
    assert min(len(place.asked) for place in same) >= 30


def test_a_death_costs_its_row_and_the_others_go_on() -> None:
    deadly = {"7": 9}
    places = [Place(deadly=deadly), Place(deadly=deadly)]
    found = ask(places, [str(number) for number in range(60)])
    dead = [number for number, answer in enumerate(found) if answer.status != 200]
    assert dead == [7]
    assert found[7].body["error"]["code"] == "engine_died"
    asked = [text for place in places for text in place.asked]
    again = {text for text in asked if asked.count(text) == 2}
    assert 2 <= len(again) <= 8
    assert all(any(text in place.alone for place in places) for text in again)


def test_one_server_that_dies_under_several_rows() -> None:
    place = Place(deadly={"3": 1, "5": 9, "6": 1, "20": 1})
    found = ask([place], [str(number) for number in range(40)])
    assert [number for number, answer in enumerate(found) if answer.status != 200] == [5]
    assert {"3", "5", "6", "20"} <= set(place.alone)


def test_who_is_away_is_left_out_and_comes_back() -> None:
    here, away = Place(), Place(slots=0)

    async def go() -> None:
        one = Pool([away, here])
        assert one.slots == 4
        await asyncio.gather(*(one.ask(CHAT, {"text": str(number)}) for number in range(4)))
        assert away.asked == []
        here.slots = 0
        waiting = asyncio.create_task(one.ask(CHAT, {"text": "waits"}))
        await asyncio.sleep(2 * pool.PATIENCE)
        assert not waiting.done()
        away.slots = 4
        assert (await waiting).status == 200
        assert away.asked == ["waits"]

    asyncio.run(go())


def test_a_row_that_lost_its_server_is_asked_elsewhere() -> None:
    """Its own never comes back."""

    class Lost(Place):
        async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
            self.slots = 0
            raise EngineDied

    here = Place()
    found = ask([Lost(slots=9), here], ["a", "b", "c"])
    assert [answer.status for answer in found] == [200, 200, 200]
    assert sorted(here.asked) == ["a", "b", "c"]


def test_no_row_is_asked_of_a_server_that_is_gone() -> None:
    """It dies under its first rows, and under one of them again; the others are no more to blame than before."""

    class Mortal(Place):
        async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
            assert self.slots, body
            try:
                return await super().ask(url, body)
            except EngineDied:
                self.slots = 0
                asyncio.get_running_loop().call_later(0.1, setattr, self, "slots", 4)
                raise

    for count in (1, 2):
        places = [Mortal(deadly={"1": 9}) for _ in range(count)]
        found = ask(list(places), [str(number) for number in range(20)])
        assert [number for number, answer in enumerate(found) if answer.status != 200] == [1]
