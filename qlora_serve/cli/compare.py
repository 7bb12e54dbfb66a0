"""`qlora-serve compare`."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_serve.errors import ConfigError

if TYPE_CHECKING:
    from qlora_serve.cli.client import Client

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command()
def compare(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    variants: Annotated[
        str, typer.Option(help="base and adapters' names, with commas; all of them when left out.")
    ] = "",
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask base and adapters the same question at once, and show the answers side by side.

    Examples:

        qlora-serve compare "Rain stopped the final." --variants base,tagging

        qlora-serve compare "My order never came" --json
    """
    from qlora_serve.cli.client import Client

    client = Client(url)
    names = [name.strip() for name in variants.split(",") if name.strip()]
    names = names or ["base", *client.models()[1:]]
    if len(set(names)) != len(names):
        raise ConfigError(f"--variants {variants}: a name is given twice")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    body = {
        "messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
    }  # fmt: skip
    # One request each at the same time: the server answers them in one batch.
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: _ask(client, name, body), names))
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "answers": answers}, indent=2, ensure_ascii=False))
    else:
        _show(answers)


def _ask(client: "Client", name: str, body: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    answer = client.complete({**body, "model": name})
    choice = answer["choices"][0]
    return {
        "variant": name,
        "text": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "tokens": answer["usage"]["completion_tokens"],
        "seconds": round(time.monotonic() - start, 3),
    }


def _show(answers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, show_lines=True)
    for answer in answers:
        table.add_column(answer["variant"], ratio=1, overflow="fold")
    table.add_row(*(Text(answer["text"]) for answer in answers))
    table.add_row(
        *(
            f"{a['tokens']} tokens, {a['seconds']:.1f} s, ended by {a['finish_reason']}"
            for a in answers
        ),
        style="dim",
    )
    Console().print(table)
