"""The bridge in a call's backward pass: a factor on the pattern and what to subtract, by row and key group.

Let p be the pattern without the bridge, `q = f_g(k) p_k` the one under it, `c_k = <dz, v_k>`, and for each
group g of keys (S the own segment, B the bridge, O the rest, sinks included) p(g) its mass before and
`D_g = <dz, z_g>` with z_g the output of attention restricted to it.

1. The saliency is `|q_k c_k|`.
2. `ds_k = q_k c_k - p_k E_g(k)`. A row that is left alone has `f = 1` and `E = <dz, z>`. On the others the
   odds inside a group stay, p(O) stays, and B is raised to tau. With `R = p(O) D_O`, and M for what a unit of
   mass is worth to S and B:

       E_S = f_S D_S + R - p(O) M,    E_B = f_B D_B + R - p(O) M,    E_O = R + (1 - p(O)) M.

3. `M = D_S` where tau is a constant, and `M = c D_B + (1 - c) D_S` where it is capped at the share c of
   `1 - p(O)`.
4. A sink is in O: `ds = -p E_O`. dq, dk and dv follow as without the bridge, dv from q.

A tile whose rows see one group each costs what it costs without the bridge. One that is cut by the edge of a
group takes two more arrays of its size.

Memory: two outputs per row of a bridged layer between its passes (`BridgedRows`), and a byte per span and
token; for the controls, whose queries are a span each, a byte per query and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stepflow_tl.stepflow.bridged_attention import Bridge, BridgedRows
from stepflow_tl.stepflow.state import QuerySpan

OTHER, OWN, BRIDGE = range(3)


class SequenceGroups:
    """Which group each key is in, for the queries of one sequence.

    Attributes:
        table: Group of each key, one line per span of queries. Keys after a span's last repeat that one's
            group; no query of the span sees them.
        line_of: Line of each query. Queries in no span have any line: their rows are left alone.
    """

    def __init__(self, spans: Sequence[QuerySpan], row: int, n_tokens: int) -> None:
        """Read the groups of one row of the batch off `spans`, which lie on the CPU."""
        own = [span for span in spans if span.rows.start <= row < span.rows.stop]
        self.table: UInt8[Tensor, "line key"] = torch.zeros(max(1, len(own)), n_tokens, dtype=torch.uint8)
        starts = torch.zeros(n_tokens, dtype=torch.long)
        for line, span in enumerate(own):
            is_own, is_bridge = span.groups[:, row - span.rows.start, 0, 0, :n_tokens]
            codes = is_own * OWN + is_bridge * BRIDGE
            self.table[line, : len(codes)] = codes
            self.table[line, len(codes) :] = codes[-1]
            starts[span.queries.start] += line > 0
        self.line_of: Int[Tensor, " token"] = starts.cumsum(0)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of(
        self, queries: tuple[int, int], keys: tuple[int, int]
    ) -> int | Int[Tensor, "query 1"] | Int[Tensor, "#query key"]:
        """Groups of a tile: one for all of it, one per row, or one per key and, where that varies, row."""
        lines = self.line_of[slice(*queries)] - self.line_of[queries[0]]
        first = int(self.line_of[queries[0]])
        codes = self.table[first : first + int(lines[-1]) + 1, slice(*keys)].long()
        heads = codes[:, :1]
        if torch.equal(codes, heads.expand_as(codes)):
            return int(heads[0]) if bool((heads == heads[0]).all()) else heads[lines]
        return codes if len(codes) == 1 else codes[lines]

    def own(self) -> Int[Tensor, " token"]:
        """The group that each query's own key is in."""
        return self.table[self.line_of, torch.arange(len(self.line_of))].long()

    def on(self, device: torch.device) -> tuple[UInt8[Tensor, "line key"], Int[Tensor, " token"]]:
        """Table and lines on a device, copied once."""
        if device not in self._on:
            self._on[device] = (self.table.to(device), self.line_of.to(device, torch.int32))
        return self._on[device]


@dataclass(frozen=True)
class Bridging:
    """The bridge of one layer's call.

    Attributes:
        bridge: What to do.
        spans: Which keys are S and B, by queries.
        groups: The same for the backward pass, one entry per sequence of the batch.
    """

    bridge: Bridge
    spans: tuple[QuerySpan, ...]
    groups: tuple[SequenceGroups, ...]


