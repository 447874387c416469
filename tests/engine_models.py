"""A tiny model on disk, as the engines load it by name, and the questions that it is asked."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import build_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

QUESTIONS = ("What is 2+3*4?", "Is 7 odd?", "How many legs have three dogs?", "Why?")


def save_tiny_model(folder: Path) -> Path:
    """A random Llama in float32 with a ChatML tokenizer of bytes: it writes nonsense, always the same."""
    tokenizer = build_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny_model(folder: Path) -> Any:
    """The same model as `stepflow_tl.evaluation` takes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


def write_questions(path: Path) -> Path:
    """Questions as JSON lines, with `id`, `question`, `answer` and `subject`."""
    rows = [
        {"id": f"q{i}", "question": text, "answer": "14", "subject": "odd" if i % 2 else "even"}
        for i, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
