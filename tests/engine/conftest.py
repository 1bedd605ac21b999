"""A small real run: coloured squares with names in three languages, and a model that knows them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from carillon.engine.config import build, to_yaml
from carillon.engine.data.shards import ShardWriter, open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.data.transforms import normalize
from carillon.engine.losses.contrastive import softmax_contrastive
from carillon.engine.models.towers.dual_encoder import DualEncoder
from carillon.engine.train.checkpoint import CheckpointStore
from carillon.engine.train.run import LoadedRun, load_run
from carillon.engine.train.run_config import RunConfig, new_dual_encoder

COLOURS = {
    "red": ("rouge", "أحمر", "#e02020"),
    "green": ("vert", "أخضر", "#20b040"),
    "blue": ("bleu", "أزرق", "#2040e0"),
    "yellow": ("jaune", "أصفر", "#f0e020"),
    "black": ("noir", "أسود", "#101010"),
    "white": ("blanc", "أبيض", "#f8f8f8"),
    "orange": ("orange", "برتقالي", "#ff8c00"),
    "pink": ("rose", "وردي", "#ff80c0"),
}


def png(colour: str, size: int = 16) -> bytes:
    """A square of one colour with a mark in its corner, as PNG bytes."""
    import io

    picture = Image.new("RGB", (size, size), colour)
    ImageDraw.Draw(picture).point((0, 0), "#808080")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_colours(out: Path) -> Path:
    """train: every colour twice; shades: once, with two English captions; a label each."""
    with ShardWriter(out, name="colours", source={"made": "for tests"}) as writer:
        for name, (french, arabic, colour) in COLOURS.items():
            captions = {"en": [name], "fr": [french], "ar": [arabic]}
            meta = {"captions": captions, "label": name, "concept": name}
            for i in range(2):
                writer.write(f"{name}{i}", {"png": png(colour, 16 + 8 * i)}, meta)
            both = meta | {"captions": {"en": [name, f"a {name} square"], "fr": [french]}}
            writer.write(f"{name}-shade", {"png": png(colour, 20)}, both, split="shades")
    return out


def overfit(model: DualEncoder, tokenizer: Tokenizer, steps: int) -> None:
    """Teach the model the eight colours in the three languages."""
    pictures = [
        np.full((16, 16, 3), Image.new("RGB", (1, 1), c).getpixel((0, 0)), np.uint8)
        for *_, c in COLOURS.values()
    ]
    images = normalize(torch.from_numpy(np.stack(pictures)))
    texts = [[english, *names[:2]] for english, names in COLOURS.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        tokens, lengths = tokenizer.encode([names[step % 3] for names in texts], 16)
        loss = softmax_contrastive(model(images, tokens, lengths), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the colours data set."""
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def run_folder(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of a model that has learnt the colours."""
    folder = tmp_path_factory.mktemp("runs") / "colours-run"
    values = {
        "data": {"path": str(colours), "validation_every": 2, "batch_size": 8},
        "model": {
            "dims": 16,
            "vision_backbone": "vit-ti-16",
            "vision": {"image_size": 16, "width": 32, "depth": 1, "num_heads": 2},
            "text_backbone": "clip-text-ti",
            "text": {"context": 16, "width": 32, "depth": 1, "num_heads": 2},
        },
        "optimization": {"steps": 1},
        "distributed": {"precision": "fp32", "device": "cpu"},
        "evaluation": {"bootstrap_samples": 50, "batch_size": 5},
    }
    config = build(RunConfig, values)
    captions = captions_of(open_dataset(colours).splits["train"], 100)
    tokenizer = Tokenizer.train(captions, vocab_size=300)
    model = new_dual_encoder(config, tokenizer.vocab_size)
    overfit(model, tokenizer, 150)
    folder.mkdir()
    text = to_yaml(config).encode()
    (folder / "config.yaml").write_bytes(text)
    tokenizer.save(folder / "tokenizer.json")
    facts = {
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    store = CheckpointStore(folder / "checkpoints", keep_last=1, is_main=True)
    weights = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    store.save(150, weights, {"step": 150, "metric": None})
    store.wait()
    return folder


@pytest.fixture(scope="session")
def run(run_folder: Path) -> LoadedRun:
    return load_run(run_folder)
