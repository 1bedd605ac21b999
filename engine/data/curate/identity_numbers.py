"""Check digits of numbers that name a person or an account: what tells them from other numbers.

Source: ISO 7812 (Luhn), ISO 13616 and 7064 (IBAN), and the countries' own rules: Spain's DNI/NIE,
the Netherlands' BSN, Brazil's CPF, Poland's PESEL, Italy's codice fiscale, India's Aadhaar
(Verhoeff), the United Kingdom's NHS number, France's NIR, Germany's tax id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_IBAN_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "PT",
    26: "IS TR",
    27: "FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB PL",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
}
_IBAN_LENGTHS = {c: n for n, countries in _IBAN_COUNTRIES.items() for c in countries.split()}
_SPAIN = "TRWAGMYFPDXBNJZSQVHLCKE"
_VERHOEFF_TURNS = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
_ODD_VALUES = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22)
_ODD = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", (*_ODD_VALUES, 25, 24, 23), strict=True))
_ODD |= dict(zip("0123456789", _ODD_VALUES, strict=False))


def is_card(text: str) -> bool:
    """A payment card: 13 to 19 digits of a known scheme with a right Luhn digit."""
    digits = re.sub(r"\D", "", text)
    known = re.match(r"4|5[1-5]|2[2-7]|3[47]|3[068]|35|6[0245]|62", digits)
    return bool(known) and 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits)


def iban_length(country: str) -> int:
    """Letters and digits of a country's IBAN; 0 of one that has none."""
    return _IBAN_LENGTHS.get(country.upper(), 0)


def is_iban(text: str) -> bool:
    """An IBAN of a known country and its length, by ISO 7064's remainder."""
    plain = re.sub(r"[\s-]", "", text).upper()
    if iban_length(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_us_social_security(text: str) -> bool:
    """Written 123-45-6789, in none of the ranges that are never given out."""
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def is_spanish_id(text: str) -> bool:
    """DNI or NIE: the letter is the number's remainder by 23."""
    plain = text.upper().replace("-", "")
    number = plain[:-1].translate(str.maketrans("XYZ", "012"))
    return _SPAIN[int(number) % 23] == plain[-1]


def is_dutch_bsn(text: str) -> bool:
    digits = _digits(text)
    return any(digits) and _weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def is_brazilian_cpf(text: str) -> bool:
    digits = _digits(text)
    checks = []
    for length in (9, 10):
        rest = _weighted(digits[:length], range(length + 1, 1, -1)) * 10 % 11
        checks.append(rest % 10)
    return len(set(digits)) > 1 and checks == digits[9:]


def is_polish_pesel(text: str) -> bool:
    digits = _digits(text)
    month, day = (digits[2] * 10 + digits[3]) % 20, digits[4] * 10 + digits[5]
    total = _weighted(digits[:10], (1, 3, 7, 9, 1, 3, 7, 9, 1, 3))
    return 1 <= month <= 12 and 1 <= day <= 31 and -total % 10 == digits[10]


def is_italian_fiscal_code(text: str) -> bool:
    plain = text.upper()
    total = sum(_ODD[c] for c in plain[:15:2]) + sum(
        int(c) if c.isdigit() else ord(c) - 65 for c in plain[1:15:2]
    )
    return chr(65 + total % 26) == plain[15]


def is_aadhaar(text: str) -> bool:
    """Verhoeff's check, in the dihedral group of order ten."""
    check = 0
    for place, digit in enumerate(reversed(_digits(text))):
        for _ in range(place % 8):
            digit = _VERHOEFF_TURNS[digit]
        check = _dihedral(check, digit)
    return check == 0


def is_nhs_number(text: str) -> bool:
    digits = _digits(text)
    return any(digits) and 11 - _weighted(digits[:9], range(10, 1, -1)) % 11 in (
        digits[9],
        11 if digits[9] == 0 else -1,
    )


def is_french_nir(text: str) -> bool:
    plain = re.sub(r"\s", "", text).upper().replace("2A", "19").replace("2B", "18")
    return 97 - int(plain[:13]) % 97 == int(plain[13:])


def is_german_tax_id(text: str) -> bool:
    """ISO 7064 mod 11, 10; of the first ten digits one stands two or three times."""
    digits = _digits(text)
    product = 10
    for digit in digits[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    repeats = len(digits[:10]) - len(set(digits[:10]))
    return digits[0] != 0 and repeats in (1, 2) and (11 - product) % 10 == digits[10]


def _digits(text: str) -> list[int]:
    return [int(c) for c in text if c.isdigit()]


def _weighted(digits: Sequence[int], weights: Sequence[int]) -> int:
    return sum(digit * weight for digit, weight in zip(digits, weights, strict=True))


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _dihedral(one: int, other: int) -> int:
    """The product in D5: 0 to 4 turn, 5 to 9 turn and mirror."""
    if one < 5:
        return (one + other) % 5 if other < 5 else (one + other - 5) % 5 + 5
    return (one - 5 - other) % 5 + 5 if other < 5 else (one - other) % 5
