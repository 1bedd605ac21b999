"""Vectors in order, whatever the batches, with bad pictures reported."""

import numpy as np
import torch

from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.shards import open_dataset
from carillon.engine.index.encoder import Encoder
from carillon.engine.train.run import LoadedRun

# fp32 sums in another order for another batch shape.
BATCH_NOISE = 1e-5


def test_pictures_come_in_the_order_asked_for(run: LoadedRun) -> None:
    split = open_dataset(run.config.data.path or "").splits["train"]
    rows = [7, 3, 11, 0, 4]
    batches = list(Encoder(run.model, run.tokenizer, batch_size=2).pictures(split, rows))
    assert [row for batch in batches for row in batch.rows] == rows
    assert [k for batch in batches for k in batch.keys] == [split.key(row) for row in rows]
    vectors = torch.cat([batch.vectors for batch in batches])
    single = Encoder(run.model, run.tokenizer)
    for row, vector in zip(rows, vectors, strict=True):
        alone = single.picture(decode_image(split.read(row).medium("image")))
        torch.testing.assert_close(vector, alone, rtol=0, atol=BATCH_NOISE)


def test_texts_keep_their_places_and_equal_texts_their_vector(run: LoadedRun) -> None:
    encoder = Encoder(run.model, run.tokenizer, batch_size=2)
    texts = ["a much longer text than the others", "red", "vert", "red", "أزرق"]
    vectors = encoder.texts(texts)
    assert torch.equal(vectors[1], vectors[3])
    for text, vector in zip(texts, vectors, strict=True):
        torch.testing.assert_close(vector, encoder.texts([text])[0], rtol=0, atol=BATCH_NOISE)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert encoder.texts([]).shape == (0, 16)


def test_context_can_only_be_lowered(run: LoadedRun) -> None:
    long = "word " * 60
    limited = Encoder(run.model, run.tokenizer, context=8).texts([long, "word"])
    full = Encoder(run.model, run.tokenizer, context=10_000).texts([long, "word"])
    assert not torch.allclose(limited[0], full[0])
    np.testing.assert_allclose(limited[1], full[1], atol=BATCH_NOISE)


def test_bf16_is_near_fp32_and_still_of_unit_length(run: LoadedRun) -> None:
    texts = ["red", "bleu", "pink"]
    half = Encoder(run.model, run.tokenizer, bf16=True).texts(texts)
    whole = Encoder(run.model, run.tokenizer).texts(texts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    # bf16 keeps 8 bits: a few times 2**-8 over one block.
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05)
    assert not torch.equal(half, whole)
