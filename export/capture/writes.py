"""A traced program without writes: where nothing is written, by names; else by torch, which traces it again.

Most modules write into no tensor. What is left to do there is little: a copy that changes nothing goes, a change of
type is said in one way. That saves half of the time that a trace takes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
COPIES = {
    aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
}  # fmt: skip
# Views that torch defines by others, and that are followed as they are.
FOLLOWED = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.chunk.default}
# Other names of a transpose, and the dimensions where no argument says them.
EXCHANGED: dict[Any, tuple[int, ...]] = {
    aten.mT.default: (-2, -1), aten.swapaxes.default: (), aten.swapdims.default: (),
}  # fmt: skip
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
# Arithmetic on sizes.
NUMBERS = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
    operator.pow, operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip


def without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with no operation in it that writes into a tensor."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or not all(map(_is_plain, nodes)):
        return program.run_decompositions({})
    graph = program.graph
    for node in nodes:
        _rename(graph, node)
    for node in list(graph.nodes):
        if node.target in COPIES or node.target is aten.dropout.default:
            _as_one_copy(graph, node)
    graph.eliminate_dead_code(_stays)
    graph.lint()
    program.graph_module.recompile()
    return program


def _is_plain(node: fx.Node) -> bool:
    """Whether torch would leave an operation as it is, or `_as_one_copy` does what it would."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        return target in NUMBERS or f"{target.__module__}.{target.__name__}".startswith("torch.sym_")
    if _writes_alone(node) or target in EXCHANGED:
        return True
    if target._schema.is_mutable or target.namespace not in ("aten", "prims"):
        return False
    if target in COPIES or target in FOLLOWED:
        return True
    if target is aten.dropout.default:
        return node.args[2] is False
    views = any(value.alias_info is not None for value in target._schema.returns)
    return not (views and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), COMPOSITE))


def _writes_alone(node: fx.Node) -> bool:
    """Whether nothing else can see what a write changes: sums of experts added into zeros, a number made a tensor."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return False
    if node.target is aten.detach_.default:
        return source.target is aten.lift_fresh_copy.default and all(user.op != "output" for user in node.users)
    if node.target is aten.index_add_.default and node.all_input_nodes.count(source) == 1:
        return source.target in ZEROS or (source.target is aten.index_add_.default and _writes_alone(source))
    return False


def _rename(graph: fx.Graph, node: fx.Node) -> None:
    """What writes alone, or is a transpose by another name, as torch would have it."""
    if node.target is aten.detach_.default:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    elif node.target is aten.index_add_.default:
        node.target = aten.index_add.default
    elif node.target in EXCHANGED:
        node.args += EXCHANGED[node.target]
        node.target = aten.transpose.int


def _as_one_copy(graph: fx.Graph, node: fx.Node) -> None:
    """Nothing where the type stays, else a copy of the new type."""
    source: Any = node.args[0]
    have, want = source.meta["val"].dtype, node.meta["val"].dtype
    read_outside = any(user.op == "output" for user in node.users)  # the signature has its name
    if have != want:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": want}
    elif node.target is aten.contiguous.default:  # a view behind it needs what it does
        node.target, node.args, node.kwargs = (
            aten.clone.default, (source,), {"memory_format": torch.contiguous_format},
        )  # fmt: skip
    elif not read_outside:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _stays(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.target is aten._assert_scalar.default
