"""What the package asks of a model, each question answered once.

1. Which kind it is: a TransformerBridge (TransformerLens 4), a HookedTransformer (3.9), or a plain
   transformers causal LM, which only the fused backend serves. No class is imported to find out.
2. What a trace must fit into: layers, vocabulary, context; read from `cfg` of a TransformerLens model, else
   from the transformers `config`.
3. How one layer's attention is computed: the module that does it, its heads, its sinks, its score function.
   Names of hook points are `hook_names`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.results.provenance import Provenance, package_versions
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

    def provenance(self, objective: str, backend: str, notes: Mapping[str, str]) -> Provenance:
        """What a result on this model states of its making."""
        dtype, device = str(self.dtype), str(self.device)
        return Provenance(self.name, objective, backend, dtype, device, package_versions(), notes)


def is_transformerlens(model: Any) -> bool:
    """Whether `model` has TransformerLens' hook points."""
    return hasattr(model, "hook_dict") and hasattr(model, "cfg")


def is_bridge(model: Any) -> bool:
    """Whether `model` is a TransformerBridge: hook points around a transformers model."""
    return hasattr(model, "original_model")


def wrapped_model(model: Any) -> Any:
    """What computes a forward pass: the transformers model that a bridge wraps, else `model` itself."""
    return model.original_model if is_bridge(model) else model


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that the model carries.

    Raises:
        ModelError: If it carries none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(
            f"model {model_facts(model).name!r} comes without a tokenizer, which is needed to cut text into "
            "steps: set `model.tokenizer`, or pass tokenizer=... where there is such an argument"
        )
    return tokenizer


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
    return _checked("layers", range(facts.n_layers) if layers is None else layers, facts.n_layers)


def check_heads(model: Any, heads: Sequence[int] | None) -> tuple[int, ...] | None:
    """The chosen query heads; None stands for all.

    Raises:
        ModelError: If a head does not exist or is named twice, or there is none.
    """
    return None if heads is None else _checked("heads", heads, count_heads(model))


def count_heads(model: Any) -> int:
    """Number of query heads of each layer."""
    if is_transformerlens(model):
        return int(model.cfg.n_heads)
    return int(model.config.get_text_config().num_attention_heads)


def _checked(kind: str, chosen: Sequence[int], n: int) -> tuple[int, ...]:
    chosen = tuple(int(number) for number in chosen)
    outside = [number for number in chosen if not 0 <= number < n]
    if outside or not chosen or len(set(chosen)) != len(chosen):
        problem = f"{outside} are outside it" if outside else "they must be distinct and at least one"
        name = "query heads" if kind == "heads" else kind
        raise ModelError(f"{kind}={list(chosen)}: the model has {name} 0..{n - 1}; {problem}")
    return chosen


def head_mask(heads: Sequence[int], n_heads: int, device: torch.device) -> Bool[Tensor, "head 1"]:
    """True in the rows of the chosen query heads.

    Raises:
        ModelError: If a head does not exist.
    """
    outside = [head for head in heads if not 0 <= head < n_heads]
    if outside:
        raise ModelError(f"heads {outside} do not exist: the layer has query heads 0..{n_heads - 1}")
    mask = torch.zeros(n_heads, 1, dtype=torch.bool, device=device)
    mask[list(heads)] = True
    return mask


def expand_heads(tensor: Tensor, n_heads: int, *, dim: int) -> Tensor:
    """Give each query head its KV head's vector along axis `dim` (GQA: consecutive query heads share one).

    Raises:
        ModelError: If the query heads cannot share the KV heads evenly.
    """
    repeats, rest = divmod(n_heads, tensor.shape[dim])
    if rest:
        raise ModelError(f"{n_heads} query heads cannot share {tensor.shape[dim]} KV heads evenly")
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=dim)


def original_attention(model: Any, layer: int) -> Any:
    """The wrapped attention module on a bridge, the attention component itself on a HookedTransformer."""
    attention = model.blocks[layer].attn
    return getattr(attention, "original_component", None) or attention


def class_names(component: Any) -> list[str]:
    """Names of a component's class and its bases: TransformerLens' classes are told by name, not imported."""
    return [kind.__name__ for kind in type(component).__mro__]


def computes_pattern_inside(attention: Any) -> bool:
    """Whether an attention module forms its pattern itself, out of reach of a hook on the scores.

    TransformerLens' own models (its native source) do; there the pattern can be edited instead.
    """
    return bool(getattr(attention, "accepts_pattern_fn", False))


def delegates_attention(model: Any, layer: int) -> bool:
    """Whether a layer leaves attention to the wrapped module, so that edited scores would be discarded."""
    if not is_bridge(model):
        return False
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return type(model.blocks[layer].attn).forward is AttentionBridge.forward


def attention_sinks(model: Any, layer: int) -> Float[Tensor, " head"] | None:
    """The learned logits that join the softmax beside the keys (gpt-oss); None where there are none."""
    if not is_bridge(model) and not getattr(model.cfg, "use_attention_sinks", False):
        return None
    return getattr(original_attention(model, layer), "sinks", None)


def score_function(model: Any, layer: int) -> Callable[[Tensor], Tensor]:
    """The map from `q . k` to the pre-softmax score: scale and soft-cap, read off the attention module."""
    component, attention = model.blocks[layer].attn, original_attention(model, layer)
    if getattr(attention, "scaling", None) is not None:
        scale = float(attention.scaling)
    elif computes_pattern_inside(attention):
        scale = 1 / float(attention.scale)
    elif getattr(component, "attn_scale", None) is not None:
        scale = 1 / float(component.attn_scale)
    else:
        scale = float(model.cfg.d_head) ** -0.5
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is None:  # TransformerLens writes "no cap" as -1 (3.9) or leaves the entry out
        configured = float(getattr(model.cfg, "attn_scores_soft_cap", -1.0) or -1.0)
        cap = configured if configured > 0 else None
    if cap is None:
        return lambda products: products * scale
    return lambda products: float(cap) * torch.tanh(products * scale / float(cap))
