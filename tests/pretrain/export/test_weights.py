"""An export's weights are what transformers would have written, one tensor in memory at a time."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from data_pipeline.core.errors import UserError
from modeling.textldm import TextLDM
from modeling.textvae import TextVAEModel
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import SavedTensors
from pretrain.checkpoint.tensor_files import TensorFiles, file_pieces
from pretrain.export.convert import convert, main
from pretrain.export.weights import write_weights
from pretrain.stages.exported import weight_files
from pretrain.stages.frozen_vae import load_vae
from pretrain.stages.inputs import vae_fingerprint
from tests.pretrain.conftest import Trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_byte_for_byte_what_transformers_writes(exported: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = TextLDM.from_pretrained(exported, dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    values = {name: tensor.float() for name, tensor in model.state_dict().items()}
    (tmp_path / "ours").mkdir()
    hashes = write_weights(model.to("meta"), values.__getitem__, tmp_path / "ours")
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    assert hashes == {"model.safetensors": hashlib.sha256(ours).hexdigest()}


def test_the_config_is_the_one_that_transformers_writes(exported: Path, tmp_path: Path) -> None:
    TextLDM.from_pretrained(exported).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((exported / name).read_text())


def test_a_tensor_is_gone_when_the_next_is_asked_for(exported: Path, tmp_path: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in TextLDM.from_pretrained(exported).state_dict().items()}
    model = TextLDM(TextLDM.from_pretrained(exported).config).to("meta")
    given: list[StorageWeakRef] = []
    alive: list[int] = []

    def tensor(name: str) -> torch.Tensor:
        alive.append(sum(not storage.expired() for storage in given))
        made = torch.zeros(shapes[name])
        given.append(StorageWeakRef(made.untyped_storage()))
        return made

    write_weights(model, tensor, tmp_path, "30KB")
    assert alive == [0] * len(shapes)


def test_a_checkpoint_gives_its_tensors_one_by_one(trained: Trained) -> None:
    manifest = read_manifest(checkpoint_of(trained.dit))
    with SavedTensors(manifest, "ema") as saved:
        assert saved.shapes["latents_mean"] == (4,)
        first, again = saved["dit.from_latent.weight"], saved["dit.from_latent.weight"]
        assert torch.equal(first, again)
        assert first.data_ptr() != again.data_ptr()
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == saved.shapes
        assert len(saved) == len(saved.shapes)
    with pytest.raises(UserError, match="has no state 'emma'; it has weight"):
        SavedTensors(manifest, "emma")


def test_an_export_in_several_files_is_one_model_and_stage_two_takes_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = convert(trained.vae, tmp_path / "one")
    command = ["--run", str(trained.vae), "--output", str(tmp_path / "some"), "--max-shard-size=20KB"]
    assert main(command) == 0
    some = tmp_path / "some"
    assert len(weight_files(some)) == len(list(some.glob("*.safetensors"))) > 2
    expected = TextVAEModel.from_pretrained(one).state_dict()
    found = TextVAEModel.from_pretrained(some).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(
        torch.equal(a, b) for a, b in zip(load_vae(some).state_dict().values(), load_vae(one).state_dict().values())
    )
    assert vae_fingerprint(some) != vae_fingerprint(one)
    assert main(command) == 0  # an unchanged export is replaced
    for size in ("20", "0KB", "-3GB", "3XB"):
        assert main([*command, f"--max-shard-size={size}"]) == 2
        assert f"--max-shard-size is {size!r}" in capsys.readouterr().err
    index = json.loads((some / "model.safetensors.index.json").read_text())
    for names in ({"vae.to_mean.bias": "../../secret.safetensors"}, {}, ["model-00001-of-00002.safetensors"]):
        (some / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))
        with pytest.raises(UserError, match="is not what textldm convert writes"):
            load_vae(some)


def test_files_that_hold_a_name_twice_or_are_cut_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pieces = file_pieces({"x": (torch.float32, (3,))}, [torch.ones(3)])
        (tmp_path / name).write_bytes(b"".join(pieces))
    with TensorFiles([tmp_path / "a"]) as files:
        assert files["x"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="x stands in two files"):
        TensorFiles([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match="x does not lie within it"):
        TensorFiles([tmp_path / "a"])
    with pytest.raises(ValueError, match=r"x is torch\.float32 \[2\]; it was laid out as torch\.float32 \[3\]"):
        list(file_pieces({"x": (torch.float32, (3,))}, [torch.ones(2)]))
