"""Folders made of a run's tensors and a folder like them are loaded by the transformers library itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import forked
from freestep import FreestepError, Pulled, RemoteOptimizer, Snapshot
from freestep.pretrained import PretrainedFolder
from harness import ThreadService

pytestmark = pytest.mark.slow

TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(n_positions=16, n_embd=8, n_layer=2, n_head=2, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, **SMALL, **options))


def bert() -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TOKENS, **SMALL))


def t5() -> PreTrainedModel:
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, **TOKENS)
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=2, **TOKENS, **SMALL))


def vit() -> PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def resnet() -> PreTrainedModel:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "gpt2, tied": gpt2,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama": lambda: llama(tie_word_embeddings=False),
    "bert, tied": bert,
    "t5, tied": t5,
    "mixtral, with other names in files": mixtral,
    "vit, with other names in files": vit,
    "resnet, with buffers": resnet,
}


def trained(model: nn.Module, prefix: str = "") -> Snapshot:
    """What a run of the model's parameters would have: other values, a tied tensor once."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        prefix + name: torch.randn(parameter.shape, generator=generator) for name, parameter in model.named_parameters()
    }
    return Snapshot(tensors, "run", Pulled(1, 7, "x"))


def load(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The parameters that `from_pretrained` loads; it finds all of them, and nothing else."""
    loaded, information = type(model).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert {kind: found for kind, found in information.items() if found} == {}
    parameters: dict[str, Tensor] = dict(loaded.named_parameters())
    return parameters


def assert_loaded(model: nn.Module, folder: Path, x: Snapshot, prefix: str = "") -> None:
    parameters = load(model, folder)
    assert {prefix + name for name in parameters} == x.keys()
    assert [name for name in parameters if not torch.equal(parameters[name], x[prefix + name])] == []


@pytest.mark.parametrize("prefix", ["", "net.model."])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded(tmp_path: Path, name: str, prefix: str) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "like")
    x = trained(model, prefix)
    notes = PretrainedFolder(tmp_path / "like").write(tmp_path / "out", x)
    assert_loaded(model, tmp_path / "out", x, prefix)
    assert bool(notes) == ("with" in name)
    # What is frozen or a buffer is as it was.
    buffers = type(model).from_pretrained(tmp_path / "out").state_dict()  # type: ignore[attr-defined]
    for key in model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        assert torch.equal(buffers[key], model.state_dict()[key])


def test_a_part_of_a_model_is_loaded_with_what_is_frozen(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "like")
    x = trained(model)
    frozen = {name for name in x if ".h.0." in name}
    inner = {name.removeprefix("transformer."): tensor for name, tensor in x.items() if name not in frozen}
    # As of a run of `model.transformer`.
    (note,) = PretrainedFolder(tmp_path / "like").write(tmp_path / "out", Snapshot(inner, "run", Pulled(1, 7, "x")))
    assert note.startswith(f"not in the run, and copied from {tmp_path / 'like'}: transformer.h.0.attn.c_attn.bias, ")
    assert note.endswith(f" and {len(frozen) - 10} more")
    before = dict(model.named_parameters())
    for name, tensor in load(model, tmp_path / "out").items():
        assert torch.equal(tensor, before[name] if name in frozen else x[name])


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "like", max_shard_size="2KB")
    assert len(list((tmp_path / "like").glob("model-*.safetensors"))) > 1
    x = trained(model, "module.")
    assert PretrainedFolder(tmp_path / "like").write(tmp_path / "out", x) == []
    assert_loaded(model, tmp_path / "out", x, "module.")
    assert not list((tmp_path / "out").glob("*index*"))


@pytest.mark.parametrize("named", ["transformer.wte.weight", "lm_head.weight"])
@pytest.mark.parametrize("both_in_file", [True, False])
def test_a_tied_tensor_is_loaded_whatever_its_name_is(tmp_path: Path, named: str, both_in_file: bool) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "like")
    if both_in_file:
        weights = load_file(tmp_path / "like" / "model.safetensors")
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        save_file(weights, tmp_path / "like" / "model.safetensors", {"format": "pt"})
    x = trained(model)
    tensors = {named if name == "transformer.wte.weight" else name: tensor for name, tensor in x.items()}
    PretrainedFolder(tmp_path / "like").write(tmp_path / "out", Snapshot(tensors, "run", Pulled(1, 7, "x")))
    assert_loaded(model, tmp_path / "out", x)


def test_weights_that_are_no_safetensors_are_said_not_to_be_read(tmp_path: Path) -> None:
    model = bert()
    model.config.save_pretrained(tmp_path / "like")
    torch.save(model.state_dict(), tmp_path / "like" / "pytorch_model.bin")
    x = trained(model)
    (note,) = PretrainedFolder(tmp_path / "like").write(tmp_path / "out", x)
    assert note.startswith(f"{tmp_path / 'like' / 'pytorch_model.bin'} was not read: what the run has not, ")
    assert_loaded(model, tmp_path / "out", x)


def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    model = bert()
    model.config.save_pretrained(tmp_path / "like")
    x = trained(model)
    assert PretrainedFolder(tmp_path / "like").write(tmp_path / "out", x) == []
    assert_loaded(model, tmp_path / "out", x)


def test_config_generation_and_tokenizer_are_copied_and_nothing_else(tmp_path: Path) -> None:
    model = gpt2()
    like, out = tmp_path / "like", tmp_path / "out"
    model.save_pretrained(like)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        (like / name).write_text(name)
    for name in ("optimizer.pt", "pytorch_model.bin", "trainer_state.json", "README.md"):
        (like / name).write_text(name)
    (like / "checkpoint-config").mkdir()
    for _ in range(2):
        # Also over what is there.
        PretrainedFolder(like).write(out, trained(model))
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert {*os.listdir(out)} == copied | {"merges.txt", "chat_template.jinja", "model.safetensors"}
    for name in os.listdir(out):
        assert name == "model.safetensors" or (out / name).read_bytes() == (like / name).read_bytes()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    like = tmp_path / "like"
    with pytest.raises(FreestepError, match=r"has no config\.json"):
        PretrainedFolder(like)
    model.save_pretrained(like)
    before = (like / "model.safetensors").read_bytes()
    with pytest.raises(FreestepError, match="is the folder of the config too"):
        PretrainedFolder(like).write(like, trained(model))
    assert (like / "model.safetensors").read_bytes() == before
    x = trained(model)
    x["transformer.wpe.weight"] = torch.zeros(3, 8)
    with pytest.raises(FreestepError, match=r"'transformer.wpe.weight' has the shape \[16, 8\] in .*, but \[3, 8\] in"):
        PretrainedFolder(like).write(tmp_path / "out", x)
    assert not (tmp_path / "out").exists()
    (like / "model.safetensors").unlink()
    for content in ("", "[]", "{}", '{"weight_map": [1]}'):
        (like / "model.safetensors.index.json").write_text(content)
        with pytest.raises(FreestepError, match="is not an index"):
            PretrainedFolder(like)
    for damaged in (b"", b"text", before[:100], before[:-1]):
        (like / "model.safetensors").write_bytes(damaged)
        with pytest.raises(FreestepError, match="is not a safetensors file"):
            PretrainedFolder(like)
    for shape in (["a"], [-1], [True], "12", None, 1):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        (like / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"data")
        with pytest.raises(FreestepError, match="its shape is not a list of sizes"):
            PretrainedFolder(like)


def test_the_command_writes_a_folder_of_a_run(service: ThreadService, name: str, tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "like")
    with RemoteOptimizer(model, url=service.url, run=name, algorithm="sgd_schedule_free", lr=0.5) as optimizer:
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
            optimizer.step()
        optimizer.eval()
    pull = ("pull", name, "--format", "hf", "-o", str(tmp_path / "out"), "--json")
    done = forked.freestep(*pull, "--like", str(tmp_path / "like"), FREESTEP_URL=service.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["step"] == 2
    parameters = load(model, tmp_path / "out")
    assert [key for key, tensor in model.named_parameters() if not torch.equal(tensor, parameters[key])] == []
    wrong = forked.freestep(*pull, "--like", str(tmp_path / "out"), FREESTEP_URL=service.url)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "is the folder of the config too" in wrong.stderr
