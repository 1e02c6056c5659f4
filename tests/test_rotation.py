"""Rotations against scipy, against their laws, and against their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import scipy.spatial.transform
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from fnreg.transforms import rotation
from fnreg.transforms.rotation import (
    EULER_ORDERS,
    angle_to_matrix,
    euler_to_matrix,
    matrix_to_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rotation_vector,
    normalize_quaternion,
    quaternion_conjugate,
    quaternion_multiply,
    quaternion_to_matrix,
    quaternion_to_rotation_vector,
    rotation_vector_to_matrix,
    rotation_vector_to_quaternion,
)

# torch's forward mode compiles its own decompositions with torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Scipy: Any = scipy.spatial.transform.Rotation
PI = math.pi
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6}
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-13}


class Case(NamedTuple):
    """A function, the trailing shapes of what it takes and gives, and valid input from rotation vectors."""

    function: Callable[..., Tensor]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    sample: Callable[[Tensor], Tensor]


def quaternions(vectors: Tensor) -> Tensor:
    return rotation_vector_to_quaternion(vectors)


def matrices(vectors: Tensor) -> Tensor:
    return rotation_vector_to_matrix(vectors)


def plane(vectors: Tensor) -> Tensor:
    return angle_to_matrix(vectors[..., :1])


def product(a: Tensor) -> Tensor:
    return quaternion_multiply(a, normalize_quaternion(a.flip(-1) + 0.25))


CASES = {
    "normalize_quaternion": Case(normalize_quaternion, (4,), (4,), lambda v: 3 * quaternions(v)),
    "quaternion_conjugate": Case(quaternion_conjugate, (4,), (4,), quaternions),
    "quaternion_multiply": Case(product, (4,), (4,), quaternions),
    "quaternion_to_matrix": Case(quaternion_to_matrix, (4,), (3, 3), quaternions),
    "matrix_to_quaternion": Case(matrix_to_quaternion, (3, 3), (4,), matrices),
    "rotation_vector_to_quaternion": Case(rotation_vector_to_quaternion, (3,), (4,), lambda v: v),
    "quaternion_to_rotation_vector": Case(quaternion_to_rotation_vector, (4,), (3,), quaternions),
    "rotation_vector_to_matrix": Case(rotation_vector_to_matrix, (3,), (3, 3), lambda v: v),
    "matrix_to_rotation_vector": Case(matrix_to_rotation_vector, (3, 3), (3,), matrices),
    "angle_to_matrix": Case(angle_to_matrix, (1,), (2, 2), lambda v: v[..., :1]),
    "matrix_to_angle": Case(matrix_to_angle, (2, 2), (1,), plane),
    "euler_to_matrix": Case(lambda a: euler_to_matrix(a, "XYZ"), (3,), (3, 3), lambda v: v),
    "matrix_to_euler": Case(lambda m: matrix_to_euler(m, "XYZ"), (3, 3), (3,), matrices),
    "matrix_to_euler extrinsic": Case(lambda m: matrix_to_euler(m, "zxz"), (3, 3), (3,), matrices),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_order = pytest.mark.parametrize("order", EULER_ORDERS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directions() -> Tensor:
    """Unit vectors: the axes, diagonals of faces and of the cube, both ways, and some at random."""
    grid = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).to(torch.float64)
    return torch.nn.functional.normalize(torch.cat([grid[grid.any(-1)], random(14, 3)]), dim=-1)


def vectors_of(*angles: float) -> Tensor:
    return (tensor(angles)[:, None, None] * directions()).reshape(-1, 3)


def to_scipy(quaternion: Tensor) -> Any:
    return Scipy.from_quat(quaternion.to(torch.float64).roll(-1, -1).numpy())  # scipy has w last


def wrap(angles: Tensor) -> Tensor:
    return torch.remainder(angles + PI, 2 * PI) - PI


def assert_same_rotation(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Unit quaternions equal up to sign."""
    sign = (actual * expected).sum(-1, keepdim=True).sign()
    assert_close(actual * sign, expected, rtol=0, atol=tolerance)


