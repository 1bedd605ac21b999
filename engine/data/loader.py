"""Positions in, batches out: the training loader.

The dataset maps a global position to a finished sample, purely: row by `SampleOrder`, augmentation
and caption by a generator keyed with the position. Workers are therefore stateless, the loader's
whole state is the next position, and any world size, worker count or restart yields the same
stream. A bad sample is replaced by a drawn one, reported with its key and reason, and counted; past
`max_bad_share` the run stops. A sound picture without a caption that the settings allow is
filtered: replaced the same way, counted apart, and no fault. Trade-off: nothing lists the rows that
qualify, so start-up stays independent of their number, and a set of which one row in a hundred does
costs a hundred reads a sample. Caption rule: a language among those allowed that the picture has,
by weight (1 unless set), then one of its captions uniformly.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from carillon.engine.config import UserError, section, setting
from carillon.engine.data.decode.image import decode_rgb
from carillon.engine.data.order import HeldOut, SampleOrder, position_generator
from carillon.engine.data.pair_ids import NO_ID, pair_id
from carillon.engine.data.shards import Dataset as Opened
from carillon.engine.data.shards import RawSample, SampleError, Split, open_dataset
from carillon.engine.data.tokenizer import Tokenizer, TokenizerConfig
from carillon.engine.data.transforms import (
    ImageAugmentConfig,
    Picture,
    needed_side,
    train_transform,
)

MAX_BATCH_SIZE = 1_000_000  # the largest published ones are below 200,000
_MAX_BAD = 20  # at one position; a set this damaged is past any sensible max_bad_share
# Rows tried at one position. Where one in a hundred qualifies, all of them fail at one position in
# 10^21; where none does, that is told after the second or so that reading them takes.
_MAX_DRAWS = 5000
_MAX_BAD_NAMED = 3
_MIN_JUDGED = 200  # samples read, bad ones included, before max_bad_share is judged
_MAX_NAMED = 20  # languages in a message


@dataclass(frozen=True, kw_only=True)
class TextAugmentConfig:
    """`data.augment.text`."""

    max_len: int | None = setting(
        None,
        "Tokens kept of a caption, bos and eos included; none: the text model's context.",
        min=3,
        max=131_072,
    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """`data.augment`."""

    image: ImageAugmentConfig = section(ImageAugmentConfig)
    text: TextAugmentConfig = section(TextAugmentConfig)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """`data.filters`."""

    nsfw: bool = setting(False, "Drop pictures that the curation stage scored unsafe.")
    lang_allow: tuple[str, ...] = setting(
        (), "Languages of captions to use; pictures with none are passed over; empty: all."
    )

    def check(self) -> Iterator[str]:
        if self.nsfw:
            yield (
                "nsfw: true needs the scores of the curation stage, which comes with the data "
                "plane (ingest and curate); set data.filters.nsfw=false until then"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`: what is read and how it becomes batches."""

    path: str | None = setting(
        None, "A data set folder, or a folder or pattern of WebDataset tars."
    )
    shards: tuple[str, ...] = setting((), "Instead of path: tar files or brace patterns.")
    split: str | None = setting(None, "Split to train on; none: `train`, or the set's only split.")
    validation_every: int = setting(
        0, "Hold out every n-th row for validation; 0 holds out none.", min=0, max=1_000_000_000
    )
    batch_size: int = setting(
        256, "Pairs in a global batch, over all processes.", min=2, max=MAX_BATCH_SIZE
    )
    micro_batch_size: int | None = setting(
        None,
        "Pairs a process computes at once; less than its share uses cached gradients.",
        min=1,
        max=MAX_BATCH_SIZE,
    )
    num_workers: int = setting(
        1,
        "Loader processes beside each training process; 0 loads in it.",
        min=0,
        max=1024,
        hashed=False,
    )
    prefetch_batches: int = setting(
        4, "Batches each worker keeps ready.", min=1, max=1000, hashed=False
    )
    max_bad_share: float = setting(
        0.01,
        "Stop when more than this share of the samples read is bad; judged from 200 reads on.",
        min=0,
        max=1,
    )
    augment: AugmentConfig = section(AugmentConfig)
    filters: FilterConfig = section(FilterConfig)
    language_weights: dict[str, float] = setting(
        {}, "Weight of a language in the choice of caption."
    )
    tokenizer: TokenizerConfig = section(TokenizerConfig)

    def check(self) -> Iterator[str]:
        if (self.path is None) == (not self.shards):
            yield "path: give either path or shards (a folder, or a list of tars)"
        if self.validation_every == 1:
            yield "validation_every: 1 would hold out every row; 0 (none) or at least 2 is allowed"
        for language, weight in self.language_weights.items():
            if not 0 <= weight < float("inf"):
                yield f"language_weights.{language}: {weight} given, 0 or more is allowed"
        allowed = self.filters.lang_allow
        unused = [code for code in self.language_weights if allowed and code not in allowed]
        if unused:
            yield (
                f"language_weights: {', '.join(unused)} given, but filters.lang_allow has only "
                f"{', '.join(allowed)}; add to that list or drop the weight"
            )
        given, how = ("shards", "[FOLDER]") if self.shards else ("path", "FOLDER")
        for source in self.sources():
            if "://" in source:
                yield (
                    f"{given}: {source} is remote; object stores come with the data plane. "
                    f"Copy the shards to a local folder and set data.{given}={how}"
                )

    def sources(self) -> tuple[str, ...]:
        return self.shards or ((self.path,) if self.path is not None else ())


