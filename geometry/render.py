"""Pictures of meshes, signed distance fields and point clouds, without a window and without a GPU.

Each kind of shape only answers "which surface point does each pixel see?"; `picture` lights all alike (geometry/light.py).
3D Gaussians carry their light with them: `splat` blends them, differentiably, for training too.
Letters: f faces, v vertices, k points or Gaussians, p pixels, n tiles.

    python geometry/render.py out/table-0.glb                      # -> out/table-0.png
    python geometry/render.py out/table-0.glb --turntable          # -> out/table-0.gif
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

from engine.commands import UserError
from engine.files import atomic_write
from geometry.camera import EYE, HALF, project, rays, see_mesh, see_points, tensor
from geometry.light import baked, lamps, light, look, scatter, to_linear, to_srgb

MODES = ("colour", "normal", "depth")
PAPER = (.985, .98, .972)          # the background, sRGB: white with a drop of warmth
CLAY = (.83, .78, .72)             # what a shape without colours is made of, sRGB
SAMPLES = 2                        # samples a pixel, along x and along y
FLOOR, CELLS = 2.7, 96             # the floor whose shadow is worked out: half its width, cells along it


# ---- 3D Gaussians

TILE = 16                          # pixels: each tile blends only the Gaussians that reach it
BLUR = .3                          # variance in pixels^2 that every Gaussian gains on the screen, as 3DGS viewers have it


def turned(rotations):
    """Quaternions w x y z of any length (k 4) -> rotation matrices (k 3 3)."""
    w, x, y, z = F.normalize(rotations, dim=-1).unbind(-1)
    return rearrange(torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                                  2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                                  2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1), "k (i j) -> k i j", i=3)


def flatten(means, scales, rotations, view, size):
    """3D Gaussians as the eye sees them: centres (k 2, pixels), covariances (k 2 2), distances (k). With the Jacobian J of
    the projection, Sigma' = J V R S^2 R^T V^T J^T (Zwicker et al. 2001, EWA splatting)."""
    xy, distance = project(means, view, size)
    x, y, _ = (means @ view.T / distance[:, None]).unbind(-1)
    zero, focal = torch.zeros_like(x), EYE / HALF * size / 2 / distance
    jacobian = torch.stack([torch.stack([focal, zero, focal * x], -1), torch.stack([zero, -focal, -focal * y], -1)], 1)
    spread = jacobian @ view @ (turned(rotations) * scales[:, None])                       # k 2 3
    return xy, spread @ spread.mT + BLUR * torch.eye(2, device=means.device), distance


