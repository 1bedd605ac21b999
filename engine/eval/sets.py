"""Which pictures and texts a model is asked about, chosen the same way for every run.

Rows are walked in the order of a hash of their keys, so the items of a set follow from the set and
the settings alone: not from the model, the run, or how the shards were written. Per language the
first `max_queries` pictures with a caption are taken. To bound the walk on huge sets at most
SCAN_FACTOR times that many rows are read, so a language on under a tenth of the pictures may get
fewer. Left out: sampling by anything but the hash.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from carillon.engine.config import UserError, setting
from carillon.engine.data.config import DataConfig
from carillon.engine.data.order import HeldOut
from carillon.engine.data.shards import SampleError, Split
from carillon.engine.index.source import choose_split, training_set

SCAN_FACTOR = 10
VALIDATION = "validation"
CORE_LANGUAGES = ("en", "de", "fr", "es", "ru", "ar", "hi", "zh", "ja", "tr")
PHOTO_TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")


@dataclass(frozen=True, kw_only=True)
class RetrievalSetConfig:
    """One entry of `evaluation.retrieval`: pictures and captions to find each other."""

    path: str | None = setting(None, "A data set; none: the training data.")
    split: str | None = setting(
        None, "Its split; none: the held-out rows of the training data, or another set's only one."
    )
    languages: tuple[str, ...] = setting(
        (), "Languages to score, or `all`; empty: data.filters.lang_allow where it is set, or all."
    )
    core_languages: tuple[str, ...] = setting(
        CORE_LANGUAGES, "Languages whose mean is also reported apart, those the set has."
    )
    max_queries: int = setting(
        1500, "Pictures per language: the gallery, and the queries of image to text.", min=2
    )
    one_text_each: bool = setting(
        False, "Use a picture's first caption only, even where it has several."
    )
    one_per_concept: bool = setting(
        False, "Take one picture of each `base_concept` (else `concept`) of the samples."
    )


@dataclass(frozen=True, kw_only=True)
class ZeroShotSetConfig:
    """One entry of `evaluation.zeroshot`: labelled pictures to classify by their prompts."""

    path: str = setting(help="A data set whose samples have a `label`.")
    split: str | None = setting(None, "Its split; none: its only one.")
    templates: tuple[str, ...] = setting(PHOTO_TEMPLATES, "Prompts, {} standing for the class.")
    class_names: dict[str, str] = setting({}, "What to call a label in prompts; default: itself.")
    max_images: int = setting(10_000, "Pictures to classify.", min=1)

    def check(self) -> Iterable[str]:
        if not self.templates:
            yield "templates: at least one is needed"
        for template in self.templates:
            if template.count("{}") != 1:
                yield f'templates: {template!r} given, "{{}}" must occur once, for the class name'


class Item(NamedTuple):
    """A picture that takes part: where it stands, and what was said of it."""

    row: int
    key: str
    captions: dict[str, list[str]]
    label: str | None


class ChosenItems(NamedTuple):
    """The pictures of one set, in hash order, and the places of those used for each language."""

    split: Split
    items: list[Item]
    by_language: dict[str, list[int]]
    bad: list[tuple[str, str]]
    source: dict[str, Any]


def open_rows(
    path: str | None, split: str | None, data: DataConfig
) -> tuple[Split, Sequence[int], dict[str, Any]]:
    """The split and rows that a set names, and where they come from as a JSON-able dict.

    Raises: UserError when the set, the split or the held-out rows do not exist.
    """
    dataset, chosen = choose_split(path, split, data)
    source = {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "split": chosen.name}
    if path is not None or split is not None:
        return chosen, range(len(chosen)), source
    rows = HeldOut(len(chosen), data.validation_every).validation_rows()
    if not len(rows):
        raise UserError(
            "no rows of the training data are held out: set data.validation_every "
            "(10 holds out a tenth), or name a split or another set to evaluate on"
        )
    return chosen, rows.tolist(), source | {"split": f"{VALIDATION} rows of {chosen.name}"}


def default_retrieval_sets(data: DataConfig) -> dict[str, RetrievalSetConfig]:
    """What is scored when nothing is named: the held-out rows, and every split not trained on."""
    _, trained = choose_split(None, None, data)
    sets = {}
    if data.validation_every:
        sets[VALIDATION] = RetrievalSetConfig()
    others = (name for name in training_set(data).splits if name != trained.name)
    return sets | {name: RetrievalSetConfig(split=name) for name in others}


def choose_items(config: RetrievalSetConfig, data: DataConfig, *, seed: int) -> ChosenItems:
    """Walk the rows in hash order and keep what the settings ask for.

    Raises: UserError as open_rows, and when no language has two pictures.
    """
    split, rows, source = open_rows(config.path, config.split, data)
    items: list[Item] = []
    bad: list[tuple[str, str]] = []
    wanted = _languages(config, data)
    by_language: dict[str, list[int]] = {language: [] for language in wanted}
    concepts: set[str] = set()
    for row in hash_order(split, rows, seed)[: SCAN_FACTOR * config.max_queries]:
        if wanted and all(len(places) >= config.max_queries for places in by_language.values()):
            break
        item, concept = _read_item(split, row, bad)
        if item is None or (config.one_per_concept and concept in concepts):
            continue
        if _place(item, len(items), by_language, wanted, config.max_queries):
            items.append(item)
            concepts.add(concept)
    scored = {code: places for code, places in sorted(by_language.items()) if len(places) > 1}
    if not scored:
        asked = f" in {', '.join(wanted)}" if wanted else ""
        raise UserError(f"{source['dataset']}: fewer than two pictures have a caption{asked}")
    return ChosenItems(split, items, scored, bad, source)


def choose_labelled(config: ZeroShotSetConfig, data: DataConfig, *, seed: int) -> ChosenItems:
    """The first `max_images` labelled pictures in hash order.

    Raises: UserError as open_rows, and when fewer than two labels occur.
    """
    split, rows, source = open_rows(config.path, config.split, data)
    items: list[Item] = []
    bad: list[tuple[str, str]] = []
    for row in hash_order(split, rows, seed)[: SCAN_FACTOR * config.max_images]:
        item, _ = _read_item(split, row, bad)
        if item is not None and item.label is not None and len(items) < config.max_images:
            items.append(item)
    if len({item.label for item in items}) < 2:
        raise UserError(f"{source['dataset']}: zero-shot needs samples with two labels or more")
    return ChosenItems(split, items, {}, bad, source)


def hash_order(split: Split, rows: Sequence[int], seed: int) -> list[int]:
    """Rows sorted by a hash of their keys: fixed for a set and a seed."""

    def digest(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}\x1f{split.key(row)}".encode(), digest_size=16).digest()

    digests = np.array([digest(int(row)) for row in rows], dtype="S16")
    return [int(rows[i]) for i in np.argsort(digests, kind="stable")]


def normal_text(text: str) -> str:
    """The form under which two texts count as equal: NFC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _languages(config: RetrievalSetConfig, data: DataConfig) -> tuple[str, ...]:
    """The languages to score; none stands for all that occur."""
    if config.languages == ("all",):
        return ()
    return config.languages or data.filters.lang_allow


def _read_item(split: Split, row: int, bad: list[tuple[str, str]]) -> tuple[Item | None, str]:
    try:
        sample = split.read(row)
    except SampleError as error:
        bad.append((error.key, error.reason))
        return None, ""
    label = sample.meta.get("label")
    concept = sample.meta.get("base_concept", sample.meta.get("concept", sample.key))
    captions = sample.meta["captions"]
    return Item(row, sample.key, captions, None if label is None else str(label)), str(concept)


def _place(
    item: Item, place: int, by_language: dict[str, list[int]], wanted: Sequence[str], quota: int
) -> bool:
    """Enter the item for each of its languages that still has room; says whether any had."""
    taken = False
    for language in wanted or item.captions:
        places = by_language.setdefault(language, [])
        if item.captions.get(language) and len(places) < quota:
            places.append(place)
            taken = True
    return taken
