"""Rotations: unit quaternions, rotation vectors, matrices and Euler angles as pure functions.

A rotation acts on column vectors, x' = R x, and turns counter-clockwise about its axis seen from the tip.
A rotation vector v points along the axis, its length is the angle.  Quaternions are q = (w, x, y, z) with
w = cos(|v| / 2), (x, y, z) = sin(|v| / 2) v / |v|, and q and -q are the same rotation.  Angles are radians.

Every function takes any leading batch axes, keeps dtype and device, and works under `vmap`, `grad`, `jacrev`,
`jvp` and `jacfwd` of torch.func.  Derivatives are finite everywhere: where a closed form divides by zero
a power series or a constant takes its place before the division.  NaN in gives NaN out.  A wrong trailing
shape raises ValueError, a dtype that is not floating point TypeError.

Source for exp, log and product: Solà, Deray, Atchuthan, A micro Lie theory for state estimation in robotics,
2018, doi:10.48550/arXiv.1812.01537.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EXTRINSIC = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx", "xyx", "xzx", "yxy", "yzy", "zxz", "zyz")
EULER_ORDERS: tuple[str, ...] = (*_EXTRINSIC, *(order.upper() for order in _EXTRINSIC))

# Power series in the squared argument.  Exact to float64 rounding, with two derivatives, where they are used.
_COSINE = tuple((-1) ** n / math.factorial(2 * n) for n in range(10))  # cos x
_SINE = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(10))  # sin(x) / x
_ARCTANGENT = tuple((-1) ** n / (2 * n + 1) for n in range(16))  # atan(x) / x


def normalize_quaternion(quaternion: Tensor) -> Tensor:
    """q / |q|, and the identity, with zero derivative, for q = 0, which has no direction.

    quaternion : (..., 4); zero is a norm whose square is below the smallest normal number of the dtype
    returns : (..., 4)

    >>> normalize_quaternion(torch.tensor([0.0, 3.0, 0.0, 4.0])).tolist()
    [0.0, 0.6000000238418579, 0.0, 0.800000011920929]
    """
    _check("quaternion", quaternion, 4)
    squared = quaternion.square().sum(-1, keepdim=True)  # (..., 1)
    zero = squared < torch.finfo(quaternion.dtype).tiny  # false for NaN, which has to stay visible
    identity = torch.eye(4, dtype=quaternion.dtype, device=quaternion.device)[0]
    return torch.where(zero, identity, quaternion / torch.where(zero, 1.0, squared).sqrt())


def quaternion_conjugate(quaternion: Tensor) -> Tensor:
    """(w, x, y, z) -> (w, -x, -y, -z), for a unit quaternion the inverse rotation; shapes (..., 4).

    >>> quaternion_conjugate(torch.tensor([0.5, 0.5, -0.5, 0.5])).tolist()
    [0.5, -0.5, 0.5, -0.5]
    """
    _check("quaternion", quaternion, 4)
    return torch.cat([quaternion[..., :1], -quaternion[..., 1:]], dim=-1)


def quaternion_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product a b: the rotation b first, then a, so R(a b) = R(a) R(b).

    a, b : (..., 4), leading axes broadcast; the product is not normalised
    returns : (..., 4)

    >>> i, j = torch.eye(4)[1], torch.eye(4)[2]
    >>> quaternion_multiply(i, j).tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    _check("a", a, 4)
    _check("b", b, 4)
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    w = aw * bw - ax * bx - ay * by - az * bz
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    return torch.stack([w, x, y, z], dim=-1)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """R = I + 2 w [u]x + 2 [u]x^2 of (w, u) = q / |q|: any length of q gives a rotation, q = 0 the identity.

    quaternion : (..., 4)
    returns : (..., 3, 3), orthonormal with determinant 1

    >>> quaternion_to_matrix(torch.tensor([1.0, 0.0, 0.0, 1.0])).round().abs().tolist()  # x -> y -> -x
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    w, x, y, z = normalize_quaternion(quaternion).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return _matrix(rows)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternion with w >= 0 of a rotation matrix, accurate at every angle.

    The entries of 4 q q^T are linear in R; its row with the largest diagonal is 4 q_i q with |q_i| >= 1/2, so
    normalising that row loses no digits.  Where w = 0 the first of x, y, z that is not zero is positive.
    Derivatives are right along the rotations; off them they are those of the row in use.

    matrix : (..., 3, 3), a rotation; that is not checked
    returns : (..., 4)

    Sources: Shepperd 1978, doi:10.2514/3.55767b; Markley 2008, doi:10.2514/1.31730.

    >>> matrix_to_quaternion(torch.diag(torch.tensor([-1.0, 1.0, -1.0]))).tolist()  # half a turn about y
    [0.0, 0.0, 1.0, 0.0]
    """
    _check("matrix", matrix, 3, 3)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = matrix.flatten(-2).unbind(-1)
    rows = [
        [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
    ]
    outer = _matrix(rows)  # (..., 4, 4)
    largest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    return _upper(normalize_quaternion(torch.take_along_dim(outer, largest, dim=-2).squeeze(-2)))


def rotation_vector_to_quaternion(vector: Tensor) -> Tensor:
    """Exponential map: q = (cos(|v| / 2), sin(|v| / 2) v / |v|), smooth at v = 0, with its derivatives.

    vector : (..., 3), radians; any length
    returns : (..., 4), of unit length; w < 0 for angles between pi and 3 pi

    >>> rotation_vector_to_quaternion(torch.tensor([0.0, math.pi, 0.0])).round(decimals=4).abs().tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    _check("rotation vector", vector, 3)
    squared = vector.square().sum(-1, keepdim=True)  # (..., 1)
    small = squared < 1
    quarter = torch.where(small, squared, 0.0) / 4
    angle = torch.where(small, 1.0, squared).sqrt()
    scalar = torch.where(small, _series(quarter, _COSINE), (angle / 2).cos())
    factor = torch.where(small, _series(quarter, _SINE) / 2, (angle / 2).sin() / angle)
    return torch.cat([scalar, factor * vector], dim=-1)


