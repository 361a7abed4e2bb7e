"""What must hold of the whole: exact cases, inequalities, and the meaning of a score."""

import itertools

import pytest
import torch

from influence.capture import LayerIO, capture
from influence.damping import AbsoluteDamping, RelativeDamping
from influence.eigenbasis import EigenBasis, eigendecompose
from influence.ekfac import EKFACBlock, kfac_eigenvalues
from influence.factors import Covariance
from influence.layers import find_layers, share_inputs
from influence.lowrank import LowRank
from influence.queries import Query
from influence.scores import influence
from influence.solver import GradientDot
from influence.streaming import stream
from tests import oracles
from tests.influence import models
from tests.influence.attribution import QUERIES, N, fit, query_sequence, score
from tests.influence.preparing import prepare, query_gradients


def dense_curvature(model, layers, sequences) -> list[tuple[torch.Tensor, float]]:
    """Ĝ and 0.1 · mean Λ of every layer, from the oracles alone, for the labels of `fit`."""
    factor_labels = models.drawn_labels(model, sequences, 0)
    spectrum_labels = models.drawn_labels(model, sequences, 1)
    found = []
    for layer in layers:
        A, S = oracles.kronecker_factors(model, layer.module, sequences, factor_labels)
        Q_A, Q_S = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(S).eigenvectors
        pseudo = [
            oracles.sequence_gradient(model, layer.module, z, labels)
            for z, labels in zip(sequences, spectrum_labels, strict=True)
        ]
        eigenvalues = oracles.spectrum(pseudo, Q_A, Q_S)
        damping = 0.1 * sum(eigenvalues.flatten().tolist()) / eigenvalues.numel()
        found.append((oracles.ekfac(Q_A, Q_S, eigenvalues), damping))
    return found


@pytest.mark.parametrize("case", models.CASES)
def test_influence_is_minus_gradient_times_dense_damped_inverse_times_gradient_over_n(case):
    """From tokens to scores, every step against dense matrices.

    Enough sequences that S has no null space: there the eigenvectors are arbitrary, and gradients
    at prompt positions, which S does not count, would make Λ arbitrary too.
    """
    model, sequences = models.CASES[case](), models.corpus(lengths=(6, 3, 5, 4, 7, 6, 5, 7))
    layers = share_inputs(model, models.attributed(model), sequences[0][0][None])
    batch = models.batch(sequences)
    got = score(model, layers, fit(model, layers, [batch]), [batch], RelativeDamping(0.1))
    curvature = dense_curvature(model, layers, sequences)
    for q, query in enumerate(QUERIES):
        for n, z in enumerate(sequences):
            per_layer = [
                oracles.influence(
                    [oracles.sequence_gradient(model, layer.module, query_sequence(query))],
                    [-oracles.sequence_gradient(model, layer.module, z)],
                    [G], [damping], N,
                )
                for layer, (G, damping) in zip(layers, curvature, strict=True)
            ]  # fmt: skip
            wanted = torch.tensor(per_layer, dtype=torch.float64)
            assert models.relative_error(got[q, n], wanted) < 1e-9


@pytest.mark.parametrize("case", models.CASES)
def test_a_step_along_minus_the_preconditioned_loss_gradient_raises_f_by_the_influence(case):
    """The sign, the 1/N and the meaning: θ − (1/N)(Ĝ + λ)⁻¹∇L(z), by a finite difference of f."""
    model, sequences = models.CASES[case](), models.corpus()
    layers = models.attributed(model)
    batch = models.batch(sequences)
    blocks = fit(model, layers, [batch])
    got = score(model, layers, blocks, [batch], RelativeDamping(0.1)).sum(-1)
    for n, z in enumerate(sequences):
        steps = []
        for layer in layers:
            block = blocks[layer.name]
            G = oracles.ekfac(block.basis.Q_A, block.basis.Q_S, block.eigenvalues)
            gradient = -oracles.sequence_gradient(model, layer.module, z)
            damping = 0.1 * block.eigenvalues.mean().item()
            steps.append((layer.module, -oracles.damped_solve(G, gradient, damping) / N))
        for q, query in enumerate(QUERIES):
            effect = oracles.effect_of_a_step(model, query_sequence(query), steps, 1e-6)
            assert got[q, n].item() == pytest.approx(effect, rel=1e-6, abs=1e-8)