# Where the forms change: series below 1 rad (exp) and below 0.4 rad (log), half turns, more than one turn.
ANGLES = (1e-12, 1e-4, 0.39, 0.41, 0.999, 1.001, 2.0, PI - 1e-3, PI - 1e-8, PI, PI + 1e-8, 5.0)


# -- against scipy -----------------------------------------------------------------------------------------


@both_dtypes
def test_values_equal_scipy(dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    vectors = torch.cat([torch.zeros(1, 3, dtype=torch.float64), vectors_of(*ANGLES)]).to(dtype)
    oracle = Scipy.from_rotvec(vectors.to(torch.float64).numpy())
    quaternion = tensor(oracle.as_quat(), dtype).roll(1, -1)
    matrix = tensor(oracle.as_matrix(), dtype)
    assert_same_rotation(rotation_vector_to_quaternion(vectors), quaternion, tolerance)
    assert_close(rotation_vector_to_matrix(vectors), matrix, rtol=0, atol=tolerance)
    assert_close(quaternion_to_matrix(quaternion), matrix, rtol=0, atol=tolerance)
    assert_same_rotation(matrix_to_quaternion(matrix), quaternion, tolerance)
    assert bool((matrix_to_quaternion(matrix)[..., 0] >= 0).all())
    exact_quaternion = quaternion.to(torch.float64)
    by_scipy = tensor(to_scipy(exact_quaternion).as_rotvec(), dtype)
    by_fnreg = quaternion_to_rotation_vector(quaternion)
    turned = PI - by_scipy.norm(dim=-1) < 4 * tolerance  # at half a turn v and -v are the same
    assert bool(turned.any())
    assert not bool(turned.all())
    assert_close(by_fnreg[~turned], by_scipy[~turned], rtol=0, atol=2 * tolerance)
    flip = (by_fnreg * by_scipy).sum(-1, keepdim=True).sign()
    assert_close((by_fnreg * flip)[turned], by_scipy[turned], rtol=0, atol=16 * tolerance)


def test_tiny_angles_keep_their_digits() -> None:
    vectors = vectors_of(1e-300, 1e-160, 1e-12, 1e-6)
    again = quaternion_to_rotation_vector(rotation_vector_to_quaternion(vectors))
    assert_close(again, vectors, rtol=1e-14, atol=0)
    assert_close(matrix_to_rotation_vector(rotation_vector_to_matrix(vectors)), vectors, rtol=1e-14, atol=0)


def test_product_equals_scipy_and_broadcasts() -> None:
    a, b = normalize_quaternion(random(5, 1, 4)), normalize_quaternion(random(1, 7, 4, seed=1))
    actual = quaternion_multiply(a, b)
    assert actual.shape == (5, 7, 4)
    pairs = (a.expand(5, 7, 4).reshape(-1, 4), b.expand(5, 7, 4).reshape(-1, 4))
    expected = (to_scipy(pairs[0]) * to_scipy(pairs[1])).as_matrix()
    assert_close(quaternion_to_matrix(actual).reshape(-1, 3, 3), tensor(expected), **EXACT)


@every_order
@both_dtypes
def test_euler_equals_scipy(order: str, dtype: torch.dtype) -> None:
    angles = tensor(random(50, 3) * 2, dtype)
    oracle = Scipy.from_euler(order, angles.to(torch.float64).numpy())
    matrix = tensor(oracle.as_matrix(), dtype)
    assert_close(euler_to_matrix(angles, order), matrix, rtol=0, atol=TOLERANCE[dtype])
    actual = matrix_to_euler(matrix, order)
    assert actual.dtype == dtype
    assert_close(euler_to_matrix(actual, order), matrix, rtol=0, atol=TOLERANCE[dtype])
    if dtype == torch.float64:
        difference = wrap(actual - tensor(oracle.as_euler(order)))
        assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-12)