def quaternion_to_rotation_vector(quaternion: Tensor) -> Tensor:
    """Logarithm: v = 2 atan2(|u|, w) u / |u| of (w, u) = q / |q|, with the sign of q for which w >= 0.

    Smooth at the identity; q and -q give the same v.  At half a turn v jumps to -v: the derivative there is
    that of the side taken.

    quaternion : (..., 4), of any length; q = 0 is the identity
    returns : (..., 3), radians, of length in [0, pi]

    >>> quaternion_to_rotation_vector(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist()  # a quarter turn about z
    [0.0, 0.0, 1.5707963705062866]
    """
    unit = _upper(normalize_quaternion(quaternion))
    w, u = unit[..., :1], unit[..., 1:]
    squared = u.square().sum(-1, keepdim=True)  # (..., 1)
    small = squared < 0.04
    cosine = torch.where(small, w, 1.0)
    sine = torch.where(small, 1.0, squared).sqrt()
    near = _series(torch.where(small, squared, 0.0) / cosine.square(), _ARCTANGENT) / cosine
    return 2 * torch.where(small, near, torch.atan2(sine, w) / sine) * u


def rotation_vector_to_matrix(vector: Tensor) -> Tensor:
    """R = exp([v]x), the rotation about v by |v| radians; smooth at v = 0.

    vector : (..., 3), radians
    returns : (..., 3, 3)

    >>> rotation_vector_to_matrix(torch.zeros(3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return quaternion_to_matrix(rotation_vector_to_quaternion(vector))


def matrix_to_rotation_vector(matrix: Tensor) -> Tensor:
    """v with exp([v]x) = R and |v| in [0, pi]; at half a turn one of v and -v.

    matrix : (..., 3, 3), a rotation; that is not checked
    returns : (..., 3), radians

    >>> matrix_to_rotation_vector(torch.diag(torch.tensor([1.0, -1.0, -1.0]))).tolist()
    [3.1415927410125732, 0.0, 0.0]
    """
    return quaternion_to_rotation_vector(matrix_to_quaternion(matrix))


def euler_to_matrix(angles: Tensor, order: str) -> Tensor:
    """Rotation matrix of three turns (a, b, c) about the axes that `order` names, first letter first.

    Upper-case letters are intrinsic, about the axes as turned so far: "XYZ" is R = Rx(a) Ry(b) Rz(c).
    Lower-case letters are extrinsic, about the fixed axes: "xyz" is R = Rz(c) Ry(b) Rx(a).  So "xyz" of
    (a, b, c) is "ZYX" of (c, b, a).  This is the convention of scipy.spatial.transform.Rotation.

    angles : (..., 3), radians, in the sequence of the letters
    order : one of `EULER_ORDERS`; ValueError for another
    returns : (..., 3, 3)

    >>> euler_to_matrix(torch.tensor([0.0, 0.0, math.pi / 2]), "xyz").round().abs().tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    axes, extrinsic = _axes(order)
    _check("angles", angles, 3)
    first, second, third = (_turn(angles[..., n], axis) for n, axis in enumerate(axes))
    return third @ second @ first if extrinsic else first @ second @ third


