"""The two who talk over the socket: the candidate runs the model's code, the judge the question's test.

Every call that the test makes of the function goes to the candidate as a message, and the result comes back
as one. Messages are JSON of plain values (`encode`, `decode`): nothing is unpickled, and no object of the
candidate's enters the judge.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

_MOST_BYTES = 16 << 20  # of one message


class Unfit(Exception):
    """A value that is not plain data."""


def encode(value: Any) -> Any:
    """A plain value as JSON can hold it: None, booleans, numbers, texts, bytes, and containers of these.

    A subclass becomes what it is derived from: a named tuple a tuple, a Counter a dictionary.

    Raises:
        Unfit: If there is anything else in it.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, name, parts in _KINDS:
        if isinstance(value, kind):
            return [name, *parts(value)]
    raise Unfit(f"a {type(value).__name__}, which is not plain data")


_KINDS: tuple[tuple[type, str, Callable[[Any], list[Any]]], ...] = (
    (int, "int", lambda v: [format(v, "x")]),
    (float, "float", lambda v: [float.hex(v)]),
    (complex, "complex", lambda v: [float.hex(v.real), float.hex(v.imag)]),
    (str, "str", lambda v: [v]),
    (bytes, "bytes", lambda v: [v.hex()]),
    (list, "list", lambda v: list(map(encode, v))),
    (tuple, "tuple", lambda v: list(map(encode, v))),
    (set, "set", lambda v: list(map(encode, v))),
    (frozenset, "frozenset", lambda v: list(map(encode, v))),
    (dict, "dict", lambda v: [encode(part) for item in v.items() for part in item]),
)


def decode(message: Any) -> Any:
    """The value that `encode` wrote, of exactly the plain types; ValueError or TypeError if it wrote none."""
    if message is None or isinstance(message, bool):
        return message
    name, *parts = message
    if name in ("list", "tuple", "set", "frozenset"):
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[name](map(decode, parts))
    if name == "dict":
        return dict(zip(map(decode, parts[::2]), map(decode, parts[1::2]), strict=True))
    if not parts or not all(type(part) is str for part in parts):
        raise ValueError(f"a message of kind {name!r} is not one")
    read: dict[str, Callable[..., Any]] = {
        "int": lambda text: int(text, 16),
        "float": float.fromhex,
        "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
        "str": str,
        "bytes": bytes.fromhex,
    }
    return read[name](*parts)


def send(channel: socket.socket, message: Any) -> None:
    """Send one message."""
    data = json.dumps(message).encode()
    channel.sendall(struct.pack(">I", len(data)) + data)


def receive(channel: socket.socket) -> Any:
    """The next message; EOFError if the other side is gone, ValueError if it is too long or not JSON."""
    (size,) = struct.unpack(">I", _exactly(channel, 4))
    if size > _MOST_BYTES:
        raise ValueError(f"a message of {size} bytes is too long")
    return json.loads(_exactly(channel, size))


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def candidate(job: dict[str, Any], channel: socket.socket) -> None:
    """Execute the code, then answer calls until the judge is done."""
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        for source in job["sources"]:
            exec(compile(source, "<the answer's code>", "exec"), namespace)
        function = namespace[job["entry_point"]]
        send(channel, ["ready"])
    except BaseException as error:
        send(channel, ["failed", _in_words(error)])
        return
    while True:
        arguments, options = map(decode, receive(channel))
        try:
            reply = ["value", encode(function(*arguments, **options))]
        except Unfit as error:
            reply = ["unfit", str(error)]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        send(channel, reply)


class _Lost(BaseException):
    """The candidate has failed in a way that no `except Exception` of a test may pass over."""


def judge(job: dict[str, Any], channel: socket.socket) -> dict[str, Any]:
    """Execute the test against the candidate and say whether it passed, and if not, why."""
    lost: list[str] = []
    n_calls = 0

    def reply(*expected: str) -> list[Any]:
        try:
            message = receive(channel)
            if message[0] in expected:
                return message
            lost.append(str(message[1])[:300] if message[0] in ("failed", "unfit") else "it does not answer")
        except (EOFError, OSError):
            lost.append("its process ended")
        except Exception as error:
            lost.append(f"its answer cannot be read ({_in_words(error)})")
        raise _Lost

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal n_calls
        if lost:
            raise _Lost
        try:
            message = [encode(arguments), encode(options)]
        except Unfit as error:
            lost.append(f"the question's test passes {error}")
            raise _Lost from None
        try:
            send(channel, message)
        except OSError:
            lost.append("its process ended")
            raise _Lost from None
        kind, *parts = reply("value", "raised")
        if kind == "raised":
            known = getattr(builtins, str(parts[0]), None)
            is_exception = isinstance(known, type) and issubclass(known, Exception)
            raise (known if is_exception else RuntimeError)(*map(str, parts[1:]))  # pyright: ignore
        try:
            value = decode(parts[0])
        except Exception as error:
            lost.append(f"its answer cannot be read ({_in_words(error)})")
            raise _Lost from None
        n_calls += 1
        return value

    namespace: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(job["prompt"], "<prompt>", "exec"), namespace)
        exec(compile(job["test"], "<test>", "exec"), namespace)
        namespace[job["entry_point"]] = call
        reply("ready")
        namespace["check"](call)
    except BaseException as error:
        return {"right": False, "reason": lost[0] if lost else _failure(error, job["test"])}
    if lost or not n_calls:
        return {"right": False, "reason": lost[0] if lost else "the question's test calls nothing"}
    return {"right": True, "reason": ""}


def _failure(error: BaseException, test: str) -> str:
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<test>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"line {line} of the test, {test.splitlines()[line - 1].strip()[:120]}" if line else "the test"
    return f"failed at {where}" if isinstance(error, AssertionError) else f"{_in_words(error)} at {where}"


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")
