"""Code that comes with a base runs only when that was asked for."""

import json
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tiny_models import write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import BaseModelError
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def base(tmp_path) -> Path:
    base = write_tiny_model(tmp_path / "own")
    (base / "modeling_own.py").write_text(_CODE.format(mark=str(tmp_path / "ran")))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_a_bases_own_code_is_refused_unless_it_is_trusted(base, tmp_path) -> None:
    with pytest.raises(BaseModelError, match="trust"):
        load_base(str(base))
    with pytest.raises(BaseModelError, match="trust"):
        build_service(ServeSettings(base=str(base)))
    assert not (tmp_path / "ran").exists()
    settings = ServeSettings(base=str(base), trust_remote_code=True, dtype="float32")
    with TestClient(create_app(build_service(settings))) as client:
        body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "logprobs": 1}
        answer = client.post("/v1/completions", json=body).json()
    assert (tmp_path / "ran").exists()
    plain = load_base(str(write_tiny_model(tmp_path / "plain")), dtype="float32")
    prompt = plain.tokenizer("hello", return_tensors="pt").input_ids
    with torch.no_grad():
        first = plain.model(prompt).logits[0, -1].log_softmax(-1)
    assert answer["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(
        float(first.max()), abs=1e-4
    )
