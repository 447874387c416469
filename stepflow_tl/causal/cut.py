"""Cut attention edges (query step <- key step), and put a number on what that does.

1. `causal_pair` and `resolve_pairs` say which edges: (query step i, key step j), i reads j; `resolve_joint`
   which sets of them are cut together, one query step and several key steps.
2. `cut_mask` marks, for each row of a batch, which scores of a pass are cut: the queries of one step, the
   keys of others. A token's score on itself is never marked.
3. `EdgeCut` holds the hooks of the chosen layers and heads, and the mask of the pass that is about to run:
   scores are set to -inf before the softmax, so the other keys share the mass. They run after every hook that
   is attached already, so an edge that is cut stays cut. Where a layer has no live scores but a live pattern,
   the pattern is cut and its rows brought back to sum 1: the same numbers, as long as the pattern has kept
   any mass elsewhere.
4. `Effect` compares predictions with and without the cut, in nats: larger means that the cut does more harm.

Every query must keep a live key, or the softmax would have nothing to divide by: itself, as a rule, and the
TEMPLATE tokens, which are in no step and so are never cut. A hook from outside may have masked those: then
an error says so instead of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.errors import AlignmentError, KnockoutError, ModelError
from stepflow_tl.models.facts import check_heads, head_mask
from stepflow_tl.models.hook_names import refuse_delegated, resolve_hooks
from stepflow_tl.models.passes import NamedHook
from stepflow_tl.saliency.objectives import token_nll
from stepflow_tl.trace import ReasoningTrace, Step

Span = tuple[int, int]
KeySet = tuple[int, ...]
"""Key steps that are cut together, as indices into `trace.steps`."""
Pairs = Literal["all", "screened"] | str | Iterable[Sequence[Any]]
Joint = Iterable[Any]
"""Sets of steps to cut together: (query step, [key steps])."""
Measure = Literal["nll", "kl"] | str | Callable[[Tensor, Tensor, Tensor], Any]


def causal_pair(trace: ReasoningTrace, pair: Sequence[Any]) -> tuple[Step, Step]:
    """Query step and key step of an edge, each given by its label, its index or as a step.

    Raises:
        TraceError: If the trace has no such step.
        AlignmentError: If these are not two steps, or the key step comes after the query step.
    """
    if isinstance(pair, str) or len(pair) != 2:
        raise AlignmentError(f"pair {pair!r}: expected two steps, (query, key)")
    query, key = (trace.step(which) for which in pair)
    if key.index > query.index:
        raise AlignmentError(
            f"pair ({query.label}, {key.label}): the key step comes after the query step, so no attention "
            "leads there. The order is (query, key): the reader first."
        )
    return query, key


def resolve_pairs(pairs: Pairs, trace: ReasoningTrace, *, may_be_empty: bool = False) -> dict[int, list[int]]:
    """Key steps by query step, both as indices into `trace.steps`, in ascending order.

    Args:
        pairs: "all" or "screened", every step with each earlier one; or (query, key) pairs as in
            `causal_pair`. A pair (i, i) keeps the tokens of step i from one another, but not from themselves.
        trace: The trace.
        may_be_empty: Whether an empty list will do.

    Raises:
        TraceError: If a step does not exist.
        AlignmentError: If a key step comes after its query step.
        KnockoutError: If `pairs` is another word, or nothing is left.
    """
    n_steps = len(trace.steps)
    if isinstance(pairs, str):
        if pairs not in ("all", "screened"):
            raise KnockoutError(
                f"pairs is {pairs!r}: expected 'all', 'screened' or a list of (query, key) pairs such as "
                "[('S1', 'Q')]"
            )
        found = {(query, key) for query in range(n_steps) for key in range(query)}
    else:
        found = {(query.index, key.index) for query, key in (causal_pair(trace, pair) for pair in pairs)}
    if not found and (isinstance(pairs, str) or not may_be_empty):
        raise KnockoutError(
            f"there is no pair to cut: the trace has {n_steps} step(s) and pairs is {pairs!r}. A pair needs "
            "a step and an earlier one."
        )
    by_query: dict[int, list[int]] = {}
    for query, key in sorted(found):
        by_query.setdefault(query, []).append(key)
    return by_query


def resolve_joint(joint: Joint, trace: ReasoningTrace) -> dict[int, list[KeySet]]:
    """The sets of key steps that are cut together, by query step; indices into `trace.steps`, ascending.

    Args:
        joint: (query step, key steps), each step by its label, its index or as a step.
        trace: The trace.

    Raises:
        TraceError: If a step does not exist.
        AlignmentError: If a key step comes after its query step.
        KnockoutError: If an entry is something else, or names fewer than two key steps.
    """
    by_query: dict[int, list[KeySet]] = {}
    for entry in joint:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or isinstance(entry[1], (str, int, Step)):
            raise KnockoutError(
                f"joint entry {entry!r}: expected (query step, [key steps]) such as ('S1', ['Q', 'T3'])"
            )
        found = [causal_pair(trace, (entry[0], key)) for key in entry[1]]
        keys = tuple(sorted({key.index for _, key in found}))
        if len(keys) < 2:
            raise KnockoutError(
                f"joint entry {entry!r} names {len(keys)} key step(s): expected two or more to be cut "
                "together; a single one goes into pairs"
            )
        sets = by_query.setdefault(found[0][0].index, [])
        if keys not in sets:
            sets.append(keys)
    return by_query


def cut_mask(
    queries: Span, keys: Sequence[Sequence[Span]], n_queries: int, n_keys: int
) -> Bool[Tensor, "batch 1 query key"]:
    """Which scores of a pass are cut.

    Args:
        queries: Half-open span of the cut rows, counted from the first query of the pass.
        keys: Half-open spans of cut keys for each batch row, counted from the trace's first token; no span
            cuts nothing in that row.
        n_queries: Queries of the pass, the last of its keys.
        n_keys: Keys of the pass.
    """
    mask = torch.zeros(len(keys), 1, n_queries, n_keys, dtype=torch.bool)
    for row, spans in enumerate(keys):
        for start, end in spans:
            mask[row, 0, queries[0] : queries[1], start:end] = True
    own = torch.arange(n_queries)
    mask[:, :, own, own + n_keys - n_queries] = False
    return mask


class EdgeCut:
    """Hooks that cut what `mask` marks, in some layers and heads.

    Attributes:
        mask: Set before each pass; None cuts nothing.
    """

    def __init__(self, model: Any, layers: Sequence[int], heads: Sequence[int] | None = None) -> None:
        """Find the hook points.

        Raises:
            ModelError: If a head does not exist or a layer's attention cannot be edited.
        """
        self.mask: Tensor | None = None
        heads = check_heads(model, heads)
        every = int(model.cfg.n_heads)
        self._heads = None if heads is None else head_mask(heads, every, torch.device("cpu"))[None, ..., None]
        self._fired: dict[int, int] = dict.fromkeys(layers, 0)
        self.hooks: list[NamedHook] = []
        for hooks in resolve_hooks(model, layers).layers:
            layer, name, function = hooks.layer, hooks.scores, self._cut_scores
            refuse_delegated(model, hooks, "Leave the layer out with layers=[...].")
            if name is None:
                name, function = hooks.pattern, self._cut_pattern
            self.hooks.append((name, partial(function, layer=layer)))

    def check_fired(self) -> None:
        """Demand that every hook ran once since the last check; a filter that matches nothing is silent."""
        wrong = [layer for layer, count in self._fired.items() if count != 1]
        counts = sorted({self._fired[layer] for layer in wrong})
        self._fired = dict.fromkeys(self._fired, 0)
        if wrong:
            raise ModelError(
                f"the scores of layers {wrong} fired {counts} times in one forward pass, expected once: boot "
                "the model with eager attention, and run no other pass inside a hook"
            )

    def _cut_scores(
        self, scores: Float[Tensor, "batch head query key"], hook: Any, *, layer: int
    ) -> Float[Tensor, "batch head query key"]:
        cut = self._cut(scores, hook, layer)
        if cut is None:
            return scores
        lowest = torch.finfo(scores.dtype).min / 2  # some models mask with the dtype's lowest value, not -inf
        result = scores.masked_fill(cut, -torch.inf)
        own = scores.diagonal(offset=scores.shape[-1] - scores.shape[-2], dim1=-2, dim2=-1)
        if not bool((own > lowest).all()):  # rare: look whether something else is left
            self._refuse_emptied((result.amax(-1) <= lowest) & cut.any(-1), hook)
        return result

    def _cut_pattern(
        self, pattern: Float[Tensor, "batch head query key"], hook: Any, *, layer: int
    ) -> Float[Tensor, "batch head query key"]:
        cut = self._cut(pattern, hook, layer)
        if cut is None:
            return pattern
        kept = pattern.masked_fill(cut, 0)
        mass = kept.sum(-1, keepdim=True)
        is_cut = cut.any(-1, keepdim=True)
        self._refuse_emptied(((mass <= 0) & is_cut)[..., 0], hook)
        return torch.where(is_cut, kept / torch.where(is_cut, mass, 1), pattern)

    def _cut(self, attention: Tensor, hook: Any, layer: int) -> Tensor | None:
        self._fired[layer] += 1
        if self.mask is None:
            return None
        expected, found = ((t.shape[0], *t.shape[2:]) for t in (self.mask, attention))
        if expected != found:
            raise ModelError(
                f"{hook.name} has (batch, queries, keys) {found}, expected {expected}: this layer's keys are "
                "not the whole trace so far (a cache that drops keys, a prefix of its own). Use "
                "method='full'."
            )
        mask = self.mask.to(attention.device)
        return mask if self._heads is None else mask & self._heads.to(attention.device)

    def _refuse_emptied(self, emptied: Bool[Tensor, "batch head query"], hook: Any) -> None:
        if emptied.any():
            row, head, query = emptied.nonzero()[0].tolist()
            raise ModelError(
                f"{hook.name}: after the cut, query {query} of the pass (batch row {row}, head {head}) has "
                "no key left to attend to. A token keeps itself and the template tokens, so a hook attached "
                "from outside has masked those; take it off."
            )


def nll_changes(
    logits: Float[Tensor, "row vocabulary"],
    clean: Float[Tensor, "row vocabulary"],
    tokens: Int[Tensor, " row"],
) -> Float[Tensor, " row"]:
    """How much worse each of `tokens` is predicted: NLL under `logits` minus that under `clean`.

    In nats; negative where the cut helps.
    """
    return (token_nll(logits, tokens) - token_nll(clean, tokens)).double()


def kl_divergence(
    logits: Float[Tensor, "row vocabulary"],
    clean: Float[Tensor, "row vocabulary"],
    tokens: Int[Tensor, " row"],
) -> Float[Tensor, ""]:
    """KL(clean || cut) of the next-token distributions, summed over rows, in nats; `tokens` are not read."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    cut, own = logits.to(precise).log_softmax(-1), clean.to(precise).log_softmax(-1)
    probability = own.exp()
    # A token that the model rules out (logit -inf) has probability 0 and adds 0, not NaN.
    terms = torch.where(probability > 0, probability * (own - cut), 0)
    return terms.sum(-1).double().sum()


