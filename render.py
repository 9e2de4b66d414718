"""Pictures of meshes, signed distance fields and point clouds, without a window and without a GPU.

Each kind of shape only answers "which surface point does each pixel see?"; `picture` lights all alike. The
light is a list of lamps: a sun spread over a small disc, a fill from the other side, a sky spread over the
hemisphere. Every lamp casts a hard shadow, the sum is soft: dark corners under a table top and the blurred
shadow on the floor come out of one line. Letters: f faces, v vertices, k points, p pixels.

    python render.py out/table-0.glb                      # -> out/table-0.png
    python render.py out/table-0.glb --turntable          # -> out/table-0.gif
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image, ImageDraw, ImageFont

from layers import Help, written

MODES = ("colour", "normal", "depth")
PAPER = (.985, .98, .972)          # the background, sRGB: white with a drop of warmth
CLAY = (.83, .78, .72)             # what a shape without colours is made of, sRGB
EYE = 6.                           # distance of the eye; far, so that perspective stays slight
HALF = 1.42                        # half the height of what is seen at the origin; objects are within .9
SAMPLES = 2                        # samples a pixel, along x and along y
SHADOW = 96                        # texels along a lamp's shadow map: coarse is soft, and quick
FLOOR, CELLS = 2.7, 96             # the floor whose shadow is worked out: half its width, cells along it


def tensor(array, dtype=torch.float32):
    """From torch on any device or from numpy; copied there, as torch wants no read-only or reversed arrays."""
    array = array.detach().cpu() if torch.is_tensor(array) else torch.from_numpy(np.array(array, order="C"))
    return array.to(dtype)


def scatter(count):
    """Points evenly over the unit cube (k 3), always the same: multiples of the powers of 1/1.2207, modulo 1."""
    i = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    return (i * torch.tensor([.8191725134, .6710436067, .5497004779], dtype=torch.float64) % 1).float()


def look(azimuth, elevation):
    """Rows: right, up, towards the eye, for angles in degrees; (0, 0) looks an object in the face."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([[math.cos(a), 0, -math.sin(a)],
                         [-math.sin(a) * math.sin(e), math.cos(e), -math.cos(a) * math.sin(e)],
                         [math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)]])


def project(points, view, width):
    """World points (k 3) -> pixel coordinates (k 2), y down, and distance before the eye (k)."""
    x, y, z = (points @ view.T).unbind(-1)
    distance = (EYE - z).clamp(min=.5)                             # a stray point behind the eye stays harmless
    scale = EYE / HALF / distance
    return torch.stack([1 + x * scale, 1 - y * scale], -1) * width / 2, distance


def rays(view, width):
    """Direction through every pixel centre, row by row (p 3), scaled to advance 1 along the view axis."""
    s = (torch.arange(width) + .5) * 2 / width - 1
    y, x = torch.meshgrid(-s, s, indexing="ij")
    return torch.stack([x * HALF / EYE, y * HALF / EYE, -torch.ones_like(x)], -1).flatten(0, 1) @ view


# ---- what each pixel sees: pixel (p), position, normal, colour (p 3), for three kinds of shape

