"""Gates of an ONNX model in the operators that ONNX Runtime keeps in the memory layout of its convolutions.

ONNX Runtime's convolutions on the CPU store channels in blocks (NCHWc). Every operator that does not know this layout
costs a pass over its feature map to reorder it, and another one behind it. The exporter's form of a gate has several:
``ReduceMean`` and ``Slice`` of feature maps, and an addition behind the product with the gate. Here they become:

- a squeeze: ``GlobalAveragePool``, behind a ``MaxPool`` of single pixels where only every second pixel is averaged;
- the gate's linear maps: 1x1 convolutions of (N, C, 1, 1);
- the product with the gate: that of two maps, since no operator of this layout multiplies a map by a number for each
  channel; ``Resize`` repeats the gate at every pixel;
- the addition: that of a depthwise 1x1 convolution by the gain, with which ONNX Runtime fuses addition and ReLU.

The numbers stay the same, up to the order in which a squeeze is summed. Other engines may prefer the exporter's form.
"""

from typing import Any

import numpy as np

_BLOCK = 16  # channels in a block at most: 8 with AVX2, 16 with AVX-512


def keep_layout(model: Any) -> Any:
    """Rewrite the gates of an ONNX model for ONNX Runtime; what does not look like a gate stays as it is.

    Args:
        model: protobuf message, as :func:`cmpe_se.runtimes.programs.to_onnx` makes it.

    Returns:
        Another message.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    graph_model = ir.from_proto(model)
    for node in list(graph_model.graph):
        if node.op_type == "Add" and (found := _product(node)):
            _Rewriting(graph_model.graph, node).rewrite(*found)
    for clean in (RemoveUnusedNodesPass(), TopologicalSortPass()):
        graph_model = clean(graph_model).model
    return ir.to_proto(graph_model)


def _product(addition: Any) -> tuple[Any, Any] | None:
    """The gated product that a node adds, and the node that makes its gate a map, (N, C) to (N, C, 1, 1)."""
    for value in addition.inputs:
        product = _maker(value, "Mul")
        for operand in product.inputs if product else ():
            unsqueeze = _maker(operand, "Unsqueeze")
            if unsqueeze and _constant(unsqueeze.inputs[1]) == [2, 3] and len(value.uses()) == 1:
                return product, unsqueeze
    return None


class _Rewriting:
    """New nodes before the addition of one gate."""

    def __init__(self, graph: Any, addition: Any):
        self.graph, self.addition = graph, addition

    def rewrite(self, product: Any, unsqueeze: Any) -> None:
        """Rewrite one gate where it is what a merged gate is exported to."""
        gate = unsqueeze.inputs[0]
        scaling = _maker(gate, "Mul")  # by the gain
        gain = next((value for value in scaling.inputs if value.const_value is not None), None) if scaling else None
        sigmoid = _maker(gate if gain is None else next(v for v in scaling.inputs if v is not gain), "Sigmoid")
        excite = sigmoid and _linear(sigmoid.inputs[0])
        relu = excite and _maker(excite.inputs[0], "Relu")
        read = relu and _linear(relu.inputs[0])
        if not read or (gain is not None and gain.const_value.numpy().ndim):
            return
        concat = _maker(read.inputs[0], "Concat")
        squeezes = concat.inputs if concat else [read.inputs[0]]
        maps = [self._squeeze(value) for value in squeezes]
        seen = self._node("Concat", maps, axis=1) if concat else maps[0]
        hidden = self._node("Relu", [self._convolution(read, seen)])
        new = self._node("Sigmoid", [self._convolution(excite, hidden)])
        scaled = new if gain is None else self._node("Mul", [new, gain])
        if len(gate.uses()) > 1:  # our own networks carry the squeeze of what they add on
            self._replace(gate, self._node("Flatten", [scaled], axis=1), but=unsqueeze)
        size = product.outputs[0].shape
        sides = size[1:] if size is not None and len(size) == 4 else ()
        if not all(isinstance(side, int) for side in sides) or not sides or sides[0] % _BLOCK:
            self._replace(unsqueeze.outputs[0], scaled)
            return
        if excite.inputs[1].const_value.shape[1] % _BLOCK == 0:  # else the gate is in no block, and Resize slow
            new = self._repeat(new, size)
        self._replace(unsqueeze.outputs[0], new)
        factor = 1.0 if gain is None else float(gain.const_value.numpy())
        self._fuse_addition(product.outputs[0], factor, _prefix(read.inputs[1]))

    def _squeeze(self, value: Any) -> Any:
        """A squeeze (N, C) as (N, C, 1, 1)."""
        mean = _maker(value, "ReduceMean")
        if not mean or len(mean.inputs) < 2 or _constant(mean.inputs[1]) != [2, 3] or _number(mean, "keepdims", 1):
            return self._node("Unsqueeze", [value, self._initializer(f"{value.name}.axes", np.array([2, 3]))])
        source = mean.inputs[0]
        if kept := _every_second_pixel(source):
            source = self._node("MaxPool", [kept], kernel_shape=[1, 1], strides=[2, 2])
        return self._node("GlobalAveragePool", [source])

    def _convolution(self, linear: Any, value: Any) -> Any:
        """A linear map of channels as a 1x1 convolution."""
        weight = linear.inputs[1]
        matrix = weight.const_value.numpy()
        maps = self._initializer(f"{weight.name}.map", matrix[:, :, None, None])
        return self._node("Conv", [value, maps, *linear.inputs[2:]], kernel_shape=[1, 1])

    def _repeat(self, gate: Any, size: Any) -> Any:
        """A gate (N, C, 1, 1) as a map of a size (N, C, H, W), which it is said to have: nothing would infer N."""
        scales = np.array([1, 1, size[2], size[3]], np.float32)
        scales = self._initializer(f"scales_{size[2]}x{size[3]}", scales)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        repeated = self._node("Resize", [gate, None, scales], **how)
        repeated.shape = size
        return repeated

    def _fuse_addition(self, product: Any, gain: float, prefix: str) -> None:
        """Add a product by way of a convolution that multiplies it by the gain."""
        channels = product.shape[1]
        factors = self._initializer(f"{prefix}.gain", np.full((channels, 1, 1, 1), gain, np.float32))
        scaled = self._node("Conv", [product, factors], kernel_shape=[1, 1], group=channels)
        scaled.shape = product.shape
        place = next(place for place, value in enumerate(self.addition.inputs) if value is product)
        self.addition.replace_input_with(place, scaled)

    def _node(self, kind: str, inputs: list, **attributes: Any) -> Any:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes)
        name = f"{self.addition.outputs[0].name}_{kind}_{len(self.graph)}"
        node.name, node.outputs[0].name = name, name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.insert_before(self.addition, node)
        return node.outputs[0]

    def _initializer(self, name: str, array: np.ndarray) -> Any:
        import onnx_ir as ir

        if name not in self.graph.initializers:
            tensor: Any = ir.tensor(np.ascontiguousarray(array), name=name)
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    @staticmethod
    def _replace(old: Any, new: Any, but: Any = None) -> None:
        for user, place in list(old.uses()):
            if user is not but:
                user.replace_input_with(place, new)


def _maker(value: Any, kind: str) -> Any:
    """The node that makes a value, where it is of one kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and node.domain == "" else None


def _linear(value: Any) -> Any:
    """The node that makes a value as a linear layer does: x W^T + b, with weights that are known."""
    node = _maker(value, "Gemm")
    plain = node and all(_number(node, name, 1) == 1 for name in ("alpha", "beta", "transB"))
    known = plain and all(one.const_value is not None for one in node.inputs[1:])
    return node if known and _number(node, "transA", 0) == 0 and _number(node, "transB", 0) == 1 else None


def _every_second_pixel(value: Any) -> Any:
    """The map of which a value is every second pixel of every second row, or None."""
    axes = []
    while cut := _maker(value, "Slice"):
        value, (start, end, axis, step) = cut.inputs[0], (_constant(one) for one in cut.inputs[1:5])
        if start != [0] or not end or end[0] < 2**31 - 1 or not step or not axis:
            return None
        axes.append((axis[0], step[0]))
    return value if sorted(axes) == [(2, 2), (3, 2)] else None


def _constant(value: Any) -> list | None:
    return None if value is None or value.const_value is None else value.const_value.numpy().reshape(-1).tolist()


def _number(node: Any, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _prefix(weight: Any) -> str:
    """The gate's name, which its weights' names begin with."""
    return weight.name.rsplit(".", 2)[0]
