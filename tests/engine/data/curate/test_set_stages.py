"""Stages that compare items: which of them goes, for which that stays."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance

from carillon.engine.config import build
from carillon.engine.data.curate.catalog import STAGES
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.near_pairs import near_pairs
from carillon.engine.data.curate.stage import Population, SetStage, keep_first
from carillon.engine.data.curate.stages.balance import Balance
from carillon.engine.data.decode.image import decode_rgb
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import open_dataset


def set_stage(kind: str, **settings: Any) -> SetStage:
    made = build(STAGES[kind], {"type": kind, **settings})
    assert isinstance(made, SetStage)
    return made


def population(
    signatures: Sequence[bytes | None],
    *,
    quality: Sequence[float] | None = None,
    evaluation: Sequence[int] = (),
    seed: int = 0,
) -> Population:
    number = len(signatures)
    return Population(
        keys=[f"k{i}" for i in range(number)],
        signatures=pa.chunked_array([pa.array(list(signatures), pa.binary())]),
        quality=np.asarray(quality if quality is not None else [0.0] * number, np.float64),
        is_evaluation=np.isin(np.arange(number), list(evaluation)),
        seed=seed,
    )


def gone(decisions: Any) -> dict[int, int]:
    return dict(zip(decisions.rows.tolist(), decisions.matches.tolist(), strict=True))


def item(picture: Image.Image | None, **captions: list[str]) -> Item:
    members = {}
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        members["png"] = buffer.getvalue()
    return Item(RawSample("k", members, {"captions": captions}), "train")


def signatures(one: SetStage, items: Sequence[Item]) -> list[bytes | None]:
    findings = [one.examine(each) for each in items]
    return [finding.signature if finding else None for finding in findings]


def test_the_best_stays_and_a_chain_does_not_pull_its_ends_together() -> None:
    chain = [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)]
    same = population([b""] * 4)
    assert gone(keep_first(chain, same)) == {1: 0, 3: 2}
    better = population([b""] * 4, quality=[1, 5, 1, 1])
    assert gone(keep_first(chain, better)) == {0: 1, 2: 1}


def test_evaluation_items_never_leave_and_come_first() -> None:
    pairs = [(0, 2, 0.9), (0, 1, 0.99), (2, 3, 1.0)]
    judged = population([b""] * 4, quality=[9, 9, 0, 0], evaluation=[2, 3])
    assert gone(keep_first(pairs, judged)) == {0: 2}


def test_signatures_are_taken_from_many_chunks_by_place() -> None:
    chunks = [pa.array([b"a", None]), pa.array([], pa.binary()), pa.array([b"c", b"d", b"e"])]
    some = Population(
        keys=["k0", "k1", "k2"],
        signatures=pa.chunked_array(chunks, pa.binary()),
        quality=np.zeros(3),
        is_evaluation=np.zeros(3, bool),
        seed=0,
        places=np.asarray([1, 2, 4]),
    )
    assert some.rows().tolist() == [1, 2]
    assert some.take([2, 1, 2]) == [b"e", b"c", b"e"]
    assert some.matrix([1, 2]).tolist() == [[ord("c")], [ord("e")]]


def test_exact_duplicates_are_of_media_or_of_captions_where_there_is_none() -> None:
    stage = set_stage("exact_duplicates")
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    items = [item(red, en=["a"]), item(blue), item(red, en=["b"]), item(None, en=["c"])]
    items += [item(None, en=["c"]), item(None, de=["c"])]
    judged = population(signatures(stage, items), quality=[1, 1, 2, 0, 0, 0])
    assert gone(stage.decide(judged)) == {0: 2, 4: 3}


def test_near_pictures_survive_what_a_copy_goes_through(tools: SimpleNamespace) -> None:
    stage = set_stage("near_pictures")
    pictures = [tools.scene(seed) for seed in range(30)]
    w, h = pictures[0].size
    copies = [
        Image.open(io.BytesIO(tools.jpeg(pictures[0], 25))),
        pictures[1].resize((w // 2, h * 2 // 3)),
        pictures[2].crop((0, 0, w * 9 // 10, h * 9 // 10)),
        pictures[3].crop((w // 10, h // 10, w, h)).resize((w * 2, h * 2)),
    ]
    items = [item(one.convert("RGB")) for one in [*pictures, *copies]]
    judged = population(signatures(stage, items))
    assert gone(stage.decide(judged)) == {30: 0, 31: 1, 32: 2, 33: 3}


def test_real_photos_of_one_kind_are_told_apart(real_data: Callable[[str], Path]) -> None:
    """Clothing on plain grounds is alike, yet of 60 pictures none goes but the planted copies."""
    (split,) = open_dataset(real_data("clothing_cc0")).splits.values()
    pictures = [decode_rgb(split.read(row).medium("image")) for row in range(60)]
    copies = []
    for picture in pictures[:6]:
        w, h = picture.size
        cropped = picture.crop((0, h // 20, w * 9 // 10, h * 19 // 20)).resize((w // 2, h // 2))
        copies.append(cropped)
    stage = set_stage("near_pictures")
    judged = population(signatures(stage, [item(one) for one in [*pictures, *copies]]))
    assert gone(stage.decide(judged)) == {60 + i: i for i in range(6)}


def test_other_colours_and_other_details_are_other_pictures(tools: SimpleNamespace) -> None:
    stage = set_stage("near_pictures")
    picture = tools.scene(1)
    changed = picture.copy()
    changed.paste("white", (20, 20, 60, 60))
    grey = ImageEnhance.Color(picture).enhance(0.0)
    items = [item(one) for one in (picture, changed, grey)]
    assert gone(stage.decide(population(signatures(stage, items)))) == {}
    blind = set_stage("near_pictures", max_colour=255)
    assert gone(blind.decide(population(signatures(blind, items)))) == {2: 0}


def test_pictures_of_one_colour_are_near_to_nothing() -> None:
    stage = set_stage("near_pictures")
    items = [item(Image.new("RGB", (40, 40), colour)) for colour in ("white", "white", "black")]
    assert gone(stage.decide(population(signatures(stage, items)))) == {}


def test_near_texts_find_an_edited_caption_and_leave_short_ones() -> None:
    stage = set_stage("near_texts")
    text = "two brown dogs run over a wet field of grass behind a small red ball at dusk"
    edited = text.replace("small", "tiny")
    other = "a woman in a green coat sells apples and pears from a cart in a narrow street"
    chinese = "两只棕色的狗在潮湿的草地上追着一个红色的小球奔跑"
    items = [item(None, en=[one]) for one in (text, other, edited, "a photo of a rose")]
    items += [item(None, en=["a photo of a rose"])]
    items += [item(None, zh=[chinese]), item(None, zh=[chinese.replace("小球", "皮球")])]
    judged = population(signatures(stage, items))
    assert gone(stage.decide(judged)) == {2: 0, 6: 5}


def test_minhash_of_a_document_is_the_same_everywhere() -> None:
    """A part of a run may be scored by another machine or later: the bytes are pinned."""
    stage = set_stage("near_texts", min_words=1)
    (signature,) = signatures(stage, [item(None, en=["a dog runs"])])
    assert signature is not None
    assert np.frombuffer(signature, "<u4")[:3].tolist() == PINNED


PINNED = [3448684785, 3224675449, 3416809730]


@pytest.mark.parametrize(("tolerance", "kept"), [(0.0, (20, 20)), (0.5, (40, 40))])
def test_balance_cuts_to_shares(tolerance: float, kept: tuple[int, int]) -> None:
    stage = set_stage("balance", shares={"en": 0.5, "de": 0.5}, tolerance=tolerance)
    captions = ["en"] * 100 + ["de"] * 20 + ["fr"] * 5
    items = [item(None, **{language: ["x"]}) for language in captions]
    decisions = stage.decide(population(signatures(stage, items)))
    left = [language for i, language in enumerate(captions) if i not in gone(decisions)]
    assert left.count("en") == kept[0]
    assert left.count("de") == 20
    assert left.count("fr") == 5


def test_balance_takes_others_out_and_does_not_depend_on_order() -> None:
    stage = set_stage("balance", by="label", shares={"a": 0.75, "b": 0.25}, others="drop")
    assert isinstance(stage, Balance)
    groups = [b"a"] * 40 + [b"b"] * 10 + [b"c"] * 3
    forward = population(groups)
    kept = {forward.keys[i] for i in range(53)} - {
        forward.keys[i] for i in gone(stage.decide(forward))
    }
    assert len(kept) == 40
    turned = Population(
        keys=forward.keys[::-1],
        signatures=pa.chunked_array([pa.array(groups[::-1], pa.binary())]),
        quality=forward.quality,
        is_evaluation=forward.is_evaluation,
        seed=0,
    )
    again = {turned.keys[i] for i in range(53)} - {
        turned.keys[i] for i in gone(stage.decide(turned))
    }
    assert again == kept
    other_seed = population(groups, seed=1)
    assert set(gone(stage.decide(other_seed))) != set(gone(stage.decide(forward)))


def test_cells_find_nearly_all_that_looking_at_every_pair_finds() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4000, 24)).astype(np.float32)
    copies = base[:400] + 0.15 * rng.standard_normal((400, 24)).astype(np.float32)
    vectors = np.concatenate([base, copies])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = {(p.one, p.other) for p in near_pairs(vectors, min_cosine=0.95)}
    planted = {(row, 4000 + row) for row in range(400)}
    assert planted <= exact
    assert {(b, a) for a, b in exact} == exact
    by_cells = {(p.one, p.other) for p in near_pairs(vectors, min_cosine=0.95, exact_rows=100)}
    assert by_cells <= exact
    assert len(by_cells) > 0.9 * len(exact)


def test_near_embeddings_and_caption_match_ask_a_run(run_folder: Path) -> None:
    squares = [Image.new("RGB", (24, 24), colour) for colour in ("#e02020", "#2040e0", "#e02222")]
    stage = set_stage("near_embeddings", run=str(run_folder), min_cosine=0.99)
    judged = population(signatures(stage, [item(one) for one in squares]))
    assert gone(stage.decide(judged)) == {2: 0}
    assert len(stage.identity()["checkpoint_hash"]) == 64
    match = build(
        STAGES["caption_match"],
        {"type": "caption_match", "run": str(run_folder), "min_cosine": 0.5},
    )
    finding = match.examine(item(squares[0], en=["red", "blue"]))
    assert finding is not None
    assert finding.captions == {"en": ["red"]}
