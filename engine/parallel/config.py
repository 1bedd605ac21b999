"""The `distributed` section: how a step is laid out, and what of it cannot work together.

What a model can be cut into is said by engine/models/plans.py, what a number of processes can hold
by mesh.py. Everything is refused before a device is touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from carillon.engine.config import changed, section, setting
from carillon.engine.nn.fp8_layers import Provider, provider_problems
from carillon.engine.nn.fp8_scaling import Recipe
from carillon.engine.parallel.determinism import nondeterministic

ContextMethod = Literal["ulysses", "ring", "all_gather"]
Dispatcher = Literal["auto", "all_to_all", "deepep"]
DEEPEP = "deep_ep"  # the package
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")


@dataclass(frozen=True, kw_only=True)
class Fp8ShadowConfig:
    """`distributed.fp8_shadow`: a second look at fp8's loss, by bfloat16 products."""

    every: int = setting(
        0, "Steps between two looks at the same batch with bf16 products; 0: none.", min=0
    )
    bound: float = setting(
        0.02, "The largest |fp8 - bf16| / bf16 of the loss that is in order.", min=1e-6, max=1.0
    )
    patience: int = setting(3, "Stop after so many looks in a row above the bound.", min=1)

    def check(self) -> Iterator[str]:
        if self.every == 0:
            for name in changed(self, "bound", "patience"):
                yield f"{name}: {getattr(self, name)} given, but every is 0; set every, or drop it"


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """`distributed`: how a step is laid out. Degrees never change the result beyond rounding."""

    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "Collectives: auto is nccl with CUDA, else gloo.", hashed=False
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where tensors live.", hashed=False)
    zero_stage: Literal[0, 1, 2, 3] = setting(
        0, "0 replicates; 1 and 2 shard the state; 3 frees gathered weights too.", hashed=False
    )
    fsdp_gather: Literal["fp32", "bf16"] = setting(
        "fp32", "What the blocks' weights are gathered in; they are kept in fp32."
    )
    fsdp_reduce: Literal["fp32", "bf16"] = setting(
        "fp32", "What the blocks' gradients are summed over the data processes in."
    )
    fsdp_offload: bool = setting(
        False, "Keep shards of weights, gradients and moments in host memory.", hashed=False
    )
    dp_replicate: int | None = setting(
        None, "Replicas; none: all processes when zero_stage is 0, else 1.", min=1, hashed=False
    )
    dp_shard: int | None = setting(
        None, "Processes that shard one replica; none: what is left.", min=1, hashed=False
    )
    pp: int = setting(1, "Pipeline-parallel processes.", min=1, hashed=False)
    pp_schedule: Literal["gpipe", "1f1b", "interleaved1f1b", "interleaved_zero_bubble", "zbv"] = (
        setting("1f1b", "Order of a pipeline's forward and backward passes.", hashed=False)
    )
    pp_stages_per_rank: int = setting(
        2,
        "Stages on each process of an interleaved schedule; zbv has 2, gpipe and 1f1b 1.",
        min=1,
        max=64,
        hashed=False,
    )
    pp_split: dict[str, tuple[int, ...]] = setting(
        {},
        "Blocks of each stage, by tower; a tower left out is balanced by FLOPs.",
        hashed=False,
    )
    cp: int = setting(1, "Context-parallel processes.", min=1, hashed=False)
    cp_method: ContextMethod = setting(
        "ring",
        "How attention sees the other tokens: heads exchanged, keys in a ring, or gathered keys.",
        hashed=False,
    )
    tp: int = setting(1, "Tensor-parallel processes.", min=1, hashed=False)
    tp_whole_tower: Literal["vision", "text"] | None = setting(
        None,
        "A tower too small to be split: every tensor-parallel process computes all of it.",
        hashed=False,
    )
    sequence_parallel: bool = setting(
        False,
        "With tp: the residual stream lies by tokens between a block's products.",
        hashed=False,
    )
    async_tp: bool = setting(
        False,
        "With sequence_parallel, compile and CUDA: products overlap with their exchange.",
        hashed=False,
    )
    ep: int = setting(
        1, "Processes that split the experts; divides dp_shard x cp.", min=1, hashed=False
    )
    dispatcher: Dispatcher = setting(
        "auto", "How tokens get to experts of other processes: auto is all_to_all.", hashed=False
    )
    grad_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass.", hashed=False
    )
    precision: Literal["fp32", "bf16", "fp8"] = setting(
        "bf16", "Arithmetic of the towers' products; fp8: those of the blocks, bf16 elsewhere."
    )
    fp8_recipe: Recipe = setting(
        "tensorwise",
        "Scales of 8-bit floats: one a tensor, a row or a block of 128, or of the last steps' "
        "amaxes (delayed).",
    )
    fp8_history: int = setting(16, "Steps whose amaxes delayed scaling keeps.", min=1, max=65_536)
    fp8_provider: Provider = setting(
        "auto", "Who computes 8-bit products; auto is native, our own casts.", hashed=False
    )
    fp8_keep_blocks: int = setting(
        0, "Blocks at either end of each tower that stay in bf16.", min=0, max=1024
    )
    fp8_shadow: Fp8ShadowConfig = section(Fp8ShadowConfig, hashed=False)
    deterministic: bool = setting(
        False,
        "The same layout gives the same bits in every run, where it may be slower.",
        hashed=False,
    )
    compile: bool = setting(False, "Compile the towers' blocks with torch.compile.")
    timeout_s: int = setting(1800, "A collective that takes longer fails.", min=10, hashed=False)
    rendezvous_s: int = setting(
        300,
        "Seconds to wait at the start for a process that has not come.",
        min=10,
        max=86_400,
        hashed=False,
    )
    watchdog_s: int = setting(
        30,
        "A process that is stopped or silent for this long ends the run; 0: nothing is watched.",
        min=0,
        max=3600,
        hashed=False,
    )

    def check(self) -> Iterator[str]:
        yield from self._check_pipeline()
        if self.zero_stage == 0 and (self.dp_shard or 1) > 1:
            yield (
                f"dp_shard: {self.dp_shard} given, but zero_stage=0 shards nothing; set "
                "distributed.zero_stage=1, 2 or 3, or drop dp_shard"
            )
        if self.dispatcher != "auto" and self.ep == 1:
            yield f"dispatcher: {self.dispatcher} given, but ep is 1: nothing is sent; drop it"
        elif self.dispatcher == "deepep":
            yield from self._check_deepep()
        if self.cp == 1 and changed(self, "cp_method"):
            yield f"cp_method: {self.cp_method} given, but cp is 1; drop it, or raise cp"
        if self.tp == 1:
            for name in ("tp_whole_tower", "sequence_parallel", "async_tp"):
                if changed(self, name):
                    yield f"{name}: {getattr(self, name)} given, but tp is 1; drop it, or set tp"
        elif self.async_tp and not (self.sequence_parallel and self.compile):
            yield "async_tp: needs sequence_parallel=true and compile=true; set them, or drop it"
        elif self.async_tp and not torch.cuda.is_available():
            yield "async_tp: needs CUDA devices and there is none; drop it"
        yield from self._check_fp8()
        if self.precision == "fp32":
            for name in changed(self, "fsdp_gather", "fsdp_reduce"):
                yield f"{name}: {getattr(self, name)} given, but precision is fp32; drop it"
        if self.fsdp_offload and not torch.cuda.is_available():
            yield "fsdp_offload: it frees a GPU's memory and there is no GPU; drop it"
        if self.deterministic:
            yield from nondeterministic(self)
        if self.backend == "nccl" and not torch.cuda.is_available():
            yield "backend: nccl needs a CUDA device and there is none; use auto or gloo"
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "device: cuda asked for and there is none; use auto or cpu"

    def _check_deepep(self) -> Iterator[str]:
        if importlib.util.find_spec(DEEPEP) is None:
            yield (
                f"dispatcher: deepep given, but the package {DEEPEP} is not installed; build it "
                "from https://github.com/deepseek-ai/DeepEP, or use auto or all_to_all"
            )
        if self.precision == "fp32":
            yield (
                "dispatcher: deepep sends bfloat16 only, but precision is fp32; use precision "
                "bf16, or dispatcher auto or all_to_all"
            )

    def _check_fp8(self) -> Iterator[str]:
        if self.precision != "fp8":
            names = ("fp8_recipe", "fp8_history", "fp8_provider", "fp8_keep_blocks")
            for name in changed(self, *names):
                given = getattr(self, name)
                yield f"{name}: {given} given, but precision is {self.precision}; drop it"
            if self.fp8_shadow.every:
                yield f"fp8_shadow: given, but precision is {self.precision}; drop it"
            return
        yield from provider_problems(self.fp8_provider, self.fp8_recipe)
        if self.pp > 1 and self.fp8_shadow.every:
            yield (
                f"fp8_shadow: given, but its second look does not run in pipeline stages "
                f"(pp={self.pp}); drop it, or pp"
            )
        if self.fp8_recipe != "delayed" and changed(self, "fp8_history"):
            yield f"fp8_history: {self.fp8_history} given, but fp8_recipe is {self.fp8_recipe}"
        if self.fp8_provider not in ("auto", "native") and self.tp > 1:
            yield (
                f"fp8_provider: {self.fp8_provider} does not multiply shares (tp={self.tp}); use "
                "native, or tp=1"
            )
        if (
            self.fp8_provider not in ("auto", "native")
            and self.pp > 1
            and self.pp_schedule in ZERO_BUBBLE
        ):
            yield (
                f"fp8_provider: {self.fp8_provider} does not go with pp_schedule="
                f"{self.pp_schedule}, which takes gradients of inputs and weights apart; use "
                "native, or 1f1b or interleaved1f1b"
            )
        if self.compile and self.fp8_recipe == "delayed":
            yield "fp8_recipe: delayed is not compiled yet; use tensorwise, or compile=false"
        if self.compile and self.tp > 1:
            yield f"compile: fp8 with tp={self.tp} is not compiled yet; use compile=false, or bf16"

    def _check_pipeline(self) -> Iterator[str]:
        unused = changed(self, "pp_schedule", "pp_stages_per_rank")
        unused += ["pp_split"] if self.pp_split else []
        if self.pp == 1 and unused:
            yield f"{unused[0]}: given, but pp=1 has no pipeline; raise pp, or drop it"
        interleaved = self.pp_schedule.startswith("interleaved")
        if self.pp > 1 and changed(self, "pp_stages_per_rank") and not interleaved:
            yield (
                f"pp_stages_per_rank: {self.pp_stages_per_rank} given, but pp_schedule is "
                f"{self.pp_schedule}; use an interleaved one, or drop it"
            )
        if self.compile and self.pp > 1 and self.pp_schedule in ZERO_BUBBLE:
            yield (
                f"compile: true does not go with pp_schedule={self.pp_schedule}, which takes "
                "gradients of inputs and weights apart; use 1f1b or interleaved1f1b, or compile "
                "false"
            )
