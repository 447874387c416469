"""Train the miniature reasoning models.

    python scripts/train_testbed.py --out FOLDER                                       # 6 layers
    python scripts/train_testbed.py --layers 12 --n-asked 2 --long-steps --out FOLDER  # 12 layers

1. Problems are drawn without end, each batch of one kind: number of steps, distractors and the share of
   numbers vary, distances are free. Prompts of one kind have equal length, and so have texts unless steps are
   long: shorter ones are filled up with the end token, which counts once.
2. The number of steps is uniform from 2 to a maximum that starts at `--steps-from` and grows by one, up to
   `--steps-to`, whenever the mean NLL of the last 100 000 tokens falls below `--mastered`: look-ups are
   learned on short chains first. (A model that looks nothing up loses about 0.6 nats per token of a step,
   one that does none.)
3. The loss is the NLL of thinking and summary; the question is random and cannot be predicted.
4. AdamW, linear warm-up, cosine decay to a tenth, gradients clipped at 1; products in bfloat16.
5. At the end: greedy answers on fresh problems by number of steps, then weights (safetensors), tokenizer,
   configuration, model card and checksums are written, to a folder beside the target first.
6. Every `--checkpoint` minutes all that the training consists of goes to `FOLDER.checkpoint`; the same
   command goes on from there.

Seeded: the same machine, versions and number of threads give the same weights, stopped on the way or not.
Validation problems come from another seed; with 20 and more random letters and digits each, none is met
twice.
Cost: about 20 minutes on 2 CPU cores with 6 layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from stepflow_tl.results.files import file_digest
from stepflow_tl.testbed.grading import grade
from stepflow_tl.testbed.model import CONFIG, DEPTHS, N_CTX, new_model
from stepflow_tl.testbed.problems import Problem, ProblemSpec, make_problems, stream_problems
from stepflow_tl.testbed.vocabulary import build_tokenizer, prompt_of

REPORT_TOKENS = 100_000
GRADED_STEPS = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22)


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and card")
    parser.add_argument("--tokens", type=float, default=7e6, help="tokens to train on")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--steps-from", type=int, default=3)
    parser.add_argument("--steps-to", type=int, default=20)
    parser.add_argument("--mastered", type=float, default=0.05, help="NLL at which chains grow by a step")
    parser.add_argument("--layers", type=int, choices=DEPTHS, default=DEPTHS[0])
    parser.add_argument("--n-asked", type=int, choices=(1, 2), default=1)
    parser.add_argument("--long-steps", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graded", type=int, default=200, help="problems per number of steps at the end")
    parser.add_argument("--checkpoint", type=float, default=5, help="minutes between checkpoints")
    arguments = parser.parse_args()
    settings = {n: value for n, value in vars(arguments).items() if n not in ("out", "checkpoint")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out.with_name(arguments.out.name + ".checkpoint")
    (model, seconds), tokenizer = train(settings, checkpoint, arguments.checkpoint), build_tokenizer()
    minutes = seconds / 60
    accuracy = {n: _accuracy(model, tokenizer, n, settings) for n in GRADED_STEPS}
    save_weights(
        model,
        tokenizer,
        arguments.out,
        settings=settings,
        accuracy=accuracy,
        minutes=minutes,
    )
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {arguments.out}")


def train(
    settings: dict[str, Any], checkpoint: Path | None = None, minutes: float = math.inf
) -> tuple[Any, float]:
    """Return the trained transformers model and the seconds it took; `settings` as the command line's.

    Args:
        settings: What decides about the weights.
        checkpoint: File to go on from, if it is there, and to write to.
        minutes: Time between writes.

    Raises:
        SystemExit: If the checkpoint was written with other settings.
    """
    torch.manual_seed(settings["seed"])
    rng = random.Random(settings["seed"])
    tokenizer = build_tokenizer()
    model = new_model(len(tokenizer), settings["layers"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=settings["rate"],
        betas=(0.9, 0.98),
    )
    at = _Progress(settings["steps_from"])
    if checkpoint is not None and checkpoint.is_file():
        held = torch.load(checkpoint, weights_only=False)  # written by this script
        if held["settings"] != settings:
            raise SystemExit(f"{checkpoint} was written with other settings ({held['settings']}): remove it.")
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        rng.setstate(held["random"])
        at = _Progress(**held["progress"])
    start, written = time.perf_counter() - at.seconds, time.perf_counter()
    per_report = max(50, REPORT_TOKENS // settings["batch_tokens"])
    while at.seen < settings["tokens"]:
        for group in optimizer.param_groups:
            group["lr"] = settings["rate"] * _rate(at.update, at.seen / settings["tokens"])
        spec = _draw_spec(rng, at.longest, settings)
        tokens, n_prompt = batch_of(spec, rng, tokenizer, settings["batch_tokens"])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, n_prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.float().mT, targets_of(tokens, n_prompt, tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at.seen += tokens.numel()
        at.update += 1
        at.losses.append(loss.item())
        at.seconds = time.perf_counter() - start
        if at.update % per_report == 0:
            mean = sum(at.losses) / len(at.losses)
            print(
                f"{at.seen / 1e6:6.2f} M tokens, {at.seen / at.seconds:5.0f} a second, up to {at.longest} "
                f"steps, NLL {mean:.4f}",
                flush=True,
            )
            if mean < settings["mastered"]:
                at.longest = min(at.longest + 1, settings["steps_to"])
            at.losses = []
        if checkpoint is not None and time.perf_counter() - written > 60 * minutes:
            held = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": rng.getstate(),
                "progress": asdict(at),
            }
            staged = checkpoint.with_name(checkpoint.name + ".new")
            torch.save(held, staged)
            staged.replace(checkpoint)
            written = time.perf_counter()
    return model.eval(), at.seconds


@dataclass
class _Progress:
    """How far a training is: longest chains, tokens seen, updates, seconds, losses since the last report."""

    longest: int
    seen: int = 0
    update: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def batch_of(spec: ProblemSpec, rng: random.Random, tokenizer: Any, n_tokens: int) -> tuple[Tensor, int]:
    """Texts of one kind, `[problem, token]`, and the length of the prompt they all share."""
    problems = stream_problems(spec, rng)
    rows = [_token_ids(next(problems), tokenizer)]
    n_rows = max(1, n_tokens // len(rows[0][0] + rows[0][1]))
    rows += [_token_ids(problem, tokenizer) for problem in itertools.islice(problems, n_rows - 1)]
    length = max(len(response) for _, response in rows)
    fill = [tokenizer.eos_token_id] * length
    return torch.tensor([prompt + (response + fill)[:length] for prompt, response in rows]), len(rows[0][0])


def targets_of(tokens: Tensor, n_prompt: int, tokenizer: Any) -> Tensor:
    """What is to be predicted, `[problem, token]` from the end of the prompt on; -100 after a text's end."""
    targets = tokens[:, n_prompt:]
    ends = (targets == tokenizer.eos_token_id).int()
    return targets.masked_fill(ends.cumsum(1) - ends > 0, -100)


