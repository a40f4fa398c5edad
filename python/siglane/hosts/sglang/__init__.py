"""siglane inside stock SGLang: its plugin, and the classes that SGLang loads by name."""
