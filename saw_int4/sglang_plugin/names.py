"""Names that several modules of the plugin agree on."""

from importlib.metadata import version

KV_CACHE_DTYPE = "int4"  # the value of --kv-cache-dtype
ATTENTION_BACKEND = "saw_int4"
TESTED_SGLANG = ("0.5.21", "0.5.23")
# Where the parent leaves the fingerprint of its options on the server arguments that its children receive.
FINGERPRINT_ATTRIBUTE = "_saw_int4_fingerprint"

# Speculative decoding: without and with a draft model, which keeps a 16-bit cache, read by a backend of SGLang's.
NGRAM = "NGRAM"
WITH_DRAFT_MODEL = ("EAGLE", "STANDALONE")
MAX_DRAFTS = 64  # bits of a row of decode_attention's tree_mask
DRAFT_BACKENDS = {"cpu": "torch_native", "cuda": "triton"}  # by device, where the operator chose none


def sglang_version() -> str:
    """The installed SGLang. From its metadata: the platform is asked for while sglang is still being imported."""
    return version("sglang")
