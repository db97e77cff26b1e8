"""Our model as an lm-evaluation-harness model.

    HarnessModel(model, tokenizer)                            # loglikelihood, loglikelihood_rolling, generate_until

Texts become tokens as in training: `<s>` first, control strings inside a text stay text. Truncation is the harness's
own (`HFLM`): a prompt loses its beginning, a rolling text is cut into windows side by side.

Importing this module imports lm-evaluation-harness (about two seconds), so only the task that needs it does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from data.tokenizers.sentencepiece import Tokenizer
from model.architecture import Transformer
from model.decoding.generate import Sampling, generate
from pipelines.evaluation.harness_tasks import generation_options
from pipelines.evaluation.scoring import score_sequences


class HarnessModel(TemplateLM):
    """A `Transformer` and its tokenizer behind the harness's three questions, each answered in batches."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_length: int | None = None, tokens_per_batch: int = 8192
    ) -> None:
        """max_length: tokens per window, prompt and continuation together; none: the model's max_seq_len."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.tokens_per_batch = tokens_per_batch
        self.max_length = max_length or model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """`</s>`, which ends a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """`<s>`, which the harness puts before a text without context."""
        return self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with `<s>` in front unless `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.tokenizer.bos_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:  # the two melt into the context's last token: ask for the continuation's own tokens
            continuation_ids = self.tok_encode(continuation, add_special_tokens=False)
        return context_ids, continuation_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether greedy decoding would give it) for each (texts, context, continuation)."""
        scores = score_sequences(
            self.model,
            [context + continuation for _, context, continuation in requests],
            first=[len(context) - 1 for _, context, _ in requests],
            context_tokens=self.max_length,
            stride_tokens=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
        )
        answers = [(-score.nats, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text after `<s>`, without a `</s>`."""
        scores = score_sequences(
            self.model,
            [self.tok_encode(*request.args) for request in requests],
            context_tokens=self.max_length,
            stride_tokens=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
        )
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -score.nats)
        return [-score.nats for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to (and without) the first of each request's `until` strings."""
        answers: dict[int, str] = {}
        numbered = sorted(enumerate(requests), key=lambda pair: json.dumps(pair[1].args[1], sort_keys=True))
        for _, group in groupby(numbered, key=lambda pair: json.dumps(pair[1].args[1], sort_keys=True)):
            batch = sorted(group, key=lambda pair: len(pair[1].args[0]))
            texts = self._continue([request.args[0] for _, request in batch], dict(batch[0][1].args[1]))
            for (number, request), text in zip(batch, texts, strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", request.args, text)
        return [answers[number] for number in range(len(requests))]

    def _continue(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        options = generation_options(options, self.max_length)
        until, new_tokens = list(options["until"]), int(options["max_gen_toks"])
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=float(options.get("temperature") or 0.0),
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p") or None,
        )
        prompts_ids = [self.tok_encode(prompt)[-(self.max_length - new_tokens) :] for prompt in prompts]
        rows = max(1, self.tokens_per_batch // self.max_length)
        texts = []
        for start in range(0, len(prompts), rows):
            generated = generate(
                self.model,
                prompts_ids[start : start + rows],
                sampling,
                stop_ids=(self.tokenizer.eos_id,),
                stop=lambda ids: any(text in self.tokenizer.decode(ids) for text in until),
            )
            texts += [_before(self.tokenizer.decode(ids), until) for ids in generated]
        return texts


def _before(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the `until` strings."""
    return min((text.split(end, 1)[0] for end in until if end), key=len, default=text)
