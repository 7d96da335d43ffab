"""Turns: one thread at a time, first come first served, never a wait without end."""

from __future__ import annotations

import threading
import time

import pytest

from fate_moe.errors import UnsupportedCallError
from fate_moe.turns import Turn


def test_a_turn_is_reentrant_and_ends_with_errors() -> None:
    turn = Turn()

    def interrupted() -> None:
        with turn, turn:
            assert turn.is_mine
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not turn.is_mine
    assert turn.acquire(0)
    turn.release()


def test_who_waits_is_served_before_who_asks_again() -> None:
    turn, order = Turn(), []
    turn.acquire()

    def wait() -> None:
        with turn:
            order.append("waiting")

    thread = threading.Thread(target=wait)
    thread.start()
    while not turn._line:
        time.sleep(0.001)
    turn.release()
    with turn:
        order.append("again")
    thread.join()
    assert order == ["waiting", "again"]


def test_a_wait_can_be_given_up() -> None:
    turn, waited = Turn(), []
    with turn:
        thread = threading.Thread(target=lambda: waited.append(turn.acquire(0.01)))
        thread.start()
        thread.join()
    assert waited == [False]
    assert turn.acquire(0)


def test_two_threads_that_wait_for_each_other_are_told() -> None:
    one, other, meeting, told = Turn(), Turn(), threading.Barrier(2), []

    def cross(first: Turn, second: Turn) -> None:
        with first:
            meeting.wait()
            try:
                with second:
                    pass
            except UnsupportedCallError as error:
                told.append(str(error))

    threads = [threading.Thread(target=cross, args=turns) for turns in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 1
    assert "each within a call of the other" in told[0]
