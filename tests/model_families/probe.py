"""What works on one model: every analysis of the package is run, held against its slow twin, and noted.

1. Each capability is a method that runs a part of the package on the model and asserts that the numbers
   agree with those of another path: a backend with the hooks backend, the hooks backend with one backward
   pass per token, decoding from a cache with one pass, knockout from a shared prefix with whole passes.
2. The answer is "" where that holds. Where the package refuses, with an error of its own family, it is the
   reason. Any other exception, a number that disagrees, a hook that is left behind: those are defects, and
   propagate.
3. In a hybrid model only layers with an attention pattern are asked for; `whole` says if those are all.
4. The float64 of `float64_everywhere` is assumed: tolerances are those of rounding.

Every check is guarded against vacuity: maps have mass in every layer, StepFlow moves the logits and counts
what it did, knockout has effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from stepflow_tl import StepFlow, step_knockout, step_saliency
from stepflow_tl.errors import ModelError, StepflowError
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.saliency.backends import per_token_deviation

TOLERANCE = 1e-8
#: Passes that begin in a cache sum in another order, through every layer.
CACHED_TOLERANCE = 1e-6
STRENGTH = dict(tau_max=0.3, alpha=0.5)
BACKENDS = ("fused", "hooks", "layerwise")
CAPABILITIES = (
    *(f"{objective} {backend}" for objective in ("per_token", "response") for backend in BACKENDS),
    "bridge",
    "momentum",
    "cached generation",
    "cached knockout",
    "knockout",
)


@dataclass(frozen=True)
class Support:
    """Answers for one model.

    Attributes:
        answers: By capability, "" (works) or the reason why it is refused.
        whole: "" if every layer has a pattern, else the reason why some have not.
        layers: Layers with a pattern.
    """

    answers: dict[str, str]
    whole: str
    layers: tuple[int, ...]

    @property
    def status(self) -> str:
        """In a word."""
        if not self.layers:
            return "refused"
        if self.whole:
            return "attention layers only"
        return "in part" if any(self.answers.values()) else "works"


class CacheDiffersError(Exception):
    """The model's own decoding from a cache differs from one pass, without anything of ours."""


def probe(model: Any, trace: Any) -> Support:
    """Try every capability on `model`."""
    model(trace.tokens[None], return_type="logits")  # TransformerLens wires itself up in the first pass
    checks = Checks(model, trace)
    answers = {}
    for name in CAPABILITIES:
        before = attached_hooks(model)
        answers[name] = _answer(checks, name)
        assert attached_hooks(model) == before, f"{name} left hooks on the model"
    return Support(answers, refusal_of_all_layers(model), checks.layers)


