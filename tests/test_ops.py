import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IN_SOFTWARE
from programs import run_python
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gradstat
from gradstat import LinearBins, Log2Bins

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(3), TypeError, "a tensor or several; x is int"),
        (lambda f: f("ONE"), TypeError, "a tensor or several; x is str"),
        (lambda f: f(np.ones(1)), TypeError, "a tensor or several; x is ndarray"),
        (lambda f: f([]), ValueError, "at least one tensor; x is empty"),
        (lambda f: f(iter(())), ValueError, "at least one tensor; x is empty"),
        (lambda f: f({"a": ONE, "b": 3}), TypeError, "tensors; x[1] is int"),
        (lambda f: f([ONE, None]), TypeError, "tensors; x[1] is NoneType"),
        (lambda f: f([ONE, np.ones(1)]), TypeError, "tensors; x[1] is ndarray"),
        (
            lambda f: f(ONE, 30.0),
            TypeError,
            "Log2Bins, LinearBins or a number; bins is 30.0",
        ),
        (
            lambda f: f(ONE, True),
            TypeError,
            "Log2Bins, LinearBins or a number; bins is True",
        ),
        (
            lambda f: f(ONE, LinearBins),
            TypeError,
            f"Log2Bins, LinearBins or a number; bins is {LinearBins!r}",
        ),
        (
            lambda f: f(ONE, engine="cuda"),
            ValueError,
            "one of the engines cpu, reference, triton; engine is 'cuda'",
        ),
        (
            lambda f: f([ONE, torch.ones(1, device="meta")]),
            ValueError,
            "tensors on one device; x[1] is on meta, x[0] on cpu",
        ),
    ],
)
def test_statistics_refuses_by_argument(
    call: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape('statistics() needs ' + message)}$"):
        call(gradstat.statistics)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0, 2.0]), TypeError, "histogram() needs a tensor; x is list"),
        (lambda f: f(ONE, 0), ValueError, "LinearBins() needs 1 to 1048576 bins; bins is 0"),
        (
            lambda f: f(ONE, "auto"),
            TypeError,
            "LinearBins() needs an integer number of bins; bins is 'auto'",
        ),
        (
            lambda f: f(ONE, 3, (1.0, 1.0)),
            ValueError,
            "LinearBins() needs low < high in float32; low is 1.0, high is 1.0",
        ),
        (
            lambda f: f(ONE, 3, (0.0, math.inf)),
            ValueError,
            "LinearBins() needs a range finite in float32; high is inf",
        ),
        (
            lambda f: f(ONE, 3, 1.0),
            TypeError,
            "histogram() needs a range of two numbers; range is 1.0",
        ),
        (
            lambda f: f(ONE, 3, (1.0,)),
            TypeError,
            "histogram() needs a range of two numbers; range is (1.0,)",
        ),
        (
            lambda f: f(ONE, Log2Bins(), (0.0, 1.0)),
            ValueError,
            "histogram() needs a range or a scheme, not both; range is (0.0, 1.0)",
        ),
        (
            lambda f: f(torch.ones(2), [0.0, 1.0], (0.0, 1.0)),
            ValueError,
            "histogram() needs a range or edges, not both; range is (0.0, 1.0)",
        ),
        (
            lambda f: f(torch.ones(2), [1.0, 0.0]),
            ValueError,
            "histogram() needs edges that do not decrease; bins is [1.0, 0.0]",
        ),
        (
            lambda f: f(torch.ones(2), [0.0, float("nan")]),
            ValueError,
            "histogram() needs edges that do not decrease; bins is [0.0, nan]",
        ),
        (
            lambda f: f(torch.ones(2), [1.0]),
            TypeError,
            "histogram() needs edges, two numbers or more in a row; bins is [1.0]",
        ),
        *(
            (
                lambda f, edges=edges: f(torch.ones(2), edges),
                TypeError,
                f"histogram() needs edges, two numbers or more in a row; bins is {edges!r}",
            )
            for edges in (
                ["0", "1"],
                [0.0, None],
                [[0.0, 1.0], [2.0]],
                [[0.0, 1.0], [2.0, 3.0]],
                [1j, 2j],
                (),
                [2**70, 2**71],
                torch.empty(2, device="meta"),
            )
        ),
    ],
)
def test_histogram_refuses_by_argument(
    call: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(gradstat.histogram)


# torch deprecates quantised tensors, and warns once for each process.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("function", ["statistics", "histogram"])
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: ONE.long(), "torch.int64: pass x.float()"),
        (lambda: ONE.bool(), "torch.bool: pass x.float()"),
        (lambda: ONE.to(torch.float8_e5m2), "torch.float8_e5m2: pass x.float()"),
        (
            lambda: ONE.to(torch.complex64),
            "torch.complex64: pass torch.view_as_real(x) or x.abs()",
        ),
        (
            lambda: ONE.to_sparse(),
            "torch.sparse_coo (torch.float32): pass x.coalesce().values() or x.to_dense()",
        ),
        (
            lambda: torch.quantize_per_tensor(ONE, 1.0, 0, torch.qint8),
            "torch.qint8: pass x.dequantize()",
        ),
        (lambda: torch.nested.nested_tensor([ONE, ONE]), "a nested tensor: pass x.unbind()"),
        (
            lambda: torch.nested.nested_tensor([ONE, ONE], layout=torch.jagged),
            "a nested tensor: pass x.unbind()",
        ),
    ],
)
def test_functions_say_what_to_pass_instead(
    function: str, make: Callable[[], torch.Tensor], advice: str
) -> None:
    message = f"{function}() needs dense floating-point tensors; x[0] is {advice}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        getattr(gradstat, function)(make())


