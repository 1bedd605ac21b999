"""`carillon data speech`: names and short sentences in ten languages, spoken by espeak-ng.

Texts are emoji names from Unicode CLDR, alone, two together, or in a sentence of the clips set. The
voice is one of a language with one of eleven timbres, its speed and pitch drawn by the seed. Two
timbres and a tenth of the concepts are held out, each in splits of its own. The speech is synthetic
and sounds so: it is for alignment and tests, not for natural speech. Chinese and Japanese are left
out: espeak-ng 1.51 spells their characters.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import unicodedata
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import (
    Collected,
    Item,
    LeftOut,
    Recipe,
    add_build_arguments,
    add_drawn_arguments,
    build_set,
    drawn_settings,
    is_heldout,
    parse_languages,
    shared,
    told,
)
from carillon.engine.data.sets.cldr import DERIVED_NAMES, NAMES, NAMES_LICENCE, Names, read_names
from carillon.engine.data.sets.clip_words import MOTIONS, WORDS, Told, caption
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.npm import Package, locate_packages
from carillon.engine.data.sets.programs import find_program, run_program
from carillon.engine.data.sets.sound import encode_flac, facts_of
from carillon.engine.data.shards import Dataset

# CLDR's code of a language -> espeak-ng's voice.
VOICES: Mapping[str, str] = {
    **{"en": "en-us", "de": "de", "fr": "fr-fr", "es": "es", "it": "it"},
    **{"pt": "pt-br", "nl": "nl", "ru": "ru", "hi": "hi", "tr": "tr"},
}
TIMBRES = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m7")
HELDOUT_TIMBRES = ("f3", "m5")
EXAMPLES = """examples:
  carillon data speech
  carillon data speech --languages en,fr --per-language 1000 --out data/speech-two
  carillon data speech --seed 1 --out data/speech-1
"""

_RECIPE = 1
_HELDOUT_SHARE = 0.12
_TIMEOUT_S = 60
_MIN_RMS = 100  # of 32,767; speech here has 1,000 to 6,000
_MIN_DURATION_S = 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data speech`."""
    add_drawn_arguments(parser, VOICES, "clips")
    add_build_arguments(parser, "speech", packages="npm tarballs of CLDR's names", workers=True)


def main(args: argparse.Namespace) -> int:
    """Run `carillon data speech` and print what the set holds. Raises UserError."""
    dataset = build_speech(
        args.out,
        languages=parse_languages(args.languages),
        per_language=args.per_language,
        seed=args.seed,
        **shared(args),
    )
    return told(dataset, "clips")


@dataclass(frozen=True, kw_only=True)
class SpeechJob:
    """What is said, and how."""

    key: str
    split: str
    language: str
    text: str
    kind: str
    concepts: tuple[str, ...]
    timbre: str
    words_per_minute: int
    pitch: int
    tool: str


def build_speech(
    out: Path,
    *,
    languages: Sequence[str] = tuple(VOICES),
    per_language: int = 100,
    seed: int = 0,
    data: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    names: tuple[Package, Package] = (NAMES, DERIVED_NAMES),
) -> Dataset:
    """Build the set at `out`, or open it when it is there. Raises UserError as `build_set` does."""
    recipe = Recipe(
        name="speech",
        version=_RECIPE,
        settings=drawn_settings(languages, VOICES, per_language, seed),
        collect=lambda: _collect(languages, per_language, seed, data, names),
        make=make_speech,
    )
    return build_set(recipe, out, limit=limit, workers=workers, overwrite=overwrite)


def check_voices(languages: Sequence[str]) -> str:
    """The version of espeak-ng. Raises UserError when it or a voice is missing."""
    espeak = find_program("espeak-ng", "espeak-ng")
    listed = run_program([espeak, "--voices"], timeout_s=_TIMEOUT_S).decode("utf-8", "replace")
    known = {line.split()[1] for line in listed.splitlines() if len(line.split()) > 1}
    missing = [VOICES[language] for language in languages if VOICES[language] not in known]
    if missing:
        raise UserError(
            f"{espeak} has no voice {', '.join(missing)}. Install `apt-get install espeak-ng-data`"
        )
    said = run_program([espeak, "--version"], timeout_s=_TIMEOUT_S).decode("utf-8", "replace")
    match = re.search(r"\d+\.\d+(?:\.\d+)?(?:-dev)?", said)
    return f"espeak-ng {match[0] if match else 'of unknown version'}"


def _collect(
    languages: Sequence[str],
    per_language: int,
    seed: int,
    data: Path | None,
    names: tuple[Package, Package],
) -> Collected[SpeechJob]:
    tool = check_voices(languages)
    folder = locate_packages(names, data)
    named = read_names(folder, languages, names=names[0], derived_names=names[1])
    jobs = [
        job
        for language in languages
        for job in _jobs_of(language, _sayable(named, language), per_language, seed, tool)
    ]
    if not jobs:
        raise UserError(f"no name in {', '.join(languages)} can be said")
    sums = {f"npm:{package.spec}": package.sha256 for package in names}
    return Collected(packages=sums, jobs=jobs, tools={"speech": tool})


