"""Impossible models are refused with the value, the rule and the remedy; possible ones are values."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conf.refusal import Refusal
from conf.typed import from_plain, to_plain
from model.adapt import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.costs import parameter_counts
from model.decoding.generate import Sampling
from model.ffns.dense import FfnConfig
from model.frontends.patches import PatchFrontendConfig
from model.heads.classifiers import ClassifierHeadConfig
from model.heads.language import LanguageHeadConfig, TargetWeight
from model.init import InitConfig
from model.kernels.select import CAN
from model.mixers.attention import AttentionConfig
from model.mixers.bigbird import BigBirdConfig
from model.mixers.grid import GridAttentionConfig
from model.mixers.linear_attention import FavorConfig, LinearAttentionConfig
from model.mixers.longformer import LongformerConfig
from model.mixers.mamba import MambaConfig
from model.norms.norm import NormConfig
from model.positions.alibi import AlibiConfig
from model.positions.grid import GridPositionConfig
from model.positions.none import NoPositionConfig
from model.positions.relative import RelativePositionConfig
from model.positions.rope import LinearScaling, Llama3Scaling, RopeConfig
from tests.model.configurations import (
    ALIBI,
    BERT,
    DALLE,
    GPT2,
    HYBRID,
    LINEAR,
    LLAMA,
    MAMBA,
    MISTRAL,
    PERFORMER,
    RECURRENT,
    ROW,
    preset,
)

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))

# Published totals, with the vocabulary each was published with.
PUBLISHED = {
    "dalle-12b": (24832, 12_293_824_256),  # published as 12 billion
    "dalle-tiny": (800, None),
    "falcon-7b": (65024, 6_921_720_704),
    "gpt2-124m": (50257, 124_439_808),
    "gptj-6b": (50400, 6_050_882_784),
    "mamba-130m": (50280, 129_135_360),
    "bert-base": (30522, 109_514_298),
    "roberta-base": (50265, 124_697_433),
    "distilbert": (30522, 66_985_530),
    "t5-small": (32128, 60_506_624),
    "t5-v1.1-small": (32128, 76_961_152),
    "bart-base": (50265, 139_420_416 + 50265),  # with the offset of the logits, which theirs does not train
    "llama-1b": (128256, 1_235_814_400),
    "llama-8b": (128256, 8_030_261_248),
    "clip-base": (49408, 151_277_313),
    "vit-base": (None, 86_567_656),
    "whisper-small": (51865, 241_734_912 - 1500 * 768),  # less the encoder's table of sinusoids
    "wav2vec2-base-pretraining": (None, 95_044_608 - 128),
    "wav2vec2-base": (32, 94_396_320 - 128),  # less the 128 lengths of the positional convolution's weight norm
    "mistral-7b": (32000, 7_241_732_096),
    "mixtral-8x7b": (32000, 46_702_792_704),
    "palm-8b": (256000, 8_632_012_800),
    "qwen3-30b-a3b": (151936, 30_532_122_624),
}


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: ModelConfig(d_model=0), "d_model = 0"),
        (lambda: ModelConfig(d_model=100, mixer=AttentionConfig(n_heads=8)), "d_model = 100"),
        (lambda: ModelConfig(d_model=24, mixer=AttentionConfig(n_heads=8)), "3 channels"),
        (lambda: ModelConfig(dropout=1.0), "dropout = 1.0"),
        (lambda: ModelConfig(logit_soft_cap=0.0), "logit_soft_cap = 0.0"),
        (lambda: ModelConfig(z_loss=-0.1), "z_loss = -0.1"),
        (lambda: LayerChange(every=0), "every=0"),
        (lambda: ModelConfig(pattern=(LayerChange(every=2, mixer=AttentionConfig(n_heads=4)),)), "32 and 64 channels"),
        (lambda: AttentionConfig(n_heads=0), "n_heads = 0"),
        (lambda: AttentionConfig(n_heads=8, n_kv_heads=3), "n_kv_heads = 3"),
        (lambda: AttentionConfig(head_dim=7), "head_dim = 7"),
        (lambda: AttentionConfig(window=0), "window = 0"),
        (
            lambda: replace(ALIBI, pattern=(LayerChange(every=2, mixer=AttentionConfig(n_heads=2)),)),
            "different n_heads",
        ),
        (lambda: ModelConfig(mixer=MambaConfig()), "kind = '?rope'?"),
        (lambda: MambaConfig(d_state=0), "d_state = 0"),
        (lambda: LinearAttentionConfig(n_heads=0), "n_heads = 0"),
        (lambda: FavorConfig(n_features=0), "n_features = 0"),
        (lambda: replace(LINEAR, d_model=30), "d_model = 30"),
        (lambda: replace(PERFORMER, d_model=516), "129 channels"),
        (lambda: LongformerConfig(window=1), "window = 1"),
        (lambda: BigBirdConfig(block=0), "block = 0"),
        (lambda: GridAttentionConfig(text=0), "text = 0"),
        (lambda: GridAttentionConfig(kernel=4), "kernel = 4"),
        (lambda: GridPositionConfig(width=0), "width = 0"),
        (
            lambda: ModelConfig(vocab_size=8, head=LanguageHeadConfig(weights=(TargetWeight(first=8, weight=7.0),))),
            "first=8",
        ),
        (lambda: ModelConfig(mixer=GridAttentionConfig()), "kind = '?rope'?"),
        (lambda: replace(DALLE, causal=False), "causal = false: with mixer.kind=grid"),
        (
            lambda: replace(MAMBA, causal=False),
            "causal = false: with mixer.kind=mamba, which looks back only: set",
        ),
        (lambda: replace(HYBRID, causal=False), "causal = false: with mixer.kind=mamba"),
        (
            lambda: replace(BERT, mixer=MambaConfig(), position=NoPositionConfig()),
            "causal = false: with mixer.kind=mamba",
        ),
        (lambda: replace(GPT2, mixer=LongformerConfig()), "causal = true: with mixer.kind=longformer"),
        (lambda: replace(DALLE, mixer=replace(ROW, width=5)), "width=5"),
        (lambda: replace(DALLE, max_seq_len=27), "max_seq_len = 27"),
        (lambda: build_model(DALLE, kernel="blockwise"), "no sparse masks"),
        *(
            (
                lambda config=config, position=position: replace(config, position=position),
                f"{position.kind}': with mixer.kind",
            )
            for config in (MAMBA, LINEAR, replace(BERT, mixer=BigBirdConfig(n_heads=4)))
            for position in (AlibiConfig(), RelativePositionConfig())
        ),
        (lambda: replace(BERT, causal=True, head=ClassifierHeadConfig()), "head.pool first"),
        (lambda: preset("vit-base", causal=True), "causal = true: with model.head.kind=classifier"),
        (lambda: PatchFrontendConfig(image_size=30), "patch_size = 16: image_size 30"),
        (lambda: replace(LLAMA, pattern=(LayerChange(first=99),)), "first=99 with n_layers=2"),
        (lambda: TargetWeight(weight=-1.0), "weight=-1.0"),
        (lambda: Sampling(within=(3, 3)), r"within = \(3, 3\)"),
        (lambda: FfnConfig(d_ff=0), "d_ff = 0"),
        (lambda: NormConfig(eps=0.0), "eps = 0.0"),
        (lambda: NormConfig(kind="rms", bias=True), "bias = true"),
        (lambda: RopeConfig(theta=1.0), "theta = 1.0"),
        (lambda: RopeConfig(channels=3), "channels = 3"),
        (lambda: ModelConfig(d_model=32, position=RopeConfig(channels=6)), "channels = 6"),
        (lambda: LinearScaling(factor=0.5), "factor = 0.5"),
        (lambda: Llama3Scaling(low_freq_factor=4.0, high_freq_factor=1.0), "low_freq_factor=4.0"),
        (lambda: InitConfig(std=-1.0), "std = -1.0"),
        (lambda: LoraConfig(rank=0), "lora.rank = 0"),
        (lambda: BottleneckConfig(width=0), "bottleneck.width = 0"),
        (lambda: PromptConfig(tokens=0), "prompt.tokens = 0"),
        (lambda: PrefixConfig(tokens=0), "prefix.tokens = 0"),
        (lambda: Sampling(temperature=-1.0), "temperature = -1.0"),
        (lambda: Sampling(top_p=0.0), "top_p = 0.0"),
        (lambda: build_model(ModelConfig()), "vocab_size = null"),
        (lambda: build_model(LLAMA, kernel="flash9"), "kernel = 'flash9'"),
    ],
)
def test_an_impossible_setting_is_refused_naming_its_value(make: Callable[[], object], value: str) -> None:
    with pytest.raises(Refusal, match=value) as caught:
        make()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_window_with_a_kernel_that_has_none_is_refused_at_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel there is has windows; one that lost them is asked for."""
    monkeypatch.setitem(CAN, "varlen", CAN["varlen"] - {"window"})
    with pytest.raises(Refusal, match=r"'varlen': it has no window masks, .* Choose auto or one of"):
        build_model(MISTRAL, kernel="varlen")
    build_model(LLAMA, kernel="varlen")


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Refusal("d_model", 0, "at least 1")))
    assert (type(error), str(error), error.exit_code) == (Refusal, "d_model = 0: at least 1.", 2)


@pytest.mark.parametrize(
    "config", [LLAMA, GPT2, DALLE, *RECURRENT.values()], ids=["llama", "gpt2", "dalle", *RECURRENT.keys()]
)
def test_a_configuration_survives_being_written_as_plain_values(config: ModelConfig) -> None:
    assert from_plain(ModelConfig, yaml.safe_load(yaml.safe_dump(to_plain(config))), "model") == config


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_every_preset_builds_without_memory_and_has_the_size_its_name_says(path: Path) -> None:
    vocab_size, total = PUBLISHED.get(path.stem, (4096, None))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = from_plain(ModelConfig, {**values, "vocab_size": vocab_size}, "model")
    counted = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
    assert counted == parameter_counts(config).total
    assert total is None or counted == total
