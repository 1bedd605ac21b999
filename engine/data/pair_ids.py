"""Which pairs are no negatives of each other: those whose samples have a field equal.

A value becomes a number by its hash, so that every process and worker gives it the same without
asking another; of a batch of n, two different values share one by a chance of n^2 / 2^64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from carillon.engine.config import UserError
from carillon.engine.data.order import stable_hash
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.shards import Split

NO_ID = -1
_NUM_CHECKED = 100
_MAX_NAMED = 20


def pair_id(raw: RawSample, field: str) -> int:
    """From 0 to 2^63 - 1, or NO_ID where the sample has no such field, or null there.

    Raises SampleError for a value that is neither text nor a whole number.
    """
    value = raw.meta.get(field)
    if value is None:
        return NO_ID
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        given = f"its {field} is of type {type(value).__name__}"
        raise SampleError(raw.key, f"{given}; text or a whole number is needed")
    return stable_hash(value) >> 1


def check_field(splits: Sequence[Split], field: str) -> None:
    """Raises UserError when none of some samples of each split, evenly spread, has the field: it
    would do nothing."""
    named = sum((_fields_of(split) for split in splits), Counter[str]())
    if named and field not in named:
        num = sum(min(len(split), _NUM_CHECKED) for split in splits)
        fields = ", ".join(name for name, _ in named.most_common(_MAX_NAMED))
        raise UserError(
            f"loss.itc.same_field: none of {num} samples has {field!r}; they "
            f"have {fields}. Name one of these, or leave it out"
        )


def _fields_of(split: Split) -> Counter[str]:
    named: Counter[str] = Counter()
    rows = {k * len(split) // _NUM_CHECKED for k in range(_NUM_CHECKED)} if len(split) else set()
    for row in sorted(rows):
        try:
            named.update(split.read(row).meta.keys())
        except SampleError:
            continue  # training judges how many may be bad
    return named
