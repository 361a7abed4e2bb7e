"""A plan as people read it: in a terminal or in Markdown, and beside what the stages took."""

from collections.abc import Mapping, Sequence

from tasks.planning.measured import Measured
from tasks.planning.plan import Plan, StagePlan
from tasks.progress import duration

COLUMNS = ("stage", "tokens", "fb", "device", "host", "disk", "partial", "time", "shards", "groups")
COMPARED = ("stage", "time", "took", "ratio", "memory", "took", "ratio", "disk", "took", "ratio")
NONE = "–"


def plan_rows(plan: Plan) -> list[list[str]]:
    """One row a stage, and the sum."""
    rows = [_row(each) for each in plan.stages]
    known = [each.seconds for each in plan.stages if each.seconds is not None]
    total = [
        "all", NONE, NONE, memory(max(each.device for each in plan.stages)),
        memory(max(each.host for each in plan.stages)),
        memory(sum(each.disk for each in plan.stages)),
        memory(max(each.work for each in plan.stages)),
        duration(sum(known)) if known else NONE, NONE, NONE,
    ]  # fmt: skip
    return [*rows, total]


def _row(stage: StagePlan) -> list[str]:
    return [
        stage.stage,
        f"{stage.tokens:,.0f}" if stage.tokens else NONE,
        NONE if stage.fb is None else f"{stage.fb:.2f}",
        memory(stage.device),
        memory(stage.host),
        memory(stage.disk),
        memory(stage.work),
        NONE if stage.seconds is None else duration(stage.seconds),
        f"{stage.shards}",
        f"{stage.groups}",
    ]


def compared_rows(plan: Plan, measured: Mapping[str, Measured]) -> list[list[str]]:
    """Planned, taken, and taken ÷ planned, of every stage that was measured as a whole."""
    rows = []
    for each in plan.stages:
        taken = measured.get(each.stage)
        if taken is None or not taken.whole:
            continue
        row = [each.stage]
        row += [NONE, duration(taken.seconds), NONE] if each.seconds is None else [
            duration(each.seconds), duration(taken.seconds), ratio(taken.seconds, each.seconds)
        ]  # fmt: skip
        for planned, took in ((each.host, taken.host), (each.disk, taken.disk)):
            row += [memory(planned), memory(took), ratio(took, planned)]
        rows.append(row)
    return rows


def ratio(taken: float, planned: float) -> str:
    """Two digits behind the point."""
    return f"{taken / planned:.2f}" if planned else NONE


def memory(num_bytes: float) -> str:
    """Bytes by powers of 1024, three digits that count: `812 B`, `3.2 MiB`, `1.74 TiB`."""
    if not num_bytes:
        return NONE
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def terminal(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; the first to the left, all others to the right."""
    table = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in table
    ]


def markdown(plan: Plan, measured: Mapping[str, Measured]) -> str:
    """The plan, its sources, and what earlier executions took."""
    lines = [*_table(COLUMNS, plan_rows(plan)), "", *(f"- {each}" for each in plan.told)]
    if rows := compared_rows(plan, measured):
        lines += ["", "Planned and taken:", "", *_table(COMPARED, rows)]
    return "\n".join([*(f"**{fault}**\n" for fault in plan.faults), *lines])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (columns, marks, *rows)]
