"""Our model as an lm-evaluation-harness model, and tasks run on it without a network.

    HarnessModel(model, tokenizer)                            # loglikelihood, loglikelihood_rolling, generate_until
    run_tasks(harness, documents, settings, out_dir)          # {"next_line": {"acc": {"value", "low", "high"}, ...}}

Texts become tokens as in training: `<s>` first, control strings inside a text stay text. Truncation is the harness's
own (`HFLM`): a prompt loses its beginning, a rolling text is cut into windows side by side.

Importing this module imports lm-evaluation-harness (about two seconds), so only the task that needs it does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from data.document import Document
from data.tokenizer import Tokenizer
from model.architectures import Transformer
from model.generate import Sampling, generate
from pipelines.engine.step import EngineError
from pipelines.stages.evaluate_settings import EvaluateSettings, task_path
from pipelines.stages.intervals import mean_interval
from pipelines.stages.scoring import score_sequences
from pipelines.stages.task_data import make_examples

# Read when `datasets` is imported: a task's data are local files, and a machine without a network must not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as evaluate_tasks
from lm_eval.models.utils import normalize_gen_kwargs

MOST_NEW_TOKENS = 256
FEWEST_EXAMPLES = 4


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
        options = dict(normalize_gen_kwargs(options, MOST_NEW_TOKENS))
        until, new_tokens = list(options["until"]), int(options["max_gen_toks"])
        if new_tokens >= self.max_length:
            raise EngineError(
                f"A task asks for {new_tokens} new tokens of a model made for {self.max_length}: no room is left for "
                "its prompt. Set generation_kwargs.max_gen_toks in the task's file to less."
            )
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


def run_tasks(
    harness: HarnessModel, documents: Sequence[Document], settings: EvaluateSettings, out_dir: Path
) -> dict[str, Any]:
    """Run `settings.tasks`; {task: {metric: {"value", "low", "high"}, "examples": n}}, or {"skipped": why} for a task
    that these documents give too few examples for. Each example and its answers go to `out_dir`/TASK.jsonl."""
    out_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    loaded: dict[str, ConfigurableTask] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):  # tqdm, one bar per call
        for name in settings.tasks:
            config = _load_task(name, settings)
            maker = config.pop("made_from", None)
            if maker is not None:
                examples = make_examples(maker, documents, limit=settings.task_examples, seed=settings.seed)
                if len(examples) < FEWEST_EXAMPLES:
                    results[name] = {"skipped": f"the held-out documents give {len(examples)} examples", "examples": 0}
                    continue
                path = Path(scratch) / f"{name}.jsonl"
                path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
                config["dataset_kwargs"] = {"data_files": {config["test_split"]: str(path)}}
            config["dataset_kwargs"] = {"cache_dir": scratch, **config.get("dataset_kwargs", {})}
            loaded[name] = ConfigurableTask(config=config)
            loaded[name].set_fewshot_seed(settings.seed)
        found = evaluate_tasks(harness, loaded, bootstrap_iters=0, log_samples=True) if loaded else None
    for name in loaded:
        assert found is not None
        answers = found["samples"][name]
        results[name] = _figures(found["results"][name], answers, settings) | {"examples": len(answers)}
        lines = (json.dumps(_answered(answer), default=str) + "\n" for answer in answers)
        (out_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: results[name] for name in settings.tasks}


def _load_task(name: str, settings: EvaluateSettings) -> dict[str, Any]:
    """The task's configuration, with the data files of its own read relative to its YAML file."""
    path = task_path(name, settings.task_folders)
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise EngineError(
            f"{path} is not plain YAML ({error}). Only declarative harness tasks run here: no `!function`."
        ) from error
    data_files = config.get("dataset_kwargs", {}).get("data_files")
    if data_files is not None:
        by_split = data_files if isinstance(data_files, dict) else {config["test_split"]: data_files}
        config["dataset_kwargs"]["data_files"] = {split: str(path.parent / file) for split, file in by_split.items()}
    return {**config, "task": name}


def _figures(found: dict[str, Any], answers: list[dict[str, Any]], settings: EvaluateSettings) -> dict[str, Any]:
    """Each metric with its interval over the examples; without one where the metric is no mean of the examples."""
    figures: dict[str, Any] = {}
    for key, value in found.items():
        metric, _, _ = key.partition(",")
        if "," not in key or metric.endswith("_stderr"):
            continue
        values = [answer[metric] for answer in answers if isinstance(answer.get(metric), int | float)]
        if len(values) == len(answers):
            mean = mean_interval(values, resamples=settings.bootstrap_resamples, seed=settings.seed)
            figures[metric] = {"value": mean.value, "low": mean.low, "high": mean.high}
        else:
            figures[metric] = {"value": float(value), "low": None, "high": None}
    return figures


def _answered(answer: dict[str, Any]) -> dict[str, Any]:
    """One line of the answers' file: the example, what the model said, and what that scored."""
    return {
        "example": answer["doc"],
        "answers": answer["filtered_resps"],
        "scores": {name: answer[name] for name in answer["metrics"]},
    }


def _before(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the `until` strings."""
    return min((text.split(end, 1)[0] for end in until if end), key=len, default=text)
