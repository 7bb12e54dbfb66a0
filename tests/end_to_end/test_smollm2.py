"""The main job on a real model: train two adapters, serve them beside their base, merge one."""

import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from mixed_batch import give_blocks
from peft import PeftModel
from server_process import running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.base.load import load_base
from qlora_serve.base.source import prepared_path
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, GenerationRequest, Sampling, Sequence
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Chunk, Limits

ROOT = Path(__file__).parents[2]
STEPS = 6  # enough that the answers differ from the base's
TOLERANCE = 1e-4  # float32
RECIPES = {"tagging": "tagging-lora.yaml", "tickets": "tickets-qlora.yaml"}


@pytest.fixture(scope="module", autouse=True)
def both_cores() -> Iterator[None]:
    """Undoes the one thread of the tests on tiny models, here and in the processes started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS")
        yield
    torch.set_num_threads(threads)


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """A command in the checkout, which must succeed."""
    command = [sys.executable, "-m", "qlora_serve.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def base(both_cores) -> Path:
    run("base", "prepare", "smollm2")  # reuses what an earlier run prepared
    return prepared_path("smollm2")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    """One LoRA and one QLoRA adapter, a few steps each."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, recipe in RECIPES.items():
        run(
            "train", "--config", f"examples/recipes/{recipe}", "--max-steps", str(STEPS),
            "--output", folder / name,
        )  # fmt: skip
    return {name: folder / name for name in RECIPES}


def _rows(task: str, count: int) -> list[list[dict]]:
    lines = (ROOT / f"examples/data/{task}.heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:count]]


@pytest.fixture(scope="module")
def alone(base, adapters) -> dict[str | None, torch.nn.Module]:
    """The oracle: the base by transformers, and each adapter alone by PEFT."""

    def plain() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    peft = {name: PeftModel.from_pretrained(plain(), path) for name, path in adapters.items()}
    return {None: plain().eval()} | {name: model.eval() for name, model in peft.items()}


@torch.inference_mode()
def test_a_mixed_batch_equals_each_alone_in_logits_and_text(base, adapters, alone) -> None:
    runner = Runner(load_base(str(base), dtype="float32"))
    registry = AdapterRegistry(runner)
    residents = {name: registry.load(name, path) for name, path in adapters.items()}
    tokenizer = runner.base.tokenizer
    prompts = []
    for task in RECIPES:
        for messages in _rows(task, 2):
            text = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
            prompts += [(who, encode_text(tokenizer, text)) for who in (None, *RECIPES)]

    expected = []
    for who, prompt in prompts:
        model = alone[who]
        out = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=16, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        expected.append((out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)))

    sequences = [
        Sequence(
            GenerationRequest(str(n), tuple(prompt), Sampling(16, 0.0), residents.get(who)),
            deliver=lambda event: None,
        )
        for n, (who, prompt) in enumerate(prompts)
    ]
    largest = 0.0
    give_blocks(runner, sequences, 16)
    chunks = [Chunk(s, 0, s.length) for s in sequences]
    for step in range(16):
        for chunk, logits in zip(chunks, runner.forward(chunks), strict=True):
            tokens, wanted = expected[int(chunk.sequence.request.request_id)]
            largest = max(largest, (logits - wanted[step]).abs().max().item())
            chunk.sequence.generated.append(tokens[step])
        running = [
            s for s in sequences if len(s.generated) < len(expected[int(s.request.request_id)][0])
        ]
        chunks = [Chunk(s, s.length - 1, 1) for s in running]
        if not chunks:
            break
    assert largest < TOLERANCE

    engine = Engine(runner, Limits(5, 4000, 64, 1000))  # fewer places than requests
    engine.start()
    inboxes = []
    for n, (who, prompt) in enumerate(prompts):
        inboxes.append(queue.SimpleQueue())
        request = GenerationRequest(str(n), tuple(prompt), Sampling(16, 0.0), residents.get(who))
        engine.submit(request, inboxes[-1].put)
    texts = []
    for inbox in inboxes:
        text = ""
        while isinstance(event := inbox.get(timeout=300), Delta):
            text += event.text
        texts.append(text)
    engine.stop()
    wanted_texts = [tokenizer.decode(t, skip_special_tokens=True) for t, _ in expected]
    assert texts == wanted_texts
    assert len(set(texts[:3])) == 3, "base and adapters must differ for this to mean anything"


def test_the_openai_client_gets_each_adapters_answer(base, adapters, alone) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = _rows("tickets", 1)[0][:-1]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    arguments = [item for name in adapters for item in ("--adapter", f"{name}={adapters[name]}")]
    with running_server("smollm2", *arguments) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        for who, model in alone.items():
            out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
            wanted = tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            answer = client.chat.completions.create(
                model="smollm2", messages=messages, temperature=0, max_tokens=20,
                extra_body={"adapter": who} if who else {},
            )  # fmt: skip
            assert answer.choices[0].message.content == wanted
            assert answer.model == (who or "smollm2")


def test_the_merged_model_answers_as_the_adapter(base, adapters, alone, tmp_path) -> None:
    """The adapter that was trained on NF4 is merged into the float32 base, and says so."""
    merged = tmp_path / "merged"
    done = run("merge", adapters["tickets"], "--output", merged, "--no-compare-quantized", "--json")
    report = json.loads(done.stdout)
    assert report == json.loads((merged / "merge_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for messages in _rows("tickets", 2):
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            logits = (model(**prompt).logits - alone["tickets"](**prompt).logits).abs().max()
        assert logits.item() < TOLERANCE
        texts = [
            m.generate(**prompt, max_new_tokens=24, do_sample=False)[0].tolist()
            for m in (model, alone["tickets"])
        ]
        assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_reaches_its_scores_and_runs_again(base) -> None:
    """`make demo`'s script, from nothing and then with what the first run left."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores = {
            (task, who): (int(well), int(content))
            for task, who, well, content in re.findall(
                r"│ (\w+) +│ (\w+) +│ +(\d+)% │ +(\d+)% │ +\d+% │", done.stdout
            )
        }
        assert scores["tagging", "base"][0] < 10
        assert scores["tickets", "base"][0] < 10
        for task, chance in (("tagging", 20), ("tickets", 36)):
            well_formed, content = scores[task, task]
            assert well_formed > 80
            assert content > chance + 30
        same, of = re.findall(r"own answer to (\d+) of (\d+) questions", done.stdout)[0]
        assert same == of
    assert "from an earlier run" in done.stdout
