"""The body of `POST /v1/responses`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from qlora_serve.serve.api.chat_body import CalledFunction, ChatRequest
from qlora_serve.serve.api.schemas import Body, StreamOptions, UserBody, refused


class InputText(Body):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    """The text."""
    annotations: list[Any] = Field(default_factory=list)
    """What an earlier answer carried; not read."""
    logprobs: list[Any] = Field(default_factory=list)
    """What an earlier answer carried; not read."""


Texts = str | Annotated[list[InputText], Field(min_length=1)]


class InputMessage(Body):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is read as `system`."""
    content: Texts
    """Text, or a list of text parts."""
    id: str | None = None
    """Of an earlier answer's item; not read."""
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    """Of an earlier answer's item; not read."""


class InputCall(Body):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    """Repeated by its output."""
    name: str
    """The function's name."""
    arguments: str
    """A JSON object, as text."""
    id: str | None = None
    """Of an earlier answer's item; not read."""
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    """Of an earlier answer's item; not read."""

    @model_validator(mode="after")
    def _called(self) -> "InputCall":
        CalledFunction(name=self.name, arguments=self.arguments)
        return self


class InputCallOutput(Body):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: str
    """The call that this answers."""
    output: Texts
    """What the function returned."""
    id: str | None = None
    """Not read."""
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    """Not read."""


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(kind or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    """Its name."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments."""
    strict: bool = False
    """Whether the arguments must follow the schema even where the model chooses to call."""


class NamedResponseTool(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: str
    """The function's name."""


class TextFormat(Body):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    """`text` is free."""
    name: str | None = None
    """With `json_schema`; for your own books."""
    description: str | None = None
    """With `json_schema`; for your own books."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    """With `json_schema`."""
    strict: bool | None = None
    """Answers follow the schema either way."""


class TextOptions(Body):
    """How the answer's text is."""

    format: TextFormat | None = None
    """Free text when left out."""


class ResponsesRequest(UserBody):
    """`POST /v1/responses`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2",
                    "instructions": "Be brief.",
                    "input": "What is the capital of France?",
                    "max_output_tokens": 40,
                }
            ]
        },
    )
    # Metadata is given back with the answer.
    labels: ClassVar[frozenset[str]] = UserBody.labels - {"metadata"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,),
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "prompt_cache_retention": ("in_memory",),
        "include": ([],),
        "top_logprobs": (0,),
    }

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    """A text, or the conversation so far as items."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """The most tokens to generate; as many as fit when left out."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the most likely token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the fewest tokens whose probabilities reach this sum."""
    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Nothing of it changes anything here."""
    text: TextOptions = Field(default_factory=TextOptions)
    """How the answer's text is."""
    tools: list[ResponseTool] = Field(default_factory=list)
    """Functions that the model may call."""
    tool_choice: Literal["auto", "none", "required"] | NamedResponseTool = "auto"
    """Whether and what to call."""
    parallel_tool_calls: bool = True
    """False gives at most one call."""
    metadata: dict[str, str] | None = None
    """Labels for your own books, given back with the answer."""

    @model_validator(mode="after")
    def _is_a_chat(self) -> "ResponsesRequest":
        self.as_chat()
        return self

    def as_chat(self) -> ChatRequest:
        """The same question as a chat."""
        chat = {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": self._format(),
            "tools": [self._tool(tool) for tool in self.tools],
            "tool_choice": self._choice() if self.tools or self.tool_choice != "auto" else None,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            first = error.errors()[0]
            message = str(first["msg"]).removeprefix("Value error, ")
            path = first["loc"]
            field = str(path[0]) if path else str(first.get("ctx", {}).get("param", "input"))
            renamed = {"messages": "input", "response_format": "text"}.get(field, field)
            where = ".".join(map(str, path[1:]))
            raise refused(renamed, f"{renamed}.{where}: {message}" if where else message) from None

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            last = messages[-1] if messages else {}
            if isinstance(item, InputMessage):
                messages.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, InputCallOutput):
                content = _text(item.output)
                answer = {"role": "tool", "tool_call_id": item.call_id, "content": content}
                messages.append(answer)
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if last.get("role") == "assistant":  # one turn: its text, then its calls
                    last.setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "tool_calls": [call]})
        return messages

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "json_object"}
        if wanted.json_schema is None or wanted.name is None:
            raise refused("text", "text.format: json_schema needs name and schema")
        return {
            "type": "json_schema",
            "json_schema": {"name": wanted.name, "schema": wanted.json_schema},
        }

    @staticmethod
    def _tool(tool: ResponseTool) -> dict[str, Any]:
        function = tool.model_dump(include={"name", "description", "parameters", "strict"})
        return {"type": "function", "function": function}

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, NamedResponseTool):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
