"""Adapters: attaching changes nothing, merging changes nothing, and the peft package reads what is written."""

from pathlib import Path

import pytest
import torch

from model.build import build_model
from model.config import ModelConfig, ModelError, parameter_roles
from model.ffn import FfnConfig
from model.interop import save_adapter, save_pretrained
from model.mixers.attention import AttentionConfig
from model.norm import NormConfig
from model.peft import LoraConfig, attach_lora, merged
from model.position import LearnedPositionConfig

LLAMA = ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, max_seq_len=32, mixer=AttentionConfig(n_heads=4, n_kv_heads=2)
)
GPT2 = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=2,
    max_seq_len=32,
    norm=NormConfig(kind="layer", bias=True),
    position=LearnedPositionConfig(),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=64, activation="gelu_tanh", gated=False, bias=True),
)
LORA = LoraConfig(rank=3, alpha=5.0)


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def trained(config: ModelConfig, lora: LoraConfig = LORA) -> torch.nn.Module:
    """A model whose adapters have left zero."""
    model = build_model(config, seed=1)
    attach_lora(model, lora, seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def test_attaching_changes_no_output_and_leaves_only_adapters_to_train() -> None:
    plain, adapted = build_model(LLAMA, seed=1), build_model(LLAMA, seed=1)
    names = attach_lora(adapted, LORA)
    assert len(names) == 2 * 7
    assert torch.equal(plain(tokens())["logits"], adapted(tokens())["logits"])
    roles = parameter_roles(adapted)
    assert {roles[name] for name, parameter in adapted.named_parameters() if parameter.requires_grad} == {"adapter"}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_merged_model_computes_what_the_adapted_one_does(config: ModelConfig) -> None:
    adapted, plain = trained(config), build_model(config, seed=9)
    plain.load_state_dict(merged(adapted.state_dict(), LORA))
    theirs, ours = adapted(tokens())["logits"], plain(tokens())["logits"]
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()
    assert (theirs - build_model(config, seed=1)(tokens())["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_peft_package_reads_the_adapter_over_the_exported_model(config: ModelConfig, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapted = trained(config)
    save_pretrained(build_model(config, seed=1).state_dict(), config, tmp_path / "model")
    save_adapter(adapted.state_dict(), config, LORA, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected, found = adapted(tokens())["logits"], theirs(tokens()).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"matches no layer"):
        attach_lora(build_model(LLAMA), LoraConfig(targets=("*.query",)))


def test_targets_choose_layers() -> None:
    names = attach_lora(build_model(LLAMA), LoraConfig(targets=("*.mixer.q", "*.mixer.v")))
    assert names == [f"stack.layers.{layer}.mixer.{part}" for layer in (0, 1) for part in ("q", "v")]
