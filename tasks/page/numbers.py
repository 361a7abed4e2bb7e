"""Numbers as a person reads them: signed nats, percent, counts, digests."""

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST_PLAIN = 1e-3  # below, leading zeros are harder to read than a power of ten


@dataclass(frozen=True, slots=True)
class Nats:
    """One unit and one number of decimals for all the scores that are read side by side."""

    exponent: int
    decimals: int

    @classmethod
    def of(cls, largest: float, exponent: int | None = None) -> "Nats":
        """Three significant digits for `largest` (its sign does not matter).

        exponent: that of the unit, where it is already settled.
        """
        largest = abs(largest)
        if not math.isfinite(largest):
            raise ValueError(f"a score of {largest} nats is no finite number; rerun `score`")
        if largest == 0:
            return cls(exponent=exponent or 0, decimals=1)
        power = math.floor(math.log10(largest))
        if exponent is None:
            exponent = 0 if largest >= _SMALLEST_PLAIN else 3 * (power // 3)
        return cls(exponent=exponent, decimals=max(0, 2 - power + exponent))

    @property
    def unit(self) -> str:
        """What to write after a number: "nats", or "×10⁻⁶ nats"."""
        return f"×10{str(self.exponent).translate(_SUPERSCRIPTS)} nats" if self.exponent else "nats"

    def signed(self, value: float, decimals: int | None = None) -> str:
        """The number without its unit, "+0.00312"; a zero has no sign."""
        places = self.decimals if decimals is None else decimals
        digits = f"{abs(value) / 10**self.exponent:,.{places}f}"
        if not any(digit in digits for digit in "123456789"):
            return digits if value == 0 else f"{_sign(value)}<{digits[:-1]}1"
        return _sign(value) + digits

    def full(self, value: float) -> str:
        """The number with its unit."""
        return f"{self.signed(value)} {self.unit}"


def _sign(value: float) -> str:
    return MINUS if value < 0 else "+"


def plain(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, with a power of ten where that is shorter."""
    if value != value or math.isinf(value):
        return "not a number" if value != value else f"{MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if -3 <= power < 6:
        text = f"{value:,.{max(0, digits - 1 - power)}f}"
    else:
        tens = str(power).translate(_SUPERSCRIPTS)
        text = f"{value / 10**power:.{digits - 1}f}×10{tens}"
    return text.replace("-", MINUS)


def percent(share: float, digits: int = 1) -> str:
    """A share in 0..1 as percent."""
    return f"{100 * share:.{digits}f} %".replace("-", MINUS)


def change_in_probability(nats: float) -> str:
    """What so many nats of log p do to p: "0.31 % more probable", "20 times as probable"."""
    if nats > math.log(2):
        return f"{plain(math.exp(min(nats, 500.0)), 2)} times as probable"
    change = 100 * math.expm1(nats)
    return f"{plain(abs(change), 2)} % {'more' if change >= 0 else 'less'} probable"


def correlation(value: float) -> str:
    """A correlation; one that only rounds to 1 does not claim to be 1."""
    if 0.9995 <= value < 1:
        return f"{math.floor(value * 1e4) / 1e4:.4f}"
    return f"{value:.3f}".replace("-", MINUS)


def ratio(value: float, largest: float) -> float:
    """|value| / |largest| in 0..1; 0 where `largest` is 0."""
    return min(1.0, abs(value) / abs(largest)) if largest else 0.0
