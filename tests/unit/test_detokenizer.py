"""Detokenisation: pieces joined equal the whole, no character is ever split, stop strings never show."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trireme.gateway.detokenizer import BytewiseDetokenizer, Vocabulary, WindowDetokenizer
from trireme.gateway.stop_strings import StopMatcher

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"

ALPHABET = "ab \n'▁😀é漢️\u200d\ufffd"


def byte_level() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def sentencepiece(*, prepend: bool) -> Tokenizer:
    """As Llama 2's: ▁ for spaces, byte tokens for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += ["▁", "a", "b", "▁a", "ab", "▁ab", "é", "漢", "'", "\n"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece(prepend=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


def word_pieces() -> Tokenizer:
    """As BERT's: a decoder that looks at a token's neighbours."""
    pieces = ["[UNK]", "[CLS]", "a", "b", "##a", "##b", ".", ",", "'", "s"]
    tokenizer = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


BYTE_LEVEL = byte_level()
PREPENDING = sentencepiece(prepend=True)
METASPACE = metaspace()
WORDS = word_pieces()


def stream(vocabulary: Vocabulary, ids: list[int], prompt: list[int]) -> str:
    detokenizer = vocabulary.detokenizer(prompt)
    return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.finish()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=60))
def test_any_byte_level_ids_give_the_whole_decode(ids: list[int]) -> None:
    vocabulary = Vocabulary(BYTE_LEVEL)
    assert vocabulary.is_bytewise
    assert stream(vocabulary, ids, []) == BYTE_LEVEL.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=ALPHABET, max_size=30), st.data())
def test_a_byte_level_text_comes_back_whole_and_in_whole_characters(text: str, data: st.DataObject) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    detokenizer = Vocabulary(BYTE_LEVEL).detokenizer([])
    shown = ""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert text.startswith(shown)  # A split character would show as U+FFFD and break this.
    assert shown + detokenizer.finish() == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=ALPHABET, max_size=20), st.text(alphabet=ALPHABET, max_size=30))
@pytest.mark.parametrize("tokenizer", [PREPENDING, METASPACE], ids=["prepending", "metaspace"])
def test_an_answer_is_what_it_adds_to_its_prompt(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    # METASPACE has no byte fallback decoder: keep to what its vocabulary spells out.
    if tokenizer is METASPACE:
        prompt, text = (t.translate({ord(c): "a" for c in "😀️\u200d\ufffd"}) for t in (prompt, text))
    prompt_ids = tokenizer.encode("a" + prompt).ids
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode([*prompt_ids, *ids])
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.is_bytewise
    assert stream(vocabulary, ids, prompt_ids) == whole[len(tokenizer.decode(prompt_ids)) :]


def test_a_first_word_keeps_its_space() -> None:
    ids = PREPENDING.encode("ab").ids
    assert stream(Vocabulary(PREPENDING), ids, PREPENDING.encode("a").ids) == " ab"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), max_size=40))
def test_a_decoder_that_looks_at_neighbours_is_windowed(prompt: list[int], ids: list[int]) -> None:
    vocabulary = Vocabulary(WORDS)
    assert not vocabulary.is_bytewise
    prompt = [2, *prompt]  # At least one token that shows.
    prompt = [token_id for token_id in prompt if token_id > 1]
    whole = WORDS.decode([*prompt, *ids])
    assert stream(vocabulary, ids, prompt) == whole[len(WORDS.decode(prompt)) :]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=ALPHABET.replace("\ufffd", ""), max_size=30))
def test_the_window_agrees_with_the_table(text: str) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    window = WindowDetokenizer(BYTE_LEVEL, [])
    assert "".join([window.push(i) for i in ids]) + window.finish() == text


def test_a_window_shows_even_what_never_becomes_a_character() -> None:
    lone = Vocabulary(BYTE_LEVEL)
    half = next(i for i in range(lone.size) if lone.piece(i)[1] == b"\xe6")
    window = WindowDetokenizer(BYTE_LEVEL, [])
    shown = "".join([window.push(half) for _ in range(200)])
    assert len(shown) > 150


def test_an_incomplete_character_at_the_end_shows_as_a_replacement() -> None:
    detokenizer = BytewiseDetokenizer([b"\xe6", b"\xbc", b"\xa2"])
    assert [detokenizer.push(0), detokenizer.push(1), detokenizer.finish()] == ["", "", "\ufffd"]
    detokenizer = BytewiseDetokenizer([b"\xe6", b"\xbc", b"\xa2"])
    assert [detokenizer.push(i) for i in range(3)] == ["", "", "漢"]


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first moment at which some stop string stands at the end."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_found_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected, expected_stop = reference_stop(text, stops)
    matcher, shown, found = StopMatcher(stops), "", None
    for piece in pieces:
        new, found = matcher.push(piece)
        shown += new
        assert expected.startswith(shown)  # Nothing of a stop string is shown early.
        if found is not None:
            break
    if found is None:
        shown += matcher.finish()
    assert (shown, found) == (expected, expected_stop)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("an E") == ("an ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("D") == ("", "END")
    matcher = StopMatcher(["END"])
    assert matcher.push("EN") == ("", None)
    assert matcher.push("TER") == ("ENTER", None)
