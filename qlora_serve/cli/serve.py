"""`qlora-serve serve`."""

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.serve.config import ServeSettings

app = App()

_LIMITS = "Limits"
_PANELS = dict.fromkeys(("max_model_len", "max_sequences", "max_step_tokens", "kv_memory"), _LIMITS)
_PANELS |= dict.fromkeys(
    ("adapter_memory", "adapter_host_memory", "pin", "strict", "adapter_root", "adapters_poll"),
    "Many adapters",
)
_PANELS |= dict.fromkeys(("keys", "allow_unauthenticated", "cors_origins"), "Who may ask")
_PANELS |= dict.fromkeys(("experiment", "feedback"), "Experiments and feedback")
_PANELS |= dict.fromkeys(
    (
        "max_body_size",
        "max_messages",
        "max_output_tokens",
        "max_choices",
        "max_variants",
        "max_stop_texts",
        "max_logit_biases",
        "max_tools",
        "max_schema_size",
        "schema_timeout",
        "max_concurrent_requests",
        "max_queued_answers",
        "queue_timeout",
        "request_timeout",
    ),
    "Caps on requests",
)


@app.command()
@flags_from(ServeSettings, positional=["base"], panels=_PANELS)
def serve(settings: ServeSettings) -> None:
    """Serve one base model with many adapters on an OpenAI-style endpoint.

    Examples:

        qlora-serve serve smollm2 --adapter tagging=adapters/tagging

        qlora-serve serve models/qwen --adapters-dir adapters --quantization nf4 --port 9000
    """
    import gc

    from qlora_serve.serve.ahead import pages_ahead

    ahead = pages_ahead(settings)  # while the import takes its seconds
    gc.disable()  # which makes 650,000 objects, and next to no garbage
    from qlora_serve.serve.run import serve as run

    gc.freeze()
    gc.enable()
    run(settings, ahead)
