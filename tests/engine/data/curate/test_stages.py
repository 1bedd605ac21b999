"""Stages that look at one item: what passes, what does not, and what is said of it."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from carillon.engine.config import build
from carillon.engine.data.curate.catalog import STAGES
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Stage
from carillon.engine.data.curate.stages.ocr import read_text
from carillon.engine.data.curate.stages.pii import Pii
from carillon.engine.data.samples import RawSample

GREEN = Image.new("RGB", (320, 240), "#30a050")


def stage(kind: str, **settings: Any) -> Stage:
    return build(STAGES[kind], {"type": kind, **settings})


def item(
    picture: Image.Image | None = None,
    captions: dict[str, list[str]] | None = None,
    members: dict[str, bytes] | None = None,
    **meta: Any,
) -> Item:
    members = dict(members or {})
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        members["png"] = buffer.getvalue()
    return Item(RawSample("key", members, {"captions": captions or {}, **meta}), "train")


def found(one: Stage, of: Item) -> Finding:
    finding = one.examine(of)
    assert finding is not None
    return finding


@pytest.mark.parametrize(
    ("licence", "settings", "passes"),
    [
        ("CC-BY-4.0", {"allow": ["CC-BY-*"]}, True),
        ("cc-by-4.0", {"allow": ["CC-BY-4.0"]}, True),
        ("CC-BY-NC-4.0", {"allow": ["CC-BY-*"]}, False),
        ("CC-BY-NC-4.0", {"allow": ["*"]}, True),
        ("CC-BY-NC-4.0", {"allow": ["*"], "deny": ["*-NC-*"]}, False),
        ("MIT OR GPL-2.0-only", {"allow": ["MIT"]}, True),
        ("MIT AND GPL-2.0-only", {"allow": ["MIT"]}, False),
        ("", {"allow": ["*"]}, False),
        ("", {"allow": ["*"], "unstated": "allow"}, True),
    ],
)
def test_licence(licence: str, settings: dict[str, Any], passes: bool) -> None:
    reason = found(stage("licence", **settings), item(licence=licence)).reason
    assert (reason is None) == passes


def test_picture_size_reads_the_header_alone() -> None:
    wide = found(stage("picture_size", max_aspect=4), item(Image.new("L", (900, 90))))
    assert wide.scores == {"shorter_side": 90.0, "aspect": 10.0}
    assert wide.reason == "aspect 10 is above 4"
    buffer = io.BytesIO()
    GREEN.save(buffer, "PNG")
    cut = Item(RawSample("k", {"png": buffer.getvalue()[:60]}, {"captions": {}}), "train")
    assert found(stage("picture_size"), cut).reason is None
    assert stage("picture_size").examine(item(captions={"en": ["text alone"]})) is None


def test_blur_tells_a_blurred_picture_from_a_sharp_one_at_any_size() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    sharp = Image.fromarray(noise).resize((480, 360), Image.Resampling.NEAREST)
    blurred = sharp.filter(ImageFilter.GaussianBlur(24))
    scores = [found(stage("blur"), item(one)).scores["sharpness"] for one in (sharp, blurred)]
    assert scores[0] > 20 * scores[1]
    large = found(stage("blur"), item(sharp.resize((1920, 1440), Image.Resampling.BICUBIC)))
    assert large.scores["sharpness"] == pytest.approx(scores[0], rel=0.25)
    assert found(stage("blur"), item(blurred)).reason == (f"sharpness {scores[1]:.4g} is below 4")
    assert found(stage("blur", min_sharpness=0), item(GREEN)).reason == "contrast 0 is below 4"


def test_captions_that_fail_leave_and_an_item_without_any_fails() -> None:
    one = stage("captions", min_words=2, max_repetition=0.5)
    texts = {"en": ["a good caption", "sale sale sale sale"], "zh": ["一只狗"], "de": ["Hund"]}
    finding = found(one, item(captions=texts))
    assert finding.reason is None
    assert finding.captions == {"en": ["a good caption"], "zh": ["一只狗"]}
    only_bad = found(one, item(captions={"de": ["Hund"]}))
    assert only_bad.reason == "no caption passes: words 1 is below 2"
    flagged = found(stage("captions", min_words=2, action="flag"), item(captions=texts))
    assert flagged.captions is None
    assert flagged.reason == "words 1 is below 2"
    assert found(one, item()).reason == "it has no caption"


def test_language_relabels_the_unstated_and_takes_out_the_contradicted() -> None:
    french = "Un chien brun court dans l'herbe du parc avec une balle rouge."
    english = "A brown dog runs through the grass of the park with a red ball."
    finding = found(stage("language"), item(captions={"und": [french], "en": [english]}))
    assert finding.captions == {"fr": [french], "en": [english]}
    wrong = found(stage("language"), item(captions={"de": [french], "en": [english]}))
    assert wrong.captions == {"en": [english]}
    only = found(stage("language", allow=["en"]), item(captions={"fr": [french]}))
    assert only.reason == "no caption passes: language fr"
    assert found(stage("language"), item(captions={"de": ["Le chien"]})).captions is None, "short"


def test_pii_replaces_in_captions_transcripts_and_segments() -> None:
    speech = item(
        captions={"en": ["mail ann@example.org", "nothing here"]},
        transcripts={"en": ["I am at 203.0.113.9"]},
        segments=[{"start_s": 0, "end_s": 1, "text": "at 203.0.113.9"}],
    )
    finding = found(stage("pii"), speech)
    assert finding.captions == {"en": ["mail [email]", "nothing here"]}
    assert finding.meta["transcripts"] == {"en": ["I am at [ip]"]}
    assert finding.meta["segments"][0] == {"start_s": 0, "end_s": 1, "text": "at [ip]"}
    assert finding.scores == {"finds": 3.0}
    assert finding.reason is None
    told = found(stage("pii", replace=False), speech)
    assert told.reason == "personal data: 1 email, 2 ip"
    assert told.captions is None


def test_pii_under_a_key_keeps_equal_values_equal(tmp_path: Any) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 16)
    texts = {"en": ["card 4111111111111111", "card 4111-1111-1111-1111", "card 5500005555555559"]}
    by_key = []
    for name in "ab":
        one = stage("pii", key_file=str(tmp_path / name))
        captions = found(one, item(captions=texts)).captions
        assert captions is not None
        by_key.append(captions["en"])
    first, again, other = by_key[0]
    assert first == again != other
    assert first.startswith("card [card-")
    assert set(by_key[0]).isdisjoint(by_key[1])
    assert "4111" not in json.dumps(by_key)
    assert isinstance(one, Pii)


def test_toxicity() -> None:
    texts = {"en": ["a nice dog in the park", "you fucking idiot"], "de": ["ein Hund"]}
    finding = found(stage("toxicity"), item(captions=texts))
    assert finding.captions == {"en": ["a nice dog in the park"], "de": ["ein Hund"]}
    listed = found(stage("toxicity", words=["HUND"]), item(captions={"de": ["ein Hund!"]}))
    assert listed.reason == "no caption passes: toxicity 1 is above 0.8"


def test_nsfw_scores_a_harmless_picture_as_safe() -> None:
    finding = found(stage("nsfw"), item(GREEN))
    assert 0 <= finding.scores["nsfw"] < 0.5
    assert finding.reason is None
    strict = found(stage("nsfw", max_score=0.0), item(GREEN))
    assert strict.reason is not None


def text_picture() -> Image.Image:
    picture = Image.new("RGB", (480, 200), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=44)
    draw.text((16, 20), "INVOICE 2041", fill="black", font=font)
    draw.text((16, 110), "Total 73.50", fill="black", font=font)
    return picture


def test_ocr_reads_text_and_routes_by_its_area() -> None:
    lines, area = read_text(np.asarray(text_picture()), 0.5)
    assert lines == ["INVOICE 2041", "Total 73.50"]
    assert 0.1 < area < 0.6
    routed = found(stage("ocr", max_area=0.05, split="documents"), item(text_picture()))
    assert (routed.split, routed.reason) == ("documents", None)
    assert routed.meta["ocr"]["text"] == "INVOICE 2041\nTotal 73.50"
    assert found(stage("ocr", max_area=0.05), item(text_picture())).reason is not None
    blank = found(stage("ocr", max_area=0.05), item(GREEN))
    assert (blank.scores, blank.meta, blank.reason) == ({"text_area": 0.0}, {}, None)


SOUND = {"flac": b"not looked at"}
FACTS = {"flac": {"duration_s": 10.0}}


@pytest.mark.parametrize(
    ("segments", "text", "reason"),
    [
        ([(0, 4), (5, 9)], "a" * 80, None),
        ([(5, 9), (0, 4)], "a" * 80, "segment 1 (0 to 4 s) is out of order"),
        ([(0, 30)], "a" * 80, "segment 0 ends at 30 s of 10 s"),
        ([(0, float("nan"))], "a" * 80, "segment 0 (0 to nan s) is out of order"),
        ([], "a" * 900, "letters per s 90 is above 40"),
        ([], "a", "letters per s 0.1 is below 0.2"),
    ],
)
def test_transcripts(segments: list[tuple[float, float]], text: str, reason: str | None) -> None:
    listed = [{"start_s": a, "end_s": b, "text": "x"} for a, b in segments]
    one = item(members=SOUND, media=FACTS, transcripts={"en": [text]}, segments=listed)
    finding = found(stage("transcripts"), one)
    assert finding.reason == reason
    if segments and reason is None:
        assert finding.scores["covered"] == pytest.approx(0.8)


def test_transcripts_may_be_required() -> None:
    assert found(stage("transcripts"), item(members=SOUND)).reason is None
    needed = found(stage("transcripts", required=True), item(members=SOUND))
    assert needed.reason == "it has no transcript"
    assert stage("transcripts", required=True).examine(item(GREEN)) is None
