"""splat.py - a picture of 3D Gaussians, differentiable (Kerbl et al. 2023). The light is in their colours.

Letters: k Gaussians, n tiles, m Gaussians that reach a tile.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from geometry.camera import EYE, HALF, project, view_rotation

TILE = 16                          # pixels along a side of a tile, which blends only the Gaussians that reach it
BLUR = .3                          # variance in pixels^2 that every Gaussian gains on the screen, as in 3DGS viewers


def baked_light(normal):
    """The light in the colours of 3D Gaussians (... k 1), as viewers add none: one lamp at the upper left, in sRGB."""
    return .75 + .25 * (normal @ F.normalize(torch.tensor([-.5, 1, .7]), dim=0).to(normal))[..., None]


def rotation_matrices(rotations):
    """Quaternions w x y z of any length (k 4) -> rotation matrices (k 3 3)."""
    w, x, y, z = F.normalize(rotations, dim=-1).unbind(-1)
    matrix = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                          2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                          2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)
    return rearrange(matrix, "k (i j) -> k i j", i=3)


def project_gaussians(means, scales, rotations, view, size):
    """3D Gaussians on the screen: centres (k 2, pixels), covariances (k 2 2), distances (k). With the Jacobian J of
    the projection, Sigma' = J V R S^2 R^T V^T J^T (Zwicker et al. 2001, EWA splatting)."""
    xy, distance = project(means, view, size)
    x, y, _ = (means @ view.T / distance[:, None]).unbind(-1)
    zero, focal = torch.zeros_like(x), EYE / HALF * size / 2 / distance
    jacobian = torch.stack([torch.stack([focal, zero, focal * x], -1),
                            torch.stack([zero, -focal, -focal * y], -1)], 1)               # k 2 3
    spread = jacobian @ view @ (rotation_matrices(rotations) * scales[:, None])            # k 2 3
    return xy, spread @ spread.mT + BLUR * torch.eye(2, device=means.device), distance


def splat(means, scales, rotations, opacities, colours, azimuth, elevation, size, background=(1., 1., 1.), tiles=16):
    """means, scales (k 3), rotations (k 4, w x y z), opacities (k), colours (k 3) -> a picture (size size 3). All of it
    is differentiable (Kerbl et al. 2023):

        C = sum_i c_i alpha_i prod_{j < i} (1 - alpha_j),    alpha_i = o_i exp(-d^T Sigma'^-1 d / 2),    nearest first

    `tiles` are blended at a time, and blended again for the gradient: this bounds memory."""
    xy, covariance, distance = project_gaussians(means, scales, rotations,
                                                 view_rotation(azimuth, elevation).to(means.device), size)
    order = distance.detach().argsort()
    xy, covariance, opacities, colours = (x[order] for x in (xy, covariance, opacities, colours))
    inverse = torch.linalg.inv(covariance)                                                 # k 2 2

    reach = 3 * covariance.detach()[:, [0, 1], [0, 1]].sqrt()                              # k 2, three sigma
    low, high = ((xy.detach() + sign * reach).div(TILE).floor() for sign in (-1, 1))       # k 2, tiles
    side = -(-size // TILE)
    tile = torch.cartesian_prod(*[torch.arange(side, device=xy.device)] * 2)               # n 2: y, x
    meets = ((low <= tile[:, None].flip(-1)) & (high >= tile[:, None].flip(-1))).all(-1)   # n k
    count = meets.sum(1)                                                                   # n
    pair_tile, pair_item = meets.nonzero(as_tuple=True)                                    # by tile, then by distance
    rank = torch.arange(len(pair_tile), device=xy.device) - (count.cumsum(0) - count)[pair_tile]

    def blend(index, tile, xy, inverse, opacities, colours):                               # index n m, -1: no Gaussian
        pixel = tile[:, None] * TILE + torch.arange(TILE, device=xy.device)[:, None] + .5  # n TILE 2
        dy, dx = (pixel[..., i, None] - xy[index, 1 - i][:, None] for i in (0, 1))         # n TILE m
        a, b, c = (inverse[index][:, None, :, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))  # n 1 m
        dx, dy = dx[:, None], dy[:, :, None]
        power = -.5 * a[:, None] * dx ** 2 - .5 * c[:, None] * dy ** 2 - b[:, None] * dx * dy          # n y x m
        alpha = (torch.where(index < 0, 0, opacities[index])[:, None, None] * power.exp()).clamp(max=.99)
        passed = torch.log1p(-alpha).cumsum(-1)                                            # log of prod (1 - alpha)
        weight = alpha * F.pad(passed[..., :-1], (1, 0)).exp()
        colour = torch.einsum("n y x m, n m c -> n y x c", weight, colours[index])
        return torch.cat([colour, passed[..., -1:].exp()], -1)                             # n y x 4

    image = {}                                                    # tile -> its pixels
    for batch in count.argsort().split(tiles):                    # tiles with similar counts together: little padding
        index = torch.full((len(tile), max(int(count[batch].max()), 1)), -1, device=xy.device)         # n m
        chosen = torch.isin(pair_tile, batch)
        index[pair_tile[chosen], rank[chosen]] = pair_item[chosen]
        arguments = index[batch], tile[batch], xy, inverse, opacities, colours
        blended = checkpoint(blend, *arguments, use_reentrant=False) if torch.is_grad_enabled() else blend(*arguments)
        image.update(zip(batch.tolist(), blended))
    image = torch.stack([image[i] for i in range(len(tile))])                              # n y x 4
    image = rearrange(image, "(r q) y x c -> (r y) (q x) c", r=side)[:size, :size]
    return image[..., :3] + image[..., 3:] * torch.as_tensor(background, dtype=image.dtype, device=image.device)
