"""What the stages of a fit cost, from the corpus to corrected eigenvalues."""

from influence import costs
from tasks.layergroups import factor_bytes, spectrum_bytes
from tasks.origin import Checkpoint, Scratch
from tasks.planning.corpus import CHARACTERS
from tasks.planning.planned import DOUBLE, Planned, StageCost
from tasks.windows import CHARACTERS_AT_ONCE

EIGEN = 6 * DOUBLE  # bytes a number of a matrix that is decomposed: copies and LAPACK's workspace
ENCODED = 270  # bytes of a token while a tokenizer has it, with its place in the text
WRITTEN = 10  # bytes of a token and of its text, in memory
ROW = 20  # bytes that a sequence takes in the table of the corpus, measured
FOOTER = 6_000  # bytes that a table takes beside its rows: its schema, and where columns begin
TEXT = 2.0  # bytes of a token's text, compressed, until it is tokenised
DOCUMENTS, TOGETHER = 512, CHARACTERS_AT_ONCE / CHARACTERS  # that a worker tokenises at once
HEADER = 105  # bytes that a tensor's entry takes in a file of tensors


def training_cost(planned: Planned) -> StageCost:
    """Stage `train`: all of the model in float32, to check it or to train it."""
    shape, train = planned.sizes.model.shape, planned.params.train
    weights = 4.0 * shape.num_parameters
    if isinstance(train, Checkpoint):
        return planned.cost("train", host=planned.sizes.base + weights, disk=700)
    told = train.scratch if isinstance(train, Scratch) else train.finetune
    length = train.scratch.context if isinstance(train, Scratch) else planned.length
    sequences = told.steps * told.batch
    tokens = planned.sizes.corpus.num_tokens  # all read and tokenised before the first step
    longest = length if planned.params.tokenize.mode == "pack" else planned.params.tokenize.context
    held = told.batch * longest * planned.sizes.model.training_bytes
    held += WRITTEN * tokens + ENCODED * min(tokens, TOGETHER)
    return planned.cost(
        "train",
        sequences=sequences,
        tokens=sequences * length,
        flop=sequences * length * costs.training_flop(shape, length),
        host=planned.sizes.base + 4 * weights + held,  # weights, gradients, Adam's two moments
        disk=weights + 35 * shape.vocabulary + 9000,  # and the tokenizer, losses, digests
    )


def tokenize_cost(planned: Planned) -> StageCost:
    """Text and tokens (int32 and a byte each) pass by; names of documents and sequences stay."""
    corpus = planned.sizes.corpus
    tokens = 5.0 * corpus.num_tokens
    rows = (ROW * corpus.num_sequences) + (3 * corpus.num_documents)
    shards = planned.shards(corpus.num_documents)
    a_document = corpus.num_tokens / max(1, corpus.num_documents)
    together = min(DOCUMENTS, corpus.num_documents / shards) * a_document
    encoded = max(a_document, min(together, TOGETHER)) * ENCODED
    held = planned.at_once(shards) * encoded
    held += 300.0 * (corpus.num_documents + corpus.num_sequences)  # and their names
    return planned.cost(
        "tokenize",
        sequences=corpus.num_sequences,
        tokens=corpus.num_tokens,
        host=planned.sizes.base + held,
        disk=tokens + DOUBLE * corpus.num_sequences + rows,
        # Parquet packs tokens into about half; then they lie as they are, and their text beside.
        work=tokens / 2 + tokens + TEXT * corpus.num_tokens,
        shards=shards,
    )


def filter_cost(planned: Planned) -> StageCost:
    """A score and a rank of every query and sequence are in memory together."""
    corpus, queries = planned.sizes.corpus, planned.sizes.num_queries
    table = DOUBLE * queries * corpus.num_sequences
    return planned.cost(
        "filter",
        sequences=corpus.num_sequences,
        tokens=corpus.num_tokens,
        host=planned.sizes.base + 5.0 * corpus.num_tokens + 4.0 * table,
        disk=planned.num_candidates * (13 + 6.0 * queries) + 2 * FOOTER,
        work=float(table),
        shards=planned.shards(corpus.num_sequences),
    )


def factors_cost(planned: Planned) -> StageCost:
    """Sums of a group of layers a worker; a shard leaves one half of each in float64."""
    sequences = planned.fitted(planned.params.factors.sequences)
    shards = planned.shards(sequences)
    groups = planned.grouped(factor_bytes)
    products = sequences * planned.length * costs.factor_flop(planned.sizes.model.shape)
    packed = costs.num_packed(planned.layers)
    largest = max(costs.sides(planned.layers))
    return planned.cost(
        "factors",
        flop=planned.pass_flop(sequences, groups) + products,
        **planned.passed(sequences, groups),
        **planned.memory(shards, groups.held, once=DOUBLE * 1.5 * largest**2),
        disk=packed * planned.at_rest
        + 2 * HEADER * len(costs.sides(planned.layers))
        + _told(planned),
        work=shards * packed * DOUBLE,
        shards=shards,
    )


def _told(planned: Planned) -> int:
    """Bytes of layers.json, which names all layers and what is left out."""
    return 500 * len(planned.layers)


def eigen_cost(planned: Planned) -> StageCost:
    """Decomposed on the host, a factor a worker."""
    sides = sorted(costs.sides(planned.layers), reverse=True)
    shards = planned.shards(len(sides))
    largest = sides[: planned.at_once(shards)]
    kept = costs.num_covariances(planned.layers) * planned.at_rest
    kept += sum(sides) * DOUBLE + 2 * HEADER * len(sides)
    return planned.cost(
        "eigen",
        flop=sum(map(costs.eigen_flop, sides)),
        host=planned.sizes.bare + EIGEN * sum(size**2 for size in largest),
        disk=kept,
        work=kept,
        shards=shards,
    )


def correct_cost(planned: Planned) -> StageCost:
    """Eigenvectors and sums of a group of layers a worker, and a batch's rotated gradients."""
    sequences = planned.fitted(planned.params.correct.sequences)
    shards = planned.shards(sequences)
    groups = planned.grouped(spectrum_bytes)
    rotated = sequences * costs.spectrum_flop(planned.layers, planned.columns(planned.length))
    numbers = costs.num_weights(planned.layers)
    names = 4 * HEADER * len(planned.layers)
    return planned.cost(
        "correct",
        flop=planned.pass_flop(sequences, groups) + rotated,
        **planned.passed(sequences, groups),
        **planned.memory(shards, groups.held + 2 * gradients_of_batch(planned)),
        disk=numbers * planned.at_rest + names,
        work=shards * (numbers * DOUBLE + names),
        shards=shards,
    )


def gradients_of_batch(planned: Planned) -> float:
    """Bytes of the gradients of a batch's sequences at the largest layer."""
    sequences = max(1.0, planned.batch / planned.length)
    largest = max(layer.d_in * layer.d_out for layer in planned.layers)
    return sequences * largest * planned.itemsize