def splat(means, scales, rotations, opacities, colours, azimuth=35, elevation=25, size=128, background=(1., 1., 1.), tiles=16):
    """means, scales (k 3), rotations (k 4, w x y z), opacities (k), colours (k 3) -> image (size size 3), all differentiable.

        C = sum_i c_i alpha_i prod_{j < i} (1 - alpha_j),    alpha_i = o_i exp(-d^T Sigma'^-1 d / 2),    nearest first

    (Kerbl et al. 2023). `tiles` are blended at a time and worked out anew for the gradient, which bounds memory."""
    xy, cov, distance = flatten(means, scales, rotations, look(azimuth, elevation).to(means.device), size)
    order = distance.detach().argsort()
    xy, cov, opacities, colours = xy[order], cov[order], opacities[order], colours[order]
    inverse = torch.linalg.inv(cov)
    reach = 3 * cov.detach()[:, [0, 1], [0, 1]].sqrt()                                     # to three sigma, along x and y
    low, high = ((xy.detach() + s * reach).div(TILE).floor() for s in (-1, 1))             # tiles, k 2
    side = -(-size // TILE)
    tile = torch.cartesian_prod(*[torch.arange(side, device=xy.device)] * 2)               # n 2: y, x
    meets = ((low <= tile[:, None].flip(-1)) & (high >= tile[:, None].flip(-1))).all(-1)   # n k
    count = meets.sum(1)
    which, item = meets.nonzero(as_tuple=True)                                             # by tile, then by distance
    rank = torch.arange(len(which), device=xy.device) - (count.cumsum(0) - count)[which]
    image = [None] * len(tile)

    def blend(index, tile, xy, inverse, opacities, colours):                               # index n m, -1: nothing
        pixel = tile[:, None] * TILE + torch.arange(TILE, device=xy.device)[:, None] + .5  # n TILE 2
        dy, dx = (pixel[..., i, None] - xy[index, 1 - i][:, None] for i in (0, 1))         # n TILE m
        a, b, c = (inverse[index][:, None, :, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))  # n 1 m
        dx, dy = dx[:, None], dy[:, :, None]
        power = -.5 * a[:, None] * dx ** 2 - .5 * c[:, None] * dy ** 2 - b[:, None] * dx * dy                 # n y x m
        alpha = torch.where(index < 0, 0, opacities[index])[:, None, None] * power.exp()
        alpha = alpha.clamp(max=.99)
        passed = torch.log1p(-alpha).cumsum(-1)                                            # log of prod (1 - alpha)
        weight = alpha * F.pad(passed[..., :-1], (1, 0)).exp()
        return torch.cat([torch.einsum("n y x m, n m c -> n y x c", weight, colours[index]), passed[..., -1:].exp()], -1)

    for part in count.argsort().split(tiles):                                              # like with like: little padding
        m = int(count[part].max())
        index = torch.full((len(tile), max(m, 1)), -1, device=xy.device)
        mine = torch.isin(which, part)
        index[which[mine], rank[mine]] = item[mine]
        arguments = index[part], tile[part], xy, inverse, opacities, colours
        out = checkpoint(blend, *arguments, use_reentrant=False) if torch.is_grad_enabled() else blend(*arguments)
        for i, pixels in zip(part.tolist(), out):
            image[i] = pixels
    image = rearrange(torch.stack(image), "(r q) y x c -> (r y) (q x) c", r=side)[:size, :size]
    return image[..., :3] + image[..., 3:] * torch.as_tensor(background, dtype=image.dtype, device=image.device)


def flat(vertices, faces, colours, azimuth, elevation, size):
    """What a splatted picture is to look like: colours (v 3) in a light that is part of them, nothing else.
    -> (size size 4): colour times coverage, coverage."""
    width = size * SAMPLES
    pixel, _, normal, colour = see_mesh(tensor(vertices), tensor(faces, torch.int64), tensor(colours), look(azimuth, elevation), width)
    image = torch.zeros(width * width, 4)
    image[pixel] = torch.cat([colour * baked(normal), torch.ones_like(normal[:, :1])], -1)
    return reduce(image, "(h a w b) c -> h w c", "mean", h=size, w=size, a=SAMPLES)


# ---- floor and picture

def floor(keep, height, view, width):
    """keep (z x c): the part of its light each floor cell keeps -> the same for every pixel (p 3)."""
    keep = F.avg_pool2d(F.pad(rearrange(keep, "z x c -> 1 c z x"), [2] * 4, mode="replicate"), 5, stride=1)   # softer
    eye, ray = EYE * view[2], rays(view, width)
    t = (height - eye[1]) / ray[:, 1]
    spot = (eye + t[:, None] * ray)[:, [0, 2]]
    keep = F.grid_sample(keep, spot[None, None] / FLOOR, align_corners=True, padding_mode="border")[0, :, 0].T
    # The shadow fades away from the shape, and before the picture ends: floor and paper are one.
    s = 1 - ((torch.arange(width) + .5) * 2 / width - 1).abs()
    rim = (s[:, None].minimum(s) / .3).clamp(0, 1).flatten()
    fade = ((2.6 - spot.norm(dim=-1)) / 1.2).clamp(0, 1) * rim ** 2 * (3 - 2 * rim) * ((t > 0) & (ray[:, 1] < 0))
    return 1 - fade[:, None] * (1 - keep)


def picture(see, cloud, azimuth, elevation, size, mode):
    """see(view, width) -> what each pixel sees; cloud (k 3) covers the surface and casts the shadows."""
    if mode not in MODES:
        raise ValueError(f"render mode {mode!r}: choose one of {', '.join(MODES)}")
    view, width = look(azimuth, elevation), size * SAMPLES
    image = to_linear(torch.tensor(PAPER)).repeat(width * width, 1)
    pixel, position, normal, colour = see(view, width)
    if mode == "normal":
        image[pixel] = to_linear(normal @ view.T * .5 + .5)                    # in the eye's frame
    elif mode == "depth":
        image[pixel] = to_linear(.5 - .3 * (position @ view[2:].T)).expand(-1, 3)      # far is pale, as in fog
    elif len(cloud):
        height, s = cloud[:, 1].amin(), torch.linspace(-FLOOR, FLOOR, CELLS)
        cells = torch.cartesian_prod(s, height[None], s).flip(-1)              # x fastest
        up = torch.tensor([[0., 1, 0]]).expand_as(cells)
        arriving = light(cloud, azimuth, torch.cat([position, cells]), torch.cat([normal, up]))
        directions, colours = lamps(azimuth)
        keep = arriving[len(pixel):] / (directions[:, 1].clamp(min=0) @ colours)       # of an open floor's light
        image *= floor(rearrange(keep, "(z x) c -> z x c", z=CELLS), height, view, width)
        image[pixel] = to_linear(colour) * arriving[:len(pixel)]
    image = reduce(image.clamp(0, 1), "(h a w b) c -> h w c", "mean", h=size, w=size, a=SAMPLES)
    return (to_srgb(image) * 255).round().byte().numpy()


def sprinkle(vertices, faces, count=30000):
    """Points evenly over the surface (k 3): equal steps of area, then a scattered place in the face."""
    a, b, c = vertices[faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1).double().cumsum(0)
    i = torch.searchsorted(area, (torch.arange(count) + .5) / count * area[-1]).clamp(max=len(faces) - 1)
    u, v, _ = scatter(count).T[..., None]
    u = u.sqrt()                                                   # evenly over the triangle, not over its sides
    return (1 - u) * a[i] + u * (1 - v) * b[i] + u * v * c[i]


# ---- pictures, the functions to call: uint8 (size size 3)

def render_mesh(vertices, faces, colours=None, azimuth=35, elevation=25, size=256, mode="colour"):
    """vertices (v 3), faces (f 3), colours (v 3) in 0..1 or None for clay."""
    vertices, faces = tensor(vertices), tensor(faces, torch.int64)
    colours = torch.tensor(CLAY).expand_as(vertices) if colours is None else tensor(colours)
    cloud = sprinkle(vertices, faces) if len(faces) else vertices[:0]
    see = lambda view, width: see_mesh(vertices, faces, colours, view, width)
    return picture(see, cloud, azimuth, elevation, size, mode)


def render_points(points, colours=None, radius=.016, azimuth=35, elevation=25, size=256, mode="colour"):
    """points (k 3), colours (k 3) in 0..1 or None for clay; every point a ball of that radius."""
    points = tensor(points)
    colours = torch.tensor(CLAY).expand_as(points) if colours is None else tensor(colours)
    around, _ = lamps(0)                                           # directions all over, here for points on a ball
    copies = around[:max(1, 30000 // max(1, len(points)))]
    cloud = rearrange(points[:, None] + radius * copies, "k n c -> (k n) c")
    see = lambda view, width: see_points(points, colours, radius, view, width)
    return picture(see, cloud, azimuth, elevation, size, mode)


def render_gaussians(means, scales, rotations, opacities, colours, azimuth=35, elevation=25, size=256, mode="colour"):
    """3D Gaussians as `splat` takes them, on the same floor, with their shadow."""
    if mode != "colour":
        raise UserError(f"3D Gaussians have colours alone, no {mode}; use --mode colour")
    means, scales, rotations, opacities, colours = (tensor(x) for x in (means, scales, rotations, opacities, colours))
    nothing = torch.zeros(0, dtype=torch.int64), *[torch.zeros(0, 3)] * 3
    ground = picture(lambda view, width: nothing, means[opacities > .5], azimuth, elevation, size, "colour")
    image = splat(means, scales, rotations, opacities, colours, azimuth, elevation, size, tensor(ground) / 255)
    return (image.clamp(0, 1) * 255).round().byte().numpy()


def turntable(shape, frames=36, size=256):
    """Pictures of one full turn of anything that geometry/export.py holds."""
    return [shape.picture(size, azimuth=35 + 360 * i / frames) for i in range(frames)]


def contact_sheet(images, columns, labels=None):
    """Pictures of one size side by side, row by row, a caption under each -> uint8 (h w 3)."""
    h, w, _ = images[0].shape
    gap, text = max(4, w // 32), max(11, w // 16)
    line, rows = text * 3 // 2 if labels else 0, math.ceil(len(images) / columns)
    size = columns * (w + gap) + gap, rows * (h + line + gap) + gap
    sheet = Image.new("RGB", size, tuple(round(255 * c) for c in PAPER))
    for i, image in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + line + gap)
        sheet.paste(Image.fromarray(image), (x, y))
        if labels:
            length = ImageFont.load_default(size=text).getlength(labels[i])
            font = ImageFont.load_default(size=max(8, min(text, text * .95 * w / max(1, length))))     # shrinks to fit
            place = x + w // 2, y + h + line // 2
            ImageDraw.Draw(sheet).text(place, labels[i], fill=(90, 84, 78), font=font, anchor="mm")
    return np.asarray(sheet)


def save_png(path, array):
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, "PNG", optimize=True)


def save_gif(path, frames, fps=15):
    """One palette for all frames, so that colours do not flicker."""
    palette = Image.fromarray(np.concatenate(frames[::6])).quantize(256)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    with atomic_write(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
