"""The `data` section: what is read and how it becomes batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from carillon.engine.config import changed, section, setting
from carillon.engine.data.tokenizer import TokenizerConfig
from carillon.engine.data.transforms import ImageAugmentConfig

MAX_BATCH_SIZE = 1_000_000  # the largest published ones are below 200,000


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

    nsfw: bool = setting(
        False, "Pass over items that curation flagged by a stage of type nsfw; it must have run."
    )
    lang_allow: tuple[str, ...] = setting(
        (), "Languages of captions to use; pictures with none are passed over; empty: all."
    )


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """`data.shuffle`: how far apart in the set the rows of a batch lie."""

    block_rows: int | None = setting(
        None,
        "Rows that lie together and are read about the same time; none: over the whole set.",
        min=1,
        max=1_000_000_000,
    )
    window_blocks: int = setting(
        64, "Blocks whose rows are shuffled together.", min=1, max=1_000_000
    )

    def check(self) -> Iterator[str]:
        if self.block_rows is None and changed(self, "window_blocks"):
            yield (
                f"window_blocks: {self.window_blocks} given, but block_rows is none: rows are "
                "shuffled over the whole set; set block_rows, or drop it"
            )


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """`data.packing`: how a decoder's rows are filled with captions."""

    window: int = setting(
        16, "Samples that each stream looks through for one that fits.", min=1, max=100_000
    )
    streams: int = setting(
        4,
        "Streams that take turns at each row of the batch; a process uses at most as many "
        "loader workers, a number that divides it.",
        min=1,
        max=1024,
    )
    max_documents: int = setting(
        256, "Captions that a row has room for, or a third of its tokens.", min=1, max=65_536
    )


_SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """`data.mixture.<name>`: one of several sets."""

    path: str | None = setting(
        None, "A data set folder, or a folder or pattern of WebDataset tars."
    )
    shards: tuple[str, ...] = setting((), "Instead of path: tar files or brace patterns.")
    split: str | None = setting(None, "Split to train on; none: `train`, or the set's only split.")
    weight: float | None = setting(
        None,
        "Share of the samples, over the sum of all weights; none: its number of rows.",
        min=0,
        max=1e12,
    )

    def check(self) -> Iterator[str]:
        yield from _source_problems(self.path, self.shards)


@dataclass(frozen=True, kw_only=True)
class JoinConfig(SetConfig):
    """`data.joins.<name>`: a set that joins the mixture later."""

    from_position: int = setting(
        help="Samples of the run, over all processes, before the set joins.", min=1, max=1 << 50
    )


def _source_problems(path: str | None, shards: tuple[str, ...]) -> Iterator[str]:
    if (path is None) == (not shards):
        yield "path: give either path or shards (a folder, or a list of tars)"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`: what is read and how it becomes batches."""

    path: str | None = setting(
        None, "A data set folder, or a folder or pattern of WebDataset tars; a path or a URL."
    )
    shards: tuple[str, ...] = setting(
        (), "Instead of path: tar files or brace patterns; paths or URLs."
    )
    split: str | None = setting(None, "Split to train on; none: `train`, or the set's only split.")
    mixture: dict[str, SetConfig] = setting({}, "Instead of path: several sets, by names.")
    joins: dict[str, JoinConfig] = setting(
        {},
        "Sets that join the mixture at a stated position. A run that has not come so far may be "
        "given more of them and goes on; its checkpoints say which it has had.",
        hashed=False,
    )
    mixture_temperature: float = setting(
        1.0,
        "Shares are weights (or numbers of rows) to the power 1/temperature; above 1 small sets "
        "are read more often.",
        min=0.1,
        max=100.0,
    )
    validation_every: int = setting(
        0, "Hold out every n-th row for validation; 0 holds out none.", min=0, max=1_000_000_000
    )
    batch_size: int = setting(
        256,
        "Pairs, or a decoder's rows, in a global batch, over all processes.",
        min=2,
        max=MAX_BATCH_SIZE,
    )
    micro_batch_size: int | None = setting(
        None,
        "Pairs or rows a process computes at once; fewer pairs than its share: cached gradients.",
        min=1,
        max=MAX_BATCH_SIZE,
    )
    shuffle: ShuffleConfig = section(ShuffleConfig)
    packing: PackingConfig = section(PackingConfig)
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
    worker_timeout_s: float = setting(
        300.0,
        "Seconds after which a loader process that delivers nothing is replaced.",
        min=5,
        max=86_400,
        hashed=False,
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
    language_temperature: float | None = setting(
        None,
        "Choose languages as often as their number of captions to the power 1/temperature, times "
        "language_weights; none: evenly among those that a row has.",
        min=0.1,
        max=100.0,
    )
    tokenizer: TokenizerConfig = section(TokenizerConfig)

    def check(self) -> Iterator[str]:
        yield from (
            self._mixture_problems() if self.mixture else _source_problems(self.path, self.shards)
        )
        if not self.mixture and (self.joins or changed(self, "mixture_temperature")):
            name = "joins" if self.joins else "mixture_temperature"
            yield f"{name}: given, but there is no mixture; name the sets in data.mixture"
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

    def _mixture_problems(self) -> Iterator[str]:
        for name in ("path", "shards", "split"):
            if getattr(self, name):
                yield f"{name}: given beside mixture; write it below a set of the mixture"
        sets = {**self.mixture, **self.joins}
        for name in sets:
            if not _SET_NAME.fullmatch(name):
                yield f"mixture: {name!r} is no name; use letters, digits, - and _, at most 64"
            if name in self.mixture and name in self.joins:
                yield f"joins: {name} is in mixture already; give it another name"
        if len({one.weight is None for one in sets.values()}) > 1:
            lacking = ", ".join(name for name, one in sets.items() if one.weight is None)
            yield f"mixture: {lacking} without a weight; give all sets one, or none"
        if all(one.weight == 0 for one in self.mixture.values()):
            yield "mixture: all weights are 0; one at least must be above"