def measurements() -> list[tuple[str, Callable[[torch.Tensor], object]]]:
    """Each function that measures a tensor, by its name, with each engine that it takes."""
    edges: list[int | list[float]] = [30, [0.0, 1.0]]
    return [
        *(
            ("statistics", lambda x, e=engine: gradstat.statistics(x, engine=e))
            for engine in (None, *gradstat.ops.ENGINES)
        ),
        *(
            ("quantization", lambda x, e=engine: gradstat.quantization(x, "mxfp4_e2m1", engine=e))
            for engine in (None, *gradstat.ops.ENGINES)
        ),
        *(("histogram", lambda x, b=bins: gradstat.histogram(x, b)) for bins in edges),
    ]


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: torch.ones(2, device="meta"), "on meta"),
        (
            lambda: FakeTensorMode().from_tensor(torch.ones(2)),
            "a FakeTensor without storage, as under torch.func.vmap or in fake mode",
        ),
    ],
    ids=["meta", "fake"],
)
def test_functions_refuse_tensors_without_values(
    make: Callable[[], torch.Tensor], got: str
) -> None:
    for name, measure in measurements():
        message = f"{name}() needs tensors with values; x[0] is {got}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            measure(make())


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_functions_refuse_tensors_of_transforms(transform: Callable[..., Any]) -> None:
    for name, measure in measurements():
        message = f"^{name}\\(\\) needs tensors with values; x\\[0\\] is a Tensor without storage, "
        with pytest.raises(ValueError, match=message):
            transform(measure)(torch.ones(2, 3))


@pytest.mark.host("makes a mesh of the CPU")
def test_functions_refuse_a_dtensor_and_name_its_parts() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            x = distribute_tensor(torch.ones(4, 4), mesh, [placement])
            for name, measure in measurements():
                message = (
                    f"{name}() needs tensors, not parts of them; x[0] is a DTensor: "
                    f"pass x.to_local() or x.full_tensor()"
                )
                with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
                    measure(x)
                measure(x.to_local())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("function", [gradstat.statistics, gradstat.histogram])