@every_order
def test_euler_at_gimbal_lock(order: str) -> None:
    proper = order[0] == order[2]
    first, last = torch.meshgrid(*[torch.linspace(-3, 3, 7, dtype=torch.float64)] * 2, indexing="ij")
    for locked in (0.0, PI) if proper else (PI / 2, -PI / 2):
        angles = torch.stack([first, torch.full_like(first, locked), last], dim=-1).reshape(-1, 3)
        matrix = tensor(Scipy.from_euler(order, angles.numpy()).as_matrix())
        actual = matrix_to_euler(matrix, order)
        assert_close(actual[:, 2], torch.zeros(49, dtype=torch.float64), rtol=0, atol=0)
        assert_close(actual[:, 1], angles[:, 1], rtol=0, atol=1e-14)
        assert_close(euler_to_matrix(actual, order), matrix, **EXACT)
        jacobian = vmap(jacrev(lambda m: matrix_to_euler(m, order)))(matrix)
        assert bool(jacobian.isfinite().all())


@every_order
@both_dtypes
def test_euler_reproduces_the_matrix_beside_the_lock(order: str, dtype: torch.dtype) -> None:
    lock = (0.0, PI) if order[0] == order[2] else (PI / 2, -PI / 2)
    offsets = tensor([s * 10.0**-n for n in range(3, 18) for s in (-1, 1)])
    for locked in lock:
        angles = torch.stack([random(30), locked + offsets, random(30, seed=1)], dim=-1).to(dtype)
        matrix = euler_to_matrix(angles, order)
        actual = matrix_to_euler(matrix, order)
        assert_close(euler_to_matrix(actual, order), matrix, rtol=0, atol=256 * torch.finfo(dtype).eps)
        middle = actual[:, 1] - (PI / 2 if order[0] == order[2] else 0.0)
        assert bool((middle.abs() <= PI / 2 + 2 * torch.finfo(dtype).eps).all())


def test_euler_convention_by_hand() -> None:
    a, b, c = tensor([0.3, -0.7, 1.1])
    x, y, z = rotation_vector_to_matrix(torch.diag(torch.stack([a, b, c])))
    assert_close(euler_to_matrix(torch.stack([a, b, c]), "XYZ"), x @ y @ z, **EXACT)
    assert_close(euler_to_matrix(torch.stack([a, b, c]), "xyz"), z @ y @ x, **EXACT)
    assert_close(euler_to_matrix(torch.stack([c, b, a]), "ZYX"), z @ y @ x, **EXACT)
    assert len(set(EULER_ORDERS)) == 24


# -- laws --------------------------------------------------------------------------------------------------

coordinates = st.floats(-1, 1, allow_subnormal=False)
axes = (
    st.tuples(coordinates, coordinates, coordinates)
    .filter(lambda v: math.hypot(*v) > 1e-3)
    .map(lambda v: tensor(v) / math.hypot(*v))
)
rotation_vectors = st.tuples(axes, st.floats(0, 10)).map(lambda pair: pair[0] * pair[1])
proper_vectors = st.tuples(axes, st.floats(0, PI - 1e-7)).map(lambda pair: pair[0] * pair[1])
unit_quaternions = rotation_vectors.map(rotation_vector_to_quaternion)


@given(rotation_vectors)
@example(torch.zeros(3, dtype=torch.float64))
@example(tensor([PI, 0, 0]))
def test_matrix_is_a_rotation(vector: Tensor) -> None:
    matrix = rotation_vector_to_matrix(vector)
    assert_close(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64), **EXACT)
    assert_close(torch.linalg.det(matrix), tensor(1.0), **EXACT)
    assert_close(matrix @ vector, vector, rtol=0, atol=1e-13)  # the axis stays
    assert_close(matrix.trace(), 1 + 2 * vector.norm().cos(), **EXACT)  # by the angle
    assert_close(rotation_vector_to_matrix(-vector), matrix.mT, **EXACT)


@given(proper_vectors)
@example(torch.zeros(3, dtype=torch.float64))
@example(tensor([0, PI - 1e-9, 0]))
def test_log_inverts_exp(vector: Tensor) -> None:
    assert_close(quaternion_to_rotation_vector(rotation_vector_to_quaternion(vector)), vector, **EXACT)
    assert_close(matrix_to_rotation_vector(rotation_vector_to_matrix(vector)), vector, **EXACT)


