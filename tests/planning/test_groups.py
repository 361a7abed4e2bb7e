"""Layers that go through a stage a group at a time: as many passes, and as much memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from influence import costs
from influence.contraction import Contractions
from influence.objectives import training_loss
from influence.passes import run_pass
from tasks import correct, eigen, factors, filter, query, store, stream, tokenize, train
from tasks.attributed import PassReference
from tasks.fullrank import rescore_shard, solved_shard
from tasks.halves import half_shard
from tasks.layergroups import (
    factor_bytes,
    groups_of_layers,
    half_bytes,
    solved_bytes,
    spectrum_bytes,
)
from tasks.params import RunParams
from tasks.planning.estimate import run_sizes
from tasks.planning.planned import Planned, StageCost
from tasks.planning.rates import Rates
from tasks.planning.seconds import timed
from tasks.planning.stages import stage_costs
from tasks.sequences import TokenStore
from tasks.shards import ShardRef, split
from tests.influence.test_costs import counted
from tests.planning.eager import eager_attention
from tests.planning.test_plan import ROOMY
from tests.small_run import SECTIONS, run_stage, stage_context, write_lines
from tests.test_curvature_stages import stories

STAGES = {
    "train": train, "tokenize": tokenize, "filter": filter, "factors": factors, "eigen": eigen,
    "correct": correct, "query": query,
}  # fmt: skip
LENGTH = 64
TOGETHER, APART = 1.0, 1.5e-3  # GiB for layers: all at once, or several groups
QUERIES = [
    {"name": "park", "prompt": "Lily went to the", "completion": " park to play."},
    {"name": "toy", "prompt": "Tom and Lily lost the", "completion": " toy car."},
]


def sections(memory: float) -> dict[str, Any]:
    """Sequences of one length, all of them candidates."""
    return {
        "tokenize": SECTIONS["tokenize"] | {"mode": "pack", "context": LENGTH},
        "filter": {"method": "none"},
        "validate": {"split_half": 3, "sample": 4, "seed": 0},
        "runtime": SECTIONS["runtime"] | {"layer_memory": memory},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run with all that stages score and validate read."""
    root = tmp_path_factory.mktemp("grouped")
    write_lines(root / "corpus.jsonl", stories(4))
    write_lines(root / "queries.jsonl", QUERIES)
    for name, module in STAGES.items():
        run_stage(root, name, module, **sections(TOGETHER))
    return root


@pytest.fixture(params=[TOGETHER, APART], ids=["together", "apart"])
def planned(request, root) -> Planned:
    return planned_with(root, request.param)


def planned_with(root: Path, memory: float) -> Planned:
    params = RunParams.model_validate(SECTIONS | sections(memory))
    sizes, _ = run_sizes(root, params, root / "artifacts/small")
    return Planned(params, sizes, ROOMY)


@pytest.fixture
def eager() -> Iterator[None]:
    with eager_attention():
        yield


def cost_of(planned: Planned, stage: str) -> StageCost:
    [cost] = [each for each in stage_costs(planned) if each.stage == stage]
    return cost


def context_of(root: Path, planned: Planned, stage: str):
    return stage_context(root, stage, **sections(float(planned.params.runtime.layer_memory)))


def test_groups_are_those_that_stages_make(root, planned):
    context = context_of(root, planned, "score")
    reference = PassReference.of(context)
    layers = reference.attributed().layers
    for size in (
        factor_bytes,
        spectrum_bytes,
        partial(solved_bytes, num_queries=2, itemsize=4),
        partial(half_bytes, num_queries=2, rank=4, itemsize=4),
    ):
        found = planned.grouped(size)
        wanted = groups_of_layers(context, reference, layers, size)
        assert names(found.layers) == names(wanted)
        assert (len(wanted) > 1) == (planned.params.runtime.layer_memory == APART)
        assert found.held == max(size(group) for group in wanted)


def names(groups) -> list[list[str]]:
    return [[layer.name for layer in group] for group in groups]


def test_a_pass_goes_no_further_down_than_its_group(root, planned, eager):
    reference = PassReference.of(context_of(root, planned, "score"))
    there = reference.attributed()
    tokens = TokenStore.open(reference.tokenize)
    batch = tokens.batch(range(4))
    groups = planned.grouped(factor_bytes)
    found = names(groups.layers)
    done = sum(
        counted(
            lambda group=group: run_pass(
                there.model, [e for e in there.layers if e.name in group], batch, training_loss
            )
        )
        for group in found
    )
    told = costs.pass_flop(planned.sizes.model.shape, LENGTH, *groups.passes)
    assert done == pytest.approx(batch.tokens.numel() * told, rel=0.08)


