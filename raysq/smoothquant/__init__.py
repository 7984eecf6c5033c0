"""SmoothQuant and equalization: scales that move the difficulty of int8 from activations to weights."""
