"""Finds personal data in text: addresses, phone numbers, cards, accounts and official numbers.

Each kind is a pattern and, where the numbers have one, a check digit, so that a price or a serial
number is not taken for a card. Phone numbers are found by `phonenumbers` (Apache-2.0), Google's
tables of every country's plan. Where finds overlap, the kind that stands first in KINDS counts.
Left out: names and street addresses, which no pattern can tell from other words.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from carillon.engine.data.curate import identity_numbers as numbers


class Found(NamedTuple):
    """One find; `kind` is one of KINDS."""

    kind: str
    start: int
    end: int


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


_EDGE, _END = r"(?<![\w.@-])", r"(?![\w@-])"
_CARD = (  # as one number, or in the groups that are printed on cards
    r"(?<!\d[ -])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}[ -]\d{6}[ -]\d{4,5})"
    r"(?![ -]?\d)"
)
_PATTERNS: tuple[tuple[str, str, Callable[[str], bool] | None], ...] = (
    ("email", r"[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}", None),
    ("card", _CARD, numbers.is_card),
    ("ip", r"(?:\d{1,3}\.){3}\d{1,3}", _is_address),
    ("ip", r"(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}", _is_address),
    ("id", r"\d{3}-\d{2}-\d{4}", numbers.is_us_social_security),
    ("id", r"(?:\d{8}|[XYZxyz]\d{7})-?[A-Za-z]", numbers.is_spanish_id),
    ("id", r"\d{3}\.\d{3}\.\d{3}-\d{2}", numbers.is_brazilian_cpf),
    (
        "id",
        r"[A-Za-z]{6}\d{2}[A-Za-z]\d{2}[A-Za-z]\d{3}[A-Za-z]",
        numbers.is_italian_fiscal_code,
    ),
    ("id", r"[12] ?\d{2} ?\d{2} ?\d[\dABab] ?\d{3} ?\d{3} ?\d{2}", numbers.is_french_nir),
    ("id", r"[2-9]\d{3} \d{4} \d{4}", numbers.is_aadhaar),
    ("id", r"\d{3} \d{3} \d{4}", numbers.is_nhs_number),
    ("id", r"\d{2} \d{3} \d{3} \d{3}", numbers.is_german_tax_id),
)
# Numbers that are a row of digits and no more: only beside a word that says what they are.
_NAMED_PATTERNS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    (r"bsn|burgerservice", r"\d{9}", numbers.is_dutch_bsn),
    (r"pesel", r"\d{11}", numbers.is_polish_pesel),
    (r"steuer\W?id|idnr|identifikationsnummer", r"\d{11}", numbers.is_german_tax_id),
    (r"aadhaar|aadhar|uid", r"\d{12}", numbers.is_aadhaar),
    (r"nhs", r"\d{10}", numbers.is_nhs_number),
    (r"cpf", r"\d{11}", numbers.is_brazilian_cpf),
)
KINDS = ("email", "iban", "card", "ip", "id", "phone")
_COMPILED = tuple((kind, re.compile(_EDGE + p + _END), check) for kind, p, check in _PATTERNS)
_NAMED = tuple(
    (re.compile(rf"(?i)(?:{word})\D{{0,16}}({digits})(?!\d)"), check)
    for word, digits, check in _NAMED_PATTERNS
)
_IBAN = re.compile(_EDGE + r"([A-Za-z]{2})\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_MAYBE = re.compile(r"@|\d\D{0,2}\d\D{0,2}\d|[0-9A-Fa-f]::?[0-9A-Fa-f]")


def find_personal_data(
    text: str, kinds: Sequence[str] = KINDS, regions: Sequence[str] = ()
) -> list[Found]:
    """What is personal in a text, in order, without overlaps.

    `regions` are countries (ISO 3166) whose phone numbers count without their country code.
    """
    if not _MAYBE.search(text):  # nearly every caption: one pass decides
        return []
    taken: list[Found] = []
    for found in sorted(_all(text, regions), key=lambda f: (KINDS.index(f.kind), f.start, -f.end)):
        apart = all(found.end <= other.start or found.start >= other.end for other in taken)
        if found.kind in kinds and apart:
            taken.append(found)
    return sorted(taken, key=lambda found: found.start)


def replace_personal_data(
    text: str, finds: Sequence[Found], stand_in: Callable[[str, str], str]
) -> str:
    """The text with each find replaced by `stand_in(kind, what was found)`."""
    for found in reversed(finds):
        inside = text[found.start : found.end]
        text = text[: found.start] + stand_in(found.kind, inside) + text[found.end :]
    return text


def _all(text: str, regions: Sequence[str]) -> Iterator[Found]:
    for kind, pattern, check in _COMPILED:
        for match in pattern.finditer(text):
            if check is None or check(match[0]):
                yield Found(kind, match.start(), match.end())
    for pattern, named_check in _NAMED:
        for match in pattern.finditer(text):
            if named_check(match[1]):
                yield Found("id", match.start(1), match.end(1))
    yield from _ibans(text)
    yield from _phones(text, regions)


def _ibans(text: str) -> Iterator[Found]:
    """As many letters and digits as the country's IBAN has; words may follow them."""
    for match in _IBAN.finditer(text):
        length, end = numbers.iban_length(match[1]), match.start()
        for _ in range(length):
            end += 1 + (text[end : end + 1] in (" ", "-"))
        inside = text[match.start() : end]
        if length and end <= match.end() and numbers.is_iban(inside):
            yield Found("iban", match.start(), end)


def _phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in (None, *regions):
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID, max_tries=200):
            yield Found("phone", match.start, match.end)
