"""Tables for people: the rules as markdown or text, and a resolved run explained line by line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from textwrap import wrap

from megatron_completedp.core.budget import Budget
from megatron_completedp.core.hyperparams import Factors, Resolved, ResolvedHyperparams
from megatron_completedp.core.monomial import Monomial
from megatron_completedp.core.roles import BIAS_ROLES, Module, Role
from megatron_completedp.core.tables import PARAMETRIZATIONS, Row, Rules, build_table

#: How the paper's table names our roles.
ROLE_TITLES = {
    Role.EMBEDDING: "input embedding",
    Role.HIDDEN_WEIGHT: "hidden weight (q, k, v, gate, up)",
    Role.BRANCH_OUTPUT_WEIGHT: "hidden weight (o, down)",
    Role.HIDDEN_BIAS: "hidden bias",
    Role.PRE_NORM_GAIN: "pre-norm gain",
    Role.QK_NORM_GAIN: "QK-norm gain",
    Role.FINAL_NORM_GAIN: "final-norm gain",
    Role.UNEMBEDDING: "unembedding weight",
    Role.UNEMBEDDING_BIAS: "unembedding bias",
}

#: Characters of the module names in an explanation, so that its rows stay within 120 columns.
MODULES_WIDTH = 36

FACTOR_COLUMNS = ("base", "type", "depth", "m_N", "m_L", "m_B", "m_D")

HYPERPARAM_TITLES = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "eps": "Adam eps",
    "one_minus_beta1": "1 - beta1",
    "one_minus_beta2": "1 - beta2",
    "init_std": "init std",
}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """Aligned columns: the first `left` of them flush left, the others flush right.

    With `left` None the columns of numbers are flush right, the others left.
    """
    columns = []
    for index, column in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, column))
        words = index < left if left is not None else not all(map(_is_number, column[1:]))
        columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdigit()


def rules_markdown(rules: Rules) -> str:
    """One parametrization as the paper prints it (p = 1/2), as markdown with its global factors."""
    table = build_table(rules)
    rows = [
        [ROLE_TITLES[role], _initial(role, row), *map(_cell, (row.lr, row.eps, row.weight_decay))]
        for role, row in table.rows.items()
    ]
    header = ["role", "init variance", "learning rate", "Adam eps", "weight decay"]
    return (
        markdown_table(header, rows)
        + f"\n\nResidual multiplier {_cell(table.residual_multiplier)}, "
        + f"logit multiplier {_cell(table.logit_multiplier)}, "
        + f"1-beta1 and 1-beta2 x {_cell(table.one_minus_beta)}."
    )


def all_rules_markdown() -> str:
    """The four parametrizations, in the paper's order, with their default switches."""
    return "\n\n".join(
        f"**`{name}`**\n\n{rules_markdown(Rules(parametrization=name))}"
        for name in PARAMETRIZATIONS
    )


def render_plan(resolved: Resolved, budget: Budget) -> str:
    """A resolved run as text: sizes, the numbers by module, and every factor behind them."""
    rules, ratios = resolved.rules, resolved.ratios
    head = [
        f"parametrization {rules.parametrization}   depth_alpha {rules.depth_alpha:g}   "
        f"duration_exponent {rules.duration_exponent:g}   final_norm_eps {rules.final_norm_eps}   "
        f"depth_weight_decay {rules.depth_weight_decay}",
        f"ratios to the base: m_N {ratios.m_N:g} (width)   m_L {ratios.m_L:g} (depth)   "
        f"m_B {ratios.m_B:g} (batch)   m_D {ratios.m_D:g} (duration)   "
        f"m_S {ratios.m_S:g} (steps)",
        f"{budget.parameters:,} parameters ({budget.embedding_parameters:,} in the embeddings)   "
        f"{budget.flops:.3g} FLOPs (6 N D)",
        f"{budget.train_tokens:,} tokens in {budget.steps:,} steps of {budget.batch_tokens:,}",
    ]
    parts = ["\n".join(head), _summary(resolved), _residual(resolved)]
    parts += [_explanation(resolved, name) for name in HYPERPARAM_TITLES]
    parts += [f"note: {note}" for note in resolved.notes]
    return "\n\n".join(parts)