class TrainingSample(NamedTuple):
    position: int
    key: str
    image: Picture
    caption: str
    language: str
    pair_id: int


class Batch(NamedTuple):
    """One process's share of a global batch, in position order.

    Shapes: images (B, S, S, 3) uint8, tokens (B, L) int64, lengths (B,) int64.
    `bad` holds (key, reason) of the bad samples that were replaced, `num_filtered` says how many
    sound ones were. `ids` (B,) int64 says which pairs are no negatives of each other: those that
    have it equal, and not below 0; none where nothing says so.
    """

    images: Tensor
    tokens: Tensor
    lengths: Tensor
    keys: list[str]
    languages: list[str]
    bad: list[tuple[str, str]]
    num_filtered: int = 0
    ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._replace(
            images=self.images.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            ids=self.ids.to(device, non_blocking=True) if self.ids is not None else None,
        )

    def microbatches(self, size: int) -> list[Batch]:
        """Consecutive parts of `size` pairs (the last may be shorter)."""
        if size >= len(self.keys):
            return [self]
        return [self._part(start, start + size) for start in range(0, len(self.keys), size)]

    def _part(self, start: int, stop: int) -> Batch:
        return Batch(
            images=self.images[start:stop],
            tokens=self.tokens[start:stop],
            lengths=self.lengths[start:stop],
            keys=self.keys[start:stop],
            languages=self.languages[start:stop],
            bad=[],
            ids=self.ids[start:stop] if self.ids is not None else None,
        )


def open_training(config: DataConfig) -> tuple[Opened, Split]:
    """The set and its split to train on. Raises UserError when either is not there."""
    dataset = open_dataset(config.path if config.path is not None else list(config.shards))
    if config.split is not None:
        if config.split not in dataset.splits:
            given = f"data.split: {config.split} is not in the set"
            raise UserError(f"{given}; it has {', '.join(dataset.splits)}")
        return dataset, dataset.splits[config.split]
    if "train" in dataset.splits:
        return dataset, dataset.splits["train"]
    if len(dataset.splits) == 1:
        return dataset, next(iter(dataset.splits.values()))
    raise UserError(f"data.split: name one of the set's splits: {', '.join(dataset.splits)}")


def open_split(config: DataConfig) -> Split:
    """The split to train on. Raises UserError when the set or the split is not there."""
    return open_training(config)[1]


def _all_bad(bad: Sequence[tuple[str, str]]) -> UserError:
    keys = list(dict.fromkeys(key for key, _ in bad))  # stand-ins may come twice
    return UserError(
        f"{len(bad)} samples in a row are bad, the first {', '.join(keys[:_MAX_BAD_NAMED])}; "
        f"{bad[0][0]}: {bad[0][1]}; is this the right data set?"
    )


