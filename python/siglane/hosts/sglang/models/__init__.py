"""Models that SGLang finds here (SGLANG_EXTERNAL_MODEL_PACKAGE): one flat module each, SGLang scans no deeper."""
