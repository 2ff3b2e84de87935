"""Token ids are inside the vocabulary that the model has."""

from __future__ import annotations

from storylab.training.check import Check, Finding, Subject


def run(subject: Subject) -> Finding:
    """Compare the ids of the next micro-batch, targets included, with the rows of the embedding."""
    rows = subject.setup.state.model.embedding.num_embeddings
    least, most = (int(value) for value in subject.micro_batch.cpu().aminmax())
    fault = ""
    if least < 0 or most >= rows:
        fault = (
            f"the first batch has token ids from {least} to {most}, the model ids from 0 to {rows - 1}: "
            "prepare the data again with the tokenizer that the model is for"
        )
    return Finding(f"ids from {least} to {most} of {rows:,}", fault)


CHECK = Check("token ids", 10, run)
