import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
CAPTIONS = (FIXTURES / "captions_ten_scripts.txt").read_text(encoding="utf-8").splitlines()
GOLDEN = FIXTURES / "tokens_ten_scripts.json"
TOKENIZER = Tokenizer.train(CAPTIONS, vocab_size=600)


def test_golden_tokens_in_ten_scripts() -> None:
    """A change here changes what every trained model was taught to read."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden == {text: TOKENIZER.ids(text) for text in CAPTIONS}


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    again = Tokenizer.train(CAPTIONS, vocab_size=600)
    assert again.fingerprint == TOKENIZER.fingerprint
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).ids(CAPTIONS[5]) == TOKENIZER.ids(CAPTIONS[5])


# Python and the tokenizers library may follow different editions of Unicode; both know an old one.
OLD_CHARACTERS = st.characters(exclude_categories=["Cs"]).filter(
    lambda character: unicodedata.ucd_3_2_0.category(character) != "Cn"
)


@given(st.text(OLD_CHARACTERS, max_size=40))
def test_every_text_survives_up_to_normal_form(text: str) -> None:
    normal = unicodedata.normalize("NFKC", text).lower()
    assert TOKENIZER.decode(TOKENIZER.ids(text)) == normal.strip()


def test_encode_frames_pads_and_keeps_eos_when_cut() -> None:
    long = "a dog runs across the beach " * 9
    tokens, lengths = TOKENIZER.encode(["a dog", "", long], context=12)
    assert tokens.shape == (3, 12)
    assert lengths.tolist() == [2 + len(TOKENIZER.ids("a dog")), 2, 12]
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert row[0] == TOKENIZER.bos_id
        assert row[length - 1] == TOKENIZER.eos_id
        assert row[length:] == [TOKENIZER.pad_id] * (12 - length)
    assert tokens[2, 1:11].tolist() == TOKENIZER.ids(long)[:10]


def test_special_tokens_in_a_caption_are_plain_text() -> None:
    ids = TOKENIZER.ids("<eos> <pad><bos>")
    assert not {TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.bos_id} & set(ids)
    assert TOKENIZER.decode(ids) == "<eos> <pad><bos>"


def test_a_published_tokenizer_file_serves(tmp_path: Path) -> None:
    """The shape of CLIP's own file: other special names, and a template we must not apply twice."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    backend.train_from_iterator(CAPTIONS, trainers.BpeTrainer(special_tokens=specials))
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(name, backend.token_to_id(name)) for name in specials],
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokens, lengths = Tokenizer.load(tmp_path).encode(["a dog"], context=77)
    assert tokens[0].tolist() == backend.encode("a dog").ids
    assert lengths.tolist() == [tokens.shape[1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("not json", "is not a Hugging Face tokenizer.json"),
        ("{}", "cannot be used"),
        ('{"model": 3}', "cannot be used"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_the_command_trains_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "set", name="set", source={}) as writer:
        for i, caption in enumerate(CAPTIONS):
            writer.write(f"k{i}", {"png": b"not read"}, {"captions": {"xx": [caption]}})
    out = tmp_path / "tokenizer.json"
    train = ["tokenizer", "train", str(tmp_path / "set"), "--vocab-size", "600", "--out", str(out)]
    assert main(train) == 0
    assert Tokenizer.load(out).fingerprint == TOKENIZER.fingerprint
    assert main(["tokenizer", "show", str(out), "a dog"]) == 0
    assert "a | dog" in capsys.readouterr().out
    assert main([*train, "--split", "nope"]) == 2
    assert "the set has train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--vocab-size", "299"], "300 (256 bytes and the specials) to 1000000 is allowed"),
        (["--vocab-size", "9999999999"], "to 1000000 is allowed"),
        (["--max-captions", "0"], "--max-captions 0: at least 1 is needed"),
        (["--max-captions", "-4"], "--max-captions -4: at least 1 is needed"),
    ],
)
def test_options_out_of_range_are_refused(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenizer", "train", "not-read", *option]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_made_for_out_and_one_in_its_place_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "set", name="set", source={}) as writer:
        writer.write("k", {"png": b"not read"}, {"captions": {"en": ["a dog"]}})
    train = ["tokenizer", "train", str(tmp_path / "set"), "--vocab-size", "300", "--out"]
    out = tmp_path / "new" / "deep" / "tokenizer.json"
    assert main([*train, str(out)]) == 0
    assert Tokenizer.load(out).ids("a dog")
    assert main([*train, str(tmp_path / "new")]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([*train, str(out / "under-a-file" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("the old one")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        TOKENIZER.save(path)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_is_not_utf8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert main(["tokenizer", "show", str(tmp_path), "a \udcff dog"]) == 2
    assert "is not valid UTF-8" in capsys.readouterr().err
