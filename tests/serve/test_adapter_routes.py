"""Adapters over HTTP: scales, compositions, bad ones among good, loading and unloading."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from tiny_models import write_random_adapter, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.errors import AdapterError, ConfigError
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

MESSAGES = [{"role": "user", "content": "Order 4711 arrived broken"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, good and bad adapters, and adapters elsewhere."""
    folder = tmp_path_factory.mktemp("routes")
    base = write_tiny_model(folder / "tiny")
    kinds: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"r": 2},
        "bias": {"bias": "lora_only"},
        "dora": {"use_dora": True},
    }
    for number, (name, kind) in enumerate(kinds.items()):
        write_random_adapter(folder / "adapters" / name, base, seed=number, **kind)
    for number in range(2):
        write_random_adapter(folder / "elsewhere" / f"e{number}", base, seed=10 + number)
    cut = Path(shutil.copytree(folder / "adapters" / "one", folder / "adapters" / "cut"))
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    diverged = Path(shutil.copytree(folder / "adapters" / "one", folder / "adapters" / "nan"))
    tensors = load_file(diverged / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, diverged / "adapter_model.safetensors")
    return folder


def _settings(folder: Path, **more: Any) -> ServeSettings:
    return ServeSettings(
        base=str(folder / "tiny"), adapters_dir=folder / "adapters", dtype="float32", **more
    )


