# pyright: reportMissingImports=false
"""Inspect's provider "stepflow": models of this package, with StepFlow by `-M` or without.

    inspect eval task.py --model stepflow/NAME -M stepflow=true -M tau_max=0.15 -M shallow=0-6 -M deep=21-27

1. The model is a TransformerBridge (`load_model`: a name on the hub, a folder, a GGUF file, "smollm2"); with
   `-M bridge=false` a plain transformers model, whose other arguments are those of `from_pretrained`. In
   Python, `get_model("stepflow/name", loaded=model, memoize=False)` takes a model that is there already.
2. Messages become a prompt by the tokenizer's chat template, thinking switched on. Of former answers the
   reasoning is left out, as reasoning models' own templates leave it out.
3. Requests that arrive together are written together (`gathering`), greedily unless a temperature is asked
   for. The draws come from `--seed`, the prompt, and the epoch: epoch 1 is the first sample of `evaluate`.
4. The format's markers say where thinking ends. Thinking is returned as Inspect's reasoning content, and the
   answer, which scorers read, as its text.
5. Inspect's cache (`--cache`) does not know a provider's arguments; its keys hold the provider's `base_url`,
   so StepFlow, format and splitter stand there.

What is not served is refused by name: tools, images and sounds, top_k, penalties, biases, best_of, the
log-probabilities of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import anyio
import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
)
from inspect_ai.solver._task_state import sample_state  # which epoch this is has no public name
from inspect_ai.tool import ToolChoice, ToolInfo

from stepflow_tl.engines.gathering import Gatherer, Request, Settings, Written
from stepflow_tl.engines.options import EngineFlow, EngineOptions
from stepflow_tl.errors import ModelError
from stepflow_tl.evaluation.decoding import Decoding
from stepflow_tl.evaluation.generation import answer_of
from stepflow_tl.models.facts import tokenizer_of
from stepflow_tl.models.loading import load_model
from stepflow_tl.trace.formats.chat_template import chat_template, conversation_prompt

_NOT_SERVED = (
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "best_of",
    "prompt_logprobs",
    "response_schema",
)
_MAX_TOKENS = 2048
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5


class StepFlowAPI(ModelAPI):
    """A model of this package, in batches; see the module.

    Attributes:
        stepflow: What is put on the model.
        model: The model.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # as Inspect declares it
        **model_args: Any,
    ) -> None:
        """Load the model.

        Args:
            model_name: As `load_model` takes it.
            base_url: Not used.
            api_key: Not used.
            config: Inspect's.
            **model_args: StepFlow's options with `stepflow=true`, `format`, `splitter`; `dtype` (float32),
                `device`, `device_map`, `batch_size` (16), `bridge` (true), `loaded`.

        Raises:
            InputFileError: If an option of StepFlow has no meaning.
            ModelError: If the model cannot be loaded, or StepFlow cannot act on it.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        options, rest = EngineOptions.taken_from(model_args)
        self._batch_size = int(rest.pop("batch_size", 16))
        self.model = _loaded(model_name, rest)
        self._tokenizer = tokenizer_of(self.model)
        if not chat_template(self._tokenizer):
            raise ModelError("the model's tokenizer has no chat template, which must open each answer")
        self.stepflow = EngineFlow(options, self.model, self._tokenizer)
        if self.stepflow.key:
            self.base_url = f"stepflow:{self.stepflow.key}"
        self._gatherer = Gatherer(self.model, self.stepflow, self._batch_size)

    def close(self) -> None:
        """End the thread that writes."""
        self._gatherer.close()

    def max_tokens(self) -> int:
        """Most tokens of an answer, thinking included, where the task does not say."""
        return _MAX_TOKENS

    def max_connections(self) -> int:
        """As many requests at once as a batch holds."""
        return self._batch_size

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer the last message.

        Args:
            input: The messages.
            tools: Must be empty.
            tool_choice: Not used.
            config: How to answer.

        Raises:
            ModelError: If something is asked for that is not served.
        """
        n_choices = config.num_choices or 1
        settings = self._settings(tools, config, n_choices)
        text = conversation_prompt(self._tokenizer, self.stepflow.format, _messages(input))
        prompt = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        state = sample_state()
        first = 0 if state is None else (state.epoch - 1) * n_choices
        asked = [Request(prompt, settings, first + choice) for choice in range(n_choices)]
        written = [await _result(future) for future in [self._gatherer.submit(each) for each in asked]]
        n_new = sum(len(answer.tokens) for answer in written)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(prompt, answer, settings) for answer in written],
            usage=ModelUsage(input_tokens=len(prompt), output_tokens=n_new, total_tokens=len(prompt) + n_new),
            time=max(answer.seconds for answer in written),
        )

    def _settings(self, tools: Sequence[ToolInfo], config: GenerateConfig, n_choices: int) -> Settings:
        refused = [name for name in _NOT_SERVED if getattr(config, name) is not None]
        refused += ["tools"] if tools else []
        temperature = config.temperature or 0.0
        if n_choices > 1 and not temperature:
            refused.append("num_choices without a temperature")
        if refused:
            raise ModelError(f"the provider stepflow does not serve {', '.join(refused)}: leave it out")
        decoding = Decoding(
            max_new_tokens=config.max_tokens or _MAX_TOKENS,
            temperature=temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            batch_size=self._batch_size,
            seed=config.seed or 0,
        )
        top = (config.top_logprobs or 0) if config.logprobs else None
        return Settings(decoding, tuple(config.stop_seqs or ()), top)

    def _choice(self, prompt: Sequence[int], written: Written, settings: Settings) -> ChatCompletionChoice:
        entry, ends = self.stepflow.format, self._gatherer.ends
        answer = answer_of(self._tokenizer, entry, prompt, written.tokens, ends)
        thinking, text = answer.thinking, answer.summary
        if not thinking and not text:
            text = self._tokenizer.decode(written.tokens, skip_special_tokens=True)
        for stop in settings.stops:
            text = text.partition(stop)[0]
            thinking = thinking if answer.summary else thinking.partition(stop)[0]
        content: Any = text.strip()
        if thinking.strip():
            content = [ContentReasoning(reasoning=thinking.strip()), ContentText(text=content)]
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        reason: Any = written.reason
        return ChatCompletionChoice(message=message, stop_reason=reason, logprobs=self._logprobs(written))

    def _logprobs(self, written: Written) -> Logprobs | None:
        def named(token: int) -> dict[str, Any]:
            text = self._tokenizer.decode([token])
            return {"token": text, "bytes": list(text.encode())}

        if not written.logprobs:
            return None
        return Logprobs(
            content=[
                Logprob(
                    **named(token),
                    logprob=own,
                    top_logprobs=[TopLogprob(**named(other), logprob=value) for other, value in top],
                )
                for token, (own, top) in zip(written.tokens, written.logprobs, strict=True)
            ]
        )


