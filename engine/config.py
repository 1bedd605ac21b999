"""Configuration: strict YAML and `key=value` into frozen dataclasses, checked before any device.

Each dataclass lives beside the code that it configures and declares its fields with `setting` and
`section`; this file only knows how to read, check, hash and write them. All problems of a file are
reported at once. The canonical hash covers every value that can change a result, spelled out or
left at its default, and nothing else (`hashed=False`: folders, world size, logging).
Left out: includes, environment interpolation and code in YAML. A config is values.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from carillon.engine.access import explained
from carillon.engine.strict_yaml import YamlError, dump_yaml, parse_yaml

T = TypeVar("T")


class UserError(ValueError):
    """The user's input cannot be used: printed as one message, exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What `setting` knows of a field beyond its type."""

    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] | None = None
    hashed: bool = True


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    min: float | None = None,
    max: float | None = None,
    choices: Sequence[Any] | None = None,
    hashed: bool = True,
) -> Any:
    """Declare one value of a config dataclass; without a default the user must give it."""
    allowed = tuple(choices) if choices is not None else None
    rule = Rule(help=help, min=min, max=max, choices=allowed, hashed=hashed)
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def section(cls: type[Any], help: str = "", *, hashed: bool = True) -> Any:
    """Declare a nested config dataclass, by default all its defaults."""
    return field(default_factory=cls, metadata={"rule": Rule(help=help, hashed=hashed)})


def rule_of(item: Field[Any]) -> Rule:
    return typing.cast(Rule, item.metadata.get("rule", Rule(help="")))


def changed(config: Any, *names: str) -> list[str]:
    """Those of the named fields that do not stand at their default: for checks of settings that do
    nothing beside another."""
    defaults = {item.name: item.default for item in fields(config)}
    return [name for name in names if getattr(config, name) != defaults[name]]