@pytest.fixture(scope="module")
def client(folder) -> Iterator[TestClient]:
    # Not watched: what happens is what the tests do.
    settings = _settings(folder, adapter_root=[folder / "elsewhere"], adapters_poll=0)
    with TestClient(create_app(build_service(settings))) as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder) -> Any:
    """What `generate` alone answers with PEFT: adapters with weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def answer(**weights: float) -> str:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype="float32")
        for number, name in enumerate(weights):
            path = next(folder.glob(f"*/{name}"))
            if number == 0:
                model = PeftModel.from_pretrained(model, path, name)
            else:
                model.load_adapter(path, name)
        if weights:
            model.base_model.set_adapter(list(weights))
        for module in model.modules():
            if hasattr(module, "set_scale"):
                for name, weight in weights.items():
                    module.set_scale(name, weight)
        new = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def _ask(client: TestClient, **body: Any) -> Any:
    fields = {"messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    return client.post("/v1/chat/completions", json=fields | body)


def _text(client: TestClient, **body: Any) -> str:
    answer = _ask(client, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def _error(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_scales_and_compositions_answer_as_in_peft(client, expected) -> None:
    texts = {
        "one": (_text(client, adapter="one"), expected(one=1)),
        "half": (_text(client, adapter="one", adapter_scale=0.5), expected(one=0.5)),
        "by model": (_text(client, model="one", adapter_scale=0.5), expected(one=0.5)),
        "dora": (_text(client, adapter="dora", adapter_scale=0.5), expected(dora=0.5)),
        "sum": (
            _text(client, adapter=[{"name": "two", "weight": -0.7}, {"name": "one"}]),
            expected(two=-0.7, one=1),
        ),
        "list of one": (_text(client, adapter=[{"name": "one", "weight": 0.5}]), expected(one=0.5)),
    }
    for name, (found, wanted) in texts.items():
        assert found == wanted, name
    assert len({found for found, _ in texts.values()}) == 4
    answer = _ask(client, adapter=[{"name": "two"}, {"name": "one"}]).json()
    assert answer["model"] == "two+one"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"adapter": [{"name": "one"}, {"name": "nobody"}]}, 404, "known here: bias, cut, dora"),
        ({"adapter": []}, 400, "at least 1 item"),
        ({"adapter": [{"name": "one"}, {"name": "one"}]}, 400, "'one' is listed twice"),
        ({"adapter": [{"name": "one", "scale": 2}]}, 400, "this field is not supported"),
        ({"adapter": [{"name": "one", "weight": 11}]}, 400, "less than or equal to 10"),
        ({"adapter": [{"name": "one"}, {"name": "base"}]}, 400, "'base' is the base"),
        ({"adapter": [{"name": "one"}, {"name": "dora"}]}, 400, "it has DoRA"),
        ({"adapter": [{"name": "bias"}, {"name": "one"}]}, 400, "trained biases (bias=lora_only)"),
        ({"adapter": "bias", "adapter_scale": 2}, 400, "'bias' cannot be scaled by 2"),
        ({"adapter": "one", "adapter_scale": -11}, 400, "greater than or equal to -10"),
        ({"adapter_scale": 2}, 400, "the base has nothing to scale"),
        ({"adapter": "base", "adapter_scale": 2}, 400, "the base has nothing to scale"),
        ({"adapter": [{"name": "one"}], "adapter_scale": 2}, 400, "give weights in the list"),
        ({"adapter": "cut"}, 422, "cut short"),
        ({"model": "nan"}, 422, "NaN"),
    ],
)
def test_what_cannot_be_applied_is_refused(client, body, status, said) -> None:
    assert said in _error(_ask(client, **body), status)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_scale_must_be_finite(client, number) -> None:
    body = json.dumps({"messages": MESSAGES, "adapter": "one", "adapter_scale": 0})
    content = body.replace('"adapter_scale": 0', f'"adapter_scale": {number}')
    answer = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400


def test_bad_adapters_are_listed_with_the_reason_and_the_others_served(client) -> None:
    found = client.get("/v1/adapters").json()
    cards = {card["id"]: card for card in found["data"]}
    states = {name: card["state"] for name, card in cards.items()}
    assert states == {
        "bias": "ready", "cut": "failed", "dora": "ready", "nan": "failed", "one": "ready",
        "two": "ready",
    }  # fmt: skip
    assert "cut short" in cards["cut"]["reason"]
    assert "NaN" in cards["nan"]["reason"]
    one = cards["one"]
    assert one["identity"].startswith("sha256:")
    assert (one["kind"], one["rank"], one["tier"]) == ("LoRA", "4", "device")
    assert one["requests_in_flight"] == 0
    assert not one["pinned"]
    assert one["size_bytes"] > 0
    assert found["memory"]["device_bytes"] >= sum(
        card["size_bytes"] for card in cards.values() if card["tier"] == "device"
    )
    listed = {card["id"] for card in client.get("/v1/models").json()["data"]}
    assert listed == {"tiny", "one", "two", "bias", "dora"}


def test_loading_replacing_and_unloading(client, folder, expected) -> None:
    path = str(folder / "elsewhere" / "e0")
    card = client.post("/v1/adapters", json={"name": "new", "path": path, "pin": True}).json()
    assert card["state"] in ("ready", "loading")
    assert card["pinned"]
    assert _text(client, adapter="new") == expected(e0=1)
    path = str(folder / "elsewhere" / "e1")
    again = client.post("/v1/adapters", json={"name": "new", "path": path}).json()
    assert again["identity"] != card["identity"]
    assert again["pinned"], "a pin belongs to the name"
    assert _text(client, adapter="new") == expected(e1=1)
    assert client.delete("/v1/adapters/new").json()["deleted"]
    assert "'new'" in _error(_ask(client, adapter="new"), 404)
    assert "'new'" in _error(client.delete("/v1/adapters/new"), 404)
    # By name alone: the folder's own.
    assert client.delete("/v1/adapters/two").status_code == 200
    assert client.post("/v1/adapters", json={"name": "two"}).status_code == 200
    assert _text(client, adapter="two") == expected(two=1)


def test_a_default_scale_is_for_requests_that_give_none(client, expected) -> None:
    assert client.patch("/v1/adapters/one", json={"default_scale": 0.5}).status_code == 200
    assert client.get("/v1/adapters/one").json()["default_scale"] == 0.5
    assert _text(client, adapter="one") == expected(one=0.5)
    assert _text(client, adapter="one", adapter_scale=1) == expected(one=1)
    client.patch("/v1/adapters/one", json={"default_scale": 1, "pin": True})
    assert client.get("/v1/adapters/one").json()["pinned"]
    client.patch("/v1/adapters/one", json={"pin": False})
    assert _text(client, adapter="one") == expected(one=1)
    refused = client.patch("/v1/adapters/bias", json={"default_scale": 2})
    assert "cannot be scaled" in _error(refused, 400)
    assert "cut short" in _error(client.patch("/v1/adapters/cut", json={"pin": True}), 422)


def test_vllms_routes(client, folder, expected) -> None:
    body = {"lora_name": "vllm", "lora_path": str(folder / "elsewhere" / "e0")}
    answer = client.post("/v1/load_lora_adapter", json=body)
    assert answer.text == "Success: LoRA adapter 'vllm' added successfully."
    assert _text(client, model="vllm") == expected(e0=1)
    again = client.post("/v1/load_lora_adapter", json=body)
    assert "has already been loaded" in _error(again, 400)
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": "vllm"})
    assert answer.text == "Success: LoRA adapter 'vllm' removed successfully."
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "vllm"})
    assert "'vllm'" in _error(gone, 404)


def test_only_allowed_folders_are_read(client, folder, tmp_path) -> None:
    def load(path: Path | str, name: str = "x") -> Any:
        return client.post("/v1/adapters", json={"name": name, "path": str(path)})

    outside = shutil.copytree(folder / "elsewhere" / "e0", tmp_path / "outside")
    assert "is outside the folders" in _error(load(outside), 403)
    assert "is outside" in _error(load(folder / "elsewhere" / ".." / ".." / "etc"), 403)
    (folder / "elsewhere" / "link").symlink_to(outside)
    assert "is outside" in _error(load(folder / "elsewhere" / "link"), 403)
    vllm = {"lora_name": "x", "lora_path": str(outside)}
    assert "is outside" in _error(client.post("/v1/load_lora_adapter", json=vllm), 403)
    assert "no such directory" in _error(load(folder / "elsewhere" / "none"), 422)
    assert "cannot name an adapter" in _error(load(folder / "elsewhere" / "e0", "a/b"), 400)
    assert "means the base" in _error(load(folder / "elsewhere" / "e0", "tiny"), 400)
    assert "cut short" in _error(load(folder / "adapters" / "cut", "one"), 422)
    assert client.get("/v1/adapters/one").json()["state"] == "ready", "the older one stays"


def test_nothing_is_loaded_at_run_time_unless_a_folder_is_allowed(folder) -> None:
    settings = ServeSettings(
        base=str(folder / "tiny"), adapter={"one": folder / "adapters" / "one"}, dtype="float32"
    )
    with TestClient(create_app(build_service(settings))) as client:
        path = str(folder / "adapters" / "two")
        said = _error(client.post("/v1/adapters", json={"name": "two", "path": path}), 403)
        assert "start it with --adapter-root" in said
        assert "give the adapter's directory" in _error(
            client.post("/v1/adapters", json={"name": "two"}), 400
        )
        assert client.get("/v1/adapters/one").json()["state"] == "ready"


def test_strict_refuses_to_start(folder) -> None:
    with pytest.raises(AdapterError, match="cut short"):
        build_service(_settings(folder, strict=True))


def test_strict_also_refuses_what_only_the_weights_show(folder, tmp_path) -> None:
    shutil.copytree(folder / "adapters" / "nan", tmp_path / "adapters" / "nan")
    settings = _settings(folder, strict=True).model_copy(
        update={"adapters_dir": tmp_path / "adapters"}
    )
    with pytest.raises(AdapterError, match=r"NaN .*--strict: 1 cannot be used"):
        build_service(settings)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"pin": ["nobody"]}, "--pin nobody: no adapter has that name; known here: bias, cut"),
        ({"adapter_root": ["/nowhere/at/all"]}, "--adapter-root /nowhere/at/all: no such folder"),
        ({"adapter": {"tiny": "x"}}, "means the base"),
    ],
)
def test_bad_flags_stop_the_start(folder, more, said) -> None:
    with pytest.raises(ConfigError, match=said):
        build_service(_settings(folder, **more))


def test_more_registered_than_fit_are_served_all_the_same(folder, expected) -> None:
    """Room for one of two, and too little for a third."""
    settings = _settings(folder, adapter_memory="60KB", adapter_host_memory="0", adapters_poll=0)
    with TestClient(create_app(build_service(settings))) as client:
        for name in ("one", "two", "one", "two"):
            assert _text(client, adapter=name) == expected(**{name: 1})
        found = client.get("/v1/adapters").json()
        tiers = {card["id"]: card["tier"] for card in found["data"]}
        assert (tiers["one"], tiers["two"]) == ("disk", "device")
        assert 0 < found["memory"]["device_bytes"] <= 60_000
        assert found["memory"]["host_bytes"] == 0
        page = client.get("/metrics").text
        moves = {
            (sample.name, sample.labels["adapter"]): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name.startswith("qlora_serve_adapter_") and sample.labels
        }
        for name in ("one", "two"):
            assert moves["qlora_serve_adapter_loads_total", name] >= 2
            assert moves["qlora_serve_adapter_evictions_total", name] >= 1
        assert "qlora_serve_kv_usage_ratio " in page
        said = _error(_ask(client, adapter="dora"), 422)
        assert "bytes on the device, and --adapter-memory gives 60000" in said
