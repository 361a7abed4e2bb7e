"""What the TF-IDF filter missed, from the audited sample of what it rejected."""

from dataclasses import asdict

import torch

from influence.audit import FilterRecall
from tasks import store
from tasks.params import Tfidf
from tasks.prepared import EKFAC
from tasks.ranking import Influences
from tasks.workspace import StageContext

NEIGHBOURS = 10


def filter_recall(context: StageContext, influences: Influences, seed: int) -> dict[str, object]:
    """Recall of the filter by query and their mean; of method `none`, 1 by definition."""
    settings = context.params.filter
    if not isinstance(settings, Tfidf):
        return {"method": "none", "recall": 1.0, "num_queries": len(influences.queries)}
    folder = context.artifact("filter")
    candidates = store.read_table(folder / "candidates.parquet", ["audit", "rejected_total"])
    audited = torch.tensor(candidates["audit"].to_pylist())
    num_rejected = candidates["rejected_total"][0].as_py()
    table = store.read_table(folder / "tfidf.parquet", ["selected"])
    selected = torch.tensor(table["selected"].to_pylist()).reshape(len(influences.queries), -1)
    k = min(NEIGHBOURS, settings.top)
    each = {
        name: FilterRecall.of(influences.of(EKFAC)[q], selected[q], audited, num_rejected, k, seed)
        for q, name in enumerate(influences.queries)
    }
    mean = {
        bound: sum(getattr(recall, bound) for recall in each.values()) / len(each)
        for bound in ("recall", "low", "high")
    }
    return {
        "method": "tfidf",
        "top": settings.top,
        "audit": int(audited.sum()),
        "num_rejected": num_rejected,
        "k": k,
        **mean,
        "num_queries": len(each),
        "queries": {name: recall.recall for name, recall in each.items()},
        "details": {name: asdict(recall) for name, recall in each.items()},
    }
