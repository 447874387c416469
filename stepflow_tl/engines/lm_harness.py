# pyright: reportMissingImports=false
r"""The model "stepflow" of lm-evaluation-harness: its `HFLM`, with StepFlow by `--model_args`.

    python -m stepflow_tl.engines.lm_harness run --model stepflow --apply_chat_template --tasks gsm8k \\
        --model_args pretrained=NAME stepflow=true tau_max=0.15 shallow=0-6 deep=21-27 placebo=both

1. Release 0.4.13 of the harness finds models in a table of its own (`lm_eval.models.MODEL_MAPPING`) and has
   no entry points, so this module registers the class and runs the harness' command line. With `accelerate
   launch -m` in place of `python -m`, every process takes its share of the requests. (Where a process sees
   one GPU or none, `HFLM` 0.4.13 lets each answer all of them; here each has its share there too.)
2. `HFLM` loads the model by its name; dtype, quantisation, `parallelize`, batches, `think_end_token` and the
   chat template are its own. A GGUF file, or "smollm2", is read by this package, in seconds.
3. `generate_until`: StepFlow is on the model for one `generate` at a time, and every row has its own steps.
4. `loglikelihood`: StepFlow over context and continuation in one pass. That is exact: what a token's place
   is depends on no later token, so one pass and decoding token by token give the same logits. But it acts
   only on tokens that think or sum up; where none is read, as with a single token after a question, every
   score is the plain model's, and the run is refused after a few texts (`options.PATIENCE`).
   `loglikelihood_rolling` cuts a long text into windows that are read apart; in all but the first, the
   question that StepFlow leads back to is missing, so a text of several windows is refused.
5. The harness' cache of answers (`--use_cache`) has keys made of the request alone. StepFlow, format and
   splitter become part of them; a plain run keeps the harness' own keys.

With `stepflow=false` the class is `HFLM`, with the attention that StepFlow's passes use. What it writes may
differ from `evaluate` where a model's own generation settings (a repetition penalty) shape its answers: the
harness keeps them, `evaluate` leaves them out.

Cost: that of StepFlow's passes. Nothing stays on the model between two batches, nor after an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from stepflow_tl.engines.options import EngineFlow, EngineOptions
from stepflow_tl.errors import ModelError
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.models.loading import gguf_named, open_gguf


@register_model("stepflow")
class StepFlowLM(HFLM):
    """`HFLM` with StepFlow; see the module for what is whose.

    Attributes:
        stepflow: What is put on the model.
    """

    def __init__(self, pretrained: str, **options: Any) -> None:
        """Load the model.

        Args:
            pretrained: A name on the hub, a folder, a GGUF file, or "smollm2".
            **options: StepFlow's, as on the command line of `stepflow-tl evaluate` with underscores
                (`placebo_seed` for the seed of controls), with `stepflow=true`, `format` and `splitter`; all
                others are those of `HFLM`.

        Raises:
            InputFileError: If an option of StepFlow has no meaning.
            ModelError: If StepFlow cannot act on such a model.
        """
        asked, rest = EngineOptions.taken_from(options)
        self._gguf: GgufCheckpoint | None = None
        self._is_measured = False
        refused = [name for name in ("tp_plan", "peft") if asked.flow and rest.get(name)]
        if not refused:
            super().__init__(pretrained, **rest)
            refused += [f"backend={self.backend}"] if asked.flow and self.backend != "causal" else []
        if refused:
            raise ModelError(
                f"StepFlow does not go with {', '.join(refused)}: expected a causal LM with each layer's "
                "heads on one process (parallelize=true spreads layers) and adapters merged into the weights"
            )
        launched = getattr(self, "accelerator", None)
        if launched is not None:
            self._rank, self._world_size = launched.process_index, launched.num_processes
        self.stepflow = EngineFlow(asked, self.model, self.tokenizer)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness' cache of answers; from here on its keys name what is on the model."""
        super().set_cache_hook(cache_hook)
        store, key = cache_hook.dbdict, self.stepflow.key
        if store is not None and key:
            store.encode_key = lambda request: f"stepflow-{key}/{request}"
            store.decode_key = lambda name: name.rpartition("/")[2]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, as `HFLM` has it.

        Args:
            requests: One text each.
            disable_tqdm: Whether to show no progress.

        Raises:
            ModelError: If StepFlow is on, and a text does not fit into one window of the model.
        """
        if self.stepflow.key:
            longest = max((len(self.tok_encode(each.args[0])) for each in requests), default=0)
            if longest > self.max_length:
                raise ModelError(
                    f"a text has {longest} tokens and the model's window {self.max_length}: windows are read "
                    "apart, and StepFlow needs the question in each; expected shorter texts, or no StepFlow"
                )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _model_generate(
        self, context: Int[Tensor, "row token"], max_length: int, stop: list[str], **kwargs: Any
    ) -> Int[Tensor, "row all_tokens"]:
        mask = kwargs.get("attention_mask")
        kept = torch.ones_like(context) if mask is None else mask
        prompts = [row[seen.bool()].tolist() for row, seen in zip(context, kept, strict=True)]
        with self.stepflow.on(prompts):
            return super()._model_generate(context, max_length, stop, **kwargs)

    def _model_call(
        self, inps: Int[Tensor, "row token"], attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Float[Tensor, "row token vocabulary"]:
        # Padded on the right with zeros: without them, a row's name does not depend on its batch.
        texts = [row[: int((row != 0).nonzero().max()) + 1].tolist() if row.any() else [] for row in inps]
        with self.stepflow.on(texts, counts=not self._is_measured):
            return super()._model_call(inps, attn_mask, labels)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        self._is_measured = True
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._is_measured = False

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        path = None if kwargs.get("gguf_file") else gguf_named(pretrained)
        if path is None:
            super()._get_config(pretrained, **kwargs)
        else:
            self._gguf = open_gguf(Path(path))
            self._config = self._gguf.config()

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        if self._gguf is None or tokenizer:
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
        else:
            self.tokenizer = self._gguf.tokenizer()

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        if self._gguf is None:
            super()._create_model(pretrained, **kwargs)
            return
        dtype = kwargs.get("dtype")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        if kwargs.get("parallelize"):
            self._model = self._gguf.model(dtype, "auto")
        else:
            self._model = self._gguf.model(dtype, None).to(self.device)


if __name__ == "__main__":
    cli_evaluate()
