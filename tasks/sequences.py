"""The tokenised corpus, read back: memory-mapped tokens, batches, and fixed choices of rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence.objectives import counter_uniform
from influence.sequences import TokenBatch
from tasks import store


@dataclass(frozen=True, slots=True)
class TokenStore:
    """What stage `tokenize` wrote; a row is a sequence's place in sequences.parquet.

    Args:
        tokens: int32, all sequences end to end.
        supervised: uint8, of the same length.
        offsets: int64; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
        keys: int64, the stable key of each sequence.
        lengths: tokens of each sequence.
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor
    keys: Tensor
    lengths: Sequence[int]

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map artifacts/<run>/tokenize into memory; tokens are read when they are used."""
        tensors = store.read_tensors(folder / "tokens.safetensors")
        keys = store.read_table(folder / "sequences.parquet", ["key"])["key"]
        return cls(
            tensors["tokens"],
            tensors["supervised"],
            tensors["offsets"],
            torch.from_numpy(keys.to_numpy().copy()),
            tensors["offsets"].diff().tolist(),
        )

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def row_tokens(self, row: int) -> Tensor:
        """The tokens of one sequence, int32."""
        return self.tokens[self._slice(row)]

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """These sequences as a right-padded batch, in this order."""
        return TokenBatch.collate(
            [int(self.keys[row]) for row in rows],
            [self.row_tokens(row) for row in rows],
            [self.supervised[self._slice(row)].bool() for row in rows],
        )

    def fit_rows(self, num_rows: int, seed: int) -> list[int]:
        """A random choice of rows, sorted; all of them where there are no more than `num_rows`.

        It depends on the number of sequences, `num_rows` and `seed` alone: on no shard, library
        version or state. A larger choice with the same seed contains a smaller one.
        """
        return choose_rows(range(self.num_sequences), num_rows, seed)

    def shard_rows(self, rows: Sequence[int], num_shards: int) -> list[list[int]]:
        """Split rows into runs of about as many tokens each, in order; none is empty."""
        if not rows:
            return []
        lengths = torch.tensor([self.lengths[row] for row in rows])
        ends = lengths.cumsum(0)
        # A row goes to the shard that the middle of its tokens falls in.
        shard = (2 * ends - lengths) * num_shards // (2 * ends[-1])
        _, sizes = shard.unique_consecutive(return_counts=True)
        return [list(part) for part in _split(rows, sizes.tolist())]

    def _slice(self, row: int) -> slice:
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


def choose_rows(rows: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """A random choice of `num_rows` of these rows, sorted: those whose hash is smallest.

    The hash is keyed by the seed and by `rows` as a set. So choices from different sets are
    independent even under one seed: a control drawn from the candidates does not favour an audit
    that was drawn into them before. A larger choice from one set contains a smaller one.
    """
    pool = torch.tensor(rows, dtype=torch.int64).sort().values
    if len(pool) <= num_rows:
        return pool.tolist()
    of_pool = hashlib.blake2b(pool.numpy().astype("<i8").tobytes(), digest_size=8).digest()
    uniform = counter_uniform(seed ^ int.from_bytes(of_pool, "little"), pool, 1)[:, 0]
    return pool[uniform.argsort(stable=True)[:num_rows]].sort().values.tolist()


def _split(rows: Sequence[int], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for size in sizes:
        yield rows[start : start + size]
        start += size
