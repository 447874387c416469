"""What an exact map costs, against the cheapest pass that could give one: plain SDPA forward and backward.

    python benchmarks/saliency.py                                    # default model, T = 512 ... 4096
    python benchmarks/saliency.py --model smollm2 qwen-1.5b --lengths 512 1024 2048 4096 8192
    python benchmarks/saliency.py --against "fused checkpointed" --lengths 8192 --methods \
        "fused checkpointed" "fused checkpointed under StepFlow"
    python benchmarks/saliency.py --against "fused per_token" --methods "fused per_token" "fused cut"
    python benchmarks/saliency.py --device cuda --dtype bfloat16 --model qwen-7b --lengths 32768

1. One process a (model, T): every method runs once to warm up, then all of them in turn, `--repeats` times.
   A time is the median over its turns, a ratio the median of turn-wise ratios to `sdpa` (`--against`), so a
   busy moment of the machine falls on all methods alike.
2. One more process a (model, T, method): peak memory of one run above what the loaded model holds.
3. What does not fit is a row that says so: weights larger than memory before they are made, everything else
   by a limit on the process (`--memory`), so that a run that asks too much ends alone.
4. Times over T are fitted by `b T + c T^2`: the second term is attention's share.

Methods. `sdpa` is the limit: logits, mean NLL, gradient of the input embedding; no parameter asks for a
gradient, since ours need none either. `sdpa+chunks` is the same with the unembedding a few rows at a time, as
`fused` does it, to tell that saving from the rest. `eager` keeps the gradient of every pattern, as the
field's scripts do; those scripts also leave `requires_grad` on for every parameter, and `eager, as scripts do
it` does too. `fused cut` and `fused signed` are those scores of the per-token objective, `fused log_odds` is
that objective. Weights of the Qwen shapes are random: cost does not depend on values. Steps are 24 tokens;
under StepFlow the first is the question, the last tenth of them the summary.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

SHAPES = {  # R1-Distill-Qwen: hidden, intermediate, layers, heads, KV heads
    "qwen-1.5b": (1536, 8960, 28, 12, 2),
    "qwen-7b": (3584, 18944, 28, 28, 4),
}
QWEN_VOCABULARY = 152064
STEP_TOKENS, TEMPLATE_TOKENS = 24, 16
METHODS = (
    "sdpa",
    "sdpa+chunks",
    "sdpa checkpointed",
    "fused per_token",
    "fused response",
    "fused cut",
    "fused signed",
    "fused log_odds",
    "fused checkpointed",
    "fused per_token under StepFlow",
    "fused response under StepFlow",
    "fused checkpointed under StepFlow",
    "layerwise",
    "hooks",
    "eager",
    "eager, as scripts do it",
)
ON_BRIDGE = ("hooks", "layerwise")  # they read TransformerLens hook points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2"], choices=["smollm2", *SHAPES])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--against", default="sdpa", choices=METHODS, help="what ratios are taken to")
    parser.add_argument("--repeats", type=int, default=3, help="0 measures memory only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--bridge", action="store_true", help="run `fused` behind a TransformerBridge too")
    parser.add_argument(
        "--memory", type=float, default=0.0, help="GiB a process may take (default: 85 %% of free)"
    )
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds a process may take")
    parser.add_argument("--out", type=Path, help="write the cells as JSON")
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing: one table of these JSON files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(json.loads(arguments.child))
        return
    if arguments.join:
        runs = [json.loads(path.read_text()) for path in arguments.join]
        print(*dict.fromkeys(run["machine"] for run in runs), sep="\n", end="\n\n")
        _print_table([cell for run in runs for cell in run["cells"]], arguments.against)
        return
    cells = []
    for model in arguments.model:
        for length in arguments.lengths:
            cells += _measure(model, length, arguments)
            print(f"done: {model}, T = {length}", file=sys.stderr, flush=True)
    print(f"{_machine(arguments)}\n")
    _print_table(cells, arguments.against)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": _machine(arguments), "cells": cells}, indent=1))


def _measure(model: str, length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells of one (model, T): a timing process with all methods, then a memory process a method."""
    methods = list(arguments.methods)
    if arguments.bridge:
        methods += [f"{method}, bridge" for method in methods if method.startswith("fused")]
    if model != "smollm2":
        methods = [method for method in methods if method not in ON_BRIDGE]
    cells, fitting = [], []
    for method in methods:
        result = _run_child(arguments, model=model, length=length, methods=[method], task="memory")
        cells.append({"model": model, "length": length, "method": method, **result})
        if "error" not in result:
            fitting.append(method)
    if fitting and arguments.repeats:
        job = dict(methods=fitting, task="time", repeats=arguments.repeats, against=arguments.against)
        result = _run_child(arguments, model=model, length=length, **job)
        for cell in cells:
            if cell["method"] in fitting:
                cell.update({"error": result["error"]} if "error" in result else result[cell["method"]])
    return cells


