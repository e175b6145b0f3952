"""The training text: the standard library of the running interpreter, as source and as short chats.

A module belongs to training or to evaluation by a hash of its dotted name alone, so the split is
the same on every machine, whatever other modules are installed. Chats are cut mechanically, by
`ast`, out of training modules; nothing in the corpus comes from anywhere else.
"""

import ast
import hashlib
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 3.0
TEST_MODULES_KEPT_PERCENT = 30.0
"""Tests repeat one idiom many times over, so only a part of them is worth the training time."""

CHAT_BODY_LIMIT_CHARS = 1100
"""About 350 tokens: short enough that one training window shows a whole exchange and its end."""

_LONGEST_DOCUMENT_CHARS = 400_000
_SHORTEST_DOCUMENT_CHARS = 200

# Generated tables, machine configuration, and inputs that are data rather than programs.
_EXCLUDED_PREFIXES = (
    "site-packages/",
    "encodings/",
    "pydoc_data/",
    "lib2to3/tests/",
    "idlelib/idle_test/",
    "test/encoded_modules/",
    "test/crashers/",
    "ensurepip/_bundled/",
    "config-",
    "_sysconfigdata",
)
_EXCLUDED_NAMES = ("html.entities", "stringprep", "antigravity", "this", "test.test_unicode_identifiers")
_TEST_FOLDERS = frozenset({"test", "tests"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file of the library."""

    name: str
    """Dotted, as it would be imported: `json.decoder`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Two disjoint sets of modules; both in order of name."""

    training: tuple[Module, ...]
    held_out: tuple[Module, ...]


def is_held_out(module_name: str) -> bool:
    """Whether the module is kept for evaluation; depends on its name only."""
    return _percentile(module_name, salt="held-out") < HELD_OUT_PERCENT


def read_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the modules under `stdlib` (the running interpreter's by default) and split them."""
    root = stdlib if stdlib is not None else Path(sysconfig.get_paths()["stdlib"])
    modules = tuple(_without_duplicates(_read_modules(root)))
    return Corpus(
        training=tuple(module for module in modules if not is_held_out(module.name)),
        held_out=tuple(module for module in modules if is_held_out(module.name)),
    )


def is_test_module(module_name: str) -> bool:
    """Whether the module lies in a test package."""
    return not _TEST_FOLDERS.isdisjoint(module_name.split("."))


def chats_of(module: Module, *, rng: random.Random) -> Iterator[tuple[Message, ...]]:
    """Make chats out of the module's functions and short classes, each at most once.

    The assistant always answers with Python. A module that does not parse yields nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(module.text)
    except (SyntaxError, ValueError):
        return
    pending: tuple[Message, ...] = ()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        exchange = _exchange(node, module=module, rng=rng)
        if exchange is None:
            continue
        if pending:
            yield (*_system_prompt(rng), *pending, *exchange)
            pending = ()
        elif rng.random() < 0.12:  # kept back, to become the first turn of a longer chat
            pending = exchange
        else:
            yield (*_system_prompt(rng), *exchange)


def _exchange(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, *, module: Module, rng: random.Random
) -> tuple[Message, Message] | None:
    """One question about the definition and its answer, or None where it does not lend itself."""
    source = ast.get_source_segment(module.text, node, padded=True)
    if source is None:
        return None
    source = textwrap.dedent(source).strip("\n")
    lines = source.split("\n")
    if len(lines) < 3 or len(source) > CHAT_BODY_LIMIT_CHARS:
        return None
    docstring = ast.get_docstring(node)
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    if docstring and rng.random() < 0.65:
        summary = " ".join(docstring.split("\n\n")[0].split())
        if len(summary) <= 300:
            question = rng.choice(
                (
                    f"Write a Python {kind} `{node.name}`: {summary}",
                    f"Write a {kind} named {node.name}. {summary}",
                    f"Implement `{node.name}` in Python.\n{summary}",
                    f"{summary}\nCall the {kind} `{node.name}`.",
                    f"Write Python code: {summary}",
                )
            )
            return _turns(question, source)
    if kind == "function" and rng.random() < 0.4:
        cut = node.body[0].lineno - node.lineno
        if not 0 < cut < len(lines):
            return None
        signature = "\n".join(lines[:cut])
        request = rng.choice(("Write the body of this function:\n", "Implement this function:\n"))
        return _turns(request + signature, "\n".join(lines[cut:]))
    cut = rng.randint(1, len(lines) - 1)
    request = rng.choice(("Complete this code:\n", "Continue this code:\n"))
    return _turns(request + "\n".join(lines[:cut]), "\n".join(lines[cut:]))


def _turns(question: str, answer: str) -> tuple[Message, Message] | None:
    if not answer.strip():
        return None
    return Message(role="user", content=question), Message(role="assistant", content=answer.rstrip())


def _system_prompt(rng: random.Random) -> tuple[Message, ...]:
    if rng.random() < 0.6:
        return ()
    prompts: Sequence[str] = (
        "You are a helpful assistant.",
        "You are a helpful assistant that writes Python code.",
        "You write Python. Answer with code only.",
        "You are an expert Python programmer.",
    )
    return (Message(role="system", content=rng.choice(prompts)),)


def _read_modules(root: Path) -> Iterator[Module]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if relative.startswith(_EXCLUDED_PREFIXES):
            continue
        name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if name in _EXCLUDED_NAMES or "bad" in name.rpartition(".")[2]:
            continue
        if is_test_module(name) and _percentile(name, salt="test") >= TEST_MODULES_KEPT_PERCENT:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if _is_worth_reading(text):
            yield Module(name=name, text=text)


def _is_worth_reading(text: str) -> bool:
    """Leave out near-empty files, giants, and tables: digits and escapes in place of words."""
    if not _SHORTEST_DOCUMENT_CHARS <= len(text) <= _LONGEST_DOCUMENT_CHARS:
        return False
    visible = re.sub(r"\s", "", text)
    letters = sum(map(str.isalpha, visible))
    return letters >= 0.55 * len(visible)


def _without_duplicates(modules: Iterable[Module]) -> Iterator[Module]:
    """Drop every module whose lines, blanks aside, an earlier module has already given."""
    seen: set[bytes] = set()
    for module in modules:
        key = hashlib.blake2b("\n".join(module.text.split()).encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield module


def _percentile(name: str, *, salt: str) -> float:
    """A number in [0, 100) fixed by the name; equal on every machine and in every process."""
    digest = hashlib.blake2b(f"{salt}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100