def matrix_to_euler(matrix: Tensor, order: str) -> Tensor:
    """Angles (a, b, c) with `euler_to_matrix((a, b, c), order)` = R.

    a and c are in [-pi, pi]; b is in [-pi/2, pi/2] for three different axes, in [0, pi] when the first axis
    returns.  c comes first, a and b from the two turns that are left when c is undone.  So near gimbal lock,
    where a and c turn about one axis, a makes up for an ill determined c and R is reproduced.  At the lock,
    to rounding, c = 0.

    matrix : (..., 3, 3), a rotation; that is not checked
    order : one of `EULER_ORDERS`; ValueError for another
    returns : (..., 3), radians, in the sequence of the letters

    For the ranges and the lock: Bernardes, Viollet 2022, doi:10.1371/journal.pone.0276302.

    >>> matrix = euler_to_matrix(torch.tensor([0.25, 0.5, -1.0]), "ZXZ")
    >>> matrix_to_euler(matrix, "ZXZ").round(decimals=4).tolist()
    [0.25, 0.5, -1.0]
    """
    (i, j, last), extrinsic = _axes(order)
    _check("matrix", matrix, 3, 3)
    proper = i == last
    k = 3 - i - j
    # The transpose of an extrinsic rotation is the intrinsic one of the negative angles: sines change sign.
    turns = -1 if extrinsic else 1
    sign = turns if (j - i) % 3 == 1 else -turns
    product = matrix.mT if extrinsic else matrix  # T_i(a) T_j(b) T_last(c) with T(angle) = R(turns * angle)
    sine = product[..., i, j] if proper else -sign * product[..., i, j]  # times sin b, or cos b
    cosine = sign * product[..., i, k] if proper else product[..., i, i]
    c = _angle(sine, cosine, tolerance=64 * torch.finfo(matrix.dtype).eps)
    rest = product @ _turn(-turns * c, last)  # T_i(a) T_j(b)
    sine, cosine = sign * rest[..., i, k], rest[..., i, i]
    # c made sin b, or cos b, positive; at the lock rounding can undo that and would move b out of its range.
    b = _angle(sine.abs(), cosine) if proper else _angle(sine, cosine.abs())
    a = _angle(sign * rest[..., k, j], rest[..., j, j])
    return torch.stack([a, b, c], dim=-1)


def angle_to_matrix(angle: Tensor) -> Tensor:
    """Rotation of the plane, [[cos a, -sin a], [sin a, cos a]], from the x axis towards the y axis.

    angle : (..., 1), radians
    returns : (..., 2, 2)

    >>> angle_to_matrix(torch.zeros(1)).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _check("angle", angle, 1)
    cosine, sine = angle[..., 0].cos(), angle[..., 0].sin()
    return _matrix([[cosine, -sine], [sine, cosine]])


def matrix_to_angle(matrix: Tensor) -> Tensor:
    """Angle atan2(R10 - R01, R00 + R11) of the rotation of the plane that is nearest to a matrix.

    matrix : (..., 2, 2), need not be a rotation; 0 where none is nearest, as for a reflection
    returns : (..., 1), radians, in [-pi, pi]

    >>> matrix_to_angle(torch.tensor([[0.0, -1.0], [1.0, 0.0]])).tolist()
    [1.5707963705062866]
    """
    _check("matrix", matrix, 2, 2)
    xx, xy, yx, yy = matrix.flatten(-2).unbind(-1)
    return _angle(yx - xy, xx + yy).unsqueeze(-1)


def _check(name: str, tensor: Tensor, *trailing: int) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected floating point, as torch.float64")
    if tuple(tensor.shape[-len(trailing) :]) != trailing:
        expected = ", ".join(map(str, trailing))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected (..., {expected})")


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """Matrices (..., N, N) from rows of entries (...)."""
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _axes(order: str) -> tuple[tuple[int, int, int], bool]:
    """The axes of an Euler order and whether it is extrinsic."""
    if order not in EULER_ORDERS:
        raise ValueError(f"order is {order!r}: expected one of {', '.join(EULER_ORDERS)}")
    i, j, k = ("xyz".index(letter) for letter in order.lower())
    return (i, j, k), order in _EXTRINSIC


def _series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """sum_n c_n x^n by Horner's rule."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _upper(quaternion: Tensor) -> Tensor:
    """Of q and -q the one whose first component that is not zero is positive."""
    w, x, y, z = quaternion.sign().unbind(-1)
    sign = torch.where(w != 0, w, torch.where(x != 0, x, torch.where(y != 0, y, z)))
    return quaternion * sign.unsqueeze(-1)


def _angle(sine: Tensor, cosine: Tensor, tolerance: float = 0.0) -> Tensor:
    """atan2, and 0 with zero derivative where both arguments vanish."""
    zero = sine.square() + cosine.square() <= tolerance**2
    return torch.atan2(torch.where(zero, 0.0, sine), torch.where(zero, 1.0, cosine))


def _turn(angle: Tensor, axis: int) -> Tensor:
    """Rotation by `angle` (...) about a coordinate axis, (..., 3, 3)."""
    cosine, sine, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    about_x = _matrix([[one, zero, zero], [zero, cosine, -sine], [zero, sine, cosine]])
    return about_x.roll((axis, axis), (-2, -1))
