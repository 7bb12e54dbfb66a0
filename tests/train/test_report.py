"""The card, the page and the recipe that a run leaves behind."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_serve.adapters.manifest import read_manifest
from qlora_serve.errors import AdapterError
from qlora_serve.settings import load_settings
from qlora_serve.train.announce import report_end
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.report.charts import curve
from qlora_serve.train.report.page import LOG_FILE, write_report
from qlora_serve.train.run import train
from tests.tiny_models import write_random_adapter, write_tiny_model
from tests.train.chats import SOME_CHATS, write_chats

LOG = {
    "format": 1,
    "steps": [
        {"step": i + 1, "loss": 3 / (i + 1), "learning_rate": 1e-4 * (10 - i), "grad_norm": 1.0,
         "tokens": 9, "seconds": 0.1}
        for i in range(10)
    ],
    "evaluations": [{"step": 0, "loss": 3.0}, {"step": 10, "loss": 0.7654}],
    "samples": [
        {"step": 0, "prompt": "<script>alert(1)</script>", "answer": "before & this"},
        {"step": 10, "prompt": "<script>alert(1)</script>", "answer": "after this"},
    ],
    "peak_memory_bytes": 3 * 2**30,
    "environment": {"python": "3.11", "threads": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    folder = tmp_path_factory.mktemp("run")
    settings = TrainSettings(
        base=str(write_tiny_model(folder / "base")),
        data=write_chats(folder / "d.jsonl", SOME_CHATS),
        output=folder / "mine",
        device="cpu", max_steps=3, rank=2, eval_split=1, learning_rate=1e-2,
        target_modules=("q_proj", "v_proj"),
    )  # fmt: skip
    train(settings, lambda _: None)
    return settings


class _Page(HTMLParser):
    """Every address that a page would load, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed already."""

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_the_recipe_makes_the_same_adapter_again(trained: TrainSettings, tmp_path: Path) -> None:
    recipe = trained.output / "recipe.yaml"
    again = load_settings(TrainSettings, recipe, {"output": tmp_path / "again"})
    assert again.model_dump(exclude={"output", "data"}) == trained.model_dump(
        exclude={"output", "data"}
    )
    train(again, lambda _: None)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trained.output / name).read_bytes()
    # Only what is not a default, so that a reader sees what was chosen.
    keys = [
        line.partition(":")[0] for line in recipe.read_text().splitlines() if line[0] not in "#- "
    ]
    assert "rank" in keys
    assert "dropout" not in keys


def test_the_card_is_one_that_the_hub_reads(trained: TrainSettings) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained.output / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == trained.base
    assert f"base_model:adapter:{trained.base}" in card.data.tags
    assert "### Framework versions" in card.text
    assert not re.search(r"More Information Needed|None|nan", card.text)


def test_the_page_loads_nothing_and_says_all(trained: TrainSettings) -> None:
    (trained.output / LOG_FILE).write_text(json.dumps(LOG))
    write_report(trained.output)
    text = (trained.output / "report.html").read_text()
    page = _Page(text)
    assert page.addresses == []
    assert not re.search(r"url\(|@import|<script|http://|https://", text)
    assert page.open == []
    assert "held-out rows" in page.text
    assert '"sources"' not in page.text  # no JSON among what people read
    assert text.count("<svg") == 3
    for said in (
        "mine", "before & this", "after this", "<script>alert(1)</script>", "3.00 GiB", "planned",
        "measured", "rank: 2", "trained tokens", "dots: held-out rows",
    ):  # fmt: skip
        assert said in page.text, said


def test_an_evaluation_comes_into_the_page(trained: TrainSettings, tmp_path: Path) -> None:
    from qlora_serve.train.evaluate.config import EvalSettings
    from qlora_serve.train.evaluate.run import evaluate

    evaluate(
        EvalSettings(
            base=trained.base, adapter={"mine": trained.output}, data=Path(trained.data[0]),
            device="cpu", rows=4, max_tokens=4, resamples=100, update_reports=True,
        ),
        lambda _: None,
    )  # fmt: skip
    page = _Page((trained.output / "report.html").read_text())
    assert "perplexity" in page.text
    assert "4 held-out rows" in page.text


def test_a_foreign_adapter_has_no_report(tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "a", write_tiny_model(tmp_path / "base"))
    assert read_manifest(adapter) is None
    with pytest.raises(AdapterError, match="not trained by this tool"):
        write_report(adapter)


@pytest.mark.parametrize(
    "points",
    [
        [], [(1, float("nan"))], [(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 5e-9)],
        [(i, (-1) ** i * 1e6) for i in range(5000)], [(1, 2.0), (2, float("inf")), (3, 1.0)],
    ],
    ids=["none", "nan", "one", "flat", "tiny", "many", "infinite"],
)  # fmt: skip
def test_curves_stay_inside_their_frame(points: list[tuple[float, float]]) -> None:
    svg = curve(points, "loss", smooth=True)
    if not any(value == value for _, value in points):
        assert svg == ""
        return
    for pairs in re.findall(r'points="([^"]*)"', svg):
        for pair in pairs.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 480
            assert 0 <= y <= 250
    assert len(svg) < 60_000


def test_the_held_out_loss_is_said_wherever_the_loss_is(trained: TrainSettings) -> None:
    manifest = read_manifest(trained.output)
    assert manifest is not None
    loss = manifest.metrics["eval_loss"]
    lines: list[str] = []
    report_end(trained, manifest, lines.append)
    assert lines[0].endswith(f"; on held-out rows {loss:.4f}")
    assert f"{loss:.3f} on held-out rows" in (trained.output / "README.md").read_text()
    write_report(trained.output)
    text = _Page((trained.output / "report.html").read_text()).text
    assert re.search(rf"{loss:.3f}\s*loss on held-out rows", text)
    (source,) = manifest.data["sources"]
    assert f"{trained.data[0]}: chatml, {source['rows']} rows" in text


def test_an_unknown_key_in_a_manifest_does_not_break_the_report(trained: TrainSettings) -> None:
    file = trained.output / "qlora_serve.json"
    content: dict[str, Any] = json.loads(file.read_text())
    before = file.read_text()
    content["recipe"]["from_a_later_version"] = 1
    file.write_text(json.dumps(content))
    try:
        write_report(trained.output)
    finally:
        file.write_text(before)
    assert "<svg" in (trained.output / "report.html").read_text()


def test_a_fault_in_the_report_does_not_cost_the_adapter(
    trained: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_serve.train.report import page

    def fail(*_: Any) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(page, "render", fail)
    lines: list[str] = []
    output = tmp_path / "out"
    train(trained.model_copy(update={"output": output, "max_steps": 1}), lines.append)
    assert (output / "adapter_model.safetensors").is_file()
    assert any("report.html was not written (KeyError" in line for line in lines)
