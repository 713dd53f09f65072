"""Monomials in m_N, m_L, m_B, m_D: the cells of a parametrization table.

An exponent is a number plus multiples of two symbols: alpha (the depth exponent) and p (the
duration exponent), so that a cell such as m_N^-1 m_L^(alpha-1) m_S^-1/2 is data that prints,
multiplies and evaluates. m_S = m_D / m_B is a name for a product, not a fifth variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from megatron_completedp.core.ratios import Ratios

SYMBOLS = ("m_N", "m_L", "m_B", "m_D")


@dataclass(frozen=True)
class Exponent:
    """constant + alpha_coefficient * alpha + duration_coefficient * p."""

    constant: Fraction = Fraction(0)
    alpha_coefficient: Fraction = Fraction(0)
    duration_coefficient: Fraction = Fraction(0)

    def __add__(self, other: Exponent | Fraction | int) -> Exponent:
        other = as_exponent(other)
        return Exponent(
            self.constant + other.constant,
            self.alpha_coefficient + other.alpha_coefficient,
            self.duration_coefficient + other.duration_coefficient,
        )

    __radd__ = __add__

    def __neg__(self) -> Exponent:
        return self.scaled(-1)

    def __sub__(self, other: Exponent | Fraction | int) -> Exponent:
        return self + (-as_exponent(other))

    def __rsub__(self, other: Exponent | Fraction | int) -> Exponent:
        return as_exponent(other) - self

    def __bool__(self) -> bool:
        return self != ZERO

    def scaled(self, factor: Fraction | int) -> Exponent:
        """This exponent times a number, e.g. 1/2 to turn a variance into a standard deviation."""
        return Exponent(
            self.constant * factor,
            self.alpha_coefficient * factor,
            self.duration_coefficient * factor,
        )

    def at(self, depth_alpha: float, duration_exponent: float) -> float:
        """The number at these values of alpha and p."""
        return (
            float(self.constant)
            + float(self.alpha_coefficient) * depth_alpha
            + float(self.duration_coefficient) * duration_exponent
        )

    def __str__(self) -> str:
        terms = [
            _signed(self.alpha_coefficient, "alpha"),
            _signed(self.duration_coefficient, "p"),
            _signed(self.constant, ""),
        ]
        # A positive term first, so that 1-alpha is not written -alpha+1.
        terms.sort(key=lambda term: term.startswith("-"))
        text = "".join(terms).removeprefix("+") or "0"
        return f"({text})" if sum(map(bool, terms)) > 1 else text


@dataclass(frozen=True)
class Monomial:
    """m_N^a m_L^b m_B^c m_D^d, with exponents that may contain alpha and p."""

    exponents: tuple[Exponent, Exponent, Exponent, Exponent]

    def __mul__(self, other: Monomial) -> Monomial:
        a, b, c, d = (x + y for x, y in zip(self.exponents, other.exponents, strict=True))
        return Monomial((a, b, c, d))

    def __pow__(self, power: Exponent | Fraction | int) -> Monomial:
        power = as_exponent(power)
        if all(exponent in (ZERO, ONE_EXPONENT, -ONE_EXPONENT) for exponent in self.exponents):
            a, b, c, d = (power.scaled(exponent.constant) for exponent in self.exponents)
        elif power == Exponent(power.constant):
            a, b, c, d = (exponent.scaled(power.constant) for exponent in self.exponents)
        else:
            raise ValueError(f"({self})^{power} is not a monomial with linear exponents")
        return Monomial((a, b, c, d))

    def restricted(self, symbols: tuple[str, ...]) -> Monomial:
        """This monomial with every ratio outside `symbols` set to 1."""
        a, b, c, d = (
            exponent if symbol in symbols else ZERO
            for symbol, exponent in zip(SYMBOLS, self.exponents, strict=True)
        )
        return Monomial((a, b, c, d))

    def factors(
        self, ratios: Ratios, depth_alpha: float, duration_exponent: float
    ) -> dict[str, float]:
        """The value of each ratio's power by symbol; exactly 1.0 wherever the ratio is 1."""
        return {
            symbol: getattr(ratios, symbol) ** exponent.at(depth_alpha, duration_exponent)
            for symbol, exponent in zip(SYMBOLS, self.exponents, strict=True)
        }

    def at(self, ratios: Ratios, depth_alpha: float = 1.0, duration_exponent: float = 0.5) -> float:
        """The value at these ratios."""
        value = 1.0
        for factor in self.factors(ratios, depth_alpha, duration_exponent).values():
            value *= factor
        return value

    def with_duration_exponent(self, duration_exponent: Fraction) -> Monomial:
        """This monomial with p replaced by a number; the paper's table has p = 1/2."""
        a, b, c, d = (
            Exponent(
                exponent.constant + exponent.duration_coefficient * duration_exponent,
                exponent.alpha_coefficient,
            )
            for exponent in self.exponents
        )
        return Monomial((a, b, c, d))

    def __str__(self) -> str:
        width, depth, batch, duration = self.exponents
        powers = [("m_N", width), ("m_L", depth)]
        # m_D^x m_B^-x is what the paper writes as m_S^x.
        if duration and batch == -duration:
            powers.append(("m_S", duration))
        else:
            powers += [("m_B", batch), ("m_D", duration)]
        return " ".join(_power(symbol, exponent) for symbol, exponent in powers if exponent) or "1"


def as_exponent(value: Exponent | Fraction | int) -> Exponent:
    """A number as an exponent without symbols."""
    return value if isinstance(value, Exponent) else Exponent(Fraction(value))


def _power(symbol: str, exponent: Exponent) -> str:
    return symbol if exponent == ONE_EXPONENT else f"{symbol}^{exponent}"


def _signed(coefficient: Fraction, symbol: str) -> str:
    if not coefficient:
        return ""
    sign = "-" if coefficient < 0 else "+"
    size = str(abs(coefficient))
    return sign + (symbol if symbol and size == "1" else size + symbol)


def _single(index: int) -> Monomial:
    a, b, c, d = (ONE_EXPONENT if place == index else ZERO for place in range(4))
    return Monomial((a, b, c, d))


ZERO = Exponent()
ONE_EXPONENT = Exponent(Fraction(1))
ALPHA = Exponent(alpha_coefficient=Fraction(1))
P = Exponent(duration_coefficient=Fraction(1))
HALF = Fraction(1, 2)

ONE = Monomial((ZERO, ZERO, ZERO, ZERO))
M_N, M_L, M_B, M_D = (_single(place) for place in range(4))
M_S = M_D * M_B**-1
