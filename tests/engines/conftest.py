import pytest
from engine_models import QUESTIONS, load_tiny_model, save_tiny_model, write_questions


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model and its questions, `q.jsonl`, on disk."""
    saved = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_questions(saved / "q.jsonl")
    return saved


@pytest.fixture(scope="session")
def our_answers(folder):
    """`our_answers(n_tokens, **options)`: what `write_answers` gives, without its end marker."""

    def write(n_tokens, **given):
        from stepflow_tl.engines.options import EngineOptions
        from stepflow_tl.evaluation import Decoding, Prompting, write_answers

        options, _ = EngineOptions.taken_from(given)
        prompting = Prompting(format=options.format, splitter=options.splitter)
        model = load_tiny_model(folder)
        decoding = Decoding(max_new_tokens=n_tokens)
        return [
            answer
            for [answer] in write_answers(model, QUESTIONS, options.flow, decoding, prompting=prompting)[0]
        ], model.tokenizer

    return write