@given(unit_quaternions, st.floats(1e-3, 1e3))
@example(tensor([0.0, 0.0, -0.6, 0.8]), 2.0)
@example(tensor([-0.0, 0.0, 0.0, -1.0]), 2.0)
@example(tensor([-1.0, 0.0, 0.0, 0.0]), 2.0)
def test_quaternion_and_its_negative_are_one_rotation(quaternion: Tensor, scale: float) -> None:
    vector = quaternion_to_rotation_vector(quaternion)
    assert torch.equal(quaternion_to_rotation_vector(-quaternion), vector)
    assert torch.equal(quaternion_to_matrix(-quaternion), quaternion_to_matrix(quaternion))
    assert 0 <= float(vector.norm()) <= PI + 1e-15
    # The length of a quaternion means nothing.
    assert_close(quaternion_to_matrix(scale * quaternion), quaternion_to_matrix(quaternion), **EXACT)
    if abs(float(quaternion[0])) > 1e-12:
        assert_close(quaternion_to_rotation_vector(scale * quaternion), vector, **EXACT)
    # exp inverts log, up to sign; and so does the way over the matrix, with w >= 0.
    assert_same_rotation(rotation_vector_to_quaternion(vector), quaternion, 1e-14)
    again = matrix_to_quaternion(quaternion_to_matrix(quaternion))
    assert_same_rotation(again, quaternion, 1e-14)
    assert float(again[0]) >= 0


@given(unit_quaternions, unit_quaternions)
def test_product_is_a_homomorphism(a: Tensor, b: Tensor) -> None:
    expected = quaternion_to_matrix(a) @ quaternion_to_matrix(b)
    assert_close(quaternion_to_matrix(quaternion_multiply(a, b)), expected, **EXACT)
    identity = tensor([1.0, 0.0, 0.0, 0.0])
    assert_close(quaternion_multiply(a, quaternion_conjugate(a)), identity, **EXACT)
    left = quaternion_conjugate(quaternion_multiply(a, b))
    assert_close(left, quaternion_multiply(quaternion_conjugate(b), quaternion_conjugate(a)), **EXACT)


@given(rotation_vectors, st.sampled_from(EULER_ORDERS))
@example(torch.zeros(3, dtype=torch.float64), "ZXZ")
@example(tensor([0, PI / 2, 0]), "XYZ")
def test_euler_angles_reproduce_the_matrix(vector: Tensor, order: str) -> None:
    matrix = rotation_vector_to_matrix(vector)
    angles = matrix_to_euler(matrix, order)
    assert_close(euler_to_matrix(angles, order), matrix, **EXACT)
    a, b, c = angles.tolist()
    low, high = (0.0, PI) if order[0] == order[2] else (-PI / 2, PI / 2)
    assert abs(a) <= PI
    assert low <= b <= high
    assert abs(c) <= PI


@given(st.floats(-PI + 1e-9, PI), st.floats(-PI, PI), st.floats(1e-3, 1e3))
def test_plane(angle: float, other: float, scale: float) -> None:
    matrix = angle_to_matrix(tensor([angle]))
    assert_close(matrix, tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))
    assert_close(matrix @ angle_to_matrix(tensor([other])), angle_to_matrix(tensor([angle + other])), **EXACT)
    noise = tensor([[0.3, 0.2], [0.2, -0.3]])  # no rotation is nearer to this than another
    assert_close(matrix_to_angle(scale * matrix + noise), tensor([angle]), rtol=0, atol=1e-11)
    spatial = rotation_vector_to_matrix(tensor([0.0, 0.0, angle]))
    assert_close(spatial[:2, :2], matrix, **EXACT)


# -- half turns --------------------------------------------------------------------------------------------


