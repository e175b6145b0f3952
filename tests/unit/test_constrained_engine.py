"""Constrained answers: what a grammar forbids never comes, and nothing else changes."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.unit.engine_support import greedy, outputs_of, request, run, save, tokens_of
from tests.unit.engine_support import settings as sizes
from trireme.constraints.compiling import compiled, open_tokens
from trireme.constraints.constraint import Constraint, ConstraintKind
from trireme.engine import Engine, SamplingParams
from trireme.engine.builder import build
from trireme.engine.outputs import FinishReason
from trireme.errors import InvalidRequest
from trireme.gateway.detokenizer import Vocabulary
from trireme.policies.speculation import SpeculationSettings

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = 0
VOCAB = 400
PROMPT = [5, 17, 44, 9]


def schema(value: dict[str, Any]) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern)


def choice(*texts: str) -> Constraint:
    return Constraint(ConstraintKind.CHOICE, json.dumps(texts))


def grammar(text: str) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are bytes and merged pieces of JSON; a few ids have no token."""
    folder = tmp_path_factory.mktemp("constrained")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 12,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ['{"name": "abc", "list": [1, 2, 3], "true": true, "null": null}', "ab abc 0123 false x1y2"] * 8
    tokenizer.train_from_iterator([*text, *map(str, range(400))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(3)
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    return save(hf.LlamaForCausalLM(config).eval(), folder)


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Path) -> Vocabulary:
    return Vocabulary(Tokenizer.from_file(str(checkpoint / "tokenizer.json")))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return build(checkpoint, settings=sizes())


def text_of(vocabulary: Vocabulary, ids: list[int]) -> str:
    return b"".join(vocabulary.piece(i)[1] for i in ids if i != EOS).decode()


def answers(engine: Engine, *wanted: SamplingParams) -> list[tuple[list[int], FinishReason | None]]:
    """The tokens of sequences that run together, and how each ended."""
    for number, params in enumerate(wanted):
        engine.add(request(f"s{number}", PROMPT, params))
    found = outputs_of(run(engine))
    for outputs in found.values():
        assert outputs[-1].error is None, outputs[-1].error
    return [
        ([o.token_id for o in found[f"s{n}"] if o.token_id is not None], found[f"s{n}"][-1].finish_reason)
        for n in range(len(wanted))
    ]


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 0.5},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-c]{1,4}[0-9]?$"},
        {"enum": ["é", "a b", 3, None]},
        {"const": {"k": [1]}},
    ]
)
KEYS = st.sampled_from(["name", "list", "a b", "é", "x"])


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [key for key in required if key in properties],
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(KEYS, inner, max_size=3), st.lists(KEYS, max_size=3, unique=True)),
        st.builds(
            lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": least + 2},
            inner,
            st.integers(0, 2),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)


def test_an_answer_that_ends_by_itself_is_what_its_schema_says(
    engine: Engine, vocabulary: Vocabulary
) -> None:
    ended = 0

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(wanted=st.lists(SCHEMAS, min_size=2, max_size=3), seed=st.integers(0, 2**32))
    def check(wanted: list[dict[str, Any]], seed: int) -> None:
        nonlocal ended
        params = [
            SamplingParams(max_tokens=120, temperature=temperature, seed=seed, constraint=schema(value))
            for value in wanted
            for temperature in (0.0, 1.5)
        ]
        for (ids, reason), one in zip(answers(engine, *params), params, strict=True):
            if reason is FinishReason.STOP:
                assert one.constraint is not None
                jsonschema.validate(json.loads(text_of(vocabulary, ids)), json.loads(one.constraint.text))
                ended += 1
            else:
                assert reason is FinishReason.LENGTH and len(ids) == 120

    check()
    assert ended > 60


@pytest.mark.parametrize(
    "pattern", [r"[a-f]{2,9}(-[0-9]{1,3}){1,3}", r"(yes|no|maybe)!{0,2}", r"é{2}[^a-z\n]{1,5}"]
)
def test_an_answer_matches_its_expression_as_a_whole(
    engine: Engine, vocabulary: Vocabulary, pattern: str
) -> None:
    wanted = [
        SamplingParams(max_tokens=80, temperature=1.0, seed=seed, constraint=regex(pattern))
        for seed in range(8)
    ]
    for ids, reason in answers(engine, *wanted):
        assert reason is FinishReason.STOP
        assert re.fullmatch(pattern, text_of(vocabulary, ids))


