"""A set and overrides with which a recipe trains in seconds.

Sizes are cut on the command line, as a user would; everything else is the recipe's own. Tests get
this file by `runpy.run_path`, since they are no package.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from carillon.engine.data.shards import ShardWriter
from carillon.engine.train.run_config import RunConfig

_SMALL = (
    "data.batch_size=8",
    "data.num_workers=0",
    "data.tokenizer.vocab_size=300",
    "optimization.steps=2",
    "optimization.epochs=null",
    "optimization.warmup_steps=1",
    "distributed.device=cpu",
    "logging.interval_steps=1",
    "logging.checkpoint_interval_steps=1",
)
# Of a dual encoder and of a decoder.
SMALL = (*_SMALL, "model.vision.image_size=32", "model.vision.depth=1", "model.text.depth=1")
SMALL_DECODER = (*_SMALL, "data.validation_every=4", "model.width=64", "model.context=64")


def write_set(out: Path, config: RunConfig) -> Path:
    """40 coloured squares in each split of `config`, captions in every language it allows."""
    named = [one.split for one in config.evaluation.retrieval.values() if one.path is None]
    splits = {config.data.split or "train", *(name for name in named if name is not None)}
    languages = config.data.filters.lang_allow or ("en",)
    colours = np.random.default_rng(0).integers(0, 256, (40, 3))
    with ShardWriter(out, name="tiny", source={"made": "for tests"}) as writer:
        for split in sorted(splits):
            for i, colour in enumerate(colours.tolist()):
                buffer = io.BytesIO()
                Image.new("RGB", (40, 36), tuple(colour)).save(buffer, "PNG")
                captions = {code: [f"{code} colour {colour}"] for code in languages}
                meta = {"captions": captions, "concept": f"colour {i}"}
                writer.write(f"{split}-{i}", {"png": buffer.getvalue()}, meta, split=split)
    return out
