"""Offline inference in Python: `LLM` answers questions about pictures, `VisionEncoder` gives their features.

    LLM("folder-or-id").generate({"prompt": "What is this?", "images": ["cat.png"]})[0].text

Pictures are fetched, decoded and cut into patches by a few threads while the engine already computes, a bounded number
of prompts ahead, so any iterable can be passed. Answers come in the order of the prompts, and a prompt that cannot be
answered never takes another one with it. An `LLM` serves one caller at a time, others wait; for many, run
`siglane serve`.
"""

from siglane.families.ahead import PREPARE_AHEAD
from siglane.families.stack import Encoded
from siglane.llm.encoder import VisionEncoder
from siglane.llm.generation import Generation
from siglane.llm.offline import LLM

__all__ = ["LLM", "PREPARE_AHEAD", "Encoded", "Generation", "VisionEncoder"]
