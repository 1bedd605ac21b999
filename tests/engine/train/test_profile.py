"""What is counted of a batch, the rates that follow, and the share of communication."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from carillon.engine.data.packed_captions import CaptionRows
from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.data.pairs import Batch
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.decoder import build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig, build_dual_encoder
from carillon.engine.train import profile
from carillon.engine.train.communication import CommunicationProbe, exposed, of_cpu, of_cuda
from carillon.engine.train.profile import GlobalWork, Throughput, work_of_pairs, work_of_rows


def test_each_caption_counts_at_its_own_length() -> None:
    tower = {"width": 24, "depth": 2, "num_heads": 3}
    config = DualEncoderConfig(
        dims=8,
        vision_backbone="vit-ti-8",
        vision=VisionOverrides(image_size=16, **tower),
        text_backbone="clip-text-ti",
        text=TextOverrides(context=16, **tower),
    )
    model = build_dual_encoder(config, vocab_size=50)
    lengths = [3, 9, 3, 5]
    batch = Batch(
        images=torch.zeros(4, 16, 16, 3, dtype=torch.uint8),
        tokens=torch.zeros(4, 9, dtype=torch.long),
        lengths=torch.tensor(lengths),
        keys=["a", "b", "c", "d"],
        languages=["en"] * 4,
        bad=[],
    )
    work = work_of_pairs(batch, model.flops_per_sample)
    assert work.tokens == 20
    assert work.flops == 3 * sum(model.flops_per_sample(16, length) for length in lengths)
    assert work.computed == 3 * 4 * model.flops_per_sample(16, 9)
    # Attention is quadratic: the mean length would count too little.
    assert work.flops > 3 * 4 * model.flops_per_sample(16, 5)


def test_captions_of_a_row_count_each_for_itself() -> None:
    config = DecoderConfig(width=32, depth=2, num_heads=2, mlp_width=48, context=12)
    model = build_decoder(config, vocab_size=50, device="meta")
    offsets = torch.tensor([[0, 3, 8, 12, 12], [0, 5, 5, 9, 12]], dtype=torch.int32)
    rows = PackedRows.of(torch.zeros(2, 12, dtype=torch.long), offsets)
    work = work_of_rows(CaptionRows(rows, [], [], 0, {}), model.flops_per_token)
    real = sum(length * model.flops_per_token(length) for length in (3, 5, 4, 5, 4))
    assert work.tokens == 21
    assert work.flops == 3 * real
    assert work.computed == 3 * (real + 3 * model.flops_per_token(3))


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    meter = Throughput(peak=50e12, world_size=2)
    meter.add(rows=8, work=GlobalWork(40, 60e12, [50e12, 30e12]), waited_s=1.0)
    meter.add(rows=8, work=GlobalWork(40, 60e12, [20e12, 60e12]), waited_s=0.0)
    now[0] += 5.0
    meter.exclude(1.0)
    assert meter.rates(0.2) == pytest.approx(
        {
            "images_per_s": 4.0,
            "tokens_per_s": 20.0,
            "tflops": 15.0,
            "mfu": 0.3,
            "data_share": 0.25,
            "communication_share": 0.15,
            "compute_share": 0.6,
            "imbalance": 110 / 80,  # by step; over the window each rank has 70 or 90
            "padding_share": 1 - 120 / 160,
        }
    )
    meter.add(rows=8, work=GlobalWork(40, 60e12, [40e12, 40e12]), waited_s=0.0)
    now[0] += 1.0
    rates = meter.rates(None)
    assert rates["imbalance"] == 1
    assert not {"communication_share", "compute_share"} & rates.keys()


def test_work_beside_a_collective_hides_it() -> None:
    assert exposed([(0, 10), (5, 12)], [(3, 4), (8, 20), (9, 10)]) == 7
    assert exposed([(0, 10)], []) == 10
    assert exposed([], [(0, 10)]) == 0


def event(name: str, begin: float, end: float, parent: Any = None, **values: Any) -> Any:
    given = {"device_type": DeviceType.CPU, "is_user_annotation": False} | values
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=span, cpu_parent=parent, **given)


def test_an_operator_that_holds_a_collective_is_no_work_beside_it() -> None:
    split = event("aten::addmm", 0, 30)
    inner = event("aten::mm", 0, 5, split)
    reduction = event("_c10d_functional::all_reduce", 5, 30, split)
    gloo = event("gloo:all_reduce", 6, 29)
    assert of_cpu([split, inner, reduction, gloo]) == ([(6, 29)], [(0, 5)])


def test_annotations_are_no_kernels() -> None:
    cuda = {"device_type": DeviceType.CUDA}
    events = [
        event("aten::mm", 0, 3),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 4, 9, **cuda),
        event("nccl:all_reduce", 4, 9, is_user_annotation=True, **cuda),
        event("FSDP::all_gather", 0, 9, is_user_annotation=True, **cuda),
        event("sm90_xmma_gemm_bf16", 0, 6, **cuda),
    ]
    assert of_cuda(events) == ([(4, 9)], [(0, 6)])


def test_without_collectives_the_share_is_none() -> None:
    with CommunicationProbe(torch.device("cpu")) as probe:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert probe.share == 0
    assert probe.overhead_s > 0
