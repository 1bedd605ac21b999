import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import LEFT_OUT, is_heldout
from carillon.engine.data.sets.prompt_texts import group_prompts, parse_text, parse_transcripts
from carillon.engine.data.sets.prompts import LANGUAGES, build_prompts
from carillon.engine.data.sets.sound import read_facts
from carillon.engine.data.shards import Dataset

WriteDeb = Callable[..., Path]
SamplesOf = Callable[..., dict[str, Any]]
VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_Ivr")
COPYRIGHT = """Files: *
Copyright: 2003-2010, Allison Smith
License: CC-BY-SA-3.0

Files: ru-*
Copyright: 2010, Maxim
License: CC-BY-3.0

License: CC-BY-3.0
 The words of it.
"""
TEXTS = {
    "en": "; Core sounds\n\nhello: Hello (warmly).\nbeep: [this is a beep tone]\ndigits/1: one\n",
    "es": "hello: Hola\nbeep: [tono simple]\ndigits/1: uno\n",
    "fr": "hello: Bonjour\ndigits/1: un\ndigits/1: une\n",
    "it": "\ufeff; Suoni\nhello: Ciao\nbye: Ciao\ndigits/1:\n",
    "ru": "hello: Привет\ndigits/1: один\n",
}
SOUNDS = ("hello", "beep", "digits/1", "bye")


@pytest.fixture
def debs(write_deb: WriteDeb) -> Path:
    for language, voice in zip(LANGUAGES, VOICES, strict=True):
        name = f"asterisk-core-sounds-{language}"
        doc = f"usr/share/doc/{name}"
        packed = gzip.compress(TEXTS[language].encode(), mtime=0)
        texts = {f"{doc}/core-sounds-{language}.txt.gz": packed}
        write_deb(name, {**texts, f"{doc}/copyright": COPYRIGHT.encode()})
        sound = f"usr/share/asterisk/sounds/{voice}"
        clips = {f"{sound}/{clip}.g722": bytes(range(256)) * 10 for clip in SOUNDS}
        folder = write_deb(f"{name}-g722", clips)
    return folder


def build(debs: Path, out: Path, **options: Any) -> Dataset:
    return build_prompts(out, data=debs, **options)


def test_clips_are_parallel_and_say_what_they_are(
    debs: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(debs, tmp_path / "set"))
    split, hello = samples["en-hello"]
    assert hello.meta["transcripts"] == {"en": ["Hello"]}
    assert hello.meta["script"] == "Hello (warmly)."
    assert read_facts(hello.members["flac"]).duration_s == 0.32  # 2,560 bytes, 2 samples each
    assert hello.meta["media"]["flac"] == {
        "duration_s": 0.32,
        "sample_rate": 16_000,
        "num_channels": 1,
        "language": "en-US",
        "role": "speech",
    }
    assert hello.meta["licence"] == "CC-BY-SA-3.0"
    assert hello.meta["author"] == "Allison Smith"
    assert hello.meta["licence_source"].endswith("usr/share/doc/asterisk-core-sounds-en/copyright")
    _, russian = samples["ru-hello"]
    assert (russian.meta["licence"], russian.meta["author"]) == ("CC-BY-3.0", "Maxim")
    assert {samples[f"{language}-hello"][0] for language in LANGUAGES} == {split}
    assert {samples[f"{one}-hello"][1].meta["parallel_id"] for one in LANGUAGES} == {"hello"}


def test_prompts_that_share_words_share_a_split(
    debs: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(debs, tmp_path / "set"))
    # In Italian both are "Ciao", so neither may be in a split without the other.
    assert samples["it-bye"][1].meta["text_group"] == "bye"
    assert samples["en-hello"][1].meta["text_group"] == "bye"
    expected = "heldout_text" if is_heldout("bye") else "train"
    assert {samples[key][0] for key in ("it-bye", "it-hello", "ru-hello")} == {expected}
    one = samples_of(build(debs, tmp_path / "one", languages=("en",)))
    assert {key: split for key, (split, _) in one.items()} == {
        key: split for key, (split, _) in samples.items() if key.startswith("en-")
    }


def test_sounds_without_words_are_captioned(
    debs: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(debs, tmp_path / "set"))
    _, beep = samples["en-beep"]
    assert beep.meta["captions"] == {"en": ["this is a beep tone"]}
    assert "transcripts" not in beep.meta
    assert beep.meta["media"]["flac"]["role"] == "sound"
    assert samples["es-beep"][1].meta["captions"] == {"es": ["tono simple"]}


def test_clips_without_one_transcript_are_listed(debs: Path, tmp_path: Path) -> None:
    dataset = build(debs, tmp_path / "set")
    lines = map(json.loads, (dataset.path / LEFT_OUT).read_text().splitlines())
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["fr-digits/1"] == "two transcripts"
    assert reasons["it-digits/1"] == "an empty transcript"
    assert reasons["ru-beep"] == "no transcript"
    assert len(reasons) == 4 * 5 - dataset.manifest.splits["train"].num_samples - sum(
        split.num_samples for name, split in dataset.manifest.splits.items() if name != "train"
    )


@pytest.mark.parametrize(
    ("script", "words", "description"),
    [
        ("Hello.", "Hello.", ""),
        ("[ascending tones]", "", "ascending tones"),
        ("<beep>", "", "beep"),
        ("at [@]", "at", ""),
        ("[!] punto", "punto", ""),
        ("your [new] greeting", "your new greeting", ""),
        ("press 1 (or 2) now", "press 1 (or 2) now", ""),
        ("leave  a message.  (tone plays)", "leave a message.", ""),
        ("[a] b [c]", "b", ""),
    ],
)
def test_notes_are_told_from_words(script: str, words: str, description: str) -> None:
    parsed = parse_text(script)
    assert (parsed.words, parsed.description, parsed.script) == (words, description, script)


def test_lines_that_are_no_transcripts_are_passed_over() -> None:
    texts, refused = parse_transcripts("; a: b\n\nno colon\nname: words: more\n")
    assert {name: text.words for name, text in texts.items()} == {"name": "words: more"}
    assert refused == {}


def test_groups_are_joined_through_others() -> None:
    texts = [("c", "Two."), ("b", "two"), ("b", "three"), ("a", "Three!"), ("d", "four"), ("e", "")]
    assert group_prompts(texts) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}


@pytest.mark.parametrize("languages", [("en", "de"), (), ("en", "en")])
def test_other_languages_are_refused(tmp_path: Path, languages: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="give each once, of en, es, fr, it, ru"):
        build_prompts(tmp_path / "set", languages=languages)
