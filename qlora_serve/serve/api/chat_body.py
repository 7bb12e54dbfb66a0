"""The body of `POST /v1/chat/completions`."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from qlora_serve.serve.api.schemas import Body, SamplingBody, refused

_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    """The text."""


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class CalledFunction(Body):
    """What an assistant called."""

    name: str
    """The function's name."""
    arguments: str
    """A JSON object, as text."""

    @field_validator("arguments")
    @classmethod
    def _json_object(cls, value: str) -> str:
        try:
            parsed = json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise ValueError("expected a JSON object as text") from None
        if not isinstance(parsed, dict):
            raise ValueError("expected a JSON object as text")
        return value or "{}"


class ToolCall(Body):
    """A call that an assistant's turn made."""

    id: str
    """Repeated by the tool's answer."""
    type: Literal["function"] = "function"
    function: CalledFunction
    """What was called."""


class ChatMessage(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks; `developer` is read as `system`."""
    content: Content | None = None
    """Text, or a list of text parts; an assistant's turn may have tool calls instead."""
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    """The calls that an assistant's turn made."""
    tool_call_id: str | None = None
    """The call that a tool's turn answers."""
    name: str | None = None
    """The function that a tool's turn answers for; other roles have no names."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls do not belong to the role {self.role!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's message needs the tool_call_id that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError(f"tool_call_id does not belong to the role {self.role!r}")
        if self.role != "tool" and self.name is not None:
            raise ValueError(f"name is not supported for the role {self.role!r}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    # Templates write the arguments as JSON themselves.
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: str = Field(pattern=_NAME)
    """Its name."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """The JSON schema of its arguments."""
    strict: bool = False
    """Whether the arguments must follow the schema even where the model chooses to call."""


class Tool(Body):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition
    """The function."""

    def as_template_input(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class NamedFunction(Body):
    """A function's name."""

    name: str
    """The name."""


class NamedToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction
    """The function."""


class JsonSchemaFormat(Body):
    """A named JSON schema."""

    name: str = Field(pattern=_NAME)
    """Its name; for your own books."""
    description: str | None = None
    """For your own books."""
    json_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    """The schema; every answer follows it, strict or not."""
    strict: bool | None = None
    """Answers follow the schema either way."""


class ResponseFormat(Body):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    """`text` is free."""
    json_schema: JsonSchemaFormat | None = None
    """With `json_schema`."""
    regex: str | None = None
    """With `regex`: a regular expression for the whole answer."""
    grammar: str | None = None
    """With `grammar`: Lark or GBNF."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> "ResponseFormat":
        given = {"json_schema", "regex", "grammar"} & self.model_fields_set
        wanted = {self.type} - {"text", "json_object"}
        if given != wanted:
            need = f"needs the field {self.type!r} alone" if wanted else "takes no other field"
            raise ValueError(f"type={self.type!r} {need}")
        return self


class ChatRequest(SamplingBody):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2",
                    "adapter": "tagging",
                    "messages": [{"role": "user", "content": "Rain stopped the final."}],
                    "temperature": 0,
                }
            ]
        },
    )

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "prompt_cache_retention": ("in_memory",),
        "functions": ([],),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    """The chat so far."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`; as many as fit when both are left out."""
    logprobs: bool = False
    """Report each token's log-probability: the model's own, before temperature and penalties."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report this many of the likeliest tokens too; needs `logprobs`."""
    response_format: ResponseFormat | None = None
    """What the answer's text must be."""
    tools: list[Tool] = Field(default_factory=list)
    """Functions that the model may call."""
    tool_choice: Literal["auto", "none", "required"] | NamedToolChoice | None = None
    """`auto` when there are tools."""
    parallel_tool_calls: bool = True
    """False gives at most one call."""

    @model_validator(mode="after")
    def _chat_consistent(self) -> "ChatRequest":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise refused(
                "max_tokens", "max_tokens and max_completion_tokens differ; give one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs=true")
        self._check_formats()
        self._check_tools()
        return self

    def _check_formats(self) -> None:
        if self.response_format is None or self.response_format.type == "text":
            return
        self.check_guided("response_format")
        if self.structured_outputs is not None:
            raise refused(
                "response_format", "response_format and structured_outputs are both given"
            )
        if self.active_tools:
            raise refused(
                "response_format",
                "response_format cannot be combined with tools; set tool_choice=none",
            )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise refused("tools", "tools: two functions share a name")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise refused("tool_choice", "tool_choice needs tools")
        chosen = self.tool_choice
        if isinstance(chosen, NamedToolChoice) and chosen.function.name not in names:
            raise refused("tool_choice", f"tool_choice: no tool is called {chosen.function.name!r}")
        if self.active_tools and self.structured_outputs is not None:
            raise refused("structured_outputs", "structured_outputs cannot be combined with tools")
        if self.active_tools and self.tool_choice not in (None, "auto"):
            self.check_guided("tool_choice")

    @property
    def active_tools(self) -> list[Tool]:
        """The tools that the model may call in this answer."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either name; None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
