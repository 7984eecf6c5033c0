"""Splits `max` and `min` along an axis in two ops with one result each: oneDNN Graph fails on one with two."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["split_extrema"]

HALVES = {"aten::max": ("aten::amax", "aten::argmax"), "aten::min": ("aten::amin", "aten::argmin")}


def split_extrema(graph: Any) -> None:
    """Compute the values and the places of each extremum by themselves; a half that nothing reads is left out."""
    for node in list(graph.nodes()):
        if node.kind() not in HALVES or node.outputsSize() != 2:
            continue
        x, axis, keep = node.inputs()
        with graph.insert_point_guard(node):
            axes = graph.insertNode(graph.create("prim::ListConstruct", [axis], 1)).output()
            axes.setType(torch._C.ListType.ofInts())
            for kind, along, old in zip(HALVES[node.kind()], (axes, axis), node.outputs(), strict=True):
                if old.uses():
                    old.replaceAllUsesWith(graph.insert(kind, [x, along, keep]))
        node.destroy()
