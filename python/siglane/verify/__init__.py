"""Compares a checkpoint's numbers, stage by stage, with its reference implementation (`siglane verify`)."""

from siglane.verify.run import verify
from siglane.verify.stages import Comparison, Report

__all__ = ["Comparison", "Report", "verify"]
