"""Zero-shot tagging: one sigmoid per picture and label, the label matrix computed once (docs/tagging.md)."""
