"""The peer bergson (EleutherAI), doing the same work by its own collectors.

Its install asks for GPU builds of packages that nothing here touches; `benchmarks/README.md` says
how to do without. It keeps no queries at low rank, so that its stream is held against ours at full
rank.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from tempfile import TemporaryDirectory

import torch
from bergson.collector.collector import HookCollectorBase
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.gradients import GradientProcessor
from bergson.hessians.eigenvectors import LambdaCollector
from bergson.hessians.kfac import CovarianceCollector
from bergson.score.scorer import Scorer
from torch import Tensor

from benchmarks import models
from benchmarks.clock import Work
from benchmarks.phases import Setting, full_rank_queries, relative_difference
from influence.objectives import sample_labels
from influence.sequences import TokenBatch
from influence.spectrum import fit_spectra
from influence.streaming import stream

Loss = Callable[[Tensor, TokenBatch], Tensor]


def sampled_loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    """With the labels that our side draws."""
    return models.torchs_loss(logits, batch, sample_labels(logits, batch, 0))


def true_loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    """With the labels of the corpus."""
    return models.torchs_loss(logits, batch, batch.targets)


class Bergson:
    """The phases by the peer's collectors, on a model of its own with the same weights."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = models.build(setting.shape)
        # As its own set-up does, so that gradients reach every layer and no weight has one.
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)
        self.prefix = f"{self.model.base_model_prefix}."
        self.folder = TemporaryDirectory()
        self.common = {
            "model": self.model.base_model,
            "target_modules": {self.name(layer.name) for layer in setting.layers},
            "processor": GradientProcessor(include_bias=True),
        }

    def name(self, layer: str) -> str:
        """Its name of a layer."""
        return layer.removeprefix(self.prefix)

    def works(self, names: Sequence[str]) -> dict[str, Work]:
        """Those of the phases that the peer has."""
        makers = {
            "factors": lambda: self.fit_covariances,
            "lambda": lambda: self.fit_lambdas,
            "stream 8 full": lambda: self.stream,
        }
        tokens = self.setting.num_tokens
        return {name: Work(makers[name](), tokens) for name in names if name in makers}

    def agreement(self, ours: Setting) -> dict[str, float]:
        """How far results of equal settings differ, relative in Frobenius norm.

        Worst over layers of A, S, Λ; and of scores. Λ of both sides is in our eigenbasis.
        """
        found, covariances = {}, self.fit_covariances()
        for side, sums in (("A", covariances.A_cov_dict), ("S", covariances.S_cov_dict)):
            found[side] = max(
                relative_difference(
                    getattr(ours.factors.of(layer), side).value,
                    sums[name] / covariances.num_positions[name],
                )
                for layer in ours.layers
                if (name := self.name(layer.name))
            )
        spectra = fit_spectra(ours.model, ours.layers, ours.bases, ours.batches, seed=0)
        lambdas = self.fit_lambdas().eigenvalue_corrections
        found["Λ"] = max(
            relative_difference(spectra[layer.name].squared_sum, lambdas[self.name(layer.name)])
            for layer in ours.layers
        )
        prepared = full_rank_queries(ours, 8)
        raw = [r for _, r in stream(ours.model, ours.layers, prepared, ours.batches)]
        found["scores"] = relative_difference(torch.cat(raw, dim=1).sum(dim=-1), self.stream().T)
        return found

    def fit_covariances(self) -> CovarianceCollector:
        """Sums of A and S, and how many positions went in."""
        collector = CovarianceCollector(**self.common, dtype=torch.float32, path=self.folder.name)
        self.run(collector, sampled_loss)
        return collector

    def fit_lambdas(self) -> LambdaCollector:
        """Sums of Λ, in our eigenbasis."""
        bases = {self.name(name): basis for name, basis in self.setting.bases.items()}
        vectors = (
            {name: basis.Q_A for name, basis in bases.items()},
            {name: basis.Q_S for name, basis in bases.items()},
        )
        collector = LambdaCollector(**self.common, path=self.folder.name, eigenvectors=vectors)
        self.run(collector, sampled_loss)
        return collector

    @cached_property
    def queries(self) -> dict[str, Tensor]:
        """Ours, flat: its gradients too have outputs first and the bias in the last column."""
        prepared = full_rank_queries(self.setting, 8)
        return {self.name(name): query.dense().flatten(1) for name, query in prepared.items()}

    def stream(self) -> Tensor:
        """Scores of all sequences (rows) with queries that are prepared already."""
        told: list[Tensor] = []
        scorer = Scorer(
            self.queries,
            list(self.queries),
            lambda indices, scores, query_offset: told.append(scores),  # pyright: ignore[reportArgumentType]
            torch.device("cpu"),
            torch.float32,
        )
        collector = GradientCollector(
            **self.common,
            data=range(self.setting.num_sequences),  # pyright: ignore[reportArgumentType]
            cfg=IndexConfig(run_path=self.folder.name),
            scorer=scorer,
        )
        self.run(collector, true_loss)
        return torch.cat(told)

    def run(self, collector: HookCollectorBase, loss: Loss) -> None:
        """Its loop over batches; nothing is written."""
        for batch in self.setting.batches:
            with collector.with_batch(batch.loss_positions):
                losses = loss(self.model(batch.inputs).logits, batch)
                losses.sum().backward()
                self.model.zero_grad()
            collector.process_batch(batch.ids.tolist(), losses=losses)
