"""Monomials: algebra, evaluation and the text they print."""

from __future__ import annotations

from fractions import Fraction

import pytest
from core_cases import all_ratios, alphas, duration_exponents, quick
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.core.monomial import (
    ALPHA,
    HALF,
    M_B,
    M_D,
    M_L,
    M_N,
    M_S,
    ONE,
    ZERO,
    Exponent,
    Monomial,
    P,
)
from megatron_completedp.core.ratios import Ratios

#: At most eight powers of numbers in [1/64, 64], each within an ulp or two: far below 1e-12.
RELATIVE = 1e-12

fractions = st.sampled_from([Fraction(quarters, 4) for quarters in range(-8, 9)])
#: Drawn from a list: building each from three fractions would triple the time of this file.
exponents = st.sampled_from(
    [
        Exponent(constant, alpha, p)
        for constant in (Fraction(-1), Fraction(0), Fraction(1, 2))
        for alpha in (Fraction(-1, 2), Fraction(0), Fraction(1))
        for p in (Fraction(-1), Fraction(0), Fraction(3, 4))
    ]
)
monomials = st.builds(lambda *powers: Monomial(powers), *[exponents] * 4)


@quick
@given(monomials, monomials, all_ratios, alphas, duration_exponents)
def test_product_evaluates_to_the_product_of_values(
    a: Monomial, b: Monomial, ratios: Ratios, alpha: float, p: float
) -> None:
    expected = a.at(ratios, alpha, p) * b.at(ratios, alpha, p)
    assert (a * b).at(ratios, alpha, p) == pytest.approx(expected, rel=RELATIVE)


@quick
@given(monomials, monomials, monomials)
def test_products_form_an_abelian_group(a: Monomial, b: Monomial, c: Monomial) -> None:
    assert a * b == b * a
    assert (a * b) * c == a * (b * c)
    assert a * ONE == a
    assert a * a**-1 == ONE


@quick
@given(monomials, fractions, all_ratios)
def test_numeric_power_evaluates_to_the_power_of_the_value(
    a: Monomial, power: Fraction, ratios: Ratios
) -> None:
    assert (a**power).at(ratios) == pytest.approx(a.at(ratios) ** float(power), rel=RELATIVE)


@quick
@given(exponents, all_ratios, alphas, duration_exponents)
def test_symbolic_power_of_a_product_of_ratios(
    power: Exponent, ratios: Ratios, alpha: float, p: float
) -> None:
    expected = (ratios.m_D / ratios.m_B) ** power.at(alpha, p)
    assert (M_S**power).at(ratios, alpha, p) == pytest.approx(expected, rel=RELATIVE)


def test_a_symbol_squared_is_refused() -> None:
    with pytest.raises(ValueError, match="linear exponents"):
        (M_L**ALPHA) ** ALPHA


def test_values_by_hand() -> None:
    ratios = Ratios(m_N=4, m_L=8, m_B=2, m_D=32)
    assert (M_N**-HALF).at(ratios) == 0.5
    assert (M_S**HALF).at(ratios) == pytest.approx(4, rel=RELATIVE)
    assert (M_L ** (ALPHA - 1)).at(ratios, depth_alpha=1.0) == 1.0
    assert (M_L ** (ALPHA - 1)).at(ratios, depth_alpha=2 / 3) == pytest.approx(0.5, rel=RELATIVE)
    assert (M_D**-P).at(ratios, duration_exponent=0.4) == pytest.approx(0.25, rel=RELATIVE)


@quick
@given(monomials, alphas, duration_exponents)
def test_exactly_one_at_ratio_one(a: Monomial, alpha: float, p: float) -> None:
    assert a.at(Ratios(), alpha, p) == 1.0


def test_restriction_sets_the_other_ratios_to_one() -> None:
    cell = M_N**-1 * M_L**-ALPHA * M_S**HALF
    assert cell.restricted(("m_N", "m_D")) == M_N**-1 * M_D**HALF
    assert cell.restricted(()) == ONE


def test_exponents_subtract_from_either_side() -> None:
    assert 1 - ALPHA == -(ALPHA - 1) == Exponent(Fraction(1), Fraction(-1))
    assert not ALPHA - ALPHA
    assert ALPHA - ALPHA == ZERO


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (ONE, "1"),
        (M_N, "m_N"),
        (M_N**-1 * M_L ** (ALPHA - 1) * M_S**-HALF, "m_N^-1 m_L^(alpha-1) m_S^-1/2"),
        (M_L ** (1 - ALPHA), "m_L^(1-alpha)"),
        (M_L**-ALPHA, "m_L^-alpha"),
        (M_S**-1, "m_S^-1"),
        (M_S, "m_S"),
        (M_B**HALF, "m_B^1/2"),
        (M_B**HALF * M_D**-P, "m_B^1/2 m_D^-p"),
        (M_B**HALF * M_D ** (P - 1), "m_B^1/2 m_D^(p-1)"),
        ((M_B**HALF * M_D**-P).with_duration_exponent(HALF), "m_S^-1/2"),
        (M_D ** Exponent(Fraction(1), Fraction(-2), Fraction(1)), "m_D^(p+1-2alpha)"),
    ],
)
def test_text(cell: Monomial, text: str) -> None:
    assert str(cell) == text
