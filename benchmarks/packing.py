"""How full packs of mixed pictures, sounds, videos and texts are, and how even ranks are: counted.

Samples of nine real sets in one mixture (temperature 2), each as a unified tower would take it: a
text's tokens, a picture's patches at its own shape (longest side at most 384, patches of 16), 25
tokens a second of sound, eight frames of a video. Two kinds of pack: one budget of tokens for all
kinds together, and budgets of their own for each (a tower for each kind), with and without a budget
of FLOPs beside them. Cost is FLOPs of a decoder of width 1,024 and 24 blocks, attention within a
sample. Eight ranks of some packs each take the packs
of a step in order; that is how the loader deals them.
Run by `python benchmarks/packing.py`; writes results/packing.json.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from record import FLICKR8K, flickr8k_shards, keep

from carillon.engine.config import build
from carillon.engine.data.balance import imbalance
from carillon.engine.data.config import DataConfig
from carillon.engine.data.order import position_generator
from carillon.engine.data.packing import Sizes, Stream
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.data.training_data import training_data
from carillon.engine.models.towers.decoder import build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig

DATA = FLICKR8K.parent
SETS = ("flickr8k", "daquar_vqa", "sroie_receipts", "opencqa_charts", "coco_boxes")
SETS += ("clothing_cc0", "esc10", "fsdd_digits", "grid_av")
PATCH, LONGEST, FRAMES, TOKENS_A_SECOND = 16, 384, 8, 25
RANKS, STEPS, STREAMS = 8, 12, 4
KINDS = ("text", "patches", "audio", "pictures", "gflops")


def samples() -> tuple[Any, Tokenizer]:
    mixture = {name: {"path": str(DATA / name)} for name in SETS}
    config = build(DataConfig, {"mixture": mixture, "mixture_temperature": 2.0})
    (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
    texts = captions_of(split, 30_000, ("en", "de", "fr"))
    return training_data(config, 7), Tokenizer.train(texts, vocab_size=8000)


def text_of(raw: RawSample, position: int) -> str:
    """A caption, a question with its answer, or all lines of a page."""
    draw = position_generator(7, "text", position)
    captions = [text for texts in raw.meta["captions"].values() for text in texts]
    pairs = [f"{q['question']} {q['answer']}" for q in raw.meta.get("qa", []) if "question" in q]
    lines = " ".join(str(line.get("text", "")) for line in raw.meta.get("lines", []))
    choices = [*captions, *pairs, *([lines] if lines else [])]
    choices += [
        str(raw.meta[name]) for name in ("text", "question", "answer") if raw.meta.get(name)
    ]
    return choices[int(draw.integers(len(choices)))] if choices else "nothing said"


def picture_patches(data: bytes, frames: int = 1) -> int:
    width, height = Image.open(io.BytesIO(data)).size
    scale = min(1.0, LONGEST / max(width, height))
    columns, rows = (max(1, round(side * scale / PATCH)) for side in (width, height))
    return columns * rows * frames if frames == 1 else columns * rows


def sizes_of(raw: RawSample, position: int, tokenizer: Tokenizer) -> Sizes:
    """Tokens of text, patches of pictures, tokens of sound, pictures."""
    text = 2 + len(tokenizer.ids(text_of(raw, position))[:510])
    audio = 0
    for name, data in raw.members.items():
        if name.endswith("flac"):
            audio += max(1, round(soundfile.info(io.BytesIO(data)).duration * TOKENS_A_SECOND))
    patches = pictures = 0
    if "frames.jpg" in raw.members:  # the eight frames of the video, side by side
        patches, pictures = picture_patches(raw.members["frames.jpg"]), FRAMES
    elif any(name.endswith("jpg") for name in raw.members):
        patches, pictures = picture_patches(raw.medium("image")), 1
    return text, patches, audio, pictures


def streams(budget: Sizes, together: bool, window: int, num: int) -> list[Stream[Sizes]]:
    data, tokenizer = samples()

    @cache
    def sample(position: int) -> Sizes:
        (place,) = data.places(np.array([position]))
        return sizes_of(data.read(place), position, tokenizer)

    def counted(sizes: Sizes) -> Sizes:
        text, patches, audio, pictures = sizes
        if together:
            return text + patches + audio, pictures
        cost = round(cost_of([sizes], together, flops_per_token()) / 1e9)
        return (*sizes, cost)[: len(budget)]

    def stream(number: int) -> Stream[Sizes]:
        return Stream(
            lambda index: sample(index * num + number), counted, budget=budget, window=window
        )

    return [stream(number) for number in range(num)]


def cost_of(pack: Sequence[Sizes], together: bool, flops: Any) -> float:
    """FLOPs of a pack; apart, each kind's tokens attend to themselves only."""
    parts = [(sum(s[:3]),) if together else s[:3] for s in pack]
    return float(sum(n * flops(n) for part in parts for n in part if n))


@cache
def flops_per_token() -> Any:
    model = build_decoder(
        DecoderConfig(width=1024, depth=24, num_heads=16, mlp_width=2816),
        vocab_size=8000,
        device="meta",
    )
    return cache(model.flops_per_token)


def measured(budget: Sizes, together: bool, window: int, share: int) -> dict[str, Any]:
    batch = RANKS * share
    all_streams = streams(budget, together, window, batch * STREAMS)
    fills: list[float] = []
    uneven: list[float] = []
    in_order = [list(range(rank * share, (rank + 1) * share)) for rank in range(RANKS)]
    for step in range(STEPS):
        first = step % STREAMS * batch
        packs = [stream.next_pack() for stream in all_streams[first : first + batch]]
        for pack in packs:
            used = [sum(kind) for kind in zip(*pack, strict=True)]
            used = [sum(used[:3]), used[3]] if together else used
            gflops = cost_of(pack, together, flops_per_token()) / 1e9
            fills.append(max(u / b for u, b in zip([*used, gflops], budget, strict=False)))
        costs = [cost_of(pack, together, flops_per_token()) for pack in packs]
        uneven.append(imbalance(costs, in_order))
    return {
        "packs": "one budget" if together else "a budget for each kind",
        "budget": dict(zip(("tokens", "pictures") if together else KINDS, budget, strict=False)),
        "window": window,
        "ranks": RANKS,
        "packs_a_rank": share,
        "fill": round(statistics.mean(fills), 4),
        "imbalance": round(statistics.mean(uneven) - 1, 4),
        "worst_imbalance": round(max(uneven) - 1, 4),
    }


def cases() -> Iterator[tuple[Sizes, bool, int, int]]:
    for window in (1, 4, 16, 64):
        yield (4096, 32), True, window, 4
    yield (4096, 32), True, 16, 1
    yield (8192, 64), True, 16, 4
    yield (1024, 4096, 1024, 32), False, 16, 4
    yield (1024, 4096, 1024, 32, 2400), False, 16, 4


def main() -> None:
    results = []
    for case in cases():
        results.append(measured(*case))
        print(json.dumps(results[-1]), flush=True)
    what = "fullest kind of a pack; largest sum of a rank's FLOPs over the mean, less 1; counted"
    keep("packing", {"what": what, "results": results})


if __name__ == "__main__":
    main()
