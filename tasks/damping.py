"""The damping that a params file names."""

from influence.damping import AbsoluteDamping, RelativeDamping
from tasks.params import Ratio, Value


def damping_rule(given: Ratio | Value) -> AbsoluteDamping | RelativeDamping:
    """The rule that a `damping` section names."""
    if isinstance(given, Ratio):
        return RelativeDamping(given.ratio)
    return AbsoluteDamping(given.value)
