"""`qlora-serve compare`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_serve.cli.help import App
from qlora_serve.errors import ConfigError

if TYPE_CHECKING:
    from qlora_serve.cli.client import Client

app = App()


@app.command()
def compare(
    prompt: Annotated[str, typer.Argument(help="The question.", metavar="PROMPT")],
    variants: Annotated[
        str,
        typer.Option(
            help="base and adapters' names, with commas, each with @SCALE if it is to be scaled; "
            "all of them when left out."
        ),
    ] = "",
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Answers of each variant.")] = 1,
    divergence: Annotated[
        bool, typer.Option(help="Measure how far each adapter is from the base at every token.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask base and adapters the same question at once, and show the answers side by side.

    On a terminal the answers stream, and then each word is shaded by how much the adapter changed
    the base's mind there.

    Examples:

        qlora-serve compare "Rain stopped the final." --variants base,tagging

        qlora-serve compare "Rain stopped the final." --variants base,tagging@0.5,tagging

        qlora-serve compare "My order never came" --json
    """
    from rich.console import Console

    from qlora_serve.cli.client import Client

    client = Client(url)
    body = {
        "messages": _messages(prompt, system), "variants": _variants(variants, repeats, client),
        "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
        "divergence": divergence,
    }  # fmt: skip
    console = Console()
    if not as_json and console.is_terminal:
        _stream(client, body, console)
        return
    found = client.compare(body)["answers"]
    if as_json:
        answers = [_plain(answer) for answer in found]
        typer.echo(json.dumps({"prompt": prompt, "answers": answers}, indent=2, ensure_ascii=False))
        return
    from qlora_serve.cli.columns import Columns

    console.print(Columns.of_whole(found).table())


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": prompt}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


def _variants(listed: str, repeats: int, client: "Client") -> list[dict[str, Any]]:
    """What `--variants` lists; base and all adapters when it lists none.

    Raises:
        ConfigError: a name is given twice, or a scale is not a number.
    """
    names = [name.strip() for name in listed.split(",") if name.strip()]
    names = names or ["base", *client.adapters()]
    if len(set(names)) != len(names):
        raise ConfigError(f"--variants {listed}: a name is given twice")
    return [variant(name, repeats) for name in names]


def variant(text: str, repeats: int = 1) -> dict[str, Any]:
    """`NAME` or `NAME@SCALE` as the server takes it.

    Raises:
        ConfigError: the scale is not a number.

    >>> variant("tagging@0.5")
    {'name': 'tagging@0.5', 'repeats': 1, 'adapter': 'tagging', 'adapter_scale': 0.5}
    """
    name, mark, scale = text.rpartition("@")
    named: dict[str, Any] = {"name": text[:64], "repeats": repeats}
    if not mark:
        return {**named, "model": text}
    try:
        return {**named, "adapter": name, "adapter_scale": float(scale)}
    except ValueError:
        raise ConfigError(
            f"--variants {text}: expected NAME or NAME@SCALE, such as tagging@0.5"
        ) from None


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer as scripts have read it since the first version, and what came since."""
    return {
        "variant": answer["variant"],
        "text": answer["text"],
        "finish_reason": answer["finish_reason"],
        "tokens": answer["usage"]["completion_tokens"],
        "seconds": answer["seconds"],
        **{key: answer[key] for key in ("repeat", "id", "model", "error", "ttft_seconds")},
        **{key: answer[key] for key in ("mean_logprob", "divergence")},
        "token_logprobs": answer["tokens"],
    }


def _stream(client: "Client", body: dict[str, Any], console: Any) -> None:
    from rich.live import Live

    from qlora_serve.cli.columns import Columns

    columns = Columns()
    # Longer answers than the screen is high scroll away while they stream; the end shows all.
    with Live(console=console, vertical_overflow="visible", refresh_per_second=12) as live:
        for event in client.compare_stream(body):
            columns.take(event)
            live.update(columns.table())