def test_one_more_copy_of_a_sequence_raises_f_by_its_influence_when_the_damping_is_huge():
    """The proximal response itself, solved: Δf = influence up to F/λ, about 1e-4 here."""
    model, sequences = models.mlp(), models.corpus()
    layers = models.attributed(model)
    batch = models.batch(sequences)
    got = score(model, layers, fit(model, layers, [batch]), [batch], AbsoluteDamping(1e5)).sum(-1)
    modules = [layer.module for layer in layers]
    before = [oracles.log_probability(model, query_sequence(q)).item() for q in QUERIES]
    for n, z in enumerate(sequences):
        response = oracles.proximal_response(model, modules, sequences, z, 1e5, N)
        steps = list(zip(modules, response, strict=True))
        oracles.move(steps, 1.0)
        after = [oracles.log_probability(model, query_sequence(q)).item() for q in QUERIES]
        oracles.move(steps, -1.0)
        for q in range(len(QUERIES)):
            assert got[q, n].item() == pytest.approx(after[q] - before[q], rel=1e-2, abs=1e-10)
    assert got.max() > 1e-7  # in both directions, so that a sign cannot hide
    assert got.min() < -1e-7


def test_a_huge_damping_gives_the_gradient_dot_product_over_the_damping():
    model, batch = models.gpt2(), models.batch(models.corpus())
    layers = models.attributed(model)
    damped = score(model, layers, fit(model, layers, [batch]), [batch], AbsoluteDamping(1e11))
    identity = {layer.name: GradientDot() for layer in layers}
    plain = score(model, layers, identity, [batch], AbsoluteDamping(1e11))
    assert models.relative_error(1e11 * damped, plain) < 1e-8