def _run_child(arguments: argparse.Namespace, **job: Any) -> dict[str, Any]:
    job |= {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "memory": arguments.memory or _free_memory() * 0.85,
    }
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.time_limit)
    except subprocess.TimeoutExpired:
        return {"error": f"over {arguments.time_limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {
        "error": "does not fit (killed)" if done.returncode < 0 else done.stderr.strip()[-300:] or "failed"
    }


# --- in the child ------------------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> None:
    try:
        print(json.dumps(_work(job)))
    except NotImplementedError as error:
        print(json.dumps({"error": str(error)}))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        print(json.dumps({"error": "does not fit"}))


def _work(job: dict[str, Any]) -> dict[str, Any]:
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"])
    if job["model"] in SHAPES:
        weights = _n_parameters(job["model"]) * dtype.itemsize / 2**30
        room = job["memory"] if device.type == "cpu" else torch.cuda.mem_get_info()[0] / 2**30
        if weights > room:
            return {"error": f"does not fit: weights take {weights:.1f} of {room:.1f} GiB"}
    if device.type == "cpu":
        limit = int(job["memory"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    models: dict[bool, Any] = {}
    for method in job["methods"]:
        on_bridge = method in ON_BRIDGE or method.endswith(", bridge")
        if on_bridge not in models:
            models[on_bridge] = _load(job["model"], dtype, device, on_bridge)
    runs = {method: _prepare(method, models, job["length"], device) for method in job["methods"]}
    if job["task"] == "memory":
        return {"memory": _peak_above_model(next(iter(runs.values())), device)}
    for run in runs.values():
        run()
    turns: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(job["repeats"]):
        for method, run in runs.items():
            turns[method].append(_seconds(run, device))
    limit_turns = turns.get(job["against"])
    return {
        method: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, limit_turns, strict=True))
            if limit_turns
            else None,
        }
        for method, own in turns.items()
    }


def _prepare(method: str, models: dict[bool, Any], length: int, device: torch.device) -> Callable[[], Any]:
    from stepflow_tl.saliency.fused.run import fused_backend
    from stepflow_tl.saliency.hooks_backend import hooks_backend
    from stepflow_tl.saliency.layerwise import layerwise_backend
    from stepflow_tl.saliency.objectives import Objective, token_log_odds

    base = method.removesuffix(", bridge")
    model = models[method in ON_BRIDGE or base != method]
    inner = getattr(model, "original_model", model)
    tokens = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(0))
    step_ids = (torch.arange(length) - TEMPLATE_TOKENS).div(STEP_TOKENS, rounding_mode="floor").clamp(min=-1)
    layers = tuple(range(int(inner.config.num_hidden_layers)))
    per_token = Objective("per_token", torch.arange(1, length), per_token=True)
    response = Objective("response", torch.arange(1, length))
    if base == "fused per_token":
        return lambda: fused_backend(model, tokens, step_ids, per_token, layers)
    if base == "fused response":
        return lambda: fused_backend(model, tokens, step_ids, response, layers)
    if base in ("fused cut", "fused signed"):
        score = base.removeprefix("fused ")
        return lambda: fused_backend(model, tokens, step_ids, per_token, layers, score=score)
    if base == "fused log_odds":
        log_odds = Objective("log_odds", torch.arange(1, length), per_token=True, token_loss=token_log_odds)
        return lambda: fused_backend(model, tokens, step_ids, log_odds, layers)
    if base == "fused checkpointed":
        return lambda: fused_backend(model, tokens, step_ids, per_token, layers, checkpoint=True)
    if base.endswith(" under StepFlow"):
        objective = response if "response" in base else per_token
        options = dict(checkpoint="checkpointed" in base, flow=_flow_calls(model, step_ids, objective))
        return lambda: fused_backend(model, tokens, step_ids, objective, layers, **options)
    if base == "hooks":
        return lambda: hooks_backend(model, tokens, step_ids, per_token, layers)
    if base == "layerwise":
        return lambda: layerwise_backend(model, tokens, step_ids, per_token, layers)
    batch = tokens[None].to(device)
    return lambda: _plain(base, inner, batch)


