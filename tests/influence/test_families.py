"""Fourteen families of language models: their layers, gradients and scores, against autograd.

Every test runs for every family; what is peculiar to one stands in `families.FAMILIES`.
"""

import pytest
import torch
from torch import nn

from influence.damping import RelativeDamping
from influence.factors import fit_factors
from influence.layers import find_layers, share_inputs
from influence.objectives import forward, log_probability, training_loss
from tests import oracles
from tests.influence import attribution, models
from tests.influence.families import CONTEXT, FAMILIES, WINDOW, build

DAMPING = RelativeDamping(0.1)
SEED_OF_FACTORS, SEED_OF_SPECTRA = 0, 1  # those of `attribution.fit`

every_family = pytest.mark.parametrize("name", FAMILIES)


def enough() -> list[models.Tokens]:
    """A corpus of which no layer's A or S has a null space in which its basis could turn."""
    return models.corpus(lengths=(9, 3, CONTEXT, CONTEXT), prompt=4)


def picked(name: str, *patterns: str) -> list[str]:
    return sorted(find_layers(build(name), patterns)[1].attributed)


@every_family
def test_roles_pick_the_layers_that_a_reader_of_the_code_would_name(name):
    family = FAMILIES[name]
    mlp, attention = family.names(family.mlp), family.names(family.attention)
    assert picked(name, "mlp") == sorted(mlp)
    assert picked(name, "attention") == sorted(attention)
    assert picked(name, "all") == sorted([*mlp, *attention, *family.others])


@every_family
def test_modules_left_out_are_named_with_their_reason(name):
    family, model = FAMILIES[name], build(name)
    _, coverage = find_layers(model, ["all"])
    total = sum(parameter.numel() for parameter in model.parameters())
    left_out = {item.name: item for item in coverage.left_out}
    assert coverage.num_attributed + sum(i.num_parameters for i in left_out.values()) == total
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    for norm in family.names(family.norms):
        assert left_out[norm].reason.endswith("Norm is not a linear layer")
    if family.tied:
        assert left_out["lm_head"].reason == f"tied to {embedding}"
        assert left_out[embedding].reason == "tied to lm_head"
        assert left_out["lm_head"].num_parameters == 0  # counted at the embedding
    else:
        assert left_out[embedding].reason == "Embedding is not a linear layer"
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear - set(coverage.attributed) == ({"lm_head"} if family.tied else set())


@every_family
def test_layers_of_one_input_are_recognised_and_no_others(name):
    family, model = FAMILIES[name], build(name)
    tokens = torch.tensor([[1, 2, 3]])
    groups: dict[str, set[str]] = {}
    for layer in share_inputs(model, models.attributed(model), tokens):
        groups.setdefault(layer.input_group, set()).add(layer.name)
    prefixes = [family.blocks.format(n) for n in range(family.num_layers)]
    wanted = [{prefix + end for end in shared} for prefix in prefixes for shared in family.shared]
    assert sorted(map(sorted, wanted)) == sorted(sorted(g) for g in groups.values() if len(g) > 1)


@every_family
def test_gradients_of_each_sequence_are_autograds(name):
    """Ragged sequences, the longest of them longer than any window, and prompts."""
    model, sequences = build(name), models.corpus(lengths=(9, 3, CONTEXT, 2), prompt=4)
    assert max(len(tokens) for tokens, _ in sequences) > WINDOW
    layers = models.attributed(model)
    io = models.io_of(model, layers, models.batch(sequences), training_loss)
    for layer in layers:
        wanted = torch.stack(
            [-oracles.sequence_gradient(model, layer.module, sequence) for sequence in sequences]
        )
        assert models.relative_error(io[layer.name].gradient(), wanted) < 1e-10


@every_family
def test_inputs_and_output_gradients_are_by_sequence_and_position(name):
    model, sequences = build(name), models.corpus(lengths=(6, 3))
    layers = models.attributed(model)
    io = models.io_of(model, layers, models.batch(sequences), training_loss)
    for layer in layers:
        for n, sequence in enumerate(sequences):
            a, ds = oracles.layer_io(model, layer.module, sequence)
            got, length = io[layer.name], len(sequence[0])
            torch.testing.assert_close(
                got.a[n, :length], a[:, : got.a.shape[2]], rtol=1e-10, atol=1e-12
            )
            torch.testing.assert_close(got.ds[n, :length], -ds, rtol=1e-10, atol=1e-12)
            assert not got.ds[n, length:].any()


