"""Several adapters into one, and one into a smaller one: by hand, and beside PEFT."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest
from qlora_serve.adapters.weights import LoraPair, load_weights
from qlora_serve.base.source import locate_base
from qlora_serve.cli.main import app
from qlora_serve.cli.new_adapter import show
from qlora_serve.errors import ConfigError, MergeError
from qlora_serve.merge.combine import _combine, combine_adapters, fold_adapter
from qlora_serve.merge.config import CombineSettings, FoldSettings
from tests.tiny_models import write_random_adapter

# Two updates of a 2 x 2 matrix: 2 * [3, 4]' [1, 0] and 1 * [0, -1]' [2, 5].
ONE = LoraPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [4.0]]), 2.0)
TWO = LoraPair(torch.tensor([[2.0, 5.0]]), torch.tensor([[0.0], [-1.0]]), 1.0)
PARTS = [(ONE, 0.5), (TWO, 3.0)]


def by_hand(method: str, rank: int = 2, density: float | None = None) -> torch.Tensor:
    settings = CombineSettings(
        adapters=("a", "b"), output=Path("o"), method=method, density=density
    )
    pair, _ = _combine(PARTS, settings, rank, "layer")
    assert pair.scaling == 1.0
    return pair.b @ pair.a


def test_cat_and_svd_are_the_weighted_sum():
    # 0.5 * 2 * [[3, 0], [4, 0]] + 3 * [[0, 0], [-2, -5]]
    expected = torch.tensor([[3.0, 0.0], [-2.0, -15.0]])
    assert by_hand("cat").equal(expected)
    torch.testing.assert_close(by_hand("svd"), expected)
    torch.testing.assert_close(by_hand("ties_svd", density=1.0), by_hand("ties_svd", density=1.0))


def test_svd_of_rank_1_keeps_the_largest_direction():
    full = torch.tensor([[3.0, 0.0], [-2.0, -15.0]])
    u, s, vh = torch.linalg.svd(full)
    torch.testing.assert_close(by_hand("svd", rank=1), s[0] * torch.outer(u[:, 0], vh[0]))


def test_linear_mixes_the_factors():
    # A: sqrt(1) [1, 0] + sqrt(3) [2, 5]; B: sqrt(1) [3, 4]' + sqrt(3) [0, -1]'
    root = 3.0**0.5
    a = torch.tensor([[1 + 2 * root, 5 * root]])
    b = torch.tensor([[3.0], [4 - root]])
    torch.testing.assert_close(by_hand("linear"), b @ a)


def test_ties_elects_signs_on_the_whole_update():
    # The updates: [[6, 0], [8, 0]] and [[0, 0], [-2, -5]]. Half of the values stays: the two
    # largest of each, [[6, 0], [8, 0]] and [[0, 0], [-2, -5]]. Signs of the sums: + + + -.
    # At the lower left -2 loses against 8; each place is the weighted mean of those that agree.
    merged = by_hand("ties_svd", density=0.5)
    torch.testing.assert_close(merged, torch.tensor([[3.0, 0.0], [4.0, -15.0]]), atol=1e-5, rtol=0)


def test_dare_drops_and_rescales():
    torch.manual_seed(3)
    merged = by_hand("dare_linear_svd", density=0.5)
    # Each value of an update is dropped or doubled, so each place is one of a few sums.
    choices = {(0, 0): {0.0, 6.0}, (0, 1): {0.0}, (1, 1): {0.0, -30.0}}
    choices[1, 0] = {0.0, 8.0, -12.0, -4.0}
    for (row, column), values in choices.items():
        assert min(abs(float(merged[row, column]) - value) for value in values) < 1e-4


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    weights = load_weights(read_adapter(adapter), FitChecker(locate_base(str(base))))
    return {
        path: pair.scaling * (pair.b.float() @ pair.a.float())
        for path, pair in weights.modules.items()
    }


@pytest.fixture
def two(tiny, tmp_path):
    one = write_random_adapter(tmp_path / "one", tiny("llama"), seed=1, use_rslora=True)
    other = write_random_adapter(
        tmp_path / "two", tiny("llama"), seed=2, target_modules=["q_proj", "v_proj"], lora_alpha=3
    )
    return one, other


@pytest.mark.parametrize(
    ("method", "density"),
    [
        ("linear", None),
        ("cat", None),
        ("svd", None),
        ("ties", 0.4),
        ("ties_svd", 0.4),
        ("dare_linear", 1.0),
        ("dare_ties", 1.0),
        ("dare_linear_svd", 1.0),
    ],
)
def test_equals_peft(tiny, two, tmp_path, method, density):
    settings = CombineSettings(
        adapters=(f"{two[0]}=0.7", f"{two[1]}=-0.4"),
        output=tmp_path / "out",
        method=method,
        density=density,
    )
    report = combine_adapters(settings)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, two[0], adapter_name="one")
    peft_model.load_adapter(two[1], adapter_name="two")
    # PEFT leaves the first adapter's use_rslora on, with which its own result is scaled wrongly.
    peft_model.peft_config["one"].use_rslora = False
    peft_model.add_weighted_adapter(
        ["one", "two"], [0.7, -0.4], "both", combination_type=method, density=density
    )
    got = deltas(tiny("llama"), tmp_path / "out")
    checked = 0
    for path, delta in got.items():
        layer = peft_model.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(delta, layer.get_delta_weight("both"), atol=1e-5, rtol=1e-4)
        checked += 1
    assert checked == 3 * 7 == len(report.ranks)


def test_dare_is_the_same_for_the_same_seed(two, tmp_path):
    identities = []
    for index, seed in enumerate((5, 5, 6)):
        settings = CombineSettings(
            adapters=tuple(map(str, two)),
            output=tmp_path / f"out-{index}",
            method="dare_linear",
            density=0.5,
            seed=seed,
        )
        identities.append(combine_adapters(settings).identity)
    assert identities[0] == identities[1] != identities[2]


def combine_refused(words: str, kind: type[Exception], output: Path, **settings: object) -> None:
    with pytest.raises(kind, match=words):
        combine_adapters(CombineSettings.model_validate({"output": output} | settings))
    assert not output.exists()


def test_refusals(tiny, two, tmp_path):
    out, pair = tmp_path / "out", tuple(map(str, two))
    combine_refused("needs --density", ConfigError, out, adapters=pair, method="ties")
    combine_refused("keeps all", ConfigError, out, adapters=pair, density=0.5)
    combine_refused("svd methods", ConfigError, out, adapters=pair, rank=3)
    combine_refused("DIR=WEIGHT", ConfigError, out, adapters=(pair[0], f"{pair[1]}=much"))
    dora = write_random_adapter(tmp_path / "dora", tiny("llama"), use_dora=True)
    combine_refused("DoRA", MergeError, out, adapters=(pair[0], str(dora)))
    wide = write_random_adapter(tmp_path / "wide", tiny("llama"), r=8)
    combine_refused(
        "adapters of one rank", MergeError, out, adapters=(pair[0], str(wide)), method="linear"
    )
    recorded = {"quantization": "none", "dtype": "float32", "unquantized": None}
    for index, folder in enumerate(two):
        base = ManifestBase(name=str(tiny("llama")), fingerprint=f"sha256:{index}", **recorded)
        write_manifest(folder, Manifest(base=base))
    combine_refused("different weights", MergeError, out, adapters=pair)


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "head"])
def test_fold_shows_the_error_that_it_makes(tiny, tmp_path, kind):
    settings = {
        "lora": {},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    base = tiny("llama-untied")
    adapter = write_random_adapter(tmp_path / "adapter", base, r=6, **settings)
    report = fold_adapter(FoldSettings(adapter=adapter, output=tmp_path / "out", rank=2))
    before, after = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert set(report.ranks.values()) == {2}
    lost = total = 0.0
    for path, exact in before.items():
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        best = u[:, :2] @ s[:2].diag() @ vh[:2]
        torch.testing.assert_close(after[path], best, atol=1e-4, rtol=1e-3)
        error = float((after[path] - exact).norm() / exact.norm())
        assert report.errors[path] == pytest.approx(error, rel=1e-3)
        lost, total = lost + float((after[path] - exact).norm()) ** 2, total + float(s.norm()) ** 2
    assert report.kept_energy == pytest.approx(1 - lost / total, rel=1e-3)
    one, other = (read_adapter(folder).tensors for folder in (adapter, tmp_path / "out"))
    assert one.keys() == other.keys()


def test_fold_by_energy_and_its_refusals(tiny, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"), r=6)
    report = fold_adapter(FoldSettings(adapter=adapter, output=tmp_path / "out", energy=0.8))
    assert all(error**2 <= 0.2 + 1e-6 for error in report.errors.values())
    assert 0.8 <= report.kept_energy < 1
    assert max(report.ranks.values()) <= 6
    assert min(report.ranks.values()) < 6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    )
    for wrong, words in (
        ({}, "one of --rank"),
        ({"rank": 2, "energy": 0.5}, "one of --rank"),
        ({"rank": 6}, "would not make it smaller"),
    ):
        with pytest.raises(ConfigError, match=words):
            fold_adapter(FoldSettings(adapter=adapter, output=tmp_path / "no", **wrong))


def test_commands(two, tmp_path):
    both, small = tmp_path / "both", tmp_path / "small"
    call = ["combine", f"{two[0]}=0.5", str(two[1]), "--method", "svd", "--rank", "4"]
    done = CliRunner().invoke(app, [*call, "--output", str(both), "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["ranks"].values()) == {4}
    done = CliRunner().invoke(app, ["fold", str(both), "--rank", "2", "--output", str(small)])
    assert done.exit_code == 0, done.output
    assert "kept energy" in done.stdout


def test_modules_are_shown_in_the_order_of_their_layers(capsys):
    errors = {f"layers.{layer}.q_proj": 0.1 for layer in ("0", "10", "2")}
    report = SimpleNamespace(
        output="out", errors=errors, ranks=dict.fromkeys(errors, 2), error=0.1, kept_energy=0.99
    )
    show(report, as_json=False)
    shown = "".join(capsys.readouterr())
    places = [shown.index(f"layers.{layer}.q_proj") for layer in (0, 2, 10)]
    assert places == sorted(places)
