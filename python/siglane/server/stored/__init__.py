"""OpenAI's files and batches, kept under `--data-dir`."""
