"""Attention of XLNet over packed sequences or lanes: scores with a term of the distance, a memory, and two streams of queries.

The content stream has a query for every token, the query stream one for every target only. Both read the same keys and
values: those of a sequence's memory, then those of its tokens. Token i of an order may be seen by what comes after it
in that order; -1 stands for tokens that all may see. How the distances are rated is a table with a row a distance, from
the largest (the last token looks at the first of its memory) down to the smallest.

Two back ends of one function: "runs", plain products over runs of sequences of equal length, which lanes are one of,
and "flex" (`relative_attention_flex`) for reading packed proteins on GPUs: it cannot drop attention weights.

Shapes: S sequences, N queries, K keys of all sequences, H heads, D width of a head, P distances; in a run n sequences
of L tokens with k keys each, R queries of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from ..memory.keeping import last_product


@dataclass(frozen=True)
class Keys:
    """Keys and values of one layer as a back end wants them: both streams read the same."""

    parts: list[tuple[Tensor, Tensor]]
    nothing: Tensor
    """No row, [0, H, D], but connected to both."""


Attend = Callable[[Tensor, Tensor, Keys, Tensor], Tensor]
"""(query + bias for contents [N, H, D], query + bias for distances [N, H, D], both scaled, keys, table of distances
[P, H, D]) -> [N, H, D]."""


@dataclass(frozen=True)
class Streams:
    """The attention of one batch, for every layer of it."""

    arrange: Callable[[Tensor, Tensor], Keys]
    """`(key [K, H, D], value [K, H, D])`."""
    content: Attend
    query: Attend


@dataclass(frozen=True)
class Sight:
    """Which queries and keys there are and what may be seen, for both streams of one batch."""

    cu_seqlens: Tensor
    """int32 [S + 1]: where the tokens of each sequence start."""
    max_length: int
    """Tokens of the longest sequence."""
    num_memory: int
    """Keys in front of the tokens of each sequence."""
    order: Tensor | None
    """int64 [T]: place of each token in the order; None: all may see all."""
    documents: Tensor | None
    """int64 [T]: tokens see one another only where these are equal, and the memory only from the first of a sequence; None:
    everywhere."""
    carried: Tensor | None
    """int64 [S]: how much of its memory, from its end, a sequence may see; None: all."""
    targets: Tensor
    """int64 [M]: the tokens that the query stream stands at, ascending."""

    @property
    def num_distances(self) -> int:
        """Rows of the table of distances."""
        return 2 * self.max_length + self.num_memory


def distances(sight: Sight, device: torch.device) -> Tensor:
    """The distance that each row of the table is for, int64 [P]: query minus key, from large to small."""
    return sight.max_length + sight.num_memory - torch.arange(sight.num_distances, device=device)


def prepare(sight: Sight, *, dropout: float, backend: str | None = None) -> Streams:
    """The attention of the content stream and of the query stream. `backend` is a key of BACKENDS, None chooses."""
    if sight.max_length == 0:
        return Streams(whole, attend_nothing, attend_nothing)
    return BACKENDS[backend or choose(sight.cu_seqlens.device.type, has_gradient=torch.is_grad_enabled())](sight, dropout)


def choose(device_type: str, *, has_gradient: bool) -> str:
    """The fastest back end for a device: lanes in training are one run, packed proteins are read without gradients."""
    return "flex" if device_type == "cuda" and not has_gradient else "runs"


def whole(key: Tensor, value: Tensor) -> Keys:
    """Keys as they are."""
    return Keys([(key, value)], key[:0] + value[:0])


def attend_nothing(query: Tensor, query_distance: Tensor, keys: Keys, table: Tensor) -> Tensor:
    """For no queries: no rows, but connected to everything."""
    return query + query_distance + keys.nothing + table[:0]


@dataclass(frozen=True)
class _Run:
    """n sequences of equal length, one after the other."""

    num: int
    length: int
    num_memory: int
    first_sequence: int
    first_token: int
    first_key: int
    first_distance: int
    """Row of the table that the largest distance of these sequences has."""

    @property
    def num_keys(self) -> int:
        return self.length + self.num_memory

    @property
    def sequences(self) -> slice:
        return slice(self.first_sequence, self.first_sequence + self.num)

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.num * self.length)

    @property
    def keys(self) -> slice:
        return slice(self.first_key, self.first_key + self.num * self.num_keys)

    @property
    def distances(self) -> slice:
        return slice(self.first_distance, self.first_distance + self.num_keys + self.length)


def _runs(sight: Sight) -> Iterator[_Run]:
    sequence, token, key = 0, 0, 0
    for length, group in groupby(sight.cu_seqlens.diff().tolist()):
        run = _Run(len(list(group)), length, sight.num_memory, sequence, token, key, sight.max_length - length)
        yield run
        sequence, token, key = run.sequences.stop, run.tokens.stop, run.keys.stop


def _hidden(run: _Run, sight: Sight, tokens_nR: Tensor, *, strictly: bool) -> Tensor | None:
    """bool [n, R, k]: what the queries at some tokens must not see; `strictly` hides what has the query's own place in the order."""
    if sight.order is None and sight.documents is None and sight.carried is None:
        return None
    later = torch.zeros((*tokens_nR.shape, run.length), dtype=torch.bool, device=tokens_nR.device)
    if sight.order is not None:
        keys_n1L, queries_nR1 = sight.order[run.tokens].view(run.num, 1, run.length), sight.order[tokens_nR][..., None]
        later = keys_n1L >= queries_nR1 if strictly else keys_n1L > queries_nR1
    passed = torch.zeros((*tokens_nR.shape, run.num_memory), dtype=torch.bool, device=tokens_nR.device)
    if sight.carried is not None:
        age_m = torch.arange(run.num_memory, 0, -1, device=tokens_nR.device)
        passed = passed | (age_m > sight.carried[run.sequences, None, None])
    if sight.documents is not None:
        keys_n1L, queries_nR1 = sight.documents[run.tokens].view(run.num, 1, run.length), sight.documents[tokens_nR][..., None]
        later, passed = later | (keys_n1L != queries_nR1), passed | (keys_n1L[..., :1] != queries_nR1)
    return torch.cat([passed, later], dim=-1)


