"""The chunked vocab-parallel cross entropy against torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from basestone.model import loss as loss_module
from basestone.model.loss import vocab_parallel_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 22])
def test_equals_torch_cross_entropy(monkeypatch, dtype, z_loss, chunk_elements):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    torch.manual_seed(0)
    vocab, padded = 50, 64
    logits = (3 * torch.randn(3, 5, padded)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (3, 5))
    before = logits.detach().clone()
    losses = vocab_parallel_cross_entropy(logits, targets, first_row=0, vocab_size=vocab, z_loss=z_loss)
    upstream = torch.rand(3, 5)
    (losses * upstream).sum().backward()
    assert torch.equal(logits.detach(), before), "the logits must not be written to"

    reference = before.float().requires_grad_()
    true = reference[..., :vocab]
    expected = F.cross_entropy(true.reshape(-1, vocab), targets.reshape(-1), reduction="none").view(3, 5)
    expected = expected + z_loss * true.logsumexp(-1).square()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.float(), reference.grad, rtol=tolerance, atol=tolerance)
    assert not logits.grad[..., vocab:].any(), "padding rows get no gradient"
