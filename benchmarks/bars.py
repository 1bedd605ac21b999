"""What the kernels have to reach on a CPU, against whom, and whether a row of results does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One condition on one row. `least`: times faster than the fastest of `against`.

    `most_share`: extra memory over that of `against`. `most_mb`: extra memory.
    """

    op: str
    case: str
    passes: str
    size: int
    against: tuple[str, ...] = ()
    least: float | None = None
    most_share: float | None = None
    most_mb: float | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a row is found by."""
        return self.op, self.case, self.passes, self.size

    def judge(self, row: Mapping[str, Any]) -> tuple[str, bool]:
        """The condition beside the value, and whether it is met.

        Raises:
            KeyError: the row lacks a peer that the bar is against.
        """
        rivals = " and ".join(self.against)
        memory = row["extra_mb"]
        if self.least is not None:
            value = min(row["ratio"][peer] for peer in self.against)
            return f"{value:.2f} >= {self.least} x {rivals}", value >= self.least
        if self.most_share is not None:
            value = memory["ours"] / min(memory[peer] for peer in self.against)
            said = f"{value:.1%} <= {self.most_share:.0%} of the memory of {rivals}"
            return said, value <= self.most_share
        assert self.most_mb is not None
        return f"{memory['ours']:.0f} <= {self.most_mb:.0f} MB", memory["ours"] <= self.most_mb


def _bars() -> Iterator[Bar]:
    for dtype, least in (("fp32", 1.3), ("bf16", 2.5)):
        row = {"op": "contrastive", "case": f"softmax {dtype}", "passes": BOTH}
        yield Bar(**row, size=8192, against=("torch",), least=least)
        yield Bar(**row, size=8192, against=("torch",), most_share=0.1)
    yield Bar(op="contrastive", case="softmax bf16", passes=BOTH, size=65_536, most_mb=1000)
    for dtype in ("fp32", "bf16"):
        for passes in (FORWARD, BOTH):
            row = {"op": "packed_attention", "passes": passes}
            for tokens in (50, 197, 577):
                case = f"equal lengths {dtype}"
                yield Bar(**row, case=case, size=tokens, against=("sdpa",), least=1.0)
            case = f"lengths 10-577 {dtype}"
            yield Bar(**row, case=case, size=16, against=("sdpa_padded",), least=2.0)
        for tokens, sizes in (
            (16384, "8 of 64 experts, width 512"),
            (16384, "2 of 8 experts, width 512"),
            (4096, "8 of 64 experts, width 1024"),
        ):
            row = {"op": "moe_routing", "case": f"{sizes}, {dtype}", "passes": BOTH, "size": tokens}
            yield Bar(**row, against=("gathering", "scattering"), least=3.0)
    for granularity in ("tensorwise", "rowwise", "1x128", "128x128", "given scale"):
        row = {"op": "fp8_cast", "case": granularity, "passes": FORWARD, "size": 4096}
        yield Bar(**row, against=("float32",), least=2.0)


BARS = tuple(_bars())
