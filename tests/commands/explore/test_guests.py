"""Who waits for an answer, and how much may be uploaded."""

import asyncio
import time

import pytest

from cmpe_se.commands.explore import guests
from cmpe_se.commands.explore.guests import Guests, Uploads


@pytest.fixture(autouse=True)
def short_moments(monkeypatch):
    monkeypatch.setattr(guests, "_ARRIVING", 0.3)


def waits(someone: Guests, session: str = "a") -> bool:
    return asyncio.run(someone.waits(session))


def test_one_who_listens_waits():
    someone = Guests()
    someone.asks("a")
    with someone.listens("a"):
        assert waits(someone)
        assert not waits(someone, "b")


def test_one_who_has_just_asked_gets_a_moment():
    someone = Guests()

    async def arrives() -> bool:
        answer = asyncio.create_task(someone.waits("a"))
        await asyncio.sleep(0.1)
        with someone.listens("a"):
            return await answer

    someone.asks("a")
    assert asyncio.run(arrives())


def test_one_who_never_listens_or_has_left_does_not_wait():
    someone = Guests()
    someone.asks("a")
    started = time.monotonic()
    assert not waits(someone)
    assert 0.2 < time.monotonic() - started < 2
    with someone.listens("b"), someone.listens("a"):
        pass
    started = time.monotonic()
    assert not waits(someone)
    assert time.monotonic() - started < 0.2


def test_a_new_question_is_not_lost_with_the_stream_before_it():
    someone = Guests()
    someone.asks("a")
    with someone.listens("a"):
        time.sleep(0.01)
        someone.asks("a")  # its own stream opens after this one is seen to be closed

    async def arrives() -> bool:
        answer = asyncio.create_task(someone.waits("a"))
        await asyncio.sleep(0.1)
        with someone.listens("a"):
            return await answer

    assert asyncio.run(arrives())


def test_sessions_do_not_pile_up():
    someone = Guests()
    for session in range(5_000):
        someone.asks(str(session))
        with someone.listens(str(session)):
            pass
    assert len(someone._asked) <= guests._SESSIONS
    assert someone._listening == {}


def test_uploads_are_counted_until_they_are_deleted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guests.time, "monotonic", lambda: now[0])
    uploads = Uploads(files=3, size=100, kept=60)
    assert uploads.refusal(100) is None
    assert uploads.refusal(101) == "too many uploads: 0 files of 0 MB kept; wait 1 minute"
    for _ in range(3):
        uploads.add(1, 10)
    assert uploads.refusal(1) == "too many uploads: 3 files of 0 MB kept; wait 1 minute"
    now[0] = 61
    assert uploads.refusal(100) is None
