"""`qlora-serve adapters`: what it prints, and how it exits."""

import json

import pytest
from typer.testing import CliRunner

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.source import locate_base
from qlora_serve.cli.adapters import app
from qlora_serve.cli.main import main
from tests.tiny_models import write_random_adapter, write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def folder(base, tmp_path):
    adapters = tmp_path / "adapters"
    write_random_adapter(adapters / "plain", base)
    write_random_adapter(adapters / "dora", base, use_dora=True, rank_pattern={"q_proj": 8})
    return adapters


def record(adapter, base, mark=None):
    recorded = ManifestBase(
        name=str(base),
        fingerprint=mark or fingerprint(locate_base(str(base))),
        quantization="none",
        dtype="float32",
        unquantized=str(base),
    )
    manifest = Manifest(base=recorded, recipe={"rank": 4}, metrics={"final_loss": 1 / 3})
    write_manifest(adapter, manifest)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_main(capsys, monkeypatch, *arguments):
    """Runs the real entry point; returns its exit code, stdout and stderr."""
    capsys.readouterr()  # what making the models printed
    monkeypatch.setattr("sys.argv", ["qlora-serve", "adapters", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_list_shows_all_and_names_the_broken(folder):
    (folder / "torn").mkdir()
    (folder / "torn" / "adapter_config.json").write_text("{")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "adapter_model.bin").write_text("x")
    (folder / ".staging").mkdir()
    (folder / "notes").mkdir()
    rows = {row["name"]: row for row in json.loads(run("list", folder, "--json"))}
    assert rows.keys() == {"plain", "dora", "torn", "pickled"}
    assert (rows["plain"]["kind"], rows["plain"]["rank"]) == ("LoRA", "4")
    assert (rows["dora"]["kind"], rows["dora"]["rank"]) == ("DoRA", "4-8")
    assert "q_proj" in rows["plain"]["target_modules"]
    assert "cannot be read" in rows["torn"]["error"]
    text = run("list", folder)
    assert "broken: " in text
    assert all(name in text for name in rows)


def test_list_of_nothing(tmp_path, capsys, monkeypatch):
    assert "no adapters in" in run("list", tmp_path)
    assert run("list", tmp_path, "--json").strip() == "[]"
    code, _, error = run_main(capsys, monkeypatch, "list", tmp_path / "none")
    assert code == 1
    assert error.startswith("error: no folder of adapters at")


def test_show_has_the_training(folder, base):
    plain = folder / "plain"
    assert "made elsewhere" in run("show", plain)
    record(plain, base)
    shown = json.loads(run("show", plain, "--json"))
    assert shown["training"]["metrics"] == {"final_loss": 1 / 3}
    adapter = read_adapter(plain)
    assert shown["tensors"] == len(adapter.tensors)
    assert shown["parameters"] == sum(t.numel() for t in adapter.load_tensors().values())
    text = run("show", plain)
    assert "final loss  0.333333\n" in text
    assert shown["identity"] in text


def test_check_passes_with_norms_of_each_layer(folder, base):
    record(folder / "plain", base)
    result = json.loads(run("check", folder / "plain", "--json"))
    assert result["ok"]
    assert result["warnings"] == []
    tensors = read_adapter(folder / "plain").load_tensors()
    square = 0.0
    for name, a in tensors.items():
        if "layers.1." in name and "lora_A" in name:
            product = 2.0 * tensors[name.replace("lora_A", "lora_B")] @ a  # alpha 8, rank 4
            square += float(product.norm()) ** 2
    assert result["layer_norms"]["1"] == pytest.approx(square**0.5, rel=1e-5)
    assert run("check", folder / "plain").splitlines()[-1].startswith("ok: ")


def test_check_warns_of_a_dead_adapter_and_of_other_weights(folder, base):
    from safetensors.torch import save_file

    plain = folder / "plain"
    record(plain, base, mark="sha256:0")
    tensors = read_adapter(plain).load_tensors()
    dead = {name: tensor * 0 for name, tensor in tensors.items()}
    save_file(dead, plain / "adapter_model.safetensors")
    warnings = json.loads(run("check", plain, "--json"))["warnings"]
    assert len(warnings) == 2
    assert "exactly as the base" in warnings[0]
    assert "was trained on" in warnings[1]


def test_check_that_fails_exits_1_with_one_line(folder, tmp_path, capsys, monkeypatch):
    other = write_tiny_model(tmp_path / "phi", "phi")
    call = ("check", folder / "plain", "--base", other)
    code, out, error = run_main(capsys, monkeypatch, *call)
    assert code == 1
    assert out == ""
    assert error.startswith("error: ")
    assert "does not fit" in error
    assert error.count("\n") == 1
    code, out, error = run_main(capsys, monkeypatch, *call, "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["ok"] is False
    assert f"error: {answer['error']}\n" == error


def test_check_without_its_base_says_what_to_pass(folder, base, capsys, monkeypatch):
    record(folder / "plain", base)
    manifest = folder / "plain" / "qlora_serve.json"
    manifest.write_text(manifest.read_text().replace(str(base), "/nowhere"))
    code, _, error = run_main(capsys, monkeypatch, "check", folder / "plain")
    assert code == 1
    assert "pass --base" in error
    warnings = json.loads(run("check", folder / "plain", "--base", base, "--json"))["warnings"]
    assert warnings == []


# ---- the store


def test_store_through_its_commands(folder, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = folder.rename(tmp_path / "runs")
    record(runs / "plain", base)
    store = tmp_path / "store"
    at = ("--adapters-dir", store)
    added = json.loads(run("add", "one", runs / "plain", *at, "--json"))
    identity = content_identity(read_adapter(runs / "plain"))
    assert added == {
        "name": "one",
        "path": str(store / "one"),
        "identity": identity,
        "replaced": False,
        "unchanged": False,
        "left_out": [],
    }
    code, _, error = run_main(capsys, monkeypatch, "add", "one", runs / "dora", *at)
    assert (code, error.count("\n")) == (1, 1)
    assert "pass --replace" in error
    assert "is already in" in run("add", "one", runs / "plain", *at)
    assert "replaced in" in run("add", "one", runs / "dora", *at, "--replace")
    run("add", "two", runs / "plain", *at)
    assert json.loads(run("rename", "two", "three", *at, "--json"))["identity"] == identity
    write_random_adapter(store / "hand", base)
    rows = {row["name"]: row for row in json.loads(run("list", *at, "--json"))}
    assert {name: row["managed"] for name, row in rows.items()} == {
        "hand": False,
        "one": True,
        "three": True,
    }
    assert rows["three"]["identity"] == identity
    assert rows["three"]["path"] == str(store / "three")
    text = run("list", store)
    assert all(word in text for word in ("unmanaged", "store", "7 modules", identity[7:19]))

    shown = json.loads(run("show", "three", *at, "--json"))
    assert (shown["name"], shown["identity"]) == ("three", identity)
    assert shown["training"]["recipe"] == {"rank": 4}
    assert json.loads(run("show", store / "three", "--json"))["identity"] == identity

    result = json.loads(run("check", "three", *at, "--compare", "one", "--json"))
    assert result["ok"]
    assert not result["comparison"]["identical"]
    assert result["comparison"]["layers"].keys() == {"0", "1", "2"}
    text = run("check", "three", *at, "--compare", runs / "plain")
    assert "are the same adapter" in text

    code, _, error = run_main(capsys, monkeypatch, "remove", "hand", *at)
    assert code == 1
    assert "only with --force" in error
    run("remove", "hand", *at, "--force")
    assert json.loads(run("remove", "three", *at, "--json")) == {"removed": "three"}
    code, _, error = run_main(capsys, monkeypatch, "show", "three", *at)
    assert code == 1
    assert "known here: one" in error
    # The plain adapter that "one" was before its replacement is the very same as "three" was.
    assert "nothing to delete" in run("clean", *at)
    assert "deleted the content of 1 adapter that has no name" in run("clean", *at, "--now")
    assert json.loads(run("clean", *at, "--now", "--json")) == {"removed_objects": 0}


def test_errors_of_a_stores_adapter_say_its_name(folder, base, tmp_path, capsys, monkeypatch):
    store = tmp_path / "store"
    run("add", "mine", folder / "plain", "--adapters-dir", store)
    other = write_tiny_model(tmp_path / "phi", "phi")
    for call in (("mine", "--adapters-dir", store), (store / "mine",)):
        code, _, error = run_main(capsys, monkeypatch, "check", *call, "--base", other)
        assert code == 1
        assert f"adapter {store / 'mine'}, trained on" in error
        assert ".objects" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("add", "base", "{plain}"), 1, "means the base model"),
        (("add", "../x", "{plain}"), 1, "cannot name an adapter"),
        (("add", "x", "{tmp}/none"), 1, "no adapter at"),
        (("add", "x", "{tmp}"), 1, "has no adapter_config.json"),
        (("add", "x", "{plain}", "--max-unpacked-size", "much"), 2, "--max-unpacked-size"),
        (("add", "x"), 2, "Missing argument"),
        (("list", "a", "--adapters-dir", "b"), 2, "not both"),
        (("remove", "x"), 1, "known here: none"),
        (("show", "x"), 1, "no such directory, nor a store at adapters"),
        (("clean",), 1, "no folder of adapters at adapters"),
        (("convert", "{plain}", "{tmp}/new"), 1, "nothing is to be converted"),
    ],
)
def test_exit_codes(folder, tmp_path, capsys, monkeypatch, arguments, code, words):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    filled = [a.format(plain=folder / "plain", tmp=tmp_path) for a in arguments]
    found, out, error = run_main(capsys, monkeypatch, *filled)
    assert (found, out) == (code, "")
    assert words in error


def test_a_directory_wins_over_a_name_unless_the_store_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("add", "dora", folder / "plain", "--adapters-dir", "store")
    (folder / "dora").rename(tmp_path / "dora")
    assert json.loads(run("show", "dora", "--json"))["kind"] == "DoRA"
    shown = json.loads(run("show", "dora", "--adapters-dir", "store", "--json"))
    assert shown["kind"] == "LoRA"
    (tmp_path / "link").symlink_to("dora")
    assert json.loads(run("show", "link", "--json"))["kind"] == "DoRA"


def test_conversion_names_what_it_made(folder, tmp_path):
    import torch

    plain = folder / "plain"
    before = read_adapter(plain)
    torch.save(before.load_tensors(), plain / "adapter_model.bin")
    identity = content_identity(before)
    (plain / "adapter_model.safetensors").unlink()
    made = json.loads(run("convert", plain, tmp_path / "new", "--json"))
    assert made["identity"] == identity
    assert made["left_out"] == []
