"""What the config dataclasses say about themselves: keys, types, defaults and help texts.

Loading, writing and flags all read the dataclasses through here, so a field is declared once.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

#: Metadata of a section whose keys stand in the parent's mapping instead of one of their own.
INLINE: MappingProxyType[str, Any] = MappingProxyType({"inline": True})

#: Metadata of a section that users give as the path of a file; read, it is written out.
FROM_FILE: MappingProxyType[str, Any] = MappingProxyType({"from_file": True})


@dataclass(frozen=True)
class Entry:
    """One field of a config dataclass."""

    name: str
    """Its key in YAML."""
    annotation: Any
    """Its type, without `| None`."""
    optional: bool
    """Whether null is a value."""
    default: Any
    """What stands when the key is left out; MISSING when it may not be."""
    doc: str
    """The string under the field."""
    inline: bool
    """A section whose keys stand in the parent's mapping."""
    from_file: bool
    """A section given as the path of a file."""

    @property
    def is_section(self) -> bool:
        """Whether the value is given as a mapping with fields of its own."""
        return is_dataclass(self.annotation) and not self.from_file


def entries(cls: type) -> tuple[Entry, ...]:
    """The fields of the dataclass `cls`, in order."""
    hints, docs = get_type_hints(cls), _field_docs(cls)
    found = []
    for item in fields(cls):
        annotation, optional = _split_optional(hints[item.name])
        default = item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        found.append(
            Entry(
                name=item.name,
                annotation=annotation,
                optional=optional,
                default=default,
                doc=docs.get(item.name, ""),
                inline=bool(item.metadata.get("inline")),
                from_file=bool(item.metadata.get("from_file")),
            )
        )
    return tuple(found)


def keys(cls: type) -> Iterator[Entry]:
    """The keys of the section `cls` in a file: `entries` with inlined sections opened."""
    for entry in entries(cls):
        if entry.inline:
            yield from keys(entry.annotation)
        else:
            yield entry


def leaf_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted path of every value in the section `cls` and below."""
    for entry in keys(cls):
        if entry.is_section:
            yield from leaf_paths(entry.annotation, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def _split_optional(annotation: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True), any other type as (itself, False)."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    (inner,) = (part for part in get_args(annotation) if part is not NoneType)
    return inner, True


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of `cls`; only the source still has them."""
    docs = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            docs.update(_own_field_docs(base))
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs
