"""The peers of our loader as their users have them: webdataset, energon, litdata, torch.

Each reads the same samples, decodes, takes a random resized crop (torchvision's, with its
anti-aliasing), chooses a caption and batches; collating tokenises and standardises whole batches,
which is the cheapest. All of them shuffle as they do by default. Two ways to decode are tried:
Pillow, and torchvision's own JPEG decoder on tensors.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from webdataset_loader import choose_caption

from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.transforms import MEAN, STD

Pair = tuple[Tensor, str]
Batches = Iterator[tuple[Tensor, Tensor]]
_SHUFFLE_BUFFER = 1000


class Work:
    """What every peer does with a sample and with a batch."""

    def __init__(
        self, tokenizer: Tokenizer, *, size: int, context: int, scale: tuple[float, float]
    ) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._crop = v2.RandomResizedCrop(
            size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self._mean = torch.tensor(MEAN).view(3, 1, 1) * 255
        self._std = torch.tensor(STD).view(3, 1, 1) * 255
        self._to_tensor = v2.PILToTensor()

    def by_pillow(self, jpeg: bytes, meta: bytes) -> Pair:
        picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
        return self._to_tensor(self._crop(picture)), choose_caption(json.loads(meta))

    def by_torchvision(self, jpeg: bytes, meta: bytes) -> Pair:
        stored = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
        picture = decode_jpeg(stored, mode=ImageReadMode.RGB)
        return self._crop(picture), choose_caption(json.loads(meta))

    def batch(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        pictures = torch.stack([picture for picture, _ in pairs])
        tokens, _ = self._tokenizer.encode([text for _, text in pairs], self._context)
        return (pictures.float() - self._mean) / self._std, tokens


class _Tars(Dataset[tuple[bytes, bytes]]):
    """Any sample of the tars by number: where each member lies is found once."""

    def __init__(self, shards: Sequence[Path], map_pair: Callable[[bytes, bytes], Pair]) -> None:
        self._files = [os.open(shard, os.O_RDONLY) for shard in shards]
        self._map = map_pair
        self._places: list[tuple[int, tuple[int, int], tuple[int, int]]] = []
        for file, shard in zip(self._files, shards, strict=True):
            members: dict[str, dict[str, tuple[int, int]]] = {}
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            self._places += [(file, found["jpg"], found["json"]) for found in members.values()]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Pair:
        file, jpeg, meta = self._places[number]
        return self._map(os.pread(file, jpeg[1], jpeg[0]), os.pread(file, meta[1], meta[0]))


def _endless(loader: Any) -> Batches:
    while True:
        yield from loader


def torch_dataloader(
    shards: Sequence[Path], work: Work, map_pair: Callable[..., Pair], batch_size: int
) -> Batches:
    dataset = _Tars(shards, map_pair)
    return _endless(
        DataLoader(dataset, batch_size, shuffle=True, collate_fn=work.batch, drop_last=True)
    )


def webdataset(
    shards: Sequence[Path], work: Work, map_pair: Callable[..., Pair], batch_size: int
) -> Batches:
    import webdataset as wds

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(shard) for shard in shards]),
        wds.shuffle(2000),
        wds.tarfile_to_samples(),
        wds.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER // 4),
        wds.map(lambda sample: map_pair(sample["jpg"], sample["json"])),
        wds.batched(batch_size, collation_fn=work.batch, partial=False),
    )
    return iter(pipeline.repeat())


def energon(
    shards: Sequence[Path],
    work: Work,
    map_pair: Callable[..., Pair],
    batch_size: int,
    *,
    folder: Path,
) -> Batches:
    """From links to the tars, beside which its `prepare` writes its index."""
    import subprocess
    import sys

    from megatron import energon as me

    folder.mkdir()
    for shard in shards:
        (folder / shard.name).symlink_to(shard)
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder)]
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([*command, *options, "--num-workers", "1"], check=True, capture_output=True)

    class Encoder(me.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None  # the bytes as they are: map_pair decodes
        cookers: ClassVar = [me.Cooker(me.stateless(lambda sample: sample))]

        @me.stateless
        def encode_sample(self, sample: Any) -> Pair:
            return map_pair(sample["jpg"], sample["json"])

        def batch(self, samples: list[Pair]) -> Any:
            return work.batch(samples)

    workers = me.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = me.get_train_dataset(
        folder,
        worker_config=workers,
        batch_size=batch_size,
        shuffle_buffer_size=_SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    return iter(me.get_savable_loader(dataset))


def litdata(
    shards: Sequence[Path],
    work: Work,
    map_pair: Callable[..., Pair],
    batch_size: int,
    *,
    folder: Path,
) -> Batches:
    """From its own chunks of the same bytes: it has no reader for tars.

    They are written by its writer, without `optimize`, which deletes folders of its cache.
    """
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[variable] = str(folder / variable.lower())
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "chunks"), chunk_bytes="64MB")
    number = 0
    raw = _Tars(shards, lambda jpeg, meta: (jpeg, meta))  # type: ignore[arg-type, return-value]
    for number in range(len(raw)):
        writer[number] = dict(zip(("jpg", "json"), raw[number], strict=True))
    writer.done()
    writer.merge()

    class Pairs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Pair:
            sample = super().__getitem__(index)
            return map_pair(sample["jpg"], sample["json"])

    dataset = Pairs(str(folder / "chunks"), shuffle=True, drop_last=True)
    return _endless(
        StreamingDataLoader(
            dataset, batch_size=batch_size, num_workers=0, collate_fn=work.batch, shuffle=True
        )
    )
