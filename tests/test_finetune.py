"""Fine-tuning on a user's own conversations, through the command line: from jsonl to answers, and tracked on the way."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.conftest import LOCAL, athanor, tiny
from tests.training.test_metrics import history, references, wandb_records

pytestmark = pytest.mark.slow


def conversations(path: Path) -> Path:
    """Forty short ones, of one answer and of two."""
    lines = []
    for number in range(40):
        messages = [
            {"role": "user", "content": f"What is {number} and one?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
        if number % 2:
            messages += [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": f"{number + 1}, yes."},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lora_on_ones_own_conversations_from_jsonl_to_an_answer_with_its_lineage_tracked(
    corpus_dir: Path, tmp_path: Path
) -> None:
    kept = [word for word in tiny(corpus_dir, tmp_path / "store") if word not in ("finetune=library", "tracking=off")]
    kept.remove("finetune.data.max_conversations=60")
    words = [*kept, LOCAL, "finetune=chat-lora", "tracking=wandb", "tracking.mode=offline"]
    words.append(f"finetune.data.paths=[{conversations(tmp_path / 'chats.jsonl')}]")
    result = athanor("run", *words)
    made = {path.parts[-3]: path.parent for path in (tmp_path / "store").glob("*/*/manifest.json")}
    figures = {name: json.loads((folder / "manifest.json").read_text())["metrics"] for name, folder in made.items()}
    assert figures["finetune"]["steps"] > 1
    assert (made["finetune"] / "adapter" / "adapter_config.json").exists()
    weights = [(made[name] / "model" / "model.safetensors").read_bytes() for name in ("pretrain", "finetune")]
    assert weights[0] != weights[1] and len(weights[0]) == len(weights[1])
    assert figures["export"]["max_logit_error"] < 1e-3
    answer = athanor("generate", *words, "--chat", "--prompt", "What is 3 and one?", "--max-tokens", "8", "--seed", "1")
    assert "tokens/s" in answer.stderr and "athanor generate" in result.stdout

    # Only now, after publishing, what the offline files refer to has to be there.
    expected = {"pretrain": {"shards", "tokenizer"}, "finetune": {"pretrain", "instructions", "tokenizer"}}
    for step, inputs in expected.items():
        [file] = made[step].rglob("*.wandb")
        records = wandb_records(file)
        assert [number for number, _ in history(records)] == list(range(1, figures[step]["steps"] + 1))
        used, written = references(records)
        assert set(used) == {f"{name}-{made[name].name}" for name in inputs}
        assert set(written) == {f"{step}-{made[step].name}"}
        for _, uri, _ in (*used.values(), *written.values()):
            assert Path(unquote(urlparse(uri).path), "manifest.json").exists(), uri
        [(kind, uri, metadata)] = written.values()
        assert kind == "model" and Path(urlparse(uri).path, "model", "config.json").exists()
        digest = json.loads((made["tokenizer"] / "manifest.json").read_text())["digest"]
        assert metadata["made_from"]["tokenizer"] == {"digest": digest, "url": str(made["tokenizer"])}

    # The scores stand in the runs of these, under their ids, and the tables beside them.
    for step in ("pretrain", "finetune"):
        [file] = (made["evaluate"] / "logs" / step).rglob("*.wandb")
        records, trained = wandb_records(file), wandb_records(next(made[step].rglob("*.wandb")))
        one, other = (next(record.run for record in found if record.HasField("run")) for found in (records, trained))
        assert (one.run_id, one.job_type, one.run_group) == (other.run_id, step, "text")
        assert one.display_name == other.display_name == f"text {step} {made[step].name[:8]}"
        scores = {"/".join(item.nested_key) or item.key: item.value_json for r in records for item in r.summary.update}
        assert json.loads(scores["eval/bits_per_byte"]) == figures["evaluate"]["bits_per_byte"]
        assert ("eval/finetuned_bits_per_byte" in scores) == (step == "finetune")
        config = {item.key: json.loads(item.value_json) for item in other.config.update}
        assert (config["experiment"], config["store"], config["ranks"]) == ("text", str(tmp_path / "store"), 1)
        assert config["command"].startswith("athanor run experiment=text") and "commit" in config
        environment = next(r.environment for r in trained if r.HasField("environment"))
        assert [environment.program, *environment.args][:3] == ["athanor", "run", "experiment=text"]
        _, written = references(records)
        assert set(written) == {f"evaluate-{made['evaluate'].name}"}
