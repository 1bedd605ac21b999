"""Which items of a set are meant: by row, by key, or by what is said of them.

A condition is FIELD OPERATOR VALUE: `language=fr`, `licence!=CC0-1.0`, `width>=512`, `text~dog`.
Fields of the items tables are looked up there; `text` is every caption and transcript; any other
name is a field of the sample's JSON (`author`, `rights.holder`). All conditions must hold. `~` is
"contains", without regard to case; the numbers of an item that has none fit no condition.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from carillon.engine.config import UserError
from carillon.engine.data.explore.item_tables import Meta, Shard, items_of, metas_of, shards_of
from carillon.engine.data.explore.stats import UNSTATED
from carillon.engine.data.shards import Dataset
from carillon.engine.data.tombstones import NO_MEDIA_SHA256

_CONDITION = re.compile(r"([A-Za-z_][\w.-]*)\s*(!=|<=|>=|=|<|>|~)\s*(.*)", re.DOTALL)
_NUMBERS = ("size_bytes", "width", "height", "duration_s")
_COLUMNS = {
    "key": "key",
    "licence": "licence",
    "licence_source": "licence_source",
    "source": "source",
    "language": "languages",
    "modality": "modalities",
    "sha256": "sha256",
    **{name: name for name in _NUMBERS},
}
TABLE_FIELDS = ("split", *_COLUMNS)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}


class Found(NamedTuple):
    """An item: its split, its row there, its key, the SHA-256 of its media."""

    split: str
    row: int
    key: str
    sha256: str


class Condition(NamedTuple):
    """A parsed condition; `number` is its value where the field holds numbers."""

    field: str
    operator: str
    value: str
    number: float | None = None

    @property
    def is_of_table(self) -> bool:
        return self.field in TABLE_FIELDS

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether one of an item's values fits; for != that none is the value."""
        if self.operator == "!=":
            return not self._replaced("=").holds(values)
        if self.number is not None:
            test = _ORDERS[self.operator]
            return any(value is not None and test(value, self.number) for value in values)
        texts = [_text(value) for value in values if value is not None]
        if self.operator == "~":
            return any(self.value.casefold() in text.casefold() for text in texts)
        return self.value in texts

    def _replaced(self, operator: str) -> Condition:
        return self._replace(operator=operator)


class Selected(NamedTuple):
    """The items that fit, and those whose JSON cannot be read, so that nobody can say."""

    found: list[Found]
    unreadable: list[Meta]


def parse_conditions(texts: Iterable[str]) -> list[Condition]:
    """Parse conditions as the command line gives them. Raises UserError for what is none."""
    return [_parsed(text) for text in texts]


def select(dataset: Dataset, conditions: Sequence[Condition]) -> Selected:
    """The items that all conditions fit, in the order of the set.

    Raises UserError for a field that no item of the set has.
    """
    selected, known = Selected([], []), set[str]()
    of_json = [one for one in conditions if not one.is_of_table]
    for shard in shards_of(dataset):
        candidates = list(_by_table(shard, [one for one in conditions if one.is_of_table]))
        if not of_json:
            selected.found.extend(candidates)
            continue
        metas = metas_of(shard, [one.row for one in candidates])
        for found, meta in zip(candidates, metas, strict=True):
            if meta.error is not None:
                selected.unreadable.append(meta)
                continue
            values = [(one, _values(meta.meta, one.field)) for one in of_json]
            known.update(one.field for one, held in values if held)
            if all(one.holds(held) for one, held in values):
                selected.found.append(found)
    _check_known(selected, of_json, known)
    return selected


def keyed(dataset: Dataset, keys: Iterable[str]) -> list[Found]:
    """The items of these keys, in the order of the set. Raises UserError for one it lacks."""
    wanted = set(keys)
    found = [
        one for shard in shards_of(dataset) for one in _by_table(shard, []) if one.key in wanted
    ]
    missing = sorted(wanted - {one.key for one in found})
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        listed = ", ".join(repr(key) for key in missing[:3])
        raise UserError(f"{dataset.path} has no item {listed}{more}; nothing was done")
    return found


def with_copies(dataset: Dataset, found: Sequence[Found]) -> list[Found]:
    """These items and all whose media are the same bytes as those of one, in the set's order."""
    keys = {one.key for one in found}
    sums = {one.sha256 for one in found} - {"", NO_MEDIA_SHA256}
    return [
        one
        for shard in shards_of(dataset)
        for one in _by_table(shard, [])
        if one.key in keys or one.sha256 in sums
    ]


def _parsed(text: str) -> Condition:
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"{text!r} is no condition: give FIELD=VALUE, with =, !=, ~ (contains), <, <=, > or "
            f">=; fields are text, {', '.join(TABLE_FIELDS)}, and those of the samples' JSON"
        )
    field, sign, value = match.groups()
    if field not in _NUMBERS:
        if sign in ("<", "<=", ">", ">="):
            raise UserError(f"{text!r}: {field} is no number; use =, != or ~")
        return Condition(field, sign, value)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and sign in _ORDERS:
        return Condition(field, sign, value, number)
    raise UserError(f"{text!r}: {field} is a number; compare it with one, by =, !=, <, <=, > or >=")


def _by_table(shard: Shard, conditions: Sequence[Condition]) -> Iterator[Found]:
    """The items of a shard that the conditions on its table fit."""
    if not all(one.holds([shard.split]) for one in conditions if one.field == "split"):
        return
    conditions = [one for one in conditions if one.field != "split"]
    columns = dict.fromkeys(["key", "sha256", *(_COLUMNS[one.field] for one in conditions)])
    items = items_of(shard, list(columns))
    for place, item in enumerate(items.to_pylist()):
        if all(one.holds(_listed(one.field, item)) for one in conditions):
            yield Found(shard.split, shard.start + place, item["key"], item["sha256"] or "")


def _listed(field: str, item: dict[str, Any]) -> list[Any]:
    value = item[_COLUMNS[field]]
    if field == "licence" and value is None:
        return [UNSTATED]  # as the counts call it
    return value if isinstance(value, list) else [value]


def _values(meta: dict[str, Any], field: str) -> list[Any]:
    """What the JSON holds in a field; of lists and of text by languages every one."""
    if field == "text":
        return [text for name in ("captions", "transcripts") for text in _leaves(meta.get(name))]
    value: Any = meta
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return list(_leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif value is not None:
        yield value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _check_known(selected: Selected, conditions: Sequence[Condition], known: set[str]) -> None:
    """A mistyped field must not look like a set without such items."""
    unknown = [one.field for one in conditions if one.field not in {*known, "text"}]
    if unknown and not selected.found:
        raise UserError(
            f"no item that the other conditions fit has a field {unknown[0]!r}; fields are text, "
            f"{', '.join(TABLE_FIELDS)}, and those of the samples' JSON"
        )