def _loaded(name: str, given: dict[str, Any]) -> Any:
    """The model that is meant, with its tokenizer."""
    if (model := given.pop("loaded", None)) is not None:
        return model
    device = given.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, str(given.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError("dtype is not one of torch's: expected float32, bfloat16, float16")
    device_map = given.pop("device_map", None)
    if str(given.pop("bridge", True)).lower() in ("true", "1"):
        if given:
            raise ModelError(
                f"unknown model arguments {', '.join(given)}: expected StepFlow's options with "
                "stepflow=true, format, splitter, dtype, device, device_map, batch_size, bridge"
            )
        return load_model(name, device, dtype, device_map=device_map)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map or device, **given)
    model.tokenizer = AutoTokenizer.from_pretrained(name)
    return model.eval()


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Role and text of each message; of an answer's reasoning nothing."""
    for message in messages:
        kinds = {"text"} if isinstance(message.content, str) else {part.type for part in message.content}
        if message.role == "tool" or kinds - {"text", "reasoning"}:
            what = "tool results" if message.role == "tool" else ", ".join(sorted(kinds - {"text"}))
            raise ModelError(f"the provider stepflow reads text alone, and a message holds {what}")
    return [{"role": message.role, "content": message.text} for message in messages]


async def _result(future: Future[Written]) -> Written:
    """Wait without a thread of its own; a request that nobody waits for any more is not answered.

    Who waits long looks seldom: each look interrupts the thread that writes.
    """
    pause = _PAUSE
    try:
        while not future.done():
            await anyio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
    except BaseException:
        future.cancel()
        raise
    return future.result()
