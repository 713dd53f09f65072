"""Resolved numbers: identity at the base, composition, betas, tied embeddings and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from core_cases import SMALL, all_rules, quick, resolve_small
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import (
    DepthProfiles,
    LayerProfiles,
    ModuleMultipliers,
    Multipliers,
)
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.roles import GAIN_ROLES, Module
from megatron_completedp.core.tables import PARAMETRIZATIONS, Rules
from megatron_completedp.errors import ConfigError, HyperparamError

#: Products of fewer than ten factors, and 1 - (1 - x) for x >= 0.02, which costs up to 1e-14.
RELATIVE = 1e-12

positive = st.floats(1e-12, 1e3)
betas = st.floats(1e-6, 1 - 1e-6)
bases = st.builds(
    BaseHyperparams,
    lr=positive,
    weight_decay=st.floats(0, 10),
    gain_weight_decay=st.floats(0, 10),
    eps=positive,
    beta1=betas,
    beta2=betas,
    embedding_init_std=positive,
    hidden_init_std=positive,
    unembedding_init_std=positive,
)


def beta1_at(
    base: float, ratios: Ratios, mult: float = 1.0, depth: tuple[float, ...] = ()
) -> tuple[float, tuple[str, ...]]:
    """The resolved beta1 of q in layer 0, and the notes of the run; beta2 stays out of the way."""
    resolved = resolve_small(
        ratios,
        base=BaseHyperparams(lr=1e-3, beta1=base, beta2=1 - 1e-9),
        multipliers=Multipliers(
            types={Module.Q: ModuleMultipliers(one_minus_beta1_mult=mult)},
            depth=DepthProfiles(one_minus_beta1_mult=depth),
        ),
    )
    return resolved.get(Module.Q, 0).beta1, resolved.notes


@quick
@given(all_rules, bases)
def test_identity_is_bit_for_bit(rules: Rules, base: BaseHyperparams) -> None:
    """At the base shape every number is the user's own, betas below 1/2 included."""
    resolved = resolve_small(rules=rules, base=base)
    stds = {
        Module.EMBEDDING: base.embedding_init_std,
        Module.UNEMBEDDING: base.unembedding_init_std,
    }
    for entry in resolved.modules:
        gain = entry.role in GAIN_ROLES
        decay = base.gain_weight_decay if gain else base.weight_decay
        assert entry.optimizer_values == (base.lr, decay, base.eps, base.beta1, base.beta2)
        std = None if gain else stds.get(entry.module, base.hidden_init_std)
        assert entry.init_std == std
    assert {(r.attention, r.mlp) for r in resolved.residual} == {(1.0, 1.0)}
    assert resolved.logit_multiplier == 1.0
    assert resolved.notes == ()


ONE_PER_ROLE = (
    (Module.EMBEDDING, None),
    (Module.Q, 0),
    (Module.DOWN, 1),
    (Module.MLP_NORM, 1),
    (Module.K_NORM, 0),
    (Module.FINAL_NORM, None),
    (Module.UNEMBEDDING, None),
)
small_moves = st.builds(
    Ratios,
    m_N=st.floats(0.5, 4),
    m_L=st.floats(0.5, 4),
    m_B=st.floats(0.5, 2),
    m_D=st.floats(0.5, 2),
)


