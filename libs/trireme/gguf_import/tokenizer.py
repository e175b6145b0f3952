"""The tokenizer in a GGUF file's metadata, as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguf.constants import TokenType
from tokenizers import Tokenizer

from trireme.errors import InvalidCheckpoint
from trireme.gguf_import.metadata import Metadata

_SPACE: Final = "\u2581"
_MOST_TOKEN_CHARACTERS: Final = 1024
_MOST_TOKENS: Final = 1 << 20
_KEY: Final = "tokenizer.ggml."

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Final = {
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
}
"""How words are cut before bytes are merged; digits by threes, or one by one."""
_PLAIN: Final = ("gpt-2", "olmo", "mpt")
"""As GPT-2 cuts them."""
_SINGLE_DIGITS: Final = ("smollm", "starcoder")
"""The same, with every digit a word."""
_ALIASES: Final = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
PRE_TOKENIZERS: Final = (*_SPLITS, *_PLAIN, *_SINGLE_DIGITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedTokenizer:
    """What a checkpoint says of its tokens."""

    tokenizer: str
    """`tokenizer.json`."""
    config: Mapping[str, Any]
    """`tokenizer_config.json`."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """The end of a text, and of a turn where that is another token."""


def read_tokenizer(values: Mapping[str, Any], *, source: str, vocabulary_size: int) -> ImportedTokenizer:
    """Read the tokenizer.

    Args:
        values: the file's metadata.
        source: what errors call the file.
        vocabulary_size: rows of the embedding.

    Raises:
        InvalidCheckpoint: it is of a kind that is not read here, or damaged.
    """
    metadata = Metadata(values, source)
    tokens = metadata.strings(_KEY + "tokens")
    if not 1 <= len(tokens) <= min(vocabulary_size, _MOST_TOKENS):
        raise InvalidCheckpoint(
            f"{source}: {_KEY}tokens names {len(tokens)} tokens, but the embedding has {vocabulary_size} rows"
        )
    if len(set(tokens)) < len(tokens) or max(map(len, tokens)) > _MOST_TOKEN_CHARACTERS:
        raise InvalidCheckpoint(
            f"{source}: {_KEY}tokens names a token twice, or one of over {_MOST_TOKEN_CHARACTERS} characters"
        )
    types = metadata.numbers(_KEY + "token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise metadata.bad(_KEY + "token_type", f"one number for each of {len(tokens)} tokens")
    kind = metadata.text(_KEY + "model")
    if kind == "gpt2":
        fields, adds_bos = _byte_level(metadata, tokens)
    elif kind == "llama":
        fields, adds_bos = _sentence_piece(metadata, tokens, types), True
    else:
        raise metadata.bad(_KEY + "model", "gpt2 or llama")
    bos = metadata.token(_KEY + "bos_token_id", len(tokens))
    eos = metadata.token(_KEY + "eos_token_id", len(tokens))
    turn = metadata.token(_KEY + "eot_token_id", len(tokens))
    before = [bos] if metadata.flag(_KEY + "add_bos_token", adds_bos) and bos is not None else []
    after = [eos] if metadata.flag(_KEY + "add_eos_token", False) and eos is not None else []
    fields["post_processor"] = _template(tokens, before, after)
    fields["added_tokens"] = _added_tokens(tokens, types)
    text = json.dumps({"version": "1.0", "truncation": None, "padding": None, **fields}, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise InvalidCheckpoint(f"{source}: its tokens and merges do not fit together: {error}") from error
    ends = [token for token in (eos, turn) if token is not None]
    return ImportedTokenizer(
        tokenizer=text,
        config=_tokenizer_config(metadata, tokens, bos, eos),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
    )


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Byte-pair encoding over bytes, as GPT-2 introduced it."""
    name = metadata.text(_KEY + "pre")
    name = _ALIASES.get(name, name)
    if name not in PRE_TOKENIZERS:
        raise metadata.bad(_KEY + "pre", "one of " + ", ".join(PRE_TOKENIZERS))
    merges = [merge.split(" ") for merge in metadata.strings(_KEY + "merges")]
    if not all(len(pair) == 2 for pair in merges):
        raise metadata.bad(_KEY + "merges", "pairs of tokens with a space between them")
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = []
    if name in _SPLITS:
        pattern = {"Regex": _SPLITS[name]}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    elif name in _SINGLE_DIGITS:
        steps.append({"type": "Digits", "individual_digits": True})
    steps.append({**by_bytes, "use_regex": name not in _SPLITS})
    fields = {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**by_bytes, "use_regex": True},
        "model": _model(tokens, merges, ignore_merges=name == "llama-bpe"),
    }
    return fields, name == "llama-bpe"


def _sentence_piece(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """Byte-pair encoding over characters, whose merges follow from the tokens' scores."""
    scores = metadata.numbers(_KEY + "scores")
    if len(scores) != len(tokens):
        raise metadata.bad(_KEY + "scores", f"one number for each of {len(tokens)} tokens")
    unknown = metadata.token(_KEY + "unknown_token_id", len(tokens))
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoding: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.flag(_KEY + "add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _model(tokens, _merges_of_scores(tokens, types, scores))
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoding},
        "model": {
            **model,
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges_of_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every way to join two tokens to a third, the third of the highest score first.

    SentencePiece joins the neighbours whose union has the highest score, until there are none.
    """
    ids = {token: index for index, token in enumerate(tokens) if types[index] == TokenType.NORMAL}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[index]), left, right))
    return [[tokens[left], tokens[right]] for _, left, right in sorted(found)]


def _model(
    tokens: Sequence[str], merges: Sequence[Sequence[str]], *, ignore_merges: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [list(pair) for pair in merges],
    }


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Those that no text is merged to: control tokens, and the ones that users defined."""
    is_special: dict[int, bool] = {
        TokenType.CONTROL: True,
        TokenType.UNKNOWN: True,
        TokenType.USER_DEFINED: False,
    }
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": is_special[kind],
        }
        for index, kind in enumerate(types)
        if kind in is_special
    ]


def _template(tokens: Sequence[str], before: Sequence[int], after: Sequence[int]) -> dict[str, Any] | None:
    if not before and not after:
        return None

    def special(token: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokens[token], "type_id": 0}}

    def around(*sequences: str) -> list[dict[str, Any]]:
        inner = [{"Sequence": {"id": sequence, "type_id": 0}} for sequence in sequences]
        return [*map(special, before), *inner, *map(special, after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": {
            tokens[token]: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]}
            for token in (*before, *after)
        },
    }


def _tokenizer_config(
    metadata: Metadata, tokens: Sequence[str], bos: int | None, eos: int | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            config[name] = tokens[token]
    if "tokenizer.chat_template" in metadata.values:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return config
