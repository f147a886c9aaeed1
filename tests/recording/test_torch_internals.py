"""PyTorch's private names: each does what gradstat takes it to do."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from gradstat.recording import torch_internals


def test_call_at_end_of_backward_comes_after_all_hooks() -> None:
    x, order = torch.ones(2, requires_grad=True), []

    def hook(_: torch.Tensor) -> None:
        torch_internals.call_at_end_of_backward(lambda: order.append("end"))
        order.append("hook")

    y = x * 2
    y.register_hook(hook)
    x.register_post_accumulate_grad_hook(lambda _: order.append("leaf"))
    y.sum().backward()
    assert order == ["hook", "leaf", "end"]


def test_running_node_and_pass_are_known_within_backward_alone() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    y = x * 2
    y.register_hook(
        lambda _: seen.append((torch_internals.running_node(), torch_internals.running_pass()))
    )
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    (node, first), (_, second) = seen
    assert node is not None
    assert 0 <= first != second
    assert torch_internals.running_node() is None
    assert torch_internals.running_pass() == -1


def test_inherited_is_what_the_caller_of_the_pass_has_bequeathed() -> None:
    name, seen = "gradstat.test", []
    assert torch_internals.inherited(name) is None
    torch_internals.bequeath(name, "caller")
    x = torch.ones(2, requires_grad=True)
    x.register_hook(
        lambda _: seen.append(
            (torch_internals.inherited(name), torch_internals.running_pass() != -1)
        )
    )
    x.sum().backward()
    assert seen == [("caller", True)]
    assert torch_internals.running_pass() == -1


def test_bequeathed_values_are_kept_and_freed() -> None:
    values = [nn.Identity() for _ in range(3)]
    alive = [weakref.ref(each) for each in values]
    for each in values:
        torch_internals.bequeath("gradstat.test", each)
    del each
    values.clear()
    gc.collect()
    assert [each() is not None for each in alive] == [False, False, True]
    assert torch_internals.inherited("gradstat.test") is alive[2]()
    torch_internals.bequeath("gradstat.test", None)
    assert alive[2]() is None


def test_batch_norm_is_that_of_all_batch_and_instance_norms() -> None:
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.InstanceNorm2d(2), nn.SyncBatchNorm(2)):
        assert isinstance(norm, torch_internals.BATCH_NORM)
    assert not isinstance(nn.LayerNorm(2), torch_internals.BATCH_NORM)


def test_is_compiled_autograd_is_true_within_it_alone() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(
        lambda _: seen.append(torch_internals.is_compiled_autograd())
    )
    assert not torch_internals.is_compiled_autograd()
    (x * 2).sum().backward()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        (x * 2).sum().backward()
    assert seen == [False, True]
    assert not torch_internals.is_compiled_autograd()


def test_scale_and_step_states_of_a_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert torch_internals.scale_of(None) is None
    assert torch_internals.scale_of(scaler) is None
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scale = torch_internals.scale_of(scaler)
    assert scale is not None
    assert scale.item() == 8
    scaler.step(optimizer)
    states = torch_internals.step_states_of(scaler)
    assert states is not None
    assert id(optimizer) in states
    scaler.update()
    assert torch_internals.step_states_of(scaler) is not states


def test_base_of_is_what_a_view_is_of() -> None:
    x = torch.ones(4)
    assert torch_internals.base_of(x.view(2, 2)) is x
    assert torch_internals.base_of(x) is None


def test_is_transformed_within_vmap_and_grad_alone() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.is_transformed(x))
        return x.sum()

    function(torch.ones(2))
    torch.vmap(function)(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True, True]


def test_saved_tensor_hook_tells_a_checkpoint_that_recomputes() -> None:
    layer, names = nn.Linear(2, 2), []

    def function(x: torch.Tensor) -> torch.Tensor:
        names.append(getattr(torch_internals.saved_tensor_hook(), "__qualname__", None))
        return layer(x)

    checkpoint(function, torch.ones(1, 2), use_reentrant=False).sum().backward()
    forward, again = names
    assert "_recomputation_hook" not in str(forward)
    assert "_recomputation_hook" in str(again)
    assert torch_internals.saved_tensor_hook() is None


def test_multiplied_leaves_its_arguments_as_they_are() -> None:
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    found = torch_internals.multiplied(tensors, torch.tensor(0.5))
    assert [x.tolist() for x in found] == [[0.5] * 2, [1.0] * 3]
    assert [x.tolist() for x in tensors] == [[1.0] * 2, [2.0] * 3]


def test_name_of_wrapped_is_that_of_what_was_compiled() -> None:
    layer = nn.Linear(2, 2)
    wrapper = torch.compile(layer)
    assert wrapper.get_submodule(torch_internals.name_of_wrapped(wrapper)) is layer
    assert torch_internals.name_of_wrapped(nn.DataParallel(layer)) == "module"
    assert torch_internals.name_of_wrapped(layer) is None


def test_keep_in_graphs_keeps_what_returns_nothing() -> None:
    calls: list[int] = []

    @torch.library.custom_op("gradstat_test::note", mutates_args=())
    def note(x: torch.Tensor) -> None:
        calls.append(x.numel())

    note.register_fake(lambda x: None)
    torch_internals.keep_in_graphs(torch.ops.gradstat_test.note.default)

    def function(x: torch.Tensor) -> torch.Tensor:
        note(x)
        return x + 1

    torch.compile(function, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert calls == [3]


@pytest.mark.parametrize("is_hook", [False, True])
def test_leave_uncompiled_keeps_a_function_and_what_it_calls_out_of_graphs(is_hook: bool) -> None:
    seen: list[Any] = []
    x = torch.ones(2, requires_grad=is_hook)

    def inside(x: torch.Tensor) -> None:
        seen.append((torch.compiler.is_compiling(), torch.neg(x)))

    @torch_internals.leave_uncompiled
    def outside(x: torch.Tensor) -> None:
        inside(x)

    def step(x: torch.Tensor) -> None:
        if is_hook:
            (x * 2).sum().backward()
        else:
            outside(x * 2)

    if is_hook:
        x.register_post_accumulate_grad_hook(outside)
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(step, backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert [is_compiling for is_compiling, _ in seen] == [False]
    assert graphs
    assert not any(node.target is torch.neg for graph in graphs for node in graph.graph.nodes)


@pytest.mark.gpu
def test_capturing_graph_is_known_to_hooks_too() -> None:
    x = torch.ones(2, requires_grad=True, device="cuda")
    (x * x).sum().backward()
    seen: list[object] = []
    x.register_post_accumulate_grad_hook(lambda _: seen.append(torch_internals.capturing_graph()))
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            (x * x).sum().backward()
    assert seen == graphs


def test_run_first_puts_a_hook_before_the_others() -> None:
    x, order = nn.Parameter(torch.ones(2)), []
    hooks = [lambda _, n=n: order.append(n) for n in range(3)]
    handles = [x.register_post_accumulate_grad_hook(hook) for hook in hooks]
    assert torch_internals.hooks_on_gradient(x) == hooks
    torch_internals.run_first(x, handles[2])
    assert torch_internals.hooks_on_gradient(x) == [hooks[2], *hooks[:2]]
    x.sum().backward()
    assert order == [2, 0, 1]
    for handle in handles:
        handle.remove()
    x.sum().backward()
    assert len(order) == 3


def test_unwrapped_is_what_a_wrapper_without_hooks_has_in_it() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert torch_internals.unwrapped(inner) is inner
    assert torch_internals.unwrapped(Wrapper(Wrapper(inner))) is inner


def test_default_store_keeps_what_the_first_process_says(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        store = torch_internals.default_store()
        said = [store.compare_set("gradstat test", "", each) for each in ("a", "b")]
    finally:
        dist.destroy_process_group()
    assert said == [b"a", b"a"]


OTHERS = {
    "size": lambda x: x[:-1],
    "dtype": lambda x: x.bfloat16(),
    "strides": lambda x: torch.stack([x, x, x], 1)[:, 0],
    "type": nn.Parameter,
    "sparse": lambda x: x.to_sparse(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_alike_tells_others_apart_by_all_but_address_and_values(
    other: Callable[[Tensor], Tensor],
) -> None:
    x = torch.complex(torch.arange(10.0), torch.ones(10)).real  # the strides of a negated view
    fits = torch_internals.alike([x, x])
    assert not fits(x, other(x))
    assert fits(x, torch.complex(x, x).real)
