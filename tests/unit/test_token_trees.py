"""Trees of drafts: heads are the best of their size, the walk is exact, and drafters grow what they say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_support import VOCAB, prompt_of
from trireme.engine.speculation.draft_readers import DraftReaders, Reader
from trireme.engine.speculation.proposals import NOTHING, Growth, Proposal, Want
from trireme.engine.speculation.repetitions import RepetitionDrafter
from trireme.engine.speculation.token_tree import TokenTree
from trireme.models.model import Model
from trireme.policies.speculation import Mark, SpeculationController, best_lengths

MARK = Mark("made up", 0, True)
TRUNK, BROTHER = Mark("trunk", 0, True), Mark("brother", 0, True)


@st.composite
def proposals(draw: st.DrawFn, most: int = 9, vocab: int = 50) -> Proposal:
    """Random trees; brothers differ."""
    growth = Growth()
    for _ in range(draw(st.integers(1, most))):
        parent = draw(st.integers(-1, len(growth.tokens) - 1))
        growth.add(parent, draw(st.integers(0, vocab - 1)), MARK, draw(st.floats(0.0, 1.0)))
    return growth.proposal()


def closed_sets(parents: Sequence[int]) -> Iterator[set[int]]:
    """All sets of places that have the parent of each."""
    for bits in itertools.product((False, True), repeat=len(parents)):
        places = {place for place, is_in in enumerate(bits) if is_in}
        if all(parents[place] in places or parents[place] < 0 for place in places):
            yield places


@settings(max_examples=60, deadline=None)
@given(proposals(), st.integers(1, 5), st.integers(1, 9))
def test_heads_are_the_best_trees_of_their_size(proposal: Proposal, depth: int, room: int) -> None:
    want = Want("one", [], depth, True, 100, branches=8, most_in_all=room)
    ranked = proposal.ranked(want)
    assert len(ranked.tokens) <= room
    assert proposal.parents is not None
    reaches, depths = proposal.reaches, proposal.tree.depths
    legal = [s for s in closed_sets(proposal.parents) if all(depths[place] <= depth for place in s)]
    for size in range(len(ranked.tokens) + 1):
        best = max(sum(reaches[place] for place in s) for s in legal if len(s) == size)
        assert sum(ranked.head(size).reaches) == pytest.approx(best)
    assert len(ranked.tokens) == min(room, max(map(len, legal)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(proposals(most=5), min_size=1, max_size=2),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 8),
)
def test_no_other_trees_give_more_tokens_a_second(
    offered: list[Proposal], fixed_s: float, row_s: float, room: int
) -> None:
    want = Want("one", [], 9, True, 100, branches=8, most_in_all=9)
    ranked = [proposal.ranked(want) for proposal in offered]
    batch = len(offered)
    choice = best_lengths(
        [proposal.reaches for proposal in ranked],
        batch=batch,
        plain_s=1.0,
        fixed_s=fixed_s,
        row_s=row_s,
        room=room,
        least_gain=1.0,
    )

    def gain(tokens: float, count: int) -> float:
        return (batch + tokens) / (1.0 + (fixed_s if count else 0.0) + row_s * count) / batch

    every = itertools.product(*(closed_sets(proposal.parents or ()) for proposal in offered))
    best = max(
        gain(sum(sum(p.reaches[i] for i in s) for p, s in zip(offered, sets, strict=True)), count)
        for sets in every
        if (count := sum(map(len, sets))) <= room
    )
    found = sum(sum(p.head(n).reaches) for p, n in zip(ranked, choice.lengths, strict=True))
    assert gain(found, sum(choice.lengths)) == pytest.approx(best)


def sequoia(chances: Sequence[Fraction], nodes: int) -> Fraction:
    """Expected right tokens of the best tree of so many nodes, where the k-th likeliest continuation of any
    token is right with `chances[k]`: the dynamic programme of Sequoia (arXiv 2402.12374, section 3.1)."""
    below = [Fraction(0)] * (nodes + 1)
    """Of a token that is right: the best expected number in what hangs on it, by its size."""
    for size in range(1, nodes + 1):
        best = {0: Fraction(0)}  # by nodes used, over the children so far
        for chance in chances:
            new = dict(best)
            for used, value in best.items():
                for child in range(1, size - used + 1):
                    total = value + chance * (1 + below[child - 1])
                    new[used + child] = max(new.get(used + child, Fraction(0)), total)
            best = new
        below[size] = max(best.values())
    return below[nodes]


@pytest.mark.parametrize("chances", [(0.6, 0.2, 0.1), (0.9, 0.05, 0.05), (0.35, 0.3, 0.3)])
def test_the_likeliest_tokens_solve_sequoias_programme(chances: tuple[float, ...]) -> None:
    growth = Growth()
    edge = [-1]
    for _ in range(5):
        edge = [
            growth.add(parent, token, MARK, chance) for parent in edge for token, chance in enumerate(chances)
        ]
    ranked = growth.proposal().ranked(Want("one", [], 5, True, 100, branches=8, most_in_all=63))
    exact = [Fraction(chance) for chance in chances]
    for size in (1, 2, 3, 4, 5):  # no deeper than the tree that was grown
        assert sum(ranked.head(size).reaches) == pytest.approx(float(sequoia(exact, size)))


@given(proposals())
def test_arranging_moves_the_likeliest_path_to_the_front_and_changes_no_path(proposal: Proposal) -> None:
    want = Want("one", [], 9, True, 100, branches=8, most_in_all=9)
    ranked = proposal.ranked(want)
    arranged = ranked.arranged()
    assert sorted(zip(arranged.tree.prefixes(), arranged.chances, strict=True)) == sorted(
        zip(ranked.tree.prefixes(), ranked.chances, strict=True)
    )
    trunk = arranged.trunk()
    assert trunk.tokens[0] == ranked.tokens[0]
    parents = arranged.parents or range(-1, len(arranged.tokens) - 1)
    assert all(parent < place for place, parent in enumerate(parents))


@given(proposals(vocab=3), st.data())
def test_the_walk_follows_what_was_chosen(proposal: Proposal, data: st.DataObject) -> None:
    tree = proposal.tree
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=len(tree) + 1, max_size=len(tree) + 1))
    prefixes = list(tree.prefixes())
    answer: tuple[int, ...] = ()
    places = []
    last = -1
    while (answer := (*answer, chosen[last + 1])) in prefixes:
        last = prefixes.index(answer)
        places.append(last)
    assert tree.walk(chosen) == tuple(places)


def laws(draw: st.DataObject, vocab: int, depth: int) -> dict[tuple[int, ...], list[Fraction]]:
    """A target's next-token distributions behind every short text."""
    found = {}
    for length in range(depth + 1):
        for text in itertools.product(range(vocab), repeat=length):
            weights = draw.draw(st.lists(st.integers(0, 4), min_size=vocab, max_size=vocab))
            weights[draw.draw(st.integers(0, vocab - 1))] += 1
            found[text] = [Fraction(weight, sum(weights)) for weight in weights]
    return found


