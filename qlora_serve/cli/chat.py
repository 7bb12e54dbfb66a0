"""`qlora-serve chat`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_serve.cli.help import App
from qlora_serve.errors import QloraServeError, RequestError

if TYPE_CHECKING:
    from qlora_serve.cli.client import Client

app = App()

_HELP = "/adapter NAME, /base, /models, /clear (forget the chat), /help, /exit"


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    adapter: Annotated[str | None, typer.Option(help="The adapter to begin with.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
) -> None:
    """Hold a conversation in the terminal; change the adapter at any time with /adapter NAME.

    Examples:

        qlora-serve chat

        qlora-serve chat --adapter tagging --temperature 0
    """
    from qlora_serve.cli.client import Client

    client = Client(url)
    names = client.models()
    talk = _Talk(client, names, system, {"max_tokens": max_tokens, "temperature": temperature})
    if adapter is not None:
        talk.choose(adapter)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        typer.echo(f"models here: {', '.join(names)}\n{_HELP}")
    while True:
        try:
            line = input(f"\n{talk.name}> " if is_terminal else "").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        try:
            talk.handle(line)
        except RequestError as error:  # the chat goes on; only this turn is lost
            typer.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo(" (stopped)")


class _Talk:
    """A conversation: its messages, and who answers."""

    def __init__(
        self, client: "Client", names: list[str], system: str | None, settings: dict[str, float]
    ) -> None:
        self._client, self._names, self._settings = client, names, settings
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self.name = names[0]

    def choose(self, name: str) -> None:
        """Changes who answers from now on; the chat so far is kept.

        Raises:
            QloraServeError: the server does not know the name.
        """
        if name not in self._names:
            self._names = self._client.models()  # it may have been loaded meanwhile
        if name not in self._names:
            raise QloraServeError(
                f"no adapter is called {name!r}; known here: {', '.join(self._names)}"
            )
        self.name = name

    def handle(self, line: str) -> None:
        """A line that the user wrote: a command or a question."""
        command, _, argument = line.partition(" ")
        if not line:
            return
        if command == "/adapter" and argument:
            try:
                self.choose(argument.strip())
            except QloraServeError as error:
                raise RequestError(str(error)) from None
        elif command == "/base":
            self.name = self._names[0]
        elif command == "/models":
            self._names = self._client.models()
            typer.echo(", ".join(self._names))
        elif command == "/clear":
            self._messages = list(self._opening)
        elif command.startswith("/"):
            typer.echo(_HELP)
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        pieces = []
        body = {"model": self.name, "messages": messages, **self._settings}
        for piece in self._client.stream(body):
            pieces.append(piece)
            typer.echo(piece, nl=False)
        typer.echo()
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
