"""What a trace must fit into: layers, vocabulary, context, dtype and device of a model.

Read from `cfg` of a TransformerLens model, or from `config` of a plain transformers causal LM, which only the
fused backend serves. Nothing is imported to find out which of the two it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.trace import ReasoningTrace


@dataclass(frozen=True)
class ModelFacts:
    """Facts about one model.

    Attributes:
        name: The model's own name.
        n_layers: Number of layers.
        n_vocab: Number of token ids it can embed.
        n_ctx: Longest sequence, in tokens.
        dtype: Floating dtype of the weights.
        device: Device of the weights.
    """

    name: str
    n_layers: int
    n_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device


def is_transformerlens(model: Any) -> bool:
    """Whether `model` has TransformerLens' hook points."""
    return hasattr(model, "hook_dict") and hasattr(model, "cfg")


def model_facts(model: Any) -> ModelFacts:
    """Read the facts of a TransformerLens model or a transformers causal LM.

    Raises:
        ModelError: If `model` is neither.
    """
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    device = parameters[0].device if parameters else torch.device("cpu")
    if is_transformerlens(model):
        cfg = model.cfg
        return ModelFacts(
            str(cfg.model_name), int(cfg.n_layers), int(cfg.d_vocab), int(cfg.n_ctx), dtype, device
        )
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "base_model"):
        raise ModelError(
            f"{type(model).__name__} is neither a TransformerLens model (no `hook_dict`) nor a transformers "
            "causal LM: wrap it with TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)."
        )
    text = config.get_text_config()  # pyright: ignore[reportOptionalMemberAccess]
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    n_ctx = int(getattr(text, "max_position_embeddings", 0) or 2**62)
    return ModelFacts(name, int(text.num_hidden_layers), int(text.vocab_size), n_ctx, dtype, device)


def check_fit(facts: ModelFacts, trace: ReasoningTrace) -> None:
    """Refuse a trace that this model cannot read.

    Raises:
        ModelError: If a token id is outside the vocabulary, the trace is longer than the context, or it has
            no step.
    """
    outside = ((trace.tokens < 0) | (trace.tokens >= facts.n_vocab)).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ModelError(
            f"token id {int(trace.tokens[position])} at position {position} is outside the model's "
            f"vocabulary of {facts.n_vocab}: build the trace with this model's own tokenizer"
        )
    if len(trace) > facts.n_ctx:
        raise ModelError(
            f"the trace has {len(trace)} tokens, but the model's context holds {facts.n_ctx}: shorten the "
            "trace, or load the model with a longer context"
        )
    if not trace.steps:
        raise ModelError("the trace has no step, only template tokens: there is nothing to map")


def check_layers(facts: ModelFacts, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen layers, all by default.

    Raises:
        ModelError: If a layer does not exist or is named twice, or there is none.
    """
    chosen = tuple(range(facts.n_layers)) if layers is None else tuple(int(layer) for layer in layers)
    outside = [layer for layer in chosen if not 0 <= layer < facts.n_layers]
    if outside or not chosen or len(set(chosen)) != len(chosen):
        problem = f"{outside} are outside it" if outside else "they must be distinct and at least one"
        raise ModelError(f"layers={list(chosen)}: the model has layers 0..{facts.n_layers - 1}; {problem}")
    return chosen
