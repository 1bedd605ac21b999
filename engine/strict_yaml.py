"""Strict YAML: values only, YAML 1.2 scalars, no aliases, no tags, no duplicate keys.

PyYAML's safe loader follows YAML 1.1, where `no` is false, `3e-4` is text and `1:30` is ninety; the
1.2 core schema is set here instead. Aliases are refused outright: a config needs none, and without
them no document can grow when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_SIZE_BYTES = 1 << 20


class YamlError(ValueError):
    """A document that is not strict YAML."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (PyYAML's own protocol)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed; write the value out",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags ({_short(event.tag)}) are not allowed; write the plain value",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_INT = r"[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"
_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


_MAX_DIGITS = 300  # what a float can hold; no setting is near it


def _short(tag: str) -> str:
    """As it was written: `!!python/name` for tag:yaml.org,2002:python/name."""
    return tag.replace("tag:yaml.org,2002:", "!!")[:60]


def _construct_int(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _MAX_DIGITS:
        raise yaml.MarkedYAMLError(
            problem=f"a number of {len(text):,} digits; at most {_MAX_DIGITS} are allowed",
            problem_mark=node.start_mark,
        )
    return int(text, 0) if "o" in text or "x" in text else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: bytes, source: str) -> dict[str, Any]:
    """The mapping in `text`; raises YamlError with the line and what is wrong."""
    if len(text) > MAX_SIZE_BYTES:
        raise YamlError(f"{source}: {len(text)} bytes; a config may have {MAX_SIZE_BYTES}")
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise YamlError(f"{source}{line}: {error.problem or error}") from None
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        raise YamlError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise YamlError(f"{source}: nested too deeply") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise YamlError(f"{source}: expected sections (key: value), got {type(value).__name__}")
    return value


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: _Dumper, value: float) -> Any:
    text = repr(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_text(dumper: _Dumper, value: str) -> Any:
    # Quoted whenever 1.1 or 1.2 readers could take it for something else.
    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value)
    reserved = value.lower() in {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
    style = None if plain and not reserved else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to equal values, keys in the order given."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