@settings(quick, max_examples=15)  # eight resolutions each
@given(all_rules, small_moves, small_moves, st.floats(1e-3, 0.02))
def test_moving_twice_is_moving_once(
    rules: Rules, first: Ratios, second: Ratios, one_minus_beta: float
) -> None:
    """The numbers of a run serve as the base of the next; kappa <= 16 keeps the betas linear."""
    beta = 1 - one_minus_beta
    base = BaseHyperparams(lr=1e-3, gain_weight_decay=0.1, beta1=beta, beta2=beta)
    once = resolve_small(
        Ratios(
            m_N=first.m_N * second.m_N,
            m_L=first.m_L * second.m_L,
            m_B=first.m_B * second.m_B,
            m_D=first.m_D * second.m_D,
        ),
        rules,
        base,
    )
    halfway = resolve_small(first, rules, base)
    for entry in (once.get(*place) for place in ONE_PER_ROLE):
        here = halfway.get(entry.module, entry.layer)
        std = here.init_std or 1.0
        next_base = BaseHyperparams(
            lr=here.lr,
            weight_decay=here.weight_decay,
            gain_weight_decay=here.weight_decay,
            eps=here.eps,
            beta1=here.beta1,
            beta2=here.beta2,
            embedding_init_std=std,
            hidden_init_std=std,
            unembedding_init_std=std,
        )
        twice = resolve_small(second, rules, next_base).get(entry.module, entry.layer)
        for name in ("lr", "weight_decay", "eps"):
            assert getattr(twice, name) == pytest.approx(getattr(entry, name), rel=RELATIVE), name
        assert (twice.init_std or 1.0) == pytest.approx(entry.init_std or 1.0, rel=RELATIVE)
        # A number near 1 is kept to 1e-16; a handful of roundings.
        assert twice.beta1 == pytest.approx(entry.beta1, abs=1e-15)


def test_a_value_is_base_times_type_times_depth_times_rule() -> None:
    multipliers = Multipliers(
        types={Module.Q: ModuleMultipliers(lr_mult=3.0, init_std_mult=0.5)},
        depth=DepthProfiles(lr_mult=(0.5, 2.0), attention_residual_mult=(4.0, 0.25)),
        attention_residual_mult=1.5,
        mlp_residual_mult=0.75,
    )
    ratios = Ratios(m_N=4, m_L=2, m_B=2, m_D=8)  # m_S = 4
    resolved = resolve_small(ratios, Rules(depth_alpha=0.5), multipliers=multipliers)
    q = resolved.get(Module.Q, 1)
    # m_N^-1 m_L^-1/2 m_S^-1/2 = 1/4 * 1/sqrt(2) * 1/2
    assert q.lr == pytest.approx(3e-3 * 3 * 2 / (8 * math.sqrt(2)), rel=RELATIVE)
    assert q.init_std == pytest.approx(0.02 * 0.5 / 2, rel=RELATIVE)
    assert q.factors["lr"].value == q.lr
    assert q.factors["lr"].rule == "m_N^-1 m_L^(alpha-1) m_B^1/2 m_D^-p"
    # k has the depth factor but not q's type factor; the embedding has neither.
    k = resolved.get(Module.K, 0)
    assert k.lr == pytest.approx(3e-3 * 0.5 / (8 * math.sqrt(2)), rel=RELATIVE)
    assert resolved.get(Module.EMBEDDING, None).lr == pytest.approx(3e-3 / 2, rel=RELATIVE)
    branch = resolved.residual[0]
    assert branch.attention == pytest.approx(1.5 * 4 / math.sqrt(2), rel=RELATIVE)
    assert branch.mlp == pytest.approx(0.75 / math.sqrt(2), rel=RELATIVE)


def test_a_module_may_have_a_profile_of_its_own() -> None:
    """It multiplies the shared one, moves with it, and shows in the depth factor."""
    own = LayerProfiles(lr_mult=(0.25, 4.0))
    multipliers = Multipliers(depth=DepthProfiles(lr_mult=(0.5, 2.0)), layers={Module.Q: own})
    resolved = resolve_small(multipliers=multipliers)
    assert resolved.get(Module.Q, 0).factors["lr"].depth == 0.125
    assert resolved.get(Module.Q, 1).lr == 3e-3 * 8.0
    assert resolved.get(Module.K, 1).lr == 3e-3 * 2.0
    deeper = resolve(
        replace(SMALL, num_layers=8), Ratios(m_L=4), Rules(), BaseHyperparams(lr=1.0), multipliers
    )
    # As by hand in test_core_multipliers: 8 layers read 2 at -1, -1, -3/4, -1/4, ... log2 steps.
    logs = [math.log2(deeper.get(Module.Q, layer).factors["lr"].depth) for layer in range(8)]
    assert logs == pytest.approx([-3, -3, -2.25, -0.75, 0.75, 2.25, 3, 3], rel=RELATIVE)


