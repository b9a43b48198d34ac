"""One optimizer step of each family as a user of transformers writes it: padded batches, the library's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prottrans_hpc.architecture import Architecture, Batch
from prottrans_hpc.models.huggingface import HuggingFaceLayout, layout_of

IGNORED = -100
"""The label that transformers' losses leave out."""


def model_of(layout: HuggingFaceLayout, shape: Any, *, masked: bool = False) -> Any:
    """transformers' class of the same shape, with its own starting weights; `masked`: without the head of the second sentence."""
    import transformers

    values = layout.write_config(shape)
    name, kind = values["architectures"][0], values["model_type"]
    config = transformers.AutoConfig.for_model(**{key: value for key, value in values.items() if key != "architectures"} | {"model_type": kind})
    return getattr(transformers, name.replace("ForPreTraining", "ForMaskedLM") if masked else name)(config)


def padded(rows: list[Tensor], fill: int, width: int | None = None) -> Tensor:
    """Rows as one matrix, filled up to the longest or to `width`."""
    longest = width or max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows])


def rows_of(values: Tensor, borders: Tensor) -> list[Tensor]:
    """A packed vector as one row a sequence."""
    return list(values.split(borders.diff().tolist()))


class Padded:
    """The same sequences, corrupted alike, as padded matrices."""

    def __init__(self, batch: Batch, padding: int, width: int | None) -> None:
        self.tokens = padded(rows_of(batch.tokens, batch.cu_seqlens), padding, width)
        self.mask = padded(rows_of(torch.ones_like(batch.tokens), batch.cu_seqlens), 0, width)
        # Where the targets point into the decoder there are no labels in the encoder.
        num_rows = len(batch.tokens) if batch.decoder_tokens is None else len(batch.decoder_tokens)
        labels = torch.full((num_rows,), IGNORED)
        labels[batch.target_positions] = batch.targets
        borders = batch.cu_seqlens if batch.decoder_cu_seqlens is None else batch.decoder_cu_seqlens
        self.labels = padded(rows_of(labels, borders), IGNORED, width)
        self.order = None if batch.permutation is None else padded(rows_of(batch.permutation, batch.cu_seqlens), -1, width)

    def to(self, device: torch.device) -> Padded:
        """With everything on a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


Loss = Callable[[Padded], Tensor]


def _labelled(record: Architecture, shape: Any) -> tuple[torch.nn.Module, Loss]:
    model = model_of(layout_of(record), shape, masked=True)
    return model, lambda batch: model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss


def _electra(record: Architecture, shape: Any) -> tuple[torch.nn.Module, Loss]:
    """Generator, sampling, discriminator: transformers has both models, the step is the user's."""
    layout = layout_of(record)
    generator, discriminator = model_of(layout.companions["generator"].layout, shape), model_of(layout, shape)
    generator.electra.embeddings = discriminator.electra.embeddings

    def loss(batch: Padded) -> Tensor:
        out = generator(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels)
        is_target = batch.labels != IGNORED
        with torch.no_grad():
            sampled = torch.distributions.Categorical(logits=out.logits[is_target].float()).sample()
        original = torch.where(is_target, batch.labels, batch.tokens)
        tokens = original.masked_scatter(is_target, sampled)
        found = discriminator(input_ids=tokens, attention_mask=batch.mask, labels=(tokens != original).long())
        total: Tensor = out.loss + 50.0 * found.loss
        return total

    return torch.nn.ModuleList([generator, discriminator]), loss


def _xlnet(record: Architecture, shape: Any) -> tuple[torch.nn.Module, Loss]:
    model = model_of(layout_of(record), shape)

    def loss(batch: Padded) -> Tensor:
        assert batch.order is not None
        ordered = batch.order >= 0
        hidden = (batch.order[:, :, None] <= batch.order[:, None, :]) & ordered[:, None, :]
        most = int((batch.labels != IGNORED).sum(1).max())
        mapping = torch.zeros(len(batch.tokens), most, batch.tokens.shape[1], device=batch.tokens.device)
        labels = torch.full((len(batch.tokens), most), IGNORED, device=batch.tokens.device)
        for row, wanted in enumerate(batch.labels):
            places = (wanted != IGNORED).nonzero().flatten()
            mapping[row, torch.arange(len(places)), places] = 1.0
            labels[row, : len(places)] = wanted[places]
        found: Tensor = model(input_ids=batch.tokens, attention_mask=batch.mask.float(), perm_mask=hidden.float(), target_mapping=mapping, labels=labels).loss
        return found

    return model, loss


CONTENDERS: dict[str, Callable[[Architecture, Any], tuple[torch.nn.Module, Loss]]] = {
    "prot_bert": _labelled,
    "prot_albert": _labelled,
    "prot_electra": _electra,
    "prot_t5": _labelled,
    "prot_xlnet": _xlnet,
    "protein_lm": _labelled,
}
"""Transformer-XL is in no current transformers."""
