"""What Python's garbage collector has to look at once a server runs."""

import gc
from typing import Any

import pytest
from tiny_models import write_tiny_model
from typer.testing import CliRunner

import qlora_serve.serve.shutdown as shutdown
from qlora_serve.cli.main import app


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_server_that_answers_leaves_what_it_was_made_of_to_no_collection(
    tmp_path, monkeypatch
) -> None:
    """A look at the model's and the libraries' objects would stop every thread for long."""
    base = write_tiny_model(tmp_path / "base")
    seen: list[Any] = []

    def look(app: Any, service: Any, *others: Any) -> None:
        looked_at = {id(item) for item in gc.get_objects()}
        layers = [id(layer) for layer in service.base.model.modules()]
        seen.append((gc.isenabled(), len(layers), [i for i in layers if i in looked_at]))
        later = [service]
        assert any(item is later for item in gc.get_objects()), "what comes later is looked at"

    monkeypatch.setattr(shutdown, "run_until_told", look)  # instead of answering until it is told
    try:
        result = CliRunner().invoke(app, ["serve", str(base), "--port", "0"])
    finally:
        gc.unfreeze()
    assert result.exit_code == 0, result.output
    [(enabled, layers, looked_at)] = seen
    assert enabled
    assert layers > 10
    assert looked_at == []
