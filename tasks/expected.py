"""What queries expect to find, looked up in the corpus."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tasks import store

NAMED = 5  # ids in an error message; of more, how many more

Match = str | Mapping[str, Any]


class Expecting(Protocol):
    """A query as far as it says what ought to be found."""

    @property
    def name(self) -> str:
        """Its own in the set."""
        ...

    @property
    def expected(self) -> Sequence[Match]:
        """Ids of documents or sequences, or metadata to match."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """A document or sequence that ought to be found, and its rows: any of them will do."""

    name: str
    rows: tuple[int, ...]


def expected_targets(
    queries: Sequence[Expecting], tokenize: Path, path: str
) -> dict[str, list[Target]]:
    """The targets of each query that expects any, each once.

    An id is a document's, all of whose sequences count, or else a sequence's. Metadata match every
    document that has these values, and each is a target.

    Args:
        queries: of the run.
        tokenize: the artefact of that stage.
        path: of the query set, for the error message.

    Raises:
        ValueError: naming the ids and matches that the corpus does not hold, by query.
    """
    asking = [query for query in queries if query.expected]
    if not asking:
        return {}
    held = _Held.read(tokenize, [each for query in asking for each in query.expected])
    found: dict[str, list[Target]] = {}
    for query in asking:
        missing = [each for each in query.expected if not held.targets(each)]
        if missing:
            shown = ", ".join(repr(each) for each in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise ValueError(
                f"{path}: query {query.name!r} expects {shown}{more}, which no document or "
                "sequence of the corpus is; ids are those of corpus.id (or file:line), metadata "
                "the other fields of a document: mend 'expected', or corpus.path and corpus.limit"
            )
        every = [target for each in query.expected for target in held.targets(each)]
        found[query.name] = list({target.name: target for target in every}.values())
    return found


@dataclass(frozen=True, slots=True)
class _Held:
    """What the corpus holds: rows by document and by sequence, documents by match."""

    documents: Mapping[str, list[int]]
    sequences: Mapping[str, int]
    matched: Mapping[str, list[str]]

    @classmethod
    def read(cls, tokenize: Path, wanted: Sequence[Match]) -> "_Held":
        table = store.read_table(tokenize / "sequences.parquet", ["sequence", "documents"])
        rows: dict[str, list[int]] = defaultdict(list)
        for row, documents in enumerate(table["documents"].to_pylist()):
            for document in documents:
                rows[document].append(row)
        names = {name: row for row, name in enumerate(table["sequence"].to_pylist())}
        matches = {_key(each): each for each in wanted if not isinstance(each, str)}
        return cls(rows, names, _matched(tokenize / "documents.parquet", matches))

    def targets(self, wanted: Match) -> list[Target]:
        if isinstance(wanted, str) and wanted not in self.documents:
            row = self.sequences.get(wanted)
            return [] if row is None else [Target(wanted, (row,))]
        names = [wanted] if isinstance(wanted, str) else self.matched[_key(wanted)]
        # A document without tokens is in no sequence.
        return [
            Target(name, tuple(self.documents[name])) for name in names if name in self.documents
        ]


def _key(match: Mapping[str, Any]) -> str:
    return json.dumps(match, sort_keys=True)


def _matched(file: Path, matches: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """By match, the documents whose metadata have its values; the file is read once."""
    found: dict[str, list[str]] = {key: [] for key in matches}
    if not matches:
        return found
    for document in store.read_table(file).to_pylist():
        fields = json.loads(document["metadata"])
        for key, match in matches.items():
            if all(name in fields and fields[name] == value for name, value in match.items()):
                found[key].append(document["document"])
    return found
