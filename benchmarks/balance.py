"""What dealing a batch over data ranks by its samples' costs is worth: counted, not timed.

The largest sum of a rank's FLOPs over the mean (1 is even), for a batch in its order and dealt by
engine/data/balance.py, and what the largest, which a step waits for, is lowered by:
- packed rows: speeches of Shakespeare as documents, rows of a small decoder;
- pictures of their own sizes: scans and photos whose longest side is at most 384, in ViT-B/16;
- captions at their own lengths, in CLIP's base text tower, as a tower without padding would take
  them, and pairs of such a caption and a picture of 224 pixels in ViT-B/16;
- captions as the engine's tower takes them, each as long as the longest of its rank.
Run by `python benchmarks/balance.py`; writes results/balance.json.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import FLICKR8K, flickr8k_shards, keep

from carillon.engine.data.balance import deal, imbalance
from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.models.towers.decoder import build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig, build_dual_encoder

DATA = FLICKR8K.parent
LAYOUTS = ((2, 16), (8, 4), (8, 16), (8, 64))  # ranks, samples of each
BATCHES = 20
PATCH, LONGEST = 16, 384
CONTEXT, ROW = 77, 2048
Costs = Callable[[Sequence[float]], list[float]]


def captions() -> tuple[Tokenizer, list[str]]:
    (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
    texts = list(captions_of(split, 30_000, ("en", "de", "fr")))
    return Tokenizer.train(texts, vocab_size=8000), texts


def picture_tokens() -> list[int]:
    """Patches and a class token of pictures in their own shapes, by the sizes in their headers."""
    found = []
    for shard in sorted(DATA.glob("*/*.tar")):
        if shard.parent.name in ("flickr8k", "sealed"):  # squashed to squares of one size
            continue
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(".jpg") or ".frames" in member.name:
                    continue
                file = tar.extractfile(member)
                assert file is not None
                width, height = Image.open(io.BytesIO(file.read())).size
                scale = min(1.0, LONGEST / max(width, height))
                columns, rows = (max(1, round(side * scale / PATCH)) for side in (width, height))
                found.append(columns * rows + 1)
    return found


def packed_row_costs(tokenizer: Tokenizer) -> list[float]:
    """FLOPs of rows packed from speeches, attention within documents only."""
    speeches = (DATA / "text/tinyshakespeare.txt").read_text().split("\n\n")
    _, lengths = tokenizer.encode([speech for speech in speeches if speech], ROW)
    rows: list[list[int]] = [[0]]
    for length in lengths.tolist():
        if rows[-1][-1] + length > ROW:
            rows[-1].append(ROW)
            rows.append([0])
        rows[-1].append(rows[-1][-1] + length)
    rows.pop()
    most = max(map(len, rows))
    offsets = torch.tensor([row + [ROW] * (most - len(row)) for row in rows])
    packed = PackedRows.of(torch.zeros(len(rows), ROW, dtype=torch.long), offsets)
    config = DecoderConfig()
    model = build_decoder(config, vocab_size=tokenizer.vocab_size, device="meta")
    linear = ROW * model.flops_per_token(0)
    pairs = packed.attention_pairs().tolist()
    return [float(linear + 4 * config.depth * config.width * each) for each in pairs]


def measured(costs: Sequence[float], ranks: int, share: int, laid_out: Costs) -> dict[str, Any]:
    """Means over batches, drawn alike for both ways. `laid_out`: what a rank's own samples cost."""
    generator = np.random.default_rng(0)
    uneven: dict[str, list[float]] = {"in_order": [], "dealt": []}
    slowest: dict[str, float] = dict.fromkeys(uneven, 0.0)
    in_order = [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    for _ in range(BATCHES):
        batch = generator.choice(costs, ranks * share, replace=len(costs) < ranks * share).tolist()
        for name, ranks_own in (("in_order", in_order), ("dealt", deal(batch, ranks))):
            spent = [laid_out([batch[index] for index in own]) for own in ranks_own]
            uneven[name].append(imbalance([cost for own in spent for cost in own], in_order))
            slowest[name] += max(map(sum, spent))
    means = {name: round(statistics.mean(values), 4) for name, values in uneven.items()}
    saved = 1 - slowest["dealt"] / slowest["in_order"]
    return {"ranks": ranks, "samples_a_rank": share, **means, "time_saved": round(saved, 4)}


def problems() -> Iterator[tuple[str, Sequence[float], Costs]]:
    tokenizer, texts = captions()
    model = build_dual_encoder(
        DualEncoderConfig(dims=512, vision_backbone="vit-b-16", text_backbone="clip-text-b"),
        vocab_size=tokenizer.vocab_size,
        device="meta",
    )
    _, lengths = tokenizer.encode(texts, CONTEXT)
    text = [float(model.text.flops(length)) for length in lengths.tolist()]
    pictures = [
        float(sum(model.vision.transformer.costs(tokens, pooled=True)))
        for tokens in picture_tokens()
    ]
    yield "packed rows of a decoder", packed_row_costs(tokenizer), list
    yield "pictures of their own sizes", pictures, list
    yield "captions, without padding", text, list
    picture = model.flops_per_sample(224, 0)
    yield "pairs of a picture and such a caption", [picture + cost for cost in text], list
    yield "captions, padded", text, lambda own: [max(own)] * len(own)


def main() -> None:
    results = []
    for name, costs, laid_out in problems():
        for ranks, share in LAYOUTS:
            line = {"samples": name, "known": len(costs)} | measured(costs, ranks, share, laid_out)
            results.append(line)
            print(json.dumps(line), flush=True)
    keep(
        "balance",
        {
            "what": "largest sum of a data rank's FLOPs over the mean, means of "
            f"{BATCHES} batches; time_saved: of the largest; counted, so no machine enters",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
