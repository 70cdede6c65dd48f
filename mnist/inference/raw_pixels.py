"""The part of an ONNX file that turns raw pixels of any size into the network's input, as images.fit_image does.

prepend_preparation(program.model, size=224, fit="crop", color=True)

Resizing is a product with two matrices of weights, for the rows and the columns, in ordinary operators: ONNX's Resize
cannot crop half a pixel, which Pillow does where a side is odd.
"""

from typing import Any

# ONNX's text format. A name with [1] is a vector of one number, as Shape returns it.
START = """<ir_version: 9, opset_import: ["" : 18]>
prepare (uint8[{shape}] pixels) => (float[batch, {channels}, {size}, {size}] prepared) {{
    height = Shape <start = 1, end = 2> (pixels)
    width = Shape <start = 2, end = 3> (pixels)
    size = Constant <value = int64[1] {{{size}}}> ()
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    none = Constant <value = float {{0.0}}> ()
    half = Constant <value = float {{0.5}}> ()
    first = Constant <value = int64 {{0}}> ()
    step = Constant <value = int64 {{1}}> ()
    f1 = Constant <value = float {{1.0}}> ()
    f2 = Constant <value = float {{2.0}}> ()
    f4 = Constant <value = float {{4.0}}> ()
    f5 = Constant <value = float {{5.0}}> ()
    f8 = Constant <value = float {{8.0}}> ()
    three_halves = Constant <value = float {{1.5}}> ()
    five_halves = Constant <value = float {{2.5}}> ()
    largest = Constant <value = float {{255.0}}> ()
    values = Cast <to = 1> (pixels)
"""
COLOR = "    planes = Transpose <perm = [0, 3, 1, 2]> (values)"
GRAY = "    planes = Unsqueeze (values, one)"
CROP = """
    shorter = Min (height, width)
    y_taken = Identity (shorter)
    x_taken = Identity (shorter)
    y_inner = Identity (size)
    x_inner = Identity (size)
"""
PAD = """
    longer = Max (height, width)
    twice_longer = Mul (two, longer)
    twice_size = Mul (two, size)
    sides = Concat <axis = 0> (height, width)
    scaled = Mul (twice_size, sides)
    rounded = Add (scaled, longer)
    divided = Div (rounded, twice_longer)
    inner = Max (divided, one)
    y_taken = Identity (height)
    x_taken = Identity (width)
    y_inner, x_inner = Split <axis = 0, num_outputs = 2> (inner)
"""
# The weights [inner, side] of the pixels of a side for each pixel of the result: cubic convolution with a = -0.5 (Keys,
# 1981), widened if the image shrinks, with the weights of pixels outside the image left out.
WEIGHTS = """
    {0}_side = Cast <to = 1> ({1})
    {0}_extent = Cast <to = 1> ({0}_taken)
    {0}_count = Cast <to = 1> ({0}_inner)
    {0}_left = Sub ({0}_side, {0}_extent)
    {0}_start = Mul ({0}_left, half)
    {0}_scale = Div ({0}_extent, {0}_count)
    {0}_spread = Max ({0}_scale, f1)
    {0}_last = Squeeze ({0}_inner)
    {0}_range = Range (first, {0}_last, step)
    {0}_place = Cast <to = 1> ({0}_range)
    {0}_middle = Add ({0}_place, half)
    {0}_moved = Mul ({0}_middle, {0}_scale)
    {0}_center = Add ({0}_moved, {0}_start)
    {0}_column = Unsqueeze ({0}_center, one)
    {0}_end = Squeeze ({1})
    {0}_pixels = Range (first, {0}_end, step)
    {0}_pixel = Cast <to = 1> ({0}_pixels)
    {0}_inside = Add ({0}_pixel, half)
    {0}_signed = Sub ({0}_inside, {0}_column)
    {0}_apart = Abs ({0}_signed)
    {0}_x = Div ({0}_apart, {0}_spread)
    {0}_near1 = Mul ({0}_x, three_halves)
    {0}_near2 = Sub ({0}_near1, five_halves)
    {0}_near3 = Mul ({0}_near2, {0}_x)
    {0}_near4 = Mul ({0}_near3, {0}_x)
    {0}_near = Add ({0}_near4, f1)
    {0}_far1 = Sub (f5, {0}_x)
    {0}_far2 = Mul ({0}_far1, {0}_x)
    {0}_far3 = Sub ({0}_far2, f8)
    {0}_far4 = Mul ({0}_far3, {0}_x)
    {0}_far5 = Add ({0}_far4, f4)
    {0}_far = Mul ({0}_far5, half)
    {0}_is_near = Less ({0}_x, f1)
    {0}_is_far = Less ({0}_x, f2)
    {0}_outer = Where ({0}_is_far, {0}_far, none)
    {0}_cubic = Where ({0}_is_near, {0}_near, {0}_outer)
    {0}_sum = ReduceSum <keepdims = 1> ({0}_cubic, one)
    {0}_weights = Div ({0}_cubic, {0}_sum)
"""
# Like Pillow: first along the rows, and 8 bits after each of the two.
PRODUCTS = """
    across = Transpose <perm = [1, 0]> (x_weights)
    narrow = MatMul (planes, across)
    narrow_whole = Round (narrow)
    narrow_bytes = Clip (narrow_whole, none, largest)
    small = MatMul (y_weights, narrow_bytes)
    small_whole = Round (small)
    resized = Clip (small_whole, none, largest)
    y_missing = Sub (size, y_inner)
    x_missing = Sub (size, x_inner)
    above = Div (y_missing, two)
    before = Div (x_missing, two)
    below = Sub (y_missing, above)
    behind = Sub (x_missing, before)
    borders = Concat <axis = 0> (zero, zero, above, before, zero, zero, below, behind)
    square = Pad <mode = "edge"> (resized, borders)
    prepared = Div (square, largest)
}"""


def prepend_preparation(model: Any, size: int, fit: str, color: bool) -> None:
    """Let an exported model take `images`, uint8 [batch, height, width, 3], or [batch, height, width] in gray.

    `model` is an onnx_ir.Model with the input float32 [batch, channels, size, size] in [0, 1].
    """
    import onnx.parser
    from onnxscript import ir

    shape = "batch, height, width, 3" if color else "batch, height, width"
    start = START.format(shape=shape, channels=3 if color else 1, size=size)
    weights = WEIGHTS.format("y", "height") + WEIGHTS.format("x", "width")
    text = start + (COLOR if color else GRAY) + {"crop": CROP, "pad": PAD}[fit] + weights + PRODUCTS
    front = ir.from_proto(onnx.parser.parse_model(text)).graph
    graph, nodes = model.graph, list(front)
    (pixels,), (prepared,), (before,) = front.inputs, front.outputs, graph.inputs
    front.inputs.clear()
    front.outputs.clear()
    front.remove(nodes)
    for node in nodes:  # the network may have values of the same names
        for value in node.outputs:
            value.name = f"preparation/{value.name}"
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(before, prepared)
    graph.inputs[:] = [pixels]
    pixels.name = before.name
