"""Hugging Face's classes are the reference: same logits and gradients, whoever wrote the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.decoding.generate import Sampling, generate
from model.ffns.dense import FfnConfig
from model.heads.language import LanguageHeadConfig
from model.interop import (
    config_from_hf,
    family_of,
    from_hf,
    has_hf_class,
    hf_config,
    load_pretrained,
    save_pretrained,
    to_hf,
)
from model.mixers.attention import AttentionConfig
from tests.model.configurations import (
    FALCON,
    GPT2,
    GPTJ,
    LLAMA,
    MAMBA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    any_config,
    mamba_configs,
    parallel_configs,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = pytest.mark.parametrize(
    "config",
    [LLAMA, QWEN2, QWEN3, MISTRAL, GPT2, GPTJ, FALCON, MIXTRAL, QWEN3_MOE, MAMBA],
    ids=["llama", "qwen2", "qwen3", "mistral", "gpt2", "gptj", "falcon", "mixtral", "qwen3_moe", "mamba"],
)
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reference(config: ModelConfig) -> transformers.PreTrainedModel:
    """A model of the matching class with its own random weights, biases and scales stirred too."""
    described = transformers.AutoConfig.for_model(
        **{**hf_config(config), "attn_implementation": "eager", "experts_implementation": "eager"}
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


def written(config: ModelConfig, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Save a model with stirred weights to a folder; its state dict."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_pretrained(model.state_dict(), config, folder, **more)
    return model.state_dict()


def inputs(config: ModelConfig) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def assert_close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()


@QUICK
@given(config=st.one_of(any_config(), mamba_configs()))
def test_an_imported_checkpoint_has_the_references_logits_and_gradients(config: ModelConfig) -> None:
    theirs = reference(config)
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    ours = build_model(imported).eval()  # in training a router's auxiliary loss would join the gradient
    ours.load_state_dict(state)
    tokens = inputs(config)
    found, expected = ours(tokens, targets_BT=tokens.roll(-1, 1)), theirs(tokens).logits
    assert_close(expected, ours(tokens)["logits"])
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")
    loss.backward()
    found["loss_sum"].backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    if imported.tie_embeddings:
        gradients["head.weight"] = gradients["frontend.tokens.weight"]
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    renamed = to_hf(gradients, imported, in_memory=True)  # type: ignore[arg-type]
    assert renamed.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradient - renamed[name]).abs().max() <= 2e-5 * largest, name


@QUICK
@given(config=any_config(), left=st.booleans(), padding=st.integers(1, 20))
def test_padding_on_either_side_leaves_the_logits_of_real_tokens_as_the_references(
    config: ModelConfig, left: bool, padding: int
) -> None:
    theirs = reference(config)
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    ours = build_model(imported)
    ours.load_state_dict(state)
    tokens = inputs(config)
    real = torch.ones_like(tokens)
    real[0, slice(0, padding) if left else slice(tokens.shape[1] - padding, None)] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real, position_ids=positions).logits
        found = ours(tokens, documents_BT=real.int())["logits"]
    assert_close(expected[real.bool()], found[real.bool()])


@pytest.mark.parametrize("multi_query", [True, False])
@settings(max_examples=4, deadline=None)
@given(config=parallel_configs().filter(lambda config: config.head != LanguageHeadConfig(bias=True)))
def test_the_first_falcons_settings_are_understood(multi_query: bool, config: ModelConfig) -> None:
    kv_heads = 1 if multi_query else None
    config = replace(config, layout="parallel", mixer=replace(config.mixer, n_kv_heads=kv_heads))
    old = {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "multi_query": multi_query}
    described = transformers.AutoConfig.for_model(**{**hf_config(config), **old, "num_kv_heads": None})
    theirs = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32).eval()
    imported, state = from_hf(described.to_dict(), theirs.state_dict())
    assert imported.mixer.kv_heads == (1 if multi_query else config.mixer.n_heads)
    ours = build_model(imported)
    ours.load_state_dict(state)
    with torch.no_grad():
        assert_close(theirs(inputs(config)).logits, ours(inputs(config))["logits"])


@QUICK
@given(config=mamba_configs())
def test_padding_in_front_of_a_scan_is_a_document_of_its_own(config: ModelConfig) -> None:
    config = replace(config, mixer=replace(config.mixer, bias=False))  # their convolution sees the padding's bias
    theirs = reference(config)
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    ours = build_model(imported)
    ours.load_state_dict(state)
    tokens, mask = inputs(config), torch.ones(2, 24, dtype=torch.int32)
    mask[1, :9] = 0
    expected = theirs(tokens, attention_mask=mask).logits * mask[..., None]
    assert_close(expected, ours(tokens, documents_BT=mask)["logits"] * mask[..., None])


@QUICK
@given(config=st.one_of(any_config(), mamba_configs()))
def test_import_and_export_give_the_same_tensors_bit_for_bit(config: ModelConfig) -> None:
    theirs = reference(config)
    state = theirs.state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    imported, ours = from_hf(theirs.config.to_dict(), state)
    again = to_hf(ours, imported, in_memory=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    build_model(imported).load_state_dict(ours, strict=True)


@QUICK
@given(config=st.one_of(any_config(), mamba_configs()))
def test_a_configuration_comes_back_from_theirs(config: ModelConfig) -> None:
    again = config_from_hf(json.loads(json.dumps(hf_config(config))))
    assert hf_config(again) == hf_config(config)
    assert family_of(again) is family_of(config)
    loaded = transformers.AutoConfig.for_model(**hf_config(config))
    assert config_from_hf(loaded.to_dict()) == again


@pytest.mark.parametrize("max_shard_bytes", [10_000, 1_000_000], ids=["sharded", "whole"])
@FAMILIES
def test_transformers_loads_an_export_and_agrees_on_logits_and_greedy_tokens(
    config: ModelConfig, max_shard_bytes: int, tmp_path: Path
) -> None:
    state = written(config, tmp_path, max_shard_bytes=max_shard_bytes, extra={"bos_token_id": 1, "eos_token_id": 2})
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) is (max_shard_bytes > 100_000)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    loaded, again = load_pretrained(tmp_path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    ours = build_model(loaded)
    ours.load_state_dict(again)
    tokens = inputs(config)
    with torch.no_grad():
        assert_close(theirs(tokens).logits, ours(tokens)["logits"])
    theirs.generation_config.eos_token_id = None  # all 20 tokens, whatever they are
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
    expected = expected[:, tokens.shape[1] :].tolist()
    assert generate(ours, tokens.tolist(), Sampling(max_new_tokens=20, temperature=0)) == expected


def test_half_precision_weights_keep_their_precision(tmp_path: Path) -> None:
    state = build_model(LLAMA, dtype=torch.bfloat16).state_dict()
    save_pretrained(state, LLAMA, tmp_path)
    _, again = load_pretrained(tmp_path)
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == torch.bfloat16 for name, tensor in state.items()
    )
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_a_written_folder_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        written(LLAMA, tmp_path / folder)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_model_no_class_computes_is_kept_in_our_own_format(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=1,
        layout="parallel",
        mixer=AttentionConfig(n_heads=4, n_kv_heads=1),
        ffn=FfnConfig(d_ff=40, activation="relu_squared", gated=False),
        logit_soft_cap=15.0,
    )
    assert not has_hf_class(config)
    with pytest.raises(Refusal, match=r"no Hugging Face class .* llama comes nearest but needs layout='pre'"):
        hf_config(config)
    state = written(config, tmp_path)
    loaded, again = load_pretrained(tmp_path)
    assert loaded == config
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (or with None remove) tensors of a written checkpoint; double underscores stand for dots."""
    kept = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        kept.pop(name.replace("__", "."), None)
        if tensor is not None:
            kept[name.replace("__", ".")] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path: Path) -> None:
    written(LLAMA, tmp_path)
    changed(tmp_path, model__norm__weight=torch.ones(31), extra__weight=torch.ones(1))
    changed(tmp_path, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(Refusal) as caught:
        load_pretrained(tmp_path)
    for said in (
        "1 missing: model.layers.1.mlp.up_proj.weight",
        "1 not expected: extra.weight",
        "1 of another shape: model.norm.weight (found [31], expected [32])",
    ):
        assert said in str(caught.value)


def test_stored_buffers_and_a_headless_prefix_are_understood(tmp_path: Path) -> None:
    state = written(GPT2, tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    headless = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    headless |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    _, again = from_hf(json.loads((tmp_path / "config.json").read_text()), headless)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path: Path) -> None:
    state = written(LLAMA, tmp_path)
    changed(tmp_path, lm_head__weight=state["head.weight"].clone())
    assert torch.equal(load_pretrained(tmp_path)[1]["head.weight"], state["head.weight"])
    changed(tmp_path, lm_head__weight=state["head.weight"] + 1)
    with pytest.raises(Refusal, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path)


def test_a_pickled_checkpoint_is_refused_without_being_opened(tmp_path: Path) -> None:
    written(LLAMA, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "run") + b"'\ntR.")
    with pytest.raises(Refusal, match=r"only pytorch_model\.bin"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom'"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"num_key_value_heads": 3}, "n_kv_heads = 3"),
    ],
)
def test_a_configuration_we_cannot_compute_is_refused(edit: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(LLAMA, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, **edit}))
    with pytest.raises(Refusal, match=said):
        load_pretrained(tmp_path)


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"config\.json: it does not exist"):
        load_pretrained(tmp_path)
    written(LLAMA, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(Refusal, match=r"model\.safetensors: it cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refusal, match="not valid JSON"):
        load_pretrained(tmp_path)
