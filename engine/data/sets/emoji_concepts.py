"""Emoji as concepts: one name for a code point sequence, and which sequences belong together.

A concept is the sequence without U+FE0F, in hex. Its base concept leaves out what makes a variant:
skin tones, gender signs and gendered people, facing direction, and whatever a ZWJ adds to a thing
(black cat -> cat). A person's occupation is kept (woman astronaut -> astronaut), since all of them
would otherwise be one concept. Hold-out goes by base concept, so no variant leaks.
"""

from __future__ import annotations

_VARIATION = "fe0f"
_ZWJ = "200d"
_SKIN_TONES = frozenset(f"{0x1F3FB + number:x}" for number in range(5))
_SIGNS = frozenset(("2640", "2642", "27a1"))  # female, male, facing right
_PERSON, _CHILD = "1f9d1", "1f9d2"
# Gendered code points to the neutral one of the same meaning (UTS #51, section 2.3).
_NEUTRAL = {
    **{"1f468": _PERSON, "1f469": _PERSON, "1f466": _CHILD, "1f467": _CHILD},
    **{"1f474": "1f9d3", "1f475": "1f9d3"},  # older person
    **{"1f934": "1fac5", "1f478": "1fac5"},  # person with crown
    **{"1f930": "1fac4", "1fac3": "1fac4"},  # pregnant person
    **{"1f385": "1f9d1-1f384", "1f936": "1f9d1-1f384"},  # Mx Claus
    "1f57a": "1f483",  # dancing
    **{"1f46c": "1f46b", "1f46d": "1f46b"},  # holding hands
}
# What joins two people, and the single code point that means the pair.
_PAIRS = {
    ("1f91d",): "1f46b",
    ("2764",): "1f491",
    ("2764", "1f48b"): "1f48f",
    ("1f430",): "1f46f",
    ("1faef",): "1f93c",
}
_HANDSHAKE = ("1faf1", "1faf2")


def concept_of_text(characters: str) -> str:
    """The concept of a string such as CLDR's keys."""
    return concept_of_hex("-".join(f"{ord(character):x}" for character in characters))


def concept_of_hex(code_points: str) -> str:
    """The concept of hex code points joined by dashes, whatever their case and padding.

    Raises ValueError when it is no such list.
    """
    points = (f"{int(point, 16):x}" for point in code_points.split("-"))
    return "-".join(point for point in points if point != _VARIATION)


def base_concept(concept: str) -> str:
    """The concept that all variants of an emoji share."""
    joined = "-".join(point for point in concept.split("-") if point not in _SKIN_TONES)
    if not joined or joined in _SIGNS:
        return concept  # a skin tone or a gender sign standing for itself
    parts = [_NEUTRAL.get(part, part) for part in joined.split(f"-{_ZWJ}-") if part not in _SIGNS]
    people = [part for part in parts if part in (_PERSON, _CHILD)]
    things = tuple(part for part in parts if part not in (_PERSON, _CHILD))
    if len(people) > 1:
        return _PAIRS.get(things, "1f46a")  # families are people only
    if tuple(parts) == _HANDSHAKE:
        return "1f91d"
    return "-".join(parts) if people else parts[0]
