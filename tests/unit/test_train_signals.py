"""Stop signals in real processes: the first asks, a second one ends, forked helpers keep out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_completedp.train.signals import SIGNALS, StopSignals

#: Seconds after which a second signal counts, in the scripts below; spares the tests real ones.
REPEAT_S = 0.5

PREPARE = f"""
import ctypes, multiprocessing, os, signal, sys, time
from megatron_completedp.train import signals
signals.REPEAT_S = {REPEAT_S}
"""

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run a script after PREPARE, up to its first line of output."""
    running = []

    def run(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARE + textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_asks_and_a_prompt_repetition_is_the_same(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        wait_until(stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # an exit would happen by now
        assert stop.received == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.fixture
def handed_on() -> Iterator[list[int]]:
    """Signals that reach the handler of a caller, here of SIGTERM alone."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_a_callers_handler_hears_of_the_signal_afterwards(handed_on: list[int]) -> None:
    """The run that took it may have made its last step: only the caller can stop the next one."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handed_on == []
    assert handed_on == [signal.SIGTERM]
    with StopSignals():
        pass
    assert handed_on == [signal.SIGTERM]


def test_a_run_that_has_saved_ends_without_a_keyboard_interrupt() -> None:
    """Python's own handler of Ctrl-C is not a caller's."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(stop.requested)


def test_other_signals_do_not_ask() -> None:
    """Everything with a Python handler arrives by the same way."""
    old = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGUSR2, old)


#: Locks a C mutex twice: like a collective whose peer is gone, it lets go of Python's lock and
#: comes back for no signal, so no Python handler runs.
STUCK = """
with signals.StopSignals():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_even_a_stuck_process(start: Start) -> None:
    process = start(STUCK)
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * REPEAT_S)
    assert process.poll() is None, "the first signal ends nothing"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again" in stderr


def test_forked_helpers_survive_signals_and_do_not_pass_them_on(start: Start) -> None:
    """Else a group-wide SIGTERM would end the data workers, and theirs would count as a second."""
    process = start("""
        def work(stop):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2 * signals.REPEAT_S)
            sys.exit(7)

        with signals.StopSignals() as stop:
            child = multiprocessing.get_context("fork").Process(target=work, args=(stop,))
            child.start()
            print("ready", flush=True)
            child.join()
            print(child.exitcode, stop.received)
        """)
    stdout, stderr = process.communicate(timeout=20)
    assert stdout == "7 None\n", stderr
