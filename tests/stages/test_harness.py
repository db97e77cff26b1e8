"""Claims about the harness model: transformers behind the harness's own adapter answers the same on the export."""

from __future__ import annotations

import json

import pytest

from data.text.document import Document
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.evaluation import harness, harness_tasks, held_out
from pipelines.evaluation.task_data import make_examples
from pipelines.inference.weights import load_model
from pipelines.stages import evaluate, export
from tests.stages.grouping import by_kind

LONG = "".join(f"value_{i} = compute({i}, other={i * i})\n" for i in range(40))
PAIRS = [
    ("def f(x):\n    return", " x + 1\n"),
    ("def f(x):\n    return ", "x"),
    ("", "import os\n"),
    ("import", " sys"),
    (LONG, "total = value_1\n"),  # prompt longer than the model's 128 tokens: its beginning goes
    ("a", "\n"),
]


@pytest.fixture(scope="module")
def models(small_run, tmp_path_factory, in_process):
    """(ours, the harness's HFLM on the export with <s> before a prompt, the same without)."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out_dir = tmp_path_factory.mktemp("export")
    export.run(
        export.ExportSettings(weights="pretrain", sample_documents=1), by_kind(small_run), out_dir, in_process(out_dir)
    )
    theirs = AutoModelForCausalLM.from_pretrained(out_dir / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(out_dir / "model")
    ours = harness.HarnessModel(load_model(out_dir / "model"), Tokenizer.load(out_dir / "model"), tokens_per_batch=600)
    shared = {"pretrained": theirs, "tokenizer": tokenizer, "batch_size": 3, "device": "cpu"}
    return ours, HFLM(**shared, add_bos_token=True), HFLM(**shared, add_bos_token=False)


def test_lines_of_an_example_end_at_line_ends_alone():
    """The library's own modules hold form feeds; a line beside one stays whole."""
    lines = [f"the_{n} line of \x0c text \u2028 number {n}" for n in range(40)]
    document = Document(text="\n".join(lines) + "\n", source="a.py", position=0)
    examples = make_examples("next_line", [document], limit=20, seed=0)
    assert examples
    assert {choice for example in examples for choice in example["choices"]} <= set(lines)