@pytest.mark.parametrize(
    "text",
    [
        'start: sum\nsum: term ("+" term)*\nterm: "(" sum ")" | NUMBER\nNUMBER: /[1-9][0-9]?/\n',
        'root ::= sum\nsum ::= term ("+" term)*\nterm ::= "(" sum ")" | [1-9] [0-9]?\n',
    ],
)
def test_a_grammar_in_either_syntax_is_kept(engine: Engine, vocabulary: Vocabulary, text: str) -> None:
    wanted = [
        SamplingParams(
            max_tokens=90, temperature=1.0, seed=seed, constraint=grammar(text), logit_bias={EOS: 4.0}
        )
        for seed in range(6)
    ]
    ended = [ids for ids, reason in answers(engine, *wanted) if reason is FinishReason.STOP]
    assert ended
    for ids in ended:
        said = text_of(vocabulary, ids)
        assert re.fullmatch(r"[0-9+()]+", said) and eval(said) > 0


def _language(pattern: str, alphabet: str, longest: int) -> set[bytes]:
    """All texts up to a length that the pattern matches, by trying each."""
    matches = re.compile(pattern).fullmatch
    words = ("".join(w) for n in range(longest + 1) for w in itertools.product(alphabet, repeat=n))
    return {word.encode() for word in words if matches(word)}


@pytest.mark.parametrize(
    "pattern", ["(ab|a|abc)[01]{1,2}x?", "(a|b){2,4}", "(0|01|012)?(a(bc)?)?", "ab|abc 0|1x"]
)
def test_what_is_allowed_is_what_trying_every_token_finds(
    checkpoint: Path, vocabulary: Vocabulary, pattern: str
) -> None:
    """Masks against a brute force that knows nothing of automata."""
    texts = _language(pattern, "abcx01 2", 6)
    starts = {text[:end] for text in texts for end in range(len(text) + 1)}
    pieces = {i: vocabulary.piece(i)[1] for i in range(1, vocabulary.size)}
    matcher = compiled(regex(pattern), open_tokens(checkpoint, vocab_size=VOCAB, eos_token_ids=[EOS]))
    seen = 0

    def walk(prefix: bytes) -> None:
        nonlocal seen
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        found = set(np.unpackbits(bits, bitorder="little")[:VOCAB].nonzero()[0].tolist())
        expected = {i for i, piece in pieces.items() if piece and prefix + piece in starts}
        if prefix in texts:
            expected.add(EOS)
        assert found == expected, prefix
        seen += 1
        for token_id in sorted(expected - {EOS}):
            if seen < 300:
                assert matcher.consume_token(token_id)
                walk(prefix + pieces[token_id])
                assert matcher.rollback(1)

    walk(b"")
    assert seen > 3


def test_a_greedy_answer_takes_the_likeliest_allowed_token_of_the_reference(
    checkpoint: Path, engine: Engine, vocabulary: Vocabulary
) -> None:
    """Against transformers' scores and a brute-force mask; with a bias on top."""
    pattern, bias = "(a|b|c){3,5}x?[01]", {1 + i: 3.0 for i in range(0, 300, 7)}
    texts = _language(pattern, "abcx01", 7)
    starts = {text[:end] for text in texts for end in range(len(text) + 1)}
    hf: Any = importlib.import_module("transformers")
    model = hf.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for biases in ({}, bias):
        ids, prefix = list[int](), b""
        while prefix not in texts:
            with torch.no_grad():
                scores = model(torch.tensor([[*PROMPT, *ids]])).logits[0, -1]
            for token_id, value in biases.items():
                scores[token_id] += value
            allowed = [
                i
                for i in range(1, vocabulary.size)
                if vocabulary.piece(i)[1] and prefix + vocabulary.piece(i)[1] in starts
            ]
            ids.append(max(allowed, key=lambda i: scores[i].item()))
            prefix += vocabulary.piece(ids[-1])[1]
        wanted = greedy(40, constraint=regex(pattern), logit_bias=biases)
        [(found, reason)] = answers(engine, wanted)
        assert (found, reason) == (ids, FinishReason.STOP)


LONG = regex("([a-c]{2}[0-9];){12}")
MIXED = [
    SamplingParams(max_tokens=60, temperature=1.2, seed=1, constraint=LONG),
    SamplingParams(max_tokens=40, temperature=1.2, seed=2),
    greedy(50, constraint=schema({"type": "array", "items": {"type": "integer"}, "minItems": 30})),
    greedy(30),
    SamplingParams(max_tokens=60, temperature=0.7, top_p=0.9, seed=4, constraint=LONG, frequency_penalty=0.5),
]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[list[int], FinishReason | None]]:
    """Each of `MIXED` by itself."""
    return [answers(engine, params)[0] for params in MIXED]


