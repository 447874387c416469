"""The passes of a knockout: what is cut, run and read, from a shared prefix or from the beginning each time.

1. A `Reading` is one query step, its candidates, and the rows of logits on which every cut of it is read.
2. `CutPasses.cuts` runs any number of cuts of one reading, each a set of key steps that are cut together,
   and says what they did, in order. It may be asked again, so a search can go by what it found.
3. `CachedPasses`: a plain pass, the pass that keeps keys and values, then batches over the tokens from the
   query step on, one row per cut. A batch holds at most `batch_tokens` rows times tokens seen. What cuts are
   held against:
   - a row of the same batch that is not cut, so that rounding by the shape of a pass cancels. Asked for more
     cuts of the reading it has just run, it keeps that row, unless the model computes in half precision,
     where such rounding is as large as an effect;
   - with `sparing`, and not in half precision: the logits of the pass that kept keys and values. A row is
     left uncut only after each eighth of the trace, to check the cache.
4. `FullPasses`: a plain pass over the trace per cut, and one without.

`tokens_run` counts the tokens that all forward passes were fed, rows times length: what the cost is
proportional to, apart from the attention to the prefix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.causal.cut import CutEffect, EdgeCut, Effect, KeySet, cut_mask
from stepflow_tl.models.facts import model_facts
from stepflow_tl.models.passes import NamedHook, model_device, whole_pass
from stepflow_tl.models.prefix_cache import PrefixCacheRefusal, fill_prefix
from stepflow_tl.saliency.objectives import token_nll
from stepflow_tl.trace import ReasoningTrace, Step

# Mean difference of NLL, in nats, between an uncut row and a plain pass. A cache that is not exact is off by
# tenths.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class Reading:
    """What is run and read for one query step: all its cuts are read on the same rows of logits.

    Attributes:
        query: The step whose queries are cut.
        keys: Candidates, as indices into `trace.steps`.
        joint: Sets of steps that the caller wants cut together.
        rows: Positions in the trace; the first is not before the step.
    """

    query: Step
    keys: tuple[int, ...]
    joint: tuple[KeySet, ...]
    rows: Int[Tensor, " row"]

    @property
    def end(self) -> int:
        """One past the last token that must run."""
        return max(int(self.rows[-1]) + 1, self.query.token_end)


class CutPasses(ABC):
    """Runs cuts of one trace, and counts what it ran in `tokens_run`."""

    name: str

    def __init__(self, model: Any, trace: ReasoningTrace, cut: EdgeCut, effect: Effect) -> None:
        """Ready to run; the hooks of `hooks` must be attached while it does."""
        self.hooks: list[NamedHook] = cut.hooks
        self.tokens_run = 0
        self.model, self._trace, self._cut, self._effect = model, trace, cut, effect
        self._tokens = trace.tokens.to(model_device(model))

    @abstractmethod
    def cuts(self, reading: Reading, key_sets: Sequence[KeySet]) -> list[CutEffect]:
        """What each cut did."""

    def notes(self) -> dict[str, str]:
        """What the provenance says of these passes."""
        return {}

    def _mask(
        self, queries: tuple[int, int], key_sets: Sequence[KeySet], n_queries: int, n_keys: int
    ) -> None:
        """Set what the next pass cuts; an empty set cuts nothing."""
        spans = [[self._trace.steps[key].token_span for key in keys] for keys in key_sets]
        self._cut.mask = cut_mask(queries, spans, n_queries, n_keys).to(self._tokens.device)

    def _following(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        return self._tokens[rows.to(self._tokens.device) + 1]


class CachedPasses(CutPasses):
    """From the shared prefix, in batches."""

    name = "cached"

    def __init__(
        self,
        model: Any,
        trace: ReasoningTrace,
        cut: EdgeCut,
        effect: Effect,
        batch_tokens: int,
        *,
        sparing: bool = False,
    ) -> None:
        """Run the trace twice, for its predictions and for its keys and values.

        Raises:
            PrefixCacheRefusal: If the model takes no such cache.
        """
        super().__init__(model, trace, cut, effect)
        self._batch_tokens = batch_tokens
        self._plain = token_nll(whole_pass(model, self._tokens)[:-1], self._tokens[1:])
        self._prefix, logits = fill_prefix(model, self._tokens)
        self._worst, self._dtype = 0.0, model_facts(model).dtype
        self._kept = logits if sparing and self._dtype in _TOLERANCE else None
        self._checked_to = -len(trace)
        self._uncut: tuple[Reading, Tensor] | None = None
        self.tokens_run = 2 * len(trace)

    def cuts(self, reading: Reading, key_sets: Sequence[KeySet]) -> list[CutEffect]:
        """What each cut did; a PrefixCacheRefusal if an uncut row shows that the cache is not exact."""
        known = None
        if self._uncut is not None and self._uncut[0] is reading and self._dtype in _TOLERANCE:
            known = self._uncut[1]
        elif self._kept is not None and reading.end < self._checked_to + len(self._trace) / 8:
            known = self._kept[reading.rows.to(self._kept.device)]
        size = max(1, self._batch_tokens // reading.end - (known is None))  # one row is not cut
        return [
            cut
            for first in range(0, len(key_sets), size)
            for cut in self._batch(reading, key_sets[first : first + size], known)
        ]

    def notes(self) -> dict[str, str]:
        """How far the cache was off."""
        return {"self_check": f"mean NLL off by at most {self._worst:.1e} nats"}

    def _batch(
        self, reading: Reading, key_sets: Sequence[KeySet], uncut: Float[Tensor, "row vocabulary"] | None
    ) -> list[CutEffect]:
        start, end = reading.query.token_start, reading.end
        row_sets = [*key_sets] if uncut is not None else [(), *key_sets]
        self._mask((0, reading.query.n_tokens), row_sets, end - start, end)
        logits = self._prefix.run(start, end, len(row_sets))
        self._cut.check_fired()
        self.tokens_run += len(row_sets) * (end - start)
        rows, following = reading.rows.to(self._tokens.device), self._following(reading.rows)
        logits = logits[:, rows - start]
        if uncut is None:
            uncut, logits = logits[0], logits[1:]
            self._check(reading, uncut, following)
            self._uncut = (reading, uncut.clone())
            self._checked_to = reading.end
        return [self._effect(cut, uncut, following) for cut in logits]

    def _check(
        self, reading: Reading, uncut: Float[Tensor, "row vocabulary"], following: Int[Tensor, " row"]
    ) -> None:
        plain = self._plain[reading.rows.to(self._plain.device)]
        deviation = float((token_nll(uncut, following) - plain).abs().mean())
        if not deviation <= _TOLERANCE.get(self._dtype, _HALF_TOLERANCE):
            raise PrefixCacheRefusal(
                f"from the cache, the predictions of step {reading.query.label} are off by "
                f"{deviation:.1e} nats on average"
            )
        self._worst = max(self._worst, deviation)


class FullPasses(CutPasses):
    """One plain pass over the trace per cut, under hooks that stay on."""

    name = "full"

    def __init__(
        self,
        model: Any,
        trace: ReasoningTrace,
        cut: EdgeCut,
        effect: Effect,
        standing: Sequence[NamedHook] = (),
    ) -> None:
        """Nothing runs yet."""
        super().__init__(model, trace, cut, effect)
        self.hooks = [*standing, *cut.hooks]
        self._clean: Tensor | None = None

    def cuts(self, reading: Reading, key_sets: Sequence[KeySet]) -> list[CutEffect]:
        """What each cut did."""
        rows, following = reading.rows.to(self._tokens.device), self._following(reading.rows)
        if self._clean is None:
            self._cut.mask = None
            self._clean = self._pass()
        found = []
        for keys in key_sets:
            self._mask(reading.query.token_span, [keys], len(self._trace), len(self._trace))
            found.append(self._effect(self._pass()[rows], self._clean[rows], following))
        return found

    def _pass(self) -> Float[Tensor, "token vocabulary"]:
        logits = whole_pass(self.model, self._tokens)
        self._cut.check_fired()
        self.tokens_run += len(self._trace)
        return logits
