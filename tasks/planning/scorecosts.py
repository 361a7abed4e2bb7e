"""What the stages after the fit cost: queries, candidates, the top at full rank, and the checks."""

from math import ceil

from influence import costs
from influence.layers import Layer
from influence.streaming import MEMORY
from tasks.layergroups import factor_bytes, spectrum_bytes
from tasks.planning.fitcosts import FOOTER, HEADER, gradients_of_batch
from tasks.planning.planned import DOUBLE, Planned, StageCost

QUERIES_AT_ONCE = 32  # of stage query
GRADIENTS = 4  # dense gradients of a layer at once: formed, rotated, solved, being truncated
# Bytes that parquet and HTML take on disk, measured: a row of scores, of a table of ranks; a layer
# and token of a grid, a token beside it; a token of the page, and the page itself.
SCORE, RANK, CELL, TOKEN, SHOWN, PAGE = 12, 22, 4.3, 7, 24, 155_000
FIGURES = 60_000  # bytes of the pictures and small tables of stage validate


def prepared_bytes(planned: Planned, rank: int | None, methods: int) -> int:
    """Of all queries by so many methods."""
    numbers = costs.num_prepared(planned.layers, rank)
    return methods * planned.sizes.num_queries * numbers * max(4, planned.itemsize)


def dense_bytes(planned: Planned, queries: int) -> int:
    """Of dense gradients at the largest layer."""
    largest = max(layer.d_in * layer.d_out for layer in planned.layers)
    return queries * largest * planned.itemsize


def query_cost(planned: Planned) -> StageCost:
    """Up to 32 queries a shard; a batch's dense gradients of one layer at once."""
    queries, rank = planned.sizes.num_queries, planned.params.query.rank
    shards = max(1, ceil(queries / QUERIES_AT_ONCE))
    batch = max(1, min(queries, QUERIES_AT_ONCE, int(planned.batch / planned.sizes.query_length)))
    shape, length = planned.sizes.model.shape, planned.sizes.query_length
    a_query = length * costs.pass_flop(shape, length)
    columns = planned.columns(length, batch)
    a_query += costs.query_flop(planned.layers, columns, rank, planned.methods)
    kept = prepared_bytes(planned, rank, planned.methods)
    solvers = min(planned.layer_memory, spectrum_bytes(planned.layers))
    each = GRADIENTS * dense_bytes(planned, batch) + kept / shards + solvers
    names = planned.methods * len(planned.layers) * 2 * HEADER
    return planned.cost(
        "query",
        sequences=queries,
        tokens=queries * length,
        flop=queries * a_query,
        **planned.memory(shards, each, once=2.0 * kept),
        disk=kept + names + 700.0 * queries,
        work=float(kept + names),
        shards=shards,
    )


def window_of(planned: Planned) -> float:
    """Sequences that meet the dense matrices of all queries at once."""
    one = costs.num_weights(planned.layers) * planned.itemsize
    fits = one * planned.sizes.num_queries * planned.methods <= MEMORY
    return float("inf") if fits else max(1.0, MEMORY / one)


def stream_cost(planned: Planned) -> StageCost:
    """Every worker holds the queries, once as read and once as they are met."""
    sequences, methods = planned.num_candidates, planned.methods
    shards, queries = planned.shards(sequences), planned.sizes.num_queries * planned.methods
    settings, window = planned.params.stream, window_of(planned)
    columns = planned.columns(planned.length)

    def met(layer: Layer) -> float:
        rank = planned.params.query.rank
        return costs.contraction_flop(
            layer, columns(layer), queries, rank, window, settings.subspace
        )

    contracted = sequences * sum(map(met, planned.layers))
    each = 2.0 * prepared_bytes(planned, planned.params.query.rank, methods)
    each += min(MEMORY, costs.num_weights(planned.layers) * queries * planned.itemsize)
    if settings.self_influence:
        contracted += sequences * costs.spectrum_flop(planned.layers, columns)
        each += min(planned.layer_memory, spectrum_bytes(planned.layers))
        each += costs.num_weights(planned.layers) * planned.itemsize + gradients_of_batch(planned)
    numbers = len(planned.layers) * (queries + int(settings.self_influence))
    return planned.cost(
        "stream",
        sequences=sequences,
        flop=planned.pass_flop(sequences) + contracted,
        **planned.memory(shards, each),
        disk=sequences * (DOUBLE + 4.0 * numbers) + shards * 3 * HEADER,
        shards=shards,
    )


def score_cost(planned: Planned) -> StageCost:
    """The top again with queries of full rank, of which every worker holds all."""
    score, queries = planned.params.score, planned.sizes.num_queries
    pairs = min(2 * score.top, planned.num_candidates) * queries
    sequences = min(pairs + score.control, planned.num_candidates)
    shards = planned.shards(sequences)
    full = prepared_bytes(planned, None, 1)
    columns = planned.columns(planned.length)
    met = sum(2 * (columns(each) + queries) * each.d_in * each.d_out for each in planned.layers)
    grid = sum(
        2 * columns(each) * costs.kept_rank(each, None) * (each.d_in + each.d_out)
        for each in planned.layers
    )
    grids = pairs * planned.length * (CELL * len(planned.layers) + TOKEN)
    own = planned.num_candidates * 36 if planned.params.stream.self_influence else 0
    table = planned.num_candidates * queries * planned.methods
    return planned.cost(
        "score",
        sequences=sequences,
        flop=planned.pass_flop(sequences) + sequences * met + pairs * grid,
        **planned.memory(
            shards, full + dense_bytes(planned, queries), once=full + 200.0 * table + 8 * grids
        ),
        disk=table * SCORE + grids + own + 3 * FOOTER,
        work=float(full + 4 * pairs * planned.length * len(planned.layers)),
        shards=shards,
    )


def validate_cost(planned: Planned) -> StageCost:
    """A fit of all layers at once on each half, and the sample scored by both."""
    settings, queries = planned.params.validate_, planned.sizes.num_queries
    half = min(settings.split_half, planned.sizes.corpus.num_sequences // 2)
    sequences = 2 * (2 * half + min(settings.sample, planned.num_candidates))
    a_fit = planned.length * costs.factor_flop(planned.sizes.model.shape)
    a_fit += costs.spectrum_flop(planned.layers, planned.columns(planned.length))
    eigen = 2 * sum(map(costs.eigen_flop, costs.sides(planned.layers)))
    rank, columns = planned.params.query.rank, planned.columns(planned.sizes.query_length, queries)
    asked = 2 * queries * costs.query_flop(planned.layers, columns, rank, 1)
    # float64 sums, eigenvectors in float64 and as passes take them, and Λ.
    kept = factor_bytes(planned.layers) + spectrum_bytes(planned.layers)
    kept += DOUBLE * costs.num_covariances(planned.layers)
    kept += 2 * prepared_bytes(planned, rank, 1)
    return planned.cost(
        "validate",
        sequences=sequences,
        flop=planned.pass_flop(sequences) + 2 * half * a_fit + eigen + asked,
        **planned.memory(2, float(kept)),
        disk=planned.num_candidates * queries * RANK + FIGURES,
        shards=2,
    )


def report_cost(planned: Planned) -> StageCost:
    """The page holds every token that it shows with its share."""
    shown = 2 * planned.params.report.top * planned.sizes.num_queries * planned.length
    page = PAGE + SHOWN * shown
    return planned.cost("report", host=planned.sizes.bare + 20 * page, disk=page)
