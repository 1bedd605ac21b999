"""The `data` section: what is read and how it becomes batches."""

from __future__ import annotations

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
class DataConfig:
    """`data`: what is read and how it becomes batches."""

    path: str | None = setting(
        None, "A data set folder, or a folder or pattern of WebDataset tars; a path or a URL."
    )
    shards: tuple[str, ...] = setting(
        (), "Instead of path: tar files or brace patterns; paths or URLs."
    )
    split: str | None = setting(None, "Split to train on; none: `train`, or the set's only split.")
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
    documents_per_row: int = setting(
        16,
        "Captions in a decoder's row; what goes past its end is left out, the rest is padding.",
        min=1,
        max=65_536,
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

    def sources(self) -> tuple[str, ...]:
        return self.shards or ((self.path,) if self.path is not None else ())