def by_rejection(
    tree: TokenTree, law: dict[tuple[int, ...], list[Fraction]], at: int = -1, text: tuple[int, ...] = ()
) -> dict[tuple[int, ...], Fraction]:
    """What recursive rejection sampling over brothers without replacement takes, with its probability.

    A brother x of draft law q is taken with min(1, p(x) / q(x)), else p becomes what is left of (p - q)+:
    Miao et al., SpecInfer (ASPLOS 2024, multi-step speculative sampling), without replacement after Chen et
    al., Sequoia (arXiv 2402.12374, section 3.2). Ours are drafted with certainty, so q is 1 at x.
    """
    left = list(law[text])
    outcomes: dict[tuple[int, ...], Fraction] = {}
    is_refused = Fraction(1)
    parents = range(-1, len(tree) - 1) if tree.parents is None else tree.parents
    for place, (token, parent) in enumerate(zip(tree.tokens, parents, strict=True)):
        if parent != at or not sum(left):
            continue
        share = left[token]
        for taken, chance in by_rejection(tree, law, place, (*text, token)).items():
            outcomes[taken] = outcomes.get(taken, Fraction(0)) + is_refused * share * chance
        is_refused *= 1 - share
        left[token] = Fraction(0)
        total = sum(left)
        left = [weight / total for weight in left] if total else left
    for token, chance in enumerate(left):
        if is_refused * chance:
            taken = (*text, token)
            outcomes[taken] = outcomes.get(taken, Fraction(0)) + is_refused * chance
    return {taken: chance for taken, chance in outcomes.items() if chance}


