"""Adapters: attaching changes nothing, merging changes nothing, and the peft package reads what is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.adapt import (
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    attach_bottlenecks,
    attach_lora,
    attach_prefix,
    attach_prompt,
    freeze,
    merged,
    trained_state,
    with_prompt,
)
from model.adapt.quantize import quantize
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig, parameter_roles
from model.decoding.generate import Sampling, generate
from model.ffns.dense import FfnConfig
from model.init import Linear
from model.interop import adapted_weights, save_adapter, save_pretrained, save_virtual_tokens
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.learned import LearnedPositionConfig
from tests.model.configurations import BERT, HYBRID, MAMBA, MIXTRAL, VASWANI, any_config
from tests.model.learning import learn

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
    with pytest.raises(Refusal, match=r"matches no layer"):
        attach_lora(build_model(LLAMA), LoraConfig(targets=("*.query",)))


def test_targets_choose_layers() -> None:
    names = attach_lora(build_model(LLAMA), LoraConfig(targets=("*.mixer.q", "*.mixer.v")))
    assert names == [f"stack.layers.{layer}.mixer.{part}" for layer in (0, 1) for part in ("q", "v")]


def attach(model: Transformer, kind: str, *, seed: int = 0) -> list[str]:
    if kind == "lora":
        return attach_lora(model, LORA, seed=seed)
    if kind == "prompt":
        return attach_prompt(model, PromptConfig(tokens=3), seed=seed)
    if kind == "prefix":
        return attach_prefix(model, PrefixConfig(tokens=3), seed=seed)
    return attach_bottlenecks(model, BottleneckConfig(width=4, placement=kind), seed=seed)  # type: ignore[arg-type]


def loss_of(model: Transformer, kind: str, row: torch.Tensor) -> torch.Tensor:
    if kind == "prefix":
        cache = model.new_cache(*row.shape)
        return model(row, targets_BT=row.roll(-1, 1), cache=cache)["loss_sum"] / row.numel()
    if kind == "prompt":
        virtual = torch.tensor([with_prompt([], 3)] * row.shape[0])
        targets = torch.cat([torch.full_like(virtual, -100), row.roll(-1, 1)], dim=1)
        return model(torch.cat([virtual, row], dim=1), targets_BT=targets)["loss_sum"] / row.numel()
    return model(row, targets_BT=row.roll(-1, 1))["loss_sum"] / row.numel()


@pytest.mark.parametrize("kind", ["lora", "houlsby", "pfeiffer", "prompt", "prefix"])
@settings(max_examples=4, deadline=None)
@given(config=any_config(), seed=st.integers(0, 20))
def test_any_family_learns_by_what_is_attached_alone(kind: str, config: ModelConfig, seed: int) -> None:
    model = build_model(config, seed=seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, kind, seed=seed)
    roles = parameter_roles(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        trained == {name for name, role in roles.items() if role == "adapter"} == trained_state(model).keys() != set()
    )
    row = torch.randint(0, config.require_vocab_size(), (2, 8), generator=torch.Generator().manual_seed(seed))
    losses = learn(model, lambda: loss_of(model, kind, row), steps=12, lr=0.03)
    assert min(losses[1:]) < losses[0]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    again = build_model(config, seed=seed)
    attach(again, kind, seed=seed + 1)
    again.load_state_dict(trained_state(model), strict=False)
    assert torch.equal(loss_of(again, kind, row), loss_of(model, kind, row))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_bottlenecks_start_as_the_identity_and_stand_behind_their_sublayers(
    config: ModelConfig, placement: str
) -> None:
    plain, adapted = build_model(config), build_model(config)
    names = attach(adapted, placement)
    assert len(names) == (4 if placement == "houlsby" else 2)
    assert torch.equal(plain(tokens())["logits"], adapted(tokens())["logits"])
    with torch.no_grad():
        adapted.get_submodule("stack.layers.0.ffn.adapter").up.bias += 1.0
    found: dict[str, torch.Tensor] = {}
    for name, model in (("plain", plain), ("adapted", adapted)):
        model.stack.layers[0].register_forward_hook(lambda m, i, out, name=name: found.update({name: out[0]}))
        model(tokens())
    assert torch.allclose(found["adapted"], found["plain"] + 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["houlsby", "prompt", "prefix", "lora"])
def test_an_adapted_model_generates_what_its_whole_pass_says(kind: str) -> None:
    model = build_model(LLAMA, seed=1)
    attach(model, kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    start = with_prompt([], 3) if kind == "prompt" else []
    prompts = [[*start, 5, 3, 9], [*start, 7]]
    found = generate(model, prompts, Sampling(max_new_tokens=6, temperature=0))
    for prompt, text in zip(prompts, found, strict=True):
        whole = list(prompt)
        for _ in range(6):
            cache = model.new_cache(1, len(whole)) if kind == "prefix" else None
            whole.append(int(model(torch.tensor([whole]), cache=cache)["logits"][0, -1].argmax()))
        assert text == whole[len(prompt) :]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_peft_package_reads_learned_prompts_and_prefixes(config: ModelConfig, kind: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapted = build_model(config, seed=1)
    attach(adapted, kind)
    save_pretrained(build_model(config, seed=1).state_dict(), config, tmp_path / "model")
    save_virtual_tokens(adapted.state_dict(), config, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(tokens(), attention_mask=torch.ones_like(tokens())).logits
        if kind == "prefix":
            found = adapted(tokens(), cache=adapted.new_cache(2, 12))["logits"]
        else:
            found = adapted(torch.tensor([with_prompt(row, 3) for row in tokens().tolist()]))["logits"]
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_freezing_by_pattern_keeps_what_matches_and_trains_the_rest() -> None:
    model = build_model(LLAMA)
    frozen = freeze(model, ("frontend.*", "stack.layers.0.*"))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(frozen)
    assert not model.head.weight.requires_grad  # tied
    assert model.stack.layers[1].mixer.q.weight.requires_grad


@pytest.mark.parametrize(("patterns", "said"), [(("*.query",), "matches no parameter"), (("*",), "nothing to train")])
def test_freezing_nothing_or_everything_is_refused(patterns: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        freeze(build_model(LLAMA), patterns)


def test_a_prefix_is_learned_where_activations_are_recomputed_too() -> None:
    model = build_model(LLAMA, seed=1)
    attach(model, "prefix")
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = torch.autograd.grad(loss_of(model, "prefix", tokens()), learned)
    model.stack.recompute = True
    again = torch.autograd.grad(loss_of(model, "prefix", tokens()), learned)
    assert any(gradient.any() for gradient in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_a_model_with_a_prefix_says_how_it_wants_to_be_called() -> None:
    model = build_model(LLAMA)
    attach(model, "prefix")
    with pytest.raises(Refusal, match="new_cache"):
        model(tokens())


def test_a_pattern_that_names_experts_or_routers_is_told_what_adapters_take() -> None:
    model = build_model(MIXTRAL)
    for pattern in ("*experts*", "*router*"):
        with pytest.raises(Refusal, match="is no linear map, nor are routers"):
            attach_lora(model, LoraConfig(targets=(pattern,)))
    names = attach_lora(model, LORA)
    assert names == [f"stack.layers.{layer}.mixer.{part}" for layer in (0, 1) for part in ("q", "k", "v", "out")]


def test_null_targets_adapt_every_map_of_encoders_too_but_what_peft_refuses() -> None:
    model = build_model(VASWANI)
    maps = {name for name, part in model.named_modules() if "stack" in name.split(".") and type(part) is Linear}
    assert set(attach_lora(model, LORA)) == maps
    assert any(name.startswith("encoder.") for name in maps)
    assert not [name for name in attach_lora(build_model(MAMBA), LORA) if name.endswith("out_proj")]
    chosen = build_model(MAMBA)
    assert attach_lora(chosen, LoraConfig(targets=("*out_proj",)))
    with pytest.raises(Refusal, match=r"peft could not load the adapters of .*out_proj.*targets"):
        save_adapter(chosen.state_dict(), MAMBA, LoraConfig(), Path("nowhere"))
    with pytest.raises(Refusal, match="over MambaForCausalLM"):
        adapted_weights(["stack.layers.0.mixer.out_proj"], MAMBA)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_beside_quantized_weights_are_refused(kind: Any) -> None:
    model = build_model(LLAMA)
    quantize(model, kind)
    with pytest.raises(Refusal, match="is quantized"):
        attach_lora(model, LORA)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_placement_without_a_sublayer_is_refused() -> None:
    with pytest.raises(Refusal, match="use houlsby"):
        attach(build_model(MAMBA), "pfeiffer")
    assert attach(build_model(MAMBA), "houlsby") == [f"stack.layers.{layer}.mixer.adapter" for layer in (0, 1)]


def test_a_prefix_stands_before_a_decoder_that_has_an_encoder_and_learns() -> None:
    model, row = build_model(VASWANI), tokens()
    [name] = attach(model, "prefix")

    def loss() -> torch.Tensor:
        cache = model.new_cache(*row.shape)
        result = model(row, encoder_tokens_BT=row.flip(1), targets_BT=row.roll(-1, 1), cache=cache)
        return result["loss_sum"] / row.numel()

    losses = learn(model, loss, steps=8, lr=0.03)
    assert min(losses[1:]) < losses[0]
    assert name == "prefix.weight"
    whole = model(row, encoder_tokens_BT=row.flip(1), cache=model.new_cache(*row.shape))["logits"]
    cache = model.new_cache(*row.shape)
    steps = [model(row[:, :1], encoder_tokens_BT=row.flip(1), cache=cache)["logits"]]
    steps += [model(piece, cache=cache)["logits"] for piece in row[:, 1:].split(1, dim=1)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


def test_an_encoder_takes_no_prefix() -> None:
    with pytest.raises(Refusal, match=r"model\.causal is false"):
        attach(build_model(BERT), "prefix")


def test_virtual_tokens_stand_before_the_encoders_text_and_are_unknown_elsewhere() -> None:
    model, row = build_model(VASWANI), tokens()
    virtual = torch.tensor([with_prompt(ids, 3) for ids in row.tolist()])
    with pytest.raises(Refusal, match=r"from -3 to .*attach_prompt"):
        model(row, encoder_tokens_BT=virtual)
    assert attach(model, "prompt") == ["encoder.frontend.tokens.prompt"]
    assert model(row, encoder_tokens_BT=virtual)["logits"].shape == (*row.shape, 97)
    with pytest.raises(Refusal, match="the encoder's, where the model has one"):
        model(virtual, encoder_tokens_BT=row)
    with pytest.raises(Refusal, match="vocabulary is 0 to 96"):
        model(row, encoder_tokens_BT=row + 97)


@pytest.mark.parametrize("change", ["lora", "prompt", "int8", "missing"])
@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["with a class", "without"])
def test_a_state_dict_that_is_not_the_whole_model_alone_is_not_written(
    config: ModelConfig, change: str, tmp_path: Path
) -> None:
    model = build_model(config)
    state = dict(model.state_dict())
    if change == "missing":
        del state["stack.final_norm.weight"]
    elif change == "int8":
        quantize(model, "int8")
        state = model.state_dict()
    else:
        attach(model, change)
        state = model.state_dict()
    said = {"lora": "lora_A", "prompt": "tokens.prompt", "int8": "packed", "missing": r"1 missing \(stack.final_norm"}
    with pytest.raises(Refusal, match=said[change]):
        save_pretrained(state, config, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    if change == "lora":
        save_pretrained(merged(state, LORA), config, tmp_path / "model")
