"""Names, local models, and what is said of the ones that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.hub import HubError, cache_folder, check_memory, resolve
from model.hub.cache import explained
from model.hub.memory import available_memory
from tests.model.hub.hub_files import write_folder, write_gguf

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADWATER_CACHE", str(folder))
    return folder


def said(name: object, **options: object) -> str:
    """The one line that a failing name gives."""
    with pytest.raises(HubError) as caught:
        resolve(str(name), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_importing_the_hub_imports_neither_torch_nor_the_server() -> None:
    code = "import sys, model.hub; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "model" in loaded
    assert not loaded & {"torch", "transformers", "server", "fastapi", "huggingface_hub", "gguf"}


# ------------------------------------------------------------------------------ local folders


def test_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    files = resolve(str(folder))
    assert files.name == "tiny"
    assert files.folder == folder
    assert files.weights == (folder / "model.safetensors",)
    assert files.format == "safetensors"
    assert files.config.hidden_size == 32
    assert files.chat_template == "{{ messages }}"
    assert files.num_parameters == 32
    assert resolve(str(folder)) == files


def test_the_fingerprint_is_of_config_and_weights_alone(tmp_path: Path) -> None:
    one = resolve(str(write_folder(tmp_path / "one")))
    same = resolve(str(write_folder(tmp_path / "two")))
    other_config = resolve(str(write_folder(tmp_path / "three", rope_theta=5000.0)))
    folder = write_folder(tmp_path / "four")
    save_file({"norm": np.ones(32, dtype=np.float32)}, folder / "model.safetensors")
    other_weights = resolve(str(folder))
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other_config.fingerprint, other_weights.fingerprint}) == 3


def test_unchanged_weights_are_not_read_again_and_changed_ones_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    before = resolve(str(folder))
    weights = folder / "model.safetensors"
    status = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert resolve(str(folder)).fingerprint == before.fingerprint
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert resolve(str(folder)).fingerprint != before.fingerprint


def test_an_edited_config_or_template_is_seen(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    before = resolve(str(folder))
    (folder / "chat_template.jinja").write_text("{{ new }}")
    assert resolve(str(folder)).chat_template == "{{ new }}"
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    (folder / "config.json").write_text((folder / "config.json").read_text())
    after = resolve(str(folder))
    assert after.config.eos_token_ids == (1, 7)
    assert after.fingerprint != before.fingerprint


def test_the_default_one_of_several_templates(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert resolve(str(folder)).chat_template == "d"


def test_shards_in_the_order_of_the_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        save_file({name: np.zeros(8, dtype=np.float32)}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": names[1], "a": names[0]}}))
    assert [path.name for path in resolve(str(folder)).weights] == names

    (folder / names[1]).unlink()
    assert f"missing: {names[1]}" in said(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "not a file beside it" in said(folder)
    index.write_text("{}")
    assert "no weight_map" in said(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / name).unlink()
    expected = "*.safetensors" if name == "model.safetensors" else name
    assert f"missing: {expected}" in said(folder)


def test_an_empty_folder_lacks_everything(tmp_path: Path) -> None:
    assert "config.json, tokenizer.json, *.safetensors" in said(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_not_read(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / name)
    message = said(folder)
    assert name in message and "convert it to safetensors" in message


def test_a_tokenizer_model_alone_is_explained(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "save it as a fast tokenizer" in said(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_cut_weights_are_noticed(tmp_path: Path, keep: int) -> None:
    folder = write_folder(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors is broken or cut off" in said(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").write_text(text, encoding="latin-1")
    assert "tokenizer.json is broken" in said(folder)
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json is broken" in said(folder)


def test_remote_code_and_other_families_are_refused(tmp_path: Path) -> None:
    remote = write_folder(tmp_path / "remote", auto_map={"AutoModel": "code.Model"})
    assert "auto_map" in said(remote)
    other = write_folder(tmp_path / "other", model_type="bloom", architectures=["BloomForCausalLM"])
    message = said(other)
    assert "other cannot be served" in message and "loom" in message


# -------------------------------------------------------------------------------- GGUF files


def test_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    files = resolve(str(path))
    assert (files.name, files.format, files.weights) == ("tiny", "gguf", (path,))
    assert files.folder.is_relative_to(cache)
    assert files.config.num_kv_heads == 2
    assert files.chat_template == "{{ messages }}"
    assert files.num_parameters == 32
    document = json.loads((files.folder / "tokenizer.json").read_text())
    assert len(document["model"]["vocab"]) + len(document["added_tokens"]) >= 259
    assert resolve(str(path)) == files


def test_converted_files_that_were_damaged_are_made_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    files = resolve(str(path))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"):
        good = (files.folder / name).read_bytes()
        (files.folder / name).write_bytes(b"")
        assert resolve(str(path)) == files
        if name != "manifest.json":
            assert (files.folder / name).read_bytes() == good
        (files.folder / name).unlink()
        assert resolve(str(path)) == files


def test_a_file_converted_by_other_code_is_converted_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    files = resolve(str(path))
    manifest = files.folder / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(good | {"converter": "older"}))
    assert resolve(str(path)) == files
    assert json.loads(manifest.read_text())["converter"] == good["converter"]


def test_cut_foreign_and_split_files(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for name, data in {"cut": whole[:-40], "half": whole[: len(whole) // 2], "empty": b""}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        assert f"{name}.gguf is broken or not a GGUF file" in said(path)
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    assert "not a model this program reads" in said(text)
    assert "give its folder" in said(write_folder(tmp_path / "st") / "model.safetensors")
    assert f"{tmp_path / 'cut.gguf'}" in said(tmp_path)  # a folder that has GGUF files


def test_a_foreign_architecture_or_tokenizer_in_a_gguf(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "a.gguf", general__architecture="bloom")
    assert "a.gguf cannot be served" in said(other) and "bloom" in said(other)
    odd = write_gguf(tmp_path / "b.gguf", tokenizer__ggml__pre="martian")
    assert "tokenizer of b.gguf" in said(odd) and "martian" in said(odd)


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "smollm2-135", "smolm2-135m"])
def test_a_misspelt_alias_is_guessed(name: str) -> None:
    assert "did you mean smollm2-135m" in said(name)


def test_a_misspelt_path_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "my-model.gguf")
    assert str(tmp_path / "my-model.gguf") in said(tmp_path / "my-modle.gguf")
    monkeypatch.chdir(tmp_path)
    assert "did you mean ./my-model.gguf" in said("my-modell.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "nonsense",
        "",
        "x" * 2000,
        "a\nb",
        "a\0b",
        "../../no-such-place",
        "org/../name",
        "org/..",
        "org/na--me",
        "org/name/more",
        "-org/name",
        "org/na me",
        "org\\name",
        "https://example.org/model",
    ],
)
def test_other_names_are_refused_with_what_is_possible(name: str) -> None:
    assert "a folder with safetensors, a .gguf file, or a hub repository" in said(name)


# ----------------------------------------------------------------------------- cache, memory


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HEADWATER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "headwater"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore these
    assert cache_folder().is_relative_to(Path.home())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "file" / "cache"))
    message = said(folder)
    assert "cannot be written" in message and "HEADWATER_CACHE" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the disk is full"), explained(tmp_path):
        Path("/dev/full").write_bytes(b"x")


def test_memory(tmp_path: Path) -> None:
    files = resolve(str(write_folder(tmp_path / "tiny")))
    check_memory(files, 0)
    with pytest.raises(HubError, match=r"needs 1024\.50 GiB .* and \d+\.\d\d GiB are available"):
        check_memory(files, 1 << 40, "float32")


def test_memory_inside_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert available_memory(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 500_000


def test_a_moved_folder_is_another_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one")
    files = resolve(str(folder))
    shutil.move(folder, tmp_path / "two")
    moved = resolve(str(tmp_path / "two"))
    assert (moved.name, moved.fingerprint) == ("two", files.fingerprint)
    assert "no file or folder" in said(folder)
