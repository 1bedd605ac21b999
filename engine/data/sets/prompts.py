"""`carillon data prompts`: the telephone prompts of Asterisk, spoken by people in five languages.

A sample is a clip with its transcript. The same prompt has the same `parallel_id` in every
language. Sound comes as G.722 (16 kHz) from Debian's asterisk-core-sounds-*-g722, is decoded by
FFmpeg's library (PyAV) and stored as FLAC of the same 16 kHz; transcripts come from
asterisk-core-sounds-*. A tenth of the prompts is held out in all languages, with every prompt that
shares its words. Left out, with the reason: sounds without a transcript, or with two.
"""

from __future__ import annotations

import argparse
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import (
    Collected,
    Item,
    LeftOut,
    Recipe,
    add_build_arguments,
    build_set,
    check_languages,
    is_heldout,
    parse_languages,
    shared,
    told,
)
from carillon.engine.data.sets.debian import DebianPackage, fetch_packages
from carillon.engine.data.sets.prompt_texts import (
    PromptText,
    group_prompts,
    licence_of,
    parse_transcripts,
    speakers_of,
)
from carillon.engine.data.sets.sound import (
    SOUND_LIBRARY,
    SoundError,
    decode_g722,
    encode_flac,
    facts_of,
)
from carillon.engine.data.shards import Dataset

LANGUAGES = ("en", "es", "fr", "it", "ru")
EXAMPLES = """examples:
  carillon data prompts
  carillon data prompts --languages en,fr --out data/prompts-two
  carillon data prompts --data ~/debs      with the .deb files there, without apt or a network
"""

_RECIPE = 1
_SAMPLE_RATE = 16_000
_MAX_TEXT_BYTES = 4 << 20
_SOUND = re.compile(r"usr/share/asterisk/sounds/(?P<voice>[A-Za-z_]+)/(?P<name>.+)\.g722")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data prompts`."""
    parser.add_argument(
        "--languages", default=",".join(LANGUAGES), help="comma-separated (en,es,fr,it,ru)"
    )
    add_build_arguments(parser, "prompts", packages="Debian packages' files (.deb)", workers=True)


def main(args: argparse.Namespace) -> int:
    """Run `carillon data prompts` and print what the set holds. Raises UserError."""
    dataset = build_prompts(
        args.out,
        languages=parse_languages(args.languages),
        **shared(args),
    )
    return told(dataset, "clips")


@dataclass(frozen=True, kw_only=True)
class PromptJob:
    """A clip: the file of its sound, its text, and what is the same for its language."""

    package: DebianPackage
    file: str
    name: str
    text: PromptText
    group: str
    language: str
    stated: Mapping[str, str]


def build_prompts(
    out: Path,
    *,
    languages: Sequence[str] = LANGUAGES,
    data: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Build the set at `out`, or open it when it is there. Raises UserError as `build_set` does."""
    check_languages(languages, LANGUAGES)
    recipe = Recipe(
        name="prompts",
        version=_RECIPE,
        settings={"languages": list(languages)},
        collect=lambda: _collect(languages, data),
        make=make_prompt,
    )
    return build_set(recipe, out, limit=limit, workers=workers, overwrite=overwrite)


def _collect(languages: Sequence[str], data: Path | None) -> Collected[PromptJob]:
    # The transcripts of all languages decide what belongs together, whichever are asked for.
    packages = fetch_packages([*map(_texts_in, LANGUAGES), *map(_sounds_in, languages)], data)
    parsed = {name: _transcripts(packages[_texts_in(name)], name) for name in LANGUAGES}
    groups = group_prompts((n, t.words) for texts, _ in parsed.values() for n, t in texts.items())
    jobs: list[PromptJob] = []
    left_out: list[LeftOut] = []
    for language in languages:
        texts, refused = parsed[language]
        sounds = packages[_sounds_in(language)]
        stated = _stated(packages[_texts_in(language)], language)
        for file, sound in _sounds(sounds):
            if sound not in texts:
                reason = refused.get(sound, "no transcript")
                left_out.append(LeftOut(key=f"{language}-{sound}", reason=reason))
                continue
            job = PromptJob(
                package=sounds.of([file]),
                file=file,
                name=sound,
                text=texts[sound],
                group=groups[sound],
                language=language,
                stated=stated,
            )
            jobs.append(job)
    sums = {package.spec: package.sha256 for package in packages.values()}
    return Collected(packages=sums, jobs=jobs, left_out=left_out, tools={"sound": SOUND_LIBRARY})


def _texts_in(language: str) -> str:
    return f"asterisk-core-sounds-{language}"


def _sounds_in(language: str) -> str:
    return f"asterisk-core-sounds-{language}-g722"


def _sounds(package: DebianPackage) -> Iterator[tuple[str, str]]:
    """File and name of each sound, by name."""
    for file in sorted(package.members):
        if match := _SOUND.fullmatch(file):
            yield file, match["name"]


def _transcripts(
    package: DebianPackage, language: str
) -> tuple[dict[str, PromptText], dict[str, str]]:
    file = f"usr/share/doc/{package.name}/core-sounds-{language}.txt.gz"
    packed = package.read(file, max_bytes=_MAX_TEXT_BYTES)
    try:
        inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        text = inflater.decompress(packed, _MAX_TEXT_BYTES).decode("utf-8")
    except (zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{file} of {package.spec} cannot be read: {error}") from None
    return parse_transcripts(text)


def _stated(package: DebianPackage, language: str) -> dict[str, str]:
    """Licence and speaker, as the package states them."""
    file = f"usr/share/doc/{package.name}/copyright"
    text = package.read(file, max_bytes=_MAX_TEXT_BYTES).decode("utf-8", "replace")
    licence = licence_of(text, language)
    if not licence:
        raise UserError(f"{file} of {package.spec} states no licence for {language}")
    return {
        "licence": licence,
        "licence_source": f"{package.spec} {file}",
        "author": speakers_of(text, language),
    }


def make_prompt(job: PromptJob) -> Item | LeftOut:
    """Decode a clip and store it with its text."""
    key = f"{job.language}-" + re.sub(r"[./ ]+", "-", job.name)
    match = _SOUND.fullmatch(job.file)
    assert match is not None
    voice = match["voice"]
    try:
        samples = decode_g722(job.package.read(job.file))
    except SoundError as error:
        return LeftOut(key=key, reason=str(error))
    facts = facts_of(samples, _SAMPLE_RATE)
    role = "speech" if job.text.words else "sound"
    tag = "-".join(voice.split("_")[:2])
    says = {"transcripts": {job.language: [job.text.words]}}
    shows = {"captions": {_language_of(job.text, job.language): [job.text.description]}}
    meta: dict[str, Any] = {
        **(says if job.text.words else shows),
        "script": job.text.script,
        "parallel_id": job.name,
        "text_group": job.group,
        "speaker": voice,
        **job.stated,
        "source": f"{job.package.spec} {job.file}",
        "media": {"flac": facts.as_media(language=tag, role=role)},
    }
    split = "heldout_text" if is_heldout(job.group) else "train"
    members = {"flac": encode_flac(samples, _SAMPLE_RATE)}
    return Item(key=key, split=split, members=members, meta=meta)


def _language_of(text: PromptText, language: str) -> str:
    """The language of a description: some files keep English ones beside words of their own."""
    english = ("tone", "tones", "silence", "monkeys", "beep", "ahooga", "ascending", "decending")
    is_english = any(word in re.findall(r"[a-z]+", text.description.lower()) for word in english)
    return "en" if is_english else language