def test_scoring_at_full_rank_costs_what_it_does(root, planned, eager):
    """All queries solved, and met by sequences, a group of layers at a time."""
    context = context_of(root, planned, "score")
    pairs = [[q, row] for q in (0, 1) for row in range(4 * q, 4 * q + 4)]  # twice score.top each
    solved, met = context.work / "solved.safetensors", context.work / "met.safetensors"
    one = split(1, 1)[0]

    def work() -> None:
        solved_shard(context, one, solved)
        rescore_shard(context, ShardRef(0, 1, range(10)), met, solved.name, pairs)

    cost = cost_of(planned, "score")
    assert cost.flop == pytest.approx(counted(work), rel=0.05)
    assert cost.sequences == 10 * cost.groups
    assert cost.tokens == planned.length * cost.sequences
    grids = 4 * len(pairs) * len(planned.layers) * LENGTH
    assert cost.work == pytest.approx(solved.stat().st_size + grids, rel=0.01)


def test_halves_cost_what_they_do(root, planned, eager):
    context = context_of(root, planned, "validate")

    first, second = split(2, 2)  # alike: one is enough
    done = 2 * counted(lambda: half_shard(context, first, context.work / "half.safetensors"))
    assert second.total == cost_of(planned, "validate").shards
    layers, cost = planned.layers, cost_of(planned, "validate")
    decompositions = 2 * sum(map(costs.eigen_flop, costs.sides(layers)))
    truncated = 2 * 2 * sum(costs.truncation_flop(each, 4) for each in layers)
    added = 2 * 3 * 2 * sum(each.d_in * each.d_out for each in layers)  # squares are no products
    products = cost.flop - decompositions - truncated - added
    assert products == pytest.approx(done, rel=0.05)
    assert cost.sequences == 2 * (2 * 3 + 4) * cost.groups


def test_less_memory_for_layers_makes_more_groups_that_take_less(root):
    together, apart = (planned_with(root, memory) for memory in (TOGETHER, APART))
    for stage in ("factors", "correct", "score", "validate"):
        one, several = cost_of(together, stage), cost_of(apart, stage)
        assert one.groups == 1 < several.groups
        assert several.device < one.device
        assert several.flop > one.flop
        assert several.flop - one.flop == pytest.approx(several.again)


def test_further_groups_take_the_time_of_their_passes(root):
    rates = Rates(
        0.0, 0, 0, 0.0, 0, 0.0, 1.0,
        dict.fromkeys(("factors", "correct", "stream", "score"), 2.0), 0.0, 0.0, 1e6,
    )  # fmt: skip
    for stage in ("factors", "correct", "score", "validate"):
        took = []
        for memory in (TOGETHER, APART):
            planned = planned_with(root, memory)
            costs_of = stage_costs(planned)
            took.append(timed(planned, costs_of, rates, None)[stage] or 0.0)
        assert took[1] - took[0] == pytest.approx(cost_of(planned, stage).again / 1e6)


def test_gradients_wait_within_the_memory_for_layers(root, monkeypatch):
    """Which holds those of three sequences, and no dense matrices of four queries."""
    monkeypatch.setattr("influence.contraction.forms_gradients", lambda *_: True)
    one = 4 * costs.num_weights(planned_with(root, TOGETHER).layers)
    waited: list[int] = []
    finish = Contractions.finish

    def watched(self, name, waiting):
        waited.append(sum(len(each.gradients) for each in waiting))
        return finish(self, name, waiting)

    monkeypatch.setattr(Contractions, "finish", watched)
    found = []
    # Of two workers the one shard takes one, and its core: the threads of one worker on all cores
    # mostly wait for each other beside other tests.
    for sequences in (0.5, 3, 100):
        given = sections(sequences * one / 2**30)
        runtime = given["runtime"] | {"tokens_per_batch": LENGTH, "workers": 2, "shards": 1}
        context = stage_context(root, "stream", **given | {"runtime": runtime})
        waited.clear()
        stream.run(context)
        assert (sequences == 3) == bool(waited)
        assert all(2 <= num <= 3 for num in waited[:-1])
        [shard] = context.out.glob("*.safetensors")
        found.append(store.read_tensor(shard, "scores"))
    for scores in found[1:]:
        assert (scores - found[0]).norm() < 1e-5 * found[0].norm()