@both_dtypes
def test_near_half_a_turn(dtype: torch.dtype) -> None:
    epsilon = torch.finfo(dtype).eps
    for distance in (1e-2, 1e-3, 1e-5, 1e-7, 1e-12, 0.0):
        vectors = vectors_of(PI - distance).to(dtype)
        matrix = rotation_vector_to_matrix(vectors)
        quaternion = matrix_to_quaternion(matrix)
        assert_same_rotation(quaternion, rotation_vector_to_quaternion(vectors), 4 * epsilon)
        again = matrix_to_rotation_vector(matrix)
        assert_close(again.norm(dim=-1), vectors.norm(dim=-1), rtol=0, atol=16 * epsilon)
        if distance > 16 * epsilon:
            assert_close(again, vectors, rtol=0, atol=16 * epsilon)
        else:
            assert_close(rotation_vector_to_matrix(again), matrix, rtol=0, atol=16 * epsilon)


def test_exact_half_turns_have_one_answer_and_finite_derivatives() -> None:
    axis = directions()
    quaternion = torch.cat([torch.zeros(len(axis), 1, dtype=torch.float64), axis], dim=-1)
    vector = quaternion_to_rotation_vector(quaternion)
    assert torch.equal(vector, quaternion_to_rotation_vector(-quaternion))
    assert_close(vector.norm(dim=-1), torch.full((len(axis),), PI, dtype=torch.float64), **EXACT)
    first = torch.stack([next(x for x in v if x != 0) for v in vector])
    assert bool((first > 0).all())
    matrix = 2 * axis[:, :, None] * axis[:, None, :] - torch.eye(3, dtype=torch.float64)
    assert_same_rotation(matrix_to_quaternion(matrix), quaternion, 1e-15)
    logarithms = (quaternion_to_rotation_vector, quaternion), (matrix_to_rotation_vector, matrix)
    for function, points in logarithms:
        assert bool(vmap(jacrev(function))(points).isfinite().all())
        assert bool(vmap(jacfwd(jacrev(function)))(points).isfinite().all())


# -- derivatives -------------------------------------------------------------------------------------------


