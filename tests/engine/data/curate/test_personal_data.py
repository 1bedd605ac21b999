"""Personal data is found by checked patterns; what only looks like it is left alone."""

import pytest

from carillon.engine.data.curate.personal_data import (
    find_personal_data,
    replace_personal_data,
)

REGIONS = ("US", "GB", "DE", "FR", "ES")


def found(text: str) -> list[tuple[str, str]]:
    return [(f.kind, text[f.start : f.end]) for f in find_personal_data(text, regions=REGIONS)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann.lee+x@mail.example.org now", [("email", "ann.lee+x@mail.example.org")]),
        ("call +49 30 901820 today", [("phone", "+49 30 901820")]),
        ("call (212) 736-5000", [("phone", "(212) 736-5000")]),
        ("card 4111 1111 1111 1111.", [("card", "4111 1111 1111 1111")]),
        ("to DE89 3704 0044 0532 0130 00 please", [("iban", "DE89 3704 0044 0532 0130 00")]),
        ("from GB29NWBK60161331926819", [("iban", "GB29NWBK60161331926819")]),
        ("host 203.0.113.7 answers", [("ip", "203.0.113.7")]),
        ("host 2001:db8::ff00:42:8329", [("ip", "2001:db8::ff00:42:8329")]),
        ("SSN 078-05-1120", [("id", "078-05-1120")]),
        ("DNI 12345678Z", [("id", "12345678Z")]),
        ("NIE X1234567L", [("id", "X1234567L")]),
        ("BSN 111222333", [("id", "111222333")]),
        ("CPF 529.982.247-25", [("id", "529.982.247-25")]),
        ("PESEL 44051401359", [("id", "44051401359")]),
        ("codice RSSMRA85T10A562S", [("id", "RSSMRA85T10A562S")]),
        ("Aadhaar 2341 2341 2346", [("id", "2341 2341 2346")]),
        ("NHS 943 476 5919", [("id", "943 476 5919")]),
        ("NIR 2 55 08 14 168 025 38", [("id", "2 55 08 14 168 025 38")]),
        ("Steuer-ID 86095742719", [("id", "86095742719")]),
    ],
)
def test_what_is_personal_is_found(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a dog and two men in 1998 by the 12:30 train",
        "card 4111 1111 1111 1112",  # its last digit is wrong
        "order 1234567890123456",
        "DE89 3704 0044 0532 0130 01",
        "version 1.2.3.4567 of 300.1.1.1",
        "localhost 127.0.0.1",
        "DNI 12345678A",
        "000-12-3456",
        "price 1.299,00 for 24 pieces, 640x480 pixels",
        "user@localhost",
        "۱۲۳ رنگ",
        "::",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert found(text) == []


def test_finds_are_replaced_in_place() -> None:
    text = "a@b.org or c@d.org, 203.0.113.7"
    told = replace_personal_data(text, find_personal_data(text), lambda kind, _: f"<{kind}>")
    assert told == "<email> or <email>, <ip>"


def test_only_kinds_that_are_asked_for_count() -> None:
    text = "a@b.org, 203.0.113.7"
    assert [f.kind for f in find_personal_data(text, ("ip",))] == ["ip"]


LONG = ("@" * 8000, "1 " * 4000, "a." * 4000 + "@", "a1:" * 2700, "+1-" * 2700, "DE12 " * 1600)


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:6])
def test_long_hostile_texts_end(text: str) -> None:
    """No pattern may take a time that grows with the square of a text: the suite has a limit."""
    find_personal_data(text, regions=REGIONS)