def _flow_calls(model: Any, step_ids: torch.Tensor, objective: Any) -> Any:
    """StepFlow's part in the attention calls of a transformers model, on tokens without a text."""
    from stepflow_tl.stepflow.columns import NEVER, LabelTable
    from stepflow_tl.stepflow.flow import StepFlow
    from stepflow_tl.stepflow.report import FlowReport
    from stepflow_tl.stepflow.state import FlowState, Pass
    from stepflow_tl.trace.steps import Segment

    if hasattr(model, "original_model"):
        raise NotImplementedError("measured on the transformers model")
    n, labels = len(step_ids), LabelTable(1)
    labels.extend(n)
    labels.step[0] = step_ids.numpy()
    labels.template_from[0, TEMPLATE_TOKENS:] = NEVER
    labels.segment[0, TEMPLATE_TOKENS:] = int(Segment.THINKING)
    labels.segment[0, labels.step[0] == 0] = int(Segment.QUESTION)
    labels.segment[0, -max(1, n // 10) :] = int(Segment.SUMMARY)
    flow = StepFlow()
    report = FlowReport(*flow.bands(model))
    return flow._calls(model, FlowState(labels, Pass(0, n)), report, objective.per_token)


def _plain(method: str, model: Any, batch: torch.Tensor) -> None:
    """Forward and backward through transformers' own attention."""
    model.set_attn_implementation("eager" if method.startswith("eager") else "sdpa")
    embedding = model.get_input_embeddings()(batch).detach().requires_grad_()
    forward = model.base_model
    if method == "sdpa+chunks":
        hidden = forward(inputs_embeds=embedding, use_cache=False)[0]
        torch.autograd.grad(hidden, embedding, _chunked_gradient(model, hidden.detach(), batch))
        return
    if method.startswith("eager"):
        model.requires_grad_("scripts" in method)
        output = model(inputs_embeds=embedding, use_cache=False, output_attentions=True)
        for pattern in output.attentions:
            pattern.retain_grad()
        _mean_nll(output.logits, batch).backward()
        for pattern in output.attentions:
            pattern.grad.mul_(pattern.detach()).abs_()
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        return
    if method == "sdpa checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        logits = model(inputs_embeds=embedding, use_cache=False).logits
        torch.autograd.grad(_mean_nll(logits, batch), embedding)
    finally:
        if method == "sdpa checkpointed":
            model.gradient_checkpointing_disable()
            model.eval()


def _mean_nll(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:])


def _chunked_gradient(model: Any, hidden: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    from stepflow_tl.saliency.fused.run import LOGITS_PER_CHUNK

    gradient, n = torch.zeros_like(hidden), hidden.shape[1] - 1
    rows = max(16, LOGITS_PER_CHUNK // model.config.vocab_size)
    for first in range(0, n, rows):
        last = min(first + rows, n)
        part = hidden[:, first:last].requires_grad_()
        nll = torch.nn.functional.cross_entropy(
            model.lm_head(part)[0].float(), batch[0, first + 1 : last + 1], reduction="sum"
        )
        gradient[:, first:last] = torch.autograd.grad(nll / n, part)[0]
    return gradient


def _load(name: str, dtype: torch.dtype, device: torch.device, on_bridge: bool) -> Any:
    if name == "smollm2":
        from stepflow_tl.models.gguf import GgufCheckpoint
        from stepflow_tl.models.loading import _default_model_path, load_default_model

        if on_bridge:
            model = load_default_model(device, dtype)
        else:
            model = GgufCheckpoint.open(_default_model_path()).model(dtype).to(device).eval()
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        hidden, intermediate, n_layers, n_heads, n_kv_heads = SHAPES[name]
        config = Qwen2Config(
            vocab_size=QWEN_VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
        )
        config.dtype = dtype
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
        model = model.to(dtype).to_empty(device=device).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
            # The one buffer is the rotary table, which meta construction leaves empty.
            model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _n_parameters(name: str) -> int:
    hidden, intermediate, n_layers, n_heads, n_kv_heads = SHAPES[name]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * n_kv_heads // n_heads
    return 2 * QWEN_VOCABULARY * hidden + n_layers * (attention + 3 * hidden * intermediate)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    gc.collect()
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _peak_above_model(run: Callable[[], Any], device: torch.device) -> float:
    """GiB that one run takes above what is resident before it."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = _status_gib("VmRSS")
    run()
    return _status_gib("VmHWM") - before


def _status_gib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"no {field} in /proc/self/status")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the table ---------------------------------------------------------------------------------------------


def _print_table(cells: list[dict[str, Any]], against: str) -> None:
    print(f"| model | T | method | seconds | x {against} | GiB above the model | x {against} |")
    print("|---|---:|---|---:|---:|---:|---:|")
    limits = {(c["model"], c["length"]): c.get("memory") for c in cells if c["method"] == against}
    for cell in cells:
        start = f"| {cell['model']} | {cell['length']} | {cell['method']} |"
        if "error" in cell:
            print(f"{start} {cell['error']} | | | |")
            continue
        limit = limits.get((cell["model"], cell["length"]))
        memory_ratio = f"{cell['memory'] / limit:.2f}" if limit else ""
        seconds, ratio = ("" if cell.get(key) is None else f"{cell[key]:.2f}" for key in ("seconds", "ratio"))
        print(f"{start} {seconds} | {ratio} | {cell['memory']:.2f} | {memory_ratio} |")
    _print_growth(cells)


def _print_growth(cells: list[dict[str, Any]]) -> None:
    """Seconds fitted by `b T + c T^2`, and the exponent of memory over T."""
    print(
        "\n| model | method | b, s / 1000 tokens | c, s / 1000^2 | attention at the longest | memory ~ T^ |"
    )
    print("|---|---|---:|---:|---:|---:|")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if "error" not in cell and "seconds" in cell:
            groups.setdefault((cell["model"], cell["method"]), []).append(cell)
    for (model, method), own in groups.items():
        if len(own) < 3:
            continue
        thousands = torch.tensor([cell["length"] / 1000 for cell in own], dtype=torch.float64)
        seconds = torch.tensor([cell["seconds"] for cell in own], dtype=torch.float64)
        # Relative errors count alike at every T.
        design = torch.stack([thousands, thousands**2], 1) / seconds[:, None]
        b, c = (
            torch.linalg.lstsq(design, torch.ones(len(own), 1, dtype=torch.float64)).solution[:, 0].tolist()
        )
        last = float(thousands[-1])
        memory = torch.tensor([cell["memory"] for cell in own], dtype=torch.float64)
        centred = thousands.log() - thousands.log().mean()
        slope = float((centred * memory.log()).sum() / centred.square().sum())
        print(f"| {model} | {method} | {b:.2f} | {c:.3f} | {c * last / (b + c * last):.0%} | {slope:.2f} |")


def _machine(arguments: argparse.Namespace) -> str:
    device = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    return f"{device}, {arguments.dtype}, torch {torch.__version__}, {platform.machine()}"


def _free_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("no MemAvailable in /proc/meminfo")


if __name__ == "__main__":
    main()