@settings(max_examples=30, deadline=None)
@given(proposals(most=4, vocab=3), st.data())
def test_the_walk_takes_what_recursive_rejection_would_with_the_same_chances(
    proposal: Proposal, data: st.DataObject
) -> None:
    """By trying every draw: the answer has the target's law, and no rule takes more of such a tree."""
    tree = proposal.tree
    law = laws(data, 3, max(tree.depths) + 1)
    texts = [(), *tree.prefixes()]
    walked: dict[tuple[int, ...], Fraction] = {}
    for chosen in itertools.product(range(3), repeat=len(texts)):
        chance = Fraction(1)
        for text, token in zip(texts, chosen, strict=True):
            chance *= law[text][token]
        if not chance:
            continue
        path = tree.walk(chosen)
        answer = texts[path[-1] + 1 if path else 0]
        taken = (*answer, chosen[path[-1] + 1 if path else 0])
        walked[taken] = walked.get(taken, Fraction(0)) + chance
    assert walked == by_rejection(tree, law)
    for taken, chance in walked.items():
        plain = Fraction(1)
        for index, token in enumerate(taken):
            plain *= law[taken[:index]][token]
        assert chance == plain


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=60), st.integers(2, 4))
def test_branches_of_repetitions_have_all_followed_the_same_run(history: list[int], branches: int) -> None:
    def drafter() -> RepetitionDrafter:
        return RepetitionDrafter(lambda mark: 0.5)

    want = Want("one", history, 6, True, 100, branches=branches, most_in_all=24)
    (chain,) = drafter().propose([want._replace(branches=1)], batch=1)
    (tree,) = drafter().propose([want], batch=1)
    assert (tree is NOTHING) == (chain is NOTHING)
    if tree is NOTHING:
        return
    assert tree.trunk().tokens[: len(chain.tokens)] == chain.tokens and tree.trunk().marks == chain.marks
    parents = tree.parents or ()
    assert max(parents.count(place) for place in range(-1, len(parents))) <= branches
    size = len(history)
    for prefix in tree.tree.prefixes():
        assert any(
            history[place - 2 : place] == history[-2:]
            and all(history[place + n % (size - place)] == token for n, token in enumerate(prefix))
            for place in range(2, size)
        )


def test_other_continuations_are_drafted_beside_the_latest() -> None:
    drafter = RepetitionDrafter(lambda mark: 0.5)
    history = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 6, 6, 9, 1, 2]
    (tree,) = drafter.propose([Want("one", history, 2, True, 100, branches=3, most_in_all=24)], batch=1)
    assert set(tree.tree.prefixes()) == {(6,), (6, 6), (3,), (3, 5), (3, 4)}


def test_a_draft_model_reads_a_tree_as_it_reads_its_paths(model: Model) -> None:
    def readers() -> DraftReaders:
        return DraftReaders(model, model.config, num_blocks=64, block_size=8, max_model_len=200)

    prompts = [prompt_of(1, 13), prompt_of(2, 30)]
    growing, chance = readers(), torch.Generator().manual_seed(4)
    open_readers = [growing.open(f"{n}") for n in range(2)]
    with torch.inference_mode():
        for reader, prompt in zip(open_readers, prompts, strict=True):
            assert growing.hold(reader, len(prompt) + 20, keep=())
        growing.follow(list(zip(open_readers, prompts, strict=True)))
        parents: list[list[int]] = [[-1], [-1]]
        tokens: list[list[int]] = [[], []]
        for widths in ((3, 1), (1, 4), (5, 2)):
            asked: list[tuple[Reader, list[int], list[int]]] = []
            for which, width in enumerate(widths):
                for _ in range(width):
                    known = len(parents[which]) if len(asked) > which else len(tokens[which]) + 1
                    parents[which].append(int(torch.randint(0, known, (), generator=chance)))
                    tokens[which].append(int(torch.randint(0, VOCAB, (), generator=chance)))
                asked.append((open_readers[which], tokens[which][-width:], list(parents[which])))
            rows = iter(growing.follow_branches(asked, 4))
            for which, width in enumerate(widths):
                for place in range(len(tokens[which]) - width, len(tokens[which])):
                    path = [place]
                    while (parent := parents[which][path[0] + 1]) > 0:
                        path.insert(0, parent - 1)
                    alone = readers()
                    reader = alone.open("alone")
                    text = [*prompts[which], *(tokens[which][at] for at in path)]
                    assert alone.hold(reader, len(text), keep=())
                    (expected,) = alone.follow([(reader, text)], 4)
                    found = next(rows)
                    assert [token for token, _ in found] == [token for token, _ in expected]
                    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-4)


