"""An evaluation from settings to its result."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from qlora_serve.adapters.files import AdapterFiles, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.folder import check_name
from qlora_serve.adapters.peft_config import unsupported_settings
from qlora_serve.base.gptq import before_peft
from qlora_serve.base.source import locate_base
from qlora_serve.errors import AdapterError, ConfigError, DataError
from qlora_serve.files import disk_errors
from qlora_serve.progress import progress
from qlora_serve.train.data import ChatRow, read_chats
from qlora_serve.train.evaluate.config import EvalSettings
from qlora_serve.train.evaluate.scores import Scorer, is_json_object
from qlora_serve.train.evaluate.statistics import bootstrap, holm, paired_p_value
from qlora_serve.wording import counted

if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.masks import TokenizedRow

BASE = "base"
Report = Callable[[str], None]


class Measure(BaseModel):
    """One metric of one system."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    value: float
    low: float
    high: float
    """The ends of the confidence interval."""
    p_value: float | None = None
    """Of the difference to the base, corrected for the number of adapters; None for the base."""


class Evaluation(BaseModel):
    """What `eval` found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    base: str
    data: str
    rows: int
    confidence: float
    systems: dict[str, dict[str, Measure]]
    """System (`base`, then the adapters) → metric → value. Loss and perplexity are by token, the
    others, from 0 to 1, are means over rows."""


@dataclass(frozen=True)
class _Row:
    chat: ChatRow
    tokens: "TokenizedRow"
    prompt: list[int]
    reference: str


@dataclass
class _Results:
    """Of one system, by row."""

    losses: list[float]
    tokens: list[int]
    answers: list[str]
    scores: list[dict[str, float]]


def evaluate(settings: EvalSettings, report: Report) -> Evaluation:
    """Runs base and adapters over the held-out rows.

    Raises:
        AdapterError: an adapter does not exist, or does not fit the base exactly.
        BaseModelError: the base cannot be loaded.
        ConfigError: a name cannot name an adapter, or an extra is missing.
        DataError: the rows cannot be used.
        OutputError: the file of rows cannot be written.
    """
    data = read_chats(settings.data)
    adapters = _adapters(settings)
    chats = data.rows[: settings.rows]
    references = [_reference(chat) for chat in chats]
    scorer = _scorer(settings, references)

    from qlora_serve.base.load import load_base

    with progress(f"loading {settings.base}"):
        base = load_base(settings.base, settings.quantization, settings.dtype, settings.device)
    _refuse_own_tokens(adapters, base)
    rows = _tokenize(settings, base, chats, references)
    if len(rows) < len(chats):
        left_out = counted(len(chats) - len(rows), "row is", "rows are")
        report(f"{left_out} left out, with an answer that lies past --max-length")
    results = {BASE: _measure(BASE, base, base.model, rows, scorer, settings, ())}
    for name, adapter in adapters.items():
        _warn_of_other_base(name, adapter, base, report)
        stops = adapter.manifest.stop_token_ids if adapter.manifest else ()
        with _adapted(base.model, adapter.path) as model:
            results[name] = _measure(name, base, model, rows, scorer, settings, stops)
    if settings.output is not None:
        _write_rows(settings.output, rows, results)
    found = Evaluation(
        base=settings.base,
        data=str(settings.data),
        rows=len(rows),
        confidence=settings.confidence,
        systems=_compare(results, settings),
    )
    if settings.update_reports:
        _update_reports(adapters, found, report)
    return found


def _update_reports(adapters: dict[str, AdapterFiles], found: Evaluation, report: Report) -> None:
    from qlora_serve.train.report.page import EVALUATION_FILE, write_report

    for name, adapter in adapters.items():
        if adapter.manifest is None:
            report(f"note: {name} was not trained by this tool and has no report to update")
            continue
        of_this = {key: value for key, value in found.systems.items() if key in (BASE, name)}
        content = found.model_copy(update={"systems": of_this}).model_dump_json(indent=2)
        with disk_errors(adapter.path):
            (adapter.path / EVALUATION_FILE).write_text(content + "\n", encoding="utf-8")
            write_report(adapter.path)


def _adapters(settings: EvalSettings) -> dict[str, AdapterFiles]:
    fit = FitChecker(locate_base(settings.base))
    found = {}
    for name, path in settings.adapter.items():
        if check_name(name) == BASE:
            raise ConfigError(f"the adapter name {name!r} means the base; choose another")
        adapter = read_adapter(path)
        fit.check(adapter)
        reasons = unsupported_settings(adapter.config)
        if reasons:
            raise AdapterError(f"adapter {path} asks for {'; '.join(reasons)}")
        found[name] = adapter
    return found


def _refuse_own_tokens(adapters: dict[str, AdapterFiles], base: "LoadedBase") -> None:
    """All systems must see the same tokens: a loss per token says nothing beside one of others."""
    from qlora_serve.adapters.tokens import own_tokens

    for adapter in adapters.values():
        # How many tokens the model knows with it is the fit's business.
        if own_tokens(adapter.path, base.tokenizer, base.stop_token_ids, 1 << 31) is not None:
            raise AdapterError(
                f"adapter {adapter.path} has tokens or a chat template of its own, so that its "
                "losses cannot stand beside the base's; leave it out, or merge it and evaluate the "
                "merged model"
            )


def _reference(chat: ChatRow) -> str:
    """What the assistant says last."""
    if chat.text is not None or chat.tools:
        kind = "a templated text" if chat.text is not None else "a chat with tools"
        raise DataError(f"{chat.where} is {kind}; an evaluation needs plain chats with an answer")
    return next(m["content"] for m in reversed(chat.messages) if m["role"] == "assistant")


def _scorer(settings: EvalSettings, references: list[str]) -> Scorer | None:
    if not settings.answers:
        return None
    looks = bool(settings.json_keys) or all(map(is_json_object, references))
    return Scorer(settings.json_keys, looks)


def _tokenize(
    settings: EvalSettings, base: "LoadedBase", chats: Sequence[ChatRow], references: list[str]
) -> list[_Row]:
    from qlora_serve.base.tokenizer import encode_text, render_chat
    from qlora_serve.train.masks import tokenize_row

    rows = []
    for chat, reference in zip(chats, references, strict=True):
        try:
            tokens = tokenize_row(
                base.tokenizer, chat.messages, settings.max_length, base.stop_token_ids
            )
        except DataError as error:
            raise DataError(f"{chat.where}: {error}") from None
        last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
        text = render_chat(base.tokenizer, chat.messages[:last], add_generation_prompt=True)
        if tokens.trained_tokens:
            rows.append(_Row(chat, tokens, encode_text(base.tokenizer, text), reference))
    if not rows:
        raise DataError(
            f"{settings.data}: no row has an answer within {settings.max_length} tokens; raise "
            "--max-length"
        )
    return rows


def _measure(
    name: str,
    base: "LoadedBase",
    model: Any,
    rows: list[_Row],
    scorer: Scorer | None,
    settings: EvalSettings,
    stops: Sequence[int],
) -> _Results:
    from qlora_serve.train.evaluate.answers import greedy_answers, row_losses

    with progress(f"{name}: loss", len(rows)) as bar:
        head = base.model.get_output_embeddings()
        tokens = [row.tokens for row in rows]
        losses = row_losses(model, head, tokens, settings.batch, bar.update)
    answers: list[str] = []
    if scorer is not None:
        with progress(f"{name}: answers", len(rows)) as bar:
            answers = greedy_answers(
                model,
                base.tokenizer,
                [row.prompt for row in rows],
                sorted(base.stop_token_ids | set(stops)),
                settings.max_tokens,
                settings.batch,
                bar.update,
            )
    scores = []
    if scorer is not None:
        pairs = zip(answers, rows, strict=True)
        scores = [scorer.score(answer, row.reference) for answer, row in pairs]
    return _Results([x.total for x in losses], [x.tokens for x in losses], answers, scores)


@contextmanager
def _adapted(model: Any, path: Path) -> Iterator[Any]:
    """The base with one adapter, by PEFT; afterwards the base as it was.

    One at a time, since PEFT does not hold two that train biases or replace the same module. Its
    `unload` leaves replaced modules and biases in the base, so these are put back from a copy.
    """
    import warnings

    from peft import PeftModel

    before_peft()
    before = dict(model.named_modules())
    biases = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("bias")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, which nobody merges here
        adapted = PeftModel.from_pretrained(model, path)
    try:
        yield adapted.eval()
    finally:
        plain = adapted.unload()
        for name, module in before.items():
            parent, _, child = name.rpartition(".")
            if name and plain.get_submodule(name) is not module:
                setattr(plain.get_submodule(parent), child, module)
        parameters = dict(plain.named_parameters())
        for name, bias in biases.items():
            parameters[name].data.copy_(bias)


def _warn_of_other_base(
    name: str, adapter: AdapterFiles, base: "LoadedBase", report: Report
) -> None:
    manifest = adapter.manifest
    if manifest is None:
        return
    known = {base.fingerprint, base.source.unquantized_fingerprint}
    if manifest.base.fingerprint not in known:
        report(
            f"note: {name} was trained on other weights than {base.source.name} has (it names "
            f"{manifest.base.name}); its figures may say little"
        )


def _compare(results: dict[str, _Results], settings: EvalSettings) -> dict[str, Any]:
    systems: dict[str, dict[str, Measure]] = {
        name: {
            metric: _measured(tops, bottoms, settings)
            for metric, (tops, bottoms) in _columns(found).items()
        }
        for name, found in results.items()
    }
    others = [name for name in results if name != BASE]
    reference = _columns(results[BASE])
    for metric, (tops, _) in reference.items():
        p_values = holm(
            [
                paired_p_value(
                    _columns(results[name])[metric][0], tops, settings.resamples, settings.seed
                )
                for name in others
            ]
        )
        for name, p_value in zip(others, p_values, strict=True):
            measure = systems[name][metric].model_copy(update={"p_value": p_value})
            systems[name][metric] = measure
    return {name: _with_perplexity(measures) for name, measures in systems.items()}


def _columns(found: _Results) -> dict[str, tuple[list[float], list[float]]]:
    """Metric → numerators and denominators by row."""
    columns: dict[str, tuple[list[float], list[float]]] = {
        "loss": (found.losses, [float(count) for count in found.tokens])
    }
    for metric in found.scores[0] if found.scores else ():
        values = [score[metric] for score in found.scores]
        columns[metric] = (values, [1.0] * len(values))
    return columns


def _measured(tops: list[float], bottoms: list[float], settings: EvalSettings) -> Measure:
    found = bootstrap(tops, bottoms, settings.confidence, settings.resamples, settings.seed)
    return Measure(value=found.value, low=found.low, high=found.high)


def _with_perplexity(measures: dict[str, Measure]) -> dict[str, Measure]:
    loss = measures["loss"]
    perplexity = Measure(
        value=_exp(loss.value), low=_exp(loss.low), high=_exp(loss.high), p_value=loss.p_value
    )
    rest = {name: measure for name, measure in measures.items() if name != "loss"}
    return {"loss": loss, "perplexity": perplexity, **rest}


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _write_rows(path: Path, rows: list[_Row], results: dict[str, _Results]) -> None:
    lines = []
    for index, row in enumerate(rows):
        systems = {}
        for name, found in results.items():
            systems[name] = {"loss": found.losses[index] / found.tokens[index]}
            if found.scores:
                systems[name] |= {"answer": found.answers[index], **found.scores[index]}  # type: ignore[dict-item]
        content = {
            "where": row.chat.where,
            "messages": list(row.chat.messages),
            "reference": row.reference,
            "systems": systems,
        }
        lines.append(json.dumps(content, ensure_ascii=False))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
