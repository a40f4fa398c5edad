"""Ovis2.6: Ovis2.5's model with Qwen3 or Qwen3-MoE and larger pictures.

Source: vLLM 0.32 models/registry.py and models/ovis2_5.py, which serves both; formats.md section 3.7.
"""

from __future__ import annotations

from siglane.config.reader import RawConfig
from siglane.families.ovis2_5 import Ovis2_5
from siglane.families.stated import stated_classes
from siglane.weights.hub import Checkpoint

MODEL_TYPES = ("ovis2_6", "ovis2_6_moe")


class Ovis2_6(Ovis2_5):
    """How large a picture may become is not Ovis2.5's, so that a file has to say it. `Ovis2_6_NextForCausalLM` has
    another decoder."""

    name = "ovis2_6"
    known_as = ("Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM")
    max_pixels = None

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        if classes := stated_classes(root):
            return not set(self.known_as).isdisjoint(classes)
        return root.get("model_type") in MODEL_TYPES
