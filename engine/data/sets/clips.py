"""`carillon data clips`: short videos of emoji that move, with captions, questions and answers.

Pictures come from the packages of the emoji set (without the vendor that is held out there), keep
their transparency and cross simple backgrounds of our own. Half of the clips are H.264 in MP4, half
VP9 in WebM. Captions and questions in ten languages follow from what was drawn, and `tracks` say
where everything is in every frame. The concepts held out are those of the emoji set.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import (
    Collected,
    Item,
    Recipe,
    add_build_arguments,
    build_set,
    is_heldout,
    shared,
    told,
)
from carillon.engine.data.sets.cldr import Names, read_names
from carillon.engine.data.sets.clip_scenes import SIDE, Scene, Track, draw_scene, frames_of
from carillon.engine.data.sets.clip_video import CODEC_NAMES, CODECS, check_encoders, encode_clip
from carillon.engine.data.sets.clip_words import WORDS, caption, questions
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.emoji_pictures import Picture, draw_picture, read_pictures
from carillon.engine.data.sets.emoji_sources import SOURCES, Sources
from carillon.engine.data.sets.npm import locate_packages
from carillon.engine.data.shards import Dataset

EXAMPLES = """examples:
  carillon data clips
  carillon data clips --clips 2000 --seed 1 --out data/clips-2000
  carillon data clips --limit 20 --out data/clips-20
"""

_RECIPE = 1
_MAX_CLIPS = 100_000
_HELDOUT_SHARE = 0.15
_BYSTANDER_SHARE = 0.4
_DRAWN_SIDE = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data clips`."""
    parser.add_argument("--clips", type=int, default=400, help="how many clips (400)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn by chance (0)")
    add_build_arguments(parser, "clips", packages="npm tarballs", workers=True)


def main(args: argparse.Namespace) -> int:
    """Run `carillon data clips` and print what the set holds. Raises UserError."""
    dataset = build_clips(
        args.out,
        num_clips=args.clips,
        seed=args.seed,
        **shared(args),
    )
    return told(dataset, "clips")


@dataclass(frozen=True, kw_only=True)
class ClipJob:
    """A clip: its pictures with their names by language; the rest follows from the seed."""

    key: str
    suffix: str
    split: str
    seed: int
    actor: Picture
    bystander: Picture | None
    actor_names: Mapping[str, str]
    bystander_names: Mapping[str, str]
    names_source: str


def build_clips(
    out: Path,
    *,
    num_clips: int = 400,
    seed: int = 0,
    languages: Sequence[str] = tuple(WORDS),
    data: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    sources: Sources = SOURCES,
) -> Dataset:
    """Build the set at `out`, or open it when it is there. Raises UserError as `build_set` does."""
    if not 1 <= num_clips <= _MAX_CLIPS:
        raise UserError(f"--clips {num_clips}: 1 to {_MAX_CLIPS:,} are allowed")
    recipe = Recipe(
        name="clips",
        version=_RECIPE,
        settings={"clips": num_clips, "seed": seed, "languages": list(languages)},
        collect=lambda: _collect(num_clips, seed, languages, data, sources),
        make=make_clip,
    )
    return build_set(recipe, out, limit=limit, workers=workers, overwrite=overwrite)


def _collect(
    num_clips: int, seed: int, languages: Sequence[str], data: Path | None, sources: Sources
) -> Collected[ClipJob]:
    tools = {"ffmpeg": check_encoders()}
    folder = locate_packages(sources.packages, data)
    names = read_names(folder, languages, names=sources.names, derived_names=sources.derived_names)
    # Skin tones and families have names of a whole line, and belong to one concept anyway.
    named = {
        concept: by_language
        for concept, by_language in names.items()
        if concept == base_concept(concept) and len(by_language) == len(languages)
    }
    pictures = [
        picture
        for picture in read_pictures(folder, sources, named)
        if picture.pack.vendor != sources.heldout_vendor
    ]
    jobs = list(_jobs(pictures, named, num_clips, seed, sources))
    sums = {f"npm:{package.spec}": package.sha256 for package in sources.packages}
    return Collected(packages=sums, jobs=jobs, tools=tools)


