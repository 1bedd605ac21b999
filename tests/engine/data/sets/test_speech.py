import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import is_heldout
from carillon.engine.data.sets.npm import Package
from carillon.engine.data.sets.sound import read_facts
from carillon.engine.data.sets.speech import (
    HELDOUT_TIMBRES,
    TIMBRES,
    VOICES,
    build_speech,
    check_voices,
)
from carillon.engine.data.shards import Dataset

SamplesOf = Callable[..., dict[str, Any]]
Cldr = tuple[Package, Package]

# Speaks as espeak-ng does, in tones: a tenth of a second for each character, lower for lower
# pitches.
SPEAKER = """#!{python}
import math, struct, sys, wave
arguments = sys.argv[1:]
if "--voices" in arguments:
    print("Pty Language\\n" + "\\n".join(f" 5  {{v}}  M  name  file" for v in {voices}))
elif "--version" in arguments:
    print("eSpeak NG text-to-speech: 9.87.6  Data at: /nowhere")
else:
    text = sys.stdin.read()
    pitch = int(arguments[arguments.index("-p") + 1])
    loud = 8000
    values = [int(loud * math.sin(n * pitch / 500)) for n in range(800 * len(text))]
    with wave.open(arguments[arguments.index("-w") + 1], "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack(f"<{{len(values)}}h", *values))
"""


@pytest.fixture
def speaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for espeak-ng, so that what is asked of it can be seen in what it says."""
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    program.write_text(SPEAKER.format(python=sys.executable, voices=list(VOICES.values())))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def build(tmp_path: Path, cldr: Cldr, name: str = "set", **options: Any) -> Dataset:
    arguments = {"languages": ("en", "fr"), "per_language": 10, **options}
    return build_speech(tmp_path / name, data=tmp_path / "debs", names=cldr, **arguments)


def test_clips_say_what_their_transcripts_say(
    tmp_path: Path, cldr: Cldr, speaker: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(tmp_path, cldr))
    assert len(samples) == 20
    for key, (split, sample) in samples.items():
        meta, language = sample.meta, key.split("-")[0]
        ((text,),) = meta["transcripts"].values()
        facts = read_facts(sample.members["flac"])
        assert facts.duration_s == pytest.approx(0.1 * len(text))
        assert meta["media"]["flac"]["duration_s"] == facts.duration_s
        assert meta["media"]["flac"]["language"] == language
        assert meta["speaker"] == f"{VOICES[language]}+{meta['timbre']}"
        outs = {is_heldout(concept) for concept in meta["concepts"]}
        assert len(outs) == 1
        expected = {
            (False, False): "train",
            (False, True): "heldout_speaker",
            (True, False): "heldout_text",
            (True, True): "heldout_both",
        }[outs.pop(), meta["timbre"] in HELDOUT_TIMBRES]
        assert split == expected
        assert meta["synthetic"] == "espeak-ng 9.87.6"
        assert meta["licence"] == "Unicode-3.0"
    for split, sample in samples.values():
        if split in ("heldout_text", "heldout_both"):  # the fox is named as the dog is
            said = " ".join(text for (text,) in sample.meta["transcripts"].values())
            assert not {"dog", "chien"} & set(said.replace(",", "").split())
    kinds = {sample.meta["kind"] for _, sample in samples.values()}
    assert kinds == {"name", "names", "sentence"}
    timbres = {sample.meta["timbre"] for _, sample in samples.values()}
    assert len(timbres) > len(TIMBRES) // 2


def test_silence_is_left_out(
    tmp_path: Path, cldr: Cldr, speaker: Path, samples_of: SamplesOf
) -> None:
    program = speaker.read_text()
    speaker.write_text(program.replace("loud = 8000", 'loud = 8000 if "," in text else 50'))
    dataset = build(tmp_path, cldr, per_language=6)
    samples = [sample for _, sample in samples_of(dataset).values()]
    assert {sample.meta["kind"] for sample in samples} <= {"names", "sentence"}
    lines = (dataset.path / "left-out.jsonl").read_text().splitlines()
    assert len(lines) + len(samples) == 12
    assert all("silence, or nearly: '" in line for line in lines)
    assert lines


def test_a_seed_gives_the_same_bytes(tmp_path: Path, cldr: Cldr, speaker: Path) -> None:
    first = build(tmp_path, cldr, "a", per_language=2)
    assert build(tmp_path, cldr, "b", per_language=2).fingerprint == first.fingerprint
    assert build(tmp_path, cldr, "c", per_language=2, seed=1).fingerprint != first.fingerprint


@pytest.mark.skipif(  # where CI lacks it, the test fails
    shutil.which("espeak-ng") is None and "CI" not in os.environ,
    reason="not installed: apt-get install espeak-ng",
)
def test_the_real_program_speaks(tmp_path: Path, cldr: Cldr, samples_of: SamplesOf) -> None:
    assert check_voices(tuple(VOICES)).startswith("espeak-ng 1.")
    samples = samples_of(build(tmp_path, cldr, per_language=3))
    for _, sample in samples.values():
        facts = read_facts(sample.members["flac"])
        assert 0.3 < facts.duration_s < 8
        assert facts.sample_rate == 22_050
    assert len({bytes(sample.members["flac"]) for _, sample in samples.values()}) == len(samples)


def test_without_espeak_the_package_is_named(
    tmp_path: Path, cldr: Cldr, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"espeak-ng was not found.*apt-get install espeak-ng"):
        build(tmp_path, cldr)
    assert not (tmp_path / "set").exists()


def test_a_voice_that_is_missing_is_named(speaker: Path) -> None:
    speaker.write_text(speaker.read_text().replace("'hi'", "'ho'"))
    with pytest.raises(UserError, match=r"has no voice hi\."):
        check_voices(("en", "hi"))


def test_a_program_that_says_nothing_is_no_sample(
    tmp_path: Path, cldr: Cldr, speaker: Path
) -> None:
    silent = speaker.read_text().replace("else:", "elif False:")
    speaker.write_text(silent)
    with pytest.raises(UserError, match="espeak-ng wrote no sound for"):
        build(tmp_path, cldr, per_language=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("en", "zh")}, "--languages en,zh: give each once, of en, de"),
        ({"languages": ()}, "give each once"),
        ({"per_language": 0}, "--per-language 0: 1 to"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_speech(tmp_path / "set", **options)


def test_the_pinned_voices_are_ten() -> None:
    assert len(VOICES) == 10
    assert set(HELDOUT_TIMBRES) < set(TIMBRES)
