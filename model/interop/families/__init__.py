"""The Hugging Face classes our configurations can become: one declarative table each, one file per kin."""

from model.interop.families.bert import BERT_KIN
from model.interop.families.clip import CLIP, CLIP_LEGACY
from model.interop.families.deepseek import DEEPSEEK_V3
from model.interop.families.falcon import FALCON, FALCON_TWO_NORMS
from model.interop.families.gpt2 import GPT2
from model.interop.families.gptj import GPTJ
from model.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from model.interop.families.mamba import MAMBA
from model.interop.families.mixtral import MIXTRAL, QWEN3_MOE
from model.interop.families.seq2seq import BART, MARIAN
from model.interop.families.sparse import BIGBIRD, LONGFORMER
from model.interop.families.switch import SWITCH
from model.interop.families.t5 import T5_KIN
from model.interop.families.vit import VIT, VIT_MODEL
from model.interop.families.wav2vec2 import WAV2VEC2_KIN
from model.interop.families.whisper import WHISPER

FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT2, GPTJ, FALCON, FALCON_TWO_NORMS, MAMBA),
    *(*BERT_KIN, LONGFORMER, BIGBIRD),
    *(*T5_KIN, SWITCH, BART, MARIAN),
    *(VIT, VIT_MODEL, *WAV2VEC2_KIN, WHISPER, CLIP_LEGACY, CLIP),
)
