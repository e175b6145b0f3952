"""Speculation as a fleet's file asks for it: plans, draft models that fit, news of several tokens a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.unit.engine_support import (
    greedy,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from tests.unit.speculation_support import speculating
from trireme.engine import Engine, EngineSettings, KvTier, build
from trireme.engine.speculation.draft_checkpoint import load_draft
from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.policies.speculation import SpeculationSettings
from trireme.runtime.fleet import load_fleet
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters
from trireme.worker import engine_loading
from trireme.worker.served_engine import ResidencyLog, ServedEngine
from trireme.worker.step_news import StepNews, pack, unpack
from trireme.worker.variant_plan import plans_of

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
FLEET = """
models:
  code:
    variants:
      fast:
        checkpoint: {checkpoints}/trireme-py-6m
        {lines}
workers:
  - variants: [fast]
    kv_mib: 16
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def written(path: Path, lines: str) -> Path:
    fleet = path / "fleet.yaml"
    fleet.write_text(FLEET.format(checkpoints=CHECKPOINTS, lines=lines), encoding="utf-8")
    return fleet


def test_a_variant_speculates_as_its_file_says(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "trireme-py-1m", tmp_path / "small")
    fleet = load_fleet(written(tmp_path, "speculate: auto\n        draft: small"))
    (plan,) = plans_of(fleet, fleet.workers[0])
    assert plan.draft == tmp_path / "small"
    engine, _ = engine_loading.build(plan, ResidencyLog())
    assert engine.settings.speculation == SpeculationSettings()
    plain_plan = plans_of(load_fleet(written(tmp_path, "dtype: auto")), fleet.workers[0])[0]
    plain, _ = engine_loading.build(plain_plan, ResidencyLog())
    assert plain.settings.speculation is None
    # The draft model's KV comes out of the same memory.
    assert engine.settings.num_blocks < plain.settings.num_blocks
    engine_loading.warm_up(engine, beat=lambda: None)
    wanted = request("one", prompt_of(1, 40, vocab=4000), greedy(24))
    for each in (engine, plain):
        each.add(wanted)
    assert tokens_of(run(engine)) == tokens_of(run(plain))

    fixed = load_fleet(written(tmp_path, "speculate: 3\n        draft_branches: 2"))
    assert engine_loading.build(plans_of(fleet=fixed, group=fixed.workers[0])[0], ResidencyLog())[
        0
    ].settings.speculation == SpeculationSettings(fixed_tokens=3, branches=2)


@pytest.mark.parametrize(
    "lines",
    [
        *("draft: small", "speculate: 0", "speculate: 65", "speculate: maybe"),
        *("draft_branches: 2", "speculate: auto\n        draft_branches: 9"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, lines: str) -> None:
    with pytest.raises(InvalidConfiguration):
        load_fleet(written(tmp_path, lines))


def test_a_draft_model_with_other_tokens_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(CHECKPOINTS / "trireme-py-1m", other)
    target = CHECKPOINTS / "trireme-py-6m"
    assert load_draft(other, target, device="cpu", dtype=torch.float32).config.num_layers == 3
    path = other / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    first, second = list(document["model"]["vocab"])[100:102]
    vocabulary = document["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match="other tokens"):
        build(target, settings=EngineSettings(num_blocks=8, max_num_seqs=2), draft_dir=other)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidCheckpoint, match="malformed"):
        load_draft(other, target, device="cpu", dtype=torch.float32)
    path.unlink()
    with pytest.raises(InvalidCheckpoint, match="cannot read"):
        load_draft(other, target, device="cpu", dtype=torch.float32)


def test_a_draft_model_of_another_size_is_refused(model: Model) -> None:
    target = load_model(CHECKPOINTS / "trireme-py-1m")
    with pytest.raises(InvalidConfiguration, match="draft model must have"):
        Engine(target, settings(speculation=SpeculationSettings()), draft=model)


def test_the_worker_hears_every_token_once_and_in_order(model: Model) -> None:
    wanted = {
        f"r{n}": AdmittedRequest(
            request_id=f"r{n}",
            kind=RequestKind.REQUEST_KIND_GENERATE,
            prompt_token_ids=prompt_of(n, 12),
            sampling=SamplingParameters(max_tokens=20 + n, temperature=0.0, seed=n),
            attempt=1,
        )
        for n in range(3)
    }
    tier: KvTier = ResidencyLog()
    engine = speculating(model, draft=model, max_batch_tokens=64)
    heard = told(ServedEngine("fast", engine, tier), wanted)  # type: ignore[arg-type]
    plain = told(ServedEngine("fast", Engine(model, settings()), ResidencyLog()), wanted)
    assert heard[0] == plain[0]
    assert len(heard[1]) < 0.6 * len(plain[1])
    last = heard[1][-1].figures
    assert 0 < last.accepted_tokens <= last.drafted_tokens
    # What is billed is the time that passed.
    for news in heard[1]:
        billed_s = news.token_s * (len(news.tokens) // 3) + sum(work.seconds for work in news.work)
        assert billed_s == pytest.approx(news.seconds)


def told(
    served: ServedEngine, wanted: dict[str, AdmittedRequest]
) -> tuple[dict[int, list[int]], list[StepNews]]:
    """Tokens by handle, and all news as the worker unpacks them."""
    for handle, admitted in enumerate(wanted.values()):
        served.add(admitted, [(0, handle)])
    tokens: dict[int, list[int]] = {}
    every: list[StepNews] = []
    while served.engine.has_work:
        news = served.turn()
        assert news is not None
        news = unpack(pack(news))
        every.append(news)
        for handle, place, token_id in news.rows():
            assert place == len(tokens.setdefault(handle, []))
            tokens[handle].append(token_id)
        for output in news.outputs:
            assert output.place == len(tokens.setdefault(output.handle, []))
            assert output.token_id is not None
            tokens[output.handle].append(output.token_id)
    return tokens, every