def load(path: str | Path, overrides: Sequence[str], root: type[T]) -> T:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    Raises UserError naming every problem: a missing file, bad YAML, an unknown key (with the
    nearest known one), a wrong type, a value out of range, or fields that contradict each other.
    """
    values = read_values(path)
    for override in overrides:
        apply_override(values, override)
    return build(root, values, source=str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, checked for syntax only."""
    path = Path(path)
    try:
        text = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"config {path} is a folder; give a YAML file") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {explained(error)}") from None
    try:
        return parse_yaml(text, str(path))
    except YamlError as error:
        raise UserError(str(error)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in a nested mapping; the value is read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(
            f"override {override!r} is not key=value; write for example data.batch_size=64"
        )
    try:
        value = parse_yaml(f"value: {text}".encode(), f"override {key}")["value"]
    except YamlError as error:
        raise UserError(str(error)) from None
    for depth, part in enumerate(parts[:-1]):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(
                f"override {key}: {'.'.join(parts[: depth + 1])} is a value, not a section"
            )
    values[parts[-1]] = value


def build(root: type[T], values: Mapping[str, Any], *, source: str = "config") -> T:
    """Make `root` from nested mappings; every problem is named in one UserError."""
    problems: list[str] = []
    result = _build(root, values, "", problems)
    if not problems:
        problems.extend(_cross_checks(result, ""))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError(f"{source}: {len(problems)} {noun}\n{listed}")
    return typing.cast(T, result)


def _build(cls: type[Any], values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(
            f"{where or 'config'}: expected a section (key: value), got {_show(values)}"
        )
        return None
    known = {item.name: item for item in fields(cls)}
    problems.extend(_unknown_key(cls, where, str(key)) for key in values if key not in known)
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, item in known.items():
        dotted = f"{where}.{name}" if where else name
        if name in values:
            arguments[name] = _convert(hints[name], values[name], dotted, rule_of(item), problems)
        elif item.default is MISSING and item.default_factory is MISSING:
            problems.append(f"{dotted}: missing; {rule_of(item).help}")
    return None if problems else cls(**arguments)


def _unknown_key(cls: type[Any], where: str, key: str) -> str:
    names = [item.name for item in fields(cls)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    dotted = f"{where}.{key}" if where else key
    prefix = f"{where}." if where else ""
    if near:
        return f"{dotted}: unknown key; did you mean {prefix}{near[0]}?"
    return f"{dotted}: unknown key; {where or 'the top level'} has {', '.join(sorted(names))}"


def _convert(hint: Any, value: Any, where: str, rule: Rule, problems: list[str]) -> Any:
    before = len(problems)
    result = _typed(hint, value, where, rule, problems)
    if len(problems) > before:
        return None
    for item in result if isinstance(result, tuple) else (result,):
        problem = _range_problem(item, rule)
        if problem:
            problems.append(f"{where}: {_show(item)} given, {problem}")
    return result


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    """Membership by type too: Python takes true for 1 and 1.0 for 1."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _range_problem(value: Any, rule: Rule) -> str | None:
    if value is None:
        return None
    if rule.choices is not None and not _among(value, rule.choices):
        near = difflib.get_close_matches(str(value), [str(c) for c in rule.choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"allowed: {', '.join(str(choice) for choice in rule.choices)}{hint}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return "a finite number is needed"
        if rule.min is not None and value < rule.min:
            return f"at least {rule.min} is allowed"
        if rule.max is not None and value > rule.max:
            return f"at most {rule.max} is allowed"
    return None


def _typed(hint: Any, value: Any, where: str, rule: Rule, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _typed_union(
            [a for a in arguments if a is not type(None)], value, where, rule, problems
        )
    if is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where, problems)
    if origin is tuple:
        return _typed_list(arguments[0], value, where, rule, problems)
    if origin is dict:
        return _typed_dict(arguments[1], value, where, rule, problems)
    if origin is typing.Literal:
        if _among(value, arguments):
            return value
        allowed = ", ".join(map(str, arguments))
        problems.append(f"{where}: {_show(value)} given, allowed: {allowed}")
        return None
    return _typed_scalar(hint, value, where, problems)


def _typed_union(hints: list[Any], value: Any, where: str, rule: Rule, problems: list[str]) -> Any:
    kinds = {_kind(hint): hint for hint in hints if isinstance(hint, type) and is_dataclass(hint)}
    if kinds:
        return _typed_kind(kinds, value, where, rule, problems)
    attempts: list[list[str]] = []
    for hint in hints:
        attempt: list[str] = []
        result = _typed(hint, value, where, rule, attempt)
        if not attempt:
            return result
        attempts.append(attempt)
    problems.extend(attempts[0])
    return None


def _kind(cls: type[Any]) -> str:
    """The only value of `type` that one of several dataclasses for a section allows."""
    return str(typing.get_args(typing.get_type_hints(cls)["type"])[0])


def _typed_kind(
    kinds: dict[str, Any], value: Any, where: str, rule: Rule, problems: list[str]
) -> Any:
    """A section that is one of several dataclasses; `type` says which, the first if left out."""
    given = (
        value.get("type", next(iter(kinds))) if isinstance(value, Mapping) else next(iter(kinds))
    )
    if not isinstance(given, str) or given not in kinds:
        one_of = Rule(help="", choices=tuple(kinds))
        problems.append(f"{where}.type: {_show(given)} given, {_range_problem(given, one_of)}")
        return None
    return _typed(kinds[given], value, where, rule, problems)


def _typed_list(hint: Any, value: Any, where: str, rule: Rule, problems: list[str]) -> Any:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{where}: expected a list such as [a, b], got {_show(value)}")
        return None
    return tuple(_typed(hint, v, f"{where}[{i}]", rule, problems) for i, v in enumerate(value))


def _typed_dict(hint: Any, value: Any, where: str, rule: Rule, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping (key: value), got {_show(value)}")
        return None
    return {str(k): _typed(hint, v, f"{where}.{k}", rule, problems) for k, v in value.items()}


def _typed_scalar(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    problems.append(f"{where}: expected {names.get(hint, hint)}, got {_show(value)}")
    return None


def _show(value: Any) -> str:
    text = repr(value)
    kind = type(value).__name__
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def _cross_checks(config: Any, where: str) -> Iterator[str]:
    for name, below in _sections(config):
        yield from _cross_checks(below, f"{where}{name}.")
    check = getattr(config, "check", None)
    if check is not None:
        problems: Iterable[str] = check()
        yield from (f"{where}{problem}" for problem in problems)


def _sections(config: Any) -> Iterator[tuple[str, Any]]:
    """Config objects right below `config`, those under names of the user's choice included."""
    for item in fields(config):
        value = getattr(config, item.name)
        named = value.items() if isinstance(value, dict) else ()
        for name, one in [(item.name, value), *((f"{item.name}.{k}", v) for k, v in named)]:
            if is_dataclass(one):
                yield name, one


def to_values(config: Any, *, hashed_only: bool = False) -> dict[str, Any]:
    """Nested plain mappings of a config, defaults included, in field order."""
    result: dict[str, Any] = {}
    for item in fields(config):
        if hashed_only and not rule_of(item).hashed:
            continue
        result[item.name] = _plain(getattr(config, item.name), hashed_only)
    return result


def _plain(value: Any, hashed_only: bool) -> Any:
    if is_dataclass(value):
        return to_values(value, hashed_only=hashed_only)
    if isinstance(value, tuple):
        return [_plain(item, hashed_only) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, hashed_only) for key, item in value.items()}
    return value


def config_hash(config: Any) -> str:
    """SHA-256 of the canonical JSON of every hashed value; order and formatting do not matter."""
    text = json.dumps(to_values(config, hashed_only=True), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load` reads back to an equal object."""
    return dump_yaml(to_values(config))


@dataclass(frozen=True, kw_only=True)
class Documented:
    """One line of the settings page."""

    key: str
    type: str
    default: str
    help: str
    hashed: bool
    kind: str | None = None  # of a section that is one of several, by its `type`


def documented(root: type[Any], prefix: str = "", hashed: bool = True) -> Iterator[Documented]:
    """Every setting below `root`, depth first; `<name>` stands for a name that the user gives."""
    hints = typing.get_type_hints(root)
    for item in fields(root):
        rule, hint, key = rule_of(item), hints[item.name], f"{prefix}{item.name}"
        if is_dataclass(hint):
            yield from documented(typing.cast(type[Any], hint), f"{key}.", hashed and rule.hashed)
            continue
        several = [one for one in typing.get_args(hint) if is_dataclass(one)]
        if several and typing.get_origin(hint) is not dict:
            for one in several:
                cls = typing.cast(type[Any], one)
                for found in documented(cls, f"{key}.", hashed and rule.hashed):
                    yield dataclasses.replace(found, kind=_kind(cls))
            continue
        named = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if is_dataclass(named):
            below = typing.cast(type[Any], named)
            yield from documented(below, f"{key}.<name>.", hashed and rule.hashed)
            continue
        default = "required" if item.default is MISSING else json.dumps(item.default, default=list)
        if item.default_factory is not MISSING:
            default = json.dumps(item.default_factory(), default=list)
        yield Documented(
            key=key,
            type=_type_name(hint, rule),
            default=default,
            help=rule.help,
            hashed=hashed and rule.hashed,
        )


def _type_name(hint: Any, rule: Rule) -> str:
    """As a user reads it: `list of text or none`, `fp32 / bf16`, `number >= 0, <= 1`."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else rule.choices
    name = " / ".join(str(choice) for choice in choices) if choices else _plain_name(hint, rule)
    bounds = [f">= {rule.min:.9g}"] if rule.min is not None else []
    bounds += [f"<= {rule.max:.9g}"] if rule.max is not None else []
    return f"{name} {', '.join(bounds)}".strip()


def _plain_name(hint: Any, rule: Rule) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    unbounded = dataclasses.replace(rule, min=None, max=None)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(argument, unbounded) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0], unbounded)}"
    if origin is dict:
        return f"mapping to {_type_name(arguments[1], unbounded)}"
    names = {bool: "true / false", int: "whole number", float: "number", str: "text"}
    return names.get(hint, "none" if hint is type(None) else str(hint))


def replace(config: T, **sections: Any) -> T:
    """A copy with some fields replaced (dataclasses.replace, typed for config objects)."""
    return typing.cast(T, dataclasses.replace(typing.cast(Any, config), **sections))
