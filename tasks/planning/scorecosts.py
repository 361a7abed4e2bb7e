"""What the stages after the fit cost: queries, candidates, the top at full rank, and the checks."""

from functools import partial
from math import ceil

from influence import costs
from influence.layers import Layer
from tasks.layergroups import half_bytes, solved_bytes, spectrum_bytes, waiting_bytes
from tasks.planning.fitcosts import EIGEN, FOOTER, HEADER, gradients_of_batch
from tasks.planning.planned import DOUBLE, Groups, Planned, StageCost

QUERIES_AT_ONCE = 32  # of stage query
GRADIENTS = 4  # dense gradients of a layer at once: formed, rotated, solved, being truncated
# Bytes that parquet and HTML take on disk, measured: a row of scores, of a table of ranks; a layer
# and token of a grid, a token beside it; a token of the page, and the page itself.
SCORE, RANK, CELL, TOKEN, SHOWN, PAGE = 12, 22, 4.3, 7, 30, 155_000
# Bytes in memory: a token of the top with its share; a candidate's ranks by the baselines.
READ, RANKED = 200, 500
FIGURES = 60_000  # bytes of the pictures and small tables of stage validate


def prepared_bytes(planned: Planned, rank: int | None, methods: int) -> int:
    """Of all queries by so many methods."""
    numbers = costs.num_prepared(planned.layers, rank)
    return methods * planned.sizes.num_queries * numbers * planned.itemsize


def dense_bytes(planned: Planned, queries: int) -> int:
    """Of dense gradients at the largest layer."""
    largest = max(layer.d_in * layer.d_out for layer in planned.layers)
    return queries * largest * planned.itemsize


def asked_flop(
    planned: Planned,
    rank: int | None,
    dampings: int,
    plain: bool = False,
    passes: tuple[float, float] = (1, 1),
) -> float:
    """Of all queries: their passes, and what is made of their gradients."""
    queries, length = planned.sizes.num_queries, planned.sizes.query_length
    columns = planned.columns(length, queries)
    a_query = length * costs.pass_flop(planned.sizes.model.shape, length, *passes)
    a_query += costs.query_flop(planned.layers, columns, rank, dampings, plain)
    return queries * a_query


def query_cost(planned: Planned) -> StageCost:
    """Up to 32 queries a shard; a batch's dense gradients of one layer at once."""
    queries, rank = planned.sizes.num_queries, planned.params.query.rank
    shards = max(1, ceil(queries / QUERIES_AT_ONCE))
    batch = max(1, min(queries, QUERIES_AT_ONCE, int(planned.batch / planned.sizes.query_length)))
    length = planned.sizes.query_length
    a_query = asked_flop(planned, rank, planned.methods - 1, plain=True)
    kept = prepared_bytes(planned, rank, planned.methods)
    solvers = min(planned.layer_memory, spectrum_bytes(planned.layers))
    each = GRADIENTS * dense_bytes(planned, batch) + kept / shards + solvers
    names = planned.methods * len(planned.layers) * 2 * HEADER
    return planned.cost(
        "query",
        sequences=queries,
        tokens=queries * length,
        flop=a_query,
        **planned.memory(shards, each, once=2.0 * kept, tokens=batch * length),
        disk=kept + names + 700.0 * queries,
        work=float(kept + names),
        shards=shards,
    )


def window_of(planned: Planned) -> float:
    """Sequences that meet the dense matrices of all queries at once."""
    one = costs.num_weights(planned.layers) * planned.itemsize
    room = waiting_bytes(planned.layer_memory)
    fits = one * planned.sizes.num_queries * planned.methods <= room
    return float("inf") if fits else max(1.0, room / one)


def stream_cost(planned: Planned) -> StageCost:
    """Every worker holds the queries, once as read and once as they are met; or in the subspace of
    all, which is found before."""
    sequences, methods = planned.num_candidates, planned.methods
    shards, queries = planned.shards(sequences), planned.sizes.num_queries * planned.methods
    settings, rank, window = planned.params.stream, planned.params.query.rank, window_of(planned)
    columns = planned.columns(planned.length)

    def met(layer: Layer) -> float:
        return costs.contraction_flop(
            layer, columns(layer), queries, rank, window, settings.subspace
        )

    contracted, found, shared = sequences * sum(map(met, planned.layers)), 0.0, 0.0
    if settings.subspace is None:
        dense = costs.num_weights(planned.layers) * queries * planned.itemsize
        each = 2.0 * prepared_bytes(planned, rank, methods)
        each += min(waiting_bytes(planned.layer_memory), dense)
    else:
        found = sum(
            costs.subspace_flop(layer, queries, rank, settings.subspace) for layer in planned.layers
        )
        each = shared = planned.itemsize * sum(
            costs.num_shared(layer, queries, rank, settings.subspace) for layer in planned.layers
        )
    if settings.self_influence:
        contracted += sequences * costs.spectrum_flop(planned.layers, columns)
        each += min(planned.layer_memory, spectrum_bytes(planned.layers))
        each += costs.num_weights(planned.layers) * planned.itemsize + gradients_of_batch(planned)
    numbers = len(planned.layers) * (queries + int(settings.self_influence))
    return planned.cost(
        "stream",
        sequences=sequences,
        flop=planned.pass_flop(sequences) + contracted + found,
        **planned.memory(shards, each),
        disk=sequences * (DOUBLE + 4.0 * numbers) + shards * 3 * HEADER,
        work=shared,
        shards=shards,
    )


