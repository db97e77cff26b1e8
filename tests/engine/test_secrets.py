"""Secrets are recognised by the names of variables and by the looks of values, and are never written."""

from __future__ import annotations

import os

import pytest

from conf.refusal import Refusal
from pipelines.engine.secrets import COMMAND, record_command, refuse_secrets, without_secrets

OURS = {
    "GITHUB_PAT": "abc-0123456789",
    "API_TOKEN": "s3cr3t",
    "DB_PASS": "hunter2",
    "DATABASE_URL": "postgres://me:p%40ss-word@db:5432/x",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "WEBHOOK": "https://host/hook?token=abcdef123",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("GITHUB_PAT", "x abc-0123456789 y"),
        ("API_TOKEN", "s3cr3t"),
        ("API_TOKEN", "https://host/s3cr3t/file"),
        ("DB_PASS", "me:hunter2"),
        ("DATABASE_URL", "p%40ss-word"),
        ("DATABASE_URL", "p@ss-word"),
        ("DATABASE_URL", OURS["DATABASE_URL"]),
        ("WANDB_API_KEY", f"x{OURS['WANDB_API_KEY']}x"),
        ("WEBHOOK", "abcdef123"),
    ],
)
def test_the_environments_secrets_are_refused_and_blotted_out(name: str, text: str) -> None:
    with pytest.raises(Refusal, match=name):
        refuse_secrets({"a": [text]}, "pretrain: its settings")
    assert f"<{name}>" in without_secrets({"a": text})["a"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a GitHub token", "ghp_" + "a1B2" * 9),
        ("a GitHub token", "github_pat_" + "a1B2_" * 8),
        ("a GitLab token", "glpat-" + "a1B2" * 5),
        ("a Hugging Face token", "hf_" + "aB" * 17),
        ("an API key", "sk-proj-" + "a1B2" * 8),
        ("an AWS access key", "AKIA" + "A1B2" * 4),
        ("a Google key", "AIza" + "a1B2c" * 7),
        ("a Slack token", "xoxb-" + "1234567890-abc"),
        ("a JSON web token", "eyJ" + "a" * 12 + ".eyJ" + "b" * 12 + "." + "c" * 12),
        ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("a password inside a URL", "https://me:opensesame@host/data"),
        ("a password inside a URL", "s3://me:op3n@bucket/x"),
        ("a key inside a URL", "https://host/x?a=1&X-Amz-Signature=0123456789abcdef"),
    ],
    ids=lambda value: "x",  # pytest puts the parameters into the environment
)
def test_values_that_look_like_secrets_are_refused_whatever_the_environment_says(kind: str, text: str) -> None:
    with pytest.raises(Refusal, match=kind):
        refuse_secrets({"prompts": [f"see {text} there"]}, "evaluate: its settings")
    blotted = without_secrets({"x": f"see {text} there"})["x"]
    assert f"<{kind}>" in blotted and text not in blotted


@pytest.mark.parametrize(
    "settings",
    [
        {"paths": ["s3://bucket/prefix", "/data/text", "~/books"], "lr": 0.003, "total_tokens": 200_000},
        {"url": "http://127.0.0.1:9000/x@y", "git": "git@github.com:a/b.git", "words": "keys, tokens and secrets"},
        {
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "flag": False,
            "mode": "default",
        },
        {"text": "a skill-set", "sk": "task-sk-1", "hidden": "hunter22 s3cr3ts", "hf": "hf_small"},
    ],
)
def test_ordinary_settings_are_none(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "MAX_TOKENS": "200000",
        "PWD": "/data/text",
        "GOOGLE_APPLICATION_CREDENTIALS": "/data/text",
        "SORT_KEY": "prefix",
        "USE_AUTH": "1",
        "AUTH_MODE": "default",
    }.items():
        monkeypatch.setenv(name, value)
    refuse_secrets(settings, "settings")
    assert without_secrets(settings) == settings


def test_a_refusal_gives_the_pattern_first_and_our_own_command_line_is_no_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "postgres://u:pw0123@h/db"
    monkeypatch.setenv(COMMAND, f"athanor run tracking.entity={url}")
    with pytest.raises(Refusal, match=r"^tracking\.entity: contains a password inside a URL\. Secrets"):
        refuse_secrets(url, "tracking.entity")
    with pytest.raises(Refusal, match=r"contains a password inside a URL \(.* environment variable DATABASE_URL\)"):
        refuse_secrets(OURS["DATABASE_URL"], "store=…")


def test_the_recorded_command_line_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "athanor run store=s3cr3t")
    record_command(["athanor", "generate", "--prompt", "postgres://u:pw0123@h/db s3cr3t", "store=a b"])
    assert os.environ[COMMAND] == (
        "athanor generate --prompt 'postgres://u:<a password inside a URL>@h/db <API_TOKEN>' 'store=a b'"
    )
