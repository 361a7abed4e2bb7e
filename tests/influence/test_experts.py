"""Mixtures of experts: taken apart they compute the same, and every expert is a layer of its own.

The oracles work on the fused model: its logits, the expert's slice of the fused gradient, and the
experts run token by token.
"""

import itertools

import pytest
import torch
from torch import nn

from influence.capture import capture
from influence.contraction import ByToken
from influence.damping import RelativeDamping
from influence.experts import Experts, RoutedLinear, separate_experts
from influence.factors import fit_factors
from influence.layers import find_layers, share_inputs
from influence.lowrank import LowRank
from influence.objectives import log_probability, training_loss
from influence.passes import NonFiniteSequenceError, run_pass
from influence.queries import Method, prepare_queries
from influence.scores import influence
from influence.selfinfluence import stream_self
from influence.solver import Unreached
from influence.spectrum import fit_spectra
from influence.streaming import stream, stream_all
from influence.tokens import rescore, token_grids
from influence.validation.estimators import LABELS_APART, fit_curvature
from tests import oracles
from tests.influence import mixtures, models
from tests.influence.attribution import QUERIES, N, query_sequence
from tests.influence.families import double_throughout

DAMPING = RelativeDamping(0.1)
MIXTURE = pytest.mark.parametrize("kind", mixtures.KINDS)
BIASED = pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])  # without bias and with


@pytest.fixture(autouse=True)
def _in_float64():
    with double_throughout():
        yield


def experts_of(model: nn.Module):
    layers, _ = find_layers(model, ["*.experts.*"])
    return layers


# ---- the same model


@MIXTURE
def test_a_mixture_taken_apart_is_the_same_function_of_the_same_weights(kind):
    model = mixtures.fused(kind)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(models.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens).logits
        separate_experts(model)
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-13, atol=1e-13)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    after = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert set(after) == set(before.values())  # views: no weight is copied


def test_an_expert_sees_the_tokens_routed_to_it_and_no_other():
    model = mixtures.apart(mixtures.fused("qwen3_moe"))
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            module.register_forward_hook(
                lambda _, args, out, name=name: rows.update({name: len(args[0])})
            )
    model(torch.arange(2 * 9).reshape(2, 9) % models.VOCABULARY)
    assert sum(n for name, n in rows.items() if name.endswith("down_proj")) == 18 * mixtures.TOP
    assert sum(rows.values()) == 2 * 18 * mixtures.TOP  # not num_experts times as many


def test_experts_of_an_unknown_form_stay_and_are_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(2, 3, 4))

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Strange(), "up": nn.Linear(2, 2)})})
    _, coverage = find_layers(separate_experts(model), ["mlp"])
    [left] = coverage.left_out
    assert (left.name, left.num_parameters) == ("mlp.experts", 24)
    assert "Strange is not a linear layer" in left.reason


# ---- layers and coverage


@MIXTURE
def test_the_role_mlp_covers_every_parameter_of_every_expert_and_no_router(kind):
    fused = mixtures.fused(kind)
    model = mixtures.apart(fused)
    layers, coverage = find_layers(model, ["mlp"])
    names = {layer.name for layer in layers}
    assert set(mixtures.slices(fused)) <= names
    inside = {
        name: parameter.numel()
        for name, parameter in fused.named_parameters()
        if ".mlp." in name and ".router" not in name
        if not name.endswith((".gate.weight", "_gate.weight"))
    }
    assert coverage.num_attributed == sum(inside.values())
    routers = [left for left in coverage.left_out if ".mlp." in left.name]
    assert routers
    assert all("gate" in left.name or "router" in left.name for left in routers)


def test_routers_are_attributed_under_all_where_they_are_linear_layers():
    model = mixtures.apart(mixtures.fused("qwen2_moe"))
    layers, coverage = find_layers(model, ["all"])
    names = {layer.name for layer in layers}
    assert "model.layers.0.mlp.shared_expert_gate" in names
    [router] = [left for left in coverage.left_out if left.name.endswith("mlp.gate")]
    assert "Router is not a linear layer" in router.reason
    named, _ = find_layers(model, ["*.shared_expert_gate"])
    assert [layer.d_out for layer in named] == [1]


def test_a_router_that_descends_from_a_linear_layer_is_not_taken_for_one():
    model = mixtures.apart(mixtures.fused("phimoe"))
    _, coverage = find_layers(model, ["all"])
    [router] = [left for left in coverage.left_out if left.name.endswith("router")]
    assert isinstance(model.get_submodule(router.name), nn.Linear)
    assert router.reason == "PhimoeTopKRouter is not a linear layer"


def test_experts_share_no_input_and_the_shared_expert_does():
    model = mixtures.apart(mixtures.fused("qwen2_moe"))
    layers, _ = find_layers(model, ["mlp"])
    groups = {each.name: each.input_group for each in share_inputs(model, layers, ids())}
    block = "model.layers.0.mlp"
    assert all(groups[name] == name for name in groups if ".experts." in name)
    assert groups[f"{block}.shared_expert.up_proj"] == f"{block}.shared_expert.gate_proj"