def nearest(size, low, high, inside):
    """The z-buffer. Item i lies in the rectangle low[i]..high[i] (k 2); inside(i, x, y) -> its distance at
    pixel centres, infinite where it does not cover them. Returns the pixels covered and the item in front.

    Items of like size go together: one operation handles thousands of pixel-sized marching-cubes triangles,
    and the two big triangles of a box's side are no special case."""
    first, last = (low - .5).ceil().clamp(min=0), (high - .5).floor().clamp(max=size - 1)
    count, first = last - first + 1, first.long()                              # pixels along x and y, k 2
    power = count.clamp(min=1).log2().ceil().long()                            # rounded up to powers of two
    group = torch.where((count > 0).all(-1), power[:, 0] * 32 + power[:, 1], -1)   # -1: between pixel centres
    front = torch.full((size * size,), torch.iinfo(torch.int64).max)
    for code in group[group >= 0].unique().tolist():
        columns, rows = 2 ** (code // 32), 2 ** (code % 32)
        for i in (group == code).nonzero()[:, 0].split(max(1, 2 ** 20 // (columns * rows))):   # bounds memory
            x = (first[i, 0, None] + torch.arange(columns))[:, None, :]        # k 1 columns
            y = (first[i, 1, None] + torch.arange(rows))[:, :, None]           # k rows 1
            distance = inside(i, x + .5, y + .5)                               # k rows columns
            hit = distance.isfinite() & (x < size) & (y < size)
            # positive floats sort like their bits: distance above, item below, and one amin finds both
            key = distance.view(torch.int32).long() << 32 | i[:, None, None]
            front.scatter_reduce_(0, (y * size + x)[hit], key[hit], "amin")
    pixel = (front < torch.iinfo(torch.int64).max).nonzero()[:, 0]
    return pixel, front[pixel] & 0xffffffff


def see_mesh(vertices, faces, colours, view, width):
    xy, distance = project(vertices, view, width)
    corner, near = xy[faces], 1 / distance[faces]                              # f 3 2, f 3
    a, b, c = corner.unbind(1)
    # Barycentric weights are 1/3 at the centroid and affine in x and y: weight = 1/3 + slope . (xy - middle).
    middle, edge = corner.mean(1), torch.stack([b - c, c - a, a - b], 1)       # f 2; f 3 2, opposite a, b, c
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    area = torch.where(area == 0, math.nan, area)                              # nan is inside nothing
    slope = torch.stack([edge[..., 1], -edge[..., 0]], -1) / area[:, None, None]

    def inside(i, x, y):
        i = i[:, None, None]
        x, y = x - middle[i, 0], y - middle[i, 1]
        u, v, w = (1 / 3 + slope[i, j, 0] * x + slope[i, j, 1] * y for j in range(3))          # f rows columns
        inverse = u * near[i, 0] + v * near[i, 1] + w * near[i, 2]             # 1 / distance is affine too
        return torch.where(u.minimum(v).minimum(w) >= 0, 1 / inverse, math.inf)

    pixel, face = nearest(width, corner.amin(1), corner.amax(1), inside)
    xy = torch.stack([pixel % width, pixel // width], -1) + .5                 # p 2
    weight = 1 / 3 + (slope[face] * (xy - middle[face])[:, None]).sum(-1)      # p 3
    weight = F.normalize(weight * near[face], p=1, dim=-1)[..., None]          # perspective-correct

    a, b, c = vertices[faces].unbind(1)
    flat = torch.linalg.cross(b - a, c - a)
    smooth = torch.zeros_like(vertices)
    for j in range(3):
        smooth.index_add_(0, faces[:, j], flat)                                # big faces count for more
    flat, smooth = F.normalize(flat, dim=-1)[face][:, None], F.normalize(smooth, dim=-1)[faces[face]]
    # A corner whose averaged normal leaves its face's by over 40 degrees sits on a crease: stay flat there.
    crease = (((flat * smooth).sum(-1, keepdim=True) - .70) / .14).clamp(0, 1)
    normal = (weight * (flat + crease * (smooth - flat))).sum(1)
    position = (weight * vertices[faces[face]]).sum(1)
    away = (flat[:, 0] * (EYE * view[2] - position)).sum(-1, keepdim=True) < 0
    normal = F.normalize(torch.where(away, -normal, normal), dim=-1)           # inside-out faces are drawn too
    return pixel, position, normal, (weight * colours[faces[face]]).sum(1)


def see_points(points, colours, radius, view, width):
    """Every point is a little ball."""
    xy, distance = project(points, view, width)
    reach = radius * EYE / HALF / distance * width / 2                         # radius in pixels

    def rise(i, x, y):                                                         # of the ball above its rim, 0..1
        return (1 - ((x - xy[i, 0]) ** 2 + (y - xy[i, 1]) ** 2) / reach[i] ** 2).sqrt()      # nan beyond it

    def inside(i, x, y):
        i = i[:, None, None]
        return (distance[i] - radius * rise(i, x, y)).nan_to_num(math.inf)

    pixel, ball = nearest(width, xy - reach[:, None], xy + reach[:, None], inside)
    x, y = pixel % width + .5, pixel // width + .5
    normal = torch.stack([(x - xy[ball, 0]) / reach[ball], (xy[ball, 1] - y) / reach[ball], rise(ball, x, y)], -1) @ view
    return pixel, points[ball] + radius * normal, normal, colours[ball]


def gradient(distance, points, step=2e-3):
    """Direction of steepest ascent by central differences (k 3); step spans the noise of a learnt field."""
    axes = step * torch.eye(3)
    return F.normalize(torch.stack([distance(points + a) - distance(points - a) for a in axes], -1), dim=-1)


def see_sdf(distance, colour, view, width, steps=128):
    """Sphere tracing: nothing is nearer than the distance, so it is always safe to step that far."""
    ray, eye = F.normalize(rays(view, width), dim=-1), EYE * view[2]
    wall = torch.stack([(-1 - eye) / ray, (1 - eye) / ray])                    # to the six sides of [-1, 1]^3
    t, end = wall.amin(0).amax(-1), wall.amax(0).amin(-1)
    alive, hits = (t < end).nonzero()[:, 0], []
    for _ in range(steps):
        d = distance(eye + t[alive, None] * ray[alive])
        t[alive] += d
        hits.append(alive[d < 1e-3])                                           # a fraction of a pixel
        alive = alive[(d >= 1e-3) & (t[alive] < end[alive])]
    pixel = torch.cat(hits)
    position = eye + t[pixel, None] * ray[pixel]
    return pixel, position, gradient(distance, position), colour(position)


# ---- light

def lamps(azimuth):
    """Directions (l 3) and linear colours (l 3). They turn with the eye: every view is lit from its left."""
    def cap(count, axis, cosine, colour):                          # evenly over the cap around an axis
        i = torch.arange(count)
        z, turn = 1 - (i + .5) / count * (1 - cosine), i * math.pi * (3 - 5 ** .5)             # golden angle
        r = (1 - z * z).sqrt()
        return torch.stack([r * turn.cos(), r * turn.sin(), z], -1) @ axis, torch.tensor(colour).expand(count, 3) / count

    sun = cap(12, look(azimuth - 48, 54), .97, (1.02, .96, .87))
    fill = cap(4, look(azimuth + 55, 20), .95, (.17, .18, .21))
    sky = cap(24, look(azimuth, 90), .05, (.64, .66, .71))
    return [torch.cat(part) for part in zip(sun, fill, sky)]


def light(cloud, azimuth, position, normal):
    """Light arriving at surface points (k 3): sum over lamps of colour x visible x cosine, plus the floor's glow.

    A lamp sees the shape as a cloud of surface points, drawn into a coarse shadow map. Receivers are lifted
    off their surface by two texels, so that a surface does not shade itself."""
    low, high = cloud.amin(0), cloud.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2 + 1e-6
    cloud, lifted = ((cloud - centre) / radius).T, (position - centre) / radius + normal * 4 / SHADOW
    # Moving receivers about by a texel turns the edges of texels into grain, which anti-aliasing averages away.
    lifted = (lifted + (scatter(len(lifted)) - .5) * 4 / SHADOW).T.contiguous()
    glow = torch.tensor([.26, .25, .24])          # what looks down sees the floor, partly in the shape's own shadow
    total = glow * (.5 - .5 * normal[:, 1:2])
    for direction, colour in zip(*lamps(azimuth)):
        side = F.normalize(torch.linalg.cross(direction, torch.tensor([.31, .17, .94])), dim=0)
        basis = torch.stack([side, torch.linalg.cross(direction, side), -direction])

        def texel(points):                        # a rim of texels stays empty, for all that lies outside
            u, v, depth = basis @ points
            u, v = (s.mul_(.48 * SHADOW).add_(SHADOW / 2).long().clamp_(0, SHADOW - 1) for s in (u, v))
            return v * SHADOW + u, depth

        occluder = torch.full((SHADOW * SHADOW,), 9.).scatter_reduce_(0, *texel(cloud), "amin")
        index, depth = texel(lifted)
        visible = ((occluder[index] - depth) * (SHADOW / 4) + 1).clamp_(0, 1)
        total.addcmul_((visible * (normal @ direction).clamp_(min=0))[:, None], colour)
    return total


def to_linear(colour):
    return torch.where(colour <= .04045, colour / 12.92, ((colour + .055) / 1.055) ** 2.4)


def to_srgb(colour):
    return torch.where(colour <= .0031308, colour * 12.92, 1.055 * colour.clamp(min=1e-8) ** (1 / 2.4) - .055)


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


def render_sdf(distance_fn, colour_fn=None, azimuth=35, elevation=25, size=256, mode="colour"):
    """distance_fn: points (k 3), a float32 tensor within [-1, 1]^3 -> signed distances (k), which may be
    truncated; colour_fn: points (k 3) -> colours (k 3) in 0..1. Both may answer in numpy."""
    distance = lambda points: tensor(distance_fn(points))
    colour = lambda points: tensor(colour_fn(points)) if colour_fn else torch.tensor(CLAY).expand_as(points)
    cloud = scatter(2 ** 18) * 2 - 1
    d = distance(cloud)
    near = d.abs() < .06                                           # below any truncation; these are pulled onto
    cloud = cloud[near] - d[near, None] * gradient(distance, cloud[near])      # the surface
    see = lambda view, width: see_sdf(distance, colour, view, width)
    return picture(see, cloud, azimuth, elevation, size, mode)


def turntable(vertices, faces, colours=None, frames=36, size=256):
    """Pictures of one full turn."""
    return [render_mesh(vertices, faces, colours, azimuth=35 + 360 * i / frames, size=size) for i in range(frames)]


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
    with written(path) as temporary:
        Image.fromarray(array).save(temporary, optimize=True)


def save_gif(path, frames, fps=15):
    """One palette for all frames, so that colours do not flicker."""
    palette = Image.fromarray(np.concatenate(frames[::6])).quantize(256)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    with written(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=Help)
    parser.add_argument("file", type=Path, help="a mesh that sample.py wrote, .glb")
    parser.add_argument("--out", type=Path, help="picture to write; None: beside the file, .png or .gif")
    parser.add_argument("--mode", default="colour", choices=MODES, help="what the picture shows")
    parser.add_argument("--azimuth", type=float, default=35, help="degrees around the object; 0 sees its face")
    parser.add_argument("--elevation", type=float, default=25, help="degrees above the horizon")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--turntable", action="store_true", help="one full turn as a GIF")
    args = parser.parse_args()
    if not 16 <= args.size <= 4096:
        parser.error(f"--size {args.size}: choose 16 to 4096 pixels")
    out = args.out or args.file.with_suffix(".gif" if args.turntable else ".png")
    from export import read_glb                     # trimesh takes a while to import, and only this needs it
    try:
        mesh = read_glb(args.file)
        if args.turntable:
            save_gif(out, turntable(*mesh, size=args.size))
        else:
            save_png(out, render_mesh(*mesh, args.azimuth, args.elevation, args.size, args.mode))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(out)


if __name__ == "__main__":
    main()
