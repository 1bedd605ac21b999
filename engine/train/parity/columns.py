"""The models that every layout is held to: the columns of the parity table.

Each is small, has every kind of module that its plans name, and takes one step of a fixed global
batch: in one process for the reference, and in a layout on a process's share of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from carillon.engine.train.parity.decoder import SIGMOID, SOFTMAX, decoder
from carillon.engine.train.parity.dual_encoder import CLIP, POOLED, dual_encoder
from carillon.engine.train.parity.step import Run

DUAL_ENCODERS: Mapping[str, Run] = {
    "dual encoder, softmax": dual_encoder(CLIP, "softmax"),
    "dual encoder, sigmoid": dual_encoder(CLIP, "sigmoid"),
    "pooled dual encoder, softmax": dual_encoder(POOLED, "softmax"),
}
DECODERS: Mapping[str, Run] = {
    "MoE decoder, softmax router": decoder(SOFTMAX),
    "MoE decoder, sigmoid router": decoder(SIGMOID),
}
COLUMNS: Mapping[str, Run] = {**DUAL_ENCODERS, **DECODERS}
