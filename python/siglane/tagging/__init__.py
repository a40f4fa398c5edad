"""Zero-shot tagging: one sigmoid per image and label, the label matrix computed once (docs/tagging.md)."""
