"""How the clips are spoken of in ten languages: captions, questions and answers from known facts.

Names of things come from CLDR without article or case, so phrases are built to need neither: the
name comes first, what it does after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MOTIONS = ("right", "left", "up", "down", "still")


@dataclass(frozen=True, kw_only=True)
class Words:
    """A language's phrases; `ways` are the answers to `which_way`, in the order of MOTIONS."""

    moving: str
    resting: str
    beside: str
    what_moves: str
    what_rests: str
    what_is_there: str
    which_way: str
    how_many_move: str
    how_many_are_there: str
    ways: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a clip shows: `count` of a thing that move one way (or rest), perhaps beside another."""

    motion: str
    count: int
    has_bystander: bool


def caption(told: Told, words: Words, name: str, bystander: str | None) -> str:
    """What happens, in one line."""
    what = f"{told.count} × {name}" if told.count > 1 else name
    if told.motion == "still":
        text = words.resting.format(what=what)
    else:
        text = words.moving.format(what=what, where=words.ways[MOTIONS.index(told.motion)])
    return text + words.beside + words.resting.format(what=bystander) if bystander else text


def questions(
    told: Told, words: Words, name: str, bystander: str | None
) -> Iterator[tuple[str, str, str]]:
    """Kind, question and answer of all that can be asked about a clip."""
    way = words.ways[MOTIONS.index(told.motion)]
    if told.motion == "still":
        yield "what", words.what_is_there, name
        yield "count", words.how_many_are_there, str(told.count)
    else:
        yield "what", words.what_moves, name
        yield "count", words.how_many_move, str(told.count)
    yield "motion", words.which_way, way
    if bystander:
        yield "bystander", words.what_rests, bystander


WORDS: Mapping[str, Words] = {
    "en": Words(
        moving="{what}, moving {where}",
        resting="{what}, staying still",
        beside="; ",
        what_moves="What moves?",
        what_rests="What stays still?",
        what_is_there="What can be seen?",
        which_way="Which way does it move?",
        how_many_move="How many of them move?",
        how_many_are_there="How many of them can be seen?",
        ways=("to the right", "to the left", "up", "down", "it stays still"),
    ),
    "de": Words(
        moving="{what}, bewegt sich {where}",
        resting="{what}, steht still",
        beside="; ",
        what_moves="Was bewegt sich?",
        what_rests="Was steht still?",
        what_is_there="Was ist zu sehen?",
        which_way="Wohin bewegt es sich?",
        how_many_move="Wie viele bewegen sich?",
        how_many_are_there="Wie viele sind zu sehen?",
        ways=("nach rechts", "nach links", "nach oben", "nach unten", "es steht still"),
    ),
    "fr": Words(
        moving="{what}, se déplace {where}",
        resting="{what}, ne bouge pas",
        beside=" ; ",
        what_moves="Qu’est-ce qui se déplace ?",
        what_rests="Qu’est-ce qui ne bouge pas ?",
        what_is_there="Que voit-on ?",
        which_way="Dans quelle direction cela se déplace-t-il ?",
        how_many_move="Combien se déplacent ?",
        how_many_are_there="Combien en voit-on ?",
        ways=("vers la droite", "vers la gauche", "vers le haut", "vers le bas", "ne bouge pas"),
    ),
    "es": Words(
        moving="{what}, se mueve {where}",
        resting="{what}, no se mueve",
        beside="; ",
        what_moves="¿Qué se mueve?",
        what_rests="¿Qué no se mueve?",
        what_is_there="¿Qué se ve?",
        which_way="¿Hacia dónde se mueve?",
        how_many_move="¿Cuántos se mueven?",
        how_many_are_there="¿Cuántos se ven?",
        ways=(
            "hacia la derecha",
            "hacia la izquierda",
            "hacia arriba",
            "hacia abajo",
            "no se mueve",
        ),
    ),
    "it": Words(
        moving="{what}, si muove {where}",
        resting="{what}, non si muove",
        beside="; ",
        what_moves="Che cosa si muove?",
        what_rests="Che cosa non si muove?",
        what_is_there="Che cosa si vede?",
        which_way="In quale direzione si muove?",
        how_many_move="Quanti si muovono?",
        how_many_are_there="Quanti se ne vedono?",
        ways=("verso destra", "verso sinistra", "verso l’alto", "verso il basso", "non si muove"),
    ),
    "pt": Words(
        moving="{what}, move-se {where}",
        resting="{what}, não se move",
        beside="; ",
        what_moves="O que se move?",
        what_rests="O que não se move?",
        what_is_there="O que se vê?",
        which_way="Para onde se move?",
        how_many_move="Quantos se movem?",
        how_many_are_there="Quantos se veem?",
        ways=("para a direita", "para a esquerda", "para cima", "para baixo", "não se move"),
    ),
    "nl": Words(
        moving="{what}, beweegt {where}",
        resting="{what}, staat stil",
        beside="; ",
        what_moves="Wat beweegt er?",
        what_rests="Wat staat stil?",
        what_is_there="Wat is er te zien?",
        which_way="Welke kant beweegt het op?",
        how_many_move="Hoeveel bewegen er?",
        how_many_are_there="Hoeveel zijn er te zien?",
        ways=("naar rechts", "naar links", "omhoog", "omlaag", "het staat stil"),
    ),
    "ru": Words(
        moving="{what}: движется {where}",
        resting="{what}: стоит на месте",
        beside="; ",
        what_moves="Что движется?",
        what_rests="Что стоит на месте?",
        what_is_there="Что здесь видно?",
        which_way="Куда это движется?",
        how_many_move="Сколько их движется?",
        how_many_are_there="Сколько их видно?",
        ways=("вправо", "влево", "вверх", "вниз", "стоит на месте"),
    ),
    "ja": Words(
        moving="{what}、{where}動く",
        resting="{what}、止まっている",
        beside="。",
        what_moves="何が動いていますか？",
        what_rests="何が止まっていますか？",
        what_is_there="何が見えますか？",
        which_way="どちらへ動いていますか？",
        how_many_move="いくつ動いていますか？",
        how_many_are_there="いくつ見えますか？",
        ways=("右へ", "左へ", "上へ", "下へ", "止まっている"),
    ),
    "zh": Words(
        moving="{what}，{where}移动",
        resting="{what}，静止不动",
        beside="；",
        what_moves="什么在移动？",
        what_rests="什么静止不动？",
        what_is_there="画面上有什么？",
        which_way="它向哪边移动？",
        how_many_move="有几个在移动？",
        how_many_are_there="画面上有几个？",
        ways=("向右", "向左", "向上", "向下", "静止不动"),
    ),
}
