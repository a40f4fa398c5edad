"""What each stage has to reach: one threshold for floats, and of fewer bits a mean and a least cosine by kind of stage.

Rounding weights and rows to 8 bits leaves a row's cosine with float32 near 0.9999 in a tower and 0.999 behind a whole
decoder, whatever is computed; single rows, such as those of an attention sink, lie lower. 4 bits leave about 0.999 and
0.99. A mean below its bar is therefore a mistake and not rounding, and so is a row below the least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from siglane.nn.quantise import Bits
from siglane.verify.stages import Bars

CODED: Mapping[Bits, Bars] = {"8bit": Bars(0.95, 0.998, 0.98), "4bit": Bars(0.5, 0.98, 0.95)}
# what stands before the first layer of codes, and what is compared with itself
EXACT = ("preprocessing", "patch_embedding", "positions", "packing", "text.ids", "text.embedding", "calibration")
LANGUAGE = ("lm.block", "logits")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """exact: of stages in floats; bits: of the others, None where there are none; speaks: whether a language model
    follows, beside which a tower keeps 8 bits."""

    exact: float
    bits: Bits | None = None
    speaks: bool = False

    def of(self, stage: str) -> Bars:
        """stage: as of `stages.ORDER`, a block's with its number."""
        kind = stage.rpartition(".")[0] if stage.rpartition(".")[2].isdigit() else stage
        if self.bits is None or kind in EXACT:
            return Bars(self.exact, self.exact, self.exact)
        return CODED["8bit" if self.speaks and kind not in LANGUAGE else self.bits]