@every_case
def test_first_derivatives(case: Case) -> None:
    vectors = torch.cat([random(3, 3), 3 * directions()[-2:], 0.3 * directions()[-3:]])
    points = case.sample(vectors).detach().requires_grad_()
    assert gradcheck(case.function, points, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("length", [0.0, 1e-3, 0.999, 1.001, PI])
def test_exponential_to_second_order(length: float) -> None:
    points = (length * directions()[-2:]).requires_grad_()
    for function in (rotation_vector_to_quaternion, rotation_vector_to_matrix):
        assert gradcheck(function, points, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, points, check_fwd_over_rev=True, check_batched_grad=True)


def generators() -> Tensor:
    """G with [v]x = sum_i v_i G_i, from the definition of the cross product."""
    basis = torch.eye(3, dtype=torch.float64)
    return torch.linalg.cross(basis[:, None, :].expand(3, 3, 3), basis.expand(3, 3, 3)).mT


@pytest.mark.parametrize("modes", [(jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)])
def test_exponential_at_zero_is_its_taylor_series(modes: tuple[Any, Any]) -> None:
    outer, inner = modes
    zero = torch.zeros(3, dtype=torch.float64)
    generator = generators()
    first = inner(rotation_vector_to_matrix)(zero)  # (3, 3, i)
    second = outer(inner(rotation_vector_to_matrix))(zero)  # (3, 3, i, j)
    both = torch.einsum("iab,jbc->acij", generator, generator)
    assert_close(first, generator.permute(1, 2, 0), **EXACT)
    assert_close(second, (both + both.transpose(2, 3)) / 2, **EXACT)
    second = outer(inner(rotation_vector_to_quaternion))(zero)
    assert_close(second[0], -torch.eye(3, dtype=torch.float64) / 4, **EXACT)
    assert_close(second[1:], torch.zeros(3, 3, 3, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("via", ["quaternion", "matrix"])
@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_log_after_exp_has_identity_derivative(via: str, mode: Any) -> None:
    def round_trip(vector: Tensor) -> Tensor:
        if via == "matrix":
            return matrix_to_rotation_vector(rotation_vector_to_matrix(vector))
        return quaternion_to_rotation_vector(rotation_vector_to_quaternion(vector))

    vectors = vectors_of(0.0, 1e-200, 1e-9, 1e-5, 1e-3, 0.399, 0.401, 0.999, 1.001, 2.0, PI - 1e-3, PI - 1e-7)
    identity = torch.eye(3, dtype=torch.float64).expand(len(vectors), 3, 3)
    assert_close(vmap(mode(round_trip))(vectors), identity, rtol=0, atol=1e-14)
    curvature = vmap(jacfwd(mode(round_trip)))(vectors)
    assert_close(curvature, torch.zeros_like(curvature), rtol=0, atol=1e-14)


@every_order
def test_euler_derivatives_are_inverse(order: str) -> None:
    middle = 1.0 if order[0] == order[2] else 0.5
    angles = random(4, 3) * tensor([1.0, 0.1, 1.0]) + tensor([0.0, middle, 0.0])
    identity = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)

    def round_trip(a: Tensor) -> Tensor:
        return matrix_to_euler(euler_to_matrix(a, order), order)

    for mode in (jacrev, jacfwd):
        assert_close(vmap(mode(round_trip))(angles), identity, rtol=0, atol=1e-12)
    for mode in (jacrev, jacfwd):
        curvature = vmap(mode(jacrev(round_trip)))(angles)
        assert_close(curvature, torch.zeros_like(curvature), rtol=0, atol=1e-11)


SINGULAR = {
    "normalize_quaternion": torch.zeros(4),
    "quaternion_to_matrix": torch.zeros(4),
    "quaternion_to_rotation_vector": torch.zeros(4),
    "rotation_vector_to_quaternion": torch.zeros(3),
    "rotation_vector_to_matrix": torch.zeros(3),
    "matrix_to_quaternion": torch.zeros(3, 3),
    "matrix_to_rotation_vector": torch.zeros(3, 3),
    "matrix_to_angle": torch.zeros(2, 2),
    "matrix_to_euler": torch.zeros(3, 3),
    "matrix_to_euler extrinsic": torch.eye(3),
}


@pytest.mark.parametrize("name", SINGULAR)
@both_dtypes
def test_derivatives_are_finite_at_singular_points(name: str, dtype: torch.dtype) -> None:
    function, point = CASES[name].function, SINGULAR[name].to(dtype)
    for derivative in (function, jacrev(function), jacfwd(function), hessian(function)):
        assert bool(derivative(point).isfinite().all())


@both_dtypes
def test_derivatives_are_finite_for_many_turns(dtype: torch.dtype) -> None:
    """The series that does not apply overflows here, and must not be looked at."""
    vector = torch.full((3,), 1e15, dtype=dtype)
    for function in (rotation_vector_to_quaternion, rotation_vector_to_matrix):
        for derivative in (jacrev(function), jacfwd(function)):
            assert bool(derivative(vector).isfinite().all())


@both_dtypes
def test_zero_quaternion_is_the_identity(dtype: torch.dtype) -> None:
    zero = torch.zeros(4, dtype=dtype)
    assert torch.equal(normalize_quaternion(zero), torch.eye(4, dtype=dtype)[0])
    assert torch.equal(jacrev(normalize_quaternion)(zero), torch.zeros(4, 4, dtype=dtype))
    assert torch.equal(quaternion_to_matrix(zero), torch.eye(3, dtype=dtype))
    assert torch.equal(quaternion_to_rotation_vector(zero), torch.zeros(3, dtype=dtype))


# -- batches, dtypes, errors -------------------------------------------------------------------------------


@every_case
@both_dtypes
def test_vmap_and_leading_axes_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    vectors = torch.cat([torch.zeros(1, 3, dtype=torch.float64), vectors_of(1e-5, 1.0, 3.0, PI)])[:90]
    points = case.sample(vectors).to(dtype)
    loop = torch.stack([case.function(point) for point in points])
    tight: dict[str, Any] = {"rtol": 0.0, "atol": 4 * torch.finfo(dtype).eps}
    assert loop.dtype == dtype
    assert loop.shape == (90, *case.gives)
    assert_close(vmap(case.function)(points), loop, **tight)
    assert_close(vmap(vmap(case.function))(points.unflatten(0, (9, 10))).flatten(0, 1), loop, **tight)
    assert_close(case.function(points.unflatten(0, (3, 3, 10))).flatten(0, 2), loop, **tight)
    assert case.function(points[:0]).shape == (0, *case.gives)
    tangents = random(*points.shape, seed=3).to(dtype)
    for function in (jacrev(case.function), jacfwd(case.function)):
        batch = vmap(function)(points)
        assert batch.dtype == dtype
        assert bool(batch.isfinite().all())
        for n in (0, 40, 80):
            assert_close(batch[n], function(points[n]))
    pushed = jvp(case.function, (points,), (tangents,))[1]
    jacobian = vmap(jacrev(case.function))(points).flatten(1 + len(case.gives))
    expected = (jacobian.flatten(1, -2) @ tangents.flatten(1).unsqueeze(-1)).reshape(pushed.shape)
    scale = max(1.0, float(expected.abs().max()))
    assert_close(pushed / scale, expected / scale, rtol=0, atol=64 * torch.finfo(dtype).eps)


@every_case
def test_no_data_is_looked_at(case: Case) -> None:
    """Tensors without data pass: no branch on values, no `.item()`."""
    result = case.function(torch.empty((2, 5, *case.takes), device="meta", dtype=torch.float32))
    assert result.shape == (2, 5, *case.gives)
    assert result.dtype == torch.float32
    assert result.device.type == "meta"


@every_case
def test_nan_stays_visible(case: Case) -> None:
    size = math.prod(case.takes)
    points = case.sample(random(size, 3)).detach().reshape(size, size)
    spoiled = torch.where(torch.eye(size, dtype=torch.bool), torch.nan, points).reshape(size, *case.takes)
    assert bool(case.function(spoiled).flatten(1).isnan().any(1).all())


@every_case
def test_wrong_shapes_name_what_was_given(case: Case) -> None:
    wrong = torch.zeros(2, *case.takes[:-1], case.takes[-1] + 1)
    expected = ", ".join(map(str, case.takes))
    with pytest.raises(ValueError, match=r"has shape \(2, .*expected \(\.\.\., ") as error:
        case.function(wrong)
    assert str(error.value).endswith(f"has shape {tuple(wrong.shape)}: expected (..., {expected})")
    with pytest.raises(ValueError, match=r"has shape \(\): expected"):
        case.function(torch.tensor(1.0))
    if case.function is not product:
        with pytest.raises(TypeError, match=r"has dtype torch\.int64: expected floating point"):
            case.function(torch.ones(case.takes, dtype=torch.int64))


def test_product_names_the_wrong_factor() -> None:
    with pytest.raises(ValueError, match=r"^a has shape \(3,\)"):
        quaternion_multiply(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match=r"^b has shape \(2, 3\)"):
        quaternion_multiply(torch.ones(4), torch.ones(2, 3))


@pytest.mark.parametrize("order", ["", "x", "xxy", "xyy", "xYz", "abc", "xyzx"])
def test_unknown_order_lists_the_choices(order: str) -> None:
    for function, value in ((euler_to_matrix, torch.zeros(3)), (matrix_to_euler, torch.eye(3))):
        with pytest.raises(ValueError, match=r"expected one of xyz, .*ZYZ") as error:
            function(value, order)
        assert repr(order) in str(error.value)
        assert all(choice in str(error.value) for choice in EULER_ORDERS)


def test_every_public_function_is_documented_with_an_example() -> None:
    members = [value for name, value in vars(rotation).items() if not name.startswith("_")]
    public = [value for value in members if getattr(value, "__module__", "") == rotation.__name__]
    assert len(public) == 13
    assert all(">>>" in (function.__doc__ or "") for function in public)