@every_family
def test_factors_spectra_and_scores_of_a_whole_fit_are_the_dense_ones(name):
    model, sequences = build(name), models.corpus(lengths=(5, 2, 6), prompt=3)
    batch = models.batch(sequences)
    layers = share_inputs(model, models.attributed(model), batch.tokens)
    factors = fit_factors(model, layers, [batch], SEED_OF_FACTORS)
    blocks = attribution.fit(model, layers, [batch])
    got = attribution.score(model, layers, blocks, [batch], DAMPING)

    labels = [models.drawn_labels(model, sequences, s) for s in (SEED_OF_FACTORS, SEED_OF_SPECTRA)]
    for at, layer in enumerate(layers):
        A, S = oracles.kronecker_factors(model, layer.module, sequences, labels[0])
        of, block = factors.of(layer), blocks[layer.name]
        assert models.relative_error(of.A.value, A) < 1e-10
        assert models.relative_error(of.S.value, S) < 1e-10
        Q_A, Q_S = block.basis.Q_A, block.basis.Q_S
        sampled = [
            oracles.sequence_gradient(model, layer.module, z, drawn)
            for z, drawn in zip(sequences, labels[1], strict=True)
        ]
        spectrum = oracles.spectrum(sampled, Q_A, Q_S)
        assert models.relative_error(block.eigenvalues, spectrum) < 1e-10
        G, damping = oracles.ekfac(Q_A, Q_S, spectrum), 0.1 * spectrum.mean().item()
        for q, query in enumerate(attribution.QUERIES):
            f = oracles.sequence_gradient(model, layer.module, attribution.query_sequence(query))
            scores = [
                oracles.influence(
                    [f],
                    [-oracles.sequence_gradient(model, layer.module, z)],
                    [G], [damping], attribution.N,
                )
                for z in sequences
            ]  # fmt: skip
            wanted = torch.tensor(scores, dtype=got.dtype)
            assert models.relative_error(got[q, :, at], wanted) < 1e-9


# transformers runs the others under eager alone: sdpa has no soft-capping, for one.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gemma2", "gpt_neo", "bloom"}))
def test_scores_are_the_same_under_sdpa_and_eager_attention(name):
    scores = {}
    for attention in ("sdpa", "eager"):
        model = build(name, attention)
        assert model.config._attn_implementation == attention
        batch, layers = models.batch(enough()), models.attributed(model)
        blocks = attribution.fit(model, layers, [batch])
        scores[attention] = attribution.score(model, layers, blocks, [batch], DAMPING)
    assert models.relative_error(scores["sdpa"], scores["eager"]) < 1e-9


@every_family
def test_batches_and_padding_change_nothing(name):
    model, sequences = build(name), enough()
    layers, whole = models.attributed(model), models.batch(sequences)
    alone = [models.batch([z], [int(i)]) for z, i in zip(sequences, whole.ids, strict=True)]
    scores = [
        attribution.score(
            model, layers, attribution.fit(model, layers, batches), batches[::-1], DAMPING
        )
        for batches in ([whole], alone)
    ]
    assert models.relative_error(scores[1].flip(1), scores[0]) < 1e-9


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_a_window_narrower_than_the_sequence_bounds_what_a_loss_reaches(name):
    """Position 0 feeds a loss at WINDOW + 1 only where some layer sees the whole context."""
    model = build(name)
    supervised = torch.zeros(CONTEXT, dtype=torch.bool)
    supervised[WINDOW + 1] = True
    sequence = (torch.arange(CONTEXT) % models.VOCABULARY, supervised)
    layers, _ = find_layers(model, ["*.0.self_attn.v_proj"])
    io = models.io_of(model, layers, models.batch([sequence]), training_loss)
    reached = io[layers[0].name].ds[0].abs().sum(dim=1) > 0
    window = range(1, WINDOW + 1) if name == "mistral" else range(WINDOW + 1)
    assert reached.nonzero().flatten().tolist() == list(window)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2"])
def test_losses_are_those_of_the_models_own_logits(name):
    """Soft-capped logits, scaled embeddings: nothing of a family's head is done a second time."""
    model, sequences = build(name), models.corpus(lengths=(6, 4))
    batch = models.batch(sequences)
    with torch.no_grad():
        got = log_probability(forward(model, batch), batch)
        wanted = torch.stack([oracles.log_probability(model, z) for z in sequences])
        if name == "gemma2":
            assert forward(model, batch).abs().max() <= model.config.final_logit_softcapping
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@every_family
def test_gradient_checkpointing_left_on_changes_nothing_in_evaluation(name):
    model, batch = build(name), models.batch(models.corpus(lengths=(6, 3)))
    layers = models.attributed(model)
    wanted = models.io_of(model, layers, batch, training_loss)
    model.activation_checkpointing_enable()
    got = models.io_of(model, layers, batch, training_loss)
    assert got.keys() == wanted.keys()
    for layer in wanted:
        assert torch.equal(got[layer].gradient(), wanted[layer].gradient())
