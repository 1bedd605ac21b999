"""Text to token ids: byte-level BPE trained here, or any Hugging Face `tokenizer.json`.

Text is normalised (NFKC, lower case) and split into bytes, so no text is unknown in any script;
merges make common words and characters one token. Special tokens written in a caption are plain
text, never control tokens. Training is deterministic: the same captions give the same file, byte
for byte. Left out: unigram models, whose trainer is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from carillon.engine.access import explained
from carillon.engine.config import UserError, changed, setting
from carillon.engine.data.publish import publish_file
from carillon.engine.data.shards import SampleError, Split, open_dataset

MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 300, 1_000_000  # 256 bytes and the specials; ids stay small
SPECIALS = ("<pad>", "<bos>", "<eos>")
_NAMES = {  # what published tokenizers call them, ours first
    "bos": ("<bos>", "<|startoftext|>", "[CLS]", "<s>", "<|begin_of_text|>"),
    "eos": ("<eos>", "<|endoftext|>", "[SEP]", "</s>", "<|end_of_text|>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`data.tokenizer`: a file, or how to train one from the training captions."""

    path: str | None = setting(
        None, "A tokenizer.json; none trains one on the training captions when the run starts."
    )
    vocab_size: int = setting(
        8000,
        "Entries of a tokenizer trained for the run.",
        min=MIN_VOCAB_SIZE,
        max=MAX_VOCAB_SIZE,
    )
    max_captions: int = setting(
        2_000_000, "Captions read to train a tokenizer for the run.", min=1, max=1_000_000_000
    )

    def check(self) -> Iterator[str]:
        unused = changed(self, "vocab_size", "max_captions")
        if unused and self.path is not None:
            yield f"path: a given tokenizer is not trained, so drop {' and '.join(unused)}, or path"


class Tokenizer:
    """Encodes captions to padded ids; `bos ... eos`, cut to the context with eos kept."""

    def __init__(self, backend: Backend) -> None:
        backend.encode_special_tokens = True  # "<eos>" in a caption is five characters of text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._special("bos"), self._special("eos")
        pad = next((backend.token_to_id(n) for n in _NAMES["pad"] if backend.token_to_id(n)), None)
        zero = backend.token_to_id(SPECIALS[0])
        self.pad_id: int = zero if zero is not None else pad if pad is not None else self.eos_id

    def _special(self, kind: str) -> int:
        for name in _NAMES[kind]:
            found = self._backend.token_to_id(name)
            if found is not None:
                return int(found)
        raise UserError(
            f"tokenizer has no {kind} token; one of {', '.join(_NAMES[kind])} is needed"
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json (or a folder with one). Raises UserError when it cannot be used."""
        path = Path(path)
        path = path / "tokenizer.json" if os.path.isdir(path) else path
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {explained(error)}") from None
        except ValueError:
            raise UserError(
                f"tokenizer {path} is not a Hugging Face tokenizer.json; "
                "make one with `carillon tokenizer train`"
            ) from None
        try:
            return cls(Backend.from_str(text))
        except UserError:
            raise
        except Exception as error:  # the backend raises bare Exception for every parse error
            raise UserError(f"tokenizer {path} cannot be used: {error}") from None

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Learn byte-level BPE merges (Sennrich et al. 2016) from captions."""
        backend = Backend(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. Raises UserError when it cannot be written."""
        text = self._backend.to_str(pretty=True) + "\n"
        publish_file(path, text.encode(), parents=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return hashlib.sha256(self._backend.to_str(pretty=True).encode()).hexdigest()

    def ids(self, text: str) -> list[int]:
        """Ids of one text without bos and eos."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True)).strip()

    def encode(self, texts: Sequence[str], context: int) -> tuple[Tensor, Tensor]:
        """Padded ids of many texts.

        Shapes: (tokens (B, L) int64, lengths (B,) int64), L the longest, at most `context`.
        """
        rows = [[self.bos_id, *self.ids(text)[: context - 2], self.eos_id] for text in texts]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        longest = max(map(len, rows), default=0)
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), longest), lengths


def captions_of(split: Split, limit: int, languages: Sequence[str] = ()) -> Iterator[str]:
    """Captions of a split in row order, at most `limit`; bad samples are passed over."""
    left = limit
    for row in range(len(split)):
        try:
            captions = split.read(row).meta.get("captions", {})
        except SampleError:
            continue
        for language in sorted(captions):
            for text in captions[language] if not languages or language in languages else ():
                if left == 0:
                    return
                left -= 1
                yield text


def captions_of_all(
    splits: Sequence[Split], limit: int, languages: Sequence[str] = ()
) -> Iterator[str]:
    """As captions_of, of several splits, an equal share of the limit from each."""
    for split in splits:
        yield from captions_of(split, max(1, limit // len(splits)), languages)


EXAMPLES = """examples:
  carillon tokenizer train data/emoji --vocab-size 8000 --out tokenizer.json
  carillon tokenizer show tokenizer.json "un chien qui court"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    text = "learn a tokenizer from a data set's captions"
    train = actions.add_parser("train", help=text, description=text)
    train.add_argument("data", help="a data set folder, or WebDataset tars")
    train.add_argument("--split", default=None, help="split to read (default: the first)")
    train.add_argument("--vocab-size", type=int, default=32_000, help="entries (default 32000)")
    train.add_argument(
        "--max-captions",
        type=int,
        default=2_000_000,
        help="captions to read at most (default 2000000)",
    )
    train.add_argument(
        "--out", type=Path, default=Path("tokenizer.json"), help="file (default tokenizer.json)"
    )
    text = "print the tokens of a text"
    show = actions.add_parser("show", help=text, description=text)
    show.add_argument("tokenizer", help="a tokenizer.json")
    show.add_argument("text", help="what to encode")


def main(args: argparse.Namespace) -> int:
    return _show(args.tokenizer, args.text) if args.action == "show" else _train(args)


def _show(path: str, text: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text {text!a} is not valid UTF-8; give it again") from None
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.ids(text)
    print(f"{len(ids)} tokens: " + " | ".join(tokenizer.decode([i]) for i in ids))
    return 0


def _train(args: argparse.Namespace) -> int:
    if not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {args.vocab_size}: {MIN_VOCAB_SIZE} (256 bytes and the specials) "
            f"to {MAX_VOCAB_SIZE} is allowed"
        )
    if args.max_captions < 1:
        raise UserError(f"--max-captions {args.max_captions}: at least 1 is needed")
    if os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a folder; give a file such as tokenizer.json")
    splits = open_dataset(args.data).splits
    name = args.split or next(iter(splits))
    if name not in splits:
        raise UserError(f"--split {name}: the set has {', '.join(splits)}")
    captions = captions_of(splits[name], args.max_captions)
    tokenizer = Tokenizer.train(captions, vocab_size=args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} entries, sha256 {tokenizer.fingerprint[:12]}")
    return 0