def _jobs(
    pictures: Sequence[Picture], names: Names, num_clips: int, seed: int, sources: Sources
) -> Iterator[ClipJob]:
    pools: dict[tuple[bool, str], list[Picture]] = {}
    for picture in pictures:
        is_out = is_heldout(base_concept(picture.concept))
        pools.setdefault((is_out, picture.pack.vendor), []).append(picture)
    for number in range(num_clips):
        draws = random.Random(f"{seed} {number}")
        is_out = draws.random() < _HELDOUT_SHARE
        of_split = [place for place in sorted(pools) if place[0] == is_out]
        if not of_split:
            continue
        pool = pools[draws.choice(of_split)]  # one vendor's, so that both have one licence
        actor, other = draws.choice(pool), draws.choice(pool)
        has_other = draws.random() < _BYSTANDER_SHARE and other.concept != actor.concept
        yield ClipJob(
            key=f"clip-{number:06d}",
            suffix=tuple(CODECS)[number % len(CODECS)],
            split="heldout_concept" if is_out else "train",
            seed=seed,
            actor=actor,
            bystander=other if has_other else None,
            actor_names=_plain(names, actor),
            bystander_names=_plain(names, other) if has_other else {},
            names_source=f"npm:{sources.names.spec}",
        )


def _plain(names: Names, picture: Picture) -> dict[str, str]:
    return {language: name for language, (name, _) in names[picture.concept].items()}


def make_clip(job: ClipJob) -> Item:
    """Draw and encode a clip, and tell what it shows."""
    draws = random.Random(f"{job.seed} {job.key}")
    bystander = draw_picture(job.bystander.content, _DRAWN_SIDE) if job.bystander else None
    scene, pictures = draw_scene(draws, draw_picture(job.actor.content, _DRAWN_SIDE), bystander)
    frames = b"".join(frames_of(scene, pictures))
    video = encode_clip(frames, job.suffix, width=SIDE, height=SIDE, fps=scene.fps)
    package = job.actor.pack.package.spec
    captions = {
        language: [caption(scene.told, WORDS[language], name, job.bystander_names.get(language))]
        for language, name in job.actor_names.items()
    }
    meta = {
        "captions": captions,
        "qa": list(_questions(job, scene)),
        "motion": scene.told.motion,
        "count": scene.told.count,
        "moving_frames": [scene.first, scene.last] if scene.told.motion != "still" else [],
        "concepts": [job.actor.concept, *([job.bystander.concept] if job.bystander else [])],
        "tracks": [_track(track, job) for track in scene.tracks],
        "background": scene.background,
        "vendor": job.actor.pack.vendor,
        "codec": CODEC_NAMES[job.suffix],
        "licence": job.actor.pack.licence,
        "author": job.actor.pack.author,
        "licence_source": f"npm:{package} package/package.json",
        "caption_licence": "Unicode-3.0",
        "caption_source": job.names_source,
        "source": f"npm:{package}",
        "media": {job.suffix: _facts(scene)},
    }
    return Item(key=job.key, split=job.split, members={job.suffix: video}, meta=meta)


def _questions(job: ClipJob, scene: Scene) -> Iterator[dict[str, str]]:
    for language, name in job.actor_names.items():
        other = job.bystander_names.get(language)
        for kind, question, answer in questions(scene.told, WORDS[language], name, other):
            yield {"language": language, "kind": kind, "question": question, "answer": answer}


def _track(track: Track, job: ClipJob) -> dict[str, Any]:
    picture = job.actor if track.role == "actor" or job.bystander is None else job.bystander
    return {"concept": picture.concept, **asdict(track)}


def _facts(scene: Scene) -> dict[str, Any]:
    return {
        "width": SIDE,
        "height": SIDE,
        "fps": scene.fps,
        "num_frames": scene.num_frames,
        "duration_s": round(scene.num_frames / scene.fps, 6),
    }
