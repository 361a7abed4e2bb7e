"""What kronfluence fitted is read as it meant it: against our own fit, dense algebra and itself."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from influence.damping import AbsoluteDamping, RelativeDamping
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from influence.queries import Method, Query, prepare_queries, query_batch
from influence.sequences import TokenBatch
from influence.streaming import stream
from influence.validation.estimators import Curvature, fit_curvature
from tasks.kronfluence import read_kronfluence
from tests import oracles
from tests.influence import models

LENGTHS = (6, 3, 5, 2)
QUERIES = [Query("q", (1,), (2, 3, 4)), Query("p", (0,), (5, 1, 2))]
KINDS = (
    "activation_eigenvectors", "activation_eigenvalues", "gradient_eigenvectors",
    "gradient_eigenvalues", "lambda_matrix", "num_lambda_processed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fitted:
    model: nn.Module
    layers: tuple[Layer, ...]
    curvature: Curvature


@pytest.fixture(scope="module", params=list(models.CASES))
def each(request: pytest.FixtureRequest) -> Fitted:
    """With a bias and without, and a Conv1D, of which kronfluence fits the `nn.Linear` instead."""
    return fit(models.CASES[request.param]())


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(models.mlp())


def fit(model: nn.Module) -> Fitted:
    layers = models.attributed(model)
    batches = [models.batch(models.corpus(lengths=LENGTHS))]
    return Fitted(model, layers, fit_curvature(model, layers, batches, seed=3))


def write(folder: Path, fitted: Fitted, count: int = 7, **arguments: Any) -> Path:
    """The files of kronfluence 1.0.1, of our own fit: Λ a sum over `count` examples."""
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for name, block in fitted.curvature.ekfac.items():
        A, S = fitted.curvature.eigens[name]
        tensors["activation_eigenvectors"][name] = A.vectors.contiguous()
        tensors["activation_eigenvalues"][name] = A.values
        tensors["gradient_eigenvectors"][name] = S.vectors.contiguous()
        tensors["gradient_eigenvalues"][name] = S.values
        tensors["lambda_matrix"][name] = block.eigenvalues * count
        tensors["num_lambda_processed"][name] = torch.tensor([count])
    folder.mkdir(parents=True)
    settings = {"strategy": "ekfac", "use_empirical_fisher": False} | arguments
    for kind, named in tensors.items():
        save(folder, kind, named, settings)
    (folder / "factor_arguments.json").write_text(json.dumps(settings))
    return folder


def save(
    folder: Path, kind: str, named: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> None:
    path = folder / f"{kind}.safetensors"
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in named.items()},
        path,
        metadata={key: str(value) for key, value in (settings or {}).items()},
    )


def change(folder: Path, kind: str, name: str, tensor: Tensor | None) -> None:
    """Put another tensor into a file, or take it out."""
    named = load_file(folder / f"{kind}.safetensors")
    named = {key: each for key, each in named.items() if key != name}
    save(folder, kind, named if tensor is None else named | {name: tensor})


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("damping", [RelativeDamping(0.1), AbsoluteDamping(0.3)])
def test_the_solve_is_that_of_our_own_fit(each, tmp_path, count, damping):
    blocks = read_kronfluence(write(tmp_path / "factors_f", each, count), each.layers)
    assert list(blocks) == [layer.name for layer in each.layers]
    for layer in each.layers:
        V = torch.randn(3, layer.d_out, layer.d_in, dtype=torch.float64)
        ours = each.curvature.ekfac[layer.name].solve(V, damping)
        assert models.relative_error(blocks[layer.name].solve(V, damping), ours) < 1e-12


def test_the_files_mean_the_dense_matrix_that_an_oracle_builds_of_them(fitted, tmp_path):
    folder = write(tmp_path / "factors_f", fitted)
    files = {kind: load_file(folder / f"{kind}.safetensors") for kind in KINDS}
    for layer in fitted.layers:
        Q_A, Q_S, sums, count = (
            files[kind][layer.name]
            for kind in (
                "activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix",
                "num_lambda_processed",
            )
        )  # fmt: skip
        G = oracles.ekfac(Q_A, Q_S, sums / count)
        V = torch.randn(layer.d_out, layer.d_in, dtype=torch.float64)
        block = read_kronfluence(folder, [layer])[layer.name]
        found = block.solve(V, AbsoluteDamping(0.3))
        assert models.relative_error(found, oracles.damped_solve(G, V, 0.3)) < 1e-9


def candidates() -> TokenBatch:
    """Of one length, and every token but the first a target."""
    return models.batch(models.corpus(seed=1, lengths=(5, 5, 5), prompt=1))


def scores(fitted: Fitted, blocks: Mapping[str, EKFACBlock]) -> Tensor:
    """∇fᵀ(G + λ)⁻¹∇L of queries and sequences, summed over layers."""
    methods = {"ekfac": Method(blocks, RelativeDamping(0.1))}
    prepared = prepare_queries(fitted.model, fitted.layers, QUERIES, methods, None, 64)["ekfac"]
    told = [raw for _, raw in stream(fitted.model, fitted.layers, prepared, [candidates()])]
    return torch.cat(told, dim=1).sum(dim=-1)


def test_queries_and_candidates_run_with_them(each, tmp_path):
    blocks = read_kronfluence(write(tmp_path / "factors_f", each), each.layers)
    ours = scores(each, each.curvature.ekfac)
    assert models.relative_error(scores(each, blocks), ours) < 1e-12


def test_they_come_in_the_dtype_of_the_model(fitted, tmp_path):
    folder = write(tmp_path / "factors_f", fitted)
    for kind in ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix"):
        named = load_file(folder / f"{kind}.safetensors")
        save(folder, kind, {name: tensor.float() for name, tensor in named.items()})
    for block in read_kronfluence(folder, fitted.layers).values():
        parts = (block.basis.Q_A, block.basis.Q_S, block.eigenvalues)
        assert {part.dtype for part in parts} == {torch.float64}
    layers = models.attributed(models.mlp().float())
    for block in read_kronfluence(folder, layers).values():
        parts = (block.basis.Q_A, block.basis.Q_S, block.eigenvalues)
        assert {part.dtype for part in parts} == {torch.float32}


@pytest.mark.parametrize("name", [
    "activation_eigenvectors.safetensors", "gradient_eigenvectors.safetensors",
    "lambda_matrix.safetensors", "num_lambda_processed.safetensors", "factor_arguments.json",
])  # fmt: skip
def test_a_file_that_lacks_is_named(fitted, tmp_path, name):
    folder = write(tmp_path / "factors_f", fitted)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {name} of kronfluence; give the folder factors_"):
        read_kronfluence(folder, fitted.layers)


def test_a_folder_that_is_not_there_or_holds_the_right_one(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"none lacks factor_arguments\.json, activation_eigen"):
        read_kronfluence(tmp_path / "none", fitted.layers)
    write(tmp_path / "factors_f", fitted)
    with pytest.raises(ValueError, match=r"give one of the folders in it: factors_f$"):
        read_kronfluence(tmp_path, fitted.layers)


def test_partitions_that_were_not_added_up(fitted, tmp_path):
    folder = write(tmp_path / "factors_f", fitted)
    for kind in ("lambda_matrix", "num_lambda_processed"):
        part = f"{kind}_data_partition0_module_partition0.safetensors"
        shutil.move(folder / f"{kind}.safetensors", folder / part)
    with pytest.raises(ValueError, match=r"in partitions only.*aggregate_lambda_matrices"):
        read_kronfluence(folder, fitted.layers)


@pytest.mark.parametrize(("given", "told"), [
    ({"strategy": "kfac"}, r"the strategy is 'kfac'.*strategy=\"ekfac\""),
    ({"strategy": "diagonal"}, r"the strategy is 'diagonal'"),
    ({"use_empirical_fisher": True}, r"use_empirical_fisher is true.*use_empirical_fisher=False"),
])  # fmt: skip
def test_another_curvature_is_refused(fitted, tmp_path, given, told):
    folder = write(tmp_path / "factors_f", fitted, **given)
    with pytest.raises(ValueError, match=told):
        read_kronfluence(folder, fitted.layers)


def test_a_layer_that_lacks_is_named_with_those_found(fitted, tmp_path):
    folder = write(tmp_path / "factors_f", fitted)
    change(folder, "lambda_matrix", "head", None)
    told = r"no factors of head; it has those of block\.mlp\.fc1, block\.mlp\.fc2; name them in"
    with pytest.raises(ValueError, match=told) as error:
        read_kronfluence(folder, fitted.layers)
    assert "Conv1D" not in str(error.value)
    assert list(read_kronfluence(folder, fitted.layers[:2])) == ["block.mlp.fc1", "block.mlp.fc2"]


def test_a_conv1d_that_lacks_is_explained(fitted, tmp_path):
    folder = write(tmp_path / "factors_f", fitted)
    layers = models.attributed(models.gpt2())
    with pytest.raises(ValueError, match=r"transformer\.h\.0.*tracks no Conv1D: fit on an nn\.Lin"):
        read_kronfluence(folder, layers)


def without_bias(fitted: Fitted) -> Fitted:
    model = models.mlp()
    model.head = nn.Linear(3, models.VOCABULARY, bias=False).double()
    return Fitted(model, models.attributed(model), fitted.curvature)


def test_a_bias_on_one_side_only_is_told(fitted, tmp_path):
    with_bias = write(tmp_path / "factors_with", fitted)
    other = without_bias(fitted)
    told = r"'head' is 4 × 4, and 3 × 3 in the model \(it was fitted with a bias, and the layer has"
    with pytest.raises(ValueError, match=told):
        read_kronfluence(with_bias, other.layers)
    none = write(tmp_path / "factors_without", fit(other.model))
    told = r"'head' is 3 × 3, and 4 × 4 in the model \(it was fitted without the bias"
    with pytest.raises(ValueError, match=told):
        read_kronfluence(none, fitted.layers)


@pytest.mark.parametrize(("kind", "tensor", "told"), [
    ("gradient_eigenvectors", torch.eye(5), r"'head' is 5 × 5, and 6 × 6 in the model; give the f"),
    ("lambda_matrix", torch.ones(4, 6), r"'head' is 4 × 6, and 6 × 4 in the model; give the f"),
    ("lambda_matrix", torch.full((6, 4), torch.nan), r"'head' holds NaN or infinity"),
    ("num_lambda_processed", torch.tensor([0]), r"'head' was fitted on 0 examples; fit Λ again"),
])  # fmt: skip
def test_a_tensor_that_cannot_be_is_refused(fitted, tmp_path, kind, tensor, told):
    folder = write(tmp_path / "factors_f", fitted)
    change(folder, kind, "head", tensor)
    with pytest.raises(ValueError, match=told):
        read_kronfluence(folder, fitted.layers)


def test_scores_are_those_of_kronfluence_itself(fitted, tmp_path):
    """Its own fit in float64, Λ in three partitions, then its pairwise scores."""
    reason = "the peer is not installed; pip install -e '.[peers]'"
    pytest.importorskip("kronfluence", reason=reason)
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    from benchmarks.kronfluence_peer import LanguageModelling, loader

    def doubles(*names: str) -> dict[str, Any]:
        return {f"{name}_dtype": torch.float64 for name in names}

    task = LanguageModelling([layer.name for layer in fitted.layers])
    peer = Analyzer(
        "small", prepare_model(models.mlp(), task), task, cpu=True, disable_tqdm=True,
        output_dir=str(tmp_path),
    )  # fmt: skip
    sides = doubles("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    train, queries = (loader(each, 1).dataset for each in (candidates(), query_batch(QUERIES)))
    peer.fit_all_factors(
        "f", train, per_device_batch_size=1,
        factor_args=FactorArguments(strategy="ekfac", lambda_data_partitions=3, **sides),
    )  # fmt: skip
    folder = tmp_path / "small/factors_f"
    counts = load_file(folder / "num_lambda_processed.safetensors").values()
    assert {int(count) for count in counts} == {3}

    peer.compute_pairwise_scores(
        "s", "f", queries, train, per_device_query_batch_size=2, per_device_train_batch_size=3,
        score_args=ScoreArguments(
            damping_factor=None, **doubles("score", "per_sample_gradient", "precondition")
        ),
    )  # fmt: skip
    theirs = peer.load_pairwise_scores("s")
    assert theirs is not None
    found = scores(fitted, read_kronfluence(folder, fitted.layers))
    assert models.relative_error(found, theirs["all_modules"]) < 1e-10
    assert models.relative_error(found, scores(fitted, fitted.curvature.ekfac)) > 0.01