def ask(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def test_loglikelihoods_equal_those_of_transformers_in_the_harness(models):
    ours, theirs, _ = models
    requests = ask("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    for (nats, greedy), (their_nats, their_greedy) in zip(found, expected, strict=True):
        assert nats == pytest.approx(their_nats, rel=1e-5, abs=1e-4)  # fp32 log-softmax of a few tokens
        assert greedy == their_greedy
    assert len({round(nats, 3) for nats, _ in found}) == len(PAIRS)


def test_a_continuation_the_model_would_write_counts_as_greedy(models):
    ours, _, _ = models
    [text] = ours.generate_until(ask("generate_until", ("def f(", {"until": ["\n"], "max_gen_toks": 3})))
    ids = ours.tok_encode("def f(")
    written = ours.tok_encode(text, add_special_tokens=False)
    [(_, greedy)] = ours._loglikelihood_tokens([(("", ""), ids, written)])
    assert written
    assert greedy


def test_rolling_loglikelihoods_equal_those_of_transformers_in_the_harness(models):
    ours, _, theirs = models  # with <s> added before the text HFLM would also score that <s>
    requests = ask("loglikelihood_rolling", (LONG,), ("short",), (LONG[:900] * 2,))
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


def test_generated_texts_equal_those_of_transformers_in_the_harness(models):
    ours, theirs, _ = models
    given = [
        (prompt, {"until": until, "max_gen_toks": 12, "do_sample": False})
        for prompt in ("def f(x):\n", "import os", LONG)
        for until in (["\n"], ["e", " "], [])
    ]
    requests = ask("generate_until", *given)
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_examples_are_a_function_of_documents_and_seed(small_run):
    documents = held_out.choose(small_run["corpus"].path, evaluate.EvaluateSettings()).documents
    once = make_examples("next_line", documents, limit=30, seed=1)
    assert once == make_examples("next_line", documents, limit=30, seed=1)
    assert once != make_examples("next_line", documents, limit=30, seed=2)
    assert len(once) == 30


def test_the_right_answer_of_an_example_is_what_the_document_says(small_run):
    documents = held_out.choose(small_run["corpus"].path, evaluate.EvaluateSettings()).documents
    texts = [document.text for document in documents]
    for example in make_examples("next_line", documents, limit=20, seed=0):
        right = example["context"] + example["choices"][example["answer"]]
        assert any(right in text for text in texts)
        assert len({choice.strip() for choice in example["choices"]}) == 4
        indents = {len(choice) - len(choice.lstrip()) for choice in example["choices"]}
        assert len(indents) == 1
    for example in make_examples("close_bracket", documents, limit=20, seed=0):
        assert any(f"{example['prompt']}{example['answer']}\n" in text for text in texts)
        assert set(example["answer"]) <= set(")]}:")


def test_no_answer_stands_at_the_same_place_more_often_than_chance_allows(small_run):
    documents = held_out.choose(small_run["corpus"].path, evaluate.EvaluateSettings()).documents
    answers = [example["answer"] for example in make_examples("next_line", documents, limit=200, seed=0)]
    # 200 draws of probability 1/4: five standard deviations
    assert all(abs(answers.count(place) - 50) < 31 for place in range(4))


def test_a_users_own_task_runs_with_data_beside_its_file(small_run, models, tmp_path):
    (tmp_path / "capitals.yaml").write_text(
        "task: capitals\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        "dataset_kwargs: {data_files: capitals.jsonl}\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    lines = [{"q": "Paris is in", "c": ["France", "Peru"], "a": i % 2, "document": {"a": 1}} for i in range(4)]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = evaluate.EvaluateSettings(tasks=("capitals",), task_folders=(str(tmp_path),), bootstrap_resamples=20)
    assert {path.name for path in evaluate.task_files(settings)} == {"capitals.yaml", "capitals.jsonl"}
    found = harness_tasks.run_tasks(models[0], [], settings, tmp_path / "out")
    assert found["capitals"]["acc"]["value"] == 0.5
    assert found["capitals"]["examples"] == 4
    assert len((tmp_path / "out" / "capitals.jsonl").read_text().splitlines()) == 4


def test_a_task_without_enough_examples_is_skipped_with_its_reason(models, tmp_path):
    found = harness_tasks.run_tasks(models[0], [], evaluate.EvaluateSettings(tasks=("close_bracket",)), tmp_path)
    assert found == {"close_bracket": {"skipped": "the held-out documents give 0 examples", "examples": 0}}


@pytest.fixture(scope="module")
def every_metric(small_run, tmp_path_factory):
    """A folder of tasks that have each metric of the harness, two filters and two ways of averaging a group."""
    folder = tmp_path_factory.mktemp("metrics")
    choices = [["x", "y", "z"][: 2 + number % 2] for number in range(11)]
    lines = [
        {
            "prompt": f"def f_{n}(x):\n    return",
            "choices": [f" {c}" for c in choices[n]],
            "answer": n % 2,
            "text": f" {n} + x",
        }
        for n in range(11)
    ]
    for name, count in (("eleven", 11), ("seven", 7)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))

    def write(name, data, metrics, **more):
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / data)}}}
        config |= {
            "test_split": "test",
            "target_delimiter": "",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{text}}",
        }
        config |= {"metric_list": [{"metric": metric} for metric in metrics], "num_fewshot": 1, **more}
        (folder / f"{name}.yaml").write_text(json.dumps(config))

    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    write("words", "eleven.jsonl", ["word_perplexity", "byte_perplexity", "bits_per_byte"],
          output_type="loglikelihood_rolling", num_fewshot=0)  # fmt: skip
    write("likely", "eleven.jsonl", ["perplexity", "acc"], output_type="loglikelihood")
    write("chosen", "eleven.jsonl", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info", "mcc"], **choice)
    write("binary", "seven.jsonl", ["acc", "f1", "brier_score"], **choice | {"doc_to_choice": [" x", " y"]})
    written = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}}
    write("written", "eleven.jsonl", ["bleu", "chrf", "ter", "exact_match"], **written)
    first = {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\w)"}, {"function": "take_first"}]}
    write("filtered", "eleven.jsonl", ["exact_match"], **written,
          filter_list=[{"name": "all", "filter": [{"function": "take_first"}]}, first])  # fmt: skip
    averaged = [{"metric": "acc", "weight_by_size": False}]
    (folder / "plain.yaml").write_text(
        json.dumps({"group": "plain", "task": ["chosen", "binary"], "aggregate_metric_list": averaged})
    )
    (folder / "sized.yaml").write_text(
        json.dumps({"group": "sized", "task": ["chosen", "binary"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    return folder


def test_every_figure_is_that_of_simple_evaluate(small_run, every_metric, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours = harness.HarnessModel(
        load_model(small_run["pretrain"].path / "model"),
        Tokenizer.load(small_run["tokenizer"].path),
        tokens_per_batch=600,
    )
    names = ("words", "likely", "written", "filtered", "plain")
    settings = evaluate.EvaluateSettings(
        tasks=(*names, "sized"), task_folders=(str(every_metric),), bootstrap_resamples=50, seed=3
    )
    found = harness_tasks.run_tasks(ours, [], settings, tmp_path)
    manager = TaskManager(include_path=str(every_metric), include_defaults=False)
    theirs: dict = {}
    for asked in (list(names), ["sized"]):  # the harness takes no two groups with one task
        options = {"task_manager": manager, "bootstrap_iters": 0, "fewshot_random_seed": 3}
        theirs |= simple_evaluate(model=ours, tasks=asked, **options)["results"]
    compared = 0
    for name, figures in theirs.items():
        filters = {key.partition(",")[2] for key in figures if "," in key}
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                shown = found[name][metric if len(filters) == 1 else f"{metric}_{kind}"]
                assert shown["value"] == pytest.approx(float(value), rel=1e-12), (name, key)
                compared += 1
    assert compared == 3 + 2 + 4 + 2 + 5 + 3 + 1 + 1
    perplexity = found["words"]["word_perplexity"]
    assert 1 < perplexity["low"] < perplexity["value"] < perplexity["high"]  # not the mean of log-likelihoods, -18.23
    for metric in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):  # six questions of two choices and five of three
        assert found["chosen"][metric]["chance"] == pytest.approx((6 / 2 + 5 / 3) / 11)
    assert found["chosen"]["mcc"]["chance"] == 0.0
    assert found["binary"]["brier_score"]["chance"] == 0.5
    # Of seven answers three are the second: random guesses have precision 3/7 and recall 1/2, F1 near 0.46.
    assert found["binary"]["f1"]["chance"] == pytest.approx(0.44, abs=0.04)
    assert found["plain"]["acc"]["chance"] == pytest.approx((found["chosen"]["acc"]["chance"] + 0.5) / 2)
    assert found["likely"]["acc"]["chance"] is None
    assert len((tmp_path / "filtered.jsonl").read_text().splitlines()) == 22


def test_a_task_with_nothing_right_has_an_interval_with_a_width_and_one_with_four_examples_none(every_metric, tmp_path):
    class Wrong(harness_tasks._StubModel):
        def generate_until(self, requests, disable_tqdm=False):
            return ["wrong" for _ in requests]

    own = {"task_folders": (str(every_metric),), "bootstrap_resamples": 20}
    settings = evaluate.EvaluateSettings(tasks=("written", "binary"), **own)
    found = harness_tasks.run_tasks(Wrong(128), [], settings, tmp_path)
    wrong = found["written"]["exact_match"]
    assert (wrong["value"], wrong["low"]) == (0.0, 0.0)
    assert wrong["high"] == pytest.approx(3.8414588 / (11 + 3.8414588))
    lines = (every_metric / "seven.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "four.jsonl").write_text("".join(lines[:4]))
    config = json.loads((every_metric / "binary.yaml").read_text())
    config |= {"task": "four", "dataset_kwargs": {"data_files": "four.jsonl"}}
    (tmp_path / "four.yaml").write_text(json.dumps(config))
    settings = evaluate.EvaluateSettings(tasks=("four",), task_folders=(str(tmp_path),))
    figure = harness_tasks.run_tasks(Wrong(128), [], settings, tmp_path)["four"]["acc"]
    assert (figure["low"], figure["high"]) == (None, None)
    assert figure["missing"] == "4 examples, and an interval takes at least 5"


def test_a_perplexity_too_large_for_a_float_is_said_and_not_a_traceback():
    from lm_eval.api.metrics import weighted_perplexity

    from pipelines.evaluation.harness_figures import Aggregation, Figure
    from pipelines.evaluation.intervals import Interval

    value = Aggregation(weighted_perplexity)([(-9000.0, 1)] * 6)  # a page without spaces is one word
    shown = Figure(found=Interval(value, None, None)).shown()
    assert (shown["value"], shown["missing"]) == (None, "the harness's aggregation gives inf")


def test_examples_of_four_documents_have_no_interval_however_many_they_are(small_run, tmp_path):
    documents = held_out.choose(small_run["corpus"].path, evaluate.EvaluateSettings(max_documents=4)).documents
    settings = evaluate.EvaluateSettings(tasks=("next_line",), task_examples=60)
    found = harness_tasks.run_tasks(harness_tasks._StubModel(128), documents, settings, tmp_path)["next_line"]
    assert found["examples"] > 20
    assert found["acc"]["low"] is None and found["acc"]["chance"] == 0.25
    assert found["acc"]["missing"] == "4 documents, and an interval takes at least 5"