def _sayable(names: Names, language: str) -> dict[bool, list[tuple[str, str]]]:
    """(concept, name) that are held out, and that are not: base concepts, of letters alone."""
    found: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for concept in sorted(names):
        name, _ = names[concept].get(language, ("", []))
        said = name.replace(" ", "").replace("-", "").replace("’", "").replace("'", "")
        is_plain = bool(said) and all(unicodedata.category(char)[0] in "LM" for char in said)
        if is_plain and concept == base_concept(concept):
            found[is_heldout(concept)].append((concept, name))
    trained = {name for _, name in found[False]}  # two concepts may share a name
    found[True] = [(concept, name) for concept, name in found[True] if name not in trained]
    return found


def _jobs_of(
    language: str,
    sayable: Mapping[bool, Sequence[tuple[str, str]]],
    per_language: int,
    seed: int,
    tool: str,
) -> Iterator[SpeechJob]:
    for number in range(per_language):
        draws = random.Random(f"{seed} {language} {number}")
        text_out = draws.random() < _HELDOUT_SHARE
        timbre = draws.choice(TIMBRES)
        voice_out = timbre in HELDOUT_TIMBRES
        if len(sayable[text_out]) < 2:
            continue
        chosen = draws.sample(sayable[text_out], 2)
        kind = draws.choice(("name", "names", "sentence" if language in WORDS else "names"))
        text, used = _text(draws, kind, language, chosen)
        yield SpeechJob(
            key=f"{language}-{number:05d}",
            split={
                (False, False): "train",
                (False, True): "heldout_speaker",
                (True, False): "heldout_text",
                (True, True): "heldout_both",
            }[text_out, voice_out],
            language=language,
            text=text,
            kind=kind,
            concepts=tuple(concept for concept, _ in used),
            timbre=timbre,
            words_per_minute=draws.randint(130, 190),
            pitch=draws.randint(30, 70),
            tool=tool,
        )


def _text(
    draws: random.Random, kind: str, language: str, chosen: Sequence[tuple[str, str]]
) -> tuple[str, Sequence[tuple[str, str]]]:
    """What is said, and which of the names are in it."""
    (_, first), (_, second) = chosen
    if kind == "name":
        return first, chosen[:1]
    if kind == "names":
        return f"{first}, {second}", chosen
    told = Told(motion=draws.choice(MOTIONS), count=1, has_bystander=False)
    return caption(told, WORDS[language], first, None), chosen[:1]


def make_speech(job: SpeechJob) -> Item | LeftOut:
    """Say a text, and store it as FLAC of the rate that espeak-ng speaks at."""
    voice = f"{VOICES[job.language]}+{job.timbre}"
    samples, sample_rate = _say(job, voice)
    facts = facts_of(samples, sample_rate)
    loudness = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0
    if loudness < _MIN_RMS or facts.duration_s < _MIN_DURATION_S:
        return LeftOut(key=job.key, reason=f"silence, or nearly: {job.text!r} by {voice}")
    meta = {
        "transcripts": {job.language: [job.text]},
        "kind": job.kind,
        "concepts": list(job.concepts),
        "speaker": voice,
        "timbre": job.timbre,
        "words_per_minute": job.words_per_minute,
        "pitch": job.pitch,
        "synthetic": job.tool,
        "licence": NAMES_LICENCE,
        "licence_source": f"npm:{NAMES.spec} package/LICENSE",
        "source": f"npm:{NAMES.spec}, spoken by {job.tool}",
        "media": {"flac": facts.as_media(language=job.language, role="speech")},
    }
    members = {"flac": encode_flac(samples, sample_rate)}
    return Item(key=job.key, split=job.split, members=members, meta=meta)


def _say(job: SpeechJob, voice: str) -> tuple[np.ndarray[Any, np.dtype[np.int16]], int]:
    espeak = find_program("espeak-ng", "espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.wav"
        settings = ("-s", str(job.words_per_minute), "-p", str(job.pitch), "-b", "1")
        command: list[str | Path] = [espeak, "-v", voice, *settings, "--stdin", "-w", file]
        run_program(command, stdin=job.text.encode(), timeout_s=_TIMEOUT_S)
        try:
            with wave.open(str(file)) as said:
                if (said.getnchannels(), said.getsampwidth()) != (1, 2):
                    raise UserError(f"{espeak} wrote no 16-bit mono sound")
                data = said.readframes(said.getnframes())
                return np.frombuffer(data, "<i2").astype(np.int16), said.getframerate()
        except (OSError, EOFError, wave.Error) as error:
            raise UserError(f"{espeak} wrote no sound for {job.text!r}: {error}") from None
