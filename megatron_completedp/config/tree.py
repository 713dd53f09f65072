"""Strict YAML to frozen dataclasses and back. No inheritance, no interpolation, no surprises.

The steps are read (YAML to plain mappings), merge (flags over YAML), build (mappings to
dataclasses, by annotation) and write (dataclasses to YAML that builds to an equal config).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megatron_completedp.config.schema import entries, keys, leaf_paths
from megatron_completedp.errors import ConfigError

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which plain YAML silently overwrites."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(
                    f"line {line}: merge keys (<<) are not supported; a run is one plain file. "
                    "Write the values out."
                )
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no key of a config; the base class refuses what cannot be one
            if key_node.value in seen:
                raise ConfigError(f"line {line}: {key_node.value!r} is given twice; remove one.")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`, unchecked but for duplicate keys."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {_show(tree)}; expected a mapping of sections.")
    return tree


def merge(tree: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree: `tree` with the values in `flags` put over it, section by section."""
    merged = dict(tree)
    for key, value in flags.items():
        below = merged.get(key)
        if not isinstance(value, Mapping):
            merged[key] = value
        # A section of the wrong type stays, for `build` to name.
        elif value and (below is None or isinstance(below, Mapping)):
            merged[key] = merge(below or {}, value)
    return merged


def build(cls: type[T], tree: object) -> T:
    """An instance of the config dataclass `cls` from plain mappings, lists and scalars.

    Raises ConfigError for unknown keys, missing keys and wrong types; the dataclass itself then
    checks the values.
    """
    return _build(cls, tree, "", cls)


def _build(cls: type[T], tree: object, path: str, root: type) -> T:
    """`build` for the section `cls` that stands at `path` of the whole config `root`."""
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{path} is {_show(tree)}; expected a section with keys "
            f"{', '.join(entry.name for entry in keys(cls))}. Remove it to get the defaults."
        )
    names = [entry.name for entry in keys(cls)]
    for key in tree:
        if key not in names:
            raise ConfigError(_unknown_key(str(key), names, path, root))
    missing = list(_missing(cls, tree, path))
    if missing:
        raise ConfigError(f"missing: {'; '.join(missing)}. Add to the YAML or give as flags.")
    values = {}
    for entry in entries(cls):
        if entry.inline:
            own = {key.name for key in keys(entry.annotation)}
            part = {name: value for name, value in tree.items() if name in own}
            values[entry.name] = _build(entry.annotation, part, path, root)
        elif entry.name in tree:
            value, where = tree[entry.name], _join(path, entry.name)
            null = value is None and entry.optional
            values[entry.name] = None if null else _convert(entry.annotation, value, where, root)
    return cls(**values)


def to_tree(config: object) -> dict[str, Any]:
    """The plain mappings, lists and scalars from which `build` makes an equal config."""
    tree: dict[str, Any] = {}
    for entry in entries(type(config)):
        value = getattr(config, entry.name)
        if entry.inline:
            tree.update(to_tree(value))
        else:
            tree[entry.name] = _plain(value)
    return tree


def to_yaml(config: object) -> str:
    """YAML with every value of `config` written out; loading it gives an equal config."""
    return str(yaml.safe_dump(to_tree(config), sort_keys=False))


def given_tree(config: object) -> dict[str, Any]:
    """`to_tree` without the values that are at their defaults: what an identity is made of.

    A field that a later version adds then makes no other config of an old one, as long as its
    default does what was done before.
    """
    tree: dict[str, Any] = {}
    for entry in entries(type(config)):
        value = getattr(config, entry.name)
        if entry.inline:
            tree.update(given_tree(value))
        elif entry.default is MISSING or value != entry.default:
            tree[entry.name] = given_tree(value) if is_dataclass(value) else _plain(value)
    return tree


def _missing(cls: type, tree: Mapping[str, Any], path: str) -> Iterator[str]:
    """The required fields that `tree` lacks, with those of whole sections that it lacks."""
    for entry in keys(cls):
        where = _join(path, entry.name)
        if entry.name in tree or entry.default is not MISSING:
            continue
        if entry.is_section:
            yield from _missing(entry.annotation, {}, where)
        else:
            yield f"{where} ({entry.doc.rstrip('.')})"


def _convert(annotation: Any, value: object, path: str, root: type) -> Any:
    """`value` as `annotation` asks, or a ConfigError naming path, value and expected type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation):
        return _build(annotation, value, path, root)  # type: ignore[arg-type]
    if origin is Literal:
        return _one_of(arguments, value, path)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return annotation(_one_of([str(member) for member in annotation], value, path))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, "a list")
        return tuple(
            _convert(arguments[0], item, f"{path}[{index}]", root)
            for index, item in enumerate(value)
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _convert_mapping(arguments[0], arguments[1], value, path, root)
    return _convert_scalar(annotation, value, path)


def _one_of(names: Sequence[str], value: object, path: str) -> str:
    if isinstance(value, str) and value in names:
        return value
    raise _wrong(path, value, f"one of {', '.join(names)}")


def _convert_mapping(
    key_type: type[str], value_type: type, value: object, path: str, root: type
) -> Mapping[str, Any]:
    """A mapping whose keys are a StrEnum's members, or any text."""
    if not isinstance(value, Mapping):
        raise _wrong(path, value, "a mapping")
    if issubclass(key_type, StrEnum):
        names = [str(member) for member in key_type]
        for key in value:
            if key not in names:
                raise ConfigError(_unknown_key(str(key), names, path, root))
    return MappingProxyType(
        {
            key_type(key): _convert(value_type, item, _join(path, str(key)), root)
            for key, item in value.items()
        }
    )


def _convert_scalar(kind: type, value: object, path: str) -> bool | int | float | str:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(path, value, "true or false")
    if kind is str:
        if isinstance(value, str):
            return value
        raise _wrong(path, value, "text (quote it if it is meant as text)")
    number = _number(value)
    if kind is int:
        if number is not None and number == int(number):
            return int(number)
        raise _wrong(path, value, "a whole number")
    assert kind is float, f"config field {path} has an unsupported type {kind}"
    if number is not None:
        return float(number)
    raise _wrong(path, value, "a finite number")


def _number(value: object) -> int | float | None:
    """A finite number, also from text: YAML 1.1 reads 3e-3 and 1.6e9 as strings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None


def _plain(value: object) -> Any:
    if is_dataclass(value):
        return to_tree(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def _unknown_key(key: str, names: list[str], path: str, root: type) -> str:
    """The message for a key that is not among `names` of the section at `path` of `root`."""
    near = [_join(path, name) for name in difflib.get_close_matches(key, names)]
    # A right name in the wrong section is as common as a misspelt one.
    near += [leaf for leaf in leaf_paths(root) if leaf.split(".")[-1] == key]
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}."
    return f"unknown key {_join(path, key)}; {hint}"


def _wrong(path: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{path} is {_show(value)}; expected {expected}.")


def _show(value: object) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
