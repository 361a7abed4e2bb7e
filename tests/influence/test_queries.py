"""Queries: the gradient of log p(completion | prompt), preconditioned by the dense inverse."""

import pytest
import torch

from influence.damping import AbsoluteDamping, RelativeDamping
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from influence.lowrank import LowRank
from influence.objectives import forward, log_probability
from influence.queries import Method, Query, measured, prepare_queries, query_batch
from influence.solver import GradientDot
from influence.validation.estimators import fit_curvature
from tests import oracles
from tests.influence import models
from tests.influence.preparing import prepare, query_gradients

QUERIES = [
    Query("long prompt", (1, 2, 3, 4), (5, 0)),
    Query("long completion", (3,), (2, 2, 1)),
    Query("short", (0,), (4,)),
]


def sequence(query: Query) -> models.Tokens:
    tokens = torch.tensor([*query.prompt, *query.completion])
    return tokens, torch.arange(len(tokens)) >= len(query.prompt)


def test_a_query_without_a_prompt_or_a_completion_is_refused_by_name():
    with pytest.raises(ValueError, match="mine"):
        Query("mine", (1,), ())
    with pytest.raises(ValueError, match="mine"):
        Query("mine", (), (1,))


def test_the_completion_is_supervised_and_the_prompt_is_not():
    batch = query_batch(QUERIES)
    assert batch.ids.tolist() == [0, 1, 2]
    for row, query in enumerate(QUERIES):
        tokens, supervised = sequence(query)
        assert torch.equal(batch.tokens[row, : len(tokens)], tokens)
        assert torch.equal(batch.supervised[row, : len(tokens)], supervised)
        assert not batch.supervised[row, len(tokens) :].any()


@pytest.mark.parametrize("tokens_per_batch", [1, 8, 1000])
@pytest.mark.parametrize("case", models.CASES)
def test_query_gradients_are_autograds_of_log_p_of_the_completion(case, tokens_per_batch):
    """Through all positions, those of the prompt as well; in the order of the list."""
    model = models.CASES[case]()
    layers = models.attributed(model)
    gradients = query_gradients(model, layers, QUERIES, tokens_per_batch)
    assert set(gradients) == {layer.name for layer in layers}
    for layer in layers:
        for row, query in enumerate(QUERIES):
            wanted = oracles.sequence_gradient(model, layer.module, sequence(query))
            torch.testing.assert_close(gradients[layer.name][row], wanted, rtol=1e-9, atol=1e-12)


def test_a_layer_that_a_query_does_not_run_has_gradient_zero():
    model = models.mlp()
    model.unused = torch.nn.Linear(2, 3).double()
    gradients = query_gradients(model, models.attributed(model), QUERIES, 100)
    assert gradients["unused"].shape == (3, 3, 3)
    assert not gradients["unused"].any()


def two_blocks() -> tuple[dict[str, torch.Tensor], dict[str, EKFACBlock]]:
    """Gradients and blocks of two layers; curvatures of very different size."""
    gradients, blocks = {}, {}
    for number, (name, o, i) in enumerate((("small", 3, 4), ("large", 5, 2))):
        gradients[name] = torch.randn(2, o, i, dtype=torch.float64)
        basis = EigenBasis(models.orthogonal(number, i), models.orthogonal(number + 5, o))
        blocks[name] = EKFACBlock(basis, torch.rand(o, i, dtype=torch.float64) * 100**number)
    return gradients, blocks


def dense_answers(gradients, blocks, ratio: float) -> dict[str, torch.Tensor]:
    answers = {}
    for name, block in blocks.items():
        G = oracles.ekfac(block.basis.Q_A, block.basis.Q_S, block.eigenvalues)
        damping = ratio * block.eigenvalues.mean().item()
        rows = [oracles.damped_solve(G, V, damping) for V in gradients[name]]
        answers[name] = torch.stack(rows)
    return answers


def test_preparing_at_full_rank_is_the_dense_solve_with_each_layers_own_damping():
    """LogIX takes the λ of the first layer for all."""
    gradients, blocks = two_blocks()
    prepared = prepare(gradients, blocks, RelativeDamping(0.1), None)
    for name, wanted in dense_answers(gradients, blocks, 0.1).items():
        assert models.relative_error(prepared[name].dense(), wanted) < 1e-9


def test_preparing_at_low_rank_truncates_what_is_preconditioned_and_not_before():
    gradients, blocks = two_blocks()
    prepared = prepare(gradients, blocks, RelativeDamping(0.1), 2)
    for name, dense in dense_answers(gradients, blocks, 0.1).items():
        assert prepared[name].rank == 2
        U, s, Vt = torch.linalg.svd(dense, full_matrices=False)
        wanted = (U[..., :2] * s[:, None, :2]) @ Vt[:, :2]
        assert models.relative_error(prepared[name].dense(), wanted) < 1e-9


def test_a_huge_damping_prepares_the_gradient_over_the_damping():
    gradients, blocks = two_blocks()
    prepared = prepare(gradients, blocks, AbsoluteDamping(1e12), None)
    for name, V in gradients.items():
        torch.testing.assert_close(1e12 * prepared[name].dense(), V, rtol=1e-8, atol=1e-8)


def test_scaling_the_measurement_scales_what_is_prepared():
    gradients, blocks = two_blocks()
    one = prepare(gradients, blocks, RelativeDamping(0.1), 1)
    scaled = {name: -3 * V for name, V in gradients.items()}
    other = prepare(scaled, blocks, RelativeDamping(0.1), 1)
    for name in gradients:
        torch.testing.assert_close(other[name].dense(), -3 * one[name].dense())


def test_the_gradient_dot_product_prepares_the_gradient_itself():
    gradients, _ = two_blocks()
    solvers = dict.fromkeys(gradients, GradientDot())
    prepared = prepare(gradients, solvers, RelativeDamping(0.1), 1)
    for name, V in gradients.items():
        torch.testing.assert_close(prepared[name].dense(), LowRank.of(V, 1).dense())


def random_ekfac(layers: tuple[Layer, ...]) -> dict[str, EKFACBlock]:
    """Of random eigenbases and eigenvalues."""
    blocks = {}
    for number, layer in enumerate(layers):
        basis = EigenBasis(
            models.orthogonal(number, layer.d_in), models.orthogonal(number + 50, layer.d_out)
        )
        blocks[layer.name] = EKFACBlock(basis, torch.rand(layer.d_out, layer.d_in).double())
    return blocks


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("tokens_per_batch", [1, 8, 1000])
@pytest.mark.parametrize("case", models.CASES)
def test_preparing_from_queries_is_preparing_their_gradients(case, tokens_per_batch, rank):
    """Tokens are rotated instead of gradients, batch by batch and for all methods at once."""
    model = models.CASES[case]()
    model.unused = torch.nn.Linear(2, 3).double()
    layers = models.attributed(model)
    blocks = random_ekfac(layers)
    some, other = RelativeDamping(0.1), AbsoluteDamping(0.3)
    methods = {
        "ekfac": Method(blocks, some),
        "dot": Method({layer.name: GradientDot() for layer in layers}, some),
        "damped": Method(blocks, other),
    }
    gradients = query_gradients(model, layers, QUERIES, 1000)
    got = prepare_queries(model, layers, QUERIES, methods, rank, tokens_per_batch)
    assert list(got) == ["ekfac", "dot", "damped"]
    for method, given in methods.items():
        wanted = prepare(gradients, given.solvers, given.damping, rank)
        assert set(got[method]) == set(wanted)
        for name, query in wanted.items():
            assert got[method][name].rank == query.rank
            torch.testing.assert_close(got[method][name].dense(), query.dense())


CONTRASTED = [
    Query("both", (1, 2, 3), (5, 0), (4, 4, 4)),
    Query("plain", (3,), (2, 2, 1)),
    Query("other", (0, 1), (4,), (2,)),
]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("tokens_per_batch", [1, 11, 1000])
@pytest.mark.parametrize("case", models.CASES)
def test_a_contrast_is_taken_away(case, tokens_per_batch, rank):
    """f is a difference, and so are its gradient and the influence on it."""
    model = models.CASES[case]()
    layers = models.attributed(model)
    methods = {
        "dot": Method({layer.name: GradientDot() for layer in layers}, RelativeDamping(0.1)),
        "ekfac": Method(random_ekfac(layers), RelativeDamping(0.1)),
    }
    got = prepare_queries(model, layers, CONTRASTED, methods, rank, tokens_per_batch)
    for layer in layers:
        wanted = []
        for query in CONTRASTED:
            gradient = oracles.sequence_gradient(model, layer.module, sequence(query))
            if query.contrast:
                other = sequence(Query(query.name, query.prompt, query.contrast))
                gradient = gradient - oracles.sequence_gradient(model, layer.module, other)
            wanted.append(gradient)
        for method, given in methods.items():
            solved = given.solvers[layer.name].solve(torch.stack(wanted), given.damping)
            torch.testing.assert_close(
                got[method][layer.name].dense(),
                LowRank.of(solved, rank).dense(),
                rtol=1e-7,
                atol=1e-9,
            )


def test_what_a_batch_measures_adds_up_to_f_of_each_query():
    model = models.mlp()
    batch = query_batch(CONTRASTED)
    assert batch.ids.tolist() == [0, 1, 2, 0, 2]
    parts = measured(forward(model, batch), batch, len(CONTRASTED))
    f = torch.zeros(3, dtype=parts.dtype).index_add(0, batch.ids, parts)
    for query, found in zip(CONTRASTED, f, strict=True):
        alone = query_batch([Query(query.name, query.prompt, query.completion)])
        wanted = log_probability(forward(model, alone), alone)[0]
        if query.contrast:
            other = query_batch([Query(query.name, query.prompt, query.contrast)])
            wanted = wanted - log_probability(forward(model, other), other)[0]
        torch.testing.assert_close(found, wanted)


def test_a_grid_of_dampings_rotates_each_gradient_once(monkeypatch):
    model = models.gpt2()
    layers = models.attributed(model)
    fitted = fit_curvature(model, layers, [models.batch(models.corpus())], 0)
    rotated = []

    def counted(basis, io, rotate=EigenBasis.rotate_gradient):
        rotated.append(basis)
        return rotate(basis, io)

    monkeypatch.setattr(EigenBasis, "rotate_gradient", counted)
    queries = [Query("q", (1, 2, 3), (4, 5))]
    ratios = (0.01, 0.1, 1.0)

    methods = {f"{ratio}": Method(fitted.solvers, RelativeDamping(ratio)) for ratio in ratios}
    together = prepare_queries(model, layers, queries, methods, 2, 100)
    assert len(rotated) == len(layers)
    for ratio in ratios:
        alone = {"one": Method(fitted.solvers, RelativeDamping(ratio))}
        [wanted] = prepare_queries(model, layers, queries, alone, 2, 100).values()
        for name, query in wanted.items():
            assert torch.equal(together[f"{ratio}"][name].dense(), query.dense())
