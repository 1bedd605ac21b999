"""The peer of our loader: a `webdataset` pipeline with torchvision's transforms.

The stages and their order are those of OpenCLIP's own training pipeline (open_clip_train.data,
get_wds_dataset): shuffle buffer, PIL decoding, random resized crop, tokenising per caption,
batching. The one stage that it lacks chooses a caption among several, by the rule that ours
follows: a language uniformly, then one of its captions uniformly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from torch import Tensor

from carillon.engine.data.tokenizer import Tokenizer

_SHUFFLE_BUFFER = 1000  # OpenCLIP's is 5,000, most of a set as small as these
_PICTURES = "jpg;png;jpeg;webp"


def choose_caption(meta: Mapping[str, Any], languages: Sequence[str] = ()) -> str:
    captions = meta["captions"]
    there = [code for code in captions if captions[code] and (not languages or code in languages)]
    return str(random.choice(captions[random.choice(there)]))


def pipeline(
    shards: Sequence[Path],
    *,
    transform: Callable[[Image.Image], Tensor],
    tokenize: Callable[[str], Tensor],
    batch_size: int,
    languages: Sequence[str] = (),
) -> wds.DataPipeline:
    """Endless batches [images, tokens] of whole size from local tars."""
    return wds.DataPipeline(
        wds.SimpleShardList([str(shard) for shard in shards]),
        wds.shuffle(2000),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER // 4),
        wds.decode("pilrgb"),
        wds.rename(image=_PICTURES, text="json"),
        wds.map_dict(image=transform, text=lambda meta: tokenize(choose_caption(meta, languages))),
        wds.to_tuple("image", "text"),
        wds.batched(batch_size, partial=False),
    ).repeat()


def padded_tokens(tokenizer: Tokenizer, context: int) -> Callable[[str], Tensor]:
    """One caption to (context,) ids, padded to the full context as OpenCLIP's tokenizers do."""

    def tokenize(text: str) -> Tensor:
        tokens, length = tokenizer.encode([text], context)
        row = tokens.new_full((context,), tokenizer.pad_id)
        row[: int(length)] = tokens[0]
        return row

    return tokenize
