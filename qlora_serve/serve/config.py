"""The settings of a server."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from qlora_serve.adapters.folder import named_paths
from qlora_serve.serve.feedback.experiment import named_splits
from qlora_serve.settings import Settings, parse_bytes


class ServeSettings(Settings):
    """What to serve, where, and within which limits."""

    base: str
    """The base model: a directory, a prepared name such as smollm2, or a hub id."""
    adapter: dict[str, Path] = Field(
        default_factory=dict, json_schema_extra={"metavar": "NAME=DIR"}
    )
    """An adapter and its name; may be given again. In YAML a mapping of names to directories."""
    adapters_dir: Path | None = None
    """A folder whose sub-directories are adapters, named after themselves."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantize the base while loading. A base that is stored quantized needs no flag."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in; auto is float32 on a CPU, bfloat16 or float16 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cuda_paths: Literal["auto", "on", "off"] = "auto"
    """Whether a GPU attends by flash-attn, and decodes by CUDA graphs: auto where flash-attn is
    installed and fits, on refuses to start without it, off never. Not measured on a GPU yet."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    keys: Path | None = Field(default=None, json_schema_extra={"metavar": "FILE"})
    """The file of keys that this server asks for, made with `qlora-serve keys add`; read again
    when it changes. Without one everybody who can reach the server may use and manage it."""
    allow_unauthenticated: bool = False
    """Without --keys, also listen where other machines can reach it."""
    feedback: Path | None = Field(default=None, json_schema_extra={"metavar": "FILE"})
    """An SQLite file, made when it is not there, for the answers of experiments and comparisons
    with their votes and scores. Without one the latest are kept in memory, and experiments are
    refused."""
    experiment: dict[str, dict[str, float]] = Field(
        default_factory=dict, json_schema_extra={"metavar": "NAME=VARIANT:SHARE,..."}
    )
    """A model name behind which several variants answer, each its share of the users; may be given
    again. In YAML a mapping of names to mappings of variants to shares. Needs --feedback."""
    log_format: Literal["text", "json"] = "text"
    """How log lines look; json has one more for each request."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and answer together; what the base was trained for when left out."""
    max_sequences: int = Field(default=32, ge=1)
    """Requests that run in one batch; more wait."""
    max_step_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one step may compute; longer prompts are computed in chunks between the others'
    tokens. 192 on a CPU and 2048 on a GPU when left out."""
    kv_memory: str = "auto"
    """Memory for keys and values, such as 2GB; auto takes a quarter of what is free."""
    prefix_cache: bool = True
    """Take over the keys and values of a prompt that begins like an earlier one, computed with the
    same adapter at the same scale."""
    adapter_memory: str = "auto"
    """Memory on the device for the adapters in use, such as 500MB; auto takes an eighth of what is
    free."""
    adapter_host_memory: str = "auto"
    """Memory of the host for adapters that may be needed again; auto takes an eighth of what is
    free."""
    adapter_templates: bool = False
    """Let adapters bring chat templates of their own, which run in a process with limits; else an
    adapter that has one cannot be used."""
    trust_remote_code: bool = False
    """Run the Python code that the base's directory brings along, with all rights of the server."""
    pin: tuple[str, ...] = ()
    """An adapter that always stays on the device; may be given again."""
    strict: bool = False
    """Refuse to start when an adapter cannot be used, instead of serving the others."""
    adapter_root: tuple[Path, ...] = ()
    """A folder from which adapters may be loaded over HTTP, besides --adapters-dir; may be given
    again."""
    adapters_poll: float = Field(default=2.0, ge=0, le=3600)
    """Seconds between two looks at --adapters-dir for new, changed and removed adapters; 0 never
    looks again."""

    max_body_size: str = "4MB"
    """The largest body of a request."""
    max_messages: int = Field(default=1024, ge=1)
    """Messages of one chat."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """The most tokens of one answer; as many as fit when left out."""
    max_choices: int = Field(default=32, ge=1)
    """Answers that one request may ask for: its prompts times n."""
    max_variants: int = Field(default=16, ge=1)
    """Variants of one comparison; their repeats count as choices."""
    max_stop_texts: int = Field(default=16, ge=0)
    """Texts in a request's stop."""
    max_logit_biases: int = Field(default=1024, ge=0)
    """Entries of a request's logit_bias."""
    max_tools: int = Field(default=128, ge=0)
    """Functions that a request may bring."""
    max_schema_size: str = "64KB"
    """The largest JSON schema, regular expression or grammar."""
    schema_timeout: float = Field(default=5.0, gt=0)
    """Seconds that compiling a schema may take."""
    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Requests that are worked on at once; more are refused with 503."""
    max_queued_answers: int = Field(default=1024, ge=0)
    """Answers that may wait for a place in the batch; more are refused with 503."""
    queue_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a request may wait for its first token; no limit when left out."""
    request_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a request may take in all; no limit when left out."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server from a browser; none when left out."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Seconds that requests have to finish after SIGTERM."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return named_paths(value)

    @field_validator("experiment", mode="before")
    @classmethod
    def _splits(cls, value: Any) -> Any:
        return named_splits(value)

    @field_validator("pin", "adapter_root", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator(
        "kv_memory", "adapter_memory", "adapter_host_memory", "max_body_size", "max_schema_size"
    )
    @classmethod
    def _size(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" or str(info.field_name).startswith("max_"):
            parse_bytes(value)
        return value
