"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator

from qlora_serve.errors import RequestError
from qlora_serve.serve.api.chat_body import ChatMessage, Tool
from qlora_serve.serve.api.schemas import Body, refused
from qlora_serve.serve.api.service import Service, own_tokens
from qlora_serve.serve.api.tool_format import need_tool_format
from qlora_serve.serve.engine.slots import AdapterSelection

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Body):
    """`POST /tokenize`: a text or a chat."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Hello world", "return_token_strs": True}]}
    )

    model: str | None = None
    """The base's name or an adapter's, which may have a tokenizer of its own."""
    prompt: str | None = None
    """A text."""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    """A chat, which the base's template renders."""
    tools: list[Tool] = Field(default_factory=list)
    """Functions that the template tells the model of."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens; on for a text, off for a chat."""
    add_generation_prompt: bool = True
    """Whether a chat ends with the beginning of the assistant's turn."""
    return_token_strs: bool = False
    """Also say what each token is."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise refused(
                "add_special_tokens", "the chat template writes a chat's special tokens itself"
            )
        if self.messages is None and self.tools:
            raise refused("tools", "tools go with messages")
        return self


class TokenizeAnswer(Body):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [19556, 905]}]})

    model: str | None = None
    """The base's name or an adapter's, which may have a tokenizer of its own."""
    tokens: list[int]
    """Token ids."""


class DetokenizeAnswer(Body):
    """The text."""

    prompt: str


@router.post("/tokenize", summary="Text or chat to tokens")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
    """Tokens as the same text, or the same chat, would have them in a prompt."""
    service: Service = request.app.state.service
    own = own_tokens(_chosen(service, body.model))
    tokenizer = (own or service.base).tokenizer
    if body.messages is not None:
        service.limits.check(len(body.messages), service.limits.messages, "messages", "messages")
        if body.tools or any(m.tool_calls or m.role == "tool" for m in body.messages):
            need_tool_format(tokenizer)
        tokens = await service.tokenize_chat(
            [message.as_template_input() for message in body.messages],
            [tool.as_template_input() for tool in body.tools],
            body.add_generation_prompt,
            own,
        )
    else:
        tokens = await service.tokenize_text(
            body.prompt or "", body.add_special_tokens is not False, own
        )
    names: list[Any] | None = None
    if body.return_token_strs:
        names = await service.off_the_loop(lambda: tokenizer.convert_ids_to_tokens(list(tokens)))
    longest = service.engine.limits.max_length
    return TokenizeAnswer(
        count=len(tokens), max_model_len=longest, tokens=list(tokens), token_strs=names
    )


@router.post("/detokenize", summary="Tokens to text")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    """The text of tokens, special ones included."""
    service: Service = request.app.state.service
    adapter = _chosen(service, body.model)
    return DetokenizeAnswer(prompt=await service.detokenize(body.tokens, adapter))


def _chosen(service: Service, model: str | None) -> AdapterSelection | None:
    """Whose tokens are meant; an experiment has the base's, unless its variants disagree."""
    experiment = None if model is None else service.experiment(model)
    if experiment is None:
        return service.choose(model, None)
    for name in experiment.models:
        if own_tokens(service.choose(name, None)) is not None:
            raise RequestError(
                f"{model!r} is an experiment, and its variant {name!r} has a tokenizer of its own; "
                "name a variant",
                param="model",
            )
    return None
