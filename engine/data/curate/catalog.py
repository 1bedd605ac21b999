"""Every stage by the `type` that names it in a pipeline file.

A stage is a file in stages/; adding one means to write it and to list it here and in AnyStage.
"""

from __future__ import annotations

import typing

from carillon.engine.data.curate.stage import Stage
from carillon.engine.data.curate.stages.balance import Balance
from carillon.engine.data.curate.stages.blur import Blur
from carillon.engine.data.curate.stages.caption_match import CaptionMatch
from carillon.engine.data.curate.stages.captions import Captions
from carillon.engine.data.curate.stages.exact_duplicates import ExactDuplicates
from carillon.engine.data.curate.stages.language import Language
from carillon.engine.data.curate.stages.licence import Licence
from carillon.engine.data.curate.stages.near_embeddings import NearEmbeddings
from carillon.engine.data.curate.stages.near_pictures import NearPictures
from carillon.engine.data.curate.stages.near_sounds import NearSounds
from carillon.engine.data.curate.stages.near_texts import NearTexts
from carillon.engine.data.curate.stages.near_videos import NearVideos
from carillon.engine.data.curate.stages.nsfw import Nsfw
from carillon.engine.data.curate.stages.ocr import Ocr
from carillon.engine.data.curate.stages.picture_size import PictureSize
from carillon.engine.data.curate.stages.pii import Pii
from carillon.engine.data.curate.stages.toxicity import Toxicity
from carillon.engine.data.curate.stages.transcripts import Transcripts

AnyStage = (
    Licence
    | PictureSize
    | Captions
    | Transcripts
    | Blur
    | ExactDuplicates
    | NearPictures
    | NearTexts
    | NearSounds
    | NearVideos
    | NearEmbeddings
    | CaptionMatch
    | Language
    | Pii
    | Toxicity
    | Nsfw
    | Ocr
    | Balance
)

STAGES: dict[str, type[Stage]] = {
    typing.get_args(typing.get_type_hints(one)["type"])[0]: one for one in typing.get_args(AnyStage)
}