def ids() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 5]])


# ---- gradients and curvature


@MIXTURE
def test_gradients_are_autograds_of_each_sequence_and_each_experts_slice(kind):
    fused, sequences = mixtures.fused(kind), models.corpus()
    model = mixtures.apart(fused)
    layers, _ = find_layers(model, ["mlp"])
    ios = run_pass(model, layers, models.batch(sequences), log_probability)
    modules = dict(fused.named_modules())
    for n, z in enumerate(sequences):
        log_p = oracles.log_probability(fused, z)
        for layer in layers:
            if layer.is_routed:
                wanted = mixtures.block_gradient(log_p, fused, layer.name)
            else:  # the shared expert, whose tokens the block puts one below the other
                wanted = oracles.weight_gradient(log_p, modules[layer.name])
            got = ios[layer.name].gradient()[n] if layer.name in ios else torch.zeros_like(wanted)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@BIASED
def test_factors_are_means_over_the_tokens_with_a_loss_that_reach_the_expert(kind):
    fused, sequences = mixtures.fused(kind), models.corpus()
    model = mixtures.apart(fused)
    layers = experts_of(model)
    labels = models.drawn_labels(model, sequences, 3)
    factors = fit_factors(model, layers, [models.batch(sequences)], 3)
    reached = 0
    for layer in layers:
        A, S, count = 0, 0, 0
        for z, drawn in zip(sequences, labels, strict=True):
            io = mixtures.expert_io(fused, layer.name, z, drawn)
            for t in oracles.targets(z):
                if t - 1 in io:
                    a, ds = io[t - 1]
                    A, S, count = A + torch.outer(a, a), S + torch.outer(ds, ds), count + 1
        if not count:
            assert layer.name not in factors.outputs
            continue
        got = factors.of(layer)
        reached += 1
        assert (got.A.num_tokens, got.S.num_tokens) == (count, count)
        torch.testing.assert_close(got.A.value, A / count, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.S.value, S / count, rtol=1e-10, atol=1e-12)
    assert reached >= 4


@BIASED
def test_scores_are_the_dense_damped_solve_of_each_experts_block(kind):
    fused, sequences = mixtures.fused(kind), models.corpus()
    model = mixtures.apart(fused)
    layers = experts_of(model)
    batches = [models.batch(sequences[:2]), models.batch(sequences[2:], [102, 103])]
    fitted = fit_curvature(model, layers, batches, 0)
    labels = models.drawn_labels(model, sequences, LABELS_APART)
    prepared = prepared_queries(model, layers, fitted)
    raw = torch.cat([raw for _, raw in stream(model, layers, prepared, batches)], dim=1)
    scores = influence(raw, N)
    own = [gradients(fused, layers, z) for z in sequences]
    drawn = [gradients(fused, layers, *each) for each in zip(sequences, labels, strict=True)]
    asked = [gradients(fused, layers, query_sequence(query)) for query in QUERIES]
    for at, layer in enumerate(layers):
        block = fitted.ekfac.get(layer.name)
        if block is None:
            assert not scores[..., at].any()
            continue
        Q = block.basis.Q_A, block.basis.Q_S
        values = oracles.spectrum([pass_[layer.name] for pass_ in drawn], *Q)
        torch.testing.assert_close(block.eigenvalues, values, rtol=1e-9, atol=1e-12)
        G, damping = [oracles.ekfac(*Q, values)], [0.1 * values.mean().item()]
        for (q, f), (n, log_p) in itertools.product(enumerate(asked), enumerate(own)):
            wanted = oracles.influence([f[layer.name]], [-log_p[layer.name]], G, damping, N)
            assert scores[q, n, at].item() == pytest.approx(wanted, rel=1e-8, abs=1e-10)


def gradients(model, layers, sequence, labels=None):
    log_p = oracles.log_probability(model, sequence, labels)
    return {layer.name: mixtures.block_gradient(log_p, model, layer.name) for layer in layers}


def prepared_queries(model, layers, fitted, rank=None):
    methods = {"ekfac": Method(fitted.solvers, DAMPING)}
    return prepare_queries(model, layers, QUERIES, methods, rank, 1000)["ekfac"]


# ---- token scores