def test_functions_refuse_an_unknown_engine_in_the_environment(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTAT_ENGINE", "fast")
    message = (
        f"{function.__name__}() needs one of the engines cpu, reference, triton; "
        f"GRADSTAT_ENGINE is 'fast'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(ONE)


@pytest.mark.parametrize(
    ("argument", "variable", "module"),
    [
        (None, None, "cpu"),
        (None, "", "cpu"),
        (None, "reference", "reference"),
        ("cpu", "reference", "cpu"),
        ("reference", None, "reference"),
        ("triton", "cpu", "triton"),
    ],
)
def test_engine_is_the_argument_then_the_environment_then_the_device(
    argument: str | None, variable: str | None, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("GRADSTAT_ENGINE", variable)
    expected = gradstat.statistics(ONE, engine="reference")
    calls = []

    def measure(*_: object) -> gradstat.Statistics:
        calls.append(module)
        return expected

    monkeypatch.setattr(f"gradstat.engines.{module}.measure", measure)
    # Without a device: on some Triton refuses tensors of the CPU.
    engine = gradstat.ops.check_engine("statistics", argument)
    assert gradstat.ops.measure([ONE], Log2Bins(), engine) is expected
    assert calls == [module]


def test_triton_refuses_cpu_tensors_that_it_cannot_read() -> None:
    code = "import torch, gradstat; gradstat.statistics(torch.ones(1), engine='triton')"
    run = run_python("-c", code, TRITON_INTERPRET=None)
    message = (
        "ValueError: statistics() needs CUDA tensors for the engine 'triton', or "
        "TRITON_INTERPRET=1 set before triton is imported; x is on cpu"
    )
    assert run.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("x", [torch.tensor(2.0), torch.ones(2, 3), torch.empty(0, 4)])
def test_statistics_takes_any_shape(x: torch.Tensor) -> None:
    s = gradstat.statistics(x)
    assert int(s.numel) == x.numel()
    assert int(s.counts.sum()) == x.numel()
    assert gradstat.statistics([x]).counts.shape == (1, 2048)


def test_statistics_of_a_parameter_needs_no_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    s = gradstat.statistics([x, x * 2])
    assert s.sum.tolist() == [3.0, 6.0]
    assert not s.floats.requires_grad


def test_statistics_changes_nothing(generator: torch.Generator) -> None:
    x = torch.randn(1000, generator=generator)
    x[:3] = torch.tensor([math.nan, math.inf, -0.0])
    before = x.clone()
    gradstat.statistics(x, LinearBins(30))
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(("bins", "range_"), [(30, None), (7, (-0.5, 1.5)), (1, None)])
def test_histogram_agrees_with_numpy(
    bins: int, range_: tuple[float, float] | None, generator: torch.Generator
) -> None:
    x = torch.randn(5000, generator=generator)
    counts, edges = gradstat.histogram(x, bins, range_)
    assert counts.dtype == torch.int64
    assert edges.dtype == torch.float64
    assert np.array_equal(counts.numpy(), np.histogram(x.double().numpy(), edges.numpy())[0])
    ours, theirs = edges.numpy(), np.histogram_bin_edges(x.double().numpy(), bins, range_)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


# In software, where each number of bins is a kernel: every number, and every scale of values.
EDGES = [
    (n, scale)
    for n in (1, 2, 7, 30, 64, 1000)
    for scale in (1e-40, 1e-30, 1.0, 1e30)
    if n == 30 or scale == 1e-40 or not IN_SOFTWARE
]


@pytest.mark.parametrize(("n", "scale"), EDGES)
def test_histogram_has_the_edges_of_its_scheme(n: int, scale: float) -> None:
    x = (torch.linspace(-1, 3, 500, dtype=torch.float64) * scale).float()
    for values in (x, x.abs(), x[:1], x[:0], x - 7 * scale):
        _, edges = gradstat.histogram(values, n)
        low, high = edges[0].float(), edges[-1].float()
        assert torch.equal(edges, gradstat.LinearBins(n).edges(low, high))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "edges", [[-1.0, 0.0, 0.1, 2.0], [0, 1], [-math.inf, 0.0, 0.0, math.inf], [0.3, 0.3]]
)
def test_histogram_counts_between_given_edges(dtype: torch.dtype, edges: list[float]) -> None:
    x = torch.cat([torch.randn(999), torch.tensor([-1.0, 0.0, -0.0, 0.1, 0.3, 1.0, 2.0])])
    x = torch.cat([x.to(dtype), torch.tensor(edges, dtype=dtype)])
    x = x[x.isfinite()]
    expected, _ = np.histogram(x.double().numpy(), edges)
    with_nan = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)])
    for given in (edges, tuple(edges), torch.tensor(edges, dtype=torch.float64), np.array(edges)):
        counts, returned = gradstat.histogram(with_nan, given)
        assert counts.tolist() == expected.tolist()
        assert returned.tolist() == edges
        assert returned.dtype == torch.float64


@pytest.mark.parametrize("bins", [10, [-2.0, 0.0, 0.5, 3.0]])
def test_histogram_density_is_numpys(bins: int | list[float]) -> None:
    x = torch.randn(500)
    density, edges = gradstat.histogram(x, bins, density=True)
    expected, _ = np.histogram(x.double().numpy(), edges.numpy(), density=True)
    np.testing.assert_allclose(density.numpy(), expected, rtol=1e-12)


