"""Writes `max` and `min` as ops with one result along named axes: oneDNN Graph fails on others."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["split_extrema"]

HALVES = {"aten::max": ("aten::amax", "aten::argmax"), "aten::min": ("aten::amin", "aten::argmin")}


def split_extrema(graph: Any) -> None:
    """Compute the values and the places of each extremum by themselves; a half that nothing reads is left out."""
    for node in list(graph.nodes()):
        if node.kind() not in HALVES:
            continue
        if node.inputsSize() == 1:
            _split_whole(graph, node)
        elif node.outputsSize() == 2:
            _split_along(graph, node)


def _split_whole(graph: Any, node: Any) -> None:
    with graph.insert_point_guard(node):
        node.output().replaceAllUsesWith(graph.insert(HALVES[node.kind()][0], [node.input()]))
    node.destroy()


def _split_along(graph: Any, node: Any) -> None:
    x, axis, keep = node.inputs()
    with graph.insert_point_guard(node):
        axes = graph.insertNode(graph.create("prim::ListConstruct", [axis], 1)).output()
        axes.setType(torch._C.ListType.ofInts())
        for kind, along, old in zip(HALVES[node.kind()], (axes, axis), node.outputs(), strict=True):
            if old.uses():
                old.replaceAllUsesWith(graph.insert(kind, [x, along, keep]))
    node.destroy()
