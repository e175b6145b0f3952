"""Chains of block hashes: what is shared between tenants, and what a cut makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.kvcache.block_identity import (
    HashChain,
    block_hashes,
    hash_chain,
    public_blocks,
    public_root,
    tenant_root,
    truncated_prefix,
)
from trireme.kvcache.block_pool import BlockPool
from trireme.policies.kv_truncation import TruncationRule, plan_truncation

SIZE = 4
A, B = tenant_root("fleet", "a"), tenant_root("fleet", "b")
PUBLIC = public_root("fleet")
TOKENS = st.lists(st.integers(0, 3), max_size=80)


def hashes_of(chain: HashChain, tokens: list[int]) -> list[bytes]:
    return chain.extend((), tokens, SIZE)


def chain_of(tokens: list[int], salt: bytes, public: list[int]) -> HashChain:
    """As a gateway and a worker make it."""
    count = public_blocks(tokens, [public], SIZE)
    return hash_chain(tokens, SIZE, salt=salt, public_root=PUBLIC, num_public_blocks=count)


def test_roots_tell_tenants_and_the_public_apart() -> None:
    roots = {tenant_root("f", ""), tenant_root("f", "public"), tenant_root("g", ""), public_root("f")}
    assert len(roots) == 4


@given(TOKENS)
def test_without_joints_a_chain_is_the_plain_one(tokens: list[int]) -> None:
    assert tuple(hashes_of(HashChain(A), tokens)) == block_hashes(tokens, SIZE, A)


@given(TOKENS, TOKENS, st.integers(0, 20))
def test_a_chain_is_the_same_in_one_piece_and_in_two(tokens: list[int], public: list[int], at: int) -> None:
    chain = chain_of(tokens, A, public)
    whole = hashes_of(chain, tokens)
    known = whole[:at]
    assert [*known, *chain.extend(known, tokens[len(known) * SIZE :], SIZE)] == whole


@given(TOKENS, TOKENS, TOKENS)
def test_tenants_share_the_declared_prefix_and_nothing_else(
    public: list[int], mine: list[int], theirs: list[int]
) -> None:
    one, other = public + mine, public + theirs
    ours = hashes_of(chain_of(one, A, public), one)
    others = hashes_of(chain_of(other, B, public), other)
    count = len(public) // SIZE
    assert ours[:count] == others[:count]
    assert not set(ours[count:]) & set(others)
    assert not set(ours) & set(hashes_of(HashChain(B), other))
    assert len(set(ours)) == len(ours)


def test_equal_prompts_of_two_tenants_meet_in_no_cache() -> None:
    prompt = list(range(40))
    pool = BlockPool(32)
    for block, block_hash in zip(pool.allocate(10) or [], hashes_of(HashChain(A), prompt), strict=True):
        pool.cache(block, block_hash)
    assert len(pool.match(hashes_of(HashChain(A), prompt))) == 10
    assert pool.match(hashes_of(HashChain(B), prompt)) == []
    assert pool.match(hashes_of(chain_of(prompt, B, prompt[:16]), prompt)) == []


def test_only_blocks_inside_a_declared_prefix_are_public() -> None:
    declared = [list(range(10)), [7, 7]]
    assert public_blocks(list(range(30)), declared, SIZE) == 2  # 10 tokens: the third block is mixed
    assert public_blocks([0, 1, 2, 3, 9], declared, SIZE) == 1
    assert public_blocks([1, *range(30)], declared, SIZE) == 0
    assert public_blocks(list(range(30)), [], SIZE) == 0


RULE = TruncationRule(window=48, block_size=SIZE)


def cut_of(tokens: list[int], salt: bytes = A, public: list[int] | None = None):  # type: ignore[no-untyped-def]
    plan = plan_truncation(RULE, len(tokens))
    chain = chain_of(tokens, salt, public or [])
    prefix = truncated_prefix(tokens, SIZE, chain, head=plan.head, cuts=plan.cuts, window=RULE.window)
    return plan, chain, prefix


@given(st.integers(48, 400), st.integers(0, 60))
def test_the_next_turn_finds_the_blocks_of_this_one(length: int, more: int) -> None:
    tokens = [token * 7919 % 1000 for token in range(length + more)]
    plan, _, prefix = cut_of(tokens[:length])
    after, _, later = cut_of(tokens)
    if after.cuts != plan.cuts:
        return
    mine = hashes_of(prefix.chain, plan.keep(tokens[:length]))
    assert hashes_of(later.chain, after.keep(tokens))[: len(mine)] == mine


def test_a_cut_sequence_shares_its_head_with_the_whole_and_nothing_with_the_text_it_looks_like() -> None:
    tokens = list(range(60))
    plan, chain, prefix = cut_of(tokens)
    kept = plan.keep(tokens)
    cut, whole = hashes_of(prefix.chain, kept), hashes_of(chain, tokens)
    assert cut[: prefix.head_blocks] == whole[: prefix.head_blocks]
    assert not set(cut[prefix.head_blocks :]) & set(whole)
    assert not set(cut[prefix.head_blocks :]) & set(block_hashes(kept, SIZE, A))
    assert not set(cut[prefix.head_blocks :]) & set(hashes_of(cut_of(tokens, B)[2].chain, kept))


def test_what_was_dropped_and_where_is_part_of_the_name() -> None:
    tokens = list(range(60))
    plan, chain, prefix = cut_of(tokens)
    names = set(hashes_of(prefix.chain, plan.keep(tokens))[prefix.head_blocks :])
    other = [*tokens[: plan.head], 999, *tokens[plan.head + 1 :]]  # the same tokens stay
    assert plan.keep(other) == plan.keep(tokens)
    assert not names & set(hashes_of(cut_of(other)[2].chain, plan.keep(other)))
    later = truncated_prefix(
        tokens, SIZE, chain, head=plan.head, cuts=[plan.cuts[0] + SIZE], window=RULE.window
    )
    assert not names & set(hashes_of(later.chain, plan.keep(tokens)))


def test_supplies_name_the_blocks_as_they_were_before() -> None:
    tokens = list(range(75))  # two cuts: 4 -> 28 -> 52
    plan, chain, prefix = cut_of(tokens)
    assert (plan.head, plan.cuts) == (4, (28, 52))
    once = truncated_prefix(tokens[:60], SIZE, chain, head=4, cuts=[28], window=48)
    before = hashes_of(once.chain, [*tokens[:4], *tokens[28:]])  # token 28 is at position 4
    (newest,) = prefix.supplies  # the whole text held nothing behind 52: its window ended at 48
    assert newest.shift_tokens == 24
    first = (52 - 24) // SIZE
    assert list(newest.hashes) == before[first : first + len(newest.hashes)]
    assert len(newest.hashes) == (75 - 52) // SIZE  # up to the end of the text; the window held more

    (supply,) = once.supplies
    assert supply.shift_tokens == 24
    assert list(supply.hashes) == hashes_of(chain, tokens)[28 // SIZE : 48 // SIZE]


def test_an_older_supply_serves_where_two_cuts_come_at_once() -> None:
    tokens = list(range(75))
    chain = HashChain(A)
    prefix = truncated_prefix(tokens, SIZE, chain, head=4, cuts=[12, 40], window=48)
    newest, oldest = prefix.supplies
    assert (newest.shift_tokens, oldest.shift_tokens) == (28, 36)
    whole = hashes_of(chain, tokens)
    assert list(oldest.hashes) == whole[40 // SIZE : 48 // SIZE]


@pytest.mark.parametrize("declared", [2, 4, 6, 20])
def test_a_public_head_stays_public_after_a_cut_and_the_rest_private(declared: int) -> None:
    tokens = list(range(60))
    public = tokens[:declared]
    names = {}
    for salt in (A, B):
        plan, chain, prefix = cut_of(tokens, salt, public)
        whole = hashes_of(chain, tokens)
        cut = hashes_of(prefix.chain, plan.keep(tokens))
        assert cut[: prefix.head_blocks] == whole[: prefix.head_blocks]
        names[salt] = cut
    shared = min(declared // SIZE, 1)
    assert names[A][:shared] == names[B][:shared]
    assert not set(names[A][shared:]) & set(names[B])