def test_the_draft_model_reads_as_many_branches_as_gain_most() -> None:
    controller = SpeculationController()
    for _ in range(3):
        controller.times.observe(batch=1, drafted=0, seconds=1.0)
        for count, seconds in ((1, 0.2), (2, 0.3), (4, 0.5)):
            controller.observe_draft_step(count, seconds)
    row_s = controller.times.added_s(1)[1]
    for chances in ([0.9, 0.5, 0.1], [0.9, 0.01], [0.1], [0.5] * 7, []):
        gains = [0.0] + [
            sum(chances[:count]) - (controller.draft_s(count) or 0.0) - row_s * count
            for count in range(1, len(chances) + 1)
        ]
        assert controller.worth_drafting(chances, batch=1) == gains.index(max(gains))
    assert controller.worth_drafting([0.9], batch=5) == 0  # nothing is known of steps of five


def bushes(depth: int, first: float, second: float) -> Proposal:
    """A chain of likely tokens, each with a brother."""
    growth = Growth()
    last = -1
    for _ in range(depth):
        trunk = growth.add(last, 0, TRUNK, first)
        growth.add(last, 1, BROTHER, second)
        last = trunk
    return growth.proposal()


@settings(max_examples=12, deadline=None)
@given(
    batch=st.sampled_from([1, 4]),
    rightness=st.floats(0.0, 1.0),
    second=st.floats(0.0, 1.0),
    row=st.floats(0.0, 1.0),
    jump=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_trees_lose_nothing_for_long_over_any_machine(
    batch: int, rightness: float, second: float, row: float, jump: float, seed: int
) -> None:
    """Virtual time in plain steps; a brother is right so often where the likelier token is wrong."""
    chance = random.Random(seed)
    controller = SpeculationController()
    want = Want("one", [], 6, True, 100, branches=2, most_in_all=12)
    total_s, tokens = 0.0, 0
    for _ in range(2000):
        lengths: tuple[int, ...] = (0,) * batch
        offered = bushes(6, controller.chance(TRUNK), controller.chance(BROTHER)).ranked(want)
        if controller.is_on(batch):
            lengths = controller.choose([offered.reaches] * batch, batch=batch, room=512)
        given_tokens = batch
        for length in filter(None, lengths):
            proposal = offered.head(length).arranged()
            chosen = [
                0 if chance.random() < rightness else 1 if chance.random() < second else 2
                for _ in range(length + 1)
            ]
            path = proposal.tree.walk(chosen)
            given_tokens += len(path)
            right = {-1, *path}
            parents = proposal.parents or range(-1, length - 1)
            for place, (mark, parent) in enumerate(zip(proposal.marks, parents, strict=True)):
                if parent in right:
                    controller.observe_token(mark, is_right=place in right)
        drafted = sum(lengths)
        seconds = (1.0 + (jump + row * drafted if drafted else 0.0)) * chance.uniform(0.95, 1.05)
        controller.observe_step(
            batch=batch, drafted=drafted, tokens=given_tokens, seconds=seconds, drafting_s=0.0
        )
        total_s += seconds
        tokens += given_tokens
    assert total_s / tokens < 1.06 / batch
