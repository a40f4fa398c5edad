"""One file of facts per family of checkpoints, and what they share: stack, model, prompts, processor."""
