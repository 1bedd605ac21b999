"""Metrics of one set: encode its pictures and texts once, then score each language and direction.

Per language: where every picture has one text in use, equal texts (NFC, case folded) make equal
groups, so a name that two pictures share is right for both. Where pictures have several captions,
each caption is a query with the one right picture, and all captions of a picture are right for it.
Classes of a zero-shot set are the labels that occur. Left out: reading and writing of results.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.data.config import DataConfig
from carillon.engine.eval.retrieval import NDCG_AT, RECALL_AT, retrieval_metrics
from carillon.engine.eval.sets import (
    ChosenItems,
    Item,
    RetrievalSetConfig,
    ZeroShotSetConfig,
    choose_items,
    choose_labelled,
    normal_text,
)
from carillon.engine.eval.zeroshot import class_prototypes, fill_templates, zeroshot_metrics
from carillon.engine.index.encoder import Encoder

DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = (*(f"r@{k}" for k in RECALL_AT), "mrr", f"ndcg@{NDCG_AT}")
_MAX_LISTED_BAD = 10


class Resampling(NamedTuple):
    """How intervals are made."""

    samples: int = 1000
    seed: int = 0


class EncodedSet(NamedTuple):
    """A retrieval set with its vectors; `place` leads from an item to its row, if readable."""

    chosen: ChosenItems
    pictures: Tensor
    place: dict[int, int]
    texts: Tensor
    text_place: dict[str, int]
    bad: list[tuple[str, str]]


class LanguageTask(NamedTuple):
    """The pictures and texts of one language; equal groups belong together."""

    items: list[int]
    texts: list[str]
    picture_groups: Tensor
    text_groups: Tensor


def encode_set(
    encoder: Encoder, one: RetrievalSetConfig, data: DataConfig, *, seed: int
) -> EncodedSet:
    """Choose a set's items and encode its pictures and the texts in use, each once."""
    chosen = choose_items(one, data, seed=seed)
    place, vectors, bad = _encode_items(encoder, chosen)
    wanted = {
        text
        for language, items in chosen.by_language.items()
        for i in items
        for text in _texts_in_use(chosen.items[i], language, one.one_text_each)
    }
    ordered = sorted(wanted)
    text_place = {text: i for i, text in enumerate(ordered)}
    failed = [*chosen.bad, *bad]
    return EncodedSet(chosen, vectors, place, encoder.texts(ordered), text_place, failed)


def _encode_items(
    encoder: Encoder, chosen: ChosenItems
) -> tuple[dict[int, int], Tensor, list[tuple[str, str]]]:
    item_of_row = {item.row: i for i, item in enumerate(chosen.items)}
    batches = list(encoder.pictures(chosen.split, list(item_of_row)))
    rows = [row for batch in batches for row in batch.rows]
    if not rows:
        raise UserError(f"{chosen.source['dataset']}: none of its pictures can be read")
    place = {item_of_row[row]: i for i, row in enumerate(rows)}
    bad = [failure for batch in batches for failure in batch.bad]
    return place, torch.cat([batch.vectors for batch in batches]), bad


def _texts_in_use(item: Item, language: str, one_text_each: bool) -> list[str]:
    captions = item.captions[language]
    return captions[:1] if one_text_each else captions


def language_task(encoded: EncodedSet, language: str, one_text_each: bool) -> LanguageTask:
    """Pictures, texts and groups of one language, by the protocol above."""
    items = [i for i in encoded.chosen.by_language[language] if i in encoded.place]
    pairs = [
        (number, text)
        for number, i in enumerate(items)
        for text in _texts_in_use(encoded.chosen.items[i], language, one_text_each)
    ]
    texts = [text for _, text in pairs]
    owner = torch.tensor([number for number, _ in pairs], dtype=torch.int64)
    if len(pairs) > len(items):
        return LanguageTask(items, texts, torch.arange(len(items)), owner)
    ids: dict[str, int] = {}
    groups = torch.tensor([ids.setdefault(normal_text(text), len(ids)) for text in texts])
    return LanguageTask(items, texts, groups, groups)


def score_set(
    encoded: EncodedSet, one: RetrievalSetConfig, resampling: Resampling
) -> dict[str, Any]:
    """Metrics of one encoded set: by language and direction, and their means."""
    languages: dict[str, Any] = {}
    for language in encoded.chosen.by_language:
        task = language_task(encoded, language, one.one_text_each)
        if len(task.items) > 1:
            languages[language] = _score_language(encoded, task, resampling)
    core = [language for language in one.core_languages if language in languages]
    return {
        **encoded.chosen.source,
        "num_pictures": len(encoded.place),
        "num_bad": len(encoded.bad),
        "bad": [f"{key}: {reason}" for key, reason in encoded.bad[:_MAX_LISTED_BAD]],
        "one_text_each": one.one_text_each,
        "languages": languages,
        "mean": mean_over(languages, list(languages)),
        "core_languages": core,
        "core_mean": mean_over(languages, core) if core else None,
    }


def _score_language(
    encoded: EncodedSet, task: LanguageTask, resampling: Resampling
) -> dict[str, Any]:
    pictures = encoded.pictures[[encoded.place[i] for i in task.items]]
    texts = encoded.texts[[encoded.text_place[text] for text in task.texts]]
    sides = (pictures, task.picture_groups), (texts, task.text_groups)
    scores: dict[str, Any] = {}
    for direction, (asked, found) in zip(DIRECTIONS, (sides, sides[::-1]), strict=True):
        scores[direction] = retrieval_metrics(
            asked[0],
            found[0],
            asked[1],
            found[1],
            bootstrap_samples=resampling.samples,
            seed=resampling.seed,
        )
    return scores


def mean_over(languages: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Unweighted means over languages; times_chance is the mean value over the mean chance."""
    means: dict[str, Any] = {}
    for direction in DIRECTIONS:
        rows = [languages[name][direction] for name in names]
        means[direction] = {
            metric: {"value": sum(row[metric]["value"] for row in rows) / max(1, len(rows))}
            for metric in METRICS
        }
        for k in RECALL_AT:
            entry = means[direction][f"r@{k}"]
            chance = sum(row[f"r@{k}"]["chance"] for row in rows) / max(1, len(rows))
            entry |= {"chance": chance, "times_chance": entry["value"] / chance if rows else 0.0}
    return means


def score_zeroshot(
    encoder: Encoder, one: ZeroShotSetConfig, data: DataConfig, resampling: Resampling
) -> dict[str, Any]:
    """Classify a labelled set by prompts; classes are the labels that occur, sorted."""
    chosen = choose_labelled(one, data, seed=resampling.seed)
    place, pictures, bad = _encode_items(encoder, chosen)
    labels = [chosen.items[i].label or "" for i in sorted(place, key=place.__getitem__)]
    classes = sorted(set(labels))
    prompts = fill_templates([one.class_names.get(c, c) for c in classes], one.templates)
    prototypes = class_prototypes(encoder.texts(prompts), len(one.templates))
    truth = torch.tensor([classes.index(label) for label in labels])
    failed = [*chosen.bad, *bad]
    return {
        **chosen.source,
        "num_bad": len(failed),
        "bad": [f"{key}: {reason}" for key, reason in failed[:_MAX_LISTED_BAD]],
        **zeroshot_metrics(
            pictures,
            prototypes,
            truth,
            classes,
            bootstrap_samples=resampling.samples,
            seed=resampling.seed,
        ),
    }
