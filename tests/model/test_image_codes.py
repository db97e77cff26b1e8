"""Images as codes: the loss is the paper's, training brings the pixels back, and what comes out feeds DALL-E."""

import math

import pytest
import torch

from conf.refusal import Refusal
from model.frontends.image_codes import EDGE, ImageTokenizerConfig, build_image_tokenizer
from model.frontends.text_image import TextImageVocabulary
from model.init import parameter_roles

SMALL = ImageTokenizerConfig(codes=48, width=16, halvings=2, blocks=1)


def images(rows: int = 4) -> torch.Tensor:
    """Squares of 4 x 4 pixels of one of six colours each."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).float()
    squares = colours[torch.randint(0, 6, (rows, 4, 4), generator=generator)].movedim(-1, 1)
    return squares.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_pixels_are_distributed_as_logit_laplace_which_is_a_density() -> None:
    """The loss's own formula, summed over [0, 1] for a mean and a spread, gives 1."""
    x = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    for mean, spread in ((0.3, -1.0), (-1.0, 0.2)):
        nll = (x.logit() - mean).abs() * math.exp(-spread) + spread + (2 * x * (1 - x)).log()
        assert float(torch.trapezoid(torch.exp(-nll), x)) == pytest.approx(1.0, abs=2e-3)
    tokenizer, pixels = build_image_tokenizer(SMALL), images()
    with torch.no_grad():
        for parameter in tokenizer.decoder[-1].parameters():
            parameter.zero_()  # mean 0 and ln b = 0 everywhere
        for parameter in tokenizer.encoder[-1].parameters():
            parameter.zero_()  # and codes all alike
        result = tokenizer(pixels)
    squeezed = EDGE + (1 - 2 * EDGE) * pixels
    expected = (squeezed.logit().abs() + (2 * squeezed * (1 - squeezed)).log()).sum()
    assert float(result["kl_sum"]) == pytest.approx(0.0, abs=1e-3)
    assert float(result["loss_sum"]) == pytest.approx(float(expected), rel=1e-5)
    assert int(result["target_count"]) == pixels.numel()


def test_it_learns_to_bring_images_back_by_codes_that_a_row_can_hold() -> None:
    tokenizer, pixels = build_image_tokenizer(SMALL), images()
    torch.manual_seed(0)
    optimizer, losses, steps = torch.optim.Adam(tokenizer.parameters(), lr=3e-3), [], 300
    for step in range(steps):
        tokenizer.temperature = max(0.1, 1 - step / steps / 0.7)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        result = tokenizer(pixels)
        loss = result["loss_sum"] / result["target_count"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
    codes = tokenizer.codes(pixels)
    assert codes.shape == (4, 4, 4) and codes.unique().numel() >= 3
    again = tokenizer.pixels(codes)
    # With one code for everything it would be the variance.
    assert (again - pixels).square().mean() < 0.5 * pixels.var()
    words = TextImageVocabulary(entries=9, places=3, codes=SMALL.codes)
    row = words.row([1, 2], codes[0].flatten().tolist())
    assert torch.equal(torch.tensor(words.codes_of(row)).view(4, 4), codes[0])


def test_every_parameter_has_a_role_and_what_cannot_be_is_refused() -> None:
    tokenizer = build_image_tokenizer(SMALL)
    assert parameter_roles(tokenizer).keys() == dict(tokenizer.named_parameters()).keys()
    for wrong in (lambda: ImageTokenizerConfig(codes=0), lambda: ImageTokenizerConfig(halvings=-1)):
        with pytest.raises(Refusal, match=r"codes = 0|halvings=-1"):
            wrong()
    with pytest.raises(Refusal, match="sides that 4 divides"):
        tokenizer.codes(torch.zeros(1, 3, 8, 6))