def test_kfac_is_exact_for_a_deep_linear_network_with_squared_loss():
    """ds does not depend on a. The labels ŷ ~ N(y, 1) are enumerated: ∇ = Σ_k ε_k ∇y_k."""
    model = models.deep_linear()
    layers, _ = find_layers(model, ["all"])
    x = torch.randn(7, 1, 3, dtype=torch.float64)
    passes: list[dict[str, LayerIO]] = []
    for k in range(2):
        with capture(model, layers) as opened:
            passes.append(opened.backward(model(x)[..., k].sum()))
    for layer in layers:
        G = 0
        for n, k in itertools.product(range(7), range(2)):
            g = oracles.vec(oracles.weight_gradient(model(x)[n, 0, k], layer.module))
            G = G + torch.outer(g, g) / 7
        a = torch.cat([passes[0][layer.name].a[:, 0], torch.ones(7, 1).double()], dim=1)
        ds = [io[layer.name].ds[:, 0] for io in passes]
        A = Covariance(a.T @ a, 7).value
        S = Covariance(ds[0].T @ ds[0] + ds[1].T @ ds[1], 7).value
        torch.testing.assert_close(torch.kron(A, S), G, rtol=1e-10, atol=1e-12)

        eigen_A, eigen_S = eigendecompose(A, layer.name), eigendecompose(S, layer.name)
        basis = EigenBasis(eigen_A.vectors, eigen_S.vectors)
        block = EKFACBlock(basis, kfac_eigenvalues(eigen_A, eigen_S, 1.0))
        V = torch.randn(layer.d_out, layer.d_in, dtype=torch.float64)
        wanted = oracles.damped_solve(G, V, RelativeDamping(0.1).of(block.eigenvalues))
        assert models.relative_error(block.solve(V, RelativeDamping(0.1)), wanted) < 1e-9
        corrected = oracles.expected_spectrum(G, basis.Q_A, basis.Q_S)
        torch.testing.assert_close(block.eigenvalues, corrected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", models.CASES)
def test_the_corrected_curvature_is_nearer_to_the_fisher_than_the_uncorrected(case):
    """George et al. 2018: for a fixed basis the corrected eigenvalues are the nearest diagonal."""
    model, sequences = models.CASES[case](), models.corpus(lengths=(5, 3, 4))
    tokens_per_sequence = sum(len(oracles.targets(z)) for z in sequences) / len(sequences)
    for layer in models.attributed(model):
        F = oracles.fisher(model, layer.module, sequences)
        A, S = oracles.expected_kronecker_factors(model, layer.module, sequences)
        eigen_A, eigen_S = eigendecompose(A, layer.name), eigendecompose(S, layer.name)
        basis = EigenBasis(eigen_A.vectors, eigen_S.vectors)
        corrected = oracles.expected_spectrum(F, basis.Q_A, basis.Q_S)
        uncorrected = kfac_eigenvalues(eigen_A, eigen_S, tokens_per_sequence)

        def distance(eigenvalues: torch.Tensor, basis=basis, F=F) -> float:
            return (oracles.ekfac(basis.Q_A, basis.Q_S, eigenvalues) - F).norm().item()

        kfac = tokens_per_sequence * torch.kron(A, S)
        assert distance(uncorrected) == pytest.approx((kfac - F).norm().item(), rel=1e-9)
        assert distance(corrected) < distance(uncorrected)
        assert distance(corrected) < F.norm().item()
        for factor in (0.9, 1.1):
            assert distance(factor * corrected) > distance(corrected)


def test_one_supervised_token_a_sequence_makes_the_correction_per_token_too():
    """With one loss on the first position, sums over tokens have one term: Λ = diag(QᵀFQ) is the
    spectrum of per-token gradients, and A, S are per sequence as much as per token."""
    model = models.mlp()
    sequences = [(torch.tensor([a, b]), torch.tensor([False, True])) for a, b in ((1, 2), (3, 0))]
    layers = models.attributed(model)
    blocks = fit(model, layers, [models.batch(sequences)])
    labels = models.drawn_labels(model, sequences, 1)
    for layer in layers:
        block, terms = blocks[layer.name], []
        for z, drawn in zip(sequences, labels, strict=True):
            a, ds = oracles.layer_io(model, layer.module, z, drawn)
            terms.append(torch.outer(ds[0], a[0]))
        wanted = oracles.spectrum(terms, block.basis.Q_A, block.basis.Q_S)
        torch.testing.assert_close(block.eigenvalues, wanted, rtol=1e-9, atol=1e-12)


def test_full_rank_truncation_leaves_the_scores_and_rank_one_does_not():
    model, batch = models.llama(), models.batch(models.corpus())
    layers = models.attributed(model)
    blocks = fit(model, layers, [batch])
    full, same, low = (
        score(model, layers, blocks, [batch], RelativeDamping(0.1), rank) for rank in (None, 8, 1)
    )
    assert models.relative_error(same, full) < 1e-12
    assert models.relative_error(low, full) > 1e-3


@pytest.mark.parametrize("rank", [None, 1])
def test_scaling_the_measurement_scales_the_scores(rank):
    model, batch = models.gpt2(), models.batch(models.corpus())
    layers = models.attributed(model)
    blocks = fit(model, layers, [batch])
    gradients = query_gradients(model, layers, QUERIES, 1000)
    raw = []
    for scale in (1.0, -2.5):
        scaled = {name: scale * V for name, V in gradients.items()}
        prepared = prepare(scaled, blocks, RelativeDamping(0.1), rank)
        raw.append(next(iter(stream(model, layers, prepared, [batch])))[1])
    assert models.relative_error(raw[1], -2.5 * raw[0]) < 1e-9


def test_with_relative_damping_a_sequence_repeated_in_the_corpus_halves_only_by_n():
    """Twice every sequence: the same Λ, so the same raw scores; N is what doubles."""
    model, sequences = models.mlp(), models.corpus()
    layers = models.attributed(model)
    ids = [0, 1, 2, 3]
    once, twice = models.batch(sequences, ids), models.batch(sequences * 2, ids * 2)
    one, two = (
        score(model, layers, fit(model, layers, [fitted]), [once], RelativeDamping(0.1))
        for fitted in (once, twice)
    )
    assert models.relative_error(two, one) < 1e-9


def test_self_influence_is_positive():
    """More of a sequence makes it more probable: ∇Lᵀ(Ĝ + λ)⁻¹∇L ≥ 0 in every layer.

    It is 0 where nothing can be learnt: attention over a single position has no gradient.
    """
    model, sequences = models.llama(), models.corpus()
    layers = models.attributed(model)
    batch = models.batch(sequences)
    queries = [
        Query(f"z{n}", tuple(tokens[:first].tolist()), tuple(tokens[first:].tolist()))
        for n, (tokens, supervised) in enumerate(sequences)
        for first in [int(supervised.int().argmax())]
    ]
    prepared = prepare(
        query_gradients(model, layers, queries, 1000),
        fit(model, layers, [batch]),
        RelativeDamping(0.1),
        None,
    )
    ((_, raw),) = stream(model, layers, prepared, [batch])
    own = torch.stack([influence(raw, N)[n, n] for n in range(len(sequences))])
    assert own.min() > -1e-15
    assert own.sum(1).min() > 1e-3


def test_low_rank_scores_are_the_scores_of_the_low_rank_matrices():
    model, batch = models.gpt2(), models.batch(models.corpus())
    layers = models.attributed(model)
    prepared = prepare(
        query_gradients(model, layers, QUERIES, 1000),
        fit(model, layers, [batch]),
        RelativeDamping(0.1),
        2,
    )
    dense = {name: LowRank.of(low.dense(), None) for name, low in prepared.items()}
    raw = [next(iter(stream(model, layers, p, [batch])))[1] for p in (prepared, dense)]
    assert models.relative_error(raw[0], raw[1]) < 1e-10
