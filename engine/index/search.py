"""`carillon search`: the pictures of a data set that a text or another picture calls for.

Exact: every vector is multiplied with the query's, a block at a time; equal scores stand in the
order of their rows. The set's pictures are embedded on first use into the run's folder, under a
name made of checkpoint, data and split, so a store of another checkpoint is never asked.
Left out: approximate indexes.
"""

import argparse
import json
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.samples import MAX_CAPTION_CHARS, SampleError
from carillon.engine.data.shards import Dataset, Split
from carillon.engine.index.embedding import embed_split, store_identity
from carillon.engine.index.encoder import run_encoder
from carillon.engine.index.source import choose_split
from carillon.engine.index.store import EmbeddingStore, StoreDamaged, open_store

if TYPE_CHECKING:
    import numpy as np

    from carillon.engine.train.run import LoadedRun


class Hit(NamedTuple):
    """One picture found: rank from 1, cosine score, key, a caption, and its row in the split."""

    rank: int
    score: float
    key: str
    caption: str
    row: int


def check_query(query: str) -> str:
    """The query without white space at its ends.

    Raises: UserError when it is empty, too long, or holds control characters or broken Unicode.
    """
    if len(query) > MAX_CAPTION_CHARS:
        raise UserError(
            f"the query has {len(query):,} characters; at most {MAX_CAPTION_CHARS:,} are allowed"
        )
    text = query.strip()
    if not text:
        raise UserError('the query is empty; give some words, as in "a running dog"')
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs"):
            raise UserError(
                f"the query holds U+{ord(char):04X}, a control character or a piece of broken "
                "text; write plain text in UTF-8"
            )
    return text


def top_k(store: EmbeddingStore, query: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Scores and places of the k best vectors, best first; equal scores in the store's order.

    Shapes: query (D,).
    Raises: UserError for k outside 1 to the size of the store, or a damaged store.
    """
    if not 1 <= k <= len(store):
        raise UserError(f"k = {k} given; the set has {len(store):,} pictures: give 1 to that many")
    scores = torch.cat([torch.from_numpy(block) @ query for block in store.blocks()])
    order = torch.sort(scores, descending=True, stable=True).indices[:k]
    return scores[order].tolist(), order.tolist()


def picture_store(
    run: "LoadedRun",
    dataset: Dataset,
    split: Split,
    *,
    batch_size: int = 128,
) -> EmbeddingStore:
    """The run's own store of a split's pictures, made when it is not there or cannot be used."""
    wanted = store_identity(run, dataset, split, "image")
    name = f"{run.checkpoint_hash[:12]}-{dataset.fingerprint[:12]}-{split.name}.zarr"
    path = run.path / "embeddings" / name
    if path.exists():
        try:
            return open_store(path, wanted)
        except UserError as error:
            _discard(path, error)
    store, _ = embed_split(run, dataset, split, path, batch_size=batch_size, overwrite=True)
    return store


def _discard(path: Path, error: UserError) -> None:
    """Remove a store of the run's own, which is only a cache, and say why."""
    print(f"{str(error).partition(';')[0]}; it is made again", file=sys.stderr)
    try:
        shutil.rmtree(path)
    except OSError as failure:
        raise UserError(f"{path} cannot be removed: {explained(failure)}") from None


def search_run(
    run: "LoadedRun", query: "str | np.ndarray", k: int, dataset: Dataset, split: Split
) -> list[Hit]:
    """The k pictures of a split nearest to a text, or to a picture (H, W, 3) uint8.

    Raises: UserError for a query or k that cannot be served.
    """
    text = check_query(query) if isinstance(query, str) else None
    if k < 1:
        raise UserError(f"k = {k} given; at least 1 is needed")
    if k > len(split):
        raise UserError(f"k = {k} given, but the set has only {len(split):,} pictures")
    encoder = run_encoder(run)
    vector = encoder.texts([text])[0] if text is not None else encoder.picture(query)  # type: ignore[arg-type]
    store = picture_store(run, dataset, split)
    try:
        (scores, places), rows, keys = top_k(store, vector, k), store.rows(), store.strings("ids")
    except StoreDamaged as damage:
        _discard(store.path, damage)
        store = picture_store(run, dataset, split)
        (scores, places), rows, keys = top_k(store, vector, k), store.rows(), store.strings("ids")
    return [
        Hit(rank, score, keys[place], _caption(split, int(rows[place])), int(rows[place]))
        for rank, (score, place) in enumerate(zip(scores, places, strict=True), start=1)
    ]


def _caption(split: Split, row: int) -> str:
    try:
        captions = split.read(row).meta["captions"]
    except SampleError as error:  # damaged since it was embedded
        return f"(unreadable: {error.reason})"
    texts = captions.get("en") or next(iter(captions.values()), [""])
    return str(texts[0])


EXAMPLES = """examples:
  carillon search emoji-1a2b3c4d "un chien qui court"
  carillon search emoji-1a2b3c4d "red flowers" --k 20 --out flowers.png
  carillon search emoji-1a2b3c4d --image dog.jpg --data data/my-photos --split all --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, or its name under runs/")
    parser.add_argument("query", nargs="?", default=None, help="what to look for, in any language")
    parser.add_argument("--image", type=Path, default=None, help="look for pictures like this one")
    parser.add_argument("--k", type=int, default=12, help="pictures to find (default 12)")
    parser.add_argument("--data", default=None, help="a data set (default: the training data)")
    parser.add_argument("--split", default=None, help="its split (default: the one trained on)")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a step (default latest)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="picture grid to write (default: RUN/search.png)"
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def main(args: argparse.Namespace) -> int:
    from carillon.engine.train.run import load_run

    query = _query(args)
    if args.k < 1:
        raise UserError(f"--k {args.k}: at least 1 is needed")
    run = load_run(args.run, checkpoint=args.checkpoint)
    dataset, split = choose_split(args.data, args.split, run.config.data)
    hits = search_run(run, query, args.k, dataset, split)
    grid = _draw(args.out or run.path / "search.png", query, hits, split)
    if args.json:
        listed = [hit._asdict() for hit in hits]
        print(json.dumps({"hits": listed, "grid": str(grid)}, ensure_ascii=False, indent=2))
        return 0
    _print(hits)
    print(f"pictures: {grid}")
    return 0


def _query(args: argparse.Namespace) -> "str | np.ndarray":
    if (args.query is None) == (args.image is None):
        raise UserError("give either a query or --image FILE")
    if args.query is not None:
        return check_query(args.query)
    try:
        return decode_image(args.image.read_bytes())
    except OSError as error:
        raise UserError(f"--image {args.image} cannot be read: {explained(error)}") from None
    except ValueError as error:
        raise UserError(f"--image {args.image}: {error}") from None


def _print(hits: list[Hit]) -> None:
    from carillon.engine.eval.text_layout import shown

    for hit in hits:
        print(f"{hit.rank:4d}  {hit.score:6.3f}  {hit.key}  {shown(hit.caption)}")


def _draw(path: Path, query: "str | np.ndarray", hits: list[Hit], split: Split) -> Path:
    from carillon.engine.eval.picture import Found, Row, picture_grid

    found = []
    for h in hits:
        try:
            pixels = decode_image(split.read(h.row).medium("image"), min_side=256)
        except ValueError:  # SampleError among them: the list says so
            continue
        found.append(Found(pixels, h.score, h.caption, None))
    title = f"{len(hits)} pictures of {len(split):,}"
    return picture_grid(path, [Row(query, found)], title)