def test_every_module_of_every_layer_once() -> None:
    resolved = resolve_small()
    places = [(entry.module, entry.layer) for entry in resolved.modules]
    assert len(places) == len(set(places)) == 3 + 2 * 11
    with pytest.raises(KeyError):
        resolved.get(Module.Q, 2)


@pytest.mark.parametrize(
    ("beta", "m_B", "m_D", "expected"),
    [
        (0.9, 2, 1, 0.8),
        (0.95, 4, 1, 0.8),
        (0.9, 1, 4, 0.975),
        (0.9, 4.75, 1, 0.525),  # (1 - beta) * kappa = 0.475
    ],
)
def test_linear_rule_below_the_limit(beta: float, m_B: float, m_D: float, expected: float) -> None:
    got, notes = beta1_at(beta, Ratios(m_B=m_B, m_D=m_D))
    assert got == pytest.approx(expected, rel=RELATIVE)
    assert notes == ()


@pytest.mark.parametrize(
    ("beta", "m_B", "m_D", "expected"),
    [
        (0.75, 2, 1, 0.5625),  # exactly at the limit
        (0.9, 5, 1, 0.59049),  # at the limit but for the rounding of 1 - 0.9
        (0.9, 16, 1, 0.9**16),  # the linear rule would give -0.6
        (0.25, 1, 1.25, 0.25**0.8),  # a beta below 1/2 that moves
        (0.9, 64, 4, 0.9**16),  # kappa is m_B / m_D
    ],
)
def test_power_rule_from_the_limit_on(beta: float, m_B: float, m_D: float, expected: float) -> None:
    got, notes = beta1_at(beta, Ratios(m_B=m_B, m_D=m_D))
    assert got == pytest.approx(expected, rel=RELATIVE)
    assert len(notes) == 1
    assert notes[0].startswith("beta1: (1 - beta1) * kappa = ")
    assert f"kappa = m_B/m_D = {m_B / m_D:g}" in notes[0]


@quick
@given(st.floats(1e-4, 0.1), st.floats(1, 4))
def test_the_two_beta_rules_agree_to_first_order(x: float, kappa: float) -> None:
    """(1 - x)^kappa lies above 1 - kappa x (Bernoulli) by at most (kappa x)^2 / 2 (Taylor)."""
    linear, _ = beta1_at(1 - x, Ratios(m_B=kappa))
    difference = (1 - x) ** kappa - linear
    assert -1e-15 <= difference <= (kappa * x) ** 2 / 2 + 1e-15  # 1e-15: rounding of numbers near 1


def test_multipliers_act_on_one_minus_beta_before_the_power_rule() -> None:
    assert beta1_at(0.9, Ratios(m_B=2), mult=2.0)[0] == pytest.approx(0.6, rel=RELATIVE)
    assert beta1_at(0.9, Ratios(m_B=4), mult=2.0)[0] == pytest.approx(0.8**4, rel=RELATIVE)
    # Without a batch or duration to scale by there is no power to take.
    assert beta1_at(0.9, Ratios(), mult=8.0) == (pytest.approx(0.2, rel=RELATIVE), ())


def test_a_multiplier_that_undoes_kappa_does_not_undo_the_power_rule() -> None:
    """0.6 * 0.5 * 2 is the base's 0.6 again, yet the tuned beta is 0.7 and the rule 0.7^2."""
    got, notes = beta1_at(0.4, Ratios(m_B=2), mult=0.5)
    assert got == pytest.approx(0.49, rel=RELATIVE)
    assert any("beta1^kappa = 0.49 " in note for note in notes)


def test_batch_and_duration_that_cancel_leave_betas_alone() -> None:
    """49 * (1/49) rounds to less than 1; that is no move and earns no note."""
    got, notes = beta1_at(0.3, Ratios(m_B=49, m_D=49))
    assert got == pytest.approx(0.3, rel=RELATIVE)
    assert notes == ()


