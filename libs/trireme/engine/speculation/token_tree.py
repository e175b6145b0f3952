"""Drafted tokens that one step verifies: a chain, or a tree of several continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Tokens, each behind the one that it follows. Its places in the batch and in the KV are these."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    """Place of the token before each, a smaller one; -1: the sequence's last. None: each follows the one
    before it."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> list[int]:
        """How many tokens behind the sequence's last each one stands; 1 for those that follow it."""
        if self.parents is None:
            return list(range(1, len(self.tokens) + 1))
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return found

    @property
    def rooted_parents(self) -> tuple[int, ...]:
        """The tree with the sequence's last token as its root, as `kernels.tree_paths` has it."""
        parents = range(-1, len(self.tokens) - 1) if self.parents is None else self.parents
        return (-1, *(parent + 1 for parent in parents))

    def prefixes(self) -> Iterator[tuple[int, ...]]:
        """Of each token the tokens up to it."""
        if self.parents is None:
            for end in range(1, len(self.tokens) + 1):
                yield self.tokens[:end]
            return
        found: list[tuple[int, ...]] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            found.append((token,) if parent < 0 else (*found[parent], token))
        yield from found

    def walk(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Places of the tokens that are right, in their order.

        Args:
            chosen: the token chosen behind the sequence's last one, then the one behind each of the tree's.
        """
        if self.parents is None:
            count = 0
            while count < len(self.tokens) and chosen[count] == self.tokens[count]:
                count += 1
            return tuple(range(count))
        path: list[int] = []
        last = -1
        for place, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent == last and token == chosen[last + 1]:
                path.append(place)
                last = place
        return tuple(path)


NO_TOKENS: Final = TokenTree(())
"""Nothing was drafted."""
