"""Examples for the report: which items, and small pictures of them inside the page.

Which ones follows from the seed and their keys. Quarantined items are not opened again. Where a
pipeline looks for personal data, captions are shown without it.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from html import escape

from carillon.engine.data.curate.stages.pii import Pii
from carillon.engine.data.curate.write import Curated
from carillon.engine.data.decode.image import ImageError, decode_rgb
from carillon.engine.data.samples import RawSample, SampleError, main_member

NUM_EXAMPLES = 12
_SIDE = 112
_MAX_CAPTION = 120


def examples_of(curated: Curated, place: int) -> list[tuple[int, str, int]]:
    """(row, reason, match) of what a stage dropped or flagged, at most NUM_EXAMPLES."""
    keys, seed = curated.scored.column("key"), curated.pipeline.seed

    def rank(found: tuple[int, str, int]) -> bytes:
        text = f"{seed} {place} {keys[found[0]].as_py()}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    return sorted(heapq.nsmallest(NUM_EXAMPLES, curated.judged_by(place), key=rank))


def figure(curated: Curated, row: int, reason: str, match: int) -> str:
    """One example: its picture, and that of the item that it duplicates, over the reason."""
    pictures = [_picture(curated, one) for one in ([row, match] if match >= 0 else [row])]
    key = escape(str(curated.scored.column("key")[row].as_py()))
    caption = _caption(curated, row)
    return (
        f"<figure><div>{''.join(pictures)}</div><figcaption><b>{key}</b><br>{escape(reason)}"
        f"{f'<br><i>{escape(caption)}</i>' if caption else ''}</figcaption></figure>"
    )


def _sample(curated: Curated, row: int) -> RawSample | None:
    try:
        return curated.read(row)
    except SampleError:
        return None


def _picture(curated: Curated, row: int) -> str:
    sample = _sample(curated, row)
    if sample is None or main_member(sample.members, "image") is None:
        held = ", ".join(sample.members) if sample else "unreadable"
        return f'<span class="none">{escape(held or "text")}</span>'
    try:
        image = decode_rgb(sample.medium("image"), min_side=_SIDE)
    except ImageError:
        return '<span class="none">no picture</span>'
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" src="data:image/jpeg;base64,{data}">'


def _caption(curated: Curated, row: int) -> str:
    sample = _sample(curated, row)
    texts = [
        text for texts in (sample.meta["captions"] if sample else {}).values() for text in texts
    ]
    text = texts[0] if texts else ""
    for stage in curated.pipeline.stages:
        if isinstance(stage, Pii):  # what was removed before this stage still has its data
            text = stage.cleaned(text)
    return text if len(text) <= _MAX_CAPTION else text[:_MAX_CAPTION] + "..."