@pytest.mark.parametrize(("m_B", "mult"), [(1, 10.5), (1, 20), (4, 20), (4096, 9.9)])
def test_a_beta_outside_its_range_names_itself_and_the_fix(m_B: float, mult: float) -> None:
    with pytest.raises(HyperparamError) as caught:
        beta1_at(0.9, Ratios(m_B=m_B), mult=mult)
    message = str(caught.value)
    becomes = 0 if mult < 10 else 1 - 0.1 * mult  # 0.01^4096 underflows
    assert f"beta1 of q in layer 0 becomes {becomes:g}: 1 - beta = 0.1 at the base" in message
    assert f"times {mult:g} from the multipliers, times {m_B:g} from batch" in message
    assert "Expected a value in (0, 1); lower the one_minus_beta multiplier" in message


def test_the_layer_of_a_refused_beta_is_named() -> None:
    with pytest.raises(HyperparamError, match="beta1 of attention_norm in layer 1 becomes -1"):
        beta1_at(0.9, Ratios(), depth=(0.05, 20.0))


@pytest.mark.parametrize("name", ["mup", "completedp"])
def test_tied_embeddings_are_refused_where_the_rows_differ(name: str) -> None:
    tied = replace(SMALL, tied_embeddings=True)
    with pytest.raises(ConfigError, match=r"tied_embeddings is on.*Untie them, or use completep"):
        resolve(tied, Ratios(), Rules(parametrization=name), BaseHyperparams(lr=1e-3))


@pytest.mark.parametrize("name", ["sp", "completep"])
def test_tied_embeddings_are_accepted_where_the_rows_agree(name: str) -> None:
    tied = replace(SMALL, tied_embeddings=True)
    rules, base = Rules(parametrization=name), BaseHyperparams(lr=1e-3)
    resolved = resolve(tied, Ratios(m_N=2), rules, base)
    assert Module.UNEMBEDDING not in {entry.module for entry in resolved.modules}
    assert resolved.get(Module.EMBEDDING, None).lr == 1e-3
    with pytest.raises(ConfigError, match=r"embedding_init_std 0.02 and unembedding_init_std 0.1"):
        resolve(tied, Ratios(), rules, replace(base, unembedding_init_std=0.1))


@pytest.mark.parametrize(
    ("shape", "module"),
    [
        (replace(SMALL, activation="gelu"), Module.GATE),
        (replace(SMALL, tied_embeddings=True), Module.UNEMBEDDING),
    ],
)
def test_multipliers_of_a_missing_module_are_refused(shape: object, module: Module) -> None:
    multipliers = Multipliers(types={module: ModuleMultipliers(lr_mult=2.0)})
    with pytest.raises(ConfigError, match=f"names {module}, which this model lacks; its modules"):
        resolve(shape, Ratios(), Rules(parametrization="sp"), BaseHyperparams(lr=1e-3), multipliers)


def test_layers_of_a_missing_module_are_refused() -> None:
    shape = replace(SMALL, activation="gelu")
    multipliers = Multipliers(layers={Module.GATE: LayerProfiles(lr_mult=(0.5, 2.0))})
    with pytest.raises(
        ConfigError, match=r"multipliers\.layers names gate, which this model lacks"
    ):
        resolve(shape, Ratios(), Rules(), BaseHyperparams(lr=1e-3), multipliers)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lr", 0.0, "a positive number"),
        ("lr", math.nan, "a positive number"),
        ("eps", math.inf, "a positive number"),
        ("beta1", 1.0, r"a value in \(0, 1\)"),
        ("beta2", 0.0, r"a value in \(0, 1\)"),
        ("weight_decay", -0.1, "0 or more"),
        ("gain_weight_decay", math.nan, "0 or more"),
        ("hidden_init_std", -0.02, "a positive number"),
    ],
)
def test_bad_base_values_name_the_field(field: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"hyperparams.{field} is {value}; expected {expected}"):
        BaseHyperparams(**{"lr": 1e-3, field: value})


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_hash_follows_the_numbers(name: str) -> None:
    rules = Rules(parametrization=name)
    once, again = resolve_small(rules=rules), resolve_small(rules=rules)
    assert once.sha256 == again.sha256
    moved = resolve_small(rules=rules, base=BaseHyperparams(lr=math.nextafter(3e-3, 1)))
    assert once.sha256 != moved.sha256
