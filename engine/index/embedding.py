"""`carillon embed`: the vectors of a data set's pictures or captions by a run's checkpoint."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from carillon import __version__
from carillon.engine.config import UserError
from carillon.engine.data.shards import Dataset, SampleError, Split
from carillon.engine.index.encoder import Encoder, run_encoder
from carillon.engine.index.source import choose_split
from carillon.engine.index.store import DTYPES, EmbeddingStore, StoreBatch, write_store

if TYPE_CHECKING:
    from carillon.engine.train.run import LoadedRun

Modality = Literal["image", "text"]
_TEXTS_AT_ONCE = 4096


def store_identity(
    run: "LoadedRun", dataset: Dataset, split: Split, modality: Modality
) -> dict[str, Any]:
    """The attributes by which a store is known to be of a checkpoint and a split."""
    return {
        "checkpoint_hash": run.checkpoint_hash,
        "data_fingerprint": dataset.fingerprint,
        "split": split.name,
        "modality": modality,
    }


def embed_split(
    run: "LoadedRun",
    dataset: Dataset,
    split: Split,
    out: Path,
    *,
    modality: Modality = "image",
    batch_size: int = 128,
    dtype: str = "float32",
    overwrite: bool = False,
) -> tuple[EmbeddingStore, list[tuple[str, str]]]:
    """Encode every sample of a split into a store at `out`; returns it with the bad samples.

    Raises: as write_store.
    """
    encoder = run_encoder(run, batch_size=batch_size)
    bad: list[tuple[str, str]] = []
    batches = _pictures if modality == "image" else _texts
    about = {
        **store_identity(run, dataset, split, modality),
        "dataset": dataset.name,
        "run": run.path.name,
        "step": run.step,
        "created_by": f"carillon {__version__}",
    }
    tracked = _tracked(batches(encoder, split, bad), len(split), f"embedding {split.name}")
    store = write_store(out, tracked, about, dims=encoder.dims, dtype=dtype, overwrite=overwrite)
    return store, bad


def _pictures(encoder: Encoder, split: Split, bad: list[tuple[str, str]]) -> Iterator[StoreBatch]:
    for batch in encoder.pictures(split, range(len(split))):
        bad += batch.bad
        yield StoreBatch(batch.vectors.numpy(), batch.rows, {"ids": batch.keys})


def _texts(encoder: Encoder, split: Split, bad: list[tuple[str, str]]) -> Iterator[StoreBatch]:
    waiting: list[tuple[int, str, str, str]] = []
    for row in range(len(split)):
        try:
            sample = split.read(row)
        except SampleError as error:
            bad.append((error.key, error.reason))
            continue
        for language, texts in sorted(sample.meta["captions"].items()):
            waiting += [(row, sample.key, language, text) for text in texts]
        if len(waiting) >= _TEXTS_AT_ONCE:
            yield _text_batch(encoder, waiting)
            waiting = []
    if waiting:
        yield _text_batch(encoder, waiting)


def _text_batch(encoder: Encoder, waiting: list[tuple[int, str, str, str]]) -> StoreBatch:
    rows, ids, languages, captions = (list(column) for column in zip(*waiting, strict=True))
    strings = {"ids": ids, "languages": languages, "captions": captions}
    return StoreBatch(encoder.texts(captions).numpy(), rows, strings)


def _tracked(batches: Iterable[StoreBatch], total: int, label: str) -> Iterator[StoreBatch]:
    """Pass batches through, moving a progress bar by the rows of the split done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # Elsewhere than on a terminal its end would leave an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        for batch in batches:
            yield batch
            progress.update(task, completed=batch.rows[-1] + 1 if batch.rows else None)


EXAMPLES = """examples:
  carillon embed emoji-1a2b3c4d
  carillon embed emoji-1a2b3c4d --modality text --out captions.zarr
  carillon embed emoji-1a2b3c4d --data data/my-photos --dtype float16 --out photos.zarr
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, or its name under runs/")
    parser.add_argument("--data", default=None, help="a data set (default: the training data)")
    parser.add_argument("--split", default=None, help="its split (default: the one trained on)")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a step (default latest)"
    )
    parser.add_argument(
        "--modality",
        choices=("image", "text"),
        default="image",
        help="what to embed (default image)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the store (default RUN-SPLIT-MODALITY.zarr)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, help="samples encoded at once (default 128)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the vectors (default float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing store")


def main(args: argparse.Namespace) -> int:
    from carillon.engine.train.run import load_run

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1 is allowed")
    run = load_run(args.run, checkpoint=args.checkpoint)
    dataset, split = choose_split(args.data, args.split, run.config.data)
    out = args.out or Path(f"{run.path.name}-{split.name}-{args.modality}.zarr")
    store, bad = embed_split(
        run,
        dataset,
        split,
        out,
        modality=args.modality,
        batch_size=args.batch_size,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    if bad:
        print(f"{len(bad)} bad samples left out, first: {bad[0][0]}: {bad[0][1]}")
    print(f"{out}: {len(store):,} {args.modality} vectors of {store.attributes['dims']} dims")
    return 0
