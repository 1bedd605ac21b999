import pytest

from carillon.engine.data.samples import (
    MAX_CAPTION_CHARS,
    SampleError,
    clean_caption,
    clean_captions,
    parse_meta,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "a dog"),
        ("  two\n\tlines\u00a0\u3000here ", "two lines here"),
        ("nul\0byte\x07", "nulbyte"),
        ("abc\u202edcba\u202c", "abcdcba"),
        ("\u2067isolate\u2069 \ufeffbom", "isolate bom"),
        ("<b>bold</b> <br/>move", "bold move"),
        ("<script>alert(1)</script>a cat", "a cat"),
        ('<svg onload="x()"><text>x</text></svg>a bird', "a bird"),
        ("<!-- hidden -->seen", "seen"),
        ("fish &amp; chips", "fish & chips"),
        ("&lt;b&gt;&amp;amp;&lt;/b&gt;", "&"),
        ("&#x202e;rtl &#0;", "rtl \ufffd"),
        ("3 < 4 and 5 > 4, AT&T", "3 < 4 and 5 > 4, AT&T"),
        ("مرحبا\u200f بالعالم", "مرحبا\u200f بالعالم"),
        ("👩\u200d🚀 astronaut", "👩\u200d🚀 astronaut"),
        ("<img src=x>", ""),
    ],
)
def test_the_cleaning_rule(text: str, expected: str) -> None:
    assert clean_caption(text) == expected
    if expected:
        assert clean_captions({"en": [text]}) == {"en": [expected]}


def test_empty_captions_are_dropped_and_a_sample_without_any_is_refused() -> None:
    assert clean_captions({"en": ["", "x"], "de": ["<p>"], "fr": []}) == {"en": ["x"]}
    for captions in ({}, {"en": []}, {"en": [""]}, {"en": ["\0 \n"]}):
        with pytest.raises(ValueError, match="no caption is left"):
            clean_captions(captions)


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ({"en": ["x" * 1_000_000]}, "1,000,000 characters"),
        ({"en": ["ok", "\udc80"]}, "lone surrogate"),
        ({"en": [3]}, "is no text"),
        ({"en": None}, "must be an object"),
        ({"": ["x"]}, "must be an object"),
        (["x"], "must be an object"),
    ],
)
def test_captions_that_make_a_sample_bad(captions: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        clean_captions(captions)


def test_the_longest_caption_passes() -> None:
    text = "é" * MAX_CAPTION_CHARS
    assert clean_captions({"en": [text]}) == {"en": [text]}


def test_markup_that_never_closes_is_fast() -> None:
    clean_caption("<script" * (MAX_CAPTION_CHARS // 7))  # quadratic at worst: bounded by the cap
    clean_caption("<" * MAX_CAPTION_CHARS)
    clean_caption("&amp;" * (MAX_CAPTION_CHARS // 5))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "must be an object"),
        (b'{"captions": {"en": ["\\udfff"]}}', "lone surrogate"),
        (b'{"a":' * 100_000, "too deeply"),
        (b"9" * 100_000, "cannot be read"),
    ],
)
def test_meta_that_cannot_be_used(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_meta(data)


def test_meta_without_captions_keeps_its_other_keys() -> None:
    assert parse_meta(b'{"label": 3}') == {"label": 3, "captions": {}}


def test_sample_error_names_the_sample() -> None:
    error = SampleError("k1", "no good")
    assert (error.key, error.reason, str(error)) == ("k1", "no good", "sample 'k1': no good")