class _FilteredSample(Exception):
    """A sound sample of which the settings allow no caption."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.languages = tuple(languages)


class PositionedSamples(Dataset[Any]):
    """Global position -> training sample, as a pure function."""

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        size: int,
        context: int,
        seed: int,
        same_field: str | None = None,
    ) -> None:
        self.split, self.config, self.tokenizer = split, config, tokenizer
        self.size, self.seed, self.same_field = size, seed, same_field
        self._min_side = needed_side(size, config.augment.image)
        self.context = min(config.augment.text.max_len or context, context)
        self.held_out = HeldOut(len(split), config.validation_every)
        self.order = SampleOrder(self.held_out.num_training, seed)

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError:
        """The batch of the given positions (the hook that DataLoader calls once a batch).

        An error that concerns the user is returned, since a worker's exception would arrive as
        a traceback in a message.
        """
        try:
            return self.batch(positions)
        except UserError as error:
            return error

    def batch(self, positions: Sequence[int]) -> Batch:
        """The batch of the given global positions."""
        where = np.asarray(positions, dtype=np.int64)
        rows = self.held_out.training_row(self.order.rows(where))
        bad: list[tuple[str, str]] = []
        drawn = [self._sample(int(p), int(r), bad) for p, r in zip(where, rows, strict=True)]
        samples = [sample for sample, _ in drawn]
        tokens, lengths = self.tokenizer.encode([s.caption for s in samples], self.context)
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        keys = [sample.key for sample in samples]
        languages = [sample.language for sample in samples]
        num_filtered = sum(filtered for _, filtered in drawn)
        ids = torch.tensor([sample.pair_id for sample in samples]) if self.same_field else None
        return Batch(images, tokens, lengths, keys, languages, bad, num_filtered, ids)

    def _sample(
        self, position: int, row: int, bad: list[tuple[str, str]]
    ) -> tuple[TrainingSample, int]:
        """The sample at a position and how many filtered rows it stands in for; bad ones are added
        to `bad`."""
        num_bad = num_filtered = 0
        languages: Counter[str] = Counter()
        for attempt in range(_MAX_DRAWS):
            try:
                return self._read(position, row), num_filtered
            except _FilteredSample as sample:
                num_filtered += 1
                languages.update(sample.languages)
            except SampleError as error:
                num_bad += 1
                bad.append((error.key, error.reason))
            if num_bad == _MAX_BAD:
                raise _all_bad(bad[-_MAX_BAD:])
            drawn = np.array([self.order.replacement(position, attempt)])
            row = int(self.held_out.training_row(drawn)[0])
        raise self._none_qualifies(num_filtered, languages)

    def _none_qualifies(self, num_filtered: int, languages: Counter[str]) -> UserError:
        weights, allowed = self.config.language_weights, self.config.filters.lang_allow
        wanted = ", ".join(language for language in allowed if weights.get(language, 1.0) > 0)
        found = ", ".join(language for language, _ in languages.most_common(_MAX_NAMED))
        more = len(languages) - _MAX_NAMED
        return UserError(
            f"none of {num_filtered:,} rows drawn has a caption in "
            f"{wanted or 'a language of weight above 0'}; they have captions in {found}"
            f"{f' and {more} more' if more > 0 else ''}. Choose other languages "
            "(data.filters.lang_allow, data.language_weights), or a set of which at least one row "
            "in a hundred has them."
        )

    def _read(self, position: int, row: int) -> TrainingSample:
        raw = self.split.read(row)
        generator = position_generator(self.seed, "sample", position)
        language, caption = self._choose_caption(raw, generator)
        same = pair_id(raw, self.same_field) if self.same_field is not None else NO_ID
        try:
            picture = decode_rgb(raw.media, min_side=self._min_side)
        except ValueError as error:
            raise SampleError(raw.key, str(error)) from None
        image = train_transform(picture, self.size, self.config.augment.image, generator)
        return TrainingSample(position, raw.key, image, caption, language, same)

    def _choose_caption(self, raw: RawSample, generator: np.random.Generator) -> tuple[str, str]:
        allowed = self.config.filters.lang_allow
        captions = {c: texts for c, texts in raw.meta.get("captions", {}).items() if texts}
        if not captions:
            raise SampleError(raw.key, "no caption in any language")
        languages = sorted(c for c in captions if not allowed or c in allowed)
        weights = [self.config.language_weights.get(language, 1.0) for language in languages]
        total = sum(weights)
        if total <= 0:
            raise _FilteredSample(captions)
        pick = np.searchsorted(np.cumsum(weights), generator.random() * total, side="right")
        language = languages[min(int(pick), len(languages) - 1)]
        texts = captions[language]
        return language, str(texts[int(generator.integers(len(texts)))])


class _LocalPositions:
    """Positions of this process's contiguous share of each global batch, without end."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size = start, batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.offset
        while True:
            yield list(range(first, first + self.share))
            first += self.batch_size


class TrainingLoader:
    """Batches of this process from `position` on; its state is that position and the counts."""

    def __init__(
        self, samples: PositionedSamples, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.samples, self.rank, self.world_size = samples, rank, world_size
        self._pin = device.type == "cuda"
        self.position = 0
        self.num_read = 0
        self.num_bad = 0
        self.num_filtered = 0

    def __iter__(self) -> Generator[Batch, None, None]:
        """Batches without end; close it, or its workers outlive an error that keeps its frame."""
        config = self.samples.config
        positions = _LocalPositions(self.position, config.batch_size, self.rank, self.world_size)
        workers = config.num_workers
        loader: DataLoader[Any] = DataLoader(
            self.samples,
            batch_sampler=positions,
            num_workers=workers,
            prefetch_factor=config.prefetch_batches if workers else None,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers else None,
            timeout=600 if workers else 0,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            self.position += config.batch_size
            self.num_read += len(batch.keys)
            self.num_bad += len(batch.bad)
            self.num_filtered += batch.num_filtered
            yield batch

    def check_bad_share(self, *, num_bad: int, num_read: int, num_filtered: int = 0) -> None:
        """Raise UserError once the run's bad share passes the limit; judged from 200 reads on.

        Filtered samples were read and are sound: damage that the search for the few that qualify
        comes across is no larger a share than it is of the set.
        """
        limit = self.samples.config.max_bad_share
        total = num_read + num_filtered + num_bad
        if total >= _MIN_JUDGED and num_bad > limit * total:
            raise UserError(
                f"{num_bad} of {total} samples read are bad, more than "
                f"data.max_bad_share={limit:g}; see the log for keys and reasons"
            )

    def counts(self) -> dict[str, int]:
        """What this process read so far: samples used, bad ones and filtered ones."""
        return {
            "num_read": self.num_read,
            "num_bad": self.num_bad,
            "num_filtered": self.num_filtered,
        }

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, **self.counts()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = int(state["position"])
        self.num_read, self.num_bad = int(state["num_read"]), int(state["num_bad"])
        self.num_filtered = int(state["num_filtered"])


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)  # the training process decides when to end
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
