"""saw-int4: a 4-bit KV cache for SGLang. Importing this touches neither CUDA nor sglang."""

__version__ = "0.1.0"