class CutEffect(NamedTuple):
    """What a cut did.

    Attributes:
        effect: Summed over the predictions.
        size: Of "nll" the sum of the sizes of its terms, so that nothing cancels; else the size of `effect`.
    """

    effect: float
    size: float


class Effect:
    """A measure of the difference that a cut makes, with its name; its values are checked."""

    def __init__(self, measure: Measure) -> None:
        """Resolve a name or take a callable; a KnockoutError if it is neither."""
        known = {"nll": nll_changes, "kl": kl_divergence}
        if isinstance(measure, str) and measure in known:
            self.name, self._function = str(measure), known[measure]
        elif callable(measure):
            self.name, self._function = getattr(measure, "__qualname__", repr(measure)), measure
        else:
            raise KnockoutError(
                f"measure is {measure!r}: expected 'nll', 'kl', or a callable (logits [row, vocabulary], "
                "clean [row, vocabulary], tokens [row]) -> number"
            )

    def __call__(self, logits: Tensor, clean: Tensor, tokens: Tensor) -> CutEffect:
        """The effect and its size; a KnockoutError if a callable does not give one finite number."""
        changes = self._function(logits, clean, tokens)
        if self._function is nll_changes:
            return CutEffect(self._finite(changes.sum()), float(changes.abs().sum()))
        effect = self._finite(changes)
        return CutEffect(effect, abs(effect))

    def _finite(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            if isinstance(value, Tensor):
                kind = f"a tensor of shape {tuple(value.shape)}"
            raise KnockoutError(f"measure {self.name!r} returned {kind}: expected one number") from error
        if not math.isfinite(number):
            raise KnockoutError(
                f"measure {self.name!r} gave {number}: the logits hold NaN or infinite values. Run the model "
                "in float32, and check its weights and any attached hook."
            )
        return number
