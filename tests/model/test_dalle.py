"""A text and an image in one row (DALL-E): who sees whom by a definition of its own, losses by kind, images from a text."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.adapt import PrefixConfig
from model.adapt.prefix import attach_prefix
from model.build import build_model
from model.costs import forward_flops
from model.decoding.generate import Sampling, generate
from model.frontends.text_image import TextImageVocabulary
from model.heads.language import LanguageHeadConfig
from model.kernels.accelerated import flex_attention
from model.kernels.attention import AttentionKernel, dense_attention
from model.kernels.check import check_kernels
from model.kernels.chunked import chunked_attention, meeting_blocks, plan_chunks
from model.kernels.select import KERNELS
from model.masks import Mask, dense
from model.mixers.grid import BLOCK, GridAttentionConfig
from model.positions.grid import Grid, GridPattern
from tests.model.configurations import COLUMN, CONVOLUTION, DALLE, ROW, preset

CPU = torch.device("cpu")
VOCABULARY = TextImageVocabulary(entries=20, places=6, codes=12)
PATTERNS: tuple[GridPattern, ...] = ("row", "column", "convolution")


def by_hand(grid: Grid, tokens: int) -> torch.Tensor:
    """bool [T, S]: the words of the paper, pair by pair. An edge of the image is none: its rows follow each other."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    half = grid.kernel // 2
    around = {up * grid.width + aside for up in range(half + 1) for aside in range(-half, half + 1)}
    for query in range(tokens):
        for key in range(query + 1):
            back = query - key
            if key < grid.text:
                seen[query, key] = True
            elif grid.pattern == "row":
                seen[query, key] = back <= grid.width
            elif grid.pattern == "column":
                seen[query, key] = (query - grid.text) % grid.width == (key - grid.text) % grid.width
            else:
                seen[query, key] = back in around
    return seen


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, int]:
    """A grid of any shape, and the length of a row that may end anywhere in text or image."""
    text, width, kernel = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 5, 11]))
    grid = Grid(text=text, width=width, pattern=draw(st.sampled_from(PATTERNS)), kernel=kernel)
    return grid, draw(st.integers(1, text + 4 * width))


@settings(max_examples=40, deadline=None)
@given(grids())
def test_a_grid_is_what_the_paper_says_and_has_the_pairs_that_are_counted(case: tuple[Grid, int]) -> None:
    grid, tokens = case
    seen = dense(Mask(grid=grid), tokens, tokens, CPU)[0, 0]
    assert torch.equal(seen, by_hand(grid, tokens))
    assert grid.pairs(tokens) == int(seen.sum())


@settings(max_examples=40, deadline=None)
@given(case=grids(), block=st.sampled_from([4, 16, 32]))
def test_no_block_is_left_out_in_which_someone_sees_someone(case: tuple[Grid, int], block: int) -> None:
    grid, tokens = case
    for each in (grid, replace(grid, pattern="transposed")):
        mask = Mask(grid=each, block=block)
        padded = torch.nn.functional.pad(
            dense(mask, tokens, tokens, CPU)[0, 0], (0, -tokens % block, 0, -tokens % block)
        )
        needed = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
        assert not (needed & ~meeting_blocks(mask, tokens, CPU)[0, 0]).any()


def outcome(
    kernel: AttentionKernel, inputs: tuple[torch.Tensor, ...], mask: Mask, backward: bool = True
) -> list[torch.Tensor]:
    q, k, v = (x.clone().requires_grad_(backward) for x in inputs[:3])
    out = kernel(q, k, v, mask, 0.3)
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), inputs[3]) if backward else ())]


