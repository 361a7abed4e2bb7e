"""What was timed on a machine: what a stage's process costs before it works, passes, and text."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tasks.corpora import Corpus, documents
from tasks.filter import words
from tasks.models import Tokenizer
from tasks.origin import Scratch
from tasks.params import RunParams, Tfidf
from tasks.planning.model import ModelSizes
from tasks.windows import encode

SAMPLE = 128  # documents of which text is timed
PASSES = 2  # of stage filter over the corpus: terms are counted, then scored


@dataclass(frozen=True, slots=True)
class Rates:
    """What was timed here.

    Attributes:
        start: seconds until a stage's process works; its bytes then, `base` if it has a model and
            `bare` if it has none.
        checks: seconds that stage validate takes more to start, and `checks_base` its bytes.
        load: seconds to load the model.
        fb: seconds a token of one forward and backward of training, by one worker.
        by_token: seconds a token by kind of work, all workers at once.
        by_query: seconds a query.
        eigen: seconds of a decomposition by its FLOP.
        flops: FLOP a second of passes, all workers together.
    """

    start: float
    bare: int
    base: int
    checks: float
    checks_base: int
    load: float = 0.0
    fb: float | None = None
    by_token: Mapping[str, float] | None = None
    by_query: float | None = None
    eigen: float | None = None
    flops: float | None = None


def startup(params: RunParams, sizes: ModelSizes) -> dict[str, float]:
    """What a process with this model costs before it works.

    Raises:
        ValueError: if it fails.
    """
    trained = isinstance(params.train, Scratch) and params.train.scratch.architecture
    given = [trained or sizes.folder, *([sizes.adapter] if sizes.adapter else [])]
    command = [sys.executable, "-m", "tasks.planning.startup", *map(str, given)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if found.returncode:
        raise ValueError(f"a stage's process does not start: {found.stderr.strip()[-300:]}")
    return json.loads(found.stdout.splitlines()[-1])


def of_start(started: Mapping[str, float]) -> Rates:
    """What `startup` found, and nothing of the work."""
    return Rates(
        started["seconds"], int(started["bare_bytes"]), int(started["bytes"]),
        started["checks_seconds"], int(started["checks_bytes"]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextRates:
    """Seconds a document of `tokenize`, and seconds a token of `filter`."""

    tokenize: float
    filter: float


def text_rates(params: RunParams, corpus: Corpus, tokenizer: Tokenizer) -> TextRates:
    """Timed on the first documents."""
    sample = list(itertools.islice(documents(corpus), SAMPLE))
    settings = params.tokenize
    begun = time.perf_counter()
    encoded = encode(tokenizer, sample, settings.bos, settings.eos)
    tokenized = time.perf_counter() - begun
    rows = [torch.from_numpy(each.tokens[: settings.context]) for each in encoded]
    by_words = isinstance(params.filter, Tfidf) and params.filter.terms == "words"
    sought = torch.arange(32)
    begun = time.perf_counter()
    for row in rows:
        if by_words:
            words(tokenizer.batch_decode([row.tolist()], skip_special_tokens=True)[0])
        else:
            torch.where(sought[torch.searchsorted(sought, row).clamp(max=31)] == row, 1, 0)
    searched = time.perf_counter() - begun
    num_tokens = sum(len(row) for row in rows)
    return TextRates(tokenized / len(sample), PASSES * searched / max(1, num_tokens))