def _arrange(runs: list[_Run], key: Tensor, value: Tensor) -> Keys:
    """[H n, k, D] for each run."""
    parts = []
    for run in runs:
        own_key, own_value = (part[run.keys].view(run.num, run.num_keys, *part.shape[1:]).permute(2, 0, 1, 3).flatten(0, 1) for part in (key, value))
        parts.append((own_key, own_value))
    return Keys(parts, key[:0] + value[:0])


def _attend_run(query_HnRD: Tensor, distance_HnRk: Tensor, keys: tuple[Tensor, Tensor], hidden_nRk: Tensor | None, dropout: float) -> Tensor:
    """Softmax of products and distance scores, times values: [n, R, H, D]."""
    key_BkD, value_BkD = keys
    scores = torch.baddbmm(distance_HnRk.flatten(0, 1), query_HnRD.flatten(0, 1), key_BkD.mT)
    if hidden_nRk is not None:
        scores.view(distance_HnRk.shape).masked_fill_(hidden_nRk, torch.finfo(scores.dtype).min)
    weights = functional.dropout(torch.softmax(scores, dim=-1), dropout).to(value_BkD.dtype)
    return last_product(weights, value_BkD).view(query_HnRD.shape).permute(1, 2, 0, 3)


def _content_stream(sight: Sight, dropout: float, runs: list[_Run]) -> Attend:
    index = torch.arange(runs[-1].tokens.stop, device=sight.cu_seqlens.device)
    masks = [_hidden(run, sight, index[run.tokens].view(run.num, run.length), strictly=False) for run in runs]

    def attend(query: Tensor, query_distance: Tensor, keys: Keys, table: Tensor) -> Tensor:
        results = []
        for run, own_keys, hidden in zip(runs, keys.parts, masks, strict=True):
            products_HRP = torch.bmm(query_distance[run.tokens].transpose(0, 1), table[run.distances].permute(1, 2, 0))
            scores = _shift(products_HRP.view(len(products_HRP), run.num, run.length, -1), run.num_keys)
            rows_HnLD = query[run.tokens].view(run.num, run.length, *query.shape[1:]).permute(2, 0, 1, 3)
            results.append(_attend_run(rows_HnLD, scores, own_keys, hidden, dropout).flatten(0, 1))
        return torch.cat(results)

    return attend


def _shift(products_HnLP: Tensor, num_keys: int) -> Tensor:
    """From a column a distance to a column a key, [H, n, L, k]: row i moves by L - i (Dai et al. 2019, appendix B); a view."""
    num_heads, num, length, num_distances = products_HnLP.shape
    behind_first = products_HnLP.view(num_heads, num, num_distances, length)[:, :, 1:]
    return behind_first.view(num_heads, num, length, num_distances - 1)[..., :num_keys]


def _query_stream(sight: Sight, dropout: float, runs: list[_Run]) -> Attend:
    if len(sight.targets) == 0:
        return attend_nothing
    counts = torch.searchsorted(sight.targets, sight.cu_seqlens.to(sight.targets.dtype)).diff()
    parts, first = [], 0
    for index, run in enumerate(runs):
        own_n = counts[run.sequences]
        num, most = (int(number) for number in (own_n.sum(), own_n.max()))
        if num:
            place_R = torch.arange(most, device=own_n.device)
            # A sequence with fewer targets gets a neighbour's too; the results are dropped.
            rows_nR = first + ((own_n.cumsum(0) - own_n)[:, None] + place_R).clamp(max=num - 1)
            tokens_nR = sight.targets[rows_nR]
            positions_nR = (tokens_nR - run.first_token) % run.length
            columns_nRk = run.length - positions_nR[..., None] + torch.arange(run.num_keys, device=own_n.device)
            parts.append((index, rows_nR, columns_nRk, place_R < own_n[:, None], _hidden(run, sight, tokens_nR, strictly=True)))
        first += num

    def attend(query: Tensor, query_distance: Tensor, keys: Keys, table: Tensor) -> Tensor:
        results = []
        for index, rows_nR, columns_nRk, is_real, hidden in parts:
            products_HRP = torch.bmm(query_distance[rows_nR.flatten()].transpose(0, 1), table[runs[index].distances].permute(1, 2, 0))
            products_HnRP = products_HRP.view(len(products_HRP), *rows_nR.shape, -1)
            scores = products_HnRP.gather(3, columns_nRk.expand(len(products_HnRP), -1, -1, -1))
            results.append(_attend_run(query[rows_nR].permute(2, 0, 1, 3), scores, keys.parts[index], hidden, dropout)[is_real])
        return torch.cat(results)

    return attend


def _by_runs(sight: Sight, dropout: float) -> Streams:
    """Products over runs of equal length: sequence by sequence where lengths differ, all lanes at once."""
    runs = list(_runs(sight))
    return Streams(functools.partial(_arrange, runs), _content_stream(sight, dropout, runs), _query_stream(sight, dropout, runs))


def _by_flex(sight: Sight, dropout: float) -> Streams:
    from .relative_attention_flex import attend_by_flex

    return attend_by_flex(sight, dropout)


BACKENDS: dict[str, Callable[[Sight, float], Streams]] = {"runs": _by_runs, "flex": _by_flex}
