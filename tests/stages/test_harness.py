"""Claims about the harness model: transformers behind the harness's own adapter answers the same on the export."""

from __future__ import annotations

import json

import pytest

from data.document import Document
from data.tokenizer import Tokenizer
from pipelines.stages import evaluate, export, harness, harness_tasks, held_out
from pipelines.stages.task_data import make_examples
from pipelines.stages.weights import load_model

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
    export.run(export.ExportSettings(weights="pretrain", sample_documents=1), small_run, out_dir, in_process(out_dir))
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
    lines = [{"q": "Paris is in", "c": ["France", "Peru"], "a": i % 2} for i in range(4)]
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
