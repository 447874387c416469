"""StepFlow: both interventions on a model, over a finished trace or while it generates.

1. Bands: the bridge acts in the shallow quarter of the layers, momentum in the deep quarter (`bands`), or in
   the layers given.
2. Each shallow layer gets `bridge_hook` at its scores, or `bridge_pattern_hook` where only the pattern can be
   edited; each deep layer gets `capture_values_hook` at its values and `momentum_hook` at z. A half whose
   strength is 0 attaches nothing.
3. `hooks` gives them for passes over given traces, `generating` keeps them on a model while it decodes. Hook
   points are named by their own names, never an alias, so that compatibility mode runs each hook once.
4. `calls` gives the same for passes over given traces in which no scores are formed, on transformers models
   without hook points as well.

Controls of matched size come with it (`placebo`): a random region in place of the bridge, a random direction
in place of the momentum; everything else, tau and norm included, is the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.models.attention_interface import installed, refusal_reason
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.models.facts import (
    attention_sinks,
    check_heads,
    check_layers,
    count_heads,
    head_mask,
    is_transformerlens,
    model_facts,
    tokenizer_of,
)
from stepflow_tl.models.hook_names import LayerHooks, by_heads, refuse_delegated, resolve_hooks
from stepflow_tl.models.passes import NamedHook, attached
from stepflow_tl.stepflow.bridge import bridge_hook, bridge_pattern_hook, check_bridge
from stepflow_tl.stepflow.bridged_attention import Bridge
from stepflow_tl.stepflow.calls import FlowAttention, FlowCalls, Momentum
from stepflow_tl.stepflow.momentum import capture_values_hook, momentum_hook
from stepflow_tl.stepflow.report import FlowHooks, FlowReport
from stepflow_tl.stepflow.state import Boundaries, FlowState, Granularity
from stepflow_tl.stepflow.streaming import FlowRun, TokenStream, following
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats.chat_template import resolve_format
from stepflow_tl.trace.splitting.tracker import TokenTracker

Placebo = Literal["bridge", "momentum", "both"]


@dataclass(frozen=True)
class StepFlow:
    """The repair of the paper: Odds-Equal Bridge in shallow layers, Step Momentum Injection in deep ones.

    Args:
        tau_max: Highest floor of the bridge's attention mass; 0 turns the bridge off.
        alpha: Size of the injections; 0 turns momentum off.
        shallow: Layers of the bridge; the bottom quarter by default.
        deep: Layers of momentum; the top quarter by default.
        granularity: "segment" (the paper) or "step": what the bridge leads from and to, see
            `stepflow.state`.
        max_bridge_share: Highest part of the movable mass that the bridge may be raised to.
        window: Momentum averages only the last so many tokens of the step before; None: all of them.
        boundaries: Which new steps get momentum, see `stepflow.momentum`.
        heads: Heads to act on: all (None), the same ones in every layer, or a mapping from layer to heads
            (layers that it does not name are left alone).
        placebo: Which half is replaced by its control: "bridge", "momentum" or "both".
        seed: Seed of the controls.

    Raises:
        ValueError: If an argument is out of range; the message says what was expected.
    """

    tau_max: float = 0.15
    alpha: float = 0.06
    shallow: Sequence[int] | None = None
    deep: Sequence[int] | None = None
    granularity: Granularity | str = "segment"
    max_bridge_share: float = 0.9
    window: int | None = None
    boundaries: Boundaries | str = "response"
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    placebo: Placebo | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values without a meaning; equal flows read the same, so that a file can name one."""
        check_bridge(self.tau_max, self.max_bridge_share)
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha is {self.alpha}: expected a finite number")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window is {self.window}: expected at least 1 token, or None for the whole step"
            )
        for name, known in (("granularity", Granularity), ("boundaries", Boundaries), ("placebo", Placebo)):
            choices = (None, *get_args(known)) if name == "placebo" else get_args(known)
            if getattr(self, name) not in choices:
                names = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {names}")
        for name in ("tau_max", "alpha", "max_bridge_share"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("shallow", "deep"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.heads, Sequence):
            object.__setattr__(self, "heads", tuple(self.heads))

    @classmethod
    def parse(cls, text: str) -> StepFlow:
        """The StepFlow of a `repr`, as results and ledgers state it; nothing is executed.

        Args:
            text: Such as "StepFlow(tau_max=0.15)".

        Raises:
            ValueError: If the text is anything else, or an argument is not a literal or out of range.
        """
        try:
            call = ast.parse(text[:65536], mode="eval").body
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "StepFlow" and not call.args:
                return cls(**{str(each.arg): ast.literal_eval(each.value) for each in call.keywords})
        except TypeError as error:  # an argument that there is not, or one of another type
            raise ValueError(f"{text[:60]!r}: {error}") from error
        except (SyntaxError, RecursionError, MemoryError):  # what hostile text can make the parser do
            pass
        raise ValueError(f"{text[:60]!r}: expected the repr of a StepFlow")

    def bands(self, model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers of the bridge and of momentum on this `model`; a ModelError if one does not exist."""
        facts = model_facts(model)
        shallow = shallow_band(facts.n_layers) if self.shallow is None else self.shallow
        deep = deep_band(facts.n_layers) if self.deep is None else self.deep
        shallow, deep = (check_layers(facts, layers) if layers else () for layers in (shallow, deep))
        return shallow if self.tau_max else (), deep if self.alpha else ()

    def layers(self, model: Any) -> tuple[int, ...]:
        """Layers of this `model` in which anything is done; a ModelError if one does not exist."""
        shallow, deep = self.bands(model)
        return tuple(sorted({*shallow, *deep}))

    def hooks(
        self,
        model: Any,
        trace: ReasoningTrace | Sequence[ReasoningTrace],
        *,
        detach_values: bool = False,
        padding_side: Literal["left", "right"] = "left",
    ) -> FlowHooks:
        """Hooks for forward passes over exactly the tokens of `trace`.

        Args:
            model: A TransformerLens model.
            trace: One trace, or one per row of the batch, padded to the longest.
            detach_values: Let the values that momentum carries to later steps pass no gradient back. For
                `objective="per_token"` this is exact: what a row does reaches its own loss only along its own
                position, and momentum leads to later positions only.
            padding_side: Where a batch of traces is padded.

        Returns:
            `fwd_hooks` for `model.hooks`, `run_with_hooks` and the like, with a `report()`.

        Raises:
            ModelError: If a layer, head or hook point is missing or cannot be edited.
        """
        traces = [trace] if isinstance(trace, ReasoningTrace) else list(trace)
        state = FlowState.from_traces(traces, padding_side)
        report = FlowReport(*self.bands(model))
        return FlowHooks(self._pairs(model, state, report, detach_values), report)

    def calls(self, model: Any, trace: ReasoningTrace, *, detach_values: bool = False) -> FlowCalls:
        """The same for attention calls that form no scores, in passes over exactly the tokens of `trace`.

        Args:
            model: A TransformerBridge or a transformers causal LM.
            trace: The trace.
            detach_values: As in `hooks`.

        Raises:
            ModelError: If a layer or head does not exist.
        """
        report = FlowReport(*self.bands(model))
        return self._calls(model, FlowState.from_trace(trace), report, detach_values)

    @contextmanager
    def generating(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        format: Any = "auto",
        splitter: Any = None,
        summary_splitter: Any = None,
        question_splitter: Any = None,
    ) -> Iterator[FlowRun]:
        """Keep StepFlow on `model` for the time of the context, whatever runs it.

        Works around `generate` of TransformerBridge, HookedTransformer and transformers, `hf_generate`,
        pipelines, and passes made by hand, with or without a KV cache, for batches, and for several sequences
        in turn.

        Where attention goes through transformers' attention interface, no scores are formed: all layers run
        SDPA, and those of the bridge correct its output (`bridged_attention`). On a TransformerBridge, a
        layer where a hook listens at the scores or the pattern computes them, for as long as it does. Other
        models run their eager attention with `bridge_hook`.

        Args:
            model: A TransformerLens model or a transformers causal LM.
            tokenizer: The model's own by default.
            format: Name of the reasoning format, a `ReasoningFormat`, or "auto" for the tokenizer's own.
            splitter: Cuts thinking into steps; default: paragraphs.
            summary_splitter: Cuts the summary; default: like thinking.
            question_splitter: Cuts the question; default: one step.

        Yields:
            The run, with a `report()`.

        Raises:
            ModelError: If the model has no tokenizer, or a hook point is missing; inside the context, if
                passes cannot be followed (beam search, a preallocated cache, a prefix that ran outside).
            FormatError: If the format is unknown.
        """
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        entry = resolve_format(tokenizer, format)
        splitters = (splitter, summary_splitter, question_splitter)
        stream = TokenStream(lambda: TokenTracker(tokenizer, entry, *splitters))
        report = FlowReport(*self.bands(model))
        with ExitStack() as stack:
            if self.layers(model):
                stack.enter_context(following(model, stream))
                stack.enter_context(self._on(model, stream.state, report))
            yield FlowRun(stream, report)

    @contextmanager
    def _on(self, model: Any, state: FlowState, report: FlowReport) -> Iterator[None]:
        """Keep it on the model: inside attention calls where that serves, else as hooks."""
        reason = refusal_reason(model, may_listen=True)
        if reason is not None and not is_transformerlens(model):
            raise ModelError(f"StepFlow cannot act on this model while it generates: {reason}")
        if reason is not None:
            with attached(model, last=self._pairs(model, state, report, detach_values=False)):
                yield
            return
        calls = self._calls(model, state, report, detach_values=False)

        @cache
        def scores_hooks(layer: int) -> list[NamedHook]:
            (hooks,) = resolve_hooks(model, [layer]).layers
            return self._at_scores(model, hooks, state, report)

        def eager(layer: int) -> AbstractContextManager[None]:
            acts = layer in calls.bridges or layer in calls.shifts
            return attached(model, last=scores_hooks(layer)) if acts else nullcontext()

        with attached(model, last=calls.hooks), installed(model, FlowAttention(calls), eager):
            yield

    def _pairs(
        self, model: Any, state: FlowState, report: FlowReport, detach_values: bool
    ) -> list[NamedHook]:
        pairs: list[NamedHook] = []
        for hooks in resolve_hooks(model, self.layers(model)).layers:
            pairs += self._at_scores(model, hooks, state, report)
            heads = self._heads_of(model, hooks.layer)
            if hooks.layer in report.deep and heads != ():
                shared = dict(state=state, heads=heads, report=report)
                pairs += self._momentum(model, hooks, shared, detach_values)
        return pairs

    def _at_scores(
        self, model: Any, hooks: LayerHooks, state: FlowState, report: FlowReport
    ) -> list[NamedHook]:
        """What acts at one layer's scores, or at its pattern, in order."""
        heads = self._heads_of(model, hooks.layer)
        if hooks.layer not in report.shallow or heads == ():
            return []
        return [self._bridge(model, hooks, dict(state=state, heads=heads, report=report))]

    def _calls(self, model: Any, state: FlowState, report: FlowReport, detach_values: bool) -> FlowCalls:
        bridges: dict[int, Bridge] = {}
        momenta: dict[int, Momentum] = {}
        hooks: list[NamedHook] = []
        for layer in sorted({*report.shallow, *report.deep}):
            heads = self._heads_of(model, layer)
            if heads == ():
                continue
            if layer in report.shallow:
                mask = None if heads is None else head_mask(heads, count_heads(model), torch.device("cpu"))
                bridges[layer] = Bridge(self.tau_max, self.max_bridge_share, mask)
            if layer in report.deep:
                shared = dict(state=state, heads=heads, report=report)
                if is_transformerlens(model):
                    (points,) = resolve_hooks(model, [layer]).layers
                    hooks += self._momentum(model, points, shared, detach_values)
                else:
                    momenta[layer] = self._momentum_of(shared, detach_values)
        granularity: Any = self.granularity
        return FlowCalls(state, report, bridges, granularity, self._seed_of("bridge"), momenta, hooks)

    def _seed_of(self, half: str) -> int | None:
        """The seed of a half's control; None where the half itself is in force."""
        return self.seed if self.placebo in (half, "both") else None

    def _heads_of(self, model: Any, layer: int) -> tuple[int, ...] | None:
        """Heads to act on in a layer: None for all, () for a layer that is left alone."""
        heads = self.heads.get(layer, ()) if isinstance(self.heads, Mapping) else self.heads
        return () if heads is not None and not len(heads) else check_heads(model, heads)

    def _bridge(self, model: Any, hooks: LayerHooks, shared: dict[str, Any]) -> NamedHook:
        advice = "Leave the layer out with shallow=[...], or use tau_max=0 for momentum alone."
        refuse_delegated(model, hooks, advice)
        options = dict(
            tau_max=self.tau_max,
            max_bridge_share=self.max_bridge_share,
            granularity=self.granularity,
            placebo_seed=self._seed_of("bridge"),
            **shared,
        )
        if hooks.scores is None:
            return hooks.pattern, partial(bridge_pattern_hook, **options)
        return hooks.scores, partial(bridge_hook, sinks=attention_sinks(model, hooks.layer), **options)

    def _momentum(
        self, model: Any, hooks: LayerHooks, shared: dict[str, Any], detach_values: bool
    ) -> list[NamedHook]:
        if hooks.value is None or hooks.z is None:
            raise ModelError(
                f"layer {hooks.layer} has no hook point for its values or its z, which momentum needs: leave "
                "the layer out with deep=[...], or use alpha=0 for the bridge alone"
            )
        capture, inject = self._momentum_of(shared, detach_values)
        pairs = ((hooks.value, capture), (hooks.z, inject))
        return [(name, by_heads(model, name, function)) for name, function in pairs]

    def _momentum_of(self, shared: dict[str, Any], detach_values: bool) -> Momentum:
        inject = partial(
            momentum_hook,
            alpha=self.alpha,
            window=self.window,
            boundaries=self.boundaries,  # pyright: ignore[reportArgumentType]  # checked when made
            placebo_seed=self._seed_of("momentum"),
            **shared,
        )
        return Momentum(partial(capture_values_hook, state=shared["state"], detach=detach_values), inject)
