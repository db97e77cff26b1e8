"""A text and an image as one row of tokens, from one vocabulary (DALL-E, Ramesh et al. 2021,
https://arxiv.org/abs/2102.12092)."""

from collections.abc import Sequence
from dataclasses import dataclass

from conf.refusal import NO_VALUE, Refusal


@dataclass(frozen=True, kw_only=True)
class TextImageVocabulary:
    """First the entries of the text's tokenizer, then a padding token for each place of the text, then the image's codes.

    entries: of the text's tokenizer. places: tokens that every text is filled up to. codes: of the image's tokenizer, which
    is given: an image comes as its codes, row by row. (DALL-E: 16,384, 256 and 8,192.)
    """

    entries: int = 16384
    places: int = 256
    codes: int = 8192

    @property
    def size(self) -> int:
        """The model's `vocab_size`."""
        return self.entries + self.places + self.codes

    @property
    def image(self) -> tuple[int, int]:
        """The first of the image's tokens and the end of them, as `Sampling.within` takes them."""
        return self.entries + self.places, self.size

    def prompt(self, text: Sequence[int]) -> list[int]:
        """The text's tokens and its padding: what an image is generated after. Raises Refusal for one too long."""
        if len(text) > self.places or any(not 0 <= token < self.entries for token in text):
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    f"a text has {len(text)} tokens up to {max(text)}: a row has {self.places} places for it, "
                    f"and its tokenizer {self.entries} entries"
                ),
                "shorten it, or take the tokenizer that the model was made with",
            )
        return [*text, *range(self.entries + len(text), self.entries + self.places)]

    def row(self, text: Sequence[int], codes: Sequence[int]) -> list[int]:
        """A whole row of training. Raises Refusal for a code that there is not."""
        if any(not 0 <= code < self.codes for code in codes):
            raise Refusal(
                "model",
                NO_VALUE,
                f"an image has codes from {min(codes)} to {max(codes)}",
                f"there are {self.codes}, from 0 on",
            )
        return [*self.prompt(text), *(code + self.image[0] for code in codes)]

    def codes_of(self, tokens: Sequence[int]) -> list[int]:
        """The image's codes among tokens."""
        return [token - self.image[0] for token in tokens if token >= self.image[0]]
