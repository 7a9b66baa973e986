"""Operations of an ML program -> which slice updates may overwrite a state instead of copying it."""

from __future__ import annotations

from collections.abc import Sequence

from bundle.runtimes.mil_graph import READ_STATE, UPDATE_STATE, WRITE_STATE, Node

VIEWS = ("slice_by_index", "slice_by_size", "reshape", "transpose", "expand_dims", "squeeze", "split", "identity")


def in_place_updates(nodes: Sequence[Node]) -> set[int]:
    """Positions of slice_update nodes that may write into their ``x``.

    The pattern is a KV cache's: read_state, slice_update, then write_state of the result. It is safe when every value
    that shares memory with the state so far is read for the last time by the update, and the result goes only into the
    state.
    """
    last_read = {name: index for index, node in enumerate(nodes) for name in node.reads()}
    shares: dict[str, str] = {}  # value -> state whose memory it shows
    found: set[int] = set()
    for index, node in enumerate(nodes):
        if node.kind == READ_STATE:
            shares[node.outputs[0]] = str(node.inputs["input"])
        elif node.kind == UPDATE_STATE:
            shares[node.outputs[0]] = str(node.inputs["state"])
        elif node.kind in VIEWS and str(node.inputs["x"]) in shares:
            shares.update(dict.fromkeys(node.outputs, shares[str(node.inputs["x"])]))
        elif node.kind == "slice_update":
            state = shares.get(str(node.inputs["x"]))
            shown = [name for name, owner in shares.items() if owner == state]
            last = max((last_read.get(name, -1) for name in shown), default=-1)
            if state is not None and last == index and _goes_only_into(state, node.outputs[0], index, nodes, last_read):
                found.add(index)
    return found


def _goes_only_into(state: str, name: str, index: int, nodes: Sequence[Node], last_read: dict[str, int]) -> bool:
    following = nodes[index + 1] if index + 1 < len(nodes) else None
    if following is None or last_read.get(name) != index + 1:
        return False
    return (following.kind == WRITE_STATE and following.inputs == {"input": state, "data": name}) or (
        following.kind == UPDATE_STATE and following.inputs == {"state": state, "value": name}
    )
