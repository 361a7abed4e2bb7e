"""The peer kronfluence (Bae 2024), doing the same work; installed by `pip install -e '.[peers]'`.

Its own functions are called below their saving to disk, which would be timed otherwise.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from kronfluence import module as _tracking  # noqa: F401  (registers the tracked modules)
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.module.utils import get_tracked_module_names
from kronfluence.score import pairwise
from kronfluence.score.dot_product import compute_dot_products_with_loader
from kronfluence.score.self import compute_self_scores_with_loaders
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    ALL_MODULE_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
)
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from benchmarks import models
from benchmarks.clock import MIB, Work
from benchmarks.phases import DAMPING, QUERY_LENGTH, RANK, Setting, relative_difference
from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.objectives import sample_labels
from influence.queries import Method, prepare_queries
from influence.selfinfluence import stream_self
from influence.sequences import TokenBatch
from influence.spectrum import fit_spectra
from influence.streaming import stream

Factors = dict[str, dict[str, Tensor]]


class LanguageModelling(Task):
    """Sums of log-probabilities, as in `influence.objectives`, and its sampled labels."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.masked = False  # leaves out the last position, whose next token nobody knows

    def compute_train_loss(
        self, batch: Mapping[str, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """Σ_t −log p of the tokens, or of labels that the model draws."""
        tokens = as_batch(batch)
        logits = model(tokens.inputs).logits
        labels = sample_labels(logits, tokens, 0) if sample else tokens.targets
        return models.torchs_loss(logits, tokens, labels).sum()

    def compute_measurement(self, batch: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Σ log p(completion | prompt)."""
        tokens = as_batch(batch)
        return -models.torchs_loss(model(tokens.inputs).logits, tokens, tokens.targets).sum()

    def get_attention_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which positions count in A and S: ours are those that carry a loss."""
        return as_batch(batch).loss_positions.long() if self.masked else None

    def get_influence_tracked_modules(self) -> list[str]:
        """The attributed layers."""
        return self.names


def as_batch(batch: Mapping[str, Tensor]) -> TokenBatch:
    """Every token but the first is a target."""
    supervised = torch.ones_like(batch["tokens"], dtype=torch.bool)
    supervised[:, 0] = False
    return TokenBatch(batch["ids"], batch["tokens"], supervised)


def loader(batch: TokenBatch, per_batch: int) -> DataLoader[Any]:
    """The same sequences in the same order."""
    rows = [
        {"ids": number, "tokens": tokens}
        for number, tokens in zip(batch.ids, batch.tokens, strict=True)
    ]
    return DataLoader(rows, batch_size=per_batch)  # pyright: ignore[reportArgumentType]


def with_linear(model: nn.Module) -> nn.Module:
    """GPT-2's Conv1D as `nn.Linear`, which is what the peer tracks."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(module, name, linear)
    return model


class Kronfluence:
    """The phases by the peer's own functions, on a model of its own with the same weights."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.task = LanguageModelling([layer.name for layer in setting.layers])
        self.model = prepare_model(with_linear(models.build(setting.shape)), self.task)
        self.state = State(cpu=True)
        self.names = get_tracked_module_names(self.model)
        self.per_batch = max(1, setting.tokens_per_batch // setting.length)
        self.train = loader(setting.corpus, self.per_batch)
        self.factor_args = FactorArguments(strategy="ekfac")
        # None: a tenth of the mean eigenvalue, as on our side.
        self.score_args = ScoreArguments(damping_factor=None, query_gradient_low_rank=RANK)

    def works(self, names: Sequence[str]) -> dict[str, Work]:
        """Those of the phases that the peer has."""
        tokens = self.setting.num_tokens
        makers = {
            "factors": lambda: Work(self.fit_covariances, tokens),
            "lambda": lambda: Work(self.fit_lambdas, tokens),
            "self": lambda: Work(self.self_scores, tokens),
            "query": lambda: Work(self.prepare_queries, self.setting.num_query_tokens),
            "stream 8": lambda: self.stream(8),
            "stream 64": lambda: self.stream(64),
            "stream 1024": lambda: self.stream(1024),
        }
        return {name: makers[name]() for name in names if name in makers}

    def agreement(self, ours: Setting) -> dict[str, float]:
        """Largest relative difference (Frobenius) over layers of A, S, Λ; and of scores.

        Λ and scores of both sides are in the peer's eigenbasis: bases are unique only up to signs
        and to rotations among equal eigenvalues.
        """
        self.task.masked = True
        found, covariances = {}, self.fit_covariances()
        self.task.masked = False
        for side, ours_of in (("activation", "A"), ("gradient", "S")):
            name = f"{side}_covariance"
            found[ours_of] = max(
                relative_difference(
                    getattr(ours.factors.of(layer), ours_of).value,
                    covariances[name][layer.name]
                    / covariances[f"num_{name}_processed"][layer.name],
                )
                for layer in ours.layers
            )
        bases = {
            layer.name: EigenBasis(
                self.eigen[ACTIVATION_EIGENVECTORS_NAME][layer.name],
                self.eigen[GRADIENT_EIGENVECTORS_NAME][layer.name],
            )
            for layer in ours.layers
        }
        spectra = fit_spectra(ours.model, ours.layers, bases, ours.batches, seed=0)
        sums = self.loaded[LAMBDA_MATRIX_NAME]
        found["Λ"] = max(
            relative_difference(spectra[layer.name].squared_sum, sums[layer.name])
            for layer in ours.layers
        )
        solvers = {
            name: EKFACBlock(bases[name], spectrum.values.float())
            for name, spectrum in spectra.items()
        }
        prepared = prepare_queries(
            ours.model, ours.layers, ours.queries,
            {"ekfac": Method(solvers, DAMPING)}, None, ours.tokens_per_batch,
        )["ekfac"]  # fmt: skip
        raw = [r for _, r in stream(ours.model, ours.layers, prepared, ours.batches)]
        found["scores"] = relative_difference(
            torch.cat(raw, dim=1).sum(dim=-1), self.pairwise_scores(None)
        )
        forms = stream_self(ours.model, ours.layers, solvers, DAMPING, ours.batches)
        found["self"] = relative_difference(
            torch.cat([form.sum(dim=-1) for _, form in forms]), self.self_scores()
        )
        return found

    def disk_mib(self) -> dict[str, float]:
        """Size of the tensors that the peer would write."""

        def size(factors: Factors) -> float:
            tensors = [tensor for each in factors.values() for tensor in each.values()]
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB

        eigen = size(self.eigen)
        return {
            "factors": size(self.covariances),
            "eigen": eigen,
            "spectra": size(self.loaded) - eigen,
        }

    def fit_covariances(self) -> Factors:
        """Sums of A and S."""
        return fit_covariance_matrices_with_loader(
            self.model, self.state, self.task, self.train, self.factor_args, disable_tqdm=True
        )[1]

    @cached_property
    def covariances(self) -> Factors:
        return self.fit_covariances()

    @cached_property
    def eigen(self) -> Factors:
        if self.setting.made_up:
            bases = self.setting.bases
            return {
                ACTIVATION_EIGENVECTORS_NAME: {n: each.Q_A for n, each in bases.items()},
                ACTIVATION_EIGENVALUES_NAME: {n: torch.ones(b.d_in) for n, b in bases.items()},
                GRADIENT_EIGENVECTORS_NAME: {n: each.Q_S for n, each in bases.items()},
                GRADIENT_EIGENVALUES_NAME: {n: torch.ones(b.d_out) for n, b in bases.items()},
            }
        copies = {name: dict(each) for name, each in self.covariances.items()}
        return perform_eigendecomposition(
            copies, self.model, self.state, self.factor_args, disable_tqdm=True
        )

    def fit_lambdas(self) -> Factors:
        """Sums of Λ."""
        return fit_lambda_matrices_with_loader(
            self.model, self.state, self.task, self.train, self.factor_args, self.eigen,
            disable_tqdm=True,
        )[1]  # fmt: skip

    @cached_property
    def loaded(self) -> Factors:
        return self.eigen | self.fit_lambdas()

    def self_scores(self) -> Tensor:
        """∇Lᵀ(G + λ)⁻¹∇L of every sequence."""
        return compute_self_scores_with_loaders(
            self.loaded, self.model, self.state, self.task, self.train, self.score_args,
            self.factor_args, self.names, disable_tqdm=True,
        )[ALL_MODULE_NAME]  # fmt: skip

    @cached_property
    def query_loader(self) -> DataLoader[Any]:
        length = min(QUERY_LENGTH, self.setting.length)
        return loader(models.sequences(self.setting.num_queries, length, seed=2), 8)

    def pairwise_scores(self, rank: int | None) -> Tensor:
        """All queries with all sequences, from gradients to scores."""
        arguments = ScoreArguments(damping_factor=None, query_gradient_low_rank=rank)
        return pairwise.compute_pairwise_scores_with_loaders(
            self.loaded, self.model, self.state, self.task, self.query_loader, 8, self.train,
            arguments, self.factor_args, self.names, disable_tqdm=True,
        )[ALL_MODULE_NAME]  # fmt: skip

    def prepare_queries(self) -> None:
        """Gradients, solve and truncation; the products with the candidates are left out."""
        nothing = {ALL_MODULE_NAME: torch.zeros(8, 1)}
        with mock.patch.object(pairwise, "compute_dot_products_with_loader", return_value=nothing):
            self.pairwise_scores(RANK)

    def stream(self, num_queries: int) -> Work:
        """The products of the candidates with queries that are prepared already."""
        prepared = self.setting.random_queries(num_queries, RANK)
        self.loaded  # noqa: B018
        tracked = {m.name: m for m in self.model.modules() if getattr(m, "name", "") in prepared}

        def call() -> None:
            for name, query in prepared.items():
                # Its linear layers hold (out, in) and no column for the bias beside the weight's.
                tracked[name].storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = [
                    query.left, query.right,
                ]  # fmt: skip
            compute_dot_products_with_loader(
                self.model, self.task, self.state, self.train, self.factor_args, self.score_args,
                self.names, GradScaler(enabled=False), disable_tqdm=True,
            )  # fmt: skip

        return Work(call, self.setting.num_tokens)
