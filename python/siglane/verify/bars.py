"""What each stage has to reach: one threshold for floats; with fewer bits a mean and a least cosine by kind of stage.

Rounding alone costs more the more layers there are: with 8 bits the mean cosine of a stage's rows is 0.9999 in the
shipped models' four blocks and 0.998 behind 24 of random weights, with 4 bits 0.999 and 0.94, with 8-bit floats 0.998
and 0.996; single rows lie lower. A mean or a row below its bar is therefore a mistake, and no rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from siglane.nn.quantise import Bits
from siglane.verify.stages import Bars

CODED: Mapping[Bits, Bars] = {
    "8bit": Bars(0.9, 0.995, 0.98), "4bit": Bars(0.5, 0.9, 0.9), "fp8": Bars(0.9, 0.99, 0.98),
}  # fmt: skip
# what stands before the first layer of codes, and what is compared with itself
EXACT = ("preprocessing", "patch_embedding", "positions", "packing", "text.ids", "text.embedding", "calibration")
LANGUAGE = ("lm.block", "logits")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """exact: of stages in floats; bits: of the others, None where there are none; speaks: whether a language model
    follows, beside which a tower keeps 8 bits; everywhere: whether `exact` holds for every stage."""

    exact: float
    bits: Bits | None = None
    speaks: bool = False
    everywhere: bool = False

    def of(self, stage: str) -> Bars:
        """stage: as of `stages.ORDER`, a block's with its number."""
        kind = stage.rpartition(".")[0] if stage.rpartition(".")[2].isdigit() else stage
        if self.bits is None or self.everywhere or kind in EXACT:
            return Bars(self.exact, self.exact, self.exact)
        keeps = self.bits == "4bit" and self.speaks and kind not in LANGUAGE
        return CODED["8bit" if keeps else self.bits]
