"""Attention as plain products, which are all that operations are counted of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks.attributed import Attributed, PassReference


@contextmanager
def eager_attention() -> Iterator[None]:
    """In the models that stages load; these are kept for whoever comes next, so it is undone."""
    original, changed = PassReference.attributed, dict[int, tuple[Any, str]]()

    def attributed(reference: PassReference) -> Attributed:
        found = original(reference)
        model: Any = found.model
        changed.setdefault(id(model), (model, model.config._attn_implementation))
        model.set_attn_implementation("eager")
        return found

    PassReference.attributed = attributed
    try:
        yield
    finally:
        PassReference.attributed = original
        for model, implementation in changed.values():
            model.set_attn_implementation(implementation)
