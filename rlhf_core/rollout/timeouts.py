"""Calling a user's function within a time limit, and naming the row that it failed on."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_core.data.errors import DataError


class CallTimeout(BaseException):
    """A call exceeded its time limit. Not an Exception, so that `except Exception` in the called function does not
    catch it."""


def call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, or raise CallTimeout after `seconds`; None sets no limit.

    In the main thread an alarm interrupts the call, even inside C code that never returns to the interpreter, such as
    a regular expression that backtracks without end. Elsewhere (another thread, Windows) the call runs in a thread of
    its own, which is abandoned after the limit.
    """
    if seconds is None:
        return function(*arguments)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _call_with_alarm(seconds, function, *arguments)
    return _call_in_thread(seconds, function, *arguments)


def _call_with_alarm(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    over = False

    def interrupt(number: int, frame: Any) -> None:
        if not over:
            raise CallTimeout

    handler = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would disable the timer
    try:
        try:
            return function(*arguments)
        finally:
            over = True
    finally:  # restore an alarm that was set before
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-6), interval)


def _call_in_thread(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except BaseException as error:  # raised again in the calling thread
            outcome.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise CallTimeout
    succeeded, answer = outcome[0]
    if not succeeded:
        raise answer
    return answer


def describe_failure(
    error: BaseException,
    function: Callable[..., Any],
    timeout: float | None,
    *columns: Sequence[Any],
    begin: Sequence[str],
    what: str = "sample",
) -> str:
    """Describe the failure of `function(*columns)` and the row that causes it.

    The function is called again with one row of the columns at a time, until a call fails or the time limit is
    reached.

    Args:
        error: what the call with all rows raised. timeout: limit in seconds for all the repeated calls together.
        begin: for each row, a text by which it can be recognized.
        what: the name of a row in the message, `sample` or `pair`.
    """
    answered: list[Any] = []
    try:
        call_within(timeout, _call_one_by_one, function, columns, answered)
    except (Exception, CallTimeout) as repeated:
        row = len(answered)
        return f"{what} {row}: {_describe(repeated, timeout)}; {begin[row]}"
    return (
        f"{_describe(error, timeout)} for {len(columns[0])} {what}s together, though each alone is answered; "
        f"the first of them: {begin[0]}"
    )


def _call_one_by_one(function: Callable[..., Any], columns: Sequence[Sequence[Any]], answered: list[Any]) -> None:
    """Call the function with each row alone; append every answer to `answered`."""
    for values in zip(*columns, strict=True):
        answered.append(function(*([value] for value in values)))


def _describe(error: BaseException, timeout: float | None) -> str:
    if isinstance(error, CallTimeout):
        return f"no answer within reward_timeout={timeout:g} seconds"
    if isinstance(error, DataError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
