"""Generate: continue a text, or answer a message, with a trained model; as it is written, if asked to.

    generator = TextGenerator.open(model_dir, tokenizer_dir)
    generator.generate("def ", GenerateSettings(max_new_tokens=64), on_text=print)

The `generate` verb and the samples of the evaluate stage both end here. `data.tokenizers.chat` renders a chat prompt as in
fine-tuning and in the export.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conf.refusal import NO_VALUE, Refusal

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer
    from model.adapt.quantize import Quantization
    from model.architecture import Transformer

Precision = Literal["fp32", "bf16"]
UNFINISHED = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How to continue: the same prompt, settings and seed give the same text."""

    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 0.8
    """Divisor of the logits before sampling; 0: always the most likely token."""
    top_k: int | None = None
    """Number of most likely tokens that are sampled from; 0 and null: every token."""
    top_p: float | None = 0.95
    """Share of probability whose most likely tokens are sampled from; null: every token."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise Refusal("max_new_tokens", self.max_new_tokens, "must be at least 1")
        if self.temperature < 0:
            raise Refusal("temperature", self.temperature, "must not be below 0; 0 is greedy, 1 the model's own")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise Refusal("top_p", self.top_p, "a probability above 0, at most 1; null keeps every token")
        if "" in self.stop:
            raise Refusal("stop", self.stop, "an empty text would end every completion at once", "remove it")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written, and how fast."""

    text: str
    tokens: int
    seconds: float
    finish: Literal["end", "stop", "length", "context"]
    """end: the model said so; stop: a stop text came; length, context: max_new_tokens or the context were used up."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate, reading the prompt included."""
        return self.tokens / self.seconds if self.seconds else 0.0


class TextGenerator:
    """A model and its tokenizer, ready to write."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def open(
        cls, model_dir: Path, tokenizer_dir: Path | None = None, *, precision: Precision = "fp32", device: str = "cpu"
    ) -> TextGenerator:
        """From a model folder (weights with config.json) and a tokenizer's; an exported folder is both."""
        from data.tokenizers.sentencepiece import Tokenizer
        from pipelines.inference.weights import load_model

        model = load_model(model_dir, precision=precision, device=device)
        if not model.config.causal or model.config.encoder is not None:
            raise Refusal(
                model_dir,
                NO_VALUE,
                "holds an encoder, or a decoder with one: it fills in what is hidden and continues no prompt",
                "load its export with transformers, or generate with a decoder",
            )
        return cls(model, Tokenizer.load(tokenizer_dir or model_dir))

    def quantize(self, kind: Quantization) -> str:
        """Fewer bits a weight (`model.adapt.quantize`); what was done in one line. Raises Refusal where it cannot be."""
        from model.adapt.quantize import QuantizedLinear, held_bytes, quantize, whole_maps

        before = held_bytes(self.model)
        quantize(self.model, kind)
        now = held_bytes(self.model)
        count, left = sum(isinstance(part, QuantizedLinear) for part in self.model.modules()), whole_maps(self.model)
        others = f"{len(left)} whose sizes do not fit, " if left else ""
        return (
            f"{kind}: {count} maps of the blocks are quantized, {others}embeddings, norms and head are not; the weights "
            f"take {now / 1e6:.1f} MB instead of {before / 1e6:.1f} MB"
        )

    def generate(
        self,
        prompt: str,
        settings: GenerateSettings,
        *,
        chat: bool = False,
        system: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Continue `prompt`, or with `chat` answer it as a user's message.

        `on_text` is called with each piece of text as soon as it is certain: whole characters, and nothing that could
        still turn out to be the beginning of a stop text. Raises Refusal for a prompt that leaves no room.
        """
        from model.decoding.generate import Sampling, generate

        ids = self.prompt_ids(prompt, chat=chat, system=system)
        room = self._room(ids)
        allowed = min(settings.max_new_tokens, room)
        stream = TextStream(self.tokenizer, settings.stop, on_text, after=ids[-1:])
        sampling = Sampling(
            max_new_tokens=allowed,
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        started = time.perf_counter()
        [new_ids] = generate(
            self.model,
            [ids],
            sampling,
            stop_ids=self.stop_ids,
            stop=lambda _: stream.stopped,
            on_token=lambda _, token: stream.feed(token),
        )
        stream.close()
        seconds = time.perf_counter() - started
        finish: Literal["end", "stop", "length", "context"] = "end"
        if stream.stopped:
            finish = "stop"
        elif len(new_ids) == allowed:
            finish = "length" if allowed == settings.max_new_tokens else "context"
        return Completion(text=stream.text, tokens=len(new_ids), seconds=seconds, finish=finish)

    def room(self, prompt: str, *, chat: bool = False) -> int:
        """How many tokens may follow a prompt. Raises Refusal for one that leaves no room."""
        return self._room(self.prompt_ids(prompt, chat=chat))

    def _room(self, ids: Sequence[int]) -> int:
        return check_room(len(ids), self.model.config.max_seq_len)

    def prompt_ids(self, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
        """`<s>` and the prompt's tokens; with `chat` the rendered messages up to where the assistant begins."""
        return prompt_ids(self.tokenizer, prompt, chat=chat, system=system)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion: of a document, and of a message."""
        return frozenset((self.tokenizer.eos_id, self.tokenizer.end_id))


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
    """`<s>` and the prompt's tokens; with `chat` the rendered messages up to where the assistant begins."""
    if not chat:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    from data.tokenizers.chat import encode_chat

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return encode_chat(tokenizer, messages, generation_prompt=True)[0]


def check_room(tokens: int, max_seq_len: int, where: str = "the prompt") -> int:
    """How many tokens may follow a prompt. Raises Refusal if it leaves no room."""
    if tokens >= max_seq_len:
        raise Refusal(
            where,
            NO_VALUE,
            f"has {tokens:,} tokens and the model was made for {max_seq_len:,}, its answer included",
            "shorten the prompt",
        )
    return max_seq_len - tokens


class TextStream:
    """Text that grows token by token; hands on what is certain, and notices stop texts.

    Tokens are pieces of UTF-8: a character may need several, and decoding too early would show replacement characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
        *,
        after: Sequence[int] = (),
    ) -> None:
        """after: the tokens before, as far as they matter: some tokenizers drop the space that a text begins with."""
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._ids = list(after)
        # Ids up to _shown_to are in the text; from _shown_from on they are decoded again.
        self._shown_from, self._shown_to = 0, len(self._ids)
        self._held = ""

    def feed(self, token: int) -> None:
        """Take one more token."""
        self._ids.append(token)
        self._release(final=False)

    def close(self) -> None:
        """Hand on what was held back."""
        if not self.stopped:
            self._release(final=True)

    def _release(self, *, final: bool) -> None:
        # A short tail is decoded, not everything: the cost of a token must not grow with the text. One piece of context
        # stays in it, since a piece's own text can depend on what stands before it.
        before = self._tokenizer.decode(self._ids[self._shown_from : self._shown_to])
        text = self._tokenizer.decode(self._ids[self._shown_from :])
        if final or not text.endswith(UNFINISHED):
            self._held += text[len(before) :]
            self._shown_from, self._shown_to = self._shown_to, len(self._ids)
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._emit(self._held[: min(ends)])
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            self._emit(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]

    def _emit(self, text: str) -> None:
        self.text += text
        if text and self._on_text is not None:
            self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
