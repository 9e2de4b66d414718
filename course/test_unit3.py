"""Unit 3: masked generation, its order and its schedule."""
import torch

import backbone
from conftest import small_backbone


def test_steps_follow_each_other():
    """A list of pairs (known before, known after): a step begins where the one before ended, the last one ends at n."""
    pairs = backbone.schedule(64, 10)
    assert len(pairs) == 10 and pairs[0][0] == 0 and pairs[-1][1] == 64
    assert all(end == start for (_, end), (start, _) in zip(pairs, pairs[1:]))


def test_every_step_samples_at_least_one_token():
    """Where the cosine adds no token, add one; and leave at least one token for each later step. 13 steps for 13 tokens
    add one each."""
    for n in range(1, 65):
        for steps in range(1, n + 1):
            pairs = backbone.schedule(n, steps)
            assert len(pairs) == steps and pairs[-1][1] == n, (n, steps)
            assert all(after > before for before, after in pairs), (n, steps)


def test_the_schedule_is_a_cosine():
    """After step k of K, n - floor(n cos(pi/2 k / K)) tokens are known: few at first, when little is decided."""
    assert [after for _, after in backbone.schedule(64, 10)] == [1, 4, 7, 13, 19, 27, 35, 45, 54, 64]


def test_training_sees_the_steps_of_generation():
    """n - ceil(n cos(pi/2 ((i + .5) / count)^power)) known tokens; a power above 1: early steps are frequent."""
    assert backbone.known_counts(64, 4, 1) == [1, 10, 28, 51]
    counts = backbone.known_counts(64)
    assert len(counts) == 16 and counts == sorted(counts) and sum(count < 8 for count in counts) >= 5


def test_the_loss_is_that_of_masked_tokens():
    """A random order for each sample; its first `known` tokens are encoded, the loss is of the others, with their z_i;
    DRAWS draws of noise share one pass. x and z are in one order."""
    model, condition = small_backbone()
    x, seen, asked = torch.randn(3, 27, 8), [], []

    def contexts(prefix, mask, x, order, known, rows):        # stands for the autoencoder: it answers with the tokens
        asked.append((order, known, rows))
        return x.gather(1, rows[..., None].expand(-1, -1, 8))
    model.contexts = contexts
    model.denoiser = type("Spy", (), {"loss": staticmethod(lambda net, x, z: seen.append((x, z)) or x.mean())})
    model.loss(x, condition, 20)
    ((targets, z),), ((order, known, rows),) = seen, asked
    assert known == 20 and torch.equal(rows.sort(1).values, order[:, 20:].sort(1).values)
    assert len(order.unique(dim=0)) == 3 and torch.equal(z, targets)
    assert len(targets) == backbone.DRAWS * 3 * 7 and len(targets.unique(dim=0)) == 3 * 7


def test_a_known_token_matters_and_a_masked_one_does_not():
    """`contexts` gets the order, how many are known, and the rows of the masked tokens."""
    torch.manual_seed(1)
    model, condition = small_backbone()
    contexts, orders, seen = model.contexts, [], []
    model.contexts = lambda prefix, mask, x, order, known, rows: orders.append(order) or contexts(
        prefix, mask, x, order, known, rows)
    model.denoiser = type("Spy", (), {"loss": staticmethod(lambda net, x, z: seen.append(z) or x.mean())})

    def z_of(x):
        torch.manual_seed(2)
        model.loss(x, condition, 20)
        return seen[-1]

    x = torch.randn(3, 27, 8)
    before, masked, known = z_of(x), x.clone(), x.clone()
    masked[0, orders[0][0, -1]] += 1
    known[0, orders[0][0, 0]] += 1
    assert torch.allclose(before, z_of(masked), atol=1e-5) and not torch.allclose(before, z_of(known), atol=1e-4)
