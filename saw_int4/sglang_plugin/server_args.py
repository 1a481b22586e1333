"""SGLang's arguments: accept ``--kv-cache-dtype int4``, choose the attention backend, publish our options."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import get_type_hints

from saw_int4 import env
from saw_int4.sglang_plugin.names import ATTENTION_BACKEND, DRAFT_BACKENDS, FINGERPRINT_ATTRIBUTE, KV_CACHE_DTYPE

logger = logging.getLogger(__name__)


def extend_choices() -> None:
    """Add our values to the two flags' choices, and prove by parsing that SGLang now takes them.

    Raises:
        RuntimeError: SGLang keeps its choices elsewhere than in the versions we know.
    """
    from sglang.srt.arg_groups import arg_utils
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.server_args import ServerArgs

    hints = get_type_hints(ServerArgs, include_extras=True)
    backends = _choices(hints["attention_backend"])
    if ATTENTION_BACKEND not in backends:
        add_attention_backend_choices([ATTENTION_BACKEND])
    dtypes = _choices(hints["kv_cache_dtype"])
    if KV_CACHE_DTYPE not in dtypes:
        dtypes.append(KV_CACHE_DTYPE)

    parser = argparse.ArgumentParser(exit_on_error=False)
    arg_utils.add_cli_args_from_dataclass(parser, ServerArgs, fields=["kv_cache_dtype", "attention_backend"])
    argv = ["--kv-cache-dtype", KV_CACHE_DTYPE, "--attention-backend", ATTENTION_BACKEND]
    try:
        parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise RuntimeError(f"SGLang's parser still refuses {' '.join(argv)}: {error}") from error


def _choices(hint) -> list[str]:
    for metadata in hint.__metadata__:
        choices = getattr(metadata, "choices", None)
        if isinstance(choices, list):
            return choices
    raise RuntimeError(f"SGLang declares no list of choices where one was expected: {hint}")


def register_hooks() -> None:
    """Wrap steps of SGLang's argument resolution, which runs in the process that starts the server."""
    from sglang.srt.arg_groups import resolution_hooks

    for step, wrapper in RESOLUTION_STEPS.items():
        if wrapper not in resolution_hooks._HOOKS.get(step, ()):  # a patched SGLang has it already
            resolution_hooks.register_resolution_hook(step)(wrapper)


def is_int4(server_args) -> bool:
    """Whether the operator asked for the INT4 cache (the record is the operator's input, resolution leaves it be)."""
    return server_args.kv_cache_dtype == KV_CACHE_DTYPE


def _choose_backend(server_args, previous) -> None:
    """An INT4 cache selects its backend by itself; before SGLang fills in the machine's default."""
    if is_int4(server_args):
        from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of

        from saw_int4.sglang_plugin import refusals

        refusals.check_linear_attention(server_args)
        if _backend_is_ours_to_choose(server_args):
            chosen = STOPGAPS.get(refusals.architecture(model_config_of(server_args)), ATTENTION_BACKEND)
            declare_resolution(server_args, "saw_int4", attention_backend=chosen)
    previous(server_args)


def _replace_stopgap(server_args, previous) -> None:
    """After SGLang has looked at the model, and before it acts on the backend."""
    if is_int4(server_args) and _backend_is_ours_to_choose(server_args):
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(server_args, "saw_int4", attention_backend=ATTENTION_BACKEND)
    previous(server_args)


def _backend_is_ours_to_choose(server_args) -> bool:
    """Whether the operator named none, or ours for all."""
    phases = (server_args.prefill_attention_backend, server_args.decode_attention_backend)
    return server_args.attention_backend in (None, ATTENTION_BACKEND) and phases == (None, None)


def _accept_or_refuse(server_args, previous) -> None:
    """Refuse what cannot work, then publish the options for every process of this server."""
    if is_int4(server_args):
        from sglang.srt.arg_groups.overrides import model_config_of

        from saw_int4.sglang_plugin import refusals, verify

        verify.plugin_in_place()
        options, notes = env.resolve()
        for note in notes:
            logger.warning("saw_int4: %s", note)
        refusals.check(server_args, options)
        options = options.for_model(model_config_of(server_args).num_hidden_layers)
        if options.calibration == "auto":
            options = _calibrated(server_args, options)
        _choose_draft_backend(server_args)
        env.publish(options)
        setattr(server_args, FINGERPRINT_ATTRIBUTE, options.fingerprint)
    previous(server_args)


def _choose_draft_backend(server_args) -> None:
    """A draft model's attention is SGLang's: left alone, it would take the target's, which reads INT4 rows only."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view

    view = resolved_view(server_args)
    if view.speculative_algorithm and view.speculative_draft_attention_backend is None:
        backend = DRAFT_BACKENDS[view.device]
        declare_resolution(server_args, "saw_int4", speculative_draft_attention_backend=backend)


def _calibrated(server_args, options: env.Options) -> env.Options:
    """The options with the model's own artifact; without calibration, and a warning, where it cannot have one."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    from saw_int4.calibration.automatic import artifact_for
    from saw_int4.sglang_plugin import refusals

    kv_format = options.kv_format(model_config_of(server_args).head_dim)
    device = resolved_view(server_args).device
    if device == "cuda":
        device = f"cuda:{server_args.base_gpu_id}"
    try:
        path = artifact_for(server_args.model_path, kv_format.rotation_order, kv_format.groups, device)
        calibrated = replace(options, calibration=str(path))
        refusals.check_model(server_args, calibrated)
    except ValueError as error:
        logger.warning(
            "saw_int4: serving without calibration, which is less accurate: %s Way out: calibrate elsewhere "
            "(saw-int4 calibrate) and give --saw-calibration PATH; --saw-calibration none silences this.",
            error,
        )
        return replace(options, calibration="none")
    return calibrated


def _recheck(server_args, previous) -> None:
    previous(server_args)
    if is_int4(server_args):
        from sglang.srt.arg_groups.overrides import resolved_view

        from saw_int4.sglang_plugin import refusals

        refusals.check_arguments(resolved_view(server_args))
        refusals.check_backends(server_args)
        refusals.check_dtype(server_args)


# Models that SGLang serves with backends of a list of its own only: one of them stands there while it looks.
STOPGAPS = {"GptOssForCausalLM": "triton"}

# Steps of SGLang's argument resolution, each with our wrapper ``(server_args, previous)``.
RESOLUTION_STEPS = {
    "handle_cpu_backends": _choose_backend,
    "handle_attention_backend_compatibility": _replace_stopgap,
    "handle_kv4_compatibility": _accept_or_refuse,
    "handle_model_capability_adjustments": _recheck,  # the last step that may still change a backend or the dtype
}
