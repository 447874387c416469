"""StepFlow's options as an engine hands them over, and StepFlow on its model.

1. The names are those of `runs.flow_options`, whose way of reading a text serves here too: `shallow=0-6`.
   An engine may have read a text already, as a number (`shallow=5`) or a list.
2. `stepflow=true` switches it on. An option of StepFlow without that is refused: it would change nothing.
3. `EngineFlow.on` keeps it on a model for one batch. What it did is counted: where it has found nothing to
   act on in `PATIENCE` texts, it says so instead of reporting a plain model's scores as StepFlow's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from stepflow_tl.errors import InputFileError, ModelError
from stepflow_tl.evaluation.decoding import row_name
from stepflow_tl.evaluation.generation import flow_on
from stepflow_tl.runs.flow_options import FlowOptions
from stepflow_tl.runs.options import parse_numbers
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.stepflow.streaming import FlowRun
from stepflow_tl.trace.formats import ReasoningFormat
from stepflow_tl.trace.formats.chat_template import resolve_format
from stepflow_tl.trace.splitting.splitters import resolve_splitter
from stepflow_tl.trace.steps import Segment

PATIENCE = 8
_OWN = ("stepflow", "format", "splitter")
_NAMES = {each.metadata.get("name", each.name): each for each in fields(FlowOptions)}


@dataclass(frozen=True)
class EngineOptions:
    """What an engine's user asks for.

    Attributes:
        flow: What is put on the model; None for nothing.
        format: The reasoning format, or "auto" for the tokenizer's own.
        splitter: What cuts steps.
    """

    flow: StepFlow | None = None
    format: str = "auto"
    splitter: str = "paragraph"

    @classmethod
    def taken_from(cls, given: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
        """The options among an engine's model arguments, and the arguments that are left.

        Args:
            given: By name; texts as on a command line, or what the engine made of them.

        Raises:
            InputFileError: If a value has no meaning, or StepFlow has options but is not on.
        """
        rest = {name: value for name, value in given.items() if name not in (*_OWN, *_NAMES)}
        asked = {name: given[name] for name in given if name in _NAMES}
        is_on = _truth(given.get("stepflow", False))
        if asked and not is_on:
            raise InputFileError(f"{', '.join(asked)}: these are StepFlow's; add stepflow=true")
        flow = (
            FlowOptions(**{_NAMES[n].name: _read(n, v) for n, v in asked.items()}).flow() if is_on else None
        )
        splitter = str(given.get("splitter", cls.splitter))
        resolve_splitter(splitter)
        return cls(flow, given.get("format") or cls.format, splitter), rest


def _truth(value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False, "none": False}
    if str(value).lower() not in words:
        raise InputFileError(f"stepflow is {value!r}: expected true or false")
    return words[str(value).lower()]


def _read(name: str, value: Any) -> Any:
    """One value as `FlowOptions` takes it."""
    read = _NAMES[name].metadata.get("type")
    if value is None or isinstance(value, str) and value.lower() in ("", "none"):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    try:
        return read(str(value)) if read is not None else value
    except ValueError as error:
        expected = "numbers and ranges such as 0-6" if read is parse_numbers else "a number"
        raise InputFileError(f"{name} is {value!r} ({error}): expected {expected}") from error


class EngineFlow:
    """StepFlow for an engine's model."""

    def __init__(self, options: EngineOptions, model: Any, tokenizer: Any) -> None:
        """Nothing is put on the model yet.

        Args:
            options: What is asked for.
            model: A TransformerLens model or a transformers causal LM.
            tokenizer: Its own.

        Raises:
            ModelError: If a layer does not exist in the model.
            FormatError: If the format is unknown.
        """
        self._options, self._model, self._tokenizer = options, model, tokenizer
        if options.flow is not None:
            options.flow.bands(model)
            _ = self.format  # resolved now, before hours are spent
        self._n_texts, self._has_acted = 0, False

    @cached_property
    def format(self) -> ReasoningFormat:
        """The reasoning format; a FormatError where the tokenizer's own is asked for and not known."""
        return resolve_format(self._tokenizer, self._options.format)

    @property
    def key(self) -> str:
        """Tells apart what is put on the model, for caches; empty for nothing."""
        flow = self._options.flow
        if flow is None:
            return ""
        what = f"{flow!r} {self.format!r} {self._options.splitter}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    @contextmanager
    def on(
        self, prompts: Sequence[Sequence[int]], samples: Sequence[int] | None = None, *, counts: bool = True
    ) -> Iterator[FlowRun | None]:
        """Keep it on the model for the time of one batch.

        Args:
            prompts: Token ids of each row without padding: what a control's random draws come from, so that
                they do not depend on the batch.
            samples: Which answer to its prompt each row is; the first by default.
            counts: Whether these are texts of the user's, in which it should find something to act on.

        Yields:
            The run; None where nothing is on.

        Raises:
            ModelError: If it has found nothing to act on in the first texts.
        """
        asked = self._options
        with flow_on(
            self._model, self._tokenizer, asked.flow, format=self.format, splitter=asked.splitter
        ) as run:
            if run is not None:
                numbers = samples or [0] * len(prompts)
                run.name_rows([row_name(prompt, n) for prompt, n in zip(prompts, numbers, strict=True)])
            yield run
        if run is not None and counts:
            self._n_texts += len(prompts)
            self._has_acted |= _acted(run, prompts)
            if self._n_texts >= PATIENCE and not self._has_acted:
                raise ModelError(
                    f"StepFlow found nothing to act on in {self._n_texts} texts: with the format "
                    f"{self.format.name!r} no token was read that thinks after a question or sums up after "
                    "thinking. Let the engine apply the chat template (lm-eval: --apply_chat_template), or "
                    "name another format; where only the first token of an answer is scored, there is "
                    "nothing to repair."
                )


def _acted(run: FlowRun, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether it found something to act on, padding on the right apart, which looks like an answer."""
    report, segments = run.report(), run.stream.segments
    if not report.injections and not any(layer.rows for layer in report.layers.values()):
        return False
    n_columns = segments.shape[1]
    if n_columns > max(map(len, prompts)):  # generated
        return True
    whole = segments[[row for row, prompt in enumerate(prompts) if len(prompt) == n_columns]]
    return bool(np.isin(whole, (Segment.THINKING, Segment.SUMMARY)).any())