@dataclass(frozen=True)
class BridgedTerms:
    """`f` and `E` of each row, by group: those of O, S and B.

    Attributes:
        factors: f, 1 for O, `[*batch, head, token, 3]`.
        offsets: E, `[*batch, head, token, 3]`.
        groups: Which keys are in which group, one entry per sequence.
    """

    factors: Tensor
    offsets: Tensor
    groups: tuple[SequenceGroups, ...]

    @classmethod
    def of(
        cls,
        kept: BridgedRows,
        dz: Float[Tensor, "batch head token d_value"],
        delta: Float[Tensor, "batch head token"],
        bridging: Bridging,
    ) -> BridgedTerms:
        """From what the forward pass left, dL/dz and `delta = <dz, z>`, z the output without the bridge."""
        dz = dz.to(delta.dtype)
        own_part = (dz * kept.z_own).sum(-1)  # p(S) D_S
        bridge_worth = (dz * kept.z_bridge).sum(-1)
        own_worth = own_part / torch.where(kept.active, kept.own_mass, 1.0)
        rest = delta - own_part - kept.bridge_mass * bridge_worth
        share = kept.capped.to(delta.dtype) * bridging.bridge.max_bridge_share
        moved = torch.lerp(own_worth, bridge_worth, share)
        movable = kept.own_mass + kept.bridge_mass
        shared = rest - (1 - movable) * moved
        own_factor, bridge_factor = kept.own.exp(), kept.bridge.exp()
        parts = (rest + movable * moved, own_factor * own_worth, bridge_factor * bridge_worth)
        offsets = torch.stack([parts[OTHER], parts[OWN] + shared, parts[BRIDGE] + shared], dim=-1)
        offsets = torch.where(kept.active[..., None], offsets, delta[..., None])
        factors = torch.stack([torch.ones_like(own_factor), own_factor, bridge_factor], dim=-1)
        return cls(factors, offsets, bridging.groups)

    def sequence(self, batch: int) -> BridgedTerms:
        """Those of one sequence."""
        return BridgedTerms(self.factors[batch], self.offsets[batch], self.groups[batch : batch + 1])

    def heads(self, heads: slice) -> BridgedTerms:
        """Those of some heads of one sequence."""
        return replace(self, factors=self.factors[heads], offsets=self.offsets[heads])

    def in_float32(self) -> BridgedTerms:
        """The same as dense float32 numbers, for kernels."""
        factors, offsets = (x.to(torch.float32).contiguous() for x in (self.factors, self.offsets))
        return replace(self, factors=factors, offsets=offsets)

    def diagonal(self) -> tuple[Float[Tensor, "batch head token"], Float[Tensor, "batch head token"]]:
        """The f and E of each query for its own key."""
        own = torch.stack([groups.own() for groups in self.groups]).to(self.factors.device)
        at = own[:, None, :, None]
        return self.factors.take_along_dim(at, -1)[..., 0], self.offsets.take_along_dim(at, -1)[..., 0]

    def tile(
        self, queries: tuple[int, int], keys: tuple[int, int]
    ) -> tuple[Float[Tensor, "row columns"] | None, Float[Tensor, "row columns"]]:
        """The f and E of a tile of one sequence, heads and queries as rows; None for an f that is 1.

        One column each where no row sees two groups.
        """
        rows = slice(*queries)
        factors, offsets = self.factors[:, rows], self.offsets[:, rows]
        if bool((factors == 1).all()):
            return None, offsets[..., 0].reshape(-1, 1)
        codes = self.groups[0].of(queries, keys)
        if isinstance(codes, int):
            factor = None if codes == OTHER else factors[..., codes].reshape(-1, 1)
            return factor, offsets[..., codes].reshape(-1, 1)
        codes = codes.to(factors.device)
        return _by_group(factors, codes), _by_group(offsets, codes)


def _by_group(
    values: Float[Tensor, "head query 3"], codes: Int[Tensor, "#query #key"]
) -> Float[Tensor, "row key"]:
    """The value of each row and key, by the key's group."""
    if len(codes) == 1:  # the same groups for every row: the cheapest way to write so many numbers
        one_hot = (codes == torch.arange(3, device=codes.device)[:, None]).to(values.dtype)
        return values.reshape(-1, 3) @ one_hot
    other, own, bridge = values[..., None].unbind(2)
    found = torch.where(codes == OWN, own, torch.where(codes == BRIDGE, bridge, other))
    return found.reshape(-1, codes.shape[1])
