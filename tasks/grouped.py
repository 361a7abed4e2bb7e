"""A top list as a person reads it: sequences that say the same stand together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Group:
    """The best of the rows of top.parquet that say the same, and the others by rank."""

    first: Mapping[str, Any]
    others: tuple[Mapping[str, Any], ...] = ()


def grouped(rows: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Rows of one query and sign by their column `group`, by the rank of each group's best."""
    members: dict[int, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        members.setdefault(row["group"], []).append(row)
    return [Group(first, tuple(others)) for first, *others in members.values()]
