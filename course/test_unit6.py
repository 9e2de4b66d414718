"""Unit 6: four ways to write a shape as tokens."""
import torch

from relatives import latte3d, lost, vat


def quantiser():
    torch.manual_seed(0)
    return vat.Quantiser(side=4, channels=6, codes=64, scales="1 2 4").eval()


def test_codes_of_all_scales():
    """One code for each cell of each scale, coarse to fine, in one row."""
    assert quantiser().encode(torch.randn(2, 64, 6)).shape == (2, 1 + 8 + 64)


def test_each_scale_quantises_what_is_left():
    """q_k is the nearest code of Down_k(z - f_k), f_(k+1) = f_k + up(q_k): the first code is of the mean of z alone,
    later ones of the residual."""
    model, z = quantiser(), torch.randn(2, 64, 6)
    with torch.no_grad():
        codes = model.encode(z)
        grid = z.mT.reshape(2, 6, 4, 4, 4)
        assert torch.equal(codes[:, :1], model.book.nearest(vat.as_rows(vat.down(grid, 1))))
        f = model.decode(codes)
        assert torch.equal(codes[:, 1:9], model.book.nearest(vat.as_rows(vat.down(grid - f[1], 2))))
        assert torch.equal(codes[:, 9:], model.book.nearest(vat.as_rows(vat.down(grid - f[2], 4))))


def test_rank_distillation_ignores_scale_and_diagonal():
    """Rows without the diagonal, each with mean 0 and deviation 1, then the mean squared error."""
    s = torch.tensor([[9., 1, 2, 4], [1, 9, 5, 2], [2, 5, 9, 0], [4, 2, 0, 9]])
    assert lost.rank(s, torch.tensor([[1.], [10], [2], [5]]) * s - 3 + 50 * torch.eye(4)) < 1e-4
    assert lost.rank(s, -s) > 2.6
    student = s.clone().requires_grad_()
    lost.rank(student, s.flip(0)).backward()
    assert student.grad.abs().sum() > .1


def test_score_distillation_pulls_towards_what_the_prior_finds(monkeypatch):
    """The mean of 1/2 (x - sg(x_hat))^2: no gradient through x_hat."""
    x, target = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    found = lambda prior, x, *args, **settings: target + x - x.detach()
    monkeypatch.setitem(latte3d.distillation.__globals__, "distilled", found)
    loss = latte3d.distillation(None, x)
    loss.backward()
    assert torch.allclose(loss, ((x - target) ** 2).mean() / 2)
    assert torch.allclose(x.grad, (x - target).detach() / 6)
