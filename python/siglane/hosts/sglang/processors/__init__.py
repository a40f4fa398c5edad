"""Processors that SGLang finds here (SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE): one flat module each."""
