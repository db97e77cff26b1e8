"""Ours against transformers, on one exported folder: tokens, chat, logits, greedy continuations (not of an encoder).

The measure for "the same logits" is our own rounding: the model is run in fp32 and in fp64, and transformers in fp32
may differ from ours by a few times what these two do. A wrong epsilon, a rotated pair or a transposed matrix differs by
hundreds of times that.

Importing this module imports torch and transformers, so only the task that compares does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from conf.refusal import NO_VALUE, Refusal
from data.text.document import read_documents
from data.tokenizers.chat import encode_chat
from data.tokenizers.chat_jinja import TODAY
from data.tokenizers.sentencepiece import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.decoding.generate import Sampling, generate
from model.interop import has_hf_class, hf_config, load_pretrained
from pipelines.inference.weights import DTYPES

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

SAMPLE = "The sum of 17 and 25 is 42.\nLes œufs coûtent 3,50 €; 値段は変わらない。\n\tdef f(x): return x\n"
"""What is compared on where nothing was held out: weights from outside that are fine-tuned on conversations alone."""
DATES = "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in ("-d", *"aAbBdHIjmMpSuyYzZ"))
DATED = "{%- macro strftime_now(format) -%}{{ format" + DATES + " }}{%- endmacro -%}"
"""Before a chat template: it writes the day ours writes, `TODAY`, not the day of the export. (What transformers takes
beside the messages arrives in the template as text: no function, no date can be handed over.)"""
ROUNDING_MULTIPLE = 8
UNIT_ROUNDOFF = 2.0**-24
COMPARED_TOKENS = 256
PROMPT_TOKENS = 32


def check_export(
    source: Path,
    tokenizer_dir: Path,
    held_out: Sequence[Path],
    folder: Path,
    *,
    precision: Literal["fp32", "bf16"],
    sample_documents: int,
    generated_tokens: int,
) -> dict[str, Any]:
    """Figures of every comparison; of the tokenizer's alone where no Hugging Face class computes the model.

    `source` holds the weights as trained; they are rounded to the export's precision, and both sides compute in fp32.
    Raises Refusal for the first comparison that fails.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = Tokenizer.load(tokenizer_dir)
    theirs_tokenizer = read_tokenizer(folder)
    documents = sorted((d for place in held_out for d in read_documents(place)), key=lambda document: document.id)
    texts = [document.text for document in documents[:sample_documents]] or [SAMPLE]
    report = check_tokens(tokenizer, theirs_tokenizer, texts)

    config, state = load_pretrained(source)
    if not has_hf_class(config):
        return report
    rounded = {name: tensor.to(DTYPES[precision]).float() for name, tensor in state.items()}
    ours, exact = (_ready(config, rounded, dtype) for dtype in (torch.float32, torch.float64))
    theirs = _class_of(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    begin = None if config.encoder is None else int(theirs.config.decoder_start_token_id)
    length = min(config.max_seq_len, COMPARED_TOKENS)
    samples = [[tokenizer.bos_id, *ids][:length] for ids in tokenizer.encode_batch(texts)]
    logits = check_logits(ours, exact, theirs, samples, begin)
    if not config.causal:
        return report | logits
    prompts = [ids[: min(PROMPT_TOKENS, length // 2)] for ids in samples]
    new_tokens = min(generated_tokens, config.max_seq_len - max(map(len, prompts)))
    stop_ids = (tokenizer.eos_id, tokenizer.end_id)
    continued = check_continuations(ours, theirs, prompts, new_tokens, stop_ids, logits["tolerance"], begin)
    return report | logits | continued


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers loads it from its files. Raises Refusal if it cannot."""
    transformers_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise Refusal(
            folder,
            NO_VALUE,
            f"transformers cannot read the tokenizer here ({type(error).__name__}: {error}), which the export takes along",
            "give the files that transformers saves with save_pretrained",
        ) from error


def build_empty(config: ModelConfig, folder: Path) -> None:
    """Build the class that the weights will be loaded into, without memory, from the config.json in `folder`.

    Raises Refusal where transformers cannot.
    """
    transformers_logging.set_verbosity_error()
    try:
        theirs, described = _class_of(config), AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            theirs.from_config(described) if hasattr(theirs, "from_config") else theirs(described)
    except Exception as error:
        raise Refusal(
            "export",
            NO_VALUE,
            f"transformers {transformers.__version__} cannot build the model that would be exported "
            f"({type(error).__name__}: {error})",
            "repair config.json beside the weights, so that transformers loads them",
        ) from error


def check_tokens(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The same ids for the texts and for conversations made of them, and the same texts from the ids."""
    compared, fault = 0, ("a fault of the export, not of the settings", "report it (data/tokenizers/export.py)")
    options = {"add_special_tokens": False, "split_special_tokens": True}
    changed = sum(ours.decode(ours.encode(text)) != text for text in texts)
    own = isinstance(ours, SentencePieceTokenizer)
    if not own:  # T5's vocabulary spells `</s>`, and transformers reads it there
        texts = [without_control_pieces(ours, text) for text in texts]
        fault = (
            f"the folder's tokenizer.json goes out as it came in, and transformers' {type(theirs).__name__} reads it "
            "otherwise",
            'let transformers write what it reads: run python -c "from transformers import AutoTokenizer; '
            "AutoTokenizer.from_pretrained('.').save_pretrained('.')\" in the folder of the weights",
        )
    for number, text in enumerate(texts):
        ids = ours.encode(text)
        _same(f"tokens of held-out sample {number}", ids, theirs.encode(text, **options), fault)
        back = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        _same(f"text of sample {number}", ours.decode(ids), back, fault)
        compared += len(ids)
    conversations = 0
    forged = "".join(ours.control_pieces) if own else ""
    excerpt = texts[0][:200]
    backwards = excerpt[::-1] if own else without_control_pieces(ours, excerpt[::-1])
    for messages, prompt in _conversations(ours, excerpt + forged, backwards + forged):
        ids, _ = encode_chat(ours, messages, generation_prompt=prompt)
        rendered = theirs.apply_chat_template(
            messages,
            chat_template=DATED + theirs.get_chat_template(),
            add_generation_prompt=prompt,
            return_dict=False,
        )
        _same("chat template's tokens", ids, list(rendered), fault)
        compared, conversations = compared + len(ids), conversations + 1
    return {"compared_tokens": compared, "compared_conversations": conversations, "changed_texts": changed}


def without_control_pieces(tokenizer: Tokenizer, text: str) -> str:
    """A text in which transformers finds no control piece: taking one out may spell the next."""
    more = tokenizer.text_pieces if isinstance(tokenizer, HuggingFaceTokenizer) else ()
    spelled = re.compile("|".join(map(re.escape, (*tokenizer.control_pieces, *more))))
    while (rest := spelled.sub("", text)) != text:
        text = rest
    return rest


def _conversations(tokenizer: Tokenizer, question: str, answer: str) -> Iterator[tuple[list[dict[str, str]], bool]]:
    """(messages, whether an answer is asked for) that the chat template takes; some know no system message."""
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": f"  What is this?\n\n{question}"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Thanks.\n"},
    ]
    for until, prompt in ((3, False), (4, True)):
        for first in (0, 1):
            try:
                encode_chat(tokenizer, messages[first:until], generation_prompt=prompt)
            except Refusal:
                continue
            yield messages[first:until], prompt
            break


@torch.inference_mode()
def check_logits(
    ours: Transformer, exact: Transformer, theirs: Any, samples: Sequence[Sequence[int]], begin: int | None = None
) -> dict[str, Any]:
    """Largest difference over all logits of the samples, beside the rounding of fp32; and the share of equal argmaxes.

    `exact` is our model in fp64. Where two logits lie closer than the tolerance, either may win. begin: what the decoder
    behind an encoder starts with; both then read the sample.
    """
    error = rounding = largest = 0.0
    positions = agreed = 0
    for ids in samples:
        mine, yours = _inputs(ids, begin)
        ours_TV, exact_TV = ours(**mine)["logits"][0], exact(**mine)["logits"][0]
        theirs_TV = theirs(**yours).logits[0]
        error = max(error, float((theirs_TV - ours_TV).abs().max()))
        rounding = max(rounding, float((exact_TV - ours_TV).abs().max()))
        largest = max(largest, float(ours_TV.abs().max()))
        positions += len(ids)
        agreed += int((theirs_TV.argmax(-1) == ours_TV.argmax(-1)).sum())
    tolerance = ROUNDING_MULTIPLE * max(rounding, UNIT_ROUNDOFF * largest)
    if not error <= tolerance:  # a NaN fails, too
        raise Refusal(
            "export",
            NO_VALUE,
            f"it does not compute what was trained: transformers' logits differ by {error:.3g} (largest logit "
            f"{largest:.3g}), and rounding explains {tolerance:.3g}; the likeliest token agrees at {agreed} of {positions} "
            "positions",
            "report it (model/interop): a fault of the export, not of the settings",
        )
    return {
        "compared_positions": positions,
        "max_logit_error": error,
        "max_logit_error_relative": error / largest,
        "fp32_rounding": rounding,
        "tolerance": tolerance,
        "argmax_agreement": agreed / positions,
    }


@torch.inference_mode()
def check_continuations(
    ours: Transformer,
    theirs: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop_ids: tuple[int, ...],
    tolerance: float,
    begin: int | None = None,
) -> dict[str, Any]:
    """Greedy continuations of every prompt, ours with our cache and theirs with theirs: equal, token by token.

    begin: as in `check_logits`; an encoder reads the prompt, and the decoder continues from this token. They may part
    where the two likeliest tokens are closer than rounding; such ties are counted.
    """
    ties = 0
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    sources = None if begin is None else prompts
    starts = prompts if begin is None else [[begin]] * len(prompts)
    mine = generate(ours, starts, sampling, stop_ids=stop_ids, sources=sources)
    for number, (prompt, ids) in enumerate(zip(prompts, mine, strict=True)):
        tokens_BT = torch.tensor([prompt])
        out_BT = theirs.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            **({} if begin is None else {"forced_eos_token_id": None}),
        )
        found = [token for token in out_BT[0, len(starts[number]) :].tolist() if token not in stop_ids]
        if found == ids:
            continue
        parted = _parting(found, ids)
        memory = {} if begin is None else {"encoder_tokens_BT": tokens_BT}
        logits_V = ours(torch.tensor([[*starts[number], *ids[:parted]]]), **memory)["logits"][0, -1]
        first, second = logits_V.topk(2).values.tolist()
        if first - second > 2 * tolerance:
            raise Refusal(
                "export",
                NO_VALUE,
                f"it does not continue as the model does: prompt {number} parts at new token {parted}, where the likeliest "
                f"token leads by {first - second:.3g} and rounding explains {2 * tolerance:.3g}; ours: {ids[: parted + 1]}, "
                f"transformers': {found[: parted + 1]}",
                "report it: a fault of the export or of a cache",
            )
        ties += 1
    return {"greedy_continuations": len(prompts), "greedy_ties": ties}


def _class_of(config: ModelConfig) -> Any:
    """The class of transformers that has this model's head."""
    if config.causal and config.encoder is None:
        return AutoModelForCausalLM
    return getattr(transformers, hf_config(config)["architectures"][0])


def _inputs(ids: Sequence[int], begin: int | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a pass over a sample is given, in our words and in theirs."""
    tokens_BT = torch.tensor([ids])
    if begin is None:
        return {"tokens_BT": tokens_BT}, {"input_ids": tokens_BT}
    said_BT = torch.tensor([[begin, *ids[:-1]]])
    ours = {"tokens_BT": said_BT, "encoder_tokens_BT": tokens_BT}
    return ours, {"input_ids": tokens_BT, "decoder_input_ids": said_BT}


def _ready(config: ModelConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Transformer:
    model = build_model(config, device="meta", dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def _same(what: str, ours: Sequence[Any], theirs: Sequence[Any], fault: tuple[str, str]) -> None:
    """Raise unless the two are equal. fault: why they may not be, and the remedy."""
    if list(ours) == list(theirs):
        return
    at = _parting(ours, theirs)
    why, remedy = fault
    raise Refusal(
        "export",
        NO_VALUE,
        f"the exported tokenizer differs: {what} part at position {at}: ours {ours[at : at + 5]!r}, transformers' "
        f"{theirs[at : at + 5]!r}; {why}",
        remedy,
    )


def _parting(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """The first place where the two differ, which may be the end of the shorter."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (mine, yours) in pairs if mine != yours), min(len(ours), len(theirs)))