def _token_ids(problem: Problem, tokenizer: Any) -> tuple[list[int], list[int]]:
    response = f"{problem.thinking}\n</think>\n\n{problem.answer}{tokenizer.eos_token}"
    encode = tokenizer.backend_tokenizer.encode
    prompt = encode(prompt_of(problem, tokenizer), add_special_tokens=False).ids
    return prompt, encode(response, add_special_tokens=False).ids


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, n_steps: int, settings: dict[str, Any]) -> float:
    """Part of greedy answers that are right on problems from a seed that training does not use."""
    spec = ProblemSpec(n_steps=n_steps, n_asked=settings["n_asked"], long_steps=settings["long_steps"])
    problems = make_problems(spec, settings["graded"], seed=settings["seed"] + 1)
    pairs = [_token_ids(problem, tokenizer) for problem in problems]
    prompts = torch.tensor([prompt for prompt, _ in pairs])
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max(len(response) for _, response in pairs) + 16,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    right = 0
    for problem, row in zip(problems, output[:, prompts.shape[1] :], strict=True):
        text = tokenizer.decode(row, skip_special_tokens=False).split(tokenizer.eos_token)[0]
        thinking, _, summary = text.partition("</think>")
        right += grade(problem, thinking, summary).correct
    return right / len(problems)


def _draw_spec(rng: random.Random, longest: int, settings: dict[str, Any]) -> ProblemSpec:
    return ProblemSpec(
        n_steps=rng.randint(2, longest),
        n_distractors=rng.randint(0, 2),
        number_share=rng.choice((0.25, 0.5, 0.75)),
        n_asked=settings["n_asked"],
        long_steps=settings["long_steps"],
    )


def _rate(update: int, progress: float) -> float:
    return min(1.0, (update + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def save_weights(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    settings: dict[str, Any],
    accuracy: dict[int, float],
    minutes: float,
) -> None:
    """Write the files of a trained model to a folder beside the target, which then takes its place.

    An interrupted run leaves the old files as they were.

    Args:
        model: As `new_model` returns it, trained.
        tokenizer: Its tokenizer.
        folder: Where to; what is there is replaced.
        settings: Training settings, for the card.
        accuracy: Part of right answers by number of steps, for the card.
        minutes: Training time, for the card.
    """
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    (staged / "generation_config.json").unlink(missing_ok=True)
    (staged / "card.md").write_text(_card(model, settings, accuracy, minutes), encoding="utf-8")
    sums = {file.name: file_digest(file) for file in sorted(staged.iterdir())}
    (staged / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)


def _card(model: Any, settings: dict[str, Any], accuracy: dict[int, float], minutes: float) -> str:
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    numbers = (f"--{name} {value:g}" for name, value in settings.items() if not isinstance(value, bool))
    flags = (f"--{name}" for name, value in settings.items() if value is True)
    options = " ".join([*numbers, *flags]).replace("_", "-")
    rows = "\n".join(f"| {n_steps} | {part:.3f} |" for n_steps, part in accuracy.items())
    return f"""# Testbed model

Qwen2 architecture, {n_parameters / 1e6:.2f} M parameters, {model.config.num_hidden_layers} layers, \
{CONFIG["num_attention_heads"]} query heads on {CONFIG["num_key_value_heads"]} KV heads, width \
{CONFIG["hidden_size"]}, context {N_CTX}. It works out chains of definitions step by step between think tags
(`stepflow_tl/testbed/problems.py`), and does nothing else. Licence: that of this package.

Data: problems drawn while it trains, none from anywhere else. Written by

```sh
python scripts/train_testbed.py {options} --out FOLDER
```

in {minutes:.0f} minutes on {platform.machine()}, {torch.get_num_threads()} CPU threads,
torch {torch.__version__}, transformers {transformers.__version__}.

Greedy answers that are right, {settings["graded"]} fresh problems per row (no distractors):

| steps | right |
|---:|---:|
{rows}
"""


if __name__ == "__main__":
    main()
