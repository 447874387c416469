"""The run-time checks of every signature in the package while the tests run, at a cost the suite can bear.

jaxtyping's import hook decorates every function. Decorating takes 1 to 2 ms, and hooks are functions made
anew at every call; calling a decorated function takes 30 microseconds, beartype's own check one. So, in place
of `jaxtyping.jaxtyped`, which the hook looks up:

1. A function without array shapes in its signature is checked by beartype alone.
2. A function made inside another is decorated once for all that are made from the same code. What is
   decorated calls whichever of them is running; each call is checked as before.
3. All others are jaxtyping's.

As with jaxtyping, an annotation that cannot be resolved when the function is defined is not checked. Named in
`pyproject.toml`; the jaxtyping plugin takes a dotted name only, so beartype's settings live here: an int is a
float, as PEP 484 says, and errors are jaxtyping's.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_by_jaxtyping = jaxtyping.jaxtyped
_of_code: dict[types.CodeType, tuple[Callable, "_Running"]] = {}


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """In place of `jaxtyping.jaxtyped`; see the module."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not isinstance(fn, types.FunctionType):
        return _by_jaxtyping(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return _made_in_a_call(fn)
    hints = {name: _resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    if any("jaxtyping." in repr(hint) for hint in hints.values()):
        return _by_jaxtyping(fn, typechecker=checked)
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__, twin.__qualname__, twin.__module__ = (
        fn.__kwdefaults__,
        fn.__qualname__,
        fn.__module__,
    )
    twin.__annotations__ = hints
    return functools.wraps(fn)(checked(twin))


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:  # a name that exists for type checkers alone, or not yet
        return Any


class _Running:
    """Stands for all functions of one piece of code: calls the one that is running in this thread."""

    def __init__(self, fn: types.FunctionType) -> None:
        functools.update_wrapper(self, fn)
        del self.__wrapped__  # or the first of them would live for ever, with all that it holds
        self.__signature__, self.__globals__ = inspect.signature(fn), fn.__globals__
        self.stacks = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stacks.running[-1](*args, **kwargs)


def _made_in_a_call(fn: types.FunctionType) -> Callable:
    if fn.__code__ not in _of_code:
        first = _Running(fn)
        _of_code[fn.__code__] = _by_jaxtyping(first, typechecker=checked), first
    check, one = _of_code[fn.__code__]

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        running = one.stacks.__dict__.setdefault("running", [])
        running.append(fn)
        try:
            return check(*args, **kwargs)
        finally:
            running.pop()

    return call


jaxtyping.jaxtyped = jaxtyped