def _summary(resolved: Resolved) -> str:
    def numbers(entry: ResolvedHyperparams) -> tuple[str, ...]:
        return (
            entry.role.value,
            _number(entry.lr),
            _number(entry.weight_decay),
            _number(entry.eps),
            _number(entry.beta1),
            _number(entry.beta2),
            "starts at 1" if entry.init_std is None else _number(entry.init_std),
        )

    header = ["module", "layers", "role", "lr", "weight decay", "eps", "beta1", "beta2", "init std"]
    rows = _grouped((entry, numbers(entry)) for entry in resolved.modules)
    return text_table(header, rows, left=3)


def _residual(resolved: Resolved) -> str:
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in resolved.residual:
        groups.setdefault((_number(entry.attention), _number(entry.mlp)), []).append(entry.layer)
    rows = [[layer_ranges(layers), *numbers] for numbers, layers in groups.items()]
    table = text_table(["layers", "attention branch x", "MLP branch x"], rows)
    return f"residual multipliers\n{table}\nlogits x {_number(resolved.logit_multiplier)}"


def _explanation(resolved: Resolved, name: str) -> str:
    def cells(entry: ResolvedHyperparams, factors: Factors) -> tuple[str, ...]:
        columns = [_number(getattr(factors, column)) for column in FACTOR_COLUMNS]
        # What the module trains with: a beta under the fallback is not the product of its row.
        betas = {"one_minus_beta1": 1 - entry.beta1, "one_minus_beta2": 1 - entry.beta2}
        return (*columns, _number(betas.get(name, factors.value)))

    by_rule: dict[str, list[tuple[ResolvedHyperparams, tuple[str, ...]]]] = {}
    for entry in resolved.modules:
        if name in entry.factors:
            factors = entry.factors[name]
            by_rule.setdefault(factors.rule, []).append((entry, cells(entry, factors)))
    header = ["modules", "layers", *FACTOR_COLUMNS, "= value"]
    rows = []
    for rule, entries in by_rule.items():
        rows.append([f"x {rule}"] + [""] * (len(header) - 1))
        for modules, *rest in _grouped(entries, merge_modules=True):
            # Wrapped, or a row that holds for every module would not fit a terminal.
            first, *more = wrap(modules, MODULES_WIDTH)
            rows.append([f"  {first}", *rest])
            rows += [[f"  {line}"] + [""] * (len(header) - 1) for line in more]
    table = text_table(header, rows, left=2)
    return f"{HYPERPARAM_TITLES[name]}\n{table}"


def _grouped(
    entries: Iterable[tuple[ResolvedHyperparams, tuple[str, ...]]], *, merge_modules: bool = False
) -> list[list[str]]:
    """Rows of (module, layers, *cells), with layers that agree in every cell on one row.

    With `merge_modules`, modules whose rows agree at the same layers share a row too.
    """
    layers: dict[tuple[Module, tuple[str, ...]], list[int]] = {}
    for entry, cells in entries:
        where = layers.setdefault((entry.module, cells), [])
        if entry.layer is not None:
            where.append(entry.layer)
    modules: dict[tuple[str, tuple[str, ...], Module | None], list[Module]] = {}
    for (module, cells), where in layers.items():
        key = (layer_ranges(where), cells, None if merge_modules else module)
        modules.setdefault(key, []).append(module)
    return [[" ".join(names), ranges, *cells] for (ranges, cells, _), names in modules.items()]


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layer numbers as text: 0-3, 5, 7-8; a dash for none."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"


def _initial(role: Role, row: Row) -> str:
    if row.init_variance is None:
        return "starts at 0" if role in BIAS_ROLES else "starts at 1"
    return _cell(row.init_variance)


def _cell(monomial: Monomial) -> str:
    return str(monomial.with_duration_exponent(Fraction(1, 2)))


def _number(value: float) -> str:
    return f"{value:.5g}"
