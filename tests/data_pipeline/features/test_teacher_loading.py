"""Teachers of every make compute what the whole model does; what cannot is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

from data_pipeline.core.errors import UserError
from data_pipeline.features import hidden_state
from data_pipeline.features.teacher_loading import load_teacher
from tests.data_pipeline.features.small_teachers import CONFIGS, LAYERS, POSITIONS, save_small, whole_features

REFUSED = {
    "bert": "not causal",
    "paligemma": "not causal",
    "t5": "has an encoder and a decoder",
    "clip": "cannot be run on text alone",
    "vit": "cannot give hidden state -3",
}
WINDOW_LENGTHS = [5, 1, 33, 12, 64, 2]
TOKENS_T = torch.randint(90, (sum(WINDOW_LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", sorted(CONFIGS.keys() - REFUSED.keys()))
def test_features_are_those_of_each_window_alone_in_the_whole_model(tmp_path: Path, make: str):
    path = save_small(make, tmp_path)
    expected_TF = whole_features(path, -3, TOKENS_T, WINDOW_LENGTHS)
    teacher = load_teacher(path)
    torch.testing.assert_close(teacher.features(TOKENS_T, WINDOW_LENGTHS), expected_TF, rtol=1e-5, atol=1e-5)
    assert teacher.state.num_layers < LAYERS
    assert teacher.max_positions == (None if make in ("mamba", "bloom") else POSITIONS)
    whole = load_teacher(path, whole=True)
    torch.testing.assert_close(whole.features(TOKENS_T, WINDOW_LENGTHS), expected_TF, rtol=1e-5, atol=1e-5)
    assert whole.fingerprint() == teacher.fingerprint()


@pytest.mark.parametrize("make", ["qwen3", "rwkv", "opt"])
@pytest.mark.parametrize("layer", [1, -1, 0])
def test_features_of_other_layers(tmp_path: Path, make: str, layer: int):
    path = save_small(make, tmp_path)
    expected_TF = whole_features(path, layer, TOKENS_T, WINDOW_LENGTHS)
    features_TF = load_teacher(path, layer).features(TOKENS_T, WINDOW_LENGTHS)
    torch.testing.assert_close(features_TF, expected_TF, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", sorted(REFUSED))
def test_what_is_no_causal_language_model_is_refused_in_one_line(tmp_path: Path, make: str):
    path = save_small(make, tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*{REFUSED[make]}.*take a causal language model$"):
        load_teacher(path)


def test_features_of_a_real_teacher(shared: Path):
    path = str(shared / "teachers" / "stories260K")
    window_lengths = [100, 7, 512, 30]
    tokens_T = torch.randint(3, 512, (sum(window_lengths),), generator=torch.Generator().manual_seed(1))
    expected_TF = whole_features(path, -3, tokens_T, window_lengths)
    torch.testing.assert_close(load_teacher(path).features(tokens_T, window_lengths), expected_TF, rtol=1e-4, atol=1e-4)


def test_only_what_is_used_is_held(tmp_path: Path):
    teacher = load_teacher(save_small("qwen3", tmp_path), layer=-3)
    names = [name for name, _ in teacher.model.named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1"}
    assert not [name for name in names if "lm_head" in name or name == "norm.weight"]


def test_a_cut_that_the_proof_refuses_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As if a module that put the state out once put out another one next time."""
    path = save_small("llama", tmp_path)
    find = hidden_state._find_source

    def find_a_wrong_one(model: LlamaModel, layer: int, vocab_size: int) -> tuple:
        return model.layers[0], find(model, layer, vocab_size)[1]

    monkeypatch.setattr(hidden_state, "_find_source", find_a_wrong_one)
    expected_TF = whole_features(path, -3, TOKENS_T, WINDOW_LENGTHS)
    torch.testing.assert_close(load_teacher(path).features(TOKENS_T, WINDOW_LENGTHS), expected_TF, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_out_of_range_is_refused(tmp_path: Path, layer: int):
    with pytest.raises(UserError, match=rf"it has 4 layers: layer must be in \[-5, 4\], found {layer}$"):
        load_teacher(save_small("llama", tmp_path), layer=layer)


@pytest.mark.parametrize("name", ["{}/nowhere", "./nowhere", "~/nowhere", "a/b/c"])
def test_what_looks_like_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="no such folder or file"):
        load_teacher(name.format(tmp_path))


def test_missing_weights_are_refused_where_they_are_used(tmp_path: Path):
    path = save_small("llama", tmp_path)
    change_config(tmp_path, num_hidden_layers=9)
    with pytest.raises(UserError, match=r"no weights for layers\.4\..* would be random"):
        load_teacher(path, layer=-1)
    torch.testing.assert_close(
        load_teacher(path, layer=4).features(TOKENS_T, WINDOW_LENGTHS),
        load_teacher(path, layer=4, whole=True).features(TOKENS_T, WINDOW_LENGTHS),
    )


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def damage_pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456789\n"
    (folder / "model.safetensors").write_text(text)


def damage_cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_html(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404</html>" * 100)


def damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def damage_shape(folder: Path) -> None:
    change_config(folder, hidden_size=64, head_dim=16)


def damage_quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def damage_gptq(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_kind(folder: Path) -> None:
    change_config(folder, model_type="no such model")


def damage_code(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit(3)")


def damage_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_pointer, r"model\.safetensors is a Git LFS pointer \(git lfs pull\) instead of the weights"),
        (damage_cut, "cannot load teacher .*check that the folder is complete"),
        (damage_html, "cannot load teacher .*check that the folder is complete"),
        (damage_pickle, "cannot load teacher .*check that the folder is complete"),
        (damage_shape, "cannot load teacher .*check that the folder is complete"),
        (damage_quantised, r"cannot load teacher .*its weights are quantised \(bitsandbytes\)"),
        (damage_gptq, r"cannot load teacher .*its weights are quantised \(gptq\)"),
        (damage_config, "no teacher at .*give a hub id"),
        (damage_kind, "no teacher at .*give a hub id"),
        (damage_code, "no teacher at .*give a hub id"),
        (damage_empty, "no teacher at .*give a hub id"),
    ],
)
def test_damaged_teachers_are_one_line_with_the_cause(tmp_path: Path, damage, named: str):
    path = save_small("qwen3", tmp_path / "teacher")
    damage(tmp_path / "teacher")
    with pytest.raises(UserError, match=named) as caught:
        load_teacher(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_attacks_6a_18b_no_code_of_a_teachers_folder_runs_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks at a prompt where nothing is said, and "y" is quickly typed."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    named = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": named}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(UserError, match="no teacher at"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no teacher at"):
        load_teacher(tmp_path)
    assert not (tmp_path / "pwned").exists()
