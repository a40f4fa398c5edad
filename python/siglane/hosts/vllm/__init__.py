"""siglane inside stock vLLM: its plugin, and the classes that vLLM loads by name."""