def rescored(planned: Planned) -> tuple[int, int]:
    """Pairs of a query and a sequence of its top, and the sequences that are scored again."""
    score, there = planned.params.score, planned.num_candidates
    pairs = min(2 * score.top, there) * planned.sizes.num_queries
    return pairs, min(pairs + score.control, there)


def score_cost(planned: Planned) -> StageCost:
    """The top again with queries of full rank, which are solved, kept and met a group of layers at
    a time."""
    queries, (pairs, sequences) = planned.sizes.num_queries, rescored(planned)
    shards = planned.shards(sequences)
    groups = planned.grouped(partial(solved_bytes, num_queries=queries, itemsize=planned.itemsize))
    solved, met = _full_rank_memory(planned, groups, shards)
    columns = planned.columns(planned.length)
    a_sequence = sum(
        2 * (columns(each) + queries) * each.d_in * each.d_out for each in planned.layers
    )
    a_grid = sum(2 * columns(each) * each.d_in * each.d_out for each in planned.layers)
    dense = sum(2 * costs.kept_rank(each, None) * each.d_in * each.d_out for each in planned.layers)
    asked = asked_flop(planned, None, 1, passes=groups.passes) + queries * dense
    grids = pairs * planned.length * (CELL * len(planned.layers) + TOKEN)
    own = planned.num_candidates * 36 if planned.params.stream.self_influence else 0
    table = planned.num_candidates * queries * planned.methods
    tables = 200.0 * table + 8 * grids
    full = queries * costs.num_weights(planned.layers) * planned.itemsize
    return planned.cost(
        "score",
        flop=planned.pass_flop(sequences, groups) + sequences * a_sequence + pairs * a_grid + asked,
        **planned.passed(sequences, groups, queries),
        device=max(solved["device"], met["device"]),
        host=max(solved["host"], met["host"]) + tables,
        disk=table * SCORE + grids + own + 3 * FOOTER,
        work=float(full + 4 * pairs * planned.length * len(planned.layers)),
        shards=shards,
    )


def _full_rank_memory(
    planned: Planned, groups: Groups, shards: int
) -> tuple[dict[str, float], dict[str, float]]:
    """While one worker solves the queries of a group; and while all have sequences meet them."""
    queries = planned.sizes.num_queries
    batch = max(1, min(queries, int(planned.batch / planned.sizes.query_length)))
    solvers = max(min(planned.layer_memory, spectrum_bytes(group)) for group in groups.layers)
    solving = groups.held + solvers + GRADIENTS * dense_bytes(planned, batch)
    dense = max(costs.num_weights(group) for group in groups.layers) * queries * planned.itemsize
    return (
        planned.memory(1, float(solving), tokens=batch * planned.sizes.query_length),
        planned.memory(shards, dense + gradients_of_batch(planned)),
    )


def validate_cost(planned: Planned) -> StageCost:
    """Of each half a fit, queries by it and the sample scored, a group of layers at a time."""
    settings, queries = planned.params.validate_, planned.sizes.num_queries
    half = min(settings.split_half, planned.sizes.corpus.num_sequences // 2)
    sample, rank = min(settings.sample, planned.num_candidates), planned.params.query.rank
    groups = planned.grouped(
        partial(half_bytes, num_queries=queries, rank=rank, itemsize=planned.itemsize)
    )
    columns = planned.columns(planned.length)
    a_fit = planned.length * costs.factor_flop(planned.sizes.model.shape)
    a_fit += costs.spectrum_flop(planned.layers, columns)
    met = sum(costs.contraction_flop(each, columns(each), queries, rank) for each in planned.layers)
    eigen = sum(map(costs.eigen_flop, costs.sides(planned.layers)))
    asked = asked_flop(planned, rank, 1, passes=groups.passes)
    # A matrix is decomposed between passes.
    decomposed = EIGEN * max(costs.sides(planned.layers)) ** 2 - planned.pass_bytes
    batch = max(1, min(queries, int(planned.batch / planned.sizes.query_length)))
    once = max(decomposed, 2 * gradients_of_batch(planned), GRADIENTS * dense_bytes(planned, batch))
    sequences = 2 * (2 * half + sample)
    return planned.cost(
        "validate",
        flop=planned.pass_flop(sequences, groups)
        + 2 * (half * a_fit + sample * met + eigen + asked),
        **planned.passed(sequences, groups, 2 * queries),
        **planned.memory(2, groups.held + once),
        disk=planned.num_candidates * queries * RANK + FIGURES,
        shards=2,
    )


def report_cost(planned: Planned) -> StageCost:
    """The page holds every token that it shows with its share; the stage reads all of the top."""
    params, queries = planned.params, planned.sizes.num_queries
    page = PAGE + SHOWN * 2 * params.report.top * queries * planned.length
    tokens = min(2 * params.score.top, planned.num_candidates) * queries * planned.length
    held = tokens * (READ + 8 * len(planned.layers)) + RANKED * queries * planned.num_candidates
    return planned.cost("report", host=planned.sizes.bare + held + 10 * page, disk=page)
