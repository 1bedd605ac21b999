"""What the transcripts of the prompts say: which words belong to which sound, and what is only a
note.

A transcript file has a line `name: words` a sound. A line that is one bracket describes a sound
without words ("[ascending tones]", "(10 seconds of silence)"). A bracket at either end of a line is
a note of whoever wrote it; within a line the words in brackets are kept. Prompts that share words
in any language are one group, so that no text is in two splits. Left out: judging whether speakers
kept to the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LINE = re.compile(r"(?P<name>[^:;\s][^:]*?):[ \t]*(?P<text>.*)")
_WHOLE = re.compile(r"\s*[\[(<](?P<text>[^\])>]*)[\])>]\s*")
_LEADING = re.compile(r"^\s*[\[(<][^\])>]*[\])>]\s*(?=\S)")
_TRAILING = re.compile(r"(?<=\S)\s*[\[(<][^\])>]*[\])>][.\s]*$")


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """What a sound says, or what it is where it says nothing; `script` is the line as written."""

    words: str
    description: str
    script: str


def parse_transcripts(text: str) -> tuple[dict[str, PromptText], dict[str, str]]:
    """Texts by the sound's name, and the reason for each name that has none."""
    texts: dict[str, PromptText] = {}
    refused: dict[str, str] = {}
    for line in text.removeprefix("\ufeff").splitlines():
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            continue  # comments and empty lines
        name, parsed = match["name"], parse_text(match["text"])
        if name in texts or name in refused:
            texts.pop(name, None)
            refused[name] = "two transcripts"
        elif not parsed.words and not parsed.description:
            refused[name] = "an empty transcript"
        else:
            texts[name] = parsed
    return texts, refused


def parse_text(script: str) -> PromptText:
    """Words without notes, or the description of a sound without words."""
    if whole := _WHOLE.fullmatch(script):
        return PromptText(words="", description=whole["text"].strip(), script=script)
    words = _TRAILING.sub("", _LEADING.sub("", script))
    words = words.translate({ord(mark): None for mark in "[]"})
    return PromptText(words=" ".join(words.split()), description="", script=script)


def group_prompts(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """prompt -> the first name of its group, given (prompt, words) of all languages.

    Two prompts are in one group when they share words, directly or through others.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    first_with: dict[str, str] = {}
    for prompt, words in sorted(texts):
        parents.setdefault(prompt, prompt)
        folded = " ".join(re.findall(r"\w+", words.lower()))
        if folded:
            one, other = sorted((root(prompt), root(first_with.setdefault(folded, prompt))))
            parents[other] = one
    return {prompt: root(prompt) for prompt in parents}


def speakers_of(copyright_text: str, language: str) -> str:
    """Who holds the rights in a language's sounds, by the package's copyright file; may be empty.

    The stanza `Files: fr-*` is for French; `Files: *` for all that have none of their own.
    """
    holders: dict[str, str] = {}
    for stanza in re.split(r"\n\s*\n", copyright_text):
        files = re.search(r"^Files:[ \t]*(\S+)", stanza, re.MULTILINE)
        holder = re.search(r"^Copyright:[ \t]*(.+)", stanza, re.MULTILINE)
        if files and holder:
            holders[files[1]] = re.sub(r"^[\d ,-]+", "", holder[1].split("<")[0]).strip(" ,")
    return holders.get(f"{language}-*", holders.get("*", ""))


def licence_of(copyright_text: str, language: str) -> str:
    """The licence that the copyright file states for a language's sounds; empty when none is."""
    licences: Mapping[str, str] = {
        files: licence
        for stanza in re.split(r"\n\s*\n", copyright_text)
        for files in re.findall(r"^Files:[ \t]*(\S+)", stanza, re.MULTILINE)
        for licence in re.findall(r"^ ?License:[ \t]*(\S+)", stanza, re.MULTILINE)[-1:]
    }
    return licences.get(f"{language}-*", licences.get("*", ""))
