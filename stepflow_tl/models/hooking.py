"""Attach hooks before or after those that are already there, and take exactly these off again.

`model.hooks(fwd_hooks=...)` always appends. Exact gradients need an order: what restores the path of a score
must run *before* a user's hook edits that score (autograd then carries the edit), what reads a finished
pattern must run *after*.
So: hook functions in `first` are prepended, those in `last` appended, and on exit, also by an exception,
each handle this context added is removed and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NamedHook = tuple[str, Callable[..., Any]]


@contextmanager
def attached(
    model: Any, *, first: Sequence[NamedHook] = (), last: Sequence[NamedHook] = ()
) -> Iterator[None]:
    """Attach forward hooks `(name, fn(tensor, hook))` for the time of the context.

    Args:
        model: A TransformerLens model.
        first: Run before all hooks now attached at their point.
        last: Run after them.

    Raises:
        KeyError: If a name is not in `model.hook_dict`.
    """
    added: list[tuple[Any, Any]] = []
    try:
        for named_hooks, prepend in ((first, True), (last, False)):
            for name, function in named_hooks:
                point = model.hook_dict[name]
                point.add_hook(function, dir="fwd", prepend=prepend)
                added.append((point, point.fwd_hooks[0 if prepend else -1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