def test_histogram_refuses_weights() -> None:
    with pytest.raises(TypeError, match="weights"):
        gradstat.histogram(torch.ones(3), weights=torch.ones(3))  # type: ignore[call-arg]


def compiled_histogram(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    counts, edges = gradstat.histogram(x * 2, 10)
    return counts * 2, edges, *gradstat.histogram(x, 5, (-1.0, 1.0))


def compiled_statistics(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = gradstat.statistics([x, x[1:] * 2])
    union = s[0].merge(s[1])
    fields = (s.mean, s.var, s.rms, s.counts, s.edges)
    return *fields, s.quantile(0.5), s.underflow(torch.float16), union.std, s.unscale(4.0).l2


@pytest.fixture(scope="module")
def inductor() -> str:
    """Name of the backend; skips where it cannot compile anything at all."""
    try:
        torch.compile(torch.neg, backend="inductor")(ONE)
    except RuntimeError as error:
        pytest.skip(f"inductor needs a C++ compiler and Python's headers: {error}")
    return "inductor"


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "inductor":
        request.getfixturevalue("inductor")
    name: str = request.param
    return name


@pytest.mark.parametrize(
    "function",
    [compiled_histogram, compiled_statistics],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_functions_compile_without_a_graph_break(
    requires_grad: bool,
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    backend: str,
    generator: torch.Generator,
) -> None:
    x = torch.randn(100, generator=generator, requires_grad=requires_grad)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(x), function(x), strict=True):
        # Derived values are the compiler's own arithmetic, to float64's last digits.
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(5), LinearBins(5, -1.0, 1.0)])
def test_measure_is_a_well_behaved_operator(
    bins: Log2Bins | LinearBins, engine: str, generator: torch.Generator
) -> None:
    tensors = [torch.randn(9, generator=generator), torch.randn(2, 3, generator=generator).half()]
    torch.library.opcheck(torch.ops.gradstat.measure, (tensors, bins.spec, engine))


def test_linear_edges_is_a_well_behaved_operator() -> None:
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 5.0])
    torch.library.opcheck(torch.ops.gradstat.linear_edges, (low, high, 7))


def test_statistics_are_on_the_tensors_device_whatever_the_default_is() -> None:
    x = torch.ones(2, 3)
    with torch.device("meta"):
        results = [gradstat.statistics(x, bins).counts for bins in (Log2Bins(), LinearBins(2))]
    assert [int(counts.sum()) for counts in results] == [6, 6]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.filterwarnings("ignore:Sparse C")
def test_statistics_advice_for_a_sparse_tensor_works(layout: str) -> None:
    x = getattr(torch.eye(3), "to_sparse" if layout == "coo" else f"to_sparse_{layout}")()
    with pytest.raises(TypeError) as raised:
        gradstat.statistics(x)
    advice = re.search(r"pass (\S+) or (\S+)$", str(raised.value))
    for expression in advice.groups():
        s = gradstat.statistics(eval(expression, {"x": x}))
        assert (int(s.finite - s.zeros), float(s.sum)) == (3, pytest.approx(3, rel=1e-5))


def test_statistics_takes_generators_mappings_and_views_of_tensors() -> None:
    model = torch.nn.Linear(3, 2)
    expected = gradstat.statistics(list(model.parameters())).l2.tolist()
    for several in (
        model.parameters(),
        (p for p in model.parameters()),
        dict(model.named_parameters()),
        dict(model.named_parameters()).values(),
        model.state_dict(),
    ):
        assert gradstat.statistics(several).l2.tolist() == expected


@pytest.mark.parametrize("bins", [30, np.int64(30)])
def test_statistics_and_watch_take_a_number_of_bins_as_histogram_does(bins: int) -> None:
    x = torch.arange(100.0)
    s = gradstat.statistics(x, bins)
    counts, edges = gradstat.histogram(x, bins=30)
    assert s.bins == LinearBins(30)
    assert s.counts.tolist() == counts.tolist()
    assert s.edges.tolist() == edges.tolist()
    model = torch.nn.Linear(3, 2)
    with gradstat.watch(model, bins=bins) as w:
        model(torch.ones(1, 3)).sum().backward()
    assert w.history.bins == LinearBins(30)