def test_rows_with_and_without_a_constraint_do_not_touch_each_other(
    engine: Engine, alone: list[tuple[list[int], FinishReason | None]]
) -> None:
    assert answers(engine, *MIXED) == alone


@pytest.mark.parametrize("host_blocks", [0, 40])
def test_preempted_answers_are_the_same(
    checkpoint: Path, alone: list[tuple[list[int], FinishReason | None]], host_blocks: int
) -> None:
    small = build(checkpoint, settings=sizes(num_blocks=18, host_blocks=host_blocks, max_model_len=100))
    assert answers(small, *MIXED) == alone
    assert small.stats().preemptions > 0


def test_an_answer_goes_on_elsewhere_from_any_token(
    engine: Engine, alone: list[tuple[list[int], FinishReason | None]]
) -> None:
    whole, reason = alone[0]
    for have in range(1, len(whole)):
        resumed = request(f"r{have}", PROMPT, MIXED[0], delivered_token_ids=tuple(whole[:have]))
        engine.add(resumed)
    for name, ids in tokens_of(run(engine)).items():
        assert ids == whole[int(name[1:]) :]
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("drafted, branches", [(1, 1), (4, 1), (6, 3)])
def test_speculation_changes_no_token(
    checkpoint: Path, alone: list[tuple[list[int], FinishReason | None]], drafted: int, branches: int
) -> None:
    speculating = build(
        checkpoint,
        settings=sizes(
            speculation=SpeculationSettings(fixed_tokens=drafted, branches=branches), max_batch_tokens=64
        ),
    )
    repeating = greedy(100, constraint=regex("(abc0,){30}"))
    engine = build(checkpoint, settings=sizes())
    assert answers(speculating, *MIXED, repeating) == answers(engine, *MIXED, repeating)
    assert speculating.stats().accepted_tokens > 5


def test_several_choices_have_a_guide_each(engine: Engine, vocabulary: Vocabulary) -> None:
    wanted = [
        SamplingParams(max_tokens=20, temperature=1.0, seed=seed, constraint=choice("left", "right", "é"))
        for seed in range(12)
    ]
    said = {text_of(vocabulary, ids) for ids, _ in answers(engine, *wanted)}
    assert said <= {"left", "right", "é"} and len(said) > 1


def test_a_bias_chooses_among_what_is_allowed_only(engine: Engine, vocabulary: Vocabulary) -> None:
    ids = {text: _first_byte(vocabulary, text) for text in ("left", "right")}
    for text, first in ids.items():
        wanted = greedy(20, constraint=choice("left", "right"), logit_bias={first: 100.0, 7: 100.0})
        assert text_of(vocabulary, answers(engine, wanted)[0][0]) == text


def _first_byte(vocabulary: Vocabulary, text: str) -> int:
    return int(next(i for i in range(1, vocabulary.size) if vocabulary.piece(i)[1] == text[:1].encode()))


def test_the_end_comes_where_nothing_else_may_whatever_min_tokens_says(
    engine: Engine, vocabulary: Vocabulary
) -> None:
    [(ids, reason)] = answers(engine, greedy(30, min_tokens=20, constraint=choice("a")))
    assert (text_of(vocabulary, ids), reason) == ("a", FinishReason.STOP)
    [(ids, _)] = answers(engine, greedy(40, min_tokens=12, constraint=regex("[ab]*")))
    assert len(ids) >= 12


def test_a_cut_answer_says_so(engine: Engine) -> None:
    [(ids, reason)] = answers(engine, greedy(5, constraint=regex("[ab]{50}")))
    assert (len(ids), reason) == (5, FinishReason.LENGTH)


def test_a_constraint_that_grows_too_costly_ends_its_own_answer_only(engine: Engine) -> None:
    ambiguous = grammar('start: a\na: a a | "x" | a a a\n')
    engine.add(request("bad", PROMPT, greedy(300, constraint=ambiguous, logit_bias={EOS: -100.0})))
    engine.add(request("malformed", PROMPT, greedy(9, constraint=regex("(a"))))
    engine.add(request("good", PROMPT, greedy(40)))
    found = outputs_of(run(engine))
    for name in ("bad", "malformed"):
        assert found[name][-1].finish_reason is FinishReason.ERROR
        assert isinstance(found[name][-1].error, InvalidRequest)
    assert len(found["good"]) == 40 and found["good"][-1].error is None


def test_what_contradicts_a_constraint_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        SamplingParams(constraint=choice("a"), ignore_eos=True)