@settings(max_examples=25, deadline=None)
@given(case=grids(), groups=st.sampled_from([1, 2]), padded=st.integers(0, 5))
def test_the_kernel_of_blocks_agrees_with_the_definition(case: tuple[Grid, int], groups: int, padded: int) -> None:
    inputs, mask = problem(*case, groups, padded)
    assert_same(outcome(chunked_attention, inputs, mask), outcome(dense_attention, inputs, mask))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_flexattention_agrees_with_the_definition(pattern: GridPattern) -> None:
    inputs, mask = problem(Grid(text=5, width=9, pattern=pattern, kernel=3), 60, 2, 3)
    assert_same(outcome(flex_attention, inputs, mask, backward=False), outcome(dense_attention, inputs, mask)[:1])


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """fp64, but the oracle's softmax is fp32: 2^-24 relative per weight, gathered over at most 300 keys."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (theirs - ours).abs().max() <= 300 * 2**-24 * max(1.0, theirs.abs().max())


def problem(grid: Grid, tokens: int, groups: int, padded: int) -> tuple[tuple[torch.Tensor, ...], Mask]:
    """(q, k, v, gradient of the output) and a mask; the second row ends in padding."""
    generator = torch.Generator().manual_seed(tokens)
    inputs = tuple(
        torch.randn(2, tokens, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (2 * groups, 2, 2, 2 * groups)
    )
    documents = torch.ones(2, tokens, dtype=torch.int32)
    documents[1, max(1, tokens - padded) :] = 0
    return inputs, Mask(grid=grid, documents_BT=documents, block=BLOCK)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_grow_with_the_tokens_not_with_their_square(pattern: GridPattern) -> None:
    def scores(height: int) -> int:
        grid = Grid(text=64, width=32, pattern=pattern, kernel=3)
        if pattern == "column":  # as `by_columns` turns it
            grid = replace(grid, pattern="transposed", width=height)
        plan = plan_chunks(Mask(grid=grid, block=BLOCK), 64 + height * 32, CPU)
        return sum(chunk.key_blocks_PJ.numel() for chunk in plan.chunks) * BLOCK**2

    # Twice the image, twice the scores; of columns, which are twice as long then, up to four times: T^1.5 if it is square.
    assert scores(128) <= (4.0 if pattern == "column" else 2.05) * scores(64)
    assert scores(64) <= 0.25 * (64 + 64 * 32) ** 2


def rows(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        text = torch.randint(0, 20, (2 + number % 4,), generator=generator).tolist()
        made.append(VOCABULARY.row(text, torch.randint(0, 12, (20,), generator=generator).tolist()))
    return torch.tensor(made)


@pytest.mark.parametrize("mixer", [ROW, COLUMN, CONVOLUTION], ids=PATTERNS)
def test_a_token_moves_the_logits_of_those_that_see_it_and_of_no_others(mixer: GridAttentionConfig) -> None:
    model = build_model(replace(DALLE, n_layers=1, mixer=mixer, pattern=())).eval()
    tokens = rows(1)
    with torch.no_grad():
        before = model(tokens)["logits"][0]
        for changed in range(26):
            others = tokens.clone()
            others[0, changed] = (others[0, changed] + 1) % VOCABULARY.size
            moved = (model(others)["logits"][0] - before).abs().amax(-1) > 1e-6
            assert torch.equal(moved, by_hand(mixer.grid, 26)[:, changed])


def test_cached_decoding_gives_the_logits_of_the_forward_pass() -> None:
    model, tokens = build_model(DALLE).eval(), rows()
    with torch.no_grad():
        whole = model(tokens)["logits"]
        for static in (False, True):
            cache = model.new_cache(2, 26, static=static)
            parts = [model(part, cache=cache)["logits"] for part in tokens.split([6, *[1] * 10, 3, *[1] * 7], dim=1)]
            assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_after_a_text_only_codes_of_an_image_are_generated_and_as_many_as_it_has() -> None:
    model = build_model(DALLE).eval()
    prompts = [VOCABULARY.prompt([1, 2, 3]), VOCABULARY.prompt([4])]
    for temperature in (0.0, 2.0):
        sampling = Sampling(max_new_tokens=100, temperature=temperature, within=VOCABULARY.image)
        images = generate(model, prompts, sampling)
        assert [len(VOCABULARY.codes_of(image)) for image in images] == [20, 20]
        assert all(0 <= code < 12 for image in images for code in VOCABULARY.codes_of(image))
    free = generate(model, prompts, Sampling(max_new_tokens=100, temperature=2.0))
    assert any(token < VOCABULARY.image[0] for image in free for token in image)


def test_a_target_weighs_what_its_kind_does_in_the_gradient_and_nothing_else_in_the_reported_loss() -> None:
    tokens = rows()
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    weighted, plain = build_model(DALLE), build_model(replace(DALLE, head=LanguageHeadConfig()))
    log_p = plain(tokens)["logits"].log_softmax(-1)
    nll = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    by_kind = torch.where(targets >= VOCABULARY.image[0], 3.5, 0.5)
    (nll * by_kind).sum().backward()
    result = weighted(tokens, targets_BT=targets)
    result["loss_sum"].backward()
    assert result["loss_sum"].item() == pytest.approx(nll.sum().item(), rel=1e-5)
    for (name, expected), found in zip(plain.named_parameters(), weighted.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, name
        assert (expected.grad - found.grad).abs().max() <= 1e-5 * expected.grad.abs().max(), name


def test_its_loss_falls_and_the_tiny_preset_learns_which_image_follows_which_text() -> None:
    config = preset("dalle-tiny")
    model, words = build_model(config), TextImageVocabulary(entries=512, places=32, codes=256)
    assert config.vocab_size == words.size
    images = [[10 * number + place % 8 for place in range(64)] for number in range(2)]
    batch = torch.tensor([words.row([number], image) for number, image in enumerate(images)])
    targets = batch.roll(-1, 1)
    targets[:, -1] = -100
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        result = model(batch, targets_BT=targets)
        losses.append(result["loss_sum"].item())
        optimizer.zero_grad()
        (result["loss_sum"] / result["target_count"]).backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]
    sampling = Sampling(max_new_tokens=64, temperature=0.0, within=words.image)
    drawn = generate(model, [words.prompt([0]), words.prompt([1])], sampling)
    assert [words.codes_of(image) for image in drawn] == images


def test_every_place_of_a_text_has_a_padding_token_of_its_own_and_what_does_not_fit_is_refused() -> None:
    assert VOCABULARY.prompt([7, 8]) == [7, 8, 22, 23, 24, 25]
    assert VOCABULARY.row([7], [0, 11])[-2:] == [26, 37]
    for wrong in (
        lambda: VOCABULARY.prompt([0] * 7),
        lambda: VOCABULARY.prompt([20]),
        lambda: VOCABULARY.row([1], [12]),
    ):
        with pytest.raises(Refusal):
            wrong()


def test_flops_are_counted_for_the_pairs_that_a_grid_lets_through() -> None:
    full = forward_flops(replace(DALLE, mixer=ROW.attention, pattern=()), rows=1, seq_len=26)
    grids = (mixer.grid for mixer in (ROW, COLUMN, ROW, CONVOLUTION))
    spared = sum(26 * 27 // 2 - grid.pairs(26) for grid in grids)
    assert full - forward_flops(DALLE, rows=1, seq_len=26) == 4 * 16 * spared


def test_rows_that_are_packed_or_padded_in_front_are_refused() -> None:
    model = build_model(DALLE)
    for documents in ([[1] * 13 + [2] * 13], [[0] * 3 + [1] * 23]):
        with pytest.raises(Refusal, match="documents_BT"):
            model(rows(1), documents_BT=torch.tensor(documents, dtype=torch.int32))
    with pytest.raises(Refusal, match="prefix"):
        attach_prefix(model, PrefixConfig(tokens=2))


def test_the_kernels_of_a_grid_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(DALLE)
    assert check_kernels(model, device=CPU, dtype=torch.float32, tokens=64) == []
    monkeypatch.setitem(KERNELS, "chunked", lambda *inputs: 2 * chunked_attention(*inputs))
    said = check_kernels(build_model(DALLE), device=CPU, dtype=torch.float32, tokens=64)
    assert said and all("chunked for sparse masks differs" in line for line in said)
