"""Arguments of a block that may be left out: ``if shortcut is None: shortcut = x``.

A tracer takes one side of such a test. The two sides differ by nothing but the name of a tensor, so one graph does for
both once a function chooses the tensor when the block runs.
"""

from typing import Any

from torch import fx


def given_or(value: Any, otherwise: Any) -> Any:
    """The value, or the other one if there is none. A tracer writes it down as it is, and does not choose."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", given_or, (value, otherwise), {})
    return otherwise if value is None else value


def optional_arguments(graph: fx.Graph) -> list[fx.Node]:
    """Arguments that are None unless given, and that something reads."""
    return [node for node in graph.nodes if node.op == "placeholder" and node.args == (None,) and node.users]


def choose_where_left_out(graph: fx.Graph, argument: fx.Node, left_out: fx.Graph) -> bool:
    """Let one graph do for both: the one with an argument learns what stands for it where it is left out.

    Args:
        graph: of the forward with all its arguments; changed in place.
        argument: its node for the one that may be left out.
        left_out: graph of the forward without that argument.

    Returns:
        Whether it does for both: without the argument the forward puts another of its arguments in its place, and does
        nothing else.
    """
    nodes, others = list(graph.nodes), [node for node in left_out.nodes if "_assert_is_none" not in str(node.target)]
    arguments = [node for node in nodes if node.op == "placeholder" and node is not argument]
    stand_in = next((other for other in arguments if _same(nodes, others, {argument: other})), None)
    if stand_in is None:
        return False
    with graph.inserting_before(next(node for node in nodes if node.op != "placeholder")):
        chosen = graph.call_function(given_or, (argument, stand_in))
    argument.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    return True


def _same(nodes: list[fx.Node], others: list[fx.Node], replaced: dict[fx.Node, fx.Node]) -> bool:
    """Whether two graphs do the same once some nodes of the first are replaced by others of it."""
    if len(nodes) != len(others):
        return False
    known: dict[fx.Node, fx.Node] = {}

    def translated(values: Any) -> Any:
        return fx.map_arg(values, lambda node: known[replaced.get(node, node)])

    for node, other in zip(nodes, others, strict=True):
        if node.op == other.op == "placeholder":
            known[node] = other
            continue
        same = node.op == other.op and node.target == other.target
        if not same or (translated(node.args), translated(node.kwargs)) != (other.args, other.kwargs):
            return False
        known[node] = other
    return True
