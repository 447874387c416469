"""Token ids to text pieces: split characters, invalid bytes, sentencepiece spaces, offsets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_material import chat_texts, family_tokenizer, texts

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.decoding import TextPiece, TokenDecoder, decode_tokens, encode_text

TOKENIZERS = {
    "bytes": lambda: family_tokenizer("chatml"),
    "straddling": lambda: family_tokenizer("chatml", tags="plain", merges="straddling"),
    "sentencepiece": lambda: family_tokenizer("llama-3", merges="sentencepiece"),
}
LAW = settings(max_examples=1000, deadline=None)


def joined(tokenizer, ids):
    pieces, rest = decode_tokens(tokenizer, ids)
    return "".join(piece.text for piece in pieces) + rest


@LAW
@given(name=st.sampled_from(["bytes", "straddling"]), text=texts() | chat_texts())
def test_a_text_comes_back_from_its_tokens_with_the_same_pieces(name, text):
    tokenizer = TOKENIZERS[name]()
    if not text:
        return
    ids, offset_pieces = encode_text(tokenizer, text)
    assert "".join(piece.text for piece in offset_pieces) == text
    pieces, rest = decode_tokens(tokenizer, ids)
    assert pieces == offset_pieces and rest == ""


@LAW
@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_any_ids_decode_to_what_the_tokenizer_says_and_a_fragment_owns_nothing(name, data):
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    pieces, rest = decode_tokens(tokenizer, ids)
    text = "".join(piece.text for piece in pieces) + rest
    assert not any(piece.text for piece in pieces if piece.is_fragment)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if name != "sentencepiece":
        assert text == whole
    elif (
        "\ufffd" not in whole
    ):  # its decoder turns a whole run of bytes into U+FFFD when one of them is wrong
        assert text == whole


@LAW
@given(text=texts(), cut=st.integers(0, 10))
def test_a_cloned_decoder_goes_its_own_way(text, cut):
    tokenizer = family_tokenizer("chatml")
    ids = tokenizer(text + "🙂", add_special_tokens=False)["input_ids"]
    decoder, pieces = TokenDecoder(tokenizer), []
    for position, token in enumerate(ids):
        if position == cut:
            decoder.clone().push(ids[0])
            decoder = decoder.clone()
        pieces.append(decoder.push(token))
    assert pieces == decode_tokens(tokenizer, ids)[0]


def test_a_split_character_belongs_to_the_token_that_completes_it():
    tokenizer = family_tokenizer("chatml")
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    fragment = TextPiece("", True)
    assert decode_tokens(tokenizer, ids) == (
        [TextPiece("a", False), *[fragment] * 3, TextPiece("🙂", False)],
        "",
    )


def test_invalid_bytes_become_replacement_characters_at_once_and_never_stall():
    tokenizer = family_tokenizer("chatml")
    face = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    pieces, rest = decode_tokens(tokenizer, face[:2] + letter + face[1:2] * 50 + face)
    assert [piece.text for piece in pieces[:5]] == ["", "", "\ufffda", "\ufffd", "\ufffd"]
    assert pieces[-1].text == "🙂" and rest == ""


def test_bytes_left_over_at_the_end_are_the_rest():
    tokenizer = family_tokenizer("chatml")
    face = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert decode_tokens(tokenizer, face[:3]) == ([TextPiece("", True)] * 3, "\ufffd")


def test_a_special_token_is_text_even_in_the_middle_of_a_character():
    tokenizer = family_tokenizer("chatml")
    face = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert joined(tokenizer, [face[0], end]) == "\ufffd<|im_end|>"


def test_a_sentencepiece_space_is_dropped_at_the_start_only():
    tokenizer = family_tokenizer(None, merges="sentencepiece")
    ids = tokenizer.convert_tokens_to_ids(["▁So", "▁the", "▁answer", "<0xE7>", "<0xAD>", "<0x94>", "."])
    pieces, _ = decode_tokens(tokenizer, ids)
    assert [piece.text for piece in pieces] == ["So", " the", " answer", "", "", "答", "."]
    assert [piece.is_fragment for piece in pieces] == [False] * 3 + [True, True, False, False]


class _Offsets:
    """A fast tokenizer whose offsets are given."""

    is_fast = True

    def __init__(self, offsets):
        self.offsets = offsets

    def __call__(self, text, **_):
        return {"input_ids": list(range(len(self.offsets))), "offset_mapping": self.offsets}


@pytest.mark.parametrize(
    ("text", "offsets", "expected"),
    [
        # A space token that reaches into the split character after it, as SmolLM2's tokenizer reports it.
        ("a 答b", [(0, 1), (1, 3), (2, 3), (2, 3), (3, 4)], ["a", " ", "", "答", "b"]),
        ("a b c", [(0, 1), (2, 3), (4, 5)], ["a", " b", " c"]),  # spaces that no token claims
        ("ab  ", [(0, 2)], ["ab  "]),
        ("ab", [(0, 0), (0, 2), (2, 2)], ["", "ab", ""]),
    ],
)
def test_pieces_tile_the_text_whatever_the_offsets(text, offsets, expected):
    pieces = encode_text(_Offsets(offsets), text)[1]
    assert [piece.text for piece in pieces] == expected
    assert [piece.is_fragment for piece in pieces] == [
        not piece and end > start for piece, (start, end) in zip(expected, offsets, strict=True)
    ]


def test_a_slow_tokenizer_and_a_text_without_tokens_are_refused():
    tokenizer = _Offsets([])
    with pytest.raises(TraceError, match=r"The text 'x' yields no token"):
        encode_text(tokenizer, "x")
    tokenizer.is_fast = False
    with pytest.raises(
        TraceError, match=r"_Offsets gives no character offsets; .* pass token ids to .*from_tokens"
    ):
        encode_text(tokenizer, "x")
