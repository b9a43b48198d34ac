"""The other way to train: transformers' tokenizer, collator and Trainer, as their documentation uses them."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prottrans_hpc.architectures.prot_bert import ARCHITECTURE, BertShape
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.recipe import Recipe
from prottrans_hpc.train.loader import validation_batches

SIZE = "small"
BATCH = 32
MAX_RESIDUES = 512
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Point:
    """One measurement of the validation loss."""

    residues: int
    seconds: float
    loss: float


def run_trainer(corpus: Path, recipe: Recipe, *, residues: int, bf16: bool, folder: Path) -> list[Point]:
    """transformers' own route: tokenizer, collator and Trainer as their documentation uses them."""
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    proteins = Proteins(Corpus(read_index(corpus), "train"), tokenizer)
    model = transformers.BertForMaskedLM(bert_config(ARCHITECTURE.size(SIZE).shape))
    steps = math.ceil(residues / (BATCH * proteins.mean_residues))
    held_out = validation_batches(Corpus(read_index(corpus), "validation"), recipe, ARCHITECTURE.vocabulary, rank=0, world_size=1, max_residues=MAX_RESIDUES)
    recorder = make_recorder(model, held_out, proteins.mean_residues, every=max(1, steps // 12))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        warmup_steps=steps // 20,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    transformers.Trainer(model=model, args=arguments, data_collator=collator, train_dataset=proteins, callbacks=[recorder]).train()
    points: list[Point] = recorder.points
    return points


def make_tokenizer(folder: Path) -> Any:
    """The published vocabulary in transformers' tokenizer."""
    import transformers

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(ARCHITECTURE.vocabulary.tokens) + "\n")
    return transformers.BertTokenizer.from_pretrained(str(folder), do_lower_case=False)


def bert_config(shape: BertShape) -> Any:
    """The same hyper-parameters for transformers; attention is its default (SDPA)."""
    import transformers

    return transformers.BertConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class Proteins(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Tokenised proteins, cut behind the limit, as a user of the Trainer prepares them: the tokenizer's time is not counted."""

    def __init__(self, corpus: Corpus, tokenizer: Any) -> None:
        table = np.frombuffer(ARCHITECTURE.vocabulary.residue_table(), np.uint8)
        lengths = np.minimum(corpus.lengths_of(np.arange(corpus.num_sequences)), MAX_RESIDUES)
        self.mean_residues = float(lengths.mean())
        self._corpus, self._lengths, self._table = corpus, lengths, table
        self._ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        from prottrans_hpc.corpus.samples import whole_sequences

        length = int(self._lengths[index])
        tokens = np.empty(length, np.int64)
        sample = whole_sequences(np.array([index]), np.array([length]), epoch=0)
        self._corpus.gather(sample, ARCHITECTURE.vocabulary.residue_table(), tokens, np.zeros(1, np.int64))
        return {"input_ids": [self._ends[0], *tokens.tolist(), self._ends[1]]}


def make_recorder(model: Any, held_out: list[Any], mean_residues: float, *, every: int) -> Any:
    """A Trainer callback that measures the validation loss and keeps its own time out of the clock."""
    import transformers

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.points: list[Point] = []
            self._seconds, self._since = 0.0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._since = time.perf_counter()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step % every and state.global_step != state.max_steps:
                return
            self._seconds += time.perf_counter() - self._since
            self.points.append(Point(round(state.global_step * BATCH * mean_residues), self._seconds, padded_loss(model, held_out)))
            self._since = time.perf_counter()

    return Recorder()


@torch.no_grad()
def padded_loss(model: Any, batches: list[Any]) -> float:
    """The mean validation loss of a transformers model on our packed batches, sequence by sequence."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for start, end in pairwise(borders):
            chosen = (batch.target_positions >= start) & (batch.target_positions < end)
            logits = model(input_ids=batch.tokens[None, start:end]).logits[0, batch.target_positions[chosen] - start]
            total += float(torch.nn.functional.cross_entropy(logits.float(), batch.targets[chosen], reduction="sum"))
            count += int(chosen.sum())
    model.train()
    return total / count
