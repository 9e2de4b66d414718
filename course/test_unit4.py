"""Unit 4: prefix and guidance."""
import torch
from einops import rearrange

import backbone
from conftest import WIDTHS, prompted
from prefix import Prefix


def make():
    torch.manual_seed(0)
    return Prefix(queries=4, dim=64, heads=4, widths=WIDTHS).eval()


def test_the_prefix_is_condition_tokens_and_query_outputs():
    """[condition tokens, their null token, outputs of the learnt queries]: t + 1 + q tokens, and a mask of that
    length."""
    tokens, mask = make()(prompted())
    assert tokens.shape == (3, 5 + 4 + 1 + 4, 64) and mask.shape == (3, 14)
    assert mask[:, -4:].all() and mask[1].tolist() == [True] * 3 + [False] * 2 + [True] * 4 + [False] + [True] * 4


def test_the_queries_read_the_prompt_but_not_its_padding():
    """The queries cross-attend to the condition tokens under their mask."""
    model, condition = make(), prompted()
    with torch.no_grad():
        before = model(condition)[0][:, -4:]
        text, mask = condition["text"]
        padded = model(condition | {"text": (torch.where(mask[..., None], text, -text), mask)})[0][:, -4:]
        changed = model(condition | {"text": (text.flip(-1), mask)})[0][:, -4:]
    assert torch.allclose(before, padded, atol=1e-5) and not torch.allclose(before, changed, atol=1e-2)


def test_each_branch_drops_one_more_kind():
    """With text and picture: branch 0 both, branch 1 the text alone, branch 2 none. Tokens stay, masks become False."""
    condition = prompted()
    stacked, strengths = backbone.split_condition(condition, {"text": 3., "image": 1.5})
    text, image = (rearrange(stacked[kind][1], "(r b) t -> r b t", r=3) for kind in ("text", "image"))
    assert torch.equal(text[0], condition["text"][1]) and torch.equal(text[1], text[0]) and not text[2].any()
    assert torch.equal(image[0], condition["image"][1]) and not image[1:].any()
    assert strengths == [1.5, 3.]                             # 0 against 1: of the picture; 1 against 2: of the text
    assert torch.equal(stacked["text"][0], condition["text"][0].repeat(3, 1, 1))


def test_without_guidance_one_branch_is_enough():
    """All strengths 1: the differences cancel, so there is only branch 0."""
    stacked, strengths = backbone.split_condition(prompted(), 1.)
    assert strengths == [] and len(stacked["text"][0]) == 3


def test_guidance_goes_beyond_the_conditional_answer():
    """out = last + sum of g_i (out_i - out_(i+1)), from a batch of stacked branches."""
    branches = torch.tensor([[5.], [50.], [3.], [30.], [2.], [20.]])              # of two samples
    assert backbone.combine(branches, [1.5, 3.])[0] == 2 + 1.5 * (5 - 3) + 3 * (3 - 2)
    assert backbone.combine(branches, [1.5, 3.])[1] == 80
    for strengths, stacked in (([1., 1.], branches), ([], branches[:2])):
        assert torch.equal(backbone.combine(stacked, strengths), branches[:2])