def attached_hooks(model: Any) -> int:
    """PyTorch hooks on all modules of the model, hook points among them, and forwards put in place."""
    modules = list(model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return hooks + sum("forward" in m.__dict__ for m in modules)


def refusal_of_all_layers(model: Any) -> str:
    """Why the model cannot be mapped in all layers; "" if it can."""
    try:
        resolve_hooks(model)
    except ModelError as refusal:
        return str(refusal)
    return ""


def _answer(checks: Checks, name: str) -> str:
    try:
        checks.run(name)
    except StepflowError as refusal:
        return str(getattr(refusal, "reason", refusal))
    except CacheDiffersError:
        return "the bridge's own decoding from a cache differs from one pass, without StepFlow"
    return ""


class Checks:
    """One model, one trace, and a check a capability."""

    def __init__(self, model: Any, trace: Any) -> None:
        """Find the layers that can be asked for."""
        self.model, self.trace, self.ids = model, trace, trace.tokens[None]
        n_layers = int(model.cfg.n_layers)
        self.layers = tuple(n for n in range(n_layers) if f"blocks.{n}.attn.hook_pattern" in model.hook_dict)
        self.is_whole = len(self.layers) in (0, n_layers)

    def run(self, name: str) -> None:
        """Run the check behind a capability's name."""
        if name.startswith(("per_token", "response")):
            self.check_map(*name.split())
        elif name.endswith("knockout"):
            self.check_knockout("cached" if name.startswith("cached") else "full")
        elif name == "cached generation":
            self.check_cached_generation()
        else:
            self.check_flow(tau_max=0.3 * (name == "bridge"), alpha=0.5 * (name == "momentum"))

    @cache  # noqa: B019 - one object a model, gone with it
    def saliency(self, objective: str, backend: str) -> torch.Tensor:
        """Sums with mass in every layer."""
        layers = None if self.is_whole else self.layers
        found = step_saliency(
            self.model,
            self.trace,
            backend=backend,
            objective=objective,
            layers=layers,  # pyright: ignore
        )
        assert found.provenance.backend == backend
        assert found.sums.dtype == torch.float64 and found.sums.isfinite().all()
        assert found.sums.flatten(1).amax(1).min() > 1e-9, "a layer has no mass"
        return found.sums

    def check_map(self, objective: str, backend: str) -> None:
        """Against the hooks backend; `per_token` also against one backward pass per token."""
        found = self.saliency(objective, backend)
        if objective == "per_token":
            deviation = per_token_deviation(self.model, self.trace.tokens, backend)
            assert deviation < TOLERANCE, f"one-pass rows are off by {deviation:.1e}"
        try:
            expected = self.saliency(objective, "hooks")
        except ModelError:
            assert objective == "per_token", "only the rows of per_token have a second reference"
            return
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.max()))

    def check_flow(self, **strength: float) -> None:
        """One half of StepFlow on a whole pass: it acts where it should, and the logits move."""
        flow = self._flow(**strength)
        plain = self.model(self.ids, return_type="logits")
        hooks = flow.hooks(self.model, self.trace)
        with self.model.hooks(fwd_hooks=hooks):
            moved = self.model(self.ids, return_type="logits")
        assert moved.isfinite().all() and (moved - plain).abs().max() > 1e-4, "the logits did not move"
        report, (shallow, deep) = hooks.report(), flow.bands(self.model)
        assert all(report.of(layer).adjusted for layer in shallow), "the bridge adjusted nothing"
        assert all(report.of(layer).injections for layer in deep), "momentum injected nothing"

    def check_cached_generation(self) -> None:
        """Decoding from a cache under StepFlow, a chunk, then single tokens, against one pass."""
        flow = self._flow(**STRENGTH)
        with self.model.hooks(fwd_hooks=flow.hooks(self.model, self.trace)):
            expected = self.model(self.ids, return_type="logits")
        if not _agree(self._decoded(), self.model(self.ids, return_type="logits")):
            raise CacheDiffersError
        with flow.generating(self.model) as run:
            found = self._decoded()
        assert run.report().injections and run.report().adjusted
        assert _agree(found, expected), "decoding under StepFlow differs from one pass under it"

    def check_knockout(self, method: str) -> None:
        """Against whole passes, where it runs from a shared prefix."""
        options = dict(pairs=[("T2", "T1"), ("T2", "Q"), ("S1", "T1")])
        if not self.is_whole:
            options["layers"] = self.layers  # pyright: ignore[reportArgumentType]
        found = step_knockout(self.model, self.trace, method=method, **options)  # pyright: ignore
        assert found.provenance.backend == method and found.effects.abs().max() > 1e-3
        if method == "cached":
            whole = step_knockout(self.model, self.trace, method="full", **options)  # pyright: ignore
            torch.testing.assert_close(found.effects, whole.effects, rtol=0, atol=CACHED_TOLERANCE)

    def _flow(self, **strength: float) -> Any:
        bands = {} if self.is_whole else dict(shallow=self.layers[:1], deep=self.layers[-1:])
        return StepFlow(**strength, **bands)  # pyright: ignore[reportArgumentType]

    def _decoded(self) -> torch.Tensor:
        """Logits of the trace, given in pieces: the question, chunks of nine, single tokens."""
        start, end = self.trace.steps[0].token_end + 2, len(self.trace)
        cuts = [0, start, *range(start + 4, end - 6, 9), *range(end - 6, end + 1)]
        pieces, held = [], None
        for first, last in zip(cuts, cuts[1:], strict=False):
            logits, held = self.model(
                self.ids[:, first:last], return_type="logits_and_cache", past_key_values=held, use_cache=True
            )
            pieces.append(logits)
        return torch.cat(pieces, 1)


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < CACHED_TOLERANCE)