@BIASED
@pytest.mark.parametrize("rank", [1, None])
def test_token_scores_sum_to_the_score_and_stand_at_their_positions(kind, rank, monkeypatch):
    fused, sequences = mixtures.fused(kind), models.corpus()
    model, batch = mixtures.apart(fused), models.batch(sequences)
    layers, _ = find_layers(model, ["mlp"])
    prepared = prepared_queries(model, layers, fit_curvature(model, layers, [batch], 0), rank)
    grids = token_grids(model, layers, prepared, batch, N)
    assert grids.shape == (2, 4, len(layers), 6)
    [(_, raw)] = stream(model, layers, prepared, [batch])
    torch.testing.assert_close(grids.sum(dim=-1), influence(raw, N), rtol=1e-9, atol=1e-12)
    dense = {name: query.dense() for name, query in prepared.items()}
    for (n, z), (at, layer) in itertools.product(enumerate(sequences), enumerate(layers)):
        if layer.is_routed:
            io = mixtures.expert_io(fused, layer.name, z)
            for t, q in itertools.product(range(len(z[0])), range(2)):
                a, ds = io.get(t, (None, None))
                V = dense[layer.name][q]
                wanted = 0.0 if a is None else (ds @ V @ a).item() / N  # f = −L: the signs cancel
                assert grids[q, n, at, t].item() == pytest.approx(wanted, rel=1e-8, abs=1e-10)
    pairs = list(itertools.product(range(2), range(4)))
    again = rescore(model, layers, dense, batch, pairs, N).grids
    for forms in (False, True):  # either way to meet the queries
        monkeypatch.setattr("influence.contraction.forms_gradients", lambda *_, f=forms: f)
        [told] = stream_all(model, layers, prepared, [batch], top=4)
        for q, n in pairs:
            grid = influence(told.grids[q, 100 + n], N)
            torch.testing.assert_close(grid, grids[q, n], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(again[q, n], grids[q, n], rtol=1e-9, atol=1e-12)


@BIASED
def test_columns_that_a_sequence_does_not_fill_are_zero_and_have_no_position(kind):
    model, sequences = mixtures.apart(mixtures.fused(kind)), models.corpus()
    layers = experts_of(model)
    ios = run_pass(model, layers, models.batch(sequences), training_loss)
    unfilled = 0
    for io in ios.values():
        assert io.positions is not None
        assert ((io.positions >= 0).sum(dim=1).max()) == io.a.shape[1]  # no wider than needed
        unfilled += int((io.positions < 0).sum())
        assert not io.a[io.positions < 0].any()
        assert not io.ds[io.positions < 0].any()
        alone = [io.select(n) for n in range(len(sequences))]
        together = torch.cat([each.gradient() for each in alone])
        torch.testing.assert_close(together, io.gradient())
        cells = ByToken.of(ones(io), io.has_bias).tokens(io)
        assert not cells.masked_fill(io.positions >= 0, 0).any()
    assert unfilled > 0


def ones(io):
    d_in = io.a.shape[2] + io.has_bias
    return LowRank.of(torch.ones(1, io.ds.shape[2], d_in, dtype=torch.float64), None)


# ---- experts that the fit did not reach


def test_an_expert_that_no_token_of_the_fit_reached_adds_nothing_and_all_stays_finite():
    model, sequences = mixtures.apart(mixtures.fused("mixtral")), models.corpus()
    layers = experts_of(model)
    one_loss = (sequences[3][0][:2], torch.tensor([False, True]))
    fitted = fit_curvature(model, layers, [models.batch([one_loss])], 0)
    solvers = fitted.solvers
    idle = {name for name, solver in solvers.items() if isinstance(solver, Unreached)}
    assert len(idle) == 2 * (mixtures.NUM_EXPERTS - mixtures.TOP)  # one token reaches two experts
    batch = models.batch(sequences)
    raw_gradients = run_pass(model, layers, batch, training_loss)
    assert idle & raw_gradients.keys()  # candidates do reach them
    prepared = prepared_queries(model, layers, fitted)
    [(_, raw)] = stream(model, layers, prepared, [batch])
    [(_, own)] = stream_self(model, layers, solvers, DAMPING, [batch])
    assert raw.isfinite().all()
    for at, layer in enumerate(layers):
        assert raw[..., at].any() == (layer.name not in idle)
        assert own[..., at].any() == (layer.name not in idle)


def test_a_layer_of_no_expert_still_needs_its_eigenbasis():
    model = models.llama()
    with pytest.raises(ValueError, match=r"has no eigenbasis"):
        fit_spectra(model, models.attributed(model), {}, [models.batch(models.corpus())], 0)


# ---- errors


@pytest.mark.parametrize("row", range(4))
def test_a_number_that_is_not_finite_is_laid_to_the_sequence_whose_token_the_expert_saw(row):
    model, sequences = mixtures.apart(mixtures.fused("mixtral")), models.corpus()
    [block] = [module for module in model.modules() if isinstance(module, Experts)]
    batch = models.batch(sequences)
    position = int(batch.loss_positions[row].nonzero()[0])
    place = row * batch.tokens.shape[1] + position  # among all tokens

    def spoil(module, args):
        hidden, chosen, weights = args
        return hidden.index_fill(0, torch.tensor([place]), torch.nan), chosen, weights

    block.register_forward_pre_hook(spoil)
    with pytest.raises(NonFiniteSequenceError) as raised:
        run_pass(model, experts_of(model), batch, training_loss)
    assert raised.value.sequence_id == 100 + row
    assert ".experts." in raised.value.layer


def test_a_layer_that_returns_more_than_a_tensor_is_an_error_by_its_name():
    class Choosing(nn.Linear):
        def forward(self, input):
            return super().forward(input).topk(1)

    layers, _ = find_layers(nn.Sequential(Choosing(2, 2)), ["all"])
    with (
        capture(model := nn.Sequential(layers[0].module), layers),
        pytest.raises(ValueError, match=r"layer '0' returns topk"),
    ):
        model(torch.ones(1, 2))
